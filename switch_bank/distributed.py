"""Processes: one per GPU (nccl) or CPU process (gloo) under torchrun, and the same code for a single one."""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(minutes=10)  # longer than any compilation that one process waits for another to finish


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


def start() -> World:
    """Joins the process group that torchrun's environment describes, or forms one of a single process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # CPU tensors go over gloo on GPU machines too: decisions that must not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), device)


def flat_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """One float32 tensor that holds every parameter's gradient: each `.grad` becomes a view into it, so that one call
    zeroes, reduces or inspects them all. Gradients must be zeroed by `.zero_()` of the result, never set to None."""
    parameters = list(parameters)
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = view.view_as(parameter)
    return flat


def from_first(value: float, world: World) -> float:
    """The first process's value, on every process; waits for no GPU."""
    box = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(box, src=0)
    return box.item()


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
