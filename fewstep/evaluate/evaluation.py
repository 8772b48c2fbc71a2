"""What a number was measured on, and how: a student beside its teacher, in stock diffusers.

Every row is a sample of the same prompts with the same seed, drawn through the pipeline's own call. Its distance to the
teacher is taken to a second sample of the teacher (another seed, as many steps), so the teacher's own row shows the floor.
Samples are drawn part by part and only what is seen of them is kept, so that one of any size can be stopped, gone on with, and
shared among processes.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from fewstep.disk import clear, replace_text
from fewstep.evaluate.configs import pipeline_config
from fewstep.evaluate.distances import FeatureSet, bootstrap
from fewstep.evaluate.drawing import (
    BATCH,
    NO_ONE_STEP,
    Noise,
    Source,
    batches,
    draws_in,
    network_evaluations,
    opened,
    schedulers_of,
    teacher_rows,
)
from fewstep.evaluate.features import PATCH, Extractor, of_scorer
from fewstep.evaluate.measure import (
    BLOCKS,
    DRAWS,
    LEVEL,
    NEIGHBOURS,
    Measured,
    check_names,
    jackknifed,
    measure,
    paired,
    real_pictures,
    told_apart,
)
from fewstep.evaluate.pictures import Pictures
from fewstep.evaluate.pictures import features as features_of
from fewstep.evaluate.protocol import (
    Protocol,
    config_of,
    device_name,
    identity_of,
    in_words,
    pipeline_fingerprint,
    preparation,
    utility_hash,
    version,
)
from fewstep.evaluate.samples import (
    COST,
    Drawing,
    Judge,
    Sampler,
    Seen,
    Utility,
    content_of,
    looks,
    shipped_path,
    timing,
)
from fewstep.evaluate.sets import PromptSet
from fewstep.evaluate.store import fingerprint, read, sha256
from fewstep.models import steps_in
from fewstep.rewards.clip import CLIPScore

TIMED = 4  # batches drawn to time a teacher whose sample came with it
SHOWN = 3  # repeated prompts that an error names


def measure_cost(seconds: Tensor, evaluations: float, *, draws: int = DRAWS) -> Measured:
    """Network evaluations per image (exact) and seconds per image (median over batches, batches resampled); seconds (batches,)."""
    value = float(seconds.quantile(0.5))
    low, high = value, value
    if len(seconds) > 1:
        low, high = bootstrap(lambda index: float(seconds[index].quantile(0.5)), len(seconds), draws=draws, seed=0, level=LEVEL)
    return {
        "network_evaluations": {"value": evaluations, "low": evaluations, "high": evaluations},
        "seconds_per_image": {"value": value, "low": low, "high": high},
    }


def check(
    prompts: Sequence[str],
    images_per_prompt: int,
    scorers: Mapping[str, CLIPScore],
    extractor: str | None,
    data: Tensor | Pictures | None,
    *,
    repeats: bool,
) -> None:
    """Raise ValueError, before anything slow, for what could only fail at the end."""
    if extractor is not None and extractor not in scorers:
        raise ValueError(f"extractor {extractor!r} is not among the scorers: {', '.join(scorers) or 'none given'}")
    if len(set(prompts)) < 2 or (len(set(prompts)) != len(prompts) and not repeats):
        repeated = [prompt for prompt, times in Counter(prompts).items() if times > 1]
        told = "".join(f"; {prompt!r} is repeated" for prompt in repeated[:SHOWN])
        rest = f"; and {len(repeated) - SHOWN} more" if len(repeated) > SHOWN else ""
        raise ValueError(f"evaluation needs at least two prompts, all different{told}{rest}")
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
    if isinstance(data, Pictures) and data.n <= width:
        raise ValueError(
            f"data: {real_pictures(data.n)}, but the Frechet distance of {width}-dimensional features needs more than {width}: give more"
        )


def evaluate(
    student: str | Path | Callable[[], Source],
    *,
    teacher: str | Path | Callable[[], Source] | None = None,
    prompts: list[str] | PromptSet,
    scorers: Mapping[str, CLIPScore],
    extractor: str | None = None,
    extractors: Sequence[Extractor] = (),
    judges: Mapping[str, Judge] | None = None,
    judge_files: Mapping[str, str] | None = None,
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
    """Measure a student of `steps` steps beside its teacher at many steps and at `steps` with each of SOLVERS. A teacher that is itself a
    student of K steps is drawn at those alone, without guidance.

    student, teacher: diffusers folders, hub ids, or functions that open a Source; without a teacher the student stands alone.
    guidance: the teacher's, in all its rows; the student has its source's, 1 where it is told none. prompts: a PromptSet's may come more
    than once.
    scorers: name -> scorer; judges: name -> any other reward; judge_files: path/to/file.py:function of those that were named so; utility:
    pictures -> (B,); extractor: the scorer whose features FD-clip uses; extractors: others; data: real pictures, or their FD-clip features
    (M, d), without which the metrics that need them are left out; neighbours: k of precision and recall. noise: a picture's own, or, as
    samples that ship were drawn, that of its batch.
    work, cache: folders that keep what was seen of the student's and of the teacher's pictures, and of real ones, by the content of
    pipeline and protocol, what each scorer, judge and extractor sees apart from the others; their use is said. A sample that is there in
    part is gone on with, and one that lacks a judge is drawn again for that judge alone. shipped: a folder that `ship`
    filled: a sample found there is not drawn, only timed over a few batches. share (i, n): draw the i-th of n shares of every sample,
    measure nothing and return None. keep_images: a folder for the pictures themselves, each sample's in one of its own.

    Returns {"protocol", "interval", "student", "teacher", "configs", "rows", "paired", "best_solver", "left_out"}: student and teacher are
    SHA-256 of their weights, configs those of their configurations; each row has name, solver, steps, guidance, seed, n, sample (drawn,
    kept or shipped), device, timed (what its seconds per image belong to, see `timing`), metrics (see `measure`) and, where there are
    judges, what `asked_of` counts of each; paired: of the student minus the teacher at many steps (see `paired`), None without a teacher;
    best_solver names the few-step teacher nearest to the teacher, None where no distance is measured; left_out says of metrics why there
    are none.
    """
    named = prompts if isinstance(prompts, PromptSet) else None
    texts = named.prompts if named else list(prompts)
    judges = judges or {}
    check(texts, images_per_prompt, scorers, extractor, data, repeats=named is not None)
    used = told_apart(([of_scorer(extractor, scorers[extractor])] if extractor else []) + list(extractors))
    check_names(used, scorers, judges, shared=extractor is not None)
    own = opened(student, device)
    left_out: dict[str, str] = {}
    if min(own.size) < PATCH and any(e.frechet.startswith("patch_fid") for e in used):
        left_out["patch-FID"] = f"pictures of {own.size[0]} x {own.size[1]} hold no crop of {PATCH} pixels"
        used = [e for e in used if not e.frechet.startswith("patch_fid")]
    if extractors or judges or noise != "batch" or precision != "fp32":
        shipped = None  # what ships was drawn and seen without these
    drawn_by = {package: version(package) for package in ("torch", "diffusers", "transformers", "fewstep")}
    reads = extractors or isinstance(data, Pictures)
    seen_by = {package: version(package) for package in ("torch-fidelity", "pillow")} if reads else {}
    configs = {e.name: e.config for e in used} | {name: config_of(holder) for name, holder in [*scorers.items(), *judges.items()]}
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
        | {name: identity_of(judge, (judge_files or {}).get(name)) for name, judge in judges.items()},
        configs={name: config for name, config in configs.items() if config is not None},
        preprocess={name: preparation(scorer) for name, scorer in scorers.items()},
        utility=utility_hash(utility),
        data=data.identity if isinstance(data, Pictures) else None if data is None else {"n": len(data), "sha256": sha256(data.tolist())},
        neighbours=neighbours,
        resolution=own.size[0] if own.size[0] == own.size[1] else list(own.size),
        precision=precision,
        device=device_name(device),
        versions=drawn_by | seen_by,
    )

    seeing, ids = looks(scorers, utility, judges, used), named.ids if named else None
    drawing = Drawing(texts, ids, images_per_prompt, noise, batch, seeing, judges, device, progress)
    # neither what is compared with, the machine, who looks at them nor what the prompts' file is called decide a sample's pictures; its own
    # seed is in its row
    others = ("data", "neighbours", "device", "extractor", "extractors", "scorers", "configs", "preprocess", "utility", "set", "seeds")
    common = protocol.stamp() | dict.fromkeys(others) | {"versions": drawn_by}
    sampler = Sampler(drawing, deciding(protocol, scorers, list(judges), seen_by), common, keep_images, share, say)

    size = drawing.part_size()
    parts = -(-drawing.n // size)
    if parts < share[1]:
        held = f"{drawing.n} pictures are {parts} part{'s' if parts > 1 else ''} of up to {size}"
        say(f"{held}, and a part is drawn by one process: {share[1] - parts} of {share[1]} draw nothing")
    with tempfile.TemporaryDirectory() as scratch:
        own_folder, folder = Path(work or scratch), Path(cache or scratch)
        for kept in (own_folder, folder):
            clear(kept)
        identity, pipe_configs = {"student": pipeline_fingerprint(own.pipe)}, {"student": pipeline_config(own.pipe)}
        row = {"name": f"student, {steps} steps", "solver": "its own", "steps": steps, "guidance": own.guidance, "seed": seed}
        samples = [sampler.collect(own, row, identity | {"config": pipe_configs["student"]}, own_folder)]
        del own
        reference: Seen | None = None
        if teacher is not None:
            beside = draw_teacher(
                teacher, sampler, folder, scorers, utility, steps=steps, many=teacher_steps, guidance=guidance, seed=seed, shipped=shipped,
                wanted=[f"features/{e.name}" for e in used],
            )  # fmt: skip
            samples, reference = samples + beside.samples, beside.reference
            identity["teacher"], pipe_configs["teacher"] = beside.stamp["pipeline"], beside.stamp["config"]
            protocol = dataclasses.replace(protocol, teacher=beside.stamp)
        real = None if data is None else {used[0].name: data}
        if isinstance(data, Pictures):
            # what is kept of real pictures is named by how they were brought to size, which a scorer's own stamp says elsewhere
            by_name = {e.name: e._replace(resize=in_words(scorers[e.name].preprocess)) if e.name in scorers else e for e in used}
            told = {"batch": batch, "device": device, "share": share, "progress": progress}
            made_by = {package: v for package, v in (drawn_by | seen_by).items() if package != "diffusers"}  # which draws, and no more
            real = features_of(data, by_name, folder, versions=made_by, **told)
        if share != (0, 1):
            say(f"share {share[0]} of {share[1]} is drawn. When all are, the same call without a share measures")
            return None
        against = {"extractors": used, "neighbours": neighbours, "repeats": named is not None, "device": device}
        if real is not None:
            against["data"] = {name: FeatureSet(features) for name, features in real.items()}
        if reference is not None:
            against["teacher"] = {e.name: FeatureSet(e.for_distances(reference[f"features/{e.name}"])) for e in used}
        rows, singles = measured_rows(samples, drawing, scorers, left_out=left_out, draws=draws, **against)
    differing = paired(*singles[:2], draws=draws) if teacher is not None else {}  # the teacher's sample has the student's seed
    n_real = 0 if data is None else data.n if isinstance(data, Pictures) else len(data)
    by_blocks = jackknifed(protocol.n, len(texts), n_real, used, list(rows[0]["metrics"]))
    return {
        "protocol": protocol.stamp(),
        "interval": {"level": LEVEL, "draws": draws, "resampled": "prompts"}
        | ({"jackknife": {"blocks of prompts": min(BLOCKS, len(texts)), "metrics": by_blocks}} if by_blocks else {}),
        **identity,
        "configs": pipe_configs,
        "rows": rows,
        "paired": {"of": rows[0]["name"], "minus": rows[1]["name"], "metrics": differing} if differing else None,
        "best_solver": nearest_to_teacher(rows[2:]),
        "left_out": left_out,
    }


def deciding(protocol: Protocol, scorers: Mapping[str, CLIPScore], judges: Sequence[str], seen_by: dict[str, str]) -> dict[str, Any]:
    """Look -> what of the protocol decides what it sees of a picture. seen_by: versions of what brings pictures to the extractors."""
    found: dict[str, Any] = {COST: None}
    config = protocol.configs.get
    found |= {f"features/{name}": [protocol.scorers[name], config(name), protocol.preprocess[name]] for name in scorers}
    found |= {f"features/{name}": [of, config(name), seen_by] for name, of in protocol.extractors.items() if name not in scorers}
    found |= {f"score/{name}": [protocol.scorers[name], config(name)] for name in judges}
    return found | ({"utility": protocol.utility} if protocol.utility is not None else {})


class Beside(NamedTuple):
    """A teacher's samples of an evaluation."""

    samples: list[tuple[dict[str, Any], Seen | None]]
    reference: Seen | None  # its second sample, which distances are taken to
    stamp: dict[str, Any]  # as a protocol's `teacher`


def draw_teacher(
    teacher: str | Path | Callable[[], Source],
    sampler: Sampler,
    folder: Path,
    scorers: Mapping[str, CLIPScore],
    utility: Utility | None,
    *,
    steps: int,
    many: int | None,
    guidance: float,
    seed: int,
    shipped: Path | None,
    wanted: Sequence[str],
) -> Beside:
    """A teacher at `many` steps (None: the default, or its own where it is itself a student) and at the student's with each solver.

    wanted: looks that distances are taken by; without any there is no second sample. Raises ValueError for `many` steps that a teacher
    which is itself a student does not have, and for a single one that its scheduler has no time for.
    """
    original, drawing = opened(teacher, sampler.drawing.device), sampler.drawing
    schedulers = schedulers_of(original.pipe)
    few_step = [name for name in schedulers if name != "its own"] or ["its own"]
    made_for = steps_in(original.pipe.scheduler.config)
    if made_for is not None:
        if many not in (None, made_for):
            raise ValueError(f"teacher_steps: the teacher is itself a student of {made_for} steps and has no other, got {many}")
        many, guidance, few_step = made_for, 1.0, []
    elif many is not None and not draws_in(original.pipe.scheduler.config, many):
        raise ValueError(f"teacher_steps: the teacher is not drawn at {many}: {NO_ONE_STEP}; give 2 or more")
    elif not draws_in(original.pipe.scheduler.config, steps):
        sampler.say(f"the teacher has no row at {steps} step: {NO_ONE_STEP}")
        few_step = []
    *shown, last = teacher_rows(steps, guidance, seed, many=many, solvers=few_step)
    weights, config = pipeline_fingerprint(original.pipe), pipeline_config(original.pipe)
    stamp = {"pipeline": weights, "config": config, "steps": last["steps"], "guidance": guidance, "call": original.call(guidance)}
    ships = content_of(original.pipe, drawing.prompts, drawing.images_per_prompt, drawing.batch, scorers, utility) if shipped else {}

    def sample(row: dict[str, Any], sampler: Sampler, *, timed: bool = True) -> tuple[dict[str, Any], Seen | None]:
        """As `collect`, of a row's solver; a shipped sample is timed here."""
        original.pipe.scheduler = schedulers[row["solver"]]
        found = read(shipped_path(shipped, row, ships)) if shipped else None
        if found is None:
            return sampler.collect(original, row, {"teacher": weights, "config": config}, folder)
        seen = {name: value.float() for name, value in found.items()}
        if timed:
            seen["seconds"] = time_batches(original, row, drawing)
        device = device_name(drawing.device)
        return row | {"sample": "shipped", "device": device, "timed": timing([device], [str(drawing.together())])}, seen

    samples, reference = [sample(row, sampler) for row in shown], None
    if wanted:  # distances alone are taken to the second sample: no judge is asked about it
        looked = {name: sampler.decided[name] for name in (COST, *wanted)}
        _, reference = sample(last, dataclasses.replace(sampler, decided=looked), timed=False)
    return Beside(samples, reference, stamp)


def time_batches(source: Source, row: dict[str, Any], drawing: Drawing) -> Tensor:
    """Seconds per image (batches,) of a few batches of a row whose sample came with its teacher."""
    few = drawing.prompts[: -(-TIMED * drawing.batch // drawing.images_per_prompt)]
    sampling = {"steps": row["steps"], "guidance": row["guidance"], "seed": row["seed"], "batch": drawing.batch}
    told, bar = source.call(row["guidance"]), row["name"] if drawing.progress else None
    drawn = batches(source.pipe, few, drawing.images_per_prompt, **sampling, progress=bar, call=told)
    return torch.tensor([seconds for _, seconds in drawn])


def measured_rows(
    samples: Sequence[tuple[dict[str, Any], Seen | None]],
    drawing: Drawing,
    scorers: Mapping[str, CLIPScore],
    *,
    left_out: dict[str, str],
    draws: int,
    **against: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(each sample's row with its metrics, what `paired` takes of it). left_out is added to; against: as `measure` takes it."""
    rows, singles, lacking = [], [], {}
    for row, seen in track(samples, "measuring", disable=not drawing.progress):
        assert seen is not None
        sights = {name: values for name, values in seen.items() if name.startswith(("features/", "score/", "utility"))}
        found = measure(sights, drawing.prompts, drawing.images_per_prompt, scorers, **against, draws=draws)
        singles.append(found.singles)
        for name, why in found.left_out.items():
            lacking.setdefault(name, {})[row["name"]] = why
        made = float(network_evaluations(row["steps"], row["guidance"]))
        if "evaluations" in seen:  # those of every part, as they were made
            made = float(seen["evaluations"][:].sum()) / drawing.n
        rows.append(row | {"n": drawing.n, "metrics": found.metrics | measure_cost(seen["seconds"][:], made, draws=draws)})
    for name, whys in lacking.items():  # of every row alike, or of some
        alike = len(whys) == len(rows) and len(set(whys.values())) == 1
        left_out[name] = next(iter(whys.values())) if alike else "; ".join(f"{why} ({row})" for row, why in whys.items())
    return rows, singles


NEAREST = ("fid_teacher", "fd_clip_teacher", "kid_teacher", "cmmd_teacher")


def nearness(metrics: Measured) -> float | None:
    """The first distance to the teacher there is; None without any."""
    named = [name for name in metrics if name.startswith("fd_") and name.endswith("_teacher")]
    return next((metrics[name]["value"] for name in [*NEAREST, *named] if name in metrics), None)


def nearest_to_teacher(rows: Sequence[dict[str, Any]]) -> str | None:
    """Name of the row that is nearest to the teacher; None where no distance says which."""
    distances = {row["name"]: nearness(row["metrics"]) for row in rows}
    known = {name: distance for name, distance in distances.items() if distance is not None}
    return min(known, key=known.__getitem__) if known else None


def save(report: dict[str, Any], path: str | Path) -> None:
    """Write the report as JSON, atomically. Raises ValueError for a number that is not finite: JSON has none."""
    try:
        text = json.dumps(report, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not saved, the report holds a number that is not finite ({error})") from error
    replace_text(Path(path), text)
