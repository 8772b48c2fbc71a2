"""Extractors: InceptionV3 as torch-fidelity has it, any CLIP, other vision models, functions; what a picture goes through before them."""

import json

import fidelity
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_evaluate import tiny_clip, to_pil
from test_scorers import Hub, save_clip, tiny_siglip
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2ForImageClassification, Dinov2Model, ViTConfig, ViTModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fewstep.evaluate import evaluation, features, measure, tables
from fewstep.evaluate.distances import FeatureSet
from fewstep.evaluate.features import Extractor, crop, make_extractors, square, to_bytes
from fewstep.rewards.clip import CLIPScore


def pictures(n, height, width, seed=0):
    """Whole 8-bit values in [0, 1]."""
    coarse = torch.rand(n, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).round() / 255


@pytest.fixture(scope="module")
def inception():
    return fidelity.inception()


@pytest.fixture(scope="module")
def weights(inception, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    torch.save(inception.state_dict(), folder / "weights.pth")
    save_file(inception.state_dict(), folder / "weights.safetensors")
    return folder


def test_inception_features_are_torch_fidelitys_of_the_same_files(inception, weights, tmp_path):
    """On 8-bit pictures as they are saved, through its own network; from .pth and .safetensors alike."""
    images = pictures(3, 340, 310)
    for i, pixels in enumerate(to_bytes(images).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    files = [np.asarray(Image.open(tmp_path / f"{i}.png")).copy() for i in range(3)]
    batch = torch.stack([torch.from_numpy(file).permute(2, 0, 1) for file in files])
    (expected,) = inception(batch)
    (cut,) = inception(batch[:, :, 20:319, 6:305])  # (340 - 299) / 2 = 20.5 rounds to the even 20, 5.5 to 6
    found = [make_extractors([("inception", str(weights / f"weights.{end}"))], resize=None, device="cpu") for end in ("pth", "safetensors")]
    for whole, patch in found:
        assert torch.equal(whole.function(images), expected)
        assert torch.equal(patch.function(images), cut)
    whole, patch = found[0]
    assert (whole.frechet, whole.kernel, patch.frechet, patch.kernel) == ("fid", "kid", "patch_fid", None)
    assert whole.width == expected.shape[1] == 2048 and not whole.unit
    assert whole.weights == patch.weights == found[1][0].weights
    assert (expected[0] - expected[1]).norm() > 0.05 * expected[0].norm()  # the random network tells pictures apart
    assert "299 x 299 as TensorFlow 1 does it" in whole.resize and "from the middle of the full-size picture" in patch.resize


def test_the_stamped_resize_comes_before_the_network_but_not_before_the_crop(inception, weights):
    images = pictures(2, 400, 320)
    whole, patch = make_extractors([("inception", str(weights / "weights.pth"))], resize=64, device="cpu")
    small = square(to_bytes(images), 64)
    assert torch.equal(whole.function(images), inception(small)[0])
    assert torch.equal(patch.function(images), inception(crop(to_bytes(images), 299))[0])
    assert whole.resize.startswith("centre square to 64 x 64 by PIL's Lanczos, bilinear")
    expected = Image.fromarray(to_bytes(images)[0, :, 40:360].permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.LANCZOS)
    assert torch.equal(small[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_pictures_are_rounded_as_a_file_holds_them():
    levels = torch.tensor([0.0, 0.4, 0.6, 254.4, 254.6, 255.0, -3.0, 258.0]) / 255
    assert to_bytes(levels).tolist() == [0, 0, 1, 254, 255, 255, 0, 255]


def test_small_pictures_are_not_cropped_and_squares_of_the_size_are_left_alone():
    images = to_bytes(pictures(1, 300, 298))
    assert torch.equal(crop(images, 299), images)
    for margin, first in ((1, 0), (3, 2), (5, 2), (7, 4), (4, 2)):  # halves go to the even number, as torchvision's go
        rows = torch.arange(64 + margin).view(1, 1, -1, 1).expand(1, 3, -1, 64)
        kept = torch.arange(first, first + 64).view(1, 1, -1, 1).expand(1, 3, -1, 64)
        assert torch.equal(crop(rows, 64), kept) and torch.equal(crop(rows.mT, 64), kept.mT)
    even = to_bytes(pictures(1, 64, 64))
    assert square(even, 64) is even and square(images, None) is images


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (open, ("/nonexistent/should-not-be-opened", "w"))


def test_weights_that_are_none_are_refused_and_run_no_code(weights, tmp_path, monkeypatch):
    torch.save({"x": Trap()}, tmp_path / "trap.pth")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, words in (("trap.pth", "cannot be read as weights .UnpicklingError"), ("nowhere.pth", "cannot be read as weights"),
                        ("other.safetensors", "not the weights of torch-fidelity's InceptionV3")):  # fmt: skip
        with pytest.raises(ValueError, match=f"extractor.inception: .*{name}: {words}"):
            make_extractors([("inception", str(tmp_path / name))], resize=None, device="cpu")
    asked = []

    def download(url, **options):
        asked.append((url, options))
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with pytest.raises(ValueError, match=r"cannot be downloaded; give a file, --extractor.inception PATH .OSError: offline"):
        make_extractors([("inception", None)], resize=None, device="cpu")
    ((url, options),) = asked
    assert url.endswith("weights-inception-2015-12-05-6726825d.pth") and options["weights_only"] and options["check_hash"]
    with pytest.raises(ValueError, match=r"extractor.inceptoin: unknown; known: inception, clip"):
        make_extractors([("inceptoin", None)], resize=None, device="cpu")
    with pytest.raises(ValueError, match=r"give the folder of a CLIP model .*--extractor.clip FOLDER"):
        make_extractors([("clip", None)], resize=None, device="cpu")


# CLIPs, other vision models, functions


def made(*sources, resize=None):
    return make_extractors([(name, str(source)) for name, source in sources], resize=resize, device="cpu")


SHAPE = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}


def save_dinov2(folder, **changed):
    """A DINOv2 with its own processor: 32 pixels, of which the middle 28."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SHAPE)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, resample=3, **changed).save_pretrained(folder)
    return folder


def test_dinov2_features_are_its_class_token_on_its_own_preprocessing(tmp_path):
    """Through transformers' own processor and model, behind whose norm the published FD-DINOv2 takes them."""
    folder, images = save_dinov2(tmp_path / "dino"), pictures(3, 40, 53)
    (extractor,) = made(("dino", folder))
    pixels = BitImageProcessorPil.from_pretrained(folder)(to_pil(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder).eval()(pixel_values=torch.as_tensor(pixels)).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor.function(images), expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).norm() > 0.01 * expected[0].norm()
    assert (extractor.name, extractor.frechet, extractor.kernel, extractor.unit) == ("extractor-dino", "fd_dino", None, False)
    assert extractor.width == 12 and "crop=(28, 28)" in extractor.resize
    assert [tables.label(f"fd_dino_{what}") for what in ("data", "teacher")] == ["FD-dino to data ↓", "FD-dino to teacher ↓"]
    assert tables.label("fd_clip_data") == tables.LABELS["fd_clip_data"]
    (small,) = made(("dino", folder), resize=20)
    assert torch.equal(small.function(images), extractor.function(square(to_bytes(images), 20) / 255)) and "20 x 20" in small.resize
    said = json.loads((folder / "preprocessor_config.json").read_text())
    (tmp_path / "less").mkdir()
    (tmp_path / "less" / "preprocessor_config.json").write_text(
        json.dumps({k: v for k, v in said.items() if k not in ("size", "crop_size")})
    )
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "less" / file).symlink_to(folder / file)
    assert (
        "resize=224, crop=(224, 224)" in made(("dino", tmp_path / "less"))[0].resize
    )  # as its processor has it, whatever the network's edge
    headed = Dinov2ForImageClassification(Dinov2Config(**SHAPE))
    headed.dinov2.load_state_dict(Dinov2Model.from_pretrained(folder).state_dict())
    headed.save_pretrained(folder)
    (same,) = made(("dino", folder))  # what is on top is not read
    assert same.weights == extractor.weights and torch.equal(same.function(images), extractor.function(images))


def test_a_vit_is_read_like_its_processor_does(tmp_path):
    torch.manual_seed(0)
    model, images = ViTModel(ViTConfig(**SHAPE)).eval(), pictures(2, 40, 53)
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    (extractor,) = made(("vit", tmp_path))
    pixels = ViTImageProcessorPil.from_pretrained(tmp_path)(to_pil(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(extractor.function(images), model(pixel_values=torch.as_tensor(pixels)).pooler_output, rtol=0, atol=1e-5)


def test_several_clips_and_siglips_measure_in_one_call(tmp_path, monkeypatch):
    import huggingface_hub

    first, second, siglip = save_clip(tmp_path / "a"), save_clip(tmp_path / "b", model=tiny_clip(seed=5)), save_clip(tmp_path / "s")
    tiny_siglip().save_pretrained(siglip)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(siglip)
    hub = Hub(second)
    for name in ("HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    found = made(("clip", first), ("other", "owner/model"), ("siglip", siglip))
    assert [(e.name, e.frechet, e.kernel) for e in found] == [
        ("extractor-clip", "fd_clip", "cmmd"), ("extractor-other", "fd_other", None), ("extractor-siglip", "fd_siglip", None),
    ]  # fmt: skip
    assert hub.asked == [("owner/model", None), ("owner/model", hub.commit)]
    images = pictures(2, 20, 27)
    for extractor, folder in zip(found, (first, second, siglip), strict=True):
        seen = extractor.function(images)
        assert torch.equal(seen, CLIPScore.load(folder).image_features(images)) and extractor.unit
        assert seen.shape[1] == extractor.width
    assert [e.width for e in found] == [8, 8, 16] and len({e.weights for e in found}) == 3
    (alone,) = made(("clip", siglip))
    assert alone.width == 16 and alone.weights == found[2].weights and alone.frechet == "fd_clip"


MINE = """
def means(images):
    return images.mean((2, 3))
def corners(images):
    return images[:, :, 0, :2].flatten(1)
def flat(images):
    return images.mean((1, 2, 3))
def broken(images):
    raise KeyError("no")
def pixels(images):
    return images.flatten(1)
def inverse(images):
    return 1 / images.mean((2, 3))
"""


def test_a_function_of_the_users_own_is_an_extractor(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    images = pictures(3, 20, 27) + 0.3 / 255
    means, corners = made(("means", f"{tmp_path}/mine.py:means"), ("corners", f"{tmp_path}/mine.py:corners"))
    assert torch.equal(means.function(images), (to_bytes(images).float() / 255).mean((2, 3)))  # rounded as a file holds them
    assert (means.width, corners.width, means.frechet, corners.name) == (3, 6, "fd_means", "extractor-corners")
    assert means.weights != corners.weights  # of one file
    (tmp_path / "mine.py").write_text(MINE + "#")
    assert made(("means", f"{tmp_path}/mine.py:means"))[0].weights != means.weights
    for name, words in (
        ("flat", r"must return a tensor \(2, d\) for 2 pictures, got \(2,\)"), ("broken", "raised KeyError on pictures .*no"),
        ("none", "has no function 'none'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"extractor.mine: .*mine.py:? ?.*{words}"):
            made(("mine", f"{tmp_path}/mine.py:{name}"))


def test_a_function_is_asked_on_the_device_alone(tmp_path):
    """Its model may live there."""
    (tmp_path / "mine.py").write_text("def on_meta(images):\n    assert images.is_meta\n    return images.mean((2, 3))\n")
    (found,) = features.make_extractors([("mine", f"{tmp_path}/mine.py:on_meta")], resize=None, device="meta")
    assert found.width == 3


def test_a_functions_features_are_of_one_width_and_finite(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    pixels, inverse = made(("pixels", f"{tmp_path}/mine.py:pixels"), ("inverse", f"{tmp_path}/mine.py:inverse"))
    with pytest.raises(
        ValueError, match=rf"mine.py:pixels: returned 600 features of .* 10 x 20 .*, but {299 * 299 * 3} of one of 299 x 299; "
    ):
        pixels.function(pictures(2, 10, 20))
    (sized,) = features.make_extractors([("pixels", f"{tmp_path}/mine.py:pixels")], resize=8, device="cpu")
    assert sized.function(pictures(2, 10, 20)).shape == (2, 192)
    black = pictures(3, 10, 20) * torch.tensor([1, 0, 1]).view(3, 1, 1, 1)
    with pytest.raises(ValueError, match=r"mine.py:inverse: returned NaN or inf for 1 of 3 pictures of 10 x 20"):
        inverse.function(black)
    assert inverse.function(pictures(3, 10, 20)).shape == (3, 3)


def test_features_that_measure_nothing_are_named():
    """Of a function, in Python, that nothing has looked at before."""
    mine = Extractor("mine", "fd_mine", width=2)
    seen, prompts = torch.rand(12, 2) + 0.1, [f"a {i}" for i in range(6)]

    def found(seen, **options):
        sets = {what: {"mine": FeatureSet(features)} for what, features in options.items()}
        return measure.measure({"features/mine": seen}, prompts, 2, {}, extractors=[mine], draws=5, **sets)

    with pytest.raises(ValueError, match=r"'mine' has 2 features of a generated picture and 3 of one of the data's; it needs one width"):
        found(seen, data=torch.rand(9, 3))
    holed = seen.index_fill(0, torch.tensor([4]), torch.nan)
    for options, words in (({}, "generated"), ({"teacher": seen}, "generated"), ({"data": seen}, "generated")):
        with pytest.raises(ValueError, match=f"1 of 12 {words} 'mine' features hold NaN or inf"):
            found(holed, **options)
    for options, words in (({"teacher": holed}, "teacher"), ({"data": holed}, "real")):
        with pytest.raises(ValueError, match=f"1 of 12 {words} 'mine' features hold NaN or inf"):
            found(seen, **options)
    without = found(seen.index_fill(0, torch.tensor([4]), 0.0))
    assert "diversity" not in without.metrics
    assert without.left_out["diversity"] == "1 of 12 pictures have features that are all zero, which have no angle to others"


def test_too_few_pictures_for_an_extractor_leave_its_distance_out():
    """Nothing else of a long evaluation is lost with it, and a solver is the nearest by whatever distance there is."""
    extractors = [Extractor(f"extractor-{name}", f"fd_{name}", width=width) for name, width in (("wide", 40), ("mine", 2))]
    generator = torch.Generator().manual_seed(0)
    seen, other = ({e.name: torch.randn(12, e.width, generator=generator) for e in extractors} for _ in range(2))
    observed = {f"features/{name}": torch.nn.functional.normalize(values) for name, values in seen.items()}
    prompts = [f"a {i}" for i in range(6)]
    teacher = {name: FeatureSet(features) for name, features in other.items()}
    whole = measure.measure(observed, prompts, 2, {}, extractors=extractors, teacher=teacher, draws=5)
    found = whole.metrics
    assert whole.left_out == {"fd_wide_teacher": "12 pictures, but the covariance of 40 features needs more than 40"}
    assert list(found) == ["fd_mine_teacher", "diversity"]
    assert evaluation.nearness(found) == found["fd_mine_teacher"]["value"] > 0


def test_a_model_that_cannot_be_an_extractor_is_refused(tmp_path):
    def refused(words, change=lambda folder: None, **options):
        folder = save_dinov2(tmp_path / f"dino-{len(list(tmp_path.iterdir()))}", **options)
        change(folder)
        with pytest.raises(ValueError, match=f"extractor.dino: .*{words}") as error:
            made(("dino", folder))
        assert "\n" not in str(error.value)

    def rewritten(name, **values):
        def change(folder):
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({key: value for key, value in (config | values).items() if value is not ...}))

        return change

    processor = "preprocessor_config.json"
    refused("of the kind Sam does more than resize, crop and normalise", rewritten(processor, image_processor_type="SamImageProcessor"))
    refused("None does more .*or is not known here", rewritten(processor, image_processor_type=...))
    refused("do_rescale is not as it is read here; give a function", do_rescale=False)
    refused("size is not as it is read here", rewritten(processor, size=32))
    refused("config.json: cannot be read", lambda folder: (folder / "config.json").unlink())
    refused("cannot be read .*model type `?dinov9", rewritten("config.json", model_type="dinov9"))
    refused("not those of a whole Dinov2Model: .* missing", rewritten("config.json", num_hidden_layers=2))
    refused("holds no weights", lambda folder: (folder / "model.safetensors").unlink())

    def bert(folder):
        sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
        BertModel(BertConfig(**sizes)).save_pretrained(folder)

    refused("a BertModel does not read pictures", bert)
    for name, source, words in (
        ("dino", "nowhere", "unknown; known: inception, clip. One of your own: --extractor.dino"),
        ("dino", "./no/where", "unknown; known"),
        ("dino", "./nowhere", "./nowhere: no such folder, and not a hub id"),
        ("di/no", tmp_path, "a name is made of letters, digits, - and _"),
        ("dino", "nowhere.py:f", "nowhere.py: no such file"),
    ):
        with pytest.raises(ValueError, match=f"extractor.{name}: .*{words}"):
            made((name, source))


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r'pip install "fewstep\[eval\]"'):
        features.read_inception(None)
