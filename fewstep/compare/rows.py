"""What the table has: its columns, its rows, and the rewards that rows weigh beside the world's scorers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fewstep import world
from fewstep.evaluate import drawing

MAIN_SEEDS, OTHER_SEEDS = 5, 3
METRICS = ("fd_clip_data", "fd_clip_teacher", "clip", "clip-heldout", "preference", "utility", "precision", "recall", "diversity")
DISTANCES = ("fd_clip_data", "fd_clip_teacher")
COSTS = ("network_evaluations", "seconds_per_image")  # of drawing a picture
UNGUIDED = 1.0  # the scale of guidance that is none


class Row(NamedTuple):
    """One line of the table."""

    name: str
    flags: tuple[str, ...]  # as `fewstep distill` takes them
    baseline: str | None = None  # the row it is paired with over seeds
    seeds: int = OTHER_SEEDS
    cost: float = 1.0  # multiple of the plan's network evaluations
    marks: int = 0  # measurements along the training, evenly spread over its cost
    price: float = 0.0  # of a reward's pass, in network evaluations: what a reward far larger than the world's would cost
    begins: str | None = None  # the row whose finished student, of the same seed, this one begins from


REWARDS = ("--reward.clip", "0.1", "--reward.preference", "0.1")
CONSTANT = ("--student.decay", "0", "--fake.decay", "0")
HALVED = ("--student.lr=1e-4", "--fake.lr=1.5e-4")  # the defaults' means over a run, in which they fall to zero
EXPENSIVE = ("gndm", "--reward.preference", "0.1")
ADAPTIVE = ("--weights.mode", "adaptive", "--weights.budget", "1.3", "--weights.eta", "0.2")
WIDER = ("--weights.budget", "1.5")
PRICE = 32.0  # one update of these: 1536 network evaluations, and 6144 for the reward's forward and backward on 64 pictures
TWO_UPDATES = ("--fake.updates=2", "--fake.lr=4e-4")
HALF_BATCH = ("--groups=16", "--student.lr=1.4e-4")
BACKWARD_HALF = ("gndm", "--reuse.backward-simulation", *HALF_BATCH)
THRICE = 7.8  # three times the default run's 305 updates of 1536 network evaluations, in cells of 180 thousand

ROWS = (
    Row("DMD", ("dmd",), None, MAIN_SEEDS),
    Row("GNDM", ("gndm",), "DMD", MAIN_SEEDS),
    Row("DMDR (sum)", ("dmdr",), "DMD", MAIN_SEEDS),
    Row("GNDMR adaptive", ("gndmr",), "GNDM", MAIN_SEEDS),
    Row("GNDMR adaptive, budget 1.5", ("gndmr", *WIDER), "GNDM", MAIN_SEEDS),
    Row("GNDMR-1", ("gndmr-1",), "DMDR (sum)"),  # both have the preference alone
    Row("GNDMR-1, budget 1.5", ("gndmr-1", *WIDER), "DMDR (sum)"),
    Row("GNDMR fixed", ("gndm", *REWARDS), "GNDM"),
    Row("DMD2", ("dmd2",), "DMD"),
    Row("GNDM, batch scale", ("gndm", "--matching.normalize", "batch"), "GNDM"),
    Row("GNDM, channel scale", ("gndm", "--matching.normalize", "channel"), "GNDM"),
    Row("GNDM, no scale", ("gndm", "--matching.normalize", "none"), "GNDM"),
    Row("GNDM, leave one out", ("gndm", "--matching.leave-one-out"), "GNDM"),
    Row("GNDM, gamma 0.5", ("gndm", "--matching.gamma", "0.5"), "GNDM"),
    Row("GNDM, gamma 1", ("gndm", "--matching.gamma", "1"), "GNDM"),
    Row("DMD, gamma 1", ("dmd", "--matching.gamma", "1"), "DMD"),
    Row("GNDM, unconditioned fake", ("gndm", "--fake.condition", "none"), "GNDM"),
    *(Row(f"GNDM, {steps} step{'s' * (steps > 1)}", ("gndm", f"--steps={steps}"), "GNDM") for steps in (1, 2, 8)),
    Row("GNDM, backward simulation", ("gndm", "--reuse.backward-simulation"), "GNDM"),
    Row("GNDM, rollout reuse 4", ("gndm", "--reuse.rollout", "4"), "GNDM"),
    Row("GNDM, rollout reuse 8", ("gndm", "--reuse.rollout", "8"), "GNDM"),
    Row("GNDM, evaluation reuse 2", ("gndm", "--reuse.evaluation", "2"), "GNDM"),
    Row("GNDM, evaluation reuse 4", ("gndm", "--reuse.evaluation", "4"), "GNDM"),
    Row("GNDM, evaluation reuse 4, unweighted", ("gndm", "--reuse.evaluation", "4", "--reuse.weighted", "false"), "GNDM"),
    Row("GNDM-IS", ("gndm-is",), "GNDM"),
    Row("GNDMR-IS", ("gndmr-is",), "GNDMR adaptive"),
    Row("GNDMR-IS, budget 1.5", ("gndmr-is", *WIDER), "GNDMR adaptive, budget 1.5"),
    Row("GNDMR fixed, evaluation reuse 4", ("gndm", *REWARDS, "--reuse.evaluation", "4"), "GNDMR fixed"),
    Row("GNDMR, expensive reward", EXPENSIVE, None, cost=2.0, price=PRICE),
    *(
        Row(
            f"GNDMR, expensive reward, evaluation reuse 4{what}",
            (*EXPENSIVE, "--reuse.evaluation", "4", *flags),
            "GNDMR, expensive reward",
            cost=2.0,
            price=PRICE,
        )
        for what, flags in (("", ()), (", unweighted", ("--reuse.weighted", "false")))
    ),
    Row("GNDM, half the cost", ("gndm",), "GNDM, backward simulation", cost=0.5),
    Row("GNDM, half the batch, half the cost", ("gndm", *HALF_BATCH, *TWO_UPDATES), "GNDM, backward simulation", cost=0.5),
    Row("GNDM, backward simulation, half the batch, half the cost", BACKWARD_HALF, "GNDM, backward simulation", cost=0.5),
    Row(
        "GNDM, backward simulation, half the batch, two fake updates, half the cost",
        (*BACKWARD_HALF, *TWO_UPDATES),
        "GNDM, half the batch, half the cost",
        cost=0.5,
    ),
    Row("GNDM, rollout reuse 4, half the cost", ("gndm", "--reuse.rollout", "4"), "GNDM, backward simulation", cost=0.5),
    *(
        Row(f"GNDMR adaptive, {' and '.join(rewards)}", ("gndm", *ADAPTIVE, *(f"--reward.{name}=1" for name in rewards)), None, cost=2.0)
        for rewards in (("clip",), ("preference",), ("clip", "preference"), ("discriminator",), ("colourfulness",))
    ),
    Row("GNDM, constant rates, thrice as long", ("gndm", *CONSTANT), None, 1, cost=THRICE, marks=12),
    Row("DMD, constant rates, thrice as long", ("dmd", *CONSTANT), None, 1, cost=THRICE, marks=12),
    Row("GNDM, constant rates halved, thrice as long", ("gndm", *CONSTANT, *HALVED), None, 1, cost=THRICE, marks=12),
    # rates: each method's best of the grid by FD to data
    Row("DMD, guidance 1", ("dmd", "--matching.guidance", "1", "--student.lr", "2e-4"), None, MAIN_SEEDS),
    Row("GNDM, guidance 1", ("gndm", "--matching.guidance", "1", "--student.lr", "1e-4"), "DMD, guidance 1", MAIN_SEEDS),
)
# the same forces for both: a raw gradient of the preference has an RMS of about 1/60 when a run begins; twice the table's training,
# for at once the table's no student is nearer to the teacher than the best four-step solver, and every hypervolume is 0
FRONTS = (("GNDMR", ("gndm",), (0.02, 0.05, 0.1, 0.2, 0.4)), ("DMDR", ("dmd", "--weights.mode", "sum"), (1.2, 3, 6, 12, 24)))
PARETO = tuple(
    Row(f"{method}, preference {weight:g}", (*flags, f"--reward.preference={weight:g}"), None, 2, cost=2.0)
    for method, flags, weights in FRONTS
    for weight in weights
)
# the same ten forces on one finished student of a seed, since what distillation alone leaves differs between runs by more than a reward
# moves it. That student is DMD's: what a change of method costs, GNDMR pays. Rates are low, for those of a beginning would lose more than
# a reward gains (docs/method.md)
BEGUN = Row("DMD, twice as long", ("dmd",), cost=2.0)
ALIGNING = ("--student.lr=5e-5", "--fake.lr=1.5e-4")
FROM_ONE = tuple(
    Row(
        f"{method} from one student, preference {weight:g}",
        (*flags, *ALIGNING, f"--reward.preference={weight:g}"),
        cost=0.34,
        begins=BEGUN.name,
    )
    for method, flags, weights in FRONTS
    for weight in weights
)
# where the settings of DMD, GNDM, backward simulation and of GNDM at half its cost were chosen: on seeds below 100
GRID = (
    *(
        Row(
            f"{recipe.upper()}, guidance {guidance:g}, rate {rate:g}, gamma {gamma:g}",
            (recipe, f"--matching.guidance={guidance:g}", f"--student.lr={rate:g}", f"--matching.gamma={gamma:g}"),
            None,
            1,
        )
        for guidance in (2.5, 1)
        for rate in (2e-4, 4e-4, 1e-4)
        for gamma in (0, 1)
        for recipe in ("dmd", "gndm")
    ),
    *(
        Row(f"GNDM, backward simulation, {n} fake updates", ("gndm", "--reuse.backward-simulation", f"--fake.updates={n}"), None, 1)
        for n in (1, 2, 4, 8)
    ),
    *(
        Row(f"GNDM, half the cost, {what}", ("gndm", *flags), None, cost=0.5)
        for what, flags in (
            ("four fake updates", ()),
            ("two fake updates", TWO_UPDATES),
            ("two fake updates, rollout reuse 2", (*TWO_UPDATES, "--reuse.rollout=2")),
            ("half the batch", HALF_BATCH),
            ("half the batch, two fake updates", (*HALF_BATCH, *TWO_UPDATES)),
        )
    ),
)
BEGUN_FROM = {row.begins for row in FROM_ONE}  # rows whose students are kept
EVERY_ROW = {row.name: row for row in (*ROWS, *PARETO, BEGUN, *FROM_ONE, *GRID)}


class TeacherRow(NamedTuple):
    steps: int
    guidance: float
    solver: str | None = None  # its own when None


MANY_STEPS_ROW = f"teacher, {drawing.TEACHER_STEPS} steps"
TEACHER_ROWS = {
    MANY_STEPS_ROW: TeacherRow(drawing.TEACHER_STEPS, world.TEACHER_GUIDANCE),
    **{f"teacher, 4 steps, {name}": TeacherRow(4, world.TEACHER_GUIDANCE, name) for name in drawing.SOLVERS},
    f"{MANY_STEPS_ROW}, guidance 1": TeacherRow(drawing.TEACHER_STEPS, UNGUIDED),
}
BY_NAME: dict[str, TeacherRow | Row] = {**TEACHER_ROWS, **EVERY_ROW}  # in the table's order


def colourfulness(images: Any, prompts: list[str]) -> Any:
    """A reward as users write their own: Hasler and Suesstrunk's measure, which needs no model and no prompt. (B, 3, H, W) -> (B,)."""
    from fewstep.world import utility

    return utility.colourfulness(images)


FUNCTIONS = {"colourfulness": colourfulness}  # rewards that are no scorer of the world, by the name that rows weigh them under


def functions_of(config: Any) -> dict[str, Callable[..., Any]]:
    """Those of FUNCTIONS that a row's config weighs."""
    return {name: function for name, function in FUNCTIONS.items() if name in config.reward}
