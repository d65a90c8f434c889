"""Several microbatches in one forward, with the gradients of weights summed as if each had one of its own.

A step's tokens go through in microbatches that are the same on any number of processes. Where rounding must not tell
how many of them shared a forward, weights are expanded to [M, ...], one view for each of M microbatches, and functions
that read them work on tokens [M·b, ...]. Values and the gradients of activations are of one token or slice each and
need no such care. Sums over microbatches are float64, in which their order does not show.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_microbatch(weight: Tensor, microbatches: int | None) -> Tensor:
    """weight [...] as [M, ...], without a copy; its gradient is the float64 sum over the microbatches, in float32 if
    `weight.grad_dtype` asks for that. None: the weight as it is."""
    return weight if microbatches is None else _PerMicrobatch.apply(weight, microbatches)


class _PerMicrobatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, microbatches):  # type: ignore[no-untyped-def]
        return weight.expand(microbatches, *weight.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.sum(0, dtype=torch.float64), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weightᵀ, of [out, in] or, per microbatch, [M, out, in]."""
    if weight.ndim == 2:
        return F.linear(x, weight)
    return (x.reshape(len(weight), -1, x.shape[-1]) @ weight.mT).view(*x.shape[:-1], -1)


def lookup(tokens: Tensor, table: Tensor) -> Tensor:
    """The rows of tokens [B, T] int64 in a table [V, D] or, per microbatch, [M, V, D]."""
    return F.embedding(tokens, table) if table.ndim == 2 else _Lookup.apply(tokens, table)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, table):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens)
        ctx.shape = table.shape
        return F.embedding(tokens, table[0])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (tokens,) = ctx.saved_tensors
        microbatches, rows, _ = ctx.shape
        first_row = rows * torch.arange(microbatches, device=tokens.device)[:, None]
        row = tokens.reshape(microbatches, -1) + first_row
        grad = grad.reshape(*row.shape, -1)
        return None, torch.ops.aten.embedding_dense_backward(grad, row, microbatches * rows, -1, False).view(ctx.shape)


def scaled(x: Tensor, scalar: Tensor) -> Tensor:
    """scalar · x, of a 0-dim parameter or, per microbatch, [M]. Its gradient is summed in float64: the order, which
    threads change, does not show."""
    return _Scaled.apply(x, scalar)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalar):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scalar)
        return _times(x, scalar)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scalar = ctx.saved_tensors
        gradient = (grad * x).reshape(*scalar.shape, -1).sum(-1, dtype=torch.float64)
        return _times(grad, scalar), gradient.to(scalar.dtype)


def _times(x: Tensor, scalar: Tensor) -> Tensor:
    return scalar * x if scalar.ndim == 0 else (scalar[:, None] * x.reshape(len(scalar), -1)).view(x.shape)
