"""Durable runs of systems: models are not asked twice, and a run keeps the release it was started with."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import dspy
import pytest
from durable_runs import opened
from hedgehogs import Found, Hedgehog, doing
from releases import put_in_production, store  # noqa: F401

import agentkit as ak
from agentkit.approvals import ApprovalRequest, Decision
from agentkit.testing import Killed, scripted
from agentkit_tracking import durable, registry
from agentkit_tracking.durable import works

PAYER = '''
import agentkit as ak


@ak.tool(permission="write", criticality="high")
def pay(usd: float) -> str:
    """Pay."""
    return "paid by VERSION"


def program(text: str) -> dict:
    return {"said": pay(usd=1.0)}


system = ak.adopt(program, name="payer", tools=[pay])
'''


def test_what_a_model_said_is_given_back_with_its_tokens_and_cost() -> None:
    kill = [True]
    lm = scripted({"answer": "first"}, {"answer": "second"}, {"answer": "third"})

    @ak.tool
    def look() -> str:
        """Reads."""
        if kill and kill.pop():
            raise Killed
        return "seen"

    class Asker(Hedgehog):
        tools = (look,)

        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict("question -> answer")
            self.ask.lm = lm

        def execute(self, run: ak.Run, plan: Any, text: str = "") -> Any:
            answers = [self.ask(question=f"{text} {n}").answer for n in range(2)]
            return [*answers, run.call(look), self.ask(question="last").answer, dict(run.ledger.used)]

        def reflect(self, run: ak.Run, plan: Any, facts: Any, text: str = "") -> Any:
            return Found(value=facts)

    system = durable.offer(ak.System("asker", [Asker()]))
    try:
        with opened() as runner:
            runner.start(system, {"text": "hello"}, run_id="r")
            while kill:
                time.sleep(0.02)
        with opened() as runner:
            record = runner.handle("r").result(timeout_s=60)
    finally:
        works.forget("asker")
    assert record.state == "DONE", record.error
    assert record.output is not None
    *said, used = record.output["value"]
    assert said == ["first", "second", "seen", "third"]
    assert len(lm.engine.prompts) == 3  # none was asked twice
    assert (record.model_calls, record.tokens_in, record.tokens_out) == (3, 300, 30)
    assert record.usd == pytest.approx(0.03)
    assert (used["model_calls"], used["tokens_in"], used["tool_calls"]) == (3, 300, 1)
    assert used["usd"] == pytest.approx(0.03)
    assert [s.kind for s in record.steps if s.kind in ("model", "tool")] == ["model", "model", "tool", "model"]


def test_a_write_of_a_system_that_is_called_by_another_is_made_once() -> None:
    kill, keys, effects = [True], [], []

    @ak.tool(permission="write", criticality="low", idempotent=True)
    def put(idempotency_key: str) -> str:
        """Writes by key."""
        keys.append(idempotency_key)
        effects.append("put")
        if kill and kill.pop():
            raise Killed
        return "put"

    inner = doing(lambda run: run.call(put), put, name="inner")
    outer = durable.offer(doing(lambda run: inner.run(text="x").output, name="outer"))
    try:
        with opened() as runner:
            runner.start(outer, {"text": ""}, run_id="r")
            while kill:
                time.sleep(0.02)
        with opened(lambda request: Decision("modify", arguments={"result": "put"})) as runner:
            record = runner.handle("r").result(timeout_s=60)
    finally:
        works.forget("outer")
    assert record.output == {"value": {"value": "put"}}, record.error
    assert len(set(keys)) == 1  # whether it was repeated or not


@pytest.mark.slow
def test_a_run_keeps_the_release_it_was_started_with(store: Path, tmp_path: Path) -> None:  # noqa: F811
    asked, answer = threading.Event(), threading.Event()

    def person(request: ApprovalRequest) -> bool:
        asked.set()
        return answer.wait(60)

    source = tmp_path / "payer.py"
    versions = []
    for number in (1, 2):
        source.write_text(PAYER.replace("VERSION", f"version {number}"))
        versions.append(registry.register_file(source))
        put_in_production(versions[-1])
        if number == 1:
            with opened(person) as runner:
                runner.start("payer@production", {"text": ""}, run_id="old")
                assert asked.wait(60)
            [status] = durable.runs()
            assert (status.state, status.release) == ("interrupted", versions[0].release_id)
    answer.set()
    with opened(person) as runner:
        old = runner.handle("old").result(timeout_s=120)
        new = runner.start("payer@production", {"text": ""}).result(timeout_s=120)
    assert (old.state, old.release, old.stage) == ("DONE", versions[0].release_id, "production"), old.error
    assert old.output == {"said": "paid by version 1"}
    assert (new.release, new.output) == (versions[1].release_id, {"said": "paid by version 2"})


@pytest.mark.slow
def test_a_release_that_is_gone_ends_the_run_with_a_record(store: Path, tmp_path: Path) -> None:  # noqa: F811
    source = tmp_path / "payer.py"
    source.write_text(PAYER)
    version = registry.register_file(source)
    order = works.order_of("payer/1", {"text": ""})
    assert (order.release, order.stage, order.worker) == (version.release_id, "draft", "releases")
    record, error = works.carry_out(
        works.Order(None, "payer", "0" * 64, "draft", {}), "r", None, works.Day(), lambda: None
    )
    assert record.state == "FAILED"
    assert isinstance(error, ak.AgentkitError)
    assert "0 registered releases begin with" in str(record.error)
