"""Example files: the one schema of training, dev and golden sets, and what reads, writes and checks them.

A file is JSONL in UTF-8, one object a line, with exactly these keys:

    id         non-empty string, unique in the file
    inputs     non-empty object: the inputs of the system, by name
    expected   object: the right result, by name; {} means still to be labelled
    task_type  non-empty string: the group that is reported on its own
    tags       list of strings; [] when the key is left out

One `dspy.Example` holds all of it, so a name stands in `inputs` or in `expected`, not in both, and is none of
`case_id`, `task_type`, `tags`. Blank lines, CRLF and a byte order mark are read; they are never written.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from agentkit.errors import DataError, UsageError

if TYPE_CHECKING:
    import dspy
    import polars as pl

    # Checked at run time only: as a static type it would refuse a caller's dict[str, str].
    JsonValue = Any
else:
    from pydantic import JsonValue

AnyPath = str | os.PathLike[str]
TO_LABEL = "to-label"
_LISTED = 20
_RESERVED = frozenset({"case_id", "task_type", "tags"})
_EXPECTED = {
    "id": "a non-empty string",
    "inputs": "a non-empty object of JSON values",
    "expected": "an object of JSON values ({} = still to be labelled)",
    "task_type": "a non-empty string",
    "tags": "a list of strings",
}


class Example(BaseModel):
    """One case; whatever passes validation can be written and read back unchanged.

    Raises:
        pydantic.ValidationError: a field is not as the schema at the top of this module says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: Annotated[str, Field(min_length=1)]
    inputs: Annotated[dict[str, JsonValue], Field(min_length=1)]
    expected: dict[str, JsonValue]
    task_type: Annotated[str, Field(min_length=1)]
    tags: list[str] = []

    @model_validator(mode="after")
    def _can_be_used(self) -> Example:
        if both := sorted(self.inputs.keys() & self.expected.keys()):
            raise _misfit(f"key 'expected': expected other names than in inputs, found {both!r} in both; rename one")
        if taken := sorted(_RESERVED & (self.inputs.keys() | self.expected.keys())):
            raise _misfit(f"keys 'inputs', 'expected': the names {taken!r} are taken by the case itself; rename them")
        try:
            _line(self)
        except (ValueError, RecursionError) as error:  # half a surrogate pair, or nesting without end
            raise _misfit(f"expected an object that UTF-8 JSON can hold, found {error}") from error
        return self

    def for_dspy(self) -> dspy.Example:
        """Inputs, expected fields, `case_id`, `task_type` and `tags` in one `dspy.Example`, inputs marked as such."""
        import dspy

        case = {"case_id": self.id, "task_type": self.task_type, "tags": list(self.tags)}
        return dspy.Example({**self.inputs, **self.expected, **case}).with_inputs(*self.inputs)


class NearDuplicate(NamedTuple):
    """Two cases that say nearly the same; `other` is `FILE:ID` where it stands in another file."""

    id: str
    other: str
    similarity: float


@dataclass(frozen=True)
class Report:
    """What stands in a valid example file.

    `balance` has the count of each value, most frequent first, for every expected field whose values are all
    strings, bools or null and at most 20 different ones. `unlabelled` counts the cases whose `expected` is empty.
    """

    path: Path
    count: int
    sha256: str
    by_task_type: dict[str, int]
    by_tag: dict[str, int]
    balance: dict[str, dict[str | bool | None, int]]
    unlabelled: int
    near_duplicates: list[NearDuplicate]


def read_examples(path: AnyPath) -> list[Example]:
    """All examples of a file, in its order.

    Raises:
        DataError: the file cannot be read, is empty or breaks the schema; names line, key, what was expected and
            what was found, for up to 20 problems.
    """
    path = Path(path)
    problems: list[str] = []
    examples = _examples(_json_lines(path, problems), "line", problems)
    if problems:
        _refuse(f"{path} is not a valid example file (schema: `agentkit.examples`):", problems)
    if not examples:
        raise DataError(f"{path} is empty: expected at least one example, one JSON object a line")
    return examples


def write_examples(path: AnyPath, examples: Iterable[Example]) -> None:
    """Write the file in one step: readers see the old content or the new, never a part.

    Raises:
        DataError: there is no example, an id occurs twice, or the folder does not exist.
    """
    examples = list(examples)
    if not examples:
        raise DataError(f"nothing to write to {path}: an example file holds at least one example")
    if repeated := [i for i, n in Counter(e.id for e in examples).items() if n > 1]:
        _refuse(f"{path} not written: ids must be unique", [f"id {i!r} occurs more than once" for i in repeated])
    _replace(Path(path), b"".join(map(_line, examples)))


def check_examples(path: AnyPath, *, against: Sequence[AnyPath] = (), threshold: float = 0.8) -> Report:
    """Read a file and report its size, hash, class balance and near-duplicates.

    Near-duplicates have a cosine similarity of at least `threshold` between the TF-IDF vectors (character 3- to
    5-grams inside words, so word order does not hide a copy) of their joined text inputs. Each example is listed
    with its nearest earlier one in the file and its nearest in each file of `against`: the list stays short where
    hundreds say the same, and with all listed examples gone no near-duplicate is left.

    Raises:
        DataError: this file or one of `against` is not valid, see `read_examples`.
        UsageError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold must be above 0 and at most 1, got {threshold!r}")
    path = Path(path)
    examples = read_examples(path)
    others = {p: read_examples(p) for p in map(Path, against) if p.resolve() != path.resolve()}
    return Report(
        path=path,
        count=len(examples),
        sha256=sha256_of(path),
        by_task_type=_counts(e.task_type for e in examples),
        by_tag=_counts(tag for e in examples for tag in set(e.tags)),
        balance=_balance(examples),
        unlabelled=sum(not e.expected for e in examples),
        near_duplicates=_near_duplicates(examples, others, threshold),
    )


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
    examples = _examples(_tried(case, filled, problems), "row", problems)
    if problems:
        _refuse(f"{source} cannot be imported (rows are counted from 1, the header not included):", problems)
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
    old = _bytes(path) if path.exists() else b""
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
    new = _examples(_tried(case, rows.values(), problems), "row", problems)
    if problems:
        _refuse(f"nothing added to {path}; rows of the frame, counted from 1:", problems)
    if new:
        _replace(path, old + b"\n" * bool(old and not old.endswith(b"\n")) + b"".join(map(_line, new)))
    return len(new)


def sha256_of(path: AnyPath) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


# Reading and writing


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: AnyPath, error: OSError) -> DataError:
    return DataError(f"{os.fspath(path)} cannot be read: {error.strerror or error}; check the path")


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.object.count(b"\n", 0, error.start) + 1
        found = error.object[error.start : error.end]
        _refuse(f"{path} is not UTF-8:", [f"line {place}: found {found!r} ({error.reason}); save the file as UTF-8"])


def _json_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank; what is not JSON goes to `problems`."""
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and _cut_off(line, error):
                error = ValueError("the file ends inside this line; complete or delete it")
            problems.append(f"line {number}: expected one JSON object, found {_short(line)} ({error})")
        else:
            yield number, value


def _cut_off(line: str, error: Exception) -> bool:
    line = line.rstrip()
    return not line.endswith("}") or getattr(error, "pos", 0) >= len(line)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; use null")


def _line(example: Example) -> bytes:
    record = {name: getattr(example, name) for name in _EXPECTED}
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    path = path.resolve()  # through a link to the file behind it
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}; check its folder") from error
    finally:
        temporary.unlink(missing_ok=True)


# Validation


def _examples(values: Iterable[tuple[int, Any]], place: str, problems: list[str]) -> list[Example]:
    """Validated examples; what is wrong with the others, and ids seen before, goes to `problems`."""
    examples: list[Example] = []
    seen: dict[str, int] = {}
    for number, value in values:
        try:
            example = Example.model_validate(value)
        except ValidationError as error:
            problems.extend(f"{place} {number}: {_explained(e)}" for e in error.errors(include_url=False))
            continue
        if (first := seen.setdefault(example.id, number)) != number:
            problems.append(f"{place} {number}: key 'id': expected a new id, found {example.id!r} of {place} {first}")
        examples.append(example)
    return examples


def _explained(error: ErrorDetails) -> str:
    kind, found = error["type"], error["input"]
    if not error["loc"]:
        keys = ", ".join(_EXPECTED)
        return error["msg"] if kind == "misfit" else f"expected an object with the keys {keys}, found {_short(found)}"
    key = str(error["loc"][0])
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, _EXPECTED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "put what describes a case into tags"
        return f"key {key!r}: expected only {', '.join(_EXPECTED)}, found this one too; {hint}"
    if kind == "missing":
        return f"key {key!r}: expected {_EXPECTED[key]}, found only the keys {', '.join(found)}"
    where = ".".join(str(part) for part in error["loc"][:2])
    return f"key {where!r}: expected {_EXPECTED[key]}, found {_short(found)}"


def _misfit(text: str) -> PydanticCustomError:
    return PydanticCustomError("misfit", "{text}", {"text": text})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} … ({len(text)} characters)"


def _refuse(message: str, problems: list[str]) -> NoReturn:
    more = len(problems) - _LISTED
    raise DataError(message, problems[:_LISTED] + [f"and {more} more"] * (more > 0))


# Tables


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
    values = list(_json_lines(source, problems))
    problems += [f"line {n}: expected one JSON object, found {_short(v)}" for n, v in values if not isinstance(v, dict)]
    if problems:
        _refuse(f"{source} is not a table in JSONL:", problems)
    return [(i, row) for i, (_, row) in enumerate(values, 1)]


def _frame(source: Path, suffix: str) -> pl.DataFrame:
    import polars as pl

    text = _text(source) if suffix == ".csv" else ""
    try:
        if suffix == ".csv":
            return pl.read_csv(text.encode(), infer_schema=False)
        return pl.read_parquet(source, glob=False)
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{source} is empty: expected a line of column names and at least one row") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        hint = "comma-separated rows with every quote closed" if suffix == ".csv" else "an intact Parquet file"
        problems = _overlong(text) or [f"expected {hint}"]
        _refuse(f"{source} cannot be read ({str(error).splitlines()[0]}):", problems)


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
    more = f" and {len(empty) - _LISTED} more" if len(empty) > _LISTED else ""
    listed = ", ".join(map(str, empty[:_LISTED]))
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
        found: list[Any] = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON list after '[', found {_short(text)} ({error})") from error
    return found


# Reports


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], str(pair[0]))))


def _balance(examples: list[Example]) -> dict[str, dict[str | bool | None, int]]:
    values: dict[str, list[Any]] = {}
    for example in examples:
        for name, value in example.expected.items():
            values.setdefault(name, []).append(value)
    plain = {n: _counts(v) for n, v in values.items() if all(isinstance(x, str | bool | None) for x in v)}
    return {name: counts for name, counts in plain.items() if len(counts) <= 20}


def _text_of(example: Example) -> str:
    return "\n".join(value for value in example.inputs.values() if isinstance(value, str))


def _near_duplicates(
    examples: list[Example], others: Mapping[Path, list[Example]], threshold: float
) -> list[NearDuplicate]:
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    own = len(examples)
    names = [e.id for e in examples] + [f"{p.name}:{e.id}" for p, es in others.items() for e in es]
    texts = [_text_of(e) for es in (examples, *others.values()) for e in es]
    group = np.repeat(np.arange(1 + len(others)), [own, *map(len, others.values())])
    if not any(text.strip() for text in texts):
        return []
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32).fit_transform(texts)
    found: list[NearDuplicate] = []
    for i, j, similarity in _similar_pairs(vectors, own, threshold):
        pair = i * (1 + len(others)) + group[j]  # one example and one file
        order = np.lexsort((j, -similarity, pair))
        best = order[np.unique(pair[order], return_index=True)[1]]
        listed = zip(i[best], j[best], similarity[best], strict=True)
        found += [NearDuplicate(names[a], names[b], round(float(s), 4)) for a, b, s in listed]
    return found


def _similar_pairs(vectors: Any, own: int, threshold: float) -> Iterator[tuple[Any, Any, Any]]:
    """(i, j, similarity) arrays of all pairs at or above the threshold: i among the first `own`, j < i or not own.

    Exact, and far cheaper than the full product: with every vector's features ordered from rare to common, cut
    where what follows is shorter than the threshold. A pair that shares nothing before the cuts stays below it.
    """
    import numpy as np

    heads = _heads(vectors, threshold)
    for start in range(0, own, 256):
        product = (heads[start : min(start + 256, own)] @ heads.T).tocoo()
        i, j = product.row.astype(np.int64) + start, product.col.astype(np.int64)
        wanted = (j < i) | (j >= own)
        i, j = i[wanted], j[wanted]
        cuts = range(0, len(i), 10_000)
        parts = [vectors[i[c : c + 10_000]].multiply(vectors[j[c : c + 10_000]]).sum(axis=1) for c in cuts]
        similarity = np.concatenate([np.asarray(p).ravel() for p in parts]) if parts else np.zeros(0)
        close = similarity >= threshold - 1e-6  # 32-bit sums of equal texts end a little below 1
        yield i[close], j[close], similarity[close]


def _heads(vectors: Any, threshold: float) -> Any:
    import numpy as np

    heads = vectors[:, np.argsort(vectors.getnnz(axis=0), kind="stable")].tocsr()
    heads.sort_indices()
    squares = heads.data.astype(np.float64) ** 2
    sums = np.concatenate([[0.0], np.cumsum(squares)])
    rest = np.repeat(sums[heads.indptr[1:]], np.diff(heads.indptr)) - sums[:-1]
    heads.data[rest < threshold**2 - 1e-6] = 0
    heads.eliminate_zeros()
    return heads
