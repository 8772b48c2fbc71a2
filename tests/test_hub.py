"""Models of the hub, by its own client: a small hub on loopback answers it."""

import functools
import json
import shutil

import fresh
import hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_scorers import save_clip

from fewstep import hub as naming
from fewstep import launch, models

TEACHER, SCORER, STUDENT = "me/teacher", "me/clip", "me/student"
MAIN = """
import json, sys
import fewstep.run
from fewstep import cli
from fewstep.evaluate import drawing
fewstep.run.SAMPLES_PER_PROMPT, drawing.TEACHER_STEPS = 1, 2
sys.exit(cli.main(json.loads(sys.argv[1])))
"""


@pytest.fixture
def repositories(teacher_folder, tmp_path):
    """A teacher at two commits, of which the second has other weights and another licence, and a CLIP; pickles beside them."""
    folders = [shutil.copytree(teacher_folder, tmp_path / name) for name in ("first", "second")]
    for folder, licence in zip(folders, ("openrail++", "mit"), strict=True):
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        for pickle in ("v1.ckpt", "unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
            (folder / pickle).write_bytes(b"code")
    for path in folders[1].glob("unet/*.safetensors"):
        save_file({key: value + 1 for key, value in load_file(path).items()}, path, {"format": "pt"})
    scorer = save_clip(tmp_path / "clip")
    (scorer / "pytorch_model.bin").write_bytes(b"code")
    return {TEACHER: folders, SCORER: [scorer]}


def test_each_call_asks_the_hub_once(teacher_folder, tmp_path, monkeypatch):
    """A process may live for days, and the repository go on meanwhile."""
    commits = []

    def newest(*told, **more):
        commits.append(tmp_path / str(len(commits)))
        return shutil.copytree(teacher_folder, commits[-1]) / "model_index.json"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", newest)
    for number in range(2):
        with launch.leaves_no_trace():
            assert [models.pinned(TEACHER) for _ in range(2)] == [f"{TEACHER}@{number}"] * 2
    assert len(commits) == 2


@pytest.mark.parametrize(
    "source, parts",
    [
        ("me/model", ("me/model", None)),
        ("me/model-1.5@v1.0", ("me/model-1.5", "v1.0")),
        ("me/model@refs/pr/1", ("me/model", "refs/pr/1")),
        *(
            (path, None)
            for path in ("model", "me/model/unet", "./me/model", "../me/model", "/me/model", "~me/model", "me/model@", "me/a b")
        ),
    ],
)
def test_what_can_be_a_name_of_the_hub(source, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert naming.parts(source) == parts and naming.split(source) == (parts or (source, None))
    if parts:
        (tmp_path / source).mkdir(parents=True)
        assert naming.parts(source) is None  # a folder that is there is that folder


def test_a_student_of_the_hub_comes_with_its_chat_template(tmp_path, monkeypatch):
    """Z-Image's and FLUX.2's tokenizers have it in a file of its own, and read no prompt without."""
    from huggingface_hub.utils import filter_repo_objects
    from pipelines import z_image

    from fewstep import models
    from fewstep.evaluate.command import on_hub

    whole, fetched = tmp_path / "whole", tmp_path / "fetched"
    z_image.pipeline().save_pretrained(whole, safe_serialization=True)

    def download(repository, revision, allow_patterns):
        files = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (fetched / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / file, fetched / file)
        return str(fetched)

    monkeypatch.setattr(models, "index_on_hub", lambda source: whole / "model_index.json")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    backbone = models.load(str(on_hub(STUDENT, weights=True)[1]))
    assert (whole / "tokenizer" / "chat_template.jinja").is_file()
    assert torch.equal(backbone.encode(["a cat"])["prompt_embeds"], models.load(str(whole)).encode(["a cat"])["prompt_embeds"])


def network(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_keeps_the_commits_that_it_began_with(repositories, prompt_file, tmp_path):
    """The hub's newest one at its start, also once the hub has moved on or is out of reach; only safetensors are fetched."""
    first, second = repositories[TEACHER]
    old, new = (hub.commit(TEACHER, number) for number in range(2))
    out, lora = tmp_path / "out", tmp_path / "lora"
    start = [
        "distill", "--prompts", str(prompt_file), "--output", str(out), "--groups=2", "--group-size=2", "--steps=2", "--updates=1",
        "--fake.updates=1", "--student.lr=1e-9", "--lora-rank=2", "--precision=fp32", "--device=cpu", "--sample-every=0",
    ]  # fmt: skip
    repositories[TEACHER] = [first]
    with hub.serving(repositories, tmp_path / "sent") as server:
        told = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
        call = functools.partial(run, tuple((told | {"XDG_CACHE_HOME": str(tmp_path / "cache")}).items()), tmp_path / "printed")

        call([*start, "--teacher", TEACHER, "--reward.clip=0.1", f"--scorer.clip={SCORER}"])
        config = yaml.safe_load((out / "config.yaml").read_text())
        assert (config["teacher"], config["scorer"]["clip"]) == (f"{TEACHER}@{old}", f"{SCORER}@{hub.commit(SCORER, 0)}")
        fetched = [path for path in server.asked if "/resolve/" in path]
        assert any(path.endswith("unet/diffusion_pytorch_model.safetensors") for path in fetched)
        assert not [path for path in fetched if path.endswith((".ckpt", ".bin"))]

        repositories[TEACHER] = [first, second]
        repositories[SCORER] *= 2
        call(["distill", "--output", str(out), "--resume", "--updates=2"])
        torch.testing.assert_close(network(out), network(first), rtol=0, atol=1e-5)  # at that rate; the second's are greater by 1
        assert not [path for path in server.asked if new in path or hub.commit(SCORER, 1) in path]
        printed = call(["distill", "--output", str(out), "--resume", "--teacher", TEACHER], code=2)
        assert f"resume: teacher is '{TEACHER}@{new}', the run in {out} has '{TEACHER}@{old}'" in printed
        assert f"{TEACHER}@v9: no such folder, and cannot read its model_index.json from the hub (RevisionNotFoundError" in call(
            ["distill", "--teacher", f"{TEACHER}@v9", "--prompts", str(prompt_file), "--dry-run"], code=2
        )

        call(["export", str(out), "--to", "lora", "--output", str(lora), "--push", "me/lora", "--private"])
        card = (lora / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert (front["base_model"], front["license"]) == (TEACHER, "openrail++")
        assert f'from_pretrained("{TEACHER}", revision="{old}", torch_dtype=torch.float32)' in card

        (sent,) = repositories["me/lora"]
        assert server.private == {"me/lora"} and contents(sent) == contents(lora)

        pushed = tmp_path / "pushed"
        line = call(["export", str(out), "--to", "diffusers", "--output", str(pushed), "--push", STUDENT])
        (sent,) = repositories[STUDENT]
        assert f"{server.address}/{STUDENT}/commit/{hub.commit(STUDENT, 0)}" in line and contents(sent) == contents(pushed)
        line = call(["sample", STUDENT, "--prompt", "a cat", "--output", str(tmp_path / "pictures")])
        drawn = next((tmp_path / "pictures").glob("*.png")).read_bytes()
        assert "step2-" in line

    # the hub is out of reach: what was fetched is there
    call(["distill", "--output", str(out), "--resume", "--updates=3"])
    call(["sample", f"{STUDENT}@{hub.commit(STUDENT, 0)}", "--prompt", "a cat", "--output", str(tmp_path / "again")])
    assert next((tmp_path / "again").glob("*.png")).read_bytes() == drawn


def run(imported, printed, arguments, code=0):
    """What a command prints, in a process of its own whose hub is another."""
    ended = fresh.ended(fresh.start(MAIN, json.dumps(arguments), printed=printed, imported=imported))
    assert ended == code, printed.read_text()[-3000:]
    return printed.read_text()
