"""Validation loss over the first N tokens of the validation split, the same ones at every report."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from switch_bank.distributed import summed
from switch_bank.model.gpt import Output
from switch_bank.model.router import RoutingSums
from switch_bank.ops.head import IGNORE
from switch_bank.schedules import StepState


class Validation(NamedTuple):
    loss: float  # nats per token
    tokens: int
    routing: RoutingSums  # float64 on the CPU


@torch.no_grad()
def validate(
    forward: Callable[..., Output], batches: Iterable[tuple[Tensor, Tensor]], state: StepState, window: int | None
) -> Validation:
    """Runs this process's batches of `data.validation_batches` through an eval-mode model; every process gets the
    result over all of them. Sums are float64, so that their split over processes does not show."""
    sums: list[Tensor] = []
    for inputs, targets in batches:
        output = forward(inputs, targets, state, window=window)
        batch = [output.token_losses.double().sum(), (targets != IGNORE).sum(), output.routing.flat().double()]
        sums = [old + new for old, new in zip(sums, batch, strict=True)] if sums else batch
    loss_sum, token_count, routing = sums
    tokens = int(summed(token_count))
    layers, experts = output.routing.counts.shape
    of_all = RoutingSums.from_flat(summed(routing).cpu(), layers, experts)
    return Validation(float(summed(loss_sum)) / tokens, tokens, of_all)


def least_share(pick_counts: Tensor, active: Tensor) -> float:
    """The picks of the least used of the active [E] bool experts over the whole bank, as a share of an even share."""
    counts = pick_counts.sum(0)[active.cpu()]
    return float(counts.min() * len(counts) / counts.sum()) if counts.sum() > 0 else 1.0
