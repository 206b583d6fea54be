"""Answers about a picture, and figures of where the model looked for each word.

- `answer`: verdict with its probability, the generated reason, and one cross-attention map for each word of the command
  and one for the answer, which is made at the token `?`.
- A map is the mean over all heads of all decoder layers, in float32 whatever --dtype says; it sums to 1 over patches.
- The verdict is the likelier of [YES] and [NO], as in evaluation; the reason is generated after it, as in training.
- Figures show maps in multiples of uniform attention, all maps of a figure on one colour scale, patches unsmoothed.
- Attention says where the decoder read, not what decided: patches have already exchanged what they hold in the encoder.

    python visualize.py --image=street.jpg --command="is there a bus on the left?"
    python visualize.py --image=FOLDER --command="describe the scene" --beam=4

Writes out_dir/answer/PICTURE-command-words.png. Shapes: P = side * side patches, n words of the command.
"""
import math
import re
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import matplotlib
matplotlib.use("Agg")                                       # no display needed; before pyplot, which picks one
import matplotlib.pyplot as plt                             # noqa: E402
import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm
from PIL import Image, ImageOps

import commands
import config
import prepare
import train
from config import UserError
from tokenizer import NO, SPECIAL, YES, split_words

# ---- answering ----


def read_command(cfg, tokenizer, command):
    """(words of the command (n), ids of its prompt (n + 2)). UserError if empty, too long or with [PAD] and such."""
    ids = tokenizer.prompt(command)
    words = split_words(command)[:len(ids) - 2]             # without [SOS] and the final `?`
    room = cfg.max_text - cfg.max_new_tokens - 2
    if not words:
        raise UserError(f"the command '{command}' holds no word: ask, for example, --command=\"is there a bus?\"")
    if room < 1:
        raise UserError(f"max_new_tokens={cfg.max_new_tokens} leaves no room for a command: this model reads "
                        f"max_text={cfg.max_text} tokens in all; lower --max_new_tokens")
    if len(words) > room:
        raise UserError(f"the command is too long: {len(words)} words, commas counted, and {room} fit (max_text="
                        f"{cfg.max_text} less max_new_tokens={cfg.max_new_tokens} and 2); shorten it or lower "
                        "--max_new_tokens")
    special = [word for word in words if word in SPECIAL]
    if special:
        raise UserError(f"a command cannot hold {special[0]}, which only the model writes")
    return words, ids


@torch.no_grad()
def attention_maps(model, images, tokens, layers=slice(None), heads=slice(None)):
    """Where each token looks, mean over the chosen decoder layers and heads, with the logits of the same pass.

    model: in eval mode, or dropout shows; images (B, 3, S, S) normalised; tokens (B, K, T). Returns maps
    (B, K, T, side, side), each summing to 1 (0 for [PAD]), and logits (B, K, T, V), float32 on the model's device.
    """
    side = model.cfg.image_size // model.cfg.patch_size
    logits, attn = model.decode(model.encode(images), tokens, attn={"self": [], "cross": []})
    maps = attn["cross"][layers][:, :, heads].mean((0, 2))                        # (B*K, T, P)
    return maps.view(*tokens.shape, side, side), logits


def answer(model, cfg, tokenizer, state, device, picture, command):
    """What the model says to one command about one picture. The first five are what train.load_model returns.

    picture: uint8 (S, S, 3) with S = cfg.image_size. Returns a dict:
        verdict       "YES", "NO", or None for a description
        probability   of the verdict, from the two-way softmax over [YES] and [NO] at `?`; None for a description
        reason        text, or the description
        words         the command's words (n), as typed
        maps          float32 numpy (n + 1, side, side): one a word, the last that of the answer
    Raises UserError for a command that cannot be asked, see read_command.
    """
    words, ids = read_command(cfg, tokenizer, command)
    images = torch.from_numpy(train.normalise(np.asarray(picture)[None], state["mean"], state["std"])).to(device)
    tokens = torch.tensor([[ids]], device=device)
    maps, logits = attention_maps(model, images, tokens)
    logits = logits[0, 0, -1]
    describes = " ".join(words) in commands.DESCRIBE or logits.argmax().item() not in (YES, NO)
    verdict, probability, room = None, None, cfg.max_new_tokens
    if not describes:
        said = YES if logits[YES] >= logits[NO] else NO
        verdict, probability = SPECIAL[said][1:-1], torch.sigmoid((logits[YES] - logits[NO]).abs()).item()
        tokens, room = torch.cat((tokens, torch.tensor([[[said]]], device=device)), -1), room - 1
    new, _ = model.generate(images, tokens, room, beam=cfg.beam)
    reason = tokenizer.decode(i for i in new[0, 0].tolist() if i not in (YES, NO))
    return dict(verdict=verdict, probability=probability, reason=reason, words=words, maps=maps[0, 0, 1:].cpu().numpy())


def verdict_text(result):
    """`YES (93.1%)`, or `description` where nothing was to be decided."""
    return f"{result['verdict']} ({100 * result['probability']:.1f}%)" if result["verdict"] else "description"


def tidy(text):
    """Tokens joined by spaces, as one writes them: no space before a comma."""
    return re.sub(r" (?=[,:?.!])", "", text)


# ---- figures ----

INK, QUIET, ACCENT = "#1a1a1a", "#666666", "#d55e00"        # the accent is the vermilion of Okabe and Ito
COLUMNS = 6                   # panels a row at most
PANEL, GAP = 1.12, 0.09       # inches; six panels and the colour bar make a page's text width
FONT = 7.5                    # points, at the printed size
BACK = 0.78                   # mean grey of the picture below a map


def entropy(maps):
    """Entropy of maps (..., side, side) in nats: (...). 0 looks at one patch, log(side * side) at all alike."""
    maps = np.asarray(maps, np.float64)
    return 0 - (maps * np.log(np.where(maps > 0, maps, 1))).sum((-2, -1))       # 0 -, since -(0) prints as -0.00


def overlay_colours():
    """Colour map that is clear at its low end, and darker and less transparent the higher: it survives grey print."""
    colours = matplotlib.colormaps["plasma_r"](np.linspace(0, 1, 256))
    colours[:, 3] = np.linspace(0, 0.8, 256) ** 0.5
    return ListedColormap(colours).with_extremes(under=(0, 0, 0, 0))


def draw_maps(path, picture, labels, maps, title, subtitle, first="picture"):
    """Write a figure: the picture, then each map over it with its label, entropy and peak, on one colour scale.

    picture: uint8 (H, W, 3); labels: n texts, the last one set apart as the answer's; maps (n, side, side) that sum to
    1; title: lines of text, the first in bold; subtitle: one line below. Raises UserError if path cannot be written.
    """
    n, side = len(maps) + 1, maps.shape[-1]
    rows = math.ceil(n / COLUMNS)
    columns = math.ceil(n / rows)
    width = max(columns, 4) * (PANEL + GAP) + 0.62
    step = PANEL + 0.53                                     # a row: label, panel, numbers
    fit = lambda text, size: textwrap.wrap(text, int(width * 72 / (size * 0.56))) or [""]     # noqa: E731
    heading = [(line, FONT + 1.5, INK, "normal" if i else "bold") for i, text in enumerate(title)
               for line in fit(text, FONT + 1.5)]
    heading += [(line, FONT - 1, QUIET, "normal") for line in fit(subtitle, FONT - 1)]
    top = sum(size * 1.4 / 72 for _, size, _, _ in heading) + 0.12
    height = top + rows * step + 0.04
    figure = plt.figure(figsize=(width, height))

    def place(left, above, w, h):
        """Axes whose upper left corner is `left` and `above` inches from the figure's."""
        return figure.add_axes((left / width, 1 - (above + h) / height, w / width, h / height))

    y = 0.06
    for line, size, colour, weight in heading:
        figure.text(0.08 / width, 1 - y / height, line, fontsize=size, color=colour, weight=weight, va="top",
                    parse_math=False)
        y += size * 1.4 / 72

    relative = np.asarray(maps, np.float64) * side * side   # in multiples of uniform attention
    scale = LogNorm(1, max(4.0, relative.max()))            # a factor of 2 looks the same at 2 and at 20
    # Pale and of little contrast, so that the colours on it can be compared with those of the bar.
    grey = np.asarray(ImageOps.autocontrast(Image.fromarray(picture).convert("L"), 1)) / 255
    grey = BACK + 0.4 * (grey - grey.mean())
    shades = overlay_colours()
    for i in range(n):
        axes = place(0.08 + i % columns * (PANEL + GAP), top + i // columns * step + 0.18, PANEL, PANEL)
        axes.set(xticks=[], yticks=[])
        label = labels[i - 1] if i else first
        axes.set_title(label, fontsize=FONT * min(1, 15 / len(label)), color=ACCENT if i == n - 1 else INK,
                       weight="bold" if i else "normal", pad=2.5, parse_math=False)
        for spine in axes.spines.values():
            spine.set(color=ACCENT if i == n - 1 else QUIET, linewidth=1.6 if i == n - 1 else 0.5)
        extent = (0, side, side, 0)
        if i == 0:
            axes.imshow(picture, extent=extent, interpolation="antialiased")
            continue
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
        shown = axes.imshow(relative[i - 1], cmap=shades, norm=scale, extent=extent, interpolation="nearest")
        nats, most = entropy(maps[i - 1]), math.log(max(2, side * side))
        axes.set_xlabel(f"H {nats:.2f} nats ({100 * nats / most:.1f}%)\npeak {relative[i - 1].max():.1f}×",
                        fontsize=FONT - 1.5, color=QUIET, labelpad=2, linespacing=1.15)
    bar = place(0.08 + columns * (PANEL + GAP) + 0.03, top + 0.18, 0.09, (min(rows, 2) - 1) * step + PANEL)
    bar.set_facecolor(str(BACK))
    steps = (1,) if scale.vmax > 8 else (1, 1.5)            # 1, 1.5, 2, 3, 4 ... or, on a long scale, powers of 2
    ticks = [m * 2 ** k for k in range(20) for m in steps if m * 2 ** k <= scale.vmax]
    figure.colorbar(shown, cax=bar, ticks=ticks)
    bar.set_yticklabels(["≤1×"] + [f"{tick:g}×" for tick in ticks[1:]])
    bar.tick_params(labelsize=FONT - 1.5, length=2, pad=1.5)
    bar.minorticks_off()
    bar.set_ylabel("attention / uniform", fontsize=FONT - 1, color=INK, labelpad=2)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")      # a word in a script that the font lacks shows as boxes
            figure.savefig(path, dpi=200)
    except OSError as error:
        raise UserError(f"cannot write the figure {path}: {error}") from None
    finally:
        plt.close(figure)


def draw_answer(path, picture, result, cfg, tokenizer):
    """The figure of one `answer`: draw_maps with the command, the verdict and the reason above."""
    labels = [word if word in tokenizer.ids else f"{word} [UNK]" for word in result["words"]]
    side = cfg.image_size // cfg.patch_size
    draw_maps(path, np.asarray(picture), labels + ["answer" if result["verdict"] else "description"], result["maps"],
              [tidy(" ".join(result["words"])) + "?" * bool(result["verdict"]),
               f"{verdict_text(result)}: {tidy(result['reason'])}"],
              f"Cross-attention over {side} × {side} patches, mean of {cfg.text_layers} layers × {cfg.text_heads} "
              f"heads; 1 = uniform. H: entropy (% of its maximum, {math.log(side * side):.2f} nats).",
              f"picture, {cfg.image_size} px")


# ---- the script ----

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def list_pictures(path):
    """[path], or the picture files of the folder `path`, sorted by name. UserError when there are none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"no pictures in the folder {path}: their names end in {', '.join(SUFFIXES)}")
    return found


def main(cfg):
    if not cfg.image or not cfg.command:
        raise UserError("pass a picture and a command: python visualize.py --image=street.jpg "
                        "--command=\"is there a bus?\"")
    paths = list_pictures(cfg.image)
    model, cfg, tokenizer, state, device = train.load_model(cfg)
    words, _ = read_command(cfg, tokenizer, cfg.command)
    for word, close in dict.fromkeys(tokenizer.unknown(" ".join(words))):
        near = f"; the nearest it knows is '{close}'" if close else ""
        print(f"warning: the model does not know the word '{word}'{near}", file=sys.stderr)
    folder = Path(cfg.out_dir) / "answer"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to out_dir {cfg.out_dir}: {error}") from None

    many, stems, done = Path(cfg.image).is_dir(), Counter(p.stem for p in paths), 0
    for path in paths:
        try:
            picture = prepare.load_picture(path, cfg.image_size)
        except UserError as error:
            if not many:
                raise
            print(f"warning: skipped, {error}", file=sys.stderr)
            continue
        result = answer(model, cfg, tokenizer, state, device, picture, cfg.command)
        stem = path.stem if stems[path.stem] == 1 else path.name              # street.jpg beside street.png
        figure = folder / (stem[:80] + "-" + re.sub(r"[^a-z0-9]+", "-", " ".join(words))[:100].strip("-") + ".png")
        draw_answer(figure, picture, result, cfg, tokenizer)
        said = [verdict_text(result)] * (result["verdict"] is not None) + [tidy(result["reason"]), f"figure: {figure}"]
        print(f"{path.name}: " + "  ".join(said) if many else "\n".join(said), flush=True)
        done += 1
    if not done:
        raise UserError(f"none of the {len(paths)} pictures in {cfg.image} can be read")


if __name__ == "__main__":
    config.run(main, __doc__)
