"""Few-step generators from diffusion models, distilled with rewards: distribution matching is one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__version__ = "0.1.0"
__all__ = ["distill", "load"]


def distill(
    teacher: str | Path = "world",
    prompts: str | Path | Iterable[str] | None = None,
    *,
    rewards: dict[str, Any] | None = None,
    judges: dict[str, Any] | None = None,
    steps: int = 4,
    output: str | Path = "out",
    **config: Any,
) -> Path:
    """Distil `teacher` into a `steps`-step student; returns its folder, which stock diffusers opens.

    teacher: a diffusers pipeline folder, a hub id, or "world" (embedded); prompts: any of a list, a data set's column and their like, which
    are kept in the folder as prompts.json, a file, such as a text with one a line, or a data set on the hub.
    rewards: name -> weight of a named reward; or a function of (images, prompts), a Reward, "path/to/file.py:function" or a server's
    address (weight 1); or a pair of one of these and its weight.
    judges: name -> a function of (images, prompts), or where a named one comes from, None for its own source: scored beside the
    rewards, never trained on.
    config: any other field of `fewstep.config.Config`; groups as dicts, `student={"lr": 1e-4}`. What is not given is as in the recipe of
    the teacher's family.
    Raises fewstep.errors.UserError for what `fewstep distill` would refuse, KeyboardInterrupt when it was stopped early.
    """
    from numbers import Real
    from pathlib import Path
    from types import NoneType

    from fewstep import flags
    from fewstep.errors import UserError
    from fewstep.launch import anything_prints, first_alone_prints, leaves_no_trace
    from fewstep.run import distill as run

    if not isinstance(teacher, (str, Path)):
        raise UserError(f"teacher: is a {type(teacher).__name__}; save it with save_pretrained(FOLDER) and give the folder")
    wanted = (
        "give a function of (images, prompts), a Reward, or where one comes from: path/to/file.py:function, a folder, a server's address"
    )
    for name, table in {"rewards": rewards, "judges": judges, **{key: config.get(key) for key in ("reward", "scorer", "judge")}}.items():
        if not isinstance(table, (dict, NoneType)):
            raise UserError(f"{name}: give a dict, whose keys are names; got a {type(table).__name__}")
    weights: dict[str, float] = dict(config.pop("reward", None) or {})
    functions: dict[str, Any] = {}
    scorers: dict[str, str] = dict(config.pop("scorer", None) or {})
    for name, value in (rewards or {}).items():
        if name in weights:
            raise UserError(
                f"reward: {name!r} has a weight here and one in rewards, 1 if none is given; give it there: (..., {weights[name]})"
            )
        if isinstance(value, tuple) and len(value) != 2:
            raise UserError(f"rewards: {name!r} is a tuple of {len(value)}; {wanted}; or a pair of one of these and its weight")
        given, weights[name] = value if isinstance(value, tuple) else (None, value) if isinstance(value, Real) else (value, 1.0)
        if isinstance(given, (str, Path)):
            scorers[name] = str(given)
        elif callable(given):
            functions[name] = given
        elif given is not None:
            raise UserError(f"rewards: {name!r} is a {type(given).__name__}; {wanted}; or a pair of one of these and its weight")
        if not isinstance(weights[name], Real):
            raise UserError(f"rewards: the weight of {name!r} is a {type(weights[name]).__name__}; give a number")
    beside: dict[str, Any] = dict(config.pop("judge", None) or {})
    judging: dict[str, Any] = {}
    for name, judge in (judges or {}).items():
        if callable(judge):
            judging[name] = judge
        elif judge is None or isinstance(judge, (str, Path)):
            beside[name] = judge
        else:
            raise UserError(f"judges: {name!r} is a {type(judge).__name__}; {wanted}")
    given = None
    if prompts is not None and not isinstance(prompts, (str, Path)):
        # a set's order differs from process to process
        given = sorted(prompts, key=str) if isinstance(prompts, (set, frozenset)) else list(prompts)
    own = {"teacher": teacher, "prompts": prompts if given is None else None, "steps": steps, "output": output, "reward": weights}
    own |= {"scorer": scorers, **config}
    arguments = [*flags.as_arguments(own), *(f"--judge.{name}={source or 'null'}" for name, source in beside.items())]
    with leaves_no_trace(), anything_prints(), first_alone_prints():
        parsed = flags.parse_config(flags.on_family_recipe(arguments), functions)
        stopped = run(parsed, functions, judging, given) != 0
    if stopped:
        raise KeyboardInterrupt(f"stopped early; the run in {parsed.output} can be resumed")
    return Path(parsed.output)


def load(path: str | Path) -> Any:
    """The stock diffusers pipeline of a finished student: a bf16 folder as bf16, any other, and a hub id, as float32."""
    from fewstep.launch import leaves_no_trace
    from fewstep.models import stock_pipeline

    with leaves_no_trace():
        return stock_pipeline(path)
