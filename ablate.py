"""Experiments on the model: which of its parts matter, how robust it is, how fast it trains, and at which rates.

- A variant is a name, the settings that it changes and, where settings do not suffice, what makes its model or its
  commands. That code stands here, so that model.py stays one model. One loop trains all variants, all else being equal.
- The loop goes seed by seed, so that an interrupted loop leaves a full table of fewer seeds. The same command resumes
  it: finished runs are kept. A run that fails is a row of the table and stops nothing.
- Differences to "full" are paired by seed and measured on the same questions.
- The other jobs train no variant: --robustness disturbs what a trained model is shown and asked, next to controls.

    python ablate.py                                  all variants, small models (the preset "ablation")
    python ablate.py --variants=no_rope,mqa --seeds=3
    python ablate.py --robustness=True                of out/default/best.pt
    python ablate.py --robustness=True --bdd_dir=PATH   and on real frames
    python ablate.py --bench=True                     speed and memory of training
    python ablate.py --lr_range=True                  the loss at rising learning rates

Writes to out_dir: a folder for each run, table.json, table.md and figures; or the results of another job:
robustness.json, .md and a figure, bench.json and .md, or lr_range.json, .md and a figure.

References: PaliGemma's prefix arXiv:2407.07726, learned positions 1706.03762, FGSM 1412.6572, PGD 1706.06083, range
test 1506.01186.

Shapes: B pictures, L tokens of a row, P patches, D width, n questions.
"""
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import random
import sys
import time
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import Normalize
from PIL import Image, ImageFilter

import commands
import config
import evaluate
import prepare
import train
import visualize
from commands import FALSE, QUESTIONS, TEMPLATES, UNSURE, View
from config import UserError
from evaluate import Questions, Subject, markdown_table, rounded, text_of, write
from model import (VLM, Attention, Decoder, DecoderBlock, GatedFFN, RMSNorm, VisionEncoder, as_rows, forward_flops,
                   least_seconds, parameter_count, pick_device, positions, rope_tables, row_mask)
from prepare import draw_scene
from tokenizer import IGNORE, NO, YES
from train import Clock, Data, Run
from visualize import INK, SERIES


def write_results(cfg, name, found, text, figure=None):
    """Write what a job found to out_dir/NAME.json, what it says to NAME.md, and a figure of it; prints the text."""
    path = config.made_folder(cfg.out_dir) / name
    write(path.with_suffix(".json"), found)
    write(path.with_suffix(".md"), text)
    if figure:
        visualize.save(figure, path, cfg.dpi, vector=True)
    print(f"{text}\nwrote {path}.json and {name}.md")


# ---- models that settings cannot make: a VLM with some modules replaced ----

def exchanged(kind, make):
    """A maker of models: a VLM with make(cfg, module) in the place of every module of class `kind`.

    The initial weights are drawn by the same rules as those of any VLM.
    """
    def make_model(cfg, vocab_size):
        model = VLM(cfg, vocab_size)
        model.replace(kind, lambda module: make(cfg, module))
        # New modules came with PyTorch's initial weights.
        model.init_weights()
        return model
    return make_model


class Blind(VLM):
    """Every picture has the mean colour of the training pictures, which is 0 once normalised."""

    def encode(self, images, collect=None):
        return super().encode(torch.zeros_like(images), collect)


class Pooled(Attention):
    """The mean of all values for every query: with keys of 0 all patches have the same weight."""

    def keys_values(self, source, rope=None):
        k, v = super().keys_values(source, rope)
        return torch.zeros_like(k), v


def pool_patches(cfg, block):
    heads = cfg.text_heads, cfg.text_kv_heads, cfg.text_head_dim
    block.cross = Pooled(cfg.text_dim, *heads, bias=False, cfg=cfg)
    return block


def forget_order(cfg, decoder):
    # RoPE that turns everything by an angle of 0 changes nothing.
    decoder.cos.fill_(1.0)
    decoder.sin.fill_(0.0)
    return decoder


def forget_places(cfg, vision):
    zeros = torch.zeros_like(vision.positions)
    del vision.positions
    vision.register_buffer("positions", zeros, persistent=False)
    return vision


class LearnedPositions(Decoder):
    """A learned vector for each position, added once to the words, instead of RoPE. It has no cache."""

    def __init__(self, cfg, old):
        super().__init__(cfg, old.embedding.num_embeddings)
        # As large as those of the patches at the start (VLM.init_weights).
        self.places = nn.Parameter(0.5 * torch.randn(cfg.max_text, cfg.text_dim))

    def forward(self, tokens, segment, vision=None, cache=None, attn=None):
        x = self.embed(tokens) + self.places[positions(segment)]                  # (B, L, D)
        mask = row_mask(segment)
        for block in self.blocks:
            x = block(x, vision, mask, None, None, attn)
        return self.norm(x)


class Prefix(Decoder):
    """Patches before the words in the same row, as in PaliGemma, instead of cross-attention. It has no cache.

    Patches see all patches; words see all patches and the words before them in their own command. A command's words
    have the positions after those of the patches.
    """

    def __init__(self, cfg, old):
        super().__init__(cfg, old.embedding.num_embeddings)
        patches = cfg.image_width * cfg.image_height // cfg.patch_size ** 2
        self.cos, self.sin = rope_tables(patches + cfg.max_text, cfg.text_head_dim, cfg.rope_theta)
        for block in self.blocks:
            del block.norm2, block.cross

    def forward(self, tokens, segment, vision, cache=None, attn=None):
        P = vision.shape[1]
        # The patches are one more command, numbered as none is.
        row = F.pad(segment, (P, 0), value=segment.shape[1] + 1)
        mask = row_mask(row)
        mask[..., :P] = 0.0                                 # patches and words see all patches
        places = positions(row)
        places[:, P:] += P
        rope = self.cos[places][:, :, None], self.sin[places][:, :, None]
        x = torch.cat((vision, self.embed(tokens)), 1)                            # (B, P + L, D)
        kept = {"self": [], "cross": None}
        for block in self.blocks:
            x = block(x, None, mask, rope, None, attn and kept)
        for weights in kept["self"]:                        # (B, H, P + L, P + L), if asked for
            if attn["self"] is not None:
                attn["self"].append(weights[:, :, P:, P:])
            # Scaled to sum to 1 over the patches, as the weights of cross-attention do.
            attn["cross"].append(F.normalize(weights[:, :, P:, :P], p=1, dim=-1))
        return self.norm(x)[:, P:]


def plain_ffn(cfg, old):
    # Two matrices of this width have as many weights as the three of the gated FFN.
    hidden = 3 * cfg.text_ffn_dim // 2
    return nn.Sequential(OrderedDict(
        up=nn.Linear(cfg.text_dim, hidden, bias=False),
        gelu=nn.GELU(approximate="tanh"),
        down=nn.Linear(hidden, cfg.text_dim, bias=False)))


# ---- commands of training that settings cannot make ----

class AnswersOnly(Data):
    """Of a question only the answer [YES] or [NO] is learned, no reason; descriptions stay."""

    def targets_of(self, ids, prompt):
        targets = super().targets_of(ids, prompt)
        if ids[prompt] in (YES, NO):
            targets[prompt:] = [IGNORE] * len(targets[prompt:])
        return targets


def unbalanced_items(cfg):
    """Training commands with questions drawn by the shares of their templates alone, whatever the answer."""
    rng = random.Random(cfg.scene_seed)
    kept = [q for q in QUESTIONS if not q.held_out]
    number = Counter(q.template for q in kept)
    frames = prepare.Frames(Path(cfg.data_dir) / "frames.jsonl")
    made = []
    # The commands about a picture are neighbours in the file.
    stored = prepare.read_items(cfg.data_dir, "train")
    for picture, items in itertools.groupby(stored, key=lambda item: item["picture"]):
        view = View(frames[picture], cfg)
        known = [q for q in kept if q.truth(view) != UNSURE]
        # A template with many objects and places is asked no more often than one with few.
        shares = [TEMPLATES[q.template].share / number[q.template] for q in known]
        for item in items:
            if item["answer"] is not None:
                question, = rng.choices(known, shares)
                item = commands.make_item(picture, question, view, rng)
            made.append(item)
    return made


class Unbalanced(Data):
    """As many questions for each picture as ever, but YES and NO are as frequent as the scenes make them."""

    def __init__(self, cfg, meta, name):
        super().__init__(cfg, meta, name)
        if name == "train":
            # As many for each picture, in the order of the pictures: where those of one begin and end is the same.
            self.items = unbalanced_items(cfg)
            self.tokens, self.index = prepare.packed(self.items, self.tokenizer)


# ---- the variants ----

Variant = namedtuple("Variant", "text settings model data maps")
# text: what is changed; settings: those that differ from "full"; model, data: what makes them; maps: whether its
# attention can be read as looking


def variants(cfg):
    """{name: Variant}; the settings of "full" are cfg's."""
    def variant(text, model=VLM, data=Data, maps=True, **settings):
        return Variant(text, settings, model, data, maps)
    half = {name: getattr(cfg, name) // 2 for name in (
        "vision_dim", "text_dim", "vision_ffn_dim", "text_ffn_dim", "stem_width", "text_head_dim")}
    # Without the first stage: as much time instead for the second, in which a picture costs about three times as much.
    unseen = dict(tag_weight=0.0, see_pictures=0, read_pictures=cfg.read_pictures + cfg.see_pictures // 3)
    # In the order of the loop: an interrupted one should hold those that matter most.
    return {
        "full": variant("nothing changed"),
        # Does it need the picture, and this way of looking at it?
        "no_cross": variant("no cross-attention: the mean of all patches added to each word",
                            exchanged(DecoderBlock, pool_patches), maps=False),
        "blind": variant("every picture grey", Blind, maps=False),
        "no_stage": variant("no stage 1, nor its loss; only stage 2, for as long", **unseen),
        "prefix": variant("patches before the words in one row instead of cross-attention",
                          exchanged(Decoder, Prefix)),
        # What it must know about order, place and reasons.
        "no_rope": variant("no positions in the text", exchanged(Decoder, forget_order)),
        "no_reasons": variant("no reasons: of an answer only [YES] or [NO] is learned", data=AnswersOnly),
        "no_positions": variant("no positions in the vision encoder", exchanged(VisionEncoder, forget_places)),
        # Sizes and heads.
        "fewer_layers": variant("half as many layers, in vision and text",
                                vision_layers=max(cfg.vision_layers // 2, 1), text_layers=max(cfg.text_layers // 2, 1)),
        "one_head": variant("one head of the same total width, in vision and text", vision_heads=1, text_heads=1,
                            text_kv_heads=1, text_head_dim=cfg.text_heads * cfg.text_head_dim),
        "mqa": variant("one key/value head for all query heads", text_kv_heads=1),
        "mha": variant("a key/value head for each query head", text_kv_heads=cfg.text_heads),
        # How it is trained.
        "no_describe": variant("no descriptions to read, more questions instead", descriptions_per_image=0),
        "frozen_vision": variant("vision encoder stays random; only stage 2, for as long", freeze_pictures=-1,
                                 **unseen),
        "no_augmentation": variant("no flips, no jitter", flip=0.0, jitter=0.0),
        "more_jitter": variant("brightness and contrast jittered by 40%", jitter=0.4),
        "no_balance": variant("training questions drawn whatever their answer", data=Unbalanced),
        # Details of the architecture and of the loss.
        "stem_patch": variant("one convolution with kernel = stride = patch as the stem", stem="patch"),
        "half_width": variant("half the width everywhere", **half),
        "learned_positions": variant("learned positions of the text instead of RoPE",
                                     exchanged(Decoder, LearnedPositions)),
        "layernorm": variant("LayerNorm instead of RMSNorm", exchanged(
            RMSNorm, lambda cfg, old: nn.LayerNorm(len(old.weight), eps=old.eps))),
        "plain_ffn": variant("GELU instead of the gated unit, as many weights", exchanged(GatedFFN, plain_ffn)),
        "entropy": variant("entropy of the cross-attention in the loss, weight 0.05", entropy_weight=0.05),
        "patch_half": variant(f"patches of {cfg.patch_size // 2} pixels instead of {cfg.patch_size}",
                              patch_size=cfg.patch_size // 2)}


# ---- measuring a run ----

def percent(truth, odds):
    """Balanced accuracy in %, NaN without questions of both answers."""
    return 100 * train.balanced_accuracy(truth, odds)


class Exam:
    """The same questions, edited scenes and held-out questions for every run, so that runs can be paired."""

    def __init__(self, cfg, meta):
        # Nothing is trained yet: the questions need the settings and the vocabulary alone.
        asker = SimpleNamespace(cfg=cfg, tokenizer=Data(cfg, meta, "test").tokenizer)
        self.asked = Questions(asker, meta, "test")
        self.combos = Questions(asker, meta, "test_combos")
        self.looked = self.asked.sample_pictures(cfg.sample_items)
        family = np.array([question.family for question in self.asked.questions])
        self.families = [family == name for name in set(family)]
        twins = self.asked.twins("flip")
        twins = random.Random(0).sample(twins, min(cfg.probe_items, len(twins)))
        self.at = np.array([i for i, _ in twins], int)
        self.edited = [evaluate.draw_twin((self.asked.spec(i), edit, cfg)) for i, edit in twins]

    def measure(self, subject, maps=True):
        """{measure: value} of a trained model; NaN where it has no meaning."""
        asked = self.asked
        odds = asked.odds(subject)
        said = odds > 0
        accuracy = percent(asked.truth, odds)
        families = [percent(asked.truth[mine], odds[mine]) for mine in self.families]
        # A twin is right if the answer was right and changes with the truth.
        flipped = subject.ask((picture, [asked.prompts[i]]) for picture, i in zip(self.edited, self.at))
        right = (said == asked.truth)[self.at]
        both_right = right & ((flipped > 0) != said[self.at])
        found = dict.fromkeys(MEASURES, math.nan)
        found.update(
            accuracy=accuracy,
            worst_family=np.nanmin(families),
            f1=evaluate.classification(asked.truth, said)["macro_f1"],
            twins=100 * both_right.mean(),
            held_out_drop=accuracy - percent(self.combos.truth, self.combos.odds(subject)),
            parameters=parameter_count(subject.model)[0])
        if maps:
            answers, _, word = evaluate.looks(subject, asked, self.looked)
            own = word.mean
            found.update(
                pointing=100 * evaluate.pointing(own, word.cover).mean(),
                enrichment=np.median(evaluate.enrichment(own, word.cover)),
                entropy=evaluate.entropy(answers).mean() / math.log(answers.shape[-1]))
        return found


# ---- the loop ----

def settings_of(cfg, variant, folder, seed):
    """Settings of one run. What only evaluation, the loop or the machine needs stays as cfg's."""
    return config.check(config.with_changes(cfg, **variant.settings, seed=seed, out_dir=str(folder)))


def same(a, b):
    """Whether two runs with these settings, dicts, train the same."""
    # A run may be resumed for longer, but one of another length is another run.
    free = train.RESUMABLE - {"read_pictures"}
    return all(b.get(name) == value for name, value in a.items() if name not in free)


def run_one(settings, variant, exam):
    """Train (or resume) one run and measure it. Returns its result, which its folder holds from then on."""
    folder = config.made_folder(settings.out_dir)
    with contextlib.suppress(OSError, ValueError):          # no result, or half of one
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if same(vars(settings), result["settings"]):
            return result
    start = time.time()
    with open(folder / "train.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        settings.resume = (folder / "last.pt").exists()
        settings.overwrite = True
        train.train(settings, variant.model, variant.data)
        measures = exam.measure(Subject(settings, variant.model), variant.maps)
    seconds = round(time.time() - start, 1)
    result = dict(settings=vars(settings), seconds=seconds, measures=rounded(measures))
    write(folder / "result.json", result)
    # A finished run is never resumed, and the optimizer's state takes twice the room of the weights.
    (folder / "last.pt").unlink(missing_ok=True)
    return result


def ablate(cfg):
    """Train and measure all runs that are not finished yet, write the table and the figures; returns the table.

    Raises UserError for a variant that does not exist, or if every run fails.
    """
    known = variants(cfg)
    names = config.listed(cfg.variants, known, "no variant") or known
    # "full" comes first, since the others are compared with it.
    results = {name: {} for name in ("full", *names)}
    failed = {}
    out = config.made_folder(cfg.out_dir)
    exam = Exam(cfg, prepare.ready(cfg))
    runs = [(name, cfg.seed + i) for i in range(cfg.seeds) for name in results]
    for count, (name, seed) in enumerate(runs, 1):
        try:
            settings = settings_of(cfg, known[name], out / f"{name}-{seed}", seed)
            result = run_one(settings, known[name], exam)
            results[name][seed] = result["measures"]
            outcome = f"accuracy {text_of(dict(value=result['measures']['accuracy']))}, {result['seconds']:.0f} s"
        except Exception as error:
            # The failure of one run is a row of the table, not the end.
            outcome = f"{type(error).__name__}: {error}"
            failed[name] = f"seed {seed}: {outcome}"
        print(f"{count}/{len(runs)}  {name}, seed {seed}: {outcome}", flush=True)
        table = make_table(cfg, known, results, failed)
        write_table(out, table)
    if not any(results.values()):
        raise UserError(f"every run failed; the last, {name}, at {failed[name]}")
    if table["tests"]:
        visualize.save(draw_differences(table), out / "differences", cfg.dpi, vector=True)
        visualize.save(draw_measures(table), out / "measures", cfg.dpi, vector=True)
    print(f"wrote {out / 'table.md'} and {out / 'table.json'}")
    return table


# ---- statistics ----

def sign_flip_test(differences):
    """Exact two-sided p of the mean of paired differences, over all 2^n flips of their signs."""
    d = np.asarray(differences, float)
    # The bits of the numbers below 2^n are all rows of n signs.
    bits = np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1
    sums = np.abs((1 - 2 * bits) @ d)
    # Sums that are equal but for rounding count as equal.
    return (sums >= abs(d.sum()) * (1 - 1e-12)).mean()


@functools.lru_cache
def student(df):
    """Angles a, and P(|t| < sqrt(df) tan(a)) for Student's t.

    With t = sqrt(df) tan(a), t's density becomes cos(a)^(df - 1), which is summed here on a fine grid.
    """
    angle = np.linspace(0, math.pi / 2, 200001)
    density = np.cos(angle) ** (df - 1)
    inside = np.concatenate(([0], np.cumsum(density[1:] + density[:-1])))
    return angle, inside / inside[-1]


def t_within(share, df):
    """The t within which Student's t stays with probability `share`."""
    angle, inside = student(df)
    return math.sqrt(df) * math.tan(np.interp(share, inside, angle))


def compared(differences):
    """What paired differences (one for each seed) say: n, their mean as value and, of two or more, the tests.

    low, high, p: 95% interval and two-sided p of the paired t-test; p_sign: of the exact sign-flip test; detectable:
    the difference that such a t-test finds at 5% in 80% of cases.
    """
    n = len(differences)
    value = np.mean(differences) if n else None
    if n < 2:
        return dict(n=n, value=value)
    error = np.std(differences, ddof=1) / math.sqrt(n)
    reach = t_within(0.95, n - 1) * error
    angle = math.atan2(abs(value), error * math.sqrt(n - 1))
    p = 1 - np.interp(angle, *student(n - 1))
    # t stays within this quantile in 60% of cases, so below it in 80%.
    detectable = reach + t_within(0.6, n - 1) * error
    return dict(
        n=n, value=value,
        low=value - reach, high=value + reach, p=p,
        p_sign=sign_flip_test(differences),
        detectable=detectable)


# ---- the table ----

MEASURES = {"accuracy": "balanced accuracy", "worst_family": "worst family", "f1": "macro F1",
            "twins": "twins, both right", "held_out_drop": "held-out drop", "pointing": "pointing",
            "enrichment": "enrichment", "entropy": "entropy", "parameters": "parameters"}
# In % but for enrichment (times), entropy (of the answer's attention, as a share of the largest) and parameters.
DIGITS = dict.fromkeys(MEASURES, 1) | {"enrichment": 2, "entropy": 2, "parameters": 0}


def make_table(cfg, known, results, failed):
    """All numbers of the finished runs: means, and differences to "full" of the same seeds; p of accuracy by Holm.

    known: the variants; results: {variant: {seed: measures}}; failed: {variant: why its last run failed}.
    """
    rows = []
    full = results["full"]
    for name, own in results.items():
        row = dict(variant=name, text=known[name].text, seeds=sorted(own), failed=failed.get(name))
        for measure in MEASURES:
            values = {seed: own[seed][measure] for seed in row["seeds"] if own[seed][measure] is not None}
            pairs = [value - full[seed][measure] for seed, value in values.items() if seed in full and name != "full"]
            mean = np.mean([*values.values()]) if values else None
            row[measure] = dict(value=mean, pairs=pairs, difference=compared(pairs))
        rows.append(row)
    # Only accuracy is tested: the more tests there are, the stricter is Holm's correction of each.
    tested = [row["accuracy"]["difference"] for row in rows if row["accuracy"]["difference"]["n"] > 1]
    for test, p in zip(tested, evaluate.holm([test["p"] for test in tested])):
        test["p_holm"] = p
        test["verdict"] = "no difference shown"
        if p < 0.05:
            test["verdict"] = "worse" if test["value"] < 0 else "better"
    shape = {k: getattr(cfg, k) for k in config.PRESETS["ablation"] if k not in ("data_dir", "out_dir")}
    return rounded(dict(rows=rows, settings=shape, tests=len(tested)))


def chance(p):
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def accuracy_cells(row):
    """A row of the first table: what the differences in accuracy say."""
    difference = row["accuracy"]["difference"]
    verdict = difference.get("verdict", "")
    if row["failed"]:
        verdict = f"failed, {row['failed']}".replace("|", "/").replace("\n", " ")
    return [f"{row['variant']}: {row['text']}",
            str(len(row["seeds"])),
            text_of(row["accuracy"], digits=1),
            text_of(difference, digits=1),
            *(chance(difference.get(name)) for name in ("p_sign", "p", "p_holm")),
            text_of(dict(value=difference.get("detectable")), digits=1),
            verdict]


def markdown(table):
    """The table as two tables of Markdown: the differences in accuracy, then the other measures."""
    heads = ["variant", "seeds", "accuracy", "difference [95%]", "p, sign flips", "p, t-test", "p, Holm", "detectable",
             ""]
    first = markdown_table(heads, [accuracy_cells(row) for row in table["rows"]])
    others = list(MEASURES)[1:]
    rows = [[row["variant"], *(text_of(row[m], digits=DIGITS[m]) for m in others)] for row in table["rows"]]
    return first + "\n" + markdown_table(["variant", *(MEASURES[m] for m in others)], rows)


def write_table(out, table):
    shape = ", ".join(f"{name}={value}" for name, value in table["settings"].items())
    head = (f"Balanced accuracy in % and its difference to \"full\" in points, paired by seed, on the same questions. "
            f"Interval and p are of the paired t-test; p of all sign flips is exact (at least 0.031 with 6 seeds, 0.25 "
            f"with 3); Holm: p of the t-test, corrected for {table['tests']} tests. Detectable: the difference that "
            f"the t-test finds in 80% of cases. All runs with {shape}.\n\n")
    write(out / "table.json", table)
    write(out / "table.md", head + markdown(table))


# ---- figures of the table ----

TICKS = (-40, -20, -10, -5, -3, -2, -1, 0, 1, 2, 3, 5, 10, 20, 40)


def draw_differences(table):
    """Accuracy compared with "full": the mean with its interval, and each seed."""
    rows = [row for row in table["rows"] if "p" in row["accuracy"]["difference"]]
    rows.sort(key=lambda row: row["accuracy"]["difference"]["value"])
    figure, (axes,) = visualize.plot(1, 1, 0.9 + 0.2 * len(rows))
    for y, row in enumerate(rows):
        pairs = row["accuracy"]["pairs"]
        axes.plot(pairs, [y] * len(pairs), "|", color=INK, ms=5, lw=0)
    means = {row["variant"]: row["accuracy"]["difference"] for row in rows}
    unshown = [name for name, difference in means.items() if difference["verdict"] == "no difference shown"]
    visualize.intervals(axes, means, SERIES[1], unshown, bars=False)
    axes.axvline(0, color=INK, lw=0.6)
    # A blind model loses 40 points, others one: linear up to 3 points, logarithmic beyond.
    axes.set_xscale("symlog", linthresh=3)
    limits = axes.get_xlim()
    axes.set_xticks(TICKS)
    axes.set_xlim(limits)
    axes.xaxis.set_major_formatter("{x:+g}")
    axes.set_xlabel("points of balanced accuracy compared with full: each seed, mean, 95% interval\n"
                    "orange: a difference is shown")
    return figure


def draw_measures(table):
    """Paired differences to "full" in every measure, coloured by how far they exceed what could be detected."""
    names = [m for m in MEASURES if m != "parameters"]
    full, *rows = table["rows"]
    rows = [row for row in rows if "p" in row["accuracy"]["difference"]]
    times = np.full((len(rows), len(names)), np.nan)
    texts = np.full(times.shape, "", object)
    for i, j in np.ndindex(times.shape):
        difference = rows[i][names[j]]["difference"]
        if difference["n"]:
            times[i, j] = difference["value"] / (difference.get("detectable") or math.inf)
            texts[i, j] = f"{difference['value']:+.{DIGITS[names[j]]}f}"
    heads = [MEASURES[m].replace(" ", "\n", 1) + f"\nfull: {text_of(full[m], digits=DIGITS[m])}" for m in names]
    figure, (axes,) = visualize.plot(1, 1, 1.2 + 0.2 * len(rows))
    visualize.heat(axes, times, [row["variant"] for row in rows], heads, texts, cmap="PuOr",
                   norm=Normalize(-3, 3), bar="times detectable; purple: higher")
    return figure


# ---- robustness: disturbances of pictures ----

def noise(picture, deviation, rng):
    return np.clip(picture + rng.normal(0, deviation, picture.shape), 0, 255).astype(np.uint8)


def blur(picture, radius, rng):
    image = Image.fromarray(picture)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius * len(picture) / 128)))


def darkness(picture, light, rng):
    return (picture * light).astype(np.uint8)


def jpeg(picture, quality, rng):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# What amounts to try, from weak to strong.
AMOUNTS = {
    noise: (4, 8, 16, 32, 64),              # standard deviation, of 255
    blur: (0.5, 1, 1.5, 2, 3),              # radius in pixels of a picture of 128
    darkness: (0.85, 0.7, 0.55, 0.4, 0.25), # share of the light that is left
    jpeg: (60, 40, 20, 10, 5)}              # quality of the file
ATTACK = (1, 2, 4, 8, 16)                   # largest change of a channel of a pixel, of 255


def scattered(picture, changed, rng):
    """The control of a change: the same differences of pixels, each at another place."""
    difference = (changed.astype(np.int16) - picture).reshape(-1, 3)
    return np.clip(picture + rng.permutation(difference).reshape(picture.shape), 0, 255).astype(np.uint8)


def attack(subject, pictures, prompts, truth, size, steps):
    """Pictures (n, h, w, 3) uint8 changed by at most `size` of 255, to make the right answer less likely.

    steps=1: FGSM, one step of that size along the gradient's sign; more: PGD, smaller steps, cut back to the size.
    """
    model = subject.model
    tokens, segment = as_rows([[ids] for ids in prompts], device=subject.device)
    # The odds of YES should fall where YES is right, and rise where NO is.
    wrong = torch.tensor(np.float32(1.0 - 2 * truth), device=subject.device)
    lowest = np.maximum(pictures - float(size), 0)
    highest = np.minimum(pictures + float(size), 255)
    step = size if steps == 1 else 2.5 * size / steps
    changed = pictures
    for _ in range(steps):
        images = subject.images(np.float32(changed)).requires_grad_(True)
        odds = model.odds(model.encode(images), tokens, segment)
        gradient, = torch.autograd.grad((wrong * odds).sum(), images)
        # Normalising only scales and shifts a pixel, so that the sign is that of the pixel's own gradient.
        signs = gradient.sign().permute(0, 2, 3, 1).cpu().numpy()
        changed = np.clip(changed + step * signs, lowest, highest)
    return changed.round().astype(np.uint8)


# ---- robustness: the studies ----

def elsewhere(box, width, height, rng):
    """A box as large as box (x1, y1, x2, y2) in such a picture that does not touch it; None if none is found."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    for _ in range(40):
        u, v = rng.integers(0, (width - w + 1, height - h + 1))
        if u >= x2 or u + w <= x1 or v >= y2 or v + h <= y1:
            return u, v, u + w, v + h
    return None


class Trial:
    """A sample of test questions, and how the answers and their maps change when something is disturbed.

    Every study adds rows of one form: study, name, size, accuracy, cosine, and those two of its control or None.
    """

    def __init__(self, subject, meta, count):
        self.subject = subject
        self.cfg = subject.cfg
        self.rows = []
        self.asked = asked = Questions(subject, meta, "test", 6 * count)
        chosen = asked.sample(count, 3)
        asked.hold(subject, asked.data, asked.rows[chosen], [asked.items[i] for i in chosen], asked.frames)
        self.all = np.arange(len(chosen))
        self.pictures = np.stack([asked.pixels(i) for i in self.all])
        self.odds, self.maps = self.watch(self.pictures, asked.prompts)
        self.add("undisturbed", "")

    def watch(self, pictures, prompts):
        """(log-odds (n,), mean map of the answer (n, P)) of a prompt for each picture, in float32."""
        return evaluate.watch(self.subject, ((picture, [ids]) for picture, ids in zip(pictures, prompts)))

    def score(self, pictures, prompts, of):
        """Accuracy, and cosine to the undisturbed maps, of the questions number `of`."""
        odds, maps = self.watch(pictures, prompts)
        accuracy = self.asked.accuracy(odds, of)
        # Where YES is right for all, as in occlusion, balanced accuracy has no meaning.
        if self.asked.truth[of].all():
            accuracy = self.asked.mean(odds > 0, of)
        cosine = evaluate.distances(self.maps[of], maps)["cosine"]
        return dict(accuracy=accuracy, cosine=self.asked.mean(cosine, of, 1))

    def add(self, study, name, pictures=None, prompts=None, of=None, control=None):
        """Score disturbed pictures or prompts, and the pictures of the control, and keep the row."""
        of = self.all if of is None else of
        own = [self.asked.prompts[i] for i in of]
        pictures = self.pictures[of] if pictures is None else pictures
        size = np.sqrt(np.mean((np.array(pictures, np.float32) - self.pictures[of]) ** 2))
        scores = self.score(pictures, prompts or own, of)
        control = None if control is None else self.score(control, own, of)
        self.rows.append(dict(study=study, name=name, size=size, **scores, control=control))

    def disturbed(self):
        """Noise, blur, less light and JPEG in five amounts; control: the same changes at other places."""
        rng = np.random.default_rng(0)
        for change, amounts in AMOUNTS.items():
            for amount in amounts:
                changed = np.stack([change(picture, amount, rng) for picture in self.pictures])
                control = [scattered(*pair, rng) for pair in zip(self.pictures, changed)]
                self.add(change.__name__, amount, changed, control=control)

    def attacked(self):
        """FGSM and PGD of five sizes; control: changes of the same size with random signs."""
        of = self.all[:math.ceil(self.cfg.probe_items / 3)]
        truth = self.asked.truth
        for size in ATTACK:
            signs = np.random.default_rng(size).choice([-size, size], self.pictures[of].shape)
            control = np.clip(self.pictures[of] + signs, 0, 255).astype(np.uint8)
            for name, steps in (("FGSM", 1), ("PGD", 7)):
                changed = []
                # A few at a time: what the gradients of all pictures need would fill the memory.
                for part in np.array_split(of, math.ceil(len(of) / 16)):
                    prompts = [self.asked.prompts[i] for i in part]
                    changed.extend(attack(self.subject, self.pictures[part], prompts, truth[part], size, steps))
                self.add(name, size, changed, of=of, control=control)

    def occluded(self):
        """A grey box over the one object that makes a right YES true; control: as large a box elsewhere."""
        rng = np.random.default_rng(0)
        of, hidden, control = [], [], []
        for i in np.flatnonzero(self.asked.truth & (self.odds > 0)):
            question = self.asked.questions[i]
            evidence = question.evidence(self.asked.view(i))
            if len(evidence) != 1:
                continue
            frame = self.asked.frame(i)
            labels = list(frame["labels"])
            label = labels.pop(evidence[0].label)
            # Something else may still make the answer YES, certainly or perhaps.
            if question.truth(View(dict(frame, labels=labels), self.cfg)) != FALSE:
                continue
            box = [round(edge) for edge in commands.corners(label)]
            other = elsewhere(box, self.cfg.image_width, self.cfg.image_height, rng)
            if other is None:
                continue
            of.append(i)
            # The same question about both pictures, so that the two differ in the place of the box alone.
            for pictures, (x1, y1, x2, y2) in ((hidden, box), (control, other)):
                pictures.append(self.pictures[i].copy())
                pictures[-1][y1:y2, x1:x2] = self.subject.blank[0, 0]
        if of:
            self.add("occlusion", "of the one object", hidden, of=np.array(of), control=control)

    def reworded(self):
        """The same question in other words, and its own words in any order."""
        rng = random.Random(0)
        questions = self.asked.questions
        words = [item["command"].split() for item in self.asked.items]
        wordings = {"that training used": [question.words(rng) for question in questions],
                    "that training never used": [question.words(rng, -1) for question in questions],
                    "shuffled": [" ".join(rng.sample(own, len(own))) for own in words]}
        for name, texts in wordings.items():
            self.add("words", name, prompts=[self.subject.tokenizer.prompt(text) for text in texts])

    def redrawn(self):
        """The same objects in another street, weather or hour (drawn scenes only)."""
        if self.cfg.source != "drawn":
            return
        size = prepare.size_of(self.cfg)
        specs = [self.asked.spec(i) for i in self.all]
        street = [draw_scene(dict(spec, seed=spec["seed"] + 1), size) for spec in specs]
        self.add("scene", "in another street", street)
        for kind, names in (("weather", prepare.WEATHERS), ("timeofday", prepare.TIMES)):
            # The first is that of training.
            for name in names[1:]:
                self.add("scene", name, [draw_scene(dict(spec, **{kind: name}), size) for spec in specs])


def real_frames(subject, cfg):
    """The row of the validation frames of cfg.bdd_dir, prepared in out_dir/bdd100k; control: a blank picture."""
    other = copy.copy(subject)
    # The rules and filters stay those of the checkpoint; only where the pictures come from changes.
    other.cfg = config.with_changes(subject.cfg, source="bdd100k", bdd_dir=cfg.bdd_dir, val_is_test=True,
                                    data_dir=str(Path(cfg.out_dir) / "bdd100k"), max_complexity=0)
    asked = Questions(other, prepare.ready(other.cfg), "test", 8000)
    blank = other.ask(asked.jobs(shown=lambda picture: subject.blank))
    return dict(study="real frames", name="of BDD100K", size=None, accuracy=asked.accuracy(asked.odds(other)),
                control=dict(accuracy=asked.accuracy(blank)))


def robustness(cfg):
    """Disturb what a trained model is shown and asked; writes out_dir/robustness.json, .md and a figure."""
    subject = Subject(cfg)
    subject.model.requires_grad_(False)                     # attacks need the gradient of the picture alone
    meta = subject.take_data()
    # First, so that a folder that cannot be read is found before the long work.
    real = [real_frames(subject, cfg)] if cfg.bdd_dir else []
    trial = Trial(subject, meta, 3 * cfg.probe_items // 2)
    for study in (trial.disturbed, trial.attacked, trial.occluded, trial.reworded, trial.redrawn):
        print(study.__name__, flush=True)
        study()
    page = rounded(dict(step=subject.state["step"], data_hash=meta["hash"], questions=len(trial.all),
                        rows=trial.rows + real))
    write_results(cfg, "robustness", page, robustness_markdown(page), draw_robustness(page))
    return page


def robustness_markdown(page):
    rows = []
    for row in page["rows"]:
        cells = [f"{row['study']} {row['name']}", text_of(dict(value=row["size"]), digits=1)]
        for part in (row, row["control"] or {}):
            for key, digits in (("accuracy", 1), ("cosine", 2)):
                cells.append(text_of(part[key], digits=digits) if key in part else "")
        rows.append(cells)
    head = (f"Balanced accuracy in % and the cosine of the answer's attention map to that of the undisturbed question, "
            f"for {page['questions']} test questions, with the 95% interval over pictures. Numbers: standard deviation "
            "of noise, radius of blur, share of light left, quality of JPEG, size of an attack. Size: of the change of "
            "a pixel, root mean square, of 255. Control: the same changes at other places; for FGSM and PGD, random "
            "signs; for real frames, a blank picture. Occlusion: a grey box over the one object that makes a right YES "
            "true, and the share of answers that stay YES; control: as large a box elsewhere.\n\n")
    return head + markdown_table(["what", "size", "accuracy", "cosine", "control: accuracy", "control: cosine"], rows)


def draw_robustness(page):
    """Accuracy and likeness of the maps by the amount of each disturbance, next to its control."""
    kinds = [*(change.__name__ for change in AMOUNTS), "FGSM", "PGD"]
    figure, upper, lower = visualize.plot(2, len(kinds), 3.0, sharex="col", sharey="row")
    for above, below, kind in zip(upper, lower, kinds):
        # A few questions may lack one of the two answers, which leaves their accuracy undefined.
        rows = [row for row in page["rows"] if row["study"] == kind and row["accuracy"]["value"] is not None]
        names = [row["name"] for row in rows]
        for axis, key in ((above, "accuracy"), (below, "cosine")):
            visualize.band(axis, names, [row[key] for row in rows], label="disturbed")
            visualize.band(axis, names, [row["control"][key] for row in rows], SERIES[3], "control")
            axis.axhline(page["rows"][0][key]["value"], **visualize.DOTTED)
        above.set_title(kind)
    upper[0].set_ylabel("balanced accuracy, %")
    lower[0].set_ylabel("cosine to the clean map")
    upper[0].legend()
    return figure


# ---- how fast training is ----

PARTS = ("data", "forward", "backward", "optimizer")        # of an update; data: waiting for the batch
TURNS, UPDATES = 4, 8                   # turns of both stages, the first to warm up; updates that count in each


def seconds_of(run, batches, reads):
    """Seconds that an update takes, by PARTS; reads: whether it is one of the second stage."""
    clock = Clock(run.device, exact=True)
    # The first batches were made ready while something else ran, so that their updates do not count.
    for i in range(run.cfg.prefetch + UPDATES):
        if i == run.cfg.prefetch:
            clock.start()
        micros = next(batches)
        clock.stop("data")
        run.update(micros, reads, clock)
    return np.array([clock.seconds[part] / UPDATES for part in PARTS])


def matmul_gflops(device, dtype):
    """The rate of a product of square matrices: what the machine can do at most."""
    # Large enough to keep all units of the device busy.
    side = 1024 if device.type == "cpu" else 8192
    square = torch.randn(side, side, device=device, dtype=dtype)
    return 2e-9 * side ** 3 / least_seconds(lambda: square @ square, device, 1)


def bench(cfg):
    """What training costs, in both stages and in the whole schedule; writes out_dir/bench.json and .md.

    For an update: ms and its parts, pairs per second (the first stage reads none), the share of waiting, and the share
    of the matmul peak that it reaches: FLOPs of the model forward, and twice that backward, without the tagger.
    """
    data = Data(cfg, prepare.ready(cfg), "train")
    run = Run(cfg, data, pick_device(cfg))
    updates = {"see": train.see_updates(cfg), "read": train.all_updates(cfg) - train.see_updates(cfg)}
    batches = run.batches(0, 2 * TURNS * (cfg.prefetch + UPDATES))
    seconds = {stage: [] for stage, count in updates.items() if count}
    peak = 0.0
    # In turns, so that a busy moment of the machine slows all alike.
    for _ in range(TURNS):
        for stage in seconds:
            seconds[stage].append(seconds_of(run, batches, stage == "read"))
            peak = max(peak, matmul_gflops(run.device, run.dtype))

    # Nothing was logged, so this counts all updates, of both stages, and the commands in them.
    _, done, pairs = run.unlogged
    costs = {}                                              # of an update: seconds by part, pairs, GFLOP
    for stage, turns in seconds.items():
        reads = stage == "read"
        gflop = 3e-9 * cfg.batch_size * cfg.grad_accum * forward_flops(run.model, cfg.row_tokens * reads)
        # The first turn warms up.
        costs[stage] = [*np.mean(turns[1:], 0), reads * pairs / done, gflop]
    costs["schedule"] = np.average(list(costs.values()), 0, [updates[stage] for stage in costs])
    found = dict(
        device=str(run.device),
        dtype=str(run.dtype)[6:],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        matmul_gflops=peak,
        memory_mb=train.peak_memory(run.device))
    for name, (*parts, pairs, gflop) in costs.items():
        whole = sum(parts)
        found[name] = dict(
            ms=1000 * whole,
            **{f"ms_{part}": 1000 * spent for part, spent in zip(PARTS, parts)},
            pairs_per_s=pairs / whole,
            wait_share=parts[0] / whole,
            share_of_peak=gflop / whole / peak)
    found = rounded(found)
    speed, memory = (text_of(dict(value=found[name]), digits=0) for name in ("matmul_gflops", "memory_mb"))
    text = (f"{found['device']}, {found['dtype']}, torch {found['torch']}, threads: {found['threads']}. A product of "
            f"matrices reaches {speed} GFLOP/s; training takes {memory} MB. An update of each stage, and the mean of "
            "all updates:\n\n")
    rows = [[name, *(f"{found[stage][name]:.3g}" for stage in costs)] for name in found["schedule"]]
    write_results(cfg, "bench", found, text + markdown_table(["an update", *costs], rows))
    return found


# ---- which learning rates ----

LOWEST, HIGHEST, STEPS = 1e-3, 10.0, 150    # of the range, in multiples of the rates of the settings; updates


def rising_rates(run, reads):
    """{scale, loss, suggested} while all learning rates grow from LOWEST to HIGHEST times their peaks (Smith 2017).

    loss: a running mean, until it doubles from its least or is not finite. suggested: the lowest scale at which the
    loss has done 95% of its fall. Higher rates gain little and are nearer to where learning gets unstable.
    """
    scales, losses = [], []
    mean = 0.0
    # Equal steps of the logarithm: rates differ by factors.
    for i, scale in enumerate(np.geomspace(LOWEST, HIGHEST, STEPS).tolist()):
        for group in run.optimizer.param_groups:
            group["lr"] = scale * group["peak"]
        loss, _, done = run.update(run.data.micro_batches(i), reads, Clock(run.device))
        mean = 0.9 * mean + 0.1 * loss
        smooth = mean / (1 - 0.9 ** (i + 1))                # the mean starts at 0
        if not done or losses and smooth > 2 * min(losses):
            break
        scales.append(scale)
        losses.append(smooth)
    if not losses:
        raise UserError(f"the loss is {loss} before anything is learned: try --dtype=float32")
    enough = losses[0] - 0.95 * (losses[0] - min(losses))
    suggested = next(scale for scale, loss in zip(scales, losses) if loss <= enough)
    return dict(scale=scales, loss=losses, suggested=suggested)


# The title of each stage, and the rates that it uses.
STAGES = {
    "see": ("first stage: the encoder alone", ("lr_vision",)),
    "read": ("second stage, from new weights", ("lr", "lr_projection", "lr_vision"))}


def lr_range(cfg):
    """The loss at rising learning rates, for both stages, each from new weights; suggests rates.

    Writes out_dir/lr_range.json, .md and a figure. The encoder of the second stage has learned nothing before, so that
    its rates may be somewhat higher than this says.
    """
    data = Data(cfg, prepare.ready(cfg), "train")
    found, text = {}, ""
    stages = ("see", "read") if train.see_updates(cfg) else ("read",)
    figure, axes = visualize.plot(1, len(stages), 2.1)
    for stage, axis in zip(stages, axes):
        title, names = STAGES[stage]
        # Each stage begins anew, with the same weights.
        torch.manual_seed(cfg.seed)
        entry = found[stage] = rising_rates(Run(cfg, data, pick_device(cfg)), stage == "read")
        rates = [f"--{name}={entry['suggested'] * getattr(cfg, name):.1e}" for name in names]
        text += f"{title}: try {' '.join(rates)}, {entry['suggested']:.2g} times the rates of the settings.\n\n"
        axis.plot(entry["scale"], entry["loss"], color=SERIES[0])
        axis.axvline(entry["suggested"], color=SERIES[1], lw=0.8, label="suggested")
        axis.set(title=title, xscale="log", xlabel="times the rates of the settings", ylabel="running loss")
        axis.legend()
    write_results(cfg, "lr_range", found, text, figure)
    return found


JOBS = {"robustness": robustness, "bench": bench, "lr_range": lr_range}


def main(cfg):
    job = next((job for name, job in JOBS.items() if getattr(cfg, name)), ablate)
    with config.locked(cfg.out_dir):
        job(cfg)


if __name__ == "__main__":
    # The loop trains small models; the other jobs are about the model that train.py makes.
    given = {argument.lower() for argument in sys.argv[1:]}
    other_job = any(f"--{name}=true" in given for name in JOBS)
    config.run(main, __doc__, preset="default" if other_job else "ablation")
