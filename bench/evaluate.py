"""What evaluation itself costs: pictures a second, peak memory and disk, with a pipeline and an extractor that cost next to nothing.

    python bench/evaluate.py --pictures 10000 --output docs/results/evaluate-10k.json     # a quarter of an hour on one thread

A student, its teacher and the teacher with few steps are drawn (and the teacher's second sample), 256 x 256 pixels, with 2048 features a
picture; FID and KID to the teacher with their intervals are measured for each row. A real pipeline and a real extractor add their own time
and memory to these; nothing of what is here grows with either. Memory is the peak of the process's resident memory (Linux).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from step import resident
from torch import Tensor, nn

from fewstep.evaluate import drawing, evaluation
from fewstep.evaluate.features import Extractor
from fewstep.evaluate.sets import PromptSet

FEATURES = 2048
MIB = 1024**2


class Tilt(nn.Module):
    """Stands for a network: one weight, so that student and teacher differ."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Noise:
    """A pipeline whose pictures are noise of its generators: (B, 3, size, size) in [0, 1]."""

    def __init__(self, size: int, weight: float) -> None:
        self.unet, self.size, self.device = Tilt(weight), size, torch.device("cpu")
        self.components = {"unet": self.unet}
        self.scheduler = SimpleNamespace(step=lambda x: x, config={"_class_name": "Flow"})

    def set_progress_bar_config(self, **_: Any) -> None: ...

    @torch.no_grad()
    def __call__(self, prompt: list[str], generator: list[torch.Generator], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(images=self.unet(torch.stack([torch.rand(3, self.size, self.size, generator=g) for g in generator])))


def pixels(size: int) -> Extractor:
    """2048 pixels of a picture, far apart."""
    return Extractor("pixels", "fid", "kid", False, lambda x: x.flatten(1)[:, :: 3 * size**2 // FEATURES][:, :FEATURES].clone(), FEATURES)


def most() -> float:
    """The peak of this process's resident memory so far, in MiB."""
    return resident("VmHWM") / MIB


def measure(pictures: int, size: int, batch: int = 16) -> dict[str, Any]:
    libraries, told = most(), {"began": time.perf_counter()}
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "prompts": PromptSet("numbers", [f"picture {i}" for i in range(pictures)]), "scorers": {}, "extractors": [pixels(size)],
            "images_per_prompt": 1, "noise": "picture", "batch": batch, "work": folder, "cache": folder,
        }  # fmt: skip

        def source(weight: float) -> Any:
            return lambda: drawing.Source(Noise(size, weight), lambda guidance: {"guidance_scale": guidance}, (size, size))

        evaluation.evaluate(source(0.9), teacher=source(1.0), share=(0, 2), **common)
        evaluation.evaluate(source(0.9), teacher=source(1.0), share=(1, 2), **common)
        told["drawn"], peak_drawing = time.perf_counter(), most()
        report = evaluation.evaluate(source(0.9), teacher=source(1.0), **common)
        assert report is not None
        told["measured"] = time.perf_counter()
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    samples = len(report["rows"]) + 1  # and the teacher's second sample, which the rows are compared with
    seconds = {"drawing": told["drawn"] - told["began"], "measuring": told["measured"] - told["drawn"]}
    return {
        "pictures": pictures,
        "size": size,
        "features": FEATURES,
        "samples": samples,
        "metrics": sorted(report["rows"][0]["metrics"]),
        "seconds": seconds,
        "pictures_per_second": samples * pictures / sum(seconds.values()),
        "peak_mib": max(most(), peak_drawing),  # the kernel counts pages in batches
        "peak_mib_drawing": peak_drawing,
        "libraries_mib": libraries,
        "disk_mib": disk / MIB,
        "pictures_mib": pictures * 3 * size**2 * 4 / MIB,  # of one sample, were they kept in memory
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {version('torch')}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000, help="of every sample; more than 2048")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default 256)")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    if options.pictures <= FEATURES:
        parser.error(f"--pictures: must be more than the {FEATURES} features, or their covariance is singular; got {options.pictures}")
    if 3 * options.size**2 < FEATURES:
        parser.error(f"--size: pictures must have the {FEATURES} numbers that are taken of them, so 27 or more; got {options.size}")
    found = json.dumps(measure(options.pictures, options.size), indent=1)
    print(found)
    if options.output:
        options.output.write_text(found + "\n")


if __name__ == "__main__":
    main()
