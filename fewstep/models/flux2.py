"""FLUX.2 klein: FLUX on a Qwen3 encoder, its latents normalised by the autoencoder (Flux2KleinPipeline)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.models.backbone import Roles, chat_opening
from fewstep.models.flux import Flux, picture, positions, tokens

QWEN_TOKENS = 512  # the stock pipeline's default, the chat template's own tokens included


class Flux2Klein(Flux):
    pipeline = Flux2KleinPipeline
    text_parts = ("text_encoder", "tokenizer")
    time_module = "time_guidance_embed"
    lora_targets: ClassVar[list[str]] = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "attn.to_qkv_mlp_proj",
    ]  # fmt: skip
    default_guidance = 4.0

    def takes_guidance(self) -> bool:
        return not self.pipe.config.is_distilled

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        return {"prompt_embeds": self.pipe.encode_prompt(prompt, self.device, max_sequence_length=QWEN_TOKENS)[0]}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (QWEN_TOKENS, self.model.config.joint_attention_dim)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        height, width = xt.shape[-2:]
        text = cond["prompt_embeds"]
        output = model(
            hidden_states=tokens(xt), timestep=timestep / 1000, encoder_hidden_states=text, guidance=None,
            txt_ids=positions(1, 1, 1, text.shape[1], device=xt.device), img_ids=positions(1, height, width, 1, device=xt.device),
            return_dict=False,
        )[0]  # fmt: skip
        return picture(output, height, width)

    def image_part(self, output: Any, xt: Tensor) -> Tensor:
        """The last tokens: a single-stream block gives the text's before them."""
        return picture(super().image_part(output, xt)[:, -xt.shape[-2:].numel() :], *xt.shape[-2:])

    def longest_text(self) -> tuple[Any, int]:
        return self.pipe.tokenizer, QWEN_TOKENS - chat_opening(self.pipe.tokenizer, enable_thinking=False)

    def pixels_per_latent(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    def mean_and_std(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of each channel of the autoencoder's latents in patches of 2 x 2, (1, C, 1, 1): its batch norm's running ones."""
        vae = self.pipe.vae
        mean, variance = (value.view(1, -1, 1, 1).to(like) for value in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    def to_autoencoder(self, x0: Tensor) -> Tensor:
        """A patch's numbers are x0's channels: (B, C, H, W) -> (B, C / 4, 2 H, 2 W)."""
        mean, std = self.mean_and_std(x0)
        return F.pixel_shuffle(x0 * std + mean, 2)

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        mean, std = self.mean_and_std(latents)
        return (F.pixel_unshuffle(latents, 2) - mean) / std

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return tokens(latents)

    def to_call(self, latents: Tensor) -> Tensor:
        return latents  # the stock pipeline packs what it is given

    def lora_config(self, rank: int) -> LoraConfig:
        """With the single-stream blocks' output projections, each by its whole name: in the others `attn.to_out` is a list of modules."""
        config = super().lora_config(rank)
        config.target_modules |= {f"single_transformer_blocks.{i}.attn.to_out" for i in range(len(self.model.single_transformer_blocks))}
        return config

    def student_pipeline(self, roles: Roles, weights: dict[str, Tensor], steps: int) -> Any:
        """Marked as distilled: the stock pipeline then never guides, whatever it is told."""
        pipe = super().student_pipeline(roles, weights, steps)
        pipe.register_to_config(is_distilled=True)
        return pipe
