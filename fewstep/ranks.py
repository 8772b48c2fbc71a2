"""The processes of one run: each passes its own rows of a batch through the networks, and all of them hold the whole of what comes out.

What is drawn at random is drawn whole by every process from the same state, and what is decided is decided on whole batches: so N
processes make the run that one makes, up to the order in which gradients are added up, and a checkpoint knows nothing of N.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import LostProcess, UserError
from fewstep.launch import launched, place

BUCKET = 2**24  # numbers that travel together
PATIENCE = datetime.timedelta(days=30)  # the others wait while one saves, draws or encodes prompts; one that has died is seen at once


class Ranks:
    """Process `rank` of `size`, one by itself unless told otherwise: then no method does anything to what it is given.

    With more, torch.distributed has been initialised (`join`), and every process calls the same methods in the same order. Raises
    LostProcess where another one has ended meanwhile.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.show = warnings.showwarning  # as a process by itself shows one

    @classmethod
    def join(cls, device: str = "auto") -> Ranks:
        """The processes that this one was launched with, each with a GPU of its own where there are any, unless device is cpu. Raises
        UserError where there are too few.

        Until they `leave`, a warning that several of them have is shown by one alone, whichever has it first.
        """
        rank, size = launched()
        ranks = cls(rank, size)
        if size > 1:
            gpus = device != "cpu" and torch.cuda.is_available()
            if gpus and not dist.is_nccl_available():
                raise UserError("several processes with GPUs speak by NCCL, and this torch has none, as on Windows: start one process")
            if gpus:
                torch.cuda.set_device(own_gpu())
            store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=PATIENCE))
            # named: unasked, torch has one for the tensors of the machine's accelerator alone, as of a Mac's, which no run takes
            backend, own = "cpu:gloo,cuda:nccl" if gpus else "cpu:gloo", dist.PrefixStore("run", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=PATIENCE)
            warnings.showwarning = functools.partial(show_once, dist.PrefixStore("warnings", store), Counter(), ranks.show)
        return ranks

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
            warnings.showwarning = self.show

    def rows(self, size: int) -> slice:
        """This process's rows of a batch of `size`, which the number of processes divides."""
        each = size // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def all_gather(self, own: Tensor) -> Tensor:
        """Every process's rows (b, ...) below one another, (b * size, ...), to the bit and without a gradient."""
        if self.size == 1:
            return own
        own = own.detach().contiguous()
        held = own.unsqueeze(-1).view(torch.uint8)  # as bytes: not every backend knows every number format
        parts = [torch.empty_like(held) for _ in range(self.size)]
        with naming_the_lost():
            dist.all_gather(parts, held)
        return torch.cat(parts).view(own.dtype).squeeze(-1)

    def all_reduce(self, tensors: list[Tensor | None]) -> None:
        """Puts the sum over all processes in the place of each tensor; None stays, as it does in every process."""
        if self.size == 1:
            return
        in_buckets(dist.all_reduce, [tensor for tensor in tensors if tensor is not None])

    def sum_by_name(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over all processes, by name; a name that some lack is 0 there."""
        if self.size == 1:
            return values
        found = self.all_gather_object(values)
        return {name: sum(one.get(name, 0) for one in found) for name in dict.fromkeys(name for one in found for name in one)}

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of the processes."""
        return flag if self.size == 1 else any(self.all_gather_object(flag))

    def of_first(self, flag: bool) -> bool:
        """What the first process says: a decision on whole batches, whose last bits may differ between GPUs, is made once."""
        return flag if self.size == 1 else self.all_gather_object(flag)[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """What every process says: whatever JSON can hold."""
        text = torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)
        lengths = self.all_gather(torch.tensor([len(text)])).tolist()
        padded = self.all_gather(torch.nn.functional.pad(text, (0, max(lengths) - len(text)))).view(self.size, -1)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(padded, lengths, strict=True)]

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Puts the first process's values in the place of each tensor."""
        if self.size == 1:
            return
        in_buckets(functools.partial(dist.broadcast, src=0), tensors)

    def check_same(self, tensors: list[Tensor], what: str) -> None:
        """Raises RuntimeError naming the processes whose tensors are not those of the first, by their sums."""
        if self.size == 1:
            return
        found = self.all_gather_object(torch.stack([tensor.detach().double().sum() for tensor in tensors]).tolist())
        other = [str(rank) for rank, sums in enumerate(found) if sums != found[0]]
        if other:
            raise RuntimeError(f"{what} of process {', '.join(other)} is no longer that of process 0: their GPUs compute differently")

    def barrier(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            self.all_gather_object(None)

    @contextmanager
    def first_on_its_machine(self) -> Iterator[None]:
        """The machine's first process goes through what is within, then its others: they find what it has cached."""
        leads = place() == 0
        if not leads:
            self.barrier()
        yield
        if leads:
            self.barrier()

    @contextmanager
    def own_random(self, device: torch.device, turn: int) -> Iterator[None]:
        """Within, each process has random numbers of its own; after it, all go on from the state that they share.

        turn: the same in all of them and another each time, since what they share may not have moved on meanwhile.
        """
        if self.size == 1:
            yield
            return
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (1,))) + turn * self.size + self.rank)
            yield


def own_gpu() -> int:
    """The number of this process's GPU among its machine's. Raises UserError where it has none."""
    found = torch.cuda.device_count()
    if place() >= found:
        raise UserError(f"process {place()} of this machine has no GPU of its own, torch finds {found}: start at most {found} on a machine")
    return place()


def show_once(
    store: dist.Store, had: Counter[str], show: Callable[..., None], message: Warning | str, category: type[Warning], *rest: Any
) -> None:
    """Show a warning unless another process has shown the same, as often as this one has had it. had: what this process has had."""
    text = f"{category.__name__}: {message}"
    had[text] += 1
    try:
        first = store.add(f"{had[text]} {hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # the process that keeps count has ended
        first = True
    if first:
        show(message, category, *rest)


@torch.no_grad()
def in_buckets(collective: Callable[[Tensor], Any], tensors: list[Tensor]) -> None:
    """Puts what a collective makes of the tensors in their place, bucket by bucket."""
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with naming_the_lost():
            collective(flat)
        for tensor, made in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(made.view(tensor.shape))


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one number format and device, at most BUCKET numbers together: a LoRA's gradients are thousands of tensors, each of which
    would travel by itself."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        bucket, held = [], 0
        for tensor in same:
            if bucket and held + tensor.numel() > BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(tensor)
            held += tensor.numel()
        yield bucket


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """A collective that fails does so since another process is gone, or for what its error says, as where two of them share a GPU."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise LostProcess(f"another process of this run has ended; what it printed says why, or else this: {said}") from error
