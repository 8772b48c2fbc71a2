"""What a run leaves to look at."""

import functools
import json
import math
from array import array
from itertools import cycle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from fewstep.report import curves, grid

LOGS = [
    {"update": 1, "dm/score": -1.0, "grad_norm": 2.0, "unknown": 7.0},
    {"update": 2, "dm/score": -2.0, "clip/score": 50.0, "clip/judge/a": 0.3, "weights/kl": 3.0, "weights/weight": 0.1, "clip/weight": 0.1},
    {"update": 3, "dm/score": -3.0, "clip/score": 51.0, "clip/judge/a": 0.4, "weights/kl": 2.0, "weights/budget": 4.5, "reuse/ess": 0.9},
]


def curve(*points):
    return array("d", [number for point in points for number in point])


def panels(logs):
    return curves.panels(curves.add({}, logs))


def test_what_updates_log_is_sorted_into_panels_in_the_order_of_the_table():
    found = panels(LOGS)
    assert list(found) == [
        "KL to the teacher, nats", "clip: score", "dm: score", "clip: held-out judge a", "weight of the other rewards",
        "effective sample size of reused evaluations", "gradient norm of the student",
    ]  # fmt: skip
    assert found["KL to the teacher, nats"] == {"KL": curve((2, 3.0), (3, 2.0)), "budget": curve((3, 4.5))}
    assert found["dm: score"] == {"score": curve((1, -1.0), (2, -2.0), (3, -3.0))}
    assert found["weight of the other rewards"] == {"all": curve((2, 0.1)), "clip": curve((2, 0.1))}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=130))
def test_stretches_of_a_curve_are_all_of_it(values):
    found = curves.binned(curve(*enumerate(values, 1)), bins=7)
    sizes = []
    for middle, *_ in found:  # of updates that follow one another, which begin where the last stretch ended
        sizes.append(2 * (middle - sum(sizes)) - 1)
    assert len(found) == min(7, len(values)) and max(sizes) - min(sizes) <= 1 and sum(sizes) == len(values)
    assert min(one[2] for one in found) == min(values) and max(one[3] for one in found) == max(values)
    assert all(low <= mean + 1e-9 and mean <= high + 1e-9 for _, mean, low, high in found)
    whole = math.fsum(size * one[1] for size, one in zip(sizes, found, strict=True)) / len(values)
    assert whole == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    if len(values) % 7 == 0:  # equally many in each: the mean of the means is the mean
        assert math.fsum(one[1] for one in found) / 7 == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
        assert found[0][0] == (1 + len(values) // 7) / 2


def test_a_stretch_is_of_four_points_where_there_are_enough():
    """The lag of a run of 305 updates is measured 38 times, with a spread as large as itself."""
    assert [curves.stretches(n) for n in (1, 3, 10, 38, 44, 160, 5000)] == [1, 3, 10, 10, 11, 40, 40]
    found = curves.draw_panel("lag", {"dm": curve(*((n, (-1.0) ** n) for n in range(1, 41)))}, 40)  # all that it draws is the mean, 0
    line = [y for y in range(found.height) if found.getpixel((found.width // 2, y)) == (0, 0x72, 0xB2)]
    assert line and max(line) - min(line) < 3 * curves.SMOOTH


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_within(low, span):
    high = low + span
    found = curves.ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high), span)
    assert 1 <= len(found) <= 4 and low - slack <= found[0] and found[-1] <= high + slack
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[:1].repeat(len(steps)), rtol=1e-6, atol=slack)


def test_ticks_are_round():
    assert curves.ticks(-0.3, 3.2) == [0, 1, 2, 3] and curves.ticks(12, 47) == [20, 30, 40]
    assert curves.ticks(0.011, 0.019) == pytest.approx([0.012, 0.014, 0.016, 0.018])
    with pytest.raises(ValueError, match="below"):
        curves.ticks(1.0, 1.0)


def test_a_curve_stands_where_its_numbers_are():
    """From 0 to 1 over the run, and a second one that stays at 1: in the middle of the picture the first is half way up."""
    rising = curve(*((update, update / 100) for update in range(1, 101)))
    drawn = np.asarray(curves.draw_panel("a title", {"a": rising, "b": curve((50, 1.0), (100, 1.0))}, 100)).astype(int)
    zoom, wide, high = curves.SMOOTH, curves.WIDTH - curves.LEFT - curves.RIGHT, curves.HEIGHT - curves.TOP - curves.BOTTOM

    def rows_of(colour, update):
        column = drawn[:, round((curves.LEFT + wide * update / 100) * zoom)]
        found = np.flatnonzero((column == ImageColor.getrgb(colour)).all(1))
        return found[found > curves.TOP * zoom]  # below the names

    def row_of(value):
        low, top = curves.bounds([curves.binned(rising, curves.BINS), [(0, 1.0, 1.0, 1.0)]])
        return (curves.TOP + high * (top - value) / (top - low)) * zoom

    for update in (20, 50, 80):
        assert abs(rows_of(curves.COLOURS[0], update).mean() - row_of(update / 100)) < 2
    assert abs(rows_of(curves.COLOURS[1], 75).mean() - row_of(1.0)) < 2 and not len(rows_of(curves.COLOURS[1], 25))


def test_a_panel_holds_all_that_its_curves_are_means_of():
    """Least and largest value with a twentieth of their distance above and below; around a curve that stays where it is, too."""
    means = [[(1.0, 2.0, 0.0, 3.0), (2.0, 4.0, 3.5, 5.0)], [(1.0, 6.0, 6.0, 10.0)]]
    assert curves.bounds(means) == (-0.5, 10.5)
    assert curves.bounds([[(1.0, -2.0, -2.0, -2.0)]]) == (-2.1, -1.9) and curves.bounds([[(1.0, 0.0, 0.0, 0.0)]]) == (-1.0, 1.0)


def test_every_panel_ends_where_the_run_has_come_to(monkeypatch):
    ends = []
    monkeypatch.setattr(curves, "draw_panel", lambda title, found, last: ends.append(last) or Image.new("RGB", (8, 8)))
    curves.draw(panels(LOGS))  # of curves whose last points are of the first, the second and the third update
    assert ends == [3] * 7


@pytest.mark.parametrize("logs", [LOGS, LOGS[:1], [{"update": 5, "grad_norm": 0.0}]], ids=["several", "one", "a zero"])
def test_a_picture_has_room_for_every_panel(logs, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in logs) + '{"update": 9, "dm/sco')  # a kill cut the last line
    found = panels(logs)
    rows = -(-len(found) // curves.COLUMNS)
    assert curves.draw(found).size == (curves.COLUMNS * curves.WIDTH, rows * curves.HEIGHT)
    curves.Curves(path).save(tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (curves.COLUMNS * curves.WIDTH, rows * curves.HEIGHT)


def test_a_run_that_logged_nothing_has_no_curves(tmp_path):
    with pytest.raises(ValueError, match="no curves"):
        curves.draw(panels([{"update": 1, "unknown": 1.0}]))
    (tmp_path / "metrics.jsonl").write_text("")
    curves.Curves(tmp_path / "metrics.jsonl").save(tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_takes_the_place_of_another_whole(tmp_path):
    """On Windows none is written into while a viewer holds it."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LOGS[0]) + "\n")
    tiles = {"student": torch.zeros(1, 1, 3, 2, 2)}
    for draw in (curves.Curves(tmp_path / "metrics.jsonl").save, functools.partial(grid.save, tiles, [""])):
        (tmp_path / "drawn.png").write_text("held")
        (tmp_path / "held").unlink(missing_ok=True)
        (tmp_path / "held").hardlink_to(tmp_path / "drawn.png")
        draw(tmp_path / "drawn.png")
        assert (tmp_path / "held").read_text() == "held" and (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "drawn.png", "held"}


def test_each_line_is_read_once_and_no_more_is_kept_than_what_has_a_curve(monkeypatch, tmp_path):
    path, read = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(curves, "parsed", lambda lines: [read.append(line) or json.loads(line) for line in lines])
    growing = curves.Curves(path)
    for one in LOGS:
        with path.open("a") as file:
            file.write(json.dumps(one) + "\n")
        growing.save(tmp_path / "curves.png")
    assert [json.loads(line) for line in read] == LOGS
    assert curves.panels(growing.points) == panels(LOGS) and growing.points.keys().isdisjoint(("update", "unknown"))
    whole = tmp_path / "whole.png"
    curves.Curves(path).save(whole)
    assert whole.read_bytes() == (tmp_path / "curves.png").read_bytes()


def test_curves_of_many_rewards_are_told_apart():
    """Names that take more than a line make the panel higher, none leaves it, and no two lines look alike."""
    logs = [{"update": u, "dm/share": 0.5} | {f"reward_{i}/share": 0.1 * i for i in range(13)} for u in (1, 100)]
    (title, found), *_ = panels(logs).items()
    names, drawn = list(found), np.asarray(curves.draw_panel(title, found, 100)).astype(int)
    heads = curves.heads(names)
    assert heads[0] == (curves.LEFT, 0) and len(set(heads)) == 14 and heads[-1][1] > 1
    zoom, grown = curves.SMOOTH, heads[-1][1] * curves.LINE
    assert drawn.shape[:2] == ((curves.HEIGHT + grown) * zoom, curves.WIDTH * zoom)
    assert (drawn[:, -8 * zoom :] == 255).all()  # none runs over the edge
    seen = set()
    for (x, line), colour in zip(heads, cycle(curves.COLOURS), strict=False):
        row = drawn[(24 + curves.LINE * line + 8) * zoom, x * zoom : (x + curves.MARK - 6) * zoom]
        seen.add((colour, tuple((row == ImageColor.getrgb(colour)).all(1))))
    assert len(seen) == 14
    assert curves.draw(panels(logs)).size == (curves.COLUMNS * curves.WIDTH, curves.HEIGHT + grown)


def test_a_broken_line_follows_its_points():
    found = curves.dashes([(0.0, 0.0), (4.0, 0.0), (4.0, 3.0)], 3, 2)
    assert found == [[(0, 0), (3, 0)], [(4, 1), (4, 3)]]
    assert curves.dashes([(0.0, 0.0), (4.0, 0.0), (4.0, 3.0)], 5, 3) == [[(0, 0), (4, 0), (4, 1)]]
    assert curves.dashes([(1.0, 1.0)], 5, 3) == []


def test_a_grid_has_each_sample_in_the_row_of_its_prompt_under_its_model():
    """Of 8 x 8 pixels, and enlarged twelve times; clipped and rounded as a picture that is saved."""
    green = torch.arange(12).view(2, 2, 3) * 20 + 5.4  # of model, prompt and sample
    colour = torch.stack([torch.full_like(green, 300), green, torch.full_like(green, -40)], -1) / 255
    images = colour[..., None, None].expand(2, 2, 3, 3, 8, 8)
    drawn = np.asarray(grid.draw({"teacher": images[0], "student": images[1]}, ["a cat", "a dog"])).astype(int)
    found = [row[(row[:, 0] == 255) & (row[:, 2] == 0), 1].tolist() for row in drawn]
    rows = [row for row in found if row]
    wanted = [[20 * i + 5 for model in (0, 6) for i in range(model + prompt, model + prompt + 3)] for prompt in (0, 3)]
    assert rows == [[one for one in row for _ in range(96)] for row in wanted for _ in range(96)]


@pytest.mark.parametrize(("edge", "shown"), [(8, 96), (40, 120), (64, 128), (96, 96), (100, 100)])
def test_no_picture_of_a_grid_is_smaller_than_it_can_be_looked_at(edge, shown):
    size = (grid.LABEL + shown + 2 + 2 * grid.GAP, grid.HEAD + shown + 2 + grid.GAP)
    assert grid.draw({"student": torch.zeros(1, 1, 3, edge, edge)}, [""]).size == size
