"""Calls that GPT-4o really made at the airline desk, through the same governed tools."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from tau_desk import Asked, Desk, Outcome, Record, closest, play, read_lines, run_once
from tau_report import EXPECTED, Report, share

CONFIRMS = re.compile(
    r"\b(yes|oui|ok(ay)?|sure|confirm\w*|proceed|go ahead|agree|(looks|is) (good|perfect|correct))\b", re.I
)
FALSE_ALARMS = {
    "airline, cancel flight 2": "as in the ground truth: basic economy upgraded, then cancelled without insurance",
    "airline, cancel flight 3": "as in the ground truth: a reservation already flown",
    "airline, refund 2": "as in the ground truth: a certificate for a delay without a change",
    "airline, modify flight 6": "no harm: the service refused the same call, and the model tried another method",
    "airline, book flight 3": "no harm: the service refused the same call, and the model tried another method",
}
RECORDED = {
    "same but for the cabin": "the recorded service takes the money for another cabin and leaves the cabin as it was; ours sets it",
}
ONE_STOP = (
    "the recording gives a second leg of the next day the seats and prices of the day before; ours gives the day's own"
)


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
