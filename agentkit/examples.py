"""Example files: the one schema of training, dev and golden sets, and what reads and writes them.

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

import difflib
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from agentkit.errors import DataError

if TYPE_CHECKING:
    import dspy

    # Checked at run time only: as a static type it would refuse a caller's dict[str, str].
    JsonValue = Any
else:
    from pydantic import JsonValue

AnyPath = str | os.PathLike[str]
LISTED = 20  # problems named in one message
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
            line_of(self)
        except (ValueError, RecursionError) as error:  # half a surrogate pair, or nesting without end
            raise _misfit(f"expected an object that UTF-8 JSON can hold, found {error}") from error
        return self

    def for_dspy(self) -> dspy.Example:
        """Inputs, expected fields, `case_id`, `task_type` and `tags` in one `dspy.Example`, inputs marked as such."""
        import dspy

        case = {"case_id": self.id, "task_type": self.task_type, "tags": list(self.tags)}
        return dspy.Example({**self.inputs, **self.expected, **case}).with_inputs(*self.inputs)


def read_examples(path: AnyPath) -> list[Example]:
    """All examples of a file, in its order.

    Raises:
        DataError: the file cannot be read, is empty or breaks the schema; names line, key, what was expected and
            what was found, for up to 20 problems.
    """
    path = Path(path)
    problems: list[str] = []
    examples = examples_from(json_lines(path, problems), "line", problems)
    if problems:
        refuse(f"{path} is not a valid example file (schema: `agentkit.examples`):", problems)
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
        refuse(f"{path} not written: ids must be unique", [f"id {i!r} occurs more than once" for i in repeated])
    replace_file(Path(path), b"".join(map(line_of, examples)))


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


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: AnyPath, error: OSError) -> DataError:
    return DataError(f"{os.fspath(path)} cannot be read: {error.strerror or error}; check the path")


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.object.count(b"\n", 0, error.start) + 1
        found = error.object[error.start : error.end]
        refuse(f"{path} is not UTF-8:", [f"line {place}: found {found!r} ({error.reason}); save the file as UTF-8"])


def json_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank; what is not JSON goes to `problems`."""
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object, parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and _cut_off(line, error):
                error = ValueError("the file ends inside this line; complete or delete it")
            problems.append(f"line {number}: expected one JSON object, found {shortened(line)} ({error})")
        else:
            yield number, value


def _cut_off(line: str, error: Exception) -> bool:
    line = line.rstrip()
    return not line.endswith("}") or getattr(error, "pos", 0) >= len(line)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; use null")


def line_of(example: Example) -> bytes:
    record = {name: getattr(example, name) for name in _EXPECTED}
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()


def replace_file(path: Path, content: bytes) -> None:
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


def examples_from(values: Iterable[tuple[int, Any]], place: str, problems: list[str]) -> list[Example]:
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
        return (
            error["msg"] if kind == "misfit" else f"expected an object with the keys {keys}, found {shortened(found)}"
        )
    key = str(error["loc"][0])
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, _EXPECTED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "put what describes a case into tags"
        return f"key {key!r}: expected only {', '.join(_EXPECTED)}, found this one too; {hint}"
    if kind == "missing":
        return f"key {key!r}: expected {_EXPECTED[key]}, found only the keys {', '.join(found)}"
    where = ".".join(str(part) for part in error["loc"][:2])
    return f"key {where!r}: expected {_EXPECTED[key]}, found {shortened(found)}"


def _misfit(text: str) -> PydanticCustomError:
    return PydanticCustomError("misfit", "{text}", {"text": text})


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} … ({len(text)} characters)"


def refuse(message: str, problems: list[str]) -> NoReturn:
    more = len(problems) - LISTED
    raise DataError(message, problems[:LISTED] + [f"and {more} more"] * (more > 0))
