"""Stable Diffusion 1.x / 2.x: a UNet2DConditionModel conditioned on CLIP text (StableDiffusionPipeline)."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.denoiser import Cond, Denoiser
from fewstep.models import UnsupportedTeacher
from fewstep.schedule import DDPM

LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut",
    "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2",
]  # fmt: skip


class Roles(NamedTuple):
    """The three denoisers of a run, and the parameters that the two trained ones own."""

    teacher: Denoiser
    student: Denoiser
    fake: Denoiser
    student_parameters: dict[str, nn.Parameter]
    fake_parameters: dict[str, nn.Parameter]


SHORT = 256  # positions up to which plain matrix products beat the CPU's fused attention (bf16 training at 16 positions: 1.2 x)


def attention(xt: Tensor):
    """The attention arithmetic for latents of this size and device; the fused kernel's memory matters only for large ones."""
    if xt.device.type == "cpu" and xt.shape[-2:].numel() <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class Network(nn.Module):
    """A UNet called as `network(xt, timestep, cond)`, with the student's step as an extra condition when asked for.

    The step is an embedding added to the time embedding, zero at the start (method, section 6).
    adapter: the LoRA adapter to switch on for the call; "" switches all off; None leaves the UNet as it is.
    """

    def __init__(self, unet: UNet2DConditionModel, *, steps: int = 0, adapter: str | None = None):
        super().__init__()
        self.unet, self.adapter = unet, adapter
        # found once: the walk over all modules costs more than the switch
        self.adapted = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)] if adapter is not None else []
        self.adapter_parameters = [p for name, p in unet.named_parameters() if ".lora_" in name]
        self.step_embedding = None
        if steps:
            width = unet.time_embedding.linear_2.out_features
            self.step_embedding = nn.Embedding(steps, width)
            nn.init.zeros_(self.step_embedding.weight)

    def forward(self, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        if self.adapter is not None:
            self.switch()
        with self.add_step(cond), attention(xt):
            return self.unet(xt, timestep, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]

    def features(self, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """Output of the UNet's middle block, (B, F, h, w)."""
        taken: list[Tensor] = []
        handle = self.unet.mid_block.register_forward_hook(lambda module, args, output: taken.append(output))
        try:
            self(xt, timestep, cond)
        finally:
            handle.remove()
        return taken[0]

    def switch(self) -> None:
        """Turn this role's adapter on and the others off, or all off."""
        for layer in self.adapted:
            layer.enable_adapters(bool(self.adapter))
            if self.adapter:
                layer.set_adapter(self.adapter)
        # switching changes requires_grad, and autograd drops the gradient of a leaf that lost it: both adapters stay trainable
        for parameter in self.adapter_parameters:
            parameter.requires_grad_(True)

    @contextmanager
    def add_step(self, cond: Cond):
        if self.step_embedding is None:
            yield
            return
        extra = self.step_embedding(cond["step"])
        handle = self.unet.time_embedding.register_forward_hook(lambda module, args, output: output + extra.to(output))
        try:
            yield
        finally:
            handle.remove()


class StableDiffusion:
    """One teacher pipeline: encodes prompts, decodes latents, makes the three roles, exports the student."""

    def __init__(self, pipe: StableDiffusionPipeline, source: str):
        self.pipe, self.source = pipe, source
        kind = pipe.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise UnsupportedTeacher(f"{source}: prediction_type {kind!r} in its scheduler is not one of epsilon, v_prediction, sample")
        self.prediction = kind
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False).eval()
        self._encode = lru_cache(maxsize=8192)(self._encode_one)

    @classmethod
    def load(cls, source: str, *, device: str = "cpu") -> StableDiffusion:
        """Raises UnsupportedTeacher with the path and the reason when a part is missing or damaged."""
        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, safety_checker=None, requires_safety_checker=False
            )
        except Exception as error:  # diffusers, transformers and safetensors raise many kinds; each means an unreadable teacher
            raise UnsupportedTeacher(f"{source}: cannot be read as a StableDiffusionPipeline ({type(error).__name__}: {error})") from error
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe.to(device), source)

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.pipe.unet.config.in_channels, height, width

    def cut(self, prompts: list[str]) -> list[str]:
        """Those of the prompts that are longer than the text encoder reads."""
        tokenizer = self.pipe.tokenizer
        return [p for p in prompts if len(tokenizer(p).input_ids) > tokenizer.model_max_length]

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> Tensor:
        return self.pipe.encode_prompt(prompt, self.device, 1, False)[0][0]

    def encode(self, prompts: list[str]) -> Cond:
        """Text conditions, one row per prompt. Each prompt is encoded alone, so that its row does not depend on its batch."""
        return {"prompt_embeds": torch.stack([self._encode(prompt) for prompt in prompts])}

    def decode(self, x0: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W) in [0, 1], as the stock pipeline does; differentiable."""
        vae = self.pipe.vae
        return (vae.decode(x0 / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def scheduler(self, steps: int) -> LCMScheduler:
        """The K-step scheduler that the student is exported with; its grid is the only list of training times."""
        config = dict(self.pipe.scheduler.config)
        total = config["num_train_timesteps"]
        if total % steps:
            raise ValueError(f"steps must divide the schedule's {total} timesteps evenly, got {steps}")
        keep = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "prediction_type",
            "rescale_betas_zero_snr",
        )
        scheduler = LCMScheduler(
            **{key: config[key] for key in keep if key in config},
            original_inference_steps=steps,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        )
        scheduler.set_timesteps(steps)
        return scheduler

    def schedule(self) -> DDPM:
        return DDPM(self.scheduler(1).alphas_cumprod)

    def times(self, steps: int) -> Tensor:
        """(K,) float64, decreasing from 1, read from the scheduler that is exported."""
        return self.schedule().t_of(self.scheduler(steps).timesteps.double().cpu())

    def denoiser(self, network: nn.Module) -> Denoiser:
        return Denoiser(network, self.schedule(), self.prediction, uncond=self.encode([""]))

    def roles(self, *, lora_rank: int = 0, fake_steps: int = 0) -> Roles:
        """Teacher, student and fake, the last two starting as the teacher.

        lora_rank 0: full copies. Otherwise one base with two adapters; the teacher is the base with both off.
        fake_steps: how many student steps the fake is conditioned on (0: none).
        """
        base = self.pipe.unet
        if lora_rank == 0:
            student, fake = copy.deepcopy(base).requires_grad_(True), copy.deepcopy(base).requires_grad_(True)
            networks = Network(base), Network(student), Network(fake, steps=fake_steps)
        else:
            for name in ("student", "fake"):
                config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, init_lora_weights=True, target_modules=LORA_TARGETS)
                base.add_adapter(config, adapter_name=name)
            networks = Network(base, adapter=""), Network(base, adapter="student"), Network(base, steps=fake_steps, adapter="fake")
        networks = [network.to(self.device) for network in networks]

        def owned(network: Network, role: str) -> dict[str, nn.Parameter]:
            parts = ("unet.",) if lora_rank == 0 else (f".{role}.",)
            return {
                name: p
                for name, p in network.named_parameters()
                if name.startswith("step_embedding") or any(part in name for part in parts)
            }

        return Roles(*map(self.denoiser, networks), owned(networks[1], "student"), owned(networks[2], "fake"))

    @torch.no_grad()
    def student_pipeline(self, roles: Roles, weights: dict[str, Tensor], steps: int) -> StableDiffusionPipeline:
        """A stock pipeline that holds a merged copy of the student with the given weights, and the K-step scheduler."""
        network: Any = roles.student.network
        unet = copy.deepcopy(network.unet).requires_grad_(False)
        own = dict(unet.named_parameters())
        for name, value in weights.items():
            own[name.removeprefix("unet.")].copy_(value)
        if network.adapter:
            unet.enable_adapters()
            unet.delete_adapters("fake")
            unet.set_adapter(network.adapter)
            unet.fuse_lora()
            unet.unload_lora()
        pipe = StableDiffusionPipeline(
            vae=self.pipe.vae, unet=unet, text_encoder=self.pipe.text_encoder, tokenizer=self.pipe.tokenizer,
            scheduler=self.scheduler(steps), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save_lora(self, weights: dict[str, Tensor], folder: Path, *, rank: int) -> None:
        """pytorch_lora_weights.safetensors with adapter metadata, for `load_lora_weights` on the teacher's pipeline."""
        layers = {name.removeprefix("unet.").replace(".student.", "."): value for name, value in weights.items()}
        metadata = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS).to_dict()
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)

    def save(self, pipe: StableDiffusionPipeline, folder: Path) -> None:
        pipe.save_pretrained(folder, safe_serialization=True)
