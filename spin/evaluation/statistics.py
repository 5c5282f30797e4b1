"""Means with standard errors, and tests of whether two models differ."""

import math
from collections.abc import Mapping, Sequence

METRICS = ("acc", "acc_norm", "exact_match", "exact_match_flexible", "exact_match_sampled", "logp")


def means(rows: Sequence[Mapping]) -> dict[str, float]:
    """Mean and standard error ("<metric>_stderr") of each metric that the rows have."""
    result = {}
    for metric in METRICS:
        if metric in rows[0]:
            result[metric], result[f"{metric}_stderr"] = mean_and_stderr([row[metric] for row in rows])
    return result


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error from the sample's standard deviation (n - 1), as in the harness."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def pooled(means: Sequence[float], errors: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Mean over the documents of several tasks; standard error of the pooled variance, as in the harness."""
    total = sum(sizes)
    mean = sum(mean * size for mean, size in zip(means, sizes)) / total
    if total == len(sizes):
        return mean, float("nan")
    squares = sum((size - 1) * size * error**2 for error, size in zip(errors, sizes) if size > 1)
    return mean, math.sqrt(squares / (total - len(sizes)) / total)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of McNemar's exact test, in which each pair that differs is a win with probability 1/2."""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_test(differences: Sequence[float]) -> float:
    """Two-sided p that paired differences have mean 0, by the normal distribution."""
    mean, error = mean_and_stderr(differences)
    if not error > 0:
        return 1.0 if mean == 0 else 0.0
    return math.erfc(abs(mean) / error / math.sqrt(2))
