"""From pictures in [0, 1] to what a published scorer's network reads: its own resize, crop and normalisation, differentiably."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessor_config.json keeps them
FRACTION = 2.0**22  # PIL keeps its filter weights in fixed point with 22 fractional bits


class Defaults(NamedTuple):
    """What a transformers image processor does where its file does not say."""

    square: bool  # pictures are squashed; otherwise their shorter edge is brought to size
    crop: bool  # the centre is kept
    resample: int


DEFAULTS = {
    "Bit": Defaults(False, True, 3), "CLIP": Defaults(False, True, 3), "Siglip": Defaults(True, False, 3), "ViT": Defaults(True, False, 2)
}  # fmt: skip


class Preprocess(NamedTuple):
    """The 8-bit preprocessing of a transformers image processor: PIL's resize, the centre, the normalisation."""

    resize: int | tuple[int, int]  # the shorter edge, or (height, width)
    crop: tuple[int, int] | None  # (height, width) of the centre that is kept; None keeps all
    mean: tuple[float, ...]  # of the pixels in [0, 1]
    std: tuple[float, ...]
    resample: str = "bicubic"
    halves: Literal["down", "even"] = "down"  # which way the centre goes when it falls between two pixels

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, h, w), normalised."""
        height, width = self.resize if isinstance(self.resize, tuple) else shorter_edge(*images.shape[2:], self.resize)
        images = resize_8bit(images, height, width, self.resample)
        if self.crop is not None:
            images = centre(images, *self.crop, halves=self.halves)
        return normalise(images, self.mean, self.std)


def read_preprocess(config: dict[str, Any], size: int, kind: str) -> Preprocess:
    """What a preprocessor_config.json says. size: the edge, for a config that names none. kind: of DEFAULTS, for what else it leaves out.

    Raises KeyError for an entry that is missing or has no meaning here.
    """
    default = DEFAULTS[kind]
    edges, crop = config.get("size", {"height": size, "width": size} if default.square else size), config.get("crop_size", size)
    if isinstance(edges, int):  # to a ViT alone one number is a square
        edges = {"height": edges, "width": edges} if kind == "ViT" else {"shortest_edge": edges}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    short = edges.get("shortest_edge")
    return Preprocess(
        short if short is not None else (edges["height"], edges["width"]),
        (crop["height"], crop["width"]) if config.get("do_center_crop", default.crop) else None,
        tuple(config["image_mean"]),
        tuple(config["image_std"]),
        RESAMPLE[config.get("resample", default.resample)],
    )


def shorter_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) whose shorter edge is `size`, the longer one rounded down."""
    short = min(height, width)
    return height * size // short, width * size // short


def centre(images: Tensor, height: int, width: int, *, halves: Literal["down", "even"] = "down") -> Tensor:
    """The middle of (B, C, H, W). Half of an odd margin is rounded down, as transformers does, or to the even number, as torchvision."""
    half = {"down": lambda margin: margin // 2, "even": lambda margin: round(margin / 2)}[halves]
    top, left = half(images.shape[2] - height), half(images.shape[3] - width)
    if top < 0 or left < 0:
        raise ValueError(f"cannot crop {height}x{width} from the middle of {images.shape[2]}x{images.shape[3]}")
    return images[:, :, top : top + height, left : left + width]


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images - images.new_tensor(mean).view(-1, 1, 1)) / images.new_tensor(std).view(-1, 1, 1)


def resize_8bit(images: Tensor, height: int, width: int, resample: str) -> Tensor:
    """PIL's antialiased resize of the 8-bit pictures that (B, C, H, W) in [0, 1] would be saved as; equal to it to the bit. Pictures
    that have the size already are rounded alike.

    PIL filters along the rows, then along the columns, and rounds and clips to 8 bits after each (Pillow 13 turns the order round
    where that is cheaper, in pictures whose two edges shrink unequally; what was published used the first). Rounding has no useful
    gradient, so the gradient is that of the same filters without it, and zero where a value was clipped.
    """
    clipped = images.clamp(0, 1) * 255
    pixels = rounded(clipped, clipped.detach().round()).double()  # to even, in the pictures' own format, as they are saved
    if width != images.shape[3]:
        pixels = to_8bit(pixels @ filter_weights(images.shape[3], width, resample).to(pixels.device).T)
    if height != images.shape[2]:
        pixels = to_8bit(filter_weights(images.shape[2], height, resample).to(pixels.device) @ pixels)
    return (pixels / 255).to(images.dtype)


def to_8bit(values: Tensor) -> Tensor:
    """Values clipped to 0 .. 255 and rounded half up, as PIL's resize does, with the gradient of the clipping alone."""
    clipped = values.clamp(0, 255)
    return rounded(clipped, (clipped.detach() + 0.5).floor())


def rounded(values: Tensor, integers: Tensor) -> Tensor:
    """`integers`, the nearest to `values`, with the gradient of the values."""
    return values + (integers - values.detach())


@lru_cache(maxsize=32)
def filter_weights(before: int, after: int, resample: str) -> Tensor:
    """(after, before) float64: how much of each old pixel is in each new one. When shrinking, the filter is stretched (antialias)."""
    scale = before / after
    stretch = max(scale, 1.0)
    middle = ((torch.arange(after, dtype=torch.float64) + 0.5) * scale)[:, None]
    old = torch.arange(before, dtype=torch.float64)
    reach = {"bilinear": 1.0, "bicubic": 2.0}[resample] * stretch
    first, end = (middle - reach + 0.5).trunc().clamp(min=0), (middle + reach + 0.5).trunc().clamp(max=before)
    weights = kernel((old - middle + 0.5) / stretch, resample) * ((old >= first) & (old < end))
    weights = weights / weights.sum(1, keepdim=True) * FRACTION
    return (weights + 0.5 * weights.sign()).trunc() / FRACTION


def kernel(x: Tensor, resample: str) -> Tensor:
    """PIL's filters: a triangle, and Keys' cubic with a = -1/2."""
    x = x.abs()
    if resample == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def resize_float(images: Tensor, height: int, width: int) -> Tensor:
    """torchvision's antialiased bicubic resize of float pictures (B, C, H, W): neither rounded nor clipped."""
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
