"""Pictures and boxes: street scenes drawn here, or a BDD100K folder, turned into the files that training reads.

- A scene is a spec (camera, road, weather, objects in metres); drawing it gives a picture and BDD100K-format labels.
- A twin is an edited spec drawn again: every pixel that the edit does not touch stays the same.
- BDD100K: the 2018 release lists, read in a stream; broken pictures and records are counted, listed and skipped.
- Writes to data_dir: images.npy (N, S, S, 3) uint8, frames.jsonl, and for each split commands_SPLIT.jsonl (readable),
  tokens_SPLIT.npy and index_SPLIT.npy (what training reads), twins.jsonl, vocab.json, meta.json, report.png.

    python prepare.py
    python prepare.py --source=bdd100k --bdd_dir=/path/to/bdd100k

Units: metres for the scene (x right, y up, z ahead of the camera), pixels for boxes.
"""
import contextlib
import csv
import hashlib
import json
import math
import multiprocessing
import os
import random
import shlex
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

import commands
import config
from config import UserError
from commands import MAYBE, QUESTIONS, YES, Question, View
from tokenizer import Tokenizer, pad

MAGIC, VERSION = "traffic-vlm-data", 1
SPLITS = ("train", "val", "test", "ood")
WEATHERS = ("clear", "overcast", "rainy", "foggy", "snowy")
TIMES = ("daytime", "dawn/dusk", "night")
SCENES = ("city street", "highway", "residential")

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


def conditions_kept(cfg):
    """(weathers, times, scenes) that the filters of cfg let through, for drawn scenes."""
    kept = []
    for name, every in (("weather", WEATHERS), ("timeofday", TIMES), ("scene", SCENES)):
        wished = [w.strip() for w in getattr(cfg, name).split(",") if w.strip()]
        for w in wished:
            if w not in every:
                raise UserError(f"no drawn scene has {name} '{w}'" + config.nearest(w, every)
                                + f"; there are {', '.join(every)}")
        kept.append(tuple(w for w in every if not wished or w in wished))
    return kept


def sample_scene(name, cfg):
    """The spec of the scene called `name`: plain dict, the same for the same name and cfg.scene_seed.

    Names that begin with "ood" get a weather or time outside the filters, all others one inside.
    """
    rng = random.Random(f"{name} {cfg.scene_seed}")
    weathers, times, scenes = conditions_kept(cfg)
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
        if new != MAYBE and (new == truth) not in found:
            found[new == truth] = edit
            if len(found) == 2:
                break
    return found.get(False), found.get(True)


# ---- BDD100K ----

NAMES = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle"}      # 2018 names -> 2020 names
COLOUR_NAMES = {"G": "green", "R": "red", "Y": "yellow", "NA": "none"}


def stream_list(path, chunk=1 << 20):
    """Items of the JSON list in the file at `path`, one at a time, in memory for one item.

    Raises UserError for a file that is not a JSON list of objects.
    """
    decoder, buffer, start = json.JSONDecoder(), "", False
    try:
        with open(path, encoding="utf-8") as file:
            while True:
                more = file.read(chunk)
                buffer = (buffer + more).lstrip(" \t\r\n,") if start else (buffer + more).lstrip("\ufeff \t\r\n")
                if not start and buffer:
                    if buffer[0] != "[":
                        raise UserError(f"{path} is not a JSON list of frames (it begins with {buffer[:20]!r})")
                    buffer, start = buffer[1:].lstrip(" \t\r\n,"), True
                while buffer and buffer[0] != "]":
                    try:
                        item, end = decoder.raw_decode(buffer)
                    except json.JSONDecodeError as error:
                        if not more or len(buffer) - error.pos > max(4 * chunk, 1 << 22):
                            raise UserError(f"{path} is broken near {buffer[:40]!r}: {error.msg}") from None
                        break                          # the item goes on in the next chunk
                    if not isinstance(item, dict):
                        raise UserError(f"{path} holds {type(item).__name__} items, not frames")
                    yield item
                    buffer = buffer[end:].lstrip(" \t\r\n,")
                if not more:
                    if not buffer.startswith("]"):
                        raise UserError(f"{path} ends before its list does: truncated?")
                    return
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the labels {path}: {error}") from None


def frame_attributes(raw):
    return raw["attributes"] if isinstance(raw.get("attributes"), dict) else {}


def clean_frame(raw, width, height, size):
    """One record of the 2018 list as ours, boxes scaled to the stored picture; also a Counter of what was dropped.

    raw: parsed record; width, height: of the original picture in pixels; size: side of the stored one.
    """
    labels, dropped = [], Counter()
    listed = raw.get("labels") or []
    for label in listed if isinstance(listed, list) else [listed]:
        if not isinstance(label, dict) or not isinstance(label.get("category"), str):
            dropped["malformed"] += 1
            continue
        category = NAMES.get(label["category"], label["category"])
        box = label.get("box2d")
        if category not in commands.CATEGORIES:
            dropped[f"category '{category}'"] += 1
            continue
        try:
            x1, y1, x2, y2 = (float(box[k]) for k in ("x1", "y1", "x2", "y2"))
        except (TypeError, KeyError, ValueError, OverflowError):
            dropped["no box"] += 1
            continue
        if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 <= x1 or y2 <= y1:
            dropped["empty or inverted box"] += 1
            continue
        (x1, x2), (y1, y2) = np.clip((x1, x2), 0, width), np.clip((y1, y2), 0, height)
        if x2 <= x1 or y2 <= y1:
            dropped["box outside the picture"] += 1
            continue
        attributes = label["attributes"] if isinstance(label.get("attributes"), dict) else {}
        colour = attributes.get("trafficLightColor", "none")
        colour = colour[1] if isinstance(colour, list) and len(colour) == 2 else colour
        colour = COLOUR_NAMES.get(colour, colour) if isinstance(colour, str) else "none"
        kept = dict(trafficLightColor=colour if colour in commands.COLOURS else "none")
        kept.update({k: attributes[k] for k in ("occluded", "truncated") if isinstance(attributes.get(k), bool)})
        labels.append(dict(category=category, attributes=kept,
                           box2d={k: round(float(v), 2) for k, v in zip(("x1", "y1", "x2", "y2"), (
                               x1 * size / width, y1 * size / height, x2 * size / width, y2 * size / height))}))
    attributes = frame_attributes(raw)
    return dict(name=str(raw.get("name")), labels=labels, attributes={
        k: attributes.get(k) or "undefined" for k in ("weather", "timeofday", "scene")}), dropped


def load_picture(path, size=None, with_size=False):
    """The picture at `path` as an upright RGB image, or a UserError that names the path.

    size: decode a JPEG at about this size (draft scaling, several times faster) and resize to (size, size).
    with_size: also return its upright (width, height) before resizing.
    """
    try:
        with Image.open(path) as image:
            sides = image.size[::-1] if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else image.size
            if size:
                image.draft("RGB", (2 * size, 2 * size))
            if image.mode.startswith("I;16"):          # 16 bit grey: Pillow's own conversion clips it to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.exif_transpose(image).convert("RGB")
            image = image.resize((size, size), Image.BICUBIC, reducing_gap=2.0) if size else image
            return (image, sides) if with_size else image
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {path} as a picture: {error}") from None


def bdd_frames(cfg):
    """[(path of the picture, raw record, folder split)] of the BDD100K tree cfg.bdd_dir, in the order of its lists."""
    root, found = Path(cfg.bdd_dir), []
    if not cfg.bdd_dir or not root.is_dir():
        raise UserError(f"bdd_dir '{cfg.bdd_dir}' is not a folder; it must hold images/100k/ and labels/")
    for folder in ("train", "val"):
        lists = sorted(p for p in (root / "labels").glob("*.json") if folder in p.name)
        for path in lists[:1]:
            for raw in stream_list(path):
                found.append((root / "images" / "100k" / folder / str(raw.get("name")), raw, folder))
    if not found:
        raise UserError(f"no label list found: expected {root}/labels/bdd100k_labels_images_train.json or ..._val.json")
    return found


def keep_frame(raw, cfg):
    """Whether the filters of cfg keep a record."""
    attributes = frame_attributes(raw)
    for name in ("weather", "timeofday", "scene"):
        wished, value = [w.strip() for w in getattr(cfg, name).split(",") if w.strip()], attributes.get(name)
        if wished and (value not in wished) and not (cfg.keep_undefined and value in (None, "", "undefined")):
            return False
    return True


# ---- splits and storage ----

def split_of(name):
    """train, val or test: 80/10/10 by the hash of the frame's name, so that new frames move no old one."""
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def _draw_one(job):
    name, cfg = job
    spec = sample_scene(name, cfg)
    frame = scene_frame(spec, cfg)
    boxes = [list(label["box2d"].values()) for label in frame["labels"]]
    names = [label["category"] for label in frame["labels"]]
    for label, share in zip(frame["labels"], commands.visible_shares(boxes, names, cfg.image_size)):
        label["attributes"]["occluded"] = share < 0.7
    return draw_scene(spec, cfg.image_size), frame, commands.truths(View(frame, cfg)), None


def _decode_one(job):
    (path, raw, folder), cfg = job
    try:
        picture, (width, height) = load_picture(path, cfg.image_size, with_size=True)
        picture = np.asarray(picture)
    except UserError as error:
        return None, raw, None, str(error)
    frame, dropped = clean_frame(raw, width, height, cfg.image_size)
    return picture, frame, commands.truths(View(frame, cfg)), dropped


def _twin_one(job):
    frame, questions, cfg = job
    spec = sample_scene(Path(frame["name"]).stem, cfg)
    rng = random.Random(f"twins {spec['name']}")
    return [find_twins(spec, Question(*q), rng, cfg) for q in questions]


def parallel(function, jobs, cfg, label):
    """Results of function(job) in order, from cfg.workers processes (0: one a core), with a progress line."""
    workers, start, total = cfg.workers or os.cpu_count() or 1, time.time(), len(jobs)
    with contextlib.ExitStack() as stack:
        if workers > 1 and total > 64:
            # fork is fastest where it is safe; elsewhere (Windows, macOS) the platform's default, spawn
            pool = stack.enter_context(multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
                                       .Pool(workers))
            results = pool.imap(function, jobs, chunksize=32)
        else:
            results = map(function, jobs)
        for i, result in enumerate(results, 1):
            yield result
            if i % 500 == 0 or i == total:
                seconds = time.time() - start
                end = "\n" if i == total else "\r"
                print(f"{label}: {i}/{total}, {i / seconds:.0f}/s, {seconds:.0f} s", end=end, flush=True)


def prepare(cfg):
    """Draw or read every frame, choose commands, and write data_dir. Returns the report (dict of counts)."""
    start, root = time.time(), Path(cfg.data_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to data_dir {root}: {error}") from None
    meta_path, rejected = root / "meta.json", []
    if cfg.source == "drawn":
        names = [f"scene-{i:06d}" for i in range(cfg.num_scenes)] + [f"ood-{i:06d}" for i in range(cfg.num_ood_scenes)]
        jobs, work, folders = [(name, cfg) for name in names], _draw_one, None
    else:
        found = bdd_frames(cfg)
        kept = [f for f in found if keep_frame(f[1], cfg)]
        print(f"{len(found)} frames listed, {len(kept)} pass the filters")
        if not kept:
            raise UserError("no frame passes the filters: widen weather, timeofday or scene")
        jobs, work, folders = [(f, cfg) for f in kept], _decode_one, [f[2] for f in kept]
    meta_path.unlink(missing_ok=True)                  # from here until all is written, the folder holds no valid data
    size, n, crowded, frames, table, dropped = cfg.image_size, 0, 0, [], [], Counter()
    images = np.lib.format.open_memmap(root / "images.tmp.npy", "w+", np.uint8, (len(jobs), size, size, 3))
    for i, (picture, frame, truth, note) in enumerate(parallel(work, jobs, cfg, "pictures")):
        if picture is None:
            rejected.append((frame.get("name"), note))
            continue
        if cfg.max_complexity and len(frame["labels"]) > cfg.max_complexity:
            crowded += 1
            continue
        dropped.update(note or {})
        name = frame["name"]
        if folders and cfg.val_is_test:
            split = "test" if folders[i] == "val" else {"test": "train"}.get(split_of(name), split_of(name))
        else:
            split = "ood" if name.startswith("ood-") else split_of(name)
        view = View(frame, cfg)
        frame.update(index=n, split=split, complexity=sum(o.seen == YES for o in view.objects))
        images[n] = picture
        frames.append(frame)
        table.append(truth)
        n += 1
    if crowded:
        print(f"{crowded} frames hold more than max_complexity={cfg.max_complexity} objects and are left out")
    if not frames:
        raise UserError("not one picture is left" + (f"; the first problem: {rejected[0][1]}" if rejected else ""))
    images.flush()
    del images
    _shrink(root / "images.tmp.npy", root / "images.npy", n)
    with open(root / "rejected.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "reason"), *rejected])
    with open(root / "frames.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(f) + "\n" for f in frames)
    report = write_commands(root, frames, np.array(table), cfg)
    pictures = np.load(root / "images.npy", mmap_mode="r")
    train = [f["index"] for f in frames if f["split"] == "train"][:2000]
    sample = np.asarray(pictures[train if train else slice(0, 100)], dtype=np.float32) / 255
    meta = dict(magic=MAGIC, version=VERSION, hash=config.data_hash(cfg),
                settings={k: getattr(cfg, k) for k in config.DATA_KEYS}, frames=n, rejected=len(rejected),
                labels_dropped=dict(dropped), mean=sample.mean((0, 1, 2)).tolist(), std=sample.std((0, 1, 2)).tolist(),
                splits=dict(Counter(f["split"] for f in frames)), report=report, seconds=round(time.time() - start, 1))
    temporary = meta_path.with_suffix(".tmp")
    temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    os.replace(temporary, meta_path)                   # last: its presence says that all else is complete
    return meta


def _shrink(source, target, n):
    """Keep the first n rows of the array file `source` as `target`."""
    array = np.load(source, mmap_mode="r")
    if len(array) > n:
        smaller = np.lib.format.open_memmap(target, "w+", array.dtype, (n, *array.shape[1:]))
        for i in range(0, n, 256):
            smaller[i:i + 256] = array[i:min(n, i + 256)]
        smaller.flush()
        source.unlink()
    else:
        os.replace(source, target)


def write_commands(root, frames, table, cfg):
    """Choose and write the commands of every split and its held-out sets, and the twins of the test items."""
    tokenizer, report = Tokenizer(commands.vocabulary()), {}
    (root / "vocab.json").write_text(json.dumps(tokenizer.words), encoding="utf-8")
    for split in SPLITS:
        rows = [f["index"] for f in frames if f["split"] == split]
        sets = {split: (None, None)}
        if split == "test":       # tests of language (a paraphrase never trained on) and of composition (new questions)
            held = [q for q, question in enumerate(QUESTIONS) if question.held_out]
            sets["test_words"], sets["test_combos"] = (None, -1), ({q: 0.5 / len(held) for q in held}, None)
        for name, (shares, paraphrase) in sets.items():
            items = make_items(rows, frames, table, cfg, name, shares, paraphrase, describe=name == split)
            _write_items(root, name, items, tokenizer, cfg)
            if name == "train":
                trained = set(commands.balance(items))
            report[name] = dict(pictures=len(rows), commands=sum(i["answer"] is not None for i in items),
                                yes=sum(i["answer"] is True for i in items),
                                families=dict(Counter(i["family"] for i in items)),
                                templates=dict(Counter(i["template"] for i in items)))
            if name == "test" and cfg.source == "drawn":
                report["twins"] = write_twins(root, frames, items, cfg)
    asked = {tuple(q) for q in QUESTIONS if not q.held_out}
    report["dropped"] = ["/".join(filter(None, q)) for q in sorted(asked - trained)]
    return report


def make_items(rows, frames, table, cfg, name, shares=None, paraphrase=None, describe=True):
    """Finished commands (plain dicts, see commands.make_item) for the frames `rows`, ordered by picture."""
    if not rows:
        return []
    rng = random.Random(f"commands {name} {cfg.scene_seed}")
    # The choice among pictures must not follow from their order on disk, so it has its own generator.
    chosen = commands.choose(table[rows], cfg, np.random.default_rng(len(rows) + cfg.scene_seed), shares)
    per_row = {}
    for row, q in zip(*chosen):
        per_row.setdefault(int(row), []).append(QUESTIONS[q])
    items = []
    for i, row in enumerate(rows):
        view = View(frames[row], cfg)
        items += [commands.make_item(row, q, view, rng, paraphrase) for q in per_row.get(i, [])]
        if describe:
            items += [commands.describe_item(row, view, rng, cfg, place) for place in ("", *commands.PLACES)]
            items += commands.where_items(row, view, rng)
    return items


def _write_items(root, name, items, tokenizer, cfg):
    with open(root / f"commands_{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(i) + "\n" for i in items)
    rows = [tokenizer.example(i["command"], i["answer"], i["reason"]) for i in items]
    longest = max((len(ids) for ids, _ in rows), default=1)
    if longest > cfg.max_text:
        raise UserError(f"a command with its reason has {longest} tokens, over max_text={cfg.max_text}; raise max_text")
    tokens = np.array(pad([ids for ids, _ in rows], longest) if rows else np.zeros((0, 1)), dtype=np.uint16)
    # picture, prompt length, text length, answer (1 YES, 0 NO, -1 "describe the scene")
    index = np.array([(i["picture"], p, len(ids), -1 if i["answer"] is None else int(i["answer"]))
                      for i, (ids, p) in zip(items, rows)], dtype=np.int32).reshape(-1, 4)
    np.save(root / f"tokens_{name}.npy", tokens)
    np.save(root / f"index_{name}.npy", index)


def write_twins(root, frames, items, cfg):
    """twins.jsonl: for each test item its flip and neutral edit of the scene (null where none was found)."""
    jobs = []
    for k, item in enumerate(items):
        if item["answer"] is not None:
            if not jobs or jobs[-1][0] is not frames[item["picture"]]:
                jobs.append((frames[item["picture"]], [], cfg, []))
            jobs[-1][1].append((item["template"], item["first"], item["second"]))
            jobs[-1][3].append(k)
    flips = total = 0
    with open(root / "twins.jsonl", "w", encoding="utf-8") as file:
        for job, found in zip(jobs, parallel(_twin_one, [j[:3] for j in jobs], cfg, "twins")):
            for k, (flip, neutral) in zip(job[3], found):
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
    if meta["report"]["dropped"]:
        print(f"dropped, with under {cfg.min_cell} YES or NO in train: {', '.join(meta['report']['dropped'])}")
    for kind, count in sorted(meta["labels_dropped"].items(), key=lambda kv: -kv[1]):
        print(f"labels dropped, {kind}: {count}")


def draw_report(cfg):
    """data_dir/report.png: commands, balance, complexity, object counts, example scenes with boxes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    root = Path(cfg.data_dir)
    with open(root / "frames.jsonl", encoding="utf-8") as file:
        frames = [json.loads(line) for line in file]
    images, items = np.load(root / "images.npy", mmap_mode="r"), read_items(root, "train")
    figure, axes = plt.subplots(3, 4, figsize=(16, 12), constrained_layout=True)
    counts = Counter(i["template"] for i in items)
    axes[0, 0].barh(list(counts), list(counts.values()), color="#4477aa")
    axes[0, 0].set_title("training commands by template")
    yes = Counter(i["template"] for i in items if i["answer"])
    names = [t for t in counts if t != "describe"]
    axes[0, 1].barh(names, [100 * yes[t] / counts[t] for t in names], color="#228833")
    axes[0, 1].axvline(50, color="black", lw=1)
    axes[0, 1].set(title="answers YES, %", xlim=(0, 100))
    complexity = [f["complexity"] for f in frames]
    axes[0, 2].hist(complexity, bins=range(max(complexity) + 2), color="#aa3377", align="left")
    axes[0, 2].set(title="scene complexity (objects seen)", xlabel="objects", ylabel="pictures")
    objects = Counter(lab["category"] for f in frames for lab in f["labels"])
    axes[0, 3].barh(list(objects), list(objects.values()), color="#ccbb44")
    axes[0, 3].set_title("labelled objects")
    rng = random.Random(0)
    for axis, frame in zip(axes[1:].flat, rng.sample(frames, min(8, len(frames)))):
        axis.imshow(images[frame["index"]], interpolation="nearest")
        for o in View(frame, cfg).objects:
            box = frame["labels"][o.label]["box2d"]
            corner, sides = (box["x1"] - 0.5, box["y1"] - 0.5), (box["x2"] - box["x1"], box["y2"] - box["y1"])
            axis.add_patch(plt.Rectangle(corner, *sides, fill=False, lw=1.4, ls="-" if o.seen == YES else ":",
                                         color="#ff3bd4"))
            axis.text(box["x1"], box["y1"] - 1, o.category, fontsize=7, color="white",
                      bbox=dict(facecolor="black", alpha=0.6, pad=0.6, lw=0))
        item = rng.choice([i for i in items if i["picture"] == frame["index"]] or [None])
        text = frame["name"]
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
    draw_report(cfg)
    print(f"report: {Path(cfg.data_dir) / 'report.png'}")


if __name__ == "__main__":
    config.run(main, __doc__)
