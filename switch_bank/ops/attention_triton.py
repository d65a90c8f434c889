"""Softmax attention over a span of earlier keys in Triton: no scores in memory (Dao, arXiv 2307.08691).

Query t sees keys first[t] to t, and key j is seen by queries j to end[j] - 1; neither first nor end falls along T.
Key blocks are visited in ascending order, from the block of the first key that the first query of a query block sees
to the diagonal, and a mask changes no value of what is seen. So a token's sums are rounded in an order that no later
token decides. Each gradient is summed in one program: no atomic additions, the same bits each time. Imported only where
there is Triton.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles and launch of each kernel in bfloat16, measured on an H200.
FORWARD = dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=3)
QUERY_GRADIENTS = dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=2)
KEY_GRADIENTS = dict(QUERIES=64, KEYS=128, num_warps=8, num_stages=2)
FLOAT32_TILE = 32  # of either side: float32 is multiplied without tensor cores, from registers


def attend(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """query, key, value: [B, T, H, d], bfloat16 or float32, of any strides with a last one of 1 (others are copied); d
    is a power of two from 16 to 128, T any; first, end: [B, T] int32; scale > 0. Returns [B, T, H, d], contiguous;
    sums are float32."""
    return forward(query, key, value, first, end, scale)[0]


@torch.library.custom_op("switch_bank::attention", mutates_args=())
def forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """What `attend` returns, and log2 Σ exp(score) of each query, [B, H, T] float32, for the backward."""
    out, logsumexp = _outputs(query, key, value, first, end, scale)
    query, key, value = (_unit_stride(x) for x in (query, key, value))
    sizes = _sizes(FORWARD, query.dtype)
    attend_queries[_grid(query, sizes["QUERIES"])](
        query, key, value, first.contiguous(), out, logsumexp, *query.shape[1:3], scale * math.log2(math.e),
        *_strides(query, key, value), **_constants(query, sizes),
    )  # fmt: skip
    return out, logsumexp


@forward.register_fake
def _outputs(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("switch_bank::attention_backward", mutates_args=())
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, first: Tensor, end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value from that of out, contiguous."""
    gradients = _gradients(grad, query, key, value, out, logsumexp, first, end, scale)
    query, key, value, grad, out = (_unit_stride(x) for x in (query, key, value, grad, out))
    strides = _strides(query, key, value, grad)
    delta = torch.empty_like(logsumexp)
    numbers = *query.shape[1:3], scale * math.log2(math.e), scale
    sizes = _sizes(QUERY_GRADIENTS, query.dtype)
    query_gradients[_grid(query, sizes["QUERIES"])](
        query, key, value, grad, first.contiguous(), out, logsumexp, delta, gradients[0], *numbers,
        *strides, *_strides(out), **_constants(query, sizes),
    )  # fmt: skip
    sizes = _sizes(KEY_GRADIENTS, query.dtype)
    key_gradients[_grid(query, sizes["KEYS"])](
        query, key, value, grad, end.contiguous(), logsumexp, delta, *gradients[1:], *numbers,
        *strides, **_constants(query, sizes),
    )  # fmt: skip
    return gradients


@backward.register_fake
def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, first: Tensor, end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # nobody asks for one of the sums


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    query, key, value, first, end, out, logsumexp = ctx.saved_tensors
    gradients = backward(grad, query, key, value, out, logsumexp, first, end, ctx.scale)
    return *gradients, None, None, None


forward.register_autograd(_backward, setup_context=_save_for_backward)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _grid(query: Tensor, tile: int) -> tuple[int, int]:
    return triton.cdiv(query.shape[1], tile), query.shape[0] * query.shape[2]


def _sizes(of_kernel: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.bfloat16:
        return of_kernel
    tiles = {side: min(of_kernel[side], FLOAT32_TILE) for side in ("QUERIES", "KEYS")}
    return of_kernel | tiles | dict(num_warps=4, num_stages=1)


def _constants(query: Tensor, sizes: dict[str, int]) -> dict[str, int]:
    whole = query.shape[1] % max(sizes["QUERIES"], sizes["KEYS"]) == 0
    return sizes | dict(WIDTH=query.shape[3], WHOLE=whole)


@triton.jit
def rows(start, first, tokens, token_stride, TILE: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows first..first + TILE of a head, [TILE, WIDTH]; where T is not WHOLE blocks, the last one for those behind
    it."""
    row = tl.arange(0, TILE)
    if not WHOLE:
        row = tl.minimum(row, tokens - 1 - first)
    start += tl.cast(first, tl.int64) * token_stride
    return tl.load(start + row[:, None] * token_stride + tl.arange(0, WIDTH)[None, :])


@triton.jit
def numbers(start, first, tokens, TILE: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Like `rows`, of one number a token."""
    row = first + tl.arange(0, TILE)
    if not WHOLE:
        row = tl.minimum(row, tokens - 1)
    return tl.load(start + row)


@triton.jit
def attend_queries(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, first_ptr, out_ptr, logsumexp_ptr, tokens, heads, log2_scale,
    query_batch, query_token, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out and logsumexp of a block of queries of a head. Scores are in base 2: times scale · log2 e."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    start = tl.program_id(0) * QUERIES
    t = start + tl.arange(0, QUERIES)
    first_ptr += batch * tokens
    first = numbers(first_ptr, start, tokens, QUERIES, WHOLE)
    lowest = tl.load(first_ptr + start)
    highest = tl.load(first_ptr + tl.minimum(start + QUERIES, tokens) - 1)
    query_ptr += batch * query_batch + head * query_head
    key_ptr += batch * key_batch + head * key_head
    value_ptr += batch * value_batch + head * value_head
    query = rows(query_ptr, start, tokens, query_token, QUERIES, WIDTH, WHOLE)
    # Finite, so that a row that has seen nothing yet stays what it is: exp2(-inf - most) is 0, exp2(most - most) is 1.
    most = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    out = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    for begin in tl.range(lowest // KEYS * KEYS, tl.minimum(start + QUERIES, tokens), KEYS):
        key = rows(key_ptr, begin, tokens, key_token, KEYS, WIDTH, WHOLE)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if (begin < highest) | (begin + KEYS - 1 > start):  # else all queries see all keys
            j = begin + tl.arange(0, KEYS)
            scores = tl.where((j[None, :] >= first[:, None]) & (j[None, :] <= t[:, None]), scores, -float("inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1) * log2_scale)
        weights = tl.exp2(scores * log2_scale - new_most[:, None])
        decay = tl.exp2(most - new_most)
        most = new_most
        total = total * decay + tl.sum(weights, axis=1)
        out *= decay[:, None]
        value = rows(value_ptr, begin, tokens, value_token, KEYS, WIDTH, WHOLE)
        out = tl.dot(weights.to(value.dtype), value, out, input_precision="ieee")
    out /= total[:, None]
    here = ((batch * tokens + t[:, None]) * heads + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=(t < tokens)[:, None])
    here = (batch * heads + head) * tokens + t
    tl.store(logsumexp_ptr + here, most + tl.log2(total), mask=t < tokens)


@triton.jit
def query_gradients(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, grad_ptr, first_ptr, out_ptr, logsumexp_ptr, delta_ptr, query_grad_ptr,
    tokens, heads, log2_scale, scale,
    query_batch, query_token, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    grad_batch, grad_token, grad_head, out_batch, out_token, out_head,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of queries of a head, and for `key_gradients` delta, [B, H, T] float32: Σ grad · out of
    each query."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    start = tl.program_id(0) * QUERIES
    t = start + tl.arange(0, QUERIES)
    first_ptr += batch * tokens
    first = numbers(first_ptr, start, tokens, QUERIES, WHOLE)
    lowest = tl.load(first_ptr + start)
    highest = tl.load(first_ptr + tl.minimum(start + QUERIES, tokens) - 1)
    query_ptr += batch * query_batch + head * query_head
    key_ptr += batch * key_batch + head * key_head
    value_ptr += batch * value_batch + head * value_head
    grad_ptr += batch * grad_batch + head * grad_head
    out_ptr += batch * out_batch + head * out_head
    of_head = (batch * heads + head) * tokens
    query = rows(query_ptr, start, tokens, query_token, QUERIES, WIDTH, WHOLE)
    grad = rows(grad_ptr, start, tokens, grad_token, QUERIES, WIDTH, WHOLE)
    out = rows(out_ptr, start, tokens, out_token, QUERIES, WIDTH, WHOLE)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + of_head + t, delta, mask=t < tokens)
    logsumexp = numbers(logsumexp_ptr + of_head, start, tokens, QUERIES, WHOLE)
    query_grad = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    for begin in tl.range(lowest // KEYS * KEYS, tl.minimum(start + QUERIES, tokens), KEYS):
        key = rows(key_ptr, begin, tokens, key_token, KEYS, WIDTH, WHOLE)
        value = rows(value_ptr, begin, tokens, value_token, KEYS, WIDTH, WHOLE)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        weights = tl.exp2(scores * log2_scale - logsumexp[:, None])
        if (begin < highest) | (begin + KEYS - 1 > start):  # else all queries see all keys
            j = begin + tl.arange(0, KEYS)
            weights = tl.where((j[None, :] >= first[:, None]) & (j[None, :] <= t[:, None]), weights, 0.0)
        weight_grad = tl.dot(grad, tl.trans(value), input_precision="ieee")
        score_grad = weights * (weight_grad - delta[:, None])
        query_grad = tl.dot(score_grad.to(key.dtype), key, query_grad, input_precision="ieee")
    here = ((batch * tokens + t[:, None]) * heads + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    query_grad *= scale
    tl.store(query_grad_ptr + here, query_grad.to(query_grad_ptr.dtype.element_ty), mask=(t < tokens)[:, None])


@triton.jit
def key_gradients(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, grad_ptr, end_ptr, logsumexp_ptr, delta_ptr, key_grad_ptr, value_grad_ptr,
    tokens, heads, log2_scale, scale,
    query_batch, query_token, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    grad_batch, grad_token, grad_head,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys of a head and of their values, from the query blocks that see it, ascending.
    Scores are [keys, queries] here: what is multiplied next needs no transposition."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    start = tl.program_id(0) * KEYS
    j = start + tl.arange(0, KEYS)
    end_ptr += batch * tokens
    end = numbers(end_ptr, start, tokens, KEYS, WHOLE)
    lowest = tl.load(end_ptr + start)
    highest = tl.load(end_ptr + tl.minimum(start + KEYS, tokens) - 1)
    query_ptr += batch * query_batch + head * query_head
    key_ptr += batch * key_batch + head * key_head
    value_ptr += batch * value_batch + head * value_head
    grad_ptr += batch * grad_batch + head * grad_head
    of_head = (batch * heads + head) * tokens
    key = rows(key_ptr, start, tokens, key_token, KEYS, WIDTH, WHOLE)
    value = rows(value_ptr, start, tokens, value_token, KEYS, WIDTH, WHOLE)
    key_grad = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    value_grad = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    for begin in tl.range(start // QUERIES * QUERIES, highest, QUERIES):
        query = rows(query_ptr, begin, tokens, query_token, QUERIES, WIDTH, WHOLE)
        grad = rows(grad_ptr, begin, tokens, grad_token, QUERIES, WIDTH, WHOLE)
        logsumexp = numbers(logsumexp_ptr + of_head, begin, tokens, QUERIES, WHOLE)
        delta = numbers(delta_ptr + of_head, begin, tokens, QUERIES, WHOLE)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        weights = tl.exp2(scores * log2_scale - logsumexp[None, :])
        if (begin < start + KEYS - 1) | (begin + QUERIES > lowest):  # else all queries see all keys
            t = begin + tl.arange(0, QUERIES)
            weights = tl.where((t[None, :] >= j[:, None]) & (t[None, :] < end[:, None]), weights, 0.0)
        value_grad = tl.dot(weights.to(grad.dtype), grad, value_grad, input_precision="ieee")
        weight_grad = tl.dot(value, tl.trans(grad), input_precision="ieee")
        score_grad = weights * (weight_grad - delta[None, :])
        key_grad = tl.dot(score_grad.to(query.dtype), query, key_grad, input_precision="ieee")
    here = ((batch * tokens + j[:, None]) * heads + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (j < tokens)[:, None]
    key_grad *= scale
    tl.store(key_grad_ptr + here, key_grad.to(key_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(value_grad_ptr + here, value_grad.to(value_grad_ptr.dtype.element_ty), mask=inside)
