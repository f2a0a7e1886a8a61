"""Private parts taken out of segment files, also of those that a process is writing to; and what erasures name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agentkit_tracking.runlog.segments import Line, erase, lines, segment_files

if TYPE_CHECKING:
    import duckdb

_CHUNK = 32 << 20  # bytes read at once
_EMPTY = b"{}"  # nothing private in it
OF_CALLED = ("outcome", "handoff")  # types of events of a run that hold something of those it called
# In SQL, with the table `doomed`: events that still have something private, all of these runs, and of their callers what holds
# something of them.
HAVE = (
    "private IS NOT NULL AND private <> '{}' AND (run_id IN (SELECT run_id FROM doomed WHERE is_whole) "
    f"OR type IN {OF_CALLED} AND run_id IN (SELECT run_id FROM doomed))"
)


@dataclass(frozen=True, slots=True)
class Named:
    """What an `erasure` event names."""

    runs: tuple[str, ...] = ()  # all private parts of these
    callers: tuple[str, ...] = ()  # those of their `OF_CALLED` events


def named(event: str | bytes | dict[str, Any]) -> Named | None:
    """What an erasure names; None if it is not as one is written."""
    told = event if isinstance(event, dict) else told_by(event)
    if told is None:
        return None
    lists = [told.get("runs", []), told.get("callers", [])]
    if not all(isinstance(runs, list) and all(isinstance(run, str) for run in runs) for runs in lists):
        return None
    return Named(tuple(lists[0]), tuple(lists[1]))


def told_by(event: str | bytes) -> dict[str, Any] | None:
    """The event's fields; None if it is no JSON object."""
    try:
        told = orjson.loads(event)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None


def doom(connection: duckdb.DuckDBPyConnection, runs: Named) -> None:
    """Make the table `doomed` of these runs."""
    connection.execute("CREATE OR REPLACE TEMP TABLE doomed (run_id VARCHAR, is_whole BOOLEAN)")
    for those, is_whole in ((runs.runs, True), (runs.callers, False)):
        connection.execute("INSERT INTO doomed SELECT unnest(?::VARCHAR[]), ?", [sorted(set(those)), is_whole])


def of_runs(runs: Named) -> Callable[[Line], bool]:
    """Chooses the lines of these runs that hold something private of them."""
    whole, callers = set(runs.runs), set(runs.callers)

    def chosen(line: Line) -> bool:
        told = told_by(line.event) or {}
        run, kind = told.get("run_id"), told.get("type")
        return isinstance(run, str) and (run in whole or (run in callers and kind in OF_CALLED))

    return chosen


def blank_stretches(segments: Path, stretches: Iterable[tuple[str, int, int]]) -> None:
    """Take the private parts out of stretches (segment, first and last number), in the files that are still there."""
    of: dict[str, list[tuple[int, int]]] = {}
    for segment, first, last in stretches:
        of.setdefault(segment, []).append((first, last))
    for path in segment_files(segments):
        if within := of.get(path.stem):
            blank(path, lambda line, within=within: any(a <= line.n <= b for a, b in within))  # type: ignore[misc]


def blank(path: Path, chosen: Callable[[Line], bool]) -> int:
    """Take the private parts out of the chosen lines; how many there were. Done again, it changes nothing."""
    found = find(path, chosen)
    for line in found:
        erase(path, line.offset, line.size, sync=line is found[-1])
    return len(found)


def find(path: Path, chosen: Callable[[Line], bool]) -> list[Line]:
    """The chosen lines that still have a private part."""
    found: list[Line] = []
    with open(path, "rb") as file:
        rest, start = b"", 0
        while chunk := file.read(_CHUNK):
            content = rest + chunk
            end = content.rfind(b"\n") + 1
            for item in lines(content[:end], start):
                if isinstance(item, Line) and has_private(item) and chosen(item):
                    found.append(item)
            start += end
            rest = content[end:]
    return found


def has_private(line: Line) -> bool:
    """Whether there is anything to take out of it."""
    return line.private != _EMPTY and not line.is_erased
