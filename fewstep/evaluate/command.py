"""`fewstep evaluate`: flags to what `evaluation.evaluate` is told."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.composition import resolve_teacher, unknown_judge
from fewstep.disk import cache_folder, check_cache, check_writable
from fewstep.errors import NumericalError, UserError
from fewstep.flags import is_student_folder, student_config, student_parser, table_flags
from fewstep.launch import launched

if TYPE_CHECKING:
    from fewstep.config import Config


def world_instruments(device: str) -> dict[str, Any]:
    """What `evaluation.evaluate` is told where the teacher is the embedded one: its scorers, prompts, data, and its samples that ship."""
    from safetensors.torch import load_file

    from fewstep import world
    from fewstep.world.utility import gold_utility

    return {
        "prompts": world.prompts("evaluate"), "images_per_prompt": world.IMAGES_PER_PROMPT, "scorers": world.load_scorers(device=device),
        "extractor": "clip-heldout", "utility": gold_utility, "data": load_file(world.ASSETS / "features.safetensors")["heldout"].float(),
        "neighbours": world.NEIGHBOURS, "noise": "batch", "shipped": world.SAMPLES,
    }  # fmt: skip


def student_scale(folder: Path, config: Config | None, given: float | None, *, name: Path) -> float | None:
    """The guidance scale that a student is told in its pictures: the one given, else its config's; None where one is distilled in.

    folder: with its configurations; name: what it was called. Raises UserError for a scale outside of the range that the student was
    trained in, and where nothing says which to take.
    """
    from fewstep.models import folder_keeps_guidance

    within = config.matching.guidance_range if config else None
    if within is None and not folder_keeps_guidance(folder):
        return None
    if within is None and given is None:
        raise UserError(f"--guidance: missing; {name} is told its scale, and nothing there says in which range it was trained")
    if given is None:
        return config.student_guidance()
    low, high = within or (1, sys.float_info.max)
    if not low <= given <= high:
        said = f"from {low:g} to {high:g}, the range that it was trained in" if within else "of 1 or more"
        raise UserError(f"--guidance: this student takes a scale {said}; got {given:g}")
    return given


def student_steps(given: int | None, made_for: int | None) -> int:
    """The steps that a student is drawn at: those it was made for, or the ones given where it does not say. Raises UserError."""
    steps = made_for if given is None else given
    if steps is None:
        raise UserError("--steps: missing; the student does not say how many steps it was made for")
    if made_for not in (None, steps):
        raise UserError(f"--steps: this student was made for {made_for} steps, not {steps}")
    return steps


def on_hub(name: str, *, weights: bool = False) -> tuple[str, Path]:
    """(a student's hub id with its commit, folder with its configurations, and its weights where they are asked for). Raises UserError."""
    from fewstep import models

    try:
        models.pipeline_class(name)  # is it there, and a pipeline that is known, before gigabytes come
        name = models.pinned(name)
        return name, Path(models.snapshot(name, (*models.CONFIGURATIONS, *["*/*.safetensors"] * weights)))  # no other format, and no pickle
    except models.UnsupportedTeacher as error:
        raise UserError(str(error)) from error


def source_of(
    name: str,
    size: tuple[int, int] | None,
    *,
    device: str,
    precision: str,
    student: bool,
    scale: float | None = None,
    negative_prompt: str = "",
) -> Any:
    """What opens a pipeline to draw with, through its family: a student without guidance, a teacher with it, unless it is a student too.
    scale: that a student is told which keeps guidance as a knob; negative_prompt: what a teacher's guidance leads away from."""

    def opened() -> Any:
        import torch

        from fewstep import models
        from fewstep.evaluate.drawing import Source

        backbone = models.load(name, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        told = backbone.told_size(size)
        unguided = student or models.steps_in(backbone.pipe.scheduler.config) is not None

        def call(guidance: float) -> dict[str, Any]:
            return (backbone.student_told(scale) if unguided else backbone.teacher_call(guidance, negative_prompt)) | told

        return Source(backbone.pipe.to(device), call, (told["height"], told["width"]), 1.0 if scale is None else scale)

    return opened


def measure_student(
    student: str | Path,
    teacher: str | None,
    size: tuple[int, int] | None,
    *,
    output: Path,
    scale: float | None = None,
    negative_prompt: str = "",
    **told: Any,
) -> dict[str, Any] | None:
    """Measure a student as `evaluation.evaluate` is told; saves the report, prints its table and returns it, or None where only a share
    was drawn. size, scale, negative_prompt: as of `source_of`; told: what the caller gives beside the embedded world's own."""
    from rich.console import Console

    from fewstep.evaluate import evaluation, tables

    if "device" not in told:
        told["device"] = evaluation_device()
    device, precision = told["device"], told.setdefault("precision", "fp32")
    opening = {"device": device, "precision": precision}
    own = world_instruments(device) if teacher == str(resolve_teacher("world")) else {"noise": "picture", "scorers": {}}
    if "data" in told:
        own.pop("neighbours", None)  # the embedded world's are for its own pictures
    if negative_prompt:
        own.pop("shipped", None)  # drawn without
    told = own | told | {"scorers": own["scorers"] | told.get("scorers", {})}
    report = evaluation.evaluate(
        source_of(str(student), size, student=True, scale=scale, **opening),
        teacher=source_of(teacher, size, student=False, negative_prompt=negative_prompt, **opening) if teacher else None,
        cache=cache_folder("evaluate"),
        **told,
    )
    if report is not None:
        evaluation.save(report, output)
        Console(width=None if sys.stdout.isatty() else 200).print(tables.as_table(report))
    return report


def evaluation_device() -> str:
    """A GPU, each process of a torchrun its own, or the CPU. Raises UserError for a process without a GPU where there are any."""
    import torch

    from fewstep.ranks import own_gpu

    if not torch.cuda.is_available():
        return "cpu"
    own = own_gpu()
    torch.cuda.set_device(own)  # a judge's own .cuda() goes there too
    return f"cuda:{own}"


def load_judges(named: dict[str, str | None], *, device: str, in_world: bool, timeout: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(judges that are a CLIP, by name; any other rewards as functions of pictures and prompts). Raises UserError naming the flag.

    timeout: as `remote.timeout` of a run.
    """
    from fewstep import world
    from fewstep.evaluate.measure import is_reserved
    from fewstep.rewards import REWARDS, sources
    from fewstep.rewards.address import is_remote
    from fewstep.rewards.clip import CLIPScore

    scorers, others = {}, {}
    for name, source in named.items():
        if is_reserved(name):
            raise UserError(f"judge.{name}: another number of the report has this name, or one like it; give the judge another")
        if name not in REWARDS and not (sources.is_code(source) or is_remote(source)):
            raise UserError(unknown_judge(name))
        try:
            judge = sources.open_judge(name, source, assets=world.ASSETS if in_world else None, device=device, timeout=timeout)
        except (OSError, ValueError) as error:
            raise UserError(f"judge.{name}: {error}") from error
        reward = getattr(judge, "__self__", None)  # of a named one
        if isinstance(reward, CLIPScore):
            scorers[name] = reward
        else:
            others[name] = judge
    return scorers, others


def share_of(text: str | None) -> tuple[int, int]:
    """(i, n) of --shard i/n, or of a torchrun's processes. Raises UserError."""
    if text is None:
        return launched()
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"--shard: i/n, the i-th of n shares counted from 0, as 0/4; got {text!r}")
    return int(i), int(n)


def processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_options(arguments: list[str]) -> Any:
    """The flags, with `extractor` and `judge` as tables of name -> source. Raises UserError."""
    from fewstep.config import RemoteConfig

    tables, arguments = table_flags(arguments, ("extractor", "judge"))
    parser = student_parser(
        "evaluate",
        "Measure a student beside its teacher: distances of features (--extractor.NAME [SOURCE]: inception, clip, or a name of your own "
        "for a vision model's folder or hub id or path/to/file.py:function), "
        "rewards as judges (--judge.NAME [SOURCE]), cost. See docs/evaluation.md.",
        on_hub=True,
    )
    parser.add_argument(
        "--against", metavar="TEACHER", help="a diffusers folder, a hub id, world, or none (default: the run's own teacher)"
    )
    parser.add_argument("--data", metavar="FOLDER", help="real pictures: a folder, or owner/name[@revision][:split] on the hub")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts, a set's NAME, NAME=FILE, or owner/name[:split] on the hub")
    parser.add_argument("--images-per-prompt", type=int, help="pictures for each prompt (default: the set's; 8 in the embedded world)")
    parser.add_argument("--steps", type=int, help="the student's steps (default: those it was made for)")
    parser.add_argument("--teacher-steps", type=int, help="the teacher's own steps (default 28; of a student as teacher its own)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="the teacher's guidance scale, and that of a student with a range (default: the run's, or its family's)",
    )
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="what the teacher's guidance leads away from (default: the run's; \"\": nothing of its own)",
    )
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help="of all pictures, in pixels (default: the run's, or the network's own)")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="bring pictures to this square before an extractor sees them")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows; the teacher's reference sample uses the next")
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn at a time (default 16)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the pipelines")
    default = f"{RemoteConfig().timeout:g}"
    parser.add_argument(
        "--remote.timeout", dest="timeout", type=float, metavar="SECONDS", help=f"of a judge's server (default: the run's, or {default})"
    )
    parser.add_argument("--shard", metavar="I/N", help="draw only this share; a last call without it measures (torchrun does both)")
    parser.add_argument("--keep-images", type=Path, metavar="FOLDER", help="keep the pictures themselves too")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], metavar="REPORT", help="show other reports in one table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the report (default: evaluation.json in the student's folder)")
    options = parser.parse_args(arguments)
    options.extractor, options.judge = tables["extractor"], tables["judge"]
    for name in ("images_per_prompt", "steps", "teacher_steps", "resize", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")
    if options.seed < 0:
        raise UserError(f"--seed: must not be negative, got {options.seed}")
    if options.guidance is not None and not 1 <= options.guidance < math.inf:
        raise UserError(f"--guidance: must be 1, which is no guidance, or more, got {options.guidance}")
    return options


def check_instruments(options: Any) -> None:
    """Whether there is something to draw and to measure with: only the embedded world brings its own. Raises UserError."""
    if options.prompts is None:
        raise UserError("--prompts: missing; give a file, or the name of a set (only the embedded world brings its own)")
    if not (options.extractor or options.judge):
        raise UserError("nothing to measure with: give --extractor.NAME or --judge.NAME, as --extractor.inception or --judge.clip FOLDER")
    if options.data and not options.extractor:
        raise UserError("--data: nothing to compare pictures by; give --extractor.NAME, as --extractor.inception")


def check_taken(options: Any, *, teacher: str | None, scale: float | None) -> None:
    """Raises UserError for a flag that nothing drawn or measured takes; scale: as `student_scale` gives it."""
    if teacher is None and options.teacher_steps is not None:
        raise UserError("--teacher-steps: there is no teacher; give --against TEACHER, or leave the flag out")
    if teacher is None and options.negative_prompt is not None:
        raise UserError("--negative-prompt: is that of a teacher, and there is none; give --against TEACHER, or leave the flag out")
    if teacher is None and scale is None and options.guidance is not None:
        raise UserError(
            "--guidance: is that of a teacher, and there is none, or of a student that keeps it as a knob, and this one is drawn without: "
            "give --against TEACHER, or leave the flag out"
        )
    if options.resize is not None and not options.extractor:
        raise UserError("--resize: is of pictures before an extractor; give --extractor.NAME, or leave the flag out")


def size_of(text: str | None, config: Config | None, sources: dict[str, str]) -> tuple[int, int] | None:
    """(height, width) that all pictures are told: what --size says, else the run's; None for the networks' own. Raises UserError, before
    anything is drawn, where those are two, and for a size that a network cannot have. sources: what student and teacher are called, the
    student first, and where their configurations are."""
    import torch

    from fewstep import needs
    from fewstep.config import Config

    trained = config.sizes()[0] if config else None
    if text is None and trained is not None:
        return trained
    own = {}
    try:
        size = None if text is None else Config(size=[text]).sizes()[0]
        for name, source in sources.items():
            network = needs.skeleton(source, torch.float32)
            network.latent_shape(size)
            own[name] = "{height}x{width}".format(**network.told_size(size))
    except ValueError as error:
        raise UserError(f"--size: {error}" if text is not None else str(error)) from error
    if len(set(own.values())) > 1:
        each = ", ".join(f"{name} at {pixels}" for name, pixels in own.items())
        raise UserError(f"--size: missing; pictures of two sizes do not compare ({each}). Give one, as --size {next(iter(own.values()))}")
    return size


def steps_of_teacher(teacher: str) -> int | None:
    """Of a teacher that is itself a student of K steps, K; None where it is none, or it is not known."""
    from fewstep.models import steps_of

    return steps_of(Path(teacher)) if (Path(teacher) / "scheduler" / "scheduler_config.json").is_file() else None


def check_teacher(teacher: str, options: Any) -> None:
    """Raises UserError for flags that a teacher which is itself a student of K steps does not take."""
    made_for = steps_of_teacher(teacher)
    if made_for is None:
        return
    why = f"{teacher} is itself a student of {made_for} steps and is drawn as one"
    if options.teacher_steps not in (None, made_for):
        raise UserError(f"--teacher-steps: {why}, at those steps, not {options.teacher_steps}; leave the flag out")
    if options.guidance not in (None, 1):
        raise UserError(f"--guidance: {why}, without guidance; leave the flag out")
    if options.negative_prompt:
        raise UserError(f"--negative-prompt: {why}, without guidance; leave the flag out")


def teacher_negative_prompt(teacher: str, guidance: float, given: str | None, config: Config | None) -> str:
    """What the teacher's guidance leads away from: what --negative-prompt says, else the run's; "" where that is the family's empty prompt,
    or nothing is guided. Raises UserError for one that the teacher cannot take."""
    from fewstep import models

    own = config.matching.negative_prompt if config else ""
    prompt = own if given is None else given
    if given and guidance == 1:
        raise UserError("--negative-prompt: nothing is guided away from it at guidance 1: give another --guidance, or leave the flag out")
    if not prompt or guidance == 1 or steps_of_teacher(teacher) is not None:  # a student is drawn without guidance
        return ""
    try:
        models.family(teacher).check_negative_prompt()
    except ValueError as error:
        way = "leave the flag out" if given else 'the run has one; give --negative-prompt "" to compare without'
        raise UserError(f"--negative-prompt: {teacher}: {error}; {way}") from error
    return prompt


class Request(NamedTuple):
    """What an evaluation was asked for, checked before torch is imported."""

    options: Any  # as `read_options` gives them
    student: str  # a folder, or a hub id with its commit
    described: Path  # where the student's configurations are
    config: Config | None  # of the run that made it, as far as the student's folder holds it
    scale: float | None  # as of `student_scale`
    steps: int  # the student's
    against: str  # what the teacher was called: `none`, `world`, a folder or a hub id
    teacher: str | None  # where it is
    timeout: float  # of a judge's server
    share: tuple[int, int]
    output: Path
    work: Path  # keeps what was seen of the student's pictures
    beside: dict[str, dict[str, Any]]  # other reports, by their path


def read_request(options: Any) -> Request:
    """What there is to draw and to measure with. Raises UserError, naming the flag, for what is missing, cannot be or is not taken."""
    from fewstep.config import Config, RemoteConfig
    from fewstep.models import steps_of

    folder, own = options.folder, is_student_folder(options.folder)
    source, described = (str(folder), folder) if own else on_hub(folder.as_posix())
    config = student_config(described)
    remote = (config or Config()).remote if options.timeout is None else RemoteConfig(options.timeout)
    if problems := Config(remote=remote).problems():
        raise UserError("; ".join(problems))
    scale = student_scale(described, config, options.guidance, name=folder)
    # an exported student does not name its teacher, and nothing is downloaded unasked
    against = options.against or (config.teacher if config and (folder / "config.yaml").is_file() else "none")
    teacher = None if against == "none" else resolve_teacher(against)
    if teacher is not None:
        check_teacher(teacher, options)
    check_taken(options, teacher=teacher, scale=scale)
    steps = student_steps(options.steps, config.steps if config else steps_of(described))
    share = share_of(options.shard)
    output = options.output or (folder if own else Path()) / "evaluation.json"
    work = folder / "evaluation" if own else cache_folder("evaluate")
    beside = {str(path): read_report(path) for path in options.beside}
    if output.resolve() in (path.resolve() for path in options.beside):
        raise UserError(f"--beside: {output} is where this report goes; give it another --output")
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; name the report's file")
    for name, where in (("--output", output.parent), ("what is kept", work), ("--keep-images", options.keep_images)):
        if where is not None:
            check_writable(name, where)
    if teacher is not None or options.data is not None:
        check_cache("evaluate", "what was seen of a teacher's pictures and of real ones")
    if against != "world":
        check_instruments(options)
    return Request(options, source, described, config, scale, steps, against, teacher, remote.timeout, share, output, work, beside)


def instruments(request: Request, device: str) -> dict[str, Any]:
    """What `measure_student` is told of the request, with its networks built. Raises UserError or ValueError."""
    from fewstep import models
    from fewstep.evaluate import features, pictures, sets
    from fewstep.rewards import sources

    options, config = request.options, request.config
    found: dict[str, Any] = {"steps": request.steps, "device": device, "work": request.work}
    found |= {name: getattr(options, name) for name in ("seed", "batch", "precision", "teacher_steps", "keep_images")}
    if request.teacher is not None:
        default = config.shown_guidance() if config else models.family(request.teacher).default_guidance
        found["guidance"] = default if options.guidance is None else options.guidance
        found["negative_prompt"] = teacher_negative_prompt(request.teacher, found["guidance"], options.negative_prompt, config)
    if options.prompts is not None:
        found["prompts"] = sets.load(options.prompts)
        known = sets.SETS.get(found["prompts"].name)
        found["images_per_prompt"] = known.images_per_prompt if known else 1
    if options.images_per_prompt is not None:
        found["images_per_prompt"] = options.images_per_prompt
    if options.data is not None:
        found["data"] = pictures.open_pictures(options.data)
    found["extractors"] = features.make_extractors(options.extractor.items(), resize=options.resize, device=device)
    judges = load_judges(options.judge, device=device, in_world=request.against == "world", timeout=request.timeout)
    found["scorers"], found["judges"] = judges
    found["judge_files"] = {name: source for name, source in options.judge.items() if sources.is_code(source)}
    return found


def command(arguments: list[str]) -> int:
    """`fewstep evaluate` with these flags, as its exit status. Raises UserError."""
    request = read_request(options := read_options(arguments))

    import torch

    from fewstep import models
    from fewstep.ranks import Ranks

    models.quiet_libraries()
    device, share, of_torchrun = evaluation_device(), request.share, options.shard is None
    described = {options.folder.as_posix(): str(request.described)}
    size = size_of(options.size, request.config, described | ({request.against: request.teacher} if request.teacher is not None else {}))
    try:
        told = instruments(request, device) | {"scale": request.scale, "output": request.output}
        progress = share[0] == 0 or not of_torchrun
        report = measure_student(request.student, request.teacher, size, share=share, progress=progress, **told)
        if of_torchrun and share[1] > 1:
            ranks = Ranks.join(device)
            ranks.barrier()  # until every share is drawn
            ranks.leave()
            if share[0] == 0:
                torch.set_num_threads(processors())  # torchrun gives each process one, but the others have done
                print(f"every share is drawn: measuring, on {processors()} processor{'s' if processors() > 1 else ''}")
                report = measure_student(request.student, request.teacher, size, **told)
    except (ValueError, NumericalError) as error:
        raise UserError(str(error)) from error
    except OSError as error:  # a full disk, a hub out of reach
        raise UserError(f"{error}. Every part that was whole is kept") from error
    if report is None:
        return 0
    if request.beside:
        from rich.console import Console

        from fewstep.evaluate import tables

        Console(width=None if sys.stdout.isatty() else 200).print(tables.beside({str(request.output): report} | request.beside))
    print(f"saved {request.output}")
    return 0


def read_report(path: Path) -> dict[str, Any]:
    """A report that `fewstep evaluate` saved. Raises UserError."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not {"protocol", "rows", "interval"} <= report.keys():
            raise ValueError("it has no protocol, rows and interval")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--beside: {path}: not a report of fewstep evaluate ({error})") from error
    return report
