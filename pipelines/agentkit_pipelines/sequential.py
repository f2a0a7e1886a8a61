"""Is a stream worse than its baseline? Asked at every look, for ever, with at most `alpha` false alarms in all.

Observations lie in [0, 1] and come in blocks of time; what one session or user did within a block is one observation, the mean
of its runs. The null says that whatever happened before, an observation's mean is at most `q` = baseline + floor; it may vary
below that.

1. *Stream.* A bet gains 1 + λ(x - q) on an observation x. Under the null no bet gains on average, whatever λ: the product is a
   nonnegative supermartingale and exceeds 1/α with probability at most α, ever (Ville 1939). Betting on bounded means:
   Waudby-Smith and Ramdas (2023), JRSS B 86:1. The bets are spread over sizes λ and over the block at which the change
   began, with weights that sum to one, as in a Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo 2023, NEJSDS 2:2), which
   bounds how often there are false alarms; spending one unit bounds whether there ever is one.
2. *Baseline.* Its rate is known from a finite sample. Each cell of a grid over the possible rates gets an e-value that
   the baseline gives against "the rate is at least the cell's lower end" (Clopper-Pearson p-values, calibrated: Vovk and Wang
   2021, Annals of Statistics 49:1736), times the stream's for the cell's upper end. The evidence is the smallest product: the
   true rate lies in one of the cells, and there the product is an e-process.
3. *Amounts* with any tail: how often they exceed quantiles of the baseline, after they were divided by the ratio that is
   allowed. The exceedance probability of an order statistic has the same law as in 2, so it needs no moments.
4. *What blocks have in common* (hours of the day, users who come back, a level that drifts) shows as variance between blocks of
   the baseline, at any scale of which it holds four, beyond that within. By this factor evidence is tempered: its power 1/φ is an
   e-process, too (Jensen). φ is an estimate: evidence tempered by it is no proof as 1 to 3 are, and a level that drifts
   beyond the floor is against the null whatever φ is.

All figures here are natural logarithms of e-values unless said otherwise. Nothing depends on when somebody looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainccinv, betaln, chdtri, logsumexp, ndtr  # type: ignore[import-untyped, unused-ignore]

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
_GRID = np.linspace(
    0, 1, 33
)  # means of clusters are split between their neighbours here: never adds evidence (concavity)
_BETS = 0.9 * 0.5 ** np.arange(10)  # sizes λ, times 1/q
_Z = np.arange(0, 6.01, 0.25)  # edges of the cells above the baseline's rate, in standard errors
_SHIFTS = np.arange(5.0)  # of the calibrator: a mixture of normal likelihood ratios
_RICH = 1e100  # more evidence is not counted
_AT_ONCE, _FLAT = 0.3, 30  # weight of a change at the very start; blocks after which the weights begin to fall
_SCALES = (1, 2, 4, 8, 12, 24, 48, 168)  # blocks
_GROUPS = 4  # the fewest that say something about variance: the weeks of the usual baseline
_CAUTION = 0.05  # chance that a baseline without any such variance shows some, per scale


@dataclass(frozen=True, slots=True)
class Blocks:
    """Observations by block: `at` their numbers, ascending; `counts[b, i]` how many lie at the i-th point of the grid."""

    at: Integers
    counts: Array

    @property
    def sums(self) -> Array:
        return np.asarray(self.counts @ _GRID)

    @property
    def sizes(self) -> Array:
        return np.asarray(self.counts.sum(1))

    def since(self, first: int) -> Blocks:
        """From the `first`-th block on."""
        return Blocks(self.at[first:], self.counts[first:])

    def until(self, end: int) -> Blocks:
        """The first `end` blocks."""
        return Blocks(self.at[:end], self.counts[:end])

    def flipped(self) -> Blocks:
        """Of 1 - x."""
        return Blocks(self.at, self.counts[:, ::-1])


class Grouping:
    """Which runs are one observation: those of one cluster in one block. Give the block and a cluster id of each run."""

    def __init__(self, block: ArrayLike, cluster: ArrayLike) -> None:
        at, place = np.unique(np.asarray(block, dtype=np.int64), return_inverse=True)
        _, code = np.unique(np.asarray(cluster), return_inverse=True)
        pairs, self._code = np.unique(place * np.int64(code.max() + 1 if len(code) else 1) + code, return_inverse=True)
        self._at, self._place = at, pairs // (code.max() + 1 if len(code) else 1)
        self._size = np.bincount(self._code, minlength=len(pairs))

    @property
    def weights(self) -> Array:
        """Of each run, so that every observation has weight one."""
        return np.asarray(1.0 / self._size[self._code])

    def blocks(self, values: ArrayLike) -> Blocks:
        """The observations of one value per run, in [0, 1]; NaN is unknown."""
        x = np.asarray(values, dtype=float)
        known = ~np.isnan(x)
        number = np.bincount(self._code, known, len(self._size))
        kept = number > 0
        mean = np.bincount(self._code, np.where(known, x, 0.0), len(self._size))[kept] / number[kept]
        scaled = mean * (len(_GRID) - 1)
        low = np.minimum(scaled.astype(np.int64), len(_GRID) - 2)
        cell, up = self._place[kept] * len(_GRID) + low, scaled - low
        counts = np.bincount(cell, 1 - up, self._at.size * len(_GRID))
        counts += np.bincount(cell + 1, up, self._at.size * len(_GRID))
        counts = counts.reshape(-1, len(_GRID))
        present = counts.sum(1) > 0
        return Blocks(self._at[present], counts[present])


@dataclass(frozen=True, slots=True)
class Reference:
    """What a baseline says of its rate.

    `edges` are its upper confidence bounds at 0 to 6 standard errors; `dispersion` is φ: how much more blocks vary than
    independent observations would; `effective` how many independent yes-or-no observations it is worth.
    """

    rate: float
    observations: float
    effective: float
    dispersion: float
    edges: Array

    def interval(self, alpha: float) -> tuple[float, float]:
        """Two-sided, at level 1 - alpha (Clopper and Pearson 1934)."""
        k, n = self.rate * self.effective, self.effective
        low = 1 - float(betainccinv(n - k + 1, k, alpha / 2)) if k > 0 else 0.0
        return low, float(betainccinv(k + 1, n - k, alpha / 2)) if k < n else 1.0


def reference(baseline: Blocks) -> Reference:
    """Raises ValueError without any observation."""
    n, rate, variance, ratio = _moments(baseline)
    phi = _dispersion(baseline, rate, variance)
    effective = n * ratio / phi
    k = rate * effective
    edges = betainccinv(k + 1, effective - k, ndtr(-_Z)) if effective - k > 1e-9 else np.ones_like(_Z)
    return Reference(rate, n, effective, phi, np.asarray(edges))


def _moments(baseline: Blocks) -> tuple[float, float, float, float]:
    """Number, mean and variance, with one made-up observation at each end; and how much less it is than of yes or no."""
    counts = baseline.counts.sum(0)
    n = float(counts.sum())
    if not n:
        raise ValueError("expected a baseline with observations; found none")
    rate = float(counts @ _GRID) / n
    padded = (rate * n + 1) / (n + 2)
    variance = (float(counts @ (_GRID - padded) ** 2) + (1 - padded) ** 2 + padded**2) / (n + 2)
    return n, rate, variance, padded * (1 - padded) / variance


def _dispersion(baseline: Blocks, rate: float, variance: float) -> float:
    """φ: the largest over all scales of the variance between groups of blocks over that within, where it is proven.

    Then all of it counts: its lower bound would leave out most of what a few weeks show.
    """
    worst = 1.0
    for scale in _SCALES:
        _, group = np.unique(baseline.at // scale, return_inverse=True)
        sizes, sums = np.bincount(group, baseline.sizes), np.bincount(group, baseline.sums)
        if len(sizes) < _GROUPS:
            break
        excess = float(((sums - sizes * rate) ** 2 / (sizes * variance)).sum())
        if excess > chdtri(len(sizes) - 1, _CAUTION):
            worst = max(worst, excess / (len(sizes) - 1))
    return worst


def weights(count: int) -> Array:
    """How the one unit is spread over the block at which a change begins: the first `count` weights; all sum to one."""
    steps = 1 / np.log(np.arange(count + 1) + _FLAT)
    later = (1 - _AT_ONCE) * (steps[:-1] - steps[1:]) * math.log(_FLAT)
    if count:
        later[0] += _AT_ONCE
    return np.asarray(later)


def _calibrated(z: Array) -> Array:
    """The e-value of a p-value, given as its normal score."""
    return np.asarray(logsumexp(np.multiply.outer(z, _SHIFTS) - _SHIFTS**2 / 2, axis=-1) - math.log(len(_SHIFTS)))


@dataclass(frozen=True, slots=True)
class Wager:
    """The bets on one stream: evidence after each block, the cell that decides it, and what each bet gains per block."""

    evidence: Array
    cell: Integers
    gains: Array  # of block, cell and size of bet

    def onset(self, at: int) -> int:
        """The place in the stream of the block from which on a bet gained most of the evidence that block `at` shows."""
        cell = min(int(self.cell[at]), self.gains.shape[1] - 1)
        to_come = np.cumsum(self.gains[at::-1, cell], axis=0)[::-1]
        return int(np.argmax((np.log(weights(at + 1))[:, None] + to_come).max(1)))


def against(baseline: Reference, stream: Blocks, floor: float = 0.0) -> Wager:
    """Bets that the stream's mean is more than `floor` above the baseline's rate."""
    limits = np.minimum(baseline.edges + floor, 1.0)
    prior = np.concatenate([[-math.log(len(_SHIFTS))], _calibrated(_Z)])
    return _wager(stream, limits, prior[:-1], prior[-1], baseline.dispersion)


def below(limit: float, stream: Blocks, dispersion: float) -> Wager:
    """Bets that the stream's mean is less than `limit`."""
    return _wager(stream.flipped(), np.array([1 - limit]), np.zeros(1), math.inf, dispersion)


def _wager(stream: Blocks, limits: Array, prior: Array, most: float, dispersion: float) -> Wager:
    sizes = _BETS / np.maximum(limits, 1e-9)[:, None]
    factors = np.log1p(sizes * (_GRID[:, None, None] - limits[:, None]))  # grid, cell, bet
    blocks, shape = len(stream.at), factors.shape[1:]
    gains = (stream.counts @ factors.reshape(len(_GRID), -1) / dispersion).reshape(blocks, *shape)
    share, money, held = weights(blocks), np.empty((blocks, shape[0])), np.zeros(shape)
    with np.errstate(over="ignore"):
        factor = np.exp(gains)
        for b in range(blocks):
            held = np.minimum((held + share[b]) * factor[b], _RICH)
            money[b] = held.mean(1)
    money += (1 - np.cumsum(share))[:, None]
    money[:, limits >= 1] = 1.0  # no mean is above one: nothing to bet on
    money = np.log(money) + prior
    money = np.column_stack([money, np.full(blocks, most)])
    cell = money.argmin(1)
    return Wager(money[np.arange(blocks), cell], cell, gains)


# ---- episodes


@dataclass(frozen=True, slots=True)
class Episode:
    """A stream was worse from `onset` on, as was known after block `alarm`; and no longer, as known after `recovered`.

    Blocks by their place in the stream; `series` is the one that gave most of the evidence.
    """

    series: int
    onset: int
    alarm: int
    recovered: int | None


@dataclass(frozen=True, slots=True)
class Series:
    """A stream beside its baseline, and how much worse it may be. All series of one measure have the same blocks."""

    name: str
    baseline: Reference
    stream: Blocks
    floor: float = 0.0


def watch(series: Sequence[Series], threshold: float) -> tuple[list[Episode], Array]:
    """When one measure was degraded, and the evidence after each block; `threshold` is ln(1/α).

    The evidence is the mean over its series. After an alarm bets go the other way; when they have won, all begins anew.
    """
    length = len(series[0].stream.at)
    evidence, found, start = np.zeros(length), [], 0
    while start < length:
        wagers = [against(s.baseline, s.stream.since(start), s.floor) for s in series]
        each = np.stack([w.evidence for w in wagers])
        evidence[start:] = logsumexp(each, axis=0) - math.log(len(series))
        if not (evidence[start:] >= threshold).any():
            break
        alarm = int(np.argmax(evidence[start:] >= threshold))
        leading = int(np.argmax(each[:, alarm]))
        onset = start + wagers[leading].onset(alarm)
        recovered = _recovery(series[leading], onset, start + alarm, threshold)
        found.append(Episode(leading, onset, start + alarm, recovered))
        if recovered is None:
            break
        start = recovered + 1
    return found, evidence


def _recovery(series: Series, onset: int, alarm: int, threshold: float) -> int | None:
    bad = Blocks(series.stream.at[onset : alarm + 1], series.stream.counts[onset : alarm + 1])
    allowed = series.baseline.rate + series.floor
    limit = max(allowed, (allowed + float(bad.sums.sum() / bad.sizes.sum())) / 2)
    after = series.stream.since(alarm + 1)
    won = (
        below(min(limit, 1.0), after, series.baseline.dispersion).evidence >= threshold
        if len(after.at)
        else np.zeros(0)
    )
    return alarm + 1 + int(np.argmax(won)) if won.any() else None


# ---- confidence sequences


def confidence_sequence(sums: ArrayLike, sizes: ArrayLike, alpha: float) -> tuple[Array, Array]:
    """Bounds of the mean of observations in [0, 1] that hold at all times together, at level 1 - alpha.

    Beta-binomial mixture (Robbins 1970, Annals of Mathematical Statistics 41:1397). `sums` and `sizes` are of all
    observations until then, divided by the dispersion.
    """
    k, n = np.asarray(sums, dtype=float), np.asarray(sizes, dtype=float)
    needed = betaln(k + 0.5, n - k + 0.5) - betaln(0.5, 0.5) + math.log(alpha)
    rate = np.where(n > 0, k / np.where(n > 0, n, 1), 0.5)
    return _edge(k, n, needed, rate, 0.0), _edge(k, n, needed, rate, 1.0)


def _edge(k: Array, n: Array, needed: Array, inside: Array, outside: float) -> Array:
    far = np.full_like(inside, outside)
    for _ in range(50):
        middle = (inside + far) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            fits = np.where(k > 0, k * np.log(middle), 0) + np.where(n > k, (n - k) * np.log1p(-middle), 0) > needed
        inside, far = np.where(fits, middle, inside), np.where(fits, far, middle)
    return np.asarray(far)


def quantile_ranks(level: float, size: float, alpha: float) -> tuple[float, float]:
    """Shares of a sample between whose order statistics the true quantile lies, at all times, at level 1 - alpha.

    A share of 0 or above 1: on that side there is no bound. The sample has `size` observations, divided by the dispersion. Howard and Ramdas (2022), Bernoulli 28:1704.
    """
    k = np.linspace(0, size, 2001)
    excess = betaln(k + 0.5, size - k + 0.5) - betaln(0.5, 0.5) - k * math.log(level) - (size - k) * math.log1p(-level)
    inside = k[excess < -math.log(alpha)]
    return float(inside.min() / size), float((inside.max() + 1) / size)
