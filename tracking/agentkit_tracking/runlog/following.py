"""Events as they come: the ends of segment files, watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from agentkit_tracking.runlog.segments import SUFFIX, Line, lines

if TYPE_CHECKING:
    from agentkit_tracking.runlog.log import RunLog

_POLL_S = 0.25


class Follower:
    """Yields what is appended, by any process of this machine, after it was made.

    Files are held open: what is folded and removed between two looks is still read to its end.
    """

    def __init__(self, log: RunLog) -> None:
        self._folder = log.segments
        self._open: dict[Path, tuple[BinaryIO, bytes]] = {}  # with the beginning of a line that is not whole
        for path in self._paths():
            self._add(path, at_end=True)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_error: object) -> None:
        for file, _ in self._open.values():
            file.close()
        self._open.clear()

    def new(self) -> list[dict[str, Any]]:
        """Events since the last look, in the order in which they were logged; private parts are in `private`."""
        for path in self._paths():
            if path not in self._open:
                self._add(path)
        found: list[dict[str, Any]] = []
        for path, (file, rest) in list(self._open.items()):
            content = rest + file.read()
            end = content.rfind(b"\n") + 1
            self._open[path] = file, content[end:]
            found += (event_of(line) for line in lines(content[:end]) if isinstance(line, Line))
            if not path.exists():  # it was folded: nothing comes any more
                file.close()
                del self._open[path]
        return sorted(found, key=lambda event: str(event.get("logged_at")))

    def forever(self, sleep: Callable[[float], object] = time.sleep) -> Iterator[dict[str, Any]]:
        """Events as they come, without end."""
        while True:
            yield from self.new()
            sleep(_POLL_S)

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"*{SUFFIX}")) if self._folder.is_dir() else []

    def _add(self, path: Path, *, at_end: bool = False) -> None:
        try:
            file = open(path, "rb")  # noqa: SIM115 # closed when the file is gone, or by `__exit__`
        except FileNotFoundError:
            return
        rest = b""
        if at_end:
            content = file.read()
            rest = content[content.rfind(b"\n") + 1 :]
        self._open[path] = file, rest


def event_of(line: Line) -> dict[str, Any]:
    """An event with what is private in it; None there once it was erased."""
    event = orjson.loads(line.event)
    event.pop("private_sha256", None)
    return {**event, "private": orjson.loads(line.private)}
