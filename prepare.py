"""Pictures and boxes: street scenes drawn here, or a BDD100K folder, turned into the files that training reads.

- A scene is a spec (camera, road, weather, objects in metres); drawing it gives a picture and BDD100K-format labels.
- A twin is an edited spec drawn again: every pixel that the edit does not touch stays the same.
- BDD100K: label files of both releases, read in a stream into one record; what is broken is counted, listed, skipped.
- A run that was interrupted goes on where it stopped when the same command is given again.
- Writes to data_dir: images.npy (N, S, S, 3) uint8, frames.jsonl, and for each split commands_SPLIT.jsonl (readable),
  tokens_SPLIT.npy and index_SPLIT.npy (what training reads), twins.jsonl, vocab.json, meta.json, report.png and
  rejected.csv (name, lost, kind, reason: every frame or label that was left out).

    python prepare.py
    python prepare.py --source=bdd100k --bdd_dir=/path/to/bdd100k

Units: metres for the scene (x right, y up, z ahead of the camera), pixels for boxes.
"""
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import struct
import sys
import time
import zlib
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

import commands
import config
from config import UserError
from commands import UNSURE, QUESTIONS, TRUE, Question, View
from tokenizer import Tokenizer

MAGIC, VERSION = "traffic-vlm-data", 1
SPLITS = ("train", "val", "test", "ood")
WEATHERS = ("clear", "overcast", "rainy", "foggy", "snowy")
TIMES = ("daytime", "dawn/dusk", "night")
SCENES = ("city street", "highway", "residential")
DRAWN_VALUES = dict(weather=WEATHERS, timeofday=TIMES, scene=SCENES)
BDD_VALUES = dict(weather=(*WEATHERS, "partly cloudy", "undefined"), timeofday=(*TIMES, "undefined"),
                  scene=(*SCENES, "parking lot", "tunnel", "gas stations", "undefined"))

# ---- scenes: sampling ----

# kind: (width, height) in metres from behind, width seen from the side or None, chance to be in a scene, categories.
# Signal heads and signs are drawn larger than life, so that their colours can be read at 128 pixels.
KINDS = {
    "car": (1.8, 1.5, 4.2, 0.55, ("car",)), "truck": (2.5, 3.1, 6.0, 0.33, ("truck",)),
    "bus": (2.6, 3.2, 7.5, 0.33, ("bus",)), "pedestrian": (0.75, 1.75, None, 0.45, ("pedestrian",)),
    "bicycle": (0.75, 1.1, 1.75, 0.28, ("bicycle",)), "motorcycle": (0.85, 1.25, 2.0, 0.28, ("motorcycle",)),
    "cyclist": (0.8, 1.8, 1.75, 0.18, ("rider", "bicycle")),
    "motorcyclist": (0.9, 1.75, 2.0, 0.14, ("rider", "motorcycle")),
    "light": (0.95, 2.1, None, 0.65, ("traffic light",)), "sign": (1.0, 1.0, None, 0.42, ("traffic sign",)),
}
KIND_OF = {"traffic light": "light", "traffic sign": "sign", "rider": "cyclist"}   # to add an object of a category
PAINTS = ((188, 32, 38), (32, 64, 160), (236, 236, 232), (30, 30, 34), (150, 154, 160), (222, 178, 40), (34, 110, 70),
          (200, 96, 30), (96, 60, 44), (90, 150, 200))
CLOTHES = PAINTS + ((230, 120, 160), (120, 60, 140), (60, 190, 180))
SKINS = ((244, 206, 178), (214, 160, 120), (150, 100, 70), (92, 60, 44))


def wished(cfg, known):
    """{name: list of values that its filter keeps, empty for all}. Raises UserError for a value not in `known`."""
    filters = {k: [v.strip() for v in getattr(cfg, k).split(",") if v.strip()] for k in known}
    for name, values in filters.items():
        for value in set(values).difference(known[name]):
            kind = "drawn" if known is DRAWN_VALUES else "BDD100K"
            raise UserError(f"no {kind} scene has {name} '{value}'" + config.nearest(value, known[name])
                            + f"; there are {', '.join(known[name])}")
    return filters


def sample_scene(name, cfg):
    """The spec of the scene called `name`: plain dict, the same for the same name and cfg.scene_seed.

    Names that begin with "ood" get a weather or time outside the filters, all others one inside.
    """
    rng = random.Random(f"{name} {cfg.scene_seed}")
    filters = wished(cfg, DRAWN_VALUES)
    weathers, times, scenes = ([v for v in every if v in (filters[k] or every)] for k, every in DRAWN_VALUES.items())
    every = [(w, t) for w in WEATHERS for t in TIMES]
    inside = [(w, t) for w, t in every if w in weathers and t in times]
    outside = [c for c in every if c not in inside] or inside
    weather, timeofday = rng.choice(outside if name.startswith("ood") else inside)
    kind = rng.choice(scenes)
    spec = dict(name=name, seed=rng.randrange(2**31), weather=weather, timeofday=timeofday, scene=kind,
                focal=rng.uniform(1.05, 1.28), horizon=rng.uniform(0.40, 0.47), centre=rng.uniform(0.45, 0.55),
                height=rng.uniform(1.3, 1.6), half_road=rng.uniform(*{"highway": (6, 9), "city street": (4.5, 7),
                                                                      "residential": (3.2, 4.5)}[kind]),
                shift=rng.uniform(-1.5, 1.5), lanes=rng.choice((2, 3, 4)),
                crosswalk=rng.choice((0, 0, rng.uniform(5, 12))), sun=rng.choice((-1, 1)) * rng.uniform(0.2, 0.6),
                noise=rng.uniform(0, 7), blur=rng.choice((0, 0, 0.4, 0.6)),
                gain=rng.uniform(0.88, 1.1), objects=[])
    colour = rng.choice(commands.COLOURS)
    for kind, (_, _, _, chance, _) in KINDS.items():
        copies = int(rng.random() < chance) + int(rng.random() < chance * 0.3)
        for _ in range(copies):
            o = sample_object(rng, spec, kind, cfg)
            if o is not None:
                if kind == "light" and o["colour"] in commands.COLOURS and rng.random() < 0.95:
                    o["colour"] = colour      # the heads of one crossing agree, but for a few
                spec["objects"].append(o)
    return spec


def sample_object(rng, spec, kind, cfg, place=None, near=None):
    """A new object of `kind` for `spec`, clear of the others, or None after a few tries.

    place, near: where it must stand by the rules of commands.py; sampled when None.
    """
    width, height, side, _, _ = KINDS[kind]
    focal = spec["focal"]                                        # in picture widths
    hanging = kind in ("light", "sign")
    for _ in range(12):
        facing = rng.choice(("side", "side", "rear") if kind in ("bicycle", "cyclist", "motorcycle") else
                            ("side", "rear", "rear", "front")) if side else "front"
        scale = rng.uniform(0.9, 1.12)
        w, h = (side if facing == "side" else width) * scale, height * scale
        y = rng.uniform(2.9, 4.4) if kind == "light" else rng.uniform(1.9, 3.0) if kind == "sign" else 0.0
        # distance at which it crosses the near line, and at which it becomes too small to count
        z_near = focal * h / cfg.near_height if hanging else focal * spec["height"] / (cfg.near_line - spec["horizon"])
        z_far = focal * cfg.image_size * min(w, h) / cfg.min_pixels
        is_near = rng.random() < 0.42 if near is None else near
        low, high = (0.62 * z_near, 0.97 * z_near) if is_near else (1.04 * z_near, max(0.92 * z_far, 1.3 * z_near))
        if near is None and rng.random() < 0.06:
            low, high = z_far, 2 * z_far                         # too small to count: makes its questions ambiguous
        if hanging:
            low, high = max(low, 6.0), max(high, 7.0)
        z = low * (min(high, 30.0) / low) ** rng.random() if high > low else low
        where = rng.choice(commands.PLACES) if place is None else place
        u = (commands.PLACES.index(where) + rng.uniform(0.06, 0.94)) / 3
        o = dict(kind=kind, x=(u - spec["centre"]) * z / focal, y=y, z=z, w=w, h=h, facing=facing,
                 colour=rng.choice(commands.COLOURS + (rng.choice(("none", "back")),)) if kind == "light"
                 else rng.choice(PAINTS), look=rng.randrange(2**31))
        if rng.random() < 0.9 and kind == "light" and o["colour"] in ("none", "back"):
            o["colour"] = rng.choice(commands.COLOURS)
        if all(abs(o["x"] - p["x"]) > (o["w"] + p["w"]) / 2 or abs(o["z"] - p["z"]) > 1.2 or hanging != (p["y"] > 0)
               for p in spec["objects"]) and _overlap(o, spec) < 0.5:
            return o
    return None


def project(spec, x, y, z):
    """Picture coordinates in [0, 1] of the point (x, y, z): pinhole camera at spec["height"] looking ahead."""
    return spec["centre"] + spec["focal"] * x / z, spec["horizon"] + spec["focal"] * (spec["height"] - y) / z


def object_box(spec, o):
    """(x1, y1, x2, y2) of an object in picture shares, not clipped."""
    x1, y2 = project(spec, o["x"] - o["w"] / 2, o["y"], o["z"])
    x2, y1 = project(spec, o["x"] + o["w"] / 2, o["y"] + o["h"], o["z"])
    return x1, y1, x2, y2


def inside(box):
    """A box cut at the borders of the picture."""
    return tuple(min(max(v, 0.0), 1.0) for v in box)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(o, spec):
    """Largest share of a box that another one covers, between `o` and the objects of `spec`."""
    a, worst = inside(object_box(spec, o)), 0.0
    for p in spec["objects"]:
        b = inside(object_box(spec, p))
        common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        worst = max(worst, common / max(min(area(a), area(b)), 1e-9))
    return worst


def part_boxes(o, box):
    """[(category, box)]: a cyclist is a rider and a bicycle, everything else is itself."""
    x1, y1, x2, y2 = box
    categories = KINDS[o["kind"]][4]
    if len(categories) == 1:
        return [(categories[0], box)]
    inset = 0.18 * (x2 - x1) if o["facing"] == "side" else 0
    return [(categories[0], (x1 + inset, y1, x2 - inset, y1 + 0.78 * (y2 - y1))),
            (categories[1], (x1, y1 + 0.40 * (y2 - y1), x2, y2))]


def scene_frame(spec, cfg):
    """The BDD100K-format record of a spec, boxes in pixels of the drawn picture."""
    size, labels = cfg.image_size, []
    for o in sorted(spec["objects"], key=lambda o: -o["z"]):
        for category, box in part_boxes(o, object_box(spec, o)):
            clipped = inside(box)
            left = area(clipped) / area(box)
            if left < 0.15 or min(clipped[2] - clipped[0], clipped[3] - clipped[1]) * size < 2:
                continue
            colour = o["colour"] if category == "traffic light" and o["colour"] in commands.COLOURS else "none"
            labels.append(dict(category=category, box2d={k: round(v * size, 2)
                                                         for k, v in zip(("x1", "y1", "x2", "y2"), clipped)},
                               attributes=dict(trafficLightColor=colour, truncated=left < 0.95)))
    return dict(name=spec["name"] + ".png", labels=labels,
                attributes=dict(weather=spec["weather"], timeofday=spec["timeofday"], scene=spec["scene"]))


# ---- scenes: drawing ----

class Brush:
    """ImageDraw in picture shares or in shares of a box, with haze by distance and the light of the time of day."""

    def __init__(self, image, haze, haze_colour):
        self.draw, self.size = ImageDraw.Draw(image), image.size[0]
        self.haze, self.haze_colour, self.blend = haze, haze_colour, 0.0
        self.frame = (0.0, 0.0, 1.0, 1.0)

    def within(self, box, z):
        """Draw in shares of `box` from now on, hazed for distance z."""
        self.frame, self.blend = box, 1 - math.exp(-self.haze * z)

    def _points(self, points):
        x1, y1, x2, y2 = self.frame
        return [((x1 + u * (x2 - x1)) * self.size, (y1 + v * (y2 - y1)) * self.size) for u, v in points]

    def _tint(self, colour, shade=1.0):
        b = self.blend
        return tuple(int(min(255, c * shade) * (1 - b) + h * b) for c, h in zip(colour, self.haze_colour))

    def poly(self, points, colour, shade=1.0):
        self.draw.polygon(self._points(points), fill=self._tint(colour, shade))

    def rect(self, u1, v1, u2, v2, colour, shade=1.0):
        (x1, y1), (x2, y2) = self._points([(u1, v1), (u2, v2)])
        self.draw.rectangle((x1, y1, max(x1, x2 - 0.5), max(y1, y2 - 0.5)), fill=self._tint(colour, shade))

    def oval(self, u1, v1, u2, v2, colour, shade=1.0, ring=0):
        (x1, y1), (x2, y2) = self._points([(u1, v1), (u2, v2)])
        if ring:
            self.draw.ellipse((x1, y1, x2, y2), outline=self._tint(colour, shade),
                              width=max(1, round(ring * (y2 - y1))))
        else:
            self.draw.ellipse((x1, y1, x2, y2), fill=self._tint(colour, shade))

    def line(self, points, colour, width, shade=1.0):
        thick = max(1, round(width * (self.frame[3] - self.frame[1]) * self.size))
        self.draw.line(self._points(points), fill=self._tint(colour, shade), width=thick)


DARK, GLASS, TYRE, METAL = (24, 24, 28), (58, 74, 92), (22, 22, 24), (120, 122, 126)


def draw_car(b, o, rng):
    paint, cabin = o["colour"], rng.uniform(0.30, 0.42)
    if o["facing"] == "side":
        f = rng.uniform(0.14, 0.24)
        b.poly([(f + 0.06, 0), (0.74, 0), (0.92, cabin + 0.04), (0.03 + f / 2, cabin + 0.04)], paint, 0.85)
        b.poly([(f + 0.09, 0.07), (0.48, 0.07), (0.48, cabin), (f, cabin)], GLASS)
        b.poly([(0.52, 0.07), (0.72, 0.07), (0.84, cabin), (0.52, cabin)], GLASS)
        b.rect(0, cabin, 1, 0.82, paint)
        b.rect(0, 0.70, 1, 0.84, paint, 0.6)
        for u in (0.20, 0.80):
            b.oval(u - 0.10, 0.66, u + 0.10, 1, TYRE)
            b.oval(u - 0.045, 0.76, u + 0.045, 0.90, METAL)
        return
    b.poly([(0.20, 0), (0.80, 0), (0.95, cabin + 0.06), (0.05, cabin + 0.06)], paint, 0.85)
    b.poly([(0.24, 0.06), (0.76, 0.06), (0.86, cabin), (0.14, cabin)], GLASS)
    b.rect(0, cabin, 1, 0.86, paint)
    b.rect(0.03, 0.80, 0.22, 1, TYRE)
    b.rect(0.78, 0.80, 0.97, 1, TYRE)
    b.rect(0, 0.74, 1, 0.87, paint, 0.6)
    lamp = (235, 40, 30) if o["facing"] == "rear" else (255, 250, 214)
    b.rect(0.03, cabin + 0.10, 0.20, cabin + 0.22, lamp)
    b.rect(0.80, cabin + 0.10, 0.97, cabin + 0.22, lamp)
    b.rect(0.38, 0.66, 0.62, 0.75, (228, 228, 220))


def draw_truck(b, o, rng):
    paint = o["colour"]
    cargo = rng.choice(((232, 232, 228), (196, 188, 170), (140, 150, 160), paint))
    if o["facing"] == "side":
        b.rect(0, 0, 0.74, 0.84, cargo)
        for k in range(1, 6):
            b.line([(0.74 * k / 6, 0), (0.74 * k / 6, 0.84)], cargo, 0.02, 0.75)
        b.poly([(0.76, 0.30), (0.92, 0.30), (1, 0.56), (1, 0.88), (0.76, 0.88)], paint)
        b.poly([(0.80, 0.35), (0.91, 0.35), (0.97, 0.56), (0.80, 0.56)], GLASS)
        b.rect(0, 0.82, 1, 0.88, DARK)
        for u in (0.12, 0.28, 0.86):
            b.oval(u - 0.065, 0.76, u + 0.065, 1, TYRE)
        return
    if o["facing"] == "rear":
        b.rect(0, 0, 1, 0.84, cargo)
        b.rect(0.04, 0.03, 0.96, 0.80, cargo, 0.88)
        b.line([(0.5, 0.03), (0.5, 0.80)], DARK, 0.015)
        for v in (0.25, 0.5):
            b.line([(0.30, v), (0.70, v)], METAL, 0.015)
        b.rect(0, 0.82, 1, 0.89, DARK)
        b.rect(0.02, 0.82, 0.16, 0.88, (235, 40, 30))
        b.rect(0.84, 0.82, 0.98, 0.88, (235, 40, 30))
    else:
        b.rect(0, 0, 1, 0.45, cargo)
        b.rect(0.03, 0.26, 0.97, 0.90, paint)
        b.rect(0.09, 0.32, 0.91, 0.55, GLASS)
        b.rect(0.24, 0.62, 0.76, 0.80, DARK)
        b.rect(0.05, 0.70, 0.19, 0.79, (255, 250, 214))
        b.rect(0.81, 0.70, 0.95, 0.79, (255, 250, 214))
    b.rect(0.05, 0.87, 0.25, 1, TYRE)
    b.rect(0.75, 0.87, 0.95, 1, TYRE)


def draw_bus(b, o, rng):
    paint, sign = o["colour"], (255, 176, 40)
    if o["facing"] == "side":
        b.rect(0, 0, 1, 0.88, paint)
        b.rect(0.02, 0.16, 0.98, 0.50, GLASS, 1.25)
        for k in range(1, 8):
            b.line([(k / 8, 0.16), (k / 8, 0.50)], paint, 0.03)
        b.rect(0, 0.62, 1, 0.70, (240, 240, 236))
        b.rect(0.62, 0.04, 0.92, 0.12, sign)
        for u in (0.18, 0.80):
            b.oval(u - 0.06, 0.78, u + 0.06, 1, TYRE)
        return
    b.rect(0, 0, 1, 0.90, paint)
    b.rect(0.14, 0.03, 0.86, 0.13, DARK)
    b.rect(0.22, 0.05, 0.78, 0.11, sign)
    b.rect(0.06, 0.17, 0.94, 0.56, GLASS, 1.25)
    b.line([(0.5, 0.17), (0.5, 0.56)], paint, 0.02)
    b.rect(0, 0.64, 1, 0.70, (240, 240, 236))
    lamp = (235, 40, 30) if o["facing"] == "rear" else (255, 250, 214)
    b.rect(0.05, 0.75, 0.20, 0.83, lamp)
    b.rect(0.80, 0.75, 0.95, 0.83, lamp)
    b.rect(0.06, 0.88, 0.24, 1, TYRE)
    b.rect(0.76, 0.88, 0.94, 1, TYRE)


def draw_pedestrian(b, o, rng):
    shirt, legs, skin, step = o["colour"], rng.choice(CLOTHES), rng.choice(SKINS), rng.uniform(0.05, 0.24)
    b.line([(0.5, 0.52), (0.5 - step * 1.4, 0.99)], legs, 0.075, 0.8)
    b.line([(0.5, 0.52), (0.5 + step * 1.4, 0.99)], legs, 0.075, 0.7)
    b.poly([(0.24, 0.20), (0.76, 0.20), (0.70, 0.56), (0.30, 0.56)], shirt)
    b.line([(0.24, 0.22), (0.05 + step / 2, 0.50)], shirt, 0.055, 0.85)
    b.line([(0.76, 0.22), (0.95 - step / 2, 0.50)], shirt, 0.055, 0.85)
    b.oval(0.31, 0, 0.69, 0.18, skin)
    b.oval(0.31, 0, 0.69, 0.10, rng.choice(((40, 28, 20), (90, 60, 30), (180, 150, 90), (20, 20, 20))))


def draw_cycle(b, o, rng, top=0.0):
    """Bicycle or motorcycle in the lower part of the box from `top` down."""
    def v(x):
        return top + x * (1 - top)
    motor, paint = "motor" in o["kind"], o["colour"]
    if o["facing"] != "side":
        b.line([(0.04, v(0.10)), (0.96, v(0.10))], METAL, 0.06)
        b.rect(0.40, v(0.42), 0.60, 1, TYRE)
        if motor:
            b.poly([(0.22, v(0.22)), (0.78, v(0.22)), (0.66, v(0.72)), (0.34, v(0.72))], paint)
            lamp = (235, 40, 30) if o["facing"] == "rear" else (255, 250, 214)
            b.oval(0.38, v(0.26), 0.62, v(0.46), lamp)
        else:
            b.line([(0.5, v(0.10)), (0.5, v(0.60))], paint, 0.07)
        return
    r = 0.19 if not motor else 0.17
    for u in (r, 1 - r):
        b.oval(u - r, v(0.42 if not motor else 0.48), u + r, 1, TYRE, ring=0.10 if not motor else 0.24)
    if motor:
        b.poly([(0.16, v(0.62)), (0.22, v(0.28)), (0.52, v(0.34)), (0.74, v(0.24)), (0.84, v(0.62)), (0.5, v(0.84))],
               paint)
        b.rect(0.40, v(0.58), 0.62, v(0.86), METAL)
        b.rect(0.12, v(0.22), 0.52, v(0.34), DARK)
        b.line([(0.82, v(0.72)), (0.70, v(0.04))], METAL, 0.05)
    else:
        hub, seat, head, crank = (r, v(0.71)), (0.36, v(0.20)), (0.70, v(0.16)), (0.48, v(0.72))
        for a, c in ((hub, seat), (seat, crank), (hub, crank), (seat, head), (crank, head), (head, (1 - r, v(0.71)))):
            b.line([a, c], paint, 0.045)
        b.line([(0.28, v(0.15)), (0.44, v(0.15))], DARK, 0.05)
        b.line([head, (0.68, v(0.03)), (0.80, v(0.01))], DARK, 0.045)


def draw_rider(b, o, rng):
    draw_cycle(b, o, rng, top=0.40)
    shirt, legs, helmet = rng.choice(CLOTHES), rng.choice(CLOTHES), rng.choice(PAINTS)
    lo, hi = (0.30, 0.66) if o["facing"] == "side" else (0.16, 0.84)
    if o["facing"] == "side":
        b.line([(0.40, 0.46), (0.56, 0.58), (0.48, 0.76)], legs, 0.085, 0.8)
        b.poly([(0.50, 0.17), (0.68, 0.20), (0.50, 0.50), (0.30, 0.50)], shirt)
        b.line([(0.62, 0.22), (0.72, 0.44)], shirt, 0.055, 0.8)
        b.oval(0.52, 0, 0.74, 0.19, rng.choice(SKINS))
        b.poly([(0.50, 0.10), (0.53, 0.0), (0.71, 0.0), (0.77, 0.09)], helmet)
    else:
        b.line([(0.32, 0.50), (0.26, 0.76)], legs, 0.085, 0.8)
        b.line([(0.68, 0.50), (0.74, 0.76)], legs, 0.085, 0.8)
        b.poly([(lo, 0.18), (hi, 0.18), (0.70, 0.54), (0.30, 0.54)], shirt)
        b.line([(lo, 0.20), (0.06, 0.44)], shirt, 0.055, 0.8)
        b.line([(hi, 0.20), (0.94, 0.44)], shirt, 0.055, 0.8)
        b.oval(0.33, 0, 0.67, 0.19, rng.choice(SKINS))
        b.poly([(0.31, 0.10), (0.36, 0), (0.64, 0), (0.69, 0.10)], helmet)


LAMPS = {"red": (255, 36, 30), "yellow": (255, 200, 20), "green": (30, 235, 110)}


def draw_light(b, o, rng):
    b.rect(0, 0, 1, 1, (14, 14, 16))
    if o["colour"] == "back":
        b.rect(0.12, 0.05, 0.88, 0.95, (66, 68, 70))
        for v in (0.34, 0.66):
            b.line([(0.12, v), (0.88, v)], DARK, 0.02)
        return
    for i, colour in enumerate(("red", "yellow", "green")):
        lit = o["colour"] == colour
        b.oval(0.16, 0.04 + 0.32 * i, 0.84, 0.32 + 0.32 * i, LAMPS[colour] if lit else (48, 46, 46))
        if lit:
            b.oval(0.34, 0.11 + 0.32 * i, 0.62, 0.22 + 0.32 * i, tuple(min(255, c + 70) for c in LAMPS[colour]))


def draw_sign(b, o, rng):
    shape = rng.choice(("round", "triangle", "diamond", "square", "stop"))
    if shape == "round":
        b.oval(0, 0, 1, 1, (208, 28, 36))
        b.oval(0.16, 0.16, 0.84, 0.84, (244, 244, 240))
        b.rect(0.34, 0.40, 0.66, 0.60, DARK)
    elif shape == "triangle":
        b.poly([(0.5, 0), (1, 1), (0, 1)], (208, 28, 36))
        b.poly([(0.5, 0.28), (0.80, 0.88), (0.20, 0.88)], (244, 244, 240))
    elif shape == "diamond":
        b.poly([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)], (244, 244, 240))
        b.poly([(0.5, 0.10), (0.90, 0.5), (0.5, 0.90), (0.10, 0.5)], (246, 190, 30))
    elif shape == "square":
        b.rect(0, 0, 1, 1, (28, 84, 170))
        b.poly([(0.5, 0.14), (0.80, 0.50), (0.60, 0.50), (0.60, 0.86), (0.40, 0.86), (0.40, 0.50), (0.20, 0.50)],
               (244, 244, 240))
    else:
        b.poly([(0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7), (0, 0.3)], (200, 24, 30))
        b.rect(0.16, 0.40, 0.84, 0.60, (244, 244, 240))


DRAW = {"car": draw_car, "truck": draw_truck, "bus": draw_bus, "pedestrian": draw_pedestrian, "bicycle": draw_cycle,
        "motorcycle": draw_cycle, "cyclist": draw_rider, "motorcyclist": draw_rider, "light": draw_light,
        "sign": draw_sign}


def draw_background(b, spec, rng):
    """Sky, ground, road with its markings, pavements, buildings and trees."""
    weather, horizon = spec["weather"], spec["horizon"]
    snow, grey = weather == "snowy", weather in ("overcast", "rainy", "foggy", "snowy")
    zenith = (168, 174, 182) if grey else rng.choice(((70, 130, 210), (96, 156, 226), (120, 170, 230)))
    for k in range(8):
        share = k / 7
        b.rect(0, horizon * k / 8, 1, horizon * (k + 1) / 8 + 0.01,
               tuple(int(z * (1 - share) + h * share) for z, h in zip(zenith, (214, 224, 234))))
    if weather == "clear":
        for _ in range(rng.randrange(4)):
            u, v, w = rng.uniform(0, 1), rng.uniform(0.02, horizon * 0.6), rng.uniform(0.08, 0.25)
            b.oval(u, v, u + w, v + w * 0.28, (240, 244, 250))
    ground = {"city street": (150, 146, 140), "highway": (112, 128, 84), "residential": (104, 136, 76)}[spec["scene"]]
    b.rect(0, horizon, 1, 1, (232, 234, 238) if snow else ground, rng.uniform(0.9, 1.1))
    asphalt = rng.choice(((92, 92, 96), (108, 106, 104), (78, 80, 86)))
    asphalt = tuple(int(0.5 * c + 100) for c in asphalt) if snow else asphalt

    def strip(x1, x2, z1, z2, colour, shade=1.0):     # a quadrilateral on the ground
        z1 = max(z1, 2.0)
        b.poly([project(spec, x1, 0, z1), project(spec, x2, 0, z1), project(spec, x2, 0, z2), project(spec, x1, 0, z2)],
               colour, shade)

    half, shift = spec["half_road"], spec["shift"]
    if spec["scene"] != "highway":
        strip(shift - half - 2.5, shift - half, 2, 120, (170, 166, 160))
        strip(shift + half, shift + half + 2.5, 2, 120, (170, 166, 160))
    strip(shift - half, shift + half, 2, 200, asphalt)
    for side in (-1, 1):
        edge = shift + side * half
        strip(edge - 0.12, edge + 0.12, 2, 120, (226, 226, 222) if spec["scene"] == "highway" else (138, 134, 130))
    for k in range(1, spec["lanes"]):
        x = shift - half + 2 * half * k / spec["lanes"]
        middle = k * 2 == spec["lanes"] and spec["scene"] != "highway"
        if middle:
            strip(x - 0.08, x + 0.08, 2, 120, (230, 190, 60))
        else:
            for z in range(3, 40, 5):
                strip(x - 0.08, x + 0.08, z, z + 2.2, (232, 232, 228))
    if spec["crosswalk"]:
        z, x = spec["crosswalk"], shift - half + 0.3
        while x < shift + half - 0.4:
            strip(x, x + 0.5, z, z + 2.2, (234, 234, 230))
            x += 1.0
    walls = {"city street": 0.9, "residential": 0.55, "highway": 0.12}[spec["scene"]]
    for side in (-1, 1):
        z = rng.uniform(45, 70)
        while z > 5:                                  # far to near, so that near ones cover far ones
            depth, x = rng.uniform(6, 16), shift + side * (half + rng.uniform(3.2, 7))
            if rng.random() < walls:
                tall = rng.uniform(5, 18) if spec["scene"] == "city street" else rng.uniform(4, 7)
                _building(b, spec, rng, x, side, max(z - depth, 4.0), z, tall)
            elif rng.random() < 0.6:
                _tree(b, spec, rng, x, z - depth / 2)
            z -= depth + rng.uniform(0.5, 5)


def _building(b, spec, rng, x, side, z1, z2, tall):
    wall = rng.choice(((176, 140, 116), (160, 160, 166), (196, 184, 160), (130, 96, 84), (206, 206, 200),
                       (110, 120, 134)))
    face = [project(spec, x, y, z) for y, z in ((0, z1), (tall, z1), (tall, z2), (0, z2))]
    b.poly(face, wall, 0.82)
    outer = x + side * 14
    b.poly([project(spec, x, 0, z1), project(spec, outer, 0, z1), project(spec, outer, tall, z1),
            project(spec, x, tall, z1)], wall)
    pane = (70, 86, 104)
    for floor in range(1, int(tall / 3) + 1):
        y = floor * 3 - 1.6
        z = z1 + 1
        while z + 1.2 < z2 and z < z1 + 12:
            b.poly([project(spec, x, y, z), project(spec, x, y + 1.4, z), project(spec, x, y + 1.4, z + 1.2),
                    project(spec, x, y, z + 1.2)], pane)
            z += 3
        for k in range(3):
            u1, v1 = project(spec, x + side * (1.2 + 3.2 * k), y + 1.4, z1)
            u2, v2 = project(spec, x + side * (2.8 + 3.2 * k), y, z1)
            b.rect(min(u1, u2), v1, max(u1, u2), v2, pane)


def _tree(b, spec, rng, x, z):
    z = max(z, 5.0)
    u, v = project(spec, x, 0, z)
    k = spec["focal"] / z
    crown = rng.choice(((52, 106, 48), (76, 128, 54), (40, 86, 56))) if spec["weather"] != "snowy" else (206, 212, 214)
    b.rect(u - 0.15 * k, v - 3 * k, u + 0.15 * k, v, (92, 70, 50))
    for _ in range(3):
        du, dv, r = rng.uniform(-0.8, 0.8) * k, rng.uniform(2.6, 4.6) * k, rng.uniform(0.9, 1.5) * k
        b.oval(u + du - r, v - dv - r, u + du + r, v - dv + r, crown, rng.uniform(0.85, 1.15))


def draw_scene(spec, size):
    """The picture of a spec: (size, size, 3) uint8.

    The background, each object and the noise draw from generators of their own (the spec's seed and each object's
    `look`), so editing one object leaves every other pixel as it was.
    """
    rng = random.Random(spec["seed"])
    haze = {"foggy": 0.055, "snowy": 0.02, "rainy": 0.015}.get(spec["weather"], 0.002)
    image = Image.new("RGB", (size * 2, size * 2))
    b = Brush(image, haze, (206, 212, 218))
    draw_background(b, spec, rng)
    shadows = spec["weather"] == "clear" and spec["timeofday"] == "daytime"
    for o in sorted(spec["objects"], key=lambda o: -o["z"]):
        box, rng = object_box(spec, o), random.Random(o["look"])
        x1, y1, x2, y2 = box
        if o["y"] > 0:                                 # what hangs has a pole
            foot = project(spec, o["x"], 0, o["z"])[1]
            b.within((0, 0, 1, 1), o["z"])
            u, thick = (x1 + x2) / 2, 0.12 * spec["focal"] / o["z"]
            b.rect(u - thick / 2, y2, u + thick / 2, foot, (84, 86, 90))
        elif shadows:
            reach, flat = (x2 - x1) * 0.5, 0.10 * (x2 - x1) + 0.01
            b.within((0, 0, 1, 1), 0.0)
            lean = spec["sun"] * (x2 - x1)
            b.oval(x1 + min(lean, 0) + 0.1 * reach, y2 - flat, x2 + max(lean, 0) - 0.1 * reach, y2 + flat, (58, 58, 62))
        b.within(box, o["z"])
        DRAW[o["kind"]](b, o, rng)
    image = image.reduce(2)
    if spec["blur"]:
        image = image.filter(ImageFilter.GaussianBlur(spec["blur"]))
    return _atmosphere(np.asarray(image, dtype=np.float32), spec)


def _atmosphere(picture, spec):
    """Light of the hour, rain or snow, gain and noise, all fixed by the spec's seed and pixel by pixel."""
    rng = np.random.default_rng(spec["seed"])
    size = picture.shape[0]
    if spec["timeofday"] == "night":
        bright = picture.max(2, keepdims=True) > 226       # lamps and lit things keep their light
        picture = np.where(bright, picture, picture * np.array([0.26, 0.28, 0.38], np.float32))
    elif spec["timeofday"] == "dawn/dusk":
        picture = picture * np.array([0.78, 0.62, 0.58], np.float32) + np.array([22, 10, 6], np.float32)
    if spec["weather"] in ("rainy", "snowy"):
        drops = np.zeros((size, size), np.float32)
        ys, xs = rng.integers(0, size, (2, size))
        for k in range(4 if spec["weather"] == "rainy" else 1):
            drops[(ys + k) % size, xs] = 1
        picture = picture * (0.86 if spec["weather"] == "rainy" else 1.0)
        picture = picture + drops[..., None] * (44 if spec["weather"] == "rainy" else 110)
    elif spec["weather"] == "overcast":
        picture = picture * 0.88
    picture = picture * spec["gain"] + rng.standard_normal(picture.shape, dtype=np.float32) * spec["noise"]
    return np.clip(picture, 0, 255).astype(np.uint8)


# ---- twins ----

def apply_edit(spec, edit):
    """The spec after an edit {"remove": [indices], "add": [objects]}."""
    kept = [o for i, o in enumerate(spec["objects"]) if i not in edit["remove"]]
    return dict(spec, objects=kept + edit["add"])


def edits(spec, question, rng, cfg):
    """Endless candidates for a minimal edit: remove, add, move or recolour one object that a question is about.

    Yields None for a try that came to nothing (no such object, no free space).
    """
    names = [n for n in question.objects] or [c for c in commands.ROAD_USERS if c != "train"]
    if question.family == "safety" and question.template != "change":
        names = names + ["traffic light"]
    lights = [i for i, o in enumerate(spec["objects"]) if o["kind"] == "light"]
    while True:
        category = rng.choice(names)
        kind = KIND_OF.get(category, category)
        about = [i for i, o in enumerate(spec["objects"]) if category in KINDS[o["kind"]][4]]
        does, edit = rng.choice(("remove", "add", "move", "recolour")), None
        if does == "recolour" and category == "traffic light" and len(lights) == 1:
            o = spec["objects"][lights[0]]
            colour = rng.choice([c for c in commands.COLOURS if c != o["colour"]])
            edit = dict(kind="recolour", remove=lights, add=[dict(o, colour=colour)])
        elif does == "remove" and about:
            edit = dict(kind="remove", remove=[rng.choice(about)], add=[])
        elif does == "add" and kind in KINDS:
            o = sample_object(rng, spec, kind, cfg, question.place or None, rng.random() < 0.5)
            edit = o and dict(kind="add", remove=[], add=[o])
        elif does == "move" and about:
            i = rng.choice(about)
            old, others = spec["objects"][i], [p for j, p in enumerate(spec["objects"]) if j != i]
            o = sample_object(rng, dict(spec, objects=others), old["kind"], cfg)
            edit = o and dict(kind="move", remove=[i], add=[dict(old, x=o["x"], z=o["z"])])
        yield edit


def find_twins(spec, question, rng, cfg, tries=40):
    """(flip, neutral): the first edit that flips the certain answer and the first that keeps it; None if not found."""
    truth, found = question.truth(View(scene_frame(spec, cfg), cfg)), {}
    for _, edit in zip(range(tries), edits(spec, question, rng, cfg)):
        if edit is None:
            continue
        new = question.truth(View(scene_frame(apply_edit(spec, edit), cfg), cfg))
        if new != UNSURE and (new == truth) not in found:
            found[new == truth] = edit
            if len(found) == 2:
                break
    return found.get(False), found.get(True)


# ---- BDD100K ----

NAMES = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle"}      # 2018 names -> 2020 names
COLOUR_NAMES = {"G": "green", "R": "red", "Y": "yellow", "NA": "none", None: "none"}
UNUSED = ("lane", "drivable area", "area/", "other vehicle", "other person", "trailer")    # of BDD100K, in no command
EDGES = ("x1", "y1", "x2", "y2")
VIDEO = re.compile(r"(\w{8}-\w{8})-\d{7}\.")    # a frame of a sequence: name of the video, number
# where the labels of train or val are, and their pictures: the first that exists is read
LAYOUTS = (("*{}*.json*", "100k"), ("det_20/*{}*.json*", "100k"), ("100k/{}/*.json", "100k"),
           ("box_track_20/{}/*.json", "track"))
MAX_PIXELS = 50_000_000       # a larger picture is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None                   # the limit above stands in for Pillow's, which only warns at first


class BadPicture(UserError):
    """A picture that cannot be used; kind: what is wrong, as it is counted."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


def stream_records(path, chunk=1 << 20):
    """Records of a label file, one at a time, in memory for one: items of a list, items of the list under "frames"
    in a dict, or the dict itself when it is a record (2018, a file for each image). Reads .gz as well.

    Raises UserError for a file that is none of these, or ends too early.
    """
    decode, text, at = json.JSONDecoder().raw_decode, "", 0

    def more():
        nonlocal text, at
        new = file.read(max(chunk, len(text) - at))
        text, at = text[at:] + new, 0
        return new

    def value():
        nonlocal at
        while True:
            try:
                item, at = decode(text, at)
                if not isinstance(item, dict):
                    raise UserError(f"{path} holds {type(item).__name__} items, not frames")
                return item
            except json.JSONDecodeError as error:          # an item that goes on in the next chunk, or a broken one
                if len(text) - error.pos > 1 << 22 or len(text) - at > 1 << 26 or not more():
                    raise UserError(f"{path} is broken near {text[at:at + 40]!r}: {error.msg}") from None
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            while len(text) < 16 * chunk and more():
                pass
            text = text.lstrip()
            if text[:1] == "{" and len(text) < 16 * chunk:
                whole = value()
                if "name" in whole:
                    yield whole
                    return
            start = re.match(r"\[|{.*?\"frames\"\s*:\s*\[", text, re.DOTALL)
            if not start:
                raise UserError(f"{path} is no list of frames (it begins with {text[:20]!r})")
            at = start.end()
            while True:
                at = re.compile(r"[\s,]*").match(text, at).end()
                if at < len(text):
                    if text[at] == "]":
                        return
                    yield value()
                elif not more():
                    raise UserError(f"{path} ends before its list does: truncated?")
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the labels {path}: {error}") from None


def labels_of(raw):
    """The list of labels of a raw record, of whichever format."""
    frames = raw.get("frames")                              # 2018, a file for each image
    listed = frames[0].get("objects") if frames and isinstance(frames[0], dict) else raw.get("labels")
    return listed if isinstance(listed, list) else [listed] if listed else []


def attributes_of(raw):
    """{weather, timeofday, scene} of a raw record, "undefined" where it does not say."""
    given = raw["attributes"] if isinstance(raw.get("attributes"), dict) else {}
    return {k: given[k] if given.get(k) and isinstance(given[k], str) else "undefined" for k in BDD_VALUES}


def clean_record(raw):
    """A raw record of any format as ours, boxes in its own pixels, and its problems: [(lost, kind, reason)].

    lost: "label", "colour" (the label is kept) or "unused" (no problem: of BDD100K, but in no command).
    """
    labels, problems = [], []
    for label in labels_of(raw):
        category = label.get("category") if isinstance(label, dict) else None
        if not isinstance(category, str):
            problems.append(("label", "malformed label", str(label)[:80]))
            continue
        category = NAMES.get(category, category)
        if category not in commands.CATEGORIES:
            problems.append(("unused" if category.startswith(UNUSED) else "label", f"category '{category}'", "unknown"))
            continue
        box = label.get("box2d")
        try:
            edges = [float(box[k]) for k in EDGES]
        except (TypeError, KeyError, ValueError, OverflowError):
            problems.append(("label", "no box", f"{category}, box2d {str(box)[:80]}"))
            continue
        if not all(map(math.isfinite, edges)) or edges[2] <= edges[0] or edges[3] <= edges[1]:
            problems.append(("label", "empty or inverted box", f"{category} {edges}"))
            continue
        attributes = label["attributes"] if isinstance(label.get("attributes"), dict) else {}
        colour = attributes.get("trafficLightColor") if category == "traffic light" else None
        colour = colour[-1] if isinstance(colour, list) and colour else colour               # [1, "G"]
        colour = COLOUR_NAMES.get(colour, colour) if isinstance(colour, (str, type(None))) else str(colour)
        if colour not in (*commands.COLOURS, "none"):
            problems.append(("colour", "unknown colour", f"{category} {colour}"[:80]))
            colour = "none"
        kept = {k: attributes[k] for k in ("occluded", "truncated") if isinstance(attributes.get(k), bool)}
        labels.append(dict(category=category, attributes=dict(trafficLightColor=colour, **kept),
                           box2d=dict(zip(EDGES, edges))))
    name = raw.get("name") if isinstance(raw.get("name"), str) else ""
    name += ".jpg" if name and not Path(name).suffix else ""
    return dict(name=name, labels=labels, attributes=attributes_of(raw)), problems


def fit_record(record, width, height, size):
    """A clean record with its boxes cut to the picture (width, height) and scaled to `size`, and new problems."""
    labels, problems = [], []
    for label in record["labels"]:
        edges = [label["box2d"][k] for k in EDGES]
        cut = [min(max(v, 0), side) for v, side in zip(edges, (width, height, width, height))]
        if cut[2] <= cut[0] or cut[3] <= cut[1]:
            problems.append(("label", "box outside the picture", f"{label['category']} {edges} in {width}x{height}"))
            continue
        scaled = [round(v * size / side, 2) for v, side in zip(cut, (width, height, width, height))]
        labels.append(dict(label, box2d=dict(zip(EDGES, scaled))))
    return dict(record, labels=labels), problems


def load_picture(path, size=None, with_size=False):
    """The picture at `path` as an upright RGB image, or a BadPicture that names the path.

    size: decode a JPEG at about this size (draft scaling, several times faster) and resize to (size, size).
    with_size: also return its upright (width, height) before resizing.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture("huge picture", f"{path} has {image.width}x{image.height} pixels, over {MAX_PIXELS}")
            sides = image.size[::-1] if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else image.size
            if size:
                image.draft("RGB", (3 * size // 2, 3 * size // 2))
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":                  # grey of 16 or more bits: Pillow's own conversion clips it
                grey = np.nan_to_num(np.asarray(image, np.float32))
                white = 1 if grey.max() <= 1 else 255 if grey.max() <= 255 else 65535
                image = Image.fromarray((grey * (255 / white)).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
            image = image.resize((size, size), Image.BICUBIC, reducing_gap=2.0) if size else image
            return (image, sides) if with_size else image
    except FileNotFoundError:
        raise BadPicture("missing picture", f"there is no picture {path}") from None
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        kind = "empty file" if os.path.isfile(path) and not os.path.getsize(path) else "not a picture" \
            if isinstance(error, UnidentifiedImageError) else "truncated or broken picture"
        raise BadPicture(kind, f"cannot read {path} as a picture: {error}") from None


def label_files(root):
    """Yields (train or val, its label files, folder of its pictures) for the first layout of each that is there."""
    for folder in ("train", "val"):
        for pattern, pictures in LAYOUTS:
            files = sorted((root / "labels").glob(pattern.format(folder)))
            if files:
                yield folder, files if "{}/" in pattern else files[:1], root / "images" / pictures / folder
                break


def bdd_records(cfg):
    """Yields (path of the picture, train or val, clean record, problems) of each frame that passes the filters.

    Reads the BDD100K tree cfg.bdd_dir in the order of its lists. A record without a name, a name listed before and
    an unreadable file among many are problems that cost the frame. Raises UserError for labels without any box.
    """
    root, names, listed, kept, filters = Path(cfg.bdd_dir), set(), 0, 0, wished(cfg, BDD_VALUES)
    if not cfg.bdd_dir or not root.is_dir():
        raise UserError(f"bdd_dir '{cfg.bdd_dir}' is not a folder; it must hold images/100k/ and labels/")
    found = {k: Counter() for k in filters}
    for folder, files, pictures in label_files(root):
        shapes = set()
        for file in files:
            try:
                for raw in stream_records(file):
                    listed += 1
                    if listed % 5000 == 0:
                        print(f"labels: {listed} frames read", end="\r", flush=True)
                    if "box2d" not in shapes:
                        shapes.update(k for o in labels_of(raw) if isinstance(o, dict) for k in o if o[k])
                    attributes = attributes_of(raw)
                    for k, value in attributes.items():
                        found[k][value] += 1
                    if not all(not v or attributes[k] in v or attributes[k] == "undefined" and cfg.keep_undefined
                               for k, v in filters.items()):
                        continue
                    kept += 1
                    record, problems = clean_record(raw)
                    name = record["name"]
                    if not name or name in names:
                        problems = [("frame", "duplicate name" if name else "no name", f"record {listed}, {file}")]
                    names.add(name)
                    video = VIDEO.match(name) if pictures.parent.name == "track" else None
                    yield str(pictures / (video[1] if video else "") / name), folder, record, problems
            except UserError as error:
                if len(files) == 1:
                    raise
                kept += 1
                yield str(file), folder, dict(name=file.name), [("frame", "unreadable labels", str(error))]
        if "box2d" not in shapes:
            holds = [v for k, v in (("rle", "masks (rle)"), ("poly2d", "polygons (poly2d)")) if k in shapes]
            raise UserError(f"{files[0]} holds {' and '.join(holds) or 'no labels'} but not one box (box2d): take the "
                            "detection labels, bdd100k_labels_images_*.json or det_20")
    if not listed:
        raise UserError(f"no labels found: expected {root}/labels/bdd100k_labels_images_train.json (or ..._val.json), "
                        "det_20/det_train.json, 100k/train/*.json or box_track_20/train/*.json")
    print(f"{listed} frames listed, {kept} pass the filters")
    if not kept:
        raise UserError("no frame passes the filters: there are " + "; ".join(
            f"{k} " + ", ".join(f"{v} {n}" for v, n in c.most_common()) for k, c in found.items()))


def usual_sizes(lines):
    """{train or val: (width, height)} that most pictures have, of the bdd_records written in `lines`."""
    sizes = {}
    for line in lines:
        path, folder, *_ = json.loads(line)
        with contextlib.suppress(BadPicture):
            sizes.setdefault(folder, Counter())[load_picture(path, 1, with_size=True)[1]] += 1
    return {folder: counts.most_common(1)[0][0] for folder, counts in sizes.items()}


# ---- splits and storage ----

def split_of(name):
    """train, val or test: 80/10/10 by the hash of the frame's name, so that new frames move no old one.

    All frames of a video are in the split of its name.
    """
    name = VIDEO.sub(r"\1.", name)
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def _entry(frame, folder, cfg, problems=()):
    """[finished frame or None, its name, truths of QUESTIONS as digits, problems] for the journal, as JSON."""
    if cfg.max_complexity and len(frame["labels"]) > cfg.max_complexity:
        return [None, frame["name"], "", []]
    view, split = View(frame, cfg), split_of(frame["name"])
    if folder and cfg.val_is_test:
        split = "test" if folder == "val" else "train" if split == "test" else split
    truth, seen = commands.truths(view).tolist(), [o for o in view.objects if o.certain == TRUE]
    frame.update(index=0, split="ood" if frame["name"].startswith("ood-") else split, complexity=len(seen),
                 relations=[f"{commands.noun_of(o)} {commands.whereabouts(o)}" for o in seen],
                 available=Counter(q.family for q, t in zip(QUESTIONS, truth) if t != UNSURE))
    return [frame, frame["name"], "".join(map(str, truth)), problems]


def _draw_one(job):
    name, cfg = job
    spec = sample_scene(name, cfg)
    frame = scene_frame(spec, cfg)
    boxes = [list(label["box2d"].values()) for label in frame["labels"]]
    names = [label["category"] for label in frame["labels"]]
    for label, share in zip(frame["labels"], commands.visible_shares(boxes, names, cfg.image_size)):
        label["attributes"]["occluded"] = share < 0.7
    entry = _entry(frame, "", cfg)
    return draw_scene(spec, cfg.image_size) if entry[0] else None, entry


def _decode_one(job):
    line, sizes, cfg = job
    path, folder, record, problems = json.loads(line)
    try:
        if any(lost == "frame" for lost, _, _ in problems):
            return None, [None, record["name"], "", problems]
        picture, sides = load_picture(path, cfg.image_size, with_size=True)
        if sides != sizes.get(folder, sides):
            raise BadPicture("wrong size", f"{path} has (width, height) {sides}, the others have {sizes[folder]}")
    except BadPicture as error:
        return None, [None, record["name"], "", [("frame", error.kind, str(error))]]
    frame, outside = fit_record(record, *sides, cfg.image_size)
    return np.asarray(picture), _entry(frame, folder, cfg, problems + outside)


def _twin_one(job):
    frame, questions, cfg = job
    spec = sample_scene(Path(frame["name"]).stem, cfg)
    rng = random.Random(f"twins {spec['name']}")
    return [find_twins(spec, Question(*q), rng, cfg) for q in questions]


def parallel(function, jobs, cfg, label, total, done=0):
    """Results of function(job) in order, from cfg.workers processes (0: one a core), with a progress line.

    total: number of jobs; done: how many of them an earlier run has finished, which are skipped.
    """
    workers, start, jobs = cfg.workers or os.cpu_count() or 1, time.time(), itertools.islice(jobs, done, None)
    with contextlib.ExitStack() as stack:
        if workers > 1 and total - done > 64:
            # fork is fastest where it is safe; elsewhere (Windows, macOS) the platform's default, spawn
            pool = stack.enter_context(multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
                                       .Pool(workers))
            results = pool.imap(function, jobs, chunksize=32)
        else:
            results = map(function, jobs)
        for i, result in enumerate(results, done + 1):
            yield result
            if i % 500 == 0 or i == total:
                seconds = time.time() - start
                end = "\n" if i == total else "\r"
                print(f"{label}: {i}/{total}, {(i - done) / seconds:.0f}/s, {seconds:.0f} s", end=end, flush=True)


def _picture_header(count, size):
    """The first bytes of an .npy file of `count` pictures: numpy pads them, so their number does not depend on it."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=(count, size, size, 3)))
    return header.getvalue()


def _collect(pictures, journal, key, work, jobs, total, cfg):
    """Append the pictures of all jobs to the file `pictures` (.npy) and their entries to the file `journal`.

    Both are only ever appended to, a picture before its entry. So an interrupted run with the same key (the
    journal's first line) goes on from them, cut to the last whole entry whose picture is there.
    """
    header, row, done, stored, end = _picture_header(total, cfg.image_size), 3 * cfg.image_size**2, 0, 0, 0
    if pictures.exists() and journal.exists():
        with open(journal, "rb") as log:
            end = len(key) if log.readline() == key else 0
            for line in log if end else ():
                stores = not line.startswith(b"[null")
                if not line.endswith(b"\n") or len(header) + (stored + stores) * row > pictures.stat().st_size:
                    break
                done, stored, end = done + 1, stored + stores, end + len(line)
    if done:
        print(f"{done} of {total} pictures are there from a run that was interrupted")
    mode = "r+b" if done else "w+b"
    with open(pictures, mode) as images, open(journal, mode) as log:
        for file, start, length in ((images, header, len(header) + stored * row), (log, key, end or len(key))):
            file.write(start)
            file.truncate(length)
            file.seek(length)
        for picture, entry in parallel(work, jobs, cfg, "pictures", total, done):
            if entry[0] is not None:                   # neither rejected nor left out
                images.write(picture)
                images.flush()
                stored += 1
            log.write(json.dumps(entry).encode() + b"\n")
            log.flush()
        images.seek(0)
        images.write(_picture_header(stored, cfg.image_size))


def prepare(cfg):
    """Draw or read every frame, choose commands, and write data_dir. Returns the report (dict of counts)."""
    start, root = time.time(), Path(cfg.data_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to data_dir {root}: {error}") from None
    listing, pictures, journal = (root / n for n in ("records.tmp.jsonl", "images.tmp.npy", "journal.tmp.jsonl"))
    names = [f"scene-{i:06d}" for i in range(cfg.num_scenes)] + [f"ood-{i:06d}" for i in range(cfg.num_ood_scenes)]
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        if cfg.source == "drawn":
            jobs, total, work = ((name, cfg) for name in names), len(names), _draw_one
        else:
            total, work = 0, _decode_one
            with open(listing, "w", encoding="utf-8") as file:       # clean records: a small part of the label files
                for total, record in enumerate(bdd_records(cfg), 1):
                    line = json.dumps(record) + "\n"
                    file.write(line)
                    digest.update(line.encode())
            lines = stack.enter_context(open(listing, encoding="utf-8"))
            sizes = usual_sizes(itertools.islice(lines, 0, None, max(1, total // 100)))
            lines.seek(0)
            jobs = ((line, sizes, cfg) for line in lines)
        key = f"{MAGIC} {VERSION} {config.data_hash(cfg)} {digest.hexdigest()}\n".encode()
        _collect(pictures, journal, key, work, jobs, total, cfg)
    rejected, table, splits, kept, crowded = [], [], [], 0, 0
    lost = {k: Counter() for k in ("frame", "label", "colour", "unused")}
    with open(journal, "rb") as log, open(root / "frames.tmp.jsonl", "w", encoding="utf-8") as file:
        next(log)
        for line in log:
            frame, name, truth, problems = json.loads(line)
            for what, kind, reason in problems:
                lost[what][kind] += 1
                if what != "unused":
                    rejected.append((name, what, kind, reason))
            if frame is not None:
                frame["index"] = len(table)
                file.write(json.dumps(frame) + "\n")
                table.append(np.frombuffer(truth.encode(), np.int8) - ord("0"))
                splits.append(frame["split"])
                kept += len(frame["labels"])
            crowded += frame is None and not problems
    with open(root / "rejected.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("name", "lost", "kind", "reason"), *rejected])
    for what, of in (("frame", total), ("label", kept + lost["label"].total())):
        if lost[what].total() > cfg.max_bad_share * of:
            journal.unlink()                           # the next run looks at every picture again
            raise UserError(f"{lost[what].total()} of {of} {what}s are bad, over max_bad_share={cfg.max_bad_share}: "
                            + ", ".join(f"{k} {n}" for k, n in lost[what].most_common(5)) + f"; {root}/rejected.csv "
                            "lists them; mend them, or raise max_bad_share to go on without them")
    if crowded:
        print(f"{crowded} frames hold more than max_complexity={cfg.max_complexity} objects and are left out")
    if not table:
        raise UserError("not one picture is left")
    meta_path = root / "meta.json"
    meta_path.unlink(missing_ok=True)                  # from here until all is written, the folder holds no valid data
    os.replace(root / "frames.tmp.jsonl", root / "frames.jsonl")
    report = write_commands(root, Frames(root / "frames.jsonl"), np.array(splits), np.array(table), cfg)
    os.replace(pictures, root / "images.npy")
    stored = np.load(root / "images.npy", mmap_mode="r")
    sample = np.flatnonzero(np.array(splits) == "train")[:2000] if "train" in splits else range(min(100, len(stored)))
    counts = sum(np.stack([np.bincount(stored[i, :, :, c].ravel(), minlength=256) for c in range(3)]) for i in sample)
    values, shares = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)         # of each value, by channel
    mean = shares @ values
    meta = dict(magic=MAGIC, version=VERSION, hash=config.data_hash(cfg),
                settings={k: getattr(cfg, k) for k in config.DATA_KEYS}, frames=len(table),
                rejected=lost["frame"].total(), rejected_by=lost["frame"],
                labels_dropped=lost["label"] + lost["colour"] + lost["unused"], mean=mean.tolist(),
                std=np.sqrt(shares @ values**2 - mean**2).tolist(), splits=dict(Counter(splits)), report=report,
                seconds=round(time.time() - start, 1))
    temporary = meta_path.with_suffix(".tmp")
    temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    os.replace(temporary, meta_path)                   # last: its presence says that all else is complete
    for path in (journal, listing):
        path.unlink(missing_ok=True)
    return meta


class Frames:
    """The records of a frames.jsonl by number, read when asked for: memory for their positions alone."""

    def __init__(self, path):
        self.file = open(path, "rb")
        self.starts = np.cumsum([0] + [len(line) for line in self.file])

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        self.file.seek(self.starts[i])
        return json.loads(self.file.readline())


def write_commands(root, frames, splits, table, cfg):
    """Choose and write the commands of every split and its held-out sets, and the twins of the test items."""
    tokenizer, report = Tokenizer(commands.vocabulary()), dict(dropped={})
    asked = {tuple(q) for q in QUESTIONS if not q.held_out}
    (root / "vocab.json").write_text(json.dumps(tokenizer.words), encoding="utf-8")
    for split in SPLITS:
        rows = np.flatnonzero(splits == split).tolist()
        sets = {split: (None, None)}
        if split == "test":       # tests of language (a paraphrase never trained on) and of composition (new questions)
            held = [q for q, question in enumerate(QUESTIONS) if question.held_out]
            sets["test_words"], sets["test_combos"] = (None, -1), ({q: 0.5 / len(held) for q in held}, None)
        for name, (shares, paraphrase) in sets.items():
            items = make_items(rows, frames, table, cfg, name, shares, paraphrase, describe=name == split)
            if name == "test" and cfg.source == "drawn":
                items = list(items)
                report["twins"] = write_twins(root, frames, items, cfg)
            cells, counts = _write_items(root, name, items, tokenizer, cfg)
            report[name] = dict(pictures=len(rows), **counts)
            if rows and name in SPLITS:
                report["dropped"][name] = ["/".join(filter(None, q)) for q in sorted(asked - cells)]
    return report


def make_items(rows, frames, table, cfg, name, shares=None, paraphrase=None, describe=True):
    """Yields finished commands (plain dicts, see commands.make_item) for the frames `rows`, ordered by picture."""
    if not rows:
        return
    rng = random.Random(f"commands {name} {cfg.scene_seed}")
    # The choice among pictures must not follow from their order on disk, so it has its own generator.
    chosen = commands.choose(table[rows], cfg, np.random.default_rng(len(rows) + cfg.scene_seed), shares)
    per_row = {}
    for row, q in zip(*chosen):
        per_row.setdefault(int(row), []).append(QUESTIONS[q])
    for i, row in enumerate(rows):
        view = View(frames[row], cfg)
        yield from (commands.make_item(row, q, view, rng, paraphrase) for q in per_row.get(i, []))
        if describe:
            yield from (commands.describe_item(row, view, rng, cfg, place) for place in ("", *commands.PLACES))
            yield from commands.where_items(row, view, rng)


def packed(items, tokenizer):
    """Commands as arrays: their texts as tokens (n, longest) uint16, and an index (n, 4) int32.

    Columns of the index: picture, prompt length, text length, answer (1 YES, 0 NO, -1 for a description).
    """
    texts, index = array("H"), array("i")
    for i in items:
        ids, prompt = tokenizer.example(i["command"], i["answer"], i["reason"])
        texts.extend(ids)
        index.extend((i["picture"], prompt, len(ids), -1 if i["answer"] is None else int(i["answer"])))
    index = np.array(index, dtype=np.int32).reshape(-1, 4)
    longest = int(index[:, 2].max(initial=1))
    tokens = np.zeros((len(index), longest), dtype=np.uint16)
    tokens[np.arange(longest) < index[:, 2:3]] = texts             # row by row; [PAD] is 0
    return tokens, index


def _write_items(root, name, items, tokenizer, cfg):
    """Write commands as they come. Returns {(template, first, second)} of the questions, and counts for the report."""
    cells, families, templates, yes = set(), Counter(), Counter(), Counter()

    def written():
        for i in items:
            file.write(json.dumps(i) + "\n")
            families[i["family"]] += 1
            templates[i["template"]] += 1
            if i["answer"] is not None:
                cells.add((i["template"], i["first"], i["second"]))
                yes[i["template"]] += i["answer"]
            yield i
    with open(root / f"commands_{name}.jsonl", "w", encoding="utf-8") as file:
        tokens, index = packed(written(), tokenizer)
    if tokens.shape[1] > cfg.max_text:
        raise UserError(f"a command with its reason has {tokens.shape[1]} tokens, over max_text={cfg.max_text}; raise "
                        "max_text")
    np.save(root / f"tokens_{name}.npy", tokens)
    np.save(root / f"index_{name}.npy", index)
    return cells, dict(commands=families.total() - families["describe"], yes=yes.total(), families=dict(families),
                       templates=templates, yes_templates=yes)


def write_twins(root, frames, items, cfg):
    """twins.jsonl: for each test item its flip and neutral edit of the scene (null where none was found)."""
    jobs, rows = [], {}
    for k, item in enumerate(items):
        if item["answer"] is not None:
            rows.setdefault(item["picture"], []).append(k)
    for picture, numbers in rows.items():
        jobs.append((frames[picture], [tuple(items[k][f] for f in ("template", "first", "second")) for k in numbers],
                     cfg))
    flips = total = 0
    with open(root / "twins.jsonl", "w", encoding="utf-8") as file:
        for numbers, found in zip(rows.values(), parallel(_twin_one, jobs, cfg, "twins", len(jobs))):
            for k, (flip, neutral) in zip(numbers, found):
                file.write(json.dumps(dict(item=k, flip=flip, neutral=neutral)) + "\n")
                flips, total = flips + (flip is not None), total + 1
    return dict(items=total, flips=flips)


def read_items(root, name):
    """The finished commands of a set, as dicts."""
    with open(Path(root) / f"commands_{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load_meta(cfg):
    """meta.json of data_dir, checked against cfg. Raises UserError with the command that repairs it."""
    path = Path(cfg.data_dir) / "meta.json"
    remake = "python prepare.py" + "".join(
        f" --{k}={shlex.quote(str(getattr(cfg, k)))}" for k in DATA_FLAGS if getattr(cfg, k) != config.SETTINGS[k][1])
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no data in {cfg.data_dir}: run {remake}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): run {remake}") from None
    if meta.get("magic") != MAGIC or meta.get("version") != VERSION:
        raise UserError(f"{cfg.data_dir} was written by another version of prepare.py: run {remake}")
    if meta["hash"] != config.data_hash(cfg):
        differs = [f"{k}={meta['settings'].get(k)!r} there, {getattr(cfg, k)!r} now" for k in config.DATA_KEYS
                   if meta["settings"].get(k) != getattr(cfg, k)]
        raise UserError(f"the data in {cfg.data_dir} were made with other settings ({'; '.join(differs)}): "
                        f"run {remake}, or pass the settings of the data")
    return meta


DATA_FLAGS = ["preset", "data_dir"] + config.DATA_KEYS

# ---- report ----

def print_report(meta, cfg):
    print(f"\n{cfg.data_dir}: {meta['frames']} pictures of {cfg.image_size}x{cfg.image_size}, {meta['rejected']} "
          f"rejected, in {meta['seconds']} s")
    print("channel mean " + " ".join(f"{x:.3f}" for x in meta["mean"])
          + ", std " + " ".join(f"{x:.3f}" for x in meta["std"]))
    print(f"{'set':<12} {'pictures':>8} {'questions':>9} {'YES':>6}  families")
    for name, r in meta["report"].items():
        if isinstance(r, dict) and "commands" in r:
            share = f"{100 * r['yes'] / r['commands']:.1f}%" if r["commands"] else "-"
            print(f"{name:<12} {r['pictures']:>8} {r['commands']:>9} {share:>6}  "
                  + ", ".join(f"{k} {v}" for k, v in sorted(r["families"].items())))
    if "twins" in meta["report"]:
        t = meta["report"]["twins"]
        print(f"twins: {t['flips']} of {t['items']} test questions have an edit that flips the answer")
    dropped = meta["report"]["dropped"]
    if dropped.get("train"):
        print(f"dropped, with under {cfg.min_cell} YES or NO in train: {', '.join(dropped['train'])}")
        print("question kinds dropped: " + ", ".join(f"{len(kinds)} in {name}" for name, kinds in dropped.items()))
    for kind, count in sorted(meta["rejected_by"].items(), key=lambda kv: -kv[1]):
        print(f"frames rejected, {kind}: {count}")
    for kind, count in sorted(meta["labels_dropped"].items(), key=lambda kv: -kv[1]):
        print(f"labels dropped, {kind}: {count}")


def draw_report(meta, cfg):
    """data_dir/report.png: commands, balance, complexity, object counts, example scenes with boxes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    root, train = Path(cfg.data_dir), meta["report"]["train"]
    frames, images = Frames(root / "frames.jsonl"), np.load(root / "images.npy", mmap_mode="r")
    figure, axes = plt.subplots(3, 4, figsize=(16, 12), constrained_layout=True)
    counts = train["templates"]
    axes[0, 0].barh(list(counts), list(counts.values()), color="#4477aa")
    axes[0, 0].set_title("training commands by template")
    names = [t for t in counts if not t.startswith("describe")]
    axes[0, 1].barh(names, [100 * train["yes_templates"].get(t, 0) / counts[t] for t in names], color="#228833")
    axes[0, 1].axvline(50, color="black", lw=1)
    axes[0, 1].set(title="answers YES, %", xlim=(0, 100))
    complexity, objects = Counter(), Counter()
    for frame in frames:
        complexity[frame["complexity"]] += 1
        objects.update(label["category"] for label in frame["labels"])
    axes[0, 2].bar(list(complexity), list(complexity.values()), width=1, color="#aa3377")
    axes[0, 2].set(title="scene complexity (objects seen)", xlabel="objects", ylabel="pictures")
    axes[0, 3].barh(list(objects), list(objects.values()), color="#ccbb44")
    axes[0, 3].set_title("labelled objects")
    rng = random.Random(0)
    shown, items = rng.sample(range(len(frames)), min(8, len(frames))), {}
    with open(root / "commands_train.jsonl", encoding="utf-8") as file:
        for item in map(json.loads, file):
            if item["picture"] in shown:
                items.setdefault(item["picture"], []).append(item)
    for axis, frame in zip(axes[1:].flat, map(frames.__getitem__, shown)):
        axis.imshow(images[frame["index"]], interpolation="nearest")
        for o in View(frame, cfg).objects:
            box = frame["labels"][o.label]["box2d"]
            corner, sides = (box["x1"] - 0.5, box["y1"] - 0.5), (box["x2"] - box["x1"], box["y2"] - box["y1"])
            axis.add_patch(plt.Rectangle(corner, *sides, fill=False, lw=1.4, ls="-" if o.certain == TRUE else ":",
                                         color="#ff3bd4"))
            axis.text(box["x1"], box["y1"] - 1, o.category, fontsize=7, color="white",
                      bbox=dict(facecolor="black", alpha=0.6, pad=0.6, lw=0))
        item, text = rng.choice(items.get(frame["index"], [None])), frame["name"]
        if item:
            verdict = "" if item["answer"] is None else "YES: " if item["answer"] else "NO: "
            text = f"{item['command']}?\n{verdict}{item['reason']}"
        axis.set_title(text, fontsize=8)
        axis.axis("off")
    for axis in axes[1:].flat:
        axis.axis("off")
    figure.savefig(root / "report.png", dpi=110)
    plt.close(figure)


def main(cfg):
    meta = prepare(cfg)
    print_report(meta, cfg)
    draw_report(meta, cfg)
    print(f"report: {Path(cfg.data_dir) / 'report.png'}")


if __name__ == "__main__":
    config.run(main, __doc__)
