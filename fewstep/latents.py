"""Latents of real pictures, which a discriminator tells a student's from: encoded once by the teacher's own autoencoder, kept on disk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.disk import cache_folder, clear
from fewstep.evaluate import pictures, protocol, store
from fewstep.evaluate.configs import config_hash
from fewstep.evaluate.store import Rows, Shards

TOGETHER = 2**20  # pixels that pass through the encoder together: one picture of 1024 x 1024


class Real(NamedTuple):
    """Latents of real pictures."""

    latents: Sequence[Tensor | Rows]  # (N, C, H, W) for each size that a run trains at
    version: str  # what tells two sets apart


def of_file(path: Path) -> Tensor:
    """`latents` (N, C, H, W) of a safetensors file. Raises ValueError."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if "latents" not in names:
                raise ValueError(f"{path}: holds no tensor `latents`; it has {', '.join(names) or 'none'}")
            found = file.get_tensor("latents")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as a safetensors file ({error})") from error
    if found.ndim != 4 or not len(found):
        raise ValueError(f"{path}: `latents` must be (N, C, H, W), one or more; got {tuple(found.shape)}")
    return checked(found, str(path))


def checked(latents: Tensor, where: str) -> Tensor:
    """The latents as they are. Raises ValueError that counts those with NaN or infinite numbers."""
    bad = ~latents.flatten(1).isfinite().all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{where}: {int(bad.sum())} of {len(latents)} latents are not finite, the first is number {first}")
    return latents


def of_pictures(source: str, backbone: Any, sizes: Sequence[tuple[int, int]], *, cache: Path | None = None, progress: bool = True) -> Real:
    """Latents of a folder's pictures, or of those of owner/name[@revision][:split] on the hub, at each size (height, width) in pixels.

    A picture is scaled until it covers the size, and cut to its middle. Parts lie in `cache`, by default under $XDG_CACHE_HOME, under the
    hash of the pictures, of the autoencoder and of what reads both: an encoding that was broken off goes on, and none is made twice.
    Raises ValueError for pictures that cannot be read and latents that are not finite.
    """
    real = pictures.open_pictures(source)
    vae = backbone.pipe.vae
    made_by = {
        "data": real.identity,
        "autoencoder": [store.fingerprint(vae), config_hash(vae), str(vae.dtype), type(backbone).__name__],
        "versions": {name: protocol.version(name) for name in ("fewstep", "diffusers", "torch", "pillow")},
    }
    folder, found = cache or cache_folder("latents"), []
    clear(folder)
    for height, width in sizes:
        shards = Shards(folder, made_by | {"size": [height, width]}, real.n)
        missing, enlarged = shards.missing(), 0
        with backbone.on_device([vae]):
            for i in track(missing, f"latents of real pictures, {height} x {width}", disable=not (progress and missing)):
                latents, smaller = part(real, shards.pictures(i), backbone, (height, width), source)
                shards.save(i, {"latents": latents})
                enlarged += smaller
        if enlarged:
            seen = sum(len(shards.pictures(i)) for i in missing)
            warnings.warn(
                f"{source}: {enlarged} of {seen} pictures are smaller than {height} x {width} and were enlarged; a discriminator learns "
                "that blur is real, so leave them out",
                stacklevel=2,
            )
        found.append(shards.open()["latents"])
    return Real(found, store.sha256(real.identity)[:12])


def part(real: pictures.Pictures, rows: range, backbone: Any, size: tuple[int, int], source: str) -> tuple[Tensor, int]:
    """(latents of these rows' pictures (N, C, H, W), in the numbers that the autoencoder computes in; how many were enlarged)."""
    height, width = size
    generator = torch.Generator().manual_seed(rows.start)  # on the CPU: the same draws on every device
    at_once, out, enlarged = max(TOGETHER // (height * width), 1), [], 0
    for first in range(rows.start, rows.stop, at_once):
        some = [real.get(i) for i in range(first, min(first + at_once, rows.stop))]
        enlarged += sum(image.width < width or image.height < height for image in some)
        fitted = [pictures.as_tensor(ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)) for image in some]
        latents = backbone.encode_pictures(torch.stack(fitted).to(backbone.device), generator)
        out.append(checked(latents.to(backbone.pipe.vae.dtype).cpu(), f"{source}, pictures from number {first}"))
    return torch.cat(out), enlarged
