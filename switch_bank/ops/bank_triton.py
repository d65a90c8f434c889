"""The bank's feed-forward on a GPU as a few Triton kernels: gather, W₁, relu², gate, W₂ and scatter in two of them.

Matrices are cast once for all layers that share them, and each layer's backward adds their gradients to a float32 sum.
The adapter is in the first matrix and an offset, W₁·(scale·x + bias) = (W₁·diag(scale))·x + W₁·bias, so that no kernel
handles it row by row. Every kernel writes each of its values once, in one program: no atomic additions, the same bits
each time. Imported only where there is Triton; `switch_bank.ops.bank` has the same in torch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_bank.ops.arranged import Arranged, GradientSums, collect

TILE = 128  # rows and columns of a program's part of a result
CHUNK = 1024  # picks that a program of the plan counts
# STEP is how much of the summed side is multiplied at a time. With these, a Hopper multiprocessor has registers and
# shared memory for two programs at a time, and consumer GPUs for one.
PLAIN = dict(STEP=64, num_warps=8, num_stages=3, maxnreg=128)
# In each step, indices are loaded before what they point to.
GATHERED = dict(STEP=64, num_warps=8, num_stages=5, maxnreg=128)


def arrange(w1: Tensor, w2: Tensor, dtype: torch.dtype) -> Arranged:
    """w1: [E, F, D] and w2: [E, D, F] float32; dtype: bfloat16 or float32."""
    sums = GradientSums(w1.detach(), w2.detach(), None)
    w1_cast, w2_cast = w1.detach().to(dtype).contiguous(), w2.detach().to(dtype).contiguous()
    return Arranged("triton", w1_cast, w1_cast, w2_cast, w2_cast, collect(w1, w2, sums), sums, slice(0, len(w1)))


def expert_ffn(
    x: Tensor, matrices: Arranged, scale: Tensor | None, bias: Tensor | None, experts: Tensor, gates: Tensor
) -> Tensor:
    """`ops.bank.expert_ffn` without LoRA: x [N, D] of the matrices' dtype; scale and bias [E, D], both or neither;
    experts [N, K] int64; gates [N, K]. Returns [N, D]. Sums are float32."""
    x, gates = x.contiguous(), gates.to(x.dtype).contiguous()
    if scale is not None and bias is not None:
        scale, bias = scale.contiguous(), bias.contiguous()
    if torch.is_grad_enabled():
        return _ExpertFfn.apply(x, gates, scale, bias, matrices.link, experts, matrices)
    return _forward(x, gates, scale, bias, matrices, Plan.of(experts, len(matrices.w1)))[0]


class Plan(NamedTuple):
    """Where each pick, a (token, k) pair of N tokens and K picks, stands among R rows sorted by expert.

    An expert's rows are whole blocks of TILE. Rows that fill up its last block, and those behind the last expert's,
    belong to no pick: their index is N·K.
    """

    pick_of_row: Tensor  # [R] int32
    expert_of_block: Tensor  # [R / TILE] int32, E for a block of no expert
    ends: Tensor  # [E] int32: one past the last row of each expert

    @classmethod
    def of(cls, experts: Tensor, count: int) -> "Plan":
        """experts: [N, K] int64 in 0..count-1. All shapes are static: R = N·K + count·TILE, rounded down to TILE."""
        experts = experts.contiguous()
        picks, padded = experts.numel(), triton.next_power_of_2(count)
        blocks, chunks = (picks + count * TILE) // TILE, triton.cdiv(picks, CHUNK)
        counts = torch.empty(chunks, count, dtype=torch.int32, device=experts.device)
        sizes = dict(EXPERTS=padded, CHUNK=CHUNK, STEP=min(CHUNK, 4096 // padded or 1))
        count_picks[(chunks,)](experts, counts, picks, count, **sizes)
        plan = cls(
            torch.full((blocks * TILE,), picks, dtype=torch.int32, device=experts.device),
            torch.empty(blocks, dtype=torch.int32, device=experts.device),
            torch.empty(count, dtype=torch.int32, device=experts.device),
        )
        # A chunk's programs cover as many blocks as its picks can fill, and one more for each expert.
        own_blocks = triton.next_power_of_2(triton.cdiv(CHUNK, TILE) + count)
        place_picks[(chunks,)](
            experts, counts, *plan, picks, count, chunks, blocks, TILE=TILE, BLOCKS=own_blocks, ROWS=16, **sizes
        )
        return plan


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gates, scale, bias, link, experts, matrices):  # type: ignore[no-untyped-def]
        plan = Plan.of(experts, len(matrices.w1))
        y, hidden = _forward(x, gates, scale, bias, matrices, plan)
        ctx.save_for_backward(x, gates, hidden, scale, bias, matrices.w1_backward, matrices.w2_backward, *plan)
        ctx.sums, ctx.experts = matrices.sums, matrices.experts
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        saved, plan = ctx.saved_tensors[:7], Plan(*ctx.saved_tensors[7:])
        gradients = _backward(grad.contiguous(), saved, plan, ctx.sums.get(ctx.experts))
        return *gradients, grad.new_zeros((), dtype=torch.float32), None, None


def _forward(x, gates, scale, bias, matrices, plan):  # type: ignore[no-untyped-def]
    """y [N, D], and gate · relu² of each row [R, F] for the backward."""
    w1, w2, (tokens, top_k), (_, hidden_width, width) = matrices.w1, matrices.w2, gates.shape, matrices.w1.shape
    blocks, rows = len(plan.expert_of_block), _rows(plan, x, w1)
    own_w1, offset = _with_adapter(w1, scale, bias)
    hidden = x.new_empty(len(plan.pick_of_row), hidden_width)
    hidden_rows[(blocks * triton.cdiv(hidden_width, TILE),)](
        x, own_w1, offset, gates, hidden, *rows, TOP_K=top_k, ADAPTER=scale is not None, **_sizes(PLAIN)
    )
    picks = x.new_empty(tokens * top_k, width)
    sizes = dict(TOP_K=top_k, **_sizes(PLAIN))
    picks_of_rows[(blocks * triton.cdiv(width, TILE),)](hidden, w2, picks, *rows, BACKWARD=False, **sizes)
    return picks if top_k == 1 else picks.view(tokens, top_k, width).sum(dim=1), hidden


def _backward(grad, saved, plan, sums):  # type: ignore[no-untyped-def]
    """The gradients of x, gates, scale and bias from that of y, [N, D]; those of w1 and w2 are added to the sums."""
    (x, gates, hidden, scale, bias, w1, w2), (w1_sums, w2_sums) = saved, sums
    adapter, (tokens, top_k), (experts, hidden_width, width) = scale is not None, gates.shape, w1.shape
    blocks, rows = len(plan.expert_of_block), _rows(plan, x, w1)
    width_tiles, hidden_tiles = triton.cdiv(width, TILE), triton.cdiv(hidden_width, TILE)
    own_w1, _ = _with_adapter(w1, scale, bias)
    # Sums over the columns of a tile or the rows of a block, each by the one program that has them. A block of no
    # expert writes nothing.
    gate_parts = torch.empty(tokens * top_k, hidden_tiles, device=x.device)
    hidden_parts = torch.empty(blocks, hidden_width, device=x.device)
    hidden_grad = torch.empty_like(hidden)  # of W₁'s product
    hidden_row_gradients[(blocks * hidden_tiles,)](
        grad, w2, gates, hidden, hidden_grad, gate_parts, hidden_parts, *rows,
        TOP_K=top_k, ADAPTER=adapter, **_sizes(PLAIN),
    )  # fmt: skip
    pick_grads = x.new_empty(tokens * top_k, width)
    sizes = dict(TOP_K=top_k, **_sizes(PLAIN))
    picks_of_rows[(blocks * width_tiles,)](hidden_grad, own_w1, pick_grads, *rows, BACKWARD=True, **sizes)
    x_grad = pick_grads if top_k == 1 else pick_grads.view(tokens, top_k, width).sum(dim=1)
    grid, shape = (experts * width_tiles * hidden_tiles,), (plan.pick_of_row, plan.ends, tokens, width, hidden_width)
    # Of scale and bias, a sum over the columns of each tile.
    parts = torch.empty(2, experts, hidden_tiles, width, device=x.device)
    w1_gradients[grid](
        x, hidden_grad, scale if adapter else x, bias if adapter else x, hidden_parts, w1, w1_sums, parts[0], parts[1],
        *shape, TOP_K=top_k, ADAPTER=adapter, **_sizes(GATHERED),
    )  # fmt: skip
    w2_gradients[grid](grad, hidden, w2_sums, *shape, TOP_K=top_k, **_sizes(GATHERED))
    scale_grad, bias_grad = parts.sum(dim=2).to(scale.dtype) if adapter else (None, None)
    return x_grad, gate_parts.sum(dim=-1).view_as(gates).to(gates.dtype), scale_grad, bias_grad


def _with_adapter(w1: Tensor, scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """W₁·diag(scale) like w1 [E, F, D], and W₁·bias [E, F] float32; w1 twice where there is no adapter."""
    if scale is None or bias is None:
        return w1, w1
    experts, hidden_width, width = w1.shape
    own_w1, offset = torch.empty_like(w1), w1.new_empty(experts, hidden_width, dtype=torch.float32)
    grid = (experts, triton.cdiv(hidden_width, 16))
    apply_adapter[grid](
        w1, scale, bias, own_w1, offset, width, hidden_width, ROWS=16, STEP=min(256, triton.next_power_of_2(width))
    )
    return own_w1, offset


def _rows(plan: Plan, x: Tensor, w1: Tensor) -> tuple[Tensor, Tensor, int, int, int, int]:
    experts, hidden_width, width = w1.shape
    return plan.pick_of_row, plan.expert_of_block, len(x), width, hidden_width, experts


def _sizes(of_kernel: dict[str, int]) -> dict[str, int]:
    return of_kernel | dict(TILE=TILE, STEP=min(of_kernel["STEP"], TILE))


# ---- the plan --------------------------------------------------------------------------------------------------------


@triton.jit
def count_picks(  # type: ignore[no-untyped-def]
    experts_ptr, counts_ptr, picks, experts, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr
):
    """counts [chunks, E]: how many of a chunk's picks are of each expert; a program a chunk."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, CHUNK, STEP):
        pick = chunk * CHUNK + start + tl.arange(0, STEP)
        picked = tl.load(experts_ptr + pick, mask=pick < picks, other=EXPERTS)
        count += tl.sum((picked[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + chunk * experts + expert, count, mask=expert < experts)


@triton.jit
def place_picks(  # type: ignore[no-untyped-def]
    experts_ptr, counts_ptr, pick_of_row_ptr, expert_of_block_ptr, ends_ptr, picks, experts, chunks, blocks,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The Plan of counts [chunks, E]; a program a chunk. Picks of an expert stay in order. Rows of no pick are left
    as they are."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    before, total = tl.zeros((EXPERTS,), dtype=tl.int32), tl.zeros((EXPERTS,), dtype=tl.int32)
    for first in range(0, chunks, ROWS):
        other = first + tl.arange(0, ROWS)
        inside = (other < chunks)[:, None] & (expert < experts)[None, :]
        count = tl.load(counts_ptr + other[:, None] * experts + expert[None, :], mask=inside, other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((other < chunk)[:, None], count, 0), axis=0)
    rows = (total + TILE - 1) // TILE * TILE
    ends = tl.cumsum(rows, axis=0)
    if chunk == 0:
        tl.store(ends_ptr + expert, ends, mask=expert < experts)
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    passed = ((ends[None, :] <= block[:, None] * TILE) & (expert < experts)[None, :]).to(tl.int32)
    tl.store(expert_of_block_ptr + block, tl.sum(passed, axis=1), mask=block < blocks)
    place = ends - rows + before  # of the next pick of each expert
    for start in range(0, CHUNK, STEP):
        pick = chunk * CHUNK + start + tl.arange(0, STEP)
        picked = tl.load(experts_ptr + pick, mask=pick < picks, other=EXPERTS)
        is_of = (picked[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(is_of, axis=0) - 1
        row = tl.sum(is_of * (place[None, :] + rank), axis=1)
        tl.store(pick_of_row_ptr + row, pick, mask=pick < picks)
        place += tl.sum(is_of, axis=0)


# ---- the products ----------------------------------------------------------------------------------------------------


@triton.jit
def apply_adapter(  # type: ignore[no-untyped-def]
    w1_ptr, scale_ptr, bias_ptr, out_ptr, offset_ptr, width, hidden_width, ROWS: tl.constexpr, STEP: tl.constexpr
):
    """W₁·diag(scale) and W₁·bias of some rows of an expert's matrix."""
    expert = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offset = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, STEP):
        column = start + tl.arange(0, STEP)
        inside = (row < hidden_width)[:, None] & (column < width)[None, :]
        here = (expert * hidden_width + row[:, None]) * width + column[None, :]
        w1 = tl.load(w1_ptr + here, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + expert * width + column, mask=column < width, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + expert * width + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(out_ptr + here, (w1 * scale[None, :]).to(out_ptr.dtype.element_ty), mask=inside)
        offset += tl.sum(w1 * bias[None, :], axis=1)
    tl.store(offset_ptr + expert * hidden_width + row, offset, mask=row < hidden_width)


@triton.jit
def product(a, w, w_step, depth, TILE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ_k a_k·w_k in float32, [TILE, TILE]. a: pointers [TILE, STEP] to the first columns of some rows; w: pointers
    [STEP, TILE], with w_step from one k to the next."""
    k = tl.arange(0, STEP)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, depth, STEP):
        inside = k < depth - start
        left = tl.load(a + start, mask=inside[None, :], other=0.0)
        right = tl.load(w, mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")  # float32 stays float32, not TF32
        w += STEP * w_step
    return total


@triton.jit
def hidden_rows(  # type: ignore[no-untyped-def]
    x_ptr, w1_ptr, offset_ptr, gates_ptr, hidden_ptr, pick_ptr, expert_ptr, tokens, width, hidden_width, experts,
    TOP_K: tl.constexpr, ADAPTER: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """gate · relu²(W₁·x + offset) of the rows of a block, zeros in those of no pick; a program a tile, those of a block
    in a row."""
    tiles = tl.cdiv(hidden_width, TILE)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert == experts:
        return
    row = block * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    # What is outside is read from inside, finite values: rows of no pick have a gate of zero, and no column is written.
    pick = tl.load(pick_ptr + row).to(tl.int64)
    token = tl.minimum(pick // TOP_K, tokens - 1)
    a = x_ptr + token[:, None] * width + k[None, :]
    w = w1_ptr + expert * hidden_width * width + (column % hidden_width)[None, :] * width + k[:, None]
    total = product(a, w, 1, width, TILE, STEP)
    if ADAPTER:
        total += tl.load(offset_ptr + expert * hidden_width + column, mask=column < hidden_width, other=0.0)[None, :]
    total = tl.where(total < 0.0, 0.0, total)  # unlike a maximum, this keeps a NaN
    total *= total * tl.load(gates_ptr + pick, mask=pick < tokens * TOP_K, other=0.0).to(tl.float32)[:, None]
    hidden = hidden_ptr + row[:, None] * hidden_width + column[None, :]
    tl.store(hidden, total.to(hidden_ptr.dtype.element_ty), mask=(column < hidden_width)[None, :])


@triton.jit
def picks_of_rows(  # type: ignore[no-untyped-def]
    rows_ptr, w_ptr, picks_ptr, pick_ptr, expert_ptr, tokens, width, hidden_width, experts,
    BACKWARD: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """W₂·rows of the rows of a block, or W₁ᵀ·rows if BACKWARD, each written where its pick stands in [N·K, D]."""
    tiles = tl.cdiv(width, TILE)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert == experts:
        return
    row = block * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    a = rows_ptr + row[:, None] * hidden_width + k[None, :]
    if BACKWARD:
        w = w_ptr + expert * hidden_width * width + k[:, None] * width + (column % width)[None, :]
        total = product(a, w, width, hidden_width, TILE, STEP)
    else:
        w = w_ptr + expert * width * hidden_width + (column % width)[None, :] * hidden_width + k[:, None]
        total = product(a, w, 1, hidden_width, TILE, STEP)
    pick = tl.load(pick_ptr + row).to(tl.int64)
    inside = (pick < tokens * TOP_K)[:, None] & (column < width)[None, :]
    picks = picks_ptr + pick[:, None] * width + column[None, :]
    tl.store(picks, total.to(picks_ptr.dtype.element_ty), mask=inside)


@triton.jit
def hidden_row_gradients(  # type: ignore[no-untyped-def]
    grad_ptr, w2_ptr, gates_ptr, hidden_ptr, hidden_grad_ptr, gate_parts_ptr, hidden_parts_ptr, pick_ptr, expert_ptr,
    tokens, width, hidden_width, experts,
    TOP_K: tl.constexpr, ADAPTER: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The gradient of W₁'s product in each row of a block, zeros in those of no pick, from that of y: W₂ᵀ·grad times
    2 · gate · relu, which is 2·sqrt(gate · hidden) with the sign of the gate. With it, the tile's part of each pick's
    gate gradient, which is hidden/gate · W₂ᵀ·grad, and for the adapter the sums over the block's rows."""
    tiles = tl.cdiv(hidden_width, TILE)
    block, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert == experts:
        return
    row, column = block * TILE + tl.arange(0, TILE), tile * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    pick = tl.load(pick_ptr + row).to(tl.int64)
    token = tl.minimum(pick // TOP_K, tokens - 1)
    a = grad_ptr + token[:, None] * width + k[None, :]
    w = w2_ptr + expert * width * hidden_width + k[:, None] * hidden_width + (column % hidden_width)[None, :]
    total = product(a, w, hidden_width, width, TILE, STEP)
    there = pick < tokens * TOP_K
    gate = tl.load(gates_ptr + pick, mask=there, other=0.0).to(tl.float32)
    # One half of the columns at a time: to hold all of `hidden` beside `total` takes twice the registers.
    first, second = halves(total, TILE, TILE)
    half = tile * TILE + tl.arange(0, TILE // 2)
    inverse = tl.where(gate == 0.0, 0.0, 1.0 / gate)
    factor = tl.where(gate < 0.0, -2.0, 2.0) * tl.sqrt(tl.abs(gate))
    rest = (row, inverse, factor, hidden_ptr, hidden_grad_ptr, hidden_parts_ptr + block * hidden_width, hidden_width)
    part = half_of_hidden_row_gradients(first, half, rest, ADAPTER)
    part += half_of_hidden_row_gradients(second, half + TILE // 2, rest, ADAPTER)
    tl.store(gate_parts_ptr + pick * tiles + tile, part, mask=there)


@triton.jit
def halves(total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first half of the columns of [ROWS, COLUMNS], and the second."""
    return tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def half_of_hidden_row_gradients(  # type: ignore[no-untyped-def]
    total, column, rest, ADAPTER: tl.constexpr
):  # fmt: skip
    """What `hidden_row_gradients` makes of W₂ᵀ·grad in some columns. Returns their part of each row's gate gradient."""
    row, inverse, factor, hidden_ptr, hidden_grad_ptr, sums, hidden_width = rest
    inside, here = column < hidden_width, row[:, None] * hidden_width + column[None, :]
    hidden = tl.load(hidden_ptr + here, mask=inside[None, :], other=0.0).to(tl.float32)
    part = tl.sum(total * hidden, axis=1) * inverse
    total *= factor[:, None] * tl.sqrt(tl.abs(hidden))
    tl.store(hidden_grad_ptr + here, total.to(hidden_grad_ptr.dtype.element_ty), mask=inside[None, :])
    if ADAPTER:
        tl.store(sums + column, tl.sum(total, axis=0), mask=inside)
    return part


@triton.jit
def outer_products(  # type: ignore[no-untyped-def]
    gathered_ptr, rows_ptr, pick_ptr, first, end, d, f, tokens, width, hidden_width,
    ROWS_FIRST: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Σ over rows first..end of gathered[token of the row] ⊗ rows[row] in columns d and f, [TILE, TILE] float32 of d
    and f or, with ROWS_FIRST, of f and d. Rows of no pick hold zeros in `rows`."""
    k = tl.arange(0, STEP)
    row = first.to(tl.int64) + k
    d, f = d % width, f % hidden_width
    if ROWS_FIRST:
        rows = rows_ptr + f[:, None] + row[None, :] * hidden_width
    else:
        rows = rows_ptr + row[:, None] * hidden_width + f[None, :]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(first, end, STEP):
        pick = tl.load(pick_ptr + start + k).to(tl.int64)
        token = tl.minimum(pick // TOP_K, tokens - 1)
        if ROWS_FIRST:
            right = tl.load(gathered_ptr + token[:, None] * width + d[None, :])
            total = tl.dot(tl.load(rows), right, total, input_precision="ieee")
        else:
            left = tl.load(gathered_ptr + d[:, None] + token[None, :] * width)
            total = tl.dot(left, tl.load(rows), total, input_precision="ieee")
        rows += STEP * hidden_width
    return total


@triton.jit
def place_of_weight_gradients(ends_ptr, width, hidden_width, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a program for each tile of each expert's matrix: expert, its first row and the end of them, and the tile among
    those of d and of f."""
    hidden_tiles = tl.cdiv(hidden_width, TILE)
    tiles = tl.cdiv(width, TILE) * hidden_tiles
    expert, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    return expert, first, end, tile // hidden_tiles, tile % hidden_tiles


@triton.jit
def w1_gradients(  # type: ignore[no-untyped-def]
    x_ptr, hidden_grad_ptr, scale_ptr, bias_ptr, hidden_parts_ptr, w1_ptr, sums_ptr, scale_parts_ptr, bias_parts_ptr,
    pick_ptr, ends_ptr, tokens, width, hidden_width,
    TOP_K: tl.constexpr, ADAPTER: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of each expert, G = Σ over its rows of x ⊗ g, g being the gradient of W₁'s product. Added to sums [E, F, D] are
    scale·G + bias ⊗ Σg; of the adapter's gradients, W₁·G and W₁·Σg, the part of each tile's columns is written."""
    expert, first, end, d_tile, f_tile = place_of_weight_gradients(ends_ptr, width, hidden_width, TILE)
    d, f = d_tile * TILE + tl.arange(0, TILE), f_tile * TILE + tl.arange(0, TILE)
    total = outer_products(
        x_ptr, hidden_grad_ptr, pick_ptr, first, end, d, f, tokens, width, hidden_width, True, TOP_K, TILE, STEP
    )
    g = tl.zeros((TILE,), dtype=tl.float32)
    if ADAPTER:
        for start in range(first // TILE, end // TILE, 8):
            block = start + tl.arange(0, 8)
            there = (block < end // TILE)[:, None] & (f < hidden_width)[None, :]
            parts = hidden_parts_ptr + block.to(tl.int64)[:, None] * hidden_width + f[None, :]
            g += tl.sum(tl.load(parts, mask=there, other=0.0), axis=0)
    of_expert, of_parts = expert * width * hidden_width, (expert * tl.cdiv(hidden_width, TILE) + f_tile) * width
    rest = (
        w1_ptr + of_expert, sums_ptr + of_expert, scale_ptr + expert * width, bias_ptr + expert * width,
        scale_parts_ptr + of_parts, bias_parts_ptr + of_parts, f, g, width, hidden_width,
    )  # fmt: skip
    # A quarter of the columns at a time, for the sake of registers.
    one, other = halves(total, TILE, TILE)
    first_quarter, second_quarter = halves(one, TILE, TILE // 2)
    third_quarter, fourth_quarter = halves(other, TILE, TILE // 2)
    column = d_tile * TILE + tl.arange(0, TILE // 4)
    quarter_of_w1_gradients(first_quarter, column, rest, ADAPTER)
    quarter_of_w1_gradients(second_quarter, column + TILE // 4, rest, ADAPTER)
    quarter_of_w1_gradients(third_quarter, column + TILE // 2, rest, ADAPTER)
    quarter_of_w1_gradients(fourth_quarter, column + 3 * TILE // 4, rest, ADAPTER)


@triton.jit
def quarter_of_w1_gradients(total, d, rest, ADAPTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `w1_gradients` makes of G in some columns d."""
    w1_ptr, sums_ptr, scale_ptr, bias_ptr, scale_parts_ptr, bias_parts_ptr, f, g, width, hidden_width = rest
    here, inside = f[:, None] * width + d[None, :], (f < hidden_width)[:, None] & (d < width)[None, :]
    if ADAPTER:
        w1 = tl.load(w1_ptr + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(scale_parts_ptr + d, tl.sum(w1 * total, axis=0), mask=d < width)
        tl.store(bias_parts_ptr + d, tl.sum(w1 * g[:, None], axis=0), mask=d < width)
        scale = tl.load(scale_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        total = total * scale[None, :] + g[:, None] * bias[None, :]
    tl.store(sums_ptr + here, tl.load(sums_ptr + here, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def w2_gradients(  # type: ignore[no-untyped-def]
    grad_ptr, hidden_ptr, sums_ptr, pick_ptr, ends_ptr, tokens, width, hidden_width,
    TOP_K: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of each expert, Σ over its rows of grad ⊗ hidden, added to sums [E, D, F]."""
    expert, first, end, d_tile, f_tile = place_of_weight_gradients(ends_ptr, width, hidden_width, TILE)
    d, f = d_tile * TILE + tl.arange(0, TILE), f_tile * TILE + tl.arange(0, TILE)
    total = outer_products(
        grad_ptr, hidden_ptr, pick_ptr, first, end, d, f, tokens, width, hidden_width, False, TOP_K, TILE, STEP
    )
    # A half of the columns at a time, for the sake of registers.
    one, other = halves(total, TILE, TILE)
    column = f_tile * TILE + tl.arange(0, TILE // 2)
    sums_ptr += expert * width * hidden_width
    add_to(sums_ptr, one, d, column, width, hidden_width)
    add_to(sums_ptr, other, d, column + TILE // 2, width, hidden_width)


@triton.jit
def add_to(sums_ptr, values, d, f, width, hidden_width):  # type: ignore[no-untyped-def]
    """Adds values to rows d and columns f of sums [D, F]."""
    sums = sums_ptr + d[:, None] * hidden_width + f[None, :]
    inside = (d < width)[:, None] & (f < hidden_width)[None, :]
    tl.store(sums, tl.load(sums, mask=inside, other=0.0) + values, mask=inside)
