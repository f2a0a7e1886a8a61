"""tau2_bench: telecom and banking. No schemas, tool results or (telecom) records are given: only what calls were right.

So nothing here is done to records. The tools are made from the names and arguments that occur, the tiers are our own
table by verb, and the rules are those that can be checked without knowing what a tool does: whose account it is, that
the customer's identity was logged first, that a tool was unlocked before it is called, the two limits the policy states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from tau_desk import Asked, Breaches, Desk, Record, Store, Values

from agentkit.autonomy import Criticality, Permission
from agentkit.tools import ToolOptions

MONEY_OR_FINAL = (
    "activate", "apply", "approve", "clear", "close", "file", "open", "order", "pay", "request", "reset", "submit",
    "transfer_funds", "unfreeze",
)  # fmt: skip
# First word of the name, with what it does: permission, criticality, and the tier that follows outside production.
VERBS: dict[str, tuple[Permission, Criticality, int]] = {
    "get": ("read", "low", 1),
    "log": ("write", "low", 1),  # an entry in the bank's own books
    "unlock": ("execute", "low", 2),  # widens what the agent may do: people hear of it
    "give": ("execute", "low", 2),
    "transfer_to_human": ("write", "medium", 2),
    "initial_transfer": ("write", "medium", 2),
    "emergency": ("write", "medium", 2),
    "freeze": ("write", "medium", 2),  # protects, and can be undone
    "enable": ("write", "medium", 2),  # "you should enable it at no cost for the user"
    "refuel": ("write", "high", 3),  # costs money: "Confirm the price"
    **dict.fromkeys(MONEY_OR_FINAL, ("write", "high", 3)),
}
MOST_GB = 2.0  # "The maximum amount of data that can be refueled is 2GB."
VERIFIED = "banking, internal procedures: verify customer identity"
UNLOCKED = "banking tasks: a discoverable tool is unlocked before it is called"
OWN = "the account belongs to somebody else"
JSON_TYPES = {
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
DISPATCHERS = ("call_discoverable_agent_tool", "call_discoverable_user_tool")
OWNED = {  # argument: table of the bank's records that says whose it is
    "account_id": "accounts",
    "source_account_id": "accounts",
    "destination_account_id": "accounts",
    "checking_account_id": "accounts",
    "credit_card_account_id": "credit_card_accounts",
    "card_id": "debit_cards",
    "user_id": "users",
}


def verb_of(name: str) -> str:
    """The longest entry of `VERBS` that the name begins with."""
    return max((v for v in VERBS if name.startswith(v)), key=len, default="")


def unwrapped(action: Record) -> tuple[str, Record]:
    """Name and arguments of the call itself: a dispatcher hides them in a string, where no rule would see them."""
    name, values = action["name"], action["arguments"]
    if name not in DISPATCHERS:
        return name, values
    inner = values.get("agent_tool_name") or values["discoverable_tool_name"]
    found: Record = json.loads(values.get("arguments") or "{}")
    return inner, found


def schemas_of(actions: Iterable[Record]) -> list[Record]:
    """Function schemas guessed from calls: every argument that occurs, required where it always does."""
    seen: dict[str, list[Record]] = {}
    for action in actions:
        name, values = unwrapped(action)
        seen.setdefault(name, []).append(values)
    return [_schema(name, calls) for name, calls in seen.items()]


def _schema(name: str, calls: list[Record]) -> Record:
    types: dict[str, list[str]] = {}
    for values in calls:
        for key, value in values.items():
            types[key] = sorted({*types.get(key, []), JSON_TYPES[type(value)]})
    required = [key for key in types if all(key in values for values in calls)]
    properties = {key: {"type": kinds} for key, kinds in types.items()}
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"function": {"name": name, "description": f"{name} (made from its calls)", "parameters": parameters}}


class Observed(Desk):
    """Tools known only by their calls; each writes a line into a journal and nothing else."""

    name = "tau2"
    unlocked: set[str]  # names that this task's agent may call by now
    verified: set[str]  # users whose identity has been logged

    def __init__(self, store: Store, schemas: list[Record], locked: Iterable[str] = ()) -> None:
        self.locked = frozenset(locked)
        self.begin()
        super().__init__(store, schemas)

    def begin(self) -> None:
        """A new conversation."""
        self.unlocked, self.verified = set(), set()

    def options_of(self, name: str) -> ToolOptions:
        permission, criticality, _ = VERBS[verb_of(name)]
        return {"permission": permission, "criticality": criticality}

    def function_of(self, name: str) -> Callable[..., Any]:
        def note(**values: Any) -> str:
            number = str(len(self.store.keys("journal")))
            self.store.put("journal", number, {"tool": name, "values": values})
            if name == "log_verification":
                self.verified.add(values["user_id"])
            if opened := values.get("agent_tool_name") or values.get("discoverable_tool_name"):
                self.unlocked.add(opened)
            return "noted"

        return note

    def rules_of(self, name: str) -> Callable[[Values, str | None], Breaches]:
        def rules(values: Values, user: str | None) -> Breaches:
            if name in self.locked and name not in self.unlocked:
                yield UNLOCKED, f"{name} has not been unlocked"
            if not values.get("gb_amount", 0) <= MOST_GB:
                yield "telecom, data refueling", f"{values['gb_amount']} GB; at most {MOST_GB} may be added"
            if values.get("customer_id", user) != user:
                yield OWN, f"customer {values['customer_id']} is not {user!r}"
            for argument, owner in self._owners(values):
                if owner != user:
                    yield OWN, f"{argument} {values[argument]} is of {owner!r}, not {user!r}"
            touches = any(a in values for a in OWNED) and name != "log_verification"
            if touches and VERBS[verb_of(name)][0] != "read" and user not in self.verified:
                yield VERIFIED, f"the identity of {user!r} has not been logged"

        return rules

    def _owners(self, values: Values) -> list[tuple[str, str]]:
        found = []
        for argument, table in OWNED.items():
            if argument in values and (owner := self._owner(table, values[argument])):
                found.append((argument, owner))
        return found

    def _owner(self, table: str, key: str) -> str | None:
        record = self.store.get(table, key) if table in self.store.tables else None
        if record is None:
            return key if table == "users" else None
        owner: str | None = record.get("user_id")
        return owner


def bank_texts(bank: Record) -> dict[str, dict[str, str]]:
    """The bank's records as tables of texts, with an empty journal."""
    tables = {table: {key: json.dumps(row) for key, row in rows["data"].items()} for table, rows in bank.items()}
    return {**tables, "journal": {}}


def customer_of(actions: Iterable[Record]) -> str | None:
    """Who the conversation is with: the user whose identity is logged, else the first one an action names."""
    actions = list(actions)
    logged = [a["arguments"]["user_id"] for a in actions if a["name"] == "log_verification"]
    named = [v.get("user_id") or v.get("customer_id") for _, v in map(unwrapped, actions)]
    return next(iter([*logged, *filter(None, named)]), None)


def calls_of(actions: Iterable[Record], requestor: str) -> list[Asked]:
    """The calls one side makes, unwrapped, in order."""
    return [Asked(*unwrapped(a)) for a in actions if a["requestor"] == requestor]
