"""What goes wrong around durable runs: records, journals and processes that fail, work that nobody here knows."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from durable_runs import Killed, Outside, executing, given, interrupted, logged, opened, stopped, taken_up  # noqa: F401

from agentkit.errors import AgentkitError, UsageError
from agentkit.records import RunRecord
from agentkit.runs import Run
from agentkit_tracking import durable, runlog
from agentkit_tracking.durable import works


def test_a_record_that_cannot_be_handed_over_now_is_handed_over_later(
    given: Any, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = Outside()
    look, _, _ = outside.tools()
    given("work", executing(look)(lambda run: run.call(look, n=1)))
    monkeypatch.setattr("agentkit_tracking.durable.runner._AGAIN_S", 0.1)
    own_home.mkdir()
    (own_home / "log").write_text("in the way")
    with opened() as runner:
        handle = runner.start("work", {})
        with pytest.raises(TimeoutError, match=r"not over after 1 s"):
            handle.result(timeout_s=1)
        (own_home / "log").unlink()
        assert handle.result(timeout_s=30).state == "DONE"
    assert outside.effects == [("look", 1)]
    assert len(logged(own_home)) == 1


def test_a_kill_between_the_run_log_and_its_checkpoint_leaves_one_line(
    given: Any, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = Outside()
    look, _, _ = outside.tools()
    given("work", executing(look)(lambda run: run.call(look, n=1)))

    def emit(record: RunRecord) -> None:
        runlog.sink(record)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("agentkit.sinks.emit", emit)
        with opened() as runner:
            before = len(Killed.kills)
            runner.start("work", {}, run_id="r")
            stopped("r", before)
    with opened() as runner:
        assert runner.handle("r").result(timeout_s=30).state == "DONE"
    assert len(logged(own_home)) == 1


def test_a_journal_that_cannot_be_written_keeps_the_run_from_doing_more(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = Outside()
    look, _, _ = outside.tools()

    @executing(look)
    def work(run: Run) -> None:
        for n in range(3):
            try:
                run.call(look, n=n)
            except Exception:
                continue

    given("work", work)
    monkeypatch.setattr("agentkit_tracking.durable.runner._AGAIN_S", 0.1)
    with opened() as runner:
        database = runner._dbos._sys_db
        whole, broken = database.record_operation_result, [True]

        def record(result: Any, **options: Any) -> None:
            if "tool look" in result["function_name"] and broken and broken.pop():
                raise OSError("disk full")
            whole(result, **options)

        monkeypatch.setattr(database, "record_operation_result", record)
        assert runner.start("work", {}).result(timeout_s=30).state == "DONE"
    assert [n for _, n in outside.effects] == [0, 0, 1, 2]


def test_a_run_that_takes_its_process_down_again_and_again_is_given_up_and_can_be_resumed(given: Any) -> None:
    interrupted(given)
    with pytest.raises(UsageError, match="is interrupted; only one that was given up"):
        durable.resume("r")
    with closing(sqlite3.connect(current_home() / "durable.db")) as database, database:
        database.execute("UPDATE workflow_status SET recovery_attempts = 101")
    with opened() as runner:
        with pytest.raises(AgentkitError, match="MAX_RECOVERY_ATTEMPTS_EXCEEDED"):
            runner.handle("r").result(timeout_s=30)
        assert durable.status("r").state == "given up"
        durable.resume("r")
        assert runner.handle("r").result(timeout_s=30).state == "DONE"


def current_home() -> Path:
    return Path(os.environ["AGENTKIT_HOME"])


def test_work_that_this_process_does_not_know_is_left_to_those_that_do(given: Any) -> None:
    function = interrupted(given)
    works.forget("work")
    with opened():
        time.sleep(0.5)
        assert durable.status("r").state == "interrupted"
    given("work", function)
    assert taken_up("work", 1).state == "DONE"
