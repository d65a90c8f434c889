"""Who optimises what: every parameter once, at its own rate, and router gradients within their own past."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from switch_bank.config import Config, presets
from switch_bank.distributed import flat_gradients
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.optim.groups import (
    QuantileClip,
    build_optimizers,
    in_backward_order,
    parameter_groups,
    set_rates,
)
from switch_bank.schedules import learning_rate_factor, muon_momentum, step_state

ConfigOf, ModelOf = Callable[..., Config], Callable[[Config], SwitchBankGPT]
VARIANTS: list[dict[str, Any]] = [
    {}, dict(always_on_expert=True, adapter="lora"), dict(shared=False, adapter="none"), dict(experts=1),
    dict(tied_layers=2, skip_attention=(1,), value_embeddings=0),
]  # fmt: skip


def assert_each_once(groups: list[list[nn.Parameter]], model: nn.Module) -> None:
    grouped = [id(parameter) for group in groups for parameter in group]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == set(names), [name for key, name in names.items() if key not in grouped]


@pytest.mark.parametrize("preset", list(presets))
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_of_every_preset_is_in_exactly_one_group(preset: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = SwitchBankGPT(replace(presets[preset].model, **options))
    groups = parameter_groups(model)
    assert_each_once(list(groups.values()), model)
    assert all(parameter.ndim == 3 for name in ("attention", "experts") for parameter in groups[name])
    assert all(parameter.shape[-1] == model.config.width for parameter in groups["attention"])


@pytest.mark.parametrize("microbatches", [None, 2])
@pytest.mark.parametrize("backend", ["auto", "grouped"])
@pytest.mark.parametrize("options", [*VARIANTS, dict(always_on_expert=True)], ids=str)
def test_a_backward_finishes_gradients_in_the_order_that_is_said(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any], backend: str, microbatches: int | None
) -> None:
    config = config_of(**options, bank_backend=backend)
    model = model_of(config)
    order = in_backward_order(model, microbatches)
    assert_each_once([order], model)
    finished: list[nn.Parameter] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(finished.append)
    tokens = torch.randint(97, (2, 128), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens, step_state(1000, config, "cpu"), microbatches=microbatches).loss.backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen, said = ([names[id(parameter)] for parameter in one] for one in (finished, order))
    if config.model.shared:
        assert seen == said
    else:  # the experts of all layers in one tensor, which is not worth an order of its own
        assert [name for name in seen if "bank.w" not in name] == [name for name in said if "bank.w" not in name]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_optimizers_share_the_parameters_and_begin_at_the_rates_of_the_options(
    config_of: ConfigOf, options: dict[str, Any]
) -> None:
    config = config_of(**options)
    model = SwitchBankGPT(config.model)
    muon, adam = build_optimizers(model, config)
    assert_each_once([group["params"] for group in muon.param_groups + adam.param_groups], model)
    groups, optim = parameter_groups(model), config.optim
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(p) for p in groups["attention"] + groups["experts"]]
    rates = dict(
        matrices=optim.muon_lr, embeddings=optim.embedding_lr, head=optim.head_lr, routers=optim.router_lr,
        adapters=optim.adapter_lr, scalars=optim.scalar_lr,
    )  # fmt: skip
    for group in muon.param_groups + adam.param_groups:
        assert group["lr"] == group["base_lr"] == rates[group["name"]]
    for group in adam.param_groups:
        assert group["betas"] == optim.adam_betas and group["weight_decay"] == 0 and group["fused"]
        assert {id(p) for p in group["params"]} == {id(p) for p in groups[group["name"]]}


def test_rates_and_momentum_follow_the_schedule(config_of: ConfigOf) -> None:
    config = config_of()
    muon, adam = build_optimizers(SwitchBankGPT(config.model), config)
    steps, schedule = config.schedule.steps, config.schedule
    for step in (0, 100, steps // 2, 0, steps - 1, steps):  # in any order: a step's rates are its own
        set_rates(muon, adam, step, config)
        for group in muon.param_groups + adam.param_groups:
            assert group["lr"] == group["base_lr"] * learning_rate_factor(step, schedule)
        assert muon.param_groups[0]["momentum"] == muon_momentum(step, schedule, config.optim.muon_momentum)
    assert all(group["lr"] == 0 for group in muon.param_groups + adam.param_groups)


@pytest.mark.parametrize("adapter", ["scale_bias", "lora"])
def test_frozen_adapters_do_not_move_by_a_bit_and_all_else_does(
    config_of: ConfigOf, model_of: ModelOf, adapter: str
) -> None:
    config = config_of(adapter=adapter)
    config = replace(config, schedule=replace(config.schedule, freeze_adapters_at=3))
    model = model_of(config)
    gradients = flat_gradients(model.parameters())
    muon, adam = build_optimizers(model, config)
    moved = []
    for step in range(6):
        gradients.copy_(torch.randn(gradients.shape, generator=torch.Generator().manual_seed(step)))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        set_rates(muon, adam, step, config)
        muon.step()
        adam.step()
        changed = {name: not torch.equal(value, before[name]) for name, value in model.named_parameters()}
        moved.append(all(value for name, value in changed.items() if name.startswith("bank.adapters")))
        still = [name for name, value in changed.items() if not value]
        assert all(name.startswith("bank.adapters") for name in still)
        assert bool(still) == (step >= 3) and (not still or len(still) == len(model.bank.adapters))
    assert moved == [True] * 3 + [False] * 3


# --- Clipping


def clip_of(quantile: float, history: int, sizes: tuple[int, ...] = (7, 5)) -> tuple[list[nn.Parameter], QuantileClip]:
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    flat_gradients(parameters)
    return parameters, QuantileClip(parameters, quantile, history)


def joint(parameters: list[nn.Parameter]) -> np.ndarray:
    return np.concatenate([parameter.grad.numpy().astype(np.float64) for parameter in parameters])  # type: ignore[union-attr]


@given(quantile=st.floats(0, 1), history=st.integers(1, 12), seed=st.integers(0, 1000), steps=st.integers(1, 30))
def test_the_norm_is_clipped_to_the_quantile_of_its_last_values(
    quantile: float, history: int, seed: int, steps: int
) -> None:
    parameters, clip = clip_of(quantile, history)
    random, norms = np.random.default_rng(seed), []
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad.copy_(torch.from_numpy(random.normal(0, random.lognormal(), parameter.shape)))  # type: ignore[union-attr]
        before = joint(parameters)
        norms.append(np.linalg.norm(before))
        clip.step()
        limit = np.quantile(norms[-history:], quantile)
        np.testing.assert_allclose(joint(parameters), before * min(1, limit / norms[-1]), rtol=2e-4, atol=1e-6)
        assert np.linalg.norm(joint(parameters)) <= max(limit, 1e-6) * (1 + 2e-4)


def test_gradients_of_zero_stay_zero_and_a_first_gradient_stays_as_it_is() -> None:
    parameters, clip = clip_of(0.1, 5)
    parameters[0].grad.fill_(2.0)  # type: ignore[union-attr]
    clip.step()
    assert (joint(parameters)[:7] == 2).all()
    for parameter in parameters:
        parameter.grad.zero_()  # type: ignore[union-attr]
    clip.step()
    assert (joint(parameters) == 0).all()


def test_a_gradient_after_many_steps_without_one_is_not_clipped_to_nothing() -> None:
    parameters, clip = clip_of(0.1, 5)
    for value in (0.0, 0.0, 0.0, 4.0, 0.0, 3.0, 5.0):
        parameters[0].grad.fill_(value)  # type: ignore[union-attr]
        clip.step()
    limit = np.quantile([4.0, 3.0, 5.0], 0.1)
    np.testing.assert_allclose(joint(parameters)[:7], limit, rtol=1e-6)


def test_a_resumed_clip_remembers() -> None:
    (one, first), (two, second) = clip_of(0.3, 4), clip_of(0.3, 4)
    for value in (1.0, 5.0, 2.0):
        one[0].grad.fill_(value)  # type: ignore[union-attr]
        first.step()
    second.load_state_dict(first.state_dict())
    for parameters, clip in ((one, first), (two, second)):
        parameters[0].grad.fill_(9.0)  # type: ignore[union-attr]
        clip.step()
    assert np.array_equal(joint(one), joint(two)) and joint(one)[0] < 9


def test_without_routers_there_is_nothing_to_clip() -> None:
    clip = QuantileClip([], 0.1, 5)
    clip.step()
    assert clip.norms.isnan().all()
    clip.load_state_dict(clip.state_dict())
