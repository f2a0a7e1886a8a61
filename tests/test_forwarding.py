"""Forwarding from the run log: whole runs in batches, once each, past what a target refuses, and from where it was left."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crews import Asks, crew, node, nothing_paid_yet, refund  # noqa: F401
from forwarded import SPANS, Kept, keep, made, own_log
from hedgehogs import speaking
from nobody import open_to_all, unprivileged

import agentkit as ak
from agentkit.errors import UsageError
from agentkit.records import Step
from agentkit.testing import Scripted
from agentkit_tracking.forwarding import Rejected, Unavailable, span_id, trace_id
from agentkit_tracking.forwarding import consumer as consuming
from agentkit_tracking.forwarding.assembly import Assembler, LoggedRun
from agentkit_tracking.forwarding.consumer import BATCH, Consumer
from agentkit_tracking.forwarding.spans import Span, spans
from agentkit_tracking.runlog import RunLog, feedback
from agentkit_tracking.runlog.database import lease


@pytest.fixture
def log(own_home: Path) -> Iterator[RunLog]:
    with own_log() as log:
        yield log


def forwarded(log: RunLog, target: Kept | None = None) -> Kept:
    """All that the log has, by a consumer that begins where the last one ended."""
    target = target or Kept()
    Consumer(log, target).forward()
    return target


def tree(run: LoggedRun) -> dict[str, list[tuple[str, str]]]:
    """Span name to the (name, kind) of what is in it."""
    all_spans = spans(run)
    names = {span.id: span.name for span in all_spans}
    found: dict[str, list[tuple[str, str]]] = {}
    for span in all_spans:
        found.setdefault(names.get(span.parent or "", ""), []).append((span.name, span.kind))
    return found


# --- what is forwarded ------------------------------------------------------------------------------------------------


def test_finished_runs_go_whole_and_once(log: RunLog) -> None:
    ids = keep(log, 5)
    target = forwarded(log)
    assert target.times == dict.fromkeys(ids, 1)
    keep(log, 1)
    assert len(forwarded(log).runs) == 1, "a consumer goes on where the last one ended"
    assert forwarded(log).runs == {}


def test_a_record_comes_back_as_it_was(log: RunLog) -> None:
    record = made(budget_used=0.5, degraded="ModelError: down", effects=[{"tool": "pay", "outcome": "done"}])
    log.append(record)
    run = forwarded(log).runs[record.run_id]
    assert replace(run.record, phases={}) == replace(record, steps=[], phases={})
    assert [(s.number, s.step) for s in run.steps] == list(enumerate(record.steps, 1))
    assert run.record.phases == {"planning": 0.3}


@pytest.mark.parametrize("kind", ["evaluation", "chaos", "replay"])
def test_rehearsals_are_not_forwarded(log: RunLog, kind: str) -> None:
    keep(log, 2, kind=kind)
    (run,) = keep(log, 1)
    assert list(forwarded(log).runs) == [run]


def test_a_run_under_way_is_forwarded_when_it_has_ended(log: RunLog) -> None:
    record = made()
    log.progress(record_like(record), list(enumerate(record.steps[:3])))
    assert forwarded(log).runs == {}
    log.append(record)
    run = forwarded(log).runs[record.run_id]
    assert [s.step for s in run.steps] == record.steps, "what was read before it ended is there, too"


def record_like(record: ak.RunRecord) -> Any:
    """The run under way of which this will be the record."""

    class Like:
        run_id, system, release, kind, stage = (
            record.run_id, record.system, record.release, record.kind, record.stage
        )  # fmt: skip
        inputs, parent, started_at = record.inputs, None, record.started_at
        caller = type("caller", (), {"user_hash": None, "session": None})

    return Like()


def test_what_was_folded_meanwhile_is_forwarded_too(log: RunLog) -> None:
    first = keep(log, 3)
    log.close()
    log.fold()
    assert not list(log.segments.glob("*.jsonl"))
    second = keep(log, 2)
    assert set(forwarded(log).runs) == {*first, *second}
    third = keep(log, 2)
    log.close()
    log.fold()
    assert set(forwarded(log).runs) == set(third)


def test_a_run_that_another_process_ended_is_put_together(log: RunLog) -> None:
    record = made()
    log.progress(record_like(record), list(enumerate(record.steps[:4])))
    log.close()
    other = RunLog(log.folder)  # took the run up from its journal and noted it whole
    other.append(record)
    other.close()
    run = forwarded(log).runs[record.run_id]
    assert [s.step for s in run.steps] == record.steps


# --- its spans --------------------------------------------------------------------------------------------------------


def test_a_run_is_a_tree_of_phases_and_what_was_done_in_them(log: RunLog) -> None:
    (run_id,) = keep(log, 1)
    run = forwarded(log).runs[run_id]
    assert tree(run) == {
        "": [("shop", "run")],
        "shop": [("PLANNING", "phase"), ("EXECUTING", "phase"), ("REFLECTING", "phase")],
        "PLANNING": [("openai/gpt-x", "model")],
        "EXECUTING": [("tier of pay", "decision"), ("pay", "tool")],
        "REFLECTING": [("action", "decision")],
    }
    made_spans = spans(run)
    root = made_spans[0]
    assert len(made_spans) == SPANS
    assert len({span.id for span in made_spans}) == SPANS
    assert (root.id, root.end - root.start) == (span_id(run_id), 1_000_000_000)
    assert all(root.start <= s.start <= s.end <= root.end for s in made_spans)


def test_runs_that_a_run_called_are_inside_it(log: RunLog) -> None:
    class Left(Asks):
        pass

    with ak.add_sink(lambda record: None):
        left = speaking(Left("left"), Scripted({"answer": "yes"}))
        payer = node("payer", lambda run: run.call(refund, order_id="A", usd=1), refund)
        record = crew(left, payer).run(text="x")  # type: ignore[arg-type]
    target = forwarded(log)
    assert list(target.runs) == [record.run_id], "parts have no trace of their own"
    run = target.runs[record.run_id]
    assert {child.record.route for child in run.children} == {"left", "payer"}
    found = spans(run)
    agents = [span for span in found if span.kind == "run"]
    assert [span.name for span in agents[:1]] == ["crew"]
    assert {span.name for span in agents[1:]} == {"left", "payer"}
    inside = {one.name for agent in agents if agent.name == "left" for one in below(found, agent)}
    assert {"PLANNING", "look_up", "script/1"} <= inside
    assert sum(s.step.tokens_in for s in found if s.kind == "model" and s.step) == record.tokens_in
    # Put together from the database it is the same.
    log.close()
    log.fold()
    Consumer(log, again := Kept()).file.forget()
    forwarded(log, again)
    assert [ids(s) for s in spans(again.runs[record.run_id])] == [ids(s) for s in found]


def ids(span: Span) -> tuple[Any, ...]:
    return span.id, span.parent, span.name, span.kind, span.start, span.end


def below(found: list[Span], top: Span) -> list[Span]:
    under, inside = {top.id}, []
    for span in found:
        if span.parent in under:
            under.add(span.id)
            inside.append(span)
    return inside


def test_a_failed_run_says_where(log: RunLog) -> None:
    steps = [*made().steps[:4]]
    steps.append(Step("tool", "pay", "EXECUTING", 0.4, 0.1, "clerk", {"amount": 5.0}, error="ValueError: no", tries=1))
    steps.append(Step("transition", "FAILED", "EXECUTING", 0.4, 0.2, outputs="ValueError: no"))
    log.append(made(state="FAILED", error="ValueError: no", output=None, steps=steps))
    (run,) = forwarded(log).runs.values()
    failed = {span.name: (span.error, span.error_type) for span in spans(run) if span.is_error}
    assert failed["pay"] == ("ValueError: no", "ValueError")
    assert failed["shop"] == ("ValueError: no", "ValueError")
    assert failed.keys() == {"shop", "EXECUTING", "pay"}


def test_ids_follow_from_the_run() -> None:
    run_id = "0" * 31 + "1"
    assert trace_id(run_id) == f"tr-{run_id}"
    for odd in ("priced", "0" * 32, "A" * 32, "run-🙂"):
        assert trace_id(odd) == trace_id(odd) != f"tr-{odd}"
        assert len(trace_id(odd)) == 35


# --- batches and what a target refuses --------------------------------------------------------------------------------


def test_many_runs_go_in_batches_and_the_position_after_each(log: RunLog) -> None:
    ids = keep(log, BATCH + 50)

    def fail_later(runs: list[LoggedRun]) -> None:
        if target.calls:
            raise Unavailable("full")

    target = Kept(fail_later)
    with pytest.raises(Unavailable):
        forwarded(log, target)
    assert target.calls == [BATCH]
    rest = forwarded(log)
    assert (rest.calls, set(rest.runs) | set(target.runs)) == ([50], set(ids))
    assert not set(rest.runs) & set(target.runs)


def test_a_target_that_is_down_costs_nothing_but_time(log: RunLog) -> None:
    ids, down = keep(log, 3), [True]

    def trouble(runs: list[LoggedRun]) -> None:
        if down[0]:
            raise Unavailable("down")

    consumer = Consumer(log, target := Kept(trouble))
    for _ in range(5):
        with pytest.raises(Unavailable):
            consumer.forward()
    more = keep(log, 2)
    down[0] = False
    consumer.forward()
    assert target.times == dict.fromkeys([*ids, *more], 1)


def rejecting(*bad: str, why: str = "too odd", is_certain: bool = False) -> Callable[[list[LoggedRun]], None]:
    """The trouble of a target that does not take these runs."""

    def trouble(runs: list[LoggedRun]) -> None:
        if any(run.record.run_id in bad for run in runs):
            raise Rejected(why, is_certain=is_certain)

    return trouble


def refused_by(consumer: Consumer) -> list[tuple[str, str]]:
    lines = consumer.file.refused_path.read_text().splitlines() if consumer.file.refused_path.exists() else []
    return [(line["run_id"], line["why"]) for line in map(json.loads, lines)]


def until_settled(consumer: Consumer) -> int:
    """Forward again and again without a pause; returns how often."""
    for n in range(10):
        if not consumer.is_owing:
            return n
        consumer._again_at = 0.0
        consumer.forward()
    raise AssertionError("never settled")


@pytest.mark.parametrize("others", [0, 1])
def test_what_is_refused_for_itself_does_not_block_the_others(
    log: RunLog, caplog: pytest.LogCaptureFixture, others: int
) -> None:
    ids = keep(log, 40)
    bad = ids[17]
    consumer = Consumer(log, target := Kept(rejecting(bad)))
    consumer.forward()
    assert target.times == dict.fromkeys(set(ids) - {bad}, 1)
    assert consumer.is_owing
    for _ in range(2):
        keep(log, others)  # whether or not there are more: what was taken beside it said that it is not the target
        consumer._again_at = 0.0
        consumer.forward()
    assert not consumer.is_owing
    assert refused_by(consumer) == [(bad, "too odd")]
    [said] = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert bad in said
    assert "too odd" in said


def test_a_target_that_takes_nothing_refuses_nothing(log: RunLog) -> None:
    ids = keep(log, 10)

    def trouble(runs: list[LoggedRun]) -> None:
        raise Rejected("internal error")

    consumer = Consumer(log, Kept(trouble))
    for _ in range(5):
        with pytest.raises(Unavailable, match="internal error"):
            consumer.forward()
    assert not consumer.file.refused_path.exists()
    assert set(forwarded(log).runs) == set(ids)


def test_what_is_certainly_the_contents_fault_is_refused_at_once(log: RunLog) -> None:
    ids = keep(log, 3)
    consumer = Consumer(log, Kept(rejecting(*ids, is_certain=True)))
    consumer.forward()
    assert not consumer.is_owing
    assert refused_by(consumer) == [(run_id, "too odd") for run_id in ids]


def test_a_bad_run_that_stands_alone_waits_for_one_that_is_taken(log: RunLog) -> None:
    (bad,) = keep(log, 1)
    consumer = Consumer(log, target := Kept(rejecting(bad)))
    for _ in range(5):
        with pytest.raises(Unavailable, match="too odd"):
            consumer.forward()
    assert refused_by(consumer) == []
    (good,) = keep(log, 1)
    consumer.forward()
    assert list(target.runs) == [good]
    until_settled(consumer)
    assert refused_by(consumer) == [(bad, "too odd")]


def test_bad_runs_that_fill_batches_of_their_own_do_not_block_what_comes_after(
    log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consuming, "BATCH_BYTES", 1)  # each run is a batch
    bad, good = keep(log, 5), keep(log, 3)
    consumer = Consumer(log, target := Kept(rejecting(*bad)))
    consumer.forward()
    assert target.times == dict.fromkeys(good, 1)
    until_settled(consumer)
    assert refused_by(consumer) == [(run_id, "too odd") for run_id in bad]
    assert target.times == dict.fromkeys(good, 1), "what was taken is not sent again"


def test_in_doubt_no_more_than_a_batch_is_passed_over(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "BATCH", 10)
    ids, tried = keep(log, 50), set()

    def trouble(runs: list[LoggedRun]) -> None:
        tried.update(run.record.run_id for run in runs)
        raise Rejected("internal error")

    consumer = Consumer(log, Kept(trouble))
    for _ in range(3):
        with pytest.raises(Unavailable):
            consumer.forward()
    assert tried == set(ids[:10]), "a target that is down is not given the whole log each time"
    assert set(forwarded(log).runs) == set(ids)


def test_a_target_that_breaks_on_the_way_refuses_only_what_it_took_others_beside(log: RunLog) -> None:
    ids = keep(log, 3)
    is_broken = [False]

    def trouble(runs: list[LoggedRun]) -> None:
        if is_broken[0]:
            raise Rejected("quota exceeded")

    consumer = Consumer(log, target := Kept(trouble))
    consumer.forward()
    is_broken[0] = True
    more = keep(log, 5)
    for _ in range(5):
        with pytest.raises(Unavailable, match="quota"):
            consumer.forward()
    is_broken[0] = False
    consumer.forward()
    assert (set(target.runs), refused_by(consumer)) == ({*ids, *more}, [])


def test_a_run_that_was_refused_is_tried_by_the_next_process(log: RunLog) -> None:
    ids = keep(log, 3)
    forwarded(log, Kept(rejecting(ids[0])))
    assert set(forwarded(log).runs) == {ids[0]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, "{torn"),
        ("segments", {"SEGMENT": ["1", "2"]}),
        ("segments", {"SEGMENT": [None, 1]}),
        ("segments", {"SEGMENT": "12"}),
        ("segments", [1, 2]),
        ("again", {"r": "1"}),
        ("again", {"r": None}),
        ("waiting", {"s-1": "soon"}),
        ("waiting", 7),
    ],
)
def test_a_position_that_makes_no_sense_means_all_again(log: RunLog, key: str | None, value: Any) -> None:
    ids = keep(log, 3)
    consumer = Consumer(log, Kept())
    consumer.forward()
    path = consumer.file.path
    (segment,) = consumer.state.marks
    values = json.dumps(json.loads(path.read_text()) | {key or "": value})
    path.write_text(value if key is None else values.replace("SEGMENT", segment))
    assert set(forwarded(log).runs) == set(ids)


def test_a_position_that_may_not_be_read_is_said(log: RunLog) -> None:
    keep(log, 1)
    (log.folder / "consumers" / "kept.json").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"kept\.json, which says how far forwarding is, cannot be read"):
        Consumer(log, Kept())


def test_where_no_position_can_be_kept_nothing_is_sent() -> None:
    with open_to_all() as place:
        (place / "consumers").mkdir()
        (place / "consumers").chmod(0o555)
        with (
            unprivileged(),
            pytest.raises(UsageError, match="consumers, where it is kept how far forwarding is, cannot be written"),
        ):
            Consumer(RunLog(place), Kept())


def test_what_is_in_the_folders_place_is_said(log: RunLog) -> None:
    keep(log, 1)
    (log.folder / "consumers").write_text("no folder")
    with pytest.raises(UsageError, match="consumers cannot be made as a folder"), lease(log.folder / "consumers"):
        pass


def test_another_consumer_moved_the_position(log: RunLog) -> None:
    keep(log, 3)
    first = Consumer(log, a := Kept())
    second = Consumer(log, b := Kept())
    first.forward()
    second.resume()
    second.forward()
    (third,) = keep(log, 1)
    second.resume()
    second.forward()
    first.resume()
    first.forward()
    assert (len(a.runs), list(b.runs)) == (3, [third])


def test_has_news_is_told_without_reading(log: RunLog) -> None:
    keep(log, 2)
    consumer = Consumer(log, Kept())
    assert consumer.has_news()
    consumer.forward()
    assert not consumer.has_news()
    keep(log, 1)
    assert consumer.has_news()


def test_the_damage_of_one_line_costs_that_line(log: RunLog) -> None:
    ids = keep(log, 3)
    log.close()
    (path,) = log.segments.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"PLANNING", b"PLANKING")
    path.write_bytes(b"".join(lines))
    target = forwarded(log)
    assert set(target.runs) == set(ids)
    assert [len(run.steps) for run in target.runs.values()] == [SPANS - 1, SPANS, SPANS]


def test_runs_that_never_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentkit_tracking.forwarding import assembly

    monkeypatch.setattr(assembly, "_BUFFER", 100_000)
    assembler = Assembler()
    for n in range(500):
        assembler.add("s", 2 * n, json.dumps({"type": "run", "run_id": str(n), "kind": "run"}), None)
        step = {"type": "tool", "run_id": str(n), "kind": "run", "step": 1, "name": "t"}
        assembler.add("s", 2 * n + 1, json.dumps(step), json.dumps({"inputs": "x" * 1000}))
    assert assembler._size <= 100_000
    assert len(assembler._drafts) < 200


# --- feedback ---------------------------------------------------------------------------------------------------------


def test_feedback_finds_its_run_whenever_it_was_given(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    record = made()
    log.progress(record_like(record), list(enumerate(record.steps[:2])))
    other = RunLog(log.folder)
    feedback.give(other, record.run_id, "rejected", comment="too slow", by="bob")
    other.close()
    consumer = Consumer(log, target := Kept())
    consumer.forward()
    assert target.feedback == {}, "the run has not ended"
    log.append(record)
    consumer._looked = 0.0
    consumer.forward()
    [(said, place)] = target.feedback.values()
    assert (said.label, said.comment, said.by) == ("rejected", "too slow", "bob")
    assert place == (record.run_id, record.run_id)
    assert consumer.state.waiting == {}


def test_flush_takes_along_feedback_that_came_before_the_end_of_its_run(
    log: RunLog, behind: Callable[[Kept], None]
) -> None:
    from agentkit_tracking.forwarding import background

    behind(target := Kept())
    record = made()
    log.progress(record_like(record), list(enumerate(record.steps[:2])))
    feedback.give(log, record.run_id, "rejected", by="bob")
    assert background.flush(log, 30)
    assert target.feedback == {}, "the run has not ended"
    log.append(record)
    assert background.flush(log, 30)
    assert [said.label for said, _ in target.feedback.values()] == ["rejected"]


def test_feedback_on_a_part_is_shown_in_the_trace_of_the_whole(log: RunLog) -> None:
    record = crew(node("payer", lambda run: run.call(refund, order_id="A", usd=1), refund)).run(text="x")
    (part,) = [step.outputs for step in record.steps if step.kind == "handoff"]
    forwarded(log)
    feedback.give(log, part, "accepted", by="bob")
    [(_, place)] = forwarded(log).feedback.values()
    assert place == (record.run_id, part)


def test_feedback_on_a_rehearsal_goes_nowhere(log: RunLog) -> None:
    (run_id,) = keep(log, 1, kind="evaluation")
    feedback.give(log, run_id, "accepted", by="bob")
    consumer = Consumer(log, target := Kept())
    consumer.forward()
    assert (target.feedback, consumer.state.waiting) == ({}, {})


# --- in the background ------------------------------------------------------------------------------------------------


@pytest.fixture
def behind(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> Callable[[Kept], None]:
    """Has the background forward to this target."""
    from agentkit_tracking.forwarding import background

    def use(target: Kept) -> None:
        monkeypatch.setenv("AGENTKIT_TRACES", "on")
        monkeypatch.setattr(background, "target_class", lambda name: lambda: target)

    return use


def test_the_first_finished_run_starts_it(log: RunLog, behind: Callable[[Kept], None]) -> None:
    from agentkit_tracking import traces

    behind(target := Kept())
    shop = ak.System("shop", [node("clerk")])
    records = [shop.run(text="x") for _ in range(3)]
    assert traces.flush(30)
    assert target.times == {record.run_id: 1 for record in records}


def test_off_is_off(log: RunLog, behind: Callable[[Kept], None], monkeypatch: pytest.MonkeyPatch) -> None:
    from agentkit_tracking.forwarding import background

    behind(Kept())
    monkeypatch.setenv("AGENTKIT_TRACES", "off")
    ak.System("shop", [node("clerk")]).run(text="x")
    assert background._running == {}


def test_an_outage_is_said_once_and_never_to_the_agent(
    log: RunLog, behind: Callable[[Kept], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentkit_tracking import traces
    from agentkit_tracking.forwarding import background

    monkeypatch.setattr(background, "_BACKOFF_S", (0.05, 0.1))
    down = [True]

    def trouble(runs: list[LoggedRun]) -> None:
        if down[0]:
            raise RuntimeError("no such thing")  # of any kind

    behind(target := Kept(trouble))
    shop = ak.System("shop", [node("clerk")])
    with caplog.at_level(logging.INFO, "agentkit.forwarding"):
        states = []
        for _ in range(4):
            states.append(shop.run(text="x").state)
            assert not traces.flush(5)
        down[0] = False
        assert wait_for(lambda: len(target.runs) == 4)
        assert traces.flush(10)
    assert states == ["DONE"] * 4
    said = [r.message for r in caplog.records if r.name == "agentkit.forwarding"]
    assert len(said) == 2, said
    assert "runs do not reach memory now" in said[0]
    assert "again" in said[1]


def test_a_run_that_is_never_taken_does_not_keep_flush_from_the_end(
    log: RunLog, behind: Callable[[Kept], None]
) -> None:
    from agentkit_tracking.forwarding import background

    ids = keep(log, 3)
    behind(target := Kept(rejecting(ids[1])))
    assert not background.flush(log, 30)
    assert wait_for(lambda: background.flush(log, 30), 60)
    assert set(target.runs) == {ids[0], ids[2]}


@pytest.mark.parametrize("asked", [1e10, math.inf, math.nan, -1.0])
def test_no_pause_that_is_asked_for_ends_the_forwarding(
    log: RunLog, behind: Callable[[Kept], None], monkeypatch: pytest.MonkeyPatch, asked: float
) -> None:
    from agentkit_tracking.forwarding import background

    monkeypatch.setattr(background, "_BACKOFF_S", (0.05, 0.1))
    busy = iter([True])

    def trouble(runs: list[LoggedRun]) -> None:
        if next(busy, False):
            raise Unavailable("busy", asked)

    behind(target := Kept(trouble))
    (run_id,) = keep(log, 1)
    assert not background.flush(log, 30)
    assert background.flush(log, 30), "whoever waits is not held up by it"
    assert list(target.runs) == [run_id]


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, None), (7.0, 7.0), (0.0, 0.0), (1e10, 3600.0), (math.inf, None), (math.nan, None), (-1.0, None)],
)
def test_a_pause_is_an_hour_at_most(asked: float | None, given: float | None) -> None:
    assert Unavailable("busy", asked).retry_after == given


def test_a_wrong_setting_is_a_warning_not_an_end(
    log: RunLog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTKIT_TRACES", "mlflow,jaeger")
    shop = ak.System("shop", [node("clerk")])
    assert {shop.run(text="x").state for _ in range(2)} == {"DONE"}
    [said] = [r.message for r in caplog.records if r.name == "agentkit.forwarding"]
    assert "no target 'jaeger'" in said


def test_runs_of_other_processes_are_taken_along(log: RunLog, behind: Callable[[Kept], None]) -> None:
    from agentkit_tracking.forwarding import background

    behind(target := Kept())
    background.start(log)
    other = RunLog(log.folder)
    (run_id,) = keep(other, 1)
    assert wait_for(lambda: run_id in target.runs)
    other.close()


def test_one_forwards_at_a_time(log: RunLog, behind: Callable[[Kept], None]) -> None:
    from agentkit_tracking.forwarding import background
    from agentkit_tracking.runlog.database import lease

    behind(target := Kept())
    keep(log, 2)
    with lease(log.folder / "consumers", target.name) as mine:
        assert mine
        assert not background.flush(log, 1.0)
        assert target.runs == {}
    assert background.flush(log, 20)
    assert len(target.runs) == 2


def wait_for(check: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False


def test_the_position_is_a_small_file_beside_the_log(log: RunLog) -> None:
    keep(log, 3)
    Consumer(log, Kept()).forward()
    path: Path = log.folder / "consumers" / "kept.json"
    values = json.loads(path.read_text())
    assert values["target"] == "memory"
    assert [n > 0 for n, _ in values["segments"].values()] == [True]
