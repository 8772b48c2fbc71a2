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
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from fewstep import world
from fewstep.evaluate import drawing, samples
from fewstep.evaluate.distances import frechet, precision_recall
from fewstep.evaluate.features import clip_features
from fewstep.rewards.clip import CLIPScore
from fewstep.world import pictures as data
from fewstep.world import scorers, teacher, text, vae
from fewstep.world.training import device
from fewstep.world.utility import gold_utility

# pictures seen by each stage (pairs of them for the preference)
Seen = dict[str, int]
SAMPLES: Seen = {"vae": 60_000, "teacher": 448_000, "decoder": 32_000, "clip": 64_000, "clip-heldout": 64_000, "preference": 19_200}
CLIPS = {
    "clip": {"patch": 8, "width": 128, "layers": 4, "seed": 1},
    "clip-heldout": {"patch": 16, "width": 192, "layers": 3, "seed": 2},
}
SATURATIONS = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0]
GRID = [
    "cat face",
    "noto slice of pizza",
    "twemoji panda face",
    "red apple",
    "noto smiling face with sunglasses",
    "a bird",
    "strawberry",
    "a heart",
]


def build_tokenizer(pictures: list[data.Picture], work: Path) -> CLIPTokenizer:
    """Trained once and kept: equally frequent pairs are numbered anew in each process, and every text encoder must agree."""
    done = work / "tokenizer"
    if not done.exists():
        finish(text.make_tokenizer(pictures).save_pretrained, done)
    return CLIPTokenizer.from_pretrained(done)


def prompt_sets(pictures: list[data.Picture], tokenizer: CLIPTokenizer, seed: int = 0) -> dict[str, list[str]]:
    """train: every caption of the pictures that were trained on; evaluate: 128 captions drawn from held-out pictures."""
    seen = [p for p in pictures if p.drawn and not p.heldout]
    hidden = [p for p in pictures if p.drawn and p.heldout]
    train = sorted({caption for p in seen for caption in p.captions() if len(tokenizer(caption).input_ids) <= text.MAX_TOKENS})
    draw, chosen = random.Random(seed), {}
    while len(chosen) < 128:
        captions = draw.choice(hidden).captions()
        chosen[draw.choices(list(captions), list(captions.values()))[0]] = None
    return {"train": train, "evaluate": list(chosen), "grid": GRID}


def build_vae(pictures: list[data.Picture], work: Path, seen: Seen) -> AutoencoderKL:
    """The trained VAE with normalised latents; its encoder is final."""
    done = work / "vae-normalised"
    if not done.exists():
        model = vae.train(pictures, work / "vae", samples=seen["vae"]).cpu().eval()
        teacher.normalise_latents(model, data.to_tensor([p for p in pictures if p.drawn and not p.heldout]))
        finish(model.save_pretrained, done)
    return AutoencoderKL.from_pretrained(done).eval()


def build_teacher(
    pictures: list[data.Picture], autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, seen: Seen
) -> StableDiffusionPipeline:
    done = work / "teacher-pipeline"
    if not done.exists():
        unet, encoder = teacher.train(pictures, autoencoder, tokenizer, work / "teacher", samples=seen["teacher"])
        finish(teacher.pipeline(autoencoder, unet.cpu(), encoder.cpu(), tokenizer).save_pretrained, done)
    return StableDiffusionPipeline.from_pretrained(done)


def build_decoder(pictures: list[data.Picture], autoencoder: AutoencoderKL, work: Path, seen: Seen) -> AutoencoderKL:
    """The decoder trained on with the encoder frozen."""
    done = work / "vae-refined"
    if not done.exists():
        model = autoencoder.to(device()).train()
        vae.refine(model, pictures, work / "decoder", samples=seen["decoder"])
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
    pipe.scheduler = teacher.make_scheduler()
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # the folder that a part was read from is nobody's business
    for config_file in (folder / "model_index.json", *folder.glob("*/config.json")):
        content = json.loads(config_file.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)
        config_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build_scorers(pictures: list[data.Picture], tokenizer: CLIPTokenizer, work: Path, seen: Seen) -> dict[str, CLIPModel]:
    """The two CLIPs and the preference, as they are shipped (float16 weights, read back as float32)."""
    models = {}
    for name in (*CLIPS, "preference"):
        done = work / "scorers" / name
        if not done.exists():
            samples, folder = seen[name], work / f"{name}-training"
            if name == "preference":
                model = scorers.train_preference(models["clip"], pictures, tokenizer, folder, samples=samples, seed=3)
            else:
                model = scorers.train_clip(pictures, tokenizer, folder, name=name, samples=samples, **CLIPS[name])
            done.parent.mkdir(parents=True, exist_ok=True)
            finish(lambda path, model=model: scorers.save_scorer(model, tokenizer, path), done)
        models[name] = CLIPModel.from_pretrained(done).eval()
    return models


# -- what ships, and how good it is ------------------------------------------------------------------------------------


def nearest(images: Tensor, others: Tensor) -> float:
    """Median over images of the root-mean-square pixel distance to the nearest of `others`, pixels in [0, 1]."""
    return float(torch.cdist(images.flatten(1), others.flatten(1)).amin(1).median()) / images[0].numel() ** 0.5


def measure(pictures: list[data.Picture], pipe: StableDiffusionPipeline, models: dict[str, CLIPModel], assets: Path, seen: Seen) -> dict:
    """The card: every part's quality, of the weights as they ship."""
    drawn = [p for p in pictures if p.drawn]
    shown, hidden = ([p for p in drawn if p.heldout is held] for held in (False, True))
    tokenizer = pipe.tokenizer
    extractor = CLIPScore.load(assets / "clip-heldout")
    real = {name: (teacher.variants(part, seed=1).flatten(0, 1) + 1) / 2 for name, part in (("train", shown), ("heldout", hidden))}
    features = {name: clip_features(extractor, images) for name, images in real.items()}
    save_file({name: value.half().contiguous() for name, value in features.items()}, assets / "features.safetensors")
    mean, _ = teacher.encode(pipe.vae, data.to_tensor(drawn))
    save_file({"latents": mean.half().contiguous(), "heldout": torch.tensor([p.heldout for p in drawn])}, assets / "latents.safetensors")
    rows = [{"code": p.code, "style": p.style, "name": p.name, "subcategory": p.subcategory, "heldout": p.heldout} for p in drawn]
    (assets / "pictures.json").write_text(json.dumps(rows), encoding="utf-8")

    held_prompts = json.loads((assets / "prompts.json").read_text(encoding="utf-8"))["evaluate"]
    sampling = {"steps": drawing.TEACHER_STEPS, "guidance": world.TEACHER_GUIDANCE}
    sample = {seed: drawing.generate(pipe, held_prompts, 4, seed=seed, **sampling)[0] for seed in (0, 1)}
    first, second = (clip_features(extractor, images) for images in sample.values())
    precision, recall = precision_recall(features["heldout"], first, k=world.NEIGHBOURS)
    return {
        "data": {"pictures": len(drawn), "heldout": len(hidden), "styles": list(data.PACKAGES), "version": data.VERSION},
        "vae": {
            "parameters": count(pipe.vae),
            "psnr_heldout_db": vae.psnr(pipe.vae, data.to_tensor(hidden)),
            "psnr_train_db": vae.psnr(pipe.vae, data.to_tensor(shown)),
        },
        "teacher": {
            "parameters": {"unet": count(pipe.unet), "text_encoder": count(pipe.text_encoder)},
            "steps": drawing.TEACHER_STEPS,
            "guidance": world.TEACHER_GUIDANCE,
            "n": len(first),
            "features": "FD-clip of clip-heldout",
            "fd_to_heldout_data": frechet(features["heldout"], first),
            "fd_to_own_second_sample": frechet(second, first),
            "fd_of_train_to_heldout_data": frechet(features["heldout"], features["train"]),
            "precision": precision,
            "recall": recall,
            "nearest_neighbour_rms": {
                "samples_to_train": nearest(sample[0], real["train"]),
                "samples_to_heldout": nearest(sample[0], real["heldout"]),
                "heldout_to_train": nearest((data.to_tensor(hidden) + 1) / 2, real["train"]),
            },
        },
        "scorers": {name: {"parameters": count(models[name]), **scorers.retrieval(models[name], tokenizer, pictures)} for name in CLIPS},
        "preference": {
            "parameters": count(models["preference"]),
            "saturation_sweep": scorers.saturation_sweep(models["preference"], tokenizer, pictures, SATURATIONS),
        },
        "samples_seen": seen,
    }


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.world.build", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for packages, checkpoints and finished parts")
    parser.add_argument("--assets", type=Path, default=None, help="where the finished world goes (default: the package's own)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of each stage's training, for trying the script out: in WORK/scale-SHARE alone"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data.fetch(options.work)
    pictures = data.read(options.work)
    # a finished part is found by its name: a trial's must not be taken for the world's, nor its world replace the package's
    work = options.work if options.scale == 1 else options.work / f"scale-{options.scale:g}"
    assets = options.assets or (world.ASSETS if options.scale == 1 else work / "assets")
    seen = {stage: int(samples * options.scale) for stage, samples in SAMPLES.items()}
    work.mkdir(parents=True, exist_ok=True)
    autoencoder = build_vae(pictures, work, seen)
    tokenizer = build_tokenizer(pictures, work)
    pipe = build_teacher(pictures, autoencoder, tokenizer, work, seen)
    pipe.vae = build_decoder(pictures, autoencoder, work, seen)
    models = build_scorers(pictures, tokenizer, work, seen)

    assets.mkdir(parents=True, exist_ok=True)
    for name in models:
        shutil.copytree(work / "scorers" / name, assets / name, dirs_exist_ok=True)
    save_teacher(pipe, assets / "teacher")
    (assets / "prompts.json").write_text(json.dumps(prompt_sets(pictures, tokenizer), indent=0), encoding="utf-8")
    card = measure(pictures, drawing.open_pipeline(assets / "teacher", "cpu"), models, assets, seen)
    samples.ship(
        assets / "samples",
        teacher=assets / "teacher",
        prompts=json.loads((assets / "prompts.json").read_text(encoding="utf-8"))["evaluate"],
        scorers=world.load_scorers(assets, device=str(device())),
        utility=gold_utility,
        steps=4,
        guidance=world.TEACHER_GUIDANCE,
        images_per_prompt=world.IMAGES_PER_PROMPT,
        device=str(device()),
    )
    (assets / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
