"""The pictures of the embedded world: Noto Emoji and Twemoji at 64 px on white, with captions of three grains.

Read from the npm packages `emoji-datasource-google` and `emoji-datasource-twitter` 16.0.0, by the build alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PACKAGES = {"noto": "emoji-datasource-google", "twemoji": "emoji-datasource-twitter"}
VERSION = "16.0.0"

# subcategory -> the words a person would use. The world draws these three categories; the VAE sees all pictures.
SUBCATEGORIES = {
    "face-smiling": "a smiling face", "face-affection": "a loving face", "face-tongue": "a face with tongue",
    "face-hand": "a face with hand", "face-neutral-skeptical": "a skeptical face", "face-sleepy": "a sleepy face",
    "face-unwell": "an unwell face", "face-hat": "a face with hat", "face-glasses": "a face with glasses",
    "face-concerned": "a concerned face", "face-negative": "an angry face", "face-costume": "a costume face",
    "cat-face": "a cat face", "monkey-face": "a monkey", "heart": "a heart", "emotion": "an emotion",
    "animal-mammal": "a mammal", "animal-bird": "a bird", "animal-amphibian": "an amphibian",
    "animal-reptile": "a reptile", "animal-marine": "a sea animal", "animal-bug": "a bug",
    "plant-flower": "a flower", "plant-other": "a plant", "food-fruit": "a fruit", "food-vegetable": "a vegetable",
    "food-prepared": "a meal", "food-asian": "asian food", "food-sweet": "a sweet", "drink": "a drink",
    "dishware": "dishware", "food-marine": "seafood",
}  # fmt: skip
CATEGORIES = {"Smileys & Emotion": "smileys and emotion", "Animals & Nature": "animals and nature", "Food & Drink": "food and drink"}


@dataclass
class Picture:
    image: np.ndarray  # (64, 64, 3) uint8, on white
    code: str
    style: str
    name: str
    subcategory: str
    category: str
    heldout: bool

    @property
    def drawn(self) -> bool:
        """Whether the world draws it (the VAE trains on the others too)."""
        return self.category in CATEGORIES

    def captions(self) -> dict[str, float]:
        """Caption -> probability: the name, its subcategory or its category, with and without the style word."""
        kind = SUBCATEGORIES[self.subcategory]
        grains = {self.name: 0.6, f"{self.name}, {kind}": 0.1, kind: 0.25, CATEGORIES[self.category]: 0.05}
        out: dict[str, float] = {}
        for text, weight in grains.items():
            out[text] = out.get(text, 0.0) + weight / 2
            out[f"{self.style} {text}"] = out.get(f"{self.style} {text}", 0.0) + weight / 2
        return out


def tidy(name: str) -> str:
    """An emoji's name as a caption: lower case words only."""
    return " ".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def is_heldout(code: str, style: str) -> bool:
    """One picture in eight, chosen by hash; an emoji is held out in one style only, so its subject is always known."""
    draw = hashlib.sha256(code.encode()).digest()
    return draw[0] < 64 and ("noto", "twemoji")[draw[1] % 2] == style


def on_white(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGBA").resize((64, 64), Image.Resampling.LANCZOS)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def fetch(folder: Path) -> None:
    """Download the two raw packages into `folder` with npm, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES.values():
        if not (folder / f"{package}-{VERSION}.tgz").exists():
            subprocess.run(["npm", "pack", f"{package}@{VERSION}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def read(folder: Path) -> list[Picture]:
    """All emoji without flags, components and skin tones that both packages draw, in a fixed order."""
    pictures = []
    for style, package in PACKAGES.items():
        vendor = package.rsplit("-", 1)[1]
        with tarfile.open(folder / f"{package}-{VERSION}.tgz") as archive:
            members = {m.name: m for m in archive.getmembers()}
            entries = json.load(archive.extractfile(members["package/emoji.json"]))
            for entry in sorted(entries, key=lambda e: e["unified"]):
                if entry["category"] in ("Flags", "Component") or not (entry["has_img_google"] and entry["has_img_twitter"]):
                    continue
                data = archive.extractfile(members[f"package/img/{vendor}/64/{entry['image']}"]).read()
                pictures.append(
                    Picture(on_white(data), entry["unified"], style, tidy(entry["name"]), entry["subcategory"],
                            entry["category"], is_heldout(entry["unified"], style))
                )  # fmt: skip
    return pictures


def to_tensor(pictures: list[Picture]) -> Tensor:
    """(N, 3, 64, 64) float32 in [-1, 1]."""
    stack = np.stack([p.image for p in pictures])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def augment(images: Tensor, generator: torch.Generator, *, rotate: float = 0.0, zoom: float = 0.0, shift: float = 0.0) -> Tensor:
    """Random flip, rotation (radians), zoom and shift (in half-widths), white outside. (B, 3, H, W) in [-1, 1]."""
    n = len(images)

    def uniform(width: float) -> Tensor:
        return (torch.rand(n, generator=generator, device=images.device) * 2 - 1) * width

    angle, scale, flip = uniform(rotate), torch.exp(uniform(zoom)), torch.sign(uniform(1.0))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos * flip, -sin, uniform(shift), sin * flip, cos, uniform(shift)], 1).view(n, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    # zero padding of (image - 1) is white
    return torch.nn.functional.grid_sample(images - 1, grid, align_corners=False, padding_mode="zeros") + 1
