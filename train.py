"""Training: batches of pictures with several commands each, the losses, AdamW with a hand-written schedule, the loop.

- Prepares the data itself when they are missing; ends with the test accuracy and a block of `key: value` lines.
- Two stages in one loop: first the vision encoder learns to see from the words of descriptions, then all learn to read.
- How long a stage lasts is set in pictures: a run with 4 x 8 accumulated pictures costs as much as one with 32 at once,
  and learns the same.
- A batch follows from the seed and the number of pictures shown before it, so resuming needs no state of a loader.
- Augmentation keeps the truth: a flip swaps left and right in the text, a crop is made only if all answers hold.
- best.pt by validation balanced accuracy, last.pt to resume from, and log.csv, all in out_dir; Ctrl-C saves.
- Several processes share each batch, and learn what one process learns.

    python train.py                                   default: minutes on 2 CPU cores
    python train.py --resume=True                     continue after Ctrl-C
    python train.py --batch_size=4 --grad_accum=8 --out_dir=out/accumulated
    python train.py --preset=base --device=cuda
    python train.py --init_from=out/default/best.pt --lora_rank=8 --out_dir=out/tuned
    python train.py --export=model.pt                 best.pt without what only training needs
    torchrun --standalone --nproc_per_node=2 train.py --out_dir=out/two

Shapes: B pictures and their rows, L tokens of a row, W tag words, M learned tokens, V words, n questions.
"""
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import commands
import config
import prepare
from config import UserError
from model import VLM, WordTagger, as_rows, autocast, parameter_count, pick_device, pick_dtype
from tokenizer import IGNORE, NO, YES, Tokenizer

FORMAT = 4                    # of checkpoints
MEMORY = ("best", "since_best", "top", "unlogged")          # what a Run remembers of its updates
# What of a checkpoint only training needs.
PROGRESS = ("tagger", "optimizer", "scaler", *MEMORY)
# Sections of config.py whose settings shape what is trained: a resumed run may change only the others, and how long it
# reads.
SHAPING = ("data", "commands", "model", "training")
RESUMABLE = {name for name, (section, _, _) in config.SETTINGS.items() if section not in SHAPING} | {"read_pictures"}

# ---- data ----

# Words of a description that say what is seen, for the first stage of training (WordTagger).
TAGS = sorted({commands.NOUNS[c][0].split()[-1] for c in commands.CATEGORIES} | set(commands.COLOURS) | {"near", "far"})


@dataclasses.dataclass
class Batch:
    """pictures (B, h, w, 3) uint8, scale and shift (B, 3) float32, see normalise; tokens, segment and targets (B, L)
    int64, see model.as_rows, targets IGNORE where nothing is learned; tags (B, 4, W) float32: which of TAGS the
    descriptions of the scene, the left, the way ahead and the right name."""
    pictures: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    tokens: torch.Tensor
    segment: torch.Tensor
    targets: torch.Tensor
    tags: torch.Tensor

    @property
    def images(self):
        """The pictures as the model wants them, (B, 3, h, w) float32, made where they lie: to a GPU go bytes."""
        return normalise(self.pictures, self.scale, self.shift)

    def inputs(self, device):
        """What the model is given there: images, tokens and segment."""
        return [tensor.to(device) for tensor in (self.images, self.tokens, self.segment)]

    def each(self, change):
        """A Batch of what change(tensor) makes of each tensor."""
        return Batch(*map(change, vars(self).values()))


def normalise(pictures, scale, shift):
    """(B, h, w, 3), uint8 or float32, to float32 (B, 3, h, w): each channel times its scale plus its shift.

    scale and shift: (B, 3), or (1, 3) for all pictures, see channels.
    """
    width = pictures.shape[2]
    # A line of pixels at a time: a CPU is slow at three numbers.
    scale, shift = (each.to(pictures.device).repeat(1, width)[:, None] for each in (scale, shift))   # (B, 1, 3*w)
    lines = torch.addcmul(shift, pictures.flatten(2).float(), scale)
    return lines.unflatten(2, (width, 3)).permute(0, 3, 1, 2)


def channels(mean, std, gains=((1, 1),)):
    """scale and shift (B, 3) for `normalise`, by the channel mean and std of the training pictures.

    gains (B, 2): contrast and brightness of each picture, about 1.
    """
    contrast, light = np.float32(gains).T[:, :, None]
    mean, std = np.float32(mean), np.float32(std)
    return torch.from_numpy(contrast / (255 * std)), torch.from_numpy(2 * (light - 1) - contrast * mean / std)


class Data:
    """A set of commands (train, val, test, ood, test_words, test_combos) with its pictures, as memory maps.

    cfg: settings; meta: from prepare.load_meta. `index` (n, 4) int32: picture, prompt length, text length, answer (1
    YES, 0 NO, -1 for a description). The commands of a picture are neighbours, and start with its four descriptions.
    """

    def __init__(self, cfg, meta, name):
        root = Path(cfg.data_dir)
        self.cfg = cfg
        self.name = name
        self.images = prepare.stored_images(cfg, meta)                            # (N, h, w, 3) uint8
        self.tokens = np.load(root / f"tokens_{name}.npy", mmap_mode="r")         # (n, longest) uint16
        self.index = np.load(root / f"index_{name}.npy")
        # Of all sets, since the last is asked when the training is over.
        longest = max(np.load(path, mmap_mode="r").shape[1] for path in root.glob("tokens_*.npy"))
        if longest > min(cfg.max_text, cfg.row_tokens):
            raise UserError(f"max_text={cfg.max_text} or row_tokens={cfg.row_tokens} is too short: the longest command "
                            f"in {root} with its answer has {longest} tokens")
        self.tokenizer = Tokenizer(json.loads((root / "vocab.json").read_text(encoding="utf-8")))
        self.mean = meta["mean"]
        self.std = meta["std"]
        self.pictures, starts = np.unique(self.index[:, 0], return_index=True)
        self.bounds = np.append(starts, len(self.index))                          # of the commands of each picture
        ids = self.tokenizer.ids
        self.mirror = np.arange(len(self.tokenizer))                              # what a flip makes of each word
        self.mirror[[ids["left"], ids["right"]]] = ids["right"], ids["left"]
        self.tags = np.array([ids[word] for word in TAGS])
        if cfg.crop:                                                              # a crop asks the rules again
            self.frames = prepare.Frames(root / "frames.jsonl")
            self.items = prepare.read_items(root, name)

    def text(self, row):
        """Token ids of command `row` with its answer, and the length of its prompt."""
        _, prompt, length, _ = self.index[row]
        return self.tokens[row, :length], prompt

    def tags_of(self, descriptions):
        """(4, W): which of TAGS each of a picture's first four descriptions names; the first, all that any names."""
        tags = np.zeros((4, len(TAGS)), np.float32)
        for row, item in zip(tags, descriptions):
            ids, prompt = self.text(item)
            row[:] = (ids[prompt:, None] == self.tags).any(0)
        # The description of the whole scene stops after max_describe objects; those of its parts name the others.
        tags[0] = tags.max(0)
        return tags

    def targets_of(self, ids, prompt):
        """What each token of a text learns to say next: IGNORE in the prompt, but the last, `?`, learns the answer."""
        return [IGNORE] * (prompt - 1) + ids[prompt:] + [IGNORE]

    def fitting(self, items):
        """Those of the items, in their order, that fit into one row together: rows of one length waste no work."""
        room = self.cfg.row_tokens
        chosen = []
        for item in items:
            length = self.index[item, 2]
            if length <= room:
                chosen.append(item)
                room -= length
        return np.array(chosen)

    def example(self, position, k):
        """Training picture number k, shown as the one at `position` of all that training shows.

        Returns the picture, its texts as [(ids, prompt length)], its tags (4, W), and contrast and brightness, about 1.
        """
        cfg = self.cfg
        rng = np.random.default_rng([cfg.seed, 1, position])
        picture = self.images[self.pictures[k]]
        items = np.arange(*self.bounds[k:k + 2])
        descriptions = items[self.index[items, 3] < 0]
        described = rng.permutation(descriptions)[:cfg.descriptions_per_image]
        questions = rng.permutation(items[self.index[items, 3] >= 0])
        chosen = self.fitting(np.concatenate((described, questions)))
        tags = self.tags_of(descriptions)
        if cfg.crop:
            picture = self._crop(picture, np.concatenate((chosen, descriptions[:4])), rng)
        texts = [self.text(item) for item in chosen]
        if rng.random() < cfg.flip:
            picture = picture[:, ::-1]
            texts = [(self.mirror[ids], prompt) for ids, prompt in texts]
            tags = tags[[0, 3, 2, 1]]
        gains = 1 + cfg.jitter * rng.uniform(-1, 1, 2)
        return picture, [(ids.tolist(), prompt) for ids, prompt in texts], tags, gains

    def batch(self, position, size):
        """The training Batch of `size` pictures from the picture at `position` of all that training shows."""
        n = len(self.pictures)
        places = range(position, position + size)
        # Each pass over the pictures has an order of its own.
        orders = {number: np.random.default_rng([self.cfg.seed, number]).permutation(n)
                  for number in {place // n for place in places}}
        examples = [self.example(place, orders[place // n][place % n]) for place in places]
        pictures, texts, tags, gains = zip(*examples)
        # numpy only, since this runs in the prefetching thread: a torch operation there would start a second pool of
        # OpenMP threads, and the two pools together halve the speed of a CPU.
        tokens, segment = as_rows([[ids for ids, _ in own] for own in texts], self.cfg.row_tokens)
        targets = np.full(tokens.shape, IGNORE)
        for row, own in zip(targets, texts):
            learned = [target for ids, prompt in own for target in self.targets_of(ids, prompt)]
            row[:len(learned)] = learned
        return Batch(torch.from_numpy(np.stack(pictures)), *channels(self.mean, self.std, gains), tokens, segment,
                     torch.from_numpy(targets), torch.from_numpy(np.stack(tags)))

    def micro_batches(self, update, rank=0, ranks=1):
        """The micro-batches of an update; of each, the pictures that process number `rank` of `ranks` takes."""
        size = self.cfg.batch_size
        low = size * rank // ranks
        high = size * (rank + 1) // ranks
        first = update * self.cfg.grad_accum * size + low
        return [self.batch(first + m * size, high - low) for m in range(self.cfg.grad_accum)]

    def _crop(self, picture, chosen, rng):
        """A random crop of `picture`, resized back, if the chosen commands keep their answers and texts."""
        height, width = picture.shape[:2]
        share = 1 - rng.uniform(0, self.cfg.crop)
        x = rng.uniform(0, width * (1 - share))
        y = rng.uniform(0, height * (1 - share))
        frame = self.frames[self.items[chosen[0]]["picture"]]
        labels = []
        for label in frame["labels"]:
            moved = [(edge - start) / share for edge, start in zip(commands.corners(label), (x, y, x, y))]
            x1, y1, x2, y2 = edges = prepare.clipped(moved, float(width), float(height))
            if x2 - x1 > 1 and y2 - y1 > 1:
                labels.append(dict(label, box2d=dict(zip(commands.EDGES, edges))))
        view = commands.View(dict(frame, labels=labels), self.cfg)
        if not all(self._holds(self.items[i], view) for i in chosen):
            return picture
        kept = x, y, x + width * share, y + height * share
        return np.asarray(Image.fromarray(picture).resize((width, height), Image.BILINEAR, box=kept))

    def _holds(self, item, view):
        """Whether the answer and the text of a stored command are true of a view."""
        if commands.check_reason(item["reason"], view) != commands.TRUE:
            return False
        if item["answer"] is not None:
            truth = commands.TRUE if item["answer"] else commands.FALSE
            return commands.question_of(item).truth(view) == truth
        if item["template"] == "where":
            return True
        return commands.describe(view, self.cfg.max_describe, item["place"] or None) == item["reason"]


def prefetched(make, first, last, depth, threads=1):
    """make(i) for i in [first, last), in this order, computed by threads up to `depth` ahead."""
    with ThreadPoolExecutor(threads) as pool:
        jobs = (pool.submit(make, i) for i in range(first, last))
        ahead = deque(islice(jobs, depth))
        while ahead:
            item = ahead.popleft().result()
            ahead.extend(islice(jobs, 1))
            yield item


# ---- several processes ----
# Each holds the whole model and takes its share of the pictures of every micro-batch. Gradients are summed by hand: a
# loss is a sum over all tokens divided by one total, so the sum of gradients is exact where the mean that
# DistributedDataParallel takes is not, and a stage that leaves parameters out needs nothing special.

def processes():
    """(number of this process, how many there are, its number on this machine), as torchrun tells each that it starts.

    Clusters set a part of this for programs of their own: that does not count.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return 0, 1, 0


def join_processes(device):
    """Meet the processes that torchrun started, if it did; returns the device of this one."""
    _, ranks, local = processes()
    if ranks > 1:
        if device.type == "cuda":
            there = torch.cuda.device_count()
            if local >= there:
                raise UserError(f"each process needs a GPU of its own, and there are {there}: start torchrun with "
                                f"--nproc_per_node={there}")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def is_first():
    """Whether this is the process that writes files: the only one, or the first."""
    return processes()[0] == 0


def summed(tensor):
    """`tensor` summed over all processes, in place; it waits for all. Raises UserError when one of them is gone."""
    if processes()[1] > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise UserError("another process of this training has ended: to resume add --resume=True to the command, "
                            f"with any number of processes ({repr(error)[:120]})") from None
    return tensor


def sum_gradients(parameters):
    """Sum the gradients over all processes, as one vector."""
    if processes()[1] > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        vector = summed(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, vector.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


def average_statistics(model):
    """Give the norms of all processes the mean of their statistics, which each gathers alone."""
    for name, buffer in model.named_buffers():
        if "running_" in name:
            summed(buffer).div_(processes()[1])


# ---- losses ----

def verdicts(targets):
    """Which targets are the YES or NO of a question, a mask of the same shape."""
    return (targets == YES) | (targets == NO)


def token_weights(targets, cfg):
    """Weight of each target: answer_weight for [NO], that times yes_weight for [YES], 0 for IGNORE, else 1."""
    weights = (targets != IGNORE).float()
    weights = torch.where(targets == NO, cfg.answer_weight, weights)
    return torch.where(targets == YES, cfg.answer_weight * cfg.yes_weight, weights)


def total_weight(micros, cfg):
    """Sum of the weights of all tokens that an update's micro-batches teach, by which it divides its loss."""
    return sum(token_weights(m.targets, cfg).sum().item() for m in micros)


def token_loss(logits, targets, cfg):
    """Weighted SUM of the cross-entropies of the learned tokens; the caller divides by the sum of weights.

    logits (M, V) float32, targets (M,), IGNORE where nothing is learned. With focal_gamma the answers weigh
    (1 - p)^gamma (Lin et al. 2017, eq. 4).
    """
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=cfg.label_smoothing)
    if cfg.focal_gamma:
        p = torch.softmax(logits, -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        answers = verdicts(targets)
        loss = torch.where(answers, (1 - p) ** cfg.focal_gamma * loss, loss)
    return (loss * token_weights(targets, cfg)).sum()


def attention_entropy(weights, real):
    """Mean entropy of the attention of real tokens, in nats: H(A) = -sum A log A over the keys.

    weights (layers, B, H, L, S), real (B, L) bool.
    """
    weights = weights.float()
    # Below the smallest number a weight adds nothing; without the bound the slope of x log x there is infinite, and NaN
    # once it meets the softmax's slope of 0.
    smallest = torch.finfo(torch.float32).tiny
    rows = -(weights * weights.clamp(min=smallest).log()).sum(-1)                 # (layers, B, H, L)
    return (rows.mean((0, 2)) * real).sum() / real.sum()


def batch_loss(model, tagger, batch, cfg, total, reads=True):
    """Loss of a micro-batch as its share of an update: token losses / total of the whole update, plus extras.

    Extras are means over the micro-batch's pictures, weighed by its share of the update's. reads: False in the first
    stage, when encoder and projection learn, from the tagger.
    """
    vision = model.encode(batch.images)
    share = len(batch.tokens) / (cfg.batch_size * cfg.grad_accum)
    loss = 0.0
    if tagger is not None:
        tag_loss = F.binary_cross_entropy_with_logits(tagger(vision).float(), batch.tags)
        loss = share * cfg.tag_weight * tag_loss
    if not reads:
        return loss

    def loss_fn(logits, targets):
        return token_loss(logits, targets, cfg) / total
    attn = {"self": [], "cross": []} if cfg.entropy_weight else None
    loss = loss + model.decode(vision, batch.tokens, batch.segment, batch.targets, loss_fn, attn)
    if cfg.entropy_weight:
        entropy = attention_entropy(torch.stack(attn["cross"]), batch.segment > 0)
        loss = loss + share * cfg.entropy_weight * entropy
    if cfg.contrast_weight:
        loss = loss + share * cfg.contrast_weight * model.contrastive_loss(vision, batch.tokens, batch.segment)
    return loss


# ---- optimizer and schedule ----

def updates(cfg, pictures):
    """How many updates show so many pictures."""
    return math.ceil(pictures / (cfg.batch_size * cfg.grad_accum))


def see_updates(cfg):
    """Updates of the first stage, in which encoder and projection learn."""
    return updates(cfg, cfg.see_pictures) if cfg.tag_weight else 0


def all_updates(cfg):
    """Updates of both stages."""
    return see_updates(cfg) + updates(cfg, cfg.read_pictures)


def lr_scale(step, cfg):
    """Share of the peak learning rate at update `step`: in each stage a linear warm-up, then cfg.schedule."""
    length = see_updates(cfg)
    if step >= length:                                      # the second stage
        step -= length
        length = updates(cfg, cfg.read_pictures)
    warmup = updates(cfg, cfg.warmup_pictures)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, length - warmup))
    if cfg.schedule == "constant":
        return 1.0
    if cfg.schedule == "step":
        factor = 1.0 if done < 0.6 else 0.1
        return max(cfg.min_lr, factor if done < 0.85 else 0.01)
    if cfg.schedule == "restarts" and done < 1:
        done = (done * 3) % 1.0
    return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model, tagger, cfg, device):
    """AdamW with a learning rate for each part and weight decay on matrices only."""
    rates = {"vision": cfg.lr_vision, "tagger": cfg.lr_vision, "projection": cfg.lr_projection, "decoder": cfg.lr,
             "contrast": cfg.lr}
    named = list(model.named_parameters())
    if tagger is not None:
        named += tagger.named_parameters("tagger")
    groups = {}
    for name, p in named:
        part = name.split(".")[0]
        decays = p.ndim >= 2 and "embedding" not in name and "positions" not in name
        groups.setdefault((part, decays), []).append(p)
    return torch.optim.AdamW([dict(params=params, lr=rates[part], peak=rates[part],
                                   weight_decay=cfg.weight_decay if decays else 0.0)
                              for (part, decays), params in groups.items()],
                             betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=device.type in ("cpu", "cuda"))


# ---- answers to a set of questions ----

def predict(model, data, cfg, dtype, limit=0):
    """Log-odds of YES against NO for the questions of a set: (item rows (n,), log-odds (n,)).

    limit: about so many questions, of whole pictures, spread over the set; 0 = all. Several processes take turns at the
    batches, and each returns the whole.
    """
    model.eval()
    rank, ranks, _ = processes()
    average_statistics(model)
    rows = np.flatnonzero(data.index[:, 3] >= 0)
    groups = [list(group) for _, group in groupby(rows, lambda row: data.index[row, 0])]      # one a picture
    if limit and limit < len(rows):
        count = max(1, round(len(groups) * limit / len(rows)))
        groups = [groups[i] for i in np.linspace(0, len(groups) - 1, count).astype(int)]
        rows = np.concatenate(groups)
    odds = np.zeros(len(data.index), np.float32)            # 0 for what another process answers
    for start in range(rank * cfg.eval_batch, len(groups), ranks * cfg.eval_batch):
        part = groups[start:start + cfg.eval_batch]
        pictures = data.images[[data.index[group[0], 0] for group in part]]
        images = normalise(torch.from_numpy(pictures).to(model.device), *channels(data.mean, data.std))
        prompts = [[data.tokens[row, :data.index[row, 1]].tolist() for row in group] for group in part]
        odds[np.concatenate(part)] = model.ask(images, prompts, dtype)
    return rows, summed(torch.from_numpy(odds)).numpy()[rows]


def balanced_accuracy(truth, odds):
    """Mean of the accuracies on YES and on NO items, in [0, 1]; NaN without items of both."""
    truth = np.asarray(truth, bool)
    says_yes = np.asarray(odds) > 0
    if truth.all() or not truth.any():
        return math.nan
    return float(says_yes[truth].mean() + (~says_yes[~truth]).mean()) / 2


# ---- checkpoints ----

def save_checkpoint(content, *paths):
    """Write content by a temporary file and os.replace, so that no path is ever half a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)                             # to a path, torch.save would hide errors of the disk
    for path in paths:
        temporary = Path(f"{path}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise UserError(f"cannot write {path}, what was there is unchanged: {error}") from None


def load_checkpoint(path):
    """A checkpoint's dict. Raises UserError when there is none, it is damaged, or of another format."""
    try:
        # A checkpoint is a zip archive with a checksum for every entry, which torch.load does not look at.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ValueError(f"its entry {broken} does not match its checksum")
        # To the CPU: a GPU has no room to spare for weights that are there already.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: run python train.py, or name a file that it wrote") from None
    except Exception as error:                              # unpickling fails in many ways
        why = repr(error)[:120]
        raise UserError(f"{path} is not a checkpoint of train.py, or it is damaged: {why}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, and this train.py reads format {FORMAT}: train again")
    return state


def load_weights(module, weights, path):
    """Fill a module strictly. Raises UserError that names the tensors which differ from those of the checkpoint."""
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    here = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    differs = [f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
               for name in {**there, **here} if there.get(name) != here.get(name)]
    if differs:
        raise UserError(f"{path} is of another architecture, {len(differs)} tensors differ: {'; '.join(differs[:3])}")
    module.load_state_dict(weights)


def load_model(cfg, make_model=VLM):
    """The checkpoint cfg.checkpoint, or out_dir/best.pt, ready to be asked, with LoRA's changes in its weights.

    Returns (model in eval mode, its settings with cfg's where they do not shape what is trained, tokenizer, the
    checkpoint's dict, device). make_model: as for `train`.
    """
    device = pick_device(cfg)
    path = cfg.checkpoint or str(Path(cfg.out_dir) / "best.pt")
    state = load_checkpoint(path)
    # What is shown and sampled is drawn by cfg's seed.
    shaping = {name: value for name, value in state["config"].items() if name not in RESUMABLE | {"seed"}}
    cfg = config.with_changes(cfg, **shaping)
    tokenizer = Tokenizer(state["words"])
    model = make_model(cfg, len(tokenizer))
    if cfg.lora_rank:
        model.add_lora(cfg.lora_rank)
    load_weights(model, state["model"], path)
    if cfg.lora_rank:
        model.merge_lora()
    return model.to(device).eval(), cfg, tokenizer, state, device


def export(cfg):
    """Write what answering needs of cfg.checkpoint or out_dir/best.pt to cfg.export."""
    if Path(cfg.export).exists():
        raise UserError(f"{cfg.export} exists: export to another file, or delete it")
    model, _, _, state, _ = load_model(cfg)
    kept = {key: value for key, value in state.items() if key not in PROGRESS}
    save_checkpoint(dict(kept, model=model.state_dict(), config=dict(state["config"], lora_rank=0)), cfg.export)
    print(f"exported the checkpoint of step {state['step']} to {cfg.export}")


# ---- starting from the weights of another run ----

def resize_positions(positions, old, new):
    """Learned positions (P, D) of a grid `old` (rows, columns), interpolated bilinearly to the grid `new`."""
    planes = positions.T.unflatten(1, old)[None]                                  # (1, D, rows, columns)
    return F.interpolate(planes, new, mode="bilinear")[0].flatten(1).T.contiguous()


def start_from(cfg, model, tagger, data):
    """Fill the model from the checkpoint cfg.init_from; returns what was taken, in words. UserError if nothing fits."""
    path = cfg.init_from
    other, its, tokenizer, state, _ = load_model(config.with_changes(cfg, checkpoint=path, device="cpu"))
    if tokenizer.words != data.tokenizer.words:
        raise UserError(f"{path} was trained with another vocabulary ({len(tokenizer)} words): its commands.py differs")
    weights = other.state_dict()
    old, new = other.vision.grid, model.vision.grid
    if "vision.positions" in weights and old != new:
        weights["vision.positions"] = resize_positions(weights["vision.positions"], old, new)
    try:
        load_weights(model, weights, path)
    except UserError as error:
        differs = [f"--{name}={getattr(its, name)}" for name, (section, _, _) in config.SETTINGS.items()
                   if section == "model" and getattr(its, name) != getattr(cfg, name)]
        hint = f"; it was trained with {' '.join(differs)}" if differs else ""
        raise UserError(f"{error}{hint}") from None
    if tagger is not None and state.get("tagger"):
        load_weights(tagger, state["tagger"], path)
    return f"starting from {path}, trained for {state['step']} updates on {its.source} scenes"


# ---- a run: everything that learning changes ----

class Clock:
    """Seconds by part of the work: start(), then stop(part) after each part.

    A GPU works behind the program: with `exact` each stop waits for it, which costs time and tells what part took it.
    """

    def __init__(self, device, exact=False):
        self.device = device
        self.exact = exact
        self.start()

    def start(self):
        """Forget what was counted and begin now."""
        self.seconds = Counter()
        self.last = time.perf_counter()

    def stop(self, part):
        """Count the time since the last start or stop for `part`."""
        if self.exact and self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


class Run:
    """The model with its tagger, optimizer and scaler, how many updates it has had, and its best validation.

    make_model: VLM, or what makes a variant (ablate.py).
    """

    def __init__(self, cfg, data, device, make_model=VLM):
        self.cfg = cfg
        self.out = Path(cfg.out_dir)
        self.data = data
        self.device = device
        self.dtype, self.why = pick_dtype(cfg, device)
        self.model = make_model(cfg, len(data.tokenizer))
        self.tagger = WordTagger(cfg.text_dim, len(TAGS)).to(device) if cfg.tag_weight else None
        if cfg.init_from and not cfg.resume:
            print(start_from(cfg, self.model, self.tagger, data))
        if cfg.lora_rank:
            self.model.add_lora(cfg.lora_rank)
        self.model.to(device)
        if cfg.compile:
            self.model.vision.compile()
            self.model.decoder.compile()
        self.optimizer = make_optimizer(self.model, self.tagger, cfg, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.step = 0
        self.best = -1.0                                    # validation accuracy of best.pt
        self.since_best = 0                                 # validations since then
        self.top = []                                       # [[accuracy, step]] of the checkpoints that save_top keeps
        self.unlogged = [0.0, 0, 0]                         # sum of losses, updates and commands not logged yet

    def batches(self, first, last):
        """The micro-batches of each update in [first, last), as far as this process takes them, made ahead."""
        # A GPU waits for nothing but batches, and copies pinned ones while it computes. A CPU has no thread to spare.
        cuda = self.device.type == "cuda"

        def make(i):
            micros = self.data.micro_batches(i, *processes()[:2])
            return [micro.each(torch.Tensor.pin_memory) for micro in micros] if cuda else micros
        return prefetched(make, first, last, self.cfg.prefetch, 4 if cuda else 1)

    def update(self, micros, reads, clock):
        """One update by micro-batches, of which each process has its share. reads: see batch_loss.

        Returns (loss, gradient norm, done). It is not done, and nothing changes, where loss or norm are not finite.
        """
        self.model.train()
        total = summed(torch.tensor(total_weight(micros, self.cfg))).item()
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        loss = torch.zeros((), device=self.device)
        pairs = sum(int(micro.segment.amax(1).sum()) for micro in micros)         # of a picture and a command
        for micro in micros:
            micro = micro.each(lambda tensor: tensor.to(self.device, non_blocking=True))
            with autocast(self.dtype, self.device):
                share = batch_loss(self.model, self.tagger, micro, self.cfg, total, reads)
            clock.stop("forward")
            self.scaler.scale(share).backward()
            loss += share.detach()
            clock.stop("backward")
        sum_gradients(learning)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(learning, self.cfg.grad_clip or math.inf)
        # The one time in an update that a GPU is waited for.
        loss, norm = torch.stack((summed(loss), norm)).tolist()
        # float16 meets infinite gradients by design: its scaler skips the update and halves the scale. Where even a
        # scale of 1 is too much, something else is wrong.
        skipped = not math.isfinite(norm) and self.scaler.get_scale() > 1
        done = math.isfinite(loss) and (math.isfinite(norm) or skipped)
        if done:
            if skipped:
                print(f"step {self.step}: the gradient overflows float16, nothing is learned from this update")
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.unlogged = [old + new for old, new in zip(self.unlogged, (loss, 1, pairs))]
        clock.stop("optimizer")
        return loss, norm, done

    def save(self, *names):
        """Write a checkpoint to these files of out_dir: the first process does, and the others wait for it."""
        if is_first():
            save_checkpoint(dict(
                format=FORMAT, config=vars(self.cfg), words=self.data.tokenizer.words, mean=self.data.mean,
                std=self.data.std, data_hash=config.data_hash(self.cfg), model=self.model.state_dict(),
                tagger=self.tagger and self.tagger.state_dict(), optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(), step=self.step,
                **{name: getattr(self, name) for name in MEMORY}), *(self.out / name for name in names))
        summed(torch.zeros(1))

    def resume(self, path):
        """Continue from a checkpoint. Raises UserError if a setting that shapes what is trained differs."""
        state = load_checkpoint(path)
        if "optimizer" not in state:
            raise UserError(f"{path} holds weights alone, as --export writes them: there is no training to resume")
        changed = {name: f"{name} was {value!r}, now {getattr(self.cfg, name)!r}"
                   for name, value in state["config"].items()
                   if getattr(self.cfg, name, value) != value and name != "resume"}
        refused = [text for name, text in changed.items() if name not in RESUMABLE]
        if refused or state["words"] != self.data.tokenizer.words:
            raise UserError("resuming with other settings would train something else: "
                            + (", ".join(refused) or "the vocabulary is another"))
        load_weights(self.model, state["model"], path)
        if self.tagger is not None:
            load_weights(self.tagger, state["tagger"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:                                 # empty but for float16
            self.scaler.load_state_dict(state["scaler"])
        for name in ("step", *MEMORY):
            setattr(self, name, state[name])
        print("; ".join([f"resumed {path} at step {self.step}", *changed.values()]))

    def keep(self, accuracy):
        """Save last.pt, as best.pt too if this validation is the best so far, and with save_top > 1 as best-STEP.pt."""
        score = 0.0 if math.isnan(accuracy) else accuracy
        names = ["last.pt"]
        self.since_best += 1
        if score > self.best:
            self.best = score
            self.since_best = 0
            names.insert(0, "best.pt")
        worst = []
        if self.cfg.save_top > 1:
            names.append(f"best-{self.step}.pt")
            top = sorted(self.top + [[score, self.step]], reverse=True)
            self.top, worst = top[:self.cfg.save_top], top[self.cfg.save_top:]
        self.save(*names)
        for _, step in worst:
            (self.out / f"best-{step}.pt").unlink(missing_ok=True)


# ---- log.csv, and TensorBoard ----

def cut_log(path, step):
    """Drop what a killed run logged after `step`: the resumed run will log it again."""
    with open(path, "rb+") as file:
        kept = takewhile(lambda line: line.endswith(b"\n") and (
            line.startswith(b"step") or int(line.split(b",")[0]) <= step), file)
        file.truncate(sum(map(len, kept)))


def peak_memory(device):
    """The most memory that this process has held, MB: of the GPU if it uses one. NaN where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:                                     # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


class Log:
    """log.csv in out_dir and, with cfg.tensorboard, the same numbers and the model's graph for TensorBoard.

    Only the first process writes.
    """
    COLUMNS = ("step", "pictures", "loss", "lr", "grad_norm", "ms", "pictures_per_s", "pairs_per_s", "wait_share",
               "memory_mb", "val_accuracy", "val_loss", "attention_entropy", "seconds")

    def __init__(self, run):
        cfg = run.cfg
        step = run.step
        first = is_first()
        path = run.out / "log.csv" if first else Path(os.devnull)
        self.pictures = cfg.batch_size * cfg.grad_accum     # of an update
        self.start = time.time()
        self.since = step                                   # the last step that `log_updates` wrote, or the first
        if step and path.is_file():
            cut_log(path, step)
        self.file = open(path, "a" if step else "w", newline="", encoding="utf-8")
        self.rows = csv.DictWriter(self.file, self.COLUMNS)
        if self.file.tell() == 0:
            self.rows.writeheader()
        self.board = None
        if cfg.tensorboard and first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard=True needs the tensorboard package: pip install tensorboard") from None
            self.board = SummaryWriter(cfg.out_dir)
            with warnings.catch_warnings():
                # The graph shows what is computed for these inputs; an `if` may go the other way for others.
                warnings.simplefilter("ignore")
                self.board.add_graph(run.model, run.data.batch(0, 1).inputs(run.device))

    def row(self, step, **numbers):
        """One line of log.csv: what was measured at `step`; the other columns stay empty."""
        texts = {name: f"{value:.8g}" for name, value in numbers.items()}
        self.rows.writerow(dict(step=step, pictures=step * self.pictures, **texts,
                                seconds=f"{time.time() - self.start:.1f}"))
        self.file.flush()
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def looks(self, run, truth, said, batch, cross):
        """Tell TensorBoard what was confused, and where the first questions of a batch looked.

        truth, said: bool (n,), whether YES is true and was answered; cross (layers, B, H, L, P).
        """
        if self.board:
            lines = [f"| {name} | {said[own].sum()} | {(~said[own]).sum()} |"
                     for name, own in (("YES", truth), ("NO", ~truth))]
            self.board.add_text("confusion", "\n".join(["| truth | YES | NO |", "|---|---|---|", *lines]), run.step)
            picture, asked = attention_pictures(batch, cross, run.data.tokenizer, run.model.vision.grid)
            if asked:
                self.board.add_image("where it looked", picture, run.step)
                self.board.add_text("where it looked", "; ".join(asked), run.step)

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()


def attention_pictures(batch, cross, tokenizer, grid):
    """Pictures side by side (3, h, n*w), each lit where its first question looked for the answer; and these questions.

    Pictures without a question are left out. cross (layers, B, H, L, P), of which the mean is taken; a picture's most
    attended patch is as bright as it was. grid: (rows, columns) of patches.
    """
    answers = verdicts(batch.targets)
    rows = answers.any(-1).nonzero()[:, 0]                                       # (n,)
    at = answers[rows].int().argmax(-1)                                          # the `?` of that question, (n,)
    maps = cross.mean((0, 2))[rows, at]                                           # (n, P)
    light = (maps / maps.amax(-1, keepdim=True)).view(-1, 1, *grid)
    light = F.interpolate(light, size=batch.pictures.shape[1:3])
    pictures = batch.pictures[rows].permute(0, 3, 1, 2) / 255 * (0.2 + 0.8 * light)
    asked = []
    for row, i in zip(rows.tolist(), at.tolist()):
        own = batch.segment[row, :i + 2] == batch.segment[row, i]
        asked.append(tokenizer.decode(batch.tokens[row, :i + 2][own].tolist()))
    return pictures.permute(1, 2, 0, 3).flatten(2), asked


# ---- the loop ----

@contextlib.contextmanager
def ctrl_c():
    """An Event that Ctrl-C sets, instead of raising wherever the program happens to be."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def stop_at_bad_batch(run, loss, norm):
    """Keep the batch of an update that was not done, and end with the reason."""
    path = run.out / "bad_batch.pt"
    if is_first():
        save_checkpoint(dict(
            step=run.step, loss=loss, norm=norm, position=run.step * run.cfg.grad_accum * run.cfg.batch_size,
            micro_batches=[vars(micro) for micro in run.data.micro_batches(run.step)]), path)
    raise UserError(f"the loss is {loss}, the gradient norm {norm} at step {run.step}: nothing was updated. Lower the "
                    f"learning rates or, with another dtype, try --dtype=float32; {path} holds the batch")


def introduce(run):
    """Print what will be trained, how, and on what; and one text token by token, with what each learns to say next."""
    cfg = run.cfg
    ranks = processes()[1]
    size, learns = parameter_count(run.model)
    passes = all_updates(cfg) * cfg.batch_size * cfg.grad_accum / len(run.data.pictures)
    print(f"device {run.device}, dtype {str(run.dtype)[6:]} ({run.why}), {torch.get_num_threads()} threads, "
          + (f"{ranks} processes, " if ranks > 1 else "") + f"torch {torch.__version__}")
    print(f"{learns / 1e6:.2f}M of {size / 1e6:.2f}M parameters learn, from {len(run.data.pictures)} pictures and "
          f"{len(run.data.index)} commands: {see_updates(cfg)} updates to see, "
          f"{all_updates(cfg) - see_updates(cfg)} to read, {passes:.1f} passes over the pictures")
    batch = run.data.batch(0, 1)
    words = run.data.tokenizer.words
    first = batch.segment[0] == 1
    print("one example, token -> target:")
    print("  " + "  ".join(words[token] + (f" -> {words[target]}" if target >= 0 else "")
                           for token, target in zip(batch.tokens[0, first], batch.targets[0, first])))


def log_updates(run, log, clock, scale, reads, norm):
    """Print and log the updates since the last log line."""
    cfg = run.cfg
    total, count, pairs = run.unlogged
    spent = sum(clock.seconds.values())
    # A run that was resumed has losses from before it was stopped, but no times.
    ms = 1000 * spent / (run.step - log.since)
    pictures = 1000 * log.pictures / ms
    numbers = dict(loss=total / count, lr=scale * (cfg.lr if reads else cfg.lr_vision), grad_norm=norm, ms=ms,
                   pictures_per_s=pictures, wait_share=clock.seconds["data"] / spent, memory_mb=peak_memory(run.device))
    speed = f"{pictures:.0f} pictures/s"
    to_see = max(see_updates(cfg) - run.step, 0)
    to_read = all_updates(cfg) - run.step - to_see
    if reads:
        numbers["pairs_per_s"] = 1000 * pairs / count / ms
        speed = f"{numbers['pairs_per_s']:.0f} pairs/s"
    # An update that reads takes about three times as long as one that only sees.
    left = ms * (to_read if reads else to_see + 3 * to_read)
    print(f"{'read' if reads else 'see'} {run.step}/{all_updates(cfg)}  loss {numbers['loss']:.4f}  "
          f"lr {numbers['lr']:.1e}  norm {norm:.2f}  {ms:.0f} ms  {speed}  wait {100 * numbers['wait_share']:.0f}%  "
          f"about {left / 1000:.0f} s left", flush=True)
    log.row(run.step, **numbers)
    run.unlogged = [0.0, 0, 0]
    log.since = run.step
    clock.start()


def validate(run, val, log):
    """Balanced accuracy on validation questions; printed and logged, with answer loss and entropy of attention."""
    cfg = run.cfg
    rows, odds = predict(run.model, val, cfg, run.dtype, limit=cfg.eval_items)
    truth = val.index[rows, 3] == 1
    accuracy = balanced_accuracy(truth, odds)
    # Few pictures may leave no questions for validation.
    loss = float(np.logaddexp(0, np.where(truth, -odds, odds)).mean()) if len(rows) else math.nan
    batch = run.data.batch(0, min(8, cfg.batch_size))
    with torch.no_grad():
        _, attn = run.model(*batch.inputs(run.device), return_attn=True)
    cross = attn["cross"].cpu()
    entropy = attention_entropy(cross, batch.segment > 0).item()
    print(f"--- step {run.step}: val balanced accuracy {100 * accuracy:.2f}%, answer loss {loss:.4f} "
          f"(guessing: 0.693), cross-attention entropy {entropy:.2f} of {math.log(cross.shape[-1]):.2f}, "
          f"{time.time() - log.start:.0f} s", flush=True)
    log.row(run.step, val_accuracy=accuracy, val_loss=loss, attention_entropy=entropy)
    log.looks(run, truth, odds > 0, batch, cross)
    return accuracy


def test(run, meta, start):
    """Scores of best.pt on the test split, printed as `key: value` lines and written to train.json."""
    cfg = run.cfg
    best = run.out / "best.pt"
    load_weights(run.model, load_checkpoint(best)["model"], best)
    data = Data(cfg, meta, "test")
    items = prepare.read_items(cfg.data_dir, "test")
    rows, odds = predict(run.model, data, cfg, run.dtype)
    truth = data.index[rows, 3] == 1
    family = np.array([items[row]["family"] for row in rows])
    result = dict(
        test_accuracy=balanced_accuracy(truth, odds),
        **{f"test_{name}": balanced_accuracy(truth[family == name], odds[family == name])
           for name in np.unique(family)},
        val_accuracy=run.best,
        parameters=parameter_count(run.model)[0],
        steps=run.step,
        seed=cfg.seed,
        seconds=round(time.time() - start, 1))
    print("---", *(f"{k}: {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in result.items()), sep="\n")
    if is_first():
        (run.out / "train.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if processes()[1] > 1:
        summed(torch.zeros(1))                              # nobody leaves while another still needs its answer
        dist.destroy_process_group()
    return result


def train(cfg, make_model=VLM, make_data=Data):
    """Train as the settings say; returns the dict of final numbers that it prints.

    make_model, make_data: what makes the model and its training commands, for the variants of ablate.py.
    """
    if cfg.export:
        return export(cfg)
    if cfg.checkpoint and not cfg.resume:
        raise UserError("--checkpoint continues a run, with --resume=True; to start from its weights, give --init_from")
    out = Path(cfg.out_dir)
    begin_with = (cfg.checkpoint or out / "last.pt") if cfg.resume else cfg.init_from
    if begin_with:
        load_checkpoint(begin_with)                         # what cannot be read is found before data are prepared
    device = join_processes(pick_device(cfg))
    with config.locked(out) if is_first() else contextlib.nullcontext():
        if not (cfg.resume or cfg.overwrite) and any((out / name).exists() for name in ("best.pt", "last.pt")):
            raise UserError(f"{out} holds a run: --resume=True continues it, --out_dir=FOLDER trains elsewhere, "
                            "--overwrite=True replaces it")
        return learn(cfg, device, make_model, make_data)


def learn(cfg, device, make_model, make_data):
    """What train() does once the folder is its own."""
    start = time.time()
    rank, ranks, _ = processes()
    if cfg.batch_size < ranks:
        raise UserError(f"batch_size={cfg.batch_size} pictures cannot be shared by {ranks} processes")
    if is_first():
        prepare.ready(cfg)
    summed(torch.zeros(1))                                  # the others wait until the data are prepared
    meta = prepare.load_meta(cfg)
    torch.manual_seed(cfg.seed)
    data = make_data(cfg, meta, "train")
    val = Data(cfg, meta, "val")
    if not (data.index[:, 3] >= 0).any():
        raise UserError(f"no questions to train on in {cfg.data_dir}: prepare more pictures, or lower min_cell or "
                        "min_pixels")
    run = Run(cfg, data, device, make_model)
    if cfg.resume:
        run.resume(cfg.checkpoint or run.out / "last.pt")
    introduce(run)
    last, first_read = all_updates(cfg), see_updates(cfg)
    # With ctrl_c an update is never cut in two.
    with closing(Log(run)) as log, closing(run.batches(run.step, last)) as batches, ctrl_c() as stopped:
        clock = Clock(device)
        while run.step < last:
            # learning rates, and which parts learn
            reads = run.step >= first_read
            scale = lr_scale(run.step, cfg)
            for group in run.optimizer.param_groups:
                group["lr"] = scale * group["peak"]
            run.model.freeze("vision", cfg.freeze_pictures < 0 or run.step < updates(cfg, cfg.freeze_pictures))

            # Ctrl-C, in whichever process
            if summed(torch.tensor(float(stopped.is_set()))):
                run.save("last.pt")
                print(f"\nstopped at step {run.step}, saved {run.out / 'last.pt'}; to resume add --resume=True to "
                      "the command")
                raise KeyboardInterrupt

            # one update
            micros = next(batches)
            clock.stop("data")
            # Dropout is seeded by the place of the update, so that a checkpoint needs to hold no random state.
            torch.manual_seed(int(np.random.default_rng([cfg.seed, 2, run.step, rank]).integers(2 ** 63)))
            loss, norm, done = run.update(micros, reads, clock)
            if not done:
                stop_at_bad_batch(run, loss, norm)

            # log
            ended = run.step in (first_read, last)          # a stage has ended
            if run.step % updates(cfg, cfg.log_every) == 0 or ended:
                log_updates(run, log, clock, scale, reads, norm)

            # validate and save
            if run.step % updates(cfg, cfg.eval_every) == 0 or ended:
                if reads:
                    run.keep(validate(run, val, log))
                else:
                    run.save("last.pt")
                clock.last = time.perf_counter()            # neither is part of an update
                if cfg.early_stopping and run.since_best >= cfg.early_stopping:
                    print(f"stopping: no better validation in {run.since_best} looks")
                    break
    return test(run, meta, start)


if __name__ == "__main__":
    if not is_first():                                      # of several processes only the first speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    config.run(train, __doc__)
    if processes()[1] > 1:
        # On a busy machine a thread of the process group can outlive it, and abort a finished run as Python shuts down.
        sys.stdout.flush()
        os._exit(0)
