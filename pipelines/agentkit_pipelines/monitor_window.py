"""What the monitor compares: the runs of one release since it went live, and those of a baseline before them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from agentkit import clock
from agentkit.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from agentkit_tracking.runlog import RunLog

KINDS = ("run", "batch", "map")  # of runs that concern somebody outside
DRAFT = "draft"  # in place of a release: runs of none
FEWEST = 200  # runs of a baseline; what fewer could prove is next to nothing
FIRST_RUNS = 1_000  # of the release itself, where nothing went before it
Ask = Callable[[str, list[Any]], "pl.DataFrame"]
MOST_DAYS = 3_650
_EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
_BASELINE = re.compile(r"(\d{1,7})(d?)")


@dataclass(frozen=True)
class Window:
    """Runs of `release` that ended from `since` to before `until`, beside a baseline.

    The baseline is what the releases `before` (None: all others of the system) did in the `days` up to their last run before
    `since`; or, where `first_runs` is set, the first so many of the release itself. `release` None: runs of no release.
    """

    system: str
    release: str | None
    since: datetime
    until: datetime
    before: tuple[str | None, ...] | None = None
    days: int = 28
    first_runs: int = 0
    block_minutes: int = 60
    kinds: tuple[str, ...] = KINDS
    stage: str | None = None  # only runs at this stage
    gap: str = ""  # why the log no longer holds all of it; then nothing can be said

    @property
    def block_us(self) -> int:
        """Microseconds in a block."""
        return self.block_minutes * 60_000_000

    @property
    def blocks_a_day(self) -> int:
        """About."""
        return max(1, 1440 // self.block_minutes)

    def time(self, block: int) -> datetime:
        """When a block begins, or the one before it ends."""
        return datetime.fromtimestamp(block * self.block_us / 1e6, UTC)

    def __str__(self) -> str:
        name = f"release {self.release[:12]}" if self.release else "drafts"
        kinds = "" if set(self.kinds) == set(KINDS) else f" ({', '.join(self.kinds)})"
        when = f"since {self.since:%Y-%m-%d %H:%M} until {self.until:%Y-%m-%d %H:%M} UTC"
        return f"{self.system}{kinds}, {name} {when}, against {self.against}"

    @property
    def against(self) -> str:
        """The baseline in words."""
        if self.first_runs:
            return f"its own first {self.first_runs:,} runs"
        return f"{self.days} days of {_names(self.before)} before"

    @property
    def comparison(self) -> str:
        """What is held against what, whenever: an alarm of another comparison is another alarm."""
        return f"{','.join(sorted(set(self.kinds)))} against {self.against}"


def _names(releases: tuple[str | None, ...] | None) -> str:
    if releases is None:
        return "other releases"
    return ", ".join(f"release {r[:12]}" if r else "drafts" for r in releases)


@contextmanager
def asking(log: RunLog) -> Iterator[Ask]:
    """Several queries on the log as it is now."""
    with log.connection() as connection:
        yield lambda query, values: connection.sql(query, params=values).pl()


def choose(
    log: RunLog,
    system: str,
    *,
    release: str = "",
    since: str = "",
    until: str = "",
    baseline: str = "28d",
    baseline_release: str = "",
    block_minutes: int = 60,
    kinds: Sequence[str] = KINDS,
) -> Window:
    """The window that these words mean.

    Args:
        release: a release id or how it begins, a version's number, or `draft`; empty: the one in production.
        since: ISO 8601, UTC unless it says otherwise; empty: when that release went live. Keep it, as long as it lives.
        until: likewise; empty: now. The block under way is left for the next look.
        baseline: `28d`: so many days before `since`; `2000`: so many first runs of the release itself, which is also
            what is done where fewer than 200 runs went before.
        baseline_release: like `release`; empty: after a rollback the release itself, earlier; else what it replaced.

    Where days were pruned that it should cover, the window says so in `gap`.

    Raises:
        UsageError: there is no such system or release in the log, or a word is none of these.
    """
    if not 1 <= block_minutes <= 1440:
        raise UsageError(f"a block lasts from 1 to 1440 minutes, not {block_minutes}")
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"{wrong[0]!r} is no kind of run that is watched; use {', '.join(KINDS)}")
    said = _BASELINE.fullmatch(baseline.strip())
    if not said or not int(said[1]) or (said[2] and int(said[1]) > MOST_DAYS):
        raise UsageError(
            f"{baseline!r} is no baseline; give days as 28d ({MOST_DAYS:,} at most), or a number of first runs as 2000"
        )
    begin, end = _moment(since, "since"), _moment(until, "until") or clock.utc()
    was_pruned = _was_pruned(log)
    with asking(log) as ask:
        chosen, live, before = _release(ask, system, release)
        if baseline_release:
            before = (_named(ask, system, baseline_release),)
        begin = begin or live
        if begin is None:
            raise UsageError(
                f"no run of {system} by {release or 'a release'} is in the run log yet; see `agentkit log`"
            )
        if until and end < begin:
            raise UsageError(f"until {until} lies before {begin.isoformat(timespec='minutes')}")
        stage = None if release else "production"
        window = Window(system, chosen, begin, end, before, 28, 0, block_minutes, tuple(kinds), stage)
        window = replace(window, until=max(begin, window.time(int(end.timestamp() * 1e6) // window.block_us)))
        window = replace(window, days=int(said[1])) if said[2] else replace(window, first_runs=int(said[1]))
        if was_pruned and (gap := _gap(ask, window, is_told=bool(since))):
            return replace(window, gap=gap)
        if window.first_runs or baseline_release or len(before_runs(ask, window, "run_id", FEWEST)) == FEWEST:
            return window
        return replace(window, first_runs=FIRST_RUNS)


def _was_pruned(log: RunLog) -> bool:
    with log.database.reading() as connection:
        return connection is not None and bool(connection.execute("SELECT 1 FROM log.pruned LIMIT 1").fetchall())


def _gap(ask: Ask, window: Window, *, is_told: bool) -> str:
    """Why a log of which days were pruned does not do for a window, or nothing.

    What goes are all days up to one, and which one is not recorded: the log is whole from the first day that is left.
    """
    first = ask("SELECT min(logged_at) AS at FROM events", []).item() or clock.utc()
    whole = first.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    last = _last_before(ask, window)
    if window.first_runs:
        # A first run that the log names is the first that is left, unless days without any went before it.
        needed = window.since if is_told else window.since - timedelta(days=window.days)
    elif last is None and window.before:
        needed = None
    else:
        needed = (last or window.since) - timedelta(days=window.days)
    if needed is not None and needed >= whole:
        return ""
    reach = (
        f"reach back to {needed:%Y-%m-%d}" if needed else f"are those of {_names(window.before)}, of which none is left"
    )
    days = (last - whole).days if last is not None else 0
    return (
        f"days were pruned, the run log is whole only from {whole:%Y-%m-%d} on, and the runs to compare {reach}; give "
        f"{f'--baseline {days}d, ' if days > 0 else ''}another --baseline-release, or --since "
        f"{max(whole, window.since):%Y-%m-%d} or later with --baseline {FIRST_RUNS} (its first runs from then on)"
    )


def _moment(text: str, name: str) -> datetime | None:
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(f"--{name} takes a time as 2026-11-20 or 2026-11-20T14:00, not {text!r}") from None
    if found < _EARLIEST:
        raise UsageError(f"--{name} {text} lies before there was any run log; give a time from {_EARLIEST:%Y} on")
    return found


def _release(ask: Ask, system: str, asked: str) -> tuple[str | None, datetime | None, tuple[str | None, ...] | None]:
    """The release, when it went live, and what to compare it with; by the signed history, or by the log alone."""
    moves = _moves(system)
    if not asked and moves:
        move = moves[-1]
        if move.version is None:
            raise UsageError(f"nothing of {system} is in production; name a --release")
        own = move.event == "rolled_back"
        return move.release, move.time, (move.release,) if own else (move.left_release,) if move.left_release else None
    if asked:
        chosen = _named(ask, system, asked)
        went_live = [m.time for m in moves if m.release == chosen and m.version is not None]
        first = _first_run(ask, system, chosen)
        return chosen, went_live[-1] if went_live else first, None
    newest = ask(
        f"SELECT release, min(started_at) FROM outcomes WHERE {_WATCHED} AND system = ? AND stage = 'production' "
        "GROUP BY release ORDER BY 2 DESC LIMIT 1",
        [system],
    )
    if newest.is_empty():
        raise UsageError(f"the run log has no run of {system} in production; name a --release, or `draft`")
    return newest["release"][0], newest[:, 1][0], None


_WATCHED = "parent IS NULL AND kind IN ('run', 'batch', 'map')"


def _first_run(ask: Ask, system: str, release: str | None) -> datetime | None:
    found = ask(
        f"SELECT min(started_at) AS at FROM outcomes WHERE {_WATCHED} AND system = ? AND release IS NOT DISTINCT FROM ?",
        [system, release],
    )
    at: datetime | None = found.item()
    return at


def _moves(system: str) -> list[Any]:
    """What moved in and out of production, oldest first; nothing where no registry is in use here."""
    from agentkit_tracking.home import home, is_local_store

    if is_local_store() and not (home() / "mlflow.db").exists():
        return []
    from agentkit.errors import UnknownReference
    from agentkit_tracking.production import history_of

    try:
        return [entry.move for entry in history_of(system).entries]
    except UnknownReference:
        return []


def _named(ask: Ask, system: str, text: str) -> str | None:
    if text == DRAFT:
        return None
    found = ask(
        "SELECT DISTINCT release FROM outcomes WHERE system = ? AND starts_with(release, ?) ORDER BY 1 LIMIT 3",
        [system, text],
    )["release"].to_list()
    if len(found) == 1 and len(text) >= 6:
        return str(found[0])
    if text.isdigit() and _moves(system):
        from agentkit_tracking.lookup import resolve

        return str(resolve(f"{system}/{text}").release_id)
    problem = "begins several" if len(found) > 1 else "too short" if found else "not in the run log"
    raise UsageError(f"the release {text!r} of {system} is {problem}; `agentkit log` shows them")


# ---- rows


def before_runs(ask: Ask, window: Window, columns: str, limit: int | None = None) -> pl.DataFrame:
    """The baseline's runs before `since`: `columns` are SQL on an outcome event."""
    where, values = _before(ask, window)
    return ask(f"SELECT {columns} FROM events WHERE {where}{f' LIMIT {limit}' if limit else ''}", values)


def own_runs(ask: Ask, window: Window, columns: str, more: str = "") -> pl.DataFrame:
    """The release's own runs: `columns` are SQL on an outcome event, `more` follows the conditions."""
    where, values = _own(window)
    return ask(f"SELECT {columns} FROM events WHERE {where}{more}", values)


def labels(ask: Ask, window: Window, columns: str, *, own: bool) -> pl.DataFrame:
    """The first label that each of these runs was given by then; `columns` are SQL on `given_at`, `label`, `who` and `run_id`."""
    where, values = _own(window) if own else _before(ask, window)
    return ask(
        f"""SELECT {columns} FROM (
            SELECT run_id, min(logged_at) AS given_at, arg_min(result, logged_at) AS label,
                arg_min(coalesce(session, user_hash, run_id), logged_at) AS who
            FROM events WHERE type = 'feedback' AND result IS NOT NULL AND system = ?
                AND run_id IN (SELECT run_id FROM events WHERE {where}) GROUP BY run_id
        ) WHERE given_at < ?""",
        [window.system, *values, window.until if own else window.since],
    )


Where = tuple[str, list[Any]]  # a condition, and the values of its parameters


def _own(window: Window) -> Where:
    where = f"{_of(window)} AND release IS NOT DISTINCT FROM ? AND logged_at >= ? AND logged_at < ?"
    return where, [window.system, window.release, window.since, window.until]


def _before(ask: Ask, window: Window) -> Where:
    where, values = _any_before(window)
    begin = (_last_before(ask, window) or window.since) - timedelta(days=window.days)
    return f"{where} AND logged_at >= ?", [*values, begin]


def _any_before(window: Window) -> Where:
    others, values = _among(window)
    return f"{_of(window)} AND {others} AND logged_at < ?", [window.system, *values, window.since]


def _last_before(ask: Ask, window: Window) -> datetime | None:
    where, values = _any_before(window)
    at: datetime | None = ask(f"SELECT max(logged_at) FROM events WHERE {where}", values).item()
    return at


def _of(window: Window) -> str:
    kinds = ", ".join(f"'{kind}'" for kind in window.kinds)
    return f"type = 'outcome' AND parent IS NULL AND kind IN ({kinds}) {_staged(window)} AND system = ?"


def _staged(window: Window) -> str:
    return f"AND stage = '{window.stage}'" if window.stage else ""


def _among(window: Window) -> Where:
    if window.before is not None:
        return "(" + " OR ".join("release IS NOT DISTINCT FROM ?" for _ in window.before) + ")", [*window.before]
    return "release IS DISTINCT FROM ? AND release IS NOT NULL", [window.release]
