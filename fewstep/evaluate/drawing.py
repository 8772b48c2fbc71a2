"""Pictures through a pipeline's own call: which noise a picture gets, what a call costs, which solvers a teacher has."""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from fewstep.errors import NumericalError

Noise = Literal["picture", "batch"]  # what has a generator of its own
TEACHER_STEPS = 28  # at which a teacher is shown and measured, in a run's pictures, an evaluation and the comparison alike
SOLVERS = {"DDIM": "DDIMScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler"}
BATCH = 16  # pictures drawn at a time; where noise is a batch's, it decides with the seed which picture gets which noise
NO_ONE_STEP = "its scheduler has no time for a single one (shift_terminal)"
GRID_BATCH = 4  # of a run's own grids, which are drawn beside all that the training holds


def resolution(pipe: Any) -> int:
    """Height and width in pixels of what the pipeline draws when not told."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    return int((getattr(pipe, "default_sample_size", None) or denoiser.config.sample_size) * pipe.vae_scale_factor)


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The generator of one batch, on the CPU: the same noise on every device."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def kept_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Within, torch's generators may be seeded and drawn from; after it they are as they were, of GPUs the given one's alone: unasked,
    torch keeps every GPU's, and warns where they are several."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def draw(pipe: Any, prompts: list[str], generators: torch.Generator | list[torch.Generator], **told: Any) -> tuple[Tensor, float]:
    """Pictures (B, 3, H, W) in [0, 1] on the CPU, and the seconds per image, through the pipeline's own call.

    generators: of the whole batch, or one a picture, whose noise is then its own whatever it is drawn with. told: a negative prompt
    in it is of every picture.
    Raises NumericalError for a picture with NaN or inf: as a file it would be black, and look like any other.
    """
    start = time.perf_counter()
    first = generators[0] if isinstance(generators, list) else generators
    if "negative_prompt" in told:  # not every stock pipeline takes one for all
        told["negative_prompt"] = [told["negative_prompt"]] * len(prompts)
    with kept_random_state(pipe.device), own_noise(pipe.scheduler, generators):
        torch.manual_seed(first.initial_seed())  # what a pipeline does not draw from its generator: the noise of flow schedulers
        images = pipe(prompt=prompts, generator=generators, output_type="pt", **told).images
    seconds = (time.perf_counter() - start) / len(prompts)
    images = images.float().cpu()
    broken = (~torch.isfinite(images)).flatten(1).any(1).nonzero()[:, 0].tolist()
    if broken:
        raise NumericalError(
            f"{len(broken)} of {len(prompts)} pictures hold NaN or inf, the first for the prompt {prompts[broken[0]]!r}: look at the "
            f"pipeline's weights ({type(pipe).__name__}), or draw in a number format of more range"
        )
    return images, seconds


@contextmanager
def own_noise(scheduler: Any, generators: torch.Generator | list[torch.Generator]) -> Iterator[None]:
    """Hands each picture's generator to a scheduler that draws noise in its steps, where its pipeline does not (flow)."""
    step = scheduler.step
    if not isinstance(generators, list) or "generator" not in inspect.signature(step).parameters:
        yield
        return
    scheduler.step = functools.wraps(step)(lambda *args, **kwargs: step(*args, **{"generator": generators} | kwargs))
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """A list that takes the number of samples of every call of the pipeline's network, for as long as this lasts."""
    calls: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(len(args[0] if args else next(iter(kwargs.values()))))

    network = getattr(pipe, "unet", None) or pipe.transformer
    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def batches(
    pipe: Any,
    prompts: list[str],
    images_per_prompt: int,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int,
    progress: str | None = None,
    call: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Tensor, float]]:
    """Pictures (B, 3, H, W) in [0, 1] on the CPU, batch by batch, each with its seconds per image.

    Encoding the prompts and decoding the latents are in the time. Picture i belongs to prompt i // images_per_prompt, and takes its
    noise from its batch's generator. progress: the bar's name (None: no bar). call: what the pipeline is told; without it guidance_scale
    alone, and with it `guidance` is not looked at.
    """
    pipe.set_progress_bar_config(disable=True)
    rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    told = {"guidance_scale": guidance} if call is None else call
    for index in track(range(-(-len(rows) // batch)), progress or "", disable=progress is None):
        chunk = rows[index * batch : (index + 1) * batch]
        yield draw(pipe, chunk, noise_generator(seed, index), num_inference_steps=steps, **told)


def generate(
    pipe: Any,
    prompts: list[str],
    images_per_prompt: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int,
    batch: int = BATCH,
) -> tuple[Tensor, float]:
    """All pictures (P * images_per_prompt, 3, H, W) in [0, 1], and the median over batches of the seconds per image."""
    drawn = list(batches(pipe, prompts, images_per_prompt, steps=steps, guidance=guidance, seed=seed, batch=batch))
    return torch.cat([images for images, _ in drawn]), statistics.median(seconds for _, seconds in drawn)


def pictures(pipe: Any, prompts: list[str], n: int, *, seed: int, batch: int, call: Mapping[str, Any]) -> Iterator[tuple[str, int, Tensor]]:
    """(prompt, number among its pictures, picture (3, H, W) in [0, 1]), n of each prompt, as they are drawn, `batch` at a time.

    A picture's noise is its own, by the seed and its number among its prompt's: to rounding it is the same whatever is drawn beside it.
    Raises NumericalError for a picture with NaN or inf.
    """
    rows = [(prompt, index) for prompt in prompts for index in range(n)]
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        images, _ = draw(pipe, [prompt for prompt, _ in part], [noise_generator(seed, index) for _, index in part], **call)
        yield from ((prompt, index, image) for (prompt, index), image in zip(part, images, strict=True))


def network_evaluations(steps: int, guidance: float) -> int:
    """Forward passes of the network per image: guidance above 1 needs the empty prompt too."""
    return steps * (2 if guidance > 1 else 1)


def teacher_rows(
    steps: int, guidance: float, seed: int, *, many: int | None = None, solvers: Sequence[str] = tuple(SOLVERS)
) -> list[dict[str, Any]]:
    """The teacher's samples of an evaluation: many steps, `steps` with each of the solvers, and the one that distances are taken to."""
    few = {"steps": steps, "guidance": guidance, "seed": seed}
    all_of_them = few | {"steps": many or TEACHER_STEPS}
    title = f"teacher, {many or TEACHER_STEPS} steps"
    rows = [{"name": title, "solver": "its own", **all_of_them}]
    rows += [{"name": f"teacher, {steps} steps, {name}", "solver": name, **few} for name in solvers]
    return [*rows, {"name": f"{title}, second sample", "solver": "its own", **all_of_them, "seed": seed + 1}]


def schedulers_of(pipe: Any) -> dict[str, Any]:
    """A pipeline's own scheduler and each of SOLVERS on its schedule, by name; its own alone where the network predicts a flow."""
    schedule = dict(pipe.scheduler.config)
    return {"its own": pipe.scheduler} | ({name: solver(name, schedule) for name in SOLVERS} if on_betas(schedule) else {})


def draws_in(config: Mapping[str, Any], steps: int) -> bool:
    """Whether a scheduler of this configuration has times for so many steps: where the last time is stretched to `shift_terminal`
    (Qwen-Image), that of a single step is 0 / 0."""
    return steps > 1 or not config.get("shift_terminal")


def on_betas(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is of a diffusion schedule; Sana's has betas that it makes no use of."""
    return "beta_schedule" in config and config.get("prediction_type") != "flow_prediction"


def solver(name: str, config: Mapping[str, Any]) -> Any:
    """One of SOLVERS on a teacher's schedule, with trailing steps. Raises ValueError for a schedule without betas.

    DDIM clips x0 to [-1, 1] unless told not to, as pixels allow and latents do not: a configuration that is silent means latents.
    """
    import diffusers

    if not on_betas(config):
        raise ValueError(f"{name} needs a diffusion (beta) schedule; the teacher's {config.get('_class_name', 'scheduler')} has none")
    return getattr(diffusers, SOLVERS[name]).from_config({"clip_sample": False, **config}, timestep_spacing="trailing")


def open_pipeline(source: str | Path, device: str | torch.device) -> Any:
    """A diffusers folder or hub id, as `stock_pipeline` reads it."""
    from fewstep.models import stock_pipeline

    pipe = stock_pipeline(source)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class Source(NamedTuple):
    """A pipeline to draw with, and how its call is told what to draw."""

    pipe: Any
    call: Callable[[float], dict[str, Any]]  # guidance scale -> what the stock call is told
    size: tuple[int, int]  # (height, width) of its pictures in pixels
    guidance: float = 1.0  # of a student: the scale that it is told; 1 where one is distilled in


def opened(source: str | Path | Callable[[], Source], device: str | torch.device) -> Source:
    """The source that a function opens, or a diffusers folder or hub id as it is."""
    if callable(source):
        return source()
    pipe = open_pipeline(source, device)
    return Source(pipe, lambda guidance: {"guidance_scale": guidance}, (resolution(pipe),) * 2)
