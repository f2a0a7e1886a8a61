"""Archives of a lost database are taken in again if they are whole, and left, with the reason, if they are not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from log_files import Row, ago, edit_file, rehash, run, write
from test_log_verify import invented
from typer.testing import CliRunner

from agentkit_pipelines.cli import app
from agentkit_tracking import keys
from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.adoption import adopt
from agentkit_tracking.runlog.erasure import erase_user
from agentkit_tracking.runlog.retention import compact, prune
from agentkit_tracking.runlog.verification import verify

ANNA = "55579b557896d0ce"  # SHA-256 of "anna", as records keep it


def closed(log: RunLog, *days: int) -> None:
    """A segment of those days, its first and last event included, whose process is over."""
    for day in days:
        write(log, run(f"d{day}-a", ANNA if day == 8 else None), run(f"d{day}-b"), days=day)
    log.close()
    path = max(log.segments.glob("*.jsonl"))

    def redated(rows: list[Row]) -> None:
        for row, day in ((rows[0], days[0]), (rows[-1], days[-1])):
            row["event"] = re.sub('(?<="logged_at":")[^"]*', ago(day).isoformat(), row["event"])
        rehash(rows)

    edit_file(path, redated)


@pytest.fixture
def log(own_home: Path) -> RunLog:
    """Five days, three of them archived: a segment that is closed, and one that is still written to."""
    keys.create("Ada")
    log = RunLog()
    closed(log, 9, 8)
    for day in (7, 2, 0):
        write(log, run(f"d{day}-a"), run(f"d{day}-b"), days=day)
    compact(log, 3)
    return log


def archives(log: RunLog) -> list[Path]:
    return sorted(log.folder.glob("archive/*/*.parquet"))


def answers(log: RunLog) -> list[tuple[object, ...]]:
    return log.sql("SELECT * EXCLUDE private, private::VARCHAR FROM events ORDER BY segment, n").rows()


def lose(log: RunLog) -> None:
    log.database.path.unlink()


def test_after_a_lost_database_every_answer_is_as_before(log: RunLog) -> None:
    before = answers(log)
    lose(log)
    assert len(answers(log)) < len(before)
    done = adopt(log)
    assert (len(done.files), done.refused, done.open_ends) == (3, {}, 0)
    assert answers(log) == before
    report = verify(log, strict=True)
    assert report.is_whole, report.faults
    assert report.signed == report.events
    assert adopt(log).files == []
    erase_user(log, "anna", why="asked for it")  # reaches them, too
    assert log.sql("SELECT inputs FROM runs WHERE run_id = 'd8-a'").item() is None
    prune(log, 5)
    compact(log, 0)
    assert verify(log).is_whole
    assert sorted(log.runs()["run_id"]) == ["d0-a", "d0-b", "d2-a", "d2-b"]


def test_after_an_older_backup_every_event_is_there_once(log: RunLog, tmp_path: Path) -> None:
    shutil.copy(log.database.path, tmp_path / "backup")
    write(log, run("d4"), days=4)
    compact(log, 0)
    before = answers(log)
    shutil.copy(tmp_path / "backup", log.database.path)
    done = CliRunner().invoke(app, ["log", "adopt"])
    assert done.exit_code == 0, done.output
    assert "events of 2 archives are part of the log again" in done.output  # those since the backup
    assert answers(log) == before
    assert verify(log).is_whole


def test_what_was_lost_with_the_database_is_said(own_home: Path) -> None:
    log = RunLog()
    closed(log, 9, 8)
    closed(log, 7, 2)
    compact(log, 3)
    lose(log)
    done = adopt(log)
    assert (len(done.files), done.refused, done.open_ends) == (3, {}, 1)
    assert sorted(log.runs()["run_id"]) == ["d7-a", "d7-b", "d8-a", "d8-b", "d9-a", "d9-b"]
    report = verify(log)
    assert report.is_whole
    assert "1 segments ended without being closed (killed), 0 of them within an event" in report.remarks


def changed(edit: Callable[[list[Row]], None]) -> Callable[[RunLog, Path], None]:
    """Change the rows of the second archive."""

    def change(log: RunLog, tmp: Path) -> None:
        file = archives(log)[1]
        table = pq.ParquetFile(file).read()
        rows = table.to_pylist()
        edit(rows)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file)

    return change


def altered(rows: list[Row]) -> None:
    rows[1]["event"] = rows[1]["event"].replace('"run"', '"fun"')


def with_other_words(rows: list[Row]) -> None:
    rows[1]["private"] = rows[1]["private"].replace("secret", "harmless")


def forged(rows: list[Row]) -> None:
    rows[0]["event"] = rows[0]["event"].replace('"s"', '"t"')
    first = rows[0]["n"]
    rehash(rows)
    for n, row in enumerate(rows):
        row["n"] = first + n


def of_another_day(log: RunLog, tmp: Path) -> None:
    place = log.folder / "archive" / f"day={ago(5):%Y-%m-%d}"
    place.mkdir()
    archives(log)[1].rename(place / archives(log)[1].name)


def without_the_day_before(log: RunLog, tmp: Path) -> None:
    archives(log)[0].unlink()


def with_what_was_erased(log: RunLog, tmp: Path) -> None:
    file = archives(log)[1]
    shutil.copy(file, tmp / file.name)
    erase_user(log, "anna", why="asked for it")
    [new] = [other for other in archives(log) if other.parent == file.parent]
    new.unlink()
    shutil.copy(tmp / file.name, file)  # from a backup


def not_its_own(log: RunLog, tmp: Path) -> None:
    archives(log)[1].with_name("mine.parquet").write_bytes(b"PAR1")


def no_parquet(log: RunLog, tmp: Path) -> None:
    archives(log)[1].write_bytes(b"PAR1")


def beside(log: RunLog, row: Callable[[Row], Row], types: dict[str, pa.DataType] | None = None) -> Path:
    """An archive of one row, made up like another one's."""
    table = pq.ParquetFile(archives(log)[1]).read()
    schema = pa.schema([pa.field(f.name, (types or {}).get(f.name, f.type)) for f in table.schema])
    file = archives(log)[1].with_name(f"{'e' * 20}.parquet")
    pq.write_table(pa.Table.from_pylist([row(table.to_pylist()[0])], schema), file)
    return file


def made_up(segment: str, n: int, **values: object) -> Callable[[RunLog, Path], None]:
    return lambda log, tmp: void(beside(log, lambda like: {**invented(like, segment, n), **values}))


def of_other_types(log: RunLog, tmp: Path) -> None:
    beside(log, lambda like: {**invented(like, "0" * 20, 0), "n": "zero"}, {"n": pa.string()})


def void(_: object) -> None:
    """For a lambda."""


@pytest.mark.parametrize(
    ("damage", "said", "left"),
    [
        (changed(altered), "it was changed: its hash does not follow", 1),
        (changed(with_other_words), "its private part was changed", 1),
        (changed(forged), "its hash does not follow from it and the event before", 1),
        (of_another_day, "of its events are of another day", 1),
        (without_the_day_before, "are missing", 1),
        (with_what_was_erased, "it holds what was erased on request; delete it", 1),
        (no_parquet, "it cannot be read", 1),
        (not_its_own, "`agentkit log compact` has not written it", 1),
        (made_up("0" * 20, -7), "no event has such a number", 1),
        (made_up("", 0), "no segment has such a name", 1),
        (made_up("", 0, event="{}"), "what stands in its place is no event", 1),
        (made_up("", 0, event="junk"), "what stands in its place is no event", 1),
        (made_up("0" * 20, 0, logged_at=None), "of its events are of another day", 1),
        (of_other_types, "its columns are of other types", 1),
    ],
)
def test_what_is_not_whole_is_left_with_the_reason(
    log: RunLog, tmp_path: Path, damage: Callable[[RunLog, Path], None], said: str, left: int
) -> None:
    damage(log, tmp_path)
    lose(log)
    files = archives(log)
    done = adopt(log)
    assert len(done.refused) == left, done.refused
    assert all(said in why for why in done.refused.values()), done.refused
    assert len(done.files) == len(files) - left
    assert archives(log) == files
    unknown = [fault.where for fault in verify(log).faults if "does not know" in fault.what]
    assert sorted(unknown) == sorted(done.refused)


def test_what_was_pruned_is_not_brought_back(log: RunLog, tmp_path: Path) -> None:
    file = archives(log)[0]
    shutil.copy(file, tmp_path / "backup")
    prune(log, 8)
    file.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "backup", file.with_name(f"f{file.name[1:]}"))
    result = CliRunner().invoke(app, ["log", "adopt"])
    assert result.exit_code == 3
    assert "events of it were pruned for good" in result.output
    assert "d9-a" not in log.runs()["run_id"]


def test_of_two_files_with_the_same_events_the_later_one_counts(log: RunLog) -> None:
    first = archives(log)[0]
    later = first.with_name(f"f{first.name[1:]}")
    shutil.copy(first, later)
    lose(log)
    done = adopt(log)
    assert list(done.refused) == [str(first.relative_to(log.folder))]
    assert f"{later.name}, which was written later" in done.refused[str(first.relative_to(log.folder))]
    assert len(done.files) == 3
    assert verify(log).events == 5 * 2 * 4 + 3


def what_goes_on(log: RunLog, segment: str) -> Path:
    """An archive with one more event of a segment, made up; anybody can compute its hash."""
    [(n, digest)] = log.sql(f"SELECT max(n), max_by(hash, n) FROM events WHERE segment = '{segment}'").rows()
    return beside(log, lambda like: invented(like, segment, n + 1, digest))


def test_what_a_process_goes_on_to_write_is_not_lost(log: RunLog) -> None:
    [path] = log.segments.glob("*.jsonl")
    file = what_goes_on(log, path.stem)
    done = adopt(log)
    why = "it goes on where the segment file, which is still there, does not"
    assert done.refused == {str(file.relative_to(log.folder)): why}
    write(log, run("later"))
    log.fold()
    assert path.exists()
    assert "later" in log.runs()["run_id"]
    file.unlink()
    assert verify(log).is_whole


def test_nothing_goes_on_after_a_segment_was_closed(own_home: Path) -> None:
    log = RunLog()
    closed(log, 9, 8)
    name = next(log.segments.glob("*.jsonl")).stem
    compact(log, 3)
    what_goes_on(log, name)
    assert list(adopt(log).refused.values()) == ["it goes on where the segment was closed"]


def test_after_an_erasure_was_lost_with_the_database_somebody_can_sign_for_it(own_home: Path) -> None:
    keys.create("Ada")
    log = RunLog()
    closed(log, 9, 8, 7)
    compact(log, 3)
    erase_user(log, "anna", why="asked for it")
    log.close()
    log.fold()
    lose(log)
    done = adopt(log)
    assert (len(done.files), len(done.refused)) == (1, 2)  # what follows from it is left, too
    assert "no erasure says so" in "".join(done.refused.values())
    log.close()
    told = CliRunner().invoke(app, ["log", "adopt", "--accept-erased"])
    assert told.exit_code == 0, told.output
    assert "3 of them have no private part, and count as erased from now on" in told.output
    assert verify(log).is_whole
    log.close()
    log.fold()
    report = verify(log, strict=True)
    assert report.is_whole, report.faults
    assert "private parts of 3 events of 1 runs were erased on request" in report.remarks
    [(by_whom,)] = log.sql("SELECT private->>'why' FROM events WHERE type = 'erasure'").rows()
    assert by_whom == "adopted without private parts; the erasure was lost"


def test_a_private_part_that_was_changed_is_not_accepted_as_erased(log: RunLog) -> None:
    changed(with_other_words)(log, log.folder)
    lose(log)
    done = adopt(log, accept_erased=True)
    assert (done.blank, len(done.refused)) == (0, 1)
