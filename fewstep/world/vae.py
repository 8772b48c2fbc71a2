"""The world's AutoencoderKL: 64 x 64 pixels <-> 8 x 8 x 16 latents, about one million parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.world.pictures import Picture, augment, to_tensor
from fewstep.world.training import device, fit

KL_WEIGHT = 1e-4  # per latent dimension: far under the ELBO's, enough to keep the latents smooth


def make() -> AutoencoderKL:
    channels = (16, 32, 64, 64)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
    )


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def reconstruction(output: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels and on their differences (edges carry what makes a flat picture readable)."""
    loss = (output - target).abs().mean()
    for a, b in zip(edges(output), edges(target), strict=True):
        loss = loss + 0.5 * (a - b).abs().mean()
    return loss


def train(pictures: list[Picture], folder: Path, *, samples: int, batch: int = 16, seed: int = 0) -> AutoencoderKL:
    """Train encoder and decoder on every picture that is not held out, with geometric augmentation."""
    torch.manual_seed(seed)
    vae = make().to(device())
    data = to_tensor([p for p in pictures if not p.heldout]).to(device())
    drawn = torch.tensor(
        [1.0 + 2.0 * p.drawn for p in pictures if not p.heldout], device=device()
    )  # see the world's own three times as often

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.multinomial(drawn, batch, replacement=True, generator=generator)
        x = augment(data[index], generator, rotate=0.3, zoom=0.15, shift=0.1)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator, device=x.device)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return reconstruction(output.float(), x) + KL_WEIGHT * kl

    fit(vae, loss, steps=samples // batch, lr=1.5e-3, folder=folder, name="vae", ema=0.995, seed=seed)
    return vae


def refine(vae: AutoencoderKL, pictures: list[Picture], folder: Path, *, samples: int, batch: int = 32, seed: int = 1) -> None:
    """Train the decoder on, with the encoder frozen: the latents the teacher learns from stay what they are."""
    data = to_tensor([p for p in pictures if not p.heldout]).to(device())
    weight = torch.tensor([1.0 + 5.0 * p.drawn for p in pictures if not p.heldout], device=device())
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.multinomial(weight, batch, replacement=True, generator=generator)
        x = augment(data[index], generator, rotate=0.15, zoom=0.1, shift=0.05)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                posterior = vae.encode(x).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=generator, device=x.device)
                latent = posterior.mean + posterior.std * noise
            output = vae.decode(latent).sample
        return reconstruction(output.float(), x)

    fit(vae, loss, steps=samples // batch, lr=1e-3, folder=folder, name="decoder", ema=0.995, seed=seed)
    vae.requires_grad_(True)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over pictures of the PSNR in dB, pixels in [0, 1], reconstruction clamped. (N, 3, 64, 64) in [-1, 1]."""
    errors = []
    for x in images.split(64):
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((y - x) / 2).pow(2).flatten(1).mean(1))
    return float((-10 * torch.cat(errors).log10()).mean())
