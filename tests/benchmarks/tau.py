"""Real cases: the ground truth of tau-bench and tau2-bench, attacks on it, and real GPT-4o calls, through governed tools.

    python tests/benchmarks/tau.py --data ../shared/data [--json out.json]

About a minute. The desks (tau_retail.py, tau_airline.py, tau_telecom.py) write the policies as tools' checks; nothing
of the data is in the repository. Every call goes through `System.run` and `Run.call`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
if __name__ == "__main__":  # the tests have a home of their own
    os.environ["AGENTKIT_TRACES"] = "off"
    os.environ["AGENTKIT_HOME"] = tempfile.mkdtemp(prefix="agentkit-tau-")

from rich.progress import track
from tau_airline import Airline
from tau_attacks import KINDS, STALE, attacks_on, strike
from tau_desk import Asked, Desk, Outcome, Record, Store, closest, play, read_lines, run_once, texts_of
from tau_observed import tau2
from tau_report import EXPECTED, Report, console
from tau_retail import Retail, prescribed_reads
from tau_trajectories import same_as_recorded, trajectories

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


# ---- all of it


def tasks_of(data: Path, *names: str) -> list[tuple[str, Record]]:
    """Tasks with a name that says where they are from."""
    return [(f"{name} {t['task_id']}", t) for name in names for t in read_lines(data / f"{name}.jsonl")]


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
    report.show_mismatches()
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
