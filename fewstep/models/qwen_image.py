"""Qwen-Image: an MMDiT on Qwen2.5-VL, with the autoencoder of a video model (QwenImagePipeline)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.models.backbone import Backbone, filled

TOKENS = 512  # the stock pipeline's default, after the beginning of its template is dropped


def picture(tokens: Tensor, xt: Tensor) -> Tensor:
    """(B, n, F), one token for each 2 x 2 latents of xt (B, C, H, W) -> (B, F, H/2, W/2)."""
    return tokens.transpose(1, 2).unflatten(2, [n // 2 for n in xt.shape[-2:]])


class QwenImage(Backbone):
    """The stock pipeline guides by the prompt " ", and then scales each token of the guided prediction to the norm of the conditional
    one. The teacher's own pictures have that scaling. R_dm's teacher does not: the guided score is a combination of two scores, and the
    scaled prediction is none.
    """

    pipeline = QwenImagePipeline
    text_parts = ("text_encoder", "tokenizer")
    time_module = "time_text_embed"
    lora_targets: ClassVar[list[str]] = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1",
    ]  # fmt: skip
    empty = " "
    default_guidance = 4.0
    student_call: ClassVar[dict[str, Any]] = {"true_cfg_scale": 1.0}

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        """Prompts differ in length: `mask` (1, n) is one where there is text."""
        text, _ = self.pipe.encode_prompt(prompt, device=self.device, max_sequence_length=TOKENS)
        return {"prompt_embeds": text, "mask": torch.ones(text.shape[:2], dtype=torch.long, device=text.device)}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.model.config.joint_attention_dim), "mask": (TOKENS,)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        height, width = (n // 2 for n in xt.shape[-2:])
        mask = cond["mask"] if filled(cond["mask"]) else None  # attention is faster without one
        tokens = model(
            hidden_states=self.to_pipeline(xt), timestep=timestep / 1000, encoder_hidden_states=cond["prompt_embeds"],
            encoder_hidden_states_mask=mask, img_shapes=[[(1, height, width)]] * len(xt), return_dict=False,
        )[0]  # fmt: skip
        return F.pixel_shuffle(picture(tokens, xt), 2)

    def image_part(self, output: Any, xt: Tensor) -> Tensor:
        return picture(super().image_part(output, xt), xt)

    def longest_text(self) -> tuple[Any, int]:
        """TOKENS, as far as the template before the prompt is as long as what the pipeline drops of it."""
        before = self.pipe.tokenizer(self.pipe.prompt_template_encode.partition("{}")[0]).input_ids
        return self.pipe.tokenizer, TOKENS - (len(before) - self.pipe.prompt_template_encode_start_idx)

    def channels(self) -> int:
        return self.model.config.in_channels // 4

    def size_step(self) -> int:
        return 2 * self.pixels_per_latent()

    def default_size(self) -> tuple[int, int]:
        edge = self.pipe.default_sample_size * self.pixels_per_latent()
        return edge, edge

    def decode(self, x0: Tensor) -> Tensor:
        vae = self.decoder()
        frames = self.to_autoencoder(x0).unsqueeze(2)  # a video of one frame
        return (vae.decode(frames.to(vae.dtype), return_dict=False)[0][:, :, 0] / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        vae = self.decoder()
        frames = (2 * pictures - 1).to(vae.dtype).unsqueeze(2)
        return self.from_autoencoder(vae.encode(frames).latent_dist.sample(generator)[:, :, 0])

    def mean_and_std(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of each channel of the autoencoder's latents, (1, C, 1, 1)."""
        config = self.pipe.vae.config
        mean, std = (torch.tensor(values).to(like).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean, std

    def to_autoencoder(self, x0: Tensor) -> Tensor:
        mean, std = self.mean_and_std(x0)
        return x0 * std + mean

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        mean, std = self.mean_and_std(latents)
        return (latents - mean) / std

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/2 x W/2, 4 C)."""
        return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)

    def teacher_call(self, guidance: float, negative_prompt: str = "") -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": negative_prompt or self.empty}
