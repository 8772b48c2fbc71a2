"""The examples run and find what they claim."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from gaussians import D, gaussian_denoiser, guided_by, joint_points

from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import Flow

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_gaussians(tmp_path, monkeypatch, capsys):
    """As a script, in this process: it imports what the other tests have imported already."""
    monkeypatch.setattr(sys, "argv", ["gaussians.py", "--quick", "--output", str(tmp_path / "picture.png")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "gaussians.py"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_where_guidance_in_r_dm_leads():
    """There the library's own direction vanishes, by sigma points. A lower scale is nearest to a guided sampler; at none are they equal."""
    own = runpy.run_path(str(EXAMPLES / "guidance.py"))
    prompt, levels = own["Gaussian"](0.8, 0.6), own["LEVELS"][::24]
    own["student"].__globals__["LEVELS"] = levels
    identity, ones = torch.eye(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
    conditional, unconditional = (gaussian_denoiser(m * ones, v * identity) for m, v in ((0.8, 0.36), (0.0, 1.0)))
    z, eps = joint_points()
    for w in (1.0, 2.5):
        mean, std = own["student"](prompt, w)
        x0, fake = mean + std * z, gaussian_denoiser(mean * ones, std**2 * identity)
        matching = DistributionMatching(guided_by(conditional, unconditional), fake, Flow(), guidance=w, normalize="none")
        total = spread = 0.0
        for t in levels:
            cond, time = {"on": torch.ones(len(z))}, t.expand(len(z))
            direction = matching.evaluate(x0, cond, torch.arange(len(z)), t=time, noise=eps).direction
            total, spread = total + direction.mean(), spread + (direction * z).mean()
        assert abs(total) < 1e-9 and abs(spread) < 1e-9
    target, best = own["sampled"](prompt, own["SAMPLER"]), own["nearest"](prompt)
    assert own["distance"](own["sampled"](prompt, 1.0), prompt) < 1e-3 and own["distance"](own["student"](prompt, 1.0), prompt) < 1e-9
    assert own["student"](prompt, own["SAMPLER"]).mean > target.mean + 0.2  # at the sampler's scale it goes too far
    near = own["student"](prompt, best)
    assert 1.5 < best < 2.5 and near.std > target.std + 0.05 and own["distance"](near, target) > 0.05
