"""Orthogonalization of a batch of matrices: Newton-Schulz with AOL preconditioning ("turbo") and Muon's own ("plain").

Muon replaces a gradient by (nearly) its polar factor; this is that step alone, with the SVD beside it as the reference.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from switch_bank.ops import TRITON_INSTALLED, orthogonalize_cpu

Variant = Literal["turbo", "plain"]

# (a, b, c) of X <- aX + b(XX^T)X + c(XX^T)^2 X, one triple an iteration.
POLYNOMIALS: dict[Variant, tuple[tuple[float, float, float], ...]] = {
    "turbo": (
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    ),
    "plain": ((3.4445, -4.7750, 2.0315),) * 5,
}


def orthogonalize(
    matrices: Tensor, variant: Variant = "turbo", backend: Literal["auto", "torch", "triton", "cpu"] = "auto"
) -> Tensor:
    """Singular values of every matrix moved close to 1, its zero singular values left at 0.

    matrices: [..., rows, cols], bfloat16, float32 or float64, finite, of any magnitude; the matmuls run in this dtype.
    Returns a tensor of the same shape and dtype; a zero matrix gives zero, and no finite input gives a NaN.
    "turbo": four iterations after almost-orthogonal-layer (AOL) preconditioning of the shorter side, Boissin et al.,
    arXiv 2512.04632. The preconditioning scales rows, so the result is the polar factor of the scaled matrix: its rows
    are as orthonormal as the iterations get them, but it is the input's own polar factor only where the scales agree.
    "plain": five iterations after division by the Frobenius norm, Jordan et al.,
    https://kellerjordan.github.io/posts/muon/.
    A small singular value grows 147-fold in "turbo" and 485-fold in "plain". The preconditioning wins that back while a
    matrix has many strong directions; where one or two hold nearly all of it, "plain" brings the weak ones closer to 1.
    backend: whose kernels. "triton" and "cpu", where "auto" takes them, compute half of each symmetric product: for
    bfloat16 on CUDA, and for small matrices in float32 on a CPU. Else "auto" is "torch".
    Raises ValueError for fewer than two dimensions, another dtype or an unknown variant.
    """
    if matrices.ndim < 2:
        raise ValueError(f"orthogonalize needs [..., rows, cols], got shape {tuple(matrices.shape)}")
    if matrices.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"orthogonalize runs in bfloat16, float32 or float64, got {matrices.dtype}; cast first")
    if variant not in POLYNOMIALS:
        raise ValueError(f"unknown variant {variant!r}; take one of {', '.join(map(repr, POLYNOMIALS))}")
    tall = matrices.size(-2) > matrices.size(-1)
    if backend == "auto":
        on_gpu = TRITON_INSTALLED and matrices.is_cuda and matrices.dtype == torch.bfloat16
        backend = "triton" if on_gpu else "cpu" if orthogonalize_cpu.takes(matrices) else "torch"
    x = matrices.reshape(-1, *matrices.shape[-2:])
    if backend == "cpu":
        return orthogonalize_cpu.orthogonalize(x, POLYNOMIALS[variant], variant == "turbo").reshape(matrices.shape)
    kernels = _kernels(backend)
    x = _scale_by_power_of_two(x, kernels)
    gram = kernels.gram(x.mT if tall else x)
    if variant == "turbo":
        scale = _almost_orthogonal_scale(gram, x.size(-2 if tall else -1), kernels)
        x = kernels.scaled(x, scale.mT if tall else scale)
        gram = kernels.scaled(gram, scale, scale.mT)
    else:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x = x / norm
        gram = kernels.gram(x.mT if tall else x)
    for iteration, (a, b, c) in enumerate(POLYNOMIALS[variant]):
        if iteration > 0:
            gram = kernels.gram(x.mT if tall else x)
        factor = kernels.polynomial(gram, b, c)
        # A tall matrix is multiplied from its right: transposed, it would have to be copied twice.
        x = kernels.add_product(x, x, factor, a) if tall else kernels.add_product(x, factor, x, a)
    return x.reshape(matrices.shape)


def orthogonalize_svd(matrices: Tensor) -> Tensor:
    """Polar factor U·Vᵀ of each matrix over the singular directions it has; the reference for `orthogonalize`.

    matrices: [..., rows, cols], any floating dtype; computed in float64, returned in the dtype given. Singular
    values of at most max(rows, cols) · eps of that dtype times the largest count as zero; they are left out.
    """
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    tolerance = max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps
    present = values > tolerance * values.amax(-1, keepdim=True)
    return ((left * present.unsqueeze(-2)) @ right).to(matrices.dtype)


class _Kernels(NamedTuple):
    """Who multiplies and scales; `orthogonalize_triton` says what each one does."""

    gram: Callable[[Tensor], Tensor]
    polynomial: Callable[[Tensor, float, float], Tensor]
    add_product: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    scaled: Callable[..., Tensor]
    row_sums: Callable[[Tensor, torch.dtype], Tensor]  # of magnitudes, in a dtype: [n, rows, cols] to [n, rows, 1]
    largest: Callable[[Tensor], Tensor]  # magnitude: [n, rows, cols] to [n, 1, 1]


def _kernels(backend: str) -> _Kernels:
    if backend == "triton":
        from switch_bank.ops import orthogonalize_triton as own

        largest = partial(torch.linalg.vector_norm, ord=torch.inf, dim=(-2, -1), keepdim=True)  # without a copy
        return _Kernels(own.gram, own.polynomial, own.add_product, own.scaled, own.row_sums, largest)
    return _Kernels(
        lambda x: torch.bmm(x, x.mT),
        lambda gram, b, c: torch.baddbmm(gram, gram, gram, beta=b, alpha=c),
        lambda x, left, right, a: torch.baddbmm(x, left, right, beta=a),
        lambda x, *factors: math.prod(factors, start=x).to(x.dtype),
        lambda x, dtype: x.abs().sum(-1, keepdim=True, dtype=dtype),
        lambda x: x.abs().amax(dim=(-2, -1), keepdim=True),  # the norm takes a CPU eight times as long
    )


def _scale_by_power_of_two(x: Tensor, kernels: _Kernels) -> Tensor:
    """Each matrix divided so that its largest magnitude lies in [1, 2): its Gram matrix neither overflows nor vanishes.

    A power of two changes no digit of a result. The divisor stops at the smallest normal number, which still leaves a
    denormal matrix large enough.
    """
    float_dtype = torch.promote_types(x.dtype, torch.float32)
    largest = kernels.largest(x).to(float_dtype).clamp(min=torch.finfo(x.dtype).tiny)
    mantissa, _ = torch.frexp(largest)
    return kernels.scaled(x, 2 * mantissa / largest)


def _almost_orthogonal_scale(gram: Tensor, summands: int, kernels: _Kernels) -> Tensor:
    """AOL preconditioning: by what to scale the vectors whose Gram matrices are `gram` [n, m, m], each product in them
    of `summands` numbers, so that their matrix has a spectral norm of at most 1. Returns [n, m, 1]."""
    row_sums = kernels.row_sums(gram, torch.promote_types(gram.dtype, torch.float32))
    # Below this sum underflow may have eaten products of the row, and its scale would be noise: it counts as zero.
    smallest_sum = torch.finfo(gram.dtype).tiny / torch.finfo(gram.dtype).eps * summands
    return torch.where(row_sums > smallest_sum, row_sums.rsqrt(), 0.0)
