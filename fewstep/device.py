"""Which device networks run on."""

from __future__ import annotations

import re


def resolve_device(name: str, text: str) -> str:
    """`auto` as what this machine has, anything else as it is. name: of the flag or field that gave it.

    Raises ValueError for what torch does not find here.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda" if count else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if found is None:
        hint = "; Apple's GPUs are not supported, use cpu" if text.startswith("mps") else ""
        raise ValueError(f"{name}: must be cpu, cuda, cuda:N or auto, got {text!r}{hint}")
    if text != "cpu" and int(found[1] or 0) >= count:
        raise ValueError(f"{name}: there is no {text} here, torch finds {count} CUDA devices; use --device auto, or cpu")
    return text


def take(device: str) -> None:
    """Lets this thread's `.cuda()` without a number, as a file of one's own may have it, mean the numbered GPU; any other device is no
    news."""
    import torch

    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
