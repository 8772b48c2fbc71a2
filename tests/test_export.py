"""What `fewstep export` writes is the student, in every tool of stock diffusers that the card speaks of; nothing else leaves the house."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from forked import forked
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep import cli, composition, disk, export, flags, models
from fewstep.models import kohya
from fewstep.models.sdxl import StableDiffusionXL

PROMPTS = ["a cat", "two red hats"]
# the forms and their cards on three families; that every family's folder and LoRA file are its student is test_families' matter
FAMILIES = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"]
UNETS = ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]
LORA_FILE = "pytorch_lora_weights.safetensors"


def interrupted_run(folder, teacher, *, rank, updates=(2, 3)):
    """A run of five updates as it lies on disk after `updates` checkpoints; its averaged students are far from each other's and the
    teacher's, and are not the trained weights. Returns the run."""
    config = flags.parse_config([
        "--teacher", str(teacher), "--lora-rank", str(rank), "--updates", "5", "--groups", "2", "--group-size", "2", "--device", "cpu",
        "--precision", "fp32", "--output", str(folder),
    ])  # fmt: skip
    run = composition.build(config, PROMPTS, str(teacher))
    torch.manual_seed(1)
    for run.trainer.update in updates:
        for value in run.trainer.ema.shadow_params:
            value.add_(0.05 * torch.randn_like(value))
        run.trainer.save(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(flags.as_plain(run.config), sort_keys=False))
    return run


@pytest.fixture(scope="module")
def runs(teachers, tmp_path_factory):
    """family, rank -> (folder, run) of an interrupted run; each is made once."""
    made = {}

    def of(name, rank=2):
        if (name, rank) not in made:
            folder = tmp_path_factory.mktemp("runs") / f"{name}-{rank}"
            folder.mkdir()
            made[name, rank] = folder, interrupted_run(folder, teachers / name, rank=rank)
        return made[name, rank]

    return of


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """family, form, rank -> folder of an export of the interrupted run; each is made once."""
    made = {}

    def of(name, to, rank=2):
        if (name, to, rank) not in made:
            output = tmp_path_factory.mktemp("exports") / f"{name}-{to}"
            assert cli.main(["export", str(runs(name, rank)[0]), "--to", to, "--output", str(output)]) == 0
            made[name, to, rank] = output
        return made[name, to, rank]

    return of


def student_of(run):
    return run.backbone.student_pipeline(run.roles, run.trainer.averaged(), 4)


def draw(pipe, **call):
    """Four steps without guidance, always with the same noise, (2, 3, H, W)."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)  # flow schedulers do not draw from the generator
    call = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 1.0} | call
    return pipe(generator=torch.Generator().manual_seed(3), output_type="pt", **call).images


def load_lora(pipe, *args, **kwargs):
    """load_lora_weights, in which diffusers may not speak of missing or unexpected keys."""
    with mock.patch("diffusers.loaders.peft.logger.warning") as warning:
        pipe.load_lora_weights(*args, **kwargs)
    assert not warning.called, warning.call_args
    return pipe


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def refused(capsys, *arguments):
    capsys.readouterr()  # the bars of what was loaded before it
    assert cli.main(["export", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fewstep: error: "), lines
    return lines[0]


def test_a_run_of_an_earlier_version_is_exported(teachers, runs, exported, tmp_path, monkeypatch):
    """With settings that no new run may have, and without adapters that this version has beside its own: they add nothing."""
    folder = shutil.copytree(runs("StableDiffusionPipeline")[0], tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"teacher_guidance": 0.0}))
    family = models.family(str(teachers / "StableDiffusionPipeline"))
    monkeypatch.setattr(family, "lora_targets", [*family.lora_targets, "time_embedding.linear_1"])
    assert cli.main(["export", str(folder), "--to", "diffusers", "--output", str(tmp_path / "student")]) == 0
    mine, theirs = (load_file(of / "unet" / "diffusion_pytorch_model.safetensors")
                    for of in (tmp_path / "student", exported("StableDiffusionPipeline", "diffusers")))  # fmt: skip
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


# -- the forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, rank", [*itertools.product(FAMILIES, [2]), ("StableDiffusionPipeline", 0)])
def test_an_interrupted_run_gives_the_student_of_its_newest_checkpoint(teachers, runs, name, rank, tmp_path, capsys):
    folder, run = runs(name, rank)
    output = tmp_path / "student"
    assert cli.main(["export", str(folder), "--to", "diffusers", "--output", str(output)]) == 0
    assert "update 3 of 5: the averaged student of step-00000003" in capsys.readouterr().out
    assert "3 updates of 5" in (output / "README.md").read_text()
    backbone = models.load(str(output))
    mine, given = dict(getattr(student_of(run), run.backbone.part).named_parameters()), dict(backbone.model.named_parameters())
    assert mine.keys() == given.keys() and all(torch.equal(mine[key], given[key]) for key in mine)
    scheduler = run.backbone.scheduler(4)
    assert public(scheduler.from_pretrained(output, subfolder="scheduler").config) == public(scheduler.config)
    assert (output / LORA_FILE).is_file() == bool(rank)
    teacher = dict(models.load(str(teachers / name)).model.named_parameters())
    assert any(not torch.equal(mine[key], teacher[key]) for key in mine)


@pytest.mark.parametrize("to", ["diffusers", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_cards_own_lines_draw_the_student(teachers, runs, exported, name, to):
    """The LoRA on its teacher, unmerged, and the merged folder: both are the student, with the grid that it was trained on."""
    output, (_, run) = exported(name, to), runs(name)
    if to == "lora":
        assert {path.name for path in output.iterdir()} == {LORA_FILE, "scheduler", "README.md"}
    card = (output / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    code = code.replace(f'"path/to/{name}"', repr(str(teachers / name))).replace(f'"{output.name}"', repr(str(output)))
    scope = {}
    with mock.patch("diffusers.loaders.peft.logger.warning") as warning:
        exec(code, scope)
    assert not warning.called
    images = draw(scope["pipe"])
    assert [float(t) for t in scope["pipe"].scheduler.timesteps] == pytest.approx(run.backbone.scheduler(4).timesteps.tolist(), abs=1e-3)
    torch.testing.assert_close(images, draw(student_of(run)), rtol=0, atol=1e-4)
    teacher = models.load(str(teachers / name)).pipe
    teacher.scheduler = run.backbone.scheduler(4)
    assert (draw(teacher) - images).abs().max() > 1e-2  # the student has moved, so equality says something


@pytest.mark.parametrize("name", UNETS)
def test_stock_diffusers_reads_kohyas_file_as_the_student(teachers, runs, exported, name):
    folder, run = runs(name)
    output = exported(name, "kohya")
    file = output / f"{folder.name}.safetensors"
    assert {path.name for path in output.iterdir()} == {file.name, "README.md"}
    pipe = load_lora(models.load(str(teachers / name)).pipe, output, weight_name=file.name)
    pipe.scheduler = run.backbone.scheduler(4)
    torch.testing.assert_close(draw(pipe), draw(student_of(run)), rtol=0, atol=1e-4)
    weights = load_file(file)
    layers = {key.removesuffix(".alpha") for key in weights if key.endswith(".alpha")}
    assert {f"{layer}.{end}" for layer in layers for end in ("alpha", "lora_down.weight", "lora_up.weight")} == weights.keys()
    assert 2 * len(layers) == len(run.roles.student_parameters)  # each layer of the student, none besides
    assert all(weights[f"{layer}.alpha"].shape == () and float(weights[f"{layer}.alpha"]) == 2 for layer in layers)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    with safe_open(file, "pt") as opened:
        written = opened.metadata()
    assert written["ss_network_dim"] == written["ss_network_alpha"] == "2" and written["modelspec.title"] == f"4-step student of {name}"
    assert written.get("ss_base_model_version") == {"StableDiffusionXLPipeline": "sdxl_base_v1-0"}.get(name)


@pytest.mark.parametrize("to", ["diffusers", "lora", "kohya"])
def test_others_may_read_the_weights_as_the_card(exported, to):
    """safetensors writes files for their owner alone."""
    output = exported("StableDiffusionPipeline", to)
    files = [*output.rglob("*.safetensors"), output / "README.md"]
    assert len(files) == {"diffusers": 5, "lora": 2, "kohya": 2}[to] and len({path.stat().st_mode for path in files}) == 1


@pytest.mark.parametrize(
    "width, prediction, version", [(768, "epsilon", "sd_v1"), (1024, "v_prediction", "sd_v2_v"), (16, "epsilon", None)]
)
def test_kohyas_name_of_the_base_model(teachers, width, prediction, version):
    backbone = models.load(str(teachers / "StableDiffusionPipeline"))
    backbone.model.register_to_config(cross_attention_dim=width)
    backbone.prediction = prediction
    assert backbone.kohya_version() == version
    told = kohya.metadata(4, version, "title")  # by which other tools sort
    assert told.get("ss_base_model_version") == version and told.get("ss_v2") == {768: "False", 1024: "True"}.get(width)
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "4"


def sdxl_unet(**changes):
    """A UNet with the blocks of Stable Diffusion XL, narrow."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{
        "sample_size": 4, "block_out_channels": (8, 8, 8), "layers_per_block": 2, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 8, "attention_head_dim": 8,
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + 6 * 4,
    } | changes)  # fmt: skip


def test_sdxl_layers_get_the_names_of_the_original_code():
    """As diffusers' own reader of original checkpoints has them, for every layer that a LoRA trains; and a few known by heart."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    unet = sdxl_unet()
    inject_adapter_in_model(StableDiffusionXL.lora_config(StableDiffusionXL, 2), unet)
    layers = [name for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)]
    names = {layer: kohya.sgm_name(layer, unet.config) for layer in layers}
    assert len(set(names.values())) == len(layers) > 700
    original = {f"model.diffusion_model.{name}.{kind}": layer for layer, name in names.items() for kind in ("weight", "bias")}
    back = convert_ldm_unet_checkpoint(original, unet.config)
    assert {key.removesuffix(".weight"): layer for key, layer in back.items() if key.endswith(".weight")} == {x: x for x in layers}
    by_heart = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": "input_blocks.8.1.transformer_blocks.9.attn2.to_k",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.resnets.2.time_emb_proj": "output_blocks.5.0.emb_layers.1",
        "conv_out": "out.2",
    }
    assert {layer: names.get(layer, kohya.sgm_name(layer, unet.config)) for layer in by_heart} == by_heart


def test_a_layer_that_diffusers_would_not_read_back_is_not_exported(teachers, runs, tmp_path, capsys):
    """Here an upsampler in a block without attention, which sits where diffusers' reader looks for attention."""
    config = sdxl_unet(
        block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), transformer_layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).config  # fmt: skip
    backbone = SimpleNamespace(kohya="sgm", pipeline=StableDiffusionXL.pipeline, model=SimpleNamespace(config=config))
    backbone.kohya_version, backbone.lora_layers = lambda: None, lambda weights: weights
    for layer, fine in (("up_blocks.0.upsamplers.0.conv", False), ("up_blocks.1.attentions.0.proj_in", True)):
        weights = {f"{layer}.lora_A.weight": torch.randn(2, 8), f"{layer}.lora_B.weight": torch.randn(8, 2)}
        if fine:
            kohya.save(backbone, weights, tmp_path / "file.safetensors", rank=2, title="")
            continue
        with pytest.raises(ValueError, match=r"does not read 2 of 2 weights back .* the first: \['up_blocks.0.upsamplers.0.conv"):
            kohya.save(backbone, weights, tmp_path / "file.safetensors", rank=2, title="")
        assert not (tmp_path / "file.safetensors").exists()
    with pytest.raises(ValueError, match="class_embedding: the original code has no such layer"):
        kohya.sgm_name("class_embedding", config)
    # and the command says it in one line
    folder, _ = runs("StableDiffusionXLPipeline")
    with mock.patch.object(kohya, "from_kohya", lambda keys, *args: {}):
        assert "--to kohya: diffusers does not read" in refused(capsys, folder, "--to", "kohya", "--output", tmp_path / "out")


@pytest.mark.usefixtures("small_grid")
@pytest.mark.parametrize("frozen", ["fp32", "bf16"])
def test_a_finished_run_is_exported_as_it_was_left(teachers, prompt_file, tmp_path, capsys, frozen):
    """`distill` and `export --to diffusers` write the same files; without its checkpoints a finished folder is enough."""
    folder, teacher = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(teachers / "StableDiffusionPipeline", teacher)
    assert cli.main(["distill", "--teacher", str(teacher), "--prompts", str(prompt_file), "--output", str(folder), "--updates", "2",
                     "--lora-rank", "2", "--groups", "2", "--group-size", "2", "--sample-every", "0", "--memory.checkpointing",
                     "false", "--precision", "bf16" if frozen == "bf16" else "fp32", "--memory.frozen", frozen]) == 0  # fmt: skip

    def differ(one, other):
        """Files of a folder that the other has not, or has with another content (of safetensors: other tensors)."""
        found = []
        for path in one.rglob("*"):
            twin = other / path.relative_to(one)
            if path.suffix == ".safetensors" and twin.is_file():
                tensors, twins = load_file(path), load_file(twin)
                same = tensors.keys() == twins.keys() and all(
                    torch.equal(tensors[key], twins[key]) and tensors[key].dtype == twins[key].dtype for key in tensors
                )
            else:
                same = path.is_dir() or (twin.is_file() and path.read_bytes() == twin.read_bytes())
            found += [] if same else [str(path.relative_to(one))]
        return set(found)

    whole = folder / "export" / "diffusers"
    assert cli.main(["export", str(folder), "--to", "diffusers"]) == 0
    assert {"unet", "vae", "model_index.json", "samples.png", "README.md", LORA_FILE} <= {path.name for path in whole.iterdir()}
    allowed = {"README.md", "fewstep.json"}  # it names its folder; and what the run's own says in its config
    assert differ(whole, folder) <= allowed
    assert cli.main(["export", str(folder), "--to", "lora", "--output", str(tmp_path / "first")]) == 0
    capsys.readouterr()
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(teacher)
    for to in ("lora", "kohya", "diffusers"):
        assert cli.main(["export", str(folder), "--to", to, "--output", str(tmp_path / to)]) == 0
        assert "update 2: the student finished in" in capsys.readouterr().out
    assert differ(tmp_path / "first", tmp_path / "lora") <= allowed
    # what was read from another folder says so in its configs
    configs = {"model_index.json", "unet/config.json", "vae/config.json", "tokenizer/tokenizer_config.json"}
    assert differ(whole, tmp_path / "diffusers") <= allowed | configs
    (folder / LORA_FILE).unlink()
    assert "the LoRA is gone" in refused(capsys, folder, "--to", "kohya", "--output", tmp_path / "none")


def test_what_was_measured_goes_with_the_student_it_was_measured_on(teachers, runs, tmp_path, capsys):
    """A finished run that went on and was interrupted has pictures and numbers of its earlier student: not of the one exported."""
    folder = tmp_path / "run"
    shutil.copytree(runs("StableDiffusionPipeline")[0], folder)
    shutil.copytree(teachers / "StableDiffusionPipeline", folder, dirs_exist_ok=True)
    (folder / "samples.png").write_bytes(b"a picture")
    assert cli.main(["export", str(folder), "--to", "lora", "--output", str(tmp_path / "earlier")]) == 0
    assert not (tmp_path / "earlier" / "samples.png").exists()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"updates": 3}))
    assert cli.main(["export", str(folder), "--to", "lora", "--output", str(tmp_path / "finished")]) == 0
    assert (tmp_path / "finished" / "samples.png").is_file()
    assert "samples.png" in (tmp_path / "finished" / "README.md").read_text()
    (folder / "evaluation.json").write_text('{"protocol": {')
    line = refused(capsys, str(folder), "--to", "lora", "--output", str(tmp_path / "damaged"))
    assert f"{folder / 'evaluation.json'}: cut off, or no evaluation (" in line
    assert not (tmp_path / "damaged").exists()  # nothing has been written by then
    for text in ("{}", "[]", "5"):
        (folder / "evaluation.json").write_text(text)
        with pytest.raises(export.CannotExport, match="cut off, or no evaluation"):
            export.read_results(folder / "evaluation.json")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_does_not_say_where_the_teacher_lay(teachers, exported, name):
    output = exported(name, "diffusers")
    texts = {str(path.relative_to(output)): path.read_text() for path in output.rglob("*.json")}
    assert {"model_index.json", "vae/config.json", "text_encoder/config.json"} <= texts.keys()
    assert not [file for file, text in texts.items() if str(teachers) in text]


# -- in stock diffusers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_negative_prompt_has_no_effect_on_a_student(runs, exported, name):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(exported(name, "diffusers"))
    call = runs(name)[1].backbone.student_call
    plain = draw(pipe, **call)
    assert torch.equal(draw(pipe, **call, negative_prompt=["a dog", "blurry"]), plain)
    assert not torch.equal(draw(pipe, **call | {"guidance_scale": 3.0}, negative_prompt=["a dog", "blurry"]), plain)


# -- the card ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "front, fields, words",
    [
        ("license: openrail++", {"license": "openrail++"}, "The teacher's licence: `openrail++`"),
        (
            "license: other\nlicense_name: tiny-nc\nlicense_link: https://tiny.example/licence",
            {"license": "other", "license_name": "tiny-nc", "license_link": "https://tiny.example/licence"},
            "The teacher's licence: `tiny-nc` (https://tiny.example/licence)",
        ),
        (
            "license: other\nlicense_name: tiny-nc\nlicense_link: LICENSE.md",  # which is not in the export
            {"license": "other", "license_name": "tiny-nc"},
            "The teacher's licence: `tiny-nc`.",
        ),
        ("tags: [a]", {}, "Licence not found (its card names none): look at the teacher's page"),
        ("license: [", {}, "Licence not found (its card cannot be read ("),
        (None, {}, "Licence not found (no README.md in teacher): look at the teacher's page"),
    ],
)
def test_the_card_names_the_teachers_licence(runs, tmp_path, capsys, front, fields, words):
    _, run = runs("StableDiffusionPipeline")
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    if front is not None:
        (teacher / "README.md").write_text(f"---\n{front}\n---\n# A teacher\n")
    config = dataclasses.replace(run.config, teacher=str(teacher))
    text = str(export.model_card(export.Averaged(config, run.backbone, None, {}, 3, {}), "lora", tmp_path))
    front = yaml.safe_load(text.split("---")[1])
    assert {key: value for key, value in front.items() if key.startswith("license")} == fields
    assert f"\n{words}" in text
    assert (words in capsys.readouterr().out) == (not fields)
    assert str(tmp_path) not in text  # the way to a teacher is of one machine
    assert "base_model" not in front and front["library_name"] == "diffusers" and "lora" in front["tags"]


def test_a_teacher_on_the_hub_is_the_base_model_and_its_licence_file_stays_there(teachers, runs, tmp_path):
    _, run = runs("StableDiffusionPipeline")
    config = dataclasses.replace(run.config, teacher="org/teacher")
    student = export.Averaged(config, run.backbone, None, {}, 3, {})
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: theirs\nlicense_link: LICENSE.md\n---\n")
    with mock.patch("fewstep.export.hf_hub_download", return_value=str(card)) as download:
        data = export.model_card(student, "lora", tmp_path, name="me/mine").data.to_dict()
    assert download.call_args.args[:2] == ("org/teacher", "README.md")
    assert data["license_link"] == "https://huggingface.co/org/teacher/blob/main/LICENSE.md" and data["license_name"] == "theirs"
    commit = "a" * 40
    with mock.patch("fewstep.export.hf_hub_download", return_value=str(card)) as download:  # both as of the commit that was distilled
        fields, _ = export.teacher_licence(f"org/teacher@{commit}")
    assert download.call_args.kwargs == {"revision": commit}
    assert fields["license_link"] == f"https://huggingface.co/org/teacher/blob/{commit}/LICENSE.md"
    assert data["base_model"] == "org/teacher" and data["base_model_relation"] == "adapter"
    assert export.model_card(student, "diffusers", tmp_path).data.base_model_relation == "finetune"  # offline: no licence, and a card
    assert export.teacher_licence("org/teacher")[1].startswith("its card cannot be read (")
    with mock.patch("fewstep.export.hf_hub_download", side_effect=EntryNotFoundError("404 Client Error ... http://")):
        assert export.teacher_licence(f"org/teacher@{commit}") == ({}, "no README.md in org/teacher")
    assert export.teacher_licence("world") == ({"license": "apache-2.0"}, "")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_card_says_where_one_step_is_not_possible(runs, exported, name):
    scheduler = runs(name)[1].backbone.scheduler(4)
    scheduler.set_timesteps(1)
    possible = bool(torch.isfinite(scheduler.timesteps.float()).all())
    assert ("One step is not possible" in (exported(name, "diffusers") / "README.md").read_text()) is not possible


def test_the_card_says_what_a_picture_is_drawn_again_with(runs, exported, tmp_path):
    """A flow model's pipeline draws its students' noise between steps from torch's global generator, but for one step's, which has none."""
    for name in FAMILIES:
        card = (exported(name, "diffusers") / "README.md").read_text()
        assert ("call `torch.manual_seed(0)` before it" in card) is (name == "StableDiffusion3Pipeline")
    _, run = runs("StableDiffusion3Pipeline")

    def card(steps):
        config = dataclasses.replace(run.config, steps=steps)
        return str(export.model_card(export.Averaged(config, run.backbone, None, {}, 3, {}), "lora", tmp_path))

    assert "manual_seed" not in card(1) and "manual_seed" in card(2)
    with mock.patch.object(type(run.backbone), "hands_on_generator", lambda self: True):  # it is the family that knows
        assert "manual_seed" not in card(2)


def test_the_cards_lines_draw_at_the_first_size_that_was_trained_at(runs, tmp_path):
    _, run = runs("StableDiffusionPipeline")
    student = export.Averaged(dataclasses.replace(run.config, size=["16x24", "24x16"]), run.backbone, None, {}, 3, {})
    for to in ("diffusers", "lora"):
        assert "height=16, width=24" in export.usage(student, to, tmp_path, name=None)


def test_the_card_has_guidance_as_the_teachers_pipeline_counts_it(runs, tmp_path):
    from fewstep.models.z_image import ZImage

    _, run = runs("StableDiffusion3Pipeline")
    student = export.Averaged(run.config, run.backbone, None, {}, 3, {})
    assert "of its pipeline" not in str(export.model_card(student, "lora", tmp_path))
    with mock.patch.object(type(run.backbone), "teacher_call", ZImage.teacher_call):
        text = str(export.model_card(student, "lora", tmp_path))
    assert "under guidance 2.5 (`guidance_scale=1.5` of its pipeline), at" in text and "teacher guidance 2.5 (`guidance_scale" in text


@pytest.mark.parametrize("guidance, words", [(2.5, "guidance 2.5"), ((1.5, 8.0), "guidance from 1.5 to 8")], ids=["fixed", "range"])
def test_the_card_says_what_was_guided_away_from(runs, tmp_path, guidance, words):
    _, run = runs("StableDiffusionPipeline")
    matching = dataclasses.replace(run.config.matching, guidance=guidance, negative_prompt="blurry {low}")
    student = export.Averaged(dataclasses.replace(run.config, matching=matching), run.backbone, None, {}, 3, {})
    text = str(export.model_card(student, "lora", tmp_path))
    assert f"teacher {words} and the negative prompt 'blurry {{low}}', no other reward" in text
    assert f"under {words} and the negative prompt 'blurry {{low}}', at every noise level" in text


def test_a_card_names_the_folder_that_one_stands_in(runs, tmp_path, monkeypatch):
    _, run = runs("StableDiffusionPipeline")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    config = dataclasses.replace(run.config, teacher=".")
    student = export.Averaged(config, run.backbone, SimpleNamespace(), {}, 1, {})
    text = export.model_card(student, "diffusers", Path()).content
    assert 'from_pretrained("mine"' in text and "# 4-step student of mine" in text


def test_the_card_tells_the_guidance_the_grid_and_the_rewards(exported, runs, tmp_path):
    _, run = runs("StableDiffusionPipeline")
    for to in export.FORMS:
        text = (exported("StableDiffusionPipeline", to) / "README.md").read_text()
        assert "under guidance 2.5" in text and "`guidance_scale=1.0`" in text and "a negative prompt has no effect" in text
        assert "timesteps [999, 749, 499, 249]" in text and "no other reward" in text
        assert ("strength=j/4" in text) is (to != "kohya") and ("`steps` j with `denoise` j/4" in text) is (to == "kohya")
    config = dataclasses.replace(run.config, reward={"clip": 1.0, "red": 3.0}, via={"red": "policy"})
    assert "`clip` (1), `red` (3, by policy gradient)" in export.rewards_in_words(config, export.logged_weights(tmp_path, config))
    config = dataclasses.replace(config, weights=dataclasses.replace(config.weights, mode="adaptive"))
    assert "`clip`, `red` (by policy gradient)" in export.rewards_in_words(config, export.logged_weights(tmp_path, config))
    lines = [{"update": 1, "clip/weight": 0.1}, {"update": 2, "clip/weight": 0.2, "red/weight": 0.6}, {"update": 3, "clip/weight": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"update": 4, "cl')
    assert export.logged_weights(tmp_path, config, 2) == {"clip": 0.2, "red": 0.6}
    assert export.logged_weights(tmp_path, config) == {"clip": 0.3, "red": 0.6}


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what it is sent."""
    import huggingface_hub

    class Hub:
        calls, files, private, error = [], {}, True, None

        def create_repo(self, name, **options):
            Hub.calls.append(("create", name, options))
            if Hub.error:
                raise Hub.error

        def model_info(self, name):
            return SimpleNamespace(private=Hub.private)

        def upload_folder(self, *, repo_id, folder_path, **options):
            Hub.calls.append(("upload", repo_id, options))
            Hub.files = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}
            return f"https://huggingface.co/{repo_id}/commit/1"

    Hub.calls, Hub.files = [], {}
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_only_a_family_with_an_image_to_image_pipeline_is_told_of_it(runs, tmp_path, monkeypatch):
    folder, _ = runs("StableDiffusionPipeline")
    for told in (True, False):
        monkeypatch.setattr("fewstep.models.backbone.Backbone.draws_from_pictures", lambda backbone, told=told: told)
        assert cli.main(["export", str(folder), "--to", "lora", "--output", str(tmp_path / str(told))]) == 0
        assert ("image-to-image" in (tmp_path / str(told) / "README.md").read_text()) is told


def test_push_uploads_the_export_and_nothing_else(runs, hub, tmp_path, capsys):
    folder, _ = runs("StableDiffusionPipeline")
    (folder / "secret.txt").write_text("not for others")
    assert cli.main(["export", str(folder), "--to", "lora", "--output", str(tmp_path / "out"), "--push", "me/mine"]) == 0
    assert hub.files == {LORA_FILE, "README.md", "scheduler/scheduler_config.json"}
    assert hub.calls[0] == ("create", "me/mine", {"private": None, "exist_ok": True})
    message = {"commit_message": "Student exported by fewstep"}  # no patterns, no folder in the repository, no deletion
    assert hub.calls[1:] == [("upload", "me/mine", message)]
    assert "https://huggingface.co/me/mine/commit/1" in capsys.readouterr().out
    assert 'load_lora_weights("me/mine"' in (tmp_path / "out" / "README.md").read_text()
    arguments = ["export", str(folder), "--to", "kohya", "--output", str(tmp_path / "private"), "--push", "me/mine", "--private"]
    assert cli.main(arguments) == 0 and hub.calls[2][2]["private"] is True


def test_private_never_ends_in_a_public_repository(runs, hub, tmp_path, capsys):
    hub.private = False
    told = [runs("StableDiffusionPipeline")[0], "--to", "lora", "--output", tmp_path / "out", "--push", "me/mine", "--private"]
    assert "me/mine is there already and public; nothing was uploaded" in refused(capsys, *told)
    assert not hub.files


def http_error(status):
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError(f"{status} Client Error\nfor url", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.mark.parametrize(
    "problem, words",
    [
        ("401", "hf auth login"),
        ("403", "may not write"),
        ("token", "hf auth login"),
        ("offline", "OfflineModeIsEnabled: offline mode is enabled. "),
        ("network", "Name or service not known"),
    ],
)
def test_what_fails_at_the_hub_is_one_line(runs, hub, tmp_path, capsys, problem, words):
    from huggingface_hub import errors

    kinds = {
        "token": errors.LocalTokenNotFoundError("Token is required"),
        "offline": errors.OfflineModeIsEnabled("offline mode is enabled."),
        "network": OSError("Name or service not known"),
    }
    hub.error = kinds[problem] if problem in kinds else http_error(int(problem))
    out, private = tmp_path / "out", ["--private"] * (problem == "403")
    line = refused(capsys, runs("StableDiffusionPipeline")[0], "--to", "lora", "--output", out, "--push", "me/mine", *private)
    again = " ".join(["hf upload me/mine", str(out), ".", *private])  # which needs no second export into another folder
    assert words in line and "--push me/mine" in line and f"The export itself is in {out}; `{again}` uploads it" in line
    assert (out / LORA_FILE).is_file() and not hub.files


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["NOWHERE", "--to", "lora"], "holds no run of fewstep (no config.yaml)"),
        (["RUN", "--to", "onnx"], "--to: invalid choice: 'onnx'"),
        (["RUN"], "--to"),
        (["EARLY", "--to", "diffusers"], "no checkpoint was saved yet"),
        (["FULL", "--to", "lora"], "trained full weights (lora_rank 0), there is no LoRA; use --to diffusers"),
        (["FULL", "--to", "kohya"], "trained full weights"),
        (["SD3", "--to", "kohya"], "there is no such format for a StableDiffusion3Pipeline; use --to lora"),
        (["RUN", "--to", "lora", "--output", "HELD"], "is not empty; name another folder or empty it"),
        (["RUN", "--to", "lora", "--output", "FILE"], "is a file; name a folder"),
        (["RUN", "--to", "lora", "--output", "FILE/in"], "--output: cannot write to"),
        (["RUN", "--to", "lora", "--private"], "--private is for --push"),
        (["RUN", "--to", "lora", "--push", "mine"], "'mine' is not ORG/NAME"),
        (["RUN", "--to", "lora", "--push", "me/my student"], "--push: "),
        (["MOVED", "--to", "lora"], "teacher: ./moved: no such folder"),
        (["MOVED", "--to", "diffusers"], "If it has moved, write where it is now into RUN/config.yaml"),
        (["OTHER", "--to", "lora"], "its student is another network than"),
        (["DAMAGED", "--to", "lora"], "state.safetensors"),
    ],
)
def test_what_cannot_be_exported_gets_one_clear_line(teachers, runs, tmp_path, capsys, arguments, words):
    folder, _ = runs("StableDiffusionPipeline")

    def copy(**changes):
        shutil.copytree(folder, tmp_path / "run")
        config = yaml.safe_load((folder / "config.yaml").read_text()) | changes
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / "run"

    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "thesis.txt").write_text("precious")
    kind = arguments[0]
    names = {"NOWHERE": tmp_path, "RUN": folder, "HELD": tmp_path / "held", "FILE": tmp_path / "held" / "thesis.txt",
             "FILE/in": tmp_path / "held" / "thesis.txt" / "in"}  # fmt: skip
    if kind in ("FULL", "SD3"):
        names[kind] = runs("StableDiffusionPipeline", 0)[0] if kind == "FULL" else runs("StableDiffusion3Pipeline")[0]
    elif kind in ("MOVED", "OTHER"):
        names[kind] = copy(teacher="./moved") if kind == "MOVED" else copy(lora_rank=4)
    elif kind in ("EARLY", "DAMAGED"):
        names[kind] = copy()
        for checkpoint in (names[kind] / "checkpoints").iterdir():
            shutil.rmtree(checkpoint) if kind == "EARLY" else (checkpoint / "state.safetensors").write_bytes(b"rubbish")
    with mock.patch("warnings.warn"):  # of each damaged checkpoint
        line = refused(capsys, *(names.get(argument, argument) for argument in arguments))
    assert words.replace("RUN", str(tmp_path / "run")) in line
    assert [path.name for path in (tmp_path / "held").iterdir()] == ["thesis.txt"]


def test_an_export_that_ends_early_leaves_none_and_the_same_call_makes_it(runs, exported, tmp_path, capsys, monkeypatch):
    """In its card, its last part: of a full disk; and killed, when nothing tidies up."""
    folder, output, whole = runs("StableDiffusionPipeline")[0], tmp_path / "out", exported("StableDiffusionPipeline", "lora")
    arguments = [str(folder), "--to", "lora", "--output", str(output)]
    read = export.read(folder, flags.saved_config(folder))
    monkeypatch.setattr(export, "read", lambda *_: read)

    def full(card, made):
        assert [*made.rglob("*.safetensors")] and made.parent == output
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(export, "save_card", full)
        assert f"cannot write to {output} (No space left on device)" in refused(capsys, *arguments)
        assert not [*output.iterdir()]
        patched.setattr(export, "save_card", lambda card, made: os._exit(9))
        assert forked(lambda: cli.main(["export", *arguments])) == 9 and not disk.visible(output, "*")
    assert cli.main(["export", *arguments]) == 0
    files = [sorted(path.relative_to(root) for path in root.rglob("*")) for root in (output, whole)]
    assert (
        files[0] == files[1] and (output / "README.md").read_text().replace('"out"', f'"{whole.name}"') == (whole / "README.md").read_text()
    )


def test_a_family_without_a_lora_loader_has_the_full_folder_alone(runs, tmp_path, capsys):
    folder, run = runs("StableDiffusion3Pipeline")
    with mock.patch.object(type(run.backbone), "saves_lora", classmethod(lambda cls: False)):
        assert "no LoRA loader for a StableDiffusion3Pipeline; use --to diffusers" in refused(
            capsys, folder, "--to", "lora", "--output", tmp_path / "out"
        )
        assert "use --to diffusers" in refused(capsys, folder, "--to", "kohya", "--output", tmp_path / "out")
        assert cli.main(["export", str(folder), "--to", "diffusers", "--output", str(tmp_path / "out")]) == 0
    assert "no LoRA file" in capsys.readouterr().out and not (tmp_path / "out" / LORA_FILE).exists()


def test_part_of_a_checkpoint(tmp_path):
    from fewstep import checkpoint

    tree = {"update": 3, "ema": {"shadow_params": [torch.ones(2), torch.zeros(1)]}, "emas": torch.ones(1), "optimizer": {0: torch.ones(3)}}
    folder = checkpoint.save(tmp_path, 3, tree)
    with mock.patch.object(checkpoint, "unpack", wraps=checkpoint.unpack) as unpack:
        part = checkpoint.load(folder, only=("update", "ema"))
    assert unpack.call_args_list[0].args[0].keys() == {"/ema/shadow_params/0", "/ema/shadow_params/1"}  # nothing else was read
    assert part.keys() == {"update", "ema"} and torch.equal(part["ema"]["shadow_params"][0], torch.ones(2))
