"""Measuring a trained model without mercy: accuracy beside its controls, twins, reasons, calibration, attention.

- Every figure has n and a 95% interval from a bootstrap over pictures: commands of one picture are not independent.
- Controls: blank picture, another scene's picture, a decoder trained here without pictures. Vision gain: what is left.
- Twins: the scene edited so that the answer flips, or must not; only the right picture tells which.
- Attention: does it point at what the word names? Each score stands beside chance, the picture's centre, the map of
  another command, the map of another picture and the same model with untrained weights; then deletion and insertion.
- Heads: what each looks for, and what is lost without it. Failures: asked again in parts, to say what kind they are.

    python evaluate.py
    python evaluate.py --checkpoint=out/default/last.pt --split=val
    python evaluate.py --against=out/seed1/best.pt          paired comparison of two checkpoints

Writes to out_dir: eval.json (every figure), failures.jsonl (every wrong answer), attention.npz (maps for figures).

Shapes: n questions, U pictures, R resamples, L layers, H heads, T tokens, P patches, C categories.
"""
import contextlib
import functools
import itertools
import json
import math
import random
import re
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import commands
import config
import prepare
import train
from commands import CATEGORIES, LIGHTS, UNSURE, Question, View
from config import UserError
from model import VLM
from tokenizer import NO, YES
from train import Data

FORMAT = 1                    # of eval.json; another one asks for a new evaluation
FAMILIES = ("detection", "state", "safety", "navigation")

# ---- statistics ----


@functools.lru_cache(maxsize=4)
def resamples_of(units, resamples):
    """How often each of `units` is drawn in each resample: (R, U) float32, the same for the same arguments."""
    drawn = np.random.default_rng(0).integers(units, size=(resamples, units)) + units * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=units * resamples).reshape(resamples, units).astype(np.float32)


def row(n, value=None, draws=()):
    """One figure: n, value and 95% percentile interval of its resampled values; None where it is not defined."""
    draws = np.asarray(draws, float)
    draws = draws[np.isfinite(draws)]
    if value is None or not math.isfinite(value) or not len(draws):
        return dict(n=int(n), value=None, low=None, high=None)
    low, high = np.percentile(draws, (2.5, 97.5))
    return dict(n=int(n), value=float(value), low=float(low), high=float(high))


def interval(picture, columns, statistic, resamples):
    """What `statistic` makes of sums of columns, with pictures resampled (Efron and Tibshirani 1993, chapter 13).

    picture (n,); columns: C arrays (n,); statistic: sums (..., C) to (...). Returns a `row`.
    """
    pictures, unit = np.unique(picture, return_inverse=True)
    if not len(pictures):
        return row(0)
    sums = np.stack([np.bincount(unit, np.asarray(c, float), len(pictures)) for c in columns], 1)       # (U, C)
    with np.errstate(divide="ignore", invalid="ignore"):
        return row(len(unit), statistic(sums.sum(0)), statistic(resamples_of(len(pictures), resamples) @ sums))


def mean_row(picture, values, resamples, scale=100):
    """Mean of values (n,), by default in %."""
    return interval(picture, (values, np.ones(len(values))), lambda s: scale * s[..., 0] / s[..., 1], resamples)


def median_row(picture, values, resamples):
    pictures, unit = np.unique(picture, return_inverse=True)
    if not len(pictures):
        return row(0)
    order = np.argsort(values)
    weight = resamples_of(len(pictures), resamples)[:, unit[order]].cumsum(1)                           # (R, n)
    return row(len(unit), np.median(values), values[order][(weight < weight[:, -1:] / 2).sum(1)])


def balanced(s):
    """Balanced accuracy in % of sums (..., 4): YES items, YES said to them, NO items, YES said to them."""
    return 50 * (s[..., 1] / s[..., 0] + 1 - s[..., 3] / s[..., 2])


def yes_no(truth, said):
    """The four columns of `balanced` from bools (n,)."""
    truth, said = np.asarray(truth, bool), np.asarray(said, bool)
    return truth, truth & said, ~truth, ~truth & said


def accuracy_row(truth, said, picture, resamples):
    """Balanced accuracy in %."""
    return interval(picture, yes_no(truth, said), balanced, resamples)


def difference_row(truth, a, b, picture, resamples):
    """Balanced accuracy of answers b minus that of answers a to the same questions, paired, in points."""
    return interval(picture, (*yes_no(truth, a), *yes_no(truth, b)),
                    lambda s: balanced(s[..., 4:]) - balanced(s[..., :4]), resamples)


def drop_row(first, second, resamples):
    """Balanced accuracy on one set of questions minus that on another, in points; each (truth, said, picture)."""
    blocks = [np.array(yes_no(*one[:2]), float) for one in (first, second)]                     # (4, n) each
    columns = np.zeros((8, sum(b.shape[1] for b in blocks)))
    columns[:4, :blocks[0].shape[1]], columns[4:, blocks[0].shape[1]:] = blocks
    return interval(np.concatenate((first[2], second[2])), columns,
                    lambda s: balanced(s[..., :4]) - balanced(s[..., 4:]), resamples)


def correlation_row(picture, x, y, resamples):
    """Spearman's rank correlation of x and y, each (n,)."""
    x, y = (np.argsort(np.argsort(v)) / max(len(v), 1) - 0.5 for v in (x, y))

    def pearson(s):
        n, sx, sy, sxx, syy, sxy = np.moveaxis(s, -1, 0)
        return (n * sxy - sx * sy) / np.sqrt((n * sxx - sx ** 2) * (n * syy - sy ** 2))
    return interval(picture, (np.ones(len(x)), x, y, x * x, y * y, x * y), pearson, resamples)


def mcnemar(a_right, b_right):
    """(only a right, only b right, two-sided mid-p): McNemar's test of two models on the same questions.

    The mid-p version holds its level, where the exact one is too careful (Fagerland et al. 2013). It takes questions
    as independent, which those of one picture are not: read it beside the paired bootstrap.
    """
    a_right, b_right = np.asarray(a_right, bool), np.asarray(b_right, bool)
    only_a, only_b = int((a_right & ~b_right).sum()), int((~a_right & b_right).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    chance = lambda i: math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)      # noqa: E731
                                - n * math.log(2))
    return only_a, only_b, min(1.0, 2 * sum(chance(i) for i in range(k + 1)) - chance(k)) if n else 1.0


def sign_flip_test(differences):
    """Exact two-sided p of the mean of paired differences, over all 2^n flips of their signs (n up to 20)."""
    d = np.asarray(differences, float)
    if not 1 <= len(d) <= 20:
        raise ValueError(f"an exact sign-flip test takes 1 to 20 differences, not {len(d)}")
    signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
    sums = np.abs(signs @ d)
    return float((sums >= abs(d.sum()) * (1 - 1e-12)).mean())


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


def t_interval(mean, error, df):
    """(mean, low, high, two-sided p) of a mean with its standard error, by Student's t; 95% interval."""
    angle, inside = student(df)
    reach = t_within(0.95, df) * error
    p = 1 - np.interp(math.atan2(abs(mean), error * math.sqrt(df)), angle, inside) if error or mean else 1.0
    return float(mean), float(mean - reach), float(mean + reach), float(p)


def t_test(differences):
    """As t_interval, of paired differences."""
    d = np.asarray(differences, float)
    return t_interval(d.mean(), d.std(ddof=1) / math.sqrt(len(d)), len(d) - 1)


def holm(p_values):
    """p-values adjusted for all of them being looked at (Holm 1979), in the order given."""
    p = np.asarray(p_values, float)
    order, adjusted, worst = np.argsort(p, kind="stable"), np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = worst
    return adjusted.tolist()


# ---- texts ----

def bleu4(pairs):
    """BLEU-4 in % of (generated, reference) texts, over the whole set (Papineni et al. 2002)."""
    same, made, lengths = np.zeros(4), np.zeros(4), np.zeros(2)
    for said, wanted in ((a.split(), b.split()) for a, b in pairs):
        lengths += len(said), len(wanted)
        for n in range(1, 5):
            grams = [Counter(zip(*(words[i:] for i in range(n)))) for words in (said, wanted)]
            same[n - 1] += sum((grams[0] & grams[1]).values())
            made[n - 1] += sum(grams[0].values())
    if not same.all():
        return 0.0
    return float(100 * min(1.0, math.exp(1 - lengths[1] / lengths[0])) * np.exp(np.log(same / made).mean()))


def rouge_l(said, wanted):
    """ROUGE-L F1 in [0, 1] of two texts: their longest common subsequence of words (Lin 2004)."""
    a, b = said.split(), wanted.split()
    longest = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, longest[j] = longest[j], diagonal + 1 if x == y else max(longest[j], longest[j - 1])
    return 2 * longest[-1] / (len(a) + len(b)) if a or b else 1.0


# ---- calibration ----

def calibration_bins(p, truth, bins=15, equal_mass=False):
    """[(n, mean p, share of YES)] of the bins that hold something. p (n,) probability of YES; p = 1 is in the last."""
    order = np.argsort(p, kind="stable")
    parts = np.array_split(order, bins) if equal_mass else \
        [np.flatnonzero(np.minimum((p * bins).astype(int), bins - 1) == b) for b in range(bins)]
    return [(len(i), float(p[i].mean()), float(truth[i].mean())) for i in parts if len(i)]


def ece(p, truth, bins=15, equal_mass=False):
    """Expected calibration error in points (Naeini et al. 2015): mean |share of YES - mean p| of the bins, by size."""
    return 100 * sum(n * abs(q - y) for n, q, y in calibration_bins(p, truth, bins, equal_mass)) / len(p)


def fit_temperature(odds, truth):
    """The T that minimises the loss of odds / T (Guo et al. 2017), by ternary search on log T in [1/20, 20]."""
    loss = lambda t: np.logaddexp(0, np.where(truth, -odds, odds) / math.exp(t)).mean()         # noqa: E731
    low, high = -3.0, 3.0
    for _ in range(60):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp((low + high) / 2)


def calibration(odds, truth):
    """ECE by both binnings, each with what a perfectly calibrated model of these p would measure, Brier and bins."""
    p = 1 / (1 + np.exp(-odds.astype(float)))
    drawn = np.random.default_rng(0).random((200, len(p))) < p
    found = dict(n=len(p), brier=float(((p - truth) ** 2).mean()), bins=calibration_bins(p, truth))
    for name, mass in (("ece", False), ("ece_equal_mass", True)):
        null = [ece(p, y, equal_mass=mass) for y in drawn]
        found[name] = dict(value=ece(p, truth, equal_mass=mass), calibrated=float(np.mean(null)),
                           calibrated_high=float(np.percentile(null, 97.5)))
    return found


# ---- asking the model ----

class Subject:
    """A trained model with what is needed to ask it: settings, tokenizer, channel means, device, precision."""

    def __init__(self, cfg, make_model=VLM):
        self.model, self.cfg, self.tokenizer, self.state, self.device = train.load_model(cfg, make_model)
        self.dtype, self.why = train.pick_dtype(self.cfg, self.device)

    def images(self, pictures):
        """uint8 pictures (B, S, S, 3) as the model wants them."""
        return torch.from_numpy(train.normalise(pictures, self.state["mean"], self.state["std"])).to(self.device)

    def ask(self, jobs):
        """Log-odds of YES for jobs (picture, [prompts]): yields an array a job. Pictures are taken as they come."""
        jobs = iter(jobs)
        while batch := list(itertools.islice(jobs, self.cfg.eval_batch)):
            pictures, prompts = zip(*batch)
            yield from train.answer_odds(self.model, self.images(np.stack(pictures)), prompts, self.device, self.dtype)

    @torch.no_grad()
    def look(self, jobs, model=None):
        """Cross-attention for jobs (picture, [prompts]): yields (L, H, T, P) float32 for each prompt in turn.

        In float32 whatever the dtype: bfloat16 has 8 bits, so that the largest patches of a map would tie.
        """
        model, jobs = model or self.model, iter(jobs)
        while batch := list(itertools.islice(jobs, 16)):
            pictures, prompts = zip(*batch)
            tokens, attn = train.rectangle(prompts).to(self.device), {"self": [], "cross": []}
            model.decoder(tokens.flatten(0, 1), model.encode(self.images(np.stack(pictures))), attn=attn)
            cross = torch.stack(attn["cross"], 1).unflatten(0, tokens.shape[:2]).cpu().numpy()   # (B, K, L, H, T, P)
            for b, own in enumerate(prompts):
                for k, ids in enumerate(own):
                    yield cross[b, k, :, :, :len(ids)]


class Questions:
    """The questions of a set: .items (dicts), .truth, .picture and .prompts (n), with their pictures and frames.

    limit: about so many, of whole pictures, spread over the set; 0 = all. verdicts=False: the commands that ask for a
    description instead.
    """

    def __init__(self, subject, meta, name, limit=0, verdicts=True):
        cfg = subject.cfg
        self.data = data = Data(cfg, meta, name)
        if data.tokenizer.words != subject.tokenizer.words:
            raise UserError(f"the checkpoint's vocabulary is not that of the data in {cfg.data_dir}: train again, "
                            "or pass the --data_dir that it was trained on")
        rows = np.flatnonzero((data.index[:, 3] >= 0) == verdicts)
        if limit and limit < len(rows):
            pictures = np.unique(data.index[rows, 0])
            kept = pictures[np.linspace(0, len(pictures) - 1, max(1, len(pictures) * limit // len(rows))).astype(int)]
            rows = rows[np.isin(data.index[rows, 0], kept)]
        items = prepare.read_items(cfg.data_dir, name)
        self.rows, self.items = rows, [items[r] for r in rows]
        self.questions = [Question(i["template"], i["first"], i["second"]) for i in self.items]
        self.truth, self.picture = data.index[rows, 3] == 1, data.index[rows, 0]
        self.prompts = [data.tokens[r, :data.index[r, 1]].tolist() for r in rows]
        wanted = set(self.picture.tolist())
        with open(Path(cfg.data_dir) / "frames.jsonl", encoding="utf-8") as file:
            self.frames = {f["index"]: f for f in map(json.loads, file) if f["index"] in wanted}
        self.views = {p: View(frame, cfg) for p, frame in self.frames.items()}

    def jobs(self, chosen=None):
        """(picture, [prompts]) for Subject.ask and .look, neighbours of one picture together; chosen: which (m,)."""
        chosen = range(len(self.rows)) if chosen is None else chosen
        for picture, group in itertools.groupby(chosen, key=lambda i: self.picture[i]):
            yield self.data.images[picture], [self.prompts[i] for i in group]

    def odds(self, subject):
        return np.concatenate(list(subject.ask(self.jobs())) or [np.zeros(0)])

    def sample(self, count, seed, where=None):
        """Up to `count` of the questions (or of those where `where` is true), drawn by seed, in order."""
        those = np.flatnonzero(np.ones(len(self.rows), bool) if where is None else where)
        return np.sort(np.random.default_rng(seed).permutation(those)[:count])

    def sample_pictures(self, count):
        """About `count` of the questions: all of some pictures, drawn by seed 0."""
        pictures = np.random.default_rng(0).permutation(np.unique(self.picture))
        return np.flatnonzero(np.isin(self.picture, pictures[:-(-len(pictures) * count // max(len(self.rows), 1))]))


# ---- accuracy ----

def classification(truth, said):
    """Confusion matrix, accuracy, and precision, recall and F1 of both answers, in %."""
    counts = {f"{t}_said_{s}": int(((truth == (t == "yes")) & (said == (s == "yes"))).sum())
              for t in ("yes", "no") for s in ("yes", "no")}
    found = dict(confusion=counts, accuracy=100 * float((truth == said).mean()))
    for answer in ("yes", "no"):
        other = "no" if answer == "yes" else "yes"
        hit = counts[f"{answer}_said_{answer}"]
        made, there = hit + counts[f"{other}_said_{answer}"], hit + counts[f"{answer}_said_{other}"]
        found[answer] = dict(precision=100 * hit / max(made, 1), recall=100 * hit / max(there, 1),
                             f1=200 * hit / max(made + there, 1))
    found["macro_f1"] = (found["yes"]["f1"] + found["no"]["f1"]) / 2
    return found


def breakdowns(asked):
    """{breakdown: [names of the groups that a question is in]}, one list a question."""
    def span(value, *starts):
        low = max(s for s in starts if s <= value)
        after = [s for s in starts if s > low]
        return f"{low} or more" if not after else str(low) if after[0] == low + 1 else f"{low} to {after[0] - 1}"

    views, frames = ([table[p] for p in asked.picture] for table in (asked.views, asked.frames))
    named = [sum(o.category in q.objects for o in view.objects) for q, view in zip(asked.questions, views)]
    there = lambda key: [[frame["attributes"].get(key) or "undefined"] for frame in frames]      # noqa: E731
    return {
        "family": [[i["family"]] for i in asked.items], "level": [[i["level"]] for i in asked.items],
        "template": [[q.template] for q in asked.questions], "object": [q.objects for q in asked.questions],
        "place": [[q.place or "anywhere"] for q in asked.questions],
        "objects seen in the scene": [[span(f["complexity"], 0, 3, 5, 7, 9)] for f in frames],
        "objects of the asked kind": [[span(n, 0, 1, 2, 3)] if q.objects else ["none asked"]
                                      for n, q in zip(named, asked.questions)],
        "words": [[span(len(p) - 2, 0, 5, 7, 9, 11)] for p in asked.prompts],
        "weather": there("weather"), "time of day": there("timeofday"), "scene": there("scene")}


def broken_down(asked, odds, resamples):
    """{breakdown: {group: row}}: balanced accuracy. A family without questions has a row with n = 0."""
    found = {}
    for name, memberships in breakdowns(asked).items():
        groups = sorted({g for own in memberships for g in own}, key=lambda g: (int("0" + re.match(r"\d*", g)[0]), g))
        groups = FAMILIES if name == "family" else groups
        found[name] = {}
        for group in groups:
            mine = np.array([group in own for own in memberships], bool)
            found[name][group] = accuracy_row(asked.truth[mine], odds[mine] > 0, asked.picture[mine], resamples)
    return found


def blind_model(subject, meta, steps=300, size=256):
    """The log-odds function of a decoder trained here on the training questions without any picture.

    What it knows, the questions alone give away: it must score 50. Returns odds(prompts) -> (n,).
    """
    data, rng = Data(subject.cfg, meta, "train"), np.random.default_rng(0)
    rows = np.flatnonzero(data.index[:, 3] >= 0)
    torch.manual_seed(0)
    decoder = VLM(subject.cfg, len(subject.tokenizer)).decoder.to(subject.device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)

    def verdicts(prompts):
        with train.autocast(subject.dtype, subject.device):
            return train.verdicts(decoder, train.rectangle([prompts])[0].to(subject.device))[0]

    for _ in range(steps):
        batch = rng.choice(rows, size)
        truth = torch.from_numpy(data.index[batch, 3].astype(np.float32)).to(subject.device)
        loss = F.binary_cross_entropy_with_logits(verdicts([data.tokens[r, :data.index[r, 1]].tolist()
                                                            for r in batch]), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def odds(prompts):
        return torch.cat([verdicts(prompts[i:i + 1024]) for i in range(0, len(prompts), 1024)]).cpu().numpy()
    return odds


# ---- twins ----

def draw_twin(job):
    """The picture of an edited scene; job: its name, the edit, settings."""
    name, edit, cfg = job
    return prepare.draw_scene(prepare.apply_edit(prepare.sample_scene(name, cfg), edit), cfg.image_size)


def twins(subject, asked, odds):
    """Answers to the edited scenes: pairs both right, stubbornness, indecision; and the neutral pictures' questions.

    Chance of a pair is 25%. Stubborn: the truth flipped, the answer did not. Indecisive: the other way round.
    """
    cfg, resamples = subject.cfg, subject.cfg.bootstrap
    position = {int(r): i for i, r in enumerate(asked.rows)}
    with open(Path(cfg.data_dir) / "twins.jsonl", encoding="utf-8") as file:
        edits = [e for e in map(json.loads, file) if e["item"] in position]
    found = dict(questions=len(edits), questions_with_flip=sum(e["flip"] is not None for e in edits))
    right = (odds > 0) == asked.truth
    for kind, flips in (("flip", True), ("neutral", False)):
        known = [e for e in edits if e[kind]]
        at = np.array([position[e["item"]] for e in known], int)
        jobs = [(Path(asked.frames[asked.picture[i]]["name"]).stem, e[kind], cfg) for i, e in zip(at, known)]
        pictures = prepare.parallel(draw_twin, jobs, cfg, f"{kind} twins", len(jobs))
        edited = np.concatenate(list(subject.ask(zip(pictures, ([asked.prompts[i]] for i in at)))) or [np.zeros(0)])
        changed, own = (edited > 0) != (odds[at] > 0), asked.picture[at]
        if not flips:
            found["indecision"] = mean_row(own, changed, resamples)
            found["neutral_unchanged"] = mean_row(own, ~changed, resamples)
            continue
        both = right[at] & changed                      # the answer was right, and it changed with the truth
        found["both_right"], found["stubbornness"] = (mean_row(own, x, resamples) for x in (both, ~changed))
        for by, names in (("family", [asked.items[i]["family"] for i in at]),
                          ("edit", [e["flip"]["kind"] for e in known])):
            found[f"both_right_by_{by}"] = {
                name: mean_row(own[mine], both[mine], resamples)
                for name in sorted(set(names)) for mine in [np.array([x == name for x in names])]}
    return found


# ---- reasons ----

@torch.no_grad()
def generate(subject, jobs):
    """What the model says, greedily, to jobs (picture, [prompts]): [(answer True, False or None, text)]."""
    model, said, jobs = subject.model, [], iter(jobs)
    while batch := list(itertools.islice(jobs, subject.cfg.eval_batch)):
        pictures, prompts = zip(*batch)
        tokens = train.rectangle(prompts, left=True).to(subject.device)
        room = min(subject.cfg.max_new_tokens, subject.cfg.max_text - tokens.shape[-1])
        with train.autocast(subject.dtype, subject.device):
            new, _ = model.generate(subject.images(np.stack(pictures)), tokens, room)
        for b, own in enumerate(prompts):
            for ids in new[b, :len(own)].tolist():
                verdict = {YES: True, NO: False}.get(ids[0])
                said.append((verdict, subject.tokenizer.decode(ids if verdict is None else ids[1:])))
    return said


def reasons(subject, asked, count):
    """Generated reasons, or descriptions, against the written ones and against the rules: is what they claim true?

    A claim on which the rules are undecided, or that is not in the grammar, counts as not true and as not false.
    Shortcut rate: of the right answers, those whose reason is false.
    """
    chosen = asked.sample(count, 1)
    said, resamples, own = generate(subject, asked.jobs(chosen)), subject.cfg.bootstrap, asked.picture[chosen]
    pairs = [(text, asked.items[i]["reason"]) for (_, text), i in zip(said, chosen)]
    truth = np.array([-1 if t is None else t for t in (commands.check_reason(text, asked.views[asked.picture[i]])
                                                       for (_, text), i in zip(said, chosen))])
    found = dict(exact=mean_row(own, [a == b for a, b in pairs], resamples),
                 bleu4=dict(n=len(pairs), value=bleu4(pairs)),
                 rouge_l=mean_row(own, [rouge_l(*p) for p in pairs], resamples),
                 true=mean_row(own, truth == commands.TRUE, resamples),
                 false=mean_row(own, truth == commands.FALSE, resamples),
                 not_in_grammar=mean_row(own, truth == -1, resamples))
    if any(item["answer"] is not None for item in asked.items):             # else: descriptions
        valid = np.array([verdict is not None for verdict, _ in said], bool)
        right = np.array([verdict == asked.truth[i] for (verdict, _), i in zip(said, chosen)], bool)
        found.update(valid_answers=mean_row(own, valid, resamples),
                     true_when_answer_right=mean_row(own[right], truth[right] == commands.TRUE, resamples),
                     true_when_answer_wrong=mean_row(own[~right], truth[~right] == commands.TRUE, resamples),
                     shortcut_rate=mean_row(own[right], truth[right] == commands.FALSE, resamples))
    return found


# ---- grounding: does attention point at what is asked? ----

# The word of a command that names a category: the last of its noun.
NAMED = {c: {noun.split()[-1] for noun in commands.NOUNS[c]} for c in CATEGORIES}
NAMED["traffic light"] |= {"signal", "light", "lamp"}


def cover(labels, size, side):
    """Share of each of side x side patches that the labels' boxes cover together: (side * side,)."""
    pixels = np.zeros((size, size))
    for label in labels:
        x1, y1, x2, y2 = (label["box2d"][k] for k in ("x1", "y1", "x2", "y2"))
        pixels[max(math.floor(y1), 0):math.ceil(y2), max(math.floor(x1), 0):math.ceil(x2)] = 1
    return pixels.reshape(side, size // side, side, size // side).mean((1, 3)).ravel()


def pointing(maps, covers):
    """Whether the largest patch of each map (n, P) touches the boxes, the share of the largest where several tie: (n,).

    The pointing game (Zhang et al. 2016) with a tolerance of half a patch; a uniform map scores the chance of a patch.
    """
    top = maps >= maps.max(-1, keepdims=True)
    return (top & (covers > 0)).sum(-1) / top.sum(-1)


def mass_in_box(maps, covers):
    """Share of attention inside the boxes, taking it as even within a patch: (n,)."""
    return (maps * covers).sum(-1) / maps.sum(-1)


def enrichment(maps, covers):
    """Attention inside the boxes over their share of the picture: 1 for a uniform map. (n,)."""
    return mass_in_box(maps, covers) / covers.mean(-1)


def box_iou(maps, covers, threshold):
    """IoU of the boxes and the patches of at least threshold * the map's maximum: (n,)."""
    region = maps >= threshold * maps.max(-1, keepdims=True)
    common = (region * covers).sum(-1)
    return common / (region.sum(-1) + covers.sum(-1) - common)


Look = namedtuple("Look", "question category maps cover")
# of a word that names something: index of its question, its category, its maps (m, L, H, P), cover of its boxes (m, P)


def looks(subject, asked, chosen, model=None):
    """(answer maps (n, L, H, P) of the chosen questions, Look of their answers, Look of the words that name objects).

    An object's word is judged by all certain objects of its category: it comes before the place is named. The answer
    is judged by those that make it YES: only YES can point at something.
    """
    cfg = subject.cfg
    side, answers = cfg.image_size // cfg.patch_size, []
    found = {"answer": ([], [], [], []), "word": ([], [], [], [])}

    def add(kind, *values):
        for column, value in zip(found[kind], values):
            column.append(value)

    for i, cross in zip(chosen, subject.look(asked.jobs(chosen), model)):
        view, question = asked.views[asked.picture[i]], asked.questions[i]
        labels = asked.frames[asked.picture[i]]["labels"]
        answers.append(cross[:, :, -1])
        words = [subject.tokenizer.words[t] for t in asked.prompts[i]]
        for category in dict.fromkeys(question.objects):
            seen = [labels[o.label] for truth, o in view.matching(category) if truth == commands.TRUE]
            at = [t for t, word in enumerate(words) if word in NAMED[category]]
            if seen and at:
                add("word", i, category, cross[:, :, at[0]], cover(seen, cfg.image_size, side))
        if asked.truth[i] and question.objects:
            place = question.second if question.template == "exists_at" else None
            near = True if question.template == "near" else None
            names = question.objects[:1] if question.template == "and_no" else question.objects
            seen = [labels[o.label] for name in names for truth, o in view.matching(name, place, near)
                    if truth == commands.TRUE]
            if seen:
                add("answer", i, question.objects[0], answers[-1], cover(seen, cfg.image_size, side))
    answer, word = (Look(np.array(found[kind][0], int), *map(np.array, found[kind][1:])) for kind in ("answer", "word"))
    return np.array(answers), answer, word


def baseline_maps(look, picture, side, untrained):
    """{name: maps (m, P)} to set beside the model's own: what a look that knows less would score.

    Another command's map is that of a word for another kind in the same picture; another picture's map is that of a
    word for the same kind. Where there is none, the map is uniform.
    """
    n, own, where = len(look.question), look.maps.mean((1, 2)), picture[look.question]
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    centre = np.exp(-(x ** 2 + y ** 2) / (side / 2) ** 2).ravel()
    together, alike = {}, {}
    for i in range(n):
        together.setdefault(where[i], []).append(i)
        alike.setdefault(look.category[i], []).append(i)

    def rival(i, group, differs):
        at = group.index(i)
        j = next((j for j in group[at + 1:] + group[:at] if differs[j] != differs[i]), None)
        return np.ones(side * side) if j is None else own[j]
    return {"chance (any patch)": np.ones((n, side * side)), "centre of the picture": np.tile(centre, (n, 1)),
            "another command's map": np.array([rival(i, together[where[i]], look.category) for i in range(n)]),
            "another picture's map": np.array([rival(i, alike[look.category[i]], where) for i in range(n)]),
            "untrained weights": untrained.maps.mean((1, 2))}


def grounding(look, picture, untrained, chosen_on, resamples, side):
    """Pointing, mass, enrichment and IoU of the maps averaged over layers and heads, with all baselines beside.

    chosen_on: the Look of other questions (val) on which the threshold of the IoU is chosen.
    """
    if not len(look.question):
        return dict(n=0)
    where, covers, found = picture[look.question], look.cover, {}
    threshold = best_threshold(chosen_on.maps.mean((1, 2)), chosen_on.cover) if len(chosen_on.question) else 0.5
    rivals, own = baseline_maps(look, picture, side, untrained), look.maps.mean((1, 2))
    for name, maps in {"model": own, **rivals}.items():
        found[name] = dict(pointing=mean_row(where, pointing(maps, covers), resamples),
                           mass_in_box=mean_row(where, mass_in_box(maps, covers), resamples),
                           enrichment=median_row(where, enrichment(maps, covers), resamples),
                           iou=mean_row(where, box_iou(maps, covers, threshold), resamples))
    best, hit = max(rivals, key=lambda name: found[name]["pointing"]["value"]), pointing(own, covers)
    return dict(threshold=threshold, scores=found, best_baseline=best,
                pointing_ahead=mean_row(where, hit - pointing(rivals[best], covers), resamples),
                pointing_by_category={c: mean_row(where[mine], hit[mine], resamples)
                                      for c in sorted(set(look.category)) for mine in [look.category == c]})


def best_threshold(maps, covers):
    """The threshold of box_iou, as a share of the maximum, that fits these maps (n, P) best."""
    return max((t / 20 for t in range(1, 20)), key=lambda t: box_iou(maps, covers, t).mean())


def deletion_insertion(subject, asked, answer, odds, count, orders=3):
    """Take away (or show) the patches that the answer looked at most, first: how fast does YES fall (or rise)?

    On right YES answers about objects. Area under p(YES) over the share of patches, against random orders of the same
    picture, paired (Petsiuk et al. 2018). A patch taken away has the mean colour. Points of 100.
    """
    usable = np.flatnonzero((odds[answer.question] > 0))
    usable = np.sort(np.random.default_rng(2).permutation(usable)[:count])
    side = subject.cfg.image_size // subject.cfg.patch_size
    patches, size = side * side, subject.cfg.patch_size
    steps = sorted({min(2 ** k, patches) for k in range(patches.bit_length())} | {0, patches})
    grey = np.round(255 * np.array(subject.state["mean"])).astype(np.uint8)
    rng, areas = np.random.default_rng(3), {"deletion": [], "insertion": []}

    def jobs():
        for u in usable:
            i, maps = answer.question[u], answer.maps[u].mean((0, 1))
            picture, prompt = asked.data.images[asked.picture[i]], asked.prompts[i]
            for order in [np.argsort(-maps, kind="stable")] + [rng.permutation(patches) for _ in range(orders)]:
                for taken in (True, False):
                    for step in steps:
                        chosen = np.zeros(patches, bool)
                        chosen[order[:step]] = True
                        hidden = np.kron((chosen == taken).reshape(side, side), np.ones((size, size), bool))
                        yield np.where(hidden[..., None], grey, picture), [prompt]
    found = np.concatenate(list(subject.ask(jobs())) or [np.zeros(0)]).reshape(len(usable), 1 + orders, 2, len(steps))
    p = 100 / (1 + np.exp(-found.astype(float)))
    share = np.array(steps) / patches
    area = ((p[..., 1:] + p[..., :-1]) / 2 * np.diff(share)).sum(-1)                            # (n, orders, 2)
    where, resamples = asked.picture[answer.question[usable]], subject.cfg.bootstrap
    for k, name in enumerate(areas):
        own, chance = area[:, 0, k], area[:, 1:, k].mean(1)
        areas[name] = dict(attention=mean_row(where, own, resamples, 1), random=mean_row(where, chance, resamples, 1),
                           difference=mean_row(where, own - chance, resamples, 1),
                           **(dict(curve=p[:, 0, k].mean(0).tolist(), random_curve=p[:, 1:, k].mean((0, 1)).tolist())
                              if len(usable) else {}))
    return dict(share_of_patches=share.tolist(), **areas)


# ---- attention: entropy, consistency, sensitivity ----

def entropy(maps):
    """Entropy of maps (..., P) in nats: 0 for one patch, log(P) for all alike."""
    return -(maps * np.log(np.maximum(maps, 1e-30))).sum(-1)


def distances(a, b):
    """{cosine, l2, js} of maps (n, P) that sum to 1, each (n,); js: Jensen-Shannon divergence in nats."""
    return dict(cosine=(a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)), l2=np.sqrt(((a - b) ** 2).sum(-1)),
                js=entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2)


def stability(subject, asked, count):
    """How alike answer maps are: other words for the same question, a scene with one thing changed, another scene or
    question; and command sensitivity: the distance of two questions over that of two paraphrases, about one picture.
    """
    cfg, chosen = subject.cfg, asked.sample(count, 4)
    resamples, rng = cfg.bootstrap, random.Random(0)
    maps_of = lambda jobs: np.array([c[:, :, -1].mean((0, 1)) for c in subject.look(jobs)])     # noqa: E731
    own = maps_of(asked.jobs(chosen))
    picture = lambda i: asked.data.images[asked.picture[i]]                                     # noqa: E731
    again, other = [], []
    for i in chosen:
        command, tries = asked.items[i]["command"], 0
        while command == asked.items[i]["command"] and tries < 20:
            command, tries = asked.questions[i].words(rng), tries + 1
        again.append(subject.tokenizer.prompt(command))
        rivals = [j for j in range(max(i - 40, 0), min(i + 40, len(asked.rows)))
                  if asked.picture[j] == asked.picture[i] and asked.questions[j] != asked.questions[i]]
        other.append(rng.choice(rivals) if rivals else i)
    far = np.roll(chosen, len(chosen) // 2)         # neighbours are often of the same picture
    pairs = {"paraphrase": maps_of((picture(i), [ids]) for i, ids in zip(chosen, again)),
             "another question": maps_of((picture(j), [asked.prompts[j]]) for j in other),
             "another scene": maps_of((picture(j), [asked.prompts[i]]) for i, j in zip(chosen, far))}
    where = asked.picture[chosen]
    found = {name: {k: mean_row(where, v, resamples, 1) for k, v in distances(own, maps).items()}
             for name, maps in pairs.items()}
    if cfg.source == "drawn" and asked.data.name == "test":
        with open(Path(cfg.data_dir) / "twins.jsonl", encoding="utf-8") as file:
            edits = {e["item"]: e["neutral"] for e in map(json.loads, file)}
        kept = [k for k, i in enumerate(chosen) if edits.get(int(asked.rows[i]))]
        jobs = ((draw_twin((Path(asked.frames[asked.picture[i]]["name"]).stem, edits[int(asked.rows[i])], cfg)),
                 [asked.prompts[i]]) for i in chosen[kept])
        near = maps_of(jobs).reshape(len(kept), -1)
        found["similar scene"] = {k: mean_row(where[kept], v, resamples, 1)
                                  for k, v in (distances(own[kept], near) if kept else {}).items()}
    words, question = (distances(own, pairs[k]) for k in ("paraphrase", "another question"))
    ratio = lambda s: s[..., 0] / s[..., 1]                                                     # noqa: E731
    found["command sensitivity"] = {k: interval(where, (question[k], words[k]), ratio, resamples) for k in ("l2", "js")}
    return found


# ---- heads ----

@contextlib.contextmanager
def without_head(attention, head):
    """Inside `with`, head `head` of a model.Attention adds nothing: its part is zeroed before the output projection."""
    d = attention.head_dim

    def zero(module, inputs):
        kept = inputs[0].clone()
        kept[..., head * d:(head + 1) * d] = 0
        return (kept,)
    handle = attention.out.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def head_contributions(attention, inputs):
    """What each head adds to the output of a model.Attention: (H, ..., D); with the bias they sum to out(inputs)."""
    heads = inputs.unflatten(-1, (-1, attention.head_dim))                                       # (..., H, d)
    weight = attention.out.weight.unflatten(1, (-1, attention.head_dim))                         # (D, H, d)
    return torch.einsum("...hd,khd->h...k", heads, weight)


def attentions(model):
    """{"vision": [...], "self": [...], "cross": [...]}: the Attention of each layer."""
    return {"vision": [b.attn for b in model.vision.blocks], "self": [b.attn for b in model.decoder.blocks],
            "cross": [b.cross for b in model.decoder.blocks]}


def head_ablation(subject, asked):
    """[{kind, layer, head, drop, p_holm, share}]: balanced accuracy lost without a head, in points.

    p: McNemar's mid-p against the whole model, adjusted by Holm over all heads. share: norm of what the head adds, as
    a share of the sum of its layer's heads, on a batch.
    """
    whole, found, shares = asked.odds(subject) > 0, [], {}

    def measure(key, module):
        def hook(_, inputs):
            shares[key] = head_contributions(module, inputs[0].float()).flatten(1, -2).norm(dim=-1).mean(1)
        return module.out.register_forward_pre_hook(hook)
    hooks = [measure((kind, layer), module) for kind, modules in attentions(subject.model).items()
             for layer, module in enumerate(modules)]
    next(subject.ask(asked.jobs()), None)
    for hook in hooks:
        hook.remove()
    for kind, modules in attentions(subject.model).items():
        for layer, module in enumerate(modules):
            norms = shares[kind, layer]
            for head in range(len(norms)):
                with without_head(module, head):
                    said = asked.odds(subject) > 0
                p = mcnemar(whole == asked.truth, said == asked.truth)[2]
                found.append(dict(kind=kind, layer=layer, head=head, p=p, share=float(norms[head] / norms.sum()),
                                  drop=difference_row(asked.truth, said, whole, asked.picture, subject.cfg.bootstrap)))
    for entry, adjusted in zip(found, holm([e.pop("p") for e in found])):
        entry["p_holm"] = adjusted
    return found


def k_means(points, k, rounds=50):
    """Cluster numbers (n,) of points (n, d): Lloyd's algorithm from starts that lie farthest apart."""
    centres = [points[np.argmax(((points - points.mean(0)) ** 2).sum(1))]]
    while len(centres) < k:
        gap = np.min([((points - c) ** 2).sum(1) for c in centres], 0)
        centres.append(points[gap.argmax()])
    for _ in range(rounds):
        label = np.argmin([((points - c) ** 2).sum(1) for c in centres], 0)
        centres = [points[label == j].mean(0) if (label == j).any() else centres[j] for j in range(k)]
    return label


def silhouette(points, label):
    """Mean silhouette of a clustering (Rousseeuw 1987): 1 apart, 0 no structure."""
    gap = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    scores = []
    for i, own in enumerate(label):
        mean = {c: gap[i, (label == c) & (np.arange(len(label)) != i)] for c in set(label.tolist())}
        if not len(mean[own]) or len(mean) < 2:
            scores.append(0.0)
            continue
        a, b = mean[own].mean(), min(v.mean() for c, v in mean.items() if c != own)
        scores.append((b - a) / max(a, b, 1e-12))
    return float(np.mean(scores))


def specialisation(word):
    """What each cross-attention head looks for: its enrichment for each category's words, and clusters of heads.

    selectivity: log of a head's enrichment for its favourite category over its (geometric) mean for all.
    """
    kinds = sorted(set(word.category))
    if not kinds:
        return dict(categories=[])
    area = {c: word.cover[word.category == c].mean() for c in kinds}
    profile = np.stack([np.einsum("nlhp,np->lh", word.maps[mine], word.cover[mine]) / mine.sum() / area[c]
                        for c in kinds for mine in [word.category == c]], -1)                    # (L, H, C)
    logs = np.log(np.maximum(profile, 1e-6)).reshape(-1, len(kinds))                             # (L*H, C)
    options = [k_means(logs, k) for k in range(2, min(7, len(logs)))] or [np.zeros(len(logs), int)]
    label = max(options, key=lambda one: silhouette(logs, one))
    clusters = []
    for c in sorted(set(label.tolist())):
        mean = np.exp(logs[label == c].mean(0))
        clusters.append(dict(heads=[divmod(int(i), profile.shape[1]) for i in np.flatnonzero(label == c)],
                             looks_for=kinds[int(mean.argmax())], enrichment=mean.max(), mean=mean.mean()))
    return dict(categories=kinds, enrichment=profile.tolist(), clusters=clusters, silhouette=silhouette(logs, label),
                selectivity=(logs.max(1) - logs.mean(1)).reshape(profile.shape[:2]).tolist())


# ---- failures ----

def parts(question, view):
    """Simpler questions that this one is made of and whose truth is certain; none for the simplest."""
    template, first, second = question
    named = lambda n: Question("light", n.split()[0], "") if n in LIGHTS else Question("exists", n, "")   # noqa: E731
    if template in ("exists_at", "near"):
        found = [named(first)]
    elif template == "light":
        found = [Question("exists", "traffic light", "")]
    elif template in ("and", "and_no", "or"):
        found = [named(first), named(second)]
    elif template in ("straight", "stop", "turn", "change"):
        found = [Question("clear", place, "") for place in question.ways()]
        found += [Question("light", c, "") for c in commands.COLOURS] if template != "change" else []
    elif template == "clear":
        found = [Question("exists_at", c, first) for c in commands.ROAD_USERS]
    else:
        found = []
    return [q for q in found if q.truth(view) != UNSURE]


def failures(subject, asked, odds):
    """([one dict a wrong answer], counts): each question asked again in other words and in parts.

    vision error: a part of it is answered wrongly, or, where it has no parts, every way of asking fails;
    language error: its parts are right, and so is the canonical form or most of the paraphrases;
    reasoning error: the parts are right and the whole is wrong however it is asked.
    suspected label error: wrong with over 95% confidence and in every paraphrase.
    """
    wrong = np.flatnonzero((odds > 0) != asked.truth)
    rng, prompts, plans = random.Random(0), [], []
    for i in wrong:
        question, view = asked.questions[i], asked.views[asked.picture[i]]
        forms = [question.words(rng, k) for k in range(len(commands.TEMPLATES[question.template].paraphrases))]
        pieces = parts(question, view)
        prompts.append([subject.tokenizer.prompt(c) for c in forms + [q.words(rng, 0) for q in pieces]])
        plans.append((len(forms), [q.truth(view) == commands.TRUE for q in pieces], pieces))
    answers = subject.ask((asked.data.images[asked.picture[i]], own) for i, own in zip(wrong, prompts))
    records = []
    for i, (forms, truths, pieces), said in zip(wrong, plans, answers):
        again = (said[:forms] > 0) == asked.truth[i]
        missed = [q for q, t, s in zip(pieces, truths, said[forms:] > 0) if t != s]
        kind = "vision" if missed or (not pieces and not again.any()) else \
            "language" if again[0] or again.mean() > 0.5 else "reasoning" if pieces else "vision"
        p = float(1 / (1 + np.exp(-float(odds[i]))))
        records.append(dict(
            frame=asked.frames[asked.picture[i]]["name"], item=int(asked.rows[i]), command=asked.items[i]["command"],
            truth="YES" if asked.truth[i] else "NO", reason=asked.items[i]["reason"], p_yes=round(p, 4),
            template=asked.questions[i].template, family=asked.items[i]["family"], type=kind,
            error="false negative" if asked.truth[i] else "false positive", low_confidence=bool(0.3 < p < 0.7),
            paraphrases_right=int(again.sum()), paraphrases=forms,
            missed_parts=[" ".join(filter(None, q)) for q in missed],
            suspected_label_error=bool(max(p, 1 - p) > 0.95 and not again.any())))
    counts = {name: dict(Counter(str(r[name]) for r in records))
              for name in ("type", "error", "low_confidence", "suspected_label_error")}
    counts["type_by_family"] = {f: dict(Counter(r["type"] for r in records if r["family"] == f)) for f in FAMILIES}
    return records, counts


def confusions(asked, odds, least=20):
    """Which kind is taken for which: of NO questions on one object, how much likelier YES is where another kind stands.

    [{asked, present, n, said_yes, elsewhere, times}], the strongest first: said_yes is the share of YES in % where
    the other kind is there (at the place asked about), elsewhere that of the NO questions without it.
    """
    said = odds > 0
    cells = {}
    for i, question in enumerate(asked.questions):
        if question.template in ("exists", "exists_at") and not asked.truth[i]:
            view, place = asked.views[asked.picture[i]], question.second or None
            for other in CATEGORIES:
                truth = view.exists(other, place)
                if other != question.first and truth != UNSURE:
                    cells.setdefault((question.first, other), ([], []))[truth == commands.TRUE].append(said[i])
    found = []
    for (category, other), (absent, there) in cells.items():
        if len(there) >= least and len(absent) >= least:
            a, b = 100 * float(np.mean(there)), 100 * float(np.mean(absent))
            found.append(dict(asked=category, present=other, n=len(there), said_yes=a, elsewhere=b,
                              times=(a + 1) / (b + 1)))
    return sorted(found, key=lambda c: -c["times"])


def command_pairs(asked, odds):
    """Which kinds of command are mixed up: of two about one picture whose truths differ, how often both get one answer.

    {templates, n, same, expected}: (C, C) matrices over templates, in %; expected: were their errors independent.
    """
    names = sorted({q.template for q in asked.questions})
    kind = np.eye(len(names))[[names.index(q.template) for q in asked.questions]]                # (n, C)
    said, n, same = odds > 0, np.zeros((len(names),) * 2), np.zeros((len(names),) * 2)
    for picture in np.unique(asked.picture):
        own = asked.picture == picture
        differ = asked.truth[own][:, None] != asked.truth[own]
        n += kind[own].T @ differ @ kind[own]
        same += kind[own].T @ (differ & (said[own][:, None] == said[own])) @ kind[own]
    error = (kind * (said != asked.truth)[:, None]).sum(0) / kind.sum(0)
    return dict(templates=names, n=n.astype(int).tolist(), same=(100 * same / np.maximum(n, 1)).tolist(),
                expected=(100 * (error[:, None] + error - 2 * error[:, None] * error)).tolist())


# ---- two checkpoints ----

def compare(subject, other, asked, odds):
    """Paired comparison with another checkpoint on the same questions: McNemar and the bootstrap of the difference."""
    theirs = asked.odds(other)
    only_other, only_this, p = mcnemar((theirs > 0) == asked.truth, (odds > 0) == asked.truth)
    return dict(other=accuracy_row(asked.truth, theirs > 0, asked.picture, subject.cfg.bootstrap),
                difference=difference_row(asked.truth, theirs > 0, odds > 0, asked.picture, subject.cfg.bootstrap),
                only_this_right=only_this, only_other_right=only_other, mcnemar_p=p)


# ---- the page ----

def rounded(value):
    """Plain Python values of 4 decimals, ready for JSON; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 4) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def text_of(entry):
    """`93.31 [92.70, 93.90]  n=1234` of a row."""
    if entry["value"] is None:
        return f"{'-':>6}  n={entry['n']}"
    return f"{entry['value']:6.2f} [{entry['low']:.2f}, {entry['high']:.2f}]  n={entry['n']}"


def print_page(page):
    """The page for people; every figure of it stands in eval.json."""
    def table(title, rows):
        print(f"\n{title}")
        for name, entry in rows.items():
            print(f"  {name:<26} {text_of(entry)}")

    print(f"\n{page['split']} split: balanced accuracy in % [95% interval over pictures], n questions")
    table("overall", {"all": page["overall"]})
    for name, rows in page["by"].items():
        table(name, rows)
    c = page["classification"]
    print(f"\nconfusion: YES said YES {c['confusion']['yes_said_yes']}, YES said NO {c['confusion']['yes_said_no']}, "
          f"NO said YES {c['confusion']['no_said_yes']}, NO said NO {c['confusion']['no_said_no']}; accuracy "
          f"{c['accuracy']:.2f}, macro F1 {c['macro_f1']:.2f}")
    table("controls (majority: 50 by construction)", page["controls"])
    print(f"  {'vision gain':<26} {text_of(page['vision_gain'])}")
    each = [(f"{t}, {name}", entry) for t, rows in page["controls_by_template"].items() for name, entry in rows.items()
            if entry["value"] is not None]
    leaky = [f"{name} {text_of(entry)}" for name, entry in each if not entry["low"] <= 50 <= entry["high"]]
    print(f"  by template, {len(leaky)} of {len(each)} intervals leave out 50 (1 in 20 would by chance)"
          + "".join("\n    " + line for line in leaky))
    table("training questions beside (overfitting gap)", page["train_gap"])
    if page["held_out"]:
        table("never trained on: paraphrases (test_words), questions (test_combos)", page["held_out"])
    if page["ood"]:
        table("weather and time never trained on", {"all": page["ood"]["all"], **page["ood"]["weather"],
                                                   **page["ood"]["time of day"]})
    if page["twins"]:
        t = page["twins"]
        print(f"\ntwins: {t['questions_with_flip']} of {t['questions']} questions have one (chance of a pair: 25)")
        for name in ("both_right", "stubbornness", "neutral_unchanged", "indecision"):
            print(f"  {name:<26} {text_of(t[name])}")
        for by in ("family", "edit"):
            table(f"pairs both right by {by}", t[f"both_right_by_{by}"])
    for kind in ("reasons", "descriptions"):
        table(f"{kind}, in %", {k: v for k, v in page[kind].items() if k != "bleu4"})
        print(f"  {'bleu4':<26} {page[kind]['bleu4']['value']:6.2f}  n={page[kind]['bleu4']['n']}")
    print(f"\ncalibration (temperature {page['calibration']['temperature']:.3f}, fitted on val)")
    for name in ("raw", "scaled"):
        e = page["calibration"][name]
        print(f"  {name:<7} " + ", ".join(
            f"{label} {e[key]['value']:.2f} (a calibrated model: {e[key]['calibrated']:.2f}, up to "
            f"{e[key]['calibrated_high']:.2f})" for label, key in (("ECE", "ece"), ("equal mass", "ece_equal_mass")))
              + f", Brier {e['brier']:.4f}")
    a = page["attention"]
    for kind in ("word", "answer"):
        g = a["grounding"][kind]
        if "scores" not in g:
            continue
        looker = "word for an object" if kind == "word" else "answer"
        print(f"\nwhere the {looker} looks, mean of all layers and heads\n"
              f"{'':<28}pointing %, mass in box %, median enrichment, IoU %  n={g['pointing_ahead']['n']}")
        for name, scores in g["scores"].items():
            print(f"  {name:<26}" + "".join(f" {e['value']:6.2f} [{e['low']:.1f}, {e['high']:.1f}]"
                                            for e in scores.values()))
        print(f"  pointing, points ahead of '{g['best_baseline']}': {text_of(g['pointing_ahead'])}")
    for name in ("deletion", "insertion"):
        d = a["deletion_insertion"][name]
        if d["difference"]["value"] is not None:
            print(f"{name}: area {d['attention']['value']:.2f}, random order {d['random']['value']:.2f}, difference "
                  f"{text_of(d['difference'])}")
    print(f"entropy of the answer's attention: {text_of(a['entropy']['mean'])} nats, of at most "
          f"{a['entropy']['maximum']:.2f}; rank correlation with confidence {text_of(a['entropy']['with_confidence'])}")
    print("the answer's map against that of")
    for name, rows in a["stability"].items():
        print(f"  {name:<26}" + "".join(f" {k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
                                        for k, v in rows.items() if v["value"] is not None))
    s, null = a["specialisation"], a["specialisation_untrained"]
    if s["categories"]:
        print(f"heads: selectivity {np.mean(s['selectivity']):.3f} (untrained {np.mean(null['selectivity']):.3f}), "
              f"silhouette of clusters {s['silhouette']:.3f} (untrained {null['silhouette']:.3f})")
        for c in s["clusters"]:
            print(f"  {len(c['heads']):2d} heads look for {c['looks_for']} most, {c['enrichment']:.1f} times its area "
                  f"(all kinds: {c['mean']:.1f})")
    for entry in sorted(page["head_ablation"], key=lambda e: -(e["drop"]["value"] or 0))[:6]:
        print(f"  without {entry['kind']} layer {entry['layer']} head {entry['head']}: points lost "
              f"{text_of(entry['drop'])}, p (Holm) {entry['p_holm']:.3g}")
    f = page["failures"]
    print("\nfailures: " + "; ".join(", ".join(f"{k} {v}" for k, v in sorted(f["counts"][name].items()))
                                    for name in ("type", "error"))
          + f"; low confidence {f['counts']['low_confidence'].get('True', 0)}, suspected label errors "
          + str(f["counts"]["suspected_label_error"].get("True", 0)))
    for c in f["confusions"][:5]:
        print(f"  asked for a {c['asked']} that is not there: YES to {c['said_yes']:.1f}% where a {c['present']} is "
              f"(n={c['n']}), to {c['elsewhere']:.1f}% where none is")
    if "against" in page:
        g = page["against"]
        print(f"\nagainst the other checkpoint ({text_of(g['other'])}): difference {text_of(g['difference'])}\n"
              f"  only this right {g['only_this_right']}, only the other {g['only_other_right']}, McNemar p "
              f"{g['mcnemar_p']:.3g}")


def evaluate(cfg):
    """Evaluate cfg.checkpoint (empty: out_dir/best.pt) on cfg.split; prints the page, writes and returns eval.json."""
    start, out, against = time.time(), Path(cfg.out_dir), cfg.against
    subject = Subject(cfg)
    other = Subject(type(cfg)(**{**vars(cfg), "checkpoint": against})) if against else None
    if other and (other.tokenizer.words, other.cfg.image_size) != (subject.tokenizer.words, subject.cfg.image_size):
        raise UserError(f"{against} has another vocabulary or image_size: the two cannot be compared on the same data")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to out_dir {out}: {error}") from None
    cfg = subject.cfg
    meta, resamples = prepare.load_meta(cfg), cfg.bootstrap
    print(f"device {subject.device}, dtype {str(subject.dtype)[6:]} ({subject.why}); checkpoint of step "
          f"{subject.state['step']}")
    stage = lambda text: print(f"{time.time() - start:5.0f} s  {text}", flush=True)              # noqa: E731

    stage("answers and controls")
    asked = Questions(subject, meta, cfg.split)
    if not len(asked.rows):
        raise UserError(f"the {cfg.split} split in {cfg.data_dir} holds no questions")
    truth, picture, odds = asked.truth, asked.picture, asked.odds(subject)
    page = dict(format=FORMAT, split=cfg.split, step=subject.state["step"], data_hash=meta["hash"],
                overall=accuracy_row(truth, odds > 0, picture, resamples), by=broken_down(asked, odds, resamples),
                classification=classification(truth, odds > 0))
    controls = {name: train.predict(subject.model, asked.data, cfg, subject.device, subject.dtype, shown)[1]
                for name, shown in (("blank picture", "blank"), ("another picture", "wrong"))}
    stage("a decoder trained without pictures")
    controls["trained without pictures"] = blind_model(subject, meta)(asked.prompts)
    page["controls"] = {name: accuracy_row(truth, c > 0, picture, resamples) for name, c in controls.items()}
    templates = np.array([q.template for q in asked.questions])
    page["controls_by_template"] = {
        t: {name: accuracy_row(truth[mine], c[mine] > 0, picture[mine], resamples) for name, c in controls.items()}
        for t in page["by"]["template"] for mine in [templates == t]}
    best = max(controls, key=lambda name: page["controls"][name]["value"] or 0)
    page["vision_gain"] = difference_row(truth, controls[best] > 0, odds > 0, picture, resamples) \
        if (page["controls"][best]["value"] or 0) > 50 else \
        interval(picture, yes_no(truth, odds > 0), lambda s: balanced(s) - 50, resamples)

    stage("held-out, training and out-of-distribution questions")
    sets = {name: Questions(subject, meta, name, limit) for name, limit in
            (("val", 0), ("train", cfg.sample_items // 2), ("test_words", 0), ("test_combos", 0), ("ood", 0))
            if (Path(cfg.data_dir) / f"index_{name}.npy").exists()}
    said = {name: s.odds(subject) for name, s in sets.items()}
    rows = {name: accuracy_row(s.truth, said[name] > 0, s.picture, resamples) for name, s in sets.items()}
    here, there = (truth, odds > 0, picture), {name: (s.truth, said[name] > 0, s.picture) for name, s in sets.items()}
    page["train_gap"] = {"train": rows["train"], "val": rows["val"],
                         f"train minus {cfg.split}": drop_row(there["train"], here, resamples)}
    page["held_out"] = {}
    for name in ("test_words", "test_combos") if cfg.split == "test" else ():
        page["held_out"].update({name: rows[name], f"{name}, drop": drop_row(here, there[name], resamples)})
    page["ood"] = {"all": rows["ood"], **broken_down(sets["ood"], said["ood"], resamples)} if "ood" in sets else {}

    stage("twins")
    page["twins"] = twins(subject, asked, odds) if cfg.source == "drawn" and cfg.split == "test" else {}
    stage("reasons")
    page["reasons"] = reasons(subject, asked, cfg.sample_items // 2)
    page["descriptions"] = reasons(subject, Questions(subject, meta, cfg.split, verdicts=False), cfg.sample_items // 8)
    temperature = fit_temperature(said["val"], sets["val"].truth) if len(said["val"]) else 1.0
    page["calibration"] = dict(temperature=temperature, raw=calibration(odds, truth),
                               scaled=calibration(odds / temperature, truth))

    stage("attention")
    side = cfg.image_size // cfg.patch_size
    chosen = asked.sample_pictures(cfg.sample_items)
    torch.manual_seed(0)
    untrained = VLM(cfg, len(subject.tokenizer)).to(subject.device).eval()
    maps, answer, word = looks(subject, asked, chosen)
    _, null_answer, null_word = looks(subject, asked, chosen, untrained)
    _, val_answer, val_word = looks(subject, sets["val"], sets["val"].sample_pictures(cfg.sample_items // 4))
    entropies, confidence = entropy(maps), np.abs(odds[chosen])                                  # (n, L, H)
    where = picture[chosen]
    page["attention"] = dict(
        grounding=dict(word=grounding(word, picture, null_word, val_word, resamples, side),
                       answer=grounding(answer, picture, null_answer, val_answer, resamples, side)),
        entropy=dict(maximum=math.log(side * side), mean=mean_row(where, entropies.mean((1, 2)), resamples, 1),
                     by_head=[[mean_row(where, entropies[:, i, j], resamples, 1) for j in range(entropies.shape[2])]
                              for i in range(entropies.shape[1])],
                     with_confidence=correlation_row(where, entropies.mean((1, 2)), confidence, resamples)),
        specialisation=specialisation(word), specialisation_untrained=specialisation(null_word))
    stage("deletion and insertion")
    page["attention"]["deletion_insertion"] = deletion_insertion(subject, asked, answer, odds, cfg.probe_items)
    stage("paraphrases, similar scenes, other commands")
    page["attention"]["stability"] = stability(subject, asked, 2 * cfg.probe_items)
    stage("head ablation")
    page["head_ablation"] = head_ablation(subject, Questions(subject, meta, cfg.split, cfg.head_items))
    stage("failures")
    records, counts = failures(subject, asked, odds)
    page["failures"] = dict(counts=counts, confusions=confusions(asked, odds), command_pairs=command_pairs(asked, odds))
    if other:
        stage("the other checkpoint")
        page["against"] = compare(subject, other, asked, odds)

    page = rounded(page)
    print_page(page)
    print(f"\n{len(records)} wrong answers; the first:")
    for r in records[:5]:
        view = asked.views[asked.data.index[r["item"], 0]]
        print(f"  {r['frame']}: {commands.describe(view, 9)}\n    {r['command']}? said "
              f"{'NO' if r['truth'] == 'YES' else 'YES'} ({r['type']} error), truth {r['truth']}: {r['reason']}")
    kept = np.sort(np.random.default_rng(5).permutation(len(chosen))[:cfg.stored_maps])
    full = [cross.astype(np.float16) for cross in subject.look(asked.jobs(chosen[kept]))]
    longest = max((c.shape[2] for c in full), default=0)
    try:
        np.savez(out / "attention.npz", items=asked.rows[chosen], answer_maps=maps.mean((1, 2)).astype(np.float16),
                 odds=odds[chosen], full_items=asked.rows[chosen[kept]],
                 full=np.stack([np.pad(c, ((0, 0), (0, 0), (0, longest - c.shape[2]), (0, 0))) for c in full]))
        (out / "failures.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        (out / "eval.json").write_text(json.dumps(page, indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to out_dir {out}: {error}") from None
    print(f"\nwrote {out / 'eval.json'}, {out / 'failures.jsonl'} and {out / 'attention.npz'} "
          f"in {time.time() - start:.0f} s")
    return page


if __name__ == "__main__":
    config.run(evaluate, __doc__)
