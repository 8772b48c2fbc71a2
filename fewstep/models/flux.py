"""FLUX.1 [dev] and [schnell]: a transformer of two-stream and single-stream blocks on CLIP and T5 (FluxPipeline)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.models.backbone import Backbone

T5_TOKENS = 512  # the stock pipeline's default


def tokens(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def picture(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W): the inverse of `tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def positions(*lengths: int, device: torch.device) -> Tensor:
    """Every position of a grid, the last axis running fastest: (product of the lengths, number of axes)."""
    return torch.cartesian_prod(*(torch.arange(length, device=device) for length in lengths))


class Flux(Backbone):
    """What the generations share: one token for 2 x 2 of the autoencoder's latents, two-stream blocks before single-stream blocks.

    In bf16 the networks round their time (and guidance) to bf16 before they embed it, in training as in the stock pipeline.
    """

    def middle(self, model: nn.Module) -> nn.Module:
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        return blocks[len(blocks) // 2]

    def default_size(self) -> tuple[int, int]:
        edge = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return edge, edge


class Flux1(Flux):
    pipeline = FluxPipeline
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    time_module = "time_text_embed"
    lora_targets: ClassVar[list[str]] = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
    ]  # fmt: skip
    embedded_guidance = 3.5
    scale_input = "own"
    default_guidance = 3.5
    student_call: ClassVar[dict[str, Any]] = {"guidance_scale": 3.5}

    def takes_guidance(self) -> bool:
        return self.model.config.guidance_embeds

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        text, pooled, _ = self.pipe.encode_prompt(prompt, device=self.device, max_sequence_length=T5_TOKENS)
        return {"prompt_embeds": text, "pooled": pooled}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        return {"prompt_embeds": (T5_TOKENS, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        height, width = (n // 2 for n in xt.shape[-2:])
        text = cond["prompt_embeds"]
        output = model(
            hidden_states=self.to_pipeline(xt), timestep=timestep / 1000, encoder_hidden_states=text, pooled_projections=cond["pooled"],
            guidance=cond["guidance"].float() if self.takes_guidance() else None,
            txt_ids=xt.new_zeros(text.shape[1], 3), img_ids=positions(1, height, width, device=xt.device), return_dict=False,
        )[0]  # fmt: skip
        return F.pixel_shuffle(picture(output, height, width), 2)

    def image_part(self, output: Any, xt: Tensor) -> Tensor:
        return picture(super().image_part(output, xt), *(n // 2 for n in xt.shape[-2:]))

    def longest_text(self) -> tuple[Any, int]:
        return self.pipe.tokenizer_2, T5_TOKENS

    def channels(self) -> int:
        return self.model.config.in_channels // 4

    def size_step(self) -> int:
        return 2 * self.pixels_per_latent()

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return tokens(F.pixel_unshuffle(latents, 2))
