"""Command line: what each command takes. How a run goes is in run.py, how its objects are made in composition.py."""

from __future__ import annotations

import sys
from pathlib import Path

from fewstep.disk import DISK  # the rest is each command's own: a reward's server needs little of it
from fewstep.errors import LostProcess, NumericalError, RewardError, UserError, first_words, nearest
from fewstep.launch import anything_prints, first_alone_prints, launched, leaves_no_trace, sigterm_ends_as_ctrl_c

HELP = """usage: fewstep COMMAND [OPTIONS]

Distil a diffusion model into a few-step generator, with distribution matching as a reward.

commands:
  distill [RECIPE]        make a few-step student; with no argument: the embedded teacher, GNDM, 4 steps;
                          RECIPE is a YAML file, or a method: dmd, dmd2, gndm, dmdr, gndmr, gndmr-1, gndmr-4, gndm-is,
                          gndmr-is; or a family's teacher: sd, sdxl, sd3, flux, flux2, sana, pixart, z_image, qwen_image
                          (with --teacher, what is not set is as in its family's)
  sample STUDENT          draw pictures with a student
  models                  list the model families and what each supports
  export FOLDER           write a student as a diffusers folder, a LoRA or a file for ComfyUI; push it to the hub
  evaluate STUDENT        measure a student beside its teacher
  compare                 recipes x seeds on the embedded world at equal network evaluations, as one table
  rewards                 the named rewards: what they score, licences, range, memory
  serve-reward NAME       one reward behind HTTP, for an environment or a GPU of its own
  convert-reward NAME     a reward's published pickle into safetensors, once

`fewstep COMMAND --help` lists a command's options; `fewstep --version` prints the version."""


@leaves_no_trace()
@anything_prints()
@sigterm_ends_as_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("fewstep"))
        return 0
    commands = {
        "distill": distill_command, "sample": sample_command, "export": export_command, "evaluate": evaluate_command,
        "compare": compare_command, "models": models_command, "rewards": rewards_command, "serve-reward": serve_reward_command,
        "convert-reward": convert_reward_command,
    }  # fmt: skip
    if arguments[0] not in commands:
        return complain(f"unknown command {arguments[0]!r}{nearest(arguments[0], commands)}")
    try:
        check_text(arguments)
        return commands[arguments[0]](arguments[1:])
    except UserError as error:
        return complain(str(error))
    except RewardError as error:
        return complain(f"{error}. Nothing was updated with it. {kept(arguments[0], error)}".strip(), code=1)
    except KeyboardInterrupt as error:
        return complain(f"stopped. {kept(arguments[0], error)}".strip(), code=130)
    except NumericalError as error:  # nothing was updated or saved after it: the last checkpoint is the state to go on from
        return complain(f"{error}. {kept(arguments[0], error)}".strip(), code=1)
    except OSError as error:
        if error.errno not in DISK or error.filename is None:
            raise
        path = error.filename2 or error.filename  # what a renamed file was to be
        return complain(f"{path}: {error.strerror}. {kept(arguments[0], error)}".strip(), code=1)
    except LostProcess as error:
        return complain(f"{error}. {kept(arguments[0], error)}".strip(), code=1)
    except RuntimeError as error:  # torch's by name: --help must not import it
        if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            why = str(error).strip().splitlines()[0]
            return complain(
                f"--compile: torch cannot compile the networks' blocks here ({why}); it needs a C++ compiler, and on a GPU Triton. "
                "Install what is missing, or leave the flag out: the updates are the same, and slower",
                code=1,
            )
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return complain(f"{first_words(error)}. {SMALLER.get(arguments[0], '')} {noted(error)}".strip(), code=1)


def check_text(arguments: list[str]) -> None:
    """Raises UserError for an argument in another encoding, as a folder's name may be: all that is written and printed is UTF-8."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{argument!r} holds bytes that are not UTF-8 text; give it in UTF-8, or rename the folder") from error


SMALLER = {  # what takes less of a device's memory, by command
    "distill": "`fewstep distill ... --dry-run` says what a run needs. --memory.micro-groups 1 and --memory.checkpointing take less, also "
    "where a run goes on; --lora-rank 64 and --memory.optimizer adamw8bit do where one begins.",
    "evaluate": "A smaller --batch takes less; what was drawn is kept",
}


KEPT = {  # after Ctrl-C, SIGTERM or a disk that takes no more, by command
    "evaluate": "Every part that was whole is kept: the same call goes on",
    "compare": "Every finished cell is kept: the same call goes on",
    "sample": "The pictures that were drawn are kept",
}


def kept(command: str, error: BaseException) -> str:
    """What is left of a command that ended early."""
    return KEPT.get(command, "") or noted(error)


def noted(error: BaseException) -> str:
    """What an error says beside itself: a run's, what there is to go on from (`run.noting_what_is_kept`)."""
    return " ".join(getattr(error, "__notes__", []))


def complain(message: str, *, code: int = 2) -> int:
    rank, size = launched()
    print(f"fewstep: error: {f'process {rank}: ' if size > 1 else ''}{message}", file=sys.stderr)
    return code


def distill_command(arguments: list[str]) -> int:
    from fewstep.flags import on_family_recipe, parse_config
    from fewstep.run import distill

    with first_alone_prints():
        return distill(parse_config(on_family_recipe(arguments)))


def told_help(command: str, does: str, arguments: list[str]) -> bool:
    """Whether help was asked for, and printed, of a command without arguments. Raises UserError for any other argument."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError(f"{command}: takes no arguments, got {arguments[0]!r}")
    if arguments:
        print(f"usage: fewstep {command}\n\n{does}")
    return bool(arguments)


def models_command(arguments: list[str]) -> int:
    """Print the families and what each supports."""
    if told_help("models", "List the model families and what each supports.", arguments):
        return 0
    from fewstep import models

    models.quiet_libraries()
    rows = [models.SUPPORT, *models.support()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nA teacher is a diffusers folder or a hub id of one of these pipelines; how to add one: docs/new-family.md")
    return 0


def evaluate_command(arguments: list[str]) -> int:
    from fewstep.evaluate import command

    return command.command(arguments)


def export_command(arguments: list[str]) -> int:
    from fewstep.flags import saved_config, student_parser

    parser = student_parser("export", "Write a run's student in the form that other tools read; an unfinished run's newest checkpoint too.")
    parser.add_argument(
        "--to", required=True, choices=("diffusers", "lora", "kohya"),
        help="a full pipeline folder; the LoRA file and its scheduler; one LoRA file for ComfyUI and the web UIs (SD 1.5, 2.1, SDXL)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=None, help="an empty folder (default: FOLDER/export/FORM)")
    parser.add_argument("--push", metavar="ORG/NAME", default=None, help="upload it to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="a private repository")
    options = parser.parse_args(arguments)
    config = saved_config(options.folder)
    from fewstep import export, models

    models.quiet_libraries()
    told = {"to": options.to, "output": options.output, "repository": options.push, "private": options.private}
    try:
        export.export(options.folder, config, **told)
    except export.CannotExport as error:
        raise UserError(str(error)) from error
    return 0


def compare_command(arguments: list[str]) -> int:
    from fewstep.compare import command

    return command.command(arguments)


def rewards_command(arguments: list[str]) -> int:
    if told_help("rewards", "List the named rewards: licence of code and weights, range, whether differentiable, memory.", arguments):
        return 0
    from rich.console import Console
    from rich.table import Table

    from fewstep.rewards import rows

    header, *body = rows()
    table = Table(*header, show_lines=True)
    for row in body:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    return 0


def serve_reward_command(arguments: list[str]) -> int:
    from fewstep.rewards import serve

    try:
        return serve.command(arguments)
    except ValueError as error:
        raise UserError(f"serve-reward: {error}") from error


def convert_reward_command(arguments: list[str]) -> int:
    from fewstep import models
    from fewstep.rewards import convert

    models.quiet_libraries()
    try:
        return convert.command(arguments)
    except ValueError as error:
        raise UserError(f"convert-reward: {error}") from error


def sample_command(arguments: list[str]) -> int:
    from fewstep import sample

    return sample.command(arguments)


if __name__ == "__main__":
    sys.exit(main())
