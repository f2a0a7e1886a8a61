"""A release over a file of inputs, journalled row by row, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import polars as pl

from agentkit.budget import Budget, Ledger
from agentkit.errors import BudgetExceeded, DataError, UsageError
from agentkit.examples import sha256_of
from agentkit.mapping import default_workers, in_parallel, with_results
from agentkit.records import RunRecord
from agentkit.systems import System
from agentkit_tracking import loading, registry
from agentkit_tracking.home import write_whole
from agentkit_tracking.rules import is_production

Progress = Callable[[int, int], None]


def read_table(path: Path) -> pl.DataFrame:
    """A CSV, Parquet or JSONL file as a frame; CSV columns stay text, so that ids keep their zeros.

    Raises:
        DataError: no such file, another format, or not readable as what its name says.
    """
    readers: dict[str, Callable[[], pl.DataFrame]] = {
        ".csv": lambda: pl.read_csv(path, infer_schema=False),
        ".parquet": lambda: pl.read_parquet(path),
        ".jsonl": lambda: pl.read_ndjson(path, infer_schema_length=None),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected a file ending in {', '.join(readers)}")
    try:
        return reader()
    except (OSError, pl.exceptions.PolarsError) as e:
        raise DataError(f"{path} cannot be read: {str(e).splitlines()[0]}") from e


def run_batch(
    reference: str,
    source: Path,
    target: Path,
    *,
    id_column: str = "id",
    workers: int | None = None,
    max_usd: float | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Run every row of `source` that has no result yet and write all results to `target` (Parquet).

    Until all rows are done, each finished one is kept in a journal beside the target. A restart goes on from there
    with the release that the first start resolved, and refuses a source that has changed meanwhile. `trust` as in
    `agentkit_tracking.load`.

    Returns:
        The source's columns with `release` and those of `agentkit.mapping.map_frame`, in the source's order.

    Raises:
        DataError: unreadable or empty source, or ids missing or not unique.
        UsageError: the target is not Parquet, the journal beside it belongs to another source or release, or another
            process is at it.
        BudgetExceeded: `max_usd` was reached; what is done stays and a restart with a higher limit goes on.
    """
    if target.suffix != ".parquet":
        raise UsageError(f"the target must end in .parquet; got {target}")
    frame = read_table(source)
    _check_ids(frame, id_column, source)
    folder = target.with_name(target.name + ".parts")
    system, release = _pinned_release(reference, folder, source, id_column, trust)
    rows = _inputs(system, frame)
    ids = frame[id_column].cast(pl.String).to_list()
    ledger = Ledger(Budget(None, None, None, None, max_usd, None))
    with _Journal(folder / "rows.jsonl") as journal:
        todo = [(key, row) for key, row in zip(ids, rows, strict=True) if key not in journal.done]

        def work(item: tuple[str, dict[str, Any]]) -> None:
            key, row = item
            record = system.run(kind="batch", ledger=ledger, **row)
            if max_usd is not None and (record.error or "").startswith(f"BudgetExceeded: budget of {max_usd:g} usd"):
                raise BudgetExceeded("usd", max_usd, ledger.used["usd"], 0.0)
            journal.append(key, record)

        for _ in in_parallel(work, todo, workers or default_workers(system)):
            if progress is not None:
                progress(len(journal.done), len(ids))
        records = [journal.done[key] for key in ids]
    named = frame.rename({"release": "input_release"} if "release" in frame.columns else {})
    result = with_results(named.with_columns(release=pl.lit(release)), records)
    scratch = target.with_name(f".{target.name}.tmp")
    result.write_parquet(scratch)
    os.replace(scratch, target)
    shutil.rmtree(folder)
    return result


def _check_ids(frame: pl.DataFrame, id_column: str, source: Path) -> None:
    if id_column not in frame.columns:
        raise DataError(f"{source} has no column {id_column!r} (it has {', '.join(frame.columns)}); name the id column")
    ids = frame[id_column]
    if ids.is_empty():
        raise DataError(f"{source} has no rows")
    if ids.null_count() or ids.n_unique() < len(ids):
        twice = ids.drop_nulls().filter(ids.drop_nulls().is_duplicated()).head(1).to_list()
        raise DataError(
            f"{source}: ids in {id_column!r} must be present and unique; {ids.null_count()} missing, e.g. twice: {twice}"
        )


def _pinned_release(reference: str, folder: Path, source: Path, id_column: str, trust: bool) -> tuple[System, str]:
    """The release that the batch began with; on the first start, what `reference` resolves to."""
    pin, digest = folder / "batch.json", sha256_of(source)
    began: dict[str, Any] = json.loads(pin.read_text()) if pin.is_file() else {}
    if began and (began["source_sha256"], began["id_column"]) != (digest, id_column):
        raise UsageError(f"{folder} holds a started batch over another file; delete it to begin anew")
    # An alias may have moved since; a folder is what it is.
    if began and not Path(reference).is_dir():
        fetched, manifest = loading.fetch_promoted(registry.resolve(began["release"]), trust=trust)
    else:
        fetched, manifest = loading.fetch(reference, trust=trust)
    if began and began["release"] != manifest.release_id:
        raise UsageError(f"{folder} holds a started batch of another release; delete it to begin anew")
    if not began:
        folder.mkdir(parents=True, exist_ok=True)
        stage = "production" if is_production(reference.partition("@")[2]) else "draft"
        began = {"release": manifest.release_id, "source_sha256": digest, "id_column": id_column, "stage": stage}
        write_whole(pin, json.dumps(began).encode())
    system = loading.load_folder(fetched, manifest)
    system.stage = began.get("stage", "draft")
    return system, manifest.release_id


def _inputs(system: System, frame: pl.DataFrame) -> list[dict[str, Any]]:
    """What each row is run with, as in `agentkit.mapping.map_frame`: a null in an optional input is its default."""
    names, required = system.input_names()
    if missing := sorted(required - set(frame.columns)):
        raise UsageError(f"{system.name} needs the columns {sorted(required)!r}; missing: {missing!r}")
    rows = frame.select(c for c in frame.columns if not names or c in names).to_dicts()
    return [{k: v for k, v in row.items() if v is not None or k in required or not names} for row in rows]


class _Journal:
    """Finished rows, one line each, written as they finish; a line torn by a kill is passed over."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.done: dict[str, RunRecord] = {}

    def __enter__(self) -> _Journal:
        self._file = open(self._path, "ab+")
        try:
            _lock_file(self._file, self._path)
            self._file.seek(0)
            for line in self._file:
                self._read(line)
            self._file.write(b"\n")  # ends a torn line
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, key: str, record: RunRecord) -> None:
        """Keep a finished row; it will not be run again."""
        kept = replace(record, steps=[], result=None)  # the run log has the steps
        line = b"[%b,%b]\n" % (orjson.dumps(key), kept.to_json())
        with self._lock:
            self._file.write(line)
            self._file.flush()
            self._read(line)  # so that results are the same with and without a restart

    def _read(self, line: bytes) -> None:
        try:
            key, record = orjson.loads(line)
        except orjson.JSONDecodeError:
            return
        usd = math.nan if record["usd"] is None else record["usd"]
        self.done[key] = RunRecord(**{**record, "usd": usd})


def _lock_file(file: BinaryIO, path: Path) -> None:
    """Hold the journal while the process lives. Only where there is `fcntl`: on POSIX systems."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise UsageError(f"another process is at this batch ({path.parent}); wait for it or stop it") from e
