import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from fewstep.evaluate import drawing, evaluation, measure, protocol, samples, store, tables
from fewstep.evaluate.distances import FeatureSet, diversity, frechet, precision_recall
from fewstep.evaluate.features import Extractor, clip_features, in_batches, scaled
from fewstep.evaluate.measure import caption_scores
from fewstep.evaluate.pictures import Pictures
from fewstep.rewards.base import Reward
from fewstep.rewards.clip import CLIPScore, PickScore
from fewstep.rewards.pixels import Preprocess
from fewstep.types import Sample

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
PREPROCESS = Preprocess(16, (16, 16), tuple(MEAN), tuple(STD), "bilinear")
PROMPTS = ["cat", "dog", "a cat", "a dog", "pie", "a pie"]
WORDS = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "cat</w>": 3, "dog</w>": 4, "pie</w>": 5}


def tiny_tokenizer(*, end=1, pad="<|endoftext|>"):
    """end: the number of the token that ends a text; the one that had it takes its."""
    letters = {piece: 6 + i for i, piece in enumerate("acdegiopt")}
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("p", "i"), ("pi", "e</w>")]
    pieces = {piece: 15 + i for i, piece in enumerate(["ca", "do", "pi", "t</w>", "g</w>", "e</w>"])}
    number = {1: end, end: 1}
    vocab = {word: number.get(i, i) for word, i in (WORDS | letters | pieces).items()}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=8)


def text_config():
    return CLIPTextConfig(
        vocab_size=21, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8,
        projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def tiny_clip(seed=0, size=16):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=size, patch_size=size // 2,
        projection_dim=8,
    )  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    with torch.no_grad():  # random weights as they come give every picture nearly the same features
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    return model


def tiny_pipeline(seed=0):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=1.0,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        clip_sample=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(text_config()), tokenizer=tiny_tokenizer(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scorer():
    return CLIPScore(tiny_clip(), tiny_tokenizer(), PREPROCESS)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def pictures(n, height=16, width=16, seed=0):
    """Whole 8-bit values in [0, 1], smooth enough that resizing is well behaved."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round() / 255


def to_pil(images):
    return [Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for image in images]


# CLIPScore and PickScore


def test_score_equals_the_model(scorer):
    images = pictures(6)
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        output = scorer.model(pixel_values=pixels, **tokens)
    cosine = (output.image_embeds * output.text_embeds).sum(1)
    assert torch.allclose(scorer.score(images, PROMPTS), 100 * cosine, atol=1e-4)
    pick = PickScore(scorer.model, scorer.tokenizer, PREPROCESS)
    assert torch.allclose(pick.score(images, PROMPTS), output.logits_per_image.diagonal(), atol=1e-4)


def test_features_are_unit_and_batches_do_not_matter(scorer):
    images = pictures(7)
    features = scorer.image_features(images)
    assert torch.allclose(features.norm(dim=1), torch.ones(7))
    assert torch.allclose(in_batches(scorer.image_features, images, batch=3), features, atol=1e-6)
    fd = clip_features(scorer, images, batch=2)
    assert torch.allclose(fd, features * 8**0.5, atol=1e-6)
    assert fd.square().mean() == pytest.approx(1, abs=1e-5)
    again = scorer.text_features(["cat", "a dog", "cat"])
    assert torch.equal(again[0], again[2])
    assert torch.allclose(again[1:2], scorer.text_features(["a dog"]), atol=1e-6)
    long = scorer.text_features(["cat dog pie " * 9])  # truncated to what the model can read
    assert long.shape == (1, 8)


def test_the_gradient_reaches_the_pixels_and_no_weight(scorer):
    images = pictures(3).double().requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(images, PROMPTS[:3]).sum(), images)
    assert gradient.shape == images.shape
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    assert not any(p.requires_grad for p in scorer.model.parameters())
    assert not scorer.model.training
    step = 4 / 255 * gradient.sign()  # in 8 bits
    with torch.no_grad():
        assert scorer.score(images + step, PROMPTS[:3]).sum() > scorer.score(images, PROMPTS[:3]).sum()


def test_a_scorer_is_a_reward(scorer):
    latents = pictures(2).requires_grad_()
    decoded = []

    def decode(x0):
        decoded.append(1)
        return x0 * 1

    sample = Sample(latents, torch.ones(2), None, ["cat", "dog"], torch.tensor([0, 1]), decode=decode)
    assert isinstance(scorer, Reward)
    with torch.enable_grad():
        signal = scorer(sample)
    (expected,) = torch.autograd.grad(scorer.score(latents, ["cat", "dog"]).sum(), latents)
    torch.testing.assert_close(signal.direction, expected)
    assert not signal.score.requires_grad
    assert torch.allclose(signal.score, scorer.score(latents, ["cat", "dog"]))
    assert sample.image.requires_grad  # other rewards can still differentiate the picture decoded here
    assert len(decoded) == 1
    with pytest.raises(ValueError, match="2 pictures but 1"):
        scorer.score(latents, ["cat"])


def test_a_scorer_is_read_from_its_folder(scorer, tmp_path):
    scorer.model.save_pretrained(tmp_path)
    scorer.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config.json: cannot be read"):
        CLIPScore.load(tmp_path)
    config = {"image_mean": MEAN, "image_std": STD, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    again = PickScore.load(tmp_path)
    images = pictures(2)
    assert torch.allclose(again.image_features(images), scorer.image_features(images), atol=1e-6)
    assert torch.allclose(again.text_features(PROMPTS), scorer.text_features(PROMPTS), atol=1e-6)
    assert again.preprocess == Preprocess(16, (16, 16), tuple(MEAN), tuple(STD), "bicubic")
    assert store.fingerprint(again.model) == store.fingerprint(scorer.model)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))  # which says nothing of pictures
    assert CLIPScore.load(tmp_path).preprocess == again.preprocess
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config | {"resample": 2}}))
    assert CLIPScore.load(tmp_path).preprocess == again.preprocess._replace(resample="bilinear")
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 0}))
    with pytest.raises(ValueError, match="resample"):
        CLIPScore.load(tmp_path)


@pytest.mark.parametrize("entry", [{"do_normalize": False}, {"do_rescale": False}, {"do_resize": False}, {"rescale_factor": 1 / 127.5}])
def test_a_processor_that_does_otherwise_is_refused(tmp_path, entry):
    config = {"image_mean": MEAN, "image_std": STD, "resample": 3, "do_normalize": True, "rescale_factor": 0.00392156862745098}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    assert CLIPScore.read_preprocess(tmp_path, 16) == PREPROCESS._replace(resample="bicubic")
    path.write_text(json.dumps(config | entry))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: says {next(iter(entry))}: .*; correct the file"):
        CLIPScore.read_preprocess(tmp_path, 16)


def test_a_model_with_a_processor_beside_it_may_name_its_class(scorer, tmp_path):
    for folder in ("model", "beside"):
        (tmp_path / folder).mkdir()
    scorer.model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    scorer.tokenizer.save_pretrained(tmp_path / "beside")
    (tmp_path / "beside" / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, "resample": 3}))
    assert CLIPScore.load(tmp_path / "model", processor=tmp_path / "beside").preprocess == PREPROCESS._replace(resample="bicubic")


# Sampling


def test_generate_is_reproducible_and_laid_out_by_prompt(pipe):
    options = {"steps": 2, "guidance": 3.0, "batch": 4}
    states = [drawing.noise_generator(seed, index).initial_seed() for seed in (1, 2) for index in (0, 1)]
    assert len(set(states)) == 4
    images, seconds = drawing.generate(pipe, PROMPTS[:3], 3, seed=1, **options)
    assert images.shape == (9, 3, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    assert seconds > 0
    again, _ = drawing.generate(pipe, PROMPTS[:3], 3, seed=1, **options)
    assert torch.equal(images, again)
    assert not torch.equal(images, drawing.generate(pipe, PROMPTS[:3], 3, seed=2, **options)[0])
    assert len({image.numpy().tobytes() for image in images}) == 9  # no noise is used twice
    chunks = [["cat"] * 3 + ["dog"], ["dog"] * 2 + ["a cat"] * 2, ["a cat"]]
    by_hand = [
        pipe(
            chunk, num_inference_steps=2, guidance_scale=3.0, generator=drawing.noise_generator(1, i), output_type="pt"
        ).images for i, chunk in enumerate(chunks)
    ]  # fmt: skip
    assert torch.equal(images, torch.cat(by_hand))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("name", ["its own", *drawing.SOLVERS])
def test_network_evaluations_are_those_made(pipe, guidance, name):
    own, rows = pipe.scheduler, []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        pipe.scheduler = own if name == "its own" else drawing.solver(name, own.config)
        images, _ = drawing.generate(pipe, PROMPTS[:2], 2, steps=4, guidance=guidance, seed=0)
        assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    finally:
        handle.remove()
        pipe.scheduler = own
    assert torch.isfinite(images).all()
    assert sum(rows) / len(images) == drawing.network_evaluations(4, guidance)


def test_a_flow_schedule_is_refused():
    for config in (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"beta_schedule": "linear", "prediction_type": "flow_prediction"},
    ):
        with pytest.raises(ValueError, match="beta"):
            drawing.solver("DDIM", config)


@pytest.mark.parametrize("name", drawing.SOLVERS)
def test_a_solver_begins_at_pure_noise_whatever_steps_its_teacher_takes(name):
    for spacing in ("leading", "linspace"):
        solver = drawing.solver(name, {"beta_schedule": "scaled_linear", "timestep_spacing": spacing})
        solver.set_timesteps(4)
        assert solver.timesteps.tolist() == [999, 749, 499, 249]


def error_of_a_gaussian_teacher(scheduler, steps, mean=0.7, deviation=0.5):
    """The largest distance of what a scheduler makes of its noise to where the teacher's ODE ends, for latents of N(mean, deviation^2).

    There x_t has mean alpha mean and variance C = alpha^2 deviation^2 + sigma^2, E[x0 | x_t] = mean + alpha deviation^2 (x_t - alpha mean)
    / C, and the ODE keeps (x_t - alpha mean) / sqrt(C).
    """
    scheduler.set_timesteps(steps)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    x = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, kept = x * getattr(scheduler, "init_noise_sigma", 1.0), None
    for t in scheduler.timesteps:
        if kind == "flow_prediction":
            alpha, sigma = 1 - float(t) / 1000, float(t) / 1000
        else:
            alpha, sigma = (float(value) ** 0.5 for value in (scheduler.alphas_cumprod[int(t)], 1 - scheduler.alphas_cumprod[int(t)]))
        xt = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        variance = (alpha * deviation) ** 2 + sigma**2
        kept = (xt - alpha * mean) / variance**0.5 if kept is None else kept
        x0 = mean + alpha * deviation**2 / variance * (xt - alpha * mean)
        eps = (xt - alpha * x0) / sigma
        output = {"flow_prediction": eps - x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]
        x = scheduler.step(output, t, x).prev_sample.double()
    return (x - (mean + deviation * kept)).abs().max().item()


# as folders have them that were saved from a pipeline: some published ones say clip_sample beside, others do not
SCHEDULES = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Sana": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "SD": PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
    "SDXL": EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
    "PixArt": DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    "v": DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_solver_of_a_teacher_solves_its_ode(name):
    found = drawing.schedulers_of(SimpleNamespace(scheduler=SCHEDULES[name]))
    assert list(found) == ["its own", *(drawing.SOLVERS if name not in ("flow", "Sana") else [])]
    for scheduler in found.values():
        coarse, fine = (error_of_a_gaussian_teacher(scheduler, steps) for steps in (10, 100))
        assert fine < 0.06 and fine < coarse / 4, (type(scheduler).__name__, coarse, fine)


# Measuring

CLIP = Extractor("clip", "fd_clip")


def test_caption_scores_by_hand(scorer):
    features, group = scorer.image_features(pictures(6)), torch.tensor([0, 0, 1, 1, 2, 2])
    own, above = caption_scores(features, scorer, PROMPTS[:3], group)
    assert torch.allclose(own.float(), scorer.score(pictures(6), [PROMPTS[i] for i in group]), atol=1e-4)
    # every shuffle that maps no picture to its own prompt, averaged
    others = [scorer.score(pictures(6), [PROMPTS[(i + k) % 3] for i in group.tolist()]) for k in (1, 2)]
    assert torch.allclose(above.float(), own.float() - sum(others) / 2, atol=1e-4)


def observed_of(scorer, images):
    return samples.observe(images, samples.looks({"clip": scorer}, lambda x: x.mean((1, 2, 3))), [""] * len(images))


def test_a_shipped_sample_is_found_under_other_names_and_not_for_other_weights():
    """Libraries rename weights between their versions; `fingerprint` tells such apart."""

    def network(inner, bias=0.0):
        module = torch.nn.ModuleDict({inner: torch.nn.Linear(2, 3), "last": torch.nn.Linear(3, 2)})
        for p in module.parameters():
            torch.nn.init.constant_(p, p.numel() + bias)
        return module

    one, renamed = network("first"), network("model")
    assert store.nameless(one) == store.nameless(renamed) and store.fingerprint(one) != store.fingerprint(renamed)
    assert store.nameless(one) != store.nameless(network("first", bias=1e-3)) != store.nameless(network("first").half())


def test_a_shipped_sample_is_of_its_schedule_alone():
    """Whatever else a version of diffusers writes into its configuration."""

    def content(**changed):
        pipe = SimpleNamespace(components={}, scheduler=SimpleNamespace(config={"beta_schedule": "linear"} | changed))
        return samples.content_of(pipe, ["a cat"], 2, 4, {}, None)

    for key in ("prediction_type", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr", "timestep_spacing"):
        assert content(**{key: "another"}) != content()
    assert content(_diffusers_version="another") == content()


def test_measure_equals_the_metrics_by_hand(scorer):
    images, group = pictures(18), torch.arange(6).repeat_interleave(3)
    data, teacher = clip_features(scorer, pictures(30, seed=1)), clip_features(scorer, pictures(18, seed=2))
    others = {"data": {"clip": FeatureSet(data)}, "teacher": {"clip": FeatureSet(teacher)}}
    metrics = measure.measure(observed_of(scorer, images), PROMPTS, 3, {"clip": scorer}, extractors=[CLIP], **others, draws=20).metrics
    features = clip_features(scorer, images)
    # the covariances have eigenvalues that are zero but for rounding, 1e-16, and a distance sums their roots
    assert metrics["fd_clip_data"]["value"] == pytest.approx(frechet(features, data), abs=1e-6)
    assert metrics["fd_clip_teacher"]["value"] == pytest.approx(frechet(features, teacher), abs=1e-6)
    assert metrics["utility"]["value"] == pytest.approx(float(images.mean()), abs=1e-6)
    assert metrics["clip"]["value"] == pytest.approx(float(scorer.score(images, [PROMPTS[i] for i in group]).mean()), abs=1e-3)
    assert (metrics["precision"]["value"], metrics["recall"]["value"]) == pytest.approx(precision_recall(data, features))
    assert metrics["diversity"]["value"] == pytest.approx(diversity(features, group))
    assert set(metrics) == {"fd_clip_data", "fd_clip_teacher", "clip", "clip_over_shuffled", "utility", "precision", "recall", "diversity"}
    for name, m in metrics.items():
        assert m["low"] <= m["value"] <= m["high"], name


def test_the_interval_to_the_teacher_is_paired_by_prompt():
    """Prompts far apart, student and teacher near each other: which prompts were drawn is no part of the difference."""
    draw = torch.Generator().manual_seed(0)
    group = torch.arange(40).repeat_interleave(2)
    subject = 3 * torch.randn(40, 8, generator=draw)[group]
    unit = [torch.nn.functional.normalize(subject + 0.3 * torch.randn(80, 8, generator=draw), dim=1) for _ in range(2)]
    options = {"extractors": [CLIP], "draws": 50}
    prompts = [str(i) for i in range(40)]
    features, others = {"features/clip": unit[0]}, {"clip": FeatureSet(scaled(unit[1]))}
    teacher = measure.measure(features, prompts, 2, {}, teacher=others, **options).metrics["fd_clip_teacher"]
    data = measure.measure(features, prompts, 2, {}, data=others, **options).metrics["fd_clip_data"]
    assert teacher["value"] == pytest.approx(data["value"])
    assert teacher["high"] - teacher["low"] < 0.5 * (data["high"] - data["low"])


def test_measure_refuses_what_it_cannot_measure(scorer):
    observed, options = observed_of(scorer, pictures(18)), {"extractors": [CLIP], "draws": 5}
    with pytest.raises(ValueError, match="all different"):
        measure.measure(observed, ["cat"] * 6, 3, {"clip": scorer}, **options)
    with pytest.raises(ValueError, match="singular"):
        measure.measure(observed, PROMPTS, 3, {"clip": scorer}, data={"clip": FeatureSet(torch.randn(8, 8))}, **options)
    with pytest.raises(ValueError, match="it has 17 pictures, not 18"):
        measure.measure(observed, PROMPTS, 3, {"clip": scorer}, teacher={"clip": FeatureSet(torch.randn(17, 8))}, **options)
    scored = observed | {"features/clip": observed["features/clip"] * torch.nan}
    without = measure.measure(scored, PROMPTS, 3, {"clip": scorer}, draws=5)
    assert "clip" not in without.metrics
    assert without.left_out == dict.fromkeys(("clip", "clip_over_shuffled"), "18 of 18 pictures got no score")
    observed["features/clip"][2] = torch.nan
    with pytest.raises(ValueError, match="1 of 18 generated"):
        measure.measure(observed, PROMPTS, 3, {"clip": scorer}, **options)


def test_fingerprints_see_weights_and_schedules(pipe):
    before = protocol.pipeline_fingerprint(pipe)
    assert before == protocol.pipeline_fingerprint(tiny_pipeline())
    assert before != protocol.pipeline_fingerprint(tiny_pipeline(seed=1))
    other = tiny_pipeline()
    other.scheduler = drawing.solver("DDIM", dict(pipe.scheduler.config) | {"prediction_type": "epsilon"})
    assert before != protocol.pipeline_fingerprint(other)


# The whole evaluation


def brightness(images):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    tiny_pipeline(0).save_pretrained(root / "teacher")
    tiny_pipeline(1).save_pretrained(root / "student")
    return root


def run(folders, scorer, monkeypatch, **changes):
    monkeypatch.setattr(drawing, "TEACHER_STEPS", 5)
    options = {
        "teacher": folders / "teacher", "prompts": PROMPTS, "scorers": {"clip": scorer, "clip-heldout": scorer},
        "extractor": "clip-heldout", "utility": brightness, "data": clip_features(scorer, pictures(20)),
        "steps": 2, "images_per_prompt": 3, "draws": 10, "progress": False,
    }  # fmt: skip
    return evaluation.evaluate(folders / "student", **options | changes)


def test_evaluate_measures_the_student_beside_its_teacher(folders, scorer, tmp_path, monkeypatch):
    said = []
    report = run(folders, scorer, monkeypatch, cache=tmp_path / "cache", say=said.append)
    assert [row["name"] for row in report["rows"]] == [
        "student, 2 steps", "teacher, 5 steps", "teacher, 2 steps, DDIM", "teacher, 2 steps, DPM-Solver++", "teacher, 2 steps, UniPC",
    ]  # fmt: skip
    assert [row["metrics"]["network_evaluations"]["value"] for row in report["rows"]] == [2, 10, 4, 4, 4]
    assert all(row["n"] == 18 and row["sample"] == "drawn" for row in report["rows"])
    assert not said
    few = {row["name"]: row["metrics"]["fd_clip_teacher"]["value"] for row in report["rows"][2:]}
    assert report["best_solver"] == min(few, key=few.get)
    stamp = report["protocol"]
    assert stamp["n"] == 18
    assert stamp["resolution"] == 16
    assert stamp["seeds"] == {"rows": 0, "reference": 1}
    assert stamp["scorers"]["clip"] == store.fingerprint(scorer.model)
    assert set(stamp["versions"]) == {"torch", "diffusers", "transformers", "fewstep"}

    again = run(folders, scorer, monkeypatch, cache=tmp_path / "cache", say=said.append)
    assert [row["sample"] for row in again["rows"]] == ["drawn", "kept", "kept", "kept", "kept"]
    assert len(said) == 5
    for old, new in zip(report["rows"][1:], again["rows"][1:], strict=True):
        assert old["metrics"] == new["metrics"]

    # another teacher, seed or scorer is another sample; another set of real pictures is not
    said.clear()
    run(folders, scorer, monkeypatch, cache=tmp_path / "cache", say=said.append, data=None)
    assert len(said) == 5
    run(folders, scorer, monkeypatch, cache=tmp_path / "cache", say=said.append, teacher=folders / "student")
    run(folders, scorer, monkeypatch, cache=tmp_path / "cache", say=said.append, seed=7)
    assert len(said) == 5

    # a damaged file is drawn again, with a warning
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged"):
        mended = run(folders, scorer, monkeypatch, cache=tmp_path / "cache", say=said.append)
    assert all(row["sample"] == "drawn" for row in mended["rows"])
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]

    check_showing(report, tmp_path)


def anything(pipe, prompts, generators, **told):
    """Pictures of no network, where only whether they are drawn matters."""
    return torch.rand(len(prompts), 3, 16, 16), 0.1


def test_shipped_samples_stand_for_drawn_ones_and_are_timed_here(folders, scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "TEACHER_STEPS", 5)
    scorers = {"clip": scorer, "clip-heldout": scorer}
    shipping = {"teacher": folders / "teacher", "prompts": PROMPTS, "scorers": scorers, "utility": brightness, "steps": 2, "guidance": 3.0}
    samples.ship(tmp_path, **shipping, images_per_prompt=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    samples.ship(tmp_path, **shipping, images_per_prompt=3)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} and len(before) == 5
    fresh, shipped = (run(folders, scorer, monkeypatch, shipped=folder) for folder in (None, tmp_path))
    assert [row["sample"] for row in shipped["rows"]] == ["drawn", *["shipped"] * 4]
    for a, b in zip(fresh["rows"], shipped["rows"], strict=True):
        assert b["metrics"].keys() == a["metrics"].keys()
        assert b["metrics"]["seconds_per_image"]["value"] > 0 and b["timed"] == a["timed"]
        for name in ("fd_clip_teacher", "fd_clip_data", "clip", "utility", "diversity"):
            assert b["metrics"][name]["value"] == pytest.approx(a["metrics"][name]["value"], rel=2e-2, abs=2e-3), name  # float16
    # another seed, teacher or number of pictures is another sample: who draws it draws anything here
    monkeypatch.setattr(drawing, "draw", anything)
    monkeypatch.setattr(samples, "draw", anything)
    others = ({"judges": {"bright": lambda images, prompts: brightness(images)}}, {"noise": "picture"}, {"precision": "bf16"})
    for change in ({"seed": 5}, {"images_per_prompt": 4}, {"teacher": folders / "student"}, *others):
        assert all(row["sample"] == "drawn" for row in run(folders, scorer, monkeypatch, shipped=tmp_path, **change)["rows"])


def check_showing(report, folder):
    rows = dict(tables.as_rows(report))
    names = tables.columns(report)
    assert sum(name.endswith("(best)") for name in names) == 1
    assert all(len(cells) == len(names) == 6 for cells in rows.values())
    metric = report["rows"][0]["metrics"]["fd_clip_teacher"]
    assert rows["FD-clip to teacher ↓"][0] == f"{metric['value']:.4g} [{metric['low']:.4g}, {metric['high']:.4g}]"
    assert rows["network evaluations per image"] == ["2", "10", "4", "4", "4", "-"]
    assert tables.as_table(report).row_count == len(tables.as_rows(report)) == len(report["rows"][0]["metrics"])
    evaluation.save(report, folder / "evaluation.json")
    assert json.loads((folder / "evaluation.json").read_text()) == report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["cat", "dog", "cat"]}, "'cat' is repeated"),
        ({"prompts": [*"abcde"] * 3}, "all different; 'a' is repeated; 'b' is repeated; 'c' is repeated; and 2 more$"),
        ({"prompts": ["cat"]}, "at least two"),
        ({"images_per_prompt": 0}, "at least 1"),
        ({"prompts": PROMPTS[:2], "images_per_prompt": 4}, "more than 8"),
        ({"extractor": "inception"}, "'inception' is not among the scorers: clip"),
        ({"data": torch.zeros(8, 8)}, "more than 8"),
        ({"data": torch.zeros(20, 7)}, r"got \(20, 7\)"),
        ({"data": Pictures({"n": 8}, 8, lambda i: 1 / 0)}, "data: 8 real pictures, .* more than 8: give more"),
        ({"data": Pictures({"n": 1}, 1, lambda i: 1 / 0)}, "data: 1 real picture, "),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(scorer, tmp_path, monkeypatch, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "nothing here", scorer, monkeypatch, **changes)


def test_the_teachers_second_sample_is_near_and_another_model_is_far(folders, scorer, monkeypatch):
    """The floor: the teacher against its own second sample is nearer than a student of other weights."""
    report = run(folders, scorer, monkeypatch, images_per_prompt=16)
    student, teacher = (row["metrics"]["fd_clip_teacher"]["value"] for row in report["rows"][:2])
    assert 1e-7 < teacher < student  # 0 if both samples had one seed
    assert np.isfinite(student)
    assert scaled(torch.eye(4)).square().mean() == 1
