"""Figures, the report, the interactive page, and the answer to any picture and command.

- `answer`: the verdict with its probability, the generated reason, and all attention of the command and the reason.
- A map is a row of cross-attention: it sums to 1 over patches. Where no head is named, it is the mean over all heads of
  all layers, in float32 whatever --dtype is. Figures show multiples of uniform attention, all maps of a figure on one
  colour scale, patches unsmoothed, and the boxes of what is asked outlined.
- All examples are drawn at random by --seed. Captions say how many questions there are and what the average of all is.
- Attention says where the decoder read, not what decided: the encoder has already mixed information between patches.

    python visualize.py                    out_dir/report.html and its figures, after train.py and evaluate.py
    python visualize.py --page=True        out_dir/page.html: choose scene, command, word, layer and head
    python visualize.py --image=street.jpg --command="is there a bus on the left?"
    python visualize.py --image=street.jpg --command="is there a bus?" --command2="is there a car?"
    python visualize.py --image=street.jpg --command="describe the scene" --beam=4

Shapes: P = rows * columns patches, n words of the command, L layers, H heads, T = n + 2 tokens.
"""
import base64
import csv
import functools
import html
import io
import json
import math
import random
import re
import textwrap
import zipfile
from collections import namedtuple
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize, PowerNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image, ImageOps

import commands
import config
import evaluate
import prepare
import train
from commands import QUESTIONS, Question, View, corners, tidy
from config import UserError
from evaluate import cover, distances, enrichment, entropy, mass_in_box, pointing, text_of
from tokenizer import NO, YES, split_words

# ---- answering ----

Shot = namedtuple("Shot", "verdict probability reason words cross maps said vision text picture boxes truth")


def yes_no(true):
    return "YES" if true else "NO"


@torch.no_grad()
def answer(subject, picture, command):
    """What the model says to one command about one picture.

    subject: evaluate.Subject; picture: uint8 (h, w, 3), of the size that the model was trained on. Returns a Shot:
        verdict       "YES", "NO", or None for a description
        probability   of the verdict, from the two-way softmax over [YES] and [NO] at `?`; None for a description
        reason        text, or the description
        words         the command's words (n)
        cross         float32 numpy (L, H, n + 1, rows, columns): one map per word; the last is that of the answer
        maps          their mean over layers and heads (n + 1, rows, columns)
        said          the same for each word of the reason, at the token before it, where it was chosen
        vision, text  self-attention, float32 numpy (layers, heads, P, P) and (L, H, T, T)
        picture       as given
        boxes         for each map the labels to outline: none, unless the caller adds them
        truth         "YES", "NO" or "unsure": None, unless the caller adds it
    Raises UserError where the command and max_new_tokens are too long together.
    """
    cfg = subject.cfg
    ids = subject.tokenizer.prompt(command)
    # The reason has to fit behind the command, into the positions that the model was trained with.
    if len(ids) + cfg.max_new_tokens > cfg.max_text:
        raise UserError(f"max_new_tokens={cfg.max_new_tokens} and the {len(ids)} tokens of this command are more than "
                        f"max_text={cfg.max_text}: lower --max_new_tokens")
    # The prompt has [SOS] and `?` besides the words.
    words = [subject.tokenizer.words[i] for i in ids[1:-1]]
    # No autocast: in bfloat16, which has 8 bits, the largest patches of a map would tie.
    images = subject.images(picture[None])
    vision = subject.model.encode(images)

    verdict = None
    probability = None
    spoken = []
    template, _ = commands.askable()[commands.only_words(command)]
    if template not in commands.DESCRIPTIONS:
        # The verdict is decided by its odds against the other alone; generation continues from it.
        tokens = torch.tensor([ids], device=subject.device)
        odds, = subject.model.odds(vision, tokens, torch.ones_like(tokens))
        verdict = yes_no(odds >= 0)
        probability = torch.sigmoid(odds.abs()).item()
        spoken = [YES if odds >= 0 else NO]
    prompt = torch.tensor([ids + spoken], device=subject.device)
    new = subject.model.generate(vision, prompt, cfg.max_new_tokens - len(spoken), beam=cfg.beam)
    reason = subject.tokenizer.decode(new[0].tolist())

    # Generation keeps no attention. One pass over all that was said has it: no token sees those that follow.
    count = len(reason.split())
    _, attn = subject.model(images, torch.cat((prompt, new[:, :count]), 1), return_attn=True)
    attn = {name: weights[:, 0].cpu().numpy() for name, weights in attn.items()}
    cross = attn["cross"].reshape(cfg.text_layers, cfg.text_heads, -1, *subject.grid)
    said = cross[:, :, -count - 1:-1].mean((0, 1))
    # [SOS] comes first and has no map; the map at `?` is that of the answer.
    cross = cross[:, :, 1:len(ids)]
    text = attn["self"][:, :, :len(ids), :len(ids)]
    return Shot(verdict, probability, reason, words, cross, cross.mean((0, 1)), said, attn["vision"], text, picture,
                [()] * (len(words) + 1), None)


def verdict_text(shot):
    """`YES (93.1%)`, or `description` where there was nothing to decide."""
    return f"{shot.verdict} ({100 * shot.probability:.1f}%)" if shot.verdict else "description"


def asked_text(shot):
    return tidy(" ".join(shot.words)) + "?" * bool(shot.verdict)


def title_of(shot):
    return f"{asked_text(shot)}\n{verdict_text(shot)}: {tidy(shot.reason)}"


# ---- drawing: colours and files ----

INK = "#1a1a1a"
QUIET = "#666666"
BOX = "#00735a"
# The palette of Okabe and Ito (2008), whose colours colour-blind readers can tell apart too.
SERIES = ("#0072b2", "#d55e00", INK, "#999999")
ACCENT = SERIES[1]
# Inches: the text of an A4 page is 7.1 wide, so that figures are printed at their own size.
WIDTH = 7.1
PANEL = 1.2                   # largest side of a panel
FONT = 7.5                    # points
SMALL = dict(fontsize=FONT - 1, color=QUIET)
DOTTED = dict(color=INK, lw=0.6, ls=":")        # a line to compare with
BACK = 0.78                   # mean grey of the picture below a map
# Animations are for screens only; at the dots of print their files would be huge.
SCREEN_DPI = 120
LOOP = 5000                   # milliseconds of an animation
matplotlib.rcdefaults()       # whatever a matplotlibrc of the user says
matplotlib.rcParams.update({
    "font.size": FONT, "axes.titlesize": FONT + 0.5, "xtick.labelsize": FONT - 0.5, "ytick.labelsize": FONT - 0.5,
    "legend.fontsize": FONT - 0.5, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3, "axes.titleweight": "bold",
    "figure.titleweight": "bold", "axes.titlelocation": "left", "pdf.fonttype": 42, "axes.formatter.min_exponent": 2})


def save(drawn, path, dpi, vector=False):
    """Write a figure to path.png and, with `vector`, to path.pdf; a list of figures, as an animation, to path.webp.
    Returns the files."""
    if isinstance(drawn, list):
        return save_animation(drawn, path)
    files = [Path(f"{path}.png")]
    if vector:
        files.append(Path(f"{path}.pdf"))
    for file in files:
        drawn.savefig(file, dpi=dpi, bbox_inches="tight", pad_inches=0.05)
    return files


def save_animation(figures, path):
    """Write figures as the frames of path.webp. Returns the file in a list, as `save` does."""
    frames = []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=SCREEN_DPI)
        frames.append(Image.open(buffer).convert("RGB"))
    file = Path(f"{path}.webp")
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=LOOP // len(frames), loop=0, quality=85)
    return [file]


def overlay(name, low):
    """matplotlib's 256 colours `name` for values from `low` to 1: clear at 0, less transparent the farther from it."""
    colours = matplotlib.colormaps[name](range(256))
    # Never opaque, so that the picture is seen below; the root makes small values visible.
    colours[:, 3] = np.abs(0.8 * np.linspace(low, 1, 256)) ** 0.5
    return ListedColormap(colours).with_extremes(under=(0, 0, 0, 0))


OVERLAY = overlay("plasma_r", 0)
CHANGE = overlay("PuOr", -1)

# ---- drawing: panels, which hold pictures and maps ----

Panel = namedtuple("Panel", "picture map label boxes note", defaults=(None, "", (), ""))
# picture: uint8 (h, w, 3); map (rows, columns), which sums to 1, or the difference of two such, which sums to 0;
# label: text above; boxes: labels whose boxes to outline; note: text below, before the numbers of the map


def is_change(panel):
    """Whether the panel shows a difference of two maps, which is negative somewhere."""
    return panel.map is not None and panel.map.min() < 0


def peak(maps):
    """Largest value of maps (..., rows, columns) in multiples of uniform attention."""
    return math.prod(maps.shape[-2:]) * np.abs(maps).max()


def label_at(*edges):
    """A label whose box has these edges (x1, y1, x2, y2), in pixels."""
    return dict(box2d=dict(zip(commands.EDGES, edges)))


def rounded(values, digits=0):
    """Rounded numbers without -0, which would be printed as such."""
    return np.round(values, digits) + 0.0


def note_of(panel):
    """The text below a panel: its note and, for a map, entropy, peak and, with boxes, its share in them."""
    # A difference of maps is no distribution: it has no entropy and no share in a box.
    if panel.map is None or is_change(panel):
        return panel.note
    flat = panel.map.ravel()
    # Rounding can make an entropy of 0 negative, which would be printed as -0.00.
    text = f"{panel.note}\nH {abs(entropy(flat)):.2f}, peak {peak(panel.map):.0f}×"
    if panel.boxes:
        share = cover(panel.boxes, panel.picture.shape[1::-1], panel.map.shape)
        text += f"\nbox {100 * mass_in_box(flat, share):.0f}%, {enrichment(flat, share):.1f}×"
    return text.strip()


def wrapped(text, inches, points):
    """`text` in lines that fit into `inches` at a font size in points."""
    letters = max(4, int(inches * 72 / (points * 0.55)))
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, letters))


def most_lines(texts):
    return max((len(text.splitlines()) for text in texts), default=0)


def draw_panels(rows, title, subtitle=None, vmax=0.0):
    """A figure of rows of panels; all their maps on one colour scale, in multiples of uniform attention.

    rows: [(text left of the row, its panels)]; title, subtitle: text above and below, by default what the maps are;
    vmax: least upper end of the scale, for figures that share one.
    """
    every = [panel for _, panels in rows for panel in panels]
    shown = [panel for panel in every if panel.map is not None]
    changes = [peak(panel.map) for panel in shown if is_change(panel)]
    maps = [peak(panel.map) for panel in shown if not is_change(panel)]
    # One scale for all maps, so that panels can be compared: logarithmic, so that 2 to 4 looks like 20 to 40. Its upper
    # end is at least 4 times uniform attention: else a map of noise would look as strong as one that finds an object.
    scale = ScalarMappable(LogNorm(1, max(4.0, vmax, *maps)), OVERLAY)
    # And one for all differences of two maps, with 0 in the middle.
    most = max([2.0, *changes])
    change = ScalarMappable(SymLogNorm(1, vmin=-most, vmax=most), CHANGE)
    if subtitle is None:
        subtitle = maps_line(shown[0].map.shape)

    # Inches that the colour bar and the texts of the rows take.
    margin = 0.9 + 0.9 * any(text for text, _ in rows)
    columns = max(len(panels) for _, panels in rows)
    size = min(PANEL, (WIDTH - margin) / columns)
    font = FONT if size > 0.9 else FONT - 1.5
    width = max(columns * size + margin, 4.6)
    # The figure's height is estimated from the lines of text in each row; the layout fits the panels into it.
    height = 0.7
    tall, wide, _ = every[0].picture.shape
    for _, panels in rows:
        labels = most_lines(wrapped(panel.label, size, font) for panel in panels)
        notes = most_lines(map(note_of, panels))
        height += size * tall / wide + 0.1 + (1.2 * font * labels + 1.15 * (font - 1) * notes) / 72
    figure = Figure((width, height), layout="compressed")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)

    figure.suptitle(wrapped(title, width, FONT + 1.5), x=0.01, ha="left")
    figure.supxlabel(wrapped(subtitle, width, FONT - 1), x=0.01, ha="left", **SMALL)
    for line, (text, panels) in zip(axes, rows):
        line[0].text(-0.08, 0.5, wrapped(text, 1, FONT - 1), fontsize=FONT - 1, ha="right", va="center",
                     transform=line[0].transAxes)
        for axis, panel in zip(line, panels):
            draw_panel(axis, panel, change if is_change(panel) else scale, size, font)
        # A row may have fewer panels than the longest one.
        for axis in line[len(panels):]:
            axis.axis("off")
    if changes:
        colour_bar(axes, change, (-16, -4, -1, 0, 1, 4, 16), "(second − first) / uniform")
    if maps:
        colour_bar(axes, scale, [2 ** k for k in range(16)], "attention / uniform")
    return figure


def draw_panel(axes, panel, scale, size, font):
    """One panel: its picture, its map, its boxes, the text above and below. size: of its width, in inches."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(wrapped(panel.label, size, font), fontsize=font, pad=2.5, loc="center", color=INK,
                   weight="normal")
    axes.set_xlabel(note_of(panel), fontsize=font - 1, color=QUIET, labelpad=2, linespacing=1.15)
    axes.spines[:].set(visible=True, color=QUIET, linewidth=0.5)
    height, width = panel.picture.shape[:2]
    extent = (0, width, height, 0)
    if panel.map is None:
        axes.imshow(panel.picture, extent=extent)
    else:
        # Pale and of little contrast, so that the colours on it can be compared with those of the bar.
        grey = np.asarray(ImageOps.autocontrast(Image.fromarray(panel.picture).convert("L"), 1)) / 255
        axes.imshow(BACK + 0.4 * (grey - grey.mean()), cmap="gray", vmin=0, vmax=1, extent=extent)
        axes.imshow(panel.map * panel.map.size, scale.cmap, scale.norm, extent=extent, interpolation="nearest")
    # A white rim, so that the green is seen on every colour.
    for label in panel.boxes:
        x1, y1, x2, y2 = corners(label)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=BOX, lw=0.9,
                                 path_effects=[withStroke(linewidth=1.9, foreground="white")]))


def colour_bar(axes, scale, ticks, name):
    """The colours of `scale` beside all axes, with those of the ticks that lie on it."""
    ticks = [tick for tick in ticks if abs(tick) <= scale.norm.vmax]
    bar = axes[0, 0].figure.colorbar(scale, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_ticks(ticks, labels=[f"{tick}×" for tick in ticks])
    bar.set_label(name, fontsize=FONT - 1)
    # The colours are partly transparent: they stand on the same grey as on a picture.
    bar.ax.set_facecolor(str(BACK))
    bar.ax.minorticks_off()


# ---- drawing: plots ----

def plot(rows, columns, height, **kwargs):
    """(figure, axes of its first row, of its second, ...); it is WIDTH wide, height is in inches too."""
    figure = Figure((WIDTH, height), layout="constrained")
    return figure, *figure.subplots(rows, columns, squeeze=False, **kwargs)


def heat(axes, table, rows, columns, texts, cmap="cividis", norm=None, bar="", **labels):
    """A heat map; texts: a format for its cells, or a list of lists of texts. Cells that are NaN stay empty."""
    image = axes.imshow(table, matplotlib.colormaps[cmap].with_extremes(bad="#e8e8e8"), norm, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for (i, j), value in np.ndenumerate(table):
        if not np.isfinite(value):
            continue
        # White text on dark cells: the weights are those of luminance.
        text = texts.format(value) if isinstance(texts, str) else texts[i][j]
        dark = np.dot(image.to_rgba(value)[:3], (0.3, 0.59, 0.11)) < 0.5
        axes.text(j, i, text, ha="center", va="center", fontsize=FONT - 2, color="white" if dark else INK)
    if bar:
        axes.figure.colorbar(image, ax=axes, label=bar, fraction=0.05, pad=0.02).ax.tick_params(length=2)
    axes.set(**labels)


def intervals(axes, rows, colour=SERIES[0], others=(), shift=0.0, label=None, bars=True):
    """{name: evaluate.estimate} as dots with intervals, one below the other; those named in `others` in grey.

    bars: a bar and the value too; shift: of the dots, where several series share the names.
    """
    axes.plot([], [], "o", color=colour, label=label)        # for the legend, whatever has a value
    for k, (name, estimate) in enumerate(rows.items()):
        y = k + shift
        value = estimate["value"]
        # Undefined where all questions of a group have the same true answer.
        if value is None:
            axes.text(0.02, y, "no data", transform=axes.get_yaxis_transform(), va="center", **SMALL)
            continue
        shade = SERIES[3] if name in others else colour
        axes.plot((estimate["low"], estimate["high"]), (y, y), color=shade)
        axes.plot(value, y, "o", color=shade)
        if bars:
            axes.barh(y, value, 0.6, color=shade, alpha=0.35, lw=0)
            axes.annotate(f"{value:.1f}", (estimate["high"], y), (4, 0), textcoords="offset points", va="center",
                          color=QUIET, fontsize=FONT - 1.5)
    axes.set_yticks(range(len(rows)), rows)
    # The first row on top.
    axes.set_ylim(len(rows) - 0.4, -0.6)


def say_if_empty(axes, values):
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", **SMALL)


def band(axes, names, estimates, colour=SERIES[0], label=None):
    """A line through evaluate.estimates, with their intervals. names: what stands below each."""
    value, low, high = (np.array([e[k] for e in estimates]) for k in ("value", "low", "high"))
    say_if_empty(axes, value)
    axes.errorbar(range(len(value)), value, (value - low, high - value), fmt="o-", color=colour, label=label)
    axes.set_xticks(range(len(names)), names)


# ---- figures of one scene and command; `shot` is what answer() returned ----

def maps_line(grid, rest="Mean of all layers and heads."):
    rows, columns = grid
    return f"Colour: how many times more attention than an even spread over {columns} × {rows} patches. " \
           f"H: entropy in nats (at most {math.log(rows * columns):.2f}). Box: share of attention in the boxes, and " \
           f"how many times more than their area. {rest}"


def in_rows(panels, columns):
    """Panels as rows of draw_panels, without texts."""
    return [("", panels[start:start + columns]) for start in range(0, len(panels), columns)]


def shot_panel(shot, label, found=None):
    """The picture of a shot, with a map (rows, columns) or without, and the boxes of its answer."""
    return Panel(shot.picture, found, label, shot.boxes[-1])


def answer_panel(shot, label):
    """shot_panel with the map of the answer."""
    return shot_panel(shot, label, shot.maps[-1])


def draw_maps(shot, panels, rest, vmax=0.0):
    """The picture and panels of maps. rest, vmax: as in maps_line and draw_panels."""
    panels = [shot_panel(shot, "picture"), *panels]
    # At most six in a row: with more, the texts below them would run into each other.
    columns = math.ceil(len(panels) / math.ceil(len(panels) / 6))
    return draw_panels(in_rows(panels, columns), title_of(shot), maps_line(shot.maps.shape[1:], rest), vmax)


def word_panels(shot, maps):
    """A panel for each word and for the answer, of maps (n + 1, rows, columns)."""
    names = shot.words + ["answer" if shot.verdict else "description"]
    return [Panel(shot.picture, *entry) for entry in zip(maps, names, shot.boxes)]


def draw_words(shot):
    """The mean map of each word and of the answer."""
    layers, heads = shot.cross.shape[:2]
    return draw_maps(shot, word_panels(shot, shot.maps), f"Mean of {layers} layers × {heads} heads.")


def draw_reason(shot):
    """Where the model looked as it chose each word of its reason."""
    panels = [Panel(shot.picture, *entry) for entry in zip(shot.said, shot.reason.split())]
    return draw_maps(shot, panels, "Mean of all layers and heads, as each word was chosen.")


def draw_layers(shot):
    """draw_words layer by layer: a list of figures, the frames of an animation, on one scale."""
    heads = shot.cross.shape[1]
    by_layer = shot.cross.mean(1)                        # (L, n + 1, rows, columns)
    vmax = peak(by_layer)
    return [draw_maps(shot, word_panels(shot, maps), f"Layer {layer}, mean of {heads} heads.", vmax)
            for layer, maps in enumerate(by_layer)]


def draw_heads(shot):
    """The answer's map in every head of every layer."""
    rows = [(f"layer {layer}", [shot_panel(shot, f"head {head}", found) for head, found in enumerate(maps)])
            for layer, maps in enumerate(shot.cross[:, :, -1])]
    return draw_panels(rows, title_of(shot), maps_line(shot.maps.shape[1:], "All heads, at the answer."))


def draw_vision(shot):
    """Self-attention of the encoder from the patch that the answer looked at most: heads, their mean and rollout."""
    grid = shot.maps.shape[1:]
    patch = shot.maps[-1].argmax()
    row, column = divmod(patch, grid[1])
    height, width = np.divide(shot.picture.shape[:2], grid)             # of a patch, in pixels
    outlined = label_at(column * width, row * height, (column + 1) * width, (row + 1) * height)
    flow = np.eye(math.prod(grid))
    rows = []
    for layer, weights in enumerate(shot.vision):
        mean = weights.mean(0)
        # Half of a block's output comes from its attention, half from the residual path.
        flow = (mean @ flow + flow) / 2
        shown = {f"head {head}": found for head, found in enumerate(weights)}
        shown["mean"] = mean
        shown["rollout to here"] = flow
        rows.append((f"layer {layer}", [Panel(shot.picture, found[patch].reshape(grid), name, [outlined])
                                        for name, found in shown.items()]))
    return draw_panels(rows, f"What the outlined patch looks at, for: {asked_text(shot)}",
                       "Vision self-attention; the patch is the one that the answer looked at most. Rollout: attention "
                       "and residual path multiplied through the layers (Abnar and Zuidema 2020).")


def draw_text(shot):
    """Self-attention of the decoder, tokens by tokens."""
    tokens = ["[SOS]", *shot.words, "?"]
    figure, axes = plot(1, len(shot.text), 2.9, sharey=True)
    for layer, (axis, weights) in enumerate(zip(axes, shot.text.mean(1))):
        # No token sees those that follow it.
        past = np.where(np.tri(len(tokens)), weights, np.nan)
        # A square root, because a row of T tokens that look at all alike has only 1/T in each cell.
        heat(axis, past, tokens, tokens, "", norm=PowerNorm(0.5, 0, 1), title=f"layer {layer}")
        axis.tick_params("x", rotation=90)
    axes[0].set_ylabel("the token that looks ...")
    # The first token tells nothing, and every token sees itself.
    earlier = np.tril(shot.text.mean((0, 1)), -1)[2:, 1:]
    most = "The earlier word that each looks at most: " + ", ".join(
        f"{token} → {tokens[1:][k]}" for token, k in zip(tokens[2:], earlier.argmax(1)))
    figure.supxlabel("... at this token; grey: the future, hidden by the causal mask\n" + wrapped(most, WIDTH, FONT),
                     fontsize=FONT)
    figure.suptitle("Self-attention of the decoder: which earlier words each word looks at", x=0.01, ha="left")
    figure.colorbar(axis.images[0], ax=axes, label="attention, mean of heads", fraction=0.02, pad=0.01)
    return figure


def draw_comparison(pairs):
    """Two commands about one picture in a row: the picture, the answers' maps, and their difference."""
    rows = []
    for pair in pairs:
        picture = pair[0].picture
        first, second = (shot.maps[-1] for shot in pair)
        apart = distances(first.ravel(), second.ravel())
        note = "L2 {l2:.3f}\ncosine {cosine:.2f}\nJensen-Shannon {js:.3f}".format(**apart)
        answers = [answer_panel(shot, f"{asked_text(shot)}\n{verdict_text(shot)}") for shot in pair]
        change = Panel(picture, second - first, "second − first", note=note)
        rows.append(("", [Panel(picture, label="picture"), *answers, change]))
    return draw_panels(rows, "One picture, two commands: where the answer looked")


SCENE = {"words": draw_words, "reason": draw_reason, "layers": draw_layers, "heads": draw_heads,
         "vision": draw_vision, "text": draw_text}

# ---- the report: model, questions and evaluate.py's files ----

class Report:
    """What all figures are drawn from. Raises UserError, with the command that makes what is missing.

    subject, cfg, grid: evaluate.Subject, its settings, its patches; meta: of the data; size: (width, height) of the
    pictures; seed: of all random choices; page: eval.json; failures: dicts; stored: attention.npz; nats: entropy of the
    answer maps in it; asked: evaluate.Questions of the page's split.
    """

    def __init__(self, cfg):
        self.subject = evaluate.Subject(cfg)
        self.meta = self.subject.take_data()
        self.cfg = self.subject.cfg
        self.grid = self.subject.grid
        self.size = prepare.size_of(self.cfg)
        self.seed = self.cfg.seed
        out = Path(self.cfg.out_dir)
        again = f"run python evaluate.py --out_dir={out} (and the --checkpoint and --data_dir given here, if any)"
        try:
            self.page = json.loads((out / "eval.json").read_text("utf-8"))
            self.failures = list(prepare.json_lines(out / "failures.jsonl"))
            with np.load(out / "attention.npz") as stored:
                self.stored = dict(stored)
            found = "format {format}, step {step}, data {data_hash}".format(**self.page)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"evaluate.py's files cannot be read ({error}): {again}") from None
        # Figures of one checkpoint with numbers of another would be wrong without looking wrong.
        here = f"format {evaluate.FORMAT}, step {self.subject.state['step']}, data {self.meta['hash']}"
        if found != here:
            raise UserError(f"{out / 'eval.json'} is of {found}; the checkpoint and data here want {here}: {again}")
        self.nats = entropy(self.stored["answer_maps"].astype(np.float64))
        self.asked = evaluate.Questions(self.subject, self.meta, self.page["split"])

    @functools.cached_property
    def at_places(self):
        """Numbers of the questions about an object at a place that is there. Raises UserError if there are none."""
        found = np.flatnonzero(self.asked.truth & [q.template == "exists_at" for q in self.asked.questions])
        if not len(found):
            raise UserError("No question about an object at a place has the answer YES.")
        return found

    def some(self, found, count):
        """Up to `count` of a list, drawn by the seed."""
        order = np.random.default_rng(self.seed).permutation(len(found))
        return [found[k] for k in order[:count]]

    def pictures(self):
        """Yield the questions (n,) of one picture after the other, both in an order drawn by the seed."""
        rng = np.random.default_rng(self.seed)
        for picture in rng.permutation(np.unique(self.asked.picture)):
            yield rng.permutation(np.flatnonzero(self.asked.picture == picture))

    def boxes(self, i):
        """Labels to outline for each word of question i and, last, for its answer."""
        asked = self.asked
        return named_boxes(asked.frame(i), asked.view(i), asked.questions[i], asked.items[i]["command"])

    def shot(self, i):
        """`answer` to question i, with the boxes of what it asks and the truth."""
        shot = answer(self.subject, self.asked.pixels(i), self.asked.items[i]["command"])
        return shot._replace(boxes=self.boxes(i), truth=yes_no(self.asked.truth[i]))

    @functools.cached_property
    def example(self):
        """The Shot that several figures show: of a question about an object at a place that is there."""
        return self.shot(*self.some(self.at_places, 1))

    def drawn(self, spec, question, command):
        """`shot` of a command about a scene that is drawn now. spec: of the scene; question: what the command asks."""
        frame = prepare.scene_frame(spec, self.cfg)
        view = View(frame, self.cfg)
        shot = answer(self.subject, prepare.draw_scene(spec, self.size), command)
        truth = ("NO", "unsure", "YES")[question.truth(view)]
        return shot._replace(boxes=named_boxes(frame, view, question, command), truth=truth)

    def panel(self, i, found=None, **changes):
        """Question i, its picture, with a map (P,) or without, and the boxes of its answer; changes: other fields."""
        if found is not None:
            found = found.reshape(self.grid)
        text = tidy(self.asked.items[i]["command"]) + "?"
        return Panel(self.asked.pixels(i), found, text, self.boxes(i)[-1])._replace(**changes)


def named_boxes(frame, view, question, command):
    """Labels of the certain objects that each word of the command names and, last, of those that make it YES."""
    found = []
    for word in split_words(command):
        # A word names all certain objects of its kind: where they should be comes later in the command.
        found.append([thing for category in question.objects if word in commands.NAMED[category]
                      for thing in view.certain(category)])
    found.append(question.evidence(view))
    return [[frame["labels"][thing.label] for thing in things] for things in found]


# ---- figures of a set: maps. Each returns (figure, caption), or raises UserError if there is nothing to show ----

COLUMNS = 5


def figure_pictures(report):
    asked = report.asked
    panels = []
    for i, *_ in islice(report.pictures(), 2 * COLUMNS):
        labels = asked.frame(i)["labels"]
        panel = report.panel(i, boxes=[labels[thing.label] for thing in asked.view(i).seen()])
        truth = f"{yes_no(asked.truth[i])}: {tidy(asked.items[i]['reason'])}"
        panels.append(panel._replace(label=f"{panel.label}\n{truth}"))
    figure = draw_panels(in_rows(panels, COLUMNS), "Pictures and questions",
                         "Outlined: every object that counts as seen.")
    return figure, (
        f"{len(panels)} of the {len(asked.frames)} pictures of the {report.page['split']} split and one question about "
        f"each, drawn at random (seed {report.seed}). Above each picture: the question, its true answer and the "
        "reason.")


def figure_scene(draw, caption):
    """The figure function that draws one YES question about an object at a place."""
    def figure(report):
        shot = report.example
        return draw(shot), (
            f"{caption} One question, drawn at random (seed {report.seed}) among the {len(report.at_places)} about an "
            f"object at a place whose answer is YES: “{asked_text(shot)}”")
    return figure


def named_in(report, name):
    """{question: (its token `name`, a kind or a place; boxes of what it names)}, for those where that is there."""
    width, height = report.size
    found = {}
    for i, question in enumerate(report.asked.questions):
        words = split_words(report.asked.items[i]["command"])
        at = [t for t, word in enumerate(words) if word in commands.NAMED.get(name, {name})]
        # A word may stand in a question without naming what to look for, such as "left" in "may we turn left".
        if not at or name not in (*question.objects, question.place):
            continue
        if name in commands.PLACES:
            third = commands.PLACES.index(name)
            boxes = [label_at(third * width / 3, 0, (third + 1) * width / 3, height)]
        else:
            boxes = report.boxes(i)[at[0]]
        if boxes:
            # The prompt begins with [SOS], so a token comes one later than its word.
            found[i] = at[0] + 1, boxes
    return found


def figure_gallery(report):
    asked = report.asked
    rows = []
    for name in ("pedestrian", "traffic light", "car", "bicycle", "left", "right"):
        named = named_in(report, name)
        chosen = asked.sample(300, report.seed, list(named))
        # Real pictures may hold no bicycles.
        if len(chosen) < COLUMNS:
            continue
        tokens, boxes = zip(*(named[i] for i in chosen))
        looks = report.subject.look(asked.jobs(chosen))
        maps = np.array([maps[:, :, token].mean((0, 1)) for token, (_, maps) in zip(tokens, looks)])
        covers = np.array([cover(labels, report.size, report.grid) for labels in boxes])
        text = f"“{name}”\nn={len(chosen)}\npoints {100 * pointing(maps, covers).mean():.0f}%\n(chance " \
               f"{100 * (covers > 0).mean():.0f}%)\nenriched {np.median(enrichment(maps, covers)):.1f}×"
        examples = report.some(range(len(chosen)), COLUMNS)
        rows.append((text, [report.panel(chosen[k], maps[k], boxes=boxes[k]) for k in examples]))
    if not rows:
        raise UserError(f"No word of these names what is there in {COLUMNS} questions.")
    return draw_panels(rows, "Where one word looks, scene after scene"), (
        f"Each row follows one word through {COLUMNS} questions, drawn at random (seed {report.seed}). Left, for n "
        "questions with this word: how often the strongest patch touches a box of what the word names (chance: a "
        "random patch), and the median of how many times more attention the boxes get than their area. For left and "
        "right the box is that third of the picture.")


def figure_comparison(report):
    asked = report.asked
    pairs = []
    for questions in report.pictures():
        # Two objects that are there, each at its place: the maps should differ, if attention follows the command.
        kinds = {}
        for i in questions:
            if i in report.at_places:
                kinds.setdefault(asked.questions[i].category, i)
        if len(kinds) > 1:
            pairs.append([report.shot(i) for i in islice(kinds.values(), 2)])
        if len(pairs) == 3:
            break
    if not pairs:
        raise UserError("No picture has questions about two objects at a place whose answers are YES.")
    other, same = (report.page["attention"]["stability"][name]["l2"] for name in ("another question", "paraphrase"))
    return draw_comparison(pairs), (
        f"{len(pairs)} pictures with two questions about different objects that are there, drawn at random (seed "
        f"{report.seed}). Difference: orange where the first question looks more, purple where the second does. Over "
        f"{other['n']} random questions the mean L2 distance to the map of another question is "
        f"{text_of(other, digits=3)}, to that of a paraphrase {text_of(same, digits=3)}.")


def figure_decides(report):
    asked = report.asked
    rows = []
    for i in asked.sample(4, report.seed, report.at_places):
        shot = report.shot(i)
        looked = shot.maps[-1].ravel()
        patches = np.arange(len(looked))
        # All patches stay in the first picture; in each of the others one is hidden.
        shown = [evaluate.hide(report.subject, shot.picture, patches == hidden) for hidden in (-1, *patches)]
        odds = report.subject.ask([(picture, [asked.prompts[i]]) for picture in shown])
        # What makes a NO likelier when it is hidden spoke for YES. The least number stands for "nothing mattered".
        lost = np.maximum(odds[0] - odds[1:], 1e-9)
        lost = lost / lost.sum()
        alike = distances(looked, lost)["cosine"]
        rows.append((f"{asked_text(shot)}\n{verdict_text(shot)}", [
            shot_panel(shot, "scene"), answer_panel(shot, "where it looked"),
            report.panel(i, lost, label="what mattered", note=f"cosine {alike:.2f}")]))
    return draw_panels(rows, "Where the answer looked, and what it depended on"), (
        f"Four of {len(report.at_places)} YES questions about an object at a place, drawn at random (seed "
        f"{report.seed}). Middle: the map of the answer. Right: each patch is hidden in turn, and the log-odds of YES "
        "fall; colour: the share of this patch in all that is lost, in the same multiples of an even spread. Patches "
        "that raise them when hidden count as 0. A hidden patch is a grey square, which may itself look like "
        "something.")


STEPS = 24                     # of a pedestrian who crosses the street


def walk(report):
    """A pedestrian crosses a drawn street in STEPS steps: yields a Shot of "is there a pedestrian ahead" at each.

    The scene has no other pedestrians, and nothing nearer than this one.
    """
    question = Question("exists_at", "pedestrian", "ahead")
    # In even light, so that people see as much as the model.
    spec = dict(prepare.sample_scene(f"walk {report.seed}", report.cfg), gain=1.0, gamma=1.0)
    person = prepare.sample_object(random.Random(report.seed), dict(spec, objects=[]), "pedestrian", report.cfg,
                                   "ahead", near=True)
    others = [o for o in spec["objects"] if o["z"] > person["z"] and o["kind"] != "pedestrian"]
    for across in np.linspace(0.06, 0.94, STEPS):
        x = (across - spec["centre"]) * person["z"] / spec["focal"]
        scene = dict(spec, objects=[*others, dict(person, x=x)])
        yield report.drawn(scene, question, "is there a pedestrian ahead")


def figure_walk(report):
    if report.cfg.source != "drawn":
        raise UserError("Only a model of drawn scenes can be asked about a scene that is drawn anew.")
    steps = list(walk(report))
    # One scale for all frames of the animation.
    named = steps[0].words.index("pedestrian")
    vmax = max(peak(shot.maps[[named, -1]]) for shot in steps)
    figures = []
    for shot in steps:
        panels = [shot_panel(shot, f"truth: {shot.truth}"),
                  Panel(shot.picture, shot.maps[named], "the word “pedestrian”", shot.boxes[named]),
                  answer_panel(shot, f"the answer: {verdict_text(shot)}")]
        figures.append(draw_panels([("", panels)], asked_text(shot), "", vmax))
    return figures, (
        f"A pedestrian crosses a drawn street in {STEPS} steps, and the same question is asked at each (animated; a "
        "printed page shows the first step). Nothing else in the scene changes. At the borders of “ahead” the truth "
        "is unsure.")


def figure_twins(report):
    asked = report.asked
    edits = asked.twins("flip")
    if not edits:
        raise UserError("Only test scenes that prepare.py draws have twins; here none has.")
    rows = []
    for i, edit in report.some(edits, 4):
        shot = report.shot(i)
        # Drawn anew from the edited scene: all pixels that the edit does not touch stay the same.
        edited = prepare.apply_edit(asked.spec(i), edit)
        twin = report.drawn(edited, asked.questions[i], asked.items[i]["command"])
        rows.append((asked_text(shot), [
            shot_panel(shot, "scene"), answer_panel(shot, f"{verdict_text(shot)}\ntruth {shot.truth}"),
            shot_panel(twin, f"twin: {edit['kind']}"),
            answer_panel(twin, f"{verdict_text(twin)}\ntruth {twin.truth}")]))
    both = report.page["twins"]["both_right"]
    return draw_panels(rows, "Twins: one edit flips the truth"), (
        f"{len(rows)} of {len(edits)} questions, drawn at random (seed {report.seed}): the scene and where the answer "
        "looked; then the scene after one edit that makes the other answer true, and where the answer looked then. "
        f"Both answers are right for {text_of(both, '%')} of {both['n']} pairs; chance is 25%.")


def figure_failures(report):
    asked = report.asked
    where = np.array([asked.at[row] for row in report.stored["failure_items"]])
    # Only of these questions does a wrong NO say that an object which is there is not there.
    denied = [asked.truth[i] and asked.questions[i].template in ("exists", "exists_at", "near") for i in where]
    if not any(denied):
        raise UserError("No wrong answer denies an object that is there.")
    missed = where[denied]
    maps = report.stored["failure_maps"][denied].mean((1, 2), np.float64)
    covers = np.array([cover(report.boxes(i)[-1], report.size, report.grid) for i in missed])
    # A map is diffuse where it is more spread than nine of ten answers' maps.
    usual = np.percentile(report.nats, 90)
    diffuse = entropy(maps) > usual
    hit = pointing(maps, covers) > 0.5
    rows = []
    for name, mine in {"wrong region": ~diffuse & ~hit, "diffuse": diffuse,
                       "right region, wrong answer": ~diffuse & hit}.items():
        text = f"{name}\nn={mine.sum()}\n{100 * mine.mean():.0f}%"
        chosen = report.some(np.flatnonzero(mine), COLUMNS)
        rows.append((text, [report.panel(missed[k], maps[k]) for k in chosen]))
    return draw_panels(rows, "Objects that were there and were denied"), (
        f"Of {len(where)} wrong answers, drawn at random, the {len(missed)} that say NO to a question about one object "
        "(is it there, at a place, or near?) though it is there, sorted by the map of the answer. Diffuse: the entropy "
        f"is above {usual:.2f} nats, as it is for 10% of all answers. Of the others, right region: the strongest patch "
        f"touches a box of the object, as a random patch does in {100 * (covers > 0).mean():.0f}%.")


def figure_wrong(report):
    sure = [record for record in report.failures if record["suspected_label_error"]]
    rows = []
    for name, mine in (("any wrong answer", report.failures), ("sure of it in every wording", sure)):
        if not mine:
            continue
        panels = []
        for record in report.some(mine, COLUMNS):
            p = max(record["p_yes"], 1 - record["p_yes"])
            note = f"said {yes_no(record['truth'] == 'NO')} ({100 * p:.0f}%)\ntruth: {tidy(record['reason'])}\n" \
                   f"{record['type']} error"
            panels.append(report.panel(report.asked.at[record["item"]], note=wrapped(note, PANEL, FONT - 1)))
        rows.append((f"{name}\nn={len(mine)}", panels))
    if not rows:
        raise UserError("No answer is wrong.")
    figure = draw_panels(rows, "Wrong answers and the truth", "Outlined: what makes the answer YES, where a box does.")
    return figure, (
        f"Upper row: {COLUMNS} of {len(report.failures)} wrong answers, drawn at random (seed {report.seed}). Lower "
        f"row: of the {len(sure)} that were wrong with over 95% confidence in every wording: in real pictures the "
        "first place to look for label errors, in drawn ones, whose labels are exact, errors of the model. Error types "
        "are defined at the top of this section.")


# ---- figures of a set: numbers ----

def example_of(template):
    """A question of the template in its first wording, such as "is there a car on the left", in short lines."""
    question = next(question for question in QUESTIONS if question.template == template)
    form = question.forms()[0].format(**question.fill(*(words[0] for words in question.names())))
    return textwrap.fill(form, 28)


def figure_accuracy(report):
    page = report.page
    controls = page["controls"]
    # The most accurate template stands on top; one without questions of both answers at the bottom.
    best_first = sorted(page["by"]["template"].items(), key=lambda entry: -(entry[1]["value"] or 0))
    scores = {example_of(template): {"model": entry, **page["controls_by_template"][template]}
              for template, entry in best_first}
    figure, (left, middle, right) = plot(1, 3, 4.2, width_ratios=(1, 1.1, 0.7))
    intervals(left, {"all": page["overall"], **page["by"]["family"], **controls}, others=controls)
    left.set(title="families, and controls", xlim=(0, 119))
    # The controls of each template stand below the model's dot.
    for k, name in enumerate(("model", *controls)):
        rows = {example: entries[name] for example, entries in scores.items()}
        intervals(middle, rows, SERIES[-k], shift=0.2 * k - 0.3, label=name, bars=False)
    middle.set_title("kinds of question")
    figure.legend(loc="outside lower center", ncols=4)
    for axis in (left, middle):
        axis.axvline(50, **DOTTED)
        axis.set_xlabel("balanced accuracy, %")
    # The confusion matrix in shares of its rows follows from the recall of both answers.
    yes, no = (page["classification"][answer]["recall"] for answer in ("yes", "no"))
    heat(right, ((yes, 100 - yes), (100 - no, no)), ("YES", "NO"), ("YES", "NO"), "{:.1f}%", "Blues",
         Normalize(0, 100), title="confusion", xlabel="said", ylabel="true")
    return figure, (
        f"All {page['overall']['n']} questions of the {page['split']} split, with 95% intervals over pictures. Dotted: "
        "guessing. The controls must lie there, because YES and NO are balanced for every question: no picture, the "
        "picture of another scene, and a decoder trained without pictures. Confusion: shares of each row.")


def figure_complexity(report):
    figure, axes = plot(1, 3, 2.1, sharey=True)
    # A group without both true answers has no balanced accuracy; questions about no object have none of its kind.
    for axis, name in zip(axes, ("objects seen in the scene", "objects of the asked kind", "words")):
        groups = {group: estimate for group, estimate in report.page["by"][name].items()
                  if estimate["value"] is not None and group != "none asked"}
        band(axis, [f"{group}\nn={estimate['n']}" for group, estimate in groups.items()], groups.values())
        axis.tick_params("x", labelsize=FONT - 1.5)
        axis.set_xlabel(name)
        axis.margins(x=0.12)
    axes[0].set_ylabel("balanced accuracy, %")
    return figure, "Accuracy by how much there is to see and to read, with 95% intervals over pictures."


def read_log(path, names):
    """What log.csv measured: {name: (thousands of pictures, values)}. Raises UserError for a file it cannot read."""
    found = {}
    try:
        log = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        for name in names:
            # A row has only what was measured at its update.
            rows = [row for row in log if row[name]]
            found[name] = [int(row["pictures"]) / 1000 for row in rows], [float(row[name]) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error!r}).") from None
    return found


def figure_training(report):
    cfg = report.cfg
    shown = {"loss": "loss, nats", "lr": "learning rate", "grad_norm": "gradient norm",
             "val_accuracy": "validation", "val_loss": "validation loss", "attention_entropy": "entropy, nats"}
    log = read_log(Path(cfg.out_dir) / "log.csv", shown)
    figure, axes = plot(1, len(shown), 1.9, sharex=True)
    # Where the first stage ends.
    stage = train.see_updates(cfg) * cfg.batch_size * cfg.grad_accum
    for axis, (name, title) in zip(axes, shown.items()):
        pictures, values = log[name]
        axis.plot(pictures, values, "o-" if len(values) < 50 else "-", color=SERIES[0], ms=2)
        say_if_empty(axis, values)
        axis.set(title=title, xlabel="pictures / 1000", xlim=(0, None))
        axis.axvline(stage / 1000, color=ACCENT, lw=0.8, ls="--")
    # The losses of the two stages differ by a factor of ten. Without any, a logarithmic axis could not be drawn.
    if log["loss"][1]:
        axes[0].set_yscale("log")
    return figure, (
        f"From log.csv: the mean loss over {cfg.log_every} pictures; the learning rate of the encoder, then of the "
        f"decoder; the gradient norm of one update, before it is clipped at {cfg.grad_clip:g}; balanced accuracy on "
        "the validation split, and the loss of its answers; the mean entropy of cross-attention. Left of the dashed "
        f"line ({stage} pictures) encoder and projection learn, from the words of descriptions, so the losses on its "
        "two sides cannot be compared.")


def figure_calibration(report):
    page = report.page["calibration"]
    figure, (raw, scaled, axis) = plot(1, 3, 2.4)
    for top, name, text in ((raw, "raw", "as trained"), (scaled, "scaled", f"temperature {page['temperature']:.2f}")):
        n, p, share = np.array(page[name]["bins"]).T
        # Where 95% of the bins of a calibrated model lie: its share of YES varies as a mean of n answers does.
        spread = 196 * np.sqrt(p * (1 - p) / n)
        error = page[name]["ece"]
        top.bar(p, 2 * spread, 0.045, 100 * p - spread, color="#d0d0d0", label="if calibrated")
        top.plot((0, 1), (0, 100), **DOTTED)
        top.plot(p, 100 * share, color=SERIES[0], label="model")
        # A bin may hold a thousand times more answers than another: a root, so that small ones are seen.
        top.scatter(p, 100 * share, s=60 * np.sqrt(n / n.max()), color=SERIES[0])
        top.set(title=f"{text}: ECE {error['value']:.2f}\n(calibrated: up to {error['calibrated_high']:.2f})",
                xlabel="predicted probability of YES", ylim=(-5, 105))
    raw.set_ylabel("true answers YES, %")
    raw.legend(loc="upper left")

    # Is the model surer where its attention is less spread?
    odds = report.stored["odds"]
    right = (odds > 0) == report.asked.truth[[report.asked.at[row] for row in report.stored["items"]]]
    for mine, colour, name in ((right, SERIES[0], "right"), (~right, SERIES[1], "wrong")):
        axis.scatter(report.nats[mine], np.abs(odds[mine]), s=3, alpha=0.4, color=colour, lw=0, rasterized=True,
                     label=f"{name}, n={mine.sum()}")
    axis.set(title="confidence and entropy\nof attention", xlabel="entropy of the answer's map, nats",
             ylabel="|log-odds| of the answer")
    axis.legend(markerscale=3, frameon=True, edgecolor="none")
    linked = report.page["attention"]["entropy"]["with_confidence"]
    return figure, (
        f"Reliability of {page['raw']['n']} answers in 15 bins of equal width. Grey: where 95% of the bins of a "
        "perfectly calibrated model would lie; larger dots: more questions. The temperature was fitted on the "
        f"validation split. Right: {len(right)} questions of random pictures; the rank correlation of confidence with "
        f"the entropy of attention, averaged over heads, is {text_of(linked)}; 0 means that the spread of attention is "
        "unrelated to confidence.")


def figure_grounding(report):
    found = report.page["attention"]["grounding"]
    probe = report.page["attention"]["deletion_insertion"]
    if not all("scores" in found[kind] for kind in ("word", "answer")):
        raise UserError("No question of the sample names an object that is there.")
    figure, upper, lower = plot(2, 2, 3.9, height_ratios=(1.15, 1))
    for axis, (kind, name) in zip(upper, (("word", "the word of an object"), ("answer", "the answer"))):
        rows = {who: scores["pointing"] for who, scores in found[kind]["scores"].items()}
        intervals(axis, rows, others=rows.keys() - {"model"})
        axis.set(title=f"{name}, n={rows['model']['n']}", xlim=(0, 110), xlabel="largest patch touches a box, %")
    upper[1].set_yticklabels([])
    # The numbers of patches double from step to step: the first few matter most.
    patches = [round(math.prod(report.grid) * share) for share in probe["share_of_patches"]]
    for axis, name, done in zip(lower, ("deletion", "insertion"), ("taken away", "shown")):
        band(axis, patches, probe[name]["random_curve"], SERIES[3], "random order")
        band(axis, patches, probe[name]["curve"], label="by attention")
        own, chance = (text_of(probe[name][order], digits=0) for order in ("attention", "random"))
        axis.set(title=f"{name}: area {own},\nrandom order {chance}", xlabel=f"patches {done}", ylim=(0, 103),
                 ylabel="p(YES), %")
    lower[0].legend()
    return figure, (
        "Above: the pointing game of the maps averaged over layers and heads, compared with baselines (grey): a random "
        "patch, the centre, the word for another kind in the same picture, the word for the same kind in another "
        f"picture, untrained weights. Below: for {probe['deletion']['difference']['n']} right YES answers, the patches "
        "that the answer looked at most are hidden (or shown) first. Only this test shows that the model uses those "
        "patches.")


def figure_specialisation(report):
    attention = report.page["attention"]
    found = attention["specialisation"]
    if not found["categories"]:
        raise UserError("No question of the sample names an object that is there.")
    heads = report.page["head_ablation"]
    spread = np.array([[entry["value"] for entry in layer] for layer in attention["entropy"]["by_head"]])
    figure = Figure((WIDTH, 5.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    # Above: what is lost without each head. The list holds layer after layer, head after head.
    axes = upper.subplots(1, 4, width_ratios=[report.cfg.vision_heads] + 3 * [spread.shape[1]])
    axes[0].set_ylabel("layer")
    most = max(1.0, *(abs(entry["drop"]["value"] or 0) for entry in heads))
    for axis, kind in zip(axes, ("vision", "self", "cross")):
        mine = [entry for entry in heads if entry["kind"] == kind]
        shape = mine[-1]["layer"] + 1, mine[-1]["head"] + 1
        lost = rounded([entry["drop"]["value"] or 0 for entry in mine], 1)
        texts = [f"{value}{'*' * (entry['p_holm'] < 0.05)}" for value, entry in zip(lost, mine)]
        heat(axis, lost.reshape(shape), *map(range, shape), np.reshape(texts, shape), "PuOr_r",
             Normalize(-most, most), title=f"lost: {kind}", xlabel="head")
    heat(axes[3], spread, *map(range, spread.shape), "{:.1f}", title="entropy: cross, nats", xlabel="head")

    # Below: what each head looks for, a column for each head; 32 times more and 32 times less are equally dark.
    names = np.array([f"{layer}.{head}" for layer, head in np.ndindex(spread.shape)])
    table = np.maximum(np.reshape(found["enrichment"], (len(names), -1)).T, 1 / 32)
    # Heads with the same favourite stand together.
    order = np.argsort(table.argmax(0), kind="stable")
    heat(lower.subplots(), table[:, order], found["categories"], names[order], "{:.0f}", "PuOr_r",
         LogNorm(1 / 32, 32), "enrichment", title="what each cross-attention head looks for", xlabel="layer.head")
    own = np.mean(found["selectivity"])
    untrained = np.mean(attention["specialisation_untrained"]["selectivity"])
    return figure, (
        f"Above: points of balanced accuracy lost on {heads[0]['drop']['n']} questions without one head. A star: "
        "significant after Holm's correction for all heads (McNemar, p < 0.05). Below: how many times more attention a "
        "word for each kind gives to its boxes than an even spread. Mean selectivity (log of a head's favourite kind "
        f"over the mean of all kinds): {own:.2f}, with untrained weights {untrained:.2f}.")


def figure_pairs(report):
    found = report.page["failures"]["confusions"]
    pairs = report.page["failures"]["command_pairs"]
    if not found:
        raise UserError("Too few questions ask for what is not there.")
    # Left: which kind is taken for which.
    kinds = [kind for kind in commands.CATEGORIES if any(kind in (e["asked"], e["present"]) for e in found)]
    taken = np.full((len(kinds), len(kinds)), np.nan)
    for entry in found:
        more = entry["said_yes"] - entry["elsewhere"]
        taken[kinds.index(entry["asked"]), kinds.index(entry["present"])] = rounded(more)
    # Right: which commands get the same answer too often; each pair once, and none of too few questions.
    n = np.array(pairs["n"])
    expected = np.array(pairs["expected"])
    mixed = rounded(np.subtract(pairs["same"], expected))
    # Three standard errors of a share: of about 80 pairs hardly one lies farther from chance by chance.
    noise = 3 * np.sqrt(expected * (100 - expected) / np.maximum(n, 1))
    mixed[(n < 20) | (np.triu(n, 1) > 0) | (np.abs(mixed) < noise)] = np.nan
    figure, (left, right) = plot(1, 2, 3.1)

    def draw(axis, table, names, bar, **labels):
        most = max(1.0, np.nanmax(np.abs(table), initial=0))
        heat(axis, table, names, names, "{:+.0f}", "PuOr_r", Normalize(-most, most), bar, **labels)
        axis.set_xticklabels(names, rotation=40, ha="right", rotation_mode="anchor")
    draw(left, taken, kinds, "points of YES added", title="kinds taken for others",
         ylabel="asked for, and not there", xlabel="what stands there")
    draw(right, mixed, pairs["templates"], "points over chance", title="commands that get one answer")
    first = found[0]
    return figure, (
        "Left: questions with the answer NO: by how many points a false YES is more frequent where an object of the "
        f"other kind stands at the place asked about. The largest ratio: asked for a {first['asked']} that is not "
        f"there, the model says YES to {first['said_yes']:.0f}% where there is a {first['present']} (n={first['n']}), "
        f"and to {first['elsewhere']:.0f}% where not. Right: two commands about one picture whose true answers differ: "
        "how much more often both get the same answer than if their errors were independent. Grey: under 20 questions "
        "or pairs and, on the right, differences within three standard errors.")


def draw_column(axes, x, parts):
    """Boxes from top to bottom on a line that joins them; parts: (name, details, colour). Returns (bottoms, height)."""
    height = 6.1 + 2.1 * max(details.count("\n") for _, details, _ in parts)
    bottoms = np.linspace(57 - height, 0.5, len(parts))
    middle = x + 20.5
    axes.plot((middle, middle), (1, 57), color=INK, lw=0.9, zorder=0)
    for y, (name, details, colour) in zip(bottoms, parts):
        border = ACCENT if name.startswith("cross") else QUIET
        axes.add_patch(Rectangle((x, y), 41, height, fc=colour, ec=border, lw=0.8))
        axes.text(middle, y + 0.55 * height, name, ha="center", va="bottom", weight="bold")
        axes.text(middle, y + 0.5 * height, details, ha="center", va="top", **SMALL)
    return bottoms, height


def figure_architecture(report):
    model = report.subject.model
    cfg = report.cfg
    rows, columns = report.grid

    def count(*modules):
        return f"{sum(p.numel() for module in modules for p in module.parameters()):,} parameters"

    stem = f"one convolution, kernel = stride = {cfg.patch_size}"
    if cfg.stem == "conv":
        stem = f"3×3 stride-2 convolutions × {int(math.log2(cfg.patch_size))}, then 1×1"
    heads = f"{cfg.text_heads} query heads, {cfg.text_kv_heads} key/value heads of {cfg.text_head_dim}"
    sky, sand, mint = "#e3eef7", "#fbeedd", "#e2f3ec"
    figure, (axes,) = plot(1, 1, 3.9)
    axes.set(xlim=(0, 102), ylim=(0, 58))
    axes.axis("off")
    keys, tall = draw_column(axes, 1, (
        ("picture", f"3 × {cfg.image_height} × {cfg.image_width}", "white"),
        (f"stem ({cfg.stem})", f"{stem}\n{count(model.vision.stem)}", sky),
        (f"+ {cfg.vision_positions} 2D positions", f"{columns} × {rows} patches, width {cfg.vision_dim}", sky),
        (f"encoder block × {cfg.vision_layers}", f"LayerNorm, attention ({cfg.vision_heads} heads), +\n"
         f"LayerNorm, MLP {cfg.vision_ffn_dim} (GELU), +\n{count(model.vision.blocks, model.vision.norm)}", sky),
        ("projection", f"linear {cfg.vision_dim} → {cfg.text_dim}, RMSNorm\n{count(model.projection)}", mint)))
    bottoms, low = draw_column(axes, 58, (
        ("[SOS] command ? [YES] reason [EOS]", f"at most {cfg.max_text} tokens of {len(report.subject.tokenizer)} "
         "words", "white"),
        ("embedding, tied to the logits", f"width {cfg.text_dim}: {count(model.decoder.embedding)}", sand),
        ("causal self-attention, +", f"RMSNorm, RoPE, {heads}", sand),
        ("cross-attention to the patches, +", f"RMSNorm, {heads}", mint),
        ("gated FFN, +", f"RMSNorm, {cfg.ffn}, width {cfg.text_ffn_dim}", sand),
        ("RMSNorm, logits of the next word", "at ?: [YES] or [NO], then the reason", sand)))
    # A dashed frame around what each decoder block repeats: three boxes from the third on.
    top, bottom = bottoms[2] + low + 3, bottoms[4] - 1
    axes.add_patch(Rectangle((55, bottom), 46.5, top - bottom, fc="none", ec=QUIET, lw=0.8, ls="--"))
    axes.text(55.6, top - 2.4, f"× {cfg.text_layers}", weight="bold")
    axes.text(100.8, top - 2.4, count(model.decoder.blocks), ha="right", **SMALL)
    # The way of the patches from the projection into the cross-attention of each block.
    start, end = keys[-1] + tall / 2, bottoms[3] + low / 2
    axes.text(43, start + 0.5, "keys, values:\nonce a picture", **SMALL)
    axes.plot((42, 53.5, 53.5), (start, start, end), color=INK, lw=0.9)
    axes.annotate("", (58, end), (53.5, end), arrowprops=dict(arrowstyle="-|>", color=INK, shrinkA=0, shrinkB=0))
    return figure, (
        f"Drawn from the checkpoint's own settings: {count(model)} in all. The maps below show the cross-attention, "
        "outlined in orange.")


# Section of the report: {name: function}. The order is that of the report.
FIGURES = {
    "summary": {
        "words": figure_scene(draw_words, "A map for each word, and for the answer, which is read at “?”. Earlier "
                              "words cannot see later ones.")},
    "data": {"pictures": figure_pictures},
    "model": {"architecture": figure_architecture},
    "training": {"training": figure_training},
    "accuracy": {"accuracy": figure_accuracy, "complexity": figure_complexity},
    "attention": {
        "walk": figure_walk,
        "reason": figure_scene(draw_reason, "Where the model looked as it chose each word of its reason."),
        "layers": figure_scene(draw_layers, "The maps of one question, layer by layer (animated; a printed page shows "
                               "the first layer)."),
        "gallery": figure_gallery, "comparison": figure_comparison, "twins": figure_twins,
        "decides": figure_decides, "grounding": figure_grounding,
        "heads": figure_scene(draw_heads, "The map of the answer in every head of every layer."),
        "specialisation": figure_specialisation,
        "vision": figure_scene(draw_vision, "How patches look at one another, before any word is read."),
        "text": figure_scene(draw_text, "How words look back at earlier words.")},
    "calibration": {"calibration": figure_calibration},
    "failures": {"failures": figure_failures, "wrong": figure_wrong, "pairs": figure_pairs}}
# Written as PDF too. The others hold pictures, which no format draws sharper.
PLOTS = ("architecture", "training", "accuracy", "complexity", "grounding", "specialisation", "text", "calibration",
         "pairs")

# ---- the report ----

STYLE = """
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: #1a1a1a; font: 16px/1.55 system-ui, sans-serif }
h2 { margin-top: 2.4rem; border-bottom: 2px solid #d8d8d4 } nav a { margin-right: .9rem; display: inline-block }
.wide, pre { overflow-x: auto; margin: 1rem 0 } .quiet, figcaption { color: #5a5a5a } figure { margin: 1.4rem 0 }
figure img { display: block; width: 100%; max-width: var(--w); min-width: min(var(--w), 34rem); margin: 0 auto }
table { border-collapse: collapse; font-size: .92rem } td:nth-child(2) { white-space: nowrap }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #d8d8d4; vertical-align: top }
select { font: inherit; max-width: 100%; margin: 0 .6rem .6rem 0; vertical-align: top } label { display: inline-block }
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title><style>""" + STYLE + """</style></head><body><h1>@TITLE@</h1><p class="quiet">@ABOUT@</p>
"""
REPORT = HEAD + "<nav>@NAV@</nav>\n@BODY@\n</body></html>\n"


def write_html(path, template, **texts):
    """Write the template with @NAME@ replaced by texts[name], and print how large the file is."""
    # One pass: what is filled in may itself hold an @, and is left alone. str.format would trip over CSS's braces.
    evaluate.write(path, re.sub("@([A-Z]+)@", lambda match: texts[match[1].lower()], template))
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")


def base64_text(data):
    return base64.b64encode(data).decode()


def web_picture(image):
    """A PIL image as a WebP in text: a fifth of a PNG, and all pictures have to fit into one file."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return "data:image/webp;base64," + base64_text(buffer.getvalue())


def row_html(cells, tag):
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def table_html(header, rows):
    lines = row_html(header, "th") + "".join(row_html(row, "td") for row in rows)
    return f'<div class="wide"><table>{lines}</table></div>'


def figure_html(name, path, caption):
    """The picture file in the page itself, at its printed size, with its caption; the caption alone without a file."""
    words = f"<figcaption><b>{name.capitalize()}.</b> {html.escape(caption)}</figcaption></figure>"
    if not path:
        return f"<figure>{words}"
    with Image.open(path) as image:
        if path.suffix == ".webp":
            # An animation stays as it is: its frames would be lost.
            source = "data:image/webp;base64," + base64_text(path.read_bytes())
        else:
            # The dots of print are more than a screen shows.
            small = image.convert("RGB")
            small.thumbnail((1700, 10000))
            source = web_picture(small)
    # An animation does not say how many dots an inch has.
    inches = image.width / image.info.get("dpi", [SCREEN_DPI])[0]
    return f'<figure><div class="wide"><img src="{source}" alt="Figure: {name}" ' \
           f'style="--w: {128 * inches:.0f}px"></div>{words}'


def markdown_html(text):
    """The paragraphs and tables that ablate.py writes as Markdown."""
    found = ""
    for part in text.strip().split("\n\n"):
        if part.startswith("| "):
            header, _, *rows = (line[2:-2].split(" | ") for line in part.splitlines())
            found += table_html(header, rows)
        else:
            found += f"<p>{html.escape(part)}</p>"
    return found


def study(path, *figures):
    """What ablate.py wrote, with the figures next to it; "" where there is no such file."""
    body = markdown_html(path.read_text(encoding="utf-8")) if path.exists() else ""
    for name in figures:
        figure = path.with_name(f"{name}.png")
        if figure.exists():
            body += figure_html(name, figure, "From python ablate.py.")
    return body


def limits(page):
    """What the numbers say against the model, as list items."""
    found = []
    for by in ("family", "object"):
        known = [(entry["value"], name) for name, entry in page["by"][by].items() if entry["value"] is not None]
        if known:
            _, weakest = min(known)
            found.append(f"Weakest {by}: {weakest}, {text_of(page['by'][by][weakest], '%')}.")
    # Only drawn scenes can be edited.
    if page["twins"]:
        stays = text_of(page["twins"]["stubbornness"], "%")
        found.append(f"When one edit flips the truth, {stays} of the answers stay.")
    found += ["Attention shows where the decoder read, not what decided: the encoder has already mixed information "
              "between patches. Deletion and insertion come nearest to a proof.",
              "One checkpoint of one seed: the intervals do not cover variation between training runs."]
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in found) + "</ul>"


def summary(page):
    """What the model does, and how well, in four sentences."""
    found = page["attention"]["grounding"]["word"]
    text = "Shown a picture of a street and a command, the model answers YES or NO, gives a reason in a few words, " \
           f"and shows where each word looked. It is right in {text_of(page['overall'], '%')} (guessing: 50%)."
    if page["twins"]:
        text += f" Of two scenes that differ in one object, so that the truth differs, it answers both rightly in " \
                f"{text_of(page['twins']['both_right'], '%')} (guessing: 25%)."
    if "scores" in found:
        best = found["scores"][found["best_baseline"]]["pointing"]
        text += " The patch that the word of an object looks at most touches such an object in " \
                f"{text_of(found['scores']['model']['pointing'], '%')} (best baseline: {text_of(best, '%')})."
    return f'<p>{text} <a href="page.html">Look for yourself</a>, after python visualize.py --page=True.</p>'


def results(page):
    """The numbers that matter most and, folded up, all others."""
    rows = [(name, text_of(estimate), estimate["n"], other) for name, estimate, other in evaluate.headline(page)]
    numbers = html.escape("\n".join(evaluate.lines_of(page)))
    return table_html(("what", "% [95% interval]", "n", "compare with"), rows) + \
        f"<details><summary>All numbers of eval.json</summary><pre>{numbers}</pre></details>"


def failure_types(report):
    counts = report.page["failures"]["counts"]
    kinds = ("vision", "language", "reasoning")
    rows = [(family, *(mine.get(kind, 0) for kind in kinds)) for family, mine in counts["type_by_family"].items()]
    text = f"{len(report.failures)} wrong answers, asked again in parts and in other words. Vision error: a part is " \
           "answered wrongly too. Language error: the parts and most paraphrases are answered right. Reasoning " \
           "error: the parts are answered right, and the whole is not. Of the wrong answers, " \
           f"{counts['low_confidence'].get('True', 0)} had less than 70% confidence."
    return f"<p>{text}</p>{table_html(('family', *kinds), rows)}"


def drawn_html(report, name, function):
    """Draw a figure, write it to out_dir/figures, and return it as HTML with its caption, or why there is none."""
    out = config.made_folder(report.cfg.out_dir, "figures")
    try:
        figure, caption = function(report)
    except UserError as error:
        print(f"no figure '{name}': {error}", flush=True)
        return figure_html(name, None, str(error))
    files = save(figure, out / name, report.cfg.dpi, name in PLOTS)
    print("figure:", *files, flush=True)
    return figure_html(name, files[0], caption)


def make_report(cfg):
    """Every figure, and out_dir/report.html: one file with everything in it."""
    report = Report(cfg)
    page = report.page
    out = Path(report.cfg.out_dir)
    sections = {
        "summary": summary(page), "results": results(page),
        "data": table_html(*prepare.sets_table(report.meta["report"])), "model": "",
        "training": study(out / "lr_range.md", "lr_range") + study(out / "bench.md"), "accuracy": "",
        "attention": "<p>Colour: how many times more attention than an even spread, all maps of a figure on one scale. "
        "Outlined in green: the labelled boxes of what a word names and, for the answer, of what makes it YES. No box "
        "is used in training.</p>", "calibration": "", "failures": failure_types(report),
        "ablations": study(out.parent / "ablation" / "table.md", "differences", "measures"),
        "robustness": study(out / "robustness.md", "robustness"), "limits": limits(page)}
    body, nav = [], []
    # A section without text and figures, such as ablations that nobody ran, does not appear.
    for section, text in sections.items():
        # One after the other: all figures at once would take gigabytes.
        figures = [drawn_html(report, *entry) for entry in FIGURES.get(section, {}).items()]
        if text or figures:
            nav.append(f'<a href="#{section}">{section}</a>')
            body += [f'<h2 id="{section}">{section.capitalize()}</h2>{text}', *figures]
    about = f"Checkpoint of update {page['step']}, {page['split']} split, data {page['data_hash']}. Balanced " \
            "accuracy in %, 95% intervals from a bootstrap over pictures. Made by python visualize.py. Every example " \
            f"was drawn at random with seed {report.seed}."
    write_html(out / "report.html", REPORT, title="What the model sees, and where it looks", about=about,
               nav=" ".join(nav), body="\n".join(body))


# ---- the interactive page ----

PAGE = HEAD + """<p id="said" aria-live="polite"></p>
<p><label>Scene <select id="scene"></select></label>
<label>Step through the scenes <input type="range" id="step" min="0"></label></p>
<p><label>Command <select id="command"></select></label></p>
<p><label>Word <select id="word" size="8"></select></label> <label>Layer <select id="layer" size="8"></select></label>
<label>Head <select id="head" size="8"></select></label></p>
<p><img id="picture" alt="the picture" style="width: 20rem; max-width: 100%">
<canvas id="map" role="img" style="width: 30rem; max-width: 100%"></canvas></p>
<p id="bar" style="max-width: 30rem; padding: .2rem">≤ 1×
<span id="top" style="float: right; color: white"></span></p>
<script>
"use strict";
const D = @DATA@;
const [rows, columns] = D.grid, P = rows * columns, W = 640, cell = W / columns, scale = W / D.size[0],
  H = scale * D.size[1];
const byId = id => document.getElementById(id), chosen = id => +byId(id).value;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)), colours = bytes(D.colours);

function list(id, texts, value) {
  byId(id).replaceChildren(...texts.map((text, i) => new Option(text, i)));
  byId(id).value = value;
}
const numbers = n => [...Array(n).keys()];
// The chosen layer or head in a list; its last entry means all n of them.
const picked = (id, n) => chosen(id) === n ? numbers(n) : [chosen(id)];
// Attention in multiples of an even spread.
function mapOf(c, word) {
  const layers = picked("layer", D.layers), heads = picked("head", D.heads), sum = new Float64Array(P);
  for (const l of layers) for (const h of heads) for (let p = 0; p < P; p++)
    sum[p] += (c.maps[((l * D.heads + h) * c.words.length + word) * P + p] / 255) ** 2 * P;
  return sum.map(x => x / layers.length / heads.length);
}
function draw() {
  const scene = D.scenes[chosen("scene")], c = scene.commands[chosen("command")], word = chosen("word");
  const g = byId("map").getContext("2d");
  byId("said").textContent = `The model says ${c.said}: ${c.reason}. The truth is ${c.truth}.`;
  byId("said").style.color = c.said.startsWith(c.truth) || c.truth === "unsure" ? "" : "#b00020";
  byId("map").ariaLabel = `where "${c.words[word]}" looks`;
  g.drawImage(byId("picture"), 0, 0, W, H);
  for (const [mode, colour] of [["saturation", "#888"], ["source-over", "#dddddda0"]]) {   // grey and pale
    Object.assign(g, {globalCompositeOperation: mode, fillStyle: colour});
    g.fillRect(0, 0, W, H);
  }
  mapOf(c, word).forEach((x, p) => {
    if (x <= 1) return;
    g.fillStyle = rgba(Math.min(255, Math.round(255 * Math.log(x) / Math.log(D.top))));
    g.fillRect(p % columns * cell, Math.floor(p / columns) * cell, cell, cell);
  });
  for (const [x1, y1, x2, y2] of c.boxes[word])
    for (const [line, colour] of [[7, "#fff"], [3.5, "#00735a"]]) {
      Object.assign(g, {lineWidth: line, strokeStyle: colour});
      g.strokeRect(x1 * scale, y1 * scale, (x2 - x1) * scale, (y2 - y1) * scale);
    }
}
function ask() {
  const words = D.scenes[chosen("scene")].commands[chosen("command")].words;
  // The same command about another scene keeps its word.
  const same = [...byId("word").options].map(option => option.text).join() === words.join();
  list("word", words, same ? chosen("word") : words.length - 1);
  draw();
}
function show() {
  byId("step").value = chosen("scene");
  list("command", D.scenes[chosen("scene")].commands.map(c => c.text), 0);
  byId("picture").onload = ask;
  byId("picture").src = D.scenes[chosen("scene")].image;
}
const rgba = i => `rgba(${colours[4 * i]}, ${colours[4 * i + 1]}, ${colours[4 * i + 2]}, ${colours[4 * i + 3] / 255})`;
byId("bar").style.background = `linear-gradient(to right, ${[0, 64, 128, 192, 255].map(rgba)}), #c7c7c7`;
Object.assign(byId("map"), {width: W, height: H});
byId("top").textContent = `≥ ${D.top}×`;
for (const scene of D.scenes) for (const c of scene.commands) c.maps = bytes(c.maps);
for (const [id, change] of [["scene", show], ["command", ask], ["word", draw], ["layer", draw], ["head", draw]])
  byId(id).onchange = change;
byId("step").max = D.scenes.length - 1;
byId("step").oninput = () => {
  byId("scene").value = chosen("step");
  show();
};
list("scene", D.scenes.map(scene => scene.name), 0);
for (const [id, n] of [["layer", D.layers], ["head", D.heads]])
  list(id, [...numbers(n).map(k => `${id} ${k}`), `all ${id}s`], n);
show();
</script></body></html>
"""
# Random scenes on the page, questions about each, and wrong answers. All maps of all heads are in the file: more would
# make it slow to load.
SCENES = 8
EACH = 4
WRONG = 4


def packed(shares):
    """Numbers from 0 to 1 as one byte each, in text."""
    return base64_text(np.round(255 * shares).astype(np.uint8).tobytes())


def make_page(cfg):
    """Write out_dir/page.html: one file to look through all attention of some scenes and questions, drawn at random.

    A map is one byte per patch: the square root of its attention, which keeps small values apart.
    """
    report = Report(cfg)
    # The sizes of the checkpoint, which may differ from those given here.
    cfg = report.cfg
    asked = report.asked

    def scene(name, shots):
        """What the page shows of a picture and the answers about it."""
        entries = []
        for shot in shots:
            boxes = [[corners(label) for label in labels] for labels in shot.boxes]
            entries.append(dict(
                text=asked_text(shot), words=shot.words + ["answer"], said=verdict_text(shot), truth=shot.truth,
                reason=tidy(shot.reason), boxes=boxes, maps=packed(np.sqrt(shot.cross))))
        return dict(name=name, commands=entries, image=web_picture(Image.fromarray(shot.picture)))
    scenes = [scene(asked.frame(questions[0])["name"], map(report.shot, questions[:EACH]))
              for questions in islice(report.pictures(), SCENES)]
    scenes += [scene(f"wrong answer: {record['frame']}", [report.shot(asked.at[record["item"]])])
               for record in report.some(report.failures, WRONG)]
    if cfg.source == "drawn":
        scenes += [scene(f"a pedestrian walks: step {k}", [shot]) for k, shot in enumerate(walk(report), 1)]
    # `top` is the upper end of the scale: a head rarely looks at fewer than four patches.
    data = dict(scenes=scenes, grid=report.grid, size=report.size, layers=cfg.text_layers, heads=cfg.text_heads,
                top=math.prod(report.grid) / 4, colours=packed(OVERLAY.colors))
    about = "Choose a scene, a command, and one of its words. Then choose a layer and a head, or the average of all. " \
            "Colour: how many times more attention than an even spread. Boxes show what the word names. " \
            f"First up to {EACH} questions about each of {SCENES} pictures of the {report.page['split']} split, and " \
            f"{WRONG} wrong answers, drawn at random (seed {report.seed}); then, if scenes are drawn, a pedestrian " \
            f"who crosses a street. Checkpoint of update {report.page['step']}. <a href='report.html'>The report</a>."
    # Inside a script, "</" could end it; in a string, "<\\/" means the same.
    text = json.dumps(data).replace("</", "<\\/")
    write_html(Path(cfg.out_dir) / "page.html", PAGE, title="Where does each word look?", about=about, data=text)


# ---- the script ----

LARGEST = 640                 # pixels of the longer side of a picture below a map


def answer_picture(cfg):
    """Answer cfg.command about cfg.image with all figures of a scene; with cfg.command2, answer and compare both."""
    subject = evaluate.Subject(cfg)
    # The sizes of the checkpoint, which may differ from those given here.
    cfg = subject.cfg
    # Commands are checked before anything is answered.
    asked = [commands.understood(text) for text in (cfg.command, cfg.command2) if text]
    picture, sides = prepare.picture_and_sides(cfg.image, prepare.size_of(cfg))
    # Maps are shown on the picture itself, in its own shape, but that its sides are multiples of the number of patches.
    less = min(1, LARGEST / max(sides))
    own, _ = prepare.picture_and_sides(cfg.image, [math.ceil(side * less / patches) * patches
                                                   for side, patches in zip(sides, subject.grid[::-1])])
    shots = []
    for texts in asked:
        tried = [answer(subject, np.asarray(picture), text) for text in texts]
        # Of several, the surest YES; without any, the surest NO.
        shot = max(tried, key=lambda shot: (shot.verdict == "YES", shot.probability))
        shots.append(shot._replace(picture=np.asarray(own)))
        if len(tried) > 1:
            print(asked_text(shot))
        print(f"{verdict_text(shot)}\n{tidy(shot.reason)}")
    if cfg.source == "drawn":
        print("note: this model has seen drawn streets only; about photographs it is often wrong")
    out = config.made_folder(cfg.out_dir, "answer")
    # The commands become part of the names of the files.
    slugs = [re.sub(r"[^a-z0-9]+", "-", asked_text(shot))[:60].strip("-") for shot in shots]
    path = out / "-".join([Path(cfg.image).stem[:80], *slugs])
    if len(shots) == 2:
        files = save(draw_comparison([shots]), path, cfg.dpi)
    else:
        files = []
        for kind, draw in SCENE.items():
            files += save(draw(shots[0]), f"{path}-{kind}", cfg.dpi, kind in PLOTS)
    for file in files:
        print(f"figure: {file}")


def main(cfg):
    asked = cfg.image or cfg.command or cfg.command2
    if asked and (cfg.page or not cfg.image or not cfg.command):
        raise UserError("an answer needs a picture and a command, and no --page: pass --image=street.jpg "
                        "--command=\"is there a bus?\", and --command2 to compare; or --page=True alone; or none of "
                        "these, for the report")
    if asked:
        answer_picture(cfg)
    elif cfg.page:
        make_page(cfg)
    else:
        make_report(cfg)


if __name__ == "__main__":
    config.run(main, __doc__)
