"""Retention of the run log: days move to Parquet or go for good, and a kill at any step costs nothing."""

from __future__ import annotations

import os
import shutil
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
from log_files import ago, in_process, run, write

from agentkit.errors import UsageError
from agentkit_tracking import keys
from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.retention import Kept, compact, prune
from agentkit_tracking.runlog.upkeep import give_back
from agentkit_tracking.runlog.verification import verify


@pytest.fixture
def log(own_home: Path) -> RunLog:
    """Five days with two runs each, in two segments that overlap none and one that is still written to."""
    keys.create("Ada")
    log = RunLog()
    for day in (9, 8, 7, 2, 0):
        write(log, run(f"d{day}-a"), run(f"d{day}-b"), days=day)
        if day == 8:
            log.close()
    return log


def archives(log: RunLog) -> list[str]:
    return sorted(p.parent.name for p in log.folder.glob("archive/*/*.parquet"))


def answers(log: RunLog) -> list[tuple[object, ...]]:
    """What a reader sees of everything."""
    return log.sql("SELECT * EXCLUDE private, private::VARCHAR FROM events ORDER BY segment, n").rows()


def day(days: float) -> str:
    return f"day={ago(days):%Y-%m-%d}"


# ---- compaction


def test_days_move_to_parquet_and_every_answer_stays_the_same(log: RunLog) -> None:
    before = answers(log)
    done = compact(log, 3)
    assert (done.days, done.events) == (3, 24)
    assert archives(log) == [day(9), day(8), day(7)]
    assert answers(log) == before
    assert verify(log).is_whole
    assert compact(log, 3) == Kept()  # nothing is left to do
    assert compact(log, 0).days == 1  # today stays
    assert answers(log) == before
    assert log.find("d9-a").inputs == {"text": "secret of d9-a"}


def test_events_of_a_day_that_are_folded_later_get_a_file_of_their_own(log: RunLog) -> None:
    compact(log, 3)
    write(log, run("late"), days=8)
    compact(log, 3)
    assert archives(log) == [day(9), day(8), day(8), day(7)]
    assert log.sql("SELECT count(*) FROM outcomes").item() == 11
    assert verify(log).is_whole


def test_archives_are_plain_parquet_with_the_day_in_the_path(log: RunLog) -> None:
    import polars as pl

    compact(log, 3)
    frame = pl.read_parquet(log.folder / "archive/*/*.parquet", hive_partitioning=True)
    assert frame.group_by("day").len().sort("day").rows() == [(ago(d).date(), 8) for d in (9, 8, 7)]
    assert frame.filter(type="outcome")["usd"].sum() == 3.0


def test_the_database_file_shrinks_when_much_was_moved(log: RunLog) -> None:
    for i in range(40):
        write(log, run(f"big{i}", inputs={"text": os.urandom(200_000).hex()}), days=5)
    log.fold()
    size = log.database.path.stat().st_size
    done = compact(log, 1)
    assert done.freed_bytes > 5_000_000
    assert log.database.path.stat().st_size < size / 2
    assert verify(log).is_whole
    assert give_back(log) == 0


KILLED = """
import os, sys
from pathlib import Path
from log_files import *
from agentkit_tracking.runlog import retention, upkeep, erasure, database
def die(*_, **__): os.kill(os.getpid(), 9)
log = RunLog()
"""


@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("the file has a scratch name", "upkeep._sync = die"),
        ("it has its name, and does not count", "retention._take_over = die"),
        ("it counts, events are still in the database", "retention.one = die"),
        ("all was moved, the database is being written anew", "upkeep.os.replace = die"),
        ("the database was written anew", "upkeep._sync = lambda p: p == log.folder and die()"),
    ],
)
def test_a_compaction_that_is_killed_loses_nothing_and_the_next_one_finishes_it(
    log: RunLog, when: str, how: str
) -> None:
    log.fold()
    before = answers(log)
    written = "retention.give_back = lambda *_: upkeep.give_back(log, always=True);"
    if "being written anew" in when:
        how = (
            "replace = os.replace; upkeep.os.replace = lambda a, b: die() if b == log.database.path else replace(a, b)"
        )
    killed = in_process(f"{KILLED}{written}{how}\nretention.compact(log, 3)")
    assert killed.communicate()[0] == ""
    assert killed.returncode == -signal.SIGKILL
    assert answers(log) == before
    assert verify(log).is_whole
    compact(log, 3)
    assert archives(log) == [day(9), day(8), day(7)]
    assert not [p for p in log.folder.rglob("*") if p.name.startswith(".scratch")]
    assert answers(log) == before
    assert verify(log).is_whole


def test_a_disk_that_does_not_keep_what_is_written_costs_no_event(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentkit_tracking.runlog import upkeep

    log.fold()
    before = answers(log)
    monkeypatch.setattr(upkeep, "_COPY", upkeep._COPY.replace("ORDER BY segment, n", "ORDER BY segment, n LIMIT 3"))
    with pytest.raises(OSError, match="does not hold what was written to it; nothing was deleted"):
        compact(log, 3)
    assert answers(log) == before


# ---- pruning


def test_pruned_days_are_gone_and_the_chain_goes_on(log: RunLog) -> None:
    compact(log, 8)
    done = prune(log, 3)
    assert (done.days, done.events) == (3, 24)
    assert archives(log) == []
    assert log.sql("SELECT run_id FROM outcomes ORDER BY 1")["run_id"].to_list() == ["d0-a", "d0-b", "d2-a", "d2-b"]
    report = verify(log)
    assert report.is_whole
    assert report.remarks == ["24 events were pruned for good, signed (2 stretches)"]
    assert prune(log, 3).events == 0


def test_a_log_goes_on_after_pruning(log: RunLog) -> None:
    prune(log, 3)
    write(log, run("next"))
    log.close()
    log.fold()
    prune(log, 1)
    assert verify(log).is_whole
    assert log.sql("SELECT count(*) FROM outcomes").item() == 3


def test_nothing_private_of_pruned_days_stays_in_a_file_that_is_still_written_to(log: RunLog) -> None:
    live = max(log.segments.glob("*.jsonl"))
    assert b"secret of d7-a" in live.read_bytes()
    prune(log, 3)
    assert b"secret of d7-a" not in live.read_bytes()
    assert b"secret of d2-a" in live.read_bytes()
    assert verify(log).is_whole


@pytest.mark.parametrize(
    "how",
    [
        "retention._sign = die",
        "retention._blank_in_files = die",
        "Path.unlink = die",
        "upkeep.remove_orphans = lambda log: (log.folder / 'again').exists() and die() or (log.folder / 'again').touch()",
    ],
    ids=["in the transaction", "before files are blanked", "before archives are removed", "before all is tidied"],
)
def test_a_prune_that_is_killed_leaves_all_or_none_and_the_next_one_finishes_it(log: RunLog, how: str) -> None:
    compact(log, 8)
    before = answers(log)
    killed = in_process(f"{KILLED}{how}\nretention.prune(log, 3)")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (log.folder / "again").unlink(missing_ok=True)
    assert len(answers(log)) in (len(before), len(before) - 24)
    assert verify(log).is_whole
    prune(log, 3)
    assert (len(answers(log)), archives(log)) == (len(before) - 24, [])
    assert not any(b"secret of d7" in p.read_bytes() for p in log.segments.iterdir())
    assert verify(log).is_whole


def test_what_cannot_be_meant_is_refused(log: RunLog, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="days older than -1 are in the future"):
        compact(log, -1)
    (own_home / "signing_key.pem").unlink()
    keys.revoke(keys.load_trust().keys[0].id, "lost")
    with pytest.raises(UsageError, match=r"to sign .* you need a key"):
        prune(log, 3)
    assert log.sql("SELECT count(*) FROM outcomes").item() == 10


def test_days_begin_at_midnight_utc(log: RunLog) -> None:
    from agentkit_tracking.runlog import upkeep

    today = datetime.now(UTC).date()
    assert (today - upkeep.before(0)).days == 0
    assert (today - upkeep.before(30)).days == 30


# ---- files that nobody may remove


def test_archives_outlive_a_lost_database(log: RunLog) -> None:
    log.close()
    compact(log, 3)
    log.database.path.unlink()
    before = archives(log)
    write(log, run("later"), days=8)
    compact(log, 3)
    prune(log, 5)
    assert archives(log) == before
    faults = [fault for fault in verify(log).faults if "does not know" in fault.what]
    assert [fault.where.split("/")[1] for fault in faults] == before


def test_archives_outlive_a_restored_database(log: RunLog, tmp_path: Path) -> None:
    compact(log, 8)
    shutil.copy(log.database.path, tmp_path / "backup")
    compact(log, 3)
    before = archives(log)
    shutil.copy(tmp_path / "backup", log.database.path)
    compact(log, 30)
    assert archives(log) == before
    # as the backup is older, what was moved since then is on file twice: in it, and where only `verify` sees it
    assert [fault.what.partition(":")[0] for fault in verify(log).faults if fault.segment == "archive"] == [
        "an archive file that the database does not know"
    ] * 2


def test_own_files_of_people_stay_and_scratch_goes(log: RunLog) -> None:
    compact(log, 3)
    place = log.folder / "archive" / day(9)
    mine = [place / "notes.txt", place / ".scratch-mine", log.folder / ".scratch-mine", log.folder / "archive/my.csv"]
    scratch = [
        place / f".scratch-{'0' * 20}.parquet",
        log.folder / ".scratch-00000000",
        log.folder / ".spill" / "x.tmp",
    ]
    scratch[2].parent.mkdir()
    for path in (*mine, *scratch):
        path.write_text("x")
    compact(log, 30)
    assert [path.exists() for path in (*mine, *scratch)] == [True] * 4 + [False] * 3
    assert verify(log).is_whole
