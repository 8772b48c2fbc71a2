"""How often a report's 95% intervals cover: many samples of one distribution are measured, as `fewstep evaluate` measures one.

    OMP_NUM_THREADS=1 python bench/intervals.py --output docs/results/coverage.json     # some twenty minutes on one thread

Features are Gaussian, and pictures of one prompt have half of their variance in common. An interval says how the value at this number of
pictures varies, so what it ought to cover is the mean of the values of all samples. Real pictures are the same for all, as they are in use.
"""

from __future__ import annotations

import argparse
import json
import platform
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fewstep.evaluate import measure
from fewstep.evaluate.distances import FeatureSet
from fewstep.evaluate.features import Extractor

FEATURES, REAL = 8, 200
COMMON = 0.5  # share of a feature's variance that pictures of one prompt have in common
MOVED = 0.3  # how far the student's features lie from the teacher's and the real ones, in standard deviations of each
NUMBERS = ("fid_data", "fid_teacher", "kid_data", "precision", "recall", "score", "diversity")
# prompts, pictures of each, and whether distances and recall are jackknifed, as those of large samples are
SETTINGS = ((60, 2, False), (60, 2, True), (128, 8, False), (1000, 1, False))


def sample(prompts: int, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features of the student's and the teacher's pictures of the same prompts, each (N, d)."""
    common = torch.randn(prompts, 1, FEATURES, generator=generator)

    def pictures(moved: float) -> Tensor:
        own = torch.randn(prompts, each, FEATURES, generator=generator)
        return (moved + COMMON**0.5 * common + (1 - COMMON) ** 0.5 * own).flatten(0, 1)

    return pictures(MOVED), pictures(0.0)


def coverage(prompts: int, each: int, samples: int, *, jackknifed: bool) -> dict[str, dict[str, float]]:
    """Number -> the share of samples whose interval holds the mean of all values; width, over that of a normal value's 95%."""
    generator = torch.Generator().manual_seed(0)
    extractor = Extractor("net", "fid", "kid", unit=False, width=FEATURES)
    real = {"net": FeatureSet(torch.randn(REAL, FEATURES, generator=generator))}
    names = [f"prompt {i}" for i in range(prompts)]
    found: dict[str, list[tuple[float, float, float]]] = {}
    with ExitStack() as stack:
        if jackknifed:
            stack.enter_context(mock.patch.object(measure, "SMALL", 0))
        for seed in range(samples):
            mine, theirs = sample(prompts, each, generator)
            metrics = measure.measure(
                {"features/net": mine, "score/score": mine[:, 0].clone()},
                names,
                each,
                {},
                extractors=[extractor],
                data=real,
                teacher={"net": FeatureSet(theirs)},
                seed=seed,
            ).metrics
            for name in metrics:
                found.setdefault(name, []).append(tuple(metrics[name][key] for key in ("value", "low", "high")))
    report = {}
    for name in NUMBERS:
        if name in found:  # no diversity of single pictures
            value, low, high = np.array(found[name]).T
            covered = (low <= value.mean()) & (value.mean() <= high)
            report[name] = {"covered": float(covered.mean()), "width": float((high - low).mean() / (2 * 1.96 * value.std(ddof=1)))}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    settings: list[dict[str, Any]] = []
    for prompts, each, jackknifed in SETTINGS:
        report = coverage(prompts, each, asked.samples, jackknifed=jackknifed)
        settings.append({"prompts": prompts, "images_per_prompt": each, "jackknifed": jackknifed, "coverage": report})
        print(json.dumps(settings[-1]), flush=True)
    if asked.output:
        versions = {name: version(name) for name in ("torch", "numpy")}
        about = {"samples": asked.samples, "features": FEATURES, "real_pictures": REAL, "machine": platform.machine(), "versions": versions}
        asked.output.write_text(json.dumps(about | {"settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
