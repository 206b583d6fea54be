"""Every setting of the project, each a commented global, and the parser that overrides them.

- One setting a line: `name = default  # meaning`. Edit the default here, or override it for one run.
- `--key=value` on any script's command line overrides a setting. The value must have the setting's type.
- `--preset=base` first applies a group of settings (see PRESETS), then the other overrides.
- No code is executed from the command line or from a file.

    python config.py --preset=base              prints every setting, with the value that a script would use
    python train.py --batch_size=4 --grad_accum=8
    python train.py --help
"""
import ast
import contextlib
import difflib
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# ---- run: where and how a script runs; a resumed run may change these ----
preset = "default"            # group of settings to start from: default (2 CPU cores, minutes) or base (one GPU)
device = "auto"               # auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, mps
dtype = "auto"                # auto, float32, bfloat16, float16; auto prints what it chose and why
attention = "auto"            # how attention is computed: auto (by hand in bfloat16 on a CPU, else fast), hand or fast
workers = 0                   # processes that draw or decode pictures; 0 = one for each core
compile = False               # train.py: fuse operations with torch.compile; wants a GPU and a C compiler
prefetch = 2                  # batches that a thread, or four with a GPU, prepare ahead
out_dir = "out/default"       # folder of this run's checkpoints, log and results
data_dir = "data"             # folder of the pictures and commands that prepare.py writes
max_bad_share = 0.2           # prepare.py stops when a larger share of the frames, or of the labels, is broken

# ---- data: where pictures come from; prepare.py must run again after a change ----
source = "drawn"              # drawn (scenes drawn by prepare.py) or bdd100k (a folder of yours)
bdd_dir = ""                  # root of BDD100K: holds images/100k/{train,val} and labels/
image_width = 160             # of the stored pictures, in pixels; a multiple of patch_size, as is ...
image_height = 96             # ... their height; wide as a dashcam's frames are
num_scenes = 20_000           # drawn scenes that pass the filters below, split 80/10/10 by the hash of their names
num_ood_scenes = 500          # drawn scenes of other weathers and times, for the out-of-distribution test
scene_seed = 7                # seed of the drawn scenes
weather = "clear"             # weathers to keep, separated by commas; empty keeps all
timeofday = "daytime"         # times of day to keep, separated by commas; empty keeps all
scene = ""                    # scene types to keep (city street, highway, residential ...); empty keeps all
keep_undefined = True         # keep frames whose weather, time or scene is missing or "undefined"
val_is_test = False           # bdd100k: its own val folder is the test split; its train folder is split 90/10
max_complexity = 0            # drop frames with more labelled objects than this; 0 keeps all

# ---- commands: the numbers in the rules behind every answer; prepare.py must run again after a change ----
min_pixels = 8.0              # an object is seen if both sides of its box have so many pixels (commands.DETAIL) ...
min_visible = 0.4             # ... and if nearer boxes leave this share of it uncovered, and min_pixels squared
place_margin = 0.03           # a box centre this close to a border between thirds (share of width) is ambiguous
maybe_share = 0.15            # an object may also be at another third if its box covers more than this share of it
block_share = 0.5             # a near road user that covers more than this share of a third blocks it
near_line = 0.72              # an object is near if the lower edge of its box is below this share of the height ...
far_line = 0.60               # ... and far if it is above this one; between them, some 9 to 18 metres, it may be either
near_height = 0.23            # what hangs (lights, signs) is near if its box is higher than this share ...
far_height = 0.17             # ... and far if it is lower; a standing object that is lower is not surely near ...
close_height = 0.28           # ... and one that is higher than this is not surely far, wherever its lower edge is
commands_stored = 20          # questions stored for each picture, half of them YES; descriptions come on top
max_describe = 4              # a description lists at most this many objects, nearest first
min_cell = 4                  # a question with fewer YES, or fewer NO, in a split is dropped from it

# ---- model: sizes; the defaults are for a CPU ----
patch_size = 16               # side of a patch in pixels; a picture has width * height / patch_size squared
stem = "conv"                 # conv (stride-2 3x3 convolutions, learns faster) or patch (kernel = stride = patch)
stem_width = 32               # channels of the conv stem's first convolution, doubled at each stride
vision_dim = 128              # width of the vision encoder
vision_layers = 3             # its depth; 4 learned slower here at every rate tried
vision_heads = 4              # its heads; with fewer than 32 dimensions in each, it learns badly from scratch
vision_positions = "learned"  # learned or sincos, both over the 2D patch grid
vision_ffn_dim = 512          # hidden width of its FFN
text_dim = 128                # width of the decoder
text_layers = 4               # its depth
text_heads = 8                # its query heads, in self-attention and cross-attention
text_kv_heads = 2             # key/value heads that the query heads share (grouped-query attention)
text_head_dim = 16            # dimensions of one head; heads * head_dim may differ from text_dim, as in Gemma
text_ffn_dim = 256            # hidden width of its gated FFN
ffn = "geglu"                 # gate of that FFN: geglu (Gemma) or swiglu
rope_theta = 10000.0          # base of the rotary frequencies
max_text = 64                 # longest text in tokens: command + answer + reason
dropout = 0.0                 # on attention weights and after FFNs

# ---- training: what shapes the result; lengths are counted in pictures shown ----
seed = 1337                   # seed of the weights, the order of the data and the augmentation
batch_size = 16               # pictures in a micro-batch
grad_accum = 1                # micro-batches in an update
row_tokens = 152              # tokens of commands shown with each picture: as many commands as fit, about 8
descriptions_per_image = 2    # how many of these commands are descriptions, which have no YES or NO
see_pictures = 64_000         # stage 1: encoder and projection learn, from the words of descriptions; 0 = none
read_pictures = 32_000        # stage 2: the whole model learns
warmup_pictures = 1_600       # the learning rate rises linearly over so many pictures, in each stage
tag_weight = 1.0              # weight of the word-tagging loss that trains the encoder; 0 = no stage 1
lr = 2e-3                     # peak learning rate of the decoder
lr_projection = 1e-3          # peak learning rate of the projection from vision to language
lr_vision = 1e-3              # peak learning rate of the vision encoder; 2e-3 and 4e-3 learned slower
min_lr = 0.01                 # final learning rate as a share of the peak
schedule = "cosine"           # cosine, step (x0.1 at 60% and at 85%), restarts (three cosines) or constant
beta1 = 0.9                   # AdamW
beta2 = 0.99                  # AdamW; below the usual 0.999 because runs are short
eps = 1e-8                    # AdamW
weight_decay = 0.05           # on matrices only, not on norms, biases, embeddings and positions
grad_clip = 1.0               # largest norm of the gradient; 0 = no clipping
flip = 0.5                    # chance of a horizontal flip, which also swaps left and right in the text
crop = 0.0                    # largest share of a side that a random crop removes; it keeps all answers; 0 = off
jitter = 0.1                  # strength of brightness and contrast jitter; hue stays, so lights keep their colour
answer_weight = 2.0           # weight of the YES/NO token in the loss; each word of a reason has weight 1
label_smoothing = 0.0         # of the token targets
yes_weight = 1.0              # class weight of YES against NO
focal_gamma = 0.0             # gamma of the focal loss on the YES/NO token; 0 = cross-entropy
entropy_weight = 0.0          # weight of the cross-attention's entropy in the loss; above 0 focuses attention
contrast_weight = 0.0         # weight of the SigLIP sigmoid loss between pictures and their descriptions
init_from = ""                # start from the weights of this checkpoint of train.py
lora_rank = 0                 # with init_from: learn only changes of this rank to the weights; 0 = learn all
freeze_pictures = 0           # the vision encoder starts to learn after so many pictures; -1 = never

# ---- progress: validation, saving and logging; a resumed run may change these ----
eval_every = 8_000            # pictures between validations; last.pt is saved at each of them
eval_items = 8000             # validation questions used while training; 0 = all
early_stopping = 0            # stop after so many validations without improvement; 0 = never
save_top = 1                  # number of best checkpoints to keep; above 1, they are kept as best-STEP.pt too
log_every = 800               # pictures between log lines
tensorboard = False           # also write TensorBoard events (needs the tensorboard package)
resume = False                # continue from out_dir/last.pt, or from the file that --checkpoint names
overwrite = False             # train anew in an out_dir that holds a run, whose checkpoints and log are lost

# ---- evaluation ----
checkpoint = ""               # file to evaluate, to answer with or to export; empty = out_dir/best.pt
split = "test"                # split to evaluate: train, val, test or ood
eval_batch = 64               # pictures in a batch
bootstrap = 1000              # resamples behind a confidence interval
against = ""                  # second checkpoint, compared on the same questions
sample_items = 8000           # questions whose attention is measured; half as many reasons, training questions
probe_items = 400             # questions asked many times over: with patches hidden, reworded, about other scenes
head_items = 2000             # questions asked without each head in turn

# ---- answering, and figures: python visualize.py --image=street.jpg --command="is there a bus?" ----
image = ""                    # picture to answer about
command = ""                  # command in words
command2 = ""                 # second command about the same picture, to compare the two
dpi = 300                     # dots per inch of the PNG figures; 300 for print, 120 for a README
beam = 1                      # beams when a reason is generated; 1 = greedy
max_new_tokens = 32           # longest generated answer + reason

# ---- ablations: python ablate.py ----
variants = ""                 # variants to train, separated by commas; empty = all
seeds = 6                     # seeds of each variant; below 6, a sign-flip test cannot reach p < 0.05

# ---- another job instead: what a script does in place of its usual work ----
export = ""                   # train.py: write the weights without the optimizer's state to this file, and stop
bench = False                 # ablate.py: measure speed and memory of training, into out_dir/bench.json
lr_range = False              # ablate.py: raise all rates from 1/1000 to 10 times theirs and record the loss
robustness = False            # ablate.py: disturb the pictures and commands that out_dir/best.pt is asked about
page = False                  # visualize.py: write the interactive page instead of the report

PRESETS = {
    "default": {},
    # One GPU: PaliGemma-like proportions at ImageNet resolution, under 50M parameters.
    "base": dict(image_width=288, image_height=176, patch_size=16, stem_width=64, min_pixels=12.0, vision_dim=384,
                 vision_layers=8, vision_heads=6, vision_ffn_dim=1536, text_dim=384, text_layers=6, text_head_dim=64,
                 text_ffn_dim=1024, batch_size=64, lr=1e-3, lr_projection=5e-4, lr_vision=5e-4, see_pictures=256_000,
                 read_pictures=128_000, warmup_pictures=6_400, eval_every=64_000, prefetch=4, out_dir="out/base",
                 data_dir="data_base"),
    # python ablate.py: a run takes about 80 seconds of one core, so that many fit; questions are about large objects.
    "ablation": dict(image_width=80, image_height=48, patch_size=16, stem_width=16, min_pixels=12.0, num_scenes=24000,
                     num_ood_scenes=2000, vision_dim=64, vision_layers=2, vision_heads=2, vision_ffn_dim=128,
                     text_dim=64, text_layers=2, text_heads=4, text_ffn_dim=128, row_tokens=64,
                     descriptions_per_image=1, see_pictures=16_000, read_pictures=20_000, warmup_pictures=800, lr=8e-3,
                     lr_projection=3e-3, lr_vision=2e-3, eval_every=20_000, eval_items=800,
                     sample_items=600, out_dir="out/ablation", data_dir="data_ablation"),
}
CHOICES = {name: known.split() for name, known in dict(
    preset=" ".join(PRESETS), source="drawn bdd100k", dtype="auto float32 bfloat16 float16", stem="conv patch",
    vision_positions="learned sincos", ffn="geglu swiglu", attention="auto hand fast",
    schedule="cosine step restarts constant", split="train val test ood").items()}
# The script that does each of these jobs; given to another script, it would pass unseen.
JOBS = dict(export="train.py", bench="ablate.py", lr_range="ablate.py", robustness="ablate.py", page="visualize.py")
MOST = sys.float_info.max
LEAST = sys.float_info.min    # the least number above 0
# What a setting may be, in words; its type; its least and its largest value; the settings of that kind. A setting that
# stands in no row, such as one that you add, may be any value of its default's type.
KINDS = (
    ("a whole number from 1 to 10,000", int, 1, 10_000, """
        patch_size stem_width vision_dim vision_layers vision_heads vision_ffn_dim text_dim text_layers text_heads
        text_kv_heads text_head_dim text_ffn_dim max_new_tokens batch_size grad_accum prefetch save_top eval_batch
        bootstrap"""),
    ("a whole number from 16 to 10,000", int, 16, 10_000, "max_text row_tokens"),
    # With n seeds a sign-flip test tries 2^n signs.
    ("a whole number from 1 to 20", int, 1, 20, "beam seeds"),
    ("a whole number from 30 to 1200; 300 is enough for print", int, 30, 1200, "dpi"),
    ("a whole number from 1 to 10^12", int, 1, 10 ** 12, """
        image_width image_height num_scenes commands_stored max_describe min_cell read_pictures eval_every log_every
        sample_items probe_items head_items"""),
    ("a whole number from 0 to 10^12", int, 0, 10 ** 12, """
        workers num_ood_scenes scene_seed max_complexity see_pictures warmup_pictures descriptions_per_image seed
        eval_items early_stopping lora_rank"""),
    ("a whole number from -1 to 10^12", int, -1, 10 ** 12, "freeze_pictures"),
    ("a number from 1 to 10^9", float, 1, 1e9, "min_pixels rope_theta"),
    ("a number above 0, up to 1", float, LEAST, 1, "lr lr_projection lr_vision eps"),
    ("a number from 0 to 1000", float, 0, 1000, """
        answer_weight yes_weight tag_weight weight_decay grad_clip focal_gamma entropy_weight contrast_weight"""),
    ("a number from 0.01 to 1", float, 0.01, 1, "near_line far_line near_height far_height close_height"),
    ("a number from 0 to 1", float, 0, 1, "max_bad_share min_visible maybe_share block_share min_lr flip"),
    ("a number from 0 to 0.16, about half of a third", float, 0, 0.16, "place_margin"),
    ("a number from 0 to below 1", float, 0, 1 - 1e-9, "dropout beta1 beta2 crop jitter label_smoothing"),
    ("True or False", bool, None, None, """
        keep_undefined val_is_test tensorboard resume overwrite compile bench lr_range robustness page"""),
    ("a path", str, None, None, "out_dir data_dir bdd_dir init_from checkpoint against export image"),
    ("a text", str, None, None, """
        preset device dtype attention source weather timeofday scene stem vision_positions ffn schedule split command
        command2 variants"""),
)
KIND_OF = {name: tuple(kind) for *kind, names in KINDS for name in names.split()}


class UserError(Exception):
    """A mistake in what the user gave (setting, path, picture, data): shown as one line, exit status 2."""


def _read_settings():
    """This file's settings, in their order: {name: (section, default, comment)}.

    Names and defaults are the module's own globals, so any expression may stand there. Sections and comments are read
    from the file's text.
    """
    notes, section = {}, ""
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        header = re.match(r"# ---- ([\w ]*\w)", line)
        entry = re.match(r"(\w+) *= *[^#]*(?:# *(.*))?", line)
        if header:
            section = header[1]
        elif entry:
            notes[entry[1]] = (section, entry[2] or "")
    settings = {}
    for name, value in globals().items():
        plain = isinstance(value, (bool, int, float, str, tuple, list, type(None)))
        if plain and name.islower() and not name.startswith("_"):
            section, comment = notes.get(name, (section, ""))
            settings[name] = (section, value, comment)
    return settings


SETTINGS = _read_settings()
DATA_KEYS = [name for name, (section, _, _) in SETTINGS.items() if section in ("data", "commands")]


def nearest(word, known):
    """`, did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def listed(text, known, what):
    """The names in `text`, separated by commas. Raises UserError, beginning with `what`, for one that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"{what} '{name}'{nearest(name, known)}; there are {', '.join(known)}")
    return names


def kind_of(name):
    """(words, type, least, most) of setting `name`, see KINDS."""
    default = SETTINGS[name][1]
    return KIND_OF.get(name, (f"a value like {default!r}", type(default), -MOST, MOST))


def typed(name, value):
    """`value` as the type of setting `name`: 4.0 passes for a whole number, 4 for any number. Raises UserError."""
    words, kind, least, most = kind_of(name)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int and abs(value) <= MOST:
        value = float(value)
    if type(value) is not kind or (kind in (int, float) and not least <= value <= most):
        raise UserError(f"{name} wants {words}, got {value!r}")
    if words == "a path":
        value = os.path.expanduser(value)       # a shell leaves the ~ of --out_dir=~/runs as it is
    choices = CHOICES.get(name, (value,))
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}" + nearest(value, choices))
    return value


def parse(name, text):
    """The value that the command line's `text` gives to setting `name`; what is no value stays a text."""
    if kind_of(name)[1] is str:
        return text
    try:
        return ast.literal_eval(text.capitalize())      # "true" means True
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check(cfg):
    """Give every setting of cfg its type, and return cfg. Raises UserError with what cannot work and what would."""
    def need(ok, message):
        if not ok:
            raise UserError(message)
    for name in SETTINGS:
        setattr(cfg, name, typed(name, getattr(cfg, name)))
    for near, far in (("near_line", "far_line"), ("near_height", "far_height")):
        need(getattr(cfg, far) <= getattr(cfg, near),
             f"{far}={getattr(cfg, far)} is above {near}={getattr(cfg, near)}: nothing can be both near and far")
    need(2 * cfg.maybe_share <= cfg.block_share,
         f"block_share={cfg.block_share} is below twice maybe_share={cfg.maybe_share}: two road users could fill a way "
         "from both sides, and neither would count")
    need(cfg.stem != "conv" or cfg.patch_size in (4, 8, 16, 32),
         f"stem=conv halves the picture step by step, so patch_size must be 4, 8, 16 or 32, got {cfg.patch_size}")
    for name in ("image_width", "image_height"):
        side = getattr(cfg, name)
        need(cfg.min_pixels <= side,
             f"min_pixels={cfg.min_pixels} is above {name}={side}: no object could count as seen")
        need(side % cfg.patch_size == 0,
             f"{name}={side} is not a multiple of patch_size={cfg.patch_size}; try {name}="
             f"{max(side // cfg.patch_size, 1) * cfg.patch_size}")
    need(cfg.vision_dim % cfg.vision_heads == 0,
         f"vision_dim={cfg.vision_dim} is not divisible by vision_heads={cfg.vision_heads}")
    need(cfg.vision_positions != "sincos" or cfg.vision_dim % 4 == 0,
         f"vision_positions=sincos needs vision_dim divisible by 4, got {cfg.vision_dim}")
    need(cfg.text_heads % cfg.text_kv_heads == 0,
         f"text_heads={cfg.text_heads} is not divisible by text_kv_heads={cfg.text_kv_heads}")
    need(cfg.text_head_dim % 2 == 0, f"text_head_dim must be even (RoPE rotates pairs), got {cfg.text_head_dim}")
    need(cfg.commands_stored >= 2, f"commands_stored must be at least 2, one YES and one NO, got {cfg.commands_stored}")
    need(cfg.out_dir and cfg.data_dir, "out_dir and data_dir name folders: neither may be empty; . is this folder")
    need(not cfg.lora_rank or cfg.init_from,
         f"lora_rank={cfg.lora_rank} learns small changes of a trained model: give one with --init_from=FILE")
    return cfg


def with_changes(cfg, **changes):
    """Other settings: cfg's, but for the changes."""
    return SimpleNamespace(**{**vars(cfg), **changes})


def from_args(argv=(), doc="", preset=None, **fixed):
    """Settings as a namespace: this file's, then the preset's, then `fixed`, then those of `--key=value` in `argv`.

    argv: list of str, without the program's name; doc: the script's docstring, shown by --help; preset: the one to
    use if argv names none, by default this file's. Prints each override, and the settings of this file that the
    preset replaces. Raises UserError for an unknown key, a wrong type or an impossible combination.
    """
    values = {name: default for name, (_, default, _) in SETTINGS.items()}
    given = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(f"{doc.strip()}\n\nSettings (--key=value):\n{describe(values)}")
            sys.exit(0)
        match = re.fullmatch(r"--(\w+)=(.*)", arg, re.DOTALL)
        if not match:
            raise UserError(f"cannot read {arg!r}: settings are given as --key=value, see --help")
        name, text = match.groups()
        if name not in SETTINGS:
            raise UserError(f"unknown config key '{name}'" + nearest(name, SETTINGS))
        given[name] = typed(name, parse(name, text))
        print(f"Overriding: {name} = {given[name]!r}")
    preset = typed("preset", given.get("preset") or preset or values["preset"])
    named = {"preset", *fixed, *given}
    replaced = [f"{name} {values[name]} -> {value}" for name, value in PRESETS[preset].items()
                if name not in named and values[name] != value]
    if replaced:
        print(f"preset {preset} replaces these settings of config.py: " + ", ".join(replaced))
    values = {**values, **PRESETS[preset], **fixed, **given, "preset": preset}
    return check(SimpleNamespace(**values))


def data_hash(cfg):
    """Short hash of the settings that shape the data, stored with the data and compared whenever they are used."""
    text = json.dumps({k: getattr(cfg, k) for k in DATA_KEYS}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe(values):
    """All settings as text in columns, by section: their names, their values in the dict `values`, their comments."""
    wide = max(map(len, SETTINGS))
    wide_value = max(len(repr(value)) for value in values.values())
    lines, last = [], None
    for name, (section, _, comment) in SETTINGS.items():
        if section != last:
            lines.append(f"\n{section}")
            last = section
        lines.append(f"  {name:<{wide}} = {values[name]!r:<{wide_value}}  {comment}".rstrip())
    return "\n".join(lines)


def take_lock(file):
    """Whether this process has the lock of an open file now. The system takes it back, however the process ends."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass                                    # some network folders have no locks
    return True


def made_folder(*parts):
    """The path of a folder, made if it is missing. Raises UserError where that is not possible."""
    path = Path(*parts)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): choose another one") from None
    return path


@contextlib.contextmanager
def locked(folder, waits=False):
    """Inside `with` this process alone works in `folder`, which is made. While another one does, wait for its end or
    raise UserError."""
    with open(made_folder(folder) / ".lock", "w", encoding="utf-8") as file:
        while not take_lock(file):
            if not waits:
                raise UserError(f"another process works in {folder}: wait until it has ended, or choose another folder")
            print(f"waiting for another process, which works in {folder}", flush=True)
            time.sleep(2)
        yield


@contextlib.contextmanager
def for_people():
    """What goes wrong inside `with` ends the script as people expect: UserError, OSError and a lack of memory with one
    line and status 2, Ctrl-C with status 130, and a reader of its output that has left, such as `head`, with 141."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")       # for letters that the terminal lacks
    status = 2
    try:
        yield
        print(end="", flush=True)
        return
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    except (UserError, OSError) as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|(can't|unable to) allocate", repr(error)):
            raise
        print("error: the memory is full: to train, halve --batch_size and double --grad_accum, which learns the same; "
              f"to evaluate, halve --eval_batch ({repr(error)[:120]})", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:
        # Python would try to write the rest again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def run(main, doc, preset=None):
    """Run a script, see for_people: main(cfg) with the command line's settings.

    preset: the one to start from unless the command line names another; by default that of this file.
    """
    with for_people():
        cfg = from_args(sys.argv[1:], doc, preset)
        script = Path(sys.argv[0]).name
        for job, owner in JOBS.items():
            if getattr(cfg, job) and script != owner:
                raise UserError(f"{job} is a job of another script: python {owner} --{job}={getattr(cfg, job)}")
        main(cfg)


def main(cfg):
    print(describe(vars(cfg)))


if __name__ == "__main__":
    run(main, __doc__)
