"""The loop. It receives built objects and never names a particular reward."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from fewstep import checkpoint, losses
from fewstep.config import Config
from fewstep.denoiser import Cond
from fewstep.prompts import Batches
from fewstep.rewards.base import Reward
from fewstep.student import Student
from fewstep.types import Rollout, Sample

Parameters = dict[str, nn.Parameter]


@dataclass
class Term:
    """A reward as the trainer holds it; an online one brings the parameters it trains and their optimizer's settings."""

    reward: Reward
    parameters: Parameters | None = None
    lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    updates: int = 1  # per student update
    max_norm: float = 1.0


def finite_or_stop(value: Tensor, what: str, update: int) -> None:
    """NaN or inf stops the run before anything is updated with it."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(
            f"{what} is {value.item() if value.numel() == 1 else 'not finite'} at update {update}; nothing was updated with it"
        )


class Trainer:
    """Distils `student` along the directions of `terms`.

    encode: prompts -> conditions, one row each; decode: latents -> images; latent_shape: (C, H, W).
    One cycle: a rollout without gradient, then `rollout_updates` student updates from its states (each state once, at a
    fresh noise level), each followed by every online reward's own updates on all of the rollout's predictions.
    """

    def __init__(
        self,
        student: Student,
        parameters: Parameters,
        terms: dict[str, Term],
        batches: Batches,
        *,
        encode: Callable[[list[str]], Cond],
        decode: Callable[[Tensor], Tensor],
        latent_shape: tuple[int, int, int],
        config: Config,
        device: torch.device | str = "cpu",
    ):
        self.student, self.parameters, self.terms, self.batches = student, parameters, terms, batches
        self.encode, self.decode, self.latent_shape = encode, decode, latent_shape
        self.config, self.device = config, torch.device(device)
        own = config.student
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=own.lr, betas=own.betas, weight_decay=own.weight_decay)
        self.ema = EMAModel(list(parameters.values()), decay=own.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.online = {
            name: torch.optim.AdamW(term.parameters.values(), lr=term.lr, betas=term.betas, weight_decay=0.0)
            for name, term in terms.items()
            if term.parameters is not None
        }
        self.update, self.rollouts = 0, 0
        self.rollout: Rollout | None = None
        self.used = 0  # student updates the current rollout has fed
        self.running: dict[str, float] = {}

    # -- one update ------------------------------------------------------------------------------------------------

    def precision(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def new_rollout(self) -> Rollout:
        prompts, group = self.batches.next()
        cond = {key: value.to(self.device) for key, value in self.encode(prompts).items()}
        noise = torch.randn(len(prompts), *self.latent_shape, device=self.device)
        with self.precision():
            return self.student.rollout(noise, cond, group=group.to(self.device), prompts=prompts)

    def sample_of(self, rollout: Rollout, k: Tensor, x0: Tensor | None = None) -> Sample:
        """The batch with sample i taken at state k_i; where steps are mixed, a group is (prompt, k)."""
        rows = torch.arange(len(k), device=k.device)
        x0 = rollout.x0[k, rows] if x0 is None else x0
        group = rollout.group * self.student.steps + k
        return Sample(x0, self.student.t(k, len(k), self.device), k, rollout.cond, rollout.prompts, group, self.decode)

    def student_update(self, rollout: Rollout) -> dict[str, float]:
        # every prompt's group sits at one step; the steps rotate over the updates of a rollout, so each state serves once
        k = (rollout.group + self.used + self.rollouts) % self.student.steps
        xk = rollout.states[k, torch.arange(len(k), device=k.device)]
        with self.precision():
            x0 = self.student.predict(xk, k, rollout.cond)
            x0 = x0.float()
            finite_or_stop(x0.detach(), "the student's prediction", self.update)
            sample = self.sample_of(rollout, k, x0.detach())
            signals = {name: term.reward(sample) for name, term in self.terms.items()}
        direction = torch.zeros_like(x0)
        logs = {}
        for name, signal in signals.items():
            if signal.direction is not None:
                finite_or_stop(signal.direction.abs().sum(), f"the direction of {name}", self.update)
                direction = direction + signal.direction
                logs[f"{name}/direction_rms"] = float(signal.direction.pow(2).mean().sqrt())
            if signal.score is not None:
                logs[f"{name}/score"] = float(signal.score.nanmean())
        loss = losses.pathwise(x0, direction)
        finite_or_stop(loss.detach(), "the student's loss", self.update)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.student.max_norm)
        finite_or_stop(norm, "the student's gradient norm", self.update)
        self.optimizer.step()
        self.ema.step(list(self.parameters.values()))
        logs |= {
            "loss": float(loss.detach()),
            "grad_norm": float(norm),
            "x0_mean": float(x0.detach().mean()),
            "x0_std": float(x0.detach().std()),
        }
        return logs

    def online_updates(self, rollout: Rollout) -> dict[str, float]:
        """Each online reward learns the student's predictions at all K steps, with fresh noise each time."""
        logs = {}
        for name, optimizer in self.online.items():
            term = self.terms[name]
            for _ in range(term.updates):
                sample = self.sample_of(rollout, self.any_step(rollout))
                with self.precision():
                    loss = term.reward.loss(sample)
                finite_or_stop(loss.detach(), f"the loss of {name}'s own network", self.update)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(list(term.parameters.values()), term.max_norm)
                finite_or_stop(norm, f"the gradient norm of {name}'s own network", self.update)
                optimizer.step()
                logs[f"{name}/own_loss"] = float(loss.detach())
        return logs

    def any_step(self, rollout: Rollout) -> Tensor:
        """A step for each sample, (B,): every step equally often up to rounding, which sample gets which drawn anew."""
        size = len(rollout.group)
        return (torch.randperm(size) % self.student.steps).to(self.device)

    def lags(self, new: Rollout, old: Rollout) -> dict[str, float]:
        """How much worse each online reward knows the newest outputs than those it was trained on."""
        logs = {}
        for name in self.online:
            lag = getattr(self.terms[name].reward, "lag", None)
            if lag is not None:
                k = self.any_step(new)
                with self.precision():
                    logs[f"{name}/lag"] = lag(self.sample_of(new, k), self.sample_of(old, k))
        return logs

    def step(self) -> dict[str, float]:
        """One student update and what goes with it; returns what is logged."""
        logs: dict[str, float] = {}
        if self.rollout is None or self.used == self.config.rollout_updates:
            old, self.rollout, self.used = self.rollout, self.new_rollout(), 0
            self.rollouts += 1
            if old is not None:
                logs |= self.lags(self.rollout, old)
        logs |= self.student_update(self.rollout)
        logs |= self.online_updates(self.rollout)
        self.used += 1
        self.update += 1
        for key, value in logs.items():
            self.running[key] = value if key not in self.running else self.running[key] + 0.1 * (value - self.running[key])
        return logs

    def run(self, output: Path, *, stop: Callable[[], bool]) -> Iterator[dict[str, float]]:
        """Update until `config.updates`, logging to metrics.jsonl and saving as the config says; yields after each update.

        When `stop()` turns true the run saves at the end of the current update and ends.
        """
        log = MetricsLog(output, self.update)
        try:
            while self.update < self.config.updates:
                began = time.perf_counter()
                logs = self.step() | {"seconds": time.perf_counter() - began}
                log.write(self.update, logs)
                stopping = stop()
                if stopping or self.update % self.config.save_every == 0 or self.update == self.config.updates:
                    self.save(output)
                yield logs
                if stopping:
                    return
        finally:
            log.close()

    # -- weights and state -----------------------------------------------------------------------------------------

    def averaged(self) -> dict[str, Tensor]:
        """The EMA weights of the student, by parameter name."""
        return {name: value.detach().clone() for name, value in zip(self.parameters, self.ema.shadow_params, strict=True)}

    def state(self) -> dict[str, Any]:
        rollout = None
        if self.rollout is not None:
            rollout = {"states": self.rollout.states, "x0": self.rollout.x0, "group": self.rollout.group, "prompts": self.rollout.prompts}
        return {
            "update": self.update,
            "rollouts": self.rollouts,
            "used": self.used,
            "running": self.running,
            "student": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "online": {name: {key: p.detach() for key, p in self.terms[name].parameters.items()} for name in self.online},
            "online_optimizer": {name: optimizer.state_dict() for name, optimizer in self.online.items()},
            "rng": checkpoint.rng_state(),
            "batches": self.batches.state(),
            "rollout": rollout,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state()` was taken. Raises DamagedCheckpoint when it is of another model."""
        copy_parameters(self.parameters, state["student"], "student")
        for name, optimizer in self.online.items():
            copy_parameters(self.terms[name].parameters, state["online"][name], name)
            optimizer.load_state_dict(state["online_optimizer"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)
        self.update, self.rollouts, self.used, self.running = state["update"], state["rollouts"], state["used"], state["running"]
        self.batches.load_state(state["batches"])
        self.rollout = None
        if state["rollout"] is not None:
            saved = state["rollout"]
            cond = {key: value.to(self.device) for key, value in self.encode(saved["prompts"]).items()}
            states, x0, group = (saved[key].to(self.device) for key in ("states", "x0", "group"))
            self.rollout = Rollout(states, x0, self.student.times, cond, group, saved["prompts"])
        checkpoint.set_rng_state(state["rng"])  # last: nothing above may draw from it

    def save(self, output: Path) -> Path:
        return checkpoint.save(output / "checkpoints", self.update, self.state())


def copy_parameters(own: Parameters, saved: dict[str, Tensor], who: str) -> None:
    if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
        raise checkpoint.DamagedCheckpoint(
            f"the checkpoint's {who} is another network than this run's (other teacher, steps or LoRA rank?)"
        )
    for name, parameter in own.items():
        parameter.copy_(saved[name])


class MetricsLog:
    """metrics.jsonl, one line an update, and TensorBoard when it is installed. Lines past `update` are of a lost run: dropped."""

    def __init__(self, output: Path, update: int):
        self.path = output / "metrics.jsonl"
        kept = []
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if line and is_before(line, update)]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.file = self.path.open("a")
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=update + 1)

    def write(self, update: int, logs: dict[str, float]) -> None:
        self.file.write(json.dumps({"update": update, **logs}) + "\n")
        self.file.flush()
        if self.board:
            for key, value in logs.items():
                self.board.add_scalar(key, value, update)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def is_before(line: str, update: int) -> bool:
    """Whether a metrics line belongs to an update that the checkpoint holds; a line cut by a kill does not."""
    try:
        return json.loads(line)["update"] <= update
    except (ValueError, KeyError):
        return False
