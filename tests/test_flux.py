"""What is FLUX's own: distilled teachers that take no guidance, the middle's map, where text is cut, what LoRA adapts."""

from unittest import mock

import pytest
import torch
from conftest import saved
from peft.tuners.tuners_utils import BaseTunerLayer
from pipelines import flux, flux2
from torch import nn

from fewstep import cli, composition, flags, models, needs

SIZE = (8, 16)
SIZED = {"height": SIZE[0], "width": SIZE[1]}
PROMPTS = ["a cat", "two red hats"]
MAKERS = {
    "dev": flux.pipeline,
    "schnell": lambda: flux.pipeline(guidance_embeds=False),
    "klein base": flux2.pipeline,
    "klein": lambda: flux2.pipeline(is_distilled=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("flux"), MAKERS)


@pytest.fixture
def backbone(folders, request):
    return models.load(str(folders / request.param))


def noise_of(backbone):
    return torch.randn(2, *backbone.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))


two_kinds = pytest.mark.parametrize("backbone", ["dev", "klein base"], indirect=True)
step_distilled = pytest.mark.parametrize("backbone", ["schnell", "klein"], indirect=True)


@step_distilled
def test_a_step_distilled_teacher_is_the_stock_pipelines_whatever_guidance_it_is_told(backbone):
    noise, seen, step = noise_of(backbone), [], backbone.pipe.scheduler.step

    def watched(output, t, sample, *args, **kwargs):
        seen.append((output.clone(), t))
        return step(output, t, sample, *args, **kwargs)

    with mock.patch.object(backbone.pipe.scheduler, "step", watched):
        backbone.pipe(
            prompt=PROMPTS, num_inference_steps=1, latents=backbone.to_call(noise), output_type="latent", guidance_scale=4.0, **SIZED
        )
    (output, t), teacher = seen[0], backbone.roles().teacher
    with torch.no_grad():
        mine = backbone.to_pipeline(teacher.network(noise, t.expand(2), backbone.encode(PROMPTS)))
    torch.testing.assert_close(mine, output, rtol=1e-4, atol=1e-4)
    assert output.std() > 1e-3


@step_distilled
def test_guidance_of_a_step_distilled_teacher_is_refused(backbone, prompt_file, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"takes no guidance, got 2\.5: set matching\.guidance to 1"):
        backbone.roles(guidance=2.5)
    code = cli.main(["distill", "--teacher", backbone.source, "--prompts", str(prompt_file), "--output", str(tmp_path / "out")])
    assert code == 2 and "teacher: " in (said := capsys.readouterr().err) and "set matching.guidance to 1" in said


@pytest.mark.parametrize("backbone", ["dev"], indirect=True)
def test_a_teacher_that_is_told_its_guidance_is_not_guided_from_outside_too(backbone):
    """One pass of it a sample, in the run as in what a dry run reckons."""
    told = ("--groups", "1", "--group-size", "2", "--lora-rank", "2", "--steps", "2", "--size", "8x16", "--precision", "fp32")

    def config(guidance):
        return flags.parse_config([*told, "--teacher", backbone.source, "--matching.guidance", guidance])

    run = composition.build(config("3.5"), PROMPTS, backbone.source)
    run.trainer.step()
    assert run.roles.teacher.forwards == 2
    plain, guided = (needs.operations(backbone.source, composition.resolve_hardware(config(w))) for w in ("1", "3.5"))
    assert guided == plain


@pytest.mark.parametrize("backbone", ["klein base"], indirect=True)
def test_the_stock_pipeline_never_guides_an_exported_klein(backbone, folders, tmp_path):
    roles = backbone.roles()
    backbone.save(backbone.student_pipeline(roles, roles.student_parameters, 1), tmp_path)
    assert backbone.pipe.config.is_distilled is False  # the teacher in the same run is still guided
    latents = backbone.to_call(noise_of(backbone))
    images = {}
    for folder in (tmp_path, folders / "klein base"):
        pipe = models.load(str(folder)).pipe
        call = {"prompt": PROMPTS, "num_inference_steps": 1, "latents": latents, "output_type": "pt", **SIZED}
        images[folder] = [pipe(guidance_scale=guidance, **call).images for guidance in (1.0, 4.0)]
    assert torch.equal(*images[tmp_path])
    assert not torch.allclose(*images[folders / "klein base"], atol=1e-2)


@pytest.mark.parametrize("backbone", ["klein base"], indirect=True)
def test_klein_decodes_what_the_stock_pipeline_decodes(backbone):
    """Where a channel varies little too, so that the batch norm's epsilon counts."""
    noise, vae, scheduler = noise_of(backbone), backbone.pipe.vae, backbone.pipe.scheduler
    vae.register_to_config(batch_norm_eps=0.5)
    call = {"prompt": PROMPTS, "num_inference_steps": 1, "latents": backbone.to_call(noise), "output_type": "pt", **SIZED}
    with mock.patch.object(scheduler, "step", lambda output, t, sample, **told: (sample,)):
        stock = backbone.pipe(**call).images
    torch.testing.assert_close(backbone.decode(noise), stock, rtol=0, atol=1e-5)


@two_kinds
def test_the_middle_is_a_map_of_the_picture(backbone):
    """The block at half of the depth, a single-stream one; its tokens of the text left out, those of the picture row by row."""
    model, taken = backbone.model, []
    handle = model.single_transformer_blocks[0].register_forward_hook(lambda module, args, output: taken.append(output))
    teacher = backbone.roles().teacher
    with torch.no_grad():
        features = teacher.features(noise_of(backbone), torch.full((2,), 0.5), backbone.encode(PROMPTS))
    handle.remove()
    tokens = taken[0] if isinstance(taken[0], torch.Tensor) else torch.cat(taken[0], 1)
    assert features.shape == (2, 16, 2, 4) and tokens.shape == (2, 512 + 8, 16)
    for y in range(2):
        for x in range(4):
            assert torch.equal(features[:, :, y, x], tokens[:, 512 + 4 * y + x])


@two_kinds
def test_a_size_is_a_whole_number_of_tokens(backbone):
    assert backbone.to_pipeline(torch.zeros(1, *backbone.latent_shape((12, 8)))).shape == (1, 3 * 2, 16)
    with pytest.raises(ValueError, match="a multiple of 4 pixels each way, got 10 x 8"):
        backbone.latent_shape((10, 8))


@two_kinds
def test_lora_adapts_every_projection_of_both_kinds_of_blocks(backbone):
    linear = {name for name, module in backbone.model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if "transformer_blocks." in name and ".norm" not in name}  # norms make scales of the time
    backbone.roles(lora_rank=2)
    adapted = {name for name, module in backbone.model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert adapted - {"proj_out"} == expected
