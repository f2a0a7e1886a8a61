"""The approvals desk: questions outlive processes, decisions are signed, and nothing else decides."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import base64
import html
import json
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from test_control import cluster, either, in_python, own_control, plane, request_for, steered  # noqa: F401
from typer.testing import CliRunner

from agentkit.approvals import Decision
from agentkit.errors import TrustError, UsageError
from agentkit.testing import FakeClock
from agentkit_pipelines.approvals_cli import approvals_app
from agentkit_tracking import keys
from agentkit_tracking.control import ControlError, ControlPlane, database, tables
from agentkit_tracking.control.approvals import Desk
from agentkit_tracking.control.card import card, visible
from agentkit_tracking.control.decisions import HumanDecision
from agentkit_tracking.statements import read

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "approvals.py"
HOSTILE = (
    "# Heading\n<script>alert(1)</script> **bold** [a](javascript:alert(1)) [red]x[/red] \x1b[31m \u202e `x` $x$ "
    "| a | ![i](http://x/y.png) www.example.com https://example.com &lt; ::lucide:rocket:: '; DROP TABLE approvals; --"
)


def change(identity: str, **values: Any) -> None:
    """Write into the database, as somebody who can."""
    with database.database().writing() as connection:
        done = connection.execute(tables.APPROVALS.update().where(tables.APPROVALS.c.id == identity).values(**values))
        assert done.rowcount == 1


def row_of(identity: str) -> Any:
    with database.database().reading() as connection:
        return connection.execute(select(tables.APPROVALS).where(tables.APPROVALS.c.id == identity)).one()


def refused() -> list[str]:
    with database.database().reading() as connection:
        return [r.problem for r in connection.execute(select(tables.REFUSED))]


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
    assert expired == Decision("reject", reason="expired: nobody decided within 24 h", at=expired.at)
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


# ---- attacks on what is stored


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


def altered(row: Any, **changes: Any) -> str:
    return json.dumps({**json.loads(row.request), **changes})


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


# ---- the card


def words(text_: str) -> int:
    return len(html.unescape(text_).split())


def test_a_card_says_what_why_and_what_is_decided_within_30_seconds(plane: ControlPlane) -> None:
    asked = request_for(doing="The customer was charged twice. " * 40, reason="Because of a long rule. " * 40)
    shown = card(plane.desk.get(plane.desk.ask(asked)))
    assert "May billing call issue" in shown
    for part in ("What it was doing", "Why it stops", "The call", "Decide:", "usd = 80.0", "Confidence 0.93", "24 h"):
        assert part in shown
    assert "characters more)" in shown
    call = shown[shown.index("```") : shown.rindex("```")]
    assert words(shown) - words(call) <= 115  # 30 s at 238 words a minute, which is usual
    usual = card(plane.desk.get(plane.desk.ask(request_for("usual"))))
    assert words(usual) <= 75


def test_a_card_renders_no_markup_of_an_agent(plane: ControlPlane) -> None:
    from markdown_it import MarkdownIt

    hostile = request_for(
        agent=HOSTILE, tool=HOSTILE, arguments={HOSTILE: f"```\n{HOSTILE}", "b": "````"}, doing=HOSTILE, reason=HOSTILE
    )
    shown = card(plane.desk.get(plane.desk.ask(hostile)))
    assert all(c == "\n" or c.isprintable() for c in shown)
    rendered = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(shown)
    for tag in ("<script", "<a ", "<img", "<table", "<em>", "<h1", 'javascript:alert(1)"'):
        assert tag not in rendered
    assert rendered.count("<h3>") == 1
    assert rendered.count("<pre>") == 1  # no argument closes the block
    outside = rendered[: rendered.index("<pre>")] + rendered[rendered.index("</pre>") :]
    assert "<strong>bold" not in outside
    assert visible("a\u202eb\x1b\nc\u00a0d") == "a\\u{202e}b\\u{1b} c d"


def test_a_call_with_no_number_can_be_decided(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for(arguments={"usd": float("nan")}))
    shown = plane.desk.get(identity)
    assert plane.desk.decide(identity, "approve", shown=shown).granted
    assert plane.desk.decision(identity, request_for(arguments={"usd": float("nan")})).granted  # type: ignore[union-attr]


def test_many_and_long_arguments_are_counted_not_shown(plane: ControlPlane) -> None:
    asked = request_for(arguments={f"a{i}": "x" * 1000 for i in range(30)})
    shown = card(plane.desk.get(plane.desk.ask(asked)))
    assert "18 more arguments are not shown here" in shown
    assert "(842 characters more)" in shown
    assert len(shown) < 4000


# ---- the commands


def cli(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(approvals_app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_the_commands_list_show_and_decide(plane: ControlPlane) -> None:
    assert "nothing waits" in cli("list")
    one, other = plane.desk.ask(request_for("1")), plane.desk.ask(request_for("2"))
    third = plane.desk.ask(request_for("3"))
    assert one in cli("list")
    assert "May billing call issue_refund?" in cli("show", one[:6])
    assert '"run_id": "ffff' in cli("show", one, "--full")
    with pytest.raises(UsageError, match="say why"):
        cli("approve", one, "--set", "usd=40")
    with pytest.raises(UsageError, match="there is no argument 'eur'"):
        cli("approve", one, "--set", "eur=40", "--why", "x")
    with pytest.raises(UsageError, match="is no JSON"):
        cli("approve", one, "--set", "usd=forty", "--why", "x")
    said = cli("approve", one, "--set", "usd=40", "--set", "order_id=12", "--why", "only [half]")
    assert "modified by" in said
    assert "only [half]" in said
    assert plane.desk.decision(one).arguments == {"order_id": "12", "usd": 40}  # type: ignore[union-attr]
    assert "approved by" in cli("approve", other)
    assert cli("reject", third, code=2)  # --why is required
    assert "rejected by" in cli("reject", third, "--why", "fraud")
    with pytest.raises(UsageError, match="is decided: rejected by"):
        cli("approve", third)
    assert "fraud" in cli("list", "--all")
    with pytest.raises(UsageError, match="no approval begins"):
        cli("show", "zzz0")


def test_the_commands_print_no_terminal_codes_of_an_agent(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for(arguments={"to": HOSTILE}, doing=HOSTILE, reason=HOSTILE, agent=HOSTILE))
    for said in (cli("list"), cli("show", identity), cli("show", identity, "--full"), cli("list", "--all")):
        assert "\x1b[31m" not in said
        assert "\u202e" not in said


def test_an_ambiguous_prefix_is_refused(plane: ControlPlane) -> None:
    for i in range(40):  # 30 letters: two begin alike
        plane.desk.ask(request_for(str(i)))
    seen = [a.id[0] for a in plane.desk.waiting()]
    twice = next(c for c in seen if seen.count(c) > 1)
    with pytest.raises(UsageError, match="several approvals begin"):
        plane.desk.get(twice)


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


def test_a_decision_holds_for_days(plane: ControlPlane, steered: FakeClock) -> None:
    desk = Desk(database.database(), hours=24 * 7)
    identity = desk.ask(request_for())
    steered.tick(timedelta(days=6).total_seconds())
    desk.decide(identity, "approve", "after the holidays")
    steered.tick(timedelta(days=60).total_seconds())
    assert desk.decision(identity, replace(request_for(), doing="after a restart")).granted  # type: ignore[union-attr]


def test_what_was_altered_after_it_was_shown_is_not_signed(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for())
    shown = plane.desk.get(identity)
    change(identity, request=altered(row_of(identity), arguments={"order_id": "ORD-1", "usd": 8000.0}))
    with pytest.raises(TrustError, match="after it was shown"):
        plane.desk.decide(identity, "approve", shown=shown)
    assert row_of(identity).status == "waiting"


# ---- the notebook (what people see of it: test_approvals_ui.py)


def test_it_passes_marimo_check_and_runs_as_a_script_with_and_without_approvals(plane: ControlPlane) -> None:
    marimo = [sys.executable, "-m", "marimo", "check", "--strict", str(NOTEBOOK)]
    for command in (marimo, [sys.executable, str(NOTEBOOK)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    plane.desk.decide(plane.desk.ask(request_for("1")), "approve")
    plane.desk.ask(request_for("2"))
    done = subprocess.run([sys.executable, str(NOTEBOOK)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_picture_is_small() -> None:
    picture = NOTEBOOK.with_suffix(".png")
    assert picture.stat().st_size < 150_000
