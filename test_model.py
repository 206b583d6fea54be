"""Tests: `python -m pytest test_model.py`. Nothing is downloaded; what needs a missing package is skipped.

Every test fails if the thing it names breaks. Sections: helpers; model; settings and text; scenes and commands; stored
data; training; evaluation; answering; ablations.
"""
import ast
import base64
import contextlib
import csv
import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ablate
import commands
import config
import evaluate
import model as model_file
import prepare
import tokenizer
import train
import visualize
from commands import CATEGORIES, UNSURE, FALSE, QUESTIONS, TRUE, Question, View, check_reason
from config import UserError
from model import Attention, Packing, RMSNorm, VLM, rope_tables, rotate, self_mask
from tokenizer import Tokenizer

TINY = dict(image_size=32, patch_size=8, stem_width=8, vision_dim=32, vision_layers=2, vision_heads=2,
            vision_ffn_dim=64, text_dim=32, text_layers=2, text_heads=4, text_kv_heads=2, text_head_dim=8,
            text_ffn_dim=48, max_text=24)
V = 50           # words of the tiny vocabulary


def tiny(**changes):
    """A small model in eval mode with seeded weights; changes: settings other than TINY."""
    torch.manual_seed(0)
    return VLM(config.from_args([], **{**TINY, **changes}), V).eval()


def pictures(count, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def words(*shape, seed=2):
    """Random tokens without [PAD]."""
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths, left=False, seed=3):
    """Rows (N, longest) of random words of those lengths, padded to the right or to the left."""
    rows = words(len(lengths), max(lengths), seed=seed)
    for row, length in zip(rows, lengths):
        pads = slice(0, max(lengths) - length) if left else slice(length, None)
        row[pads] = 0
    return rows


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


SETS = ("train", "val", "test", "ood", "test_words", "test_combos")
DEFAULTS = config.from_args()
SIZE = DEFAULTS.image_size
SMALL = dict(vision_dim=32, vision_heads=1, vision_layers=1, vision_ffn_dim=64, stem_width=8, text_dim=32, text_heads=2,
             text_kv_heads=1, text_head_dim=16, text_layers=1, text_ffn_dim=32, batch_size=4, commands_per_image=4,
             dtype="float32", device="cpu", eval_items=40, warmup_steps=2, log_every=1, max_steps=4, see_steps=0)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A small drawn data set: its settings, meta, frames, commands of each set, and pictures. Nobody writes to it."""
    folder = tmp_path_factory.mktemp("data")
    cfg = config.from_args([], num_scenes=400, num_ood_scenes=40, data_dir=str(folder), workers=1, min_cell=2)
    meta = prepare.prepare(cfg)
    frames = [json.loads(line) for line in (folder / "frames.jsonl").read_text(encoding="utf-8").splitlines()]
    return SimpleNamespace(cfg=cfg, meta=meta, frames=frames, items={s: prepare.read_items(folder, s) for s in SETS},
                           images=np.load(folder / "images.npy", mmap_mode="r"), views=[View(f, cfg) for f in frames])


@pytest.fixture(scope="session")
def lexicon():
    return tokenizer.Tokenizer(commands.vocabulary())


def changed(cfg, **changes):
    return SimpleNamespace(**{**vars(cfg), **changes})


def small_run(drawn, out, **changes):
    """Settings of a run of a second on the drawn data."""
    return config.check(changed(drawn.cfg, **{**SMALL, "out_dir": str(out), **changes}))


def small_model(cfg, vocab_size):
    torch.manual_seed(0)
    return VLM(cfg, vocab_size).eval()


def box(category, centre=64.0, bottom=75.0, width=16.0, height=16.0, colour="none"):
    """A label by hand. At 128 pixels, left is below 38, ahead 47 to 81, right above 90; near is a bottom above 96."""
    edges = dict(x1=centre - width / 2, y1=bottom - height, x2=centre + width / 2, y2=bottom)
    return dict(category=category, box2d=edges, attributes=dict(trafficLightColor=colour))


def lamp(colour, **where):
    return box("traffic light", **{**dict(centre=64.0, bottom=40.0, width=12.0, height=16.0, colour=colour), **where})


def view_of(*labels):
    return View(dict(name="hand", labels=list(labels), attributes={}), DEFAULTS)


def ask(template, first="", second="", labels=()):
    return Question(template, first, second).truth(view_of(*labels))


def reason_of(template, first="", second="", labels=()):
    """The reason of a certain answer, after its own check."""
    view = view_of(*labels)
    question = Question(template, first, second)
    assert question.truth(view) != UNSURE
    reason = question.reason(view)
    assert check_reason(reason, view) == TRUE
    return reason


def swapped(text):
    """left <-> right in a text."""
    return re.sub(r"\b(left|right)\b", lambda m: {"left": "right", "right": "left"}[m.group()], text)


def mirrored(frame, size):
    labels = [dict(lab, box2d=dict(lab["box2d"], x1=size - lab["box2d"]["x2"], x2=size - lab["box2d"]["x1"]))
              for lab in frame["labels"]]
    return dict(frame, labels=labels)


def moved(frame, x, y, scale, size):
    """The labels of a frame after cropping at (x, y) and enlarging by `scale`."""
    labels = []
    for label in frame["labels"]:
        b = label["box2d"]
        new = {k: (b[k] - (x if k[0] == "x" else y)) * scale for k in ("x1", "y1", "x2", "y2")}
        new = {k: min(max(v, 0.0), float(size)) for k, v in new.items()}
        if new["x2"] - new["x1"] > 1 and new["y2"] - new["y1"] > 1:
            labels.append(dict(label, box2d=new))
    return dict(frame, labels=labels)


def question_of(item):
    return Question(item["template"], item["first"], item["second"])


def as_pixels(images, data):
    """Normalised (B, 3, S, S) back to (B, S, S, 3) in 0..255, float."""
    return (images.numpy().transpose(0, 2, 3, 1) * data.std + data.mean) * 255


def pictures_shown(batch, data):
    """Which stored picture each image of an unflipped, unjittered batch is."""
    patch = np.asarray(data.images[:, 60:64, 60:64], dtype=np.float32).reshape(len(data.images), -1)
    seen = as_pixels(batch.images, data)[:, 60:64, 60:64].reshape(len(batch.images), -1)
    distance = np.abs(seen[:, None] - patch[None]).max(-1)
    assert distance.min(1).max() < 0.01
    return distance.argmin(1)


def rows_of(batch, data, pictures):
    """Row of the set's commands for each (picture, command) of an unflipped batch: (B, K) list of list of int."""
    found = []
    for picture, texts in zip(pictures, batch.tokens.numpy()):
        own = np.flatnonzero(data.index[:, 0] == picture)
        known = {tuple(data.tokens[r, :data.index[r, 2]].tolist()): int(r) for r in own}
        found.append([known[tuple(t[t != 0].tolist())] for t in texts])
    return found


def log_losses(out):
    """{step: loss} of log.csv."""
    with open(Path(out) / "log.csv", newline="", encoding="utf-8") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}


def interrupt_at(monkeypatch, step):
    """Ctrl-C while update `step` begins."""
    scale = train.lr_scale

    def scale_or_stop(now, cfg):
        if now == step:
            signal.raise_signal(signal.SIGINT)
        return scale(now, cfg)
    monkeypatch.setattr(train, "lr_scale", scale_or_stop)


def made_up(root, **changes):
    """Settings of a run of milliseconds an update: 12 pictures of noise a set, random words, in a folder of their own.

    numpy's generator makes all of it, so that it is the same on every machine, and a pass takes 3 updates.
    """
    cfg = small_run(SimpleNamespace(cfg=DEFAULTS), root / "out", data_dir=str(root / "data"), image_size=32,
                    patch_size=8, **changes)
    rng, words, k = np.random.default_rng(0), Tokenizer(train.TAGS + ["left", "right", "?"]).words, np.arange(96)
    folder = Path(cfg.data_dir)
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", rng.integers(0, 256, (36, 32, 32, 3), np.uint8))
    for i, name in enumerate(("train", "val", "test")):
        prompt, answer = 4 + k % 3, np.where(k % 8 < 4, k % 2, -1)         # of 8 commands, 4 are descriptions
        index = np.stack([12 * i + k // 8, prompt, prompt + 3 + k % 4, answer], 1)
        tokens = rng.integers(6, len(words), (96, 12))
        tokens[k, prompt] = np.where(answer < 0, tokens[k, prompt], np.where(answer, tokenizer.YES, tokenizer.NO))
        tokens[np.arange(12) >= index[:, 2:3]] = tokenizer.PAD
        np.save(folder / f"index_{name}.npy", index.astype(np.int32))
        np.save(folder / f"tokens_{name}.npy", tokens.astype(np.uint16))
        (folder / f"commands_{name}.jsonl").write_text('{"family": "noise"}\n' * 96, encoding="utf-8")
    meta = dict(magic=prepare.MAGIC, version=prepare.VERSION, hash=config.data_hash(cfg), mean=[0.5] * 3, std=[0.3] * 3)
    for name, content in (("vocab.json", words), ("meta.json", meta)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return cfg


def last_of(cfg):
    """What last.pt holds but for the settings, which may differ in out_dir and resume."""
    state = train.load_checkpoint(Path(cfg.out_dir) / "last.pt")
    return {k: v for k, v in state.items() if k != "config"}


def logged(cfg):
    """The rows of log.csv without times."""
    with open(Path(cfg.out_dir) / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in ("ms", "pairs_per_s", "wait_share", "seconds")}
                for row in csv.DictReader(file)]


class Killed(BaseException):
    """The end of a process, which nothing catches."""


def killed(*_):
    raise Killed


def wordings(question, paraphrase, tries=12):
    return {question.words(random.Random(seed), paraphrase) for seed in range(tries)}


BLOCK = {place: box("truck", centre=x, bottom=110) for place, x in (("left", 20), ("ahead", 64), ("right", 108))}
FAR = {place: dict(BLOCK[place], box2d=dict(BLOCK[place]["box2d"], y2=75, y1=59)) for place in BLOCK}
CAR_LEFT, BUS_AHEAD = box("car", centre=20), box("bus", bottom=110)


def touched(spec, o, size):
    """Pixels that an object may touch: its box, a generous shadow, the pole of what hangs, and the blur."""
    x1, y1, x2, y2 = prepare.object_box(spec, o)
    aside = 0.0 if o["y"] > 0 else 0.7 * (x2 - x1)
    below = prepare.project(spec, o["x"], 0, o["z"])[1] if o["y"] > 0 else y2 + 0.2 * (x2 - x1) + 0.02
    mask, grow = np.zeros((size, size), bool), 5
    left, top, right, low = (int(v * size) for v in (x1 - aside, y1, x2 + aside, below))
    mask[max(0, top - grow):max(0, low + grow), max(0, left - grow):max(0, right + grow)] = True
    return mask


def bdd_folder(root):
    """A BDD100K tree as of 2018 with 20 frames for train and 6 for val; returns {name: record}, in the lists' order."""
    rng, records = random.Random(0), {}

    def label(category, *edges, **attributes):
        return dict(category=category, box2d=dict(zip(("x1", "y1", "x2", "y2"), edges)), attributes=attributes, id=1)
    for folder, count in (("train", 20), ("val", 6)):
        listed, pictures = [], root / "images" / "100k" / folder
        pictures.mkdir(parents=True)
        (root / "labels").mkdir(exist_ok=True)
        for i in range(count):
            x = rng.choice((20, 140, 250))
            listed.append(dict(name=f"{folder}{i:02d}.jpg", timestamp=10000, attributes=dict(
                weather="clear", scene="city street", timeofday="daytime"), labels=[
                    label(rng.choice(("car", "bus", "person")), x, 60, x + 50, rng.choice((100, 160)))]))
            Image.new("RGB", (320, 180), (40 + i, 90, 140)).save(pictures / listed[-1]["name"])
        if folder == "train":
            lane = dict(category="lane", poly2d=[dict(vertices=[[0, 0], [5, 5]], types="LL", closed=False)], id=2)
            listed[1]["labels"] = [label("car", 30, 60, 90, 170), dict(category="bus", box2d=None, attributes={}),
                                   label("truck", 200, 100, 150, 120), label("spaceship", 1, 1, 90, 90), lane,
                                   label("bike", -20, 90, 60, 400), label("motor", 400, 10, 500, 90),
                                   label("traffic light", 100, 10, 130, 70, trafficLightColor="G"),
                                   dict(category="drivable area", poly2d=[[1, 2]], box2d=None)]
            listed[2]["labels"] = None
            listed[3]["labels"] = [lane]
            listed[4]["attributes"]["weather"] = "rainy"
            listed[5]["attributes"] = dict(weather="undefined", scene="city street", timeofday="daytime")
            (pictures / listed[6]["name"]).unlink()
            full = (pictures / listed[7]["name"]).read_bytes()
            (pictures / listed[7]["name"]).write_bytes(full[:len(full) // 2])
            (pictures / listed[8]["name"]).write_text("not a picture")
        (root / "labels" / f"bdd100k_labels_images_{folder}.json").write_text(json.dumps(listed))
        records.update({r["name"]: r for r in listed})
    return records


def bdd_settings(folder, **changes):
    """Settings for the tree folder/bdd, data in folder/out."""
    return config.from_args([], source="bdd100k", bdd_dir=str(folder / "bdd"), data_dir=str(folder / "out"),
                            **{**dict(workers=1, min_cell=1), **changes})


def rejected_in(folder):
    with open(folder / "rejected.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def frames_in(folder):
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text(encoding="utf-8").splitlines()]


RECORDS = [dict(name="a.jpg", labels=[dict(category="car", box2d=dict(x1=1.5, y1=2, x2=3e2, y2=-4))]),
           dict(name='quote " and ] } , [ { in a name \\', labels=None), dict(name="ünïcode 路", labels=[]), {},
           dict(name="x" * 50, attributes=dict(deep=[[[1, 2], [3]], dict(a=dict(b=[True, None]))]))]


def refuses(call, *words):
    """call() ends in a UserError of one line that holds all these words."""
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text, text
    assert all(word in text for word in words), text


def fuzz(cases, call):
    """Every case is accepted or refused in one line; returns how many were refused."""
    refused = 0
    for case in cases:
        try:
            call(case)
        except UserError as error:
            assert "\n" not in str(error), case
            refused += 1
    return refused


# ---- model: shapes ----
@pytest.mark.parametrize("change", [{}, dict(stem="patch"), dict(vision_positions="sincos"), dict(ffn="swiglu"),
                                    dict(text_kv_heads=1), dict(text_kv_heads=4), dict(patch_size=16)])
def test_shapes(change):
    model = tiny(**change)
    P = (32 // model.cfg.patch_size) ** 2
    images, tokens = pictures(2), words(2, 3, 7)
    logits, attn = model(images, tokens, return_attn=True)
    assert logits.shape == (2, 3, 7, V) and logits.dtype == torch.float32
    assert model(images, tokens[:, 0]).shape == (2, 7, V)
    assert {k: tuple(v.shape) for k, v in attn.items()} == {
        "vision": (2, 2, 2, P, P), "self": (2, 6, 4, 7, 7), "cross": (2, 6, 4, 7, P)}
    features = model.features(images)
    assert list(features) == ["stem", "block0", "block1", "encoder", "projected"]
    assert all(x.shape == (2, P, 32) for x in features.values())
    close(features["projected"], model.encode(images))
    loss, attn = model(images, tokens, tokens, return_attn=True)
    assert loss.shape == () and attn["cross"].requires_grad


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_patches_run_row_by_row(positions):
    model, images = tiny(stem="patch", vision_positions=positions), pictures(1)
    before = model.features(images)["stem"]
    images[:, :, 8:16, 24:] += 1                          # second row, last column of the 4 x 4 patches
    changed = (model.features(images)["stem"] - before).abs().sum(-1)[0] > 1e-3
    assert changed.nonzero().flatten().tolist() == [7]
    grid = model_file.sincos_2d(4, 32).view(4, 4, 2, 16)  # first half: the column, second half: the row
    assert torch.equal(grid[0, :, 0], grid[3, :, 0]) and torch.equal(grid[:, 0, 1], grid[:, 3, 1])
    assert torch.pdist(grid.flatten(0, 1).flatten(1)).min() > 0.1


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_the_conv_stem_sees_each_patch_from_its_middle(patch):
    """The pixels that a patch hangs on, all weights being 1: their mean lies within a pixel of the patch's middle."""
    stem = model_file.conv_stem(config.from_args([], patch_size=patch, image_size=4 * patch))
    stem = torch.nn.Sequential(*(layer for layer in stem if not isinstance(layer, torch.nn.GELU)))
    for p in stem.parameters():
        torch.nn.init.constant_(p, 1.0 if p.ndim > 1 else 0.0)
    image = torch.ones(1, 3, 4 * patch, 4 * patch, requires_grad=True)
    out = stem(image)
    assert out.shape[2:] == (4, 4)
    out[0, 0, 1, 2].backward()
    weight = image.grad[0, 0] / image.grad[0, 0].sum()
    pixel = torch.arange(4.0 * patch)
    assert abs((weight.sum(1) @ pixel).item() - (1.5 * patch - 0.5)) <= 1
    assert abs((weight.sum(0) @ pixel).item() - (2.5 * patch - 0.5)) <= 1
    assert weight[patch:2 * patch, 2 * patch:3 * patch].min() > 0


def test_wrong_shapes_are_named():
    model = tiny()
    with pytest.raises(ValueError, match="32, 32"):
        model(pictures(1, 40), words(1, 1, 4))
    with pytest.raises(ValueError, match="25 tokens exceeds max_text=24"):
        model(pictures(1), words(1, 1, 25))
    with pytest.raises(ValueError, match="exceed max_text=24"):
        model.generate(pictures(1), words(1, 1, 20), 5)


# ---- model: masks and padding ----
def test_causality():
    model, images, tokens = tiny(), pictures(1), words(1, 1, 10)
    before = model(images, tokens)
    tokens[..., 6] = (tokens[..., 6] - 2) % (V - 3) + 3
    after = model(images, tokens)
    close(before[:, :, :6], after[:, :, :6], 1e-6)
    assert (before[:, :, 6:] - after[:, :, 6:]).abs().amax(-1).min() > 1e-3


def test_self_mask_by_hand():
    real = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    want = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]).bool()
    assert torch.equal(self_mask(real, 3)[:, 0] == 0, want)
    assert torch.equal(self_mask(real, 1)[:, 0] == 0, want[:, 2:]), "the newest query, the others being in the cache"


def test_cross_attention_is_not_causal():
    model, images = tiny(), pictures(1)
    tokens = words(1, 1, 5)
    _, attn = model(images, tokens, return_attn=True)
    assert attn["cross"][:, :, :, 0].min() > 0, "the first word must see every patch"
    vision = model.encode(images).detach().requires_grad_()
    model.decode(vision, tokens)[0, 0, 0].square().sum().backward()
    assert (vision.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("attention", ["hand", "fast"])
def test_padding_changes_nothing(attention):
    model, images = tiny(attention=attention), pictures(2)
    lengths = [4, 7, 1, 6]
    right = padded(lengths).view(2, 2, 7)
    left = torch.stack([row.roll(7 - n) for row, n in zip(right.view(4, 7), lengths)]).view(2, 2, 7)
    wide = F.pad(right, (2, 3))
    a, b, c = (model(images, tokens).flatten(0, 1) for tokens in (right, left, wide))
    for i, n in enumerate(lengths):
        alone = model(images[i // 2:i // 2 + 1], right.view(4, 7)[i:i + 1, :n])[0]
        for other in (a[i, :n], b[i, 7 - n:], c[i, 2:2 + n]):
            close(alone, other)


def test_row_of_padding_only():
    for attention in ("hand", "fast"):
        model = tiny(attention=attention)
        tokens = padded([5, 0, 3])[None]
        logits = model(pictures(1), tokens)
        assert logits.isfinite().all()
        logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_packing_goes_there_and_back():
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    packing = Packing(real.flatten().nonzero()[:, 0], 3, 4)
    x = torch.arange(12.0).view(3, 4, 1)
    assert packing.unpad(x).flatten().tolist() == [0, 1, 2, 4, 10, 11]
    assert torch.equal(packing.pad(packing.unpad(x)), x * real[..., None])


def test_the_number_of_tokens_is_rounded_with_padding_of_all_pictures(monkeypatch):
    """16 pictures of 20 words: 320 tokens become 512, and each picture's query 32 long, not one of them all 64."""
    made = []
    monkeypatch.setattr(model_file, "Packing", lambda *args: made.append(Packing(*args)) or made[-1])
    tokens = F.pad(words(16, 4, 5), (0, 11), value=tokenizer.PAD)
    tiny()(pictures(16), tokens)
    assert [len(packing.index) for packing in made] == [512, 512] and [packing.length for packing in made] == [16, 32]


# ---- model: attention ----
def test_attention_rows_sum_to_one_and_skip_padding():
    model = tiny()
    for left in (False, True):
        tokens = padded([4, 7, 2, 6], left).view(2, 2, 7)
        real = (tokens != 0).view(4, 7)
        _, attn = model(pictures(2), tokens, return_attn=True)
        close(attn["vision"].sum(-1), torch.ones(2, 2, 2, 16))
        own, cross = attn["self"].transpose(2, 3)[:, real], attn["cross"].transpose(2, 3)[:, real]
        close(own.sum(-1), torch.ones(2, 19, 4))
        close(cross.sum(-1), torch.ones(2, 19, 4))
        pad_keys = ~real[:, None].expand(4, 7, 7)[real]                           # (M, S)
        assert (own * pad_keys[None, :, None]).max() == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_hand_and_fast_attention_agree(kv_heads):
    torch.manual_seed(0)
    hand = Attention(16, 4, kv_heads, 8, bias=False, path="hand")
    fast = Attention(16, 4, kv_heads, 8, bias=False, path="fast")
    fast.load_state_dict(hand.state_dict())
    x, source = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 9, 16)
    mask = self_mask(padded([5, 3, 4]) != 0, 5)
    for keys, bias in ((x, mask), (source, None)):
        a, b = (m(x, *m.keys_values(keys), bias) for m in (hand, fast))
        close(a, b)
        close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (a, b)), 1e-4)
    models = [tiny(attention=path, text_kv_heads=kv_heads) for path in ("hand", "fast")]
    tokens = padded([4, 7, 2, 6]).view(2, 2, 7)
    close(*(m(pictures(2), tokens) for m in models))


def test_grouped_queries_equal_repeated_heads():
    torch.manual_seed(0)
    few, many = Attention(16, 4, 2, 8, bias=False, path="hand"), Attention(16, 4, 4, 8, bias=False, path="hand")
    state = few.state_dict()
    state["kv.weight"] = state["kv.weight"].view(2, 2, 8, 16).repeat_interleave(2, dim=1).reshape(64, 16)
    many.load_state_dict(state)
    x, collected = torch.randn(2, 5, 16), ([], [])
    close(*(m(x, *m.keys_values(x), collect=c) for m, c in zip((few, many), collected)))
    close(collected[0][0], collected[1][0])
    q, k, v = torch.randn(1, 8, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    close(F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
          F.scaled_dot_product_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)))


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    layer, x = Attention(16, 4, 2, 8, bias=True), torch.randn(2, 5, 16)
    q = layer.q(x).view(2, 5, 4, 8).transpose(1, 2)
    k, v = (t.repeat_interleave(2, 1) for t in layer.keys_values(x))
    weights = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1)
    close(layer(x, *layer.keys_values(x)), layer.out((weights @ v).transpose(1, 2).reshape(2, 5, 32)))


def test_rope_depends_on_relative_positions_only():
    cos, sin = rope_tables(40, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    at = lambda x, position: rotate(x, (cos[position][None, None], sin[position][None, None]))      # noqa: E731
    score = lambda i, j: (at(q, i) * at(k, j)).sum()                                                # noqa: E731
    close(score(9, 4), score(35, 30))
    close(at(q, 17).norm(), q.norm())
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3
    angle = 3 * 10000 ** (-2 / 8)         # position 3, second of the 4 pairs, (1, 5) as halves are split
    close(at(q, 3)[0, 0, 1], q[0, 0, 1] * math.cos(angle) - q[0, 0, 5] * math.sin(angle))


def test_self_attention_depends_on_relative_positions_only():
    torch.manual_seed(0)
    layer, x, packing = Attention(16, 4, 2, 8, bias=False), torch.randn(5, 16), Packing(torch.arange(5), 1, 5)
    tables, mask = rope_tables(40, 8, 10000.0), self_mask(torch.ones(1, 5).bool(), 5)

    def run(positions):
        rope = [table[positions][:, None] for table in tables]
        return layer(x, *layer.keys_values(x, rope, packing), mask, rope, packing)
    close(run(torch.arange(5)), run(torch.arange(5) + 30))
    assert (run(torch.arange(5)) - run(torch.arange(5) * 2)).abs().max() > 1e-3


def test_rms_norm():
    x, norm = torch.randn(4, 8), RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight))


# ---- model: pictures and commands ----
def test_commands_together_equal_one_by_one():
    model, images, tokens = tiny(), pictures(2), padded([4, 7, 2, 6, 5, 7]).view(2, 3, 7)
    real = tokens != 0
    together, attn = model(images, tokens, return_attn=True)
    for i in range(2):
        for k in range(3):
            alone, own = model(images[i:i + 1], tokens[i:i + 1, k], return_attn=True)
            n = real[i, k].sum()
            close(together[i, k, :n], alone[0, :n])
            close(attn["cross"][:, 3 * i + k, :, :n], own["cross"][:, 0, :, :n])
    vision = model.encode(images).flip(0)
    assert (model.decode(vision, tokens) - together)[real].abs().max() > 1e-3, "each command must see its own picture"


def test_loss_equals_cross_entropy_on_all_logits():
    model, images, tokens = tiny(), pictures(2), padded([4, 7, 2, 6]).view(2, 2, 7)
    targets = torch.where((tokens != 0) & (words(2, 2, 7, seed=5) % 2 == 0), words(2, 2, 7, seed=6), -100)
    assert 3 < (targets >= 0).sum() < 18
    want = F.cross_entropy(model(images, tokens).flatten(0, 2), targets.flatten(), ignore_index=-100)
    close(model(images, tokens, targets), want)
    seen = []
    total = model(images, tokens, targets, loss_fn=lambda logits, t: seen.append(t) or logits.logsumexp(-1).sum())
    assert torch.equal(seen[0], targets[targets >= 0]), "the loss sees learned targets only"
    close(total, model(images, tokens).logsumexp(-1)[targets >= 0].sum())


def test_freezing():
    model, images, tokens = tiny(), pictures(2), words(2, 2, 5)
    for part in ("vision", "projection", "decoder"):
        model.zero_grad()
        model.freeze(part)
        model(images, tokens, tokens).backward()
        for name, p in model.named_parameters():
            assert (p.grad is None or not p.grad.any()) == name.startswith(part), name
        model.freeze(part, on=False)
    model.zero_grad()
    model(images, tokens, tokens).backward()
    assert all(p.grad.any() for p in model.parameters() if p.dim() > 1)
    with pytest.raises(ValueError, match="no part 'stem'"):
        model.freeze("stem")


def test_dropout_only_in_training():
    model, images, tokens = tiny(dropout=0.5), pictures(1), words(1, 1, 5)
    assert torch.equal(model(images, tokens), model(images, tokens))
    model.train()
    assert not torch.equal(model(images, tokens), model(images, tokens))
    model.generate(images, tokens, 2)
    assert model.training, "generate leaves the mode as it was"


def test_contrastive_loss():
    model, images = tiny(contrast_weight=0.1), pictures(3)
    assert not hasattr(tiny(), "contrast")
    tokens = padded([4, 6, 2])
    vision = model.encode(images)
    loss = model.contrastive_loss(vision, tokens)
    moved = torch.stack([row.roll(6 - n) for row, n in zip(tokens, [4, 6, 2])])
    close(model.contrastive_loss(vision, moved), loss)
    hidden = torch.stack([model.decoder(tokens[i:i + 1, :n])[0, -1] for i, n in enumerate([4, 6, 2])])
    logits = 10 * F.cosine_similarity(vision.mean(1)[:, None], hidden[None], dim=-1) - 10
    want = sum(-F.logsigmoid(logits[i, j] if i == j else -logits[i, j]) for i in range(3) for j in range(3)) / 3
    close(loss, want)
    loss.backward()
    assert all(p.grad.any() for p in model.contrast.values())


# ---- model: generation ----
def left_prompts():
    return padded([4, 7, 2, 6], left=True).view(2, 2, 7)


def greedy_by_hand(model, images, prompts, steps, eos=2):
    """Greedy decoding, one prompt after the other, without padding, cache or batch."""
    out = torch.zeros(*prompts.shape[:2], steps, dtype=torch.long)
    for i, k in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        text = prompts[i, k][prompts[i, k] != 0]
        for step in range(steps):
            logits = model(images[i:i + 1], text[None])[0, -1]
            out[i, k, step] = logits[1:].argmax() + 1
            text = torch.cat((text, out[i, k, step:step + 1]))
            if out[i, k, step] == eos:
                break
    return out


@torch.no_grad()
def test_cached_decoding_equals_recomputing():
    model, images, prompts = tiny(), pictures(2), left_prompts()
    want = greedy_by_hand(model, images, prompts, 10)
    eos = want[0, 0, 3].item()            # a word that is said, so that some rows end early
    want = greedy_by_hand(model, images, prompts, 10, eos)
    assert (want == 0).any() and (want[..., -1] != 0).any(), "some rows end early, some do not"
    for use in (True, False):
        tokens, first = model.generate(images, prompts, 10, eos_id=eos, use_cache=use)
        assert torch.equal(tokens, want)
        for i in range(2):
            for k in range(2):
                row = prompts[i, k][prompts[i, k] != 0]
                close(first[i, k], model(images[i:i + 1], row[None])[0, -1])


@torch.no_grad()
def test_cache_gives_the_same_hidden_states():
    model = tiny()
    tokens, vision = padded([9, 5, 7, 8], left=True), model.encode(pictures(2))
    whole = model.decoder(tokens, vision)
    cache = model_file.Cache(2, 24)
    parts = [model.decoder(part, vision, cache) for part in tokens.split([6, 1, 1, 1], dim=1)]
    close(torch.cat(parts, 1), whole)
    assert cache.cross[0][0].shape == (2, 2, 16, 8), "keys of the 2 pictures, once for their 4 commands"


@torch.no_grad()
def test_generation_stops_when_all_have_finished():
    model, images, prompts = tiny(), pictures(1), words(1, 1, 4)
    tokens, _ = model.generate(images, prompts, 12, eos_id=-1)
    assert tokens.shape == (1, 1, 12)
    said = tokens[0, 0].tolist()
    tokens, _ = model.generate(images, prompts, 12, eos_id=said[2])
    assert tokens[0, 0].tolist() == said[:said.index(said[2]) + 1]


def log_probability(model, vision, prompt, new, eos):
    """Mean log-probability of the new tokens up to eos, [PAD] never being said."""
    text = torch.tensor([prompt + new])
    logits = model.decode(vision, text)[0, len(prompt) - 1:-1]
    logits[:, 0] = -math.inf
    n = new.index(eos) + 1 if eos in new else len(new)
    return logits.log_softmax(-1)[range(n), new[:n]].sum().item() / n


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_equals_brute_force_on_two_steps(use_cache):
    model, images, prompts = tiny(), pictures(1), words(1, 2, 4)
    model.decoder.embedding.weight *= 3                           # sharper, for clear differences
    vision, eos = model.encode(images), 2
    tokens, _ = model.generate(images, prompts, 2, beam=V, eos_id=eos, use_cache=use_cache)
    for k in range(2):
        prompt = prompts[0, k].tolist()
        every = [[eos]] + [[a, b] for a in range(1, V) if a != eos for b in range(1, V)]
        rows = torch.tensor([prompt + [a] for a in range(1, V)])
        step1 = model.decode(vision, torch.tensor([prompt]))[0, -1]
        step2 = model.decode(vision, rows[None])[0, :, -1]
        step1[0] = step2[:, 0] = -math.inf
        step1, step2 = step1.log_softmax(-1), step2.log_softmax(-1)
        score = lambda s: step1[eos] if len(s) == 1 else (step1[s[0]] + step2[s[0] - 1, s[1]]) / 2      # noqa: E731
        best = max(every, key=score)
        assert tokens[0, k].tolist()[:len(best)] == best


@torch.no_grad()
def test_beam_search_is_not_worse_than_greedy():
    model, images, prompts = tiny(), pictures(2), left_prompts()
    for p in model.decoder.blocks.parameters():
        p *= 3                            # an untrained model repeats its input; stronger blocks make it say more
    vision = model.encode(images)
    greedy, first = model.generate(images, prompts, 6, beam=1)
    beams, first_beams = model.generate(images, prompts, 6, beam=4)
    again, _ = model.generate(images, prompts, 6, beam=4, use_cache=False)
    assert torch.equal(beams, again) and torch.equal(first, first_beams)
    assert not torch.equal(greedy, beams[..., :greedy.shape[-1]]), "a case where beams matter"
    score = [0.0, 0.0]
    for i, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        prompt = prompts[i, k][prompts[i, k] != 0].tolist()
        for which, tokens in enumerate((greedy, beams)):
            score[which] += log_probability(model, vision[i:i + 1], prompt, tokens[i, k].tolist(), 2)
    assert score[1] > score[0], "no single prompt is sure to gain, but together they do"


# ---- model: parameters, precision, learning ----
def test_parameter_counts():
    model = tiny()
    model.freeze("vision")
    counts, memory = model_file.parameter_stats(model)
    total = sum(p.numel() for p in model.parameters())
    vision = sum(p.numel() for p in model.vision.parameters())
    assert counts["total"] == (total, total - vision) and counts["vision"] == (vision, 0)
    assert sum(counts[part][0] for part in ("vision", "projection", "decoder")) == total
    assert memory["AdamW state"] == pytest.approx(8 * (total - vision) / 2 ** 20)


@pytest.mark.parametrize("preset", sorted(config.PRESETS))
def test_presets_stay_under_50m_parameters(preset):
    with torch.device("meta"):
        model = VLM(config.from_args([f"--preset={preset}"]), 500)
    assert sum(p.numel() for p in model.parameters()) < 50e6


def test_initial_sizes():
    torch.manual_seed(0)
    cfg = config.from_args([], image_size=64)
    model = VLM(cfg, 300)
    close(model.decoder.blocks[0].attn.q.weight.std(), torch.tensor(128 ** -0.5), 2e-3)
    down, vision_down = model.decoder.blocks[0].ffn.down, model.vision.blocks[0].down
    close(down.weight.std(), torch.tensor((256 * 3 * cfg.text_layers) ** -0.5), 1e-3)
    close(vision_down.weight.std(), torch.tensor((512 * 2 * cfg.vision_layers) ** -0.5), 1e-3)
    close(model.decoder.embedding.weight.std() * math.sqrt(128), torch.tensor(1.0), 2e-2)
    assert 0.2 < model.features(pictures(2, 64))["stem"].std() < 2


def test_overfits_one_batch():
    model = tiny().train()
    images, tokens = pictures(4), words(4, 2, 8)
    tokens[:, :, :4] = words(1, 1, 4, seed=9)             # the same command: only the picture tells the answers apart
    tokens[:, 1] = tokens[:, 0]
    targets = tokens.roll(-1, -1)
    targets[:, :, -1] = targets[:, :, :3] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        loss = model(images, tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    assert loss < 0.05
    blank = model(torch.zeros_like(images), tokens, targets)
    assert blank > 1, "without its picture the answer cannot be known"


def test_bfloat16_autocast():
    model = tiny().train()
    images, tokens = pictures(2), padded([4, 7, 2, 6]).view(2, 2, 7)
    targets = torch.where(tokens != 0, tokens, -100)
    exact = model(images, tokens, targets)
    for attention in ("hand", "fast"):
        for block in [*model.vision.blocks, *model.decoder.blocks]:
            block.attn.path = attention
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(images, tokens, targets)
            generated, first = model.generate(images, left_prompts(), 4, beam=2)
        model.zero_grad()
        loss.backward()
        assert loss.dtype == torch.float32 and abs(loss - exact) < 0.05 * exact
        assert first.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_round_trip(tmp_path):
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    torch.manual_seed(1)
    other = VLM(model.cfg, V).eval()
    assert not torch.equal(other(pictures(1), words(1, 4)), model(pictures(1), words(1, 4)))
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    assert torch.equal(other(pictures(1), words(1, 4)), model(pictures(1), words(1, 4)))


def test_pick_device():
    assert model_file.pick_device(config.from_args([], device="cpu")) == torch.device("cpu")
    for wish in ("cuda:99", "mps:7", "toaster"):
        with pytest.raises(UserError, match=wish):
            model_file.pick_device(config.from_args([], device=wish))


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny(contrast_weight=0.1)
        images, tokens = pictures(1), words(1, 2, 5)
        model(images, tokens, tokens).backward()
        model.generate(images, tokens, 3, beam=2)


# ---- model: facts about torch that the code relies on ----
def test_causal_flag_on_cross_attention_hides_patches():
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    close(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, 0], v[0, 0, 0])


def test_fully_masked_row():
    q, k, v = torch.randn(3, 1, 1, 2, 4)
    mask = torch.tensor([[True, False], [False, False]])
    assert F.scaled_dot_product_attention(q, k, v, mask)[0, 0, 1].abs().max() == 0
    assert torch.full((2,), -math.inf).softmax(-1).isnan().all(), "by hand it is 0/0"


def test_python_facts():
    assert (torch.device("cuda") == "cuda") is False
    assert bool("False") is True


# ---- model: parity with Hugging Face, where transformers is installed ----
def copy_linear(target, *sources):
    """Weights (and biases) of one or more HF linear layers, stacked, into ours."""
    target.weight.copy_(torch.cat([s.weight for s in sources]))
    if target.bias is not None:
        target.bias.copy_(torch.cat([s.bias for s in sources]))


def test_lora_starts_as_the_model_learns_alone_and_merges():
    model, (images, tokens) = tiny(), (pictures(2), words(2, 3, 7))
    before, frozen = model(images, tokens), {k: v.clone() for k, v in model.state_dict().items()}
    layers = [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    model.add_lora(2)
    assert torch.equal(model(images, tokens), before)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(learning) == {f"{name}.{part}.weight" for name in layers for part in ("reduce", "expand")}
    assert learning["decoder.blocks.0.ffn.down.reduce.weight"].shape == (2, 48)
    for on in (True, False):
        model.freeze("vision", on)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n in learning if not (on and n.startswith("vision"))}, "a frozen weight must not wake up"
    optimizer = torch.optim.SGD(learning.values(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(images, tokens, tokens).backward()
        optimizer.step()
    tuned = model(images, tokens)
    assert all(p.grad.abs().sum() > 0 for n, p in learning.items()) and (tuned - before).abs().max() > 1e-3
    model.merge_lora()
    close(model(images, tokens), tuned)
    merged = model.state_dict()
    assert list(merged) == list(frozen) and all(p.requires_grad for p in model.parameters())
    for name, weight in merged.items():
        if name.removesuffix(".weight") in layers:
            rank = torch.linalg.matrix_rank((weight - frozen[name]).flatten(1), rtol=1e-3)
            assert 1 <= rank <= 2, name
        else:
            assert torch.equal(weight, frozen[name]), name


@torch.no_grad()
def test_vision_encoder_equals_hf_siglip():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hf.SiglipVisionModel(hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        vision_use_head=False)).eval()
    theirs = getattr(theirs, "vision_model", theirs)
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)                         # so that no bias is 0 and no norm the identity
    ours = tiny(stem="patch", vision_layers=2).vision
    ours.stem.load_state_dict(theirs.embeddings.patch_embedding.state_dict())
    ours.positions.copy_(theirs.embeddings.position_embedding.weight)
    for mine, their in zip(ours.blocks, theirs.encoder.layers):
        mine.norm1.load_state_dict(their.layer_norm1.state_dict())
        mine.norm2.load_state_dict(their.layer_norm2.state_dict())
        copy_linear(mine.attn.q, their.self_attn.q_proj)
        copy_linear(mine.attn.kv, their.self_attn.k_proj, their.self_attn.v_proj)
        copy_linear(mine.attn.out, their.self_attn.out_proj)
        copy_linear(mine.up, their.mlp.fc1)
        copy_linear(mine.down, their.mlp.fc2)
    ours.norm.load_state_dict(theirs.post_layernorm.state_dict())
    a, b = ours(pictures(2)), theirs(pictures(2)).last_hidden_state
    print(f"\nSigLIP: largest difference {(a - b).abs().max():.1e} of values up to {b.abs().max():.1f}")
    assert (a - b).abs().max() < 1e-4


@torch.no_grad()
def test_decoder_equals_hf_gemma():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hf.GemmaForCausalLM(hf.GemmaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=24, pad_token_id=0)).eval()
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    ours = tiny().decoder
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    for mine, their in zip(ours.blocks, theirs.model.layers):
        mine.norm1.weight.copy_(their.input_layernorm.weight)
        mine.norm3.weight.copy_(their.post_attention_layernorm.weight)
        copy_linear(mine.attn.q, their.self_attn.q_proj)
        copy_linear(mine.attn.kv, their.self_attn.k_proj, their.self_attn.v_proj)
        copy_linear(mine.attn.out, their.self_attn.o_proj)
        copy_linear(mine.ffn.gate_up, their.mlp.gate_proj, their.mlp.up_proj)
        copy_linear(mine.ffn.down, their.mlp.down_proj)
    ours.norm.weight.copy_(theirs.model.norm.weight)
    for tokens in (words(3, 9), padded([9, 5, 7]), padded([9, 5, 7], left=True)):
        real = tokens != 0
        a = ours.logits(ours(tokens))
        b = theirs(tokens, attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
        difference = (a - b)[real].abs().max()
        print(f"\nGemma: largest difference {difference:.1e} of values up to {b[real].abs().max():.1f}")
        assert difference < 1e-4


# ---- settings and text ----

def test_overrides_are_cast_to_the_type_of_their_default(capsys):
    cfg = config.from_args(["--batch_size=3", "--lr=1", "--resume=true", "--keep_undefined=FALSE", "--early_stopping=4",
                            "--command=is it red? a=b"])
    assert (cfg.batch_size, cfg.lr, cfg.resume, cfg.keep_undefined) == (3, 1.0, True, False)
    assert isinstance(cfg.lr, float) and cfg.early_stopping == 4 and cfg.command == "is it red? a=b"
    assert "Overriding: batch_size = 3" in capsys.readouterr().out
    assert config.from_args(["--early_stopping=none"]).early_stopping is None


@pytest.mark.parametrize("argument, says", [
    ("--batchsize=3", "'batch_size'"), ("--batch_size=3.5", "whole number"), ("--lr=fast", "a number"),
    ("--lr=nan", "a number"), ("--resume=1", "True or False"), ("--early_stopping=soon", "whole number"),
    ("--stem=cone", "'conv'"), ("--preset=big", "default, base"), ("--image_size=100", "patch_size=16"),
    ("--patch_size=12 --image_size=120", "stem=conv"), ("--vision_heads=3", "vision_dim=128"),
    ("--text_kv_heads=3", "text_heads=8"), ("--text_head_dim=15", "even"), ("--batch_size=0", "above 0"),
    ("--vision_dim=6 --vision_heads=1 --vision_positions=sincos", "divisible by 4"), ("--dropout=1", "below 1"),
    ("--flip=1.5", "flip"), ("--workers=-1", "negative"), ("batch_size=3", "--key=value"),
    ("--seed=9223372036854775808", "below 2**63"), ("--dpi=99999", "at most 1200"),
    ("--batch_size", "--key=value"),
])
def test_a_wrong_setting_is_one_line_that_says_what_would_work(argument, says):
    with pytest.raises(UserError) as error:
        config.from_args(argument.split())
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_preset_comes_first_then_the_overrides():
    base = config.from_args(["--vision_dim=192", "--preset=base"])
    assert (base.preset, base.vision_dim, base.image_size, base.text_dim) == ("base", 192, 224, 384)
    assert config.from_args(["--preset=default"]).image_size == config.SETTINGS["image_size"][1]


def test_every_setting_has_a_comment_a_section_and_its_default():
    source = Path(config.__file__).read_text(encoding="utf-8")
    names = []
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith("_"):
            names.append(target.id)
    assert names == list(config.SETTINGS)
    for name, (section, default, comment) in config.SETTINGS.items():
        assert section and len(comment) > 3 and default == getattr(config, name), name
        assert f"  {name} = " in config.describe()
    assert {k for preset in config.PRESETS.values() for k in preset} <= set(names) and set(config.CHOICES) <= set(names)
    assert {"image_size", "num_scenes", "scene_seed", "weather", "min_pixels", "near_line"} <= set(config.DATA_KEYS)
    assert not {"lr", "data_dir", "seed", "workers"} & set(config.DATA_KEYS)


def test_the_command_line_fails_with_status_2_and_one_line():
    done = subprocess.run([sys.executable, "-B", "config.py", "--batchsize=3"], cwd=Path(config.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().count("\n") == 0 and "batch_size" in done.stderr and "Traceback" not in done.stderr


def test_random_arguments_are_read_or_refused_in_one_line():
    rng, names = random.Random(0), [*config.SETTINGS, "", "no_such"]
    odd = ["", "0", "-1", "1e400", "inf", "nan", "9" * 5000, "١٢", "None", "True", "\0", "\n", "\ud800", "=", "--"]
    for _ in range(300):
        text = rng.choice(odd) if rng.random() < 0.7 else "".join(chr(rng.randrange(1, 0xd800)) for _ in range(9))
        arguments = [f"--{rng.choice(names)}={text}" if rng.random() < 0.9 else text for _ in range(rng.randint(1, 3))]
        try:
            cfg = config.from_args(arguments)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert set(vars(cfg)) == set(config.SETTINGS)


def test_random_text_is_encoded_to_known_ids(lexicon):
    rng, alphabet = random.Random(0), [*" ?!.,'[]_-\t\n\0\ud800éß中🚗١", "[PAD]", "[YES]", "is", "there", "bus"]
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 30)))
        prompt = lexicon.prompt(text)
        assert prompt[0] == tokenizer.SOS and prompt[-1] == lexicon.ids["?"]
        assert all(0 <= i < len(lexicon) for i in prompt + lexicon.encode(text))
        assert len(lexicon.unknown(text)) <= len(tokenizer.split_words(text))


def test_text_survives_encoding_and_decoding(lexicon):
    text = "is there a car on the left , one is near ahead ?"
    ids = lexicon.encode(text)
    assert tokenizer.UNK not in ids and lexicon.decode(ids) == text
    assert lexicon.encode("Is there a CAR on the left, one is near ahead?") == ids
    assert lexicon.decode([tokenizer.SOS] + ids + [tokenizer.EOS] + ids) == text


def test_special_ids_are_fixed(lexicon):
    assert lexicon.words[:6] == ["[PAD]", "[SOS]", "[EOS]", "[UNK]", "[YES]", "[NO]"]
    assert (tokenizer.PAD, tokenizer.SOS, tokenizer.EOS, tokenizer.UNK, tokenizer.YES, tokenizer.NO) == tuple(range(6))
    assert lexicon.encode("[YES] [NO]") == [tokenizer.YES, tokenizer.NO]
    assert len(set(lexicon.words)) == len(lexicon) == len(lexicon.ids)


def test_an_unknown_word_is_reported_with_the_nearest_known_one(lexicon):
    assert lexicon.unknown("is there a pedestrain or a car?") == [("pedestrain", "pedestrian")]
    assert lexicon.unknown("zzzzqqq") == [("zzzzqqq", None)]
    assert lexicon.encode("zzzzqqq car") == [tokenizer.UNK, lexicon.ids["car"]]


@pytest.mark.parametrize("ending", ["", "?", " ?", "??", "!", ".", " ?! ...", "?\n", '?"'])
def test_a_prompt_ends_in_exactly_one_question_mark(lexicon, ending):
    assert lexicon.prompt("Is there a car" + ending) == lexicon.prompt("is there a car")
    prompt = lexicon.prompt("is there a car" + ending)
    assert prompt[0] == tokenizer.SOS and prompt[-1] == lexicon.ids["?"] and prompt.count(lexicon.ids["?"]) == 1
    assert lexicon.decode(prompt) == "is there a car ?"


def test_an_example_is_prompt_answer_reason_end(lexicon):
    for answer, verdict in ((True, [tokenizer.YES]), (False, [tokenizer.NO]), (None, [])):
        ids, n = lexicon.example("is there a car", answer, "a car is near ahead")
        assert ids[:n] == lexicon.prompt("is there a car")
        assert ids[n:] == verdict + lexicon.encode("a car is near ahead") + [tokenizer.EOS]


def test_padding_right_left_and_never_cutting():
    assert tokenizer.pad([[1, 2, 3], [4]]) == [[1, 2, 3], [4, 0, 0]]
    assert tokenizer.pad([[1, 2, 3], [4]], 4, left=True) == [[0, 1, 2, 3], [0, 0, 0, 4]]
    with pytest.raises(ValueError, match="3 tokens"):
        tokenizer.pad([[1, 2, 3], [4]], 2)


def test_the_vocabulary_has_200_to_500_words_and_all_that_is_ever_said(lexicon, drawn):
    assert 200 <= len(lexicon) <= 500
    texts = {form.format(at="", a="", n="") for form in commands.DESCRIBE + commands.DESCRIBE_AT + commands.WHERE}
    for question in QUESTIONS:
        for paraphrase in range(len(commands.TEMPLATES[question.template].paraphrases)):
            texts |= wordings(question, paraphrase)
    for group in (commands.NOUNS, commands.COLOUR_WORDS, commands.PLACE_WORDS):
        texts |= {word for forms in group.values() for word in forms}
    texts |= {text for items in drawn.items.values() for i in items for text in (i["reason"], i["command"])}
    assert not any("{" in text for text in texts)
    assert {word for text in texts for word, _ in lexicon.unknown(text)} == set()
    assert json.loads(Path(drawn.cfg.data_dir, "vocab.json").read_text(encoding="utf-8")) == lexicon.words


def test_a_held_out_paraphrase_is_made_of_trained_words():
    texts = {"trained": set(), "held out": set()}
    for forms in (commands.DESCRIBE, commands.DESCRIBE_AT, commands.WHERE):
        *trained, held = (form.format(at="", a="", n="") for form in forms)
        texts["trained"] |= set(trained)
        texts["held out"].add(held)
    for question in QUESTIONS:
        forms = len(commands.TEMPLATES[question.template].paraphrases)
        for k in range(forms):
            texts["trained" if k < forms - 1 else "held out"] |= wordings(question, k)
    trained, held = ({word for text in group for word in text.split()} for group in texts.values())
    assert held <= trained


# ---- scenes and commands ----

def test_exists_and_tiny_objects():
    assert ask("exists", "car", labels=[box("car")]) == TRUE
    assert ask("exists", "bus", labels=[box("car")]) == FALSE and ask("exists", "car") == FALSE
    assert ask("exists", "car", labels=[box("car", width=7.9)]) == UNSURE
    assert ask("exists", "car", labels=[box("car", height=5)]) == UNSURE
    assert ask("exists", "car", labels=[box("car", centre=20, width=5), box("car", centre=100)]) == TRUE


@pytest.mark.parametrize("centre, left, ahead, right", [
    (20, TRUE, FALSE, FALSE), (38, TRUE, FALSE, FALSE), (40, UNSURE, UNSURE, None), (46, UNSURE, UNSURE, None),
    (47, FALSE, TRUE, FALSE),
    (81, FALSE, TRUE, FALSE), (84, None, UNSURE, UNSURE), (90, FALSE, FALSE, TRUE), (118, FALSE, FALSE, TRUE)])
def test_places_are_thirds_with_ambiguous_borders(centre, left, ahead, right):
    label = box("car", centre=centre)
    for place, truth in zip(commands.PLACES, (left, ahead, right)):
        found = ask("exists_at", "car", place, [label])
        assert found == truth if truth is not None else found < TRUE, place
    assert ask("exists", "car", labels=[label]) == TRUE


def test_near_is_the_lower_edge_or_the_height_of_what_hangs():
    for bottom, truth in ((80, FALSE), (88, FALSE), (90, UNSURE), (95, UNSURE), (97, TRUE), (120, TRUE)):
        assert ask("near", "car", labels=[box("car", bottom=bottom)]) == truth, bottom
    for height, how in ((16, "far"), (35, "near")):
        sign = box("traffic sign", centre=20, bottom=50, height=height)
        assert commands.describe(view_of(sign), 4) == f"a traffic sign {how} on the left"
    assert commands.describe(view_of(box("traffic sign", bottom=50, height=25.6)), 4) == "a traffic sign ahead"


def test_light_colours():
    colours = commands.COLOURS
    assert [ask("light", c) for c in colours] == [FALSE, FALSE, FALSE]
    assert [ask("light", c, labels=[lamp("red")]) for c in colours] == [TRUE, FALSE, FALSE]
    shown = [ask("light", c, labels=[lamp("green"), lamp("green", centre=20.0)]) for c in colours]
    assert shown == [FALSE, FALSE, TRUE]
    assert [ask("light", c, labels=[lamp("none")]) for c in colours] == [UNSURE] * 3
    assert [ask("light", c, labels=[lamp("red"), lamp("green", centre=20.0)]) for c in colours] == [UNSURE] * 3
    assert [ask("light", c, labels=[lamp("red"), lamp("none", centre=20.0)]) for c in colours] == [TRUE, FALSE, FALSE]
    tiny_green = lamp("green", centre=20.0, width=4.0, height=6.0)
    assert [ask("light", c, labels=[tiny_green]) for c in colours] == [UNSURE] * 3
    assert [ask("light", c, labels=[lamp("red"), tiny_green]) for c in colours] == [UNSURE] * 3


def test_what_is_almost_covered_is_ambiguous():
    car = box("car", centre=64, bottom=80, width=32, height=24)
    covers = {share: box("truck", centre=48 + 16 * share, bottom=110, width=32 * share, height=70)
              for share in (0.5, 0.75)}
    assert ask("exists", "car", labels=[car, covers[0.5]]) == TRUE
    assert ask("exists", "car", labels=[car, covers[0.75]]) == UNSURE
    behind = box("truck", centre=64, bottom=78, width=60, height=60)       # higher in the picture: farther
    assert ask("exists", "car", labels=[car, behind]) == TRUE
    assert ask("exists", "truck", labels=[car, behind]) == TRUE


def test_going_straight_and_stopping():
    cases = [([], TRUE), ([FAR["ahead"]], TRUE), ([BLOCK["ahead"]], FALSE), ([BLOCK["left"], BLOCK["right"]], TRUE),
             ([lamp("red")], FALSE), ([lamp("yellow")], FALSE), ([lamp("green")], TRUE),
             ([lamp("green"), BLOCK["ahead"]], FALSE),
             ([lamp("none")], UNSURE), ([lamp("none"), BLOCK["ahead"]], FALSE), ([box("car", bottom=92)], UNSURE),
             ([box("car", centre=43, bottom=110)], UNSURE), ([box("traffic sign", bottom=110, height=40)], TRUE)]
    for labels, truth in cases:
        assert ask("straight", labels=labels) == truth, labels
        assert ask("stop", labels=labels) == 2 - truth, labels


def test_turning_changing_lanes_and_clear_sides():
    for side, other in (("left", "right"), ("right", "left")):
        assert ask("turn", side) == TRUE and ask("turn", side, labels=[BLOCK[other]]) == TRUE
        assert ask("turn", side, labels=[BLOCK[side]]) == ask("turn", side, labels=[BLOCK["ahead"]]) == FALSE
        assert ask("turn", side, labels=[lamp("red")]) == FALSE and ask("turn", side, labels=[lamp("green")]) == TRUE
        assert ask("change", side, labels=[BLOCK[side]]) == FALSE
        assert ask("change", side, labels=[BLOCK[other], BLOCK["ahead"], lamp("red")]) == TRUE
    for place in commands.PLACES:
        assert ask("clear", place, labels=[BLOCK[place]]) == FALSE
        assert ask("clear", place, labels=[BLOCK[p] for p in BLOCK if p != place] + [FAR[place], lamp("red")]) == TRUE
    for place in ("left", "ahead"):
        assert ask("clear", place, labels=[box("car", centre=43, bottom=110)]) == UNSURE


@pytest.mark.parametrize("a, b", list(itertools.product((FALSE, UNSURE, TRUE), repeat=2)))
def test_and_or_and_no_follow_kleene(a, b):
    width = {UNSURE: 5, TRUE: 16}
    labels = [box(name, centre=x, width=width[t]) for name, x, t in (("car", 20, a), ("bus", 100, b)) if t != FALSE]
    tables = {"and": [[FALSE, FALSE, FALSE], [FALSE, UNSURE, UNSURE], [FALSE, UNSURE, TRUE]],
              "or": [[FALSE, UNSURE, TRUE], [UNSURE, UNSURE, TRUE], [TRUE, TRUE, TRUE]],
              "and_no": [[FALSE, FALSE, FALSE], [UNSURE, UNSURE, FALSE], [TRUE, UNSURE, FALSE]]}
    for template, table in tables.items():
        assert ask(template, "car", "bus", labels) == table[a][b], template


def test_and_no_with_a_light():
    assert ask("and_no", "car", "red light", [box("car"), lamp("red", centre=20.0)]) == FALSE
    assert ask("and_no", "car", "red light", [box("car"), lamp("green", centre=20.0)]) == TRUE
    assert ask("and", "car", "red light", [box("car")]) == FALSE
    assert ask("or", "car", "red light", [lamp("none", centre=20.0)]) == UNSURE


@pytest.mark.parametrize("question, labels, reason", [
    (("exists", "car", ""), [box("car")], "a car is far ahead"),
    (("exists", "car", ""), [box("car"), box("car", centre=100, bottom=110)], "a car is near on the right"),
    (("exists", "car", ""), [], "no car is in view"),
    (("exists", "car", ""), [box("car", centre=43)], "a car is far"),
    (("exists", "car", ""), [box("car", centre=43, bottom=92)], "a car is in view"),
    (("exists_at", "car", "left"), [CAR_LEFT], "a car is far on the left"),
    (("exists_at", "car", "right"), [CAR_LEFT], "no car is on the right , one is far on the left"),
    (("exists_at", "car", "ahead"), [], "no car is ahead"),
    (("near", "bus", ""), [BUS_AHEAD], "a bus is near ahead"),
    (("near", "car", ""), [CAR_LEFT], "no car is near , one is far on the left"),
    (("light", "red", ""), [lamp("red")], "the light is red"),
    (("light", "red", ""), [lamp("green")], "the light is green"),
    (("light", "red", ""), [], "no light is in view"),
    (("straight", "", ""), [], "nothing is near ahead"),
    (("straight", "", ""), [lamp("green")], "the light is green and nothing is near ahead"),
    (("straight", "", ""), [lamp("red"), BUS_AHEAD], "the light is red and a bus is near ahead"),
    (("straight", "", ""), [lamp("green"), BUS_AHEAD], "a bus is near ahead"),
    (("stop", "", ""), [lamp("yellow")], "the light is yellow"),
    (("stop", "", ""), [BUS_AHEAD], "a bus is near ahead"),
    (("stop", "", ""), [lamp("green"), CAR_LEFT], "the light is green and nothing is near ahead"),
    (("turn", "left", ""), [], "nothing is near ahead or on the left"),
    (("turn", "right", ""), [BLOCK["right"]], "a truck is near on the right"),
    (("change", "left", ""), [BLOCK["left"]], "a truck is near on the left"),
    (("change", "left", ""), [lamp("red")], "nothing is near on the left"),
    (("clear", "ahead", ""), [BUS_AHEAD], "a bus is near ahead"),
    (("clear", "right", ""), [BUS_AHEAD], "nothing is near on the right"),
    (("and", "car", "bus"), [CAR_LEFT, BUS_AHEAD], "a car is far on the left and a bus is near ahead"),
    (("and", "car", "bus"), [CAR_LEFT], "no bus is in view"),
    (("and_no", "car", "bus"), [CAR_LEFT], "a car is far on the left and no bus is in view"),
    (("and_no", "car", "bus"), [CAR_LEFT, BUS_AHEAD], "a bus is near ahead"),
    (("and_no", "car", "red light"), [CAR_LEFT, lamp("red")], "the light is red"),
    (("or", "car", "bus"), [BUS_AHEAD], "a bus is near ahead"),
    (("or", "car", "bus"), [], "no car is in view and no bus is in view"),
])
def test_the_reason_names_the_cause(question, labels, reason):
    assert reason_of(*question, labels) == reason


def test_a_description_lists_certain_objects_nearest_first():
    labels = [box("car", bottom=80), box("bus", centre=20, bottom=115), lamp("red", height=35.0, centre=100.0),
              box("pedestrian", centre=100, bottom=105), box("truck", centre=64, bottom=60, width=5)]
    text = "a red light near on the right , a bus near on the left , a pedestrian near on the right , a car far ahead"
    view = view_of(*labels)
    assert commands.describe(view, 9) == text and check_reason(text, view) == TRUE
    assert commands.describe(view, 2) == ", ".join(text.split(", ")[:2]).strip(" ,")
    assert commands.describe(view_of(), 4) == "nothing in view" and check_reason("nothing in view", view_of()) == TRUE


def test_where_is_asked_of_what_is_certainly_there_or_not_and_answered_truly(drawn):
    view = view_of(box("car"), box("bus", width=5), CAR_LEFT)           # the bus is too small to be certain
    found = {item["first"]: item for seed in range(300) for item in commands.where_items(0, view, random.Random(seed))}
    assert set(found) == set(CATEGORIES) - {"bus"}
    assert {c for c, item in found.items() if not item["reason"].startswith("no ")} == {"car"}
    assert found["car"]["reason"] == commands.positive(view, "car")
    assert found["truck"]["reason"] == "no truck is in view"
    asked, forms = Counter(), [re.compile(re.sub(r"\\\{\w\\\}", "(.+)", re.escape(f))) for f in commands.WHERE]
    for name in ("train", "val", "test", "ood"):
        for picture, own in itertools.groupby(drawn.items[name], key=lambda i: i["picture"]):
            own = [item for item in own if item["answer"] is None]
            assert [i["template"] for i in own[:4]] == ["describe", *["describe_at"] * 3]
            kinds = [item["first"] for item in own[4:]]
            assert len(set(kinds)) == len(kinds) <= 3
            for item in own[4:]:
                truth = drawn.views[picture].exists(item["first"])
                assert truth != UNSURE and item["template"] == "where"
                assert item["reason"].startswith("no ") == (truth == FALSE)
                noun = next(m.group(1) for m in (f.fullmatch(item["command"]) for f in forms) if m)
                assert re.sub("^an? ", "", noun) in commands.NOUNS[item["first"]]
                asked[truth] += 1
    assert asked[TRUE] > asked[FALSE] > 100


def test_ways_are_the_places_that_must_be_free():
    assert [Question(*q, "").ways() for q in (("straight", ""), ("stop", ""), ("turn", "left"), ("change", "right"),
                                              ("clear", "ahead"))] == \
        [("ahead",), ("ahead",), ("ahead", "left"), ("right",), ("ahead",)]


def test_every_pair_of_kinds_is_asked_in_every_way():
    assert len(set(QUESTIONS)) == len(QUESTIONS) and {"rider", "traffic sign"} < set(commands.PAIRED)
    for a, b in itertools.combinations(commands.PAIRED, 2):
        for template in ("and", "or"):
            assert (Question(template, a, b) in QUESTIONS) != (Question(template, b, a) in QUESTIONS)
        assert {Question("and_no", a, b), Question("and_no", b, a)} <= set(QUESTIONS)
    assert all(Question(t, a, light) in QUESTIONS for t in ("and", "or", "and_no") for a in commands.PAIRED
               for light in commands.LIGHTS)


def test_check_reason_denies_what_is_false_and_knows_its_grammar():
    view = view_of(CAR_LEFT, BUS_AHEAD, lamp("red", centre=64.0))
    for false in ("a car is near on the left", "a car is far on the right", "no car is in view", "a truck is in view",
                  "the light is green", "no light is in view", "nothing is near ahead",
                  "a bus is near ahead and no car is in view", "no car is on the right , one is near ahead",
                  "nothing in view", "nothing is near on the left or ahead", "a green light far ahead"):
        assert check_reason(false, view) == FALSE, false
    for true in ("a car is far on the left", "no car is on the right , one is far on the left", "the light is red",
                 "nothing is near on the left or on the right", "a bus near ahead , a red light far ahead"):
        assert check_reason(true, view) == TRUE, true
    for foreign in ("", "a dog is near ahead", "the light is blue", "a car is near ahead near", "red light the is",
                    "one is near ahead", "a car is far on the left a bus is near ahead", "a bus is near ahead , and"):
        assert check_reason(foreign, view) is None, foreign
    assert check_reason("a car is far", view_of(box("car", bottom=92))) == UNSURE


def test_every_reason_of_the_finished_commands_is_true(drawn):
    for name in SETS:
        assert drawn.items[name]
        for item in drawn.items[name]:
            assert check_reason(item["reason"], drawn.views[item["picture"]]) == TRUE, (name, item)


def test_every_answer_of_the_finished_commands_follows_from_the_rules(drawn):
    for name in SETS:
        for item in drawn.items[name]:
            if item["answer"] is not None:
                assert question_of(item).truth(drawn.views[item["picture"]]) == (TRUE if item["answer"] else FALSE)
            elif item["template"] != "where":
                place = item["place"] or None
                assert item["reason"] == commands.describe(drawn.views[item["picture"]], drawn.cfg.max_describe, place)


@pytest.mark.parametrize("name", SETS)
def test_yes_and_no_are_equally_frequent_for_every_question(drawn, name):
    counts = commands.balance(drawn.items[name])
    assert len(counts) > 3
    for cell, (yes, no) in counts.items():
        assert yes == no >= drawn.cfg.min_cell, cell


def test_no_picture_gives_its_answers_away(drawn):
    counts = {}
    for item in drawn.items["train"]:
        if item["answer"] is not None:
            counts.setdefault(item["picture"], [0, 0])[item["answer"]] += 1
    assert sum(map(max, counts.values())) / sum(map(sum, counts.values())) <= 0.54
    assert max(sum(c) for c in counts.values()) <= drawn.cfg.commands_stored
    assert len(counts) > 0.95 * drawn.meta["splits"]["train"]


def test_guessing_from_the_question_alone_scores_50(drawn):
    """The majority answer of each question, and of each wording, learned from train, on the other sets."""
    for key, tolerance in ((lambda i: question_of(i), 1e-9), (lambda i: i["command"], 0.06)):
        votes = Counter()
        for item in drawn.items["train"]:
            if item["answer"] is not None:
                votes[key(item)] += 1 if item["answer"] else -1
        for name in ("val", "test", "ood"):
            asked = [i for i in drawn.items[name] if i["answer"] is not None]
            odds = [votes[key(i)] for i in asked]
            found = train.balanced_accuracy([i["answer"] for i in asked], odds)
            assert abs(found - 0.5) <= tolerance, (name, found)


def test_no_picture_is_in_two_splits(drawn):
    owner = {}
    for name in SETS:
        split = "test" if name.startswith("test") else name
        for item in drawn.items[name]:
            assert owner.setdefault(item["picture"], split) == split == drawn.frames[item["picture"]]["split"]
    names = [f["name"] for f in drawn.frames]
    assert len(set(names)) == len(names) == len(drawn.images)
    assert [f["index"] for f in drawn.frames] == list(range(len(names)))


def test_held_out_questions_and_paraphrases_are_never_trained_on(drawn):
    last = {name: t.paraphrases[-1] for name, t in commands.TEMPLATES.items()}
    last.update(describe=commands.DESCRIBE[-1], describe_at=commands.DESCRIBE_AT[-1], where=commands.WHERE[-1])
    last = {name: re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(form))) for name, form in last.items()}
    for name in ("train", "val"):
        for item in drawn.items[name]:
            assert not question_of(item).held_out, item
            assert not last[item["template"]].fullmatch(item["command"]), item
    assert all(last[i["template"]].fullmatch(i["command"]) for i in drawn.items["test_words"])
    assert all(question_of(i).held_out for i in drawn.items["test_combos"])
    assert len({question_of(i) for i in drawn.items["test_combos"]}) >= 4
    mirror = {tuple(swapped(part) for part in cell) for cell in commands.HELD_OUT}
    assert mirror == commands.HELD_OUT, "a flip would turn a trained question into a held-out one"


def test_splits_follow_from_the_name_alone():
    names = [f"frame-{i}.jpg" for i in range(5000)]
    shares = Counter(map(prepare.split_of, names))
    assert abs(shares["train"] / 5000 - 0.8) < 0.02 and abs(shares["val"] / 5000 - 0.1) < 0.02
    assert set(shares) == {"train", "val", "test"}
    assert [prepare.split_of(f"frame-{i}.jpg") for i in (0, 1, 12, 13, 28)] == ["val", "train", "val", "test", "test"]


def test_a_scene_is_the_same_for_the_same_name_and_seed():
    spec = prepare.sample_scene("scene-000003", DEFAULTS)
    assert spec == prepare.sample_scene("scene-000003", DEFAULTS)
    assert spec != prepare.sample_scene("scene-000004", DEFAULTS)
    assert spec != prepare.sample_scene("scene-000003", changed(DEFAULTS, scene_seed=8))
    picture = prepare.draw_scene(spec, SIZE)
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8 and picture.std() > 10
    assert (picture == prepare.draw_scene(json.loads(json.dumps(spec)), SIZE)).all()


def test_the_stored_pictures_and_labels_are_those_of_the_scenes(drawn):
    for index in (0, 57, len(drawn.frames) - 1):
        frame = drawn.frames[index]
        spec = prepare.sample_scene(Path(frame["name"]).stem, drawn.cfg)
        assert (prepare.draw_scene(spec, drawn.cfg.image_size) == drawn.images[index]).all()
        stored = [dict(label, attributes={k: v for k, v in label["attributes"].items() if k != "occluded"})
                  for label in frame["labels"]]
        assert prepare.scene_frame(spec, drawn.cfg)["labels"] == stored


def test_boxes_lie_in_the_picture_and_categories_are_known(drawn):
    size = drawn.cfg.image_size
    for frame in drawn.frames:
        for label in frame["labels"]:
            b = label["box2d"]
            assert 0 <= b["x1"] < b["x2"] <= size and 0 <= b["y1"] < b["y2"] <= size
            assert label["category"] in CATEGORIES
    assert len({label["category"] for frame in drawn.frames for label in frame["labels"]}) >= 9


def test_filters_hold_for_scenes_and_the_ood_set_is_outside_them(drawn):
    for frame in drawn.frames:
        inside = frame["attributes"]["weather"] == "clear" and frame["attributes"]["timeofday"] == "daytime"
        assert inside == (frame["split"] != "ood")
        assert frame["name"].startswith("ood") == (frame["split"] == "ood")
    cfg = changed(DEFAULTS, weather="rainy, foggy", timeofday="night", scene="highway")
    found = {tuple(prepare.sample_scene(f"s{i}", cfg)[k] for k in ("weather", "timeofday", "scene")) for i in range(30)}
    assert found == {("rainy", "night", "highway"), ("foggy", "night", "highway")}
    with pytest.raises(UserError, match="did you mean 'rainy'"):
        prepare.sample_scene("s", changed(DEFAULTS, weather="raini"))


def test_removing_an_object_changes_the_picture_inside_its_box(drawn):
    """Labels belong to what is drawn: without the object, the pixels in its box are others."""
    checked = Counter()
    for index in range(0, 120, 2):
        frame, picture = drawn.frames[index], drawn.images[index].astype(int)
        spec = prepare.sample_scene(Path(frame["name"]).stem, drawn.cfg)
        certain = {o.label for o in drawn.views[index].objects if o.certain == TRUE}
        for i, o in enumerate(spec["objects"]):
            without = dict(spec, objects=spec["objects"][:i] + spec["objects"][i + 1:])
            left = prepare.scene_frame(without, drawn.cfg)["labels"]
            gone = [lab for lab in frame["labels"] if lab["box2d"] not in [other["box2d"] for other in left]]
            if not any(frame["labels"].index(lab) in certain for lab in gone):
                continue
            changes = np.abs(prepare.draw_scene(without, drawn.cfg.image_size).astype(int) - picture).max(-1) > 0
            for label in gone:
                if frame["labels"].index(label) in certain:
                    x1, y1, x2, y2 = (round(label["box2d"][k]) for k in ("x1", "y1", "x2", "y2"))
                    assert changes[y1:y2, x1:x2].mean() > 0.2, (frame["name"], label)
                    checked[label["category"]] += 1
    assert len(checked) >= 9


def test_twins_change_only_what_they_edit_and_flip_the_answer_or_keep_it(drawn):
    cfg, size = drawn.cfg, drawn.cfg.image_size
    lines = Path(cfg.data_dir, "twins.jsonl").read_text(encoding="utf-8").splitlines()
    twins = [json.loads(line) for line in lines]
    items = [i for i in drawn.items["test"] if i["answer"] is not None]
    assert len(twins) == len(items) and sum(t["flip"] is not None for t in twins) > 0.75 * len(twins)
    seen = Counter()
    for n, twin in enumerate(twins):
        item = drawn.items["test"][twin["item"]]
        frame = drawn.frames[item["picture"]]
        spec = prepare.sample_scene(Path(frame["name"]).stem, cfg)
        for role in ("flip", "neutral"):
            edit = twin[role]
            if edit is None:
                continue
            new = prepare.apply_edit(spec, edit)
            truth = question_of(item).truth(View(prepare.scene_frame(new, cfg), cfg))
            assert truth == (TRUE if item["answer"] == (role == "neutral") else FALSE), (role, item)
            assert len(edit["remove"]) <= 1 and len(edit["add"]) <= 1
            if n % 5 == 0:
                seen[edit["kind"]] += 1
                allowed = np.zeros((size, size), bool)
                for o in [spec["objects"][i] for i in edit["remove"]] + edit["add"]:
                    allowed |= touched(spec, o, size)
                changes = (prepare.draw_scene(new, size) != drawn.images[item["picture"]]).any(-1)
                assert not (changes & ~allowed).any() and (changes.any() or not allowed.any()), (role, item, edit)
    assert set(seen) == {"remove", "add", "move", "recolour"}


# ---- stored data ----

def test_stored_tokens_are_the_written_commands(drawn):
    for name in SETS:
        data = train.Data(drawn.cfg, drawn.meta, name)
        assert len(data.index) == len(data.tokens) == len(drawn.items[name])
        for item, ids, (picture, prompt, length, answer) in list(zip(drawn.items[name], data.tokens, data.index))[::7]:
            text = data.tokenizer.decode(ids)
            verdict = {None: "", True: "[YES] ", False: "[NO] "}[item["answer"]]
            assert text == f"{item['command']} ? {verdict}{item['reason']}"
            assert picture == item["picture"] and ids[prompt - 1] == data.tokenizer.ids["?"]
            assert ids[length - 1] == tokenizer.EOS and not ids[length:].any()
            assert answer == {None: -1, True: 1, False: 0}[item["answer"]]


def test_targets_are_the_next_tokens_from_the_answer_on(drawn):
    data = train.Data(changed(drawn.cfg, commands_per_image=6, descriptions_per_image=1), drawn.meta, "train")
    batch = data.batch(3, 8)
    assert batch.tokens.shape == batch.targets.shape and batch.tokens.shape[:2] == (8, 6)
    described = 0
    for texts, goals in zip(batch.tokens, batch.targets):
        for ids, goal in zip(texts.tolist(), goals.tolist()):
            end, start = ids.index(tokenizer.EOS), ids.index(data.tokenizer.ids["?"])
            assert goal == [-100] * start + ids[start + 1:end + 1] + [-100] * (len(ids) - end)
            described += goal[start] not in (tokenizer.YES, tokenizer.NO)
    assert described == 8
    assert abs(batch.images.mean().item()) < 0.4 and 0.6 < batch.images.std().item() < 1.4


def test_a_batch_depends_on_its_position_only(drawn):
    one, two = (train.Data(drawn.cfg, drawn.meta, "train") for _ in range(2))
    two.batch(100, 3)
    a, b = one.batch(16, 8), two.batch(16, 8)
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("images", "tokens", "targets"))
    other = train.Data(changed(drawn.cfg, seed=1), drawn.meta, "train").batch(16, 8)
    assert not torch.equal(a.images, other.images)


def test_a_batch_of_8_is_two_batches_of_4(drawn):
    data = train.Data(drawn.cfg, drawn.meta, "train")
    start = len(data.pictures) - 4                                         # across the end of a pass
    whole, halves = data.batch(start, 8), [data.batch(start, 4), data.batch(start + 4, 4)]
    assert torch.equal(whole.images, torch.cat([h.images for h in halves]))
    for rows, half in zip((slice(0, 4), slice(4, 8)), halves):
        T = half.tokens.shape[-1]
        assert torch.equal(whole.tokens[rows, :, :T], half.tokens) and not whole.tokens[rows, :, T:].any()
        assert torch.equal(whole.targets[rows, :, :T], half.targets) and (whole.targets[rows, :, T:] == -100).all()


def test_every_pass_shows_each_picture_once_in_another_order(drawn):
    data = train.Data(changed(drawn.cfg, flip=0.0, jitter=0.0, commands_per_image=2), drawn.meta, "train")
    n = len(data.pictures)
    passes = []
    for epoch in range(2):
        shown = []
        for start in range(epoch * n, (epoch + 1) * n, 32):
            shown += pictures_shown(data.batch(start, min(32, (epoch + 1) * n - start)), data).tolist()
        passes.append(shown)
    assert sorted(passes[0]) == sorted(passes[1]) == data.pictures.tolist()
    assert passes[0] != passes[1] and passes[0] != sorted(passes[0])


def test_a_flip_mirrors_the_picture_and_its_words_and_keeps_the_truth(drawn):
    plain, flipped = (train.Data(changed(drawn.cfg, flip=p, jitter=0.0, commands_per_image=16), drawn.meta, "train")
                      for p in (0.0, 1.0))
    templates, sided, known = set(), set(), {}
    for start in range(0, 64, 16):
        a, b = plain.batch(start, 16), flipped.batch(start, 16)
        assert torch.equal(a.images.flip(-1), b.images)
        learned = a.targets >= 0
        assert torch.equal(learned, b.targets >= 0)
        assert torch.equal(b.targets[..., :-1][learned[..., :-1]], b.tokens[..., 1:][learned[..., :-1]])
        pictures = pictures_shown(a, plain)
        for picture, rows, texts in zip(pictures, rows_of(a, plain, pictures), b.tokens.tolist()):
            view = View(mirrored(drawn.frames[picture], drawn.cfg.image_size), drawn.cfg)
            for row, ids in zip(rows, texts):
                item = drawn.items["train"][row]
                said = flipped.tokenizer.decode(ids)
                command, _, rest = said.partition(" ? ")
                reason = re.sub(r"^\[(YES|NO)\] ", "", rest)
                assert command == swapped(item["command"]) and reason == swapped(item["reason"])
                assert check_reason(reason, view) == check_reason(item["reason"], drawn.views[picture]), (item, said)
                if item["answer"] is None:
                    continue
                question = Question(item["template"], swapped(item["first"]), swapped(item["second"]))
                assert rest.startswith("[YES]") == item["answer"] == (question.truth(view) == TRUE)
                assert question.truth(view) != UNSURE
                if question not in known:
                    forms = len(commands.TEMPLATES[question.template].paraphrases) - 1
                    known[question] = set().union(*(wordings(question, k, 120) for k in range(forms)))
                assert command in known[question]
                templates.add(question.template)
                sided |= {question.template} if question.place in ("left", "right") else set()
    assert templates == set(commands.TEMPLATES) and sided == {"exists_at", "turn", "change", "clear"}


def test_tags_are_the_words_of_the_four_descriptions_and_flip_with_the_picture(drawn):
    plain, flipped = (train.Data(changed(drawn.cfg, flip=p, jitter=0.0), drawn.meta, "train") for p in (0.0, 1.0))
    a, b, where = plain.batch(0, 16), flipped.batch(0, 16), {}
    for item in drawn.items["train"]:
        if item["template"] == "where":
            where.setdefault(item["picture"], []).extend(item["reason"].split())
    others = 0
    for picture, tags, mirror in zip(pictures_shown(a, plain), a.tags, b.tags):
        said = [commands.describe(drawn.views[picture], drawn.cfg.max_describe, place).split()
                for place in (None, *commands.PLACES)]
        said[0] = sum(said, [])              # the scene's text stops after max_describe objects, the places' go on
        for row, words_said in zip(tags, said):
            assert [bool(t) for t in row] == [word in words_said for word in train.TAGS]
        others += len(set(where[picture]) & set(train.TAGS) - set(said[0]))
        assert torch.equal(mirror, tags[[0, 3, 2, 1]])
    assert 0.02 < a.tags.mean() < 0.5 and {"car", "red", "near"} <= set(train.TAGS)
    assert others > 5, "where an object is missing, \"no bus is in view\" names it: that is no tag"


def test_a_crop_keeps_every_answer_reason_and_description(drawn):
    """The stored pictures are replaced by a ramp that says which part of it a batch shows."""
    cfg = changed(drawn.cfg, crop=0.35, flip=0.0, jitter=0.0, commands_per_image=6)
    data, whole = train.Data(cfg, drawn.meta, "train"), train.Data(changed(cfg, crop=0.0), drawn.meta, "train")
    size, pictures = cfg.image_size, []
    ramp = 2 * np.arange(size, dtype=np.uint8)
    stack = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(0)), -1)
    for start in range(0, 160, 16):
        pictures += pictures_shown(whole.batch(start, 16), whole).tolist()
    data.images = np.broadcast_to(stack, (len(data.images), *stack.shape))
    crops, certain, asked, inner = 0, 0, 0, np.arange(8, size - 8)
    for start in range(0, 160, 16):
        batch = data.batch(start, 16)
        shown = as_pixels(batch.images, data)
        rows = rows_of(batch, data, pictures[start:start + 16])
        for picture, own, image in zip(pictures[start:start + 16], rows, shown):
            slope, first = np.polyfit(inner + 0.5, image[inner, :, 1].mean(1) / 2 + 0.5, 1)
            x = np.polyfit(inner + 0.5, image[:, inner, 0].mean(0) / 2 + 0.5, 1)[1]
            if slope > 0.99:
                continue
            crops += 1
            assert slope >= 0.64
            view = View(moved(drawn.frames[picture], x, first, 1 / slope, size), cfg)
            for item in (drawn.items["train"][r] for r in own):
                wished = TRUE if item["answer"] is None else TRUE if item["answer"] else FALSE
                said = check_reason(item["reason"], view)
                truth = said if item["answer"] is None else question_of(item).truth(view)
                assert said != FALSE and truth != 2 - wished, item
                asked, certain = asked + 1, certain + (truth == wished and said == TRUE)
    assert crops >= 10 and certain >= 0.99 * asked


def test_jitter_leaves_a_lamp_its_colour(drawn):
    cfg = changed(drawn.cfg, flip=0.0, jitter=0.0, commands_per_image=2)
    plain, other = (train.Data(changed(cfg, jitter=j), drawn.meta, "train") for j in (0.0, 0.1))
    lamps = Counter()
    for start in range(0, 256, 32):
        a, b = plain.batch(start, 32), other.batch(start, 32)
        before, after = as_pixels(a.images, plain), as_pixels(b.images, other)
        assert np.abs(before - after).mean() > 2
        for k, picture in enumerate(pictures_shown(a, plain)):
            for o in drawn.views[picture].objects:
                if o.category == "traffic light" and o.colour in commands.COLOURS and o.certain == TRUE:
                    b2 = drawn.frames[picture]["labels"][o.label]["box2d"]
                    y, x = (slice(int(b2[c + "1"]), int(b2[c + "2"]) + 1) for c in "yx")
                    patch = before[k, y, x].reshape(-1, 3)
                    brightest = np.ptp(patch, axis=1).argmax()
                    old, new = patch[brightest], after[k, y, x].reshape(-1, 3)[brightest]
                    strongest = {"red": {0}, "yellow": {0}, "green": {1}}[o.colour]
                    if old.argmax() in strongest and np.ptp(old) > 60:
                        assert (np.argsort(new) == np.argsort(old)).all() or np.diff(np.sort(old)).min() < 20
                        assert new.argmax() == old.argmax()
                        lamps[o.colour] += 1
    assert all(lamps[c] >= 5 for c in commands.COLOURS), lamps


def test_data_of_other_settings_are_refused_with_the_difference_and_the_command(drawn, tmp_path):
    assert prepare.load_meta(drawn.cfg)["hash"] == config.data_hash(drawn.cfg)
    assert prepare.load_meta(changed(drawn.cfg, lr=1.0, seed=5, out_dir="elsewhere"))
    with pytest.raises(UserError) as error:
        prepare.load_meta(changed(drawn.cfg, min_pixels=9.5))
    text = str(error.value)
    assert "min_pixels=10.0 there, 9.5 now" in text and "python prepare.py" in text and "--min_pixels=9.5" in text
    assert "place_margin" not in text and "\n" not in text


def test_missing_or_broken_data_name_the_command_that_makes_them(drawn, tmp_path):
    cfg = changed(drawn.cfg, data_dir=str(tmp_path))
    for content in (None, "{half", '{"magic": "something else"}'):
        if content:
            (tmp_path / "meta.json").write_text(content)
        with pytest.raises(UserError, match="python prepare.py") as error:
            prepare.load_meta(cfg)
        assert f"--data_dir={tmp_path}" in str(error.value)


def test_a_bdd100k_folder_is_read_and_its_broken_parts_are_named(tmp_path):
    records = bdd_folder(tmp_path / "bdd")
    cfg = config.from_args([], source="bdd100k", bdd_dir=str(tmp_path / "bdd"), data_dir=str(tmp_path / "out"),
                           workers=1, min_cell=1)
    meta = prepare.prepare(cfg)
    frames = [json.loads(line) for line in (tmp_path / "out" / "frames.jsonl").read_text().splitlines()]
    broken, rainy = ["train06.jpg", "train07.jpg", "train08.jpg"], "train04.jpg"
    assert [f["name"] for f in frames] == [n for n in records if n not in broken and n != rainy]
    assert [f["index"] for f in frames] == list(range(22)) and meta["frames"] == 22 and meta["rejected"] == 3
    rejected = rejected_in(tmp_path / "out")
    assert [(r["name"], r["lost"], r["kind"]) for r in rejected] == [
        ("train01.jpg", "label", k) for k in ("no box", "empty or inverted box", "category 'spaceship'",
                                              "box outside the picture")] + [
        (n, "frame", k) for n, k in zip(broken, ("missing picture", "truncated or broken picture", "not a picture"))]
    assert all(name in r["reason"] for name, r in zip(broken, rejected[4:]))
    by_name = {f["name"]: f for f in frames}
    kept = by_name["train01.jpg"]["labels"]
    assert [lab["category"] for lab in kept] == ["car", "bicycle", "traffic light"]
    assert [lab["box2d"] for lab in kept] == [
        dict(x1=12.0, y1=pytest.approx(42.67), x2=36.0, y2=pytest.approx(120.89)),
        dict(x1=0.0, y1=64.0, x2=24.0, y2=128.0),
        dict(x1=40.0, y1=pytest.approx(7.11), x2=52.0, y2=pytest.approx(49.78))]
    assert kept[2]["attributes"]["trafficLightColor"] == "green"
    dropped = meta["labels_dropped"]
    assert (dropped["no box"], dropped["empty or inverted box"], dropped["box outside the picture"]) == (1, 1, 1)
    assert dropped["category 'spaceship'"] == 1 and dropped["category 'lane'"] == 2
    assert by_name["train02.jpg"]["labels"] == by_name["train03.jpg"]["labels"] == []
    images = np.load(tmp_path / "out" / "images.npy")
    assert images.shape == (22, 128, 128, 3)
    for f in frames:
        assert abs(images[f["index"], 64, 64] - np.array([40 + int(f["name"][-6:-4]), 90, 140.0])).max() < 6, f["name"]
        assert f["split"] == prepare.split_of(f["name"])
    assert prepare.load_meta(cfg)["hash"] == config.data_hash(cfg)


def test_malformed_bdd100k_records_stop_nothing(tmp_path):
    """Each is kept without its malformed part, or rejected by name; the good frames stay."""
    records = bdd_folder(tmp_path / "bdd")
    path = tmp_path / "bdd" / "labels" / "bdd100k_labels_images_train.json"
    listed = json.loads(path.read_text())
    edges = dict(x1=1, y1=1, x2=90, y2=90)
    for i, labels in ((10, [None]), (11, ["car"]), (12, dict(a=1)), (13, [dict(category=["car"], box2d=edges)]),
                      (14, [dict(category="car", box2d=edges, attributes=[1])]),
                      (15, [dict(category="car", box2d=[1, 2, 3])])):
        listed[i]["labels"] = labels
    listed[16]["attributes"] = ["clear"]
    del listed[17]["name"]
    path.write_text(json.dumps(listed))
    prepare.prepare(bdd_settings(tmp_path, max_bad_share=0.6))
    frames = frames_in(tmp_path / "out")
    kept, rejected = [f["name"] for f in frames], (tmp_path / "out" / "rejected.csv").read_text()
    assert kept == [n for n in records if n in kept]
    odd = [f"train{i:02d}.jpg" for i in range(10, 18)]
    assert set(records) - set(kept) <= {"train04.jpg", "train06.jpg", "train07.jpg", "train08.jpg", *odd}
    assert all(name in kept or name in rejected for name in odd[:6])


def test_bdd100k_val_can_be_the_test_split_and_filters_can_be_strict(tmp_path, monkeypatch):
    bdd_folder(tmp_path / "bdd")
    cfg = config.from_args([], source="bdd100k", bdd_dir=str(tmp_path / "bdd"), data_dir=str(tmp_path / "out"),
                           workers=1, min_cell=1, val_is_test=True, keep_undefined=False)
    prepare.prepare(cfg)
    frames = [json.loads(line) for line in (tmp_path / "out" / "frames.jsonl").read_text().splitlines()]
    assert "train05.jpg" not in {f["name"] for f in frames}
    assert all((f["split"] == "test") == f["name"].startswith("val") for f in frames)
    with pytest.raises(UserError, match="no frame passes"):
        prepare.prepare(changed(cfg, weather="snowy"))
    with pytest.raises(UserError, match="not a folder"):
        prepare.prepare(changed(cfg, bdd_dir=str(tmp_path / "nowhere")))
    assert prepare.load_meta(cfg)["frames"] == len(frames)                 # a refused run leaves the old data alone
    monkeypatch.setattr(prepare, "write_commands", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(cfg)
    with pytest.raises(UserError, match="no data"):                        # a broken one leaves none that look valid
        prepare.load_meta(cfg)


def test_crowded_frames_are_left_out_when_asked(tmp_path):
    cfg = config.from_args([], num_scenes=40, num_ood_scenes=0, data_dir=str(tmp_path), workers=1, max_complexity=5)
    meta = prepare.prepare(cfg)
    frames = [json.loads(line) for line in (tmp_path / "frames.jsonl").read_text().splitlines()]
    assert 0 < len(frames) < 40 and all(len(f["labels"]) <= 5 for f in frames)
    assert len(np.load(tmp_path / "images.npy", mmap_mode="r")) == len(frames) == meta["frames"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent, ascii_only", [(None, True), (2, False)])
def test_streaming_a_list_equals_loading_it(tmp_path, chunk, indent, ascii_only):
    path = tmp_path / "list.json"
    for records in (RECORDS, []):
        path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        assert list(prepare.stream_records(path, chunk)) == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_streaming_refuses_what_is_no_whole_list_of_records(tmp_path, chunk):
    path, text = tmp_path / "list.json", json.dumps(RECORDS)
    for cut in (0, 1, 10, len(text) // 2, len(text) - 2, len(text) - 1):
        path.write_text(text[:cut], encoding="utf-8")
        with pytest.raises(UserError, match="list.json"):
            list(prepare.stream_records(path, chunk))
    for other in ('{"images": []}', '{"frames": 1}', '{"frames": [1]}', "[1, 2]", "hello", '["a"]', '[{"name": }]',
                  "[nonsense]"):
        path.write_text(other, encoding="utf-8")
        with pytest.raises(UserError, match="list.json"):
            list(prepare.stream_records(path, chunk))
    path.write_bytes(b'[{"name": "\xff\xfe"}]')
    with pytest.raises(UserError, match="list.json"):
        list(prepare.stream_records(path, chunk))
    with pytest.raises(UserError, match="absent.json"):
        list(prepare.stream_records(tmp_path / "absent.json", chunk))


@pytest.mark.parametrize("chunk", [1, 4, 64, 1 << 20])
def test_streaming_the_frames_of_a_dict(tmp_path, chunk):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(dict(frames=RECORDS, config=dict(imageSize=None))), encoding="utf-8")
    assert list(prepare.stream_records(path, chunk)) == RECORDS
    with gzip.open(tmp_path / "list.json.gz", "wb") as file:
        file.write(path.read_bytes())
    assert list(prepare.stream_records(tmp_path / "list.json.gz", chunk)) == RECORDS
    (tmp_path / "list.json.gz").write_bytes((tmp_path / "list.json.gz").read_bytes()[:-20])
    with pytest.raises(UserError, match="list.json.gz"):
        list(prepare.stream_records(tmp_path / "list.json.gz", chunk))


@pytest.mark.parametrize("wrap", ["[%s]", '{"frames": [%s]}'])
def test_the_memory_for_reading_a_list_does_not_grow_with_it(tmp_path, wrap):
    peaks = []
    for count in (2000, 20000):
        (tmp_path / "list.json").write_text(wrap % ",".join([json.dumps(RECORDS[-1])] * count))
        tracemalloc.start()
        assert sum(1 for _ in prepare.stream_records(tmp_path / "list.json", 1 << 12)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 1e6


def test_one_frame_in_every_format_is_one_record(tmp_path):
    """2018 list, 2018 file for an image, 2020 list, colour as a list, a dict of frames, a sequence."""
    def labels(person, colour, number, **more):
        edges = [dict(x1=10, y1=20, x2=60.5, y2=90), dict(x2=130, y1=10, x1=100, y2=70)]
        return [dict(id=number, category=person, attributes=dict(occluded=True), box2d=edges[0], **more),
                dict(id=number, category="traffic light", attributes=dict(trafficLightColor=colour), box2d=edges[1])]
    lane, where = dict(category="lane", poly2d=[dict(vertices=[[0, 0]])]), dict(weather="clear", timeofday="night")
    old, new = labels("person", "green", 1), labels("pedestrian", "G", "1", poly2d=None, box3d=None)
    area = dict(category="area/drivable", poly2d=[[1, 2, "L"]])
    written = {
        "bdd100k_labels_images_train.json": [dict(name="a.jpg", attributes=where, labels=[*old, lane])],
        "100k/train/a.json": dict(name="a", frames=[dict(timestamp=1, objects=[*old, area])], attributes=where),
        "det_20/det_train.json": [dict(name="a.jpg", attributes=where, labels=new), dict(name="b.jpg", labels=None)],
        "det_20/det_v2_train.json": [dict(name="a.jpg", videoName="a", attributes=where,
                                          labels=labels("person", [1, "G"], 1))],
        "det_20/train_frames.json": dict(frames=[dict(name="a.jpg", attributes=where, labels=new)], config=None),
        "box_track_20/train/v.json": [dict(name="aaaaaaaa-bbbbbbbb-0000012.jpg", videoName="aaaaaaaa-bbbbbbbb",
                                           frameIndex=11, labels=new)]}
    for i, (path, content) in enumerate(written.items()):
        file = tmp_path / str(i) / "labels" / path
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
        cfg = config.from_args([], source="bdd100k", bdd_dir=str(tmp_path / str(i)), weather="", timeofday="")
        (picture, folder, record, problems), *_ = prepare.bdd_records(cfg)
        if i == 0:
            expected = record
            assert [lab["category"] for lab in record["labels"]] == ["pedestrian", "traffic light"]
            assert record["labels"][1]["attributes"] == dict(trafficLightColor="green")
            assert record["attributes"] == dict(where, scene="undefined")
        sequence = path.startswith("box_track")
        place = "track/train/aaaaaaaa-bbbbbbbb" if sequence else "100k/train"
        assert picture == str(tmp_path / str(i) / "images" / place / record["name"]) and folder == "train"
        assert record["labels"] == expected["labels"] and all(p[0] == "unused" for p in problems)
        assert sequence or record == expected


@pytest.mark.parametrize("label, says", [(dict(category="car", rle=dict(counts="c?", size=[9, 9])), "masks"),
                                         (dict(category="car", poly2d=[[1, 2]], box2d=None), "polygons"),
                                         (None, "no labels")])
def test_labels_without_boxes_are_refused_by_name(tmp_path, label, says):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "ins_val.json").write_text(json.dumps([dict(name="a.jpg", labels=label and [label])]))
    cfg = config.from_args([], source="bdd100k", bdd_dir=str(tmp_path), data_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"ins_val.json holds .*{says}.* not one box"):
        prepare.prepare(cfg)


def test_frames_of_a_video_are_in_one_split():
    videos = [f"{i:08x}-{i * 77:08x}" for i in range(60)]
    for video in videos:
        assert len({prepare.split_of(f"{video}-{k:07d}.jpg") for k in (1, 50, 999)} | {
            prepare.split_of(f"{video}.jpg")}) == 1
    assert {prepare.split_of(f"{v}-0000001.jpg") for v in videos} == {"train", "val", "test"}


def test_broken_pictures_are_named_and_all_else_stays_as_it_was(tmp_path):
    bdd_folder(tmp_path / "bdd")
    prepare.prepare(bdd_settings(tmp_path, max_bad_share=0.4))
    clean, images = frames_in(tmp_path / "out"), np.load(tmp_path / "out" / "images.npy")
    before, folder = rejected_in(tmp_path / "out"), tmp_path / "bdd" / "images" / "100k" / "train"
    full = (folder / "train10.jpg").read_bytes()
    (folder / "train10.jpg").write_bytes(full[:len(full) * 3 // 4])
    (folder / "train11.jpg").write_bytes(b"")
    (folder / "train12.jpg").write_bytes(b"\0" * 5000)
    Image.new("1", (10000, 6000)).save(folder / "train13.jpg", "PNG")
    Image.new("RGB", (180, 320)).save(folder / "train14.jpg")
    (folder / "train15.jpg").unlink()
    kinds = ("truncated or broken picture", "empty file", "not a picture", "huge picture", "wrong size",
             "missing picture")
    bad = {f"train{10 + i}.jpg": kind for i, kind in enumerate(kinds)}
    meta = prepare.prepare(bdd_settings(tmp_path, max_bad_share=0.4))
    after = [r for r in rejected_in(tmp_path / "out") if r not in before]
    assert {r["name"]: r["kind"] for r in after} == bad and [r["name"] for r in after] == list(bad)
    assert meta["rejected"] == 9 and meta["rejected_by"]["wrong size"] == 1
    kept = [f for f in clean if f["name"] not in bad]
    assert [dict(f, index=0) for f in frames_in(tmp_path / "out")] == [dict(f, index=0) for f in kept]
    assert (np.load(tmp_path / "out" / "images.npy") == images[[f["index"] for f in kept]]).all()


def test_broken_records_are_named(tmp_path):
    bdd_folder(tmp_path / "bdd")
    path = tmp_path / "bdd" / "labels" / "bdd100k_labels_images_train.json"
    listed = json.loads(path.read_text())
    listed[10]["labels"].append(dict(category="traffic light", box2d=dict(x1=1, y1=1, x2=40, y2=60),
                                     attributes=dict(trafficLightColor="mauve")))
    listed[11]["name"] = listed[12]["name"]
    del listed[13]["name"]
    listed[14]["name"] = "\ud800.jpg"
    path.write_text(json.dumps(listed))
    prepare.prepare(bdd_settings(tmp_path, max_bad_share=0.4))
    rows = [(r["name"], r["lost"], r["kind"]) for r in rejected_in(tmp_path / "out")][-4:]
    assert rows == [("train10.jpg", "colour", "unknown colour"), ("train12.jpg", "frame", "duplicate name"),
                    ("", "frame", "no name"), ("\\ud800.jpg", "frame", "truncated or broken picture")]
    frames = {f["name"]: f for f in frames_in(tmp_path / "out")}
    assert frames["train10.jpg"]["labels"][-1]["attributes"]["trafficLightColor"] == "none"


def test_too_many_broken_frames_or_labels_are_one_error_and_leave_the_old_data(tmp_path):
    bdd_folder(tmp_path / "bdd")
    cfg = bdd_settings(tmp_path)
    prepare.prepare(cfg)
    old = (tmp_path / "out" / "frames.jsonl").read_bytes()
    with pytest.raises(UserError, match="3 of 25 frames are bad, over max_bad_share=0.1: .*missing picture 1") as error:
        prepare.prepare(changed(cfg, max_bad_share=0.1))
    assert "\n" not in str(error.value) and (tmp_path / "out" / "frames.jsonl").read_bytes() == old
    assert prepare.load_meta(cfg)["frames"] == 22
    for path in (tmp_path / "bdd" / "images").rglob("*.jpg"):              # smaller pictures, the same boxes
        Image.new("RGB", (32, 18)).save(path)
    with pytest.raises(UserError, match="labels are bad, .*box outside the picture"):
        prepare.prepare(cfg)


@pytest.mark.parametrize("torn", ["", "entry", "picture"])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, torn):
    bdd_folder(tmp_path / "bdd")
    cfg, decode, seen = bdd_settings(tmp_path), prepare._decode_one, []

    def stop_at_15(job):
        if len(seen) == 15:
            raise KeyboardInterrupt
        seen.append(job)
        return decode(job)
    monkeypatch.setattr(prepare, "_decode_one", stop_at_15)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(cfg)
    monkeypatch.setattr(prepare, "_decode_one", lambda job: seen.append(job) or decode(job))
    for name in {"entry": ["journal.tmp.jsonl"], "picture": ["images.tmp.npy"]}.get(torn, []):
        path = tmp_path / "out" / name
        path.write_bytes(path.read_bytes()[:-9])
    prepare.prepare(cfg)
    assert len(seen) == (25 if not torn else 26) and "of 25 pictures are there" in capsys.readouterr().out
    prepare.prepare(changed(cfg, data_dir=str(tmp_path / "whole")))
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert names == {p.name for p in (tmp_path / "out").iterdir()} and not [n for n in names if ".tmp" in n]
    for name in names - {"meta.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_an_interrupted_run_of_other_settings_or_labels_starts_over(tmp_path, monkeypatch, capsys):
    records = bdd_folder(tmp_path / "bdd")
    cfg = bdd_settings(tmp_path)
    for change in ("settings", "labels"):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "write_commands", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prepare.prepare(cfg)
        path = tmp_path / "bdd" / "labels" / "bdd100k_labels_images_val.json"
        if change == "labels":
            path.write_text(json.dumps([r for n, r in records.items() if n.startswith("val0")][1:]))
        capsys.readouterr()
        prepare.prepare(cfg if change == "labels" else changed(cfg, image_size=64))
        assert "are there from" not in capsys.readouterr().out
    assert prepare.load_meta(cfg)["frames"] == 21


def test_filters_of_a_bdd100k_folder_are_checked_and_say_what_there_is(tmp_path):
    bdd_folder(tmp_path / "bdd")
    with pytest.raises(UserError, match="no BDD100K scene has weather 'cleer', did you mean 'clear'"):
        prepare.prepare(bdd_settings(tmp_path, weather="cleer"))
    with pytest.raises(UserError, match="no frame passes the filters: there are weather clear 24, .*rainy 1"):
        prepare.prepare(bdd_settings(tmp_path, scene="tunnel", keep_undefined=False))
    for weather, keep, count in (("undefined", False, 1), ("rainy", True, 2), ("rainy", False, 1), ("", False, 26)):
        cfg = bdd_settings(tmp_path, weather=weather, keep_undefined=keep)
        assert len(list(prepare.bdd_records(cfg))) == count


def test_frames_say_what_stands_where_and_what_can_be_asked(drawn):
    for frame, view in list(zip(drawn.frames, drawn.views))[:40]:
        assert len(frame["relations"]) == frame["complexity"] == sum(o.certain == TRUE for o in view.objects)
        for words, o in zip(frame["relations"], (o for o in view.objects if o.certain == TRUE)):
            assert words.startswith(commands.noun_of(o)) and (o.place is None or commands.AT[o.place] in words)
        certain = Counter(q.family for q in QUESTIONS if q.truth(view) != UNSURE)
        assert frame["available"] == certain


def test_pictures_of_every_kind_become_upright_rgb(tmp_path):
    grey, red = Image.new("L", (40, 30), 120), Image.new("RGB", (40, 30), (200, 30, 60))
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.full((30, 40), 120 * 256 + 7, np.uint16))
    kinds = {"grey.png": grey, "grey.jpg": grey, "deep.png": deep, "rgba.png": red.convert("RGBA"), "plain.jpg": red,
             "cmyk.jpg": red.convert("CMYK"), "palette.png": palette,
             "deeper.tif": Image.fromarray(np.full((30, 40), 120 * 257, np.int32)),
             "grey.tif": grey.convert("F"), "greyer.tif": Image.fromarray(np.full((30, 40), 120 / 255, np.float32))}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        colour = (120, 120, 120) if name[0] in "gd" else (200, 30, 60)
        whole, small = prepare.load_picture(tmp_path / name), prepare.load_picture(tmp_path / name, 16)
        assert (whole.mode, whole.size, small.mode, small.size) == ("RGB", (40, 30), "RGB", (16, 16)), name
        for image in (whole, small):
            assert np.abs(np.asarray(image)[8, 8] - np.array(colour, float)).max() <= 8, name


def test_a_rotated_photo_is_turned_upright(tmp_path):
    picture = np.zeros((60, 40, 3), np.uint8)
    picture[:30] = (250, 10, 10)                                           # upright: red above black
    exif = Image.Exif()
    exif[0x0112] = 6                                                       # stored turned, to be shown turned back
    Image.fromarray(picture).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for size, expected in ((None, (40, 60)), (32, (32, 32))):
        image = prepare.load_picture(tmp_path / "turned.jpg", size)
        pixels = np.asarray(image).astype(int)
        quarter = len(pixels) // 4
        assert image.size == expected and pixels[quarter].mean(0)[0] > 200 and pixels[-quarter].mean(0)[0] < 50


def test_what_is_no_picture_is_a_named_error(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "half.jpg")
    full = (tmp_path / "half.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(full[:len(full) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("half.jpg", "text.jpg", "empty.png", "absent.jpg", "."):
        for size in (None, 32):
            with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
                prepare.load_picture(tmp_path / name, size)


def test_mutated_labels_are_read_or_refused_by_name(tmp_path):
    """Bytes of a list changed, dropped or doubled; values replaced by any other: no error but a UserError."""
    path, rng = tmp_path / "list.json", random.Random(0)
    edges = dict(x1=1.5, y1=2, x2=90, y2=80)
    record = dict(name="a.jpg", attributes=dict(weather="clear", scene="", timeofday=None), labels=[
        dict(category="car", box2d=edges, attributes=dict(occluded=True, trafficLightColor=[1, "G"]))])
    odd = [None, True, -1, 1e400, "", "é", [], {}, [[]], {"": {}}, 10 ** 400, "nan"]

    def mutate(value):
        if rng.random() < 0.15:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {k: mutate(v) for k, v in value.items() if rng.random() < 0.95}
        return [mutate(v) for v in value] if isinstance(value, list) else value
    for case in range(300):
        content = bytearray(json.dumps([mutate(record), record]).encode())
        for _ in range(rng.choice((0, 0, 1, 5))):
            place = rng.randrange(len(content))
            content[place:place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
        path.write_bytes(content)
        try:
            for raw in prepare.stream_records(path, rng.choice((1, 7, 1 << 20))):
                frame, _ = prepare.fit_record(prepare.clean_record(raw)[0], 1280, 720, 128)
                for label in frame["labels"]:
                    assert all(0 <= v <= 128 for v in label["box2d"].values())
                json.dumps(frame)
                commands.truths(View(frame, DEFAULTS))
        except UserError as error:
            assert "list.json" in str(error) and "\n" not in str(error)


def test_pictures_of_random_modes_and_damage_are_read_or_refused_by_name(tmp_path):
    rng = random.Random(0)
    modes = {"png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "jpg": ("L", "RGB", "CMYK"),
             "bmp": ("1", "L", "P", "RGB"), "gif": ("L", "P"),
             "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"),
             "ppm": ("1", "L", "RGB"), "webp": ("RGB", "RGBA"), "tga": ("L", "LA", "P", "RGB", "RGBA")}
    for case in range(250):
        kind = rng.choice(sorted(modes))
        image = Image.new(rng.choice(modes[kind]), (rng.choice((1, 2, 3, 17, 40, 300)), rng.choice((1, 5, 33, 60))))
        path = tmp_path / f"{case}.{kind}"
        image.save(path)
        content = bytearray(path.read_bytes())
        if rng.random() < 0.7:
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content[:rng.randint(0, len(content))] if rng.random() < 0.3 else content)
        size = rng.choice((None, 1, 16, 100))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                            # Pillow's, of corrupt EXIF data
                picture = prepare.load_picture(path, size)
            assert picture.mode == "RGB" and (size is None or picture.size == (size, size))
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)


# ---- training ----

def test_accumulated_small_batches_learn_what_one_large_batch_learns(drawn, tmp_path):
    same = dict(flip=0.0, jitter=0.0, max_steps=4, answer_weight=3.0, see_steps=1)
    train.train(small_run(drawn, tmp_path / "a", batch_size=8, grad_accum=1, **same))
    train.train(small_run(drawn, tmp_path / "b", batch_size=2, grad_accum=4, **same))
    a, b = log_losses(tmp_path / "a"), log_losses(tmp_path / "b")
    assert list(a) == list(b) == [1, 2, 3, 4] and all(abs(a[s] - b[s]) < 1e-4 for s in a)
    assert a[4] < a[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_after_an_interrupt_equals_never_stopping(tmp_path, monkeypatch, dtype, capsys):
    """To the bit, wherever it stopped: in either stage, in a later pass, between log lines, after validations."""
    cfg = made_up(tmp_path, max_steps=8, see_steps=3, eval_every=2, log_every=3, dropout=0.2, dtype=dtype, grad_accum=2)
    finished = train.train(cfg)
    state, log, noise = last_of(cfg), logged(cfg), torch.get_rng_state()
    assert state["step"] == 8 and [row["step"] for row in log] == ["3", "4", "6", "6", "8", "8"]
    for stop in (1, 3, 4, 5, 7):
        cut = changed(cfg, out_dir=str(tmp_path / f"cut{stop}"))
        with monkeypatch.context() as patch:
            interrupt_at(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                train.train(cut)
        assert last_of(cut)["step"] == stop and "--resume=True" in capsys.readouterr().out
        again = train.train(changed(cut, resume=True))
        assert train.checksum(last_of(cut)) == train.checksum(state) and logged(cut) == log, stop
        assert torch.equal(torch.get_rng_state(), noise) and again["test_accuracy"] == finished["test_accuracy"]


def test_resuming_says_what_changed_and_refuses_what_would_train_something_else(tmp_path, capsys):
    cfg = made_up(tmp_path, max_steps=2)
    train.train(cfg)
    with pytest.raises(UserError, match="seed was 1337, now 3, lr was 0.002, now 0.1$"):
        train.train(changed(cfg, resume=True, lr=0.1, seed=3, eval_every=5))
    train.train(changed(cfg, resume=True, max_steps=3, eval_every=5))
    assert "at step 2; max_steps was 2, now 3; eval_every was 500, now 5" in capsys.readouterr().out
    vocabulary = Path(cfg.data_dir) / "vocab.json"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("?", "!"), encoding="utf-8")
    with pytest.raises(UserError, match="vocabulary"):
        train.train(changed(cfg, resume=True))


def test_a_killed_run_goes_on_from_its_last_save(tmp_path, monkeypatch):
    """Killed in an update, with rows logged after the save, and while saving: nothing but a leftover, which goes."""
    cfg = made_up(tmp_path, max_steps=6, eval_every=2)
    for name, where in (("update", (train, "lr_scale", lambda step, cfg: killed() if step == 5 else 1.0)),
                        ("saving", (train.os, "replace", killed))):
        cut = changed(cfg, out_dir=str(tmp_path / name), schedule="constant", warmup_steps=0)
        if name == "saving":
            train.train(changed(cut, max_steps=4))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*where)
            train.train(changed(cut, resume=name == "saving"))
        assert last_of(cut)["step"] == 4 and (len(list(Path(cut.out_dir).glob("*.tmp"))) == 1) == (name == "saving")
        (Path(cut.out_dir) / "best-3.pt.tmp").touch()                      # of an earlier kill
        train.train(changed(cut, resume=True))
        assert not list(Path(cut.out_dir).glob("*.tmp"))
        whole = changed(cut, out_dir=str(tmp_path / f"whole {name}"))
        train.train(whole)
        assert logged(cut) == logged(whole) and train.checksum(last_of(cut)) == train.checksum(last_of(whole))


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch, capsys):
    cfg = made_up(tmp_path, max_steps=2)
    train.train(cfg)
    before = {p.name: p.read_bytes() for p in Path(cfg.out_dir).glob("*.pt")}

    def full(_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(train.os, "fsync", full)
        with pytest.raises(UserError, match="best.pt.*unchanged.*No space left"):
            train.train(cfg)
    assert before == {p.name: p.read_bytes() for p in Path(cfg.out_dir).glob("*.pt*")}
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file"):
        train.train(changed(cfg, out_dir=str(tmp_path / "file")))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        config.run(full, "")                                               # as when the log cannot grow
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


# Every fourth loss of the run below; to be replaced, by what the failing test shows, only when training should change.
GOLDEN = [0.6841753, 0.6843722, 0.6649422, 0.6360434, 0.6144045, 5.214607, 4.80403, 4.425296, 4.114118, 3.970629,
          4.000705, 3.713508, 3.88607, 3.787102, 3.72839, 3.622289, 3.599025, 3.59713, 3.615325, 3.537395, 3.455299,
          3.632748, 3.509478, 3.637973, 3.560055]


def test_golden_losses(tmp_path):
    """Equal to what was measured to 1e-5, whatever the threads; twice on one machine, to the bit."""
    cfg = made_up(tmp_path, max_steps=100, see_steps=20, warmup_steps=10, lr=1e-3)
    threads, runs = torch.get_num_threads(), []
    try:
        for name, count in (("a", 1), ("b", 1), ("c", 2)):
            torch.set_num_threads(count)
            run = changed(cfg, out_dir=str(tmp_path / name))
            train.train(run)
            losses = [loss for step, loss in log_losses(run.out_dir).items() if step % 4 == 0]
            assert losses == pytest.approx(GOLDEN, rel=1e-5), losses
            runs.append((losses, train.checksum(last_of(run))))
    finally:
        torch.set_num_threads(threads)
    assert runs[0] == runs[1]


def test_two_processes_go_on_as_one_would(tmp_path, monkeypatch):
    """Same losses, validation and test, from the checkpoint of one process; printed and written once."""
    cfg = made_up(tmp_path / "a b", max_steps=6, see_steps=3, batch_size=3, grad_accum=2, eval_batch=2, eval_every=2)
    alone = train.train(cfg)
    two = changed(cfg, out_dir=str(tmp_path / "a b" / "two"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1)
        train.train(two)
    given = [f"--{k}={v}" for k, v in vars(two).items() if v != getattr(DEFAULTS, k)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           train.__file__, *given, "--resume=True"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("test_accuracy") == 1
    for one, both in zip(logged(cfg), logged(two), strict=True):
        assert all(a == b or float(a) == pytest.approx(float(b), rel=1e-5) for a, b in zip(one.values(), both.values()))
    assert json.loads((Path(two.out_dir) / "train.json").read_text())["test_accuracy"] == alone["test_accuracy"]


def test_bench_measures_both_stages_and_saves_nothing_else(tmp_path, monkeypatch):
    cfg = made_up(tmp_path, max_steps=10, see_steps=4, bench=True)
    monkeypatch.setattr(train, "growth", lambda cfg: {"layers, text": {n: dict(text_layers=n) for n in (1, 2, 4)}})
    found = train.train(cfg)
    assert [path.name for path in Path(cfg.out_dir).iterdir()] == ["bench.json"]
    assert json.loads((Path(cfg.out_dir) / "bench.json").read_text()) == found
    assert found["read"]["gflop_done"] > found["see"]["gflop_done"] > found["see"]["gflop"] > 0
    assert all(found[stage][f"share_{part}"] > 0 for stage in ("see", "read") for part in train.PARTS)

    now, tick = [0.0], 0.01

    def passing():
        now[0] += tick
        return now[0]

    def update(model, tagger, optimizer, scaler, micros, total, read, dtype, cfg, clock):
        torch.ones(4, 8) @ torch.ones(8, 2)
        for part, seconds in zip(train.PARTS[1:], (0.2, 0.3, 0.02) if read else (0.05, 0.03, 0.01)):
            now[0] += seconds * cfg.text_layers ** 2 - tick
            clock(part)
    monkeypatch.setattr(train.time, "perf_counter", passing)
    monkeypatch.setattr(train, "update", update)
    found = train.train(cfg)                                # waiting for data takes one tick, a matmul too
    for stage, ms, forward, pairs in ("see", 100, 0.5, 0), ("read", 530, 0.2 / 0.53, 16 / 0.53), (
            "schedule", 358, (4 * 0.05 + 6 * 0.2) / 3.58, 6 * 16 / 3.58):
        row, peak = found[stage], 2e-9 * 1024 ** 3 / tick
        assert row["ms"] == pytest.approx(ms) and row["share_forward"] == pytest.approx(forward), stage
        assert row["share_data"] == pytest.approx(1000 * tick / ms) and row["pairs_per_s"] == pytest.approx(pairs)
        assert row["images_per_s"] == pytest.approx(4000 / ms) and row["gflop_done"] == pytest.approx(128e-9)
        assert row["share_of_peak_done"] == pytest.approx(128e-9 / (ms / 1000) / peak)
    assert found["cost"]["layers, text"]["exponent"] == pytest.approx(2)
    assert found["cost"]["layers, text"]["ms"] == pytest.approx([520, 2080, 8320])


def test_attention_entropy_by_hand_and_its_gradient_where_a_weight_vanishes():
    scores = torch.tensor([[0.0, 0.0, -200.0], [0.0, -300.0, -300.0], [1.0, 2.0, 3.0]], requires_grad=True)
    tokens = torch.tensor([[5, 6, tokenizer.PAD]])
    found = train.attention_entropy(scores.softmax(-1)[None, None, None], tokens)          # (1, 1, 1, 3, 3)
    assert found.item() == pytest.approx(math.log(2) / 2)   # of ln 2 and 0; the third row is of padding
    found.backward()
    assert scores.grad.isfinite().all() and (scores.grad[2] == 0).all()


def test_tensorboard_is_told_numbers_confusion_and_where_it_looked(drawn, tmp_path, monkeypatch):
    told = {}

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add(self, name, value, step):
            told.setdefault(name, []).append((step, value))
        add_scalar = add_text = add_image = add

        def close(self):
            told["closed"] = True
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    cfg = small_run(drawn, tmp_path, tensorboard=True, max_steps=6, see_steps=2, eval_every=2, log_every=2)
    train.train(cfg)
    with open(tmp_path / "log.csv", newline="", encoding="utf-8") as file:
        log = [row for row in csv.DictReader(file)]
    for name in ("loss", "lr", "grad_norm", "val_accuracy"):
        logged = [(int(row["step"]), float(row[name])) for row in log if row[name]]
        assert told[name] == [(step, pytest.approx(value, rel=1e-4)) for step, value in logged], name
    for step, rate in told["lr"]:                          # of the part that learns
        peak = cfg.lr if step > train.see_updates(cfg) else cfg.lr_vision
        assert rate == pytest.approx(peak * train.lr_scale(step - 1, cfg))
    assert cfg.lr != cfg.lr_vision and train.see_updates(cfg) == 2
    counts = [list(map(int, re.findall(r"\d+", text))) for _, text in told["confusion"]]
    for (yes_yes, yes_no, no_yes, no_no), (_, accuracy) in zip(counts, told["val_accuracy"]):
        assert 50 * (yes_yes / (yes_yes + yes_no) + no_no / (no_yes + no_no)) == pytest.approx(100 * accuracy)
    for (step, picture), (_, asked) in zip(told["where it looked"][::2], told["where it looked"][1::2]):
        assert picture.shape == (3, cfg.image_size, cfg.batch_size * cfg.image_size) and step in (4, 6)
        assert 0 <= picture.min() and picture.max() <= 1 and asked.count("?") == cfg.batch_size
    assert told["closed"]


def test_validation_counts_what_was_said_where_yes_is_true_and_where_no_is(monkeypatch):
    truth, odds = np.array([1, 1, 1, 0, 0, 0, 0]), np.array([2.0, 1, -1, -1, -1, -1, 3])
    monkeypatch.setattr(train, "predict", lambda *args, **limit: (np.arange(7), odds))
    data = SimpleNamespace(index=np.stack((truth,) * 4, 1))
    accuracy, loss, confusion = train.validate(None, data, DEFAULTS, None, None)
    assert confusion == [(2, 1), (1, 3)] and accuracy == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert loss == pytest.approx(np.mean(np.log1p(np.exp(np.where(truth, -odds, odds)))))


def test_pictures_are_lit_where_the_question_looked(drawn):
    data = train.Data(small_run(drawn, "unused"), drawn.meta, "train")
    batch = data.batch(0, 3)
    (B, K, T), side = batch.tokens.shape, 4
    cross = torch.full((2, B * K, 2, T, side * side), 0.01)
    for b in range(B):
        k, t = ((batch.targets[b] == tokenizer.YES) | (batch.targets[b] == tokenizer.NO)).nonzero()[0].tolist()
        cross[:, b * K + k, :, t, 5 + b] = 0.5
    picture, asked = train.lit(batch, cross, data)
    mean, std = (torch.tensor(drawn.meta[k]).view(3, 1, 1) for k in ("mean", "std"))
    size = batch.images.shape[-1]
    for b in range(B):
        row, column = divmod(5 + b, side)
        shown, whole = picture[:, :, b * size:(b + 1) * size], (batch.images[b] * std + mean).clamp(0, 1)
        part = slice(row * size // side, (row + 1) * size // side), slice(column * size // side,
                                                                         (column + 1) * size // side)
        torch.testing.assert_close(shown[:, *part], whole[:, *part])
        torch.testing.assert_close(shown[:, -1, -1], whole[:, -1, -1] * (0.2 + 0.8 * 0.02))
        assert asked[b].endswith(("? [YES]", "? [NO]"))


def test_the_learning_rate_range_is_passed_through_until_the_loss_doubles(drawn, tmp_path, monkeypatch, capsys):
    cfg, seen = small_run(drawn, tmp_path, lr_range=True, lr=1e-3, lr_vision=2e-3, see_steps=2, max_steps=4), []

    def update(model, tagger, optimizer, scaler, micros, total, read, dtype, cfg, clock):
        rates = {group["lr"] / group["peak"] for group in optimizer.param_groups}
        seen.append((read, *rates))
        assert total == train.total_weight(micros, cfg) and len(rates) == 1
        return (100.0 if read and seen[-1][1] > 1 else 2.0 - seen[-1][1] / 10), 1.0, True
    monkeypatch.setattr(train, "update", update)
    found = train.train(cfg)
    assert json.loads((tmp_path / "lr_range.json").read_text()) == found
    see, read = found["see"], found["read"]
    assert see["scale"] == pytest.approx(list(np.geomspace(1e-3, 10, 150)))
    assert [r for r, _ in seen] == [False] * 150 + [True] * (len(read["scale"]) + 1)
    assert [scale for _, scale in seen] == pytest.approx(see["scale"] + see["scale"][:len(read["scale"]) + 1])
    assert see["loss"][0] == pytest.approx(2, abs=1e-3) and see["loss"][-1] == pytest.approx(
        2 - np.dot(see["scale"][::-1], 0.9 ** np.arange(150)) / 100, abs=1e-3)
    said = capsys.readouterr().out
    assert read["scale"][-1] < 1 < see["scale"][len(read["scale"])]
    assert "seen up to 10 times" in said and "doubled at 1.0" in said
    monkeypatch.setattr(train, "update", lambda *args: (math.nan, math.nan, False))
    with pytest.raises(UserError, match="the loss is nan before anything is learned"):
        train.train(cfg)


def test_learning_rate_warms_up_and_decays():
    cfg = config.from_args(["--warmup_steps=10", "--max_steps=110", "--min_lr=0.1"])
    scale = [train.lr_scale(s, cfg) for s in range(110)]
    assert np.allclose(scale[:10], np.arange(1, 11) / 10) and scale[10] == 1.0
    assert scale[60] == pytest.approx(0.55) and all(a > b for a, b in zip(scale[10:], scale[11:]))
    assert scale[-1] == pytest.approx(0.1, abs=1e-3) and train.lr_scale(500, cfg) == pytest.approx(0.1)
    steps = [train.lr_scale(s, changed(cfg, schedule="step", min_lr=0.001)) for s in (10, 69, 70, 94, 95, 109)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    restarts = [train.lr_scale(s, changed(cfg, schedule="restarts", max_steps=310)) for s in range(310)]
    for first in (10, 110, 210):
        assert restarts[first] == pytest.approx(1, abs=1e-2) and restarts[first + 50] == pytest.approx(0.55, abs=1e-2)
        assert restarts[first + 99] == pytest.approx(0.1, abs=1e-2)
    assert {train.lr_scale(s, changed(cfg, schedule="constant")) for s in range(10, 110)} == {1.0}


def test_weight_decay_spares_norms_biases_embeddings_and_positions(drawn, tmp_path, monkeypatch):
    made, make = [], train.make_optimizer

    def spied(model, *rest):
        made.append((model, make(model, *rest)))
        return made[0][1]
    monkeypatch.setattr(train, "make_optimizer", spied)
    train.train(small_run(drawn, tmp_path, weight_decay=0.07, lr=1e-3, lr_vision=2e-3, lr_projection=3e-3, max_steps=1,
                          schedule="constant", warmup_steps=0))
    model, optimizer = made[0]
    found = {id(p): (group["weight_decay"], group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        decay, lr = found[id(p)]
        spared = p.ndim < 2 or any(word in name for word in ("norm", "bias", "embedding", "positions"))
        assert decay == (0 if spared else 0.07), name
        assert lr == {"vision": 2e-3, "projection": 3e-3, "decoder": 1e-3}[name.split(".")[0]], name
    assert {decay for decay, _ in found.values()} == {0, 0.07}


@pytest.mark.parametrize("answer, yes, smooth, gamma", [(1, 1, 0, 0), (3, 1, 0, 0), (2, 1.5, 0, 0), (2, 1, 0.1, 0),
                                                        (1, 1, 0, 2), (2, 0.5, 0.2, 1.5)])
def test_token_loss_is_the_weighted_sum_it_says(answer, yes, smooth, gamma):
    cfg = changed(DEFAULTS, answer_weight=answer, yes_weight=yes, label_smoothing=smooth, focal_gamma=gamma)
    logits = np.random.default_rng(0).normal(size=(6, 9))
    targets, expected, weights = [4, 5, 7, 2, 4, 8], 0.0, []
    for row, target in zip(logits, targets):
        log_p = row - np.log(np.exp(row).sum())
        loss = -(1 - smooth) * log_p[target] - smooth * log_p.mean()
        loss *= (1 - np.exp(log_p[target])) ** gamma if target in (4, 5) else 1
        weights.append({4: answer * yes, 5: answer}.get(target, 1))
        expected += weights[-1] * loss
    goal = torch.tensor(targets)
    assert train.token_weights(goal, cfg).tolist() == pytest.approx(weights)
    found = train.token_loss(torch.tensor(logits, dtype=torch.float32), goal, cfg).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_balanced_accuracy_by_hand():
    assert train.balanced_accuracy([1, 1, 0, 0], [2, 1, -1, -3]) == 1
    assert train.balanced_accuracy([1, 1, 0, 0], [-2, -1, 1, 3]) == 0
    assert train.balanced_accuracy([1, 1, 1, 0], [1, 1, 1, 1]) == 0.5
    assert train.balanced_accuracy([1, 1, 1, 1, 0], [1, 1, 1, -1, -1]) == pytest.approx((0.75 + 1) / 2)
    assert np.isnan(train.balanced_accuracy([1, 1], [1, -1])) and np.isnan(train.balanced_accuracy([], []))


def test_prediction_reads_the_answer_at_the_question_mark(drawn):
    cfg = small_run(drawn, "unused", eval_batch=5)
    data = train.Data(cfg, drawn.meta, "val")
    model = small_model(cfg, len(data.tokenizer))
    rows, odds = train.predict(model, data, cfg, torch.device("cpu"), torch.float32)
    assert sorted(rows) == [k for k, i in enumerate(drawn.items["val"]) if i["answer"] is not None]
    for k in (0, len(rows) // 2, len(rows) - 1):
        item = drawn.items["val"][rows[k]]
        scaled = (drawn.images[item["picture"]] / 255 - np.array(data.mean)) / np.array(data.std)
        images = torch.tensor(scaled.transpose(2, 0, 1)[None], dtype=torch.float32)
        logits = model(images, torch.tensor([[data.tokenizer.prompt(item["command"])]]))[0, 0, -1]
        assert odds[k] == pytest.approx((logits[tokenizer.YES] - logits[tokenizer.NO]).item(), abs=1e-4)
    few, _ = train.predict(model, data, cfg, torch.device("cpu"), torch.float32, limit=60)
    assert 30 <= len(few) <= 90 and set(few) <= set(rows)


def test_prompts_of_any_number_and_length_are_answered_as_if_alone():
    model, images = tiny(), pictures(3)
    prompts = [[words(n, seed=10 * b + n).tolist() for n in own] for b, own in enumerate(([4, 9], [6], [3, 5, 12]))]
    found = train.answer_odds(model, images, prompts, torch.device("cpu"), torch.float32)
    assert [len(row) for row in found] == [2, 1, 3]
    for image, own, row in zip(images, prompts, found):
        for ids, odds in zip(own, row):
            logits = model(image[None], torch.tensor([ids]))[0, -1]
            assert odds == pytest.approx((logits[tokenizer.YES] - logits[tokenizer.NO]).item(), abs=1e-4)


def test_a_blank_picture_hides_the_picture_and_a_wrong_one_is_another(drawn):
    cfg = small_run(drawn, "unused")
    data, other = (train.Data(cfg, drawn.meta, "val") for _ in range(2))
    other.images = np.ascontiguousarray(drawn.images[::-1])
    model = small_model(cfg, len(data.tokenizer))

    def odds(of, picture):
        return train.predict(model, of, cfg, torch.device("cpu"), torch.float32, picture, limit=200)[1]
    assert np.array_equal(odds(data, "blank"), odds(other, "blank"))
    assert not np.allclose(odds(data, "right"), odds(other, "right"), atol=1e-6)
    assert not np.allclose(odds(data, "right"), odds(data, "blank"), atol=1e-6)
    assert not np.allclose(odds(data, "right"), odds(data, "wrong"), atol=1e-6)


def test_training_ends_with_the_test_score_of_its_best_checkpoint(drawn, tmp_path):
    cfg = small_run(drawn, tmp_path, max_steps=5, save_top=2, eval_every=2)
    result = train.train(cfg)
    assert json.loads((tmp_path / "train.json").read_text())["steps"] == result["steps"] == 5
    assert len(list(tmp_path.glob("best-*.pt"))) == 2
    wished = changed(DEFAULTS, out_dir=str(tmp_path), device="cpu", data_dir=drawn.cfg.data_dir)
    model, trained, spoken, state, device = train.load_model(wished)
    assert trained.vision_dim == 32 and trained.data_dir == drawn.cfg.data_dir and not model.training
    data = train.Data(trained, drawn.meta, "test")
    rows, odds = train.predict(model, data, trained, device, torch.float32)
    assert train.balanced_accuracy(data.index[rows, 3], odds) == pytest.approx(result["test_accuracy"])
    assert spoken.words == data.tokenizer.words


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings of a run that is over, with best.pt and last.pt. Nobody writes to its folder."""
    cfg = made_up(tmp_path_factory.mktemp("trained"), max_steps=2)
    train.train(cfg)
    return cfg


def test_a_broken_checkpoint_is_a_named_error_that_offers_the_other(trained, tmp_path):
    whole = (Path(trained.out_dir) / "last.pt").read_bytes()
    state = torch.load(Path(trained.out_dir) / "last.pt", weights_only=True)
    good = {k: v for k, v in state.items() if k != "checksum"}
    for name, content, says in [
            ("half", whole[:len(whole) // 2], "damaged"), ("text", b"not a checkpoint", "damaged"),
            ("empty", b"", "damaged"), ("list", [1], "format None"), ("foreign", dict(other=1), "format None"),
            ("other", dict(good, format=1), "format 1.*reads format 2"),
            ("less", {k: v for k, v in good.items() if k != "scaler"}, "lacks scaler"),
            ("more", dict({k: v for k, v in good.items() if k != "step"}, ema=1), "lacks step and holds unknown ema"),
            ("changed", dict(state, step=3), "does not match its checksum"), ("absent", None, "no checkpoint")]:
        path = tmp_path / f"{name}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError, match=says) as error:
            train.load_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value) and "whole" not in str(error.value)
    shutil.copy(Path(trained.out_dir) / "last.pt", tmp_path / "last.pt")
    (tmp_path / "best.pt").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="best.pt.*damaged.*last.pt of step 2 is whole: pass --checkpoint="):
        train.load_checkpoint(tmp_path / "best.pt")
    (tmp_path / "last.pt").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="last.pt.*damaged") as error:
        train.train(changed(trained, out_dir=str(tmp_path), resume=True))
    assert "whole" not in str(error.value)


def test_a_flipped_byte_is_refused_or_changes_nothing(trained, tmp_path):
    """Some bytes of the file hold no content: padding, and fields that torch does not read."""
    path, refused = Path(trained.out_dir) / "last.pt", 0
    whole, content = path.read_bytes(), train.checksum(train.load_checkpoint(path))
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            assert train.checksum(train.load_checkpoint(tmp_path / "flipped.pt")) == content
        except UserError as error:
            assert "flipped.pt" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_weights_of_another_architecture_are_named(trained, tmp_path):
    state = train.load_checkpoint(Path(trained.out_dir) / "best.pt")
    weights = {k: v for k, v in state["model"].items() if k != "vision.norm.bias"}
    weights["decoder.embedding.weight"] = weights["decoder.embedding.weight"][:-1]
    train.save_checkpoint(tmp_path / "odd.pt", dict(state, model=dict(weights, extra=torch.zeros(2))))
    with pytest.raises(UserError, match=r"odd.pt.* 3 tensors.*embedding.weight is \((\d+), 32\) there") as error:
        train.load_model(changed(DEFAULTS, checkpoint=str(tmp_path / "odd.pt"), device="cpu"))
    assert "extra is (2,) there, absent here" in str(error.value)
    assert "vision.norm.bias is absent there, (32,) here" in str(error.value)


def test_an_export_answers_like_its_checkpoint_but_cannot_be_resumed(trained, tmp_path):
    file = tmp_path / "a model.pt"
    train.train(changed(trained, export=str(file)))
    assert file.stat().st_size < 0.5 * (Path(trained.out_dir) / "best.pt").stat().st_size
    wished = changed(DEFAULTS, device="cpu", data_dir=trained.data_dir, out_dir=trained.out_dir)
    (model, cfg, words, state, _), (best, *_) = (train.load_model(changed(wished, checkpoint=path))
                                                 for path in (str(file), ""))
    assert train.checksum(model.state_dict()) == train.checksum(best.state_dict()) and set(state) == train.WEIGHTS
    assert cfg.vision_dim == 32 and "left" in words.ids
    with pytest.raises(UserError, match="a model.pt exists"):
        train.train(changed(trained, export=str(file)))
    with pytest.raises(UserError, match="a model.pt holds weights alone"):
        train.train(changed(trained, resume=True, checkpoint=str(file)))


def test_training_starts_from_the_weights_of_another_run(trained, tmp_path, capsys, monkeypatch):
    best, seen = Path(trained.out_dir) / "best.pt", []
    monkeypatch.setattr(train, "make_optimizer", lambda model, tagger, *rest: seen.append(
        [{k: v.clone() for k, v in module.state_dict().items()} for module in (model, tagger)]) or 1 / 0)
    start = changed(trained, out_dir=str(tmp_path / "out"), init_from=str(best), seed=5)
    with pytest.raises(ZeroDivisionError):
        train.train(start)
    state = train.load_checkpoint(best)
    for mine, saved in zip(seen[0], (state["model"], state["tagger"])):
        assert train.checksum(mine) == train.checksum(dict(saved))
    assert f"starting from {best}, trained for 2 updates on drawn scenes" in capsys.readouterr().out
    with pytest.raises(UserError, match="another architecture.* trained with --vision_ffn_dim=64"):
        train.train(changed(start, vision_ffn_dim=96))
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(dict(a=torch.zeros(2)), tmp_path / "foreign.pt")
    torch.save([1], tmp_path / "list.pt")
    train.save_checkpoint(tmp_path / "words.pt", dict(state, words=state["words"][:-1] + ["other"]))
    for name, says in (("absent.pt", "no file .*absent.pt to start from"), ("text.pt", "cannot read .*text.pt"),
                       ("foreign.pt", "neither a checkpoint .* nor a SigLIP"), ("list.pt", "neither a checkpoint"),
                       ("words.pt", "speaks another vocabulary")):
        with pytest.raises(UserError, match=says) as error:
            train.train(changed(start, init_from=str(tmp_path / name)))
        assert "\n" not in str(error.value)


def test_positions_follow_another_picture_size():
    side, weights = torch.arange(4.0), dict(p=torch.zeros(16, 2))
    weights["p"][:, 0], weights["p"][:, 1] = side.repeat(4), side.repeat_interleave(4)       # column and row
    train.resize_positions(weights, "p", 64)
    grid = weights["p"].view(8, 8, 2)
    assert (grid[0, 1:, 0] >= grid[0, :-1, 0]).all() and torch.equal(grid[0, :, 0], grid[7, :, 0])
    assert torch.equal(grid[..., 1], grid[..., 0].T) and grid.max() == 3 and grid.min() == 0
    train.resize_positions(weights, "p", 16)
    close(weights["p"][:, 0], torch.tensor([0.0, 1, 2, 3]).repeat(4), 0.3)
    train.resize_positions(weights, "absent", 16)


def test_a_lora_run_leaves_the_weights_learns_resumes_and_exports(trained, tmp_path):
    best, file = tmp_path / "start.pt", tmp_path / "tuned.pt"
    shutil.copy(Path(trained.out_dir) / "best.pt", best)
    cfg = changed(trained, out_dir=str(tmp_path / "out"), init_from=str(best), lora_rank=2, max_steps=4, eval_every=2,
                  freeze_vision_steps=2, warmup_steps=0)
    train.train(cfg)
    base, last = train.load_checkpoint(best)["model"], train.load_checkpoint(tmp_path / "out" / "last.pt")["model"]
    kept = {name.replace(".layer.", "."): tensor for name, tensor in last.items()
            if ".reduce." not in name and ".expand." not in name}
    assert train.checksum(kept) == train.checksum({name: base[name] for name in kept}) and set(kept) == set(base)
    assert all(tensor.abs().sum() > 0 for name, tensor in last.items() if ".expand." in name)
    whole = train.checksum(last)
    half = changed(cfg, out_dir=str(tmp_path / "half"))
    train.train(changed(half, max_steps=2, schedule="constant"))
    train.train(changed(cfg, out_dir=str(tmp_path / "other"), schedule="constant"))
    best.unlink()                                           # what a run started from is not needed to go on
    train.train(changed(half, resume=True, schedule="constant"))
    resumed, straight = (train.load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("half", "other"))
    assert train.checksum(resumed) == train.checksum(straight) != whole
    train.train(changed(cfg, export=str(file)))
    assert train.load_checkpoint(file)["config"]["lora_rank"] == 0
    model, *_ = train.load_model(changed(DEFAULTS, device="cpu", checkpoint=str(file)))
    tuned, *_ = train.load_model(changed(DEFAULTS, device="cpu", checkpoint=str(tmp_path / "out" / "best.pt")))
    assert train.checksum(model.state_dict()) == train.checksum(tuned.state_dict())
    assert set(model.state_dict()) == set(base)
    with pytest.raises(UserError, match="lora_rank=2 .* --init_from=FILE"):
        config.check(changed(cfg, init_from=""))


def siglip_checkpoint(prefix="vision_model.", layers=2, **sizes):
    """The tensors of an HF SigLIP vision model of 32 dimensions and patches of 8 pixels, with random values."""
    generator, D = torch.Generator().manual_seed(0), 32
    shapes = {"embeddings.patch_embedding.weight": (D, 3, 8, 8), "embeddings.position_embedding.weight": (16, D),
              "embeddings.patch_embedding.bias": (D,), "post_layernorm.weight": (D,), "post_layernorm.bias": (D,)}
    for i in range(layers):
        for name, shape in [*((f"self_attn.{p}_proj", (D, D)) for p in ("q", "k", "v", "out")), ("mlp.fc1", (64, D)),
                            ("mlp.fc2", (D, 64)), ("layer_norm1", (D,)), ("layer_norm2", (D,))]:
            shapes[f"encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"encoder.layers.{i}.{name}.bias"] = shape[:1]
    weights = {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3, 3), "logit_scale": torch.zeros(1)}


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["vision_model.", "", "model.vision_tower.vision_model."])
def test_a_siglip_checkpoint_starts_the_vision_encoder(tmp_path, prefix):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    path, data = tmp_path / "siglip.pt", SimpleNamespace(mean=mean, std=std, tokenizer=None)
    weights = siglip_checkpoint(prefix)
    torch.save(weights, path)
    model = tiny(stem="patch", init_from=str(path))
    said = train.start_from(model.cfg, model, None, data)
    assert said == f"the vision encoder starts from {path}: 2 of its 2 blocks"
    vision, theirs = model.vision, {k.removeprefix(prefix): v for k, v in weights.items()}
    assert torch.equal(vision.positions, theirs["embeddings.position_embedding.weight"])
    for i, block in enumerate(vision.blocks):
        for mine, their in ((block.norm1, "layer_norm1"), (block.norm2, "layer_norm2"), (block.up, "mlp.fc1"),
                            (block.down, "mlp.fc2"), (block.attn.q, "self_attn.q_proj"),
                            (block.attn.out, "self_attn.out_proj")):
            for kind in ("weight", "bias"):
                assert torch.equal(getattr(mine, kind), theirs[f"encoder.layers.{i}.{their}.{kind}"])
        assert torch.equal(block.attn.kv.weight, torch.cat([theirs[f"encoder.layers.{i}.self_attn.{p}_proj.weight"]
                                                            for p in "kv"]))
    assert torch.equal(vision.norm.bias, theirs["post_layernorm.bias"])
    pixels = torch.rand(2, 3, 32, 32)                        # in [0, 1]; SigLIP wants 2 u - 1
    ours = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    weight, bias = (theirs[f"embeddings.patch_embedding.{kind}"] for kind in ("weight", "bias"))
    patches = F.conv2d(2 * pixels - 1, weight, bias, stride=8)
    close(vision.stem(ours), patches, 1e-4)


@torch.no_grad()
def test_what_fits_of_a_siglip_checkpoint_is_taken_and_the_rest_named(tmp_path, monkeypatch):
    path, data = tmp_path / "siglip.pt", SimpleNamespace(mean=[0.5] * 3, std=[0.5] * 3)
    torch.save(siglip_checkpoint(), path)
    model = tiny(stem="patch", vision_layers=1, init_from=str(path), image_size=64)
    assert "1 of its 2 blocks" in train.start_from(model.cfg, model, None, data) and len(model.vision.positions) == 64
    model = tiny(stem="patch", vision_ffn_dim=48, init_from=str(path))
    before = {k: v.clone() for k, v in model.vision.state_dict().items()}
    assert "patch embedding" in train.start_from(model.cfg, model, None, data)
    assert {k for k, v in model.vision.state_dict().items() if not torch.equal(v, before[k])} == {
        "stem.weight", "stem.bias"}
    monkeypatch.setitem(train.SIGLIP_HEADS, 32, 4)           # other heads of as many dimensions fit, but mean nothing
    model = tiny(stem="patch", init_from=str(path))
    assert "alone" in (said := train.start_from(model.cfg, model, None, data)) and "--vision_heads=4" in said
    monkeypatch.undo()
    model = tiny(init_from=str(path))
    with pytest.raises(UserError, match="--stem=patch --patch_size=8 --vision_dim=32, all of it with "
                                        "--vision_layers=2 --vision_heads=2 --vision_ffn_dim=64"):
        train.start_from(model.cfg, model, None, data)
    with pytest.raises(UserError, match="has no decoder"):
        train.start_from(changed(model.cfg, lora_rank=4), model, None, data)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="safetensors"):      # not there, or not to be read
        train.start_from(changed(model.cfg, init_from=str(tmp_path / "model.safetensors")), model, None, data)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_keeps_the_batch(tmp_path, monkeypatch):
    models, loss = [], train.token_loss
    cfg = made_up(tmp_path, eval_every=2, max_steps=6, grad_accum=2)
    out = Path(cfg.out_dir)

    def spoiled(logits, targets, cfg):                                     # after the validation of step 2
        return loss(logits, targets, cfg) * (float("nan") if (out / "last.pt").exists() else 1.0)
    monkeypatch.setattr(train, "token_loss", spoiled)
    with pytest.raises(UserError, match="loss is nan.*step 2.*nothing was updated.*bad_batch.pt"):
        train.train(cfg, lambda *args: models.append(VLM(*args)) or models[-1])
    state, bad = train.load_checkpoint(out / "last.pt"), torch.load(out / "bad_batch.pt", weights_only=True)
    assert state["step"] == bad["step"] == 2 and bad["position"] == 2 * 2 * 4 and math.isnan(bad["loss"])
    for name, p in models[0].named_parameters():
        assert torch.equal(p.detach(), state["model"][name]), name
    data = train.Data(cfg, prepare.load_meta(cfg), "train")
    for micro, position in zip(bad["micro_batches"], (16, 20), strict=True):
        assert train.checksum(micro) == train.checksum(vars(data.batch(position, 4)))


def test_early_stopping_stops_when_nothing_improves(drawn, tmp_path, capsys):
    still = dict(lr=1e-30, lr_vision=1e-30, lr_projection=1e-30, weight_decay=0.0)
    result = train.train(small_run(drawn, tmp_path, max_steps=12, eval_every=1, early_stopping=2, **still))
    assert result["steps"] == 3 and "stopping" in capsys.readouterr().out


def test_prefetching_keeps_order_and_passes_errors_on():
    assert list(train.prefetched(lambda i: i * i, 3, 9, 2)) == [9, 16, 25, 36, 49, 64]
    with pytest.raises(ZeroDivisionError):
        list(train.prefetched(lambda i: 1 / (i - 2), 0, 5, 2))


# ---- evaluation: statistics ----

def resampled(picture, resamples):
    """Rows of items, repeated as the bootstrap draws their pictures: one index array a resample."""
    pictures, unit = np.unique(picture, return_inverse=True)
    for times in evaluate.resamples_of(len(pictures), resamples):
        yield np.repeat(np.arange(len(unit)), times[unit].astype(int))


def span_of(draws):
    return pytest.approx(np.percentile(list(draws), (2.5, 97.5)))


def limits(row):
    return [row["low"], row["high"]]


def simulated(rng, pictures=150, each=4):
    """Truths, pictures and the chance of a right answer, which differs between pictures: 82.5% on the whole."""
    chance = np.repeat(rng.choice((0.7, 0.95), pictures), each)
    return np.arange(pictures * each) % 2 == 1, np.repeat(np.arange(pictures), each), chance


def test_resamples_draw_as_many_pictures_as_there_are():
    drawn_times = evaluate.resamples_of(50, 2000)
    assert drawn_times.shape == (2000, 50) and (drawn_times.sum(1) == 50).all()
    assert np.allclose(drawn_times.mean(0), 1, atol=0.15) and drawn_times.var() == pytest.approx(1 - 1 / 50, abs=0.02)


def test_balanced_accuracy_rows_by_hand():
    """Two YES of three right, one NO of two right: (2/3 + 1/2) / 2; one picture only leaves nothing to vary."""
    row = evaluate.accuracy_row([1, 1, 1, 0, 0], [1, 1, 0, 0, 1], [0] * 5, 200)
    assert row["n"] == 5 and row["value"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert row["low"] == pytest.approx(row["value"]) == row["high"]
    for truth in ([1, 1], [0, 0], []):                     # not defined without both answers
        nothing = dict(n=len(truth), value=None, low=None, high=None)
        assert evaluate.accuracy_row(truth, truth, range(len(truth)), 200) == nothing
    for nothing in (evaluate.mean_row([], [], 50), evaluate.median_row(np.zeros(0), np.zeros(0), 50)):
        assert nothing == dict(n=0, value=None, low=None, high=None)
    assert evaluate.mean_row([3, 4, 4], [True, False, False], 50)["value"] == pytest.approx(100 / 3)
    assert evaluate.mean_row([3, 4], [1.5, 2.5], 50, 1)["value"] == 2


def test_rows_equal_resampling_picture_by_picture():
    rng = np.random.default_rng(0)
    truth, picture, chance = simulated(rng, 31, 5)
    a, b = (np.where(rng.random(155) < chance, truth, ~truth) for _ in range(2))
    own = lambda said, i: 100 * train.balanced_accuracy(truth[i], np.where(said[i], 1, -1))         # noqa: E731
    every = np.arange(155)
    row = evaluate.accuracy_row(truth, a, picture, 200)
    assert row["value"] == pytest.approx(own(a, every)) and row["n"] == 155
    assert limits(row) == span_of(own(a, i) for i in resampled(picture, 200))
    row = evaluate.difference_row(truth, a, b, picture, 200)
    assert row["value"] == pytest.approx(own(b, every) - own(a, every))
    assert limits(row) == span_of(own(b, i) - own(a, i) for i in resampled(picture, 200))
    other = rng.permutation(155)[:60]                      # another set of the same pictures, drawn with them
    row = evaluate.drop_row((truth, a, picture), (truth[other], b[other], picture[other]), 200)
    drops = []
    for times in evaluate.resamples_of(31, 200).astype(int):
        first, second = np.repeat(every, times[picture]), np.repeat(other, times[picture[other]])
        drops.append(own(a, first) - own(b, second))
    assert row["value"] == pytest.approx(own(a, every) - own(b, other)) and limits(row) == span_of(drops)
    values = rng.exponential(size=155)                     # 31 x 5 values: every resample has one in the middle
    row = evaluate.median_row(picture, values, 200)
    assert row["value"] == np.median(values) and limits(row) == span_of(
        np.median(values[i]) for i in resampled(picture, 200))
    row = evaluate.mean_row(picture, values, 200)
    assert limits(row) == span_of(100 * values[i].mean() for i in resampled(picture, 200))
    x, y = rng.random((2, 155)) ** 3
    y += 0.3 * x
    ranks = [[sum(other < v for other in all_of) for v in all_of] for all_of in (x, y)]
    row = evaluate.correlation_row(picture, x, y, 200)
    assert row["value"] == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert limits(row) == span_of(np.corrcoef(np.array(ranks)[:, i])[0, 1] for i in resampled(picture, 200))
    assert evaluate.correlation_row(picture, x, np.exp(5 * x), 50)["value"] == pytest.approx(1)
    assert evaluate.correlation_row(picture, x, -x, 50)["value"] == pytest.approx(-1)


def test_intervals_cover_the_truth_in_95_of_100_sets():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        truth, picture, chance = simulated(rng)
        row = evaluate.accuracy_row(truth, np.where(rng.random(600) < chance, truth, ~truth), picture, 1000)
        covered += row["low"] <= 82.5 <= row["high"]
    assert 940 <= covered <= 960


def test_items_that_go_together_in_a_picture_widen_the_interval():
    rng, widths = np.random.default_rng(0), []
    truth, alike = np.arange(400) % 2, np.repeat(rng.integers(0, 2, 40), 10)     # ten of a picture are alike
    for picture in (np.repeat(np.arange(40), 10), np.arange(400)):
        row = evaluate.accuracy_row(truth, np.where(alike, truth, 1 - truth), picture, 500)
        widths.append(row["high"] - row["low"])
    assert widths[0] > 2 * widths[1]


def test_two_equally_good_models_differ_in_5_of_100_comparisons():
    rng, found = np.random.default_rng(2), Counter()
    truth, picture = np.arange(400) % 2 == 1, np.arange(400)
    for _ in range(1000):
        hard = rng.choice((0.6, 0.95), 400)                # both find the same questions hard
        a, b = (np.where(rng.random(400) < hard, truth, ~truth) for _ in range(2))
        row = evaluate.difference_row(truth, a, b, picture, 1000)
        found["bootstrap"] += not row["low"] <= 0 <= row["high"]
        found["mcnemar"] += evaluate.mcnemar(a == truth, b == truth)[2] < 0.05
    assert 35 <= found["bootstrap"] <= 65 and 35 <= found["mcnemar"] <= 65, found


def test_a_real_difference_between_two_models_is_found():
    rng, found = np.random.default_rng(0), Counter()
    truth, picture = np.arange(600) % 2 == 1, np.arange(600) // 2
    for _ in range(50):
        a, b = (np.where(rng.random(600) < right, truth, ~truth) for right in (0.8, 0.9))
        row = evaluate.difference_row(truth, a, b, picture, 300)
        found["bootstrap"] += row["low"] > 0
        found["mcnemar"] += evaluate.mcnemar(a == truth, b == truth)[2] < 0.01
    assert min(found["bootstrap"], found["mcnemar"]) >= 45, found


@pytest.mark.parametrize("only_a, only_b, p", [
    (1, 5, (2 * (1 + 6) - 6) / 64), (5, 1, 8 / 64), (0, 4, 1 / 16), (3, 3, 1.0), (0, 0, 1.0), (1, 0, 0.5)])
def test_mcnemar_by_hand(only_a, only_b, p):
    """Mid-p: twice the tail of the fair coin, less the chance of just this table."""
    a = [1] * only_a + [0] * only_b + [1, 1, 0]
    b = [0] * only_a + [1] * only_b + [1, 1, 0]
    assert evaluate.mcnemar(a, b) == (only_a, only_b, pytest.approx(p))


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 is raised to the one before it; nothing exceeds 1."""
    assert evaluate.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluate.holm([0.9, 0.6, 0.01]) == pytest.approx([1, 1, 0.03]) and evaluate.holm([]) == []
    p = np.random.default_rng(0).random(30) ** 3
    adjusted = np.array(evaluate.holm(p))
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all() and (adjusted >= p).all()


def test_sign_flip_test_is_exact():
    assert evaluate.sign_flip_test([0.1, 2, 3, 0.4, 5, 6]) == 2 / 64 == evaluate.sign_flip_test([-1] * 6)
    assert evaluate.sign_flip_test([1, -1]) == evaluate.sign_flip_test([7]) == evaluate.sign_flip_test([0, 0]) == 1
    d = np.random.default_rng(1).normal(0.5, 1, 7)
    flipped = [abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-9 for signs in itertools.product((1, -1), repeat=7)]
    assert evaluate.sign_flip_test(d) == np.mean(flipped)
    assert evaluate.sign_flip_test([1] * 20) == 2 / 2 ** 20
    for count in (0, 21):
        with pytest.raises(ValueError, match=f"1 to 20 differences, not {count}"):
            evaluate.sign_flip_test([1.0] * count)


@pytest.mark.parametrize("df, t, p", [(1, 12.706, 0.05), (2, 4.303, 0.05), (5, 2.571, 0.05), (5, 4.032, 0.01),
                                      (5, 0.727, 0.5), (10, 2.228, 0.05), (29, 2.045, 0.05), (9, 0.0, 1.0)])
def test_t_test_agrees_with_the_table(df, t, p):
    """Differences with the table's t; the 95% interval reaches from the mean to the table's t for 0.05."""
    critical = {1: 12.706, 2: 4.303, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045}[df]
    spread = np.random.default_rng(df).normal(size=df + 1)
    spread = (spread - spread.mean()) / spread.std(ddof=1) * math.sqrt(df + 1)                # standard error 1
    for sign in (1, -1):
        mean, low, high, found = evaluate.t_test(spread + sign * t)
        assert mean == pytest.approx(sign * t, abs=1e-9) and found == pytest.approx(p, abs=1e-3)
        assert (low, high) == pytest.approx((mean - critical, mean + critical), abs=2e-3)


# ---- evaluation: texts ----

def test_bleu_by_hand():
    same = "a car is near on the left"
    assert evaluate.bleu4([(same, same), ("no bus is in view", "no bus is in view")]) == pytest.approx(100)
    short = [("a car is near on", "a car is near on the left")]            # all it says is right, but 5 of 7 words
    assert evaluate.bleu4(short) == pytest.approx(100 * math.exp(1 - 7 / 5))
    long = [("a car is near on the left", "a car is near on")]             # 5/7, 4/6, 3/5, 2/4; length costs nothing
    assert evaluate.bleu4(long) == pytest.approx(100 * (5 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)
    twice = ("a a b c d e", "a b c d e f")                                 # the second a is not counted again
    assert evaluate.bleu4([twice]) == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    other = ("a b c d e f", "a b c d e f")                                 # counts of all texts together
    assert evaluate.bleu4([twice, other]) == pytest.approx(100 * (11 / 12 * 9 / 10 * 7 / 8 * 5 / 6) ** 0.25)
    assert evaluate.bleu4([("", "a b c d")]) == evaluate.bleu4([("a b c", "a b c")]) == evaluate.bleu4([]) == 0


def test_rouge_is_the_longest_common_subsequence():
    def longest(a, b):
        if not a or not b:
            return 0
        return 1 + longest(a[1:], b[1:]) if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))
    assert evaluate.rouge_l("a b c d", "a c d e f") == pytest.approx(2 * 3 / 9)
    assert evaluate.rouge_l("x y", "x y") == evaluate.rouge_l("", "") == 1 and evaluate.rouge_l("x", "y") == 0
    assert evaluate.rouge_l("", "x") == 0
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.choice("abc") for _ in range(rng.randrange(1, 8))] for _ in range(2))
        assert evaluate.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * longest(a, b) / (len(a) + len(b)))


# ---- evaluation: calibration ----

def test_calibration_error_by_hand():
    p, truth = np.array([0.0, 0.0, 1.0, 1.0]), np.array([False, True, True, True])
    assert evaluate.calibration_bins(p, truth) == [(2, 0, 0.5), (2, 1, 1)] and evaluate.ece(p, truth) == 25
    assert evaluate.ece(np.array([0.0, 1.0]), np.array([True, False])) == 100
    alike = np.full(8, 0.75)
    assert evaluate.ece(alike, np.arange(8) < 6) == 0 and evaluate.ece(alike, np.arange(8) < 2) == pytest.approx(50)
    p, truth = np.array([0.9, 0.1, 0.2, 0.8, 0.3, 0.7]), np.array([1, 0, 1, 1, 0, 0]) == 1
    halves = evaluate.calibration_bins(p, truth, 2)
    assert halves == [(3, pytest.approx(0.2), pytest.approx(1 / 3)), (3, pytest.approx(0.8), pytest.approx(2 / 3))]
    assert evaluate.ece(p, truth, 2) == pytest.approx(100 * (1 / 3 - 0.2 + 0.8 - 2 / 3) / 2)
    crowded = np.array([0.01, 0.02, 0.03, 0.04, 0.9, 0.92])                # equal mass: 2 each, whatever lies between
    bins = evaluate.calibration_bins(crowded, truth, 3, equal_mass=True)
    assert [n for n, _, _ in bins] == [2, 2, 2] and bins[1] == (2, pytest.approx(0.035), 1)
    assert [n for n, _, _ in evaluate.calibration_bins(crowded, truth, 3)] == [4, 2], "the bin between is empty"
    assert [n for n, _, _ in evaluate.calibration_bins(crowded, truth, 15, True)] == [1] * 6
    found = evaluate.calibration(np.array([0.0, np.log(3), 800]), np.array([True, False, True]))
    assert found["n"] == 3 and found["brier"] == pytest.approx((0.25 + 0.5625) / 3)


def test_a_calibrated_model_measures_the_floor_and_an_overconfident_one_more():
    rng, ratios = np.random.default_rng(0), {"ece": [], "ece_equal_mass": []}
    for _ in range(8):
        odds = rng.normal(0, 2.5, 600)
        truth = rng.random(600) < 1 / (1 + np.exp(-odds))
        fair, bold = evaluate.calibration(odds, truth), evaluate.calibration(3 * odds, truth)
        for name, found in ratios.items():
            found.append(fair[name]["value"] / fair[name]["calibrated"])
            assert bold[name]["value"] > bold[name]["calibrated_high"] > bold[name]["calibrated"]
    assert all(0.85 < np.mean(found) < 1.15 for found in ratios.values()), ratios


def test_the_temperature_of_simulated_odds_is_found():
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, 20000)
    truth = rng.random(20000) < 1 / (1 + np.exp(-true))
    for temperature in (2.0, 1.0, 0.5):
        assert evaluate.fit_temperature(temperature * true, truth) == pytest.approx(temperature, rel=0.04)
    assert evaluate.fit_temperature(np.array([5.0, -5.0]), np.array([True, False])) == pytest.approx(math.exp(-3))
    true, truth = true[:2000], truth[:2000]
    scaled = evaluate.calibration(true, truth)["ece"]
    assert scaled["value"] < scaled["calibrated_high"] < evaluate.calibration(2 * true, truth)["ece"]["value"]


# ---- evaluation: where maps point ----

def test_the_share_of_each_patch_that_boxes_cover():
    def covered(*edges):
        labels = [dict(box2d=dict(zip(("x1", "y1", "x2", "y2"), e))) for e in edges]
        return {i: v for i, v in enumerate(evaluate.cover(labels, 32, 4).tolist()) if v}     # 4 x 4 patches of 8 pixels
    assert covered((8, 8, 16, 16)) == {5: 1} == covered((8, 8, 16, 16), (9, 9, 12, 12))
    assert covered((4, 2, 12, 6), (8, 0, 16, 8)) == {0: 0.25, 1: 1}
    assert covered((-5, 4, 12, 8)) == {0: 0.5, 1: 0.25} and covered((-9, -9, 99, 99)) == dict.fromkeys(range(16), 1)
    assert covered((20.5, 24.2, 23.5, 40)) == {14: 0.5}, "a pixel counts when the box touches it"


def test_maps_that_are_the_box_that_are_even_and_that_tie():
    covers = np.zeros((4, 16))
    covers[0, [5, 6]], covers[1, 3], covers[2, [0, 1, 4, 5]], covers[3, :8] = 1, 1, 1, 1
    area = covers.mean(1)
    perfect = covers / covers.sum(1, keepdims=True)
    assert (evaluate.pointing(perfect, covers) == 1).all() and np.allclose(evaluate.mass_in_box(perfect, covers), 1)
    assert np.allclose(evaluate.enrichment(perfect, covers), 1 / area)
    assert all((evaluate.box_iou(perfect, covers, t) == 1).all() for t in (0.05, 0.5, 1))
    even, part = np.full((4, 16), 1 / 16), covers * np.array([0.5, 0.25, 1, 1])[:, None]
    for c in (covers, part):
        assert np.allclose(evaluate.pointing(even, c), area), "chance is the share of patches that the box touches"
        assert np.allclose(evaluate.mass_in_box(even, c), c.mean(1)) and np.allclose(evaluate.enrichment(even, c), 1)
        assert np.allclose(evaluate.box_iou(even, c, 0.5), c.mean(1))
    one, box_of = np.zeros((1, 16)), np.zeros((1, 16))
    one[0, [5, 9, 10]], box_of[0, 5], box_of[0, 6] = (0.4, 0.4, 0.2), 1, 0.5
    assert evaluate.pointing(one, box_of) == 0.5, "one of two largest patches"
    assert evaluate.mass_in_box(one, box_of) == pytest.approx(0.4)
    assert evaluate.enrichment(one, box_of) == pytest.approx(0.4 / (1.5 / 16))
    assert evaluate.box_iou(one, box_of, 0.5) == pytest.approx(1 / (3 + 1.5 - 1))
    assert evaluate.box_iou(one, box_of, 0.6) == pytest.approx(1 / (2 + 1.5 - 1))


def look_of(*entries, layers=1, heads=1):
    """A Look of (question, category, patches of the box, map), each map given to all layers and heads."""
    if not entries:                                        # as `looks` gives it
        return evaluate.Look(np.zeros(0, int), *np.zeros((3, 0)))
    covers = np.zeros((len(entries), 16))
    for row, entry in zip(covers, entries):
        row[list(entry[2])] = 1
    maps = np.array([entry[3] for entry in entries], float)[:, None, None]
    return evaluate.Look(np.array([e[0] for e in entries], int), np.array([e[1] for e in entries]),
                         np.broadcast_to(maps, (len(entries), layers, heads, 16)), covers)


def one_hot(*patches, size=16):
    found = np.zeros(size)
    found[list(patches)] = 1 / len(patches)
    return found


def test_rivals_of_a_map_are_of_another_command_and_of_another_picture():
    maps = [one_hot(k) for k in (1, 2, 3, 4, 5)]
    look = look_of((0, "car", [1], maps[0]), (1, "bus", [2], maps[1]), (2, "car", [3], maps[2]),
                   (3, "car", [4], maps[3]), (4, "truck", [5], maps[4]), layers=2, heads=2)
    picture, even = np.array([10, 10, 10, 11, 12]), np.ones(16)
    untrained = look._replace(maps=np.broadcast_to(one_hot(9), look.maps.shape))
    found = evaluate.baseline_maps(look, picture, 4, untrained)
    assert np.array_equal(found["another command's map"], [maps[1], maps[2], maps[1], even, even])
    assert np.array_equal(found["another picture's map"], [maps[3], even, maps[3], maps[0], even])
    assert (found["untrained weights"] == one_hot(9)).all() and (found["chance (any patch)"] == 1).all()
    centre = found["centre of the picture"].reshape(5, 4, 4)
    assert np.array_equal(centre, centre[:, ::-1]) and np.array_equal(centre, centre.transpose(0, 2, 1))
    assert set(np.flatnonzero(centre[0] == centre.max())) == {5, 6, 9, 10}


def test_grounding_sets_the_model_beside_its_best_baseline():
    """Maps are averaged over layers and heads; the threshold is fitted on another set."""
    look = look_of((0, "car", [1, 2], one_hot(1)), (1, "bus", [6], one_hot(6)), (2, "car", [1], one_hot(1)),
                   (3, "bus", [15], one_hot(3)), layers=2, heads=2)
    maps = np.stack([np.broadcast_to(one_hot(0), (4, 2, 16)), 3 * look.maps[:, 1]], 1) / 2  # layer 0 always looks away
    look = look._replace(maps=maps)
    untrained = look._replace(maps=np.broadcast_to(one_hot(0), look.maps.shape))
    found = evaluate.grounding(look, np.arange(4), untrained, look, 100, 4)
    value = {name: {k: row["value"] for k, row in rows.items()} for name, rows in found["scores"].items()}
    assert value["model"]["pointing"] == 75 and value["model"]["mass_in_box"] == pytest.approx(75 * 0.75)
    assert value["model"]["enrichment"] == pytest.approx(12 * 0.75)
    assert value["model"]["iou"] == pytest.approx(100 * 2.5 / 4) and found["threshold"] > 1 / 3
    assert value["another picture's map"]["pointing"] == 50 and value["untrained weights"]["pointing"] == 0
    assert value["chance (any patch)"] == dict(
        pointing=pytest.approx(100 * 5 / 64), mass_in_box=pytest.approx(100 * 5 / 64), enrichment=pytest.approx(1),
        iou=pytest.approx(100 * 5 / 64))
    assert found["best_baseline"] == "another picture's map" and found["pointing_ahead"]["value"] == 25
    assert {c: row["value"] for c, row in found["pointing_by_category"].items()} == dict(bus=50, car=100)
    assert evaluate.grounding(look, np.arange(4), untrained, look_of(), 100, 4)["threshold"] == 0.5
    assert evaluate.grounding(look_of(), np.arange(4), look_of(), look, 100, 4) == dict(n=0)


def test_the_threshold_that_fits_best_is_found():
    maps, covers = np.full((1, 16), 0.5), one_hot(5, 6)[None] * 2
    maps[0, [5, 6]] = 1, 0.6
    assert evaluate.best_threshold(maps, covers) in (0.55, 0.6)
    for level in (0.25, 0.85):
        maps[0, 6], maps[0, 9] = level + 0.02, level - 0.03
        maps[0, [i for i in range(16) if i not in (5, 6, 9)]] = 0
        assert evaluate.best_threshold(maps, covers) == level


def stub(**parts):
    """A subject that answers as a test wants: of the tiny pictures, with four by four patches."""
    cfg = changed(DEFAULTS, image_size=32, patch_size=8, bootstrap=50, workers=1)
    return SimpleNamespace(**{**dict(cfg=cfg, state=dict(mean=[0.5, 0.5, 0.5]), device=torch.device("cpu"),
                                     dtype=torch.float32, tokenizer=Tokenizer(commands.vocabulary())), **parts})


def test_deletion_and_insertion_follow_the_map():
    """p(YES) hangs on patch 6 alone. With a map that looks there it falls, or rises, at the first of 16 patches."""
    def ask_of(jobs):
        for image, prompts in jobs:
            seen = (image[8:16, 16:24] != 128).any()
            assert image.shape == (32, 32, 3) and len(prompts) == 1
            yield np.array([4.0 if seen else -4.0])
    subject, high, low = stub(ask=ask_of), 100 / (1 + math.exp(-4)), 100 / (1 + math.exp(4))
    asked = SimpleNamespace(picture=np.arange(9), prompts=[[1]] * 9,
                            data=SimpleNamespace(images=np.full((9, 32, 32, 3), 200, np.uint8)))
    odds = np.full(9, 4.0)
    odds[8] = -1                                           # a wrong answer is no use
    for first, map_of in ((True, one_hot(6)), (False, np.where(np.arange(16) == 6, 0, 1 / 15))):
        look = look_of(*((i, "car", [6], map_of) for i in range(9)))
        found = evaluate.deletion_insertion(subject, asked, look, odds, 30)
        assert found["share_of_patches"] == [0, 1 / 16, 2 / 16, 4 / 16, 8 / 16, 1]
        fall, rise = found["deletion"], found["insertion"]
        assert fall["attention"]["n"] == rise["difference"]["n"] == 8
        steps = (1, 5) if first else (5, 1)                # the patch that matters goes first, or last
        assert fall["curve"] == pytest.approx([high] * steps[0] + [low] * steps[1])
        assert rise["curve"] == pytest.approx([low] * steps[0] + [high] * steps[1])
        if first:
            assert fall["attention"]["value"] == pytest.approx((high + low) / 32 + low * 15 / 16)
            assert rise["attention"]["value"] == pytest.approx((high + low) / 32 + high * 15 / 16)
        better, worse = (fall, rise) if first else (rise, fall)
        assert better["difference"]["high"] < 0 < worse["difference"]["low"]
    assert fall["random"]["value"] == pytest.approx(100 - rise["random"]["value"])
    assert evaluate.deletion_insertion(subject, asked, look, odds, 3)["deletion"]["difference"]["n"] == 3
    nothing = evaluate.deletion_insertion(subject, asked, look, -odds - 5, 3)
    assert nothing["deletion"]["difference"] == dict(n=0, value=None, low=None, high=None)


# ---- evaluation: maps compared ----

def test_entropy_and_distances_of_maps():
    assert evaluate.entropy(np.full((2, 16), 1 / 16)) == pytest.approx([math.log(16)] * 2)
    assert evaluate.entropy(one_hot(3)) == 0 and evaluate.entropy(one_hot(3, 4)) == pytest.approx(math.log(2))
    maps = np.random.default_rng(0).dirichlet(np.ones(16), 3)
    same = evaluate.distances(maps, maps)
    assert np.allclose(same["cosine"], 1) and np.allclose(same["l2"], 0) and np.allclose(same["js"], 0)
    apart = evaluate.distances(one_hot(1)[None], one_hot(2)[None])
    assert (apart["cosine"], apart["l2"], apart["js"]) == (0, pytest.approx(math.sqrt(2)), pytest.approx(math.log(2)))
    a, b = maps[:2]
    found, middle = evaluate.distances(a[None], b[None]), (a + b) / 2
    assert found["js"][0] == pytest.approx(sum((x * np.log(x / middle)).sum() / 2 for x in (a, b)))
    assert found["l2"][0] == pytest.approx(np.linalg.norm(a - b))
    assert found["cosine"][0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ---- evaluation: heads ----

@torch.no_grad()
def test_what_the_heads_add_sums_to_the_output_of_every_attention():
    model, inputs = tiny(), {}
    for name, p in model.named_parameters():
        if name.endswith("out.bias"):
            torch.nn.init.normal_(p)
    layers = {(kind, i): m for kind, ms in evaluate.attentions(model).items() for i, m in enumerate(ms)}
    assert sorted(layers) == [(kind, i) for kind in ("cross", "self", "vision") for i in (0, 1)]
    assert {id(m) for m in layers.values()} == {id(m) for m in model.modules() if isinstance(m, Attention)}
    for key, module in layers.items():
        module.out.register_forward_hook(lambda _, x, y, key=key: inputs.update({key: (x[0], y)}))
    model(pictures(2), words(2, 3, 7))
    for key, module in layers.items():
        heads, output = inputs[key]
        parts = evaluate.head_contributions(module, heads)
        assert parts.shape == (2 if key[0] == "vision" else 4, *output.shape)
        bias = module.out.bias if module.out.bias is not None else 0
        close(parts.sum(0) + bias, output)
        assert min(part.norm() for part in parts) > 0.01


@torch.no_grad()
def test_a_head_can_be_taken_out_and_is_put_back():
    model, images, tokens = tiny(), pictures(2), words(2, 3, 7)
    for kind, modules in evaluate.attentions(model).items():
        module, d, seen = modules[1], modules[1].head_dim, []
        module.out.weight[:, :d] = 0                       # nobody hears head 0
        before = model(images, tokens)
        with evaluate.without_head(module, 0):
            close(model(images, tokens), before)
        with evaluate.without_head(module, 1):
            assert (model(images, tokens) - before).abs().max() > 1e-3, kind
        assert torch.equal(model(images, tokens), before)
        with contextlib.ExitStack() as stack:              # without any head only the bias is left
            for head in range(module.out.in_features // d):
                stack.enter_context(evaluate.without_head(module, head))
            handle = module.out.register_forward_hook(lambda _, x, y: seen.append(y))
            model(images, tokens)
            handle.remove()
        bias = torch.zeros(32) if module.out.bias is None else module.out.bias
        assert torch.equal(seen[0], bias.expand_as(seen[0]))
        with pytest.raises(RuntimeError), evaluate.without_head(module, 1):
            raise RuntimeError
        assert torch.equal(model(images, tokens), before), "put back after an error too"


def test_planted_clusters_are_found():
    points = np.array([[0.0], [1.0], [10.0], [11.0]])
    label = evaluate.k_means(points, 2)
    assert label[0] == label[1] != label[2] == label[3]
    by_hand = np.mean([(10.5 - 1) / 10.5, (9.5 - 1) / 9.5, (9.5 - 1) / 9.5, (10.5 - 1) / 10.5])
    assert evaluate.silhouette(points, label) == pytest.approx(by_hand)
    assert evaluate.silhouette(points, np.array([0, 1, 0, 1])) < 0
    assert evaluate.silhouette(points, np.zeros(4, int)) == 0
    assert evaluate.silhouette(points, np.array([0, 0, 0, 1])) == pytest.approx(np.mean(
        [(11 - 5.5) / 11, (10 - 5) / 10, (1 - 9.5) / 9.5, 0])), "one alone counts 0"
    rng = np.random.default_rng(0)
    for k in (3, 4, 5):
        truth = np.repeat(np.arange(k), 8)
        points = 5 * np.eye(k)[truth] + rng.normal(0, 0.3, (8 * k, k))
        label = evaluate.k_means(points, k)
        assert len({(t, c) for t, c in zip(truth, label)}) == k and evaluate.silhouette(points, label) > 0.7
        scores = {j: evaluate.silhouette(points, evaluate.k_means(points, j)) for j in range(2, 7)}
        assert max(scores, key=scores.get) == k


def test_heads_that_look_for_cars_are_said_to():
    """Head 0 of both layers looks only at cars, head 1 only at buses, head 2 at everything alike."""
    look = look_of(*((i, ("car", "bus")[i % 2], [(3 * i) % 16], one_hot(0)) for i in range(8)))
    maps = np.full((8, 2, 3, 16), 1 / 16)
    for i, (category, boxed) in enumerate(zip(look.category, look.cover)):
        maps[i, :, 0 if category == "car" else 1] = boxed
    found = evaluate.specialisation(look._replace(maps=maps))
    assert found["categories"] == ["bus", "car"]
    assert np.allclose(found["enrichment"], [[[1, 16], [16, 1], [1, 1]]] * 2)
    assert np.allclose(found["selectivity"], [[math.log(16) / 2, math.log(16) / 2, 0]] * 2)
    groups = {tuple(map(tuple, c["heads"])): c for c in found["clusters"]}
    assert set(groups) == {((0, 0), (1, 0)), ((0, 1), (1, 1)), ((0, 2), (1, 2))} and found["silhouette"] > 0.99
    cars, buses = groups[(0, 0), (1, 0)], groups[(0, 1), (1, 1)]
    assert (cars["looks_for"], buses["looks_for"]) == ("car", "bus")
    assert cars["enrichment"] == pytest.approx(16) and cars["mean"] == pytest.approx(17 / 2)
    assert evaluate.specialisation(look_of()) == dict(categories=[])


# ---- evaluation: asking the model ----

def save_untrained(cfg, meta, name="best.pt", known=None, **state):
    """A checkpoint with seeded random weights in cfg.out_dir; known: its words."""
    torch.manual_seed(cfg.seed)
    known = known or commands.vocabulary()
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    train.save_checkpoint(Path(cfg.out_dir) / name, dict(
        dict(format=train.FORMAT, model=VLM(cfg, len(Tokenizer(known))).state_dict(), config=vars(cfg), words=known,
             step=0, mean=meta["mean"], std=meta["std"], data_hash=meta["hash"]), **state))
    return cfg


@pytest.fixture(scope="module")
def subject(drawn, tmp_path_factory):
    """An untrained model of the drawn data, ready to be asked."""
    return evaluate.Subject(save_untrained(small_run(drawn, tmp_path_factory.mktemp("subject"), bootstrap=100,
                                                     eval_batch=7), drawn.meta))


@pytest.fixture(scope="module")
def tested(subject, drawn):
    return evaluate.Questions(subject, drawn.meta, "test")


def asked_of(scenes, *entries, cfg=DEFAULTS):
    """Questions by hand: scenes {picture: labels}; entries (picture, template, first, second, paraphrase)."""
    asked = evaluate.Questions.__new__(evaluate.Questions)
    asked.frames = {p: dict(name=f"{p}.png", labels=list(labels), attributes={}, complexity=0)
                    for p, labels in scenes.items()}
    asked.views = {p: View(frame, cfg) for p, frame in asked.frames.items()}
    asked.questions = [Question(*(*entry[1:], "", "")[:3]) for entry in entries]
    asked.items = [commands.make_item(entry[0], q, asked.views[entry[0]], random.Random(0), (*entry, *[0] * 4)[4] or 0)
                   for entry, q in zip(entries, asked.questions)]
    asked.prompts = [Tokenizer(commands.vocabulary()).prompt(item["command"]) for item in asked.items]
    asked.picture, asked.rows = np.array([entry[0] for entry in entries]), np.arange(len(entries))
    asked.truth = np.array([item["answer"] for item in asked.items])
    asked.data = SimpleNamespace(images={p: p for p in scenes}, index=np.stack([asked.picture] * 4, 1), name="test")
    return asked


def answering(rule):
    """A subject whose log-odds are rule(picture, command): the command without its question mark."""
    said = Tokenizer(commands.vocabulary())

    def ask_of(jobs):
        for picture, prompts in jobs:
            yield np.array([rule(picture, said.decode(ids)[:-2]) for ids in prompts], float)
    return stub(ask=ask_of, cfg=changed(DEFAULTS, bootstrap=50, workers=1))


def test_questions_are_those_of_the_set_and_are_asked_as_in_training(subject, tested, drawn):
    data = train.Data(drawn.cfg, drawn.meta, "test")
    rows, odds = train.predict(subject.model, data, subject.cfg, subject.device, torch.float32)
    assert np.array_equal(tested.rows, rows) and np.allclose(tested.odds(subject), odds, atol=1e-4)
    for row, item, prompt, truth, q in zip(tested.rows, tested.items, tested.prompts, tested.truth, tested.questions):
        assert item == drawn.items["test"][row] and truth == item["answer"] and q == question_of(item)
        assert prompt == data.tokenizer.prompt(item["command"])
        assert tested.frames[item["picture"]] == drawn.frames[item["picture"]]
    few = evaluate.Questions(subject, drawn.meta, "test", 100)
    assert 60 < len(few.rows) < 140 and set(few.rows) < set(tested.rows)
    assert all((tested.picture == p).sum() == (few.picture == p).sum() for p in few.picture), "whole pictures"
    some = tested.sample_pictures(100)
    assert 60 < len(some) < 140 and set(np.flatnonzero(np.isin(tested.picture, tested.picture[some]))) == set(some)
    assert np.array_equal(tested.sample_pictures(10 ** 6), np.arange(len(rows))) and (np.diff(some) > 0).all()
    said = evaluate.Questions(subject, drawn.meta, "test", verdicts=False)
    assert [i for i in drawn.items["test"] if i["answer"] is None] == said.items
    assert np.array_equal(tested.sample(10 ** 6, 0), np.arange(len(rows)))
    assert len(set(tested.sample(50, 0))) == 50 and not np.array_equal(tested.sample(50, 0), tested.sample(50, 1))


@torch.no_grad()
def test_maps_and_generated_texts_are_those_of_each_prompt_alone(subject, tested):
    chosen = np.arange(0, 60, 3)
    maps = list(subject.look(tested.jobs(chosen)))
    said = evaluate.generate(subject, tested.jobs(chosen))
    assert len(maps) == len(said) == len(chosen)
    for i, cross, (verdict, text) in list(zip(chosen, maps, said))[::4]:
        images = subject.images(tested.data.images[tested.picture[i]][None])
        prompt = torch.tensor([[tested.prompts[i]]])
        _, attn = subject.model(images, prompt, return_attn=True)
        assert cross.shape == (1, 2, prompt.shape[-1], 64)
        close(torch.from_numpy(cross), attn["cross"][:, 0])
        ids = subject.model.generate(images, prompt, 32)[0][0, 0].tolist()
        assert verdict is {tokenizer.YES: True, tokenizer.NO: False}.get(ids[0])
        assert text == subject.tokenizer.decode(ids if verdict is None else ids[1:])


def test_generated_answers_are_split_from_their_reasons(subject):
    """A model that says [NO], [YES] or neither."""
    said = {0: [tokenizer.NO, 30, 31, tokenizer.EOS], 1: [tokenizer.YES, 32, tokenizer.EOS, 0],
            2: [33, tokenizer.YES, tokenizer.EOS, 0]}
    model = SimpleNamespace(generate=lambda images, tokens, room: (torch.tensor(
        [[said[int(n)] for n in own] for own in (tokens != 0).sum(-1) - 1]), None))
    spoken = SimpleNamespace(**{**vars(subject), "model": model, "images": subject.images})
    image, word = np.zeros((SIZE, SIZE, 3), np.uint8), subject.tokenizer.words
    found = evaluate.generate(spoken, [(image, [[9], [9, 9]]), (image, [[9, 9, 9], [9]])])
    assert found == [(False, f"{word[30]} {word[31]}"), (True, word[32]), (None, f"{word[33]} [YES]"),
                     (False, f"{word[30]} {word[31]}")]


# ---- evaluation: accuracy and failures ----

def test_classification_by_hand():
    truth, said = np.array([1, 1, 1, 0, 0, 0, 0, 0]) == 1, np.array([1, 1, 0, 1, 0, 0, 0, 0]) == 1
    found = evaluate.classification(truth, said)
    assert found["confusion"] == dict(yes_said_yes=2, yes_said_no=1, no_said_yes=1, no_said_no=4)
    assert found["accuracy"] == 75
    assert found["yes"] == dict(precision=pytest.approx(200 / 3), recall=pytest.approx(200 / 3),
                                f1=pytest.approx(200 / 3))
    assert found["no"] == dict(precision=80, recall=80, f1=80)
    assert found["macro_f1"] == pytest.approx((80 + 200 / 3) / 2)
    always = evaluate.classification(truth, truth | True)
    assert always["no"] == dict(precision=0, recall=0, f1=0) and always["yes"]["recall"] == 100


def test_breakdowns_sum_to_all_questions(tested):
    odds = np.random.default_rng(0).normal(size=len(tested.rows))
    found, n = evaluate.broken_down(tested, odds, 20), len(tested.rows)
    assert tuple(found["family"]) == evaluate.FAMILIES
    for name, groups in found.items():
        total = sum(len(q.objects) for q in tested.questions) if name == "object" else n
        assert sum(row["n"] for row in groups.values()) == total, name
    first = {name: [g for g in groups if re.match(r"\d", g)] for name, groups in found.items()}
    assert first["words"] == sorted(first["words"], key=lambda g: int(g.split()[0])) and len(first["words"]) >= 3

    def check(name, group, member):
        mine = np.array([bool(member(i)) for i in range(n)])
        assert 0 < mine.sum() == found[name][group]["n"] and found[name][group]["value"] == pytest.approx(
            100 * train.balanced_accuracy(tested.truth[mine], odds[mine])), (name, group)
    at = lambda i: tested.frames[tested.picture[i]]                                                 # noqa: E731
    command = lambda i: tested.items[i]["command"]                                                  # noqa: E731
    check("words", "5 to 6", lambda i: len(tokenizer.split_words(command(i))) in (5, 6))
    check("object", "bus", lambda i: re.search(r"\bbus\b", command(i)))
    check("place", "left", lambda i: re.search(r"\bleft\b", command(i)))
    check("template", "light", lambda i: tested.items[i]["template"] == "light")
    check("level", "complex", lambda i: tested.items[i]["level"] == "complex")
    check("objects seen in the scene", "3 to 4", lambda i: at(i)["complexity"] in (3, 4))
    check("scene", "highway", lambda i: at(i)["attributes"]["scene"] == "highway")
    check("objects of the asked kind", "none asked", lambda i: tested.items[i]["template"] in (
        "straight", "stop", "turn", "change", "clear"))
    check("objects of the asked kind", "1", lambda i: tested.questions[i].objects and sum(
        lab["category"] in tested.questions[i].objects for lab in at(i)["labels"]) == 1)


@pytest.mark.parametrize("question, labels, found", [
    (("exists", "car"), [CAR_LEFT], []), (("exists_at", "car", "left"), [], ["exists car"]),
    (("near", "bus"), [BUS_AHEAD], ["exists bus"]), (("light", "red"), [lamp("red")], ["exists traffic light"]),
    (("and", "car", "bus"), [CAR_LEFT], ["exists car", "exists bus"]),
    (("and_no", "car", "red light"), [lamp("green")], ["exists car", "light red"]),
    (("or", "car", "bus"), [box("car", width=5)], ["exists bus"]),           # a car that is uncertain is no part
    (("change", "left"), [], ["clear left"]), (("straight",), [], ["clear ahead", "light red", "light yellow",
                                                                   "light green"]),
    (("turn", "right"), [lamp("red"), lamp("green")], ["clear ahead", "clear right"]),
    (("clear", "left"), [], [f"exists_at {c} left" for c in commands.ROAD_USERS])])
def test_a_question_is_made_of_simpler_certain_ones(question, labels, found):
    whole = Question(*(*question, "", "")[:3])
    assert [" ".join(filter(None, q)) for q in evaluate.parts(whole, view_of(*labels))] == found


def test_the_parts_of_a_pair_decide_it(drawn):
    for view in drawn.views[:20]:
        for question in QUESTIONS:
            pieces = evaluate.parts(question, view)
            assert all(p.truth(view) != UNSURE and question not in pieces for p in pieces)
            if question.template in ("and", "or", "and_no") and len(pieces) == 2:
                a, b = (p.truth(view) for p in pieces)
                together = {"and": min(a, b), "or": max(a, b), "and_no": min(a, 2 - b)}
                assert question.truth(view) == together[question.template]


def test_every_wrong_answer_gets_its_kind():
    """Ten planted cases; a picture each. Parts are asked "is there a bus in the scene"."""
    sees = {0: False, 4: False}                            # what is said to parts, where it is not right

    def rule(picture, command):
        part, canonical = command.endswith("in the scene"), bool(re.match(
            "is there an? (city )?bus (ahead|in front|straight ahead|in the middle|directly in front of us)$", command))
        if picture in (4, 5, 6, 7):                        # simple questions, which have no parts
            canonical = part
            return {4: -9, 5: 2 if not canonical else -2, 6: 2 if "picture" in command else -2, 7: 9}[picture]
        if part and " and " not in command:
            return 3 if sees.get(picture, True) else -3
        return {0: -3, 1: 3 if canonical else -3, 2: -3, 3: -3 if canonical else 3}[picture]
    scenes = dict.fromkeys(range(9), [BUS_AHEAD, CAR_LEFT])
    entries = [(0, "exists_at", "bus", "ahead"), (1, "exists_at", "bus", "ahead"), (2, "and", "car", "bus"),
               (3, "exists_at", "bus", "ahead"), (4, "exists", "bus"), (5, "exists", "bus"), (6, "exists", "bus"),
               (7, "exists", "truck"), (8, "exists", "bus")]
    asked = asked_of(scenes, *entries)
    odds = np.array([-3, -3, -0.5, -3, -9, -3, -3, 9, 5.0])                  # the last is right
    records, counts = evaluate.failures(answering(rule), asked, odds)
    assert [r["item"] for r in records] == list(range(8))
    assert [r["type"] for r in records] == ["vision", "language", "reasoning", "language", "vision", "language",
                                            "vision", "vision"]
    assert [r["missed_parts"] for r in records] == [["exists bus"]] + [[]] * 7
    assert [r["error"] for r in records] == ["false negative"] * 7 + ["false positive"]
    assert [r["low_confidence"] for r in records] == [k == 2 for k in range(8)]
    assert [r["suspected_label_error"] for r in records] == [k in (0, 4, 7) for k in range(8)]
    assert records[0]["p_yes"] == round(1 / (1 + math.exp(3)), 4) and records[3]["frame"] == "3.png"
    forms = len(commands.TEMPLATES["exists_at"].paraphrases)
    assert [records[k]["paraphrases_right"] for k in (0, 1, 3)] == [0, 1, forms - 1]
    assert records[1]["paraphrases"] == forms and records[1]["truth"] == "YES"
    assert counts["type"] == dict(vision=4, language=3, reasoning=1)
    assert counts["error"] == {"false negative": 7, "false positive": 1}
    assert counts["type_by_family"] == dict(detection=counts["type"], state={}, safety={}, navigation={})


def test_which_kind_is_taken_for_which():
    truck, bus = box("truck", centre=20), box("bus", centre=108)
    scenes = {0: [truck], 1: [truck], 2: [truck, bus], 3: [bus], 4: [], 5: [CAR_LEFT], 6: [box("truck", width=5)]}
    entries = [(p, "exists", "car") for p in range(7)] + [(2, "exists_at", "car", "right")]
    odds = np.array([1, 1, -1, -1, -1, 9, 9, 9])
    found = evaluate.confusions(asked_of(scenes, *entries), odds, least=3)
    table = {(c["asked"], c["present"]): c for c in found}
    # Trucks: 0, 1 and 2 show one; 3, 4 and the right of 2 do not; 5 has a car, and 6 is undecided.
    assert table["car", "truck"] == dict(asked="car", present="truck", n=3, said_yes=pytest.approx(200 / 3),
                                         elsewhere=pytest.approx(100 / 3), times=pytest.approx((203 / 3) / (103 / 3)))
    assert table["car", "bus"]["n"] == 3 and table["car", "bus"]["said_yes"] == pytest.approx(100 / 3)
    assert found[0] == table["car", "truck"] and len(found) == 2
    assert evaluate.confusions(asked_of(scenes, *entries), odds) == []


def test_which_commands_are_mixed_up():
    scenes = {0: [CAR_LEFT], 1: [CAR_LEFT]}
    entries = [(0, "exists", "car"), (0, "exists", "bus"), (0, "near", "car"), (1, "exists", "car"), (1, "near", "car")]
    found = evaluate.command_pairs(asked_of(scenes, *entries), np.array([1, 1, -1, 1, 1]))
    assert found["templates"] == ["exists", "near"]
    assert found["n"] == [[2, 2], [2, 0]]                  # car and bus both ways; car and near car in both pictures
    assert np.allclose(found["same"], [[100, 50], [50, 0]])
    wrong = np.array([1 / 3, 1 / 2])
    assert np.allclose(found["expected"], 100 * (wrong[:, None] * (1 - wrong) + (1 - wrong[:, None]) * wrong))


def test_a_model_without_pictures_scores_50_unless_the_questions_give_answers_away(subject, tested, drawn, monkeypatch):
    odds = evaluate.blind_model(subject, drawn.meta, 40, 64)(tested.prompts)
    assert len(odds) == len(tested.rows) and 40 < 100 * train.balanced_accuracy(tested.truth, odds) < 60

    class Leaky(train.Data):
        def __init__(self, *args):
            super().__init__(*args)
            self.index[:, 3] = np.where(self.index[:, 3] < 0, -1, self.tokens[:, 1] == self.tokenizer.ids["is"])
    monkeypatch.setattr(evaluate, "Data", Leaky)
    odds = evaluate.blind_model(subject, drawn.meta, 40, 64)(tested.prompts)
    first = np.array([prompt[1] == subject.tokenizer.ids["is"] for prompt in tested.prompts])
    assert train.balanced_accuracy(first, odds) > 0.9


# ---- evaluation: twins and reasons ----

def test_a_twin_is_drawn_from_its_scene_and_edit(drawn):
    frame = next(f for f in drawn.frames if f["split"] == "test" and len(f["labels"]) > 2)
    name, none = Path(frame["name"]).stem, dict(remove=[], add=[])
    assert np.array_equal(evaluate.draw_twin((name, none, drawn.cfg)), drawn.images[frame["index"]])
    edited = evaluate.draw_twin((name, dict(remove=[0], add=[]), drawn.cfg))
    assert 10 < (edited != drawn.images[frame["index"]]).any(-1).sum() < SIZE * SIZE / 2


def test_twins_tell_who_looks_from_who_does_not(drawn, tested, monkeypatch):
    """Instead of a drawn picture, the edited scene itself: one answers by its truth, one says YES, one always flips."""
    question_by = {tuple(ids): q for ids, q in zip(tested.prompts, tested.questions)}
    cfg = changed(drawn.cfg, bootstrap=50)
    monkeypatch.setattr(evaluate, "draw_twin", lambda job: View(prepare.scene_frame(prepare.apply_edit(
        prepare.sample_scene(job[0], job[2]), job[1]), job[2]), job[2]))

    def by(rule):
        def ask_of(jobs):
            for view, prompts in jobs:
                yield np.array([rule(question_by[tuple(ids)].truth(view)) for ids in prompts])
        return stub(ask=ask_of, cfg=cfg)
    right = np.where(tested.truth, 1.0, -1.0)
    found = evaluate.twins(by(lambda truth: truth - 1.0), tested, right)
    edits = [json.loads(x) for x in Path(drawn.cfg.data_dir, "twins.jsonl").read_text(encoding="utf-8").splitlines()]
    flips, neutral = (sum(e[kind] is not None for e in edits) for kind in ("flip", "neutral"))
    assert (found["questions"], found["questions_with_flip"]) == (len(tested.rows), flips)
    assert (found["both_right"]["n"], found["indecision"]["n"]) == (flips, neutral)
    names = ("both_right", "stubbornness", "indecision", "neutral_unchanged")
    value = lambda found: [found[k]["value"] for k in names]                                        # noqa: E731
    assert value(found) == [100, 0, 0, 100]
    for by_what, key in (("family", lambda e: drawn.items["test"][e["item"]]["family"]),
                         ("edit", lambda e: e["flip"]["kind"])):
        counted = Counter(key(e) for e in edits if e["flip"])
        assert {k: row["n"] for k, row in found[f"both_right_by_{by_what}"].items()} == counted
        assert all(row["value"] == 100 for row in found[f"both_right_by_{by_what}"].values())
    assert value(evaluate.twins(by(lambda truth: 1.0), tested, np.ones(len(right)))) == [0, 100, 0, 100]
    assert value(evaluate.twins(by(lambda truth: 1.0 - truth), tested, -right)) == [0, 0, 0, 100], "wrong, yet it looks"
    assert value(evaluate.twins(by(lambda truth: 1.0 - truth), tested, right)) == [0, 100, 100, 0]
    half = np.where(tested.rows % 2, right, -right)        # it sees the twins only: half of the pairs
    assert 35 < evaluate.twins(by(lambda truth: truth - 1.0), tested, half)["both_right"]["value"] < 65


def test_reasons_are_compared_and_checked(subject, tested, drawn, monkeypatch):
    def say(said):
        monkeypatch.setattr(evaluate, "generate", lambda subject, jobs: said)
        found = evaluate.reasons(subject, tested, 300)
        return {k: row["value"] for k, row in found.items()}
    chosen = tested.sample(300, 1)
    own = [(bool(tested.truth[i]), tested.items[i]["reason"]) for i in chosen]
    written = say(own)
    assert {k: round(v, 9) for k, v in written.items() if v is not None} == dict(
        exact=100, bleu4=100, rouge_l=100 * 1, true=100, false=0, not_in_grammar=0, valid_answers=100,
        true_when_answer_right=100, shortcut_rate=0)
    assert written["true_when_answer_wrong"] is None
    others = [reason for _, reason in own[150:] + own[:150]]               # of other scenes
    other = say([(truth, reason) for (truth, _), reason in zip(own, others)])
    assert other["true"] < 60 and other["exact"] < 20 and other["bleu4"] < 60 and other["shortcut_rate"] > 30
    truths = [check_reason(reason, tested.views[tested.picture[i]]) for i, reason in zip(chosen, others)]
    assert other["true"] == pytest.approx(100 * np.mean([t == TRUE for t in truths]))
    assert other["false"] == pytest.approx(100 * np.mean([t == FALSE for t in truths])) == other["shortcut_rate"]
    foreign = say([(not t if k % 2 else None, "a dog is here") for k, (t, _) in enumerate(own)])
    assert (foreign["not_in_grammar"], foreign["true"], foreign["false"], foreign["valid_answers"]) == (100, 0, 0, 50)
    assert foreign["shortcut_rate"] is None and foreign["true_when_answer_wrong"] == 0
    wrong = say([(t if k % 4 else not t, r if k % 4 else "a dog is here") for k, (t, r) in enumerate(own)])
    assert (wrong["true"], wrong["true_when_answer_right"], wrong["true_when_answer_wrong"]) == (75, 100, 0)


def test_descriptions_have_no_verdict_to_be_right_about(subject, drawn, monkeypatch):
    described = evaluate.Questions(subject, drawn.meta, "test", verdicts=False)
    chosen = described.sample(50, 1)
    monkeypatch.setattr(evaluate, "generate", lambda subject, jobs: [
        (None if k % 2 else True, described.items[i]["reason"]) for k, i in enumerate(chosen)])
    found = evaluate.reasons(subject, described, 50)
    assert set(found) == {"exact", "bleu4", "rouge_l", "true", "false", "not_in_grammar"}
    assert found["exact"]["value"] == found["true"]["value"] == 100


# ---- evaluation: attention of words and answers ----

def looking(rule, cfg=DEFAULTS, **parts):
    """A subject whose maps (1, 1, T, 64) are rule(picture, prompt)."""
    def look_at(jobs, model=None):
        for picture, prompts in jobs:
            for ids in prompts:
                yield np.asarray(rule(picture, ids), np.float32).reshape(1, 1, len(ids), -1)
    return stub(look=look_at, cfg=changed(cfg, bootstrap=50), **parts)


def test_a_word_is_judged_by_its_kind_and_an_answer_by_what_makes_it_yes():
    right, far, small = box("car", centre=104, bottom=80), box("bus", centre=64, bottom=70), box("car", 64, width=5)
    scenes = {0: [CAR_LEFT, right, small, BUS_AHEAD, far, lamp("red")]}
    asked = asked_of(scenes, (0, "exists_at", "car", "left", 4), (0, "exists_at", "car", "ahead", 0)[:4],
                     (0, "near", "bus"), (0, "and_no", "car", "truck"), (0, "and", "car", "bus"),
                     (0, "exists", "truck"), (0, "light", "red"), (0, "stop"), (0, "or", "truck", "bus"))
    asked.items[1:2], asked.truth[1] = [dict(asked.items[1], answer=False)], False
    subject = looking(lambda picture, ids: np.tile(np.arange(float(len(ids)))[:, None], (1, 64)))
    answers, answer, word = evaluate.looks(subject, asked, np.arange(9))
    covered = lambda *labels: evaluate.cover(labels, 128, 8)                                        # noqa: E731
    assert answers.shape == (9, 1, 1, 64) and answers[:, 0, 0, 0].tolist() == [len(p) - 1 for p in asked.prompts]
    spoken = Tokenizer(commands.vocabulary()).words
    cars, buses = covered(CAR_LEFT, right), covered(BUS_AHEAD, far)
    wished = [(0, "car", cars), (1, "car", cars), (2, "bus", buses), (3, "car", cars), (4, "car", cars),
              (4, "bus", buses), (6, "traffic light", covered(lamp("red"))), (8, "bus", buses)]
    assert list(zip(word.question.tolist(), word.category.tolist())) == [w[:2] for w in wished]
    for (i, category, cover), maps, found in zip(wished, word.maps, word.cover):
        assert np.array_equal(found, cover), (i, category)
        assert spoken[asked.prompts[i][int(maps[0, 0, 0])]] in evaluate.NAMED[category]
    wished = [(0, covered(CAR_LEFT)), (2, covered(BUS_AHEAD)), (3, cars), (4, covered(CAR_LEFT, right, BUS_AHEAD, far)),
              (6, covered(lamp("red"))), (8, buses)]
    assert answer.question.tolist() == [i for i, _ in wished]
    for (i, cover), maps, found in zip(wished, answer.maps, answer.cover):
        assert np.array_equal(found, cover) and maps[0, 0, 0] == len(asked.prompts[i]) - 1, i
    _, answer, word = evaluate.looks(subject, asked, [5, 7])
    assert evaluate.grounding(answer, asked.picture, answer, answer, 20, 8) == dict(n=0) == evaluate.grounding(
        word, asked.picture, word, word, 20, 8), "what is not there cannot be looked at"


def test_every_object_named_in_a_question_has_its_word_found(tested):
    for question in QUESTIONS:
        for paraphrase in range(len(commands.TEMPLATES[question.template].paraphrases)):
            for command in wordings(question, paraphrase, 3):
                for category in question.objects:
                    said = [w for w in command.split() if w in evaluate.NAMED[category]]
                    assert len(said) == 1, (command, category)


def test_untrained_weights_look_nowhere_in_particular(subject, tested, drawn):
    """Five random models: pointing within sampling error of chance, enrichment about 1, on all that is asked."""
    chosen, found = tested.sample(120, 0), []
    for seed in range(5):
        torch.manual_seed(seed)
        model = VLM(changed(subject.cfg, vision_positions="sincos"), len(subject.tokenizer)).eval()
        _, answer, word = evaluate.looks(subject, tested, chosen, model)
        for look in (answer, word):
            score = evaluate.grounding(look, tested.picture, look, look, 20, 8)["scores"]
            found.append([score[name][k]["value"] for name in ("model", "chance (any patch)")
                          for k in ("pointing", "enrichment", "mass_in_box")])
    model, chance = np.split(np.mean(found, 0), 2)
    error = np.std(np.array(found)[:, 0], ddof=1) / math.sqrt(len(found))
    assert abs(model[0] - chance[0]) < 2.5 * error + 1 and error < 4
    assert 0.9 < model[1] < 1.1 and chance[1] == pytest.approx(1) and abs(model[2] - chance[2]) < 1


def test_maps_that_know_the_picture_only_or_the_question_only(drawn, tested, monkeypatch):
    """A map made from the picture is deaf to the command; one made from the question is the same for all pictures."""
    def softened(seed):
        return np.random.default_rng(seed).dirichlet(np.ones(64))
    spoken, chosen = Tokenizer(commands.vocabulary()), tested.sample(40, 4)
    monkeypatch.setattr(Question, "words", lambda self, rng, paraphrase=None: " ".join(filter(None, self)))
    canonical = SimpleNamespace(**vars(tested))
    canonical.prompts = [spoken.prompt(" ".join(filter(None, q))) for q in tested.questions]
    canonical.jobs, canonical.sample = (lambda some: evaluate.Questions.jobs(canonical, some)), tested.sample
    seeds = dict(picture=lambda picture, ids: int(picture.sum()), question=lambda picture, ids: ids)
    found = {name: evaluate.stability(looking(lambda *job: np.tile(softened(seed(*job)), (len(job[1]), 1)), drawn.cfg,
                                              tokenizer=spoken), canonical, 40) for name, seed in seeds.items()}
    for kind in ("paraphrase", "another question", "another scene", "similar scene"):
        for name, same in (("picture", kind in ("paraphrase", "another question")),
                           ("question", kind != "another question")):
            entry = {k: row["value"] for k, row in found[name][kind].items()}
            if same:
                assert entry == dict(cosine=pytest.approx(1), l2=pytest.approx(0, abs=1e-6),
                                     js=pytest.approx(0, abs=1e-6)), (name, kind)
            else:
                assert entry["cosine"] < 0.7 and entry["l2"] > 0.1 and entry["js"] > 0.1, (name, kind)
    assert found["picture"]["similar scene"]["l2"]["n"] > 20 and len(chosen) == 40


def test_command_sensitivity_is_the_ratio_of_two_distances(subject, tested, drawn):
    found = evaluate.stability(subject, tested, 24)
    for k in ("l2", "js"):
        assert found["command sensitivity"][k]["value"] == pytest.approx(
            found["another question"][k]["value"] / found["paraphrase"][k]["value"])
    val = evaluate.Questions(subject, drawn.meta, "val")
    assert "similar scene" not in evaluate.stability(subject, val, 8), "twins are of the test split"


def test_what_is_lost_without_each_head(subject, drawn):
    few, model = evaluate.Questions(subject, drawn.meta, "test", 80), subject.model
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        with torch.no_grad():
            model.decoder.blocks[0].cross.out.weight[:, :16] = 0
            model.decoder.blocks[0].attn.out.weight[:, 16:] *= 30
        usual = np.median(few.odds(subject))                 # else an untrained model says YES to all
        fair = SimpleNamespace(model=model, cfg=subject.cfg, ask=lambda jobs: (o - usual for o in subject.ask(jobs)))
        found = evaluate.head_ablation(fair, few)
        assert [(e["kind"], e["layer"], e["head"]) for e in found] == [
            ("vision", 0, 0), ("self", 0, 0), ("self", 0, 1), ("cross", 0, 0), ("cross", 0, 1)]
        dead, strong = found[3], found[2]
        assert dead["drop"]["value"] == dead["share"] == 0 and dead["p_holm"] == 1 and strong["share"] > 0.9
        assert found[0]["share"] == 1 and found[1]["share"] + found[2]["share"] == pytest.approx(1)
        whole, p = few.odds(fair), []
        for entry in found:
            module = evaluate.attentions(model)[entry["kind"]][0]
            with evaluate.without_head(module, entry["head"]):
                without = few.odds(fair)
            p.append(evaluate.mcnemar((whole > 0) == few.truth, (without > 0) == few.truth)[2])
            assert entry["drop"]["value"] == pytest.approx(100 * (train.balanced_accuracy(
                few.truth, whole) - train.balanced_accuracy(few.truth, without)))
        assert [e["p_holm"] for e in found] == evaluate.holm(p) and strong["drop"]["value"] != 0
    finally:
        model.load_state_dict(kept)


# ---- evaluation: the whole page ----

def data_copy(drawn, folder, change):
    """A copy of the drawn data with the commands change(name, [(row, item)]) of each set; twins follow their items."""
    shutil.copytree(drawn.cfg.data_dir, folder)
    edits = [json.loads(x) for x in (folder / "twins.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in SETS:
        kept = change(name, list(enumerate(drawn.items[name])))
        prepare._write_items(folder, name, [item for _, item in kept], Tokenizer(commands.vocabulary()), drawn.cfg)
        if name == "test":
            place = {row: k for k, (row, _) in enumerate(kept)}
            (folder / "twins.jsonl").write_text("".join(
                json.dumps(dict(e, item=place[e["item"]])) + "\n" for e in edits if e["item"] in place))
    return changed(drawn.cfg, data_dir=str(folder))


def first_pictures(kept, count):
    """The commands of the first pictures."""
    pictures = list(dict.fromkeys(item["picture"] for _, item in kept))[:count]
    return [(row, item) for row, item in kept if item["picture"] in pictures]


FEW = dict(sample_items=80, probe_items=8, head_items=40, stored_maps=3, bootstrap=50)


def shortly(cfg):
    """evaluate.evaluate(cfg) with a short training of the model without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.blind_model, "__defaults__", (5, 32))
        return evaluate.evaluate(cfg)


@pytest.fixture(scope="module")
def evaluated(drawn, tmp_path_factory):
    """(cfg, page): an untrained model, evaluated on the first test pictures and compared with itself."""
    root = tmp_path_factory.mktemp("page")
    cfg = data_copy(drawn, root / "data", lambda name, kept: kept if name == "train" else first_pictures(kept, 6))
    cfg = save_untrained(small_run(SimpleNamespace(cfg=cfg), root / "out", **FEW), drawn.meta)
    return cfg, shortly(changed(cfg, against=str(root / "out" / "best.pt")))


def test_the_page_is_what_is_written(evaluated):
    cfg, page = evaluated
    text = (Path(cfg.out_dir) / "eval.json").read_text(encoding="utf-8")
    assert json.loads(text) == page and "NaN" not in text and "Infinity" not in text
    questions = [i for i in prepare.read_items(cfg.data_dir, "test") if i["answer"] is not None]
    assert page["overall"]["n"] == len(questions) == sum(row["n"] for row in page["by"]["family"].values()) > 50
    assert 40 <= page["overall"]["value"] <= 60
    assert set(page["controls"]) == {"blank picture", "another picture", "trained without pictures"}
    assert all(row["n"] == len(questions) for row in page["controls"].values())
    by_template = [row["n"] for rows in page["controls_by_template"].values() for row in rows.values()]
    assert sum(by_template) == 3 * len(questions)
    assert set(page["train_gap"]) == {"train", "val", "train minus test"}
    assert 20 <= page["train_gap"]["train"]["n"] <= 60
    assert set(page["held_out"]) == {"test_words", "test_words, drop", "test_combos", "test_combos, drop"}
    assert page["held_out"]["test_words, drop"]["value"] == pytest.approx(
        page["overall"]["value"] - page["held_out"]["test_words"]["value"], abs=2e-4)
    gap = page["train_gap"]
    assert gap["train minus test"]["value"] == pytest.approx(gap["train"]["value"] - page["overall"]["value"], abs=2e-4)
    assert gap["train minus test"]["low"] < gap["train minus test"]["value"] < gap["train minus test"]["high"]
    assert page["ood"]["all"]["n"] == sum(row["n"] for row in page["ood"]["weather"].values()) > 0
    assert page["twins"]["questions"] == len(questions) and page["reasons"]["exact"]["n"] == 40
    assert "shortcut_rate" in page["reasons"] and "shortcut_rate" not in page["descriptions"]
    assert page["calibration"]["raw"]["n"] == len(questions)
    entropy = page["attention"]["entropy"]
    assert 0.5 * entropy["maximum"] < entropy["mean"]["value"] <= entropy["maximum"] == round(math.log(64), 4)
    assert [len(heads) for heads in entropy["by_head"]] == [2] and len(page["head_ablation"]) == 5
    assert page["attention"]["grounding"]["word"]["scores"]["model"]["pointing"]["n"] > 0


def test_the_vision_gain_is_over_the_best_control_or_50(evaluated):
    _, page = evaluated
    best = max([50] + [row["value"] for row in page["controls"].values()])
    assert page["vision_gain"]["value"] == pytest.approx(page["overall"]["value"] - best, abs=2e-4)


def test_failures_are_those_of_the_confusion_matrix(evaluated):
    cfg, page = evaluated
    text = (Path(cfg.out_dir) / "failures.jsonl").read_text(encoding="utf-8")
    wrong, items = [json.loads(x) for x in text.splitlines()], prepare.read_items(cfg.data_dir, "test")
    matrix, counts = page["classification"]["confusion"], page["failures"]["counts"]
    assert sum(r["truth"] == "YES" for r in wrong) == matrix["yes_said_no"]
    assert sum(r["truth"] == "NO" for r in wrong) == matrix["no_said_yes"]
    assert sum(matrix.values()) == page["overall"]["n"] and len({r["item"] for r in wrong}) == len(wrong) > 15
    assert page["classification"]["accuracy"] == pytest.approx(100 - 100 * len(wrong) / page["overall"]["n"], abs=1e-4)
    for name in ("type", "error", "low_confidence", "suspected_label_error"):
        assert counts[name] == Counter(str(r[name]) for r in wrong)
    for r in wrong:
        item = items[r["item"]]
        assert (r["command"], r["reason"], r["truth"] == "YES") == (item["command"], item["reason"], item["answer"])
        assert (r["p_yes"] <= 0.5) == item["answer"] or r["p_yes"] == 0.5


def test_stored_maps_are_bounded_and_sum_to_one(evaluated):
    cfg, page = evaluated
    stored = np.load(Path(cfg.out_dir) / "attention.npz")
    n, items = len(stored["items"]), prepare.read_items(cfg.data_dir, "test")
    assert stored["answer_maps"].shape == (n, 64) and 60 <= n == len(stored["odds"]) <= 110
    shown = {items[k]["picture"] for k in stored["items"]}
    assert n == sum(i["picture"] in shown and i["answer"] is not None for i in items), "all questions of each picture"
    longest = max(len(Tokenizer(commands.vocabulary()).prompt(i["command"]))
                  for k, i in enumerate(items) if k in stored["full_items"])
    assert stored["full"].shape == (3, 1, 2, longest, 64) and set(stored["full_items"]) <= set(stored["items"])
    assert np.allclose(stored["answer_maps"].astype(float).sum(-1), 1, atol=5e-3)
    assert np.allclose(stored["full"].astype(float).sum(-1)[:, :, :, 0], 1, atol=5e-3)


def test_a_checkpoint_does_not_differ_from_itself(evaluated):
    against = evaluated[1]["against"]
    assert against["other"] == evaluated[1]["overall"]
    assert (against["only_this_right"], against["only_other_right"], against["mcnemar_p"]) == (0, 0, 1)
    assert {against["difference"][k] for k in ("value", "low", "high")} == {0}


def test_a_fresh_process_writes_the_same_bytes(evaluated, tmp_path):
    cfg, _ = evaluated
    best = str(Path(cfg.out_dir) / "best.pt")
    code = "import config, evaluate; evaluate.blind_model.__defaults__ = (5, 32); config.run(evaluate.evaluate, '')"
    flags = dict(FEW, checkpoint=best, against=best, out_dir=tmp_path, data_dir=cfg.data_dir, device="cpu",
                 dtype="float32", workers=1)
    run = subprocess.run([sys.executable, "-c", code, *(f"--{k}={v}" for k, v in flags.items())], capture_output=True,
                         text=True, cwd=Path(__file__).parent)
    assert run.returncode == 0 and not run.stderr, run.stderr
    for name in ("eval.json", "failures.jsonl"):
        assert (tmp_path / name).read_bytes() == (Path(cfg.out_dir) / name).read_bytes()
    for said in ("vision gain", "twins:", "pointing, points ahead", "McNemar p 1", "wrong answers; the first"):
        assert said in run.stdout


@pytest.fixture(scope="module")
def bare(drawn, tmp_path_factory):
    """Settings of an untrained model. Its data: a few test questions, none on states, and no other set but train."""
    root = tmp_path_factory.mktemp("bare")
    cfg = data_copy(drawn, root / "data", lambda name, kept: [
        (row, item) for row, item in first_pictures(kept, {"train": 40, "test": 3}.get(name, 0))
        if item["family"] != "state"])
    return save_untrained(small_run(SimpleNamespace(cfg=cfg), root / "out", **FEW), drawn.meta)


def test_what_is_missing_has_a_row_without_a_value(bare, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = shortly(bare)
    nothing = dict(n=0, value=None, low=None, high=None)
    assert list(page["by"]["family"]) == list(evaluate.FAMILIES) and page["by"]["family"]["state"] == nothing
    assert page["train_gap"]["val"] == page["held_out"]["test_words"] == page["ood"]["all"] == nothing
    assert page["calibration"]["temperature"] == 1 and page["overall"]["n"] > 20
    assert json.loads((Path(bare.out_dir) / "eval.json").read_text(encoding="utf-8")) == page
    assert re.search(r"state +- +n=0", capsys.readouterr().out)


def test_what_cannot_be_evaluated_is_one_line_that_helps(bare, drawn, tmp_path, capsys):
    good = (Path(bare.out_dir) / "best.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "file").write_text("")
    here = changed(bare, out_dir=str(tmp_path))
    save_untrained(here, drawn.meta, "words.pt", known=commands.vocabulary()[:-1])
    save_untrained(changed(here, min_pixels=9.5), drawn.meta, "rules.pt")
    best, at = str(Path(bare.out_dir) / "best.pt"), lambda name: str(tmp_path / name)
    for change, says in [
            (dict(checkpoint=at("words.pt")), "vocabulary is not that of the data.*train again.*--data_dir"),
            (dict(checkpoint=at("rules.pt")), "min_pixels=10.0 there, 9.5 now.*python prepare.py"),
            (dict(checkpoint=at("half.pt")), "half.pt.*damaged"),
            (dict(checkpoint=at("text.pt")), "text.pt is not a checkpoint"),
            (dict(checkpoint=at("absent.pt")), "no checkpoint.*python train.py"),
            (dict(checkpoint=best, split="ood"), "ood split in .*data holds no questions"),
            (dict(checkpoint=best, against=at("words.pt")), "words.pt has another vocabulary"),
            (dict(checkpoint=best, against=at("half.pt")), "half.pt.*damaged"),
            (dict(checkpoint=best, data_dir=at("nowhere")), "no data in .*python prepare.py"),
            (dict(checkpoint=best, out_dir=at("file/out")), "cannot write to out_dir")]:
        with pytest.raises(UserError, match=says) as error:
            shortly(changed(here, **change))
        assert "\n" not in str(error.value) and "controls by" not in capsys.readouterr().out
        assert not (tmp_path / "eval.json").exists()


def test_a_model_trained_with_shuffled_answers_scores_50(drawn, tmp_path):
    """And the same short training learns what can be learned: answers that follow from the first word."""
    def shuffled(name, kept):
        asked = [(row, item) for row, item in kept if item["answer"] is not None]
        answers = [item["answer"] for _, item in asked]
        if name in ("train", "val"):
            random.Random(name).shuffle(answers)
        return [(row, dict(item, answer=answer)) for (row, item), answer in zip(asked, answers)]

    def by_word(name, kept):
        return [(row, dict(item, answer=item["command"].startswith("is"))) for row, item in shuffled(name, kept)]
    found = {}
    for change in (shuffled, by_word):
        cfg = data_copy(drawn, tmp_path / change.__name__, change)
        cfg = small_run(SimpleNamespace(cfg=cfg), tmp_path / f"{change.__name__}-out", max_steps=60, log_every=60,
                        eval_every=60, batch_size=8, tag_weight=0.0)
        train.train(cfg)
        subject = evaluate.Subject(cfg)
        asked = evaluate.Questions(subject, drawn.meta, "test")
        found[change.__name__] = evaluate.accuracy_row(asked.truth, asked.odds(subject) > 0, asked.picture, 50)["value"]
    assert 44 <= found["shuffled"] <= 56 and found["by_word"] > 80, found


# ---- answering ----

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, cfg, the five of train.load_model): a tiny untrained model as checkpoint, and two drawn pictures."""
    root = tmp_path_factory.mktemp("answer")
    cfg = config.from_args(device="cpu", image_size=32, patch_size=8, stem_width=8, vision_dim=16, vision_layers=1,
                           vision_heads=2, vision_ffn_dim=16, text_dim=16, text_layers=2, text_heads=4, text_kv_heads=2,
                           text_head_dim=8, text_ffn_dim=16, max_text=24, max_new_tokens=8, out_dir=str(root))
    torch.manual_seed(0)
    words = commands.vocabulary()
    model = VLM(cfg, len(Tokenizer(words)))
    train.save_checkpoint(root / "best.pt", dict(format=train.FORMAT, model=model.state_dict(), config=vars(cfg),
                                                 words=words, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], step=0,
                                                 data_hash=config.data_hash(cfg)))
    (root / "pictures").mkdir()
    for name in ("b", "a"):
        picture = prepare.draw_scene(prepare.sample_scene(name, cfg), 64)
        Image.fromarray(np.asarray(picture)).save(root / "pictures" / f"{name}.png")
    return root, cfg, train.load_model(cfg)


def tensor_of(picture, state):
    """One uint8 picture as the model takes it: (1, 3, S, S)."""
    return torch.from_numpy(train.normalise(picture[None], state["mean"], state["std"]))


def asked(saved, **changes):
    """Settings that ask about picture a, with changes; figures go to a folder of the checkpoint's."""
    root, cfg, _ = saved
    return SimpleNamespace(**{**vars(cfg), "checkpoint": str(root / "best.pt"), "command": "is there a bus?",
                              "image": str(root / "pictures" / "a.png"), "dpi": 60, **changes})


def test_answer_maps_are_the_models_own_cross_attention(saved):
    root, cfg, loaded = saved
    model, _, tokenizer, state, device = loaded
    picture = np.asarray(prepare.load_picture(root / "pictures" / "a.png", cfg.image_size))
    result = visualize.answer(*loaded, picture, "Is there a bus, on the LEFT?!")
    assert result["words"] == ["is", "there", "a", "bus", ",", "on", "the", "left"]
    assert result["maps"].shape == (9, 4, 4) and result["maps"].dtype == np.float32
    np.testing.assert_allclose(result["maps"].sum((1, 2)), 1, atol=1e-5)
    image = (picture.astype(np.float32) / 255 - np.float32(state["mean"])) / np.float32(state["std"])
    ids = torch.tensor([tokenizer.prompt("is there a bus , on the left")])
    with torch.no_grad():
        logits, attn = model(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()), ids, return_attn=True)
    assert tokenizer.words[ids[0, 4]] == "bus" and tokenizer.words[ids[0, -1]] == "?"
    for shown, token in ((3, 4), (8, ids.shape[1] - 1)):                          # "bus" and the answer
        mean = attn["cross"][:, 0, :, token].mean((0, 1)).view(4, 4)
        np.testing.assert_allclose(result["maps"][shown], mean.numpy(), atol=1e-6)
    assert np.abs(result["maps"][3] - result["maps"][8]).max() > 1e-5             # or the test above could not tell
    np.testing.assert_allclose(result["cross"][1, 2, 3], attn["cross"][1, 0, 2, 4].view(4, 4).numpy(), atol=1e-6)
    np.testing.assert_allclose(result["vision"], attn["vision"][:, 0].numpy(), atol=1e-6)
    np.testing.assert_allclose(result["text"], attn["self"][:, 0].numpy(), atol=1e-6)


def test_answer_gives_verdict_probability_and_reason(saved):
    root, cfg, _ = saved
    picture = np.asarray(prepare.load_picture(root / "pictures" / "a.png", cfg.image_size))
    for beam in (1, 3):
        loaded = train.load_model(asked(saved, beam=beam))
        model, _, tokenizer, state, _ = loaded
        ids = torch.tensor([[tokenizer.prompt("is there a bus")]])
        plain, bias = model.decoder.logits, torch.zeros(len(tokenizer))
        bias[[4, 5]] = 20.0
        answers = []
        for yes in (0.7, -0.2):
            bias[4] = 20.0 + yes
            # The pass that answers gives logits of all tokens (3 axes), generation of the last one only (2 axes).
            model.decoder.logits = lambda hidden: plain(hidden) + bias * (hidden.ndim == 3)
            with torch.no_grad():
                logits = model(tensor_of(picture, state), ids)
            p_yes = logits[0, 0, -1, [4, 5]].softmax(-1)[0].item()
            result = visualize.answer(*loaded, picture, "is there a bus")
            assert result["verdict"] == ("YES" if p_yes > 0.5 else "NO")
            assert result["probability"] == pytest.approx(max(p_yes, 1 - p_yes), abs=1e-5)
            assert "[" not in result["reason"].replace("[UNK]", "").replace("[SOS]", "")
            answers.append(p_yes)
            described = visualize.answer(*loaded, picture, "Describe the scene.")     # known by its words
            assert described["verdict"] is None and described["probability"] is None
        assert answers[0] > answers[1]
        bias[[4, 5]] = -20.0                               # known by its first word
        model.decoder.logits = lambda hidden: plain(hidden) + bias
        assert visualize.answer(*loaded, picture, "is there a bus")["verdict"] is None


def test_numbers_beside_a_map():
    """By hand: 16 patches of 8 pixels, a box over the upper left patch and half of the next."""
    even, one = np.full((4, 4), 1 / 16), np.zeros((4, 4))
    one[0, 1] = 1
    half = [dict(box2d=dict(x1=0, y1=0, x2=12, y2=8))]
    assert visualize.numbers(even, [], 32) == "H 2.77 (100%)\npeak 1.0×"
    assert visualize.numbers(even, half, 32) == "H 2.77 (100%)\npeak 1.0×\nin box 9% = 1.0×"
    assert visualize.numbers(one, half, 32) == "H 0.00 (0%)\npeak 16.0×\nin box 50% = 5.3×"


def test_one_picture_is_answered_and_drawn(saved, tmp_path, capsys):
    visualize.main(asked(saved, out_dir=str(tmp_path), command="Is there a $x{$ bus on the left?"))
    lines = capsys.readouterr().out.splitlines()
    name = str(tmp_path / "answer" / "a-is-there-a-x-bus-on-the-left")
    ends = [".png", "-layers.gif", "-heads.png", "-vision.png", "-text.png", "-text.pdf"]
    assert lines[-6:] == [f"figure: {name}{end}" for end in ends]
    for end in ends[:-1]:
        with Image.open(name + end) as image:
            assert end.endswith("gif") and image.n_frames == 2 or round(image.info["dpi"][0]) == 60
            assert len(image.convert("RGB").getcolors(2 ** 24)) > 50


def test_two_commands_about_a_picture_are_compared(saved, tmp_path, capsys, monkeypatch):
    """The third map is the second less the first, on a scale of its own with 0 in the middle."""
    monkeypatch.setattr(visualize, "draw_panels", keep := Kept(visualize.draw_panels))
    visualize.main(asked(saved, out_dir=str(tmp_path), command2="is the light red?"))
    assert (tmp_path / "answer" / "a-is-there-a-bus-is-the-light-red.png").exists()
    picture, one, two, apart = keep.panels
    assert picture.map is None and np.allclose(apart.map, two.map - one.map) and "L2" in apart.note
    assert "is there a bus" in one.label and "is the light red" in two.label
    norms = [axes.images[-1].norm for axes in keep.figure.axes[1:4]]
    assert norms[0] is norms[1] and norms[0] is not norms[2] and norms[2].vmin == -norms[2].vmax


class Kept:
    """A draw_panels that remembers the last panels and the figure made of them."""

    def __init__(self, function):
        self.function = function

    def __call__(self, panels, *rest, **options):
        self.panels, self.figure = panels, self.function(panels, *rest, **options)
        return self.figure


def test_every_map_of_a_scene_is_a_row_of_attention(saved, monkeypatch):
    """Each map sums to 1 and stands under its own name, and all of a figure share one colour scale."""
    root, cfg, loaded = saved
    picture = np.asarray(prepare.load_picture(root / "pictures" / "a.png", cfg.image_size))
    shot = visualize.answer(*loaded, picture, "is there a bus")
    monkeypatch.setattr(visualize, "draw_panels", keep := Kept(visualize.draw_panels))
    patch, maps = int(shot["maps"][-1].argmax()), {}
    for kind in ("words", "layers", "heads", "vision"):
        visualize.SCENE[kind](shot, cfg)
        maps[kind] = [panel.map for panel in keep.panels if panel.map is not None]
        assert all(found.sum() == pytest.approx(1, abs=1e-4) and found.min() >= 0 for found in maps[kind])
        drawn = [axes.images[-1] for axes in keep.figure.axes if len(axes.images) == 2]
        assert len(drawn) == len(maps[kind]) and len({id(image.norm) for image in drawn}) == 1
        assert {image.get_interpolation() for image in drawn} == {"nearest"}
    assert [panel.label for panel in keep.panels] == ["head 0", "head 1", "mean", "rollout to here"]
    np.testing.assert_allclose(maps["words"], shot["maps"], atol=1e-6)
    np.testing.assert_allclose(maps["layers"], shot["cross"][1].mean(0), atol=1e-6)             # the last frame
    np.testing.assert_allclose(maps["heads"][6], shot["cross"][1, 2, -1])
    np.testing.assert_allclose(maps["vision"][1], shot["vision"][0, 1, patch].reshape(4, 4))
    rolled = 0.5 * shot["vision"][0].mean(0)[patch] + 0.5 * np.eye(16)[patch]
    np.testing.assert_allclose(maps["vision"][3], rolled.reshape(4, 4), atol=1e-6)
    text = visualize.SCENE["text"](shot, cfg)
    for axes, weights in zip(text.axes, shot["text"].mean(1)):
        seen = axes.images[0].get_array()
        assert np.array_equal(seen.mask, np.triu(np.ones((6, 6)), 1) > 0) and np.allclose(seen[5], weights[5])
    visualize.plt.close("all")


def test_boxes_are_outlined_where_they_are(saved):
    picture = np.zeros((32, 32, 3), np.uint8)
    box_of = [dict(box2d=dict(x1=8, y1=4, x2=24, y2=16))]
    panels = [visualize.Panel(picture, boxes=box_of), visualize.Panel(picture, np.full((4, 4), 1 / 16), boxes=box_of)]
    figure = visualize.draw_panels(panels, 2, ["title"], "")
    for axes, scale in zip(figure.axes, (1, 8)):
        patch = axes.patches[0]
        assert [patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()] == [
            8 / scale, 4 / scale, 16 / scale, 12 / scale]
    visualize.plt.close(figure)


def test_boxes_of_a_question_are_those_of_its_words_and_its_answer():
    frame = dict(name="hand", attributes={}, labels=[box("car", 20), box("car", 64), lamp("red", centre=110.0)])
    car, other, light = frame["labels"]
    view = View(frame, DEFAULTS)
    for question, command, wanted in [
            (Question("exists_at", "car", "left"), "is a car left", [[], [], [car, other], [], [car]]),
            (Question("and_no", "car", "red light"), "a car and no red light",
             [[], [car, other], [], [], [], [light], [car, other]]),
            (Question("turn", "left", ""), "may we turn left", [[], [], [], [], []])]:
        found = visualize.named_boxes(frame, view, question, command)
        assert [sorted(map(str, labels)) for labels in found] == [sorted(map(str, labels)) for labels in wanted]


@pytest.fixture(scope="module")
def told(drawn, tmp_path_factory):
    """Settings of an untrained model with its evaluation files."""
    out = tmp_path_factory.mktemp("told")
    cfg = small_run(drawn, out, text_layers=2, sample_items=60, probe_items=4, head_items=20, bootstrap=20,
                    stored_maps=2)
    torch.manual_seed(0)
    words_known = commands.vocabulary()
    model = VLM(cfg, len(Tokenizer(words_known)))
    with torch.no_grad():                                  # says YES to some and NO to others
        embedding = model.decoder.embedding.weight
        embedding[tokenizer.YES] = embedding[tokenizer.NO] + 0.2 * torch.randn(embedding.shape[1])
    train.save_checkpoint(out / "best.pt", dict(
        format=train.FORMAT, model=model.state_dict(), config=vars(cfg), step=0, words=words_known,
        mean=drawn.meta["mean"], std=drawn.meta["std"], data_hash=drawn.meta["hash"]))
    blind = evaluate.blind_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "blind_model", lambda subject, meta: blind(subject, meta, 2, 8))
        evaluate.evaluate(cfg)
    (out / "log.csv").write_text("step,loss,lr,grad_norm,val_accuracy\n1,2.5,0.1,3,\n1,,,,0.5\n")
    (out / "bench.json").write_text(json.dumps(dict(device="cpu", dtype="float32", threads=1, cost={
        name: dict(size=[1, 2], ms=[10, 40], exponent=2) for name in ("size, a", "size, b", "commands", "times, c")})))
    (out / "lr_range.json").write_text(json.dumps({k: dict(scale=[0.1, 1], loss=[3, 2]) for k in ("see", "read")}))
    return cfg


@pytest.mark.parametrize("damage", ["step,loss\n1,2.5\n", "step,loss,lr,grad_norm,val_accuracy\n1,two,0.1,3,\n",
                                    "step,loss,lr,grad_norm,val_accuracy\nx,,,,\n", "1\n2\n"])
def test_a_damaged_log_is_refused_by_name(tmp_path, damage):
    (tmp_path / "log.csv").write_text(damage)
    with pytest.raises(UserError, match="log.csv is not a log of training"):
        visualize.figure_training(SimpleNamespace(cfg=SimpleNamespace(out_dir=str(tmp_path))))


def test_the_report_holds_every_figure_and_needs_no_network(told, capsys, monkeypatch):
    """Every figure is made and stands in the report, though none is rendered here: that takes a second each."""
    def save(drawn, path, dpi):
        file = Path(f"{path}.gif" if isinstance(drawn, list) else f"{path}.png")
        Image.new("RGB", (dpi, dpi)).save(file)
        visualize.plt.close("all")
        return [file]
    monkeypatch.setattr(visualize, "save", save)
    out = Path(told.out_dir)
    (out.parent / "ablation").mkdir(exist_ok=True)
    (out.parent / "ablation" / "table.md").write_text("Said <so>.\n\n| a | b |\n|---|---|\n| 1 | <2> |\n")
    (out / "robustness.md").write_text("| c |\n|---|\n| 3 |\n")
    for name in ("ablation/differences", f"{out.name}/robustness"):
        Image.new("RGB", (9, 9)).save(out.parent / f"{name}.png")
    visualize.main(told)
    said, text = capsys.readouterr().out, (out / "report.html").read_text(encoding="utf-8")
    made = set(visualize.FIGURES) - {"pairs"}             # too few questions here for that one
    assert {path.stem for path in (out / "figures").iterdir()} == made and "no figure 'pairs'" in said
    assert all(f"{out / 'figures' / name}." in said for name in made)
    assert len(re.findall(r'src="data:image/(?:webp|gif);base64,', text)) == len(made) + 2
    assert not re.search(r"(src|href)=\"(?!data:|#)|https?:|@[A-Z]+@|\bnan\b", text)
    page = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    assert visualize.shown_row(page["overall"]) in text and f"seed {told.seed}" in text
    assert "<p>Said &lt;so&gt;.</p>" in text and "<tr><td>1</td><td>&lt;2&gt;</td></tr>" in text
    assert "<th>c</th></tr><tr><td>3</td></tr>" in text


def test_examples_are_drawn_by_the_seed(told, monkeypatch):
    monkeypatch.setattr(visualize, "draw_panels", keep := Kept(lambda *panels: None))
    seen = []
    for seed in (3, 3, 4):
        visualize.figure_twins(visualize.Story(changed(told, seed=seed)))
        seen.append([panel.picture.tobytes() for panel in keep.panels])
    assert seen[0] == seen[1] != seen[2] and seen[0][0] != seen[0][2]             # a twin is another picture


def test_wrong_answers_stand_beside_the_truth(told, monkeypatch):
    monkeypatch.setattr(visualize, "draw_panels", keep := Kept(visualize.draw_panels))
    story = visualize.Story(told)
    for record in story.failures:
        record["suspected_label_error"] = record is story.failures[0]
    _, caption = visualize.figure_wrong(story)
    assert len(keep.panels) == 10 and keep.panels[6] is keep.panels[9] is visualize.NOTHING and "of the 1 " in caption
    record, panel = story.failures[0], keep.panels[5]
    assert panel.label == visualize.tidy(record["command"]) + "?" and panel.note.endswith(f"{record['type']} error")
    assert panel.note.startswith(f"said {'NO' if record['truth'] == 'YES' else 'YES'}")
    assert np.array_equal(panel.picture, story.asked.data.images[story.asked.picture[story.at[record["item"]]]])
    visualize.plt.close("all")


def test_kinds_and_commands_that_are_mixed_up_are_drawn(told):
    story = visualize.Story(told)
    story.page["failures"]["confusions"] = [dict(asked="car", present="bus", n=30, said_yes=40, elsewhere=10, times=4)]
    story.page["failures"]["command_pairs"] = dict(
        templates=["and", "or"], n=[[20, 30], [30, 19]], same=[[50, 40], [40, 30]], expected=[[10, 20], [20, 30]])
    kinds, pairs = (axis.images[0].get_array() for axis in visualize.figure_pairs(story)[0].axes[:2])
    assert kinds.compressed().tolist() == [30] and pairs.filled(-1).tolist() == [[40, -1], [20, -1]]
    visualize.plt.close("all")


def test_the_interactive_page_holds_the_models_own_maps(told, capsys):
    visualize.main(changed(told, page=True))
    text = (Path(told.out_dir) / "page.html").read_text(encoding="utf-8")
    assert len(text) < 5e6 and not re.search(r"https?:|@[A-Z]+@", text)
    data = json.loads(re.search(r"const D = (.*), P = ", text)[1])
    story = visualize.Story(told)
    scene = data["scenes"][0]
    command = scene["commands"][0]
    names = [story.asked.frames[picture]["name"] for picture in story.asked.picture]
    i = next(i for i, item in enumerate(story.asked.items)
             if names[i] == scene["name"] and visualize.tidy(item["command"]) == command["text"].rstrip("?"))
    shot = story.shot(i)
    packed = np.frombuffer(base64.b64decode(command["maps"]), np.uint8).reshape(shot["cross"].shape)
    np.testing.assert_allclose((packed / 255) ** 2 * command["most"] / 64, shot["cross"],
                               atol=0.005 * shot["cross"].max())
    assert command["words"] == shot["words"] + ["answer"] and len(command["boxes"]) == len(command["covers"]) == \
        len(command["words"])
    assert len(data["scenes"]) == 8


def test_evaluation_files_that_are_missing_broken_or_stale_are_named(told, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "FIGURES", {"accuracy": visualize.FIGURES["accuracy"]})
    copied = changed(told, out_dir=str(tmp_path), checkpoint=str(Path(told.out_dir) / "best.pt"))
    page = json.loads((Path(told.out_dir) / "eval.json").read_text(encoding="utf-8"))
    for name, content, words_wanted in [
            ("eval.json", None, ["no", "eval.json"]), ("attention.npz", None, ["attention.npz"]),
            ("eval.json", "{", ["cannot be read"]), ("eval.json", "[]", ["cannot be read"]),
            ("failures.jsonl", "{", ["cannot be read"]), ("attention.npz", "x", ["cannot be read"]),
            ("eval.json", json.dumps(dict(page, step=9)), ["step 9", "step 0"]),
            ("eval.json", json.dumps({k: v for k, v in page.items() if k != "format"}), ["format None"])]:
        for file in ("eval.json", "failures.jsonl", "attention.npz"):
            shutil.copy(Path(told.out_dir) / file, tmp_path / file)
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as error:
            visualize.main(copied)
        said = str(error.value)
        assert "\n" not in said and all(word in said for word in words_wanted + ["python evaluate.py"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        visualize.save(visualize.plot(1, 1, 1)[0], tmp_path / "file" / "figure", 40)
    with pytest.raises(UserError, match="page.html"):
        visualize.write(tmp_path / "file" / "page.html", "")


def test_a_folder_is_answered_in_order_without_the_broken(saved, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "pictures"
    shutil.copytree(saved[0] / "pictures", folder)
    (folder / "aa.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture, and not meant as one")
    shutil.copy(folder / "b.png", folder / "b.bmp")                               # same stem: no figure is overwritten
    backwards = sorted(folder.iterdir(), reverse=True)                            # a folder has no order of its own
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(backwards))
    visualize.main(asked(saved, image=str(folder), out_dir=str(tmp_path)))
    monkeypatch.undo()
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == ["a.png", "b.bmp", "b.png"]
    assert said.err.count("\n") == 1 and "aa.jpg" in said.err and "skipped" in said.err
    assert len(list((tmp_path / "answer").glob("*.png"))) == 3


def test_an_unknown_word_is_named_with_the_nearest(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(visualize, "SCENE", {})            # no figures
    visualize.main(asked(saved, out_dir=str(tmp_path), command="is there a trukc or a zzzzzz"))
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 2 and "'trukc'" in warned[0] and "'truck'" in warned[0] and "'zzzzzz'" in warned[1]


def test_what_cannot_be_answered_is_said_in_one_line(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "SCENE", {"words": visualize.SCENE["words"]})  # the other figures take seconds
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"")
    for changes, words in [
            (dict(command=""), ["--image alone", "--command"]), (dict(image=""), ["--command alone", "--image"]),
            (dict(page=True), ["--page"]), (dict(image="", command="", command2="is it"), ["--command2 alone"]),
            (dict(image="", command=""), ["eval.json", "python evaluate.py"]), (dict(command=" ?!. "), ["no word"]),
            (dict(command="is there a bus " * 4), ["16 words", "14 fit", "max_text=24"]),
            (dict(max_new_tokens=22), ["max_new_tokens=22", "max_text=24"]),
            (dict(command="is there [PAD] a bus"), ["[PAD]"]),
            (dict(checkpoint=str(tmp_path / "none.pt")), ["none.pt", "python train.py"]),
            (dict(image=str(tmp_path / "none.jpg")), ["none.jpg"]), (dict(image=str(tmp_path / "file")), ["file"]),
            (dict(image=str(tmp_path / "empty")), ["empty", "no pictures"]),
            (dict(image=str(tmp_path / "broken")), ["broken", "none"]),
            (dict(out_dir=str(tmp_path / "file" / "out")), ["out_dir", "file"])]:
        with pytest.raises(config.UserError) as error:
            visualize.main(asked(saved, **{"out_dir": str(tmp_path), **changes}))
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value
    visualize.main(asked(saved, out_dir=str(tmp_path), command="a " * 14))        # as many as fit


def test_the_script_ends_with_status_2_and_one_line(saved, tmp_path, monkeypatch, capsys):
    given = [f"--image={tmp_path / 'none.png'}", "--command=is there a bus", f"--checkpoint={saved[0] / 'best.pt'}",
             "--device=cpu", "--max_new_tokens=8"]
    done = subprocess.run([sys.executable, visualize.__file__, *given], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["visualize.py", "--image=x.png"])
    with pytest.raises(SystemExit) as stop:
        config.run(visualize.main, visualize.__doc__)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- ablations ----

def ablated(drawn, name, **changes):
    """(settings, maker of the model, maker of the commands) of a variant of a small model."""
    cfg = small_run(drawn, "unused", **{**dict(vision_layers=2, text_layers=2, vision_heads=2, text_heads=4,
                                               text_kv_heads=2, text_head_dim=8), **changes})
    variant = ablate.variants(cfg)[name]
    return ablate.settings_of(cfg, variant, "unused", 0), variant.model, variant.data


def variant_model(drawn, name, **changes):
    cfg, make, _ = ablated(drawn, name, **changes)
    torch.manual_seed(0)
    return make(cfg, len(Tokenizer(commands.vocabulary()))).eval()


def test_every_variant_learns_and_shows_where_it_looks(drawn):
    """None is the same as "full", each has a gradient everywhere, and maps that sum to 1."""
    seen, plain = {}, train.Data(drawn.cfg, drawn.meta, "train")
    for name in ablate.variants(DEFAULTS):
        cfg, make, make_data = ablated(drawn, name)
        data = plain if make_data is train.Data else make_data(cfg, drawn.meta, "train")
        data.cfg = cfg
        torch.manual_seed(0)
        model, batch = make(cfg, len(data.tokenizer)), data.batch(0, 2)
        loss = train.batch_loss(model, None, batch, cfg, 100.0)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), name
        model.eval()
        images = batch.images[:, :3]
        with torch.no_grad():
            _, attn = model(images, batch.tokens, return_attn=True)
        real = batch.tokens.flatten(0, 1) != tokenizer.PAD
        side = cfg.image_size // cfg.patch_size
        assert attn["cross"].shape[-1] == side * side
        total = attn["cross"].sum(-1).transpose(2, 3)[:, real]
        close(total, torch.ones_like(total), 1e-4)
        settings = tuple(sorted((k, str(v)) for k, v in vars(cfg).items()))
        seen[name] = (settings, round(loss.item(), 5))
    assert len(set(seen.values())) == len(seen)


def test_without_cross_attention_every_word_gets_the_mean_of_the_values(drawn):
    model = variant_model(drawn, "no_cross")
    cross = model.decoder.blocks[0].cross
    vision, asks = torch.randn(2, 16, model.cfg.text_dim), torch.randn(2, 3, model.cfg.text_dim)
    k, v = cross.keys_values(vision)
    mean = v.mean(2).repeat_interleave(cross.shared, 1).flatten(1)                # (N, H*d)
    close(cross(asks, k, v), cross.out(mean)[:, None].expand(-1, 3, -1))


def test_a_blind_model_sees_nothing(drawn):
    model, tokens = variant_model(drawn, "blind"), words(2, 3, 8)
    size = model.cfg.image_size
    with torch.no_grad():
        assert torch.equal(model(pictures(2, size), tokens), model(pictures(2, size) + 1, tokens))


def test_the_prefix_equals_one_stream_of_patches_and_words(drawn):
    """By hand, in one sequence: patches see one another, words see all patches and the words before."""
    model = variant_model(drawn, "prefix")
    decoder, P, T = model.decoder, 9, 6
    tokens, vision = words(2, T), torch.randn(2, P, model.cfg.text_dim)
    positions = torch.arange(P + T)
    cos, sin = rope_tables(P + T, model.cfg.text_head_dim, model.cfg.rope_theta)
    rope = [t[positions].repeat(2, 1)[:, None] for t in (cos, sin)]
    allowed = (positions < P)[None] | (positions[None] <= positions[:, None]) & (positions >= P)[:, None]
    mask = torch.zeros(2, 1, P + T, P + T).masked_fill(~allowed, float("-inf"))
    packing = Packing(torch.arange(2 * (P + T)), 2, P + T)
    x = torch.cat((vision, decoder.embedding(tokens) * math.sqrt(model.cfg.text_dim)), 1).flatten(0, 1)
    for block in decoder.blocks:
        h = block.norm1(x)
        k, v = block.attn.keys_values(h, rope, packing)
        x = x + Attention.forward(block.attn, h, k, v, mask, rope, packing)
        x = x + block.ffn(block.norm3(x))
    attn = {"self": [], "cross": []}
    close(decoder(tokens, vision, attn=attn), decoder.norm(x).view(2, P + T, -1)[:, P:], 1e-4)
    assert attn["cross"][0].shape == (2, model.cfg.text_heads, T, P) and attn["self"][0].shape[-1] == T


def test_positions_of_the_text_are_absent_or_learned(drawn):
    """Without any, one layer sees which words came before, not in what order."""
    for name, tells in (("full", True), ("no_rope", False), ("learned_positions", True)):
        model = variant_model(drawn, name, text_layers=1)
        with torch.no_grad():
            a, b = model.decoder(torch.tensor([[7, 8, 9, 10], [8, 7, 9, 10]]))[:, -1]
        assert ((a - b).abs().max() > 1e-3) == tells, name


def test_without_places_patches_only_know_what_they_show(drawn):
    model = variant_model(drawn, "no_positions", stem="patch")
    size = model.cfg.image_size
    image, half = pictures(1, size), size // 2
    moved = torch.roll(image, half, 3)
    with torch.no_grad():
        a, b = (model.encode(x).unflatten(1, (size // model.cfg.patch_size,) * 2) for x in (image, moved))
    close(a.roll(half // model.cfg.patch_size, 2), b, 1e-4)


def test_the_boxes_of_a_batch_are_those_of_its_pictures(drawn):
    cfg, _, make_data = ablated(drawn, "boxes", flip=1.0, jitter=0.1)
    batch, plain = make_data(cfg, drawn.meta, "train").batch(0, 8), train.Data(cfg, drawn.meta, "train").batch(0, 8)
    close(batch.images[:, :3], plain.images)
    data, size = train.Data(cfg, drawn.meta, "train"), cfg.image_size
    order = np.random.default_rng([cfg.seed, 0]).permutation(len(data.pictures))[:8]
    for masks, k in zip(batch.images[:, 3:] > 0.5, order):
        labels = drawn.frames[data.pictures[k]]["labels"]
        for c, category in enumerate(CATEGORIES):
            own = [label for label in labels if label["category"] == category]
            assert np.array_equal(masks[c].numpy()[:, ::-1], evaluate.cover(own, size, size).reshape(size, size) > 0)
    cfg, _, make_data = ablated(drawn, "random_boxes", flip=1.0)
    moved = make_data(cfg, drawn.meta, "train").batch(0, 8).images[:, 3:] > 0.5
    assert torch.equal(moved.sum((2, 3)), (batch.images[:, 3:] > 0.5).sum((2, 3)))
    assert not torch.equal(moved, batch.images[:, 3:] > 0.5)


def test_the_loss_of_boxes_is_the_attention_that_misses_them(drawn):
    cfg, make, make_data = ablated(drawn, "boxes")
    data = make_data(cfg, drawn.meta, "train")
    torch.manual_seed(0)
    model, batch = make(cfg, len(data.tokenizer)), data.batch(0, 4)
    with torch.no_grad():
        vision = model.encode(batch.images)
        with_boxes = model.decode(vision, batch.tokens, batch.targets)
        plain, attn = VLM.decode(model, vision, batch.tokens, batch.targets, attn={"self": [], "cross": []})
        maps, missed = attn["cross"].mean((0, 2)).unflatten(0, batch.tokens.shape[:2]), []
        side = cfg.image_size // cfg.patch_size
        for b, k, t in np.ndindex(*batch.tokens.shape):
            word = data.tokenizer.words[batch.tokens[b, k, t]]
            for c, category in enumerate(CATEGORIES):
                mask = (batch.images[b, 3 + c] > 0.5).unflatten(0, (side, -1)).unflatten(2, (side, -1)).any(3).any(1)
                if word in evaluate.NAMED[category] and mask.any():
                    missed.append(-math.log(maps[b, k, t][mask.flatten()].sum()))
    assert missed and with_boxes - plain == pytest.approx(model.weight * np.mean(missed), rel=1e-4)


def test_answers_only_teach_no_reason_and_all_descriptions(drawn):
    cfg, _, make_data = ablated(drawn, "no_reasons")
    batch, plain = make_data(cfg, drawn.meta, "train").batch(0, 8), train.Data(cfg, drawn.meta, "train").batch(0, 8)
    question = ((plain.targets == tokenizer.YES) | (plain.targets == tokenizer.NO)).any(-1)
    assert torch.equal(batch.targets[~question], plain.targets[~question]) and (~question).any()
    assert ((batch.targets[question] >= 0).sum(-1) == 1).all() and (plain.targets[question] >= 0).sum(-1).min() > 1


def test_unbalanced_questions_are_true_and_give_their_answer_away(drawn):
    cfg, _, make_data = ablated(drawn, "no_balance")
    data, plain = make_data(cfg, drawn.meta, "train"), train.Data(cfg, drawn.meta, "train")
    assert np.array_equal(np.bincount(data.index[:, 0]), np.bincount(plain.index[:, 0]))
    items = ablate.unbalanced_items(cfg.data_dir, tuple(sorted((k, getattr(cfg, k)) for k in config.DATA_KEYS)))
    asked = [i for i in items if i["answer"] is not None]
    for item in asked[::50]:
        truth = question_of(item).truth(drawn.views[item["picture"]])
        assert truth == (TRUE if item["answer"] else FALSE) and not question_of(item).held_out
    share = np.mean([i["answer"] for i in asked])
    assert abs(share - 0.5) > 0.1 and share == pytest.approx((data.index[:, 3] == 1).sum() / len(asked))
    prompts = [data.tokens[r, :data.index[r, 1]].tolist() for r in (0, 5)]
    assert prompts == [data.tokenizer.prompt(items[r]["command"]) for r in (0, 5)]
    assert np.array_equal(make_data(cfg, drawn.meta, "val").index, train.Data(cfg, drawn.meta, "val").index)


def test_a_shared_first_stage_is_what_the_run_itself_would_have_learned(tmp_path):
    cfg = made_up(tmp_path, max_steps=10, see_steps=6, tag_weight=1.0, eval_every=5, vision_layers=1, text_layers=1)
    variant = ablate.variants(cfg)["mqa"]
    train.train(changed(cfg, out_dir=str(tmp_path / "full")), seen=tmp_path / "seen.pt")
    alone, shared = (ablate.settings_of(cfg, variant, tmp_path / kind, cfg.seed) for kind in ("alone", "shared"))
    train.train(alone, variant.model)
    Path(shared.out_dir).mkdir()
    ablate.begin(shared, variant, train.load_checkpoint(tmp_path / "seen.pt"))
    shared.resume = True
    train.train(shared, variant.model)
    assert train.checksum(last_of(alone)["model"]) == train.checksum(last_of(shared)["model"])
    assert logged(alone)[-1] == logged(shared)[-1]


def results_of(**differences):
    """Results of runs, {(variant, seed): measures}, whose accuracies differ from those of "full" by these."""
    full = [90.0, 91.5, 90.5, 92.0, 89.5, 91.0]
    made = {("full", s): a for s, a in enumerate(full)}
    made.update({(name, s): full[s] + d for name, own in differences.items() for s, d in enumerate(own)})
    return {key: {**dict.fromkeys(ablate.MEASURES, 1.0), "accuracy": a} for key, a in made.items()}


def test_the_table_pairs_by_seed_and_corrects_for_all_tests():
    losses = dict(blind=[-40.0, -41, -40.5], mqa=[0.5, -0.5, 0.1], no_cross=[-3.0, -3.2, -2.9, -3.1, -3.0, -3.3])
    known = ablate.variants(DEFAULTS)
    names = ["full", *losses, "entropy", "mha"]
    table = ablate.make_table(DEFAULTS, known, names, results_of(entropy=[0.2], **losses), {"mha": "seed 0: bad | x"})
    rows = {row["variant"]: row["accuracy"].get("difference") for row in table["rows"]}
    assert rows["full"] is None and table["tests"] == 4 and rows["mha"] == dict(n=0, mean=None)
    scatter = dict(zip([*losses, "entropy"], ablate.moderated_scatter([*losses.values(), [0.2]])))
    for name, d in [*losses.items(), ("entropy", [0.2])]:
        (sd, df), row = scatter[name], rows[name]
        reach = evaluate.t_within(0.95, df) * sd / math.sqrt(len(d))
        assert (row["mean"], row["low"], row["high"]) == pytest.approx(
            (np.mean(d), np.mean(d) - reach, np.mean(d) + reach), abs=2e-3)
        assert ("p_sign" in row) == (len(d) > 1)
        if len(d) > 1:
            tests = evaluate.sign_flip_test(d), evaluate.t_test(d)[3]
            assert (row["p_sign"], row["p_t"]) == pytest.approx(tests, abs=1e-3)
    tested = [rows[n] for n in names[1:-1]]
    assert [row["p_holm"] for row in tested] == pytest.approx(evaluate.holm([row["p"] for row in tested]), abs=1e-3)
    assert [rows[n]["verdict"] for n in losses] == ["worse", "no difference shown", "worse"]
    text = ablate.markdown(table)
    shown = "| 3 | 50.2 | -40.5 [{low:+.1f}, {high:+.1f}] |".format(**rows["blind"])
    assert shown in text and "failed, seed 0: bad / x" in text
    assert len({line.count("|") for line in text.split("\n\n")[0].splitlines()}) == 1


def test_the_detectable_difference_is_found_in_80_of_100_comparisons():
    rng, n, spread = np.random.default_rng(0), 6, 2.0
    drawn = rng.normal(0, spread, (300, n))
    (scatter, df), *_ = ablate.moderated_scatter(drawn[:40].tolist())
    assert df == 200 and scatter == pytest.approx(spread, rel=0.15)               # all scatter alike: one scatter
    effect = ablate.compared(drawn[0], scatter, df)["detectable"]
    found = np.mean([ablate.compared(d + effect, scatter, df)["p"] < 0.05 for d in drawn])
    assert found == pytest.approx(0.8, abs=0.07)


def test_a_variants_scatter_is_drawn_towards_that_of_all():
    rng, prior, common = np.random.default_rng(1), 6, 2.0
    variances = prior * common / rng.chisquare(prior, 4000)                       # Smyth's model of variances
    sizes = np.resize([3, 6], 4000)
    groups = [rng.normal(0, math.sqrt(v), n).tolist() for v, n in zip(variances, sizes)] + [[1.0], []]
    *found, one, none = ablate.moderated_scatter(groups)
    for (sd, df), own, n in zip(found[:50], groups, sizes):
        assert df == pytest.approx(prior + n - 1, rel=0.2)
        assert sd ** 2 == pytest.approx((prior * common + (n - 1) * np.var(own, ddof=1)) / (prior + n - 1), rel=0.15)
    assert one == none and one[0] ** 2 == pytest.approx(common, rel=0.1) and one[1] == pytest.approx(prior, rel=0.2)
    within = {n: evaluate.t_within(0.95, prior + n - 1) for n in (3, 6)}
    false = [abs(np.mean(g)) / sd * math.sqrt(n) > within[n] for g, (sd, _), n in zip(groups, found, sizes)]
    assert np.mean(false) == pytest.approx(0.05, abs=0.012)
    assert ablate.moderated_scatter([[1.0, 3.0], [2.0]])[0] == (math.sqrt(2), 1)
    assert ablate.moderated_scatter([[2.0, 2.0], [1.0, 1.0, 1.0]])[0][1] == 0     # none scatters: nothing to test by


def small_loop(drawn, out, **changes):
    """Settings of a loop of runs of a second."""
    return small_run(drawn, out, eval_every=2, seeds=1, sample_items=40, probe_items=5, dpi=40, see_steps=2, **changes)


def test_a_loop_that_was_killed_goes_on_and_a_failure_is_a_row(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "save", lambda drawn, path, dpi: visualize.plt.close("all"))
    cfg, saves, trained = small_loop(drawn, tmp_path, variants="mqa,prefix"), [], []

    def save(path, content, real=train.save_checkpoint):
        real(path, content)
        saves.append(path)
        if Path(path) == tmp_path / "mqa-1337" / "last.pt" and content["step"] == 2 and len(saves) > 4:
            raise Killed
    monkeypatch.setattr(train, "save_checkpoint", save)
    with pytest.raises(Killed):
        ablate.ablate(cfg)
    assert (tmp_path / "full-1337" / "result.json").exists() and (tmp_path / "mqa-1337" / "last.pt").exists()
    monkeypatch.setattr(train, "save_checkpoint", lambda path, content, real=save: real(path, content))

    def again(settings, *parts, real=train.train):
        trained.append((Path(settings.out_dir).name, settings.resume))
        if "prefix" in settings.out_dir:
            raise ValueError("no luck")
        return real(settings, *parts)
    monkeypatch.setattr(train, "train", again)
    saves[:] = []
    table = ablate.ablate(cfg)
    assert trained == [("mqa-1337", True), ("prefix-1337", True)]
    assert [row["seeds"] for row in table["rows"]] == [[1337], [1337], []]
    assert "no luck" in table["rows"][2]["failed"] and "no luck" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "table.json").read_text(encoding="utf-8")) == table

    def interrupted(settings, *parts):
        trained.append(Path(settings.out_dir).name)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", interrupted)
    trained[:] = []
    table = ablate.ablate(cfg)
    assert trained == ["prefix-1337"] and [row["seeds"] for row in table["rows"]] == [[1337], [1337], []]
    assert "2 of 3 runs are there" in capsys.readouterr().out


def test_speeds_are_shares_of_that_of_full(drawn, monkeypatch):
    cfg, seconds, frozen = small_run(drawn, "unused"), iter((5, 5, 7, 2, 4, 1)), []        # the first three warm up

    def update(model, tagger, optimizer, scaler, micros, total, read, dtype, cfg, clock):
        assert read and total == train.total_weight(micros, cfg)
        frozen.append(not any(p.requires_grad for p in model.vision.parameters()))
        clock.seconds["backward"] += next(seconds)
    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(train.time, "perf_counter", lambda: 0.0)
    found = ablate.speeds(cfg, ablate.variants(cfg), ["full", "mha", "frozen_vision"], drawn.meta, rounds=2)
    assert found == {"full": 100, "mha": 50, "frozen_vision": 200} and frozen == [False, False, True] * 2


def test_an_unknown_variant_is_named_with_the_nearest():
    with pytest.raises(UserError, match="no variant 'no_rop', did you mean 'no_rope'"):
        ablate.chosen_names(changed(DEFAULTS, variants="mqa,no_rop"), ablate.variants(DEFAULTS))
    assert ablate.chosen_names(changed(DEFAULTS, variants="mqa"), ablate.variants(DEFAULTS)) == ["full", "mqa"]


def test_a_budget_scales_the_updates_of_all_runs_alike_and_is_kept(drawn, tmp_path, monkeypatch, capsys):
    cfg = changed(small_loop(drawn, tmp_path), max_steps=1000, see_steps=500, budget_minutes=10.0)
    monkeypatch.setattr(train, "train", lambda cfg: Path(cfg.out_dir).mkdir() or dict(seconds=cfg.max_steps / 10))
    planned = ablate.planned(cfg, 12, tmp_path)             # 600 s / 12 runs / 0.1 s an update
    assert (planned.max_steps, planned.see_steps) == (500, 250)
    monkeypatch.setattr(train, "train", killed)
    assert ablate.planned(cfg, 12, tmp_path) == planned
    capsys.readouterr()


# ---- robustness ----

def test_the_control_of_a_change_is_the_same_change_elsewhere():
    rng, picture = np.random.default_rng(0), np.full((16, 16, 3), 128, np.uint8)
    for kind in ("noise", "blur", "brightness", "jpeg"):
        sizes = []
        noisy = rng.integers(60, 190, (96, 96, 3)).astype(np.uint8)
        for strength in range(5):
            changed_picture = ablate.disturb(kind, strength, noisy, rng)
            assert changed_picture.shape == noisy.shape and changed_picture.dtype == np.uint8
            sizes.append(float(np.abs(changed_picture.astype(int) - noisy).mean()))
        assert sizes == sorted(sizes) and sizes[0] > 0, (kind, sizes)
    changed_picture = picture.copy()
    changed_picture[:4] = 200
    moved = ablate.scattered(picture, changed_picture, rng)
    assert (moved == 200).sum() == (changed_picture == 200).sum() and not np.array_equal(moved, changed_picture)


@pytest.fixture(scope="module")
def shaken(drawn, tmp_path_factory):
    """A small untrained model, saved and loaded, that can be asked about the drawn data."""
    root = tmp_path_factory.mktemp("robust")
    cfg = small_run(drawn, root, vision_layers=1, text_layers=2, bootstrap=20, probe_items=6, dpi=40)
    torch.manual_seed(0)
    words = commands.vocabulary()
    train.save_checkpoint(root / "best.pt", dict(
        format=train.FORMAT, model=VLM(cfg, len(Tokenizer(words))).state_dict(), config=vars(cfg), words=words,
        mean=drawn.meta["mean"], std=drawn.meta["std"], step=0, data_hash=config.data_hash(cfg)))
    return evaluate.Subject(cfg)


def test_watching_equals_asking_and_looking(drawn, shaken):
    asked = evaluate.Questions(shaken, drawn.meta, "test", 30)
    shown = [np.asarray(asked.data.images[p]) for p in asked.picture]
    odds, maps = ablate.watch(shaken, shown, asked.prompts, batch=7)
    shaken.dtype = torch.float32
    np.testing.assert_allclose(odds, asked.odds(shaken), atol=1e-4)
    np.testing.assert_allclose(maps, [c[:, :, -1].mean((0, 1)) for c in shaken.look(asked.jobs())], atol=1e-5)


def test_an_attack_stays_in_its_size_and_hurts_more_than_chance(drawn, shaken):
    asked = evaluate.Questions(shaken, drawn.meta, "test", 30)
    shown, size = [np.asarray(asked.data.images[p]).copy() for p in asked.picture], 8
    for picture in shown:                                   # some pixels can only get darker, some only lighter
        picture[:8], picture[8:16] = 255, 0
    clean = shaken.images(np.stack(shown))
    mean, std = (torch.tensor(drawn.meta[k]).view(3, 1, 1) for k in ("mean", "std"))
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], clean.shape).astype(np.float32))
    right = lambda pictures: np.mean(np.where(asked.truth, 1, -1) * ablate.watch(          # noqa: E731
        shaken, pictures, asked.prompts)[0])
    odds = [right(clean + size / 255 / std * signs)]
    for steps in (1, 7):
        hurt = ablate.attack(shaken, shown, asked.prompts, asked.truth, size, steps)
        assert ((hurt - clean).abs() * std * 255).max() <= size + 1e-3
        assert -1e-5 <= (hurt * std + mean).min() and (hurt * std + mean).max() <= 1 + 1e-5
        odds.append(right(hurt))
    assert odds[0] > odds[1] > odds[2]


def test_commands_are_misworded_as_told():
    rng, question, command = random.Random(0), Question("exists_at", "bus", "left"), "is there a bus on the left"
    for _ in range(20):
        for kind, mine in (("typing error in a word that matters", {"bus", "left"}),
                           ("typing error in another word", {"is", "there", "a", "on", "the"})):
            text = ablate.misworded(question, command, kind, rng)
            wrong = [a for a, b in zip(command.split(), text.split()) if a != b]
            assert len(wrong) == 1 and wrong[0] in mine and len(text.split()) == len(command.split())
        swapped = ablate.misworded(question, command, "two neighbouring words exchanged", rng)
        assert sorted(swapped.split()) == sorted(command.split()) and swapped != command
    no_object = ablate.misworded(Question("stop", "", ""), "must we stop", "typing error in a word that matters", rng)
    assert no_object is None


def test_robustness_writes_every_study(shaken, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "CAMERAS", dict(list(ablate.CAMERAS.items())[:1]))
    monkeypatch.setattr(visualize, "save", lambda drawn, path, dpi: visualize.plt.close("all"))
    monkeypatch.setattr(prepare, "WEATHERS", prepare.WEATHERS[:2])
    out = Path(shaken.cfg.out_dir) / "not" / "there yet"
    best = str(Path(shaken.cfg.out_dir) / "best.pt")
    page = ablate.robustness(changed(shaken.cfg, checkpoint=best, out_dir=str(out)))
    assert [*page["disturbed"], *page["attacked"]] == ["noise", "blur", "brightness", "jpeg", "fgsm", "pgd"]
    assert all(len(entries) == 5 for entries in [*page["disturbed"].values(), *page["attacked"].values()])
    assert page["clean"]["cosine"]["value"] == pytest.approx(1, abs=1e-4) and set(ablate.CAMERAS) <= set(page["scenes"])
    assert page["scenes"]["as drawn"] == page["clean"] and "no real frames" in capsys.readouterr().out
    text = (out / "robustness.md").read_text(encoding="utf-8")
    assert text.count("| noise ") == 5 and "FGSM" in text
    assert json.loads((out / "robustness.json").read_text(encoding="utf-8")) == page
