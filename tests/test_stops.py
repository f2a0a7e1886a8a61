"""Stops: what they cover, how soon they hold in other processes, and who can undo them."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from test_control import either, own_control, plane, request_for, steered  # noqa: F401
from typer.testing import CliRunner

from agentkit.errors import Stopped, UsageError
from agentkit.testing import FakeClock
from agentkit_pipelines import control_cli
from agentkit_tracking import keys
from agentkit_tracking.control import HOLDS_WITHIN_S, ControlError, ControlPlane, database, tables
from agentkit_tracking.control.stops import Target

RELEASE = "ed09fd56ff54" + "0" * 52
EVERYTHING = ("support_triage", RELEASE, "billing", "issue_refund")
app = typer.Typer()
app.command()(control_cli.stop)
app.command()(control_cli.resume)


def cli(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("support_triage", Target(system="support_triage")),
        ("release:ed09fd", Target(release="ed09fd")),
        ("ed09fd56ff54", Target(release="ed09fd56ff54")),
        ("agent:billing", Target(agent="billing")),
        ("tool:issue_refund", Target(tool="issue_refund")),
        ("support_triage/agent:billing", Target(system="support_triage", agent="billing")),
        ("support_triage/tool:issue_refund", Target(system="support_triage", tool="issue_refund")),
    ],
)
def test_a_target_is_read_and_covers_its_calls_alone(text: str, target: Target) -> None:
    assert Target.parse(text) == target
    assert Target.parse(str(target)) == target
    assert target.covers(*EVERYTHING)
    assert not target.covers("other", "f" * 64, "general", "search")
    # a run that has no agent or tool yet, or is a draft, is not what these mean
    assert target.covers("support_triage", None, None, None) == (target == Target(system="support_triage"))


@pytest.mark.parametrize(
    "text", ["", "a/b", "a/3/b", "tool:", "/tool:x", "desk:x", "release:xyz", "a b", "a\n", "a/release:ed09fd", "a:b:c"]
)
def test_what_is_no_target_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(UsageError, match="agent:billing"):
        Target.parse(text)


def test_stop_and_resume_are_told_with_who_when_and_why(
    either: str,
    plane: ControlPlane,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AGENTKIT_AUTHOR", "ada")
    plane.stops.stop(Target.parse("support_triage"), "complaints")
    reason = plane.stopped(*EVERYTHING) or ""
    assert "support_triage was stopped by ada on 2" in reason
    assert "complaints" in reason
    assert "agentkit resume support_triage" in reason
    assert plane.stopped("other", None, None, None) is None
    with pytest.raises(UsageError, match="why"):
        plane.stops.resume(Target.parse("support_triage"), " ")
    plane.stops.resume(Target.parse("support_triage"), "mended")
    plane.forget()
    assert plane.stopped(*EVERYTHING) is None
    assert [str(e.statement.event) for e in plane.stops.history()] == ["stopped", "resumed"]
    with pytest.raises(UsageError, match="not stopped"):
        plane.stops.resume(Target.parse("support_triage"), "again")


def test_other_stops_stay_when_one_ends(plane: ControlPlane) -> None:
    for text in ("support_triage", "support_triage", "tool:issue_refund"):
        plane.stops.stop(Target.parse(text), "x")
    plane.stops.resume(Target.parse("support_triage"), "both of them")
    assert "tool:issue_refund" in (plane.stopped(*EVERYTHING) or "")
    assert plane.stopped("support_triage", RELEASE, "general", "search") is None


def test_what_is_known_is_read_anew_after_a_second(steered: FakeClock, plane: ControlPlane) -> None:
    assert plane.stopped(*EVERYTHING) is None
    ControlPlane().stops.stop(Target.parse("support_triage"), "x")
    steered.tick(HOLDS_WITHIN_S - 0.15)
    assert plane.stopped(*EVERYTHING) is None
    steered.tick(0.10)
    assert plane.stopped(*EVERYTHING)


def test_running_processes_stop_writing_within_the_stated_time(either: str, tmp_path: Path) -> None:
    """Three processes write a line every 10 ms unless stopped; the command stops them, and sets them going again."""
    code = """
import sys, time
from agentkit_tracking.control import ControlPlane
plane = ControlPlane()
with open(sys.argv[1], "w", buffering=1) as out:
    while True:
        asked = time.time()
        if plane.stopped("support_triage", None, "billing", "issue_refund") is None:
            out.write(f"{asked}\\n")
        time.sleep(0.01)
"""
    files = [tmp_path / f"writer-{i}" for i in range(3)]
    writers = [subprocess.Popen([sys.executable, "-c", code, str(f)]) for f in files]

    def written() -> list[list[float]]:
        return [[float(x) for x in f.read_text().splitlines()] if f.exists() else [] for f in files]

    def wait(check) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + 60
        while not check():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    try:
        wait(lambda: all(written()))
        cli("stop", "support_triage/tool:issue_refund", "--why", "test")
        stopped = time.time()
        time.sleep(HOLDS_WITHIN_S + 0.7)
        assert max(max(times) for times in written()) < stopped + HOLDS_WITHIN_S
        before = [len(times) for times in written()]
        cli("resume", "support_triage/tool:issue_refund", "--why", "test")
        wait(lambda: all(len(now) > was for now, was in zip(written(), before, strict=True)))
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_a_stop_ends_a_wait_for_a_person_and_the_question_stays(
    plane: ControlPlane,
    steered: FakeClock,
) -> None:
    identity = plane.desk.ask(request_for())
    plane.stops.stop(Target.parse("agent:billing"), "x")
    with pytest.raises(Stopped, match="agent:billing"):
        plane.approver()(request_for())
    assert [a.id for a in plane.desk.waiting()] == [identity]


# ---- attacks


def rows() -> list[tuple[int, str]]:
    from sqlalchemy import select

    with database.database().reading() as connection:
        return [tuple(r) for r in connection.execute(select(tables.STOPS).order_by(tables.STOPS.c.sequence))]


def add(sequence: int, envelope: str) -> None:
    with database.database().writing() as connection:
        connection.execute(tables.STOPS.insert().values(sequence=sequence, envelope=envelope))


def test_an_old_resume_ends_no_new_stop(plane: ControlPlane) -> None:
    target = Target.parse("support_triage")
    plane.stops.stop(target, "x")
    plane.stops.resume(target, "y")
    plane.stops.stop(target, "z")
    _, resume = rows()[1]
    add(4, resume)
    plane.forget()
    with pytest.raises(ControlError, match="from elsewhere"):
        plane.stopped(*EVERYTHING)


def test_a_resume_from_another_database_of_the_same_key_ends_nothing(
    plane: ControlPlane,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    target = Target.parse("support_triage")
    plane.stops.stop(target, "here")
    monkeypatch.setenv(database.URL_ENV, f"sqlite:///{tmp_path / 'other.db'}")
    plane.stops.stop(target, "there")
    plane.stops.resume(target, "there")
    _, foreign = rows()[1]
    monkeypatch.delenv(database.URL_ENV)
    add(2, foreign)
    plane.forget()
    assert "here" in (plane.stopped(*EVERYTHING) or "")


def test_a_resume_by_an_untrusted_key_ends_nothing_and_is_told(
    plane: ControlPlane,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    own_home: Path,
) -> None:
    target = Target.parse("support_triage")
    plane.stops.stop(target, "x")
    monkeypatch.setenv(database.URL_ENV, f"sqlite:///{own_home / 'control.db'}")
    monkeypatch.setenv("AGENTKIT_HOME", str(tmp_path / "mallory"))
    keys.create("Mallory")
    ControlPlane().stops.resume(target, "let me")
    monkeypatch.delenv(database.URL_ENV)
    monkeypatch.setenv("AGENTKIT_HOME", str(own_home))
    reason = ControlPlane().stopped(*EVERYTHING) or ""
    assert "not trusted here" in reason
    assert "does not count" in reason


def test_a_resume_whose_text_was_altered_ends_nothing(plane: ControlPlane) -> None:
    one, other = Target.parse("support_triage"), Target.parse("other")
    first = plane.stops.stop(one, "x")
    plane.stops.stop(other, "y")
    plane.stops.resume(other, "z")
    sequence, envelope = rows()[2]
    outer = json.loads(envelope)
    body = json.loads(base64.b64decode(outer["payload"]))
    body["predicate"]["ends"] = [first.digest]
    outer["payload"] = base64.b64encode(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).decode()
    with database.database().writing() as connection:
        connection.execute(
            tables.STOPS.update().where(tables.STOPS.c.sequence == sequence).values(envelope=json.dumps(outer))
        )
    plane.forget()
    assert "was altered" in (plane.stopped(*EVERYTHING) or "")


@pytest.mark.parametrize("taken", [[1], [2], [1, 2]])
def test_entries_that_are_taken_away_close_everything(plane: ControlPlane, taken: list[int]) -> None:
    plane.stops.stop(Target.parse("support_triage"), "x")
    plane.stops.stop(Target.parse("other"), "y")
    assert plane.stopped(*EVERYTHING)
    with database.database().writing() as connection:
        connection.execute(tables.STOPS.delete().where(tables.STOPS.c.sequence.in_(taken)))
    plane.forget()
    with pytest.raises(ControlError, match="missing"):
        plane.stopped("unrelated", None, None, None)


def test_an_entry_that_is_no_envelope_closes_everything(plane: ControlPlane) -> None:
    plane.stops.stop(Target.parse("other"), "x")
    add(2, "'; DROP TABLE stops; --")
    plane.forget()
    with pytest.raises(ControlError, match="cannot be read"):
        plane.stopped("unrelated", None, None, None)


# ---- the commands


def test_the_command_says_when_it_holds_and_how_to_undo_it() -> None:
    said = cli("stop", "support_triage", "--why", "com[red]plaints")
    assert "support_triage is stopped; it holds in every process within 1 s" in said
    assert "agentkit resume support_triage --why …" in said
    assert "no system support_triage has run or is registered here" in said
    assert "com[red]plaints" in cli("stop", "--list")
    assert "may run again, in every process within 1 s" in cli("resume", "support_triage", "--why", "mended")
    assert "nothing is stopped" in cli("stop", "--list")
    with pytest.raises(UsageError, match="--list"):
        cli("stop")
