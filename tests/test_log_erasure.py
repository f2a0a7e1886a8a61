"""One user's data taken out of the run log: nothing of it is left anywhere, and the chain is still whole."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import orjson
import pytest
from log_files import as_made_once, in_process, run, write
from typer.testing import CliRunner

import agentkit as ak
from agentkit.callers import Caller
from agentkit.errors import UsageError
from agentkit_pipelines.cli import app
from agentkit_tracking import keys
from agentkit_tracking.forwarding.assembly import LoggedFeedback, LoggedRun
from agentkit_tracking.forwarding.consumer import Consumer, Place
from agentkit_tracking.runlog import RunLog, feedback
from agentkit_tracking.runlog.erasure import Erased, erase_user
from agentkit_tracking.runlog.retention import compact
from agentkit_tracking.runlog.segments import segment_files
from agentkit_tracking.runlog.verification import Report, verify

ANNA = Caller("anna").user_hash


@pytest.fixture
def log(own_home: Path) -> RunLog:
    """Anna's and Bob's runs, in an archive, in the database, and in a segment that is still written to."""
    keys.create("Ada")
    log = RunLog()

    def both(place: str, days: float) -> None:
        write(
            log,
            run(f"anna-{place}", ANNA),
            run(f"child-{place}", parent=f"anna-{place}"),
            run(f"bob-{place}", Caller("bob").user_hash),
            days=days,
        )

    def archived() -> None:
        both("archive", 9)
        log.close()
        compact(log, 5)

    as_made_once(own_home, "to erase", archived)
    both("database", 1)
    log.fold()
    both("fresh", 0)
    feedback.give(log, "anna-archive", "rejected", comment="the comment of anna", by="anna")
    return log


def secrets(log: RunLog) -> list[str]:
    """Runs something of whose private parts is left, and feedback."""
    return log.sql(
        "SELECT DISTINCT run_id FROM events WHERE private::VARCHAR <> '{}' AND run_id IS NOT NULL ORDER BY 1"
    )["run_id"].to_list()


def left_in_files(log: RunLog, words: tuple[bytes, ...]) -> list[str]:
    """Which files still hold one of the words; archives are read, since they are compressed."""
    found = [p.name for p in log.folder.rglob("*") if p.is_file() and any(w in p.read_bytes() for w in words)]
    table = log.sql("SELECT * FROM events").write_csv().encode()
    return found + [f"answer: {w.decode()}" for w in words if w in table]


def test_everything_of_one_user_goes_and_nothing_else_does(log: RunLog) -> None:
    figures = log.sql("SELECT * EXCLUDE (user_hash, session) FROM outcomes ORDER BY run_id").rows()
    done = erase_user(log, "anna", why="asked for it, ticket 4711", by="Ada")
    assert sorted(done.runs) == [
        f"{who}-{place}" for who in ("anna", "child") for place in ("archive", "database", "fresh")
    ]
    # run, model and outcome of each; of the transition there is nothing private; and the feedback
    assert done.events == 6 * 3 + 1
    assert secrets(log) == ["bob-archive", "bob-database", "bob-fresh"]
    assert left_in_files(log, (b"secret of anna", b"secret of child", b"comment of anna", str(ANNA).encode())) == []
    assert log.sql("SELECT * EXCLUDE (user_hash, session) FROM outcomes ORDER BY run_id").rows() == figures
    assert log.sql(
        "SELECT private->>'inputs' IS NOT NULL FROM events WHERE run_id = 'bob-archive' AND type = 'run'"
    ).item()
    report = verify(log)
    assert report.faults == []
    assert "private parts of 19 events of 6 runs were erased on request" in report.remarks


def test_the_chain_says_who_asked_and_why_and_not_for_whom(log: RunLog) -> None:
    erase_user(log, user_hash=ANNA, why="a letter by anna@example.com", by="Ada")
    [(event, by, why)] = log.sql(
        "SELECT name, private->>'by', private->>'why' FROM events WHERE type = 'erasure'"
    ).rows()
    assert (event, by) == ("user", "Ada")
    assert why.startswith("a letter by ")
    assert "anna" not in why


def test_a_second_erasure_changes_nothing(log: RunLog) -> None:
    erase_user(log, "anna", why="asked for it")
    count = log.sql("SELECT count(*) FROM events").item()
    assert erase_user(log, "anna", why="asked for it") == Erased()
    assert log.sql("SELECT count(*) FROM events").item() == count


def test_runs_that_were_under_way_go_with_the_next_erasure(log: RunLog) -> None:
    erase_user(log, "anna", why="asked for it")
    write(log, run("anna-fresh", ANNA))  # its end is logged now
    assert "anna-fresh" in secrets(log)
    assert "3 events of erased runs still have theirs" in " ".join(_after_fold(log).remarks)
    assert erase_user(log, "nobody else", why="finish").runs == ("anna-fresh",)
    assert verify(log).is_whole
    assert "anna-fresh" not in secrets(log)


def _after_fold(log: RunLog) -> Report:
    log.fold()
    return verify(log)


def test_a_log_is_folded_archived_and_verified_after_an_erasure_as_before(log: RunLog) -> None:
    erase_user(log, "anna", why="asked for it")
    write(log, run("later"))
    log.close()
    log.fold()
    compact(log, 0)
    assert verify(log).faults == []
    assert secrets(log) == ["bob-archive", "bob-database", "bob-fresh", "later"]


@pytest.mark.parametrize(
    "how",
    [
        "erasure._erase_in_files = die",
        "blanking.erase = die_at(2)",
        "erasure._erase_in_archives = die",
        "upkeep.write_archive = die",
        "Path.unlink = die",
        "erasure._erase_in_database = die",
        "erasure._settle = die",
        "upkeep.os.replace = die_at(2)",
    ],
    ids=["after the event", "within a file", "after files", "at an archive", "before the old archive is removed",
         "before the database", "after the database", "before the database is written anew"],
)  # fmt: skip
def test_an_erasure_that_is_killed_is_finished_by_the_next(log: RunLog, how: str) -> None:
    log.close()
    script = f"""
import os
from log_files import *
from pathlib import Path
from agentkit_tracking.runlog import blanking, erasure, upkeep
def die(*_, **__): os.kill(os.getpid(), 9)
def die_at(n, done=[]):
    def step(*a, **k):
        done.append(1)
        return die() if len(done) == n else real(*a, **k)
    real = os.replace if {"replace" in how} else blanking.erase
    return step
log = RunLog()
write(log, run("anna-more", "{ANNA}"))
{how}
erasure.erase_user(log, "anna", why="asked for it", by="Ada")
"""
    killed = in_process(script)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert verify(log).faults == []
    erase_user(log, "anna", why="asked for it", by="Ada")
    assert secrets(log) == ["bob-archive", "bob-database", "bob-fresh"]
    assert left_in_files(log, (b"secret of anna", b"secret of child", b"comment of anna", str(ANNA).encode())) == []
    assert len(list(log.folder.glob("archive/*/*"))) == 1
    assert verify(log).faults == []


def test_the_file_of_a_process_that_is_writing_is_blanked_while_it_writes(log: RunLog) -> None:
    writer = in_process(
        "import sys; from log_files import *; log = RunLog()\n"
        f"for i in range(2000):\n    write(log, run(f'w{{i:04}}', '{ANNA}' if i % 2 else None))\n"
        "    if i == 300: print('going', flush=True)\n"
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "going\n"
    first = erase_user(log, "anna", why="asked for it")
    writer.communicate()
    assert writer.returncode == 0
    assert len(first.runs) > 100
    assert log.sql("SELECT count(*) FROM outcomes WHERE run_id LIKE 'w%'").item() == 2000
    erase_user(log, "anna", why="asked for it")
    assert verify(log).faults == []
    assert log.sql("SELECT count(*) FROM runs WHERE run_id LIKE 'w%' AND inputs IS NOT NULL").item() == 1000


def test_the_traces_of_erased_runs_go_too(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_TRACES", "on")
    system = ak.adopt(lambda text: text.upper(), name="shout")
    with ak.acting_for("anna"):
        system.run(text="for anna")
    kept = system.run(text="for nobody")
    from agentkit_tracking import traces
    from agentkit_tracking.home import connect

    traces.flush()
    done = erase_user(RunLog(), "anna", why="asked for it")
    assert (len(done.runs), done.traces, done.traces_left) == (1, 1, "")
    client = connect()
    experiment = client.get_experiment_by_name("shout")
    left = client.search_traces(locations=[experiment.experiment_id])
    assert [trace.info.tags["agentkit.run_id"] for trace in left] == [kept.run_id]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "name the user, or the pseudonym"),
        ({"user": "anna", "user_hash": "0" * 16}, "name the user, or the pseudonym"),
        ({"user": " "}, "the user is empty"),
        ({"user_hash": "anna"}, "is no pseudonym: those are 16 hex digits"),
        ({"user": "anna", "why": " "}, "an erasure is recorded with why"),
    ],
)
def test_what_cannot_be_meant_is_refused(log: RunLog, given: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        erase_user(log, **{"why": "asked", **given})
    assert len(secrets(log)) == 9


@pytest.mark.parametrize("run_id", ['ticket "17"', "a\\b", "ü-17"])
def test_run_ids_may_be_any_text(own_home: Path, run_id: str) -> None:
    log = RunLog()
    write(log, run(run_id, ANNA, inputs={"text": "the words"}))
    assert erase_user(log, "anna", why="asked for it").runs == (run_id,)
    assert left_in_files(log, (b"the words",)) == []
    assert verify(log).is_whole


def test_what_a_file_still_has_of_an_erased_run_is_said(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentkit_tracking.runlog import erasure

    log = RunLog()
    write(log, run("r1", ANNA))
    monkeypatch.setattr(erasure, "blank", lambda *_: 0)
    erase_user(log, "anna", why="asked for it")
    assert "3 events of erased runs still have theirs: run `agentkit log erase` again" in verify(log).remarks
    log.database.path.unlink()
    assert "3 events of erased runs still have theirs: run `agentkit log erase` again" in verify(log).remarks


@pytest.mark.parametrize("place", ["fresh", "database", "archive"])
def test_callers_for_others_lose_what_they_hold_of_the_run(own_home: Path, place: str) -> None:
    log = RunLog()
    bob, effects = Caller("bob").user_hash, [{"tool": "mail", "arguments": {"to": "address of anna"}}]
    write(log, run("top", bob, effects=effects), run("mid", parent="top", effects=effects), run("anna", ANNA, parent="mid"),
          run("other", bob, parent="top"), days=5)  # fmt: skip
    if place != "fresh":
        log.close()
        log.fold()
    if place == "archive":
        compact(log, 1)
    done = erase_user(log, "anna", why="asked for it")
    assert (done.runs, done.callers, done.events) == (("anna",), ("mid", "top"), 5)
    assert left_in_files(log, (b"address of anna",)) == []
    assert log.sql("SELECT run_id FROM events WHERE type = 'run' AND private->>'inputs' IS NOT NULL ORDER BY 1")[
        "run_id"
    ].to_list() == ["mid", "other", "top"]
    report = verify(log)
    assert report.faults == []
    assert not [remark for remark in report.remarks if "still have" in remark]
    assert erase_user(log, "anna", why="asked for it") == Erased()


def test_old_files_are_brought_over_whole_and_deleted(own_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = own_home / "runs"
    old.mkdir(parents=True)
    values = {**asdict(run("old", ANNA)), "from_another_version": 1}
    values.pop("result", None)
    (old / "a.jsonl").write_bytes(orjson.dumps(values) + b'\n[1]\n{"run_id": "to')
    log = RunLog()
    log.fold()
    assert list(old.iterdir()) == []
    assert "2 lines are no records of runs" in caplog.text
    assert log.find("old").inputs == {"text": "secret of old"}
    assert erase_user(log, "anna", why="asked for it").runs == ("old",)
    assert left_in_files(log, (b"secret of old",)) == []
    assert segment_files(log.segments)[1:] == []
    assert verify(log).is_whole


class Kept:
    """A target that keeps what it is given, as text."""

    name = address = "kept"

    def __init__(self) -> None:
        self.given: list[str] = []

    def send(self, runs: list[LoggedRun]) -> None:
        self.given += [str(run) for run in runs]

    def attach(self, feedback: LoggedFeedback, place: Place) -> None:
        self.given.append(str(feedback))

    def close(self) -> None:
        pass


def test_what_is_being_forwarded_is_not_given_away_after_an_erasure(own_home: Path) -> None:
    log, target = RunLog(), Kept()
    write(log, *(run(f"r{i}", ANNA) for i in range(450)))
    feedback.give(log, "r449", label="rejected", comment="secret of r449")
    erased: list[int] = []

    def rest(seconds: float) -> None:
        if not erased:
            erase_user(log, "anna", why="asked for it")
            erased.append(len(target.given))

    Consumer(log, target, rest).forward()
    before, after = target.given[: erased[0]], target.given[erased[0] :]
    assert 0 < len(before) < 450
    assert any("secret" in text for text in before)
    assert {f"r{i}" for i in range(450)} <= {
        run_id for text in target.given for run_id in re.findall(r"\br\d+\b", text)
    }
    assert not [text for text in after if "secret" in text]


def test_an_erasure_waits_for_what_is_being_sent(own_home: Path) -> None:
    log, sending, go_on = RunLog(), threading.Event(), threading.Event()
    write(log, run("r", ANNA))

    class Slow(Kept):
        def send(self, runs: list[LoggedRun]) -> None:
            sending.set()
            assert go_on.wait(60)
            super().send(runs)

    target = Slow()
    forwarding = threading.Thread(target=Consumer(log, target).forward)
    forwarding.start()
    assert sending.wait(60)
    erasing = threading.Thread(target=lambda: erase_user(log, "anna", why="asked for it"))
    erasing.start()
    erasing.join(2)
    assert erasing.is_alive()  # copies are removed after it, so that none is missed
    go_on.set()
    forwarding.join(60)
    erasing.join(60)
    assert not erasing.is_alive()
    assert len(target.given) == 1


def test_a_step_of_a_run_under_way_that_was_erased_is_not_forwarded_when_it_ends(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTKIT_TRACES", "off")
    from agentkit_tracking.runlog import own

    target = Kept()

    @ak.tool
    def look(ref: str) -> str:
        """Look something up."""
        return f"secret of {ref}"

    def work(text: str) -> str:
        look(ref="anna")
        consumer.forward()  # has read the step by now
        erase_user(own(), "anna", why="asked for it")
        return "done"

    consumer = Consumer(own(), target)
    with ak.acting_for("anna"):
        ak.adopt(work, name="slow", tools=[look]).run(text="hello")
    consumer.forward()
    assert len(target.given) == 1
    assert "secret" not in target.given[0]


def test_traces_are_found_by_their_ids_wherever_they_are(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_TRACES", "on")
    system = ak.adopt(lambda text: text.upper(), name="shout")
    with ak.acting_for("anna"):
        records = [system.run(text="for anna") for _ in range(2)]
    from agentkit_tracking import traces
    from agentkit_tracking.home import connect

    traces.flush()
    client = connect()
    experiment = client.get_experiment_by_name("shout")
    client.rename_experiment(experiment.experiment_id, "whisper")
    client.delete_trace_tag(traces.trace_id(records[0].run_id), "agentkit.run_id")
    (own_home / "log" / "consumers" / "otlp-1.json").write_text('{"target": "http://collector:4318/v1/traces"}')
    done = erase_user(RunLog(), "anna", why="asked for it")
    assert (done.traces, done.traces_left, done.elsewhere) == (2, "", ("http://collector:4318/v1/traces",))
    assert client.search_traces(locations=[experiment.experiment_id]) == []


def test_the_command_says_what_it_did_not_find_and_what_it_does_not_reach(log: RunLog) -> None:
    (log.folder / "consumers").mkdir()
    (log.folder / "consumers" / "mlflow-1.json").write_text('{"target": "http://elsewhere:5000"}')
    done = CliRunner().invoke(app, ["log", "erase", "Anna", "--why", "asked", "--yes"])
    assert (done.exit_code, "0 events of 0 runs" in done.output) == (0, True)
    assert "nothing in the log was this user's" in done.output
    done = CliRunner().invoke(app, ["log", "erase", "anna", "--why", "asked", "--yes"])
    assert "nothing in the log" not in done.output
    assert "not reached: what was forwarded to http://elsewhere:5000" in done.output


def test_the_command_closes_what_it_wrote(log: RunLog) -> None:
    log.close()
    command = [sys.executable, "-m", "agentkit_pipelines.cli", "log", "erase", "anna", "--why", "asked", "--yes"]
    subprocess.run(command, check=True, capture_output=True)
    assert not [remark for remark in verify(log).remarks if "do not end in `closed`" in remark]
