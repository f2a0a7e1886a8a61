"""Intervals of rates, means and ratios from sums. Runs count as independent."""

from __future__ import annotations

import math

from scipy.special import ndtri

Z = float(ndtri(0.975))  # 95 %, two sides


def wilson(successes: float, n: float) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of a share (Wilson 1927, JASA 22:209); none where nothing was counted."""
    if not n:
        return None, None
    share, z2 = successes / n, Z * Z
    centre, spread = share + z2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = (centre - spread) / (1 + z2 / n), (centre + spread) / (1 + z2 / n)
    return (0.0 if successes == 0 else max(0.0, low)), (1.0 if successes == n else min(1.0, high))


def mean(total: float, squares: float, n: float) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of a mean from the sum, the sum of squares and how many; none for fewer than two."""
    if n < 2:
        return None, None
    from scipy.special import stdtrit

    centre = total / n
    variance = max(0.0, squares / n - centre * centre) * n / (n - 1)
    spread = float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n)
    return centre - spread, centre + spread


def fieller(
    costs: float, squares: float, costs_of_successes: float, successes: float, n: float
) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of all costs over the number of successes (Fieller 1954, JRSS B 16:175).

    Args:
        costs: their sum over all `n` runs, those that failed included; `squares` is the sum of their squares.
        costs_of_successes: the part of the sum that successful runs cost.

    Returns:
        None where it has no upper end: too few runs succeeded to say.
    """
    if n < 2 or not successes:
        return None, None
    x, y, k = costs / n, successes / n, Z * Z / (n - 1)
    a = y * y - k * y * (1 - y)
    b = x * y - k * (costs_of_successes / n - x * y)
    c = x * x - k * max(0.0, squares / n - x * x)
    inside = b * b - a * c
    if a <= 0 or inside < 0:
        return None, None
    return max(0.0, (b - math.sqrt(inside)) / a), (b + math.sqrt(inside)) / a
