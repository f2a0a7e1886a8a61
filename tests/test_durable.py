"""Durable runs that nobody interrupts: started once, recorded once, with all that they cannot do said; and the commands."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from durable_runs import Outside, executing, given, interrupted, killed_and_resumed, logged, nobody, opened  # noqa: F401

from agentkit.budget import Budget
from agentkit.callers import acting_for
from agentkit.errors import UsageError
from agentkit.records import RunRecord
from agentkit.runs import Run
from agentkit.tools import tool
from agentkit_pipelines import durable_cli
from agentkit_tracking import durable

# ---- a run that nobody interrupts


def test_a_durable_run_is_recorded_once_with_every_step(given: Any, own_home: Path) -> None:
    outside = Outside()
    record = killed_and_resumed(outside, given, nobody, ("look", 0), ("put", 1), ("send", 2))
    assert record.state == "DONE"
    assert record.output == {"value": [["look 0", "put 1", "send 2"], 3.0]}
    assert [s.name for s in record.steps if s.kind == "tool"] == ["look", "put", "send"]
    assert [one["outcome"] for one in record.effects] == ["done", "done"]
    [line] = logged(own_home)
    assert RunRecord(**{**line, "steps": record.steps}) == record
    with closing(sqlite3.connect(own_home / "durable.db")) as database:
        kinds = database.execute("SELECT DISTINCT serialization FROM operation_outputs").fetchall()
        assert kinds == [("portable_json",)]
        assert database.execute("SELECT serialization FROM workflow_status").fetchall() == [("portable_json",)]


def test_starting_the_same_id_twice_is_starting_once(given: Any, own_home: Path) -> None:
    given("echo", executing()(lambda run, text: text))
    with opened() as runner:
        first = runner.start("echo", {"text": "a"}, run_id="r").result(timeout_s=30)
        assert runner.start("echo", {"text": "a"}, run_id="r").result(timeout_s=30) == first
        with pytest.raises(UsageError, match="does something else"):
            runner.start("echo", {"text": "b"}, run_id="r")
        with pytest.raises(UsageError, match="a durable runner is open"):
            durable.Runner().launch()
        with pytest.raises(UsageError, match="no durable run 'other'"):
            runner.handle("other")
    assert len(logged(own_home)) == 1


def test_an_error_and_a_refusal_end_the_run_as_failed_and_nothing_is_repeated(given: Any, own_home: Path) -> None:
    begun = []

    @tool
    def look() -> str:
        """Reads."""
        return "seen"

    @executing(look)
    def greedy(run: Run) -> None:
        begun.append(run.run_id)
        for _ in range(3):
            run.call(look)

    given("greedy", greedy, budget=Budget(tool_calls=2))
    with opened() as runner:
        record = runner.start("greedy", {}).result(timeout_s=30)
    assert record.state == "FAILED"
    assert record.error is not None
    assert record.error.startswith("BudgetExceeded: budget of 2 tool_calls would be exceeded")
    assert len(begun) == 1
    [status] = durable.runs()
    assert (status.state, status.last, status.restarts) == ("failed", record.error, 0)
    with opened():
        time.sleep(0.3)
    assert len(begun) == 1
    assert len(logged(own_home)) == 1


def test_what_cannot_be_found_again_is_refused(given: Any) -> None:
    with opened() as runner, pytest.raises(UsageError, match="no other process could find it again"):
        runner.start(lambda run: None, {})
    with pytest.raises(UsageError, match="not in 'mysql"):
        durable.Runner("mysql://localhost/x")
    given("twice", lambda run: None)
    with pytest.raises(UsageError, match="already"):
        durable.work("twice")(lambda run: None)
    with pytest.raises(UsageError, match="choose another name"):
        durable.work("a/b")(lambda run: None)


def test_a_runner_without_a_database_says_so(own_home: Path) -> None:
    assert durable.runs() == []
    with pytest.raises(UsageError, match="nothing was run durably yet"):
        durable.status("r")
    own_home.mkdir()
    (own_home / "durable.db").write_text("this is no database, by any means")
    with pytest.raises(UsageError, match=r"durable\.db, cannot be used"):
        durable.Runner().launch()
    with pytest.raises(UsageError, match="cannot be read"):
        durable.runs()


def test_on_whose_behalf_a_run_acts_is_kept(given: Any) -> None:
    given("who", executing()(lambda run: [run.caller.user, run.caller.session]))
    with opened() as runner, acting_for("ada", "s1"):
        record = runner.start("who", {}).result(timeout_s=30)
    assert record.output == {"value": ["ada", "s1"]}
    assert record.session == "s1"


def test_without_dbos_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['dbos'] = None\n"
        "from agentkit_tracking import durable\n"
        "durable.work('x')(print)\n"
        "try: durable.Runner\n"
        "except Exception as e: print(type(e).__name__, e)\n"
        "assert not {'dspy', 'mlflow', 'sqlalchemy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "UsageError durable runs need DBOS: pip install 'agentkit-hedgehog[durable]'\n", done.stderr


# ---- the command line


def test_the_commands_list_runs_and_go_on_with_them(given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    durable_cli.runs()
    assert "nothing was run durably yet" in capsys.readouterr().out
    interrupted(given)
    durable_cli.runs()
    assert "interrupted" in capsys.readouterr().out
    durable_cli.work(until_idle=True)
    durable_cli.runs("r")
    assert "done" in capsys.readouterr().out
    durable_cli.runs(unfinished=True)
    assert "nothing runs durably" in capsys.readouterr().out
    with pytest.raises(UsageError, match="`agentkit register` it first"):
        durable_cli.run_durably("notebook.py:system", {})
    with pytest.raises(UsageError, match="name the run"):
        durable_cli.runs(again=True)
    with pytest.raises(UsageError, match="there is no file"):
        durable_cli.work(module=["nowhere.py"])
    assert durable_cli.run_durably("work", {}).state == "DONE"
