"""Segments as they were before the run log was a chain of events: a record a line, in `runs` beside `log`."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import orjson

from agentkit.records import RunRecord, Step
from agentkit_tracking.runlog import events
from agentkit_tracking.runlog.segments import SUFFIX, Segment


def bring_over(folder: Path) -> None:
    """Make segments of what lies in `runs` beside `folder`, each file once; it is kept under another name. For who has the
    lease."""
    for path in sorted(folder.parent.glob("runs/*.jsonl")) if folder.name == "log" else []:
        name = f"0{hashlib.sha256(path.name.encode()).hexdigest()[:19]}"
        if not (folder / "segments" / f"{name}{SUFFIX}").exists():  # else a kill came between the two renames below
            _convert(path, folder / "segments", name)
        path.rename(path.with_suffix(".jsonl.brought-over"))


def _convert(path: Path, segments: Path, name: str) -> None:
    shutil.rmtree(segments / f".{name}", ignore_errors=True)  # of one that was killed
    scratch = Segment(segments / f".{name}", roll_bytes=1 << 62, name=name)
    keep = events.payloads()
    for line in path.read_bytes().splitlines():
        try:
            values = orjson.loads(line)
            record = RunRecord(**{**values, "steps": [Step(**step) for step in values.get("steps", ())]})
        except (ValueError, TypeError):
            continue  # torn by a kill
        scratch.append(events.finished(record, None, keep))
    scratch.close()
    os.replace(scratch.path, segments / f"{name}{SUFFIX}")
    shutil.rmtree(scratch.folder)
