"""`fewstep convert-reward`: a published pickle into a folder of safetensors, once. Only a process of its own ever opens the pickle."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fewstep.disk import give_usual_mode, naming, rename, visible
from fewstep.rewards import REWARDS, files, sources

# argv: pickle, safetensors. weights_only refuses everything but tensors and plain containers; nothing of fewstep is imported.
OPEN = """
import sys
import warnings
import torch
from safetensors.torch import save_file
warnings.simplefilter("ignore")
try:
    held = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
except Exception as error:  # of many kinds, with advice to load it as a pickle; what is amiss stands after it
    said = (str(error).partition("WeightsUnpickler error:")[2] or str(error)).strip().partition(chr(10))[0]
    sys.exit(f"it is damaged, or no file of tensors alone as torch.save writes it ({type(error).__name__}: {said})")
state = held.get("state_dict", held) if isinstance(held, dict) else None
if not state or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
    sys.exit("it holds no state dict of tensors")
state = {name.removeprefix("module."): value.clone().contiguous() for name, value in state.items()}
try:
    save_file(state, sys.argv[2])
except Exception as error:
    sys.exit(f"its tensors cannot be written ({error})")
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def command(arguments: list[str]) -> int:
    """`fewstep convert-reward`. Raises ValueError for what cannot be converted."""
    known = [name for name, row in REWARDS.items() if row.clip]
    parser = Parser(prog="fewstep convert-reward", description="Make a reward's folder of a published pickle.", allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", choices=known, help=", ".join(known))
    parser.add_argument("file", metavar="FILE", type=Path, help="the published .pt, .pth or .bin")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--clip", default=None, help="folder or hub id of the CLIP that it belongs to (default: the published one's)")
    options = parser.parse_args(arguments)
    convert(options.name, options.file, options.output, clip=options.clip)
    print(f"use it with --scorer.{options.name} {options.output}")
    return 0


def convert(name: str, file: Path, output: Path, *, clip: str | None = None) -> None:
    """Make `output`, a folder that the named reward loads. Raises ValueError naming the file."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    if output.exists():
        raise ValueError(f"{output}: exists already; name a folder to make")
    source = sources.locate("clip", clip or REWARDS[name].clip)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=output.parent)  # on its file system: made whole, then renamed
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror})") from error
    with naming(output.parent), beside as folder:
        held = Path(folder) / "state.safetensors"
        done = subprocess.run([sys.executable, "-I", "-c", OPEN, str(file), str(held)], capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"{file}: cannot be converted: {' '.join(done.stderr.split())[-600:]}")
        from safetensors.torch import load_file

        state = {name: value.clone() for name, value in load_file(held).items()}  # Windows removes no file that tensors still map
        made = Path(folder) / "made"
        made.mkdir()
        try:
            (write_aesthetic if name == "aesthetic" else write_clip)(name, state, source, made)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        for path in visible(made, "*.safetensors"):
            give_usual_mode(path)
        rename(made, output)


def write_aesthetic(name: str, state: dict[str, Any], source: str, folder: Path) -> None:
    from safetensors.torch import save_file

    from fewstep.rewards.aesthetic import check_head

    head = check_head(state)
    save_file(head, folder / "model.safetensors")
    local = Path(source).expanduser()
    named = {"clip": str(local.resolve()) if local.is_dir() else source}
    (folder / "reward.json").write_text(json.dumps(named) + "\n", encoding="utf-8")


def write_clip(name: str, state: dict[str, Any], source: str, folder: Path) -> None:
    """A stock folder: the state dict in the architecture of `source`, with its tokenizer and preprocessing."""
    from transformers import AutoConfig, AutoModel

    from fewstep.rewards.hps import from_open_clip

    words = files.fetch(source, weights=False)
    model = AutoModel.from_config(AutoConfig.from_pretrained(words, trust_remote_code=False), trust_remote_code=False)
    state = from_open_clip(state) if name == "hps" else state
    try:
        report = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(f"not weights of the model in {source}: {' '.join(str(error).split())[:300]}") from error
    unknown = [key for key in report.unexpected_keys if not key.endswith("position_ids")]  # a buffer that old versions kept
    if report.missing_keys or unknown:
        odd = ", ".join([*report.missing_keys, *unknown][:4])
        raise ValueError(f"not weights of the model in {source}: missing or unknown {odd}")
    model.save_pretrained(folder)
    for path in visible(words, *files.WORDS):
        if path.is_file() and not (folder / path.name).exists() and path.name != "model.safetensors.index.json":
            shutil.copy(path, folder)
