"""The softly capped head and its cross-entropy, without the logits of all tokens at once."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_bank.ops import head_cpu

CAP = 15.0  # of the logits' magnitude
CHUNK_LOGITS = 2**28  # that are held at a time, at most: 512 MB of bfloat16
BLOCK = 128  # tokens: divides every slice
IGNORE = -100  # target that no loss is taken of


def soft_cap(z: Tensor) -> Tensor:
    """Smoothly within ±CAP: 15·z / sqrt(z² + 225)."""
    return CAP * z * torch.rsqrt(z.square() + CAP**2)


def head_losses(x: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The reference of `chunked_head_losses`, with all logits at once."""
    logits = soft_cap(F.linear(x, head.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32)))
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    return losses.sum(), losses.detach()


def chunked_head_losses(x: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """x: [N, D]; head: [V, D] or, per microbatch, [M, V, D], cast to x's dtype; targets: [N] int64 in 0..V-1, or
    IGNORE.

    Returns the sum of the cross-entropies over the targets (0-dim) and each of them [N], 0 where ignored, both float32
    (float64 for float64); only the sum has a gradient. A few tokens' logits are held at a time: the gradient, but for
    the factor that the sum's own gradient is, is computed with them in the forward. Float32 on a CPU goes through
    `head_cpu`, where that runs.
    """
    return _ChunkedLosses.apply(x, head, targets)


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, head, targets):  # type: ignore[no-untyped-def]
        gradients = any(ctx.needs_input_grad[:2])
        if head_cpu.takes(x):
            weight, microbatches = (head, 1) if head.ndim == 2 else (head[0], len(head))
            losses, x_gradient, head_gradient = head_cpu.losses_and_gradients(
                x, weight, targets, microbatches, CAP, IGNORE, gradients
            )
        else:
            losses, x_gradient, head_gradient = _in_chunks(x, head, targets, gradients)
        ctx.mark_non_differentiable(losses)
        if gradients:
            ctx.save_for_backward(x_gradient, head_gradient.view(head.shape))
        # In float64, so that the sum does not depend on its order, which threads change.
        return losses.sum(dtype=torch.float64).to(losses.dtype), losses

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        x_gradient, head_gradient = ctx.saved_tensors
        return (x_gradient * grad).to(x_gradient.dtype), head_gradient * grad, None


def _in_chunks(x: Tensor, head: Tensor, targets: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, and the gradients of their sum, where asked for, else nothing, as `head_cpu` has them."""
    microbatches = 1 if head.ndim == 2 else len(head)
    together, chunks = _chunks(len(x) // microbatches, microbatches, head.shape[-2])
    weight = (head if head.ndim == 2 else head[0]).to(x.dtype)
    losses, x_gradients, head_gradients = [], [], []
    groups = microbatches // together
    for x_of_group, targets_of_group in zip(x.chunk(groups), targets.chunk(groups), strict=True):
        of_chunks = zip(x_of_group.chunk(chunks), targets_of_group.chunk(chunks), strict=True)
        for chunk, (some_x, some_targets) in enumerate(of_chunks):
            some_losses, z_gradient = _losses_and_gradient(some_x, weight, some_targets)
            losses.append(some_losses)
            if gradients:
                x_gradients.append(z_gradient @ weight)
                if head.ndim == 3:
                    some_x, z_gradient = (rows.unflatten(0, (together, -1)) for rows in (some_x, z_gradient))
                of_chunk = (z_gradient.mT @ some_x).to(head.dtype)
                if chunk == 0:
                    head_gradients.append(of_chunk)
                else:
                    head_gradients[-1] = head_gradients[-1] + of_chunk
    if not gradients:
        return torch.cat(losses), x[:0], head[:0]
    head_gradient = torch.cat(head_gradients) if groups > 1 else head_gradients[0]  # to cat one would copy it
    return torch.cat(losses), torch.cat(x_gradients), head_gradient


def _chunks(tokens: int, microbatches: int, vocab: int) -> tuple[int, int]:
    """How many microbatches of `tokens` tokens go through together, and, where not even one fits, in how many chunks:
    that depends on the microbatch alone, as the order of its sums does."""
    fewest = math.ceil(tokens * vocab / CHUNK_LOGITS)
    if fewest == 1:
        most = CHUNK_LOGITS // (tokens * vocab)
        return max(n for n in range(1, microbatches + 1) if microbatches % n == 0 and n <= most), 1
    # Equal and of whole blocks, where at most twice as many chunks are: each size is compiled by itself, and for a
    # GPU, sizes that no 8 divides may be padded.
    even = [chunks for chunks in range(fewest, 2 * fewest + 1) if tokens % (BLOCK * chunks) == 0]
    return 1, even[0] if even else fewest


def _losses_and_gradient(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of some tokens: their losses [n], and the gradient of the losses' sum with respect to z = x·weightᵀ [n, V]."""
    z = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(z.square() + CAP**2)
    logits = CAP * z * inverse
    counted = targets != IGNORE
    target = torch.where(counted, targets, 0)[:, None]
    # Within ±CAP the exponentials need no maximum taken out, which would be one more pass over all logits.
    log_sum = logits.exp().sum(-1, keepdim=True).log()
    losses = torch.where(counted, (log_sum - logits.gather(-1, target))[:, 0], 0.0)
    is_target = torch.arange(len(weight), device=x.device) == target
    gradient = ((logits - log_sum).exp() - is_target.to(z.dtype)) * (CAP**3 * inverse**3)
    return losses, torch.where(counted[:, None], gradient, 0.0).to(x.dtype)
