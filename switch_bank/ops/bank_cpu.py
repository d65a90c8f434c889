"""The bank's feed-forward on a CPU with AVX-512: the kernel of bank_cpu.cpp, compiled once, and its gradients."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from switch_bank.ops import cpu_kernels

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32,) * cpu_kernels.AVX512 + (torch.bfloat16,) * cpu_kernels.AVX512_BF16


class GradientSums:
    """The gradients of w1 and w2, to which each layer's backward adds its own: all in float32, or, for microbatches, in
    float64 what is summed in float32 over the rows of one."""

    def __init__(self, w1: Tensor, w2: Tensor, microbatches: int | None) -> None:
        self.microbatches = microbatches or 1
        self._dtype = torch.float32 if microbatches is None else torch.float64
        self._like = (w1, w2)
        self._sums: tuple[Tensor, Tensor] | None = None

    def get(self, experts: slice) -> tuple[Tensor, Tensor]:
        """Those of some of the experts, to be added to."""
        if self._sums is None:
            w1, w2 = self._like
            self._sums = torch.zeros_like(w1, dtype=self._dtype), torch.zeros_like(w2, dtype=self._dtype)
        return self._sums[0][experts], self._sums[1][experts]

    def take(self) -> tuple[Tensor, Tensor]:
        """The sums; the next backward begins with zeros."""
        sums, self._sums = self.get(slice(None)), None
        return sums


class Arranged(NamedTuple):
    """Expert matrices in the activations' dtype, as the products read them: once for all layers that share them."""

    w1: Tensor  # [E, D, F], each expert's numbers in the order that bank_cpu.cpp tells; so are all four
    w1_backward: Tensor  # [E, F, D]
    w2: Tensor  # [E, F, D]
    w2_backward: Tensor  # [E, D, F]
    link: Tensor  # 0-dim: by it the backward knows that all layers have added their gradients
    sums: GradientSums
    experts: slice  # of `sums`

    def chunk(self, sets: int) -> "list[Arranged]":
        """The experts in `sets` equal sets, for layers with experts of their own."""
        count = len(self.w1) // sets
        own = [slice(first, first + count) for first in range(0, len(self.w1), count)]
        return [
            Arranged(
                self.w1[some], self.w1_backward[some], self.w2[some], self.w2_backward[some], self.link, self.sums, some
            )
            for some in own
        ]  # fmt: skip


def arrange(w1: Tensor, w2: Tensor, dtype: torch.dtype, microbatches: int | None = None) -> Arranged:
    """w1: [E, F, D] and w2: [E, D, F] float32, D and F even; dtype: float32 or bfloat16. microbatches: see
    `ops.microbatches`; gradients are float64 then where the `grad_dtype` of w1 and w2 allows that."""
    _load()
    sums = GradientSums(w1.detach(), w2.detach(), microbatches)
    w1_forward, w1_backward = torch.ops.switch_bank.bank_arrange(w1.detach(), dtype)
    w2_forward, w2_backward = torch.ops.switch_bank.bank_arrange(w2.detach(), dtype)
    link = _Collect.apply(w2, w1, sums)  # a backward hands over their gradients in this order
    return Arranged(w1_forward, w1_backward, w2_forward, w2_backward, link, sums, slice(0, len(w1)))


def expert_ffn(
    x: Tensor, matrices: Arranged, scale: Tensor | None, bias: Tensor | None, experts: Tensor, gates: Tensor
) -> Tensor:
    """`ops.bank.expert_ffn` without LoRA: x [N, D] of the matrices' dtype; scale and bias [E, D] float32 or, per
    microbatch, [M, E, D], or None; experts [N, K] int64; gates [N, K]. Returns [N, D]."""
    if scale is None or bias is None:
        scale = bias = x.new_empty(0, dtype=torch.float32)
    x, gates, experts = x.contiguous(), gates.float().contiguous(), experts.contiguous()
    scale, bias = scale.float().contiguous(), bias.float().contiguous()
    if torch.is_grad_enabled():
        return _ExpertFfn.apply(x, gates, scale, bias, matrices.link, experts, matrices)
    own = matrices.w1, matrices.w2, matrices.sums.microbatches
    return torch.ops.switch_bank.bank_forward(x, experts, gates, scale, bias, *own, False)[0]


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w2, w1, sums):  # type: ignore[no-untyped-def]
        ctx.sums = sums
        return w1.new_zeros(())

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        grad_w1, grad_w2 = ctx.sums.take()
        return grad_w2, grad_w1, None


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
    cpu_kernels.load(SOURCE, instead="--model.bank-backend grouped")
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
