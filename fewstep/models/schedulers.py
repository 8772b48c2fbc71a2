"""The K-step schedulers that students are exported with, whose grids are their training times."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from fewstep.models import UnsupportedTeacher


def lcm_scheduler(config: dict[str, Any], steps: int) -> LCMScheduler:
    """The K-step grid of a DDPM teacher: predict x0, renoise to the next of K evenly spaced timesteps.

    Raises ValueError when K does not divide the schedule's timesteps.
    """
    total = config["num_train_timesteps"]
    if total % steps:
        raise ValueError(f"steps must divide the schedule's {total} timesteps evenly, got {steps}")
    keep = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr",
    )  # fmt: skip
    scheduler = LCMScheduler(
        **{key: config[key] for key in keep if key in config},
        original_inference_steps=steps,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # of no effect in LCM's grid; stock pipelines warn without it
    )
    scheduler.set_timesteps(steps)
    return scheduler


def check_betas(scheduler: Any, source: str) -> None:
    """Raises UnsupportedTeacher for a scheduler without betas: LCM's defaults would stand in their place."""
    if scheduler.config.get("beta_schedule") is None and scheduler.config.get("trained_betas") is None:
        raise UnsupportedTeacher(
            f"{source}: its {type(scheduler).__name__} has no betas, and no student can be trained on its noise levels; supported are "
            "the schedulers with a beta_schedule or trained_betas in scheduler_config.json (DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC)"
        )


def flow_scheduler(config: dict[str, Any], steps: int) -> FlowMatchEulerDiscreteScheduler:
    """The K-step grid of a flow teacher, t = 1, (K-1)/K, .. 1/K: predict x0, renoise to the next.

    Without a shift, and ending at 1/K: with one, stock pipelines spend the last step at t = 0.009.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        shift=1.0,
        shift_terminal=1 / steps if steps > 1 else None,
        stochastic_sampling=True,
    )
    scheduler.set_timesteps(steps)
    return scheduler
