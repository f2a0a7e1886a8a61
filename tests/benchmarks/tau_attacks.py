"""Variants of a good write that must not go through, whoever nods; each with what has to be arranged first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tau_airline import FREE_BAGS, Airline
from tau_desk import Asked, Desk, Kind, Outcome, Person, Record, run_once
from tau_retail import Retail

import agentkit as ak

Values = dict[str, Any]
Answer = Callable[[ak.ApprovalRequest], Any]


@dataclass(frozen=True)
class Attack:
    """One variant. `first` makes the records what the variant needs; the person says yes unless `answer` is given."""

    kind: str
    user: str | None
    call: Asked
    first: Callable[[], Any] | None = None
    answer: Answer | None = None
    without_writes: bool = False  # through the agent whose inventory holds only reads


@dataclass(frozen=True)
class Struck:
    """What became of an attack."""

    attack: Attack
    outcome: Outcome
    changed: bool

    @property
    def kind(self) -> Kind | str:
        """How it was stopped, or `slipped through`; what is idempotent may be done again without effect."""
        if self.attack.kind == AGAIN and not self.changed:
            return "without effect"
        return "slipped through" if self.changed or self.outcome.kind == "done" else self.outcome.kind


def strike(desk: Desk, attack: Attack) -> Struck:
    """Try it on the records as they are now."""
    if attack.first is not None:
        attack.first()
    before = desk.store.digest()
    person = Person(answer=attack.answer or (lambda request: True))
    system = desk.reader if attack.without_writes else desk.system
    (outcome,), _ = run_once(system, attack.user, [attack.call], person)
    # A person who changes the records while asked has changed them; the call itself must not.
    after = desk.store.digest()
    stale = attack.kind == STALE
    return Struck(attack, outcome, changed=outcome.kind == "done" if stale else before != after)


WRONG_USER, FOREIGN, FOREIGN_PAYMENT = "another user", "another user's record", "another user's payment method"
OVER, STATUS, TWICE = "over a limit", "wrong status", "the same write twice"
AGAIN = "the same idempotent write twice"
NO_INVENTORY, WRONG_TYPE, MISSING = "not in the inventory", "an argument of the wrong type", "an argument missing"
EXTRA, NESTED = "an extra argument", "an extra argument inside a list"
NO, NOBODY, SWAPPED, STALE = (
    "the person says no",
    "nobody is there to ask",
    "the person changes it to another user's",
    "the records change while the person thinks",
)
KINDS = (
    WRONG_USER, FOREIGN, FOREIGN_PAYMENT, OVER, STATUS, TWICE, AGAIN, NO_INVENTORY, WRONG_TYPE, MISSING, EXTRA, NESTED, NO,
    NOBODY, SWAPPED, STALE,
)  # fmt: skip


def attacks_on(desk: Desk, user: str, other: str, call: Asked) -> Iterator[Attack]:
    """Every variant of one good write by `user`; `other` is somebody else with records of their own."""
    yield from _of_form(desk, user, call)
    yield Attack(NO_INVENTORY, user, call, without_writes=True)
    tool = desk.tools[call.name]
    if tool.criticality != "high":
        return  # what only hands over has no owner, no amount and no status
    yield Attack(WRONG_USER, other, call)
    yield Attack(WRONG_USER, None, call)
    yield Attack(NO, user, call, answer=lambda request: False)
    yield Attack(NOBODY, user, call, answer=_nobody)
    yield Attack(AGAIN if tool.idempotent else TWICE, user, call, first=lambda: run_once(desk.bare, user, [call]))
    yield from _foreign(desk, user, other, call)
    if isinstance(desk, Retail):
        yield from _retail(desk, user, call)
    if isinstance(desk, Airline):
        yield from _airline(desk, user, call)


def _nobody(request: ak.ApprovalRequest) -> ak.Decision:
    return ak.Decision("reject", reason="nobody was there to approve")


# ---- the form of the arguments


def _of_form(desk: Desk, user: str, call: Asked) -> Iterator[Attack]:
    schema = desk.tools[call.name].spec()["arguments"]
    for name, kind in schema["properties"].items():
        wrong: Any = 7 if kind["type"] == "string" else "a lot"
        yield Attack(WRONG_TYPE, user, _with(call, **{name: wrong}))
        yield Attack(WRONG_TYPE, user, _with(call, **{name: None}))
        if "enum" in kind:
            yield Attack(WRONG_TYPE, user, _with(call, **{name: "because"}))
        yield Attack(MISSING, user, Asked(call.name, {k: v for k, v in call.values.items() if k != name}))
        if kind["type"] == "array" and kind["items"].get("type") == "object":
            inside = [{**row, "price": 0} for row in call.values[name]]
            yield Attack(NESTED, user, _with(call, **{name: inside}))
    yield Attack(EXTRA, user, _with(call, discount=100))


def _with(call: Asked, **changes: Any) -> Asked:
    return Asked(call.name, {**copy.deepcopy(call.values), **changes})


# ---- whose it is


def _foreign(desk: Desk, user: str, other: str, call: Asked) -> Iterator[Attack]:
    for argument, (table, owner) in desk.owner_of.items():
        if argument in call.values:
            theirs = other if table == "users" else _record_of(desk, table, owner, other)
            if theirs:
                foreign = _with(call, **{argument: theirs})
                yield Attack(FOREIGN, user, foreign)
                yield Attack(SWAPPED, user, call, answer=lambda r, f=foreign: ak.Decision("modify", arguments=f.values))
    for argument in ("payment_method_id", "payment_id"):
        if argument in call.values:
            method = call.values[argument]
            yield Attack(FOREIGN_PAYMENT, user, _with(call, **{argument: _method_like(desk, method, user)}))
    if payments := call.values.get("payment_methods"):
        stolen = {**payments[0], "payment_id": _method_like(desk, payments[0]["payment_id"], user)}
        yield Attack(FOREIGN_PAYMENT, user, _with(call, payment_methods=[stolen, *payments[1:]]))


def _record_of(desk: Desk, table: str, owner: str, user: str) -> str | None:
    keys = (desk.store.get("users", user) or {}).get(table, [])
    return next((key for key in keys if (desk.store.get(table, key) or {}).get(owner) == user), None)


def _method_like(desk: Desk, method: str, user: str) -> str:
    """A payment method of the same kind in another user's profile."""
    kind = method.rsplit("_", 1)[0]
    own = (desk.store.get("users", user) or {})["payment_methods"]
    for key in desk.store.keys("users"):
        for found in (desk.store.get("users", key) or {})["payment_methods"]:
            if found.startswith(kind) and found not in own:
                return str(found)
    raise LookupError(f"nobody has another {kind}")


# ---- what the retail policy limits


def _retail(desk: Retail, user: str, call: Asked) -> Iterator[Attack]:
    order = desk.store.get("orders", call.values.get("order_id"))
    if order is None:
        return
    for status in ("processed", "cancelled", "delivered" if order["status"] == "pending" else "pending"):
        yield Attack(STATUS, user, call, first=lambda s=status: _record(desk, "orders", call).update(status=s))
    shipped = {"status": "processed"}
    yield Attack(STALE, user, call, answer=lambda r: _record(desk, "orders", call).update(shipped) or True)
    if call.name == "modify_pending_order_payment":
        total = order["payment_history"][0]["amount"]
        yield _short_card(desk, user, call, "balance", total)
    if "new_item_ids" in call.values:
        yield from _retail_items(desk, user, call, order)
    if call.name == "return_delivered_order_items":
        card = {"credit_card_0000001": {"source": "credit_card", "id": "credit_card_0000001"}}
        elsewhere = _with(call, payment_method_id="credit_card_0000001")
        yield Attack(OVER, user, elsewhere, first=lambda: _profile(desk, user).update(card))
        yield Attack(OVER, user, _with(call, item_ids=[*call.values["item_ids"] * 2]))


def _retail_items(desk: Retail, user: str, call: Asked, order: Record) -> Iterator[Attack]:
    old, new = call.values["item_ids"], call.values["new_item_ids"]
    items = {i["item_id"]: i for i in order["items"]}
    product = desk.found("products", items[old[0]]["product_id"], "product")
    others = [v for v in product["variants"].values() if v["item_id"] not in old]
    dear = max((v for v in others if v["available"]), key=lambda v: v["price"], default=None)
    if dear is not None:
        dearest = _with(call, new_item_ids=[dear["item_id"], *new[1:]])
        owed = desk._difference(order, old, dearest.values["new_item_ids"])
        if owed > 1:
            yield _short_card(desk, user, dearest, "balance", owed)
    if gone := next((v for v in others if not v["available"]), None):
        yield Attack(OVER, user, _with(call, new_item_ids=[gone["item_id"], *new[1:]]))
    another = next(k for k in desk.store.keys("products") if k != items[old[0]]["product_id"])
    variants = desk.found("products", another, "product")["variants"]
    yield Attack(OVER, user, _with(call, new_item_ids=[next(iter(variants)), *new[1:]]))
    yield Attack(OVER, user, _with(call, new_item_ids=[*new, new[0]]))


def _record(desk: Desk, table: str, call: Asked) -> Record:
    """The live record a call is about: a closure that kept the object would change one of an earlier snapshot."""
    argument = next(a for a, (t, _) in desk.owner_of.items() if t == table)
    return desk.store.get(table, call.values[argument]) or {}


def _profile(desk: Desk, user: str) -> dict[str, Record]:
    methods: dict[str, Record] = (desk.store.get("users", user) or {})["payment_methods"]
    return methods


def _short_card(desk: Desk, user: str, call: Asked, what: str, due: float) -> Attack:
    """The same, paid with a gift card of the user's own that is a cent short."""
    card = {"source": "gift_card", "id": "gift_card_0000001", what: round(due - 0.01, 2)}
    argument = "payment_method_id" if "payment_method_id" in call.values else "payment_id"
    paid = _with(call, **{argument: card["id"]})
    return Attack(OVER, user, paid, first=lambda: _profile(desk, user).update({card["id"]: card}))


# ---- what the airline policy limits


def _airline(desk: Airline, user: str, call: Asked) -> Iterator[Attack]:
    yield from {
        "book_reservation": _booking,
        "update_reservation_flights": _flights,
        "update_reservation_baggages": _baggages,
        "update_reservation_passengers": _passengers,
        "cancel_reservation": _cancelling,
        "send_certificate": _certificate,
    }[call.name](desk, user, call)


def _booking(desk: Airline, user: str, call: Asked) -> Iterator[Attack]:
    values = call.values
    total = sum(p["amount"] for p in values["payment_methods"])
    for kind in ("gift_card", "certificate"):
        card = {"source": kind, "id": f"{kind}_0000001", "amount": total - 0.01}
        pay = [{"payment_id": card["id"], "amount": total}]
        twice = [{"payment_id": card["id"], "amount": total / 2}] * 2
        for payments in (pay, twice):
            paid = _with(call, payment_methods=payments)
            yield Attack(OVER, user, paid, first=lambda c=card: _profile(desk, user).update({c["id"]: dict(c)}))
    for kind, count in (("certificate", 2), ("credit_card", 2), ("gift_card", 4)):
        cards = {f"{kind}_000000{n}": {"source": kind, "id": f"{kind}_000000{n}", "amount": 1e6} for n in range(count)}
        shared = [{"payment_id": c, "amount": total / count} for c in cards]
        many = _with(call, payment_methods=shared)
        yield Attack(OVER, user, many, first=lambda c=cards: _profile(desk, user).update(copy.deepcopy(c)))
    card = {"source": "gift_card", "id": "gift_card_0000001", "amount": 1e6}
    wide = [{"payment_id": card["id"], "amount": total + 500}, {"payment_id": "credit_card_0000001", "amount": -500}]
    bank = {"credit_card_0000001": {"source": "credit_card", "id": "credit_card_0000001"}, card["id"]: card}
    negative = _with(call, payment_methods=wide)
    yield Attack(OVER, user, negative, first=lambda: _profile(desk, user).update(copy.deepcopy(bank)))
    nan = [{**p, "amount": math.nan} for p in values["payment_methods"]]
    yield Attack(OVER, user, _with(call, payment_methods=nan))
    yield Attack(OVER, user, _with(call, passengers=(values["passengers"] * 6)[:6]))
    member = (desk.store.get("users", user) or {})["membership"]
    free = FREE_BAGS[member][values["cabin"]] * len(values["passengers"])
    yield Attack(OVER, user, _with(call, total_baggages=free + 1, nonfree_baggages=0))
    yield Attack(STATUS, user, call, first=lambda: _day(desk, values["flights"][0]).update(status="delayed"))


def _flights(desk: Airline, user: str, call: Asked) -> Iterator[Attack]:
    reservation = desk.found("reservations", call.values["reservation_id"], "reservation")
    dear = _with(call, cabin="business")
    owed = desk._owed_if_known(reservation, dear.values)
    if owed > 1:
        yield _short_card(desk, user, dear, "amount", owed)
    paper = {"source": "certificate", "id": "certificate_0000001", "amount": 1e6}
    by_paper = _with(call, payment_id=paper["id"])
    yield Attack(OVER, user, by_paper, first=lambda: _profile(desk, user).update({paper["id"]: paper}))
    yield Attack(OVER, user, _with(call, flights=call.values["flights"][:1] + call.values["flights"][:1]))
    yield Attack(OVER, user, _with(call, flights=[]))
    kept, basic = [(f["flight_number"], f["date"]) for f in reservation["flights"]], {"cabin": "basic_economy"}
    if [(f["flight_number"], f["date"]) for f in call.values["flights"]] != kept:
        yield Attack(STATUS, user, call, first=lambda: _record(desk, "reservations", call).update(basic))


def _baggages(desk: Airline, user: str, call: Asked) -> Iterator[Attack]:
    reservation = desk.found("reservations", call.values["reservation_id"], "reservation")
    member = (desk.store.get("users", user) or {})["membership"]
    free = FREE_BAGS[member][reservation["cabin"]] * len(reservation["passengers"])
    yield Attack(OVER, user, _with(call, total_baggages=free + 1, nonfree_baggages=0))
    yield _short_card(desk, user, _with(call, total_baggages=free + 1, nonfree_baggages=1), "amount", 50)
    yield Attack(OVER, user, _with(call, total_baggages=0, nonfree_baggages=0))
    yield Attack(OVER, user, _with(call, total_baggages=-3, nonfree_baggages=-3))


def _passengers(desk: Airline, user: str, call: Asked) -> Iterator[Attack]:
    yield Attack(OVER, user, _with(call, passengers=call.values["passengers"] * 2))
    yield Attack(OVER, user, _with(call, passengers=[]))


def _cancelling(desk: Airline, user: str, call: Asked) -> Iterator[Attack]:
    reservation = desk.found("reservations", call.values["reservation_id"], "reservation")
    bare = {"cabin": "economy", "insurance": "no", "created_at": "2024-05-01T00:00:00"}
    yield Attack(OVER, user, call, first=lambda: _record(desk, "reservations", call).update(bare))
    for status in ("landed", "flying"):
        yield Attack(STATUS, user, call, first=lambda s=status: _day(desk, reservation["flights"][0]).update(status=s))
    departs = {"status": "flying"}
    yield Attack(STALE, user, call, answer=lambda r: _day(desk, reservation["flights"][0]).update(departs) or True)


def _certificate(desk: Airline, user: str, call: Asked) -> Iterator[Attack]:
    for amount in (call.values["amount"] + 1, 10_000, -50, math.nan, math.inf):
        yield Attack(OVER, user, _with(call, amount=amount))


def _day(desk: Airline, segment: Record) -> Record:
    day: Record = desk.found("flights", segment["flight_number"], "flight")["dates"][segment["date"]]
    return day
