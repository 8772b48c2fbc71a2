"""A run, from its checked config to the finished student: train, export, measure, draw."""

from __future__ import annotations

import json
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep import hub
from fewstep.composition import (
    HELD_OUT,
    Run,
    assets,
    build,
    check_guidance,
    check_processes,
    resolve_hardware,
    resolve_judges,
    resolve_rewards,
    resolve_teacher,
    say_what_looks_wrong,
    training_grid,
)
from fewstep.disk import alone, check_cache, clear, naming, replace_text
from fewstep.errors import NumericalError, RewardError, UserError, as_word, first_words
from fewstep.evaluate.command import measure_student
from fewstep.flags import as_plain, as_yaml
from fewstep.folder import (
    GIVEN,
    TEACHER_FILES,
    check_init,
    check_output,
    check_same_teacher,
    is_checkpoint,
    is_given,
    keeps_prompts,
    remove_run,
)
from fewstep.launch import launched, torchrun_limit

if TYPE_CHECKING:
    from fewstep.config import Config
    from fewstep.ranks import Ranks
    from fewstep.report.curves import Curves


def read_prompts(config: Config) -> list[str]:
    """Each prompt once. A data set on the hub gets its commit in `config.prompts`. Raises UserError."""
    from fewstep import world
    from fewstep.evaluate import sets
    from fewstep.prompts import BadPrompts

    if config.prompts is not None:
        own = Path(config.output) / GIVEN
        try:
            found = sets.load(str(own) if config.resume and is_given(config.prompts) and own.is_file() else config.prompts)
        except BadPrompts as error:
            moved = "; if the file has moved, --prompts NEW" if config.resume else ""
            raise UserError(f"prompts: {error}{moved}") from error
        if "/" in found.name:  # of the hub, with its commit
            config.prompts = found.name
        return list(dict.fromkeys(found.prompts))
    if config.teacher != "world":
        raise UserError("prompts: missing; give a file of them, such as a text with one a line (only the embedded teacher brings its own)")
    return world.prompts("train")


def teacher_of(config: Config) -> str:
    """As `resolve_teacher`; a folder of a run that goes on may have moved."""
    try:
        return resolve_teacher(config.teacher)
    except UserError as error:
        if not config.resume or Path(config.teacher).exists():
            raise
        raise UserError(f"{error}; if its folder has moved, --teacher NEW") from error


def own_prompts(given: list[str]) -> list[str]:
    """Each prompt of a caller's own list once. Raises UserError."""
    from fewstep.evaluate.sets import as_set
    from fewstep.prompts import BadPrompts

    try:
        return list(dict.fromkeys(as_set([{"prompt": prompt} for prompt in given], "prompts", "prompts").prompts))
    except BadPrompts as error:
        raise UserError(str(error)) from error


def distill(
    config: Config,
    functions: dict[str, Any] | None = None,
    judges: dict[str, Any] | None = None,
    given: list[str] | None = None,
) -> int:
    """Check, train, export, measure. functions, judges, given: rewards, judges and prompts of the caller's own. Returns the exit code.

    Of several processes (torchrun's) each trains on its share of every batch, and the first alone writes and measures.
    """
    if given is not None:  # kept with the run, for one that goes on
        config.prompts = str(Path(config.output) / GIVEN)
    prompts = read_prompts(config) if given is None else own_prompts(given)
    functions = resolve_rewards(config, functions or {})
    judges = resolve_judges(config, judges or {}, functions)
    source = teacher_of(config)
    if hub.parts(source):
        config.teacher = source  # with its commit: a run that goes on has the same teacher
    check_guidance(config, source)
    rank, size = launched()
    check_processes(config, size)
    if rank == 0 and config.init is not None and not config.resume:
        check_init(config, source)
    if config.dry_run:
        return dry_run(config, source, len(prompts)) if rank == 0 else 0
    check_cache("embeddings", "conditions of prompts")
    from fewstep.ranks import Ranks  # not before: torch takes seconds, and a mistake is told at once

    with ExitStack() as held:
        if rank == 0:
            check_output(config)
            held.enter_context(alone("output", Path(config.output)))
            clear(Path(config.output))
        if size > 1:
            print(f"waiting until all {size} processes are there", flush=True)
        ranks = Ranks.join(config.device)
        code = carry_out(config, prompts, source, functions, judges, ranks)
        ranks.leave()
    return code


def carry_out(config: Config, prompts: list[str], source: str, functions: dict[str, Any], judges: dict[str, Any], ranks: Ranks) -> int:
    """Build, train, export, measure what has been checked. Returns the exit code."""
    from fewstep import models

    output, first = Path(config.output), ranks.rank == 0
    models.quiet_libraries()
    if config.resume:
        check_same_teacher(source, output)
    folder, state = find_checkpoint(output / "checkpoints", ranks) if config.resume else (None, None)
    if state is not None and state["update"] > config.updates:
        at = state["update"]
        raise UserError(f"updates: the run in {output} is at update {at} already; give that many or more, got {config.updates}")
    run = build(config, prompts, source, functions, judges, ranks=ranks)
    asked, config = config.device, run.config
    print(f"training on {config.device} in {config.precision}" + (f", {ranks.size} processes" if ranks.size > 1 else ""))
    if first:
        say_what_is_cut(run)
    if state is not None:
        load_state(run, state, folder)
    elif config.init is not None:
        start_from(run, Path(config.init))
    del state  # a checkpoint that is in use cannot be removed (`checkpoint.load`)
    with noting_what_is_kept(output), naming(output):
        if first:
            if config.overwrite:  # not before: all that can fail at the start has not, and the earlier run was there until now
                remove_run(output)
            write_record(run, prompts, source, functions, judges, asked)
        if not train(run, output, prompts):
            return 130
        if first:
            finish(run, output, source, prompts)
        ranks.barrier()  # what is returned is there for all
        return 0


def say_what_is_cut(run: Run) -> None:
    """A line on the prompts that are longer than the text encoder reads: of a large set on those alone that the run draws."""
    drawn = run.trainer.batches.ahead(run.config.batches())
    cut, negative = run.backbone.cut(drawn), run.config.matching.negative_prompt
    if negative and run.backbone.cut([negative]):
        print(f"matching.negative_prompt is longer than the text encoder reads and is cut: {negative!r}")
    if cut:
        print(f"{len(cut)} of {len(drawn)} prompts are longer than the text encoder reads and are cut, the first: {cut[0]!r}")


@contextmanager
def noting_what_is_kept(output: Path) -> Iterator[None]:
    """What ends a run early gets a note of what there is to go on from."""
    try:
        yield
    except BaseException as error:
        # these come again as long as the settings are the same
        error.add_note(way_on(output, anew=isinstance(error, (NumericalError, RewardError))))
        raise


def way_on(output: Path, *, anew: bool) -> str:
    """How to go on from what a run that ended early has left; anew: with other settings, which `--resume` refuses."""
    from fewstep import checkpoint

    if not (output / "config.yaml").is_file():
        return "Nothing was saved yet"
    if not checkpoint.checkpoints(output / "checkpoints"):
        return "No checkpoint was saved yet: " + ("begin anew with --overwrite" if anew else "--resume begins at update 0")
    on = f"The last checkpoint is whole: go on with fewstep distill --output {as_word(output)} --resume"
    return on + (f", or with other settings in a new run, --init {as_word(output)} --output NEW" if anew else "")


def find_checkpoint(root: Path, ranks: Ranks) -> tuple[Path | None, Any]:
    """(folder, contents) of the newest valid checkpoint, or (None, None). Raises UserError where none can be read, or the processes do not
    see the same one."""
    from fewstep import checkpoint

    if ranks.rank == 0:
        checkpoint.clear(root)
    ranks.barrier()
    try:
        found = checkpoint.newest(root)
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"resume: {error}") from error
    seen = ranks.all_gather_object(found and found[0].name)
    if len(set(seen)) > 1:
        raise UserError(f"resume: the processes see other checkpoints under {root} ({seen}); it must lie on a disk that all machines share")
    print("no checkpoint was saved yet: starting from update 0" if found is None else f"going on from {found[0].name}")
    return found or (None, None)


def load_state(run: Run, state: dict[str, Any], folder: Path | None) -> None:
    """Set a run to the state of the checkpoint in `folder`. Raises UserError for one that is damaged, of another run, of other prompts, or
    of another version of fewstep."""
    from fewstep import checkpoint
    from fewstep.prompts import BadPrompts

    try:
        check_own(run.config, state["config"], folder)
        run.trainer.load_state(state)
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"resume: {error}") from error
    except BadPrompts as error:
        raise UserError(f"prompts: {error}; give them back, or begin anew with --overwrite or another --output") from error
    except KeyError as error:
        raise UserError(
            f"resume: {folder} holds no {error}: another version of fewstep saved it. Go on with that one, or anew with --overwrite"
        ) from error


def check_own(config: Config, before: dict[str, Any], folder: Path | None) -> None:
    """Raises UserError for a checkpoint that was saved with another value of what may not change in a run: one that was copied from another
    run's folder. before: what it kept of its config, where a field of another version of fewstep may be missing."""
    now = config.lasting()
    changed = next((name for name in before if name in now and before[name] != now[name]), None)
    if changed is not None:
        raise UserError(
            f"resume: {folder} is of a run with {changed} {before[changed]!r}, and this one's config.yaml has {now[changed]!r}: put back "
            "the checkpoints, or the config.yaml, that belong to this run, or begin a new one with that student, "
            f"--init {as_word(folder)} --output NEW"
        )


def start_from(run: Run, folder: Path) -> None:
    """Give a run the averaged student and the fake of the run in another folder, or of the checkpoint there. Raises UserError."""
    from fewstep import checkpoint

    keys = ("update", "student", "ema", "online")
    try:
        if is_checkpoint(folder):
            found = folder, checkpoint.load(folder, only=keys)
        else:
            found = checkpoint.newest(folder / "checkpoints", only=keys)
        if found is None:
            raise UserError(f"init: {folder} holds no checkpoint")
        run.trainer.start_from(found[1])
    except (checkpoint.DamagedCheckpoint, KeyError) as error:
        raise UserError(f"init: {folder}: {error}") from error
    print(f"starting from the student of {folder} at update {found[1]['update']}")


def write_record(run: Run, prompts: list[str], source: str, functions: dict[str, Any], judges: dict[str, Any], device: str) -> None:
    """Write into a run's folder what it is: its config, prompts that were given, hashes of its teacher's files, and the versions of its
    rewards and judges; says which versions have changed. device: as it was asked for, since a run may go on where `auto` is another."""
    from fewstep import models
    from fewstep.rewards import sources

    config, output = run.config, Path(run.config.output)
    kept = as_plain(config) | {"device": device, "resume": False, "overwrite": False}  # the last two are of this call, not of the run
    replace_text(output / "config.yaml", as_yaml(kept))
    if keeps_prompts(config):  # again where --overwrite has deleted what was read
        replace_text(output / GIVEN, json.dumps(prompts, indent=0, ensure_ascii=False))
    if Path(source).is_dir() and not (output / TEACHER_FILES).is_file():
        replace_text(output / TEACHER_FILES, json.dumps(models.weights_in(Path(source)) | models.configurations_in(Path(source)), indent=1))
    records = sources.records(config.reward, config.scorer, functions, assets=assets(config))
    records |= {f"judge.{name}": record for name, record in judge_records(config, judges).items()}
    if run.real is not None:
        records["discriminator"] = {"source": config.discriminator.latents or "the embedded world's", "version": run.real.version}
    for line in sources.write_records(output / "rewards.json", records, run.trainer.update):
        print(line)


def judge_records(config: Config, functions: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Where each judge of a run comes from and in which version."""
    from fewstep import world
    from fewstep.rewards import sources

    own = [name for name, source in config.judge.items() if source == HELD_OUT and name not in functions]
    twins = {name: {"source": f"the embedded world's, {HELD_OUT}", "version": sources.version(str(world.TWINS[name]))} for name in own}
    named = {name: source for name, source in config.judge.items() if source is not None}
    others = [name for name in dict.fromkeys([*config.judge, *functions]) if name not in own]
    return twins | sources.records(others, named, functions, assets=assets(config))


def dry_run(config: Config, source: str, prompts: int) -> int:
    """Print what the run would need. Nothing is read but configurations, nothing is written."""
    from fewstep import models

    models.quiet_libraries()
    from fewstep import needs  # not before: it imports what is to be quiet

    config = resolve_hardware(config)
    try:
        backbone = needs.skeleton(source, models.frozen_dtype(config))
        times, _ = training_grid(backbone, config)
        say_what_looks_wrong(backbone, config, times)
        print(needs.report(source, config, prompts))
    except ValueError as error:
        raise UserError(f"teacher: {error}") from error
    return 0


def grid_prompts(config: Config, prompts: list[str]) -> list[str]:
    from fewstep import world

    return world.prompts("grid") if config.teacher == "world" and config.prompts is None else prompts[:8]


@contextmanager
def heard(told: Callable[[int, Any], None]) -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM call `told`. Python hands signals to the main thread alone: in another one this says so, no more."""
    if threading.current_thread() is not threading.main_thread():
        print("not in the main thread, where no signal is heard: one that ends this process loses what is newer than the last checkpoint")
        yield
        return
    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(run: Run, output: Path, prompts: list[str]) -> bool:
    """Run the trainer behind a progress bar. False when it was stopped, be it in the last update."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from fewstep.report.curves import Curves

    curves = Curves(output / "metrics.jsonl")
    stopping: list[int] = []
    ranks = run.trainer.ranks

    def ask_to_stop(number: int, frame: Any) -> None:
        # a second Ctrl-C does not wait; of several processes each hears one from the terminal and one from the launcher
        if len(stopping) > (ranks.size > 1):
            raise KeyboardInterrupt
        stopping.append(number)
        with suppress(RuntimeError):  # a signal that comes in the middle of another print: that one is not reentrant
            print(f"\nstopping: saving at the end of this update{torchrun_limit()}", flush=True)

    trainer, config = run.trainer, run.config
    text = TextColumn("R_dm {task.fields[score]}  lag {task.fields[lag]}  {task.fields[rate]} updates/s")
    columns = (TextColumn("distilling"), BarColumn(bar_width=20), MofNCompleteColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
    with heard(ask_to_stop), Progress(*columns) as bar:
        task = bar.add_task("", total=config.updates, completed=trainer.update, score="-", lag="-", rate="-")
        seconds = 0.0
        for logs in trainer.run(output, stop=lambda: bool(stopping)):
            running = trainer.running
            seconds = logs["seconds"] if not seconds else seconds + 0.1 * (logs["seconds"] - seconds)
            shown = {
                "score": f"{running['dm/score']:.3g}" if "dm/score" in running else "-",
                "lag": f"{running['dm/lag']:+.4f}" if "dm/lag" in running else "-",  # none before a size's second rollout
                "rate": f"{1 / seconds:.2f}",
            }
            bar.update(task, completed=trainer.update, **shown)
            if not bar.console.is_terminal and trainer.update % 20 == 0:
                print(
                    f"update {trainer.update}/{config.updates}  R_dm {shown['score']}  lag {shown['lag']}  {shown['rate']} updates/s",
                    flush=True,
                )
            due = config.sample_every and trainer.update % config.sample_every == 0 and trainer.update < config.updates
            if due and ranks.rank == 0:
                draw_progress(run, output, grid_prompts(config, prompts), curves)
    if ranks.any(bool(stopping)):
        on = f"fewstep distill --output {as_word(output)} --resume"
        print(f"stopped at update {trainer.update} of {config.updates}; saved. Go on with: {on}")
        return False
    return True


SAMPLES_PER_PROMPT = 3


def sample_grid(pipe: Any, prompts: list[str], *, steps: int, call: dict[str, Any]) -> Any:
    """(P, N, 3, H, W) in [0, 1]: the grid's samples, N for each prompt, always with the same noise: those that `fewstep sample -n N` draws.

    call: what the pipeline is told beside.
    """
    import torch

    from fewstep.evaluate.drawing import GRID_BATCH, pictures

    told = {"num_inference_steps": steps} | call
    images = torch.stack([image for _, _, image in pictures(pipe, prompts, SAMPLES_PER_PROMPT, seed=0, batch=GRID_BATCH, call=told)])
    return images.view(len(prompts), SAMPLES_PER_PROMPT, *images.shape[1:])


def student_grid(run: Run, prompts: list[str], weights: dict[str, Any]) -> Any:
    """The grid of the student with the given (averaged) weights, drawn on the training's own network."""
    backbone, steps = run.backbone, run.config.steps
    student = backbone.drawing(run.roles.student, backbone.scheduler(steps), weights)
    with student as pipe:
        told = backbone.student_told(run.config.student_guidance()) | backbone.told_size(run.config.sizes()[0])
        return sample_grid(pipe, prompts, steps=steps, call=told)


def teacher_grids(run: Run, prompts: list[str], best: str) -> dict[str, Any]:
    """Grids of the teacher by column title: at its many steps and, with the named solver, at the student's; of a teacher that is itself
    a student of K steps, at those alone, without guidance. Of a column that cannot be drawn this warns: the student's is what counts.
    """
    from fewstep import models
    from fewstep.evaluate.drawing import NO_ONE_STEP, TEACHER_STEPS, draws_in, solver

    backbone, steps = run.backbone, run.config.steps
    call = backbone.teacher_call(run.config.shown_guidance(), run.config.shown_negative_prompt()) | backbone.told_size(
        run.config.sizes()[0]
    )
    own = backbone.pipe.scheduler
    made_for = models.steps_in(own.config)
    if made_for is not None:
        call = backbone.student_call | backbone.told_size(run.config.sizes()[0])
        columns = {f"teacher, {made_for} steps": (made_for, own)}
    else:
        columns = {f"teacher, {TEACHER_STEPS} steps": (TEACHER_STEPS, own)}
        if draws_in(own.config, steps):
            columns[f"teacher, {steps} steps ({best})"] = (steps, own if backbone.flow else solver(best, own.config))
        else:
            print(f"samples.png shows no teacher at {steps} step: {NO_ONE_STEP}")
    grids = {}
    for title, (n, scheduler) in columns.items():
        with backbone.drawing(run.roles.teacher, scheduler) as pipe:
            try:
                grids[title] = sample_grid(pipe, prompts, steps=n, call=call)
            except NumericalError as error:
                warnings.warn(f"samples.png lacks the column {title!r}: {error}", stacklevel=2)
    return grids


def draw_progress(run: Run, output: Path, prompts: list[str], curves: Curves) -> None:
    """A grid of the averaged student with fixed prompts and seeds, and the run's curves; no random number of the training is drawn.

    A disk that takes no picture is warned of and ends no training: on Windows a viewer that holds the last one refuses the next. So is a
    device whose memory is too small to draw beside the training.
    """
    import torch

    from fewstep.report import grid

    trainer, steps = run.trainer, run.config.steps
    title = f"student, {steps} steps, update {trainer.update}"
    try:
        try:
            images = student_grid(run, prompts, trainer.averaged())
        except torch.OutOfMemoryError as error:
            why = lacking_memory(error)
            warnings.warn(f"update {trainer.update}: no samples are shown, {why}; --sample-every 0 tries none", stacklevel=2)
        else:
            grid.save({title: images}, prompts, output / "samples" / f"update-{trainer.update:08d}.png")
        curves.save(output / "curves.png")
    except OSError as error:
        warnings.warn(f"update {trainer.update}: a picture of the run could not be written ({error})", stacklevel=2)


def lacking_memory(error: BaseException) -> str:
    return f"since memory is too small to draw them beside the training ({first_words(error)})"


def remove_results(output: Path) -> None:
    """Deletes what tells of an earlier student, also what makes its folder one and its LoRA, for the new one's files take its place one by
    one; but no picture that Windows keeps for the viewer which holds it: it is drawn anew anyway."""
    for name in ("model_index.json", "pytorch_lora_weights.safetensors", "evaluation.json", "README.md"):
        (output / name).unlink(missing_ok=True)
    for name in ("samples.png", "curves.png"):
        with suppress(PermissionError):
            (output / name).unlink(missing_ok=True)


def finish(run: Run, output: Path, source: str, prompts: list[str]) -> None:
    """Export the averaged student, measure it, write its card, draw its run's curves and it beside its teacher.

    Of a device whose memory is too small to draw beside what the training holds this warns: the student is there."""
    import torch

    from fewstep import export
    from fewstep.evaluate import tables
    from fewstep.report import curves, grid

    remove_results(output)
    config, backbone, trainer = run.config, run.backbone, run.trainer
    weights = trainer.averaged()
    pipe = backbone.student_pipeline(run.roles, weights, config.steps)
    student = export.Averaged(config, backbone, pipe, weights, trainer.update, trainer.weights.now())
    export.write_diffusers(student, output)
    best = "its own solver" if backbone.flow else "DPM-Solver++"
    results = None
    if config.evaluate and config.teacher == "world":
        report = measure_student(
            output, source, config.sizes()[0], scale=config.student_guidance(), output=output / "evaluation.json", steps=config.steps,
            guidance=config.shown_guidance(), negative_prompt=config.shown_negative_prompt(), device=config.device,
        )  # fmt: skip
        assert report is not None
        results, best = tables.as_markdown(report), next(r["solver"] for r in report["rows"] if r["name"] == report["best_solver"])
    elif config.evaluate:
        print(f"not measured: fewstep evaluate {as_word(output)} --prompts FILE, with --extractor.NAME and --judge.NAME")
    card = export.model_card(student, "diffusers", output, results=results)
    export.save_card(card, output)  # before the pictures: should they fail, the student has its card
    shown, look = grid_prompts(config, prompts), f"look at {output / 'samples.png'}"
    try:
        columns = teacher_grids(run, shown, best) | {f"student, {config.steps} steps": student_grid(run, shown, weights)}
    except torch.OutOfMemoryError as error:
        warnings.warn(f"there is no samples.png, {lacking_memory(error)}", stacklevel=2)
        look = f"for pictures: fewstep sample {as_word(output)} --prompt TEXT"
    else:
        grid.save(columns, shown, output / "samples.png")
    curves.Curves(output / "metrics.jsonl").save(output / "curves.png")
    export.save_card(export.with_pictures(card, output), output)
    print(f"student in {output}; {look}")
