"""The embedded world: what ships, and the parts of the script that made it."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fewstep import checkpoint, world
from fewstep.evaluate import drawing, samples, store
from fewstep.evaluate.distances import frechet
from fewstep.world import build, teacher, text, training, vae
from fewstep.world.pictures import Picture, augment, is_heldout, tidy, to_tensor


def picture(name="cat face", style="noto", subcategory="cat-face", category="Smileys & Emotion", seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Picture(image, "1F431", style, name, subcategory, category, False)


def test_no_submodule_hides_a_function_of_the_world():
    """Importing fewstep.world.NAME sets that name on the package, over whatever it defined."""
    import inspect
    import pkgutil

    submodules = {module.name for module in pkgutil.iter_modules(world.__path__)}
    defined = {name for name in vars(world) if not inspect.ismodule(getattr(world, name))}
    source = {line.split("(")[0].removeprefix("def ") for line in inspect.getsource(world).splitlines() if line.startswith("def ")}
    assert {"prompts", "load_scorers"} <= source <= defined and not submodules & source


def test_assets_are_small_and_hold_no_pickle():
    files = [path for path in world.ASSETS.rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    assert sum(sizes) <= 40e6 and max(sizes) < 16e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ""}
    assert "Twemoji" in (world.ASSETS / "NOTICE").read_text() and "CC-BY 4.0" in (world.ASSETS / "NOTICE").read_text()


@pytest.mark.parametrize("scale", [None, "0.5"])
def test_a_trial_of_the_script_leaves_the_world_and_its_parts_alone(tmp_path, monkeypatch, scale):
    """The packages alone are shared: a finished part is found by its folder, whatever it was trained with."""
    read, folders, shipped = [], [], []

    def part(result):
        def build_part(*told):
            folders.extend(at for at in told if isinstance(at, Path))
            return result

        return build_part

    monkeypatch.setattr(build.data, "fetch", read.append)
    monkeypatch.setattr(build.data, "read", read.append)
    for name, made in (("vae", None), ("tokenizer", None), ("teacher", SimpleNamespace()), ("decoder", None), ("scorers", {})):
        monkeypatch.setattr(build, f"build_{name}", part(made))
    monkeypatch.setattr(build, "save_teacher", lambda pipe, folder: None)
    monkeypatch.setattr(build, "prompt_sets", lambda *told: {"evaluate": []})
    monkeypatch.setattr(build, "measure", lambda *told: {"samples_seen": told[-1]})
    monkeypatch.setattr(build.drawing, "open_pipeline", lambda *told: None)
    monkeypatch.setattr(build.samples, "ship", lambda folder, **how: shipped.append(folder))
    monkeypatch.setattr(world, "load_scorers", lambda *told, **how: {})
    monkeypatch.setattr(world, "ASSETS", tmp_path / "package")
    work = tmp_path / "work"
    threads = ["--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["build", "--work", str(work), *threads, *(["--scale", scale] if scale else [])])
    build.main()
    own, assets = (work / "scale-0.5", work / "scale-0.5" / "assets") if scale else (work, tmp_path / "package")
    assert read == [work, work] and set(folders) == {own} and shipped == [assets / "samples"]
    seen = json.loads((assets / "card.json").read_text())["samples_seen"]
    assert seen["vae"] == (30_000 if scale else 60_000) and seen.keys() == build.SAMPLES.keys()
    assert (tmp_path / "package").exists() is not bool(scale)


def test_teacher_loads_in_stock_diffusers_as_float32():
    pipe = DiffusionPipeline.from_pretrained(world.TEACHER)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.scheduler.alphas_cumprod[-1] == 0  # t = 1 is pure noise
    assert pipe.tokenizer.model_max_length == text.MAX_TOKENS
    pipe.set_progress_bar_config(disable=True)
    images = pipe("cat face", num_inference_steps=2, guidance_scale=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (1, 3, 64, 64) and bool(torch.isfinite(images).all())


def test_prompts_are_different_and_fit_the_tokenizer():
    pipe_tokenizer = DiffusionPipeline.from_pretrained(world.TEACHER).tokenizer
    train, evaluate, grid = (world.prompts(split) for split in ("train", "evaluate", "grid"))
    assert len(set(train)) == len(train) > 1000 and len(set(evaluate)) == len(evaluate) == 128
    for prompt in (*train, *grid):
        assert len(pipe_tokenizer(prompt).input_ids) <= text.MAX_TOKENS
    # a style may be new to an emoji (held out), the emoji itself never
    assert {prompt.removeprefix("noto ").removeprefix("twemoji ") for prompt in grid} <= set(train)


def test_reference_data_and_card_agree():
    features = load_file(world.ASSETS / "features.safetensors")
    latents = load_file(world.ASSETS / "latents.safetensors")
    rows = json.loads((world.ASSETS / "pictures.json").read_text())
    card = json.loads((world.ASSETS / "card.json").read_text())
    assert len(rows) == len(latents["latents"]) == card["data"]["pictures"] == 918
    assert int(latents["heldout"].sum()) == card["data"]["heldout"] == sum(row["heldout"] for row in rows)
    seen = world.latents()  # by a discriminator
    hidden = {tuple(one.flatten().tolist()) for one in latents["latents"][latents["heldout"]]}
    assert len(seen) == 918 - card["data"]["heldout"] and not hidden & {tuple(one.flatten().tolist()) for one in seen}
    assert latents["latents"].float().std().item() == pytest.approx(1, abs=0.05)
    heldout, train = features["heldout"].float(), features["train"].float()
    assert len(heldout) == world.VARIANTS * card["data"]["heldout"]
    torch.testing.assert_close(heldout.pow(2).mean(1), torch.ones(len(heldout)), atol=0.01, rtol=0)
    assert frechet(heldout, train) == pytest.approx(card["teacher"]["fd_of_train_to_heldout_data"], rel=0.02)


def test_the_learned_preference_can_be_hacked():
    """The card's saturation sweep: past the peak of gold, the learned preference still rises."""
    sweep = json.loads((world.ASSETS / "card.json").read_text())["preference"]["saturation_sweep"]
    gold, learned = np.array(sweep["gold"]), np.array(sweep["preference"])
    peak = int(gold.argmax())
    later = sweep["factor"].index(2.0)
    assert 1.0 <= sweep["factor"][peak] < 2.0
    assert gold[later] < gold[peak] - 0.3 and learned[later] > learned[peak]


def test_each_of_the_worlds_scorers_is_of_its_kind():
    found = world.load_scorers()
    learned = float(found["preference"].model.logit_scale.exp())
    assert {name: scorer.scale for name, scorer in found.items()} == {"clip": 100.0, "clip-heldout": 100.0, "preference": learned}


def test_captions_are_a_distribution_over_three_grains():
    captions = picture().captions()
    assert sum(captions.values()) == pytest.approx(1)
    assert {"cat face", "noto cat face", "a cat face", "smileys and emotion", "noto smileys and emotion"} <= captions.keys()
    assert tidy("SMILING FACE WITH HEART-EYES, big") == "smiling face with heart eyes big"


def test_an_emoji_is_held_out_in_one_style_at_most():
    codes = [f"{i:05X}" for i in range(0x1F300, 0x1F300 + 2000)]
    noto, twemoji = ([is_heldout(code, style) for code in codes] for style in ("noto", "twemoji"))
    assert not any(a and b for a, b in zip(noto, twemoji, strict=True))
    assert sum(noto) + sum(twemoji) == pytest.approx(500, abs=60)  # one picture in eight of 4000


def test_augmentation_without_jitter_is_a_flip_at_most_and_white_outside():
    images = to_tensor([picture(seed=i) for i in range(8)])
    out = augment(images, torch.Generator().manual_seed(0))
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(out, images, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and any(same) and any(mirrored)
    moved = augment(-torch.ones(4, 3, 64, 64), torch.Generator().manual_seed(0), shift=0.9)
    assert moved.max() == pytest.approx(1)


def test_normalised_latents_decode_to_the_same_picture():
    torch.manual_seed(0)
    model = vae.make().eval()
    images = to_tensor([picture(seed=i) for i in range(4)])
    with torch.no_grad():
        before = model.decode(model.encode(images).latent_dist.mode()).sample
        teacher.normalise_latents(model, images)
        latents = model.encode(images).latent_dist.mode()
        after = model.decode(latents).sample
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(16), atol=1e-3, rtol=0)


def test_what_is_measured_with_are_captions_of_held_out_pictures_alone():
    def made(kind, name):
        return dataclasses.replace(picture(name=f"{kind} {name}"), heldout=kind == "hidden")

    pictures = [made(kind, str(i)) for kind in ("seen", "hidden") for i in range(40)] + [made("seen", "x " * text.MAX_TOKENS)]
    sets = build.prompt_sets(pictures, lambda caption: SimpleNamespace(input_ids=caption.split()))
    everything, short = ({c for p in pictures if p.heldout is held for c in p.captions()} for held in (True, False))
    assert len(set(sets["evaluate"])) == 128 and set(sets["evaluate"]) <= everything
    assert set(sets["train"]) == {caption for caption in short if len(caption.split()) <= text.MAX_TOKENS} < short


def test_the_first_variant_is_the_picture_itself():
    pictures = [picture(seed=i) for i in range(3)]
    copies = teacher.variants(pictures, seed=1)
    assert copies.shape == (world.VARIANTS, 3, 3, 64, 64) and torch.equal(copies[0], to_tensor(pictures))
    assert len(copies.flatten(1).unique(dim=0)) == world.VARIANTS


def test_the_psnr_is_of_pixels_between_zero_and_one():
    class Off:
        def encode(self, x):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

        def decode(self, x):
            return SimpleNamespace(sample=x + 0.2)

    images = torch.zeros(70, 3, 4, 4)
    assert vae.psnr(Off(), images) == pytest.approx(20, abs=1e-4)  # a tenth of the range
    images[:35] = 0.9  # clipped, so half as far off
    assert vae.psnr(Off(), images) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_the_training_loop_resumes_to_the_bit(tmp_path):
    def model_after(folder, stops):
        for steps in stops:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 1)
            goal = torch.tensor([[1.0, -2.0, 0.5]])

            def loss(generator, model=model, goal=goal):
                x = torch.randn(16, 3, generator=generator)
                return (model(x) - x @ goal.T).pow(2).mean()

            stop = steps  # the schedule knows the whole length; a stop is an exception in the middle
            calls = iter(range(stop))

            def limited(generator, loss=loss, calls=calls):
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return loss(generator)

            try:
                training.fit(model, limited, steps=60, lr=0.3, folder=folder, name="toy", warmup=5, save_every=10)
            except KeyboardInterrupt:
                continue
        return model.weight.detach()

    whole = model_after(tmp_path / "whole", [100])
    broken = model_after(tmp_path / "broken", [20, 100])
    assert torch.equal(whole, broken)
    torch.testing.assert_close(whole, torch.tensor([[1.0, -2.0, 0.5]]), atol=0.05, rtol=0)
    _, last = checkpoint.newest(tmp_path / "whole")
    assert torch.equal(whole, last["ema"]["shadow_params"][0])  # what is left is the average
    assert not torch.equal(whole, last["module"]["weight"])


def test_the_shipped_samples_are_of_this_teacher_and_these_scorers():
    """A change of teacher, scorer, prompt or utility needs them drawn anew (`samples.ship`); evaluation would draw them each time."""
    from fewstep.world.utility import gold_utility

    pipe = drawing.open_pipeline(world.TEACHER, "cpu")
    prompts = world.prompts("evaluate")
    content = samples.content_of(pipe, prompts, world.IMAGES_PER_PROMPT, drawing.BATCH, world.load_scorers(), gold_utility)
    for row in drawing.teacher_rows(4, world.TEACHER_GUIDANCE, 0):
        kept = store.read(samples.shipped_path(world.SAMPLES, row, content))
        assert kept is not None, row
        assert kept["features/clip-heldout"].shape == (len(prompts) * world.IMAGES_PER_PROMPT, 64)
