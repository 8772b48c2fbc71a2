"""One contract for every family: what the stock pipeline computes, fewstep computes, and what fewstep exports, the stock pipeline draws."""

import bisect
import functools
import inspect
import itertools
import json
import re
import runpy
import shutil
import warnings
from pathlib import Path
from unittest import mock

import fresh
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    TCDScheduler,
    UNet2DConditionModel,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from pipelines import GUIDED, INCOMPLETE, PIPELINES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewstep import checkpoint, cli, composition, flags, models, needs, run
from fewstep.config import Config, MatchingConfig
from fewstep.denoiser import guide, repeat, to_x0
from fewstep.errors import UserError
from fewstep.evaluate.drawing import draw, draws_in, noise_generator
from fewstep.models import embeddings, pixart
from fewstep.models.backbone import repeated_blocks
from fewstep.models.lora import AddedLinear
from fewstep.models.schedulers import flow_scheduler, lcm_scheduler
from fewstep.report.grid import save
from fewstep.run import sample_grid
from fewstep.student import Student

PROMPTS = ["a cat", "two red hats"]  # copied for each call: some stock pipelines write into the list they are given
NEGATIVE, WITHOUT_NEGATIVE = "blurry, low", ("FluxPipeline", "Flux2KleinPipeline")
every_family = pytest.mark.parametrize("name", PIPELINES | INCOMPLETE)


def test_every_family_has_a_tiny_pipeline():
    assert list(PIPELINES) == list(models.FAMILIES)


def test_the_command_for_a_new_family_runs_all_of_its_contract():
    """What has no family as a parameter, and goes over all of them, -k has to name."""
    import test_tools

    page = (Path(__file__).parent.parent / "docs" / "new-family.md").read_text()
    files, named = re.search(r'^pytest (.*) -k "StableDiffusion3 or (.*)"$', page, re.MULTILINE).groups()
    assert files.split() == ["tests/test_families.py", "tests/test_needs.py", "tests/test_tools.py"]
    tests = {name: test for name, test in (globals() | vars(test_tools)).items() if inspect.isfunction(test) and name.startswith("test_")}
    whole = [name for name, test in tests.items() if "PIPELINES" in test.__code__.co_names]
    alone = [name for name in whole if "name" not in inspect.signature(tests[name]).parameters]
    assert len(alone) == 3 and all(any(words in name for words in named.split(" or ")) for name in alone), alone


def size_of(backbone):
    """Small: the default of some pipelines is large; edges of one length would hide which is which."""
    edge = max(8, backbone.size_step())
    return edge, 2 * edge


def told(backbone):
    return dict(zip(("height", "width"), size_of(backbone), strict=True))


def noise_of(backbone, seed=0, n=2):
    return torch.randn(n, *backbone.latent_shape(size_of(backbone)), generator=torch.Generator().manual_seed(seed))


def stock_steps(backbone, noise, prompts=PROMPTS, **call):
    """(model output, timestep, sample) of each step of the teacher's stock pipeline, as its scheduler saw them."""
    pipe = backbone.pipe
    if not backbone.flow:  # Euler's scheduler holds its samples in another scale
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    seen, step = [], pipe.scheduler.step

    def watched(output, t, sample, *args, **kwargs):
        seen.append((output.clone(), t, sample.clone()))
        return step(output, t, sample, *args, **kwargs)

    with mock.patch.object(pipe.scheduler, "step", watched):
        pipe(prompt=[*prompts], num_inference_steps=3, latents=backbone.to_call(noise), output_type="latent", **told(backbone), **call)
    return seen


@every_family
def test_a_step_is_the_stock_pipelines_step(teachers, name):
    """Encoding, conditioning, times, layout and sign: the network's output as the stock scheduler is handed it."""
    backbone = models.load(str(teachers / name))
    noise = noise_of(backbone)
    output, t, sample = stock_steps(backbone, noise, **backbone.student_call)[0]
    assert backbone.flow == (backbone.pipe.scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction")
    torch.testing.assert_close(sample, backbone.to_pipeline(noise), rtol=0, atol=1e-6)
    network = backbone.roles(guidance=backbone.default_guidance).student.network
    with torch.no_grad():
        mine = network(noise, t.expand(2), backbone.encode(PROMPTS))
    torch.testing.assert_close(backbone.to_pipeline(mine), output, rtol=1e-4, atol=1e-4)
    assert output.std() > 1e-3  # a network that says nothing would agree with any


class Stop(Exception):
    """Raised from inside a stock pipeline that has done what it was run for."""


@pytest.mark.parametrize("name", ["PixArtSigmaPipeline", "SanaPipeline"])
def test_a_prompt_is_cleaned_where_the_stock_pipeline_cleans_it(teachers, name):
    """With beautifulsoup4 and ftfy: without them it is the same text either way."""
    backbone, asked = models.load(str(teachers / name)), []

    def clean(text, clean_caption=False):
        asked.append(clean_caption)
        raise Stop

    with mock.patch.object(backbone.pipe, "_text_preprocessing", clean):
        for draws in (lambda: backbone.encode_one("a cat"), lambda: backbone.pipe("a cat", **told(backbone) | backbone.student_call)):
            with pytest.raises(Stop):
                draws()
    assert asked == [name == "PixArtSigmaPipeline"] * 2


def test_prompts_that_are_not_cleaned_are_said_and_kept_apart(teachers):
    """A student is used where the stock pipeline cleans them once it can: both packages have to be there."""
    for bs4, ftfy in itertools.product((True, False), repeat=2):
        there = {"is_bs4_available": lambda bs4=bs4: bs4, "is_ftfy_available": lambda ftfy=ftfy: ftfy}
        with mock.patch.multiple("diffusers.utils", **there):
            assert runpy.run_path(pixart.__file__)["CLEANS"] is (bs4 and ftfy)
    kept = set()
    for cleans in (True, False):
        with mock.patch.object(pixart, "CLEANS", cleans), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            backbone = models.load(str(teachers / "PixArtSigmaPipeline"))
            kept.add(embeddings.fingerprint(backbone.text_fingerprint()))
        assert any("prompts are not cleaned" in str(each.message) for each in said) is not cleans
    assert len(kept) == 2


@every_family
def test_the_default_size_is_the_stock_pipelines(teachers, name):
    backbone = models.load(str(teachers / name))
    prepare, drawn = backbone.pipe.prepare_latents, []

    def watched(*args, **kwargs):
        drawn.append(prepare(*args, **kwargs))
        raise Stop

    with mock.patch.object(backbone.pipe, "prepare_latents", watched), pytest.raises(Stop):
        backbone.pipe(prompt=[*PROMPTS], **backbone.student_call)
    latents = drawn[0] if isinstance(drawn[0], torch.Tensor) else drawn[0][0]  # some give the tokens' positions too
    size = (1024, 1024) if name == "SanaPipeline" else None  # which it draws of every model: fewstep's calls name the size
    assert latents.shape == backbone.to_pipeline(torch.zeros(2, *backbone.latent_shape(size))).shape


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "ZImagePipeline"])  # the others have positions for any size
def test_a_size_without_positions_is_refused_before_the_network_is_called(teachers, name):
    backbone = models.load(str(teachers / name))
    student, cond, step = backbone.roles().student, backbone.encode(PROMPTS[:1]), backbone.size_step()
    height, width = backbone.size_limit()

    def predict(*size):
        with torch.no_grad():
            return student(torch.randn(1, *backbone.latent_shape(size)), torch.ones(1), cond)

    assert bool(torch.isfinite(predict(height, step)).all()) and bool(torch.isfinite(predict(step, width)).all())
    for size in ((height + step, step), (step, width + step)):
        config = Config(size=["x".join(map(str, size))])
        with pytest.raises(UserError, match=f"size: .* up to {height} x {width} pixels, got {size[0]} x {size[1]}"):
            composition.training_grid(backbone, config)
        with mock.patch.object(type(backbone), "size_limit", lambda self: None), pytest.raises((ValueError, IndexError)):
            predict(*size)


@every_family
def test_which_pipelines_hand_their_generator_to_the_scheduler(teachers, name):
    """Of the others a card says that `generator=` alone does not bring a student's picture back."""
    backbone = models.load(str(teachers / name))
    pipe, handed = backbone.pipe, []
    pipe.scheduler = backbone.scheduler(2)

    def step(output, timestep, sample, generator=None, return_dict=True):
        handed.append(generator)
        raise Stop

    generator = torch.Generator()
    with mock.patch.object(pipe.scheduler, "step", step), pytest.raises(Stop):
        pipe(prompt=[*PROMPTS], num_inference_steps=2, generator=generator, **told(backbone) | backbone.student_call)
    assert (handed == [generator]) is backbone.hands_on_generator()


@every_family
def test_random_conditions_are_shaped_as_a_long_prompts(teachers, name):
    backbone = models.load(str(teachers / name))
    _, limit = backbone.longest_text()
    real, random = backbone.encode(["x " * 4 * limit]), backbone.random_conditions(1)
    assert {key: (value.shape, value.dtype) for key, value in random.items()} == {key: (v.shape, v.dtype) for key, v in real.items()}


@every_family
def test_guidance_is_the_stock_pipelines(teachers, name):
    backbone = models.load(str(teachers / name))
    noise, w = noise_of(backbone), 2.5
    output, t, _ = stock_steps(backbone, noise, **backbone.teacher_call(w))[0]
    roles = backbone.roles(guidance=w)
    cond, empty = backbone.encode(PROMPTS), backbone.encode([backbone.empty] * 2)
    with torch.no_grad():
        mine = roles.teacher.network(noise, t.expand(2), cond)
        plain = roles.student.network(noise, t.expand(2), cond)
        if backbone.embedded_guidance is None:
            unconditional = roles.teacher.network(noise, t.expand(2), empty)
            guided = GUIDED.get(name, guide)(backbone.to_pipeline(mine), backbone.to_pipeline(unconditional), w)
            # prompts of different lengths beside one another, as the trainer guides
            x0, u = roles.teacher.pair(noise, torch.full((2,), 0.5), cond)
            torch.testing.assert_close(x0, roles.teacher(noise, torch.full((2,), 0.5), cond), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(u, roles.teacher(noise, torch.full((2,), 0.5), empty), rtol=1e-4, atol=1e-4)
        else:
            guided = backbone.to_pipeline(mine)
    torch.testing.assert_close(guided, output, rtol=1e-3, atol=1e-3)
    assert (guided - backbone.to_pipeline(plain)).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name in PIPELINES | INCOMPLETE if name not in WITHOUT_NEGATIVE])
def test_a_negative_prompt_is_the_stock_pipelines(teachers, name):
    """Of the teacher alone, also where its text was a prompt before; and the pictures of the teacher's call are guided away from it too."""
    backbone = models.load(str(teachers / name))
    noise, w, half = noise_of(backbone), 2.5, torch.full((2,), 0.5)
    cond, _, call = backbone.encode(PROMPTS), backbone.encode([NEGATIVE]), backbone.teacher_call(w, NEGATIVE)
    roles = backbone.roles(guidance=w, negative_prompt=NEGATIVE)
    assert call["negative_prompt"] == NEGATIVE and roles.student.negative is roles.fake.negative is None
    output, t, _ = stock_steps(backbone, noise, **call | {"negative_prompt": [NEGATIVE] * 2})[0]
    away = repeat(roles.teacher.negative, 2)
    with torch.no_grad():
        mine, other = (backbone.to_pipeline(roles.teacher.network(noise, t.expand(2), each)) for each in (cond, away))
        conditional, u = roles.teacher.pair(noise, half, cond)
        torch.testing.assert_close(u, roles.teacher(noise, half, away), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(conditional, roles.teacher(noise, half, cond), rtol=1e-4, atol=1e-4)
        empty = roles.student.pair(noise, half, cond)[1]
    torch.testing.assert_close(GUIDED.get(name, guide)(mine, other, w), output, rtol=1e-3, atol=1e-3)
    assert (stock_steps(backbone, noise, **backbone.teacher_call(w))[0][0] - output).abs().max() > 1e-2 and (u - empty).abs().max() > 1e-2
    drawn = [
        draw(backbone.pipe, [*PROMPTS], noise_generator(0, 0), num_inference_steps=2, **each | told(backbone))[0]
        for each in (call, backbone.teacher_call(w))
    ]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", WITHOUT_NEGATIVE)
def test_a_negative_prompt_that_the_stock_pipeline_does_not_take_is_refused(teachers, name, prompt_file, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match=f"{name} (is part of its network|takes none)"):
        models.load(str(teachers / name)).roles(guidance=2.5, negative_prompt=NEGATIVE)
    monkeypatch.setattr(models, "load", mock.Mock(side_effect=AssertionError("weights were read")))
    command = ["distill", "--teacher", str(teachers / name), "--prompts", str(prompt_file), "--output", str(tmp_path / "out")]
    for more in ([], ["--dry-run"]):
        assert cli.main([*command, "--matching.negative-prompt", NEGATIVE, *more]) == 2
        assert re.search(rf"matching\.negative_prompt: .*{name} .*; leave it out", capsys.readouterr().err)


@every_family
def test_a_prompt_is_encoded_the_same_alone_and_in_company(teachers, name):
    backbone = models.load(str(teachers / name))
    noise, t = noise_of(backbone), torch.full((2,), 0.5)
    student = backbone.roles().student
    with torch.no_grad():
        together = student(noise, t, backbone.encode(PROMPTS))
        alone = torch.cat([student(noise[i : i + 1], t[:1], backbone.encode([PROMPTS[i]])) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@every_family
def test_what_is_cut_is_what_the_text_encoder_does_not_read(teachers, name):
    """To the token; and of a prompt that is too long, what the stock pipeline reads is read."""
    backbone = models.load(str(teachers / name))
    _, limit = backbone.longest_text()
    n = bisect.bisect(range(1, 4 * limit), 0, key=lambda n: len(backbone.cut(["x" * n])))  # letters: a token may hold several

    def differ(one, other):
        one, other = backbone.encode([one]), backbone.encode([other])
        return any(one[key].shape != other[key].shape or bool((one[key] - other[key]).abs().max() > 1e-4) for key in one)

    assert differ("x" * n, "x" * (n - 1) + "y")
    assert not differ("x" * n + "y", "x" * n + "z")
    noise, prompts = noise_of(backbone), ["x" * n, "x" * n + "y"]
    output, t, _ = stock_steps(backbone, noise, prompts, **backbone.student_call)[0]
    with torch.no_grad():
        mine = backbone.roles().student.network(noise, t.expand(2), backbone.encode(prompts))
    torch.testing.assert_close(backbone.to_pipeline(mine), output, rtol=1e-4, atol=1e-4)


def test_prompts_are_looked_through_to_the_last(teachers, monkeypatch):
    """Which are tokenized some at a time."""
    monkeypatch.setattr("fewstep.models.backbone.TOKENIZED", 2)
    backbone, long = models.load(str(teachers / "StableDiffusionPipeline")), "x " * 99
    assert backbone.cut(["a cat", f"a {long}", "a dog", "a hat", f"b {long}"]) == [f"a {long}", f"b {long}"]
    assert backbone.cut([]) == []


@every_family
@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_reach_the_trained_weights_and_no_others(teachers, name, rank):
    backbone = models.load(str(teachers / name))
    roles = backbone.roles(lora_rank=rank, fake_steps=4, guidance=2.5)
    noise, t, cond = noise_of(backbone), torch.full((2,), 0.5), backbone.encode(PROMPTS)
    for role, own in (("student", roles.student_parameters), ("fake", roles.fake_parameters)):
        given = cond | ({"step": torch.tensor([0, 3])} if role == "fake" else {})
        getattr(roles, role)(noise, t, given).square().mean().backward()
        touched = {name for name, p in getattr(roles, role).network.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert touched and touched <= set(own), touched - set(own)
        if role == "fake":
            assert "step_embedding.weight" in touched
        for parameter in own.values():
            parameter.grad = None
    assert not any(p.requires_grad for p in roles.teacher.parameters() if not rank)
    assert not any(p.requires_grad for p in backbone.pipe.vae.parameters())


@every_family
def test_every_adapter_of_a_linear_layer_adds_itself(teachers, name):
    model = models.load(str(teachers / name)).roles(lora_rank=2).student.network.model
    kinds = {type(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    assert AddedLinear in kinds and LoraLinear not in kinds


@every_family
def test_lora_adapts_attention_and_feed_forward_of_every_block(teachers, name):
    """The second attention of SD3.5 medium's first blocks too."""
    model = models.load(str(teachers / name)).roles(lora_rank=2).student.network.model
    parts = [(key, module) for block in repeated_blocks(model) for key, module in block.named_modules() if ".lora_" not in key]
    adapted = [key for key, module in parts if isinstance(module, BaseTunerLayer)]
    plain = [key for key, module in parts if type(module) is torch.nn.Linear and not key.endswith(".base_layer")]
    assert any("attn" in key or "attention" in key for key in adapted)
    assert not [key for key in plain if not any(word in key for word in ("norm", "mod", "adaLN"))]  # those make scales of the time


def moved_student(backbone, rank):
    """Roles whose student has been moved away from the teacher, and its weights."""
    torch.manual_seed(1)
    roles = backbone.roles(lora_rank=rank, guidance=2.5)
    with torch.no_grad():
        for parameter in roles.student_parameters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return roles, {name: p.detach().clone() for name, p in roles.student_parameters.items()}


def training_images(backbone, roles, steps=4):
    """What the student draws in training code, and the noise it drew with."""
    student = Student(roles.student, backbone.schedule(), backbone.times(steps))
    torch.manual_seed(7)
    noises = [torch.randn(2, *backbone.latent_shape(size_of(backbone))) for _ in range(steps)]
    with mock.patch.object(torch, "randn", side_effect=noises[1:]):
        rollout = student.rollout(noises[0], backbone.encode(PROMPTS))
    with torch.no_grad():
        return backbone.decode(rollout.x0[-1]), noises


def stock_noise(backbone, noises):
    """The noise of `training_images` as a stock pipeline is given its first, and as its scheduler draws the rest."""
    return {
        "latents": backbone.to_call(noises[0]).contiguous(),
        "noise": torch.stack([backbone.to_pipeline(noise) for noise in noises])[1:],
    }


def stock_images(pipe, latents, noise, call):
    """The same noise through a stock pipeline: it and its scheduler draw with diffusers' randn_tensor."""
    from diffusers.schedulers import scheduling_flow_match_euler_discrete, scheduling_lcm

    given = list(noise.clone())

    def draw(shape, *args, **kwargs):
        noise = given.pop(0) if given else torch.zeros(shape)  # the last step's noise is multiplied by zero, or not drawn
        assert noise.shape == torch.Size(shape)
        return noise

    modules = (scheduling_flow_match_euler_discrete, scheduling_lcm)
    with mock.patch.object(modules[0], "randn_tensor", draw), mock.patch.object(modules[1], "randn_tensor", draw):
        return pipe(prompt=[*PROMPTS], num_inference_steps=len(noise) + 1, latents=latents, output_type="pt", **call).images


STOCK = """
import json, sys, warnings
sys.modules["fewstep"] = None  # nothing of ours
from unittest import mock
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete, scheduling_lcm
from safetensors.torch import load_file, save_file

warnings.filterwarnings("error", message="The configuration file of")  # "... is outdated": of a scheduler, or a network
images = {}
for folder, lacks, prompts, call in json.loads(sys.argv[1]):
    noises = load_file(folder + "/noise.safetensors")
    pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(lacks))
    pipe.set_progress_bar_config(disable=True)
    given = list(noises["noise"])

    def draw(shape, *args, **kwargs):
        return given.pop(0) if given else torch.zeros(shape)

    steps = len(given) + 1
    flow, lcm = (mock.patch.object(m, "randn_tensor", draw) for m in (scheduling_flow_match_euler_discrete, scheduling_lcm))
    with flow, lcm:
        images[folder] = pipe(prompt=prompts, num_inference_steps=steps, latents=noises["latents"], output_type="pt", **call).images
    images[folder + ".times"] = pipe.scheduler.timesteps.double()
save_file({key: value.contiguous() for key, value in images.items()}, sys.argv[2])
"""


def test_exported_folders_draw_in_a_fresh_process_what_training_drew(teachers, tmp_path):
    """Every family, full weights and merged LoRA: stock diffusers without fewstep, to 1e-4, at exactly the trained times."""
    jobs, expected = [], {}
    for name in PIPELINES | INCOMPLETE:
        for rank in (0, 2):
            backbone = models.load(str(teachers / name))
            roles, weights = moved_student(backbone, rank)
            mine, noises = training_images(backbone, roles)
            folder = tmp_path / f"{name}-{rank}"
            backbone.save(backbone.student_pipeline(roles, weights, 4), folder)
            save_file(stock_noise(backbone, noises), folder / "noise.safetensors")
            with torch.no_grad():
                teacher = backbone.decode(roles.teacher(noises[0], torch.ones(2), backbone.encode(PROMPTS)))
            assert (teacher - mine).abs().max() > 1e-3, name  # the student has moved, so equality says something
            jobs.append((str(folder), backbone.lacks(), PROMPTS, told(backbone) | backbone.student_call))
            expected[str(folder)] = (mine, backbone.schedule().timestep_of(backbone.times(4)))
    fresh.run(STOCK, json.dumps(jobs), str(tmp_path / "images"), printed=tmp_path / "printed")
    images = load_file(tmp_path / "images")
    for folder, (mine, times) in expected.items():
        assert (images[folder] - mine).abs().max() <= 1e-4, folder
        torch.testing.assert_close(images[folder + ".times"], times, rtol=0, atol=1e-4)


# of Stable Diffusion 1.5, as its repository has it
PNDM = PNDMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
X0 = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="trailing", clip_sample=False)


@pytest.mark.parametrize(
    "name, scheduler, steps",
    [
        *((name, None, steps) for name in ("StableDiffusionPipeline", "StableDiffusion3Pipeline") for steps in (1, 8)),
        *(("StableDiffusionPipeline", scheduler, steps) for scheduler in (PNDM, X0) for steps in (1, 4, 8)),
    ],
    ids=lambda value: value.config.prediction_type if isinstance(value, SchedulerMixin) else value,
)
def test_every_prediction_and_grid_is_exported_as_it_was_trained(teachers, name, scheduler, steps, tmp_path):
    """As above for what differs from the families' defaults, in this process: to 1e-4, at exactly the trained times."""
    teacher = models.load(str(teachers / name))
    teacher.pipe.register_modules(scheduler=scheduler or teacher.pipe.scheduler)
    backbone = type(teacher)(teacher.pipe, teacher.source)
    roles, weights = moved_student(backbone, 0)
    mine, noises = training_images(backbone, roles, steps)
    backbone.save(backbone.student_pipeline(roles, weights, steps), tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    images = stock_images(pipe, **stock_noise(backbone, noises), call=told(backbone) | backbone.student_call)
    torch.testing.assert_close(images, mine, rtol=0, atol=1e-4)
    times = backbone.schedule().t_of(pipe.scheduler.timesteps.double())
    assert len(times) == steps and torch.equal(times, backbone.times(steps))
    if not backbone.flow:  # training reads its schedule from the exported scheduler: that one must have the teacher's
        torch.testing.assert_close(pipe.scheduler.alphas_cumprod, teacher.pipe.scheduler.alphas_cumprod)
    with torch.no_grad():
        started = backbone.decode(roles.teacher(noises[0], times[0].float().expand(2), backbone.encode(PROMPTS)))
    assert (started - mine).abs().max() > 1e-3  # the student has moved, so equality says something


@every_family
def test_a_lora_file_gives_the_same_student_on_the_teacher(teachers, name, tmp_path):
    backbone = models.load(str(teachers / name))
    roles, weights = moved_student(backbone, 2)
    if not backbone.saves_lora():
        with pytest.raises(ValueError, match="no LoRA loader"):
            backbone.save_lora(weights, tmp_path, rank=2)
        return
    backbone.save_lora(weights, tmp_path, rank=2)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    written = {key.removeprefix(f"{backbone.part}."): value for key, value in adapter.items()}
    assert (written["r"], written["lora_alpha"]) == (2, 2)
    assert set(written["target_modules"]) == set(backbone.lora_config(2).target_modules)
    mine, noises = training_images(backbone, roles)
    teacher = models.load(str(teachers / name))
    pipe = teacher.pipe
    pipe.scheduler = teacher.scheduler(4)
    with mock.patch("diffusers.loaders.peft.logger.warning") as missing:
        pipe.load_lora_weights(tmp_path)
    assert not missing.called, missing.call_args  # no missing or unexpected key
    images = stock_images(pipe, **stock_noise(backbone, noises), call=told(backbone) | backbone.student_call)
    torch.testing.assert_close(images, mine, rtol=0, atol=1e-4)


SMALL = ["--updates", "2", "--groups", "2", "--group-size", "2", "--fake.updates", "1", "--save-every", "1", "--sample-every", "0",
         "--evaluate", "false", "--precision", "fp32", "--device", "cpu", "--lora-rank", "0", "--memory.micro-groups", "0",
         "--memory.checkpointing", "false"]  # fmt: skip


def gone_on_with(straight, resumed, monkeypatch):
    """The averaged weights after the first update and after the second of a run of two, and of that run gone on with from its first.

    Which is as a run stopped there leaves its folder; its pictures and its export are not made.
    """
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(straight / "config.yaml", resumed)
    shutil.copytree(straight / "checkpoints" / "step-00000001", resumed / "checkpoints" / "step-00000001")
    with monkeypatch.context() as unfinished:
        unfinished.setattr("fewstep.run.finish", lambda *told: None)
        assert cli.main(["distill", "--output", str(resumed), "--resume"]) == 0
    steps = ((resumed, 1), (straight, 2), (resumed, 2))
    return [checkpoint.load(folder / "checkpoints" / f"step-{step:08d}")["ema"]["shadow_params"] for folder, step in steps]


# of networks that differ in what an update of full weights meets: a UNet, a learned variance, several text encoders, a list of pictures
FULL = ["StableDiffusionPipeline", "PixArtSigmaPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"]


@pytest.mark.usefixtures("small_grid")
@pytest.mark.parametrize("name", FULL)
def test_distil_and_resume(teachers, name, prompt_file, tmp_path, capsys, monkeypatch):
    """Two updates of full weights and their export through the command line; the same run gone on with after one has the same weights.

    The code on the student's card draws a picture of the size that was trained at. Every family does so by LoRA below.
    """
    backbone = models.load(str(teachers / name))
    part, (height, width) = backbone.part, size_of(backbone)
    options = ["--teacher", str(teachers / name), "--prompts", str(prompt_file), *SMALL, "--size", f"[{height}x{width}]", "--steps", "2"]
    assert cli.main(["distill", *options, "--output", str(tmp_path / "straight")]) == 0, capsys.readouterr().err
    first, straight, resumed = gone_on_with(tmp_path / "straight", tmp_path / "resumed", monkeypatch)
    assert all(torch.equal(*pair) for pair in zip(straight, resumed, strict=True))
    assert any(not torch.equal(*pair) for pair in zip(first, straight, strict=True))
    weights, before = (
        {key: value for path in (folder / part).glob("*.safetensors") for key, value in load_file(path).items()}
        for folder in (tmp_path / "straight", teachers / name)
    )
    assert any(not torch.equal(weights[key], before[key]) for key in before)
    assert (tmp_path / "straight" / "samples.png").is_file()
    snippet = (tmp_path / "straight" / "README.md").read_text().split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)  # it names the folder
    drawn = {}
    exec(snippet, drawn)
    assert drawn["image"].size == (width, height)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_a_student_is_distilled_further_and_measured_beside_its_teacher(teachers, name, prompt_file, tmp_path, capsys, monkeypatch):
    """Its teacher, of four steps, is drawn at those, without guidance: it knows no other timesteps and no empty prompt."""
    monkeypatch.setattr("fewstep.run.SAMPLES_PER_PROMPT", 1)
    first, titles, calls = models.load(str(teachers / name)), [], []
    roles = first.roles()
    weights = {key: value.detach() for key, value in roles.student_parameters.items()}
    first.save(first.student_pipeline(roles, weights, 4), tmp_path / "four")
    size = "x".join(map(str, size_of(first)))

    def grid(pipe, prompts, **told):
        pipe.scheduler.set_timesteps(told["steps"])
        calls.append((pipe.scheduler.timesteps.tolist(), told["call"]["guidance_scale"]))
        return sample_grid(pipe, prompts, **told)

    monkeypatch.setattr(run, "sample_grid", grid)
    monkeypatch.setattr("fewstep.report.grid.save", lambda columns, *rest: titles.extend(columns) or save(columns, *rest))
    options = ["--teacher", str(tmp_path / "four"), "--prompts", str(prompt_file), *SMALL, "--size", f"[{size}]", "--steps", "2"]
    assert cli.main(["distill", *options, "--output", str(tmp_path / "two")]) == 0, capsys.readouterr().err
    assert titles == ["teacher, 4 steps", "student, 2 steps"] and (tmp_path / "two" / "samples.png").is_file()
    assert calls[0] == (first.scheduler(4).timesteps.tolist(), 1.0) and "samples.png" in (tmp_path / "two" / "README.md").read_text()
    (tmp_path / "judge.py").write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    measure = ["evaluate", str(tmp_path / "two"), "--prompts", str(prompt_file), "--judge.bright", f"{tmp_path / 'judge.py'}:bright"]
    assert cli.main([*measure, "--output", str(tmp_path / "report.json")]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == titles[::-1] and report["best_solver"] is None
    assert [row["metrics"]["network_evaluations"]["value"] for row in report["rows"]] == [2, 4]
    assert report["protocol"]["teacher"]["steps"] == 4 and report["protocol"]["teacher"]["call"] == first.student_call | told(first)
    for flag, value in (("--teacher-steps", "28"), ("--guidance", "3"), ("--negative-prompt", "blurry")):
        assert cli.main([*measure, flag, value]) == 2
        assert f"{flag}: {tmp_path / 'four'} is itself a student of 4 steps" in capsys.readouterr().err


@every_family
def test_a_teacher_is_drawn_in_one_step_where_its_scheduler_has_a_time_for_it(teachers, name):
    backbone = models.load(str(teachers / name))
    call = backbone.student_call | told(backbone) | {"num_inference_steps": 1, "output_type": "latent"}
    with np.errstate(invalid="ignore"):
        drawn = backbone.pipe(prompt=["a cat"], **call).images
    assert bool(torch.isfinite(torch.as_tensor(drawn)).all()) is draws_in(backbone.pipe.scheduler.config, 1)


@pytest.mark.usefixtures("small_grid")
def test_a_one_step_student_is_shown_and_measured_where_its_teacher_has_no_single_step(teachers, prompt_file, tmp_path, capsys):
    options = ["--teacher", str(teachers / "QwenImagePipeline"), "--prompts", str(prompt_file), *SMALL, "--size", "[8x16]", "--steps", "1"]
    assert cli.main(["distill", *options, "--output", str(tmp_path / "one")]) == 0, capsys.readouterr().err
    assert (tmp_path / "one" / "samples.png").is_file()
    assert "samples.png shows no teacher at 1 step: its scheduler has no time for a single one" in capsys.readouterr().out
    (tmp_path / "judge.py").write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    measure = ["evaluate", str(tmp_path / "one"), "--prompts", str(prompt_file), "--judge.bright", f"{tmp_path / 'judge.py'}:bright"]
    assert cli.main([*measure, "--teacher-steps", "2", "--output", str(tmp_path / "report.json")]) == 0, capsys.readouterr().err
    assert "the teacher has no row at 1 step: its scheduler" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["student, 1 steps", "teacher, 2 steps"]
    assert cli.main([*measure, "--teacher-steps", "1", "--output", str(tmp_path / "one.json")]) == 2
    assert "the teacher is not drawn at 1: its scheduler has no time for a single one (shift_terminal); give 2" in capsys.readouterr().err


def test_a_run_keeps_the_device_that_it_was_asked_for(teachers, prompt_file, tmp_path, monkeypatch):
    """It may go on on a machine where auto is another."""
    monkeypatch.setattr(run, "train", lambda *args: False)
    options = ["--teacher", str(teachers / "StableDiffusionPipeline"), "--prompts", str(prompt_file), *SMALL, "--size", "[8x16]"]
    assert cli.main(["distill", *options, "--device", "auto", "--output", str(tmp_path)]) == 130
    kept = flags.saved_config(tmp_path)
    assert kept.device == "auto" and "auto" not in (kept.precision, kept.memory.frozen)


def test_a_student_whose_pictures_fail_has_its_card(teachers, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "sample_grid", mock.Mock(side_effect=Stop))
    options = ["--teacher", str(teachers / "StableDiffusionPipeline"), "--prompts", str(prompt_file), *SMALL, "--size", "[8x16]"]
    with pytest.raises(Stop):
        cli.main(["distill", *options, "--output", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Use" in card and "samples.png" not in card


def as_the_recipes_train(teacher, prompts, size, output):
    """Arguments of a run in what every family's recipe and a GPU choose, but for its length."""
    return ["distill", "--teacher", str(teacher), "--prompts", str(prompts), "--size", f"[{size[0]}x{size[1]}]", "--output", str(output),
            "--steps", "2", "--updates", "2", "--groups", "1", "--group-size", "2", "--fake.updates", "1", "--save-every", "1",
            "--sample-every", "0", "--evaluate", "false", "--device", "cpu", "--precision", "bf16", "--memory.frozen", "bf16",
            "--memory.micro-groups", "1", "--memory.checkpointing", "true", "--lora-rank", "2"]  # fmt: skip


def drawn_by_card(folder, teacher):
    """The picture that the code on a folder's card draws, from beside the folder."""
    code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    drawn = {}
    exec(code.replace(f'"path/to/{teacher.name}"', repr(str(teacher))), drawn)
    return drawn["image"]


@every_family
def test_a_student_in_bf16_resumes_and_is_drawn_by_its_cards_lines(teachers, name, prompt_file, tmp_path, capsys, monkeypatch):
    """A run as the recipes and a GPU make it: to the bit when resumed, and its folder, its LoRA on the teacher, and fewstep.load draw."""
    import fewstep

    monkeypatch.setattr("fewstep.run.teacher_grids", lambda *told: {})  # a small samples.png
    monkeypatch.setattr("fewstep.run.SAMPLES_PER_PROMPT", 1)
    monkeypatch.setattr("fewstep.run.grid_prompts", lambda config, prompts: prompts[:1])
    monkeypatch.chdir(tmp_path)  # cards name the folder
    teacher, backbone = teachers / name, models.load(str(teachers / name))
    size = size_of(backbone)
    assert cli.main(as_the_recipes_train(teacher, prompt_file, size, "straight")) == 0, capsys.readouterr().err
    first, straight, resumed = gone_on_with(tmp_path / "straight", tmp_path / "resumed", monkeypatch)
    assert all(torch.equal(*pair) for pair in zip(straight, resumed, strict=True))
    assert any(not torch.equal(*pair) for pair in zip(first, straight, strict=True))
    assert {value.dtype for value in load_file(next((tmp_path / "straight" / backbone.part).glob("*.safetensors"))).values()} == {
        torch.bfloat16
    }
    assert drawn_by_card(tmp_path / "straight", teacher).size == size[::-1]
    pipe = fewstep.load("straight")
    assert models.stored_dtype(tmp_path / "straight") == getattr(pipe, backbone.part).dtype == torch.bfloat16
    images = pipe(prompt="a cat", num_inference_steps=2, output_type="pt", **told(backbone) | backbone.student_call).images
    assert bool(torch.isfinite(images).all())
    if backbone.saves_lora():
        assert cli.main(["export", "straight", "--to", "lora", "--output", "lora"]) == 0, capsys.readouterr().err
        assert drawn_by_card(tmp_path / "lora", teacher).size == size[::-1]


def test_eight_bits_of_a_teacher_are_computed_with_in_the_format_of_autocast(teachers):
    """As its exact layers are, which get float32 from time embeddings and, on a GPU, from norms; on a CPU a UNet's norms refuse the mix."""
    formats, found = [], []
    for int8 in (False, True):
        backbone = models.load(str(teachers / "StableDiffusionXLPipeline"), dtype=torch.bfloat16)
        teacher = backbone.roles(int8_teacher=int8).teacher
        for layer in teacher.network.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda layer, args, output: formats.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found.append(teacher.predict(noise_of(backbone), torch.full((2,), 0.5), backbone.encode(PROMPTS)).float())
    assert {*formats} == {torch.bfloat16}
    assert 0 < (found[0] - found[1]).abs().mean() < 0.1 * found[0].std()


@every_family
def test_recomputed_activations_give_the_gradient(teachers, name):
    """Where a family's decoder cannot compute its own again, the networks still do."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = models.load(str(teachers / name))
        roles = backbone.roles(lora_rank=2, checkpointing=checkpointing)
        channels, height, width = backbone.latent_shape(size_of(backbone))
        xt = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))
        t, cond = backbone.times(4)[[1, 2]].float(), backbone.encode(["a cat", "a dog"])
        roles.student.predict(xt, t, cond).square().mean().backward()
        # the last block's text comes to no output, so in some families its layers get none
        gradients.append({key: p.grad for key, p in roles.student_parameters.items() if p.grad is not None})
        assert any(getattr(m, "gradient_checkpointing", False) for m in backbone.model.modules()) is checkpointing
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and any(bool(grad.any()) for grad in plain.values())
    assert all(torch.equal(grad, recomputed[key]) for key, grad in plain.items())


@every_family
def test_the_repeated_blocks_are_what_is_compiled(teachers, name, monkeypatch):
    """Most of the network, no part of it twice; diffusers names no blocks of SD3, Sana and PixArt."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    model = models.load(str(teachers / name)).roles(lora_rank=2, compiled=True).student.network.model
    inside = [part for block in compiled for part in block.modules()]
    assert len(compiled) > 1 and len(inside) == len(set(inside)) and set(inside) < set(model.modules())
    layers = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert len(set(layers) & set(inside)) > 0.6 * len(layers)


def test_grids_are_decoded_a_picture_at_a_time(teachers):
    backbone = models.load(str(teachers / "StableDiffusionPipeline"))
    roles, seen = backbone.roles(lora_rank=2), []
    backbone.pipe.vae.decoder.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with backbone.drawing(roles.student, backbone.scheduler(2)) as pipe:
        pipe(["a cat"] * 3, num_inference_steps=2, **backbone.student_call | backbone.told_size())
    assert seen == [1, 1, 1]
    backbone.decode(torch.zeros(3, *backbone.latent_shape()))
    assert seen[3:] == [3]  # training decodes its batch at once, as before


def test_weights_in_fp16_alone_are_read(teachers, tmp_path):
    """`*.fp16.safetensors`, as many repositories have them; the part that is missing among those is named."""
    name = "StableDiffusionXLPipeline"
    pipe = models.load(str(teachers / name)).pipe.to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    assert not [path for path in tmp_path.rglob("*.safetensors") if ".fp16." not in path.name]
    with pytest.warns(UserWarning, match="so vae, text_encoder, text_encoder_2, unet were read from those in fp16"):
        backbone = models.load(str(tmp_path))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        mine, halves = (dict(getattr(each, part).named_parameters()) for each in (backbone.pipe, pipe))
        assert mine.keys() == halves.keys() and all(torch.equal(mine[key], halves[key].float()) for key in mine)
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(models.UnsupportedTeacher, match=r"no file named diffusion_pytorch_model\.safetensors .*unet"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("variant, plain", [("fp16", ["text_encoder"]), ("bf16", ["vae"])])
def test_parts_in_fewer_bits_alone_are_read_beside_others(teachers, tmp_path, variant, plain):
    """As diffusers reads them with `variant=`; of a part that has plain files alone those are read, and asked about."""
    name = "StableDiffusionXLPipeline"
    pipe = models.load(str(teachers / name)).pipe.to(torch.float16 if variant == "fp16" else torch.bfloat16)
    pipe.save_pretrained(tmp_path, variant=variant)
    for part in plain:
        (path,) = (tmp_path / part).glob("*.safetensors")
        path.rename(path.with_name(path.name.replace(f".{variant}", "")))
    with pytest.warns(UserWarning, match=f"unet were read from those in {variant}") as said:
        backbone = models.load(str(tmp_path))
    taken = str(said[0].message).removeprefix(f"{tmp_path}: ").split(" were read")[0].split("so ")[1].split(", ")
    assert {"unet", "vae", "text_encoder", "text_encoder_2"} == {*taken, *plain} and not {*taken} & {*plain}
    assert all(torch.equal(p, pipe.unet.get_parameter(key).float()) for key, p in backbone.pipe.unet.named_parameters())
    (path,) = (tmp_path / "text_encoder").glob("*.safetensors")
    held = load_file(path)
    save_file({key: held[key] for key in held if "final_layer_norm" not in key}, path, metadata={"format": "pt"})
    with pytest.raises(models.UnsupportedTeacher, match="the files of its text_encoder lack 2"), pytest.warns(UserWarning):
        models.load(str(tmp_path))


def test_pickles_are_refused_with_what_to_do(teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (path,) = (folder / "unet").glob("*.safetensors")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"beside safetensors")
    weights = path.read_bytes()
    path.unlink()
    with pytest.raises(models.UnsupportedTeacher, match=r"no file named .*unet\.\)$"):
        models.load(str(folder))
    path.with_suffix(".bin").write_bytes(weights)
    with pytest.raises(models.UnsupportedTeacher, match=r"no file named .*unet\.\); weights in pickles \(\.bin\).*safe_serialization=True"):
        models.load(str(folder))


@pytest.mark.parametrize(
    "name, part, key",
    [
        ("StableDiffusionPipeline", "unet", "conv_in.weight"),
        ("StableDiffusionPipeline", "vae", "decoder.conv_in.weight"),
        ("StableDiffusionPipeline", "text_encoder", "embeddings.token_embedding.weight"),
        ("FluxPipeline", "text_encoder_2", "encoder.final_layer_norm.weight"),
    ],
)
def test_a_weight_that_is_not_in_the_files_is_not_made_up(teachers, name, part, key, tmp_path):
    """transformers draws it at random, diffusers leaves it out, and a name that is another in the installed version is one of those."""
    folder = tmp_path / "teacher"
    PIPELINES[name]().save_pretrained(folder, safe_serialization=True)
    (path,) = (folder / part).glob("*.safetensors")
    held = load_file(path)
    for changed in ({"renamed." + key: held[key]}, {}):
        save_file({other: held[other] for other in held if other != key} | changed, path, metadata={"format": "pt"})
        for opens in (models.load, models.stock_pipeline):
            with pytest.raises(models.UnsupportedTeacher, match=rf"the files of its {part} lack 1 of its weights, the first {key}: "):
                opens(str(folder))


def test_a_students_tokenizers_are_its_teachers_files(teachers, tmp_path):
    """transformers 5 writes them without what transformers 4 reads, and under other names."""
    folder = shutil.copytree(teachers / "FluxPipeline", tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]  # as published
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "tokenizer_2" / "spiece.model").write_bytes(b"as published too")
    (folder / "tokenizer_2" / "code.bin").write_bytes(b"a pickle")
    backbone = models.load(str(folder))
    backbone.encode(["a cat"])  # a tokenizer that was used would save its last padding
    roles, student = backbone.roles(lora_rank=2), tmp_path / "student"
    for _ in range(2):  # the second time over the first
        backbone.save(backbone.student_pipeline(roles, roles.student_parameters, 2), student)
    assert json.loads((student / "model_index.json").read_text())["tokenizer_2"] == index["tokenizer_2"]
    for name in ("tokenizer", "tokenizer_2"):
        given, saved = ({path.name: path.read_bytes() for path in (of / name).iterdir()} for of in (folder, student))
        assert given.pop("code.bin", b"a pickle") == b"a pickle" and saved == given and "tokenizer.json" in saved
    stock = models.stock_pipeline(student)
    assert stock.tokenizer_2("a cat").input_ids == backbone.pipe.tokenizer_2("a cat").input_ids
    again = models.load(str(student))
    again.save(again.pipe, student)  # into the folder that it was read from
    assert (student / "tokenizer_2" / "spiece.model").read_bytes() == b"as published too"


def test_a_part_is_written_over_where_its_folder_cannot_be_removed(teachers, tmp_path, monkeypatch):
    """As on Windows, where another program stands in it; nor can a read-only file be removed there, so that none is made."""
    folder, student = shutil.copytree(teachers / "StableDiffusionPipeline", tmp_path / "teacher"), tmp_path / "student"
    for path in (folder / "tokenizer").iterdir():
        path.chmod(0o444)
    backbone = models.load(str(folder))
    backbone.save(backbone.pipe, student)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    backbone.save(backbone.pipe, student)
    for path in (student / "tokenizer").iterdir():
        assert path.stat().st_mode & 0o200 and path.read_bytes() == (folder / "tokenizer" / path.name).read_bytes()
    assert models.load(str(student)).pipe.tokenizer("a cat").input_ids


@pytest.mark.parametrize("at", ["shutil.copytree", "fewstep.models.backbone.replace_text"])
def test_a_save_that_fails_leaves_the_index_of_the_student_before(teachers, tmp_path, monkeypatch, at):
    backbone, student = models.load(str(teachers / "StableDiffusionPipeline")), tmp_path / "student"
    backbone.save(backbone.pipe, student)
    before = (student / "model_index.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(at, full)
    with pytest.raises(OSError, match="No space"):
        backbone.save(backbone.pipe, student)
    assert (student / "model_index.json").read_bytes() == before and b'"tokenizer"' in before


@pytest.mark.parametrize("bits", [8, 4])
def test_a_text_encoder_that_lies_in_few_bits_goes_with_the_student_as_it_is(bits, tmp_path):
    """transformers cannot write it again; and a check that reads no values may not unpack four bits, which bitsandbytes itself packs anew
    on a processor with bf16, whole blocks of 64."""
    from pipelines import flux
    from transformers import BitsAndBytesConfig, T5EncoderModel

    folder = tmp_path / "teacher"
    flux.pipeline(t5_width=64).save_pretrained(folder, safe_serialization=True)
    part = folder / "text_encoder_2"
    packed = T5EncoderModel.from_pretrained(part, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    packed.save_pretrained(part, safe_serialization=True)
    backbone = models.load(str(folder))
    roles = backbone.roles(lora_rank=2)
    backbone.save(backbone.student_pipeline(roles, roles.student_parameters, 2), tmp_path / "student")
    stock = models.stock_pipeline(tmp_path / "student")
    teacher = models.stock_pipeline(folder)
    weights = [pipe.text_encoder_2.state_dict() for pipe in (teacher, stock)]
    assert any(value.dtype in (torch.int8, torch.uint8) for value in weights[0].values()) and weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    embedded = [pipe.encode_prompt("a cat", None, max_sequence_length=64)[0] for pipe in (teacher, stock)]
    torch.testing.assert_close(*embedded, rtol=0, atol=1e-4)
    (file,) = part.glob("*.safetensors")
    held = load_file(file)
    save_file({key: held[key] for key in held if key != "encoder.final_layer_norm.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(models.UnsupportedTeacher, match=r"text_encoder_2 lack 1 of its weights, the first encoder\.final_layer_norm"):
        models.load(str(folder))


def test_a_network_that_lies_in_few_bits_is_no_teacher(teachers, tmp_path):
    from diffusers import FluxTransformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    folder = shutil.copytree(teachers / "FluxPipeline", tmp_path / "teacher")
    part, config = folder / "transformer", TorchAoConfig(Int8WeightOnlyConfig(version=2))
    network = FluxTransformer2DModel.from_pretrained(part, quantization_config=config)
    shutil.rmtree(part)
    network.save_pretrained(part, safe_serialization=True)
    for opens in (models.load, lambda source: needs.skeleton(source, torch.float32)):
        with pytest.raises(models.UnsupportedTeacher, match=r"its transformer is stored in fewer bits \(torchao\)"):
            opens(str(folder))


def test_a_folder_that_is_written_again_in_fewer_files_opens(teachers, tmp_path):
    """As that of a run which goes on in another number format; the index of the many is gone."""
    backbone = models.load(str(teachers / "FluxPipeline"))
    network = type(backbone.pipe.transformer)
    for size, files in (("50KB", 3), ("10GB", 1)):
        sized = functools.partialmethod(network.save_pretrained, max_shard_size=size)
        with mock.patch.object(network, "save_pretrained", sized):
            backbone.save(backbone.pipe, tmp_path)
        assert len(list((tmp_path / "transformer").glob("*.safetensors"))) == files
        again = models.stock_pipeline(tmp_path).transformer.state_dict()
        assert all(torch.equal(again[key], value) for key, value in backbone.pipe.transformer.state_dict().items())


def test_a_teacher_with_a_lora_merged_in_is_a_teacher(teachers, tmp_path):
    """Distil my LoRA: fused and saved by stock diffusers, it is read as any folder, and is not the base."""
    from diffusers import DiffusionPipeline

    name = "StableDiffusionPipeline"
    base = models.load(str(teachers / name))
    roles, weights = moved_student(base, 2)
    base.save_lora(weights, tmp_path / "lora", rank=2)
    pipe = DiffusionPipeline.from_pretrained(teachers / name)
    pipe.load_lora_weights(tmp_path / "lora")
    for step in (lambda: None, pipe.fuse_lora):
        step()
        pipe.save_pretrained(tmp_path / "beside", safe_serialization=True)
        with pytest.raises(models.UnsupportedTeacher, match=r"unet lack .*: a LoRA was saved beside them and not merged in; load the base"):
            models.load(str(tmp_path / "beside"))
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "merged", safe_serialization=True)
    merged = models.load(str(tmp_path / "merged"))
    noise, t, cond = noise_of(base), torch.full((2,), 0.5), base.encode(PROMPTS)
    with torch.no_grad():
        teacher, student = merged.roles().teacher(noise, t, cond), roles.student(noise, t, cond)
        torch.testing.assert_close(teacher, student, rtol=0, atol=1e-4)
        assert (teacher - roles.teacher(noise, t, cond)).abs().max() > 1e-2


# SDXL on EDM's noise levels, as Playground v2.5 is, and on a flow's: the default betas of LCM are neither
@pytest.mark.parametrize("kind", [EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_without_betas_is_refused(teachers, tmp_path, kind):
    pipe = models.load(str(teachers / "StableDiffusionXLPipeline")).pipe
    pipe.scheduler = kind()
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    for opened in (models.load, lambda source: needs.skeleton(source, torch.float32)):
        with pytest.raises(models.UnsupportedTeacher, match=f"{kind.__name__} has no betas.*supported are"):
            opened(str(tmp_path))
    pipe.scheduler = DDIMScheduler(trained_betas=[0.01] * 1000)
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    assert models.load(str(tmp_path)).times(4).tolist() == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    "scheduler, words",
    [
        (DDPMScheduler(beta_schedule="sigmoid"), r"beta_schedule 'sigmoid' .* supported are linear"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "without any signal .*epsilon"),
        (DDIMScheduler(trained_betas=[0.01] * 999 + [1.0]), "without any signal .*epsilon"),
    ],
    ids=["sigmoid", "zero SNR", "trained betas"],
)
def test_noise_levels_that_no_student_can_have_are_refused(teachers, tmp_path, scheduler, words):
    pipe = models.load(str(teachers / "StableDiffusionPipeline")).pipe
    pipe.scheduler = scheduler
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    for opened in (models.load, lambda source: needs.skeleton(source, torch.float32)):
        with pytest.raises(models.UnsupportedTeacher, match=words):
            opened(str(tmp_path))


# as SD-Turbo, SDXL-Turbo and Lightning, LCM, Hyper-SD and a student come; and as the models that these were made from do
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = [
    ("StableDiffusionPipeline", EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"), "EulerDiscreteScheduler in trailing steps"),
    (
        "StableDiffusionXLPipeline",
        EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
        "EulerAncestralDiscreteScheduler in trailing steps",
    ),
    ("StableDiffusionPipeline", LCMScheduler(**BETAS), "LCMScheduler"),
    ("StableDiffusionPipeline", TCDScheduler(**BETAS), "TCDScheduler"),
    ("StableDiffusion3Pipeline", FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "FlowMatchEulerDiscreteScheduler"),
    ("StableDiffusionXLPipeline", EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"), None),
    ("StableDiffusionPipeline", DDIMScheduler(**BETAS, timestep_spacing="trailing"), None),
    (
        "StableDiffusionPipeline",
        EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True),
        None,
    ),
    ("StableDiffusion3Pipeline", FlowMatchEulerDiscreteScheduler(shift=3.0), None),
]


def test_a_scheduler_says_for_how_many_steps_a_student_was_made():
    """A latent consistency model's says nothing of it: LCM's own fifty are those of which any number is taken."""
    flow, ddpm = FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler(**BETAS)
    for steps in (1, 2, 4, 8):
        for scheduler in (flow_scheduler(dict(flow.config), steps), lcm_scheduler(dict(ddpm.config), steps)):
            assert models.steps_in(scheduler.config) == steps
    others = LCMScheduler(**BETAS), LCMScheduler(**BETAS, timestep_spacing="trailing"), DDIMScheduler(**BETAS, timestep_spacing="trailing")
    assert {models.steps_in(scheduler.config) for scheduler in (flow, ddpm, *others)} == {None}


@pytest.mark.parametrize("name, scheduler, words", SCHEDULERS)
def test_a_teacher_that_looks_distilled_to_few_steps_is_said_to_be_guided(teachers, capsys, name, scheduler, words):
    pipe = needs.skeleton(str(teachers / name), torch.float32).pipe
    pipe.register_modules(scheduler=scheduler)
    backbone = models.family(str(teachers / name))(pipe, "here", device="meta")
    scales = {4.0: "guidance 4:", 1.0: None} | ({(4.0, 8.0): "guidance from 4 to 8:"} if backbone.scale_input else {})
    for guidance, told in scales.items():
        config = Config(teacher="here", matching=MatchingConfig(guidance=guidance))
        times, _ = composition.training_grid(backbone, config)
        composition.say_what_looks_wrong(backbone, config, times)
        said = capsys.readouterr().out
        assert (f"its scheduler, {words}, is one of" in said and told in said) if told and words else said == ""


@pytest.mark.parametrize(
    "name, precision, share",
    [("PixArtSigmaPipeline", "bf16", 0.27), ("PixArtSigmaPipeline", "fp32", None), ("StableDiffusionXLPipeline", "bf16", None),
     ("SanaPipeline", "bf16", None)],
)  # fmt: skip
def test_a_first_step_that_bf16_is_too_coarse_for_is_told_of(teachers, capsys, name, precision, share):
    """By as much as it is: a network that is right but for its rounding, at the first time of a student."""
    backbone = needs.skeleton(str(teachers / name), torch.float32)
    config = Config(precision=precision, matching=MatchingConfig(guidance=1.0))
    times, _ = composition.training_grid(backbone, config)
    composition.say_what_looks_wrong(backbone, config, times)
    said = capsys.readouterr().out
    assert (f"an error of {share} of a latent" in said and "--precision fp32" in said) if share else said == ""
    if share:
        x0, eps = torch.randn(2, 64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        alpha, sigma = (of(times[:1]).float() for of in (backbone.schedule().alpha, backbone.schedule().sigma))
        xt = alpha * x0 + sigma * eps
        rounded = to_x0(eps.bfloat16().float(), xt, alpha, sigma, "epsilon")
        assert float((rounded - x0).std()) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_network_that_is_told_the_guidance_scale_is_refused(teachers, tmp_path, name):
    """A latent consistency model's, whose stock pipeline hands it an embedding of the scale."""
    pipe = models.load(str(teachers / name)).pipe
    pipe.register_modules(unet=UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8))
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    for opened in (models.load, lambda source: needs.skeleton(source, torch.float32)):
        with pytest.raises(ValueError, match=r"is told the guidance scale \(time_cond_proj_dim\)"):
            opened(str(tmp_path)).check_guidance(1.0)


@pytest.mark.parametrize(
    "name, parts",
    [
        ("StableDiffusionPipeline", ["vae"]),
        ("StableDiffusionXLPipeline", ["text_encoder_2", "tokenizer_2"]),
        ("StableDiffusionXLPipeline", ["tokenizer"]),
        ("StableDiffusion3Pipeline", ["text_encoder", "tokenizer"]),
        ("StableDiffusion3Pipeline", ["tokenizer_3"]),
    ],
)
def test_a_teacher_without_a_part_that_it_needs_is_refused(teachers, tmp_path, name, parts):
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(teachers / name, teacher)
    index = teacher / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: [None, None] for part in parts}))
    for opened in (models.load, lambda source: needs.skeleton(source, torch.float32)):
        with pytest.raises(models.UnsupportedTeacher, match=f"has null for {', '.join(parts)}, and no student"):
            opened(str(teacher))


@pytest.mark.parametrize(
    "name, parts",
    [
        ("StableDiffusionPipeline", ["unet", "vae"]),
        ("StableDiffusionPipeline", ["scheduler"]),
        ("StableDiffusion3Pipeline", ["text_encoder_3"]),  # null there says that it is missing on purpose
    ],
)
def test_a_teacher_whose_index_has_no_entry_for_a_part_is_refused(teachers, tmp_path, name, parts):
    teacher = tmp_path / "teacher"
    shutil.copytree(teachers / name, teacher)
    index = teacher / "model_index.json"
    held = json.loads(index.read_text())
    index.write_text(json.dumps({key: value for key, value in held.items() if key not in parts}))
    for opened in (models.load, lambda source: needs.skeleton(source, torch.float32)):
        with pytest.raises(models.UnsupportedTeacher, match=f"{index.name} has no entry for {', '.join(parts)}, and no student"):
            opened(str(teacher))
    # what diffusers does without may be left out too
    index.write_text(json.dumps({key: value for key, value in held.items() if key != "feature_extractor"}))
    assert "feature_extractor" in held and needs.skeleton(str(teacher), torch.float32).pipe.feature_extractor is None


def test_the_hub_is_asked_once_for_an_index(teachers):
    index = str(teachers / "StableDiffusion3Pipeline" / "model_index.json")
    with mock.patch("huggingface_hub.hf_hub_download", return_value=index) as download:
        assert {models.pipeline_class("an-owner/asked-once") for _ in range(3)} == {"StableDiffusion3Pipeline"}
        assert models.family("an-owner/asked-once").absent(models.index_of("an-owner/asked-once"), "") == []
    assert download.call_count == 1


def test_conditions_without_t5_are_kept_by_the_width_that_the_network_reads(teachers):
    backbone = models.load(str(teachers / "StableDiffusion3Pipeline-without-T5"))
    before = embeddings.fingerprint(backbone.text_fingerprint())
    assert backbone.encode(["a cat"])["prompt_embeds"][:, 16:].count_nonzero() == 0
    backbone.model.register_to_config(joint_attention_dim=64)
    assert embeddings.fingerprint(backbone.text_fingerprint()) != before


@every_family
def test_pictures_become_the_latents_that_are_decoded(teachers, name):
    """The autoencoder encodes what the stock pipeline's own preprocessing makes of pictures, and is given back what it made of them."""
    backbone = models.load(str(teachers / name))
    size = (backbone.size_step(), 2 * backbone.size_step())
    pictures, vae = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)), backbone.pipe.vae
    with mock.patch.object(vae, "encode", wraps=vae.encode) as encode, mock.patch.object(vae, "decode", wraps=vae.decode) as decode:
        latents = backbone.encode_pictures(pictures, torch.Generator().manual_seed(1))
        backbone.decode(latents)
        (seen,), (given,) = encode.call_args.args, decode.call_args.args
        found = vae.encode(seen)
        encoded = found.latent if "latent" in found else found.latent_dist.sample(torch.Generator().manual_seed(1))
    assert latents.shape == (2, *backbone.latent_shape(size)) and not latents.requires_grad
    torch.testing.assert_close(seen.view_as(pictures), backbone.pipe.image_processor.preprocess(pictures), rtol=0, atol=1e-6)
    torch.testing.assert_close(given, encoded, rtol=0, atol=1e-5)


@every_family
def test_an_autoencoder_of_nan_is_seen_before_the_training(teachers, name):
    backbone = models.load(str(teachers / name))
    backbone.check_decoder()
    with torch.no_grad():
        backbone.pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    refused = pytest.raises(UserError, match=rf"^teacher: {re.escape(backbone.source)}: the pictures of its autoencoder hold NaN")
    with refused, mock.patch.object(models, "load", lambda *_, **__: backbone):
        composition.build(Config(teacher=backbone.source, precision="fp32"), PROMPTS, backbone.source)


def test_sdxl_takes_latents_with_the_autoencoders_mean_and_spread(teachers):
    backbone = models.load(str(teachers / "StableDiffusionXLPipeline"))
    vae = backbone.pipe.vae
    vae.register_to_config(latents_mean=[-1.7, 1.9, -1.4, 2.5], latents_std=[8.5, 5.9, 6.5, 5.2])
    pictures, draw = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.Generator()
    with mock.patch.object(vae, "decode", wraps=vae.decode) as decode:
        backbone.decode(backbone.encode_pictures(pictures, draw.manual_seed(1)))
    encoded = vae.encode(2 * pictures - 1).latent_dist.sample(draw.manual_seed(1))
    torch.testing.assert_close(decode.call_args.args[0], encoded, rtol=0, atol=1e-5)


def test_sdxl_decodes_with_the_autoencoders_mean_and_spread(teachers):
    backbone = models.load(str(teachers / "StableDiffusionXLPipeline"))
    backbone.pipe.vae.register_to_config(latents_mean=[-1.7, 1.9, -1.4, 2.5], latents_std=[8.5, 5.9, 6.5, 5.2])
    seen, decode, noise = [], backbone.pipe.vae.decode, noise_of(backbone)
    with mock.patch.object(backbone.pipe.vae, "decode", lambda z, **kwargs: seen.append(z) or decode(z, **kwargs)):
        step = {"num_inference_steps": 1, **told(backbone), **backbone.student_call, "latents": noise}
        latents = backbone.pipe(prompt=[*PROMPTS], output_type="latent", **step).images
        images = backbone.pipe(prompt=[*PROMPTS], output_type="pt", **step).images
        mine = backbone.decode(latents)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mine, images, rtol=0, atol=1e-4)
