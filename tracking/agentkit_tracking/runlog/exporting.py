"""A whole view of the run log as a file for other tools."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from agentkit.errors import UsageError
from agentkit_tracking.runlog.database import one, quoted

if TYPE_CHECKING:
    from agentkit_tracking.runlog.log import RunLog

View = Literal["runs", "outcomes", "steps", "feedback", "events"]
FORMATS = {
    ".parquet": "FORMAT parquet, COMPRESSION zstd",
    ".csv": "FORMAT csv, HEADER",
    ".jsonl": "FORMAT json",
}


def export(log: RunLog, view: View, file: Path, *, force: bool = False) -> int:
    """Write a view to a file, whole or not at all; the ending says how: `.parquet`, `.csv` or `.jsonl`.

    Returns:
        The number of rows.

    Raises:
        UsageError: the view or the ending is unknown, the folder is missing, or the file is there and not to be replaced.
    """
    import duckdb

    if view not in get_args(View):
        raise UsageError(f"there is no view {view!r}; use {', '.join(get_args(View))}")
    if file.suffix not in FORMATS:
        raise UsageError(f"{file.name}: the ending says how it is written; use {', '.join(FORMATS)}")
    if not file.parent.is_dir():
        raise UsageError(f"there is no folder {file.parent}")
    if file.exists() and not force:
        raise UsageError(f"{file} is there already; --force replaces it")
    scratch = file.with_name(f".{file.name}-{os.urandom(4).hex()}")
    try:
        with log.connection() as connection:
            rows = connection.execute(f"COPY (SELECT * FROM {view}) TO {quoted(scratch)} ({FORMATS[file.suffix]})")
            count = int(one(rows))
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        if force:
            os.replace(scratch, file)
        else:
            os.link(scratch, file)  # fails if somebody else was faster
    except FileExistsError as e:
        raise UsageError(f"{file} is there already; --force replaces it") from e
    except (OSError, duckdb.IOException) as e:
        raise UsageError(f"{file} cannot be written: {str(e).splitlines()[0]}") from e
    finally:
        with suppress(OSError):  # what could not be written says more than what could not be removed
            scratch.unlink()
    return count
