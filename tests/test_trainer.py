"""The loop on a tiny random teacher: bit-exact resume, stops on NaN, what is trained and what is not."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import small_run
import torch
from safetensors.torch import save_file
from test_distribution import Plain

from fewstep import checkpoint, composition, flags, losses
from fewstep.config import Config
from fewstep.errors import NumericalError, UserError
from fewstep.evaluate import drawing
from fewstep.metrics import MetricsLog, logged
from fewstep.models import backbone
from fewstep.prompts import Batches, read
from fewstep.rewards.base import PixelReward, RewardError, as_reward
from fewstep.rewards.distribution import DistributionMatching
from fewstep.run import draw_progress, finish, say_what_is_cut, student_grid, teacher_grids
from fewstep.schedule import Flow
from fewstep.student import Student
from fewstep.trainer import Trainer
from fewstep.transforms import advantages
from fewstep.types import Signal, Term
from fewstep.weights import Fixed

OPTIONS = [
    *("--groups", "2", "--group-size", "2", "--reuse.rollout", "3", "--save-every", "100"),
    *("--student.lr", "1e-3", "--fake.condition", "step", "--fake.updates", "2"),
]


EVERYTHING = [
    *("--reuse.rollout", "2", "--reuse.evaluation", "2", "--reuse.min-ess", "0"),
    *("--reward.redness", "0.3", "--reward.contrast", "0.2", "--via.contrast", "policy"),
    *("--weights.mode", "adaptive", "--weights.warmup", "2", "--fake.lr", "3e-3", "--seed", "6"),  # its KL is clear of zero
]


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def contrast(images, prompts):
    return images.std((1, 2, 3)).tolist()  # a black box: no gradient comes out of it


RANGE = ("--matching.guidance", "[1.5,8]")
TWICE = ("--reuse.rollout", "2")
SIMULATING = ("--reuse.backward-simulation", "--fake.condition", "none")


def run_of(teacher_folder, prompt_file, *options):
    config = flags.parse_config([*OPTIONS, "--teacher", str(teacher_folder), "--updates", "8", *options])
    rewards, judges = {"redness": redness, "contrast": contrast}, {"redness": small_run.brightness} if config.reward else {}
    return composition.build(config, read(prompt_file), str(teacher_folder), rewards, judges)


def tensors(state):
    return checkpoint.pack(state)[0], checkpoint.pack(state)[1]


def assert_same(a, b):
    (first, rest_a), (second, rest_b) = tensors(a), tensors(b)
    # outside the asserts: pytest would spell the difference of long lists out, for minutes
    names_are_equal, the_rest_is_equal = first.keys() == second.keys(), rest_a == rest_b
    assert names_are_equal and the_rest_is_equal
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.parametrize(
    "stop_at, until, options",
    [
        (1, 3, TWICE),
        (2, 3, TWICE),
        (3, 5, TWICE),
        (1, 3, (*TWICE, "--lora-rank", "2")),
        (1, 3, (*TWICE, "--fake.condition", "none")),
        (3, 5, EVERYTHING),
        (4, 6, EVERYTHING),
        (4, 7, (*EVERYTHING, "--reuse.min-ess", "1", "--reuse.evaluation", "3")),
        (3, 5, ("--reuse.backward-simulation", "true", "--reuse.rollout", "1")),
        (4, 6, ("--size", "16x8,8x16", "--reuse.rollout", "1")),
        (4, 6, ("--size", "16x8,8x16", "--reuse.rollout", "1", *RANGE)),
        (3, 5, (*RANGE, "--lora-rank", "2", "--reuse.rollout", "2")),
    ],
    ids=[
        "mid-rollout",
        "end-of-rollout",
        "second-rollout",
        "lora",
        "unconditioned",
        "mid-evaluation",
        "rewards",
        "asked-again",
        "backward-simulation",
        "sizes",
        "range, sizes",
        "range, lora",
    ],
)
def test_resume_is_bit_exact(teacher_folder, prompt_file, tmp_path, stop_at, until, options):
    """Into the next rollout; the save itself leaves the run that goes on as it was."""
    straight = run_of(teacher_folder, prompt_file, *options).trainer
    for _ in range(stop_at):
        straight.step()
    before = snapshot(straight)
    straight.save(tmp_path)
    _, saved = checkpoint.newest(tmp_path / "checkpoints")
    assert_same(before, saved)
    assert_same(before, straight.state())
    rollouts = straight.rollouts
    for _ in range(until - stop_at):
        straight.step()
    assert straight.rollouts > rollouts
    torch.manual_seed(12345)  # whatever happened to the generator in between must not matter
    second = run_of(teacher_folder, prompt_file, *options).trainer
    second.load_state(saved)
    for _ in range(until - stop_at):
        second.step()
    assert_same(straight.state(), second.state())


def test_a_seed_decides_a_run_whatever_was_drawn_before_it(teacher_folder, prompt_file):
    """Its prompts' order, where its adapters begin, and all the noise after that."""

    def begun(seed):
        trainer = run_of(teacher_folder, prompt_file, "--lora-rank", "2", "--seed", str(seed)).trainer
        drawn = torch.cat([p.detach().flatten() for p in trainer.parameters.values()]), torch.rand(3)
        return [trainer.batches.next()[0] for _ in range(4)], *(each.tolist() for each in drawn)

    first, again, other = begun(1), begun(1), begun(2)
    assert first == again
    assert not any(one == two for one, two in zip(first, other, strict=True))


def test_a_negative_prompt_is_the_teachers_inside_matching_alone(teacher_folder, prompt_file, tmp_path):
    """The discriminator looks under the empty prompt as before."""
    save_file({"latents": torch.randn(5, 4, 4, 4)}, tmp_path / "real.safetensors")
    told = ("--reward.discriminator", "0.1", "--discriminator.latents", str(tmp_path / "real.safetensors"))
    plain, led = (run_of(teacher_folder, prompt_file, *told, *more) for more in ((), ("--matching.negative-prompt", "blurry")))
    assert plain.roles.teacher.negative is led.roles.student.negative is led.roles.fake.negative is None
    for key, value in led.backbone.encode(["blurry"]).items():
        assert torch.equal(led.roles.teacher.negative[key], value)
    x0, group = torch.randn(4, *led.backbone.latent_shape()), torch.tensor([0, 0, 1, 1])
    t, noise, cond = torch.full((4,), 0.5), torch.randn_like(x0), led.backbone.encode(["a cat", "a cat", "a dog", "a dog"])
    own = [{name: term.reward for name, term in run.trainer.terms.items()} for run in (plain, led)]
    one, other = (terms["dm"].evaluate(x0, cond, group, k=torch.zeros(4, dtype=torch.long), t=t, noise=noise) for terms in own)
    assert torch.equal(one.score, other.score) and not torch.allclose(one.direction, other.direction, atol=1e-3)  # a score has no guidance
    assert torch.equal(*(terms["discriminator"].features(x0, t, noise) for terms in own))


@pytest.mark.parametrize("scale, away", [("3", {"negative_prompt": "blurry"}), ("1", {})])
def test_a_teacher_with_a_negative_prompt_is_shown_and_measured_with_it(teacher_folder, prompt_file, tmp_path, monkeypatch, scale, away):
    run = run_of(teacher_folder, prompt_file, "--matching.negative-prompt", "blurry", "--teacher-guidance", scale)
    calls, measured = [], []
    monkeypatch.setattr("fewstep.run.sample_grid", lambda pipe, prompts, steps, call: calls.append(call))
    teacher_grids(run, ["a cat"], "DDIM")
    assert calls == [run.backbone.teacher_call(float(scale)) | away | run.backbone.told_size()] * 2
    run.config = dataclasses.replace(run.config, teacher="world")  # which measures its students
    monkeypatch.setattr("fewstep.run.measure_student", lambda *given, **told: measured.append(told) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finish(run, tmp_path, str(teacher_folder), ["a cat"])
    assert (measured[0]["guidance"], measured[0]["negative_prompt"]) == (float(scale), away.get("negative_prompt", ""))
    assert measured[0]["device"] == "cpu"  # the run's own, whatever GPUs there are


def test_a_fake_and_a_discriminator_learn_as_they_are_told(teacher_folder, prompt_file, tmp_path):
    """A discriminator has a rate of its own, and all else from the fake and the matching."""
    save_file({"latents": torch.randn(5, 4, 4, 4)}, tmp_path / "real.safetensors")
    told = ("--fake.lr", "7e-4", "--fake.betas", "[0.5,0.8]", "--fake.decay", "0.25", "--fake.updates", "3", "--fake.max-norm", "0.5")
    told += ("--fake.on", "last", "--fake.condition", "none")
    told += ("--reward.discriminator", "0.1", "--discriminator.latents", str(tmp_path / "real.safetensors"), "--discriminator.lr", "3e-4")
    terms = run_of(teacher_folder, prompt_file, *told, "--matching.t-range", "[0.3,0.6]").trainer.terms
    assert {name: term.lr for name, term in terms.items()} == {"dm": 7e-4, "discriminator": 3e-4}
    for term in terms.values():
        assert (term.betas, term.decay, term.updates, term.max_norm, term.on) == ((0.5, 0.8), 0.25, 3, 0.5, "last")
        assert term.reward.t_range == (0.3, 0.6)


@pytest.mark.parametrize("told, share", [(0.3, 0.3), (0.999, 1 - 2**-0.75)], ids=["told", "warming up"])
def test_a_student_learns_and_is_averaged_as_it_is_told(told, share):
    """The average forgets the beginning first, as long as it is young: of two updates it is nearer to the second."""
    options = ("--student.betas", "[0.5,0.8]", "--student.weight-decay", "0.03", "--student.ema", str(told))
    trainer, weights = small_run.trainer_of(options), []
    (group,) = trainer.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.8), 0.03)
    for _ in range(2):
        trainer.step()
        weights.append([p.detach().clone() for p in trainer.parameters.values()])
    for average, first, second in zip(trainer.averaged().values(), *weights, strict=True):
        torch.testing.assert_close(average, share * first + (1 - share) * second, rtol=0, atol=1e-6)
    assert any((first - second).abs().max() > 1e-3 for first, second in zip(*weights, strict=True))


def test_a_run_shows_its_averaged_student(teacher_folder, prompt_file, tmp_path, monkeypatch):
    """While it trains: the one that is exported."""
    monkeypatch.setattr("fewstep.run.SAMPLES_PER_PROMPT", 1)
    shown = []
    monkeypatch.setattr("fewstep.report.grid.save", lambda columns, prompts, path: shown.extend(columns.values()))
    run = run_of(teacher_folder, prompt_file, "--student.lr", "1e-2", "--steps", "2")
    for _ in range(2):
        run.trainer.step()
    held = mock.Mock(**{"save.side_effect": PermissionError(13, "Permission denied", "curves.png")})
    with pytest.warns(UserWarning, match="update 2: a picture of the run could not be written .*: 'curves.png'"):  # and no more
        draw_progress(run, tmp_path, ["a cat"], held)
    averaged, raw = (student_grid(run, ["a cat"], weights) for weights in (run.trainer.averaged(), {}))
    assert torch.equal(shown[0], averaged) and not torch.allclose(shown[0], raw, atol=1e-4)


def test_a_grid_is_drawn_few_at_a_time_and_is_the_same_whatever_passes_together(teacher_folder, prompt_file, monkeypatch):
    """Beside a training there is little room."""
    run = run_of(teacher_folder, prompt_file)
    prompts, shown = ["a cat", "a dog"], {}
    for n in (drawing.GRID_BATCH, 1):
        monkeypatch.setattr(drawing, "GRID_BATCH", n)
        with drawing.counted(SimpleNamespace(unet=run.roles.student.network.model)) as calls:
            shown[n] = student_grid(run, prompts, {})
        assert max(calls) == n <= 4
    few, alone = shown.values()
    torch.testing.assert_close(few, alone, rtol=0, atol=1e-5)
    assert few.shape[:2] == (2, 3) and all((few[:, i] - few[:, 0]).abs().max() > 1e-3 for i in (1, 2))


def test_a_run_goes_on_and_ends_well_where_memory_is_too_small_to_draw(teacher_folder, prompt_file, tmp_path, monkeypatch, capsys):
    lacking = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB")
    monkeypatch.setattr("fewstep.run.sample_grid", mock.Mock(side_effect=lacking))
    run, held = run_of(teacher_folder, prompt_file), mock.Mock()
    with pytest.warns(UserWarning, match=r"update 0: no samples .*\(CUDA out of memory. Tried to allocate 2.00 GiB\); --sample-every 0"):
        draw_progress(run, tmp_path, ["a cat"], held)
    held.save.assert_called_once_with(tmp_path / "curves.png")
    run.trainer.step()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.warns(UserWarning, match="there is no samples.png, since memory is too small .*2.00 GiB"):
        finish(run, tmp_path, str(teacher_folder), ["a cat"])
    assert "## Use" in (card := (tmp_path / "README.md").read_text()) and "samples.png" not in card
    assert f"student in {tmp_path}; for pictures: fewstep sample {tmp_path} --prompt TEXT" in capsys.readouterr().out


def test_a_teacher_whose_pictures_are_no_numbers_is_left_out_of_the_samples(teacher_folder, prompt_file, monkeypatch):
    """Its student is there, and no rate of its training is to blame."""
    run, shown = run_of(teacher_folder, prompt_file), torch.zeros(1, 3, 3, 8, 8)
    monkeypatch.setattr("fewstep.run.sample_grid", mock.Mock(side_effect=[shown, NumericalError("3 of 3 pictures hold NaN or inf")]))
    with pytest.warns(UserWarning, match=r"samples.png lacks the column 'teacher, 4 steps \(DDIM\)': 3 of 3 pictures hold NaN or inf"):
        grids = teacher_grids(run, ["a cat"], "DDIM")
    assert list(grids) == ["teacher, 28 steps"]


def test_no_two_times_have_the_same_random_numbers_of_a_process_itself(teacher_folder, prompt_file, monkeypatch):
    """Though nothing that all share was drawn between them."""
    run, turns = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3"), []
    monkeypatch.setattr(run.trainer.ranks, "own_random", lambda device, turn: turns.append(turn) or contextlib.nullcontext())
    for _ in range(3):
        run.trainer.step()
    assert len(turns) == len({*turns}) > 6


def test_an_adaptive_weight_moves_as_it_is_told(teacher_folder, prompt_file):
    told = {"budget": 1.7, "warmup": 3, "eta": 0.02, "cap": 4.0, "lag_limit": 0.3}
    options = [f"--weights.{name}={value}" for name, value in told.items()]
    weights = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3", "--weights.mode", "adaptive", *options).trainer.weights
    assert {name: getattr(weights, name) for name in told} == told


@pytest.mark.parametrize(
    "options, batches",
    [((), 1), (TWICE, 1), (SIMULATING, 1 + 2), ((*SIMULATING, "--reward.discriminator", "0.1"), 1 + 2 + 2)],
    ids=["plain", "twice", "backward simulation", "with a discriminator"],
)
def test_a_run_encodes_ahead_what_it_will_draw(teacher_folder, tmp_path, options, batches):
    """On a GPU, where the text encoders leave the device before the training; of a large set most prompts are never drawn."""
    prompts = [f"number {i}" for i in range(100)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    save_file({"latents": torch.randn(5, 4, 4, 4)}, tmp_path / "real.safetensors")
    told = ("--updates", "2", "--reuse.rollout", "1", "--discriminator.latents", str(tmp_path / "real.safetensors"))
    with mock.patch.object(backbone.Backbone, "prepare") as prepare:
        run = run_of(teacher_folder, tmp_path / "prompts.txt", *told, *options)
    (ahead,) = prepare.call_args.args
    with mock.patch.object(run.trainer, "encode", wraps=run.trainer.encode) as encode:
        for _ in range(2):
            run.trainer.step()
    drawn = {prompt for call in encode.call_args_list for prompt in call.args[0]}
    assert drawn <= set(ahead) and len(ahead) <= 2 * run.config.groups * batches
    assert options == TWICE or drawn == set(ahead)


def test_prompts_that_are_cut_are_looked_for_among_those_that_are_drawn(teacher_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join("a cat " * 20 + str(i) for i in range(100)))
    run = run_of(teacher_folder, tmp_path / "prompts.txt", "--updates", "2")
    ahead = run.trainer.batches.ahead(run.config.batches())
    capsys.readouterr()
    say_what_is_cut(run)
    assert len(ahead) < 10 and f"{len(ahead)} of {len(ahead)} prompts are longer than the text encoder reads" in capsys.readouterr().out


def test_processes_of_a_machine_share_the_prompts_ahead(teacher_folder, prompt_file, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shares = []
    for place in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", place)
        with mock.patch.object(backbone.Backbone, "prepare") as prepare:
            run = run_of(teacher_folder, prompt_file)
        assert prepare.call_args.kwargs["sharers"] == 2
        shares.append(prepare.call_args.args[0])
    assert sorted(shares[0] + shares[1]) == sorted(run.trainer.batches.prompts) and abs(len(shares[0]) - len(shares[1])) <= 1


def test_a_run_begins_with_another_ones_averaged_student_and_fake(teacher_folder, prompt_file):
    """What was averaged is what is exported; its optimizers stay behind, and a reward may be new."""
    first = run_of(teacher_folder, prompt_file).trainer
    for _ in range(3):
        first.step()
    held = snapshot(first)
    second = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3", "--student.lr", "1e-5").trainer
    second.start_from(copy.deepcopy(held))
    averaged = first.averaged()
    assert any(not torch.equal(averaged[name], p) for name, p in first.parameters.items())
    for own in (second.parameters, second.averaged()):
        assert all(torch.equal(averaged[name], value) for name, value in own.items())
    assert all(torch.equal(held["online"]["dm"][key], p) for key, p in second.terms["dm"].parameters.items())
    assert second.update == 0 and not second.optimizer.state_dict()["state"]
    for _ in range(2):
        second.step()
    assert all(torch.equal(p, held["student"][name]) for name, p in first.parameters.items())  # nothing is shared
    assert any(not torch.equal(second.averaged()[name], p) for name, p in second.parameters.items())  # nor the average with the student
    other = run_of(teacher_folder, prompt_file, "--lora-rank", "2").trainer
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"another network than this run's \(other teacher, steps, LoRA rank"):
        other.start_from(held)


def test_the_lag_is_between_rollouts_of_one_size(teacher_folder, prompt_file):
    """Outputs of another size are harder or easier to denoise, which is no lag; each size waits for its own second rollout."""
    trainer = run_of(teacher_folder, prompt_file, "--size", "16x8,8x16", "--reuse.rollout", "1").trainer
    seen, lag, rollouts = [], trainer.terms["dm"].reward.lag, []
    trainer.terms["dm"].reward.lag = lambda new, old, kl: seen.append((new.x0, old.x0)) or lag(new, old, kl=kl)
    logs = []
    for _ in range(4):
        logs.append(trainer.step())
        rollouts.append(trainer.rollout.x0)
    assert ["dm/lag" in log for log in logs] == [False, False, True, True]
    for (new, old), (now, then) in zip(seen, ((2, 0), (3, 1)), strict=True):  # of each sample a step of its own was taken
        assert all(any(torch.equal(x0, one) for one in rollouts[now][:, i]) for i, x0 in enumerate(new))
        assert all(any(torch.equal(x0, one) for one in rollouts[then][:, i]) for i, x0 in enumerate(old))


@pytest.mark.parametrize(
    "options, measured",
    [
        ((), [1, 9, 17]),  # the updates of the second rollout, and from there of every eighth
        (("--reuse.rollout", "2"), [2, 18]),
        (("--size", "16x8,8x16"), [2, 3, 18, 19]),  # of each size
        (("--reward.redness", "0.3", "--weights.mode", "adaptive", "--weights.warmup", "4"), list(range(1, 20))),  # which follows it
    ],
)
def test_the_lag_is_measured_where_it_is_followed_and_else_now_and_then(teacher_folder, prompt_file, options, measured):
    trainer = run_of(teacher_folder, prompt_file, "--reuse.rollout", "1", *options).trainer
    found = []
    for update in range(20):
        before = trainer.counted["fake"].forwards
        if "dm/lag" in trainer.step():
            found.append(update)
        asked = trainer.counted["fake"].forwards - before - (1 + trainer.config.fake.updates) * 4
        assert asked == 2 * 4 * (update in measured)  # of four samples: two passes of the fake, where it is measured alone
    assert found == measured


def snapshot(trainer):
    return checkpoint.unpack(*checkpoint.pack(trainer.state()))


@pytest.fixture(scope="module")
def a_run(teacher_folder, prompt_file):
    """What a run's state was at its start, where it was saved and some updates later, by the options of the run."""

    @functools.cache
    def states(*options, save_at, go_on):
        trainer = run_of(teacher_folder, prompt_file, *options).trainer
        fresh = snapshot(trainer)
        for _ in range(save_at):
            trainer.step()
        saved = snapshot(trainer)
        for _ in range(go_on):
            trainer.step()
        return fresh, saved, snapshot(trainer)

    return lambda *options, save_at, go_on: copy.deepcopy(states(*options, save_at=save_at, go_on=go_on))


SIZES = ("--size", "16x8,8x16", "--reuse.rollout", "1")
TWICE = ("--reuse.rollout", "2")  # saved in the middle of the second rollout, gone on with into the third
ALONE = ("student", "optimizer", "ema", "online", "online_optimizer", "rng", "batches", "rollout", "fed", "rollouts", "update", "running")
BESIDE = ("block", "advantages", "old_log_prob", "weights", "partings", "counted")


@pytest.mark.parametrize("key", BESIDE)
def test_every_part_of_the_state_matters_with_rewards_and_reuse(teacher_folder, prompt_file, a_run, key):
    fresh, saved, later = a_run(*EVERYTHING, save_at=5, go_on=2)  # the second rollout: judges stand beside what has a weight
    assert saved["block"] is not None and saved["advantages"] and saved["weights"]["b"] is not None
    assert any(parting["running"] for parting in saved["partings"].values())
    broken = run_of(teacher_folder, prompt_file, *EVERYTHING).trainer
    broken.load_state(saved | {key: fresh[key]})
    for _ in range(2):
        broken.step()
    with pytest.raises(AssertionError):
        assert_same(later, broken.state())


@pytest.mark.parametrize("key", ALONE)
def test_every_part_of_the_state_matters(teacher_folder, prompt_file, a_run, key):
    """Resume with one part left as a fresh run has it: the continuation must differ."""
    fresh, saved, later = a_run(*TWICE, save_at=3, go_on=2)
    broken = run_of(teacher_folder, prompt_file, *TWICE).trainer
    broken.load_state(saved | {key: fresh[key]})
    for _ in range(2):
        broken.step()
    with pytest.raises(AssertionError):
        assert_same(later, broken.state())


def test_the_earlier_rollout_of_each_size_matters(teacher_folder, prompt_file, a_run):
    fresh, saved, later = a_run(*SIZES, save_at=3, go_on=2)
    assert set(saved) == {*ALONE, *BESIDE, "earlier", "alarms", "config"} and saved["earlier"]  # every key of the state has its test
    for state, same in ((saved, True), (saved | {"earlier": fresh["earlier"]}, False)):
        trainer = run_of(teacher_folder, prompt_file, *SIZES).trainer
        trainer.load_state(copy.deepcopy(state))
        for _ in range(2):
            trainer.step()
        if same:
            assert_same(later, trainer.state())
            continue
        with pytest.raises(AssertionError):
            assert_same(later, trainer.state())


def test_what_alarms_have_counted_matters(teacher_folder, prompt_file, a_run):
    """A fake that learns next to nothing is the teacher, and no better: wrong at every update."""
    options = (*TWICE, "--fake.lr", "1e-12")
    fresh, saved, later = a_run(*options, save_at=3, go_on=2)
    assert saved["alarms"]["dm/fake_error"]["since"] == 3
    broken = run_of(teacher_folder, prompt_file, *options).trainer
    broken.load_state(saved | {"alarms": fresh["alarms"]})
    for _ in range(2):
        broken.step()
    assert later["alarms"]["dm/fake_error"]["since"] == 5 and broken.state()["alarms"]["dm/fake_error"]["since"] == 2
    with pytest.raises(AssertionError):
        assert_same(later, broken.state())


@pytest.mark.parametrize("options, save_at, go_on", [(TWICE, 3, 2), (EVERYTHING, 5, 2)], ids=["alone", "rewards"])
def test_nothing_left_out_gives_the_same_continuation(teacher_folder, prompt_file, a_run, options, save_at, go_on):
    """What the tests of single keys stand on: with every part the states are equal."""
    _, saved, later = a_run(*options, save_at=save_at, go_on=go_on)
    whole = run_of(teacher_folder, prompt_file, *options).trainer
    whole.load_state(saved)
    for _ in range(go_on):
        whole.step()
    assert_same(later, whole.state())


def gradients(trainer):
    """Of the student, as its optimizer gets them; the step itself is left out."""
    found = {}

    def step():
        found.update({name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None})

    trainer.optimizer.step = step
    return found


def by_autograd(output, trainer, of_output):
    names, parameters = zip(*trainer.parameters.items(), strict=True)
    made = torch.autograd.grad(output, parameters, of_output, allow_unused=True)
    return {name: grad for name, grad in zip(names, made, strict=True) if grad is not None}


def assert_gradients(found, wanted):
    size = max(float(grad.abs().max()) for grad in wanted.values())
    assert size > 0 and found.keys() >= wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5 * size)


def test_an_importance_weight_is_on_matching_alone(teacher_folder, prompt_file):
    """d loss / d theta = -mean of (rho d_dm + lambda d_reward) dx0/dtheta: a reward's direction belongs to x0, not to the renoised xt."""
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3", "--student.max-norm", "1e9").trainer
    rollout = trainer.new_rollout()
    block, x0, _ = trainer.evaluate(rollout, None)
    assert block.extra is not None and float(block.extra.abs().max()) > 0
    rho = torch.tensor([0.5, 2.0, 1.0, 0.0])
    wanted = by_autograd(
        trainer.predict(rollout, block.xk, block.k).own, trainer, -(rho.view(-1, 1, 1, 1) * block.anchor + block.extra) / x0.whole.numel()
    )
    found = gradients(trainer)
    trainer.student_update(rollout, block, x0, rho)
    assert_gradients(found, wanted)


def reweighed(trainer, factor):
    """(an evaluation, the x0 it was made at, what `reweigh` says of it once every parameter of the student has moved by a factor)."""
    rollout = trainer.new_rollout()
    block, x0, _ = trainer.evaluate(rollout, None)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.mul_(factor)
    today, *found = trainer.reweigh(rollout, block)
    return block, x0.whole, (today.whole, *found)


def test_an_importance_weight_is_todays_density_over_that_of_the_evaluation(teacher_folder, prompt_file):
    trainer = run_of(teacher_folder, prompt_file, "--reuse.evaluation", "2", "--reuse.min-ess", "0", "--reuse.rho-max", "1.5").trainer
    block, _, (x0, rho, refused, logs) = reweighed(trainer, 1.002)
    assert not refused
    alpha, sigma = (f(block.t).double().view(-1, 1, 1, 1) for f in (trainer.student.schedule.alpha, trainer.student.schedule.sigma))
    now, then = (
        torch.distributions.Normal(alpha * x.detach().double(), sigma).log_prob(block.xt.double()).flatten(1).sum(1) for x in (x0, block.x0)
    )
    assert float((now - then).abs().min()) > 1e-4  # the student has moved
    torch.testing.assert_close(rho.double(), (now - then).exp().clamp(max=1.5), rtol=1e-3, atol=1e-5)
    moves = (alpha / sigma * (x0.detach().double() - block.x0.double())).pow(2).flatten(1).sum(1)
    assert logs["reuse/ess"] == pytest.approx(float((-moves.max()).exp()), rel=1e-3)  # a quarter of four is one sample
    assert logs["reuse/rho_max"] == pytest.approx(float((now - then).exp().max()), rel=1e-3)


def test_the_lowest_noise_levels_decide_whether_an_evaluation_serves_again(teacher_folder, prompt_file):
    """In a batch whose weights are fine as a whole, those of the least noise are gone."""
    trainer = run_of(teacher_folder, prompt_file, "--reuse.evaluation", "2", "--groups", "4", "--group-size", "4").trainer
    rollout = trainer.new_rollout()
    block, _, _ = trainer.evaluate(rollout, None)
    block.served_anchor = 1
    block.t = torch.linspace(0.02, 0.98, 16, dtype=torch.float64)[torch.randperm(16)]
    away = torch.randn_like(block.x0)
    away /= away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x0 = trainer.predict(rollout, block.xk, block.k).whole
    block.x0 = x0 + 0.06 * away
    # the noise of the evaluation lay across the move
    alpha, sigma = (f(block.t).float().view(-1, 1, 1, 1) for f in (trainer.student.schedule.alpha, trainer.student.schedule.sigma))
    block.xt = alpha * (block.x0 + x0) / 2
    _, none, refused, logs = trainer.reweigh(rollout, block)
    assert refused and none is None and logs["reuse/refused"] == 1 and logs["reuse/ess_of_all"] > 0.99 and logs["reuse/ess"] < 0.5
    v = sorted((0.06 * alpha / sigma).double().pow(2).flatten().tolist())[-4:]
    assert logs["reuse/ess"] == pytest.approx(4 / sum(math.exp(each) for each in v), rel=1e-3)
    assert 1 < logs["reuse/permitted"] < 2


def test_a_policy_gradient_climbs_its_advantage_with_the_force_of_a_direction(teacher_folder, prompt_file):
    """Where the ratio is 1: -lambda / sqrt(D) times the mean of A d log p / d theta over samples and transitions."""
    trainer = run_of(teacher_folder, prompt_file, "--reward.contrast", "0.1", "--via.contrast", "policy", "--precision", "fp32").trainer
    rollout = trainer.new_rollout()
    advantage = torch.tensor([1.0, -1.0, 0.5, math.nan])
    trainer.advantages = {"contrast": advantage}
    log_prob = trainer.student.log_prob(rollout)
    assert log_prob.shape == (4, trainer.student.steps - 1)
    force = 0.1 / rollout.x0[0, 0].numel() ** 0.5
    wanted = by_autograd(log_prob[:3], trainer, -force * advantage[:3, None].expand_as(log_prob[:3]) / log_prob[:3].numel())
    trainer.policy_updates(rollout)
    assert_gradients({name: p.grad for name, p in trainer.parameters.items()}, wanted)


def test_a_policy_gradient_is_that_of_the_whole_objective_and_holds_the_graph_of_one_pass():
    """Transition by transition and part by part, wherever the ratios are."""
    options = ("--reward.contrast", "0.1", "--reward.redness", "0.3", "--via.contrast", "policy", "--via.redness", "policy")
    trainer = small_run.trainer_of((*options, "--memory.micro-groups", "2"))
    rollout, generator = trainer.new_rollout(), torch.Generator().manual_seed(0)
    trainer.advantages = {name: torch.randn(12, generator=generator) for name in ("contrast", "redness")}
    trainer.advantages["contrast"][4:7] = math.nan
    log_prob = trainer.student.log_prob(rollout)
    trainer.old_log_prob = log_prob.detach() + 0.2 * torch.randn(12, 2, dtype=torch.float64, generator=generator)
    objective = sum(
        weight / 48**0.5 * losses.policy(log_prob, trainer.old_log_prob, trainer.advantages[name], clip=0.2)
        for name, weight in (("contrast", 0.1), ("redness", 0.3))
    )
    wanted, predict, events = by_autograd(objective, trainer, None), trainer.student.predict, []

    def watched(*given):
        x0 = predict(*given)
        events.append("forward")
        x0.register_hook(lambda gradient: events.append("backward"))
        return x0

    trainer.student.predict = watched
    total, logs = trainer.policy_updates(rollout)
    assert_gradients({name: p.grad for name, p in trainer.parameters.items()}, wanted)
    assert events == ["forward", "backward"] * 4  # two parts of two transitions
    assert float(total) == pytest.approx(float(objective.detach()), abs=1e-6)
    for name, advantage in trainer.advantages.items():
        clipped = losses.clip_fraction(log_prob, trainer.old_log_prob, advantage, clip=0.2)
        assert logs[f"{name}/clip_fraction"] == pytest.approx(clipped) and clipped > 0


@pytest.mark.parametrize("options, passes", [((), 3), (("--reuse.evaluation", "2", "--reuse.min-ess", "0"), 9)], ids=["once", "twice"])
def test_a_policy_without_weight_costs_the_student_no_pass_that_nobody_needs(options, passes):
    """While a budget is measured. Where a rollout serves on, the weight may come in its middle, and asks for the old log-probabilities."""
    policy = ("--reward.contrast", "0.2", "--via.contrast", "policy", *small_run.ADAPTIVE, "--weights.warmup", "3", "--reuse.rollout", "1")
    trainer = small_run.trainer_of((*policy, *options))
    logs = trainer.step()
    assert trainer.student.denoiser.cost == 12 * (3 + passes) and logs["contrast/weight"] == 0
    assert ("policy/rho_50" in logs) == ("contrast/clip_fraction" in logs) == (passes > 3) == (trainer.old_log_prob is not None)
    while not trainer.weights.now_total():
        trainer.step()
    assert "policy/rho_50" in trainer.step() and trainer.old_log_prob is not None


def test_a_policy_gradient_of_a_one_step_student_is_refused():
    old = small_run.trainer_of(("--reward.contrast", "0.1", "--via.contrast", "policy"))
    with pytest.raises(ValueError, match="one-step student is deterministic: no policy gradient for the term contrast; use pathwise"):
        Trainer(
            Student(old.student.denoiser, Flow(), [1.0]), old.parameters, old.terms, old.batches, encode=old.encode, decode=old.decode,
            latent_shapes=old.latent_shapes, config=old.config, weights=old.weights,
        )  # fmt: skip


def combined(trainer, size=16, **signals):
    """(anchor's part, the rewards' part, anchor) of `size` samples in one group."""
    anchor = torch.randn(size, *trainer.latent_shapes[0], generator=torch.Generator().manual_seed(0))
    found = {name: make(anchor) for name, make in signals.items()}
    own, extra, _ = trainer.combine(anchor, found, torch.zeros(size, dtype=torch.long))
    return own, extra, anchor


@pytest.mark.parametrize("mode", ["fixed", "sum"])
def test_the_sum_of_raw_gradients_is_another_rule_than_equation_6(teacher_folder, prompt_file, mode):
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3", "--weights.mode", mode).trainer
    score = torch.arange(16.0)
    score[3] = math.nan
    own, extra, anchor = combined(trainer, redness=lambda x: Signal(score, 7 * x.flip(1)))
    known = torch.arange(16) != 3
    raw = 7 * anchor.flip(1)
    rms = raw[known].square().mean().sqrt()
    assert torch.equal(own, anchor) and torch.equal(extra[3], torch.zeros_like(extra[3]))
    torch.testing.assert_close(extra[known], 0.3 * (raw / (rms if mode == "fixed" else 1))[known])
    _, logs = trainer.heard(anchor, {"redness": Signal(score, raw)}, torch.zeros(16, dtype=torch.long))
    cosine = (raw * anchor).sum((1, 2, 3)) / (raw.square().sum((1, 2, 3)) * anchor.square().sum((1, 2, 3))).sqrt()
    assert logs["redness/direction_rms"] == pytest.approx(float(rms))  # of those that have a score, as is its part
    assert logs["redness/cosine"] == pytest.approx(float(cosine[known].mean())) != pytest.approx(float(cosine.mean()), rel=1e-2)


def test_both_networks_are_clipped_and_their_rates_fall(teacher_folder, prompt_file):
    """At three quarters of a run: the student's rate, falling over its last half, at a half, the fake's, over all of it, at a quarter."""
    trainer = run_of(
        teacher_folder, prompt_file, "--student.decay", "0.5", "--fake.decay", "1", "--fake.lr", "2e-3",
        "--student.max-norm", "1e-3", "--fake.max-norm", "2e-3",
    ).trainer  # fmt: skip
    trainer.update, seen = 6, {}
    for who, optimizer, parameters in (
        ("student", trainer.optimizer, trainer.parameters),
        ("fake", trainer.online["dm"], trainer.terms["dm"].parameters),
    ):

        def look(who=who, optimizer=optimizer, parameters=parameters):
            norm = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
            seen[who] = float(norm), optimizer.param_groups[0]["lr"]

        optimizer.step = look
    assert trainer.step()["grad_norm"] > 2e-3
    assert seen["student"] == (pytest.approx(1e-3, rel=1e-2), pytest.approx(1e-3 / 2))
    assert seen["fake"] == (pytest.approx(2e-3, rel=1e-2), pytest.approx(2e-3 / 4))


def test_evaluations_rotate_over_rollouts_and_the_fake_learns_every_step(teacher_folder, prompt_file):
    """With one evaluation a rollout a prompt's group would else see one step for ever."""
    trainer = run_of(teacher_folder, prompt_file, "--reuse.rollout", "1").trainer
    rollout, at = trainer.new_rollout(), []
    for trainer.rollouts in range(4):
        at.append(trainer.evaluate(rollout, None)[0].k)
    assert torch.equal(torch.stack(at).sort(0).values, torch.arange(4)[:, None].expand(4, 4))
    steps = [trainer.online_step(rollout, "all") for _ in range(20)]
    assert all(sorted(k.tolist()) == [0, 1, 2, 3] for k in steps)
    assert len({tuple(k.tolist()) for k in steps}) > 5  # which sample gets which is drawn anew


def test_the_adaptive_weight_is_told_the_lag_of_the_second_rollout(teacher_folder, prompt_file):
    options = ("--reward.redness", "0.3", "--weights.mode", "adaptive", "--weights.warmup", "4", "--reuse.rollout", "1")
    trainer = run_of(teacher_folder, prompt_file, *options).trainer
    assert "dm/lag_kl" not in trainer.step() and trainer.weights.lag is None
    logs = trainer.step()
    assert trainer.weights.lag == logs["dm/lag_kl"] != 0
    assert logs["weights/kl"] == pytest.approx(trainer.weights.kl + trainer.weights.lag)


def test_without_weights_an_evaluation_serves_wherever_the_student_is(teacher_folder, prompt_file):
    trainer = run_of(teacher_folder, prompt_file, "--reuse.evaluation", "2", "--reuse.weighted", "false", "--reuse.min-ess", "1").trainer
    _, then, (x0, rho, refused, logs) = reweighed(trainer, 1.1)
    assert rho is None and not refused and not logs and not torch.equal(x0, then)


def test_a_policy_hears_finished_samples_ranked_inside_their_groups(teacher_folder, prompt_file):
    trainer = run_of(teacher_folder, prompt_file, "--reward.contrast", "1", "--via.contrast", "policy").trainer
    rollout, shown = trainer.new_rollout(), []
    scores = torch.tensor([0.0, 1.0, 10.0, 14.0])  # the second prompt's are the better by far, which no sample of it has earned
    trainer.terms["contrast"].reward = lambda sample: shown.append(sample) or Signal(scores, None)
    logs = trainer.score_finished(rollout)
    assert logs["contrast/spread"] == 1.25 and logs["contrast/constant_groups"] == 0  # what there is to learn lies inside groups
    assert rollout.group.unique(return_inverse=True)[1].tolist() == [0, 0, 1, 1]
    assert torch.equal(shown[0].x0, rollout.x0[-1]) and shown[0].k.tolist() == [3] * 4
    torch.testing.assert_close(trainer.advantages["contrast"], torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=1e-3, atol=0)
    scores = torch.tensor([3.0, 3.0, 5.0, 5.0])
    assert trainer.score_finished(rollout)["contrast/constant_groups"] == 1 and not trainer.advantages["contrast"].any()


def test_project_leaves_nothing_of_a_direction_that_opposes(teacher_folder, prompt_file):
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3", "--weights.project", "true").trainer
    for share in (0.0, 0.01):  # of something else in it
        aside = torch.randn(16, *trainer.latent_shapes[0], generator=torch.Generator().manual_seed(1))
        _, extra, anchor = combined(trainer, redness=lambda x, share=share, aside=aside: Signal(torch.arange(16.0), -3 * x + share * aside))
        assert float(extra.square().mean().sqrt()) < 0.3 * (share + 1e-5)
        assert share == 0 or bool((extra.flatten(1) * anchor.flatten(1)).sum(1).ge(-1e-5).all())


def test_a_score_multiplies_matching_by_its_clipped_advantage(teacher_folder, prompt_file):
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "2", "--weights.mode", "advantage").trainer
    best = torch.zeros(32)
    best[3] = 1
    own, extra, anchor = combined(trainer, 32, redness=lambda x: Signal(best, None))
    a = advantages(best, torch.zeros(32, dtype=torch.long))
    assert extra is None and float(a[3]) > 5.5 and float(a[0]) > -0.2
    torch.testing.assert_close(own, torch.where(best == 1, 1 + 2 * 5.0, 1 + 2 * a).view(-1, 1, 1, 1) * anchor)


@pytest.mark.parametrize("made, words", [
    (lambda x: Signal(torch.zeros(len(x), 1), None), r"a score of shape \(4, 1\); it must be \(4,\)"),
    (lambda x: Signal(torch.tensor(1.0), None), r"a score of shape \(\); it must be \(4,\)"),
    (lambda x: Signal(None, torch.zeros(len(x), 1, 1, 1)), r"a direction of shape \(4, 1, 1, 1\); it must be \(4, "),
    (lambda x: Signal([1.0] * len(x), None), "a score that is list"),
    (lambda x: x.mean((1, 2, 3)), r"returned Tensor; a Reward returns a Signal"),
], ids=["column", "one number", "broadcast", "list", "no signal"])  # fmt: skip
def test_a_reward_object_is_held_to_its_contract(teacher_folder, prompt_file, made, words):
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3").trainer
    trainer.terms["redness"] = dataclasses.replace(trainer.terms["redness"], reward=lambda sample: made(sample.x0))
    with pytest.raises(RewardError, match=words):
        trainer.step()


def test_a_function_with_a_default_is_one_of_pictures():
    assert isinstance(as_reward(lambda images, prompts=None: images.mean((1, 2, 3)), "mine"), PixelReward)


def test_a_fake_of_the_last_step_learns_no_other(teacher_folder, prompt_file):
    options = ("--fake.on", "last", "--fake.condition", "none", "--reuse.backward-simulation", "true", "--reuse.rollout", "1")
    trainer = run_of(teacher_folder, prompt_file, *options).trainer
    learned, trained, learn, update = [], [], trainer.online_loss, trainer.student_update
    trainer.online_loss = lambda reward, sample: learned.extend(sample.k.tolist()) or learn(reward, sample)
    trainer.student_update = lambda rollout, block, *rest: trained.extend(block.k.tolist()) or update(rollout, block, *rest)
    for _ in range(8):
        trainer.step()
    assert set(learned) == {trainer.student.steps - 1}
    assert len(set(trained)) > 2  # the student is trained at every step: the option is the fake's
    with pytest.raises(UserError, match=r"fake.on: last leaves the fake untrained"):
        run_of(teacher_folder, prompt_file, "--fake.on", "last")


def test_a_warm_up_that_would_not_end_is_refused(teacher_folder, prompt_file):
    options = ("--reward.redness", "1", "--weights.mode", "adaptive", "--weights.warmup", "4")
    assert run_of(teacher_folder, prompt_file, *options).config.weights.warmup == 4  # of 8 updates
    with pytest.raises(UserError, match=r"weights.warmup: .* before update 8, got 4 x 2"):
        run_of(teacher_folder, prompt_file, *options, "--reuse.evaluation", "2")


def test_only_student_and_fake_move(teacher_folder, prompt_file):
    run = run_of(teacher_folder, prompt_file)
    before = {name: p.detach().clone() for name, p in run.roles.teacher.named_parameters()}
    student = {name: p.detach().clone() for name, p in run.roles.student_parameters.items()}
    fake = {name: p.detach().clone() for name, p in run.roles.fake_parameters.items()}
    run.trainer.step()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in run.roles.teacher.named_parameters())
    assert any(not torch.equal(p, student[name]) for name, p in run.roles.student_parameters.items())
    assert any(not torch.equal(p, fake[name]) for name, p in run.roles.fake_parameters.items())
    assert not set(map(id, run.roles.student_parameters.values())) & set(map(id, run.roles.fake_parameters.values()))


def test_roles_start_as_the_teacher_and_lora_roles_differ_after_training(teachers, prompt_file):
    for options in ((), ("--lora-rank", "2")):
        run = run_of(teachers / "StableDiffusionPipeline", prompt_file, *options)
        teacher, student, fake = run.roles[:3]
        x, t = torch.randn(2, *run.backbone.latent_shape()), torch.full((2,), 0.5)
        cond = run.backbone.encode(["a cat", "a dog"])
        with_step = {**cond, "step": torch.tensor([0, 2])}
        own = teacher.network.model.state_dict()
        for role in (student, fake):
            assert all(torch.equal(value, own[name]) for name, value in role.network.model.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(student(x, t, cond), teacher(x, t, cond), rtol=0, atol=0)
            torch.testing.assert_close(fake(x, t, with_step), teacher(x, t, cond), rtol=0, atol=0)
            before = teacher(x, t, cond)
        for _ in range(2):
            run.trainer.step()
        with torch.no_grad():
            outputs = [teacher(x, t, cond), student(x, t, cond), fake(x, t, with_step)]
        assert torch.equal(outputs[0], before)
        assert not torch.equal(outputs[1], before) and not torch.equal(outputs[2], before) and not torch.equal(outputs[1], outputs[2])


def test_lora_shares_one_base_and_trains_adapters_only(teacher_folder, prompt_file):
    roles = run_of(teacher_folder, prompt_file, "--lora-rank", "2").roles
    assert roles.teacher.network.model is roles.student.network.model is roles.fake.network.model
    assert all(".lora_" in name for name in roles.student_parameters)
    assert all(".lora_" in name or name.startswith("step_embedding") for name in roles.fake_parameters)


def test_attention_of_short_sequences_changes_no_number(teacher_folder, prompt_file):
    """Plain products instead of the fused kernel on the CPU: the stock network's output and gradient, up to rounding."""
    roles, cond = (run := run_of(teacher_folder, prompt_file)).roles, run.backbone.encode(["a cat", "a dog"])
    network, x, t = roles.student.network, torch.randn(2, *run.backbone.latent_shape()), torch.tensor([999.0, 300.0])
    gradients = []
    outputs = [network(x, t, cond), network.model(x, t, encoder_hidden_states=cond["prompt_embeds"]).sample]
    for output in outputs:
        gradients.append(torch.autograd.grad(output.square().sum(), list(network.parameters())))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_the_fake_hears_the_step(teacher_folder, prompt_file):
    run = run_of(teacher_folder, prompt_file)
    torch.nn.init.normal_(run.roles.fake.network.step_embedding.weight)
    x, t, cond = torch.randn(2, *run.backbone.latent_shape()), torch.full((2,), 0.5), run.backbone.encode(["a cat"] * 2)
    x = x[:1].repeat(2, 1, 1, 1)
    with torch.no_grad():
        a, b = run.roles.fake(x, t, {**cond, "step": torch.tensor([0, 3])})
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match="needs k"):
        run.trainer.terms["dm"].reward.evaluate(x, cond, torch.zeros(2, dtype=torch.long))


def test_a_prompt_group_sits_at_one_step_and_a_rollout_visits_every_state(teacher_folder, prompt_file):
    run = run_of(teacher_folder, prompt_file, "--reuse.rollout", "4")
    trainer, seen = run.trainer, []
    matching = trainer.terms["dm"].reward
    original = matching.evaluate

    def spy(x0, cond, group, *, k=None, **rest):
        seen.append((group.clone(), k.clone()))
        return original(x0, cond, group, k=k, **rest)

    matching.evaluate = spy
    for _ in range(4):
        trainer.step()
    for group, k in seen:
        assert group.unique(return_counts=True)[1].tolist() == [2, 2]
        assert k[0] == k[1] and k[2] == k[3] and k[0] != k[2]
    assert sorted(int(k[0]) for _, k in seen) == [0, 1, 2, 3]


def test_every_size_goes_through_every_step():
    """Also where there are fewer groups than steps, and as many sizes as steps."""
    trainer, seen = small_run.trainer_of(("--reuse.rollout", "1")), set()
    trainer.batches, trainer.latent_shapes = Batches(small_run.PROMPTS, 1, 3, seed=0), [(3, 4, 4), (3, 4, 8), (3, 8, 4)]
    evaluate = trainer.evaluate

    def spy(rollout, lag):
        block, *rest = evaluate(rollout, lag)
        seen.update((tuple(block.x0.shape[1:]), k) for k in block.k.tolist())
        return block, *rest

    trainer.evaluate = spy
    for _ in range(9):
        trainer.step()
    assert seen == set(itertools.product(trainer.latent_shapes, range(3)))


@pytest.mark.parametrize("what", ["student", "fake", "teacher"])
@pytest.mark.parametrize("options", [
    (),
    ("--reuse.rollout", "1", "--memory.micro-groups", "1", "--reward.redness", "0.3"),
    ("--reuse.rollout", "1", "--reward.contrast", "0.2", "--via.contrast", "policy"),
], ids=["whole", "parts", "policy"])  # fmt: skip
def test_nan_stops_before_the_update(teacher_folder, prompt_file, what, options):
    """It is put down to the network that it comes from, and no reward is shown its pictures."""
    run = run_of(teacher_folder, prompt_file, *options)
    run.trainer.step()

    def looking(reward, sample):
        assert bool(torch.isfinite(sample.image).all())
        return reward(sample)

    for name, term in run.trainer.terms.items():
        if not term.anchor:
            run.trainer.terms[name] = dataclasses.replace(term, reward=functools.partial(looking, term.reward))
    network = getattr(run.roles, what).network
    with torch.no_grad():
        network.model.conv_out.bias.fill_(float("nan"))
    before = {name: p.detach().clone() for name, p in run.roles.student_parameters.items()}
    advice = "Lower student.lr" + ("" if what == "student" else " or fake.lr; where it is the teacher's, look at its weights")
    with pytest.raises(NumericalError, match=rf"^the {what}'s prediction .* at update 1; nothing was updated with it. {advice}"):
        run.trainer.step()
    assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in run.roles.student_parameters.items())


@pytest.mark.parametrize("options, words", [
    ((), "the weights of the teacher world$"),
    (("--precision", "bf16"), "the weights of the teacher world, or try --precision fp32$"),
    (("--init", "earlier"), "the weights of the student of earlier$"),
], ids=["fp32", "bf16", "init"])  # fmt: skip
def test_before_the_first_update_no_rate_is_blamed(options, words):
    """The student is what it begins with, so NaN is in that."""
    trainer = small_run.trainer_of(options)
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(math.nan)
    words = f"^the student's prediction is not finite at update 0; .*: look at {words}"
    with pytest.raises(NumericalError, match=words):
        trainer.step()


def test_nan_of_a_direction_a_loss_and_a_gradient_is_named(teacher_folder, prompt_file):
    """Of each in turn, in one run: nothing moves, so what is mended goes on from the same place."""
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3", "--fake.updates", "1").trainer
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    for name, advice in (("dm", "Nothing has been trained yet: look at the weights of the teacher"), ("redness", "Look at this reward's")):
        whole = trainer.terms[name]
        trainer.terms[name] = dataclasses.replace(whole, reward=lambda sample: Signal(None, torch.full_like(sample.x0, math.nan)))
        with pytest.raises(FloatingPointError, match=f"^the direction of {name} is not finite at update 0; .*{advice}"):
            trainer.step()
        trainer.terms[name] = whole
    handle = next(iter(trainer.parameters.values())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match=r"^the gradient norm of the student is nan at update 0"):
        trainer.step()
    handle.remove()
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())

    fake = trainer.terms["dm"].parameters
    before = {name: p.detach().clone() for name, p in fake.items()}
    trainer.rollout = rollout = trainer.new_rollout()
    handle = next(iter(fake.values())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match=r"^the gradient norm of dm's own network is nan at update 0; .* Lower fake.lr"):
        trainer.online_updates(rollout, 1)
    handle.remove()
    trainer.terms["dm"].reward.loss = lambda sample, **drawn: math.nan * sum(p.sum() for p in fake.values())
    with pytest.raises(FloatingPointError, match=r"^the loss of dm's own network is nan at update 0"):
        trainer.online_updates(rollout, 1)
    assert all(torch.equal(p, before[name]) for name, p in fake.items())


def test_the_smallest_denoising_scale_is_logged(teacher_folder, prompt_file):
    """What eq. (5) divides by, of the group in which it is smallest."""
    trainer = run_of(teacher_folder, prompt_file).trainer
    matching, seen = trainer.terms["dm"].reward, []
    evaluate = matching.evaluate
    matching.evaluate = lambda *given, **told: seen.append(evaluate(*given, **told)) or seen[-1]
    logs = trainer.step()
    means = seen[0].magnitude.view(2, 2).mean(1)  # two groups of two
    assert logs["dm/scale_min"] == pytest.approx(float(means.min()), rel=1e-6) and means[0] != means[1]


def test_metrics_lines_of_a_lost_run_are_dropped(teacher_folder, prompt_file, tmp_path):
    trainer = run_of(teacher_folder, prompt_file).trainer
    stops = iter([False, True])
    assert len(list(trainer.run(tmp_path, stop=lambda: next(stops)))) == 2
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"update": 3, "loss": 1}\n{"upda')
    assert len(list(trainer.run(tmp_path, stop=lambda: True))) == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert {"loss", "grad_norm", "dm/score", "dm/own_loss", "seconds"} <= lines[2].keys()


def test_metrics_are_numbers_and_a_missing_one_does_not_stay(teacher_folder, prompt_file, tmp_path):
    """At a group size of 1 there is no spread inside groups: the key is left out, for NaN is no JSON and would fill the running mean."""
    trainer = run_of(teacher_folder, prompt_file, "--group-size", "1", "--reward.redness", "0.3", "--fake.updates", "0").trainer
    asked, broken = trainer.terms["redness"].reward, iter([True, False])

    def without_direction(sample):
        signal = asked(sample)
        return signal._replace(direction=torch.zeros_like(signal.direction)) if next(broken) else signal

    trainer.terms["redness"].reward = without_direction
    matching = trainer.terms["dm"].reward
    trainer.terms["dm"].reward = lambda sample: matching(sample)._replace(direction=torch.zeros_like(sample.x0))
    stops = iter([False, True])
    logs = list(trainer.run(tmp_path, stop=lambda: next(stops)))

    def refuse(word):
        raise AssertionError(f"{word} in metrics.jsonl")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for value in [*trainer.running.values(), *logs[0].values(), *logs[1].values()])
    assert all("redness/score" in line and "redness/spread" not in line for line in lines)
    assert ["redness/share" in line for line in lines] == [False, True]  # of an update that nothing pushes there is none
    with pytest.raises(ValueError, match="JSON"):
        MetricsLog(tmp_path, 0).write(1, {"loss": math.inf})


def test_a_damaged_line_of_the_metrics_stops_no_run(tmp_path):
    """As a disk leaves it after a power cut: the rest is kept as it is, and what is lost is said."""
    whole = [json.dumps({"update": update, "loss": 0.1 * update, "word": "é"}).encode() for update in range(1, 4)]
    damaged = [b'{"update": 2, "lo\xb6s": 1}', b"5", b"\0" * 9, b'{"loss": 1}', b'{"update": "2"}', b"null"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([whole[0], *damaged, *whole[1:], b'{"upda']))
    with pytest.warns(UserWarning, match=r"metrics.jsonl: 6 of its lines cannot be read and are left out"):
        MetricsLog(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(line + b"\n" for line in whole[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MetricsLog(tmp_path, 1).close()
    assert [*logged(tmp_path / "metrics.jsonl")] == [json.loads(whole[0])]


def test_what_an_update_logged_is_there_when_it_is_over_and_what_was_lost_leaves_no_trace(tmp_path, monkeypatch):
    """A run may be killed at any time; TensorBoard hides what it was told of updates that come again."""
    board = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=board))
    log = MetricsLog(tmp_path, 5)
    log.write(6, {"loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"update": 6, "loss": 0.5}
    assert board.call_args.kwargs == {"purge_step": 6} and board.return_value.add_scalar.call_args.args == ("loss", 0.5, 6)
    log.close()
    board.return_value.close.assert_called_once_with()


def test_a_run_is_saved_at_its_end_whatever_it_is_saved_every(tmp_path):
    trainer = small_run.trainer_of(("--updates", "3", "--save-every", "2"))
    assert len(list(trainer.run(tmp_path, stop=lambda: False))) == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "step-00000003"
    _, saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved["update"] == 3 and all(torch.equal(p, saved["student"][name]) for name, p in trainer.parameters.items())


def test_a_backward_simulation_ends_at_every_state():
    trainer = small_run.trainer_of(("--reuse.backward-simulation", "--reuse.rollout", "1"))
    ends = [len(trainer.simulate().states) for _ in range(60)]
    assert all(ends.count(states) >= 10 for states in (1, 2, 3)) and len(ends) == 60
    assert {len(trainer.simulate(last=True).states) for _ in range(5)} == {3}


@pytest.mark.parametrize("sizes, updates", [(2, 1), (2, 2), (3, 2)])
def test_each_network_that_learns_along_sees_the_size_that_the_student_was_just_trained_at(sizes, updates):
    """Of backward simulation, whatever the number of its rollouts in an update has in common with that of the sizes."""
    trainer = small_run.trainer_of(("--reuse.backward-simulation", "--reuse.rollout", "1", "--reward.discriminator", "0.1"))
    trainer.latent_shapes = [(3, 4, 4)] * sizes  # a discriminator's head has one size: they are told apart by their place
    trainer.terms["dm"].updates = trainer.terms["discriminator"].updates = updates
    seen, place = [], trainer.size_of
    trainer.size_of = lambda number: seen.append(place(number)) or seen[-1]
    for update in range(4):
        seen.clear()
        trainer.step()
        assert seen == [update % sizes, *[(update + turn) % sizes for turn in range(updates)] * 2]


def test_every_simulation_is_new_to_the_judges():
    trainer = small_run.trainer_of(("--reuse.backward-simulation", "--reuse.rollout", "1", "--reward.redness", "0.3"))
    assert all("redness/judge/redness" in trainer.step() for _ in range(3))


def test_a_sample_is_told_the_state_that_it_was_predicted_from():
    trainer = small_run.trainer_of(())
    rollout, k = trainer.new_rollout(), torch.arange(12) % 3
    sample = trainer.sample_of(rollout, k)
    assert torch.equal(sample.t_k, trainer.student.times[k]) and torch.equal(sample.k, k)
    assert all(torch.equal(x0, rollout.x0[step, i]) for i, (x0, step) in enumerate(zip(sample.x0, k, strict=True)))


def test_one_term_is_the_anchor():
    old = small_run.trainer_of(("--reward.redness", "0.3"))
    for anchors, said in (((), "none"), (("dm", "redness"), "dm, redness")):
        terms = {name: dataclasses.replace(term, anchor=name in anchors) for name, term in old.terms.items()}
        with pytest.raises(ValueError, match=f"exactly one term is the anchor, got {said}$"):
            Trainer(
                old.student, old.parameters, terms, old.batches, encode=old.encode, decode=old.decode,
                latent_shapes=old.latent_shapes, config=old.config, weights=old.weights,
            )  # fmt: skip


def test_a_term_without_a_weight_is_named(teacher_folder, prompt_file):
    run = run_of(teacher_folder, prompt_file)
    old, terms = run.trainer, {**run.trainer.terms, "mine": Term(as_reward(redness, "mine"))}

    def trainer(weights):
        return Trainer(
            old.student, old.parameters, terms, old.batches, encode=old.encode, decode=old.decode,
            latent_shapes=old.latent_shapes, config=old.config, weights=weights,
        )  # fmt: skip

    for weights in (None, Fixed({"other": 1.0})):
        with pytest.raises(ValueError, match="no weight for the term mine"):
            trainer(weights)
    assert trainer(Fixed({"mine": 0.0})).step()["mine/weight"] == 0


def test_a_checkpoint_of_another_network_is_refused(teacher_folder, prompt_file):
    state = run_of(teacher_folder, prompt_file).trainer.state()
    other = run_of(teacher_folder, prompt_file, "--lora-rank", "2").trainer
    with pytest.raises(checkpoint.DamagedCheckpoint, match="another network"):
        other.load_state(state)


def test_the_learning_rate_falls_to_zero_over_the_last_share():
    from fewstep.trainer import learning_rate

    assert [learning_rate(2.0, p / 4, 0.5) for p in range(5)] == [2.0, 2.0, 2.0, 1.0, 0.0]
    assert learning_rate(2.0, 0.75, 0.0) == 2.0 and learning_rate(2.0, 0.75, 1.0) == 0.5


def test_scores_that_only_scale_the_direction_cost_no_gradient(teacher_folder, prompt_file):
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3", "--weights.mode", "advantage").trainer
    logs = trainer.step()
    assert math.isfinite(logs["redness/score"])
    for name in ("decoder", "redness"):
        assert (trainer.counted[name].forwards, trainer.counted[name].backwards) == (4, 0)


def test_costs_are_counted_by_role(teacher_folder, prompt_file):
    run = run_of(teacher_folder, prompt_file, "--fake.updates", "2", "--reuse.rollout", "2")
    batch, steps = 4, 4
    logs = run.trainer.step()
    # a rollout of K forwards, one forward and backward; the guided teacher looks twice; R_dm's look and two updates of the fake
    assert logs["evaluations/student"] == batch * steps + 3 * batch
    assert logs["evaluations/teacher"] == 2 * batch
    assert logs["evaluations/fake"] == batch + 2 * 3 * batch
    assert run.trainer.step()["evaluations/student"] == batch * steps + 2 * 3 * batch  # the rollout serves twice


def test_an_evaluation_serves_m_updates_and_the_first_is_unweighted(teacher_folder, prompt_file):
    options = ("--reuse.evaluation", "3", "--reuse.min-ess", "0", "--student.lr", "1e-6")
    run = run_of(teacher_folder, prompt_file, *options)
    calls = []
    matching = run.trainer.terms["dm"].reward
    original = matching.evaluate
    matching.evaluate = lambda *args, **rest: calls.append(run.trainer.update) or original(*args, **rest)
    logs = [run.trainer.step() for _ in range(6)]
    assert calls == [0, 3]
    assert ["reuse/ess" in log for log in logs] == [False, True, True] * 2
    assert all(0.5 < log["reuse/ess"] <= 1 for log in logs if "reuse/ess" in log)
    assert ["dm/own_loss" in log for log in logs] == [False, False, True] * 2  # the fake holds still while its verdict is reused


def test_the_fake_learns_as_often_for_each_update_that_an_evaluation_serves():
    trainer = small_run.trainer_of(("--reuse.evaluation", "3", "--reuse.min-ess", "0"))
    reward, learnt, logs = trainer.terms["dm"].reward, [], []
    with mock.patch.object(reward, "loss", wraps=reward.loss) as loss:
        for _ in range(6):
            logs.append(trainer.step())
            learnt.append(loss.call_count)
    assert learnt == [0, 0, 6, 6, 6, 12]  # twice for each, once the evaluation has served
    assert ["reuse/permitted" in log for log in logs] == [False, True, False] * 2  # told by a move of one update


def test_an_evaluation_is_dropped_when_its_weights_degenerate(teacher_folder, prompt_file):
    options = ("--reuse.evaluation", "4", "--reuse.min-ess", "0.9999", "--student.lr", "1e-2")
    run = run_of(teacher_folder, prompt_file, *options)
    run.trainer.step()
    student = run.trainer.counted["student"]
    before = student.forwards, student.backwards
    logs = run.trainer.step()
    assert logs["reuse/ess"] < 0.9999 and "dm/score" in logs  # evaluated anew
    # two predictions, one of them where the weights were refused: its graph was dropped, and costs no backward pass
    assert (student.forwards - before[0], student.backwards - before[1]) == (2 * 4, 4)


def test_where_its_weights_degenerate_rdm_is_asked_again_and_the_other_rewards_are_not(teacher_folder, prompt_file):
    options = ("--reuse.evaluation", "3", "--reuse.min-ess", "0.9999", "--student.lr", "1e-2", "--reward.redness", "0.3")
    trainer = run_of(teacher_folder, prompt_file, *options).trainer
    matching, beside, learn, blocks, learned = trainer.terms["dm"].reward, trainer.terms["redness"].reward, trainer.online_updates, [], []
    asked = {"dm": [], "redness": []}
    original = matching.evaluate
    matching.evaluate = lambda x0, *args, **rest: asked["dm"].append(x0) or original(x0, *args, **rest)
    trainer.terms["redness"].reward = lambda sample: asked["redness"].append(trainer.update) or beside(sample)
    trainer.online_updates = lambda rollout, times: learned.append((trainer.update, times)) or learn(rollout, times)
    update = trainer.student_update

    def spy(rollout, block, x0, weight):
        assert weight is None and torch.equal(block.x0, x0.whole)  # R_dm speaks of where the student is
        blocks.append(dataclasses.replace(block))
        return update(rollout, block, x0, weight)

    trainer.student_update = spy
    logs = [trainer.step() for _ in range(6)]
    assert asked["redness"] == [0, 3] and len(asked["dm"]) == 6
    assert all(torch.equal(block.x0, x0) for block, x0 in zip(blocks, asked["dm"], strict=True))
    for first in (0, 3):
        one, *others = blocks[first : first + 3]
        for other in others:
            assert torch.equal(other.xk, one.xk) and torch.equal(other.k, one.k) and torch.equal(other.extra, one.extra)
            assert not any(torch.equal(*(getattr(block, key) for block in (other, one))) for key in ("x0", "anchor", "xt", "t"))
    assert not torch.equal(blocks[0].extra, blocks[3].extra)
    # the fake learns as often as the student moves, before it is asked again
    assert learned == [(1, 1), (2, 1), (2, 1), (4, 1), (5, 1), (5, 1)]
    assert [log.get("reuse/refused") for log in logs] == [None, 1, 1] * 2 and all("dm/score" in log for log in logs)


def test_while_a_budget_is_measured_a_run_is_that_of_matching_alone(teacher_folder, prompt_file):
    """Bit for bit: an evaluation of which nothing may serve again is followed by one of other prompts, whatever rewards are to come."""
    options = ("--reuse.evaluation", "3", "--reuse.min-ess", "0.9999", "--student.lr", "1e-2", "--updates", "40")
    students = []
    for rest in ((), ("--reward.redness", "1", "--weights.mode", "adaptive", "--weights.warmup", "5")):
        trainer = run_of(teacher_folder, prompt_file, *options, *rest).trainer
        logs = [trainer.step() for _ in range(4)]
        assert [log.get("redness/weight", 0) for log in logs] == [0] * 4 and any(log.get("reuse/refused") for log in logs)
        students.append({name: p.detach() for name, p in trainer.parameters.items()})
    assert_same(*students)


@pytest.mark.parametrize(
    "options, told",
    [
        (("--student.lr", "1e-2"), 1),
        (("--student.lr", "1e-6"), 0),
        (("--student.lr", "1e-2", "--reward.redness", "1", "--weights.mode", "adaptive", "--weights.warmup", "6"), 0),
    ],
    ids=["too far", "near", "while a budget is measured"],
)
def test_a_run_says_that_its_evaluations_are_never_reused(teacher_folder, prompt_file, monkeypatch, options, told):
    monkeypatch.setattr("fewstep.trainer.NEVER_REUSED", 3)
    run = run_of(teacher_folder, prompt_file, "--reuse.evaluation", "4", *options, "--updates", "40")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(5):
            run.trainer.step()
    said = [str(each.message) for each in found if "reuse.evaluation" in str(each.message)]
    assert len(said) == told and all("none of the first 3 evaluations" in each and "lower student.lr" in each for each in said)


@pytest.mark.parametrize("options", [(), ("--memory.micro-groups", "1")], ids=["whole", "parts"])
def test_policy_ratio_is_one_on_policy_and_moves_afterwards(teacher_folder, prompt_file, monkeypatch, options):
    """Also where a pass with a gradient rounds otherwise than the rollout's: a part in a hundred of each prediction here."""
    trainer = run_of(teacher_folder, prompt_file, "--reward.contrast", "1", "--via.contrast", "policy", *options).trainer
    denoiser, ratios = trainer.student.denoiser, []
    predict = denoiser.pass_through
    monkeypatch.setattr(denoiser, "pass_through", lambda *given: predict(*given) * (1.01 if torch.is_grad_enabled() else 1))
    policy = losses.policy

    def watched(log_prob, old, advantage, *, clip):
        ratios.append((log_prob - old).detach())
        return policy(log_prob, old, advantage, clip=clip)

    monkeypatch.setattr(losses, "policy", watched)
    logs = trainer.step()
    assert [logs[f"policy/rho_{which}"] for which in ("05", "50", "95", "max")] == [1] * 4
    assert logs["contrast/clip_fraction"] == 0 and all(torch.equal(ratio, torch.zeros_like(ratio)) for ratio in ratios)
    with trainer.precision():
        assert not torch.allclose(trainer.student.log_prob(trainer.rollout), old_log_prob(trainer.student, trainer.rollout))
    ratios.clear()
    trainer.step()
    assert trainer.fed == 2 and all(bool((ratio != 0).all()) for ratio in ratios)


def test_the_first_update_of_every_rollout_is_on_policy():
    options = ("--reward.contrast", "0.2", "--via.contrast", "policy", "--weights.max-masked", "1", "--reuse.rollout", "1")
    trainer = small_run.trainer_of(options)
    logs = [trainer.step() for _ in range(3)]
    assert trainer.rollouts == 3 and all(log["policy/rho_05"] == log["policy/rho_max"] == 1 for log in logs)


def old_log_prob(student, rollout):
    """The log-probability of each transition by the predictions that the rollout kept, (B, K-1)."""
    following = zip(rollout.x0[:-1], rollout.states[1:], strict=True)
    return torch.stack([student.transition_log_prob(x0, state, k) for k, (x0, state) in enumerate(following)], 1)


@pytest.mark.parametrize("mode", ["fixed", "sum", "advantage"])
def test_weight_zero_leaves_distribution_matching_alone(teacher_folder, prompt_file, mode):
    alone = run_of(teacher_folder, prompt_file).trainer
    for _ in range(3):
        alone.step()
    beside = run_of(teacher_folder, prompt_file, "--reward.redness", "0", "--weights.mode", mode).trainer
    for _ in range(3):
        beside.step()
    assert all(torch.equal(p, beside.parameters[name]) for name, p in alone.parameters.items())


def test_rewards_raise_their_own_score(teacher_folder, prompt_file):
    for options in (("--reward.redness", "30"), ("--reward.redness", "3000", "--weights.mode", "sum")):
        run = run_of(teacher_folder, prompt_file, *options, "--student.lr", "3e-3", "--fake.updates", "0")
        scores = [run.trainer.step()["redness/score"] for _ in range(12)]
        assert sum(scores[-3:]) > sum(scores[:3])


def test_a_nan_score_masks_its_sample_and_too_many_stop_the_run(teacher_folder, prompt_file):
    from fewstep.rewards.base import PixelReward, RewardError

    def broken(share):
        def f(images, prompts):
            lost = torch.arange(len(images)) < share * len(images)
            return redness(images, prompts) * torch.ones(len(images)).masked_fill(lost, float("nan"))

        return PixelReward(f, "redness")

    run = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3")
    run.trainer.terms["redness"].reward = broken(0.25)
    logs = run.trainer.step()
    assert logs["redness/masked"] == 1 and torch.isfinite(torch.tensor(logs["redness/score"]))
    assert all(torch.isfinite(p).all() for p in run.trainer.parameters.values())
    run.trainer.terms["redness"].reward = broken(0.75)
    before = {name: p.detach().clone() for name, p in run.trainer.parameters.items()}
    with pytest.raises(RewardError, match=r"redness.*3 of 4"):
        run.trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in run.trainer.parameters.items())


def test_a_score_is_logged_of_those_that_have_one_and_the_share_without_is_what_may_be_masked():
    """Of twelve finished samples three."""
    options = ("--reward.contrast", "0.2", "--via.contrast", "policy", "--weights.max-masked", "0.25")
    trainer = small_run.trainer_of(options)
    rollout, scores = trainer.new_rollout(), torch.arange(12.0)
    for lost in (3, 4):
        scores[:lost] = math.nan
        trainer.terms["contrast"].reward = lambda sample: Signal(scores, None)
        if lost == 3:
            logs = trainer.score_finished(rollout)
            assert logs["contrast/masked"] == 3 and logs["contrast/score"] == 7.0
        else:
            with pytest.raises(RewardError, match="'contrast' could not score 4 of 12 samples"):
                trainer.score_finished(rollout)


def test_a_black_box_reward_needs_the_policy(teacher_folder, prompt_file):
    from fewstep.rewards.base import RewardError

    run = run_of(teacher_folder, prompt_file, "--reward.contrast", "0.3")
    with pytest.raises(RewardError, match=r"contrast.*--via\.contrast policy"):
        run.trainer.step()


def test_a_run_takes_any_module_that_is_called_as_a_denoiser():
    network, fake = Plain(0.5), Plain(0.3)
    matching = DistributionMatching(Plain(0.6), fake, Flow(), guidance=2.0, score_weight="matching")
    trainer = Trainer(
        Student(network, Flow(), [1.0, 0.5]), dict(network.named_parameters()),
        {"dm": Term(matching, dict(fake.named_parameters()), lr=1e-3, anchor=True)}, Batches(["a cat"], groups=2, group_size=2, seed=0),
        encode=lambda prompts: {}, decode=lambda x0: x0, latent_shapes=[(1, 2, 2)], config=Config(steps=2, precision="fp32"),
    )  # fmt: skip
    before = [float(each.gain.detach()) for each in (network, fake)]
    logs = [trainer.step() for _ in range(3)][1]
    assert all(float(each.gain.detach()) != gain for each, gain in zip((network, fake), before, strict=True)) and "dm/lag" in logs
    assert trainer.state()["counted"] == {}
