"""A plain trainer to measure fewstep beside: DMD2 (arXiv 2405.14867) as its trainers are written, without a discriminator.

Three separate copies of the network. For a student update fresh prompts are simulated backwards to one state, drawn for the whole batch,
and only that state is kept; the first fake update after it learns the predictions that it made there, every further one those of a
simulation of its own. The networks are called as fewstep calls them, with the same trainable parameters, numbers, optimizer, parts of the
batch and checkpointing, so that the difference is what the trainer does. Neither runs a text encoder. Left out here, and paid for by
fewstep: the EMA, the fake's step, the lag, checks for NaN, logs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from fewstep.config import Config
from fewstep.denoiser import Cond, target
from fewstep.models.backbone import Backbone, Network, Roles, recompute
from fewstep.prompts import Batches
from fewstep.schedule import Schedule, bcast
from fewstep.trainer import optimizer_class


def copies(backbone: Backbone, *, lora_rank: int, checkpointing: bool, guidance: float) -> Roles:
    """Teacher, student and fake, each a network of its own: the frozen one, and two that train LoRA layers or all of their weights."""
    base, own = backbone.model, backbone.embedded_guidance
    models = [base, copy.deepcopy(base), copy.deepcopy(base)]
    for model in models[1:]:
        if lora_rank:
            inject_adapter_in_model(backbone.lora_config(lora_rank), model, adapter_name="own")
        else:
            model.float().requires_grad_(True)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        if checkpointing:
            model.enable_gradient_checkpointing(recompute(None))  # each is its own network: no adapter to switch back
    scales = (guidance if own is not None else None, own, own)
    networks = [Network(backbone, model, guidance=scale).to(backbone.device) for model, scale in zip(models, scales, strict=True)]
    trained = [{name: p for name, p in network.named_parameters() if p.requires_grad} for network in networks[1:]]
    return Roles(*map(backbone.denoiser, networks), *trained)


class Reference:
    """`student_update()` and `fake_update()`, each one update on a batch of config.groups x config.group_size samples."""

    def __init__(
        self,
        roles: Roles,
        schedule: Schedule,
        times: Tensor,
        batches: Batches,
        *,
        encode: Callable[[list[str]], Cond],
        latent_shape: tuple[int, int, int],
        config: Config,
        guidance: float,
    ):
        self.roles, self.schedule, self.times, self.batches = roles, schedule, times, batches
        self.encode, self.latent_shape, self.config, self.guidance = encode, latent_shape, config, guidance
        self.device = torch.device(config.device)
        self.deck: list[int] = []
        adamw, student, fake = optimizer_class(config.memory.optimizer), config.student, config.fake
        self.student_optimizer = adamw(
            roles.student_parameters.values(), lr=student.lr, betas=student.betas, weight_decay=student.weight_decay
        )
        self.fake_optimizer = adamw(roles.fake_parameters.values(), lr=fake.lr, betas=fake.betas, weight_decay=0.0)
        for denoiser in roles[:3]:
            denoiser.micro_batch = config.memory.micro_groups * config.group_size

    def precision(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return bcast(self.schedule.alpha(t), x0) * x0 + bcast(self.schedule.sigma(t), x0) * noise

    def time(self, k: int, size: int) -> Tensor:
        return self.times[k].expand(size).to(self.device)

    def drawn_step(self) -> int:
        """A step at random, each once before any comes again: a few cycles cost what many would on average."""
        self.deck = self.deck or torch.randperm(len(self.times)).tolist()
        return self.deck.pop()

    @torch.no_grad()
    def simulate(self) -> tuple[Tensor, int, Cond]:
        """Backward simulation of fresh prompts: (the state reached (B, C, H, W), its step, the conditions)."""
        prompts, _ = self.batches.next()
        cond = {key: value.to(self.device) for key, value in self.encode(prompts).items()}
        reached = self.drawn_step()
        x = torch.randn(len(prompts), *self.latent_shape, device=self.device)
        for k in range(reached):
            with self.precision():
                x0 = self.roles.student(x, self.time(k, len(x)), cond)
            x = self.noisy(x0.float(), self.time(k + 1, len(x)), torch.randn_like(x))
        return x, reached, cond

    def levels(self, size: int) -> Tensor:
        low, high = self.config.matching.t_range
        return low + (high - low) * torch.rand(size, dtype=torch.float64, device=self.device)

    def parts(self, size: int) -> list[slice]:
        most = self.config.memory.micro_groups * self.config.group_size or size
        return [slice(at, at + most) for at in range(0, size, most)]

    @torch.no_grad()
    def gradient(self, x0: Tensor, cond: Cond, t: Tensor, noise: Tensor) -> Tensor:
        """DMD's gradient in x0 (B, C, H, W): each sample's (fake - teacher), divided by its own mean |x0 - teacher|."""
        xt = self.noisy(x0, t, noise)
        if self.guidance == 1:
            real = self.roles.teacher(xt, t, cond)
        else:
            conditional, unconditional = self.roles.teacher.pair(xt, t, cond)
            real = unconditional + self.guidance * (conditional - unconditional)
        return (self.roles.fake(xt, t, cond) - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)

    def student_loss(self, x: Tensor, k: int, cond: Cond, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(mean over elements of 0.5 (x0 - sg(x0 - gradient))^2 for the prediction x0 at state x of step k, x0 detached)."""
        with self.precision():
            x0 = self.roles.student(x, self.time(k, len(x)), cond).float()
            gradient = self.gradient(x0.detach(), cond, t, noise)
        return 0.5 * nn.functional.mse_loss(x0, (x0 - gradient).detach()), x0.detach()

    def fake_loss(self, x0: Tensor, cond: Cond, t: Tensor, noise: Tensor) -> Tensor:
        """Denoising loss of the fake on samples x0, in its own parametrisation."""
        with self.precision():
            prediction = self.roles.fake.predict(self.noisy(x0, t, noise), t, cond)
        wanted = target(x0, noise, self.schedule.alpha(t), self.schedule.sigma(t), self.roles.fake.prediction)
        return nn.functional.mse_loss(prediction.float(), wanted)

    def student_update(self) -> tuple[Tensor, Cond]:
        """Returns the predictions x0 (B, C, H, W) that it was made of, detached, and their conditions."""
        x, k, cond = self.simulate()
        t, noise, made = self.levels(len(x)), torch.randn_like(x), []
        for rows in self.parts(len(x)):
            loss, x0 = self.student_loss(x[rows], k, some(cond, rows), t[rows], noise[rows])
            (loss * (len(x[rows]) / len(x))).backward()
            made.append(x0)
        nn.utils.clip_grad_norm_(list(self.roles.student_parameters.values()), self.config.student.max_norm)
        self.student_optimizer.step()
        self.student_optimizer.zero_grad()
        return torch.cat(made), cond

    def fake_update(self, made: tuple[Tensor, Cond] | None = None) -> None:
        """made: the samples to learn, as a student update returns them; None: the student's of a fresh simulation."""
        x0, cond = made or self.samples()
        t, noise = self.levels(len(x0)), torch.randn_like(x0)
        for rows in self.parts(len(x0)):
            loss = self.fake_loss(x0[rows], some(cond, rows), t[rows], noise[rows])
            (loss * (len(x0[rows]) / len(x0))).backward()
        nn.utils.clip_grad_norm_(list(self.roles.fake_parameters.values()), self.config.fake.max_norm)
        self.fake_optimizer.step()
        self.fake_optimizer.zero_grad()

    @torch.no_grad()
    def samples(self) -> tuple[Tensor, Cond]:
        """The student's predictions x0 (B, C, H, W) at the states of a fresh simulation, and their conditions."""
        x, k, cond = self.simulate()
        with self.precision():
            return self.roles.student(x, self.time(k, len(x)), cond).float(), cond


def some(cond: Cond, rows: slice) -> Cond:
    return {key: value[rows] for key, value in cond.items()}
