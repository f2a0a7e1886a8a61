"""Telecom and banking (tau2-bench): calls without a database, and attacks that the calls alone allow."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from tau_desk import Asked, Outcome, Person, Record, Store, play, read_lines, run_once
from tau_report import Report
from tau_telecom import VERBS, Observed, bank_texts, calls_of, customer_of, schemas_of, unwrapped, verb_of


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
