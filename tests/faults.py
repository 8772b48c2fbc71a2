"""Faults, injected in numbers: `python tests/faults.py` does so, asserts of each that it fired, and writes docs/faults.md.

A trial survives when what is promised of the fault held: what was saved is whole, nothing was updated with what is not a number, the
error names what was wrong and where. `--trials 3` is a short version; the whole takes minutes of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from forked import ended, start
from gaussian_run import Run
from small_run import SEVERAL, trainer_of

from fewstep import checkpoint, cli, flags, prompts, run
from fewstep.config import Config
from fewstep.errors import UserError

DOCS = Path(__file__).resolve().parent.parent / "docs" / "faults.md"
PHASES = ("new_rollout", "ask_anchor", "ask_in_parts", "policy_updates", "student_update", "reweigh", "online_updates", "save")
LONG = (*SEVERAL, "--updates", "10000", "--save-every", "1")


class Fault(NamedTuple):
    what: str
    held: str  # what surviving it is
    inject: Callable[[int, random.Random, Path], Iterator[bool]]  # (trials, random numbers, an empty folder) -> whether each survived
    trials: int


def digest(state: Any) -> str:
    """Of everything that a checkpoint holds, to the bit."""
    tensors, rest = checkpoint.pack(state)
    whole = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


class Unbroken:
    """The run that nothing happened to, as far as it is asked for."""

    def __init__(self, options):
        self.trainer, self.digests = trainer_of(options), {}
        self.state = torch.get_rng_state()

    def at(self, update: int) -> str:
        torch.set_rng_state(self.state)
        while self.trainer.update < update:
            self.trainer.step()
            self.digests[self.trainer.update] = digest(self.trainer.state())
        self.state = torch.get_rng_state()
        return self.digests[update]


def train(trainer, folder: Path) -> None:
    for _ in trainer.run(folder, stop=lambda: False):
        pass


def kills(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """SIGKILL at a random moment of a run that saves at every update; the newest checkpoint is the unbroken run's, to the bit."""
    unbroken = Unbroken(LONG)
    for trial in range(trials):
        output = folder / str(trial)
        output.mkdir()
        child = start(lambda output=output: train(trainer_of(LONG), output))
        deadline = time.monotonic() + 60
        while not (output / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL, "the run had ended before it was killed"
        found = checkpoint.newest(output / "checkpoints")
        logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
        update = found[1]["update"] if found else 0
        whole = [line["update"] for line in logged] == list(range(1, len(logged) + 1)) and len(logged) >= update
        yield whole and (found is None or digest(found[1]) == unbroken.at(update))


def phases_of(trials: int, chance: random.Random) -> Iterator[tuple[str, int]]:
    """(phase, update) of each trial: every phase equally often."""
    for trial in range(trials):
        yield PHASES[trial % len(PHASES)], chance.randint(2, 5)


@contextlib.contextmanager
def entering(trainer, phase: str, update: int, event: Callable[[], None]):
    """`event` happens once, when the trainer enters the phase for the first time at that update or later."""
    whole, fired = getattr(trainer, phase), []

    def entered(*arguments, **named):
        if not fired and trainer.update >= update:
            fired.append(trainer.update)
            event()
        return whole(*arguments, **named)

    with mock.patch.object(trainer, phase, entered):
        yield fired
    assert fired, f"{phase} was not entered"


def stops(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """SIGTERM in each phase: the update is finished and saved, and the run that goes on is the unbroken one, to the bit."""
    options = (*SEVERAL, "--updates", "12")
    unbroken = Unbroken(options)
    for trial, (phase, update) in enumerate(phases_of(trials, chance)):
        output = folder / str(trial)
        output.mkdir()
        told = (*options, *(("--save-every", "1") if phase == "save" else ()))

        def broken(output=output, told=told, phase=phase, update=update):
            trainer = trainer_of(told)
            with entering(trainer, phase, update, lambda: os.kill(os.getpid(), signal.SIGTERM)), open(os.devnull, "w") as nowhere:
                sys.stdout = nowhere
                config = SimpleNamespace(updates=12, sample_every=0)
                return int(run.train(SimpleNamespace(trainer=trainer, config=config), output, []))  # 0: it was stopped

        stopped = ended(start(broken)) == 0
        found = checkpoint.newest(output / "checkpoints")
        trainer = trainer_of(options)
        trainer.load_state(found[1])
        at = trainer.update
        while trainer.update < 12:
            trainer.step()
        yield stopped and update < at + 1 <= 12 and digest(trainer.state()) == unbroken.at(12)


def full_disks(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """A save that may not write past so many bytes: the error names path and bytes, the earlier checkpoint is whole and alone."""
    for trial in range(trials):
        output, limit = folder / str(trial), chance.randint(200, 8000)

        def save(output=output, limit=limit):
            trainer = trainer_of(SEVERAL)
            trainer.step()
            trainer.save(output)
            trainer.step()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                trainer.save(output)
            except OSError as error:
                named = error.errno == errno.EFBIG and "step-00000002" in str(error.filename) and "bytes" in str(error)
                return 0 if named else 1
            return 2  # it did not fire

        code = ended(start(save))
        assert code in (0, 1), "the disk was not full"
        left = [path.name for path in (output / "checkpoints").iterdir()]
        yield code == 0 and left == ["step-00000001"] and checkpoint.newest(output / "checkpoints")[1]["update"] == 1


def truncations(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """A file of a checkpoint cut at a random byte: refused, and the earlier one is found."""
    yield from damaged(trials, folder, lambda data: data[: chance.randrange(len(data))], (*checkpoint.FILES, "manifest.json"))


def flips(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """One bit of a checkpoint's tensors or numbers turned: refused, and the earlier one is found."""

    def flipped(data):
        place = chance.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]

    yield from damaged(trials, folder, flipped, checkpoint.FILES)


def damaged(trials: int, folder: Path, change: Callable[[bytes], bytes], files: tuple[str, ...]) -> Iterator[bool]:
    trainer = trainer_of(SEVERAL)
    for _ in range(2):
        trainer.step()
        trainer.save(folder)
    older, newest = checkpoint.checkpoints(folder / "checkpoints")
    for trial in range(trials):
        path = newest / files[trial % len(files)]
        data = path.read_bytes()
        path.write_bytes(change(data))
        assert path.read_bytes() != data
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found, state = checkpoint.newest(folder / "checkpoints")
        yield found == older and state["update"] == 1 and path.name in str(said[0].message)
        path.write_bytes(data)


def not_numbers(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """NaN in networks, directions, losses and gradients: the run stops before anything is updated with it, naming what and when."""
    names = (
        "student",
        "teacher",
        "fake",
        "direction of dm",
        "direction of redness",
        "student's gradient",
        "gradient of dm's own",
        "loss of dm's own",
    )
    for trial in range(trials):
        name, update = names[trial % len(names)], chance.randint(0, 3)
        trainer = trainer_of(("--reward.redness", "0.3"))
        for _ in range(update):
            trainer.step()
        own = {"student": trainer.parameters, "fake": trainer.terms["dm"].parameters}
        own["teacher"] = dict(trainer.counted["teacher"].named_parameters())
        trained = "fake" if "own" in name else "student"
        with contextlib.ExitStack() as stack:
            if name in own:
                next(iter(own[name].values())).data.view(-1)[0] = math.nan
            elif name.startswith("direction"):
                poison(stack, trainer.terms[name.split()[-1]])
            elif name.startswith("loss"):
                reward = trainer.terms["dm"].reward
                stack.enter_context(
                    mock.patch.object(reward, "loss", lambda sample, whole=reward.loss, **drawn: whole(sample, **drawn) * math.nan)
                )
            else:
                parameter = next(iter(own[trained].values()))
                stack.callback(parameter.register_hook(lambda gradient: gradient * math.nan).remove)
            try:
                while trainer.update < update + 4:
                    before = [p.detach().clone() for p in own[trained].values()]
                    stops_at = trainer.update
                    trainer.step()
            except FloatingPointError as error:
                named = name.split("'")[0] in str(error) or name.split()[0] in str(error)
                named &= f"at update {stops_at}" in str(error)
            else:
                raise AssertionError(f"NaN in {name} was never met")
        kept = [torch.equal(p.detach().view(torch.int32), q.view(torch.int32)) for p, q in zip(own[trained].values(), before, strict=True)]
        yield named and all(kept)


def poison(stack: contextlib.ExitStack, term) -> None:
    whole = term.reward

    class Poisoned:
        def __call__(self, sample):
            signal = whole(sample)
            return signal._replace(direction=signal.direction * math.nan)

        def __getattr__(self, name):
            return getattr(whole, name)

    term.reward = Poisoned()
    stack.callback(setattr, term, "reward", whole)


def out_of_memory(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """Memory that runs out in each phase: one line says what takes less of it, and the last checkpoint is whole."""
    unbroken = Unbroken(LONG)
    for trial, (phase, update) in enumerate(phases_of(trials, chance)):
        output = folder / str(trial)
        output.mkdir()

        def run_out():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")

        def command(arguments, output=output, phase=phase, update=update, run_out=run_out):
            trainer = trainer_of(LONG)
            with entering(trainer, phase, update, run_out):
                train(trainer, output)

        said = io.StringIO()
        with mock.patch.object(cli, "distill_command", command), contextlib.redirect_stderr(said):
            code = cli.main(["distill"])
        _, state = checkpoint.newest(output / "checkpoints")
        explained = code == 1 and "--memory.micro-groups 1" in said.getvalue() and len(said.getvalue().splitlines()) == 1
        yield explained and digest(state) == unbroken.at(state["update"])


def alarmed(trainer: Run, updates: int) -> tuple[int, str]:
    """(updates until the first alarm, what it says); (updates, "") without one."""
    for update in range(1, updates + 1):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.step()
        if said:
            return update, str(said[0].message)
    return updates, ""


def say(delays: list[int]) -> None:
    print(f"  updates until {len(delays)} alarms: {min(delays)} to {max(delays)}, median {statistics.median(delays):g}")


def fakes_that_stay(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """The fake stops learning at a random update: the alarm names it."""
    delays = []
    for trial in range(trials):
        trainer, before = Run(trial), chance.randint(0, 30)
        clean = alarmed(trainer, before)[1] == ""
        trainer.known()  # what it knows from now on
        trainer.follows = False
        delay, told = alarmed(trainer, 60)
        delays.append(delay)
        yield clean and "the fake of 'dm'" in told
    say(delays)


def rates_too_large(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """The student learns a hundred times too fast: the alarm tells that it has left what the teacher knows, or it comes back by itself."""
    delays = []
    for trial in range(trials):
        trainer = Run(trial, lr=10.0)
        delay, told = alarmed(trainer, 60)
        delays += [delay] if told else []
        yield "times as large as what the teacher sees" in told or 0.5 <= trainer.step()["dm/inflation"] <= 1.5
    say(delays)


def bad_prompts(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """A prompt file with one defect: refused, with the file and the line."""
    defects = {
        "not UTF-8": lambda: bytes([chance.randint(0x80, 0xBF)]),
        "NUL": lambda: b"\0",
        "characters": lambda: b"x" * chance.randint(2001, 100_000),
    }
    for trial in range(trials):
        lines = [
            " ".join(chance.choices(("a", "cat", "sat", "naïve", "猫"), k=chance.randint(1, 9))).encode()
            for _ in range(chance.randint(1, 40))
        ]
        place, (words, defect) = chance.randrange(len(lines)), chance.choice(list(defects.items()))
        at = chance.randint(0, len(lines[place].decode()))
        lines[place] = lines[place].decode()[:at].encode() + defect() + lines[place].decode()[at:].encode()
        path = folder / f"{trial}.txt"
        path.write_bytes(chance.choice((b"", b"\xef\xbb\xbf")) + chance.choice((b"\n", b"\r\n")).join(lines))
        try:
            prompts.read(path)
        except prompts.BadPrompts as error:
            yield f"{path}, line {place + 1}: " in str(error) and words in str(error)
        else:
            yield False


def leaves(plain: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in plain.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]


def bad_configs(trials: int, chance: random.Random, folder: Path) -> Iterator[bool]:
    """A recipe with a key misspelt or a value of another type: refused, with the key."""
    whole = flags.as_plain(Config())
    places = [path for path in leaves(whole) if path[0] not in ("reward", "via", "scorer", "judge")]
    for trial in range(trials):
        path = chance.choice(places)
        plain = json.loads(json.dumps(whole))
        inside = plain
        for key in path[:-1]:
            inside = inside[key]
        if trial % 2:
            place = chance.randrange(len(path[-1]))
            wrong = path[-1][:place] + path[-1][place + 1 :] + "q"
            inside[wrong] = inside.pop(path[-1])
        else:
            wrong = path[-1]
            inside[wrong] = {"of": {"another": "type"}}
        file = folder / f"{trial}.yaml"
        file.write_text(yaml.safe_dump(plain))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                flags.parse_config([str(file)])
        except UserError as error:
            survived = wrong in str(error)
            if not survived:
                print(f"{'.'.join(path)} -> {wrong}: {error}")
            yield survived
        else:
            print(f"{'.'.join(path)} -> {wrong} was taken")
            yield False


FAULTS = (
    Fault(
        "killed at a random moment", "the newest checkpoint is that of the unbroken run, to the bit; every logged line is whole", kills, 200
    ),
    Fault(
        "SIGTERM in each phase of an update",
        "the update is finished and saved; the run that goes on ends as the unbroken one, to the bit",
        stops,
        64,
    ),
    Fault(
        "out of memory in each phase", "one line says what takes less; the newest checkpoint is that of the unbroken run", out_of_memory, 64
    ),
    Fault("disk full during a save", "path and bytes are named; the earlier checkpoint is whole, nothing else is left", full_disks, 100),
    Fault("a checkpoint's file cut", "refused by name; the earlier checkpoint is found", truncations, 1000),
    Fault("a checkpoint's bit turned", "refused by name; the earlier checkpoint is found", flips, 1000),
    Fault(
        "NaN in a network, direction, loss or gradient",
        "the run stops before that network is updated, naming what and when",
        not_numbers,
        64,
    ),
    Fault("a fake that stops learning", "an alarm names it within 60 updates; there was none before", fakes_that_stay, 64),
    Fault("a student's learning rate times 100", "an alarm within 60 updates, or the student comes back by itself", rates_too_large, 64),
    Fault("a prompt file with a defect", "refused, with file and line", bad_prompts, 300),
    Fault("a config with a defect", "refused, with the key", bad_configs, 200),
)


def campaign(faults: tuple[Fault, ...], trials: int | None) -> list[tuple[Fault, int, int]]:
    """(fault, tried, survived) of each."""
    rows = []
    for fault in faults:
        with tempfile.TemporaryDirectory() as folder:
            found = list(fault.inject(trials or fault.trials, random.Random(fault.what), Path(folder)))
        rows.append((fault, len(found), sum(found)))
        print(f"{fault.what}: {sum(found)} of {len(found)} survived", flush=True)
    return rows


def as_markdown(rows: list[tuple[Fault, int, int]]) -> str:
    lines = ["| fault | tried | survived | what that is |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {fault.what} | {tried} | {survived} | {fault.held} |" for fault, tried, survived in rows)])


TEXT = """# Faults

What a run meets, injected in numbers, and what held. Made by `python tests/faults.py`, which asserts of every fault that it fired; its run
is a real `Trainer` on networks of a few numbers, with two rewards, an adaptive weight, policy gradients and both kinds of reuse; of
the [alarms](rewards.md#alarms) it is one on a Gaussian teacher.

{table}

A kill at every single call of a save into the file system is in `tests/test_checkpoint.py`; a reward's server that fails in every way of a
list, or is stopped, in `tests/test_remote.py` ([rewards](rewards.md)); processes of one run that fail or are stopped in
`tests/test_processes.py`; an export that a full disk or a kill ends in `tests/test_export.py`.
Of a run's folder `tests/test_cli.py` has a disk that is full when it goes on, a second run there, another teacher in its own's place and
an `--overwrite` of what the new run reads or of another program's folder; `tests/test_hub.py` a hub that has moved on or is out of reach.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=None, help="of each fault (default: as in the table; then docs/faults.md is written)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = campaign(FAULTS, options.trials)
    if options.trials is None:
        DOCS.write_text(TEXT.format(table=as_markdown(rows)))
    return int(any(tried != survived for _, tried, survived in rows))


if __name__ == "__main__":
    sys.exit(main())
