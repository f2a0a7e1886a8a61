"""Systems: routing, inputs and results, event loops, nesting, and life as a `dspy.Module`."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest
from desks import MONEY, WIFI, Billing, Route, Technical, Triage, count_words, desk
from hedgehogs import Found, Hedgehog, Script, doing, speaking
from pydantic import BaseModel, ConfigDict, Field

import agentkit as ak
from agentkit import Budget, Run, RunRecord
from agentkit.current import current_run
from agentkit.errors import BudgetExceeded, SourceError, UsageError

# --- routing -------------------------------------------------------------------------------------------------------


def test_the_router_chooses_the_agent_and_its_choice_is_recorded() -> None:
    system = desk()
    assert [system.run(text=text).route for text in (MONEY, WIFI)] == ["billing", "technical"]
    record = system.run(text=MONEY)
    decision = next(s for s in record.steps if s.kind == "decision")
    assert (decision.name, decision.outputs, decision.state) == ("route", "billing", "PLANNING")
    assert "'queue': 'billing'" in str(decision.inputs)
    assert {s.agent for s in record.steps} == {None, "billing"}


def test_agents_see_the_whole_answer_of_the_router() -> None:
    class Sure(Billing):
        def execute(self, run: Run, plan: Any, text: str = "") -> Any:
            return run.routing.confidence

    record = ak.System("desk", [Sure(), Technical()], router=dspy.Predict(Route)).run(text=MONEY)
    assert 0.5 < (record.output or {})["value"] <= 1


def test_a_router_that_answers_something_else_fails_the_run() -> None:
    system = desk()
    speaking(system.router, Script(*[{"queue": "legal", "confidence": "0.9"}] * 2))  # it is asked to mend it, once
    record = system.run(text=MONEY)
    assert (record.state, record.route, record.model_calls) == ("FAILED", None, 2)
    assert (record.error or "").startswith("MalformedOutput: ")
    assert "expected the fields queue, confidence" in (record.error or "")


ROUTERS: dict[str, tuple[Any, str]] = {
    "an agent too few": (dspy.Predict("text -> q: Literal['billing']"), r"\['billing'\], but the agents are"),
    "an agent too many": (dspy.Predict("text -> q: Literal['billing', 'legal', 'technical']"), "'legal'"),
    "any text": (dspy.Predict("text -> q"), r"can answer \[\]"),
    "no predictor": (dspy.ChainOfThought("text -> q: Literal['billing', 'technical']"), "must be a dspy.Predict"),
    "none": (None, "2 agents but no router"),
}


@pytest.mark.parametrize(("router", "message"), ROUTERS.values(), ids=ROUTERS.keys())
def test_a_router_whose_labels_are_not_the_agents_is_refused(router: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        ak.System("desk", [Billing(), Technical()], router=router)


class Nameless(Hedgehog):
    name = ""


class Idle(ak.Agent):
    name = "idle"
    result = Found


class Kind(Hedgehog):
    def plan(self, run: Run, kind: str) -> Any:  # type: ignore[override]
        return kind


UNFIT: dict[str, tuple[str, list[ak.Agent], str]] = {
    "a name with a space": ("my desk", [Hedgehog()], "system name 'my desk'"),
    "no agent": ("desk", [], "0 agents"),
    "namesakes": ("desk", [Billing(), Billing()], "two agents share a name"),
    "no name": ("desk", [Nameless()], "sets no `name`"),
    "an unwritten phase": ("desk", [Idle()], "Idle does not write the phase `plan`"),
    "an input with the name of an option": ("desk", [Kind()], "rename the input 'kind'"),
}


@pytest.mark.parametrize(("name", "agents", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_system_that_cannot_work_is_refused_when_it_is_made(name: str, agents: list[ak.Agent], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        ak.System(name, agents)


# --- inputs and results --------------------------------------------------------------------------------------------


class Order(Hedgehog):
    def plan(self, run: Run, ticket: str, customer: str, locale: str = "en") -> Any:  # type: ignore[override]
        return f"{ticket}/{customer}/{locale}"

    def execute(self, run: Run, plan: Any, **inputs: Any) -> Any:
        return plan

    def reflect(self, run: Run, plan: Any, facts: Any, **inputs: Any) -> Any:
        return {"value": facts}


def test_missing_and_unknown_inputs_are_named_and_nothing_runs(records: list[RunRecord]) -> None:
    system = ak.System("orders", [Order()])
    with pytest.raises(UsageError, match=r"needs \['customer', 'ticket'\]; missing: \['customer'\]"):
        system.run(ticket="late")
    with pytest.raises(UsageError, match=r"takes \['customer', 'locale', 'ticket'\]; it has no input 'tickt'"):
        system(tickt="late", ticket="late", customer="Ann")
    assert records == []
    assert system(ticket="late", customer="Ann").value == "late/Ann/en"
    assert system(ticket="late", customer="Ann", locale="de").value == "late/Ann/de"


def test_what_only_the_router_reads_is_an_input_of_the_system() -> None:
    router = dspy.Predict("text, channel -> queue: Literal['billing', 'technical']")
    system = ak.System("desk", [Billing(), Technical()], router=router)
    assert system.input_names() == (("text", "channel"), frozenset({"text", "channel"}))
    assert system.run(text=MONEY, channel="mail").state == "DONE"
    with pytest.raises(UsageError, match=r"missing: \['channel'\]"):
        system.run(text=MONEY)


class Share(BaseModel):
    part: float = Field(ge=0, le=1)


class Camel(BaseModel):
    model_config = ConfigDict(validate_by_name=False)
    order_id: str = Field(alias="orderId")


INVALID: dict[str, Any] = {
    "out of range": {"part": 1.5},
    "another type": {"part": "half"},
    "missing": {},
    "nothing": None,
    "built without validation": Share.model_construct(part="half"),
    "another model": Found(value=0.5),
}


@pytest.mark.parametrize("result", INVALID.values(), ids=INVALID.keys())
def test_an_invalid_result_fails_the_run(result: Any) -> None:
    class Careless(Hedgehog):
        def reflect(self, run: Run, plan: Any, facts: Any, text: str = "") -> Any:
            return result

    Careless.result = Share
    record = ak.adopt(Careless()).run(text="x")
    assert (record.state, record.output) == ("FAILED", None)
    assert (record.error or "").startswith("ValidationError: 1 validation error for Share")
    assert record.steps[-1].inputs == "REFLECTING"


@pytest.mark.parametrize("result", [Camel(orderId="A"), {"orderId": "A"}, {"order_id": "A"}], ids=repr)
def test_results_with_aliases_pass(result: Any) -> None:
    class Camels(Hedgehog):
        def reflect(self, run: Run, plan: Any, facts: Any, text: str = "") -> Any:
            return result

    Camels.result = Camel
    record = ak.adopt(Camels()).run(text="x")
    assert record.output == {"order_id": "A"}, record.error
    assert record.result == Camel(orderId="A")


def test_a_call_returns_the_fields_of_the_result_with_route_and_record() -> None:
    prediction = desk()(text=WIFI)
    assert (prediction.value, prediction.route, prediction.record.state) == (WIFI, "technical", "DONE")


def test_a_call_raises_what_ended_the_run_after_it_was_recorded(records: list[RunRecord]) -> None:
    def fail(run: Run) -> None:
        raise LookupError("no such order")

    system = doing(fail)
    with pytest.raises(LookupError, match="no such order"):
        system(text="x")
    assert [(r.state, r.error) for r in records] == [("FAILED", "LookupError: no such order")]
    assert system.run(text="x").state == "FAILED"


def test_the_model_sees_only_what_the_release_has_not_what_the_caller_configured() -> None:
    script = Script({"queue": "technical", "confidence": "1"})
    with dspy.context(lm=speaking(dspy.Predict(Route), script).lm):
        record = desk().run(text=MONEY)
    assert (record.route, script.prompts) == ("billing", [])


# --- approvals -----------------------------------------------------------------------------------------------------


@ak.tool(permission="write", human_at={"usd": 50})
def pay(usd: float) -> str:
    """Pay something back."""
    return "paid"


def test_an_approver_is_asked_inside_its_block_only() -> None:
    system = doing(lambda run: run.call(pay, usd=80), pay)
    with ak.approve_with(lambda request: True):
        assert system.run().output == {"value": "paid"}
        with ak.approve_with(lambda request: False):
            assert system.run().output == {"value": None}
        assert system.run().output == {"value": "paid"}
    assert system.run().output == {"value": None}


def test_an_approver_leaves_with_an_error_and_does_not_reach_other_threads() -> None:
    system = doing(lambda run: run.call(pay, usd=80), pay)
    elsewhere: list[Any] = []

    def break_off() -> None:
        with ak.approve_with(lambda request: True):
            thread = threading.Thread(target=lambda: elsewhere.append(system.run().output))
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert elsewhere == [{"value": None}]
    assert system.run().output == {"value": None}


# --- one system inside another -------------------------------------------------------------------------------------


def test_a_nested_system_spends_its_callers_budget(records: list[RunRecord]) -> None:
    inner = desk()

    def ask_until_refused(run: Run) -> Any:
        return [inner(text=MONEY).route for _ in range(5)]

    outer = doing(ask_until_refused, budget=Budget(model_calls=3))
    record = outer.run()
    assert record.error == (
        "BudgetExceeded: budget of 3 model_calls would be exceeded: 3 used, 1 more asked for; "
        "raise the limit in the system's Budget or make the task smaller"
    )
    assert [(r.system, r.state) for r in records] == [("desk", "DONE")] * 3 + [("desk", "FAILED"), ("worker", "FAILED")]
    assert inner.run(text=MONEY).state == "DONE"


def test_a_nested_system_has_the_inventory_of_its_own_agents() -> None:
    inner = doing(lambda run: run.call(pay, usd=1), name="inner")
    record = doing(lambda run: inner.run().error, pay).run()
    assert "agent 'hedgehog' may not use tool 'pay'; its inventory is []" in str(record.output)


def test_runs_of_one_ledger_share_its_limits() -> None:
    ledger = ak.Ledger(Budget(model_calls=3))
    system = desk()
    states = [system.run(text=WIFI, ledger=ledger).state for _ in range(5)]
    assert states == ["DONE"] * 3 + ["FAILED"] * 2
    assert ledger.used["model_calls"] == 3


# --- event loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [desk, lambda: ak.adopt(Triage())], ids=["a system", "an adopted module"])
def test_calls_work_inside_a_running_event_loop(make: Any, dspy_log: pytest.LogCaptureFixture) -> None:
    system = make()

    async def cell() -> tuple[Any, ...]:
        plain = system(text=WIFI)
        awaited, together = (
            await system.acall(text=WIFI),
            await asyncio.gather(*(system.acall(text=WIFI) for _ in "abc")),
        )
        return plain, awaited, *together

    predictions = asyncio.run(cell())
    assert [p.record.state for p in predictions] == ["DONE"] * 5
    assert len({p.record.run_id for p in predictions}) == 5
    assert {p.record.model_calls for p in predictions} == {1}
    assert dspy_log.messages == []


def test_awaited_runs_have_the_approver_of_their_caller_and_raise_its_errors() -> None:
    def work(run: Run) -> Any:
        if run.call(pay, usd=80) is None:
            raise PermissionError("not paid")
        return current_run() is run

    system = doing(work, pay)

    async def cell() -> Any:
        with ak.approve_with(lambda request: True):
            approved = await system.acall(text="x")
        with pytest.raises(PermissionError, match="not paid"):
            await system.acall(text="x")
        return approved

    assert asyncio.run(cell()).value is True


# --- a system is a dspy.Module -------------------------------------------------------------------------------------

TRAIN = [
    dspy.Example(text=text, queue=queue).with_inputs("text")
    for text, queue in [(MONEY, "billing"), (WIFI, "technical")]
]


class Told(Hedgehog):
    """Classifies again, in words of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict("text -> urgent: bool")

    def plan(self, run: Run, text: str = "") -> Any:
        return self.classify(text=text).urgent


class ToldBilling(Told):
    name = "billing"


class ToldTechnical(Told):
    name = "technical"


def told() -> ak.System:
    return ak.System("desk", [ToldBilling(), ToldTechnical()], router=dspy.Predict(Route))


def right(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(prediction.route == example.queue)


def test_predictors_are_found_by_dspy_and_named_as_people_write_them() -> None:
    system = told()
    assert [name for name, _ in system.named_predictors()] == [
        "router",
        "agents['billing'].classify",
        "agents['technical'].classify",
    ]
    assert list(system.prompts()) == ["router", "billing.classify", "technical.classify"]
    adopted = ak.adopt(Triage())
    assert list(adopted.prompts()) == ["route"]


def test_state_survives_json_and_brings_prompts_and_demonstrations_back(tmp_path: Path) -> None:
    tuned = told()
    tuned.router.demos = [dspy.Example(text="the box hums", queue="technical", confidence=1.0)]
    tuned.router.signature = tuned.router.signature.with_instructions("Send it on.")
    state = json.loads(json.dumps(tuned.dump_state()))
    fresh = told()
    assert fresh.run(text="the box hums").route != tuned.run(text="the box hums").route
    fresh.load_state(state)
    assert fresh.prompts() == tuned.prompts()
    assert fresh.run(text="the box hums").route == "technical"
    tuned.save(tmp_path / "state.json")
    again = told()
    again.load(tmp_path / "state.json")
    assert again.prompts() == tuned.prompts()


def test_a_copy_is_tuned_without_its_original() -> None:
    original = told()
    copy = original.deepcopy()
    copy.router.demos = [TRAIN[0]]
    copy.agents["billing"].classify.demos = [TRAIN[1]]
    assert [p.demos for p in original.predictors()] == [[], [], []]
    assert copy.run(text=WIFI).state == "DONE"


def test_bootstrap_few_shot_compiles_a_system() -> None:
    optimiser = dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=2, max_labeled_demos=2)
    with dspy.context(lm=ak.build_lm("fast")):
        compiled = optimiser.compile(told(), trainset=TRAIN)
    assert isinstance(compiled, ak.System)
    assert {d["text"] for d in compiled.router.demos} == {MONEY, WIFI}
    assert [len(p.demos) for p in compiled.predictors()] == [2, 1, 1]
    assert compiled.run(text="the invoice is wrong").route == "billing"


@pytest.mark.parametrize("threads", [1, 2])
def test_dspy_evaluate_scores_a_system(threads: int, records: list[RunRecord]) -> None:
    wrong = dspy.Example(text=WIFI, queue="billing").with_inputs("text")
    evaluate = dspy.Evaluate(devset=[*TRAIN, wrong], metric=right, num_threads=threads, display_progress=False)
    assert evaluate(desk()).score == pytest.approx(66.67)
    assert len(records) == 3


def test_a_refused_budget_is_an_error_to_callers() -> None:
    system = ak.System("desk", [Billing(), Technical()], router=dspy.Predict(Route), budget=Budget(model_calls=0))
    with pytest.raises(BudgetExceeded):
        system(text=MONEY)


# --- what a release is made of -------------------------------------------------------------------------------------


def test_the_spec_holds_everything_that_defines_behaviour_beside_prompts() -> None:
    system = doing(lambda run: None, pay, budget=Budget(usd=1.5), success=right, metrics=[ak.metrics.exact("value")])
    spec = json.loads(json.dumps(system.spec()))
    assert spec["agents"]["hedgehog"]["tools"] == ["pay"]
    assert spec["agents"]["hedgehog"]["result"]["title"] == "Found"
    assert spec["tools"]["pay"] == pay.spec()
    assert (spec["budget"]["usd"], spec["success"], spec["metrics"]) == (1.5, "right", ["value"])
    assert ak.adopt(count_words).spec()["program"] == "count_words"


def test_two_different_tools_of_one_name_are_refused() -> None:
    def tool(answer: str) -> ak.Tool:
        @ak.tool
        def look(name: str) -> str:
            """Look something up."""
            return answer

        return look

    class First(ak.Agent):
        name, result, tools = "first", dict, (tool("a"),)
        plan = execute = reflect = lambda self, run, *found, text: {}

    class Second(First):
        name, tools = "second", (tool("b"),)

    class Route(dspy.Signature):
        """Route."""

        text: str = dspy.InputField()
        to: Literal["first", "second"] = dspy.OutputField()

    with pytest.raises(ak.AgentkitError, match="two different tools are called 'look'"):
        ak.System("s", [First(), Second()], router=dspy.Predict(Route))


def test_an_adopted_program_may_use_exactly_the_tools_it_is_given() -> None:
    @ak.tool
    def look(name: str) -> str:
        """Look something up."""
        return name.upper()

    def program(text: str) -> str:
        return look(name=text)

    assert ak.adopt(program, tools=[look]).run(text="a").output == {"value": "A"}
    denied = ak.adopt(program).run(text="a")
    assert denied.state == "FAILED"
    assert "may not use tool 'look'" in denied.error
