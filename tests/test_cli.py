"""The command line: what a person gets for good and for bad input."""

import dataclasses
import errno
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fresh
import numpy as np
import pytest
import torch
import yaml
from forked import command, forked
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

import fewstep
from fewstep import checkpoint, cli, composition, disk, export, flags, models, needs
from fewstep.config import Config
from fewstep.errors import NumericalError, UserError, as_word
from fewstep.evaluate import drawing
from fewstep.folder import TEACHER_FILES, check_init, check_output, check_same_teacher, remove_run, run_of
from fewstep.launch import torchrun_limit
from fewstep.ranks import Ranks
from fewstep.rewards.base import PixelReward, RewardError, asked
from fewstep.run import check_own, distill, heard, noting_what_is_kept, train
from fewstep.trainer import Trainer
from fewstep.types import Sample

pytestmark = pytest.mark.usefixtures("small_grid")
ROOT = Path(fewstep.__file__).parents[1]
# full weights in one part, not as the recipe of the tiny teacher's family has it
SMALL = ["--groups", "2", "--group-size", "2", "--save-every", "2", "--sample-every", "0", "--lora-rank", "0",
         "--memory.micro-groups", "0", "--memory.checkpointing", "false"]  # fmt: skip


def refused(capsys, *arguments):
    """Exit code 2 and one line that begins with `fewstep: error:`."""
    assert cli.main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fewstep: error: "), captured.err
    return lines[0]


def test_help_is_quick_and_imports_neither_torch_nor_diffusers():
    look = "print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    script = f"import sys; from fewstep.cli import main; main(['--help']); import fewstep; {look}"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    assert done.stdout.strip().endswith("[]") and "distill" in done.stdout
    empty = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert seconds - (time.perf_counter() - empty) < 0.5


def test_of_a_flag_in_both_its_forms_the_last_one_counts():
    """Of code too, which only the user's own flag may name."""
    one, other = ["--scorer.x=one.py:f"], ["--scorer.x", "other.py:f"]
    assert flags.parse_config(["--reward.x=1", *one, *other]).scorer == {"x": "other.py:f"}
    assert flags.parse_config(["--reward.x=1", *other, *one]).scorer == {"x": "one.py:f"}


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_every_config_field_is_documented_in_the_help(capsys, asked):
    with pytest.raises(SystemExit):
        cli.main(["distill", asked])
    text = capsys.readouterr().out
    assert "<factory>" not in text  # of Python's own signature of a class without a docstring
    for name in flags.field_names(Config):
        assert f"--{name}" in text
    assert "Samples per prompt (G)" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["distil"], "did you mean 'distill'"),
        (["distill", "--update", "3"], "did you mean 'updates'"),
        (["distill", "--student.lrr", "3"], "did you mean 'student.lr'"),
        (["distill", "--steps", "0"], "steps: must be at least 1"),
        (["distill", "--steps", "x"], "steps: must be a whole number; got x"),
        (["distill", "--student.lr", "fast"], "student.lr: must be a number; got fast"),
        (["distill", "--evaluate=maybe"], "evaluate: must be true or false; got maybe"),
        (["distill", "--matching.t_range", "[0.1]"], "matching.t_range: must be two numbers in brackets, as [0.9, 0.99]; got [0.1]"),
        (["distill", "--matching.guidance", "1,8"], "guidance: must be a number, or two in brackets, as [1.5, 8]; got 1,8"),
        (["distill", "--matching.guidance", "[8,1]"], "guidance: a range runs from a lower scale to a higher one"),
        (["distill", "--fake.betas", "1"], "fake.betas: must be two numbers in brackets, as [0.9, 0.99]; got 1"),
        (["distill", "--device", "gpu"], "device: must be cpu, cuda, cuda:N or auto, got 'gpu'"),
        (["distill", "--device", "cuda:9"], "device: there is no cuda:9 here, torch finds "),
        (["distill", "--steps", "7"], "steps"),
        (["distill", "--matching.normalize", "grp"], "matching.normalize: must be one of group, sample, batch, channel, none; got grp"),
        (["distill", "--matching.t_range", "[0.9,0.1]"], "matching.t_range"),
        (["distill", "--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["distill", "--teacher", "./nowhere", "--prompts", "PROMPTS"], "./nowhere: no such folder"),
        (["distill", "--teacher", "EMPTY", "--prompts", "PROMPTS"], "no model_index.json"),
        (["distill", "--teacher", "EMPTY"], "prompts: missing"),
        (["distill", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["distill", "gndn"], "gndn: no such file or recipe; did you mean 'gndm'"),
        (["distill", "--reward.clpi", "1"], "unknown reward; did you mean 'clip'"),
        (["distill", "--reward.clip", "much"], "reward: must be a number; got much"),
        (["distill", "--reward.clip", "-1"], "must not be negative"),
        (["distill", "--reward.clip", "1", "--via.clip", "magic"], "via: must be one of pathwise, policy; got magic"),
        (["distill", "--reward.clip", "1", "--via.preference", "policy"], "names ['preference'], not in reward"),
        (["distill", "--reward.clip", "1", "--via.clip", "policy", "--steps", "1"], "for one without under weights.mode advantage"),
        (["distill", "--reward.discriminator", "1", "--via.discriminator", "policy"], "via.discriminator: its gradient is what it gives"),
        (["distill", "--matching.leave-one-out", "--matching.normalize", "sample"], "matching.leave_one_out: needs a scale that several"),
        (["distill", "--weights.mode", "adaptive"], "add --reward.NAME SHARE"),
        (["distill", "--weights.budget", "0.5"], "weights.budget: below 1"),
        (["distill", "--reuse.rollout", "2", "--reuse.backward-simulation"], "cannot reuse one"),
        (["distill", "--teacher", "EMPTY", "--prompts", "PROMPTS", "--reward.clip", "1"], "--scorer.clip FOLDER"),
        (["distill", "--teacher", "EMPTY", "--prompts", "PROMPTS", "--reward.discriminator", "1"], "discriminator.latents"),
        (["distill", "--judge.clip", "held-out"], "judge: nothing to judge"),
        (["distill", "--reward.clip", "1", "--judge.clip"], "is what the student is trained on, as the reward 'clip'; a judge"),
        (["distill", "--reward.clip", "1", "--judge.clpi"], "judge.clpi: unknown reward; did you mean 'clip'? A folder"),
        (
            ["distill", "--reward.clip", "1", "--judge.siglip", "EMPTY"],
            "reads as (clip, pickscore, hps, aesthetic, preference; any CLIP or SigLIP as clip). One of your own: --judge.siglip path/to/",
        ),
        (["distill", "--reward.clip", "1", "--judge.clpi", "held-out"], "held-out twins of clip and preference, not of 'clpi'"),
        (["distill", "--reward.clip", "1", "--judge.hps"], "--judge.hps FOLDER"),
        (["distill", "--reward.clip", "1", "--judge.mine", "nowhere.py:f"], "judge.mine: nowhere.py: no such file"),
        (["compare", "--rows", "GNDN"], "unknown row 'GNDN'; did you mean 'GNDM'"),
        (["compare", "--jobs", "0"], "--jobs"),
        (["compare", "--quick", "--rows", "GNDMR-1"], "--rows: cannot be combined with --quick"),
        (["distill", "--resume", "--output", "EMPTY"], "holds no run"),
        (["distill", "--resume", "--overwrite"], "cannot be combined"),
        (["sample", "EMPTY", "--prompt", "a cat"], "no finished student"),
        (["sample", "EMPTY"], "--prompt"),
        (["sample", "EMPTY", "--prompt", "x", "-n", "0"], "-n"),
        (["evaluate", "EMPTY"], "no finished student"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, tmp_path, prompt_file, arguments, words):
    named = {"EMPTY": str(tmp_path / "empty"), "PROMPTS": str(prompt_file)}
    (tmp_path / "empty").mkdir()
    arguments = [named.get(argument, argument) for argument in arguments]
    if arguments[0] == "distill" and "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "text, words",
    [
        ("student: {lrr: 3}", "unknown key 'student.lrr'; did you mean 'student.lr'"),
        ("stepz: 3", "did you mean 'steps'"),
        ("steps: many", "recipe.yaml: steps: must be a whole number; got many"),
        ("steps: [3", "not valid YAML"),
        ("- steps", "this holds a list"),
        ("steps", "this holds only 'steps'"),
        ("", "this holds nothing"),
        ("student: 3", "student is a group of keys, as student.lr; got 3"),
        ("fake: null", "fake is a group of keys, as fake.lr; got None"),
        ("reward: 3", "reward: must be a table of NAME: value; got 3"),
        ("steps:", "steps has no value; give it one, or leave the key out"),
        ("student: {lr: }", "student.lr has no value"),
        ("matching: {t_range: null}", "matching.t_range has no value"),
        ("evaluate:\noutput: ~", "evaluate has no value"),
        ("output: ~", "output has no value"),
        ("judge:", "judge has no value"),
        ("reward: {clip: }", "reward.clip has no value"),
        ("output: 1e-5", "output: must be a text, which needs quotes in a file where YAML reads something else; got 1e-05"),
        ("prompts: 1e3", "needs quotes in a file where YAML reads something else, or null for none; got 1000"),
        ("student: {lr: 1e-5}\nsteps: 2\nstudent: {ema: 0.9}", "student comes twice, in line 1 and in line 3, of which one would be lost"),
        ("reward:\n  clip: 1\n  clip: 2", "reward.clip comes twice, in line 2 and in line 3"),
    ],
)
def test_bad_recipes_name_the_file(capsys, tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    line = refused(capsys, "distill", str(path), "--output", str(tmp_path / "out"))
    assert words in line and "recipe.yaml" in line


def test_a_recipe_may_say_that_there_is_none(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("prompts:\ninit: null\ndiscriminator: {latents: ~}\nreward: {clip: 1}\njudge: {preference: }\n")
    config = flags.parse_config([str(path)])
    assert (config.prompts, config.init, config.discriminator.latents, config.judge) == (None, None, None, {"preference": None})


@pytest.mark.parametrize("text", ["1e-5", "1.e4", "+1E5", "007", "no", "#1.txt", "&", "---", "a: b", "'q'", "a\nb "])
def test_a_text_is_what_was_written_whatever_yaml_reads_in_it(tmp_path, text):
    """By a flag, and again from the run's own file: a run in a folder named by its learning rate went on no more."""
    told = [f"--{name}={text}" for name in ("output", "prompts", "init", "matching.negative-prompt", "discriminator.latents")]
    told += [f"--{table}.a={text}" for table in ("scorer", "judge") if text not in ("#1.txt", "&", "---", "a: b")]
    (tmp_path / "config.yaml").write_text(flags.as_yaml(flags.as_plain(flags.without_code(told))))
    for config in (flags.without_code(told), flags.saved_config(tmp_path)):
        texts = [config.output, config.prompts, config.init, config.matching.negative_prompt, config.discriminator.latents]
        assert {*texts, *config.scorer.values(), *config.judge.values()} == {text}
    assert flags.without_code([str(tmp_path / "config.yaml"), "--prompts", "null", "--init=null"]).prompts is None


@pytest.mark.parametrize("name", ["init", "prompts", "discriminator.latents", "judge.clip"])
def test_a_value_that_is_called_as_a_flag_is_a_value(name):
    told = ["--judge.clip"] if name == "judge.clip" else []
    config = flags.without_code([*told, "--output", name, "--steps", "2"])
    assert (config.output, config.steps, config.prompts, config.init, config.discriminator.latents) == (name, 2, None, None, None)
    assert config.judge == dict.fromkeys(["clip"] if told else [])


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    """No shell expands it after an equals sign, in a recipe or in Python."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: ~/teacher\nprompts: ~/p.txt\ndiscriminator: {latents: ~/pictures}\n")
    config = flags.parse_config([str(path), "--output=~/x", "--init=~/y", "--reward.mine=~/mine.py:f"])
    named = (config.teacher, config.prompts, config.discriminator.latents, config.output, config.init, config.scorer["mine"])
    assert named == tuple(str(tmp_path / name) for name in ("teacher", "p.txt", "pictures", "x", "y", "mine.py:f"))


def test_every_recipe_is_read_and_is_what_its_name_says(tmp_path):
    configs = {name: flags.parse_config([name, "--output", str(tmp_path)]) for name in flags.recipe_names()}
    families = {module.rpartition(".")[2] for module, _ in models.FAMILIES.values()}
    assert set(configs) == {"dmd", "dmd2", "gndm", "dmdr", "gndmr", "gndmr-1", "gndmr-4", "gndm-is", "gndmr-is"} | families
    assert all(name in cli.HELP for name in configs)
    for family in families:
        config, text = configs.pop(family), Path(flags.recipe_path(family)).read_text()
        assert config.teacher.count("/") == 1 and config.lora_rank and not config.size
        assert "NOT MEASURED" in text and "hours of one H100" in text
    four = configs.pop("gndmr-4")  # of real teachers: two of its rewards are converted first
    with pytest.raises(UserError, match="fewstep convert-reward hps"):
        composition.resolve_rewards(four, {})
    for config in configs.values():
        composition.resolve_rewards(config, {})
    assert [len(c.reward) for c in (configs["gndmr-1"], configs["gndmr"], four)] == [1, 2, 4]
    assert four.weights == configs["gndmr"].weights == configs["gndmr-1"].weights and set(four.reward.values()) == {1.0}
    assert configs["gndmr"].weights.mode == "adaptive"
    both = flags.parse_config(["sdxl", "gndmr-4", "--scorer.hps", "./hps"])  # a family's teacher and a method
    assert both.teacher == flags.parse_config(["sdxl"]).teacher and both.weights == four.weights and both.reward == four.reward
    assert both.scorer == four.scorer | {"hps": "./hps"}
    assert configs["gndm"] == flags.parse_config(["--output", str(tmp_path)])  # the defaults
    assert configs["dmd"].matching.normalize == configs["dmdr"].matching.normalize == "sample"
    assert configs["dmd2"].reuse.backward_simulation and "discriminator" in configs["dmd2"].reward
    assert configs["dmdr"].weights.mode == "sum" and configs["gndmr"].weights.mode == "adaptive"
    assert configs["gndmr-is"].reuse.evaluation == configs["gndm-is"].reuse.evaluation == 2


def test_a_folder_of_a_recipes_name_hides_no_recipe(tmp_path, monkeypatch, teacher_folder, capsys):
    """As that of its run, or a teacher's; and a family that has none yet is told of."""
    monkeypatch.chdir(tmp_path)
    for name in ("dmd", "mine"):
        (tmp_path / name).mkdir()
    assert flags.parse_config(["dmd"]).matching.normalize == "sample"
    assert "mine: a folder, and no recipe" in refused(capsys, "distill", "mine")
    monkeypatch.setattr(flags, "recipe_names", lambda: ["gndm"])
    told = ["--teacher", str(teacher_folder)]
    assert flags.on_family_recipe(told) == told and "there is no recipe sd yet" in capsys.readouterr().out


def test_what_a_run_is_not_told_it_takes_from_its_teachers_family(teacher_folder, tmp_path, capsys):
    own, told = tmp_path / "own.yaml", ["--teacher", str(teacher_folder)]
    own.write_text("student:\n  lr: 3e-3\nupdates: 7\n")

    def read(*arguments):
        config = flags.parse_config(flags.on_family_recipe(list(arguments)))
        return config, capsys.readouterr().out

    family = flags.parse_config(["sd"])
    config, said = read(*told)
    assert config == dataclasses.replace(family, teacher=str(teacher_folder))
    assert said.count("\n") == 1 and "recipe sd" in said and "student.lr 0.0001" in said and "matching.guidance 4.5" in said
    # flags above the user's own recipes, wherever they stand, above the family's, above the defaults
    config, said = read("--updates", "9", *told, str(own), "dmd", "--groups=2")
    assert (config.updates, config.groups, config.student.lr, config.student.ema) == (9, 2, 1e-4, 0.99)
    assert config.matching.normalize == "sample" and config.fake.lr == family.fake.lr and "updates" not in said
    assert read(str(own), *told)[0].student.lr == 3e-3
    own.write_text(f"teacher: {teacher_folder}\n")
    assert read(str(own))[0] == dataclasses.replace(family, teacher=str(teacher_folder))
    for whole in ([], ["gndm"], ["sd"], ["--teacher", "./nowhere"]):  # the embedded teacher; all is said; refused later
        config, said = read(*whole)
        assert config == flags.parse_config(whole) and not said


def test_a_run_that_goes_on_takes_nothing_from_a_recipe(teacher_folder, tmp_path, capsys):
    saved = flags.as_plain(flags.parse_config(["--teacher", str(teacher_folder)]))  # made before there was a recipe
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    for told in ([], ["--teacher", str(teacher_folder)]):
        arguments = ["--output", str(tmp_path), "--resume", *told]
        assert flags.on_family_recipe(arguments) == arguments
    again = [str(tmp_path / "config.yaml")]  # a saved config says all
    assert flags.parse_config(flags.on_family_recipe(again)) == flags.parse_config(again) and not capsys.readouterr().out


def test_a_function_becomes_a_reward_and_survives_the_whole_run(teacher_folder, prompt_file, tmp_path):
    seen = []

    def mine(images, prompts):
        seen.append(len(prompts))
        return images.mean((1, 2, 3))

    small = {"groups": 2, "group_size": 2, "updates": 2, "save_every": 1, "sample_every": 0, "lora_rank": 0,
             "memory": {"micro_groups": 0, "checkpointing": False}}  # fmt: skip
    given = ["a cat", "two\nlines", "a cat"]
    out = fewstep.distill(str(teacher_folder), given, rewards={"mine": (mine, 0.5)}, output=str(tmp_path / "out"), **small)
    assert seen == [4, 4] and yaml.safe_load((out / "config.yaml").read_text())["reward"] == {"mine": 0.5}
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(log["mine/weight"] == 0.5 and "mine/cosine" in log for log in logs)
    # the list is kept with the run, which goes on with it and with no other
    assert json.loads((out / "prompts.json").read_text()) == given[:2]
    fewstep.distill(str(teacher_folder), given, rewards={"mine": (mine, 0.5)}, output=str(out), resume=True, **small | {"updates": 3})
    moved = out.rename(tmp_path / "moved")
    for prompts, updates in ((None, 4), (given, 5)):
        small |= {"updates": updates, "output": str(moved), "resume": True}
        fewstep.distill(str(teacher_folder), prompts, rewards={"mine": (mine, 0.5)}, **small)
    small = small | {"updates": 6}
    with pytest.raises(UserError, match=r"prompts: these 1 prompts are not, in this order, those that the run began with; give them back"):
        fewstep.distill(str(teacher_folder), ["a dog"], rewards={"mine": (mine, 0.5)}, **small)
    with pytest.raises(UserError, match="prompts, entry 2: one text is needed under prompt, not int"):
        fewstep.distill(str(teacher_folder), ["a dog", 3], rewards={"mine": (mine, 0.5)}, **small)


def test_python_gives_paths_and_prompts_of_any_kind_also_in_a_thread(teacher_folder, tmp_path, capsys):
    small = {"updates": 1, "groups": 2, "sample_every": 0, "memory": {"micro_groups": 0, "checkpointing": False}}
    done = []
    prompts = (prompt for prompt in ["a cat", "a dog"])
    thread = threading.Thread(target=lambda: done.append(fewstep.distill(teacher_folder, prompts, output=tmp_path / "out", **small)))
    thread.start()
    thread.join()
    assert done == [tmp_path / "out"] and json.loads((tmp_path / "out" / "prompts.json").read_text()) == ["a cat", "a dog"]
    assert "no signal is heard" in capsys.readouterr().out

    unordered = {f"prompt {i}" for i in range(9)}  # of which each process of a run has an order of its own
    with mock.patch("fewstep.run.distill", return_value=0) as run:
        fewstep.distill(teacher_folder, unordered)
    assert run.call_args.args[3] == sorted(unordered)


def test_python_says_what_is_no_teacher_reward_or_judge(teacher_folder):
    with pytest.raises(UserError, match="teacher: is a Linear; save it with save_pretrained"):
        fewstep.distill(torch.nn.Linear(1, 1), ["a cat"])
    for kind in ("rewards", "judges"):
        with pytest.raises(UserError, match=rf"{kind}: 'mine' is a list; give a function of \(images, prompts\)"):
            fewstep.distill(teacher_folder, ["a cat"], **{kind: {"mine": [torch.mean, 0.1]}})


@pytest.mark.parametrize("told, words", [
    ({"rewards": ["clip"]}, "rewards: give a dict, whose keys are names; got a list"),
    ({"reward": 3}, "reward: give a dict"),
    ({"judges": ["clip"]}, "judges: give a dict"),
    ({"rewards": {"mine": (len, None)}}, "rewards: the weight of 'mine' is a NoneType; give a number"),
    ({"rewards": {"mine": (len,)}}, "rewards: 'mine' is a tuple of 1; give a function"),
    ({"rewards": {"mine": len}, "reward": {"mine": 0.1}}, r"reward: 'mine' has a weight here and one in rewards.* \(..., 0.1\)"),
])  # fmt: skip
def test_python_says_which_weight_it_cannot_take(teacher_folder, told, words):
    with pytest.raises(UserError, match=words):
        fewstep.distill(teacher_folder, ["a cat"], **told)


def test_python_takes_rewards_by_both_ways_and_a_function_of_any_name(teacher_folder):
    """What `reward`, `scorer` and `judge` say beside `rewards` and `judges` is added; a function with the name of a scorer that only a
    server has is followed by its gradient."""
    with mock.patch("fewstep.run.distill", return_value=0) as run:
        fewstep.distill(teacher_folder, ["a cat"], rewards={"hps3": len, "clip": np.float32(0.5)}, reward={"b": 0.25},
                        scorer={"b": "./b"}, judge={"pickscore": None}, judges={"hps": "./hps"})  # fmt: skip
        config, functions, *_ = run.call_args.args
        assert config.reward == {"b": 0.25, "hps3": 1.0, "clip": 0.5} and config.scorer == {"b": "./b"} and config.via == {}
        assert functions == {"hps3": len} and config.judge == {"pickscore": None, "hps": "./hps"}
        fewstep.distill(teacher_folder, ["a cat"], rewards={"hps3": (len, 0.1)}, via={"hps3": "pathwise"})
        assert run.call_args.args[0].via == {"hps3": "pathwise"}


def test_a_reward_that_breaks_its_contract_ends_the_run_with_one_line(teacher_folder, prompt_file, tmp_path, capsys):
    config = flags.parse_config(["--teacher", str(teacher_folder), "--prompts", str(prompt_file), "--output", str(tmp_path / "out"), *SMALL,
                               "--updates", "2", "--reward.mine", "1"])  # fmt: skip
    with pytest.raises(ValueError, match="'mine' returned shape"):
        distill(config, {"mine": lambda images, prompts: images})


def test_unsupported_and_damaged_teachers(capsys, tmp_path, teacher_folder, prompt_file):
    import shutil

    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    options = ["--prompts", str(prompt_file), "--output", str(tmp_path / "out")]
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    said = refused(capsys, "distill", "--teacher", str(folder), *options)
    assert f"DiTPipeline; supported: {', '.join(models.FAMILIES)}." in said  # what there is, and how to add another
    assert "one file in fewstep/models and one line in its table: docs/new-family.md" in said
    (folder / "model_index.json").write_text('{"_class_name": ["ours", "OurPipeline"]}')  # with code of its own
    assert "['ours', 'OurPipeline']; supported: StableDiffusionPipeline" in refused(capsys, "distill", "--teacher", str(folder), *options)
    (folder / "model_index.json").write_text("{")
    assert "not a diffusers pipeline index" in refused(capsys, "distill", "--teacher", str(folder), *options)
    shutil.copy(teacher_folder / "model_index.json", folder)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "v1-5.safetensors").write_bytes(b"")
    for loose in (tmp_path / "loose", tmp_path / "loose" / "v1-5.safetensors"):
        assert "from_single_file(FILE).save_pretrained(FOLDER)" in refused(capsys, "distill", "--teacher", str(loose), *options)
    for at, name in enumerate(("unet.down.attn1.to_q.lora_A.weight", "lora_unet_down_attn1_to_q.lora_down.weight")):  # diffusers', kohya's
        (lora := tmp_path / f"lora{at}").mkdir()
        save_file({name: torch.zeros(2, 2)}, lora / "any.safetensors")
        lines = [refused(capsys, "distill", "--teacher", str(lora), *options), refused(capsys, "sample", str(lora), "--prompt", "a cat")]
        assert all("a LoRA is no pipeline" in line and "--to diffusers" in line and "single_file" not in line for line in lines)
    (tmp_path / "tuned" / "transformer").mkdir(parents=True)
    line = refused(capsys, "distill", "--teacher", str(tmp_path / "tuned"), *options)
    assert "no model_index.json there" in line and 'transformer=CLASS.from_pretrained(FOLDER, subfolder="transformer")' in line
    with mock.patch("huggingface_hub.hf_hub_download", side_effect=EntryNotFoundError("404\nClient Error")):
        line = refused(capsys, "distill", "--teacher", "me/checkpoint", *options)
    assert "404 Client Error" in line and "from_single_file" in line and "a LoRA is no pipeline" in line
    with mock.patch("huggingface_hub.hf_hub_download", side_effect=LocalEntryNotFoundError("no such\nfile")):
        line = refused(capsys, "distill", "--teacher", "me/checkpoint", *options)
    assert "no such folder, and the hub could not be reached" in line and "no such file" in line and "from_single_file" not in line
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be read as a StableDiffusionPipeline" in refused(capsys, "distill", "--teacher", str(folder), *options)


def test_recipe_flags_and_keyword_arguments_say_the_same(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 2\nstudent:\n  lr: 0.001\nmatching:\n  normalize: sample\n")
    from_file = flags.parse_config([str(path), "--group-size", "4"])
    from_flags = flags.parse_config(["--steps=2", "--student.lr=1e-3", "--matching.normalize", "sample", "--group_size", "4"])
    keywords = flags.parse_config(
        flags.as_arguments({"steps": 2, "student": {"lr": 1e-3}, "matching": {"normalize": "sample"}, "group_size": 4})
    )
    assert from_file == from_flags == keywords
    assert flags.parse_config([]) == Config()
    assert flags.parse_config(["--overwrite", "--seed", "3"]).overwrite is True


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, prompt_file):
    """A student of the tiny teacher, made by the command itself."""
    output = tmp_path_factory.mktemp("run") / "out"
    arguments = [
        "distill",
        "--teacher",
        str(teacher_folder),
        "--prompts",
        str(prompt_file),
        "--output",
        str(output),
        "--updates",
        "3",
        *SMALL,
    ]
    assert cli.main(arguments) == 0
    return output


def test_what_a_run_leaves_behind(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "model_index.json",
        "unet",
        "vae",
        "scheduler",
        "samples.png",
        "curves.png",
        "metrics.jsonl",
        "README.md",
        "config.yaml",
        "teacher.json",
        "checkpoints",
    } <= names
    card = (finished / "README.md").read_text()
    assert "library_name: diffusers" in card and "[999, 749, 499, 249]" in card
    assert "](samples.png)" in card and "](curves.png)" in card
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["updates"] == 3 and saved["matching"]["normalize"] == "group"
    scheduler = json.loads((finished / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["original_inference_steps"] == 4 and scheduler["rescale_betas_zero_snr"]


def test_a_dry_run_knows_the_disk_that_a_run_takes(finished):
    config = composition.resolve_hardware(flags.saved_config(finished))
    found = needs.measure(config.teacher, config, 5)

    def held(folder):
        return sum(tensor.nbytes for path in folder.rglob("*.safetensors") for tensor in load_file(path).values())

    checkpoints = held(finished / "checkpoints")
    assert found.student_folder == held(finished) - checkpoints
    assert found.checkpoints <= checkpoints < 1.2 * found.checkpoints  # the last rollout is in them too


STOCK = textwrap.dedent("""
    import sys
    sys.modules["fewstep"] = None
    import torch
    from diffusers import DiffusionPipeline
    for folder in sys.argv[1:]:
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        out = pipe(["a cat", "a dog"], num_inference_steps=4, guidance_scale=1, generator=generator, output_type="pt")
        torch.save(out.images, folder + "/images.pt")
""")


def test_the_folder_draws_in_stock_diffusers_what_the_student_draws_in_training(teacher_folder, prompt_file, tmp_path):
    """A fresh process without fewstep, and the training code's own rollout, from the same seed: equal to 1e-5; full weights and LoRA."""
    drawn = {}
    for rank in ("0", "2"):
        config = flags.parse_config(["--teacher", str(teacher_folder), "--student.lr", "1e-2", *SMALL, "--lora-rank", rank])
        run = composition.build(config, ["a cat", "a dog"], str(teacher_folder))
        for _ in range(3):
            run.trainer.step()
        run.trainer.ema.copy_to(list(run.roles.student_parameters.values()))
        pipe = run.backbone.student_pipeline(run.roles, run.trainer.averaged(), 4)
        run.backbone.save(pipe, tmp_path / rank)
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(2, *run.backbone.latent_shape(), generator=generator)
        rollout = run.trainer.student.rollout(noise, run.backbone.encode(["a cat", "a dog"]), generator=generator)
        with torch.no_grad():
            drawn[rank] = run.backbone.decode(rollout.x0[-1])
            teacher = run.backbone.decode(run.roles.teacher(noise, torch.ones(2), run.backbone.encode(["a cat", "a dog"])))
        assert (teacher - drawn[rank]).abs().max() > 1e-3  # the student has moved, so equality says something
    fresh.run(STOCK, *(str(tmp_path / rank) for rank in drawn), printed=tmp_path / "printed")
    for rank, mine in drawn.items():
        stock = torch.load(tmp_path / rank / "images.pt", weights_only=True)
        assert (stock - mine).abs().max() <= 1e-5, rank


def test_lora_file_gives_the_same_student_on_the_teacher(teacher_folder, prompt_file, tmp_path):
    from diffusers import StableDiffusionPipeline

    config = flags.parse_config(["--teacher", str(teacher_folder), "--student.lr", "1e-2", *SMALL, "--lora-rank", "2"])
    run = composition.build(config, ["a cat"], str(teacher_folder))
    for _ in range(3):
        run.trainer.step()
    weights = run.trainer.averaged()
    merged = run.backbone.student_pipeline(run.roles, weights, 4)
    run.backbone.save_lora(weights, tmp_path, rank=2)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(teacher_folder)
    pipe.scheduler = merged.scheduler
    pipe.load_lora_weights(tmp_path)
    images = [
        p("a cat", num_inference_steps=4, guidance_scale=1, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (merged, pipe)
    ]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)


def test_a_run_may_begin_with_another_runs_student(capsys, finished, teacher_folder, prompt_file, tmp_path):
    out, told = tmp_path / "out", ["distill", "--teacher", str(teacher_folder), "--prompts", str(prompt_file), *SMALL]
    first = shutil.copytree(finished, tmp_path / "first")
    for also in ((), ("--dry-run",)):
        assert "holds no checkpoints of a run" in refused(capsys, *told, "--output", str(out), "--init", str(teacher_folder), *also)
    assert "is the output folder itself" in refused(capsys, *told, "--output", str(first), "--init", str(first), "--overwrite")
    assert "another network than this run's" in refused(capsys, *told, "--output", str(out), "--init", str(first), "--lora-rank", "2")
    two_steps = refused(capsys, *told, "--output", str(out), "--init", str(first), "--steps", "2", "--fake.condition", "none")
    assert f"init: the student of {first} has 4 steps, this run 2; set --steps 4" in two_steps
    hashes = (first / TEACHER_FILES).read_text()
    (first / TEACHER_FILES).write_text(hashes.replace("unet/", "unet/other-"))
    another = refused(capsys, *told, "--output", str(out), "--init", str(first))
    assert "is of another teacher" in another and f"delete {first / TEACHER_FILES}" in another
    (first / TEACHER_FILES).write_text(hashes)
    capsys.readouterr()
    assert cli.main([*told, "--output", str(out), "--init", str(first), "--updates", "1", "--student.lr", "1e-9"]) == 0
    said = capsys.readouterr().out
    assert f"starting from the student of {first} at update 3" in said and "init:" not in said
    (_, before), (_, after) = (checkpoint.newest(folder / "checkpoints") for folder in (first, out))
    for averaged, (name, learned) in zip(before["ema"]["shadow_params"], after["student"].items(), strict=True):
        torch.testing.assert_close(learned, averaged, rtol=0, atol=1e-7, msg=name)  # as good as nothing
    earlier = min((first / "checkpoints").iterdir())
    elsewhere = shutil.copytree(earlier, tmp_path / "kept" / "one")
    assert run_of(earlier) == first and run_of(elsewhere) == elsewhere  # what lies beside a copy is not its run
    assert "is the output folder itself" in refused(capsys, *told, "--output", str(first), "--init", str(earlier), "--overwrite")
    assert cli.main([*told, "--output", str(out), "--init", str(earlier), "--updates", "1", "--overwrite"]) == 0
    assert f"starting from the student of {earlier} at update 2" in capsys.readouterr().out
    shutil.rmtree(first)
    assert cli.main(["distill", "--output", str(out), "--resume", "--updates", "2"]) == 0  # the first run is not needed any more
    assert "from the student of an earlier run" in (out / "README.md").read_text()


def test_a_run_begins_with_a_student_of_its_own_teacher_alone(teacher_folder, tmp_path, capsys):
    """Another teacher's has the same shapes. Of the hub's the commit tells; where nothing does, that is said."""
    first, commits = tmp_path / "first", ["a" * 40, "b" * 40]
    (first / "checkpoints").mkdir(parents=True)

    def check(before, now, hashes=None):
        saved = flags.as_plain(Config(teacher=before))
        (first / "config.yaml").write_text(yaml.safe_dump(saved))
        (first / TEACHER_FILES).unlink(missing_ok=True)
        if hashes is not None:
            (first / TEACHER_FILES).write_text(json.dumps(hashes))
        check_init(Config(teacher=now, init=str(first)), now)
        return capsys.readouterr().out

    folder, hub_id = str(teacher_folder), "owner/name@" + commits[0]
    own = models.weights_in(teacher_folder) | models.configurations_in(teacher_folder)
    assert check(folder, folder, own) == check("./elsewhere", folder, own) == check(hub_id, hub_id) == check(folder, folder) == ""
    for before, now, hashes in ((folder, folder, own | {"unet/more.safetensors": "0"}), ("owner/name@" + commits[1], hub_id, None),
                                ("owner/other@" + commits[0], hub_id, None)):  # fmt: skip
        way = f"give --teacher {before}, that commit" if before.startswith("owner/name") else "begin with one of this teacher"
        with pytest.raises(UserError, match=f"init: the student of {first} is of another teacher, {before}: .*; {way}"):
            check(before, now, hashes)
    for before, now, hashes in ((hub_id, folder, None), (folder, hub_id, own), ("owner/name", hub_id, None), ("./elsewhere", folder, None),
                                ("models/moved", hub_id, None)):  # fmt: skip
        assert f"is of the teacher {before}: whether that is {now} is not known" in check(before, now, hashes)
    (first / "config.yaml").unlink()
    check_init(Config(init=str(first)), folder)
    assert "whether its student is of this teacher, in 4 steps, is not known" in capsys.readouterr().out


def test_an_existing_run_is_not_touched_unless_asked(capsys, finished, teacher_folder, prompt_file, tmp_path):
    arguments = ["distill", "--teacher", str(teacher_folder), "--prompts", str(prompt_file), *SMALL]
    assert "already holds a run" in refused(capsys, *arguments, "--output", str(finished))
    assert "group_size is 3" in refused(capsys, "distill", "--output", str(finished), "--resume", "--group-size", "3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("precious")
    for config in (None, "student: Ada", "a: [", b"\xff\xfe"):  # of another program's run
        if config is not None:
            (tmp_path / "mine" / "config.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
        for option in ((), ("--overwrite",)):
            assert "is not empty and holds no run" in refused(capsys, *arguments, "--output", str(tmp_path / "mine"), *option)
    assert (tmp_path / "mine" / "README.md").read_text() == "precious"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("rewards.json", '[{"from', "{}/rewards.json: cut off, or no record of rewards (.*); put it back as it was, or move it away"),
        ("teacher.json", "", "{}/teacher.json: cut off, or no hashes of a teacher's weights (.*); put it back as it was"),
        ("teacher.json", "[]", "{}/teacher.json: cut off, or no hashes of a teacher's weights (.*); put it back as it was"),
        ("rewards.json", '{"a": 1}', "{}/rewards.json: cut off, or no record of rewards (.*); put it back as it was, or move it away"),
        ("rewards.json", '[{"rewarbs": {}}]', "{}/rewards.json: cut off, or no record of rewards .*names no rewards.*; put"),
        ("rewards.json", '[{"rewards": {"clip": null}}]', "{}/rewards.json: cut off, or no record of rewards .*names no rewards.*; put"),
        ("rewards.json", "[null]", "{}/rewards.json: cut off, or no record of rewards .*names no rewards.*; put it back"),
        ("config.yaml", "", "{}/config.yaml: .* this holds nothing; put its config.yaml back as it was, or begin"),
        ("config.yaml", "teacher: world\n", "resume: {} holds no run to go on with: put its config.yaml back as it was, or begin"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(capsys, finished, tmp_path, monkeypatch, name, text, said):
    """Before anything is built."""
    out = shutil.copytree(finished, tmp_path / "out")
    (out / name).write_text(text)
    monkeypatch.setattr("fewstep.run.build", lambda *_, **__: pytest.fail("built"))
    assert re.search(said.format(re.escape(str(out))), refused(capsys, "distill", "--output", str(out), "--resume"))


def test_what_a_link_of_a_run_leads_to_is_not_deleted(capsys, finished, teacher_folder, prompt_file, tmp_path):
    """As where the checkpoints lie on a larger disk; once that is empty, the next run's lie there too."""
    out, other = shutil.copytree(finished, tmp_path / "out"), tmp_path / "other"
    (out / "checkpoints").rename(other)
    (out / "checkpoints").symlink_to(other)
    (out / "samples.png").unlink(missing_ok=True)
    (out / "samples.png").symlink_to(tmp_path / "mine.png")
    (tmp_path / "mine.png").touch()
    arguments = ["distill", "--teacher", str(teacher_folder), "--prompts", str(prompt_file), *SMALL, "--output", str(out), "--overwrite"]
    assert f"overwrite: {out / 'checkpoints'} is a link to {other}, and nothing outside of {out}" in refused(capsys, *arguments)
    assert any(other.iterdir()) and (out / "config.yaml").is_file()
    for path in other.iterdir():
        shutil.rmtree(path)
    check_output(flags.parse_config(arguments[1:]))
    remove_run(out)
    assert (out / "checkpoints").is_dir() and not (out / "config.yaml").exists()
    assert (tmp_path / "mine.png").exists() and not (out / "samples.png").is_symlink()


def test_overwrite_deletes_every_part_that_a_student_has_and_no_other_folder(tmp_path):
    """A family may have parts that no other has; an index that names what is no part moves nobody."""
    out = tmp_path / "out"
    for folder in (mine := tmp_path / "mine", out / "guider", out / "notes", out / "safety_checker", out / "unet"):
        folder.mkdir(parents=True)
    index = {
        "_class_name": "MyPipeline",
        "guider": ["diffusers", "X"],
        "../mine": ["a", "b"],
        "notes": True,
        "safety_checker": [None, None],
    }
    (out / "model_index.json").write_text(json.dumps(index))
    remove_run(out)
    assert sorted(path.name for path in out.iterdir()) == ["notes", "safety_checker"] and mine.is_dir()
    (out / "model_index.json").write_text("cut o")
    remove_run(out)
    assert not (out / "model_index.json").exists()


def test_a_run_is_gone_on_with_by_one_process_at_a_time(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = (out / "metrics.jsonl").read_bytes()
    going_on = ["distill", "--output", str(out), "--resume", "--updates", "5"]
    with disk.alone("output", out):
        status, printed = command(*going_on)
        assert status == 2 and f"output: another process is at work in {out}" in printed
        assert (out / "metrics.jsonl").read_bytes() == before

    def killed():
        with disk.alone("output", out):
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == -signal.SIGKILL and (out / disk.LOCK).is_file()  # a killed run's holds nobody up
    assert command(*going_on)[0] == 0
    assert not (out / disk.LOCK).exists()


def test_a_run_goes_on_with_the_teacher_that_it_began_with_alone(capsys, teacher_folder, prompt_file, tmp_path):
    """Its folder may hold another one by then, of the same shapes; and it may lie elsewhere, as may the prompts."""
    teacher, out = shutil.copytree(teacher_folder, tmp_path / "teacher"), tmp_path / "out"
    start = ["distill", "--teacher", str(teacher), "--prompts", str(prompt_file), *SMALL, "--updates", "1", "--output", str(out)]
    assert cli.main(start) == 0
    (path,) = (teacher / "unet").glob("*.safetensors")
    whole = path.read_bytes()
    weights = load_file(path)
    key = max(weights, key=lambda key: weights[key].numel())
    save_file(weights | {key: weights[key] + 1}, path, {"format": "pt"})
    again = ["distill", "--output", str(out), "--resume", "--updates", "2"]
    assert f"its unet/{path.name} has changed" in refused(capsys, *again)
    not_exported = refused(capsys, "export", str(out), "--to", "diffusers")
    assert f"unet/{path.name} of {teacher} has changed" in not_exported and f"delete {out / TEACHER_FILES}" in not_exported
    path.write_bytes(whole)
    for name, key, value in (("scheduler/scheduler_config.json", "beta_schedule", "linear"), ("unet/config.json", "act_fn", "gelu"),
                             ("model_index.json", "requires_safety_checker", True)):  # fmt: skip
        plain = (teacher / name).read_text()
        (teacher / name).write_text(json.dumps({"_diffusers_version": "9.9"} | json.loads(plain) | {key: value}))
        with pytest.raises(UserError, match=f"not the teacher that this run began with, for its {name} has changed"):
            check_same_teacher(str(teacher), out)
        (teacher / name).write_text(json.dumps(json.loads(plain) | {"_diffusers_version": "9.9"}, sort_keys=True))  # saved again
        check_same_teacher(str(teacher), out)
    later = {  # words of a later diffusers, and of how transformers has read what it writes
        "unet/config.json": {"dropout": 0.0}, "scheduler/scheduler_config.json": {"rescale_betas_zero_snr": False},
        "model_index.json": {"image_encoder": [None, None]}, "tokenizer/tokenizer_config.json": {"local_files_only": 1, "is_local": 0},
    }  # fmt: skip
    began = json.loads((out / TEACHER_FILES).read_text())
    earlier = began | {name: {key: began[name][key] for key in began[name].keys() - words.keys()} for name, words in later.items()}
    for name, words in later.items():
        (teacher / name).write_text(json.dumps(json.loads((teacher / name).read_text()) | words))
    (out / TEACHER_FILES).write_text(json.dumps(earlier))
    check_same_teacher(str(teacher), out)
    (teacher / "unet" / "config.json").write_text(json.dumps(json.loads((teacher / "unet" / "config.json").read_text()) | {"dropout": 0.1}))
    with pytest.raises(UserError, match=f"unet/config.json has changed; .*; where you know .*, delete {out / TEACHER_FILES}"):
        check_same_teacher(str(teacher), out)
    (teacher / "unet" / "config.json").write_text(json.dumps(began["unet/config.json"]))
    (teacher / "tokenizer" / "more.txt").touch()
    assert "its tokenizer/more.txt has changed" in refused(capsys, *again)
    (teacher / "tokenizer" / "more.txt").unlink()
    moved, same = shutil.move(teacher, tmp_path / "moved"), shutil.copy(prompt_file, tmp_path / "same.txt")
    other = tmp_path / "other.txt"
    other.write_text("a cat\n")
    assert f"{teacher}: no such folder" in refused(capsys, *again)
    assert "prompts: these 1 prompts are not" in refused(capsys, *again, "--teacher", str(moved), "--prompts", str(other))
    again += ["--teacher", f"{moved}/", "--prompts", str(same)]
    assert cli.main(again) == 0 and cli.main(["export", str(out), "--to", "diffusers"]) == 0
    (out / TEACHER_FILES).unlink()
    assert cli.main(again) == 0 and (out / TEACHER_FILES).is_file()


@pytest.mark.parametrize("size", [1, 1000, 2**16, 10 * models.STRETCHES * models.STRETCH])
def test_a_change_of_a_64th_of_the_weights_is_seen_wherever_it_is(tmp_path, size):
    path = tmp_path / "unet" / "model.safetensors"
    path.parent.mkdir()
    content = bytearray(size)
    path.write_bytes(content)
    before = models.weights_in(tmp_path)
    length = -(-size // models.STRETCHES)
    for start in {0, size // 3, size - length}:
        path.write_bytes(content[:start] + b"\1" * length + content[start + length :])
        assert models.weights_in(tmp_path) != before
    path.write_bytes(content + b"\0")
    assert models.weights_in(tmp_path) != before


def test_a_disk_without_locks_is_told_of(tmp_path, monkeypatch):
    def none(lock, **options):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", none)
    with pytest.warns(UserWarning, match=r"cannot be locked \(FileSystem does not .* no second run"), disk.alone("output", tmp_path):
        pass


def test_a_run_is_replaced_once_the_new_one_can_begin(capsys, finished, teacher_folder, prompt_file, tmp_path):
    """--overwrite deletes nothing for a run that does not start, and nothing that the new run reads."""
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "export").mkdir()
    shutil.copytree(teacher_folder, out / "export" / "diffusers")
    (out / "samples").mkdir()
    (out / "samples" / "pictures.safetensors").touch()

    def held():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = held()
    told = ["distill", "--prompts", str(prompt_file), *SMALL, "--output", str(out), "--overwrite"]
    for teacher in (out, out / "export" / "diffusers"):
        message = f"overwrite: teacher is {teacher}, among what --overwrite deletes in {out}"
        assert message in refused(capsys, *told, "--teacher", str(teacher))
    own = ["--teacher", str(teacher_folder)]
    of_out = ["--reward.discriminator", "0.1", "--discriminator.latents", str(out / "samples" / "pictures.safetensors")]
    assert "overwrite: discriminator.latents is" in refused(capsys, *told, *own, *of_out)
    assert "no model_index.json there" in refused(capsys, *told, "--teacher", str(tmp_path))
    assert "another network" in refused(capsys, *told, *own, "--init", str(finished), "--lora-rank", "2")
    assert held() == before
    assert cli.main([*told, *own, "--updates", "1"]) == 0
    assert not (out / "export").exists() and [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
    config = flags.parse_config(["--resume", "--output", str(out)])  # goes on, and overwrites nothing again
    assert config.resume and not config.overwrite


@pytest.mark.parametrize(
    "options, words",
    [
        ([], None),
        (["--updates=500", "--save-every=7", "--remote.timeout=9"], None),
        (["--memory.micro-groups=1", "--memory.checkpointing=true", "--compile=true"], None),
        (["--memory.optimizer=adamw8bit"], "memory.micro_groups, memory.checkpointing, compile may change"),
        (["--matching.negative-prompt=blurry"], "matching.negative_prompt is 'blurry', the run in OUT has ''; only"),
        (["--matching.shift=2"], "matching.shift is 2.0, the run in OUT has 3.0; only updates,"),
        (["--seed=5"], "seed is 5, the run in OUT has 0; only"),
        (["--matching.gamma=0.5", "--student.lr=1"], "student.lr is 1.0, the run in OUT has 0.0002; only"),
        (["--reward.clip=0.5"], "reward.clip is 0.5, the run in OUT has 0.3; only"),
        (["--fake.updates=9"], "may change; with others a new run may begin from it, --init OUT --output NEW"),
        (["--reward.other=0.5"], "reward.other is 0.5, the run in OUT has not given; only"),
    ],
)
def test_a_run_of_an_earlier_version_goes_on_and_a_changed_field_is_named(tmp_path, options, words):
    """Its config lacks what came later: that is as it is by default."""
    saved = flags.as_plain(flags.parse_config(["--output", str(tmp_path), "--reward.clip", "0.3", "--via.clip", "pathwise"]))
    for name in ("level_density", "shift", "negative_prompt"):
        del saved["matching"][name]
    del saved["remote"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    config = flags.parse_config(["--resume", "--output", str(tmp_path), *options])
    if words is None:
        check_output(config)
    else:
        with pytest.raises(UserError) as refusal:
            check_output(config)
        assert words.replace("OUT", str(tmp_path)) in str(refusal.value) and "{" not in str(refusal.value)


@pytest.mark.parametrize("told", [["RECIPE", "--resume"], ["SAID"], ["--resume=True", "--output=OUT"]], ids=lambda told: told[0])
def test_a_run_goes_on_from_its_own_config_however_it_is_told_to(tmp_path, told):
    out = tmp_path / "out"
    out.mkdir()
    saved = flags.as_plain(flags.parse_config(["--output", str(tmp_path / "where it was"), "--lora-rank", "64"]))
    (out / "config.yaml").write_text(yaml.safe_dump(saved))
    named = {"RECIPE": tmp_path / "recipe.yaml", "SAID": tmp_path / "said.yaml"}
    named["RECIPE"].write_text(f"output: {out}\n")
    named["SAID"].write_text(f"output: {out}\nresume: true\n")
    config = flags.parse_config([str(named.get(word, word.replace("OUT", str(out)))) for word in told])
    assert (config.resume, config.lora_rank, config.output) == (True, 64, str(out))


def test_a_run_keeps_no_code_that_it_would_be_refused_for(tmp_path):
    given = ["--output", str(tmp_path), "--reward.mine=a.py:f", "--judge.own=b.py:f", "--judge.far=http://127.0.0.1:1"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(flags.as_plain(flags.parse_config(given))))
    config = flags.parse_config(["--output", str(tmp_path), "--resume", "--scorer.mine=a.py:f"])
    assert (config.scorer, config.judge) == ({"mine": "a.py:f"}, {"far": "http://127.0.0.1:1"})


def test_a_checkpoint_of_another_version_is_refused_by_what_it_lacks(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    newest = max((out / "checkpoints").iterdir())
    state = checkpoint.load(newest)
    del state["earlier"]
    checkpoint.save(out / "checkpoints", state["update"], state)
    assert f"resume: {newest} holds no 'earlier': another version" in refused(capsys, "distill", "--output", str(out), "--resume")


def test_a_checkpoint_of_another_run_is_refused(finished, tmp_path, capsys):
    """As of two runs that differ in their seeds, whose folders were mixed."""
    out = shutil.copytree(finished, tmp_path / "out")
    newest = max((out / "checkpoints").iterdir())
    state = checkpoint.load(newest)
    own = flags.parse_config(["--output", str(out), "--resume", "--updates", "9"])
    check_own(own, state["config"], newest)
    check_own(own, state["config"] | {"of another version": 1}, newest)
    with pytest.raises(UserError, match=r"of a run with reward {}, and this one's config.yaml has {'clip': 1}"):
        check_own(dataclasses.replace(own, reward={"clip": 1}), state["config"], newest)
    state["config"]["student.lr"] = 0.5
    checkpoint.save(out / "checkpoints", state["update"], state)
    line = refused(capsys, "distill", "--output", str(out), "--resume")
    assert f"resume: {newest} is of a run with student.lr 0.5, and this one's config.yaml has {own.student.lr}: put back the" in line


def test_resume_takes_the_saved_config_and_goes_further(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    assert "is at update 3 already; give that many or more, got 2" in refused(
        capsys, "distill", "--output", str(out), "--resume", "--updates", "2"
    )
    (out / "evaluation.json").write_text("{}")  # of the student of update 3
    assert cli.main(["distill", "--output", str(out), "--resume", "--updates", "4"]) == 0
    assert "going on from step-00000003" in capsys.readouterr().out
    assert not (out / "evaluation.json").exists()
    lines = [json.loads(line)["update"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]
    newest = max((out / "checkpoints").iterdir())
    for folder in (out / "checkpoints").iterdir():
        (folder / "state.safetensors").write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match="damaged"):
        code = cli.main(["distill", "--output", str(out), "--resume"])
    assert code == 2 and str(newest) in capsys.readouterr().err


def test_a_student_that_is_written_anew_is_none_until_it_is_whole(finished, tmp_path, monkeypatch, capsys):
    """Else a kill leaves weights of the new one beside the LoRA of the old."""
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "pytorch_lora_weights.safetensors").touch()
    monkeypatch.setattr(export, "write_diffusers", mock.Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["distill", "--output", str(out), "--resume"]) == 130 and "--resume" in capsys.readouterr().err
    assert "holds no finished student (no model_index.json)" in refused(capsys, "sample", out, "--prompt", "a cat")
    assert not (out / "pytorch_lora_weights.safetensors").exists()


def test_sample_names_never_come_from_the_prompt(finished, tmp_path, capsys):
    prompt = "../../etc/passwd; $(rm -rf) \n"
    assert cli.main(["sample", str(finished), "--prompt", prompt, "--steps", "4", "--seed", "5", "-n", "3", "--output", str(tmp_path)]) == 0
    files = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(files) == 3 and all(name.startswith(f"step4-{i:03d}-") for i, name in enumerate(files))
    assert json.loads((tmp_path / "pictures.jsonl").read_text().splitlines()[0])["prompt"] == prompt
    assert "made for 4 steps" in refused(capsys, "sample", str(finished), "--prompt", "x", "--steps", "8")


def drawn(folder):
    """(prompt, number among its pictures) -> the file's bytes."""
    lines = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    return {(line["prompt"], line["index"]): (folder / line["file"]).read_bytes() for line in lines}


def test_a_picture_is_the_same_whatever_is_drawn_beside_it(finished, tmp_path, monkeypatch):
    """By its prompt, the seed and its number: not by its batch, nor by who is in it."""
    monkeypatch.setattr("fewstep.evaluate.drawing.BATCH", 2)
    alone, together = tmp_path / "alone", tmp_path / "together"
    for prompt in ("a cat", "a dog"):
        assert cli.main(["sample", str(finished), "--prompt", prompt, "--output", str(alone)]) == 0
    captions = tmp_path / "captions.csv"
    captions.write_text("id,caption\n1,a dog\n2,a bird\n")
    told = ["--prompt", "a cat", "--prompts", str(captions), "-n", "3"]
    assert cli.main(["sample", str(finished), *told, "--output", str(together)]) == 0
    one, many = drawn(alone), drawn(together)
    assert [*many] == [(prompt, index) for prompt in ("a cat", "a dog", "a bird") for index in range(3)]
    assert [*one] == [("a cat", 0), ("a dog", 0)] and all(many[key] == one[key] for key in one)
    assert len(set(many.values())) == 9 and len([*together.glob("*.png")]) == 9
    other = tmp_path / "other"
    assert cli.main(["sample", str(finished), "--prompt", "a cat", "--seed", "1", "--output", str(other)]) == 0
    assert drawn(other)["a cat", 0] != one["a cat", 0]


def test_pictures_are_kept_as_they_are_drawn(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fewstep.evaluate.drawing.BATCH", 1)
    draw, calls = drawing.draw, []

    def broken(*args, **told):
        calls.append(args)
        if len(calls) == 3:
            raise NumericalError("1 of 1 pictures hold NaN or inf")
        return draw(*args, **told)

    monkeypatch.setattr(drawing, "draw", broken)
    assert "hold NaN or inf" in refused(capsys, "sample", finished, "--prompt", "a cat", "-n", "4", "--output", tmp_path)
    assert [*drawn(tmp_path)] == [("a cat", 0), ("a cat", 1)]


def test_a_student_of_the_hub_is_drawn_with(finished, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(models, "index_on_hub", lambda source: asked.append(source) or finished / "model_index.json")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda source, revision, allow_patterns: asked.append(allow_patterns) or str(finished)
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "someone/student", "--prompt", "a cat"]) == 0
    assert len([*(tmp_path / "pictures").glob("*.png")]) == 1
    *indices, files = asked
    assert set(indices) == {"someone/student"} and files == ["*.json", "*.txt", "*.model", "*.jinja", "*/*.safetensors"]  # never a pickle

    def gone(source, revision, allow_patterns):
        raise OSError("401 Client Error\nsee there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gone)
    line = refused(capsys, "sample", "someone/student", "--prompt", "a cat")
    assert f"someone/student@{finished.name}: its files cannot be had (OSError: 401 Client Error see there)" in line


def test_what_is_to_be_drawn_must_be_said(finished, tmp_path, capsys):
    assert "--prompt: missing; " in refused(capsys, "sample", finished)
    assert "--prompt: empty; " in refused(capsys, "sample", finished, "--prompt", "a cat", "--prompt", " ")
    assert "--prompt: holds a NUL" in refused(capsys, "sample", finished, "--prompt", "a cat", "--prompt", "a" * 100_000)
    assert f"--prompts: {tmp_path / 'none.txt'}" in refused(capsys, "sample", finished, "--prompts", tmp_path / "none.txt")
    assert "no such folder, and not a hub id" in refused(capsys, "sample", tmp_path / "none", "--prompt", "a cat")
    (tmp_path / "file").touch()
    line = refused(capsys, "sample", finished, "--prompt", "a cat", "--output", tmp_path / "file")
    assert f"--output: cannot write to {tmp_path / 'file'}" in line


@pytest.mark.parametrize("arguments", [["sample", "OUT", "--prompt", "caf\udce9"], ["distill", "--output", "/data/caf\udce9"]])
def test_an_argument_in_another_encoding_is_refused_before_anything_is_done(capsys, arguments):
    """As Python has a byte of the command line that is not UTF-8."""
    line = refused(capsys, *arguments)
    assert line.endswith("caf\\udce9' holds bytes that are not UTF-8 text; give it in UTF-8, or rename the folder")


def test_a_user_without_a_home_is_told_where_the_cache_may_lie(teacher_folder, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("Could not determine home directory.")))
    line = refused(capsys, "distill", "--teacher", teacher_folder, "--prompts", prompt_file, "--output", tmp_path / "out")
    assert "XDG_CACHE_HOME: not set, and there is no home folder; set it to a folder under which fewstep can keep its embeddings" in line
    models.load(str(teacher_folder))  # as a student is, whose pictures need no cache


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_loaded(
    teacher_folder, prompt_file, finished, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()  # as a home is that does not exist, or is mounted to be read
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("fewstep.models.load", None)
    told = ["--prompts", prompt_file]
    of_run = refused(capsys, "distill", "--teacher", teacher_folder, *told, "--output", tmp_path / "out")
    for line, kind in ((of_run, "embeddings"), (refused(capsys, "evaluate", finished, *told), "evaluate")):
        assert (
            "XDG_CACHE_HOME, a folder under which " in line
            and f"are kept: cannot write to {tmp_path / 'file' / 'fewstep' / kind} (" in line
        )
    assert not (tmp_path / "out").exists()


def test_a_disk_that_takes_no_more_pictures_is_told_in_one_line(finished, tmp_path, monkeypatch, capsys):
    def full(self, path, **told):
        raise OSError(errno.ENOSPC, "No space left on device")  # as the system says it of an open file

    monkeypatch.setattr(Image.Image, "save", full)
    assert cli.main(["sample", str(finished), "--prompt", "a cat", "--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: could not be written to: No space left on device. The pictures that were drawn are kept" in line


def test_a_line_that_a_full_disk_cut_costs_no_later_one(finished, tmp_path):
    arguments = ["sample", str(finished), "--prompt", "a cat", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    listing = tmp_path / "pictures.jsonl"
    first = listing.read_text()
    for cut in (first + first[:20], first[:20]):
        listing.write_text(cut)
        with pytest.warns(UserWarning, match="its last line was cut off and is left out"):
            assert cli.main(arguments) == 0
        assert listing.read_text() == first * (1 + cut.count("\n"))


def test_a_disk_that_takes_no_other_card_leaves_the_first(tmp_path):
    resource = pytest.importorskip("resource")  # of Unix alone
    export.save_card(ModelCard("---\n---\nfirst"), tmp_path)

    def second():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OSError, match="could not be written to"):
            export.save_card(ModelCard("---\n---\n" + "longer " * 100), tmp_path)

    assert forked(second) == 0 and (tmp_path / "README.md").read_text().endswith("first")


def test_a_device_that_is_full_is_told_in_one_line_with_what_takes_less(finished, monkeypatch, capsys):
    def full(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB. See docs")

    monkeypatch.setattr(cli, "distill_command", full)
    assert cli.main(["distill"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Tried to allocate 2.00 GiB" in line and "--dry-run" in line
    goes_on, begins = line.split("; ")
    assert all(flag in goes_on for flag in ("--memory.micro-groups 1", "--memory.checkpointing")) and "--lora-rank" not in goes_on
    assert "--memory.optimizer adamw8bit do where one begins" in begins and "--resume" not in line  # nothing was saved

    def full_later(arguments):
        with noting_what_is_kept(finished):
            full(arguments)

    monkeypatch.setattr(cli, "distill_command", full_later)
    assert cli.main(["distill"]) == 1
    assert f"The last checkpoint is whole: go on with fewstep distill --output {finished} --resume" in capsys.readouterr().err

    def wrong(arguments):
        raise RuntimeError("a shape")

    monkeypatch.setattr(cli, "distill_command", wrong)
    with pytest.raises(RuntimeError, match="a shape"):
        cli.main(["distill"])


def test_a_machine_that_cannot_compile_is_told_in_one_line(monkeypatch, capsys):
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    def bare(arguments):
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setattr(cli, "distill_command", bare)
    assert cli.main(["distill"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--compile: torch cannot compile" in line and "No working C++ compiler found" in line and "leave the flag out" in line


@pytest.mark.parametrize(
    "told", [["--size", "16x8,8x16"], ["--size=16x8,8x16"], ["--size", '["16x8", "8x16"]'], ["--size", "[16x8, 8x16]"]], ids=" ".join
)
def test_sizes_are_told_plainly_or_as_a_list(told):
    assert flags.parse_config(told).sizes() == [(16, 8), (8, 16)]


def test_what_is_no_size_is_said(capsys):
    assert "HEIGHTxWIDTH, as 1024x768; got '512'" in refused(capsys, "distill", "--size", "512")


def test_a_sample_is_of_the_size_that_was_trained_at(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("size: []", "size: ['16x8']"))
    for told, size in (((), (8, 16)), (("--size", "8x16"), (16, 8))):
        output = tmp_path / "-".join(("pictures", *told))
        assert cli.main(["sample", str(tmp_path / "run"), "--prompt", "a cat", "--output", str(output), *told]) == 0
        assert Image.open(next(output.glob("*.png"))).size == size  # (width, height)
    assert "--size: " in refused(capsys, "sample", str(finished), "--prompt", "x", "--size", "large")
    assert "--size: " in refused(capsys, "sample", str(finished), "--prompt", "x", "--size", "3x16")


BROKEN = 3  # the update in which a signal comes


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, teacher_folder, prompt_file):
    """Arguments of a run of some updates more, and the state that it ends with."""
    output = tmp_path_factory.mktemp("unbroken")
    arguments = ["distill", "--teacher", str(teacher_folder), "--prompts", str(prompt_file), *SMALL, "--updates", str(BROKEN + 3)]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    return arguments, last_state(output)


def last_state(output):
    return load_file(output / "checkpoints" / f"step-{BROKEN + 3:08d}" / "state.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_resume_ends_where_an_unbroken_run_ends(unbroken, tmp_path, number):
    arguments, whole = unbroken
    step = Trainer.step

    def interrupted(trainer):
        if trainer.update == BROKEN - 1:
            os.kill(os.getpid(), number)
        return step(trainer)

    status, output = command(*arguments, "--output", str(tmp_path), before=lambda: setattr(Trainer, "step", interrupted))
    assert status == 130 and "saved. Go on with" in output, output
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == f"step-{BROKEN:08d}"  # at the end of that update
    assert cli.main(["distill", "--output", str(tmp_path), "--resume"]) == 0
    resumed = last_state(tmp_path)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("last", [1, 2])
def test_a_signal_ends_a_run_in_its_last_update_too(tmp_path, capsys, last):
    """A student is exported and measured by the run that goes on."""

    def updates(output, *, stop):
        for trainer.update in range(1, last + 1):
            os.kill(os.getpid(), signal.SIGINT)
            yield {"seconds": 1.0}
            if stop():
                return

    trainer = SimpleNamespace(ranks=Ranks(), update=0, running={}, run=updates)
    assert not train(SimpleNamespace(trainer=trainer, config=Config(updates=last, sample_every=0)), tmp_path, [])
    said = capsys.readouterr().out
    assert f"stopped at update 1 of {last}; saved. Go on with" in said and "torchrun" not in said


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_a_command_as_ctrl_c_does(monkeypatch, processes):
    """Not one of several processes, which may wait for another in torch's own code, where no handler is heard."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(cli, "evaluate_command", lambda arguments: signal.raise_signal(signal.SIGTERM))
    status, said = command("evaluate", before=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if processes > 1:
        assert (status, said) == (-signal.SIGTERM, "")
    else:
        assert status == 130 and "stopped. Every part that was whole is kept: the same call goes on" in said


def test_a_handler_of_the_callers_own_hears_sigterm_while_a_command_runs(monkeypatch):
    heard_by_caller = []
    monkeypatch.setattr(cli, "evaluate_command", lambda arguments: signal.raise_signal(signal.SIGTERM) or 0)
    with heard(lambda number, frame: heard_by_caller.append(number)):
        assert cli.main(["evaluate"]) == 0
    assert heard_by_caller == [signal.SIGTERM]


def test_signals_are_whose_they_were_once_a_run_has_ended():
    """As a notebook's, which goes on."""
    numbers, told = (signal.SIGINT, signal.SIGTERM), []
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(ZeroDivisionError), heard(lambda number, frame: told.append(number)):
        signal.raise_signal(signal.SIGTERM)
        _ = 1 / 0
    assert told == [signal.SIGTERM] and [signal.getsignal(number) for number in numbers] == before


def test_what_torchrun_leaves_to_a_run_that_stops_is_said(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "it kills after its --shutdown-timeout (30 s unless" in torchrun_limit()
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    assert "(3600 s unless" in torchrun_limit()


@pytest.mark.parametrize(
    "error, files, words",
    [
        (KeyboardInterrupt(), [], "stopped. Nothing was saved yet"),
        (KeyboardInterrupt(), ["config.yaml"], "stopped. No checkpoint was saved yet: --resume begins at update 0"),
        (KeyboardInterrupt(), ["config.yaml", "checkpoints/step-00000001"], "is whole: go on with fewstep distill --output OUT --resume"),
        (NumericalError("NaN. Lower x.lr"), ["config.yaml"], "NaN. Lower x.lr. No checkpoint was saved yet: begin anew with --overwrite"),
        (RewardError("no score"), ["config.yaml"], "Nothing was updated with it. No checkpoint was saved yet: begin anew with --overwrite"),
        (RewardError("no score"), ["config.yaml", "checkpoints/step-00000001"], "or with other settings in a new run, --init OUT"),
    ],
)
def test_what_ends_a_run_says_what_there_is_to_go_on_from(tmp_path, monkeypatch, capsys, error, files, words):
    tmp_path = tmp_path / "my run"  # a folder that has to be quoted
    for name in files:
        (tmp_path / name if "step" in name else tmp_path).mkdir(parents=True, exist_ok=True)
        "step" in name or (tmp_path / name).touch()

    def ended(arguments):
        with noting_what_is_kept(tmp_path):
            raise error

    monkeypatch.setattr(cli, "distill_command", ended)
    assert cli.main(["distill"]) in (1, 130)
    assert words.replace("OUT", as_word(tmp_path)) in capsys.readouterr().err and shlex.split(as_word(tmp_path)) == [str(tmp_path)]


def test_an_error_of_a_rewards_own_arithmetic_is_not_put_down_to_the_training(monkeypatch):
    def ended(arguments):
        asked("mine", PixelReward(lambda images, prompts: np.float64(1) / 0, "mine"), Sample(torch.zeros(1, 3, 2, 2), None, {}, ["a"], None,
              decode=lambda x: x))  # fmt: skip

    monkeypatch.setattr(cli, "distill_command", ended)
    with np.errstate(all="raise"), pytest.raises(FloatingPointError) as raised:
        cli.main(["distill"])
    assert "raised by the reward 'mine'" in raised.value.__notes__[0]


def test_what_is_stopped_before_there_is_a_run_names_none(monkeypatch, capsys):
    def ended(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "distill_command", ended)
    assert cli.main(["distill"]) == 130 and capsys.readouterr().err.strip() == "fewstep: error: stopped."


@pytest.mark.parametrize("most, file", [(1_000, "out: could not be written to"), (20_000, "step-00000002: could not write checkpoint of ")])
def test_a_full_disk_ends_the_run_with_one_line(teacher_folder, prompt_file, tmp_path, most, file):
    """No file may grow past `most` bytes: the config does not fit, or the first checkpoint."""
    options = ["--teacher", str(teacher_folder), "--prompts", str(prompt_file), "--output", str(tmp_path / "out"), *SMALL]
    resource = pytest.importorskip("resource")  # of Unix alone
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    status, output = command("distill", *options, "--updates", "4", before=limited)
    last = output.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in output, output
    assert last.startswith(f"fewstep: error: {tmp_path / 'out'}") and file in last and "File too large" in last
    assert last.endswith("No checkpoint was saved yet: --resume begins at update 0" if "step-" in file else "Nothing was saved yet")
    assert not list((tmp_path / "out").glob("checkpoints/*"))


@pytest.mark.parametrize("name, share", [("config.yaml", 0.5), ("metrics.jsonl", 0.99)])
def test_a_full_disk_takes_nothing_from_a_run_that_goes_on(finished, tmp_path, name, share):
    """Both are written anew when a run goes on, and the disk takes no file of that size; the second is the larger."""
    out = shutil.copytree(finished, tmp_path / "out")
    before = (out / name).read_bytes()
    most = int(share * len(before))
    resource = pytest.importorskip("resource")  # of Unix alone
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    status, output = command("distill", "--output", str(out), "--resume", before=limited)
    assert status == 1 and "File too large" in output, output
    assert (out / name).read_bytes() == before and (name == "config.yaml") == (most < (out / "config.yaml").stat().st_size)


def test_nan_ends_the_run_with_one_line_and_saves_nothing_of_it(teacher_folder, prompt_file, tmp_path, capsys):
    options = ["--teacher", str(teacher_folder), "--prompts", str(prompt_file), "--output", str(tmp_path / "out"), *SMALL]
    # a learning rate of 1e30 overflows within a few updates
    assert cli.main(["distill", *options, "--updates", "50", "--student.lr", "1e30", "--save-every", "1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fewstep: error: ") and f"with other settings in a new run, --init {tmp_path / 'out'} --output NEW" in error
    newest = max((tmp_path / "out" / "checkpoints").iterdir())
    fake = {name: value for name, value in load_file(newest / "state.safetensors").items() if name.startswith("/online/")}
    assert fake and all(bool(torch.isfinite(value).all()) for value in fake.values())


def test_prompts_that_are_too_long_are_counted(teacher_folder, monkeypatch):
    from fewstep import models

    backbone = models.load(str(teacher_folder))
    assert backbone.cut(["a cat", "a very long prompt"]) == ["a very long prompt"]  # eight tokens, one for each letter
    monkeypatch.setattr("fewstep.models.backbone.TOKENIZED", 2)  # a tokenizer's share of a set
    long = [f"a very long prompt {i}" for i in range(3)]
    assert backbone.cut([]) == [] and backbone.cut([long[0], "a cat", "a dog", long[1], long[2]]) == long


def test_python_interface(teacher_folder, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = fewstep.distill(
        str(teacher_folder), str(prompt_file), steps=2, output="~/out", updates=1, groups=2, group_size=2,
        student={"lr": 1e-3}, evaluate=False, lora_rank=0,
    )  # fmt: skip
    assert path == tmp_path / "out"
    pipe = fewstep.load(path)
    assert pipe.scheduler.config.original_inference_steps == 2
