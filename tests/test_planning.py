"""Plans chosen by a model: what it may choose, what it is told, what ends the run, and that the record tells it all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import dspy
import pytest
from hedgehogs import Found, Hedgehog
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from test_states import ALLOWED

import agentkit as ak
from agentkit import ApprovalRequest, Budget, Decision, Run, RunRecord
from agentkit.errors import SourceError
from agentkit.flows import sequence
from agentkit.orchestration import Orchestrator
from agentkit.planning import Planner, clipped
from agentkit.testing import FakeClock, Scripted, scripted

PAID: list[tuple[str, float]] = []


@ak.tool
def look_up(order_id: str) -> dict[str, Any]:
    """Look up an order."""
    return {"order_id": order_id, "refundable_usd": 80.0}


@ak.tool(permission="write", human_at={"usd": 50})
def refund(order_id: str, usd: float) -> str:
    """Pay money back."""
    PAID.append((order_id, usd))
    return f"RF-{order_id}"


@ak.tool
def broken(order_id: str) -> str:
    """Look into the archive."""
    raise ValueError("the archive is on fire")


@ak.tool(permission="write")
def lost(order_id: str) -> str:
    """Send a letter."""
    raise ConnectionError("no answer")


class Answer(BaseModel):
    text: str = Field(description="what to tell the customer")
    rejected: list[str] = []


class Desk(Planner):
    """Helps with orders."""

    name: ClassVar[str] = "desk"
    goal: ClassVar[str] = "Help the customer with an order."
    result: ClassVar[type[BaseModel]] = Answer
    tools: ClassVar[tuple[ak.Tool[..., Any], ...]] = (look_up, refund, broken, lost)


@pytest.fixture(autouse=True)
def nothing_paid_yet() -> None:
    PAID.clear()


def choose(step: str, confidence: Any = 0.9, **arguments: Any) -> dict[str, Any]:
    return {"why": f"{step} is next", "step": step, "arguments": arguments, "confidence": confidence}


LOOK = choose("look_up", order_id="A")
PAY = choose("refund", order_id="A", usd=80)
END, SAID = choose("finish"), {"text": "Done."}


def play(*answers: Any, agent: Planner | None = None, **options: Any) -> tuple[RunRecord, list[str]]:
    """The record of a run whose model answers so, and the prompts it read."""
    agent = agent or Desk()
    lm = scripted(*answers)
    agent.set_lm(lm)
    script: Scripted = lm.engine
    with FakeClock():
        record = ak.System("desk", [agent], **options).run(request="My lamp is broken")
    return record, script.prompts


def facts(record: RunRecord) -> list[dict[str, Any]]:
    """What a failed run had found."""
    return list((record.partial or {})["so_far"])


# --- the loop ------------------------------------------------------------------------------------------------------


def test_the_model_chooses_steps_until_it_finishes() -> None:
    record, prompts = play(LOOK, choose("refund", order_id="A", usd=20), END, SAID)
    assert (record.state, record.output, PAID) == ("DONE", {"text": "Done.", "rejected": []}, [("A", 20.0)])
    assert (record.model_calls, record.tool_calls) == (4, 2)
    path = [s.name for s in record.steps if s.kind == "transition"]
    assert path == ["PLANNING", *["EXECUTING", "REFLECTING", "PLANNING"] * 2, "EXECUTING", "REFLECTING", "DONE"]
    decided = [(s.outputs["step"], s.inputs) for s in record.steps if s.kind == "decision" and s.name == "step"]
    assert decided == [(n, f"{n} is next") for n in ("look_up", "refund", "finish")]
    assert "Help the customer with an order." in prompts[0]
    assert "nothing yet" in prompts[0]
    assert '"result": {"order_id": "A", "refundable_usd": 80.0}' in prompts[1]
    assert "RF-A" in prompts[3]


def test_the_model_is_shown_the_tools_and_the_allowed_steps() -> None:
    _, prompts = play(END, SAID)
    assert "- look_up: Look up an order." in prompts[0]
    assert '"permission": "write"' in prompts[0]
    assert '"order_id"' in prompts[0]
    assert '["look_up", "refund", "broken", "lost", "finish"]' in prompts[0]
    assert "Help the customer with an order." in prompts[1]


def test_rounds_are_bounded_and_the_model_is_told_how_many_are_left() -> None:
    record, prompts = play(*[LOOK] * 11)
    assert record.error == (
        "BudgetExceeded: budget of 10 plan steps would be exceeded: 10 used, 1 more asked for; "
        "raise the limit in the system's Budget or make the task smaller"
    )
    assert (record.tool_calls, len(facts(record))) == (10, 10)
    assert [f"[[ ## rounds_left ## ]]\n{left}" in p for p, left in zip(prompts, range(10, -1, -1), strict=True)] == (
        [True] * 11
    )

    class Short(Desk):
        max_steps = 2

    assert play(LOOK, END, SAID, agent=Short())[0].state == "DONE"
    assert play(LOOK, LOOK, END, agent=Short())[0].state == "FAILED"


# --- errors are data -----------------------------------------------------------------------------------------------


def test_a_tool_that_fails_is_told_to_the_model() -> None:
    record, prompts = play(choose("broken", order_id="A"), END, SAID)
    assert record.state == "DONE"
    assert "ValueError: the archive is on fire" in prompts[1]
    assert "the archive is on fire" in prompts[2]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, "order_id: Field required"),
    "unknown": ({"order_id": "A", "to": "Ann"}, "to: Extra inputs are not permitted"),
    "of another type": ({"order_id": [1]}, "order_id: Input should be a valid string"),
    "not finite": ({"order_id": "A", "usd": "nan"}, "usd: Input should be a finite number"),
    "names of the run's own": ({"self": 1, "tool": 2}, "Field required"),
}


@pytest.mark.parametrize(("arguments", "told"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_do_not_fit_are_told_to_the_model(arguments: dict[str, Any], told: str) -> None:
    wrong = {"why": "?", "step": "refund", "arguments": {"usd": 1, **arguments}, "confidence": 1}
    record, prompts = play(wrong, END, SAID)
    assert (record.state, record.tool_calls, PAID) == ("DONE", 0, [])
    assert told in prompts[1]


def test_an_effect_in_doubt_is_not_tried_again() -> None:
    record, prompts = play(choose("lost", order_id="A"), choose("lost", order_id="B"), END, SAID)
    assert (record.state, record.tool_calls) == ("DONE", 1)
    assert "whether it took effect is unknown" in prompts[1]
    assert '["look_up", "refund", "broken", "finish"]' in prompts[1]
    assert record.effects == [{"tool": "lost", "arguments": {"order_id": "A"}, "outcome": "unknown"}]


# --- what is allowed -----------------------------------------------------------------------------------------------


class Careful(Desk):
    """Looks before it pays, and does nothing after."""

    allowed: ClassVar[Mapping[str, Any]] = {
        "start": {"look_up", "broken"},
        "look_up": {"refund", "finish"},
        "refund": {"finish"},
    }


def test_a_step_that_is_not_allowed_is_told_once() -> None:
    record, prompts = play(PAY, LOOK, END, SAID, agent=Careful())
    assert (record.state, PAID) == ("DONE", [])
    assert "not allowed here; allowed: look_up, broken" in prompts[1]
    assert [s.outputs for s in record.steps if s.name == "not allowed"] == ["refund"]


def test_a_second_one_ends_the_run() -> None:
    record, prompts = play(PAY, LOOK, choose("look_up", order_id="B"), agent=Careful())
    assert (record.state, record.tool_calls, len(prompts)) == ("FAILED", 1, 3)
    assert record.error == "PolicyRefused: tool 'look_up' was not called: not allowed here; allowed: refund, finish"
    assert [fact["step"] for fact in facts(record)] == ["refund", "look_up"]


def test_a_failed_step_opens_nothing() -> None:
    record, _ = play(choose("broken", order_id="A"), PAY, PAY, agent=Careful())
    assert "not allowed here; allowed: look_up, broken" in (record.error or "")


def test_where_only_the_end_is_allowed_no_model_is_asked() -> None:
    record, prompts = play(LOOK, choose("refund", order_id="A", usd=1), SAID, agent=Careful())
    assert (record.state, len(prompts), PAID) == ("DONE", 3, [("A", 1.0)])


def test_a_step_that_is_none_fails_the_run() -> None:
    answer = choose("delete_everything")
    record, _ = play(*[answer] * 3)
    assert (record.state, record.tool_calls) == ("FAILED", 0)


# --- people --------------------------------------------------------------------------------------------------------


def test_a_rejection_is_told_to_the_model_and_the_result_says_so() -> None:
    def no(request: ApprovalRequest) -> Decision:
        return Decision("reject", by="ann", reason="not this month")

    with ak.approve_with(no):
        record, prompts = play(LOOK, PAY, END, {"text": "I paid you back."})
    assert (record.state, PAID, record.effects) == ("DONE", [], [])
    assert '"rejected": "not this month"' in prompts[2]
    assert '["look_up", "broken", "lost", "finish"]' in prompts[2]
    assert "[[ ## not_done ## ]]\n" in prompts[3]
    assert prompts[3].count('"rejected": "not this month"') == 2  # in the facts, and by itself
    assert (record.output or {})["rejected"] == ["refund"]


def test_after_a_rejection_a_smaller_amount_is_no_way_round() -> None:
    record, _ = play(LOOK, PAY, choose("refund", order_id="A", usd=49), END, SAID)
    assert (record.state, PAID) == ("DONE", [])
    record, _ = play(LOOK, PAY, *[choose("refund", order_id="A", usd=49)] * 2)
    assert (record.state, PAID) == ("FAILED", [])


def test_the_model_is_told_what_a_person_changed() -> None:
    def less(request: ApprovalRequest) -> Decision:
        return Decision("modify", by="ann", arguments={**request.arguments, "usd": 10})

    with ak.approve_with(less):
        record, prompts = play(PAY, END, SAID)
    assert (record.state, PAID) == ("DONE", [("A", 10.0)])
    assert '"usd": 10' in prompts[1]
    assert "a person changed the arguments" in prompts[1]


def test_an_unsure_model_does_not_pay_alone() -> None:
    for confidence in (0.5, 95, -1, "nan"):
        record, _ = play(choose("refund", confidence, order_id="A", usd=1), END, SAID)
        assert [s.name for s in record.steps if s.kind == "approval"] == ["refund"], confidence
    assert PAID == []


# --- refusals end the run ------------------------------------------------------------------------------------------


def test_a_refusal_is_never_told_to_the_model() -> None:
    def not_for_them(arguments: Any, user: str | None) -> str | None:
        return "this order is somebody else's"

    @ak.tool(check=not_for_them)
    def open_letter(order_id: str) -> str:
        """Read a letter."""
        return "secret"

    class Curious(Desk):
        tools = (open_letter,)

    record, prompts = play(choose("open_letter", order_id="A"), END, SAID, agent=Curious())
    assert record.error == "PolicyRefused: tool 'open_letter' was not called: this order is somebody else's"
    assert len(prompts) == 1


def test_a_spent_budget_ends_the_run() -> None:
    record, _ = play(LOOK, LOOK, END, SAID, budget=Budget(tool_calls=1))
    assert (record.error or "").startswith("BudgetExceeded: budget of 1 tool_calls")


# --- code in place of the model ------------------------------------------------------------------------------------


@ak.tool
def find_order(about: str) -> str:
    """Order and delivery: where is my parcel, tracking, shipped, delivered, late, order status."""
    return "it was shipped on Monday"


@ak.tool
def find_invoice(about: str) -> str:
    """Invoice and payment: receipt, tax, charged, card, bill, refund of money."""
    return "USD 20 on Tuesday"


@ak.tool
def search_help(about: str) -> str:
    """Help articles: wifi, app, device, offline, camera, firmware, pairing, password, set up."""
    return "hold the button for ten seconds"


class Filled(Desk):
    """The model chooses, code does the rest."""

    tools = (find_order, find_invoice, search_help)
    allowed: ClassVar[Mapping[str, Any]] = {
        "start": {"find_order", "find_invoice", "search_help"},
        **{name: {"finish"} for name in ("find_order", "find_invoice", "search_help")},
    }

    def fill(self, run: Run, step: str, **inputs: Any) -> dict[str, Any]:
        return {"about": inputs["request"]}

    def reflect(self, run: Run, plan: Any, facts: list[dict[str, Any]], **inputs: Any) -> Any:
        return Answer(text=facts[-1]["result"])


def test_code_may_fill_in_arguments_and_make_the_result() -> None:
    record, prompts = play({"why": "?", "step": "find_order", "confidence": 1}, agent=Filled())
    assert record.output == {"text": "it was shipped on Monday", "rejected": []}
    assert next(s for s in record.steps if s.kind == "tool").inputs == {"about": "My lamp is broken"}
    assert (len(prompts), "arguments" in prompts[0], "[[ ## tools ## ]]" in prompts[0]) == (1, False, False)
    assert [name for name, _ in Filled().named_predictors()] == ["choose"]


REQUESTS = {
    "find_order": ["Where is my parcel, it is late", "tracking says delivered but nothing came", "order status?"],
    "find_invoice": ["I need an invoice with tax", "my card was charged twice", "send me the receipt please"],
    "search_help": ["the camera is offline", "wifi pairing fails", "how do I set up the app"],
}


def test_the_embedded_model_chooses_among_described_steps() -> None:
    """It goes by words and not by what happened: `allowed` has to leave it one way once something is done."""
    system = ak.System("desk", [Filled()])
    for tool, requests in REQUESTS.items():
        for request in requests:
            record = system.run(request=request)
            assert (record.state, [s.name for s in record.steps if s.kind == "tool"]) == ("DONE", [tool]), request


# --- what the model is shown ---------------------------------------------------------------------------------------


def test_what_happened_is_clipped_but_never_a_no() -> None:
    no = {"step": "refund", "rejected": "never", "closed": "a person said no"}
    long = [{"step": "look_up", "result": "x" * 1_000_000}, no, *[{"step": "look_up", "result": "y" * 1000}] * 20]
    text = clipped(long, 8_000)
    assert len(text) < 9_000
    assert json.dumps(no) in text
    assert "older steps are left out" in text.splitlines()[0]
    assert text.splitlines()[-1] == json.dumps(long[-1])
    assert clipped(long[:1], 8_000).endswith('xx … (cut)"}')
    assert clipped([], 8_000) == "nothing yet"


@given(st.lists(st.dictionaries(st.sampled_from(["step", "result", "error"]), st.text(max_size=300), max_size=3)))
@settings(max_examples=50)
def test_the_newest_of_what_happened_is_always_shown(happened: list[dict[str, Any]]) -> None:
    text = clipped(happened, 1_000)
    assert len(text) <= 1_100
    if happened:
        assert "left out" not in text.splitlines()[-1]


# --- incomplete classes --------------------------------------------------------------------------------------------


@ak.tool
def finish() -> None:
    """Stop."""


class EndsTwice(Desk):
    tools = (finish,)


class GoesNowhere(Desk):
    allowed: ClassVar[Mapping[str, Any]] = {"start": {"fly"}}


class Clashes(Desk):
    inputs = ("text",)


UNFIT: dict[str, tuple[type[Planner], str]] = {
    "a tool called finish": (EndsTwice, "rename the tool 'finish'"),
    "an unknown step": (GoesNowhere, "`allowed` names 'fly'"),
    "an input called like a field of the result": (Clashes, "rename 'text'"),
}


@pytest.mark.parametrize(("agent", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_planner_that_cannot_work_is_refused(agent: type[Planner], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        ak.System("desk", [agent()])


def test_its_prompts_are_part_of_the_system() -> None:
    system = ak.System("desk", [Desk()])
    assert list(system.prompts()) == ["desk.choose", "desk.conclude"]
    again = ak.System("desk", [Desk()])
    again.load_state(json.loads(json.dumps(system.dump_state())))
    assert again.prompts() == system.prompts()
    assert isinstance(system.deepcopy().agents["desk"].choose, dspy.Predict)


def test_in_a_flow_it_takes_what_earlier_agents_found() -> None:
    class Finder(Hedgehog):
        name = "finder"

        def execute(self, run: Run, plan: Any, text: str = "") -> Any:
            return f"order of {text}"

    class After(Desk):
        inputs = ("finder",)

    class Both(BaseModel):
        finder: Found
        desk: Answer

    lm = scripted(END, SAID)
    agent = After()
    agent.set_lm(lm)
    system = Orchestrator("crew", [Finder(), agent], flow=sequence("finder", "desk"), result=Both)
    record = system.run(text="Ann")
    assert record.output == {"finder": {"value": "order of Ann"}, "desk": {"text": "Done.", "rejected": []}}, (
        record.error
    )
    assert '[[ ## finder ## ]]\n{"value": "order of Ann"}' in lm.engine.prompts[0]
    assert [s.agent for s in record.steps if s.name == "step"] == ["desk"]


# --- any sequence of answers ---------------------------------------------------------------------------------------

ARGUMENTS = st.fixed_dictionaries(
    {}, optional={"order_id": st.sampled_from(["A", "B"]), "usd": st.sampled_from([1, 49.99, 50, 80, "nan", None])}
)
ANSWERS = st.builds(
    lambda step, arguments, confidence: {"why": "?", "step": step, "arguments": arguments, "confidence": confidence},
    st.sampled_from([*Desk.steps(), "delete_everything"]),
    ARGUMENTS | ARGUMENTS.map(lambda a: {"order_id": "A", "usd": 20} | a),
    st.sampled_from([0, 0.5, 0.9, 1, 7, "nan"]),
)


@given(st.lists(ANSWERS, max_size=14), st.sampled_from([Desk, Careful]), st.booleans(), st.integers(1, 10))
@settings(max_examples=150)
def test_whatever_the_model_answers_the_run_keeps_to_its_rules(
    answers: list[dict[str, Any]], kind: type[Planner], person: bool, most: int
) -> None:
    PAID.clear()
    asked: list[ApprovalRequest] = []

    def approver(request: ApprovalRequest) -> bool:
        asked.append(request)
        return person

    agent = kind()
    agent.max_steps = most  # type: ignore[misc]
    with ak.approve_with(approver):
        record, _ = play(*answers, *[END, SAID], agent=agent)
    moves = [(s.inputs, s.name) for s in record.steps if s.kind == "transition"]
    assert {*moves} <= ALLOWED
    assert [source for source, _ in moves] == ["IDLE", *(target for _, target in moves[:-1])]  # none unrecorded
    assert moves[-1][1] == record.state in ("DONE", "FAILED")
    assert moves.count(("PLANNING", "EXECUTING")) <= most
    allowed_alone = [usd for _, usd in PAID if not usd < 50]
    assert not allowed_alone or (person and len(allowed_alone) <= len(asked))
    done = [e for e in record.effects if e["tool"] == "refund" and e["outcome"] == "done"]
    assert [(e["arguments"]["order_id"], e["arguments"]["usd"]) for e in done] == PAID
    called = [s.name for s in record.steps if s.kind == "tool" and s.error is None]
    if kind is Careful and "refund" in called:
        assert "look_up" in called[: called.index("refund")]
    if asked and not person:
        first = next(i for i, s in enumerate(record.steps) if s.kind == "approval")
        closed = record.steps[first].name
        assert closed not in [s.name for s in record.steps[first + 1 :] if s.kind == "tool"]
        if record.state == "DONE":
            assert closed in (record.output or {})["rejected"]
