"""Features of pictures. A distance is named after its features: FD-clip, never FID (that is InceptionV3's)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep import hub
from fewstep.evaluate.configs import config_hash
from fewstep.evaluate.store import fingerprint
from fewstep.rewards import files
from fewstep.rewards import sources as origins
from fewstep.rewards.clip import FAMILIES, PROCESSORS, CLIPScore, kind_of, read_config, read_processor

PATCH = 299  # edge of the crop that patch-FID looks at, as InceptionV3 reads it


class Extractor(NamedTuple):
    """A network whose features pictures are compared by, and what the distances of its features are called."""

    name: str  # of what is kept of it: "features/NAME"
    frechet: str  # its Frechet distance: fid, patch_fid, fd_NAME
    kernel: str | None = None  # its kernel distance: kid, cmmd
    unit: bool = True  # features are kept at unit length, and enter every distance times sqrt(d)
    function: Callable[[Tensor], Tensor] | None = None  # pictures (B, 3, H, W) in [0, 1] -> (B, d)
    width: int = 0  # d
    weights: str = ""  # SHA-256
    resize: str = ""  # how a picture is brought to its size, in words
    config: str | None = None  # SHA-256 of its network's configuration

    def for_distances(self, features: Any) -> Any:
        """Features, a Tensor (N, d) or `Rows` on disk, as every distance takes them: unit ones times sqrt(d), others as they are."""
        if not self.unit:
            return features
        return scaled(features) if isinstance(features, Tensor) else features.times(features.shape[1] ** 0.5)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, *, batch: int = 64) -> Tensor:
    """`function` over images (N, 3, H, W), `batch` at a time -> (N, ...) on the CPU."""
    return torch.cat([function(chunk).cpu() for chunk in images.split(batch)])


def scaled(unit: Tensor) -> Tensor:
    """FD-clip features from unit image features (N, d): times sqrt(d), so that the mean square per dimension is 1."""
    return unit * unit.shape[1] ** 0.5


def clip_features(scorer: CLIPScore, images: Tensor, *, batch: int = 64) -> Tensor:
    """FD-clip features of images (N, 3, H, W) in [0, 1] -> (N, d) on the CPU.

    The scorer's unit image features times sqrt(d): the mean square per dimension is 1 whatever d, and every distance of
    the features is d times that of the unit features.
    """
    return scaled(in_batches(scorer.image_features, images, batch=batch))


# Pictures on their way to a network


def to_bytes(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> uint8, rounded as a PNG file holds them."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def square(images: Tensor, edge: int | None) -> Tensor:
    """(B, 3, H, W) uint8 -> the square in the middle of each, brought to `edge` pixels by PIL's Lanczos filter; None: as they are."""
    if edge is None or tuple(images.shape[2:]) == (edge, edge):
        return images
    images = crop(images, min(images.shape[2:]))
    resized = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((edge, edge), Image.Resampling.LANCZOS) for image in images.cpu()]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2).contiguous().to(images.device)


def crop(images: Tensor, edge: int) -> Tensor:
    """The square of `edge` pixels in the middle of (B, 3, H, W); pictures that are smaller along either edge are left as they are."""
    height, width = images.shape[2:]
    if min(height, width) < edge:
        return images
    top, left = (round((length - edge) / 2) for length in (height, width))
    return images[:, :, top : top + edge, left : left + edge]


def as_kept(images: Tensor, edge: int | None) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> the same as PNG files of `edge` pixels would hold it, in [0, 1]."""
    return square(to_bytes(images), edge).float() / 255


# The extractors: name on the command line -> who makes them from (weights, resize, device)


def of_scorer(name: str, scorer: CLIPScore) -> Extractor:
    """A scorer that is there already as an extractor: its unit image features."""
    width, weights, config = scorer.width, fingerprint(scorer.model), config_hash(scorer.model)
    return Extractor(name, "fd_clip", None, True, scorer.image_features, width, weights, "the scorer's own", config)


def make_clip(source: str | None, resize: int | None, device: str | torch.device) -> list[Extractor]:
    """Image features of any CLIP or SigLIP in a folder or on the hub: FD-clip, and CMMD, whose published numbers are those of OpenAI's
    ViT-L/14 at 336 px."""
    if source is None:
        raise ValueError("give the folder of a CLIP model (config, safetensors, preprocessing) or its hub id: --extractor.clip FOLDER")
    scorer = CLIPScore.load(files.fetch(files.resolve(source)), device=device)

    def features(images: Tensor) -> Tensor:
        return scorer.image_features(as_kept(images, resize))

    first = in_words(resize)
    width, weights, config = scorer.width, fingerprint(scorer.model), config_hash(scorer.model)
    return [Extractor("extractor-clip", "fd_clip", "cmmd", True, features, width, weights, f"{first}then {scorer.preprocess}", config)]


def make_other(name: str, source: str | None, resize: int | None, device: str | torch.device) -> list[Extractor]:
    """An extractor under a name of the user's own: a CLIP beside the first, another vision model of transformers, a function in a file."""
    if source is None or not (origins.is_code(source) or Path(source).expanduser().is_dir() or re.fullmatch(hub.NAME, source)):
        raise ValueError(
            f"unknown; known: {', '.join(EXTRACTORS)}. One of your own: --extractor.{name} with the folder or hub id of a vision model, "
            "or path/to/file.py:function"
        )
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise ValueError("a name is made of letters, digits, - and _")
    if origins.is_code(source):
        return [of_function(name, source, resize, device)]
    folder = files.fetch(files.resolve(source))
    if read_config(folder / "config.json").get("model_type") in FAMILIES:
        (clip,) = make_clip(str(folder), resize, device)
        return [clip._replace(name=f"extractor-{name}", frechet=f"fd_{name}", kernel=None)]
    return [of_vision(name, folder, resize, device)]


def of_vision(name: str, folder: Path, resize: int | None, device: str | torch.device) -> Extractor:
    """The pooled features of a transformers vision model, as they are: DINOv2's are its class token behind the last norm.

    Raises ValueError for a model without them, and for preprocessing that is not the resize, centre and normalisation of `Preprocess`.
    """
    from transformers import AutoModel

    path, processor = read_processor(folder)
    own = "give a function that does all of it, path/to/file.py:function"
    if (kind := kind_of(processor)) not in PROCESSORS:
        raise ValueError(f"{path}: a processor of the kind {kind} does more than resize, crop and normalise, or is not known here; {own}")
    off = [key for key in ("do_resize", "do_rescale", "do_normalize") if not processor.get(key, True)]
    if off or isinstance(processor.get("size"), int):  # a size that is one number is an edge to some of them and a square to others
        raise ValueError(f"{path}: {' and '.join(off) or 'size'} is not as it is read here; {own}")
    preprocess = CLIPScore.read_preprocess(folder, 224)  # transformers' own, whatever the network was trained on (DINOv2: 518)
    model = files.read_model(AutoModel, folder, more=True).to(device).float().eval().requires_grad_(False)  # a head is not read

    def features(images: Tensor) -> Tensor:
        pictures = as_kept(images, resize)
        pooled = getattr(model(pixel_values=preprocess(pictures.to(device))), "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{folder}: a {type(model).__name__} has no pooled features (pooler_output); {own}")
        return pooled.flatten(1)

    if model.main_input_name != "pixel_values":
        raise ValueError(f"{folder}: a {type(model).__name__} does not read pictures")
    width, words = features(torch.zeros(1, 3, 8, 8)).shape[1], f"{in_words(resize)}then {preprocess}"
    weights, config = fingerprint(model), config_hash(model)
    return Extractor(f"extractor-{name}", f"fd_{name}", None, False, features, width, weights, words, config)


def of_function(name: str, source: str, resize: int | None, device: str | torch.device) -> Extractor:
    """A function in a file: pictures (B, 3, H, W) in [0, 1] on the device -> features (B, d), which are taken as they are.

    d must be the same for pictures of all sizes: what is drawn and what is real may differ in theirs.
    """
    function = origins.load_function(source)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        pictures = as_kept(images, resize)
        try:
            found = function(pictures)
        except Exception as error:
            shape = " x ".join(map(str, pictures.shape))
            raise ValueError(f"{source}: raised {type(error).__name__} on pictures ({shape}): {error}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"{source}: must return a tensor ({len(images)}, d) for {len(images)} pictures, got {shape}")
        return found

    edge = resize or PATCH
    width = features(torch.zeros(2, 3, edge, edge, device=device)).shape[1]
    words = f"{in_words(resize)}then as the function has it"

    def looked(images: Tensor) -> Tensor:
        found = features(images)
        height, across = images.shape[2:]
        if found.shape[1] != width:
            raise ValueError(
                f"{source}: returned {found.shape[1]} features of each of the pictures of {height} x {across} (height x width), but "
                f"{width} of one of {edge} x {edge}; bring all to one size with --resize, or let the function return as many of every size"
            )
        bad = int((~torch.isfinite(found)).any(1).sum())
        if bad:
            raise ValueError(f"{source}: returned NaN or inf for {bad} of {len(found)} pictures of {height} x {across} (height x width)")
        return found

    return Extractor(f"extractor-{name}", f"fd_{name}", None, False, looked, width, origins.function_version(source), words)


def in_words(resize: int | None) -> str:
    return "" if resize is None else f"centre square to {resize} x {resize} by PIL's Lanczos, "


def make_inception(path: str | None, resize: int | None, device: str | torch.device) -> list[Extractor]:
    """InceptionV3 as torch-fidelity has it, the network of FID and KID; and the same on crops, for patch-FID.

    path: its weights (torch-fidelity's .pth, or the same tensors as safetensors); None: where torch-fidelity downloads them to.
    """
    network = read_inception(path).to(device)
    weights, own = fingerprint(network), "bilinear to 299 x 299 as TensorFlow 1 does it, without antialiasing"

    def whole(images: Tensor) -> Tensor:
        return network(square(to_bytes(images), resize))[0]

    def patch(images: Tensor) -> Tensor:
        return network(crop(to_bytes(images), PATCH))[0]

    cut = f"one crop of {PATCH} x {PATCH} from the middle of the full-size picture (smaller ones whole), {own}"
    return [
        Extractor("inception", "fid", "kid", False, whole, 2048, weights, in_words(resize) + own),
        Extractor("inception-patch", "patch_fid", None, False, patch, 2048, weights, cut),
    ]


def read_inception(path: str | None) -> nn.Module:
    """torch-fidelity's InceptionV3 with its 2048 pooled features. Raises ValueError saying what is missing."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(f'InceptionV3 needs torch-fidelity: pip install "fewstep[eval]" ({error})') from error
    state = inception_weights(path, URL_INCEPTION_V3)
    buffer = io.BytesIO()  # the class unpickles whatever file it is given: it gets what was read here as plain tensors
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of torch-fidelity's InceptionV3 ({' '.join(str(error).split())[:200]})") from error


def inception_weights(path: str | None, url: str) -> dict[str, Tensor]:
    """Tensors by name, from a file or from where torch-fidelity publishes them; nothing but tensors is unpickled."""
    try:
        if path is None:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the hub, zip, pickle and safetensors readers raise many kinds; each means that there are no weights
        what = f"{path}: cannot be read as weights" if path else f"{url}: cannot be downloaded; give a file, --extractor.inception PATH"
        raise ValueError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error


EXTRACTORS: dict[str, Callable[[str | None, int | None, Any], list[Extractor]]] = {"inception": make_inception, "clip": make_clip}


def make_extractors(sources: Iterable[tuple[str, str | None]], *, resize: int | None, device: str | torch.device) -> list[Extractor]:
    """Extractors by their name, in EXTRACTORS or of the user's own, and where each is from. Raises ValueError naming the flag."""
    made = []
    for name, source in sources:
        make = EXTRACTORS.get(name) or partial(make_other, name)
        try:
            made += make(source, resize, device)
        except (OSError, ValueError) as error:
            raise ValueError(f"extractor.{name}: {error}") from error
    return made
