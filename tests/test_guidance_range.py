"""A student that keeps the teacher's guidance scale as a knob: its direction at each scale, who is told it, how stock pipelines tell it."""

import itertools
import json
from unittest import mock

import pytest
import torch
from conftest import saved
from diffusers import DiffusionPipeline
from gaussians import D, gaussian_denoiser, guided_by, marginal, spd, unflat, vector
from pipelines import PIPELINES, flux
from small_run import trainer_of
from test_families import PROMPTS, SMALL, noise_of, size_of, stock_images, stock_noise, told
from test_trainer import RANGE, run_of
from torch import nn

from fewstep import checkpoint, cli, flags, losses, models, needs
from fewstep.denoiser import Denoiser, guide
from fewstep.evaluate.drawing import draw, noise_generator
from fewstep.models.sd import SCALE_WIDTH
from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import Flow
from fewstep.student import Student

WITH_RANGE = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"]
WITHOUT = [name for name in PIPELINES if name not in WITH_RANGE]
SCALES = [0.5, 1.0, 3.3, 7.5]  # below 1 and at it, where stock pipelines guide no other network
family_with_range = pytest.mark.parametrize("name", WITH_RANGE)
full_and_lora = pytest.mark.parametrize("rank", [0, 2])


# -- the direction -----------------------------------------------------------------------------------------------------


def conditional_teacher():
    """(teacher, mean with the prompt, mean without): Gaussians of one covariance, so that the guided teacher of scale w is the Gaussian
    whose mean is u + w (c - u)."""
    cov, mean_c, mean_u = spd(3), vector(0), vector(5)
    conditional, unconditional = gaussian_denoiser(mean_c, cov), gaussian_denoiser(mean_u, cov)
    return guided_by(conditional, unconditional), mean_c, mean_u, cov


def test_the_direction_at_each_scale_is_that_of_the_scale_alone():
    """Of every normaliser whose scale belongs to a group; the batch's and the sample's too where they are on their own."""
    teacher, *_ = conditional_teacher()
    fake = gaussian_denoiser(vector(7), spd(8))
    scales = torch.tensor([1.0, 2.5, 0.0, 8.0], dtype=torch.float64)
    w, group = scales.repeat_interleave(3), torch.arange(4).repeat_interleave(3)
    x0, eps = (torch.randn(12, D, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    t = torch.linspace(0.1, 0.9, 12, dtype=torch.float64)
    for normalize in ("group", "sample", "channel", "none"):

        def found(guidance, rows, cond, normalize=normalize):
            matching = DistributionMatching(teacher, fake, Flow(), guidance=guidance, normalize=normalize)
            return matching.evaluate(x0[rows], cond, group[rows], t=t[rows], noise=eps[rows])

        together = found(None, slice(None), {"on": torch.ones(12), "guidance": w})
        for i, scale in enumerate(scales.tolist()):
            rows = slice(3 * i, 3 * i + 3)
            alone = found(scale, rows, {"on": torch.ones(3)})
            torch.testing.assert_close(together.direction[rows], alone.direction, rtol=0, atol=1e-12)
            torch.testing.assert_close(together.magnitude[rows], alone.magnitude, rtol=0, atol=1e-12)
            torch.testing.assert_close(together.score[rows], alone.score, rtol=1e-12, atol=1e-12)
    unguided = found(1.0, slice(0, 3), {"on": torch.ones(3)}).direction
    assert (together.direction[9:] - found(1.0, slice(9, 12), {"on": torch.ones(3)}).direction).abs().max() > 0.1
    torch.testing.assert_close(together.direction[:3], unguided, rtol=0, atol=1e-12)


def test_guidance_of_one_scale_for_each_sample_is_that_of_each():
    teacher, *_ = conditional_teacher()
    xt, t, cond = torch.randn(3, D, 1, 1, dtype=torch.float64), torch.full((3,), 0.4, dtype=torch.float64), {"on": torch.ones(3)}
    w = torch.tensor([1.0, 0.0, 5.0], dtype=torch.float64)
    each = torch.cat([teacher(xt[i : i + 1], t[:1], {"on": torch.ones(1)}, guidance=float(w[i])) for i in range(3)])
    torch.testing.assert_close(teacher(xt, t, cond, guidance=w), each)
    assert torch.equal(guide(xt, xt + 1, torch.full((3,), 2.5, dtype=torch.float64)), guide(xt, xt + 1, 2.5))


class Told(nn.Module):
    """A one-step generator whose mean is an affine function of the scale that it is told, and which is as wide as its teacher."""

    def __init__(self, cov):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(D, dtype=torch.float64)) for _ in range(2))
        self.cov, self.factor = cov, torch.linalg.cholesky(cov)

    def mean(self, w):
        return self.a + (w[:, None] - 4.75) / 1.9 * self.b  # of scales in [1.5, 8] the mean and the standard deviation

    def forward(self, xt, timestep, cond):
        return unflat(self.mean(cond["guidance"]) + xt.reshape(len(xt), -1) @ self.factor.T)

    @torch.no_grad()
    def fake(self, xt, timestep, cond):
        """The exact denoiser of what it makes at each scale, so the fake is told it too."""
        (t,), mean = Flow().t_of(timestep).unique(), self.mean(cond["guidance"])
        alpha = Flow().alpha(t)
        gain = alpha * self.cov @ marginal(self.cov, t, Flow()).inverse()
        return unflat(mean + (xt.reshape(len(xt), -1) - alpha * mean) @ gain.T)


def test_a_student_that_is_told_its_scale_learns_the_teacher_of_every_scale():
    """With Gaussians of one covariance its mean becomes u + w (c - u) at every w, unseen ones among them."""
    teacher, mean_c, mean_u, cov = conditional_teacher()
    network, size = Told(cov), 16
    student, fake = (Denoiser(function, Flow(), "sample") for function in (network, network.fake))
    matching = DistributionMatching(teacher, fake, Flow(), guidance=None, normalize="none")
    optimizer = torch.optim.SGD(network.parameters(), lr=2.0)
    torch.manual_seed(0)
    for _ in range(60):
        w = (1.5 + 6.5 * torch.rand(size // 2, dtype=torch.float64)).repeat_interleave(2)
        cond = {"on": torch.ones(size), "guidance": w}
        x0 = student(torch.randn(size, D, 1, 1, dtype=torch.float64), torch.ones(size, dtype=torch.float64), cond)
        direction = matching.evaluate(x0.detach(), cond, torch.arange(size) // 2, t=torch.full((size,), 0.7, dtype=torch.float64)).direction
        optimizer.zero_grad()
        losses.pathwise(x0, direction).backward()
        optimizer.step()
    scales = torch.tensor([1.5, 4.0, 8.0, 10.0], dtype=torch.float64)
    found, wanted = network.mean(scales), mean_u + scales[:, None] * (mean_c - mean_u)
    assert (found - wanted).norm() < 0.01 * (wanted - wanted.mean(0)).norm()


# -- who is told it, and in which words --------------------------------------------------------------------------------


def moved(backbone, rank):
    """Roles of a student with a range, moved away from the teacher so that it answers to its scale, and its weights."""
    torch.manual_seed(1)
    roles = backbone.roles(lora_rank=rank, guidance=(0.5, 8.0))
    with torch.no_grad():
        for parameter in roles.student_parameters.values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return roles, {name: p.detach().clone() for name, p in roles.student_parameters.items()}


def drawn_in_training(backbone, roles, scale, steps=4):
    """What the student draws at a scale in training code, and the noise it drew with."""
    student = Student(roles.student, backbone.schedule(), backbone.times(steps))
    torch.manual_seed(7)
    noises = [torch.randn(2, *backbone.latent_shape(size_of(backbone))) for _ in range(steps)]
    with mock.patch.object(torch, "randn", side_effect=noises[1:]):
        rollout = student.rollout(noises[0], backbone.encode(PROMPTS, torch.tensor([scale, scale], dtype=torch.float64)))
    with torch.no_grad():
        return backbone.decode(rollout.x0[-1]), noises


@full_and_lora
@family_with_range
def test_the_stock_pipeline_at_a_scale_is_the_student_in_training_at_it(teachers, name, rank, tmp_path):
    backbone = models.load(str(teachers / name))
    roles, weights = moved(backbone, rank)
    backbone.save(backbone.student_pipeline(roles, weights, 4), tmp_path)
    _, loaded = type(backbone.model).from_pretrained(tmp_path / backbone.part, output_loading_info=True)
    assert not any(loaded.values()), loaded  # no key is missing, unexpected or of another shape
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pictures = []
    for scale in SCALES:
        mine, noises = drawn_in_training(backbone, roles, scale)
        call = told(backbone) | backbone.student_told(scale)
        images = stock_images(pipe, **stock_noise(backbone, noises), call=call)
        torch.testing.assert_close(images, mine, rtol=0, atol=1e-4)
        with backbone.drawing(roles.student, backbone.scheduler(4)) as own:
            torch.testing.assert_close(stock_images(own, **stock_noise(backbone, noises), call=call), mine, rtol=0, atol=1e-4)
        pictures.append(mine)
    assert min(float((one - two).abs().max()) for one, two in itertools.pairwise(pictures)) > 1e-3  # it answers to its scale


@full_and_lora
@family_with_range
def test_student_and_fake_start_as_the_teacher_at_every_scale(teachers, name, rank):
    backbone = models.load(str(teachers / name))
    fixed = models.load(str(teachers / name)).roles(guidance=3.0)  # the teacher as it is without a range
    roles = backbone.roles(lora_rank=rank, fake_steps=4, guidance=(0.5, 8.0))
    noise, t, w = noise_of(backbone), torch.full((2,), 0.5), torch.tensor([3.0, 3.0])
    cond = backbone.encode(PROMPTS, w)
    with torch.no_grad():
        teacher = fixed.teacher(noise, t, backbone.encode(PROMPTS))
        for role, given in ((roles.teacher, cond), (roles.student, cond), (roles.fake, cond | {"step": torch.tensor([0, 3])})):
            torch.testing.assert_close(role(noise, t, given), teacher, rtol=0, atol=1e-6)
        if name != "FluxPipeline":  # which is told its scale and has no empty prompt
            pairs = zip(roles.teacher.pair(noise, t, cond), fixed.teacher.pair(noise, t, backbone.encode(PROMPTS)), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
    for role in (roles.student, roles.fake):
        with pytest.raises(ValueError, match="is told a guidance scale, and its conditions have none"):
            role(noise, t, backbone.encode(PROMPTS) | {"step": torch.tensor([0, 3])})


@full_and_lora
@family_with_range
def test_gradients_reach_what_tells_the_scale_in_student_and_fake_alone(teachers, name, rank):
    backbone = models.load(str(teachers / name))
    roles = backbone.roles(lora_rank=rank, fake_steps=4, guidance=(0.5, 8.0))
    noise, t = noise_of(backbone), torch.full((2,), 0.5)
    cond = backbone.encode(PROMPTS, torch.tensor([1.5, 8.0])) | {"step": torch.tensor([0, 3])}
    for role, own in (("student", roles.student_parameters), ("fake", roles.fake_parameters)):
        getattr(roles, role)(noise, t, cond).square().mean().backward()
        touched = {key for key, p in getattr(roles, role).network.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert touched and touched <= set(own), touched - set(own)
        assert name == "FluxPipeline" or any("cond_proj" in key for key in touched)
        for parameter in own.values():
            parameter.grad = None


@family_with_range
def test_a_scale_is_embedded_as_the_stock_pipeline_embeds_it(teachers, name):
    """To the bit: the embedding has the sine of a scale times a thousand."""
    backbone = models.load(str(teachers / name))
    roles, weights = moved(backbone, 0)
    pipe, seen = backbone.student_pipeline(roles, weights, 1), []
    network = getattr(pipe, backbone.part)
    key = "guidance" if name == "FluxPipeline" else "timestep_cond"
    handle = network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs[key]), with_kwargs=True)
    for scale in (*SCALES, 1.1, 6.7):
        pipe(prompt=[*PROMPTS], num_inference_steps=1, output_type="latent", guidance_scale=scale, **told(backbone))
    handle.remove()
    scales = torch.tensor([*SCALES, 1.1, 6.7], dtype=torch.float64).repeat_interleave(2)
    mine = backbone.encode(PROMPTS * 6, scales)[key].float()
    assert torch.equal(mine, torch.cat(seen)) and len(seen) == 6
    assert name == "FluxPipeline" or mine.shape == (12, SCALE_WIDTH)


@pytest.mark.parametrize("name", WITH_RANGE[:2])
def test_the_teacher_of_a_shared_base_is_drawn_as_ever(teachers, name):
    """With LoRA the input for the scale is the base's, and a stock pipeline that saw it would not guide the teacher."""
    pictures = []
    for guidance in (3.0, (0.5, 8.0)):
        backbone = models.load(str(teachers / name))
        roles = backbone.roles(lora_rank=2, guidance=guidance)
        noise = stock_noise(backbone, [noise_of(backbone, seed) for seed in range(2)])
        with backbone.drawing(roles.student, backbone.scheduler(2)) as pipe:
            assert (pipe.unet.config.time_cond_proj_dim is None) == (guidance == 3.0)
        with backbone.drawing(roles.teacher, backbone.scheduler(2)) as pipe:
            pictures.append(stock_images(pipe, **noise, call=told(backbone) | backbone.teacher_call(3.0)))
    assert torch.equal(*pictures)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_each_group_has_a_scale_of_its_own_which_the_rollout_keeps(teacher_folder, prompt_file):
    trainer = run_of(teacher_folder, prompt_file, *RANGE, "--groups", "4", "--reuse.rollout", "1").trainer
    seen = []
    with mock.patch.object(trainer.terms["dm"].reward, "loss", side_effect=trainer.terms["dm"].reward.loss) as loss:
        for _ in range(3):
            trainer.step()
            seen.append(trainer.rollout.cond["guidance"])
            assert all(torch.equal(call.args[0].cond["guidance"], seen[-1]) for call in loss.call_args_list)  # the fake is told them too
            loss.reset_mock()
    by_group = torch.stack(seen).view(3, 4, 2)
    assert torch.equal(by_group[..., 0], by_group[..., 1]) and len(by_group[..., 0].unique()) == 12
    assert bool((by_group >= 1.5).all()) and bool((by_group <= 8).all()) and float(by_group.std()) > 1
    assert torch.equal(checkpoint.unpack(*checkpoint.pack(trainer.state()))["rollout"]["guidance"], seen[-1])
    fixed = run_of(teacher_folder, prompt_file).trainer
    fixed.step()
    assert "guidance" not in fixed.rollout.cond and "guidance" not in fixed.state()["rollout"]


def test_the_scales_of_a_run_are_even_over_the_range():
    trainer = trainer_of(RANGE)
    group = torch.arange(4).repeat_interleave(3)
    scales = torch.cat([trainer.draw_guidance(group)[::3] for _ in range(500)]).sort().values
    even = torch.linspace(1.5, 8, len(scales), dtype=torch.float64)
    assert float((scales - even).abs().max()) < 6.5 * 1.63 / len(scales) ** 0.5  # Kolmogorov and Smirnov, 1%
    assert trainer_of(()).draw_guidance(group) is None


@full_and_lora
def test_a_student_answers_to_its_scale_after_a_few_updates(teacher_folder, prompt_file, rank):
    run = run_of(teacher_folder, prompt_file, *RANGE, "--lora-rank", str(rank), "--student.lr", "1e-2")
    noise, t = torch.randn(2, *run.backbone.latent_shape()), torch.full((2,), 0.5)

    def moved_by():
        with torch.no_grad():
            low, high = (run.roles.student(noise, t, run.backbone.encode(PROMPTS, torch.full((2,), w))) for w in (1.5, 8.0))
        return float((low - high).abs().max())

    assert moved_by() == 0
    for _ in range(3):
        run.trainer.step()
    assert moved_by() > 1e-4


def test_a_discriminator_looks_through_a_teacher_that_is_told_its_scale(teachers, prompt_file, tmp_path):
    from safetensors.torch import save_file

    backbone = models.load(str(teachers / "FluxPipeline"))
    save_file({"latents": torch.randn(8, *backbone.latent_shape((8, 16)))}, tmp_path / "real.safetensors")
    options = ("--size", "8x16", "--reward.discriminator", "0.5", "--discriminator.latents", str(tmp_path / "real.safetensors"))
    run = run_of(teachers / "FluxPipeline", prompt_file, *RANGE, *options)
    assert run.trainer.step()["discriminator/own_loss"] > 0
    assert run.roles.teacher.uncond["guidance"].tolist() == [(1.5 + 8) / 2]  # in the middle of the range


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fewstep: error: ")
    return line


@pytest.mark.parametrize("name", WITHOUT)
def test_a_family_whose_pipeline_tells_no_scale_refuses_a_range_before_any_weight_is_read(
    teachers, name, prompt_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(models, "load", mock.Mock(side_effect=AssertionError("weights were read")))
    options = ("--teacher", teachers / name, "--prompts", prompt_file, *RANGE, "--output", tmp_path / "out")
    line = refused(capsys, "distill", *options)
    assert "matching.guidance: a range needs a network that is told its scale" in line and line.endswith(", ".join(WITH_RANGE))
    assert refused(capsys, "distill", *options, "--dry-run") == line


def test_families_with_a_range_are_listed(capsys):
    assert cli.main(["models"]) == 0
    head, *rows = (line.split("  ") for line in capsys.readouterr().out.splitlines() if "  " in line)
    place = [cell.strip() for cell in head if cell].index("guidance range")
    listed = {cells[0]: cells[place] for row in rows if (cells := [cell.strip() for cell in row if cell.strip()])}
    assert listed == {name: "yes" if name in WITH_RANGE else "no" for name in PIPELINES}


def test_a_step_distilled_flux_refuses_a_range(tmp_path):
    saved(tmp_path, {"schnell": lambda: flux.pipeline(guidance_embeds=False)})
    with pytest.raises(ValueError, match=r"takes no guidance, got \[1\.5, 8\]: set matching\.guidance to 1"):
        models.load(str(tmp_path / "schnell")).roles(guidance=(1.5, 8.0))


@full_and_lora
@family_with_range
def test_a_dry_run_counts_what_tells_the_scale(teachers, name, rank):
    source = str(teachers / name)

    def needed(*options):
        config = flags.parse_config(["--teacher", source, "--device", "cpu", "--precision", "fp32", "--lora-rank", str(rank), *options])
        return needs.measure(source, config, 5), needs.operations(source, config)

    (fixed, before), (ranged, after) = needed(), needed(*RANGE)
    assert after >= before
    backbone = models.load(source)
    roles = backbone.roles(lora_rank=rank, guidance=(1.5, 8.0))
    assert ranged.trained == sum(p.numel() for p in roles.student_parameters.values())
    added = 0 if name == "FluxPipeline" else 8 * SCALE_WIDTH
    assert ranged.student_folder - fixed.student_folder == 4 * added
    assert ranged.cached == fixed.cached  # scales are told, not kept with the prompts
    told = sum(value.numel() * value.element_size() for value in backbone.scale_conditions(torch.ones(1, dtype=torch.float64)).values())
    assert ranged.conditions - fixed.conditions == 64 * told
    assert (ranged.trained > fixed.trained) == (ranged.networks > fixed.networks) == (name != "FluxPipeline")


# -- a finished student ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(teachers, prompt_file, tmp_path_factory):
    """family -> folder of a finished run with a range and LoRA."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("finished") / name
            options = ["--teacher", str(teachers / name), "--prompts", str(prompt_file), *SMALL, "--size", "8x16", *RANGE]
            with pytest.MonkeyPatch.context() as small:
                small.setattr("fewstep.run.SAMPLES_PER_PROMPT", 1)
                small.setattr("fewstep.evaluate.drawing.TEACHER_STEPS", 2)
                assert cli.main(["distill", *options, "--lora-rank", "2", "--teacher-guidance", "9", "--output", str(made[name])]) == 0
        return made[name]

    return of


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_a_finished_student_is_drawn_at_any_scale_of_its_range(finished, name, tmp_path, capsys, monkeypatch):
    folder = finished(name)
    card = (folder / "README.md").read_text()
    assert "teacher guidance from 1.5 to 8," in card and "`guidance_scale` is any number from 1.5 to 8" in card
    assert "guidance_scale=8.0, height=8" in card  # teacher_guidance, inside the range
    scales = []

    def draw(pipe, prompts, generators, **told):
        scales.append(told["guidance_scale"])
        return torch.zeros(1, 3, 8, 16), 0.0

    monkeypatch.setattr("fewstep.evaluate.drawing.draw", draw)
    for option in ((), ("--guidance", "1.5"), ("--guidance", "4")):
        assert cli.main(["sample", str(folder), "--prompt", "a cat", *option, "--output", str(tmp_path / "pictures")]) == 0
    assert scales == [8.0, 1.5, 4.0]
    logged = [json.loads(line)["guidance"] for line in (tmp_path / "pictures" / "pictures.jsonl").read_text().splitlines()]
    assert logged == scales
    for bad in ("1", "9", "nan"):
        line = refused(capsys, "sample", folder, "--prompt", "a cat", "--guidance", bad)
        assert f"--guidance: this student takes a scale from 1.5 to 8, the range that it was trained in; got {float(bad):g}" in line


@pytest.mark.usefixtures("small_grid")
def test_teacher_and_student_are_shown_beside_one_another_at_one_scale(teachers, prompt_file, tmp_path, monkeypatch):
    calls = {}

    def grid(columns, *rest):
        calls["titles"] = list(columns)

    def sample_grid(pipe, prompts, *, steps, call):
        calls.setdefault("scales", []).append(call["guidance_scale"])
        return torch.zeros(len(prompts), 1, 3, 8, 16)

    monkeypatch.setattr("fewstep.run.sample_grid", sample_grid)
    monkeypatch.setattr("fewstep.report.grid.save", grid)
    options = ["--teacher", str(teachers / "StableDiffusionPipeline"), "--prompts", str(prompt_file), *SMALL, "--size", "8x16", *RANGE]
    assert cli.main(["distill", *options, "--teacher-guidance", "1", "--output", str(tmp_path / "out")]) == 0
    assert calls["titles"][-1] == "student, 4 steps" and calls["scales"] == [1.5] * len(calls["titles"])


@pytest.mark.parametrize("told, scale", [((), 8.0), (("--guidance", "2"), 2.0)])
def test_an_evaluation_draws_student_and_teacher_at_one_scale(finished, prompt_file, tmp_path, capsys, told, scale):
    folder = finished("StableDiffusionPipeline")
    (tmp_path / "judge.py").write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    judge = ["--judge.bright", f"{tmp_path / 'judge.py'}:bright", "--teacher-steps", "2", "--output", str(tmp_path / "report.json")]
    measure = ["evaluate", str(folder), "--prompts", str(prompt_file), *judge]
    assert cli.main([*measure, *told]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["guidance"] for row in report["rows"]} == {scale} and report["protocol"]["teacher"]["call"]["guidance_scale"] == scale
    by_name = {row["name"]: row["metrics"]["network_evaluations"]["value"] for row in report["rows"]}
    assert by_name["student, 4 steps"] == 4 and by_name["teacher, 2 steps"] == 4  # the teacher's guidance costs it two a step
    pipe = DiffusionPipeline.from_pretrained(folder)  # the student's row is what the stock pipeline draws at the scale
    pipe.set_progress_bar_config(disable=True)
    generators = [noise_generator(0, i) for i in range(5)]
    images = draw(
        pipe, prompt_file.read_text().split("\n")[:5], generators, num_inference_steps=4, guidance_scale=scale, height=8, width=16
    )[0]
    assert report["rows"][0]["metrics"]["bright"]["value"] == pytest.approx(float(images.mean()), abs=1e-5)
    assert "takes a scale from 1.5 to 8" in refused(capsys, *measure, "--guidance", "1")


@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_the_lora_of_a_unet_with_a_range_is_not_exported(finished, capsys, to, tmp_path):
    folder = finished("StableDiffusionPipeline")
    line = refused(capsys, "export", folder, "--to", to, "--output", tmp_path / "out")
    assert "the input that tells it the scale is part of its own UNet" in line and line.endswith("use --to diffusers")
    assert not (folder / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_an_export_is_drawn_as_its_run_says_and_without_its_record_as_the_flag(finished, name, tmp_path, capsys, monkeypatch):
    folder, calls = tmp_path / "export", []
    assert cli.main(["export", str(finished(name)), "--to", "diffusers", "--output", str(folder)]) == 0
    picture = torch.zeros(1, 3, 8, 8), 0.0
    monkeypatch.setattr("fewstep.evaluate.drawing.draw", lambda *args, **told: (calls.append(told), picture)[1])
    sample = ["sample", str(folder), "--prompt", "a cat"]
    for flag, scale in (((), 8.0), (("--guidance", "2.5"), 2.5)):
        assert cli.main([*sample, *flag]) == 0
        assert [calls[-1][key] for key in ("guidance_scale", "height", "width")] == [scale, 8, 16]
    assert "takes a scale from 1.5 to 8, the range" in refused(capsys, *sample, "--guidance", "1")
    record = folder / "fewstep.json"
    record.write_text(record.read_text().replace('"size": [', '"size": "x", "sizes": ['))
    assert f"{record}: unknown key 'sizes'" in refused(capsys, *sample)
    record.unlink()
    if name == "StableDiffusionPipeline":  # FLUX.1 [dev] does not show from outside that it keeps its scale
        assert "--guidance: missing; " in refused(capsys, *sample)
        assert cli.main([*sample, "--guidance", "2.5"]) == 0 and calls[-1]["guidance_scale"] == 2.5
        assert "takes a scale of 1 or more; got -1" in refused(capsys, *sample, "--guidance", "-1")


def test_a_scale_for_a_student_that_has_one_distilled_in_is_refused(teachers, tmp_path, capsys):
    backbone = models.load(str(teachers / "StableDiffusionPipeline"))
    roles = backbone.roles()
    backbone.save(backbone.student_pipeline(roles, roles.student_parameters, 4), tmp_path)
    assert backbone.student_pipeline(roles, roles.student_parameters, 4).unet.config.time_cond_proj_dim is None
    assert "one scale is distilled into this student and fixed" in refused(
        capsys, "sample", tmp_path, "--prompt", "a cat", "--guidance", "2"
    )


def test_flux_with_a_range_has_a_lora_that_answers_to_its_scale(teachers, finished, tmp_path):
    folder = tmp_path / "lora"
    assert cli.main(["export", str(finished("FluxPipeline")), "--to", "lora", "--output", str(folder)]) == 0
    merged = DiffusionPipeline.from_pretrained(finished("FluxPipeline"))
    pipe = DiffusionPipeline.from_pretrained(teachers / "FluxPipeline")
    with mock.patch("diffusers.loaders.peft.logger.warning") as missing:
        pipe.load_lora_weights(folder)
    assert not missing.called, missing.call_args
    pipe.scheduler = type(merged.scheduler).from_pretrained(folder, subfolder="scheduler")
    backbone = models.load(str(teachers / "FluxPipeline"))
    noise, images = stock_noise(backbone, [noise_of(backbone, seed) for seed in range(4)]), []
    for scale in (1.5, 8.0):
        own, other = (stock_images(p, **noise, call=told(backbone) | backbone.student_told(scale)) for p in (merged, pipe))
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)
        images.append(own)
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_a_student_with_a_range_is_no_teacher(finished, name, prompt_file, tmp_path, capsys, monkeypatch):
    folder = finished(name)
    if name == "StableDiffusionPipeline":
        with pytest.raises(ValueError, match="is told the guidance scale"):
            models.load(str(folder)).roles()
    monkeypatch.setattr(models, "load", mock.Mock(side_effect=AssertionError("weights were read")))
    line = refused(
        capsys, "distill", "--teacher", folder, "--prompts", prompt_file, "--output", tmp_path / "out", "--matching.guidance", "1"
    )
    assert f"teacher: {folder} is told the guidance scale" in line


@pytest.mark.parametrize("name", WITH_RANGE[:2])
def test_an_image_to_image_pipeline_tells_the_scale_too(teachers, name, tmp_path):
    """And a ControlNet's, whose lines on this are the same (read in diffusers): the last steps of the grid, from a picture's latents."""
    import diffusers

    backbone = models.load(str(teachers / name))
    roles, weights = moved(backbone, 0)
    backbone.save(backbone.student_pipeline(roles, weights, 4), tmp_path)
    kind = getattr(diffusers, name.replace("Pipeline", "Img2ImgPipeline"))
    pipe = kind.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args[0], args[1], kwargs)), with_kwargs=True)
    pipe(prompt=[*PROMPTS], image=torch.rand(2, 3, 8, 16), strength=0.5, num_inference_steps=4, guidance_scale=3.3, output_type="latent")
    expected = backbone.encode(PROMPTS, torch.full((2,), 3.3, dtype=torch.float64))["timestep_cond"]
    assert len(seen) == 2 and all(len(xt) == 2 and torch.equal(kwargs["timestep_cond"], expected) for xt, _, kwargs in seen)
