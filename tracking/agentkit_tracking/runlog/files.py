"""The segment files, checked from their first line; part of the verification."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from agentkit_tracking.runlog.folding import Position
from agentkit_tracking.runlog.segments import Chain, Finding, Line, is_live, lines
from agentkit_tracking.runlog.stored import Fault

_CHUNK = 32 << 20  # bytes read at once
_ERASURE = b'"type":"erasure"'


@dataclass
class File:
    """What one segment file holds."""

    segment: str
    events: int = 0
    last: int = -1
    torn_bytes: int = 0  # after the last line, in a file that nobody writes to any more
    faults: list[Fault] = field(default_factory=list)
    folded: list[tuple[str, int, str]] = field(default_factory=list)  # segment, number, hash of what is folded, too
    erased: list[tuple[int, str | None]] = field(default_factory=list)  # number and run of what has no private part
    erasures: list[dict[str, Any]] = field(default_factory=list)  # with the number of the event


def check_file(path: Path, position: Position) -> File:
    """Check a segment file against its own chain, and how far it is folded."""
    live = is_live(path)  # before reading: what is read of one that is not is all there will ever be
    found = File(path.stem)
    chain = Chain()
    identity = f'{{"id":"{path.stem}-'.encode()
    size = 0
    for item in _lines(path):
        if isinstance(item, int):
            found.torn_bytes = 0 if live else item
            continue
        if isinstance(item, Finding):
            chain.skip()
            found.faults.append(_fault(path, item, f"after event {chain.n}"))
            continue
        wrong = chain.add(item)
        if not item.event.startswith(identity):
            said = orjson.loads(item.event).get("id")
            found.faults.append(
                Fault(path.stem, item.n, _run(item), path.name, f"what stands in its place is event {said}")
            )
        elif wrong is not None:
            found.faults.append(_fault(path, wrong, "", _run(item)))
        if item.is_erased:
            found.erased.append((item.n, _run(item)))
        if _ERASURE in item.event:
            found.erasures.append({"n": item.n, **orjson.loads(item.event)})
        if item.offset < position.next_byte:
            found.folded.append((path.stem, item.n, item.digest.decode()))
        found.events += 1
        size = item.offset + item.size
    found.last = chain.n
    if size < position.next_byte:
        what = f"the file ends at byte {size}, but it was folded up to byte {position.next_byte}: its end was cut off"
        found.faults.append(Fault(path.stem, chain.n + 1, None, path.name, what))
    return found


def _lines(path: Path) -> Iterator[Line | Finding | int]:
    """Lines and findings of the file, and at last how many bytes come after the last line."""
    with open(path, "rb") as file:
        rest, start = b"", 0
        while chunk := file.read(_CHUNK):
            content = rest + chunk
            end = content.rfind(b"\n") + 1
            yield from lines(content[:end], start)
            start += end
            rest = content[end:]
    yield len(rest)


def _fault(path: Path, finding: Finding, place: str, run_id: str | None = None) -> Fault:
    what = f"{finding.fault} at byte {finding.offset}: {finding.why}" + (f", {place}" if place else "")
    return Fault(path.stem, finding.n, run_id, path.name, what)


def _run(line: Line) -> str | None:
    try:
        run = orjson.loads(line.event).get("run_id")
    except (ValueError, AttributeError):
        return None
    return None if run is None else str(run)
