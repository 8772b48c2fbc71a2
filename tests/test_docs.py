"""The README says what the committed results say; the other pages what the code says."""

import json
import math
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import small_run
import torch
from PIL import Image

from fewstep import world
from fewstep.compare.cells import Plan, kept
from fewstep.evaluate import drawing
from fewstep.evaluate.tables import markdown_table
from fewstep.rewards import rows

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_the_committed_results():
    tables = runpy.run_path(str(ROOT / "docs" / "readme_table.py"))
    assert set(tables["PAGES"]) == {"README.md", "docs/rewards.md", "docs/evaluation.md"}
    for page in tables["PAGES"]:
        assert tables["written"](page) == (ROOT / page).read_text()
    for recipe in tables["RECIPES"]:
        assert tables["expected"](recipe) == tables["recipe_file"](recipe).read_text()


@pytest.mark.parametrize("folder", ["compare", "grid"])
def test_every_committed_cell_is_in_its_table(folder, capsys):
    """On any machine: what a cell was made on is no setting."""
    output = ROOT / "docs" / "results" / folder
    plan = Plan(output, evaluations=180_000, images_per_prompt=world.IMAGES_PER_PROMPT, prompts=128, threads=1)
    cells = kept(plan)
    assert len(cells) == len(list(output.glob("cells/*.json"))) > 20, capsys.readouterr().out
    reported = json.loads((output / "compare.json").read_text())["cells"]
    assert {(cell["row"], cell["seed"]) for cell in reported} == cells.keys()


def test_the_curves_are_those_of_committed_cells():
    """By their panels, not by their pixels: letters are drawn a little otherwise by each FreeType."""
    figures = runpy.run_path(str(ROOT / "docs" / "curves.py"))
    page = (ROOT / "docs" / "reading-a-run.md").read_text()
    for name in figures["CELLS"]:
        with Image.open(ROOT / "docs" / name) as committed:
            assert committed.size == figures["drawn"](name).size and f"]({name})" in page


def test_the_page_of_rewards_has_the_table_of_the_code():
    assert markdown_table(rows()[0], rows()[1:]) in (ROOT / "docs" / "rewards.md").read_text()


def test_the_page_of_rewards_has_every_key_that_a_run_logs(tmp_path):
    """By the names of small runs' rewards and judges, and none that no run logs but those of servers."""
    reuse = ("--reuse.evaluation", "2", "--reuse.rollout", "1")
    logged = set()
    for options in (small_run.SEVERAL, (*reuse, "--reward.discriminator", "0.1")):
        trainer = small_run.trainer_of(options)
        list(trainer.run(tmp_path, stop=lambda: False))
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
            for key in json.loads(line):
                first, _, rest = key.partition("/")
                if first in trainer.config.reward and key != "discriminator/own_loss":
                    key = re.sub(r"/(judge|parted)/.*", r"/\1/JUDGE", f"NAME/{rest}")
                logged.add("evaluations/NAME" if first == "evaluations" else key)
        (tmp_path / "metrics.jsonl").unlink()
    section = (ROOT / "docs" / "rewards.md").read_text().partition("### What a run logs\n")[2].partition("\n### ")[0]
    keys = {key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(.+?)`", row)}
    assert keys - {"NAME/retries", "NAME/faults/KIND"} == logged


class OnAnotherDevice(torch.Tensor):
    """As pictures on a GPU are, which NumPy does not take."""

    def numpy(self):
        raise TypeError("use Tensor.cpu() first")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_the_worked_example_of_a_remote_reward_scores(monkeypatch):
    page = (ROOT / "docs" / "rewards.md").read_text()
    (code,) = re.findall(r"```python\n(# ocr\.py.*?)```", page, re.DOTALL)
    read = iter(["Open  24\nhours\n", "open 24 hoots", ""])
    monkeypatch.setitem(sys.modules, "pytesseract", types.SimpleNamespace(image_to_string=lambda picture: next(read)))
    names = {}
    exec(compile(code, "ocr.py", "exec"), names)
    prompt = 'a sign that says "open 24 hours"'
    pictures = torch.rand(4, 3, 8, 8).as_subclass(OnAnotherDevice)
    scores = names["spelling"](pictures, [prompt, "a cat", prompt, prompt])
    assert scores[0] == 1 and math.isnan(scores[1]) and 0.7 < scores[2] < 1 and scores[3] == 0


def test_the_page_on_evaluation_knows_every_flag_set_and_extractor(capsys):
    from fewstep import cli
    from fewstep.evaluate import features, sets

    page = (ROOT / "docs" / "evaluation.md").read_text()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    flags = {word.strip("[],") for word in capsys.readouterr().out.split() if word.strip("[],").startswith("--")}
    told = {"--seed", "--guidance", "--batch", "--precision", "--images-per-prompt"}  # the help says all there is to say
    assert not {flag for flag in flags - told if flag not in page and not flag.startswith(("--help", "--extractor.NAME"))}
    assert all(
        f"`{name}` | {f'{known.count:,}'.replace(',', ' ') if known.count > 9999 else known.count}" in page
        for name, known in sets.SETS.items()
    )
    assert all(f"--extractor.{name}" in page for name in features.EXTRACTORS)
    assert all(name in page for name in drawing.SOLVERS)
