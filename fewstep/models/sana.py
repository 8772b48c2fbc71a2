"""Sana: a linear-attention transformer on Gemma 2's text and a deep-compression autoencoder (SanaPipeline)."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.models.backbone import Backbone, unpadded

TOKENS = 300  # the stock pipeline's default
NEGATIVE = "\0"  # before a negative prompt, which is encoded otherwise than a prompt of the same text
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana(Backbone):
    pipeline = SanaPipeline
    text_parts = ("text_encoder", "tokenizer")
    time_module = "time_embed.emb"
    # all but the depthwise convolutions (conv_depth): peft cannot merge an adapter of a grouped one
    lora_targets: ClassVar[list[str]] = [
        "to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "time_embed.linear", "linear_1", "linear_2",
        "patch_embed.proj", "proj_out",
    ]  # fmt: skip
    default_guidance = 4.5
    # as large as asked for: else the stock call draws at the nearest size of its table and resizes the picture
    student_call: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0, "use_resolution_binning": False}

    def teacher_call(self, guidance: float, negative_prompt: str = "") -> dict[str, Any]:
        return super().teacher_call(guidance, negative_prompt) | {"use_resolution_binning": False}

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        """A prompt follows the instruction of the stock call; a negative one, and the empty one of guidance, stand alone."""
        alone = prompt == self.empty or prompt.startswith(NEGATIVE)
        text, mask, _, _ = self.pipe.encode_prompt(
            prompt.removeprefix(NEGATIVE), False, device=self.device, clean_caption=False, max_sequence_length=TOKENS,
            complex_human_instruction=None if alone else INSTRUCTION,
        )  # fmt: skip
        return unpadded(text, mask)

    def as_negative(self, prompt: str) -> str:
        return NEGATIVE + prompt

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.model.config.caption_channels), "mask": (TOKENS,)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        return model(
            xt, encoder_hidden_states=cond["prompt_embeds"], encoder_attention_mask=cond["mask"],
            timestep=timestep * model.config.timestep_scale, return_dict=False,
        )[0]  # fmt: skip

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """This autoencoder has no posterior: its latents are one point, and nothing is drawn."""
        vae = self.decoder()
        return self.from_autoencoder(vae.encode((2 * pictures - 1).to(vae.dtype)).latent)

    def size_step(self) -> int:
        return 32  # the stock call's rule, whatever the autoencoder

    def longest_text(self) -> tuple[Any, int]:
        return self.pipe.tokenizer, TOKENS
