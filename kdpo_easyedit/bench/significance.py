"""How sure a figure is: intervals, and paired tests between methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap, permutation_test

from .schema import MEASURES, PairedTest

_Z = 1.959963984540054  # of the normal distribution, for 95 %


def share_interval(percentages: Sequence[float]) -> list[float]:
    """The 95 % confidence interval of a mean share, in percent: Wilson's score interval.

    Unlike the bootstrap's it is right at the ends: 100 of 100 is 96.3 to 100. An edit's share may be a mean over prompts and
    tokens, which varies less than yes and no would; n is then the number of such answers that vary as much,
    n p (1 − p) / s² (the effective sample size of a survey), with s² the variance over the edits. Where fewer than five edits
    differ from all or from nothing, they tell no such variance, and n is at most the edits' number.
    """
    values = np.asarray(percentages) / 100
    n, p = len(values), values.mean()
    variance = values.var(ddof=1)
    if variance > 0 and 0 < p < 1:
        effective = n * p * (1 - p) / variance
        known = min(np.count_nonzero(values < 1), np.count_nonzero(values > 0)) >= 5
        n = effective if known else min(n, effective)
    spread = _Z**2 / n
    centre, half = (p + spread / 2) / (1 + spread), np.sqrt(spread * (p * (1 - p) + spread / 4)) / (1 + spread)
    return [round(float(100 * end), 4) for end in np.clip((centre - half, centre + half), 0, 1)]


def mean_interval(values: Sequence[float], resamples: int = 1000, centre: Callable[..., Any] = np.mean) -> list[float]:
    """The 95 % confidence interval of a mean, or of another ``centre``, by bootstrap."""
    drawn = bootstrap((values,), centre, n_resamples=resamples, method="percentile", rng=np.random.default_rng(0))
    return [round(float(end), 4) for end in drawn.confidence_interval]


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], resamples: int = 1000) -> list[float]:
    """The 95 % confidence interval of one sum by another, by bootstrap over what they are sums of."""
    drawn = np.random.default_rng(0).integers(len(numerators), size=(resamples, len(numerators)))
    ratios = np.asarray(numerators)[drawn].sum(axis=1) / np.asarray(denominators)[drawn].sum(axis=1)
    return [float(end) for end in np.percentile(ratios, [2.5, 97.5])]


def joint_interval(
    columns: Sequence[Sequence[float | None]], centre: Callable[[Any], float] = np.mean, resamples: int = 1000
) -> list[float]:
    """The 95 % confidence interval of the mean, or another ``centre``, of several columns' means, by bootstrap over the edits.

    Args:
        columns: a measure each, over the same edits; None where an edit has none.
    """
    table = np.array([[np.nan if value is None else value for value in column] for column in columns])
    table = table[~np.isnan(table).all(axis=1)]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        some = table[:, rng.integers(table.shape[1], size=table.shape[1])]
        counts = (~np.isnan(some)).sum(axis=1)
        if counts.all():
            drawn.append(float(centre(np.nansum(some, axis=1) / counts)))
    return [round(float(end), 4) for end in np.percentile(drawn, [2.5, 97.5])]


def paired_tests(values: Mapping[tuple[str, str], Mapping[str, Sequence[float | None]]]) -> list[PairedTest]:
    """Every method held against KDPO, or against the first one where KDPO is not there, under the same protocol.

    Args:
        values: of every method and protocol, as :func:`per_edit` gives them, over the same edits.
    """
    found = []
    for protocol in dict.fromkeys(protocol for _, protocol in values):
        rows = {method: of for (method, its), of in values.items() if its == protocol}
        against = "KDPO" if "KDPO" in rows else next(iter(rows))
        others = [method for method in rows if method != against]
        for measure in MEASURES:
            pairs = {method: zip(rows[method][measure], rows[against][measure], strict=True) for method in others}
            differences = {
                method: [a - b for a, b in both if a is not None and b is not None] for method, both in pairs.items()
            }
            p_values = {method: _p_value(of) for method, of in differences.items() if of}
            for method, corrected in _holm(p_values).items():
                of = differences[method]
                mean = round(float(np.mean(of)), 4)
                found.append(PairedTest(protocol, measure, method, against, len(of), mean, p_values[method], corrected))
    return found


def _p_value(differences: Sequence[float]) -> float:
    """Of a mean difference, two-sided, by flipping signs: in all ways where few differ, else in 9999 at random."""
    moved = [difference for difference in differences if difference]  # the sign of nothing makes no difference
    if len(moved) < 2:
        return 1.0
    rng = np.random.default_rng(0)
    test = permutation_test((moved,), np.sum, permutation_type="samples", vectorized=True, batch=1000, rng=rng)
    return round(float(test.pvalue), 6)


def _holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction of p-values of one family; in the order they come in."""
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = round(least, 6)
    return {name: corrected[name] for name in p_values}
