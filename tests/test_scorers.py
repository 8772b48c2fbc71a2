"""The named scorers: their preprocessing against PIL and transformers, their networks against what was published, their loaders."""

import json
import math
import pickle
import subprocess
import sys
from fnmatch import fnmatch
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pipelines.parts import clip_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_evaluate import PROMPTS, text_config, tiny_clip, tiny_tokenizer, to_pil
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, GemmaTokenizer, SiglipConfig, SiglipModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fewstep import cli, hub
from fewstep.evaluate.protocol import preparation
from fewstep.rewards import REWARDS, hps, rows, sources
from fewstep.rewards.aesthetic import Aesthetic
from fewstep.rewards.clip import CLIPScore, PickScore
from fewstep.rewards.convert import OPEN, convert
from fewstep.rewards.hps import HPS
from fewstep.rewards.pixels import Preprocess, filter_weights, read_preprocess, resize_8bit

PIL_NUMBER = {"bilinear": 2, "bicubic": 3}


@pytest.fixture
def opened_here(monkeypatch):
    """A conversion opens its pickle in this process, by the same lines: one of its own imports torch for three seconds.

    Not where it matters that another process opens it.
    """

    def run(command, **told):
        *start, lines, file, held = command
        assert (start, lines) == ([sys.executable, "-I", "-c"], OPEN)
        with mock.patch.object(sys, "argv", ["-c", file, held]):
            try:
                exec(lines, {})
            except SystemExit as refusal:
                return subprocess.CompletedProcess(command, 1, "", refusal.code)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("fewstep.rewards.convert.subprocess.run", run)


def noise(n, height, width, seed=0, *, extreme=False):
    """Random 8-bit pictures in [0, 1]: uniform, or black and white, which makes the cubic filter overshoot everywhere."""
    values = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return (values > 127).float() if extreme else values / 255


# Preprocessing


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("extreme", [False, True], ids=["uniform", "extreme"])
@pytest.mark.parametrize(
    "before, after", [((64, 64), (28, 28)), ((12, 12), (30, 30)), ((50, 37), (24, 18)), ((37, 50), (18, 24)), ((33, 70), (40, 20))]
)
def test_the_resize_is_pils_to_the_bit(before, after, resample, extreme):
    images = noise(2, *before, extreme=extreme)
    number = PIL_NUMBER[resample]
    # rows, then columns, as Pillow did it always before 13 and does it still where both edges shrink alike
    expected = [picture.resize((after[1], before[0]), number).resize((after[1], after[0]), number) for picture in to_pil(images)]
    expected = torch.from_numpy(np.stack([np.asarray(picture) for picture in expected])).permute(0, 3, 1, 2)
    assert torch.equal((resize_8bit(images, *after, resample) * 255).round().byte(), expected)


@pytest.mark.parametrize("after", [(12, 12), (12, 7), (9, 12), (5, 20)])
def test_what_is_resized_is_the_picture_as_it_would_be_saved(after):
    """A picture that has the scorer's size already is that too: it goes to a server, or into a file, as the same 8 bits."""
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    images[0, 0, 0] = (torch.arange(12) + 0.5) / 255  # half way between two
    saved = (images.clamp(0, 1) * 255).round().byte().float() / 255
    assert torch.equal(resize_8bit(images, *after, "bilinear"), resize_8bit(saved, *after, "bilinear"))
    assert torch.equal(resize_8bit(images, 12, 12, "bilinear"), saved)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(resize_8bit(images, 12, 12, "bilinear").sum(), images)
    assert torch.equal(gradient, ((images >= 0) & (images <= 1)).float())


@pytest.mark.parametrize("shape", [(64, 64), (40, 53), (10, 13), (24, 24), (24, 31), (31, 24)])
@pytest.mark.parametrize("extreme", [False, True], ids=["uniform", "extreme"])
def test_clips_preprocessing_equals_its_processor(shape, extreme):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    images = noise(2, *shape, extreme=extreme)
    expected = torch.as_tensor(processor(to_pil(images), return_tensors="pt").pixel_values)
    mine = read_preprocess(json.loads(processor.to_json_string()), 999, "CLIP")
    assert (mine(images) - expected).abs().max() < 1e-5  # the promise is 1e-3


@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (10, 13), (24, 24)])
@pytest.mark.parametrize("extreme", [False, True], ids=["uniform", "extreme"])
def test_siglips_preprocessing_equals_its_processor(shape, extreme):
    processor = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    images = noise(2, *shape, extreme=extreme)
    expected = torch.as_tensor(processor(to_pil(images), return_tensors="pt").pixel_values)
    mine = read_preprocess(json.loads(processor.to_json_string()), 999, "Siglip")
    assert mine.crop is None and mine.resize == (24, 24)
    assert (mine(images) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("processor", [BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil])
@pytest.mark.parametrize(
    "changed", [{"resample": ...}, {"crop_size": ...}, {"do_center_crop": ...}, {"do_center_crop": None}, {"size": ...},
                dict.fromkeys(("resample", "size", "crop_size", "do_center_crop"), ...), {"size": 60}, {"size": {"shortest_edge": 60}}]
)  # fmt: skip
def test_what_a_file_leaves_out_is_its_processors_default(tmp_path, processor, changed):
    said = {"size": {"height": 300, "width": 230}} | ({"crop_size": 50} if "size" in changed else {}) | changed
    config = json.loads(processor().to_json_string()) | said
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    images = noise(1, 80, 96)
    expected = torch.as_tensor(processor.from_dict(config)(to_pil(images), return_tensors="pt").pixel_values)
    found = CLIPScore.read_preprocess(tmp_path, 224)(images)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5


def test_a_file_that_names_no_processor_has_the_defaults_of_its_models(tmp_path):
    tiny_siglip().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert CLIPScore.load(tmp_path).preprocess == Preprocess((16, 16), None, (0.5,) * 3, (0.5,) * 3, "bicubic")
    save_clip(tmp_path / "clip", model=tiny_clip(size=16))
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    (tmp_path / "clip" / "processor_config.json").unlink(missing_ok=True)
    assert CLIPScore.load(tmp_path / "clip").preprocess == Preprocess(16, (16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic")


def test_the_resizes_gradient_is_that_of_its_filters():
    images = (0.5 + 0.1 * noise(2, 20, 26)).double().requires_grad_()
    pull = torch.randn(2, 3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((resize_8bit(images, 9, 12, "bicubic") * pull).sum(), images)
    expected = filter_weights(20, 9, "bicubic").T @ pull @ filter_weights(26, 12, "bicubic")
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    white = torch.full((1, 3, 20, 26), 1.5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(resize_8bit(white, 9, 12, "bicubic").sum(), white)
    assert bool((gradient == 0).all())  # clipped: brighter than white is white


@pytest.mark.parametrize(
    "shape, inside",  # where the picture is in 24 x 24: (top, left, height, width), by hand
    [((41, 60), (4, 0, 16, 24)), ((60, 41), (0, 4, 24, 16)), ((48, 34), (0, 3, 24, 17)), ((34, 48), (3, 0, 17, 24)),
     ((10, 16), (4, 0, 15, 24)), ((48, 29), (0, 5, 24, 14)), ((48, 31), (0, 4, 24, 16)), ((768, 1344), (5, 0, 14, 24)),
     ((60, 60), (0, 0, 24, 24)), ((24, 24), (0, 0, 24, 24)), ((24, 17), (0, 3, 24, 17))],
)  # fmt: skip
def test_hps_sees_the_whole_picture_on_black(shape, inside):
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    images = F.interpolate(noise(1, 5, 5, extreme=True), shape)
    top, left, height, width = inside
    # PIL's pictures of 32-bit floats are neither rounded nor clipped
    channels = [Image.fromarray(channel.numpy(), mode="F").resize((width, height), 3) for channel in images[0]]
    whole = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))
    assert whole.max() > 1.02 or max(shape) == 24  # the resize overshoots
    expected = torch.zeros(3, 24, 24)  # black before it is normalised
    expected[:, top : top + height, left : left + width] = whole
    found = hps.preprocess(images, size=24, mean=tuple(mean.flatten().tolist()), std=tuple(std.flatten().tolist()))
    assert (found[0] - (expected - mean) / std).abs().max() < 1e-4  # the promise is 1e-3


def test_the_aesthetics_centre_is_torchvisions():
    for margin, left in ((1, 0), (3, 2), (5, 2), (7, 4), (4, 2)):  # halves go to the even number
        columns, plain = torch.arange(24.0 + margin).expand(1, 3, 24, -1) / 255, {"mean": (0,) * 3, "std": (1 / 255,) * 3}
        assert Preprocess(24, (24, 24), **plain, halves="even")(columns)[0, 0, 0, 0].round() == left
        assert Preprocess(24, (24, 24), **plain)(columns)[0, 0, 0, 0].round() == margin // 2  # transformers rounds them down


@pytest.mark.parametrize(
    "config, key", [({"image_std": [1] * 3}, "image_mean"), ({"image_mean": [0] * 3, "image_std": [1] * 3, "resample": 1}, "1"),
                    ({"image_mean": [0] * 3, "image_std": [1] * 3, "size": {"longest_edge": 3}}, "height")]
)  # fmt: skip
def test_preprocessing_that_means_nothing_here_is_refused(config, key):
    with pytest.raises(KeyError, match=key):
        read_preprocess(config, 24, "CLIP")


# CLIP, SigLIP, PickScore


def save_clip(folder, *, model=None, preprocess=True):
    """A folder as `from_pretrained` wants it: model, tokenizer, preprocessing."""
    (model or tiny_clip()).save_pretrained(folder)
    if preprocess:
        tiny_tokenizer().save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def tiny_siglip():
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=shared | {"vocab_size": 21, "max_position_embeddings": 8, "projection_size": 16, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=shared | {"image_size": 16, "patch_size": 8},
    )
    model = SiglipModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    return model


def test_siglip_is_scored_as_its_own_model_scores(tmp_path):
    model, processor = tiny_siglip(), SiglipImageProcessorPil(size={"height": 16, "width": 16})
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    scorer, images = CLIPScore.load(tmp_path), noise(6, 20, 20)
    tokens = tiny_tokenizer()(PROMPTS, padding="max_length", max_length=8, return_tensors="pt")
    pixels = torch.as_tensor(processor(to_pil(images), return_tensors="pt").pixel_values)
    with torch.no_grad():
        output = model.eval()(input_ids=tokens["input_ids"], pixel_values=pixels)  # SigLIP sees its padding
    cosine = (output.logits_per_image.diagonal() - model.logit_bias) / model.logit_scale.exp()
    torch.testing.assert_close(scorer.score(images, PROMPTS), 100 * cosine, rtol=0, atol=1e-4)
    # each prompt alone is what it is among others
    torch.testing.assert_close(scorer.score(images[:1], PROMPTS[:1]), 100 * cosine[:1], rtol=0, atol=1e-4)


def test_a_siglip_2_reads_prompts_in_lower_case(tmp_path):
    """Whose fixed-size checkpoints call themselves siglip, and have Gemma's tokenizer as it was for training, but for capitals."""
    tiny_siglip().save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    letters = {piece: i for i, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁ACTacdgot"])}
    told = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "model_input_names": ["input_ids"]}
    GemmaTokenizer(vocab=letters, merges=[], do_lower_case=True, **told).save_pretrained(tmp_path)
    scorer = CLIPScore.load(tmp_path)
    small, large, other = scorer.text_features(["a cat", "A CAT", "a dog"])
    assert torch.equal(small, large) and not torch.allclose(small, other)
    tokens = torch.tensor([[letters[piece] for piece in (*"a▁cat", "<eos>", "<pad>", "<pad>")]])
    with torch.no_grad():
        expected = F.normalize(scorer.model.get_text_features(input_ids=tokens).pooler_output, dim=1)
    torch.testing.assert_close(small[None], expected, rtol=0, atol=1e-6)
    assert preparation(scorer)["prompts"] == "in lower case"


def test_a_siglips_prompts_are_its_tokenizers_business():
    """As every CLIP's: capitals reach it, and what a stamp says is what it always was."""
    scorer = CLIPScore(tiny_siglip(), clip_tokenizer(), None)
    with mock.patch.object(type(scorer.tokenizer), "__call__", side_effect=RuntimeError) as called, pytest.raises(RuntimeError):
        scorer.text_features(["A CAT"])
    assert called.call_args.args == (["A CAT"],) and "prompts" not in preparation(scorer)


def test_a_text_is_cut_where_its_model_ends_whatever_the_tokenizer_says(tmp_path):
    """Many a tokenizer names no limit."""
    scorer, images = CLIPScore.load(save_clip(tmp_path)), noise(1, 16, 16)
    length = scorer.model.config.text_config.max_position_embeddings
    long = " ".join(["cat"] * 2 * length)
    scorer.tokenizer.model_max_length = length
    expected = scorer.score(images, [long])
    scorer.tokenizer.model_max_length = int(1e30)
    assert torch.equal(scorer.score(images, [long]), expected)


def test_a_model_without_tokenizer_takes_the_published_processors(tmp_path):
    """As PickScore's repository, which names LAION's for both."""
    bare, beside = save_clip(tmp_path / "bare", preprocess=False), save_clip(tmp_path / "beside", model=tiny_clip(seed=5))
    save_clip(tmp_path / "whole")
    images = noise(6, 20, 20)
    expected = PickScore.load(tmp_path / "whole").score(images, PROMPTS)
    assert torch.equal(PickScore.load(bare, processor=beside).score(images, PROMPTS), expected)
    with pytest.raises(ValueError, match=r"preprocessor_config.json: cannot be read"):
        PickScore.load(bare)


def test_what_a_model_has_itself_is_not_taken_from_beside_it(tmp_path):
    whole, bare, beside = (save_clip(tmp_path / name, preprocess=name != "bare") for name in ("whole", "bare", "beside"))
    CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(whole)
    for folder in (whole, bare):
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 7
        tokenizer.save_pretrained(folder)
    found = [CLIPScore.load(folder, processor=beside) for folder in (whole, bare)]
    assert [scorer.preprocess.resize for scorer in found] == [20, 16]
    assert [scorer.tokenizer.model_max_length for scorer in found] == [7, 7]


def test_a_folders_own_code_is_not_run(tmp_path):
    folder, mark = save_clip(tmp_path / "clip"), tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    for name, key in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        held = json.loads((folder / name).read_text()) | {"auto_map": {key: ["evil.Evil", None] if key == "AutoTokenizer" else "evil.Evil"}}
        (folder / name).write_text(json.dumps(held))
    assert bool(torch.isfinite(CLIPScore.load(folder).score(noise(1, 16, 16), ["cat"])).all())
    assert not mark.exists()


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"holds a 'bert' model; this reward needs one of clip, siglip"):
        CLIPScore.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        CLIPScore.load(tmp_path)


@pytest.fixture
def damage(tmp_path):
    """A CLIP's folder whose weights are what a function makes of them."""
    folder = save_clip(tmp_path / "damaged")

    def damaged(change):
        state = load_file(folder / "model.safetensors")
        save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return damaged


def without(*starts):
    return lambda state: {name: value for name, value in state.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    "change, words",
    [
        (without("vision_model", "visual_projection"), r"damaged: .* whole CLIPModel: 2\d missing, as vision_model\.\w+"),
        (without("logit_scale"), "1 missing, as logit_scale"),
        (lambda state: state | {"visual_projection.weight": torch.zeros(9, 16)}, "another shape, as visual_projection.weight .9, 16."),
        (lambda state: state | {"text_model.head.weight": torch.zeros(1)}, "1 unknown, as text_model.head.weight"),
        (lambda state: tiny_siglip().state_dict(), r"\d+ missing, as .*; \d+ unknown, as logit_bias"),
    ],
    ids=["no vision tower", "one tensor less", "another shape", "one tensor more", "another model"],
)  # fmt: skip
def test_weights_that_are_not_the_models_are_refused(damage, change, words, tmp_path, opened_here):
    """transformers draws what is missing at random, and says so where nobody looks."""
    folder = damage(change)
    with pytest.raises(ValueError, match=words):
        CLIPScore.load(folder)
    torch.save(tiny_head(), tmp_path / "head.pth")
    if "vision" in words:  # the aesthetic predictor reads this half alone
        convert("aesthetic", tmp_path / "head.pth", tmp_path / "made", clip=str(folder))
        with pytest.raises(ValueError, match=r"whole CLIPVisionModelWithProjection: 2\d missing, as vision_model"):
            Aesthetic.load(tmp_path / "made")


def test_the_buffers_of_old_versions_are_no_foreign_weights(damage):
    folder = damage(lambda state: state | {f"{half}_model.embeddings.position_ids": torch.arange(8)[None] for half in ("text", "vision")})
    assert bool(torch.isfinite(CLIPScore.load(folder).score(noise(1, 16, 16), ["cat"])).all())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused_before_any_model_is_made(tmp_path, capsys, share, monkeypatch, prompt_file):
    folder = save_clip(tmp_path / "clip")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"clip/model.safetensors: damaged, or no safetensors file .*; get it again"):
        CLIPScore.load(folder)
    monkeypatch.setattr("fewstep.run.build", lambda *_: pytest.fail("the teacher is loaded before the scorer's file is looked at"))
    line = refused(capsys, "distill", "--reward.clip", "1", "--scorer.clip", folder, "--output", tmp_path / "run")
    assert "scorer.clip" in line and "model.safetensors: damaged" in line
    assert "model.safetensors: damaged" in refused(capsys, "serve-reward", "clip", "--scorer", folder)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    folder = save_clip(tmp_path / "clip")
    tiny_clip().save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    gone = sorted(folder.glob("model-*.safetensors"))[-1]
    assert bool(torch.isfinite(CLIPScore.load(folder).score(noise(1, 16, 16), ["cat"])).all())
    gone.unlink()
    with pytest.raises(ValueError, match=f"clip: cannot be read .*{gone.name}"):
        CLIPScore.load(folder)


# HPS


def head_clip():
    """A CLIPModel as CLIP ViT-H/14 is one (exact GELU, end of text found by its number), but tiny."""
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=8, hidden_act="gelu"
    )
    text = text_config().to_dict() | {"hidden_act": "gelu", "num_hidden_layers": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=12)).eval()


def open_clip_state(seed=7, *, width=24, text_width=16, layers=2):
    """A random state dict with open_clip's names and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 0.4 * torch.randn(*shape, generator=generator)

    def block(prefix, d, n):
        shapes = {
            "ln_1.weight": (d,), "ln_1.bias": (d,), "ln_2.weight": (d,), "ln_2.bias": (d,), "attn.in_proj_weight": (3 * d, d),
            "attn.in_proj_bias": (3 * d,), "attn.out_proj.weight": (d, d), "attn.out_proj.bias": (d,), "mlp.c_fc.weight": (2 * d, d),
            "mlp.c_fc.bias": (2 * d,), "mlp.c_proj.weight": (d, 2 * d), "mlp.c_proj.bias": (d,),
        }  # fmt: skip
        return {f"{prefix}transformer.resblocks.{i}.{key}": random(*shape) for i in range(n) for key, shape in shapes.items()}

    whole = {
        "positional_embedding": random(8, text_width), "text_projection": random(text_width, 12), "logit_scale": torch.tensor(1.5),
        "visual.class_embedding": random(width), "visual.positional_embedding": random(5, width), "visual.proj": random(width, 12),
        "visual.conv1.weight": random(width, 3, 8, 8), "visual.ln_pre.weight": random(width), "visual.ln_pre.bias": random(width),
        "visual.ln_post.weight": random(width), "visual.ln_post.bias": random(width), "token_embedding.weight": random(21, text_width),
        "ln_final.weight": random(text_width), "ln_final.bias": random(text_width),
    }  # fmt: skip
    return whole | block("visual.", width, layers) | block("", text_width, layers)


def transformer(state, prefix, x, heads, mask=None):
    """open_clip's residual blocks, by torch's own attention. x (B, N, d)."""
    for i in range(2):
        p = {key.removeprefix(f"{prefix}transformer.resblocks.{i}."): value for key, value in state.items()}
        d = x.shape[2]
        h = F.layer_norm(x, (d,), p["ln_1.weight"], p["ln_1.bias"]).transpose(0, 1)
        h, _ = F.multi_head_attention_forward(
            h, h, h, d, heads, p["attn.in_proj_weight"], p["attn.in_proj_bias"], None, None, False, 0.0, p["attn.out_proj.weight"],
            p["attn.out_proj.bias"], training=False, need_weights=False, attn_mask=mask,
        )  # fmt: skip
        x = x + h.transpose(0, 1)
        h = F.layer_norm(x, (d,), p["ln_2.weight"], p["ln_2.bias"])
        x = x + F.linear(F.gelu(F.linear(h, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])), p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])
    return x


def open_clip_cosine(state, pixels, ids, end):
    """Cosine of each picture and its text as open_clip computes it, written out in torch."""
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[2:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = transformer(state, "visual.", x, 3)[:, 0]
    image = F.layer_norm(x, x.shape[1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"]
    length = ids.shape[1]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][:length]
    x = transformer(state, "", x, 2, torch.full((length, length), -torch.inf).triu(1))
    x = F.layer_norm(x, x.shape[2:], state["ln_final.weight"], state["ln_final.bias"])
    text = x[torch.arange(len(x)), (ids == end).int().argmax(1)] @ state["text_projection"]
    return F.cosine_similarity(image, text)


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory):
    """What `fewstep convert-reward hps` makes of a pickle with the published layout."""
    root = tmp_path_factory.mktemp("hps")
    save_clip(root / "clip", model=head_clip())
    (root / "clip" / "earlier.json").mkdir()  # a folder, which is no part of it
    torch.save({"state_dict": open_clip_state(), "epoch": 3}, root / "HPS_tiny.pt")
    assert cli.main(["convert-reward", "hps", str(root / "HPS_tiny.pt"), "--output", str(root / "made"), "--clip", str(root / "clip")]) == 0
    assert (
        len({(root / "made" / name).stat().st_mode for name in ("model.safetensors", "config.json")}) == 1
    )  # others may read both or none
    return root / "made"


def test_hps_is_the_published_network_on_the_published_preprocessing(hps_folder):
    scorer, images = HPS.load(hps_folder), noise(6, 20, 27)
    processor = json.loads((hps_folder / "preprocessor_config.json").read_text())
    pixels = hps.preprocess(images, size=16, mean=processor["image_mean"], std=processor["image_std"])
    ids = tiny_tokenizer()(PROMPTS, padding=True, return_tensors="pt").input_ids
    expected = open_clip_cosine(open_clip_state(), pixels, ids, end=1)
    torch.testing.assert_close(scorer.score(images, PROMPTS), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01  # the pictures and texts are told apart, so equality says something
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(images, PROMPTS).sum(), images)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


@pytest.mark.parametrize(
    "prompt, cleaned",  # by the tokenizer in hpsv2 1.2.0
    [
        ("don’t “quote” ‘it’", "don't \"quote\" 'it'"),
        ("rock &amp; roll, caf&eacute;, &amp;lt;3 &rsquo;90s", "rock & roll, café, <3 '90s"),
        ("ﬁne ﬂow, Ĳssel, ǅ", "fine flow, IJssel, Dž"),
        ("Ｆｕｌｌ ｶ", "Full カ"),
        ("tab\x07bell\ufeff", "tabbell"),
        ('naïve—dash…, ½ H₂O, 日本語 😀 8k (masterpiece:1.2) 5" <b>', 'naïve—dash…, ½ H₂O, 日本語 😀 8k (masterpiece:1.2) 5" <b>'),
    ],
)
def test_hps_cleans_prompts_as_published(prompt, cleaned):
    assert hps.cleaned(prompt) == cleaned


def test_hps_scores_what_the_cleaned_prompt_says(hps_folder):
    scorer = HPS.load(hps_folder)
    plain, other = scorer.text_features(["a cat", "a dog"]), scorer.text_features(["  A &#99;AT\n", "a\t\tdｏg"])
    assert torch.equal(plain, other) and not torch.equal(plain[0], plain[1])


def test_hps_reads_the_mark_of_a_texts_end_as_text(hps_folder):
    """As open_clip's tokenizer does, whose own marks are others: by a tokenizer that knows every character, as the published one."""
    scorer, whole, seen = HPS.load(hps_folder), clip_tokenizer(), []
    tiny = scorer.tokenizer

    def read(prompts, **told):
        seen.append([whole.convert_ids_to_tokens(ids) for ids in whole(prompts, **told)["input_ids"].tolist()])
        return tiny(prompts, **told)

    scorer.tokenizer = read
    scorer.text_features(["<|endoftext|> b"])
    assert seen == [[["<|startoftext|>", "<", "|</w>", "e", "n", "d", "o", "<|endoftext|>"]]]  # cut at eight


@pytest.mark.parametrize("end, stated", [(1, 1), (20, 20), (20, 2)])  # 2: as CLIP's old configurations say, where the highest number ends
@pytest.mark.parametrize("pad", ["<|endoftext|>", "a</w>"])  # the published tokenizer pads with number 0, another word
def test_what_pads_a_text_does_not_change_its_score(hps_folder, end, stated, pad):
    """Open_clip pads every text to its full length with number 0 and reads it where it ends: so must any padding come to the same."""
    scorer = HPS.load(hps_folder)
    scorer.tokenizer = tiny_tokenizer(end=end, pad=pad)
    scorer.model.text_model.eos_token_id = stated
    prompts = ["cat", "a dog", "a cat a dog pie", " ".join(["pie a"] * 20)]
    ids = torch.zeros(4, 8, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        words = [tiny_tokenizer(end=end).convert_tokens_to_ids(f"{word}</w>") for word in prompt.split()]
        whole = [0, *words[:6], end]  # cut so that its end is still there
        row[: len(whole)] = torch.tensor(whole)
    images = noise(4, 16, 16)
    expected = open_clip_cosine(open_clip_state(), scorer.preprocess(images), ids, end=end)
    torch.testing.assert_close(scorer.score(images, prompts), expected, rtol=0, atol=1e-5)


def test_hps_equals_open_clip_where_it_can_be_imported():
    try:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    except (ImportError, RuntimeError) as error:  # its torchvision wants a torch of the same build
        pytest.skip(f"open_clip: {type(error).__name__}: {error}")
    torch.manual_seed(0)
    published = CLIP(
        12, CLIPVisionCfg(layers=2, width=24, head_width=8, patch_size=8, image_size=16, mlp_ratio=2.0),
        CLIPTextCfg(context_length=8, vocab_size=21, width=16, heads=2, layers=2, mlp_ratio=2.0),
    ).eval()  # fmt: skip
    config = head_clip().config
    config.text_config.eos_token_id = 20  # as the published vocabulary has it, the highest number
    model = CLIPModel(config).eval()
    model.load_state_dict(hps.from_open_clip(published.state_dict()))
    pixels, ids = torch.randn(3, 3, 16, 16), torch.randint(2, 20, (3, 8))
    ids[torch.arange(3), torch.tensor([3, 5, 7])] = 20
    with torch.no_grad():
        torch.testing.assert_close(model.get_image_features(pixel_values=pixels).pooler_output, published.encode_image(pixels))
        torch.testing.assert_close(model.get_text_features(input_ids=ids).pooler_output, published.encode_text(ids))


# The aesthetic predictor


def tiny_head(seed=0, widths=(8, 10, 6, 5, 4, 1)):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{n}.{kind}": torch.randn(*shape, generator=generator)
        for n, before, after in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False)
        for kind, shape in (("weight", (after, before)), ("bias", (after,)))
    }


def test_the_aesthetic_score_is_the_published_head_on_unit_features(tmp_path, opened_here):
    clip = save_clip(tmp_path / "clip")
    torch.save(tiny_head(), tmp_path / "head.pth")
    arguments = ["convert-reward", "aesthetic", str(tmp_path / "head.pth"), "--output", str(tmp_path / "made"), "--clip", str(clip)]
    assert cli.main(arguments) == 0
    modes = {(tmp_path / name).stat().st_mode for name in ("made/model.safetensors", "made/reward.json")}
    assert len(modes) == 1  # others may read both or none
    scorer, images = Aesthetic.load(tmp_path / "made"), noise(5, 20, 20)
    assert scorer.preprocess == CLIPScore.load(clip).preprocess._replace(halves="even")
    published = torch.nn.Sequential(
        torch.nn.Linear(8, 10), torch.nn.Dropout(0.2), torch.nn.Linear(10, 6), torch.nn.Dropout(0.2), torch.nn.Linear(6, 5),
        torch.nn.Dropout(0.1), torch.nn.Linear(5, 4), torch.nn.Linear(4, 1),
    ).eval()  # fmt: skip
    published.load_state_dict({key.removeprefix("layers."): value for key, value in tiny_head().items()})
    with torch.no_grad():
        features = CLIPScore.load(clip).image_features(images)
        expected = published(features)[:, 0]
    torch.testing.assert_close(scorer.score(images, [""] * 5), expected, rtol=0, atol=1e-5)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(images, [""] * 5).sum(), images)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    torch.save(tiny_head(widths=(9, 10, 6, 5, 4, 1)), tmp_path / "other.pth")
    convert("aesthetic", tmp_path / "other.pth", tmp_path / "other", clip=str(clip))
    with pytest.raises(ValueError, match="the head reads 9 features, but its CLIP has 8: it belongs to another CLIP"):
        Aesthetic.load(tmp_path / "other")
    (tmp_path / "other" / "reward.json").unlink()
    with pytest.raises(ValueError, match=r"other: no reward.json that names its CLIP; give the folder that"):
        Aesthetic.load(tmp_path / "other")


# Conversion


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def refused(capsys, *arguments):
    """Exit code 2, and the one line that says why."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_pickle_runs_no_code_and_is_never_loaded_as_it_is(tmp_path, capsys, prompt_file):
    clip, mark = save_clip(tmp_path / "clip"), tmp_path / "executed"
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps({"state_dict": Evil(mark)}))
    pickle.loads(evil.read_bytes())["state_dict"].close()
    assert mark.exists()  # the pickle does what it is accused of
    mark.unlink()
    line = refused(capsys, "convert-reward", "hps", evil, "--output", tmp_path / "out", "--clip", clip)
    assert "evil.pt: cannot be converted" in line and "weights_only" not in line and not mark.exists() and not (tmp_path / "out").exists()
    line = refused(capsys, "distill", "--reward.hps", "1", "--scorer.hps", evil, "--output", tmp_path / "run")
    assert f"fewstep convert-reward hps {evil} --output FOLDER" in line and not mark.exists()
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, which is never loaded"):
        CLIPScore.load(clip)


def test_a_disk_that_takes_no_reward_is_named(tmp_path, capsys, opened_here, monkeypatch):
    clip = save_clip(tmp_path / "clip", model=head_clip())
    torch.save(open_clip_state(), tmp_path / "held.pt")
    (tmp_path / "out").mkdir()

    def full(*told, **how):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for where, words in (
        ("transformers.PreTrainedModel.save_pretrained", f"{tmp_path / 'out'}: could not be written to: No space left on device"),
        ("safetensors.torch.save_file", "held.pt: cannot be converted: its tensors cannot be written (Error while serializing"),
    ):
        monkeypatch.setattr(where, full)
        arguments = [str(tmp_path / "held.pt"), "--output", str(tmp_path / "out" / "made"), "--clip", str(clip)]
        assert cli.main(["convert-reward", "hps", *arguments]) in (1, 2)
        assert words in capsys.readouterr().err and not [*(tmp_path / "out").iterdir()]


def test_what_cannot_be_converted_is_named(tmp_path, capsys, opened_here):
    clip = save_clip(tmp_path / "clip", model=head_clip())

    def convert(name, state):
        torch.save(state, tmp_path / "held.pt")
        return refused(capsys, "convert-reward", name, tmp_path / "held.pt", "--output", tmp_path / "out", "--clip", clip)

    assert "holds no state dict of tensors" in convert("hps", {"state_dict": {"x": 3}})
    assert "holds no state dict of tensors" in convert("hps", [torch.zeros(1)])
    assert "not an open_clip CLIP: it has 'layers.0.bias'" in convert("hps", tiny_head())
    short = open_clip_state()
    del short["ln_final.bias"]
    assert "missing or unknown text_model.final_layer_norm.bias" in convert("hps", short)
    assert "not weights of the model in" in convert("hps", open_clip_state(width=30))
    assert "not the linear head" in convert("aesthetic", open_clip_state())
    flat, chained, many = tiny_head(), tiny_head(), tiny_head()
    flat["layers.2.weight"] = flat["layers.2.weight"][0]
    chained["layers.2.weight"] = chained["layers.2.weight"][:, 1:]
    many |= {"layers.7.weight": many["layers.7.weight"].repeat(2, 1), "layers.7.bias": many["layers.7.bias"].repeat(2)}
    assert "not the linear head: layers.2 has weight (" in convert("aesthetic", flat)
    assert "outputs" in convert("aesthetic", chained) and "ends in 2 numbers, not in one score" in convert("aesthetic", many)
    (tmp_path / "text.pt").write_text("hello")
    line = refused(capsys, "convert-reward", "hps", tmp_path / "text.pt", "--output", tmp_path / "out", "--clip", clip)
    assert "text.pt: cannot be converted: it is damaged, or no file of tensors alone" in line and "Traceback" not in line
    assert not (tmp_path / "out").exists()
    assert "no such file" in refused(capsys, "convert-reward", "hps", tmp_path / "nowhere.pt", "--output", tmp_path / "out")
    assert "exists already" in refused(capsys, "convert-reward", "hps", tmp_path / "held.pt", "--output", tmp_path)
    assert "invalid choice" in refused(capsys, "convert-reward", "hps3", tmp_path / "held.pt", "--output", tmp_path / "out")


def test_a_clip_of_pickles_alone_can_be_converted(tmp_path):
    clip = save_clip(tmp_path / "clip")
    model = tiny_clip(seed=9)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    arguments = ["convert-reward", "clip", str(tmp_path / "pytorch_model.bin"), "--output", str(tmp_path / "made"), "--clip", str(clip)]
    assert cli.main(arguments) == 0
    images = noise(6, 16, 16)
    expected = CLIPScore(model, tiny_tokenizer(), CLIPScore.load(clip).preprocess).score(images, PROMPTS)
    torch.testing.assert_close(CLIPScore.load(tmp_path / "made").score(images, PROMPTS), expected, rtol=0, atol=1e-5)


# Where a model comes from


class Hub:
    """Stands in for the hub's client: one repository, with one commit."""

    commit = "a" * 40

    def __init__(self, folder):
        self.folder, self.asked, self.weights = folder, [], []  # names of the repositories that were asked for weights

    def HfApi(self):
        return self

    def model_info(self, name, *, revision):
        self.asked.append((name, revision))
        return type("Info", (), {"sha": self.commit})

    def snapshot_download(self, name, *, revision, allow_patterns):
        assert not any(pattern.endswith((".bin", ".pt", ".pth")) or pattern == "*" for pattern in allow_patterns)
        self.asked.append((name, revision))
        self.weights += [name for pattern in allow_patterns if fnmatch("model.safetensors", pattern)]
        return str(self.folder)


def test_a_hub_id_gets_its_commit_and_no_pickle(tmp_path, monkeypatch):
    import huggingface_hub

    hub = Hub(save_clip(tmp_path / "clip"))
    for name in ("HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    assert sources.locate("clip", "owner/model") == sources.locate("clip", "owner/model@main") == f"owner/model@{hub.commit}"
    assert hub.asked == [("owner/model", None), ("owner/model", "main")]
    hub.asked.clear()
    scorer = sources.build("clip", sources.locate("clip", f"owner/model@{hub.commit}"))
    assert hub.asked == [("owner/model", hub.commit)] and isinstance(scorer, CLIPScore)
    assert sources.version(f"owner/model@{hub.commit}") == hub.commit
    hub.asked.clear()
    sources.build("pickscore", sources.locate("pickscore", None))
    assert sorted(name for name, _ in hub.asked) == ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "yuvalkirstain/PickScore_v1"]
    assert all(len(revision) == 40 for _, revision in hub.asked)
    assert hub.weights == ["owner/model", "yuvalkirstain/PickScore_v1"]  # of the other the words are read alone


def test_a_folders_version_changes_with_its_weights(tmp_path):
    folder = save_clip(tmp_path / "clip")
    before = sources.version(str(folder))
    (folder / "earlier.json").mkdir()  # a folder of that name is no part of it
    assert before == sources.version(str(folder))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    renamed = sources.version(str(folder))
    edited(folder / "model-1.safetensors")
    assert len({before, renamed, sources.version(str(folder))}) == 3


def edited(path):
    """Change a file's last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "merges.txt", "spiece.model"])
def test_a_folders_version_changes_with_what_prompts_and_pictures_are_read_by(tmp_path, name):
    folder = save_clip(tmp_path / "clip")
    for slow in ("merges.txt", "spiece.model"):  # as CLIP's slow tokenizer and SigLIP's have them
        (folder / slow).write_text("a t\n")
    (folder / "pictures.png").write_text("read by nothing")
    before = sources.version(str(folder))
    (folder / "pictures.png").unlink()
    assert sources.version(str(folder)) == before
    edited(folder / name)
    assert sources.version(str(folder)) != before


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_the_aesthetics_version_changes_with_the_clip_that_it_names(tmp_path, name):
    clip = save_clip(tmp_path / "clip")
    torch.save(tiny_head(), tmp_path / "head.pth")
    convert("aesthetic", tmp_path / "head.pth", tmp_path / "made", clip=str(clip))
    told = sources.records(["aesthetic"], {"aesthetic": str(tmp_path / "made")}, {}, assets=None)
    before = sources.version(str(tmp_path / "made"))
    assert told["aesthetic"]["version"] == before == sources.version(str(tmp_path / "made")) != sources.version(str(clip))
    edited(clip / name)
    after = sources.version(str(tmp_path / "made"))
    assert after != before
    # another one by another name is another version, on the hub the commit
    (tmp_path / "made" / "reward.json").write_text(json.dumps({"clip": "owner/clip@" + "0" * 40}))
    of_hub = sources.version(str(tmp_path / "made"))
    (tmp_path / "made" / "reward.json").write_text(json.dumps({"clip": "owner/clip@" + "1" * 40}))
    assert len({before, after, of_hub, sources.version(str(tmp_path / "made"))}) == 4
    (tmp_path / "made" / "reward.json").write_text("[]")
    with pytest.raises(ValueError, match=r"reward.json: cannot be read as the name of a CLIP"):
        sources.version(str(tmp_path / "made"))


def test_the_table_is_complete_and_says_what_is_so():
    for name, row in REWARDS.items():
        assert all(text for text in (row.what, row.range, row.memory, row.code, row.weights)), name
        for pinned in (row.model, row.processor, row.clip):
            assert pinned is None or hub.COMMIT.fullmatch(pinned.rpartition("@")[2]), name
        assert row.differentiable == (row.built_by is not None)
    assert {"clip", "pickscore", "hps", "aesthetic", "image-reward", "hps3"} <= REWARDS.keys()


def test_the_command_lists_them(capsys):
    assert cli.main(["rewards"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in REWARDS) and "licence of the weights" in " ".join(shown.split())
    assert refused(capsys, "rewards", "clip").endswith("takes no arguments, got 'clip'")
    assert cli.main(["rewards", "--help"]) == 0 and capsys.readouterr().out.startswith("usage: fewstep rewards\n")
    assert all(len(row) == len(rows()[0]) for row in rows())


def test_scores_of_8_bit_pictures_do_not_depend_on_how_they_are_held():
    """float32 k / 255 is not exact; the resize must not mind."""
    images = noise(2, 20, 20)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(
            (resize_8bit(images.to(dtype), 7, 9, "bicubic") * 255).round(), (resize_8bit(images, 7, 9, "bicubic") * 255).round()
        )
    assert math.isnan(float(resize_8bit(torch.full((1, 3, 8, 8), math.nan), 4, 4, "bicubic")[0, 0, 0, 0]))


# All at once


@pytest.mark.usefixtures("small_grid")
def test_the_recipe_with_four_rewards_runs_on_their_folders(hps_folder, teacher_folder, prompt_file, tmp_path, opened_here):
    """Each scores every update, and pulls as soon as there is a KL to be a multiple of: the first update has none."""
    clip = save_clip(tmp_path / "clip")
    torch.save(tiny_head(), tmp_path / "head.pth")
    convert("aesthetic", tmp_path / "head.pth", tmp_path / "aesthetic", clip=str(clip))
    folders = {"clip": clip, "pickscore": save_clip(tmp_path / "pick", model=tiny_clip(seed=5)), "hps": hps_folder}
    sources = [f"--scorer.{name}={folder}" for name, folder in (folders | {"aesthetic": tmp_path / "aesthetic"}).items()]
    small = ["--updates=3", "--groups=2", "--group_size=2", "--steps=2", "--fake.updates=1", "--device=cpu", "--weights.warmup=2"]
    told = ["--teacher", str(teacher_folder), "--prompts", str(prompt_file), "--output", str(tmp_path / "run")]
    told += ["--precision=fp32"]  # random weights denoise nothing: which sign what they say of a KL has, rounding to bf16 decides
    assert cli.main(["distill", "gndmr-4", *told, *small, *sources]) == 0
    updates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(updates) == 3
    for name in ("clip", "pickscore", "hps", "aesthetic"):
        assert all(math.isfinite(update[f"{name}/score"]) and update[f"{name}/masked"] == 0 for update in updates), name
        assert updates[-1][f"{name}/share"] > 0, name
