"""Processor time that launching a network's passes takes, without the arithmetic: which size of a part keeps a GPU busy.

    python bench/dispatch.py                    # every family, LoRA, checkpointing

Networks of the real depth and of next to no width, on a CPU: what is left is what Python and torch need to call every operation once,
which on a GPU runs beside the arithmetic of the operations before. Where an update's arithmetic takes less, the GPU waits. A pass costs
the same whatever its samples, so larger parts (`memory.micro_groups`) make an update cheaper until the arithmetic is what takes longer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from unittest import mock

import networks
import torch

from fewstep.config import LAG_EVERY

THIN = {
    "sdxl": {
        "block_out_channels": (32, 64, 128),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 16,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 112,
        "sample_size": 8,
    },
    "sd3.5-medium": {
        "num_attention_heads": 1,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    },
    "flux.1-dev": {
        "num_attention_heads": 1,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
}
SIZE, TOKENS, RANK = (32, 32), 8, 2  # pixels, text tokens, of the adapters
# passes of a part for one student update and its four fake updates: rollout, R_dm (a guided teacher passes the batch twice), and in one of
# eight the lag
PASSES = {"teacher": 2, "student": 4 + 1 + 2 / LAG_EVERY, "trained": 1 + 4}


def seconds(function: Callable[[], None], repeat: int) -> float:
    """Processor seconds of a call, the least of `repeat` after a first."""
    function()
    found = []
    for _ in range(repeat):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def measure(family: str, repeat: int) -> dict[str, float]:
    """Processor seconds of a pass of the frozen teacher, of a pass through an adapter, and of such a pass with its backward pass."""
    with mock.patch.dict(networks.FAMILIES, {family: networks.FAMILIES[family]._replace(reduced=THIN[family])}):
        backbone = networks.backbone(family, reduced=True, dtype=torch.bfloat16, held=2)
    roles = backbone.roles(lora_rank=RANK, checkpointing=True)
    x, t = torch.randn(2, *backbone.latent_shape(SIZE)), torch.full((2,), 500.0)
    cond = {key: value[:, :TOKENS] if value.ndim == 3 else value for key, value in backbone.encode(["a", "b"]).items()}

    def call(network: torch.nn.Module, trained: bool) -> Callable[[], None]:
        def once() -> None:
            with torch.set_grad_enabled(trained):
                with torch.autocast("cpu", torch.bfloat16):
                    output = network(x, t, cond)
                if trained:
                    output.float().square().mean().backward()

        return once

    calls = {"teacher": (roles.teacher, False), "student": (roles.student, False), "trained": (roles.student, True)}
    return {name: seconds(call(role.network, trained), repeat) for name, (role, trained) in calls.items()}


def main(arguments: list[str] | None = None) -> int:
    from fewstep import models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=[*THIN], default=[*THIN], help="which networks; default: all")
    parser.add_argument("--repeat", type=int, default=5, help="calls of which the fastest counts")
    given = parser.parse_args(arguments)
    models.quiet_libraries()
    torch.set_num_threads(1)
    print(
        "| family | teacher, ms | through an adapter, ms | with its backward pass, ms | an update of one part, s |",
        "|" + " --- |" * 5,
        sep="\n",
    )
    for family in given.family:
        found = measure(family, given.repeat)
        whole = sum(PASSES[name] * value for name, value in found.items())
        print(f"| {family} | " + " | ".join(f"{1e3 * value:.0f}" for value in found.values()) + f" | {whole:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
