"""A run's averaged student in the forms that other tools read: a diffusers folder, a LoRA file, kohya's file; its card; the hub."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from fewstep import hub
from fewstep.disk import alone, errno_of, rename, replace_text, visible
from fewstep.flags import EXPORTED
from fewstep.folder import SAVED_AGAIN, TEACHER_FILES, changed_since

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.config import Config

FORMS = ("diffusers", "lora", "kohya")

# torch_dtype, for whoever reads a card may have an older diffusers: 0.39 ignores `dtype`, those since read both (`torch_dtype` until 1.0)
USAGE = {
    "diffusers": """```python
{imports}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}"{options})
image = pipe(prompt="your prompt", num_inference_steps={steps}, {call}).images[0]
```""",
    "lora": """```python
{imports}from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained("{teacher}"{options})
pipe.load_lora_weights("{folder}", adapter_name="student")
pipe.scheduler = {scheduler}.from_pretrained("{folder}", subfolder="scheduler")
image = pipe(prompt="your prompt", num_inference_steps={steps}, {call}).images[0]
```

Beside another LoRA: `pipe.load_lora_weights(other, adapter_name="style")`, then `pipe.set_adapters(["student", "style"])`.""",
    "kohya": """`{file}` is a LoRA for the teacher with kohya's keys, to be used at strength 1. In ComfyUI: {steps} steps, cfg 1, \
sampler `lcm`, scheduler `sgm_uniform`, whose timesteps lie within one of those below (read in ComfyUI's source, not run in it). \
For diffusers `fewstep export --to lora` brings the scheduler too.""",
}


class CannotExport(ValueError):
    """What cannot be exported or pushed; the message says why and what to do."""


@dataclass(frozen=True)
class Averaged:
    """The averaged student of a run at one update."""

    config: Config
    backbone: Any
    pipe: Any  # a stock pipeline with the student's merged weights and the K-step scheduler
    weights: dict[str, Tensor]  # its trained parameters by name; none where only the merged ones were found
    update: int
    rewards: dict[str, float]  # weights of the other rewards at this update, as far as they are known


# -- reading a run -----------------------------------------------------------------------------------------------------


def read(folder: Path, config: Config) -> tuple[Averaged, bool]:
    """(the student of a run's newest checkpoint, or of its finished folder where the checkpoints are gone; whether what the run
    measured was measured on it). Says which update it is. Raises CannotExport.
    """
    from fewstep import checkpoint, models, world

    teacher = world.source(config.teacher)
    finished = (folder / "model_index.json").is_file()
    try:
        found = checkpoint.newest(folder / "checkpoints", only=("update", "student", "ema"))
        if found is None and not finished:
            raise CannotExport(f"{folder}: no checkpoint was saved yet; let the run go on (save_every {config.save_every})")
        changed = changed_since(teacher, folder) if found is not None else None
        if changed:
            raise CannotExport(
                f"teacher: {changed} of {teacher} has changed since the run began: the student would be merged into another; "
                f"{SAVED_AGAIN.format(folder / TEACHER_FILES)}"
            )
        kept_in = models.stored_dtype(folder) if finished else models.frozen_dtype(config)
        backbone = models.load(str(folder) if found is None else teacher, dtype=kept_in)
    except checkpoint.DamagedCheckpoint as error:
        raise CannotExport(" ".join(str(error).split())) from error
    except models.UnsupportedTeacher as error:
        raise CannotExport(str(error) if found is None else no_teacher(folder, teacher, error)) from error
    if found is None:
        print(f"update {config.updates}: the student finished in {folder}")
        weights = read_lora(folder, backbone.part) if config.lora_rank else {}
        backbone.pipe.register_modules(scheduler=backbone.scheduler(config.steps))  # the stock pipeline has changed the one it read
        return Averaged(config, backbone, backbone.pipe, weights, config.updates, logged_weights(folder, config)), True
    path, state = found
    update, finished = state["update"], finished and state["update"] == config.updates
    print(f"update {update} of {config.updates}: the averaged student of {path.name}")
    weights = checkpoint.averaged(state)
    roles = backbone.roles(lora_rank=config.lora_rank, guidance=config.matching.guidance)
    own = {name: p.shape for name, p in roles.student_parameters.items()}
    import torch

    # an adapter that this version has and the run's had not adds nothing
    weights |= {name: torch.zeros(shape) for name, shape in own.items() if ".lora_" in name and name not in weights}
    if own != {name: value.shape for name, value in weights.items()}:
        raise CannotExport(f"{path}: its student is another network than {teacher} (has the teacher changed since, or fewstep?)")
    pipe = backbone.student_pipeline(roles, weights, config.steps)
    return Averaged(config, backbone, pipe, weights, update, logged_weights(folder, config, update)), finished


def no_teacher(folder: Path, teacher: str, error: Exception) -> str:
    """What is said of a teacher that a run's export cannot read: one that has moved is looked for where the run's config says."""
    moved = not Path(teacher).exists() and (hub.parts(teacher) is None or (folder / TEACHER_FILES).is_file())
    return f"teacher: {error}" + (f". If it has moved, write where it is now into {folder / 'config.yaml'}" if moved else "")


def read_lora(folder: Path, part: str) -> dict[str, Tensor]:
    """The student's parameters, by the trainer's names, from a finished folder's LoRA file; none where it has no such file."""
    from safetensors.torch import load_file

    path = folder / "pytorch_lora_weights.safetensors"
    layers = load_file(path) if path.is_file() else {}
    return {f"model.{key.removeprefix(f'{part}.').replace('.weight', '.student.weight')}": value for key, value in layers.items()}


def logged_weights(folder: Path, config: Config, update: int | None = None) -> dict[str, float]:
    """The other rewards' weights as metrics.jsonl last had them, up to an update; without the file those that are fixed."""
    from fewstep.metrics import logged

    path = folder / "metrics.jsonl"
    known = {} if config.weights.mode == "adaptive" else dict(config.reward)
    for logs in logged(path) if path.is_file() and config.reward else ():
        if update is None or logs["update"] <= update:
            known |= {name: logs[f"{name}/weight"] for name in config.reward if f"{name}/weight" in logs}
    return known


def read_results(path: Path) -> str | None:
    """What a run measured, as its card shows it; None where it has measured nothing. Raises CannotExport for a file that is damaged."""
    from fewstep.evaluate import tables

    try:
        return tables.as_markdown(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CannotExport(
            f"{path}: cut off, or no evaluation ({type(error).__name__}: {error}); put it back as it was, or move it away, and the "
            "card is without it"
        ) from error


# -- writing it --------------------------------------------------------------------------------------------------------


def write_diffusers(student: Averaged, folder: Path) -> None:
    """A folder that stock `DiffusionPipeline.from_pretrained` opens, and the LoRA file beside where there is one."""
    backbone, rank = student.backbone, student.config.lora_rank
    backbone.save(student.pipe, folder)
    if rank and outside_lora(student.config, backbone):
        print(f"no LoRA file: {NO_SCALE_INPUT}; the folder holds the merged weights")
    elif rank and not backbone.saves_lora():
        print(f"no LoRA file: diffusers has no loader for a {backbone.pipeline.__name__}; the folder holds the merged weights")
    elif student.weights and rank:
        backbone.save_lora(student.weights, folder, rank=rank)


def write_record(config: Config, folder: Path) -> None:
    """What `fewstep sample` and `fewstep evaluate` need of a student's run, without the paths and the rest of its config."""
    matching = {"guidance": config.matching.guidance, "negative_prompt": config.matching.negative_prompt}
    record = {"steps": config.steps, "size": config.size, "teacher_guidance": config.teacher_guidance, "matching": matching}
    replace_text(folder / EXPORTED, json.dumps(record, indent=1, ensure_ascii=False))


def write_lora(student: Averaged, folder: Path) -> None:
    """The LoRA file, and the scheduler that belongs to it."""
    student.backbone.save_lora(student.weights, folder, rank=student.config.lora_rank)
    student.pipe.scheduler.save_pretrained(folder / "scheduler")


NO_SCALE_INPUT = (
    "this student keeps guidance as a knob (matching.guidance is a range), and the input that tells it the scale is part of its own UNet: "
    "a pipeline of the teacher has none for a LoRA to change"
)


def outside_lora(config: Config, family: Any) -> bool:
    """Whether the student has an input for its guidance scale that its teacher's network lacks."""
    return config.matching.guidance_range is not None and family.scale_input == "added"


def check_form(config: Config, family: Any, to: str) -> None:
    """Raises CannotExport for a form that this student does not have."""
    if to == "diffusers":
        return
    if config.lora_rank == 0:
        raise CannotExport(f"--to {to}: this run trained full weights (lora_rank 0), there is no LoRA; use --to diffusers")
    if outside_lora(config, family):
        raise CannotExport(f"--to {to}: {NO_SCALE_INPUT}; use --to diffusers")
    if to == "lora" and not family.saves_lora():
        raise CannotExport(f"--to lora: diffusers has no LoRA loader for a {family.pipeline.__name__}; use --to diffusers")
    if to == "kohya" and family.kohya is None:
        other = "lora" if family.saves_lora() else "diffusers"
        raise CannotExport(f"--to kohya: there is no such format for a {family.pipeline.__name__}; use --to {other}")


def check_folder(output: Path) -> None:
    """Raises CannotExport unless it is an empty folder or none yet."""
    if output.exists() and not output.is_dir():
        raise CannotExport(f"--output: {output} is a file; name a folder")
    if output.is_dir() and visible(output, "*"):  # Finder leaves a .DS_Store in what it shows as empty
        raise CannotExport(f"--output: {output} is not empty; name another folder or empty it")


def export(
    folder: Path, config: Config, *, to: str, output: Path | None = None, repository: str | None = None, private: bool = False
) -> Path:
    """Write a run's student in one of FORMS, with its card, and push it to a hub repository when one is named. Returns its folder.

    output: an empty folder, None: `export/FORM` in the run's. Raises CannotExport.
    """
    from fewstep import models, world

    if private and repository is None:
        raise CannotExport("--private is for --push ORG/NAME")
    if repository is not None:
        check_repository(repository)
    output = output or folder / "export" / to
    check_folder(output)
    try:
        check_form(config, models.family(family_source(folder, config)), to)
    except models.UnsupportedTeacher as error:
        raise CannotExport(no_teacher(folder, world.source(config.teacher), error)) from error
    student, measured = read(folder, config)
    if to != "diffusers" and not student.weights:
        raise CannotExport(f"{folder}: neither a checkpoint nor pytorch_lora_weights.safetensors there: the LoRA is gone")
    results = read_results(folder / "evaluation.json") if measured else None
    with all_at_once(output) as made:
        write(student, to, made, name=own_name(folder))
        if results is not None:
            shutil.copy(folder / "evaluation.json", made)
        if measured and (folder / "samples.png").is_file():
            shutil.copy(folder / "samples.png", made)
        save_card(model_card(student, to, made, name=repository or own_name(output), results=results), made)
    print(f"exported to {output}")
    if repository is not None:
        print(push(output, repository, private=private))
    return output


@contextmanager
def all_at_once(output: Path) -> Iterator[Path]:
    """A folder for what is to lie in `output`, which comes there once all of it is written: an export that ended early leaves nothing that
    could be taken for one, or that keeps the same call from beginning anew. Raises CannotExport."""
    from safetensors import SafetensorError

    made = output / ".writing"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with alone("--output", output):
            try:
                shutil.rmtree(made, ignore_errors=True)  # of one that was killed
                made.mkdir()
                yield made
                for path in sorted(made.iterdir(), key=lambda path: (path.is_file(), path.name)):  # a pipeline's parts before its index
                    rename(path, output / path.name)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        number = errno_of(error)
        raise CannotExport(f"--output: cannot write to {output} ({error if number is None else os.strerror(number)})") from error


def write(student: Averaged, to: str, folder: Path, *, name: str) -> None:
    """One of FORMS into a folder; name: of kohya's file. Raises CannotExport for a LoRA that kohya's format cannot hold."""
    if to == "diffusers":
        write_diffusers(student, folder)
        write_record(student.config, folder)
    elif to == "lora":
        write_lora(student, folder)
    else:
        from fewstep.models import kohya

        rank, config = student.config.lora_rank, student.config
        try:
            kohya.save(student.backbone, student.weights, folder / f"{name}.safetensors", rank=rank, title=title(config))
        except ValueError as error:
            raise CannotExport(f"--to kohya: {error}") from error


def family_source(folder: Path, config: Config) -> str:
    """Where the student's family is written: in the run's folder once it is finished, else with the teacher."""
    from fewstep import world

    return str(folder) if (folder / "model_index.json").is_file() else world.source(config.teacher)


# -- the hub -----------------------------------------------------------------------------------------------------------


def check_repository(name: str) -> None:
    """Raises CannotExport when it is not ORG/NAME as the hub has them."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CannotExport(f"--push: {error}") from error
    if name.count("/") != 1:
        raise CannotExport(f"--push: {name!r} is not ORG/NAME")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder, all of it and nothing else, to a model repository, made where there is none. Returns the commit's address.

    Raises CannotExport, also when a repository that should be private is there already and public.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    api = hub.HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:  # create_repo leaves one that is there as it is
            raise CannotExport(f"--private: {name} is there already and public; nothing was uploaded, the export is in {folder}")
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Student exported by fewstep"))
    except CannotExport:
        raise
    except Exception as error:  # the hub's client raises many kinds: its own, the HTTP library's, the system's
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = ""
        if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
            advice = "; log in with `hf auth login` or set HF_TOKEN"
        elif status == 403:
            advice = "; the token may not write there"
        reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
        again = shlex.join(["hf", "upload", name, str(folder), ".", *["--private"] * private])
        raise CannotExport(
            f"--push {name}: {type(error).__name__}: {reason}{advice}. The export itself is in {folder}; `{again}` uploads it"
        ) from error


# -- the card ----------------------------------------------------------------------------------------------------------

FIXED_GUIDANCE = (
    "The student was held to its teacher under guidance {}{}, at every noise level. That is distilled in and fixed: another "
    "guidance takes another distillation (`--matching.guidance`). Sample with `{}`: the pipeline then adds no guidance of its own, "
    "and a negative prompt has no effect."
)
KNOB = (
    "The student was held to its teacher under guidance {0}{1}, at every noise level, and told which. `guidance_scale` is any number {0}; "
    "outside of these it was not trained. Above it stands as the pictures here were drawn: `{2}`. The pipeline tells the student the scale "
    "and adds no guidance of its own: a picture takes one evaluation a step at any scale, and a negative prompt has no effect."
)
NAMED_DTYPE = (
    "`torch_dtype={}` is what {}. Without it one part may be read in another number format than the next, and such parts do not run "
    "together."
)
ABSENT = "{} comes without these parts, which diffusers has to be told: `{}`."
ONE_STEP = "One step is not possible: this scheduler's times for it are not a number, so pictures are NaN or the call ends in an error."
OWN_NOISE = (
    "This pipeline hands its scheduler no generator: the noise between steps is drawn from torch's own, so for the same picture again "
    "call `torch.manual_seed(0)` before it, beside any `generator=`."
)
FROM_PICTURE = (
    "In image-to-image pipelines `strength=j/{0}` runs the last j of these timesteps; a strength between two such values is rounded to "
    "one of them."
)

FROM_PICTURE_IN_COMFYUI = (
    "In ComfyUI's image-to-image, `steps` j with `denoise` j/{0}, rounded down to two decimals, runs the last j of these timesteps; other "
    "pairs make another grid."
)


def teacher_licence(teacher: str) -> tuple[dict[str, Any], str]:
    """(license, license_name, license_link of the teacher's card, as far as it has them; why there are none).

    teacher: `world`, a folder, whose README.md is its card, or a hub id. A link to a file of a folder is left out: the file stays there.
    """
    if teacher == "world":
        return {"license": "apache-2.0"}, ""
    path, named = Path(teacher) / "README.md", hub.parts(teacher)
    if named is None and not path.is_file():
        return {}, f"no README.md in {teacher_in_words(teacher)}"
    try:
        # of the commit that was distilled: a licence may have changed since
        data = ModelCard.load(path if named is None else hf_hub_download(named[0], "README.md", revision=named[1])).data.to_dict()
    except Exception as error:  # no card, no network, not YAML: of many kinds; each means that it is not known
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return {}, f"no README.md in {teacher_in_words(teacher)}"
        return {}, f"its card cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
    fields = {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    if "license" not in fields:
        return {}, "its card names none"
    link = fields.get("license_link", "")
    if link and "://" not in link:  # a file beside the teacher's card
        del fields["license_link"]
        if named:
            fields["license_link"] = f"https://huggingface.co/{named[0]}/blob/{named[1] or 'main'}/{link}"
    return fields, ""


def licence_in_words(fields: dict[str, Any], why: str) -> str:
    if not fields:
        return f"Licence not found ({why}): look at the teacher's page."
    name = fields.get("license_name", fields["license"])
    where = f" ({fields['license_link']})" if "license_link" in fields else ""
    return f"The teacher's licence: `{name if isinstance(name, str) else ', '.join(name)}`{where}."


def teacher_in_words(teacher: str) -> str:
    """A teacher as a card names it: of a folder the last part, for the way to it is of one machine."""
    if teacher == "world":
        return "the embedded emoji teacher of fewstep"
    named = hub.parts(teacher)
    return named[0] if named else own_name(teacher)


def own_name(folder: str | Path) -> str:
    """The last part of the way to a folder, be it given as `.`; a link has its own."""
    return os.path.basename(os.path.abspath(folder))


def title(config: Config) -> str:
    return f"{config.steps}-step student of {teacher_in_words(config.teacher)}"


def rewards_in_words(config: Config, weights: dict[str, float]) -> str:
    """What else pushed the student, for its card."""
    if not config.reward:
        return "no other reward"
    parts = []
    for name in config.reward:
        known = [f"{weights[name]:.3g}"] if name in weights else []
        notes = ", ".join(known + ["by policy gradient"] * (config.via.get(name) == "policy"))
        parts.append(f"`{name}`{f' ({notes})' if notes else ''}")
    return f"other rewards with {config.weights.mode} weights (at the end): {', '.join(parts)}"


def guidance_in_words(config: Config, backbone: Any) -> str:
    """The guidance that was distilled in, and what the teacher's pipeline calls it where that counts otherwise (Z-Image)."""
    said = config.matching.guidance_in_words()
    if config.matching.guidance_range is not None:
        return said
    own = backbone.teacher_call(config.matching.guidance).get("guidance_scale", config.matching.guidance)
    return said if own == config.matching.guidance else f"{said} (`guidance_scale={own:g}` of its pipeline)"


def as_keywords(values: dict[str, Any]) -> str:
    """What a pipeline is told, as its call is written."""
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def usage(student: Averaged, to: str, folder: Path, *, name: str | None) -> str:
    """How pictures are drawn with what `folder` holds, as Markdown; to, name: as of `model_card`."""
    import torch

    config, backbone = student.config, student.backbone
    place = "path/to/fewstep/world/assets/teacher" if config.teacher == "world" else f"path/to/{teacher_in_words(config.teacher)}"
    teacher, revision = hub.parts(config.teacher) or (place, None)
    # a folder in float32 is read so unasked; how a teacher is stored is not known here, and its parts may not be stored alike
    named_dtype = to == "lora" or backbone.dtype != torch.float32
    absent = [f"{part}=None" for part in backbone.lacks()]
    options = [f'revision="{revision}"'] if to == "lora" and revision is not None else []
    options += [f"torch_dtype={backbone.dtype}"] if named_dtype else []
    call = backbone.student_told(config.student_guidance()) | backbone.told_size(config.sizes()[0])
    text = USAGE[to].format(
        imports="import torch\n" if named_dtype else "", options="".join(f", {option}" for option in [*options, *absent]),
        folder=name or own_name(folder), teacher=teacher, scheduler=type(backbone.scheduler(config.steps)).__name__,
        steps=config.steps, call=as_keywords(call), file=", ".join(path.name for path in visible(folder, "*.safetensors")),
    )  # fmt: skip
    if to == "kohya":
        return text
    if named_dtype:
        held = "the teacher was held in while the student was trained" if to == "lora" else "this folder is saved in"
        text += f"\n\n{NAMED_DTYPE.format(backbone.dtype, held)}"
    if absent:
        text += f"\n\n{ABSENT.format('The teacher' if to == 'lora' else 'This folder', ', '.join(absent))}"
    return text


def notes_on_grid(backbone: Any, steps: int, to: str) -> str:
    """What else has to be known of the timesteps that a student was trained on, each sentence after a blank."""
    notes = []
    if backbone.flow and steps > 1 and to != "kohya":
        notes.append(ONE_STEP)
    if steps > 1 and not backbone.hands_on_generator():
        notes.append(OWN_NOISE)
    if backbone.draws_from_pictures():
        notes.append((FROM_PICTURE_IN_COMFYUI if to == "kohya" else FROM_PICTURE).format(steps))
    return "".join(f" {note}" for note in notes)


def model_card(student: Averaged, to: str, folder: Path, *, name: str | None = None, results: str | None = None) -> ModelCard:
    """The card that goes into `folder`, which holds one of FORMS and the pictures that the card shows, where there are any.

    name: of the folder where others find it (default: its own); results: measured numbers and their protocol, as Markdown.
    """
    config, backbone, steps = student.config, student.backbone, student.config.steps
    fields, why = teacher_licence(config.teacher)
    licence = licence_in_words(fields, why)
    if not fields:
        print(licence)
    base, _ = hub.parts(config.teacher) or (None, None)
    relation = {"base_model": base, "base_model_relation": "finetune" if to == "diffusers" else "adapter"}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["fewstep", "distillation", "few-step", *(["lora"] if to != "diffusers" else [])],
        **fields,
        **(relation if base else {}),
    )
    guidance, normalize = guidance_in_words(config, backbone), config.matching.normalize
    negative = config.matching.negative_prompt
    away = f" and the negative prompt {negative!r}" if negative else ""
    method = {"group": "GNDM (group-normalised distribution matching)", "sample": "DMD"}.get(
        normalize, f"distribution matching, scale `{normalize}`"
    )
    grid = f"[{', '.join(f'{round(float(t), 3):g}' for t in backbone.scheduler(steps).timesteps)}]"
    guided = as_keywords(backbone.student_told(config.student_guidance()))
    of_all = f" of {config.updates}" if student.update < config.updates else ""
    began = "" if config.init is None else ", from the student of an earlier run"
    on_guidance = FIXED_GUIDANCE if config.matching.guidance_range is None else KNOB
    text = f"""---
{data.to_yaml()}
---

# {title(config)}

Distilled with fewstep by {method}: {student.update} updates{of_all}, \
teacher guidance {guidance}{away}, {rewards_in_words(config, student.rewards)}{began}.

{licence}

## Use

{usage(student, to, folder, name=name)}

{"This is" if to == "kohya" else "The scheduler in this folder carries"} the grid the student was trained on, timesteps {grid}; \
with another number of steps or another scheduler it is no longer the model that was trained.{notes_on_grid(backbone, steps, to)}

## Guidance

{on_guidance.format(guidance, away, guided)}

## Numbers

{results or "Not measured."}
"""
    return with_pictures(ModelCard(text), folder)


def save_card(card: ModelCard, folder: Path) -> None:
    """A student's card as the README.md of its folder, where an earlier one stays if the disk takes no other."""
    replace_text(folder / "README.md", str(card))


def with_pictures(card: ModelCard, folder: Path) -> ModelCard:
    """A student's card that shows the pictures which lie beside it in `folder`."""
    if (folder / "samples.png").is_file():
        card.content = card.content.replace(
            "\n## Use\n", "\n![rows: prompts; columns: the teacher and the student](samples.png)\n\n## Use\n", 1
        )
    if (folder / "curves.png").is_file():
        card.content += "\n## Training\n\n![what the updates logged: means of equally many, on their range](curves.png)\n"
    return card
