"""The bank's feed-forward: y = Σ_k gate_k · W₂[e_k]·relu²(W₁[e_k]·adapter_{e_k}(x)), grouped by expert."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_bank.ops import TRITON_INSTALLED, bank_cpu
from switch_bank.ops.arranged import Arranged


class Adapter(NamedTuple):
    """What one layer adds to the bank's experts. Unused parts are None.

    scale, bias: [E, D], on the expert's input. in_down [E, r, D], in_up [E, F, r], out_down [E, r, F], out_up
    [E, D, r]: LoRA (Hu et al., arXiv 2106.09685) on the expert's first and second matrix.
    """

    scale: Tensor | None = None
    bias: Tensor | None = None
    in_down: Tensor | None = None
    in_up: Tensor | None = None
    out_down: Tensor | None = None
    out_up: Tensor | None = None


# Backends whose kernels sum up the gradients of the layers that share the matrices, and run as they are: no compiler
# sees them.
ARRANGED = ("cpu", "triton")
FEW = 16  # tokens: fewer than any slice has, as many as are decoded together at most by gathering matrices
MANY = 128  # tokens: the shortest slice


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, tokens: int, plain: bool) -> str:
    """The backend an option names. "auto" gathers for a few tokens; else it is the kernels of `bank_triton` on CUDA,
    and those of `bank_cpu` on a CPU, where they run, which take no LoRA and even widths (`plain`), and grouped_mm
    elsewhere; none of them takes float64. "triton" is "auto" where its kernels cannot run or do not pay: a model
    trained with it is read on a CPU, too."""
    if name == "triton" and (device.type != "cuda" or tokens <= FEW):
        name = "auto"
    if name != "auto":
        return name
    if tokens <= FEW:
        return "gathered"
    if dtype == torch.float64:
        return "reference"
    if device.type == "cuda" and plain and TRITON_INSTALLED:
        return "triton"
    return "cpu" if device.type == "cpu" and plain and bank_cpu.takes(dtype) else "grouped"


def arrange(backend: str, w1: Tensor, w2: Tensor, dtype: torch.dtype, microbatches: int | None = None) -> Arranged:
    """w1 [E, F, D] and w2 [E, D, F], float32, as one of the ARRANGED backends reads them in `dtype`, which is done once
    for all layers that share them. microbatches: see `ops.microbatches`; of "triton" there are none."""
    if backend == "cpu":
        return bank_cpu.arrange(w1, w2, dtype, microbatches)
    from switch_bank.ops import bank_triton

    assert microbatches is None
    return bank_triton.arrange(w1, w2, dtype)


def arranged_expert_ffn(x: Tensor, matrices: Arranged, adapter: Adapter, experts: Tensor, gates: Tensor) -> Tensor:
    """`expert_ffn` with the matrices that `arrange` has made; adapters may be per microbatch."""
    if adapter.in_down is not None:
        raise ValueError(f"backend {matrices.backend} has no LoRA adapters; take grouped")
    if matrices.backend == "cpu":
        return bank_cpu.expert_ffn(x, matrices, adapter.scale, adapter.bias, experts, gates)
    from switch_bank.ops import bank_triton

    return bank_triton.expert_ffn(x, matrices, adapter.scale, adapter.bias, experts, gates)


def expert_ffn(
    backend: str, x: Tensor, w1: Tensor, w2: Tensor, adapter: Adapter, experts: Tensor, gates: Tensor
) -> Tensor:
    """x: [N, D]; w1: [E, F, D]; w2: [E, D, F]; experts: [N, K] int64 in 0..E-1; gates: [N, K]. Returns [N, D].

    Weights, adapters and gates are cast to x's dtype. A gate of exactly 0 gives and gets exactly nothing. Matrices and
    adapters may be per microbatch, [M, E, ...].
    """
    if w1.ndim == 4 and w1.shape[1] > 1:  # as if each microbatch had experts of its own
        count, microbatch = w1.shape[1], torch.arange(len(w1), device=x.device).repeat_interleave(len(x) // len(w1))
        w1, w2 = w1.flatten(0, 1), w2.flatten(0, 1)
        adapter = Adapter(*(None if part is None else part.flatten(0, 1) for part in adapter))
        experts = experts + count * microbatch[:, None]
    many = w1.shape[-3] > 1
    if backend in ARRANGED and many:
        matrices = arrange(backend, w1.float(), w2.float(), x.dtype)
        return arranged_expert_ffn(x, matrices, adapter, experts, gates)
    gates = gates.to(x.dtype)
    if backend == "gathered" and many:
        return _gathered(x, w1, w2, adapter, experts, gates)
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    adapter = Adapter(*(None if part is None else part.to(x.dtype) for part in adapter))
    if backend == "reference" and w1.ndim == 3:
        return _loop_over_experts(x, w1, w2, adapter, experts, gates)
    if not many:
        rows = x.view(*w1.shape[:-3], -1, x.shape[1])
        own = Adapter(*(None if part is None else part.squeeze(w1.ndim - 3) for part in adapter))
        return gates * _dense(rows, w1.squeeze(-3), w2.squeeze(-3), own).view_as(x)
    return _sorted_by_expert(x, w1, w2, adapter, experts, gates)


def _dense(x: Tensor, w1: Tensor, w2: Tensor, adapter: Adapter) -> Tensor:
    """One expert on all of x: [N, D] with w1 [F, D], w2 [D, F] and an adapter's parts without their first dimension;
    or many experts at once, each on its own rows, where all of them have one more dimension in front."""
    if adapter.scale is not None and adapter.bias is not None:
        x = x * adapter.scale.unsqueeze(-2) + adapter.bias.unsqueeze(-2)
    hidden = x @ w1.mT
    if adapter.in_down is not None and adapter.in_up is not None:
        hidden = hidden + x @ adapter.in_down.mT @ adapter.in_up.mT
    hidden = F.relu(hidden).square()
    y = hidden @ w2.mT
    if adapter.out_down is not None and adapter.out_up is not None:
        y = y + hidden @ adapter.out_down.mT @ adapter.out_up.mT
    return y


def _of_expert(adapter: Adapter, expert: int) -> Adapter:
    return Adapter(*(None if part is None else part[expert] for part in adapter))


def _loop_over_experts(x: Tensor, w1: Tensor, w2: Tensor, adapter: Adapter, experts: Tensor, gates: Tensor) -> Tensor:
    """The definition: every expert on every token, the unchosen ones times zero."""
    y = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        gate = torch.where(experts == e, gates, 0.0).sum(dim=1, keepdim=True)
        y = y + gate * _dense(x, w1[e], w2[e], _of_expert(adapter, e))
    return y


def _gathered(x: Tensor, w1: Tensor, w2: Tensor, adapter: Adapter, experts: Tensor, gates: Tensor) -> Tensor:
    """A copy of its expert's matrices for each pick: the least work for a few tokens, and no wait for the device."""
    picked = experts.flatten()
    rows = x[:, None].expand(-1, experts.shape[1], -1).reshape(len(picked), 1, -1)
    w1, w2 = (w.index_select(0, picked).to(x.dtype) for w in (w1, w2))
    own = Adapter(*(None if part is None else part.index_select(0, picked).to(x.dtype) for part in adapter))
    y = _dense(rows, w1, w2, own)
    return (y.view(*experts.shape, -1) * gates[..., None]).sum(dim=1)


def _sorted_by_expert(x: Tensor, w1: Tensor, w2: Tensor, adapter: Adapter, experts: Tensor, gates: Tensor) -> Tensor:
    """Rows sorted by expert, so that each expert is one block of rows of a grouped matrix product."""
    count = w1.shape[0]
    plan = plan_rows(experts, count)
    rows = _Gather.apply(x, plan.token_of_row, plan.row_of_pick)
    if adapter.scale is not None and adapter.bias is not None:
        of_block = plan.block_is_of_expert.to(x.dtype)  # in a product, whose backward is a product too
        scale, bias = ((of_block @ part)[:, None] for part in (adapter.scale, adapter.bias))
        adapted = (rows.unflatten(0, (-1, ALIGN)) * scale + bias).flatten(0, 1)
        # For the backward: no gradient is computed of the rows behind the last expert's, so memory has anything there.
        rows = torch.where((plan.token_of_row < len(x))[:, None], adapted, 0.0)
    ends = plan.ends
    hidden = grouped_mm(rows, w1.mT, ends)
    if adapter.in_down is not None and adapter.in_up is not None:
        hidden = hidden + grouped_mm(grouped_mm(rows, adapter.in_down.mT, ends), adapter.in_up.mT, ends)
    hidden = F.relu(hidden).square()
    y = grouped_mm(hidden, w2.mT, ends)
    if adapter.out_down is not None and adapter.out_up is not None:
        y = y + grouped_mm(grouped_mm(hidden, adapter.out_down.mT, ends), adapter.out_up.mT, ends)
    picks = _Gather.apply(y, plan.row_of_pick.flatten(), plan.pick_of_row[:, None]).view(*experts.shape, -1)
    return (picks * gates[..., None]).sum(dim=1)


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [R, in] sorted by group, matrices [E, in, out], ends [E] int32: where each group ends. Returns [R, out]."""
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, matrices, offs=ends)
    return _opaque_grouped_mm(rows, matrices, ends)


# torch 2.13 multiplies float32 groups but refuses to trace them; as an operator of our own, the compiler need not look.
@torch.library.custom_op("switch_bank::grouped_mm", mutates_args=())
def _opaque_grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a [R, in] with b [E, in, out] gives [R, out]; a [in, R] with b [R, out] gives [E, in, out]."""
    return F.grouped_mm(a, b, offs=ends)


@_opaque_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2]) if b.ndim == 3 else a.new_empty(ends.shape[0], a.shape[0], b.shape[1])


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _opaque_backward(ctx, grad):  # type: ignore[no-untyped-def]
    rows, matrices, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return _opaque_grouped_mm(grad, matrices.mT, ends), _opaque_grouped_mm(rows.mT, grad, ends), None


_opaque_grouped_mm.register_autograd(_opaque_backward, setup_context=_save_for_backward)


class RowPlan(NamedTuple):
    """Where each pick, a (token, k) pair of N tokens and K picks, stands among R rows sorted by expert.

    An expert's rows are whole blocks of `align`. Rows that fill up its last block, and those behind the last expert's,
    belong to no pick: their index is one past the end.
    """

    row_of_pick: Tensor  # [N, K] int64
    pick_of_row: Tensor  # [R] int64, N·K where there is none
    token_of_row: Tensor  # [R] int64, N where there is none
    block_is_of_expert: Tensor  # [R / align, E] bool
    ends: Tensor  # [E] int32: one past the last row of each expert


# Rows of an expert, rounded up. On a CPU, oneDNN compiles a kernel for each new number of rows, which costs more than
# the product: multiples of 32 are few enough to be compiled once. CUDA's grouped_mm wants steps of 16 bytes.
ALIGN = 32


def plan_rows(experts: Tensor, count: int, align: int = ALIGN) -> RowPlan:
    """experts: [N, K] int64 in 0..count-1. All shapes are static: R = N·K + count·align, rounded down to align."""
    tokens, top_k = experts.shape
    picks = tokens * top_k
    size = (picks + count * align) // align * align
    # A GPU sorts by one byte of its keys after another, so they are as short as can be.
    keys = experts.flatten().to(torch.uint8 if count <= 256 else torch.int16)
    sorted_keys, pick = keys.sort(stable=True)
    sorted_experts = sorted_keys.long()
    bounds = torch.searchsorted(sorted_experts, torch.arange(count + 1, device=experts.device))  # in sorted picks
    rows = (bounds.diff() + align - 1) // align * align
    ends = rows.cumsum(0)
    starts = ends - rows
    row = (starts - bounds[:-1])[sorted_experts] + torch.arange(picks, device=experts.device)
    row_of_pick = torch.empty_like(pick).scatter_(0, pick, row)
    pick_of_row = pick.new_full((size,), picks).scatter_(0, row, pick)
    block = torch.arange(0, size, align, device=experts.device)[:, None]
    of_expert = (starts <= block) & (block < ends)
    return RowPlan(row_of_pick.view(tokens, top_k), pick_of_row, pick_of_row // top_k, of_expert, ends.int())


class _Gather(torch.autograd.Function):
    """Row r of the result is x[source[r]], or zeros where source[r] is one past the end.

    back: [rows of x, M], the rows of the result that came from each row of x (one past the end: none), so that the
    backward is a gather too, and a sum over M, instead of a scatter with additions.
    """

    @staticmethod
    def forward(ctx, x, source, back):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(back)
        return _take(x, source)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (back,) = ctx.saved_tensors
        return _take(grad, back.flatten()).unflatten(0, back.shape).sum(dim=1), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] with zeros where the index is one past the end."""
    inside = index < x.shape[0]
    return torch.where(inside[:, None], x[index.clamp(max=x.shape[0] - 1)], 0.0)
