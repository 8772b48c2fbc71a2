"""Z-Image and Qwen-Image beyond the contract of every family: long prompts, sizes, decoder, middle and grid."""

import numpy as np
import pytest
import torch
from pipelines import PIPELINES

from fewstep import models
from fewstep.denoiser import repeat
from fewstep.models.embeddings import fingerprint
from fewstep.models.schedulers import flow_scheduler

SIZE = (8, 16)
NAMES = ["ZImagePipeline", "QwenImagePipeline"]
both = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """name -> the family's adapter on its tiny teacher, read once; whoever changes one reads its own."""
    root = tmp_path_factory.mktemp("qwen")
    for name in NAMES:
        PIPELINES[name]().save_pretrained(root / name, safe_serialization=True)
    return {name: models.load(str(root / name)) for name in NAMES}


def noise_of(backbone, seed=0):
    return torch.randn(2, *backbone.latent_shape(SIZE), generator=torch.Generator().manual_seed(seed))


@both
def test_a_size_is_a_whole_number_of_patches(backbones, name):
    """The smallest picture that is accepted passes the network; a whole number of latents that is none of patches is refused."""
    backbone = backbones[name]
    step = backbone.size_step()
    noise = torch.randn(1, *backbone.latent_shape((step, 3 * step)))
    with torch.no_grad():
        assert backbone.predict(backbone.model, noise, torch.full((1,), 500.0), backbone.encode(["a cat"])).shape == noise.shape
    with pytest.raises(ValueError, match=f"multiple of {step} pixels"):
        backbone.latent_shape((step, step + backbone.pixels_per_latent()))


def test_the_prompt_of_qwens_guidance_is_a_blank(backbones):
    """As its card has it and the stock pipeline's words do, in the teacher's pictures and in training."""
    backbone = backbones["QwenImagePipeline"]
    assert backbone.teacher_call(4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
    told = backbone.roles().teacher.uncond
    assert all(torch.equal(value, backbone.encode_one(" ")[key]) for key, value in told.items())


@both
def test_decoding_has_its_gradient(backbones, name):
    """What rewards on pictures send back through the decoder, against a central difference."""
    backbone = models.load(backbones[name].source)
    backbone.pipe.vae.double()
    x0, direction = (noise_of(backbone, seed).double() for seed in (0, 1))
    gradient = torch.autograd.grad(backbone.decode(x0.requires_grad_()).square().sum(), x0)[0]
    with torch.no_grad():
        after, before = (backbone.decode(x0 + h * direction).square().sum() for h in (1e-4, -1e-4))
    # Qwen-Image's decoder enlarges in float32 whatever it is given: 1e-7 of the sum, over a step of 2e-4
    torch.testing.assert_close((gradient * direction).sum(), (after - before) / 2e-4, rtol=1e-3, atol=0)


@both
def test_the_middle_is_a_map_of_the_picture(backbones, name):
    """What the discriminator's head reads: a change of one patch shows most at that patch's place."""
    backbone = models.load(backbones[name].source)
    teacher, noise = backbone.roles().teacher, noise_of(backbone)
    with torch.no_grad():
        before = teacher.features(noise, torch.full((2,), 0.5), repeat(teacher.uncond, 2))
        assert before.shape == (2, 16, SIZE[0] // 4, SIZE[1] // 4)
        for row, column in ((0, 3), (1, 1)):
            moved = noise.clone()
            moved[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] *= -2
            change = (teacher.features(moved, torch.full((2,), 0.5), repeat(teacher.uncond, 2)) - before).abs().sum(1)
            assert not change[0].any() and change[1].argmax() == row * change.shape[-1] + column


def test_cached_conditions_depend_on_the_chat_template(backbones):
    backbone = models.load(backbones["ZImagePipeline"].source)
    before = fingerprint(backbone.text_fingerprint())
    backbone.pipe.tokenizer.chat_template += " "
    assert fingerprint(backbone.text_fingerprint()) != before


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_a_flow_students_times_are_its_own_however_the_stock_pipeline_asks(steps):
    """Some pipelines name the number of steps; these two the sigmas 1 .. 1/K, with a shift for the picture's size besides."""
    scheduler = flow_scheduler({}, steps)
    times = torch.arange(steps, 0, -1) * 1000 / steps
    torch.testing.assert_close(scheduler.timesteps.float(), times, rtol=0, atol=1e-4)
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.9)
    torch.testing.assert_close(scheduler.timesteps, times, rtol=0, atol=1e-4)
    torch.testing.assert_close(scheduler.sigmas, torch.cat([times / 1000, torch.zeros(1)]), rtol=0, atol=1e-7)
