"""Archives that the database does not name, since it was lost or comes from an older backup, are taken in again.

Somebody has to ask for it: what lies in the folder may come from a backup, too, and hold what was erased or pruned since. A file
is taken in if all of it is as it was written and each event follows from one that the log has; whoever asks signs that.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit.errors import UsageError
from agentkit_tracking.home import author
from agentkit_tracking.runlog import heads, stored, upkeep
from agentkit_tracking.runlog.blanking import OF_CALLED, Named, named
from agentkit_tracking.runlog.database import insert, transaction
from agentkit_tracking.runlog.erasure import announce
from agentkit_tracking.runlog.segments import segment_files
from agentkit_tracking.runlog.upkeep import ARCHIVE, WHOLE, archived, parquet

if TYPE_CHECKING:
    import duckdb

    from agentkit_tracking.keys import Trust
    from agentkit_tracking.runlog.log import RunLog

_OWN = re.compile(rf"{ARCHIVE}/day=(\d{{4}}-\d\d-\d\d)/[0-9a-f]{{20}}\.parquet")
_PATIENCE_S = 60.0  # for readers to leave


@dataclass
class Adopted:
    """What was taken in, and what was left, each file with the reason."""

    files: list[str] = field(default_factory=list)
    events: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    blank: int = 0  # events whose private parts are gone, which no erasure said
    open_ends: int = (
        0  # segments that do not end in `closed`: their process was killed, or their end was lost with the database
    )


def adopt(log: RunLog, *, accept_erased: bool = False) -> Adopted:
    """Take in the archives that the database does not name. Restore first what else there is of the log.

    Events that stand in the database, too, since the segment that they come from is still on file, are taken out of it.

    Args:
        accept_erased: also take events whose private parts are gone and which no erasure names, since it was lost with the
            database: a new erasure names their runs.

    Raises:
        LogBusy: folds or readers hold the log all the time.
        UsageError: it is a lake, or the trusted keys cannot be read.
    """
    from agentkit_tracking import keys

    if log.database.is_shared:
        raise UsageError(f"{log.database} is a lake, which has no archives; nothing was done")
    trust = keys.load_trust()
    upkeep.fold_all(log)
    with upkeep.alone(log):
        with log.database.writing(_PATIENCE_S):
            pass  # makes it where nothing was left to fold
        with log.database.reading() as connection:
            assert connection is not None
            offer = _Offer(connection, log, trust, accept_erased)
            offer.examine()
        if offer.files:
            if offer.lost != Named():  # first, as an erasure does
                announce(log, offer.lost, "adopted without private parts; the erasure was lost", author())
            with log.database.writing(_PATIENCE_S) as connection, transaction(connection):
                return offer.take_in(connection)
    return Adopted(refused=offer.refused)


class _Offer:
    """The unknown archives, and why some of them are refused."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, log: RunLog, trust: Trust, accept_erased: bool) -> None:
        self._connection, self._folder, self._trust = connection, log.folder, trust
        self._segments, self._accept_erased = log.segments, accept_erased
        self.lost = Named()  # what erasures named that were lost
        self._blank = 0
        self.refused: dict[str, str] = {}
        self.files: dict[str, tuple[int, str]] = {}  # with events and SHA-256
        for file in upkeep.unknown_archives(connection, log.folder):
            self._open(file)

    def _open(self, file: str) -> None:
        """Whether it can be read, and is of the day that its folder says."""
        import duckdb

        found = _OWN.fullmatch(file)
        if found is None or not (self._folder / file).is_file():
            self.refused[file] = "`agentkit log compact` has not written it"
            return
        query = f"SELECT count(*), count(*) FILTER (logged_at::DATE IS DISTINCT FROM DATE '{found[1]}'), bit_xor(hash({WHOLE}))"
        try:
            with open(self._folder / file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            source = parquet(self._folder, [file])
            types, wanted = (
                self._connection.sql(f"SELECT {WHOLE} FROM {rows}").types for rows in (source, "log.events")
            )
            (row,) = self._connection.execute(f"{query} FROM {source}").fetchall()
        except (OSError, duckdb.Error) as e:
            self.refused[file] = f"it cannot be read: {str(e).splitlines()[0]}"
            return
        if types != wanted:
            self.refused[file] = "its columns are of other types"
        elif row[1]:
            self.refused[file] = f"{row[1]} of its events are of another day"
        else:
            self.files[file] = (int(row[0]), digest)

    def examine(self) -> None:
        """Refuse what is not whole, until the rest is."""
        self._tables()
        offered = self.files
        while True:
            self.files = {file: told for file, told in offered.items() if file not in self.refused}
            if not self.files:
                return
            self._view("offered", list(self.files))
            older = self._older()
            self.files = {file: told for file, told in self.files.items() if file not in older}
            self._view("offered", list(self.files))
            if not (bad := self._known() or self._faults()):
                self.refused |= older
                return
            self.refused |= bad  # what follows from it, or is older, is looked at once more

    def take_in(self, connection: duckdb.DuckDBPyConnection) -> Adopted:
        """From this transaction on, they count."""
        self._connection = connection
        self._view("offered", list(self.files))
        for file, (events, digest) in self.files.items():
            day = file.split("/")[1].removeprefix("day=")
            connection.execute("INSERT INTO log.archives VALUES (?, ?, ?, ?, now())", [day, file, events, digest])
        connection.execute("DELETE FROM log.events WHERE (segment, n) IN (SELECT segment, n FROM offered)")
        # How far segments reach whose positions were lost. Never of one that is on file: what its process appends would not be folded.
        ends = connection.execute(
            """SELECT o.segment, max(o.n), arg_max(o.hash, o.n), arg_max(o.name, o.n) FILTER (o.type = 'segment'),
                max(o.event->>'host') FILTER (o.n = 0), max(TRY_CAST(o.event->>'pid' AS BIGINT)) FILTER (o.n = 0), arg_max(o.type, o.n)
            FROM offered o LEFT JOIN log.segments s ON s.segment = o.segment
            GROUP BY o.segment HAVING max(o.n) > coalesce(any_value(s.n), -1) ORDER BY o.segment"""
        ).fetchall()
        here = {path.stem for path in segment_files(self._segments)}
        ends = [end for end in ends if end[0] not in here]
        events = sum(events for events, _ in self.files.values())
        done = Adopted(list(self.files), events, self.refused, self._blank)
        rows = []
        for segment, n, digest, name, host, pid, kind in ends:
            state = "closed" if (kind, name) == ("segment", "closed") else "ended"
            done.open_ends += state == "ended"
            rows.append((segment, state, host, pid, 0, n, digest, 0, datetime.now(UTC)))
        if rows:
            connection.execute(
                "DELETE FROM log.positions WHERE segment IN (SELECT unnest(?))", [[row[0] for row in rows]]
            )
        names = "segment, state, host, pid, next_byte, n, hash, torn_bytes, folded_at"
        insert(connection, "log.positions", names, rows)
        heads.sign(connection, [(segment, n, digest) for segment, n, digest, *_ in ends])
        return done

    # ---- what is wrong with them

    def _older(self) -> dict[str, str]:
        """Of files that hold the same event the one that was written last counts: an erasure writes them anew."""
        rows = self._connection.execute(
            "SELECT DISTINCT places FROM (SELECT list(place ORDER BY place) AS places FROM offered "
            "GROUP BY segment, n HAVING count(*) > 1)"
        ).fetchall()
        found: dict[str, str] = {}
        for (places,) in rows:
            *older, newest = sorted(places, key=lambda place: Path(place).name)
            found |= dict.fromkeys(older, f"events of it stand in {newest}, which was written later")
        return found

    def _known(self) -> dict[str, str]:
        """Those that hold what the log has already, what it has otherwise, or what is gone for good."""
        of_runs, of_callers = (f"SELECT run_id FROM erased {where}" for where in ("WHERE is_whole", ""))
        wrong = {
            "it goes on where the segment file, which is still there, does not": "JOIN on_file f ON f.segment = o.segment "
            "LEFT JOIN log.segments s ON s.segment = o.segment WHERE o.n > coalesce(s.n, -1)",
            "it goes on where the segment was closed": "JOIN log.segments s ON s.segment = o.segment "
            "WHERE s.state = 'closed' AND o.n > s.n",
            "events of it were pruned for good": "JOIN good_pruned g ON g.segment = o.segment AND o.n BETWEEN g.first_n AND g.last_n",
            "events of it stand in another archive": "JOIN archived k ON k.segment = o.segment AND k.n = o.n",
            "the database has other events in their place": "JOIN log.events k ON k.segment = o.segment AND k.n = o.n AND k.hash <> o.hash",
            "it holds what was erased on request; delete it": f"WHERE o.private <> '{{}}' AND (o.run_id IN ({of_runs}) "
            f"OR o.type IN {OF_CALLED} AND o.run_id IN ({of_callers}))",
        }
        self._erased()
        found: dict[str, str] = {}
        for why, condition in wrong.items():
            rows = self._connection.execute(f"SELECT DISTINCT o.place FROM offered o {condition}").fetchall()
            found |= {file: why for (file,) in rows if file not in found}
        return found

    def _faults(self) -> dict[str, str]:
        """Those whose events are not as they were written, or follow from none that is there; as `verify` finds it."""
        done, make = stored.Stored(), self._connection.execute
        make("CREATE OR REPLACE TEMP TABLE looked_at AS SELECT DISTINCT segment FROM offered WHERE segment IS NOT NULL")
        make(
            "CREATE OR REPLACE TEMP TABLE twice AS SELECT segment, n FROM offered SEMI JOIN log.events USING (segment, n)"
        )
        make(
            f"""CREATE OR REPLACE TEMP VIEW kept AS SELECT * FROM (
                SELECT place, {WHOLE} FROM offered UNION ALL BY NAME SELECT place, {WHOLE} FROM archived
                UNION ALL BY NAME SELECT 'database' AS place, {WHOLE} FROM log.events ANTI JOIN twice USING (segment, n))
            WHERE segment IN (SELECT segment FROM looked_at)"""
        )
        for first, last, _ in stored.batches(self._connection):
            stored.check(self._connection, first, last, done)
        found: dict[str, str] = {}
        for fault in done.faults:
            for file in [fault.where] if fault.where in self.files else self._beside(fault):
                found.setdefault(file, str(fault))
        for (file,) in self._connection.execute(
            "SELECT DISTINCT place FROM offered WHERE segment IS NULL OR n IS NULL"
        ).fetchall():
            found[file] = "rows of it name no segment and number"
        return found

    def _beside(self, fault: stored.Fault) -> list[str]:
        """Those that hold the event of a fault elsewhere, or the one before, from which it does not follow."""
        query = "SELECT DISTINCT place FROM offered WHERE segment = ? AND n BETWEEN ? - 1 AND ?"
        return [file for (file,) in self._connection.execute(query, [fault.segment, fault.n, fault.n]).fetchall()]

    # ---- what they are compared with

    def _tables(self) -> None:
        """The tables that `stored.check` wants, of what the database has."""
        make = self._connection.execute
        self._view(
            "archived", [file for _, file, _, _ in archived(self._connection) if (self._folder / file).is_file()]
        )
        good = self._signed("heads", "segment, n, hash, number, previous, signed_at")
        make("CREATE TEMP TABLE good_heads (segment VARCHAR, n BIGINT, hash VARCHAR)")
        insert(self._connection, "good_heads", "segment, n, hash", [(v["segment"], v["n"], v["hash"]) for v in good])
        gone = self._signed("pruned", "segment, first_n, last_n, hash, signed_at")
        make("CREATE TEMP TABLE good_pruned (segment VARCHAR, first_n BIGINT, last_n BIGINT, hash VARCHAR)")
        stretches = [(v["segment"], v["first_n"], v["last_n"], v["hash"]) for v in gone]
        insert(self._connection, "good_pruned", "segment, first_n, last_n, hash", stretches)
        make("CREATE TEMP TABLE ends AS SELECT segment, n, hash FROM log.segments")
        on_file = [path.stem for path in segment_files(self._segments)]
        make("CREATE TEMP TABLE on_file AS SELECT unnest(?::VARCHAR[]) AS segment", [on_file])

    def _signed(self, table: str, names: str) -> list[dict[str, Any]]:
        """Rows whose signature counts."""
        rows = self._connection.execute(f"SELECT {names}, key_id, signature FROM log.{table}").fetchall()
        told = [(dict(zip(names.split(", "), row, strict=False)), row[-2], row[-1]) for row in rows]
        return [values for values, key, signature in told if not heads.doubt(values, key, signature, self._trust)]

    def _erased(self) -> None:
        """Runs that erasures name, those in the files on offer included."""
        rows = self._connection.execute(
            "SELECT event FROM log.events WHERE type = 'erasure' UNION ALL SELECT event FROM archived WHERE type = 'erasure' "
            "UNION ALL SELECT event FROM offered WHERE type = 'erasure'"
        ).fetchall()
        told = [erasure for (event,) in rows if (erasure := named(event)) is not None]
        self._connection.execute("CREATE OR REPLACE TEMP TABLE erased (run_id VARCHAR, is_whole BOOLEAN)")
        runs = {run for erasure in told for run in erasure.runs}
        callers = {run for erasure in told for run in erasure.callers} - runs
        if self._accept_erased:
            blank = self._connection.execute(
                f"SELECT run_id, coalesce(type IN {OF_CALLED}, false) FROM offered WHERE private IS NULL AND run_id IS NOT NULL"
            ).fetchall()
            blank = [(run, of) for run, of in blank if run not in runs and not (of and run in callers)]
            whole = {run for run, of in blank if not of}
            others = {run for run, _ in blank} - whole
            self._blank, self.lost = len(blank), Named(tuple(sorted(whole)), tuple(sorted(others)))
            runs, callers = runs | whole, (callers | others) - whole
        insert(self._connection, "erased", "run_id, is_whole", [(run, run in runs) for run in sorted(runs | callers)])

    def _view(self, name: str, files: list[str]) -> None:
        """Archives as a view, with the place of each event."""
        place = f"substr(filename, {len(str(self._folder)) + 2}) AS place"
        rows = f"SELECT {place}, {WHOLE} FROM {parquet(self._folder, files)}"
        if not files:
            rows = f"SELECT '' AS place, {WHOLE} FROM log.events WHERE false"
        self._connection.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {rows}")
