"""The comparison: its statistics, what it keeps, and that a second call makes only what is missing."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fewstep import checkpoint, cli, composition, flags, world
from fewstep.compare import command, making, render, summary
from fewstep.compare.cells import (
    FIELDS_ADDED_SINCE,
    Plan,
    cell_path,
    config_of,
    kept,
    machine,
    stamp_of,
    student_digest,
    student_path,
    target_guidance,
)
from fewstep.compare.rows import BEGUN, BY_NAME, EVERY_ROW, FROM_ONE, METRICS, PARETO, ROWS, TEACHER_ROWS, functions_of
from fewstep.errors import UserError
from fewstep.evaluate import drawing, fresh_fake, store
from fewstep.weights import Adaptive


def cell(row, seed, fd):
    metrics = dict.fromkeys((*METRICS, "network_evaluations", "seconds_per_image"), 1.0) | {"fd_clip_teacher": fd}
    found = {"row": row, "seed": seed, "metrics": metrics, "updates": 10, "training_seconds": 1.0, "flops": {"student": 2}}
    return found | {"machine": "a machine", "commit": "0123456789" * 4 + "+"}


PLAN = Plan(Path("compare"), 100, 2, 4, 1)  # for what rows say of themselves: each is parsed once
QUICK = ("--groups", "2", "--group-size", "2", "--steps", "2")  # as `fewstep compare --quick` has it
SHORT = (*QUICK, "--fake.updates", "1")  # a third of an update


def small(folder, evaluations, options=SHORT, **settings):
    """A plan of small cells, in whose folder the world's own pictures stand for the teacher's sample: that takes half a minute to draw."""
    plan = Plan(folder, evaluations, 3, 24, 1, options=options, **settings)
    prompts, _, data = making.instruments(plan)
    made = {"prompts": store.sha256(prompts), "n": "72"}
    save_file({"features": data.features[:72].contiguous()}, folder / "reference.safetensors", metadata=made)
    return plan


def test_the_interval_is_students():
    mean, half = summary.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302652729 / math.sqrt(3), rel=1e-8)  # t(0.975, 2) = 4.3027
    assert math.isnan(summary.interval([1.0])[1])


def test_differences_are_paired_by_seed():
    cells = [cell("DMD", 1, 1.0), cell("DMD", 2, 5.0), cell("GNDM", 1, 0.5), cell("GNDM", 2, 4.5), cell("GNDM", 3, 99.0)]
    b = summary.summarise({(c["row"], c["seed"]): c for c in cells})[1]
    mean, half = b["paired"]["fd_clip_teacher"]
    assert mean == -0.5 and half == 0  # the seed without a partner takes no part
    assert b["metrics"]["fd_clip_teacher"][0] == pytest.approx((0.5 + 4.5 + 99) / 3)


def test_the_table_says_which_students_had_another_budget(tmp_path):
    cells = [cell("GNDM", 1, 1.0), cell("GNDM, half the cost", 1, 2.0)]
    text = render.markdown(summary.summarise({(c["row"], c["seed"]): c for c in cells}), {}, Plan(tmp_path, 300, 2, 4, 1))
    assert "others: GNDM, half the cost: 150." in text and "Expensive" not in text
    assert "others" not in render.markdown(summary.summarise({("GNDM", 1): cells[0]}), {}, Plan(tmp_path, 300, 2, 4, 1))


def test_the_table_says_what_came_before_a_student(tmp_path):
    names = (BEGUN.name, FROM_ONE[0].name, FROM_ONE[5].name)
    text = render.markdown(summary.summarise({(name, 1): cell(name, 1, 1.0) for name in names}), {}, Plan(tmp_path, 300, 2, 4, 1))
    assert (
        f"{names[1]}, {names[2]}: these begin from the finished student of {BEGUN.name!r} of the same seed, after its 600 network" in text
    )
    assert "these begin" not in render.markdown(summary.summarise({("GNDM", 1): cell("GNDM", 1, 1.0)}), {}, PLAN)


def test_the_table_says_what_a_picture_costs_and_which_code_made_it():
    """Of commits as Git shortens them, with the + of a tree that differed; a version, where there was no repository, stays."""
    one, two = cell("GNDM", 1, 1.0), cell("GNDM", 2, 1.0) | {"commit": "version 0.1.0"}
    for made, seconds in ((one, 0.25), (two, 0.75)):
        made["metrics"] |= {"network_evaluations": 4.0, "seconds_per_image": seconds}
    text = render.markdown(summary.summarise({("GNDM", 1): one, ("GNDM", 2): two}), {}, PLAN)
    assert "network evaluations per image | seconds per image |" in text and " | 4 | 0.500 ± 3.177 | " in text
    assert "0123456+ (1 cell); version 0.1.0 (1 cell)." in text
    one["commit"], more = "version 0.0.9", {("GNDM", seed): two | {"seed": seed} for seed in (2, 3)}
    text = render.markdown(summary.summarise({("GNDM", 1): one} | more), {}, PLAN)
    assert "differ: version 0.1.0 (2 cells); version 0.0.9 (1 cell)." in text


def test_the_table_says_where_a_budget_stood_and_what_a_training_took():
    """A judge that began as the teacher stopped at noise, whatever it says of itself; of two KLs the larger is the nearer."""
    logs = {"dm/score": -3.0, "weights/kl": 3.2, "weights/budget": 2.0, "weights/weight": 0.5, "weights/weight_at_cap": 0.25}
    judge = {"budget": 2.0, "fresh": 5.0, "updates": 30, "gap_error": 0.5}
    cells = {}
    above, below = {"own": 4.0, "gap": 1.0, "kls": [4.0, 5.0]}, {"own": 7.0, "gap": -2.0, "kls": [0.0, 5.0], "converged": True}
    for seed, more in ((1, above | {"converged": False}), (2, above | {"converged": True}), (3, below)):
        flops = {"student": 2e12, "teacher": 1e12}
        cells["GNDMR adaptive", seed] = cell("GNDMR adaptive", seed, 1.0) | {"trace": [logs], "judge": judge | more, "flops": flops}
    text = render.markdown(summary.summarise(cells), {}, PLAN)
    assert (
        "GNDMR adaptive: over the last quarter the KL is 1.600 ± 0.000 of its budget, the weight 0.500 ± 0.000, at its cap in 25% of the "
        "updates; a fake trained on the finished student alone finds 2.500 ± 0.000 of the budget, 0.000 ± 2.151 more than the run's own "
        "fake, after 30 updates; the larger of the two, of which each is too small on average, is 2.833 ± 1.434. In 33% of the cells the "
        "former is known to have learned"
    ) in text
    assert "| GNDMR adaptive | 3 | 10 | 3.0 |" in text


def test_the_table_says_how_far_a_distance_climbed_again():
    along = [{"fd_clip_teacher": fd, "fd_clip_data": 1.0} for fd in (9.0, 5.0, 4.0, 1.0, 4.0, 5.0, 6.0, 8.0, 10.0)]
    long = "GNDM, constant rates, thrice as long"
    text = render.markdown(summary.summarise({(long, 7): cell(long, 7, 1.0) | {"along": along}}), {}, PLAN)
    assert f"{long}, seed 7: FD to teacher has a smoothed minimum of 3.000 along the training; the last third is at 8.000, stand" in text


def test_the_table_has_as_many_digits_as_a_number_needs_whatever_its_sign():
    found = [render.number(*told) for told in ((-12.34, 0.56), (12.34, math.nan), (-9.8765, 1.0), (0.0, 0.0004))]
    assert found == ["-12.3 ± 0.6", "12.3", "-9.877 ± 1.000", "0.000 ± 0.000"]


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0.04, 2, [0.05, 0.1, 0.2, 0.5, 1, 2]), (1.1, 4.8, [1.5, 2, 3, 4]), (11, 48, [15, 20, 30, 40])],
)
def test_an_axis_has_three_ticks_at_least(low, high, found):
    assert render.ticks(low, high) == pytest.approx(found)


def test_the_fronts_picture_tells_of_students_of_half_its_training(tmp_path, monkeypatch):
    """The ones that stand in it beside the teacher: a reward's effect is not to be read from them."""
    said = []
    monkeypatch.setattr("matplotlib.axes.Axes.annotate", lambda axis, text, *told, **how: said.append(text))
    beside = ("GNDM", "DMD", "GNDMR adaptive, budget 1.5")
    names = ("teacher, 28 steps", *beside, "GNDMR, preference 0.1")
    render.plot_pareto(summary.summarise({(name, 1): cell(name, 1, 1.0) for name in names}), tmp_path / "pareto.png")
    assert {"0.1", "teacher, 28 steps", *(f"{name}, half the training" for name in beside)} == set(said)
    assert {row.cost for row in PARETO} == {2 * EVERY_ROW[name].cost for name in beside} == {2.0}


def test_hypervolume_of_known_fronts():
    assert summary.hypervolume([(1.0, 2.0)], (3.0, 1.0)) == 2.0
    assert summary.hypervolume([(1.0, 2.0), (2.0, 3.0)], (3.0, 1.0)) == 1.0 + 2.0
    assert summary.hypervolume([(1.0, 2.0), (2.0, 1.5)], (3.0, 1.0)) == 2.0  # dominated
    assert summary.hypervolume([(4.0, 2.0), (1.0, 0.5)], (3.0, 1.0)) == 0.0


def test_fronts_start_at_the_few_step_teacher_and_the_many_step_preference():
    def entry(row, fd, preference):
        return {"row": row, "metrics": {"fd_clip_teacher": (fd, 0.0), "preference": (preference, 0.0)}}

    teachers = [
        entry("teacher, 28 steps", 0.1, 1.0),
        *(entry(f"teacher, 4 steps, {s}", 3.0 + i, 9.0) for i, s in enumerate(("UniPC", "DDIM"))),
    ]
    teachers.append(entry("teacher, 4 steps, DPM-Solver++", 7.0, 9.0))
    assert summary.fronts(teachers) == {}
    points = [entry("GNDMR, preference 0.1", 1.0, 2.0), entry("GNDMR, preference 0.4", 2.0, 3.0), entry("DMDR, preference 6", 2.0, 2.0)]
    assert summary.fronts([*teachers[:2], *points]) == {}  # of a comparison under way: there is no corner yet
    assert summary.fronts([*teachers, *points]) == {"GNDMR, preference": 3.0, "DMDR, preference": 1.0}


def fronts_of(method, seed, *points, **told):
    """Cells of all a method's weights: at the points given, the others far outside every corner."""
    names = [name for name in BY_NAME if summary.method_of(name) == method]
    cells = {(name, seed): cell(name, seed, 9.0) | told for name in names}
    for name, (fd, preference) in zip(names, points, strict=False):
        cells[name, seed]["metrics"] |= {"fd_clip_teacher": fd, "preference": preference}
    return cells


def test_fronts_are_paired_by_seed_where_both_have_all_weights():
    """Areas by hand, from a corner of (3, 1)."""
    cells = {(name, seed): cell(name, seed, 3.0) for name in TEACHER_ROWS for seed in (7, 8)}
    summed = summary.summarise(cells)
    assert summary.corner(summed) == (3.0, 1.0)
    for seed, better in ((7, (1.0, 2.0)), (8, (1.0, 4.0))):
        cells |= fronts_of("GNDMR, preference", seed, better) | fronts_of("DMDR, preference", seed, (2.0, 2.0))
    pair = summary.paired_fronts(cells, summed)["GNDMR, preference"]
    assert pair.areas == {7: (2.0, 1.0), 8: (6.0, 1.0)} and pair.ratio == 4.0
    assert pair.difference == (3.0, pytest.approx(12.7062047 * 2))  # t(0.975, 1) times half the distance of 1 and 5
    text = render.note_on_pair("GNDMR, preference", pair)
    assert "seed 7 2, 1; seed 8 6, 1." in text and "ratio of 4.000" in text and "difference is 3 ± 25.41." in text
    del cells["DMDR, preference 24", 8]
    (of_one,) = summary.paired_fronts(cells, summed).values()
    assert of_one.areas == {7: (2.0, 1.0)} and render.note_on_pair("", of_one).endswith("difference is 1.")
    assert summary.paired_fronts(cells, []) == {}
    cells = {(name, 7): cell(name, 7, 9.0) for name in BY_NAME} | {key: cells[key] for key in cells if key[0] in TEACHER_ROWS}
    empty = summary.paired_fronts(cells, summed)["GNDMR, preference"]  # neither has a student inside the corner
    assert empty.areas == {7: (0.0, 0.0)} and empty.ratio is None and "ratio" not in render.note_on_pair("", empty)


def test_fronts_from_one_student_are_paired_where_it_was_one():
    cells = {(name, 7): cell(name, 7, 3.0) for name in TEACHER_ROWS}
    summed, names = summary.summarise(cells), ("GNDMR from one student, preference", "DMDR from one student, preference")
    for ends, found in (("ab", {}), ("aa", {names[0]})):
        for name, end in zip(names, ends, strict=True):
            cells |= fronts_of(name, 7, (1.0, 2.0), begun=end)
        assert summary.paired_fronts(cells, summed).keys() == set(found)


def test_drift_compares_the_last_third_with_the_smoothed_minimum():
    found = summary.drift([9.0, 5.0, 4.0, 1.0, 4.0, 5.0, 6.0, 8.0, 10.0])
    assert found.minimum == 3.0 and found.last_third == 8.0  # one low mark is no minimum: (4 + 1 + 4) / 3
    assert found.standard_error == pytest.approx(2 / math.sqrt(3))
    with pytest.raises(ValueError, match="got 5"):
        summary.drift([1.0] * 5)


@pytest.mark.parametrize("correlation, share", [(0.0, 0.35), (0.6, 0.51)])
def test_a_student_that_only_wanders_passes_the_limit_for_a_drift_half_of_the_time(correlation, share):
    """docs/method.md: twelve numbers around a mean that stays, with the spread and the correlation that those of a run have."""
    random, passed, series = np.random.default_rng(0), 0, 4000
    for _ in range(series):
        noise = random.standard_normal(12)
        for i in range(1, 12):
            noise[i] = correlation * noise[i - 1] + (1 - correlation**2) ** 0.5 * noise[i]
        found = summary.drift((0.19 + 0.05 * noise).tolist())
        above = found.last_third - found.minimum
        passed += above > 0.05 * found.minimum and above > 2 * found.standard_error
    assert passed / series == pytest.approx(share, abs=0.03)


def test_settled_reads_the_last_quarter_after_the_warm_up():
    """Through the class that the trainer uses: the scores of the last quarter and the running lag, over the budget."""
    own = Adaptive({"clip": 1.0}, budget=2.0, warmup=4, eta=0.5, cap=0.1)
    scores, lags = [-8.0] * 4 + [-20.0] * 6 + [-10.0, -14.0], [None, 1.0, None, 2.0] + [0.0] * 8
    trace = []
    for score, lag in zip(scores, lags, strict=True):
        trace.append({"dm/score": score} | {f"weights/{key}": value for key, value in own.observe(score, lag).items()})
        trace.append({"loss": 0.0})  # an update that reused an evaluation heard no KL
    found = summary.settled(trace)
    last = [logs for logs in trace if "weights/budget" in logs][-2:]
    lag = [(0.8**7) * 1.2, (0.8**8) * 1.2]  # of two lags of 1 and 2, the second at a fifth, and the zeros after them
    assert found.kl_over_budget == pytest.approx((24 + sum(lag)) / 2 / own.b)
    assert found.weight == pytest.approx(sum(logs["weights/weight"] for logs in last) / 2)
    assert found.at_cap == sum(logs["weights/weight_at_cap"] for logs in last) / 2
    assert abs(last[-1]["weights/kl"] / own.b - found.kl_over_budget) > 0.05  # the running mean lies elsewhere


@pytest.fixture
def no_distances_by_step(monkeypatch):
    """They cost as much as a sample; the quick comparison takes them."""
    monkeypatch.setattr(making, "fd_per_step", lambda *told: [])


@pytest.fixture
def no_pictures(no_distances_by_step, monkeypatch):
    """For what a cell tells of its training alone: a sample costs as much as three updates."""
    monkeypatch.setattr(making, "observe_pipeline", lambda *told, **how: {})
    monkeypatch.setattr(making, "measure", lambda *told: {})


@pytest.mark.usefixtures("no_distances_by_step")
def test_measuring_along_the_training_changes_nothing(tmp_path):
    """Two marks over three updates: after the second, and after the last."""
    plan, row = small(tmp_path, 120), EVERY_ROW["GNDM"]
    plain, marked = (making.run_cell(plan, r, 0) for r in (row, row._replace(marks=2)))
    timing = {"seconds_per_image"}
    assert {k: v for k, v in plain["metrics"].items() if k not in timing} == {k: v for k, v in marked["metrics"].items() if k not in timing}
    assert "along" not in plain and [m["evaluations"] >= 60 for m in marked["along"]] == [True, True]
    assert [m["update"] for m in marked["along"]] == [2, 3] and plain["updates"] == 3
    assert marked["along"][-1]["fd_clip_teacher"] == marked["metrics"]["fd_clip_teacher"]  # the last mark is the finished student


@pytest.mark.usefixtures("no_pictures")
def test_a_rows_cost_is_a_share_of_the_plans(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(making, "TOLD_EVERY", 0.0)
    plan, row = small(tmp_path, 120), EVERY_ROW["GNDM"]
    half = making.run_cell(plan, row._replace(cost=0.5), 0)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "  GNDM, seed 0: 0% of its training" and 50 <= int(second[len("  GNDM, seed 0: ") :].partition("%")[0]) < 100
    assert 60 <= sum(half["costs"][name] for name in making.NETWORKS) < 120 and half["updates"] == 2  # of the three of the whole


def test_a_teachers_sample_of_another_plan_is_drawn_anew(tmp_path, monkeypatch, capsys):
    plan, opened = small(tmp_path, 300), []
    monkeypatch.setattr(drawing, "TEACHER_STEPS", 1)
    monkeypatch.setattr(drawing, "open_pipeline", lambda *told, own=drawing.open_pipeline: opened.append(told) or own(*told))
    standing_in = making.reference(plan, world.TEACHER_GUIDANCE)
    assert len(standing_in) == 72 and not opened
    other = dataclasses.replace(plan, prompts=36, images_per_prompt=2)  # as many, of other prompts
    for _ in range(2):
        drawn = making.reference(other, world.TEACHER_GUIDANCE)
        assert drawn.shape == standing_in.shape and not bool((drawn == standing_in).all())
    assert len(opened) == 1  # and kept
    path = tmp_path / "reference.safetensors"
    start = path.read_bytes()[:100]
    path.unlink()  # `drawn` is that file, mapped
    path.write_bytes(start)
    making.reference(dataclasses.replace(plan, prompts=2), world.TEACHER_GUIDANCE)
    assert f"{path}: damaged (" in capsys.readouterr().out
    assert len(opened) == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_reward_with_a_price_uses_up_the_budget(tmp_path):
    plan, row = small(tmp_path, 600), EVERY_ROW["GNDMR, expensive reward"]
    cell = making.run_cell(plan, row, 0)
    spent = sum(cell["costs"][name] for name in making.NETWORKS) + row.price * cell["costs"]["preference"]
    an_update = spent / cell["updates"]
    assert 1200 <= spent < 1200 + an_update and row.price * cell["costs"]["preference"] > 0.7 * spent
    assert stamp_of(plan, row.name, 0)["price"] == row.price and "price" not in stamp_of(plan, "GNDM", 0)


@pytest.mark.usefixtures("no_distances_by_step")
def test_a_row_begins_from_the_student_that_another_left(tmp_path, monkeypatch):
    plan, row, seen = small(tmp_path, 30), FROM_ONE[0], []
    monkeypatch.setattr(making, "observe_pipeline", lambda plan, pipe, **how: seen.append(pipe.unet.state_dict()) or {})
    monkeypatch.setattr(making, "measure", lambda *told: {})
    earlier = student_path(plan, row.begins, 0) / "checkpoints" / "step-00000009"
    earlier.mkdir(parents=True)  # of a cell that was made with other settings
    made = making.run_cell(plan, EVERY_ROW[row.begins], 0)
    (left,) = earlier.parent.iterdir()
    begun = making.run_cell(plan, row._replace(cost=0.0), 0)
    assert made["updates"] > 0 == begun["updates"] and all(bool((seen[0][name] == value).all()) for name, value in seen[1].items())
    assert begun["begun"] == checkpoint.digest(left / "state.safetensors") and "begun" not in made
    assert stamp_of(plan, row.name, 0)["begins"] == stamp_of(plan, row.begins, 0) and "begins" not in stamp_of(plan, row.begins, 0)


def test_every_row_can_be_built_and_names_a_baseline_before_it():
    names = []
    for row in EVERY_ROW.values():
        config = config_of(PLAN, row, 3)
        assert config.seed == 3
        composition.resolve_rewards(config, functions_of(config))
        assert {row.baseline, row.begins} <= {None, *names}
        names.append(row.name)
    paths = [cell_path(PLAN, name, 0) for name in names]
    assert len(set(paths)) == len(names) and len(set(names)) == len(names)


def test_a_student_of_the_unguided_teacher_is_compared_with_it():
    def target(name):
        return target_guidance(PLAN, BY_NAME[name])

    unguided = [name for name in BY_NAME if target(name) == 1]
    assert unguided and all("guidance 1" in name for name in unguided)
    assert target("GNDM") == world.TEACHER_GUIDANCE != 1
    assert stamp_of(PLAN, "GNDM, guidance 1", 0)["target_guidance"] == 1


def test_a_kept_cell_is_used_only_if_made_in_the_same_way(tmp_path, capsys):
    plan = Plan(tmp_path, 100, 2, 4, 1)
    assert kept(plan) == {}
    for row in ("GNDM", "teacher, 28 steps", "a row of another day"):
        path = cell_path(plan, row, 0)
        path.parent.mkdir(exist_ok=True)
        stamp = stamp_of(plan, row, 0) if "day" not in row else {}
        path.write_text(json.dumps({"stamp": stamp, "row": row, "seed": 0}))
    (tmp_path / "cells" / "._gndm-seed0.json").write_bytes(b"\0\5\26\xff")  # as a Mac leaves them on another system's disk
    assert kept(plan).keys() == {("GNDM", 0), ("teacher, 28 steps", 0)}
    assert capsys.readouterr().out == "a-row-of-another-day-seed0.json: of no row that is known, not used\n"
    longer = Plan(tmp_path, 200, 2, 4, 1)  # of a student's training: the teacher's cell stays what it is
    assert kept(longer).keys() == {("teacher, 28 steps", 0)}
    assert "gndm-seed0.json: made with other settings, not used" in capsys.readouterr().out
    for other in (Plan(tmp_path, 100, 3, 4, 1), Plan(tmp_path, 100, 2, 5, 1)):  # another sample: the teacher's distances are not its
        assert kept(other) == {}
    for text in ('{"stamp": {"con', "{}", "null", "5"):
        cell_path(plan, "GNDM", 0).write_text(text)
        assert kept(plan).keys() == {("teacher, 28 steps", 0)} and "gndm-seed0.json: damaged, not used" in capsys.readouterr().out


def test_a_stamp_has_what_a_rows_training_costs(monkeypatch):
    """A row whose share is another than it was is made anew."""
    row = EVERY_ROW["GNDM, half the cost"]
    before = stamp_of(PLAN, row.name, 0)
    monkeypatch.setitem(BY_NAME, row.name, row._replace(cost=0.25))
    assert (before["evaluations"], stamp_of(PLAN, row.name, 0)["evaluations"]) == (50, 25)


def test_a_cell_is_kept_where_the_student_that_it_began_from_was_not(tmp_path):
    """As where cells alone are copied or committed: students are large."""
    plan, row = Plan(tmp_path, 100, 2, 4, 1), FROM_ONE[0].name
    path = cell_path(plan, row, 7)
    path.parent.mkdir()
    path.write_text(json.dumps(cell(row, 7, 1.0) | {"stamp": stamp_of(plan, row, 7), "begun": "a digest"}))
    assert kept(plan).keys() == {(row, 7)}


def test_a_cell_of_other_settings_is_replaced_only_where_one_says_so(tmp_path, monkeypatch):
    plan, row = Plan(tmp_path, 100, 2, 4, 1), EVERY_ROW["GNDM"]
    path = cell_path(plan, "GNDM", 7)
    path.parent.mkdir()
    path.write_text(json.dumps(cell("GNDM", 7, 1.0) | {"stamp": {"evaluations": 200}}))

    def refused(*_):
        raise Drawn

    monkeypatch.setattr(command, "workers", refused)
    how = {"seeds": 1, "first_seed": 7, "jobs": 1}
    with pytest.raises(UserError, match=r"1 of the cells .* other settings .*\(gndm-seed7.json\); name another folder, or .*--overwrite"):
        command.compare(plan, (row,), **how)
    for other in ({"overwrite": True}, {"first_seed": 8}):
        with pytest.raises(Drawn):
            command.compare(plan, (row,), **how | other)


@pytest.mark.parametrize(
    ("arguments", "output", "names"),
    [
        (["--rows", "GNDM", "DMD", "GNDM"], "compare", ["GNDM", "DMD"]),  # a row twice would be made twice, side by side
        (["--rows", "GNDM", "table"], "compare", ["GNDM", *(row.name for row in ROWS if row.name != "GNDM")]),
        (["--quick"], "compare-quick", ["DMD", "GNDM"]),
    ],
)
def test_the_command_asks_for_each_row_once_and_keeps_the_quick_cells_apart(monkeypatch, arguments, output, names):
    def refused(plan, rows, **how):
        raise command.CellsFailed(str([str(plan.output), *(row.name for row in rows)]))

    monkeypatch.setattr(command, "compare", refused)
    with pytest.raises(UserError) as asked:
        cli.compare_command(arguments)
    assert str(asked.value) == str([output, *names])


def test_a_picture_of_fronts_goes_with_their_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "compare", lambda *told, **how: [])
    monkeypatch.setattr(command, "plot", lambda *told: None)
    for name in ("pareto.png", "compare.md"):
        (tmp_path / name).touch()
    assert cli.compare_command(["--output", str(tmp_path)]) == 0 and not (tmp_path / "pareto.png").exists()


@pytest.mark.parametrize("draw", [render.plot, render.plot_pareto])
def test_plots_leave_the_callers_backend_alone(draw, tmp_path, monkeypatch):
    """As a notebook's, which shows no picture any more once it is another."""
    monkeypatch.setattr("matplotlib.use", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    draw(summary.summarise({(row, 1): cell(row, 1, 1.0) for row in ("DMD", *(row.name for row in PARETO))}), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("draw", [render.plot, render.plot_pareto])
def test_a_picture_that_finds_no_room_leaves_the_last_one_and_names_its_folder(tmp_path, monkeypatch, draw):
    def full(figure, file, **told):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rows = summary.summarise({(name, 1): cell(name, 1, 1.0) for name in ("teacher, 28 steps", "GNDMR, preference 0.1")})
    (tmp_path / "a.png").write_text("earlier")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError) as told:
        draw(rows, tmp_path / "a.png")
    assert told.value.filename == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_text() == "earlier"


class Pool:
    """Makes cells in this process."""

    def __init__(self, *_, **__): ...
    def shutdown(self, **_): ...
    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def test_a_cell_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    def make(plan, row, seed):
        if row == "DMD":
            raise FloatingPointError("the loss is nan")
        return cell(row, seed, 1.0)

    monkeypatch.setattr(command, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(command, "make_cell", make)
    monkeypatch.setattr(command, "reference", lambda plan, guidance: None)
    plan = Plan(tmp_path, 100, 2, 4, 1)
    rows = (EVERY_ROW["DMD"], EVERY_ROW["GNDM"])
    with pytest.raises(command.CellsFailed, match=r"(?s)1 of 6 cells failed.*DMD, seed 7: FloatingPointError"):
        command.compare(plan, rows, seeds=1, first_seed=7, jobs=1)
    assert "| GNDM | 1 |" in (tmp_path / "compare.md").read_text() and "FAILED" in (said := capsys.readouterr().out)
    assert "guidance 1" not in said
    # the unguided teacher is drawn where a student is compared with it
    command.compare(plan, (EVERY_ROW["GNDM, guidance 1"],), seeds=1, first_seed=7, jobs=1)
    assert "teacher, 28 steps, guidance 1, seed 7" in capsys.readouterr().out


def test_a_row_that_others_begin_from_comes_first(tmp_path, monkeypatch, capsys):
    """Also where nobody asked for it, and again where its student was not kept; where it fails they are not tried."""
    plan, made, rows = Plan(tmp_path, 100, 2, 4, 1), [], (FROM_ONE[0], EVERY_ROW["GNDM"])
    failing = set()

    def make(plan, row, seed):
        made.append(row)
        if row in failing:
            raise FloatingPointError("the loss is nan")
        if row == BEGUN.name:
            shutil.rmtree(student_path(plan, row, seed), ignore_errors=True)
            checkpoint.save(student_path(plan, row, seed) / "checkpoints", 1, {"student": torch.tensor(float(len(made)))})
        found = cell(row, seed, 1.0) | {"stamp": stamp_of(plan, row, seed), "begun": student_digest(plan, BEGUN.name, seed)}
        cell_path(plan, row, seed).parent.mkdir(exist_ok=True)
        cell_path(plan, row, seed).write_text(json.dumps(found))
        return found

    def again(**how):
        made.clear()
        command.compare(plan, rows, seeds=1, first_seed=7, jobs=1, **how)
        return [name for name in made if name not in TEACHER_ROWS]

    monkeypatch.setattr(command, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(command, "make_cell", make)
    monkeypatch.setattr(command, "reference", lambda plan, guidance: None)
    failing.add(BEGUN.name)
    with pytest.raises(
        command.CellsFailed, match=f"(?s)2 of 7 cells failed.*{rows[0].name}, seed 7: .*it begins from, of {BEGUN.name}, could"
    ):
        again()
    failing.clear()
    assert again() == [BEGUN.name, rows[0].name] and again() == []
    cell_path(plan, rows[0].name, 7).unlink()
    assert again() == [rows[0].name]  # the student is there
    cell_path(plan, rows[0].name, 7).unlink()
    (kept_one,) = (student_path(plan, BEGUN.name, 7) / "checkpoints").iterdir()
    shutil.rmtree(kept_one)  # its folder is no student
    with pytest.raises(UserError, match=r"without the student that others begin from \(dmd--twice-as-long-seed7.json\)"):
        again()
    assert again(overwrite=True) == [BEGUN.name, rows[0].name]
    (kept_one / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="manifest.json: unreadable manifest .*; this student is trained again"):
        assert student_digest(plan, BEGUN.name, 7) is None
    checkpoint.save(kept_one.parent, 2, {"student": torch.zeros(())}, keep=1)
    capsys.readouterr()
    assert again(overwrite=True) == [rows[0].name]  # it began from another than this one
    assert "0-02-seed7.json: begun from another student of 'DMD, twice as long' than the one that is there" in capsys.readouterr().out


def test_what_is_left_is_told_by_what_cells_cost(tmp_path, monkeypatch, capsys):
    """Of ten units of cost seven are left after the first three."""
    monkeypatch.setattr(command, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(command, "reference", lambda plan, guidance: None)
    monkeypatch.setattr(command, "made_in", lambda pool, plan, keys: ((key, cell(*key, 1.0)) for key in keys))
    monkeypatch.setattr(command, "work", lambda key: {"GNDM": 7.0, "teacher, 28 steps": 3.0}.get(key[0], 0.0))
    clock = iter([0.0] + [180.0] * 9)
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    command.compare(Plan(tmp_path, 100, 2, 4, 1), (EVERY_ROW["GNDM"],), seeds=1, first_seed=7, jobs=1)
    said = capsys.readouterr().out
    assert "1/5  teacher, 28 steps, seed 7: FD to teacher 1.000; about 7 min left" in said
    assert "5/5  GNDM, seed 7: FD to teacher 1.000; about 0 min left" in said


class Drawn(Exception):
    """Raised where a sample would have been drawn."""


@pytest.mark.parametrize("name", TEACHER_ROWS)
def test_a_teachers_cell_is_drawn_with_its_rows_solver(tmp_path, monkeypatch, name):
    plan, row, asked = Plan(tmp_path, 100, 2, 4, 1), TEACHER_ROWS[name], []

    def observe(plan, pipe, **how):
        asked.append((type(pipe.scheduler).__name__, how))
        raise Drawn

    monkeypatch.setattr(making, "observe_pipeline", observe)
    with pytest.raises(Drawn):
        making.run_teacher_cell(plan, row, 3)
    own = type(drawing.open_pipeline(world.TEACHER, "cpu").scheduler).__name__
    kind = drawing.SOLVERS[row.solver] if row.solver else own
    assert asked == [(kind, {"steps": row.steps, "guidance": row.guidance, "seed": 3})]


@pytest.mark.timeout(600)  # a minute of one quiet core
def test_a_quick_comparison_from_end_to_end_and_again(tmp_path, capsys):
    """The first call makes what is missing beside what was kept, in processes of its own; the second finds all that the first made."""
    folder = tmp_path / "compare"
    folder.mkdir()
    (folder / "cells").mkdir()
    plan = small(folder, 200, QUICK)
    for teacher in (
        "teacher, 28 steps",
        "teacher, 4 steps, DDIM",
        "teacher, 4 steps, UniPC",
    ):  # a teacher's row takes as long as a student's
        made = {"stamp": stamp_of(plan, teacher, 100), "commit": "0"}
        cell_path(plan, teacher, 100).write_text(json.dumps(cell(teacher, 100, 0.1) | made))
    assert cli.main(["compare", "--quick", "--output", str(folder)]) == 0
    assert "3 of 6 cells are there; making 3" in capsys.readouterr().out
    report = json.loads((folder / "compare.json").read_text())
    assert [row["row"] for row in report["rows"]][-2:] == ["DMD", "GNDM"] and report["rows"][-1]["paired"]
    students = [c for c in report["cells"] if "costs" in c]
    assert (
        len(students) == 2
        and all(sum(c["costs"][name] for name in making.NETWORKS) >= 200 for c in students)
        and all("commit" in c and "machine" in c for c in report["cells"])
    )
    assert all(len(c["fd_clip_teacher_per_step"]) == 2 and min(c["fd_clip_teacher_per_step"]) > 0 for c in students)
    # the last step's prediction is the sample: drawn with other noise than the pipeline's, its distance is of the same size
    assert all(0.3 < c["fd_clip_teacher_per_step"][-1] / c["metrics"]["fd_clip_teacher"] < 3 for c in students)
    assert (folder / "compare.png").stat().st_size > 1000 and "| GNDM | 1 |" in (folder / "compare.md").read_text()
    # the lag of each rollout but the first: equal costs are as many updates as in the cells that are committed
    traces = [json.loads(path.read_text()).get("trace", []) for path in (folder / "cells").iterdir()]
    lags = [["dm/lag" in logs for logs in trace] for trace in traces if trace]
    assert len(lags) == 2 and all(lag == [False] + [True] * (len(lag) - 1) and len(lag) > 2 for lag in lags)
    assert cli.main(["compare", "--quick", "--output", str(folder)]) == 0
    assert "6 of 6 cells are there; making 0" in capsys.readouterr().out
    assert json.loads((folder / "compare.json").read_text()) == report


@pytest.mark.usefixtures("no_pictures")
def test_an_adaptive_cell_is_judged_by_a_fresh_fake(tmp_path, monkeypatch):
    quick = functools.partial(fresh_fake.fresh_kl, batches=4)  # of sixteen, which take longer than the training
    monkeypatch.setattr(fresh_fake, "fresh_kl", quick)
    plan, row = small(tmp_path, 250, judge_updates=4), EVERY_ROW["GNDMR adaptive"]
    plan.output.joinpath("cells").mkdir()
    cell = making.run_cell(plan, row._replace(flags=(*row.flags, "--weights.warmup", "3", "--weights.budget", "2")), 0)
    judged = cell["judge"]
    stood = summary.settled(cell["trace"])
    assert 0 < stood.kl_over_budget < 10 and stood.weight > 0
    assert judged["budget"] > 0 and judged["gap"] == pytest.approx(judged["fresh"] - judged["own"])
    assert judged["updates"] == 1 + 1 + 2 and len(judged["kls"]) == len(judged["heldout"]) == 4 and json.dumps(cell)
    assert judged["kls"][0] == judged["own"]  # it begins as the run's fake
    # two rewards share each decoded picture, and both go backward through it
    costs, flops = cell["costs"], cell["flops"]
    assert costs["clip"] == costs["preference"] == costs["decoder"] > 0 and costs["decoder"] % 3 == 0
    assert flops["student"] / costs["student"] == flops["teacher"] / costs["teacher"] > 1e7
    assert all(flops[name] > 0 for name in ("decoder", "clip", "preference"))


ORPHANS = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from fewstep.rewards.serve import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "parent.py").write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it is there
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] if Path("/proc").is_dir() else ""
            os.kill(worker, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":  # ended, and nobody has asked for its exit status
            return
        time.sleep(0.05)
    os.kill(worker, 9)
    raise AssertionError("the worker outlived its parent by 30 s")


SLOW = """
import os, pathlib, time

def reference(plan, guidance): ...

def make_cell(plan, row, seed):
    (plan.output / f"begun-{row}-{seed}").touch()
    time.sleep(600)
"""
STOPPED = """
import signal, sys
import slow
from fewstep import cli
from fewstep.compare import command

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs begin without
    command.make_cell, command.reference = slow.make_cell, slow.reference
    sys.exit(cli.main(["compare", "--rows", "GNDM", "--jobs", "1", "--output", sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("hears", ["all, as from a terminal", "the first alone"])
def test_ctrl_c_ends_a_comparison_in_the_middle_of_a_cell(tmp_path, hears):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "script.py").write_text(STOPPED)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out")]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        while not list(tmp_path.glob("out/begun-*")):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        (os.killpg if hears.startswith("all") else os.kill)(first.pid, signal.SIGINT)
        _, said = first.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 130 and "Every finished cell is kept: the same call goes on" in said
    assert len(list(tmp_path.glob("out/begun-*"))) == 1


def killed(plan, row, seed):
    os._exit(9)


def no_sample(plan, guidance):
    raise OSError("no room")


def nothing_drawn(plan, guidance): ...


@pytest.mark.parametrize(
    ("function", "stand_in", "words"),
    [("make_cell", killed, "a process was killed.*fewer --jobs"), ("reference", no_sample, "the teacher's sample.*'no room'")],
)
def test_what_ends_every_cell_is_said_once(tmp_path, monkeypatch, capsys, function, stand_in, words):
    monkeypatch.setattr(command, "reference", nothing_drawn)
    monkeypatch.setattr(command, function, stand_in)
    with pytest.raises(command.CellsFailed, match=words):
        command.compare(Plan(tmp_path, 100, 2, 4, 1), (EVERY_ROW["GNDM"],), seeds=1, first_seed=7, jobs=1)
    assert "FAILED" not in capsys.readouterr().out


def test_fields_that_came_after_the_first_cells_leave_their_stamps_alone(tmp_path):
    plan = Plan(tmp_path, 100, 2, 4, 1)
    anywhere = {"output": "", "device": "cpu", "precision": "bf16"}
    plain = flags.as_plain(config_of(plan, EVERY_ROW["GNDM"], 100)) | anywhere
    first = {key: value for key, value in plain.items() if key not in FIELDS_ADDED_SINCE}
    first["matching"] = {key: value for key, value in first["matching"].items() if f"matching.{key}" not in FIELDS_ADDED_SINCE}
    first["weights"] = plain["weights"] | {"budget": 1.5}  # the default of then, which this row does not read
    assert stamp_of(plan, "GNDM", 100)["config"] == store.sha256(first)
    for turned in ("--memory.checkpointing", "--matching.level-density=shifted", "--matching.negative-prompt=blurry"):
        other = dataclasses.replace(plan, options=(*plan.options, turned))
        assert stamp_of(other, "GNDM", 100)["config"] != store.sha256(first)
    budgets = [stamp_of(plan, name, 100)["config"] for name in ("GNDMR adaptive", "GNDMR adaptive, budget 1.5")]
    read = dataclasses.replace(plan, options=("--weights.budget", "1.5"))
    assert budgets[0] != budgets[1] == stamp_of(read, "GNDMR adaptive", 100)["config"]


def test_a_stamp_is_the_same_on_every_machine(tmp_path):
    """The committed cells are read wherever the table is made; what each was made on is written beside it."""
    bf16, fp32 = (Plan(tmp_path, 100, 2, 4, 1, options=("--precision", name)) for name in ("bf16", "fp32"))
    assert stamp_of(bf16, "GNDM", 100) == stamp_of(fp32, "GNDM", 100)
    machines = [machine(plan, "GNDM") for plan in (bf16, fp32)]
    assert ", bf16, torch" in machines[0] and machines[1] == machines[0].replace("bf16", "fp32")


def test_a_training_that_ends_within_its_warm_up_has_a_row_all_the_same():
    """Without a budget there is nothing to settle at, and of few marks nothing that drifts."""
    judged = {"judge": {"budget": None, "fresh": 1.0, "gap": 0.0, "updates": 2}, "trace": [{"weights/kl": 1.0, "dm/score": -1.0}]}
    of_few_marks, long = {"along": [{"fd_clip_teacher": 1.0}] * 5}, "GNDM, constant rates, thrice as long"
    rows = summary.summarise({("GNDMR adaptive", 1): cell("GNDMR adaptive", 1, 0.5) | judged, (long, 1): cell(long, 1, 0.5) | of_few_marks})
    assert len(rows) == 2 and not any(key in row for row in rows for key in ("settled", "drift"))
    assert "GNDMR adaptive" in render.markdown(rows, {}, PLAN)
    with pytest.raises(ValueError, match="no budget was set"):
        summary.settled(judged["trace"])
