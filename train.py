"""Training: batches of pictures with several commands each, the losses, AdamW with a hand-written schedule, the loop.

- Prepares the data itself when they are missing; ends with the test accuracy and a block of `key: value` lines.
- Two stages in one loop: first the vision encoder learns to see from the words of descriptions, then all learn to read.
- A batch is a function of (seed, position): resuming needs no loader state, and 4 x 8 accumulated equals 32 at once.
- Augmentation keeps the truth: a flip swaps left and right in the text, a crop is made only if all answers hold.
- best.pt by validation balanced accuracy, last.pt to go on from, log.csv beside them; Ctrl-C saves.
- Several processes share each batch, and learn what one process learns.

    python train.py                                   default: minutes on 2 CPU cores
    python train.py --batch_size=4 --grad_accum=8
    python train.py --resume=True
    python train.py --preset=base --device=cuda
    python train.py --init_from=out/default/best.pt --lora_rank=8 --out_dir=out/tuned
    python train.py --export=model.pt                 best.pt without what only training needs
    python train.py --bench=True                      speed, cost and memory of training, to out_dir/bench.json
    python train.py --lr_range=True                   the loss at rising learning rates, to out_dir/lr_range.json
    torchrun --standalone --nproc_per_node=2 train.py

Shapes: B images, K commands for each, T text tokens, M learned tokens, V words.
"""
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import commands
import config
import prepare
from config import UserError
from model import VLM, forward_flops, pick_device
from tokenizer import IGNORE, NO, PAD, YES, Tokenizer, pad

FORMAT = 2                    # of checkpoints
# What a checkpoint holds: what answering needs, which is all that --export writes, and what going on needs besides.
WEIGHTS = {"format", "config", "words", "mean", "std", "data_hash", "step", "model"}
PROGRESS = {"tagger", "optimizer", "scaler", "best", "since_best", "top", "unlogged"}
# What may differ when a run goes on; any other setting would change what was being trained.
RESUMABLE = {k for k, (section, _, _) in config.SETTINGS.items()
             if section in ("evaluation", "answering", "ablations")} | {
    "resume", "device", "dtype", "workers", "prefetch", "log_every", "eval_every", "eval_items", "tensorboard",
    "save_top", "max_steps", "early_stopping", "out_dir", "data_dir", "attention", "bench", "lr_range", "export"}

# ---- data ----


@dataclasses.dataclass
class Batch:
    """images (B, 3, S, S) float32 normalised; tokens and targets (B, K, T) int64, targets -100 where not learned;
    tags (B, 4, W) float32: which of TAGS the descriptions of the scene, the left, the way ahead and the right name."""
    images: torch.Tensor
    tokens: torch.Tensor
    targets: torch.Tensor
    tags: torch.Tensor


def normalise(pictures, mean, std):
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S), by the channel mean and std of the training pictures."""
    # Transposed as bytes, picture by picture, and scaled in place: a sixth of the time that it takes with floats.
    planes = np.array([np.ascontiguousarray(picture.transpose(2, 0, 1)) for picture in pictures], np.float32)
    planes *= (1 / (255 * np.float32(std)))[:, None, None]
    planes -= (np.float32(mean) / np.float32(std))[:, None, None]
    return planes


# Words of a description that say what is seen, for the first stage of training (WordTagger).
TAGS = sorted({commands.NOUNS[c][0].split()[-1] for c in commands.CATEGORIES} | set(commands.COLOURS) | {"near", "far"})


class Data:
    """A set of commands (train, val, test, ood, test_words, test_combos) with its pictures, as memory maps.

    cfg: settings; meta: from prepare.load_meta. `index` (n, 4) int32: picture, prompt length, text length, answer.
    """

    def __init__(self, cfg, meta, name):
        root = Path(cfg.data_dir)
        self.cfg, self.name = cfg, name
        self.images = np.load(root / "images.npy", mmap_mode="r")                 # (N, S, S, 3) uint8
        self.tokens = np.load(root / f"tokens_{name}.npy", mmap_mode="r")         # (n, longest) uint16
        self.index = np.load(root / f"index_{name}.npy")
        self.tokenizer = Tokenizer(json.loads((root / "vocab.json").read_text(encoding="utf-8")))
        self.mean, self.std = meta["mean"], meta["std"]
        self.pictures, self.starts = np.unique(self.index[:, 0], return_index=True)
        self.ends = np.append(self.starts[1:], len(self.index))                   # items of a picture are neighbours
        ids = self.tokenizer.ids
        self.mirror = np.arange(len(self.tokenizer))
        self.mirror[[ids["left"], ids["right"]]] = ids["right"], ids["left"]
        self.tag = np.full(len(self.tokenizer), -1)
        self.tag[[ids[word] for word in TAGS]] = range(len(TAGS))
        if cfg.crop:                                                              # a crop asks the rules again
            with open(root / "frames.jsonl", encoding="utf-8") as file:
                self.frames = [json.loads(line) for line in file]
            self.items = prepare.read_items(root, name)

    def batch(self, position, size):
        """The training batch of `size` pictures from global picture counter `position` on."""
        cfg, n, rows, pictures, gains, tags = self.cfg, len(self.pictures), [], [], [], []
        orders = {e: np.random.default_rng([cfg.seed, e]).permutation(n)          # of each pass over the pictures
                  for e in range(position // n, (position + size - 1) // n + 1)}
        for p in range(position, position + size):
            rng, k = np.random.default_rng([cfg.seed, 1, p]), orders[p // n][p % n]
            picture = self.images[self.pictures[k]]
            items = np.arange(self.starts[k], self.ends[k])
            asked, descriptions = items[self.index[items, 3] >= 0], items[self.index[items, 3] < 0]
            described = rng.permutation(descriptions)[:cfg.descriptions_per_image]
            wanted = cfg.commands_per_image - len(described)
            asked = asked if len(asked) else descriptions
            asked = rng.choice(asked, wanted, replace=len(asked) < wanted)
            chosen = np.concatenate((described, asked))
            tag = np.zeros((4, len(TAGS)), np.float32)
            for row, item in zip(tag, descriptions):        # of the scene, left, ahead, right; then come those of WHERE
                named = self.tag[self.tokens[item, self.index[item, 1]:self.index[item, 2]]]
                row[named[named >= 0]] = 1
            tag[:1] = tag.max(0, initial=0)      # the scene's own description stops after max_describe objects
            chosen = chosen[np.argsort(-self.index[chosen, 2], kind="stable")]    # the longest names the most
            if cfg.crop:
                picture = self._crop(picture, np.concatenate((chosen, descriptions[:4])), rng)
            tokens = self.tokens[chosen]
            if rng.random() < cfg.flip:
                picture, tokens, tag = picture[:, ::-1], self.mirror[tokens], tag[[0, 3, 2, 1]]
            gains.append(1 + cfg.jitter * rng.uniform(-1, 1, 2))
            pictures.append(picture)
            rows.append((chosen, tokens))
            tags.append(tag)
        # numpy only, since this runs in the prefetching thread: a torch operation there would start a second pool of
        # OpenMP threads, and the two pools together halve the speed of a CPU.
        images = normalise(pictures, self.mean, self.std)
        contrast, light = np.float32(gains).T[:, :, None, None, None]
        if cfg.jitter:
            images *= contrast
            images += (light - 1) * 2
        chosen = np.stack([c for c, _ in rows])                                   # (B, K)
        longest = min(-self.index[chosen, 2].max() // 8 * -8, self.tokens.shape[1])   # few sizes, see Decoder.forward
        tokens = np.stack([t[:, :longest] for _, t in rows]).astype(np.int64)
        # The target of a token is the next one; prompts and padding teach nothing. The last prompt token, `?`, answers.
        targets = np.full_like(tokens, IGNORE)
        following = tokens[..., 1:]
        learned = (np.arange(1, longest) >= self.index[chosen, 1][..., None]) & (following != PAD)
        targets[..., :-1] = np.where(learned, following, IGNORE)
        return Batch(*map(torch.from_numpy, (images, tokens, targets, np.stack(tags))))

    def micro_batches(self, update, low, high):
        """The micro-batches of an update; of each, pictures `low` to `high`, which is the share of one process."""
        first, size = update * self.cfg.grad_accum * self.cfg.batch_size, self.cfg.batch_size
        return [self.batch(first + m * size + low, high - low) for m in range(self.cfg.grad_accum)]

    def _crop(self, picture, chosen, rng):
        """A random crop of `picture`, resized back, if the chosen commands keep their answers and texts."""
        cfg, size = self.cfg, picture.shape[0]
        side = size * (1 - rng.uniform(0, cfg.crop))
        x, y = rng.uniform(0, size - side, 2)
        frame = self.frames[self.items[chosen[0]]["picture"]]
        labels = []
        for label in frame["labels"]:
            box = {k: (label["box2d"][k] - (x if "x" in k else y)) * size / side for k in label["box2d"]}
            box = {k: min(max(v, 0.0), float(size)) for k, v in box.items()}
            if box["x2"] - box["x1"] > 1 and box["y2"] - box["y1"] > 1:
                labels.append(dict(label, box2d=box))
        view = commands.View(dict(frame, labels=labels), cfg)
        for item in (self.items[i] for i in chosen):
            same = commands.check_reason(item["reason"], view) == commands.TRUE
            if item["answer"] is not None:
                question = commands.Question(item["template"], item["first"], item["second"])
                same &= question.truth(view) == (commands.TRUE if item["answer"] else commands.FALSE)
            elif item["template"] != "where":
                same &= commands.describe(view, cfg.max_describe, item["place"] or None) == item["reason"]
            if not same:
                return picture
        box = (x, y, x + side, y + side)
        return np.asarray(prepare.Image.fromarray(picture).resize((size, size), prepare.Image.BILINEAR, box=box))


def prefetched(make, first, last, depth):
    """make(i) for i in [first, last), computed by a thread up to `depth` ahead."""
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(make, i) for i in range(first, min(first + depth, last)))
        for i in range(first, last):
            item = ahead.popleft().result()
            if i + depth < last:
                ahead.append(thread.submit(make, i + depth))
            yield item


# ---- several processes ----
# Each holds the whole model and takes its slice of the pictures of every micro-batch. Gradients are summed by hand:
# a loss is a sum over all tokens divided by one total, so the sum of gradients is exact where the mean that
# DistributedDataParallel takes is not, and a stage that leaves parameters out needs nothing special.

def join_processes(device):
    """Meet the processes that torchrun started, if it did; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def processes():
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def summed(tensor):
    """`tensor` summed over all processes, in place; it waits for all. Raises UserError when one of them is gone."""
    if processes()[1] > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError:
            raise UserError("another process of this training has ended: to go on add --resume=True to the command, "
                            "with any number of processes") from None
    return tensor


def sum_gradients(parameters):
    """Sum the gradients over all processes, as one vector."""
    if processes()[1] > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        vector = summed(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, vector.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


# ---- losses ----

def token_weights(targets, cfg):
    """Weights (M,) of the learned tokens: answer_weight for [NO], that times yes_weight for [YES], 1 for the rest."""
    weights = torch.ones(targets.shape, device=targets.device)
    weights[(targets == YES) | (targets == NO)] = cfg.answer_weight
    weights[targets == YES] *= cfg.yes_weight
    return weights


def total_weight(micros, cfg):
    """Sum of the weights of all tokens that an update's micro-batches teach, by which it divides its loss."""
    return sum(token_weights(m.targets[m.targets >= 0], cfg).sum().item() for m in micros)


def token_loss(logits, targets, cfg):
    """Weighted SUM of the cross-entropies of the learned tokens; the caller divides by the sum of weights.

    logits (M, V) float32, targets (M,). With focal_gamma the answers weigh (1 - p)^gamma (Lin et al. 2017, eq. 4).
    """
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=cfg.label_smoothing)
    if cfg.focal_gamma:
        p = torch.softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        answers = (targets == YES) | (targets == NO)
        loss = torch.where(answers, (1 - p) ** cfg.focal_gamma * loss, loss)
    return (loss * token_weights(targets, cfg)).sum()


def attention_entropy(weights, tokens):
    """Mean entropy of the attention of real tokens, in nats: H(A) = -sum A log A over the keys.

    weights (layers, N, H, T, S), tokens (N, T).
    """
    weights = weights.float()
    # Below the smallest number a weight adds nothing; without the bound the slope of x log x there is infinite, and NaN
    # once it meets the softmax's slope of 0.
    smallest = torch.finfo(torch.float32).tiny
    rows = -(weights * weights.clamp(min=smallest).log()).sum(-1)                 # (layers, N, H, T)
    return rows.transpose(2, 3)[:, tokens != PAD].mean()


class WordTagger(torch.nn.Module):
    """Which of TAGS stand in each of the four descriptions of a picture, read off its patches; used in training only.

    A query for each description and word attends to the patches (one head); a linear unit reads the answer. The first
    stage trains the encoder by it, without the decoder and so several times faster: descriptions as labels, after
    SuperClass (Huang et al. 2024, arXiv:2411.03313). It sees no boxes, so attention is not supervised.
    """

    def __init__(self, dim):
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(4, len(TAGS), dim))
        self.key, self.value = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)
        self.weight = torch.nn.Parameter(torch.randn(4, len(TAGS), dim) * dim ** -0.5)
        self.bias = torch.nn.Parameter(torch.zeros(4, len(TAGS)))

    def forward(self, patches):
        """patches (B, P, D) to logits (B, 4, W)."""
        scores = self.query.flatten(0, 1) @ self.key(patches).transpose(1, 2) * patches.shape[-1] ** -0.5  # (B, 4W, P)
        found = scores.softmax(-1) @ self.value(patches)                                                  # (B, 4W, D)
        return (found * self.weight.flatten(0, 1)).sum(-1).unflatten(1, self.bias.shape) + self.bias


def batch_loss(model, tagger, batch, cfg, total_weight, read=True):
    """Loss of a micro-batch as its share of an update: token losses / total_weight of the whole update, plus extras.

    Extras are means over the micro-batch's pictures, weighed by its share of the update's. read: False in the first
    stage, when only the encoder learns, from the tagger.
    """
    vision, loss = model.encode(batch.images), 0.0
    share = len(batch.images) / (cfg.batch_size * cfg.grad_accum)
    if tagger is not None:
        loss = share * cfg.tag_weight * F.binary_cross_entropy_with_logits(tagger(vision).float(), batch.tags)
    if not read:
        return loss
    loss_fn = lambda logits, targets: token_loss(logits, targets, cfg) / total_weight     # noqa: E731
    attn = {"self": [], "cross": []} if cfg.entropy_weight else None
    text_loss = model.decode(vision, batch.tokens, batch.targets, loss_fn=loss_fn, attn=attn)
    if attn is not None:
        text_loss, attn = text_loss
        loss = loss + share * cfg.entropy_weight * attention_entropy(attn["cross"], batch.tokens.flatten(0, 1))
    loss = loss + text_loss
    if cfg.contrast_weight:       # the longest text of a picture, mostly its description, is the one that names it
        words = torch.where(batch.targets[:, 0] >= 0, batch.targets[:, 0], PAD)
        words = words.gather(1, torch.argsort((words == PAD).int(), dim=1, stable=True))      # moved to the left
        loss = loss + share * cfg.contrast_weight * model.contrastive_loss(vision, words)
    return loss


# ---- optimizer and schedule ----

def see_updates(cfg):
    """Updates of the first stage, in which only the encoder learns."""
    return min(cfg.see_steps, int(0.6 * cfg.max_steps)) if cfg.tag_weight else 0


def make_optimizer(model, tagger, cfg, device):
    """AdamW with a learning rate for each part and weight decay on matrices only."""
    rates, groups = {"vision": cfg.lr_vision, "projection": cfg.lr_projection, "decoder": cfg.lr, "contrast": cfg.lr,
                     "tagger": cfg.lr_vision}, {}
    named = list(model.named_parameters())
    named += [(f"tagger.{name}", p) for name, p in tagger.named_parameters()] if tagger else []
    for name, p in named:
        part = name.split(".")[0]
        decays = p.ndim >= 2 and not any(word in name for word in ("embedding", "positions"))
        groups.setdefault((part, decays), []).append(p)
    return torch.optim.AdamW([dict(params=params, lr=rates[part], peak=rates[part],
                                   weight_decay=cfg.weight_decay if decays else 0.0)
                              for (part, decays), params in groups.items()],
                             betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=device.type in ("cpu", "cuda"))


def lr_scale(step, cfg):
    """Share of the peak learning rate at update `step`: linear warm-up, then cfg.schedule down to cfg.min_lr."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    done = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    if cfg.schedule == "constant":
        return 1.0
    if cfg.schedule == "step":
        return max(cfg.min_lr, 0.01 if done >= 0.85 else 0.1 if done >= 0.6 else 1.0)
    if cfg.schedule == "restarts":
        done = (done * 3) % 1.0 if done < 1 else 1.0
    return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def pick_dtype(cfg, device):
    """(torch dtype of autocast, reason in words)."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "as set"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "the GPU computes bfloat16"
        return torch.float16, "the GPU has no bfloat16 units: float16 with loss scaling"
    if device.type == "cpu":
        flags = Path("/proc/cpuinfo")
        text = flags.read_text(encoding="utf-8") if flags.exists() else ""
        found = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in text), None)
        return (torch.bfloat16, f"{found} found") if found else (torch.float32, "the CPU has no fast bfloat16")
    return torch.float32, "safest on this device"


def autocast(dtype, device):
    """torch.autocast at dtype, or nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


# ---- prediction, shared with evaluate.py ----

def rectangle(prompts, left=False):
    """Prompts as tokens (B, K, T): B lists of K lists of ids, where K may differ; [PAD] after (left: before) each."""
    K = max(map(len, prompts))
    rows = [ids for own in prompts for ids in [*own, *[[PAD]] * (K - len(own))]]
    return torch.tensor(pad(rows, left=left)).unflatten(0, (len(prompts), K))


def verdicts(decoder, tokens, vision=None, attn=None):
    """(log-odds of YES against NO, which token they are read at) of prompts as tokens (N, T): (N,) each.

    The answer is what follows the last token of a prompt. vision, attn: as for the decoder.
    """
    last = (tokens != PAD).sum(1).clamp(min=1) - 1
    hidden = decoder(tokens, vision, attn=attn)[torch.arange(len(tokens), device=tokens.device), last]      # (N, D)
    logits = decoder.logits(hidden)
    return logits[:, YES] - logits[:, NO], last


@torch.no_grad()
def answer_odds(model, images, prompts, device, dtype):
    """Log-odds of YES against NO: list of arrays (K,), one a picture.

    images (B, 3, S, S) float32 normalised; prompts as for `rectangle`.
    """
    tokens = rectangle(prompts).flatten(0, 1).to(device)                                                    # (N, T)
    with autocast(dtype, device):
        odds, _ = verdicts(model.decoder, tokens, model.encode(images.to(device)))
    return [row[:len(own)] for row, own in zip(odds.view(len(prompts), -1).cpu().numpy(), prompts)]


def predict(model, data, cfg, device, dtype, picture="right", limit=0):
    """Log-odds of YES against NO for the questions of a set: (item rows (n,), log-odds (n,)).

    picture: right, blank (the mean colour) or wrong (another picture of the set). limit: about so many questions,
    spread over the set; 0 = all. Several processes take turns at the batches, and each returns the whole.
    """
    model.eval()
    rank, ranks = processes()
    questions = np.flatnonzero(data.index[:, 3] >= 0)
    groups = np.split(questions, np.flatnonzero(np.diff(data.index[questions, 0])) + 1) if len(questions) else []
    if limit and limit < len(questions):
        keep = np.linspace(0, len(groups) - 1, max(1, round(len(groups) * limit / len(questions)))).astype(int)
        groups = [groups[i] for i in keep]
    own = [data.index[g[0], 0] for g in groups]
    shown = own if picture != "wrong" else list(np.roll(own, len(own) // 2))
    odds = []
    for start in range(0, len(groups), cfg.eval_batch):
        part = groups[start:start + cfg.eval_batch]
        if start // cfg.eval_batch % ranks != rank:
            odds += [np.zeros(len(g), np.float32) for g in part]
            continue
        images = data.images[np.array(shown[start:start + cfg.eval_batch])]
        images = torch.from_numpy(normalise(images, data.mean, data.std))
        images = torch.zeros_like(images) if picture == "blank" else images
        prompts = [[data.tokens[r, :data.index[r, 1]].tolist() for r in g] for g in part]
        odds += answer_odds(model, images, prompts, device, dtype)
    if not odds:
        return np.zeros(0, int), np.zeros(0)
    return np.concatenate(groups), summed(torch.from_numpy(np.concatenate(odds))).numpy()


def balanced_accuracy(truth, odds):
    """Mean of the accuracies on YES and on NO items, in [0, 1]; NaN without items of both."""
    truth, said = np.asarray(truth, bool), np.asarray(odds) > 0
    if truth.all() or not truth.any():
        return math.nan
    return float(said[truth].mean() + (~said[~truth]).mean()) / 2


def validate(model, data, cfg, device, dtype):
    """(balanced accuracy, answer loss in nats, confusion) on a sample of a set; a loss of ln 2 = 0.693 is guessing.

    confusion: how often (YES, NO) was said where YES is true, and where NO is.
    """
    rows, odds = predict(model, data, cfg, device, dtype, limit=cfg.eval_items)
    truth = data.index[rows, 3]
    loss = np.logaddexp(0, np.where(truth == 1, -odds, odds)).mean()
    confusion = [(int((odds[truth == t] > 0).sum()), int((odds[truth == t] <= 0).sum())) for t in (1, 0)]
    return balanced_accuracy(truth, odds), float(loss), confusion


# ---- checkpoints ----

def checksum(value):
    """SHA-256, hex, of a checkpoint's content, not its file: names, dtype, shape, bytes of tensors; plain values."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        content = f"{value.dtype} {tuple(value.shape)} ".encode() + data.tobytes()
    elif isinstance(value, (dict, list, tuple)):
        content = "".join(map(checksum, value.items() if isinstance(value, dict) else value)).encode()
    else:
        content = repr(value).encode()
    return hashlib.sha256(content).hexdigest()


def save_checkpoint(path, content):
    """Write content and its checksum by a temporary file and os.replace, so that `path` is never half a checkpoint."""
    temporary, buffer = Path(f"{path}.tmp"), io.BytesIO()
    torch.save(dict(content, checksum=checksum(content)), buffer)                 # a file's errors it hides
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


def read_checkpoint(path, device="cpu"):
    """A checkpoint's dict. Raises UserError when there is none, it is damaged, or of another format."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: run python train.py, or pass --checkpoint=FILE") from None
    except Exception as error:                              # unpickling fails in many ways
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} is not a checkpoint of train.py, or it is damaged: {first}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, and this train.py reads format {FORMAT}: train again")
    written, needed = state.pop("checksum", None), WEIGHTS | PROGRESS if PROGRESS & set(state) else WEIGHTS
    if set(state) != needed:
        differs = [f"{word} {', '.join(sorted(map(str, keys)))}" for word, keys in (
            ("lacks", needed - set(state)), ("holds unknown", set(state) - needed)) if keys]
        raise UserError(f"{path} {' and '.join(differs)}: it is of another train.py")
    if checksum(state) != written:
        raise UserError(f"{path} is damaged: its content does not match its checksum")
    return state


def load_checkpoint(path, device="cpu"):
    """read_checkpoint, whose error offers best.pt or last.pt of the same folder if that is whole."""
    try:
        return read_checkpoint(path, device)
    except UserError as error:
        offer = ""
        for other in (Path(path).with_name("best.pt"), Path(path).with_name("last.pt")):
            with contextlib.suppress(UserError):
                step = read_checkpoint(other)["step"]
                offer = f"; {other} of step {step} is whole: pass --checkpoint={shlex.quote(str(other))}"
        raise UserError(f"{error}{offer}") from None


def load_weights(module, weights, path):
    """Fill a module strictly. Raises UserError that names the tensors which differ from those of the checkpoint."""
    there, here = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (weights, module.state_dict()))
    differs = [f"{k} is {there.get(k, 'absent')} there, {here.get(k, 'absent')} here" for k in {**there, **here}
               if there.get(k) != here.get(k)]
    if differs:
        raise UserError(f"{path} is of another architecture, {len(differs)} tensors differ: {'; '.join(differs[:3])}")
    module.load_state_dict(weights)


def load_model(cfg, make_model=VLM):
    """(model in eval mode, its settings with cfg's run and evaluation settings, tokenizer, state, device).

    LoRA's changes are merged into the weights. make_model: as for `train`.

    The checkpoint is cfg.checkpoint or out_dir/best.pt.
    """
    device, path = pick_device(cfg), cfg.checkpoint or str(Path(cfg.out_dir) / "best.pt")
    state = load_checkpoint(path, device)
    trained = dict(vars(config.from_args()), **state["config"])
    for name, (section, _, _) in config.SETTINGS.items():
        if section in ("run", "evaluation", "answering", "ablations") or name == "attention":
            trained[name] = getattr(cfg, name)
    cfg = type(cfg)(**trained)
    tokenizer = Tokenizer(state["words"])
    model = make_model(cfg, len(tokenizer))
    if cfg.lora_rank:
        model.add_lora(cfg.lora_rank)
    load_weights(model.to(device), state["model"], path)
    if cfg.lora_rank:
        model.merge_lora()
    return model.eval(), cfg, tokenizer, state, device


# ---- starting from other weights ----

def resize_positions(weights, name, grid):
    """Bring the learned positions (P, D) that `name` has in `weights`, if it does, to `grid` patches, bilinearly."""
    old = weights.get(name)
    if old is not None and len(old) != grid and math.isqrt(len(old)) ** 2 == len(old):
        square = old.T.unflatten(1, (math.isqrt(len(old)), -1))[None]                        # (1, D, side, side)
        square = F.interpolate(square, size=(math.isqrt(grid),) * 2, mode="bilinear")
        weights[name] = square[0].flatten(1).T.contiguous()


SIGLIP = {"layer_norm1": "norm1", "self_attn.q_proj": "attn.q", "self_attn.out_proj": "attn.out",
          "layer_norm2": "norm2", "mlp.fc1": "up", "mlp.fc2": "down"}
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}  # by width, of the published ones: the weights do not tell


def from_siglip(weights, mean, std):
    """Tensors of HF's SiglipVisionModel, alone or within a larger model, by the names that VisionEncoder gives them.

    SigLIP takes pictures in [-1, 1], ours are normalised by mean and std (3,): the patch embedding makes up for it.
    """
    pattern = r"(?:(?:.*\.)?vision_model\.)?((?:embeddings|encoder|post_layernorm)\..+)"
    theirs = {m[1]: tensor.float() for name, tensor in weights.items() if (m := re.fullmatch(pattern, name))}
    ours = {}
    for name, tensor in theirs.items():
        if m := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            i, part, kind = m.groups()
            if part in SIGLIP:
                ours[f"blocks.{i}.{SIGLIP[part]}.{kind}"] = tensor
            elif part == "self_attn.k_proj" and (value := name.replace("k_proj", "v_proj")) in theirs:
                ours[f"blocks.{i}.attn.kv.{kind}"] = torch.cat((tensor, theirs[value]))
        elif name.startswith("post_layernorm."):
            ours[name.replace("post_layernorm", "norm")] = tensor
    weight, bias = (theirs.get(f"embeddings.patch_embedding.{kind}") for kind in ("weight", "bias"))
    if weight is not None and bias is not None and weight.ndim == 4:
        scale, shift = 2 * torch.tensor(std), 2 * torch.tensor(mean) - 1          # its input is scale * ours + shift
        ours["stem.weight"] = weight * scale[:, None, None]
        ours["stem.bias"] = bias + (weight * shift[:, None, None]).sum((1, 2, 3))
    if "embeddings.position_embedding.weight" in theirs:
        ours["positions"] = theirs["embeddings.position_embedding.weight"]
    return ours


def start_from_siglip(vision, weights, cfg, data):
    """Fill the VisionEncoder with what fits of a SigLIP checkpoint; returns what was taken, in words."""
    ours, here = from_siglip(weights, data.mean, data.std), vision.state_dict()
    stem = ours.get("stem.weight")
    if stem is None:
        raise UserError(f"{cfg.init_from} is neither a checkpoint of train.py nor a SigLIP vision model of HF's")
    layers = 1 + max((int(name.split(".")[1]) for name in ours if name.startswith("blocks.")), default=-1)
    resize_positions(ours, "positions", (cfg.image_size // cfg.patch_size) ** 2)
    taken = {name: ours[name] for name in here if name in ours and ours[name].shape == here[name].shape}
    heads, hidden = SIGLIP_HEADS.get(len(stem), cfg.vision_heads), len(ours.get("blocks.0.up.bias", ()))
    rest = f"--vision_layers={layers} --vision_heads={heads} --vision_ffn_dim={hidden}"
    if len(taken) == len(here) and heads == cfg.vision_heads:
        vision.load_state_dict(taken)
        return f"the vision encoder starts from {cfg.init_from}: {cfg.vision_layers} of its {layers} blocks"
    if not {"stem.weight", "stem.bias"} <= set(taken):
        raise UserError(f"nothing in {cfg.init_from} fits this vision encoder. Its patch embedding would with "
                        f"--stem=patch --patch_size={stem.shape[-1]} --vision_dim={len(stem)}, all of it with {rest} "
                        "besides")
    vision.load_state_dict({name: taken[name] for name in ("stem.weight", "stem.bias")}, strict=False)
    return f"the patch embedding alone starts from {cfg.init_from}; all of it would with {rest}"


def start_from(cfg, model, tagger, data):
    """Fill the model from cfg.init_from; returns what was taken, in words. Raises UserError when nothing fits."""
    path = cfg.init_from
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no file {path} to start from") from None
    except ImportError:
        raise UserError(f"reading {path} needs the safetensors package: pip install safetensors") from None
    except Exception:                                       # unpickling fails in many ways
        raise UserError(f"cannot read {path} as weights: it is neither a .pt nor a .safetensors file, or it is "
                        "damaged") from None
    if not isinstance(weights, dict) or "format" not in weights:
        if cfg.lora_rank:
            raise UserError(f"{path} has no decoder, and with lora_rank={cfg.lora_rank} none would learn: set it to 0")
        weights = weights if isinstance(weights, dict) else {}
        return start_from_siglip(model.vision, {k: t for k, t in weights.items() if torch.is_tensor(t)}, cfg, data)
    other, its, tokenizer, state, _ = load_model(type(cfg)(**dict(vars(cfg), checkpoint=path, device="cpu")))
    if tokenizer.words != data.tokenizer.words:
        raise UserError(f"{path} speaks another vocabulary, of {len(tokenizer)} words: it is of another commands.py")
    sizes = [name for name, (section, _, _) in config.SETTINGS.items() if section == "model"]
    differs = [f"--{name}={getattr(its, name)}" for name in sizes if getattr(its, name) != getattr(cfg, name)]
    weights = other.state_dict()
    resize_positions(weights, "vision.positions", (cfg.image_size // cfg.patch_size) ** 2)
    try:
        load_weights(model, weights, path)
    except UserError as error:
        raise UserError(f"{error}; it was trained with {' '.join(differs)}" if differs else str(error)) from None
    if tagger is not None and state.get("tagger"):
        load_weights(tagger, state["tagger"], path)
    return f"starting from {path}, trained for {state['step']} updates on {its.source} scenes"


def export(cfg):
    """Write what answering needs of cfg.checkpoint or out_dir/best.pt to cfg.export."""
    path = cfg.checkpoint or Path(cfg.out_dir) / "best.pt"
    if Path(cfg.export).exists():
        raise UserError(f"{cfg.export} exists: export to another file, or delete it")
    model, _, _, state, _ = load_model(cfg)
    save_checkpoint(cfg.export, {k: state[k] for k in WEIGHTS} | dict(
        model=model.state_dict(), config=dict(state["config"], lora_rank=0)))
    print(f"exported {path} of step {state['step']} to {cfg.export}")


def cut_log(path, step):
    """Drop what a killed run logged after `step`: the resumed run will log it again."""
    with open(path, "rb+") as file:
        kept = takewhile(lambda line: line.endswith(b"\n") and (
            line.startswith(b"step") or int(line.split(b",")[0]) <= step), file)
        file.truncate(sum(map(len, kept)))


# ---- one update ----

def learner(cfg, data, device, dtype, make_model=VLM):
    """What update() takes first: the model as cfg says that it starts, its tagger, optimizer and scaler."""
    model = make_model(cfg, len(data.tokenizer))
    tagger = WordTagger(cfg.text_dim).to(device) if cfg.tag_weight else None
    if cfg.init_from and not cfg.resume:
        print(start_from(cfg, model, tagger, data))
    if cfg.lora_rank:
        model.add_lora(cfg.lora_rank)
    model.to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return model, tagger, make_optimizer(model, tagger, cfg, device), scaler


PARTS = ("data", "forward", "backward", "optimizer")        # of an update; data is the wait for them


class Clock:
    """Seconds by part of the work: a call names what was done since the last call.

    A GPU works behind the program: with `exact` each call waits for it, which costs time and tells what part took it.
    """

    def __init__(self, device, exact=False):
        self.wait = getattr(torch, device.type).synchronize if exact and device.type != "cpu" else lambda: None
        self.seconds, self.last = Counter(), time.perf_counter()

    def __call__(self, part):
        self.wait()
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


def update(model, tagger, optimizer, scaler, micros, total, read, dtype, cfg, clock):
    """One update by `micros`, whose learned tokens weigh `total` in all processes: (loss, gradient norm, whether done).

    It is not done where loss or norm are not finite. read, dtype: as for batch_loss and autocast.
    """
    model.train()
    device, loss = model.decoder.embedding.weight.device, 0.0
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    for micro in micros:
        micro = Batch(**{k: t.to(device, non_blocking=True) for k, t in vars(micro).items()})
        with autocast(dtype, device):
            share = batch_loss(model, tagger, micro, cfg, total, read)
        clock("forward")
        scaler.scale(share).backward()
        loss += share.item()
        clock("backward")
    loss = summed(torch.tensor(loss)).item()
    sum_gradients(learned)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(learned, cfg.grad_clip or math.inf).item()
    # float16 meets infinite gradients by design: its scaler skips the update and lowers the scale
    finite = math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())
    if finite:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    clock("optimizer")
    return loss, norm, finite


def write_json(path, found):
    """Write a dict as JSON. Raises UserError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


# ---- how fast ----

def peak_memory(device):
    """The most memory that this process has held, MB: of the GPU if it uses one. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:                                     # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def time_updates(cfg, data, device, dtype, turns=4, updates=8):
    """What updates cost: {"see", "read", and "schedule", the mean of these weighted by how many there are: a dict}.

    ms and its shares; pictures and pairs a second (the first stage reads none); FLOPs by the configuration, which are
    what real tokens need (forward, and twice that backward; no padding, no tagger), and those done; the share of the
    peak that either is. The peak is the best of square matmuls that take turns with the updates. The first updates of a
    turn find data that were made ready while other things ran, so they do not count.
    """
    parts, clock = learner(cfg, data, device, dtype), Clock(device, exact=True)
    rates, rows, done = [], {}, {}
    images, K, block = cfg.batch_size * cfg.grad_accum, cfg.commands_per_image, cfg.prefetch + updates
    stages = {stage: n for stage, n in (("see", see_updates(cfg)), ("read", cfg.max_steps - see_updates(cfg))) if n}
    batches = {stage: prefetched(lambda i: data.micro_batches(i, 0, cfg.batch_size), 0, turns * block, cfg.prefetch)
               for stage in stages}
    for turn in range(turns):                               # the first warms up and counts
        for stage in stages:
            with contextlib.nullcontext() if turn else FlopCounterMode(display=False) as counter:
                for i in range(block):
                    clock("between")
                    clock.seconds.clear()
                    micros = next(batches[stage])
                    clock("data")
                    update(*parts, micros, total_weight(micros, cfg), stage == "read", dtype, cfg, clock)
                    if turn and i >= cfg.prefetch:
                        rows.setdefault(stage, []).append([clock.seconds[part] for part in PARTS])
            if turn == 0:
                done[stage], memory = 1e-9 * counter.get_total_flops() / block, peak_memory(device)
            for n in (512, 1024) if device.type == "cpu" else (4096, 8192):
                square = torch.randn(n, n, device=device, dtype=dtype)
                clock("between")
                square @ square
                clock("matmul")
                rates.append(2e-9 * n ** 3 / clock.seconds["matmul"])
                clock.seconds.clear()
    length = round(np.mean([(m.tokens != PAD).sum(-1).float().mean() for m in micros]))
    for stage in stages:
        asked = K * (stage == "read")
        rows[stage] = np.append(np.mean(rows[stage], 0), [
            3e-9 * images * forward_flops(parts[0], asked, length), done[stage], images, images * asked])
    rows["schedule"] = sum(n * rows[stage] for stage, n in stages.items()) / cfg.max_steps
    peak = max(rates)
    found = dict(matmul_gflops=peak, memory_mb=memory, text_length=length)
    for name, row in rows.items():
        spent, (model, ran, seen, pairs) = row[:4].sum(), row[4:]
        found[name] = dict(
            ms=1000 * spent, **{f"share_{part}": share for part, share in zip(PARTS, row / spent)},
            images_per_s=seen / spent, pairs_per_s=pairs / spent, gflop=model, gflop_done=ran,
            gflop_per_pair=model / pairs if pairs else 0.0, share_of_peak=model / spent / peak,
            share_of_peak_done=ran / spent / peak)
    return found


def growth(cfg):
    """What to vary to see how cost grows: {name: {size: settings that change}}; a name is "axis, series"."""
    def times(n, *names):
        return {name: n * getattr(cfg, name) for name in names}
    wide = ("stem_width", "vision_dim", "vision_ffn_dim", "text_dim", "text_head_dim", "text_ffn_dim")
    return {
        **{f"image size, patches of {patch}": {size: dict(image_size=size, patch_size=patch)
                                               for size in range(64, 225, 32)} for patch in (16, 8)},
        "commands an image": {k: dict(commands_per_image=k, descriptions_per_image=k // 4) for k in (1, 2, 4, 8, 16)},
        "times as large, width": {n: times(n, *wide) for n in (1, 2, 3, 4)},
        "times as large, depth": {n: times(n, "vision_layers", "text_layers") for n in (1, 2, 3, 4)}}


def time_growth(cfg, meta, device, dtype):
    """{name: sizes, the least ms of a second-stage update with a quarter of the batch, e of the fit ms ~ size^e}."""
    found, clock, few = {}, Clock(device, exact=True), max(1, cfg.batch_size // 4)
    for name, points in growth(cfg).items():
        least = []
        for changes in points.values():
            sized = type(cfg)(**dict(vars(cfg), init_from="", **changes))
            data = Data(sized, meta, "train")
            batch, parts, spent = data.batch(0, few), learner(sized, data, device, dtype), []
            batch.images = torch.randn(few, 3, sized.image_size, sized.image_size)
            for _ in range(4):
                clock("between")
                clock.seconds.clear()
                update(*parts, [batch], total_weight([batch], cfg), True, dtype, sized, clock)
                spent.append(1000 * sum(clock.seconds.values()))
            least.append(min(spent))
        exponent = np.polyfit(np.log(list(points)), np.log(least), 1)[0]
        found[name] = dict(size=list(points), ms=least, exponent=exponent)
    return found


def bench(cfg, meta, device, dtype):
    """Measure what training costs, without validation or checkpoints; printed and written to out_dir/bench.json."""
    found = time_updates(cfg, Data(cfg, meta, "train"), device, dtype)
    stages = [stage for stage in ("see", "read", "schedule") if stage in found]
    print("\n".join(f"{key:<20}{value}" for key, value in found.items() if key not in stages))
    print(f"{'of an update':<20}" + "".join(f"{stage:>10}" for stage in stages))
    for key in found["schedule"]:
        print(f"{key:<20}" + "".join(f"{found[stage][key]:>10.4g}" for stage in stages), flush=True)
    found["cost"] = time_growth(cfg, meta, device, dtype)
    for name, entry in found["cost"].items():
        print(f"{name}: time ~ size^{entry['exponent']:.2f}; "
              + ", ".join(f"{size}: {ms:.0f} ms" for size, ms in zip(entry["size"], entry["ms"])))
    found.update(device=str(device), dtype=str(dtype)[6:], threads=torch.get_num_threads(), torch=torch.__version__)
    write_json(Path(cfg.out_dir) / "bench.json", found)
    return found


# ---- which learning rates ----

def lr_range(cfg, data, device, dtype, updates=150, low=1e-3, high=10.0):
    """The loss while all learning rates grow from `low` to `high` times their peaks (Smith 2017, arXiv:1506.01186).

    {"see", "read": {"scale": of each update, "loss": a running mean}}, each from new weights, into lr_range.json. A
    stage ends early when its loss has doubled from its least. The encoder of "read" has learned nothing before, so its
    rates may be somewhat higher than this says.
    """
    found = {}
    for stage in ("see", "read") if see_updates(cfg) else ("read",):
        torch.manual_seed(cfg.seed)
        *learned, optimizer, scaler = learner(cfg, data, device, dtype)
        scales, losses, mean = [], [], 0.0
        for i in range(updates):
            scale = low * (high / low) ** (i / (updates - 1))
            for group in optimizer.param_groups:
                group["lr"] = scale * group["peak"]
            micros = data.micro_batches(i, 0, cfg.batch_size)
            loss, _, finite = update(*learned, optimizer, scaler, micros, total_weight(micros, cfg), stage == "read",
                                     dtype, cfg, Clock(device))
            mean = 0.9 * mean + 0.1 * loss
            smooth = mean / (1 - 0.9 ** (i + 1))            # the mean starts at 0
            if not finite or losses and smooth > 2 * min(losses):
                break
            scales.append(scale)
            losses.append(smooth)
        if not losses:
            raise UserError(f"the loss is {loss} before anything is learned: try --dtype=float32")
        found[stage] = dict(scale=scales, loss=losses)
        end = f"seen up to {high:g} times" if finite else f"not finite at {scale:.3g} times"
        end = f"doubled at {scale:.3g} times" if finite and len(losses) < updates else end
        print(f"{stage}: the loss falls to {min(losses):.3f} at {scales[int(np.argmin(losses))]:.3g} times the rates, "
              + end, flush=True)
    write_json(Path(cfg.out_dir) / "lr_range.json", found)
    return found


# ---- the loop ----

def show_example(batch, tokenizer):
    """One text token by token, with what each token learns to say next."""
    print("one example, token -> target:")
    pairs = [(t, y) for t, y in zip(batch.tokens[0, 0].tolist(), batch.targets[0, 0].tolist()) if t != PAD]
    print("  " + "  ".join(tokenizer.words[t] + (f" -> {tokenizer.words[y]}" if y >= 0 else "") for t, y in pairs))


def lit(batch, cross, data):
    """Pictures side by side (3, S, B*S), each lit where its first question looked for the answer; and these questions.

    cross (layers, B*K, H, T, P), of which the mean is taken; a picture's most attended patch is as bright as it was.
    """
    (B, K, T), side = batch.tokens.shape, math.isqrt(cross.shape[-1])
    at = ((batch.targets == YES) | (batch.targets == NO)).flatten(1).int().argmax(-1)        # (B,)
    k, at = at // T, at % T
    maps = cross.mean((0, 2)).unflatten(0, (B, K))[torch.arange(B), k, at]        # (B, P)
    light = F.interpolate((maps / maps.amax(-1, keepdim=True)).view(B, 1, side, side), size=batch.images.shape[-2:])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
    pictures = (batch.images * std + mean).clamp(0, 1) * (0.2 + 0.8 * light)
    asked = [data.tokenizer.decode(tokens[:n + 2].tolist()) for tokens, n in zip(batch.tokens[torch.arange(B), k], at)]
    return torch.cat(list(pictures), -1), asked


def train(cfg, make_model=VLM, make_data=Data, seen=None):
    """Train as cfg says; returns the dict of final numbers that it prints. With cfg.export it only exports.

    For those that try other models (ablate.py): make_model and make_data make the model and its training commands;
    seen is a file to keep the state at the end of the first stage in.
    """
    if cfg.export:
        return export(cfg)
    start, device = time.time(), join_processes(pick_device(cfg))
    rank, ranks = processes()
    if ranks > 1 and (cfg.bench or cfg.lr_range):
        raise UserError("--bench and --lr_range measure one process: start them with python, not with torchrun")
    if cfg.batch_size < ranks:
        raise UserError(f"batch_size={cfg.batch_size} pictures cannot be shared by {ranks} processes")
    if rank == 0 and not (Path(cfg.data_dir) / "meta.json").exists():
        print(f"no data in {cfg.data_dir}: preparing them")
        prepare.print_report(prepare.prepare(cfg), cfg)
    summed(torch.zeros(1))                                  # the others wait for the data
    meta = prepare.load_meta(cfg)
    dtype, reason = pick_dtype(cfg, device)
    print(f"device {device}, dtype {str(dtype)[6:]} ({reason}), {torch.get_num_threads()} threads, "
          + (f"{ranks} processes, " if ranks > 1 else "") + f"torch {torch.__version__}")
    torch.manual_seed(cfg.seed)
    out = Path(cfg.out_dir)
    data, val = make_data(cfg, meta, "train"), Data(cfg, meta, "val")
    if not len(data.pictures):
        raise UserError(f"no training commands in {cfg.data_dir}: prepare more pictures or lower min_cell")
    if cfg.bench:
        return bench(cfg, meta, device, dtype)
    if cfg.lr_range:
        return lr_range(cfg, data, device, dtype)
    model, tagger, optimizer, scaler = learner(cfg, data, device, dtype, make_model)
    step, best, since_best, top, loss_sum, since = 0, -1.0, 0, [], 0.0, 0     # the last two not logged yet
    if cfg.resume:
        path = cfg.checkpoint or out / "last.pt"
        state = load_checkpoint(path, device)
        if not PROGRESS <= set(state):
            raise UserError(f"{path} holds weights alone, as --export writes them: there is no training to resume")
        changed = {k: f"{k} was {v!r}, now {getattr(cfg, k)!r}" for k, v in state["config"].items()
                   if getattr(cfg, k, v) != v and k != "resume"}
        refused = [text for k, text in changed.items() if k not in RESUMABLE]
        if refused or state["words"] != data.tokenizer.words:
            raise UserError("resuming with other settings would train something else: "
                            + (", ".join(refused) or "the vocabulary is another"))
        load_weights(model, state["model"], path)
        if tagger is not None:
            load_weights(tagger, state["tagger"], path)
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:                                 # empty but for float16
            scaler.load_state_dict(state["scaler"])
        step, best, since_best, top = (state[k] for k in ("step", "best", "since_best", "top"))
        loss_sum, since = state["unlogged"]
        print("; ".join([f"resumed {path} at step {step}", *changed.values()]))
    parameters = sum(p.numel() for p in model.parameters())
    if cfg.lora_rank:
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"LoRA of rank {cfg.lora_rank}: {learns:,} weights learn, the rest stays as it was")
    pairs = cfg.batch_size * cfg.grad_accum * cfg.commands_per_image
    print(f"{parameters / 1e6:.2f}M parameters; {len(data.pictures)} training pictures, {len(data.index)} commands; "
          f"{cfg.max_steps} updates of {pairs} pairs, the first {see_updates(cfg)} of pictures alone, "
          f"{cfg.max_steps * pairs / cfg.commands_per_image / len(data.pictures):.1f} passes")
    write = save_checkpoint if rank == 0 else lambda path, content: None

    def checkpoint(path):
        write(path, dict(
            format=FORMAT, model=model.state_dict(), tagger=tagger and tagger.state_dict(),
            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, best=best,
            since_best=since_best, top=top, unlogged=[loss_sum, since], config=vars(cfg), mean=meta["mean"],
            std=meta["std"], data_hash=meta["hash"], words=data.tokenizer.words))
        summed(torch.zeros(1))                              # the others wait until it is written

    log_path = out / "log.csv" if rank == 0 else Path(os.devnull)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob("*.pt.tmp") if rank == 0 else ():                # of a run that was killed
            leftover.unlink()
        if cfg.resume and log_path.is_file():
            cut_log(log_path, step)
        log_file = open(log_path, "a" if cfg.resume else "w", newline="", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to out_dir {out}: {error}") from None
    log = csv.writer(log_file)
    if log_file.tell() == 0:
        log.writerow(["step", "loss", "lr", "grad_norm", "ms", "pairs_per_s", "wait_share", "val_accuracy", "val_loss",
                      "cross_entropy", "seconds"])
    if not cfg.resume:
        show_example(data.batch(0, 1), data.tokenizer)
    board = None
    if cfg.tensorboard and rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard=True needs the tensorboard package: pip install tensorboard") from None
        board = SummaryWriter(str(out))

    own = cfg.batch_size * rank // ranks, cfg.batch_size * (rank + 1) // ranks
    batches = prefetched(lambda i: data.micro_batches(i, *own), step, cfg.max_steps, cfg.prefetch)
    stop = threading.Event()
    interrupt = signal.signal(signal.SIGINT, lambda *_: stop.set())               # Ctrl-C never cuts an update in two
    clock, marked = Clock(device), step                                           # since the last log line
    try:
        while step < cfg.max_steps:
            model.freeze("vision", cfg.freeze_vision_steps < 0 or step < cfg.freeze_vision_steps)
            scale = lr_scale(step, cfg)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            read = step >= see_updates(cfg)

            micros = next(batches)
            clock("data")
            total, stopping = summed(torch.tensor([total_weight(micros, cfg), stop.is_set()])).tolist()
            if stopping:
                checkpoint(out / "last.pt")
                print(f"\nstopped at step {step}, saved {out / 'last.pt'}; to go on add --resume=True to the command")
                raise KeyboardInterrupt
            # The random numbers of an update (dropout) follow from its place, so that a checkpoint need hold no state.
            torch.manual_seed(int(np.random.default_rng([cfg.seed, 2, step, rank]).integers(2 ** 63)))
            loss, norm, finite = update(model, tagger, optimizer, scaler, micros, total, read, dtype, cfg, clock)
            if not finite:
                write(out / "bad_batch.pt", dict(
                    step=step, loss=loss, norm=norm, position=step * cfg.grad_accum * cfg.batch_size,
                    micro_batches=[vars(micro) for micro in data.micro_batches(step, 0, cfg.batch_size)]))
                raise UserError(f"the loss is {loss}, the gradient norm {norm} at step {step}: nothing was updated. "
                                f"Lower the learning rates, or try --dtype=float32; {out / 'bad_batch.pt'} holds the "
                                "batch")
            step, loss_sum, since = step + 1, loss_sum + loss, since + 1

            if step % cfg.log_every == 0 or step == cfg.max_steps:
                spent = sum(clock.seconds.values()) - clock.seconds["validation"]
                ms = 1000 * spent / (step - marked)
                row = [step, loss_sum / since, scale * (cfg.lr if read else cfg.lr_vision), norm, ms, 1000 * pairs / ms,
                       clock.seconds["data"] / spent]
                stage, end, speed = ("read", cfg.max_steps, f"{row[5]:.0f} pairs/s") if read else \
                    ("see", see_updates(cfg), f"{row[5] / cfg.commands_per_image:.0f} images/s")
                print(f"{stage} {step}/{end}  loss {row[1]:.4f}  lr {row[2]:.1e}  norm {norm:.2f}  {ms:.0f} ms  "
                      f"{speed}  wait {100 * row[6]:.0f}%  eta {(end - step) * ms / 1000:.0f} s", flush=True)
                log.writerow([f"{x:.8g}" for x in row] + ["", "", "", f"{time.time() - start:.1f}"])
                log_file.flush()
                if board:
                    for name, value in zip(("loss", "lr", "grad_norm", "ms", "pairs_per_s", "wait_share"), row[1:]):
                        board.add_scalar(name, value, step)
                    board.add_scalar("memory_mb", peak_memory(device) or 0, step)
                marked, loss_sum, since = step, 0.0, 0
                clock.seconds.clear()

            if seen and step == see_updates(cfg):
                checkpoint(seen)
            if read and step % cfg.eval_every == 0 or step == cfg.max_steps:
                accuracy, val_loss, confusion = validate(model, val, cfg, device, dtype)
                probe = data.batch(0, min(8, cfg.batch_size))
                with torch.no_grad():
                    _, attn = model(probe.images.to(device), probe.tokens.to(device), return_attn=True)
                entropy = attention_entropy(attn["cross"].cpu(), probe.tokens.flatten(0, 1)).item()
                print(f"--- step {step}: val balanced accuracy {100 * accuracy:.2f}%, answer loss {val_loss:.4f} "
                      f"(guessing: 0.693), cross-attention entropy {entropy:.2f} of "
                      f"{math.log(attn['cross'].shape[-1]):.2f}, {time.time() - start:.0f} s", flush=True)
                log.writerow([step] + [""] * 6 + [f"{accuracy:.6f}", f"{val_loss:.6f}", f"{entropy:.4f}",
                                                  f"{time.time() - start:.1f}"])
                log_file.flush()
                if board:
                    board.add_scalar("val_accuracy", accuracy, step)
                    board.add_scalar("val_loss", val_loss, step)
                    board.add_text("confusion", "| true | said YES | said NO |\n|---|---|---|\n" + "\n".join(
                        f"| {name} | {yes} | {no} |" for name, (yes, no) in zip(("YES", "NO"), confusion)), step)
                    picture, asked = lit(probe, attn["cross"].cpu(), data)
                    board.add_image("where it looked", picture, step)
                    board.add_text("where it looked", "; ".join(asked), step)
                score = -1.0 if math.isnan(accuracy) else accuracy
                since_best = 0 if score > best or best < 0 else since_best + 1
                if since_best == 0:
                    best = max(score, 0.0)
                    checkpoint(out / "best.pt")
                if cfg.save_top > 1:
                    top = sorted(top + [[score, step]], reverse=True)
                    checkpoint(out / f"best-{step}.pt")
                    for _, old in top[cfg.save_top:]:
                        (out / f"best-{old}.pt").unlink(missing_ok=True)
                    top = top[:cfg.save_top]
            if step % cfg.eval_every == 0 or step == cfg.max_steps:
                checkpoint(out / "last.pt")
                clock("validation")
                if cfg.early_stopping and since_best >= cfg.early_stopping:
                    print(f"stopping: no better validation in {since_best} looks")
                    break
    finally:
        signal.signal(signal.SIGINT, interrupt)
        batches.close()
        log_file.close()
        if board:
            board.close()

    load_weights(model, load_checkpoint(out / "best.pt", device)["model"], out / "best.pt")
    test = Data(cfg, meta, "test")
    rows, odds = predict(model, test, cfg, device, dtype)
    truth, items = test.index[rows, 3], prepare.read_items(cfg.data_dir, "test")
    family = np.array([items[r]["family"] for r in rows])
    by_family = {f"test_{f}": balanced_accuracy(truth[family == f], odds[family == f]) for f in sorted(set(family))}
    result = dict(test_accuracy=balanced_accuracy(truth, odds), **by_family,
                  val_accuracy=best, parameters=parameters, steps=step, seed=cfg.seed,
                  seconds=round(time.time() - start, 1))
    print("---", *(f"{k}: {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in result.items()), sep="\n")
    if rank == 0:
        write_json(out / "train.json", result)
    if ranks > 1:
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    if int(os.environ.get("RANK", 0)):                      # of several processes only the first speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    config.run(train, __doc__)
