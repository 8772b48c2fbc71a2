"""Extractors: InceptionV3 as torch-fidelity has it, any CLIP; what a picture goes through before them."""

import fidelity
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.evaluate import features
from fewstep.evaluate.features import crop, make_extractors, square, to_bytes


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


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[eval\]'"):
        features.read_inception(None)
