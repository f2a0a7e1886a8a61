"""A release over a file of inputs, saved in parts, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from agentkit.budget import Budget, Ledger
from agentkit.errors import BudgetExceeded, DataError, UsageError
from agentkit.examples import sha256_of
from agentkit.mapping import map_frame
from agentkit_tracking import registry

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
    chunk: int = 100,
    max_usd: float | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Run every row of `source` that has no result yet and write all results to `target` (Parquet).

    Parts are kept beside the target until all rows are done, each written whole. A restart uses the release that the
    first start resolved, and refuses a source that has changed meanwhile.

    Returns:
        The source's columns with those of `agentkit.mapping.map_frame` and `release`, in the source's order.

    Raises:
        DataError: unreadable source, or ids missing or not unique.
        UsageError: the target is not Parquet, or the parts beside it belong to another source.
        BudgetExceeded: `max_usd` was reached; what is done stays and a restart with a higher limit goes on.
    """
    if target.suffix != ".parquet" or chunk < 1:
        raise UsageError(f"the target must end in .parquet and chunk be at least 1; got {target} and {chunk}")
    frame = read_table(source)
    _check_ids(frame, id_column, source)
    parts = target.with_name(target.name + ".parts")
    folder, manifest = registry.fetch(reference)
    began = _pinned(parts, manifest.release_id, source, id_column)
    if began != manifest.release_id:  # the alias moved since the batch began
        folder, manifest = registry.fetch(began)
    system = registry.load_folder(folder, manifest)
    done = _done(parts, id_column)
    todo = frame.filter(~pl.col(id_column).cast(pl.String).is_in(done.to_list()))
    ledger = Ledger(Budget(None, None, None, None, max_usd, None))
    for start in range(0, len(todo), chunk):
        rows = map_frame(system, todo[start : start + chunk], workers=workers, progress=False, kind="batch", ledger=ledger)
        stopped = pl.col("error").str.starts_with(f"BudgetExceeded: budget of {max_usd:g} usd") if max_usd is not None else pl.lit(False)
        kept = rows.filter(~stopped.fill_null(False)).with_columns(release=pl.lit(manifest.release_id))
        if len(kept):
            _write(kept, parts / f"part-{len(list(parts.glob('part-*'))):05d}.parquet")
        if len(kept) < len(rows):
            raise BudgetExceeded("usd", max_usd or 0.0, ledger.used["usd"], 0.0)
        if progress is not None:
            progress(len(done) + min(start + chunk, len(todo)), len(frame))
    return _finish(frame, parts, target, id_column)


def _check_ids(frame: pl.DataFrame, id_column: str, source: Path) -> None:
    if id_column not in frame.columns:
        raise DataError(f"{source} has no column {id_column!r} (it has {', '.join(frame.columns)}); name the id column")
    ids = frame[id_column]
    if ids.null_count() or ids.n_unique() < len(ids):
        twice = ids.filter(ids.is_duplicated()).head(1).to_list()
        raise DataError(f"{source}: ids in {id_column!r} must be present and unique; {ids.null_count()} missing, e.g. twice: {twice}")


def _pinned(parts: Path, release: str, source: Path, id_column: str) -> str:
    """The id of the release the batch began with; on the first start, `release`."""
    pin, digest = parts / "batch.json", sha256_of(source)
    if pin.is_file():
        began: dict[str, Any] = json.loads(pin.read_text())
        if (began["source_sha256"], began["id_column"]) != (digest, id_column):
            raise UsageError(f"{parts} holds a started batch over another file; delete it to begin anew")
        return str(began["release"])
    parts.mkdir(parents=True, exist_ok=True)
    scratch = pin.with_suffix(".tmp")
    scratch.write_text(json.dumps({"release": release, "source_sha256": digest, "id_column": id_column}))
    os.replace(scratch, pin)
    return release


def _done(parts: Path, id_column: str) -> pl.Series:
    found = [pl.read_parquet(p)[id_column].cast(pl.String) for p in sorted(parts.glob("part-*.parquet"))]
    return pl.concat(found) if found else pl.Series(id_column, [], dtype=pl.String)


def _write(frame: pl.DataFrame, path: Path) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    frame.write_parquet(scratch)
    os.replace(scratch, path)


def _finish(frame: pl.DataFrame, parts: Path, target: Path, id_column: str) -> pl.DataFrame:
    pieces = [pl.read_parquet(p) for p in sorted(parts.glob("part-*.parquet"))]
    if not pieces:
        raise DataError("the source has no rows")
    # Relaxed: a part in which every run failed has null output columns, or none.
    rows = pl.concat(pieces, how="diagonal_relaxed")
    order = frame.select(id_column).with_row_index("_order")
    result = rows.join(order, on=id_column).sort("_order").drop("_order")
    _write(result, target)
    shutil.rmtree(parts)
    return result
