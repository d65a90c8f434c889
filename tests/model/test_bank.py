"""The bank as a module: whose experts a layer uses, and how adapters start."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from switch_bank.config import ModelConfig
from switch_bank.model.bank import Bank

BASE = ModelConfig(layers=3, width=16, heads=2, skip_attention=(), value_embeddings=0, experts=4, expert_width=24)


def bank_of(**options: Any) -> Bank:
    bank = Bank(replace(BASE, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in bank.parameters():
            part.copy_(torch.randn(part.shape, generator=generator) * 0.3)
    return bank


def inputs_of(top_k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """n [2, 30, D], experts and gates [2, 30, K]."""
    generator = torch.Generator().manual_seed(1)
    n = torch.randn(2, 30, BASE.width, generator=generator).to(dtype)
    experts = torch.rand(2, 30, BASE.experts, generator=generator).argsort(-1)[..., :top_k]
    return n, experts, torch.rand(2, 30, top_k, generator=generator)


def run(bank: Bank, n: Tensor, layer: int, experts: Tensor, gates: Tensor) -> Tensor:
    return bank(bank.of_layers(bank.backend(n.dtype, 128), n.dtype)[layer], n, experts, gates)


def ffn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.relu(x @ w1.T).square() @ w2.T


@pytest.mark.parametrize("adapter", ["none", "scale_bias", "lora"])
@pytest.mark.parametrize("always_on", [False, True])
def test_a_layers_result_is_the_gated_sum_of_its_picks_with_its_own_adapters(adapter: str, always_on: bool) -> None:
    bank = bank_of(adapter=adapter, always_on_expert=always_on)
    n, experts, gates = inputs_of()
    with torch.no_grad():
        for layer in range(3):
            parts = {name: part[layer] for name, part in bank.adapters.items()}
            expected = ffn(n, bank.always_w1[0], bank.always_w2[0]) if always_on else torch.zeros_like(n)
            for e in range(BASE.experts):
                x, w1, w2 = n, bank.w1[e], bank.w2[e]
                if adapter == "scale_bias":
                    x = n * parts["scale"][e] + parts["bias"][e]
                elif adapter == "lora":
                    w1 = w1 + parts["in_up"][e] @ parts["in_down"][e]
                    w2 = w2 + parts["out_up"][e] @ parts["out_down"][e]
                gate = (gates * (experts == e)).sum(-1, keepdim=True)
                expected = expected + gate * ffn(x, w1, w2)
            torch.testing.assert_close(run(bank, n, layer, experts, gates), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "grouped", "auto"])
@pytest.mark.parametrize("adapter", ["none", "scale_bias", "lora"])
def test_unshared_experts_are_a_bank_for_each_layer(adapter: str, backend: str) -> None:
    unshared = bank_of(shared=False, adapter=adapter, bank_backend=backend)
    assert unshared.w1.shape[0] == unshared.w2.shape[0] == 3 * BASE.experts
    n, experts, gates = inputs_of()
    for layer in range(3):
        alone = Bank(replace(unshared.config, shared=True))
        with torch.no_grad():
            own = slice(layer * BASE.experts, (layer + 1) * BASE.experts)
            alone.w1.copy_(unshared.w1[own])
            alone.w2.copy_(unshared.w2[own])
            for name, part in alone.adapters.items():
                part.copy_(unshared.adapters[name])
        assert torch.equal(run(unshared, n, layer, experts, gates), run(alone, n, layer, experts, gates))


def test_layers_of_a_shared_bank_use_the_same_experts_and_of_an_unshared_one_only_their_own() -> None:
    n, experts, gates = inputs_of()
    shared, unshared = (bank_of(shared=on, adapter="none") for on in (True, False))
    assert torch.equal(run(shared, n, 0, experts, gates), run(shared, n, 2, experts, gates))
    assert not torch.equal(run(unshared, n, 0, experts, gates), run(unshared, n, 2, experts, gates))
    run(unshared, n, 1, experts, gates).sum().backward()
    gradient = unshared.w1.grad
    assert gradient is not None
    assert (gradient[:4] == 0).all() and (gradient[4:8] != 0).any() and (gradient[8:] == 0).all()


def test_the_result_has_the_activations_dtype_and_parameters_stay_float32() -> None:
    for adapter in ("none", "scale_bias", "lora"):
        bank = bank_of(adapter=adapter, always_on_expert=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            n, experts, gates = inputs_of(dtype=dtype)
            assert run(bank, n, 0, experts, gates).dtype == dtype
        assert all(part.dtype == torch.float32 for part in bank.parameters())


def test_the_always_on_expert_serves_every_token_also_those_without_a_pick() -> None:
    bank = bank_of(always_on_expert=True)
    n, experts, gates = inputs_of()
    y = run(bank, n, 0, experts, torch.zeros_like(gates))
    torch.testing.assert_close(y, ffn(n, bank.always_w1[0], bank.always_w2[0]), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert bank.always_w1.grad is not None and (bank.always_w1.grad != 0).any()
    assert bank.w1.grad is None or (bank.w1.grad == 0).all()


@pytest.mark.parametrize("adapter", ["scale_bias", "lora"])
def test_a_newly_active_experts_adapter_starts_from_the_mean_of_the_active_ones(adapter: str) -> None:
    bank = bank_of(adapter=adapter)
    old = {name: part.detach().clone() for name, part in bank.adapters.items()}
    before, after = torch.tensor([True, True, False, False]), torch.tensor([True, True, True, False])
    bank.start_adapters(before, after)
    assert set(old) == ({"scale", "bias"} if adapter == "scale_bias" else {"in_down", "in_up", "out_down", "out_up"})
    for name, part in bank.adapters.items():
        torch.testing.assert_close(part[:, 2], (old[name][:, 0] + old[name][:, 1]) / 2)
        for untouched in (0, 1, 3):
            assert torch.equal(part[:, untouched], old[name][:, untouched])


def test_adapters_stay_as_they_are_where_no_expert_is_new() -> None:
    bank = bank_of()
    old = {name: part.detach().clone() for name, part in bank.adapters.items()}
    active = torch.tensor([True, False, True, False])
    bank.start_adapters(active, active)
    bank.start_adapters(torch.ones(4, dtype=torch.bool), active)  # experts that were switched off are not new
    assert all(torch.equal(part, old[name]) for name, part in bank.adapters.items())
    bank_of(adapter="none").start_adapters(active, ~active)  # nothing to start


@pytest.mark.parametrize("adapter", ["none", "scale_bias", "lora"])
def test_a_new_bank_adds_nothing_and_its_adapters_change_nothing(adapter: str) -> None:
    options: dict[str, Any] = dict(adapter=adapter, always_on_expert=True)
    bank = Bank(replace(BASE, **options))
    n, experts, gates = inputs_of()
    assert (run(bank, n, 0, experts, gates) == 0).all()
    with torch.no_grad():
        bank.w2.normal_()
    plain = Bank(replace(BASE, adapter="none"))
    with torch.no_grad():
        plain.w1.copy_(bank.w1)
        plain.w2.copy_(bank.w2)
    torch.testing.assert_close(run(bank, n, 1, experts, gates), run(plain, n, 1, experts, gates))
