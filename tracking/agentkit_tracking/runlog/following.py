"""Events as they come: the ends of segment files, watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agentkit.errors import AgentkitError
from agentkit_tracking.runlog.segments import SUFFIX, Line, lines, parse

if TYPE_CHECKING:
    from agentkit_tracking.runlog.log import RunLog

_POLL_S = 0.25


class Follower:
    """Yields what is appended, by any process of this machine, after it was made.

    Of each file it knows how far it was read, and opens one at a time. The end of one that was folded and removed between two
    looks is read from the database.
    """

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self._read: dict[Path, tuple[int, int]] = {}  # bytes, and the number of the last event in them
        for path in self._paths():
            content = _content(path, 0)
            if content is not None:
                self._read[path] = len(content), _last_number(content)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_error: object) -> None:
        self._read.clear()

    def new(self) -> list[dict[str, Any]]:
        """Events since the last look, in the order in which they were logged; private parts are in `private`."""
        found: list[dict[str, Any]] = []
        gone = []
        for path in sorted({*self._read, *self._paths()}):
            start, last = self._read.get(path, (0, -1))
            content = _content(path, start)
            if content is None:
                gone.append(path)
                continue
            new = [line for line in lines(content) if isinstance(line, Line)]
            self._read[path] = start + len(content), new[-1].n if new else last
            found += map(event_of, new)
        found += self._folded(gone)
        return sorted(found, key=lambda event: str(event.get("logged_at")))

    def forever(self, sleep: Callable[[float], object] = time.sleep) -> Iterator[dict[str, Any]]:
        """Events as they come, without end."""
        while True:
            yield from self.new()
            sleep(_POLL_S)

    def _folded(self, gone: list[Path]) -> list[dict[str, Any]]:
        """What files that are gone held beyond what was read of them."""
        known = {path: self._read[path][1] for path in gone if path in self._read}
        if not known:
            return []
        segments, numbers = [path.stem for path in known], list(known.values())
        try:
            with self._log.connection() as connection:
                rows = connection.execute(_ENDS, [segments, numbers]).fetchall()
        except AgentkitError:
            return []  # the next look asks again
        for path in known:
            del self._read[path]
        return [_event(event, private) for event, private in rows]

    def _paths(self) -> list[Path]:
        folder = self._log.segments
        return [path for path in folder.glob(f"*{SUFFIX}") if path.is_file()] if folder.is_dir() else []


_ENDS = (
    "SELECT e.event, e.private FROM every_event e JOIN (SELECT unnest(?) AS segment, unnest(?) AS n) k "
    "ON e.segment = k.segment AND e.n > k.n ORDER BY e.segment, e.n"
)


def _content(path: Path, start: int) -> bytes | None:
    """The whole lines from there on; None if the file is gone."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return None
    return content[: content.rfind(b"\n") + 1]


def _last_number(content: bytes) -> int:
    """The number of the last event that can be read; -1 if there is none."""
    end = len(content) - 1
    while end > 0:
        start = content.rfind(b"\n", 0, end) + 1
        try:
            return parse(content[start:end]).n
        except ValueError:
            end = start - 1
    return -1


def event_of(line: Line) -> dict[str, Any]:
    """An event with what is private in it; None there once it was erased."""
    return _event(line.event, line.private)


def _event(text: bytes | str, private: bytes | str | None) -> dict[str, Any]:
    event = orjson.loads(text)
    event.pop("private_sha256", None)
    return {**event, "private": None if private is None else orjson.loads(private)}
