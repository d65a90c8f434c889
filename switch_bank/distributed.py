"""Processes: one per GPU (nccl) or CPU process (gloo) under torchrun, and the same code for a single one."""

import os
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

BUCKET = 2**18  # numbers, at least, that are summed over the processes in one call
LEFT = "left for the next attempt"  # a key of torchrun's store


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


class PeerError(RuntimeError):
    """Another process did not answer; the message names its rank."""


def start(timeout_seconds: float = 600) -> World:
    """Joins the process group that torchrun's environment describes, or forms one of a single process.

    A collective that waits longer than `timeout_seconds` for a peer raises RuntimeError, and PeerError if they do not
    all join in that time.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # CPU tensors go over gloo on GPU machines too: decisions that must not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        try:
            store, rank, size = next(rendezvous("env://", timeout=timeout))
            # torchrun may keep the store over a restart; without a prefix, processes read the addresses of dead ones.
            attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)
        except dist.DistError as error:
            raise PeerError(f"the processes did not all join: {str(error).splitlines()[0]}") from error
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), device)


def text_left() -> str | None:
    """What `leave_text` left in an earlier attempt of the same torchrun, which starts all processes anew when one has
    died; None in the first one."""
    store = _store_of_all_attempts()
    return store.get(LEFT).decode() if store.check([LEFT]) else None


def leave_text(text: str) -> None:
    """Keeps `text` for the processes that torchrun may start in place of these."""
    _store_of_all_attempts().set(LEFT, text)


def _store_of_all_attempts() -> dist.Store:
    """torchrun's own, without the prefix of an attempt."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


@contextmanager
def naming_silent_peers(world: World, patience_seconds: float = 5) -> Iterator[None]:
    """Turns the failure of a collective within the block into a PeerError that names the processes that are stuck or
    gone: those that do not also report a failure within `patience_seconds`, or, if all do, those that the others had
    given up before they answered."""
    try:
        yield
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any("distributed_c10d" in frame.filename or frame.name == wait_for.__name__ for frame in frames):
            raise
        store = dist.distributed_c10d._get_default_store()  # outlives the group's broken connections
        reason = str(error).splitlines()[0]
        store.set(f"gave up/{world.rank}", f"{store.add('gave up', 1)} {reason}")
        silent = set(range(world.size)) - {world.rank}
        deadline = time.monotonic() + patience_seconds
        while silent and time.monotonic() < deadline:
            silent -= {rank for rank in silent if store.check([f"gave up/{rank}"])}
            time.sleep(0.05)
        missed, what = silent, "hung, killed, or ended by its own error"
        if not silent:  # who gave up without having waited in vain had been given up itself; or else who did so last
            said = {rank: store.get(f"gave up/{rank}").decode() for rank in range(world.size)}
            missed = {rank for rank, words in said.items() if "imed out" not in words}
            missed, what = missed or {max(said, key=lambda rank: int(said[rank].split()[0]))}, "too late"
        if len(missed) == world.size:
            raise
        raise PeerError(f"no answer from rank {', '.join(map(str, sorted(missed)))}: {what} ({reason})") from error


def flat_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """One float32 tensor that holds every parameter's gradient: each `.grad` becomes a view into it, so that one call
    zeroes, reduces or inspects them all. Gradients must be zeroed by `.zero_()` of the result, never set to None."""
    parameters = list(parameters)
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    _set_gradients(parameters, flat)
    return flat


def _set_gradients(parameters: list[nn.Parameter], flat: Tensor) -> None:
    for parameter, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = view.view_as(parameter)


class Gradients:
    """The gradients of a step: sums over its backwards, `backwards` of them on each process, and over the processes.

    A step is `zero_()`, then `backward(loss)` as often as said, then `wait()`. After it `flat` [all numbers of the
    parameters] float32 has the sums in the order of `parameters`, zeros for a parameter that no loss depends on, and
    each parameter's `.grad` is a view into it.

    Sums over processes begin during the last backward, in buckets of parameters that follow one another: a bucket when
    the gradients of all its parameters are there and those before it have begun, so that all processes begin them in
    one order. `parameters` should therefore come in the order in which a backward finishes them. Without `overlap`, as
    where backwards are replayed and Python sees none of them, sums begin in `wait`.

    On a CPU they are summed in float64, which is what `.grad` is during a backward, and rounded to float32 once. A sum
    of a few float32 numbers is exact in float64 (or so near that another order rounds otherwise once in some 10^8), so
    the number of processes does not show. On a GPU they are float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], backwards: int, overlap: bool = True) -> None:
        self.parameters = list(parameters)
        self.overlap = overlap
        self.flat = flat_gradients(self.parameters)
        self.backwards = backwards
        self.exact = self.flat.device.type == "cpu"
        self.sums = self.flat.double() if self.exact else self.flat
        if self.exact:
            for parameter in self.parameters:
                parameter.grad_dtype = None  # any
        sizes, self.parameters_in = [0], [0]  # of each bucket
        for parameter in self.parameters:
            if sizes[-1] >= BUCKET:
                sizes.append(0)
                self.parameters_in.append(0)
            sizes[-1] += parameter.numel()
            self.parameters_in[-1] += 1
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, len(sizes) - 1))
        self.buckets = list(zip(self.flat.split(sizes), self.sums.split(sizes), strict=True))
        self.zero_()

    def zero_(self) -> None:
        self.sums.zero_()
        self.backwards_left = self.backwards
        self.missing = self.parameters_in.copy()  # gradients that are not there yet in the last backward, by bucket
        self.begun: list[dist.Work] = []

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a 0-dim loss; in the last backward of a step, begins to add up over the processes."""
        self.backwards_left -= 1
        if not self.exact:
            loss.backward()
            return
        _set_gradients(self.parameters, self.sums)
        loss.backward()
        _set_gradients(self.parameters, self.flat)  # the compiler wants a gradient of the parameter's own dtype

    def _arrived(self, bucket: int, parameter: Tensor) -> None:
        if self.backwards_left > 0 or not self.overlap:
            return
        self.missing[bucket] -= 1
        while len(self.begun) < len(self.buckets) and self.missing[len(self.begun)] == 0:
            self._begin_next()

    def _begin_next(self) -> None:
        _, sums = self.buckets[len(self.begun)]
        self.begun.append(dist.all_reduce(sums, async_op=True))

    def wait(self) -> None:
        """Until the sums over all processes are there; on a GPU, what is queued next waits, not the host."""
        while len(self.begun) < len(self.buckets):  # where a parameter has no gradient
            self._begin_next()
        for work, (flat, sums) in zip(self.begun, self.buckets, strict=True):
            wait_for(work)
            if self.exact:
                flat.copy_(sums)


def wait_for(work: dist.Work) -> None:
    """Until a collective is done that was begun with `async_op`; within `naming_silent_peers`, its failure counts as a
    collective's."""
    work.wait()


def from_first(value: float, world: World) -> float:
    """The first process's value, on every process; waits for no GPU."""
    box = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(box, src=0)
    return box.item()


def agreed(seconds: float, signal: int, world: World) -> tuple[float, int]:
    """The first process's clock reading, and the highest signal number that any process has got (0: none), on every
    process; waits for no GPU."""
    box = torch.tensor([seconds if world.rank == 0 else 0.0, signal], dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box[0]), int(box[1])


def text_from_first(text: str) -> str:
    """The first process's text, on every process."""
    box = [text]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def summed(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, on every process; in place."""
    dist.all_reduce(value)
    return value


def same_weights(model: nn.Module) -> bool:
    """Whether all processes hold the same parameters and buffers, to the bit (up to a collision of the checksum)."""
    checksum = torch.stack([_checksum(tensor.detach().flatten()) for tensor in model.state_dict().values()])
    least, most = checksum.clone(), checksum.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return bool((least == most).all())


def _checksum(values: Tensor) -> Tensor:
    """0-dim int64: the values' bits, each times an odd number of its place, so that order matters; wraps around."""
    bits = values.view(torch.int32) if values.dtype == torch.float32 else values
    return (bits.long() * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()
