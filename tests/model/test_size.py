"""The size table: every parameter counted once, and what of them works on a token."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from switch_bank.config import ModelConfig, presets
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.model.size import Part, forward_flops, mean_visible_keys, parts, size_table

VARIANTS: list[dict[str, Any]] = [
    {}, dict(top_k=2), dict(always_on_expert=True, adapter="lora"), dict(shared=False, adapter="none"),
    dict(experts=1), dict(tied_layers=2, value_embeddings=0), dict(skip_attention=(0, 2)),
]  # fmt: skip


def on_meta(config: ModelConfig) -> SwitchBankGPT:
    with torch.device("meta"):
        return SwitchBankGPT(config)


def parts_of(config: ModelConfig) -> dict[str, Part]:
    return {part.name: part for part in parts(on_meta(config))}


@pytest.mark.parametrize("preset", list(presets))
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_totals_are_the_parameters_each_once(preset: str, options: dict[str, Any]) -> None:
    model = on_meta(replace(presets[preset].model, **options))
    rows = parts(model)
    assert sum(row.total for row in rows) == sum(parameter.numel() for parameter in model.parameters())
    assert len({row.name for row in rows}) == len(rows) and all(row.active >= 0 for row in rows)


def test_the_record_model_has_the_published_parts() -> None:
    rows = parts_of(presets["record"].model)
    assert sum(row.total for row in rows.values()) == 282_395_148
    width = 896
    totals = {
        "token embedding": 50_304 * width, "value embeddings": 2 * 50_257 * width, "head": 50_304 * width,
        "attention": 27 * 4 * width**2, "experts": 8 * 2 * width * 1024, "adapters": 28 * 8 * 2 * width,
        "routers": 28 * 8 * (2 * width + 11 + 1), "scalars": 28 * 5,
    }  # fmt: skip
    assert {name: row.total for name, row in rows.items()} == totals


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_active_are_a_tokens_rows_and_picks_each_as_often_as_it_is_used(top_k: int, shared: bool) -> None:
    config = replace(presets["record"].model, top_k=top_k, shared=shared)
    rows, width = parts_of(config), 896
    active = {
        "token embedding": width,
        "value embeddings": 4 * width,  # two tables, each in one of the first and one of the last layers
        "head": 50_304 * width,
        "attention": 27 * 4 * width**2,
        "experts": 28 * top_k * 2 * width * 1024,  # a shared expert works in each layer anew
        "adapters": 28 * top_k * 2 * width,
        "routers": 28 * 8 * (2 * width + 11 + 1),
        "scalars": 28 * 5,
    }
    assert {name: row.active for name, row in rows.items()} == active


def test_more_experts_than_one_are_not_more_active_and_the_dense_model_uses_all_of_its_one() -> None:
    nano = presets["nano"].model
    dense, eight, many = (parts_of(replace(nano, experts=count)) for count in (1, 8, 64))
    assert dense["routers"] == Part("routers", 0, 0)
    assert dense["experts"].active == eight["experts"].active == many["experts"].active == 4 * 2 * 128 * 256
    assert dense["experts"].total == 2 * 128 * 256 and many["experts"].total == 64 * 2 * 128 * 256
    assert dense["adapters"].active == dense["adapters"].total == eight["adapters"].active
    always_on = parts_of(replace(nano, always_on_expert=True))
    assert always_on["experts"].active == 2 * dense["experts"].active


def test_matrices_that_layers_share_are_active_in_each_of_them() -> None:
    nano = presets["nano"].model
    own, tied = parts_of(nano)["attention"], parts_of(replace(nano, tied_layers=2))["attention"]
    assert own == Part("attention", 4 * 4 * 128**2, 4 * 4 * 128**2)
    assert tied == Part("attention", own.total // 2, own.active)
    # A layer without attention reads no value embedding either: of four uses two are left.
    skipping = parts_of(replace(nano, value_embeddings=2, skip_attention=(0, 2)))
    assert skipping["value embeddings"].active == 2 * 128 and skipping["attention"].active == own.active // 2


@pytest.mark.parametrize("slice_tokens", [64, 128, 200, 256, 1000])
@pytest.mark.parametrize("skip", [(), (3,), (0, 1, 2, 3)])
def test_visible_keys_are_counted_query_by_query(slice_tokens: int, skip: tuple[int, ...]) -> None:
    config = replace(presets["nano"].model, window=300, skip_attention=skip)
    windows = [300 if layer == 3 else 150 for layer in range(4) if layer not in skip]
    seen = [min(t + 1, window) for window in windows for t in range(slice_tokens)]
    expected = sum(seen) / len(seen) if seen else 0
    assert mean_visible_keys(config, slice_tokens) == pytest.approx(expected)


def test_flops_are_two_for_each_active_weight_of_a_matrix_and_two_products_for_each_visible_key() -> None:
    config = replace(presets["nano"].model, skip_attention=(1,))
    rows = parts_of(config)
    weights = sum(rows[name].active for name in ("attention", "experts", "adapters", "routers", "head"))
    assert forward_flops(config, list(rows.values()), 0) == 2 * weights
    of_keys = forward_flops(config, list(rows.values()), 100) - 2 * weights
    assert of_keys == 3 * 100 * 2 * (2 * config.width)  # in each of three layers, q·k and weight·v


def test_the_table_ends_with_the_sums() -> None:
    config = presets["record"].model
    lines = size_table(on_meta(config), 12_288).splitlines()
    assert lines[0].split() == ["part", "parameters", "active"] and len({len(line) for line in lines[:-1]}) == 1
    assert lines[-2].split()[:2] == ["total", "282,395,148"]
    rows = parts_of(config)
    flops = 3 * forward_flops(config, list(rows.values()), mean_visible_keys(config, 12_288))
    assert lines[-1].startswith(f"training FLOPs per token: {flops:.4g} ")
