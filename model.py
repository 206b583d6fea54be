"""The model: a picture and a command in, an answer and its reason out, from scratch in one file.

- Vision encoder: a convolutional stem (or one convolution with kernel = stride = patch), 2D positions, pre-norm
  transformer blocks as in SigLIP.
- Decoder: RMSNorm, causal self-attention with rotary positions, cross-attention to the patches, gated FFN, logits tied
  to the embedding. Without cross-attention it computes what Gemma computes (a test compares the two).
- One Attention class for all three attentions: grouped queries, a by-hand path that returns its weights, a fast path.
- A picture is encoded once for all its commands; so are its keys and values in cross-attention.
- No work on padding: all that is done token by token sees real tokens only, attention alone gets padded rows.
- Generation, greedy or by beams, with one KV-cache for the text (it grows) and one for the picture (it does not).

    python model.py                    architecture, parameters, memory, speed
    python model.py --preset=base --device=cuda

References: Transformer arXiv:1706.03762, ViT 2010.11929, SigLIP 2303.15343, Gemma 2403.08295, PaliGemma 2407.07726,
RMSNorm 1910.07467, RoPE 2104.09864, GQA 2305.13245, GLU variants 2002.05202, early convolutions 2106.14881, LoRA
2106.09685.

Shapes: B images, K commands for each, N = B*K rows of text, T text tokens, M real tokens in all rows, S keys,
P patches, D width, V words; H query heads of d dimensions, G key/value heads, R = H/G query heads that share one.
"""
import ctypes
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import config
from tokenizer import PAD


# ---- norm, positions, masks ----
class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last dimension, as Gemma writes it: a weight of 0 changes nothing."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight, self.eps)


def rope_tables(positions, head_dim, theta):
    """cos and sin of the rotary angles position * theta^(-2i/d): two (positions, d) tables (RoFormer, eq. 15).

    Dimension i is rotated with i + d/2 (split halves, as HF), where the paper pairs 2i with 2i + 1. Either is sound:
    weights learned from scratch know no order of dimensions, and q.k depends on the difference of positions only.
    The minus sign of the rotation's first half is kept in the sin table.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(positions).float()[:, None] * frequency    # (positions, d/2)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def rotate(x, rope):
    """Rotate x (M, heads, d) by the (cos, sin) of its tokens' positions, each (M, 1, d)."""
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, first), -1) * sin


def self_mask(real, queries):
    """What text may look at, as numbers to add to the scores: 0 where it may, -inf where not.

    real (N, S) is True for words and False for [PAD]; the queries are the last `queries` of the S tokens (all of them,
    or the newest when the rest is in the cache). Returns (N, 1, queries, S), the 1 for all heads.

        left  . a b c         right  a b c .         newest, the rest in the cache  . a b c
            . x - - -              a x - - -                                      c - x x x
            a - x - -              b x x - -
            b - x x -              c x x x -
            c - x x x              . x x x x

    A [PAD] query always sees itself, for a row without any key would be 0/0 = NaN. Nobody reads what it computes.
    Cross-attention has no mask: all patches are there before the first word, so every word sees all of them.
    """
    keys = real.shape[1]
    key = torch.arange(keys, device=real.device)
    query = key[keys - queries:, None]                                            # (T, 1)
    seen = (key <= query) & real[:, None, :] | (key == query)                     # (N, T, S)
    return torch.zeros(seen.shape, device=real.device).masked_fill(~seen, float("-inf"))[:, None]


class Packing:
    """Places of M real tokens in a rectangle of padded rows, to go from the one to the other and back.

        a b c .    unpad ->
        d . . .               a b c d e f       rows 3, length 4, index 0 1 2 4 8 9
        e f . .    <- pad

    Texts differ in length, so half of a batch can be padding. Norms, FFNs and projections treat each token alone: they
    take the packed tokens; only the scores of attention need the rectangle. A third of the decoder's time is saved.
    """

    def __init__(self, index, rows, length):
        self.index, self.rows, self.length = index, rows, length

    def pad(self, x):
        """(M, ...) to (rows, length, ...), 0 where no token is."""
        full = x.new_zeros(self.rows * self.length, *x.shape[1:])
        return full.index_copy(0, self.index, x).unflatten(0, (self.rows, self.length))

    def unpad(self, x):
        """(rows, length, ...) to (M, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)


# ---- attention and FFN ----
class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with grouped queries: H query heads share G key/value heads (GQA, arXiv:2305.13245).

        MHA  G = H   Q1 Q2 Q3 Q4     GQA  G = 2   Q1 Q2 Q3 Q4     MQA  G = 1   Q1 Q2 Q3 Q4
                     K1 K2 K3 K4                   \\_K1  \\_K2                    \\___K1___/

    The textbook repeats keys, [K1, K2] -> [K1, K1, K1, K1, K2, K2, K2, K2] for 8 heads. Here the R heads that share K1
    queue up behind it as R times as many queries instead: the same products, and no key is copied.

    Head h stands at [h*d, (h+1)*d] of the input of `out`: whoever removes a head does it there, since `out` mixes them.
    """

    def __init__(self, dim, heads, kv_heads, head_dim, bias, dropout=0.0, path="auto"):
        super().__init__()
        self.kv_heads, self.head_dim, self.dropout, self.path = kv_heads, head_dim, dropout, path
        self.shared = heads // kv_heads
        self.q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias)

    def keys_values(self, source, rope=None, packing=None):
        """Keys and values of source (N, S, D), or packed (M, D), each (N, G, S, d), to be used and kept."""
        kv = self.kv(source).unflatten(-1, (2 * self.kv_heads, self.head_dim))              # (N, S, 2G, d)
        if rope is not None:
            kv = torch.cat((rotate(kv[:, :self.kv_heads], rope), kv[:, self.kv_heads:]), 1)
        if packing is not None:
            kv = packing.pad(kv)
        return kv.transpose(1, 2).chunk(2, 1)                                               # (N, G, S, d) each

    def forward(self, x, k, v, mask=None, rope=None, packing=None, collect=None):
        """x (N, T, D), or packed (M, D), asks, k and v (N, G, S, d) answer; the shape of x. mask (N, 1, T, S) or None.

        collect: a list that receives the weights (N, H, T, S); it asks for the by-hand path.
        """
        G, R, S, d = self.kv_heads, self.shared, k.shape[2], self.head_dim
        q = self.q(x) * d ** -0.5
        if rope is not None:
            q = rotate(q.unflatten(-1, (G * R, d)), rope).flatten(1)
        if packing is not None:
            q = packing.pad(q)                                                              # (N, T, H*d)
        N, T, _ = q.shape
        q = q.view(N, T, G, R * d).transpose(1, 2).reshape(N, G, T * R, d)                  # (N, G, T*R, d)
        dropout = self.dropout if self.training else 0.0
        # By hand is the fast path of a CPU: in bfloat16 the backward of sdpa took 44% of a training step there.
        if collect is not None or self.path == "hand" or (self.path == "auto" and x.device.type == "cpu"):
            scores = q @ k.transpose(-2, -1)                                                # (N, G, T*R, S)
            if mask is not None:
                scores.view(N, G, T, R, S).add_(mask[:, :, :, None].to(scores.dtype))
            weights = scores.softmax(-1)
            if collect is not None:
                collect.append(weights.view(N, G, T, R, S).transpose(2, 3).reshape(N, G * R, T, S))
            y = F.dropout(weights, dropout) @ v                                             # (N, G, T*R, d)
        else:
            if mask is not None:
                mask = mask.to(q.dtype).repeat_interleave(R, dim=2)                         # (N, 1, T*R, S)
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=1.0)           # (N, G, T*R, d)
        y = y.reshape(N, G, T, R * d).transpose(1, 2).reshape(N, T, G * R * d)               # (N, T, H*d)
        return self.out(y if packing is None else packing.unpad(y))


class GatedFFN(nn.Module):
    """down(act(gate(x)) * up(x)): GeGLU with the tanh GELU as in Gemma, or SwiGLU (arXiv:2002.05202, eq. 6)."""

    def __init__(self, dim, hidden, kind, dropout=0.0):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.kind, self.dropout = kind, dropout

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        gate = F.gelu(gate, approximate="tanh") if self.kind == "geglu" else F.silu(gate)
        return F.dropout(self.down(gate * up), self.dropout, self.training)


class LoRA(nn.Module):
    """layer(x) + expand(reduce(x)): a layer left as it is, plus a learned change of its weight, of a low rank r.

    For a linear layer that is (W + B A) x, A (r, in), B (out, r) (arXiv:2106.09685, eq. 3, with alpha = r). For a
    convolution A has its kernel and r channels, and B is 1x1. B starts at 0, so at first nothing changes.
    """

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Conv2d):
            self.reduce = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.expand = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.reduce = nn.Linear(layer.in_features, rank, bias=False)
            self.expand = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.reduce.weight, std=self.reduce.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x):
        return self.layer(x) + self.expand(self.reduce(x))

    @torch.no_grad()
    def merged(self):
        """The layer, its weight changed by B A: it computes the same at no extra cost."""
        self.layer.weight += (self.expand.weight.flatten(1) @ self.reduce.weight.flatten(1)).view_as(self.layer.weight)
        return self.layer


# ---- vision ----
class VisionBlock(nn.Module):
    """Pre-norm transformer block as SigLIP's: LayerNorm, attention, LayerNorm, MLP with the tanh GELU; with biases."""

    def __init__(self, cfg):
        super().__init__()
        D, heads = cfg.vision_dim, cfg.vision_heads
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, heads, heads, D // heads, bias=True, dropout=cfg.dropout, path=cfg.attention)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.up = nn.Linear(D, cfg.vision_ffn_dim)
        self.down = nn.Linear(cfg.vision_ffn_dim, D)
        self.dropout = cfg.dropout

    def forward(self, x, collect=None):
        h = self.norm1(x)
        x = x + self.attn(h, *self.attn.keys_values(h), collect=collect)
        h = self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + F.dropout(h, self.dropout, self.training)


def conv_stem(cfg):
    """Stride-2 3x3 convolutions, the width doubled at each, down to one pixel a patch; then 1x1 to the encoder's width.

    Learns faster from scratch than one large convolution (Xiao et al. 2021, arXiv:2106.14881). Padded on both sides, a
    stride of 2 looks from each upper left corner; the last one, padded below and right only, moves back to the middle.
    """
    layers, width, into, count = [], cfg.stem_width, 3, int(math.log2(cfg.patch_size))
    for i in range(count):
        if i < count - 1:
            layers += [nn.Conv2d(into, width, 3, stride=2, padding=1), nn.GELU()]
        else:
            layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(into, width, 3, stride=2), nn.GELU()]
        width, into = 2 * width, width
    return nn.Sequential(*layers, nn.Conv2d(into, cfg.vision_dim, 1))


def sincos_2d(side, dim):
    """Fixed positions of a square grid (side*side, dim): sin and cos of the column, then of the row (MoCo v3, MAE)."""
    frequency = 10000 ** (-torch.arange(dim // 4).float() / (dim // 4))
    angle = torch.arange(side).float()[:, None] * frequency                       # (side, dim/4)
    wave = torch.cat((angle.sin(), angle.cos()), -1)                              # (side, dim/2)
    return torch.cat((wave.repeat(side, 1), wave.repeat_interleave(side, 0)), -1)


class VisionEncoder(nn.Module):
    """Pictures (B, 3, S, S) to patches (B, P, D), row by row from the upper left."""

    def __init__(self, cfg):
        super().__init__()
        D, side = cfg.vision_dim, cfg.image_size // cfg.patch_size
        self.image_size = cfg.image_size
        self.stem = conv_stem(cfg) if cfg.stem == "conv" else nn.Conv2d(3, D, cfg.patch_size, stride=cfg.patch_size)
        if cfg.vision_positions == "learned":
            self.positions = nn.Parameter(torch.zeros(side * side, D))
        else:
            self.register_buffer("positions", sincos_2d(side, D), persistent=False)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.vision_layers))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, images, features=None, collect=None):
        """features: a dict that receives what each stage puts out; collect: a list for the attention weights."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"pictures must be (B, 3, {size}, {size}), not {tuple(images.shape)}")
        seen = {}
        x = self.stem(images.contiguous(memory_format=torch.channels_last))       # (B, D, side, side)
        x = seen["stem"] = x.flatten(2).transpose(1, 2)                           # (B, P, D)
        x = x + self.positions
        for i, block in enumerate(self.blocks):
            x = seen[f"block{i}"] = block(x, collect)
        x = seen["encoder"] = self.norm(x)
        if features is not None:
            features.update(seen)
        return x


# ---- decoder ----
class Cache:
    """The KV-cache of generation. Of each layer: the text's keys and values, which grow; the picture's, which don't."""

    def __init__(self, layers, room):
        self.text, self.cross, self.room = [None] * layers, [None] * layers, room
        self.real = None                                                          # (N, S), True where no [PAD] stands

    def append(self, layer, k, v):
        """Add k and v (N, G, new, d) of the newest tokens and return all so far, (N, G, S, d) each."""
        if self.text[layer] is None:
            self.text[layer] = [t.new_empty(*t.shape[:2], self.room, t.shape[3]) for t in (k, v)]
        S = self.real.shape[1]
        for kept, new in zip(self.text[layer], (k, v)):
            kept[:, :, S - new.shape[2]:S] = new
        return [kept[:, :, :S] for kept in self.text[layer]]

    def reorder(self, rows):
        """Row i continues what row rows[i] was. The picture's part stays: rows never change their picture."""
        self.real = self.real[rows]
        self.text = [[t[rows] for t in kv] for kv in self.text]


class DecoderBlock(nn.Module):
    """Three residual steps: look back at the text, look at the picture, think. RMSNorm before each, as Gemma."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.layer = layer
        D, sizes = cfg.text_dim, (cfg.text_heads, cfg.text_kv_heads, cfg.text_head_dim)
        kind = dict(bias=False, dropout=cfg.dropout, path=cfg.attention)
        self.norm1, self.attn = RMSNorm(D), Attention(D, *sizes, **kind)
        self.norm2, self.cross = RMSNorm(D), Attention(D, *sizes, **kind)
        self.norm3, self.ffn = RMSNorm(D), GatedFFN(D, cfg.text_ffn_dim, cfg.ffn, cfg.dropout)

    def forward(self, x, vision, mask, rope, rows, pictures, cache=None, attn=None):
        """x (M, D) packed; rows, pictures: its Packing as texts (N, T) and as a long query for each picture (B, L)."""
        h = self.norm1(x)                                                         # (M, D)
        k, v = self.attn.keys_values(h, rope, rows)                               # (N, G, S, d) each
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        x = x + self.attn(h, k, v, mask, rope, rows, attn and attn["self"])
        if vision is not None:
            kv = cache.cross[self.layer] if cache is not None else None
            if kv is None:
                kv = self.cross.keys_values(vision)                               # (B, G, P, d) each
            if cache is not None:
                cache.cross[self.layer] = kv
            x = x + self.cross(self.norm2(x), *kv, packing=pictures, collect=attn and attn["cross"])
        return x + self.ffn(self.norm3(x))


class Decoder(nn.Module):
    """Tokens (N, T) to final hidden states (N, T, D), with or without pictures."""

    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.max_text = cfg.max_text
        self.embedding = nn.Embedding(vocab_size, cfg.text_dim)
        self.blocks = nn.ModuleList(DecoderBlock(cfg, i) for i in range(cfg.text_layers))
        self.norm = RMSNorm(cfg.text_dim)
        cos, sin = rope_tables(cfg.max_text, cfg.text_head_dim, cfg.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens, vision=None, cache=None, attn=None):
        """tokens (N, T), [PAD] at either side; vision (B, P, D) with N = B*K, or None for no cross-attention.

        cache: a Cache that holds the tokens before these. attn: a dict of lists for the weights, "self" and "cross".
        What is returned for [PAD] means nothing.
        """
        (N, T), real = tokens.shape, tokens != PAD
        # M and L are rounded up, with padding kept for it: a CPU compiles each matmul anew for each new size, and sizes
        # that differ from batch to batch would cost more than all the padding does. That padding is taken from all
        # over the batch: in one picture's texts it would make L longer for every picture.
        kept = real.flatten()
        spare = (~kept).nonzero()[:, 0]
        more = min(-int(kept.sum()) % 256, len(spare))
        kept = kept.index_fill(0, spare[torch.arange(more, device=kept.device) * len(spare) // max(more, 1)], True)
        index = kept.nonzero()[:, 0]                                              # (M,)
        rows, pictures = Packing(index, N, T), None
        if vision is not None:
            # The K commands of a picture become one query of up to L tokens, so its keys are computed once for all.
            B, own = len(vision), kept.view(len(vision), -1)                      # (B, K*T)
            L = min(-int(own.sum(1).max()) // 32 * -32, own.shape[1])
            place = own.cumsum(1) - 1 + L * torch.arange(B, device=own.device)[:, None]
            pictures = Packing(place.flatten()[index], B, L)
        if cache is not None:
            real = cache.real = real if cache.real is None else torch.cat((cache.real, real), 1)
        if real.shape[1] > self.max_text:
            raise ValueError(f"a text of {real.shape[1]} tokens exceeds max_text={self.max_text}")
        # Counted from the first real token: a text has the same positions wherever its padding stands.
        position = (real.cumsum(1) - 1).clamp(min=0)[:, -T:].flatten()[index]                  # (M,)
        rope = self.cos[position][:, None], self.sin[position][:, None]           # (M, 1, d) each
        mask = self_mask(real, T)
        x = self.embedding(tokens.flatten()[index]) * math.sqrt(self.embedding.embedding_dim)   # (M, D)
        for block in self.blocks:
            x = block(x, vision, mask, rope, rows, pictures, cache, attn)
        if attn is not None and vision is not None:
            attn["cross"] = [rows.pad(pictures.unpad(w.transpose(1, 2))).transpose(1, 2) for w in attn["cross"]]
        return rows.pad(self.norm(x))

    def logits(self, hidden):
        """(..., D) to float32 (..., V), by the embedding's own weights."""
        return F.linear(hidden, self.embedding.weight).float()


# ---- the whole ----
class VLM(nn.Module):
    """Vision encoder, projection, decoder. `vocab_size` words; the rest of the sizes come from cfg."""

    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.cfg, self.adapted = cfg, False
        self.vision = VisionEncoder(cfg)
        self.projection = nn.Sequential(nn.Linear(cfg.vision_dim, cfg.text_dim), RMSNorm(cfg.text_dim))
        self.decoder = Decoder(cfg, vocab_size)
        if cfg.contrast_weight > 0:
            self.contrast = nn.ParameterDict({"log_scale": nn.Parameter(torch.tensor(math.log(10.0))),
                                              "bias": nn.Parameter(torch.tensor(-10.0))})
        self.init_weights()
        self.to(memory_format=torch.channels_last)                                # for the convolutions of the stem

    @torch.no_grad()
    def init_weights(self):
        """Initial values, all normal with mean 0:

            linear layers               std 1/sqrt(fan in), biases 0
            out and down (residuals)    the same / sqrt(residual steps: 2 a vision block, 3 a decoder block)
            convolutions                std sqrt(2 / fan in), Kaiming; the last of the stem 1/sqrt(fan in), biases 0
            embedding                   std 1/sqrt(D): unit size once scaled by sqrt(D). The output being tied to it, an
                                        untrained model repeats its input and its loss stands above ln V; with std 0.02
                                        it starts at ln V but learned slower (steps 90 to 120, one seed: 0.43, not 0.37)
            learned positions           std 0.5, as large as the patches: "on the left" is asked from the first step on
            norms                       their identity
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                gain = 2 if isinstance(module, nn.Conv2d) and module.out_channels != self.cfg.vision_dim else 1
                std = math.sqrt(gain / module.weight[0].numel())
                if name.endswith((".out", ".down")):
                    vision = name.startswith("vision")
                    std /= math.sqrt(2 * self.cfg.vision_layers if vision else 3 * self.cfg.text_layers)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.decoder.embedding.weight, std=self.cfg.text_dim ** -0.5)
        if isinstance(self.vision.positions, nn.Parameter):
            nn.init.normal_(self.vision.positions, std=0.5)

    def encode(self, images, collect=None):
        """Normalised pictures (B, 3, S, S) to projected patches (B, P, D)."""
        return self.projection(self.vision(images, collect=collect))

    def features(self, images):
        """What each stage makes of the pictures: {"stem", "block0", ..., "encoder", "projected"}, each (B, P, D)."""
        features = {}
        features["projected"] = self.projection(self.vision(images, features))
        return features

    def forward(self, images, tokens, targets=None, return_attn=False, loss_fn=F.cross_entropy):
        """images (B, 3, S, S), tokens (B, K, T) or (B, T): logits (B, K, T, V) or (B, T, V), or with targets the loss.

        targets: as tokens, IGNORE where there is nothing to learn; loss_fn(logits (M, V), targets (M,)) sees the rest.
        return_attn: also return {"vision": (layers, B, H, P, P), "self": (layers, B*K, H, T, T),
        "cross": (layers, B*K, H, T, P)}, attention weights through which gradients flow. Cross rows of [PAD] are 0.
        """
        attn = {"vision": [], "self": [], "cross": []} if return_attn else None
        vision = self.encode(images, attn and attn["vision"])
        return self.decode(vision, tokens, targets, loss_fn, attn)

    def decode(self, vision, tokens, targets=None, loss_fn=F.cross_entropy, attn=None):
        """As forward, from projected patches (B, P, D)."""
        hidden = self.decoder(tokens.reshape(-1, tokens.shape[-1]), vision, attn=attn)        # (N, T, D)
        if targets is None:
            result = self.decoder.logits(hidden).view(*tokens.shape, -1)
        else:
            # Most targets are padding or command: leave them out before the widest matmul of the decoder.
            keep = targets.reshape(-1) >= 0
            hidden = hidden.flatten(0, 1)[keep]                                               # (M, D)
            result = loss_fn(self.decoder.logits(hidden), targets.reshape(-1)[keep])
        if attn is None:
            return result
        return result, {name: torch.stack(weights) for name, weights in attn.items()}

    def contrastive_loss(self, vision, tokens):
        """SigLIP's sigmoid loss (arXiv:2303.15343, eq. 1) of projected patches (B, P, D) and their texts (B, T).

        A text is its last real token after the decoder without cross-attention; a picture is the mean of its patches.
        """
        last = ((tokens != PAD) * torch.arange(tokens.shape[1], device=tokens.device)).argmax(1)
        text = self.decoder(tokens)[torch.arange(len(tokens), device=tokens.device), last]    # (B, D)
        image = F.normalize(vision.mean(1).float(), dim=-1)
        logits = self.contrast["log_scale"].exp() * image @ F.normalize(text.float(), dim=-1).T + self.contrast["bias"]
        sign = 2 * torch.eye(len(logits), device=logits.device) - 1                           # 1 for pairs, else -1
        return -F.logsigmoid(sign * logits).sum() / len(logits)

    def freeze(self, part, on=True):
        """Stop (or, on=False, resume) the learning of "vision" (the stem too), "projection" or "decoder"."""
        if part not in ("vision", "projection", "decoder"):
            raise ValueError(f"no part '{part}' to freeze: vision, projection or decoder")
        for name, p in getattr(self, part).named_parameters():
            p.requires_grad_(not on and (not self.adapted or ".reduce." in name or ".expand." in name))

    def add_lora(self, rank):
        """Freeze every weight, and let each linear layer and convolution learn a change of that rank instead (LoRA)."""
        self.adapted = True
        self.requires_grad_(False)
        for name, layer in list(self.named_modules()):
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                self.replace(name, LoRA(layer, rank))

    def merge_lora(self):
        """Add the learned changes to the weights: the same model without LoRA."""
        self.adapted = False
        for name, layer in list(self.named_modules()):
            if isinstance(layer, LoRA):
                self.replace(name, layer.merged())
        self.requires_grad_(True)

    def replace(self, name, module):
        """Put `module` in the place of the one that named_modules() calls `name`."""
        parent, _, own = name.rpartition(".")
        setattr(self.get_submodule(parent), own, module)

    @torch.no_grad()
    def generate(self, images, prompts, max_new_tokens, beam=1, eos_id=2, use_cache=True):
        """Continue prompts (B, K, T), left-padded with [PAD]: at most max_new_tokens new tokens (B, K, new), and the
        logits of the first of them (B, K, V), in which P([YES]) can be read. After [EOS] stands [PAD].

        beam: sequences kept for a prompt; the best has the largest sum of log-probabilities / length. 1 is greedy.
        use_cache=False computes everything again for each token: slower, to check and measure the cache.
        """
        B, K, T = prompts.shape
        if T + max_new_tokens > self.cfg.max_text:
            raise ValueError(f"{T} prompt tokens and {max_new_tokens} new ones exceed max_text={self.cfg.max_text}")
        was_training = self.training
        self.eval()
        vision = self.encode(images)
        text = prompts.reshape(B * K, T)
        cache = Cache(self.cfg.text_layers, self.cfg.max_text) if use_cache else None
        first = logits = self.decoder.logits(self.decoder(text, vision, cache)[:, -1])        # (N, V)

        # Beams are more commands of the same picture. All but one start impossible, or all would be the same.
        rows = torch.arange(B * K, device=text.device).repeat_interleave(beam)                # (N*beam,)
        total = torch.full((B * K, beam), float("-inf"), device=text.device)
        total[:, 0] = 0                                                           # sum of log-probabilities
        text, logits = text[rows], logits[rows]
        if use_cache and beam > 1:
            cache.reorder(rows)
        done = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        length = torch.zeros(len(text), device=text.device)
        group = torch.arange(B * K, device=text.device)[:, None] * beam           # a command's first row
        for step in range(max_new_tokens):
            if step > 0:
                new = text[:, -1:] if use_cache else text
                logits = self.decoder.logits(self.decoder(new, vision, cache)[:, -1])
            logits[:, PAD] = float("-inf")                                        # padding is nothing to say ...
            score = logits.log_softmax(-1)
            score[done] = float("-inf")                                           # ... but all that follows the end
            score[done, PAD] = 0.0
            vocab = score.shape[-1]
            length = length + ~done
            score = (total.view(-1, 1) + score).view(B * K, -1)                   # (N, beam*V)
            mean = score / length.view(B * K, beam).repeat_interleave(vocab, 1)
            choice = mean.topk(beam, dim=-1).indices                              # (N, beam), best first
            total = score.gather(1, choice)
            rows = (group + choice // vocab).flatten()
            token = (choice % vocab).flatten()
            if beam > 1:
                text, done, length = text[rows], done[rows], length[rows]
                if use_cache:
                    cache.reorder(rows)
            text = torch.cat((text, token[:, None]), 1)
            done = done | (token == eos_id)
            if done.all():
                break
        self.train(was_training)
        return text.view(B, K, beam, -1)[:, :, 0, T:], first.view(B, K, -1)


# ---- device and statistics ----
def reuse_memory():
    """Let glibc keep freed memory instead of handing it back to the system. Elsewhere this does nothing.

    Else each training step asks for 80 MB anew, in 21,000 page faults that cost 7% of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-1, 2 ** 31 - 1)      # M_TRIM_THRESHOLD: never shrink the heap
    mallopt(-3, 2 ** 25)          # M_MMAP_THRESHOLD: blocks of up to 32 MB, the most allowed, come from the heap


def pick_device(cfg):
    """The torch.device of cfg.device, auto being cuda, then mps, then cpu. UserError if the wished one is not there."""
    found = [name for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if backend.is_available()]
    found.append("cpu")
    try:
        device = torch.device(found[0] if cfg.device == "auto" else cfg.device)
        there = device.type in found and (device.index or 0) < max(torch.cuda.device_count(), 1)
    except RuntimeError:
        there = False
    if not there:
        raise config.UserError(f"device '{cfg.device}' is not there; found here: {', '.join(found)}")
    if device.type == "cpu":
        reuse_memory()
    return device


def parameter_stats(model):
    """({part: (total, trainable)} of each part and "total", MB of weights, gradients and AdamW's state in float32)."""
    counts = {}
    for name, part in [*model.named_children(), ("total", model)]:
        sizes = [(p.numel(), p.numel() * p.requires_grad) for p in part.parameters()]
        counts[name] = tuple(map(sum, zip(*sizes)))
    total, trainable = (4 * n / 2 ** 20 for n in counts["total"])
    return counts, {"weights": total, "gradients": trainable, "AdamW state": 2 * trainable}


def forward_flops(model, commands, length):
    """FLOPs of one picture with `commands` texts of `length` tokens, forward; a training step takes 3 times as many."""
    device, size = model.decoder.embedding.weight.device, model.cfg.image_size
    tokens = torch.ones(1, commands, length, dtype=torch.long, device=device)
    image = torch.zeros(1, 3, size, size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image, tokens) if commands else model.encode(image)
    return counter.get_total_flops()


def main(cfg):
    device = pick_device(cfg)
    vocab = Path(cfg.data_dir) / "vocab.json"
    V = len(json.loads(vocab.read_text(encoding="utf-8"))) if vocab.exists() else 256
    torch.manual_seed(cfg.seed)
    model = VLM(cfg, V).to(device).eval()
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    print(f"device {device}, dtype {'bfloat16' if half else 'float32'}, {torch.get_num_threads()} CPU threads, "
          f"vocabulary {V}" + ("" if vocab.exists() else f" (a stand-in: there is no {vocab} yet)"))

    K, T = cfg.commands_per_image, cfg.max_text // 2
    image = torch.randn(1, 3, cfg.image_size, cfg.image_size, device=device)
    shapes = {name: tuple(x.shape) for name, x in model.features(image).items()}
    vision, decoder, text = model.vision, model.decoder, (K, T, cfg.text_dim)
    table = [(f"stem ({cfg.stem})", shapes["stem"], vision.stem.parameters()),
             (f"positions ({cfg.vision_positions})", shapes["stem"], [vision.positions]),
             *[(f"vision block {i}", shapes[f"block{i}"], block.parameters()) for i, block in enumerate(vision.blocks)],
             ("vision norm", shapes["encoder"], vision.norm.parameters()),
             ("projection", shapes["projected"], model.projection.parameters()),
             ("embedding, also logits", text, decoder.embedding.parameters()),
             *[(f"decoder block {i}", text, block.parameters()) for i, block in enumerate(decoder.blocks)],
             ("decoder norm", text, decoder.norm.parameters())]
    print(f"\none picture, {K} commands of {T} tokens\n{'part':<24}{'output':<20}{'parameters':>12}")
    for part, shape, tensors in table:
        count = sum(p.numel() for p in tensors if isinstance(p, nn.Parameter))
        print(f"{part:<24}{' x '.join(map(str, shape)):<20}{count:>12,}")
    counts, memory = parameter_stats(model)
    print("\nparameters   " + ", ".join(f"{name} {total:,}" for name, (total, _) in counts.items()))
    print("memory       " + ", ".join(f"{name} {mb:.1f} MB" for name, mb in memory.items()) + ", and activations")
    print(f"FLOPs        {forward_flops(model, K, T) / 1e9:.2f} G a picture, forward")

    def seconds(work, repeats=3):
        """Least time of a few runs, after one to warm up."""
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            work()
            if device.type != "cpu":
                getattr(torch, device.type).synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        for B in (1, cfg.batch_size):
            images, tokens = image.expand(B, -1, -1, -1), torch.randint(3, V, (B, K, T), device=device)
            took = seconds(lambda: model(images, tokens))
            print(f"forward      {B} pictures, {K} commands each: {1000 * took:.1f} ms, {B * K / took:,.0f} pairs/s")
        new = min(24, cfg.max_text - 8)
        for B in (1, 64):
            images, prompts = image.expand(B, -1, -1, -1), torch.randint(3, V, (B, 1, 8), device=device)
            # No token is -1, so no sequence ends early.
            speed = [B * new / seconds(lambda: model.generate(images, prompts, new, eos_id=-1, use_cache=use), 1)
                     for use in (True, False)]
            print(f"decode       batch {B}: {speed[0]:,.0f} tokens/s with the KV-cache, {speed[1]:,.0f} without")


if __name__ == "__main__":
    config.run(main, __doc__)
