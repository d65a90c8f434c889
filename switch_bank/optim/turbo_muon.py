"""TurboMuon: Muon for stacked matrices, orthogonalized in one batch per shape and split over the processes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from switch_bank.distributed import wait_for
from switch_bank.ops.orthogonalize import Variant, orthogonalize


class TurboMuon(torch.optim.Optimizer):
    """Muon (momentum, then orthogonalization), every trailing (out, in) matrix of a parameter being its own matrix.

    params: float32 tensors [..., out, in], or param groups of them; lr, momentum and nesterov may differ by group and
    are read anew every step. variant: see `switch_bank.ops.orthogonalize`. dtype: what the orthogonalization runs in.
    process_group: whose processes share the work, all of them if None; they must hold the same gradients, and end every
    step with the same weights. orthogonalize: (matrices [n, rows, cols], variant) -> the same shape and dtype, zero for
    zero; the place for a compiled form.

    Each matrix moves by -lr · sqrt(max(1, out/in)) · orthogonalize(Nesterov momentum), without weight decay. A matrix
    whose gradient is zero throughout stays where it is and keeps its momentum, as does a parameter without a gradient.
    Boissin et al., arXiv 2512.04632; with variant "plain", `torch.optim.Muon` for any number of leading dimensions.
    Raises ValueError for a parameter that is not float32 or has fewer than two dimensions.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        variant: Variant = "turbo",
        dtype: torch.dtype = torch.bfloat16,
        process_group: dist.ProcessGroup | None = None,
        orthogonalize: Callable[[Tensor, Variant], Tensor] = orthogonalize,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov})
        self.variant: Variant = variant
        self.dtype = dtype
        self.process_group = process_group
        self.orthogonalize = orthogonalize
        self.started: list[_Started] = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim < 2 or param.dtype != torch.float32:
                    raise ValueError(
                        f"TurboMuon takes float32 parameters [..., out, in], got {param.dtype} of shape "
                        f"{tuple(param.shape)}; give this one to AdamW or keep it in float32"
                    )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. With several processes, all of them must call this together."""
        self.start_step()
        self.finish_step()

    @torch.no_grad()
    def start_step(self) -> None:
        """The first part of `step`: orthogonalize, and begin to exchange the results. Parameters stay as they are, so
        that other work, such as the step of another optimizer, goes on meanwhile."""
        by_shape: dict[tuple[int, int], list[_Direction]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                rows, cols = param.shape[-2:]
                direction = self._momentum_direction(param, group["momentum"], group["nesterov"])
                step_size = group["lr"] * math.sqrt(max(1, rows / cols))
                matrices = direction.to(self.dtype).reshape(-1, rows, cols)
                by_shape.setdefault((rows, cols), []).append(_Direction(param, matrices, step_size))
        for directions in by_shape.values():
            updates, exchange = self._orthogonalize_shared([direction.matrices for direction in directions])
            steps = [(direction.param, direction.step_size) for direction in directions]
            self.started.append(_Started(steps, updates, exchange))

    @torch.no_grad()
    def finish_step(self) -> None:
        """The rest of `step`: wait for the results, and update."""
        for steps, updates, exchange in self.started:
            if exchange is not None:
                wait_for(exchange)
            counts = [param.shape[:-2].numel() for param, _ in steps]
            for (param, step_size), update in zip(steps, updates[: sum(counts)].split(counts), strict=True):
                param.add_(update.reshape(param.shape), alpha=-step_size)
        self.started.clear()

    def _momentum_direction(self, param: Tensor, momentum: float, nesterov: bool) -> Tensor:
        """Advance the momentum of matrices with a gradient. Returns what to orthogonalize, 0 for other matrices."""
        grad = param.grad
        assert grad is not None
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer = state["momentum_buffer"]
        # As factors of 0 and 1 rather than by selection: one pass over the memory less for each.
        active = grad.abs().amax(dim=(-2, -1), keepdim=True).ne(0).to(grad.dtype)
        buffer.lerp_(grad, (1 - momentum) * active)
        return torch.lerp(grad, buffer, momentum).mul_(active) if nesterov else buffer * active

    def _orthogonalize_shared(self, matrices: list[Tensor]) -> tuple[Tensor, dist.Work | None]:
        """Orthogonalize a list of [n_i, rows, cols] as one batch, each process its share.

        Returns [at least Σ n_i, rows, cols], and what to wait for before reading it. Zero matrices fill the batch up to
        a multiple of the number of processes.
        """
        processes = dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1
        count = sum(part.size(0) for part in matrices)
        padding = matrices[0].new_zeros(-count % processes, *matrices[0].shape[1:])
        batch = torch.cat([*matrices, padding]) if len(matrices) > 1 or len(padding) else matrices[0]
        if processes == 1:
            return self.orthogonalize(batch, self.variant), None
        shares = list(batch.chunk(processes))  # views: what the others send is written into the batch
        mine = self.orthogonalize(shares[dist.get_rank(self.process_group)], self.variant)
        return batch, dist.all_gather(shares, mine, group=self.process_group, async_op=True)


class _Direction(NamedTuple):
    """A parameter, its matrices to orthogonalize [n, rows, cols], and the factor of the resulting update."""

    param: Tensor
    matrices: Tensor
    step_size: float


class _Started(NamedTuple):
    """The parameters of one shape with the factors of their updates, and the updates [at least Σ n, rows, cols], once
    the exchange is done."""

    steps: list[tuple[Tensor, float]]
    updates: Tensor
    exchange: dist.Work | None
