"""The product of bfloat16 activations with a float32 weight, as exact as in float32, on a GPU's bfloat16 units.

A float32 number is the sum of three bfloat16 ones, and bfloat16 products are exact in the float32 sums of such units.
"""

import torch
from torch import Tensor


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] bfloat16 times weightᵀ, of [out, in] float32. Returns [..., out] float32. The weight's gradient is as
    exact, that of x is bfloat16."""
    return _Float32Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        parts = torch.cat(split(weight))
        ctx.save_for_backward(x, parts)
        return _product(x, parts.mT).unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, parts = ctx.saved_tensors
        weight_high, weight_middle, _ = parts.chunk(3)
        high, middle, low = split(grad)
        # What is left out is less than 2^-14 of each product.
        x_grad = torch.cat([high, middle, high], dim=1) @ torch.cat([weight_high, weight_high, weight_middle])
        weight_grad = _product(torch.cat([high, middle, low], dim=1).mT, x).unflatten(0, (3, -1)).sum(0)
        return x_grad, weight_grad


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 tensors whose sum is x, float32: exactly, but for what lies under the smallest normal number."""
    high = _leading_bits(x)
    middle = _leading_bits(x - high)
    return high.bfloat16(), middle.bfloat16(), (x - high - middle).bfloat16()


def _leading_bits(x: Tensor) -> Tensor:
    """float32 cut off to the bits of a bfloat16. A cast there and back would do the same, but the compiler leaves such
    a pair of casts out."""
    return (x.view(torch.int32) & -65536).view(torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] and b [k, m], bfloat16: their product in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
