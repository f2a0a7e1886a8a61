"""The approvals desk: questions outlive processes, decisions are signed, and one of many deciders decides."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from approvals_desk import HOSTILE, row_of
from test_control import either, in_python, own_control, plane, request_for, steered  # noqa: F401

from agentkit.approvals import Decision
from agentkit.errors import UsageError
from agentkit.testing import FakeClock
from agentkit_tracking import keys
from agentkit_tracking.control import ControlPlane, database
from agentkit_tracking.control.approvals import Desk
from agentkit_tracking.control.decisions import HumanDecision
from agentkit_tracking.statements import read

# ---- asking and deciding


def test_a_question_outlives_the_process_and_is_asked_once(either: str) -> None:
    code = (
        "from agentkit_tracking.control import ControlPlane; from agentkit.approvals import ApprovalRequest\n"
        "r = ApprovalRequest('run-1', 'billing', 'issue_refund', {'usd': 80.0}, 'why', key='k')\n"
        "print(ControlPlane().desk.ask(r))"
    )
    first, second = in_python(code).strip(), in_python(code).strip()
    assert first == second
    [waiting] = ControlPlane().desk.waiting()
    assert waiting.id == first
    assert waiting.request.arguments == {"usd": 80.0}


@pytest.mark.parametrize("verdict", ["approve", "modify", "reject"])
def test_a_decision_is_signed_with_who_when_and_why(
    either: str, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, verdict: Any
) -> None:
    monkeypatch.setenv("AGENTKIT_AUTHOR", "ada")
    identity = plane.desk.ask(request_for())
    assert plane.desk.decision(identity) is None
    new = {"order_id": "ORD-1", "usd": 40} if verdict == "modify" else None
    made = plane.desk.decide(identity, verdict, "half of it\nis right", new)
    found = ControlPlane().desk.decision(identity, request_for())
    assert found == made
    assert (found.verdict, found.by, found.reason) == (verdict, "ada", "half of it is right")
    assert found.arguments == new
    assert found.granted == (verdict != "reject")
    said = read(json.dumps(found.signature), HumanDecision).statement
    assert (said.approval, said.run_id, said.tool, said.verdict) == (identity, "f" * 32, "issue_refund", verdict)
    assert said.time.isoformat() == found.at
    assert plane.desk.waiting() == []


def test_waiting_goes_on_when_the_decision_comes(either: str, plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    timer = threading.Timer(0.2, plane.desk.decide, (identity, "approve"))
    timer.start()
    assert plane.approver()(request_for()) == plane.desk.decision(identity)
    timer.join()


def test_calls_without_a_key_are_asked_each_time(plane: ControlPlane) -> None:
    one, other = plane.desk.ask(request_for(key="")), plane.desk.ask(request_for(key=""))
    assert one != other


def test_one_key_with_other_arguments_is_refused(plane: ControlPlane) -> None:
    plane.desk.ask(request_for())
    for changed in ({"arguments": {"order_id": "ORD-1", "usd": 8000.0}}, {"tool": "close_account"}):
        with pytest.raises(UsageError, match="with other arguments"):
            plane.desk.ask(request_for(**changed))
    assert plane.desk.ask(request_for(doing="in other words"))  # the same call


def test_arguments_that_are_no_json_are_asked_as_what_they_become(plane: ControlPlane) -> None:
    from datetime import date
    from decimal import Decimal

    asked = request_for(arguments={"usd": Decimal("80.00"), "due": date(2026, 1, 2), "tags": ("a", "\ud800\x00")})
    identity = plane.desk.ask(asked)
    plane.desk.decide(identity, "approve")
    assert plane.desk.wait(asked).granted


@pytest.mark.parametrize(
    ("verdict", "reason", "arguments", "says"),
    [
        ("reject", " ", None, "say why"),
        ("modify", "", {"order_id": "ORD-1", "usd": 1}, "say why"),
        ("modify", "x", None, "exactly these"),
        ("modify", "x", {"usd": 1}, "exactly these"),
        ("modify", "x", {"order_id": "ORD-1", "usd": 1, "to": "me"}, "exactly these"),
        ("modify", "x", {"order_id": "ORD-1", "usd": 80.0}, "approve them"),
        ("modify", "x", {"order_id": "ORD-1", "usd": float("nan")}, "no JSON"),
        ("approve", "x", {"order_id": "ORD-1", "usd": 1}, "takes no arguments"),
        ("approve", "x" * 1001, None, "1000 are kept"),
        ("yes", "x", None, "approve, modify or reject"),
    ],
)
def test_a_decision_that_cannot_be_is_refused(
    plane: ControlPlane, verdict: Any, reason: str, arguments: Any, says: str
) -> None:
    identity = plane.desk.ask(request_for())
    with pytest.raises(UsageError, match=says):
        plane.desk.decide(identity, verdict, reason, arguments)
    assert plane.desk.decision(identity) is None


def test_a_call_with_no_number_can_be_decided(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for(arguments={"usd": float("nan")}))
    shown = plane.desk.get(identity)
    assert plane.desk.decide(identity, "approve", shown=shown).granted
    assert plane.desk.decision(identity, request_for(arguments={"usd": float("nan")})).granted  # type: ignore[union-attr]


def test_hostile_text_is_kept_and_harms_nothing(either: str, plane: ControlPlane) -> None:
    hostile = request_for(
        HOSTILE, run_id="'; DROP TABLE approvals; --", arguments={HOSTILE: HOSTILE, "n": "\x00\ud800"}, doing=HOSTILE
    )
    identity = plane.desk.ask(hostile)
    assert plane.desk.get(identity).request == hostile
    plane.desk.decide(identity, "modify", HOSTILE, {HOSTILE: "'); --", "n": ""})
    assert plane.desk.wait(hostile).arguments == {HOSTILE: "'); --", "n": ""}
    for prefix in ("%", "_", "", "' OR 1=1", "%25"):
        with pytest.raises(UsageError, match="no approval begins"):
            plane.desk.get(prefix)


def test_an_ambiguous_prefix_is_refused(plane: ControlPlane) -> None:
    for i in range(40):  # 30 letters: two begin alike
        plane.desk.ask(request_for(str(i)))
    seen = [a.id[0] for a in plane.desk.waiting()]
    twice = next(c for c in seen if seen.count(c) > 1)
    with pytest.raises(UsageError, match="several approvals begin"):
        plane.desk.get(twice)


# ---- time


def test_without_a_decision_it_is_rejected_once_and_stays_so(
    either: str, plane: ControlPlane, steered: FakeClock
) -> None:
    identity = plane.desk.ask(request_for())
    steered.tick(24 * 3600 - 1)
    assert plane.desk.decision(identity) is None
    assert len(plane.desk.waiting()) == 1
    steered.tick(1)
    with pytest.raises(UsageError, match="expired: nobody decided within 24 h"):
        plane.desk.decide(identity, "approve")
    expired = plane.desk.decision(identity)
    assert expired == Decision(
        "reject", reason="expired: nobody decided within 24 h", at=expired.at, asked_at=expired.asked_at
    )
    assert row_of(identity).status == "expired"
    steered.tick(-3600)  # a clock that is put back opens nothing again
    assert plane.desk.decision(identity) == expired
    assert plane.desk.waiting() == []
    with pytest.raises(UsageError, match="expired"):
        plane.desk.decide(identity, "approve")


def test_waiting_ends_at_the_end_of_the_time(
    plane: ControlPlane, steered: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTKIT_APPROVAL_HOURS", "0.5")
    decision = plane.desk.wait(request_for(), poll_s=60)
    assert not decision.granted
    assert "within 0.5 h" in decision.reason
    assert steered.monotonic() == pytest.approx(1800, abs=60)
    monkeypatch.setenv("AGENTKIT_APPROVAL_HOURS", "soon")
    with pytest.raises(UsageError, match="number of hours"):
        plane.desk.ask(request_for("other"))


def test_a_list_records_what_has_expired(plane: ControlPlane, steered: FakeClock) -> None:
    identity = plane.desk.ask(request_for())
    steered.tick(25 * 3600)
    assert plane.desk.waiting() == []
    assert row_of(identity).status == "expired"


def test_a_decision_holds_for_days(plane: ControlPlane, steered: FakeClock) -> None:
    desk = Desk(database.database(), hours=24 * 7)
    identity = desk.ask(request_for())
    steered.tick(timedelta(days=6).total_seconds())
    desk.decide(identity, "approve", "after the holidays")
    steered.tick(timedelta(days=60).total_seconds())
    assert desk.decision(identity, replace(request_for(), doing="after a restart")).granted  # type: ignore[union-attr]


# ---- two people


def test_of_many_deciders_one_decides_and_the_others_hear_who(either: str, plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    keys.signing_key()
    desks = [Desk(database.database()) for _ in range(8)]
    barrier, said, done = threading.Barrier(8), [], []

    def work(i: int) -> None:
        barrier.wait()
        try:
            done.append(desks[i].decide(identity, "approve" if i % 2 else "reject", f"by {i}"))
        except UsageError as e:
            said.append(str(e))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1
    assert plane.desk.decision(identity) == done[0]
    assert len(said) == 7
    assert all(f"is decided: {row_of(identity).status} by " in s and done[0].reason in s for s in said)


def test_deciders_in_processes_of_their_own(either: str, plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    keys.signing_key()
    code = (
        "import sys; from agentkit_tracking.control import ControlPlane; from agentkit.errors import UsageError\n"
        "try: print(ControlPlane().desk.decide(sys.argv[1], sys.argv[2], sys.argv[3]).reason)\n"
        "except UsageError as e: print('late:', e)"
    )
    run = [
        subprocess.Popen(
            [sys.executable, "-c", code, identity, verdict, f"{verdict} {i}"], stdout=subprocess.PIPE, text=True
        )
        for i, verdict in enumerate(["approve", "reject"] * 2)
    ]
    said = [p.communicate(timeout=120)[0].strip() for p in run]
    winners = [s for s in said if not s.startswith("late:")]
    assert len(winners) == 1
    found = plane.desk.decision(identity)
    assert found is not None
    assert winners == [found.reason]
