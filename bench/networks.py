"""Teachers of random weights, built from configurations: each family's own size, and a reduced one that a CPU can train.

The dictionaries hold what differs from the defaults of the diffusers class, as the models' own config.json have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from fewstep.models.backbone import Backbone
from fewstep.models.flux import Flux1
from fewstep.models.sd3 import StableDiffusion3
from fewstep.models.sdxl import StableDiffusionXL


def tiny_vae(channels: int) -> AutoencoderKL:
    """Nothing is decoded here: it says how many pixels a latent stands for (8, by its four blocks) and in what numbers it is held."""
    return AutoencoderKL(
        block_out_channels=(2, 2, 2, 2), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, latent_channels=channels, norm_num_groups=1,
    )  # fmt: skip


def sdxl_pipeline(unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """Its conditions' shapes are read off a tokenizer and a text encoder, which are here as small as can be."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    text = CLIPTextConfig(
        vocab_size=2, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1, projection_dim=pooled,
    )  # fmt: skip
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=77)
    return StableDiffusionXLPipeline(
        unet=unet, vae=tiny_vae(4),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"),
        text_encoder=None, text_encoder_2=CLIPTextModelWithProjection(text), tokenizer=tokenizer, tokenizer_2=tokenizer,
        add_watermarker=False,
    )  # fmt: skip


def sd3_pipeline(transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=tiny_vae(16), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None, tokenizer_2=None, tokenizer_3=None,
    )  # fmt: skip


def flux_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    return FluxPipeline(
        transformer=transformer, vae=tiny_vae(16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
    )  # fmt: skip


class Family(NamedTuple):
    adapter: type[Backbone]
    network: type[Any]
    pipeline: Callable[[Any], Any]
    real: dict[str, Any]  # the network's configuration
    reduced: dict[str, Any]  # what of it is smaller on a CPU


FAMILIES = {
    "sdxl": Family(
        StableDiffusionXL,
        UNet2DConditionModel,
        sdxl_pipeline,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),  # the number of heads, by the class's own account
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            "block_out_channels": (32, 64, 128),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": 128,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 320,
        },
    ),
    "sd3.5-medium": Family(
        StableDiffusion3,
        SD3Transformer2DModel,
        sd3_pipeline,
        {
            "sample_size": 128,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        {
            "num_layers": 4,
            "num_attention_heads": 3,
            "joint_attention_dim": 256,
            "caption_projection_dim": 192,
            "pooled_projection_dim": 128,
            "dual_attention_layers": (0, 1),
        },
    ),
    "flux.1-dev": Family(
        Flux1,
        FluxTransformer2DModel,
        flux_pipeline,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": (16, 56, 56),
            "guidance_embeds": True,
        },
        {
            "num_layers": 2,
            "num_single_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 64,
            "axes_dims_rope": (8, 28, 28),
        },
    ),
}


def backbone(name: str, *, reduced: bool, device: str = "cpu", dtype: torch.dtype = torch.float32, held: int = 64) -> Backbone:
    """A family's adapter around a network of random weights, made on the device in `dtype`.

    Its `encode` hands out the first rows of `held` random conditions: there is no text encoder to run.
    """
    family = FAMILIES[name]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a network that fills the card in bf16 cannot be made in float32 first
    try:
        with torch.device(device):
            network = family.network(**family.real | (family.reduced if reduced else {}))
    finally:
        torch.set_default_dtype(usual)
    pipe = family.pipeline(network)
    if dtype != torch.float32:  # some of their tables are float32 whatever the default is
        network.to(dtype), pipe.vae.to(dtype)
    made = family.adapter(pipe, name, device=device)
    return with_random_conditions(made, held)


def with_random_conditions(backbone: Backbone, held: int) -> Backbone:
    conditions = backbone.random_conditions(held)

    def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
        if len(prompts) > held:
            raise ValueError(f"{len(prompts)} prompts at once, of {held} random conditions")
        return {key: value[: len(prompts)] for key, value in conditions.items()}

    backbone.encode, backbone.prepare = encode, lambda prompts, **told: None
    return backbone
