"""Private parts taken out of segment files, also of those that a process is writing to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agentkit_tracking.runlog.segments import SUFFIX, Line, erase, lines

_CHUNK = 32 << 20  # bytes read at once
_EMPTY = b"{}"  # nothing private in it


def segment_files(folder: Path) -> list[Path]:
    """The segment files there are."""
    return sorted(folder.glob(f"*{SUFFIX}"))


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
                if isinstance(item, Line) and item.private != _EMPTY and not item.is_erased and chosen(item):
                    found.append(item)
            start += end
            rest = content[end:]
    return found


def run_of(line: Line) -> str | None:
    """The run that an event belongs to."""
    begin = line.event.find(b'"run_id":"')
    if begin < 0:
        return None
    return line.event[begin + 10 : line.event.index(b'"', begin + 10)].decode()
