"""The world's teacher: a StableDiffusionPipeline with v-prediction and zero terminal SNR, trained from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep.world import VARIANTS
from fewstep.world.pictures import Picture, augment, to_tensor
from fewstep.world.text import make_text_encoder
from fewstep.world.training import device, fit

JITTER = {"rotate": 0.1, "zoom": 0.06, "shift": 0.04}


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=32,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Cosine schedule rescaled to zero terminal SNR: t = 1 is pure noise (Lin et al., arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused with trailing spacing; stock pipelines warn without it
    )


def variants(pictures: list[Picture], seed: int) -> Tensor:
    """(VARIANTS, N, 3, 64, 64) in [-1, 1]: each picture as it is, then flipped and jittered copies."""
    generator = torch.Generator().manual_seed(seed)
    images = to_tensor(pictures)
    copies = [augment(images, generator, **JITTER).clamp(-1, 1) for _ in range(VARIANTS - 1)]
    return torch.stack([images, *copies])


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a per-channel shift and scale into the 1 x 1 convolutions around the latents: mean 0, variance 1.

    `StableDiffusionPipeline` knows one scaling factor and no shift; after this both are trivial and the decoded
    pictures are the same.
    """
    means = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(64)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mean)
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    encoder.weight[:channels] /= std.view(-1, 1, 1, 1)
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) / std
    encoder.bias[channels:] -= 2 * std.log()  # log-variance of the scaled latent
    decoder.bias += torch.einsum("oi,i->o", decoder.weight[:, :, 0, 0], mean)
    decoder.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, each (N, 16, 8, 8)."""
    posteriors = [vae.encode(x).latent_dist for x in images.split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def train(pictures: list[Picture], vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path, *, samples: int,
          batch: int = 64, seed: int = 0) -> tuple[UNet2DConditionModel, CLIPTextModel]:  # fmt: skip
    """Train UNet and text encoder together on the drawn pictures that are not held out; 10% of captions are dropped."""
    torch.manual_seed(seed)
    seen = [p for p in pictures if p.drawn and not p.heldout]
    where = device()
    mean, std = (value.to(where) for value in encode(vae, variants(seen, seed).flatten(0, 1)))
    captions = [p.captions() for p in seen]
    texts = sorted({text for c in captions for text in c} | {""})
    number = {text: i for i, text in enumerate(texts)}
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(where)
    width = max(len(c) for c in captions)
    chance = torch.zeros(len(seen), width)
    choice = torch.zeros(len(seen), width, dtype=torch.long)
    for row, caption in enumerate(captions):
        for column, (text, weight) in enumerate(caption.items()):
            chance[row, column], choice[row, column] = weight, number[text]

    chance, choice = chance.to(where), choice.to(where)
    model = nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)}).to(where)
    alphas = make_scheduler().alphas_cumprod.to(where)

    def loss(generator: torch.Generator) -> Tensor:
        on = {"generator": generator, "device": where}
        picture = torch.randint(len(seen), (batch,), **on)
        copy = torch.randint(VARIANTS, (batch,), **on) * len(seen) + picture
        caption = choice[picture, torch.multinomial(chance[picture], 1, generator=generator)[:, 0]]
        caption[torch.rand(batch, **on) < 0.1] = number[""]
        x0 = mean[copy] + std[copy] * torch.randn(mean[copy].shape, **on)
        # one timestep from each of `batch` equal strata
        t = ((torch.arange(batch, device=where) + torch.rand(batch, **on)) * (1000 / batch)).long()
        alpha, sigma = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        eps = torch.randn(x0.shape, **on)
        with torch.autocast(where.type, dtype=torch.bfloat16):
            cond = model["text_encoder"](ids[caption])[0]
            v = model["unet"](alpha * x0 + sigma * eps, t, cond).sample
        return (v.float() - (alpha * eps - sigma * x0)).pow(2).mean()

    fit(model, loss, steps=samples // batch, lr=6e-4, folder=folder, name="teacher", ema=0.9995, seed=seed)
    return model["unet"], model["text_encoder"]


def pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
