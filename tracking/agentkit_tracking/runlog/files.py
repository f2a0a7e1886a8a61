"""The segment files, checked from their first line; part of the verification."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentkit_tracking.runlog.blanking import has_private, told_by
from agentkit_tracking.runlog.segments import Chain, Finding, Line, is_live, lines
from agentkit_tracking.runlog.stored import Fault
from agentkit_tracking.runlog.unfolded import Position

_CHUNK = 32 << 20  # bytes read at once


@dataclass
class File:
    """What one segment file holds."""

    segment: str
    events: int = 0
    last: int = -1
    torn_bytes: int = 0  # after the last line, in a file that nobody writes to any more
    faults: list[Fault] = field(default_factory=list)
    folded: list[tuple[str, int, str]] = field(default_factory=list)  # segment, number, hash of what is folded, too
    erased: list[Of] = field(default_factory=list)  # what has no private part
    private: list[Of] = field(default_factory=list)  # what has one
    erasures: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # number, event


@dataclass(frozen=True, slots=True)
class Of:
    """An event's number, run and type."""

    n: int
    run_id: str
    type: str


def check_file(path: Path, position: Position) -> File:
    """Check a segment file against its own chain, and how far it is folded."""
    live = is_live(path)  # before reading: what is read of one that is not is all there will ever be
    found = File(path.stem)
    chain = Chain()
    identity = re.compile(rb'\{"id":"%b-\d{1,18}"' % re.escape(path.stem.encode()))
    size = 0
    for item in _lines(path):
        if isinstance(item, int):
            found.torn_bytes = 0 if live else item
            continue
        if isinstance(item, Finding):
            chain.skip()
            found.faults.append(_fault(path, item, f"after event {chain.n}"))
            continue
        told = told_by(item.event)
        if told is None or not 0 <= item.n < 10**18:  # nothing can be built on what it says
            chain.skip()
            what = f"event {chain.n + 1} or a later one at byte {item.offset}: it is no event as one is written"
            found.faults.append(Fault(path.stem, chain.n + 1, None, path.name, what))
            continue
        wrong = chain.add(item)
        run, kind = _text(told.get("run_id")), _text(told.get("type"))
        if not identity.match(item.event):
            what = f"what stands in its place is event {str(told.get('id'))[:60]}"
            found.faults.append(Fault(path.stem, item.n, run or None, path.name, what))
        elif wrong is not None:
            found.faults.append(_fault(path, wrong, "", run or None))
        elif not item.is_erased and told_by(item.private) is None:
            found.faults.append(Fault(path.stem, item.n, run or None, path.name, "its private part is no JSON object"))
        if item.is_erased:
            found.erased.append(Of(item.n, run, kind))
        elif has_private(item):
            found.private.append(Of(item.n, run, kind))
        if kind == "erasure":
            found.erasures.append((item.n, told))
        if item.offset < position.next_byte:
            found.folded.append((path.stem, item.n, item.digest.decode(errors="replace")))
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


def _text(value: object) -> str:
    return "" if value is None else str(value)
