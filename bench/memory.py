"""Peak memory of the LoRA trainers at the real size, counted without a device.

    python bench/memory.py --lora-rank 16 64                # some ten minutes a line on one core

Both trainers run as in bench/step.py, but their networks lie on torch's meta device: shapes without numbers. Every tensor made there
is counted from its making to its end. On a GPU autocast holds some activations in bf16 and some in float32, which the meta device cannot
tell, so the peak is given twice: with all activations in bf16, and with all of them in float32. What is trained, its gradients and
its optimizer's state count as float32, what is frozen as bf16; attention keeps no matrix of positions by positions. Not counted: latents,
the workspace of kernels, what the allocator cannot use, the CUDA context.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import networks
import step
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Ledger(TorchDispatchMode):
    """Bytes of the meta tensors that live, and the most that lived at once, with activations of 2 and of 4 bytes a number.

    A number asked of a meta tensor (a norm, whether all is finite) is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size: dict[int, dict[int, int]] = {}  # storage -> bytes, by those of an activation's number
        self.live, self.peak = {2: 0, 4: 0}, {2: 0, 4: 0}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor) and value.is_meta and value.untyped_storage()._cdata not in self.size:
                floats = value.dtype == torch.float32
                self.enter(value, {width: value.untyped_storage().nbytes() * (width if floats else 4) // 4 for width in self.live})
        return out

    def enter(self, value: Tensor, size: dict[int, int]) -> None:
        storage = value.untyped_storage()
        if storage._cdata not in self.size:
            weakref.finalize(storage, self.leave, storage._cdata)
        self.leave(storage._cdata)
        self.size[storage._cdata] = size
        for width in self.live:
            self.live[width] += size[width]
            self.peak[width] = max(self.peak[width], self.live[width])

    def leave(self, storage: int) -> None:
        for width, bytes_held in self.size.pop(storage, {}).items():
            self.live[width] -= bytes_held

    def hold(self, value: Tensor, width: int) -> None:
        """This one is no activation: its numbers have `width` bytes."""
        if value.is_meta:
            self.enter(value, dict.fromkeys(self.live, value.untyped_storage().nbytes() * width // 4))


class Drawn(torch.autograd.Function):
    """A meta tensor as one of random numbers on the CPU; its gradient goes back to the meta device."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.randn(value.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to("meta")


def on_meta(family: str, device: str, dtype: torch.dtype, *, reduced: bool) -> Any:
    """A family's adapter at the real size with its networks on the meta device, called with latents and conditions on the CPU."""
    made = networks.backbone(family, reduced=False, device="meta")
    shapes = made.condition_shapes()

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        return {key: torch.zeros(()).expand(len(prompts), *shape) for key, shape in shapes.items()}

    def predict(model: torch.nn.Module, xt: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        there = {key: value.to("meta") for key, value in cond.items()}
        return Drawn.apply(type(made).predict(made, model, xt.to("meta"), timestep.to("meta"), there))

    made.encode, made.predict = encode, predict
    made.check_decoder = lambda: None  # nothing can be seen of a picture there
    return made


def flash(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """Attention as a fused kernel does it: what it keeps is its output and a number a row."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


@contextmanager
def meta_networks() -> Iterator[None]:
    attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", flash)
    with mock.patch.object(step, "teacher", on_meta), attention:
        yield


def peak_of(system: str, family: str, options: list[str]) -> dict[int, int]:
    """Peak bytes of the second cycle, by those of an activation's number."""
    with meta_networks():
        made = step.SYSTEMS[system](family, options)
        ledger, meter = Ledger(), step.Meter("cpu")
        for denoiser in made.denoisers.values():
            for tensor in (*denoiser.parameters(), *denoiser.buffers()):
                ledger.hold(tensor, 4 if tensor.requires_grad else 2)
                if tensor.requires_grad:
                    tensor.register_post_accumulate_grad_hook(lambda p: ledger.hold(p.grad, 4))
        with ledger:
            made.cycle(meter)
            for tensor in made.state():
                ledger.hold(tensor, 4)
            ledger.peak = dict(ledger.live)
            made.cycle(meter)
    return ledger.peak


def options_of(family: str, rank: int) -> list[str]:
    """As bench/step.py on a GPU, but for two groups in parts of one: parts pass one after the other, so that two need what many need."""
    parts = ["--groups", "2", "--memory.micro-groups", "1"]
    meta = ["--fake.condition", "none", "--device", "cpu", "--precision", "fp32", "--memory.frozen", "fp32"]
    return [*step.flags("cuda", family, "lora"), "--lora-rank", str(rank), *parts, *meta]


COLUMNS = ("family", "rank", "batch", "ours, GB", "reference, GB", "ratio")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a number is `activations in bf16 - in float32`."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        ours, plain = (row[name] for name in step.SYSTEMS)
        held = [" - ".join(f"{value / 1e9:.1f}" for value in peak.values()) for peak in (ours, plain)]
        ratio = " - ".join(f"{ours[width] / plain[width]:.2f}" for width in ours)
        lines.append("| " + " | ".join([row["family"], str(row["rank"]), step.batch_of(row["options"]), *held, ratio]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    from fewstep import models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*networks.FAMILIES]
    parser.add_argument("--family", nargs="+", choices=known, default=known, help="which networks; default: all")
    parser.add_argument("--lora-rank", nargs="+", type=int, default=[64], help="of the adapters; default: 64")
    parser.add_argument("--output", type=Path, help="JSON file with every number, the versions and the commit")
    given = parser.parse_args(arguments)
    models.quiet_libraries()
    rows = []
    for family in given.family:
        for rank in given.lora_rank:
            print(f"{family} {rank} ...", file=sys.stderr, flush=True)
            options = options_of(family, rank)
            peaks = {name: peak_of(name, family, options) for name in step.SYSTEMS}
            held = {name: {"bf16": peak[2], "fp32": peak[4]} for name, peak in peaks.items()}
            rows.append({"family": family, "rank": rank, "options": options, **held})
            if given.output:  # after every line: what has been counted is kept
                given.output.write_text(json.dumps({"machine": step.machine("cpu"), "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
