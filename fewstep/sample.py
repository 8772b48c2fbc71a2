"""`fewstep sample`: pictures of a student, through stock diffusers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.disk import check_writable, naming, replace
from fewstep.errors import NumericalError, UserError

if TYPE_CHECKING:
    from torch import Tensor


def command(arguments: list[str]) -> int:
    options = read_options(arguments)
    prompts = read_prompts(options.prompt, options.prompts)
    from fewstep import models
    from fewstep.config import Config
    from fewstep.evaluate.command import evaluation_device, on_hub, student_scale, student_steps
    from fewstep.evaluate.drawing import BATCH, pictures
    from fewstep.flags import is_student_folder, student_config

    own = is_student_folder(options.folder)
    folder = options.folder if own else on_hub(options.folder.as_posix(), weights=True)[1]
    steps = student_steps(options.steps, models.steps_of(folder))
    models.quiet_libraries()
    trained = student_config(folder)
    scale, config = student_scale(folder, trained, options.guidance, name=options.folder), trained or Config()
    if scale is None and options.guidance is not None:
        raise UserError("--guidance: one scale is distilled into this student and fixed; leave the flag out")
    output = options.output or (folder if own else Path()) / "pictures"
    check_writable("--output", output)
    try:
        size = (dataclasses.replace(config, size=[options.size]) if options.size is not None else config).sizes()[0]
        device = evaluation_device()
        backbone = models.load(str(folder), device=device, dtype=models.stored_dtype(folder))
        backbone.latent_shape(size)
    except models.UnsupportedTeacher as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"--size: {error}") from error
    pipe, call = backbone.pipe.to(device), backbone.student_told(scale) | backbone.told_size(size)
    if trained is None and size is None:
        print("drawn at {height}x{width}, the network's own size: nothing there says at which it was trained (--size)".format(**call))
    try:
        listing = output / "pictures.jsonl"
        drop_cut_line(listing)
        with naming(output), listing.open("a", buffering=1, encoding="utf-8") as log:  # a line is there with its picture
            told = {"num_inference_steps": steps} | call
            drawn = pictures(pipe, prompts, options.n, seed=options.seed, batch=BATCH, call=told)
            for number, (prompt, index, image) in enumerate(drawn):
                line = {"prompt": prompt, "seed": options.seed, "index": index, "steps": steps}
                path = save(image, output, number, line)
                log.write(json.dumps({"file": path.name} | line | ({} if scale is None else {"guidance": scale})) + "\n")
                print(path, flush=True)
    except NumericalError as error:
        raise UserError(f"{options.folder}: {error}") from error
    return 0


def read_options(arguments: list[str]) -> Any:
    """Raises UserError naming the flag."""
    from fewstep.flags import student_parser

    parser = student_parser("sample", "Draw pictures with a student, through stock diffusers.", on_hub=True)
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given more than once")
    parser.add_argument(
        "--prompts", default=None,
        help="more to draw: a text with one a line, a .csv, .tsv, .json or .jsonl with captions, a set by NAME, or a data set on the hub",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=None, help="steps (default: those the student was made for)")
    parser.add_argument("--seed", type=int, default=0, help="with a picture's number among those of its prompt, it decides the noise")
    parser.add_argument("-n", type=int, default=1, help="how many pictures of each prompt")
    parser.add_argument("--size", default=None, help="HEIGHTxWIDTH in pixels (default: that of its run, or the network's own)")
    parser.add_argument(
        "--guidance", type=float, default=None,
        help="guidance scale of a student with a range (default: teacher_guidance of its run, inside the range)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=None, help="folder for the PNG files (default: FOLDER/pictures)")
    options = parser.parse_args(arguments)
    if options.n < 1:
        raise UserError(f"-n: must be at least 1, got {options.n}")
    if options.seed < 0:
        raise UserError(f"--seed: must not be negative, got {options.seed}")
    return options


def read_prompts(given: list[str], source: str | None) -> list[str]:
    """Those of `--prompt`, then those of `--prompts`, in their order. Raises UserError for none, or one that cannot be drawn."""
    from fewstep.evaluate import sets
    from fewstep.prompts import BadPrompts

    if any(not prompt.strip() for prompt in given):
        raise UserError("--prompt: empty; say what to draw")
    problems = [problem for prompt in given if (problem := sets.problem_of({"prompt": prompt}))]
    if problems:
        raise UserError(f"--prompt: {problems[0]}")
    if not given and source is None:
        raise UserError("--prompt: missing; say what to draw, or give --prompts FILE")
    try:
        return given + (sets.load(source).prompts if source is not None else [])
    except BadPrompts as error:
        raise UserError(f"--prompts: {error}") from error


def drop_cut_line(listing: Path) -> None:
    """Take off the line, with a warning, that a full disk or a kill cut: the next one would be written behind it."""
    held = listing.read_bytes() if listing.is_file() else b""
    if held and not held.endswith(b"\n"):
        warnings.warn(f"{listing}: its last line was cut off and is left out", stacklevel=2)
        os.truncate(listing, held.rfind(b"\n") + 1)


def save(image: Tensor, folder: Path, number: int, line: dict[str, Any]) -> Path:
    """The PNG of a picture. Its name holds a hash, never the prompt: any text may be a prompt, not any text a file name."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    digest = hashlib.sha256(f"{line['seed']}\0{line['prompt']}".encode() + pixels.tobytes()).hexdigest()[:8]
    path = folder / f"step{line['steps']}-{number:03d}-{digest}.png"
    replace(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))
    return path
