"""Whether what comes in, and where it is sent, still looks like the golden set, or like the time before.

Every distance stands beside the one that two samples of these sizes show when nothing differs: labels are shuffled between
the two, so `p` is exact whatever the distributions are. A golden set is drawn to cover rare cases, not to be like
the traffic: look at the change over time, more than at the level.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

if TYPE_CHECKING:
    from agentkit.examples import Example
    from agentkit_tracking.operations.page import Page

Array = NDArray[np.float64]
SHUFFLES = 999
_ROUTE_SHUFFLES = 9_999  # there are more buckets to correct for, and they are cheap
_ALPHA = 0.05  # of all comparisons of a look together


@dataclass(frozen=True)
class Drift:
    """What the runs of a page were compared with, and what came of it.

    `against` is None where there is nothing to compare with; `why_not_golden` says why it is not the golden set. Frames are None
    where one of the two sides has nothing of the kind. `live` and `others` are the inputs that were compared; `blank` names
    those texts whose wording was not, since there is none.
    """

    against: Literal["golden", "before"] | None
    why_not_golden: str = ""
    routes: pl.DataFrame | None = None  # as of `route_drift`
    inputs: pl.DataFrame | None = None  # as of `input_drift`
    live: int = 0
    others: int = 0
    blank: tuple[str, ...] = ()


def drift_of(page: Page, golden: Sequence[Example], keep: Callable[[Any], Any]) -> Drift:
    """Compare the system that a page sampled with its golden set; where none fits, with as long a time before.

    Args:
        golden: none where none was found.
        keep: what is done to inputs before they are logged (`runlog.events.payloads()`), so that both sides had it done.
    """
    live = [json.loads(text) for text in page.sample]
    names = {name for row in live for name in row}
    wanted = [keep({"inputs": example.inputs}).get("inputs") or {} for example in golden]
    taken = page.routes.filter(pl.col("system") == page.sampled_system)
    against: Literal["golden", "before"] = "golden"
    expected = routes_expected(golden, taken["route"].unique().to_list()) if golden else None
    why = ""
    if not golden or not names & {name for row in wanted for name in row}:
        told = ", ".join(sorted(names)) or "(none kept)"
        why = f"the golden set that was found has none of the inputs {told}" if golden else ""
        against, expected = "before", page.routes_before or None
        wanted = [json.loads(text) for text in page.sample_before]
        if not expected and not wanted:
            return Drift(None, why)
    return Drift(
        against,
        why,
        route_drift(taken, expected) if expected and taken.height else None,
        input_drift(live, wanted) if live and wanted else None,
        len(live),
        len(wanted),
        tuple(name for name, a, b in _shared(live, wanted) if a and b and _are_blank([*a, *b])),
    )


def routes_expected(golden: Sequence[Example], taken: Sequence[str]) -> dict[str, int] | None:
    """How often the golden set expects each route: of the expected values the one called `route`, else the one whose values
    have most in common with the routes that were really `taken`. None where nothing has."""
    columns: dict[str, list[str]] = {}
    for example in golden:
        for name, value in example.expected.items():
            if isinstance(value, str):
                columns.setdefault(name, []).append(value)
    if "route" in columns:
        return dict(Counter(columns["route"]))
    alike = {name: len(set(v) & set(taken)) / len(set(v) | set(taken)) for name, v in columns.items()}
    best = max(alike, key=lambda name: (alike[name], name), default=None)
    return None if best is None or not alike[best] else dict(Counter(columns[best]))


def route_drift(routes: pl.DataFrame, expected: dict[str, int], *, seed: int = 0) -> pl.DataFrame:
    """Jensen–Shannon distance (0: alike, 1: no route in common) of the routes of runs from those that are expected.

    Args:
        routes: `at`, `route`, `runs` of one system.
        expected: how often the golden set expects each, or each was taken before.

    Returns:
        A row a bucket: `at`, `distance`, `by_chance` (what 95 % of samples of these sizes from one distribution stay below),
        `p`, `is_drift` (p after Holm's correction for all buckets is below 5 %), `runs`.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for (at,), part in routes.group_by("at", maintain_order=True):
        counts = dict(part.select("route", "runs").iter_rows())
        names = sorted(counts.keys() | expected.keys())
        live, golden = (np.array([c.get(name, 0) for name in names], dtype=np.int64) for c in (counts, expected))
        distance = float(_jensen_shannon(live, golden))
        drawn = rng.multivariate_hypergeometric(
            live + golden, int(live.sum()), size=_ROUTE_SHUFFLES, method="marginals"
        )
        shuffled = _jensen_shannon(drawn, live + golden - drawn)
        rows.append((at, distance, float(np.quantile(shuffled, 0.95)), _p(shuffled, distance), int(live.sum())))
    schema = {
        "at": pl.Datetime("us", "UTC"),
        "distance": pl.Float64,
        "by_chance": pl.Float64,
        "p": pl.Float64,
        "runs": pl.Int64,
    }
    return _judged(_frame(rows, schema)).select("at", "distance", "by_chance", "p", "is_drift", "runs").sort("at")


def _jensen_shannon(one: Any, other: Any) -> Any:
    p, q = (x / x.sum(-1, keepdims=True) for x in (one, other))
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = sum(np.where(x > 0, x * np.log2(x / m), 0.0).sum(-1) / 2 for x in (p, q))
    return np.sqrt(np.maximum(divergence, 0.0))


def input_drift(live: Sequence[dict[str, Any]], golden: Sequence[dict[str, Any]], *, seed: int = 0) -> pl.DataFrame:
    """How well logged inputs can be told from golden (or earlier) ones: the area under the ROC curve, 0.5 (not at all) to 1 (always).

    Each of two halves is judged by what the other one teaches (a classifier two-sample test: Lopez-Paz and Oquab 2017,
    arXiv:1610.06545): of texts by which set's character n-grams are nearer, of numbers and lengths by their size.

    Returns:
        A row a feature (`FIELD: wording`, `FIELD: length`, `FIELD: value`): `auc`, `by_chance` (95 % of shuffles stay
        below), `p`, `is_drift` (as of routes), `live` and `golden` cases. No row where the two share no input name, nor for the
        wording of texts that are all blank.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for name, a, b in _shared(live, golden):
        for feature, score in _features(name, a, b):
            if min(len(a), len(b)) < 8:
                continue
            auc, shuffled = _told_apart(score, len(a), len(b), rng)
            rows.append((feature, auc, float(np.quantile(shuffled, 0.95)), _p(shuffled, auc), len(a), len(b)))
    numbers = dict.fromkeys(("auc", "by_chance", "p"), pl.Float64)
    frame = _judged(_frame(rows, {"feature": pl.String, **numbers, "live": pl.Int64, "golden": pl.Int64}))
    return frame.select("feature", "auc", "by_chance", "p", "is_drift", "live", "golden").sort(
        "auc", "feature", descending=[True, False]
    )


def _shared(live: Sequence[dict[str, Any]], golden: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any], list[Any]]]:
    """The inputs that both have, with the values of each."""
    names = {key for row in golden for key in row} & {key for row in live for key in row}
    return [(name, _values(live, name), _values(golden, name)) for name in sorted(names)]


def _values(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows if row.get(name) is not None]


def _are_blank(values: Sequence[Any]) -> bool:
    return all(isinstance(v, str) and not v.split() for v in values)


def _frame(rows: list[tuple[Any, ...]], schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame({name: [row[i] for row in rows] for i, name in enumerate(schema)}, schema=schema)


Score = Callable[[NDArray[np.bool_], NDArray[np.bool_]], Array]


def _features(name: str, live: list[Any], golden: list[Any]) -> list[tuple[str, Score]]:
    both = [*live, *golden]
    if all(v == both[0] for v in both):
        return []
    if all(isinstance(v, bool | int | float) for v in both):
        return [(f"{name}: value", _by_size([float(v) for v in both]))]
    texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, sort_keys=True) for v in both]
    lengths = [float(len(text)) for text in texts]
    of_length = [(f"{name}: length", _by_size(lengths))] if len(set(lengths)) > 1 else []
    of_wording = [] if _are_blank(both) else [(f"{name}: wording", _by_wording(texts))]
    return [*of_wording, *of_length]


def _by_size(values: list[float]) -> Score:
    column = np.asarray(values)[:, None]

    def score(is_live: NDArray[np.bool_], teaches: NDArray[np.bool_]) -> Array:
        """Larger is more like a live one, where live ones are larger among those that teach."""
        means = [
            (column * (teaches[:, None] & kind)).sum(0) / (teaches[:, None] & kind).sum(0)
            for kind in (is_live, ~is_live)
        ]
        return np.asarray(column * np.where(means[0] >= means[1], 1.0, -1.0))

    return score


def _by_wording(texts: list[str]) -> Score:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, max_features=50_000
    ).fit_transform(texts)
    near = np.asarray((vectors @ vectors.T).todense(), dtype=np.float64)

    def score(is_live: NDArray[np.bool_], teaches: NDArray[np.bool_]) -> Array:
        own, other = (teaches[:, None] & kind for kind in (is_live, ~is_live))
        return np.asarray(near @ (own / own.sum(0)) - near @ (other / other.sum(0)))

    return score


def _told_apart(score: Score, live: int, golden: int, rng: np.random.Generator) -> tuple[float, Array]:
    """The AUC as it is, and with labels shuffled."""
    n = live + golden
    half = np.zeros(n, dtype=bool)
    for group in (np.arange(live), np.arange(live, n)):
        half[rng.permutation(group)[: len(group) // 2]] = True
    truth = np.arange(n) < live
    labels = np.empty((n, SHUFFLES + 1), dtype=bool)
    labels[:, 0] = truth
    for part in (half, ~half):  # within halves, so that both keep their numbers
        labels[part, 1:] = rng.permuted(np.repeat(truth[part][:, None], SHUFFLES, axis=1), axis=0)
    areas = np.zeros(SHUFFLES + 1)
    for part in (half, ~half):
        areas += _area(score(labels, ~part)[part], labels[part]) / 2
    return float(areas[0]), areas[1:]


def _area(scores: Array, is_live: NDArray[np.bool_]) -> Array:
    """The area under the ROC curve, a column each; ties count half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.broadcast_to(scores, is_live.shape), axis=0)
    ones = is_live.sum(0)
    return np.asarray(((ranks * is_live).sum(0) - ones * (ones + 1) / 2) / (ones * (len(is_live) - ones)))


def _p(shuffled: Array, found: float) -> float:
    return float((1 + (shuffled >= found - 1e-12).sum()) / (len(shuffled) + 1))


def _judged(frame: pl.DataFrame) -> pl.DataFrame:
    """With `is_drift`: Holm (1979), Scandinavian J. Statistics 6:65, over all rows."""
    m = frame.height
    order = np.argsort(frame["p"].to_numpy(), kind="stable")
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(np.maximum.accumulate((m - np.arange(m)) * frame["p"].to_numpy()[order]), 1)
    return frame.with_columns(pl.Series("is_drift", adjusted < _ALPHA))
