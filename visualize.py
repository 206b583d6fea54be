"""Pictures that tell the story: every figure, one report, one interactive page, and the answer to any picture.

- `answer`: verdict with its probability, the generated reason, and all attention of the pass that answered at `?`.
- A map is a row of cross-attention: it sums to 1 over patches. Where no head is named it is the mean over all heads of
  all layers, in float32 whatever --dtype says. Figures show multiples of uniform attention, all maps of a figure on
  one colour scale, patches unsmoothed, the boxes of what is asked outlined.
- What is shown was drawn at random by --seed, never picked; captions say n, from what, and the average of all.
- Attention says where the decoder read, not what decided: patches have already exchanged what they hold in the encoder.

    python visualize.py                    out_dir/report.html and its figures, after train.py and evaluate.py
    python visualize.py --page=True        out_dir/page.html: pick scene, command, layer and head, hover over the words
    python visualize.py --image=street.jpg --command="is there a bus on the left?"
    python visualize.py --image=street.jpg --command="is there a bus?" --command2="is there a car?"
    python visualize.py --image=FOLDER --command="describe the scene" --beam=4

Shapes: P = side * side patches, n words of the command, L layers, H heads, T = n + 2 tokens.
"""
import base64
import csv
import html
import io
import json
import math
import re
import sys
import textwrap
import time
import warnings
import zipfile
from collections import Counter, namedtuple
from pathlib import Path

import matplotlib
matplotlib.use("Agg")                                       # no display needed; before pyplot, which picks one
import matplotlib.pyplot as plt                             # noqa: E402
import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm, Normalize, PowerNorm, SymLogNorm
from matplotlib.patheffects import withStroke
from PIL import Image, ImageOps

import commands
import config
import evaluate
import prepare
import train
from config import UserError
from evaluate import FAMILIES, NAMED
from tokenizer import NO, SPECIAL, UNK, YES, split_words

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
def answer(model, cfg, tokenizer, state, device, picture, command):
    """What the model says to one command about one picture. The first five are what train.load_model returns.

    picture: uint8 (S, S, 3) with S = cfg.image_size. Returns a dict:
        verdict       "YES", "NO", or None for a description
        probability   of the verdict, from the two-way softmax over [YES] and [NO] at `?`; None for a description
        reason        text, or the description
        words         the command's words (n), as typed; those unknown to the model end in [UNK]
        cross         float32 numpy (L, H, n + 1, side, side): one map a word, the last that of the answer
        maps          their mean over layers and heads (n + 1, side, side)
        vision, text  self-attention, float32 numpy (layers, heads, P, P) and (L, H, T, T)
        picture, boxes   the picture, and for each map the labels to outline: none, if nobody adds them
    Raises UserError for a command that cannot be asked, see read_command.
    """
    words, ids = read_command(cfg, tokenizer, command)
    images = torch.from_numpy(train.normalise(np.asarray(picture)[None], state["mean"], state["std"])).to(device)
    tokens, side = torch.tensor([[ids]], device=device), cfg.image_size // cfg.patch_size
    logits, attn = model(images, tokens, return_attn=True)
    logits, attn = logits[0, 0, -1], {name: weights[:, 0].cpu().numpy() for name, weights in attn.items()}
    describes = " ".join(words) in commands.DESCRIBE or logits.argmax().item() not in (YES, NO)
    verdict, probability, room = None, None, cfg.max_new_tokens
    if not describes:
        said = YES if logits[YES] >= logits[NO] else NO
        verdict, probability = SPECIAL[said][1:-1], torch.sigmoid((logits[YES] - logits[NO]).abs()).item()
        tokens, room = torch.cat((tokens, torch.tensor([[[said]]], device=device)), -1), room - 1
    new, _ = model.generate(images, tokens, room, beam=cfg.beam)
    reason = tokenizer.decode(i for i in new[0, 0].tolist() if i not in (YES, NO))
    cross = attn["cross"][:, :, 1:].reshape(cfg.text_layers, cfg.text_heads, -1, side, side)
    return dict(verdict=verdict, probability=probability, reason=reason, cross=cross, maps=cross.mean((0, 1)),
                words=[word + " [UNK]" * (i == UNK) for word, i in zip(words, ids[1:])], vision=attn["vision"],
                text=attn["self"], picture=np.asarray(picture), boxes=[()] * (len(words) + 1))


def verdict_text(result):
    """`YES (93.1%)`, or `description` where nothing was to be decided."""
    return f"{result['verdict']} ({100 * result['probability']:.1f}%)" if result["verdict"] else "description"


def tidy(text):
    """Tokens joined by spaces, as one writes them: no space before a comma."""
    return re.sub(r" (?=[,:?.!])", "", text)


def asked_text(result):
    return tidy(" ".join(result["words"])) + "?" * bool(result["verdict"])


def title_of(result):
    return [asked_text(result), f"{verdict_text(result)}: {tidy(result['reason'])}"]


# ---- drawing ----

INK, QUIET, ACCENT, BOX = "#1a1a1a", "#666666", "#d55e00", "#00735a"      # the accent is vermilion of Okabe and Ito
SERIES = ("#0072b2", "#d55e00", "#cc79a7", "#999999")                     # theirs too: told apart by every eye
WIDTH, PANEL, GAP = 7.1, 1.12, 0.09       # inches: a page's text, a panel at most, between two
FONT = 7.5                    # points, at the printed size
BACK = 0.78                   # mean grey of the picture below a map
plt.rcParams.update({
    "font.size": FONT, "axes.titlesize": FONT + 0.5, "axes.labelsize": FONT, "xtick.labelsize": FONT - 0.5,
    "ytick.labelsize": FONT - 0.5, "legend.fontsize": FONT - 0.5, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "pdf.fonttype": 42, "axes.formatter.min_exponent": 2})

Panel = namedtuple("Panel", "picture map label note boxes accent query", defaults=(None, "", "", (), False, None))
# picture uint8 (S, S, 3); map (side, side), which sums to 1, or the difference of two such, which sums to 0; text above
# and below; labels whose boxes to outline; accent: the answer's; query: (row, column) of a patch to mark
NOTHING = Panel(None)         # fills a row


def save(drawn, path, dpi):
    """Write what a draw function made: path.png, for a plot path.pdf too, for a list of figures an animated path.gif.

    Returns the files. Raises UserError if they cannot be written.
    """
    figures = drawn if isinstance(drawn, list) else [drawn]
    # Plots are laid out by matplotlib; panels, which hold pictures, by hand.
    kinds = (".gif",) if isinstance(drawn, list) else (".png", ".pdf") if drawn.get_layout_engine() else (".png",)
    files = [Path(f"{path}{kind}") for kind in kinds]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")      # a word in a script that the font lacks shows as boxes
            if kinds == (".gif",):
                frames = []
                for figure in figures:
                    figure.set_dpi(120)
                    figure.canvas.draw()
                    frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize())
                frames[0].save(files[0], save_all=True, append_images=frames[1:], duration=1100, loop=0)
            else:
                for file in files:
                    drawn.savefig(file, dpi=dpi)
    except OSError as error:
        raise UserError(f"cannot write the figure {files[0]}: {error}") from None
    finally:
        for figure in figures:
            plt.close(figure)
    return files


def overlay_colours(name="plasma_r", both=False):
    """Colour map that is clear at its low end (`both`: in the middle), and less transparent the higher."""
    colours, height = matplotlib.colormaps[name](np.linspace(0, 1, 256)), np.linspace(-1 if both else 0, 1, 256)
    colours[:, 3] = np.abs(0.8 * height) ** 0.5
    return ListedColormap(colours).with_extremes(under=(0, 0, 0, 0))


def numbers(found, boxes, size):
    """Entropy and peak of a map and, with boxes, its share in them and that over a uniform map's, a line each."""
    flat = found.ravel()
    nats = abs(evaluate.entropy(flat))                      # else -0.00
    text = f"H {nats:.2f} ({100 * nats / math.log(max(flat.size, 2)):.0f}%)\npeak {flat.size * flat.max():.1f}×"
    if not len(boxes):
        return text
    cover = evaluate.cover(boxes, size, len(found))
    return f"{text}\nin box {100 * evaluate.mass_in_box(flat, cover):.0f}% = {evaluate.enrichment(flat, cover):.1f}×"


def wrapped(text, inches, size):
    """Lines of `text` that fit into `inches` at a font size in points."""
    return [line for part in text.split("\n") for line in textwrap.wrap(part, max(4, int(inches * 72 / (size * 0.55))))]


def draw_panels(panels, columns, title, subtitle, rows=(), vmax=0.0):
    """A figure of panels, row by row; all their maps on one colour scale, in multiples of uniform attention.

    title: lines of text above, the first in bold; subtitle: one line below them; rows: texts left of the rows; vmax:
    least upper end of the scale, for figures that share one.
    """
    signed = [p.map is not None and p.map.min() < 0 for p in panels]
    left = 0.08 if not any(rows) else 0.45 if max(map(len, rows)) < 9 else 1.0
    right = 0.1 + 0.52 * any(p.map is not None for p in panels) + 0.62 * any(signed)
    size = min(PANEL, (WIDTH - left - right) / columns - GAP)
    width, font = max(left + right + columns * (size + GAP), 4.6), FONT if size > 0.9 else FONT - 1.5
    heading = [(line, FONT + 1.5, INK, "normal" if i else "bold") for i, text in enumerate(title)
               for line in wrapped(text, width, FONT + 1.5)]
    heading += [(line, FONT - 1, QUIET, "normal") for line in wrapped(subtitle, width, FONT - 1)]
    top = sum(points * 1.4 / 72 for _, points, _, _ in heading) + 0.12
    above = max(len(wrapped(p.label, size + GAP, font)) for p in panels) * font * 1.25 / 72 + 0.05
    step = above + size + max(p.note.count("\n") + bool(p.note) for p in panels) * (font - 1) * 1.25 / 72 + 0.1
    height = top + math.ceil(len(panels) / columns) * step + 0.02
    figure = plt.figure(figsize=(width, height))

    def place(x, y, w, h):
        """Axes whose upper left corner is x and y inches from the figure's."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    y = 0.06
    for line, points, colour, weight in heading:
        figure.text(0.08 / width, 1 - y / height, line, fontsize=points, color=colour, weight=weight, va="top",
                    parse_math=False)
        y += points * 1.4 / 72
    for r, text in enumerate(rows):
        figure.text(0.08 / width, 1 - (top + r * step + above + size / 2) / height, va="center", parse_math=False,
                    s="\n".join(wrapped(text, left - 0.1, FONT - 1)), fontsize=FONT - 1, linespacing=1.25)

    peaks = [p.map.size * np.abs(p.map).max() if p.map is not None else 0 for p in panels]
    scale = LogNorm(1, max([4.0, vmax] + [v for v, s in zip(peaks, signed) if not s]))   # 2 to 4 looks like 20 to 40
    most = max([2.0] + [v for v, s in zip(peaks, signed) if s])
    looks, shown = {False: (overlay_colours(), scale),
                    True: (overlay_colours("PuOr", True), SymLogNorm(1, vmin=-most, vmax=most))}, {}
    for i, panel in enumerate(panels):
        if panel is NOTHING:
            continue
        axes = place(left + i % columns * (size + GAP), top + i // columns * step + above, size, size)
        axes.set(xticks=[], yticks=[])
        axes.set_title("\n".join(wrapped(panel.label, size + GAP, font)), fontsize=font, pad=2.5, loc="center",
                       color=ACCENT if panel.accent else INK, weight="bold" if panel.accent else "normal",
                       parse_math=False)
        axes.set_xlabel(panel.note, fontsize=font - 1, color=QUIET, labelpad=2, linespacing=1.15, parse_math=False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=ACCENT if panel.accent else QUIET, linewidth=1.6 if panel.accent else 0.5)
        pixels = len(panel.picture)
        side = pixels if panel.map is None else len(panel.map)
        extent = (0, side, side, 0)
        if panel.map is None:
            axes.imshow(panel.picture, extent=extent, interpolation="antialiased")
        else:
            # Pale and of little contrast, so that the colours on it can be compared with those of the bar.
            grey = np.asarray(ImageOps.autocontrast(Image.fromarray(panel.picture).convert("L"), 1)) / 255
            axes.imshow(BACK + 0.4 * (grey - grey.mean()), cmap="gray", vmin=0, vmax=1, extent=extent)
            colours, norm = looks[signed[i]]
            shown[signed[i]] = axes.imshow(panel.map * panel.map.size, colours, norm, extent=extent,
                                           interpolation="nearest")
        edges = [[label["box2d"][k] * side / pixels for k in ("x1", "y1", "x2", "y2")] for label in panel.boxes]
        marked = [(box, BOX, 0.9) for box in edges]
        if panel.query:
            row, column = panel.query
            marked.append(((column, row, column + 1, row + 1), INK, 1.1))
        for (x1, y1, x2, y2), colour, line in marked:
            axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, lw=line, path_effects=[
                withStroke(linewidth=line + 1, foreground="white")]))
    x, tall = left + columns * (size + GAP) + 0.03, min(math.ceil(len(panels) / columns), 2) * step - (step - size)
    for kind in sorted(shown):
        bar = place(x, top + above, 0.09, tall)
        bar.set_facecolor(str(BACK))
        if kind:
            ticks = [tick for tick in (-16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16) if abs(tick) <= most]
            texts = [f"{tick:+d}×".replace("-", "−") if tick else "0" for tick in ticks]
            name = "(second − first) / uniform"
        else:
            steps = (1,) if scale.vmax > 8 else (1, 1.5)    # 1, 1.5, 2, 3, 4 ... or, on a long scale, powers of 2
            ticks = [m * 2 ** k for k in range(20) for m in steps if m * 2 ** k <= scale.vmax]
            texts, name = ["≤1×"] + [f"{tick:g}×" for tick in ticks[1:]], "attention / uniform"
        figure.colorbar(shown[kind], cax=bar).set_ticks(ticks, labels=texts)
        bar.set_ylabel(name, fontsize=FONT - 1, labelpad=2)
        bar.tick_params(labelsize=FONT - 1.5, length=2, pad=1.5)
        bar.minorticks_off()
        x += 0.6
    return figure


def plot(rows, columns, height, width=WIDTH, **kwargs):
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **kwargs)


def heat(axes, table, rows, columns, texts, cmap="cividis", norm=None, bar="", **labels):
    """A heat map; texts: a format for its cells, or a list of lists of texts. Cells that are NaN stay empty."""
    table = np.asarray(table, float)
    image = axes.imshow(table, matplotlib.colormaps[cmap].with_extremes(bad="#e8e8e8"), norm, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            dark = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.59, 0.11)) < 0.5
            axes.text(j, i, texts.format(value) if isinstance(texts, str) else texts[i][j], ha="center", va="center",
                      fontsize=FONT - 2, color="white" if dark else INK)
    if bar:
        axes.figure.colorbar(image, ax=axes, label=bar, fraction=0.05, pad=0.02).ax.tick_params(length=2)
    axes.set(**labels)


def intervals(axes, rows, colour=SERIES[0], others=(), shift=0.0, label=None, bars=True):
    """{name: evaluate.row} as dots with intervals, one below the other; those named in `others` in grey.

    bars: a bar and the value too; shift: of the dots, where several series share the names.
    """
    for y, (name, r) in enumerate(rows.items()):
        if r["value"] is None:
            continue
        shade = SERIES[3] if name in others else colour
        axes.errorbar(r["value"], y + shift, xerr=[[r["value"] - r["low"]], [r["high"] - r["value"]]], fmt="o",
                      color=shade, label=None if y else label)
        if bars:
            axes.barh(y, r["value"], 0.6, color=shade, alpha=0.35, lw=0)
            axes.annotate(f"{r['value']:.1f}", (r["high"], y), (4, 0), textcoords="offset points", va="center",
                          color=QUIET, fontsize=FONT - 1.5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)


def shown_row(entry, unit="", digits=1):
    """`93.3 [92.7, 93.9]` of an evaluate.row."""
    return "–" if entry["value"] is None else \
        f"{entry['value']:.{digits}f}{unit} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


# ---- figures of one scene and command; `shot` is what answer() returned ----

def maps_line(cfg, rest=""):
    side = cfg.image_size // cfg.patch_size
    rest = rest or f"Mean of {cfg.text_layers} layers × {cfg.text_heads} heads."
    return f"Cross-attention over {side} × {side} patches; 1 = uniform. H: entropy in nats (% of its maximum, " \
           f"{math.log(side * side):.2f}). {rest}"


def draw_words(shot, cfg, layer=None):
    """A map for each word and for the answer: the mean of all layers, or one of them."""
    layers, size = shot["cross"].mean(1), len(shot["picture"])
    maps = layers.mean(0) if layer is None else layers[layer]
    ends = shot["words"] + ["answer" if shot["verdict"] else "description"]
    panels = [Panel(shot["picture"], label=f"picture, {size} px", boxes=shot["boxes"][-1])]
    panels += [Panel(shot["picture"], found, word, numbers(found, boxes, size), boxes, word is ends[-1])
               for word, found, boxes in zip(ends, maps, shot["boxes"])]
    rest = "" if layer is None else f"Layer {layer}, mean of {cfg.text_heads} heads."
    columns = math.ceil(len(panels) / math.ceil(len(panels) / 6))
    return draw_panels(panels, columns, title_of(shot), maps_line(cfg, rest),
                       vmax=0.0 if layer is None else maps[0].size * layers.max())


def draw_layers(shot, cfg):
    """The same layer by layer: a list of figures."""
    return [draw_words(shot, cfg, layer) for layer in range(cfg.text_layers)]


def draw_heads(shot, cfg):
    """The answer's map in every head of every layer."""
    boxes = shot["boxes"][-1]
    panels = [Panel(shot["picture"], found, f"head {h}", numbers(found, boxes, len(shot["picture"])), boxes)
              for layer in shot["cross"][:, :, -1] for h, found in enumerate(layer)]
    return draw_panels(panels, cfg.text_heads, title_of(shot), maps_line(cfg, "All heads, at the answer."),
                       [f"layer {i}" for i in range(cfg.text_layers)])


def draw_vision(shot, cfg):
    """Self-attention of the encoder from the patch that the answer looked at most: heads, their mean and rollout."""
    side = cfg.image_size // cfg.patch_size
    patch, own = int(shot["maps"][-1].argmax()), np.eye(side * side)
    panels, flow = [], own
    for layer in shot["vision"]:
        flow = (0.5 * layer.mean(0) + 0.5 * own) @ flow
        for name, found in [*((f"head {h}", found) for h, found in enumerate(layer)), ("mean", layer.mean(0)),
                            ("rollout to here", flow)]:
            found = found[patch].reshape(side, side)
            panels.append(Panel(shot["picture"], found, name, numbers(found, (), 0), query=divmod(patch, side)))
    return draw_panels(panels, cfg.vision_heads + 2, [f"What the outlined patch looks at, for: {asked_text(shot)}"],
                       "Vision self-attention; the patch is the one that the answer looked at most. Rollout: attention "
                       "and residual path multiplied through the layers (Abnar and Zuidema 2020).",
                       [f"layer {i}" for i in range(cfg.vision_layers)])


def draw_text(shot, cfg):
    """Self-attention of the decoder, tokens by tokens, with the causal mask hatched."""
    tokens, columns = ["[SOS]"] + shot["words"] + ["?"], min(4, cfg.text_layers)
    rows, T = math.ceil(cfg.text_layers / columns), len(tokens)
    figure, axes = plot(rows, columns, 0.5 + 2.05 * rows)
    figure.set_layout_engine("compressed")                  # squares side by side, the colour bar as high as they
    for number, axis in enumerate(axes.flat):
        if number >= cfg.text_layers:
            axis.axis("off")
            continue
        weights = np.where(np.triu(np.ones((T, T)), 1) > 0, np.nan, shot["text"][number].mean(0))
        image = axis.imshow(weights, "cividis", PowerNorm(0.5, 0, 1))
        axis.patch.set(facecolor="#f4f4f4", hatch="/////", edgecolor="#c0c0c0")
        axis.set_title(f"layer {number}", loc="center")
        axis.set_xticks(range(T), tokens, rotation=90, fontsize=FONT - 1.5)
        axis.set_yticks(range(T), [""] * T if number % columns else tokens, fontsize=FONT - 1.5)
        axis.tick_params(length=0)
    axes[0, 0].set_ylabel("the token that looks ...")
    figure.supxlabel("... at this token; hatched: the future, hidden by the causal mask", fontsize=FONT)
    figure.colorbar(image, ax=axes, label="attention, mean of heads", fraction=0.02, pad=0.01)
    return figure


def draw_comparison(pairs, cfg):
    """Two commands about one picture in a row: the picture, the answers' maps, and their difference."""
    panels = []
    for pair in pairs:
        first, second = maps = [shot["maps"][-1] for shot in pair]
        apart = evaluate.distances(first.reshape(1, -1), second.reshape(1, -1))
        panels.append(Panel(pair[0]["picture"], label="picture"))
        panels += [Panel(shot["picture"], found, f"{asked_text(shot)}\n{verdict_text(shot)}",
                         numbers(found, shot["boxes"][-1], len(shot["picture"])), shot["boxes"][-1])
                   for shot, found in zip(pair, maps)]
        panels.append(Panel(pair[0]["picture"], second - first, "second − first", (
            "L2 {l2[0]:.3f}\ncosine {cosine[0]:.2f}\nJensen-Shannon {js[0]:.3f}").format(**apart)))
    return draw_panels(panels, 4, ["One picture, two commands: where the answer looked"], maps_line(cfg))


SCENE = {"words": draw_words, "layers": draw_layers, "heads": draw_heads, "vision": draw_vision, "text": draw_text}

# ---- the story: model, questions and evaluate.py's files ----

class Story:
    """What a report is made of; UserError names the command that makes what is missing.

    parts, cfg: from train.load_model; page: eval.json; failures: dicts; items, answer_maps, odds: from attention.npz;
    asked: evaluate.Questions of the page's split; at: {item row: question}; meta: of the data; seed: of all drawing.
    """

    def __init__(self, cfg):
        self.subject = s = evaluate.Subject(cfg)
        self.parts, self.cfg, out = (s.model, s.cfg, s.tokenizer, s.state, s.device), s.cfg, Path(cfg.out_dir)
        again = f"run python evaluate.py --out_dir={out} (and the --checkpoint and --data_dir given here, if any)"
        try:
            self.page = json.loads((out / "eval.json").read_text(encoding="utf-8"))
            self.failures = list(map(json.loads, (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()))
            with np.load(out / "attention.npz") as stored:
                self.items, self.answer_maps, self.odds = (stored[k] for k in ("items", "answer_maps", "odds"))
            made_by, made_from = self.page.get("format"), (self.page["step"], self.page["data_hash"])
        except FileNotFoundError as error:
            raise UserError(f"there is no {error.filename}: {again}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(f"evaluate.py's files in {out} cannot be read ({error}): {again}") from None
        if made_by != evaluate.FORMAT:
            raise UserError(f"{out / 'eval.json'} is of format {made_by!r}, and this visualize.py reads format "
                            f"{evaluate.FORMAT}: {again}")
        self.meta, self.seed = prepare.load_meta(self.cfg), self.cfg.seed
        if made_from != (s.state["step"], self.meta["hash"]):
            raise UserError(f"{out / 'eval.json'} is of step {made_from[0]} and data {made_from[1]}, the checkpoint "
                            f"and data here of step {s.state['step']} and {self.meta['hash']}: {again}")
        self.asked = evaluate.Questions(s, self.meta, self.page["split"])
        self.at = {int(row): i for i, row in enumerate(self.asked.rows)}

    def rng(self):
        return np.random.default_rng(self.seed)

    def boxes(self, i):
        """Labels to outline for each word of question i and, last, for its answer."""
        asked, picture = self.asked, self.asked.picture[i]
        return named_boxes(asked.frames[picture], asked.views[picture], asked.questions[i], asked.items[i]["command"])

    def shot(self, i):
        """`answer` to question i, with the boxes of what it asks."""
        picture = self.asked.data.images[self.asked.picture[i]]
        return dict(answer(*self.parts, picture, self.asked.items[i]["command"]), boxes=self.boxes(i))

    def looks(self, chosen, tokens=None):
        """Mean maps (m, P) of the chosen questions, at these tokens or, without, at the answer."""
        maps = [cross[:, :, -1 if tokens is None else tokens[i]].mean((0, 1))
                for i, cross in zip(chosen, self.subject.look(self.asked.jobs(chosen)))]
        return np.array(maps)


def named_boxes(frame, view, question, command):
    """Labels of the certain objects that each word of the command names and, last, of those that make it YES."""
    def certain(category, **where):
        return [frame["labels"][o.label] for t, o in view.matching(category, **where) if t == commands.TRUE]
    where = dict(place=question.second if question.template == "exists_at" else None,
                 near=True if question.template == "near" else None)
    decisive = question.objects[:1] if question.template == "and_no" else question.objects
    return [next((certain(c) for c in question.objects if word in NAMED[c]), []) for word in split_words(command)] \
        + [[label for c in dict.fromkeys(decisive) for label in certain(c, **where)]]


# ---- figures of a set: maps. Each takes the story and returns (what to save, caption), or None without material ----

def figure_pictures(story):
    asked, rng, panels = story.asked, story.rng(), []
    for picture in rng.permutation(np.unique(asked.picture))[:10]:
        item = asked.items[rng.choice(np.flatnonzero(asked.picture == picture))]
        labels, view = asked.frames[picture]["labels"], asked.views[picture]
        seen = [labels[o.label] for o in view.objects if o.certain == commands.TRUE]
        panels.append(Panel(asked.data.images[picture], boxes=seen, label=tidy(
            f"{item['command']}?\n{'YES' if item['answer'] else 'NO'}: {item['reason']}")))
    return draw_panels(panels, 5, ["Pictures and questions"], "Outlined: every object that counts as seen. Above: a "
                       "question, its true answer and the reason."), \
        f"{len(panels)} of {len(asked.frames)} pictures of the {story.page['split']} split and one of the questions " \
        f"about each, drawn at random (seed {story.seed})."


def figure_scene(kind, text):
    """The figure function of SCENE[kind] for one question: drawn among YES questions on an object at a place."""
    def figure(story):
        asked = story.asked
        where = asked.truth & np.array([q.template == "exists_at" for q in asked.questions])
        shot = story.shot(asked.sample(1, story.seed, where if where.any() else None)[0])
        return SCENE[kind](shot, story.cfg), f"{text} One question drawn at random (seed {story.seed}) among " \
            f"{int(where.sum())} with the answer YES about an object at a place: “{asked_text(shot)}”"
    return figure


def figure_gallery(story):
    asked, cfg, columns, panels, rows = story.asked, story.cfg, 6, [], []
    size, side = cfg.image_size, cfg.image_size // cfg.patch_size
    thirds = {p: [dict(box2d=dict(x1=k * size / 3, x2=(k + 1) * size / 3, y1=0, y2=size))]
              for k, p in enumerate(commands.PLACES)}
    for name in ("pedestrian", "traffic light", "car", "bicycle", "left", "right"):
        token, boxes = {}, {}                               # of each question with that word, if what it names is there
        for i, (item, question) in enumerate(zip(asked.items, asked.questions)):
            if name in question.objects or name == question.place:
                words = split_words(item["command"])
                at = next((t for t, word in enumerate(words) if word in NAMED.get(name, {name})), None)
                named = thirds.get(name) or at is not None and story.boxes(i)[at]
                if at is not None and named:
                    token[i], boxes[i] = at + 1, named
        chosen = asked.sample(300, story.seed, np.isin(np.arange(len(asked.rows)), list(token)))
        if len(chosen) < columns:
            continue
        maps, covers = story.looks(chosen, token), np.array([evaluate.cover(boxes[i], size, side) for i in chosen])
        hit = evaluate.mean_row(asked.picture[chosen], evaluate.pointing(maps, covers), cfg.bootstrap)
        rich = evaluate.median_row(asked.picture[chosen], evaluate.enrichment(maps, covers), cfg.bootstrap)
        rows.append(f"“{name}”\nn={len(chosen)}\npoints {hit['value']:.0f}%\n(chance "
                    f"{100 * (covers > 0).mean():.0f}%)\nenriched {rich['value']:.1f}×")
        for k in story.rng().permutation(len(chosen))[:columns]:
            found, own = maps[k].reshape(side, side), boxes[chosen[k]]
            panels.append(Panel(asked.data.images[asked.picture[chosen[k]]], found, tidy(
                asked.items[chosen[k]]["command"]) + "?", numbers(found, own, size), own))
    return panels and (
        draw_panels(panels, columns, ["Where one word looks, scene after scene"], maps_line(cfg), rows),
        f"A word a row, in {columns} scenes drawn at random (seed {story.seed}). On the left, of all n questions "
        "looked at: how often the largest patch touches a box of what the word names (chance: of a random patch), and "
        "the median of attention in the boxes over their area. For left and right the box is that third of the "
        "picture.")


def figure_comparison(story):
    asked, rng, pairs = story.asked, story.rng(), []
    for picture in rng.permutation(np.unique(asked.picture)):
        own = [i for i in rng.permutation(np.flatnonzero(asked.picture == picture)) if asked.questions[i].objects]
        other = [i for i in own if not set(asked.questions[i].objects) & set(asked.questions[own[0]].objects)]
        if other and len(pairs) < 3:
            pairs.append([story.shot(own[0]), story.shot(other[0])])
    other, same = (story.page["attention"]["stability"][k]["l2"] for k in ("another question", "paraphrase"))
    return pairs and (draw_comparison(pairs, story.cfg), (
        f"Three pictures with two questions about different objects each, drawn at random (seed {story.seed}). "
        f"Difference: orange where the first question looks more, purple where the second does. Over {other['n']} "
        f"random questions the L2 distance to another question's map is {shown_row(other, digits=3)} on average, to a "
        f"paraphrase's {shown_row(same, digits=3)}."))


def figure_twins(story):
    asked, cfg, found, panels, rows = story.asked, story.cfg, story.page["twins"], [], []
    if not found:
        return None
    with open(Path(cfg.data_dir) / "twins.jsonl", encoding="utf-8") as file:
        edits = [e for e in map(json.loads, file) if e["flip"] and e["item"] in story.at]
    for k in story.rng().permutation(len(edits))[:4]:
        i, edit = story.at[edits[k]["item"]], edits[k]["flip"]
        spec = prepare.apply_edit(prepare.sample_scene(Path(asked.frames[asked.picture[i]]["name"]).stem, cfg), edit)
        frame, command = prepare.scene_frame(spec, cfg), asked.items[i]["command"]
        boxes = named_boxes(frame, commands.View(frame, cfg), asked.questions[i], command)
        twin = dict(answer(*story.parts, prepare.draw_scene(spec, cfg.image_size), command), boxes=boxes)
        rows.append(tidy(command) + "?")
        for name, shot, truth in (("scene", story.shot(i), asked.truth[i]),
                                  (f"twin: {edit['kind']}", twin, not asked.truth[i])):
            maps, boxes = shot["maps"][-1], shot["boxes"][-1]
            panels += [Panel(shot["picture"], label=name, boxes=boxes),
                       Panel(shot["picture"], maps, f"{verdict_text(shot)}\ntruth {'YES' if truth else 'NO'}",
                             numbers(maps, boxes, cfg.image_size), boxes)]
    return panels and (draw_panels(panels, 4, ["Twins: one edit flips the truth"], maps_line(cfg), rows), (
        f"{len(rows)} of {len(edits)} questions, drawn at random (seed {story.seed}): the scene and where the answer "
        "looked, the scene after one edit that makes the other answer true, and where it looked then. Both answers are "
        f"right for {shown_row(found['both_right'], '%')} of {found['both_right']['n']} pairs; chance is 25%."))


def figure_failures(story):
    asked, cfg, columns, panels, rows = story.asked, story.cfg, 5, [], []
    missed = sorted(story.at[r["item"]] for r in story.failures if r["truth"] == "YES")
    missed = [i for i in missed if story.boxes(i)[-1]]
    if not missed:
        return None
    maps, side = story.looks(missed), cfg.image_size // cfg.patch_size
    covers = np.array([evaluate.cover(story.boxes(i)[-1], cfg.image_size, side) for i in missed])
    usual = np.percentile(evaluate.entropy(story.answer_maps.astype(np.float64)), 90)
    diffuse, hit = evaluate.entropy(maps) > usual, evaluate.pointing(maps, covers) > 0.5
    odds = np.concatenate(list(story.subject.ask(asked.jobs(missed))))
    for name, mine in {"wrong region": ~diffuse & ~hit, "diffuse": diffuse,
                       "right region, wrong answer": ~diffuse & hit}.items():
        rows.append(f"{name}\nn={mine.sum()}\n{100 * mine.mean():.0f}%")
        chosen = story.rng().permutation(np.flatnonzero(mine))[:columns]
        for k in chosen:
            i, found = missed[k], maps[k].reshape(side, side)
            boxes = story.boxes(i)[-1]
            said = f"NO ({100 / (1 + math.exp(odds[k])):.0f}%)\n"
            panels.append(Panel(asked.data.images[asked.picture[i]], found, tidy(asked.items[i]["command"]) + "?",
                                said + numbers(found, boxes, cfg.image_size), boxes))
        panels += [NOTHING] * (columns - len(chosen))
    return draw_panels(panels, columns, ["Objects that were there and were denied"], maps_line(cfg), rows), (
        f"All {len(missed)} false negatives about objects, sorted by the answer's map; those shown are drawn at random "
        f"within each type (seed {story.seed}). Diffuse: an entropy above {usual:.2f} nats, the 90th percentile of "
        f"{len(story.answer_maps)} random answers. Of the rest, right region: the largest patch touches a box, as a "
        f"random one would in {100 * (covers > 0).mean():.0f}%.")


def figure_wrong(story):
    asked, columns, panels, rows = story.asked, 5, [], []
    sure = [r for r in story.failures if r["suspected_label_error"]]
    for name, mine in (("any wrong answer", story.failures), ("sure of it in every wording", sure)):
        if not mine:
            continue
        rows.append(f"{name}\nn={len(mine)}")
        chosen = story.rng().permutation(len(mine))[:columns]
        for r in (mine[k] for k in chosen):
            said, p = ("YES", r["p_yes"]) if r["truth"] == "NO" else ("NO", 1 - r["p_yes"])
            note = f"said {said} ({100 * p:.0f}%)\ntruth: {tidy(r['reason'])}\n{r['type']} error"
            i = story.at[r["item"]]
            panels.append(Panel(asked.data.images[asked.picture[i]], None, tidy(r["command"]) + "?",
                                "\n".join(wrapped(note, PANEL, FONT - 1)), story.boxes(i)[-1]))
        panels += [NOTHING] * (columns - len(chosen))
    return panels and (draw_panels(panels, columns, ["Wrong answers, beside the truth"], "Outlined: what makes the "
                                   "answer YES, where a box does.", rows), (
        f"Upper row: {columns} of {len(story.failures)} wrong answers, drawn at random (seed {story.seed}). Lower row: "
        f"of the {len(sure)} that were wrong with over 95% confidence in every wording, where one looks for errors of "
        "the labels or the rules first. Error: see the text above."))


# ---- figures of a set: numbers ----

def figure_accuracy(story):
    page, (figure, axes) = story.page, plot(1, 3, 3.3, gridspec_kw=dict(width_ratios=(1, 1.35, 0.75)))
    (left, middle, right), controls, by = axes[0], page["controls"], page["by"]["template"]
    intervals(left, {"all": page["overall"], **page["by"]["family"], **controls}, others=controls)
    left.set_title("families, and controls")
    intervals(middle, by, shift=-0.3, label="model", bars=False)
    for k, name in enumerate(controls):
        intervals(middle, {t: page["controls_by_template"][t][name] for t in by}, SERIES[3 - k],
                  shift=0.2 * k - 0.1, label=name, bars=False)
    middle.set_title("templates")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for axis in (left, middle):
        axis.axvline(50, color=INK, lw=0.6, ls=":")
        axis.set(xlabel="balanced accuracy, %", xlim=(38, 108))
    counts = page["classification"]["confusion"]
    counts = np.array([[counts[f"{truth}_said_{said}"] for said in ("yes", "no")] for truth in ("yes", "no")])
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    texts = [[f"{share[i, j]:.1f}%\n{counts[i, j]}" for j in (0, 1)] for i in (0, 1)]
    heat(right, share, ("YES", "NO"), ("YES", "NO"), texts, "Blues", Normalize(0, 100), title="confusion",
         xlabel="said", ylabel="true")
    return figure, f"All {page['overall']['n']} questions of the {page['split']} split, with 95% intervals over " \
        "pictures. Dotted: guessing, where the controls must stand, since YES and NO are balanced for every " \
        "question: no picture, another scene's picture, a decoder trained without pictures. Confusion: shares " \
        "of each row, and counts."


def figure_complexity(story):
    figure, axes = plot(1, 3, 2.1, sharey=True)
    for axis, name in zip(axes[0], ("objects seen in the scene", "objects of the asked kind", "words")):
        rows = {re.sub(r"^(\d+) to \1$", r"\1", group).replace(" or more", "+").replace(" to ", "–"): r
                for group, r in story.page["by"][name].items() if r["value"] is not None and group != "none asked"}
        value, low, high = ([r[k] for r in rows.values()] for k in ("value", "low", "high"))
        axis.errorbar(range(len(rows)), value, np.array([np.subtract(value, low), np.subtract(high, value)]), fmt="o-",
                      color=SERIES[0])
        axis.set_xticks(range(len(rows)), [f"{k}\nn={r['n']}" for k, r in rows.items()], fontsize=FONT - 1.5)
        axis.set_xlabel(name)
        axis.margins(x=0.12)
    axes[0, 0].set_ylabel("balanced accuracy, %")
    return figure, "Accuracy against how much there is to see and to read, with 95% intervals over pictures."


def figure_training(story):
    path = Path(story.cfg.out_dir) / "log.csv"
    if not path.exists():
        return None
    columns = {"loss": "loss, nats", "lr": "learning rate × 1000", "grad_norm": "gradient norm",
               "val_accuracy": "validation, %"}
    try:
        log = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        last = max((int(row["step"]) for row in log), default=0)
        curves = {column: np.array([(int(row["step"]), float(row[column])) for row in log if row[column]]
                                   ).reshape(-1, 2).T for column in columns}
    except (csv.Error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a log of training ({error}): mend it, or move it away") from None
    if not last:
        return None
    figure, axes = plot(1, 4, 1.9)
    stage = train.see_updates(story.cfg)
    for axis, (column, title) in zip(axes[0], columns.items()):
        step, value = curves[column]
        axis.plot(step, value * {"lr": 1000, "val_accuracy": 100}.get(column, 1), "o-" if axis is axes[0, 3] else "-",
                  color=SERIES[0])
        axis.set(title=title, xlabel="update", xlim=(0, 1.05 * last),
                 yscale="log" if column == "loss" else "linear")
        axis.axvline(stage, color=ACCENT, lw=0.8, ls="--")
    return figure, f"From log.csv: the mean loss of {story.cfg.log_every} updates, the learning rate of the encoder, " \
        "then of the decoder, the gradient norm of one update, before clipping at " \
        f"{story.cfg.grad_clip:g}. Left of the dashed line (update {stage}) only the encoder learns, " \
        "from the words of descriptions, so the losses on its two sides are not comparable. Validation: " \
        "balanced accuracy."


def figure_cost(story):
    path = Path(story.cfg.out_dir) / "bench.json"
    if not path.exists():
        return None
    bench = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = plot(1, 3, 2.1, sharey=True)
    panels = dict(zip(dict.fromkeys(name.split(", ")[0] for name in bench["cost"]), axes[0]))
    for name, entry in bench["cost"].items():
        size, _, series = name.partition(", ")
        panels[size].plot(entry["size"], entry["ms"], "o-", color=SERIES[len(panels[size].lines)],
                          label=f"{series or 'time'} ∝ size$^{{{entry['exponent']:.2f}}}$")
        panels[size].set(xlabel=size, xscale="log", yscale="log")
        panels[size].set_xticks(entry["size"], entry["size"])
        panels[size].minorticks_off()
        panels[size].legend()
    low, high = axes[0, 0].get_ylim()
    ticks = [n * 10 ** k for k in range(-3, 7) for n in (1, 2, 5) if low <= n * 10 ** k <= high]
    axes[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0, 0].set_ylabel("ms an update")
    return figure, "How the cost of training grows: the least time of an update of the second stage with a quarter " \
        f"of the batch, on {bench['device']} in {bench['dtype']}, {bench['threads']} threads. Both axes are " \
        "logarithmic; the exponent is the slope of the line fitted to all points. From python train.py --bench=True."


def figure_rates(story):
    path = Path(story.cfg.out_dir) / "lr_range.json"
    if not path.exists():
        return None
    figure, axes = plot(1, 2, 2.1)
    for axis, (stage, entry), colour in zip(axes[0], json.loads(path.read_text(encoding="utf-8")).items(), SERIES):
        axis.plot(entry["scale"], entry["loss"], color=colour)
        axis.axvline(1, color=ACCENT, lw=0.8, ls="--")
        axis.set(title={"see": "first stage: the encoder alone", "read": "second stage, from new weights"}[stage],
                 xscale="log", xlabel="times the learning rates of the settings", ylabel="loss, nats")
    return figure, "The loss while the learning rates grow with each update, a running mean of it; dashed: the rates " \
        "as they are set. From python train.py --lr_range=True."


def figure_calibration(story):
    asked, page = story.asked, story.page["calibration"]
    figure, axes = plot(2, 3, 2.9, height_ratios=(3, 1), sharey="row")
    for (top, low), name in zip(axes.T, ("raw", "scaled")):
        n, p, share = np.array(page[name]["bins"]).T
        band, e = 1.96 * np.sqrt(p * (1 - p) / n), page[name]["ece"]
        top.bar(p, 200 * band, 0.045, 100 * (p - band), color="#d0d0d0", label="if calibrated")
        top.plot((0, 1), (0, 100), color=INK, lw=0.6, ls=":")
        top.plot(p, 100 * share, "o-", color=SERIES[0], label="model")
        text = "as trained" if name == "raw" else f"temperature {page['temperature']:.2f}"
        top.set(title=f"{text}: ECE {e['value']:.2f}\n(calibrated: up to {e['calibrated_high']:.2f})", xticklabels=[])
        low.bar(p, n, 0.05, color=SERIES[3])
        low.set(yscale="log", ylim=(1, None), xlabel="predicted probability of YES", xlim=top.get_xlim())
        low.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("true answers YES, %")
    axes[1, 0].set_ylabel("questions")
    axes[0, 0].legend(loc="upper left")
    H, sure = evaluate.entropy(story.answer_maps.astype(np.float64)), np.abs(story.odds)
    where = [story.at[int(row)] for row in story.items]
    right = (story.odds > 0) == asked.truth[where]
    for axis in axes[:, 2]:
        axis.remove()
    axis = figure.add_subplot(axes[0, 2].get_gridspec()[:, 2])
    order = story.rng().permutation(len(right))              # so that neither kind hides the other
    axis.scatter(H[order], sure[order], s=3, alpha=0.4, c=np.where(right, *SERIES[:2])[order], lw=0, rasterized=True)
    for mine, colour, name in ((right, SERIES[0], "right"), (~right, SERIES[1], "wrong")):
        axis.scatter([], [], s=3, alpha=0.4, color=colour, lw=0, label=f"{name}, n={mine.sum()}")
    linked = evaluate.correlation_row(asked.picture[where], H, sure, story.cfg.bootstrap)
    axis.set(title="confidence and entropy\nof attention", xlabel="entropy of the answer's map, nats",
             ylabel="|log-odds| of the answer")
    axis.legend(markerscale=3, frameon=True, edgecolor="none")
    return figure, f"Reliability of {page['raw']['n']} answers in 15 bins of equal width; grey: where 95% of the " \
        "bins of a perfectly calibrated model would lie. The temperature was fitted on the validation split. Right: " \
        f"{len(H)} random questions, rank correlation {shown_row(linked, digits=2)}; 0 says that how spread the " \
        "attention is tells nothing about certainty."


def figure_grounding(story):
    found, probe = story.page["attention"]["grounding"], story.page["attention"]["deletion_insertion"]
    if not all("scores" in found[kind] for kind in ("word", "answer")):
        return None
    figure, axes = plot(2, 2, 3.9, height_ratios=(1.15, 1))
    for axis, (kind, name) in zip(axes[0], (("word", "the word of an object"), ("answer", "the answer"))):
        rows = {k: scores["pointing"] for k, scores in found[kind]["scores"].items()}
        intervals(axis, rows, others=[k for k in rows if not k.startswith("model")])
        axis.set(title=f"{name}, n={rows['model']['n']}", xlim=(0, 110),
                 xlabel="largest patch touches a box, %")
    axes[0, 1].set_yticklabels([])
    side = story.cfg.image_size // story.cfg.patch_size
    patches = [round(side * side * share) for share in probe["share_of_patches"]]
    for axis, name, done in zip(axes[1], ("deletion", "insertion"), ("taken away", "shown")):
        for key, colour, label in (("random_curve", SERIES[3], "random order"), ("curve", SERIES[0], "by attention")):
            axis.plot(probe[name][key], "o-", color=colour, label=label)
        axis.set_xticks(range(len(patches)), patches)
        area = [probe[name][kind]["value"] or 0 for kind in ("attention", "random")]
        axis.set(xlabel=f"patches {done}", ylim=(0, 103), ylabel="p(YES), %",
                 title=f"{name}: area {area[0]:.0f}, random order {area[1]:.0f}")
    axes[1, 0].legend()
    return figure, "Above: the pointing game of the maps averaged over layers and heads, beside what knows less " \
        "(grey): a random patch, the centre, another kind's word in the same picture, " \
        f"the same kind's word in another picture, untrained weights. Below: {probe['deletion']['difference']['n']} " \
        "right YES answers, the patches that the answer looked at most taken away (or shown) first. Only this " \
        "says that the patches matter."


def figure_specialisation(story):
    page, found = story.page, story.page["attention"]["specialisation"]
    if not found["categories"]:
        return None
    figure = plt.figure(figsize=(WIDTH, 5.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    cells = {kind: {(e["layer"], e["head"]): e for e in page["head_ablation"] if e["kind"] == kind}
             for kind in ("vision", "self", "cross")}
    most = max(1.0, *(abs(e["drop"]["value"] or 0) for e in page["head_ablation"]))
    shapes = {kind: np.max(list(own), 0) + 1 for kind, own in cells.items()}
    axes = upper.subplots(1, 4, width_ratios=[shapes[k][1] for k in (*shapes, "cross")])
    for axis, (kind, (layers, heads)) in zip(axes, shapes.items()):
        table = np.array([[cells[kind][i, j]["drop"]["value"] or 0 for j in range(heads)] for i in range(layers)])
        texts = [[f"{round(table[i, j], 1) + 0.0}" + "*" * (cells[kind][i, j]["p_holm"] < 0.05) for j in range(heads)]
                 for i in range(layers)]
        heat(axis, table, range(layers), range(heads), texts, "PuOr_r", Normalize(-most, most), title=f"lost: {kind}",
             xlabel="head")
    by_head = np.array([[e["value"] for e in layer] for layer in page["attention"]["entropy"]["by_head"]])
    heat(axes[3], by_head, *map(range, by_head.shape), "{:.1f}", title="entropy: cross, nats", xlabel="head")
    axes[0].set_ylabel("layer")
    profile = np.array(found["enrichment"])                                       # (L, H, C)
    table = np.log2(np.maximum(profile, 1 / 16)).reshape(-1, profile.shape[-1]).T
    texts = [[f"{2 ** v:.0f}×" if v == column.max() else "" for v, column in zip(row, table.T)] for row in table]
    names = [f"{i // profile.shape[1]}.{i % profile.shape[1]}" for i in range(table.shape[1])]
    heat(lower.subplots(), table, found["categories"], names, texts, "PuOr_r", Normalize(-4, 4), "log₂ enrichment",
         title="what each cross-attention head looks for", xlabel="layer.head")
    n, untrained = page["head_ablation"][0]["drop"]["n"], page["attention"]["specialisation_untrained"]["selectivity"]
    return figure, f"Above: points of balanced accuracy lost on {n} questions without one head; a star: real after " \
        "Holm's correction for all heads (McNemar, p < 0.05). Below: attention of each kind's word in its boxes over " \
        "their area, the number marks a head's favourite. Mean selectivity (log of the favourite over the mean of " \
        f"all kinds): {np.mean(found['selectivity']):.2f}, with untrained weights {np.mean(untrained):.2f}."


def figure_pairs(story):
    found, pairs = story.page["failures"]["confusions"], story.page["failures"]["command_pairs"]
    if not found:
        return None
    kinds = [c for c in commands.CATEGORIES if any(c in (e["asked"], e["present"]) for e in found)]
    taken = np.full((len(kinds), len(kinds)), np.nan)
    for e in found:
        taken[kinds.index(e["asked"]), kinds.index(e["present"])] = round(e["said_yes"] - e["elsewhere"]) + 0.0
    names, n = pairs["templates"], np.array(pairs["n"])
    more = np.round(np.subtract(pairs["same"], pairs["expected"])) + 0.0
    mixed = np.where((n < 20) | (np.triu(n, 1) > 0), np.nan, more)
    figure, axes = plot(1, 2, 3.1)
    for axis, table, ticks, bar, labels in (
            (axes[0, 0], taken, kinds, "points of YES added", dict(
                title="kinds taken for others", ylabel="asked for, and not there", xlabel="what stands there")),
            (axes[0, 1], mixed, names, "points over chance", dict(title="commands that get one answer"))):
        most = max(1.0, np.nanmax(np.abs(table), initial=0))
        heat(axis, table, ticks, ticks, "{:+.0f}", "PuOr_r", Normalize(-most, most), bar, **labels)
        plt.setp(axis.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
    return figure, "Left: questions with the answer NO: by how many points a false YES is more frequent where the " \
        "other kind stands at the place asked about. The largest ratio: asked for a {asked} that is not there, YES " \
        "to {said_yes:.0f}% where a {present} is (n={n}), to {elsewhere:.0f}% where none is. Right: two commands " \
        "about one picture whose true answers differ: how much more often both get the same answer than if their " \
        "errors were independent. Grey: under 20 questions or pairs.".format(**found[0])


def figure_architecture(story):
    model, cfg, words = story.subject.model, story.cfg, len(story.subject.tokenizer)
    side, vision, decoder = cfg.image_size // cfg.patch_size, model.vision, model.decoder

    def count(*parts):
        return f"{sum(p.numel() for part in parts for p in part.parameters()):,} parameters"
    stem = f"3×3 stride-2 convolutions × {int(math.log2(cfg.patch_size))}, then 1×1" if cfg.stem == "conv" else \
        f"one convolution, kernel = stride = {cfg.patch_size}"
    heads = f"{cfg.text_heads} query heads, {cfg.text_kv_heads} key/value heads of {cfg.text_head_dim}"
    sky, sand, mint, edges = "#e3eef7", "#fbeedd", "#e2f3ec", []
    columns = (("picture", f"3 × {cfg.image_size} × {cfg.image_size}", "white"),
               (f"stem ({cfg.stem})", f"{stem}\n{count(vision.stem)}", sky),
               (f"+ {cfg.vision_positions} 2D positions", f"{side} × {side} patches of {cfg.vision_dim}", sky),
               (f"encoder block × {cfg.vision_layers}", f"LayerNorm, attention ({cfg.vision_heads} heads), +\n"
                f"LayerNorm, MLP {cfg.vision_ffn_dim} (GELU), +\n{count(*vision.blocks, vision.norm)}", sky),
               ("projection", f"linear {cfg.vision_dim} → {cfg.text_dim}, RMSNorm\n{count(model.projection)}",
                mint)), (
               ("[SOS] command ? [YES] reason [EOS]", f"at most {cfg.max_text} tokens of {words} words", "white"),
               ("embedding, tied to the logits", f"{cfg.text_dim} wide: {count(decoder.embedding)}", sand),
               ("causal self-attention, +", f"RMSNorm, RoPE, {heads}", sand),
               ("cross-attention to the patches, +", f"RMSNorm, {heads}", mint),
               ("gated FFN, +", f"RMSNorm, {cfg.ffn}, {cfg.text_ffn_dim} wide", sand),
               ("RMSNorm, logits of the next word", "at ?: [YES] or [NO], then the reason", sand))
    figure = plt.figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 102), ylim=(0, 58))
    axes.axis("off")
    arrow = dict(arrowstyle="-|>", color=INK, lw=0.9, shrinkA=0, shrinkB=0)
    for x, parts in zip((1, 58), columns):
        heights = [4 + 2.1 * detail.count("\n") + 2.1 for _, detail, _ in parts]
        gap, y = (57 - sum(heights)) / (len(parts) - 1), 57.5
        for (name, detail, colour), height in zip(parts, heights):
            if y < 57:
                axes.annotate("", (x + 20.5, y), (x + 20.5, y + gap), arrowprops=arrow)
            axes.add_patch(plt.Rectangle((x, y - height), 41, height, fc=colour, lw=0.8,
                                         ec=ACCENT if name.startswith("cross") else QUIET))
            axes.text(x + 20.5, y - 1, name, ha="center", va="top", weight="bold")
            axes.text(x + 20.5, y - height + 0.6, detail, ha="center", va="bottom", fontsize=FONT - 1, color=QUIET)
            edges.append((y, y - height))
            y -= height + gap
    (top, _), (_, bottom), cross, keys = edges[7], edges[9], np.mean(edges[8]), np.mean(edges[4])
    axes.add_patch(plt.Rectangle((55, bottom - 1.2), 46.5, top - bottom + 3.6, fc="none", ec=QUIET, lw=0.8, ls="--"))
    axes.text(55.6, top + 0.4, f"× {cfg.text_layers}", weight="bold")
    axes.text(100.8, top + 0.4, count(*decoder.blocks), ha="right", fontsize=FONT - 1, color=QUIET)
    axes.text(43, keys + 0.5, "keys, values:\nonce a picture", fontsize=FONT - 1, color=QUIET)
    axes.plot((42, 53.5, 53.5), (keys, keys, cross), color=INK, lw=0.9)
    axes.annotate("", (58, cross), (53.5, cross), arrowprops=arrow)
    return figure, f"Drawn from the checkpoint's own settings: {count(model)} in all. The cross-attention, " \
        "outlined in orange, is what the maps below show."


FIGURES = {                   # name: (section of the report, function)
    "pictures": ("data", figure_pictures), "architecture": ("model", figure_architecture),
    "training": ("training", figure_training), "rates": ("training", figure_rates),
    "cost": ("training", figure_cost),
    "accuracy": ("accuracy", figure_accuracy), "complexity": ("accuracy", figure_complexity),
    "words": ("attention", figure_scene("words", "A map for each word, and for the answer, which is made at “?”. "
                                        "Words before the object cannot know what will be asked.")),
    "layers": ("attention", figure_scene("layers", "The same layer after layer (animated; print shows the first).")),
    "gallery": ("attention", figure_gallery), "comparison": ("attention", figure_comparison),
    "twins": ("attention", figure_twins), "grounding": ("attention", figure_grounding),
    "heads": ("attention", figure_scene("heads", "The answer's map in every head of every layer, none left out.")),
    "specialisation": ("attention", figure_specialisation),
    "vision": ("attention", figure_scene("vision", "How patches look at one another before any word is read.")),
    "text": ("attention", figure_scene("text", "How tokens look back at one another.")),
    "calibration": ("calibration", figure_calibration), "failures": ("failures", figure_failures),
    "wrong": ("failures", figure_wrong), "pairs": ("failures", figure_pairs)}

# ---- the report ----

STYLE = """
:root { color-scheme: light dark;
  --ink: #1a1a1a; --quiet: #5a5a5a; --back: #fdfdfb; --line: #d8d8d4; --accent: #b34700 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e4; --quiet: #a8a8a4; --back: #161718; --line: #3a3b3d; --accent: #ff9a4d } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { line-height: 1.2; margin: .6rem 0 .2rem } h2 { margin: 2.4rem 0 .6rem; border-bottom: 2px solid var(--line) }
a { color: var(--accent) } nav a { margin-right: .9rem; display: inline-block } p, li { max-width: 44rem }
.quiet, figcaption { color: var(--quiet) } figure { margin: 1.4rem 0 } .wide { overflow-x: auto }
figure .wide { background: #fff; border-radius: 6px; padding: .4rem }
figure img { display: block; width: 100%; max-width: var(--w); height: auto; margin: 0 auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td:nth-child(2) { white-space: nowrap }
@media (max-width: 640px) { figure img { min-width: min(var(--w), 34rem) } table { font-size: .78rem }
  th, td { padding-right: .5rem } td:last-child { min-width: 5rem } }
@media print { :root { --ink: #000; --quiet: #444; --back: #fff; --line: #bbb; --accent: #000 } nav { display: none }
  body { font-size: 10pt; max-width: none } .wide { overflow: visible } figure, table { break-inside: avoid }
  figure img { max-height: 22cm; width: auto; max-width: 100% } h2 { break-after: avoid } }
"""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title><style>@STYLE@</style></head><body><h1>@TITLE@</h1><p class="quiet">@ABOUT@</p>
"""
REPORT = HEAD + "<nav>@NAV@</nav>\n@BODY@\n</body></html>\n"


def fill(template, **texts):
    """The template with @NAME@ replaced by texts[name]."""
    return re.sub("@([A-Z]+)@", lambda match: texts[match[1].lower()], template.replace("@STYLE@", STYLE))


def table_html(header, rows):
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"          # noqa: E731
    return f'<div class="wide"><table>{line(header, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def result_table(page):
    """The figures that matter most, each with its interval, n and what to compare it with."""
    rows = [("all questions", page["overall"], "guessing: 50")]
    rows += [(f"– {name}", entry, "") for name, entry in page["by"]["family"].items()]
    rows += [(f"control: {name}", entry, "must be 50") for name, entry in page["controls"].items()]
    rows.append(("vision gain, points over the best control", page["vision_gain"], "at most 50"))
    for name, text in (("test_words", "paraphrases"), ("test_combos", "questions")):
        if name in page["held_out"]:
            rows.append((f"{text} never trained on", page["held_out"][name],
                         f"{shown_row(page['held_out'][name + ', drop'])} points lost"))
    if page["ood"]:
        rows.append(("weather and hours never trained on", page["ood"]["all"], "guessing: 50"))
    if page["twins"]:
        rows.append(("twins, both right", page["twins"]["both_right"], "guessing: 25"))
    rows += [(text, page["reasons"][name], "") for name, text in (
        ("true", "reasons true by the rules"), ("shortcut_rate", "right answer, false reason"))
        if name in page["reasons"]]
    for kind, text in (("word", "the word of an object"), ("answer", "the answer")):
        found = page["attention"]["grounding"][kind]
        if "scores" in found:
            best = found["best_baseline"]
            rows.append((f"pointing game, {text}", found["scores"]["model"]["pointing"],
                         f"{best}: {shown_row(found['scores'][best]['pointing'])}"))
    e, n = page["calibration"]["scaled"]["ece"], page["calibration"]["scaled"]["n"]
    cells = [(html.escape(name), shown_row(entry), entry["n"], html.escape(beside)) for name, entry, beside in rows]
    cells.append(("calibration error after temperature scaling", f"{e['value']:.2f}", n,
                  f"perfectly calibrated: up to {e['calibrated_high']:.2f}"))
    return table_html(("what", "% [95% interval]", "n", "beside it"), cells)


def limits(page):
    """What the numbers say against the model, as list items."""
    found = []
    for by in ("family", "object"):
        known = {name: entry for name, entry in page["by"][by].items() if entry["value"] is not None}
        found += [f"Weakest {by}: {name}, {shown_row(known[name], '%')}."
                  for name in sorted(known, key=lambda name: known[name]["value"])[:1]]
    if page["twins"]:
        stays, moves = (shown_row(page["twins"][name], "%") for name in ("stubbornness", "indecision"))
        found.append(f"When one edit flips the truth, {stays} of the answers stay; when one must not matter, "
                     f"{moves} change.")
    found += ["Attention shows where the decoder read, not what decided: patches have exchanged what they hold before. "
              "Deletion and insertion come nearest to a proof.", "One checkpoint of one seed: the intervals hold no "
              "difference between runs."]
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in found) + "</ul>"


def embedded(path, dpi):
    """The picture file as a data: URL, a PNG as a smaller WebP, and the width to show it at in CSS pixels."""
    with Image.open(path) as image:
        kind, data, width = "gif", path.read_bytes(), image.width / (120 if path.suffix == ".gif" else dpi)
        if path.suffix == ".png":
            small, buffer = image.convert("RGB"), io.BytesIO()
            small.thumbnail((1700, 10000))
            small.save(buffer, "WEBP", quality=86)
            kind, data = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", round(width * 128)


def study(path, figures, dpi):
    """HTML of a file of ablate.py, paragraphs and tables of Markdown, and of the figures beside it; "" without it."""
    if not path.exists():
        return ""
    body = []
    for part in html.escape(path.read_text(encoding="utf-8")).strip().split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n")]
        body.append(table_html(rows[0], rows[2:]) if part.startswith("|") else f"<p>{part}</p>")
    for figure in (path.with_name(f"{name}.png") for name in figures):
        if figure.exists():
            source, width = embedded(figure, dpi)
            body.append(f'<figure><div class="wide"><img src="{source}" alt="Figure: {figure.stem}" '
                        f'style="--w: {width}px"></div></figure>')
    return "\n".join(body)


def write_report(path, story, drawn):
    """One HTML file with everything in it. drawn: {name: (file of the figure, caption)}."""
    page, counts, kinds = story.page, story.page["failures"]["counts"], ("vision", "language", "reasoning")
    sets = [(name, r["pictures"], r["commands"], f"{100 * r['yes'] / max(r['commands'], 1):.1f}%",
             ", ".join(f"{k} {v}" for k, v in sorted(r["families"].items())))
            for name, r in story.meta["report"].items() if isinstance(r, dict) and "commands" in r]
    failed = [(f, *(counts["type_by_family"][f].get(k, 0) for k in kinds)) for f in FAMILIES]
    out, dpi = Path(story.cfg.out_dir), story.cfg.dpi
    sections = {
        "results": result_table(page), "data": table_html(("set", "pictures", "questions", "YES", "families"), sets),
        "model": "", "training": "", "accuracy": "",
        "attention": "<p>Each map is in multiples of uniform attention, all maps of a figure on one scale. Outlined in "
        "green: the labelled boxes of what a word names and, for the answer, of what makes it YES. No box is used in "
        "training.</p>", "calibration": "",
        "failures": f"<p>{len(story.failures)} wrong answers, asked again in parts and in other words. Vision: a part "
        "is answered wrongly too. Language: the parts and most paraphrases are right. Reasoning: the parts are right, "
        f"the whole is not. {counts['low_confidence'].get('True', 0)} of them had less than 70% confidence.</p>"
        + table_html(("family", *kinds), failed),
        "ablations": study(out.parent / "ablation" / "table.md", ("differences", "measures"), dpi),
        "robustness": study(out / "robustness.md", ("robustness",), dpi),
        "limits": limits(page)}
    body, nav = [], []
    for section, text in sections.items():
        figures = [name for name in drawn if FIGURES[name][0] == section]
        if text or figures:
            nav.append(f'<a href="#{section}">{section}</a>')
            body.append(f'<h2 id="{section}">{section.capitalize()}</h2>{text}')
        for name in figures:
            source, width = embedded(drawn[name][0], story.cfg.dpi)
            body.append(f'<figure><div class="wide"><img src="{source}" alt="Figure: {name}" style="--w: {width}px">'
                        f"</div><figcaption><b>{name.capitalize()}.</b> {html.escape(drawn[name][1])}</figcaption>"
                        "</figure>")
    about = f"Checkpoint of update {page['step']}, {page['split']} split, data {page['data_hash']}. Balanced " \
            "accuracy in %, 95% intervals from a bootstrap over pictures. Made by python visualize.py; every example " \
            f"was drawn at random with seed {story.seed}, none was picked."
    write(path, fill(REPORT, title="What the model sees, and where it looks", about=about, nav=" ".join(nav),
                     body="\n".join(body)))


def write(path, text):
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


# ---- the interactive page ----

PAGE = HEAD + """<style>
button { font: inherit; color: inherit; background: none; border: 1px solid var(--line); border-radius: 4px;
  padding: .15rem .5rem; cursor: pointer }
[aria-pressed=true] { outline: 3px solid var(--accent); outline-offset: -1px }
#scenes, #words { display: flex; flex-wrap: wrap; gap: .35rem; margin: .6rem 0 }
#scenes button { padding: 3px; line-height: 0 } #scenes img { width: 68px; height: 68px }
select { font: inherit; max-width: 100%; padding: .2rem } canvas { display: block; width: 100% }
#both { display: flex; flex-wrap: wrap; gap: 1.4rem } #left { flex: 1 1 20rem; max-width: 30rem }
#right { flex: 1 1 17rem; min-width: 0 } #bar { height: 14px; margin-top: .4rem; background: #c7c7c7 }
#ticks { display: flex; justify-content: space-between; font-size: .8rem } #numbers { min-height: 3.2em }
#grid { display: grid; gap: 3px } #grid button { padding: 1px; min-width: 0; font-size: .72rem }
#grid canvas { image-rendering: pixelated; aspect-ratio: 1; background: #c7c7c7 }
</style>
<div id="scenes" role="group" aria-label="scene"></div>
<label>Command <select id="command"></select></label> <p id="said"></p>
<div id="words" role="group" aria-label="word"></div>
<div id="both"><div id="left"><canvas id="map" width="640" height="640"></canvas>
<canvas id="bar" width="256" height="1"></canvas><div class="quiet" id="ticks"></div><p id="numbers"></p></div>
<div id="right"><p>Layer and head: <button id="play">play the layers</button>
<label><input type="checkbox" id="boxes" checked> boxes</label></p><div id="grid"></div></div></div>
<script>
"use strict";
const D = @DATA@, P = D.side * D.side, byId = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const colours = bytes(D.colours), state = {scene: 0, command: 0, word: 0, layer: -1, head: -1};   // -1: the mean of all
const now = () => D.scenes[state.scene].commands[state.command];
const set = change => { Object.assign(state, change); draw(); };
const make = (tag, parent, fields) => parent.appendChild(Object.assign(document.createElement(tag), fields));
const rgba = i => `rgba(${colours[4 * i]},${colours[4 * i + 1]},${colours[4 * i + 2]},${colours[4 * i + 3] / 255})`;

function mapOf(word, layer, head) {       // attention in multiples of uniform attention
  const c = now(), sum = new Float64Array(P), all = (i, n) => i < 0 ? [...Array(n).keys()] : [i];
  const layers = all(layer, D.layers), heads = all(head, D.heads);
  for (const l of layers) for (const h of heads) for (let p = 0; p < P; p++)
    sum[p] += (c.maps[((l * D.heads + h) * c.words.length + word) * P + p] / 255) ** 2 * c.most;
  return sum.map(x => x / layers.length / heads.length);
}
function paint(g, map, width) {
  const cell = width / D.side;
  map.forEach((x, p) => {
    if (x <= 1) return;
    g.fillStyle = rgba(Math.min(255, Math.round(255 * Math.log(x) / Math.log(D.top))));
    g.fillRect(p % D.side * cell, Math.floor(p / D.side) * cell, cell, cell);
  });
}
function draw() {
  const c = now(), map = mapOf(state.word, state.layer, state.head), g = byId("map").getContext("2d"), W = 640;
  g.drawImage(D.scenes[state.scene].picture, 0, 0, W, W);
  for (const [mode, colour] of [["saturation", "#888"], ["source-over", "#dddddda0"]]) {   // grey and pale
    Object.assign(g, {globalCompositeOperation: mode, fillStyle: colour});
    g.fillRect(0, 0, W, W);
  }
  paint(g, map, W);
  if (byId("boxes").checked) for (const [x1, y1, x2, y2] of c.boxes[state.word])
    for (const [line, colour] of [[7, "#fff"], [3.5, "#00735a"]]) {
      Object.assign(g, {lineWidth: line, strokeStyle: colour});
      g.strokeRect(x1 * W, y1 * W, (x2 - x1) * W, (y2 - y1) * W);
    }
  const cover = c.covers[state.word], name = (text, i, n) => i < 0 ? `mean of ${n} ${text}s` : `${text} ${i}`;
  const entropy = map.reduce((sum, x) => sum - (x > 0 ? x / P * Math.log(x / P) : 0), 0);
  const area = cover.reduce((sum, x) => sum + x / 255 / P, 0);
  const inside = map.reduce((sum, x, p) => sum + x / P * (cover[p] || 0) / 255, 0);
  byId("numbers").textContent = `“${c.words[state.word]}”, ${name("layer", state.layer, D.layers)}, ` +
    `${name("head", state.head, D.heads)}: entropy ${entropy.toFixed(2)} nats ` +
    `(${(100 * entropy / Math.log(P)).toFixed(0)}%), peak ${Math.max(...map).toFixed(1)}×` +
    (area ? `, in box ${(100 * inside).toFixed(0)}% = ${(inside / area).toFixed(1)}×` : "");
  for (const cell of byId("grid").children) {
    const [l, h] = cell.dataset.at.split(",").map(Number), small = cell.querySelector("canvas");
    cell.setAttribute("aria-pressed", l === state.layer && h === state.head);
    if (!small) continue;
    small.getContext("2d").clearRect(0, 0, small.width, small.height);
    paint(small.getContext("2d"), mapOf(state.word, l, h), small.width);
  }
  for (const kind of ["word", "scene"])
    [...byId(kind + "s").children].forEach((b, i) => b.setAttribute("aria-pressed", i === state[kind]));
}
function ask(command) {
  state.command = command;
  const c = now();
  byId("words").replaceChildren();
  c.words.forEach((textContent, word) => {
    const pick = () => set({word});
    make("button", byId("words"), {textContent, onmouseenter: pick, onclick: pick, onfocus: pick});
  });
  byId("said").textContent = `The model says ${c.said}: ${c.reason}. The truth is ${c.truth}.`;
  set({word: c.words.length - 1});
}
function show(scene) {
  state.scene = scene;
  byId("command").replaceChildren();
  D.scenes[scene].commands.forEach((c, value) => make("option", byId("command"), {value, textContent: c.text}));
  ask(0);
}
for (let l = -1; l < D.layers; l++) for (let h = -1; h < D.heads; h++) {
  const cell = make("button", byId("grid"), {onclick: () => set({layer: l, head: h})});
  cell.dataset.at = [l, h];
  cell.title = `layer ${l < 0 ? "all" : l}, head ${h < 0 ? "all" : h}`;
  if (l < 0 || h < 0) cell.textContent = l >= 0 ? `layer ${l}` : h < 0 ? "all" : `h ${h}`;
  else make("canvas", cell, {width: D.side * 4, height: D.side * 4});
}
byId("grid").style.gridTemplateColumns = `auto repeat(${D.heads}, minmax(0, 1fr))`;
byId("command").onchange = event => ask(+event.target.value);
byId("boxes").onchange = draw;
let timer = 0;
byId("play").onclick = () => {
  let layer = 0;
  const next = () => {
    set({layer: layer < D.layers ? layer : -1, head: -1});
    if (layer++ >= D.layers) clearInterval(timer);
  };
  clearInterval(timer);
  timer = setInterval(next, 900);
  next();
};
for (let x = 0; x < 256; x++) {
  byId("bar").getContext("2d").fillStyle = rgba(x);
  byId("bar").getContext("2d").fillRect(x, 0, 1, 1);
}
for (const k of [0, 1, 2, 3, 4])
  make("span", byId("ticks"), {textContent: ["≤", "", "", "", "≥"][k] + +(D.top ** (k / 4)).toPrecision(2) + "×"});
Promise.all(D.scenes.map((scene, i) => {
  for (const c of scene.commands) [c.maps, c.covers] = [bytes(c.maps), c.covers.map(bytes)];
  const button = make("button", byId("scenes"), {onclick: () => show(i)});
  return (scene.picture = make("img", button, {src: scene.image, alt: scene.name})).decode();
})).then(() => show(0));
</script></body></html>
"""


def write_page(path, story, scenes=8, each=6, budget=3_300_000):
    """One HTML file to look through all attention of some scenes and questions, drawn at random.

    Maps are one byte a patch, the square root of attention over the command's largest. budget: bytes of them; a large
    model shows fewer questions.
    """
    asked, cfg, rng, shown, tops = story.asked, story.cfg, story.rng(), [], []
    size, side = cfg.image_size, cfg.image_size // cfg.patch_size
    encode = lambda data: base64.b64encode(data).decode()                                       # noqa: E731
    pack = lambda shares: encode(np.round(255 * shares).astype(np.uint8).tobytes())             # noqa: E731
    for picture in rng.permutation(np.unique(asked.picture))[:scenes]:
        entries = []
        for i in rng.permutation(np.flatnonzero(asked.picture == picture))[:each]:
            shot = story.shot(i)
            maps = shot["cross"].astype(np.float64)
            budget -= maps.size
            if budget < 0:
                break
            tops.append(maps.max((-2, -1)).ravel() * side * side)
            entries.append(dict(
                text=asked_text(shot), words=shot["words"] + ["answer"], said=verdict_text(shot),
                truth="YES" if asked.truth[i] else "NO", reason=tidy(shot["reason"]), most=float(tops[-1].max()),
                maps=pack(np.sqrt(maps / maps.max())), covers=[
                    pack(evaluate.cover(labels, size, side)) if labels else "" for labels in shot["boxes"]],
                boxes=[[[label["box2d"][k] / size for k in ("x1", "y1", "x2", "y2")] for label in labels]
                       for labels in shot["boxes"]]))
        if entries:
            buffer = io.BytesIO()
            Image.fromarray(asked.data.images[picture]).save(buffer, "JPEG", quality=92)
            shown.append(dict(name=asked.frames[picture]["name"], commands=entries,
                              image="data:image/jpeg;base64," + encode(buffer.getvalue())))
    data = dict(scenes=shown, side=side, layers=cfg.text_layers, heads=cfg.text_heads,
                top=max(4.0, *np.percentile(np.concatenate(tops), [90])), colours=pack(overlay_colours().colors))
    about = "Pick a scene and a command, then hover over a word, or tap it. A small map picks its layer and head, a " \
            "title the mean over them. Colours are multiples of uniform attention, on one scale for all; boxes show " \
            f"what the word names. {len(shown)} pictures of the {story.page['split']} split with up to {each} " \
            f"questions each, drawn at random (seed {story.seed}); checkpoint of update {story.page['step']}."
    data = json.dumps(data).replace("</", "<\\/")
    write(path, fill(PAGE, title="Where does each word look?", about=about, data=data))


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


def folder(cfg, name):
    path = Path(cfg.out_dir) / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to out_dir {cfg.out_dir}: {error}") from None
    return path


def answer_pictures(cfg):
    """Answer cfg.command about a picture, with all figures of a scene, or about a folder, with its words' maps only.

    With cfg.command2, answer both and compare them.
    """
    paths = list_pictures(cfg.image)
    parts = _, cfg, tokenizer, _, _ = train.load_model(cfg)
    asked = [" ".join(read_command(cfg, tokenizer, text)[0]) for text in (cfg.command, cfg.command2) if text]
    for word, close in dict.fromkeys(pair for text in asked for pair in tokenizer.unknown(text)):
        near = f"; the nearest it knows is '{close}'" if close else ""
        print(f"warning: the model does not know the word '{word}'{near}", file=sys.stderr)
    out, many, stems, done = folder(cfg, "answer"), Path(cfg.image).is_dir(), Counter(p.stem for p in paths), 0
    for path in paths:
        try:
            picture = prepare.load_picture(path, cfg.image_size)
        except UserError as error:
            if not many:
                raise
            print(f"warning: skipped, {error}", file=sys.stderr)
            continue
        stem = path.stem if stems[path.stem] == 1 else path.name                  # street.jpg beside street.png
        name = out / "-".join([stem[:80]] + [re.sub(r"[^a-z0-9]+", "-", text)[:60].strip("-") for text in asked])
        shots, files = [answer(*parts, picture, text) for text in asked], []
        said = [text for shot in shots for text in (verdict_text(shot), tidy(shot["reason"]))
                if text != "description"]
        if len(shots) == 2:
            files += save(draw_comparison([shots], cfg), name, cfg.dpi)
        for kind, draw in SCENE.items() if len(shots) == 1 else ():
            if kind == "words" or not many:
                files += save(draw(shots[0], cfg), name if kind == "words" else f"{name}-{kind}", cfg.dpi)
        said += [f"figure: {file}" for file in files]
        print(f"{path.name}: " + "  ".join(said) if many else "\n".join(said), flush=True)
        done += 1
    if not done:
        raise UserError(f"none of the {len(paths)} pictures in {cfg.image} can be read")


def tell_story(cfg):
    """Every figure and the report, with the time that each takes."""
    start = time.time()
    story, out, drawn = Story(cfg), folder(cfg, "figures"), {}
    print(f"{time.time() - start:6.1f} s  reading the model, the questions and evaluate.py's files", flush=True)
    for name, (_, function) in FIGURES.items():
        before, made = time.time(), function(story)
        files = save(made[0], out / name, cfg.dpi) if made else [f"no figure '{name}': there is nothing to show"]
        if made:
            drawn[name] = files[0], made[1]
        print(f"{time.time() - before:6.1f} s  {'  '.join(map(str, files))}", flush=True)
    path = Path(cfg.out_dir) / "report.html"
    write_report(path, story, drawn)
    print(f"{time.time() - start:6.1f} s  in all; {path}, {path.stat().st_size / 1e6:.1f} MB")


def main(cfg):
    wanted = [name for name in ("image", "command", "command2", "page") if getattr(cfg, name)]
    if not wanted:
        tell_story(cfg)
    elif wanted == ["page"]:
        path = Path(cfg.out_dir) / "page.html"
        write_page(path, Story(cfg))
        print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    elif wanted in (["image", "command"], ["image", "command", "command2"]):
        answer_pictures(cfg)
    else:
        raise UserError(f"{' and '.join(f'--{name}' for name in wanted)} alone cannot be answered: pass a picture and "
                        "a command, python visualize.py --image=street.jpg --command=\"is there a bus?\", and "
                        "--command2 to compare; or --page=True; or nothing, for the report")


if __name__ == "__main__":
    config.run(main, __doc__)
