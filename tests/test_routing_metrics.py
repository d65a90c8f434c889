"""Routing metrics: what a record says of a layer's routes, and health that ranks runs as a reader would."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switch_bank.config import ModelConfig
from switch_bank.model.router import Routers, RoutingSums
from switch_bank.routing_metrics import RoutingMetrics, router_health

CONFIG = ModelConfig(layers=2, width=16, heads=2, skip_attention=(), value_embeddings=0, experts=4, forward_ema=True)


def sums_of(counts: list[list[float]], at_cap: float = 0.0) -> RoutingSums:
    """One expert a token, whose probability is 0.7; the other experts share the rest."""
    load = torch.tensor(counts)
    tokens = load.sum(-1)
    importance = 0.7 * load + 0.1 * (tokens[:, None] - load)
    return RoutingSums(load, load, importance, 0.7 * tokens, at_cap * tokens)


def test_a_record_holds_what_a_reader_would_compute_from_the_counts() -> None:
    routers, metrics = Routers(CONFIG), RoutingMetrics()
    active = torch.tensor([True, True, False, True])
    record = metrics.record("val", 7, sums_of([[10.0, 20, 0, 30], [60.0, 0, 0, 0]], at_cap=0.25), active, routers)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["split"], record["step"], record["active"]) == ("val", 7, [0, 1, 3])
    assert record["counts"] == [[10, 20, 0, 30], [60, 0, 0, 0]]
    assert record["load"][0] == pytest.approx([1 / 6, 1 / 3, 0, 1 / 2], abs=1e-6)
    assert record["load_cv"] == pytest.approx([np.std([10, 20, 30]) / 20, np.std([60, 0, 0]) / 20])
    assert record["max_min"] == [3.0, None] and record["usage"] == pytest.approx([1, 1 / 3])
    assert record["load_entropy_gap"][1] == pytest.approx(1) and record["importance_entropy_gap"][1] < 0.5
    assert record["top_probability"] == pytest.approx([0.7, 0.7]) and record["at_cap"] == pytest.approx([0.25, 0.25])
    assert record["drift"] is None and "gradient_norm" not in record


def test_drift_is_the_distance_to_the_record_before_of_the_same_split() -> None:
    routers, metrics, active = Routers(CONFIG), RoutingMetrics(), torch.ones(4, dtype=torch.bool)
    first, second = sums_of([[60.0, 0, 0, 0], [15.0, 15, 15, 15]]), sums_of([[0.0, 0, 0, 60], [15.0, 15, 15, 15]])
    assert metrics.record("train", 1, first, active, routers)["drift"] is None
    assert metrics.record("val", 1, second, active, routers)["drift"] is None
    assert metrics.record("train", 2, second, active, routers)["drift"] == pytest.approx([1.0, 0.0], abs=1e-9)


def test_each_kind_of_input_has_its_share_of_the_weights() -> None:
    routers = Routers(CONFIG)
    with torch.no_grad():
        routers.weight.zero_()
        routers.weight[0, 0, 3], routers.weight[0, 1, 16], routers.weight[0, 1, 40] = 1.0, 2.0, 2.0
        routers.weight[1, 2, 48] = 0.1
    shares = {name: share.tolist() for name, share in routers.feature_shares().items()}
    assert list(shares) == ["token", "forward_ema", "reverse_ema", "flags"]
    assert [shares[name][0] for name in shares] == pytest.approx([1 / 9, 4 / 9, 4 / 9, 0])
    assert [shares[name][1] for name in shares] == pytest.approx([0, 0, 0, 1])
    alone = Routers(replace(CONFIG, forward_ema=False, reverse_ema="off", flags=False))
    assert alone.feature_shares()["token"].tolist() == pytest.approx([1, 1]) and len(alone.feature_shares()) == 1


def test_the_gradient_norm_is_that_of_each_layers_router() -> None:
    routers, active = Routers(CONFIG), torch.ones(4, dtype=torch.bool)
    routers.weight.grad = torch.zeros_like(routers.weight)
    routers.weight.grad[1, 0, :4] = 0.5
    record = RoutingMetrics().record("train", 1, sums_of([[15.0] * 4] * 2), active, routers)
    assert record["gradient_norm"] == pytest.approx([0.0, 1.0])


def test_health_ranks_a_collapsed_a_starved_and_a_good_run() -> None:
    free = np.zeros(2)
    collapsed = router_health(np.array([[100.0, 0, 0, 0], [100.0, 0, 0, 0]]), free)
    starved = router_health(np.array([[50.0, 45, 5, 0], [60.0, 38, 1, 1]]), free)
    good = router_health(np.array([[30.0, 25, 25, 20], [22.0, 28, 25, 25]]), free)
    assert collapsed.health == 0 and 0.3 < starved.health < 0.9 < good.health <= 1
    assert router_health(np.array([[30.0, 25, 25, 20]]), np.ones(1)).health == 0  # routers at the cap cannot learn
    # Layers that share the bank's experts out among themselves use all of it.
    assert router_health(np.array([[50.0, 50, 0, 0], [0.0, 0, 50, 50]]), free).health == pytest.approx(1)


@given(
    counts=st.lists(st.lists(st.integers(1, 1000), min_size=3, max_size=3), min_size=1, max_size=4), cap=st.floats(0, 1)
)
def test_health_and_its_parts_lie_between_0_and_1(counts: list[list[int]], cap: float) -> None:
    assert all(-1e-12 <= part <= 1 + 1e-12 for part in router_health(np.array(counts, float), np.array([cap])))
