"""A run that is taken up again and ends before all it had done was given back: nothing of that is forgotten."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from durable_runs import Killed, Outside, executing, given, logged, opened, stopped  # noqa: F401

from agentkit.errors import ToolFailed
from agentkit.runs import Run
from agentkit.tools import tool
from agentkit_tracking import durable
from agentkit_tracking.control import ControlPlane


def killed(given: Any, outside: Outside, *calls: tuple[str, int]) -> None:  # noqa: F811
    """A run "r" of the work "work" that is killed at its last call."""
    tools = {t.name: t for t in outside.tools()}
    given("work", executing(*tools.values())(lambda run: [run.call(tools[name], n=n) for name, n in calls]))
    with opened() as runner:
        before = len(Killed.kills)
        runner.start("work", {}, run_id="r")
        stopped("r", before)


def test_a_stop_before_it_is_taken_up_leaves_its_effects_in_the_record(
    given: Any,  # noqa: F811
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(ControlPlane, "notify", lambda self, notice: told.append(notice))
    outside = Outside({("send", 2, "after")})
    killed(given, outside, ("look", 0), ("put", 1), ("send", 2))
    monkeypatch.setattr(ControlPlane, "stopped", lambda self, *_: "incident 7")
    with opened() as runner:
        record = runner.handle("r").result(timeout_s=30)
    assert (record.state, outside.effects) == ("FAILED", [("look", 0), ("put", 1), ("send", 2)])
    assert [(e["tool"], e["arguments"]["n"], e["outcome"]) for e in record.effects] == [
        ("put", 1, "done"),
        ("send", 2, "unknown"),
    ]
    assert [n.details["tool"] for n in told if n.kind == "unknown"] == ["send"]
    [line] = logged(own_home)
    assert len(line["effects"]) == 2
    assert record.tool_calls == 2


def test_an_error_class_of_the_tools_own_is_raised_again(given: Any) -> None:  # noqa: F811
    outside = Outside({("send", 2, "before")})
    _, _, send = outside.tools()

    class OutOfStock(ToolFailed):
        pass

    sys.modules[__name__].OutOfStock = OutOfStock  # type: ignore[attr-defined]

    @tool
    def order(n: int) -> str:
        """Fails in its own way."""
        raise OutOfStock("order", "error", "none left")

    def work(run: Run) -> Any:
        try:
            run.call(order, n=1)
        except OutOfStock:
            return run.call(send, n=2)
        return "not raised"

    given("work", executing(order, send)(work))
    with opened() as runner:
        before = len(Killed.kills)
        runner.start("work", {}, run_id="r")
        stopped("r", before)
    with opened(lambda request: True) as runner:
        record = runner.handle("r").result(timeout_s=30)
    assert (record.state, record.output) == ("DONE", {"value": "send 2"})


def test_a_cost_that_nobody_knows_does_not_keep_a_run_from_going_on(given: Any) -> None:  # noqa: F811
    outside = Outside({("look", 0, "before")})
    look, _, _ = outside.tools()

    def work(run: Run) -> Any:
        def ask() -> str:
            with run.model_call("unpriced", {}) as step:
                step.tokens_in, step.usd = 5, float("nan")
            return "said"

        run.through("model", "unpriced", {"q": 1}, ask)
        return run.call(look, n=0)

    given("work", executing(look)(work))
    with opened() as runner:
        before = len(Killed.kills)
        runner.start("work", {}, run_id="r")
        stopped("r", before)
    with opened() as runner:
        record = runner.handle("r").result(timeout_s=30)
    assert record.state == "DONE"
    assert record.usd != record.usd  # NaN: unknown


def test_what_is_no_json_is_refused_or_kept_and_never_hangs(given: Any) -> None:  # noqa: F811
    given("echo", executing()(lambda run, text: str(type(text))))
    with opened() as runner:
        record = runner.start("echo", {"text": b"\xff\x00"}).result(timeout_s=30)
    assert record.state == "DONE"


def test_a_pickle_in_the_database_is_not_read(given: Any, own_home: Path, tmp_path: Path) -> None:  # noqa: F811
    given("echo", executing()(lambda run, text: text))
    with opened() as runner:
        runner.start("echo", {"text": "a"}, run_id="r").result(timeout_s=30)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    content = base64.b64encode(pickle.dumps(Evil())).decode()
    with closing(sqlite3.connect(own_home / "durable.db")) as database, database:
        database.execute(
            "UPDATE workflow_status SET serialization = 'py_pickle', inputs = ?, output = ?", [content] * 2
        )
        database.execute("UPDATE operation_outputs SET serialization = 'py_pickle', output = ?", [content])
    with pytest.raises(Exception):  # noqa: B017, PT011
        durable.status("r")
    assert not (tmp_path / "executed").exists()


def test_a_forked_child_does_not_keep_a_dead_process_alive(own_home: Path) -> None:
    script = """
import os, time
from pathlib import Path
from agentkit_tracking.durable.alive import Files
files = Files(Path(os.environ["AGENTKIT_HOME"]), "me")
files.keep()
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(0.3)
print("ready", flush=True)
time.sleep(60)
"""
    from agentkit_tracking.durable.alive import Files

    env = {**os.environ, "AGENTKIT_HOME": str(own_home)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    others = Files(own_home, "other")
    assert not others.looks_dead("me")
    process.kill()
    process.wait()
    assert others.looks_dead("me")
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
