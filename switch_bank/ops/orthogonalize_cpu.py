"""Orthogonalization of small matrices on a CPU with AVX2 or AVX-512: orthogonalize_cpu.cpp, compiled once."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from switch_bank.ops import cpu_kernels

SOURCE = Path(__file__).with_suffix(".cpp")
LARGEST = 2**16  # numbers: with what it is multiplied by, such a matrix stays in a core's cache


def takes(matrices: Tensor) -> bool:
    """Whether the kernel runs here and gains, for matrices [..., rows, cols]."""
    of_cpu = cpu_kernels.RUN and matrices.device.type == "cpu" and matrices.dtype == torch.float32
    return of_cpu and matrices.shape[-2:].numel() <= LARGEST


def orthogonalize(
    matrices: Tensor, polynomials: tuple[tuple[float, float, float], ...], almost_orthogonal: bool
) -> Tensor:
    """`ops.orthogonalize.orthogonalize` of matrices [n, rows, cols] float32, with the preconditioning of "turbo" if
    `almost_orthogonal`, else that of "plain". A matrix has the same bits whatever is beside it, and on any number of
    threads."""
    _load()
    return torch.ops.switch_bank.orthogonalize(matrices, torch.tensor(polynomials), almost_orthogonal)


@functools.cache
def _load() -> None:
    cpu_kernels.load(SOURCE, advice="set CXX to another compiler")
    torch.library.register_fake("switch_bank::orthogonalize", lambda matrices, *_: matrices.new_empty(matrices.shape))
