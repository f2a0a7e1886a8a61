"""No acknowledged event is lost and none is doubled, whoever is killed; nobody meets a lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentkit_tracking.runlog import RunLog

SOAK = bool(os.environ.get("AGENTKIT_SOAK"))
KILLS = 500 if SOAK else 30


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("seed", [1, 2, 3] if SOAK else [1])
def test_a_storm_of_kills_loses_no_acknowledged_event_and_doubles_none(tmp_path: Path, seed: int) -> None:
    script = Path(__file__).with_name("runlog_kills.py")
    subprocess.run([sys.executable, script, tmp_path, str(KILLS), str(seed)], check=True, timeout=3_000)
    assert [file.read_text() for file in (tmp_path / "errors").iterdir()] == []
    log = RunLog(tmp_path / "log")
    noted = {name for file in (tmp_path / "noted").iterdir() for name in file.read_text().split("\n")[:-1]}
    for _ in range(2):  # before and after the last fold
        found = log.sql("SELECT name FROM events WHERE type = 'x'")["name"].to_list()
        assert len(found) == len(set(found))
        assert noted <= set(found)
        # What is there without having been noted was written just before a kill.
        assert len(found) - len(noted) <= 5 * (KILLS + 16)
        folded = log.fold()
        assert folded is not None
        assert folded.findings == []
    assert list(log.segments.glob("*.jsonl")) == []  # every writer is dead: all is folded
    print(f"{len(noted)} events noted, {len(found)} found")
    assert len(noted) > 1_000
