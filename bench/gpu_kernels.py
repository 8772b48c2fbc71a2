"""Where the GPU's time goes in an update, by kind of kernel: eagerly, with compiled blocks, and with activations kept.

    python bench/gpu_kernels.py                                     # on a GPU
    python bench/gpu_kernels.py --family flux.1-dev --way eager compiled

Networks of random weights of the real width, at 1024 x 1024, with a few of the real blocks: what a block runs does not depend on how
many there are, and with a few even kept activations fit. An update is the default one, of LoRA 64: a student update, four of the fake's,
and their rollout. Each way is a process of its own, whose first updates (in which blocks are compiled) are not counted; then one is timed,
and one more has its kernels listed. FLOPs are model FLOPs, as in bench/step.py.

On a CPU, where there are no kernels to list: the reduced networks, and times alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import networks
import step

FEW = {  # of the real blocks, every kind of them
    "flux.1-dev": {"num_layers": 3, "num_single_layers": 6},
    "sd3.5-medium": {"num_layers": 6, "dual_attention_layers": (0, 1, 2)},
    "sdxl": {},  # its blocks are no stack
}
GROUPS = {"flux.1-dev": 2, "sd3.5-medium": 4, "sdxl": 2}  # of two samples, in one part
WAYS = {  # flags of `fewstep distill`
    "eager": step.CHECKPOINTING,
    "compiled": [*step.CHECKPOINTING, "--compile", "true"],
    "compiled, activations kept": ["--compile", "true"],
}
# kind -> parts of the kernels' names, the first that fits; of PyTorch's, cuBLAS' (nvjet), cuDNN's and Triton's
KINDS = {
    "fused by the compiler": ("triton",),
    "attention": ("flash", "fmha", "sdpa"),
    "convolutions": ("convol", "conv2d", "fprop", "dgrad", "wgrad"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "normalisation": ("norm",),
    "copies and casts": ("copy", "memcpy", "memset", "cat"),
    "element by element": ("elementwise",),
    "sums": ("reduce",),
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in kernel.lower() for part in parts)), "other")


def by_kind(kernels: list[tuple[str, float, int]]) -> dict[str, float]:
    """Seconds by kind, the most first, of (name, seconds, calls) of kernels."""
    found: dict[str, float] = {}
    for name, seconds, _ in kernels:
        found[kind_of(name)] = found.get(kind_of(name), 0.0) + seconds
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def with_few_blocks(family: str) -> Any:
    """Of `networks.FAMILIES`, for as long as this is entered: the family with a few of its real blocks."""
    whole = networks.FAMILIES[family]
    return mock.patch.dict(networks.FAMILIES, {family: whole._replace(real=whole.real | FEW[family])})


def measured(family: str, way: str, device: str) -> dict[str, Any]:
    """One row: seconds of an update, the GPU's by kind of kernel, peak memory and model FLOPs."""
    import torch

    from fewstep import models

    models.quiet_libraries()
    size = [] if device == "cuda" else ['--size=["64x64"]']
    options = [*step.WEIGHTS[device]["lora"], "--groups", str(GROUPS[family]), *size, *WAYS[way], "--device", device]
    with with_few_blocks(family):
        step.flops_of_passes.cache_clear()
        unit = step.flops_of_passes(family, device, "lora") if device == "cuda" else None
        meter = step.Meter(device)
        system = step.Ours(family, options)
    began = time.perf_counter()
    system.cycle(meter)
    first = time.perf_counter() - began
    system.cycle(meter)
    before = step.passes(system.denoisers)
    meter.restart()
    system.cycle(meter)
    after = step.passes(system.denoisers)
    row = {
        "family": family,
        "way": way,
        "first_seconds": first,
        "seconds": sum(meter.seconds.values()),
        "peak_bytes": max(meter.peak.values()),
    }
    if unit is None:
        return row
    row["flops"] = sum((after[role][i] - before[role][i]) * unit[role][i] for role in unit for i in (0, 1))
    peak = step.known_peak(torch.cuda.get_device_name()) or step.measured_peak(device, "bf16")
    row["utilisation"] = row["flops"] / row["seconds"] / peak
    kernels = step.kernels_of(lambda: system.cycle(meter))
    return row | {"kinds": by_kind(kernels), "kernels": kernels[:80]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the columns of kinds are seconds on the GPU."""
    kinds = [kind for kind in (*KINDS, "other") if any(row.get("kinds", {}).get(kind, 0) >= 0.005 for row in rows)]
    columns = ["family", "way", "first update, s", "s an update", "utilisation", "peak, GB", *kinds, "of all, the GPU is busy"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row["family"], row["way"], f"{row['first_seconds']:.1f}", f"{row['seconds']:.2f}"]
        cells += [f"{row['utilisation']:.0%}" if "utilisation" in row else "", f"{row['peak_bytes'] / 1e9:.1f}"]
        if "kinds" in row:
            cells += [*(f"{row['kinds'].get(kind, 0):.2f}" for kind in kinds), f"{sum(row['kinds'].values()) / row['seconds']:.0%}"]
        else:
            cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=[*FEW], default=[*FEW])
    parser.add_argument("--way", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--output", type=Path, help="JSON file with every number, the machine and the versions")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for family in given.family:
        for way in given.way:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                rows.append(alone.submit(measured, family, way, device).result())
            print({key: value for key, value in rows[-1].items() if key != "kernels"}, file=sys.stderr, flush=True)
            if given.output:  # after every way: what has been measured is kept
                given.output.write_text(json.dumps({"machine": step.machine(device), "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
