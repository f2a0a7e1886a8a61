import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import json
    import re
    from contextlib import redirect_stderr, redirect_stdout
    from functools import cache
    from io import StringIO
    from pathlib import Path
    from typing import Annotated, Any, Literal

    import dspy
    import marimo as mo
    from pydantic import BaseModel, Field

    import agentkit as ak

    ROOT = Path(__file__).resolve().parents[1]
    DATA = ROOT / "data" / "support"
    # A person decides about refunds of this many dollars and above.
    HUMAN_FROM_USD = 50.00
    ORDER_ID = re.compile(r"ORD-\d{5}")


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # Support triage

    A ticket comes in. A **router** sends it to one of three hedgehog agents (billing, technical, general); the agent
    classifies it, searches the knowledge base, looks up the order, decides (answer, refund, escalate) and returns a
    typed assignment. This notebook *is* the system: what is registered as a release is built from this file.

    Ways to use it: `marimo edit notebooks/support_triage.py` to change it, `agentkit run notebooks/support_triage.py
    "I was charged twice"` to try it, `agentkit register notebooks/support_triage.py` to make a release of it.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Tools

    Three functions with a permission each. `issue_refund` writes: the agent may refund less than \$50 alone, and people
    are told; from \$50.00 on a person is asked, and where nobody answers the refund is rejected. Paying the same order
    twice changes nothing, so it may be tried again when the bank does not answer.
    """)
    return


@app.class_definition
class Order(BaseModel):
    """An order as the shop's system knows it. Its number must look like one: text from outside must not reach a tool."""

    order_id: str = Field(pattern=r"^ORD-\d{5}$")
    product: str
    status: str
    refundable_usd: float = Field(ge=0, description="USD that may be paid back today; 0 when the window has closed")


@app.function
@cache
def read(name: str) -> list[dict[str, Any]]:
    """The rows of one data file."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@app.class_definition
class KnowledgeBase:
    """Keyword search over the articles: TF-IDF, titles counted twice."""

    def __init__(self, articles: list[dict[str, Any]]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.articles = articles
        self._vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english", ngram_range=(1, 2))
        self._rows = self._vectorizer.fit_transform([f"{a['title']} {a['title']} {a['body']}" for a in articles])

    def search(self, query: str, limit: int) -> list[dict[str, Any]]:
        """The best articles, best first; none that shares no word with the query."""
        near = (self._vectorizer.transform([query]) @ self._rows.T).toarray().ravel()
        best = sorted(range(len(near)), key=lambda i: -near[i])[:limit]
        return [self.articles[i] for i in best if near[i] > 0]


@app.function
@cache
def knowledge_base() -> KnowledgeBase:
    """The index, built once per process."""
    return KnowledgeBase(read("articles"))


@app.function
@ak.tool
def search_knowledge_base(
    query: Annotated[str, Field(description="the customer's words")],
    limit: Annotated[int, Field(ge=1, le=10, description="articles at most")] = 3,
) -> list[dict[str, str]]:
    """Find help-centre articles about a customer's words; returns id, title and body, best first."""
    return [{key: a[key] for key in ("id", "title", "body")} for a in knowledge_base().search(query, limit)]


@app.function
@ak.tool
def lookup_order(
    customer_id: Annotated[str, Field(description="whose orders, e.g. C-0001")],
    order_id: Annotated[str | None, Field(description="e.g. ORD-10003; the latest order without it")] = None,
) -> Order | None:
    """Look up an order of this customer: the one named, or else the latest; None if there is none.

    An order of somebody else is never returned.
    """
    mine = [o for o in read("orders") if o["customer_id"] == customer_id]
    if order_id is not None:
        mine = [o for o in mine if o["order_id"] == order_id]
    latest = max(mine, key=lambda o: o["ordered_on"], default=None)
    return None if latest is None else Order.model_validate(latest)


@app.function
@ak.tool(permission="write", human_at={"amount_usd": HUMAN_FROM_USD}, idempotent=True, writes_to="order_id")
def issue_refund(
    order_id: Annotated[str, Field(pattern=r"^ORD-\d{5}$", description="the order to pay back, e.g. ORD-10003")],
    amount_usd: Annotated[float, Field(gt=0, description="USD, no more than is refundable")],
) -> str:
    """Pay the refundable amount of an order back to the customer; returns the refund's reference.

    A second refund of the same order and amount is the first one again.
    """
    return f"RF-{order_id.removeprefix('ORD-')}-{amount_usd:.2f}"


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Prompts

    Typed signatures. Each agent's `Classify` differs only in the categories it may answer: a hedgehog knows one
    thing. The bare router is where we began; the described one is what we release.
    """)
    return


@app.class_definition
class Route(dspy.Signature):
    """Decide which queue handles a customer's support ticket of a smart-home shop.

    - billing: money taken or owed: refund, charged twice, wrong amount, charge, invoice, receipt, tax, card, payment declined, promo code, gift card, subscription, Nook Plus plan, renewal, cancel
    - technical: a device or the app does not work or has to be set up: offline, wifi, connect, pairing, camera, doorbell, thermostat, hub, bulb, firmware, schedule, automation, password, log in, account locked, two-step code
    - general: order, delivery, parcel, tracking, address, shipping, return, exchange, warranty, which product to buy, compatible, business, feedback, idea, complaint, privacy, recycling, anything else
    """

    ticket: str = dspy.InputField(desc="the customer's words")
    queue: Literal["billing", "technical", "general"] = dspy.OutputField()
    confidence: float = dspy.OutputField(desc="probability that the queue is right", ge=0, le=1)


@app.class_definition
class Classify(dspy.Signature):
    """Classify a support ticket and say what it asks for.

    - answer: a question or a problem that a help article solves
    - refund: the customer wants the money of a whole order or a double charge paid back
    - escalate: a person must act: smoke, burning, hot battery; a charge nobody recognises, fraud, hacked account; lost second factor; lawyer, regulator, press, delete or export my data; wants a human or manager; wrote several times without a solution; delivered but not received; all steps and a reset tried; bulk quote; only part of the price is owed
    - urgent: danger, fraud, account taken over
    - high: cannot use the home or product at all, money wrongly taken, deadline, contacted repeatedly
    - normal: the usual
    - low: curiosity, praise, ideas, no hurry
    """

    ticket: str = dspy.InputField(desc="the customer's words")
    proposed_action: Literal["answer", "refund", "escalate"] = dspy.OutputField()
    category: str = dspy.OutputField()
    priority: Literal["low", "normal", "high", "urgent"] = dspy.OutputField()
    sentiment: Literal["negative", "neutral", "positive"] = dspy.OutputField(desc="tone of the words")
    confidence: float = dspy.OutputField(desc="probability that the proposed action is right", ge=0, le=1)


@app.class_definition
class Reply(dspy.Signature):
    """Draft a reply to the customer from the help articles; promise nothing that the decision does not say."""

    ticket: str = dspy.InputField()
    articles: str = dspy.InputField(desc="help articles, best first")
    reply: str = dspy.OutputField(desc="two to four sentences")


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The agents

    One workflow in the three phases of the state machine, three narrow subclasses. The code, not the model, applies
    the shop's rules: what is refundable comes from the order system, and the tool's limit decides who may pay it.
    """)
    return


@app.class_definition
class Assignment(BaseModel):
    """What triage returns for a ticket."""

    queue: Literal["billing", "technical", "general"]
    category: str
    priority: Literal["low", "normal", "high", "urgent"]
    sentiment: Literal["negative", "neutral", "positive"]
    proposed_action: Literal["answer", "refund", "escalate"]
    action: Literal["answer", "refund", "escalate"]
    reply_draft: str = Field(min_length=1)
    cited_articles: list[str]
    confidence: float = Field(ge=0, le=1, description="probability that queue and action are right")
    reason: str = Field(min_length=1)


@app.class_definition
class TriageAgent(ak.Agent):
    """The workflow that the three agents share."""

    result = Assignment
    tools = (search_knowledge_base, lookup_order)
    categories: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict(Classify.with_updated_fields("category", type_=Literal[self.categories]))
        self.reply = dspy.Predict(Reply)

    def plan(self, run: ak.Run, ticket: str, customer_id: str) -> dspy.Prediction:
        return self.classify(ticket=ticket)

    def execute(self, run: ak.Run, plan: dspy.Prediction, ticket: str, customer_id: str) -> dict[str, Any]:
        articles = run.call(search_knowledge_base, query=ticket)
        named = ORDER_ID.search(ticket)
        order = run.call(lookup_order, customer_id=customer_id, order_id=named[0] if named else None)
        action, reason = self.act(run, plan.proposed_action, order)
        run.decide("action", action, reason)
        return {"articles": articles, "order": order, "action": action, "reason": reason}

    def act(self, run: ak.Run, proposed: str, order: Order | None) -> tuple[str, str]:
        """The final action and its reason. Outside billing nobody can pay: a person has to look."""
        if proposed == "refund":
            return "escalate", "the customer wants money back, which this queue cannot decide"
        return proposed, f"the ticket asks for: {proposed}"

    def reflect(self, run: ak.Run, plan: dspy.Prediction, facts: dict[str, Any], ticket: str, customer_id: str) -> Any:
        return self.compose(plan, facts, ticket, queue=self.name, confidence=plan.confidence * run.routing.confidence)

    def recover(self, run: ak.Run, error: Exception, ticket: str, customer_id: str) -> Assignment:
        """Where a tool or the model fails for good, a person takes over: nothing is guessed and nothing is paid."""
        return Assignment(
            queue=self.name if self.name in ("billing", "technical", "general") else "general",
            category=self.categories[0],
            priority="normal",
            sentiment="neutral",
            proposed_action="escalate",
            action="escalate",
            reply_draft="A colleague will look at this in person and write to you within one business day.",
            cited_articles=[],
            confidence=0,
            reason=f"handed over because {error}"[:300],
        )

    def compose(
        self, plan: dspy.Prediction, facts: dict[str, Any], ticket: str, queue: str, confidence: float
    ) -> Assignment:
        """The typed result with a reply drafted from the articles."""
        text = "\n\n".join(f"{a['title']}: {a['body']}" for a in facts["articles"])
        draft = self.reply(ticket=ticket, articles=text).reply if text else ""
        closing = {
            "answer": "We hope this solves it; just reply if it does not.",
            "refund": "We have refunded your order; the money reaches your account in 5 to 7 business days.",
            "escalate": "A colleague will look at this in person and write to you within one business day.",
        }[facts["action"]]
        return Assignment(
            queue=queue,
            category=plan.category,
            priority=plan.priority,
            sentiment=plan.sentiment,
            proposed_action=plan.proposed_action,
            action=facts["action"],
            reply_draft=f"{draft} {closing}".strip(),
            cited_articles=[a["id"] for a in facts["articles"]],
            confidence=confidence,
            reason=facts["reason"],
        )


@app.class_definition
class BillingAgent(TriageAgent):
    """Knows money: refunds, charges, invoices, plans. The only one that may pay."""

    name = "billing"
    tools = (search_knowledge_base, lookup_order, issue_refund)
    categories = ("refund_request", "wrong_charge", "invoice_payment", "subscription")

    def act(self, run: ak.Run, proposed: str, order: Order | None) -> tuple[str, str]:
        if proposed != "refund":
            return proposed, f"the ticket asks for: {proposed}"
        if order is None:
            return "answer", "a refund was asked for, but this customer has no such order; ask for the number"
        amount = order.refundable_usd
        if amount == 0:
            return "answer", f"{order.order_id} is past its refund window or already paid back"
        reference = run.call(issue_refund, order_id=order.order_id, amount_usd=amount)
        if reference is None:
            return "escalate", f"a refund of ${amount:.2f} needs a person and was not approved"
        return "refund", f"{order.order_id} is refundable; paid back ${amount:.2f} as {reference}"


@app.class_definition
class TechnicalAgent(TriageAgent):
    """Knows devices, connections, set-up and account access."""

    name = "technical"
    categories = ("device_fault", "connectivity", "setup", "account_access")


@app.class_definition
class GeneralAgent(TriageAgent):
    """Knows orders, parcels, returns, products, and everything else."""

    name = "general"
    categories = ("order_status", "return_exchange", "product_question", "feedback_other")


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Metrics and the system

    **Success** of a triage: queue and action right, and nothing done that the case forbids. The other fields have
    metrics of their own. **Task failure** is something else: the run ended FAILED or its output was invalid.
    """)
    return


@app.function
def nothing_forbidden(example: Any, prediction: Any, trace: Any = None) -> bool:
    """No tool ran that the case forbids: no money was paid that should not have been."""
    return not {effect["tool"] for effect in prediction.record.effects} & set(example["forbidden"])


@app.function
def success(example: Any, prediction: Any, trace: Any = None) -> bool:
    """Queue and action right and no forbidden tool among the effects of the run (DSPy's metric signature)."""
    return (
        prediction.queue == example["queue"]
        and prediction.action == example["action"]
        and nothing_forbidden(example, prediction)
    )


@app.function
def make(name: str, router: dspy.Predict | None, agents: list[ak.Agent]) -> ak.System:
    """Agents and router as one system, with this job's metrics and files."""
    return ak.System(
        name,
        agents,
        router=router,
        fallback_agent="general" if router else None,
        success=success,
        metrics=[
            nothing_forbidden,
            ak.metrics.exact("queue"),
            ak.metrics.exact("action"),
            ak.metrics.exact("category"),
            ak.metrics.exact("priority"),
            ak.metrics.exact("sentiment"),
            ak.metrics.cites("article", "cited_articles"),
            ak.metrics.citations_supported("cited_articles", "search_knowledge_base"),
            ak.metrics.no_placeholder("reply_draft"),
        ],
        files=[DATA / f"{name}.jsonl" for name in ("articles", "orders")],
    )


@app.function
def system() -> ak.System:
    """The support-triage system, untuned: described prompts, no demonstrations, no fitted weights."""
    return make("support_triage", dspy.Predict(Route), [BillingAgent(), TechnicalAgent(), GeneralAgent()])


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The baseline: one agent for everything

    Measure first, split later. `SoloAgent` does the whole job with one prompt: it answers queue and category together
    and holds every tool. The comparison is at the end of this notebook.
    """)
    return


@app.class_definition
class SoloAgent(TriageAgent):
    """The whole job in one agent: the baseline that the split has to beat."""

    name = "solo"
    tools = BillingAgent.tools
    categories = BillingAgent.categories + TechnicalAgent.categories + GeneralAgent.categories

    def __init__(self) -> None:
        super().__init__()
        queue = Literal["billing", "technical", "general"]
        described = self.classify.signature.append("queue", dspy.OutputField(), queue).with_instructions(
            f"{Classify.instructions}\n{Route.instructions}"
        )
        self.classify = dspy.Predict(described)

    def act(self, run: ak.Run, proposed: str, order: Order | None) -> tuple[str, str]:
        return BillingAgent.act(self, run, proposed, order)

    def reflect(self, run: ak.Run, plan: dspy.Prediction, facts: dict[str, Any], ticket: str, customer_id: str) -> Any:
        return self.compose(plan, facts, ticket, queue=plan.queue, confidence=plan.confidence)


@app.function
def baseline() -> ak.System:
    """The single-agent baseline as a system of its own."""
    return make("support_triage_solo", None, [SoloAgent()])


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Tuning

    Two ways to prepare the system before it is registered (`agentkit register … --prepare tuned`). `bare` takes the
    descriptions out of the prompts: our first draft. `tuned` lets a DSPy optimiser choose the router's demonstrations
    and fits the embedded model to the training tickets; with a language model behind `AGENTKIT_LM` the fit is skipped.
    """)
    return


@app.function
def bare(triage: ak.System) -> ak.System:
    """The system with prompts as short as a first draft has them: label names, no descriptions."""
    for _, predictor in triage.named_predictors():
        predictor.signature = predictor.signature.with_instructions("Do the task.")
    return triage


@app.function
def tuned(triage: ak.System, sets: tuple[str, ...] = ("train",)) -> ak.System:
    """Demonstrations for the router, chosen by a DSPy optimiser, and the embedded model fitted to labelled tickets."""
    examples = [e for name in sets for e in ak.read_examples(DATA / f"{name}.jsonl")]
    tickets = [
        dspy.Example(ticket=e.inputs["ticket"], queue=e.expected["queue"]).with_inputs("ticket") for e in examples[:400]
    ]
    if triage.router is not None:
        # The optimiser prints a line per candidate and example.
        with dspy.context(lm=triage.lm), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            optimiser = dspy.BootstrapFewShotWithRandomSearch(
                metric=lambda example, prediction, trace=None: example.queue == prediction.queue,
                max_bootstrapped_demos=4,
                max_labeled_demos=8,
                num_candidate_programs=6,
                num_threads=1,
            )
            triage.router = optimiser.compile(triage.router, trainset=tickets[:200], valset=tickets[200:])
    if triage.lm.model.startswith("embedded/"):
        triage.use(ak.fit(triage, [{**e.inputs, **e.expected} for e in examples]))
    return triage


@app.function
def tuned_on_all(triage: ak.System) -> ak.System:
    """As `tuned`, fitted to the dev tickets as well."""
    return tuned(triage, ("train", "dev"))


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## See it work

    The state machine every run goes through, drawn from its transition table; who may use which tool; and which calls an
    agent makes alone (tier 1), which people are told of (2), and which wait for a person (3).
    """)
    return


@app.cell
def _():
    mo.mermaid(ak.diagram())
    return


@app.cell
def _():
    mo.ui.table(system().permissions(), selection=None)
    return


@app.cell
def _():
    mo.ui.table(system().autonomy.rows(), selection=None)
    return


@app.cell
def _():
    triage = tuned(system())
    return (triage,)


@app.cell
def _(triage):
    _record = triage.run(ticket="I was charged twice for order ORD-10003, please refund one.", customer_id="C-0001")
    mo.vstack(
        [
            mo.md(f"**{_record.output['action']}**: {_record.output['reason']}"),
            mo.ui.table([{"state": s.state, "kind": s.kind, "step": s.name} for s in _record.steps], selection=None),
        ]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Look at failures on the dev set

    Golden cases are for the gate and are shown to nobody; dev cases are for us. Every row below is a run; failures
    are rows, too.
    """)
    return


@app.cell
def _():
    # Here, not in the set-up cell: a worker that loads a release needs neither.
    import polars as pl

    from agentkit_pipelines import evaluation

    return evaluation, pl


@app.cell
def _(evaluation, pl, triage):
    dev = ak.read_examples(DATA / "dev.jsonl")
    results = evaluation.evaluate(triage, dev, repeats=1)
    results.filter(~pl.col("success")).select(
        "case_id", "task_type", "route", "queue", "action", "confidence", "output"
    )
    return dev, results


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Why three agents?

    Measured with the embedded model on five folds of the 1,628 training tickets (2026-11-20):

    | | success | 95 % interval | model calls | tokens in | runs in which an agent could pay |
    |---|---|---|---|---|---|
    | one agent | 0.774 | 0.753 to 0.794 | 2 | 2,293 | 100 % |
    | router and three agents | 0.772 | 0.751 to 0.792 | 3 | 3,588 | 33 % |

    The split does **not** make this model answer better (it classifies every field by itself, so the two are nearly
    the same by construction), and it costs a call. What it buys is reach: two of three
    tickets never meet an agent that holds `issue_refund`, whatever their text says; and each prompt can be changed,
    evaluated and rolled back without touching the others' categories. With a model that is billed by the token, look
    at the cost column again before you split. Below, the same comparison on the dev set, live.
    """)
    return


@app.cell
def _(dev, evaluation, pl, results):
    _solo = evaluation.evaluate(tuned(baseline()), dev, repeats=1)
    pl.DataFrame(
        [
            {
                "system": name,
                "success": r["success"].mean(),
                "category": r["category"].mean(),
                "model calls": r["model_calls"].mean(),
                "tokens in": r["tokens_in"].mean(),
                "could pay": r["route"].is_in(["billing", "solo"]).mean(),
            }
            for name, r in (("one agent", _solo), ("router and three agents", results))
        ]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Tests

    `pytest notebooks/support_triage.py` runs these. The amounts are those of real orders in the data.
    """)
    return


@app.function
def test_refund_below_the_limit_is_paid_and_from_the_limit_on_needs_a_person():
    refund = {"proposed_action": "refund", "category": "refund_request"}
    for order_id, amount, action in (
        ("ORD-00001", 49.99, "refund"),
        ("ORD-00002", 50.00, "escalate"),
        ("ORD-00003", 50.01, "escalate"),
    ):
        order = Order(order_id=order_id, product="p", status="delivered", refundable_usd=amount)

        class Probe(BillingAgent):
            def plan(self, run, ticket, customer_id):
                return dspy.Prediction(**refund)

            def execute(self, run, plan, ticket, customer_id, order=order):
                return self.act(run, plan.proposed_action, order)

            def reflect(self, run, plan, facts, ticket, customer_id):
                return Assignment(
                    queue="billing",
                    category="refund_request",
                    priority="normal",
                    sentiment="neutral",
                    proposed_action="refund",
                    action=facts[0],
                    reply_draft="-",
                    cited_articles=[],
                    confidence=1,
                    reason=facts[1],
                )

        record = ak.System("probe", [Probe()]).run(ticket="", customer_id="")
        assert (record.output["action"], len(record.effects)) == (action, int(action == "refund"))


@app.function
def test_an_order_of_somebody_else_is_not_found():
    assert lookup_order(customer_id="C-0002", order_id="ORD-10013").order_id == "ORD-10013"
    assert lookup_order(customer_id="C-0001", order_id="ORD-10013") is None


@app.function
def test_a_ticket_about_money_reaches_billing():
    assert system().run(ticket="I was charged twice, refund please", customer_id="C-0001").route == "billing"


if __name__ == "__main__":
    app.run()
