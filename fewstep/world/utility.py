"""The gold utility: what a picture of the world is truly worth, written out, so that over-optimisation can be measured.

A learned preference only sees noisy choices of this utility. Colourfulness, contrast and sharpness are good up to a point
a little above the world's own pictures; garish colours, over-sharpening and a dirty background cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Statistics of the 918 drawn pictures as they are, mean (5% to 95%): colourfulness 0.31 (0.04 to 0.50),
# contrast 0.21 (0.11 to 0.31), sharpness 0.13 (0.07 to 0.20); 95% have a corner darker than white by less than 0.06.
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
COLOUR = 8.0  # utility of unbounded colourfulness; the other terms are weighed against it
COLOUR_SCALE = 0.5  # the gain 1 - exp(-colourfulness / scale) bends within the range of real pictures (0 to 0.6)
GARISH = 0.9  # max - min of a pixel's channels above which its colour is garish: reached by 2% of the pixels of real pictures
GARISH_COST = 7.0  # with it, the mean over pictures peaks at 1.2 times the real saturation and has lost 0.8 at 3 times
CONTRAST_PEAK, CONTRAST_WIDTH = 0.27, 0.15  # 30% above the mean; one width away costs one unit
SHARP_PEAK, SHARP_WIDTH = 0.16, 0.08  # 25% above the mean; a picture sharpened threefold loses about two units
CORNER = 6  # pixels along each edge from a corner: this triangle is clean white in 87% of the real pictures
DIRT = 0.06  # corners this much darker than white cost one unit


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W)."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))


def colourfulness(images: Tensor) -> Tensor:
    """Hasler and Suesstrunk's M3: sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2). (B, 3, H, W) in [0, 1] -> (B,)."""
    r, g, b = images.flatten(2).unbind(1)
    opponent = torch.stack([r - g, (r + g) / 2 - b], 1)
    variance, mean = torch.var_mean(opponent, dim=2, correction=0)
    # 1e-8 keeps the gradient of a colourless picture finite
    return (variance.sum(1) + 1e-8).sqrt() + 0.3 * (mean.square().sum(1) + 1e-8).sqrt()


def garishness(images: Tensor) -> Tensor:
    """Mean square excess of max - min over the channels, 1 where a pixel is at the edge of the gamut. (B,)."""
    chroma = images.amax(1) - images.amin(1)
    return ((chroma - GARISH).clamp(min=0) / (1 - GARISH)).square().mean((1, 2))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the luma. (B,)."""
    return (luma(images).flatten(1).var(1, correction=0) + 1e-8).sqrt()


def sharpness(images: Tensor) -> Tensor:
    """Root mean square of the luma's Laplacian. (B,)."""
    kernel = images.new_tensor([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    edges = F.conv2d(luma(images)[:, None], kernel[None, None])
    return (edges.square().mean((1, 2, 3)) + 1e-8).sqrt()


def dirt(images: Tensor) -> Tensor:
    """Mean distance from white in the four corner triangles. (B,)."""
    rows, columns = (torch.minimum(i, i.flip(0)) for i in (torch.arange(n, device=images.device) for n in images.shape[2:]))
    corners = rows[:, None] + columns < CORNER
    return (1 - images)[..., corners].mean((1, 2))


def components(images: Tensor) -> dict[str, Tensor]:
    """The terms whose sum is the gold utility, each (B,). Images (B, 3, 64, 64) in [0, 1]."""
    return {
        "colour": COLOUR * (1 - torch.exp(-colourfulness(images) / COLOUR_SCALE)),
        "garish": -GARISH_COST * garishness(images),
        "contrast": -((contrast(images) - CONTRAST_PEAK) / CONTRAST_WIDTH).square(),
        "sharpness": -((sharpness(images) - SHARP_PEAK) / SHARP_WIDTH).square(),
        "background": -dirt(images) / DIRT,
    }


def gold_utility(images: Tensor) -> Tensor:
    """Higher is better; the world's own pictures have 2.6 on average, 90% of them -0.9 to 4.7. (B, 3, 64, 64) in [0, 1] -> (B,)."""
    return torch.stack(list(components(images).values())).sum(0)
