"""Time and peak memory of a student update and a fake update, by family and mode, beside a plain reference in the same run.

    python bench/step.py                                            # everything this machine can run
    python bench/step.py --family sd3.5-medium --mode lora --repeat 5 --output step.json

Ours is the trainer that `fewstep distill` builds, on random weights of the real size made from configuration (1024 x 1024 pixels)
when there is a GPU, else on the embedded world and on reduced networks. The reference is bench/reference.py. On a GPU each is measured
in a process of its own, ours in all its modes, then the reference, since both do not fit; on a CPU both processes live at once and take
turns cycle by cycle, so that a busy machine slows both alike, and the processor time of each is given too, which others' work changes
less. A cycle is a rollout of ours and all the updates it feeds; times are medians over cycles after a warm-up. Conditions are random
numbers (the world: read from the cache), so no text encoder is in the times; nothing is decoded, for there is no reward beside R_dm.

Peak memory: on a GPU torch.cuda.max_memory_allocated, the networks included; on a CPU (Linux) the peak of the process's resident
memory above what it was before the networks were made. FLOPs are model FLOPs: of forward and of backward passes, counted apart by torch
on the meta device, times the passes that each trainer's denoisers counted; what checkpointing computes again is not in them.

Modes: `full` trains all weights, `lora` adapters; `-u4` uses a rollout four times, `-u2m2` a rollout and an evaluation twice. The
reference has none of that, so in every mode it is the same. Flags of `fewstep distill` after `--` are for both, in so far as the
reference has what they set: it is never compiled.

    python bench/step.py --family flux.1-dev --mode lora -- --compile true --memory.checkpointing false --groups 1
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

# -- what is measured: flags of `fewstep distill` ----------------------------------------------------------------------

REUSE = {"": [], "-u4": ["--reuse.rollout", "4"], "-u2m2": ["--reuse.rollout", "2", "--reuse.evaluation", "2"]}  # the last as gndm-is
CHECKPOINTING = ["--memory.checkpointing", "true"]
SMALL = ["--groups", "2", '--size=["256x256"]']
# device -> family -> (modes, flags of all of them)
CASES = {
    "cuda": {
        # a batch passes in one part, large enough that the GPU computes for longer than it takes to launch what it computes
        "sdxl": (["lora", "lora-u4", "full"], ["--groups", "8", *CHECKPOINTING]),
        "sd3.5-medium": (["lora", "lora-u4", "full"], ["--groups", "4", *CHECKPOINTING]),
        "flux.1-dev": (["lora", "lora-u4"], ["--groups", "2", *CHECKPOINTING]),
    },
    "cpu": {
        "world": (["full", "full-u4", "full-u2m2", "lora", "lora-u4"], []),
        "sdxl": (["full", "lora", "lora-u4"], SMALL),
        "sd3.5-medium": (["full", "lora", "lora-u4"], SMALL),
        "flux.1-dev": (["lora", "lora-u4"], SMALL),
    },
}
WEIGHTS = {
    "cuda": {
        "lora": ["--lora-rank", "64"],
        "full": ["--memory.optimizer", "adamw8bit"],
    },  # with AdamW, full weights fill more than the card
    "cpu": {"lora": ["--lora-rank", "8"], "full": []},
}
MODES = [weights + reuse for weights in ("full", "lora") for reuse in REUSE]
EXTRA: list[str] = []  # flags of this call, after the family's own and the mode's
WARM_UP = 2  # cycles; the second rollout is the first whose lag is measured, the next LAG_EVERY later: the first that are timed have none

# floating-point operations a second of dense bf16 matrix products, by a part of the device's name, from the makers' data sheets
PEAK = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def parts_of(mode: str) -> tuple[str, str]:
    """(what is trained, what is reused)"""
    weights, dash, reuse = mode.partition("-")
    return weights, dash + reuse


def flags(device: str, family: str, mode: str) -> list[str]:
    weights, reuse = parts_of(mode)
    return [*CASES[device][family][1], *WEIGHTS[device][weights], *REUSE[reuse], "--device", device, *EXTRA]


# -- the two systems ---------------------------------------------------------------------------------------------------


def teacher(family: str, device: str, dtype: Any, *, reduced: bool) -> Any:
    """The family's adapter: the embedded world as it ships, or random weights of the real or of the reduced size."""
    import networks

    from fewstep import models, world

    if family == "world":
        return models.load(str(world.TEACHER), device=device, dtype=dtype)
    return networks.backbone(family, reduced=reduced, device=device, dtype=dtype)


def of_optimizer(optimizer: Any) -> list[Any]:
    import torch

    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


class Ours:
    """The trainer that `fewstep distill` would build."""

    def __init__(self, family: str, options: list[str]):
        import torch

        from fewstep import composition, models, world
        from fewstep.flags import parse_config

        config = parse_config(options)
        prompts = world.prompts("train")

        def load(source: str, *, device: str, dtype: torch.dtype) -> Any:
            return teacher(family, device, dtype, reduced=device != "cuda")

        with mock.patch.object(models, "load", load if family != "world" else models.load):
            self.run = composition.build(config, prompts, str(world.TEACHER))
        self.config, self.trainer = self.run.config, self.run.trainer
        self.denoisers = dict(zip(("teacher", "student", "fake"), self.run.roles, strict=False))

    def warm_up(self, meter: Meter) -> None:
        for _ in range(WARM_UP):
            self.cycle(meter)

    def set_reuse(self, reuse: str) -> None:
        """Between two cycles: the next rollout is reused in another way."""
        from fewstep.flags import parse_config

        self.config.reuse = self.trainer.config.reuse = parse_config(REUSE[reuse]).reuse
        self.trainer.fed = self.config.reuse.rollout  # the last rollout has served

    def cycle(self, meter: Meter) -> tuple[int, int]:
        """A rollout and all the updates it feeds; returns (student updates, fake updates)."""
        trainer, reuse = self.trainer, self.config.reuse
        online, updates = trainer.online_updates, reuse.rollout * reuse.evaluation
        fakes = 0

        def measured(rollout: Any, times: int) -> Any:
            nonlocal fakes
            fakes += times * self.config.fake.updates
            with meter.phase("fake"):
                return online(rollout, times)

        with mock.patch.object(trainer, "online_updates", measured), meter.phase("student"):
            for _ in range(updates):
                trainer.step()
        return updates, fakes

    def state(self) -> list[Any]:
        """What lies in memory between cycles beside the networks."""
        held = [value for optimizer in (self.trainer.optimizer, *self.trainer.online.values()) for value in of_optimizer(optimizer)]
        return [*held, *self.trainer.ema.shadow_params]


class Plain:
    """The reference on the same networks: bench/reference.py."""

    def __init__(self, family: str, options: list[str]):
        import torch
        from reference import Reference, copies

        from fewstep import composition, models, world
        from fewstep.flags import parse_config
        from fewstep.prompts import Batches

        self.config = config = composition.resolve_hardware(parse_config(options))
        torch.manual_seed(config.seed)
        backbone = teacher(family, config.device, models.frozen_dtype(config), reduced=config.device != "cuda")
        prompts = world.prompts("train")
        backbone.prepare(prompts)
        roles = copies(backbone, lora_rank=config.lora_rank, checkpointing=config.memory.checkpointing, guidance=config.matching.guidance)
        self.reference = Reference(
            roles, backbone.schedule(), backbone.times(config.steps), Batches(prompts, config.groups, config.group_size, seed=config.seed),
            encode=backbone.encode, latent_shape=backbone.latent_shape(config.sizes()[0]), config=config,
            guidance=config.matching.guidance if backbone.embedded_guidance is None else 1.0,
        )  # fmt: skip
        self.denoisers = dict(zip(("teacher", "student", "fake"), roles, strict=False))

    def warm_up(self, meter: Meter) -> None:
        for _ in range(WARM_UP):
            self.cycle(meter)
        self.reference.deck.clear()  # what is measured starts with whole rounds of the steps

    def cycle(self, meter: Meter) -> tuple[int, int]:
        """As many updates of either kind as ours makes in a cycle."""
        updates = self.config.reuse.rollout * self.config.reuse.evaluation
        fakes = self.config.fake.updates
        for _ in range(updates):
            with meter.phase("student"):
                made = self.reference.student_update()
            with meter.phase("fake"):
                for i in range(fakes):
                    self.reference.fake_update(made if i == 0 else None)
        return updates, updates * fakes

    def state(self) -> list[Any]:
        return [*of_optimizer(self.reference.student_optimizer), *of_optimizer(self.reference.fake_optimizer)]


SYSTEMS = {"ours": Ours, "reference": Plain}

# -- time and memory ---------------------------------------------------------------------------------------------------


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(what))


class Meter:
    """Seconds and peak bytes by phase; an inner phase is not part of the one around it."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.base = 0 if self.cuda else resident("VmRSS")
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.open: list[str] = []
        self.mark()

    def mark(self) -> float:
        """Now, with everything before it done; the peak counts from here."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to VmRSS
        self.since = time.perf_counter()
        return self.since

    def book(self) -> None:
        """What has passed since the last mark belongs to the innermost open phase."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            bytes_now = torch.cuda.max_memory_allocated()
        else:
            bytes_now = resident("VmHWM") - self.base
        if self.open:
            name, passed = self.open[-1], time.perf_counter() - self.since
            self.seconds[name] = self.seconds.get(name, 0.0) + passed
            self.peak[name] = max(self.peak.get(name, 0), bytes_now)
        self.mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.book()
        self.open.append(name)
        try:
            yield
        finally:
            self.book()
            self.open.pop()


def passes(denoisers: dict[str, Any]) -> dict[str, list[int]]:
    return {role: [denoiser.forwards, denoiser.backwards] for role, denoiser in denoisers.items()}


def measured_peak(device: str, precision: str) -> float:
    """Floating-point operations a second of the fastest of five products of two large matrices."""
    import torch

    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def known_peak(name: str) -> float | None:
    return next((flops for part, flops in PEAK.items() if part in name), None)


# -- one process -------------------------------------------------------------------------------------------------------


def served(task: dict[str, Any]) -> Generator[dict[str, Any], str | None, None]:
    """Builds and warms up one system and says so, then of every cycle what it took; sent how a rollout is reused, it changes that."""
    import torch

    from fewstep import models

    models.quiet_libraries()
    for module in ("networks", "reference", "fewstep.cli"):  # what is imported does not count as what is measured
        importlib.import_module(module)
    device = task["device"]
    try:
        meter = Meter(device)
        system = SYSTEMS[task["system"]](task["family"], task["options"])
        system.warm_up(meter)
        precision = system.config.precision
        asked = yield {"precision": precision, "threads": torch.get_num_threads(), "peak_flops": measured_peak(device, precision)}
        while True:
            if asked == KERNELS:
                asked = yield {"kernels": kernels_of(lambda: system.cycle(meter))}
                continue
            if asked is not None:
                system.set_reuse(asked)
            before = passes(system.denoisers)
            meter.restart()
            began = time.process_time()
            updates, fakes = system.cycle(meter)
            processor = time.process_time() - began
            after = passes(system.denoisers)
            counted = {role: [b - a for a, b in zip(before[role], after[role], strict=True)] for role in after}
            asked = yield {
                "updates": updates, "fake_updates": fakes, "seconds": meter.seconds, "processor": processor, "peak": meter.peak,
                "passes": counted,
            }  # fmt: skip
    except torch.OutOfMemoryError as error:
        yield {"out_of_memory": str(error).splitlines()[0]}


KERNELS = "kernels"  # what a worker is asked for where the device time of a cycle is to be listed


def kernels_of(cycle: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """(name, seconds on the GPU, calls) of the kernels of a cycle, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        cycle()
        torch.cuda.synchronize()
    events = [(event.key, event.self_device_time_total / 1e6, event.count) for event in found.key_averages()]
    return sorted(events, key=lambda event: -event[1])


def worker(task: dict[str, Any]) -> None:
    """Answers with a line of JSON when ready, and to every line of its input with what a cycle took."""
    answers = served(task)
    said = next(answers)
    while True:
        print(json.dumps(said), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        try:
            said = answers.send(json.loads(line))
        except StopIteration:  # it ran out of memory and has said so
            return


class Process:
    """A worker, built and warmed up; `ask` it for a cycle. Raises RuntimeError with what it said when it ends too soon."""

    def __init__(self, task: dict[str, Any]):
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed on exit)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True)
        self.ready = self.listen()

    def listen(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.complaints.seek(0)
            raise RuntimeError(f"a worker ended with exit code {code}:\n{self.complaints.read()[-4000:]}")
        return json.loads(line)

    def ask(self, reuse: str | None = None) -> dict[str, Any]:
        """What a cycle took. reuse: how its rollout is used, as the end of a mode says; None: as the last was."""
        if "out_of_memory" in self.ready:
            return self.ready
        self.process.stdin.write(json.dumps(reuse) + "\n")
        self.process.stdin.flush()
        said = self.listen()
        if "out_of_memory" in said:
            self.ready = said
        return said

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.complaints.close()


# -- one case ----------------------------------------------------------------------------------------------------------


Flops = dict[str, tuple[int, int]]  # role -> of a forward pass of one sample, and of its backward pass


@functools.cache
def flops_of_passes(family: str, device: str, mode: str) -> Flops:
    """Role -> (forward, backward) floating-point operations of one sample at the size of a device, for the parameters that are trained."""
    import networks
    import torch

    from fewstep.cost import flops_both_ways
    from fewstep.flags import parse_config

    config = parse_config(flags(device, family, mode))
    made = networks.with_random_conditions(teacher(family, "meta", torch.float32, reduced=device != "cuda"), 2)
    roles = made.roles(lora_rank=config.lora_rank)
    x, t = torch.zeros(1, *made.latent_shape(config.sizes()[0]), device="meta"), torch.zeros(1, device="meta")
    given = (x, t, made.encode([""]))
    return {
        name: flops_both_ways(getattr(roles, name).network, given, trained=name != "teacher") for name in ("teacher", "student", "fake")
    }


def summary(cycles: list[dict[str, Any]], unit: Flops, real: Flops | None, batch: int) -> dict[str, Any]:
    """Medians over cycles, for one student update and its share of the fake's; passes and `real_flops` (of a pass at the real size) are
    of one sample of the batch."""
    failed = [cycle["out_of_memory"] for cycle in cycles if "out_of_memory" in cycle]
    if failed:
        return {"out_of_memory": failed[0]}
    updates = cycles[0]["updates"]
    each = [sum(cycle["seconds"].values()) / updates for cycle in cycles]
    processor = [cycle["processor"] / updates for cycle in cycles]
    per_sample = len(cycles) * updates * batch
    counted = {role: [sum(cycle["passes"][role][i] for cycle in cycles) / per_sample for i in (0, 1)] for role in unit}

    def cost(of_a_pass: Flops) -> float:
        return sum(n * each for role in counted for n, each in zip(counted[role], of_a_pass[role], strict=True))

    return {
        "seconds": statistics.median(each),
        "seconds_of_cycles": each,
        "processor_seconds": statistics.median(processor),
        "processor_seconds_of_cycles": processor,
        "student_seconds": statistics.median(cycle["seconds"]["student"] / updates for cycle in cycles),
        "fake_seconds": statistics.median(cycle["seconds"]["fake"] / cycle["fake_updates"] for cycle in cycles),
        "peak_bytes": {name: max(cycle["peak"][name] for cycle in cycles) for name in ("student", "fake")},
        "passes": counted,
        "flops": batch * cost(unit),
        **({"real_flops": cost(real)} if real else {}),
    }


Cycles = list[dict[str, Any]]


def tasks_of(device: str, family: str, mode: str) -> dict[str, dict[str, Any]]:
    return {name: {"system": name, "family": family, "options": flags(device, family, mode), "device": device} for name in SYSTEMS}


def take_turns(device: str, family: str, mode: str, repeat: int) -> tuple[dict[str, Cycles], dict[str, Any]]:
    """(cycles of either system, turn by turn, what the workers said of themselves)."""
    cycles: dict[str, Cycles] = {name: [] for name in SYSTEMS}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Process(task)) for name, task in tasks_of(device, family, mode).items()}
        for _ in range(repeat):
            for name, process in processes.items():
                cycles[name].append(process.ask())
        return cycles, max((process.ready for process in processes.values()), key=lambda ready: ready.get("peak_flops", 0.0))


def one_after_the_other(device: str, family: str, modes: list[str], repeat: int) -> tuple[dict[str, Cycles], Cycles, dict[str, Any]]:
    """(ours by mode, the reference's, what ours said of itself), for modes that train the same weights: ours makes `repeat`
    updates or more of each, and so does the reference, which is the same in all of them. On a GPU ours says which
    kernels a cycle of the first mode runs."""
    ours: dict[str, Cycles] = {}
    first, *_ = modes
    tasks = tasks_of(device, family, first)
    with Process(tasks["ours"]) as process:
        ready = process.ready
        for mode in modes:
            ours[mode] = cycles_of(lambda mode=mode: said(f"{family} {mode}", process.ask(parts_of(mode)[1])), repeat)
            if device == "cuda" and mode == first and "out_of_memory" not in process.ready:
                ready = ready | process.ask(KERNELS)
                for name, seconds, calls in ready["kernels"][:12]:  # a machine's time may end before the reference has had its turn
                    print(f"  {seconds:7.3f} s {calls:6} x {name[:100]}", file=sys.stderr, flush=True)
    with Process(tasks["reference"]) as process:
        reference = cycles_of(lambda: said(f"{family} reference", process.ask()), repeat)
    return ours, reference, ready


def cycles_of(ask: Callable[[], dict[str, Any]], repeat: int) -> Cycles:
    """Cycles that make `repeat` updates together, or more; one that ran out of memory is the last."""
    found: Cycles = []
    while sum(cycle.get("updates", repeat) for cycle in found) < repeat:
        found.append(ask())
    return found


def said(what: str, cycle: dict[str, Any]) -> dict[str, Any]:
    """The cycle, with a line about it."""
    found = cycle.get("out_of_memory") or f"{sum(cycle['seconds'].values()) / cycle['updates']:.2f} s an update, {cycle['peak']}"
    print(f"{what}: {found}", file=sys.stderr, flush=True)
    return cycle


def measured(device: str, family: str, modes: list[str], repeat: int) -> Iterator[dict[str, Any]]:
    """A row for each mode."""
    if device != "cuda":
        for mode in modes:
            cycles, ready = take_turns(device, family, mode, repeat)
            real = flops_of_passes(family, "cuda", mode) if family in CASES["cuda"] else None
            yield measure(family, mode, cycles, ready, flags(device, family, mode), flops_of_passes(family, device, mode), real)
        return
    for weights in dict.fromkeys(parts_of(mode)[0] for mode in modes):
        own = [mode for mode in modes if parts_of(mode)[0] == weights]
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # counts while the GPU is at work
            unit = pool.submit(flops_of_passes, family, device, weights)
            ours, reference, ready = one_after_the_other(device, family, own, repeat)
            for mode, cycles in ours.items():
                yield measure(family, mode, {"ours": cycles, "reference": reference}, ready, flags(device, family, mode), unit.result())


def measure(
    family: str, mode: str, cycles: dict[str, Cycles], ready: dict[str, Any], options: list[str], unit: Flops, real: Flops | None = None
) -> dict[str, Any]:
    """One row: both systems, and what ours takes as a share of the reference. options: flags of `fewstep distill`; unit: operations of a
    pass of what was run; real: of the model's real size, where that is another."""
    import torch

    from fewstep.flags import parse_config

    config = parse_config(options)
    found = {name: summary(of_one, unit, real, config.groups * config.group_size) for name, of_one in cycles.items()}
    known = known_peak(torch.cuda.get_device_name()) if config.device == "cuda" else None
    peak = known or ready.get("peak_flops")
    for one in found.values():
        if "seconds" in one and peak:
            one["utilisation"] = one["flops"] / one["seconds"] / peak
    row = {
        "family": family,
        "mode": mode,
        "options": options,
        "precision": ready.get("precision"),
        "threads": ready.get("threads"),
        "flops_of_a_pass": unit,
        "flops_of_a_real_pass": real,
        "peak_flops": peak,
        "peak_flops_from": "data sheet" if known else "a product of large matrices, measured in this run",
        "peak_flops_measured": ready.get("peak_flops"),
        "kernels": ready.get("kernels", []),
        **found,
    }
    if all("seconds" in one for one in found.values()):
        shared = [key for key in ("seconds", "processor_seconds", "flops", "real_flops") if key in found["ours"]]
        row["ratio"] = {key: found["ours"][key] / found["reference"][key] for key in shared}
        row["ratio"]["peak_bytes"] = highest(found["ours"]) / highest(found["reference"])
        row["spread"] = {key: spread(*(found[name][f"{key}_of_cycles"] for name in SYSTEMS)) for key in ("seconds", "processor_seconds")}
    return row


def spread(ours: list[float], reference: list[float]) -> list[float]:
    """Least and most of the ratios: of turns where there are as many of either, of any two cycles where there are not."""
    pairs = zip(ours, reference, strict=True) if len(ours) == len(reference) else itertools.product(ours, reference)
    turns = [a / b for a, b in pairs]
    return [min(turns), max(turns)]


def highest(found: dict[str, Any]) -> int:
    return max(found["peak_bytes"].values())


# -- where the time goes -----------------------------------------------------------------------------------------------

STAGES = ("new_rollout", "encode", "lags", "evaluate", "student_update", "online_updates")  # of the trainer; some lie inside others


def profile(device: str, family: str, mode: str) -> str:
    """One cycle of ours under torch.profiler: the trainer's stages, and the operations that take the most time of their own."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    system = Ours(family, flags(device, family, mode))
    trainer, meter = system.trainer, Meter(device)
    system.warm_up(meter)

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in STAGES:
            stack.enter_context(mock.patch.object(trainer, name, named(f"[{name}]", getattr(trainer, name))))
        optimizers = {"student": trainer.optimizer, "ema": trainer.ema, **trainer.online}
        for name, optimizer in optimizers.items():
            stack.enter_context(mock.patch.object(optimizer, "step", named(f"[{name} step]", optimizer.step)))
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        with profiler(activities=activities) as found:
            system.cycle(meter)
    averages = found.key_averages()
    whole = f"{device}_time_total"
    stages = sorted((event for event in averages if event.key.startswith("[")), key=lambda event: -event.cpu_time_total)
    lines = [f"{event.key:30} {event.cpu_time_total / 1e6:8.3f} s {event.count:4} calls" for event in stages]
    return "\n".join([*lines, averages.table(sort_by=f"self_{whole}", row_limit=25, max_name_column_width=50)])


# -- what is printed ---------------------------------------------------------------------------------------------------

COLUMNS = ("family", "mode", "", "batch", "s / student update", "s / fake update", "s / both", "processor s / both",
           "peak, GB", "forward + backward", "TFLOP", "utilisation", "TFLOP, real sample")  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; of each case a line for either system and one for their ratio: of the times that of the medians, and in brackets the
    least and the most of any turn's."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        for name in SYSTEMS:
            lines.append("| " + " | ".join([row["family"], row["mode"], name, batch_of(row["options"]), *cells(row[name])]) + " |")
        if "ratio" in row:
            share = {"real_flops": ""} | {key: f"**{value:.2f}**" for key, value in row["ratio"].items()}
            for key, (low, high) in row["spread"].items():
                share[key] += f" ({low:.2f} - {high:.2f})"
            line = [
                row["family"],
                row["mode"],
                "ratio",
                "",
                "",
                "",
                share["seconds"],
                share["processor_seconds"],
                share["peak_bytes"],
                "",
                share["flops"],
                "",
                share["real_flops"],
            ]
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def cells(found: dict[str, Any]) -> list[str]:
    if "out_of_memory" in found:
        return ["", "", "", "", "out of memory", "", "", "", ""]
    forwards, backwards = (sum(counts[i] for counts in found["passes"].values()) for i in (0, 1))
    peaks = " / ".join(f"{found['peak_bytes'][name] / 1e9:.2f}" for name in ("student", "fake"))
    return [
        f"{found['student_seconds']:.3g}", f"{found['fake_seconds']:.3g}", f"{found['seconds']:.3g}",
        f"{found['processor_seconds']:.3g}", peaks,
        f"{forwards:.2f} + {backwards:.2f}", f"{found['flops'] / 1e12:.3g}", f"{found['utilisation']:.0%}",
        f"{found['real_flops'] / 1e12:.0f}" if "real_flops" in found else "",
    ]  # fmt: skip


def batch_of(options: list[str]) -> str:
    """Samples an update, and in what parts they pass."""
    from fewstep.flags import parse_config

    config = parse_config(options)
    size = config.groups * config.group_size
    part = config.memory.micro_groups * config.group_size or size
    return f"{size}" + (f" in parts of {part}" if part < size else "") + (", checkpointing" if config.memory.checkpointing else "")


def machine(device: str) -> dict[str, str]:
    import torch

    from fewstep.compare.cells import commit
    from fewstep.evaluate.protocol import device_name

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "device": device_name(device),
        "processor": processor or platform.machine(),
        "torch": torch.__version__,
        "commit": commit(),
        **{name: version(name) for name in ("diffusers", "peft")},
    }


def main(arguments: list[str] | None = None) -> int:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=[*CASES[device]], default=[*CASES[device]], help="which networks; default: all")
    parser.add_argument("--mode", nargs="+", choices=MODES, help="what is trained and what is reused; default: the family's own list")
    parser.add_argument("--repeat", type=int, default=4, help="cycles measured of either system after the warm-up (on a GPU: updates)")
    parser.add_argument("--output", type=Path, help="JSON file with every number, the machine and the versions")
    parser.add_argument("--profile", action="store_true", help="profile one cycle of ours instead, under torch.profiler")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="after --: flags of `fewstep distill`, for both systems")
    given = parser.parse_args(arguments)
    EXTRA[:] = given.flags
    if given.worker:
        worker(json.loads(given.worker))
        return 0
    rows = []
    for family in given.family:
        modes = given.mode or CASES[device][family][0]
        print(f"{family} {' '.join(modes)} ...", file=sys.stderr, flush=True)
        if given.profile:
            for mode in modes:
                print(profile(device, family, mode))
            continue
        for row in measured(device, family, modes, given.repeat):
            rows.append(row)
            report = {
                "machine": machine(device),
                "command": ["bench/step.py", *(sys.argv[1:] if arguments is None else arguments)],
                "rows": rows,
            }
            if given.output:  # after every case: what has been measured is kept
                given.output.write_text(json.dumps(report, indent=1) + "\n")
    if rows:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
