"""Who let a call be made stands in the run log: by name where a person is named, and as nobody's where code decided."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hedgehogs import doing
from typer.testing import CliRunner

import agentkit as ak
from agentkit.records import RunRecord
from agentkit_pipelines.cli import app
from agentkit_tracking.control import ControlPlane
from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.erasure import erase_user
from agentkit_tracking.runlog.verification import verify

WHO = "Ada Byron <ada@example.com>"


@ak.tool(permission="write", criticality="high")
def pay(usd: float) -> str:
    """Pay."""
    return f"paid {usd:g}"


def asking(approver: Any = None) -> RunRecord:
    """A run that asks whether it may pay."""
    system = doing(lambda run: run.call(pay, usd=80), pay)
    if approver is None:
        return system.run(text="x")
    with ak.approve_with(approver):
        return system.run(text="x")


def told(columns: str) -> Any:
    """Of the only approval in the log."""
    [row] = RunLog().sql(f"SELECT {columns} FROM steps WHERE kind = 'approval'").rows()
    return row


def test_a_decision_at_the_desk_is_logged_with_who_signed_it_and_the_time_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AGENTKIT_AUTHOR", WHO)
    desk, done = ControlPlane().desk, []
    run = threading.Thread(target=lambda: done.append(asking(ControlPlane().approver())))
    run.start()
    while not (waiting := desk.waiting()):
        time.sleep(0.01)
    decision = desk.decide(waiting[0].id, "approve", "the bill is there")
    run.join()
    [record] = done
    assert [s.decided_by for s in record.steps if s.kind == "approval"] == [WHO]
    assert told("decided_by, result") == (WHO, "approve")
    asked_at, answered_at, waited_s = told("asked_at, asked_at + to_microseconds((waited_s * 1e6)::BIGINT), waited_s")
    assert asked_at == waiting[0].created_at  # when it was put to the desk
    assert answered_at.isoformat() == decision.at  # when it was signed, not when the run came to see it
    assert waited_s >= 0
    assert [s.decided_by for s in RunLog().find(record.run_id).steps if s.kind == "approval"] == [WHO]
    assert f"approve by {WHO} (asked {waiting[0].created_at:%Y-%m-%dT%H:%M:%S}" in explained(record.run_id)
    assert verify(RunLog()).is_whole


def explained(run_id: str) -> str:
    """What `agentkit explain` says of the steps: the column `why or result`, its lines joined."""
    page = CliRunner().invoke(app, ["explain", run_id]).output
    return " ".join(line.split("│")[6].strip() for line in page.splitlines() if line.count("│") == 8)


@pytest.mark.parametrize(
    ("approver", "expected"),
    [
        (None, (None, "reject", False)),  # nobody was there
        (lambda _: True, (None, "approve", False)),  # code, or a person who says no name
        (lambda _: ak.Decision("reject"), (None, "reject", False)),
        (
            lambda _: ak.Decision("approve", by="ann", at="this morning"),
            ("ann", "approve", True),
        ),  # at once, and a person
    ],
)
def test_nobody_is_named_who_did_not_decide(approver: Any, expected: tuple[str | None, str, bool]) -> None:
    record = asking(approver)
    assert told("decided_by, result, waited_s IS NOT NULL") == expected
    assert [s.decided_by for s in record.steps if s.kind == "approval"] == [expected[0]]
    assert f"{expected[1]} by {expected[0] or 'nobody who is named'} (asked 20" in explained(record.run_id)


PAYS = """
import agentkit as ak
from hedgehogs import doing


@ak.tool(permission="write", criticality="high")
def pay(usd: float) -> str:
    'Pay.'
    return f"paid {usd:g}"


system = doing(lambda run: run.call(pay, usd=80), pay)
"""


@pytest.mark.parametrize(("answer", "verdict"), [("y", "approve"), ("n", "reject")])
def test_whoever_answers_at_the_terminal_is_named(
    answer: str, verdict: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTKIT_AUTHOR", WHO)
    (project / "pays.py").write_text(PAYS)
    done = CliRunner().invoke(app, ["run", "pays.py", "x", "--approve"], input=f"{answer}\n")
    assert "wants pay({'usd': 80.0})" in done.stderr
    assert told("decided_by, result, waited_s IS NOT NULL") == (WHO, verdict, True)


@pytest.mark.parametrize("payloads", ["redacted", "full", "none"])
def test_who_decided_is_kept_whatever_is_kept_of_text(payloads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_PAYLOADS", payloads)
    asking(lambda _: ak.Decision("approve", by=WHO))
    assert told("decided_by, result, waited_s IS NOT NULL") == (WHO, "approve", True)


def test_the_name_goes_with_the_users_data_and_that_a_person_decided_stays(own_home: Path) -> None:
    with ak.acting_for("anna"):
        asking(lambda _: ak.Decision("approve", by=WHO))
    log = RunLog()
    log.fold()
    erase_user(log, "anna", why="asked for it")
    assert told("decided_by, result, waited_s IS NOT NULL") == (None, "approve", True)
    log.close()
    log.fold()
    assert verify(log).is_whole
    assert not [path for path in (own_home / "log").rglob("*.jsonl") if b"Byron" in path.read_bytes()]


def test_of_earlier_versions_the_name_in_what_was_answered_counts() -> None:
    log = RunLog()
    event = {"type": "approval", "run_id": "old", "system": "s", "step": 1, "seconds": 60.0, "result": "approve"}
    log.write([(event, {"outputs": {"verdict": "approve", "by": "ada"}})])
    assert told("decided_by, asked_at") == ("ada", None)
