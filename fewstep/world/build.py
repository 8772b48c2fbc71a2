"""Make the embedded world from the raw emoji packages: `python -m fewstep.world.build`.

Data, tokenizer, VAE, teacher, scorers, reference features, and a card with each part's measured quality. Every stage
checkpoints and is skipped when it is finished, so a stopped build goes on where it was. About two and a half hours on
two CPU cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file

from fewstep import world
from fewstep.world import pictures as data
from fewstep.world import scorers, teacher, text, vae
from fewstep.world.training import device

# pictures seen by each stage
SAMPLES = {"vae": 60_000, "teacher": 448_000, "decoder": 32_000, "clip": 160_000, "clip-heldout": 200_000, "preference": 30_000}
GRID = ["cat face", "noto slice of pizza", "twemoji panda face", "red apple", "noto smiling face with sunglasses", "a bird", "strawberry", "a heart"]


def prompt_sets(pictures: list[data.Picture], seed: int = 0) -> dict[str, list[str]]:
    """train: every caption of the pictures that were trained on; evaluate: 128 captions drawn from held-out pictures."""
    seen = [p for p in pictures if p.drawn and not p.heldout]
    hidden = [p for p in pictures if p.drawn and p.heldout]
    train = sorted({caption for p in seen for caption in p.captions()})
    draw, chosen = random.Random(seed), {}
    while len(chosen) < 128:
        captions = draw.choice(hidden).captions()
        chosen[draw.choices(list(captions), list(captions.values()))[0]] = None
    return {"train": train, "evaluate": list(chosen), "grid": GRID}


def build_vae(pictures: list[data.Picture], work: Path, scale: float) -> AutoencoderKL:
    """The trained VAE with normalised latents; its encoder is final."""
    done = work / "vae-normalised"
    if not done.exists():
        model = vae.train(pictures, work / "vae", samples=int(SAMPLES["vae"] * scale)).cpu().eval()
        teacher.normalise_latents(model, data.to_tensor([p for p in pictures if p.drawn and not p.heldout]))
        finish(model.save_pretrained, done)
    return AutoencoderKL.from_pretrained(done).eval()


def build_teacher(pictures: list[data.Picture], autoencoder: AutoencoderKL, work: Path, scale: float) -> StableDiffusionPipeline:
    done = work / "teacher-pipeline"
    if not done.exists():
        tokenizer = text.make_tokenizer(pictures)
        unet, encoder = teacher.train(pictures, autoencoder, tokenizer, work / "teacher", samples=int(SAMPLES["teacher"] * scale))
        finish(teacher.pipeline(autoencoder, unet.cpu(), encoder.cpu(), tokenizer).save_pretrained, done)
    return StableDiffusionPipeline.from_pretrained(done)


def build_decoder(pictures: list[data.Picture], autoencoder: AutoencoderKL, work: Path, scale: float) -> AutoencoderKL:
    """The decoder trained on with the encoder frozen."""
    done = work / "vae-refined"
    if not done.exists():
        model = autoencoder.to(device()).train()
        vae.refine(model, pictures, work / "decoder", samples=int(SAMPLES["decoder"] * scale))
        finish(model.cpu().save_pretrained, done)
    return AutoencoderKL.from_pretrained(done).eval()


def finish(save, folder: Path) -> None:
    """Save beside the final name and rename, so that a folder that exists is complete."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    temporary.rename(folder)


def save_teacher(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """fp16 weights that load as float32: the text encoder's config says so, since transformers follows the file otherwise."""
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    for config_file in folder.glob("*/config.json"):  # the folder that a part was read from is nobody's business
        content = json.loads(config_file.read_text())
        content.pop("_name_or_path", None)
        config_file.write_text(json.dumps(content, indent=2) + "\n")
