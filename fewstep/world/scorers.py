"""The world's scorers: two independent CLIPs and a preference learned from noisy choices of the gold utility.

All are stock `CLIPModel` folders. Pixels are resized to 64 x 64 and normalised with mean 0.5 and deviation 0.5; a score
is the cosine of image and text, for the preference times exp(logit_scale), as in PickScore.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionConfig

from fewstep.world.pictures import SUBCATEGORIES, Picture, augment, to_tensor
from fewstep.world.text import text_config
from fewstep.world.training import device, fit
from fewstep.world.utility import gold_utility, luma

SIZE = 64
TEMPERATURE = 0.5  # a picture better by this much is chosen with probability 0.73
MATCH = 2.0  # gold utility added where the caption is the picture's own


def make_clip(tokenizer: CLIPTokenizer, *, patch: int, width: int, layers: int) -> CLIPModel:
    """An untrained CLIPModel whose vision transformer has this patch size, width and depth."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=SIZE,
        patch_size=patch,
        projection_dim=64,
    )
    text = text_config(tokenizer, width=128, layers=2)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def image_features(model: CLIPModel, images: Tensor) -> Tensor:
    """Unit vectors (B, 64). Images (B, 3, H, W) in [0, 1], of any size."""
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    features = model.get_image_features(pixel_values=images * 2 - 1).pooler_output
    return F.normalize(features.float(), dim=-1)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(B, 16) int64. What pads a text comes after its end, where the causal encoder does not look."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit vectors (B, 64)."""
    return F.normalize(model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


def as_images(pictures: list[Picture]) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]."""
    return (to_tensor(pictures) + 1) / 2


def caption_chances(pictures: list[Picture]) -> tuple[list[str], Tensor]:
    """All captions and the probability of each for each picture, (N, captions)."""
    captions = [p.captions() for p in pictures]
    texts = sorted({text for c in captions for text in c})
    column = {text: i for i, text in enumerate(texts)}
    chances = torch.zeros(len(pictures), len(texts))
    for row, caption in enumerate(captions):
        for text, weight in caption.items():
            chances[row, column[text]] = weight
    return texts, chances


def saturate(images: Tensor, factor: Tensor | float) -> Tensor:
    """Move every pixel away from its grey (factor > 1) or towards it, then clip. Factor: a number or (B,)."""
    grey = luma(images)[:, None]
    return (grey + per_image(factor) * (images - grey)).clamp(0, 1)


def sharpen(images: Tensor, factor: Tensor | float) -> Tensor:
    """Unsharp mask of a 3 x 3 binomial blur: 0 is the blur, 1 the image, more is sharper. Factor: a number or (B,)."""
    line = images.new_tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return (blurred + per_image(factor) * (images - blurred)).clamp(0, 1)


def per_image(factor: Tensor | float) -> Tensor | float:
    return factor.view(-1, 1, 1, 1) if isinstance(factor, Tensor) else factor


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator, device=generator.device)


def noisy(images: Tensor, generator: torch.Generator, most: float) -> Tensor:
    """Gaussian noise whose deviation is uniform up to `most`, one for each image."""
    sigma = uniform(len(images), 0, most, generator)
    return (images + per_image(sigma) * torch.randn(images.shape, generator=generator, device=images.device)).clamp(0, 1)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """What a scorer must not mind: place, size, a flip, some blur, noise, paleness and vividness. (B, 3, 64, 64) in [0, 1]."""
    n = len(images)
    images = (augment(images * 2 - 1, generator, rotate=0.25, zoom=0.2, shift=0.1).clamp(-1, 1) + 1) / 2
    images = saturate(images, uniform(n, 0.6, 1.4, generator))
    images = sharpen(images, uniform(n, -0.2, 1.5, generator))
    images = images * per_image(uniform(n, 0.85, 1.1, generator))
    return noisy(images, generator, 0.06)


def contrastive(images: Tensor, texts: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy, with the target spread over all pairs that fit.

    Images and texts (B, D) of length 1, positive (B, B) bool with images in rows, scale a scalar.
    """
    logits = scale * images @ texts.T
    target = positive.float()
    rows = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, (target / target.sum(0)).T)
    return (rows + columns) / 2


def train_clip(pictures: list[Picture], tokenizer: CLIPTokenizer, folder: Path, *, name: str, patch: int, width: int,
               layers: int, samples: int, batch: int = 64, seed: int = 0) -> CLIPModel:  # fmt: skip
    """Train a CLIP from scratch on the drawn pictures that are not held out; checkpoints in `folder`."""
    torch.manual_seed(seed)
    model = make_clip(tokenizer, patch=patch, width=width, layers=layers).to(device())
    seen = [p for p in pictures if p.drawn and not p.heldout]
    texts, chances = caption_chances(seen)
    data, ids, chances = (x.to(device()) for x in (as_images(seen), tokenize(tokenizer, texts), chances))

    def loss(generator: torch.Generator) -> Tensor:
        picture = torch.randint(len(seen), (batch,), generator=generator, device=data.device)
        caption = torch.multinomial(chances[picture], 1, generator=generator)[:, 0]
        positive = chances[picture][:, caption] > 0
        images = jitter(data[picture], generator)
        with torch.autocast(data.device.type, dtype=torch.bfloat16):
            images, words = image_features(model, images), text_features(model, ids[caption])
        # CLIP's limit keeps the logits from growing without end
        return contrastive(images, words, positive, model.logit_scale.clamp(max=math.log(100)).exp())

    fit(model, loss, steps=samples // batch, lr=1e-3, folder=folder, name=name, warmup=50, ema=0.99, seed=seed, save_every=200)
    return model.cpu().eval()


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """What the raters of the preference see: paler, fainter, blurred, tinted and noisy pictures, (B, 3, 64, 64) in [0, 1].

    Almost all lie below the peaks of the gold utility, so more colour and sharpness is nearly always better here.
    """
    n = len(images)

    def sometimes(high: float) -> Tensor:
        return uniform(n, 0, high, generator) * (uniform(n, 0, 1, generator) < 0.4)

    images = saturate(images, uniform(n, 0.1, 1.1, generator))
    images = 1 - (1 - images) * per_image(uniform(n, 0.6, 1.1, generator))  # towards white: fainter, background clean
    images = sharpen(images.clamp(0, 1), uniform(n, 0, 1.15, generator))
    colour = torch.rand(n, 3, 1, 1, generator=generator, device=images.device)
    images = images * (1 - per_image(sometimes(0.3)) * colour)
    return (images + per_image(sometimes(0.08)) * torch.randn(images.shape, generator=generator, device=images.device)).clamp(0, 1)


def preference_scores(model: CLIPModel, images: Tensor, words: Tensor) -> Tensor:
    """exp(logit_scale) cos(image, text), PickScore's formula. Images (B, 3, 64, 64) in [0, 1], words (B, 64) -> (B,)."""
    return model.logit_scale.exp() * (image_features(model, images) * words).sum(-1)


def train_preference(clip: CLIPModel, pictures: list[Picture], tokenizer: CLIPTokenizer, folder: Path, *, samples: int,
                     batch: int = 32, seed: int = 0) -> CLIPModel:  # fmt: skip
    """Fine-tune a copy of `clip` on `samples` noisy choices between two distorted pictures under one caption.

    In two pairs of five the second picture is of something else.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(clip).to(device()).train()
    seen = [p for p in pictures if p.drawn and not p.heldout]
    texts, chances = caption_chances(seen)
    data, ids, chances = (x.to(device()) for x in (as_images(seen), tokenize(tokenizer, texts), chances))

    def loss(generator: torch.Generator) -> Tensor:
        first = torch.randint(len(seen), (batch,), generator=generator, device=data.device)
        other = torch.randint(len(seen), (batch,), generator=generator, device=data.device)
        second = torch.where(uniform(batch, 0, 1, generator) < 0.4, other, first)
        caption = torch.multinomial(chances[first], 1, generator=generator)[:, 0]
        picture = torch.stack([first, second], 1)  # (B, 2)
        place = augment(data[picture.flatten()] * 2 - 1, generator, rotate=0.15, zoom=0.1, shift=0.05)
        images = distort((place.clamp(-1, 1) + 1) / 2, generator)
        utility = gold_utility(images).view(batch, 2) + MATCH * (chances[picture, caption[:, None]] > 0)
        # P(second chosen) = sigmoid((u_2 - u_1) / T)
        chosen = torch.bernoulli(torch.sigmoid((utility[:, 1] - utility[:, 0]) / TEMPERATURE), generator=generator).long()
        with torch.autocast(data.device.type, dtype=torch.bfloat16):
            words = text_features(model, ids[caption])
            scores = preference_scores(model, images, words.repeat_interleave(2, 0))
        return F.cross_entropy(scores.view(batch, 2), chosen)

    fit(model, loss, steps=samples // batch, lr=3e-4, folder=folder, name="preference", warmup=50, ema=0.99, seed=seed, save_every=200)
    return model.cpu().eval()


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: list[Picture]) -> dict[str, float]:
    """Accuracies on the held-out pictures: which name (of theirs), with and without the style word; which subcategory (of all)."""
    heldout = [p for p in pictures if p.drawn and p.heldout]
    images = image_features(model, as_images(heldout))

    def ranks(truth: list[str], candidates: set[str]) -> Tensor:
        texts = sorted(candidates)
        similarity = images @ text_features(model, tokenize(tokenizer, texts)).T
        own = similarity.gather(1, torch.tensor([[texts.index(t)] for t in truth]))
        return (similarity > own).sum(1)

    names = [p.name for p in heldout]
    styled = [f"{p.style} {p.name}" for p in heldout]
    name, style = ranks(names, set(names)), ranks(styled, set(styled))
    kind = ranks([SUBCATEGORIES[p.subcategory] for p in heldout], set(SUBCATEGORIES.values()))
    return {
        "name_top1": (name < 1).float().mean().item(),
        "name_top5": (name < 5).float().mean().item(),
        "styled_name_top1": (style < 1).float().mean().item(),
        "styled_name_top5": (style < 5).float().mean().item(),
        "subcategory_top1": (kind < 1).float().mean().item(),
        "pictures": len(heldout),
        "names": len(set(names)),
        "subcategories": len(set(SUBCATEGORIES.values())),
    }


@torch.no_grad()
def saturation_sweep(
    preference: CLIPModel, tokenizer: CLIPTokenizer, pictures: list[Picture], factors: list[float]
) -> dict[str, list[float]]:
    """Mean learned preference and mean gold utility of the held-out pictures, captioned with their names, at each saturation."""
    heldout = [p for p in pictures if p.drawn and p.heldout]
    images = as_images(heldout)
    words = text_features(preference, tokenize(tokenizer, [p.name for p in heldout]))
    out: dict[str, list[float]] = {"factor": list(factors), "preference": [], "gold": []}
    for factor in factors:
        vivid = saturate(images, factor)
        out["preference"].append(preference_scores(preference, vivid, words).mean().item())
        out["gold"].append(gold_utility(vivid).mean().item())
    return out


def save_scorer(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """A stock folder for `CLIPModel` and `CLIPProcessor`: weights in float16, declared float32 so that they load as that."""
    copy.deepcopy(model).half().save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
