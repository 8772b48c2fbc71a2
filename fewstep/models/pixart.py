"""PixArt-Sigma: a diffusion transformer on T5's text, which also predicts its noise's variance (PixArtSigmaPipeline)."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from diffusers import PixArtSigmaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.models.backbone import Backbone, unpadded

TOKENS = 300  # the stock pipeline's default
CLEANS = is_bs4_available() and is_ftfy_available()  # what the stock pipeline cleans prompts with; without, it only lowers their case


class PixArtSigma(Backbone):
    pipeline = PixArtSigmaPipeline
    text_parts = ("text_encoder", "tokenizer")
    time_module = "adaln_single.emb"
    lora_targets: ClassVar[list[str]] = [
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "adaln_single.linear", "linear_1", "linear_2", "pos_embed.proj",
        "proj_out",
    ]  # fmt: skip
    flow = False
    default_guidance = 4.5
    # as large as asked for: else the stock call draws at the nearest size of its table and resizes the picture
    student_call: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0, "use_resolution_binning": False}

    def __init__(self, pipe: PixArtSigmaPipeline, source: str, **options: Any):
        super().__init__(pipe, source, **options)
        if not CLEANS:
            warnings.warn(
                f"{source}: prompts are not cleaned of links, markup and the like, because beautifulsoup4 or ftfy is not installed; where "
                "both are, the stock pipeline does clean them, and a student should be trained with what it is used with",
                stacklevel=2,
            )

    def teacher_call(self, guidance: float, negative_prompt: str = "") -> dict[str, Any]:
        return super().teacher_call(guidance, negative_prompt) | {"use_resolution_binning": False}

    def text_fingerprint(self) -> list[Any]:
        return [*super().text_fingerprint(), {"cleans": CLEANS}]

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        text, mask, _, _ = self.pipe.encode_prompt(prompt, False, device=self.device, clean_caption=True, max_sequence_length=TOKENS)
        return unpadded(text, mask)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.model.config.caption_channels), "mask": (TOKENS,)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """The noise. Its variance, in the other half of the channels, is no matter of the student's: it predicts x0 alone."""
        both = model(
            xt, encoder_hidden_states=cond["prompt_embeds"], encoder_attention_mask=cond["mask"], timestep=timestep, return_dict=False
        )[0]  # fmt: skip
        return both[:, : xt.shape[1]]

    def size_step(self) -> int:
        return self.model.config.patch_size * self.pixels_per_latent()

    def longest_text(self) -> tuple[Any, int]:
        return self.pipe.tokenizer, TOKENS
