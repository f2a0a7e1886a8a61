"""Example files from tables: CSV, Parquet and JSONL, and frames that `map` returned."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit.errors import DataError
from agentkit.examples import (
    LISTED,
    AnyPath,
    Example,
    examples_from,
    json_lines,
    line_of,
    no_constant,
    read_bytes,
    read_examples,
    read_text,
    refuse,
    replace_file,
    shortened,
)

if TYPE_CHECKING:
    import polars as pl

TO_LABEL = "to-label"


def import_examples(
    source: AnyPath,
    *,
    inputs: Sequence[str],
    task_type: str,
    id: str | None = None,
    expected: Sequence[str] = (),
    tags: str | None = None,
) -> list[Example]:
    """Examples from a table in a .csv, .parquet or .jsonl (.ndjson) file; the arguments are names of its columns.

    CSV cells stay the text they are (`00123`, `12.50`, `true`). A cell of an expected column that starts with `[`
    is read as a JSON list. Dates become ISO text. A row without any expected value is still to be labelled.

    Args:
        task_type: a column, or one value for all rows written as `=value`.
        id: None numbers the rows: `name-0001`, where name is that of the file.
        tags: a column of lists, of JSON lists or of comma-separated text.

    Raises:
        DataError: the table cannot be read, a column is missing, a row has no id, input or task type, an id occurs
            twice, or a cell does not fit the schema. Rows are counted from 1, the header not included.
    """
    source = Path(source)
    inputs, expected = _names(inputs), _names(expected)
    rows = _rows(source)
    if not rows:
        raise DataError(f"{source} is empty: expected at least one row below the column names")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    kind = _column(task_type)
    required = [c for c in (id, *inputs, kind) if c is not None]
    _need(source, columns, [*required, *expected, *([tags] if tags is not None else [])])
    problems = [p for c in dict.fromkeys(required) if (p := _empty_cells(c, rows))]

    def case(number: int, row: dict[str, Any]) -> dict[str, Any]:
        labels = {name: _label(row.get(name), source) for name in expected}
        return {
            "id": f"{source.stem}-{number:04d}" if id is None else str(row[id]),
            "inputs": {name: _plain(row[name]) for name in inputs},
            "expected": {} if all(v is None for v in labels.values()) else labels,
            "task_type": task_type.removeprefix("=") if kind is None else str(row[kind]),
            "tags": _tags(None if tags is None else row.get(tags)),
        }

    filled = [(n, row) for n, row in rows if all(row.get(c) is not None for c in required)]
    examples = examples_from(_tried(case, filled, problems), "row", problems)
    if problems:
        refuse(f"{source} cannot be imported (rows are counted from 1, the header not included):", problems)
    return examples


def keep_cases(
    frame: pl.DataFrame, path: AnyPath, *, inputs: Sequence[str], task_type: str, tags: Sequence[str] = ()
) -> int:
    """Add rows of a frame that `map` returned to an example file, for somebody to label; returns how many were new.

    The new cases have the id `run-<run_id>`, an empty `expected` and the tag `to-label`. Cases that are already in
    the file are skipped, its lines are kept byte for byte, and the new file takes the place of the old one in one
    step (one writer at a time: of two that work at once the later wins). The file is made when there is none.

    Args:
        inputs: the columns that are inputs of the system.
        task_type: a column, or one value for all rows written as `=value`.

    Raises:
        DataError: a column is missing, a row does not fit the schema, or the file that is there is not valid; the
            file is then as before.
    """
    path, inputs, kind = Path(path), _names(inputs), _column(task_type)
    columns = list(dict.fromkeys(["run_id", *inputs, *([kind] if kind is not None else [])]))
    _need("the frame", frame.columns, columns)
    old = read_bytes(path) if path.exists() else b""
    known = {e.id for e in read_examples(path)} if old.strip() else set()

    def case(number: int, row: dict[str, Any]) -> dict[str, Any]:
        if row["run_id"] is None:
            raise ValueError("column 'run_id': expected the id of a run, found null")
        return {
            "id": f"run-{row['run_id']}",
            "inputs": {name: _plain(row[name]) for name in inputs},
            "expected": {},
            "task_type": task_type.removeprefix("=") if kind is None else row[kind],
            "tags": list(dict.fromkeys([TO_LABEL, *tags])),
        }

    problems: list[str] = []
    rows: dict[Any, tuple[int, dict[str, Any]]] = {}
    for number, row in enumerate(frame.select(columns).to_dicts(), 1):
        if f"run-{row['run_id']}" not in known:
            rows.setdefault(row["run_id"], (number, row))
    new = examples_from(_tried(case, rows.values(), problems), "row", problems)
    if problems:
        refuse(f"nothing added to {path}; rows of the frame, counted from 1:", problems)
    if new:
        replace_file(path, old + b"\n" * bool(old and not old.endswith(b"\n")) + b"".join(map(line_of, new)))
    return len(new)


def _rows(source: Path) -> list[tuple[int, dict[str, Any]]]:
    """(row number, row) of every row that is not empty throughout."""
    suffix = source.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        numbered = _json_rows(source)
    elif suffix in (".csv", ".parquet"):
        numbered = list(enumerate(_frame(source, suffix).to_dicts(), 1))
    else:
        raise DataError(f"{source}: expected a .csv, .parquet, .jsonl or .ndjson file, found the suffix {suffix!r}")
    return [(n, row) for n, row in numbered if any(v is not None for v in row.values())]


def _json_rows(source: Path) -> list[tuple[int, dict[str, Any]]]:
    problems: list[str] = []
    values = list(json_lines(source, problems))
    problems += [
        f"line {n}: expected one JSON object, found {shortened(v)}" for n, v in values if not isinstance(v, dict)
    ]
    if problems:
        refuse(f"{source} is not a table in JSONL:", problems)
    return [(i, row) for i, (_, row) in enumerate(values, 1)]


def _frame(source: Path, suffix: str) -> pl.DataFrame:
    import polars as pl

    text = read_text(source) if suffix == ".csv" else ""
    try:
        if suffix == ".csv":
            return pl.read_csv(text.encode(), infer_schema=False)
        return pl.read_parquet(source, glob=False)
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{source} is empty: expected a line of column names and at least one row") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        hint = "comma-separated rows with every quote closed" if suffix == ".csv" else "an intact Parquet file"
        problems = _overlong(text) or [f"expected {hint}"]
        refuse(f"{source} cannot be read ({str(error).splitlines()[0]}):", problems)


def _overlong(text: str) -> list[str]:
    """The rows of a CSV table with more cells than column names: mostly a comma in a text without quotes."""
    try:
        header, *rows = [*csv.reader(io.StringIO(text, newline=""))] or [[]]
    except csv.Error:
        return []
    return [
        f"row {n}: expected {len(header)} cells, found {len(row)}; put quotes around a text with commas"
        for n, row in enumerate(rows, 1)
        if len(row) > len(header)
    ]


def _names(columns: Sequence[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def _column(task_type: str) -> str | None:
    """The column that `task_type` names; None when it is a constant."""
    return None if task_type.startswith("=") else task_type


def _need(where: object, columns: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [c for c in dict.fromkeys(wanted) if c not in columns]:
        found = ", ".join(repr(c) for c in columns) or "none"
        raise DataError(
            f"{where}: missing columns {missing!r}; found {found} (a task type for all rows is written '=refund')"
        )


def _empty_cells(column: str, rows: list[tuple[int, dict[str, Any]]]) -> str | None:
    empty = [number for number, row in rows if row.get(column) is None]
    if not empty:
        return None
    more = f" and {len(empty) - LISTED} more" if len(empty) > LISTED else ""
    listed = ", ".join(map(str, empty[:LISTED]))
    return f"rows {listed}{more}: column {column!r}: expected a value, found none; fill it or delete the row"


def _tried(
    case: Callable[[int, dict[str, Any]], dict[str, Any]],
    rows: Iterable[tuple[int, dict[str, Any]]],
    problems: list[str],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`case` of every row; a ValueError goes to `problems`."""
    for number, row in rows:
        try:
            value = case(number, row)
        except ValueError as error:
            problems.append(f"row {number}: {error}")
        else:
            yield number, value


def _plain(value: Any) -> Any:
    """A table's value as JSON has it: dates as ISO text, exact decimals as text, NaN as null."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(value: Any, source: Path) -> Any:
    listed = isinstance(value, str) and value.startswith("[") and source.suffix.lower() == ".csv"
    return _json_list(value) if listed else _plain(value)


def _tags(value: Any) -> Any:
    if not isinstance(value, str):
        return value or []
    if value.startswith("["):
        return _json_list(value)
    return [tag for part in value.split(",") if (tag := part.strip())]


def _json_list(text: str) -> list[Any]:
    try:
        found: list[Any] = json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON list after '[', found {shortened(text)} ({error})") from error
    return found
