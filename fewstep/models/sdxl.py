"""Stable Diffusion XL: a UNet on two CLIP encoders, of which the first may be missing, the second's pooled text and the picture's size
(StableDiffusionXLPipeline)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.models.sd import UNet, attention


class StableDiffusionXL(UNet):
    pipeline = StableDiffusionXLPipeline
    load_options: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    can_lack = ("text_encoder", "tokenizer")  # the network then reads the second encoder's text alone
    default_guidance = 5.0
    kohya = "sgm"

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        """The empty prompt is the one of guidance: all zeros where the pipeline says so (force_zeros_for_empty_prompt)."""
        text, _, pooled, _ = self.pipe.encode_prompt(prompt, device=self.device, do_classifier_free_guidance=False)
        if prompt == self.empty and self.pipe.config.force_zeros_for_empty_prompt:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        return {"prompt_embeds": text, "text_embeds": pooled}

    def text_fingerprint(self) -> list[Any]:
        return [*super().text_fingerprint(), {"force_zeros_for_empty_prompt": self.pipe.config.force_zeros_for_empty_prompt}]

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        text = (self.pipe.tokenizer_2.model_max_length, self.model.config.cross_attention_dim)
        return {"prompt_embeds": text, "text_embeds": (self.pipe.text_encoder_2.config.projection_dim,)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        height, width = (n * self.pixels_per_latent() for n in xt.shape[-2:])
        # original size, crop, target size: an uncropped picture of the size it is drawn at
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=xt.dtype, device=xt.device).expand(len(xt), 6)
        added = {"text_embeds": cond["text_embeds"], "time_ids": sizes}
        with attention(xt):
            return model(
                xt, timestep, timestep_cond=cond.get("timestep_cond"), encoder_hidden_states=cond["prompt_embeds"],
                added_cond_kwargs=added, return_dict=False,
            )[0]  # fmt: skip

    def mean_and_std(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Of each channel, where the autoencoder names both (Playground v2.5's does)."""
        config = self.pipe.vae.config
        mean, std = (getattr(config, key, None) for key in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return 0.0, 1.0  # the stock pipeline has no shift here
        mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(like) for value in (mean, std))
        return mean, std

    def to_autoencoder(self, x0: Tensor) -> Tensor:
        mean, std = self.mean_and_std(x0)
        return x0 * std / self.pipe.vae.config.scaling_factor + mean

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        mean, std = self.mean_and_std(latents)
        return (latents - mean) * self.pipe.vae.config.scaling_factor / std

    def longest_text(self) -> tuple[Any, int]:
        return self.pipe.tokenizer_2, self.pipe.tokenizer_2.model_max_length  # as long as the first one's: both texts lie side by side

    def kohya_version(self) -> str | None:
        return "sdxl_base_v1-0" if self.pipe.text_encoder is not None else None
