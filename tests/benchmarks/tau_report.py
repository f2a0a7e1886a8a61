"""What the parts of the tau benchmark share: what each write's policy asks for, tables, the list of mismatches."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from tau_desk import Outcome

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

    def show_mismatches(self) -> None:
        """Every mismatch, those of one kind and one explanation together."""
        groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for m in self.mismatches:
            pattern = re.sub(r"\$-?[\d.]+", "$…", re.sub(r"#?\b[A-Z]*\d[\w-]*|gift_card_\d+", "…", m["reason"]))
            groups[m["part"], f"{m['tool']} {m['kind']}: {pattern}", m["why"]].append(str(m["task"]).split()[-1])
        table = Table(title="Every mismatch", title_justify="left", title_style="bold", show_lines=True)
        for name in ("where", "what", "why", "n", "tasks"):
            table.add_column(name, overflow="fold")
        for (part, what, why), tasks in groups.items():
            shown = " ".join(dict.fromkeys(tasks)) if len(tasks) <= 60 else f"{len(set(tasks))} tasks"
            table.add_row(part, what, why, str(len(tasks)), shown)
        console.print(table)


def share(hits: list[bool], cases: list[Any]) -> str:
    """`3 of 10, 30 % (11 to 60 %)`: Wilson's interval with tasks as clusters."""
    if not hits:
        return "0 of 0"
    evidence = stats.proportion(*stats.per_case(hits, cases))
    low, high = (float(x) for x in stats.interval(evidence, 0.95))
    return f"{sum(hits)} of {len(hits)}, {sum(hits) / len(hits):.0%} ({low:.0%} to {high:.0%})"
