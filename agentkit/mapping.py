"""Runs a frame of inputs through a system, in parallel, one row out per row in."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from agentkit.budget import Ledger
from agentkit.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from agentkit.records import RunRecord
    from agentkit.systems import System

T = TypeVar("T")
U = TypeVar("U")
_OWN = ("route", "state", "error", "cost_usd", "latency_s", "run_id")


def default_workers(system: System) -> int:
    """1 for the in-process model, which threads only slow down (one interpreter lock); 8 for a provider's."""
    return 1 if all(lm.model.startswith("embedded/") for lm in system.models()) else 8


def in_parallel(work: Callable[[T], U], items: Iterable[T], workers: int) -> Iterator[tuple[int, U]]:
    """(index, result) as results come in. Bounded: holds at most `4 * workers` items at a time.

    Each call sees a copy of the caller's context variables. Closing the iterator drops what has not begun.
    """
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        yield from ((i, work(item)) for i, item in enumerate(items))
        return
    numbered = enumerate(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="agentkit") as pool:
        running: dict[Future[U], int] = {}

        def start(count: int) -> None:
            for i, item in islice(numbered, count):
                running[pool.submit(copy_context().run, work, item)] = i

        try:
            start(4 * workers)
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
                start(len(done))
        finally:
            for future in running:
                future.cancel()


def progress_bar(items: Iterable[T], total: int, title: str, show: bool | None = None) -> Iterator[T]:
    """`items` with a rich progress bar (in terminals, Jupyter and papermill logs); `show` None means when long."""
    if show is False or (show is None and total < 2):
        yield from items
        return
    from importlib.util import find_spec

    from rich.console import Console
    from rich.progress import track

    # In a notebook without ipywidgets rich would warn at every refresh.
    console = Console(stderr=True, force_jupyter=None if find_spec("ipywidgets") else False)
    yield from track(items, total=total, description=title, console=console, transient=False)


def map_frame(
    system: System,
    frame: pl.DataFrame,
    *,
    workers: int | None = None,
    progress: bool | None = None,
    kind: str = "map",
    ledger: Ledger | None = None,
) -> pl.DataFrame:
    """Run every row of `frame` through `system`.

    Args:
        frame: has a column per required input; other columns are carried along. A null in an optional input stands
            for the default.
        workers: threads; see `default_workers`.
        ledger: a budget shared by all rows.

    Returns:
        The frame's columns (prefixed `input_` where they have one of the last names), then one per output field
        (prefixed `output_` where the name is taken), then route, state, error, cost_usd, latency_s (seconds) and
        run_id. A failed row has null outputs and its error.

    Raises:
        UsageError: a required input has no column.
    """
    names, required = system.input_names()
    if missing := sorted(required - set(frame.columns)):
        raise UsageError(f"{system.name} needs the columns {sorted(required)!r}; missing: {missing!r}")
    inputs = [c for c in frame.columns if not names or c in names]
    rows = [
        {name: value for name, value in row.items() if value is not None or name in required or not names}
        for row in frame.select(inputs).to_dicts()
    ]
    workers = default_workers(system) if workers is None else workers
    finished = in_parallel(lambda row: system.run(kind=kind, ledger=ledger, **row), rows, workers)
    records: list[RunRecord | None] = [None] * len(rows)
    for i, record in progress_bar(finished, len(rows), system.name, progress):
        records[i] = record
    return with_results(frame, [r for r in records if r is not None])


def with_results(frame: pl.DataFrame, records: list[RunRecord]) -> pl.DataFrame:
    """`frame` (one row per record) beside what the records say; columns as in `map_frame`."""
    import polars as pl

    kept = frame.rename({name: _free(name, "input_", frame.columns) for name in frame.columns if name in _OWN})
    fields = dict.fromkeys(name for r in records for name in r.output or {})
    columns: dict[str, Any] = {}
    for name in fields:
        values = pl.Series([(r.output or {}).get(name) for r in records], strict=False)
        columns[_free(name, "output_", {*kept.columns, *_OWN, *(fields.keys() - {name}), *columns})] = values
    columns |= {
        "route": pl.Series([r.route for r in records], dtype=pl.String),
        "state": pl.Series([r.state for r in records], dtype=pl.String),
        "error": pl.Series([r.error for r in records], dtype=pl.String),
        "cost_usd": pl.Series([None if math.isnan(r.usd) else r.usd for r in records], dtype=pl.Float64),
        "latency_s": pl.Series([r.seconds for r in records], dtype=pl.Float64),
        "run_id": pl.Series([r.run_id for r in records], dtype=pl.String),
    }
    return kept.with_columns([series.alias(name) for name, series in columns.items()])


def _free(name: str, prefix: str, taken: Collection[str]) -> str:
    while name in taken:
        name = prefix + name
    return name
