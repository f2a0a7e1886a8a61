"""Budgets of a day: hold across threads, processes, kills and midnight."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import SOAK
from test_control import either, own_control, plane, steered  # noqa: F401

from agentkit.budget import AMOUNTS, Budget
from agentkit.errors import BudgetExceeded
from agentkit.testing import FakeClock
from agentkit_tracking.control import ControlPlane, database, tables
from agentkit_tracking.control.daily import DailyBudgetExceeded, SharedLedger

FREE = Budget(**dict.fromkeys((*AMOUNTS, "seconds")))


def day_of(plane: ControlPlane, **limits: float) -> SharedLedger:
    [ledger] = plane.ledgers("support_triage", None, Budget(**{**dict.fromkeys((*AMOUNTS, "seconds")), **limits}), None)
    assert isinstance(ledger, SharedLedger)
    return ledger


def test_the_table_holds_every_amount_of_a_budget() -> None:
    assert {c.name for c in tables.USE.c} == {"scope", "day", *AMOUNTS}


def test_reserve_and_settle_count_for_all_who_share_the_day(either: str, plane: ControlPlane) -> None:
    mine, other = day_of(plane, usd=1.0), day_of(ControlPlane(), usd=1.0)
    mine.reserve(usd=0.8, model_calls=1)
    with pytest.raises(BudgetExceeded) as refused:
        other.reserve(usd=0.3, model_calls=1)
    assert refused.value.limit == "usd"
    assert isinstance(refused.value, DailyBudgetExceeded)
    assert refused.value.used == pytest.approx(0.8)
    assert f"usd a day for support_triage on {refused.value.day} (UTC)" in str(refused.value)
    assert other.used["model_calls"] == 1  # all or nothing: the refused call is not counted
    mine.settle({"usd": 0.8, "model_calls": 1}, {"usd": 0.1, "model_calls": 1})
    other.reserve(usd=0.9, model_calls=1)
    assert mine.used["usd"] == pytest.approx(1.0)
    assert mine.left("usd") == pytest.approx(0.0)
    assert mine.left("tokens_in") == math.inf
    assert mine.limits("usd")
    assert not mine.limits("seconds")
    assert mine.seconds_left == math.inf
    assert mine.share[1] == "usd"


def test_what_nobody_knows_stays_as_it_was_reserved(plane: ControlPlane) -> None:
    ledger = day_of(plane, usd=1.0)
    ledger.reserve(usd=0.5, tokens_in=10)
    ledger.settle({"usd": 0.5, "tokens_in": 10}, {"usd": math.nan, "tokens_in": 4})
    assert ledger.used["usd"] == 0.5
    assert ledger.used["tokens_in"] == 4


def test_systems_and_users_have_days_of_their_own_and_names_are_not_stored(
    plane: ControlPlane,
) -> None:
    from sqlalchemy import select

    one = Budget(**{**dict.fromkeys((*AMOUNTS, "seconds")), "usd": 1.0})
    system, ada = plane.ledgers("s", "ada@example.com", Budget(usd=10), one)
    [_, grace] = plane.ledgers("s", "grace@example.com", Budget(usd=10), one)
    [nobody] = plane.ledgers("s", None, None, one)
    [nobody_else] = plane.ledgers("s", None, None, one)
    [elsewhere] = plane.ledgers("other", "ada@example.com", None, one)
    ada.reserve(usd=1.0)
    for free in (grace, nobody, elsewhere, system):
        free.reserve(usd=1.0)
    for full in (ada, nobody_else):  # who gives no name shares with the others who give none
        with pytest.raises(BudgetExceeded):
            full.reserve(usd=0.1)
    with pytest.raises(BudgetExceeded, match="a user of s"):
        ada.reserve(usd=0.1)
    with database.database().reading() as connection:
        assert not [r for r in connection.execute(select(tables.USE.c.scope)) if "example" in r.scope]


def test_without_limits_nothing_is_kept(plane: ControlPlane, own_control: object) -> None:
    assert plane.ledgers("s", "u", None, None) == ()
    assert plane.ledgers("s", "u", FREE, FREE) == ()


def test_a_new_day_begins_at_midnight_utc_and_a_call_over_it_settles_where_it_was_reserved(
    plane: ControlPlane,
    steered: FakeClock,
) -> None:
    ledger = day_of(plane, usd=1.0)
    steered.tick(86_400 - 1)
    ledger.reserve(usd=0.9)
    steered.tick(2)
    ledger.reserve(usd=0.9)  # the new day is whole
    ledger.settle({"usd": 0.9}, {"usd": 0.4})
    assert ledger.used["usd"] == 0.9
    steered.tick(-2)
    assert ledger.used["usd"] == pytest.approx(0.4)


def test_a_settlement_that_cannot_be_written_stays_counted_and_fails_no_run(
    plane: ControlPlane,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sqlalchemy import text

    ledger = day_of(plane, usd=1.0)
    ledger.reserve(usd=0.9)
    with database.database().writing() as connection:
        connection.execute(text("ALTER TABLE budget_use RENAME TO away"))
    ledger.settle({"usd": 0.9}, {"usd": 0.0})
    with database.database().writing() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO budget_use"))
    assert "stays counted" in caplog.text
    assert ledger.used["usd"] == 0.9


def test_64_threads_never_pass_a_limit_also_when_calls_fail(either: str, plane: ControlPlane) -> None:
    limit, seen = 100, []

    def work(seed: int) -> int:
        ledger, chance, done = day_of(plane, usd=float(limit), model_calls=150.0), random.Random(seed), 0
        for _ in range(6):
            reserved = {"usd": 1.0, "model_calls": 1.0}
            try:
                ledger.reserve(**reserved)
            except BudgetExceeded:
                continue
            seen.append(ledger.used["usd"])
            try:
                if chance.random() < 0.3:
                    raise TimeoutError  # the provider's
                done += 1
                ledger.settle(reserved, {"usd": 1.0, "model_calls": 1.0})
            except TimeoutError:
                ledger.settle(reserved, {"usd": 0.0, "model_calls": 1.0})
        return done

    with ThreadPoolExecutor(64) as pool:
        done = sum(pool.map(work, range(64)))
    used = day_of(plane, usd=1.0).used
    assert max(seen) <= limit
    assert used["usd"] == done <= limit
    assert used["model_calls"] == len(seen) <= 150  # failed calls were calls


def test_processes_that_are_killed_never_pass_a_limit(either: str, plane: ControlPlane) -> None:
    """Each worker notes every call it makes in a file before it settles; some are killed at any moment."""
    limit = 400 if SOAK else 120
    code = """
import sys, os, random, signal
from agentkit.budget import AMOUNTS, Budget
from agentkit.errors import BudgetExceeded
from agentkit_tracking.control import ControlPlane
free = dict.fromkeys((*AMOUNTS, "seconds"))
[ledger] = ControlPlane().ledgers("support_triage", None, Budget(**{**free, "tool_calls": float(sys.argv[1])}), None)
is_victim = sys.argv[2] == "killed"
print("ready", flush=True)
sys.stdin.readline()
if is_victim:  # its own timer, unlike a killer elsewhere, is never too late; nothing of the process runs once it is over
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.1))
while True:
    try:
        ledger.reserve(tool_calls=1, usd=0.1)
    except BudgetExceeded:
        break
    os.write(1, b".")
    ledger.settle({"tool_calls": 1, "usd": 0.1}, {"tool_calls": 1, "usd": random.random() / 10})
if is_victim:
    signal.pause()
"""
    day_of(plane, tool_calls=1.0).used  # noqa: B018  # makes the database
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(limit), "killed" if i < 3 else "left alone"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # else `readline` takes in what `communicate` then misses
        )
        for i in range(6)
    ]
    for worker in workers:
        assert worker.stdout
        assert worker.stdout.readline() == b"ready\n"
    for worker in workers:
        assert worker.stdin
        worker.stdin.write(b"go\n")
    calls = 0
    for i, worker in enumerate(workers):
        out, err = worker.communicate(timeout=120)
        calls += out.count(b".")
        assert worker.returncode == (-signal.SIGALRM if i < 3 else 0), err.decode()
    used = day_of(plane, tool_calls=1.0).used
    assert calls <= used["tool_calls"] == limit
    assert limit - calls <= 3  # at most one reservation of each that was killed
    assert used["usd"] <= 0.1 * limit + 1e-6


def test_a_database_lock_held_by_another_is_waited_for(plane: ControlPlane, own_control: Path) -> None:
    import sqlite3
    import threading

    ledger = day_of(plane, usd=1.0)
    ledger.reserve(usd=0.1)
    other = sqlite3.connect(own_control, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, other.rollback)
    timer.start()
    ledger.reserve(usd=0.1)
    timer.join()
    other.close()
    assert ledger.used["usd"] == pytest.approx(0.2)
