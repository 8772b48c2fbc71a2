"""What a number was measured on: the stamp of a report, and the identity of all that decides it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import platform
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.evaluate.configs import config_hash
from fewstep.evaluate.drawing import Noise
from fewstep.evaluate.measure import OTHERS, SHUFFLED, is_distance
from fewstep.evaluate.store import add_tensor, fingerprint, sha256
from fewstep.rewards import sources
from fewstep.rewards.clip import CLIPScore

Utility = Callable[[Tensor], Tensor]  # (B, 3, H, W) in [0, 1] -> (B,)


@dataclass(frozen=True)
class Protocol:
    """What a number was measured on. Two numbers compare when their protocols are equal, but for the device."""

    prompts: str  # SHA-256 of the list of prompts
    set: str | None  # name of the prompts' set or file
    n: int  # pictures of each row
    images_per_prompt: int
    seeds: dict[str, int]  # of the rows, and of the teacher's sample that they are compared to
    teacher: dict[str, Any] | None  # whose sample that is: pipeline, config (SHA-256), steps, guidance, and what its call was told
    noise: Noise  # a picture's own, by its number, or that of its batch
    batch: int | None  # decides, with the seed, which picture gets which noise; None where each has its own
    extractor: str | None  # whose features FD-clip, precision, recall and diversity use
    extractors: dict[str, dict[str, str]]  # name -> weights (SHA-256), resize
    scorers: dict[str, str]  # name -> SHA-256 of its weights
    configs: dict[str, str]  # of scorers, judges and extractors: SHA-256 of their networks' configurations and of all tokenizers do
    preprocess: dict[str, dict[str, str]]  # of scorers: what pictures go through, SHA-256 of the vocabulary that prompts are read with
    utility: str | None  # SHA-256 of the source file that defines it
    data: dict[str, Any] | None  # of real pictures: n and SHA-256 of their features or files
    neighbours: int  # k of precision and recall
    resolution: int | list[int]  # in pixels; [height, width] of pictures that are not square
    precision: str  # arithmetic of the pipelines
    device: str  # with the number of threads; each row says on which its own seconds per image were measured
    versions: dict[str, str]

    def stamp(self) -> dict[str, Any]:
        """As it is read back from a report."""
        return json.loads(json.dumps(asdict(self)))


def pipeline_fingerprint(pipe: Any) -> str:
    """SHA-256 over a pipeline's weights, its schedule and its tokenizers' vocabularies, by which the first stamps name teachers.

    All the rest that decides its pictures is `pipeline_config`'s.
    """
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


def device_name(device: str | torch.device) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.device(device).type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def utility_hash(utility: Utility | None) -> str | None:
    """SHA-256 of the source file that defines a utility: of all it is, where that file calls torch alone, as the world's does (tested).

    The torch that ran it is among a stamp's versions.
    """
    return None if utility is None else hashlib.sha256(Path(inspect.getfile(utility)).read_bytes()).hexdigest()


def preparation(scorer: CLIPScore) -> dict[str, str]:
    """How a scorer brings pictures and prompts to its network."""
    said = {"pictures": in_words(scorer.preprocess), "vocabulary": sha256(scorer.tokenizer.get_vocab())}
    return said | ({"prompts": "in lower case"} if scorer.lowers else {})


def in_words(function: Callable[..., Any]) -> str:
    """A preprocessing's settings, or the name of a function with what it is told; the same in every process."""
    if isinstance(function, functools.partial):
        told = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in sorted(function.keywords.items()))]
        return f"{in_words(function.func)}({', '.join(told)})"
    named = function if inspect.isroutine(function) else type(function)
    return repr(function) if isinstance(function, tuple) else f"{named.__module__}.{named.__qualname__}"


def held_by(judge: Any) -> Iterator[tuple[str, Any]]:
    """(name, part) of all that a judge, or the object whose method it is, holds; what lies in a dictionary each for itself."""
    holder = getattr(judge, "__self__", judge)
    for name, value in sorted(vars(holder).items()) if hasattr(holder, "__dict__") else ():
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            yield f"{name}.{key}", part


def config_of(judge: Any) -> str | None:
    """SHA-256 over the configurations of a judge's networks and all that its tokenizers do; None of one that holds none."""
    return config_hash(*(part for _, part in held_by(judge) if isinstance(part, nn.Module) or hasattr(part, "get_vocab")))


def identity_of(judge: Any, source: str | None = None) -> str:
    """SHA-256 over a judge's weights and preprocessing, and over the file of its code unless that is fewstep's own; or what it says of its
    name and version; or SHA-256 of a function and its file.

    source: the path/to/file.py:function that it was named by, which may be another file than its code's. What its networks' configurations
    and its tokenizers decide is `config_of`'s. Raises ValueError for a judge that nothing tells the version of.
    """
    holder = getattr(judge, "__self__", judge)
    weights = [(name, part) for name, part in held_by(judge) if isinstance(part, nn.Module | Tensor)]
    version_of = getattr(holder, "version", None)
    if not weights and isinstance(version_of, str):  # a server's; its version may be that of a file with several functions
        return f"{served} {version_of}" if (served := getattr(holder, "served", "")) else version_of
    digest = hashlib.sha256()
    for name, part in weights:
        digest.update(f"{name} ".encode())
        digest.update(fingerprint(part).encode()) if isinstance(part, nn.Module) else add_tensor(digest, "", part)
    if weights:
        if callable(preprocess := getattr(holder, "preprocess", None)):
            digest.update(in_words(preprocess).encode())
        called = getattr(judge, "__name__", "score")
        if called != "score":  # another method of the same weights
            digest.update(called.encode())
    code = code_of(judge, whole=bool(weights))
    if weights and code.__module__.startswith("fewstep."):
        return digest.hexdigest()
    try:
        digest.update(Path(inspect.getfile(code)).read_bytes())
    except (TypeError, OSError) as error:
        if not weights:
            raise ValueError(
                f"judge {judge!r}: nothing tells which version it is; give an object with weights or a function in a file"
            ) from error
    line = code.__code__.co_firstlineno if inspect.isfunction(code) else 0  # all lambdas have one name
    digest.update(f"\0{code.__qualname__} {line}".encode())
    if source is not None and not (code is judge and is_of_file(judge, source)):
        digest.update(sources.function_version(source).encode())
    return digest.hexdigest()


def code_of(judge: Any, *, whole: bool) -> Any:
    """The function or method that a judge is, without its decorators, which stand in files of their own; or the class of an object.

    whole: the class of a method's object, too.
    """
    holder, function = getattr(judge, "__self__", judge), inspect.unwrap(judge)
    return type(holder) if not inspect.isroutine(function) or (whole and holder is not judge) else function


def is_of_file(judge: Any, source: str) -> bool:
    """Whether path/to/file.py:function is a function that stands in that file, whose line tells it apart: no method or object, and none
    that another function made."""
    if not inspect.isfunction(judge) or "<locals>" in judge.__qualname__:
        return False
    return Path(judge.__code__.co_filename).resolve() == Path(source.rpartition(":")[0]).resolve()


def differences(stamp: Any, other: Any, prefix: str = "") -> list[str]:
    """Every field in which two stamps differ, as `field: this / other`, hashes cut to eight digits."""
    if isinstance(stamp, dict) and isinstance(other, dict):
        names = {key: f"{prefix}.{key}" if prefix else key for key in {**stamp, **other}}
        return [line for key, name in names.items() for line in differences(stamp.get(key), other.get(key), name)]
    return [] if stamp == other else [f"{prefix}: {shown(stamp)} / {shown(other)}"]


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    return value[:8] if isinstance(value, str) and len(value) == 64 else "none" if value is None else str(value)


LATER = ("teacher", "preprocess", "configs")  # fields that the first reports' stamps lack
LATER_OF_TEACHER = ("call", "config")  # and those that the teacher in them lacks


def stamp_of(report: dict[str, Any]) -> dict[str, Any]:
    """A report's stamp. What an early one's lacks of its teacher is taken from the report's rows."""
    stamp = report["protocol"]
    if "teacher" in stamp or "teacher" not in report:
        return stamp
    shown = report["rows"][1]
    return stamp | {"teacher": {"pipeline": report["teacher"], "steps": shown["steps"], "guidance": shown["guidance"]}}


# what the numbers of extractors from the command line are made of: distance -> extractor; fd_NAME is of extractor-NAME
MADE_OF = {"fid": "inception", "kid": "inception", "patch_fid": "inception-patch", "cmmd": "extractor-clip"}
COVERAGE = ("precision", "recall")
OF_FIRST = (*COVERAGE, "diversity")  # of the first extractor's features


def extractors_of(metric: str, stamp: dict[str, Any]) -> list[str]:
    """The extractors in a stamp whose features a metric is made of; all of them where its name does not tell."""
    first = stamp["extractor"]
    if metric in OF_FIRST:
        return [first]
    if not is_distance(metric):
        return []
    kind, _, named = metric.rpartition("_")[0].partition(".")
    if kind == "fd_clip" and not named and first in stamp["scorers"]:
        return [first]
    own = named or MADE_OF.get(kind) or f"extractor-{kind.removeprefix('fd_')}"
    return [own] if own in stamp["extractors"] else [*stamp["extractors"]]


def deciding_of(metric: str, stamp: dict[str, Any]) -> dict[str, Any]:
    """What of a stamp decides a metric.

    The device does not: of the numbers, seconds per image alone are its own, and each row says on which they were measured. Nor does what
    the prompts' set or file is called: their hash does.
    """
    features = extractors_of(metric, stamp)
    judges = [] if features or metric in OTHERS else [metric.removesuffix(SHUFFLED)]
    to_teacher = is_distance(metric) and metric.endswith("_teacher")
    to_data = metric in COVERAGE or (is_distance(metric) and not to_teacher)
    decides = {
        "device": False, "set": False, "teacher": to_teacher, "data": to_data, "neighbours": metric in COVERAGE,
        "extractor": metric in OF_FIRST, "utility": metric == "utility",
    }  # fmt: skip
    parts = {
        "extractors": features, "scorers": judges, "configs": features + judges, "preprocess": features + judges,
        "seeds": ["rows", "reference"] if to_teacher else ["rows"],
        "versions": [package for package in stamp["versions"] if features or package not in ("torch-fidelity", "pillow")],
    }  # fmt: skip
    found = {
        field: {key: part for key, part in value.items() if key in parts[field]} if field in parts else value
        for field, value in stamp.items()
        if decides.get(field, True)
    }
    return {field: value for field, value in found.items() if value != {}}  # as of an early report, which lacks the field


def compared(stamp: dict[str, Any], other: dict[str, Any], metrics: Collection[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(what differs between two stamps -> which of the metrics it decides, the later fields that one of them lacks and that were not
    compared).

    metrics: those that both reports have. What decides none of them is no difference, nor is a library that only one of the two needed.
    """
    unknown = [field for field in LATER if (field in stamp) != (field in other)]
    one, two = ({key: value for key, value in held.items() if key not in unknown} for held in (stamp, other))
    both = one["versions"].keys() & two["versions"].keys()
    one, two = (held | {"versions": {key: value for key, value in held["versions"].items() if key in both}} for held in (one, two))
    for field in LATER_OF_TEACHER if one.get("teacher") and two.get("teacher") else ():
        if (field in one["teacher"]) != (field in two["teacher"]):
            unknown.append(f"teacher.{field}")
            one, two = (held | {"teacher": held["teacher"] | {field: None}} for held in (one, two))
    found: dict[str, list[str]] = {}
    for metric in metrics:
        for line in differences(deciding_of(metric, one), deciding_of(metric, two)):
            found.setdefault(line, []).append(metric)
    return found, unknown
