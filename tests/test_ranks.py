"""Several processes make the run that one makes (promise 9): in float64 to rounding, with checkpoints that either reads."""

import functools
import json
import math
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as processes
from forked import ended, start
from small_run import SEVERAL, trainer_of

from fewstep import checkpoint
from fewstep.ranks import LostProcess, Ranks, buckets

UPDATES = 6
RUNS = {
    "gndm": (),
    "dmd, parts": ("--matching.normalize", "sample", "--memory.micro-groups", "1"),
    "batch": ("--matching.normalize", "batch", "--matching.gamma", "0.5"),
    "channel, draws": ("--matching.normalize", "channel", "--matching.guidance", "1.0", "--matching.draws", "2"),
    "rewards": SEVERAL,
    "rewards, parts": (*SEVERAL, "--memory.micro-groups", "1"),
    "asked again": (*SEVERAL, "--reuse.min-ess", "1", "--reuse.evaluation", "3"),
    "a range of guidance": ("--matching.guidance", "[1.5,8]", "--memory.micro-groups", "1"),
    "discriminator": ("--reward.discriminator", "0.5"),
    "backward simulation": ("--reuse.backward-simulation", "true", "--reuse.rollout", "1"),
}


def go_on(trainer, updates, folder):
    """Logs of some updates, after which the trainer is saved."""
    logs = [trainer.step() for _ in range(updates)]
    trainer.save(folder)
    return logs


def in_processes(size, work, folder):
    """`work(ranks)` in forked processes that have joined; what each returned, as JSON."""
    # a file of their own: the last to leave does not always remove it, and the next ones would call those that have left
    meeting = Path(tempfile.mkdtemp(dir=folder)) / "meeting"

    def of(rank):
        processes.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        torch.manual_seed(rank)  # whatever they drew before they met
        (folder / f"{rank}.json").write_text(json.dumps(work(Ranks(rank, size))))
        processes.destroy_process_group()

    children = [start(functools.partial(of, rank)) for rank in range(size)]
    assert [ended(child) for child in children] == [0] * size
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def assert_close(a, b):
    (tensors_a, rest_a), (tensors_b, rest_b) = checkpoint.pack(a), checkpoint.pack(b)
    assert tensors_a.keys() == tensors_b.keys()
    for name, value in tensors_a.items():
        if value.is_floating_point():
            assert value.dtype == tensors_b[name].dtype, name
            torch.testing.assert_close(value, tensors_b[name], rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
        else:
            assert torch.equal(value, tensors_b[name]), name
    numbers_a, numbers_b = (list(leaves(rest)) for rest in (rest_a, rest_b))
    assert len(numbers_a) == len(numbers_b)
    for x, y in zip(numbers_a, numbers_b, strict=True):
        assert x == y or x == pytest.approx(y, rel=1e-9, abs=1e-12)


def leaves(value):
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        yield from leaves(one) if isinstance(one, (dict, list)) else [one]


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_two_processes_make_the_run_of_one(in_float64, tmp_path, options):
    one = trainer_of(options)
    alone = go_on(one, UPDATES, tmp_path / "one")
    logs = in_processes(2, lambda ranks: go_on(trainer_of(options, ranks), UPDATES, tmp_path / "two"), tmp_path)
    assert logs[0] == logs[1]
    assert [sorted(each) for each in logs[0]] == [sorted(each) for each in alone]
    assert_close(logs[0], alone)
    saved, state = (checkpoint.newest(tmp_path / name / "checkpoints")[1] for name in ("two", "one"))
    assert_close(saved["student"], state["student"])
    assert_close(saved, state)
    start = trainer_of(options).parameters
    assert max(float((saved["student"][name] - p.detach()).abs().max()) for name, p in start.items()) > 1e-3  # it moved


@pytest.mark.parametrize("more", [(), ("--reward.contrast", "0.1")], ids=["one reward", "two"])
def test_a_part_or_a_process_whose_pictures_all_go_unscored_is_masked(in_float64, tmp_path, monkeypatch, more):
    """As where a function finds no face: what it returns then has no graph."""
    unscored = ("a hat", "a bat", "a fox")

    def faces(images, prompts):
        score = images.new_full((len(images),), math.nan)
        found = [i for i, prompt in enumerate(prompts) if prompt not in unscored]
        if found:
            score[found] = images[found].mean((1, 2, 3))
        return score

    monkeypatch.setattr("small_run.redness", faces)
    monkeypatch.setattr("small_run.contrast", lambda images, prompts: images[:, 0].mean((1, 2)))
    told = ("--reward.redness", "0.3", *more, "--weights.max-masked", "1")

    def logs(options=(), ranks=None):
        trainer = trainer_of((*told, *options), ranks)
        return [{key: value for key, value in trainer.step().items() if not key.startswith("evaluations/")} for _ in range(3)]

    one = logs()
    assert any(each["redness/masked"] for each in one)
    assert_close(logs(("--memory.micro-groups", "1")), one)
    assert_close(in_processes(4, lambda ranks: logs(ranks=ranks), tmp_path)[0], one)


def test_a_run_goes_on_with_another_number_of_processes(in_float64, tmp_path):
    """Two updates by two processes, two by four, two by one: the run of one."""
    alone = trainer_of(SEVERAL)
    go_on(alone, 6, tmp_path / "alone")

    def resumed(ranks=None):
        trainer = trainer_of(SEVERAL, ranks)
        found = checkpoint.newest(tmp_path / "checkpoints")
        if found:
            trainer.load_state(found[1])
        if ranks:
            ranks.barrier()  # the first one's save removes older checkpoints
        go_on(trainer, 2, tmp_path)

    in_processes(2, resumed, tmp_path)
    in_processes(4, resumed, tmp_path)
    resumed()
    assert_close(checkpoint.newest(tmp_path / "checkpoints")[1], alone.state())


def test_each_process_passes_its_share_alone(in_float64, tmp_path):
    """Network passes of two processes are those of one, half of them each."""

    def passes(ranks=None):
        trainer = trainer_of(SEVERAL, ranks)
        logs = [trainer.step() for _ in range(3)]
        return {name: [one.forwards, one.backwards] for name, one in trainer.counted.items()}, logs[-1]

    alone, logs = passes()
    found = in_processes(2, passes, tmp_path)
    for name, (forwards, backwards) in alone.items():
        assert [own[name] for own, _ in found] == [[forwards / 2, backwards / 2]] * 2
    assert all(said == pytest.approx(logs[key]) for key, said in found[0][1].items() if key.startswith("evaluations/"))


def test_what_processes_tell_each_other(tmp_path):
    def told(ranks):
        own = torch.tensor([[ranks.rank, 0.5]], dtype=torch.bfloat16)
        total = torch.tensor([1.0, ranks.rank])
        ranks.all_reduce([None, total])
        begun = torch.tensor([float(ranks.rank)])
        ranks.broadcast([begun])
        torch.manual_seed(3)
        here = []
        for turn in range(2):
            with ranks.own_random(torch.device("cpu"), turn):
                here.append(float(torch.rand(())))
        after = float(torch.rand(()))
        return {
            "rows": str(ranks.rows(6)), "gathered": ranks.all_gather(own).tolist(),
            "flags": ranks.all_gather(torch.tensor([ranks.rank == 1])).tolist(),
            "total": total.tolist(), "sums": ranks.sum_by_name({"both": 1, f"only {ranks.rank}": 2.5}), "any": ranks.any(ranks.rank == 2),
            "first": ranks.of_first(ranks.rank == 0), "told": ranks.all_gather_object(["ä", None, ranks.rank]), "begun": float(begun),
            "here": here, "after": after,
        }  # fmt: skip

    found = in_processes(3, told, tmp_path)
    assert [one.pop("rows") for one in found] == ["slice(0, 2, None)", "slice(2, 4, None)", "slice(4, 6, None)"]
    assert len({number for one in found for number in one.pop("here")}) == 3 * 2  # random numbers of their own, then those that they share
    torch.manual_seed(3)
    assert found[0] == found[1] == found[2] == {
        "gathered": [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]], "flags": [False, True, False], "total": [3.0, 3.0],
        "sums": {"both": 3, "only 0": 2.5, "only 1": 2.5, "only 2": 2.5}, "any": True, "first": True,
        "told": [["ä", None, 0], ["ä", None, 1], ["ä", None, 2]], "begun": 0.0, "after": float(torch.rand(())),
    }  # fmt: skip


def test_tensors_travel_in_buckets_and_come_back_in_their_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.ranks.BUCKET", 10)

    def added(ranks):
        sizes = [(2, 3), (4,), (1,), (11,), (3, 2), (), (5,)]
        floats = [torch.arange(math.prod(size), dtype=torch.float32).view(size) + 100 * ranks.rank for size in sizes]
        turned = torch.arange(6.0).view(2, 3).t()  # not contiguous
        whole = torch.tensor([2**40 + 1])  # which no float32 holds
        mixed = [*floats[:3], whole, None, turned, *floats[3:]]
        ranks.all_reduce(mixed)
        alone = [len(bucket) for bucket in buckets(floats)]
        return {"floats": [each.tolist() for each in floats], "turned": turned.tolist(), "whole": whole.tolist(), "buckets": alone}

    found = in_processes(2, added, tmp_path)
    expected = [(2 * torch.arange(math.prod(size)).view(size) + 100).tolist() for size in [(2, 3), (4,), (1,), (11,), (3, 2), (), (5,)]]
    for each in found:
        assert each["floats"] == expected and each["whole"] == [2**41 + 2]
        assert each["turned"] == (2 * torch.arange(6.0).view(2, 3).t()).tolist()
        assert each["buckets"] == [2, 1, 1, 2, 1]


def test_a_student_that_is_no_longer_the_others_is_named(tmp_path):
    def drifted(ranks):
        trainer = trainer_of((), ranks)
        if ranks.rank == 1:
            next(iter(trainer.parameters.values())).data.add_(1e-3)
        with pytest.raises(RuntimeError, match="the student of process 1 is no longer that of process 0"):
            trainer.save(tmp_path)

    in_processes(2, drifted, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_whichever_tensor_is_another_it_is_seen(tmp_path):
    def drifted(ranks):
        with pytest.raises(RuntimeError, match="what they hold of process 1, 2 is no longer that of process 0"):
            ranks.check_same([torch.ones(2), torch.tensor([1.0, 1.0 + 1e-6 * ranks.rank])], "what they hold")
        with pytest.raises(RuntimeError, match="what they hold of process 1, 2 is no longer"):  # beside many that are the same
            ranks.check_same([torch.ones(2**20).index_fill(0, torch.tensor([7]), 1.0 + 1e-3 * ranks.rank)], "what they hold")

    in_processes(3, drifted, tmp_path)


def test_the_first_of_a_machine_goes_before_its_others(tmp_path):
    """On each of two machines, whose caches are their own."""

    def seen(ranks):
        machine, place = divmod(ranks.rank, 2)
        os.environ["LOCAL_RANK"] = str(place)
        with ranks.first_on_its_machine():
            found = (tmp_path / f"made on {machine}").exists()
            if place == 0:
                time.sleep(0.1)
                (tmp_path / f"made on {machine}").touch()
        return found

    assert in_processes(4, seen, tmp_path) == [False, True, False, True]


def test_a_process_that_ended_is_missed_at_once(tmp_path):
    def lost(ranks):
        if ranks.rank == 1:
            return None
        with pytest.raises(LostProcess, match="another process of this run has ended"):
            for _ in range(2):
                ranks.barrier()

    in_processes(2, lost, tmp_path)


def test_what_a_collective_died_of_is_said(monkeypatch):
    def failing(name, error):
        monkeypatch.setattr(name, mock.Mock(side_effect=error))
        Ranks(0, 2).all_reduce([torch.ones(2)])

    with pytest.raises(LostProcess, match="or else this: NCCL error Last error: Duplicate GPU detected"):
        failing("torch.distributed.all_reduce", RuntimeError("NCCL error\nLast error:\nDuplicate GPU detected"))
    with pytest.raises(torch.OutOfMemoryError):
        failing("torch.distributed.all_reduce", torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError, match="no room for a copy") as error:  # of this process's own
        failing("torch.cat", RuntimeError("no room for a copy"))
    assert not isinstance(error.value, LostProcess)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="4 groups cannot be shared evenly by 3 processes"):
        trainer_of((), Ranks(0, 3))
