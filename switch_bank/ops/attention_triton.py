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
from triton.tools.tensor_descriptor import TensorDescriptor

from switch_bank.ops.spans import backward_by, gradients, outputs, save_for_backward

# Tiles and launch of each kernel in bfloat16, the fastest on an H200 (benchmarks/NOTES.md, 30). With these, a Hopper
# multiprocessor has registers and shared memory for two programs at a time, so that one multiplies while the other has
# its exponentials to do.
FORWARD = dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=3)
QUERY_GRADIENTS = dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=2)
KEY_GRADIENTS = dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=2)
FLOAT32_TILE = 32  # of either side: float32 is multiplied without tensor cores, from registers


def attend(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """query, key, value: [B, T, H, d], bfloat16 or float32; strides of B and T may be any multiples of 16 bytes, and
    what has others, or heads not side by side, is copied. d is a power of two from 16 to 128, T any. first, end: [B, T]
    int32. scale > 0. Returns [B, T, H, d], contiguous; sums are float32."""
    return forward(query, key, value, first, end, scale)[0]


@torch.library.custom_op("switch_bank::attention", mutates_args=())
def forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """What `attend` returns, and log2 Σ exp(score) of each query, [B, H, T] float32, for the backward."""
    out, logsumexp = outputs(query, key, value, first, end, scale)
    sizes = _sizes(FORWARD, query.dtype)
    queries, keys = sizes["QUERIES"], sizes["KEYS"]
    attend_queries[_grid(query, queries)](
        _by_head(query, queries), _by_head(key, keys), _by_head(value, keys), first.contiguous(),
        _by_head(out, queries), logsumexp, *_numbers(query, scale), **sizes,
    )  # fmt: skip
    return out, logsumexp


@torch.library.custom_op("switch_bank::attention_backward", mutates_args=())
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, out: Tensor,
    logsumexp: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value from that of out, contiguous."""
    results = query_grad, key_grad, value_grad = gradients(grad, query, key, value, first, end, out, logsumexp, scale)
    delta, numbers = torch.empty_like(logsumexp), _numbers(query, scale)
    sizes = _sizes(QUERY_GRADIENTS, query.dtype)
    queries, keys = sizes["QUERIES"], sizes["KEYS"]
    query_gradients[_grid(query, queries)](
        _by_head(query, queries), _by_head(key, keys), _by_head(value, keys), _by_head(grad, queries),
        first.contiguous(), _by_head(out, queries), logsumexp, delta, _by_head(query_grad, queries), *numbers, scale,
        **sizes,
    )  # fmt: skip
    sizes = _sizes(KEY_GRADIENTS, query.dtype)
    queries, keys = sizes["QUERIES"], sizes["KEYS"]
    key_gradients[_grid(query, keys)](
        _by_head(query, queries), _by_head(key, keys), _by_head(value, keys), _by_head(grad, queries),
        end.contiguous(), logsumexp, delta, _by_head(key_grad, keys), _by_head(value_grad, keys), *numbers, scale,
        **sizes,
    )  # fmt: skip
    return results


forward.register_fake(outputs)
backward.register_fake(gradients)
forward.register_autograd(backward_by(backward), setup_context=save_for_backward)


def _by_head(x: Tensor, tile: int) -> TensorDescriptor:
    """x [B, T, H, d] as [B, T, H·d], of which kernels read and write [1, tile, d] at a time: by hardware, where there
    is such (TMA), which leaves out what lies behind T. Such hardware wants rows to begin at 16 bytes."""
    width, x = x.shape[3], x.flatten(2)  # which also gives a dimension of size 1 a stride like those of others
    steps = [n * x.element_size() for n in x.stride()[:2]]
    if x.stride(2) != 1 or 0 in steps or any(n % 16 for n in (x.data_ptr(), *steps)):
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tile, width])


def _grid(query: Tensor, tile: int) -> tuple[int, int]:
    return triton.cdiv(query.shape[1], tile), query.shape[0] * query.shape[2]


def _numbers(query: Tensor, scale: float) -> tuple[int, int, float]:
    return query.shape[1], query.shape[2], scale * math.log2(math.e)


def _sizes(of_kernel: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.bfloat16:
        return of_kernel
    tiles = {side: min(of_kernel[side], FLOAT32_TILE) for side in ("QUERIES", "KEYS")}
    return dict(**tiles, num_warps=4, num_stages=1)


@triton.jit
def load_rows(tokens_desc, batch, head, start):  # type: ignore[no-untyped-def]
    """[tile, d] of a head, from `start` on; zeros behind T."""
    WIDTH: tl.constexpr = tokens_desc.block_shape[2]
    rows = tokens_desc.load([batch, start, head * WIDTH])
    return tl.reshape(rows, (rows.shape[1], WIDTH))


@triton.jit
def store_rows(tokens_desc, batch, head, start, rows):  # type: ignore[no-untyped-def]
    rows = tl.reshape(rows.to(tokens_desc.dtype), (1, rows.shape[0], rows.shape[1]))
    tokens_desc.store([batch, start, head * rows.shape[2]], rows)


@triton.jit
def place(tokens, heads, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a program for each block of each head of a slice: slice, head, the block's first token and all of them, and
    where the slice and the head begin in [B, T] and [B, H, T]."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    start = tl.program_id(0) * TILE
    return batch, head, start, start + tl.arange(0, TILE), batch * tokens, tl.program_id(1).to(tl.int64) * tokens


@triton.jit
def attend_queries(  # type: ignore[no-untyped-def]
    query_desc, key_desc, value_desc, first_ptr, out_desc, logsumexp_ptr, tokens, heads, log2_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out and logsumexp of a block of queries of a head. Scores are in base 2: times scale · log2 e."""
    batch, head, start, t, of_slice, of_head = place(tokens, heads, QUERIES)
    first = tl.load(first_ptr + of_slice + t, mask=t < tokens, other=0)
    lowest = tl.load(first_ptr + of_slice + start)
    highest = tl.load(first_ptr + of_slice + tl.minimum(start + QUERIES, tokens) - 1)
    query = load_rows(query_desc, batch, head, start)
    # Finite, so that a row that has seen nothing yet stays what it is: exp2(-inf - most) is 0, exp2(most - most) is 1.
    most = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    out = tl.zeros((QUERIES, query.shape[1]), dtype=tl.float32)
    for begin in tl.range(lowest // KEYS * KEYS, tl.minimum(start + QUERIES, tokens), KEYS):
        key, value = load_rows(key_desc, batch, head, begin), load_rows(value_desc, batch, head, begin)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")  # float32 stays float32, not TF32
        if (begin < highest) | (begin + KEYS - 1 > start):  # else all queries see all keys
            j = begin + tl.arange(0, KEYS)
            scores = tl.where((j[None, :] >= first[:, None]) & (j[None, :] <= t[:, None]), scores, -float("inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1) * log2_scale)
        weights = tl.exp2(scores * log2_scale - new_most[:, None])
        decay = tl.exp2(most - new_most)
        most = new_most
        total = total * decay + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(value.dtype), value, out * decay[:, None], input_precision="ieee")
    store_rows(out_desc, batch, head, start, out / total[:, None])
    tl.store(logsumexp_ptr + of_head + t, most + tl.log2(total), mask=t < tokens)


@triton.jit
def query_gradients(  # type: ignore[no-untyped-def]
    query_desc, key_desc, value_desc, grad_desc, first_ptr, out_desc, logsumexp_ptr, delta_ptr, query_grad_desc,
    tokens, heads, log2_scale, scale, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of queries of a head, and for `key_gradients` delta, [B, H, T] float32: Σ grad · out of
    each query."""
    batch, head, start, t, of_slice, of_head = place(tokens, heads, QUERIES)
    first = tl.load(first_ptr + of_slice + t, mask=t < tokens, other=0)
    lowest = tl.load(first_ptr + of_slice + start)
    highest = tl.load(first_ptr + of_slice + tl.minimum(start + QUERIES, tokens) - 1)
    query, grad = load_rows(query_desc, batch, head, start), load_rows(grad_desc, batch, head, start)
    out = load_rows(out_desc, batch, head, start)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + of_head + t, delta, mask=t < tokens)
    logsumexp = tl.load(logsumexp_ptr + of_head + t, mask=t < tokens, other=0.0)
    query_grad = tl.zeros((QUERIES, query.shape[1]), dtype=tl.float32)
    for begin in tl.range(lowest // KEYS * KEYS, tl.minimum(start + QUERIES, tokens), KEYS):
        key, value = load_rows(key_desc, batch, head, begin), load_rows(value_desc, batch, head, begin)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        weights = tl.exp2(scores * log2_scale - logsumexp[:, None])
        if (begin < highest) | (begin + KEYS - 1 > start):  # else all queries see all keys
            j = begin + tl.arange(0, KEYS)
            weights = tl.where((j[None, :] >= first[:, None]) & (j[None, :] <= t[:, None]), weights, 0.0)
        weight_grad = tl.dot(grad, tl.trans(value), input_precision="ieee")
        score_grad = weights * (weight_grad - delta[:, None])
        query_grad = tl.dot(score_grad.to(key.dtype), key, query_grad, input_precision="ieee")
    store_rows(query_grad_desc, batch, head, start, query_grad * scale)


@triton.jit
def key_gradients(  # type: ignore[no-untyped-def]
    query_desc, key_desc, value_desc, grad_desc, end_ptr, logsumexp_ptr, delta_ptr, key_grad_desc, value_grad_desc,
    tokens, heads, log2_scale, scale, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys of a head and of their values, from the query blocks that see it, ascending.
    Scores are [keys, queries] here: what is multiplied next needs no transposition."""
    batch, head, start, j, of_slice, of_head = place(tokens, heads, KEYS)
    end = tl.load(end_ptr + of_slice + j, mask=j < tokens, other=0)
    lowest = tl.load(end_ptr + of_slice + start)
    highest = tl.load(end_ptr + of_slice + tl.minimum(start + KEYS, tokens) - 1)
    key, value = load_rows(key_desc, batch, head, start), load_rows(value_desc, batch, head, start)
    key_grad = tl.zeros((KEYS, key.shape[1]), dtype=tl.float32)
    value_grad = tl.zeros((KEYS, key.shape[1]), dtype=tl.float32)
    for begin in tl.range(start // QUERIES * QUERIES, highest, QUERIES):
        query, grad = load_rows(query_desc, batch, head, begin), load_rows(grad_desc, batch, head, begin)
        t = begin + tl.arange(0, QUERIES)
        logsumexp = tl.load(logsumexp_ptr + of_head + t, mask=t < tokens, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        weights = tl.exp2(scores * log2_scale - logsumexp[None, :])
        if (begin < start + KEYS - 1) | (begin + QUERIES > lowest):  # else all queries see all keys
            weights = tl.where((t[None, :] >= j[:, None]) & (t[None, :] < end[:, None]), weights, 0.0)
        value_grad = tl.dot(weights.to(grad.dtype), grad, value_grad, input_precision="ieee")
        weight_grad = tl.dot(value, tl.trans(grad), input_precision="ieee")
        # Loaded as late as can be: a thread needs many of a row of numbers, and has no register to spare.
        delta = tl.load(delta_ptr + of_head + t, mask=t < tokens, other=0.0)
        score_grad = weights * (weight_grad - delta[None, :])
        key_grad = tl.dot(score_grad.to(query.dtype), query, key_grad, input_precision="ieee")
    store_rows(key_grad_desc, batch, head, start, key_grad * scale)
    store_rows(value_grad_desc, batch, head, start, value_grad)
