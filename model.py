"""The model: a picture and a command in, an answer and its reason out, from scratch in one file.

- Vision encoder: a convolutional stem (or one convolution with kernel = stride = patch), 2D positions, pre-norm
  transformer blocks as in SigLIP.
- Decoder: RMSNorm, causal self-attention with rotary positions, cross-attention to the patches, gated FFN, logits tied
  to the embedding. Without cross-attention it computes what Gemma computes (a test compares the two).
- One Attention class for all three attentions: grouped queries, a by-hand path that returns its weights, a fast path.
- One row a picture: all commands about a picture stand one after another in one row of tokens, told apart by `segment`.
  So the picture, and its keys and values in cross-attention, are computed once for all of them.
- Generation, greedy or by beams: a row for each prompt, with a KV-cache that grows for the text.

    python model.py                    architecture, parameters, memory, speed
    python model.py --preset=base --device=cuda

References: Transformer arXiv:1706.03762, ViT 2010.11929, SigLIP 2303.15343, Gemma 2403.08295, PaliGemma 2407.07726,
RMSNorm 1910.07467, RoPE 2104.09864, GQA 2305.13245, GLU variants 2002.05202, early convolutions 2106.14881, LoRA
2106.09685.

Shapes: B pictures and their rows, L tokens of a row, S keys, P patches, D width, V words, n commands in all rows;
H query heads of d dimensions, G key/value heads, R = H/G query heads that share one.
"""
import contextlib
import math
import time
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import config
from commands import vocabulary
from tokenizer import EOS, NO, PAD, YES, Tokenizer, pad


# ---- norm and positions ----

class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last dimension, as Gemma writes it: a weight of 0 changes nothing."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        # In float32 also under autocast: bfloat16 keeps fewer than three digits.
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight, self.eps)


def rope_tables(positions, head_dim, theta):
    """cos and sin of the rotary angles position * theta^(-2i/d): two (positions, d) tables (RoFormer, eq. 15)."""
    # Slow and fast rotations, as the hands of a clock: fast ones tell neighbours apart, slow ones tell far from near.
    frequency = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(positions).float()[:, None] * frequency    # (positions, d/2)
    # Dimension i is rotated with i + d/2 (split halves, as HF), where the paper pairs 2i with 2i + 1. Either is sound:
    # weights learned from scratch know no order of dimensions. The rotation's minus sign is kept in the sin table.
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def rotate(x, rope):
    """Rotate x (B, L, heads, d) by the (cos, sin) of its tokens' positions, each (B, L, 1, d)."""
    # After rotating q by its position and k by its own, q.k depends on the difference of the two positions only.
    cos, sin = rope
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((second, first), -1) * sin.to(x.dtype)


# ---- rows: all commands about a picture, one after another ----

def as_rows(prompts, length=None, device="cpu"):
    """B lists of commands, each a list of ids, as rows: tokens and segment, int64 (B, L), with [PAD] and 0 at the end.

    length: L; without it, the longest row decides. Two pictures, the first with the commands a b c and d e, the
    second with f g:

        tokens   a b c d e .     f g . . . .
        segment  1 1 1 2 2 0     1 1 0 0 0 0
    """
    tokens = [list(chain(*commands)) for commands in prompts]
    segment = [[number for number, ids in enumerate(commands, 1) for _ in ids] for commands in prompts]
    if length is None:
        # Few different lengths: a CPU prepares each matrix product anew for a size that it has not seen yet.
        length = -(-max(map(len, tokens)) // 8) * 8
    return torch.tensor(pad(tokens, length), device=device), torch.tensor(pad(segment, length), device=device)


def row_mask(segment, queries=None):
    """What words may look at, as numbers to add to the scores: 0 where they may, -inf where they may not.

    A word sees itself and the words before it in its own command. segment (B, S); queries: how many words ask, the
    last ones (all by default; with a cache, the newest). Returns (B, 1, queries, S), the 1 for all heads.

        segment  1 1 1 2 2 0          a b c d e .
                                    a x
                                    b x x
                                    c x x x
                                    d       x
                                    e       x x
                                    .           x
    """
    # Cross-attention needs no mask: all patches are there before the first word, so every word may see all of them.
    place = torch.arange(segment.shape[1], device=segment.device)
    first = segment.shape[1] - (queries or segment.shape[1])
    # Padding sees padding, because a row without any key would be 0/0 = NaN. Nobody reads what it computes.
    same = segment[:, first:, None] == segment[:, None, :]                        # (B, queries, S)
    seen = same & (place <= place[first:, None])
    return torch.zeros(seen.shape, device=segment.device).masked_fill(~seen, float("-inf"))[:, None]


def positions(segment):
    """Position of each word in its own command, counted from 0, and 0 for padding: (B, L)."""
    place = torch.arange(segment.shape[1], device=segment.device)
    begins = torch.ones_like(segment, dtype=torch.bool)
    begins[:, 1:] = segment[:, 1:] != segment[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values                        # of the command that a word is in
    return (place - start) * (segment > 0)


def ends(segment):
    """Which words are the last of their command: bool (B, L)."""
    # 0 after the end of the row, so that the last word of a full row ends its command too.
    following = F.pad(segment[:, 1:], (0, 1))
    return (segment > 0) & (segment != following)


# ---- attention and FFN ----

class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with grouped queries: H query heads share G key/value heads (GQA, arXiv:2305.13245).

        MHA  G = H   Q1 Q2 Q3 Q4     GQA  G = 2   Q1 Q2 Q3 Q4     MQA  G = 1   Q1 Q2 Q3 Q4
                     K1 K2 K3 K4                   \\_K1  \\_K2                    \\___K1___/

    Head h stands at [h*d, (h+1)*d] of the input of `out`: whoever removes a head does it there, since `out` mixes them.
    """

    def __init__(self, dim, heads, kv_heads, head_dim, bias, cfg):
        super().__init__()
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.shared = heads // kv_heads
        self.dropout = cfg.dropout
        self.path = cfg.attention
        self.q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias)

    def keys_values(self, source, rope=None):
        """Keys and values of source (B, S, D): (B, G, S, d) each."""
        k, v = self.kv(source).unflatten(-1, (2 * self.kv_heads, self.head_dim)).chunk(2, 2)    # (B, S, G, d)
        # A product of d numbers of size 1 has size sqrt(d); unscaled, softmax would give nearly all to one key and
        # pass hardly any gradient. The scale is on the keys because there are fewer of them than queries or scores.
        k = k * self.head_dim ** -0.5
        if rope is not None:
            k = rotate(k, rope)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, k, v, mask=None, rope=None, collect=None):
        """x (B, T, D) asks, k and v (B, G, S, d) answer: (B, T, D). mask (B, 1, T, S), added to the scores, or None.

        collect: a list that receives the weights (B, H, T, S), which asks for the by-hand path.
        """
        B, T, _ = x.shape
        G, R, S, d = self.kv_heads, self.shared, k.shape[2], self.head_dim
        q = self.q(x).unflatten(-1, (G * R, d))                                   # (B, T, H, d)
        if rope is not None:
            q = rotate(q, rope)
        # The textbook repeats keys, [K1, K2] -> [K1, K1, K1, K1, K2, K2, K2, K2] for 8 heads. Here the R heads that
        # share K1 stand behind it as R times as many queries: the same products, and no key is copied.
        q = q.reshape(B, T, G, R * d).transpose(1, 2).reshape(B, G, T * R, d)
        dropout = self.dropout if self.training else 0.0
        # In bfloat16 on a CPU by hand is faster: the backward of sdpa took 44% of a training step there.
        slow_sdpa = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if collect is not None or self.path == "hand" or (self.path == "auto" and slow_sdpa):
            scores = q @ k.transpose(-2, -1)                                      # (B, G, T*R, S)
            if mask is not None:
                scores.view(B, G, T, R, S).add_(mask[:, :, :, None].to(scores.dtype))
            weights = scores.softmax(-1)
            if collect is not None:
                collect.append(weights.view(B, G, T, R, S).transpose(2, 3).reshape(B, G * R, T, S))
            y = F.dropout(weights, dropout) @ v                                   # (B, G, T*R, d)
        else:
            if mask is not None:
                mask = mask.to(q.dtype).repeat_interleave(R, dim=2)               # (B, 1, T*R, S)
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=1.0)
        y = y.reshape(B, G, T, R * d).transpose(1, 2).reshape(B, T, G * R * d)    # (B, T, H*d)
        return self.out(y)


class GatedFFN(nn.Module):
    """down(act(gate(x)) * up(x)): GeGLU with the tanh GELU as in Gemma, or SwiGLU (arXiv:2002.05202, eq. 6)."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up = nn.Linear(cfg.text_dim, 2 * cfg.text_ffn_dim, bias=False)
        self.down = nn.Linear(cfg.text_ffn_dim, cfg.text_dim, bias=False)
        self.kind = cfg.ffn
        self.dropout = cfg.dropout

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        gate = F.gelu(gate, approximate="tanh") if self.kind == "geglu" else F.silu(gate)
        return F.dropout(self.down(gate * up), self.dropout, self.training)


class LoRA(nn.Module):
    """W x + B A x: a linear layer that stays as it is, plus a learned change of its weight of a low rank r.

    A is `reduce` (r, in), B is `expand` (out, r) (arXiv:2106.09685, eq. 3, with alpha = r).
    """

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        self.reduce = nn.Linear(layer.in_features, rank, bias=False)
        self.expand = nn.Linear(rank, layer.out_features, bias=False)
        # B starts at 0, so that at first nothing changes; A must not, or neither of the two would have a gradient.
        nn.init.normal_(self.reduce.weight, std=layer.in_features ** -0.5)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x):
        return self.layer(x) + self.expand(self.reduce(x))

    @torch.no_grad()
    def merged(self):
        """The layer, its weight changed by B A: it computes the same at no extra cost."""
        self.layer.weight += self.expand.weight @ self.reduce.weight
        return self.layer


# ---- vision ----

class VisionBlock(nn.Module):
    """Pre-norm transformer block as SigLIP's: LayerNorm, attention, LayerNorm, MLP with the tanh GELU; with biases."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.vision_dim
        heads = cfg.vision_heads
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, heads, heads, D // heads, bias=True, cfg=cfg)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.up = nn.Linear(D, cfg.vision_ffn_dim)
        self.down = nn.Linear(cfg.vision_ffn_dim, D)
        self.dropout = cfg.dropout

    def forward(self, x, collect=None):
        h = self.norm1(x)
        x = x + self.attn(h, *self.attn.keys_values(h), collect=collect)
        h = self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + F.dropout(h, self.dropout, self.training)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167) whose statistics are always of four pictures together.

    So 4 x 8 accumulated pictures learn what 32 at once do, and several processes what one does. One that is frozen
    keeps its statistics too.
    """

    def forward(self, x):
        learns = self.training and self.weight.requires_grad
        parts = [F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias, learns, self.momentum)
                 for part in (x.split(4) if learns else [x])]
        return torch.cat(parts)


def conv_stem(cfg):
    """Stride-2 3x3 convolutions, each doubling the width, to one pixel a patch; then 1x1 to the encoder's width."""
    # From scratch this learns faster than one large convolution (Xiao et al. 2021, arXiv:2106.14881), and with the
    # norms, as there, in half the updates.
    layers = []
    into = 3
    width = cfg.stem_width
    halvings = int(math.log2(cfg.patch_size))
    for i in range(halvings):
        last = i == halvings - 1
        if last:
            # Padded on both sides, convolutions of stride 2 look from the upper left corner of each patch. Padding
            # the last one below and right only moves the patch back to its middle.
            layers.append(nn.ZeroPad2d((0, 1, 0, 1)))
        layers += [nn.Conv2d(into, width, 3, stride=2, padding=0 if last else 1, bias=False),
                   BatchNorm(width, momentum=0.02), nn.GELU()]
        into = width
        width = 2 * width
    return nn.Sequential(*layers, nn.Conv2d(into, cfg.vision_dim, 1))


def sincos_2d(rows, columns, dim):
    """Fixed positions of a grid (rows * columns, dim): sin and cos of the column, then of the row (MoCo v3, MAE)."""
    frequency = 10000 ** (-torch.arange(dim // 4).float() / (dim // 4))
    angle = torch.arange(max(rows, columns)).float()[:, None] * frequency         # (side, dim/4)
    wave = torch.cat((angle.sin(), angle.cos()), -1)                              # (side, dim/2)
    return torch.cat((wave[:columns].repeat(rows, 1), wave[:rows].repeat_interleave(columns, 0)), -1)


class VisionEncoder(nn.Module):
    """Pictures (B, 3, h, w) to patches (B, P, D), row by row from the upper left."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.vision_dim
        self.size = cfg.image_height, cfg.image_width
        self.grid = rows, columns = tuple(side // cfg.patch_size for side in self.size)
        self.stem = conv_stem(cfg) if cfg.stem == "conv" else nn.Conv2d(3, D, cfg.patch_size, stride=cfg.patch_size)
        if cfg.vision_positions == "learned":
            self.positions = nn.Parameter(torch.zeros(rows * columns, D))
        else:
            self.register_buffer("positions", sincos_2d(rows, columns, D), persistent=False)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.vision_layers))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, images, features=None, collect=None):
        """features: a dict that receives what each stage puts out; collect: a list for the attention weights."""
        seen = {} if features is None else features
        x = self.stem(images.contiguous(memory_format=torch.channels_last))       # (B, D, rows, columns)
        x = seen["stem"] = x.flatten(2).transpose(1, 2)                           # (B, P, D)
        # Attention knows no order: without positions an answer could hardly depend on where something is.
        x = x + self.positions
        for i, block in enumerate(self.blocks):
            x = seen[f"block{i}"] = block(x, collect)
        x = seen["encoder"] = self.norm(x)
        return x


class WordTagger(nn.Module):
    """Which words stand in each of the four descriptions of a picture, read off its patches; used in training only.

    A query for each description and word attends to the patches (one head); a linear unit reads the answer. The first
    stage trains the encoder by it, without the decoder and so several times faster: descriptions as labels, after
    SuperClass (Huang et al. 2024, arXiv:2411.03313). It sees no boxes, so attention is not supervised.
    """

    def __init__(self, dim, words):
        super().__init__()
        self.query = nn.Parameter(torch.randn(4, words, dim))
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.weight = nn.Parameter(torch.randn(4, words, dim) * dim ** -0.5)
        self.bias = nn.Parameter(torch.zeros(4, words))

    def forward(self, patches):
        """patches (B, P, D) to logits (B, 4, words)."""
        query = self.query.flatten(0, 1)                                          # (4*words, D)
        scores = query @ self.key(patches).transpose(1, 2) * patches.shape[-1] ** -0.5            # (B, 4*words, P)
        found = scores.softmax(-1) @ self.value(patches)                          # (B, 4*words, D)
        logits = (found * self.weight.flatten(0, 1)).sum(-1)
        return logits.unflatten(1, self.bias.shape) + self.bias


# ---- decoder ----

class Cache:
    """The KV-cache of generation: keys and values by block of the decoder, of the text (they grow) and the picture."""

    def __init__(self):
        self.text = {}
        self.picture = {}
        self.segment = None                                                       # of all words so far, (N, S)

    def append(self, block, k, v):
        """Add k and v (N, G, new, d) of the newest words; returns those of all words so far, (N, G, S, d) each."""
        if block in self.text:
            old_k, old_v = self.text[block]
            k = torch.cat((old_k, k), 2)
            v = torch.cat((old_v, v), 2)
        self.text[block] = k, v
        return k, v

    def reorder(self, rows):
        """Row i continues what row rows[i] was, which is about the same picture."""
        self.segment = self.segment[rows]
        self.text = {block: (k[rows], v[rows]) for block, (k, v) in self.text.items()}


class DecoderBlock(nn.Module):
    """Three residual steps: look back at the text, look at the picture, think. RMSNorm before each, as Gemma."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.text_dim
        heads = cfg.text_heads, cfg.text_kv_heads, cfg.text_head_dim
        self.norm1 = RMSNorm(D)
        self.attn = Attention(D, *heads, bias=False, cfg=cfg)
        self.norm2 = RMSNorm(D)
        self.cross = Attention(D, *heads, bias=False, cfg=cfg)
        self.norm3 = RMSNorm(D)
        self.ffn = GatedFFN(cfg)

    def forward(self, x, vision, mask, rope, cache=None, attn=None):
        """x (B, L, D), vision (B, P, D) or None. attn: {"self", "cross"}, lists that receive weights, or None."""
        attn = attn or {"self": None, "cross": None}
        h = self.norm1(x)
        k, v = self.attn.keys_values(h, rope)                                     # (B, G, L, d) each
        # Keys are kept as rotated: the position of a word in its command never changes.
        if cache is not None:
            k, v = cache.append(self, k, v)                                       # (B, G, S, d) each
        x = x + self.attn(h, k, v, mask, rope, attn["self"])
        if vision is not None:
            k, v = self.picture_keys(vision, cache)                               # (B, G, P, d) each
            x = x + self.cross(self.norm2(x), k, v, collect=attn["cross"])
        return x + self.ffn(self.norm3(x))

    def picture_keys(self, vision, cache):
        """Keys and values of the patches: while generating they are computed once and kept."""
        if cache is None:
            return self.cross.keys_values(vision)
        if self not in cache.picture:
            cache.picture[self] = self.cross.keys_values(vision)
        return cache.picture[self]


class Decoder(nn.Module):
    """Rows of tokens (B, L) to final hidden states (B, L, D), with or without pictures."""

    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, cfg.text_dim)
        self.blocks = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.text_layers))
        self.norm = RMSNorm(cfg.text_dim)
        cos, sin = rope_tables(cfg.max_text, cfg.text_head_dim, cfg.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def embed(self, tokens):
        # As logits the embedding must be small, as input of size 1: hence the factor, as in Gemma.
        return self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)

    def forward(self, tokens, segment, vision=None, cache=None, attn=None):
        """tokens and segment (B, L); vision (B, P, D), or None for no cross-attention.

        cache: a Cache that holds the tokens before these. attn: a dict of lists for the weights, "self" and "cross".
        What is returned for [PAD] means nothing.
        """
        L = tokens.shape[1]
        if cache is not None:
            if cache.segment is not None:
                segment = torch.cat((cache.segment, segment), 1)                  # (B, S)
            cache.segment = segment
        mask = row_mask(segment, L)
        position = positions(segment)[:, -L:]
        rope = self.cos[position][:, :, None], self.sin[position][:, :, None]     # (B, L, 1, d) each
        x = self.embed(tokens)                                                    # (B, L, D)
        for block in self.blocks:
            x = block(x, vision, mask, rope, cache, attn)
        return self.norm(x)

    def logits(self, hidden):
        """(..., D) to float32 (..., V), by the embedding's own weights."""
        return F.linear(hidden, self.embedding.weight).float()


# ---- the whole ----

class VLM(nn.Module):
    """Vision encoder, projection, decoder. `vocab_size` words; the rest of the sizes come from cfg."""

    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.cfg = cfg
        self.adapted = False                                                      # whether LoRA's changes learn alone
        self.vision = VisionEncoder(cfg)
        # The norm gives patches the size that the norms of the decoder give to words.
        self.projection = nn.Sequential(nn.Linear(cfg.vision_dim, cfg.text_dim), RMSNorm(cfg.text_dim))
        self.decoder = Decoder(cfg, vocab_size)
        if cfg.contrast_weight > 0:
            self.contrast = nn.ParameterDict({"log_scale": nn.Parameter(torch.tensor(math.log(10.0))),
                                              "bias": nn.Parameter(torch.tensor(-10.0))})
        self.init_weights()
        self.to(memory_format=torch.channels_last)                                # for the convolutions of the stem

    @torch.no_grad()
    def init_weights(self):
        """Initial weights: normal with mean 0; biases 0; norms their identity."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # 1/sqrt(fan in) keeps the size of what passes; GELU about halves the squares, hence the 2 (Kaiming).
                before_gelu = isinstance(module, nn.Conv2d) and module.out_channels != self.cfg.vision_dim
                std = math.sqrt((2 if before_gelu else 1) / module.weight[0].numel())
                # These add to the residual path. It must not grow with the steps of the decoder, three in each block.
                # The encoder learns sooner if its blocks change nothing at first.
                if name.endswith((".out", ".down")):
                    std *= 0 if name.startswith("vision") else (3 * self.cfg.text_layers) ** -0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Of size 1 once scaled. The logits being tied to it, an untrained model repeats its input, and its loss stands
        # above ln V; with std 0.02 it starts at ln V but learned slower (steps 90 to 120, one seed: 0.43, not 0.37).
        nn.init.normal_(self.decoder.embedding.weight, std=self.cfg.text_dim ** -0.5)
        if isinstance(self.vision.positions, nn.Parameter):
            # As large as the patches: "on the left" is asked from the first step on.
            nn.init.normal_(self.vision.positions, std=0.5)

    @property
    def device(self):
        """Where its weights are."""
        return self.decoder.embedding.weight.device

    def encode(self, images, collect=None):
        """Normalised pictures (B, 3, h, w) to projected patches (B, P, D)."""
        return self.projection(self.vision(images, collect=collect))

    def features(self, images):
        """What each stage makes of the pictures: {"stem", "block0", ..., "encoder", "projected"}, each (B, P, D)."""
        features = {}
        features["projected"] = self.projection(self.vision(images, features))
        return features

    def forward(self, images, tokens, segment=None, targets=None, return_attn=False):
        """images (B, 3, h, w), tokens and segment (B, L): logits (B, L, V), or with targets the loss.

        segment: see `row_mask`; without it a row is one command. targets (B, L): IGNORE where there is nothing to
        learn. return_attn: also return {"vision": (layers, B, H, P, P), "self": (layers, B, H, L, L), "cross": (layers,
        B, H, L, P)}: attention weights, with their gradients.
        """
        if segment is None:
            segment = (tokens != PAD).long()
        attn = {"vision": [], "self": [], "cross": []} if return_attn else None
        vision = self.encode(images, attn["vision"] if return_attn else None)
        result = self.decode(vision, tokens, segment, targets, attn=attn)
        if return_attn:
            return result, {name: torch.stack(weights) for name, weights in attn.items()}
        return result

    def decode(self, vision, tokens, segment, targets=None, loss_fn=F.cross_entropy, attn=None):
        """As forward, from projected patches (B, P, D). attn: a dict of lists for the weights of each layer.

        loss_fn(logits (M, V), targets (M,)) sees where something is learned, and on a GPU the rest too.
        """
        hidden = self.decoder(tokens, segment, vision, attn=attn)                 # (B, L, D)
        if targets is None:
            return self.decoder.logits(hidden)
        hidden = hidden.flatten(0, 1)
        targets = targets.flatten()
        if hidden.device.type == "cpu":
            # Many targets are padding or command. A GPU would have to be waited for until their number is known.
            learned = targets >= 0
            hidden = hidden[learned]
            targets = targets[learned]
        return loss_fn(self.decoder.logits(hidden), targets)

    def odds(self, vision, tokens, segment, attn=None):
        """Log-odds of YES against NO after the last word of each command, in the order of the rows: (n,).

        vision (B, P, D), or None to ask without pictures; tokens and segment (B, L).
        """
        hidden = self.decoder(tokens, segment, vision, attn=attn)[ends(segment)]  # (n, D)
        logits = self.decoder.logits(hidden)
        return logits[:, YES] - logits[:, NO]

    @torch.no_grad()
    def ask(self, images, prompts, dtype):
        """`odds` of prompts, lists of ids, a list of them for each of the pictures (B, 3, h, w): numpy float32 (n,)."""
        tokens, segment = as_rows(prompts, device=self.device)
        with autocast(dtype, self.device):
            odds = self.odds(self.encode(images), tokens, segment)
        return odds.cpu().numpy()

    def contrastive_loss(self, vision, tokens, segment):
        """SigLIP's sigmoid loss (arXiv:2303.15343, eq. 1) of projected patches (B, P, D) and their texts.

        A text is the longest command of its row (B, L), at its last word; a picture is the mean of its patches.
        """
        # The longest says most: its last word is the farthest from the first of its command.
        last = positions(segment).argmax(1)                                       # (B,)
        # A text that saw its picture would match it with any words: so no cross-attention here.
        text = self.decoder(tokens, segment)[torch.arange(len(last), device=last.device), last]      # (B, D)
        image = F.normalize(vision.mean(1).float(), dim=-1)
        logits = self.contrast["log_scale"].exp() * image @ F.normalize(text.float(), dim=-1).T + self.contrast["bias"]
        sign = 2 * torch.eye(len(logits), device=logits.device) - 1               # 1 for pairs, else -1
        return -F.logsigmoid(sign * logits).sum() / len(logits)

    def freeze(self, part, on=True):
        """Stop (or, on=False, resume) the learning of "vision" (the stem too), "projection" or "decoder"."""
        for name, p in getattr(self, part).named_parameters():
            # With LoRA most weights must stay as they are, also when their part is free to learn.
            learns = not self.adapted or ".reduce." in name or ".expand." in name
            p.requires_grad_(learns and not on)

    def add_lora(self, rank):
        """Freeze every weight, and let each linear layer learn a change of that rank instead (LoRA)."""
        self.adapted = True
        self.requires_grad_(False)
        self.replace(nn.Linear, lambda layer: LoRA(layer, rank))

    def merge_lora(self):
        """Add the learned changes to the weights: the same model without LoRA."""
        self.adapted = False
        self.replace(LoRA, LoRA.merged)
        self.requires_grad_(True)

    def replace(self, kind, make):
        """Put make(module) in the place of every module of the class `kind`."""
        for name, module in list(self.named_modules()):
            if type(module) is kind:
                parent, _, own = name.rpartition(".")
                setattr(self.get_submodule(parent), own, make(module))

    @torch.no_grad()
    def generate(self, vision, prompts, max_new_tokens, beam=1, eos_id=EOS, use_cache=True):
        """Continue prompts (N, T), left-padded with [PAD], by up to max_new_tokens tokens: (N, new), [PAD] after [EOS].

        vision (N, P, D): the projected patches of each prompt's picture. beam: sequences kept for a prompt, of which
        the best has the largest sum of log-probabilities / length; 1 is greedy. use_cache=False computes everything
        again for each token: slower, to check and measure the cache.
        """
        N, T = prompts.shape
        was_training = self.training
        self.eval()
        first_row = torch.arange(N, device=prompts.device)[:, None] * beam        # of the beams of a prompt
        text = prompts.repeat_interleave(beam, 0)                                 # (N*beam, T)
        vision = vision.repeat_interleave(beam, 0)                                # (N*beam, P, D)
        cache = Cache() if use_cache else None
        # All beams of a prompt but one start impossible: they are equal, and would find the same words.
        total = torch.full((N * beam,), float("-inf"), device=text.device)        # sums of log-probabilities
        total[::beam] = 0
        done = torch.zeros(N * beam, dtype=torch.bool, device=text.device)
        length = torch.zeros(N * beam, device=text.device)
        for step in range(max_new_tokens):
            new = text[:, -1:] if use_cache and step > 0 else text
            hidden = self.decoder(new, (new != PAD).long(), vision, cache)[:, -1]
            logits = self.decoder.logits(hidden)                                  # (N*beam, V)
            logits[:, PAD] = float("-inf")                                        # padding is nothing to say ...
            score = logits.log_softmax(-1)
            score.masked_fill_(done[:, None], float("-inf"))
            score[:, PAD].masked_fill_(done, 0.0)                                 # ... but all that follows the end
            vocab = score.shape[-1]
            length = length + ~done
            score = total[:, None] + score
            # By the mean and not the sum, which falls with every word: short texts would win by being short.
            mean = score / length[:, None]
            choice = mean.view(N, -1).topk(beam).indices                          # (N, beam), best first
            rows = (first_row + choice // vocab).flatten()                        # the row that each choice continues
            token = (choice % vocab).flatten()
            total = score[rows, token]
            text = torch.cat((text[rows], token[:, None]), 1)
            length = length[rows]
            done = done[rows] | (token == eos_id)
            if use_cache and beam > 1:
                cache.reorder(rows)
            if done.all():
                break
        self.train(was_training)
        return text.view(N, beam, -1)[:, 0, T:]


# ---- device, precision and statistics ----

def pick_device(cfg):
    """The torch.device of cfg.device, auto being cuda, else cpu. UserError if the wished one is not there.

    With cuda:1 the GPU number 1 becomes the one that torch means wherever none is named.
    """
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    name = cfg.device
    if name == "auto":
        # On mps some of the operations of the decoder are slow, or missing from older versions of torch.
        name = "cuda" if "cuda" in found else "cpu"
    if name not in found:
        raise config.UserError(f"device '{name}' is not there; found here: {', '.join(found)}")
    device = torch.device(name)
    if device.index:
        torch.cuda.set_device(device)
    return device


def pick_dtype(cfg, device):
    """(torch dtype of autocast, the reason in words)."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "as set"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "the GPU computes bfloat16"
        return torch.float16, "the GPU has no bfloat16 units: float16 with loss scaling"
    flags = Path("/proc/cpuinfo")
    if device.type == "cpu" and flags.exists():
        text = flags.read_text(encoding="utf-8")
        for flag in ("amx_bf16", "avx512_bf16"):
            if flag in text:
                return torch.bfloat16, f"{flag} found"
    return torch.float32, "no fast bfloat16 found"


def autocast(dtype, device):
    """torch.autocast at dtype, or nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def parameter_count(module):
    """(how many parameters a module has, how many of them learn)."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)


def forward_flops(model, length):
    """FLOPs of one picture with a row of `length` tokens, forward; a training step takes 3 times as many.

    With length 0 the picture is only encoded.
    """
    image = torch.zeros(1, 3, *model.vision.size, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if length:
            segment = 1 + torch.arange(length, device=model.device)[None] // 8    # commands of eight words
            model(image, torch.ones_like(segment), segment)
        else:
            model.encode(image)
    return counter.get_total_flops()


def least_seconds(work, device, repeats=3):
    """Least time of a few runs of work(), after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main(cfg):
    device = pick_device(cfg)
    dtype, why = pick_dtype(cfg, device)
    V = len(Tokenizer(vocabulary()))
    torch.manual_seed(cfg.seed)
    model = VLM(cfg, V).to(device).eval()
    print(f"device {device}, dtype {str(dtype)[6:]} ({why}), {torch.get_num_threads()} CPU threads, vocabulary {V}")

    P = math.prod(model.vision.grid)
    patches = f"{P} x {cfg.vision_dim}"
    text = f"{cfg.row_tokens} x {cfg.text_dim}"
    parts = [(f"stem ({cfg.stem})", patches, model.vision.stem),
             (f"{cfg.vision_layers} vision blocks", patches, model.vision.blocks),
             ("projection", f"{P} x {cfg.text_dim}", model.projection),
             ("embedding, also logits", text, model.decoder.embedding),
             (f"{cfg.text_layers} decoder blocks", text, model.decoder.blocks),
             ("all, with norms and positions", "", model)]
    print(f"\none picture, one row of {cfg.row_tokens} tokens\n{'part':<32}{'output':<12}{'parameters':>12}")
    for name, shape, part in parts:
        print(f"{name:<32}{shape:<12}{parameter_count(part)[0]:>12,}")
    weights = 4 * parameter_count(model)[0] / 2 ** 20
    print(f"\nmemory       weights {weights:.1f} MB, as much for gradients, twice as much for AdamW, and activations")
    print(f"FLOPs        {forward_flops(model, cfg.row_tokens) / 1e9:.2f} G per picture, forward")

    image = torch.randn(1, 3, *model.vision.size, device=device)
    with torch.no_grad(), autocast(dtype, device):
        for B in (1, cfg.batch_size):
            images = image.expand(B, -1, -1, -1)
            commands = [[5] * min(cfg.row_tokens // 8, cfg.max_text)] * 8
            tokens, segment = as_rows([commands] * B, device=device)
            took = least_seconds(lambda: model(images, tokens, segment), device)
            print(f"forward      {B} pictures, 8 commands each: {1000 * took:.1f} ms, {8 * B / took:,.0f} pairs/s")
        new = min(24, cfg.max_text - 8)
        for B in (1, 64):
            vision = model.encode(image).expand(B, -1, -1)
            prompts = torch.randint(3, V, (B, 8), device=device)
            # No token is -1, so no sequence ends early.
            speed = [B * new / least_seconds(lambda: model.generate(vision, prompts, new, eos_id=-1, use_cache=use),
                                             device, 1) for use in (True, False)]
            print(f"decode       batch {B}: {speed[0]:,.0f} tokens/s with the KV-cache, {speed[1]:,.0f} without")


if __name__ == "__main__":
    config.run(main, __doc__)
