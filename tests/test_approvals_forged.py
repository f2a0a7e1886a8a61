"""The approvals desk: nothing but a trusted signature on the very question decides, whatever is stored."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from approvals_desk import altered, change, refused, row_of
from sqlalchemy import select, text
from test_control import either, own_control, plane, request_for, steered  # noqa: F401

from agentkit.errors import TrustError, UsageError
from agentkit.testing import FakeClock
from agentkit_tracking import keys
from agentkit_tracking.control import ControlError, ControlPlane, database, tables
from agentkit_tracking.control.card import card


def still_waits(plane: ControlPlane, identity: str, problem: str) -> None:
    """Nothing is granted, the refusal is kept once, people see it, and somebody with a key can still decide."""
    for _ in range(2):
        assert plane.desk.decision(identity) is None
    assert len(refused()) == 1
    assert problem in refused()[0]
    [shown] = plane.desk.waiting()
    assert "does not count" in card(shown)
    assert plane.desk.decide(identity, "reject", "tampered with").verdict == "reject"
    assert plane.desk.decision(identity).verdict == "reject"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "forged",
    [
        None,
        "",
        "yes",
        "null",
        "[]",
        json.dumps({"verdict": "approve"}),
        json.dumps({"payloadType": "application/vnd.in-toto+json", "payload": "e30=", "signatures": []}),
    ],
)
def test_a_row_set_to_approved_by_hand_decides_nothing(plane: ControlPlane, forged: str | None) -> None:
    identity = plane.desk.ask(request_for())
    change(identity, status="approved", decision=forged)
    still_waits(plane, identity, "cannot be read")


def test_a_signature_from_another_approval_decides_nothing(either: str, plane: ControlPlane) -> None:
    one, other = plane.desk.ask(request_for("one")), plane.desk.ask(request_for("other"))
    plane.desk.decide(one, "approve")
    change(other, status="approved", decision=row_of(one).decision)
    still_waits(plane, other, "another question")


def test_a_statement_of_another_kind_decides_nothing(plane: ControlPlane) -> None:
    from agentkit_tracking.control.stops import Target

    identity = plane.desk.ask(request_for())
    plane.stops.stop(Target.parse("x"))
    with database.database().reading() as connection:
        envelope = connection.execute(select(tables.STOPS.c.envelope)).scalar_one()
    change(identity, status="approved", decision=envelope)
    still_waits(plane, identity, "cannot be read")


def test_arguments_changed_after_the_approval_are_not_approved(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    plane.desk.decide(identity, "approve")
    change(identity, request=altered(row_of(identity), arguments={"order_id": "ORD-1", "usd": 8000.0}))
    with pytest.raises(TrustError, match="altered"):
        plane.desk.decision(identity)
    after_a_restart = ControlPlane()
    with pytest.raises(TrustError, match="altered"):
        after_a_restart.desk.decision(identity, request_for())
    assert after_a_restart.desk.decision(identity) is None
    assert after_a_restart.desk.waiting()[0].problem


def test_arguments_changed_before_the_approval_do_not_reach_the_run(plane: ControlPlane) -> None:
    """People see and approve $1; the run is about to pay $80: it is told, and pays nothing."""
    identity = plane.desk.ask(request_for())
    change(identity, request=altered(row_of(identity), arguments={"order_id": "ORD-1", "usd": 1.0}))
    ControlPlane().desk.decide(identity, "approve")
    for desk in (plane.desk, ControlPlane().desk):
        with pytest.raises(TrustError, match="altered"):
            desk.decision(identity, request_for())
    change(identity, request=altered(row_of(identity), arguments={"order_id": "ORD-1", "usd": 80.0}))  # put back
    assert ControlPlane().desk.decision(identity, request_for()) is None
    assert "the question was changed" in refused()[0]


def test_words_changed_before_the_approval_are_noticed_by_who_asked(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    change(identity, request=altered(row_of(identity), doing="a harmless test", reason="routine"))
    ControlPlane().desk.decide(identity, "approve")
    with pytest.raises(TrustError, match="altered"):
        plane.desk.decision(identity, request_for())


@pytest.mark.parametrize("column", ["status", "expires_at", "created_at", "run_id", "call_key"])
def test_every_part_of_a_decided_row_is_bound(plane: ControlPlane, column: str) -> None:
    identity = plane.desk.ask(request_for())
    plane.desk.decide(identity, "reject", "no")
    later = (row_of(identity).created_at).replace("2026", "2027")
    values = {"status": "approved", "expires_at": later, "created_at": later, "run_id": "r", "call_key": "k"}
    change(identity, **{column: values[column]})
    assert ControlPlane().desk.decision(identity) is None


def test_a_decision_by_a_key_that_is_not_trusted_here_decides_nothing(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_home: Path
) -> None:
    identity = plane.desk.ask(request_for())
    keys.signing_key()
    monkeypatch.setenv(database.URL_ENV, f"sqlite:///{own_home / 'control.db'}")
    monkeypatch.setenv("AGENTKIT_HOME", str(tmp_path / "mallory"))
    keys.create("Mallory")
    assert ControlPlane().desk.decide(identity, "approve").granted
    monkeypatch.delenv(database.URL_ENV)
    monkeypatch.setenv("AGENTKIT_HOME", str(own_home))
    still_waits(ControlPlane(), identity, "not trusted here")


def test_a_revoked_key_decides_nothing_any_more(plane: ControlPlane) -> None:
    keys.create("Ada")
    identity = plane.desk.ask(request_for())
    plane.desk.decide(identity, "approve")
    assert plane.desk.decision(identity)
    keys.revoke(keys.load_trust().keys[0].id, "stolen")
    assert plane.desk.decision(identity) is None
    assert "revoked" in refused()[0]


def test_an_approval_that_comes_after_its_time_decides_nothing(plane: ControlPlane, steered: FakeClock) -> None:
    """Somebody who writes the database stretches the time, has it approved, and puts the time back."""
    identity = plane.desk.ask(request_for())
    was = row_of(identity).expires_at
    steered.tick(24 * 3600 + 60)
    change(identity, expires_at=was.replace("2026", "2027"))
    ControlPlane().desk.decide(identity, "approve")
    change(identity, expires_at=was)
    decision = ControlPlane().desk.decision(identity, request_for())
    assert decision is not None
    assert not decision.granted
    assert row_of(identity).status == "expired"


def test_a_payload_changed_under_its_signature_decides_nothing(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    plane.desk.decide(identity, "modify", "half", {"order_id": "ORD-1", "usd": 40})
    outer = json.loads(row_of(identity).decision)
    body = json.loads(base64.b64decode(outer["payload"]))
    body["predicate"]["arguments"]["usd"] = 4000
    outer["payload"] = base64.b64encode(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).decode()
    change(identity, decision=json.dumps(outer))
    still_waits(plane, identity, "was altered")


def test_a_damaged_row_hides_no_other(plane: ControlPlane) -> None:
    broken, good = plane.desk.ask(request_for("a")), plane.desk.ask(request_for("b"))
    for wreck in ("no json", "[]", "{}", '{"run_id": 1}'):
        change(broken, request=wreck)
        assert [a.id for a in plane.desk.waiting()] == [good]
        with pytest.raises(TrustError):
            plane.desk.decision(broken)


def test_what_was_altered_after_it_was_shown_is_not_signed(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    shown = plane.desk.get(identity)
    change(identity, request=altered(row_of(identity), arguments={"order_id": "ORD-1", "usd": 8000.0}))
    with pytest.raises(TrustError, match="after it was shown"):
        plane.desk.decide(identity, "approve", shown=shown)
    assert row_of(identity).status == "waiting"


def test_an_unreadable_database_grants_nothing(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    plane.desk.decide(identity, "approve")
    with database.database().writing() as connection:
        connection.execute(text("DROP TABLE approvals"))
    with pytest.raises(ControlError):
        plane.desk.decision(identity)
    with pytest.raises(ControlError):
        plane.desk.wait(request_for())


def test_an_unreadable_trust_file_grants_nothing(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    plane.desk.decide(identity, "approve")
    keys.trust_path().write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        plane.desk.decision(identity)
    assert row_of(identity).status == "approved"
