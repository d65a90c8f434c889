"""The head's losses and gradients in float32 on a CPU with AVX2 or AVX-512: head_cpu.cpp, compiled once."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from switch_bank.ops import cpu_kernels

SOURCE = Path(__file__).with_suffix(".cpp")


def takes(x: Tensor) -> bool:
    """Whether the kernel runs here, for the head's input x [N, D]."""
    return cpu_kernels.RUN and x.device.type == "cpu" and x.dtype == torch.float32


def losses_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, microbatches: int, cap: float, ignore: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [N, D] float32; weight: [V, D] float32; targets: [N] int64 in 0..V-1, or `ignore`. Returns the losses [N], 0
    where ignored, and, if `gradients`, those of their sum: x's [N, D], and the weight's for each microbatch, [M, V, D].

    A token's loss and gradient have the same bits whatever is beside it; all of them on any number of threads. Raises
    RuntimeError for another target."""
    _load()
    return torch.ops.switch_bank.head_losses(x, weight, targets, microbatches, cap, ignore, gradients)


@functools.cache
def _load_once() -> None:
    cpu_kernels.load(SOURCE, advice="set CXX to another compiler")
    torch.library.register_fake("switch_bank::head_losses", _shapes)


def _shapes(
    x: Tensor, weight: Tensor, targets: Tensor, microbatches: int, cap: float, ignore: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight = (len(x), microbatches) if gradients else (0, 0)
    return x.new_empty(len(x)), x.new_empty(of_x, x.shape[1]), x.new_empty(of_weight, *weight.shape)


@torch.compiler.assume_constant_result
def _load() -> None:
    """Where the losses are compiled, while they are."""
    _load_once()
