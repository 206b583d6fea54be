"""Commands, their answers and the reasons for them: every rule of the task in one file.

- View: what counts as seen, where (left, ahead, right) and how near, read off one labelled frame.
- Truth has three values, FALSE < UNSURE < TRUE. UNSURE is "a fair person could argue": such a command is never used.
- Question: a template with its objects and place; knows its truth, its words and its reason.
- choose(): picks commands so that for every question YES and NO are equally frequent, and in every picture too.
- check_reason(): reads a reason back and tests each claim by the same rules.

    python commands.py                 prints examples of every family with scene and reason

Three-valued logic: S. C. Kleene, Introduction to Metamathematics (1952), section 64.
"""
import random
import re
from collections import namedtuple

import numpy as np

import config

FALSE, UNSURE, TRUE = 0, 1, 2      # truth, ordered: AND is min, OR is max, NOT is 2 - x, on numbers and on arrays alike
PLACES = ("left", "ahead", "right")
COLOURS = ("red", "yellow", "green")
ROAD_USERS = ("car", "truck", "bus", "train", "pedestrian", "rider", "bicycle", "motorcycle")
HANGING = ("traffic light", "traffic sign")    # nearness shows in their height: their lower edge is in the air
CATEGORIES = ROAD_USERS + HANGING
# Words for a category in commands. The first is the canonical one, used in every reason.
NOUNS = {
    "car": ("car", "passenger car", "automobile"), "truck": ("truck", "lorry"), "bus": ("bus", "city bus"),
    "train": ("train", "tram"), "pedestrian": ("pedestrian", "person", "walker"), "rider": ("rider", "cyclist"),
    "bicycle": ("bicycle", "bike"), "motorcycle": ("motorcycle", "motorbike"),
    "traffic light": ("traffic light", "traffic signal", "stoplight"),
    "traffic sign": ("traffic sign", "road sign", "street sign"),
}
COLOUR_WORDS = {"red": ("red",), "yellow": ("yellow", "amber"), "green": ("green",)}
PLACE_WORDS = {
    "left": ("on the left", "to the left", "on the left side", "at the left", "on our left hand"),
    "ahead": ("ahead", "in front", "straight ahead", "in the middle", "directly in front of us"),
    "right": ("on the right", "to the right", "on the right side", "at the right", "on our right hand"),
}
SIDE = {"left": "left", "ahead": "way ahead", "right": "right"}

# ---- the view: what is seen, where, how near ----

Thing = namedtuple("Thing", "category certain place places near closeness colour label")
# certain: TRUE or UNSURE; place: left/ahead/right, None at a border; places: where it may be; near: truth;
# closeness: over 1 is near, larger is nearer; label: index of the label in the frame


def visible_shares(boxes, categories, size, grid=64):
    """Share of each box that no nearer box covers, painting far to near on a coarse grid.

    boxes: n times (x1, y1, x2, y2) in pixels of a `size` picture. Nearer is who stands lower in the picture; lights
    and signs hang, so their lower edge says nothing: they count as farthest. Returns n numbers in [0, 1].
    """
    owner, cells = np.zeros((grid, grid), np.uint16), []
    for box in boxes:              # plain numbers: numpy is slower on four of them, and twins ask this a lot
        x1, y1, x2, y2 = (min(max(round(float(v) * grid / size), 0), grid) for v in box)
        x1, y1 = min(x1, grid - 1), min(y1, grid - 1)
        cells.append((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
    lower_edge = [-1 if category in HANGING else box[3] for box, category in zip(boxes, categories)]
    for i in sorted(range(len(cells)), key=lower_edge.__getitem__):
        x1, y1, x2, y2 = cells[i]
        owner[y1:y2, x1:x2] = i + 1
    counts = np.bincount(owner.ravel(), minlength=len(cells) + 1)[1:].tolist()
    return [n / ((x2 - x1) * (y2 - y1)) for n, (x1, y1, x2, y2) in zip(counts, cells)]


class View:
    """The objects of a frame as the rules see them.

    frame: BDD100K record with boxes in pixels of the stored cfg.image_size picture; cfg: settings.
    .objects: list of Thing, nearest first.
    """

    def __init__(self, frame, cfg):
        size, self.objects = cfg.image_size, []
        kept = [(i, lab) for i, lab in enumerate(frame["labels"]) if lab["category"] in CATEGORIES]
        boxes = [[lab["box2d"][k] for k in ("x1", "y1", "x2", "y2")] for _, lab in kept]
        shares = visible_shares(boxes, [lab["category"] for _, lab in kept], size)
        for (index, label), (x1, y1, x2, y2), share in zip(kept, boxes, shares):
            big = min(x2 - x1, y2 - y1) >= cfg.min_pixels
            centre = (x1 + x2) / 2 / size
            third = [int(x > 1 / 3) + int(x > 2 / 3) for x in (centre - cfg.place_margin, centre + cfg.place_margin)]
            places = PLACES[third[0]:third[1] + 1]
            place = places[0] if len(places) == 1 else None
            if label["category"] in HANGING:
                measure, line = (y2 - y1) / size, cfg.near_height
            else:
                measure, line = y2 / size, cfg.near_line
            near = UNSURE if abs(measure - line) < cfg.near_margin else (TRUE if measure > line else FALSE)
            colour = label.get("attributes", {}).get("trafficLightColor", "none")
            certain = TRUE if big and share >= cfg.min_visible else UNSURE
            self.objects.append(Thing(label["category"], certain, place, places, near, measure / line, colour, index))
        self.objects.sort(key=lambda o: -o.closeness)
        self.light = self._light()

    def _light(self):
        """The one colour of the traffic lights; "none" without any light; None when unreadable or in disagreement."""
        lights = [o for o in self.objects if o.category == "traffic light"]
        colours = {o.colour for o in lights if o.colour in COLOURS}
        readable = {o.colour for o in lights if o.colour in COLOURS and o.certain == TRUE}
        if not lights:
            return "none"
        return next(iter(readable)) if len(readable) == 1 and len(colours) == 1 else None

    def shows(self, colour):
        """Truth of "the traffic light is `colour`"."""
        return UNSURE if self.light is None else (TRUE if self.light == colour else FALSE)

    def matching(self, category=None, place=None, near=None):
        """[(truth, object)] for objects that are or may be of `category` (None: any road user), at `place`, `near`."""
        found = []
        for o in self.objects:
            if o.category == category or (category is None and o.category in ROAD_USERS):
                at = TRUE if place in (None, o.place) else UNSURE if place in o.places else FALSE
                by = TRUE if near is None else (o.near if near else 2 - o.near)
                truth = min(o.certain, at, by)
                if truth > FALSE:
                    found.append((truth, o))
        return found

    def exists(self, category=None, place=None, near=None):
        """Truth of "there is such an object"."""
        return max((truth for truth, _ in self.matching(category, place, near)), default=FALSE)


# ---- words for reasons ----

AT = {"left": "on the left", "ahead": "ahead", "right": "on the right"}


def article(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def noun_of(o):
    return f"{o.colour} light" if o.category == "traffic light" and o.colour in COLOURS else NOUNS[o.category][0]


def whereabouts(o):
    """ "near on the left", "far ahead", "near", or "in view" when neither place nor distance is certain."""
    words = [{TRUE: "near", FALSE: "far", UNSURE: ""}[o.near], AT.get(o.place, "")]
    return " ".join(w for w in words if w) or "in view"


def positive(view, category, place=None, near=None):
    """The reason that such an object is there: names the nearest that certainly is."""
    o = next(o for truth, o in view.matching(category, place, near) if truth == TRUE)
    return f"{article(NOUNS[o.category][0])} is {whereabouts(o)}"


def negative(view, category, place=None, near=None):
    """The reason that no such object is there; says where one is instead, when one certainly is."""
    noun = NOUNS[category][0]
    text = f"no {noun} is " + (" ".join(w for w in ("near" if near else "", AT.get(place, "")) if w) or "in view")
    if place or near:
        other = next((o for truth, o in view.matching(category) if truth == TRUE and o.place), None)
        if other:
            text += f" , one is {whereabouts(other)}"
    return text


def light_words(view):
    return "no light is in view" if view.light == "none" else f"the light is {view.light}"


def describe(view, limit, place=None):
    """The scene, or what is at `place`, in words: up to `limit` certain objects, nearest first.

    "nothing" means nothing that certainly counts, by the same rules.
    """
    seen = [o for o in view.objects if o.certain == TRUE and place in (None, o.place)][:limit]
    return " , ".join(f"{article(noun_of(o))} {whereabouts(o)}" for o in seen) or \
        f"nothing {AT.get(place, 'in view')}"


# ---- questions ----

Template = namedtuple("Template", "family level share paraphrases")
# share: of the commands of a picture; paraphrases: the first is canonical, the last is never trained on.
# {a} "a car", {n} "car", {at} "on the left", {c} "red", {b} and {m} the second object, {side} "way ahead"
TEMPLATES = {
    "exists": Template("detection", "simple", 0.13, (
        "is there {a} in the scene", "is there {a}", "do you see {a}", "can you see {a} in the picture",
        "is {a} visible",
        "is there any {n} around", "does the picture show {a}", "can you find {a} here", "do you notice any {n}",
        "does the scene contain {a}", "is {a} present in this image", "can you spot {a} anywhere",
        "has the camera captured any {n}", "would you say that there is {a}", "does this photo include {a}",
        "are we looking at {a}", "do you see any {n} in the picture")),
    "exists_at": Template("detection", "medium", 0.24, (
        "is there {a} {at}", "do you see {a} {at}", "is {a} visible {at}", "can you see any {n} {at}",
        "{at} , is there {a}", "does the picture show {a} {at}", "is there any {n} {at} of the scene",
        "can you find {a} {at}", "look {at} : is there {a}", "does {a} appear {at}", "is {a} located {at}",
        "can you spot {a} {at}", "do you notice {a} {at}")),
    "near": Template("detection", "medium", 0.08, (
        "is there {a} near", "is {a} close to us", "do you see {a} nearby", "is there a nearby {n}",
        "is any {n} close to our vehicle", "is there {a} close by", "is {a} within a short distance",
        "are we getting close to {a}", "can you see {a} near us")),
    "light": Template("state", "medium", 0.09, (
        "is the traffic light {c}", "is the light {c}", "is the signal {c} now", "does the traffic light show {c}",
        "do you see a {c} light", "is there a {c} traffic light", "has the light turned {c}",
        "is the colour of the light {c}", "is the lamp lit {c}", "is the signal currently {c}",
        "does the signal show {c} now")),
    "straight": Template("safety", "complex", 0.05, (
        "can the car safely go straight", "is it safe to go straight", "may we drive straight on",
        "can we continue straight ahead", "is it safe to keep going", "should we keep driving straight",
        "can the vehicle move forward safely", "is it okay to proceed", "are we allowed to proceed straight",
        "can the driver carry on without risk", "may the car continue straight on")),
    "stop": Template("safety", "complex", 0.05, (
        "should the car stop", "do we have to stop", "must the vehicle halt", "should we brake now",
        "is it necessary to stop here", "does the car need to wait", "is braking required",
        "ought the driver to hit the brakes", "should the driver slow down and stop", "must we stop now")),
    "turn": Template("safety", "complex", 0.07, (
        "can the car safely turn {d}", "is it safe to turn {d}", "may we turn {d} now", "can we make a {d} turn",
        "is a {d} turn safe", "could the vehicle turn {d} safely", "should we take the {d} turn now",
        "are we allowed to turn {d}", "is it okay to steer {d} at this junction",
        "can the driver go {d} without danger",
        "may the car make a {d} turn")),
    "change": Template("safety", "complex", 0.06, (
        "can the car safely change lanes to the {d}", "is it safe to move to the {d} lane",
        "may we switch to the {d} lane", "can we merge into the {d} lane", "is a lane change to the {d} safe",
        "could the vehicle move over to the {d}", "is it okay to shift into the {d} lane",
        "can the driver pull over to the {d}", "may the car change to the {d} lane")),
    "clear": Template("navigation", "simple", 0.08, (
        "is the {side} clear", "is the {side} free", "is there space on the {side}", "is the {side} open",
        "is nothing blocking the {side}", "is the {side} empty of traffic", "is there nothing near on the {side}",
        "is the {side} unobstructed", "is there enough room on the {side}", "does the {side} look clear",
        "is the {side} free of traffic")),
    "and": Template("", "complex", 0.05, (
        "is there {a} and {b}", "do you see {a} and {b}", "are there both {a} and {b}",
        "can you see {a} as well as {b}",
        "does the picture show {a} together with {b}", "is there {a} and also {b}", "are {a} and {b} both visible")),
    "and_no": Template("", "complex", 0.06, (
        "is there {a} and no {m}", "do you see {a} but no {m}", "is there {a} without {b}",
        "can you see {a} while there is no {m}", "is {a} visible but not {b}", "is there {a} but never {b}",
        "do you see {a} without any {m}")),
    "or": Template("", "complex", 0.05, (
        "is there {a} or {b}", "do you see either {a} or {b}", "can you find {a} or {b}", "is {a} or {b} visible",
        "does the picture show {a} or else {b}", "is at least one of these here : {a} or {b}",
        "is there either {a} or {b} in the scene")),
}
DESCRIBE = ("describe the scene", "describe what you see", "what is in the scene", "what do you see",
            "tell me what is in the picture", "list all objects around us", "what does the picture show",
            "which things are in front of the camera", "give a short description of the street",
            "what can be seen from the car", "explain what happens on the road", "tell me what you see")
DESCRIBE_AT = ("what is {at}", "what do you see {at}", "tell me what is {at}", "describe what is {at}",
               "which things are {at}", "{at} , what do you see", "list all objects {at}", "what can be seen {at}")
# Their answers bind every kind of object to its places, whatever the questions leave out: without them, new pairs of
# object and place cost 10 points more.
WHERE = ("where is the {n}", "where is {a}", "where do you see {a}", "tell me where {a} is",
         "in which place is the {n}", "where can {a} be seen")
# Never asked in training. Reasons and descriptions may still mention them: what is held out is the question. Each of
# their objects is still asked about at two places: with one alone, the word for the place would tell nothing, and
# training would teach to ignore it. Left without right would come back by a flip.
HELD_OUT = {("exists_at", "bus", "ahead"), ("exists_at", "motorcycle", "ahead"), ("and", "truck", "pedestrian"),
            ("or", "bus", "bicycle"), ("and_no", "car", "red light")}
PAIRED = ("car", "truck", "bus", "pedestrian", "bicycle", "motorcycle", "rider", "traffic sign")
LIGHTS = tuple(f"{colour} light" for colour in COLOURS)


class Question(namedtuple("Question", "template first second")):
    """One balance cell: template x object x place, for example ("exists_at", "car", "left").

    first: category, colour ("light"), side ("turn", "change", "clear") or ""; second: place or second object.
    """

    @property
    def family(self):
        if TEMPLATES[self.template].family:
            return TEMPLATES[self.template].family
        return "state" if self.second in LIGHTS else "detection"

    @property
    def level(self):
        return TEMPLATES[self.template].level

    @property
    def place(self):
        """left, ahead, right or "" """
        named = self.first if self.template in ("turn", "change", "clear") else self.second
        return named if named in PLACES else ""

    @property
    def objects(self):
        """Categories that the command names."""
        names = ["traffic light" if x in LIGHTS else x for x in (self.first, self.second)]
        return ("traffic light",) if self.template == "light" else tuple(n for n in names if n in CATEGORIES)

    @property
    def held_out(self):
        return tuple(self) in HELD_OUT

    def truth(self, view):
        """FALSE, UNSURE or TRUE, from the rules of the template."""
        template, first, second = self
        if template in ("exists", "near"):
            return view.exists(first, near=True if template == "near" else None)
        if template == "exists_at":
            return view.exists(first, second)
        if template == "light":
            return view.shows(first)
        if template in ("and", "and_no", "or"):
            a, b = _thing(view, first), _thing(view, second)
            return min(a, b) if template == "and" else max(a, b) if template == "or" else min(a, 2 - b)
        blocked = max(view.exists(None, place, near=True) for place in self.ways())
        if template in ("straight", "turn", "stop"):
            blocked = max(blocked, view.shows("red"), view.shows("yellow"))
        return blocked if template == "stop" else 2 - blocked

    def ways(self):
        """The places that must be free of near road users."""
        return {"straight": ("ahead",), "stop": ("ahead",), "turn": ("ahead", self.first)}.get(
            self.template, (self.first,))

    def reason(self, view):
        """Short true reason for the (certain) answer, made from the rule that gave it."""
        template, first, second = self
        yes = self.truth(view) == TRUE
        if template in ("exists", "near", "exists_at"):
            asked = dict(place=second or None, near=True if template == "near" else None)
            return positive(view, first, **asked) if yes else negative(view, first, **asked)
        if template == "light":
            return light_words(view)
        if template in ("and", "and_no", "or"):
            if yes != (template == "or"):   # both parts matter; else one part alone decides
                return _claim(view, first) + " and " + _claim(view, second)
            decides = TRUE if template == "or" else FALSE
            return _claim(view, first if _thing(view, first) == decides else second)
        causes = []
        if template in ("straight", "turn", "stop") and view.light in COLOURS:
            causes.append(light_words(view))
        blockers = [f"{article(NOUNS[o.category][0])} is near {AT[o.place]}" for place in self.ways()
                    for truth, o in view.matching(None, place, near=True) if truth == TRUE]
        if (template == "stop") == yes:     # something is in the way
            return " and ".join([c for c in causes if "green" not in c] + blockers[:1])
        return " and ".join(causes + ["nothing is near " + " or ".join(AT[place] for place in self.ways())])

    def words(self, rng, paraphrase=None):
        """The command in words; `paraphrase` an index into the template's, drawn from the trained ones by default."""
        forms = TEMPLATES[self.template].paraphrases
        form = forms[rng.randrange(len(forms) - 1) if paraphrase is None else paraphrase]
        fill = {"c": rng.choice(COLOUR_WORDS.get(self.first, ("",))), "d": self.first, "side": SIDE.get(self.first, "")}
        fill["at"] = rng.choice(PLACE_WORDS.get(self.second, ("",)))
        for name, a, n in ((self.first, "a", "n"), (self.second, "b", "m")):
            if name in NOUNS or name in LIGHTS:
                fill[n] = rng.choice(NOUNS[name]) if name in NOUNS else name
                fill[a] = article(fill[n])
        return form.format(**fill)


def _thing(view, name):
    return view.shows(name.split()[0]) if name in LIGHTS else view.exists(name)


def _claim(view, name):
    """What is true about `name`, which must be certain."""
    if name in LIGHTS:
        return light_words(view)
    return positive(view, name) if view.exists(name) == TRUE else negative(view, name)


def all_questions():
    """Every balance cell, in a fixed order."""
    cells = [Question("exists", c, "") for c in CATEGORIES] + [Question("near", c, "") for c in ROAD_USERS]
    cells += [Question("exists_at", c, place) for c in CATEGORIES for place in PLACES]
    cells += [Question("light", c, "") for c in COLOURS] + [Question("straight", "", ""), Question("stop", "", "")]
    cells += [Question(t, side, "") for t in ("turn", "change") for side in ("left", "right")]
    cells += [Question("clear", place, "") for place in PLACES]
    for i, a in enumerate(PAIRED):
        for b in PAIRED[i + 1:] + LIGHTS:
            cells += [Question("and", a, b), Question("or", a, b), Question("and_no", a, b)]
        cells += [Question("and_no", a, b) for b in PAIRED[:i]]
    return cells


QUESTIONS = all_questions()


def truths(view):
    """Truth of every question of QUESTIONS: (len(QUESTIONS),) int8."""
    return np.array([q.truth(view) for q in QUESTIONS], dtype=np.int8)


def vocabulary():
    """Every word that a command, a reason or a description can hold, sorted."""
    texts = [form for t in TEMPLATES.values() for form in t.paraphrases] + list(DESCRIBE + DESCRIBE_AT + WHERE)
    for group in (NOUNS, COLOUR_WORDS, PLACE_WORDS):
        texts += [word for words in group.values() for word in words]
    texts += list(SIDE.values()) + list(COLOURS) + list(PLACES)
    texts += ["a an no one is and or , : ? near far on the left right ahead in view nothing light the"]
    return sorted({word for text in texts for word in re.sub(r"\{\w+\}", " ", text).split()})


# ---- reading a reason back ----

_NOUN = "|".join(sorted({NOUNS[c][0] for c in CATEGORIES} | set(LIGHTS), key=len, reverse=True))
_WHERE = r"(?: (near|far))?(?: (on the left|ahead|on the right|in view))?"
_CLAUSE = re.compile(rf"(?:an?|(no)) ({_NOUN}|light)(?: is)?{_WHERE}|(one) is{_WHERE}")
_AT = r"(?:on the left|ahead|on the right)"
_NOTHING = re.compile(rf"nothing(?: is)? (?:in view|({_AT})|near ({_AT}(?: or {_AT})*))")
_LIGHT = re.compile(r"the light is (red|yellow|green)")
_CATEGORY = {NOUNS[c][0]: c for c in CATEGORIES}
_PLACE = {AT[p]: p for p in PLACES}


def check_reason(reason, view):
    """Truth of a reason or description by the rules: its worst clause. None if it is not in the grammar.

    Used on what the model generates as much as on what this file writes.
    """
    worst, subject = TRUE, None
    for clause in re.split(r" and | , ", reason):
        light, nothing, claim = _LIGHT.fullmatch(clause), _NOTHING.fullmatch(clause), _CLAUSE.fullmatch(clause)
        if light:
            truth = view.shows(light.group(1))
        elif nothing:
            place, places = nothing.groups()
            if places:
                truth = min(2 - view.exists(None, _PLACE[p], near=True) for p in places.split(" or "))
            else:
                there = [o for o in view.objects if o.certain == TRUE and place in (None, AT.get(o.place))]
                truth = FALSE if there else TRUE
        elif claim:
            no, noun, near, where, one, near_one, where_one = claim.groups()
            if one and subject is None:
                return None
            subject = subject if one else noun
            near, where = (near_one, where_one) if one else (near, where)
            near, place = {"near": True, "far": False}.get(near), _PLACE.get(where)
            if subject in ("light", *LIGHTS):
                colours = COLOURS + ("none",) if subject == "light" else (subject.split()[0],)
                truth = max((t for t, o in view.matching("traffic light", place, near) if o.colour in colours),
                            default=FALSE)
            else:
                truth = view.exists(_CATEGORY[subject], place, near)
            truth = 2 - truth if no else truth
        else:
            return None
        worst = min(worst, truth)
    return worst


# ---- choosing commands ----

def choose(table, cfg, rng, shares=None):
    """Pick (picture, question) pairs so that answers give nothing away.

    table: (pictures, questions) int8 truths of one split; cfg.commands_stored pairs a picture at most, half of them
    YES; rng: numpy Generator. shares: {question index: share of all commands}, by default from TEMPLATES, held-out
    questions excluded. For every question the same number of YES and NO is taken, so the question alone tells
    nothing; among possible pictures those with too few commands of that answer come first, so that pictures end up
    half YES too and the picture alone tells nothing. Returns (pictures, questions) index arrays.
    """
    pictures, half = len(table), cfg.commands_stored // 2
    if shares is None:
        cells = [q for q, question in enumerate(QUESTIONS) if not question.held_out]
        number = {t: sum(QUESTIONS[q].template == t for q in cells if _possible(table[:, q])) for t in TEMPLATES}
        shares = {q: TEMPLATES[QUESTIONS[q].template].share / max(number[QUESTIONS[q].template], 1) for q in cells}
    load = {FALSE: np.zeros(pictures, int), TRUE: np.zeros(pictures, int)}
    picked = []
    order = sorted(shares, key=lambda q: min((table[:, q] == TRUE).sum(), (table[:, q] == FALSE).sum()))
    for q in order:
        rows = {a: np.flatnonzero((table[:, q] == a) & (load[a] < half)) for a in (FALSE, TRUE)}
        n = min(len(rows[FALSE]), len(rows[TRUE]), int(np.ceil(shares[q] * cfg.commands_stored * pictures / 2)))
        if n < cfg.min_cell:
            continue
        for answer in (TRUE, FALSE):
            surplus = load[answer][rows[answer]] - load[2 - answer][rows[answer]]
            first = np.lexsort((rng.random(len(surplus)), load[answer][rows[answer]], surplus))[:n]
            chosen = rows[answer][first]
            load[answer][chosen] += 1
            picked.append(np.stack([chosen, np.full(n, q)], 1))
    pairs = np.concatenate(picked) if picked else np.zeros((0, 2), int)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[:, 0], pairs[:, 1]


def _possible(column):
    return (column == TRUE).any() and (column == FALSE).any()


def balance(items):
    """{(template, first, second): (YES, NO)} counted on finished items (dicts with these keys and `answer`)."""
    counts = {}
    for item in items:
        if item["answer"] is not None:
            key = (item["template"], item["first"], item["second"])
            yes, no = counts.get(key, (0, 0))
            counts[key] = (yes + item["answer"], no + (not item["answer"]))
    return counts


def make_item(picture, question, view, rng, paraphrase=None):
    """One finished command as a plain dict."""
    return dict(picture=int(picture), template=question.template, first=question.first, second=question.second,
                family=question.family, level=question.level, place=question.place,
                command=question.words(rng, paraphrase), answer=question.truth(view) == TRUE,
                reason=question.reason(view))


def describe_item(picture, view, rng, cfg, place=""):
    """"describe the scene", or what is at `place`, as a finished command; it has no verdict."""
    form = rng.choice((DESCRIBE_AT if place else DESCRIBE)[:-1])
    return dict(picture=int(picture), template="describe_at" if place else "describe", first=place, second="",
                family="describe", level="describe", place=place,
                command=form.format(at=rng.choice(PLACE_WORDS.get(place, ("",)))), answer=None,
                reason=describe(view, cfg.max_describe, place or None))


def where_items(picture, view, rng):
    """"where is the bus", for up to two kinds that are certainly there and one of any; without a verdict either."""
    there = [c for c in CATEGORIES if view.exists(c) == TRUE]
    items = []
    for category in dict.fromkeys(rng.sample(there, min(2, len(there))) + rng.sample(CATEGORIES, 1)):
        truth, noun = view.exists(category), rng.choice(NOUNS[category])
        if truth != UNSURE:
            items.append(dict(picture=int(picture), template="where", first=category, second="", family="describe",
                              level="describe", place="", answer=None,
                              command=rng.choice(WHERE[:-1]).format(n=noun, a=article(noun)),
                              reason=(positive if truth == TRUE else negative)(view, category)))
    return items


def main(cfg):
    from prepare import sample_scene, scene_frame   # prepare.py builds on this file; only the demonstration looks back
    rng, shown = random.Random(cfg.seed), {}
    for name in range(60):
        view = View(scene_frame(sample_scene(f"example-{name}", cfg), cfg), cfg)
        for question in rng.sample(QUESTIONS, len(QUESTIONS)):
            if question.truth(view) != UNSURE and shown.setdefault((question.template, question.truth(view)), 0) < 1:
                shown[question.template, question.truth(view)] += 1
                item = make_item(name, question, view, rng)
                print(f"scene:   {describe(view, 9)}\n{item['family']:>10} / {item['template']}: {item['command']}?\n"
                      f"{'':>10}   [{'YES' if item['answer'] else 'NO'}] {item['reason']}\n")
    print(f"vocabulary: {len(vocabulary())} words and 6 special tokens; {len(QUESTIONS)} questions")


if __name__ == "__main__":
    config.run(main, __doc__)
