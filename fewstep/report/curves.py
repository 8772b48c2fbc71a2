"""The curves of a run: what its updates logged, a panel for each quantity."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fewstep.metrics import logged

# (keys of metrics.jsonl, the panel they belong to, what their curve is called there); the first that fits a key counts
CURVES = (
    (r"weights/kl", "KL to the teacher, nats", "KL"),
    (r"weights/budget", "KL to the teacher, nats", "budget"),
    (r"(?P<name>.+)/score", "{name}: score", "score"),
    (r"(?P<name>.+)/judge/(?P<judge>.+)", "{name}: held-out judge {judge}", "score"),
    (r"weights/weight", "weight of the other rewards", "all"),
    (r"(?P<name>.+)/weight", "weight of the other rewards", "{name}"),
    (r"(?P<name>.+)/share", "share of the update's force", "{name}"),
    (r"(?P<name>.+)/cosine", "cosine with R_dm's direction", "{name}"),
    (r"(?P<name>.+)/fake_error", "fake's squared error over the teacher's", "{name}"),
    (r"(?P<name>.+)/lag", "lag behind the student", "{name}"),
    (r"(?P<name>.+)/inflation", "size of the latents over the teacher's", "{name}"),
    (r"reuse/ess", "effective sample size of reused evaluations", "worst quarter"),
    (r"grad_norm", "gradient norm of the student", "before clipping"),
    (r"seconds", "seconds per update", "seconds"),
)
BINS = 40  # points of a curve
COLUMNS, WIDTH, HEIGHT = 3, 400, 230  # panels in a row; pixels of one
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 44, 26  # around what is plotted
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by every kind of sight (Okabe and Ito)
GREY, LIGHT = "#666666", "#dddddd"
SMOOTH = 2  # drawn so many times as large, then made smaller: PIL's lines have hard edges

Points = list[tuple[int, float]]  # (update, value)
Panels = dict[str, dict[str, Points]]  # by the panel's title and the curve's name


def panels(logs: Iterable[dict[str, Any]]) -> Panels:
    """Sort what each update logged by CURVES, in their order; a key that none of them fits has no curve."""
    points: dict[str, Points] = {}
    for one in logs:
        for key, value in one.items():
            points.setdefault(key, []).append((one["update"], value))
    found: Panels = {}
    placed: set[str] = set()
    for pattern, title, label in CURVES:
        for key in sorted(points.keys() - placed):
            match = re.fullmatch(pattern, key)
            if match:
                placed.add(key)
                found.setdefault(title.format(**match.groupdict()), {})[label.format(**match.groupdict())] = points[key]
    return found


def binned(points: Points, bins: int = BINS) -> list[tuple[float, float, float, float]]:
    """(mean update, mean, least and largest value) of up to `bins` stretches of a curve, equally many points in each but for rounding."""
    parts = np.array_split(np.array(points), min(bins, len(points)))
    return [(*part.mean(0).tolist(), float(part[:, 1].min()), float(part[:, 1].max())) for part in parts]


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, `most` or fewer: a step of 1, 2 or 5 times a power of ten. ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    power = 10 ** math.floor(math.log10((high - low) / most))
    steps = (power, 2 * power, 5 * power, 10 * power, 20 * power)
    step = next(step for step in steps if math.floor(high / step) - math.ceil(low / step) < most)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def bounds(curves: Iterable[list[tuple[float, float, float, float]]]) -> tuple[float, float]:
    """Least and largest value of binned curves, with a little room: never equal."""
    every = list(curves)
    low, high = min(one[2] for curve in every for one in curve), max(one[3] for curve in every for one in curve)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def draw_panel(title: str, curves: dict[str, Points], last: int) -> Image.Image:
    """One panel, SMOOTH times as large: each curve's means as a line, on the range of what they are means of. last: update at its right."""
    canvas = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), "white")
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(12 * SMOOTH)
    means = {name: binned(points) for name, points in curves.items()}
    low, high = bounds(means.values())

    def at(update: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * update / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        return x * SMOOTH, y * SMOOTH

    for value in ticks(low, high):
        pen.line((at(0, value), at(last, value)), fill=LIGHT, width=SMOOTH)
        pen.text((at(0, value)[0] - 6 * SMOOTH, at(0, value)[1]), f"{value:.4g}", fill=GREY, font=font, anchor="rm")
    for update, anchor in ((0, "ma"), (last, "ra")):
        pen.text((at(update, 0)[0], (HEIGHT - BOTTOM + 5) * SMOOTH), str(update), fill=GREY, font=font, anchor=anchor)
    pen.text((LEFT * SMOOTH, 6 * SMOOTH), title, fill="black", font=ImageFont.load_default(13 * SMOOTH))
    x = LEFT * SMOOTH
    for colour, (name, curve) in zip(cycle(COLOURS), means.items(), strict=False):
        pen.polygon([at(one[0], one[3]) for one in curve] + [at(one[0], one[2]) for one in reversed(curve)], fill=colour + "30")
        pen.line([at(one[0], one[1]) for one in curve], fill=colour, width=2 * SMOOTH, joint="curve")
        if len(means) > 1:
            pen.text((x, 24 * SMOOTH), name, fill=colour, font=font)
            x += font.getlength(name) + 12 * SMOOTH
    return canvas


def draw(found: Panels) -> Image.Image:
    """All panels on one picture, from update 0 to the last one logged. Raises ValueError when there are none."""
    if not found:
        raise ValueError("no curves: nothing was logged that has one")
    last = max(points[-1][0] for curves in found.values() for points in curves.values())
    rows = -(-len(found) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * WIDTH * SMOOTH, rows * HEIGHT * SMOOTH), "white")
    for place, (title, curves) in enumerate(found.items()):
        canvas.paste(draw_panel(title, curves, last), (place % COLUMNS * WIDTH * SMOOTH, place // COLUMNS * HEIGHT * SMOOTH))
    return canvas.resize((COLUMNS * WIDTH, rows * HEIGHT), Image.Resampling.LANCZOS)


def save(metrics: Path, path: Path) -> None:
    """Draw the curves of a metrics.jsonl; no picture where it has none, as one that somebody deleted and a run that was over began anew."""
    found = panels(logged(metrics))
    if found:
        draw(found).save(path)
