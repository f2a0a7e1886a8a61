"""The run log verified by attack: whatever is changed, wherever it lies, is found, and it is said which event it is."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from log_files import (
    Row,
    as_made_once,
    change,
    edit_archive,
    edit_database,
    edit_file,
    in_process,
    rehash,
    run,
    write,
)

from agentkit.errors import UsageError
from agentkit_tracking import keys
from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.retention import compact, prune
from agentkit_tracking.runlog.segments import START, frame, parse
from agentkit_tracking.runlog.verification import Report, verify


@pytest.fixture
def log(own_home: Path) -> RunLog:
    keys.create("Ada")
    return RunLog()


PLACES = ("file", "folded file", "database", "archive")


def filled(log: RunLog, place: str) -> None:
    """Ten runs in one segment, and where they lie."""
    if place.endswith("file"):
        write_ten(log)
        if place == "folded file":
            log.fold()
            assert verify(log).is_whole
    else:
        as_made_once(log.folder.parent, f"verified {place}", lambda: write_away(log, place))


def write_ten(log: RunLog) -> None:
    write(log, *(run(f"r{i}") for i in range(10)), days=5)


def write_away(log: RunLog, place: str) -> None:
    write_ten(log)
    log.close()
    log.fold()
    if place == "archive":
        compact(log, 1)
    assert verify(log).is_whole


def attack(log: RunLog, place: str, edit: Callable[[list[Row]], None]) -> Report:
    """What `verify` says once the rows of that place are edited."""
    if place.endswith("file"):
        edit_file(next(log.segments.glob("*.jsonl")), edit)
    elif place == "database":
        edit_database(log, edit)
    else:
        edit_archive(log, next(log.folder.glob("archive/*/*.parquet")), edit)
    return verify(log)


def at(rows: list[Row], n: int) -> Row:
    return next(row for row in rows if row["n"] == n)


def said(report: Report, n: int) -> str:
    return "\n".join(fault.what for fault in report.faults if fault.n == n)


# ---- what is as it was written


def test_a_log_is_whole_however_far_it_is_folded(log: RunLog) -> None:
    assert verify(log) == Report()
    write(log, run("r1"), days=3)
    fresh = verify(log)
    assert (fresh.events, fresh.segments, fresh.signed, fresh.faults) == (5, 1, 0, [])
    assert fresh.remarks == ["5 events are not folded yet, and so not signed"]
    log.fold()
    write(log, run("r2"))
    assert verify(log).remarks == ["4 events are not folded yet, and so not signed"]
    log.close()
    log.fold()
    compact(log, 1)
    done = verify(log)
    assert (done.events, done.signed, done.faults, done.remarks) == (10, 10, [], [])


def test_progress_is_told_in_events(log: RunLog) -> None:
    filled(log, "database")
    told: list[tuple[int, int]] = []
    verify(log, progress=lambda done, total: told.append((done, total)))
    assert told == [(42, 42)]


def test_a_killed_writer_is_a_remark_not_a_fault(log: RunLog) -> None:
    writer = in_process(
        "import os, signal, sys; from log_files import *; log = RunLog(); write(log, run('r1'));"
        "os.write(log._own()._fd, b'{\"len\":  torn'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    [remark, _] = verify(log).remarks
    assert "its process died while it wrote; 13 bytes" in remark
    log.fold()
    report = verify(log)
    assert report.is_whole
    assert report.remarks == ["1 segments ended without being closed (killed), 1 of them within an event"]


@pytest.mark.parametrize("killed", [True, False])
def test_a_segment_that_is_cut_before_any_fold_is_a_remark(log: RunLog, killed: bool) -> None:
    """Its end may as well never have been written: the remark is all there is to say."""
    write(log, run("whole"))
    log.close()
    assert verify(log).remarks == ["6 events are not folded yet, and so not signed"]
    write(log, run("r1"), run("r2"))
    assert len(verify(log).remarks) == 1, "its process lives"
    log.close()
    cut = max(log.segments.iterdir())
    edit_file(cut, lambda rows: rows.__delitem__(slice(-1 if killed else -4, None)))
    report = verify(log)
    assert report.is_whole
    assert report.remarks[1].startswith("1 segments that are not folded to their end do not end in `closed`")
    log.fold()
    assert verify(log).remarks == ["1 segments ended without being closed (killed), 0 of them within an event"]


def test_what_no_key_signed_is_a_remark_and_with_strict_a_fault(own_home: Path) -> None:
    log = RunLog()
    write_away(log, "database")
    report = verify(log)
    assert "42 folded events in 1 segments are under no signed head" in report.remarks[0]
    assert (report.signed, report.checkpoint) == (0, None)
    [fault] = verify(log, strict=True).faults
    assert (fault.n, fault.what) == (0, "42 folded events are under no signed head")


# ---- every change at every place


@pytest.mark.parametrize("place", PLACES)
def test_a_changed_field_is_found(log: RunLog, place: str) -> None:
    filled(log, place)

    def edit(rows: list[Row]) -> None:
        at(rows, 6)["event"] = at(rows, 6)["event"].replace('"usd":0.5', '"usd":0.1')

    report = attack(log, place, edit)
    assert "its hash does not follow from it" in said(report, 6)
    [fault] = [f for f in report.faults if f.n == 6]
    assert fault.run_id == "r1"
    assert str(fault).startswith(f"{fault.segment} event 6 of run r1 (")


@pytest.mark.parametrize("place", PLACES)
def test_a_changed_private_text_is_found(log: RunLog, place: str) -> None:
    filled(log, place)

    def edit(rows: list[Row]) -> None:
        at(rows, 6)["private"] = at(rows, 6)["private"].replace("secret", "sacred")

    assert "private part" in said(attack(log, place, edit), 6)


@pytest.mark.parametrize("place", PLACES)
def test_a_private_text_that_was_taken_out_without_an_erasure_is_found(log: RunLog, place: str) -> None:
    filled(log, place)

    def edit(rows: list[Row]) -> None:
        at(rows, 6)["private"] = "null" if place.endswith("file") else None

    assert said(attack(log, place, edit), 6) == "its private part was taken out, and no erasure says so"


@pytest.mark.parametrize("column", ["usd", "run_id", "logged_at", "user_hash", "type"])
@pytest.mark.parametrize("place", PLACES[2:])
def test_a_column_that_says_something_else_than_its_event_is_found(log: RunLog, place: str, column: str) -> None:
    filled(log, place)

    def edit(rows: list[Row]) -> None:
        row = at(rows, 6)
        row[column] = {"logged_at": row["logged_at"].replace(year=2020), "usd": 0.001}.get(column, "outcome")

    assert f"its column {column} says" in said(attack(log, place, edit), 6)


@pytest.mark.parametrize("place", PLACES)
def test_a_deleted_event_is_found(log: RunLog, place: str) -> None:
    filled(log, place)
    report = attack(log, place, lambda rows: rows.remove(at(rows, 6)))
    if place.endswith("file"):
        assert "event 7 follows event 5" in said(report, 7)
    else:
        assert said(report, 6).startswith("this event is missing")


@pytest.mark.parametrize("place", PLACES[1:])
def test_a_deleted_tail_is_found(log: RunLog, place: str) -> None:
    filled(log, place)

    def edit(rows: list[Row]) -> None:
        del rows[-4:]

    report = attack(log, place, edit)
    # The event `closed` was logged today, and is not in the archive.
    first, last = (37, 40) if place == "archive" else (38, 41)
    if place == "folded file":
        assert "its end was cut off" in said(report, 37)
    else:
        assert said(report, first).startswith(f"the events {first} to {last} are missing")


def test_the_tail_of_a_file_that_was_never_folded_is_not_missed(log: RunLog) -> None:
    """What RUNLOG.md says cannot be found."""
    filled(log, "file")
    assert attack(log, "file", lambda rows: rows.__delitem__(slice(-4, None))).is_whole


@pytest.mark.parametrize("place", PLACES[1:])
def test_a_deleted_segment_is_found(log: RunLog, place: str) -> None:
    filled(log, place)
    if place == "folded file":
        next(log.segments.glob("*.jsonl")).unlink()
        assert "its file is gone before it was folded to its end" in said(verify(log), 41)
        return
    assert "are missing" in said(attack(log, place, lambda rows: rows.clear()), 0 if place == "database" else 1)


def test_a_deleted_segment_is_found_by_its_heads_when_its_position_is_deleted_too(log: RunLog) -> None:
    filled(log, "database")
    change(log, "DELETE FROM events")
    change(log, "DELETE FROM positions")
    assert said(verify(log), 0) == "the events 0 to 41 are missing; a signed head names them"


def test_a_deleted_day_is_found(log: RunLog) -> None:
    filled(log, "archive")
    next(log.folder.glob("archive/*/*.parquet")).unlink()
    report = verify(log)
    assert "its 40 events are gone" in str(report.faults[0])
    assert "the events 1 to 40 are missing" in said(report, 1)
    change(log, "DELETE FROM archives")
    assert "the events 1 to 40 are missing" in said(verify(log), 1)


def test_an_archive_that_was_written_anew_is_said(log: RunLog) -> None:
    filled(log, "archive")
    change(log, "UPDATE archives SET sha256 = repeat('0', 64)")
    [fault] = verify(log).faults
    assert fault.what == "the file is not the one that was archived (another SHA-256)"


def test_an_archive_that_is_no_parquet_any_more_is_said(log: RunLog) -> None:
    filled(log, "archive")
    next(log.folder.glob("archive/*/*.parquet")).write_bytes(b"PAR1 nothing PAR1")
    assert "its events cannot be read" in "\n".join(map(str, verify(log).faults))


@pytest.mark.parametrize("place", PLACES)
def test_two_events_that_changed_places_are_found(log: RunLog, place: str) -> None:
    filled(log, place)

    def edit(rows: list[Row]) -> None:
        first, second = at(rows, 6), at(rows, 7)
        if place.endswith("file"):
            i, j = rows.index(first), rows.index(second)
            rows[i], rows[j] = rows[j], rows[i]
        else:
            first["n"], second["n"] = 7, 6

    report = attack(log, place, edit)
    assert "event 7 follows event 5" in said(report, 7) or "what stands in its place is event" in said(report, 7)


@pytest.mark.parametrize("place", PLACES)
def test_a_doubled_event_is_found(log: RunLog, place: str) -> None:
    filled(log, place)
    report = attack(log, place, lambda rows: rows.insert(rows.index(at(rows, 6)), dict(at(rows, 6))))
    assert "event 6 follows event 6" in said(report, 6) or said(report, 6) == "it stands there 2 times"


@pytest.mark.parametrize("place", PLACES[1:3])
def test_a_forged_event_with_all_hashes_made_to_fit_is_found_by_the_signed_head(log: RunLog, place: str) -> None:
    filled(log, place)

    def edit(rows: list[Row]) -> None:
        forged = dict(at(rows, 6))
        forged["event"] = forged["event"].replace('"usd":0.5', '"usd":0.1')
        rows[rows.index(at(rows, 6))] = forged
        if place == "database":
            forged["usd"] = 0.1
        rehash(rows)

    report = attack(log, place, edit)
    if place == "database":
        change(log, "UPDATE positions SET hash = (SELECT hash FROM events ORDER BY n DESC LIMIT 1)")
        assert "the signed head has another hash" in said(verify(log), 41)
    else:
        assert "it is another event in its file" in said(report, 6)


def test_an_event_inserted_at_the_end_is_found(log: RunLog) -> None:
    filled(log, "database")

    def edit(rows: list[Row]) -> None:
        more = dict(rows[-1])
        more["event"] = more["event"].replace("-41", "-42")
        rows.append(more)
        rehash(rows)

    report = attack(log, "database", edit)
    assert "nothing says that they were folded" in said(report, 42)
    change(log, "UPDATE positions SET n = 42, hash = (SELECT hash FROM events WHERE n = 42)")
    assert "1 folded events in 1 segments are under no signed head" in verify(log).remarks[0]
    assert not verify(log, strict=True).is_whole


@pytest.mark.parametrize("place", PLACES)
def test_an_event_of_another_segment_is_found(log: RunLog, place: str) -> None:
    write(log, *(run(f"other{i}") for i in range(10)), days=5)
    log.close()
    other: list[Row] = []
    edit_file(next(log.segments.glob("*.jsonl")), other.extend)
    log.fold()
    filled(log, place)

    def edit(rows: list[Row]) -> None:
        mine = max(row["segment"] for row in rows) if "segment" in rows[0] else None
        row = next(r for r in rows if r["n"] == 6 and r.get("segment") == mine)
        row.update({name: other[6][name] for name in ("event", "private", "salt", "hash")})

    assert "what stands in its place is event" in said(attack(log, place, edit), 6)


def test_a_segment_under_another_name_is_found(log: RunLog) -> None:
    filled(log, "file")
    [path] = log.segments.glob("*.jsonl")
    shutil.copy(path, path.with_name("0199999999999abcdef0.jsonl"))
    assert {f.segment for f in verify(log).faults} == {"0199999999999abcdef0"}


def invented(like: Row, segment: str, n: int, before: str = START) -> Row:
    """A row that somebody made up, all hashes of which fit."""
    event = {"id": f"{segment}-{n}", "logged_at": like["logged_at"].isoformat(), "type": "run"}
    line = parse(frame(event, {}, before, b"0" * 32)[0].rstrip(b"\n"))
    texts = {"event": line.event, "private": line.private, "salt": line.salt, "hash": line.digest}
    own = {"segment": segment, "n": n, "logged_at": like["logged_at"], "type": "run"}
    return {**dict.fromkeys(like), **own, **{name: text.decode() for name, text in texts.items()}}


@pytest.mark.parametrize("name", ["", "0" * 19, "x" * 20])
def test_a_row_whose_segment_can_be_none_is_found(log: RunLog, name: str) -> None:
    filled(log, "database")
    report = attack(log, "database", lambda rows: rows.append(invented(rows[-1], name, 0)))
    assert "no segment has such a name" in said(report, 0)


@pytest.mark.parametrize("n", [-1, -(2**63)])
def test_a_row_with_a_number_below_zero_is_found(log: RunLog, n: int) -> None:
    filled(log, "database")
    report = attack(log, "database", lambda rows: rows.append(invented(rows[-1], rows[-1]["segment"], n)))
    assert "no event has such a number" in said(report, n)


def test_rows_without_a_number_are_found(log: RunLog) -> None:
    filled(log, "database")

    def edit(rows: list[Row]) -> None:
        rows += [{**rows[-1], "n": None}] * 2

    assert "2 rows name no segment and number" in "\n".join(map(str, attack(log, "database", edit).faults))


def test_a_row_whose_event_is_no_json_is_found(log: RunLog) -> None:
    """Though its beginning, its end and its hash are as they should be; its columns say nothing."""
    filled(log, "database")

    def edit(rows: list[Row]) -> None:
        last = rows[-1]
        text = last["event"].replace('"type":', '"type"')
        digest = hashlib.sha256((rows[-2]["hash"] + text).encode()).hexdigest()
        kept = {name: last[name] for name in ("segment", "n", "private", "salt")}
        rows[-1] = {**dict.fromkeys(last), **kept, "event": text, "hash": digest}

    report = attack(log, "database", edit)
    assert "what stands in its place is no event" in said(report, 41)


# ---- signatures


def test_a_head_by_another_key_is_found(log: RunLog) -> None:
    filled(log, "database")
    eve = keys._generate("Eve", local=False)[1].id
    change(log, "UPDATE heads SET key_id = ?", eve)
    assert f"signed by the key {eve}, which is not trusted here" in said(verify(log), 41)


@pytest.mark.parametrize("column", ["n = n - 1", "hash = 'ab'", "signature = repeat('00', 64)", "signature = 'x'"])
def test_a_changed_head_is_found(log: RunLog, column: str) -> None:
    filled(log, "database")
    change(log, f"UPDATE heads SET {column}")
    assert "its signed head does not count" in "\n".join(f.what for f in verify(log).faults)


def test_a_head_that_was_left_out_is_found_and_with_a_checkpoint_also_the_last_one(log: RunLog) -> None:
    for i in range(3):
        write(log, run(f"r{i}"))
        log.close()
        log.fold()
    checkpoint = verify(log).checkpoint
    assert checkpoint is not None
    [[last]] = _rows(log, "SELECT segment FROM heads WHERE number = 3")
    [[middle]] = _rows(log, "SELECT segment FROM heads WHERE number = 2")
    for table in ("events", "positions", "heads"):
        change(log, f"DELETE FROM {table} WHERE segment = ?", last)
    assert verify(log).is_whole  # the log as it was two folds ago
    [fault] = verify(log, checkpoint=checkpoint).faults
    assert "it is gone, and what was logged since then" in fault.what
    for table in ("events", "positions", "heads"):
        change(log, f"DELETE FROM {table} WHERE segment = ?", middle)
    write(log, run("r4"))
    log.fold()
    change(log, "UPDATE heads SET number = 3 WHERE number = 2")
    assert any("missing or replaced" in f.what for f in verify(log).faults)
    with pytest.raises(UsageError, match="is no checkpoint"):
        verify(log, checkpoint="yesterday")


def _rows(log: RunLog, query: str) -> list[tuple[str]]:
    with log.database.reading() as connection:
        assert connection is not None
        return connection.execute(query.replace("FROM ", "FROM log.")).fetchall()


def test_heads_of_a_revoked_key_count_no_more(log: RunLog) -> None:
    filled(log, "folded file")
    first = keys.signing_key().public.id
    keys.rotate()
    assert verify(log).is_whole  # retired: what it signed until then counts
    keys.revoke(first, "lost")
    assert "which was revoked" in said(verify(log), 40)
    log.close()
    log.fold()  # signs what comes after with the new key, and so all before
    assert verify(log).is_whole


def test_damage_that_a_fold_found_stays_found(log: RunLog) -> None:
    filled(log, "file")
    [path] = log.segments.glob("*.jsonl")
    content = bytearray(path.read_bytes())
    content[content.index(b'"run_id":"r1"') + 11] ^= 1
    path.write_bytes(content)
    assert "the checksum does not fit, after event 4" in "\n".join(map(str, verify(log).faults))
    log.close()
    log.fold()
    report = "\n".join(map(str, verify(log).faults))
    assert "damaged when it was folded, at byte" in report
    assert "event 5 (database): this event is missing" in report


def test_pruned_events_are_no_fault_unless_nobody_signed_that(log: RunLog) -> None:
    filled(log, "archive")
    prune(log, 1)
    report = verify(log)
    assert report.is_whole
    assert report.remarks == ["40 events were pruned for good, signed (1 stretches)"]
    change(log, "UPDATE pruned SET first_n = 0")
    assert "is not what the key" in said(verify(log), 0)
    change(log, "DELETE FROM pruned")
    assert "the events 1 to 40 are missing" in said(verify(log), 1)


# ---- what is no event, no segment, no erasure


def forge(log: RunLog, event: bytes, private: bytes = b"{}") -> None:
    """Append a line with a right checksum to the segment."""
    rest = b'"hash":"%b","salt":"%b","event":%b,"private":%b}' % (b"0" * 64, b"0" * 32, event, private)
    with open(next(log.segments.glob("*.jsonl")), "ab") as file:
        file.write(b'{"len":%9d,"crc":"%08x",%b\n' % (len(rest), zlib.crc32(rest), rest))


@pytest.mark.parametrize(
    "event",
    [
        b'{"id":"$-5","type":"\xff\xfe"}',
        b'{"id":"$-5","type":',
        b'{"id":"$-5x","type":"run"}',
        b'{"id":"$-' + b"9" * 19 + b'","type":"run"}',
        b'{"id":"$-' + b"9" * 5000 + b'"}',
        b'{"id":"$--5","type":"run"}',
        b'{"id":"another-5","type":"run"}',
        b'{"id":"$-5","type":"erasure","runs":5}',
        b'{"id":"$-5","type":"erasure","runs":[5]}',
        b'{"id":"$-5","type":"erasure","runs":["x"],"callers":{}}',
        b'{"id":"$-5","type":["erasure"],"run_id":{}}',
    ],
)
@pytest.mark.parametrize("is_folded", [False, True])
def test_lines_with_a_right_checksum_that_are_no_events_are_faults(log: RunLog, event: bytes, is_folded: bool) -> None:
    write(log, run("r1"))
    if is_folded:
        log.fold()
    name = next(log.segments.glob("*.jsonl")).stem.encode()
    forge(log, event.replace(b"$", name), b'{"x":"\xff"}')
    assert not verify(log).is_whole


def test_erasures_that_name_no_runs_are_faults_wherever_they_lie(log: RunLog) -> None:
    log.write([({"type": "erasure", "name": "user", "runs": {"r1": 1}}, {})])
    assert "an erasure that does not name runs" in said(verify(log), 1)
    log.close()
    log.fold()
    assert "an erasure that does not name runs" in said(verify(log), 1)
    compact(log, 0)
    assert "an erasure that does not name runs" in said(verify(log), 1)


def test_only_the_outcome_of_a_caller_may_be_without_its_private_part(log: RunLog) -> None:
    write(log, run("r1"))
    log.write([({"type": "erasure", "name": "user", "runs": [], "callers": ["r1"]}, {})])

    def blank(rows: list[Row]) -> None:
        for n in (1, 4):  # its beginning, and its outcome
            at(rows, n)["private"] = "null"

    report = attack(log, "file", blank)
    assert "no erasure says so" in said(report, 1)
    assert said(report, 4) == ""


def test_what_is_no_segment_is_a_remark(log: RunLog) -> None:
    write(log, run("r1"))
    name = f"{'0' * 20}.jsonl"
    (log.segments / name).symlink_to("nowhere")
    (log.segments / "x.jsonl").mkdir()
    (log.segments / "odd name\n.jsonl").write_text("x")
    os.mkfifo(log.segments / f"{'1' * 20}.jsonl")
    report = verify(log)
    assert report.is_whole
    assert sum("is no segment" in remark for remark in report.remarks) == 4
