"""Every setting of the project, each a commented global, and the parser that overrides them.

- One setting a line: `name = default  # meaning`. Edit the default here, or override it for one run.
- `--key=value` on any script's command line overrides a setting; the value is cast to the default's type.
- `--preset=base` first applies a group of settings (see PRESETS), then the other overrides.
- No code is executed from the command line or from a file.

    python config.py                            prints every setting with its comment
    python train.py --batch_size=4 --grad_accum=8
    python train.py --help
"""
import ast
import difflib
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

# ---- run: where and how a script runs ----
preset = "default"            # group of settings to start from: default (2 CPU cores, minutes) or base (one GPU)
device = "auto"               # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                # auto, float32, bfloat16, float16; auto prints what it chose and why
seed = 1337                   # of weights, data order and augmentation; scenes have a seed of their own
out_dir = "out/default"       # checkpoints, log and results of this run
data_dir = "data"             # pictures and commands that prepare.py writes
workers = 0                   # processes that draw or decode pictures; 0 = one for each core
max_bad_share = 0.2           # prepare.py stops when more of the frames, or of the labels, than this share is broken

# ---- data: where pictures come from; a change here asks for a new prepare.py ----
source = "drawn"              # drawn (scenes made here) or bdd100k (a folder of yours)
bdd_dir = ""                  # root of BDD100K: holds images/100k/{train,val} and labels/
image_size = 128              # side of the stored square picture, pixels
num_scenes = 10000            # drawn scenes under the filters below, split 80/10/10 by the hash of their names
num_ood_scenes = 500          # drawn scenes of every weather and time outside the filters: out-of-distribution test
scene_seed = 7                # of the drawn scenes
weather = "clear"             # weathers to keep, comma-separated; empty keeps all
timeofday = "daytime"         # times of day to keep, comma-separated; empty keeps all
scene = ""                    # scene types to keep (city street, highway, residential ...); empty keeps all
keep_undefined = True         # keep frames whose weather, time or scene is missing or "undefined"
val_is_test = False           # bdd100k: use its own val folder as the test split, split its train folder 90/10
max_complexity = 0            # drop frames with more labelled objects than this; 0 keeps all

# ---- commands: the rules behind every answer, stated once; a change here asks for a new prepare.py ----
min_pixels = 10.0             # both sides of a box, at image_size, for an object to count as seen
min_visible = 0.35            # share of a box not covered by nearer boxes, for an object to count as seen
place_margin = 0.03           # a box centre this close to a border between thirds (share of width) is ambiguous
near_line = 0.72              # near: lower edge of the box below this share of the height
near_height = 0.20            # near, for what hangs high (lights, signs): box higher than this share of the height
near_margin = 0.03            # an edge or height this close to those numbers is ambiguous
commands_stored = 20          # questions kept for each picture, half of them YES, descriptions not counted
max_describe = 4              # objects that a description lists, nearest first
min_cell = 4                  # YES and NO each that a question kind needs in a split; rarer kinds are dropped, and said

# ---- model: sizes; the default is for a CPU ----
patch_size = 16               # side of a patch in pixels; image_size / patch_size squared is the number of patches
stem = "conv"                 # conv (stride-2 3x3 convolutions, learns faster) or patch (kernel = stride = patch)
stem_width = 32               # channels of the first convolution of the conv stem, doubled at each stride
vision_dim = 128              # width of the vision encoder
vision_layers = 3             # its depth; 4 learned slower here at every rate tried
vision_heads = 4              # its heads; below 32 dimensions a head, training from scratch suffers
vision_positions = "learned"  # learned or sincos, both over the 2D patch grid
text_dim = 128                # width of the decoder
text_layers = 4               # its depth
text_heads = 8                # query heads, in self and cross-attention
text_kv_heads = 2             # key/value heads that those share (grouped-query attention)
text_head_dim = 16            # dimensions of one head; heads * head_dim may differ from text_dim, as in Gemma
ffn = "geglu"                 # gate of the decoder's FFN: geglu (Gemma) or swiglu
vision_ffn_dim = 512          # hidden width of the vision FFN
text_ffn_dim = 256            # hidden width of the decoder's gated FFN
rope_theta = 10000.0          # base of the rotary frequencies
max_text = 64                 # longest text in tokens: command + answer + reason
dropout = 0.0                 # on attention weights and after FFNs
attention = "auto"            # auto (by hand on CPU, fast elsewhere), hand, fast

# ---- training ----
batch_size = 16               # images a micro-step
grad_accum = 1                # micro-steps an update; the effective batch is batch_size * grad_accum images
commands_per_image = 8        # commands a step for each image, descriptions included
descriptions_per_image = 2    # of them without a verdict: descriptions of the scene or a part, "where is the bus"
max_steps = 5000              # updates
see_steps = 2500              # of them (60% at most) first for the encoder alone, from the words of descriptions
tag_weight = 1.0              # weight of that loss, in both stages; 0 = train on text alone, from the start
lr = 2e-3                     # peak learning rate of the decoder
lr_projection = 1e-3          # of the vision-to-language projection
lr_vision = 1e-3              # of the vision encoder; 2e-3 and 4e-3 learned slower
min_lr = 0.01                 # final learning rate as a share of the peak
warmup_steps = 100            # linear warm-up
schedule = "cosine"           # cosine, step (x0.1 at 60% and 85%), restarts (cosine, three cycles) or constant
beta1 = 0.9                   # AdamW
beta2 = 0.99                  # AdamW; below 0.999 because runs are short
eps = 1e-8                    # AdamW
weight_decay = 0.05           # on matrices only: none on norms, biases, embeddings and positions
grad_clip = 1.0               # largest norm of the gradient; 0 = no clipping
flip = 0.5                    # chance of a horizontal flip, which swaps left and right in the text too
crop = 0.0                    # largest share of a side cut by a random crop that keeps every answer; 0 = off
jitter = 0.1                  # brightness and contrast jitter; no hue, so a light keeps its colour
answer_weight = 2.0           # weight of the YES/NO token in the loss; every word of a reason has weight 1
label_smoothing = 0.0         # of the token targets
yes_weight = 1.0              # class weight of YES against NO
focal_gamma = 0.0             # focal loss on the answer token; 0 = cross-entropy
entropy_weight = 0.0          # weight of the cross-attention entropy (> 0 asks for focused attention)
contrast_weight = 0.0         # weight of the SigLIP sigmoid loss between images and "describe" texts
init_from = ""                # start from these weights: train.py's checkpoint or HF's SigLIP (.pt, .safetensors)
lora_rank = 0                 # with init_from, learn only a change of this rank of each weight; 0 = all weights learn
freeze_vision_steps = 0       # updates for which the vision encoder does not learn; -1 = never learns
eval_every = 500              # updates between validations, and between saves of last.pt
eval_items = 2000             # validation commands used while training; 0 = all
early_stopping: int | None = None  # stop after this many validations without improvement
save_top = 1                  # best checkpoints kept beside best.pt (best-STEP.pt) when above 1
log_every = 50                # updates between log lines
tensorboard = False           # also write TensorBoard events (needs the tensorboard package)
resume = False                # continue out_dir/last.pt, or the file that --checkpoint names
export = ""                   # write a checkpoint without what only training needs to this file, and stop
lr_range = False              # instead raise the learning rates to 10 times theirs: the loss to out_dir/lr_range.json
bench = False                 # instead measure speed, memory and cost of training, into out_dir/bench.json
prefetch = 2                  # batches prepared ahead by a thread

# ---- evaluation ----
checkpoint = ""               # file to evaluate, to answer with or to export; empty = out_dir/best.pt
eval_batch = 64               # images a batch in evaluation
bootstrap = 1000              # resamples of a confidence interval
split = "test"                # split to evaluate
against = ""                  # second checkpoint, to compare on the same questions
sample_items = 8000           # questions whose attention is measured; half as many reasons, training questions
probe_items = 400             # questions asked again many times: with patches removed, in other words, of other scenes
head_items = 2000             # questions asked without each head in turn
stored_maps = 64              # questions whose maps of all layers and heads are kept for figures

# ---- answering, and figures: python visualize.py --image=street.jpg --command="is there a bus?" ----
image = ""                    # picture to answer about
command = ""                  # command in words
command2 = ""                 # another command about the same picture, to compare the two
dpi = 300                     # dots an inch of the PNG figures; 300 for print, 120 for a README
page = False                  # write the interactive page instead of the report
beam = 1                      # beams of the reason's generation; 1 = greedy
max_new_tokens = 32           # longest generated answer + reason

# ---- ablations: python ablate.py ----
variants = ""                 # variants to train, comma-separated; empty = all
seeds = 6                     # seeds of each variant; with fewer an exact test of a variant alone can show nothing
budget_minutes = 0.0          # all runs together, by scaling the updates of all alike; 0 = as the preset says
robustness = False            # train nothing: disturb the pictures and commands of out_dir's best.pt

PRESETS = {
    "default": {},
    # One GPU: PaliGemma-like proportions at ImageNet resolution, under 50M parameters.
    "base": dict(image_size=224, patch_size=16, stem_width=64, min_pixels=12.0, vision_dim=384,
                 vision_layers=8, vision_heads=6, vision_ffn_dim=1536, text_dim=384, text_layers=6, text_head_dim=64,
                 text_ffn_dim=1024, batch_size=64, lr=1e-3, lr_projection=5e-4, lr_vision=5e-4, max_steps=6000,
                 out_dir="out/base", data_dir="data_base"),
    # python ablate.py: a run of a minute or two on one core, so that many fit; scenes of at most two objects.
    "ablation": dict(image_size=48, patch_size=8, stem_width=16, min_pixels=10.0, max_complexity=2, num_scenes=40000,
                     num_ood_scenes=2000, vision_dim=64, vision_layers=2, vision_heads=2, vision_ffn_dim=128,
                     text_dim=64, text_layers=2, text_heads=4, text_ffn_dim=128, commands_per_image=4,
                     descriptions_per_image=1, max_steps=1600, see_steps=900, warmup_steps=50, lr=8e-3,
                     lr_projection=3e-3, lr_vision=2e-3, eval_every=200, eval_items=800, sample_items=600,
                     out_dir="out/ablation", data_dir="data_ablation"),
}
CHOICES = {
    "preset": tuple(PRESETS), "source": ("drawn", "bdd100k"), "dtype": ("auto", "float32", "bfloat16", "float16"),
    "stem": ("conv", "patch"), "vision_positions": ("learned", "sincos"), "ffn": ("geglu", "swiglu"),
    "attention": ("auto", "hand", "fast"), "schedule": ("cosine", "step", "restarts", "constant"),
    "split": ("train", "val", "test", "ood"),
}


class UserError(Exception):
    """A mistake in what the user gave (setting, path, picture, data): shown as one line, exit status 2."""


def _read_settings():
    """This file's settings, in order: {name: (section, default, comment)}, read from its own text."""
    table, section = {}, None
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        if line.startswith("PRESETS"):
            break
        header = re.match(r"# ---- (\w+)", line)
        if header:
            section = header.group(1)
        entry = re.match(r"(\w+)(?:: [^=]+)? = (.+?)\s+# (.*)", line)
        if section and entry:
            table[entry.group(1)] = (section, ast.literal_eval(entry.group(2)), entry.group(3))
    return table


SETTINGS = _read_settings()
DATA_KEYS = [k for k, (section, _, _) in SETTINGS.items() if section in ("data", "commands")]


def nearest(word, known):
    """` did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def cast(name, text):
    """The command line's `text` as the type of setting `name`. Raises UserError naming setting, value and type."""
    default = SETTINGS[name][1]
    kind = int if name == "early_stopping" else type(default)
    if default is None and text.lower() == "none":
        return None
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"--{name} wants True or False, got {text!r}")
    try:
        value = kind(text)
        if kind is float and value != value:
            raise ValueError
    except ValueError:
        words = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{name} wants {words}, got {text!r}") from None
    if name in CHOICES and value not in CHOICES[name]:
        choices = CHOICES[name]
        raise UserError(f"--{name} must be one of {', '.join(choices)}, got {text!r}" + nearest(text, choices))
    return value


def check(cfg):
    """Raise UserError for combinations that cannot work, naming the values and what would."""
    def need(ok, message):
        if not ok:
            raise UserError(message)
    need(cfg.patch_size > 0 and cfg.image_size % cfg.patch_size == 0,
         f"image_size={cfg.image_size} is not a multiple of patch_size={cfg.patch_size}; try image_size="
         f"{max(cfg.image_size // max(cfg.patch_size, 1), 1) * max(cfg.patch_size, 1)}")
    need(cfg.stem != "conv" or cfg.patch_size in (4, 8, 16, 32),
         f"stem=conv halves the picture step by step, so patch_size must be 4, 8, 16 or 32, got {cfg.patch_size}")
    need(cfg.vision_heads > 0 and cfg.vision_dim % cfg.vision_heads == 0,
         f"vision_dim={cfg.vision_dim} is not divisible by vision_heads={cfg.vision_heads}")
    need(cfg.vision_positions != "sincos" or cfg.vision_dim % 4 == 0,
         f"vision_positions=sincos needs vision_dim divisible by 4, got {cfg.vision_dim}")
    need(cfg.text_kv_heads > 0 and cfg.text_heads % cfg.text_kv_heads == 0,
         f"text_heads={cfg.text_heads} is not divisible by text_kv_heads={cfg.text_kv_heads}")
    need(cfg.text_head_dim % 2 == 0, f"text_head_dim must be even (RoPE rotates pairs), got {cfg.text_head_dim}")
    positive = ["image_size", "num_scenes", "vision_dim", "vision_layers", "text_dim", "text_layers", "text_heads",
                "vision_ffn_dim", "text_ffn_dim", "batch_size", "grad_accum", "commands_per_image", "max_steps",
                "eval_every", "log_every", "eval_batch", "max_text", "commands_stored", "beam", "max_new_tokens",
                "lr", "lr_vision", "lr_projection", "eps", "rope_theta", "text_head_dim", "stem_width", "bootstrap",
                "save_top", "prefetch", "sample_items", "probe_items", "head_items",
                "stored_maps", "dpi", "max_describe", "answer_weight", "yes_weight", "min_cell", "seeds"]
    for name in positive:
        need(0 < getattr(cfg, name) < math.inf, f"{name} must be above 0 and finite, got {getattr(cfg, name)}")
    need(cfg.commands_stored >= 2, f"commands_stored must be at least 2, one YES and one NO, got {cfg.commands_stored}")
    need(cfg.dpi <= 1200, f"dpi must be at most 1200, got {cfg.dpi}: 300 is enough for print")
    need(cfg.seed < 2 ** 63, f"seed must be below 2**63, got {cfg.seed}")
    need(cfg.freeze_vision_steps >= -1, f"freeze_vision_steps must be -1, 0 or more, got {cfg.freeze_vision_steps}")
    need(not cfg.lora_rank or cfg.init_from,
         f"lora_rank={cfg.lora_rank} learns small changes of a trained model: give one with --init_from=FILE")
    for name in ["max_bad_share", "dropout", "label_smoothing", "flip", "crop", "jitter", "beta1", "beta2"]:
        need(0 <= getattr(cfg, name) < 1 or (name == "flip" and cfg.flip == 1),
             f"{name} must be at least 0 and below 1, got {getattr(cfg, name)}")
    need(0 <= cfg.descriptions_per_image <= cfg.commands_per_image,
         f"descriptions_per_image={cfg.descriptions_per_image} must lie between 0 and "
         f"commands_per_image={cfg.commands_per_image}")
    for name in ["workers", "num_ood_scenes", "warmup_steps", "weight_decay", "grad_clip", "min_lr", "eval_items",
                 "seed", "scene_seed", "see_steps", "tag_weight", "focal_gamma", "entropy_weight", "contrast_weight",
                 "max_complexity", "lora_rank", "budget_minutes"]:
        need(getattr(cfg, name) >= 0, f"{name} must not be negative, got {getattr(cfg, name)}")
    return cfg


def from_args(argv=(), doc="", **fixed):
    """Settings as a namespace: defaults, then the preset, then `fixed`, then `--key=value` items of `argv`.

    argv: list of str, without the program's name; doc: the script's docstring, shown by --help.
    Prints `Overriding: k = v` for each override. Raises UserError for an unknown key, a wrong type or an
    impossible combination.
    """
    given = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(doc.strip() + "\n\nSettings (--key=value):\n" + describe())
            sys.exit(0)
        match = re.fullmatch(r"--(\w+)=(.*)", arg, re.DOTALL)
        if not match:
            raise UserError(f"cannot read {arg!r}: settings are given as --key=value, see --help")
        name, text = match.groups()
        if name not in SETTINGS:
            raise UserError(f"unknown config key '{name}'" + nearest(name, SETTINGS))
        given[name] = cast(name, text)
    values = {name: default for name, (_, default, _) in SETTINGS.items()}
    values.update(PRESETS[given.get("preset", values["preset"])])
    values.update(fixed)
    for name, value in given.items():
        print(f"Overriding: {name} = {value!r}")
    values.update(given)
    return check(SimpleNamespace(**values))


def data_hash(cfg):
    """Short hash of the settings that shape the data, stored with it and compared when it is used."""
    text = json.dumps({k: getattr(cfg, k) for k in DATA_KEYS}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe():
    """All settings as text, by section, with their comments."""
    lines, last = [], None
    for name, (section, default, comment) in SETTINGS.items():
        if section != last:
            lines.append(f"\n{section}")
            last = section
        lines.append(f"  {name} = {default!r:<14} {comment}")
    return "\n".join(lines)


def run(main, doc):
    """Run a script: main(cfg) with the command line's settings; a UserError or full disk is one line, exit status 2."""
    try:
        main(from_args(sys.argv[1:], doc))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    try:
        from_args(sys.argv[1:], __doc__)
        print(describe())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
