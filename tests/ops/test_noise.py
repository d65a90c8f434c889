"""The draws: the same wherever and whenever they are made, different for every purpose, and Gumbel distributed."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switch_bank.ops.noise import gumbel, gumbel_keys, mix

TOKENS, EXPERTS = 64, 8


def draws(
    seed: int | Tensor = 1, step: int = 500, slices: list[int] | range = range(2), layer: int = 3,
    tokens: int = TOKENS, experts: int = EXPERTS,
) -> Tensor:  # fmt: skip
    keys = gumbel_keys(seed, torch.tensor(float(step)), torch.tensor(list(slices)), layers=layer + 1)
    return gumbel(keys[layer], tokens, experts)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def test_draws_have_one_shape_and_float32() -> None:
    assert draws(slices=[4, 0, 7]).shape == (3, TOKENS, EXPERTS)
    assert draws().dtype == torch.float32


def test_the_hash_is_the_one_named() -> None:
    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0xD35A2D97) % 2**32
        return x ^ (x >> 15)

    generator = torch.Generator().manual_seed(0)
    words = torch.cat([torch.randint(0, 2**32, (1000,), generator=generator), torch.tensor([0, 1, 2**31, 2**32 - 1])])
    assert mix(words).tolist() == [lowbias32(int(word)) for word in words]
    assert torch.equal(mix(words + 2**32), mix(words))


def test_the_hash_maps_no_two_words_to_one() -> None:
    words = torch.arange(2**18) * 16_411 % 2**32
    assert mix(words).unique().numel() == words.unique().numel()


@given(st.permutations(range(8)), st.integers(1, 7), st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_draws_do_not_depend_on_which_slices_go_together(order: list[int], cut: int, seed: int, step: int) -> None:
    together = draws(seed, step, range(8), tokens=8)
    assert torch.equal(draws(seed, step, order, tokens=8), together[order])
    apart = [draws(seed, step, part, tokens=8) for part in (order[:cut], order[cut:])]
    assert torch.equal(torch.cat(apart), together[order])


def test_draws_do_not_depend_on_how_many_layers_tokens_or_experts_there_are() -> None:
    step, slices = torch.tensor(3.0), torch.arange(5)
    assert torch.equal(gumbel_keys(1, step, slices, layers=2), gumbel_keys(1, step, slices, layers=9)[:2])
    assert torch.equal(draws(tokens=7), draws()[:, :7])
    assert torch.equal(draws(experts=3), draws()[..., :3])


def test_draws_leave_the_global_generators_alone() -> None:
    before = torch.get_rng_state()
    first = draws()
    torch.manual_seed(123)
    assert torch.equal(draws(), first)
    torch.set_rng_state(before)
    draws()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_in_a_tensor_draws_the_same_as_its_number() -> None:
    for seed in (0, 7, 2**31 - 1):
        assert torch.equal(draws(seed), draws(torch.tensor(seed)))


@pytest.mark.parametrize(
    "along",
    [
        lambda i: draws(seed=i, slices=[2])[0],
        lambda i: draws(step=i, slices=[2])[0],
        lambda i: draws(slices=[i])[0],
        lambda i: draws(layer=i, slices=[2])[0],
        lambda i: draws(slices=[2], tokens=32 * TOKENS)[0, i * TOKENS : (i + 1) * TOKENS],
        lambda i: draws(slices=[2], experts=32 * EXPERTS)[0, :, i * EXPERTS : (i + 1) * EXPERTS],
    ],
    ids=["seed", "step", "slice", "layer", "position", "expert"],
)
def test_draws_differ_along_every_axis(along: Callable[[int], Tensor]) -> None:
    blocks = [along(i) for i in range(32)]
    # 16,384 draws of 2^23 values: chance alone leaves 16 pairs of equals, twice as many are not to be expected.
    flat = torch.cat([block.flatten() for block in blocks])
    assert flat.numel() - flat.unique().numel() < 40
    correlations = [correlation(blocks[i], blocks[j]) for i in range(32) for j in range(i)]
    # 496 correlations of 512 draws each: a spread of 512^-1/2, and none far outside it.
    assert max(map(abs, correlations)) < 5 / math.sqrt(512)
    assert torch.tensor(correlations).std().item() < 1.15 / math.sqrt(512)


def test_no_run_of_draws_comes_twice() -> None:
    # Seed, step, slice, layer, position and expert are all small numbers: none may stand for another. Single draws
    # repeat by chance (2^23 values), two in a row must not: neither along the experts nor along the positions.
    blocks = [
        draws(seed, step, range(4), layer, tokens=4, experts=4)
        for seed in range(4)
        for step in range(4)
        for layer in range(4)
    ]
    everything = torch.stack(blocks)
    pairs = [
        torch.stack([everything[..., 1:], everything[..., :-1]], dim=-1).view(-1, 2),
        torch.stack([everything[..., 1:, :], everything[..., :-1, :]], dim=-1).view(-1, 2),
    ]
    seen = torch.cat(pairs)
    assert seen.unique(dim=0).shape == seen.shape


def test_neighbours_are_not_correlated() -> None:
    block = draws(slices=range(16), tokens=256)
    bound = 5 / math.sqrt(block.numel() / 2)
    assert abs(correlation(block[1:], block[:-1])) < bound
    assert abs(correlation(block[:, 1:], block[:, :-1])) < bound
    assert abs(correlation(block[..., 1:], block[..., :-1])) < bound
    assert abs(correlation(block[:, 1:, :-1], block[:, :-1, 1:])) < bound


def test_draws_are_gumbel_distributed() -> None:
    sample = draws(slices=range(32), tokens=1024).flatten().double()
    count = sample.numel()
    deviation = math.pi / math.sqrt(6)
    assert sample.mean().item() == pytest.approx(0.577216, abs=5 * deviation / math.sqrt(count))
    # The kurtosis of a Gumbel variable is 5.4: its variance is known to within deviation²·sqrt(4.4 / n).
    assert sample.var().item() == pytest.approx(deviation**2, abs=5 * deviation**2 * math.sqrt(4.4 / count))
    # Kolmogorov-Smirnov: the largest gap between the sample's distribution and exp(-exp(-x)).
    expected = torch.exp(-torch.exp(-sample.sort().values))
    gap = (expected - (torch.arange(count) + 0.5) / count).abs().max().item()
    assert gap < 1.95 / math.sqrt(count)  # passed by 999 of 1000 honest samples


@pytest.mark.parametrize("bins", [8, 3])
def test_the_largest_of_equal_logits_is_each_expert_s_equally_often(bins: int) -> None:
    picks = draws(slices=range(16), tokens=1024, experts=bins).argmax(-1).flatten()
    counts = torch.bincount(picks, minlength=bins).double()
    expected = picks.numel() / bins
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < bins - 1 + 5 * math.sqrt(2 * (bins - 1))


def test_every_draw_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    block = draws(seed=0, step=0, slices=range(64), layer=0, tokens=1024, experts=16)
    assert torch.isfinite(block).all()
    # All words that a hash may end in, at both ends of their range.
    ends = torch.cat([torch.arange(4096), 2**32 - 1 - torch.arange(4096)])
    monkeypatch.setattr("switch_bank.ops.noise.mix", lambda x: ends[:, None] if x.dim() == 3 else x)
    extreme = gumbel(torch.zeros(1, dtype=torch.int64), tokens=1, experts=1)
    assert torch.isfinite(extreme).all()
    assert extreme.min().item() == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert extreme.max().item() == pytest.approx(24 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_draws_are_the_same(backend: str) -> None:
    compiled = torch.compile(gumbel, fullgraph=True, backend=backend)
    keys = gumbel_keys(9, torch.tensor(11.0), torch.tensor([5, 1]), layers=3)[2]
    torch.testing.assert_close(compiled(keys, 40, 6), gumbel(keys, 40, 6), rtol=1e-5, atol=1e-5)
