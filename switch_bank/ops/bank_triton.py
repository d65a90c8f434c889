"""The experts' feed-forward as a few Triton kernels: gather, adapter, W₁, relu², W₂, gate and scatter in two of them.

Rows are sorted by expert, in blocks of whole tiles (`switch_bank.ops.bank.plan_rows`). Every kernel writes each of its
values once, in one program: no atomic additions, the same bits each time. Imported only where there is Triton;
`switch_bank.ops.bank` has the same in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # rows and columns of a program's part of a result
# STEP is how much of the summed side is multiplied at a time. With these, a Hopper multiprocessor has registers and
# shared memory for two programs of most kernels.
PLAIN = dict(STEP=64, num_warps=8, num_stages=3)
ADAPTED = dict(STEP=32, num_warps=8, num_stages=5)  # the adapter is applied in registers
GATHERED = dict(STEP=64, num_warps=8, num_stages=5)  # in each step, indices are loaded before what they point to


@torch.library.custom_op("switch_bank::fused_experts", mutates_args=())
def fused_experts(
    x: Tensor, w1: Tensor, w2: Tensor, scale: Tensor | None, bias: Tensor | None, gates: Tensor,
    pick_of_row: Tensor, row_of_pick: Tensor, expert_of_block: Tensor, ends: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = Σ_k gate_k · W₂[e_k]·relu²(W₁[e_k]·(scale[e_k]·x + bias[e_k])), and relu²(...) of each row for the backward.

    x: [N, D]; w1: [E, F, D]; w2: [E, D, F]; scale and bias: [E, D], both or neither; gates: [N, K]; all bfloat16 or all
    float32. pick_of_row [R], row_of_pick [N, K] and ends [E] are a RowPlan's, expert_of_block [R / tile] int32 is E for
    a block of no expert. Returns [N, D] and [R, F] in x's dtype; sums are float32.
    """
    adapter = scale is not None
    x, w1, w2, scale, bias, gates = _contiguous(x, w1, w2, scale, bias, gates)
    (tokens, width), (experts, hidden_width, _), top_k = x.shape, w1.shape, gates.shape[1]
    blocks, tile = len(expert_of_block), len(pick_of_row) // len(expert_of_block)
    rows = (pick_of_row, expert_of_block, tokens, width, hidden_width, experts)
    hidden = x.new_empty(len(pick_of_row), hidden_width)
    hidden_rows[(blocks * triton.cdiv(hidden_width, tile),)](
        x, w1, scale, bias, hidden, *rows, TOP_K=top_k, ADAPTER=adapter, **_sizes(ADAPTED if adapter else PLAIN, tile)
    )
    picks = x.new_empty(tokens * top_k, width)
    output_rows[(blocks * triton.cdiv(width, tile),)](
        hidden, w2, gates, picks, *rows, TOP_K=top_k, **_sizes(PLAIN, tile)
    )
    return picks if top_k == 1 else picks.view(tokens, top_k, width).sum(dim=1), hidden


@fused_experts.register_fake
def _(x, w1, w2, scale, bias, gates, pick_of_row, row_of_pick, expert_of_block, ends):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(pick_of_row.shape[0], w1.shape[1])


@torch.library.custom_op("switch_bank::fused_experts_backward", mutates_args=())
def fused_experts_backward(
    grad: Tensor, hidden: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: Tensor | None, bias: Tensor | None,
    gates: Tensor, pick_of_row: Tensor, row_of_pick: Tensor, expert_of_block: Tensor, ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, w1, w2, scale, bias (zeros without an adapter) and gates, from that of y, [N, D], and the
    second result of `fused_experts`."""
    adapter = scale is not None
    x, w1, w2, scale, bias, gates = _contiguous(x, w1, w2, scale, bias, gates)
    grad = grad.contiguous()
    (tokens, width), (experts, hidden_width, _), top_k = x.shape, w1.shape, gates.shape[1]
    blocks, tile = len(expert_of_block), len(pick_of_row) // len(expert_of_block)
    width_tiles, hidden_tiles = triton.cdiv(width, tile), triton.cdiv(hidden_width, tile)
    rows = (pick_of_row, expert_of_block, tokens, width, hidden_width, experts)
    # Sums over the rows of a block or the columns of a tile, each by the one program that has them. A block of no
    # expert writes nothing.
    gate_parts = torch.empty(len(pick_of_row), hidden_tiles, device=x.device)
    hidden_parts = torch.zeros(blocks, hidden_width, device=x.device)
    scale_parts, bias_parts = (torch.zeros(blocks, width, device=x.device) for _ in range(2))

    hidden_grad = torch.empty_like(hidden)  # of W₁'s product
    hidden_row_gradients[(blocks * hidden_tiles,)](
        grad,
        w2,
        gates,
        hidden,
        hidden_grad,
        gate_parts,
        hidden_parts,
        *rows,
        TOP_K=top_k,
        ADAPTER=adapter,
        **_sizes(PLAIN, tile),
    )
    pick_grads = x.new_empty(tokens * top_k, width)
    input_row_gradients[(blocks * width_tiles,)](
        hidden_grad,
        w1,
        x,
        scale,
        pick_grads,
        scale_parts,
        bias_parts,
        *rows,
        TOP_K=top_k,
        ADAPTER=adapter,
        **_sizes(PLAIN, tile),
    )
    of_expert = (expert_of_block == torch.arange(experts, device=x.device)[:, None]).float()
    w1_grad, w2_grad = torch.empty_like(w1), torch.empty_like(w2)
    shape = (pick_of_row, ends, tokens, width, hidden_width)
    grid = (experts * width_tiles * hidden_tiles,)
    weight_gradients[grid](
        x, hidden_grad, gates, scale, bias, of_expert @ hidden_parts, w1_grad, *shape,
        TOP_K=top_k, GATED=False, ADAPTER=adapter, TRANSPOSED=True, **_sizes(GATHERED, tile),
    )  # fmt: skip
    weight_gradients[grid](
        grad, hidden, gates, x, x, x, w2_grad, *shape,
        TOP_K=top_k, GATED=True, ADAPTER=False, TRANSPOSED=False, **_sizes(GATHERED, tile),
    )  # fmt: skip
    x_grad = pick_grads if top_k == 1 else pick_grads.view(tokens, top_k, width).sum(dim=1)
    scale_grad, bias_grad = ((of_expert @ parts).to(x.dtype) for parts in (scale_parts, bias_parts))
    gates_grad = gate_parts[row_of_pick].sum(dim=-1).to(gates.dtype)
    return x_grad, w1_grad, w2_grad, scale_grad, bias_grad, gates_grad


@fused_experts_backward.register_fake
def _(grad, hidden, x, w1, w2, scale, bias, gates, *plan):  # type: ignore[no-untyped-def]
    of_adapter = (w1.shape[0], x.shape[1])
    shapes = (x.shape, w1.shape, w2.shape, of_adapter, of_adapter, gates.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


def _sizes(of_kernel: dict[str, int], tile: int) -> dict[str, int]:
    return of_kernel | dict(TILE=tile, STEP=min(of_kernel["STEP"], tile))


def _contiguous(x, w1, w2, scale, bias, gates):  # type: ignore[no-untyped-def]
    """All of them contiguous; x in the place of an adapter that is not there, as kernels want some address."""
    return [(x if tensor is None else tensor).contiguous() for tensor in (x, w1, w2, scale, bias, gates)]


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    hidden, *inputs = ctx.saved_tensors
    x, w1, w2, scale, bias, gates = fused_experts_backward(grad, hidden, *inputs)
    adapter = (None, None) if inputs[3] is None else (scale, bias)
    return x, w1, w2, *adapter, gates, None, None, None, None


fused_experts.register_autograd(_backward, setup_context=_save_for_backward)


@triton.jit
def product(a, w, w_step, depth, scale, bias, ADAPTER: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ_k (scale_k·a_k + bias_k)·w_k in float32, [TILE, TILE]. a: pointers [TILE, STEP] to the first columns of some
    rows; w: pointers [STEP, TILE], with w_step from one k to the next; scale, bias: pointers to [depth], if ADAPTER."""
    k = tl.arange(0, STEP)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, depth, STEP):
        inside = k < depth - start
        left = tl.load(a + start, mask=inside[None, :], other=0.0)
        right = tl.load(w, mask=inside[:, None], other=0.0)
        if ADAPTER:
            factor = tl.load(scale + start + k, mask=inside, other=0.0).to(tl.float32)
            offset = tl.load(bias + start + k, mask=inside, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * factor[None, :] + offset[None, :]).to(left.dtype)
        total = tl.dot(left, right, total, input_precision="ieee")  # float32 stays float32, not TF32
        w += STEP * w_step
    return total


@triton.jit
def hidden_rows(  # type: ignore[no-untyped-def]
    x_ptr, w1_ptr, scale_ptr, bias_ptr, hidden_ptr, pick_ptr, expert_ptr, tokens, width, hidden_width, experts,
    TOP_K: tl.constexpr, ADAPTER: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """relu²(W₁·adapter(x)) of the rows of a block; a program a tile, those of a block in a row."""
    tiles = tl.cdiv(hidden_width, TILE)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert == experts:
        return
    row = block * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    # What is outside is read from inside, finite values: rows of no pick have a gate of zero, and no column is written.
    token = tl.minimum(tl.load(pick_ptr + row) // TOP_K, tokens - 1)
    a = x_ptr + token[:, None] * width + k[None, :]
    w = w1_ptr + expert * hidden_width * width + (column % hidden_width)[None, :] * width + k[:, None]
    total = product(a, w, 1, width, scale_ptr + expert * width, bias_ptr + expert * width, ADAPTER, TILE, STEP)
    total = tl.where(total < 0.0, 0.0, total)  # unlike a maximum, this keeps a NaN
    hidden = hidden_ptr + row[:, None] * hidden_width + column[None, :]
    tl.store(hidden, (total * total).to(hidden_ptr.dtype.element_ty), mask=(column < hidden_width)[None, :])


@triton.jit
def output_rows(  # type: ignore[no-untyped-def]
    hidden_ptr, w2_ptr, gates_ptr, picks_ptr, pick_ptr, expert_ptr, tokens, width, hidden_width, experts,
    TOP_K: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """gate · W₂·hidden of the rows of a block, each written where its pick stands in [N·K, D]."""
    tiles = tl.cdiv(width, TILE)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert == experts:
        return
    row = block * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    a = hidden_ptr + row[:, None] * hidden_width + k[None, :]
    w = w2_ptr + expert * width * hidden_width + (column % width)[None, :] * hidden_width + k[:, None]
    total = product(a, w, 1, hidden_width, a, a, False, TILE, STEP)
    pick = tl.load(pick_ptr + row)
    there = pick < tokens * TOP_K
    total *= tl.load(gates_ptr + pick, mask=there, other=0.0).to(tl.float32)[:, None]
    picks = picks_ptr + pick[:, None] * width + column[None, :]
    tl.store(picks, total.to(picks_ptr.dtype.element_ty), mask=there[:, None] & (column < width)[None, :])


@triton.jit
def hidden_row_gradients(  # type: ignore[no-untyped-def]
    grad_ptr, w2_ptr, gates_ptr, hidden_ptr, hidden_grad_ptr, gate_parts_ptr, hidden_parts_ptr, pick_ptr, expert_ptr,
    tokens, width, hidden_width, experts,
    TOP_K: tl.constexpr, ADAPTER: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The gradient of W₁'s product in each row of a block, zeros in those of no pick, from that of y: gate · W₂ᵀ·grad
    times the derivative of relu², which is 2·sqrt(hidden). With it, the tile's part of each row's gate gradient, which
    is hidden · W₂ᵀ·grad, and for the adapter the sums over the block's rows."""
    tiles = tl.cdiv(hidden_width, TILE)
    block, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert == experts:
        return
    row, column = block * TILE + tl.arange(0, TILE), tile * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    pick = tl.load(pick_ptr + row)
    token = tl.minimum(pick // TOP_K, tokens - 1)
    a = grad_ptr + token[:, None] * width + k[None, :]
    w = w2_ptr + expert * width * hidden_width + k[:, None] * hidden_width + (column % hidden_width)[None, :]
    total = product(a, w, hidden_width, width, a, a, False, TILE, STEP)
    gate = tl.load(gates_ptr + pick, mask=pick < tokens * TOP_K, other=0.0).to(tl.float32)
    # One half of the columns at a time: to hold all of `hidden` beside `total` takes twice the registers.
    first, second = tl.split(tl.permute(tl.reshape(total, (TILE, 2, TILE // 2)), (0, 2, 1)))
    half = tile * TILE + tl.arange(0, TILE // 2)
    rest = (row, gate, hidden_ptr, hidden_grad_ptr, hidden_parts_ptr + block * hidden_width, hidden_width)
    part = half_of_hidden_row_gradients(first, half, rest, ADAPTER)
    part += half_of_hidden_row_gradients(second, half + TILE // 2, rest, ADAPTER)
    tl.store(gate_parts_ptr + row * tiles + tile, part)


@triton.jit
def half_of_hidden_row_gradients(  # type: ignore[no-untyped-def]
    total, column, rest, ADAPTER: tl.constexpr
):  # fmt: skip
    """What `hidden_row_gradients` makes of W₂ᵀ·grad in some columns. Returns their part of each row's gate gradient."""
    row, gate, hidden_ptr, hidden_grad_ptr, sums, hidden_width = rest
    inside, here = column < hidden_width, row[:, None] * hidden_width + column[None, :]
    hidden = tl.load(hidden_ptr + here, mask=inside[None, :], other=0.0).to(tl.float32)
    part = tl.sum(total * hidden, axis=1)
    total *= 2 * gate[:, None] * tl.sqrt(hidden)
    tl.store(hidden_grad_ptr + here, total.to(hidden_grad_ptr.dtype.element_ty), mask=inside[None, :])
    if ADAPTER:
        tl.store(sums + column, tl.sum(total, axis=0), mask=inside)
    return part


@triton.jit
def input_row_gradients(  # type: ignore[no-untyped-def]
    hidden_grad_ptr, w1_ptr, x_ptr, scale_ptr, picks_ptr, scale_parts_ptr, bias_parts_ptr, pick_ptr, expert_ptr,
    tokens, width, hidden_width, experts,
    TOP_K: tl.constexpr, ADAPTER: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """scale · W₁ᵀ·gradient of the rows of a block, each written where its pick stands in [N·K, D]; for the adapter, the
    sums over the block's rows of W₁ᵀ·gradient, and of its product with x."""
    tiles = tl.cdiv(width, TILE)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert == experts:
        return
    row = block * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    a = hidden_grad_ptr + row[:, None] * hidden_width + k[None, :]
    w = w1_ptr + expert * hidden_width * width + k[:, None] * width + (column % width)[None, :]
    total = product(a, w, width, hidden_width, a, a, False, TILE, STEP)
    pick = tl.load(pick_ptr + row)
    inside = (pick < tokens * TOP_K)[:, None] & (column < width)[None, :]
    if ADAPTER:
        sums = block * width + column
        tl.store(bias_parts_ptr + sums, tl.sum(total, axis=0), mask=column < width)
        x = tl.load(x_ptr + (pick // TOP_K)[:, None] * width + column[None, :], mask=inside, other=0.0)
        tl.store(scale_parts_ptr + sums, tl.sum(total * x.to(tl.float32), axis=0), mask=column < width)
        total *= tl.load(scale_ptr + expert * width + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    picks = picks_ptr + pick[:, None] * width + column[None, :]
    tl.store(picks, total.to(picks_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradients(  # type: ignore[no-untyped-def]
    gathered_ptr, rows_ptr, gates_ptr, scale_ptr, bias_ptr, sums_ptr, out_ptr, pick_ptr, ends_ptr,
    tokens, width, hidden_width,
    TOP_K: tl.constexpr, GATED: tl.constexpr, ADAPTER: tl.constexpr, TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of each expert, Σ over its rows of gathered[token of the row] ⊗ rows[row], [D, F]; a program a tile.

    W₂'s: y's gradient, times the gate if GATED, and hidden. W₁'s, TRANSPOSED to [F, D]: x and the gradient of W₁'s
    product; the adapter is applied to the sum, as Σ (scale·x + bias) ⊗ g is scale·Σ x ⊗ g + bias ⊗ Σ g, and sums
    [E, F] has Σ g. Rows of no pick hold zeros in `rows`.
    """
    tiles, hidden_tiles = tl.cdiv(width, TILE) * tl.cdiv(hidden_width, TILE), tl.cdiv(hidden_width, TILE)
    expert, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    d = (tile // hidden_tiles) * TILE + tl.arange(0, TILE)
    f = (tile % hidden_tiles) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    gathered = gathered_ptr + (d % width)[:, None]
    rows = rows_ptr + (first.to(tl.int64) + k)[:, None] * hidden_width + (f % hidden_width)[None, :]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(first, end, STEP):
        pick = tl.load(pick_ptr + start + k)
        token = tl.minimum(pick // TOP_K, tokens - 1)
        left = tl.load(gathered + token[None, :] * width)
        if GATED:
            gate = tl.load(gates_ptr + pick, mask=pick < tokens * TOP_K, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * gate[None, :]).to(left.dtype)
        total = tl.dot(left, tl.load(rows), total, input_precision="ieee")
        rows += STEP * hidden_width
    if ADAPTER:
        scale = tl.load(scale_ptr + expert * width + d, mask=d < width, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + expert * width + d, mask=d < width, other=0.0).to(tl.float32)
        sums = tl.load(sums_ptr + expert * hidden_width + f, mask=f < hidden_width, other=0.0)
        total = scale[:, None] * total + bias[:, None] * sums[None, :]
    place = d[:, None] + f[None, :] * width if TRANSPOSED else d[:, None] * hidden_width + f[None, :]
    inside = (d < width)[:, None] & (f < hidden_width)[None, :]
    tl.store(out_ptr + expert * width * hidden_width + place, total.to(out_ptr.dtype.element_ty), mask=inside)
