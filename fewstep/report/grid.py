"""A labelled grid of samples: rows are prompts, column groups are models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.disk import replace

GAP, LABEL, HEAD, ZOOM_TO = 6, 190, 26, 96


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of `text` no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw(columns: dict[str, Tensor], prompts: list[str]) -> Image.Image:
    """columns: title -> images (P, N, 3, H, W) in [0, 1], N samples for each of the P prompts."""
    first = next(iter(columns.values()))
    _, count, _, height, width = first.shape
    zoom = max(1, -(-ZOOM_TO // width)) if width < ZOOM_TO else 1
    cell_w, cell_h = width * zoom, height * zoom
    group = count * (cell_w + 2)
    size = (LABEL + len(columns) * (group + GAP) + GAP, HEAD + len(prompts) * (cell_h + 2) + GAP)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    for column, (title, images) in enumerate(columns.items()):
        left = LABEL + GAP + column * (group + GAP)
        pen.text((left + group // 2, HEAD // 2), title, fill="black", font=font, anchor="mm")
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
        for row in range(len(prompts)):
            for i in range(count):
                tile = Image.fromarray(np.ascontiguousarray(pixels[row, i])).resize((cell_w, cell_h), Image.Resampling.BICUBIC)
                canvas.paste(tile, (left + i * (cell_w + 2), HEAD + row * (cell_h + 2)))
    for row, prompt in enumerate(prompts):
        lines = wrap(prompt, LABEL - 2 * GAP, font)
        top = HEAD + row * (cell_h + 2) + cell_h // 2 - 9 * len(lines)
        for i, line in enumerate(lines):
            pen.text((GAP, top + 18 * i), line, fill="black", font=font)
    return canvas


def save(columns: dict[str, Tensor], prompts: list[str], path: Path) -> Path:
    replace(path, lambda temporary: draw(columns, prompts).save(temporary, format="PNG"))  # a viewer may hold it
    return path
