"""Stable Diffusion 1.x / 2.x: a UNet2DConditionModel conditioned on CLIP text (StableDiffusionPipeline)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.denoiser import Cond
from fewstep.models.backbone import Backbone

UNET_LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut",
    "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2",
]  # fmt: skip

SHORT = 256  # positions up to which plain matrix products beat the CPU's fused attention (bf16 training at 16 positions: 1.2 x)


def attention(xt: Tensor):
    """The attention arithmetic for latents of this size and device; the fused kernel's memory matters only for large ones."""
    if xt.device.type == "cpu" and xt.shape[-2:].numel() <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class StableDiffusion(Backbone):
    pipeline = StableDiffusionPipeline
    load_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    part = "unet"
    text_parts = ("text_encoder", "tokenizer")
    time_module = "time_embedding"
    lora_targets = UNET_LORA_TARGETS
    flow = False
    default_guidance = 7.5
    kohya = "diffusers"

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        return {"prompt_embeds": self.pipe.encode_prompt(prompt, self.device, 1, False)[0]}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.pipe.tokenizer.model_max_length, self.model.config.cross_attention_dim)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        with attention(xt):
            return model(xt, timestep, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]

    def middle(self, model: nn.Module) -> nn.Module:
        return model.mid_block

    def kohya_version(self) -> str | None:
        version = {768: "sd_v1", 1024: "sd_v2"}.get(self.model.config.cross_attention_dim)
        return version and version + ("_v" if self.prediction == "v_prediction" else "")
