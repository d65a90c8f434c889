"""What a run reports of its routers: metrics.jsonl lines of kind `routing`, and router health."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from switch_bank.balance.statistics import STARVED, Floats, fair_multiples, jensen_shannon_distance, spread
from switch_bank.model.router import Routers, RoutingSums


class Health(NamedTuple):
    """Router health over the whole bank: 0, collapsed, to 1, every expert works; the geometric mean of its parts."""

    health: float
    evenness: float  # 1 - entropy gap of the picks that the active experts get, summed over the layers
    usage: float  # share of the active experts with at least STARVED of their fair load
    headroom: float  # 1 - share of the routers' logits that are cut off at the cap, where no gradient passes


def router_health(counts: Floats, at_cap: Floats) -> Health:
    """counts: [L, A], how often each layer picked each active expert; at_cap: [L], share of its logits at the cap."""
    bank = counts.sum(0)
    evenness = float(1 - spread(bank).entropy_gap)
    usage = float((fair_multiples(bank) >= STARVED).mean())
    headroom = float(1 - at_cap.mean())
    return Health((evenness * usage * headroom) ** (1 / 3), evenness, usage, headroom)


class RoutingMetrics:
    """Turns routing sums into records, each of which says how far the load moved since the one before of its split."""

    def __init__(self) -> None:
        self.loads: dict[str, Tensor] = {}  # [L, E] of the last record, by split

    def record(self, split: str, step: int, sums: RoutingSums, active: Tensor, routers: Routers) -> dict[str, Any]:
        """The line's values; lists run over the layers, and within them over all experts, active or not.

        split: "train" (the sums of one step) or "val" (of a whole validation). active: [E] bool. Waits for the device.
        """
        parts = {name: part.double().cpu().numpy() for name, part in sums._asdict().items()}
        experts = active.cpu().numpy().nonzero()[0]
        tokens = parts["load"].sum(-1)
        counts, at_cap = parts["counts"][:, experts], parts["at_cap"] / tokens
        record: dict[str, Any] = {"split": split, "step": step, "active": experts.tolist()}
        record["counts"] = parts["counts"].astype(np.int64).tolist()
        for name in ("load", "importance"):
            own = spread(parts[name][:, experts])
            share = parts[name] / parts[name].sum(-1, keepdims=True)
            record |= {name: share.round(6).tolist(), f"{name}_cv": own.cv.tolist()}
            record |= {f"{name}_entropy": own.entropy.tolist(), f"{name}_entropy_gap": own.entropy_gap.tolist()}
        picked = spread(counts)
        # JSON has no infinity: null where an active expert was never picked.
        record["max_min"] = [value if np.isfinite(value) else None for value in picked.max_min.tolist()]
        record["usage"] = picked.usage.tolist()
        record["top_probability"] = (parts["top_probability"] / tokens).tolist()
        record["at_cap"] = at_cap.tolist()
        record["feature_share"] = {name: share.tolist() for name, share in routers.feature_shares().items()}
        if split == "train" and routers.weight.grad is not None:
            record["gradient_norm"] = torch.linalg.vector_norm(routers.weight.grad, dim=(1, 2)).tolist()
        before = self.loads.get(split)
        drift = None if before is None else jensen_shannon_distance(parts["load"], before.cpu().numpy()).tolist()
        self.loads[split] = sums.load.detach().clone()
        health = router_health(counts, at_cap)._asdict()
        return record | {"drift": drift, "health": health.pop("health"), "health_parts": health}
