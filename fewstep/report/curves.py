"""The curves of a run: what its updates logged, a panel for each quantity."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fewstep.disk import replace
from fewstep.metrics import parsed

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
BINS, LEAST = 40, 10  # stretches of a curve, at most; at least, before each holds more than one of its points
COLUMNS, WIDTH, HEIGHT = 3, 400, 230  # panels in a row; pixels of one whose names take one line
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 44, 26  # around what is plotted
LINE, MARK = 17, 22  # height of a line of names; width of the piece of its curve that stands before a name
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by every kind of sight (Okabe and Ito)
GREY, LIGHT = "#666666", "#dddddd"
SMOOTH = 2  # drawn so many times as large, then made smaller: PIL's lines have hard edges

Points = array  # of doubles: update, value, update, value, ...; a run's are in memory while it trains
Panels = dict[str, dict[str, Points]]  # by the panel's title and the curve's name


@cache
def place(key: str) -> tuple[int, str, str] | None:
    """(number in CURVES, panel's title, curve's name there) of a key of metrics.jsonl; None for one that has no curve."""
    for number, (pattern, title, label) in enumerate(CURVES):
        match = re.fullmatch(pattern, key)
        if match:
            return number, title.format(**match.groupdict()), label.format(**match.groupdict())
    return None


def add(points: dict[str, Points], logs: Iterable[dict[str, Any]]) -> dict[str, Points]:
    """The curves, by key, with what each update logged put at their ends; a key that has no curve is left out."""
    for one in logs:
        for key, value in one.items():
            if place(key) is not None:
                points.setdefault(key, array("d")).extend((one["update"], value))
    return points


def panels(points: dict[str, Points]) -> Panels:
    """Sort curves, by key, into panels, in the order of CURVES."""
    found: Panels = {}
    for (_, title, label), key in sorted((where, key) for key in points if (where := place(key)) is not None):
        found.setdefault(title, {})[label] = points[key]
    return found


def stretches(points: int) -> int:
    """Into how many stretches a curve falls: of four points each, since one is as noisy as one batch, but for the shortest curves and the
    longest."""
    return min(BINS, max(points // 4, min(points, LEAST)))


def binned(points: Points, bins: int) -> list[tuple[float, float, float, float]]:
    """(mean update, mean, least and largest value) of up to `bins` stretches of a curve, equally many points in each but for rounding."""
    parts = np.array_split(np.array(points).reshape(-1, 2), min(bins, len(points) // 2))
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


def heads(names: Iterable[str]) -> list[tuple[int, int]]:
    """Where the names of a panel's curves begin: (x, number of the line), in pixels of the picture; a line ends where the panel does."""
    font, found, x, line = ImageFont.load_default(12), [], LEFT, 0
    for name in names:
        wide = MARK + math.ceil(font.getlength(name))
        if x > LEFT and x + wide > WIDTH - RIGHT:
            x, line = LEFT, line + 1
        found.append((x, line))
        x += wide + 12
    return found


def dashes(points: list[tuple[float, float]], on: float, off: float) -> list[list[tuple[float, float]]]:
    """The pieces of a broken line along `points`: each `on` long, `off` from the next."""
    way = np.array(points)
    length = np.concatenate([[0.0], np.hypot(*np.diff(way, axis=0).T).cumsum()])

    def at(here: float) -> tuple[float, float]:
        return float(np.interp(here, length, way[:, 0])), float(np.interp(here, length, way[:, 1]))

    def piece(start: float) -> list[tuple[float, float]]:
        end = min(start + on, length[-1])
        return [at(start), *[points[i] for i in np.flatnonzero((length > start) & (length < end))], at(end)]

    return [piece(start) for start in np.arange(0.0, length[-1], on + off)]


def draw_line(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], number: int) -> None:
    """The line of a panel's curve by its number: a colour, and where colours come again, longer dashes each time."""
    again, colour = divmod(number, len(COLOURS))
    pieces = dashes(points, 3 * again * SMOOTH, 3 * SMOOTH) if again else [points]
    for piece in pieces:
        pen.line(piece, fill=COLOURS[colour], width=2 * SMOOTH, joint="curve")


def height(names: Iterable[str]) -> int:
    """Of the panel of some curves, in pixels of the picture."""
    return HEIGHT + LINE * heads(names)[-1][1]


def draw_panel(title: str, curves: dict[str, Points], last: int) -> Image.Image:
    """One panel, SMOOTH times as large: each curve's means as a line, on the range of what they are means of. last: update at its right."""
    tall = height(curves)
    top = TOP + tall - HEIGHT
    canvas = Image.new("RGB", (WIDTH * SMOOTH, tall * SMOOTH), "white")
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(12 * SMOOTH)
    means = {name: binned(points, stretches(len(points) // 2)) for name, points in curves.items()}
    low, high = bounds(means.values())

    def at(update: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * update / last
        y = top + (tall - top - BOTTOM) * (high - value) / (high - low)
        return x * SMOOTH, y * SMOOTH

    for value in ticks(low, high):
        pen.line((at(0, value), at(last, value)), fill=LIGHT, width=SMOOTH)
        pen.text((at(0, value)[0] - 6 * SMOOTH, at(0, value)[1]), f"{value:.4g}", fill=GREY, font=font, anchor="rm")
    for update, anchor in ((0, "ma"), (last, "ra")):
        pen.text((at(update, 0)[0], (tall - BOTTOM + 5) * SMOOTH), str(update), fill=GREY, font=font, anchor=anchor)
    pen.text((LEFT * SMOOTH, 6 * SMOOTH), title, fill="black", font=ImageFont.load_default(13 * SMOOTH))
    for number, ((x, line), (name, curve)) in enumerate(zip(heads(means), means.items(), strict=True)):
        colour, y = COLOURS[number % len(COLOURS)], 24 + LINE * line
        pen.polygon([at(one[0], one[3]) for one in curve] + [at(one[0], one[2]) for one in reversed(curve)], fill=colour + "30")
        draw_line(pen, [at(one[0], one[1]) for one in curve], number)
        if len(means) > 1:
            draw_line(pen, [(x * SMOOTH, (y + 8) * SMOOTH), ((x + MARK - 5) * SMOOTH, (y + 8) * SMOOTH)], number)
            pen.text(((x + MARK) * SMOOTH, y * SMOOTH), name, fill=colour, font=font)
    return canvas


def draw(found: Panels) -> Image.Image:
    """All panels on one picture, from update 0 to the last one logged. Raises ValueError when there are none."""
    if not found:
        raise ValueError("no curves: nothing was logged that has one")
    last = int(max(points[-2] for curves in found.values() for points in curves.values()))
    drawn = [draw_panel(title, curves, last) for title, curves in found.items()]
    rows = [drawn[i : i + COLUMNS] for i in range(0, len(drawn), COLUMNS)]
    tops = [0, *accumulate(max(panel.height for panel in row) for row in rows)]
    canvas = Image.new("RGB", (COLUMNS * WIDTH * SMOOTH, tops[-1]), "white")
    for top, row in zip(tops, rows, strict=False):
        for column, panel in enumerate(row):
            canvas.paste(panel, (column * WIDTH * SMOOTH, top))
    return canvas.resize((canvas.width // SMOOTH, canvas.height // SMOOTH), Image.Resampling.LANCZOS)


class Curves:
    """The curves of a metrics.jsonl to which a run adds: each line is read once."""

    def __init__(self, metrics: Path):
        self.metrics, self.read = metrics, 0  # bytes of it
        self.points: dict[str, Points] = {}

    def save(self, path: Path) -> None:
        """Draw them; no picture where there are none, as of a file that somebody deleted and a run that was over began anew."""
        with self.metrics.open("rb") as file:
            file.seek(self.read)
            add(self.points, parsed(file))
            self.read = file.tell()
        if self.points:
            replace(path, lambda temporary: draw(panels(self.points)).save(temporary, format="PNG"))  # a viewer may hold it
