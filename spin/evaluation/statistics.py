"""Means with their errors, and whether two models differ."""

import math
from collections.abc import Sequence


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the standard error from the sample's standard deviation (n - 1), as lm-evaluation-harness has
    it.
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def pooled(means: Sequence[float], errors: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Mean over all documents of several tasks, and its standard error from the pooled variance, as the
    harness has it.
    """
    total = sum(sizes)
    mean = sum(mean * size for mean, size in zip(means, sizes)) / total
    if total == len(sizes):
        return mean, float("nan")
    squares = sum((size - 1) * size * error**2 for error, size in zip(errors, sizes) if size > 1)
    return mean, math.sqrt(squares / (total - len(sizes)) / total)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so uneven a split of the pairs that differ, if either way were as likely: McNemar's
    exact test.
    """
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_test(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of paired differences, if it were 0, by the normal distribution."""
    mean, error = mean_and_stderr(differences)
    if not error > 0:
        return 1.0 if mean == 0 else 0.0
    return math.erfc(abs(mean) / error / math.sqrt(2))
