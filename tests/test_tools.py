"""Tools: what they accept, who may call them, when a person is asked, and that a refusal is the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal

import dspy
import pytest
from hedgehogs import Hedgehog, Script, doing, speaking
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import agentkit as ak
from agentkit import ApprovalRequest, Budget, Run, RunRecord
from agentkit.errors import UsageError

PAID: list[tuple[str, float]] = []


@ak.tool(permission="write", human_at={"amount_usd": 50.00})
def refund(order_id: str, amount_usd: float) -> str:
    """Pay money back."""
    PAID.append((order_id, amount_usd))
    return f"RF-{order_id}"


@ak.tool
def look_up(order_id: str, limit: Annotated[int, Field(ge=1)] = 3, state: Literal["open", "any"] = "any") -> str:
    """Look up an order."""
    return f"{order_id}/{limit}/{state}"


@pytest.fixture(autouse=True)
def nothing_paid_yet() -> None:
    PAID.clear()


def steps(record: RunRecord, kind: str) -> list[Any]:
    return [s for s in record.steps if s.kind == kind]


# --- what a tool is ------------------------------------------------------------------------------------------------


def test_a_tool_describes_itself_for_the_release() -> None:
    assert refund.spec() == {
        "name": "refund",
        "description": "Pay money back.",
        "permission": "write",
        "criticality": "medium",
        "human_at": {"amount_usd": 50.0},
        "cost_usd": 0.0,
        "idempotent": False,
        "timeout_s": 30.0,
        "tries": 3,
        "fallback": None,
        "per_second": None,
        "cache_s": None,
        "check": None,
        "writes_to": None,
        "arguments": {
            "title": "refund",
            "type": "object",
            "properties": {
                "order_id": {"title": "Order Id", "type": "string"},
                "amount_usd": {"title": "Amount Usd", "type": "number"},
            },
            "required": ["order_id", "amount_usd"],
            "additionalProperties": False,
        },
    }
    assert look_up.spec()["permission"] == "read"
    assert look_up.spec()["arguments"]["properties"]["limit"] == {
        "title": "Limit",
        "type": "integer",
        "default": 3,
        "minimum": 1,
    }


def no_docstring(a: int) -> int:
    return a


def untyped(a) -> int:  # type: ignore[no-untyped-def]
    """Add."""
    return int(a)


def anything(**options: int) -> int:
    """Add."""
    return len(options)


def by_place(a: int, /) -> int:
    """Add."""
    return a


def hidden(_a: int) -> int:
    """Add."""
    return _a


def of_pydantic(model_config: str) -> str:
    """Add."""
    return model_config


async def later(a: int) -> int:
    """Add."""
    return a


MISMADE: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "no docstring": (no_docstring, {}, "has no docstring"),
    "a parameter without a type": (untyped, {}, "parameter 'a' has no type"),
    "any keyword": (anything, {}, "name its parameters"),
    "a parameter by place only": (by_place, {}, "name its parameters"),
    "a name pydantic hides": (hidden, {}, "rename the parameter '_a'"),
    "a name pydantic needs": (of_pydantic, {}, "rename the parameter 'model_config'"),
    "asynchronous": (later, {}, "asynchronous"),
    "a misspelt permission": (look_up.function, {"permission": "raed"}, "permission 'raed'"),
    "a limit on nothing": (look_up.function, {"human_at": {"amount": 1}}, r"human_at names \['amount'\]"),
}


@pytest.mark.parametrize(("function", "options", "message"), MISMADE.values(), ids=MISMADE.keys())
def test_a_tool_that_could_not_be_guarded_is_refused_when_it_is_made(
    function: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ak.tool(**options)(function)


# --- arguments -----------------------------------------------------------------------------------------------------

MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"order_id": "A"}, "amount_usd: Field required"),
    "extra": ({"order_id": "A", "amount_usd": 1, "to": "me"}, "to: Extra inputs are not permitted"),
    "another type": ({"order_id": "A", "amount_usd": "a lot"}, "amount_usd: Input should be a valid number"),
    "a number for a text": ({"order_id": 7, "amount_usd": 1}, "order_id: Input should be a valid string"),
    "null": ({"order_id": "A", "amount_usd": None}, "amount_usd: Input should be a valid number"),
    "NaN": ({"order_id": "A", "amount_usd": math.nan}, "amount_usd: Input should be a finite number"),
    "NaN in words": ({"order_id": "A", "amount_usd": "nan"}, "amount_usd: Input should be a finite number"),
    "infinite": ({"order_id": "A", "amount_usd": -math.inf}, "amount_usd: Input should be a finite number"),
}


@pytest.mark.parametrize(("arguments", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_arguments_that_do_not_fit_end_the_run_before_the_tool_does_anything(
    arguments: dict[str, Any], message: str
) -> None:
    record = doing(lambda run: run.call(refund, **arguments), refund).run()
    assert record.state == "FAILED"
    assert "tool 'refund' was called with arguments that do not fit" in (record.error or "")
    assert message in (record.error or "")
    assert (record.effects, record.tool_calls, PAID) == ([], 0, [])
    assert [s.error for s in steps(record, "tool")] == [(record.error or "").removeprefix("UsageError: ")]


class Line(BaseModel):
    sku: str
    count: int


def test_every_misfit_is_named() -> None:
    with pytest.raises(UsageError, match=r"limit: .*greater than or equal to 1; state: .*'open' or 'any'"):
        look_up("A", limit=0, state="closed")  # type: ignore[arg-type]


def test_arguments_arrive_in_their_declared_types() -> None:
    @ak.tool
    def kinds(line: Line, price: Decimal, note: str | None = None) -> str:
        """Tell the types."""
        return f"{type(line).__name__} {type(price).__name__} {note}"

    assert kinds({"sku": "a", "count": "2"}, "1.5") == "Line Decimal None"  # type: ignore[arg-type]
    record = doing(lambda run: run.call(kinds, line=Line(sku="a", count=2), price=1.5), kinds).run()
    assert record.output == {"value": "Line Decimal None"}
    assert steps(record, "tool")[0].inputs == {"line": {"sku": "a", "count": 2}, "price": "1.5", "note": None}


def test_defaults_are_filled_in_and_recorded() -> None:
    record = doing(lambda run: run.call(look_up, order_id="A"), look_up).run()
    assert record.output == {"value": "A/3/any"}
    assert steps(record, "tool")[0].inputs == {"order_id": "A", "limit": 3, "state": "any"}


# --- the inventory -------------------------------------------------------------------------------------------------


def test_a_tool_outside_the_inventory_is_denied_and_the_refusal_is_recorded() -> None:
    record = doing(lambda run: run.call(refund, order_id="A", amount_usd=1), look_up).run()
    denied = "agent 'hedgehog' may not use tool 'refund'; its inventory is ['look_up']"
    assert (record.state, record.error) == ("FAILED", f"PermissionDenied: {denied}")
    assert [(s.name, s.error) for s in steps(record, "tool")] == [("refund", denied)]
    assert (record.effects, PAID) == ([], [])


def test_a_namesake_of_a_permitted_tool_is_denied() -> None:
    namesake = ak.tool(permission="write")(refund.function)
    assert namesake.name == refund.name
    record = doing(lambda run: run.call(namesake, order_id="A", amount_usd=1), refund).run()
    assert (record.error or "").startswith("PermissionDenied: agent 'hedgehog' may not use tool 'refund'")
    assert PAID == []


def test_an_agent_copied_by_an_optimiser_keeps_its_inventory() -> None:
    class Own(Hedgehog):
        def __init__(self) -> None:
            super().__init__()
            self.tools = (look_up,)

        def execute(self, run: Run, plan: Any, text: str = "") -> Any:
            return run.call(look_up, order_id="A")

    record = ak.adopt(Own()).deepcopy().run(text="x")
    assert record.output == {"value": "A/3/any"}, record.error


def test_a_tool_that_calls_another_tool_needs_both_in_the_inventory() -> None:
    @ak.tool
    def generous(order_id: str) -> str:
        """Look up an order and pay it back."""
        return refund(order_id, 1.0)

    record = doing(lambda run: generous("A"), generous).run()
    assert "may not use tool 'refund'" in (record.error or "")
    assert PAID == []
    assert doing(lambda run: generous("A"), generous, refund).run().output == {"value": "RF-A"}


# --- the limit from which on a person decides ----------------------------------------------------------------------


def pay(amount: Any, approver: Callable[[ApprovalRequest], Any] | None = None) -> RunRecord:
    system = doing(lambda run: run.call(refund, order_id="A", amount_usd=amount), refund)
    if approver is None:
        return system.run()
    with ak.approve_with(approver):
        return system.run()


def test_below_the_limit_nobody_is_asked() -> None:
    def never(request: ApprovalRequest) -> bool:
        raise AssertionError("nobody needs to be asked")

    record = pay(49.99, never)
    assert record.output == {"value": "RF-A"}
    done = {"tool": "refund", "arguments": {"order_id": "A", "amount_usd": 49.99}, "outcome": "done"}
    assert record.effects == [done]
    assert PAID == [("A", 49.99)]


@pytest.mark.parametrize("amount", [50.00, 50.01, "50", 1e9])
def test_from_the_limit_on_a_person_is_asked_and_told_what_and_why(amount: Any) -> None:
    asked: list[ApprovalRequest] = []

    def yes(request: ApprovalRequest) -> bool:
        asked.append(request)
        return True

    record = pay(amount, yes)
    reason = f"amount_usd is {float(amount):.2f}, and from 50.00 on a person decides"
    arguments = {"order_id": "A", "amount_usd": float(amount)}
    (request,) = asked
    told = (request.run_id, request.agent, request.tool, request.arguments, request.reason)
    assert told == (record.run_id, "hedgehog", "refund", arguments, reason)
    assert request.system == "worker"
    assert "hedgehog is working on" in request.doing
    assert [("A", float(amount))] == PAID
    assert [(s.name, s.outputs["verdict"]) for s in steps(record, "approval")] == [("refund", "approve")]
    moves = [(s.inputs, s.name, s.outputs) for s in steps(record, "transition")]
    assert moves[2:4] == [("EXECUTING", "AWAITING_HUMAN", reason), ("AWAITING_HUMAN", "EXECUTING", "approved")]


class Truthy:
    """An answer that is not True, whatever it says."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "answer", [False, None, "no", "yes", 1, Truthy()], ids=["False", "None", "no", "yes", "1", "truthy"]
)
@pytest.mark.parametrize("amount", [50.00, 50.01])
def test_only_true_approves(answer: Any, amount: float) -> None:
    record = pay(amount, lambda request: answer)
    assert (record.state, record.output) == ("DONE", {"value": None})
    assert (record.effects, record.tool_calls, PAID) == ([], 0, [])
    assert [s.outputs["verdict"] for s in steps(record, "approval")] == ["reject"]
    assert steps(record, "transition")[3].outputs == "rejected"


def test_where_nobody_is_there_to_ask_the_answer_is_no() -> None:
    record = pay(50.00)
    assert (record.state, record.output, PAID) == ("DONE", {"value": None}, [])
    assert steps(record, "transition")[3].outputs == "rejected: nobody was there to approve"


def test_an_approver_that_fails_ends_the_run_unpaid() -> None:
    def absent(request: ApprovalRequest) -> bool:
        raise ConnectionError("the chat is down")

    record = pay(50.00, absent)
    assert (record.state, record.error, PAID) == ("FAILED", "ConnectionError: the chat is down", [])
    assert steps(record, "approval")[0].error == "ConnectionError: the chat is down"
    moves = [(s.inputs, s.name) for s in steps(record, "transition")]
    assert moves[-2:] == [("AWAITING_HUMAN", "EXECUTING"), ("EXECUTING", "FAILED")]


@given(amount=st.floats(allow_nan=False, allow_infinity=False))
def test_no_amount_from_the_limit_on_passes_without_a_person(amount: float) -> None:
    assert (refund.human_needed({"order_id": "A", "amount_usd": amount}) is None) == (abs(amount) < 50)


@pytest.mark.parametrize("amount", [math.nan, None])
def test_an_amount_that_is_none_reaches_a_person(amount: Any) -> None:
    assert "a person decides" in (refund.human_needed({"order_id": "A", "amount_usd": amount}) or "")


# --- effects -------------------------------------------------------------------------------------------------------


def test_effects_are_the_writing_tools_that_ran_in_order() -> None:
    @ak.tool(permission="execute", criticality="low")
    def restart(device: str) -> str:
        """Restart a device."""
        return f"restarted {device}"

    def work(run: Run) -> None:
        run.call(look_up, order_id="A")
        run.call(refund, order_id="A", amount_usd=1)
        run.call(refund, order_id="B", amount_usd=100)  # rejected
        run.call(restart, device="hub")

    record = doing(work, look_up, refund, restart).run()
    assert [(e["tool"], *e["arguments"].values()) for e in record.effects] == [("refund", "A", 1.0), ("restart", "hub")]
    assert (record.tool_calls, record.state) == (3, "DONE")
    assert PAID == [("A", 1.0)]


def test_a_writing_tool_that_fails_half_way_is_an_effect_all_the_same() -> None:
    @ak.tool(permission="write")
    def send(to: str) -> str:
        """Send a letter."""
        raise TimeoutError("no answer; it may have been sent")

    record = doing(lambda run: run.call(send, to="Ann"), send).run()
    doubt = "whether it took effect is unknown"
    error = f"tool 'send' failed (timeout): TimeoutError: no answer; it may have been sent; {doubt}"
    assert record.error == f"ToolFailed: {error}"
    assert record.effects == [{"tool": "send", "arguments": {"to": "Ann"}, "outcome": "unknown"}]


# --- tools as plain functions --------------------------------------------------------------------------------------


def test_outside_a_run_a_tool_is_its_function_with_checked_arguments() -> None:
    assert refund("A", amount_usd=80) == "RF-A"
    assert look_up("A", 2) == "A/2/any"
    assert (look_up.__name__, look_up.__doc__) == ("look_up", "Look up an order.")
    with pytest.raises(UsageError, match="finite"):
        refund("A", math.nan)


def test_inside_a_run_a_plain_call_is_guarded_like_any_other() -> None:
    denied = doing(lambda run: refund("A", 1.0), look_up).run()
    assert "may not use tool 'refund'" in (denied.error or "")
    rejected = doing(lambda run: refund("A", amount_usd=50.0), refund).run()
    assert rejected.output == {"value": None}
    assert PAID == []
    paid = doing(lambda run: refund("A", amount_usd=49.0), refund).run()
    assert (paid.output, paid.tool_calls) == ({"value": "RF-A"}, 1)


def test_in_threads_that_dspy_starts_a_tool_is_guarded_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    def work(run: Run) -> Any:
        return dspy.Parallel(num_threads=2, disable_progress_bar=True)(
            [(refund, {"order_id": n, "amount_usd": 1}) for n in "AB"]
        )

    record = doing(work, look_up).run()
    assert "may not use tool 'refund'" in (record.error or "")
    assert PAID == []


# --- a refusal is the end ------------------------------------------------------------------------------------------


class Stubborn(Hedgehog):
    """Catches whatever happens and asks the model about it."""

    tools = (look_up,)

    def __init__(self) -> None:
        super().__init__()
        self.decide = dspy.Predict("news -> answer")

    def execute(self, run: Run, plan: Any, text: str = "") -> Any:
        try:
            self.refused(run)
        except Exception as e:
            return self.decide(news=str(e)).answer

    def refused(self, run: Run) -> Any:
        return run.call(refund, order_id="A", amount_usd=1)


class Spendthrift(Stubborn):
    def refused(self, run: Run) -> Any:
        return [run.call(look_up, order_id="A") for _ in range(3)]


class Looping(Stubborn):
    def refused(self, run: Run) -> Any:
        return [self.decide(news="none yet") for _ in range(3)]


REFUSED: dict[str, tuple[type[Stubborn], Budget, str, int]] = {
    "a denied tool": (Stubborn, Budget(), "PermissionDenied: agent 'hedgehog' may not use tool 'refund'", 0),
    "tool calls": (Spendthrift, Budget(tool_calls=2), "BudgetExceeded: budget of 2 tool_calls", 0),
    "model calls": (Looping, Budget(model_calls=2), "BudgetExceeded: budget of 2 model_calls", 2),
}


@pytest.mark.parametrize(("agent", "budget", "error", "calls"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_ends_the_run_and_never_reaches_the_model(
    agent: type[Stubborn], budget: Budget, error: str, calls: int
) -> None:
    script = Script(*[{"answer": "approved"}] * 5)
    system = ak.System("stubborn", [speaking(agent(), script)], budget=budget)  # type: ignore[list-item]
    record = system.run(text="x")
    assert (record.state, record.output) == ("FAILED", None)
    assert (record.error or "").startswith(error)
    assert len(script.prompts) == record.model_calls == calls


def test_a_refusal_ends_a_run_that_swallows_it_without_a_word() -> None:
    def work(run: Run) -> str:
        try:
            run.call(refund, order_id="A", amount_usd=1)
        except Exception:
            return "done, paid"
        return "never"

    record = doing(work, look_up).run()
    assert (record.state, record.output) == ("FAILED", None)
    assert (record.error or "").startswith("PermissionDenied")


def test_an_adopted_dspy_react_cannot_talk_its_model_past_a_refusal() -> None:
    def pay_back(order_id: str, amount_usd: float) -> str:
        """Pay money back."""
        return refund(order_id, amount_usd)

    script = Script(
        {"next_thought": "pay", "next_tool_name": "pay_back", "next_tool_args": '{"order_id": "A", "amount_usd": 80}'},
        {"next_thought": "well", "next_tool_name": "finish", "next_tool_args": "{}"},
        {"reasoning": "paid", "answer": "approved"},
    )
    react = speaking(dspy.ReAct("request -> answer", tools=[pay_back]), script)
    record = ak.adopt(react).run(request="pay me")
    assert (record.state, record.output, PAID) == ("FAILED", None, [])
    assert (record.error or "").startswith("PermissionDenied: agent 'ReAct' may not use tool 'refund'")
    assert len(script.prompts) == 1
