"""What is said of counts: small tables worked out by hand, and a large one against plain loops."""

import dataclasses
import math
import re
import statistics as stdlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from switch_bank.balance.analysis import Balance, LayerBalance, analyse
from switch_bank.balance.counts import Counts, CountsError, PartCounts
from switch_bank.config import presets


def counts_of(**parts: list) -> Counts:
    """counts_of(train=[R, L, E], ...)"""
    arrays_ = {name: np.array(rows, dtype=np.int64) for name, rows in parts.items()}
    shape = next(iter(arrays_.values())).shape
    named = {name: PartCounts([f"row {r + 1}" for r in range(len(rows))], rows) for name, rows in arrays_.items()}
    return Counts(named, list(range(shape[1])), list(range(shape[2])), None, [])


def of_one_layer(rows: list[list[int]], top_k: int | None = None) -> LayerBalance:
    return analyse("a test", counts_of(all=[[row] for row in rows]), top_k).parts["all"].layers[0]


def test_a_layer_of_two_rows_is_as_worked_out_by_hand() -> None:
    layer = of_one_layer([[2, 4, 2, 8], [6, 4, 6, 0]])
    assert layer.sums.tolist() == [8, 8, 8, 8] and layer.means.tolist() == [4, 4, 4, 4]
    assert layer.fair_multiples.tolist() == [1, 1, 1, 1] and layer.slopes.tolist() == [4, 0, 4, -8]
    assert (layer.profile.std, layer.profile.cv, layer.profile.max_min, layer.verdict) == (0, 0, 1, "balanced")
    # each row deviates by 2 0 2 4 from 4: a standard deviation of √6, a CV of √6 / 4
    assert layer.rows.std == pytest.approx(math.sqrt(6)) and layer.rows.cv == pytest.approx(math.sqrt(6) / 4)
    assert layer.rows.max_min == math.inf and layer.rows.usage == 0.875
    assert layer.starved_rows.tolist() == [0, 0, 0, 1]
    # chance: 16 picks by 16 tokens of 1 among 4: √(3/16) a row, √(3/32) over both
    assert layer.rows_chance_cv == pytest.approx(math.sqrt(3) / 4)
    assert layer.profile_chance_cv == pytest.approx(math.sqrt(3 / 32))


def test_hot_cold_and_starved_experts_are_named() -> None:
    layer = of_one_layer([[100, 120, 121, 80, 79, 25, 24, 251]])  # fair: 100
    assert (layer.hot, layer.cold, layer.starved) == ([2, 7], [4, 5, 6], [6])
    assert layer.profile.max_min == pytest.approx(251 / 24) and layer.verdict == "high"


def test_experts_that_take_turns_oscillate_and_lasting_imbalance_does_not() -> None:
    assert of_one_layer([[700, 300], [300, 700]] * 10).oscillates
    assert not of_one_layer([[700, 300], [700, 300]] * 10).oscillates  # the mean shows it
    assert not of_one_layer([[3, 1], [1, 3]] * 10).oscillates  # four picks: chance does that


def test_a_trend_is_named_if_it_is_certain_and_moves_something() -> None:
    up, noise = np.arange(20), np.array([100, -100] * 10)  # the noise has a slope of -1.5
    layer = of_one_layer(np.stack([100 + up, 200 - up, 300 + noise, 10_000 + 0 * up], -1).tolist())
    assert layer.slopes[[0, 1, 3]].tolist() == pytest.approx([1, -1, 0])
    assert layer.rising == [] and layer.falling == []  # 19 picks are little beside a fair load of 2,650
    layer = of_one_layer(np.stack([100 + up, 200 - up, 300 + noise, 250 + 0 * up], -1).tolist())
    assert layer.rising == [0] and layer.falling == [1]


def test_the_slope_of_cv_tells_whether_a_layer_becomes_less_even() -> None:
    rows = [[100 + 10 * step, 100 - 10 * step] for step in range(4)]  # CV 0, 10%, 20%, 30%
    assert of_one_layer(rows).cv_slope == pytest.approx(0.1)
    assert of_one_layer(rows[::-1]).cv_slope == pytest.approx(-0.1)


def test_layers_are_summed_as_a_shared_bank_sees_them() -> None:
    part = analyse("a test", counts_of(all=[[[9, 1], [1, 9]]])).parts["all"]
    assert part.verdict == "high" and part.together.verdict == "balanced"
    assert part.together.sums.tolist() == [10, 10] and part.together.layer is None


def test_the_verdict_is_that_of_the_worst_layer_and_part() -> None:
    even, middling, high = [100, 100], [110, 90], [170, 30]
    for train, val, worst in (([even], [even], "balanced"), ([middling], [even], "moderate"), ([even], [high], "high")):
        assert analyse("a test", counts_of(train=[train], val=[val])).verdict == worst
    assert analyse("a test", counts_of(train=[[even, high, middling]])).parts["train"].verdict == "high"


# --- Consistency


def test_equal_sums_are_consistent_and_give_the_tokens() -> None:
    check = analyse("a test", counts_of(train=[[[3, 2, 1], [2, 2, 2]]] * 3), 3).parts["train"].consistency
    assert (check.row_sums, check.deviations, check.tokens, check.problems) == ([6, 6], [], 2, ["row 1, layer 0: "
        "expert 0 has 3 picks of 2 tokens: K cannot be 3"])  # fmt: skip
    check = analyse("a test", counts_of(train=[[[3, 2, 1], [2, 2, 2]]] * 3), 2).parts["train"].consistency
    assert (check.tokens, check.problems) == (3, [])
    check = analyse("a test", counts_of(train=[[[3, 2, 1], [2, 2, 2]]] * 3)).parts["train"].consistency
    assert (check.tokens, check.problems) == (None, [])


def test_rows_that_do_not_sum_to_the_same_are_named() -> None:
    rows = [[[4, 6], [5, 5]], [[4, 6], [5, 4]], [[4, 6], [5, 5]], [[4, 6], [6, 5]], [[4, 6], [5, 5]]]
    check = analyse("a test", counts_of(train=rows), 1).parts["train"].consistency
    assert check.row_sums == [10, 10] and check.tokens == 10
    assert [tuple(deviation) for deviation in check.deviations] == [("row 2", 1, 9), ("row 4", 1, 11)]
    assert check.problems == ["layer 1: 2 of 5 rows do not sum to 10, the commonest sum; the first is row 2 with 9"]


def test_layers_that_do_not_agree_are_named() -> None:
    check = analyse("a test", counts_of(train=[[[4, 6], [5, 5], [5, 4]]] * 2), 1).parts["train"].consistency
    assert check.problems == ["the layers do not agree: layer 2 sums to 9, layer 0 to 10"]
    assert check.deviations == [] and check.tokens is None


def test_a_sum_that_k_does_not_divide_is_named() -> None:
    check = analyse("a test", counts_of(train=[[[4, 6, 1]]]), 2).parts["train"].consistency
    assert check.problems == ["11 is not a multiple of K = 2"] and check.tokens is None


def test_train_and_validation_may_have_different_numbers_of_tokens() -> None:
    balance = analyse("a test", counts_of(train=[[[4, 6]]], val=[[[40, 60]]]), 1)
    assert [part.consistency.tokens for part in balance.parts.values()] == [10, 100]
    assert not any(part.consistency.problems for part in balance.parts.values())


@pytest.mark.parametrize("top_k", [0, -1, 3])
def test_k_must_fit_the_experts(top_k: int) -> None:
    with pytest.raises(CountsError, match=f"^K is {top_k} and there are 2 experts: K must be in 1..2$"):
        analyse("a test", counts_of(train=[[[4, 6]]]), top_k)


def test_a_run_with_fewer_active_experts_than_k_picks_them_all() -> None:
    counts = dataclasses.replace(counts_of(train=[[[8, 8]]]), top_k=4)
    balance = analyse("a test", counts)
    assert balance.top_k == 2 and balance.parts["train"].consistency.tokens == 8


# --- Train against validation


def test_validation_is_held_against_training_as_worked_out_by_hand() -> None:
    train, val = [[500, 500], [500, 500]], [[5000, 5000], [9000, 1000]]
    balance = analyse("a test", counts_of(train=[train, train], val=[val]))
    assert balance.comparison is not None
    same, other = balance.comparison
    assert same.differences.tolist() == [0, 0] and (same.distance, same.cv_change) == (0, 0)
    assert not same.more_uneven
    assert other.differences == pytest.approx([0.4, -0.4]) and other.cv_change == pytest.approx(0.8)
    assert other.more_uneven and other.newly_starved == [1]
    # middle (0.7, 0.3); half of KL((.5, .5), m) + half of KL((.9, .1), m), in bits
    first = 0.5 * math.log2(0.5 / 0.7) + 0.5 * math.log2(0.5 / 0.3)
    second = 0.9 * math.log2(0.9 / 0.7) + 0.1 * math.log2(0.1 / 0.3)
    assert other.distance == pytest.approx(math.sqrt((first + second) / 2))


def test_what_chance_explains_is_not_more_uneven() -> None:
    few = analyse("a test", counts_of(train=[[[500, 500]]], val=[[[53, 47]]])).comparison
    many = analyse("a test", counts_of(train=[[[500, 500]]], val=[[[5300, 4700]]])).comparison
    assert few is not None and many is not None
    assert few[0].cv_change == many[0].cv_change == pytest.approx(0.06)
    assert not few[0].more_uneven and many[0].more_uneven


def test_without_both_parts_nothing_is_compared() -> None:
    assert analyse("a test", counts_of(all=[[[1, 2]]])).comparison is None
    assert analyse("a test", counts_of(val=[[[1, 2]]])).comparison is None


# --- Whole tables


def test_a_table_of_dozens_of_rows_agrees_with_plain_loops() -> None:
    """36 rows of 12 layers and 6 experts, 3 of them for each of 512 tokens."""
    random = np.random.default_rng(0)
    scores = (
        random.gumbel(size=(36, 12, 512, 6)) + random.normal(size=(12, 1, 6)) * np.linspace(0, 1, 12)[:, None, None]
    )
    picks = scores.argsort(-1)[..., 3:].reshape(36, 12, -1)
    table = np.stack([(picks == expert).sum(-1) for expert in range(6)], -1)
    part = analyse("a test", counts_of(train=table.tolist()), 3).parts["train"]
    assert part.consistency.tokens == 512 and part.consistency.problems == []
    for at, layer in enumerate(part.layers):
        rows = table[:, at].tolist()
        columns = [list(column) for column in zip(*rows, strict=True)]
        means = [stdlib.fmean(column) for column in columns]
        assert layer.sums.tolist() == [sum(column) for column in columns] and layer.means.tolist() == means
        assert layer.profile.cv == pytest.approx(stdlib.pstdev(means) / stdlib.fmean(means))
        assert layer.profile.max_min == pytest.approx(max(means) / min(means))
        assert layer.rows.std == pytest.approx(stdlib.fmean(stdlib.pstdev(row) for row in rows))
        assert layer.rows.cv == pytest.approx(stdlib.fmean(stdlib.pstdev(row) / 256 for row in rows))
        assert layer.hot == [expert for expert, mean in enumerate(means) if mean > 1.2 * 256]
        assert layer.starved_rows.tolist() == [sum(count < 64 for count in column) for column in columns]
        slopes = [stdlib.linear_regression(range(36), column).slope for column in columns]
        assert layer.slopes == pytest.approx(slopes, abs=1e-9)
    assert {layer.verdict for layer in part.layers} == {"balanced", "moderate", "high"}


tables = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(2, 6)).flatmap(
    lambda shape: arrays.arrays(np.int64, shape, elements=st.integers(1, 1000))
)


def figures(balance: Balance) -> list[LayerBalance]:
    return [*balance.parts["train"].layers, balance.parts["train"].together]


@given(tables, st.data())
def test_renaming_the_experts_renames_them_in_the_result(table: np.ndarray, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(table.shape[2])))
    before = figures(analyse("a test", counts_of(train=table.tolist())))
    after = figures(analyse("a test", counts_of(train=table[..., order].tolist())))
    for one, two in zip(before, after, strict=True):
        assert two.sums.tolist() == one.sums[order].tolist()
        assert two.slopes == pytest.approx(one.slopes[order], abs=1e-9)
        assert two.profile == pytest.approx(one.profile, abs=1e-12) and two.rows == pytest.approx(one.rows, abs=1e-12)
        assert two.verdict == one.verdict and two.oscillates == one.oscillates
        for name in ("hot", "cold", "starved"):
            assert [order[expert] for expert in getattr(two, name)] == sorted(getattr(one, name), key=list(order).index)


@given(tables, st.integers(2, 50))
def test_more_tokens_of_the_same_kind_change_no_relative_figure(table: np.ndarray, factor: int) -> None:
    before = figures(analyse("a test", counts_of(train=table.tolist())))
    after = figures(analyse("a test", counts_of(train=(factor * table).tolist())))
    for one, two in zip(before, after, strict=True):
        assert two.sums.tolist() == (factor * one.sums).tolist()
        assert two.slopes == pytest.approx(factor * one.slopes, abs=1e-6)
        assert two.profile.cv == pytest.approx(one.profile.cv) and two.rows.cv == pytest.approx(one.rows.cv)
        assert two.fair_multiples == pytest.approx(one.fair_multiples) and two.cv_slope == pytest.approx(one.cv_slope)
        assert two.verdict == one.verdict


# --- Advice


def advice_for(**parts: list) -> str:
    return "\n".join(analyse("a test", counts_of(**parts)).advice)


def test_advice_is_about_what_is_there() -> None:
    even, uneven, other, starved = [[100, 100]], [[160, 40]], [[40, 160]], [[195, 5]]
    assert advice_for(train=[even]).startswith("nothing to repair")
    assert advice_for(train=[[[110, 90]]]).startswith("moderate, and often good")
    assert advice_for(train=[uneven]).startswith("for more even layers: --model.balance aux")
    assert advice_for(train=[starved]).startswith("starved experts in layer 0: ")
    assert "over all layers 1 of 2 experts starve" in advice_for(train=[starved])
    assert "layers 0, 1 uneven, all layers together not" in advice_for(train=[uneven + other])
    assert "only layer 2 of 4 layers are high" in advice_for(train=[even * 2 + uneven + even])
    assert "experts take turns in layer 0" in advice_for(train=[[[700, 300]], [[300, 700]]])
    assert advice_for(train=[even, [[100, 101]]]).startswith("first see why the sums do not fit")
    many = [[1000, 1000]]
    assert "validation is more uneven than training in layer 0" in advice_for(train=[many], val=[[[1200, 800]]])


def test_advice_names_only_options_that_the_trainer_has() -> None:
    uneven = [[[160, 40], [100, 100], [100, 100]], [[195, 5], [100, 100], [100, 100]]]
    said = [
        advice_for(train=[[[100, 100]]]),
        advice_for(train=[[[110, 90]]]),
        advice_for(train=uneven, val=[[[199, 1], [199, 1], [199, 1]]]),
        advice_for(train=[[[700, 300]], [[300, 700]]]),
        advice_for(train=[[[195, 5]]]),
        advice_for(train=[[[160, 40], [40, 160]]]),
    ]
    options = set(re.findall(r"--([a-z]+)\.([a-z-]+)", "\n".join(said)))
    assert len(options) > 10
    for group, option in options:
        assert hasattr(getattr(presets["nano"], group), option.replace("-", "_")), (group, option)
