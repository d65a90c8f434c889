"""What counts say: of each part and layer, of train against validation, and what to try next."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switch_bank.balance.counts import Counts, CountsError, PartCounts
from switch_bank.balance.statistics import (
    COLD,
    HIGH_CV,
    HOT,
    STARVED,
    TREND_CHANGE,
    Floats,
    Spread,
    Verdict,
    chance_cv,
    fair_multiples,
    jensen_shannon_distance,
    shares,
    spread,
    trend,
    verdict,
)

MORE_UNEVEN = 0.01  # validation is more uneven where its CV is higher by more than this and than chance alone gives


@dataclass(frozen=True)
class LayerBalance:
    """One layer over the rows of a part. Arrays are [E]; lists hold experts by their number."""

    layer: int | None  # None: all layers summed, which is what one bank shared by them sees
    verdict: Verdict  # of the mean profile
    sums: NDArray[np.int64]  # over the rows
    means: Floats  # the mean profile: sums / rows
    fair_multiples: Floats  # means / their mean
    profile: Spread  # of the mean profile
    profile_chance_cv: float  # the CV that chance alone gives the mean profile
    rows: Spread  # of each row, averaged over the rows
    rows_chance_cv: float  # the CV that chance alone gives a row
    oscillates: bool  # rows have a high CV that their mean does not have: experts take turns
    cv_slope: float  # of a row's CV, per row
    hot: list[int]
    cold: list[int]
    starved: list[int]
    starved_rows: NDArray[np.int64]  # in how many rows the expert was starved
    slopes: Floats  # of an expert's count, per row
    rising: list[int]
    falling: list[int]


class Deviation(NamedTuple):
    """A row whose layer does not sum to what that layer's rows sum to mostly."""

    row: str
    layer: int
    sum: int


@dataclass(frozen=True)
class Consistency:
    """Whether every layer counts tokens x K picks in every row of a part."""

    row_sums: list[int]  # of each layer, the commonest one
    deviations: list[Deviation]
    tokens: int | None  # of a row: row_sums / K, if K is known and the sums agree
    problems: list[str]  # in words; empty if all is well


@dataclass(frozen=True)
class PartBalance:
    rows: list[str]  # their names
    consistency: Consistency
    layers: list[LayerBalance]
    together: LayerBalance
    verdict: Verdict  # the worst of the layers


@dataclass(frozen=True)
class LayerComparison:
    """A layer's mean profile in validation against the one in training."""

    layer: int
    differences: Floats  # [E]: share of the picks in validation minus the one in training
    distance: float  # Jensen-Shannon, base 2: 0 the same, 1 no expert in common
    cv_change: float  # validation minus training
    more_uneven: bool  # by more than one percentage point of CV, and more than chance alone gives validation
    newly_starved: list[int]  # starved in validation and not in training


@dataclass(frozen=True)
class Balance:
    source: str
    experts: list[int]
    top_k: int | None
    notes: list[str]
    parts: dict[str, PartBalance]
    comparison: list[LayerComparison] | None  # None without both train and val
    verdict: Verdict  # the worst of the parts
    advice: list[str]


def analyse(source: str, counts: Counts, top_k: int | None = None) -> Balance:
    """The whole analysis. top_k replaces the K that the counts came with.

    Raises CountsError if K is not in 1..E.
    """
    experts = counts.experts
    if top_k is None and counts.top_k is not None:
        top_k = min(counts.top_k, len(experts))  # with fewer active experts than K, a token picks each of them
    if top_k is not None and not 1 <= top_k <= len(experts):
        raise CountsError(f"K is {top_k} and there are {len(experts)} experts: K must be in 1..{len(experts)}")
    parts = {name: _part(part, counts.layers, experts, top_k) for name, part in counts.parts.items()}
    comparison = None
    if "train" in parts and "val" in parts:
        pairs = zip(parts["train"].layers, parts["val"].layers, strict=True)
        comparison = [_compare(train, val) for train, val in pairs]
    worst = _worst([part.verdict for part in parts.values()])
    return Balance(source, experts, top_k, counts.notes, parts, comparison, worst, advice(parts, comparison))


def _part(part: PartCounts, layers: list[int], experts: list[int], top_k: int | None) -> PartBalance:
    of_layers = [_layer(layer, part.counts[:, at], experts, top_k) for at, layer in enumerate(layers)]
    together = _layer(None, part.counts.sum(1), experts, top_k)
    worst = _worst([layer.verdict for layer in of_layers])
    return PartBalance(part.rows, check_sums(part, layers, experts, top_k), of_layers, together, worst)


def _layer(layer: int | None, counts: NDArray[np.int64], experts: list[int], top_k: int | None) -> LayerBalance:
    """counts: [R, E]."""

    def chosen(mask: NDArray[np.bool_]) -> list[int]:
        return [expert for expert, is_chosen in zip(experts, mask, strict=True) if is_chosen]

    means = counts.mean(0)
    multiples, fair = fair_multiples(counts.sum(0)), means.mean()
    profile, each_row = spread(means), spread(counts)
    over_rows = Spread(*(values.mean(0) for values in each_row))
    rows_chance = chance_cv(counts.sum() / len(counts), len(experts), top_k or 1)
    lines = trend(counts)
    moves = lines.certain & (np.abs(lines.slope) * (len(counts) - 1) >= TREND_CHANGE * fair)
    return LayerBalance(
        layer=layer,
        verdict=verdict(float(profile.cv), float(profile.max_min)),
        sums=counts.sum(0),
        means=means,
        fair_multiples=multiples,
        profile=profile,
        profile_chance_cv=chance_cv(counts.sum(), len(experts), top_k or 1),
        rows=over_rows,
        rows_chance_cv=rows_chance,
        oscillates=bool(over_rows.cv > max(HIGH_CV, 2 * rows_chance) and profile.cv <= HIGH_CV),
        cv_slope=float(trend(each_row.cv).slope),
        hot=chosen(multiples > HOT),
        cold=chosen(multiples < COLD),
        starved=chosen(multiples < STARVED),
        starved_rows=(fair_multiples(counts) < STARVED).sum(0),
        slopes=lines.slope,
        rising=chosen(moves & (lines.slope > 0)),
        falling=chosen(moves & (lines.slope < 0)),
    )


def check_sums(part: PartCounts, layers: list[int], experts: list[int], top_k: int | None) -> Consistency:
    """Whether all rows of a layer, and all layers, sum to the same: tokens x K."""
    sums = part.counts.sum(-1)  # [R, L]
    row_sums = [Counter(of_layer.tolist()).most_common(1)[0][0] for of_layer in sums.T]
    deviations = [
        Deviation(part.rows[row], layers[at], int(sums[row, at])) for row, at in np.argwhere(sums != row_sums)
    ]
    problems = []
    for layer, expected in zip(layers, row_sums, strict=True):
        own = [deviation for deviation in deviations if deviation.layer == layer]
        if own:
            problems.append(
                f"layer {layer}: {len(own)} of {len(sums)} rows do not sum to {expected}, the commonest sum; "
                f"the first is {own[0].row} with {own[0].sum}"
            )
    if len(set(row_sums)) > 1:
        low, high = np.argmin(row_sums), np.argmax(row_sums)
        problems.append(
            f"the layers do not agree: layer {layers[low]} sums to {row_sums[low]}, "
            f"layer {layers[high]} to {row_sums[high]}"
        )
        return Consistency(row_sums, deviations, None, problems)
    tokens = None
    if top_k is not None:
        if row_sums[0] % top_k:
            problems.append(f"{row_sums[0]} is not a multiple of K = {top_k}")
        else:
            tokens = row_sums[0] // top_k
            row, at, expert = np.unravel_index(part.counts.argmax(), part.counts.shape)
            if part.counts.max() > tokens:
                problems.append(
                    f"{part.rows[row]}, layer {layers[at]}: expert {experts[expert]} has {part.counts.max()} picks of "
                    f"{tokens} tokens: K cannot be {top_k}"
                )
    return Consistency(row_sums, deviations, tokens, problems)


def _compare(train: LayerBalance, val: LayerBalance) -> LayerComparison:
    assert train.layer is not None
    change = float(val.profile.cv - train.profile.cv)
    return LayerComparison(
        layer=train.layer,
        differences=shares(val.means) - shares(train.means),
        distance=float(jensen_shannon_distance(train.means, val.means)),
        cv_change=change,
        more_uneven=change > max(MORE_UNEVEN, val.profile_chance_cv),
        newly_starved=[expert for expert in val.starved if expert not in train.starved],
    )


def _worst(verdicts: list[Verdict]) -> Verdict:
    return max(verdicts, key=("balanced", "moderate", "high").index)


# --- What to try next


def advice(parts: dict[str, PartBalance], comparison: list[LayerComparison] | None) -> list[str]:
    """What to try next with this trainer, the most pressing first. It looks at training where there is any."""
    part = parts.get("train") or next(iter(parts.values()))
    layers, together = part.layers, part.together
    high = [layer for layer in layers if layer.verdict == "high"]
    found = []
    if any(each.consistency.problems for each in parts.values()):
        found.append("first see why the sums do not fit: dropped or masked tokens, or processes not summed up")
    if starved := [layer for layer in layers if layer.starved]:
        found.append(
            f"starved experts in {_names(starved)}: keep noise on their choice for longer "
            "(--schedule.gumbel-windows), or lower --optim.router-lr so that early winners do not keep all"
        )
    if together.starved:
        found.append(
            f"over all layers {len(together.starved)} of {len(together.sums)} experts starve: prune them late "
            f"(--schedule.prune-at STEP --schedule.prune-below {STARVED:g}) or train with fewer (--model.experts)"
        )
    if high and together.verdict != "high":
        found.append(
            f"{_names(high)} uneven, all layers together not: a shared bank may want that; "
            "--model.balance-scope bank asks for even loads over the bank only"
        )
    if high:
        found.append(
            "for more even layers: --model.balance aux with --model.cv-weight and --model.entropy-weight two to four "
            "times as high, or --model.balance bias (if it is on already: a higher --model.bias-step)"
        )
    if 0 < 3 * len(high) <= len(layers):
        found.append(
            f"only {_names(high)} of {len(layers)} layers are high: --model.layer-shape, --model.layer-peak and "
            "--model.balance-boost move the balance weight there"
        )
    if turning := [layer for layer in layers if layer.oscillates]:
        found.append(
            f"experts take turns in {_names(turning)}: lower --optim.router-lr (with --model.balance bias: "
            "--model.bias-step), or average over more tokens (--data.slices-per-step)"
        )
    if uneven := [layer for layer in comparison or [] if layer.more_uneven]:
        found.append(
            f"validation is more uneven than training in {_names(uneven)}: noise may hide it in training, end "
            "--schedule.gumbel-windows earlier; if it stays, the validation text asks for other experts"
        )
    if not found and part.verdict == "balanced":
        found.append(
            "nothing to repair; balance has its price: see whether half of --model.cv-weight and "
            "--model.entropy-weight lowers the validation loss"
        )
    elif not found:
        found.append(
            "moderate, and often good: compare validation losses before paying for more balance "
            "(--model.cv-weight, --model.entropy-weight)"
        )
    return found


def _names(layers: list[LayerBalance] | list[LayerComparison]) -> str:
    numbers = [str(layer.layer) for layer in layers[:8]]
    more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(numbers)}{more}"
