"""Real pictures to measure against, from a folder or from a data set on the hub, one at a time."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from fewstep.evaluate.features import Extractor
from fewstep.evaluate.sets import hub_parts, import_datasets, rows_of_hub
from fewstep.evaluate.store import SHARD, Rows, Shards, my_share

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
UNREAD = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl")  # pictures too, of several frames or that not every Pillow opens
PIXELS = 2**24  # of pictures that are held together, however few of them that makes: 200 MB as float32


class Pictures(NamedTuple):
    """A set of real pictures."""

    identity: dict[str, Any]  # n and a hash of the pictures' files, or the hub's commit, split and column
    n: int
    get: Callable[[int], Image.Image]  # by number


def open_pictures(source: str) -> Pictures:
    """A folder's pictures, recursively and through links, in the order of their paths, or those of owner/name[@revision][:split] on the
    hub. A folder's of UNREAD suffixes are left out, and counted in a warning.

    Raises ValueError.
    """
    return of_folder(Path(source)) if Path(source).is_dir() else of_hub(*hub_parts(source))


def of_folder(folder: Path) -> Pictures:
    found = [path for path in files_below(folder) if path.suffix.lower() in (*SUFFIXES, *UNREAD) and path.is_file()]
    read = (path for path in found if path.suffix.lower() in SUFFIXES)
    paths = sorted(read, key=lambda path: path.relative_to(folder).parts)  # Windows' own order of paths is without regard to case
    if not paths:
        raise ValueError(f"{folder}: holds no picture ({', '.join(SUFFIXES)})")
    if left := len(found) - len(paths):
        suffixes = ", ".join(sorted({path.suffix.lower() for path in found} - set(SUFFIXES)))
        warnings.warn(f"{folder}: {left} of {len(found)} pictures ({suffixes}) are not read; save them as .png", stacklevel=2)
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())

    def get(i: int) -> Image.Image:
        def opened() -> Image.Image:
            with Image.open(paths[i]) as image:
                return in_eight_bits(image)

        return named(str(paths[i]), opened)

    return Pictures({"n": len(paths), "sha256": digest.hexdigest()}, len(paths), get)


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder, in those in it and in those that they link to, but hidden ones; what links lead to again comes once."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(where)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(shown, key=lambda name, where=where: (os.path.islink(os.path.join(where, name)), name))
        yield from (Path(where, name) for name in names if not name.startswith("."))


def named(where: str, get: Callable[[], Image.Image]) -> Image.Image:
    """What `get` reads. Raises ValueError that says where a picture is that cannot be read, or is too large for Pillow."""
    try:
        return get()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: too large for Pillow to open ({error}); scale it down, or leave it out") from error
    except (OSError, ValueError, SyntaxError) as error:  # the last of a broken PNG
        raise ValueError(f"{where}: cannot be read as a picture ({error})") from error


def of_hub(name: str, revision: str | None, split: str | None) -> Pictures:
    """The first column of pictures of a data set's split; kept on disk by `datasets`, never in memory as a whole."""
    rows, found = rows_of_hub(name, revision, split)
    kind = import_datasets().Image
    column = next((key for key, feature in rows.features.items() if isinstance(feature, kind)), None)
    where = f"{name}, split {found['split']!r}"
    if column is None:
        raise ValueError(f"{name}: split {found['split']!r} has no column of pictures; it has {', '.join(rows.features)}")
    identity = {"n": len(rows), **found, "column": column}
    rows = rows.select_columns([column])  # the others would be decoded with it
    return Pictures(identity, len(rows), lambda i: named(f"{where}, row {i}", lambda: in_eight_bits(rows[i][column])))


def in_eight_bits(image: Image.Image | None) -> Image.Image:
    """In RGB. Raises ValueError for grey of more bits, which Pillow would cut off at 255, and for a data set's row without a picture."""
    if image is None:
        raise ValueError("there is none: it is null")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it holds grey values of more than 8 bits (mode {image.mode}); save it with 8 bits")
    return image.convert("RGB")


def as_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def some_at_a_time(pictures: Pictures, rows: Iterable[int], batch: int) -> Iterator[list[Image.Image]]:
    """The pictures of these rows in order, `batch` together, or fewer as soon as they have PIXELS; a list is emptied before the next."""
    images: list[Image.Image] = []
    for row in rows:
        images.append(pictures.get(row))
        if len(images) == batch or sum(image.width * image.height for image in images) >= PIXELS:
            yield images
            images.clear()  # who was given the list would hold it while the next pictures are read
    if images:
        yield images


@torch.no_grad()
def extract(images: list[Image.Image], extractor: Extractor, *, batch: int, device: str | torch.device) -> Tensor:
    """Features (N, d) of pictures of any sizes; those of one size go through the network together, `batch` at a time."""
    assert extractor.function is not None
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.size, []).append(i)
    out = torch.empty(len(images), extractor.width)
    for rows in by_size.values():
        for first in range(0, len(rows), batch):
            some = rows[first : first + batch]
            stack = torch.stack([as_tensor(images[i]) for i in some]).to(device)
            found = extractor.function(stack).float().cpu()
            if found.shape != (len(some), extractor.width):
                size = f"{stack.shape[2]} x {stack.shape[3]} (height x width)"
                shape = f"({len(some)}, {extractor.width})"
                raise ValueError(f"extractor {extractor.name!r}: gave {tuple(found.shape)} for pictures of {size}, and must give {shape}")
            out[some] = found
    return out


def features(
    pictures: Pictures,
    extractors: Mapping[str, Extractor],
    folder: Path,
    *,
    versions: Mapping[str, str],
    batch: int,
    device: str | torch.device,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> dict[str, Rows] | None:
    """Each extractor's features of all pictures, as distances take them, kept in `folder` part by part; None where only a share of them was
    looked at.

    versions: of the libraries that read pictures and make features of them. What is kept there from before, of the same pictures by the
    same extractor under the same versions, is not computed again.
    """
    made_by = {"data": pictures.identity, "versions": dict(versions)}
    notes = {name: made_by | {"weights": e.weights, "config": e.config, "resize": e.resize} for name, e in extractors.items()}
    kept = {name: Shards(folder, note, pictures.n, size=SHARD) for name, note in notes.items()}
    missing = {name: shards.missing() for name, shards in kept.items()}
    wanted = my_share(sorted({i for parts in missing.values() for i in parts}), share)
    for i in track(wanted, "real pictures", disable=not (progress and wanted)):
        found: dict[str, list[Tensor]] = {name: [] for name in extractors if i in missing[name]}
        for images in some_at_a_time(pictures, next(iter(kept.values())).pictures(i), batch):
            for name, parts in found.items():
                parts.append(extract(images, extractors[name], batch=batch, device=device))
        for name, parts in found.items():
            kept[name].save(i, {f"features/{name}": torch.cat(parts)})
    if share != (0, 1):
        return None
    return {name: e.for_distances(kept[name].open()[f"features/{name}"]) for name, e in extractors.items()}
