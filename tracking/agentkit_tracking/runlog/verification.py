"""Whether the run log is as it was written: every event, from the first line to the last head that was signed."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentkit.errors import UsageError
from agentkit_tracking.runlog import heads, stored
from agentkit_tracking.runlog.blanking import OF_CALLED, Named, named
from agentkit_tracking.runlog.database import insert, one
from agentkit_tracking.runlog.files import File, Of, check_file
from agentkit_tracking.runlog.segments import SUFFIX, segment_files
from agentkit_tracking.runlog.status import ended_twice
from agentkit_tracking.runlog.stored import Fault, Stored, missing
from agentkit_tracking.runlog.unfolded import Position, SegmentGone, parts, positions
from agentkit_tracking.runlog.upkeep import Progress, alone, quiet, unknown_archives

if TYPE_CHECKING:
    from pathlib import Path

    import duckdb

    from agentkit_tracking.keys import Trust
    from agentkit_tracking.runlog.log import RunLog


@dataclass
class Report:
    """What `verify` found. Faults are what is not as it was written; remarks what cannot be told, or should be known."""

    events: int = 0
    segments: int = 0
    signed: int = 0  # events that a signed head covers
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    checkpoint: str | None = (
        None  # number and signature of the last head: kept elsewhere, it shows if the end is cut off
    )

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def verify(log: RunLog, *, strict: bool = False, checkpoint: str | None = None, progress: Progress = quiet) -> Report:
    """Check every event of the log where it lies: segment files, database, archives. Folds wait meanwhile, runs do not.

    Args:
        strict: folded events that no signed head covers are faults, not remarks.
        checkpoint: of an earlier report; the log must still hold that head.

    Raises:
        LogBusy: folds or other programs hold the log all the time.
        UsageError: the trusted keys cannot be read, or the checkpoint is none.
    """
    from agentkit_tracking import keys

    wanted = None if checkpoint is None else _parsed(checkpoint)
    report = Report()
    if not log.folder.exists():
        return report
    trust = keys.load_trust()
    with alone(log), log.database.reading() as connection:
        known = {} if connection is None else positions(connection)
        paths = segment_files(log.segments)
        starts = {path: known.get(path.stem) or Position(path.stem) for path in paths}
        broken_off = sum(_is_broken_off(path, position) for path, position in starts.items())
        files = [_checked(path, position) for path, position in starts.items()]
        _check_folders(connection, log, paths, report)
        if connection is not None:
            _check_stored(connection, log, known, files, trust, strict, report, progress)
        elif wanted is not None:
            report.faults.append(Fault("heads", None, None, "database", "there is no database, but a checkpoint"))
        _check_files(files, report)
        if broken_off:
            report.remarks.append(
                f"{broken_off} segments that are not folded to their end do not end in `closed`: their processes were killed, or "
                "they were cut off"
            )
        if connection is None:
            _check_erased(files, report)
        if wanted is not None and connection is not None:
            _check_checkpoint(connection, wanted, report)
    report.segments = len({*known, *(file.segment for file in files)})
    return report


def _checked(path: Path, position: Position) -> File:
    try:
        return check_file(path, position)
    except OSError as e:
        what = f"the file cannot be read: {e.strerror}"
        return File(path.stem, faults=[Fault(path.stem, None, None, path.name, what)])


def _is_broken_off(path: Path, position: Position) -> bool:
    """Whether nobody writes to a segment any more, no fold has said how it ended, and its last event is not that it was closed."""
    if position.state != "open":
        return False
    with suppress(OSError, SegmentGone):  # `_checked` says what is wrong with it
        for part in parts(path, position, check=False):
            position = part.after
    return position.state == "ended" and not position.torn_bytes  # those that end within an event are named


def _check_folders(
    connection: duckdb.DuckDBPyConnection | None, log: RunLog, paths: list[Path], report: Report
) -> None:
    """What lies there and belongs to nothing."""
    for file in [] if log.database.is_shared else unknown_archives(connection, log.folder):
        what = (
            "an archive file that the database does not know: its events are seen by nobody, and an erasure does not reach it; "
            "`agentkit log adopt` takes it in if it is whole"
        )
        report.faults.append(Fault("archive", None, None, file, what))
    names = {path.name for path in paths}
    for path in sorted(log.segments.iterdir()) if log.segments.is_dir() else []:
        if path.name not in names and not path.name.startswith("."):
            report.remarks.append(f"{path.name!r} in {log.segments.name} is no segment, and was left alone")


def _check_stored(
    connection: duckdb.DuckDBPyConnection, log: RunLog, known: dict[str, Position], files: list[File], trust: Trust,
    strict: bool, report: Report, progress: Progress,
) -> None:  # fmt: skip
    stored.open_kept(connection, log.folder, report.faults)
    signed_at = _check_heads(connection, trust, report)
    _check_pruned(connection, trust, report)
    erased = _erasures(connection, files, report)
    _table(connection, "ends", ((p.segment, p.n, p.hash) for p in known.values()))
    done = Stored()
    ranges = list(stored.batches(connection))
    total = sum(events for *_, events in ranges)
    for first, last, _ in ranges:
        stored.check(connection, first, last, done)
        progress(done.events, total)
    report.events += done.events
    report.faults += done.faults
    nameless = int(one(connection.execute("SELECT count(*) FROM kept WHERE segment IS NULL OR n IS NULL")))
    if nameless:
        report.faults.append(Fault("database", None, None, "database", f"{nameless} rows name no segment and number"))
    if twice := ended_twice(connection, "kept"):
        report.remarks.append(f"{twice} runs have several ends, which all count: their program forked inside them")
    _check_ends(done, known, signed_at, report)
    here = {file.segment for file in files}
    for segment, position in known.items():
        is_here = not log.database.is_shared or position.host == socket.gethostname()
        if position.state == "open" and is_here and segment not in here:
            what = "its file is gone before it was folded to its end: what came next, if anything, is lost"
            report.faults.append(Fault(segment, position.n + 1, None, f"{segment}{SUFFIX}", what))
    _check_against_files(connection, files, erased, report)
    _findings(connection, report)
    _signed(done, signed_at, strict, report)


def _table(connection: duckdb.DuckDBPyConnection, name: str, rows: Iterable[tuple[str, int, str]]) -> None:
    connection.execute(f"CREATE TEMP TABLE {name} (segment VARCHAR, n BIGINT, hash VARCHAR)")
    insert(connection, name, "segment, n, hash", list(rows))


# ---- signatures


def _check_heads(connection: duckdb.DuckDBPyConnection, trust: Trust, report: Report) -> dict[str, int]:
    """How far each segment is signed; the heads that count are the table `good_heads`."""
    names = ("segment", "n", "hash", "number", "previous", "signed_at")
    rows = connection.execute(
        f"SELECT {', '.join(names)}, key_id, signature FROM log.heads ORDER BY number, segment, n"
    ).fetchall()
    good: list[tuple[str, int, str]] = []
    doubted: list[tuple[str, int, str]] = []
    signatures = {(row[3], row[-1]) for row in rows}  # several machines may follow the same head
    for row in rows:
        values, (key_id, signature) = dict(zip(names, row, strict=False)), row[-2:]
        number = values["number"]
        if number is not None and number > 1 and (number - 1, values["previous"]) not in signatures:
            what = f"the signed head {number - 1}, which head {number} follows, is missing or replaced; events may have gone with it"
            report.faults.append(Fault(values["segment"], values["n"], None, "heads", what))
        if doubt := heads.doubt(values, key_id, signature, trust):
            doubted.append((values["segment"], values["n"], doubt))
        else:
            good.append((values["segment"], values["n"], values["hash"]))
    signed_at: dict[str, int] = {}
    for segment, n, _ in good:
        signed_at[segment] = max(n, signed_at.get(segment, -1))
    for segment, n, doubt in doubted:
        if not ("revoked" in doubt and signed_at.get(segment, -1) >= n):  # a later head of a good key covers it
            report.faults.append(Fault(segment, n, None, "heads", f"its signed head does not count: {doubt}"))
    _table(connection, "good_heads", good)
    numbered = [(row[3], row[-1]) for row in rows if row[3] is not None]
    report.checkpoint = f"{numbered[-1][0]}:{numbered[-1][1][:32]}" if numbered else None
    return signed_at


def _parsed(checkpoint: str) -> tuple[int, str]:
    number, _, signature = checkpoint.partition(":")
    if not number.isdigit() or len(signature) < 16:
        raise UsageError(f"{checkpoint!r} is no checkpoint; `agentkit log verify` prints one, e.g. 12:5f0c…")
    return int(number), signature.lower()


def _check_checkpoint(connection: duckdb.DuckDBPyConnection, wanted: tuple[int, str], report: Report) -> None:
    found = connection.execute("SELECT signature FROM log.heads WHERE number = ?", [wanted[0]]).fetchall()
    if not any(signature.startswith(wanted[1]) for (signature,) in found):
        what = "another stands in its place" if found else "it is gone, and what was logged since then perhaps, too"
        report.faults.append(Fault("heads", wanted[0], None, "heads", f"the head of the checkpoint: {what}"))


def _check_pruned(connection: duckdb.DuckDBPyConnection, trust: Trust, report: Report) -> None:
    names = ("segment", "first_n", "last_n", "hash", "signed_at")
    rows = connection.execute(f"SELECT {', '.join(names)}, key_id, signature FROM log.pruned").fetchall()
    good, events = [], 0
    for row in rows:
        values, (key_id, signature) = dict(zip(names, row, strict=False)), row[-2:]
        if doubt := heads.doubt(values, key_id, signature, trust):
            what = (
                f"the events {values['first_n']} to {values['last_n']} are gone, and that they were pruned is {doubt}"
            )
            report.faults.append(Fault(values["segment"], values["first_n"], None, "pruned", what))
        else:
            good.append((values["segment"], values["first_n"], values["last_n"], values["hash"]))
            events += values["last_n"] - values["first_n"] + 1
    connection.execute("CREATE TEMP TABLE good_pruned (segment VARCHAR, first_n BIGINT, last_n BIGINT, hash VARCHAR)")
    insert(connection, "good_pruned", "segment, first_n, last_n, hash", good)
    if good:
        report.remarks.append(f"{events} events were pruned for good, signed ({len(good)} stretches)")


# ---- erasures


def _erasures(connection: duckdb.DuckDBPyConnection, files: list[File], report: Report) -> Named:
    """The runs that erasures name, as the table `erased`; what has no private part and is not among them is a fault."""
    rows = connection.execute("SELECT segment, n, place, event FROM kept WHERE type = 'erasure'").fetchall()
    told: dict[tuple[str, int], tuple[str, Any]] = {(segment, n): (place, event) for segment, n, place, event in rows}
    told |= _in_files(files)
    erased = _named(told, report)
    connection.execute("CREATE TEMP TABLE erased (run_id VARCHAR, is_whole BOOLEAN)")
    if erased == Named():
        return erased
    for runs, is_whole in ((erased.runs, True), (erased.callers, False)):
        connection.execute("INSERT INTO erased SELECT unnest(?::VARCHAR[]), ?", [list(runs), is_whole])
    gone = one(
        connection.execute("SELECT count(*) FROM kept WHERE private IS NULL AND run_id IN (SELECT run_id FROM erased)")
    )
    of = f" of {len(erased.runs)} runs" + (f" and {len(erased.callers)} callers" if erased.callers else "")
    report.remarks.append(f"private parts of {gone} events{of} were erased on request")
    left = connection.execute(
        "SELECT segment, n FROM kept WHERE private <> '{}' AND (run_id IN (SELECT run_id FROM erased WHERE is_whole) "
        f"OR type IN {OF_CALLED} AND run_id IN (SELECT run_id FROM erased))"
    ).fetchall()
    _say_left({*left, *_left_in_files(files, erased)}, report)
    return erased


def _in_files(files: list[File]) -> dict[tuple[str, int], tuple[str, Any]]:
    """The erasures on file: where, and the event."""
    return {(f.segment, n): (f"{f.segment}{SUFFIX}", event) for f in files for n, event in f.erasures}


def _named(told: dict[tuple[str, int], tuple[str, Any]], report: Report) -> Named:
    """What all erasures together name; those that are not as they are written are faults."""
    runs: set[str] = set()
    callers: set[str] = set()
    for (segment, n), (place, event) in sorted(told.items(), key=lambda item: str(item[0])):
        erasure = None if event is None else named(event)
        if erasure is None:
            report.faults.append(Fault(segment, n, None, place, "an erasure that does not name runs as one does"))
        else:
            runs.update(erasure.runs)
            callers.update(erasure.callers)
    return Named(tuple(sorted(runs)), tuple(sorted(callers - runs)))


def _left_in_files(files: list[File], erased: Named) -> set[tuple[str, int]]:
    return {(file.segment, of.n) for file in files for of in _covered(file.private, erased)}


def _covered(events: list[Of], erased: Named) -> list[Of]:
    """Those whose private parts the erasures take out."""
    runs, callers = set(erased.runs), set(erased.callers)
    return [of for of in events if of.run_id in runs or (of.run_id in callers and of.type in OF_CALLED)]


def _unexplained(file: File, erased: Named) -> list[Of]:
    explained = set(_covered(file.erased, erased))
    return [of for of in file.erased if of not in explained]


def _say_left(left: set[tuple[str, int]], report: Report) -> None:
    if left:
        report.remarks.append(f"{len(left)} events of erased runs still have theirs: run `agentkit log erase` again")


# ---- what the parts say of each other


def _check_ends(done: Stored, known: dict[str, Position], signed_at: dict[str, int], report: Report) -> None:
    for segment in sorted({*known, *signed_at, *done.last}):
        last = done.last.get(segment, -1)
        folded = known[segment].n if segment in known else None
        expected = max(folded if folded is not None else -1, signed_at.get(segment, -1))
        if last < expected:
            says = "a signed head" if signed_at.get(segment, -1) == expected else "the position of the fold"
            report.faults.append(missing(segment, last + 1, expected, "database", f"; {says} names them"))
        elif folded is None or last > folded:
            first = 0 if folded is None else folded + 1
            what = f"the events {first} to {last} stand in the database, but nothing says that they were folded"
            report.faults.append(Fault(segment, first, None, "database", what))


def _check_against_files(
    connection: duckdb.DuckDBPyConnection, files: list[File], erased: Named, report: Report
) -> None:
    _table(connection, "on_file", (row for file in files for row in file.folded))
    other = connection.execute(
        f"SELECT f.segment, f.n, k.run_id, k.place FROM on_file f JOIN kept k ON k.segment = f.segment AND k.n = f.n "
        f"WHERE k.hash <> f.hash ORDER BY f.segment, f.n LIMIT {stored.MOST}"
    ).fetchall()
    for segment, n, run_id, place in other:
        what = f"it is another event in its file ({segment}{SUFFIX}), which was folded there"
        report.faults.append(Fault(segment, n, run_id, place, what))
    rows = [(file.segment, of.n, of.run_id) for file in files for of in _unexplained(file, erased)]
    _table(connection, "blank", rows)
    unexplained = connection.execute(
        "SELECT segment, n, hash FROM blank WHERE NOT EXISTS "
        "(SELECT 1 FROM good_pruned p WHERE p.segment = blank.segment AND n BETWEEN first_n AND last_n) ORDER BY ALL"
    ).fetchall()
    for segment, n, run in unexplained:
        what = "its private part was taken out, and no erasure says so"
        report.faults.append(Fault(segment, n, run or None, f"{segment}{SUFFIX}", what))


def _check_files(files: list[File], report: Report) -> None:
    fresh = 0
    for file in files:
        report.faults += file.faults
        new = file.events - len(file.folded)
        report.events += new
        fresh += new
        if file.torn_bytes:
            report.remarks.append(
                f"{file.segment}: its process died while it wrote; {file.torn_bytes} bytes of an event that was not "
                "acknowledged are left"
            )
    if fresh:
        report.remarks.append(f"{fresh} events are not folded yet, and so not signed")


def _check_erased(files: list[File], report: Report) -> None:
    """As nothing was ever folded, only the files can say what was erased."""
    erased = _named(_in_files(files), report)
    for file in files:
        for of in _unexplained(file, erased):
            what = "its private part was taken out, and no erasure says so"
            report.faults.append(Fault(file.segment, of.n, of.run_id or None, f"{file.segment}{SUFFIX}", what))
    _say_left(_left_in_files(files, erased), report)


def _findings(connection: duckdb.DuckDBPyConnection, report: Report) -> None:
    """What folds found in segment files, and has not been found again."""
    said = {(fault.segment, fault.n) for fault in report.faults}
    rows: list[Any] = connection.execute(
        "SELECT DISTINCT segment, byte, n, fault, why FROM log.findings ORDER BY ALL"
    ).fetchall()
    for segment, byte, n, fault, why in rows:
        if n is None or (segment, n) not in said:
            what = f"{fault} when it was folded, at byte {byte}: {why}"
            report.faults.append(Fault(segment, n, None, f"{segment}{SUFFIX}", what))
    ended, torn = connection.execute(
        "SELECT count(*), count(*) FILTER (torn_bytes > 0) FROM log.segments WHERE state = 'ended'"
    ).fetchall()[0]
    if ended:
        report.remarks.append(f"{ended} segments ended without being closed (killed), {torn} of them within an event")


def _signed(done: Stored, signed_at: dict[str, int], strict: bool, report: Report) -> None:
    """How much of what is folded is under a signed head."""
    unsigned = {s: n - max(signed_at.get(s, -1), -1) for s, n in done.last.items() if n > signed_at.get(s, -1)}
    report.signed = max(0, done.events - sum(unsigned.values()))
    if not unsigned:
        return
    if strict:
        report.faults += [
            Fault(s, done.last[s] - n + 1, None, "heads", f"{n} folded events are under no signed head")
            for s, n in sorted(unsigned.items())[: stored.MOST]
        ]
    else:
        report.remarks.append(
            f"{sum(unsigned.values())} folded events in {len(unsigned)} segments are under no signed head: folded where "
            "no trusted key was at hand"
        )
