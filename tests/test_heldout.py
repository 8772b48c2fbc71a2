"""Held-out judges: they push nothing, and their alarm comes when a reward is exploited and stays silent when it is not."""

import functools
import json
import math
import re
import warnings

import pytest
import small_run
import torch
from small_run import brightness
from test_trainer import redness, run_of

from fewstep import checkpoint, cli, composition, flags
from fewstep.errors import UserError
from fewstep.metrics import ratios_of, rms, spread_of
from fewstep.prompts import read
from fewstep.rewards import sources
from fewstep.rewards.base import as_reward
from fewstep.rewards.heldout import HeldOut, Parted, Parting
from fewstep.run import judge_records
from fewstep.types import Sample

BLOCK, WINDOW = Parting.BLOCK, Parting.WINDOW


def sample_of(images):
    n = len(images)
    x0 = images.clone().requires_grad_()
    return Sample(x0, torch.ones(n), {}, ["p"] * n, torch.arange(n), decode=lambda x: x)


def alarm_at(trained, judged):
    """The evaluation at which the alarm comes, or None."""
    watch = Parting()
    for i, pair in enumerate(zip(trained, judged, strict=True)):
        if watch.observe(*map(float, pair)) is not None:
            return i + 1
    return None


def noise(n, seed, scale=1.0):
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_a_judge_never_has_a_direction():
    sample = sample_of(torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    signal = HeldOut(brightness, "b")(sample)
    assert signal.direction is None and not signal.score.requires_grad
    assert torch.equal(signal.score, brightness(sample.x0, []).detach())


@pytest.mark.parametrize("shared", [0.0, 0.8], ids=["independent", "sharing their prompts' noise"])
def test_the_alarm_is_silent_in_clean_runs(shared):
    """200 runs of 400 evaluations each: noise alone, both rising, both falling, one rising beside a level one."""
    slopes = [(0.0, 0.0), (0.02, 0.01), (-0.01, -0.02), (0.02, 0.0)]
    false, t = 0, torch.arange(400)
    for seed in range(200):
        common = shared * noise(400, 3 * seed)
        a, b = slopes[seed % 4]
        own = (1 - shared**2) ** 0.5
        false += alarm_at(a * t + common + own * noise(400, 3 * seed + 1), b * t + common + own * noise(400, 3 * seed + 2)) is not None
    assert false == 0


def test_the_alarm_comes_when_the_judge_turns():
    """The reward rises all along; its judge rises with it to evaluation 100 and falls as fast afterwards. Noise of one per evaluation."""
    t = torch.arange(400)
    judged = 0.05 * torch.where(t < 100, t, 200 - t)
    delays = [alarm_at(0.05 * t + noise(400, 2 * seed), judged + noise(400, 2 * seed + 1)) - 100 for seed in range(50)]
    # never before the turn: 5 errors of a difference of windows of 40 are 1.1, and the newest window is as far below after 44 to 64
    assert min(delays) >= 40 and sum(delays) / len(delays) < 65 and max(delays) < 90


def parting(blocks, window=WINDOW, errors=Parting.ERRORS):
    """As `Parting` says, from all blocks (n, 2), means of (reward, judge), at once; evaluation counts blocks here."""
    if len(blocks) < 2 * window:
        return None
    means = blocks.unfold(0, window, 1).mean(-1)  # (n - window + 1, 2)
    now, before = means[-1], means[:-window]
    best = int(before[:, 1].argmax())
    then = before[best]
    noise = (blocks.diff(dim=0).square().mean(0) / 2).sqrt()  # of one block
    rise = (now - then) * torch.tensor([1.0, -1.0], dtype=blocks.dtype)  # the judge's is a fall
    if not bool((rise > errors * noise * (2 / window) ** 0.5).all()):
        return None
    return Parted(best + window, (float(then[0]), float(now[0])), (float(then[1]), float(now[1])))


def taken(blocks):
    watch = Parting()
    for a, b in blocks.tolist():
        watch.take((a, b))
    return watch


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_of_the_history_decides_as_all_of_it_would(seed):
    n = 120
    t, turn = torch.arange(n), torch.randint(20, 80, (), generator=torch.Generator().manual_seed(seed))
    rising, turning = (0.4 * t + noise(n, 2 * seed)).double(), (0.4 * (turn - (t - turn).abs()) + noise(n, 2 * seed + 1)).double()
    blocks, watch, told = torch.stack([rising, turning], 1), Parting(), 0
    for i in range(n):
        watch.take(tuple(blocks[i].tolist()))
        found, expected = watch.compare(), parting(blocks[: i + 1])
        assert (found is None) == (expected is None)
        if found is not None:
            told += 1
            assert found.evaluation == expected.evaluation * BLOCK
            assert [*found.trained, *found.judged] == pytest.approx([*expected.trained, *expected.judged], abs=1e-12)
    assert told > 10


def test_its_state_does_not_grow_and_nothing_is_kept_once_they_have_parted():
    watch, sizes = Parting(), []
    for i in range(4000):
        watch.observe(float(i), float(i % 7))
        if i in (2 * BLOCK * WINDOW, 3999):
            sizes.append(len(json.dumps(watch.state())))
    assert not watch.parted and len(watch.blocks) == 2 * WINDOW and sizes[1] < 2 * sizes[0]
    for i in range(1000):
        watch.observe(float(4000 + i), float(-i))
    assert watch.parted
    state = watch.state()
    watch.observe(0.0, 0.0)
    assert watch.state() == state


def test_it_needs_both_to_move_and_names_the_window_of_the_best_judge():
    n = 4 * WINDOW
    up = torch.linspace(0, 10, n)
    down = torch.cat([torch.linspace(0, 5, n // 2), torch.linspace(5, -5, n // 2)])
    wiggle = torch.tensor([0.05, -0.05]).repeat(n // 2)

    def found(a, b, blocks=n):
        return taken(torch.stack([a, b], 1).double()[:blocks]).compare()

    told = found(up + wiggle, down + wiggle)
    at = told.evaluation // BLOCK
    assert abs(at - WINDOW / 2 - n / 2) < WINDOW / 2  # the window around the turn
    assert told.trained[1] > told.trained[0] and told.judged[1] < told.judged[0]
    assert told.judged[0] == pytest.approx(float((down + wiggle)[at - WINDOW : at].mean()), abs=1e-6)
    assert found(up, up) is None and found(-up, -up) is None and found(-up, up) is None
    assert found(up, -up, 2 * WINDOW) is not None and found(up, -up, 2 * WINDOW - 1) is None


def test_it_is_told_once_and_goes_on_where_it_was_saved():
    trained, judged = torch.arange(200).float(), torch.cat([torch.arange(60), 60 - torch.arange(140)]).float()
    straight, said = Parting(), []
    for pair in zip(trained, judged, strict=True):
        said.append(straight.observe(*map(float, pair)))
    assert sum(s is not None for s in said) == 1
    first, second = Parting(), Parting()
    at = next(i for i, s in enumerate(said) if s is not None)
    for i in range(at - 2):
        first.observe(float(trained[i]), float(judged[i]))
    second.load_state(json.loads(json.dumps(first.state())))
    rest = [second.observe(float(trained[i]), float(judged[i])) for i in range(at - 2, 200)]
    assert rest == said[at - 2 :] and second.state() == straight.state()


def test_a_judge_changes_no_number_of_the_training(teacher_folder, prompt_file):
    config = ["--reward.redness", "0.3", "--reward.contrast", "0.1", "--via.contrast", "policy", "--reuse.rollout", "2"]
    judged = run_of(teacher_folder, prompt_file, *config).trainer
    for _ in range(3):
        judged.step()
    alone = run_of(teacher_folder, prompt_file, *config).trainer
    alone.partings = {}
    for _ in range(3):
        alone.step()
    assert judged.running.keys() > alone.running.keys()
    assert all(torch.equal(p, q) for p, q in zip(judged.parameters.values(), alone.parameters.values(), strict=True))


def test_its_history_is_saved(teacher_folder, prompt_file):
    first, second = (run_of(teacher_folder, prompt_file, "--reward.redness", "0.3").trainer for _ in range(2))
    for _ in range(2):
        first.step()
    assert first.partings["redness", "redness"].running
    second.load_state(checkpoint.unpack(*checkpoint.pack(first.state())))
    assert second.partings["redness", "redness"].state() == first.partings["redness", "redness"].state()


@pytest.mark.parametrize("options", [(), ("--memory.micro-groups", "1"), ("--via.redness", "policy")], ids=["batch", "parts", "policy"])
def test_a_judge_sees_the_pictures_that_its_reward_sees_once_a_rollout(teacher_folder, prompt_file, options):
    config = flags.parse_config([
        "--teacher", str(teacher_folder), "--updates", "8", "--groups", "2", "--reuse.rollout", "2", "--reward.redness", "0.3", *options
    ])  # fmt: skip
    seen = {"reward": [], "judge": []}

    def watched(name):
        def f(images, prompts):
            seen[name].append((images.detach().clone(), list(prompts)))
            return redness(images, prompts)

        return f

    trainer = composition.build(
        config, read(prompt_file), str(teacher_folder), {"redness": watched("reward")}, {"elsewhere": watched("judge")}
    ).trainer
    logs = [trainer.step() for _ in range(4)]
    told = [log for log in logs if "redness/judge/elsewhere" in log]
    assert len(told) == 2 and len(seen["judge"]) * (1 if "policy" in options else 2) == len(seen["reward"])
    assert all(log["redness/judge/elsewhere"] == pytest.approx(log["redness/score"], abs=1e-6) for log in told)
    pairs = [any(torch.equal(i, j) and p == q for j, q in seen["reward"]) for i, p in seen["judge"]]
    assert all(pairs)


def test_rewards_by_policy_share_a_decoded_picture_and_a_judge():
    """A judge behind a server, or one that is paid, is asked about a rollout's finished pictures once, whatever it stands beside."""
    options = ("--reward.redness", "0.3", "--reward.contrast", "0.2", "--via.redness", "policy", "--via.contrast", "policy")
    trainer = small_run.trainer_of((*options, "--weights.max-masked", "1"), judges={"elsewhere": small_run.brightness})
    calls, judge, decode = [], trainer.judges["elsewhere"].function, trainer.decode
    trainer.judges["elsewhere"].function = lambda *given: calls.append("judge") or judge(*given)
    trainer.decode = lambda x0: calls.append("decode") or decode(x0)
    logs = trainer.step()
    assert sorted(calls) == ["decode", "judge"] and {"redness/judge/elsewhere", "contrast/judge/elsewhere"} <= logs.keys()


def test_a_judge_is_not_asked_beside_other_rewards_than_its_own():
    options = ("--reward.redness", "0.3", "--reward.contrast", "0.2", "--via.contrast", "policy", "--weights.max-masked", "1")
    trainer, calls = small_run.trainer_of(options), []
    judge = trainer.judges["redness"].function
    trainer.judges["redness"].function = lambda *given: calls.append(given) or judge(*given)
    assert "redness/judge/redness" in trainer.step() and len(calls) == 1


def test_what_a_reward_or_its_judge_could_not_score_is_in_neither_mean():
    """The alarm compares them over the same pictures, and one NaN would silence it."""
    trainer = small_run.trainer_of(("--reward.redness", "0.3"))
    rollout = trainer.new_rollout()
    sample, count = trainer.sample_of(rollout, torch.zeros_like(rollout.group)), len(rollout.group)
    reward = as_reward(lambda images, prompts: [0.0, None, *range(2, count)], "redness")
    trainer.judges["redness"] = HeldOut(lambda images, prompts: [None, 0.0, *range(count - 2)], "judge.redness")
    _, logs = trainer.ask_with_judges({"redness": reward}, sample)
    trained, judged = (count + 1) / 2, (count - 3) / 2
    assert logs["redness/judge/redness"] == judged and trainer.partings["redness", "redness"].running == [(trained, judged)]


def test_the_alarm_names_the_reward_and_says_what_to_do(teacher_folder, prompt_file):
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "0.3").trainer
    watch = trainer.partings["redness", "redness"]
    for i in range(2 * WINDOW - 1):
        watch.take((float(i) + 0.1 * (i % 2), float(-i)))
    watch.running = [(2.0 * WINDOW, -2.0 * WINDOW)] * (BLOCK - 1)
    with pytest.warns(
        UserWarning, match="reward 'redness' has risen from .* while its held-out judge 'redness' has fallen .* weights.budget"
    ):
        trainer.watch("redness", "redness", watch, 2.0 * WINDOW, -2.0 * WINDOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logs = trainer.step()
    assert logs["redness/parted/redness"] == 1.0


def test_a_reward_without_weight_is_not_watched(teacher_folder, prompt_file):
    adaptive = ("--weights.mode", "adaptive", "--weights.warmup", "3", "--fake.lr", "3e-3", "--reuse.rollout", "1")
    trainer = run_of(teacher_folder, prompt_file, "--reward.redness", "1", *adaptive).trainer
    for _ in range(2):
        assert trainer.step()["redness/parted/redness"] == 0.0
    assert not trainer.partings["redness", "redness"].running
    trainer.step()
    trainer.step()
    assert trainer.partings["redness", "redness"].running


@pytest.mark.parametrize("via", ["pathwise", "policy"])
def test_shares_are_of_the_lengths_of_the_parts(teacher_folder, prompt_file, via):
    """A reward's part of eq. (6) has RMS lambda, since its group RMS is one, or its advantages' by its score; the anchor has its own."""
    options = ("--reward.redness", "0.3", "--reward.contrast", "0.2", "--via.contrast", "policy", "--via.redness", via)
    trainer = run_of(teacher_folder, prompt_file, *options).trainer
    logs = trainer.step()
    force = {"redness": 0.3, "contrast": 0.2}
    for name in trainer.advantages:
        force[name] *= rms(trainer.advantages[name])
    whole = logs["dm/direction_rms"] + sum(force.values())
    assert {name: logs[f"{name}/share"] for name in force} == pytest.approx({name: f / whole for name, f in force.items()}, rel=1e-5)


def test_spread_is_the_groups_own():
    score = torch.tensor([1.0, 3.0, 5.0, 5.0, 7.0, math.nan, 9.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    found = spread_of(score, group)
    assert found["spread"] == pytest.approx(0.5) and found["spread_min"] == 0 and found["constant_groups"] == 0.5
    assert found["advantage_max"] == pytest.approx(1 / (1 + 1e-4))
    assert all(math.isnan(value) for value in spread_of(torch.ones(2), torch.tensor([0, 1])).values())


JUDGES = """
def red(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def bright(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.mark.usefixtures("small_grid")
def test_a_run_with_judges_and_one_that_goes_on(teacher_folder, prompt_file, tmp_path, capsys):
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(JUDGES)
    small = ["--groups", "2", "--group-size", "2", "--sample-every", "0", "--evaluate", "false", "--lora-rank", "0",
             "--memory.micro-groups", "0", "--memory.checkpointing", "false"]  # fmt: skip
    command = ["distill", "--teacher", str(teacher_folder), "--prompts", str(prompt_file), "--output", str(out), *small]
    assert cli.main([*command, "--updates", "2", "--reward.red", f"{file}:red", "--judge.bright", f"{file}:bright"]) == 0
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all({"red/judge/bright", "red/parted/bright", "red/share", "red/spread", "red/cosine"} <= log.keys() for log in logs)
    told = json.loads((out / "rewards.json").read_text())[-1]["rewards"]
    assert told["judge.bright"]["source"] == f"{file}:bright" and told["judge.bright"]["version"] == told["red"]["version"]
    assert "bright" not in (out / "config.yaml").read_text()  # no file names code, so a run that goes on is given its judges again
    capsys.readouterr()
    assert cli.main(["distill", "--output", str(out), "--resume", "--updates", "3", "--scorer.red", f"{file}:red"]) == 0
    said = capsys.readouterr().out
    assert "judge 'bright' is not asked any more" in said and f"Give it again: --judge.bright {file}:bright" in said
    assert not any("judge" in key for key in json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]))


def test_what_rewards_were_is_written_where_it_changed_alone(tmp_path):
    path = tmp_path / "rewards.json"
    for update, version in ((0, "a"), (5, "a"), (7, "b"), (9, "b"), (11, "a")):
        sources.write_records(path, {"clip": {"source": "here", "version": version}}, update)
    kept = [(one["from_update"], one["rewards"]["clip"]["version"]) for one in json.loads(path.read_text())]
    assert kept == [(0, "a"), (7, "b"), (11, "a")]


def test_a_judge_that_was_a_function_is_asked_for_again(tmp_path):
    told = {"red": {"source": sources.OWN}, "clip": {"source": "folder", "version": "1"}}
    own = {"judge.mine": {"source": sources.OWN}, "judge.clip": {"source": "owner/name@1", "version": "1"}}
    assert sources.write_records(tmp_path / "rewards.json", told | own, 0) == []
    (line,) = sources.write_records(tmp_path / "rewards.json", told, 1)
    assert line.startswith("judge 'mine' is not asked any more") and line.endswith("judges={'mine': ...} from Python")
    assert sources.write_records(tmp_path / "rewards.json", told, 2) == []  # it is told once


class Scorer:
    def score(self, images, prompts):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("reward, judge, words", [
    (("red", "FILE:red"), ("red", "AGAIN:red"), "AGAIN:red is what the student is trained on, as the reward 'red'"),
    (("red", "FILE:red"), ("other", "FILE:red"), "FILE:red is what the student is trained on, as the reward 'red'"),
    (("red", "http://127.0.0.1:9/x"), ("red", "http://127.0.0.1:9/x/"), "as the reward 'red'"),
    (("red", "http://127.0.0.1:9/x"), ("other", "http://127.0.0.1:9/x"), "as the reward 'red'"),
    (("clip", "CLIP"), ("pickscore", "CLIP/../clip"), "CLIP is what the student is trained on, as the reward 'clip'"),
], ids=["path", "name", "slash", "server", "folder"])  # fmt: skip
def test_no_judge_is_what_the_student_is_trained_on(tmp_path, monkeypatch, reward, judge, words):
    (tmp_path / "mine.py").write_text(JUDGES)
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.rewards.remote.Remote.connect", lambda server: server)
    named = {"FILE": "./mine.py", "AGAIN": str(tmp_path / "mine.py"), "CLIP": str(tmp_path / "clip")}

    def spelt(text):
        return functools.reduce(lambda t, name: t.replace(name, named[name]), named, text)

    told = (f"--reward.{reward[0]}=1", f"--scorer.{reward[0]}={spelt(reward[1])}", f"--judge.{judge[0]}={spelt(judge[1])}")
    config = flags.parse_config(list(told))
    trained = composition.resolve_rewards(config, {})
    with pytest.raises(UserError, match=re.escape(f"judge.{judge[0]}: ")) as refused:
        composition.resolve_judges(config, {}, trained)
    assert spelt(words).replace("/../clip", "") in str(refused.value).replace("/../clip", "") and "a judge is held out" in str(
        refused.value
    )
    config.judge = {judge[0]: spelt("FILE:bright")}  # another function of the same file is another judge
    assert composition.resolve_judges(config, {}, trained).keys() == config.judge.keys()


@pytest.mark.parametrize("reward, judge", [
    ("http://127.0.0.1:9", "http://localhost:9"), ("http://127.0.0.1:9", "HTTP://127.0.0.1:9"), ("http://127.0.0.1:9", "mine.py:red"),
    ("mine.py:red", "http://127.0.0.1:9"), ("mine.py:red", "copy/mine.py:red"), ("clip", "copy"), ("clip", "http://127.0.0.1:10"),
    ("http://127.0.0.1:11", "http://127.0.0.1:12"),
])  # fmt: skip
def test_no_judge_is_what_the_student_is_trained_on_by_its_content(tmp_path, monkeypatch, reward, judge):
    """Another address, a copy, or a server of the same file or folder."""
    for name, words in (("clip", "a"), ("copy", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(words)
    for path in (tmp_path / "mine.py", tmp_path / "copy" / "mine.py"):
        path.write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    version = sources.function_version("mine.py:red")
    served = {
        "9": ("red", version), "10": ("pickscore", sources.weights_version("clip")), "11": ("red", "1"), "12": ("red", "1"),
        "13": ("red", "2"), "14": ("green", "1"), "15": ("red", version.replace("red", "bright")),
    }  # fmt: skip

    def connect(server):
        server.served, server.version = served[server.url.rpartition(":")[2]]
        return server

    monkeypatch.setattr("fewstep.rewards.remote.Remote.connect", connect)
    config = flags.parse_config(["--reward.clip=1", f"--scorer.clip={reward}", f"--judge.pickscore={judge}"])
    trained = composition.resolve_rewards(config, {})
    with pytest.raises(
        UserError, match=r"judge\.pickscore: .* is what the student is trained on, as the reward 'clip'; a judge is held out"
    ):
        composition.resolve_judges(config, {}, trained)
    for another in ("http://127.0.0.1:13", "http://127.0.0.1:14", "http://127.0.0.1:15", "mine.py:bright", "other"):
        config.judge = {"pickscore": another}
        composition.resolve_judges(config, {}, trained)


@pytest.mark.parametrize("flag", ["--judge.clip=held-out", "--dry-run"])
def test_no_weights_are_read_for_a_twin_of_the_worlds_nor_in_a_dry_run(tmp_path, monkeypatch, flag):
    monkeypatch.delattr(sources, "weights_version")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    told = ["--reward.clip=1", f"--scorer.clip={tmp_path / 'one'}", flag]
    config = flags.parse_config(told if "judge" in flag else [*told, f"--judge.pickscore={tmp_path / 'two'}"])
    assert composition.resolve_judges(config, {}, {}) == {}


@pytest.mark.parametrize("given", [redness, Scorer().score], ids=["function", "method"])
def test_no_judge_from_python_is_what_the_student_is_trained_on(given):
    config = flags.parse_config(["--reward.red", "1"])
    rewards = {"red": given}
    again = given if given is redness else given.__self__.score
    for name in ("red", "other"):
        with pytest.raises(UserError, match=rf"judge.{name}: it is what the student is trained on, as the reward 'red'"):
            composition.resolve_judges(config, {name: again}, rewards)
    for another in (brightness, Scorer().score):
        assert composition.resolve_judges(config, {"red": another}, rewards) == {"red": another}
    named = flags.parse_config(["--reward.hps", "1", "--judge.clip"])  # a function with a named reward's name comes from nowhere
    assert composition.resolve_judges(named, {}, {"hps": given}) == {}


def test_the_worlds_own_twins_are_other_models(teacher_folder):
    from fewstep import world

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained = world.load_scorers()
    clip, gold = world.held_out("clip"), world.held_out("preference")
    assert not torch.allclose(clip(images, ["a cat", "a dog"]), trained["clip"].score(images, ["a cat", "a dog"]), atol=0.1)
    assert torch.equal(gold(images, ["a cat", "a dog"]), gold(images, ["", ""]))  # it reads no prompt
    config = flags.parse_config(["gndmr", "--judge.clip", "held-out", "--judge.preference", "held-out"])
    assert composition.resolve_judges(config, {}, {}) == {}
    assert set(composition.make_judges(composition.resolve_hardware(config), {})) == {"clip", "preference"}
    told = judge_records(config, {})
    assert told["clip"]["version"] == sources.version(str(world.ASSETS / "clip-heldout")) != told["preference"]["version"]


@pytest.mark.usefixtures("small_grid")
def test_the_python_interface_takes_judges(teacher_folder, prompt_file, tmp_path):
    import fewstep

    small = {"groups": 2, "group_size": 2, "updates": 1, "sample_every": 0, "evaluate": False, "lora_rank": 0,
             "memory": {"micro_groups": 0, "checkpointing": False}}  # fmt: skip
    out = fewstep.distill(
        str(teacher_folder), str(prompt_file), rewards={"red": redness}, judges={"red": brightness}, output=str(tmp_path / "out"), **small
    )
    assert "red/judge/red" in json.loads((out / "metrics.jsonl").read_text())
    with pytest.raises(UserError, match="nothing to judge"):
        fewstep.distill(str(teacher_folder), str(prompt_file), judges={"red": brightness}, output=str(tmp_path / "other"), **small)


def test_ratios_are_told_by_their_quantiles():
    """Of 101 ratios 0, 1, ..., 100 the 5% quantile is 5."""
    found = ratios_of(torch.arange(101, dtype=torch.float32)[torch.randperm(101, generator=torch.Generator().manual_seed(0))].log())
    assert found == pytest.approx({"rho_05": 5, "rho_50": 50, "rho_95": 95, "rho_max": 100})
