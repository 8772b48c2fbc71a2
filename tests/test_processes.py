"""`fewstep distill` in several processes, from its flags to the finished student."""

import contextlib
import functools
import os
import signal
import sys
import time
import warnings

import pytest
import torch
from forked import ended, free_port, speak_into, start
from safetensors.torch import load_file

from fewstep import checkpoint, cli, composition, flags
from fewstep.errors import UserError
from fewstep.ranks import Ranks

SMALL = ("--groups", "2", "--group-size", "2", "--precision", "fp32", "--lora-rank", "2", "--evaluate", "false", "--sample-every", "1",
         "--fake.updates", "1", "--memory.micro-groups", "0", "--memory.checkpointing", "false")  # fmt: skip


def launched(rank, port, size=2):
    """What torchrun tells a process in its environment."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()}


@contextlib.contextmanager
def two_processes(arguments, folder):
    """Process ids of two forked ones in which `fewstep` was called; what each says is in RANK.out and RANK.err."""
    port = free_port()

    def of(rank):
        speak_into(*(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")))
        os.environ.update(launched(rank, port))
        return cli.main(arguments)

    children = [start(functools.partial(of, rank)) for rank in range(2)]
    try:
        yield children
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def codes(children):
    return [ended(child) for child in children]


def said(folder, rank, where="out"):
    """What a process printed, without what gloo of torch 2.10 prints beside it."""
    lines = (folder / f"{rank}.{where}").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


@pytest.fixture
def base(teacher_folder, prompt_file):
    return ["distill", "--teacher", str(teacher_folder), "--prompts", str(prompt_file), *SMALL]


def test_two_processes_leave_what_one_leaves(base, tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.evaluate.drawing.TEACHER_STEPS", 2)  # of the teacher's pictures
    options = [*base, "--updates", "2", "--save-every", "1", "--output"]
    assert cli.main([*options, str(tmp_path / "one")]) == 0
    with two_processes([*options, str(tmp_path / "two")], tmp_path) as children:
        assert codes(children) == [0, 0], said(tmp_path, 0, "err") + said(tmp_path, 1, "err")
    assert "waiting until all 2 processes are there" in said(tmp_path, 0)
    assert "training on cpu in fp32, 2 processes" in said(tmp_path, 0) and not said(tmp_path, 1)  # the first one alone talks
    left = {name: {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")} for name in ("one", "two")}
    assert left["one"] == left["two"]
    one, two = (load_file(tmp_path / each / "unet" / "diffusion_pytorch_model.safetensors") for each in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)  # in float32, after Adam's first steps
    lines = [(tmp_path / each / "metrics.jsonl").read_text().splitlines() for each in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 2


def test_a_signal_to_one_process_saves_the_run_of_all_and_one_goes_on(base, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with two_processes([*base, "--updates", "400", "--sample-every", "0", "--output", str(output)], tmp_path) as children:
        deadline = time.monotonic() + 120
        while not ((log := output / "metrics.jsonl").exists() and log.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(children[1], signal.SIGTERM)
        assert codes(children) == [130, 130], said(tmp_path, 0, "err") + said(tmp_path, 1, "err")
    assert "saved. Go on with" in said(tmp_path, 0)
    _, state = checkpoint.newest(output / "checkpoints")
    assert 2 <= state["update"] < 400 and len(log.read_text().splitlines()) == state["update"]
    monkeypatch.setattr("fewstep.evaluate.drawing.TEACHER_STEPS", 2)
    assert cli.main(["distill", "--output", str(output), "--resume", "--updates", str(state["update"] + 1)]) == 0
    assert checkpoint.newest(output / "checkpoints")[1]["update"] == state["update"] + 1


def test_a_process_that_raises_ends_the_others_within_thirty_seconds(base, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os, time, pathlib\n\n"
        "def f(images, prompts):\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        pathlib.Path({str(tmp_path / 'raised')!r}).write_text(str(time.time()))\n"
        "        raise OverflowError('a number too large')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    told = ["--reward.mine", "1", "--scorer.mine", f"{reward}:f", "--updates", "4", "--output", str(tmp_path / "run")]
    with two_processes([*base, *told], tmp_path) as children:
        assert codes(children) == [1, 8]  # in one line; with its traceback
    assert time.time() - float((tmp_path / "raised").read_text()) < 30
    assert "OverflowError: a number too large\nraised by the reward 'mine'" in said(tmp_path, 1, "err")
    assert "fewstep: error: process 0: another process of this run has ended; what it printed says why" in said(tmp_path, 0, "err")
    assert "Traceback" not in said(tmp_path, 0, "err")


@pytest.mark.parametrize(
    "options, size, message",
    [
        (("--groups", "32"), 5, "groups: 5 processes cannot share 32 groups evenly; start 4 or 8, or set --groups to a multiple of 5"),
        (("--groups", "2"), 8, "groups: 8 processes cannot share 2 groups evenly; start 2, or set --groups to a multiple of 8"),
        (("--device", "cuda:1"), 2, "device: cuda:1 is one device and there are 2 processes, each of which takes its own: leave it out"),
        (
            ("--device", "cuda:1", "--resume"),
            2,
            "device: cuda:1 is one device and there are 2 processes, each of which takes its own: give --device auto",
        ),
    ],
)
def test_what_processes_cannot_share_is_said_before_anything_slow(options, size, message):
    with pytest.raises(UserError) as error:
        composition.check_processes(flags.parse_config(list(options)), size)
    assert str(error.value) == message


def test_processes_that_see_other_checkpoints_do_not_go_on(base, tmp_path):
    """As where each machine has a disk of its own."""
    from fewstep import run

    class Apart:
        rank, size = 1, 2

        def barrier(self):
            pass

        def all_gather_object(self, value):
            return ["step-00000004", value]

    with pytest.raises(UserError, match=r"the processes see other checkpoints .* it must lie on a disk that all machines share"):
        run.find_checkpoint(tmp_path, Apart())


def test_a_warning_that_several_processes_have_is_shown_once(tmp_path):
    port = free_port()

    def of(rank):
        speak_into(*(os.open(tmp_path / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT) for name in ("out", "err")))
        os.environ.update(launched(rank, port))
        own = warnings.showwarning = lambda message, *rest: print(message, file=sys.stderr)  # pytest would keep it
        warnings.simplefilter("always")
        ranks = Ranks.join()
        for text in ("of both", f"of {rank} alone", "of both"):
            warnings.warn(text, stacklevel=1)
        ranks.barrier()
        ranks.leave()
        assert warnings.showwarning is own

    assert [ended(child) for child in [start(functools.partial(of, rank)) for rank in range(2)]] == [0, 0], said(tmp_path, 0, "err")
    shown = [line for rank in range(2) for line in said(tmp_path, rank, "err").splitlines()]
    assert sorted(line for line in shown if line.startswith("of ")) == ["of 0 alone", "of 1 alone", "of both", "of both"]
    assert "of 1 alone" in said(tmp_path, 1, "err")


def test_a_dry_run_is_of_each_process(base, monkeypatch, capsys):
    told = {}
    for size in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        assert cli.main([*base, "--dry-run"]) == 0
        told[size] = capsys.readouterr().out
    assert "each of 2 processes, on cpu" in told[2] and "processes" not in told[1]
    activations = [float(line.split()[0]) for text in told.values() for line in text.splitlines() if "activations" in line]
    assert activations[1] <= activations[0]
