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

SCALE_WIDTH = 256  # of a guidance scale's embedding, as LCM has it
SHORT = 256  # positions up to which plain matrix products beat the CPU's fused attention (bf16 training at 16 positions: 1.2 x)


def attention(xt: Tensor):
    """The attention arithmetic for latents of this size and device; the fused kernel's memory matters only for large ones."""
    if xt.device.type == "cpu" and xt.shape[-2:].numel() <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class UNet(Backbone):
    """What Stable Diffusion and SDXL share: a UNet2DConditionModel on a DDPM schedule.

    Its pipelines tell a network with `time_cond_proj_dim` an embedding of guidance_scale - 1, which joins the time's, and add no guidance
    of their own then (as for LCM, arXiv 2310.04378).
    """

    part = "unet"
    time_module = "time_embedding"
    lora_targets = UNET_LORA_TARGETS
    flow = False
    scale_input = "added"

    def middle(self, model: nn.Module) -> nn.Module:
        return model.down_blocks[-1] if model.mid_block is None else model.mid_block  # BK-SDM's small UNets have none

    def image_part(self, output: Any, xt: Tensor) -> Tensor:
        return output if isinstance(output, Tensor) else output[0]  # a down block also gives what goes across

    def time_width(self, model: nn.Module) -> int:
        return model.time_embedding.linear_2.out_features  # the input for a scale, where one was added, comes after it

    def scale_conditions(self, guidance: Tensor) -> Cond:
        embedded = self.pipe.get_guidance_scale_embedding((guidance - 1).float(), embedding_dim=SCALE_WIDTH)
        return super().scale_conditions(guidance) | {"timestep_cond": embedded}

    def add_scale_input(self, model: nn.Module) -> str:
        embedding = model.time_embedding
        like = embedding.linear_1.weight
        added = nn.Linear(SCALE_WIDTH, embedding.linear_1.in_features, bias=False, device=like.device, dtype=like.dtype)
        embedding.cond_proj = added.requires_grad_(False)
        nn.init.zeros_(added.weight)
        return "cond_proj"

    def name_scale_input(self, model: nn.Module, there: bool) -> None:
        model.register_to_config(time_cond_proj_dim=SCALE_WIDTH if there else None)

    def keeps_guidance(self) -> bool:
        return self.model.config.time_cond_proj_dim is not None


class StableDiffusion(UNet):
    pipeline = StableDiffusionPipeline
    load_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    text_parts = ("text_encoder", "tokenizer")
    default_guidance = 7.5
    kohya = "diffusers"

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        return {"prompt_embeds": self.pipe.encode_prompt(prompt, self.device, 1, False)[0]}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.pipe.tokenizer.model_max_length, self.model.config.cross_attention_dim)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        with attention(xt):
            return model(
                xt, timestep, timestep_cond=cond.get("timestep_cond"), encoder_hidden_states=cond["prompt_embeds"], return_dict=False
            )[0]  # fmt: skip

    def kohya_version(self) -> str | None:
        version = {768: "sd_v1", 1024: "sd_v2"}.get(self.model.config.cross_attention_dim)
        return version and version + ("_v" if self.prediction == "v_prediction" else "")
