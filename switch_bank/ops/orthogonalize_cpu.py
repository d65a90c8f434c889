"""Newton-Schulz iterations of small matrices on a CPU with AVX2 or AVX-512: orthogonalize_cpu.cpp, compiled once."""

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


def newton_schulz(x: Tensor, gram: Tensor, polynomials: tuple[tuple[float, float, float], ...]) -> Tensor:
    """x: [n, rows, cols] float32, and `gram` [n, m, m], the products of the vectors of its shorter side: X·Xᵀ, or XᵀX
    where it is tall. Returns x after X <- aX + b(XXᵀ)X + c(XXᵀ)²X for each (a, b, c); a matrix has the same bits
    whatever is beside it, and on any number of threads."""
    _load()
    return torch.ops.switch_bank.newton_schulz(x, gram, torch.tensor(polynomials))


@functools.cache
def _load() -> None:
    cpu_kernels.load(SOURCE, advice="set CXX to another compiler")
    torch.library.register_fake("switch_bank::newton_schulz", lambda x, gram, polynomials: x.new_empty(x.shape))
