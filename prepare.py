"""Pictures and boxes: street scenes drawn here, or a BDD100K folder, turned into the files that training reads.

- A scene is a spec: a plain dict of camera, road, weather and objects. Drawing it gives a picture, and the spec gives
  labels in the format of BDD100K.
- A twin is an edited spec drawn again: every pixel that the edit does not touch stays the same.
- BDD100K: label files of both releases are read in a stream into one form of record. What is broken is counted,
  listed by name, and skipped.
- Writes to data_dir: images.bin (N, h, w, 3) raw uint8, frames.jsonl (one record a line), and for each split
  commands_SPLIT.jsonl (readable), tokens_SPLIT.npy and index_SPLIT.npy (what training reads); twins.jsonl, vocab.json,
  meta.json, report.png, and rejected.csv (name, lost, kind, reason: every frame or label that could not be used).
- A run that fails or is refused leaves the data of an earlier run as they were.

    python prepare.py
    python prepare.py --source=bdd100k --bdd_dir=/path/to/bdd100k

Units: metres for the scene (x right, y up, z ahead of the camera), pixels for boxes.
"""
import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import sys
import textwrap
import threading
import time
import zlib
from array import array
from collections import Counter, defaultdict, namedtuple
from functools import cache
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

import commands
import config
from commands import COLOURS, EDGES, PLACES, QUESTIONS, TRUE, UNSURE, Question, View, corners
from config import UserError
from tokenizer import Tokenizer

MAGIC = "traffic-vlm-data"
VERSION = 3
# ood (out of distribution): drawn scenes of a weather or time that the others do not have.
SPLITS = ("train", "val", "test", "ood")
# Held-out sets test language (a paraphrase that is never trained on) and composition (questions that are not).
SETS = ("train", "val", "test", "test_words", "test_combos", "ood")
WEATHERS = ("clear", "overcast", "rainy", "foggy", "snowy")
TIMES = ("daytime", "dawn/dusk", "night")
SCENES = ("city street", "highway", "residential")
DRAWN_VALUES = dict(weather=WEATHERS, timeofday=TIMES, scene=SCENES)
BDD_VALUES = dict(weather=(*WEATHERS, "partly cloudy", "undefined"), timeofday=(*TIMES, "undefined"),
                  scene=(*SCENES, "parking lot", "tunnel", "gas stations", "undefined"))

# ---- scenes: sampling ----

Kind = namedtuple("Kind", "width height length chance stands categories heights", defaults=(None,))
# width, height: in metres, seen from behind; length: along its way, None for what looks alike from all sides
# chance: to be in a scene; stands: where it may be, see sample_object and strips; categories: of its labels
# heights: range of the lower edge above the road, for what hangs
# People, signal heads and signs are drawn broader than life, so that they are recognised in small pictures.
VEHICLE = ("ours", "ours", "oncoming", "parked", "crossing")
TWO_WHEELS = ("pavement", "ours", "oncoming", "crossing")
KINDS = {
    "car": Kind(1.8, 1.5, 4.2, 0.55, VEHICLE, ("car",)),
    "truck": Kind(2.5, 3.1, 6.0, 0.33, VEHICLE, ("truck",)),
    "bus": Kind(2.6, 3.2, 7.5, 0.33, VEHICLE, ("bus",)),
    "pedestrian": Kind(0.8, 1.75, None, 0.45, ("pavement", "crossing", "ours"), ("pedestrian",)),
    "bicycle": Kind(0.8, 1.1, 1.75, 0.28, TWO_WHEELS, ("bicycle",)),
    "motorcycle": Kind(0.9, 1.25, 2.0, 0.28, TWO_WHEELS, ("motorcycle",)),
    "cyclist": Kind(0.8, 1.8, 1.75, 0.18, TWO_WHEELS, ("rider", "bicycle")),
    "motorcyclist": Kind(0.9, 1.75, 2.0, 0.14, TWO_WHEELS, ("rider", "motorcycle")),
    "light": Kind(1.2, 1.6, None, 0.65, ("anywhere",), ("traffic light",), (2.6, 4.2)),
    "sign": Kind(1.2, 1.1, None, 0.42, ("kerb", "kerb", "anywhere"), ("traffic sign",), (1.9, 3.0)),
}
ACROSS = ("crossing", "pavement")      # where the camera sees the side of what stands there
FLANKED = ("car", "truck", "bus")      # seen from behind or from the front, these also show the side that is nearer


def colours(codes):
    """The colours of hexadecimal codes, separated by spaces."""
    return [ImageColor.getrgb(code) for code in codes.split()]


# Most vehicles are white, black, grey or silver.
PAINTS = colours("#e4e4e2 #ecece8 #1e1e22 #141416 #969aa0 #b0b2b6 #6e7278 #464a50 #2c3242 #1c2c64 #8c1c22 #bc2026 "
                 "#deb228 #28503c #968870 #5a82b4")
CLOTHES = colours("#18181c #282a32 #1e2846 #5a5c60 #3c322c #969696 #c8c8c8 #96282c #46648c #dcc83c")
# Few traffic lights are off, or seen from behind.
HEADS = 9 * COLOURS + ("none", "back")
SKINS = colours("#f4ceb2 #d6a078 #966446 #5c3c2c")
PAVING, VERGE, LAWN = colours("#96928c #708054 #68884c")
Scenery = namedtuple("Scenery", "ours oncoming parking ground houses heights")
# ours, oncoming: how many lanes; parking: width of the row of parked cars on each side, in metres; ground: its colour;
# houses: how often a plot has one; heights: range of theirs in metres
SCENERY = {
    "city street": Scenery((2, 3), (0, 1, 2), 2.3, PAVING, 0.9, (6, 30)),
    "highway": Scenery((3, 4), (0,), 0.0, VERGE, 0.12, (4, 9)),
    "residential": Scenery((1,), (1,), 2.3, LAWN, 0.6, (4, 8)),
}
LANE = 3.4             # width of a lane in metres


def filters_of(cfg, known):
    """{name: list of values that its filter keeps, empty for all}. Raises UserError for a value not in `known`."""
    return {name: config.listed(getattr(cfg, name), values, f"no {cfg.source} scene has {name}")
            for name, values in known.items()}


def sample_scene(name, cfg):
    """The spec of the scene called `name`: a plain dict, the same for the same name and cfg.scene_seed.

    Names that begin with "ood" get a weather or time outside the filters, all others one inside.
    """
    # The order of all draws from rng, here and for the objects, is fixed: a new draw in between changes every scene.
    rng = random.Random(f"{name} {cfg.scene_seed}")
    kept = {name: [value for value in DRAWN_VALUES[name] if value in values or not values]
            for name, values in filters_of(cfg, DRAWN_VALUES).items()}
    inside = list(itertools.product(kept["weather"], kept["timeofday"]))
    outside = [pair for pair in itertools.product(WEATHERS, TIMES) if pair not in inside]
    # Where the filters keep everything, nothing is outside, and the scenes of both sets are alike.
    weather, timeofday = rng.choice(outside if outside and name.startswith("ood") else inside)
    scene = rng.choice(kept["scene"])
    about = SCENERY[scene]
    ours = rng.choice(about.ours)
    oncoming = rng.choice(about.oncoming)
    lane = rng.randrange(ours)                                   # the camera's, counted from the yellow line
    spec = dict(
        name=name,
        seed=rng.randrange(2**31),
        weather=weather,
        timeofday=timeofday,
        scene=scene,
        # The camera is fitted to the labels of 10,000 frames of BDD100K: there, the lower edge of a car's box lies at
        # 0.476 + 1.08 times its width, in shares of the picture.
        focal=rng.uniform(0.95, 1.15),                           # in picture widths
        horizon=rng.uniform(0.44, 0.51),                         # in picture heights from the top
        centre=rng.uniform(0.45, 0.55),                          # where "straight ahead" is, in picture widths
        height=rng.uniform(1.1, 1.4),                            # of the camera
        bonnet=max(0.0, rng.uniform(-0.08, 0.18)),               # of the camera's car, in picture heights; 0 = unseen
        left=-LANE * (lane + 0.5 + oncoming) - about.parking,    # x of the edges of the road; the camera's is 0
        yellow=-LANE * (lane + 0.5),                             # x of the line between the lanes of both directions
        right=LANE * (ours - lane - 0.5) + about.parking,
        crosswalk=rng.choice((0, 0, rng.uniform(5, 16))),        # its distance; 0 = there is none
        junction=rng.choice((0, rng.uniform(5, 25))),            # distance of a road that crosses; 0 = there is none
        sun=rng.choice((-1, 1)) * rng.uniform(0.2, 0.6),         # how far shadows lean, in widths of the object
        noise=rng.uniform(0, 4),                                 # standard deviation, in grey levels of 255
        blur=rng.choice((0, rng.uniform(0, 1.0))),               # in pixels
        gain=rng.uniform(0.8, 1.25),                             # exposure of the camera
        gamma=rng.uniform(0.75, 1.7),                            # its contrast: above 1, dark things are darker
        tint=[rng.uniform(0.75, 1.1), rng.uniform(0.88, 1.1), rng.uniform(0.82, 1.15)],
        shade=rng.uniform(0.0, 0.7),                             # how uneven the light is
        objects=[])
    # In picture heights: a dashcam's frame is 16:9.
    spec["focal_y"] = 16 / 9 * spec["focal"]
    sample_objects(rng, spec, cfg)
    return spec


def sample_objects(rng, spec, cfg):
    """Put objects of every kind into a scene that has none."""
    colour = rng.choice(COLOURS)
    for kind, about in KINDS.items():
        # Up to two of a kind: two tries, the second with less chance.
        copies = (rng.random() < about.chance) + (rng.random() < about.chance * 0.3)
        for _ in range(copies):
            o = sample_object(rng, spec, kind, cfg)
            if o is None:
                continue
            # Most heads of one crossing agree. Where they do not, questions about the light are dropped.
            if o["colour"] in COLOURS and rng.random() < 0.95:
                o["colour"] = colour
            spec["objects"].append(o)
    # Traffic farther away: in most streets there are many cars, and most of them are too small to count.
    for _ in range(rng.choice((0, 0, 3, 6, 9))):
        o = sample_object(rng, spec, "car", cfg, distances=(12, 70))
        if o:
            spec["objects"].append(o)


def strips(spec, where):
    """[(least x, largest x, facing)]: the strips along the street where an object may stand that is `where`.

    Traffic keeps to the right: seen from behind on our side of the yellow line, from the front on the other side.
    """
    left, right = spec["left"], spec["right"]
    oncoming, ours = lanes(spec)
    parked = [(left + 1.1, left + 1.3, "front"), (right - 1.3, right - 1.1, "rear")]
    # Across the whole street: at a crossing, or hung over the road
    across = [(left - 3, right + 3, "side")]
    return {
        "ours": [(x - 0.4, x + 0.4, "rear") for x in ours],
        "oncoming": [(x - 0.4, x + 0.4, "front") for x in oncoming],
        "parked": parked if SCENERY[spec["scene"]].parking else [],
        "pavement": [(left - 2.6, left - 0.5, "side"), (right + 0.5, right + 2.6, "side")],
        "kerb": [(left - 1.2, left - 0.7, "front"), (right + 0.7, right + 1.2, "front")],
    }.get(where, across)


def lanes(spec):
    """The middles of the lanes (x) on the other side of the yellow line, and those on ours, from left to right."""
    parking = SCENERY[spec["scene"]].parking
    sides = (spec["left"] + parking, spec["yellow"]), (spec["yellow"], spec["right"] - parking)
    return [[x1 + LANE * (i + 0.5) for i in range(round((x2 - x1) / LANE))] for x1, x2 in sides]


def size_of(cfg):
    """(width, height) of the stored pictures."""
    return cfg.image_width, cfg.image_height


def reaches(spec, about, scale, where, cfg):
    """(z_near, z_far, z_seen): an object of this kind is near up to z_near, far from z_far, and too small from z_seen.

    scale: its size as a share of the usual one; where: see strips.
    """
    height = spec["focal_y"] * about.height * scale              # at a distance of 1 metre, as the next two
    width = spec["focal"] * (about.length if about.length and where in ACROSS else about.width) * scale
    if len(about.categories) == 2:
        width *= 0.64                                            # of the rider, who hides a part of the vehicle
    camera = spec["focal_y"] * spec["height"]
    pixels = cfg.min_pixels * max(commands.DETAIL.get(category, 1) for category in about.categories)
    z_seen = min(cfg.image_width * width, cfg.image_height * height) / pixels
    z_near, z_far = height / cfg.near_height, height / cfg.far_height
    if about.heights:
        return z_near, z_far, z_seen
    # No part of the road is above the horizon, wherever the lines are.
    near, far = (camera / max(line - spec["horizon"], 0.01) for line in (cfg.near_line, cfg.far_line))
    return min(near, z_far), max(far, height / cfg.close_height), z_seen


def sample_object(rng, spec, kind, cfg, place="", near=None, distances=None):
    """A new object of `kind` that is clear of the others in `spec`, or None after a few tries.

    place, near: where it must stand by the rules of commands.py; sampled when not given. distances: the least and
    the largest, instead of those that follow from `near`.
    """
    about = KINDS[kind]
    # The boxes of the others are the same for every try.
    others = [(other, clipped(object_box(spec, other))) for other in spec["objects"]]
    for _ in range(12):
        scale = rng.uniform(0.9, 1.12)
        width = about.width * scale
        height = about.height * scale
        y = rng.uniform(*about.heights) if about.heights else 0.0
        where = rng.choice(about.stands)
        # Across the road: on a crosswalk, or on one of the two lanes of a road that crosses.
        z_cross = spec["crosswalk"] + 1 if kind == "pedestrian" else spec["junction"] + rng.choice((1.8, 5.2))
        if where == "crossing" and z_cross < 6:
            where = about.stands[0]
        z_near, z_far, z_seen = reaches(spec, about, scale, where, cfg)
        is_near = rng.random() < 0.42 if near is None else near
        # What is narrow is too small before it is certainly far.
        low, high = (0.62 * z_near, z_near) if is_near else (min(z_far, 0.8 * z_seen), 0.95 * z_seen)
        if about.heights:
            # Nearer than that, what hangs is above the picture.
            low, high = max(low, 6.0), max(high, 7.0)
        low, high = distances or (low, max(low, min(high, 30.0)))
        # Apparent size goes with 1 / z: even in the logarithm of z, large and small ones are equally frequent.
        z = low * (high / low) ** rng.random()
        if where == "crossing":
            if near is not None and near != (z_cross < z_near):
                continue
            z = z_cross
        # Its place in the picture is drawn first, then one of the strips that lie there.
        third = PLACES.index(place or rng.choice(PLACES))
        # Vehicles may be cut by the edges of the picture, what is narrow is not.
        beyond = (0.5 if about.length else -0.5) * width * spec["focal"] / z
        borders = (0.02 - beyond, 1 / 3, 2 / 3, 0.98 + beyond)
        least, largest = ((u - spec["centre"]) * z / spec["focal"] for u in borders[third:third + 2])
        there = [(max(least, a), min(largest, b), facing) for a, b, facing in strips(spec, where)
                 if a < largest and b > least]
        if not there:
            continue
        # A head whose lamps are cut off by the upper edge of the picture could not be read.
        if about.heights and project(spec, 0, y + height, z)[1] < 0:
            continue
        x1, x2, facing = rng.choice(there)
        x = rng.uniform(x1, x2)
        colour = rng.choice(HEADS if kind == "light" else PAINTS)
        look = rng.randrange(2**31)
        # Across the road it shows its length; along the road that matters where its flank is drawn too.
        depth = 0.0
        if facing == "side" and about.length:
            width = about.length * scale
        elif kind in FLANKED:
            depth = about.length * scale
        o = dict(kind=kind, x=x, y=y, z=z, w=width, h=height, d=depth, facing=facing, colour=colour, look=look)
        if is_clear(o, clipped(object_box(spec, o)), others):
            return o
    return None


def is_clear(o, own, others):
    """Whether o, whose box is `own`, stands in none of others, and neither hides half of the other.

    others: [(object, its box)].
    """
    for other, box in others:
        across = abs(o["x"] - other["x"]) <= (o["w"] + other["w"]) / 2
        along = o["z"] < other["z"] + other["d"] + 1.2 and other["z"] < o["z"] + o["d"] + 1.2
        if across and along and (o["y"] > 0) == (other["y"] > 0):
            return False
        width = min(own[2], box[2]) - max(own[0], box[0])
        height = min(own[3], box[3]) - max(own[1], box[1])
        if min(width, height) > 0 and width * height >= 0.5 * min(area(own), area(box)):
            return False
    return True


def project(spec, x, y, z):
    """Picture coordinates in [0, 1] of the point (x, y, z): pinhole camera at spec["height"] looking ahead."""
    return spec["centre"] + spec["focal"] * x / z, spec["horizon"] + spec["focal_y"] * (spec["height"] - y) / z


def faces(spec, o):
    """The boxes (x1, y1, x2, y2) of the near and the far face of an object, in shares of the picture, not clipped."""
    boxes = []
    for z in (o["z"], o["z"] + o["d"]):
        x1, y2 = project(spec, o["x"] - o["w"] / 2, o["y"], z)
        x2, y1 = project(spec, o["x"] + o["w"] / 2, o["y"] + o["h"], z)
        boxes.append((x1, y1, x2, y2))
    return boxes


def object_box(spec, o):
    """(x1, y1, x2, y2) of both faces of an object together."""
    lefts, tops, rights, bottoms = zip(*faces(spec, o))
    return min(lefts), min(tops), max(rights), max(bottoms)


def clipped(box, width=1.0, height=1.0):
    """A box cut at the borders of a picture of this size."""
    return [min(max(v, 0.0), side) for v, side in zip(box, 2 * (width, height))]


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def part_boxes(o, box):
    """[(category, box)]: a cyclist is a rider and a bicycle, everything else is one thing."""
    categories = KINDS[o["kind"]].categories
    if len(categories) == 1:
        return [(categories[0], box)]
    x1, y1, x2, y2 = box
    inset = 0.18 * (x2 - x1) if o["facing"] == "side" else 0
    # The two boxes overlap, as they do in BDD100K.
    person = (x1 + inset, y1, x2 - inset, y1 + 0.9 * (y2 - y1))
    vehicle = (x1, y1 + 0.40 * (y2 - y1), x2, y2)
    return list(zip(categories, (person, vehicle)))


def scene_frame(spec, cfg):
    """The BDD100K-format record of a spec, boxes in pixels of the drawn picture; finish() adds what it lacks."""
    size = size_of(cfg)
    labels = []
    for o in sorted(spec["objects"], key=lambda o: -o["z"]):
        for category, box in part_boxes(o, object_box(spec, o)):
            inside = clipped(box, height=1 - spec["bonnet"])
            share = area(inside) / area(box)
            # No annotator would draw a box around what has nearly left the picture.
            x1, y1, x2, y2 = edges = [round(v * side, 2) for v, side in zip(inside, 2 * size)]
            if share < 0.15 or min(x2 - x1, y2 - y1) < 2:
                continue
            # The colour of a lit lamp has a name, a paint is three numbers.
            colour = o["colour"] if o["colour"] in COLOURS else "none"
            attributes = dict(trafficLightColor=colour, truncated=share < 0.95)
            labels.append(dict(category=category, box2d=dict(zip(EDGES, edges)), attributes=attributes))
    return dict(name=spec["name"] + ".png", labels=labels, attributes={name: spec[name] for name in DRAWN_VALUES})


# ---- scenes: drawing ----

class Brush:
    """ImageDraw in shares of the picture or of a box, in the light of the hour and with haze by distance.

    panel and ground draw in metres, what stands upright and what lies on the ground.
    """

    def __init__(self, image, spec):
        self.draw = ImageDraw.Draw(image)
        self.haze_draw = ImageDraw.Draw(image, "RGBA")           # mixes its colours with what is there
        self.width, self.height = image.size
        self.spec = spec
        self.light, self.air = HOURS[spec["timeofday"]]
        if spec["weather"] != "clear":
            self.air = [air * part for air, part in zip(AIR, self.light)]
        self.within()

    def within(self, box=(0.0, 0.0, 1.0, 1.0), z=0.0):
        """Draw in shares of `box` from now on, with the haze of distance z; by default the whole picture, without."""
        x1, y1, x2, y2 = box
        self.between((x1, y1, y2), (x2, y1, y2), z)

    def between(self, start, end, z):
        """Draw in shares of what lies between two verticals, each (x, top, bottom), with the haze of distance z."""
        self.start, self.end = start, end
        self.far(z)

    def mirrored(self):
        """A loop of two turns: what is drawn in the second is the mirror image of what is drawn in the first."""
        for _ in range(2):
            yield
            self.start, self.end = self.end, self.start

    def far(self, z):
        # Beer-Lambert: light from behind more air is replaced by the air's own.
        self.blend = 1 - math.exp(-HAZE[self.spec["weather"]] * z)

    def points(self, points):
        found = []
        for u, v in points:
            x, top, bottom = [a + u * (b - a) for a, b in zip(self.start, self.end)]
            found.append((x * self.width, (top + v * (bottom - top)) * self.height))
        return found

    def tint(self, colour, shade):
        # Lamps and lit windows shine by themselves, whatever the hour.
        light = FULL_LIGHT if tuple(colour) in SHINING else self.light
        clear = shade * (1 - self.blend)
        return tuple([int(c * part * clear + air * self.blend) for c, part, air in zip(colour, light, self.air)])

    def fade(self, v1, v2, z):
        """Cover the rows from v1 to v2 of the picture with the haze of distance z."""
        self.far(z)
        air = (*map(int, self.air), int(255 * self.blend))
        top, bottom = round(v1 * self.height), round(v2 * self.height)
        if top < bottom:
            self.haze_draw.rectangle((0, top, self.width, bottom - 1), air)

    def poly(self, points, colour, shade=1.0):
        self.draw.polygon(self.points(points), self.tint(colour, shade))

    def rect(self, u1, v1, u2, v2, colour, shade=1.0):
        self.trapezoid((u1, u2, v1), (u1, u2, v2), colour, shade)

    def band(self, v1, v2, colour, shade=1.0):
        """A rectangle from side to side."""
        self.rect(0, v1, 1, v2, colour, shade)

    def trapezoid(self, upper, lower, colour, shade=1.0):
        """A shape between two level edges, each (left, right, height)."""
        (a, b, top), (c, d, bottom) = upper, lower
        self.poly([(a, top), (b, top), (d, bottom), (c, bottom)], colour, shade)

    def oval(self, u1, v1, u2, v2, colour, shade=1.0, ring=0):
        """ring: draw the outline alone, this wide, as a share of the height."""
        (x1, y1), (x2, y2) = self.points([(u1, v1), (u2, v2)])
        x1, x2 = sorted((x1, x2))
        y1, y2 = sorted((y1, y2))
        tint = self.tint(colour, shade)
        self.draw.ellipse((x1, y1, x2, y2), None if ring else tint, tint, max(1, round(ring * (y2 - y1))))

    def line(self, points, colour, width, shade=1.0):
        """A line through all points; width: as a share of the box's height."""
        _, top, bottom = self.start
        thick = max(1, round(width * (bottom - top) * self.height))
        self.draw.line(self.points(points), self.tint(colour, shade), thick)

    def panel(self, xs, low, high, zs, colour, shade=1.0):
        """An upright rectangle from low to high between two verticals, each with its x and z."""
        (u1, _), (u2, _) = lower = [project(self.spec, x, low, z) for x, z in zip(xs, zs)]
        # What lies outside the picture or is narrower than a pixel is not drawn.
        if max(u1, u2) < 0 or min(u1, u2) > 1 or abs(u1 - u2) < 1 / self.width:
            return
        self.far(sum(zs) / 2)
        upper = [project(self.spec, x, high, z) for x, z in zip(xs, zs)]
        self.poly(lower + upper[::-1], colour, shade)

    def ground(self, x1, x2, z1, z2, colour):
        """A rectangle on the ground, between x1 and x2 and between the distances z1 and z2."""
        self.poly([project(self.spec, x, 0, z) for x, z in ((x1, z1), (x2, z1), (x2, z2), (x1, z2))], colour)


FULL_LIGHT = (1.0, 1.0, 1.0)
AIR, DUSK_AIR, NIGHT_AIR = colours("#ced4da #de9668 #262632")
# What each hour leaves of red, green and blue, and the colour of a clear sky at the horizon.
HOURS = {
    "daytime": (FULL_LIGHT, AIR),
    "dawn/dusk": ((0.62, 0.52, 0.54), DUSK_AIR),
    "night": ((0.24, 0.25, 0.33), NIGHT_AIR),
}
# How fast things vanish with distance, for each metre.
HAZE = {"clear": 0.002, "overcast": 0.004, "rainy": 0.015, "foggy": 0.07, "snowy": 0.02}
DARK, GLASS, TYRE, METAL, WHITE = colours("#18181c #262e38 #161618 #787a7e #f4f4f0")
RED_LAMP, WHITE_LAMP, SIGN_RED = colours("#eb281e #fffad6 #d01c24")
WALLS = colours("#b08c74 #a0a0a6 #c4b8a0 #826054 #cecec8 #6e7886")
# ROUTE: the sign of a bus that shows its route
WINDOW, LIT_WINDOW, ROUTE = colours("#465668 #face78 #ffb028")
PAINT, YELLOW, KERB, PAVEMENT = colours("#e8e8e4 #e6be3c #8a8682 #aaa6a0")
SNOW, SHADOW, TRUNK, SIGN_YELLOW = colours("#e8eaee #3a3a3e #5c4632 #f6be1e")
HOUSING, BACK, UNLIT = colours("#0e0e10 #424446 #302e2e")        # of a traffic light
LAMPS = dict(zip(COLOURS, colours("#ff241e #ffc814 #1eeb6e")))
SHINING = {RED_LAMP, WHITE_LAMP, LIT_WINDOW, ROUTE, *LAMPS.values()}
SKIES = {"clear": colours("#3c78cd #609ce2 #78aae6 #becede"), "overcast": colours("#b0b4ba"),
         "rainy": colours("#787e86"), "foggy": [AIR], "snowy": colours("#bec2c8")}
CROWNS = colours("#346a30 #4c8036 #285638")
HAIRS = colours("#281c14 #5a3c1e #b4965a #141414")
ASPHALTS = colours("#5c5c60 #6c6a68 #4e5056")

# Each draw function gets a Brush that is within the object's box, the object, and the object's own generator. Nothing
# is drawn that would be smaller than a pixel at 128 x 128 for most objects.


def lamp_of(o):
    return RED_LAMP if o["facing"] == "rear" else WHITE_LAMP


def lamps(b, o, top, bottom):
    """Both lamps of a vehicle seen from behind or from the front."""
    for _ in b.mirrored():
        b.rect(0.04, top, 0.20, bottom, lamp_of(o))


def tyres(b, top):
    """Both tyres of a vehicle seen from behind or from the front, down to the road."""
    for _ in b.mirrored():
        b.rect(0.04, top, 0.23, 1, TYRE)


def wheels(b, radius, top, centres):
    """Wheels of a vehicle seen from the side, down to the road; radius: as a share of the width."""
    rim = 0.3 * (1 - top)
    for u in centres:
        b.oval(u - radius, top, u + radius, 1, TYRE)
        b.oval(u - 0.4 * radius, top + rim, u + 0.4 * radius, 1 - rim, METAL)


def draw_car(b, o, rng):
    paint = o["colour"]
    cabin = rng.uniform(0.30, 0.42)                              # where the windows end
    if o["facing"] == "side":
        front = rng.uniform(0.14, 0.24)
        b.trapezoid((front + 0.06, 0.74, 0), (0.03 + front / 2, 0.92, cabin + 0.04), paint, 0.85)
        b.trapezoid((front + 0.09, 0.72, 0.07), (front, 0.84, cabin), GLASS)
        b.rect(0.48, 0, 0.52, cabin, paint, 0.85)
        b.band(cabin, 0.82, paint)
        b.band(0.70, 0.84, paint, 0.6)
        wheels(b, 0.10, 0.66, (0.20, 0.80))
        return
    roof = rng.uniform(0.06, 0.22)                               # how far the roof is from the sides: little on a van
    b.trapezoid((roof, 1 - roof, 0), (0.04, 0.96, cabin + 0.06), paint, 0.85)
    b.trapezoid((roof + 0.05, 0.95 - roof, 0.06), (0.13, 0.87, cabin), GLASS)
    b.band(cabin, 0.86, paint)
    tyres(b, 0.80)
    b.band(0.72, 0.88, paint, 0.5)
    b.rect(0.38, 0.64, 0.62, 0.73, WHITE, 0.8)                   # the plate
    lamps(b, o, cabin + 0.08, cabin + 0.22)


def draw_truck(b, o, rng):
    cargo = o["colour"]
    paint = rng.choice(PAINTS)                                   # of the cab
    if o["facing"] == "side":
        b.rect(0, 0, 0.74, 0.84, cargo)
        b.trapezoid((0.76, 0.92, 0.30), (0.76, 1, 0.56), paint)
        b.trapezoid((0.80, 0.91, 0.35), (0.80, 0.97, 0.56), GLASS)
        b.rect(0.76, 0.56, 1, 0.88, paint)
        b.band(0.82, 0.88, DARK)
        wheels(b, 0.065, 0.76, (0.12, 0.28, 0.86))
        return
    if o["facing"] == "rear":
        b.band(0, 0.84, cargo)
        b.rect(0.05, 0.04, 0.95, 0.78, cargo, 0.86)              # the doors
        b.band(0.82, 0.90, DARK)
        lamps(b, o, 0.81, 0.88)
    else:
        b.band(0, 0.45, cargo)
        b.rect(0.03, 0.26, 0.97, 0.90, paint)
        b.rect(0.09, 0.32, 0.91, 0.55, GLASS)
        b.rect(0.24, 0.62, 0.76, 0.80, DARK)
        lamps(b, o, 0.70, 0.79)
    tyres(b, 0.88)


def draw_bus(b, o, rng):
    paint = o["colour"]
    b.band(0, 0.90, paint)
    b.band(0.63, 0.70, WHITE)
    if o["facing"] == "side":
        for left in (0.02, 0.22, 0.42, 0.62, 0.82):
            b.rect(left, 0.16, left + 0.17, 0.50, GLASS, 1.25)
        b.rect(0.62, 0.04, 0.92, 0.12, ROUTE)
        wheels(b, 0.06, 0.78, (0.18, 0.80))
        return
    b.rect(0.14, 0.03, 0.86, 0.13, DARK)
    b.rect(0.20, 0.05, 0.80, 0.11, ROUTE)
    b.rect(0.06, 0.17, 0.94, 0.56, GLASS, 1.25)
    lamps(b, o, 0.75, 0.83)
    tyres(b, 0.88)


def draw_pedestrian(b, o, rng):
    shirt = o["colour"]
    legs = rng.choice(CLOTHES)
    skin = rng.choice(SKINS)
    step = rng.uniform(0.05, 0.24)
    for _ in b.mirrored():
        b.line([(0.5, 0.52), (0.5 - step * 1.4, 0.99)], legs, 0.075, 0.75)
        b.line([(0.24, 0.22), (0.05 + step / 2, 0.50)], shirt, 0.055, 0.85)
    b.trapezoid((0.24, 0.76, 0.20), (0.30, 0.70, 0.56), shirt)
    b.oval(0.31, 0, 0.69, 0.18, skin)
    b.oval(0.31, 0, 0.69, 0.10, rng.choice(HAIRS))


def draw_bicycle(b, o, rng):
    paint = o["colour"]
    if o["facing"] != "side":
        b.rect(0.42, 0.36, 0.58, 1, TYRE)
        for _ in b.mirrored():
            b.line([(0.34, 0.16), (0.46, 0.68)], paint, 0.05)
        b.line([(0.02, 0.14), (0.10, 0.07), (0.90, 0.07), (0.98, 0.14)], METAL, 0.05)
        b.oval(0.30, 0.08, 0.70, 0.22, DARK)                     # the saddle
        b.line([(0.18, 0.74), (0.82, 0.74)], METAL, 0.05)        # the pedals
        b.oval(0.36, 0.26, 0.64, 0.42, lamp_of(o))
        return
    hub = (0.19, 0.71)
    front = (0.81, 0.71)
    seat = (0.36, 0.18)
    head = (0.70, 0.14)
    crank = (0.48, 0.72)
    for _ in b.mirrored():
        b.oval(0, 0.42, 0.38, 1, TYRE, ring=0.10)
    b.line([front, head, seat, hub, crank, head], paint, 0.055)
    b.line([seat, crank], paint, 0.055)
    b.line([head, (0.68, 0.03), (0.80, 0.01)], DARK, 0.055)


def draw_motorcycle(b, o, rng):
    paint = o["colour"]
    if o["facing"] != "side":
        b.rect(0.34, 0.48, 0.66, 1, TYRE)
        b.line([(0.06, 0.16), (0.94, 0.16)], METAL, 0.06)
        for _ in b.mirrored():
            b.oval(0.0, 0.0, 0.22, 0.13, DARK)                   # a mirror
        b.trapezoid((0.20, 0.80, 0.20), (0.30, 0.70, 0.70), paint)
        b.rect(0.66, 0.66, 0.84, 0.80, METAL)                    # the exhaust
        b.oval(0.36, 0.28, 0.64, 0.46, lamp_of(o))
        return
    for _ in b.mirrored():
        b.oval(0, 0.48, 0.34, 1, TYRE, ring=0.24)
    b.trapezoid((0.20, 0.76, 0.26), (0.16, 0.84, 0.62), paint)
    b.rect(0.38, 0.60, 0.64, 0.86, METAL)
    b.rect(0.12, 0.22, 0.50, 0.34, DARK)
    b.line([(0.82, 0.72), (0.70, 0.04)], METAL, 0.06)


def draw_rider(b, o, rng):
    """A person on a bicycle or motorcycle, which fills the lower 60% of the box."""
    # The vehicle is drawn in its own part of the box, the person in all of it.
    whole, _ = faces(b.spec, o)
    category, lower = part_boxes(o, whole)[1]
    b.within(lower, o["z"])
    DRAW[category](b, o, rng)
    b.within(whole, o["z"])
    shirt = rng.choice(CLOTHES)
    legs = rng.choice(CLOTHES)
    helmet = rng.choice(PAINTS)
    skin = rng.choice(SKINS)
    if o["facing"] == "side":
        b.line([(0.40, 0.46), (0.56, 0.58), (0.48, 0.76)], legs, 0.085, 0.8)
        b.trapezoid((0.50, 0.68, 0.18), (0.30, 0.50, 0.50), shirt)
        b.line([(0.62, 0.22), (0.72, 0.44)], shirt, 0.055, 0.8)
        b.oval(0.52, 0, 0.74, 0.19, skin)
        b.oval(0.50, 0, 0.76, 0.10, helmet)
        return
    for _ in b.mirrored():
        b.line([(0.32, 0.50), (0.26, 0.76)], legs, 0.085, 0.8)
        b.line([(0.16, 0.20), (0.06, 0.44)], shirt, 0.055, 0.8)
    b.trapezoid((0.16, 0.84, 0.18), (0.30, 0.70, 0.54), shirt)
    b.oval(0.33, 0, 0.67, 0.19, skin)
    b.oval(0.31, 0, 0.69, 0.10, helmet)


def draw_light(b, o, rng):
    b.band(0, 1, HOUSING)
    if o["colour"] == "back":
        b.rect(0.12, 0.05, 0.88, 0.95, BACK)
        return
    for i, (colour, lit) in enumerate(LAMPS.items()):
        top = 0.04 + 0.32 * i
        b.oval(0.16, top, 0.84, top + 0.28, lit if o["colour"] == colour else UNLIT)


def draw_sign(b, o, rng):
    shape = rng.choice(("round", "triangle", "diamond"))
    if shape == "round":
        b.oval(0, 0, 1, 1, SIGN_RED)
        b.oval(0.16, 0.16, 0.84, 0.84, WHITE)
    elif shape == "triangle":
        b.trapezoid((0.5, 0.5, 0), (0, 1, 1), SIGN_RED)
        b.trapezoid((0.5, 0.5, 0.28), (0.20, 0.80, 0.88), WHITE)
    else:
        b.poly([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)], SIGN_YELLOW)


DRAW = {"car": draw_car, "truck": draw_truck, "bus": draw_bus, "pedestrian": draw_pedestrian, "bicycle": draw_bicycle,
        "motorcycle": draw_motorcycle, "cyclist": draw_rider, "motorcyclist": draw_rider, "light": draw_light,
        "sign": draw_sign}


def draw_background(b, spec, rng):
    """Sky, ground, road with its markings, pavements, buildings and trees."""
    scenery = SCENERY[spec["scene"]]
    horizon = spec["horizon"]
    zenith = rng.choice(SKIES[spec["weather"]])
    # The lower the sky, the more air is in front of it.
    for k in range(8):
        b.blend = k / 8
        b.band(horizon * k / 8, horizon * (k + 1) / 8, zenith)
    b.blend = 0.0
    b.band(horizon, 1, SNOW if spec["weather"] == "snowy" else scenery.ground, rng.uniform(0.9, 1.1))
    draw_road(b, spec, rng)
    # The far ground vanishes in the air, row by row.
    if spec["weather"] != "clear":
        rows = [(1 - horizon) * (k / 24) ** 2 for k in range(25)]
        for upper, lower in itertools.pairwise(rows):
            b.fade(horizon + upper, horizon + lower, spec["focal_y"] * spec["height"] / lower)
    kerb = {-1: spec["left"], 1: spec["right"]}
    for side in kerb:
        # Plots along each side of the road, each with a house, a tree or nothing.
        z = rng.uniform(45, 70)
        # Far to near, so that near ones cover far ones.
        while z > 5:
            depth = rng.uniform(6, 16)
            x = kerb[side] + side * rng.uniform(3, 6)
            if rng.random() < scenery.houses:
                draw_building(b, spec, rng, x, side, max(z - depth, 4.0), z)
            elif rng.random() < 0.6:
                draw_tree(b, spec, rng, x, max(z - depth / 2, 5.0))
            z -= depth + rng.uniform(0.5, 5)
    # Shop fronts, fences, posts and wires: what lies along a street, as patches of every brightness
    for _ in range(32):
        side = rng.choice((-1, 1))
        z = rng.uniform(8, 50)
        x = kerb[side] + side * rng.uniform(2.5, 5)
        low = rng.choice((0, 0, rng.uniform(0, 6)))
        tall = rng.uniform(0.5, 4)
        grey = rng.uniform(10, 200)
        colour = tuple(grey + rng.uniform(-30, 30) for _ in range(3))
        b.panel((x, x + rng.uniform(0, 1)), low, low + tall, (z, z + rng.uniform(0.3, 6)), colour)


def draw_road(b, spec, rng):
    highway = spec["scene"] == "highway"
    asphalt = rng.choice(ASPHALTS)
    if spec["weather"] == "snowy":
        asphalt = tuple(0.5 * c + 100 for c in asphalt)
    elif spec["weather"] == "rainy":
        asphalt = tuple(0.6 * c for c in asphalt)
    left, yellow, right = spec["left"], spec["yellow"], spec["right"]
    # The road covers the middle of this strip; what is left of it are the pavements.
    if not highway:
        b.ground(left - 3, right + 3, 2, 120, SNOW if spec["weather"] == "snowy" else PAVEMENT)
    if spec["junction"]:
        b.ground(-150, 150, spec["junction"], spec["junction"] + 7, asphalt)
    b.ground(left, right, 2, 200, asphalt)
    if spec["timeofday"] == "night":
        # What the headlights of the camera's car light up
        for reach, shade in ((30, 1.2), (24, 1.4), (18, 1.6), (13, 1.8)):
            b.poly([project(spec, x, 0, z) for x, z in ((-3, 3), (3, 3), (4, reach), (-4, reach))], asphalt, shade)
    for edge in (left, right):
        b.ground(edge - 0.12, edge + 0.12, 2, 120, PAINT if highway else KERB)
    b.ground(yellow - 0.1, yellow + 0.1, 2, 120, YELLOW)
    for middles in lanes(spec):
        for x in middles[1:]:
            for z in range(3, 28, 5):
                b.ground(x - LANE / 2 - 0.08, x - LANE / 2 + 0.08, z, z + 2.2, PAINT)
    if spec["crosswalk"]:
        for k in range(int((right - left) / 1.2)):
            x = left + 1.2 * k + 0.3
            b.ground(x, x + 0.6, spec["crosswalk"], spec["crosswalk"] + 2.5, PAINT)


def draw_flank(b, spec, o):
    """The side of a vehicle that the camera sees past its near face: none if the vehicle stands in the camera's way."""
    # The edge of both faces that is nearer to the camera's way
    edge = 0 if o["x"] > 0 else 2
    ends = [(face[edge], face[1], face[3]) for face in faces(spec, o)]
    if abs(o["x"]) < o["w"] / 2 or abs(ends[0][0] - ends[1][0]) * b.width < 2:
        return
    # A vehicle that is seen from the side looks to the right.
    if o["facing"] == "front":
        ends.reverse()
    b.between(*ends, o["z"] + o["d"] / 2)
    darker = tuple(0.75 * c for c in o["colour"])
    DRAW[o["kind"]](b, dict(o, facing="side", colour=darker), random.Random(o["look"]))


def draw_building(b, spec, rng, x, side, z1, z2):
    """A house at the side -1 or 1 of the road: its wall along the road at x, from z1 to z2, and its front at z1."""
    tall = rng.uniform(*SCENERY[spec["scene"]].heights)
    wall = rng.choice(WALLS)
    b.panel((x, x), 0, tall, (z1, z2), wall, 0.82)
    b.panel((x, x + side * 14), 0, tall, (z1, z1), wall)
    panes = [WINDOW, WINDOW if spec["timeofday"] == "daytime" else LIT_WINDOW]
    for low in range(1, int(tall) - 1, 3):
        # What is higher is above the picture.
        if low > spec["height"] + spec["horizon"] * z2 / spec["focal_y"]:
            break
        sill = low + 0.4
        lintel = low + 1.8
        for k in range(3):
            start = x + side * (1.2 + 3.2 * k)
            b.panel((start, start + side * 1.6), sill, lintel, (z1, z1), rng.choice(panes))
        # Farther along the road a window would be narrower than a pixel.
        z = z1 + 1
        while z + 1.2 < min(z2, 30):
            b.panel((x, x), sill, lintel, (z, z + 1.2), rng.choice(panes))
            z += 3


def draw_tree(b, spec, rng, x, z):
    b.far(z)
    u, v = project(spec, x, 0, z)
    metre = spec["focal"] / z                                    # in shares of the picture, as the next
    up = spec["focal_y"] / z
    crown = SNOW if spec["weather"] == "snowy" else rng.choice(CROWNS)
    b.rect(u - 0.15 * metre, v - 3 * up, u + 0.15 * metre, v, TRUNK)
    for _ in range(3):
        middle = u + rng.uniform(-1.2, 1.2) * metre
        height = v - rng.uniform(2.6, 6) * up
        r = rng.uniform(0.9, 2.2)
        b.oval(middle - r * metre, height - r * up, middle + r * metre, height + r * up, crown, rng.uniform(0.7, 1.15))


def draw_pole(b, spec, o):
    """The pole at the kerb that carries a light or a sign, with an arm over the road where it hangs there."""
    foot = o["x"] if o["x"] < spec["left"] else max(o["x"], spec["right"] + 0.5)
    middle = o["y"] + o["h"] / 2
    zs = (o["z"], o["z"])
    b.panel((foot - 0.07, foot + 0.07), 0, middle, zs, METAL, 0.7)
    b.panel((o["x"], foot), middle - 0.07, middle + 0.07, zs, METAL, 0.7)


def draw_bonnet(b, spec):
    """The bonnet of the camera's own car at the lower edge of the picture."""
    rng = random.Random(spec["seed"] + 1)
    b.within()
    top = 1 - spec["bonnet"]
    b.oval(-0.25, top, 1.25, 1 + 2.5 * spec["bonnet"], rng.choice(PAINTS), rng.uniform(0.05, 0.9))


def draw_scene(spec, size):
    """The picture of a spec: (height, width, 3) uint8, its size being (width, height).

    The background, each object and the noise draw from generators of their own (the spec's seed and each object's
    `look`), so editing one object leaves every other pixel as it was.
    """
    # Drawn at twice the size, then halved: that smooths the edges.
    image = Image.new("RGB", (size[0] * 2, size[1] * 2))
    b = Brush(image, spec)
    draw_background(b, spec, random.Random(spec["seed"]))
    sunny = spec["weather"] == "clear" and spec["timeofday"] == "daytime"
    for o in sorted(spec["objects"], key=lambda o: -o["z"]):
        box, _ = faces(spec, o)
        x1, _, x2, y2 = box
        width = x2 - x1
        b.within()
        # What hangs has a pole; what stands in the sun has a shadow.
        if o["y"] > 0:
            draw_pole(b, spec, o)
        elif sunny:
            lean = spec["sun"] * width
            flat = 0.10 * width + 0.01
            left = x1 + min(lean, 0) + 0.05 * width
            right = x2 + max(lean, 0) - 0.05 * width
            b.oval(left, y2 - flat, right, y2 + flat, SHADOW)
        if o["d"]:
            draw_flank(b, spec, o)
        b.within(box, o["z"])
        DRAW[o["kind"]](b, o, random.Random(o["look"]))
    if spec["bonnet"]:
        draw_bonnet(b, spec)
    image = image.reduce(2)
    if spec["timeofday"] != "daytime":
        # What shines has a halo: only what is bright, blurred, on top.
        bright = image.point([max(0, v - 150) * 2 for v in range(256)] * 3)
        image = ImageChops.add(image, bright.filter(ImageFilter.GaussianBlur(0.02 * size[1])))
    if spec["weather"] == "rainy":
        image = wet_road(image, spec)
    if spec["blur"]:
        image = image.filter(ImageFilter.BoxBlur(spec["blur"]))
    return develop(image, spec)


def wet_road(image, spec):
    """The picture with a faint, blurred mirror image of what is above the horizon on what is below it."""
    width, height = image.size
    horizon = round(spec["horizon"] * height)
    above = image.crop((0, 2 * horizon - height, width, horizon))   # black where it reaches above the picture
    mirror = ImageOps.flip(above).filter(ImageFilter.BoxBlur((1, 4)))
    road = image.crop((0, horizon, width, height))
    image.paste(Image.blend(road, mirror, 0.3), (0, horizon))
    return image


# Length of what falls in pixels (rain is streaks, snow is dots), and how bright it is by day.
FALLING = {"rainy": (5, 44), "snowy": (1, 110)}


@cache
def grain(width, height):
    """Noise for two pictures, drawn once: drawing it anew for every picture would take a third of the time."""
    return np.random.default_rng(0).standard_normal(2 * 3 * width * height, np.float32)


def develop(image, spec):
    """The picture as a dashcam takes it (height, width, 3) uint8: uneven light, rain or snow, contrast, tint and noise.

    All is fixed by the spec's seed, pixel by pixel, so that it does not depend on what was drawn.
    """
    rng = np.random.default_rng(spec["seed"])
    width, height = image.size
    # Contrast, tint and exposure of the camera, as what each level of each colour becomes
    gamma = spec["gamma"] if spec["timeofday"] == "daytime" else 1.0
    levels = np.linspace(0, 1, 256) ** gamma * 255 * spec["gain"]
    table = np.outer(spec["tint"], levels).ravel().clip(0, 255)
    picture = np.array(image.point(table.astype(int).tolist()), np.float32)
    # Light and shade, coarse and fine, as they lie on every surface; under clouds the light is more even.
    uneven = spec["shade"] if spec["weather"] == "clear" else 0.3 * spec["shade"]
    shade = np.ones((height, width), np.float32)
    for cells, strength in ((6, 0.3), (32, 0.2)):
        patches = rng.standard_normal((cells, cells), np.float32) * (strength * uneven) + 1
        shade *= np.asarray(Image.fromarray(patches).resize(image.size, Image.BILINEAR))
    picture *= shade[..., None]
    if spec["weather"] in FALLING:
        length, light = FALLING[spec["weather"]]
        drops = 2 * width
        ys = rng.integers(0, height, drops)
        xs = rng.integers(0, width, drops)
        for k in range(length):
            picture[(ys + k) % height, xs] += light * max(HOURS[spec["timeofday"]][0])
    start = rng.integers(picture.size)
    picture += spec["noise"] * grain(width, height)[start:start + picture.size].reshape(picture.shape)
    return picture.clip(0, 255, out=picture).astype(np.uint8)


# ---- twins ----


def apply_edit(spec, edit):
    """The spec after an edit {"remove": [indices], "add": [objects]}."""
    kept = [o for i, o in enumerate(spec["objects"]) if i not in edit["remove"]]
    return dict(spec, objects=kept + edit["add"])


def propose_edit(spec, question, rng, cfg):
    """An edit that removes, adds, moves or recolours one object that `question` is about; None if it does not work out.

    It does not where there is no such object or no free space.
    """
    objects = spec["objects"]
    # Questions about ways name no object: any road user may be in the way. No train is ever drawn.
    names = list(question.objects) or [c for c in commands.ROAD_USERS if c != "train"]
    if question.obeys_light():
        names.append("traffic light")
    category = rng.choice(names)
    kinds = [kind for kind, about in KINDS.items() if category in about.categories]
    about = [i for i, o in enumerate(objects) if o["kind"] in kinds]
    action = rng.choice(("remove", "add", "move", "recolour"))
    # With two heads, the new colour would disagree with the other head's, and no answer would be certain.
    if action == "recolour" and category == "traffic light" and len(about) == 1:
        light = objects[about[0]]
        colour = rng.choice([c for c in COLOURS if c != light["colour"]])
        remove, add = about, [dict(light, colour=colour)]
    elif action == "remove" and about:
        remove, add = [rng.choice(about)], []
    elif action == "add" and kinds:
        # Of the kinds with such a label, the first stands alone, as a bicycle without a rider.
        remove, add = [], [sample_object(rng, spec, kinds[0], cfg, question.place, rng.random() < 0.5)]
    elif action == "move" and about:
        i = rng.choice(about)
        old = objects[i]
        new = sample_object(rng, dict(spec, objects=objects[:i] + objects[i + 1:]), old["kind"], cfg)
        # It keeps its look, so that its place is all that changes.
        remove, add = [i], [new and dict(new, colour=old["colour"], look=old["look"])]
    else:
        return None
    # There may be no free place for what is added.
    return None if None in add else dict(kind=action, remove=remove, add=add)


def find_twins(spec, question, answer, rng, cfg):
    """{"flip": the first edit that changes the answer, True or False, "neutral": the first that keeps it}, or None."""
    found = dict(flip=None, neutral=None)
    for _ in range(40):
        edit = propose_edit(spec, question, rng, cfg)
        if edit is None:
            continue
        new = question.truth(View(scene_frame(apply_edit(spec, edit), cfg), cfg))
        role = "neutral" if answer == (new == TRUE) else "flip"
        # An edit that leaves the answer uncertain is of no use.
        if new != UNSURE and found[role] is None:
            found[role] = edit
        if None not in found.values():
            break
    return found


# ---- BDD100K ----

NAMES = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle"}      # 2018 names -> 2020 names
COLOUR_NAMES = {"G": "green", "R": "red", "Y": "yellow", "NA": "none", "None": "none"}
# Categories of BDD100K that no command asks about, or the beginnings of their names. They are no mistakes.
UNUSED = ("lane", "drivable area", "area/", "other vehicle", "other person", "trailer")
VIDEO = re.compile(r"(\w{8}-\w{8})-\d{7}\.")    # a frame of a sequence: name of the video, number
# Where the labels of train or val are, and the folder of their pictures. The first that exists is read.
LAYOUTS = (("*{}*.json*", "100k"), ("det_20/*{}*.json*", "100k"), ("100k/{}/*.json", "100k"),
           ("box_track_20/{}/*.json", "track"))
MAX_PIXELS = 55_000_000       # a larger picture is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None                   # for the whole process: the limit above replaces Pillow's mere warning


class BadPicture(UserError):
    """A picture that cannot be used; kind: what is wrong, as it is counted."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


# What comes before the first record of a list, or of a dict with a list of them under "frames". Frames with objects are
# no records, but those of one (2018, a file for each picture).
OPENING = re.compile(r'\s*(\[|{.*?"frames"\s*:\s*\[(?!\s*{[^{}[\]]*"objects"))', re.DOTALL)


def stream_records(path, chunk=1 << 20):
    """Yields the records of a label file (.json or .json.gz) one at a time, with memory for one.

    The file holds a list of records, a dict with such a list under "frames", or records one after another (JSON lines;
    2018, a file for each picture: one alone). Raises UserError for a file that holds anything else, or ends too early.
    """
    decode = json.JSONDecoder().raw_decode
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read(16 * chunk)
            if text.lstrip()[:1] not in ("[", "{"):
                raise ValueError(f"it begins with {text[:20]!r}, which is no list of frames")
            opening = OPENING.match(text)
            at = opening.end() if opening else 0
            while True:
                at = re.compile(r"[\s,]*").match(text, at).end()
                if opening and text.startswith("]", at):
                    # What stands around the records must be JSON too, and nothing may follow it.
                    json.loads(opening[0] + text[at:] + file.read())
                    return
                try:
                    record, at = decode(text, at)
                except json.JSONDecodeError as error:
                    # Either the record continues in the next chunk, or it is broken. It is broken when the error is
                    # far from the end of what was read, or when no record could be as long as this one.
                    new = file.read(max(chunk, len(text) - at))
                    if not (new or opening or text[at:]):
                        return
                    if not new or len(text) - error.pos > 1 << 22 or len(text) - at > 1 << 26:
                        raise
                    text = text[at:] + new
                    at = 0
                    continue
                if not isinstance(record, dict):
                    raise ValueError(f"it holds {type(record).__name__} items, not frames")
                yield record
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the labels {path}: {error}") from None


def labels_of(raw):
    """The list of labels of a raw record, of whichever format."""
    labels = raw.get("labels")
    if not labels:
        labels = raw.get("frames")
        match labels:
            # 2018, a file for each picture: the objects are those of its only frame. Other frames are no labels.
            case [dict(only)]:
                labels = only.get("objects")
    if isinstance(labels, list):
        return labels
    return [labels] if labels else []


def attributes_of(raw):
    """The attributes of a raw record or of one of its labels; frames of a video have none."""
    given = raw.get("attributes")
    return given if isinstance(given, dict) else {}


def clean_record(raw):
    """A raw record of any format as ours, with boxes in its own pixels, and its problems: [(what, kind, reason)].

    what: what the problem costs: "label"; "colour" (the label stays); "unused" is no problem, only counted.
    """
    labels = []
    problems = []
    for label in labels_of(raw):
        match label:
            case {"category": str(category)}:
                category = NAMES.get(category, category)
            case _:
                problems.append(("label", "malformed label", str(label)[:80]))
                continue
        if category not in commands.CATEGORIES:
            what = "unused" if category.startswith(UNUSED) else "label"
            problems.append((what, f"category '{category}'", "unknown"))
            continue
        try:
            edges = [float(edge) for edge in corners(label)]
        except (TypeError, KeyError, ValueError, OverflowError):
            problems.append(("label", "no box", f"{category}, box2d {str(label.get('box2d'))[:80]}"))
            continue
        given = attributes_of(label)
        colour = lamp_colour(given.get("trafficLightColor")) if category == "traffic light" else "none"
        if colour not in (*COLOURS, "none"):
            problems.append(("colour", "unknown colour", f"{category} {colour}"[:80]))
            colour = "none"
        hidden = {k: given[k] for k in ("occluded", "truncated") if isinstance(given.get(k), bool)}
        attributes = dict(trafficLightColor=colour, **hidden)
        labels.append(dict(category=category, attributes=attributes, box2d=dict(zip(EDGES, edges))))
    name = raw.get("name") if isinstance(raw.get("name"), str) else ""
    # 2018, a file for each picture: the name comes without its ending.
    if name and not Path(name).suffix:
        name += ".jpg"
    given = attributes_of(raw)
    conditions = {k: given[k] if given.get(k) and isinstance(given[k], str) else "undefined" for k in BDD_VALUES}
    return dict(name=name, labels=labels, attributes=conditions), problems


def lamp_colour(given):
    """The colour of a traffic light as it is called here; given: "green", "G", [1, "G"], None or anything else."""
    if isinstance(given, list) and given:
        given = given[-1]
    return COLOUR_NAMES.get(str(given), str(given))


def fit_record(record, width, height, size):
    """A clean record with its boxes cut to the picture (width, height) and scaled to `size`, and new problems."""
    labels = []
    problems = []
    for label in record["labels"]:
        edges = corners(label)
        # Boxes of BDD100K reach to the border of the picture, some beyond. None ends in its first two pixels, as all do
        # that are given in shares of its sides.
        x1, y1, x2, y2 = cut = clipped(edges, width, height)
        # Written so that "not a number" fails too.
        if not (x1 < x2 and y1 < y2 and max(x2, y2) > 2):
            problems.append(("label", "box empty, inverted, outside the picture, or in shares of its sides",
                             f"{label['category']} {edges} in {width}x{height}"))
            continue
        scaled = [round(v * new / old, 2) for v, new, old in zip(cut, 2 * size, 2 * (width, height))]
        labels.append(dict(label, box2d=dict(zip(EDGES, scaled))))
    return dict(record, labels=labels), problems


def picture_and_sides(path, size):
    """The picture at `path` as an upright RGB image of `size` (width, height), and its upright sides before.

    A JPEG is decoded at about this size (draft scaling, several times faster). Raises BadPicture with the path.
    """
    try:
        with Image.open(path) as image:
            sides = image.size
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture("huge picture", f"{path} has {image.width}x{image.height} pixels, over {MAX_PIXELS}")
            # The decoder of JPEG can leave out detail at once. The 3/2 keep what the resizing needs.
            image.draft("RGB", tuple(3 * side // 2 for side in size))
            image.load()
            # A photo may be stored lying on its side, with a note in its EXIF data that says how to turn it. Where they
            # are damaged, it is turned all the same, or stays as it is.
            stored = image.size
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            if image.size != stored:
                sides = sides[::-1]
            if image.mode[0] in "IF":
                image = from_deep_grey(image)
            image = image.convert("RGB")
            return image.resize(size, Image.BICUBIC, reducing_gap=2.0), sides
    except BadPicture:
        raise
    except FileNotFoundError:
        raise BadPicture("missing picture", f"there is no picture {path}") from None
    except UnidentifiedImageError:
        raise BadPicture("not a picture", f"cannot read {path} as a picture: it is empty, a Git-LFS pointer (git lfs "
                         "pull fetches the picture), or of a kind that is not read here, such as HEIC: save it as "
                         "JPEG") from None
    except Exception as error:
        # Whatever Pillow raises for a damaged file, TypeError and MemoryError too, is about this picture alone.
        raise BadPicture("truncated or broken picture", f"cannot read {path} as a picture: {error!r}") from None


def from_deep_grey(image):
    """An image of 16-bit, 32-bit or float grey in 8 bits. Pillow's own conversion would clip all that is over 255."""
    grey = np.nan_to_num(np.asarray(image, np.float32))
    # Whether white is 1, 255 or 65535 is not stored: the smallest that fits all values is taken.
    white = next((v for v in (1, 255) if grey.max() <= v), 65535)
    return Image.fromarray((grey * (255 / white)).clip(0, 255).astype(np.uint8))


def label_files(root):
    """Yields (train or val, its label files, folder of its pictures) for the first place of each that holds boxes.

    Masks, lane marks and conversions have names and forms like those of the labels: they are passed over.
    """
    for folder in ("train", "val"):
        passed = []
        for files, pictures in label_places(root, folder):
            try:
                if not any(isinstance(label, dict) and label.get("box2d") for _, raw, _ in raw_records(files)
                           for label in labels_of(raw or {})):
                    raise UserError(f"{files[0]} holds not one box (box2d)")
            except UserError as error:
                passed.append(str(error))
                continue
            print(f"{folder}: the labels are read from {files[0]}", *passed, sep="; not used: ")
            yield folder, files, root / "images" / pictures / folder
            break
        else:
            if passed:
                raise UserError(f"{'; '.join(passed)}: take the detection labels, bdd100k_labels_images_*.json or "
                                "det_20")


def label_places(root, folder):
    """Yields ([label file], folder of the pictures in LAYOUTS) for all that may be the labels of train or val."""
    for pattern, pictures in LAYOUTS:
        # What begins with a dot is hidden: macOS writes such a file beside each on a foreign disk.
        files = [path for path in sorted((root / "labels").glob(pattern.format(folder)))
                 if path.is_file() and not path.name.startswith(".")]
        # Either a file for each picture or video, or one for all.
        groups = [files] if "{}/" in pattern else [[path] for path in files]
        yield from ((group, pictures) for group in groups if group)


def raw_records(files):
    """Yields (file, raw record, None), or (file, None, error) for a file that cannot be read while others can."""
    for file in files:
        try:
            for raw in stream_records(file):
                yield file, raw, None
        except UserError as error:
            if len(files) == 1:
                raise
            yield file, None, error


def pictures_below(root):
    """{name in small letters without its ending: path} of the pictures below a folder; None where two have one name."""
    paths = {}
    for path in root.rglob("*"):
        if path.suffix.lower() in Image.registered_extensions():
            name = path.stem.lower()
            paths[name] = None if name in paths else path
    return paths


def bdd_records(cfg):
    """Yields (path of the picture, train or val, clean record, problems) of each frame that passes the filters.

    Reads the BDD100K tree cfg.bdd_dir in the order of its lists. A record without a name, a name or picture listed
    before and an unreadable file among many are problems that cost the frame. A picture whose folder, capitals or
    ending differ from those in the labels is found by the rest of its name.
    """
    root = Path(cfg.bdd_dir)
    filters = filters_of(cfg, BDD_VALUES)
    unknown = ["undefined"] if cfg.keep_undefined else []
    if not cfg.bdd_dir or not root.is_dir():
        raise UserError(f"bdd_dir '{cfg.bdd_dir}' is not a folder; it must hold images/100k/ and labels/")
    below = {}
    names = set()
    listed = kept = 0
    found = Counter()
    for folder, files, pictures in label_files(root):
        for file, raw, error in progress(raw_records(files), "labels"):
            if error:
                yield str(file), folder, dict(name=file.name), [("frame", "unreadable labels", str(error))]
                continue
            listed += 1
            record, problems = clean_record(raw)
            conditions = record["attributes"]
            found.update(f"{name} {value}" for name, value in conditions.items())
            if any(values and conditions[name] not in values + unknown for name, values in filters.items()):
                continue
            kept += 1
            name = record["name"]
            # The frames of a video lie in a folder of its name.
            path = pictures / VIDEO.sub(r"\1/\g<0>", name)
            if not os.path.isfile(path):
                # Searched for once, and only where it must be: a folder of 100,000 pictures takes a while.
                below = below or pictures_below(root / "images")
                # Folders in names may be written as in Windows.
                path = below.get(PureWindowsPath(name).stem.lower()) or path
            if not name or name in names or path in names:
                problems = [("frame", "duplicate name" if name else "no name", f"record {listed}, {file}")]
            names.update((name, path))
            yield str(path), folder, record, problems
    if not listed:
        raise UserError(f"no labels found: expected {root}/labels/bdd100k_labels_images_train.json (or ..._val.json), "
                        "det_20/det_train.json, 100k/train/*.json or box_track_20/train/*.json")
    print(f"{listed} frames listed, {kept} pass the filters")
    if not kept:
        raise UserError("no frame passes the filters: there are " +
                        ", ".join(f"{value} {count}" for value, count in sorted(found.items())))


# ---- splits and storage ----

def split_of(name):
    """train, val or test: 80/10/10 by the hash of the frame's name, so that new frames move no old one.

    All frames of a video are in the split of its name.
    """
    # Neighbouring frames of a video are nearly equal: in two splits they would let a model answer from memory.
    name = VIDEO.sub(r"\1.", name)
    # Python's own hash() is another one in each process.
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    if share < 0.8:
        return "train"
    return "val" if share < 0.9 else "test"


def finish(frame, cfg, folder=""):
    """The truths of QUESTIONS in a frame, which gets its split and what it shows.

    folder: train or val of BDD100K, where the frame comes from.
    """
    split = "ood" if frame["name"].startswith("ood-") else split_of(frame["name"])
    # The val folder is then the whole test split, and the share of train that would be in it is trained on.
    if folder and cfg.val_is_test:
        if folder == "val":
            split = "test"
        elif split == "test":
            split = "train"
    view = View(frame, cfg)
    # Labels of BDD100K say themselves what is hidden.
    if not folder:
        for o in view.objects:
            frame["labels"][o.label]["attributes"]["occluded"] = o.share < 0.7
    truths = commands.truths(view)
    seen = view.seen()
    frame.update(
        split=split,
        complexity=len(seen),
        relations=[f"{commands.noun_of(o)} {commands.whereabouts(o)}" for o in seen],
        available=Counter(q.family for q, truth in zip(QUESTIONS, truths) if truth != UNSURE))
    return truths


def draw_one(job):
    """(picture, frame, truths, problems) of a drawn scene; job: its name, settings."""
    name, cfg = job
    spec = sample_scene(name, cfg)
    frame = scene_frame(spec, cfg)
    return draw_scene(spec, size_of(cfg)), frame, finish(frame, cfg), []


def decode_one(job):
    """(picture, frame, truths, problems) of a BDD100K record; picture and truths are None where it is lost."""
    (path, folder, record, problems), usual, cfg = job
    # The record itself is unusable: its picture need not be looked at.
    if any(what == "frame" for what, _, _ in problems):
        return None, record, None, problems
    try:
        picture, sides = picture_and_sides(path, size_of(cfg))
        if sides != (usual or sides):
            raise BadPicture("wrong size", f"{path} has (width, height) {sides}, the others have {usual}")
    except BadPicture as error:
        return None, record, None, [("frame", error.kind, str(error))]
    frame, outside = fit_record(record, *sides, size_of(cfg))
    return np.asarray(picture), frame, finish(frame, cfg, folder), problems + outside


def progress(items, label, total=None):
    """Yields the items, and prints every five seconds, and after `total` items, how many there were."""
    start = shown = time.time()
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if now - shown > 5 or done == total:
            shown = now
            seconds = now - start
            number = f"{done}/{total}" if total else done
            print(f"{label}: {number}, {done / max(seconds, 1e-9):.0f}/s, {seconds:.0f} s", flush=True)


def parallel(function, jobs, cfg, label, total):
    """Yields function(job) for all `total` jobs in order, from cfg.workers processes (0: one a core), with progress."""
    # A cluster often grants a process a few cores of many, which Linux tells.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    workers = cfg.workers or cores
    # For a few jobs, starting processes would take longer than the work.
    if workers == 1 or total <= 64:
        yield from progress(map(function, jobs), label, total)
        return
    # fork is fastest where it is safe; elsewhere (Windows, macOS) the platform's default, spawn
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(workers) as pool:
        yield from progress(pool.imap(function, jobs, chunksize=32), label, total)


def written(path, records):
    """Yields records, and writes each into a file of JSON lines as it passes."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            yield record


class Frames:
    """The records of a file of JSON lines by number, read when asked for; in memory are only their positions.

    Raises IndexError beyond the last, so that a loop over them ends there.
    """

    def __init__(self, path):
        self.file = open(path, "rb")
        self.lock = threading.Lock()                        # threads that make batches share the file
        self.starts = np.cumsum([0] + [len(line) for line in self.file])[:-1]

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        with self.lock:
            self.file.seek(self.starts[i])
            line = self.file.readline()
        return json.loads(line)


def prepare(cfg):
    """Draw or read every frame, choose its commands, and write data_dir. Returns the content of meta.json.

    All is written to a folder inside data_dir and moved up at the end, so that whatever stops this function leaves
    the data of an earlier run as they were.
    """
    start = time.time()
    root = Path(cfg.data_dir)
    folder = root / "unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work, jobs, total = drawn_jobs(cfg) if cfg.source == "drawn" else bdd_jobs(cfg, folder)
    # A picture comes with some 12,000 bytes of labels, commands and tokens.
    needed = total * (3 * cfg.image_width * cfg.image_height + 12_000) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if needed > free:
        raise UserError(f"{folder / 'images.bin'} and the files beside it need about {needed:.2g} GB for {total} "
                        f"pictures, but {free:.2g} GB are free: make room, or choose another data_dir")
    results = parallel(work, jobs, cfg, "pictures", total)
    splits, truths, rejected, dropped = store_frames(folder, results, total, cfg)
    report = write_commands(folder, splits, truths, cfg)
    mean, std = channel_statistics(folder / "images.bin", splits)
    meta = dict(magic=MAGIC, version=VERSION, hash=config.data_hash(cfg), frames=len(splits),
                settings={k: getattr(cfg, k) for k in config.DATA_KEYS},
                rejected=rejected.total(), rejected_by=rejected, labels_dropped=dropped,
                mean=mean, std=std, report=report, seconds=round(time.time() - start, 1))
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    publish(folder, root)
    return meta


def drawn_jobs(cfg):
    """(function, its jobs, their number) that draw the scenes."""
    counts = {"scene": cfg.num_scenes, "ood": cfg.num_ood_scenes}
    jobs = ((f"{name}-{i:06d}", cfg) for name, count in counts.items() for i in range(count))
    return draw_one, jobs, sum(counts.values())


def bdd_jobs(cfg, folder):
    """(function, its jobs, their number) that read a BDD100K tree.

    The clean records wait in a file: all of BDD100K's would take a gigabyte of memory.
    """
    path = folder / "records.jsonl"
    total = sum(1 for _ in written(path, bdd_records(cfg)))
    records = Frames(path)
    # A hundred pictures from all parts of the list tell which size is usual, if one of them can be read.
    sizes = Counter()
    for i in range(0, total, max(1, total // 100)):
        with contextlib.suppress(BadPicture):
            sizes[picture_and_sides(records[i][0], (1, 1))[1]] += 1
    usual = max(sizes, key=sizes.get, default=None)
    return decode_one, ((record, usual, cfg) for record in records), total


def store_frames(folder, results, total, cfg):
    """Write images.bin, frames.jsonl and rejected.csv from the results of draw_one or decode_one.

    Returns the splits and truths of the stored frames, (N,) str and (N, len(QUESTIONS)) int8, and Counters by kind of
    the frames that were not stored and of the labels that were dropped or changed.
    Raises UserError when more than cfg.max_bad_share of the frames or of the labels are bad.
    """
    splits = []
    truths = []
    rejected = []
    lost = defaultdict(Counter)
    labels = crowded = 0
    with open(folder / "images.bin", "wb") as images, open(folder / "frames.jsonl", "w", encoding="utf-8") as frames:
        for picture, frame, truth, problems in results:
            if picture is not None and 0 < cfg.max_complexity < len(frame["labels"]):
                crowded += 1
                continue
            for what, kind, reason in problems:
                lost[what][kind] += 1
                if what != "unused":
                    rejected.append((frame["name"], what, kind, reason))
            if picture is None:
                continue
            images.write(picture)
            frames.write(json.dumps(dict(frame, index=len(splits))) + "\n")
            splits.append(frame["split"])
            truths.append(truth)
            labels += len(frame["labels"])
    # A broken name can hold what no encoding can write.
    with open(folder / "rejected.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("name", "lost", "kind", "reason"), *rejected])
    for what, count in (("frame", total), ("label", labels + lost["label"].total())):
        bad = lost[what].total()
        if bad > cfg.max_bad_share * count:
            kinds = ", ".join(f"{kind} {n}" for kind, n in lost[what].most_common(5))
            example = next(reason for _, cost, _, reason in rejected if cost == what)
            raise UserError(f"{bad} of {count} {what}s are bad, over max_bad_share={cfg.max_bad_share}: {kinds}; the "
                            f"first: {example}; {folder}/rejected.csv lists them; mend them, or raise max_bad_share to "
                            "do without them")
    if crowded:
        print(f"{crowded} frames hold more than max_complexity={cfg.max_complexity} objects and are not used")
    if not splits:
        raise UserError("not one picture is left")
    return np.array(splits), np.array(truths), lost["frame"], lost["label"] + lost["colour"] + lost["unused"]


def channel_statistics(path, splits):
    """Mean and standard deviation of each colour channel in [0, 1], of the first training pictures of images.bin."""
    images = np.memmap(path, np.uint8, "r").reshape(len(splits), -1, 3)
    # The first 2,000 say enough. Where nothing is for training, any picture will do.
    chosen = np.flatnonzero(splits == "train")[:2000].tolist() or [0]
    means, squares = np.zeros((2, 3))
    # One at a time: as floating-point numbers all of them would take gigabytes.
    for i in chosen:
        pixels = images[i] / 255
        means += pixels.mean(0) / len(chosen)
        squares += (pixels**2).mean(0) / len(chosen)
    # Pictures of one even colour have no deviation, and rounding may leave less than none.
    return means.tolist(), np.sqrt(np.maximum(squares - means**2, 1e-6)).tolist()


def publish(folder, root):
    """Move finished data from `folder` up to `root`."""
    (folder / "records.jsonl").unlink(missing_ok=True)
    # meta.json goes first and comes last: where it is, all else is complete.
    (root / "meta.json").unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "meta.json"):
        path.replace(root / path.name)
    folder.rmdir()


def write_commands(folder, splits, truths, cfg):
    """Choose and write the commands of every set, and the twins of the test items.

    Returns the report of meta.json: {set: its counts}, "dropped": {split: [kinds of question with too few YES or NO]}
    and, for drawn scenes, "twins".
    """
    tokenizer = Tokenizer(commands.vocabulary())
    (folder / "vocab.json").write_text(json.dumps(tokenizer.words), encoding="utf-8")
    frames = Frames(folder / "frames.jsonl")
    report = dict(dropped={})
    trained = set(QUESTIONS) - commands.HELD_OUT
    for name in SETS:
        # The held-out sets ask about the pictures of the test split.
        rows = np.flatnonzero(splits == name.split("_")[0])
        asked, counts = _write_items(folder, name, make_items(name, rows, frames, truths, cfg), tokenizer)
        report[name] = dict(pictures=len(rows), **counts)
        if name in SPLITS and len(rows):
            report["dropped"][name] = ["/".join(filter(None, question)) for question in sorted(trained - asked)]
    if cfg.source == "drawn":
        report["twins"] = write_twins(folder, frames, read_items(folder, "test"), cfg)
    return report


def make_items(name, rows, frames, truths, cfg):
    """Yields the finished commands (plain dicts, see commands.make_item) of set `name`, ordered by picture.

    rows: its frames; truths: of all frames. Only the splits get commands without a verdict.
    """
    shares = None
    if name == "test_combos":
        held = [q for q, question in enumerate(QUESTIONS) if question.held_out]
        shares = dict.fromkeys(held, 0.5 / len(held))
    rng = random.Random(f"commands {name} {cfg.scene_seed}")
    # The choice among pictures must not follow from their order on disk, so it has its own generator.
    picked = commands.choose(truths[rows], cfg, np.random.default_rng(len(rows) + cfg.scene_seed), shares)
    for row, asked in progress(zip(rows, picked), f"commands of {name}"):
        view = View(frames[row], cfg)
        for q in np.flatnonzero(asked):
            yield commands.make_item(row, QUESTIONS[q], view, rng, -1 if name == "test_words" else None)
        if name in SPLITS:
            for place in ("", *PLACES):
                yield commands.describe_item(row, view, rng, cfg, place)
            yield from commands.where_items(row, view, rng)


def packed(items, tokenizer):
    """Commands as arrays: their texts as tokens (n, longest) uint16, and an index (n, 4) int32.

    Columns of the index: picture, prompt length, text length, answer (1 YES, 0 NO, -1 for a description).
    """
    texts = array("H")
    index = array("i")
    for item in items:
        ids, prompt = tokenizer.encode_text(item["command"], item["answer"], item["reason"])
        texts.extend(ids)
        index.extend((item["picture"], prompt, len(ids), -1 if item["answer"] is None else int(item["answer"])))
    index = np.array(index, np.int32).reshape(-1, 4)
    longest = int(index[:, 2].max(initial=1))
    tokens = np.zeros((len(index), longest), np.uint16)
    # A mask is filled row by row, so each text comes into its row; the rest stays 0, which is [PAD].
    tokens[np.arange(longest) < index[:, 2:3]] = texts
    return tokens, index


def _write_items(folder, name, items, tokenizer):
    """Write a set of commands. Returns the set of their questions, and their counts for the report."""
    asked = set()
    families = Counter()
    templates = Counter()
    yes = Counter()
    path = folder / f"commands_{name}.jsonl"
    for item in written(path, items):
        template = item["template"]
        asked.add(commands.question_of(item))
        families[item["family"]] += 1
        templates[template] += 1
        yes[template] += item["answer"] is True
    # Read back one by one: the dicts of a large split would fill the memory.
    tokens, index = packed(Frames(path), tokenizer)
    np.save(folder / f"tokens_{name}.npy", tokens)
    np.save(folder / f"index_{name}.npy", index)
    return asked, dict(commands=families.total() - families["describe"], yes=yes.total(), families=families,
                       templates=templates, yes_templates=yes)


def write_twins(folder, frames, items, cfg):
    """twins.jsonl: for each test question its flip and neutral edit of the scene (null where none was found)."""
    # {picture: [(number of the item, the item)]}
    asked = defaultdict(list)
    for k, item in enumerate(items):
        if item["answer"] is not None:
            asked[item["picture"]].append((k, item))
    jobs = [(Path(frames[picture]["name"]).stem, about, cfg) for picture, about in asked.items()]
    twins = itertools.chain.from_iterable(parallel(twins_of_one, jobs, cfg, "twins", len(jobs)))
    flips = Counter(twin["flip"] is not None for twin in written(folder / "twins.jsonl", twins))
    return dict(items=flips.total(), flips=flips[True])


def twins_of_one(job):
    """The twins of the questions about one picture; job: name of its scene, [(number of the item, item)], settings."""
    name, about, cfg = job
    spec = sample_scene(name, cfg)
    rng = random.Random(f"twins {name}")
    return [dict(item=k, **find_twins(spec, commands.question_of(item), item["answer"], rng, cfg)) for k, item in about]


# ---- reading what is stored ----

def json_lines(path):
    """Yields what each line of a file holds."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def read_items(folder, name):
    """The finished commands of a set, as dicts."""
    return list(json_lines(Path(folder) / f"commands_{name}.jsonl"))


def stored_images(cfg, meta):
    """The stored pictures (meta["frames"], h, w, 3) uint8 in RGB, read from the disk when they are looked at."""
    # images.bin holds the numbers alone; their shape is known from the settings and from meta.json.
    shape = (meta["frames"], cfg.image_height, cfg.image_width, 3)
    return np.memmap(Path(cfg.data_dir) / "images.bin", np.uint8, "r", shape=shape)


def ready(cfg):
    """The content of meta.json; where there are no data yet, they are prepared and reported on first."""
    path = Path(cfg.data_dir) / "meta.json"
    if not path.exists():
        with config.locked(cfg.data_dir, waits=True):
            # Another process may have prepared them while this one waited.
            if not path.exists():
                print(f"no data in {cfg.data_dir}: preparing them")
                make(cfg)
    return load_meta(cfg)


def remake(cfg):
    """The command that makes data with these settings: it names all that differ from their defaults."""
    changed = [k for k in ("preset", "data_dir", *config.DATA_KEYS) if getattr(cfg, k) != config.SETTINGS[k][1]]
    return "python prepare.py" + "".join(f" --{k}={shlex.quote(str(getattr(cfg, k)))}" for k in changed)


def read_meta(cfg):
    """meta.json of data_dir, whatever its settings. Raises UserError with the command that repairs it."""
    path = Path(cfg.data_dir) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no data in {cfg.data_dir}: run {remake(cfg)}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): run {remake(cfg)}") from None
    if meta.get("magic") != MAGIC or meta.get("version") != VERSION:
        raise UserError(f"{cfg.data_dir} was written by another version of prepare.py: run {remake(cfg)}")
    return meta


def load_meta(cfg):
    """meta.json of data_dir, which must have been made with the settings of cfg. Raises UserError as `read_meta`."""
    meta = read_meta(cfg)
    if meta["hash"] != config.data_hash(cfg):
        differs = [f"{k}={meta['settings'].get(k)!r} there, {getattr(cfg, k)!r} now" for k in config.DATA_KEYS
                   if meta["settings"].get(k) != getattr(cfg, k)]
        raise UserError(f"the data in {cfg.data_dir} were made with other settings ({'; '.join(differs)}): "
                        f"run {remake(cfg)}, or pass the settings of the data")
    return meta


# ---- report ----

def sets_table(report):
    """What the report of meta.json says about each set: (names of the columns, rows of them)."""
    rows = []
    for name in SETS:
        entry = report[name]
        share = f"{100 * entry['yes'] / entry['commands']:.1f}%" if entry["commands"] else "-"
        families = ", ".join(f"{family} {count}" for family, count in sorted(entry["families"].items()))
        rows.append((name, entry["pictures"], entry["commands"], share, families))
    return ("set", "pictures", "questions", "YES", "families"), rows


def print_report(meta, cfg):
    print(f"\n{cfg.data_dir}: {meta['frames']} pictures of {cfg.image_width}x{cfg.image_height}, {meta['rejected']} "
          f"rejected, in {meta['seconds']} s")
    for name in ("mean", "std"):
        print(f"channel {name} " + " ".join(f"{x:.3f}" for x in meta[name]))
    report = meta["report"]
    header, rows = sets_table(report)
    for row in (header, *rows):
        print("{:<12} {:>8} {:>9} {:>6}  {}".format(*row))
    if "twins" in report:
        print("twins: {flips} of {items} test questions have an edit that flips the answer".format(**report["twins"]))
    if any(report["dropped"].values()):
        counts = ", ".join(f"{len(kinds)} in {name}" for name, kinds in report["dropped"].items())
        print(f"kinds of question dropped, because fewer than {cfg.min_cell} pictures answer YES or NO: {counts} "
              f"(listed in meta.json under \"dropped\")")
    for what, counts in (("frames rejected", meta["rejected_by"]), ("labels dropped", meta["labels_dropped"])):
        for kind, count in Counter(counts).most_common():
            print(f"{what}, {kind}: {count}")


def draw_bars(axis, counts, **look):
    """The 15 largest numbers in `counts`, {name: number}, as level bars, sorted."""
    shown = dict(Counter(counts).most_common(15)[::-1])
    axis.barh(list(shown), shown.values(), **look)


def draw_report(meta, cfg):
    """data_dir/report.png: what is asked, what is labelled, how large and where, and six examples."""
    # Imported here, because the processes that draw or decode do not need it.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    root = Path(cfg.data_dir)
    frames = Frames(root / "frames.jsonl")
    items = Frames(root / "commands_train.jsonl")
    images = stored_images(cfg, meta)
    figure = Figure((10, 9), layout="constrained")
    upper, lower = figure.subfigures(2)
    axes = upper.subplots(2, 3).ravel()
    asked, worded, labelled, seen, high, where = axes
    # The bars of YES are drawn over those of all commands.
    for name, colour, answer in (("templates", "silver", "answer NO, or a description"),
                                 ("yes_templates", "tab:blue", "answer YES")):
        counts = {re.sub(r"{\w+}", "...", Question(template).forms()[0]): count
                  for template, count in meta["report"]["train"][name].items()}
        draw_bars(asked, counts, color=colour, label=answer)
    asked.legend()
    draw_bars(worded, Counter(word for item in items for word in commands.only_words(item["command"]).split()))
    draw_bars(labelled, Counter(label["category"] for frame in frames for label in frame["labels"]))
    pictures = Counter(frame["complexity"] for frame in frames)
    seen.bar(list(pictures), pictures.values())
    edges = np.fromiter((edge for frame in frames for label in frame["labels"] for edge in corners(label)), float)
    x1, y1, x2, y2 = 100 * (edges.reshape(-1, 4) / (2 * size_of(cfg))).T
    percents = np.linspace(0, 100, 26)
    high.hist(y2 - y1, percents)
    upper.colorbar(where.hist2d((x1 + x2) / 2, y2, percents, cmap="Blues")[3])
    where.invert_yaxis()
    for axis, title in zip(axes, (
            "training commands", "most frequent words in them", "boxes by object", "pictures by number of objects seen",
            "boxes by height in % of the picture's", "boxes by the middle of their lower edge in %")):
        axis.set_title(title)
        axis.locator_params("x", nbins=4)
    # Commands from all parts of the training set.
    for axis, i in zip(lower.subplots(2, 3).flat, range(0, len(items), len(items) // 6 + 1)):
        item = items[i]
        axis.imshow(images[item["picture"]], interpolation="nearest")
        for label in frames[item["picture"]]["labels"]:
            x1, y1, x2, y2 = corners(label)
            axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color="magenta"))
        verdict = {True: "YES: ", False: "NO: "}.get(item["answer"], "")
        said = commands.tidy(f"{item['command']}?\n{verdict}{item['reason']}")
        axis.set_title("\n".join(textwrap.fill(line, 52) for line in said.splitlines()))
        axis.axis("off")
    figure.savefig(root / "report.png", dpi=150)


def make(cfg):
    """Prepare the data, and report on them."""
    import matplotlib.style
    meta = prepare(cfg)
    print_report(meta, cfg)
    # From matplotlib's own style, whatever a matplotlibrc of the user says
    plain = {"font.size": 7, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
             "legend.frameon": False}
    with matplotlib.style.context(["default", plain]):
        draw_report(meta, cfg)
    print(f"report: {Path(cfg.data_dir) / 'report.png'}")


def main(cfg):
    with config.locked(cfg.data_dir):
        make(cfg)


if __name__ == "__main__":
    config.run(main, __doc__)
