"""Attention over spans of keys: who sees whom, and what the operators that compute it have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Who sees whom, as each side sees it; neither falls along T."""

    first: Tensor  # [B, T] int32: the first key that each query sees; its own is the last one
    end: Tensor  # [B, T] int32: one past the last query that sees each key


def outputs(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Of the forward: room for what is attended to [B, T, H, d], and for a logarithm of the sum of each query's
    exponentials [B, H, T] float32, which the backward begins with."""
    batch, tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=torch.float32)


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, out: Tensor,
    logsumexp: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the backward: room for the gradients of query, key and value, contiguous."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # nobody asks for that of logsumexp


def backward_by(operator: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """For `register_autograd`: the backward that an operator with the arguments of `gradients` computes."""

    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return *operator(grad, *ctx.saved_tensors, ctx.scale), None, None, None

    return backward
