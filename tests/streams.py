"""Runs of invented traffic for the monitor's tests and benchmark: by hour, with sessions, users, rhythms and long tails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

FAILURES = 0.05
Hours = NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """Runs of one service. `shape` gives each run's hour, cluster and what multiplies its chance to fail."""

    shape: Callable[[np.random.Generator, Hours], tuple[Hours, Hours, NDArray[np.float64]]]
    tail: str = "lognormal"  # of costs; or "pareto", without a variance
    in_sessions: bool = False  # the log says so

    def runs(
        self, rng: np.random.Generator, first: int, hours: int, failures: float = FAILURES, dearer: float = 1.0,
        onset: int = 0,
    ) -> pl.DataFrame:  # fmt: skip
        """Hours from `first` on; from the `onset`-th of them failures and costs are as given, before as ever."""
        at, cluster, factor = self.shape(rng, np.arange(first, first + hours))
        late = at >= first + onset
        chance = np.clip(factor * np.where(late, failures, FAILURES), 0, 1)
        cost = rng.lognormal(0, 1, len(at)) if self.tail == "lognormal" else rng.pareto(1.1, len(at)) + 0.1
        return pl.DataFrame(
            {
                "block": at,
                "cluster": cluster,
                "is_session": self.in_sessions,
                "failure": (rng.random(len(at)) < chance).astype(float),
                "cost": cost * np.where(late, dearer, 1.0),
            }
        )


def independent(per_hour: float = 20.0) -> Traffic:
    """Nobody comes twice."""

    def shape(rng: np.random.Generator, hours: Hours) -> tuple[Hours, Hours, NDArray[np.float64]]:
        at = np.repeat(hours, rng.poisson(per_hour, len(hours)))
        return at, np.arange(len(at)), np.ones(len(at))

    return Traffic(shape)


def heavy_tailed() -> Traffic:
    """Costs without a variance."""
    return Traffic(independent().shape, "pareto")


def growing() -> Traffic:
    """From 5 runs an hour to 60 in five weeks, and on."""

    def shape(rng: np.random.Generator, hours: Hours) -> tuple[Hours, Hours, NDArray[np.float64]]:
        at = np.repeat(hours, rng.poisson(5 * 12 ** np.minimum(hours / 840, 1.5)))
        return at, np.arange(len(at)), np.ones(len(at))

    return Traffic(shape)


def daily() -> Traffic:
    """By day nine times the runs of the night, and failures from 2 to 8 %."""

    def shape(rng: np.random.Generator, hours: Hours) -> tuple[Hours, Hours, NDArray[np.float64]]:
        wave = np.sin(2 * np.pi * hours / 24)
        at = np.repeat(hours, rng.poisson(20 * (1 + 0.8 * wave)))
        return at, np.arange(len(at)), (1 + 0.6 * np.sin(2 * np.pi * at / 24)) / 1.24

    return Traffic(shape)


def sessions(hours_long: float = 1.0, alike: float = 0.3, *, told: bool = True) -> Traffic:
    """Sessions of four runs on average, or of two an hour for some hours, that fail alike (intraclass correlation)."""

    def shape(rng: np.random.Generator, hours: Hours) -> tuple[Hours, Hours, NDArray[np.float64]]:
        began = np.repeat(hours, rng.poisson(5 / hours_long, len(hours)))
        if hours_long <= 1:
            length = rng.geometric(0.25, len(began))
            at, who = np.repeat(began, length), np.repeat(np.arange(len(began)), length)
        else:
            length = rng.geometric(1 / hours_long, len(began))
            who = np.repeat(np.arange(len(began)), 2 * length)
            nth = np.arange(len(who)) - np.repeat(np.cumsum(2 * length) - 2 * length, 2 * length)
            at = np.repeat(began, 2 * length) + nth // 2
        return at, who, _alike(rng, len(began), alike)[who]

    return Traffic(shape, in_sessions=told)


def users(count: int = 200, alike: float = 0.1, seed: int = 0) -> Traffic:
    """The same users over and over, a few of them most of the time, some with more failures than others."""
    own = np.random.default_rng(seed)
    share = 1 / np.arange(1, count + 1)
    share /= share.sum()
    factor = _alike(own, count, alike)

    def shape(rng: np.random.Generator, hours: Hours) -> tuple[Hours, Hours, NDArray[np.float64]]:
        at = np.repeat(hours, rng.poisson(20, len(hours)))
        who = rng.choice(count, len(at), p=share)
        return at, who, factor[who]

    return Traffic(shape)


def drifting(hours_long: int, spread: float, seed: int = 0) -> Traffic:
    """A level that is another every so many hours, lognormal about FAILURES, for baseline and stream alike."""
    own = np.random.default_rng([seed, hours_long])
    began = own.integers(hours_long)
    level = own.lognormal(-(spread**2) / 2, spread, 2_000)

    def shape(rng: np.random.Generator, hours: Hours) -> tuple[Hours, Hours, NDArray[np.float64]]:
        at = np.repeat(hours, rng.poisson(20, len(hours)))
        return at, np.arange(len(at)), level[(at + began) // hours_long]

    return Traffic(shape)


def _alike(rng: np.random.Generator, count: int, alike: float) -> NDArray[np.float64]:
    """Factors of mean one such that a chance of FAILURES varies with the given intraclass correlation."""
    size = 1 / alike - 1
    return rng.beta(FAILURES * size, (1 - FAILURES) * size, count) / FAILURES


TRAFFIC = {
    "independent": independent(),
    "sessions": sessions(),
    "sessions over hours": sessions(4, 0.2),
    "users for some hours": sessions(4, 0.2, told=False),
    "returning users": users(),
    "growing volume": growing(),
    "daily rhythm": daily(),
    "heavy-tailed costs": heavy_tailed(),
}
# Beyond what the null allows, so no alarm is a false one there; hours for which a level lasts, spread of its logarithm.
DRIFTS = {
    "another level every week, spread 0.3": (168, 0.3),
    "another level every day, spread 0.3": (24, 0.3),
    "another level every 4 hours, spread 0.5": (4, 0.5),
}
