"""One resumable training loop for every part of the world."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from fewstep import checkpoint


def device() -> torch.device:
    """Where the world is trained: a GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    folder: Path,
    name: str,
    warmup: int = 200,
    ema: float = 0.999,
    seed: int = 0,
    save_every: int = 500,
) -> None:
    """Minimise `loss(generator)` over `module`'s trainable parameters; leaves the EMA weights in `module`.

    The generator lives on the module's device, and so must everything the loss draws with it.

    AdamW, warm-up then cosine to zero, gradient norm clipped at 1. Continues from the newest checkpoint in `folder`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = EMAModel(parameters, decay=ema, use_ema_warmup=True, power=0.75)
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    start, running = 0, 0.0
    found = checkpoint.newest(folder)
    if found:
        path, state = found
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["ema"])
        generator.set_state(state["generator"])
        start, running = state["step"], state["running"]
        print(f"{name}: going on from {path.name}", flush=True)
    columns = (TextColumn(f"{name:>12}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=steps, completed=start, loss=running)
        told = time.monotonic()
        for step in range(start, steps):
            warm = min(1.0, (step + 1) / warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            value = loss(generator)
            if not torch.isfinite(value):
                raise FloatingPointError(f"{name}: loss is {value.item()} at step {step}")
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.step(parameters)
            rate = max(0.01, 1 / (step + 1))
            running += rate * (value.item() - running)
            bar.update(task, completed=step + 1, loss=running)
            if not bar.console.is_terminal and time.monotonic() - told > 30:
                told = time.monotonic()
                print(f"{name}: step {step + 1}/{steps} loss {running:.4f}", flush=True)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                checkpoint.save(folder, step + 1, {
                    "module": module.state_dict(), "optimizer": optimizer.state_dict(), "ema": average.state_dict(),
                    "generator": generator.get_state(), "step": step + 1, "running": running,
                }, keep=1)  # fmt: skip
    average.copy_to(parameters)
