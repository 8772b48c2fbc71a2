"""Calibrated guidance: closed form on Gaussians, its curve, and the run that uses it."""

import json

import pytest
import torch
from gaussians import D, gaussian_denoiser, spd, unflat, vector
from test_trainer import run_of

from fewstep import cli
from fewstep.denoiser import Denoiser, guide
from fewstep.guidance import LEVELS, Curve, calibrate
from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import Flow


class Pair(Denoiser):
    """Two given denoisers as the conditional and the unconditional one."""

    def __init__(self, conditional, unconditional):
        super().__init__(conditional.network, conditional.schedule, "sample")
        self.conditional, self.unconditional = conditional, unconditional

    def pair(self, xt, t, cond):
        return self.conditional(xt, t, cond), self.unconditional(xt, t, cond)


def gaussian_pair(seed=1):
    """N(mu, S) given the prompt, N(0, S) without it: guidance w is then exactly the denoiser of N(w mu, S)."""
    mean, cov = vector(seed), spd(seed)
    return mean, cov, Pair(gaussian_denoiser(mean, cov), gaussian_denoiser(torch.zeros_like(mean), cov))


@pytest.mark.parametrize("scale", [1.0, 1.7, 0.4])
def test_the_scale_of_samples_that_a_guided_density_made_is_found_at_every_level(scale):
    mean, cov, teacher = gaussian_pair()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6000, D, dtype=torch.float64, generator=generator)
    x0 = unflat(scale * mean + torch.cat([z, -z]) @ torch.linalg.cholesky(cov).T)
    curve = calibrate(teacher, Flow(), x0, {}, generator=generator, batch=4000)
    assert curve.times == list(LEVELS)
    # at little noise a sample tells itself what it is, and the prompt hardly moves the answer: more error there
    errors = [abs(value - scale) for value in curve.values]
    assert max(errors[2:]) < 0.1 and max(errors) < 0.5, curve.values


def test_the_scale_is_the_best_one():
    """Samples of another density: no scale is exact, and the fitted one has the least squared error."""
    _, cov, teacher = gaussian_pair()
    generator = torch.Generator().manual_seed(0)
    x0 = unflat(vector(7) + torch.randn(500, D, dtype=torch.float64, generator=generator) @ cov)
    curve = calibrate(teacher, Flow(), x0, {}, generator=torch.Generator().manual_seed(3))
    noise = torch.Generator().manual_seed(3)
    for level, value in zip(curve.times, curve.values, strict=True):
        t = torch.full((500,), level, dtype=torch.float64)
        xt = (1 - level) * x0 + level * torch.randn(x0.shape, dtype=torch.float64, generator=noise)
        pair = teacher.pair(xt, t, {})
        error = [float((x0 - guide(*pair, value + step)).square().sum()) for step in (-0.01, 0, 0.01)]
        assert error[1] < min(error[0], error[2])


def test_a_teacher_that_does_not_hear_the_prompt_is_refused():
    teacher = gaussian_pair()[2]
    deaf = Pair(teacher.unconditional, teacher.unconditional)
    with pytest.raises(ValueError, match=r"t = 0\.02.*nothing to calibrate"):
        calibrate(deaf, Flow(), unflat(torch.randn(5, D, dtype=torch.float64)), {})


def test_a_curve_is_linear_between_its_times_and_constant_beyond():
    curve = Curve([0.2, 0.4, 0.8], [3.0, 2.0, 0.0])
    t = torch.tensor([0.0, 0.2, 0.25, 0.4, 0.5, 0.8, 1.0], dtype=torch.float64)
    torch.testing.assert_close(curve(t), torch.tensor([3.0, 3.0, 2.75, 2.0, 1.5, 0.0, 0.0], dtype=torch.float64))
    assert curve(t.float()).dtype == torch.float32
    assert Curve([0.5], [2.0])(t).tolist() == [2.0] * 7
    for times, values in (([], []), ([0.1], [1.0, 2.0]), ([0.2, 0.2], [1.0, 2.0]), ([0.3, 0.1], [1.0, 2.0])):
        with pytest.raises(ValueError, match="increasing"):
            Curve(times, values)


def test_r_dm_follows_the_curve_and_scores_against_the_same_teacher():
    mean, cov, teacher = gaussian_pair()
    fake = gaussian_denoiser(0.5 * mean, cov)
    generator = torch.Generator().manual_seed(5)
    x0, noise = (torch.randn(3, D, 1, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    t, group = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), torch.arange(3)
    curve = Curve([0.1, 0.9], [2.0, 1.0])
    found = DistributionMatching(teacher, fake, Flow(), guidance=curve, normalize="none").evaluate(x0, {}, group, t=t, noise=noise)
    for i, scale in enumerate((2.0, 1.5, 1.0)):
        whole = gaussian_denoiser(scale * mean, cov)  # what this pair is at this scale
        alone = DistributionMatching(whole, fake, Flow(), normalize="none").evaluate(
            x0[i : i + 1], {}, group[:1], t=t[i : i + 1], noise=noise[i : i + 1]
        )
        torch.testing.assert_close(found.direction[i : i + 1], alone.direction)
        torch.testing.assert_close(found.score[i : i + 1], alone.score)


def test_a_run_calibrates_once_and_keeps_what_it_found(teacher_folder, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "CALIBRATION", 6)
    flags = ["--teacher", str(teacher_folder), "--prompts", str(prompt_file), "--output", str(tmp_path / "out"), "--groups", "2"]
    assert cli.main(["distill", *flags, "--updates", "1", "--evaluate", "false"]) == 0
    assert "calibrating" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "guidance.json").read_text())
    assert kept["times"] == list(LEVELS) and len(set(kept["values"])) == len(LEVELS)
    assert "calibrated to its samples at 3" in (tmp_path / "out" / "README.md").read_text()
    assert cli.main(["distill", "--output", str(tmp_path / "out"), "--resume", "--updates", "2"]) == 0
    assert "calibrating" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "guidance.json").read_text()) == kept


@pytest.mark.parametrize(("options", "expected"), [(("--teacher-guidance", "1"), 1.0), (("--matching.guidance", "2.5"), 2.5)])
def test_a_number_needs_no_calibration(teacher_folder, prompt_file, options, expected):
    assert (
        run_of(teacher_folder, prompt_file, "--matching.guidance", "calibrated", *options).trainer.terms["dm"].reward.guidance == expected
    )


def test_lora_roles_find_the_same_curve(teacher_folder, prompt_file, monkeypatch):
    monkeypatch.setattr(cli, "CALIBRATION", 4)
    curves = []
    for options in ((), ("--lora-rank", "2")):
        run = run_of(teacher_folder, prompt_file, "--matching.guidance", "calibrated", *options)
        curves.append(run.trainer.terms["dm"].reward.guidance.values)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
