"""A config refuses every value that would ruin its run."""

import dataclasses
import math

import pytest
from test_trainer import EVERYTHING, run_of

from fewstep.config import FREE_ON_RESUME, MOVABLE, OF_A_CALL, RESERVED, Config, WeightsConfig
from fewstep.errors import UserError
from fewstep.flags import field_names, parse_config

BAD = {"-1": -1, "0": 0, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# which of them a field takes; of weights.warmup the adaptive weight alone makes use
TAKEN = {
    "lora_rank": "0", "seed": "0", "sample_every": "0",
    "student.decay": "0", "student.weight_decay": "0", "student.ema": "0", "student.max_norm": "inf",
    "fake.decay": "0", "fake.updates": "0", "fake.max_norm": "inf",
    "matching.gamma": "0",
    "weights.warmup": "-1 0", "weights.lag_limit": "0 inf", "weights.clip": "inf", "weights.max_masked": "0",
    "reuse.rho_max": "inf", "reuse.min_ess": "0", "memory.micro_groups": "0", "reward": "0",
}  # fmt: skip
OR_A_RANGE = float | tuple[float, float]
KINDS = {name: float if kind == OR_A_RANGE else kind for name, kind in field_names(Config).items()}
NUMBERS = {name: kind for name, kind in KINDS.items() if kind in (int, float)}


def config_with(name, value, base=None):
    """The default config, but for the dotted field."""
    base = Config() if base is None else base
    first, _, rest = name.partition(".")
    return dataclasses.replace(base, **{first: config_with(rest, value, getattr(base, first)) if rest else value})


def test_the_defaults_are_fine():
    assert Config().problems() == [] and len(NUMBERS) > 35 and TAKEN.keys() - {"reward"} <= NUMBERS.keys()


def test_what_a_checkpoint_keeps_of_a_config_is_all_that_may_not_change():
    config = Config(reward={"clip": 0.5}, scorer={"clip": "here"}, judge={"clip": None}, teacher="here", prompts="here", output="here")
    kept = config.lasting()
    assert kept["reward"] == {"clip": 0.5} and kept["student.betas"] == list(config.student.betas) and "here" not in kept.values()
    groups = {name.partition(".")[0] for name in field_names(Config) if "." in name}
    assert field_names(Config).keys() - kept.keys() - groups == {*FREE_ON_RESUME, *OF_A_CALL, *MOVABLE} - {"remote"} | {"remote.timeout"}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_refuses_what_ruins_a_run(name):
    values = {text: value for text, value in BAD.items() if NUMBERS[name] is float or isinstance(value, int)}
    told = {text: config_with(name, value).problems() for text, value in values.items()}
    taken = TAKEN.get(name, "").split()
    assert [text for text, problems in told.items() if not problems] == taken
    for text, problems in told.items():  # by name, with the value, and once
        mine = [line for line in problems if line.startswith(f"{name}: ")]
        assert text in taken or (len(mine) == 1 and text in mine[0]), problems


@pytest.mark.parametrize("pair", [(-1, 0.9), (0.9, 1.5), (2, 2), (0.9, 1), (math.nan, 0.9), (0.9, math.inf)])
@pytest.mark.parametrize("who", ["student", "fake"])
def test_betas_lie_below_one(who, pair):
    (line,) = config_with(f"{who}.betas", pair).problems()
    assert line.startswith(f"{who}.betas: must ") and str(pair) in line
    assert not config_with(f"{who}.betas", (0.0, 0.0)).problems()


@pytest.mark.parametrize(
    "pair", [(-1, 0.9), (0, 0.9), (0.9, 0.1), (0.5, 0.5), (0.1, 1.5), (math.nan, 0.9), (0.1, math.nan), (0.1, math.inf)]
)
def test_noise_levels_lie_in_order(pair):
    (line,) = config_with("matching.t_range", pair).problems()
    assert line.startswith("matching.t_range: must ")


@pytest.mark.parametrize("pair", [(-1.0, 2.0), (0.0, 1.5), (2.0, 2.0), (8.0, 1.5), (math.nan, 2.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_range_of_guidance_lies_in_order(pair):
    (line,) = config_with("matching.guidance", pair).problems()
    assert line.startswith("matching.guidance: ") and str(pair) in line
    assert not config_with("matching.guidance", (1.0, 1.5)).problems()


@pytest.mark.parametrize("name", ["teacher_guidance", "matching.guidance"])
def test_no_guidance_is_one(name):
    """Of zero, which stock pipelines take for none too, the unconditional teacher would be made."""
    for scale in (0.0, 0.5):
        assert config_with(name, scale).problems() == [f"{name}: must be 1, which is no guidance, or more, got {scale}"]
    assert not config_with(name, 1.0).problems()


def test_a_negative_prompt_goes_with_guidance():
    led = config_with("matching.negative_prompt", "blurry")
    assert led.problems() == config_with("matching.guidance", (1.0, 8.0), led).problems() == []
    (line,) = config_with("matching.guidance", 1.0, led).problems()
    assert line.startswith("matching.negative_prompt: nothing is guided")
    assert led.shown_negative_prompt() == "blurry" and Config().shown_negative_prompt() == ""
    assert dataclasses.replace(led, teacher_guidance=1.0).shown_negative_prompt() == ""  # the teacher is shown without guidance


def test_a_student_with_a_range_is_shown_beside_its_teacher_at_one_scale_inside_it():
    fixed = Config(teacher_guidance=3.0)
    assert (fixed.shown_guidance(), fixed.student_guidance(), fixed.matching.guidance_range) == (3.0, None, None)
    for within, scale in (((1.5, 8.0), 3.0), ((4.0, 8.0), 4.0), ((1.0, 2.0), 2.0)):
        ranged = config_with("matching.guidance", within, fixed)
        assert ranged.shown_guidance() == ranged.student_guidance() == scale and ranged.matching.guidance_range == within


@pytest.mark.parametrize("text", BAD)
def test_weights_of_rewards_are_finite_and_not_negative(text):
    problems = dataclasses.replace(Config(), reward={"clip": BAD[text]}).problems()
    assert (not problems) == (text in TAKEN["reward"]), problems
    assert all(line.startswith("reward") for line in problems)


def test_a_seed_is_what_torch_takes():
    assert config_with("seed", 2**32).problems() == [f"seed: must be from 0 to 2^32 - 1, got {2**32}"]
    assert not config_with("seed", 2**32 - 1).problems()


@pytest.mark.parametrize("told", [{"via": {"mine": "policy"}}, {"weights": WeightsConfig(mode="advantage")}], ids=["policy", "advantage"])
def test_a_score_alone_needs_others_in_its_group(told):
    """The advantage of a group of one is exactly 0: such a reward would do nothing, and nobody would see it."""
    alone = Config(group_size=1, reward={"mine": 1.0}, **told)
    (line,) = alone.problems()
    assert line.startswith("group_size: ") and "needs 2 or more" in line
    assert not dataclasses.replace(alone, group_size=2).problems()
    assert not dataclasses.replace(alone, reward={}, via={}).problems()  # matching alone ranks nothing
    server = ["--reward.mine", "http://127.0.0.1:9", "--group-size", "1"]  # by policy, though nobody has said so
    with pytest.raises(UserError, match=r"group_size: policy \(mine\) ranks"):
        parse_config(server)


@pytest.mark.parametrize("name", ["dm", "student", "decoder", "weights", "policy"])
def test_a_reward_takes_no_name_of_the_runs_own(name):
    (line,) = dataclasses.replace(Config(), reward={name: 1.0}).problems()
    assert line.startswith(f"reward.{name}: metrics.jsonl has ") and "give the reward another" in line


def test_every_name_that_a_run_logs_under_is_taken(teacher_folder, prompt_file):
    """But for those of rewards: a reward of such a name would be counted, or logged, as another thing, or replace it."""
    trainer = run_of(teacher_folder, prompt_file, *EVERYTHING).trainer
    logs = {key for _ in range(4) for key in trainer.step()}
    assert {key.partition("/")[0] for key in logs if "/" in key} | trainer.counted.keys() == RESERVED.keys() | trainer.config.reward.keys()
