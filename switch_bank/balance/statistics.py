"""How evenly loads lie on experts: pure functions on numpy arrays, for `balance` and for a run's routing metrics.

Loads are what each of E experts got, as counts, shares or mean probabilities: [..., E], none negative, each [E] with a
sum above 0. The *fair load* is their mean: what each expert would get if all got the same.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Verdict = Literal["balanced", "moderate", "high"]  # from good to bad

HIGH_MAX_MIN = 2.0  # imbalance is high above this ratio of the largest to the smallest load ...
HIGH_CV = 0.20  # ... or above this coefficient of variation,
MODERATE_CV = 0.05  # moderate from here to there, and balanced below
HOT, COLD, STARVED = 1.2, 0.8, 0.25  # an expert above or below these multiples of its fair load
TREND_CHANGE = 0.05  # an expert rises or falls if its trend is certain and moves this share of its fair load


class Spread(NamedTuple):
    """How evenly loads [..., E] lie; each field is float64 [...]."""

    std: Floats  # over the experts, of the population (divided by E)
    cv: Floats  # coefficient of variation: std / mean
    max_min: Floats  # largest / smallest load; inf where an expert has none
    entropy: Floats  # of the shares, in nats
    entropy_gap: Floats  # (log E - entropy) / log E: 0 if all are the same, 1 if one has all; 0 with one expert
    usage: Floats  # share of the experts that have any load


def shares(loads: ArrayLike) -> Floats:
    """Loads [..., E] divided by their sums. Raises ValueError at a negative or non-finite load and at a sum of 0."""
    values = np.asarray(loads, dtype=np.float64)
    totals = values.sum(-1, keepdims=True)
    if not (np.isfinite(values).all() and (values >= 0).all() and (totals > 0).all()):
        raise ValueError("loads must be finite, none negative, and sum to more than 0 over the experts")
    return values / totals


def spread(loads: ArrayLike) -> Spread:
    """The Spread of loads [..., E]; raises ValueError as `shares` does."""
    share = shares(loads)
    values = np.asarray(loads, dtype=np.float64)
    std = values.std(-1)
    with np.errstate(divide="ignore"):
        max_min = values.max(-1) / values.min(-1)
    entropy = -_plogp(share, share).sum(-1)
    most = np.log(max(2, share.shape[-1]))
    gap = np.maximum(0.0, (np.log(share.shape[-1]) - entropy) / most)
    return Spread(std, std / values.mean(-1), max_min, entropy, gap, (share > 0).mean(-1))


def fair_multiples(loads: ArrayLike) -> Floats:
    """Loads [..., E] as multiples of the fair load; raises ValueError as `shares` does."""
    share = shares(loads)
    return share * share.shape[-1]


def verdict(cv: float, max_min: float) -> Verdict:
    """high: max_min above 2 or cv above 20%; moderate: cv from 5% to 20%; balanced: all else."""
    if max_min > HIGH_MAX_MIN or cv > HIGH_CV:
        return "high"
    return "moderate" if cv >= MODERATE_CV else "balanced"


def jensen_shannon_distance(one: ArrayLike, other: ArrayLike) -> Floats:
    """Distance of the shares of two loads [..., E], float64 [...]: 0 if they are the same, 1 if they share no expert.

    The square root of the Jensen-Shannon divergence to base 2 (Endres and Schindelin, 2003). Raises ValueError as
    `shares` does.
    """
    p, q = shares(one), shares(other)
    middle = (p + q) / 2
    divergence = (_plogp(p, p) - _plogp(p, middle) + _plogp(q, q) - _plogp(q, middle)).sum(-1) / (2 * np.log(2))
    return np.sqrt(np.maximum(0.0, divergence))


def chance_cv(picks: float, experts: int, top_k: int) -> float:
    """The CV that chance alone gives to counts of `picks` picks, `top_k` different experts a token, none preferred.

    A token picks an expert with probability p = K/E, so n tokens give it p·n ± √(n·p·(1-p)), and n = picks / K.
    """
    return float(np.sqrt((experts - top_k) / picks))


class Trend(NamedTuple):
    """The least-squares line through values [R, ...] over the row numbers 0..R-1; each field has the shape [...]."""

    slope: Floats  # change per row; 0 with one row
    certain: NDArray[np.bool_]  # chance alone gives such a slope about once in a hundred times, or less often


def trend(values: ArrayLike) -> Trend:
    """A slope is certain if it is more than 3 + 24 / (R - 2)² standard errors from 0, with at least three rows.

    That bound is close to the 1% quantiles of Student's t-distribution with R - 2 degrees of freedom, for any R but 3.
    """
    y = np.asarray(values, dtype=np.float64)
    rows = len(y)
    x = (np.arange(rows) - (rows - 1) / 2).reshape(-1, *[1] * (y.ndim - 1))
    y = y - y.mean(0)
    x_squares = float((x * x).sum()) or 1.0  # 0 with one row
    slope = (x * y).sum(0) / x_squares
    if rows < 3:
        return Trend(slope, np.zeros_like(slope, dtype=bool))
    error = np.sqrt(((y - x * slope) ** 2).sum(0) / (rows - 2) / x_squares)
    return Trend(slope, np.abs(slope) > (3 + 24 / (rows - 2) ** 2) * error)


def _plogp(weights: Floats, values: Floats) -> Floats:
    """weights · log(values), 0 where the weight is 0."""
    return weights * np.log(np.where(weights > 0, values, 1.0))
