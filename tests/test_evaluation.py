"""Evaluation of any model: drawn part by part, stopped and gone on with, shared among processes, with a stamp on every number."""

import functools
import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import fidelity
import forked
import fresh
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from test_evaluate import MEAN, PREPROCESS, STD, tiny_clip, tiny_tokenizer
from test_evaluate import tiny_pipeline as other_pipeline
from test_remote import Faulty, served

from fewstep import cli, export, models, world
from fewstep.config import Config, MatchingConfig
from fewstep.errors import UserError
from fewstep.evaluate import configs, distances, drawing, evaluation, features, protocol, samples, store, tables
from fewstep.evaluate import measure as measuring
from fewstep.evaluate.command import load_judges, measure_student, source_of
from fewstep.evaluate.distances import FeatureSet, bootstrap, frechet, gaussian, jackknife, kernel_distance, polynomial, precision_recall
from fewstep.evaluate.features import Extractor
from fewstep.evaluate.measure import measure
from fewstep.evaluate.pictures import Pictures
from fewstep.evaluate.sets import PromptSet
from fewstep.evaluate.store import Rows
from fewstep.flags import as_plain
from fewstep.rewards import sources
from fewstep.rewards.clip import CLIPScore

# Measuring what lies on disk


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NET = Extractor("net", "fid", "kid", False, None, 12)
UNIT = Extractor("unit", "fd_clip", "cmmd", True, None, 8)


@pytest.fixture
def sample():
    """60 prompts with 2 pictures each: what was seen, and real and teacher's features as distances take them."""
    unit = torch.nn.functional.normalize(normal(120, 8, seed=2), dim=1)
    seen = {
        "features/net": normal(120, 12, seed=1) * 0.8,
        "features/unit": unit,
        "score/bright": normal(120, seed=3),
        "utility": normal(120),
    }
    data = {"net": normal(90, 12, seed=4) + 0.4, "unit": torch.nn.functional.normalize(normal(90, 8, seed=5) + 0.3, dim=1) * 8**0.5}
    teacher = {"net": normal(120, 12, seed=6), "unit": torch.nn.functional.normalize(normal(120, 8, seed=7), dim=1) * 8**0.5}
    return seen, data, teacher


def on_disk(folder, name, tensor, size=17):
    """The same tensor in parts of 17 rows."""
    paths = [folder / f"{name.replace('/', '-')}-{i}.safetensors" for i in range(-(-len(tensor) // size))]
    for path, part in zip(paths, tensor.split(size), strict=True):
        save_file({name: part.contiguous()}, path)
    return Rows(paths, name)


PROMPTS = [f"p{i // 2}" for i in range(60)]  # every caption twice, as in COCO


def sets(features):
    return {name: FeatureSet(values) for name, values in features.items()}


def measured(seen, data, teacher, **options):
    against = {"data": sets(data), "teacher": sets(teacher)}
    return measure(seen, PROMPTS, 2, {}, extractors=[NET, UNIT], **against, draws=20, repeats=True, **options).metrics


def test_on_disk_is_in_memory(sample, tmp_path, monkeypatch):
    """Streamed and jackknifed or in memory and resampled, the values are the same; they are the textbook's."""
    seen, data, teacher = sample
    small = measured(seen, data, teacher)
    stored = [{name: on_disk(tmp_path, f"{i}/{name}", x) for name, x in part.items()} for i, part in enumerate(sample)]
    monkeypatch.setattr(measuring, "SMALL", 0)
    large = measured(*stored)
    assert list(large) == list(small) == [
        "fid_data", "kid_data", "fid_teacher", "kid_teacher", "fd_clip_data", "cmmd_data", "fd_clip_teacher", "cmmd_teacher",
        "bright", "utility", "precision", "recall", "diversity",
    ]  # fmt: skip
    for name in small:
        assert large[name]["value"] == pytest.approx(small[name]["value"], abs=1e-6), name
        assert large[name]["low"] < large[name]["value"] < large[name]["high"], name
    assert small["fid_data"]["value"] == pytest.approx(frechet(data["net"], seen["features/net"]), abs=1e-9)
    assert small["fd_clip_teacher"]["value"] == pytest.approx(frechet(teacher["unit"], seen["features/unit"] * 8**0.5), abs=1e-5)
    assert small["kid_data"]["value"] == pytest.approx(
        kernel_distance(seen["features/net"], data["net"], polynomial, unbiased=True), abs=1e-9
    )
    unit = seen["features/unit"] * 8**0.5
    for name, other in (("cmmd_data", data), ("cmmd_teacher", teacher)):  # a thousand times: so it is published
        assert small[name]["value"] == pytest.approx(1000 * kernel_distance(unit, other["unit"], gaussian, unbiased=False), abs=1e-6), name
    both = small["precision"]["value"], small["recall"]["value"]
    assert both == pytest.approx(precision_recall(data["net"], seen["features/net"]))
    assert small["bright"]["value"] == pytest.approx(float(seen["score/bright"].mean()), abs=1e-6)


@pytest.mark.parametrize("small", [2**20, 0])
def test_what_belongs_to_a_set_alone_is_made_once(sample, monkeypatch, small):
    """Of the data and of the teacher once for all samples, of a sample once for both: its numbers stay what they are."""
    monkeypatch.setattr(measuring, "SMALL", small)
    seen, data, teacher = sample
    samples = [seen, seen | {"features/net": seen["features/net"] * 1.1}]
    alone = [measured(each, data, teacher) for each in samples]
    made, fixed = [], {"data": sets(data), "teacher": sets(teacher)}
    names = {id(x): f"{what} {name}" for what, part in fixed.items() for name, x in ((n, each.features) for n, each in part.items())}

    def counted(module, function, what):
        inner = getattr(module, function)

        def call(*arguments, **options):
            made.append(what(*arguments, **options))
            return inner(*arguments, **options)

        monkeypatch.setattr(module, function, call)

    counted(distances, "root", lambda cov: f"root {len(cov)}")
    counted(distances, "radii", lambda x, k, device: (f"radii {names.get(id(x))}", device))
    counted(distances, "block_sums", lambda x, y, *rest, device: f"sums {names.get(id(x))}" if x is y else "between")
    monkeypatch.setattr(measuring, "frechet_distance", lambda *moments: 0.0)  # of the teacher's prompts that were drawn, which differ
    options = {"extractors": [NET, UNIT], "draws": 20, "repeats": True, "device": torch.device("cpu")}
    found = [measure(each, PROMPTS, 2, {}, **fixed, **options).metrics for each in samples]
    assert [made.count(f"sums {what} {name}") for what in fixed for name in data] == [1] * 4
    assert made.count("sums None") == 4 and len([each for each in made if each[0] == "radii data net"]) == 1  # two samples, two extractors
    assert ("radii data net", torch.device("cpu")) in made
    # in memory the data's alone; by the jackknife the data's and the teacher's, and the teacher's without each of 20 blocks, twice
    assert [made.count(f"root {d}") for d in (12, 8)] == ([1, 1] if small else [42, 42])
    for one, other in zip(alone, found, strict=True):
        same = [name for name in one if small == 0 or name not in ("fid_teacher", "fd_clip_teacher")]
        assert {name: one[name] for name in same} == {name: other[name] for name in same}


def test_which_intervals_are_jackknifed_is_told(monkeypatch):
    metrics = ["fid_data", "kid_data", "kid_teacher", "fd_clip_data", "cmmd_data", "clip", "recall"]
    assert measuring.jackknifed(120, 30, 40, [NET, UNIT], metrics) == ["kid_data", "kid_teacher", "cmmd_data"]
    # few pictures of many prompts, beside so many real ones that which prompt holds which of them is too much to keep
    assert measuring.jackknifed(120, 120, 2**20, [NET, UNIT], metrics) == ["kid_data", "kid_teacher", "cmmd_data", "recall"]
    monkeypatch.setattr(measuring, "SMALL", 120 * 12 - 1)
    assert measuring.jackknifed(120, 30, 40, [NET, UNIT], metrics) == ["fid_data", "kid_data", "kid_teacher", "cmmd_data", "recall"]


def test_the_jackknife_interval_covers_the_frechet_distance_of_that_size(monkeypatch):
    """Over samples of one size, 95% intervals hold the mean of their values four times out of five at least."""
    monkeypatch.setattr(measuring, "SMALL", 0)
    data, rows = FeatureSet(normal(400, 6, seed=1)), torch.arange(200)[:, None]
    drawn = {s: FeatureSet(0.2 + 0.9 * normal(200, 6, seed=s)) for s in range(10, 70)}
    found = [measuring.jackknifed_frechet(mine, data, rows, paired=False, seed=s) for s, mine in drawn.items()]
    mean = np.mean([entry["value"] for entry in found])
    held = np.mean([entry["low"] < mean < entry["high"] for entry in found])
    widths = np.mean([entry["high"] - entry["low"] for entry in found])
    assert held >= 0.85
    assert widths < 3 * (2 * 1.96 * np.std([entry["value"] for entry in found]))  # and not by being wide


def test_an_interval_of_a_squared_norm_ends_at_zero():
    """CMMD, with its diagonals, cannot be negative; KID, unbiased, can."""
    mine, theirs = (FeatureSet(normal(120, 8, seed=seed)) for seed in (1, 2))
    rows = torch.arange(120).view(30, 4)
    found = {
        kernel: measuring.jackknifed_kernel(kernel, mine, theirs, rows, paired=True, seed=0, device="cpu") for kernel in ("cmmd", "kid")
    }
    assert found["cmmd"]["low"] == 0 < found["cmmd"]["value"] < found["cmmd"]["high"] and found["kid"]["low"] < 0


def test_the_teachers_prompts_are_left_out_with_the_students(monkeypatch):
    """Prompts far apart, student and teacher near each other: which prompts were drawn is no part of the difference."""
    monkeypatch.setattr(measuring, "SMALL", 0)
    subject = 3 * normal(60, 6, seed=1).repeat_interleave(2, 0)
    mine, theirs = (FeatureSet(subject + 0.3 * normal(120, 6, seed=seed)) for seed in (2, 3))
    rows = torch.arange(120).view(60, 2)
    widths = []
    for paired in (True, False):
        found = [measuring.jackknifed_frechet(mine, theirs, rows, paired=paired, seed=s) for s in range(8)]
        widths.append(np.mean([entry["high"] - entry["value"] for entry in found]))
    assert widths[0] < 0.5 * widths[1]


def test_a_block_is_of_prompts_from_everywhere():
    """Published sets are sorted by subject: of neighbours, or of every twentieth, a block would leave out one."""
    block = measuring.blocks_of(110, 3)
    assert sorted(block.bincount().tolist()) == [5] * 10 + [6] * 10
    assert torch.equal(block, measuring.blocks_of(110, 3)) and not torch.equal(block, measuring.blocks_of(110, 4))


@pytest.mark.parametrize("paired", [True, False])
def test_a_kernel_distances_interval_leaves_prompts_out(paired):
    """Of the sample, and of the teacher's with it: as if the pictures had never been there."""
    mine, theirs, rows = normal(80, 4, seed=1), normal(80, 4, seed=2) + 0.3, torch.arange(80).view(40, 2)
    found = measuring.jackknifed_kernel("kid", FeatureSet(mine), FeatureSet(theirs), rows, paired=paired, seed=3, device="cpu")
    block, without = measuring.blocks_of(40, 3), []
    assert block.bincount().tolist() == [2] * 20
    for g in range(20):
        left = rows[block != g].flatten()
        without.append(kernel_distance(mine[left], theirs[left] if paired else theirs, polynomial, unbiased=True))
    expected = jackknife(kernel_distance(mine, theirs, polynomial, unbiased=True), without)
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=1e-9)


def test_what_cannot_be_measured_is_left_out_and_said(sample):
    seen, data, teacher = sample
    few = {name: values[:12] for name, values in seen.items()} | {"score/bright": torch.tensor([1.0] * 11 + [torch.nan])}
    options = {"extractors": [NET, UNIT], "data": sets(data), "draws": 5, "repeats": True}
    whole = measure(few, PROMPTS[:12], 1, {}, **options)
    found, said = whole.metrics, whole.left_out
    assert said == {
        "fid_data": "12 pictures, but the covariance of 12 features needs more than 12",
        "diversity": "needs at least two pictures of every prompt",
    }
    assert {"kid_data", "fd_clip_data", "cmmd_data", "precision", "utility"} <= found.keys() and not said.keys() & found.keys()
    assert found["bright"] == {"value": 1, "low": 1, "high": 1, "masked": 1}  # of the eleven others, never 0
    few["score/bright"][1:] = torch.nan
    unscored = measure(few, PROMPTS[:12], 1, {}, **options)
    assert "bright" not in unscored.metrics and unscored.left_out == said | {"bright": "11 of 12 pictures got no score"}
    with pytest.raises(ValueError, match="it has 120 pictures, not 12"):
        measure(few, PROMPTS[:12], 1, {}, **options, teacher=sets(teacher))


def test_a_mean_and_a_difference_are_of_the_pictures_that_have_a_score():
    """A prompt's mean counts as many pictures as have one; a pair needs both; the interval is that of the prompts that are left."""
    values = normal(30, 2).double()
    values[3, 0], values[7] = torch.nan, torch.nan
    found = measuring.mean_of(values, draws=50, seed=0)
    assert found["value"] == pytest.approx(float(values[torch.isfinite(values)].mean())) and found["masked"] == 3
    rest = values[torch.arange(30) != 7]
    bounds = bootstrap(lambda index: float(rest[index].nanmean()), 29, draws=50, seed=0)
    assert (found["low"], found["high"]) == pytest.approx(bounds)
    other = normal(30, 2, seed=1).double()
    other[5, 1] = torch.inf
    pairs = measuring.paired({"a": values, "b": values}, {"a": other})
    assert list(pairs) == ["a"] and pairs["a"]["masked"] == 4
    assert pairs["a"]["value"] == pytest.approx(float((values - other)[torch.isfinite(values - other)].mean()))
    assert measuring.paired({"a": values}, {"a": torch.full((30, 2), torch.nan)}) == {}


def test_two_numbers_never_have_one_name(sample):
    """A judge beside another number, and two extractors with one distance: refused, or told apart by the extractor's name."""
    seen, data, teacher = sample
    for name in ("diversity", "fid_teacher", "precision", "utility", "kid_data"):
        with pytest.raises(ValueError, match=f"'{name}' names two numbers"):
            measured(seen | {f"score/{name}": seen["score/bright"]}, data, teacher)
    twin = Extractor("twin", "fid", "kid", False, None, 12)
    seen["features/twin"] = seen["features/net"] * 2
    both = {"extractors": [NET, twin], "data": sets(data | {"twin": data["net"]}), "draws": 5, "repeats": True}
    with pytest.raises(ValueError, match="'fid_data' names two numbers"):
        measure(seen, PROMPTS, 2, {}, **both)
    found = measure(seen, PROMPTS, 2, {}, **both | {"extractors": measuring.told_apart([NET, twin])}).metrics
    assert found["fid_data"]["value"] == pytest.approx(frechet(data["net"], seen["features/net"]), abs=1e-9)
    assert found["fid.twin_data"]["value"] == pytest.approx(frechet(data["net"], seen["features/twin"]), abs=1e-9)
    assert found["kid.twin_data"]["value"] != found["kid_data"]["value"]
    assert measuring.told_apart([NET, UNIT]) == [NET, UNIT]
    assert [tables.label(name) for name in ("fid_data", "fid.twin_data", "fd_dino_teacher", "kid.my_net.v2_teacher", "my.judge_x")] == [
        "FID to data ↓", "FID of twin to data ↓", "FD-dino to teacher ↓", "KID of my_net.v2 to teacher ↓", "my.judge_x ↑",
    ]  # fmt: skip


def test_repeated_captions_are_no_other_captions():
    scorer = CLIPScore(tiny_clip(), tiny_tokenizer(), PREPROCESS)
    features = torch.nn.functional.normalize(normal(3, 8), dim=1)
    prompts = ["cat", "dog", "cat"]
    own, above = measuring.caption_scores(features, scorer, prompts, torch.arange(3))
    cosine = 100 * features.double() @ scorer.text_features(["cat", "dog"]).double().T
    torch.testing.assert_close(own, torch.stack([cosine[0, 0], cosine[1, 1], cosine[2, 0]]))
    torch.testing.assert_close(above, torch.stack([cosine[0, 0] - cosine[0, 1], cosine[1, 1] - cosine[1, 0], cosine[2, 0] - cosine[2, 1]]))


# Sampling: a picture's noise is its own


@pytest.fixture(scope="module")
def flow_pipe():
    """A stochastic flow student: its pipeline hands its scheduler no generator."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from pipelines import sd3

    pipe = sd3.pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=1 / 3, stochastic_sampling=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def diffusion_pipe():
    """A student of a DDPM schedule: LCM draws noise in its steps, from the generator it is given."""
    from diffusers import LCMScheduler

    pipe = other_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["flow_pipe", "diffusion_pipe"])
def test_a_pictures_noise_does_not_depend_on_what_it_is_drawn_with(kind, request):
    pipe = request.getfixturevalue(kind)
    prompts = ["a cat", "a dog", "pie", "a cat"]

    def drawn(rows):
        generators = [drawing.noise_generator(5, i) for i in rows]
        return drawing.draw(pipe, [prompts[i] for i in rows], generators, num_inference_steps=3, guidance_scale=1.0)[0]

    together = drawn([0, 1, 2, 3])
    for rows in ([2], [1, 3], [3, 2, 1]):
        torch.testing.assert_close(drawn(rows), together[rows], atol=2e-5, rtol=0)
    assert (together[0] - together[3]).abs().max() > 0.01  # the same prompt under other noise
    assert "step" not in vars(pipe.scheduler)  # left as it was


def test_the_networks_calls_are_counted(diffusion_pipe, flow_pipe):
    for pipe, guidance, expected in ((diffusion_pipe, 1.0, 3), (diffusion_pipe, 4.0, 6), (flow_pipe, 1.0, 3), (flow_pipe, 4.0, 6)):
        with drawing.counted(pipe) as calls:
            generators = [drawing.noise_generator(0, i) for i in range(2)]
            drawing.draw(pipe, ["cat", "dog"], generators, num_inference_steps=3, guidance_scale=guidance)
        assert sum(calls) / 2 == expected


# The whole evaluation


class Network(torch.nn.Module):
    def __init__(self, tilt):
        super().__init__()
        self.tilt = torch.nn.Parameter(torch.tensor(tilt))

    def forward(self, x):
        return x * self.tilt


class Pipe:
    """Draws a picture from its generator at next to no cost."""

    device = torch.device("cpu")

    def __init__(self, tilt=1.0):
        self.unet = Network(tilt)
        self.components, self.scheduler = {"unet": self.unet}, SimpleNamespace(step=lambda x: x, config={"_class_name": "Flow"})
        self.calls = 0

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, prompt, generator, output_type, num_inference_steps, guidance_scale):
        self.calls += 1
        with torch.no_grad():
            return SimpleNamespace(images=self.unet(torch.stack([torch.rand(3, 4, 4, generator=g) for g in generator])))


def opener(pipe):
    return lambda: drawing.Source(pipe, lambda guidance: {"guidance_scale": guidance}, (4, 4))


FLAT = Extractor("flat", "fid", "kid", False, lambda x: x.flatten(1)[:, :5].clone(), 5, "weights", "none")
MANY = PromptSet("many", [f"p{i}" for i in range(40)])


def bright(images, prompts):
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def dim(images, prompts):
    return -bright(images, prompts)


def evaluated(pipe, folder, *, teacher=None, **changes):
    options = {
        "prompts": MANY, "scorers": {}, "judges": {"bright": bright}, "extractors": [FLAT], "images_per_prompt": 2, "noise": "picture",
        "batch": 3, "draws": 20, "progress": False, "work": folder, "cache": folder, "say": lambda line: None, "steps": 4,
    }  # fmt: skip
    return evaluation.evaluate(opener(pipe), teacher=opener(teacher) if teacher else None, **options | changes)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(samples, "SHARD", 10)


def without_times(report):
    """A report's numbers, less the seconds, which no two runs share."""
    report = json.loads(json.dumps(report))
    for row in report["rows"]:
        del row["metrics"]["seconds_per_image"]
        del row["sample"]
    return report


def kept(folder):
    """What the parts in a folder hold, less the seconds."""
    return {
        (path.name, name): value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in store.read(path).items()
        if name != "seconds"
    }


def assert_same(one, two):
    assert one.keys() == two.keys() and one
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_report_is_what_a_plain_loop_measures(tmp_path):
    student, teacher = Pipe(0.8), Pipe(1.0)
    report = evaluated(student, tmp_path, teacher=teacher)
    names = ["student, 4 steps", "teacher, 28 steps", "teacher, 4 steps, its own"]
    assert [row["name"] for row in report["rows"]] == names and report["best_solver"] == names[2]
    pictures = {seed: torch.stack([torch.rand(3, 4, 4, generator=drawing.noise_generator(seed, i)) for i in range(80)]) for seed in (0, 1)}
    flat = {seed: x.flatten(1)[:, :5] for seed, x in pictures.items()}
    metrics = report["rows"][0]["metrics"]
    assert metrics["fid_teacher"]["value"] == pytest.approx(frechet(flat[1], 0.8 * flat[0]), abs=1e-6)
    assert report["rows"][1]["metrics"]["fid_teacher"]["value"] == pytest.approx(frechet(flat[1], flat[0]), abs=1e-6)
    lengths = np.mean([len(p) for p in MANY.prompts])
    assert metrics["bright"]["value"] == pytest.approx(0.8 * float(pictures[0].mean()) + lengths, abs=1e-5)
    assert metrics["network_evaluations"]["value"] == 1  # as counted, whatever the steps
    stamp = report["protocol"]
    assert stamp["prompts"] == store.sha256(MANY.prompts) and stamp["set"] == "many" and stamp["n"] == 80 and stamp["noise"] == "picture"
    assert stamp["extractors"] == {"flat": {"weights": "weights", "resize": "none"}} and stamp["seeds"] == {"rows": 0, "reference": 1}
    assert stamp["batch"] is None and stamp["resolution"] == 4 and stamp["precision"] == "fp32"
    assert set(stamp["versions"]) == {"torch", "diffusers", "transformers", "fewstep", "torch-fidelity", "pillow"}
    assert len(stamp["scorers"]["bright"]) == 64  # of the file that defines it
    assert report["interval"]["jackknife"] == {"blocks of prompts": 20, "metrics": ["kid_teacher"]}
    assert teacher.calls == 3 * 8 * 4  # three samples of eight parts, each of ten pictures in batches of three


def test_the_difference_to_the_teacher_is_paired_picture_by_picture(tmp_path):
    """The noise and the prompts that both had are no part of it: the student here is the teacher, 20% darker."""
    report = evaluated(Pipe(0.8), tmp_path, teacher=Pipe(1.0), draws=50)
    assert (report["paired"]["of"], report["paired"]["minus"]) == ("student, 4 steps", "teacher, 28 steps")
    drawn = torch.stack([torch.rand(3, 4, 4, generator=drawing.noise_generator(0, i)) for i in range(80)])
    means = -0.2 * drawn.double().mean((1, 2, 3)).view(40, 2).mean(1)
    found, bounds = report["paired"]["metrics"]["bright"], bootstrap(lambda index: float(means[index].mean()), 40, draws=50, seed=0)
    assert [found["value"], found["low"], found["high"]] == pytest.approx([float(means.mean()), *bounds], abs=1e-6)
    student, teacher = (row["metrics"]["bright"] for row in report["rows"][:2])
    assert found["value"] == pytest.approx(student["value"] - teacher["value"], abs=1e-6)
    assert found["high"] < 0 and student["high"] > teacher["low"]  # apart, where the intervals of the two overlap
    assert set(report["paired"]["metrics"]) == {"bright", "diversity"}  # distances of whole samples have no pictures to pair
    rows = dict(tables.as_rows(report))
    assert tables.columns(report)[-1] == "student - teacher, paired" and rows["bright ↑"][-1] == tables.cell(found)
    assert rows["FID to teacher (FID-SD) ↓"][-1] == "-"
    assert evaluated(Pipe(0.8), tmp_path, draws=50)["paired"] is None


def test_a_resumed_evaluation_is_an_unbroken_one(tmp_path):
    class Stop(BaseException):
        pass

    class Tired(Pipe):
        def __call__(self, **options):
            if self.calls == 10:  # in the middle of the third part
                raise Stop
            return super().__call__(**options)

    Tired.__name__ = Pipe.__name__  # a pipeline is told by its class too
    whole = evaluated(Pipe(), tmp_path / "whole")
    with pytest.raises(Stop):
        evaluated(Tired(), tmp_path / "broken")
    assert len(list((tmp_path / "broken").glob("*.safetensors"))) == 2 * 3  # cost, features, scores
    said, broken = [], Pipe()
    before = broken.calls
    resumed = evaluated(broken, tmp_path / "broken", say=said.append)
    assert broken.calls - before == 6 * 4  # six of eight parts, four batches each
    assert said == [f"student, 4 steps: 2 of 8 parts are in {tmp_path / 'broken'}, going on with the others"]
    assert without_times(resumed) == without_times(whole)
    assert_same(kept(tmp_path / "broken"), kept(tmp_path / "whole"))
    # and once more, from what is there
    again = evaluated(broken, tmp_path / "broken", say=said.append)
    assert broken.calls - before == 24 and again["rows"][0]["sample"] == "kept" and "read from" in said[1]
    assert without_times(again) == without_times(whole)


@pytest.mark.parametrize("noise", ["picture", "batch"])
def test_shares_are_the_whole_to_the_bit(tmp_path, noise, request):
    """Also where a batch shares its noise: its number does not depend on who draws it."""
    pipe = Pipe() if noise == "picture" else request.getfixturevalue("diffusion_pipe")
    options = {"noise": noise} | ({} if noise == "picture" else {"steps": 3, "prompts": PromptSet("few", MANY.prompts[:13])})
    whole = evaluated(pipe, tmp_path / "one", **options)
    said = []
    for i in (2, 0, 1):
        assert evaluated(pipe, tmp_path / "three", share=(i, 3), say=said.append, **options) is None
    assert not any("draw nothing" in line for line in said)
    shared = evaluated(pipe, tmp_path / "three", **options)
    assert shared["rows"][0]["sample"] == "kept"
    assert without_times(shared) == without_times(whole)
    assert_same(kept(tmp_path / "three"), kept(tmp_path / "one"))
    if noise == "batch":  # as `fewstep sample` and the samples that ship with the world are drawn
        images, _ = drawing.generate(pipe, options["prompts"].prompts, 2, steps=3, seed=0, batch=3)
        found = [value for (_, name), value in kept(tmp_path / "one").items() if name == "features/flat"]
        assert torch.equal(torch.cat(found), FLAT.function(images))


def test_more_processes_than_parts_are_told(tmp_path):
    said = []
    assert evaluated(Pipe(), tmp_path, prompts=PromptSet("few", MANY.prompts[:8]), share=(3, 4), say=said.append) is None
    assert said[0] == "16 pictures are 2 parts of up to 10, and a part is drawn by one process: 2 of 4 draw nothing"


def test_what_was_drawn_otherwise_is_never_taken(tmp_path):
    """Another seed, student, prompt, number of steps, judge or extractor is another sample; another batch or set of real data is not."""
    evaluated(Pipe(), tmp_path)
    changes = [
        {"seed": 1}, {"steps": 2}, {"prompts": PromptSet("many", ["other", *MANY.prompts[1:]])}, {"images_per_prompt": 3},
        {"judges": {"bright": dim}}, {"precision": "bf16"},
        {"extractors": [FLAT._replace(weights="others")]}, {"extractors": [FLAT._replace(resize="to 3")]},
    ]  # fmt: skip
    for change in changes:
        assert evaluated(Pipe(), tmp_path, **change)["rows"][0]["sample"] == "drawn", change
    assert evaluated(Pipe(0.5), tmp_path)["rows"][0]["sample"] == "drawn"
    assert evaluated(Pipe(), tmp_path, batch=4)["rows"][0]["sample"] == "kept"
    assert evaluated(Pipe(), tmp_path, neighbours=5)["rows"][0]["sample"] == "kept"
    assert evaluated(Pipe(), tmp_path, judges={})["rows"][0]["sample"] == "kept"


def test_one_more_judge_is_all_that_is_computed(tmp_path):
    """Or one more extractor: the pictures are the same ones, drawn again, and nobody else looks at them again."""
    looked = []

    def counting(name, function):
        return lambda *seen: looked.append(name) or function(*seen)

    features = FLAT._replace(function=counting("features", FLAT.function))
    judges = {"bright": counting("bright", bright)}
    first = evaluated(Pipe(), tmp_path, extractors=[features], judges=judges)
    assert looked == ["features", "bright"] * 32
    looked.clear()
    said, kept_before = [], kept(tmp_path)
    more = evaluated(
        Pipe(), tmp_path, extractors=[features], judges=judges | {"dim": counting("dim", dim)}, say=said.append, keep_images=tmp_path / "p"
    )
    assert looked == ["dim"] * 32 and said[0] == "student, 4 steps: 8 of 8 parts lack dim; drawn again for that alone"
    metrics = more["rows"][0]["metrics"]
    assert {name: metrics[name] for name in first["rows"][0]["metrics"]} == first["rows"][0]["metrics"]  # its seconds too
    assert metrics["dim"]["value"] == pytest.approx(-metrics["bright"]["value"])
    after = kept(tmp_path)
    assert_same(kept_before, {name: after[name] for name in kept_before})
    looked.clear()
    again = evaluated(Pipe(), tmp_path, extractors=[features, FLAT._replace(name="tall", function=counting("tall", FLAT.function))],
                      judges=judges, keep_images=tmp_path / "p")  # fmt: skip
    assert looked == ["tall"] * 32 and again["rows"][0]["metrics"]["bright"] == metrics["bright"]
    assert len(list((tmp_path / "p").iterdir())) == 1  # who looks at them makes no other pictures


def test_a_damaged_part_is_drawn_again(tmp_path):
    whole = evaluated(Pipe(), tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[3]
    path.write_bytes(path.read_bytes()[:-8])
    pipe = Pipe()
    with pytest.warns(UserWarning, match=f"{path.name}: damaged, drawn again"):
        mended = evaluated(pipe, tmp_path)
    assert pipe.calls == 4 and without_times(mended) == without_times(whole)


def test_a_judge_that_was_out_of_reach_is_asked_again(tmp_path):
    """A number that was lost to a server's failure is there once it answers; no other part is drawn again."""
    server = Faulty()
    try:
        judge, said, pipe, looked = server.reward().ask, [], Pipe(), []
        options = {"judges": {"far": judge}, "extractors": [FLAT._replace(function=lambda x: looked.append(1) or FLAT.function(x))]}
        server.faults = ["500"] * 3  # all tries of one batch
        with pytest.warns(UserWarning, match="3 pictures are masked"):
            down = evaluated(pipe, tmp_path, **options, say=said.append)
        found, row = down["rows"][0]["metrics"]["far"], down["rows"][0]
        assert found["masked"] == 3 and row["judges"]["far"] == {"asked": 80, "masked": 3, "retried": 2}
        assert pipe.calls == 8 * 4 and not said
        (note,) = (note for note in tables.notes(down) if note.startswith("*"))
        assert note == "* far: a mean over the pictures that got a score; of 80, none for 3 (student, 4 steps)"
        assert dict(tables.as_rows(down))["far ↑"] == [tables.cell(found)] and tables.cell(found).endswith("]*")
        up = evaluated(pipe, tmp_path, **options, say=said.append)
        row = up["rows"][0]
        assert row["judges"]["far"] == {"asked": 90, "masked": 0, "retried": 2} and "masked" not in row["metrics"]["far"]
        assert row["metrics"]["far"]["value"] == pytest.approx(0.9)  # 0, 1, 2 of threes; then 0
        assert not [note for note in tables.notes(up) if "far" in note]
        assert pipe.calls == 9 * 4 and len(looked) == 8 * 4  # no features again
        assert said == ["student, 4 steps: 1 of 8 parts have pictures without an answer by far; drawn again to ask again"]
        evaluated(pipe, tmp_path, **options)
        assert pipe.calls == 9 * 4
    finally:
        server.close()


def test_a_judge_without_an_opinion_is_not_asked_again(tmp_path):
    """NaN, or None as a server's JSON has it, is an answer; only a server that gave none is asked again."""

    def about_reds(images, prompts):
        return [None if prompt.endswith("7") else float(image[0].mean()) for image, prompt in zip(images, prompts, strict=True)]

    pipe, said = Pipe(), []
    for _ in range(2):
        report = evaluated(pipe, tmp_path, judges={"red": about_reds}, say=said.append)
        assert report["rows"][0]["judges"]["red"] == {"asked": 80, "masked": 8, "retried": 0}
    assert pipe.calls == 8 * 4 and said == [f"student, 4 steps: read from {tmp_path}"]


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda images: images.mean((1, 2, 3)).repeat(2), r"returned shape \(6,\) for 3 pictures; it must return \(3,\)"),
        (lambda images: images.mean((1, 2, 3))[:-1], r"returned shape \(2,\) for 3 pictures"),
        (lambda images: images.mean((2, 3)), r"returned shape \(3, 3\) for 3 pictures"),
        (lambda images: 0.5, r"returned shape \(\) for 3 pictures"),
        (lambda images: ["good"] * len(images), "returned list; it must return one number a picture"),
    ],
)
def test_a_judge_that_does_not_say_one_number_a_picture_is_refused(tmp_path, answer, words):
    """As a reward is in training: its scores would belong to other pictures, and look like any others."""
    with pytest.raises(ValueError, match=f"reward 'odd' {words}"):
        evaluated(Pipe(), tmp_path, judges={"odd": lambda images, prompts: answer(images)})
    assert not kept(tmp_path)


def test_a_server_that_stays_silent_ends_the_evaluation_which_goes_on_later(tmp_path):
    server = Faulty()
    try:
        pipe, said = Pipe(), []
        options = {"judges": {"far": server.reward().ask}, "say": said.append}
        server.faults = [None] * 4 + ["500"] * 9  # the first part's batches; then all tries of three
        with pytest.warns(UserWarning, match="pictures are masked"), pytest.raises(ValueError, match="no answer for 3 batches in a row"):
            evaluated(pipe, tmp_path, **options)
        assert pipe.calls == 7
        report = evaluated(pipe, tmp_path, **options)
        assert said == [f"student, 4 steps: 1 of 8 parts are in {tmp_path}, going on with the others"] and pipe.calls == 7 + 7 * 4
        assert report["rows"][0]["judges"]["far"] == {"asked": 80, "masked": 0, "retried": 0}
    finally:
        server.close()


def test_a_picture_that_is_not_finite_ends_the_evaluation(tmp_path):
    """As a file it would be black: the numbers would be of another student."""

    class Broken(Pipe):
        def __call__(self, prompt, **told):
            found = super().__call__(prompt, **told)
            found.images[[p == "p5" for p in prompt], 1, 2, 3] = float("nan")
            return found

    with pytest.raises(FloatingPointError, match=r"2 of 3 pictures hold NaN or inf, the first for the prompt 'p5'"):
        evaluated(Broken(), tmp_path)
    assert len(list(tmp_path.glob("*-00000.safetensors"))) == len(list(tmp_path.glob("*.safetensors"))) > 0  # the part before it is whole


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"judges": {"diversity": bright}}, "diversity"),
        ({"judges": {"fid_teacher": bright}}, "fid_teacher"),
        ({"judges": {"clip": bright}, "scorers": {"clip": None}}, "clip"),
        ({"scorers": {"flat": None}}, "flat"),
        ({"extractors": [FLAT, FLAT._replace(frechet="fd_clip", kernel=None)]}, "flat"),
    ],
)
def test_names_that_collide_are_refused_before_anything_is_drawn(tmp_path, changes, name):
    pipe = Pipe()
    with pytest.raises(ValueError, match=f"'{name}' would name two things"):
        evaluated(pipe, tmp_path, **changes)
    assert pipe.calls == 0


def test_the_embedded_worlds_neighbours_are_of_its_own_pictures(monkeypatch, tmp_path):
    """Of which it has several copies each."""
    told = []
    monkeypatch.setattr("fewstep.evaluate.command.world_instruments", lambda device: {"scorers": {}, "data": "its own", "neighbours": 7})
    monkeypatch.setattr(evaluation, "evaluate", lambda student, **given: told.append(given))
    for more in ({}, {"data": "mine"}):
        measure_student("student", str(world.TEACHER), None, output=tmp_path / "report.json", device="cpu", **more)
    assert [(given["data"], given.get("neighbours")) for given in told] == [("its own", 7), ("mine", None)]


def test_a_teacher_with_a_negative_prompt_is_drawn_with_it(monkeypatch, tmp_path):
    """And not read from the samples that ship, which were drawn without."""
    told = []
    monkeypatch.setattr(evaluation, "evaluate", lambda student, **given: told.append(given))
    for negative in ("", "blurry"):
        measure_student(
            str(world.TEACHER), str(world.TEACHER), None, output=tmp_path / "report.json", device="cpu", negative_prompt=negative
        )
    calls = [given["teacher"]().call(3.0) for given in told]
    assert calls[1] == calls[0] | {"negative_prompt": "blurry"} and "negative_prompt" not in calls[0]
    assert [given.get("shipped") for given in told] == [world.SAMPLES, None]


def test_two_extractors_of_one_distance_are_both_measured(tmp_path):
    other = FLAT._replace(name="tall", function=lambda x: x.flatten(1)[:, 5:10].clone())
    report = evaluated(Pipe(), tmp_path, extractors=[FLAT, other], teacher=Pipe(0.9))
    metrics = report["rows"][0]["metrics"]
    assert metrics["fid_teacher"]["value"] != metrics["fid.tall_teacher"]["value"]
    assert {"kid_teacher", "kid.tall_teacher"} == set(report["interval"]["jackknife"]["metrics"])
    assert metrics == metrics | evaluated(Pipe(), tmp_path, teacher=Pipe(0.9))["rows"][0]["metrics"] | {
        "seconds_per_image": metrics["seconds_per_image"]
    }
    assert "FID of tall to teacher (FID-SD) ↓" in text_of(tables.as_table(report))


def test_no_more_pictures_are_held_than_a_batch_or_two(tmp_path):
    """However many are drawn: what is kept of each is its features and scores."""
    alive, most = weakref.WeakSet(), []

    class Watched(Pipe):
        def __call__(self, **options):
            out = super().__call__(**options)
            alive.add(out.images)
            most.append(sum(len(images) for images in alive))
            return out

    evaluated(Watched(), tmp_path, prompts=PromptSet("more", [f"p{i}" for i in range(200)]))
    assert len(most) == 40 * 4 and max(most) <= 2 * 3


def test_pictures_are_kept_when_asked_for(tmp_path):
    evaluated(Pipe(), tmp_path / "work")
    pipe, ids = Pipe(), [f"coco{i}" for i in range(40)]
    options = {"keep_images": tmp_path / "pictures", "prompts": MANY._replace(ids=ids)}
    evaluated(pipe, tmp_path / "work", **options)
    assert pipe.calls == 8 * 4  # they were not kept the first time
    (folder,) = (tmp_path / "pictures").iterdir()
    assert folder.name.startswith("student--4-steps-")
    assert len(list(folder.glob("*.png"))) == 80
    expected = features.to_bytes(torch.rand(1, 3, 4, 4, generator=drawing.noise_generator(0, 79)))
    assert np.array_equal(np.asarray(Image.open(folder / "000079.png")), expected[0].permute(1, 2, 0).numpy())
    lines = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    assert lines[79] == {"file": "000079.png", "prompt": "p39", "seed": 0, "picture": 79, "id": "coco39"}
    (folder / "000005.png").unlink()
    evaluated(pipe, tmp_path / "work", **options)
    assert pipe.calls == 9 * 4 and (folder / "000005.png").is_file()
    assert (folder / "pictures.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines] and len(lines) == 80
    # another sample's pictures are never this one's
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    evaluated(pipe, tmp_path / "work", **options, seed=5)
    evaluated(pipe, tmp_path / "work", **options)
    assert pipe.calls == 17 * 4 and len(list((tmp_path / "pictures").iterdir())) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_shares_keep_pictures_and_the_measuring_call_lists_them(tmp_path):
    options = {"keep_images": tmp_path / "pictures"}
    for i in (1, 0):
        evaluated(Pipe(), tmp_path / "work", share=(i, 2), **options)
    (folder,) = (tmp_path / "pictures").iterdir()
    assert len(list(folder.glob("*.png"))) == 80 and not (folder / "pictures.jsonl").exists()
    pipe, said = Pipe(), []
    evaluated(pipe, tmp_path / "work", say=said.append, **options)
    assert pipe.calls == 0 and len((folder / "pictures.jsonl").read_text().splitlines()) == 80
    assert f"student, 4 steps: pictures in {folder}" in said


def test_a_function_in_a_file_and_a_server_judge_as_well(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def dark(images, prompts):\n    return 1 - images.flatten(1).mean(1)\n")
    images = (torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).round() / 255  # a server is sent 8 bits
    with served(f"{file}:dark") as url:
        scorers, judges = load_judges({"mine": f"{file}:dark", "far": url}, device="cpu", in_world=False, timeout=7.0)
        assert judges["far"].__self__.timeout == 7.0
        seen = samples.observe(images, samples.looks(scorers, judges=judges), ["a", "b", "c"])
        identities = {protocol.identity_of(judge) for judge in judges.values()}
    assert not scorers and len(identities) == 2
    assert torch.equal(seen["score/mine"], 1 - images.flatten(1).mean(1)) and torch.equal(seen["score/far"], seen["score/mine"])


def test_a_judge_is_told_apart_by_what_it_holds(tmp_path):
    class Judge:
        def __init__(self, seed):
            self.head = {"weight": normal(3, seed=seed)}
            self.body = torch.nn.Linear(2, 2)
            torch.nn.init.constant_(self.body.weight, 1.0)
            torch.nn.init.constant_(self.body.bias, 0.0)

        def score(self, images, prompts):
            return images.mean((1, 2, 3))

        def other(self, images, prompts):
            return -images.mean((1, 2, 3))

    assert protocol.identity_of(Judge(0).score) == protocol.identity_of(Judge(0)) != protocol.identity_of(Judge(1).score)
    assert protocol.identity_of(SimpleNamespace(version="1.2")) == "1.2"
    assert protocol.identity_of(bright) == protocol.identity_of(bright)
    assert protocol.identity_of(bright) != protocol.identity_of(dim)  # of one file
    one = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    two = lambda images, prompts: -images.mean((1, 2, 3))  # noqa: E731
    assert protocol.identity_of(one) != protocol.identity_of(two)
    assert protocol.identity_of(Judge(0).other) != protocol.identity_of(Judge(0).score)
    servers = [SimpleNamespace(served=name, version="file-0123") for name in ("bright", "dim")]
    assert [protocol.identity_of(server) for server in servers] == ["bright file-0123", "dim file-0123"]
    with pytest.raises(ValueError, match="nothing tells which version"):
        protocol.identity_of(len)


DECORATED = "import torch\n@torch.no_grad()\ndef mine(images, prompts):\n    return images.mean((1, 2, 3))\n"
METHOD = (
    "import torch\nclass Judge:\n    def __init__(self):\n        self.net = torch.nn.Linear(3, 1).requires_grad_(False)\n"
    "        self.net.weight.fill_(1.0), self.net.bias.fill_(0.0)\n"
    "    def score(self, images, prompts):\n        return self.net(images.mean((2, 3)))[:, 0]\nmine = Judge().score\n"
)
MADE = "def made(k):\n    def judge(images, prompts):\n        return k * images.mean((1, 2, 3))\n    return judge\nmine = made(1)\n"
ELSEWHERE = "import functools, operator\nmine = functools.partial(operator.add, 1)\n"


@pytest.mark.parametrize("text, edit", [
    (DECORATED, (".mean((1, 2, 3))", ".amax((1, 2, 3))")), (METHOD, ("[:, 0]", "[:, 0] * 100")), (MADE, ("made(1)", "made(2)")),
    (ELSEWHERE, ("add, 1", "add, 2")),
])  # fmt: skip
def test_a_judge_of_a_file_is_another_one_when_the_file_is(tmp_path, text, edit):
    def identities(name, text):
        (tmp_path / name).write_text(text)
        source = f"{tmp_path / name}:mine"
        return protocol.identity_of(sources.load_function(source)), protocol.identity_of(sources.load_function(source), source)

    alone, named = identities("one.py", text)
    assert (alone, named) == identities("one.py", text)
    edited, edited_named = identities("one.py", text.replace(*edit))
    assert named != edited_named and named != identities("two.py", text.replace(*edit))[1]
    assert (alone != edited) == (text != ELSEWHERE)  # such a one tells nothing by itself of where it was made


def test_scores_by_a_judge_whose_file_has_changed_are_not_taken(tmp_path):
    lines = []
    for text in (DECORATED, DECORATED, DECORATED.replace("images.mean", "100 * images.mean")):
        (tmp_path / "mine.py").write_text(text)
        source = f"{tmp_path}/mine.py:mine"
        judges = {"mine": sources.load_function(source)}
        report = evaluated(Pipe(), tmp_path / "work", judges=judges, judge_files={"mine": source}, say=lines.append)
        lines.append(report["rows"][0]["metrics"]["mine"]["value"])
    first, read, again, said, other = lines
    assert read.endswith(f"read from {tmp_path / 'work'}") and again == first
    assert said.endswith("lack mine; drawn again for that alone") and other == pytest.approx(100 * first)


def test_a_function_in_a_file_is_known_by_its_file_and_line_alone(tmp_path):
    """As by the versions before, whose scores are still taken."""
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\n\ndef mine(images, prompts):\n    return images.mean((1, 2, 3))\n")
    judge = sources.load_function(f"{file}:mine")
    known = hashlib.sha256(file.read_bytes() + b"\0mine 4").hexdigest()
    assert protocol.identity_of(judge) == protocol.identity_of(judge, f"{file}:mine") == known


def test_a_flow_teacher_has_its_own_solver_and_ddpm_teachers_the_others(diffusion_pipe, flow_pipe):
    assert list(drawing.schedulers_of(flow_pipe)) == ["its own"]
    assert list(drawing.schedulers_of(diffusion_pipe)) == ["its own", "DDIM", "DPM-Solver++", "UniPC"]


# Showing: numbers of different stamps


def text_of(table):
    from rich.console import Console

    console = Console(width=400, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_numbers_of_other_stamps_are_marked_and_what_differs_is_said(tmp_path):
    one, same = evaluated(Pipe(), tmp_path), evaluated(Pipe(0.9), tmp_path)
    other = evaluated(Pipe(), tmp_path, seed=7, extractors=[FLAT._replace(resize="to 3")])
    text = text_of(tables.beside({"a": one, "b": same, "c": other}))
    assert "a: student, 4 steps " in text and "b: student, 4 steps " in text and "c: student, 4 steps †" in text
    assert (
        "† c was measured otherwise than a, and its numbers do not compare: seeds.rows: 0 / 7; extractors.flat.resize: none / to 3" in text
    )
    assert text.count("†") == 2 and "a, and" in text and "b was measured" not in text
    assert protocol.differences(one["protocol"], same["protocol"]) == []
    moved = one["protocol"] | {"prompts": "0" * 64, "data": {"n": 3}}
    assert protocol.differences(one["protocol"], moved) == [
        f"prompts: {one['protocol']['prompts'][:8]} / 00000000", "data: none / n 3",
    ]  # fmt: skip


def marked_in(text):
    """The metrics with a marked cell in a table."""
    rows = (line.split("│")[1:] for line in text.splitlines() if line.startswith("│"))
    return {name.strip().rstrip(" ↑↓") for name, *cells in rows if any("†" in cell for cell in cells)}


JUDGED = {"value": 1.0, "low": 1.0, "high": 1.0}


def stamped(metrics, **fields):
    """A report of one sample as `fewstep evaluate` saves it, with these metrics and stamp."""
    stamp = {
        "prompts": "p", "seeds": {"rows": 0, "reference": 1}, "teacher": None, "extractor": None, "extractors": {}, "scorers": {},
        "configs": {}, "preprocess": {}, "utility": None, "data": None, "neighbours": 3, "device": "cpu", "versions": {"torch": "2"},
    }  # fmt: skip
    names = [*metrics, "seconds_per_image"]
    row = {"name": "student", "metrics": dict.fromkeys(names, JUDGED), "timed": {"device": "cpu", "drawn_together": 1}}
    return {"protocol": stamp | fields, "rows": [row], "interval": {}}


CLIP = {"fd_clip_data", "cmmd_data", "fd_clip_teacher", "cmmd_teacher"}
SEEN = stamped(
    ["fid_data", *sorted(CLIP), "fd_eyes_data", "clip", "clip_over_shuffled", "red", "utility", "precision", "recall", "diversity"],
    extractor="inception", extractors=dict.fromkeys(["inception", "extractor-clip", "extractor-eyes"], "x"), data={"n": 3}, utility="u",
    scorers={"clip": "x", "red": "x"}, configs={"clip": "x", "extractor-eyes": "x"}, preprocess={"clip": "x"},
    versions={"torch": "2", "pillow": "12"},
)  # fmt: skip
OF_DATA = {"fid_data", "fd_clip_data", "cmmd_data", "fd_eyes_data", "precision", "recall"}


@pytest.mark.parametrize("field, value, metrics", [
    ("scorers", {"clip": "y", "red": "x"}, {"clip", "clip_over_shuffled"}),
    ("preprocess", {"clip": "y"}, {"clip", "clip_over_shuffled"}),
    ("configs", {"clip": "x", "extractor-eyes": "y"}, {"fd_eyes_data"}),
    ("extractors", {"inception": "y", "extractor-clip": "x", "extractor-eyes": "x"}, {"fid_data", "precision", "recall", "diversity"}),
    ("extractors", {"inception": "x", "extractor-clip": "y", "extractor-eyes": "x"}, CLIP),
    ("extractor", "extractor-clip", {"precision", "recall", "diversity"}),
    ("data", {"n": 4}, OF_DATA),
    ("neighbours", 4, {"precision", "recall"}),
    ("utility", "v", {"utility"}),
    ("seeds", {"rows": 0, "reference": 2}, {"fd_clip_teacher", "cmmd_teacher"}),
    ("versions", {"torch": "2", "pillow": "13"}, OF_DATA | CLIP | {"diversity"}),
    ("versions", {"torch": "2"}, set()),
    ("device", "cuda", set()),
])  # fmt: skip
def test_a_difference_is_said_of_the_numbers_that_it_decides(field, value, metrics):
    other = SEEN | {"protocol": SEEN["protocol"] | {field: value}}
    names = list(SEEN["rows"][0]["metrics"])
    found, unknown = protocol.compared(SEEN["protocol"], other["protocol"], names)
    assert {name for those in found.values() for name in those} == metrics and unknown == []
    text = text_of(tables.beside({"a": SEEN, "b": other}))
    assert marked_in(text) == {tables.plain(name, names) for name in metrics}
    assert "b: student †" not in text and ("do not compare" in text) == bool(metrics)


def test_what_one_report_measures_alone_is_no_difference():
    """A judge, an extractor or real pictures more; two later reports that have them are compared with each other."""
    few = stamped(["clip", "clip_over_shuffled"], scorers={"clip": "x"}, configs={"clip": "x"}, preprocess={"clip": "x"})
    assert "†" not in text_of(tables.beside({"a": SEEN, "b": few})) and "†" not in text_of(tables.beside({"a": few, "b": SEEN}))
    other = SEEN | {"protocol": SEEN["protocol"] | {"scorers": {"clip": "x", "red": "y"}}}
    text = " ".join(text_of(tables.beside({"a": few, "b": SEEN, "c": other})).split())
    assert "† of c and b these numbers do not compare: red, which differ in scorers.red: x / y" in text and text.count("do not") == 1
    # the kernel distance of the first CLIP has one name, whichever it is of
    shared = {"extractor": "eyes", "scorers": {"eyes": "x"}, "extractors": {"eyes": "x", "extractor-clip": "x"}}
    assert protocol.extractors_of("fd_clip_data", shared) == ["eyes"]
    assert (
        protocol.extractors_of("fd_clip.extractor-clip_data", shared) == protocol.extractors_of("cmmd_data", shared) == ["extractor-clip"]
    )


def test_brackets_are_shown_and_a_judge_called_as_a_clip_is_no_clip(tmp_path):
    report = evaluated(Pipe(), tmp_path, judges={"clip": bright, "[b]": dim})
    for text in (text_of(tables.as_table(report)), text_of(tables.beside({"[/a]/r.json": report, "b": report}))):
        assert "clip ↑" in text and "CLIPScore" not in text and "[b] ↑" in text
    assert "[/a]/r.json" in text
    assert tables.label("clip", ["clip", "clip_over_shuffled"]) == tables.label("clip") == "CLIPScore, clip ↑"


def test_numbers_beside_another_teacher_are_marked(tmp_path):
    """A distance to the teacher is to this teacher, at its guidance and steps; what the student draws hangs on none of them."""
    student, usual = Pipe(0.8), Pipe(1.0)
    one = evaluated(student, tmp_path, teacher=usual, guidance=3.0)
    calls = student.calls
    others = {
        "guidance": evaluated(student, tmp_path, teacher=usual, guidance=9.0),
        "steps": evaluated(student, tmp_path, teacher=usual, guidance=3.0, teacher_steps=20),
        "pipeline": evaluated(student, tmp_path, teacher=Pipe(0.5), guidance=3.0),
    }
    assert student.calls == calls
    assert one["protocol"]["teacher"] == {
        "pipeline": one["teacher"], "config": one["configs"]["teacher"], "steps": 28, "guidance": 3.0, "call": {"guidance_scale": 3.0},
    }  # fmt: skip
    for field, other in others.items():
        text = text_of(tables.beside({"a": one, "b": other}))
        assert "its distances to the teacher do not compare: teacher." in text and field in text
        assert marked_in(text) == {"FID to teacher (FID-SD)", "KID to teacher"}
    assert "teacher.guidance: 3.0 / 9.0; teacher.call.guidance_scale: 3.0 / 9.0" in text_of(
        tables.beside({"a": one, "b": others["guidance"]})
    )
    # a report of before stamps named the teacher: it says the same elsewhere, but for the call
    for report, marked in ((one, False), (others["guidance"], True)):
        early = json.loads(json.dumps(report))
        del early["protocol"]["teacher"]
        text = text_of(tables.beside({"a": one, "b": early}))
        assert ("†" in text) == marked and "whose stamp lacks teacher.call, teacher.config: not compared" in text
    assert text_of(tables.beside({"a": one, "b": json.loads(json.dumps(one))})).count("†") == 0


def test_how_pictures_and_prompts_reach_a_scorer_is_in_the_stamp_and_the_key(tmp_path):
    """The same weights behind other preprocessing or another vocabulary are another measurement, and nothing kept is taken for it."""

    def scorer(**changes):
        return CLIPScore(tiny_clip(), changes.pop("tokenizer", tiny_tokenizer()), PREPROCESS._replace(**changes))

    def run(**changes):
        return evaluated(Pipe(), tmp_path, scorers={"clip": scorer(**changes)}, extractors=[], extractor="clip", data=real)

    looked_at = []
    real = Pictures({"n": 12}, 12, lambda i: looked_at.append(i) or Image.new("RGB", (9, 9), (20 * i, 0, 99)))
    one, again = run(), run()
    assert len(looked_at) == 12 and "fd_clip_data" in one["rows"][0]["metrics"]
    assert again["rows"][0]["sample"] == "kept" and one["protocol"] == again["protocol"]
    renamed = tiny_tokenizer()
    renamed.add_tokens(["zebra"])
    other = run(mean=(0.1, 0.2, 0.3))
    assert len(looked_at) == 24
    others = {"clip.pictures": other, "clip.vocabulary": run(tokenizer=renamed)}
    for field, other in others.items():
        assert other["rows"][0]["sample"] == "drawn"
        *rest, line = protocol.differences(one["protocol"], other["protocol"])
        assert line.startswith(f"preprocess.{field}: ") and len(rest) == (field == "clip.vocabulary")  # a tokenizer is in configs too
    assert "mean=(" in one["protocol"]["preprocess"]["clip"]["pictures"]  # in words
    judges = [SimpleNamespace(net=torch.nn.Identity(), preprocess=PREPROCESS._replace(crop=crop)) for crop in (None, (2, 2))]
    assert protocol.identity_of(judges[0]) != protocol.identity_of(judges[1])
    function = functools.partial(torch.clamp, min=0.5)
    assert protocol.in_words(function).endswith("clamp(min=0.5)") and "0x" not in protocol.in_words(lambda x: x)


def test_what_no_weight_tells_is_in_the_stamp_and_the_key(tmp_path):
    """The same weights under another configuration, or behind a tokenizer with other merges, are another measurement."""

    def scorer(**changes):
        merges = changes.pop("merges", None)
        clip = CLIPScore(tiny_clip(), tiny_tokenizer(), PREPROCESS)
        clip.model.config.vision_config.update(changes)
        if merges is not None:
            does = json.loads(clip.tokenizer.backend_tokenizer.to_str())
            does["model"]["merges"] = does["model"]["merges"][:merges]
            clip.tokenizer._tokenizer = type(clip.tokenizer._tokenizer).from_str(json.dumps(does))
        return clip

    few = PromptSet("few", MANY.prompts[:6])

    def run(**changes):
        clip, other = scorer(**changes.pop("clip", {})), scorer(**changes.pop("judge", {}))
        extractor = features.of_scorer("eyes", scorer(**changes.pop("eyes", {})))
        pipes = [Pipe(), Pipe(0.9)]
        for pipe, name in zip(pipes, ("student", "teacher"), strict=True):
            pipe.unet.config = {"scaling_factor": 1.0, "_name_or_path": str(changes), **changes.pop(name, {})}
            pipe.config = changes.pop(f"{name}_index", {})
        options = {"scorers": {"clip": clip}, "judges": {"judge": other.score}, "extractors": [extractor], "data": real, "prompts": few}
        return evaluated(pipes[0], tmp_path, teacher=pipes[1], **options)

    looked_at = []
    real = Pictures({"n": 12}, 12, lambda i: looked_at.append(i) or Image.new("RGB", (9, 9), (20 * i, 0, 99)))
    one, again = run(), run()
    assert [row["sample"] for row in again["rows"]] == ["kept"] * 3 and len(looked_at) == 12
    assert protocol.differences(one["protocol"], again["protocol"]) == [] and one["configs"] == again["configs"]
    for name in ("clip", "judge", "eyes"):
        other = run(**{name: {"hidden_act": "relu"}})
        assert [row["sample"] for row in other["rows"]] == ["drawn"] * 3
        (line,) = protocol.differences(one["protocol"], other["protocol"])
        assert line.startswith(f"configs.{name}: ")
    assert len(looked_at) == 24  # once more, by eyes
    (line,) = protocol.differences(one["protocol"], run(clip={"merges": 2})["protocol"])
    assert line.startswith("configs.clip: ")  # the vocabulary is the same one
    for change in ({"teacher": {"scaling_factor": 2.0}}, {"teacher_index": {"force_zeros_for_empty_prompt": True}}):
        other = run(**change)
        assert [row["sample"] for row in other["rows"]] == ["kept", "drawn", "drawn"]
        (line,) = protocol.differences(one["protocol"], other["protocol"])
        assert line.startswith("teacher.config: ")
    for change in ({"student": {"scaling_factor": 2.0}}, {"student_index": {"force_zeros_for_empty_prompt": True}}):
        other = run(**change)
        assert [row["sample"] for row in other["rows"]] == ["drawn", "kept", "kept"]
        assert other["student"] == one["student"] and other["configs"]["student"] != one["configs"]["student"]


@pytest.mark.parametrize("package", ["torch", "transformers", "torch-fidelity", "pillow", "fewstep", "diffusers"])
def test_features_are_those_of_the_libraries_that_made_them(tmp_path, monkeypatch, package):
    """Of real pictures as of drawn ones; what draws pictures decides none of the real ones'."""
    looked_at = []
    real = Pictures({"n": 12}, 12, lambda i: looked_at.append(i) or Image.new("RGB", (9, 9), (20 * i, 0, 99)))
    one = evaluated(Pipe(), tmp_path, data=real)
    assert evaluated(Pipe(), tmp_path, data=real)["rows"][0]["sample"] == "kept" and len(looked_at) == 12
    monkeypatch.setattr(evaluation, "version", lambda name: "0.0" if name == package else protocol.version(name))
    other = evaluated(Pipe(), tmp_path, data=real)
    assert other["rows"][0]["sample"] == "drawn"
    assert len(looked_at) == (12 if package == "diffusers" else 24)
    assert [line.partition(":")[0] for line in protocol.differences(one["protocol"], other["protocol"])] == [f"versions.{package}"]


def test_real_pictures_for_a_scorer_alone_are_read_by_a_version_too(tmp_path):
    """The embedded world's extractor is a scorer; the pictures that it is given with --data are read by Pillow all the same."""
    real = Pictures({"n": 12}, 12, lambda i: Image.new("RGB", (9, 9), (20 * i, 0, 99)))
    options = {"scorers": {"clip": CLIPScore(tiny_clip(), tiny_tokenizer(), PREPROCESS)}, "extractors": [], "extractor": "clip"}
    assert evaluated(Pipe(), tmp_path, data=real, **options)["protocol"]["versions"]["pillow"] == protocol.version("pillow")
    assert "pillow" not in evaluated(Pipe(), tmp_path, **options)["protocol"]["versions"]


def edit(path, *keys, value):
    """A JSON file with one value changed."""
    whole = held = json.loads(path.read_text())
    for key in keys[:-1]:
        held = held[key]
    held[keys[-1]] = value
    path.write_text(json.dumps(whole))


def test_a_pipelines_configuration_is_that_of_its_folder_wherever_it_is_read(tmp_path):
    import shutil

    pipe = other_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")

    def read(folder):
        return drawing.open_pipeline(folder, "cpu")

    before, weights = configs.pipeline_config(pipe), protocol.pipeline_fingerprint(pipe)
    told = "import sys\nfrom fewstep.evaluate import configs, drawing\n"
    told += "print(configs.pipeline_config(drawing.open_pipeline(sys.argv[1], 'cpu')))"
    shutil.copytree(tmp_path / "pipe", tmp_path / "elsewhere")
    found = fresh.run(told, str(tmp_path / "elsewhere"), printed=tmp_path / "printed")
    opened = read(tmp_path / "pipe")
    assert configs.pipeline_config(opened) == found.split()[-1] == before
    opened.tokenizer(["a cat"], padding="max_length", max_length=5, truncation=True)
    assert configs.pipeline_config(opened) == before  # how it was last called is not what it is
    changes = [
        ("vae/config.json", "scaling_factor", 0.5), ("text_encoder/config.json", "hidden_act", "gelu"),
        ("unet/config.json", "attention_head_dim", 2), ("tokenizer/tokenizer_config.json", "model_max_length", 6),
        ("tokenizer/tokenizer.json", "model", "merges", [["c", "a"]]), ("model_index.json", "requires_safety_checker", True),
    ]  # fmt: skip
    for i, (name, *keys, value) in enumerate(changes):
        shutil.copytree(tmp_path / "pipe", tmp_path / str(i))
        edit(tmp_path / str(i) / name, *keys, value=value)
        other = read(tmp_path / str(i))
        assert configs.pipeline_config(other) != before, name
        assert protocol.pipeline_fingerprint(other) == weights, name


def test_a_tokenizer_without_a_backend_is_told_by_its_files_and_settings(tmp_path):
    class Slow:
        model_max_length, init_kwargs = 8, {"lower": True, "vocab_file": "/here/vocab.json"}
        merges = "c a"

        def get_vocab(self):
            return {"cat": 0}

        def save_vocabulary(self, folder):
            path = Path(folder) / "merges.txt"
            path.write_text(self.merges)
            return (str(path),)

    def changed(**changes):
        return type("Slow", (Slow,), changes)()

    before = configs.settings(Slow())
    assert before == configs.settings(changed(init_kwargs=Slow.init_kwargs | {"vocab_file": "/elsewhere/vocab.json"}))
    for change in ({"model_max_length": 9}, {"init_kwargs": {"lower": False}}, {"merges": "a t"}):
        assert configs.settings(changed(**change)) != before, change


def test_a_part_is_told_by_the_configurations_inside_it():
    """A wrapper has those of the networks in it; numbers and functions have none."""
    wrapped = torch.nn.ModuleDict({"clip": tiny_clip(), "head": torch.nn.Linear(2, 2)})
    assert list(configs.settings(wrapped)) == ["clip"] and configs.settings(wrapped)["clip"]["config"]["vision_config"]["hidden_size"] == 16
    assert configs.config_hash(torch.nn.Linear(2, 2)) is None and protocol.config_of(bright) is None
    assert configs.config_hash(wrapped) == configs.config_hash(torch.nn.ModuleDict({"clip": tiny_clip(seed=1)}))
    assert configs.plain({"a": (torch.float32, {1: None}), "_b": 1, "dtype": "bf16"}) == {"a": ["torch.float32", {"1": None}]}


def test_reports_of_before_stand_in_one_table_with_todays():
    """The embedded world's own: equal where both stamps say something, and what the earlier one lacks is named."""
    here = Path(__file__).parent
    early, later = (json.loads(path.read_text()) for path in (here / "early_report.json", here.parent / "docs/results/gndmr-remote.json"))
    names = later["rows"][0]["metrics"]
    assert protocol.compared(protocol.stamp_of(early), protocol.stamp_of(later), names) == ({}, ["preprocess", "teacher.call"])
    teacher = protocol.stamp_of(early)["teacher"] | {"call": {"guidance_scale": 3.0}}
    without = {key: value for key, value in protocol.stamp_of(later).items() if key not in ("extractors", "precision")}
    seconds = ["seconds_per_image"]  # of no extractor
    assert protocol.compared(without, protocol.stamp_of(later), seconds)[0] == {"precision: none / fp32": seconds}
    today = early | {"protocol": early["protocol"] | {"teacher": teacher, "preprocess": {}}}
    text = " ".join(text_of(tables.beside({"today": today, "early": early})).split())
    assert "†" not in text and "early or today is of an earlier version, whose stamp lacks preprocess, teacher.call: not compared" in text
    today["protocol"]["teacher"] = teacher | {"steps": 20}
    text = " ".join(text_of(tables.beside({"today": today, "early": early})).split())
    assert "† early was measured beside another teacher than today" in text and "teacher.steps: 20 / 28" in text


def few_real(n):
    return Pictures({"n": n}, n, lambda i: Image.new("RGB", (4, 4), (i, 2 * i, 99 - i)))


TWO, THREE = PromptSet("few", ["a", "b c"]), PromptSet("few", ["a", "b c", "d"])


@pytest.mark.parametrize("prompts, real, said", [
    (TWO, 9, {
        "kid_data": "2 pictures, but its interval leaves a prompt out, and the mean over pairs needs two pictures of the others",
        "kid_teacher": "2 pictures, but its interval leaves a prompt out, and the mean over pairs needs two pictures of the others",
        "recall": "2 pictures, but a ball reaches to neighbour 3 of its picture and needs more than 3",
    }),
    (THREE, 3, {
        "precision": "3 real pictures, but a ball reaches to neighbour 3 of its picture and needs more than 3",
        "recall": "3 pictures, but a ball reaches to neighbour 3 of its picture and needs more than 3",
    }),
    (MANY, 1, {
        "kid_data": "1 real picture, but it takes the mean over pairs of different ones",
        "precision": "1 real picture, but a ball reaches to neighbour 3 of its picture and needs more than 3",
    }),
])  # fmt: skip
def test_what_a_few_pictures_do_not_allow_is_left_out_of_a_report(tmp_path, prompts, real, said):
    report = evaluated(Pipe(), tmp_path, teacher=Pipe(0.8), prompts=prompts, images_per_prompt=1, data=few_real(real))
    assert {name: why for name, why in report["left_out"].items() if not name.startswith(("fid", "diversity"))} == said
    assert not said.keys() & report["rows"][0]["metrics"].keys()
    assert {"kid_data", "kid_teacher", "precision", "recall", "bright"} - said.keys() <= report["rows"][0]["metrics"].keys()
    evaluation.save(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert f"jackknife over {min(20, len(prompts.prompts))} blocks of prompts" in " ".join(tables.notes(report)) or prompts is TWO


def test_a_number_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(ValueError, match=r"report.json: not saved, the report holds a number that is not finite"):
        evaluation.save({"rows": [{"value": float("nan")}]}, tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_what_was_left_out_stands_below_the_table(tmp_path):
    report = evaluated(Pipe(), tmp_path, images_per_prompt=1)
    text = " ".join(text_of(tables.as_table(report)).split())
    assert "no diversity within a prompt: needs at least two pictures of every prompt" in text


def seconds_cells(text):
    """The cells of a table's row of seconds per image, and of the row of the judge `bright`."""
    found = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]] for line in text.splitlines() if line.startswith("│")}
    return found["seconds per image"], found["bright ↑"]


def test_what_some_samples_lack_is_said_of_those(tmp_path):
    """A judge that scored nothing of one sample has numbers in the others' columns."""

    def light(images, prompts):
        return bright(images, prompts) if images.mean() > 0.3 else torch.full((len(images),), torch.nan)

    report = evaluated(Pipe(), tmp_path, teacher=Pipe(0.3), judges={"light": light})
    assert ["light" in row["metrics"] for row in report["rows"]] == [True, False, False]
    titles = [row["name"] for row in report["rows"][1:]]
    assert report["left_out"]["light"] == "; ".join(f"80 of 80 pictures got no score ({title})" for title in titles)


def test_a_report_without_a_teacher_compares_with_one_beside_it(tmp_path):
    """But for the distances to the teacher; nor is it another protocol when the prompts' file has another name."""
    beside, alone = (evaluated(Pipe(), tmp_path, teacher=teacher) for teacher in (Pipe(1.0), None))
    text = " ".join(text_of(tables.beside({"a": beside, "b": alone})).split())
    assert "†" not in text and "measured" not in text  # there are no distances to a teacher in the second
    renamed = alone | {"protocol": alone["protocol"] | {"set": "another.csv"}}
    assert "†" not in text_of(tables.beside({"a": alone, "b": renamed}))


def test_seconds_belong_to_the_device_and_to_the_pictures_drawn_together(tmp_path, monkeypatch):
    """Two reports that differ in these alone compare in all but the seconds; a kept sample's are those it was drawn with."""
    few = PromptSet("few", MANY.prompts[:3])
    one, same, whole = (evaluated(Pipe(), tmp_path / name, batch=batch) for name, batch in (("one", 3), ("same", 3), ("whole", 100)))
    device = protocol.device_name("cpu")
    assert [report["rows"][0]["timed"] for report in (one, same, whole)] == [
        {"device": device, "drawn_together": 3}, {"device": device, "drawn_together": 3}, {"device": device, "drawn_together": 10},
    ]  # fmt: skip
    assert evaluated(Pipe(), tmp_path / "few", prompts=few, batch=100)["rows"][0]["timed"]["drawn_together"] == 6
    assert evaluated(Pipe(), tmp_path / "one", batch=4)["rows"][0]["timed"]["drawn_together"] == 3  # kept
    monkeypatch.setattr(samples, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(evaluation, "device_name", lambda device: "a GPU")
    moved = evaluated(Pipe(), tmp_path / "moved", batch=3)
    assert moved["protocol"]["device"] == "a GPU" and moved["rows"][0]["timed"] == {"device": "a GPU", "drawn_together": 3}
    # drawn here, and measured elsewhere
    assert evaluated(Pipe(), tmp_path / "one")["rows"][0]["timed"] == one["rows"][0]["timed"]
    text = text_of(tables.beside({"a": one, "b": same, "c": whole, "d": moved}))
    (a, b, c, d), judged = seconds_cells(text)
    assert c.endswith(" ‡") and d.endswith(" ‡") and "‡" not in a + b + "".join(judged) and "†" not in text
    assert (
        "‡ seconds per image that were not measured as those of a: student, 4 steps, and do not compare: c: student, 4 steps "
        f"(drawn_together: 3 / 10); d: student, 4 steps (device: {device} / a GPU)"
    ) in " ".join(text.split())
    # beside a difference of another kind each is said for itself
    other = evaluated(Pipe(), tmp_path / "other", batch=4, seed=7)
    said = " ".join(text_of(tables.beside({"a": one, "b": other})).split())
    assert "† b was measured otherwise than a, and its numbers do not compare: seeds.rows: 0 / 7 ‡" in said
    assert f"b: student, 4 steps (device: {device} / a GPU; drawn_together: 3 / 4)" in said


def test_seconds_within_one_report_are_marked_likewise(tmp_path):
    """A teacher whose sample was kept from an evaluation with another batch, and a sample of which each half was drawn with another."""
    evaluated(Pipe(0.8), tmp_path / "kept", teacher=Pipe(), batch=5)
    report = evaluated(Pipe(0.7), tmp_path / "kept", teacher=Pipe(), batch=4)
    assert [row["timed"]["drawn_together"] for row in report["rows"]] == [4, 5, 5]
    (student, teacher, few, paired), judged = seconds_cells(text_of(tables.as_table(report)))
    assert teacher.endswith(" ‡") and few.endswith(" ‡") and "‡" not in student + paired + "".join(judged)
    assert any(note.startswith("‡ seconds per image") and "drawn_together: 4 / 5" in note for note in tables.notes(report))
    evaluated(Pipe(0.6), tmp_path / "halves", share=(0, 2), batch=5)
    halves = evaluated(Pipe(0.6), tmp_path / "halves", batch=2)
    assert halves["rows"][0]["timed"]["drawn_together"] == [2, 5]
    assert "student, 4 steps (drawn_together: 2 and 5)" in tables.notes(halves)[-1]


def test_seconds_of_before_are_compared_by_the_device_alone(tmp_path):
    one, early = evaluated(Pipe(), tmp_path), evaluated(Pipe(), tmp_path)
    for row in early["rows"]:
        del row["timed"]
    text = text_of(tables.beside({"a": one, "b": early}))
    assert "‡" not in text and "†" not in text
    assert "b or a is of an earlier version, whose stamp lacks drawn_together: not compared" in text
    early["rows"][0]["device"] = "another machine"
    assert seconds_cells(text_of(tables.beside({"a": one, "b": early})))[0][1].endswith(" ‡")
    # parts that an earlier version kept do not say it
    assert samples.timing(["cpu"], ["unknown"]) == {"device": "cpu", "drawn_together": None}
    assert samples.timing(["a", "b"], ["16", "4", "unknown"]) == {"device": ["a", "b"], "drawn_together": [None, 4, 16]}


# The command


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, "resample": 3}))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher_folder):
    """A student's folder as another tool may have left it: a pipeline, no run."""
    from diffusers import DiffusionPipeline, LCMScheduler

    folder = tmp_path_factory.mktemp("student") / "pipeline"
    shutil.copytree(teacher_folder, folder)
    pipe = DiffusionPipeline.from_pretrained(teacher_folder)
    scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=2, timestep_spacing="trailing")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def command(student, teacher_folder, clip_folder, tmp_path, monkeypatch):
    """The arguments of an evaluation of the student against its teacher and twelve real pictures."""
    (tmp_path / "real").mkdir()
    for i in range(12):
        Image.fromarray((normal(9, 11, 3, seed=i) * 60 + 128).clamp(0, 255).byte().numpy()).save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "captions.csv").write_text(
        "image_id,caption\n" + "".join(f"{i},a {w}\n" for i, w in enumerate(["cat", "dog", "pie", "cat", "hat"]))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(drawing, "TEACHER_STEPS", 3)
    return [
        "evaluate", str(student), "--against", str(teacher_folder),
        "--data", str(tmp_path / "real"), "--prompts", str(tmp_path / "captions.csv"), "--images-per-prompt", "2",
        "--extractor.clip", str(clip_folder), f"--judge.clip={clip_folder}", "--judge.preference", str(clip_folder),
        "--output", str(tmp_path / "report.json"), "--batch", "3",
    ]  # fmt: skip


def clear(student):
    shutil.rmtree(student / "evaluation", ignore_errors=True)


def test_the_command_measures_any_model(command, student, tmp_path, capsys):
    clear(student)
    assert cli.main(command) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        "student, 2 steps", "teacher, 3 steps", *(f"teacher, 2 steps, {name}" for name in drawing.SOLVERS),
    ]  # fmt: skip
    assert list(report["rows"][0]["metrics"]) == [
        "fd_clip_data", "cmmd_data", "fd_clip_teacher", "cmmd_teacher",
        "clip", "clip_over_shuffled", "preference", "preference_over_shuffled",
        "precision", "recall", "diversity", "network_evaluations", "seconds_per_image",
    ]  # fmt: skip
    assert [row["metrics"]["network_evaluations"]["value"] for row in report["rows"]] == [2, 6, 4, 4, 4]
    stamp = report["protocol"]
    assert stamp["set"] == "captions.csv" and stamp["n"] == 10 and stamp["data"]["n"] == 12 and stamp["noise"] == "picture"
    assert list(stamp["extractors"]) == ["extractor-clip"] and set(stamp["scorers"]) == {"clip", "preference"}
    assert [row["guidance"] for row in report["rows"][:2]] == [1.0, 7.5]  # the family's own
    out = capsys.readouterr().out
    assert "CMMD to data ↓" in out and f"saved {tmp_path / 'report.json'}" in out
    # the same call again draws nothing; beside another, what differs is said
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(report))
    assert cli.main([*command, "--seed", "3", "--beside", str(earlier)]) == 0
    assert "seeds.rows: 3 / 0" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "student, 2 steps: read from" in capsys.readouterr().out


def test_pictures_are_drawn_in_the_arithmetic_and_with_the_seed_that_are_asked_for(command, monkeypatch):
    told = []
    monkeypatch.setattr("fewstep.evaluate.command.measure_student", lambda student, teacher, size, **given: told.append(given))
    assert cli.main([*command, "--precision", "bf16", "--seed", "3", "--teacher-steps", "7"]) == 0
    assert [told[0][name] for name in ("precision", "seed", "teacher_steps", "batch")] == ["bf16", 3, 7, 3]
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        pipe = source_of(command[1], None, device="cpu", precision=precision, student=True)().pipe
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {dtype}


def test_two_shares_of_the_command_are_one(command, student, tmp_path, capsys):
    clear(student)
    assert cli.main(command) == 0
    whole = json.loads((tmp_path / "report.json").read_text())
    one = kept(student / "evaluation")
    clear(student)
    import shutil

    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "report.json").unlink()
    capsys.readouterr()
    for share in ("1/2", "0/2"):
        assert cli.main([*command, "--shard", share]) == 0
        if share == "1/2":
            assert "share 1 of 2 is drawn. When all are, the same call without a share measures" in capsys.readouterr().out
            assert not (tmp_path / "report.json").exists()
    assert cli.main(command) == 0
    assert without_times(json.loads((tmp_path / "report.json").read_text())) == without_times(whole)
    assert_same(kept(student / "evaluation"), one)


def test_two_processes_of_a_torchrun_are_one(command, student, tmp_path):
    """Each draws its share in a process of its own, with another hash seed; the first measures when both have done."""
    clear(student)
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.free_port())}
    other = "import sys; from fewstep import cli; from fewstep.evaluate import drawing, samples; "
    other += f"drawing.TEACHER_STEPS = 3; samples.SHARD = 10; sys.exit(cli.main({command!r}))"
    job = fresh.start(other, printed=tmp_path / "printed", environment=together | {"RANK": "1"})

    def first():
        os.environ.update(together | {"RANK": "0"})
        torch.set_num_threads = lambda n: print(f"{n} threads from here on")  # the last digits would be other ones

    code, output = forked.command(*command, before=first)
    assert [code, fresh.ended(job)] == [0, 0], (output, (tmp_path / "printed").read_text())
    measuring_on = len(os.sched_getaffinity(0))
    assert f"{measuring_on} threads from here on\nevery share is drawn: measuring, on {measuring_on} processor" in output
    shared = json.loads((tmp_path / "report.json").read_text())
    parts = kept(student / "evaluation")
    clear(student)
    import shutil

    shutil.rmtree(tmp_path / "cache")
    assert cli.main(command) == 0
    assert without_times(json.loads((tmp_path / "report.json").read_text())) == without_times(shared)
    assert_same(kept(student / "evaluation"), parts)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--prompts": None}, "--prompts: missing"),
        ({"--prompts": "nowhere.csv"}, "nowhere.csv: cannot be read"),
        ({"--prompts": "drawbench=CAPTIONS"}, "holds 5 prompts; drawbench has 200"),
        ({"--data": "nowhere"}, "nowhere: no such folder, and not a data set"),
        ({"--against": "./nowhere"}, "./nowhere: no such folder"),
        ({"--shard": "2/2"}, "--shard: i/n"),
        ({"--batch": "0"}, "--batch: must be at least 1"),
        ({"--seed": "-1"}, "--seed: must not be negative"),
        ({"--guidance": "nan"}, "--guidance: must be 1, which is no guidance, or more, got nan"),
        ({"--guidance": "0"}, "--guidance: must be 1, which is no guidance, or more, got 0.0"),
        ({"--output": "FOLDER"}, "is a folder; name the report's file"),
        ({"--output": "CAPTIONS/report.json"}, "--output: cannot write to"),
        ({"--keep-images": "CAPTIONS"}, "--keep-images: cannot write to"),
        ({"--extractor.clip": "x", "again": True}, "--extractor.clip: given twice"),
        ({"--remote.timeout": "0"}, "remote.timeout: must be positive and at most a day (86400), got 0.0"),
        ({"--beside": "CAPTIONS"}, "not a report of fewstep evaluate"),
        ({"--judge.clpi": "x"}, "judge.clpi: unknown reward; did you mean 'clip'"),
        ({"--judge.fid_teacher": "mine.py:f"}, "judge.fid_teacher: another number of the report has this name"),
        ({"--judge.preference": None}, "judge.preference: give the folder or hub id of its model, --judge.preference FOLDER"),
        ({"--judge.preference": "nowhere"}, "judge.preference: nowhere"),
        ({"--extractor.inceptoin": "x"}, "extractor.inceptoin: unknown"),
        ({"--extractor.clip": None, "drop": True}, "--data: nothing to compare pictures by"),
        ({"--extractor.clip": None, "--data": None, "--resize": "64", "drop": True}, "--resize: is of pictures before an extractor"),
        ({"--against": "none", "--teacher-steps": "9"}, "--teacher-steps: there is no teacher"),
        ({"--against": "none", "--negative-prompt": "x"}, "--negative-prompt: is that of a teacher, and there is none"),
        ({"--negative-prompt": "x", "--guidance": "1"}, "--negative-prompt: nothing is guided away from it at guidance 1"),
        ({"--against": "none", "--guidance": "7.5"}, "--guidance: is that of a teacher, and there is none"),
        ({"--steps": "4"}, "--steps: this student was made for 2 steps, not 4"),
        ({"--size": "16"}, "--size: HEIGHTxWIDTH, as 1024x768; got '16'"),
        ({"--size": "15x16"}, "--size: "),
    ],
)
def test_a_wrong_argument_gets_one_clear_line(command, tmp_path, capsys, change, words):
    arguments = list(command)
    drop, again = "drop" in change, "again" in change
    for flag, value in change.items():
        if value is True:
            continue
        value = value and value.replace("CAPTIONS", str(tmp_path / "captions.csv")).replace("FOLDER", str(tmp_path))
        if flag in arguments and not again:
            at = arguments.index(flag)
            arguments[at : at + 2] = [] if value is None and (drop or flag == "--prompts") else [flag] if value is None else [flag, value]
        else:
            arguments += [flag, value]
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fewstep: error: ") and words in lines[-1], lines


def test_a_judges_server_has_the_runs_time_or_that_of_the_flag(command, student, tmp_path, monkeypatch):
    asked = []

    def load(named, *, timeout, **others):
        asked.append(timeout)
        raise UserError("enough")

    monkeypatch.setattr("fewstep.evaluate.command.load_judges", load)
    assert cli.main(command) == 2 and asked == [120.0]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "config.yaml").write_text("remote:\n  timeout: 9\nsize: [8x8]\n")
    of_a_run = ["evaluate", str(folder), *command[2:]]
    assert cli.main(of_a_run) == cli.main([*of_a_run, "--remote.timeout", "7"]) == 2
    assert asked == [120.0, 9.0, 7.0]


def test_a_student_without_a_teacher_and_without_anything_to_measure(command, student, capsys, tmp_path):
    alone = [word for word in command if not word.startswith("--judge.clip=")]
    for flag in ("--against", "--data", "--extractor.clip", "--judge.preference"):
        at = alone.index(flag)
        del alone[at : at + 2]
    assert cli.main(alone) == 2
    assert "nothing to measure with" in capsys.readouterr().err
    judge = next(word for word in command if word.startswith("--judge.clip="))
    assert cli.main([*alone, judge]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["student, 2 steps"] and report["best_solver"] is None and "teacher" not in report
    assert cli.main(["evaluate", "no such thing", *alone[2:], judge]) == 2
    assert "no such folder, and not a hub id" in capsys.readouterr().err


def test_a_stock_consistency_model_says_no_steps(student, tmp_path):
    """diffusers writes the 50 timesteps of its distillation into every LCM's scheduler, of which any number is taken."""
    from diffusers import LCMScheduler

    assert models.steps_of(student) == 2
    for spacing in ("leading", "trailing"):  # the latter from a Turbo's or a Lightning's configuration
        LCMScheduler(timestep_spacing=spacing).save_pretrained(tmp_path / "scheduler")
        assert models.steps_of(tmp_path) is None


def test_pictures_of_two_sizes_are_not_compared(command, student, teacher_folder, tmp_path, capsys):
    """A student made of a network at another size than its teacher's: one size is asked for, before anything is drawn, and both have it."""
    clear(student)
    larger = shutil.copytree(student, tmp_path / "larger")
    described = larger / "unet" / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"sample_size": 16}))
    command[1] = str(larger)
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert f"pictures of two sizes do not compare ({larger} at 32x32, {teacher_folder} at 8x8). Give one, as --size 32x32" in error
    assert not kept(larger / "evaluation")
    (larger / "config.yaml").write_text("steps: 2\n")  # of a run that was told no size
    assert cli.main(command) == 2 and "pictures of two sizes do not compare" in capsys.readouterr().err
    assert cli.main([*command, "--size", "24x16"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["protocol"]["resolution"] == [24, 16] and report["protocol"]["teacher"]["call"]["height"] == 24
    assert "24 x 16 pixels" in capsys.readouterr().out


def test_judges_alone_ask_for_no_second_sample_of_the_teacher(command, student, clip_folder, tmp_path, monkeypatch):
    """It is there for distances; without one no solver is the best."""
    clear(student)
    rows, collect = [], samples.Sampler.collect

    def counted(self, source, row, *rest):
        rows.append(row["name"])
        return collect(self, source, row, *rest)

    monkeypatch.setattr(samples.Sampler, "collect", counted)
    for flag in ("--data", "--extractor.clip"):
        at = command.index(flag)
        del command[at : at + 2]
    assert cli.main(command) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert rows == [row["name"] for row in report["rows"]] and report["best_solver"] is None
    # with an extractor it is drawn, and no judge is asked about it
    rows.clear()
    assert cli.main([*command, "--extractor.clip", str(clip_folder)]) == 0
    assert rows[-1] == "teacher, 3 steps, second sample"
    notes = [json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("*.json")]
    of_last = [note["look"][0] for note in notes if note.get("row", {}).get("name") == rows[-1]]
    assert sorted(of_last) == ["cost", "features/extractor-clip"]


def test_a_sample_is_kept_by_what_decides_its_pictures(command, student, tmp_path, capsys):
    """Not by whether there is a teacher, nor by what the prompts' file is called."""
    clear(student)
    alone = [word if word != command[3] else "none" for word in command]
    assert cli.main(alone) == cli.main(command) == 0
    assert "student, 2 steps: read from" in capsys.readouterr().out
    (tmp_path / "captions.csv").rename(tmp_path / "others.csv")
    assert cli.main([word.replace("captions.csv", "others.csv") for word in command]) == 0
    assert capsys.readouterr().out.count(": read from") == 6


def test_the_teacher_is_guided_away_from_what_the_run_was_unless_told_otherwise(command, student, tmp_path, monkeypatch, teachers, capsys):
    told = []
    monkeypatch.setattr("fewstep.evaluate.command.measure_student", lambda *given, **options: told.append(options["negative_prompt"]))
    command[1] = str(shutil.copytree(student, tmp_path / "run"))
    assert cli.main(command) == 0
    config = Config(teacher=command[3], steps=2, matching=MatchingConfig(negative_prompt="blurry"))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(as_plain(config)))
    for more in ([], ["--negative-prompt", "dark"], ["--negative-prompt", ""], ["--guidance", "1"]):
        assert cli.main([*command, *more]) == 0, capsys.readouterr().err
    assert told == ["", "blurry", "dark", "", ""]
    command[3], sized = str(teachers / "FluxPipeline"), ["--size", "16x16"]
    for more, words in (([], 'the run has one; give --negative-prompt ""'), (["--negative-prompt", "dark"], "leave the flag out")):
        assert cli.main([*command, *sized, *more]) == 2
        error = capsys.readouterr().err
        assert f"--negative-prompt: {command[3]}: the guidance of a FluxPipeline is part of its network" in error and words in error
    assert cli.main([*command, *sized, "--negative-prompt", ""]) == 0 and told[-1] == ""


def test_an_exported_student_is_measured_as_its_run_says_and_beside_no_teacher_unasked(command, student, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("fewstep.evaluate.command.measure_student", lambda student, *given, **how: asked.append((*given, how)))
    command[1] = str(shutil.copytree(student, tmp_path / "export"))
    trained = Config(teacher=command[3], steps=2, teacher_guidance=5, size=["16x16"], matching=MatchingConfig(negative_prompt="blurry"))
    export.write_record(trained, tmp_path / "export")
    assert cli.main(command) == 0 and cli.main([*command[:2], *command[4:]]) == 0
    (*first, beside), (*second, _) = asked
    assert first == [command[3], (16, 16)] and second == [None, (16, 16)]
    assert beside["negative_prompt"] == "blurry" and beside["guidance"] == 5


def test_a_student_of_the_hub_says_its_own_steps(command, student, monkeypatch, tmp_path, capsys):
    """By its configurations: the weights are the pipeline's to fetch."""
    asked, told = [], {}
    monkeypatch.setattr(models, "index_on_hub", lambda source: student / "model_index.json")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda source, revision, allow_patterns: asked.append(allow_patterns) or str(student)
    )
    monkeypatch.setattr("fewstep.evaluate.command.measure_student", lambda *given, **options: told.update(options, student=given[0]))
    assert cli.main(["evaluate", "someone/student", *command[2:]]) == 0
    assert told["steps"] == 2 and told["student"] == f"someone/student@{student.name}"
    assert {tuple(one) for one in asked} == {models.CONFIGURATIONS}
    ranged = shutil.copytree(student, tmp_path / "hub")
    config = ranged / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_cond_proj_dim": 8}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda source, revision, allow_patterns: str(ranged))
    assert cli.main(["evaluate", "someone/student", *command[2:]]) == 2
    assert "--guidance: missing; someone/student is told its scale" in capsys.readouterr().err


def test_inception_measures_what_a_few_pictures_allow(command, student, tmp_path, capsys):
    """KID; no FID of ten pictures, no patch-FID of eight pixels: both said."""
    network = fidelity.inception()
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    short = [
        *command[: command.index("--extractor.clip")],
        "--extractor.inception",
        str(tmp_path / "inception.pth"),
        *command[-4:],
        "--against",
        "none",
    ]
    assert cli.main(short) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    metrics = report["rows"][0]["metrics"]
    assert "kid_data" in metrics and "fid_data" not in metrics and "patch_fid_data" not in metrics
    assert report["left_out"]["fid_data"] == "10 pictures, but the covariance of 2048 features needs more than 2048"
    assert report["left_out"]["patch-FID"] == "pictures of 8 x 8 hold no crop of 299 pixels"
    assert report["protocol"]["extractors"]["inception"]["weights"] == store.fingerprint(network)
    assert "no FID to data: 10 pictures" in " ".join(capsys.readouterr().out.split())


def test_the_pictures_of_a_machine_with_several_gpus_are_drawn_without_a_warning(monkeypatch, recwarn):
    """Torch warns where it is to keep the state of each, which takes a device that a pipeline has nothing to do with."""
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("a pipeline on the CPU asked for a GPU's state"))
    monkeypatch.setattr("torch.random._fork_rng_warned_already", False)
    drawing.generate(drawing.open_pipeline(world.TEACHER, "cpu"), ["a cat"], 1, steps=1, seed=0)
    assert not [warning for warning in recwarn if "fork_rng" in str(warning.message)]
