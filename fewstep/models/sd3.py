"""Stable Diffusion 3 and 3.5: an MMDiT on two CLIP encoders and T5, which may be missing (StableDiffusion3Pipeline)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.models.backbone import Backbone

T5_TOKENS = 256  # the stock pipeline's default


class StableDiffusion3(Backbone):
    pipeline = StableDiffusion3Pipeline
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    can_lack = ("text_encoder_3", "tokenizer_3")  # zeros stand for T5's text
    time_module = "time_text_embed"
    lora_targets: ClassVar[list[str]] = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",  # of 3.5 medium's first blocks
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear", "proj_out",
    ]  # fmt: skip
    default_guidance = 7.0

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompt, prompt, prompt, device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"prompt_embeds": text, "pooled": pooled}

    def text_fingerprint(self) -> list[Any]:
        """Without T5 the network alone says how wide its zeros are."""
        width = [{"joint_attention_dim": self.model.config.joint_attention_dim}] if self.pipe.text_encoder_3 is None else []
        return [*super().text_fingerprint(), *width]

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        config, clip = self.model.config, self.pipe.tokenizer_max_length
        return {"prompt_embeds": (clip + T5_TOKENS, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        return model(
            hidden_states=xt, timestep=timestep, encoder_hidden_states=cond["prompt_embeds"], pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]  # fmt: skip

    def size_step(self) -> int:
        return self.model.config.patch_size * self.pixels_per_latent()

    def size_limit(self) -> tuple[int, int]:
        edge = self.model.config.pos_embed_max_size * self.size_step()
        return edge, edge

    def longest_text(self) -> tuple[Any, int]:
        if self.pipe.text_encoder_3 is None:  # without T5, the CLIP encoders are all that reads
            return super().longest_text()
        return self.pipe.tokenizer_3, T5_TOKENS
