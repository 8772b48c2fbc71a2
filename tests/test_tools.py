"""A student's LoRA in the tools of stock diffusers, for every family that has them: beside a style, from a picture, with a ControlNet."""

import importlib
import inspect

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from pipelines import PIPELINES
from pipelines.parts import randomise
from test_families import PROMPTS, moved_student, noise_of, stock_images, stock_noise, told

from fewstep import models

LORAS = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline",
    "SanaPipeline", "ZImagePipeline", "QwenImagePipeline",
]  # fmt: skip
# Klein takes pictures to edit, not to begin from; Sana's is of its step-distilled model; PixArt has none
FROM_PICTURES = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "ZImagePipeline",
    "QwenImagePipeline",
]  # fmt: skip
INPAINTING = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline",
    "ZImagePipeline", "QwenImagePipeline",
]  # fmt: skip
# pipeline -> its ControlNet; Klein and PixArt-Sigma have none in diffusers
CONTROLNETS = {
    "StableDiffusionPipeline": "ControlNetModel",
    "StableDiffusionXLPipeline": "ControlNetModel",
    "StableDiffusion3Pipeline": "SD3ControlNetModel",
    "FluxPipeline": "FluxControlNetModel",
    "SanaPipeline": "SanaControlNetModel",
    "ZImagePipeline": "ZImageControlNetModel",
    "QwenImagePipeline": "QwenImageControlNetModel",
}


def test_the_lists_are_what_diffusers_has():
    kinds = {name: getattr(diffusers, name) for name in PIPELINES}
    own = {name: getattr(importlib.import_module(module), kind) for name, (module, kind) in models.FAMILIES.items()}
    assert [name for name, kind in kinds.items() if hasattr(kind, "save_lora_weights")] == LORAS
    assert [name for name, kind in kinds.items() if own[name].draws_from_pictures()] == FROM_PICTURES
    assert [name for name in kinds if hasattr(diffusers, name.replace("Pipeline", "InpaintPipeline"))] == INPAINTING
    assert [*CONTROLNETS] == [name for name in kinds if hasattr(diffusers, name.replace("Pipeline", "ControlNetPipeline"))]


@pytest.fixture(scope="module")
def students(teachers, tmp_path_factory):
    """family -> (its adapter, the merged student's pipeline, folder of its LoRA); each is made once."""
    made = {}

    def of(name):
        if name not in made:
            backbone, folder = models.load(str(teachers / name)), tmp_path_factory.mktemp("lora")
            roles, weights = moved_student(backbone, 2)
            backbone.save_lora(weights, folder, rank=2)
            made[name] = backbone, backbone.student_pipeline(roles, weights, 4), folder
        return made[name]

    return of


def on_teacher(backbone, folder):
    """The teacher's stock pipeline with the student's LoRA and its scheduler."""
    pipe = models.load(backbone.source).pipe
    pipe.load_lora_weights(folder, adapter_name="student")
    pipe.scheduler = backbone.scheduler(4)
    return pipe


def draw(pipe, backbone, **call):
    """Four steps without guidance, always with the same noise, (2, 3, H, W)."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)  # flow schedulers do not draw from the generator
    call = {"prompt": [*PROMPTS], "num_inference_steps": 4, "output_type": "pt"} | backbone.student_call | told(backbone) | call
    taken = inspect.signature(pipe.__call__).parameters  # some are as large as the picture they begin from
    call = {key: value for key, value in call.items() if key in taken or key not in told(backbone)}
    return pipe(generator=torch.Generator().manual_seed(3), **call).images


def picture(backbone):
    height, width = told(backbone).values()
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LORAS)
def test_beside_a_style_it_is_the_sum_of_both(students, name, tmp_path):
    backbone, student, folder = students(name)
    styled = getattr(models.load(backbone.source).pipe, backbone.part)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v"]), styled)  # of another rank, attention alone
    torch.manual_seed(5)
    style = {n.replace(".default.", "."): 0.3 * torch.randn_like(p) for n, p in styled.named_parameters() if ".lora_" in n}
    backbone.pipeline.save_lora_weights(tmp_path, **{f"{backbone.part}_lora_layers": style})
    pipe = on_teacher(backbone, folder)
    alone = draw(pipe, backbone)
    torch.testing.assert_close(alone, draw(student, backbone), rtol=0, atol=1e-4)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    pipe.set_adapters(["student", "style"])
    together = draw(pipe, backbone)
    model, added = getattr(student, backbone.part), {}
    for key in style:
        layer = key.removesuffix(".lora_A.weight")
        if layer != key:
            added[layer] = style[f"{layer}.lora_B.weight"] @ style[key]
    with torch.no_grad():
        for sign in (1, -1):  # and off again: others draw with this student
            for layer, delta in added.items():
                model.get_submodule(layer).weight += sign * delta
            if sign == 1:
                torch.testing.assert_close(together, draw(student, backbone), rtol=0, atol=1e-4)
    assert (together - alone).abs().max() > 1e-2


def drawn_in_the_last(steps, pipe, backbone, **call):
    """Pictures (2, 3, H, W) that took so many of the trained grid's steps, its last."""
    seen = []

    def watch(pipe, index, t, kept):
        seen.append(float(t))
        return kept

    images = draw(pipe, backbone, callback_on_step_end=watch, **call)
    assert seen == pytest.approx(backbone.scheduler(4).timesteps.tolist()[4 - steps :], abs=1e-3)
    return images


@pytest.mark.parametrize("name", FROM_PICTURES)
def test_image_to_image_runs_the_last_steps_of_the_trained_grid(students, name):
    backbone, _, folder = students(name)
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(on_teacher(backbone, folder))
    assert "Img2Img" in type(pipe).__name__
    image, drawn = picture(backbone), {}
    # a strength between two steps: the UNets' pipelines round it down, the others up
    for steps, strength in ((1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (3 if backbone.flow else 2, 0.6)):
        drawn[steps] = drawn_in_the_last(steps, pipe, backbone, image=image, strength=strength)
    assert all(bool(torch.isfinite(images).all()) for images in drawn.values())
    assert (drawn[1] - drawn[4]).abs().max() > 1e-2


# of SD3 with as many latent channels as the published ones alone, which the tiny one has not
@pytest.mark.parametrize("name", [name for name in INPAINTING if name != "StableDiffusion3Pipeline"])
def test_inpainting_runs_the_last_steps_of_the_trained_grid(students, name):
    backbone, _, folder = students(name)
    pipe = getattr(diffusers, name.replace("Pipeline", "InpaintPipeline"))(**on_teacher(backbone, folder).components)
    image = picture(backbone)
    mask = torch.zeros_like(image[:, :1])
    mask[..., : image.shape[-1] // 2] = 1
    half, whole = (drawn_in_the_last(steps, pipe, backbone, image=image, mask_image=mask, strength=steps / 4) for steps in (2, 4))
    assert bool(torch.isfinite(half).all()) and bool(torch.isfinite(whole).all()) and (half - whole).abs().max() > 1e-2


# what a ControlNet is told beside its network's configuration
OWN = {"ZImagePipeline": {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4}}


def controlnet(name, model):
    """A ControlNet of the network's size, whose last layers are zero until it is trained."""
    kind = getattr(diffusers, CONTROLNETS[name])
    if kind is diffusers.ControlNetModel:
        return kind.from_unet(model, conditioning_embedding_out_channels=(4, 8))
    return kind.from_config(dict(model.config) | OWN.get(name, {}))


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_at_its_zeros_changes_nothing(students, name):
    backbone, _, folder = students(name)
    pipe = on_teacher(backbone, folder)
    if name == "SanaPipeline":
        pipe.transformer.register_to_config(timestep_scale=1.0)  # diffusers' ControlNet pipeline of Sana knows no other
    control = controlnet(name, models.load(backbone.source).model)
    controlled = getattr(diffusers, name.replace("Pipeline", "ControlNetPipeline"))(**pipe.components, controlnet=control)
    controlled.set_progress_bar_config(disable=True)
    key = "image" if "image" in inspect.signature(controlled.__call__).parameters else "control_image"
    noises = stock_noise(backbone, [noise_of(backbone, seed) for seed in range(4)])  # encoding the picture draws too
    call = backbone.student_call | told(backbone)

    def with_control():
        return stock_images(controlled, **noises, call=call | {key: picture(backbone)})

    plain = stock_images(pipe, **noises, call=call)
    torch.testing.assert_close(with_control(), plain, rtol=0, atol=1e-4)
    randomise(control)
    assert (with_control() - plain).abs().max() > 1e-2
