"""How one cell is made: the teacher drawn, or a student trained up to its budget, and either measured."""

from __future__ import annotations

import functools
import json
import shutil
import time
from typing import Any

from fewstep import disk, world
from fewstep.compare.cells import (
    REFERENCE_SEED,
    Plan,
    cell_path,
    commit,
    config_of,
    machine,
    stamp_of,
    student_digest,
    student_path,
    target_guidance,
)
from fewstep.compare.rows import BEGUN_FROM, DISTANCES, EVERY_ROW, TEACHER_ROWS, UNGUIDED, Row, TeacherRow, functions_of
from fewstep.evaluate import drawing, samples, store
from fewstep.evaluate.distances import FeatureSet
from fewstep.evaluate.features import Extractor
from fewstep.evaluate.measure import measure as metrics_of

TRACED = ("/score", "/lag", "/ess", "/cosine", "/fake_error", "/inflation")  # of what an update logs, what a cell keeps
JUDGE_RATE = 0.3  # of the run's own: a tenth is slow where a short run's fake knows little, the whole rate forgets at first
TOLD_EVERY = 600.0  # seconds, of how far a long cell has come
NETWORKS = ("student", "teacher", "fake")  # one evaluation of each costs the same: the budget of a cell


@functools.cache
def instruments(plan: Plan) -> tuple[list[str], dict[str, Any], FeatureSet]:
    """(held-out prompts, scorers by name, features of real pictures); read once a process."""
    from safetensors.torch import load_file

    data = FeatureSet(load_file(world.ASSETS / "features.safetensors")["heldout"].float())
    return world.prompts("evaluate")[: plan.prompts], world.load_scorers(device=plan.device), data


def observe_pipeline(plan: Plan, pipe: Any, *, steps: int, guidance: float, seed: int) -> dict[str, Any]:
    """Features and utility of a pipeline's pictures of every held-out prompt, and its seconds per image."""
    from fewstep.world.utility import gold_utility

    prompts, scorers, _ = instruments(plan)
    sampling = {"steps": steps, "guidance": guidance, "seed": seed, "batch": drawing.BATCH}
    return samples.observe_sample(
        pipe.to(plan.device), prompts, plan.images_per_prompt, scorers, gold_utility, device=plan.device, **sampling
    )


def reference(plan: Plan, guidance: float) -> Any:
    """FD-clip features of the teacher's 28-step sample that cells are compared to; drawn once and kept."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file

    from fewstep.evaluate.features import scaled

    # a sample of another size or of other prompts would make a distance that looks like any other
    made = {"prompts": store.sha256(world.prompts("evaluate")[: plan.prompts]), "n": str(plan.prompts * plan.images_per_prompt)}
    path = plan.output / ("reference.safetensors" if guidance == world.TEACHER_GUIDANCE else f"reference-guidance-{guidance:g}.safetensors")
    kept = None
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                kept = file.metadata()
        except SafetensorError as error:
            print(f"{path}: damaged ({error}), drawn again")
    if kept != made:
        pipe = drawing.open_pipeline(world.TEACHER, plan.device)
        observed = observe_pipeline(plan, pipe, steps=drawing.TEACHER_STEPS, guidance=guidance, seed=REFERENCE_SEED)
        features = scaled(observed["features/clip-heldout"]).contiguous()
        disk.replace(path, lambda temporary: save_file({"features": features}, temporary, metadata=made))
    return load_file(path)["features"]


def measure(plan: Plan, observed: dict[str, Any], target: float) -> dict[str, float]:
    """Every metric of the table as one number; the interval comes from the seeds."""
    prompts, scorers, data = instruments(plan)
    found = metrics_of(
        observed,
        prompts,
        plan.images_per_prompt,
        scorers,
        extractors=[Extractor("clip-heldout", "fd_clip")],
        data={"clip-heldout": data},
        teacher={"clip-heldout": FeatureSet(reference(plan, target))},
        neighbours=world.NEIGHBOURS,
        draws=2,
    )
    values = {name: entry["value"] for name, entry in found.metrics.items()}
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
    from fewstep.run import start_from

    config, target = config_of(plan, row, seed), target_guidance(plan, row)
    run = composition.build(config, world.prompts("train"), str(world.TEACHER), functions_of(config))
    if row.begins:
        start_from(run, student_path(plan, row.begins, seed))
    trainer, began, logs = run.trainer, time.perf_counter(), {}
    trace = []
    total = round(plan.evaluations * row.cost)
    prices = dict.fromkeys(NETWORKS, 1.0) | dict.fromkeys(config.reward, row.price)

    def spent() -> float:
        return sum(price * trainer.counted[name].cost for name, price in prices.items() if price)

    trainer.lag_every = 1  # as in the cells of before it was measured less often: at equal cost, equal updates
    trainer.progress = lambda: min(spent() / total, 1.0)  # a cell ends by its network evaluations, and so does its decay
    along: list[dict[str, float]] = []
    measuring, told = 0.0, began  # seconds
    while spent() < total:
        if time.perf_counter() - told >= TOLD_EVERY:
            told = time.perf_counter()
            print(f"  {row.name}, seed {seed}: {spent() / total:.0%} of its training", flush=True)
        logs = trainer.step()
        trace.append({key: value for key, value in logs.items() if key.startswith("weights/") or key.endswith(TRACED)})
        if spent() * row.marks >= total * (len(along) + 1):
            paused = time.perf_counter()
            along.append(mark(plan, run, seed, target) | {"update": trainer.update, "evaluations": spent()})
            measuring += time.perf_counter() - paused
    training_seconds = time.perf_counter() - began - measuring
    if row.name in BEGUN_FROM:
        left = student_path(plan, row.name, seed)
        shutil.rmtree(left, ignore_errors=True)  # of a cell that this one replaces
        trainer.save(left)
    costs = {name: counted.cost for name, counted in trainer.counted.items()}
    unit = flops_of_a_pass(run)
    judged = {"judge": judged_kl(run, plan.judge_updates)} if config.weights.mode == "adaptive" else {}
    pipe = run.backbone.student_pipeline(run.roles, trainer.averaged(), config.steps)
    with torch.no_grad():
        observed = observe_pipeline(plan, pipe, steps=config.steps, guidance=UNGUIDED, seed=seed)
    return {
        "metrics": measure(plan, observed, target) | {"network_evaluations": float(config.steps)},
        "updates": trainer.update,
        "costs": costs,
        "flops": {name: cost * unit[name] for name, cost in costs.items()},
        # what each step has learned is a question to a whole training, and the answer takes a fifth as long as a short one
        **(
            {"begun": student_digest(plan, row.begins, seed)}
            if row.begins
            else {"fd_clip_teacher_per_step": fd_per_step(plan, run, seed, target)}
        ),
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
    """The KL of the run's student as it stands, by the run's fake and by a copy of that trained on it alone, beside the budget.

    most: updates of the copy.
    """
    from fewstep.evaluate.fresh_fake import fresh_kl

    trainer, config, left = run.trainer, run.config, []

    def draw() -> Any:
        """A fresh batch; a rollout serves as many batches as it has steps."""
        if not left:
            rollout = trainer.new_rollout()
            left.extend([rollout] * trainer.student.steps)
        rollout = left.pop()
        return trainer.sample_of(rollout, trainer.online_step(rollout, trainer.terms["dm"].on))

    matching = trainer.terms["dm"].reward
    fake = run.backbone.roles(fake_steps=config.steps if matching.step_condition else 0).fake
    # from the teacher it would take longer than the run itself to find as much, and at the run's rate lose at first what this one knows
    fake.load_state_dict(matching.fake.state_dict())
    verdict = fresh_kl(matching, fake, draw, most=most, lr=JUDGE_RATE * config.fake.lr, precision=trainer.precision)
    return verdict._asdict() | {
        "budget": trainer.weights.b,
        "kl_of_run": trainer.weights.kl,
        "lag_of_run": trainer.weights.lag,
    }


def fd_per_step(plan: Plan, run: Any, seed: int, target: float) -> list[float]:
    """FD-clip to the teacher of the averaged student's prediction x0_k at each of its K steps, on the table's prompts.

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


def make_cell(plan: Plan, row: str, seed: int) -> dict[str, Any]:
    """Make and keep one cell; runs in a process of its own."""
    import torch

    torch.set_num_threads(plan.threads)
    cell = run_teacher_cell(plan, TEACHER_ROWS[row], seed) if row in TEACHER_ROWS else run_cell(plan, EVERY_ROW[row], seed)
    cell |= {"row": row, "seed": seed, "stamp": stamp_of(plan, row, seed), "commit": commit(), "machine": machine(plan, row)}
    disk.replace_text(cell_path(plan, row, seed), json.dumps(cell, indent=1))
    return cell
