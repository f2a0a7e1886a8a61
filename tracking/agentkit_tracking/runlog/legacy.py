"""Segments as they were before the run log was a chain of events: a record a line, in `runs` beside `log`."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson

from agentkit.records import RunRecord, Step
from agentkit_tracking.runlog import events
from agentkit_tracking.runlog.segments import SUFFIX, Chain, Finding, Segment, lines

_log = logging.getLogger(__name__)


def bring_over(folder: Path) -> None:
    """Make segments of what lies in `runs` beside `folder`, each file once, and delete it: an erasure would not reach it.

    For who has the lease.
    """
    for path in sorted(folder.parent.glob("runs/*.jsonl")) if folder.name == "log" else []:
        name = f"0{hashlib.sha256(path.name.encode()).hexdigest()[:19]}"
        if not (folder / "segments" / f"{name}{SUFFIX}").exists():  # else a kill came before the old file was deleted
            _convert(path, folder / "segments", name)
        _sync(folder / "segments")
        path.unlink()
        _log.info("%s is part of the run log now (segment %s), and was deleted", path, name)


def _convert(path: Path, segments: Path, name: str) -> None:
    shutil.rmtree(segments / f".{name}", ignore_errors=True)  # of one that was killed
    scratch = Segment(segments / f".{name}", roll_bytes=1 << 62, name=name)
    keep = events.payloads()
    skipped = 0
    for line in path.read_bytes().splitlines():
        try:
            values = orjson.loads(line)
            steps = [Step(**_known(Step, step)) for step in values.get("steps", ())]
            finished = events.finished(RunRecord(**{**_known(RunRecord, values), "steps": steps}), None, keep)
        except (ValueError, TypeError, AttributeError):  # torn by a kill
            skipped += 1
            continue
        scratch.append(finished)
    scratch.close()
    _verify(scratch.path)
    if skipped:
        _log.warning("%s: %d lines are no records of runs, and were left out", path, skipped)
    os.replace(scratch.path, segments / f"{name}{SUFFIX}")
    shutil.rmtree(scratch.folder)


def _known(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Without fields of other versions."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _verify(path: Path) -> None:
    """Raises OSError unless the segment is whole and on the disk."""
    _sync(path)
    chain = Chain()
    for item in lines(path.read_bytes()):
        wrong = item if isinstance(item, Finding) else chain.add(item)
        if wrong is not None:
            raise OSError(
                f"{path} does not hold what was written to it ({wrong.why}); nothing was deleted. Check the disk"
            )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
