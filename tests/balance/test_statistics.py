"""How evenly loads lie: by hand, by the standard library's statistics, and whatever the order of the experts."""

import math
import statistics as stdlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from switch_bank.balance.statistics import (
    chance_cv,
    fair_multiples,
    jensen_shannon_distance,
    spread,
    trend,
    verdict,
)

loads = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 9)), elements=st.integers(0, 10**6)
).filter(lambda counts: counts.sum() > 0)  # fmt: skip


def test_the_spread_of_four_loads_is_the_one_worked_out_by_hand() -> None:
    # mean 4, deviations -2 0 -2 +4, their squares 24, variance 24 / 4
    result = spread([2, 4, 2, 8])
    assert result.std == pytest.approx(math.sqrt(6))
    assert result.cv == pytest.approx(math.sqrt(6) / 4)
    assert result.max_min == 4
    # shares 1/8 1/4 1/8 1/2: entropy 3/8 + 2/4 + 3/8 + 1/2 = 1.75 bits of the 2 that four experts can have
    assert result.entropy == pytest.approx(1.75 * math.log(2))
    assert result.entropy_gap == pytest.approx(0.125)
    assert result.usage == 1


def test_even_loads_have_no_spread() -> None:
    result = spread([[5, 5, 5], [0.25, 0.25, 0.25]])
    assert result.std.tolist() == [0, 0] and result.cv.tolist() == [0, 0] and result.max_min.tolist() == [1, 1]
    assert result.entropy_gap == pytest.approx(0, abs=1e-15) and result.entropy == pytest.approx(math.log(3))


def test_one_expert_with_everything_is_as_uneven_as_can_be() -> None:
    result = spread([0, 7, 0, 0])
    assert result.max_min == np.inf and result.entropy == 0 and result.entropy_gap == 1 and result.usage == 0.25
    assert result.cv == pytest.approx(math.sqrt(3))  # the largest there is: √(E - 1)


def test_an_only_expert_is_balanced() -> None:
    result = spread([7])
    assert (result.cv, result.max_min, result.entropy_gap, result.usage) == (0, 1, 0, 1)


@pytest.mark.parametrize("bad", [[1, -1, 3], [0, 0], [1, math.nan], [math.inf, 1], [[1, 2], [0, 0]]])
def test_loads_that_are_none_are_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="loads must be finite, none negative, and sum to more than 0"):
        spread(bad)


@given(loads)
def test_the_spread_is_that_of_the_population(counts: np.ndarray) -> None:
    plain, result = counts.tolist(), spread(counts)
    assert result.std == pytest.approx(stdlib.pstdev(plain))
    assert result.cv == pytest.approx(stdlib.pstdev(plain) / stdlib.fmean(plain))
    assert result.max_min == (max(plain) / min(plain) if min(plain) else math.inf)
    shares = [count / sum(plain) for count in plain]
    assert result.entropy == pytest.approx(-sum(share * math.log(share) for share in shares if share), abs=1e-12)
    assert 0 <= result.entropy_gap <= 1 + 1e-12
    assert result.usage == pytest.approx(sum(count > 0 for count in plain) / len(plain))


@given(loads, st.randoms(use_true_random=False), st.integers(1, 1000))
def test_neither_the_order_of_experts_nor_the_number_of_tokens_changes_the_spread(
    counts: np.ndarray, random: np.random.Generator, factor: int
) -> None:
    other = counts.tolist()
    random.shuffle(other)
    one, two = spread(counts), spread(factor * np.array(other))
    assert two.std == pytest.approx(factor * one.std)
    assert two._replace(std=one.std) == pytest.approx(one, abs=1e-12)


@given(arrays.arrays(np.float64, (3, 2, 4), elements=st.floats(0.01, 100)))
def test_many_loads_at_once_are_each_taken_alone(values: np.ndarray) -> None:
    together = spread(values)
    for row, layer in np.ndindex(3, 2):
        alone = spread(values[row, layer])
        assert [field[row, layer] for field in together] == pytest.approx(list(alone), abs=1e-12)


def test_loads_as_multiples_of_the_fair_load() -> None:
    assert fair_multiples([[2, 4, 2, 8], [1, 1, 1, 1]]).tolist() == [[0.5, 1, 0.5, 2], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("cv", "max_min", "word"),
    [
        (0.0, 1.0, "balanced"), (0.0499, 2.0, "balanced"), (0.05, 1.2, "moderate"), (0.20, 2.0, "moderate"),
        (0.2001, 1.5, "high"), (0.01, 2.01, "high"), (0.0, math.inf, "high"),
    ],
)  # fmt: skip
def test_the_verdict_goes_by_its_stated_thresholds(cv: float, max_min: float, word: str) -> None:
    assert verdict(cv, max_min) == word


# --- Jensen-Shannon


def test_the_distance_of_two_loads_is_the_one_worked_out_by_hand() -> None:
    # p = (1/2, 1/2), q = (1, 0), middle (3/4, 1/4):
    # KL(p, m) = ½log₂(2/3) + ½log₂2 and KL(q, m) = log₂(4/3), in bits
    divergence = ((0.5 * math.log2(2 / 3) + 0.5) + math.log2(4 / 3)) / 2
    assert jensen_shannon_distance([10, 10], [3, 0]) == pytest.approx(math.sqrt(divergence))
    assert jensen_shannon_distance([5, 0], [0, 2]) == pytest.approx(1)
    assert jensen_shannon_distance([[1, 2, 3], [0, 5, 0]], [[2, 4, 6], [5, 0, 0]]).tolist() == pytest.approx([0, 1])


@given(st.integers(1, 6).flatmap(lambda size: st.lists(st.lists(st.floats(0.1, 50), min_size=size, max_size=size),
                                                       min_size=3, max_size=3)))  # fmt: skip
def test_the_distance_is_one(three: list[list[float]]) -> None:
    one, two, three_ = three
    assert jensen_shannon_distance(one, two) == pytest.approx(jensen_shannon_distance(two, one), abs=1e-7)
    assert 0 <= jensen_shannon_distance(one, two) <= 1
    assert jensen_shannon_distance(one, one) == pytest.approx(0, abs=1e-7)
    there_and_on = jensen_shannon_distance(one, two) + jensen_shannon_distance(two, three_)
    assert jensen_shannon_distance(one, three_) <= there_and_on + 1e-7


# --- Over the rows


def test_the_slope_of_three_rows_is_the_one_worked_out_by_hand() -> None:
    # x - mean = -1 0 1: the slope is (last - first) / 2
    result = trend([[1, 7, 5], [1, 9, 1], [1, 11, 9]])
    assert result.slope.tolist() == [0, 2, 2]
    assert result.certain.tolist() == [False, True, False]


def test_one_or_two_rows_make_no_certain_trend() -> None:
    assert trend([[4, 5]]).slope.tolist() == [0, 0] and not trend([[4, 5]]).certain.any()
    assert trend([[4, 5], [6, 5]]).slope.tolist() == [2, 0] and not trend([[4, 5], [6, 5]]).certain.any()


@given(arrays.arrays(np.float64, st.tuples(st.integers(2, 40), st.integers(1, 4)), elements=st.floats(-1e4, 1e4)))
def test_slopes_are_those_of_a_least_squares_fit(values: np.ndarray) -> None:
    fitted = np.polyfit(np.arange(len(values)), values, 1)[0]
    assert trend(values).slope == pytest.approx(fitted, abs=1e-7)


@pytest.mark.parametrize("rows", [4, 6, 12, 40])
def test_chance_makes_a_trend_once_in_a_hundred_times(rows: int) -> None:
    noise = np.random.default_rng(rows).normal(size=(rows, 20_000))
    assert 0.002 < trend(noise).certain.mean() < 0.015
    assert trend(noise + np.arange(rows)[:, None] * 40 / rows).certain.mean() > 0.95


@pytest.mark.parametrize(("experts", "top_k"), [(6, 3), (8, 1), (5, 5)])
def test_chance_gives_counts_the_cv_that_drawing_experts_gives(experts: int, top_k: int) -> None:
    random, tokens = np.random.default_rng(0), 300
    picks = random.random((2000, tokens, experts)).argsort(-1)[..., :top_k].reshape(2000, -1)
    counts = np.stack([(picks == expert).sum(-1) for expert in range(experts)], -1)
    squares = (spread(counts).cv ** 2).mean()
    assert math.sqrt(squares) == pytest.approx(chance_cv(tokens * top_k, experts, top_k), rel=0.03, abs=1e-9)
