"""Which parts matter: the model trained again and again, each time with one part changed; then, how robust it is.

- A variant is a name, the settings it changes and, where it needs other code, what makes its model or its commands.
  All of that code stands here: model.py stays one model. One loop trains them all, everything else being the same.
- Seed after seed, so that an interrupted loop leaves a whole table of fewer seeds. Given again, the same command goes
  on: finished runs are kept, an unfinished one resumes. A run that fails is a row of the table, and stops nothing.
- Differences to "full" are paired by seed and made on the same questions; interval, tests, and what could be seen.
- --robustness=True trains nothing: it disturbs the pictures and the commands of a checkpoint, each disturbance beside
  a control of the same strength.

    python ablate.py                                  all variants, by the preset "ablation"
    python ablate.py --variants=no_rope,mqa --seeds=3
    python ablate.py --budget_minutes=60              all runs together, by scaling the updates of all alike
    python ablate.py --robustness=True                of out/default/best.pt
    python ablate.py --robustness=True --bdd_dir=PATH   and on real frames

Writes to out_dir: a folder for each run, table.json (every figure), table.md, figures; or robustness.json and .md.

References: PaliGemma's prefix arXiv:2407.07726, learned positions 1706.03762, FGSM 1412.6572, PGD 1706.06083.

Shapes: B pictures, K commands for each, N = B*K, T tokens, M real tokens, P patches, C categories, n questions.
"""
import contextlib
import copy
import functools
import io
import json
import math
import random
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import commands
import config
import evaluate
import prepare
import train
import visualize
from commands import CATEGORIES, UNSURE, QUESTIONS, TEMPLATES, View
from config import UserError
from evaluate import Questions, Subject
from model import VLM, Attention, Decoder, DecoderBlock, GatedFFN, Packing, RMSNorm, pick_device, rope_tables
from tokenizer import IGNORE, NO, YES
from train import Data

# ---- models that settings cannot make: each a VLM, changed ----


def changed(change):
    """What makes a VLM, then changes it by change(model), with initial weights as VLM's."""
    def make(cfg, vocab_size):
        model = VLM(cfg, vocab_size)
        change(model)
        model.init_weights()
        return model
    return make


def recast(modules, kind):
    """Let modules behave as `kind`, a subclass of what they are: their weights stay."""
    for module in modules:
        module.__class__ = kind


def exchange(model, kind, make):
    """Put make(module) in the place of every module of class `kind`."""
    for name, module in list(model.named_modules()):
        if type(module) is kind:
            model.replace(name, make(module))


class Blind(VLM):
    """Every picture is grey."""

    def encode(self, images, collect=None):
        return super().encode(torch.zeros_like(images), collect)


class Pooled(Attention):
    """The mean of the values, whoever asks: with queries of 0 all patches weigh the same."""

    def forward(self, x, k, v, *args, **kwargs):
        return super().forward(x, torch.zeros_like(k), v, *args, **kwargs)


class WithoutRope(DecoderBlock):
    def forward(self, x, vision, mask, rope, *rest):
        return super().forward(x, vision, mask, None, *rest)


class LearnedPositions(WithoutRope):
    """A learned vector for each position, added once to the words. They stand where the table of cosines stood."""

    def forward(self, x, vision, mask, rope, *rest):
        return super().forward(x + rope[0][:, 0] if self.layer == 0 else x, vision, mask, rope, *rest)


def learn_positions(model):
    recast(model.decoder.blocks, LearnedPositions)
    del model.decoder.cos
    model.decoder.cos = nn.Parameter(0.5 * torch.randn(model.cfg.max_text, model.cfg.text_dim))


def forget_places(model):
    positions = model.vision.positions
    del model.vision.positions
    model.vision.register_buffer("positions", torch.zeros_like(positions), persistent=False)


class PlainFFN(nn.Module):
    """down(gelu(up(x))), with as many weights as a gated FFN of hidden width 2/3 of its own."""

    def __init__(self, gated):
        super().__init__()
        hidden, dim = 3 * gated.down.in_features // 2, gated.down.out_features
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class PrefixAttention(Attention):
    """Self-attention of the text with the keys and values of the picture, kept in `prefix`, before its own."""
    prefix = None

    def forward(self, x, k, v, mask=None, *args, **kwargs):
        if self.prefix is not None:
            repeats = len(k) // len(self.prefix[0])
            k, v = (torch.cat((old.repeat_interleave(repeats, 0), new), 2) for old, new in zip(self.prefix, (k, v)))
            mask = F.pad(mask, (k.shape[2] - mask.shape[-1], 0))                  # every word sees all patches
        return super().forward(x, k, v, mask, *args, **kwargs)


class PrefixDecoder(Decoder):
    """Patches before the text in one stream, as PaliGemma: patches see one another, words see patches and words before.

    No patch sees a word, so a picture goes through the blocks once for all its commands, at positions -P to -1.
    """

    def forward(self, tokens, vision=None, cache=None, attn=None):
        B, P, _ = vision.shape
        x, packing = vision.flatten(0, 1), Packing(torch.arange(B * P, device=vision.device), B, P)
        attention = self.blocks[0].attn
        cos, sin = (t[1:].flip(0).repeat(B, 1)[:, None].to(x.device)
                    for t in rope_tables(P + 1, attention.head_dim, self.theta))
        rope = cos, -sin                                                          # cos(-a) = cos a, sin(-a) = -sin a
        for block in self.blocks:
            block.attn.prefix, h = None, block.norm1(x)
            k, v = block.attn.keys_values(h, rope, packing)                       # (B, G, P, d) each
            x = x + block.attn(h, k, v, None, rope, packing)
            x = x + block.ffn(block.norm3(x))
            block.attn.prefix = k, v
        hidden = super().forward(tokens, None, cache, attn)
        if attn is not None:
            both = attn["self"]                                                   # (N, H, T, P + T)
            attn["cross"] = [w[..., :P] / w[..., :P].sum(-1, keepdim=True) for w in both]
            attn["self"] = [w[..., P:] for w in both]
        return hidden


def put_before(model):
    recast([model.decoder], PrefixDecoder)
    model.decoder.theta = model.cfg.rope_theta
    for block in model.decoder.blocks:
        recast([block.attn], PrefixAttention)
        del block.norm2, block.cross


class Pointed(VLM):
    """Cross-attention taught to look at the boxes of the object that a word names, by -log of its mass in them.

    The pictures of training have a channel for each category beyond the three colours, 1 inside its boxes (`Boxes`).
    """
    weight, masks = 0.3, None

    def __init__(self, cfg, vocab_size):
        super().__init__(cfg, vocab_size)
        words = json.loads((Path(cfg.data_dir) / "vocab.json").read_text(encoding="utf-8"))
        self.named = torch.tensor([next((c for c, name in enumerate(CATEGORIES) if word in evaluate.NAMED[name]), -1)
                                   for word in words])                            # (V,)

    def encode(self, images, collect=None):
        self.masks = images[:, 3:] if images.shape[1] > 3 else None
        return super().encode(images[:, :3], collect)

    def decode(self, vision, tokens, targets=None, loss_fn=F.cross_entropy, attn=None):
        if targets is None or self.masks is None:
            return super().decode(vision, tokens, targets, loss_fn, attn)
        loss, attn = super().decode(vision, tokens, targets, loss_fn, {"self": [], "cross": []})
        # brightness and contrast were changed in these channels too
        cover = (F.avg_pool2d((self.masks > 0.5).float(), self.cfg.patch_size) > 0).flatten(2).float()    # (B, C, P)
        named = self.named.to(tokens.device)[tokens]                                                      # (B, K, T)
        there = cover.sum(-1).gather(1, named.clamp(min=0).flatten(1)).view_as(named) > 0
        b, k, t = ((named >= 0) & there).nonzero(as_tuple=True)
        maps = attn["cross"].mean((0, 2)).unflatten(0, tokens.shape[:2])[b, k, t]                         # (m, P)
        inside = (maps * cover[b, named[b, k, t]]).sum(-1)
        return loss - self.weight * inside.clamp(min=1e-6).log().sum() / max(len(b), 1)


# ---- commands of training that settings cannot make ----

class AnswersOnly(Data):
    """No reason is learned, only [YES] and [NO]; descriptions stay."""

    def batch(self, position, size):
        batch = super().batch(position, size)
        answers = (batch.targets == YES) | (batch.targets == NO)
        batch.targets = batch.targets.masked_fill(answers.any(-1, keepdim=True) & ~answers, IGNORE)
        return batch


@functools.lru_cache(maxsize=1)
def unbalanced_items(folder, cfg_items):
    """Training commands as they come: questions drawn by the shares of their templates alone, whatever the answer."""
    cfg = type("Settings", (), dict(cfg_items))
    rng, kept, number = random.Random(cfg.scene_seed), [q for q in QUESTIONS if not q.held_out], {}
    for question in kept:
        number[question.template] = number.get(question.template, 0) + 1
    items, pictures = prepare.read_items(folder, "train"), {}
    for item in items:
        pictures.setdefault(item["picture"], []).append(item)
    made = []
    for frame in prepare.Frames(Path(folder) / "frames.jsonl"):
        own = pictures.get(frame["index"], [])
        if own:
            view = View(frame, cfg)
            known = [q for q in kept if q.truth(view) != UNSURE]
            asked = rng.choices(known, [TEMPLATES[q.template].share / number[q.template] for q in known],
                                k=sum(item["answer"] is not None for item in own))
            made += [commands.make_item(frame["index"], q, view, rng) for q in asked]
            made += [item for item in own if item["answer"] is None]
    return made


class Unbalanced(Data):
    """As many questions a picture as ever, but YES and NO are as frequent as the scenes make them."""

    def __init__(self, cfg, meta, name):
        super().__init__(cfg, meta, name)
        if name != "train":
            return
        items = unbalanced_items(cfg.data_dir, tuple(sorted((k, getattr(cfg, k)) for k in config.DATA_KEYS)))
        self.tokens, self.index = prepare.packed(items, self.tokenizer)
        self.pictures, self.starts = np.unique(self.index[:, 0], return_index=True)
        self.ends = np.append(self.starts[1:], len(self.index))


class WithBoxes:
    """Pictures with a channel for each category, 255 inside its boxes. moved: each channel shifted around at random."""

    def __init__(self, images, folder, moved):
        self.images, self.frames, self.moved = images, prepare.Frames(Path(folder) / "frames.jsonl"), moved

    def __getitem__(self, index):
        size = self.images.shape[1]
        masks = np.zeros((size, size, len(CATEGORIES)), np.uint8)
        for label in self.frames[int(index)]["labels"]:
            if label["category"] in CATEGORIES:
                x1, y1, x2, y2 = (label["box2d"][k] for k in ("x1", "y1", "x2", "y2"))
                masks[max(int(y1), 0):math.ceil(y2), max(int(x1), 0):math.ceil(x2),
                      CATEGORIES.index(label["category"])] = 255
        if self.moved:
            shifts = np.random.default_rng(int(index)).integers(size, size=(len(CATEGORIES), 2))
            masks = np.stack([np.roll(masks[:, :, c], s, (0, 1)) for c, s in enumerate(shifts)], -1)
        return np.concatenate((self.images[index], masks), -1)


class Boxes(Data):
    moved = False

    def __init__(self, cfg, meta, name):
        super().__init__(cfg, meta, name)
        if name == "train":
            self.images = WithBoxes(self.images, cfg.data_dir, self.moved)
            self.mean, self.std = self.mean + [0.0] * len(CATEGORIES), self.std + [1.0] * len(CATEGORIES)


class MovedBoxes(Boxes):
    moved = True


# ---- the variants ----

Variant = namedtuple("Variant", "text settings model data maps shared")
# text: what is changed; settings: those that differ from "full"; model, data: what makes them; maps: whether its maps
# can be read as looking; shared: its first stage is that of "full"


def variants(cfg):
    """{name: Variant} of the settings of "full"."""
    def of(text, model=VLM, data=Data, maps=True, shared=False, **settings):
        return Variant(text, settings, model, data, maps, shared)
    reads = functools.partial(of, shared=True)              # differs in reading only
    half = {k: getattr(cfg, k) // 2 for k in ("vision_dim", "text_dim", "vision_ffn_dim", "text_ffn_dim", "stem_width",
                                              "text_head_dim")}
    # an update of the first stage costs a third of one of the second
    unseen = dict(tag_weight=0.0, max_steps=cfg.max_steps - train.see_updates(cfg) * 2 // 3)
    return {                                                # those that matter most first
        "full": of("nothing changed"),
        "no_cross": reads("no cross-attention: the mean of all patches added to each word",
                       changed(lambda m: recast([b.cross for b in m.decoder.blocks], Pooled)), maps=False),
        "blind": of("every picture grey", Blind, maps=False),
        "no_stage": of("no first stage, nor its loss: text alone, for as long", **unseen),
        "prefix": reads("patches before the text in one stream instead of cross-attention", changed(put_before)),
        "no_rope": reads("no positions in the text", changed(lambda m: recast(m.decoder.blocks, WithoutRope))),
        "boxes": reads("cross-attention taught where the boxes are", Pointed, Boxes),
        "random_boxes": reads("the same with boxes moved at random", Pointed, MovedBoxes),
        "no_reasons": reads("no reasons: of an answer only [YES] or [NO] is learned", data=AnswersOnly),
        "no_positions": of("no positions in the vision encoder", changed(forget_places)),
        "fewer_layers": of("half as many layers, in vision and text", vision_layers=max(cfg.vision_layers // 2, 1),
                           text_layers=max(cfg.text_layers // 2, 1)),
        "one_head": of("one head of the same total width, in vision and text", vision_heads=1, text_heads=1,
                       text_kv_heads=1, text_head_dim=cfg.text_heads * cfg.text_head_dim),
        "mqa": reads("one key/value head for all query heads", text_kv_heads=1),
        "mha": reads("a key/value head for each query head", text_kv_heads=cfg.text_heads),
        "no_describe": reads("no descriptions to read, more questions instead", descriptions_per_image=0),
        "frozen_vision": of("vision encoder left random; text alone, for as long", freeze_vision_steps=-1, **unseen),
        "no_augmentation": of("no flips, no jitter", flip=0.0, jitter=0.0),
        "more_jitter": of("brightness and contrast jittered by 40%", jitter=0.4),
        "no_balance": reads("training questions drawn whatever their answer", data=Unbalanced),
        "stem_patch": of("one convolution with kernel = stride = patch as the stem", stem="patch"),
        "half_width": of("half the width everywhere", **half),
        "learned_positions": reads("learned positions of the text instead of RoPE", changed(learn_positions)),
        "layernorm": of("LayerNorm instead of RMSNorm",
                        changed(lambda m: exchange(m, RMSNorm, lambda n: nn.LayerNorm(len(n.weight), eps=n.eps)))),
        "plain_ffn": reads("GELU instead of the gated unit, as many weights",
                        changed(lambda m: exchange(m, GatedFFN, PlainFFN))),
        "entropy": reads("entropy of the cross-attention in the loss, weight 0.05", entropy_weight=0.05),
        "patch_double": of(f"patches of {2 * cfg.patch_size} pixels instead of {cfg.patch_size}",
                           patch_size=2 * cfg.patch_size)}


# ---- measuring a run ----

class Bench:
    """What every run is asked: the same questions, edited scenes and held-out questions, so that runs can be paired."""

    def __init__(self, subject, meta):
        cfg = self.cfg = subject.cfg
        self.asked, self.combos = (Questions(subject, meta, name) for name in ("test", "test_combos"))
        self.looked = self.asked.sample_pictures(cfg.sample_items)
        self.family = np.array([item["family"] for item in self.asked.items])
        position = {int(r): i for i, r in enumerate(self.asked.rows)}
        with open(Path(cfg.data_dir) / "twins.jsonl", encoding="utf-8") as file:
            edits = [e for e in map(json.loads, file) if e["flip"] and e["item"] in position]
        edits = [edits[i] for i in np.random.default_rng(0).permutation(len(edits))[:cfg.probe_items]]
        self.at = np.array([position[e["item"]] for e in edits], int)
        frames = self.asked.frames
        self.edited = [evaluate.draw_twin((Path(frames[self.asked.picture[i]]["name"]).stem, e["flip"], cfg))
                       for i, e in zip(self.at, edits)]

    def measure(self, subject, maps=True):
        """{measure: value} of a trained model; None where it has no meaning."""
        asked, combos, cfg = self.asked, self.combos, subject.cfg
        odds = asked.odds(subject)
        said, accuracy = odds > 0, lambda truth, odds: 100 * train.balanced_accuracy(truth, odds)        # noqa: E731
        families = {f: accuracy(asked.truth[mine], odds[mine]) for f in sorted(set(self.family))
                    for mine in [self.family == f]}
        flipped = np.concatenate(list(subject.ask(zip(self.edited, ([asked.prompts[i]] for i in self.at)))))
        twins = ((said == asked.truth)[self.at] & ((flipped > 0) != said[self.at])).mean()
        answers, _, word = evaluate.looks(subject, asked, self.looked)
        own = word.maps.mean((1, 2))
        result = dict(
            accuracy=accuracy(asked.truth, odds), worst_family=min(families.values()),
            f1=evaluate.classification(asked.truth, said)["macro_f1"], twins=100 * float(twins),
            held_out_drop=accuracy(asked.truth, odds) - accuracy(combos.truth, combos.odds(subject)),
            pointing=100 * float(evaluate.pointing(own, word.cover).mean()),
            enrichment=float(np.median(evaluate.enrichment(own, word.cover))),
            entropy=float(evaluate.entropy(answers).mean() / math.log(answers.shape[-1])),
            parameters=sum(p.numel() for p in subject.model.parameters()),
            families=families)
        if not maps:
            result.update(pointing=None, enrichment=None, entropy=None)
        return result


def speeds(cfg, known, names, meta, rounds=7):
    """{variant: pairs/s of reading, in % of those of "full"}, taken in turns: a busy machine slows all alike."""
    device, parts, took = pick_device(cfg), {}, {name: [] for name in names}
    dtype, _ = train.pick_dtype(cfg, device)
    clock = train.Clock(device, exact=True)
    for name in names:
        settings = settings_of(cfg, known[name], "", cfg.seed)
        data = known[name].data(settings, meta, "train")
        learner = train.learner(settings, data, device, dtype, known[name].model)
        learner[0].freeze("vision", settings.freeze_vision_steps < 0)
        parts[name] = learner, [data.batch(0, cfg.batch_size)], settings
    for _ in range(rounds):
        for name, (learner, micros, settings) in parts.items():
            clock("between")
            clock.seconds.clear()
            train.update(*learner, micros, train.total_weight(micros, cfg), True, dtype, settings, clock)
            took[name].append(sum(clock.seconds.values()))
    return {name: 100 * float(np.median(np.array(took["full"][1:]) / took[name][1:])) for name in names}


# ---- the loop ----

def chosen_names(cfg, known):
    """The variants that cfg.variants names, "full" first. Raises UserError for one that is not there."""
    names = [name.strip() for name in cfg.variants.split(",") if name.strip()] or list(known)
    for name in names:
        if name not in known:
            raise UserError(f"no variant '{name}'{config.nearest(name, known)}; there are {', '.join(known)}")
    return list(dict.fromkeys(["full", *names]))


def settings_of(cfg, variant, folder, seed):
    """Settings of one run. What only evaluation, the loop or the machine needs stays as cfg's."""
    return config.check(type(cfg)(**{**vars(cfg), **variant.settings, "seed": seed, "out_dir": str(folder)}))


def same(a, b):
    """Whether two runs with these settings, dicts, train the same."""
    return not any(a[k] != b.get(k) for k in a.keys() - train.RESUMABLE | {"max_steps"})


def finished(settings):
    """The result of a run that was made with these settings, or None."""
    try:
        result = json.loads((Path(settings.out_dir) / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if same(vars(settings), result["settings"]) else None


def begin(settings, variant, state):
    """Write last.pt of a run as its first stage would leave it, from `state`, the checkpoint that "full" left then.

    In that stage the decoder neither works nor learns, so this is what the run itself would have come to.
    """
    cfg, whole = settings, type(settings)(**state["config"])

    def built(cfg, make):
        """(model, optimizer, names of its parameters in order) before the first update."""
        torch.manual_seed(cfg.seed)
        model, tagger = make(cfg, len(state["words"])), train.WordTagger(cfg.text_dim)
        optimizer, names = train.make_optimizer(model, tagger, cfg, torch.device("cpu")), {}
        for prefix, module in (("", model), ("tagger.", tagger)):
            names.update({id(p): prefix + name for name, p in module.named_parameters()})
        return model, optimizer, [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    _, _, old = built(whole, VLM)
    model, optimizer, new = built(cfg, variant.model)
    learned = {old[i]: moments for i, moments in state["optimizer"]["state"].items()}
    state.update(config=vars(cfg), model={k: state["model"][k] if k.startswith(("vision.", "projection.")) else tensor
                                          for k, tensor in model.state_dict().items()},
                 optimizer=dict(optimizer.state_dict(), state={i: learned[name] for i, name in enumerate(new)
                                                               if name in learned}))
    train.save_checkpoint(Path(cfg.out_dir) / "last.pt", state)


def run_one(settings, variant, bench, meta):
    """Train (or go on with) one run and measure it. Returns its result, which is written to its folder.

    bench: a list that keeps the Bench of the first run for all.
    """
    folder, start = Path(settings.out_dir), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        seen = folder.with_name(f"full-{settings.seed}") / "seen.pt"
        if variant.shared and seen.exists() and not (folder / "last.pt").exists():
            state = train.load_checkpoint(seen)
            if same(dict(vars(settings), **{k: state["config"][k] for k in variant.settings}), state["config"]):
                begin(settings, variant, state)
        settings.resume = (folder / "last.pt").exists()
        kept = seen if seen.parent == folder else None
        try:
            train.train(settings, variant.model, variant.data, kept)
        except UserError:                                   # what is there is damaged, or of other settings
            if not settings.resume:
                raise
            settings.resume = False
            train.train(settings, variant.model, variant.data, kept)
        subject = Subject(settings, variant.model)
        bench += [] if bench else [Bench(subject, meta)]
        measures = bench[0].measure(subject, variant.maps)
    result = dict(settings=vars(settings), seconds=round(time.time() - start, 1),
                  measures=evaluate.rounded(measures))
    visualize.write(folder / "result.json", json.dumps(result, indent=1))
    (folder / "last.pt").unlink(missing_ok=True)
    return result


def planned(cfg, runs, out):
    """cfg, with budget_minutes its updates scaled so that all runs together take about so long on this machine.

    A short run of both stages tells the time of an update. The scale is kept: a loop that goes on must not change it.
    """
    if not cfg.budget_minutes:
        return cfg
    path, key = out / "plan.json", dict(budget_minutes=cfg.budget_minutes, runs=runs, max_steps=cfg.max_steps)
    plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if plan.get("key") != key:
        updates = min(cfg.max_steps, 60)
        probe = type(cfg)(**{**vars(cfg), "max_steps": updates, "out_dir": str(out / "probe"), "eval_every": updates})
        with open(out / "probe.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            seconds = train.train(probe)["seconds"]
        shutil.rmtree(out / "probe")
        plan = dict(key=key, scale=60 * cfg.budget_minutes / (runs * seconds * cfg.max_steps / updates))
        visualize.write(path, json.dumps(plan))
    steps = {k: max(10, round(plan["scale"] * getattr(cfg, k))) for k in ("max_steps", "see_steps", "warmup_steps",
                                                                         "eval_every")}
    print(f"{cfg.budget_minutes} minutes for {runs} runs: {steps['max_steps']} updates each, {plan['scale']:.2f} times "
          "the preset's")
    return type(cfg)(**{**vars(cfg), **steps})


def ablate(cfg):
    """Train and measure all runs that are not there yet, write the table and the figures; returns the table."""
    known = variants(cfg)
    names = chosen_names(cfg, known)
    out = Path(cfg.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to out_dir {out}: {error}") from None
    if not (Path(cfg.data_dir) / "meta.json").exists():
        print(f"no data in {cfg.data_dir}: preparing them")
        prepare.print_report(prepare.prepare(cfg), cfg)
    meta = prepare.load_meta(cfg)
    order = [(name, cfg.seed + i) for i in range(cfg.seeds) for name in names]
    cfg = planned(cfg, len(order), out)
    known, failed, spent, bench = variants(cfg), {}, [], []
    runs = {(name, seed): settings_of(cfg, known[name], out / f"{name}-{seed}", seed) for name, seed in order}
    results = {key: done["measures"] for key, settings in runs.items() if (done := finished(settings))}
    print(f"{len(results)} of {len(runs)} runs are there")
    missing = [key for key in order if key not in results]
    try:
        for number, (name, seed) in enumerate(missing, 1):
            try:                                            # another process may have made it meanwhile
                result = finished(runs[name, seed]) or run_one(runs[name, seed], known[name], bench, meta)
            except Exception as error:                      # one run's failure is a row, not a stop
                failed[name] = f"seed {seed}: {type(error).__name__}: {error}"
                print(f"{number}/{len(missing)}  {name}, {failed[name]}", flush=True)
                continue
            results[name, seed] = result["measures"]
            spent.append(result["seconds"])
            print(f"{number}/{len(missing)}  {name}, seed {seed}: accuracy {result['measures']['accuracy']:.2f}, "
                  f"{spent[-1]:.0f} s; about {(len(missing) - number) * np.mean(spent) / 60:.0f} minutes left",
                  flush=True)
            write_table(out, make_table(cfg, known, names, results, failed))
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
    table = make_table(cfg, known, names, results, failed, speeds(cfg, known, names, meta))
    write_table(out, table)
    for name, draw in FIGURES.items():
        visualize.save(draw(table), out / name, cfg.dpi)
    print(f"{out / 'table.md'}, {out / 'table.json'} and {len(FIGURES)} figures")
    return table


# ---- the table ----

MEASURES = {"accuracy": "balanced accuracy", "worst_family": "worst family", "f1": "macro F1",
            "twins": "twins, both right", "held_out_drop": "held-out drop", "pointing": "pointing",
            "enrichment": "enrichment", "entropy": "entropy", "parameters": "parameters"}
# in % but for enrichment (times), entropy (of the answer's attention, as a share of the largest) and parameters


def moderated_scatter(groups):
    """[(standard deviation, degrees of freedom)] of each group of paired differences, one group a variant.

    A few seeds hardly tell how much a variant scatters, and variants do not all scatter alike. So each has its own
    variance drawn towards that of all, by as much as the variances agree beyond chance: the moderated t-test (Smyth
    2004, doi:10.2202/1544-6115.1027, section 6.2). NaN and 0 where too little is known.
    """
    own = [(np.var(g, ddof=1), len(g) - 1) if len(g) > 1 else (0.0, 0) for g in groups]
    known = np.array([(v, df) for v, df in own if v > 0])
    if len(known) < 2:
        return [(math.sqrt(v), df) if v > 0 else (math.nan, 0) for v, df in own]
    variance, half = known[:, 0], torch.from_numpy(known[:, 1] / 2)
    excess = np.log(variance) + (half.log() - half.digamma()).numpy()
    spread = excess.var(ddof=1) - torch.special.polygamma(1, half).mean().item()
    halves = torch.logspace(-2, 3, 20000, dtype=torch.float64)                    # of the prior's degrees of freedom
    trigamma = torch.special.polygamma(1, halves)                                 # falls
    at = min(int((trigamma > spread).sum()), len(halves) - 1)
    prior, all_df = 2 * halves[at].item(), known[:, 1].sum()
    common = math.exp(excess.mean() + (halves[at].digamma() - halves[at].log()).item())
    return [(math.sqrt((prior * common + df * v) / (prior + df)), min(prior + df, all_df)) for v, df in own]


def compared(differences, scatter, df):
    """What paired differences (one a seed) say: mean, 95% interval, tests, and what could have been shown.

    Interval and p are of a t-test with this scatter (see moderated_scatter); p_sign and p_t, of these differences
    alone, stand beside. detectable: the difference that such a test finds at 5% in 80% of cases.
    """
    n = len(differences)
    found = dict(n=n, mean=float(np.mean(differences)) if n else None)
    if n > 1:
        found.update(p_sign=evaluate.sign_flip_test(differences), p_t=evaluate.t_test(differences)[3])
    if n and df:
        error = scatter / math.sqrt(n)
        _, low, high, p = evaluate.t_interval(found["mean"], error, df)
        found.update(low=low, high=high, p=p,
                     detectable=(evaluate.t_within(0.95, df) + evaluate.t_within(0.6, df)) * error)
    return found


def make_table(cfg, known, names, results, failed, speed=None):
    """All figures of the finished runs: means, and differences to "full" of the same seeds; p of accuracy by Holm."""
    rows = []
    for name in names:
        own = {seed: measures for (n, seed), measures in results.items() if n == name}
        row = dict(variant=name, text=known[name].text, seeds=sorted(own), failed=failed.get(name),
                   speed=speed and speed[name])
        for measure in MEASURES:
            values = {s: m[measure] for s, m in own.items() if m[measure] is not None}
            pairs = [v - results["full", s][measure] for s, v in sorted(values.items()) if ("full", s) in results]
            row[measure] = dict(value=float(np.mean(list(values.values()))) if values else None,
                                by_seed=[values[s] for s in sorted(values)], pairs=pairs if name != "full" else [])
        rows.append(row)
    for measure in MEASURES:
        pairs = [row[measure]["pairs"] for row in rows[1:]]
        for row, own, scatter in zip(rows[1:], pairs, moderated_scatter(pairs)):
            row[measure]["difference"] = compared(own, *scatter)
    tested = [row["accuracy"]["difference"] for row in rows[1:] if "p" in row["accuracy"]["difference"]]
    for test, p in zip(tested, evaluate.holm([t["p"] for t in tested]) if tested else ()):
        test["p_holm"] = p
        test["verdict"] = "no difference shown" if p >= 0.05 else "worse" if test["mean"] < 0 else "better"
    shape = {k: getattr(cfg, k) for k in config.PRESETS["ablation"] if k not in ("data_dir", "out_dir")}
    return evaluate.rounded(dict(rows=rows, settings=shape, tests=len(tested)))


def markdown(table):
    """The table as two tables of Markdown: what the differences say, then the other measures."""
    number = lambda x, digits=1: "–" if x is None else f"{x:.{digits}f}"                         # noqa: E731
    chance = lambda p: "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"              # noqa: E731
    lines = ["| variant | seeds | accuracy | difference [95%] | p exact | p paired t | p, Holm | detectable | |",
             "|---" * 9 + "|"]
    for row in table["rows"]:
        d, text = row["accuracy"].get("difference", {}), ""
        if d.get("mean") is not None:
            text = f"{d['mean']:+.1f}" + (f" [{d['low']:+.1f}, {d['high']:+.1f}]" if "low" in d else "")
        verdict = "failed, " + row["failed"].replace("|", "/") if row["failed"] else d.get("verdict", "")
        tests = [chance(d.get(k)) for k in ("p_sign", "p_t", "p_holm")] + [number(d.get("detectable"))]
        lines.append(f"| {row['variant']}: {row['text']} | {len(row['seeds'])} | {number(row['accuracy']['value'])} "
                     f"| {text} | {' | '.join(tests if d else [''] * 4)} | {verdict} |")
    others = [m for m in MEASURES if m != "accuracy"]
    lines += ["", f"| variant | {' | '.join(MEASURES[m] for m in others)} | speed, % |",
              "|---" * (len(others) + 2) + "|"]
    for row in table["rows"]:
        cells = [number(row[m]["value"], {"enrichment": 2, "entropy": 2, "parameters": 0}.get(m, 1)) for m in others]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} | {number(row['speed'], 0)} |")
    return "\n".join(lines) + "\n"


def write_table(out, table):
    counts = sorted({len(row["seeds"]) for row in table["rows"]})
    shape = ", ".join(f"{k}={v}" for k, v in table["settings"].items())
    head = (f"Balanced accuracy in % and its difference to \"full\" in points, paired by seed, on the same questions; "
            f"{' or '.join(map(str, counts))} seeds a variant (column seeds). Interval and p are of a moderated t-test "
            "(Smyth 2004): a variant's own scatter over seeds, drawn towards that of all; p corrected for "
            f"{table['tests']} tests by Holm; p exact (of all sign flips, at least 0.031 with 6 seeds and 0.25 with 3) "
            "and p paired t are of the variant's own seeds alone; detectable: the difference found in 80% of cases. "
            f"Speed: pairs/s of reading, taken in turns with full. All runs with {shape}.\n\n")
    visualize.write(out / "table.json", json.dumps(table, indent=1, allow_nan=False))
    visualize.write(out / "table.md", head + markdown(table))


# ---- figures ----

def draw_differences(table):
    """Accuracy against "full": the mean with its interval, and each seed."""
    rows = [r for r in table["rows"] if r["accuracy"]["pairs"]]
    rows.sort(key=lambda r: r["accuracy"]["difference"]["mean"])
    figure, ((axes,),) = visualize.plot(1, 1, 0.9 + 0.2 * len(rows))
    for y, row in enumerate(rows):
        d = row["accuracy"]["difference"]
        shown = d.get("verdict", "no difference shown") != "no difference shown"
        colour = visualize.SERIES[1] if shown else visualize.SERIES[3]
        axes.plot(row["accuracy"]["pairs"], [y] * len(row["accuracy"]["pairs"]), "|", color=visualize.INK, ms=5, lw=0)
        if "low" in d:
            axes.errorbar(d["mean"], y, xerr=[[d["mean"] - d["low"]], [d["high"] - d["mean"]]], fmt="o", color=colour)
    axes.axvline(0, color=visualize.INK, lw=0.6)
    axes.set_yticks(range(len(rows)), [f"{r['variant']} ({len(r['seeds'])})" for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    ends = [v for r in rows for v in r["accuracy"]["pairs"]] + [0]
    ends += [r["accuracy"]["difference"].get(end, 0) for r in rows for end in ("low", "high")]
    ticks = [t for t in (-40, -20, -10, -5, -3, -2, -1, 0, 1, 2, 3, 5, 10) if min(ends) - 2 < t < max(ends) + 2]
    axes.set_xscale("symlog", linthresh=3)                  # a blind model loses 40 points, others one
    axes.set_xticks(ticks, [f"{t:+d}" if t else "0" for t in ticks])
    axes.set_xlim(1.1 * min(ends) - 0.5, 1.1 * max(ends) + 0.5)
    axes.set_xlabel("points of balanced accuracy against full: each seed (how many), mean, 95% interval; orange: shown")
    return figure


def draw_measures(table):
    """Paired differences to "full" in every measure, coloured by how far they exceed what could be detected."""
    names = [m for m in MEASURES if m != "parameters"]
    better = [-1 if m == "held_out_drop" else 1 for m in names]                   # the sign of what is better
    full, *rows = [r for r in table["rows"] if r["seeds"]]
    found = [[r[m]["difference"] for m in names] for r in rows]
    size = [[sign * d["mean"] / d["detectable"] if d.get("detectable") else 0 if d["n"] else np.nan
             for sign, d in zip(better, line)] for line in found]
    digits = [2 if m in ("enrichment", "entropy") else 1 for m in names]
    texts = [[f"{d['mean']:+.{k}f}" if d["n"] else "" for d, k in zip(line, digits)] for line in found]
    heads = [MEASURES[m].replace(" ", "\n", 1) + f"\nfull: {full[m]['value']:.{k}f}" for m, k in zip(names, digits)]
    figure, ((axes,),) = visualize.plot(1, 1, 1.2 + 0.2 * len(rows))
    visualize.heat(axes, size, [r["variant"] for r in rows], heads, texts, cmap="PuOr",
                   norm=visualize.matplotlib.colors.Normalize(-3, 3), bar="times detectable; purple: better")
    return figure


FIGURES = {"differences": draw_differences, "measures": draw_measures}


# ---- robustness ----

NOISE, BLUR, LIGHT, JPEG = (4, 8, 16, 32, 64), (0.5, 1, 1.5, 2, 3), (0.85, 0.7, 0.55, 0.4, 0.25), (60, 40, 20, 10, 5)
ATTACK = (1, 2, 4, 8, 16)     # largest change of a channel of a pixel, of 255
# Cameras that no drawn scene had: fields of a spec, and what becomes of them.
CAMERAS = {"focal length x 0.7": dict(focal=lambda f: 0.7 * f), "focal length x 1.4": dict(focal=lambda f: 1.4 * f),
           "2.4 m above the road": dict(height=lambda h: 2.4), "horizon 0.1 lower": dict(horizon=lambda h: h + 0.1),
           "horizon 0.1 higher": dict(horizon=lambda h: h - 0.1)}


def disturb(kind, strength, picture, rng):
    """A uint8 picture (S, S, 3) with noise, blur, less light or JPEG artefacts, of strength 0 to 4."""
    image = prepare.Image.fromarray(picture)
    if kind == "noise":
        return np.clip(picture + rng.normal(0, NOISE[strength], picture.shape), 0, 255).astype(np.uint8)
    if kind == "blur":                                      # in pixels of a picture of 128
        return np.asarray(image.filter(prepare.ImageFilter.GaussianBlur(BLUR[strength] * len(picture) / 128)))
    if kind == "brightness":
        return (picture * LIGHT[strength]).astype(np.uint8)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG[strength])
    return np.asarray(prepare.Image.open(file))


def scattered(picture, changed, rng):
    """The control of a change: the same differences of pixels, each at another place."""
    difference = (changed.astype(np.int16) - picture).reshape(-1, 3)
    return np.clip(picture + rng.permutation(difference).reshape(picture.shape), 0, 255).astype(np.uint8)


@torch.no_grad()
def watch(subject, pictures, prompts, batch=16):
    """(log-odds of YES (n,), mean map of the answer (n, P)) of a prompt each about pictures (n, S, S, 3), in float32.

    Normalised pictures, float32 tensors (n, 3, S, S), are taken too.
    """
    model, odds, maps = subject.model, [], []
    for i in range(0, len(prompts), batch):
        shown, attn = pictures[i:i + batch], {"self": [], "cross": []}
        shown = shown if torch.is_tensor(shown) else subject.images(np.stack(shown))
        tokens = train.rectangle([[ids] for ids in prompts[i:i + batch]])[:, 0].to(subject.device)        # (n, T)
        found, last = train.verdicts(model.decoder, tokens, model.encode(shown.to(subject.device)), attn)
        odds.append(found.cpu().numpy())
        row = torch.arange(len(tokens), device=tokens.device)
        maps.append(torch.stack(attn["cross"])[:, row, :, last].mean((1, 2)).cpu().numpy())               # (n, P)
    return np.concatenate(odds), np.concatenate(maps)


def possible(images, state):
    """Normalised pictures (n, 3, S, S), their channels cut back to what a pixel can be."""
    mean, std = (torch.tensor(state[k], device=images.device).view(3, 1, 1) for k in ("mean", "std"))
    return images.maximum(-mean / std).minimum((1 - mean) / std)


def attack(subject, pictures, prompts, truth, size, steps, batch=16):
    """Normalised pictures changed by at most `size` of 255 in each channel, to make the right answer less likely.

    steps=1: FGSM, one step of that size along the gradient's sign; more: PGD, smaller steps, cut back to the size.
    """
    model, found = subject.model.requires_grad_(False), []
    limit = size / 255 / torch.tensor(subject.state["std"]).view(3, 1, 1).to(subject.device)
    for i in range(0, len(prompts), batch):
        clean = subject.images(np.stack(pictures[i:i + batch]))
        tokens = train.rectangle([[ids] for ids in prompts[i:i + batch]])[:, 0].to(subject.device)
        sign = torch.tensor(1.0 - 2 * truth[i:i + batch], device=tokens.device)   # a right YES should fall, a NO rise
        changed, step = clean.clone(), limit if steps == 1 else 2.5 * limit / steps
        for _ in range(steps):
            changed.requires_grad_(True)
            odds, _ = train.verdicts(model.decoder, tokens, model.encode(changed))
            gradient, = torch.autograd.grad((sign * odds).sum(), changed)
            changed = (changed.detach() + step * gradient.sign()).clamp(clean - limit, clean + limit)
            changed = possible(changed, subject.state)
        found.append(changed.cpu())
    return torch.cat(found)


def misspelt(command, word, rng):
    """The command with two neighbouring letters of its word number `word` exchanged, or one doubled if it is short."""
    words = command.split()
    text = words[word]
    at = rng.randrange(max(len(text) - 1, 1))
    words[word] = text[:at] + text[at + 1] + text[at] + text[at + 2:] if len(text) > 2 and text[at] != text[at + 1] \
        else text + text[-1]
    return " ".join(words)


def misworded(question, command, kind, rng):
    """The command with words in another order or misspelt; None where it has no word of that kind."""
    words = command.split()
    named = {word for c in question.objects for noun in commands.NOUNS[c] for word in noun.split()} | {"left", "right"}
    if kind == "two neighbouring words exchanged":
        at = rng.randrange(len(words) - 1)
        words[at:at + 2] = words[at + 1], words[at]
        return " ".join(words)
    if kind == "all words shuffled":
        return " ".join(rng.sample(words, len(words)))
    ours = [i for i, word in enumerate(words) if (word in named) == (kind == "typing error in a word that matters")]
    return misspelt(command, rng.choice(ours), rng) if ours else None


class Trial:
    """A sample of test questions, and what the model says to them and where it looks when something is disturbed."""

    def __init__(self, subject, meta, count):
        self.subject, self.resamples = subject, subject.cfg.bootstrap
        asked = self.asked = Questions(subject, meta, "test", 6 * count)
        self.chosen = asked.sample(count, 3)
        self.where, self.truth = asked.picture[self.chosen], asked.truth[self.chosen]
        self.pictures = [np.asarray(asked.data.images[p]) for p in self.where]
        self.prompts = [asked.prompts[i] for i in self.chosen]
        self.odds, self.maps = watch(subject, self.pictures, self.prompts)

    def row(self, pictures=None, prompts=None, of=None):
        """Accuracy, and cosine to the undisturbed map, with these pictures or prompts; of: which questions (m,)."""
        of = np.arange(len(self.chosen)) if of is None else of
        pictures = [self.pictures[i] for i in of] if pictures is None else pictures
        odds, maps = watch(self.subject, pictures, prompts or [self.prompts[i] for i in of])
        return self.said(odds, maps, of)

    def said(self, odds, maps, of):
        return dict(accuracy=evaluate.accuracy_row(self.truth[of], odds > 0, self.where[of], self.resamples),
                    cosine=evaluate.mean_row(self.where[of], evaluate.distances(self.maps[of], maps)["cosine"],
                                             self.resamples, 1))

    def clean(self, of=None):
        of = np.arange(len(self.chosen)) if of is None else of
        return self.said(self.odds[of], self.maps[of], of)

    def disturbed(self):
        """Noise, blur, light and JPEG at five strengths, each beside the same changes at other places."""
        found = {}
        for kind in ("noise", "blur", "brightness", "jpeg"):
            found[kind] = []
            for strength in range(5):
                rng = np.random.default_rng(strength)
                changed = [disturb(kind, strength, p, rng) for p in self.pictures]
                size = np.sqrt(np.mean([(c.astype(float) - p) ** 2 for c, p in zip(changed, self.pictures)]))
                entry = dict(strength=strength + 1, size=float(size), **self.row(changed))
                if kind != "noise":                         # which is scattered already
                    entry["control"] = self.row([scattered(p, c, rng) for p, c in zip(self.pictures, changed)])
                found[kind].append(entry)
        return found

    def attacked(self, count):
        """FGSM and PGD of five sizes, beside changes of the same size with random signs."""
        of, found = np.arange(len(self.chosen))[:count], {"fgsm": [], "pgd": []}
        pictures, prompts = ([kept[i] for i in of] for kept in (self.pictures, self.prompts))
        clean, std = self.subject.images(np.stack(pictures)).cpu(), torch.tensor(self.subject.state["std"])
        for size in ATTACK:
            signs = torch.from_numpy(np.random.default_rng(size).choice([-1, 1], clean.shape).astype(np.float32))
            control = self.row(possible(clean + size / 255 / std.view(3, 1, 1) * signs, self.subject.state), of=of)
            for kind, steps in (("fgsm", 1), ("pgd", 7)):
                changed = attack(self.subject, pictures, prompts, self.truth[of], size, steps)
                found[kind].append(dict(strength=size, **self.row(changed, of=of), control=control))
        return found

    def occluded(self):
        """A grey box over the one object that makes a YES true, beside as large a box elsewhere.

        turned: right YES answers that become NO; mass: attention in the object's box, before and after.
        """
        cfg, asked, rng = self.subject.cfg, self.asked, np.random.default_rng(0)
        side, grey = cfg.image_size // cfg.patch_size, np.array(self.subject.state["mean"]) * 255
        of, boxes, shown = [], [], {"on the object": [], "elsewhere": []}
        for n, i in enumerate(self.chosen):
            question, view = asked.questions[i], asked.views[asked.picture[i]]
            if question.template not in ("exists", "exists_at", "near") or self.odds[n] <= 0 or not self.truth[n]:
                continue
            there = view.matching(question.first)
            if len(there) != 1:
                continue
            label = asked.frames[asked.picture[i]]["labels"][there[0][1].label]
            x, y, right, low = (round(min(max(label["box2d"][k], 0), cfg.image_size)) for k in ("x1", "y1", "x2", "y2"))
            w, h = right - x, low - y
            others = [(u, v) for u, v in rng.integers(0, (cfg.image_size - w + 1, cfg.image_size - h + 1), (40, 2))
                      if u >= x + w or u + w <= x or v >= y + h or v + h <= y]
            if others:
                for name, (u, v) in (("on the object", (x, y)), ("elsewhere", others[0])):
                    picture = self.pictures[n].copy()
                    picture[v:v + h, u:u + w] = grey
                    shown[name].append(picture)
                of.append(n)
                boxes.append(evaluate.cover([label], cfg.image_size, side))
        of, found = np.array(of, int), {}
        if not len(of):
            return {}
        covers = np.array(boxes)
        mean = lambda x, scale=100: evaluate.mean_row(self.where[of], x, self.resamples, scale)           # noqa: E731
        for name, pictures in shown.items():
            odds, maps = watch(self.subject, pictures, [self.prompts[n] for n in of])
            found[name] = dict(turned=mean(odds <= 0), mass_before=mean(evaluate.mass_in_box(self.maps[of], covers)),
                               mass_after=mean(evaluate.mass_in_box(maps, covers)),
                               cosine=mean(evaluate.distances(self.maps[of], maps)["cosine"], 1))
        found["area"] = float(100 * covers.mean())
        return found

    def reworded(self):
        """Other words for the same question, another order, typing errors; beside another question."""
        asked, found, rng = self.asked, {"as asked": self.clean()}, random.Random(0)
        kinds = {"other trained words": lambda q, c: q.words(rng),
                 "words never trained on": lambda q, c: q.words(rng, -1)}
        kinds.update({kind: functools.partial(lambda q, c, kind: misworded(q, c, kind, rng), kind=kind) for kind in (
            "two neighbouring words exchanged", "all words shuffled", "typing error in a word that matters",
            "typing error in another word")})
        for name, reword in kinds.items():
            texts = [reword(asked.questions[i], asked.items[i]["command"]) for i in self.chosen]
            of = np.array([n for n, text in enumerate(texts) if text], int)
            found[name] = self.row(prompts=[self.subject.tokenizer.prompt(texts[n]) for n in of], of=of)
        return found

    def redrawn(self, change, moved=False):
        """The same scenes drawn from specs changed by change(spec); moved: objects stand elsewhere, ask the rules."""
        cfg, asked, drawn, pictures, of, truth = self.subject.cfg, self.asked, {}, [], [], []
        for n, i in enumerate(self.chosen):
            if (where := asked.picture[i]) not in drawn:
                spec = change(prepare.sample_scene(Path(asked.frames[where]["name"]).stem, cfg))
                drawn[where] = (prepare.draw_scene(spec, cfg.image_size), View(prepare.scene_frame(spec, cfg), cfg))
            picture, view = drawn[where]
            answer = asked.questions[i].truth(view) if moved else None
            if answer != UNSURE:
                pictures.append(picture)
                of.append(n)
                truth.append(answer == commands.TRUE if moved else self.truth[n])
        of, truth = np.array(of, int), np.array(truth, bool)
        if not moved:
            return self.row(pictures, of=of)
        odds, _ = watch(self.subject, pictures, [self.prompts[n] for n in of])
        return dict(accuracy=evaluate.accuracy_row(truth, odds > 0, self.where[of], self.resamples),
                    control=dict(accuracy=self.clean(of)["accuracy"]))

    def other_scenes(self):
        """The same objects in another street, weather, hour or before another camera (drawn scenes only)."""
        found = {"as drawn": self.clean(),
                 "another street": self.redrawn(lambda spec: dict(spec, seed=spec["seed"] + 1))}
        every = [(w, "daytime") for w in prepare.WEATHERS[1:]] + [("clear", t) for t in prepare.TIMES[1:]]
        for weather, hour in every:
            found[f"{weather}, {hour}"] = self.redrawn(lambda spec: dict(spec, weather=weather, timeofday=hour))
        for name, fields in CAMERAS.items():
            found[name] = self.redrawn(lambda spec: dict(spec, **{k: f(spec[k]) for k, f in fields.items()}), True)
        return found


def real_frames(subject, bdd_dir, out):
    """Accuracy on a BDD100K folder's own validation frames, under the checkpoint's filters; prepared in `out`."""
    other = copy.copy(subject)
    other.cfg = type(subject.cfg)(**{**vars(subject.cfg), "source": "bdd100k", "bdd_dir": bdd_dir,
                                     "data_dir": str(out / "bdd100k"), "val_is_test": True, "max_complexity": 0})
    meta = prepare.load_meta(other.cfg) if (out / "bdd100k" / "meta.json").exists() else prepare.prepare(other.cfg)
    asked = Questions(other, meta, "test", 8000)
    odds = asked.odds(other)
    blank = train.predict(other.model, asked.data, other.cfg, other.device, other.dtype, "blank", 8000)
    control = evaluate.accuracy_row(asked.data.index[blank[0], 3] == 1, blank[1] > 0, asked.data.index[blank[0], 0],
                                    other.cfg.bootstrap)
    accuracy = evaluate.accuracy_row(asked.truth, odds > 0, asked.picture, other.cfg.bootstrap)
    return {"real frames": dict(accuracy=accuracy, control=dict(accuracy=control))}


def robustness(cfg):
    """Disturb what a trained model is shown and asked; writes out_dir/robustness.json, .md and a figure."""
    start = time.time()
    subject, bdd_dir = Subject(cfg), cfg.bdd_dir
    cfg, out = subject.cfg, Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)                  # before the work, which an error would lose
    meta = prepare.load_meta(cfg)
    stage = lambda text: print(f"{time.time() - start:5.0f} s  {text}", flush=True)              # noqa: E731
    trial = Trial(subject, meta, 3 * cfg.probe_items // 2)
    page = dict(step=subject.state["step"], data_hash=meta["hash"], questions=len(trial.chosen), clean=trial.clean())
    stage("noise, blur, brightness, JPEG")
    page["disturbed"] = trial.disturbed()
    stage("occlusion")
    page["occluded"] = trial.occluded()
    stage("adversarial changes")
    page["attacked"] = trial.attacked(cfg.probe_items // 3)
    stage("other words")
    page["reworded"] = trial.reworded()
    stage("other scenes")
    page["scenes"] = trial.other_scenes() if cfg.source == "drawn" else {}
    page["real"] = real_frames(subject, bdd_dir, out) if bdd_dir else {}
    if not bdd_dir:
        stage("no real frames: pass --bdd_dir=PATH to ask about BDD100K's own")
    page = evaluate.rounded(page)
    visualize.write(out / "robustness.json", json.dumps(page, indent=1, allow_nan=False))
    visualize.write(out / "robustness.md", robustness_markdown(page))
    visualize.save(draw_robustness(page), out / "robustness", cfg.dpi)
    print(robustness_markdown(page))
    stage(f"wrote {out / 'robustness.json'}, {out / 'robustness.md'} and {out / 'robustness.png'}")
    return page


def robustness_markdown(page):
    shown = visualize.shown_row
    lines = [f"Balanced accuracy in % and the cosine of the answer's attention map to that of the undisturbed question "
             f"on {page['questions']} test questions, [95% interval over pictures]; size: of the change of a pixel, "
             "root mean square, of 255. Control: the same changes at other places; for FGSM and PGD, random signs; for "
             "cameras, the same questions before the camera as drawn; for real frames, a blank picture.", "",
             "| what | size | accuracy | cosine | control: accuracy | cosine |", "|---|---|---|---|---|---|"]

    def line(name, entry, size=""):
        beside = entry.get("control", {})
        cells = [shown(e[k], digits=d) if k in e else "" for e in (entry, beside) for k, d in (("accuracy", 1),
                                                                                             ("cosine", 2))]
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    line("undisturbed", page["clean"])
    for kind, entries in page["disturbed"].items():
        for entry in entries:
            line(f"{kind} {entry['strength']}", entry, f"{entry['size']:.1f}")
    for kind, entries in page["attacked"].items():
        for entry in entries:
            line(kind.upper(), entry, f"at most {entry['strength']}")
    for group in ("reworded", "scenes", "real"):
        for name, entry in page[group].items():
            line(name, entry)
    if page["occluded"]:
        found = page["occluded"]
        lines += ["", f"A grey box over the one object that makes a YES true, {found['area']:.1f}% of the picture on "
                  "average, and as large a box elsewhere; of right YES answers about it, n="
                  f"{found['elsewhere']['turned']['n']} pictures:", "",
                  "| box | answers turned to NO, % | attention in the object's box, % | before | cosine |",
                  "|---|---|---|---|---|"]
        for name in ("on the object", "elsewhere"):
            e = found[name]
            lines.append(f"| {name} | {shown(e['turned'])} | {shown(e['mass_after'])} | {shown(e['mass_before'])} "
                         f"| {shown(e['cosine'], digits=2)} |")
    return "\n".join(lines) + "\n"


def draw_robustness(page):
    """Accuracy and likeness of the maps over the strength of each disturbance, beside its control."""
    kinds = {**page["disturbed"], **page["attacked"]}
    names = {"jpeg": "JPEG", "fgsm": "FGSM", "pgd": "PGD"}
    figure, axes = visualize.plot(2, len(kinds), 3.0, sharex="col", sharey="row")
    for column, (kind, entries) in zip(axes.T, kinds.items()):
        for ax, key in zip(column, ("accuracy", "cosine")):
            for series, (colour, label) in enumerate(((visualize.SERIES[0], "disturbed"),
                                                      (visualize.SERIES[3], "control"))):
                own = [e if not series else e.get("control") for e in entries]
                if None in own:
                    continue
                x, rows = [e["strength"] for e in entries], [e[key] for e in own]
                ax.plot(x, [r["value"] for r in rows], "--" if series else "-", color=colour, label=label, marker="o")
                ax.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color=colour, alpha=0.2, lw=0)
            clean = page["clean"]["accuracy"]["value"] if key == "accuracy" else 1
            ax.axhline(clean, color=visualize.INK, lw=0.6, ls=":")
            if kind in page["attacked"]:
                ax.set_xscale("log", base=2)
            ax.set_xticks(x, [str(strength) for strength in x])
        column[0].set_title(names.get(kind, kind))
        column[1].set_xlabel("of 255" if kind in page["attacked"] else "strength")
    axes[0, 0].set_ylabel("balanced accuracy, %")
    axes[1, 0].set_ylabel("cosine to the clean map")
    axes[0, 1].legend()
    return figure


def main(cfg):
    return robustness(cfg) if cfg.robustness else ablate(cfg)


if __name__ == "__main__":
    if not any(argument.startswith(("--preset=", "--robustness=")) for argument in sys.argv):
        sys.argv.insert(1, "--preset=ablation")
    config.run(main, __doc__)
