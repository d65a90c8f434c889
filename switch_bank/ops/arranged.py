"""What kernels prepare once for all layers that share a bank: its matrices, and the sums of their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    """Expert matrices in the activations' dtype, as the products read them: once for all layers that share them. The
    numbers of each expert are in the order that its kernels tell."""

    backend: str  # whose kernels read them
    w1: Tensor  # E experts; so have all four
    w1_backward: Tensor
    w2: Tensor
    w2_backward: Tensor
    link: Tensor  # 0-dim: by it the backward knows that all layers have added their gradients
    sums: GradientSums
    experts: slice  # of `sums`

    def chunk(self, sets: int) -> "list[Arranged]":
        """The experts in `sets` equal sets, for layers with experts of their own."""
        count = len(self.w1) // sets
        own = [slice(first, first + count) for first in range(0, len(self.w1), count)]
        return [
            Arranged(
                self.backend, self.w1[some], self.w1_backward[some], self.w2[some], self.w2_backward[some], self.link,
                self.sums, some,
            )
            for some in own
        ]  # fmt: skip


def collect(w1: Tensor, w2: Tensor, sums: GradientSums) -> Tensor:
    """The `link` of an Arranged: when its own gradient comes, w1 and w2 get theirs from `sums`."""
    return _Collect.apply(w2, w1, sums)  # a backward hands over their gradients in this order


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w2, w1, sums):  # type: ignore[no-untyped-def]
        ctx.sums = sums
        return w1.new_zeros(())

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        grad_w1, grad_w2 = ctx.sums.take()
        return grad_w2, grad_w1, None
