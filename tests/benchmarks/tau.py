"""Real cases: the ground truth of tau-bench and tau2-bench, attacks on it, and real GPT-4o calls, through governed tools.

    python tests/benchmarks/tau.py --data ../shared/data [--json out.json]

About a minute. The desks (tau_retail.py, tau_airline.py, tau_telecom.py) write the policies as tools' checks; nothing
of the data is in the repository. Every call goes through `System.run` and `Run.call`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
if __name__ == "__main__":  # the tests have a home of their own
    os.environ["AGENTKIT_TRACES"] = "off"
    os.environ["AGENTKIT_HOME"] = tempfile.mkdtemp(prefix="agentkit-tau-")

from rich.console import Console
from rich.progress import track
from rich.table import Table
from tau_airline import Airline
from tau_attacks import KINDS, STALE, attacks_on, strike
from tau_desk import Asked, Desk, Outcome, Person, Record, Store, closest, play, read_lines, run_once, texts_of
from tau_retail import Retail, prescribed_reads
from tau_telecom import VERBS, Observed, bank_texts, calls_of, customer_of, schemas_of, unwrapped, verb_of

from agentkit_pipelines import stats

console = Console(width=150)

# What each write's policy asks for, written from the text and apart from the tools' settings. 3: the user's explicit yes
# first; 2: nobody is asked and people hear of it.
YES = "explicit user confirmation (yes)"
EXPECTED: dict[str, tuple[int, str]] = {
    "cancel_pending_order": (3, YES),
    "modify_pending_order_address": (3, YES),
    "modify_pending_order_payment": (3, YES),
    "modify_pending_order_items": (3, YES),
    "return_delivered_order_items": (3, YES),
    "exchange_delivered_order_items": (3, YES),
    "modify_user_address": (3, "explicit user confirmation (yes/no), in the schema"),
    "book_reservation": (3, YES),
    "update_reservation_flights": (3, YES),
    "update_reservation_baggages": (3, YES),
    "update_reservation_passengers": (3, YES),
    "cancel_reservation": (3, "update the booking database: " + YES),
    "send_certificate": (3, "after confirming the facts; 'Be careful!' in the schema"),
    "transfer_to_human_agents": (2, "no confirmation asked for; people take over, so they hear of it"),
}
# Why the ground truth itself breaks a rule, by the beginning of the paragraph and a word of the reason. Each was looked
# into: the rule says what the paragraph says, and the data do otherwise.
EXPLAINED: tuple[tuple[str, str, str], ...] = (
    (
        "retail, ",
        "not another one",
        "data: the task swaps an item for itself; the policy wants 'a new item … of different product option'",
    ),
    (
        "retail, ",
        " are due",
        "data: the gift card holds less than is due; the policy wants 'enough balance' (some follow from an earlier one)",
    ),
    (
        "airline, cancel flight 2",
        "no insurance",
        "data: economy, no insurance, booked weeks before, flights not cancelled (task 34: basic economy, upgraded to "
        "get round the rule); 'the rules are strict'",
    ),
    (
        "airline, cancel flight 3",
        "used already",
        "data: both flights have landed; the policy wants a transfer to a person",
    ),
    (
        "airline, refund 2",
        "only after",
        "data: a certificate for a delay without changing or cancelling; the policy wants that done first",
    ),
)
CONFIRMS = re.compile(
    r"\b(yes|oui|ok(ay)?|sure|confirm\w*|proceed|go ahead|agree|(looks|is) (good|perfect|correct))\b", re.I
)


@dataclass
class Report:
    """What is printed, and written as JSON."""

    figures: dict[str, Any] = field(default_factory=dict)
    mismatches: list[dict[str, Any]] = field(default_factory=list)

    def table(self, title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
        """Print a table, and keep it."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in columns:
            table.add_column(name, justify="left" if name == columns[0] else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(str, row))
        console.print(table)
        self.figures[title] = [dict(zip(columns, row, strict=True)) for row in rows]

    def mismatch(self, part: str, task: Any, outcome: Outcome, why: str) -> None:
        """Keep something that went otherwise than the data or the policy say."""
        reason = outcome.reason.split(" was not called: ")[-1]
        self.mismatches.append(
            {"part": part, "task": task, "tool": outcome.call.name, "kind": outcome.kind, "reason": reason, "why": why}
        )


# ---- the ground truth


def desk_of(kind: type[Desk], data: Path) -> Desk:
    """A desk over the files of its domain."""
    texts = texts_of(*sorted(data.glob(f"{kind.name}_*.parquet")))
    return kind(Store(texts), json.loads((data / f"{kind.name}_tools.json").read_text()))


def calls_of_task(task: Record) -> list[Asked]:
    """The ground-truth calls."""
    return [Asked(a["name"], a["kwargs"]) for a in task["actions"]]


def ground_truth(desk: Desk, tasks: list[tuple[str, Record]], report: Report) -> None:
    """Every task's actions in order, in a governed run on behalf of its user, with a person who approves."""
    outcomes: list[tuple[str, Outcome]] = []
    ours: list[Outcome] = []
    runs = 0
    for name, task in tasks:
        desk.store.reset()
        calls = calls_of_task(task)
        first: list[Asked] = []
        if isinstance(desk, Retail):
            reads = prescribed_reads(desk, task["user_id"], [(c.name, c.values) for c in calls])
            first = [Asked(*r) for r in reads]
        made, count = play(desk, task["user_id"], [*first, *calls])
        runs += count
        ours += made[: len(first)]
        outcomes += [(name, o) for o in made[len(first) :]]
    _report_reads(desk, [o for _, o in outcomes], ours, report)
    _report_writes(desk, outcomes, len(tasks), runs, report)


def _report_reads(desk: Desk, outcomes: list[Outcome], ours: list[Outcome], report: Report) -> None:
    rows = []
    for what, found in (("in the ground truth", outcomes), ("that the policy prescribes, added by us", ours)):
        reads = [o for o in found if desk.tools[o.call.name].permission == "read"]
        untouched = [o for o in reads if (o.kind, o.tier, o.people) == ("done", 1, 0)]
        if reads:
            rows.append((what, len(reads), len(untouched)))
            for o in reads:
                if o not in untouched:
                    report.mismatch(f"{desk.name}: reads", what, o, "unexplained")
    report.table(f"{desk.name}: reads", ["reads", "made", "passed untouched"], rows)


def _report_writes(desk: Desk, outcomes: list[tuple[str, Outcome]], tasks: int, runs: int, report: Report) -> None:
    rows = []
    for tool in desk.writes():
        mine = [(task, o) for task, o in outcomes if o.call.name == tool]
        tier = EXPECTED[tool][0]
        met = [o for _, o in mine if o.tier == tier and o.kind == "done" and (o.people == 1) == (tier == 3)]
        refused = [o for _, o in mine if o.stopped]
        errors = [o for _, o in mine if o.kind == "tool error"]
        rows.append((tool, len(mine), tier, len(met), len(refused), len(errors)))
        for task, o in mine:
            if o not in met:
                report.mismatch(f"{desk.name}: ground truth", task, o, explanation(o))
    totals = [sum(r[i] for r in rows) for i in (1, 3, 4, 5)]
    rows.append(("all writes", totals[0], "", *totals[1:]))
    title = f"{desk.name}: writes of {tasks} tasks in {runs} runs"
    report.table(title, ["write", "made", "tier of the policy", "tier met", "refused", "tool error"], rows)


def explanation(outcome: Outcome) -> str:
    """Why the ground truth was refused."""
    paragraph = closest(outcome.reason)
    for start, word, why in EXPLAINED:
        if paragraph.startswith(start) and word in outcome.reason:
            return why
    return "unexplained"


# ---- attacks

STALE_WHY = "agentkit: the check is asked before the person decides, and not again after a plain approval"


def attacks(desk: Desk, tasks: list[tuple[str, Record]], report: Report) -> None:
    """Every variant of every write that the ground truth makes and the rules let through, on the records it meets."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    paragraphs: Counter[str] = Counter()
    for number, (name, task) in enumerate(track(tasks, f"attacks on {desk.name}", console=console, transient=True)):
        for call in _good_writes(desk, task):
            snapshot = desk.store.snapshot()
            other = _somebody_else(desk, task["user_id"], number)
            variants = attacks_on(desk, task["user_id"], other, call)
            while (attack := next(variants, None)) is not None:
                struck = strike(desk, attack)
                found[attack.kind][struck.kind] += 1
                paragraphs[closest(struck.outcome.reason)] += struck.kind == "refused"
                if struck.kind in ("slipped through", "tool error", "not reached"):
                    why = STALE_WHY if attack.kind == STALE else "unexplained"
                    report.mismatch(f"{desk.name}: attack, {attack.kind}", name, struck.outcome, why)
                desk.store.restore(snapshot)
    columns = ["refused", "denied", "misfit", "rejected", "without effect", "tool error", "slipped through"]
    rows = [(kind, sum(found[kind].values()), *(found[kind][c] for c in columns)) for kind in KINDS if found[kind]]
    rows.append(("all", *(sum(r[i] for r in rows) for i in range(1, len(columns) + 2))))
    report.table(f"{desk.name}: attacks", ["variant", "tried", *columns], rows)
    rows = [(paragraph, n) for paragraph, n in sorted(paragraphs.items()) if n]
    report.table(f"{desk.name}: rules that refused attacks", ["paragraph", "attacks"], rows)


def _good_writes(desk: Desk, task: Record) -> Iterator[Asked]:
    """The writes of a task, each on the records as it meets them; those that the rules refuse are gone past."""
    desk.store.reset()
    for call in calls_of_task(task):
        if desk.tools[call.name].permission == "read":
            continue
        if call.name == "send_certificate" and isinstance(desk, Airline):
            desk.cancel_delayed(task["user_id"])  # else the rules refuse it, and there is nothing to attack
        before = desk.store.snapshot()
        (outcome,), _ = run_once(desk.system, task["user_id"], [call])
        if outcome.stopped:
            run_once(desk.bare, task["user_id"], [call])
            continue
        after = desk.store.snapshot()
        desk.store.restore(before)
        yield call
        desk.store.restore(after)


def _somebody_else(desk: Desk, user: str, number: int) -> str:
    """Another user, with orders or reservations; not the same one for every task."""
    users = desk.store.keys("users")
    start = 7 * number % len(users)
    for key in users[start:] + users[:start]:
        record = desk.store.get("users", key) or {}
        if key != user and (record.get("orders") or record.get("reservations")):
            return key
    raise LookupError("nobody else has anything")


# ---- real trajectories


def calls_of_trajectory(trajectory: Record) -> Iterator[tuple[Asked, str]]:
    """The calls the model made, whether the user's last words confirm them, and the result that was recorded."""
    said = ""
    messages = trajectory["traj"]
    for i, m in enumerate(messages):
        if m["role"] == "user":
            said = m["content"]
        for call in m.get("tool_calls") or []:
            # Ids occur twice in the data: the answer is the next message that bears the id.
            answer = next(x["content"] for x in messages[i:] if x.get("tool_call_id") == call["id"])
            function = call["function"]
            yield Asked(function["name"], json.loads(function["arguments"]), bool(CONFIRMS.search(said))), answer


def trajectories(desk: Desk, file: Path, report: Report) -> None:
    """The model's calls through the same tools: what would have been stopped, of failed and of successful runs."""
    rows: list[Record] = []
    runs: list[Record] = []
    for t in read_lines(file):
        desk.store.reset()
        recorded = list(calls_of_trajectory(t))
        outcomes, _ = play(desk, t["info"]["task"]["user_id"], [c for c, _ in recorded])
        about = {"task": t["task_id"], "reward": t["reward"]}
        runs.append({**about, "refused": any(_by_rule(o) for o in outcomes)})
        for o, (_, answer) in zip(outcomes, recorded, strict=True):
            write = desk.tools[o.call.name].permission != "read"
            rows.append({**about, "outcome": o, "write": write, "failed anyway": answer.startswith("Error")})
            if o.stopped and (t["reward"] or not write):
                why = FALSE_ALARMS.get(
                    closest(o.reason),
                    "the user agrees without a word of our list ('Please downgrade all of them')"
                    if o.kind == "rejected"
                    else "",
                )
                report.mismatch(
                    f"{desk.name}: trajectories, reward {t['reward']:g}", t["task_id"], o, why or "see reason"
                )
    _report_trajectories(rows, runs, report)


FALSE_ALARMS = {
    "airline, cancel flight 2": "as in the ground truth: basic economy upgraded, then cancelled without insurance",
    "airline, cancel flight 3": "as in the ground truth: a reservation already flown",
    "airline, refund 2": "as in the ground truth: a certificate for a delay without a change",
    "airline, modify flight 6": "no harm: the service refused the same call, and the model tried another method",
    "airline, book flight 3": "no harm: the service refused the same call, and the model tried another method",
}


def _report_trajectories(rows: list[Record], runs: list[Record], report: Report) -> None:
    reads = [r["outcome"] for r in rows if not r["write"]]
    writes = [r for r in rows if r["write"]]
    title = "GPT-4o trajectories, airline: writes (95 % Wilson intervals, tasks as clusters)"
    table = []
    for reward, label in ((0.0, "failed"), (1.0, "successful")):
        mine = [r for r in writes if r["reward"] == reward and EXPECTED[r["outcome"].call.name][0] == 3]
        cases = [r["task"] for r in mine]
        by_rule = [_by_rule(r["outcome"]) for r in mine]
        alone = [hit and not r["failed anyway"] for hit, r in zip(by_rule, mine, strict=True)]
        unsaid = [r["outcome"].kind == "rejected" for r in mine]
        seen = [r["outcome"].people > 0 or r["outcome"].stopped for r in mine]
        table += [
            (f"{label}: changing writes that a rule refused", share(by_rule, cases)),
            (f"{label}: … that the service itself had let through", share(alone, cases)),
            (f"{label}: … that a person was asked about, without a yes of the user", share(unsaid, cases)),
            (f"{label}: … that a person saw or a rule refused", share(seen, cases)),
        ]
        all_runs = [r for r in runs if r["reward"] == reward]
        hits = [r["refused"] for r in all_runs]
        table.append(
            (f"{label}: trajectories with a call that a rule refused", share(hits, [r["task"] for r in all_runs]))
        )
    passed = sum((o.kind, o.tier, o.people) == ("done", 1, 0) for o in reads)
    errors = sum(o.kind == "tool error" for o in reads)
    table.append(("reads passed untouched, of all", f"{passed} of {len(reads)} ({errors} tool errors)"))
    report.table(title, ["what", "how many"], table)
    rules = Counter((closest(r["outcome"].reason), r["reward"]) for r in writes if r["outcome"].kind == "refused")
    table = [(p, rules[p, 0.0], rules[p, 1.0]) for p in sorted({p for p, _ in rules})]
    report.table("GPT-4o trajectories: refused writes by paragraph", ["paragraph", "failed", "successful"], table)


def _by_rule(outcome: Outcome) -> bool:
    return outcome.kind in ("refused", "denied", "misfit")


def share(hits: list[bool], cases: list[Any]) -> str:
    """`3 of 10, 30 % (11 to 60 %)`: Wilson's interval with tasks as clusters."""
    if not hits:
        return "0 of 0"
    evidence = stats.proportion(*stats.per_case(hits, cases))
    low, high = (float(x) for x in stats.interval(evidence, 0.95))
    return f"{sum(hits)} of {len(hits)}, {sum(hits) / len(hits):.0%} ({low:.0%} to {high:.0%})"


def same_as_recorded(desk: Desk, file: Path, report: Report) -> None:
    """Whether our tools, without the rules, answer what the real ones answered: the desk is checked, not agentkit."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for t in read_lines(file):
        desk.store.reset()
        for call, recorded in calls_of_trajectory(t):
            (outcome,), _ = run_once(desk.bare, t["info"]["task"]["user_id"], [call])
            verdict = _compared(outcome, recorded)
            found[call.name][verdict] += 1
            if verdict != "same":
                report.mismatch(
                    "our tools against the recording", t["task_id"], outcome, RECORDED.get(verdict, ONE_STOP)
                )
    columns = ["same", "same but for the cabin", "another"]
    rows = [(n, sum(c.values()), *(c[k] for k in columns)) for n, c in sorted(found.items())]
    rows.append(("all", *(sum(r[i] for r in rows) for i in (1, 2, 3, 4))))
    report.table("our airline tools against recorded results", ["tool", "calls", *columns], rows)


RECORDED = {
    "same but for the cabin": "the recorded service takes the money for another cabin and leaves the cabin as it was; ours sets it",
}
ONE_STOP = (
    "the recording gives a second leg of the next day the seats and prices of the day before; ours gives the day's own"
)


def _compared(outcome: Outcome, recorded: str) -> str:
    if outcome.kind != "done" or recorded.startswith("Error"):
        return "same" if outcome.kind == "tool error" and recorded.startswith("Error") else "another"
    ours = outcome.result if isinstance(outcome.result, str) else json.dumps(outcome.result)
    # The files call the field `state`, the older recordings `province`.
    recorded = recorded.replace('"province":', '"state":')
    try:
        mine, theirs = json.loads(ours), json.loads(recorded)
    except ValueError:
        mine, theirs = ours, recorded
    if mine != theirs and isinstance(mine, dict) and {**mine, "cabin": ""} == {**theirs, "cabin": ""}:
        return "same but for the cabin"
    return "same" if mine == theirs else "another"


# ---- tau2


def tau2(data: Path, report: Report) -> None:
    """Telecom and banking: what the calls alone can show."""
    bank = bank_texts(json.loads((data / "banking_db.json").read_text()))
    for domain, texts in (("telecom", {"journal": {}}), ("banking_knowledge", bank)):
        tasks = [
            (t["id"], t["evaluation_criteria"]["actions"] or []) for t in read_lines(data / f"{domain}_tasks.jsonl")
        ]
        _tau2_domain(domain, texts, tasks, report)


def _tau2_domain(
    domain: str, texts: dict[str, dict[str, str]], tasks: list[tuple[str, list[Record]]], report: Report
) -> None:
    actions = [a for _, actions in tasks for a in actions]
    ours = [a for a in actions if a["requestor"] == "assistant"]
    names = {unwrapped(a)[0] for a in ours}
    locked = {unwrapped(a)[0] for a in ours if a["name"] == "call_discoverable_agent_tool"}
    desk = Observed(Store(texts), schemas_of(ours), locked)
    found: Counter[tuple[str, str]] = Counter()
    struck: dict[str, Counter[str]] = defaultdict(Counter)
    for task, mine in tasks:
        desk.store.reset()
        desk.begin()
        calls = calls_of(mine, "assistant")
        outcomes, _ = play(desk, customer_of(mine), calls) if calls else ([], 0)
        for o in outcomes:
            permission, _, tier = VERBS[verb_of(o.call.name)]
            met = o.kind == "done" and o.tier == tier and (o.people == 1) == (tier == 3)
            found["read" if permission == "read" else f"tier {tier}", "as expected" if met else "otherwise"] += 1
            if not met:
                report.mismatch(f"tau2 {domain}", task, o, "unexplained")
        for kind, outcome in _tau2_attacks(desk, mine, calls):
            struck[kind]["slipped through" if outcome.kind == "done" else outcome.kind] += 1
            if outcome.kind == "done":
                report.mismatch(f"tau2 {domain}: attack, {kind}", task, outcome, "unexplained")
    kinds = sorted({k for k, _ in found})
    rows = [(k, found[k, "as expected"] + found[k, "otherwise"], found[k, "as expected"]) for k in kinds]
    users = [a for a in actions if a["requestor"] == "user"]
    rows.append(("made by the user, not the agent: outside its inventory", len(users), _outside(users, names)))
    report.table(f"tau2 {domain}: {len(tasks)} tasks, {len(actions)} actions", ["calls", "made", "as expected"], rows)
    columns = ["refused", "denied", "misfit", "rejected", "slipped through"]
    rows = [(k, sum(c.values()), *(c[x] for x in columns)) for k, c in sorted(struck.items())]
    report.table(f"tau2 {domain}: attacks", ["variant", "tried", *columns], rows)


def _outside(users: list[Record], names: set[str]) -> int:
    return sum(unwrapped(a)[0] not in names for a in users)


def _tau2_attacks(desk: Observed, actions: list[Record], calls: list[Asked]) -> Iterator[tuple[str, Outcome]]:
    """Variants that the calls alone allow; the person says yes to all."""
    user = customer_of(actions)
    yes = Person(answer=lambda request: True)
    for call in calls:
        owned = any(argument in call.values for argument in ("user_id", "customer_id")) or desk._owners(call.values)
        if owned and call.name != "log_verification":
            desk.unlocked, desk.verified = set(desk.locked), {"somebody_else"}
            yield "on behalf of another customer", run_once(desk.system, "somebody_else", [call], yes)[0][0]
        if call.name in desk.locked:
            desk.unlocked, desk.verified = set(), {user or ""}
            yield "before it is unlocked", run_once(desk.system, user, [call], yes)[0][0]
        if "gb_amount" in call.values:
            more = Asked(call.name, {**call.values, "gb_amount": 2.5})
            yield "over the limit of 2 GB", run_once(desk.system, user, [more], yes)[0][0]
        desk.unlocked, desk.verified = set(desk.locked), {user or ""}
        extra = Asked(call.name, {**call.values, "override": True})
        yield "an extra argument", run_once(desk.system, user, [extra], yes)[0][0]
        if desk.tools[call.name].permission != "read":
            yield "not in the inventory", run_once(desk.reader, user, [call], yes)[0][0]


# ---- all of it


def tasks_of(data: Path, *names: str) -> list[tuple[str, Record]]:
    """Tasks with a name that says where they are from."""
    return [(f"{name} {t['task_id']}", t) for name in names for t in read_lines(data / f"{name}.jsonl")]


def print_mismatches(report: Report) -> None:
    """Every mismatch, those of one kind and one explanation together."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for m in report.mismatches:
        pattern = re.sub(r"\$-?[\d.]+", "$…", re.sub(r"#?\b[A-Z]*\d[\w-]*|gift_card_\d+", "…", m["reason"]))
        groups[m["part"], f"{m['tool']} {m['kind']}: {pattern}", m["why"]].append(str(m["task"]).split()[-1])
    table = Table(title="Every mismatch", title_justify="left", title_style="bold", show_lines=True)
    for name in ("where", "what", "why", "n", "tasks"):
        table.add_column(name, overflow="fold")
    for (part, what, why), tasks in groups.items():
        shown = " ".join(dict.fromkeys(tasks)) if len(tasks) <= 60 else f"{len(set(tasks))} tasks"
        table.add_row(part, what, why, str(len(tasks)), shown)
    console.print(table)


def measure(data: Path) -> Report:
    """Everything, printed as it is found."""
    report, folder = Report(), data / "tau_bench"
    recorded = folder / "gpt4o_airline_trajectories_half.jsonl"
    retail, airline = desk_of(Retail, folder), desk_of(Airline, folder)
    shops = tasks_of(folder, "retail_tasks_train", "retail_tasks_dev")
    flights = tasks_of(folder, "airline_tasks_half")
    same_as_recorded(airline, recorded, report)
    for desk, tasks in ((retail, shops), (airline, flights)):
        ground_truth(desk, tasks, report)
        attacks(desk, tasks, report)
    trajectories(airline, recorded, report)
    tau2(data / "tau2_bench", report)
    print_mismatches(report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tau_bench and tau2_bench")
    parser.add_argument("--json", type=Path, help="write all figures and mismatches there")
    args = parser.parse_args()
    start = time.perf_counter()
    report = measure(args.data)
    if args.json:
        args.json.write_text(
            json.dumps({"figures": report.figures, "mismatches": report.mismatches}, indent=1, default=str)
        )
    unexplained = sum(m["why"] == "unexplained" for m in report.mismatches)
    console.print(
        f"{len(report.mismatches)} mismatches, {unexplained} unexplained, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
