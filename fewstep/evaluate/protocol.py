"""What a number was measured on, and how: a student beside its teacher, in stock diffusers.

Every row is a sample of the same prompts with the same seed, drawn through the pipeline's own call. Its distance to the
teacher is taken to a second sample of the teacher (another seed, 28 steps), so the teacher's own row shows the floor.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.evaluate.distances import bootstrap, checked, covered, frechet, frechet_distance, moments, spread
from fewstep.evaluate.features import scaled
from fewstep.rewards.clip import CLIPScore

Utility = Callable[[Tensor], Tensor]  # (B, 3, H, W) in [0, 1] -> (B,)
Measured = dict[str, dict[str, float]]  # metric -> value, low, high

SOLVERS = {"DDIM": "DDIMScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler"}
TEACHER_STEPS = 28
DRAWS, LEVEL = 200, 0.95  # of every bootstrap interval
BATCH = 16  # pictures drawn at a time; with the seed it decides which picture gets which noise
TIMED = 4  # batches drawn to time a teacher whose sample came with it
NEIGHBOURS = 3  # k of precision and recall, unless the data hold several copies of each picture

LABELS = {
    "fd_clip_data": "FD-clip to data ↓",
    "fd_clip_teacher": "FD-clip to teacher ↓",
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
    n: int  # pictures of each row
    images_per_prompt: int
    seeds: dict[str, int]  # of the rows, and of the teacher's sample that they are compared to
    batch: int  # decides, with the seed, which picture gets which noise
    extractor: str  # whose image features FD-clip, precision, recall and diversity use
    scorers: dict[str, str]  # name -> SHA-256 of its weights
    utility: str | None  # SHA-256 of the source file that defines it
    data: dict[str, Any] | None  # n and SHA-256 of the features of real pictures
    neighbours: int  # k of precision and recall
    resolution: int
    device: str  # with the number of threads: seconds per image belong to it
    versions: dict[str, str]

    def stamp(self) -> dict[str, Any]:
        return asdict(self)


def sha256(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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

    Through the pipeline's own call, so encoding the prompts and decoding the latents are in the time. Picture i belongs to
    prompt i // images_per_prompt. progress: the bar's name (None: no bar). call: what the pipeline is told instead of guidance_scale.
    """
    pipe.set_progress_bar_config(disable=True)
    rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    for index in track(range(-(-len(rows) // batch)), progress or "", disable=progress is None):
        chunk = rows[index * batch : (index + 1) * batch]
        start = time.perf_counter()
        told = {"guidance_scale": guidance} if call is None else call
        generator = noise_generator(seed, index)
        with torch.random.fork_rng():  # what a pipeline does not draw from the generator it is given: the noise of flow schedulers
            torch.manual_seed(generator.initial_seed())
            images = pipe(prompt=chunk, num_inference_steps=steps, generator=generator, output_type="pt", **told).images
        images = images.float().cpu()
        yield images, (time.perf_counter() - start) / len(chunk)


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


# Measuring


@torch.no_grad()
def observe(images: Tensor, scorers: Mapping[str, CLIPScore], utility: Utility | None = None) -> dict[str, Tensor]:
    """All that the metrics need of pictures (B, 3, H, W): each scorer's unit image features (B, d) and the utility (B,)."""
    observed = {f"features/{name}": scorer.image_features(images).cpu() for name, scorer in scorers.items()}
    return observed if utility is None else observed | {"utility": utility(images).cpu()}


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
    for images, each in batches(pipe, prompts, images_per_prompt, **sampling):
        parts.append(observe(images.to(device), scorers, utility))
        seconds.append(each)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} | {"seconds": torch.tensor(seconds)}


def members(group: Tensor) -> Tensor:
    """Row numbers of each group's pictures, (P, G); group (N,) int64. Raises ValueError when groups differ in size."""
    count = torch.unique(group, return_counts=True)[1]
    if len(count.unique()) != 1:
        raise ValueError(f"every prompt needs the same number of pictures; found {int(count.min())} to {int(count.max())}")
    return torch.argsort(group, stable=True).view(len(count), -1)


def caption_scores(features: Tensor, scorer: CLIPScore, prompts: list[str], group: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each picture with its own prompt, and that score minus the mean over all other prompts, each (N,) float64.

    The mean is the expectation of a shuffle that never hands a picture its own caption back, without the shuffle's noise.
    features (N, d), unit; group (N,): the number of each picture's prompt.
    """
    scores = scorer.scale * (features.double() @ scorer.text_features(prompts).cpu().double().T)
    own = scores.gather(1, group[:, None])[:, 0]
    return own, own - (scores.sum(1) - own) / (len(prompts) - 1)


def measure(
    observed: dict[str, Tensor],
    prompts: list[str],
    group: Tensor,
    scorers: Mapping[str, CLIPScore],
    *,
    extractor: str,
    data: Tensor | None = None,
    teacher: Tensor | None = None,
    neighbours: int = NEIGHBOURS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Measured:
    """Every metric of a sample with its bootstrap interval, {name: {value, low, high}}.

    observed: what `observe` saw of N pictures; group (N,) int64: the number of each one's prompt among the P different
    `prompts`; extractor: the scorer whose features FD-clip, precision, recall and diversity use; data (M, d): FD-clip features of
    real pictures; teacher (N, d): those of the teacher's pictures of the same prompts, in the same order. Without them the
    metrics that need them are left out.

    Prompts are resampled, each with all its pictures, the teacher's too; data are held fixed. Raises ValueError for repeated
    prompts, groups of unequal size or of one, not more pictures than dimensions, and non-finite features.
    """
    if len(set(prompts)) != len(prompts) or len(prompts) < 2:
        raise ValueError(f"at least two prompts are needed, all different; got {len(set(prompts))} different of {len(prompts)}")
    if group.unique().tolist() != list(range(len(prompts))):
        raise ValueError(f"group must number the prompts 0 to {len(prompts) - 1}, each with at least one picture")
    rows = members(group)
    every = torch.arange(len(prompts))
    out: Measured = {}

    def add(name: str, statistic: Callable[[Tensor], float], *, centre: bool = False, bounds: tuple[float, float] = (-np.inf, np.inf)):
        low, high = np.clip(bootstrap(statistic, len(prompts), draws=draws, seed=seed, level=LEVEL, centre=centre), *bounds)
        out[name] = {"value": statistic(every), "low": float(low), "high": float(high)}

    def add_mean(name: str, values: Tensor):
        """values (N,): equal groups, so the mean over pictures is the mean over prompts of their means."""
        means = values.double()[rows].mean(1)
        add(name, lambda index: float(means[index].mean()))

    features = scaled(checked(observed[f"features/{extractor}"], "generated"))
    positive = (0, np.inf)
    if data is not None:
        frechet(data, features)  # refuses what has no covariance
        real = moments(data.double())

        def to_data(index: Tensor) -> float:
            return frechet_distance(*real, *moments(features[rows[index].flatten()]))

        add("fd_clip_data", to_data, centre=True, bounds=positive)
    if teacher is not None:
        if len(teacher) != len(features):
            raise ValueError(f"the teacher's sample must be of the same prompts: it has {len(teacher)} pictures, not {len(features)}")
        frechet(teacher, features)
        teacher = teacher.double()

        def to_teacher(index: Tensor) -> float:
            taken = rows[index].flatten()  # the same prompts from both, so that which prompts were drawn is no difference
            return frechet_distance(*moments(teacher[taken]), *moments(features[taken]))

        add("fd_clip_teacher", to_teacher, centre=True, bounds=positive)
    for name, scorer in scorers.items():
        own, above = caption_scores(observed[f"features/{name}"], scorer, prompts, group)
        add_mean(name, own)
        add_mean(f"{name}_over_shuffled", above)
    if "utility" in observed:
        add_mean("utility", observed["utility"])
    if data is not None:
        reference = checked(data, "reference")
        add_mean("precision", covered(features, reference, neighbours).any(1))
        held = covered(reference, features, neighbours)  # (M, N); the balls keep their radii when prompts are resampled
        add("recall", lambda index: float(held[:, rows[index].flatten()].any(1).double().mean()), centre=True, bounds=(0, 1))
    within = spread(features, group)
    add("diversity", lambda index: float(within[index].mean()))
    return out


def measure_cost(seconds: Tensor, steps: int, guidance: float, *, draws: int = DRAWS, seed: int = 0) -> Measured:
    """Network evaluations (exact) and seconds per image (median over batches, batches resampled); seconds (batches,)."""
    value = float(seconds.quantile(0.5))
    low, high = value, value
    if len(seconds) > 1:
        low, high = bootstrap(lambda index: float(seconds[index].quantile(0.5)), len(seconds), draws=draws, seed=seed, level=LEVEL)
    evaluations = float(network_evaluations(steps, guidance))
    return {
        "network_evaluations": {"value": evaluations, "low": evaluations, "high": evaluations},
        "seconds_per_image": {"value": value, "low": low, "high": high},
    }


# The teacher's samples, kept


def read(path: Path) -> dict[str, Tensor] | None:
    """A kept sample, or None when there is none; a damaged one is passed over with a warning."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path}: damaged, drawn again ({error})", stacklevel=2)
        return None


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name beside its own, then rename: a reader sees the old or the new, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def keep(path: Path, observed: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Keep a sample's features, scores and times at `path`, and beside it, in JSON, what they were measured on."""
    replace(path.with_suffix(".json"), lambda temporary: temporary.write_text(json.dumps(note, indent=1)))
    replace(path, lambda temporary: save_file({name: tensor.contiguous() for name, tensor in observed.items()}, temporary))


# The samples that ship with a teacher


def teacher_rows(steps: int, guidance: float, seed: int) -> list[dict[str, Any]]:
    """The teacher's samples of an evaluation: many steps, `steps` with each of SOLVERS, and the one that distances are taken to."""
    few = {"steps": steps, "guidance": guidance, "seed": seed}
    many = few | {"steps": TEACHER_STEPS}
    rows = [{"name": f"teacher, {TEACHER_STEPS} steps", "solver": "its own", **many}]
    rows += [{"name": f"teacher, {steps} steps, {name}", "solver": name, **few} for name in SOLVERS]
    return [*rows, {"name": f"teacher, {TEACHER_STEPS} steps, second sample", "solver": "its own", **many, "seed": seed + 1}]


def schedulers_of(pipe: Any) -> dict[str, Any]:
    """A pipeline's own scheduler and each of SOLVERS on its schedule, by name."""
    schedule = dict(pipe.scheduler.config)
    return {"its own": pipe.scheduler} | {name: solver(name, schedule) for name in SOLVERS}


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
    """SHA-256 of the source file that defines a utility."""
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


def check(prompts: list[str], images_per_prompt: int, scorers: Mapping[str, CLIPScore], extractor: str, data: Tensor | None) -> None:
    """Raise ValueError, before anything slow, for what could only fail at the end."""
    if extractor not in scorers:
        raise ValueError(f"extractor {extractor!r} is not among the scorers: {', '.join(scorers) or 'none given'}")
    if len(prompts) < 2 or len(set(prompts)) != len(prompts):
        repeated = "".join(f"; {prompt!r} is repeated" for prompt in list(dict.fromkeys(prompts)) if prompts.count(prompt) > 1)
        raise ValueError(f"evaluation needs at least two prompts, all different{repeated}")
    if images_per_prompt < 2:
        raise ValueError(f"images_per_prompt must be at least 2 (diversity compares pictures of one prompt), got {images_per_prompt}")
    width = scorers[extractor].model.config.projection_dim
    if len(prompts) * images_per_prompt <= width:
        raise ValueError(
            f"{len(prompts)} prompts x {images_per_prompt} pictures = {len(prompts) * images_per_prompt}, but the Frechet distance of "
            f"{width}-dimensional features needs more than {width}: more prompts or more images_per_prompt"
        )
    if data is not None and (data.shape[1] != width or len(data) <= width):
        raise ValueError(f"features of real pictures must be (more than {width}, {width}) for {extractor!r}, got {tuple(data.shape)}")


def evaluate(
    student: str | Path,
    *,
    teacher: str | Path,
    prompts: list[str],
    scorers: Mapping[str, CLIPScore],
    extractor: str,
    utility: Utility | None = None,
    data: Tensor | None = None,
    neighbours: int = NEIGHBOURS,
    steps: int = 4,
    guidance: float = 3.0,
    images_per_prompt: int = 4,
    seed: int = 0,
    batch: int = BATCH,
    device: str = "cpu",
    draws: int = DRAWS,
    cache: str | Path | None = None,
    shipped: Path | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a student of `steps` steps beside its teacher at 28 steps and at `steps` with each of SOLVERS.

    student, teacher: diffusers folders or hub ids. guidance: the teacher's, in all its rows; the student has none (1).
    scorers: name -> scorer; extractor: the one whose features FD-clip uses; utility: pictures -> (B,); data: FD-clip features
    (M, d) of real pictures, without which the metrics that need them are left out;
    neighbours: k of precision and recall. cache: a folder that keeps the teacher's
    features, scores and times by the content of teacher, scorers and protocol; its use is said. shipped: a folder that `ship` filled:
    a sample found there is not drawn, only timed over a few batches.

    Returns {"protocol", "interval", "student", "teacher", "rows", "best_solver"}: each row has name, solver, steps, guidance, seed, n,
    sample (drawn, kept or shipped) and metrics (see `measure`); best_solver names the few-step teacher nearest to the teacher.
    """
    check(prompts, images_per_prompt, scorers, extractor, data)
    own, original = open_pipeline(student, device), open_pipeline(teacher, device)
    schedulers = schedulers_of(original)
    protocol = Protocol(
        prompts=sha256(prompts),
        n=len(prompts) * images_per_prompt,
        images_per_prompt=images_per_prompt,
        seeds={"rows": seed, "reference": seed + 1},
        batch=batch,
        extractor=extractor,
        scorers={name: fingerprint(scorer.model) for name, scorer in scorers.items()},
        utility=utility_hash(utility),
        data=None if data is None else {"n": len(data), "sha256": sha256(data.tolist())},
        neighbours=neighbours,
        resolution=resolution(original),
        device=device_name(device),
        versions={package: version(package) for package in ("torch", "diffusers", "transformers", "fewstep")},
    )
    identity = {"student": pipeline_fingerprint(own), "teacher": pipeline_fingerprint(original)}

    content = content_of(original, prompts, images_per_prompt, batch, scorers, utility)

    def draw(pipe: Any, row: dict[str, Any], some: list[str]) -> dict[str, Tensor]:
        sampling = {key: row[key] for key in ("steps", "guidance", "seed")}
        bar = row["name"] if progress else None
        return observe_sample(pipe, some, images_per_prompt, scorers, utility, device=device, **sampling, batch=batch, progress=bar)

    def teacher_sample(row: dict[str, Any], *, timed: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(the row, saying where its sample came from; what was observed): shipped, kept from before, or drawn now."""
        original.scheduler = schedulers[row["solver"]]
        found = read(shipped_path(shipped, row, content)) if shipped else None
        if found is not None:
            seen = {name: value.float() for name, value in found.items()}
            if timed:
                seen["seconds"] = draw(original, row, prompts[: -(-TIMED * batch // images_per_prompt)])["seconds"]
            return row | {"sample": "shipped"}, seen
        # the features of real pictures play no part in a sample
        note = {"teacher": identity["teacher"], "protocol": protocol.stamp() | {"data": None, "neighbours": None}, "row": row}
        path = Path(cache) / f"{sha256(note)}.safetensors" if cache else None
        kept = read(path) if path else None
        if kept is not None:
            say(f"{row['name']}: read from {path}")
            return row | {"sample": "kept"}, kept
        seen = draw(original, row, prompts)
        if path:
            keep(path, seen, note)
        return row | {"sample": "drawn"}, seen

    row = {"name": f"student, {steps} steps", "solver": "its own", "steps": steps, "guidance": 1.0, "seed": seed}
    samples = [(row | {"sample": "drawn"}, draw(own, row, prompts))]
    *shown, last = teacher_rows(steps, guidance, seed)
    samples += [teacher_sample(row) for row in shown]
    _, reference = teacher_sample(last, timed=False)

    group = torch.arange(len(prompts)).repeat_interleave(images_per_prompt)
    compared = {"extractor": extractor, "data": data, "neighbours": neighbours, "teacher": scaled(reference[f"features/{extractor}"])}
    rows = []
    for row, observed in samples:
        metrics = measure(observed, prompts, group, scorers, **compared, draws=draws) | measure_cost(
            observed["seconds"], row["steps"], row["guidance"], draws=draws
        )
        rows.append(row | {"n": protocol.n, "metrics": metrics})
    best = min(rows[2:], key=lambda row: row["metrics"]["fd_clip_teacher"]["value"])
    return {
        "protocol": protocol.stamp(),
        "interval": {"level": LEVEL, "draws": draws, "resampled": "prompts"},
        **identity,
        "rows": rows,
        "best_solver": best["name"],
    }


# Showing


def cell(measured: dict[str, float] | None) -> str:
    """`value [low, high]`, to four digits; the value alone where it is exact."""
    if measured is None:
        return "-"
    value, low, high = (f"{measured[key]:.4g}" for key in ("value", "low", "high"))
    return value if measured["low"] == measured["high"] else f"{value} [{low}, {high}]"


def columns(report: dict[str, Any]) -> list[str]:
    """Names of the report's samples, the best few-step teacher marked."""
    return [row["name"] + (" (best)" if row["name"] == report["best_solver"] else "") for row in report["rows"]]


def as_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(metric, one cell for each of `columns`), in a fixed order."""
    names = list(report["rows"][0]["metrics"])
    return [(LABELS.get(name, name), [cell(row["metrics"].get(name)) for row in report["rows"]]) for name in names]


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    protocol, level = report["protocol"], report["interval"]["level"]
    seeds = f"seed {protocol['seeds']['rows']}, teacher's reference sample {protocol['seeds']['reference']}"
    title = f"n = {protocol['n']} ({protocol['images_per_prompt']} per prompt), {seeds}, {level:.0%} intervals over prompts"
    table = Table("", *columns(report), title=title)
    for name, cells in as_rows(report):
        table.add_row(name, *cells)
    return table


def save(report: dict[str, Any], path: str | Path) -> None:
    """Write the report as JSON, atomically."""
    replace(Path(path), lambda temporary: temporary.write_text(json.dumps(report, indent=1)))
