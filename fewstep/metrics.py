"""What an update logs: numbers of directions and scores, and the file that keeps them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.disk import replace_text
from fewstep.transforms import advantages, group_rms
from fewstep.types import Moments


def rms(value: Tensor) -> float:
    return float(value.detach().double().pow(2).mean().sqrt())


def ratios_of(log_ratio: Tensor) -> dict[str, float]:
    """How far from 1 likelihood ratios lie, from their logarithms (any shape): the 5%, 50% and 95% quantiles and the largest."""
    rho = log_ratio.detach().double().flatten().exp()
    low, middle, high = torch.quantile(rho, rho.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {"rho_05": low, "rho_50": middle, "rho_95": high, "rho_max": float(rho.max())}


def health(moments: Moments) -> dict[str, float]:
    """Whether R_dm can be trusted where it was evaluated. `fake_error`: the fake's mean squared error over the teacher's; a fake that knows
    the student is its best denoiser at every noise level, so that it is below 1. `inflation`: RMS of the student's latents over that of
    what the teacher makes of them, the geometric mean over samples."""
    x0, guided, teacher, fake = (value.detach().double() for value in moments)
    return {"fake_error": float(fake.sum() / teacher.sum()), "inflation": float((x0 / guided).log().mean().div(2).exp())}


def spread_of(score: Tensor, group: Tensor) -> dict[str, float]:
    """What there is to learn from scores (B,) inside groups (B,) of two or more: `spread` and `spread_min`, mean and smallest of the
    groups' standard deviations, in the reward's unit; `constant_groups`, the share of groups whose scores are all the same and offer no
    advantage; `advantage_max`, the largest advantage. A score that is not finite is left out. NaN without such a group."""
    valid = torch.isfinite(score)
    score, group = score[valid].double(), group[valid]
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    several = count > 1
    if not bool(several.any()):
        return dict.fromkeys(("spread", "spread_min", "constant_groups", "advantage_max"), math.nan)
    mean = score.new_zeros(len(count)).index_add_(0, index, score) / count
    std = group_rms((score - mean[index])[:, None], group)
    per_group = std.new_zeros(len(count)).index_put_((index,), std)[several]
    value = advantages(score, group)
    moving = score.new_zeros(len(count)).index_add_(0, index, (value != 0).double())  # equal scores have advantages of exactly zero
    return {
        "spread": float(per_group.mean()),
        "spread_min": float(per_group.min()),
        "constant_groups": float((moving[several] == 0).double().mean()),
        "advantage_max": float(value.abs().max()),
    }


def known(logs: dict[str, float]) -> dict[str, float]:
    """What has a number: NaN and inf are left out, which JSON has no word for and a running mean would keep for ever."""
    return {key: value for key, value in logs.items() if math.isfinite(value)}


def logged(path: Path) -> Iterator[dict[str, Any]]:
    """What the updates of a metrics.jsonl logged, one after another."""
    with path.open("rb") as file:
        yield from parsed(file)


def parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """What lines of a metrics.jsonl hold; one that is no update's is left out, as one that a kill cut, or a disk damaged."""
    for line in lines:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("update"), int):
                yield found


class MetricsLog:
    """metrics.jsonl, one line an update, and TensorBoard when it is installed. Lines past `update` are of a lost run: dropped."""

    def __init__(self, output: Path, update: int):
        self.path = output / "metrics.jsonl"
        *lines, cut = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        found = [*parsed(lines)]
        damaged = len(lines) - len(found)
        found += parsed([cut])
        if damaged:
            warnings.warn(f"{self.path}: {damaged} of its lines cannot be read and are left out", stacklevel=2)
        replace_text(self.path, "".join(json.dumps(logs) + "\n" for logs in found if logs["update"] <= update))
        self.file = self.path.open("a", encoding="utf-8")
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=update + 1)

    def write(self, update: int, logs: dict[str, float]) -> None:
        """Append what an update logged, finite numbers alone (`known`). Raises ValueError for any other."""
        self.file.write(json.dumps({"update": update, **logs}, allow_nan=False) + "\n")
        self.file.flush()
        if self.board:
            for key, value in logs.items():
                self.board.add_scalar(key, value, update)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
