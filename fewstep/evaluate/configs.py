"""What a network, a tokenizer or a pipeline does beside its weights, as JSON: the same in every process and from every folder.

Weights alone do not decide a number: a VAE's scaling factor, an activation, the number of heads, a tokenizer's merges are none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.evaluate.store import sha256

# of configurations: what says where and by whom one was written, or of what type the weights are, which these say themselves
ASIDE = {"architectures", "dtype", "name_or_path", "processor_class", "torch_dtype", "transformers_version"}
ASKED = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map", "chat_template")  # of tokenizers


def config_hash(*parts: Any) -> str | None:
    """SHA-256 over the settings of parts, in their order; None where none of them has any."""
    found = [settings(part) for part in parts]
    return sha256(found) if any(found) else None


def pipeline_config(pipe: Any) -> str:
    """SHA-256 over a pipeline's class and own settings, and those of every part that it has."""
    own = {key: value for key, value in getattr(pipe, "config", {}).items() if key not in pipe.components}
    parts = {name: settings(part) for name, part in pipe.components.items() if part is not None}
    return sha256([type(pipe).__name__, plain(own), parts])


def settings(part: Any) -> dict[str, Any]:
    """What a part does beside its weights: a network, a tokenizer, a scheduler or a processor; of anything else nothing."""
    if isinstance(part, nn.Module):
        return of_module(part)
    if callable(getattr(part, "get_vocab", None)):
        return of_tokenizer(part)
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        return {"class": type(part).__name__, "config": plain(config)}
    if callable(getattr(part, "to_dict", None)):  # a processor may hold a tokenizer and others of its kind
        held = {name: found for name, value in vars(part).items() if (found := settings(value))}
        return {"class": type(part).__name__, "config": plain(part.to_dict()), "parts": held}
    return {}


def of_module(module: nn.Module) -> dict[str, Any]:
    """Class and configuration of a module or, where it has no configuration, of the outermost ones in it that have, by their name."""
    config = getattr(module, "config", None)
    if isinstance(config, Mapping) or callable(getattr(config, "to_dict", None)):
        return {"class": type(module).__name__, "config": plain(config)}
    return {name: found for name, child in module.named_children() if (found := of_module(child))}


def of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """All that a tokenizer does: the whole of what the `tokenizers` library runs, where it does, or else vocabulary, files and settings."""
    told = {"class": type(tokenizer).__name__, **{name: plain(getattr(tokenizer, name, None)) for name in ASKED}}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        does = json.loads(backend.to_str())
        return told | {"backend": {key: value for key, value in does.items() if key not in ("truncation", "padding")}}  # of its last call
    first = {key: value for key, value in getattr(tokenizer, "init_kwargs", {}).items() if not key.endswith(("_file", "_path"))}
    files: list[str] = []
    if callable(save := getattr(tokenizer, "save_vocabulary", None)):  # what no vocabulary tells: merges, a sentencepiece model
        with tempfile.TemporaryDirectory() as folder:
            files = [sha256(Path(path).read_bytes().hex()) for path in save(folder)]
    return told | {"vocabulary": tokenizer.get_vocab(), "settings": plain(first), "files": files}


def plain(value: Any) -> Any:
    """As JSON, without keys that begin with _ (the folder that it was read from, the version that wrote it) and those of ASIDE."""
    if callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    if isinstance(value, Mapping):
        kept = {str(key): plain(held) for key, held in value.items()}
        return {key: held for key, held in kept.items() if not key.startswith("_") and key not in ASIDE}
    if isinstance(value, list | tuple):
        return [plain(held) for held in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, str | int | float | None) else str(value)
