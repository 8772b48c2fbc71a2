"""What a number was measured on, and how: a student beside its teacher, in stock diffusers.

Every row is a sample of the same prompts with the same seed, drawn through the pipeline's own call. Its distance to the
teacher is taken to a second sample of the teacher (another seed, as many steps), so the teacher's own row shows the floor.
Samples are drawn part by part and only what is seen of them is kept, so that one of any size can be stopped, gone on with, and
shared among processes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from fewstep.evaluate.distances import Matrix, bootstrap
from fewstep.evaluate.features import PATCH, Extractor, of_scorer, scaled, to_bytes
from fewstep.evaluate.measure import (
    BLOCKS,
    DISTANCES,
    DRAWS,
    LEVEL,
    NEIGHBOURS,
    SHUFFLED,
    Measured,
    check_names,
    jackknifed,
    measure,
    paired,
    told_apart,
)
from fewstep.evaluate.pictures import Pictures
from fewstep.evaluate.pictures import features as features_of
from fewstep.evaluate.sets import PromptSet
from fewstep.evaluate.store import SHARD, Shards, add_tensor, fingerprint, keep, my_share, read, replace, sha256
from fewstep.rewards.clip import CLIPScore
from fewstep.rewards.remote import Remote

Utility = Callable[[Tensor], Tensor]  # (B, 3, H, W) in [0, 1] -> (B,)
Judge = Callable[[Tensor, list[str]], Tensor]  # pictures (B, 3, H, W) in [0, 1] and their B prompts -> (B,), higher is better
Look = Callable[[Tensor, list[str]], Tensor]  # pictures (B, 3, H, W) in [0, 1] and their B prompts -> what is kept of them, B rows
Noise = Literal["picture", "batch"]  # what has a generator of its own
Seen = Mapping[str, Matrix]

SOLVERS = {"DDIM": "DDIMScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler"}
TEACHER_STEPS = 28
BATCH = 16  # pictures drawn at a time; where noise is a batch's, it decides with the seed which picture gets which noise
COST = "cost"  # among what is kept of a sample: seconds and network evaluations of its drawing
TIMED = 4  # batches drawn to time a teacher whose sample came with it

LABELS = {
    "fid_data": "FID to data ↓",
    "fid_teacher": "FID to teacher (FID-SD) ↓",
    "kid_data": "KID to data ↓",
    "kid_teacher": "KID to teacher ↓",
    "patch_fid_data": "patch-FID to data ↓",
    "patch_fid_teacher": "patch-FID to teacher ↓",
    "fd_clip_data": "FD-clip to data ↓",
    "fd_clip_teacher": "FD-clip to teacher ↓",
    "cmmd_data": "CMMD to data ↓",
    "cmmd_teacher": "CMMD to teacher ↓",
    "clip": "CLIPScore, clip ↑",
    "clip_over_shuffled": "  above shuffled captions ↑",
    "clip-heldout": "CLIPScore, clip-heldout ↑",
    "clip-heldout_over_shuffled": "  above shuffled captions ↑",
    "preference": "PickScore, preference ↑",
    "preference_over_shuffled": "  above shuffled captions ↑",
    "utility": "gold utility ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "diversity": "diversity within a prompt ↑",
    "network_evaluations": "network evaluations per image",
    "seconds_per_image": "seconds per image",
}


@dataclass(frozen=True)
class Protocol:
    """What a number was measured on. Two numbers compare when their protocols are equal."""

    prompts: str  # SHA-256 of the list of prompts
    set: str | None  # name of the prompts' set or file
    n: int  # pictures of each row
    images_per_prompt: int
    seeds: dict[str, int]  # of the rows, and of the teacher's sample that they are compared to
    teacher: dict[str, Any] | None  # whose sample that is: pipeline (SHA-256), steps, guidance, and what its call was told
    noise: Noise  # a picture's own, by its number, or that of its batch
    batch: int | None  # decides, with the seed, which picture gets which noise; None where each has its own
    extractor: str | None  # whose features FD-clip, precision, recall and diversity use
    extractors: dict[str, dict[str, str]]  # name -> weights (SHA-256), resize
    scorers: dict[str, str]  # name -> SHA-256 of its weights
    preprocess: dict[str, dict[str, str]]  # of scorers: what pictures go through, SHA-256 of the vocabulary that prompts are read with
    utility: str | None  # SHA-256 of the source file that defines it
    data: dict[str, Any] | None  # of real pictures: n and SHA-256 of their features or files
    neighbours: int  # k of precision and recall
    resolution: int | list[int]  # in pixels; [height, width] of pictures that are not square
    precision: str  # arithmetic of the pipelines
    device: str  # with the number of threads: seconds per image belong to it
    versions: dict[str, str]

    def stamp(self) -> dict[str, Any]:
        """As it is read back from a report."""
        return json.loads(json.dumps(asdict(self)))


def pipeline_fingerprint(pipe: Any) -> str:
    """SHA-256 over all that decides a pipeline's pictures: weights, configurations and the tokenizers' vocabularies."""
    parts: dict[str, Any] = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            parts[name] = fingerprint(component)
        elif hasattr(component, "get_vocab"):
            parts[name] = sha256(component.get_vocab())
        elif hasattr(component, "config"):
            # keys that begin with _ hold the folder it was read from and the version that wrote it
            parts[name] = {key: str(value) for key, value in component.config.items() if not key.startswith("_")}
    return sha256(parts)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def resolution(pipe: Any) -> int:
    """Height and width in pixels of what the pipeline draws when not told."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    return int((getattr(pipe, "default_sample_size", None) or denoiser.config.sample_size) * pipe.vae_scale_factor)


def device_name(device: str | torch.device) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.device(device).type} ({platform.machine()}, {torch.get_num_threads()} threads)"


# Sampling


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The generator of one batch, on the CPU: the same noise on every device."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw(pipe: Any, prompts: list[str], generators: torch.Generator | list[torch.Generator], **told: Any) -> tuple[Tensor, float]:
    """Pictures (B, 3, H, W) in [0, 1] on the CPU, and the seconds per image, through the pipeline's own call.

    generators: of the whole batch, or one a picture, whose noise is then its own whatever it is drawn with.
    """
    start = time.perf_counter()
    first = generators[0] if isinstance(generators, list) else generators
    with torch.random.fork_rng(), own_noise(pipe.scheduler, generators):
        torch.manual_seed(
            first.initial_seed()
        )  # what a pipeline does not draw from the generator it is given: the noise of flow schedulers
        images = pipe(prompt=prompts, generator=generators, output_type="pt", **told).images
    return images.float().cpu(), (time.perf_counter() - start) / len(prompts)


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
    noise from its batch's generator. progress: the bar's name (None: no bar). call: what the pipeline is told instead of guidance_scale.
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
    call: Mapping[str, Any] | None = None,
) -> tuple[Tensor, float]:
    """All pictures (P * images_per_prompt, 3, H, W) in [0, 1], and the median over batches of the seconds per image."""
    drawn = list(batches(pipe, prompts, images_per_prompt, steps=steps, guidance=guidance, seed=seed, batch=batch, call=call))
    return torch.cat([images for images, _ in drawn]), statistics.median(seconds for _, seconds in drawn)


def network_evaluations(steps: int, guidance: float) -> int:
    """Forward passes of the network per image: guidance above 1 needs the empty prompt too."""
    return steps * (2 if guidance > 1 else 1)


def measure_cost(seconds: Tensor, evaluations: float, *, draws: int = DRAWS, seed: int = 0) -> Measured:
    """Network evaluations per image (exact) and seconds per image (median over batches, batches resampled); seconds (batches,)."""
    value = float(seconds.quantile(0.5))
    low, high = value, value
    if len(seconds) > 1:
        low, high = bootstrap(lambda index: float(seconds[index].quantile(0.5)), len(seconds), draws=draws, seed=seed, level=LEVEL)
    return {
        "network_evaluations": {"value": evaluations, "low": evaluations, "high": evaluations},
        "seconds_per_image": {"value": value, "low": low, "high": high},
    }


# Observing


def looks(
    scorers: Mapping[str, CLIPScore],
    utility: Utility | None = None,
    judges: Mapping[str, Judge] | None = None,
    extractors: Sequence[Extractor] = (),
) -> dict[str, Look]:
    """All that the metrics need to see of pictures, by name: each scorer's unit image features (B, d) and those of the extractors that
    are no scorers (features/NAME), the utility (B,), the judges' scores (B,) (score/NAME)."""

    def alone(function: Callable[[Tensor], Tensor]) -> Look:
        return lambda images, prompts: function(images)

    found = {f"features/{name}": alone(scorer.image_features) for name, scorer in scorers.items()}
    if utility is not None:
        found["utility"] = alone(utility)
    found |= {f"score/{name}": judge for name, judge in (judges or {}).items()}
    return found | {f"features/{e.name}": alone(e.function) for e in extractors if e.function is not None and e.name not in scorers}


@torch.no_grad()
def observe(images: Tensor, looks: Mapping[str, Look], prompts: list[str]) -> dict[str, Tensor]:
    """What each look sees of pictures (B, 3, H, W) and their B prompts, B rows, on the CPU."""
    return {name: torch.as_tensor(look(images, prompts)).detach().float().cpu() for name, look in looks.items()}


def retries(judge: Judge) -> int:
    """Tries that a judge's server had repeated since this was last asked; 0 of a judge without a server."""
    holder = getattr(judge, "__self__", judge)
    return int(holder.news().get("retries", 0)) if isinstance(holder, Remote) else 0


def observe_sample(
    pipe: Any,
    prompts: list[str],
    images_per_prompt: int,
    scorers: Mapping[str, CLIPScore],
    utility: Utility | None = None,
    *,
    device: str | torch.device = "cpu",
    **sampling: Any,
) -> dict[str, Tensor]:
    """What `observe` sees of a whole sample, and the seconds per image of each of its batches. sampling: as `batches` takes it."""
    parts, seconds = [], []
    rows = (prompt for prompt in prompts for _ in range(images_per_prompt))
    for images, each in batches(pipe, prompts, images_per_prompt, **sampling):
        parts.append(observe(images.to(device), looks(scorers, utility), list(itertools.islice(rows, len(images)))))
        seconds.append(each)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} | {"seconds": torch.tensor(seconds)}


# The samples that ship with a teacher


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
    """A pipeline's own scheduler and each of SOLVERS on its schedule, by name; its own alone where the schedule has no betas (flow)."""
    schedule = dict(pipe.scheduler.config)
    return {"its own": pipe.scheduler} | ({name: solver(name, schedule) for name in SOLVERS} if "beta_schedule" in schedule else {})


def shipped_path(folder: Path, row: dict[str, Any], content: dict[str, Any]) -> Path:
    """Where a shipped sample lies: named by all that decides its pictures and what is seen of them, and by no machine or version."""
    return folder / f"{sha256({'row': row, **content})[:16]}.safetensors"


def content_of(
    pipe: Any, prompts: list[str], images_per_prompt: int, batch: int, scorers: Mapping[str, CLIPScore], utility: Utility | None
) -> dict[str, Any]:
    """What decides a sample of a teacher, beside its row. Of configurations only what pictures hang on: libraries add keys."""
    schedule = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr", "timestep_spacing")
    return {
        "weights": {name: fingerprint(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)},
        "scheduler": {key: pipe.scheduler.config.get(key) for key in schedule},
        "prompts": sha256(prompts),
        "images_per_prompt": images_per_prompt,
        "batch": batch,
        "scorers": {name: fingerprint(scorer.model) for name, scorer in scorers.items()},
        "utility": utility_hash(utility),
    }


def utility_hash(utility: Utility | None) -> str | None:
    """SHA-256 of the source file that defines a utility: of all it is, where that file calls torch alone, as the world's does (tested).

    The torch that ran it is among a stamp's versions.
    """
    return None if utility is None else hashlib.sha256(Path(inspect.getfile(utility)).read_bytes()).hexdigest()


def ship(
    folder: Path,
    *,
    teacher: str | Path,
    prompts: list[str],
    scorers: Mapping[str, CLIPScore],
    utility: Utility | None,
    steps: int,
    guidance: float,
    images_per_prompt: int,
    seed: int = 0,
    batch: int = BATCH,
    device: str = "cpu",
) -> None:
    """Draw the teacher's samples of the default evaluation and keep what is seen of them (float16) in `folder`, to ship with it.

    A sample that is there already is not drawn again. Beside each lies, in JSON, what it was drawn with.
    """
    pipe = open_pipeline(teacher, device)
    content = content_of(pipe, prompts, images_per_prompt, batch, scorers, utility)
    schedulers = schedulers_of(pipe)
    for row in teacher_rows(steps, guidance, seed):
        path = shipped_path(folder, row, content)
        if path.is_file():
            continue
        pipe.scheduler = schedulers[row["solver"]]
        sampling = {key: row[key] for key in ("steps", "guidance", "seed")}
        seen = observe_sample(
            pipe, prompts, images_per_prompt, scorers, utility, device=device, **sampling, batch=batch, progress=row["name"]
        )
        seen.pop("seconds")  # of another machine
        versions = {package: version(package) for package in ("torch", "diffusers", "transformers")}
        keep(path, {name: value.half() for name, value in seen.items()}, {"row": row, **content, "drawn with": versions})


# The whole evaluation


def solver(name: str, config: Mapping[str, Any]) -> Any:
    """One of SOLVERS on a teacher's schedule, with trailing steps. Raises ValueError for a schedule without betas."""
    import diffusers

    if "beta_schedule" not in config:
        raise ValueError(f"{name} needs a diffusion (beta) schedule; the teacher's {config.get('_class_name', 'scheduler')} has none")
    return getattr(diffusers, SOLVERS[name]).from_config(config, timestep_spacing="trailing")


def open_pipeline(source: str | Path, device: str | torch.device) -> Any:
    """A diffusers folder or hub id, from safetensors alone."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(source), use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class Source(NamedTuple):
    """A pipeline to draw with, and how its call is told what to draw."""

    pipe: Any
    call: Callable[[float], dict[str, Any]]  # guidance scale -> what the stock call is told
    size: tuple[int, int]  # (height, width) of its pictures in pixels


def opened(source: str | Path | Callable[[], Source], device: str | torch.device) -> Source:
    """The source that a function opens, or a diffusers folder or hub id as it is."""
    if callable(source):
        return source()
    pipe = open_pipeline(source, device)
    return Source(pipe, lambda guidance: {"guidance_scale": guidance}, (resolution(pipe),) * 2)


def check(
    prompts: Sequence[str],
    images_per_prompt: int,
    scorers: Mapping[str, CLIPScore],
    extractor: str | None,
    data: Tensor | Any,
    *,
    repeats: bool,
) -> None:
    """Raise ValueError, before anything slow, for what could only fail at the end."""
    if extractor is not None and extractor not in scorers:
        raise ValueError(f"extractor {extractor!r} is not among the scorers: {', '.join(scorers) or 'none given'}")
    if len(set(prompts)) < 2 or (len(set(prompts)) != len(prompts) and not repeats):
        repeated = "".join(f"; {prompt!r} is repeated" for prompt in list(dict.fromkeys(prompts)) if prompts.count(prompt) > 1)
        raise ValueError(f"evaluation needs at least two prompts, all different{repeated}")
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, got {images_per_prompt}")
    if extractor is None:
        return
    width = scorers[extractor].width
    if len(prompts) * images_per_prompt <= width:
        raise ValueError(
            f"{len(prompts)} prompts x {images_per_prompt} pictures = {len(prompts) * images_per_prompt}, but the Frechet distance of "
            f"{width}-dimensional features needs more than {width}: more prompts or more images_per_prompt"
        )
    if isinstance(data, Tensor) and (data.shape[1] != width or len(data) <= width):
        raise ValueError(f"features of real pictures must be (more than {width}, {width}) for {extractor!r}, got {tuple(data.shape)}")


def preparation(scorer: CLIPScore) -> dict[str, str]:
    """How a scorer brings pictures and prompts to its network."""
    return {"pictures": in_words(scorer.preprocess), "vocabulary": sha256(scorer.tokenizer.get_vocab())}


def in_words(function: Callable[..., Any]) -> str:
    """A preprocessing's settings, or the name of a function with what it is told; the same in every process."""
    if isinstance(function, functools.partial):
        told = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in sorted(function.keywords.items()))]
        return f"{in_words(function.func)}({', '.join(told)})"
    named = function if inspect.isroutine(function) else type(function)
    return repr(function) if isinstance(function, tuple) else f"{named.__module__}.{named.__qualname__}"


def identity_of(judge: Any) -> str:
    """SHA-256 over a judge's weights and preprocessing, or what it says of its name and version, or SHA-256 of a function and its file."""
    digest, found = hashlib.sha256(), False
    holder = getattr(judge, "__self__", judge)
    for name, value in sorted(vars(holder).items()) if hasattr(holder, "__dict__") else ():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for key, part in parts:
            if isinstance(part, (nn.Module, Tensor)):
                found = True
                digest.update(f"{name}.{key} ".encode())
                digest.update(fingerprint(part).encode()) if isinstance(part, nn.Module) else add_tensor(digest, "", part)
    called = getattr(judge, "__name__", "score")
    if found:
        if callable(preprocess := getattr(holder, "preprocess", None)):
            digest.update(in_words(preprocess).encode())
        if called != "score":  # another method of the same weights
            digest.update(called.encode())
        return digest.hexdigest()
    version_of = getattr(holder, "version", None)
    if isinstance(version_of, str):  # a server's; its version may be that of a file with several functions
        return f"{served} {version_of}" if (served := getattr(holder, "served", "")) else version_of
    named = judge if inspect.isroutine(judge) else type(holder)
    try:
        digest.update(Path(inspect.getfile(named)).read_bytes())
    except (TypeError, OSError) as error:
        raise ValueError(
            f"judge {judge!r}: nothing tells which version it is; give an object with weights or a function in a file"
        ) from error
    line = named.__code__.co_firstlineno if inspect.isfunction(named) else 0  # all lambdas have one name
    digest.update(f"\0{named.__qualname__} {line}".encode())
    return digest.hexdigest()


class Drawing(NamedTuple):
    """What every part of a sample is drawn and looked at with."""

    prompts: list[str]
    ids: list[str] | None
    images_per_prompt: int
    noise: Noise
    batch: int
    looks: Mapping[str, Look]
    device: str | torch.device
    progress: bool

    @property
    def n(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def part_size(self) -> int:
        """Pictures of a part: whole batches, so that what a batch's noise belongs to does not depend on who draws which part."""
        return max(1, SHARD // self.batch) * self.batch if self.noise == "batch" else SHARD

    def generators(self, seed: int, first: int, end: int) -> torch.Generator | list[torch.Generator]:
        if self.noise == "batch":
            return noise_generator(seed, first // self.batch)
        return [noise_generator(seed, i) for i in range(first, end)]


def draw_parts(
    source: Source, row: dict[str, Any], kept: Mapping[str, Shards], wanted: Mapping[int, list[str]], drawing: Drawing, folder: Path | None
) -> None:
    """Draw the wanted parts of a row's sample, look at each as wanted, and keep what is seen as soon as the part is whole.

    kept, wanted: by look, and of each part which looks, COST among both. folder: for the pictures themselves.
    """
    parts = kept[COST].pictures
    batches = [(i, first) for i in wanted for first in range(parts(i).start, parts(i).stop, drawing.batch)]
    told = source.call(row["guidance"]) | {"num_inference_steps": row["steps"]}
    seen: list[dict[str, Tensor]] = []
    source.pipe.set_progress_bar_config(disable=True)
    with counted(source.pipe) as calls:
        for i, first in track(batches, row["name"], disable=not drawing.progress):
            end = min(first + drawing.batch, parts(i).stop)
            chunk = [drawing.prompts[p // drawing.images_per_prompt] for p in range(first, end)]
            images, seconds = draw(source.pipe, chunk, drawing.generators(row["seed"], first, end), **told)
            asked = {name: drawing.looks[name] for name in wanted[i] if name != COST}
            seen.append(observe(images.to(drawing.device), asked, chunk) | {"seconds": torch.tensor([seconds])})
            if folder is not None:
                save_pictures(folder, images, first)
            if end == parts(i).stop:
                whole = {name: torch.cat([each[name] for each in seen]) for name in seen[0]}
                for name in wanted[i]:
                    cost = {"seconds": whole["seconds"], "evaluations": torch.tensor([float(sum(calls))])}
                    found = cost if name == COST else {name: whole[name]}
                    if name.startswith("score/"):
                        found |= asking(kept[name], i, name.removeprefix("score/"), len(parts(i)), retries(drawing.looks[name]))
                    kept[name].save(i, found, device=device_name(drawing.device))
                seen.clear()
                calls.clear()


def asking(shards: Shards, i: int, judge: str, asked: int, retried: int) -> dict[str, Tensor]:
    """Pictures of a part that a judge was asked for, and tries that were repeated, added to those of the time before."""
    before = shards.read(i, "") if shards.whole(i) else {}
    counts = {f"asked/{judge}": asked, f"retried/{judge}": retried}
    return {name: torch.tensor([count]) + before.get(name, 0) for name, count in counts.items()}


def asked_of(seen: Seen, judge: str) -> dict[str, int]:
    """Pictures that a judge was asked for (more than there are, where it was asked again), those that have no score now, repeated tries."""
    masked = int((~torch.isfinite(seen[f"score/{judge}"][:])).sum())
    return {"asked": int(seen[f"asked/{judge}"][:].sum()), "masked": masked, "retried": int(seen[f"retried/{judge}"][:].sum())}


def pictures_folder(inside: Path, row: dict[str, Any], key: str) -> Path:
    """Where a sample's pictures lie: named by the row, and by the sample's key, so that two samples never mix."""
    name = "".join(c if c.isalnum() else "-" for c in row["name"].lower())
    return inside / f"{name}-{key[:8]}"


def picture_path(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def save_pictures(folder: Path, images: Tensor, first: int) -> None:
    """Pictures as PNG files named by their number."""
    from PIL import Image

    for i, pixels in enumerate(to_bytes(images).permute(0, 2, 3, 1).numpy(), first):
        replace(picture_path(folder, i), lambda temporary, pixels=pixels: Image.fromarray(pixels).save(temporary, format="PNG"))


def write_index(folder: Path, row: dict[str, Any], drawing: Drawing) -> None:
    """A line in pictures.jsonl for each picture of a whole sample."""
    lines = []
    for i in range(drawing.n):
        prompt = i // drawing.images_per_prompt
        line = {"file": picture_path(folder, i).name, "prompt": drawing.prompts[prompt], "seed": row["seed"], "picture": i}
        lines.append(json.dumps(line | ({"id": drawing.ids[prompt]} if drawing.ids else {})) + "\n")
    replace(folder / "pictures.jsonl", lambda temporary: temporary.write_text("".join(lines)))


def undrawn(shards: Shards, folder: Path | None) -> list[int]:
    """Parts whose pictures are not all in the folder that keeps them, if there is one."""
    if folder is None:
        return []
    return [i for i in range(shards.count) if not all(picture_path(folder, p).is_file() for p in shards.pictures(i))]


def unseen(kept: Mapping[str, Shards]) -> dict[int, list[str]]:
    """Part -> the looks that it lacks; whole parts are not among them."""
    missing = {name: set(shards.missing()) for name, shards in kept.items()}
    return {i: names for i in range(kept[COST].count) if (names := [name for name in kept if i in missing[name]])}


def unscored(kept: Mapping[str, Shards], lacks: Mapping[int, list[str]]) -> dict[int, list[str]]:
    """Part -> the judges, as looks, that left a picture of it without a score: they may have been out of reach."""
    judges = [name for name in kept if name.startswith("score/")]
    silent = {
        i: [name for name in judges if name not in lacks.get(i, ()) and not torch.isfinite(kept[name].read(i, name)[name]).all()]
        for i in range(kept[COST].count)
    }
    return {i: names for i, names in silent.items() if names}


def in_short(looks: Mapping[int, list[str]]) -> str:
    """The names of what is looked for, each once."""
    return ", ".join(dict.fromkeys(name.partition("/")[2] or name for names in looks.values() for name in names))


def evaluate(
    student: str | Path | Callable[[], Source],
    *,
    teacher: str | Path | Callable[[], Source] | None = None,
    prompts: list[str] | PromptSet,
    scorers: Mapping[str, CLIPScore],
    extractor: str | None = None,
    extractors: Sequence[Extractor] = (),
    judges: Mapping[str, Judge] | None = None,
    utility: Utility | None = None,
    data: Tensor | Pictures | None = None,
    neighbours: int = NEIGHBOURS,
    steps: int = 4,
    teacher_steps: int | None = None,
    guidance: float = 3.0,
    images_per_prompt: int = 4,
    seed: int = 0,
    noise: Noise = "batch",
    batch: int = BATCH,
    device: str = "cpu",
    precision: str = "fp32",
    draws: int = DRAWS,
    work: str | Path | None = None,
    cache: str | Path | None = None,
    shipped: Path | None = None,
    share: tuple[int, int] = (0, 1),
    keep_images: Path | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Measure a student of `steps` steps beside its teacher at many steps and at `steps` with each of SOLVERS.

    student, teacher: diffusers folders, hub ids, or functions that open a Source; without a teacher the student stands alone.
    guidance: the teacher's, in all its rows; the student has none (1). prompts: a PromptSet's may come more than once.
    scorers: name -> scorer; judges: name -> any other reward; utility: pictures -> (B,); extractor: the scorer whose features FD-clip
    uses; extractors: others; data: real pictures, or their FD-clip features (M, d), without which the metrics that need them are left out;
    neighbours: k of precision and recall. noise: a picture's own, or, as samples that ship were drawn, that of its batch.
    work, cache: folders that keep what was seen of the student's and of the teacher's pictures, and of real ones, by the content of
    pipeline and protocol, what each scorer, judge and extractor sees apart from the others; their use is said. A sample that is there in
    part is gone on with, and one that lacks a judge is drawn again for that judge alone. shipped: a folder that `ship`
    filled: a sample found there is not drawn, only timed over a few batches. share (i, n): draw the i-th of n shares of every sample,
    measure nothing and return None. keep_images: a folder for the pictures themselves, each sample's in one of its own.

    Returns {"protocol", "interval", "student", "teacher", "rows", "paired", "best_solver", "left_out"}: each row has name, solver, steps,
    guidance, seed, n, sample (drawn, kept or shipped), device, metrics (see `measure`) and, where there are judges, what `asked_of` counts
    of each; paired: of the student minus the teacher at many steps (see `paired`), None without a teacher; best_solver names the few-step
    teacher nearest to the teacher; left_out says of metrics why there are none.
    """
    named = prompts if isinstance(prompts, PromptSet) else None
    texts = named.prompts if named else list(prompts)
    check(texts, images_per_prompt, scorers, extractor, data, repeats=named is not None)
    used = told_apart(([of_scorer(extractor, scorers[extractor])] if extractor else []) + list(extractors))
    check_names(used, scorers, judges or (), shared=extractor is not None)
    own = opened(student, device)
    left_out: dict[str, str] = {}
    if min(own.size) < PATCH and any(e.frechet.startswith("patch_fid") for e in used):
        left_out["patch-FID"] = f"pictures of {own.size[0]} x {own.size[1]} hold no crop of {PATCH} pixels"
        used = [e for e in used if not e.frechet.startswith("patch_fid")]
    if extractors or judges or noise != "batch" or precision != "fp32":
        shipped = None  # what ships was drawn and seen without these
    drawn_by = {package: version(package) for package in ("torch", "diffusers", "transformers", "fewstep")}
    seen_by = {package: version(package) for package in ("torch-fidelity", "pillow")} if extractors else {}
    protocol = Protocol(
        prompts=sha256(texts),
        set=named.name if named else None,
        n=len(texts) * images_per_prompt,
        images_per_prompt=images_per_prompt,
        seeds={"rows": seed, "reference": seed + 1} if teacher is not None else {"rows": seed},
        teacher=None,  # it is opened when the student is drawn
        noise=noise,
        batch=batch if noise == "batch" else None,
        extractor=used[0].name if used else None,
        extractors={e.name: {"weights": e.weights, "resize": e.resize} for e in used},
        scorers={name: fingerprint(scorer.model) for name, scorer in scorers.items()}
        | {name: identity_of(judge) for name, judge in (judges or {}).items()},
        preprocess={name: preparation(scorer) for name, scorer in scorers.items()},
        utility=utility_hash(utility),
        data=data.identity if isinstance(data, Pictures) else None if data is None else {"n": len(data), "sha256": sha256(data.tolist())},
        neighbours=neighbours,
        resolution=own.size[0] if own.size[0] == own.size[1] else list(own.size),
        precision=precision,
        device=device_name(device),
        versions=drawn_by | seen_by,
    )

    ids = named.ids if named else None
    drawing = Drawing(texts, ids, images_per_prompt, noise, batch, looks(scorers, utility, judges, used), device, progress)
    # neither what is compared with, the machine nor who looks at them decide a student's pictures
    others = ("data", "neighbours", "device", "extractor", "extractors", "scorers", "preprocess", "utility")
    common = protocol.stamp() | dict.fromkeys(others) | {"versions": drawn_by}
    # what decides each look, which is kept apart from the others: to add one is to look once more, at the same pictures
    decided: dict[str, Any] = {COST: None}
    decided |= {f"features/{name}": [protocol.scorers[name], protocol.preprocess[name]] for name in scorers}
    decided |= {f"features/{e.name}": [protocol.extractors[e.name], seen_by] for e in used if e.name not in scorers}
    decided |= {f"score/{name}": protocol.scorers[name] for name in judges or ()}
    decided |= {"utility": protocol.utility} if utility is not None else {}

    def collect(source: Source, row: dict[str, Any], identity: dict[str, str], folder: Path) -> tuple[dict[str, Any], Seen | None]:
        """(the row, saying where its sample came from; what was seen of it, or None where only a share was drawn)."""
        note = {**identity, "protocol": common, "row": row, "call": source.call(row["guidance"])}
        kept = {name: Shards(folder, note | {"look": [name, by]}, drawing.n, size=drawing.part_size()) for name, by in decided.items()}
        count, pictures = kept[COST].count, pictures_folder(keep_images, row, sha256(note)) if keep_images else None
        lacks = unseen(kept)
        silent = unscored(kept, lacks)
        some = {i: names for i, names in lacks.items() if len(names) < len(kept)}
        if silent:
            said = f"{len(silent)} of {count} parts have pictures without a score by {in_short(silent)}"
            say(f"{row['name']}: {said}; drawn again to ask again")
        if some:
            say(f"{row['name']}: {len(some)} of {count} parts lack {in_short(some)}; drawn again for that alone")
        if len(some) < len(lacks) < count and share == (0, 1):
            say(f"{row['name']}: {count - len(lacks)} of {count} parts are in {folder}, going on with the others")
        wanted = {i: lacks.get(i, []) + silent.get(i, []) for i in sorted({*lacks, *silent, *undrawn(kept[COST], pictures)})}
        draw_parts(source, row, kept, {i: wanted[i] for i in my_share(list(wanted), share)}, drawing, pictures)
        if not wanted:
            say(f"{row['name']}: read from {folder}")
        if share != (0, 1):
            return row, None
        if pictures is not None:
            write_index(pictures, row, drawing)
            say(f"{row['name']}: pictures in {pictures}")
        seen: dict[str, Matrix] = {name: rows for shards in kept.values() for name, rows in shards.open().items()}
        devices = sorted({device for shards in kept.values() for device in shards.devices()})
        told = {"judges": {name: asked_of(seen, name) for name in judges}} if judges else {}
        return row | {"sample": "drawn" if wanted else "kept", "device": ", ".join(devices)} | told, seen

    with tempfile.TemporaryDirectory() as scratch:
        own_folder, folder = Path(work or scratch), Path(cache or scratch)
        identity = {"student": pipeline_fingerprint(own.pipe)}
        row = {"name": f"student, {steps} steps", "solver": "its own", "steps": steps, "guidance": 1.0, "seed": seed}
        samples = [collect(own, row, identity, own_folder)]
        del own
        reference: Seen | None = None
        if teacher is not None:
            original = opened(teacher, device)
            schedulers = schedulers_of(original.pipe)
            identity["teacher"] = pipeline_fingerprint(original.pipe)
            settings = {"steps": teacher_steps or TEACHER_STEPS, "guidance": guidance, "call": original.call(guidance)}
            protocol = dataclasses.replace(protocol, teacher={"pipeline": identity["teacher"], **settings})
            content = content_of(original.pipe, texts, images_per_prompt, batch, scorers, utility) if shipped else {}

            def teacher_sample(row: dict[str, Any], *, timed: bool = True) -> tuple[dict[str, Any], Seen | None]:
                """As `collect`, of a row's solver; a shipped sample is timed here."""
                original.pipe.scheduler = schedulers[row["solver"]]
                found = read(shipped_path(shipped, row, content)) if shipped else None
                if found is None:
                    return collect(original, row, {"teacher": identity["teacher"]}, folder)
                seen = {name: value.float() for name, value in found.items()}
                if timed:
                    few = texts[: -(-TIMED * batch // images_per_prompt)]
                    sampling = {"steps": row["steps"], "guidance": row["guidance"], "seed": row["seed"], "batch": batch}
                    told, bar = original.call(row["guidance"]), row["name"] if progress else None
                    drawn = batches(original.pipe, few, images_per_prompt, **sampling, progress=bar, call=told)
                    seen["seconds"] = torch.tensor([seconds for _, seconds in drawn])
                return row | {"sample": "shipped", "device": protocol.device}, seen

            few_step = [name for name in schedulers if name != "its own"] or ["its own"]
            *shown, last = teacher_rows(steps, guidance, seed, many=teacher_steps, solvers=few_step)
            samples += [teacher_sample(row) for row in shown]
            _, reference = teacher_sample(last, timed=False)
        real = data
        if isinstance(data, Pictures):
            # what is kept of real pictures is named by how they were brought to size, which a scorer's own stamp says elsewhere
            by_name = {e.name: e._replace(resize=in_words(scorers[e.name].preprocess)) if e.name in scorers else e for e in used}
            real = features_of(data, by_name, folder, batch=batch, device=device, share=share, progress=progress)
        if share != (0, 1):
            say(f"share {share[0]} of {share[1]} is drawn. When all are, the same call without a share measures")
            return None
        group = torch.arange(len(texts)).repeat_interleave(images_per_prompt)
        compared = {"extractor": used, "data": real, "neighbours": neighbours, "repeats": named is not None, "device": device}
        if reference is not None:
            compared["teacher"] = {e.name: as_teacher(e, reference) for e in used}
        rows, singles = [], []
        for row, seen in samples:
            assert seen is not None
            sights = {name: values for name, values in seen.items() if name.startswith(("features/", "score/", "utility"))}
            singles.append({})
            metrics = measure(sights, texts, group, scorers, **compared, draws=draws, left_out=left_out, singles=singles[-1])
            made = float(network_evaluations(row["steps"], row["guidance"]))
            if "evaluations" in seen:  # those of every part, as they were made
                made = float(seen["evaluations"][:].sum()) / drawing.n
            rows.append(row | {"n": protocol.n, "metrics": metrics | measure_cost(seen["seconds"][:], made, draws=draws)})
    differing = paired(*singles[:2], draws=draws) if teacher is not None else {}  # the teacher's sample has the student's seed
    best = min(rows[2:], key=lambda row: nearness(row["metrics"])) if len(rows) > 2 else None
    by_blocks = jackknifed(protocol.n, used, list(rows[0]["metrics"]))
    return {
        "protocol": protocol.stamp(),
        "interval": {"level": LEVEL, "draws": draws, "resampled": "prompts"}
        | ({"jackknife": {"blocks of prompts": BLOCKS, "metrics": by_blocks}} if by_blocks else {}),
        **identity,
        "rows": rows,
        "paired": {"of": rows[0]["name"], "minus": rows[1]["name"], "metrics": differing} if differing else None,
        "best_solver": best["name"] if best else None,
        "left_out": left_out,
    }


def as_teacher(e: Extractor, reference: Seen) -> Matrix:
    """The reference's features as distances take them."""
    features: Any = reference[f"features/{e.name}"]
    if not e.unit:
        return features
    return scaled(features) if isinstance(features, Tensor) else features.times(features.shape[1] ** 0.5)


NEAREST = ("fid_teacher", "fd_clip_teacher", "kid_teacher", "cmmd_teacher")


def nearness(metrics: Measured) -> float:
    """The first distance to the teacher there is; 0 without any."""
    named = [name for name in metrics if name.startswith("fd_") and name.endswith("_teacher")]
    return next((metrics[name]["value"] for name in [*NEAREST, *named] if name in metrics), 0.0)


# Showing


def cell(measured: dict[str, float] | None) -> str:
    """`value [low, high]`, to four digits; the value alone where it is exact. A star marks a mean that misses pictures."""
    if measured is None:
        return "-"
    value, low, high = (f"{measured[key]:.4g}" for key in ("value", "low", "high"))
    return (value if measured["low"] == measured["high"] else f"{value} [{low}, {high}]") + ("*" if measured.get("masked") else "")


def columns(report: dict[str, Any]) -> list[str]:
    """Names of the report's samples, the best few-step teacher marked, and the paired difference where there is one."""
    return [name + (" (best)" if name == report["best_solver"] else "") for name in measured_in(report)]


def measured_in(report: dict[str, Any]) -> dict[str, Measured]:
    """Column -> its metrics: the samples, and the paired difference where there is one."""
    found = {row["name"]: row["metrics"] for row in report["rows"]}
    return found | ({"student - teacher, paired": report["paired"]["metrics"]} if report.get("paired") else {})


def as_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(metric, one cell for each of `columns`), in a fixed order."""
    measured = list(measured_in(report).values())
    return [(label(name), [cell(metrics.get(name)) for metrics in measured]) for name in dict.fromkeys(itertools.chain(*measured))]


def label(name: str) -> str:
    """What a table calls a metric: distances by their network, judges as they were named."""
    if name in LABELS:
        return LABELS[name]
    stem, _, what = name.rpartition("_")
    kind, _, network = stem.partition(".")
    if network and kind in DISTANCES and what in ("data", "teacher"):
        return LABELS[f"{kind}_{what}"].replace(" to ", f" of {network} to ", 1)
    if kind.startswith("fd_") and what in ("data", "teacher"):
        return f"FD-{stem.removeprefix('fd_')} to {what} ↓"
    return "  above shuffled captions ↑" if name.endswith(SHUFFLED) else f"{name} ↑"


def plain(name: str) -> str:
    """A metric's label without what is better."""
    return label(name).removesuffix(" ↓").removesuffix(" ↑").strip()


def notes(report: dict[str, Any]) -> list[str]:
    """What has to be said beside the numbers: what was left out, what misses pictures, intervals of another kind, other machines."""
    said = [f"no {plain(name)}: {why}" for name, why in report.get("left_out", {}).items()]
    measured = measured_in(report)
    for name in dict.fromkeys(itertools.chain(*measured.values())):
        short = {column: masked for column, metrics in measured.items() if (masked := metrics.get(name, {}).get("masked"))}
        if short:
            missing = "; ".join(f"{masked} ({column})" for column, masked in short.items())
            said.append(f"* {plain(name)}: a mean over the pictures that got a score; of {report['protocol']['n']}, none for {missing}")
    other = report["interval"].get("jackknife")
    if other:
        said.append(f"intervals of {', '.join(other['metrics'])}: jackknife over {other['blocks of prompts']} blocks of prompts")
    devices = {row["name"]: row["device"] for row in report["rows"] if row.get("device")}
    if len(set(devices.values())) > 1:
        each = "; ".join(f"{name}: {device}" for name, device in devices.items())
        said.append(f"drawn on different machines, whose seconds per image do not compare: {each}")
    return said


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    protocol, level = report["protocol"], report["interval"]["level"]
    seeds = f"seed {protocol['seeds']['rows']}"
    if "reference" in protocol["seeds"]:
        seeds += f", teacher's reference sample {protocol['seeds']['reference']}"
    title = f"n = {protocol['n']} ({protocol['images_per_prompt']} per prompt), {seeds}, {level:.0%} intervals over prompts"
    table = Table("", *columns(report), title=title, caption="\n".join(notes(report)) or None)
    for name, cells in as_rows(report):
        table.add_row(name, *cells)
    return table


def differences(stamp: Any, other: Any, prefix: str = "") -> list[str]:
    """Every field in which two stamps differ, as `field: this / other`, hashes cut to eight digits."""
    if isinstance(stamp, dict) and isinstance(other, dict):
        names = {key: f"{prefix}.{key}" if prefix else key for key in {**stamp, **other}}
        return [line for key, name in names.items() for line in differences(stamp.get(key), other.get(key), name)]
    if stamp == other:
        return []
    shown = [value[:8] if isinstance(value, str) and len(value) == 64 else str(value) for value in (stamp, other)]
    return [f"{prefix}: {shown[0]} / {shown[1]}"]


LATER = ("teacher", "preprocess")  # fields that the first reports' stamps lack


def stamp_of(report: dict[str, Any]) -> dict[str, Any]:
    """A report's stamp. What an early one's lacks of its teacher is taken from the report's rows."""
    stamp = report["protocol"]
    if "teacher" in stamp or "teacher" not in report:
        return stamp
    shown = report["rows"][1]
    return stamp | {"teacher": {"pipeline": report["teacher"], "steps": shown["steps"], "guidance": shown["guidance"]}}


def compared(stamp: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what differs between two stamps, the later fields that one of them lacks and that were not compared)."""
    unknown = [field for field in LATER if (field in stamp) != (field in other)]
    one, two = ({key: value for key, value in held.items() if key not in unknown} for held in (stamp, other))
    if one.get("teacher") and two.get("teacher") and ("call" in one["teacher"]) != ("call" in two["teacher"]):
        unknown.append("teacher.call")
        one, two = (held | {"teacher": held["teacher"] | {"call": None}} for held in (one, two))
    return differences(one, two), unknown


def verdict(name: str, first: str, found: list[str]) -> str:
    """What differences in the stamps of two reports mean for their numbers."""
    differ = "; ".join(found)
    if all(line.startswith("teacher") for line in found):
        return f"† {name} was measured beside another teacher than {first}, and its distances to the teacher do not compare: {differ}"
    return f"† {name} was measured otherwise than {first}, and its numbers do not compare: {differ}"


def beside(reports: Mapping[str, dict[str, Any]]) -> Table:
    """Reports by name in one table. Every report whose stamp is not the first one's is marked, and what differs is said below."""
    first, *others = reports
    said = [f"{first}: {note}" for note in notes(reports[first])]
    marks = {first: ""}
    for name in others:
        found, unknown = compared(stamp_of(reports[first]), stamp_of(reports[name]))
        marks[name] = " †" if found else ""
        said += [verdict(name, first, found)] if found else []
        if unknown:
            said.append(f"{name} or {first} is of an earlier version, whose stamp lacks {', '.join(unknown)}: not compared")
        said += [f"{name}: {note}" for note in notes(reports[name])]
    samples = [(f"{name}: {row['name']}{marks[name]}", row["metrics"]) for name, report in reports.items() for row in report["rows"]]
    table = Table("", *(title for title, _ in samples), caption="\n".join(said) or None)
    for metric in dict.fromkeys(metric for _, metrics in samples for metric in metrics):
        table.add_row(label(metric), *(cell(metrics.get(metric)) for _, metrics in samples))
    return table


def save(report: dict[str, Any], path: str | Path) -> None:
    """Write the report as JSON, atomically."""
    replace(Path(path), lambda temporary: temporary.write_text(json.dumps(report, indent=1)))
