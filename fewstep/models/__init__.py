"""Model families. A family is one file and one line in this table."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep import hub
from fewstep.disk import visible
from fewstep.launch import put_back, set_variable

if TYPE_CHECKING:
    import torch

    from fewstep.config import Config

# pipeline class in model_index.json -> (module, class) of its adapter
FAMILIES = {
    "StableDiffusionPipeline": ("fewstep.models.sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("fewstep.models.sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("fewstep.models.sd3", "StableDiffusion3"),
    "FluxPipeline": ("fewstep.models.flux", "Flux1"),
    "Flux2KleinPipeline": ("fewstep.models.flux2", "Flux2Klein"),
    "SanaPipeline": ("fewstep.models.sana", "Sana"),
    "PixArtSigmaPipeline": ("fewstep.models.pixart", "PixArtSigma"),
    "ZImagePipeline": ("fewstep.models.z_image", "ZImage"),
    "QwenImagePipeline": ("fewstep.models.qwen_image", "QwenImage"),
}


SINGLE_FILE = (
    "a single-file checkpoint is saved as a folder with diffusers first, by the pipeline class of its family: "
    "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
)


ONE_PART = (
    "the {0} alone is put into the pipeline that it was trained from first, by its class in config.json: "
    'DiffusionPipeline.from_pretrained(BASE, {0}=CLASS.from_pretrained(FOLDER, subfolder="{0}")).save_pretrained(OTHER)'
)


ONE_LORA = (
    "a LoRA is no pipeline, but the folder that `fewstep export RUN --to diffusers` writes is one, and a base with its LoRA merged in: "
    "pipe.load_lora_weights(LORA); pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(FOLDER)"
)


PICKLES = (
    "weights in pickles (.bin), which run code where they are opened, are saved as safetensors with diffusers first, if you trust them: "
    "DiffusionPipeline.from_pretrained(SOURCE).save_pretrained(FOLDER, safe_serialization=True)"
)


KEPT_GUIDANCE = (
    "{} is told the guidance scale (time_cond_proj_dim), as a student that keeps it as a knob and latent consistency models are, and no "
    "run guides a teacher so or draws it; give the model that it was distilled from"
)


RENAMED = (
    "they were damaged, or saved by a version of diffusers or transformers that names them otherwise; get the model anew, or update both "
    "packages"
)


UNMERGED = (
    "a LoRA was saved beside them and not merged in; load the base and its LoRA anew, then pipe.fuse_lora(); pipe.unload_lora_weights(); "
    "pipe.save_pretrained(FOLDER)"
)


STRETCHES, STRETCH = 64, 2**16  # of a file that are looked at, and their bytes


# of a configuration: where its part lay, how it was read and what wrote it, not what it computes
PROVENANCE = ("_name_or_path", "name_or_path", "is_local", "local_files_only", "_diffusers_version", "transformers_version")


CONFIGURATIONS = ("*.json", "*.txt", "*.model", "*.jinja")  # of a repository, everything but its weights


class UnsupportedTeacher(ValueError):
    """A teacher that cannot be read, or whose family has no adapter; the message says which are known."""


def index_of(source: str) -> dict[str, Any]:
    """What a folder's or hub repository's model_index.json says. Raises UnsupportedTeacher."""
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            held = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt")]
            networks = [name for name in ("unet", "transformer") if (folder / name).is_dir()]
            hint = f"; {ONE_PART.format(networks[0])}" if networks else ""
            if held:
                hint = f"; {ONE_LORA if lora_in(folder) else SINGLE_FILE}"
            raise UnsupportedTeacher(f"{folder}: no model_index.json there; a teacher is a diffusers pipeline folder or a hub id{hint}")
    elif folder.is_file():
        raise UnsupportedTeacher(f"{folder}: a file; a teacher is a diffusers pipeline folder or a hub id; {SINGLE_FILE}")
    elif hub.parts(source) is None:
        raise UnsupportedTeacher(
            f"{source}: no such folder, and not a hub id (owner/name, owner/name@revision); a teacher is a diffusers pipeline folder or a "
            "hub id"
        )
    else:
        index = index_on_hub(source)
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(found["_class_name"], str | list):  # a pipeline with code of its own has a list there
            raise TypeError("its _class_name names no class")
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedTeacher(f"{index}: not a diffusers pipeline index ({error})") from error
    return found


@functools.cache  # a call asks the hub once
def index_on_hub(source: str) -> Path:
    """A hub repository's model_index.json. Raises UnsupportedTeacher."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    put_back(index_on_hub.cache_clear)  # the next call's may be a newer commit's
    repository, revision = hub.split(source)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, "model_index.json", revision=revision))
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError too
        raise UnsupportedTeacher(
            f"{source}: no such folder, and the hub could not be reached (no network, or HF_HUB_OFFLINE is set), where its "
            f"model_index.json is not among the files that were downloaded before ({one_line(error)})"
        ) from error
    except Exception as error:  # the hub's client raises many kinds; each means that this teacher cannot be read
        hint = f"; {SINGLE_FILE}; {ONE_LORA}" if isinstance(error, EntryNotFoundError) else ""
        raise UnsupportedTeacher(
            f"{source}: no such folder, and cannot read its model_index.json from the hub ({type(error).__name__}: {one_line(error)}){hint}"
        ) from error


def pinned(source: str) -> str:
    """A hub id with the commit that its revision, or its newest state, is now; a folder as it is. Raises UnsupportedTeacher."""
    named = hub.parts(source)
    # the hub's client keeps each commit's files in a folder of its name
    return source if named is None else f"{named[0]}@{index_on_hub(source).parent.name}"


def snapshot(source: str, patterns: Sequence[str]) -> str:
    """Folder with those files of a hub repository that fit a pattern. Raises UnsupportedTeacher."""
    import huggingface_hub

    repository, revision = hub.split(source)
    try:
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except OSError as error:  # of the hub: a gated or a missing repository, no network
        raise UnsupportedTeacher(f"{source}: its files cannot be had ({type(error).__name__}: {one_line(error)})") from error


def in_pickles(source: str, error: OSError) -> bool:
    """Whether a part of a teacher, which diffusers has failed to read with this error, has its weights in pickles alone."""
    pickled = [path.parent for path in Path(source).glob("*/*.bin")]
    return any(not any(part.glob("*.safetensors")) for part in pickled) or "necessary `safetensors` weights" in str(error)  # of the hub


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def weights_in(folder: Path) -> dict[str, str]:
    """A hash of each weights file of a pipeline's folder, by its place there.

    Of its size and STRETCHES evenly spaced parts of it, for all of a large teacher would take a minute: a change of more than a 64th of
    the file is seen, and one that is spread out, as training makes it and a LoRA that is merged in.
    """
    found = {}
    for path in visible(folder, "*/*.safetensors"):
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for i in range(STRETCHES):
                file.seek(i * size // STRETCHES)
                digest.update(file.read(STRETCH))
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def configurations_in(folder: Path) -> dict[str, Any]:
    """Each configuration's `content` and a hash of each tokenizer's file of a pipeline's folder, by its place there: of the schedule as of
    the encoders. To be compared by `same_configuration`. Raises UnsupportedTeacher.
    """
    parts = [name for name, entry in index_of(str(folder)).items() if isinstance(entry, list) and not is_null(entry)]
    found = {}
    for path in visible(folder, "model_index.json", *(f"{part}/{pattern}" for part in parts for pattern in CONFIGURATIONS)):
        if path.name.endswith(".index.json"):  # of weights
            continue
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        found[name] = hashlib.sha256(data).hexdigest()
        if path.name in ("config.json", "model_index.json") or path.name.endswith("_config.json"):
            with suppress(ValueError):  # whoever loads the teacher says what is wrong
                found[name] = content(json.loads(data))
    return found


def same_configuration(one: Any, other: Any) -> bool:
    """Whether two of `configurations_in` compute the same: a later diffusers that saves a pipeline again writes settings which the class
    has got since, at their defaults, and null for parts which the pipeline has got. What transformers writes has to be equal."""
    if one == other or not (isinstance(one, dict) and isinstance(other, dict)):
        return one == other
    import diffusers

    kind = getattr(diffusers, str(one.get("_class_name")), None)
    parameters = inspect.signature(kind).parameters.values() if inspect.isclass(kind) else ()
    defaults = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}  # JSON has no tuples
    full = [defaults | {key: None if is_null(value) else value for key, value in config.items()} for config in (one, other)]
    return full[0] == full[1]


def content(config: Any) -> Any:
    """A configuration, a dictionary of others, without PROVENANCE at any depth."""
    if isinstance(config, dict):
        return {key: content(value) for key, value in config.items() if key not in PROVENANCE}
    return config


def pipeline_class(source: str) -> str:
    """The pipeline class that a folder's or hub repository's model_index.json names. Raises UnsupportedTeacher where it has no adapter."""
    name = index_of(source)["_class_name"]
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedTeacher(
            f"{source} is a {name}; supported: {', '.join(FAMILIES)}. A family is one file in fewstep/models and one line in its table: "
            "docs/new-family.md"
        )
    return name


def is_null(entry: Any) -> bool:
    """Whether an entry of a model_index.json says that the pipeline comes without that part."""
    return isinstance(entry, list) and entry[:1] == [None]


def stock_pipeline(source: str | Path) -> Any:
    """The stock diffusers pipeline of a folder or hub id, from safetensors alone: a bf16 folder as bf16, all else as float32.

    Parts that its model_index.json has as null are told: where the class asks for one, as StableDiffusion3Pipeline does for T5, diffusers
    refuses a folder without it unless told so. Raises UnsupportedTeacher for what is no pipeline, or lacks weights.
    """
    from diffusers import DiffusionPipeline

    absent = [name for name, entry in index_of(str(source)).items() if is_null(entry)]
    name, revision = hub.split(str(source))
    told = {"dtype": stored_dtype(Path(source)), "use_safetensors": True, "revision": revision}
    pipe = DiffusionPipeline.from_pretrained(name, **told, **dict.fromkeys(absent))
    check_weights(pipe, source)
    return pipe


def stored_packed(part: Any) -> bool:
    """Whether a pipeline's part is one of transformers' that lies in 4 or 8 bits in its files (as bitsandbytes packs them)."""
    from transformers import PreTrainedModel

    return isinstance(part, PreTrainedModel) and getattr(part, "is_quantized", False)


def of_variant(part: Any, variant: str | None) -> bool:
    """Whether diffusers read a pipeline's part from files of this variant: where there are none, it reads the plain ones."""
    if variant is None:
        return False
    return bool(visible(folder_of(part), f"*.{variant}*.safetensors"))


def folder_of(part: Any) -> Path:
    """Where a pipeline's part was read from."""
    return Path(getattr(part, "name_or_path", None) or part.config["_name_or_path"])  # of transformers, of diffusers


def holds_lora(part: Any) -> bool:
    """Whether a pipeline's part was saved with the layers of a LoRA in it, under whose names neither library finds its weights."""
    return has_lora_layers(folder_of(part))


def lora_in(folder: Path) -> bool:
    """Whether a folder's own files are of a LoRA, as diffusers or kohya's trainer names its layers; of a damaged file it is not known."""
    from safetensors import SafetensorError

    try:
        return has_lora_layers(folder)
    except (OSError, SafetensorError):
        return False


def has_lora_layers(folder: Path) -> bool:
    from safetensors import safe_open

    for path in visible(folder, "*.safetensors"):
        with safe_open(path, "pt") as file:
            keys = " ".join(file.keys())
        if ".lora_" in keys or ".base_layer." in keys:
            return True
    return False


def check_weights(pipe: Any, source: str | Path, variant: str | None = None) -> None:
    """Raises UnsupportedTeacher naming weights that a pipeline's files lack.

    Of diffusers' parts they stay on the meta device. transformers' get random numbers, and the libraries' only word about it is a warning:
    so each is asked for its report once more, on the meta device, where nothing is read. A part that is stored in 4 or 8 bits is asked as
    what it was before: the weights' names are the same, and what unpacks them cannot do without values. variant: of the files, as "fp16".
    """
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.utils import logging as transformers_says

    for name, part in pipe.components.items():
        if isinstance(part, PreTrainedModel):
            config = copy.deepcopy(part.config)
            packed = stored_packed(part)
            if packed:
                del config.quantization_config
            told = {"config": config, "device_map": "meta", "use_safetensors": True, "ignore_mismatched_sizes": packed}
            told["variant"] = variant if of_variant(part, variant) else None
            verbosity = transformers_says.get_verbosity()
            transformers_says.set_verbosity_error()  # of packed weights it would say that their sizes are others
            try:
                _, report = type(part).from_pretrained(part.name_or_path, output_loading_info=True, **told)
            finally:
                transformers_says.set_verbosity(verbosity)
            missing = sorted(report["missing_keys"])
        else:
            missing = [key for key, p in part.named_parameters() if p.is_meta] if isinstance(part, nn.Module) else []
        if missing:
            why = UNMERGED if holds_lora(part) else RENAMED
            raise UnsupportedTeacher(f"{source}: the files of its {name} lack {len(missing)} of its weights, the first {missing[0]}: {why}")


def stored_dtype(folder: Path) -> torch.dtype:
    """bf16 where a pipeline's folder holds its frozen parts so, else float32, also for what is no folder.

    A run's config may have left that to the machine. To be named when a pipeline is read: transformers reads its parts as their
    configuration says, diffusers the others as float32, and bf16 beside float32 does not run.
    """
    import torch
    from safetensors import safe_open

    for path in visible(folder, "vae/*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds = [tensor.get_dtype() for tensor in map(file.get_slice, file.keys())]
        for kind in kinds:
            if kind in ("BF16", "F16", "F32"):  # FLUX.2's has a count before its weights
                return torch.bfloat16 if kind == "BF16" else torch.float32
    return torch.float32


LCM_GRID = 50  # timesteps of which a stock LCMScheduler takes some, in any number; it says so where nobody said otherwise


def steps_in(scheduler: Mapping[str, Any]) -> int | None:
    """K where a scheduler's configuration is that of a K-step grid, as `lcm_scheduler` and `flow_scheduler` make a student's; None for any
    other scheduler."""
    kind = scheduler.get("_class_name")  # one that was not read from a file need not say it
    if scheduler.get("stochastic_sampling") and kind in (None, "FlowMatchEulerDiscreteScheduler"):
        return round(1 / (scheduler["shift_terminal"] or 1.0))  # the K-step grid ends at 1/K
    if scheduler.get("timestep_spacing") == "trailing" and kind in (None, "LCMScheduler"):  # other LCMs space them otherwise
        steps = scheduler.get("original_inference_steps")
        return None if steps == LCM_GRID else steps
    return None


def steps_of(student: Path) -> int | None:
    """Steps that a student's scheduler was made for; None when it does not say."""
    scheduler = json.loads((student / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return steps_in(scheduler)


def folder_keeps_guidance(student: Path) -> bool:
    """Whether the student in a folder is told its guidance scale in each call: its UNet has the input, or the run there trained a range."""
    import yaml

    unet, run = student / "unet" / "config.json", student / "config.yaml"
    try:
        if unet.is_file():
            return json.loads(unet.read_text(encoding="utf-8")).get("time_cond_proj_dim") is not None
        return run.is_file() and isinstance(yaml.safe_load(run.read_text(encoding="utf-8"))["matching"]["guidance"], list)
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):  # whoever reads the folder as what it is says what is wrong
        return False


def family_name(pipeline: str) -> str:
    """Of a pipeline class: its adapter's file, and its recipe."""
    return FAMILIES[pipeline][0].rpartition(".")[2]


def family(source: str) -> Any:
    """The adapter class of a teacher's or a student's family (folder or hub id). Raises UnsupportedTeacher."""
    module, name = FAMILIES[pipeline_class(source)]
    return getattr(importlib.import_module(module), name)


def load(source: str, **options: Any) -> Any:
    """Read a teacher (folder or hub id) into its family's adapter. Raises UnsupportedTeacher."""
    return family(source).load(source, **options)


def frozen_dtype(config: Config) -> torch.dtype:
    """Of a run's frozen parts. config: with its hardware resolved; what was left to the machine counts as float32."""
    import torch

    return torch.bfloat16 if config.memory.frozen == "bf16" else torch.float32


def with_range() -> list[str]:
    """The pipelines whose students may keep a range of guidance scales."""
    kinds = {pipeline: getattr(importlib.import_module(module), name) for pipeline, (module, name) in FAMILIES.items()}
    return [pipeline for pipeline, kind in kinds.items() if kind.scale_input is not None]


SUPPORT = (
    "pipeline", "recipe", "predicts", "guidance", "guidance range", "negative prompt", "image-to-image", "LoRA file", "kohya file",
)  # fmt: skip


def support() -> list[tuple[str, ...]]:
    """What each family supports, a row each, under the heads SUPPORT."""
    rows = []
    for pipeline, (module, name) in FAMILIES.items():
        kind = getattr(importlib.import_module(module), name)
        guidance = f"embedded, {kind.embedded_guidance:g}" if kind.embedded_guidance is not None else f"{kind.default_guidance:g}"
        guidance += "; step-distilled: none" if "takes_guidance" in vars(kind) else ""
        predicts = "flow" if kind.flow else "eps, v or x0"
        abilities = (kind.scale_input, kind.takes_negative_prompt(), kind.draws_from_pictures(), kind.saves_lora(), kind.kohya)
        rows.append((pipeline, family_name(pipeline), predicts, guidance, *("yes" if can else "no" for can in abilities)))
    return rows


def quiet_libraries() -> None:
    """Silence the model libraries' start-up remarks (missing torchvision, progress bars): they are no news to a user. For as long as the
    call lasts: a caller's own models are to be heard again."""
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        set_variable("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters on one base are meant
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # imported along by others
        logger = logging.getLogger(name)
        put_back(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
    for name in ("diffusers", "transformers"):
        library = importlib.import_module(f"{name}.utils.logging")
        put_back(library.set_verbosity, library.get_verbosity())
        if library.is_progress_bar_enabled():
            put_back(library.enable_progress_bar)
        library.disable_progress_bar()
        library.set_verbosity_error()
