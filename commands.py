"""Commands, their answers and the reasons for them: every rule of the task in one file.

- View: which objects of a labelled frame count as seen, where they are (left, ahead, right), which are near, and which
  block the way.
- Truth has three values, FALSE < UNSURE < TRUE. UNSURE means that fair people could disagree: such a command is never
  used.
- Question: a template with its objects and place. It knows its truth, its words and its reason.
- choose(): picks commands so that YES and NO are equally frequent for every question, and in every picture too.
- check_reason(): reads a reason back and tests each of its claims by the same rules.

    python commands.py                 prints examples of every family with scene and reason

Three-valued logic: S. C. Kleene, Introduction to Metamathematics (1952), section 64.
"""
import difflib
import functools
import itertools
import random
import re
from collections import Counter, namedtuple

import numpy as np

import config
from config import UserError

FALSE, UNSURE, TRUE = 0, 1, 2      # truth, ordered: AND is min, OR is max, NOT is 2 - x, on numbers and on arrays alike
PLACES = ("left", "ahead", "right")
COLOURS = ("red", "yellow", "green")
ROAD_USERS = ("car", "truck", "bus", "train", "pedestrian", "rider", "bicycle", "motorcycle")
HANGING = ("traffic light", "traffic sign")    # nearness shows in their height: their lower edge is in the air
CATEGORIES = ROAD_USERS + HANGING
LIGHTS = tuple(f"{colour} light" for colour in COLOURS)
# Words for a category in commands. The first is its own name, which every reason uses. No word may mean more than the
# category, or less: not every rider is a cyclist, a bike may be a motorcycle, and a pick-up truck is no lorry.
NOUNS = {
    "car": ("car", "passenger car"), "truck": ("truck",), "bus": ("bus", "city bus"),
    "train": ("train", "tram"), "pedestrian": ("pedestrian",), "rider": ("rider",),
    "bicycle": ("bicycle",), "motorcycle": ("motorcycle", "motorbike"),
    "traffic light": ("traffic light", "traffic signal", "stoplight"),
    "traffic sign": ("traffic sign", "road sign", "street sign"),
}
# Words by which a command can name a category: the last words of its nouns.
NAMED = {category: {noun.split()[-1] for noun in NOUNS[category]} for category in CATEGORIES}
# How many times cfg.min_pixels an object needs to be told from one that looks like it: a motorcycle from a bicycle, a
# truck from a van. The others are recognised by their outline.
DETAIL = {"truck": 1.75, "bus": 1.75, "train": 1.75, "rider": 1.25, "bicycle": 1.5, "motorcycle": 1.5}
# What it may be instead, if it is not told with certainty.
LIKE = {"truck": "bus", "bus": "truck", "rider": "pedestrian", "pedestrian": "rider", "bicycle": "motorcycle",
        "motorcycle": "bicycle"}
COLOUR_WORDS = {"red": ("red",), "yellow": ("yellow", "amber"), "green": ("green",)}
PLACE_WORDS = {
    "left": ("on the left", "to the left", "on the left side", "on our left"),
    "ahead": ("ahead", "in front", "straight ahead", "in front of us"),
    "right": ("on the right", "to the right", "on the right side", "on our right"),
}
SIDE = {"left": "left", "ahead": "way ahead", "right": "right"}

EDGES = ("x1", "y1", "x2", "y2")

# ---- the view: what is seen, where, how near ----

# certain: TRUE or UNSURE; place: left, ahead, right, or None near a border; places: all places where it may be;
# fills: places that it blocks by its width alone, if it is a near road user; near: a truth; closeness: above 1 is near,
# and larger is nearer; colour: of a traffic light; share: of its box, that no nearer box covers; label: index in frame
Thing = namedtuple("Thing", "category certain place places fills near closeness colour share label")


def corners(label):
    """The edges [x1, y1, x2, y2] of a label's box, in pixels."""
    return [label["box2d"][edge] for edge in EDGES]


def visible_shares(labels, width, height):
    """Share of each label's box that no nearer box covers: a list of numbers in [0, 1].

    They are counted by painting the boxes from far to near on a coarse grid. width, height: of the picture, in pixels.
    An object that stands lower in the picture is nearer. Lights and signs hang, so their lower edge does not tell:
    they count as farthest.
    """
    grid = 64
    owner = np.zeros((grid, grid), np.uint16)
    cells = []
    for label in labels:
        # Plain numbers: numpy is slower on four of them, and making twins calls this often.
        x1, y1, x2, y2 = (round(edge * grid / side) for edge, side in zip(corners(label), 2 * (width, height)))
        # However thin a box is, it gets a cell.
        x1, y1 = min(x1, grid - 1), min(y1, grid - 1)
        cells.append((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
    lower_edges = [-1 if label["category"] in HANGING else label["box2d"]["y2"] for label in labels]
    for i in np.argsort(lower_edges, kind="stable"):
        x1, y1, x2, y2 = cells[i]
        owner[y1:y2, x1:x2] = i + 1
    counts = np.bincount(owner.ravel(), minlength=len(cells) + 1)[1:].tolist()
    return [n / ((x2 - x1) * (y2 - y1)) for n, (x1, y1, x2, y2) in zip(counts, cells)]


def third_of(x):
    """Index in PLACES of a position across the picture, as a share of its width."""
    return int(x > 1 / 3) + int(x > 2 / 3)


def above(measure, low, high):
    """Truth of "the measure is large": FALSE below low, TRUE above high."""
    return int(measure >= low) + int(measure > high)


def nearness(category, y1, y2, cfg):
    """(near, closeness) of an object whose box reaches from y1 down to y2, see Thing."""
    edge = y2 / cfg.image_height
    height = (y2 - y1) / cfg.image_height
    if category in HANGING:
        return above(height, cfg.far_height, cfg.near_height), height / cfg.near_height
    near = above(edge, cfg.far_line, cfg.near_line)
    # The lower edge tells the distance on a level road. On a slope it errs, and the height may contradict it.
    if near == TRUE and height < cfg.far_height or near == FALSE and height > cfg.close_height:
        near = UNSURE
    return near, edge / cfg.near_line


def at_place(thing, place):
    """Truth of "it is at `place`"; None means anywhere."""
    if place in (None, thing.place):
        return TRUE
    return UNSURE if place in thing.places else FALSE


def blocks(thing, place):
    """Truth of "it blocks the way at `place`": a near road user that is there or fills most of it."""
    if thing.category not in ROAD_USERS:
        return FALSE
    if place in thing.fills:
        # What fills a third does not leave it certainly free, even from a little farther away.
        return min(thing.certain, max(thing.near, UNSURE))
    return min(thing.certain, thing.near, at_place(thing, place))


def at_distance(thing, near):
    """Truth of "it is near" (near=True) or "it is far" (False); None means at any distance."""
    if near is None:
        return TRUE
    return thing.near if near else 2 - thing.near


class View:
    """The objects of a frame as the rules see them.

    frame: record whose labels are of CATEGORIES, with boxes in pixels of the stored picture; cfg: settings.
    .objects: list of Thing, nearest first.
    .light: the one colour of the traffic lights, "none" without any light, None if they disagree or are unreadable.
    .there: {name: truth of "there is such an object"} of CATEGORIES and LIGHTS.
    """

    def __init__(self, frame, cfg):
        side = cfg.image_width
        shares = visible_shares(frame["labels"], side, cfg.image_height)
        self.objects = []
        for index, (label, share) in enumerate(zip(frame["labels"], shares)):
            category = label["category"]
            x1, y1, x2, y2 = corners(label)
            width, height = x2 - x1, y2 - y1
            least = cfg.min_pixels * DETAIL.get(category, 1)
            # Half of an object tells less: what a side of the picture cuts must be twice as large.
            if x1 < 1 or x2 > side - 1:
                least *= 2
            big = min(width, height) >= least and width * height * share >= least ** 2
            certain = TRUE if big and share >= cfg.min_visible else UNSURE
            centre = (x1 + x2) / 2 / side
            # Close to a border between thirds, the centre may be in either.
            central = PLACES[third_of(centre - cfg.place_margin):third_of(centre + cfg.place_margin) + 1]
            place = central[0] if len(central) == 1 else None
            # Share of each third's width that the box covers, below 0 where it does not reach.
            covers = {p: 3 * (min(x2 / side, (k + 1) / 3) - max(x1 / side, k / 3)) for k, p in enumerate(PLACES)}
            places = [p for p in PLACES if p in central or covers[p] > cfg.maybe_share]
            fills = [p for p in PLACES if covers[p] > cfg.block_share]
            near, closeness = nearness(category, y1, y2, cfg)
            colour = label["attributes"]["trafficLightColor"]
            self.objects.append(Thing(category, certain, place, places, fills, near, closeness, colour, share, index))
        self.objects.sort(key=lambda thing: -thing.closeness)
        self.light = self._light()
        self.there = {category: self.exists(category) for category in CATEGORIES}
        self.there.update(zip(LIGHTS, map(self.shows, COLOURS)))

    def _light(self):
        lights = [o for o in self.objects if o.category == "traffic light"]
        if not lights:
            return "none"
        # A light without a colour, such as one seen from behind, does not contradict the others.
        coloured = [o for o in lights if o.colour in COLOURS]
        colours = {o.colour for o in coloured}
        readable = any(o.certain == TRUE for o in coloured)
        return colours.pop() if readable and len(colours) == 1 else None

    def shows(self, colour):
        """Truth of "the traffic light is `colour`"."""
        if self.light is None:
            return UNSURE
        return TRUE if self.light == colour else FALSE

    def matching(self, category, place=None, near=None):
        """[(truth of "it is there, at `place`, `near`", Thing)] for objects that are or may be of `category`."""
        return [(min(o.certain, at_place(o, place), at_distance(o, near)), o) for o in self.objects
                if o.category == category or (o.certain == UNSURE and o.category == LIKE.get(category))]

    def certain(self, category, place=None, near=None):
        """[Thing] that certainly match, nearest first; arguments as in matching()."""
        return [o for truth, o in self.matching(category, place, near) if truth == TRUE]

    def exists(self, category, place=None, near=None):
        """Truth of "there is such an object"; arguments as in matching()."""
        return max((truth for truth, _ in self.matching(category, place, near)), default=FALSE)

    def blocked(self, place, category=None):
        """Truth of "a road user blocks `place`"; category: the only one that counts, if it is given."""
        # Two that reach in from both sides may fill the way ahead together. One of them then covers more than half of
        # block_share, and while that is above maybe_share, the truth is not FALSE.
        return max((blocks(o, place) for o in self.objects if category in (None, o.category)), default=FALSE)

    def seen(self, place=None):
        """[Thing] of every category that certainly exist, nearest first; with `place`, those that may be there."""
        return [o for o in self.objects if o.certain == TRUE and (place is None or place in o.places)]


# ---- words for reasons ----

def tidy(text):
    """Words joined by spaces, as people write them: no space before a mark."""
    return re.sub(" (?=[,:?.!])", "", text)


AT = {"left": "on the left", "ahead": "ahead", "right": "on the right"}


def article(noun):
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"


def noun_of(thing):
    """Its category in words; "red light" and the like for a light whose colour is known."""
    if thing.category == "traffic light" and thing.colour in COLOURS:
        return f"{thing.colour} light"
    return thing.category


def whereabouts(thing):
    """Such as "near on the left", "far ahead" or "near"; "in view" when neither place nor distance is certain."""
    distance = {TRUE: "near", FALSE: "far", UNSURE: ""}[thing.near]
    return f"{distance} {AT.get(thing.place, '')}".strip() or "in view"


def light_words(view):
    return "no light is in view" if view.light == "none" else f"the light is {view.light}"


def claim(view, name, place=None, near=None):
    """What is true about `name`, a category or one of LIGHTS, in words: where the nearest one is, or that none is.

    It must be certain; arguments as in View.matching. It adds where one is instead, if one certainly is.
    """
    if name in LIGHTS:
        return light_words(view)
    found = view.certain(name, place, near)
    if found:
        return f"{article(name)} is {whereabouts(found[0])}"
    distance = "near" if near else ""
    asked = f"{distance} {AT.get(place, '')}".strip() or "in view"
    others = [o for o in view.certain(name) if o.place]
    # Without a place or distance, certain others would have been found.
    instead = f" , one is {whereabouts(others[0])}" if others else ""
    return f"no {name} is {asked}{instead}"


def describe(view, limit, place=None):
    """The scene, or what is at `place`, in words: up to `limit` certain objects, nearest first.

    "nothing" means nothing that certainly counts, by the same rules.
    """
    seen = [f"{article(noun_of(o))} {whereabouts(o)}" for o in view.seen(place)[:limit]]
    return " , ".join(seen) or f"nothing {AT.get(place, 'in view')}"


# ---- questions ----

def phrases(text):
    """The phrases in a text, separated by slashes."""
    return [phrase.strip() for phrase in text.split("/")]


# share: of a picture's questions; paraphrases: the first is canonical, the last is never trained on.
# {a} "a car", {n} "car", {at} "on the left", {c} "red", {d} "left", {side} "way ahead", {b} and {m} the second object
Template = namedtuple("Template", "family level share paraphrases")
TEMPLATES = {
    "exists": Template("detection", "simple", 0.13, phrases("""
        is there {a} in the scene / is there {a} / do you see {a} / can you see {a} in the picture / is {a} visible /
        is there any {n} around / does the picture show {a} / can you find {a} here / do you notice any {n} /
        does the scene contain {a} / is {a} present in this image / can you spot {a} anywhere /
        does this photo include {a} / is there at least one {n} / did the camera catch {a} /
        do you see {a} on this street / is there {a} in front of the camera / is {a} shown here /
        does {a} show up in the image / do you see any {n} in the picture""")),
    "exists_at": Template("detection", "medium", 0.22, phrases("""
        is there {a} {at} / do you see {a} {at} / is {a} visible {at} / can you see any {n} {at} / {at} , is there {a} /
        does the picture show {a} {at} / is there any {n} {at} / can you find {a} {at} / does {a} appear {at} /
        is {a} located {at} / can you spot {a} {at} / have you spotted {a} {at} / do you notice {a} {at}""")),
    "near": Template("detection", "medium", 0.08, phrases("""
        is there {a} near / is {a} close to us / do you see {a} nearby / is there a nearby {n} /
        is {a} only a few metres away / is any {n} close to our vehicle / is there {a} close by /
        can you see {a} near us""")),
    "light": Template("state", "medium", 0.09, phrases("""
        is the traffic light {c} / is the light {c} / is the signal {c} now / does the traffic light show {c} /
        does the light look {c} / has the light turned {c} / is the colour of the light {c} /
        is the signal currently {c} / has the signal switched to {c} / is the light showing {c} at this moment /
        does the signal show {c} now""")),
    "straight": Template("safety", "complex", 0.05, phrases("""
        can the car safely go straight / is it safe to go straight / may we drive straight on /
        can we continue straight ahead / is it safe to keep going / should we keep driving straight /
        can the vehicle move forward safely / is it okay to proceed / is the car free to go straight /
        can the driver carry on without risk / would it be safe to continue along this road /
        may the car continue straight on""")),
    "stop": Template("safety", "complex", 0.05, phrases("""
        should the car stop / do we have to stop / must the vehicle halt / should we brake now /
        is it necessary to stop here / does the car need to wait / is braking required /
        should the driver hit the brakes / should the driver slow down and stop / is it time to press the brake pedal /
        would it be wise to stop / is a stop needed / must we stop now""")),
    "turn": Template("safety", "complex", 0.07, phrases("""
        can the car safely turn {d} / is it safe to turn {d} / may we turn {d} / can we make a {d} turn /
        is a {d} turn safe / could the vehicle turn {d} safely / is it okay to turn {d} here /
        can the driver go {d} without danger / would a {d} turn be safe / can the driver safely steer {d} /
        may the car make a {d} turn""")),
    "change": Template("safety", "complex", 0.05, phrases("""
        can the car safely change lanes to the {d} / is it safe to move to the {d} lane /
        may we switch to the {d} lane / can we merge into the {d} lane / is a lane change to the {d} safe /
        could the vehicle move over to the {d} / is it okay to take the {d} lane /
        would it be safe to switch lanes to the {d} / is moving one lane to the {d} safe /
        may the car change to the {d} lane""")),
    "clear": Template("navigation", "simple", 0.07, phrases("""
        is the {side} clear / is the {side} free / is the {side} open / does the {side} look clear /
        is the {side} unobstructed / does the {side} look free of obstacles / is the {side} free of obstacles""")),
    "and": Template("detection", "complex", 0.05, phrases("""
        is there {a} and {b} / do you see {a} and {b} / are there both {a} and {b} / can you see {a} as well as {b} /
        does the picture show {a} together with {b} / is there {a} and also {b} / are {a} and {b} both visible""")),
    "and_no": Template("detection", "complex", 0.10, phrases("""
        is there {a} and no {m} / do you see {a} but no {m} / is there {a} but no {m} / can you see {a} and no {m} /
        does the picture show {a} but no {m} / do you notice {a} but no {m} /
        does the scene contain {a} and no {m}""")),
    "or": Template("detection", "complex", 0.05, phrases("""
        is there {a} or {b} / do you see either {a} or {b} / can you find {a} or {b} / is {a} or {b} visible /
        does the picture show {a} or {b} / do you notice {a} or {b} / is there either {a} or {b} in the scene""")),
}
DESCRIPTIONS = {
    "describe": phrases("""
        describe the scene / describe what you see / what is in the scene / what do you see /
        tell me what is in the picture / list all objects around us / what does the picture show /
        which things are in front of the camera / give a short description of the street /
        what can be seen from the car / name everything that you can see / please describe this street /
        give me a summary of the traffic scene / what objects are visible / report what surrounds us /
        mention all that you notice / summarise the street scene / tell me what you see"""),
    "describe_at": phrases("""
        what is {at} / what do you see {at} / tell me what is {at} / describe what is {at} / which things are {at} /
        {at} , what do you see / list all objects {at} / what can be seen {at}"""),
    # Without these, questions that pair an object and a place never paired in training lose 10 points more.
    "where": phrases("""
        where is the {n} / where is {a} / where do you see {a} / tell me where {a} is /
        in which part of the picture is the {n} / where can {a} be seen"""),
}
# Questions that training never asks, although reasons and descriptions may mention the same things. Each of these
# objects is still asked about at two places: at one place alone, the word for it would carry no information, and
# training would teach to ignore it. The held-out place is "ahead", because a flip turns left into right.
HELD_OUT = {("exists_at", "bus", "ahead"), ("exists_at", "motorcycle", "ahead"), ("and", "truck", "pedestrian"),
            ("or", "bus", "bicycle"), ("and_no", "car", "red light")}
PAIRED = ("car", "truck", "bus", "pedestrian", "bicycle", "motorcycle", "rider", "traffic sign")


class Question(namedtuple("Question", "template first second", defaults=("", ""))):
    """One question without its wording, for example ("exists_at", "car", "left"); it is balanced on its own.

    template            first                                       second
    exists, near        category
    exists_at           category                                    place
    light               colour
    straight, stop
    turn, change        place: left or right
    clear               place: left, ahead or right
    and, and_no, or     category                                    category or "red light" (yellow, green)
    describe            (these last three have no truth)
    describe_at         place
    where               category
    """

    @property
    def family(self):
        if self.template in DESCRIPTIONS:
            return "describe"
        return "state" if self.other in LIGHTS else TEMPLATES[self.template].family

    @property
    def level(self):
        return TEMPLATES[self.template].level if self.template in TEMPLATES else "describe"

    @property
    def category(self):
        """The first object, or ""."""
        return self.first if self.first in CATEGORIES else ""

    @property
    def side(self):
        """The place to turn to, to change to, or to be clear; "" for other templates."""
        return self.first if self.first in PLACES else ""

    @property
    def other(self):
        """The second object, a category or one of LIGHTS, or ""."""
        return "" if self.second in PLACES else self.second

    @property
    def place(self):
        """left, ahead, right or ""."""
        return self.second if self.second in PLACES else self.side

    @property
    def objects(self):
        """Categories that the command names."""
        other = "traffic light" if self.template == "light" or self.other in LIGHTS else self.other
        return tuple(filter(None, (self.category, other)))

    @property
    def held_out(self):
        return self in HELD_OUT

    def asked(self):
        """Where the first object must be: the arguments `place` and `near` of View.matching."""
        return self.place or None, self.template == "near" or None

    def truth(self, view):
        """FALSE, UNSURE or TRUE, from the rules of the template."""
        if self.template == "light":
            return view.shows(self.first)
        if self.other:
            a = view.there[self.category]
            b = view.there[self.other]
            if self.template == "and":
                return min(a, b)
            if self.template == "or":
                return max(a, b)
            return min(a, 2 - b)
        if self.category:
            return view.exists(self.category, *self.asked())
        blocked = max(view.blocked(place) for place in self.ways())
        if self.obeys_light():
            blocked = max(blocked, view.shows("red"), view.shows("yellow"))
        return blocked if self.template == "stop" else 2 - blocked

    def obeys_light(self):
        """Whether a red or yellow light forbids what is asked."""
        return self.template in ("straight", "turn", "stop")

    def ways(self):
        """The places that nothing may block."""
        if self.template in ("straight", "stop"):
            return ("ahead",)
        if self.template == "turn":
            # A turn begins by driving ahead.
            return ("ahead", self.side)
        return (self.side,)

    def evidence(self, view):
        """[Thing] that make the answer YES: the objects asked about that are certainly there, lights of any colour."""
        names = self.objects[:1] if self.template == "and_no" else self.objects
        return [o for name in names for o in view.certain(name, *self.asked())]

    def reason(self, view):
        """Short true reason for the (certain) answer, made from the rule that gave it."""
        yes = self.truth(view) == TRUE
        if self.template == "light":
            return light_words(view)
        if self.other:
            return self._reason_of_two(view, yes)
        if self.category:
            return claim(view, self.category, *self.asked())
        # Only "stop" is answered YES when something blocks the way.
        return self._reason_of_way(view, blocked=yes == (self.template == "stop"))

    def _reason_of_two(self, view, yes):
        both_matter = yes != (self.template == "or")
        if both_matter:
            return f"{claim(view, self.category)} and {claim(view, self.other)}"
        first_decides = view.there[self.category] == (TRUE if yes else FALSE)
        return claim(view, self.category if first_decides else self.other)

    def _reason_of_way(self, view, blocked):
        causes = []
        # A green light speaks for a free way only, every other colour for a blocked one.
        if self.obeys_light() and view.light in COLOURS and blocked == (view.light != "green"):
            causes.append(light_words(view))
        if blocked:
            blockers = [(o, place) for place in self.ways() for o in view.objects if blocks(o, place) == TRUE]
            causes += [f"{article(o.category)} blocks the {SIDE[place]}" for o, place in blockers[:1]]
        else:
            ways = " or the ".join(SIDE[place] for place in self.ways())
            causes.append(f"nothing blocks the {ways}")
        return " and ".join(causes)

    def words(self, rng, paraphrase=None):
        """The command in words; `paraphrase`: index into the template's, by default drawn from the trained ones."""
        forms = self.forms()
        form = rng.choice(forms[:-1]) if paraphrase is None else forms[paraphrase]
        return form.format(**self.fill(*map(rng.choice, self.names())))

    def forms(self):
        return TEMPLATES[self.template].paraphrases if self.template in TEMPLATES else DESCRIPTIONS[self.template]

    def names(self):
        """All words for each thing that the command names: a colour, a place, the first and the second object."""
        place = self.place if self.template.endswith("_at") else ""
        objects = [NOUNS[name] for name in (self.category, self.other) if name in NOUNS]
        return COLOUR_WORDS.get(self.first, ("",)), PLACE_WORDS.get(place, ("",)), *objects

    def fill(self, colour, place, first="", second=""):
        """What stands in a form's braces, for one word of each of names()."""
        second = second or self.other
        return dict(d=self.first, side=SIDE.get(self.first), c=colour, at=place, n=first, a=article(first), m=second,
                    b=article(second))


def question_of(item):
    """The Question of a stored command."""
    return Question(item["template"], item["first"], item["second"])


def all_questions():
    """Every question, in a fixed order."""
    cells = [Question("exists", c) for c in CATEGORIES] + [Question("near", c) for c in ROAD_USERS]
    cells += [Question("exists_at", c, place) for c in CATEGORIES for place in PLACES]
    cells += [Question("light", c) for c in COLOURS] + [Question("straight"), Question("stop")]
    cells += [Question(t, side) for t in ("turn", "change") for side in ("left", "right")]
    cells += [Question("clear", place) for place in PLACES]
    # "a and b" is "b and a", so one order is enough, but "a and no b" needs both.
    for i, a in enumerate(PAIRED):
        for b in PAIRED[i + 1:] + LIGHTS:
            cells += [Question("and", a, b), Question("or", a, b), Question("and_no", a, b)]
        cells += [Question("and_no", a, b) for b in PAIRED[:i]]
    return cells


QUESTIONS = all_questions()


def truths(view):
    """Truth of every question of QUESTIONS: (len(QUESTIONS),) int8."""
    return np.array([question.truth(view) for question in QUESTIONS], np.int8)


def vocabulary():
    """Every word that a command, a reason or a description can hold, sorted."""
    texts = [form for template in TEMPLATES.values() for form in template.paraphrases]
    for group in (DESCRIPTIONS, NOUNS, COLOUR_WORDS, PLACE_WORDS):
        for forms in group.values():
            texts += forms
    texts += [*SIDE.values(), "a an no one is and or , : ? near far on in view nothing blocks light the"]
    return sorted({word for text in texts for word in re.sub(r"\{\w+\}", " ", text).split()})


# ---- understanding what is typed ----

def only_words(text):
    """The words of a text in small letters, without marks."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


@functools.cache
def askable():
    """{words of a command: (template, command)} of everything that can be asked."""
    found = {}
    described = [Question("describe"), *(Question("describe_at", place) for place in PLACES),
                 *(Question("where", category) for category in CATEGORIES)]
    for question in described + QUESTIONS:
        for form, *names in itertools.product(question.forms(), *question.names()):
            fill = question.fill(*names)
            command = form.format(**fill)
            said = [command]
            if question.template in ("and", "or"):          # the other order means the same
                said.append(form.format(**dict(fill, a=fill["b"], b=fill["a"])))
            found.update({only_words(text): (question.template, command) for text in said})
    return found


def understood(text):
    """The commands that answer what is typed: one, or three for the colour of the light.

    Raises UserError, with the nearest that can be asked, for what is not in the grammar: the model would answer it too.
    """
    typed = only_words(text)
    known = askable()
    if typed in known:
        return [known[typed][1]]
    if re.fullmatch("wh(at|ich) (is the )?colou?r (is|of|does) the (traffic |stop)?(light|signal)( show| now)?", typed):
        return [f"is the light {colour}" for colour in COLOURS]
    words, lexicon = typed.split(), vocabulary()
    meant = {match for word in words for match in difflib.get_close_matches(word, lexicon, 1, 0.75)}
    examples = {}                                           # of each template, the one that differs in the fewest words
    for own in sorted(known, key=lambda own: len(meant ^ {*own.split()})):
        template, command = known[own]
        examples.setdefault(template, f"'{command}?'")
    unknown = ", ".join(word for word in words if word not in lexicon)
    why = f" (words that it does not know: {unknown})" if unknown else ""
    raise UserError(f"the model has not learned to answer '{text}'{why}; ask, for example, "
                    f"{' or '.join([*examples.values()][:3])}. The objects that it knows: "
                    f"{', '.join(CATEGORIES + LIGHTS)}")


# ---- reading a reason back ----

_PLACE = {AT[place]: place for place in PLACES}
_WAY = {SIDE[place]: place for place in PLACES}
_NOUN = "|".join(CATEGORIES + LIGHTS)
_AT = "|".join(_PLACE)
_SIDE = "|".join(_WAY)
# One clause: the colour of the light, or who or that nothing blocks a way, or that nothing is there, or that an object
# is there or is not.
_CLAUSE = re.compile("|".join((
    "the light is (?P<colour>red|yellow|green)",
    f"(?:nothing|an? (?P<blocker>{'|'.join(CATEGORIES)})) blocks the (?P<ways>(?:{_SIDE})(?: or the (?:{_SIDE}))*)",
    f"nothing (?:in view|(?P<empty>{_AT}))",
    f"(?:(?:an?|(?P<no>no)) (?P<noun>{_NOUN}|light)(?: is)?|one is)(?: (?P<near>near|far))?(?: (?P<at>{_AT}|in view))?",
)))


def check_reason(reason, view):
    """Truth of a reason or a description by the rules: that of its worst clause. None if it is not in the grammar.

    It judges what the model generates as well as what this file writes.
    """
    worst, noun = TRUE, None
    for clause in re.split(" and | , ", reason):
        parts = _CLAUSE.fullmatch(clause)
        if parts is None:
            return None
        # "one" stands for the object of the clause before: "no car is ahead , one is on the left".
        noun = parts["noun"] or noun
        if noun is None and clause.startswith("one"):
            return None
        worst = min(worst, _truth_of_clause(parts, noun, view))
    return worst


def _truth_of_clause(parts, noun, view):
    """parts: match of _CLAUSE; noun: the one that the clause names, or that "one" stands for."""
    if parts["colour"]:
        return view.shows(parts["colour"])
    if parts["ways"]:
        ways = [_WAY[side] for side in parts["ways"].split(" or the ")]
        blocked = max(view.blocked(way, parts["blocker"]) for way in ways)
        return blocked if parts["blocker"] else 2 - blocked
    if parts[0].startswith("nothing"):
        return FALSE if view.seen(_PLACE.get(parts["empty"])) else TRUE
    near = {"near": True, "far": False}.get(parts["near"])
    place = _PLACE.get(parts["at"])
    found = view.matching(noun if noun in CATEGORIES else "traffic light", place, near)
    there = max((truth for truth, o in found if noun not in LIGHTS or noun_of(o) == noun), default=FALSE)
    return 2 - there if parts["no"] else there


# ---- choosing commands ----


def template_shares(table):
    """{index of a question: its share of all commands}: a template's share is divided among its questions.

    table: (pictures, questions) truths. Held-out questions are excluded, and those that have one answer alone.
    """
    both = (table == TRUE).any(0) & (table == FALSE).any(0)
    templates = {q: question.template for q, question in enumerate(QUESTIONS) if both[q] and not question.held_out}
    number = Counter(templates.values())
    return {q: TEMPLATES[template].share / number[template] for q, template in templates.items()}


def choose(table, cfg, rng, shares=None):
    """Pick the questions of each picture so that answers give nothing away.

    table: (pictures, questions) int8 truths of one split. At most cfg.commands_stored are picked for a picture, half
    of them YES. rng: numpy Generator. shares: {index of a question: its share of all commands}, by default
    template_shares(table). Returns what is picked: bool, of the shape of `table`.

    For every question as many YES as NO are taken, so that the question alone tells nothing. Pictures that have too
    few commands of an answer come first for it, so that pictures end up half YES and the picture alone tells nothing.
    """
    pictures, half = len(table), cfg.commands_stored // 2
    shares = shares or template_shares(table)
    load = np.zeros((3, pictures), int)            # how many are picked, by answer and picture
    picked = np.zeros(table.shape, bool)
    # The rarest questions choose first, while all pictures still have room.
    order = sorted(shares, key=lambda q: min((table[:, q] == answer).sum() for answer in (TRUE, FALSE)))
    for q in order:
        rows = {answer: np.flatnonzero((table[:, q] == answer) & (load[answer] < half)) for answer in (TRUE, FALSE)}
        wanted = int(np.ceil(shares[q] * cfg.commands_stored * pictures / 2))
        n = min(wanted, *map(len, rows.values()))
        if n < cfg.min_cell:
            continue
        for answer, free in rows.items():
            own = load[answer][free]
            surplus = own - load[2 - answer][free]
            # By surplus, then by load, then at random.
            chosen = free[np.lexsort((rng.random(len(own)), own, surplus))[:n]]
            load[answer][chosen] += 1
            picked[chosen, q] = True
    return picked


# ---- finished commands ----


def make(picture, question, command, answer, reason):
    """A finished command as a plain dict. picture: its index; command: in words; answer: True, False or None."""
    return dict(picture=int(picture), **question._asdict(), family=question.family, level=question.level,
                place=question.place, command=command, answer=answer, reason=reason)


def make_item(picture, question, view, rng, paraphrase=None):
    """A question as a finished command, in words drawn with `rng`; paraphrase: as for Question.words."""
    words = question.words(rng, paraphrase)
    return make(picture, question, words, question.truth(view) == TRUE, question.reason(view))


def describe_item(picture, view, rng, cfg, place):
    """"describe the scene", or what is at `place` unless it is "", as a finished command; it has no verdict."""
    template = "describe_at" if place else "describe"
    form = rng.choice(DESCRIPTIONS[template][:-1])
    command = form.format(at=rng.choice(PLACE_WORDS.get(place, ("",))))
    return make(picture, Question(template, place), command, None, describe(view, cfg.max_describe, place or None))


def where_items(picture, view, rng):
    """"where is the bus" for up to two categories that are certainly there and one drawn from all; without a verdict.

    A category that is neither certainly there nor certainly absent is dropped.
    """
    there = [category for category in CATEGORIES if view.there[category] == TRUE]
    items = []
    for category in dict.fromkeys(rng.sample(there, min(2, len(there))) + rng.sample(CATEGORIES, 1)):
        noun = rng.choice(NOUNS[category])
        if view.there[category] != UNSURE:
            command = rng.choice(DESCRIPTIONS["where"][:-1]).format(n=noun, a=article(noun))
            items.append(make(picture, Question("where", category), command, None, claim(view, category)))
    return items


# ---- demonstration ----


def random_frame(rng, cfg):
    """A frame with up to six boxes thrown at random: enough to show the rules, without a picture."""
    labels = []
    for _ in range(rng.randint(0, 6)):
        x = rng.uniform(0, 0.8) * cfg.image_width
        y = rng.uniform(0.3, 0.8) * cfg.image_height
        edges = dict(x1=x, y1=y, x2=x + 0.2 * cfg.image_width, y2=y + 0.2 * cfg.image_height)
        colour = dict(trafficLightColor=rng.choice(COLOURS))
        labels.append(dict(category=rng.choice(CATEGORIES), attributes=colour, box2d=edges))
    return dict(labels=labels)


def main(cfg):
    rng = random.Random(cfg.seed)
    shown = set()
    for _ in range(5000):
        view = View(random_frame(rng, cfg), cfg)
        question = rng.choice(QUESTIONS)
        kind = (question.template, question.truth(view))
        if kind[1] != UNSURE and kind not in shown:
            shown.add(kind)
            item = make_item(0, question, view, rng)
            verdict = "YES" if item["answer"] else "NO"
            text = (f"scene: {describe(view, 9)}\n"
                    f"  {item['family']:<12}{item['template']:<11}{item['command']}?\n"
                    f"{'':<25}[{verdict}] {item['reason']}\n")
            print(tidy(text))
    print(f"vocabulary: {len(vocabulary())} words and 6 special tokens; {len(QUESTIONS)} questions")


if __name__ == "__main__":
    config.run(main, __doc__)
