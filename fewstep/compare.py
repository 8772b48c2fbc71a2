"""`fewstep compare`: recipes x seeds on the embedded world at equal network evaluations, as one table.

A cell is one recipe with one seed: trained until its networks have been evaluated `evaluations` times (a backward counts as two
forwards), then measured. Every finished cell is a file; a run that goes on makes only those that are missing.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fewstep import disk, world
from fewstep.errors import UserError
from fewstep.evaluate import drawing, protocol, samples, store, tables
from fewstep.evaluate.measure import measure as metrics_of
from fewstep.rewards.serve import end_with_parent
from fewstep.weights import Adaptive, mean_rate

REFERENCE_SEED = 10_000  # of the teacher's sample that distances are taken to; cells draw with their own seeds
METRICS = ("fd_clip_data", "fd_clip_teacher", "clip", "clip-heldout", "preference", "utility", "precision", "recall", "diversity")
DISTANCES = ("fd_clip_data", "fd_clip_teacher")
COSTS = ("network_evaluations", "seconds_per_image")  # of drawing a picture
MAIN_SEEDS, OTHER_SEEDS = 5, 3
TRACED = ("/score", "/lag", "/ess", "/cosine", "/fake_error", "/inflation")  # of what an update logs, what a cell keeps
# fields that came after the first cells: in a stamp when not as they are by default
LATER = ("init", "size", "memory", "compile", "dry_run", "judge", "remote", "matching.level_density", "matching.shift")
NETWORKS = ("student", "teacher", "fake")  # one evaluation of each costs the same: the budget of a cell


class Row(NamedTuple):
    """One line of the table."""

    name: str
    flags: tuple[str, ...]  # as `fewstep distill` takes them
    baseline: str | None = None  # the row it is paired with over seeds
    seeds: int = OTHER_SEEDS
    cost: float = 1.0  # multiple of the plan's network evaluations
    marks: int = 0  # measurements along the training, evenly spread over its cost
    price: float = 0.0  # of a reward's pass, in network evaluations: what a reward far larger than the world's would cost


REWARDS = ("--reward.clip", "0.1", "--reward.preference", "0.1")
CONSTANT = ("--student.decay", "0", "--fake.decay", "0")
EXPENSIVE = ("gndm", "--reward.preference", "0.1")
ADAPTIVE = ("--weights.mode", "adaptive", "--weights.budget", "1.3", "--weights.eta", "0.2")
PRICE = 32.0  # one update of these: 1536 network evaluations, and 6144 for the reward's forward and backward on 64 pictures
TWO_UPDATES = ("--fake.updates=2", "--fake.lr=4e-4")
HALF_BATCH = ("--groups=16", "--student.lr=1.4e-4")
BACKWARD_HALF = ("gndm", "--reuse.backward-simulation", *HALF_BATCH)
THRICE = 7.8  # three times the default run's 305 updates of 1536 network evaluations, in cells of 180 thousand

ROWS = (
    Row("DMD", ("dmd",), None, MAIN_SEEDS),
    Row("GNDM", ("gndm",), "DMD", MAIN_SEEDS),
    Row("DMDR (sum)", ("dmdr",), "DMD", MAIN_SEEDS),
    Row("GNDMR adaptive", ("gndmr",), "GNDM", MAIN_SEEDS),
    Row("GNDMR-1", ("gndmr-1",), "DMDR (sum)"),  # both have the preference alone
    Row("GNDMR fixed", ("gndm", *REWARDS), "GNDM"),
    Row("DMD2", ("dmd2",), "DMD"),
    Row("GNDM, batch scale", ("gndm", "--matching.normalize", "batch"), "GNDM"),
    Row("GNDM, channel scale", ("gndm", "--matching.normalize", "channel"), "GNDM"),
    Row("GNDM, no scale", ("gndm", "--matching.normalize", "none"), "GNDM"),
    Row("GNDM, leave one out", ("gndm", "--matching.leave-one-out"), "GNDM"),
    Row("GNDM, gamma 0.5", ("gndm", "--matching.gamma", "0.5"), "GNDM"),
    Row("GNDM, gamma 1", ("gndm", "--matching.gamma", "1"), "GNDM"),
    Row("DMD, gamma 1", ("dmd", "--matching.gamma", "1"), "DMD"),
    Row("GNDM, unconditioned fake", ("gndm", "--fake.condition", "none"), "GNDM"),
    *(Row(f"GNDM, {steps} step{'s' * (steps > 1)}", ("gndm", f"--steps={steps}"), "GNDM") for steps in (1, 2, 8)),
    Row("GNDM, backward simulation", ("gndm", "--reuse.backward-simulation"), "GNDM"),
    Row("GNDM, rollout reuse 4", ("gndm", "--reuse.rollout", "4"), "GNDM"),
    Row("GNDM, rollout reuse 8", ("gndm", "--reuse.rollout", "8"), "GNDM"),
    Row("GNDM, evaluation reuse 2", ("gndm", "--reuse.evaluation", "2"), "GNDM"),
    Row("GNDM, evaluation reuse 4", ("gndm", "--reuse.evaluation", "4"), "GNDM"),
    Row("GNDM, evaluation reuse 4, unweighted", ("gndm", "--reuse.evaluation", "4", "--reuse.weighted", "false"), "GNDM"),
    Row("GNDM-IS", ("gndm-is",), "GNDM"),
    Row("GNDMR-IS", ("gndmr-is",), "GNDMR adaptive"),
    Row("GNDMR fixed, evaluation reuse 4", ("gndm", *REWARDS, "--reuse.evaluation", "4"), "GNDMR fixed"),
    Row("GNDMR, expensive reward", EXPENSIVE, None, cost=2.0, price=PRICE),
    *(
        Row(
            f"GNDMR, expensive reward, evaluation reuse 4{what}",
            (*EXPENSIVE, "--reuse.evaluation", "4", *flags),
            "GNDMR, expensive reward",
            cost=2.0,
            price=PRICE,
        )
        for what, flags in (("", ()), (", unweighted", ("--reuse.weighted", "false")))
    ),
    Row("GNDM, half the cost", ("gndm",), "GNDM, backward simulation", cost=0.5),
    Row("GNDM, half the batch, half the cost", ("gndm", *HALF_BATCH, *TWO_UPDATES), "GNDM, backward simulation", cost=0.5),
    Row("GNDM, backward simulation, half the batch, half the cost", BACKWARD_HALF, "GNDM, backward simulation", cost=0.5),
    Row("GNDM, rollout reuse 4, half the cost", ("gndm", "--reuse.rollout", "4"), "GNDM, backward simulation", cost=0.5),
    *(
        Row(f"GNDMR adaptive, {' and '.join(rewards)}", ("gndm", *ADAPTIVE, *(f"--reward.{name}=1" for name in rewards)), None, cost=2.0)
        for rewards in (("clip",), ("preference",), ("clip", "preference"), ("discriminator",), ("colourfulness",))
    ),
    Row("GNDM, constant rates, thrice as long", ("gndm", *CONSTANT), None, 1, cost=THRICE, marks=12),
    Row("DMD, constant rates, thrice as long", ("dmd", *CONSTANT), None, 1, cost=THRICE, marks=12),
    # rates: each method's best of the grid by FD to data
    Row("DMD, guidance 1", ("dmd", "--matching.guidance", "1", "--student.lr", "2e-4"), None, MAIN_SEEDS),
    Row("GNDM, guidance 1", ("gndm", "--matching.guidance", "1", "--student.lr", "1e-4"), "DMD, guidance 1", MAIN_SEEDS),
)
# the same forces for both: a raw gradient of the preference has an RMS of about 1/60 when a run begins; twice the table's training,
# for at once the table's no student is nearer to the teacher than the best four-step solver, and every hypervolume is 0
PARETO = tuple(
    Row(f"{method} {weight:g}", (*flags, f"--reward.preference={weight:g}"), None, 2, cost=2.0)
    for method, flags, weights in (
        ("GNDMR, preference", ("gndm",), (0.02, 0.05, 0.1, 0.2, 0.4)),
        ("DMDR, preference", ("dmd", "--weights.mode", "sum"), (1.2, 3, 6, 12, 24)),
    )
    for weight in weights
)
# where the settings of DMD, GNDM, backward simulation and of GNDM at half its cost were chosen: on seeds below 100
GRID = (
    *(
        Row(
            f"{recipe.upper()}, guidance {guidance:g}, rate {rate:g}, gamma {gamma:g}",
            (recipe, f"--matching.guidance={guidance:g}", f"--student.lr={rate:g}", f"--matching.gamma={gamma:g}"),
            None,
            1,
        )
        for guidance in (2.5, 1)
        for rate in (2e-4, 4e-4, 1e-4)
        for gamma in (0, 1)
        for recipe in ("dmd", "gndm")
    ),
    *(
        Row(f"GNDM, backward simulation, {n} fake updates", ("gndm", "--reuse.backward-simulation", f"--fake.updates={n}"), None, 1)
        for n in (1, 2, 4, 8)
    ),
    *(
        Row(f"GNDM, half the cost, {what}", ("gndm", *flags), None, cost=0.5)
        for what, flags in (
            ("four fake updates", ()),
            ("two fake updates", TWO_UPDATES),
            ("two fake updates, rollout reuse 2", (*TWO_UPDATES, "--reuse.rollout=2")),
            ("half the batch", HALF_BATCH),
            ("half the batch, two fake updates", (*HALF_BATCH, *TWO_UPDATES)),
        )
    ),
)
EVERY_ROW = {row.name: row for row in (*ROWS, *PARETO, *GRID)}
UNGUIDED = 1.0


class TeacherRow(NamedTuple):
    steps: int
    guidance: float
    solver: str | None = None  # its own when None


TEACHER_ROWS = {
    "teacher, 28 steps": TeacherRow(world.TEACHER_STEPS, world.TEACHER_GUIDANCE),
    **{f"teacher, 4 steps, {name}": TeacherRow(4, world.TEACHER_GUIDANCE, name) for name in drawing.SOLVERS},
    "teacher, 28 steps, guidance 1": TeacherRow(world.TEACHER_STEPS, UNGUIDED),
}
Cells = dict[tuple[str, int], dict[str, Any]]  # by row and seed


def colourfulness(images: Any, prompts: list[str]) -> Any:
    """A reward as users write their own: Hasler and Suesstrunk's measure, which needs no model and no prompt. (B, 3, H, W) -> (B,)."""
    from fewstep.world import utility

    return utility.colourfulness(images)


FUNCTIONS = {"colourfulness": colourfulness}  # rewards that are no scorer of the world, by the name that rows weigh them under


def functions_of(config: Any) -> dict[str, Callable[..., Any]]:
    """Those of FUNCTIONS that a row's config weighs."""
    return {name: function for name, function in FUNCTIONS.items() if name in config.reward}


@dataclass(frozen=True)
class Plan:
    """How every cell is made and measured."""

    output: Path
    evaluations: int
    images_per_prompt: int
    prompts: int  # of the held-out prompts, how many are drawn
    threads: int
    judge_updates: int = 3000  # at most, of the fresh fake that judges an adaptive weight's budget
    device: str = "cpu"
    options: tuple[str, ...] = ()  # flags that every cell gets, after its row's own


def cell_path(plan: Plan, row: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in row.lower())
    return plan.output / "cells" / f"{name}-seed{seed}.json"


def commit() -> str:
    """The commit this code is at, with + when the working tree differs; the version where there is no repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {protocol.version('fewstep')}"


@functools.cache
def instruments(plan: Plan) -> tuple[list[str], dict[str, Any], Any]:
    """(held-out prompts, scorers by name, features of real pictures); read once a process."""
    from safetensors.torch import load_file

    data = load_file(world.ASSETS / "features.safetensors")["heldout"].float()
    return world.prompts("evaluate")[: plan.prompts], world.load_scorers(device=plan.device), data


def observe_pipeline(plan: Plan, pipe: Any, *, steps: int, guidance: float, seed: int) -> dict[str, Any]:
    """Features and utility of a pipeline's pictures of every held-out prompt, and its seconds per image."""
    from fewstep.world.utility import gold_utility

    prompts, scorers, _ = instruments(plan)
    sampling = {"steps": steps, "guidance": guidance, "seed": seed, "batch": drawing.BATCH}
    return samples.observe_sample(
        pipe.to(plan.device), prompts, plan.images_per_prompt, scorers, gold_utility, device=plan.device, **sampling
    )


def target_guidance(row: str, config: Any | None) -> float:
    """Guidance of the teacher's sample that a row is compared with: a student of the unguided teacher should equal the unguided one.

    config: of the row's training; None for a teacher's row.
    """
    if config is None:
        return TEACHER_ROWS[row].guidance
    return UNGUIDED if config.matching.guidance == UNGUIDED else world.TEACHER_GUIDANCE


def reference(plan: Plan, guidance: float) -> Any:
    """FD-clip features of the teacher's 28-step sample that cells are compared to; drawn once and kept."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from fewstep.evaluate.features import scaled

    # a sample of another size or of other prompts would make a distance that looks like any other
    made = {"prompts": store.sha256(world.prompts("evaluate")[: plan.prompts]), "n": str(plan.prompts * plan.images_per_prompt)}
    path = plan.output / ("reference.safetensors" if guidance == world.TEACHER_GUIDANCE else f"reference-guidance-{guidance:g}.safetensors")
    kept = None
    if path.is_file():
        with safe_open(path, "pt") as file:
            kept = file.metadata()
    if kept != made:
        pipe = drawing.open_pipeline(world.TEACHER, plan.device)
        observed = observe_pipeline(plan, pipe, steps=world.TEACHER_STEPS, guidance=guidance, seed=REFERENCE_SEED)
        features = scaled(observed["features/clip-heldout"]).contiguous()
        disk.replace(path, lambda temporary: save_file({"features": features}, temporary, metadata=made))
    return load_file(path)["features"]


def measure(plan: Plan, observed: dict[str, Any], target: float) -> dict[str, float]:
    """Every metric of the table as one number; the interval comes from the seeds."""
    import torch

    prompts, scorers, data = instruments(plan)
    group = torch.arange(len(prompts)).repeat_interleave(plan.images_per_prompt)

    found = metrics_of(
        observed,
        prompts,
        group,
        scorers,
        extractor="clip-heldout",
        data=data,
        teacher=reference(plan, target),
        neighbours=world.NEIGHBOURS,
        draws=2,
    )
    values = {name: entry["value"] for name, entry in found.items()}
    return values | {"seconds_per_image": float(observed["seconds"].median())}


def run_teacher_cell(plan: Plan, row: TeacherRow, seed: int) -> dict[str, Any]:
    pipe = drawing.open_pipeline(world.TEACHER, plan.device)
    if row.solver:
        pipe.scheduler = drawing.solver(row.solver, pipe.scheduler.config)
    observed = observe_pipeline(plan, pipe, steps=row.steps, guidance=row.guidance, seed=seed)
    return {
        "metrics": measure(plan, observed, row.guidance) | {"network_evaluations": drawing.network_evaluations(row.steps, row.guidance)}
    }


def run_cell(plan: Plan, row: Row, seed: int) -> dict[str, Any]:
    """Train one recipe with one seed up to the budget and measure its averaged student."""
    import torch

    from fewstep import composition

    config = cell_config(plan, row, seed)
    target = target_guidance(row.name, config)
    run = composition.build(config, world.prompts("train"), str(world.TEACHER), functions_of(config))
    trainer, began, logs = run.trainer, time.perf_counter(), {}
    trace = []
    total = round(plan.evaluations * row.cost)
    prices = dict.fromkeys(NETWORKS, 1.0) | dict.fromkeys(config.reward, row.price)
    spent: Callable[[], float] = lambda: sum(price * trainer.counted[name].cost for name, price in prices.items() if price)  # noqa: E731
    trainer.progress = lambda: min(spent() / total, 1.0)  # a cell ends by its network evaluations, and so does its decay
    along: list[dict[str, float]] = []
    measuring = 0.0  # seconds
    while spent() < total:
        logs = trainer.step()
        trace.append({key: value for key, value in logs.items() if key.startswith("weights/") or key.endswith(TRACED)})
        if spent() * row.marks >= total * (len(along) + 1):
            paused = time.perf_counter()
            along.append(mark(plan, run, seed, target) | {"update": trainer.update, "evaluations": spent()})
            measuring += time.perf_counter() - paused
    training_seconds = time.perf_counter() - began - measuring
    costs = {name: counted.cost for name, counted in trainer.counted.items()}
    unit = flops_of_a_pass(run)
    judged = {}
    if config.weights.mode == "adaptive":
        judged = {"judge": judged_kl(run, plan.judge_updates)}
    pipe = run.backbone.student_pipeline(run.roles, trainer.averaged(), config.steps)
    with torch.no_grad():
        observed = observe_pipeline(plan, pipe, steps=config.steps, guidance=UNGUIDED, seed=seed)
    return {
        "metrics": measure(plan, observed, target) | {"network_evaluations": float(config.steps)},
        "updates": trainer.update,
        "costs": costs,
        "flops": {name: cost * unit[name] for name, cost in costs.items()},
        "fd_clip_teacher_per_step": fd_per_step(plan, run, seed, target),
        "training_seconds": training_seconds,
        "trace": trace,
        **({"along": along} if along else {}),
        **judged,
    }


def mark(plan: Plan, run: Any, seed: int, target: float) -> dict[str, float]:
    """The averaged student's distances in the middle of its training, which goes on as if nothing had been measured."""
    import torch

    pipe = run.backbone.student_pipeline(run.roles, run.trainer.averaged(), run.config.steps)
    with drawing.kept_random_state(torch.device(run.config.device)):
        found = measure(plan, observe_pipeline(plan, pipe, steps=run.config.steps, guidance=UNGUIDED, seed=seed), target)
    return {key: found[key] for key in DISTANCES}


MARKS_OF_DRIFT = 6


class Drift(NamedTuple):
    """Whether a distance climbs again at the end of a run."""

    minimum: float  # of the running mean over three marks
    last_third: float  # mean over the last third of the marks
    standard_error: float  # of that mean, over its marks


def drift(along: list[float]) -> Drift:
    """How the last third of the marks compares with the smoothed minimum. Raises ValueError with fewer than MARKS_OF_DRIFT."""
    import numpy as np

    if len(along) < MARKS_OF_DRIFT:
        raise ValueError(f"drift needs at least {MARKS_OF_DRIFT} measurements, two in the last third; got {len(along)}")
    smooth, last = np.convolve(along, np.ones(3) / 3, "valid"), along[-(len(along) // 3) :]
    return Drift(float(smooth.min()), float(np.mean(last)), float(np.std(last, ddof=1) / len(last) ** 0.5))


class Settled(NamedTuple):
    """The last quarter of a run with an adaptive weight."""

    kl_over_budget: float  # mean; the goal is 0.9 to 1.1
    weight: float  # mean of the total weight
    at_cap: float  # share of the updates with the weight at its cap


def settled(trace: list[dict[str, float]]) -> Settled:
    """Where the fidelity budget (7) and its weight stood over the last quarter of the updates that evaluated R_dm after the warm-up.

    The weight follows running means. Here the KL is the scores of that quarter themselves plus the running lag: the running mean of the
    scores is some twenty updates old, and where the KL still rises it says where it was before the quarter began.
    """
    heard, mean, count = [], 0.0, 0
    for logs in trace:
        if "weights/kl" not in logs:
            continue
        kl = -logs["dm/score"]
        mean, count = mean + mean_rate(count, Adaptive.decay) * (kl - mean), count + 1
        if "weights/budget" in logs:
            lag = logs["weights/kl"] - mean
            heard.append(((kl + lag) / logs["weights/budget"], logs["weights/weight"], logs["weights/weight_at_cap"]))
    if not heard:
        raise ValueError("no update came after the warm-up, so that no budget was set")
    last = heard[-max(len(heard) // 4, 1) :]
    return Settled(*(sum(column) / len(last) for column in zip(*last, strict=True)))


def flops_of_a_pass(run: Any) -> dict[str, int]:
    """Floating-point operations of one forward pass of one sample through each part that a run counts."""
    import torch

    from fewstep.cost import flops
    from fewstep.types import Sample

    trainer, prompt = run.trainer, ["a cat"]
    latent = torch.zeros(1, *trainer.latent_shapes[0], device=trainer.device)
    one, k = latent.new_full((1,), 0.5), torch.zeros(1, dtype=torch.long, device=trainer.device)
    cond = trainer.encode(prompt) | {"step": k}
    picture = run.backbone.decode(latent).detach()
    seen = Sample(picture, one, cond, prompt, k, k=k, decode=lambda x: x)  # a reward sees a picture; decoding it is counted apart
    calls = {name: lambda name=name: getattr(run.roles, name).network(latent, one * 999, cond) for name in NETWORKS}
    calls["decoder"] = lambda: run.backbone.decode(latent)
    for name, counted in trainer.counted.items():
        if name not in calls:
            calls[name] = lambda counted=counted: counted.function(seen)
    return {name: flops(call) for name, call in calls.items()}


def judged_kl(run: Any, most: int) -> dict[str, Any]:
    """The KL of the run's student as it stands, by the run's fake and by a fresh one trained on it alone, beside the budget.

    most: updates of the fresh one.
    """
    from fewstep.evaluate.judge import judge

    trainer, config, left = run.trainer, run.config, []

    def draw() -> Any:
        """A fresh batch; a rollout serves as many batches as it has steps."""
        if not left:
            rollout = trainer.new_rollout()
            left.extend([rollout] * trainer.student.steps)
        rollout = left.pop()
        return trainer.sample_of(rollout, trainer.online_step(rollout))

    matching = trainer.terms["dm"].reward
    fake = run.backbone.roles(fake_steps=config.steps if matching.step_condition else 0).fake
    verdict = judge(matching, fake, draw, most=most, lr=config.fake.lr, precision=trainer.precision)
    return verdict._asdict() | {
        "budget": trainer.weights.b,
        "kl_of_run": trainer.weights.kl,
        "lag_of_run": trainer.weights.lag,
    }


def fd_per_step(plan: Plan, run: Any, seed: int, target: float) -> list[float]:
    """FD-clip to the teacher of the averaged student's prediction x0_k at each of its K steps, on the table's prompts (method, section 6).

    Puts the averaged weights into the trainer's student: for after the training.
    """
    import torch

    from fewstep.evaluate.distances import frechet
    from fewstep.evaluate.features import scaled
    from fewstep.rewards.clip import CLIPScore

    trainer, batch = run.trainer, 16
    scorer = CLIPScore.load(world.ASSETS / "clip-heldout", device=trainer.device)
    rows = [prompt for prompt in world.prompts("evaluate")[: plan.prompts] for _ in range(plan.images_per_prompt)]
    features: list[list[torch.Tensor]] = [[] for _ in range(trainer.student.steps)]
    with torch.no_grad():
        for name, value in trainer.averaged().items():
            trainer.parameters[name].copy_(value)
        for start in range(0, len(rows), batch):
            chunk, generator = rows[start : start + batch], torch.Generator(trainer.device).manual_seed(seed * 100_003 + start)
            noise = torch.randn(len(chunk), *trainer.latent_shapes[0], generator=generator, device=trainer.device)
            rollout = trainer.student.rollout(noise, trainer.encode(chunk), generator=generator)
            for k, x0 in enumerate(rollout.x0):
                features[k].append(scorer.image_features(trainer.decode(x0)).cpu())
    teacher = reference(plan, target)
    return [float(frechet(scaled(torch.cat(of_step)), teacher)) for of_step in features]


@functools.cache
def row_config(plan: Plan, row: Row) -> Any:
    """The config of a row's cells but for their seed: parsed once, for a table of some hundred cells."""
    from fewstep import composition, flags

    # the number of updates bounds nothing here: a cell ends by its network evaluations
    config = flags.parse_config([*row.flags, *plan.options, "--updates", "1000000", "--output", str(plan.output / "none")])
    return composition.resolve_hardware(replace(config, device=plan.device, memory=replace(config.memory, frozen="fp32")))


def cell_config(plan: Plan, row: Row, seed: int) -> Any:
    return replace(row_config(plan, row), seed=seed)


def config_of(plan: Plan, row: str, seed: int) -> Any | None:
    """Of a student's training; a teacher's row has none."""
    return None if row in TEACHER_ROWS else cell_config(plan, EVERY_ROW[row], seed)


def stamp_of(plan: Plan, row: str, seed: int) -> dict[str, Any]:
    """What a cell's numbers were made with; a kept cell with another stamp is not used."""
    from fewstep import composition, flags
    from fewstep.config import Config

    config, student = config_of(plan, row, seed), EVERY_ROW.get(row)
    recipe = "teacher"
    if config is not None:
        # the machine and its arithmetic are no setting: they are kept beside the cell (`machine`)
        anywhere = {"output": "", "device": "cpu", "precision": "bf16"}
        plain, untouched = (flags.as_plain(at) | anywhere for at in (config, composition.resolve_hardware(Config(device="cpu"))))
        for key in LATER:
            *sections, last = key.split(".")
            inside, default = functools.reduce(lambda at, section: (at[0][section], at[1][section]), sections, (plain, untouched))
            if inside[last] == default[last]:
                del inside[last]
        recipe = store.sha256(plain)
    return {
        "config": recipe,
        "prompts": store.sha256(world.prompts("evaluate")[: plan.prompts]),
        "n": plan.prompts * plan.images_per_prompt,
        "seed": seed,
        "reference_seed": REFERENCE_SEED,
        "evaluations": round(plan.evaluations * student.cost) if student else None,
        **({"price": student.price} if student and student.price else {}),
        "target_guidance": target_guidance(row, config),
    }


def kept(plan: Plan) -> Cells:
    """The folder's cells of known rows that were made in this way; says of every other that it is not used."""
    cells: Cells = {}
    for path in sorted(plan.output.glob("cells/*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        row, seed = cell["row"], cell["seed"]
        known = row in EVERY_ROW or row in TEACHER_ROWS
        if known and cell["stamp"] == stamp_of(plan, row, seed):
            cells[row, seed] = cell
        else:
            print(f"{path.name}: {'made with other settings' if known else 'of no row that is known'}, not used")
    return cells


def make_cell(plan: Plan, row: str, seed: int) -> dict[str, Any]:
    """Make and keep one cell; runs in a process of its own."""
    import torch

    from fewstep import models

    torch.set_num_threads(plan.threads)
    models.quiet_libraries()
    cell = run_teacher_cell(plan, TEACHER_ROWS[row], seed) if row in TEACHER_ROWS else run_cell(plan, EVERY_ROW[row], seed)
    cell |= {"row": row, "seed": seed, "stamp": stamp_of(plan, row, seed), "commit": commit(), "machine": machine(plan, row, seed)}
    disk.replace_text(cell_path(plan, row, seed), json.dumps(cell, indent=1))
    return cell


def machine(plan: Plan, row: str, seed: int) -> str:
    """What a cell is made on: the processor, the arithmetic of a student's training, and the libraries."""
    config = config_of(plan, row, seed)
    where = f"{platform.machine()}, {plan.threads} threads" if plan.device == "cpu" else protocol.device_name(plan.device)
    parts = [where, *([config.precision] if config else []), *(f"{name} {protocol.version(name)}" for name in ("torch", "diffusers"))]
    return ", ".join(parts)


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """(mean, half width of its t-interval); NaN half width for a single value."""
    import numpy as np
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def summarise(cells: Cells) -> list[dict[str, Any]]:
    """Rows of the table in its order: mean and half width of each metric over seeds, and paired differences to the row's baseline."""
    out = []
    for name in [*TEACHER_ROWS, *EVERY_ROW]:
        own = {seed: cell for (row, seed), cell in sorted(cells.items()) if row == name}
        if not own:
            continue
        baseline = EVERY_ROW[name].baseline if name in EVERY_ROW else None
        other = {seed: cell for (row, seed), cell in cells.items() if row == baseline}
        of_seeds, first = list(own.values()), next(iter(own.values()))
        metrics = {key: interval([cell["metrics"][key] for cell in of_seeds]) for key in first["metrics"]}
        entry: dict[str, Any] = {"row": name, "seeds": list(own), "metrics": metrics, "baseline": baseline, "paired": {}}
        for what in ("machine", "commit"):
            entry[f"{what}s"] = dict(Counter(cell[what] for cell in of_seeds))
        if "updates" in first:
            entry["updates"] = interval([cell["updates"] for cell in of_seeds])[0]
            entry["training_seconds"] = interval([cell["training_seconds"] for cell in of_seeds])[0]
            entry["flops"] = interval([float(sum(cell["flops"].values())) for cell in of_seeds])[0]
        if "judge" in first and all(cell["judge"]["budget"] for cell in of_seeds):  # else a training ended within its warm-up
            stood = [settled(cell["trace"])._asdict() for cell in of_seeds]
            entry["settled"] = {key: interval([each[key] for each in stood]) for key in Settled._fields}
            judges = [cell["judge"] for cell in of_seeds]
            entry["settled"]["fresh_over_budget"] = interval([judge["fresh"] / judge["budget"] for judge in judges])
            entry["settled"]["gap_over_budget"] = interval([judge["gap"] / judge["budget"] for judge in judges])
            entry["settled"]["judge_updates"] = interval([judge["updates"] for judge in judges])
            # the first cells' fresh fakes had a fixed number of updates at a rate that fell to zero, which tells nothing
            entry["settled"]["judges_converged"] = interval([float(judge.get("converged", False)) for judge in judges])
        if len(first.get("along", ())) >= MARKS_OF_DRIFT:
            entry["drift"] = {
                key: {seed: drift([at[key] for at in cell["along"]])._asdict() for seed, cell in own.items()} for key in DISTANCES
            }
        shared = [seed for seed in own if seed in other]
        if shared:
            entry["paired"] = {
                key: interval([own[seed]["metrics"][key] - other[seed]["metrics"][key] for seed in shared]) for key in METRICS
            }
        out.append(entry)
    return out


COMMIT = re.compile(r"^([0-9a-f]{7})[0-9a-f]{33}")  # shortened as Git does


def number(mean: float, half: float) -> str:
    digits = 3 if abs(mean) < 10 else 1
    return f"{mean:.{digits}f}" + ("" if half != half else f" ± {half:.{digits}f}")


def made(summary: list[dict[str, Any]], what: str) -> str:
    """How many cells are of each machine or commit, most first."""
    of_each = sum((Counter(entry[what]) for entry in summary), Counter())
    shortened = ((COMMIT.sub(r"\1", name), count) for name, count in of_each.most_common())
    return "; ".join(f"{name} ({count} cell{'s' if count > 1 else ''})" for name, count in shortened)


def markdown(summary: list[dict[str, Any]], plan: Plan) -> str:
    """The table as Markdown, with what it was made with."""
    heads = [
        "",
        "seeds",
        "updates",
        "TFLOP",
        *[tables.LABELS[key].strip() for key in METRICS],
        *[tables.LABELS[key] for key in COSTS],
        "difference to",
        "FD to data",
        "FD to teacher",
    ]
    body = []
    for entry in summary:
        paired = [number(*entry["paired"][key]) if entry["paired"] else "" for key in DISTANCES]
        cells = [number(*entry["metrics"][key]) for key in METRICS]
        cells += [f"{entry['metrics']['network_evaluations'][0]:g}", number(*entry["metrics"]["seconds_per_image"])]
        updates = f"{entry['updates']:.0f}" if "updates" in entry else ""
        cost = f"{entry['flops'] / 1e12:.1f}" if "flops" in entry else ""
        body.append([entry["row"], str(len(entry["seeds"])), updates, cost, *cells, entry["baseline"] if entry["paired"] else "", *paired])
    n = plan.prompts * plan.images_per_prompt
    note = (
        f"Every student, where nothing else is said below: {plan.evaluations} network evaluations of training (a backward counts two), "
        f"measured on {n} pictures of held-out prompts. TFLOP: of the training, decoder and rewards with it. ± is half a 95% t-interval "
        "over seeds; differences are paired by seed. Seconds per image are those of the machine that made the cell. FD-clip is not an FID."
    )
    note += f"\n\nMade on: {made(summary, 'machines')}."
    note += f"\n\nMade at these commits, in which a row and its baseline may differ: {made(summary, 'commits')}."
    costs = {entry["row"]: EVERY_ROW[entry["row"]].cost for entry in summary if entry["row"] in EVERY_ROW}
    others = "; ".join(f"{row}: {round(plan.evaluations * cost)}" for row, cost in costs.items() if cost != 1)
    if others:
        note += f"\n\nNetwork evaluations of the others: {others}."
    for entry in summary:
        if "settled" in entry:
            kl, weight, gap, fresh = (
                number(*entry["settled"][key]) for key in ("kl_over_budget", "weight", "gap_over_budget", "fresh_over_budget")
            )
            note += (
                f"\n\n{entry['row']}: over the last quarter the KL is {kl} of its budget, the weight {weight}, at its cap in "
                f"{entry['settled']['at_cap'][0]:.0%} of the updates; of the finished student a fresh fake finds {fresh} of the "
                f"budget, {gap} more than the run's own fake, after {entry['settled']['judge_updates'][0]:.0f} updates; its KL is known "
                f"to have stopped rising in {entry['settled']['judges_converged'][0]:.0%} of the cells, and may be too low in the others."
            )
        for seed, found in entry.get("drift", {}).get("fd_clip_teacher", {}).items():
            note += (
                f"\n\n{entry['row']}, seed {seed}: FD to teacher has a smoothed minimum of {found['minimum']:.3f} along the training; the "
                f"last third is at {found['last_third']:.3f}, standard error {found['standard_error']:.3f}."
            )
    if any(EVERY_ROW[row].price for row in costs):
        note += (
            f"\n\nExpensive reward: in the budget a pass of it counts as {PRICE:g} network evaluations, as that of a far larger one would."
        )
    points = Counter(entry["row"].rpartition(" ")[0] for entry in summary)
    areas = "; ".join(f"{method} {area:.4g} ({points[method]} weights)" for method, area in fronts(summary).items())
    if areas:
        note += (
            f"\n\nHypervolume of preference against FD to teacher, from the best few-step teacher's distance and the "
            f"{drawing.TEACHER_STEPS}-step teacher's preference: {areas}."
        )
    return f"{tables.markdown_table(heads, body)}\n\n{note}\n"


def hypervolume(points: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area dominated by points (lower, higher) is better, inside the reference (FD, preference)."""
    inside = sorted((x, y) for x, y in points if x < reference[0] and y > reference[1])
    area, height = 0.0, reference[1]
    for i, (x, y) in enumerate(inside):
        height = max(height, y)
        end = inside[i + 1][0] if i + 1 < len(inside) else reference[0]
        area += (end - x) * (height - reference[1])
    return area


def fronts(summary: list[dict[str, Any]]) -> dict[str, float]:
    """Hypervolume of each Pareto method's mean points (FD to teacher, preference), against the best few-step teacher's distance and
    the many-step teacher's preference; empty without Pareto rows, and while one of the teacher's is missing."""
    by_row = {entry["row"]: entry["metrics"] for entry in summary}
    methods = dict.fromkeys(row.name.rpartition(" ")[0] for row in PARETO if row.name in by_row)
    guided = {name: row for name, row in TEACHER_ROWS.items() if row.guidance == world.TEACHER_GUIDANCE}
    if not methods or not guided.keys() <= by_row.keys():
        return {}
    few = [by_row[name]["fd_clip_teacher"][0] for name, row in guided.items() if row.solver]
    corner = min(few), by_row[f"teacher, {drawing.TEACHER_STEPS} steps"]["preference"][0]
    points = {
        method: [(m["fd_clip_teacher"][0], m["preference"][0]) for name, m in by_row.items() if name.startswith(f"{method} ")]
        for method in methods
    }
    return {method: hypervolume(at, corner) for method, at in points.items()}


def ticks(low: float, high: float) -> list[float]:
    """Of a log axis: 1, 2, 5 and their tens, with more between them where fewer than three of these lie on it."""
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [tick for power in range(-3, 4) for digit in digits if low <= (tick := digit * 10.0**power) <= high]
        if len(found) >= 3:
            break
    return found


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Distance to the teacher and to data, a row each, with intervals; on a log scale, since a student may have gone astray."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.34 * len(summary) + 1.4), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("fd_clip_teacher", "fd_clip_data"), strict=True):
        for i, entry in enumerate(summary):
            mean, half = entry["metrics"][key]
            teacher = entry["row"] in TEACHER_ROWS
            axis.errorbar(
                mean,
                i,
                xerr=None if half != half else half,
                fmt="s" if teacher else "o",
                color="#777777" if teacher else "#0072b2",
                capsize=3,
            )
        axis.set_yticks(range(len(summary)), [entry["row"] for entry in summary])
        axis.set_xlabel(tables.LABELS[key].replace("↓", "(lower is better)"))
        axis.set_xscale("log", nonpositive="clip")  # an interval may reach below zero
        means = [entry["metrics"][key][0] for entry in summary]
        low, high = 0.8 * min(means), 1.25 * max(means)
        axis.set_xticks(ticks(low, high), minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlim(low, high)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_ylim(len(summary) - 0.4, -0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_pareto(summary: list[dict[str, Any]], path: Path) -> None:
    """Preference against FD to teacher, one curve a method over its weight, the teacher beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    # each method's weights stand on its own side of its curve
    styles = {"GNDMR, preference": ("#0072b2", "o", (-6, 4), "right"), "DMDR, preference": ("#d55e00", "s", (6, -9), "left")}
    for method, (color, marker, offset, side) in styles.items():
        points = [entry for entry in summary if entry["row"].startswith(method + " ")]
        points.sort(key=lambda entry: float(entry["row"].rpartition(" ")[2]))
        if points:
            x, y = ([entry["metrics"][key][0] for entry in points] for key in ("fd_clip_teacher", "preference"))
            axis.plot(x, y, marker=marker, color=color, label=f"{method.partition(',')[0]}, over its weight")
            for entry, a, b in zip(points, x, y, strict=True):
                weight = entry["row"].rpartition(" ")[2]
                axis.annotate(weight, (a, b), textcoords="offset points", xytext=offset, ha=side, fontsize=8, color=color)
    for entry in summary:
        if entry["row"] in ("teacher, 28 steps", "GNDM", "DMD", "GNDMR adaptive"):
            a, b = entry["metrics"]["fd_clip_teacher"][0], entry["metrics"]["preference"][0]
            # the table's students were trained half as long as the fronts', which alone moves them as far as a reward does
            student = entry["row"] in EVERY_ROW
            axis.plot(a, b, marker="*", markersize=11, color="#333333", fillstyle="none" if student else "full", linestyle="none")
            label = f"{entry['row']}, half the training" if student else entry["row"]
            axis.annotate(label, (a, b), textcoords="offset points", xytext=(6, -10), fontsize=8)
    axis.set_xlabel("FD-clip to teacher (lower is better)")
    axis.set_ylabel("preference, trained on (higher is better)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


class CellsFailed(RuntimeError):
    """Which cells could not be made, and why."""


def begin_worker() -> None:
    """A process that makes cells ends with the one that started it, and at Ctrl-C, which a terminal sends to both, by itself."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as an exception it would cost its cell alone, and the next one would begin


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that make cells; what ends the block early ends them too, in the middle of a cell.

    Raises CellsFailed where one was killed.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=begin_worker)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            why = "a process was killed, as where memory runs out: try fewer --jobs. The finished cells are kept: the same call goes on"
            raise CellsFailed(why) from error
        raise
    pool.shutdown()


def compare(
    plan: Plan, rows: tuple[Row, ...], *, seeds: int | None, first_seed: int, jobs: int, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Make every missing cell, write compare.json and compare.md of all that the folder holds; returns the summary.

    seeds: of every row, instead of its own number. Rows come in the order given, a row's seeds one after the other.
    overwrite: a cell that was made with other settings is replaced; else raises UserError.
    Raises CellsFailed when any did, after the others have been made, and at once where a process was killed or the teacher's sample,
    which every cell is compared with, could not be drawn.
    """
    plan.output.mkdir(parents=True, exist_ok=True)
    teacher_seeds = range(first_seed, first_seed + (seeds or max(row.seeds for row in rows)))
    compared = {world.TEACHER_GUIDANCE, *(target_guidance(row.name, row_config(plan, row)) for row in rows)}
    wanted = [(name, seed) for name, row in TEACHER_ROWS.items() if row.guidance in compared for seed in teacher_seeds]
    wanted += [(row.name, seed) for row in rows for seed in range(first_seed, first_seed + (seeds or row.seeds))]
    cells, failed = kept(plan), {}
    missing = [key for key in wanted if key not in cells]
    replaced = [path.name for key in missing if (path := cell_path(plan, *key)).exists()]
    if replaced and not overwrite:
        raise UserError(
            f"--output: {plan.output} holds {len(replaced)} of the cells that are to be made, with other settings ({replaced[0]}); "
            "name another folder, or add --overwrite to make them anew"
        )
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are there; making {len(missing)}", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)  # of the processes started from here
    if missing:
        began = time.perf_counter()
        with workers(jobs) as pool:
            targets = sorted({target_guidance(row, config_of(plan, row, seed)) for row, seed in missing})
            draw_references(pool, plan, targets)
            pending = {pool.submit(make_cell, plan, *key): key for key in missing}
            for count, future in enumerate(as_completed(pending), 1):
                key, error = pending[future], future.exception()
                left = f"about {(time.perf_counter() - began) / count * (len(missing) - count) / 60:.0f} min left"
                if isinstance(error, BrokenProcessPool):
                    raise error
                if error:
                    failed[key] = error
                    print(f"{count}/{len(missing)}  {key[0]}, seed {key[1]}: FAILED, {error!r}; {left}", flush=True)
                    continue
                cells[key] = future.result()
                value = cells[key]["metrics"]["fd_clip_teacher"]
                print(f"{count}/{len(missing)}  {key[0]}, seed {key[1]}: FD to teacher {value:.3f}; {left}", flush=True)
                write(plan, cells)
    if failed:
        list_of = "\n".join(f"  {row}, seed {seed}: {error!r}" for (row, seed), error in failed.items())
        raise CellsFailed(
            f"{len(failed)} of {len(wanted)} cells failed; the others are kept, and a second call makes only these:\n{list_of}"
        )
    return write(plan, cells)


def draw_references(pool: Any, plan: Plan, targets: list[float]) -> None:
    """The teacher's samples, before the cells that are compared with them. Raises CellsFailed."""
    for drawn in [pool.submit(reference, plan, guidance) for guidance in targets]:
        try:
            drawn.result()
        except BrokenProcessPool:
            raise
        except Exception as error:
            raise CellsFailed(f"the teacher's sample, which cells are compared with, could not be drawn: {error!r}") from error


def write(plan: Plan, cells: Cells) -> list[dict[str, Any]]:
    summary = summarise(cells)
    report = {
        "evaluations": plan.evaluations,
        "n": plan.prompts * plan.images_per_prompt,
        "rows": summary,
        "hypervolume": fronts(summary),
        "cells": [{key: value for key, value in cell.items() if key != "trace"} for _, cell in sorted(cells.items())],
    }
    disk.replace_text(plan.output / "compare.json", json.dumps(report, indent=1))
    disk.replace_text(plan.output / "compare.md", markdown(summary, plan))
    return summary
