"""Routers: who is chosen, how much it counts, and what uneven loads cost."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switch_bank.config import ModelConfig
from switch_bank.model.router import Routers, Routing, RoutingSums, imbalance_cost
from switch_bank.schedules import StepState, layer_shape

BASE = ModelConfig(
    layers=3, width=16, heads=2, skip_attention=(), value_embeddings=0, experts=6, flags=False, reverse_ema="off"
)


def state(active: int = 6, temperature: float = 1.0, cap: float = 30.0, step: int = 0) -> StepState:
    return StepState(*torch.tensor([step, active, temperature, cap, 128], dtype=torch.float32))


def routers_of(**options: Any) -> Routers:
    routers = Routers(replace(BASE, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in routers.parameters():
            part.copy_(torch.randn(part.shape, generator=generator) * (0.5 if part.ndim == 3 else 0.2))
    return routers


def tokens_of(batch: int = 2, tokens: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, BASE.width, generator=torch.Generator().manual_seed(seed))


def route(routers: Routers, n: Tensor, at: StepState, layer: int = 1, noise: Tensor | None = None) -> Routing:
    router = routers.of_layers()[layer]
    (context,) = routers.context_logits(n, [], None, (router,))
    return routers(router, n, context, at, routers.active(at), noise)


def routing_of(probabilities: Tensor, experts: Tensor, logits: Tensor | None = None) -> Routing:
    gates = probabilities.gather(-1, experts)
    logits = probabilities if logits is None else logits
    return Routing(experts, gates, probabilities, logits, logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_gates_are_probabilities_of_scaled_and_capped_logits_not_renormalised(dtype: torch.dtype) -> None:
    routers, n = routers_of(top_k=2), tokens_of().to(dtype)
    noise = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    routing = route(routers, n, state(temperature=0.8, cap=1.2), noise=noise)
    temperature = 0.8 * (1 + BASE.temperature_boost * layer_shape(BASE)[1])
    values = (n.double() @ routers.weight[1].double().T + routers.bias[1].double() + noise.double()) / temperature
    exponentials = values.clamp(-1.2, 1.2).exp()
    expected = exponentials / exponentials.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.probabilities.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(routing.experts, values.argsort(-1, descending=True)[..., :2])
    assert torch.equal(routing.gates, routing.probabilities.gather(-1, routing.experts))
    assert (routing.gates.sum(-1) < 1).all() and routing.gates.dtype == dtype


def test_sigmoid_scores_an_expert_without_looking_at_the_others() -> None:
    routers, n = routers_of(score="sigmoid"), tokens_of()
    routing = route(routers, n, state(cap=1.5))
    temperature = 1 + BASE.temperature_boost * layer_shape(BASE)[1]
    values = (n @ routers.weight[1].T + routers.bias[1]) / temperature
    torch.testing.assert_close(routing.probabilities, torch.sigmoid(values.clamp(-1.5, 1.5)))
    with torch.no_grad():
        routers.weight[1, 0] += 1.0
    changed = route(routers, n, state(cap=1.5)).probabilities
    assert torch.equal(changed[..., 1:], routing.probabilities[..., 1:])
    assert not torch.equal(changed[..., 0], routing.probabilities[..., 0])


def test_routing_is_float32_whatever_the_activations_are() -> None:
    routing = route(routers_of(), tokens_of().bfloat16(), state())
    assert routing.logits.dtype == routing.gates.dtype == routing.probabilities.dtype == torch.float32


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_an_inactive_expert_is_never_chosen_and_changes_nothing(score: str, balance: str) -> None:
    routers, n, at = routers_of(score=score, balance=balance), tokens_of(), state(active=4)
    routers.pruned[1] = True
    before = route(routers, n, at)
    assert set(before.experts.unique().tolist()) <= {0, 2, 3}
    assert (before.probabilities[..., [1, 4, 5]] == 0).all()
    with torch.no_grad():
        routers.weight[:, [1, 4, 5]] *= 100
        routers.balance_bias[:, [1, 4, 5]] = 1000.0
    after = route(routers, n, at)
    for name in ("experts", "gates", "probabilities"):
        assert torch.equal(getattr(before, name), getattr(after, name))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_picks_beyond_the_active_experts_count_for_nothing(score: str) -> None:
    routers, n, at = routers_of(score=score, top_k=4), tokens_of(), state(active=2)
    routing = route(routers, n, at)
    active = routers.active(at)
    assert routing.experts.shape[-1] == 4
    assert torch.equal(routing.gates > 0, active[routing.experts])
    assert torch.equal(routing.gates > 0, torch.tensor([True, True, False, False]).expand_as(routing.gates))
    counts = routers.sums([routing], at, active, torch.ones(2, 50, dtype=torch.bool)).counts[0]
    assert counts.tolist() == [100.0, 100.0, 0.0, 0.0, 0.0, 0.0]
    (routing.gates * torch.randn_like(routing.gates)).sum().backward()
    assert routers.weight.grad is not None and routers.bias.grad is not None
    assert torch.isfinite(routers.weight.grad).all()
    assert (routers.weight.grad[:, 2:] == 0).all() and (routers.bias.grad[:, 2:] == 0).all()
    assert (routers.weight.grad[1, :2] != 0).any()


def test_at_a_low_cap_the_best_expert_is_chosen_although_its_gate_ties_with_others() -> None:
    routers, n = routers_of(), 20 * tokens_of()
    routing = route(routers, n, state(cap=1e-3))
    values = n @ routers.weight[1].T + routers.bias[1]
    assert torch.equal(routing.experts[..., 0], values.argmax(-1))
    # The capped values alone would send nearly all tokens to the first expert above the cap.
    assert routing.experts.unique().numel() == 6
    assert (routing.probabilities.amax(-1) - routing.probabilities[..., 0] < 1e-3).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_logits_get_the_gradient_of_their_gate_within_the_cap_and_none_beyond(score: str) -> None:
    routers, n = routers_of(score=score, top_k=2, temperature_boost=0.0), tokens_of()
    routing = route(routers, n, state(cap=0.8))
    direction = torch.randn(routing.gates.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((routing.gates * direction).sum(), routers.bias)
    values = (n @ routers.weight[1].T + routers.bias[1]).detach().requires_grad_()
    capped = values.clamp(-0.8, 0.8)
    probabilities = torch.softmax(capped, -1) if score == "softmax" else torch.sigmoid(capped)
    (wanted,) = torch.autograd.grad((probabilities.gather(-1, routing.experts) * direction).sum(), values)
    torch.testing.assert_close(found[1], wanted.sum((0, 1)))
    beyond = values.abs() > 0.8
    assert (wanted[beyond] == 0).all() and 0.1 < beyond.float().mean() < 0.9
    assert not routing.capped.requires_grad and not routing.choice.requires_grad


def test_a_balance_bias_moves_choices_and_leaves_gates_as_they_are() -> None:
    routers, n = routers_of(balance="bias"), tokens_of()
    before = route(routers, n, state())
    with torch.no_grad():
        routers.balance_bias[1, 5] = 100.0
        routers.balance_bias[2] = 100.0
    after = route(routers, n, state())
    assert (after.experts == 5).all() and not (before.experts == 5).all()
    assert torch.equal(after.probabilities, before.probabilities)
    assert torch.equal(after.gates[..., 0], before.probabilities[..., 5])
    without = routers_of(balance="aux")
    without.balance_bias.copy_(routers.balance_bias)
    assert torch.equal(route(without, n, state()).experts, before.experts)


@pytest.mark.parametrize("scope", ["layer", "bank"])
def test_the_balance_bias_evens_out_a_skewed_load(scope: str) -> None:
    routers = routers_of(balance="bias", balance_scope=scope, bias_step=0.05)
    with torch.no_grad():
        routers.bias.add_(torch.tensor([3.0, 1.0, 0.0, 0.0, -1.0, -2.0]))
    n, at = tokens_of(batch=4, tokens=200), state(active=5)
    active, counted = routers.active(at), torch.ones(4, 200, dtype=torch.bool)

    def loads() -> Tensor:
        with torch.no_grad():
            return routers.sums([route(routers, n, at, layer) for layer in range(3)], at, active, counted).counts

    def unevenness(counts: Tensor) -> float:
        """The largest load over the mean, in the scope's worst row."""
        counts = counts.sum(0, keepdim=True) if scope == "bank" else counts
        return float((counts[:, :5].amax(1) / counts[:, :5].mean(1)).max())

    first = unevenness(loads())
    for _ in range(120):
        routers.update_balance_bias(loads(), active)
    assert first > 2 and unevenness(loads()) < 1.25
    assert (routers.balance_bias[:, 5] == 0).all()  # inactive
    if scope == "bank":
        assert torch.equal(routers.balance_bias, routers.balance_bias[:1].expand(3, -1))


def test_one_update_of_the_balance_bias_is_one_step_of_gamma_towards_the_mean_load() -> None:
    counts = torch.tensor([[9.0, 3.0, 6.0, 99.0], [6.0, 6.0, 6.0, 0.0]])
    active = torch.tensor([True, True, True, False])
    for scope, expected in (
        ("layer", [[-1, 1, 0, 0], [0, 0, 0, 0]]),
        ("bank", [[-1, 1, 0, 0], [-1, 1, 0, 0]]),
    ):
        routers = routers_of(layers=2, experts=4, balance="bias", balance_scope=scope, bias_step=0.25)
        routers.update_balance_bias(counts, active)
        assert torch.equal(routers.balance_bias, 0.25 * torch.tensor(expected))


def test_pruning_switches_off_active_experts_below_the_share_of_an_even_load() -> None:
    routers = routers_of()
    at = state(active=5)
    counts = torch.tensor([[40.0, 5, 10, 25, 0, 0], [40.0, 0, 10, 30, 40, 0], [0.0, 4, 11, 25, 60, 0]])
    # 60 of 300 is even: expert 1 has 9 of it, expert 2 has 31.
    routers.prune(counts, 0.5, routers.active(at))
    assert routers.pruned.tolist() == [False, True, False, False, False, False]
    assert routers.active(at).tolist() == [True, False, True, True, True, False]
    assert routers.active(state(active=6)).tolist() == [True, False, True, True, True, True]
    assert not (route(routers, tokens_of(), at).experts == 1).any()
    routers.prune(counts, 0.5, routers.active(at))  # of the four left 72.75 is even, so that expert 2 falls as well
    assert routers.pruned.tolist() == [False, True, True, False, False, False]


def test_pruning_never_switches_off_the_last_expert() -> None:
    routers = routers_of()
    at = state(active=6)
    for _ in range(10):
        counts = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) + 1
        routers.prune(counts, 1.0, routers.active(at))
    assert routers.active(at).any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_routing_sums_are_of_the_tokens_that_have_a_target(score: str) -> None:
    routers, at = routers_of(top_k=2, score=score), state(active=5, cap=0.05)
    routing = route(routers, tokens_of(), at)
    counted = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    counts, load, importance = torch.zeros(6), torch.zeros(6), torch.zeros(6)
    top_probability, at_cap = 0.0, 0.0
    for row, t in counted.nonzero().tolist():
        picks, probabilities = routing.experts[row, t].tolist(), routing.probabilities[row, t].detach()
        counts[picks] += 1
        load[picks[0]] += 1
        importance += probabilities
        top_probability += float(probabilities.max())
        at_cap += sum(abs(value) >= 0.05 for value in routing.capped[row, t, :5].tolist()) / 5
    sums = routers.sums([routing, routing], at, routers.active(at), counted)
    for layer in range(2):
        assert torch.equal(sums.counts[layer], counts) and torch.equal(sums.load[layer], load)
        torch.testing.assert_close(sums.importance[layer], importance)
        assert float(sums.top_probability[layer]) == pytest.approx(top_probability, rel=1e-5)
        assert float(sums.at_cap[layer]) == pytest.approx(at_cap, rel=1e-5) and 0 < at_cap < counted.sum()
    assert all(torch.equal(one, two) for one, two in zip(RoutingSums.from_flat(sums.flat(), 2, 6), sums, strict=True))


def cost_by_hand(share: list[float], active: list[bool], cv: float, entropy: float) -> float:
    chosen = [value for value, on in zip(share, active, strict=True) if on]
    count = len(chosen)
    if count <= 1:
        return 0.0
    q = [value / sum(chosen) for value in chosen]
    variance = sum((value - 1 / count) ** 2 for value in q) / count
    gap = (math.log(count) + sum(value * math.log(value) for value in q if value > 0)) / math.log(count)
    return cv * variance * count**2 + entropy * gap


@settings(deadline=None, max_examples=50)
@given(
    share=st.lists(st.floats(0, 1), min_size=2, max_size=8), active=st.lists(st.booleans(), min_size=8, max_size=8),
    cv=st.floats(0, 2), entropy=st.floats(0, 2),
)  # fmt: skip
def test_the_cost_of_imbalance_is_the_formula(
    share: list[float], active: list[bool], cv: float, entropy: float
) -> None:
    on = active[: len(share)]
    if sum(value for value, chosen in zip(share, on, strict=True) if chosen) < 1e-3:
        share[0], on[0] = 1.0, True
    config = replace(BASE, cv_weight=cv, entropy_weight=entropy)
    cost = imbalance_cost(torch.tensor([share]), torch.tensor(on), config)
    assert cost.shape == (1,)
    torch.testing.assert_close(cost, torch.tensor([cost_by_hand(share, on, cv, entropy)]), rtol=1e-4, atol=2e-5)


def test_even_loads_cost_nothing_and_all_on_one_cost_the_most() -> None:
    config = replace(BASE, cv_weight=1.0, entropy_weight=1.0)
    active = torch.tensor([True] * 4 + [False] * 2)
    even = imbalance_cost(torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]), active, config)
    one = imbalance_cost(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]), active, config)
    assert abs(even) < 1e-6
    assert one == pytest.approx(3 + 1)  # CV² = A - 1, gap = 1


def test_one_active_expert_costs_nothing_and_has_no_gradient() -> None:
    share = torch.rand(3, 6, requires_grad=True)
    cost = imbalance_cost(share, torch.arange(6) < 1, BASE)
    assert torch.equal(cost, torch.zeros(3))
    cost.sum().backward()
    assert share.grad is not None and torch.equal(share.grad, torch.zeros(3, 6))


def test_the_gradient_of_the_cost_is_finite_and_right_with_a_load_of_zero() -> None:
    config = replace(BASE, cv_weight=0.7, entropy_weight=0.0)
    share = torch.tensor([0.6, 0.4, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    active = torch.arange(6) < 4
    with_entropy = imbalance_cost(share, active, replace(config, entropy_weight=1.0))
    (gradient,) = torch.autograd.grad(with_entropy, share)
    assert torch.isfinite(gradient).all() and gradient[0] > 0 > gradient[2] and (gradient[4:] == 0).all()
    (cv_gradient,) = torch.autograd.grad(imbalance_cost(share, active, config), share)
    step = 1e-6
    for expert in range(4):
        moved = [share.detach() + sign * step * torch.eye(6, dtype=torch.float64)[expert] for sign in (1, -1)]
        up, down = (float(imbalance_cost(point, active, config)) for point in moved)
        assert float(cv_gradient[expert]) == pytest.approx((up - down) / (2 * step), abs=1e-5)


def cost_of_slices(probabilities: Tensor, experts: Tensor, active: list[bool], config: ModelConfig) -> float:
    """DESIGN's auxiliary loss in plain Python; probabilities: [L, B, T, E], experts: [L, B, T] first picks."""
    layers, batch, tokens, count = probabilities.shape
    shape = layer_shape(config)
    weights = [1 + config.balance_boost * y for y in shape]
    importance = probabilities.mean(2).tolist()
    load = [[[(row == e).sum().item() / tokens for e in range(count)] for row in of_layer] for of_layer in experts]
    total = 0.0
    for b in range(batch):
        rows = [(weights[i], importance[i][b], load[i][b]) for i in range(layers)]
        if config.balance_scope == "bank":
            columns = [[sum(part[i][b][e] for i in range(layers)) for e in range(count)] for part in (importance, load)]
            rows = [(sum(weights), columns[0], columns[1])]
        for weight, *parts in rows:
            total += weight * sum(cost_by_hand(part, active, config.cv_weight, config.entropy_weight) for part in parts)
    return total / batch


@pytest.mark.parametrize("scope", ["layer", "bank"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_auxiliary_loss_is_the_formula(scope: str, score: str) -> None:
    routers = routers_of(
        balance_scope=scope, score=score, top_k=2, cv_weight=0.3, entropy_weight=0.9,
        layer_shape="rising", balance_boost=2.0,
    )  # fmt: skip
    at = state(active=5)
    with torch.no_grad():
        routings = [route(routers, tokens_of(seed=layer), at, layer) for layer in range(3)]
        loss = routers.auxiliary_loss(routings, routers.active(at))
    probabilities = torch.stack([routing.probabilities for routing in routings])
    experts = torch.stack([routing.experts[..., 0] for routing in routings])
    expected = cost_of_slices(probabilities, experts, [True] * 5 + [False], routers.config)
    assert expected > 0.1 and float(loss) == pytest.approx(expected, rel=1e-4)


def test_over_the_bank_layers_may_specialise_and_per_layer_they_may_not() -> None:
    losses = {}
    for scope in ("layer", "bank"):
        routers = routers_of(experts=3, balance_scope=scope, balance_boost=0.0)
        routings = []
        for layer in range(3):  # each layer sends all its tokens to an expert of its own
            experts = torch.full((1, 10, 1), layer)
            routings.append(routing_of(torch.eye(3)[layer].expand(1, 10, 3), experts))
        losses[scope] = float(routers.auxiliary_loss(routings, torch.ones(3, dtype=torch.bool)))
    assert losses["layer"] > 1e-3 and abs(losses["bank"]) < 1e-7


def test_the_load_has_a_gradient_straight_through_the_probabilities() -> None:
    config = dict(experts=4, layers=1, cv_weight=1.0, entropy_weight=0.0, balance_boost=0.0)
    routers = routers_of(**config)
    logits = torch.zeros(1, 8, 4, requires_grad=True)
    probabilities = torch.softmax(logits, -1)
    # Importance is even, so that its cost has no gradient: what is left comes from the load.
    routing = routing_of(probabilities, torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])[None, :, None])
    loss = routers.auxiliary_loss([routing], torch.ones(4, dtype=torch.bool))
    assert loss.item() == pytest.approx(cost_by_hand([6 / 8, 1 / 8, 1 / 8, 0], [True] * 4, 1.0, 0.0))
    loss.backward()
    assert logits.grad is not None
    # One step down lowers the probability of the crowded expert and raises that of the empty one.
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 3] < 0).all()


def test_the_z_loss_is_the_mean_square_of_the_logsumexp_over_active_experts() -> None:
    routers, at = routers_of(balance="none", z_loss_weight=0.3), state(active=4, temperature=0.5, cap=0.1)
    with torch.no_grad():
        routings = [route(routers, tokens_of(seed=layer), at, layer, noise=torch.rand(2, 50, 6)) for layer in range(3)]
        loss = routers.auxiliary_loss(routings, routers.active(at))
    expected = 0.0
    for layer in range(3):
        logits = tokens_of(seed=layer) @ routers.weight[layer].T + routers.bias[layer]  # no noise, temperature, cap
        expected += 0.3 * (logits[..., :4].exp().sum(-1).log() ** 2).mean().item()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_without_aux_balance_an_uneven_load_costs_nothing(balance: str) -> None:
    routers = routers_of(balance=balance)
    with torch.no_grad():
        routings = [route(routers, tokens_of(), state(), layer) for layer in range(3)]
    assert float(routers.auxiliary_loss(routings, routers.active(state()))) == 0.0


@pytest.mark.parametrize("shape", ["peak", "valley", "rising", "falling"])
def test_the_layer_shape_multiplies_the_temperature(shape: str) -> None:
    routers = routers_of(layer_shape=shape, temperature_boost=3.0)
    n = tokens_of()
    for layer, value in enumerate(layer_shape(routers.config)):
        routing = route(routers, n, state(temperature=0.7), layer)
        expected = (n @ routers.weight[layer].T + routers.bias[layer]) / (0.7 * (1 + 3.0 * value))
        torch.testing.assert_close(routing.choice, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [6, 9])
def test_context_logits_are_what_the_whole_router_input_would_give(experts: int) -> None:
    """With EMAs of n, and with EMAs of logits, where there are fewer of them."""
    routers = routers_of(forward_ema=True, reverse_ema="causal", flags=True, experts=experts)
    assert (routers.ema_channels(2) < BASE.width) == (experts == 6)
    generator = torch.Generator().manual_seed(3)
    over_tokens = torch.randn(2, 50, 50, generator=generator) / 7
    emas = [lambda x: over_tokens[0] @ x, lambda x: over_tokens[1] @ x]
    flags = (torch.rand(2, 50, 11, generator=generator) < 0.5).float()
    of_layers, n = routers.of_layers(), tokens_of()
    contexts = routers.context_logits(n, emas, flags, (of_layers[1], of_layers[2]))
    assert len(contexts) == 2
    for layer, context in zip((1, 2), contexts, strict=True):
        routing = routers(of_layers[layer], n, context, state(), routers.active(state()), None)
        whole = torch.cat([n, *(ema(n) for ema in emas), flags], dim=-1) @ routers.weight[layer].T
        whole += routers.bias[layer]
        torch.testing.assert_close(routing.logits, whole, rtol=1e-4, atol=1e-4)
    (alone,) = routers.context_logits(n, [], None, (of_layers[0],))  # without features, the bias is left
    assert torch.equal(alone, routers.bias[0].expand(2, 50, -1))


def test_noise_moves_the_choice_and_the_gate_alike() -> None:
    routers, n = routers_of(), tokens_of()
    noise = torch.zeros(2, 50, 6)
    noise[..., 4] = 1000.0
    quiet, noisy = route(routers, n, state()), route(routers, n, state(), noise=noise)
    assert (noisy.experts == 4).all() and not (quiet.experts == 4).all()
    assert (noisy.gates > quiet.probabilities[..., 4:5]).all() and torch.equal(quiet.logits, noisy.logits)


@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_the_margin_is_what_the_last_pick_has_over_the_best_expert_left(balance: str) -> None:
    routers = routers_of(top_k=2, balance=balance)
    with torch.no_grad():
        routers.balance_bias[1, 3] = 0.5
    routing = route(routers, tokens_of(), state(active=5))
    ordered = routing.choice.sort(-1, descending=True).values
    torch.testing.assert_close(routers.margin(routing), ordered[..., 1] - ordered[..., 2])
    for active in (2, 1):  # every active expert is picked: no error can change that
        assert (routers.margin(route(routers, tokens_of(), state(active=active))) == torch.inf).all()
    everyone = routers_of(top_k=6)
    assert (everyone.margin(route(everyone, tokens_of(), state())) == torch.inf).all()
