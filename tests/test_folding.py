"""Folding: every event once in the database, whatever happens in between, and readers who see folded and fresh at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from test_runlog import record

from agentkit.errors import UsageError
from agentkit.records import Step
from agentkit_tracking.runlog import RunLog, database, folding, migrations
from agentkit_tracking.runlog.database import Database, LogBusy, migrate
from agentkit_tracking.runlog.segments import Segment

STEPS = [Step("model", "m", "PLANNING", 0.1, 0.2, model="m", tokens_in=3, usd=0.5), Step("tool", "t", "EXECUTING", 0.3)]


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path / "log")


def ids(log: RunLog) -> list[str]:
    return log.sql("SELECT run_id FROM outcomes ORDER BY run_id")["run_id"].to_list()


def events(log: RunLog) -> list[tuple[Any, ...]]:
    return log.sql("SELECT * FROM events ORDER BY segment, n").rows()


def test_what_readers_see_is_the_same_before_and_after_a_fold(log: RunLog) -> None:
    for i in range(20):
        log.append(record(f"r{i:02}", steps=STEPS, user_hash="u", session="s", inputs={"n": i}))
    before = [events(log), log.runs().rows(), log.steps().rows()]
    folded = log.fold()
    assert folded is not None
    assert (folded.events, folded.segments) == (81, 1)
    assert [events(log), log.runs().rows(), log.steps().rows()] == before
    log.append(record("later"))
    assert ids(log) == ["later", *(f"r{i:02}" for i in range(20))]
    assert log.fold().events == 2  # type: ignore[union-attr]
    assert log.fold().events == 0  # type: ignore[union-attr]
    assert len(ids(log)) == 21


def test_a_segment_is_removed_once_it_is_closed_and_folded(log: RunLog) -> None:
    log.append(record("r1"))
    log.fold()
    assert len(list(log.segments.iterdir())) == 1  # its process may go on
    log.close()
    log.fold()
    assert list(log.segments.iterdir()) == []
    assert ids(log) == ["r1"]


def test_of_a_writer_that_died_all_whole_events_are_folded(log: RunLog) -> None:
    segment = Segment(log.segments)
    segment.append([({"type": "x", "name": "1"}, {}), ({"type": "x", "name": "2"}, {})])
    os.write(segment._fd, b'{"len":      100,"crc":"00')  # type: ignore[arg-type]
    segment._abandon()
    assert log.fold().findings == []  # type: ignore[union-attr]
    assert list(log.segments.iterdir()) == []
    assert log.sql("SELECT name FROM events WHERE type = 'x' ORDER BY n")["name"].to_list() == ["1", "2"]
    with log.database.reading() as connection:
        assert connection is not None
        assert connection.execute("SELECT state, torn_bytes FROM log.segments").fetchall() == [("ended", 26)]


def test_damage_costs_its_own_line_and_is_kept_as_a_finding(log: RunLog) -> None:
    for name in "abc":
        log.append(record(name))
    log.close()
    [path] = log.segments.iterdir()
    content = path.read_bytes()
    place = content.index(b'"run_id":"b"') + 10
    path.write_bytes(content[:place] + b"X" + content[place + 1 :])
    assert "b" in ids(log)  # its outcome
    assert log.sql("SELECT count(*) FROM events WHERE type = 'run'").item() == 2
    [(segment, found)] = log.fold().findings  # type: ignore[union-attr]
    assert (segment, found.fault) == (path.stem, "damaged")
    with log.database.reading() as connection:
        assert connection is not None
        assert connection.execute("SELECT segment, fault FROM log.findings").fetchall() == [(path.stem, "damaged")]


def test_bytes_that_are_no_text_are_damage_whatever_their_checksum(log: RunLog) -> None:
    log.append(record("a", inputs={"text": "é"}))
    log.append(record("b"))
    log.close()
    [path] = log.segments.iterdir()
    made = path.read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(made) if b"\xc3\xa9" in line)
    rest = made[place][34:-1].replace(b"\xc3\xa9", b"\xff\xfe")
    made[place] = b'{"len":%9d,"crc":"%08x",' % (len(rest), zlib.crc32(rest)) + rest + b"\n"
    path.write_bytes(b"".join(made))
    assert log.sql("SELECT count(*) FROM events").item() == 5
    assert [found.why for _, found in log.fold().findings] == ["it is no UTF-8"]  # type: ignore[union-attr]
    assert ids(log) == ["a", "b"]


@pytest.mark.parametrize("ending", [b"", b"1}", b"12", b"nullx}", b"}", b"{}"])
@pytest.mark.parametrize("is_last", [True, False])
def test_a_line_that_others_framed_well_stops_nobody(log: RunLog, ending: bytes, is_last: bool) -> None:
    log.append(record("a"))
    log.append(record("b"))
    log.close()
    [path] = log.segments.iterdir()
    made = path.read_bytes().splitlines(keepends=True)
    rest = made[2][34 : made[2].index(b',"private":') + 11] + ending
    forged = b'{"len":%9d,"crc":"%08x",' % (len(rest), zlib.crc32(rest)) + rest + b"\n"
    path.write_bytes(b"".join([*made, forged] if is_last else [*made[:2], forged, *made[3:]]))
    assert log.sql("SELECT count(*) FROM events").item() == len(made) - (not is_last)
    log.fold()
    assert log.sql("SELECT count(*) FROM events").item() == len(made) - (not is_last)
    with log.database.reading() as connection:
        assert connection is not None
        assert "damaged" in [fault for (fault,) in connection.execute("SELECT fault FROM log.findings").fetchall()]


@pytest.mark.parametrize("moment", ["before the transaction", "in it", "after it, before files are removed"])
def test_a_kill_while_folding_repeats_nothing_and_loses_nothing(log: RunLog, moment: str) -> None:
    for i in range(10):
        log.append(record(f"r{i}", steps=STEPS))
    log.close()
    script = f"""
import os, sys
from pathlib import Path
from agentkit_tracking.runlog import RunLog, folding
moment = {moment!r}
def die(*_): os.kill(os.getpid(), 9)
store = folding._store
def store_and_die(*given):
    if moment == "before the transaction": die()
    store(*given)
    if moment == "in it": die()
folding._store = store_and_die
Path.unlink = die
RunLog(Path(sys.argv[1])).fold()
"""
    killed = subprocess.run([sys.executable, "-c", script, str(log.folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (len(ids(log)), log.sql("SELECT count(*) FROM steps").item()) == (10, 20)
    assert log.fold() is not None
    assert (len(ids(log)), log.sql("SELECT count(*) FROM steps").item()) == (10, 20)
    assert list(log.segments.iterdir()) == []


def test_two_folders_at_once_do_not_wait_for_each_other(log: RunLog) -> None:
    log.append(record())
    with database.lease(log.folder) as mine:
        assert mine
        assert log.fold() is None
    assert log.fold().events == 3  # type: ignore[union-attr]


def test_readers_and_a_folder_take_turns_and_none_meets_an_error(log: RunLog) -> None:
    """Readers without a pause would starve a folder that only tries; the door lets it in."""
    faults: list[BaseException] = []
    done = threading.Event()
    log.append(record("r0"))

    def read() -> None:
        while not done.is_set():
            try:
                assert len(ids(log)) >= 1
            except BaseException as e:
                faults.append(e)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(1, 15):
        log.append(record(f"r{i}"))
        folded = log.fold()
        assert folded is not None
        assert (folded.events, folded.busy) == (2, None) if i > 1 else (5, None)
    done.set()
    for reader in readers:
        reader.join()
    assert faults == []
    assert len(ids(log)) == 15


@contextmanager
def held_by_a_program(path: Path) -> Iterator[None]:
    script = "import duckdb, sys, time; c = duckdb.connect(sys.argv[1]); print('open', flush=True); time.sleep(60)"
    program = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    program.stdout.readline()
    try:
        yield
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def test_a_program_that_holds_the_database_open_costs_no_event(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append(record("r0"))
    log.fold()
    monkeypatch.setattr(database, "_PATIENCE_S", 0.3)
    with held_by_a_program(log.database.path):
        log.append(record("r1"))  # a writer does not notice
        with pytest.raises(LogBusy, match=r"another program has .*log\.duckdb open for writing .*read_only=True"):
            log.runs()
        assert "another program" in (log.fold().busy or "")  # type: ignore[union-attr]
    assert ids(log) == ["r0", "r1"]
    assert log.fold().events == 2  # type: ignore[union-attr]


def test_a_program_that_only_reads_the_database_disturbs_no_reader(log: RunLog) -> None:
    log.append(record("r0"))
    log.fold()
    with duckdb.connect(str(log.database.path), read_only=True) as plain:
        assert plain.sql("SELECT count(*) FROM events").fetchall() == [(3,)]


# ---- migrations


@pytest.mark.parametrize("version", range(migrations.NEWEST + 1))
def test_every_older_schema_is_brought_up_to_date(log: RunLog, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append(record("r1", steps=STEPS))
    if version:
        older = {n: s for n, s in migrations.MIGRATIONS.items() if n <= version}
        with monkeypatch.context() as patch:
            patch.setattr(database, "MIGRATIONS", older)
            patch.setattr(database, "NEWEST", version)
            with log.database.writing() as connection, database.transaction(connection):
                [batch] = folding._parsed(folding._batches(log.segments, {}))
                folding._store(connection, batch)
    assert ids(log) == ["r1"]  # a reader brings it up to date
    log.append(record("r2"))
    log.fold()
    assert ids(log) == ["r1", "r2"]
    with log.database.reading() as connection:
        assert connection is not None
        found = connection.execute("SELECT version FROM log.migrations ORDER BY 1").fetchall()
    assert found == [(n,) for n in range(1, migrations.NEWEST + 1)]


def test_a_migration_that_fails_leaves_the_schema_before(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append(record("r1"))
    log.fold()
    newest = migrations.NEWEST + 1
    broken = {**migrations.MIGRATIONS, newest: ("CREATE TABLE log.half (a INT)", "CREATE TABLE nowhere.x (a INT)")}
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", broken)
        patch.setattr(database, "NEWEST", newest)
        with pytest.raises(duckdb.Error):
            log.fold()
    assert ids(log) == ["r1"]
    with log.database.writing() as connection:
        assert database.version(connection) == migrations.NEWEST
        assert not connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'half'").fetchall()


def test_a_newer_schema_is_refused_and_left_alone(log: RunLog) -> None:
    log.append(record("r1"))
    log.fold()
    with log.database.writing() as connection:
        connection.execute("INSERT INTO log.migrations VALUES (999, now())")
    log.append(record("r2"))  # a writer needs no database
    for use in (log.runs, log.fold):
        with pytest.raises(UsageError, match=r"schema 999.*newer version; upgrade"):
            use()


def test_a_blank_database_is_made_by_the_migrations_alone(tmp_path: Path) -> None:
    with Database(tmp_path / "log").writing() as connection:
        migrate(connection)  # again, which is nothing
        columns = connection.execute(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE database_name = 'log' AND table_name = 'events'"
        ).fetchall()
    named = dict(columns)
    assert named["logged_at"] == "TIMESTAMP WITH TIME ZONE"
    from agentkit_tracking.runlog.events import COLUMNS

    assert {*COLUMNS} <= {*named}


def test_records_of_the_time_before_events_are_brought_over_once(log: RunLog) -> None:
    old = log.folder.parent / "runs"
    old.mkdir()
    rows = [record(f"old{i}", steps=STEPS, inputs={"mail": "jane@example.com"}) for i in range(5)]
    (old / "1-abc.jsonl").write_bytes(b"".join(r.to_json() + b"\n" for r in rows) + b'{"run_id": "torn')
    log.append(record("new"))
    for _ in range(2):
        log.fold()
        assert ids(log) == ["new", *(f"old{i}" for i in range(5))]
    assert log.sql("SELECT count(*) FROM steps").item() == 10
    assert list(old.iterdir()) == []
    found = log.find("old3")
    assert (found.inputs, found.steps[0].usd) == ({"mail": "[e-mail]"}, 0.5)


def test_plain_tools_read_the_files(log: RunLog) -> None:
    import polars as pl

    for i in range(3):
        log.append(record(f"r{i}", usd=0.5))
    segment = next(log.segments.iterdir())
    assert duckdb.sql(f"SELECT sum(event.usd) FROM read_json('{segment}') WHERE event.type = 'outcome'").fetchall() == [
        (1.5,)
    ]
    frame = pl.read_ndjson(segment).unnest("event")
    assert frame.filter(pl.col("type") == "outcome")["usd"].sum() == 1.5
    assert json.loads(segment.read_bytes().splitlines()[0])["event"]["type"] == "segment"


# ---- rare cases


@pytest.mark.parametrize("what", ["event", "private", "id", "pipe", "folder", "link", "name"])
def test_one_bad_file_or_line_stops_nobody(log: RunLog, what: str) -> None:
    log.append(record("a"))
    log.append(record("b"))
    log.close()
    [path] = log.segments.iterdir()
    strange = log.segments / ("0" * 20 + ".jsonl")
    if what in ("event", "private", "id"):
        made = path.read_bytes().splitlines(keepends=True)
        rest = made[3][34:-1]
        rest = {
            "event": lambda: rest.replace(b'"kind":"run"', b'"kind":run"'),
            "private": lambda: rest[: rest.index(b'"private":') + 10] + b'{"user_hash" oops}',
            "id": lambda: rest.replace(path.stem.encode() + b"-3", path.stem.encode() + b"-" + b"9" * 30),
        }[what]()
        assert rest != made[3][34:-1]
        made[3] = b'{"len":%9d,"crc":"%08x",' % (len(rest), zlib.crc32(rest)) + rest + b"\n"
        path.write_bytes(b"".join(made))
    elif what == "pipe":
        os.mkfifo(strange)
    elif what == "folder":
        strange.mkdir()
    elif what == "link":
        strange.symlink_to("nowhere")
    else:
        (log.segments / "a-b.jsonl").write_bytes(path.read_bytes())
    for _ in range(2):
        assert "b" in ids(log)
        assert log.runs().height == 2
        assert log.sql("SELECT private FROM events").height >= 5
        folded = log.fold()
        assert folded is not None
    assert len(log.sql("SELECT * FROM events")) == (5 if what in ("event", "private", "id") else 6)
    with log.database.reading() as connection:
        assert connection is not None
        found = connection.execute("SELECT fault FROM log.findings").fetchall()
    assert (("damaged",) in found) == (what in ("event", "private", "id"))


def test_a_disk_that_is_full_at_the_first_fold_leaves_no_database_behind(
    log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(record("a"))

    def full(*_: Any, **__: Any) -> None:
        raise duckdb.IOException("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(database, "migrate", full)
        with pytest.raises(UsageError, match=r"cannot be made: No space left on device; events are kept"):
            log.fold()
    assert [p.name for p in log.folder.glob("*duckdb*")] == []
    log.database.path.touch()  # as an earlier version left it
    assert ids(log) == ["a"]
    assert log.fold().events == 3  # type: ignore[union-attr]
    assert ids(log) == ["a"]


def test_one_slow_reader_and_a_waiting_writer_do_not_keep_out_other_readers(log: RunLog) -> None:
    log.append(record("a"))
    log.fold()
    waiting = threading.Thread(target=lambda: contextlib.ExitStack().enter_context(log.database.writing(20.0)))
    with log.connection():
        waiting.start()
        time.sleep(0.5)
        began = time.monotonic()
        assert RunLog(log.folder).runs().height == 1
        assert time.monotonic() - began < 10
    waiting.join()
