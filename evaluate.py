"""Every measure of a trained model, next to its controls: accuracy, twins, reasons, calibration, attention, failures.

- Every figure has n and a 95% interval from a bootstrap over pictures: questions about one picture are not independent.
- Controls: a blank picture, another scene's picture, a decoder trained here without pictures. The vision gain is the
  accuracy above the best control.
- Twins: a scene edited so that the answer flips, or so that it must not. Only a model that looks gets both right.
- Attention: does it point at what a word names? Compared with chance, the centre of the picture, the map of another
  command, the map of another picture, and the same model with untrained weights. Then patches are hidden
  (deletion) and shown (insertion).
- Heads: what each one looks for, and what is lost without it.
- Failures: each wrong answer is asked again in other words and in parts, to tell what kind of error it is.

    python evaluate.py
    python evaluate.py --checkpoint=out/default/last.pt --split=val
    python evaluate.py --against=out/seed1/best.pt          paired comparison of two checkpoints

Writes four files to out_dir:
    eval.json           every figure
    eval.md             the tables of README
    failures.jsonl      every wrong answer
    attention.npz       items (m,): rows of the sampled questions in the split's commands; answer_maps (m, P) float16:
                        their attention where the answer is read, mean over layers and heads; odds (m,);
                        failure_items (k,): rows of up to 64 wrong answers; failure_maps (k, L, H, P) float16

Shapes: n questions, U pictures, R resamples, L layers, H heads, T tokens, P patches, C categories.
"""
import bisect
import functools
import itertools
import json
import math
import random
import time
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import commands
import config
import prepare
import train
from commands import CATEGORIES, FALSE, LIGHTS, NAMED, TRUE, UNSURE, Question, View
from config import UserError
from model import VLM, as_rows, autocast, pick_dtype
from tokenizer import NO, YES, pad
from train import Data

FORMAT = 3                    # of eval.json; visualize.py asks for a new evaluation when it finds another one
# Families of questions, with an example.
FAMILIES = {"detection": "is there a bus on the left?", "state": "is the light red?",
            "safety": "can the car safely turn left?", "navigation": "is the way ahead clear?"}
STORED_FAILURES = 64          # wrong answers whose maps of all layers and heads are kept in attention.npz

# ---- statistics ----


@functools.lru_cache(maxsize=4)
def resamples_of(units, resamples):
    """How often each of `units` is drawn in each resample: (R, U) float32, the same for the same arguments."""
    drawn = np.random.default_rng(0).integers(units, size=(resamples, units))
    # One bincount for all resamples: each has its own range of numbers.
    drawn += units * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=units * resamples)
    return counts.reshape(resamples, units).astype(np.float32)


def estimate(n, value, draws):
    """One figure as dict(n, value, low, high), with the 95% percentile interval of its resampled values.

    value, low and high are None where the figure is not defined.
    """
    # A resample can lack what the figure divides by, such as any YES item: such draws are left out.
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return dict(n=n, value=None, low=None, high=None)
    low, high = np.percentile(draws, (2.5, 97.5))
    return dict(n=n, value=value, low=low, high=high)


def ratio(sums):
    """The first of two sums over the second, (..., 2) to (...)."""
    return sums[..., 0] / sums[..., 1]


def interval(picture, columns, statistic, resamples):
    """Estimate of `statistic`, with pictures resampled (Efron and Tibshirani 1993, chapter 13).

    picture (n,); columns: C arrays (n,); statistic: turns sums of the columns (..., C) into values (...).
    """
    pictures, unit = np.unique(picture, return_inverse=True)
    # The statistic needs sums alone, so that all resamples together are one product of matrices.
    sums = np.stack([np.bincount(unit, c, len(pictures)) for c in columns], 1)     # (U, C)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = statistic(resamples_of(len(pictures), resamples) @ sums)
        return estimate(len(unit), statistic(sums.sum(0)), draws)


def median_estimate(picture, values, resamples):
    """Median of values (n,), of which there are some."""
    pictures, unit = np.unique(picture, return_inverse=True)
    order = np.argsort(values)
    # A value counts as often as its picture was drawn; the median is where half of the counts are reached.
    counts = resamples_of(len(pictures), resamples)[:, unit[order]].cumsum(1)                           # (R, n)
    middle = (counts < counts[:, -1:] / 2).sum(1)
    return estimate(len(unit), np.median(values), values[order][middle])


def balanced(sums):
    """Balanced accuracy in % of sums (..., 4) of the columns of `outcomes`."""
    yes, yes_right, no, no_wrong = np.moveaxis(sums, -1, 0)
    return 50 * (yes_right / yes + 1 - no_wrong / no)


def outcomes(truth, said):
    """Four columns (n,) of bools: the truth is YES; so is the answer; the truth is NO; the answer is YES instead."""
    return truth, truth & said, ~truth, ~truth & said


def correlation_estimate(picture, x, y, resamples):
    """Spearman's rank correlation of x and y, each (n,)."""
    def ranks(values):
        return np.argsort(np.argsort(values)) / max(len(values), 1) - 0.5

    def pearson(sums):
        n, sx, sy, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
        spread = np.sqrt((n * sxx - sx ** 2) * (n * syy - sy ** 2))
        return (n * sxy - sx * sy) / spread
    # Ranks of the whole set, not of each resample: nearly the same, and sums of them are enough.
    x = ranks(x)
    y = ranks(y)
    columns = np.ones(len(x)), x, y, x * x, y * y, x * y
    return interval(picture, columns, pearson, resamples)


def mcnemar(a_right, b_right):
    """(only a right, only b right, two-sided mid-p): McNemar's test of two models on the same questions;
    a_right and b_right: bools (n,).

    The mid-p version holds its level, where the exact one is too careful (Fagerland et al. 2013). It takes questions
    as independent, which those about one picture are not: read it together with the paired bootstrap.
    """
    only_a = int((a_right & ~b_right).sum())
    only_b = int((~a_right & b_right).sum())
    n = only_a + only_b
    k = min(only_a, only_b)
    # Twice the tail of a fair coin, minus the chance of exactly this table; whole numbers until the division.
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return only_a, only_b, min(1.0, (2 * tail - math.comb(n, k)) / 2 ** n)


def holm(p_values):
    """p-values adjusted for all of them being looked at (Holm 1979), in the order given."""
    p = np.array(p_values, float)
    order = np.argsort(p, kind="stable")
    times = np.minimum(1, p[order] * np.arange(len(p), 0, -1))
    # Never below the one before: a smaller p must not end up with a larger adjusted one.
    p[order] = np.maximum.accumulate(times)
    return p.tolist()


# ---- texts ----

def runs(words, n):
    """How often each run of n words occurs in a list of words: a Counter."""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu4(pairs):
    """BLEU-4 in % of (generated, reference) texts, over the whole set (Papineni et al. 2002)."""
    same = np.zeros(4)
    made = np.zeros(4)
    lengths = np.zeros(2)
    for pair in pairs:
        said, wanted = (text.split() for text in pair)
        lengths += len(said), len(wanted)
        for n in range(1, 5):
            said_runs = runs(said, n)
            # The intersection counts a run no more often than the reference has it.
            same[n - 1] += (said_runs & runs(wanted, n)).total()
            made[n - 1] += said_runs.total()
    # The mean of logarithms is -inf when no run of some length is shared.
    if not same.all():
        return 0.0
    brevity = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    return 100 * brevity * np.exp(np.log(same / made).mean())


def rouge_l(said, wanted):
    """ROUGE-L F1 in [0, 1] of two texts: their longest common subsequence of words (Lin 2004)."""
    a = said.split()
    b = wanted.split()
    if not a and not b:
        return 1.0
    longest = [0] * (len(b) + 1)      # [j]: common words of the part of `a` read so far and the first j of `b`
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            best = diagonal + 1 if x == y else max(longest[j], longest[j - 1])
            diagonal = longest[j]
            longest[j] = best
    return 2 * longest[-1] / (len(a) + len(b))


# ---- calibration ----

def probability(odds):
    """Probability of YES of log-odds (n,)."""
    return 1 / (1 + np.exp(-np.asarray(odds, float)))


def calibration_bins(p, truth, bins=15, equal_mass=False):
    """[(n, mean p, share of YES)] of the bins that hold something. p (n,): probability of YES."""
    order = np.argsort(p, kind="stable")
    # As many parts of one size, or the places where p reaches the next bin; p = 1 belongs to the last.
    cuts = bins if equal_mass else np.searchsorted(p[order], np.arange(1, bins) / bins)
    parts = np.array_split(order, cuts)
    return [(len(i), p[i].mean(), truth[i].mean()) for i in parts if len(i)]


def ece(p, truth, equal_mass=False):
    """Expected calibration error in points (Naeini et al. 2015): mean of |share of YES - mean p| over questions."""
    bins = calibration_bins(p, truth, equal_mass=equal_mass)
    return 100 * sum(n * abs(mean - share) for n, mean, share in bins) / len(p)


def fit_temperature(odds, truth):
    """The T in [1/20, 20] that minimises the loss of odds / T (Guo et al. 2017), by ternary search on log T."""
    wrong = np.where(truth, -odds, odds)

    def loss(log_t):
        return np.logaddexp(0, wrong / math.exp(log_t)).mean()
    low, high = -3.0, 3.0
    # 60 thirds narrow the interval to a billionth; the loss has one minimum in log T.
    for _ in range(60):
        a = low + (high - low) / 3
        b = high - (high - low) / 3
        if loss(a) < loss(b):
            high = b
        else:
            low = a
    return math.exp((low + high) / 2)


def calibration(odds, truth):
    """ECE by both kinds of bins, Brier score and bins of log-odds (n,).

    A perfectly calibrated model does not measure 0 on n questions: each ECE stands next to the mean ("calibrated") and
    the upper end ("calibrated_high") of what truths drawn from these very probabilities give.
    """
    p = probability(odds)
    # Truths as they would be if every p were right.
    drawn = np.random.default_rng(0).random((200, len(p))) < p
    found = dict(n=len(p), brier=((p - truth) ** 2).mean(), bins=calibration_bins(p, truth))
    for name, equal_mass in (("ece", False), ("ece_equal_mass", True)):
        null = [ece(p, y, equal_mass) for y in drawn]
        found[name] = dict(
            value=ece(p, truth, equal_mass),
            calibrated=np.mean(null),
            calibrated_high=np.percentile(null, 97.5))
    return found


# ---- asking the model ----

class Subject:
    """A trained model with all that asking it needs.

    .model .cfg .tokenizer .state (of the checkpoint) .device .dtype .why (this dtype) .grid: (rows, columns)
    of patches; .blank: a picture (h, w, 3) of the mean colour. A job is (picture, [prompts]): a picture as uint8
    (h, w, 3), and the commands about it as lists of ids. Jobs may come from a generator: they are taken a batch at a
    time.
    """

    def __init__(self, cfg, make_model=VLM):
        self.model, self.cfg, self.tokenizer, self.state, self.device = train.load_model(cfg, make_model)
        self.dtype, self.why = pick_dtype(self.cfg, self.device)
        self.grid = self.model.vision.grid
        self.blank = np.full((*self.model.vision.size, 3), np.round(255 * np.array(self.state["mean"])), np.uint8)

    def take_data(self):
        """meta of the data in data_dir, which need not be those of the training; .cfg has their settings from then on.

        Raises UserError where their pictures have another size than the model's.
        """
        meta = prepare.read_meta(self.cfg)
        width, height = prepare.size_of(self.cfg)
        self.cfg = config.with_changes(self.cfg, **meta["settings"])
        if prepare.size_of(self.cfg) != (width, height):
            raise UserError(f"the pictures in {self.cfg.data_dir} have not the model's {width}x{height} pixels: "
                            f"prepare others with --image_width={width} --image_height={height}")
        if meta["hash"] != self.state["data_hash"]:
            print(f"note: the data in {self.cfg.data_dir} are others than those that the checkpoint was trained on")
        return meta

    def images(self, pictures):
        """uint8 pictures (B, h, w, 3) as the model wants them: normalised (B, 3, h, w)."""
        channels = train.channels(self.state["mean"], self.state["std"])
        return train.normalise(torch.tensor(pictures, device=self.device), *channels)

    def batches(self, jobs, size):
        """Jobs in batches: yields (normalised pictures (B, 3, h, w), B lists of prompts)."""
        jobs = iter(jobs)
        while batch := list(itertools.islice(jobs, size)):
            pictures, prompts = zip(*batch)
            yield self.images(np.stack(pictures)), prompts

    def ask(self, jobs):
        """Log-odds of YES against NO for every prompt of the jobs, in order: (n,) float32."""
        found = [np.zeros(0, np.float32)]
        for images, prompts in self.batches(jobs, self.cfg.eval_batch):
            found.append(self.model.ask(images, prompts, self.dtype))
        return np.concatenate(found)

    @torch.no_grad()
    def look(self, jobs, model=None):
        """Yields (log-odds, cross-attention (L, H, T, P) float32) for every prompt of the jobs, in order.

        model: another one to look with, such as one with untrained weights.
        """
        model = model or self.model
        # No autocast, whatever the dtype: bfloat16 has 8 bits, so that the largest patches of a map would tie.
        for images, prompts in self.batches(jobs, 16):
            tokens, segment = as_rows(prompts, device=self.device)
            # The weights between words are not asked for: in rows of many commands they would be large.
            attn = {"self": None, "cross": []}
            # A row of tokens for each picture: its prompts stand one after another, and so do their odds.
            odds = iter(model.odds(model.encode(images), tokens, segment, attn).tolist())
            cross = torch.stack(attn["cross"], 1).cpu().numpy()                       # (B, layers, H, row, P)
            for maps, own in zip(cross, prompts):
                start = 0
                for ids in own:
                    yield next(odds), maps[:, :, start:start + len(ids)]
                    start += len(ids)

    @torch.no_grad()
    def say(self, jobs):
        """What the model generates, greedily, for every prompt: [(answer True, False or None, text after it)]."""
        said = []
        for images, prompts in self.batches(jobs, self.cfg.eval_batch):
            # Every prompt has a row of its own here, since each grows by another number of words.
            rows = list(itertools.chain(*prompts))
            picture_of = np.repeat(np.arange(len(prompts)), list(map(len, prompts)))
            tokens = torch.tensor(pad(rows, left=True)).to(self.device)
            room = min(self.cfg.max_new_tokens, self.cfg.max_text - tokens.shape[1])
            with autocast(self.dtype, self.device):
                vision = self.model.encode(images)[picture_of]
                new = self.model.generate(vision, tokens, room)
            for ids in new.tolist():
                # A description begins with a word instead of a verdict.
                answer = {YES: True, NO: False}.get(ids[0])
                said.append((answer, self.tokenizer.decode(ids if answer is None else ids[1:])))
        return said


class Questions:
    """The questions of a set, with their pictures and frames.

    .rows (n,): their rows in the set's commands; .at: {row: question}; .items (dicts); .questions (Question);
    .prompts (lists of ids); .truth (n,) bool; .picture (n,): number of the picture; .frames and .views: by number of
    the picture; .data.
    """

    def __init__(self, subject, meta, name, limit=0, verdicts=True):
        """limit: about so many, of whole pictures, spread over the set; 0 = all. verdicts=False: the commands that ask
        for a description instead. Raises UserError if the checkpoint has another vocabulary than the data."""
        folder = Path(subject.cfg.data_dir)
        data = Data(subject.cfg, meta, name)
        if data.tokenizer.words != subject.tokenizer.words:
            raise UserError(f"the checkpoint's vocabulary is not that of the data in {folder}: train again, or pass "
                            "the --data_dir that it was trained on")
        rows = np.flatnonzero((data.index[:, 3] >= 0) == verdicts)
        pictures = np.unique(data.index[rows, 0])
        # Whole pictures, because the bootstrap resamples pictures, and a picture is encoded once for all its questions.
        if limit and limit < len(rows):
            count = max(1, len(pictures) * limit // len(rows))
            pictures = pictures[np.linspace(0, len(pictures) - 1, count).astype(int)]
            rows = rows[np.isin(data.index[rows, 0], pictures)]
        items = prepare.read_items(folder, name)
        # One by one: the file may hold ten times as many frames as the set has pictures.
        stored = prepare.Frames(folder / "frames.jsonl")
        with stored.file:
            frames = {picture: stored[picture] for picture in pictures.tolist()}
        self.hold(subject, data, rows, [items[r] for r in rows], frames)

    def hold(self, subject, data, rows, items, frames):
        """Ask these items (dicts), rows of data (a train.Data), about these frames {picture: record}."""
        self.cfg = subject.cfg
        self.data = data
        self.rows = rows
        self.at = {int(row): i for i, row in enumerate(rows)}
        self.items = items
        self.questions = [commands.question_of(item) for item in items]
        # The same ids as the stored tokens of the set up to the question mark.
        self.prompts = [subject.tokenizer.prompt(item["command"]) for item in items]
        self.truth = np.array([item["answer"] for item in items], bool)
        self.picture = np.array([item["picture"] for item in items], int)
        self.frames = frames
        self.views = {picture: View(frame, self.cfg) for picture, frame in frames.items()}

    def view(self, i):
        """The View of question i's picture."""
        return self.views[self.picture[i]]

    def pixels(self, i):
        """The picture (h, w, 3) of question i."""
        return self.data.images[self.picture[i]]

    def frame(self, i):
        """The record of question i's picture."""
        return self.frames[self.picture[i]]

    def cover(self, i, things, grid):
        """As the function `cover`, of question i's picture and the boxes of things (Thing): (P,)."""
        labels = self.frame(i)["labels"]
        return cover([labels[thing.label] for thing in things], prepare.size_of(self.cfg), grid)

    def spec(self, i):
        """The specification of the drawn scene that question i is about."""
        return prepare.sample_scene(Path(self.frame(i)["name"]).stem, self.cfg)

    def twins(self, kind):
        """[(question, edit)] of those whose scene has such an edit: "flip" changes the truth, "neutral" does not.

        Only drawn test questions have any.
        """
        if self.cfg.source != "drawn" or self.data.name != "test":
            return []
        found = []
        for twin in prepare.json_lines(Path(self.cfg.data_dir) / "twins.jsonl"):
            if twin[kind] and twin["item"] in self.at:
                found.append((self.at[twin["item"]], twin[kind]))
        return found

    def jobs(self, chosen=None, shown=None):
        """Jobs for a Subject: neighbours about the same picture together.

        chosen (m,): which questions; all by default. shown: number of a picture -> pixels to show instead of its own.
        """
        shown = shown or self.data.images.__getitem__
        chosen = range(len(self.rows)) if chosen is None else chosen
        # Neighbours only, so that the answers come in the order of the questions.
        for picture, group in itertools.groupby(chosen, key=lambda i: self.picture[i]):
            yield shown(picture), [self.prompts[i] for i in group]

    def odds(self, subject):
        """The subject's log-odds of YES for all questions (n,)."""
        return subject.ask(self.jobs())

    def accuracy(self, odds, chosen=slice(None)):
        """Balanced accuracy in % of log-odds (m,), one for each chosen question; all by default."""
        columns = outcomes(self.truth[chosen], odds > 0)
        return interval(self.picture[chosen], columns, balanced, self.cfg.bootstrap)

    def lead(self, odds, other, theirs):
        """Balanced accuracy of log-odds minus that of `theirs`, log-odds for another set (or for this one), in points.

        Pictures that both sets share are resampled together: answers to the same questions are compared in pairs.
        n: questions of the smaller set.
        """
        # Each set has columns of its own, which are 0 for the other's rows: one table of sums holds both.
        n = len(odds)
        columns = np.zeros((8, n + len(theirs)))
        columns[:4, :n] = outcomes(self.truth, odds > 0)
        columns[4:, n:] = outcomes(other.truth, theirs > 0)

        def difference(sums):
            return balanced(sums[..., :4]) - balanced(sums[..., 4:])
        picture = np.concatenate((self.picture, other.picture))
        found = interval(picture, columns, difference, self.cfg.bootstrap)
        return dict(found, n=min(n, len(theirs)))

    def mean(self, values, chosen, scale=100):
        """Mean of values (m,), one for each chosen question; in % by default."""
        columns = np.multiply(scale, values), np.ones(len(values))
        return interval(self.picture[chosen], columns, ratio, self.cfg.bootstrap)

    def means(self, chosen, scale=100, **values):
        """{name: mean of these values (m,)}, of several measures of the chosen questions (m,)."""
        return {name: self.mean(those, chosen, scale) for name, those in values.items()}

    def means_by(self, names, values, chosen):
        """{name: mean of the values with this name, in %}, sorted by name. names and values: one for each chosen."""
        found = {}
        for name in sorted(set(names)):
            mine = np.array(names) == name
            found[name] = self.mean(values[mine], chosen[mine])
        return found

    def sample(self, count, seed, where=slice(None)):
        """Up to `count` of the questions (or of those that `where` selects), drawn by seed, in order."""
        candidates = np.arange(len(self.rows))[where]
        return np.sort(np.random.default_rng(seed).permutation(candidates)[:count])

    def sample_pictures(self, count):
        """About `count` of the questions: all about some pictures, drawn by seed 0."""
        pictures = np.random.default_rng(0).permutation(np.unique(self.picture))
        enough = math.ceil(len(pictures) * count / max(len(self.rows), 1))
        return np.flatnonzero(np.isin(self.picture, pictures[:enough]))


# ---- accuracy ----

def classification(truth, said):
    """Confusion matrix, accuracy, and precision, recall and F1 of both answers, in %. truth, said: bool (n,)."""
    yes, yes_right, no, no_wrong = (column.sum() for column in outcomes(truth, said))
    yes_wrong, no_right = yes - yes_right, no - no_wrong
    scores = {}
    for answer, right, wanted, given in (("yes", yes_right, yes, yes_right + no_wrong),
                                         ("no", no_right, no, no_right + yes_wrong)):
        # An answer that is never given, or never wanted, scores 0.
        scores[answer] = dict(
            precision=100 * right / max(given, 1),
            recall=100 * right / max(wanted, 1),
            f1=200 * right / max(given + wanted, 1))
    return dict(
        confusion=dict(yes_said_yes=yes_right, yes_said_no=yes_wrong, no_said_yes=no_wrong, no_said_no=no_right),
        accuracy=100 * (yes_right + no_right) / len(truth),
        **scores,
        macro_f1=(scores["yes"]["f1"] + scores["no"]["f1"]) / 2)


def span(value, *starts):
    """The group that a number belongs to, when groups begin at `starts`: "3-4", "9+"."""
    k = bisect.bisect(starts, value)
    low = starts[k - 1]
    if k == len(starts):
        return f"{low}+"
    last = starts[k] - 1
    return str(low) if last == low else f"{low}-{last}"


def groups_of(asked, i):
    """{breakdown: groups that question i is in}: one group, but for its objects, of which it may name two or none."""
    question = asked.questions[i]
    frame = asked.frame(i)
    of_kind = [thing for thing in asked.view(i).objects if thing.category in question.objects]
    conditions = frame["attributes"]
    return {
        "family": [question.family],
        "level": [question.level],
        "template": [question.template],
        "object": question.objects,
        "place": [question.place or "anywhere"],
        "objects seen in the scene": [span(frame["complexity"], 0, 3, 5, 7, 9)],
        "objects of the asked kind": [span(len(of_kind), 0, 1, 2, 3) if question.objects else "none asked"],
        # Without [SOS] and the question mark, which every command has.
        "words": [span(len(asked.prompts[i]) - 2, 0, 5, 7, 9)],
        "weather": [conditions["weather"]],
        "time of day": [conditions["timeofday"]],
        "scene": [conditions["scene"]]}


def broken_down(asked, odds):
    """{breakdown: {group: balanced accuracy}}, groups in order."""
    members = {"family": {family: [] for family in FAMILIES}}     # a family without questions is shown with n = 0
    for i in range(len(asked.rows)):
        for name, groups in groups_of(asked, i).items():
            for group in groups:
                members.setdefault(name, {}).setdefault(group, []).append(i)
    found = {}
    for name, groups in members.items():
        order = FAMILIES if name == "family" else sorted(groups)
        found[name] = {group: asked.accuracy(odds[groups[group]], groups[group]) for group in order}
    return found


def blind_odds(subject, meta, prompts, steps, size=256):
    """Log-odds (n,) for prompts, of a decoder trained here on the training questions without any picture.

    What it gets right, the questions alone give away: it must score 50.
    """
    data = Data(subject.cfg, meta, "train")
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(data.index[:, 3] >= 0)
    # A new decoder, not the trained one without pictures: that one has learned to rely on them.
    torch.manual_seed(0)
    model = VLM(subject.cfg, len(subject.tokenizer)).to(subject.device)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-3)

    def odds_of(batch):
        # A row for each question: without pictures, those about the same one have nothing to share.
        tokens, segment = as_rows([[ids] for ids in batch], device=subject.device)
        with autocast(subject.dtype, subject.device):
            return model.odds(None, tokens, segment)

    for _ in range(steps):
        batch = rng.choice(rows, size)
        truth = torch.from_numpy(data.index[batch, 3].astype(np.float32)).to(subject.device)
        odds = odds_of([data.tokens[r, :data.index[r, 1]].tolist() for r in batch])
        loss = F.binary_cross_entropy_with_logits(odds, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = [odds_of(prompts[i:i + 1024]) for i in range(0, len(prompts), 1024)]
    return torch.cat(found).cpu().numpy()


def controls(subject, asked, odds, meta, blind_steps):
    """What a model scores that cannot see: dict(controls, controls_by_template, vision_gain)."""
    # Half of the set away, because neighbouring frames of a real drive look alike.
    pictures = np.unique(asked.picture)
    another = dict(zip(pictures, np.roll(pictures, len(pictures) // 2)))
    answers = {
        "blank picture": subject.ask(asked.jobs(shown=lambda picture: subject.blank)),
        "another picture": subject.ask(asked.jobs(shown=lambda picture: asked.data.images[another[picture]])),
        "trained without pictures": blind_odds(subject, meta, asked.prompts, blind_steps)}

    def scores_of(chosen=slice(None)):
        return {name: asked.accuracy(answer[chosen], chosen) for name, answer in answers.items()}
    # By template too, because a leak in one could hide in the mean of all.
    templates = np.array([question.template for question in asked.questions])
    by_template = {template: scores_of(templates == template) for template in np.unique(templates)}
    # The gain is over the best control, or over always NO, which scores 50, where every control does worse.
    always_no = np.full(len(odds), -1.0)
    best = max((always_no, *answers.values()), key=lambda answer: asked.accuracy(answer)["value"] or 0)
    return dict(controls=scores_of(), controls_by_template=by_template, vision_gain=asked.lead(odds, asked, best))


def held_out(subject, asked, odds, val, val_odds, meta):
    """Questions that were trained on, and some that never were: dict(train_gap, held_out, ood).

    Never trained on: paraphrases (test_words), questions (test_combos), weather and times of day (ood).
    """
    def answered(name, limit=0):
        other = Questions(subject, meta, name, limit)
        return other, other.odds(subject)
    cfg = subject.cfg
    train_set, train_odds = answered("train", cfg.sample_items // 2)
    gap = {"train": train_set.accuracy(train_odds), "val": val.accuracy(val_odds),
           f"train minus {cfg.split}": train_set.lead(train_odds, asked, odds)}
    new = {}
    # Both sets are about the test split's pictures: the drop is measured on the same scenes.
    for name in ("test_words", "test_combos") if cfg.split == "test" else ():
        other, other_odds = answered(name)
        new[name] = other.accuracy(other_odds)
        new[f"{name}, drop"] = asked.lead(odds, other, other_odds)
    other, other_odds = answered("ood")
    ood = {"all": other.accuracy(other_odds), **broken_down(other, other_odds)}
    return dict(train_gap=gap, held_out=new, ood=ood)


# ---- twins ----

def draw_twin(job):
    """The picture (h, w, 3) of an edited scene; job: its specification, the edit, settings."""
    spec, edit, cfg = job
    return prepare.draw_scene(prepare.apply_edit(spec, edit), prepare.size_of(cfg))


def twin_changes(subject, asked, odds, kind):
    """(which questions have such a twin (m,), whether the answer about it is another one (m,), the edits)."""
    found = asked.twins(kind)
    chosen = np.array([i for i, _ in found], int)
    # Drawn again instead of stored: an edit is a few bytes, and everything it does not touch comes out the same.
    specs = ((asked.spec(i), edit, subject.cfg) for i, edit in found)
    pictures = prepare.parallel(draw_twin, specs, subject.cfg, f"{kind} twins", len(found))
    edited = subject.ask((picture, [asked.prompts[i]]) for i, picture in zip(chosen, pictures))
    return chosen, (edited > 0) != (odds[chosen] > 0), [edit for _, edit in found]


def twins(subject, asked, odds):
    """Answers about edited scenes: pairs both right (chance is 25%), stubbornness, indecision; {} without twins.

    Stubborn: the truth flipped and the answer did not. Indecisive: the answer flipped and the truth did not.
    """
    chosen, changed, edits = twin_changes(subject, asked, odds, "flip")
    if not edits:
        return {}
    # A pair is both right when the first answer was, and the answer changed with the truth. A model that ignores the
    # picture gives both pictures of a pair one answer: it gets none right.
    both = ((odds > 0) == asked.truth)[chosen] & changed
    families = [asked.questions[i].family for i in chosen]
    kinds = [edit["kind"] for edit in edits]
    found = dict(
        questions=len(asked.rows),
        questions_with_flip=len(chosen),
        both_right_by_family=asked.means_by(families, both, chosen),
        both_right_by_edit=asked.means_by(kinds, both, chosen),
        **asked.means(chosen, both_right=both, stubbornness=~changed))
    chosen, changed, _ = twin_changes(subject, asked, odds, "neutral")
    return dict(found, **asked.means(chosen, indecision=changed, neutral_unchanged=~changed))


# ---- reasons ----

def reasons(subject, asked, count):
    """Generated reasons, or descriptions, compared with the written ones and with the rules: is what they claim true?

    A claim on which the rules are undecided, or that is not in the grammar, counts as neither true nor false.
    Shortcut rate: share of the right answers whose reason is false.
    """
    chosen = asked.sample(count, 1)
    said = subject.say(asked.jobs(chosen))
    pairs = [(text, asked.items[i]["reason"]) for (_, text), i in zip(said, chosen)]
    # FALSE, UNSURE, TRUE, or None.
    truth = np.array([commands.check_reason(text, asked.view(i)) for (_, text), i in zip(said, chosen)], object)
    found = asked.means(
        chosen,
        exact=[text == written for text, written in pairs],
        rouge_l=[rouge_l(text, written) for text, written in pairs],
        true=truth == TRUE,
        false=truth == FALSE,
        not_in_grammar=[value is None for value in truth])
    found["bleu4"] = dict(n=len(pairs), value=bleu4(pairs))
    # Descriptions have no verdict to be right about.
    if all(item["answer"] is None for item in asked.items):
        return found
    # None, no verdict at all, counts as wrong.
    answers = [answer for answer, _ in said]
    right = np.array(answers) == asked.truth[chosen]
    return dict(
        found,
        valid_answers=asked.mean([answer is not None for answer in answers], chosen),
        true_when_answer_right=asked.mean(truth[right] == TRUE, chosen[right]),
        true_when_answer_wrong=asked.mean(truth[~right] == TRUE, chosen[~right]),
        shortcut_rate=asked.mean(truth[right] == FALSE, chosen[right]))


# ---- grounding: does attention point at what is asked? ----

def cover(labels, size, grid):
    """Share of each patch that the labels' boxes cover together: (P,).

    size: (width, height) of the picture; grid: (rows, columns) of its patches.
    """
    # Painted pixel by pixel, so that boxes that overlap count once.
    width, height = size
    rows, columns = grid
    pixels = np.zeros((height, width))
    for label in labels:
        edges = label["box2d"]
        top = max(math.floor(edges["y1"]), 0)
        left = max(math.floor(edges["x1"]), 0)
        pixels[top:math.ceil(edges["y2"]), left:math.ceil(edges["x2"])] = 1
    return pixels.reshape(rows, height // rows, columns, width // columns).mean((1, 3)).ravel()


def pointing(maps, covers):
    """Does the largest patch of each map (n, P) touch the boxes? (n,); where several tie, the share of them that do.

    The pointing game (Zhang et al. 2016) with a tolerance of half a patch; a uniform map scores the chance of a patch.
    """
    # A map may have several maxima; taking the first would favour the upper left corner.
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


def best_threshold(maps, covers):
    """The threshold of box_iou, as a share of the maximum, that fits these maps (n, P) best."""
    thresholds = np.arange(1, 20) / 20
    return max(thresholds, key=lambda t: box_iou(maps, covers, t).mean())


class Look(namedtuple("Look", "question category maps cover")):
    """Maps that should point at something, and at what: index of the question (m,), category (m,), maps (m, L, H, P),
    cover of the boxes (m, P)."""

    @property
    def mean(self):
        """The maps averaged over layers and heads: (m, P)."""
        return self.maps.mean((1, 2))


def look_of(entries):
    """A Look of entries (question, category, maps, cover)."""
    if not entries:
        return Look(np.zeros(0, int), np.zeros(0, str), np.zeros(0), np.zeros(0))
    return Look(*map(np.array, zip(*entries)))


def looks(subject, asked, chosen, model=None):
    """(answer maps (m, L, H, P) of the chosen questions, Look of their answers, Look of the words that name objects).

    An object's word is judged by all certain objects of its category, because it comes before the place is named. The
    answer is judged by the objects that make it YES: a NO has nothing to point at.
    """
    answers, at_answers, at_words = [], [], []
    for i, (_, maps) in zip(chosen, subject.look(asked.jobs(chosen), model)):
        question = asked.questions[i]
        # Copies: a slice would keep the maps of the whole batch in memory.
        at_end = maps[:, :, -1].copy()
        answers.append(at_end)
        words = [subject.tokenizer.words[t] for t in asked.prompts[i]]
        for category in dict.fromkeys(question.objects):
            things = asked.view(i).certain(category)
            # Each kind is named once in a question.
            place, = (t for t, word in enumerate(words) if word in NAMED[category])
            if things:
                at_words.append((i, category, maps[:, :, place].copy(), asked.cover(i, things, subject.grid)))
        things = question.evidence(asked.view(i)) if asked.truth[i] and question.objects else []
        if things:
            at_answers.append((i, question.objects[0], at_end, asked.cover(i, things, subject.grid)))
    return np.array(answers), look_of(at_answers), look_of(at_words)


def baseline_maps(look, picture, untrained, grid):
    """{name: maps (m, P)} of looks that know less than the model's own. picture (n,): of each question.

    Another command's map is that of a word for another kind in the same picture; another picture's map is that of a
    word for the same kind. Where there is none, the map is uniform.
    """
    own = look.mean
    n, patches = own.shape
    where = picture[look.question]

    def rival(i, same, other):
        """The map of the next one after i, in a circle, that has the same value as i in `same`, not in `other`."""
        fit = np.flatnonzero((same == same[i]) & (other != other[i]))
        if not len(fit):
            return np.ones(patches)
        return own[fit[np.searchsorted(fit, i) % len(fit)]]
    # People and cameras put what matters in the middle: a bump there is a strong baseline.
    y, x = [(2 * np.arange(count) + 1) / count - 1 for count in grid]
    centre = np.exp(-(x ** 2 + y[:, None] ** 2)).ravel()
    return {
        "chance (any patch)": np.ones((n, patches)),
        "centre of the picture": np.tile(centre, (n, 1)),
        "another command's map": np.array([rival(i, where, look.category) for i in range(n)]),
        "another picture's map": np.array([rival(i, look.category, where) for i in range(n)]),
        "untrained weights": untrained.mean}


def grounding(asked, look, untrained, chosen_on, grid):
    """Pointing, mass, enrichment and IoU of the maps averaged over layers and heads, and those of all baselines.

    untrained: the same Look with untrained weights; chosen_on: the Look of other questions (val) on which the threshold
    of the IoU is chosen.
    """
    if not len(look.question):
        return dict(n=0)
    # Chosen on other questions: on these it would fit their boxes too well.
    threshold = 0.5
    if len(chosen_on.question):
        threshold = best_threshold(chosen_on.mean, chosen_on.cover)
    rivals = baseline_maps(look, asked.picture, untrained, grid)
    own = look.mean
    at, covers = look.question, look.cover
    found = {}
    for name, maps in {"model": own, **rivals}.items():
        found[name] = asked.means(
            at,
            pointing=pointing(maps, covers),
            mass_in_box=mass_in_box(maps, covers),
            iou=box_iou(maps, covers, threshold))
        # The median, because a small box that is hit has an enrichment of 50 and more.
        times = enrichment(maps, covers)
        found[name]["enrichment"] = median_estimate(asked.picture[at], times, asked.cfg.bootstrap)
    # In pairs with the strongest baseline: a hit on a large object in the middle proves little.
    best = max(rivals, key=lambda name: found[name]["pointing"]["value"])
    ahead = pointing(own, covers) - pointing(rivals[best], covers)
    return dict(threshold=threshold, scores=found, best_baseline=best, pointing_ahead=asked.mean(ahead, at))


RANDOM_ORDERS = 3             # random orders of the patches that each picture's order by attention is compared with


def hide(subject, picture, hidden):
    """The picture (h, w, 3) with its hidden patches, bool (P,), in the mean colour."""
    patch = np.ones((subject.cfg.patch_size, subject.cfg.patch_size), bool)
    hidden = np.kron(hidden.reshape(subject.grid), patch)                         # (h, w)
    return np.where(hidden[..., None], subject.blank, picture)


def deletion_insertion(subject, asked, answer, odds, count):
    """Hide (or show) first the patches that the answer looked at most: how fast does p(YES) fall (or rise)?

    On up to `count` right YES answers about objects. Area under p(YES) over the share of patches, compared in pairs
    with random orders of the same picture (Petsiuk et al. 2018), in points. A hidden patch has the mean colour.
    """
    # `answer` holds questions whose truth is YES, so that a YES is right.
    usable = np.flatnonzero(odds[answer.question] > 0)
    usable = np.sort(np.random.default_rng(2).permutation(usable)[:count])
    patches = math.prod(subject.grid)
    # In powers of two, since most happens among the first patches: 0, 1, 2, 4 ... all.
    steps = [0, *(2 ** k for k in range((patches - 1).bit_length())), patches]
    rng = np.random.default_rng(3)

    def jobs():
        for u in usable:
            i = answer.question[u]
            by_attention = np.argsort(-answer.maps[u].mean((0, 1)), kind="stable")
            orders = [by_attention, *(rng.permutation(patches) for _ in range(RANDOM_ORDERS))]
            # Deletion hides the first patches of an order; insertion hides all the others.
            for order, insert, step in itertools.product(orders, (False, True), steps):
                hidden = np.full(patches, insert)
                hidden[order[:step]] = not insert
                yield hide(subject, asked.pixels(i), hidden), [asked.prompts[i]]
    found = subject.ask(jobs()).reshape(len(usable), 1 + RANDOM_ORDERS, 2, len(steps))
    p = 100 * probability(found)
    share = np.array(steps) / patches
    area = torch.trapezoid(torch.from_numpy(p), torch.from_numpy(share)).numpy()                 # (n, orders, 2)
    at = answer.question[usable]
    result = dict(share_of_patches=share.tolist())
    for k, name in enumerate(("deletion", "insertion")):
        own = area[:, 0, k]
        chance = area[:, 1:, k].mean(1)
        result[name] = asked.means(at, 1, attention=own, random=chance, difference=own - chance)
        for curve, values in (("curve", p[:, 0, k]), ("random_curve", p[:, 1:, k].mean(1))):
            result[name][curve] = [asked.mean(value, at, 1) for value in values.T] if len(usable) else []
    return result


# ---- attention: entropy, consistency, sensitivity ----

def entropy(maps):
    """Entropy of maps (..., P) in nats: 0 for one patch, log(P) for all alike."""
    return -(maps * np.log(np.maximum(maps, 1e-30))).sum(-1)


def distances(a, b):
    """{cosine, l2, js} of maps (n, P) that sum to 1, each (n,); js: Jensen-Shannon divergence in nats."""
    norms = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return dict(
        cosine=(a * b).sum(-1) / norms,
        l2=np.linalg.norm(a - b, axis=-1),
        # The entropy of the mean map minus the mean of the entropies.
        js=entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2)


def watch(subject, jobs):
    """Each prompt's log-odds (n,), and where its answer looks, mean over layers and heads: (n, P)."""
    odds, found = [], []
    for verdict, maps in subject.look(jobs):
        odds.append(verdict)
        found.append(maps[:, :, -1].mean((0, 1)))
    return np.array(odds), np.array(found)


def stability(subject, asked, count):
    """How alike answer maps are: of two paraphrases, of two questions about one picture, of one question about two
    scenes, and about a scene before and after an edit that changes nothing of the answer ("similar scene").

    {pair: {cosine, l2, js}}, and "command sensitivity": {l2, js}, the distance of two questions over that of two
    paraphrases.
    """
    chosen = asked.sample(count, 4)
    rng = random.Random(0)
    edits = dict(asked.twins("neutral"))
    jobs = defaultdict(dict)                                # {pair: {number of the question in chosen: job}}
    for k, i in enumerate(chosen):
        own = asked.items[i]["command"]
        # Some questions have few ways to be put: after 20 tries the same words are better than an endless search.
        wordings = (asked.questions[i].words(rng) for _ in range(20))
        words = next((other for other in wordings if other != own), own)
        jobs["paraphrase"][k] = asked.pixels(i), [subject.tokenizer.prompt(words)]
        about_it = np.flatnonzero(asked.picture == asked.picture[i])
        rivals = [j for j in about_it if asked.questions[j] != asked.questions[i]]
        jobs["another question"][k] = asked.pixels(i), [asked.prompts[rng.choice(rivals or [i])]]
        # Half of the sample away, because neighbours are often about the same picture.
        far = chosen[k - len(chosen) // 2]
        jobs["another scene"][k] = asked.pixels(far), [asked.prompts[i]]
        if i in edits:
            jobs["similar scene"][k] = draw_twin((asked.spec(i), edits[i], subject.cfg)), [asked.prompts[i]]
    _, usual = watch(subject, asked.jobs(chosen))
    pairs, found = {}, {}
    for name, those in jobs.items():
        at = list(those)
        _, maps = watch(subject, those.values())
        pairs[name] = distances(usual[at], maps)
        found[name] = asked.means(chosen[at], 1, **pairs[name])
    found["command sensitivity"] = {
        key: interval(asked.picture[chosen], (pairs["another question"][key], pairs["paraphrase"][key]), ratio,
                      asked.cfg.bootstrap)
        for key in ("l2", "js")}
    return found


# ---- heads ----

def without_head(attention, head):
    """For `with`, inside which head `head` of a model.Attention adds nothing: its part is zeroed before the output
    projection."""
    d = attention.head_dim

    # After the output projection the heads are summed, and none could be taken out any more.
    def zero(module, inputs):
        kept = inputs[0].clone()
        kept[..., head * d:(head + 1) * d] = 0
        return (kept,)
    # PyTorch's handle takes its hook away at the end of `with`.
    return attention.out.register_forward_pre_hook(zero)


def attentions(model):
    """{"vision": [...], "self": [...], "cross": [...]}: the Attention of each layer."""
    return {
        "vision": [block.attn for block in model.vision.blocks],
        "self": [block.attn for block in model.decoder.blocks],
        "cross": [block.cross for block in model.decoder.blocks]}


def head_ablation(subject, asked):
    """[{kind, layer, head, drop, p_holm}]: balanced accuracy lost without a head, in points.

    p_holm: McNemar's mid-p of the whole model against the one without, adjusted by Holm over all heads.
    """
    whole = asked.odds(subject)
    found = []
    for kind, modules in attentions(subject.model).items():
        for layer, module in enumerate(modules):
            # H = groups of keys and values times the queries that share each.
            for head in range(module.kv_heads * module.shared):
                with without_head(module, head):
                    lost = compare(asked, whole, asked.odds(subject))
                found.append(dict(kind=kind, layer=layer, head=head, drop=lost["difference"], p_holm=lost["mcnemar_p"]))
    for entry, adjusted in zip(found, holm([entry["p_holm"] for entry in found])):
        entry["p_holm"] = adjusted
    return found


def squared_distances(points, others):
    """(n, m) of points (n, d) and others (m, d)."""
    return ((points[:, None] - others[None]) ** 2).sum(-1)


def k_means(points, k):
    """Cluster numbers (n,) of points (n, d): 50 rounds of Lloyd's algorithm from starts that lie farthest apart."""
    first = squared_distances(points, points.mean(0, keepdims=True)).argmax()
    centres = points[[first]]
    while len(centres) < k:
        farthest = squared_distances(points, centres).min(1).argmax()
        centres = np.concatenate((centres, points[[farthest]]))
    for _ in range(50):
        label = squared_distances(points, centres).argmin(1)
        # A centre without points stays where it is.
        for j in np.unique(label):
            centres[j] = points[label == j].mean(0)
    return label


def silhouette(points, label):
    """Mean silhouette of a clustering (Rousseeuw 1987): 1 = clusters far apart, 0 = no structure."""
    gap = np.sqrt(squared_distances(points, points))
    scores = []
    for i, own in enumerate(label):
        near = label == own
        near[i] = False
        apart = [gap[i, label == c].mean() for c in np.unique(label) if c != own]
        if not near.any() or not apart:
            scores.append(0.0)           # by definition, for a point that is alone and for a single cluster
            continue
        a = gap[i, near].mean()
        b = min(apart)
        scores.append((b - a) / max(a, b, 1e-12))
    return np.mean(scores)


def specialisation(word):
    """What each cross-attention head looks for: its enrichment (L, H, C) for the words of each category, and clusters
    of heads. word: a Look.

    selectivity (L, H): log of a head's enrichment for its favourite category over its (geometric) mean for all.
    """
    kinds = sorted(set(word.category))
    if not kinds:
        return dict(categories=[])
    profile = []
    for category in kinds:
        mine = word.category == category
        inside = np.einsum("nlhp,np->lh", word.maps[mine], word.cover[mine]) / mine.sum()
        profile.append(inside / word.cover[mine].mean())
    profile = np.stack(profile, -1)                         # (L, H, C)
    # Logarithms, so that twice and half of even attention lie equally far from it.
    logs = np.log(np.maximum(profile, 1e-6)).reshape(-1, len(kinds))                             # (L*H, C)
    # As many clusters as fit best; a single one scores 0.
    options = [k_means(logs, k) for k in range(1, min(6, len(logs)) + 1)]
    label = max(options, key=lambda one: silhouette(logs, one))
    clusters = []
    for c in np.unique(label):
        mean = np.exp(logs[label == c].mean(0))
        heads = np.argwhere(label.reshape(profile.shape[:2]) == c)
        clusters.append(dict(heads=heads, looks_for=kinds[mean.argmax()], enrichment=mean.max(), mean=mean.mean()))
    selectivity = logs.max(1) - logs.mean(1)
    return dict(
        categories=kinds,
        enrichment=profile,
        clusters=clusters,
        silhouette=silhouette(logs, label),
        selectivity=selectivity.reshape(profile.shape[:2]))


def attention(subject, asked, odds, val, chosen):
    """(every measure of attention, answer maps (m, L, H, P) of the chosen questions). val: Questions of the val set."""
    cfg = subject.cfg
    # Where random weights look shows how much of a score comes from the architecture and the pictures alone.
    torch.manual_seed(0)
    untrained = VLM(cfg, len(subject.tokenizer)).to(subject.device).eval()
    maps, answer, word = looks(subject, asked, chosen)
    _, null_answer, null_word = looks(subject, asked, chosen, untrained)
    _, val_answer, val_word = looks(subject, val, val.sample_pictures(cfg.sample_items // 4))
    # Per head first: the entropy of an average map would hide heads that look at one patch each.
    spread = entropy(maps)                                  # (m, L, H)
    overall = spread.mean((1, 2))
    confidence = np.abs(odds[chosen])
    by_head = [[asked.mean(head, chosen, 1) for head in layer] for layer in np.moveaxis(spread, 0, -1)]
    found = dict(
        grounding=dict(
            word=grounding(asked, word, null_word, val_word, subject.grid),
            answer=grounding(asked, answer, null_answer, val_answer, subject.grid)),
        entropy=dict(
            maximum=math.log(maps.shape[-1]),
            mean=asked.mean(overall, chosen, 1),
            by_head=by_head,
            with_confidence=correlation_estimate(asked.picture[chosen], overall, confidence, cfg.bootstrap)),
        specialisation=specialisation(word),
        specialisation_untrained=specialisation(null_word),
        deletion_insertion=deletion_insertion(subject, asked, answer, odds, cfg.probe_items),
        stability=stability(subject, asked, 2 * cfg.probe_items))
    return found, maps


# ---- failures ----

def parts(question, view):
    """The simpler questions that make up this one and whose truth is certain; none for the simplest."""
    def simplest(name):
        if name in LIGHTS:
            return Question("light", name.split()[0])
        return Question("exists", name)
    template = question.template
    found = []
    # Each part is one thing that must be seen, or one side that must be judged, to answer the whole.
    if template in ("exists_at", "near", "light"):
        found = [simplest(question.objects[0])]
    elif question.other:
        found = [simplest(question.category), simplest(question.other)]
    elif question.family == "safety":
        found = [Question("clear", place) for place in question.ways()]
        if question.obeys_light():
            found += [Question("light", colour) for colour in commands.COLOURS]
    elif template == "clear":
        found = [Question("exists_at", category, question.side) for category in commands.ROAD_USERS]
        # What blocks a side may have its centre elsewhere. Whether it is at that side is unsure then; it must be seen.
        found += [simplest(c) for c in commands.ROAD_USERS if view.blocked(question.side, c) == TRUE]
    return [q for q in found if q.truth(view) != UNSURE]


def error_type(again, pieces, missed):
    """vision error: a part of the question is answered wrongly, or it has no parts and most ways of asking fail;
    language error: its parts are right, and so is the canonical form or most of the paraphrases;
    reasoning error: its parts are right, and the whole is wrong in most ways of asking.

    again: whether each way of asking is answered rightly, the canonical one first; pieces: its parts; missed: those
    answered wrongly.
    """
    if missed:
        return "vision"
    if again[0] or again.mean() > 0.5:
        return "language"
    return "reasoning" if pieces else "vision"


def failures(subject, asked, odds):
    """([one dict for each wrong answer], counts): each question asked again in other words and in parts.

    Suspected label error: wrong with over 95% confidence and in every paraphrase. The labels of drawn scenes are exact;
    on real frames it is the first place to look for a wrong label.
    """
    wrong = np.flatnonzero((odds > 0) != asked.truth)
    rng = random.Random(0)
    records = []
    for i in wrong:
        question = asked.questions[i]
        view = asked.view(i)
        pieces = parts(question, view)
        count = len(question.forms())
        words = [question.words(rng, k) for k in range(count)]
        words += [piece.words(rng, 0) for piece in pieces]
        prompts = [subject.tokenizer.prompt(text) for text in words]
        said = subject.ask([(asked.pixels(i), prompts)]) > 0
        again = said[:count] == asked.truth[i]
        missed = [piece for piece, yes in zip(pieces, said[count:]) if yes != (piece.truth(view) == TRUE)]
        p = float(probability(odds[i]))
        item = asked.items[i]
        records.append(dict(
            frame=asked.frame(i)["name"],
            item=int(asked.rows[i]),
            command=item["command"],
            truth="YES" if asked.truth[i] else "NO",
            reason=item["reason"],
            p_yes=round(p, 4),
            template=item["template"],
            family=item["family"],
            type=error_type(again, pieces, missed),
            error="false negative" if asked.truth[i] else "false positive",
            low_confidence=0.3 < p < 0.7,
            paraphrases_right=int(again.sum()),
            paraphrases=count,
            missed_parts=[" ".join(filter(None, q)) for q in missed],
            suspected_label_error=bool(max(p, 1 - p) > 0.95 and not again.any())))
    counts = {kind: Counter(str(r[kind]) for r in records)
              for kind in ("type", "error", "low_confidence", "suspected_label_error")}
    counts["type_by_family"] = {name: Counter(r["type"] for r in records if r["family"] == name) for name in FAMILIES}
    return records, counts


def confusions(asked, odds, least=20):
    """Which kind is taken for which: of NO questions on one object, how much likelier YES is where another kind stands.

    [{asked, present, n, said_yes, elsewhere, times}], the strongest first: said_yes is the share of YES in % where
    the other kind is there (at the place asked about), elsewhere that of the NO questions without it.
    """
    answers = defaultdict(list)          # {(kind asked for, other kind, is it there?): whether the answers are YES}
    for i, question in enumerate(asked.questions):
        if question.template not in ("exists", "exists_at") or asked.truth[i]:
            continue
        for other in CATEGORIES:
            # At the place that the question is about; an uncertain object is neither there nor absent.
            truth = asked.view(i).exists(other, question.place or None)
            if other != question.category:
                answers[question.category, other, truth].append(odds[i] > 0)
    found = []
    for (category, other, truth), said in answers.items():
        without = answers.get((category, other, FALSE), [])
        if truth == TRUE and min(len(said), len(without)) >= least:
            a = 100 * np.mean(said)
            b = 100 * np.mean(without)
            # + 1 avoids a division by 0, and keeps single answers from coming first.
            times = (a + 1) / (b + 1)
            found.append(dict(asked=category, present=other, n=len(said), said_yes=a, elsewhere=b, times=times))
    return sorted(found, key=lambda c: -c["times"])


def command_pairs(asked, odds):
    """Which kinds of command are mixed up: of two about one picture whose truths differ, how often both get one answer.

    {templates, n, same, expected}: (C, C) matrices over templates, in %; expected: were their errors independent.
    """
    names = sorted({q.template for q in asked.questions})
    kind = np.eye(len(names), dtype=int)[[names.index(q.template) for q in asked.questions]]     # (n, C)
    wrong = (odds > 0) != asked.truth
    n = same = 0
    # Picture by picture: all pairs of a large set would be hundreds of millions.
    for picture in np.unique(asked.picture):
        own = asked.picture == picture
        differ = asked.truth[own][:, None] != asked.truth[own]
        # Of two different truths both get one answer when exactly one of the two answers is wrong.
        alike = differ & (wrong[own][:, None] != wrong[own])
        n += kind[own].T @ differ @ kind[own]
        same += kind[own].T @ alike @ kind[own]
    error = kind[wrong].sum(0) / kind.sum(0)                # share of wrong answers of each template
    expected = error[:, None] + error - 2 * error[:, None] * error
    share = 100 * same / np.maximum(n, 1)
    return dict(templates=names, n=n.tolist(), same=share, expected=100 * expected)


# ---- two models ----

def compare(asked, odds, theirs):
    """Paired comparison of the log-odds (n,) of two models: McNemar's test, and the bootstrap of the difference."""
    only_this, only_other, p = mcnemar((odds > 0) == asked.truth, (theirs > 0) == asked.truth)
    return dict(
        other=asked.accuracy(theirs),
        difference=asked.lead(odds, asked, theirs),
        only_this_right=only_this,
        only_other_right=only_other,
        mcnemar_p=p)


# ---- the page ----

def rounded(value):
    """Plain Python values of 4 decimals, ready for JSON; numbers that are not finite, which it lacks, become None."""
    text = json.dumps(value, default=lambda of_numpy: of_numpy.tolist())
    return json.loads(text, parse_float=lambda number: round(float(number), 4), parse_constant=lambda name: None)


def write(path, content):
    """Write a text, or anything else as JSON."""
    if not isinstance(content, str):
        content = json.dumps(content, indent=1, allow_nan=False)
    path.write_text(content, encoding="utf-8")


def text_of(entry, unit="", digits=2):
    """`93.31 [92.70, 93.90]` of an estimate, its value alone where it has no interval, "-" where it is not defined."""
    if entry["value"] is None:
        return "-"
    value = f"{entry['value']:.{digits}f}{unit}"
    return f"{value} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]" if "low" in entry else value


def headline(page):
    """The figures that matter most: [(name, estimate, what it means or what to compare it with)]."""
    gap = page["train_gap"][f"train minus {page['split']}"]
    rows = [
        ("all questions", page["overall"], "guessing: 50"),
        *((f"- {name}", entry, f"such as “{FAMILIES[name]}”") for name, entry in page["by"]["family"].items()),
        *((f"control: {name}", entry, "must be 50") for name, entry in page["controls"].items()),
        ("vision gain", page["vision_gain"], "points over the best control; at most 50"),
        ("training pictures minus test pictures", gap, "points; overfitting")]
    for name, text in (("test_words", "paraphrases"), ("test_combos", "combinations such as “bus ahead”")):
        if name in page["held_out"]:
            drop = text_of(page["held_out"][f"{name}, drop"], digits=1)
            rows.append((f"{text} never trained on", page["held_out"][name], f"{drop} points lost"))
    rows.append(("weather and hours never trained on", page["ood"]["all"], "guessing: 50"))
    if page["twins"]:
        rows.append(("twins, both right", page["twins"]["both_right"],
                     "a scene, and its copy with one edit that flips the truth; guessing: 25"))
    rows += [
        ("true reasons", page["reasons"]["true"], "of the scene, by the rules"),
        ("right answer, false reason", page["reasons"]["shortcut_rate"], "")]
    probe = page["attention"]["deletion_insertion"]
    for name, text in (("deletion", "hidden"), ("insertion", "shown")):
        rows.append((f"p(YES) while the patches looked at most are {text} first", probe[name]["attention"],
                     f"in random order: {text_of(probe[name]['random'], digits=1)}"))
    return rows


def markdown_table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(page):
    """The tables of eval.md, which README quotes: the figures that matter most, and where attention points."""
    rows = [(name, text_of(entry, digits=1), f"{entry['n']:,}", text) for name, entry, text in headline(page)]
    text = markdown_table(("measure", "% [95% interval]", "n", "compare with"), rows)
    for looker, name in (("word", "the word of an object"), ("answer", "the answer")):
        scores = page["attention"]["grounding"][looker].get("scores", {})
        rows = [(who, *(text_of(found[what], digits=1) for what in ("pointing", "enrichment", "iou")))
                for who, found in scores.items()]
        if rows:
            text += "\n" + markdown_table((f"{name}, n={scores['model']['pointing']['n']:,}", "pointing, %",
                                           "enrichment, times", "IoU, %"), rows)
    return text


def lines_of(found, depth=0):
    """Yields every number in a nest of dicts, under its name there, as a line; lists are for the figures."""
    for name, entry in found.items():
        title = "  " * depth + str(name)
        if isinstance(entry, dict) and {"n", "value"} <= set(entry):
            yield f"{title:<36} {text_of(entry):<24} n={entry['n']}"
        elif isinstance(entry, dict):
            yield title
            yield from lines_of(entry, depth + 1)
        elif not isinstance(entry, list):
            yield f"{title:<36} {entry}"


def print_page(page, records):
    """The page for people: the numbers that matter most, all the others, and some wrong answers (dicts)."""
    print(f"\n{page['split']} split: balanced accuracy and shares in % [95% interval over pictures]")
    print(tables(page))
    print("Everything in eval.json but lists:", *lines_of(page), sep="\n")
    print("\nPoints lost without a head, the most first:")
    for e in sorted(page["head_ablation"], key=lambda e: -(e["drop"]["value"] or 0))[:6]:
        print(f"  {e['kind']} layer {e['layer']} head {e['head']}: {text_of(e['drop'])}, p (Holm) {e['p_holm']:.3g}")
    print("\nObjects taken for others:")
    for c in page["failures"]["confusions"][:5]:
        print(f"  asked for a {c['asked']} that is not there: YES to {c['said_yes']:.1f}% where a {c['present']} is "
              f"(n={c['n']}), to {c['elsewhere']:.1f}% where none is")
    print(f"\n{len(records)} wrong answers; the first:")
    for r in records[:5]:
        print(f"  {r['frame']}: {r['command']}? {r['error']}, {r['type']} error; the truth is {r['truth']}: "
              f"{r['reason']}")


# ---- the whole evaluation ----

def opened(cfg):
    """(the Subject of cfg.checkpoint, that of cfg.against or None). Raises UserError where they do not fit."""
    subject = Subject(cfg)
    if not cfg.against:
        return subject, None
    other = Subject(config.with_changes(cfg, checkpoint=cfg.against))
    if other.tokenizer.words != subject.tokenizer.words or other.blank.shape != subject.blank.shape:
        raise UserError(f"{cfg.against} has another vocabulary or size of pictures: the two cannot be compared on "
                        "the same data")
    return subject, other


def store_maps(path, subject, asked, odds, chosen, maps):
    """Write attention.npz: the answer maps (m, L, H, P) of the chosen questions, and those of some wrong answers."""
    # The figure of failures shows where wrong answers looked; the number is bounded, because full maps are large.
    failed = asked.sample(STORED_FAILURES, 5, (odds > 0) != asked.truth)
    failure_maps = [found[:, :, -1] for _, found in subject.look(asked.jobs(failed))]
    np.savez(
        path,
        items=asked.rows[chosen],
        answer_maps=maps.mean((1, 2)).astype(np.float16),
        odds=odds[chosen],
        failure_items=asked.rows[failed],
        failure_maps=np.array(failure_maps, np.float16).reshape(-1, *maps.shape[1:]))


def evaluate(cfg, blind_steps=300):
    """Evaluate cfg.checkpoint (empty: out_dir/best.pt) on cfg.split; prints the page, writes and returns eval.json.

    blind_steps: updates of the control that is trained without pictures.
    """
    start = time.time()
    subject, other = opened(cfg)
    meta = subject.take_data()
    cfg = subject.cfg
    out = config.made_folder(cfg.out_dir)
    print(f"device {subject.device}, dtype {str(subject.dtype)[6:]} ({subject.why}); checkpoint of step "
          f"{subject.state['step']}")

    def stage(text):
        print(f"{time.time() - start:5.0f} s  {text}", flush=True)

    stage("answers")
    asked = Questions(subject, meta, cfg.split)
    if not len(asked.rows):
        raise UserError(f"the {cfg.split} split in {cfg.data_dir} holds no questions")
    odds = asked.odds(subject)
    page = dict(
        format=FORMAT,
        split=cfg.split,
        step=subject.state["step"],
        data_hash=meta["hash"],
        overall=asked.accuracy(odds),
        by=broken_down(asked, odds),
        classification=classification(asked.truth, odds > 0))
    stage("controls: a blank picture, another one, a decoder trained without pictures")
    page.update(controls(subject, asked, odds, meta, blind_steps))
    stage("training, validation, held-out and out-of-distribution questions")
    val = Questions(subject, meta, "val")
    val_odds = val.odds(subject)
    page.update(held_out(subject, asked, odds, val, val_odds, meta))
    stage("twins")
    page["twins"] = twins(subject, asked, odds)
    stage("reasons and descriptions")
    page["reasons"] = reasons(subject, asked, cfg.sample_items // 2)
    described = Questions(subject, meta, cfg.split, verdicts=False)
    page["descriptions"] = reasons(subject, described, cfg.sample_items // 8)
    # Fitted on val: on the questions that it is tested with, the temperature would look too good.
    temperature = fit_temperature(val_odds, val.truth) if len(val_odds) else 1.0
    page["calibration"] = dict(
        temperature=temperature,
        raw=calibration(odds, asked.truth),
        scaled=calibration(odds / temperature, asked.truth))
    stage("attention: where it points, deletion and insertion, stability")
    chosen = asked.sample_pictures(cfg.sample_items)
    page["attention"], maps = attention(subject, asked, odds, val, chosen)
    stage("heads, one left out at a time")
    page["head_ablation"] = head_ablation(subject, Questions(subject, meta, cfg.split, cfg.head_items))
    stage("failures")
    records, counts = failures(subject, asked, odds)
    page["failures"] = dict(
        counts=counts,
        confusions=confusions(asked, odds),
        command_pairs=command_pairs(asked, odds))
    if other:
        stage("the other checkpoint")
        page["against"] = compare(asked, odds, asked.odds(other))

    page = rounded(page)
    print_page(page, records)
    store_maps(out / "attention.npz", subject, asked, odds, chosen, maps)
    write(out / "failures.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write(out / "eval.json", page)
    write(out / "eval.md", tables(page))
    print(f"\nwrote eval.json, eval.md, failures.jsonl and attention.npz to {out} in {time.time() - start:.0f} s")
    return page


if __name__ == "__main__":
    config.run(evaluate, __doc__)
