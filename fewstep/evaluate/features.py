"""Features of pictures. A distance is named after its features: FD-clip, never FID (that is InceptionV3's)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from fewstep.evaluate.store import fingerprint
from fewstep.rewards.clip import CLIPScore

PATCH = 299  # edge of the crop that patch-FID looks at, as InceptionV3 reads it


class Extractor(NamedTuple):
    """A network whose features pictures are compared by, and what the distances of its features are called."""

    name: str  # of what is kept of it: "features/NAME"
    frechet: str  # its Frechet distance: fid, patch_fid, fd_clip
    kernel: str | None = None  # its kernel distance: kid, cmmd
    unit: bool = True  # features are kept at unit length, and enter every distance times sqrt(d)
    function: Callable[[Tensor], Tensor] | None = None  # pictures (B, 3, H, W) in [0, 1] -> (B, d)
    width: int = 0  # d
    weights: str = ""  # SHA-256
    resize: str = ""  # how a picture is brought to its size, in words


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, *, batch: int = 64, progress: str | None = None) -> Tensor:
    """`function` over images (N, 3, H, W), `batch` at a time -> (N, ...) on the CPU. progress: the bar's name (None: no bar)."""
    chunks = images.split(batch)
    return torch.cat([function(chunk).cpu() for chunk in track(chunks, progress or "", disable=progress is None)])


def scaled(unit: Tensor) -> Tensor:
    """FD-clip features from unit image features (N, d): times sqrt(d), so that the mean square per dimension is 1."""
    return unit * unit.shape[1] ** 0.5


def clip_features(scorer: CLIPScore, images: Tensor, *, batch: int = 64, progress: str | None = None) -> Tensor:
    """FD-clip features of images (N, 3, H, W) in [0, 1] -> (N, d) on the CPU.

    The scorer's unit image features times sqrt(d): the mean square per dimension is 1 whatever d, and every distance of
    the features is d times that of the unit features.
    """
    return scaled(in_batches(scorer.image_features, images, batch=batch, progress=progress))


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


# The extractors: name on the command line -> who makes them from (weights, resize, device)


def of_scorer(name: str, scorer: CLIPScore) -> Extractor:
    """A scorer that is there already as an extractor: its unit image features."""
    width = int(scorer.model.config.projection_dim)
    return Extractor(name, "fd_clip", None, True, scorer.image_features, width, fingerprint(scorer.model), "the scorer's own")


def make_clip(folder: str | None, resize: int | None, device: str | torch.device) -> list[Extractor]:
    """Image features of any CLIP in a folder: FD-clip, and CMMD, whose published numbers are those of OpenAI's ViT-L/14 at 336 px."""
    if folder is None:
        raise ValueError("give the folder of a CLIP model (config, safetensors, preprocessing): --extractor.clip FOLDER")
    scorer = CLIPScore.load(folder, device=device)

    def features(images: Tensor) -> Tensor:
        return scorer.image_features(square(to_bytes(images), resize).float() / 255)

    first = in_words(resize)
    width, weights = int(scorer.model.config.projection_dim), fingerprint(scorer.model)
    return [Extractor("extractor-clip", "fd_clip", "cmmd", True, features, width, weights, f"{first}then {scorer.preprocess}")]


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
        raise ValueError(f"InceptionV3 needs torch-fidelity: pip install 'fewstep[eval]' ({error})") from error
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
    """Extractors by their name in EXTRACTORS and where their weights are. Raises ValueError naming the flag."""
    made = []
    for name, source in sources:
        if name not in EXTRACTORS:
            raise ValueError(f"extractor.{name}: unknown; known: {', '.join(EXTRACTORS)}")
        try:
            made += EXTRACTORS[name](source, resize, device)
        except (OSError, ValueError) as error:
            raise ValueError(f"extractor.{name}: {error}") from error
    return made
