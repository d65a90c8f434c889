"""The bank's feed-forward on a CPU with AVX2 or AVX-512: bank_cpu.cpp, compiled once, and its gradients."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from switch_bank.ops import cpu_kernels
from switch_bank.ops.arranged import Arranged, GradientSums, collect

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32,) * cpu_kernels.RUN + (torch.bfloat16,) * cpu_kernels.BF16  # that the kernel multiplies


def takes(dtype: torch.dtype) -> bool:
    """Whether the kernel runs here for activations of `dtype`. A CPU without units for bfloat16 multiplies its numbers
    in float32, which holds their products whole."""
    return cpu_kernels.RUN and dtype in (torch.float32, torch.bfloat16)


def arrange(w1: Tensor, w2: Tensor, dtype: torch.dtype, microbatches: int | None = None) -> Arranged:
    """w1: [E, F, D] and w2: [E, D, F] float32, D and F even; dtype: float32 or bfloat16. microbatches: see
    `ops.microbatches`; gradients are float64 then where the `grad_dtype` of w1 and w2 allows that."""
    _load()
    sums = GradientSums(w1.detach(), w2.detach(), microbatches)
    multiplied = dtype if dtype in DTYPES else torch.float32
    w1_forward, w1_backward = torch.ops.switch_bank.bank_arrange(w1.detach(), multiplied)
    w2_forward, w2_backward = torch.ops.switch_bank.bank_arrange(w2.detach(), multiplied)
    link = collect(w1, w2, sums)
    return Arranged("cpu", w1_forward, w1_backward, w2_forward, w2_backward, link, sums, slice(0, len(w1)))


def expert_ffn(
    x: Tensor, matrices: Arranged, scale: Tensor | None, bias: Tensor | None, experts: Tensor, gates: Tensor
) -> Tensor:
    """`ops.bank.expert_ffn` without LoRA: x [N, D] of the dtype that the matrices are arranged for; scale and bias
    [E, D] float32 or, per microbatch, [M, E, D], or None; experts [N, K] int64; gates [N, K]. Returns [N, D]."""
    if scale is None or bias is None:
        scale = bias = x.new_empty(0, dtype=torch.float32)
    rows, experts = x.to(matrices.w1.dtype).contiguous(), experts.contiguous()
    gates, scale, bias = (part.float().contiguous() for part in (gates, scale, bias))
    if torch.is_grad_enabled():
        y = _ExpertFfn.apply(rows, gates, scale, bias, matrices.link, experts, matrices)
    else:
        own = matrices.w1, matrices.w2, matrices.sums.microbatches
        y = torch.ops.switch_bank.bank_forward(rows, experts, gates, scale, bias, *own, False)[0]
    return y.to(x.dtype)


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gates, scale, bias, link, experts, matrices):  # type: ignore[no-untyped-def]
        own = matrices.w1, matrices.w2, matrices.sums.microbatches
        y, kept = torch.ops.switch_bank.bank_forward(x, experts, gates, scale, bias, *own, True)
        ctx.save_for_backward(x, experts, gates, scale, bias, matrices.w1_backward, matrices.w2_backward, kept)
        ctx.sums, ctx.experts = matrices.sums, matrices.experts
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_x, grad_gates, grad_scale, grad_bias = torch.ops.switch_bank.bank_backward(
            grad.contiguous(), *ctx.saved_tensors, ctx.sums.microbatches, *ctx.sums.get(ctx.experts)
        )
        return grad_x, grad_gates, grad_scale, grad_bias, grad.new_zeros((), dtype=torch.float32), None, None


@functools.cache
def _load() -> None:
    cpu_kernels.load(SOURCE, advice="--model.bank-backend grouped does without it")
    _register_shapes()


def _register_shapes() -> None:
    """The shapes of the results, for tensors that are not computed."""

    @torch.library.register_fake("switch_bank::bank_arrange")
    def _(weights, dtype):  # type: ignore[no-untyped-def]
        experts, rows, columns = weights.shape
        return tuple(weights.new_empty(experts, *shape, dtype=dtype) for shape in ((columns, rows), (rows, columns)))

    @torch.library.register_fake("switch_bank::bank_forward")
    def _(x, experts, gates, scale, bias, w1, w2, microbatches, keep):  # type: ignore[no-untyped-def]
        return torch.empty_like(x), x.new_empty(experts.numel() if keep else 0, w1.shape[2])

    @torch.library.register_fake("switch_bank::bank_backward")
    def _(grad_y, x, experts, gates, scale, bias, w1, w2, kept, microbatches, grad_w1, grad_w2):  # type: ignore[no-untyped-def]
        return tuple(torch.empty_like(like) for like in (x, gates, scale, bias))
