"""The desks of the tau-bench replay, on made-up records of the same shape: the benchmark itself needs ../shared."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from tau import Report as TauReport
from tau import ground_truth
from tau_airline import Airline
from tau_attacks import STALE, Attack, attacks_on, strike
from tau_desk import Asked, Desk, Person, Store, closed, play, run_once
from tau_report import share
from tau_retail import Failed, Retail, arithmetic, prescribed_reads
from tau_telecom import Observed, calls_of, customer_of, schemas_of, unwrapped, verb_of
from tau_trajectories import calls_of_trajectory

TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
YES = Person(answer=lambda request: True)


def schema(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"{name}.", "parameters": parameters}}


def stored(**tables: dict[str, Any]) -> Store:
    return Store({table: {key: json.dumps(row) for key, row in rows.items()} for table, rows in tables.items()})


def order(user: str, status: str, method: str) -> dict[str, Any]:
    paid = {"transaction_type": "payment", "amount": 30.0, "payment_method_id": method}
    item = {"item_id": "pen-1", "product_id": "pen", "price": 30.0, "options": {}, "name": "pen"}
    return {"user_id": user, "status": status, "items": [item], "payment_history": [paid], "address": {}}


@pytest.fixture
def retail() -> Retail:
    def user(name: str, number: str, orders: list[str]) -> dict[str, Any]:
        gift = {"source": "gift_card", "id": f"gift_card_{number}", "balance": 5.0}
        card = {"source": "credit_card", "id": f"credit_card_{number}"}
        person = {"first_name": name, "last_name": "Roe"}
        methods = {m["id"]: m for m in (gift, card)}
        home = {"email": f"{name}@x", "address": {"zip": "1"}, "orders": orders}
        return {"name": person, "payment_methods": methods, **home}

    variants = {
        "pen-1": {"item_id": "pen-1", "available": True, "price": 30.0, "options": {}},
        "pen-2": {"item_id": "pen-2", "available": True, "price": 34.0, "options": {}},
        "pen-3": {"item_id": "pen-3", "available": False, "price": 31.0, "options": {}},
    }
    ink = {"ink-1": {"item_id": "ink-1", "available": True, "price": 1.0, "options": {}}}
    orders = {
        "#1": order("ann", "pending", "credit_card_1"),
        "#2": order("ann", "delivered", "credit_card_1"),
        "#3": order("bob", "pending", "credit_card_2"),
    }
    store = stored(
        users={"ann": user("ann", "1", ["#1", "#2"]), "bob": user("bob", "2", ["#3"])},
        orders=orders,
        products={"pen": {"variants": variants}, "ink": {"variants": ink}},
    )
    swap = {"order_id": TEXT, "item_ids": TEXTS, "new_item_ids": TEXTS, "payment_method_id": TEXT}
    reason = {"type": "string", "enum": ["no longer needed", "ordered by mistake"]}
    schemas = [
        schema("find_user_id_by_email", email=TEXT),
        schema("find_user_id_by_name_zip", first_name=TEXT, last_name=TEXT, zip=TEXT),
        schema("get_user_details", user_id=TEXT),
        schema("get_order_details", order_id=TEXT),
        schema("get_product_details", product_id=TEXT),
        schema("cancel_pending_order", order_id=TEXT, reason=reason),
        schema("modify_pending_order_items", **swap),
        schema("modify_pending_order_payment", order_id=TEXT, payment_method_id=TEXT),
        schema("exchange_delivered_order_items", **swap),
        schema("return_delivered_order_items", order_id=TEXT, item_ids=TEXTS, payment_method_id=TEXT),
        schema("transfer_to_human_agents", summary=TEXT),
    ]
    return Retail(store, schemas)


GOOD = {
    "cancel": Asked("cancel_pending_order", {"order_id": "#1", "reason": "no longer needed"}),
    "modify items": Asked(
        "modify_pending_order_items",
        {"order_id": "#1", "item_ids": ["pen-1"], "new_item_ids": ["pen-2"], "payment_method_id": "gift_card_1"},
    ),
    "exchange": Asked(
        "exchange_delivered_order_items",
        {"order_id": "#2", "item_ids": ["pen-1"], "new_item_ids": ["pen-2"], "payment_method_id": "credit_card_1"},
    ),
    "return": Asked(
        "return_delivered_order_items",
        {"order_id": "#2", "item_ids": ["pen-1"], "payment_method_id": "credit_card_1"},
    ),
    "hand over": Asked("transfer_to_human_agents", {"summary": "wants a person"}),
}


def survivors(desk: Desk, user: str, other: str, call: Asked) -> Iterator[tuple[Attack, Any]]:
    """Attacks that were not stopped, but for the one that agentkit is known to miss."""
    snapshot = desk.store.snapshot()
    variants = attacks_on(desk, user, other, call)
    while (attack := next(variants, None)) is not None:
        struck = strike(desk, attack)
        if attack.kind != STALE and struck.kind in ("slipped through", "tool error", "not reached"):
            yield attack, struck.outcome
        desk.store.restore(snapshot)


# --- retail --------------------------------------------------------------------------------------------------------


def test_reads_pass_untouched(retail: Retail) -> None:
    reads = [Asked(*r) for r in prescribed_reads(retail, "ann", [(c.name, c.values) for c in GOOD.values()])]
    outcomes, runs = play(retail, "ann", reads)
    assert {(o.kind, o.tier, o.people) for o in outcomes} == {("done", 1, 0)}
    assert {o.call.name for o in outcomes} >= {"find_user_id_by_email", "get_order_details", "get_product_details"}
    assert (runs, retail.store.digest()) == (1, Store({}).digest())


@pytest.mark.parametrize("call", [c for n, c in GOOD.items() if n != "hand over"], ids=lambda c: c.name)
def test_a_write_waits_for_a_person_and_is_then_made(retail: Retail, call: Asked) -> None:
    before = retail.store.digest()
    (outcome,), record = run_once(retail.system, "ann", [call])
    assert (outcome.kind, outcome.tier, outcome.people, record.state) == ("done", 3, 1, "DONE")
    assert retail.store.digest() != before
    retail.store.reset()
    assert retail.store.digest() == before


def test_handing_over_asks_nobody_and_tells_people(retail: Retail) -> None:
    (outcome,), _ = run_once(retail.system, "ann", [GOOD["hand over"]])
    assert (outcome.kind, outcome.tier, outcome.people) == ("done", 2, 0)


@pytest.mark.parametrize("call", GOOD.values(), ids=lambda c: c.name)
def test_no_variant_of_a_good_retail_write_goes_through(retail: Retail, call: Asked) -> None:
    assert list(survivors(retail, "ann", "bob", call)) == []


def test_a_write_is_checked_again_after_the_person_has_thought(retail: Retail) -> None:
    (stale,) = (a for a in attacks_on(retail, "ann", "bob", GOOD["cancel"]) if a.kind == STALE)
    assert strike(retail, stale).kind == "refused"


def test_after_a_refusal_the_rest_is_played_on_the_records_of_the_data(retail: Retail) -> None:
    same = Asked("modify_pending_order_items", {**GOOD["modify items"].values, "new_item_ids": ["pen-1"]})
    outcomes, runs = play(retail, "ann", [same, GOOD["return"], GOOD["cancel"]])
    assert [o.kind for o in outcomes] == ["refused", "done", "refused"]
    assert "not another one [retail, modify items 2]" in outcomes[0].reason
    assert "the order is 'pending (items modified)'" in outcomes[2].reason  # the refused change was made all the same
    assert runs == 2


def test_the_report_explains_what_the_data_do_otherwise(retail: Retail) -> None:
    same = {**GOOD["modify items"].values, "new_item_ids": ["pen-1"]}
    actions = [{"name": "modify_pending_order_items", "kwargs": same}]
    report = TauReport()
    ground_truth(retail, [("made up 0", {"user_id": "ann", "actions": actions})], report)
    (mismatch,) = report.mismatches
    assert (mismatch["kind"], mismatch["why"][:31]) == ("refused", "data: the task swaps an item fo")


# --- airline -------------------------------------------------------------------------------------------------------


@pytest.fixture
def airline() -> Airline:
    seats = {"basic_economy": 9, "economy": 9, "business": 9}
    prices = {"basic_economy": 50, "economy": 100, "business": 300}
    day = {"status": "available", "available_seats": seats, "prices": prices}
    times = {"scheduled_departure_time_est": "06:00:00", "scheduled_arrival_time_est": "07:00:00"}
    ends = {"origin": "SFO", "destination": "LAX"}
    flights = {n: {"flight_number": n, **ends, **times, "dates": {"2024-05-20": day}} for n in ("A1", "A2")}
    late = {"status": "delayed"}
    flights["A3"] = {"flight_number": "A3", **ends, **times, "dates": {"2024-05-15": late}}

    def reservation(user: str, flight: str, date: str, cabin: str) -> dict[str, Any]:
        segment = {"flight_number": flight, "date": date, "price": 100, **ends}
        people = [{"first_name": "A", "last_name": "B", "dob": "1990-01-01"}]
        bags = {"total_baggages": 0, "nonfree_baggages": 0, "insurance": "yes", "flight_type": "one_way"}
        paid = [{"payment_id": "credit_card_1", "amount": 100}]
        trip = {"flights": [segment], "passengers": people, "payment_history": paid, "cabin": cabin, **ends, **bags}
        return {"user_id": user, "created_at": "2024-05-01T00:00:00", **trip}

    def user(number: str, reservations: list[str]) -> dict[str, Any]:
        methods = [
            {"source": "credit_card", "id": f"credit_card_{number}"},
            {"source": "gift_card", "id": f"gift_card_{number}", "amount": 500},
        ]
        keyed = {m["id"]: m for m in methods}
        return {"membership": "regular", "payment_methods": keyed, "reservations": reservations}

    store = stored(
        users={"ann": user("1", ["R1", "R3"]), "bob": user("2", ["R2"])},
        flights=flights,
        reservations={
            "R1": reservation("ann", "A1", "2024-05-20", "economy"),
            "R2": reservation("bob", "A1", "2024-05-20", "economy"),
            "R3": reservation("ann", "A3", "2024-05-15", "economy"),
        },
    )
    leg = {"type": "object", "properties": {"flight_number": TEXT, "date": TEXT}, "required": ["flight_number", "date"]}
    whole = {"type": "integer"}
    legs = {"type": "array", "items": leg}
    schemas = [
        schema("get_reservation_details", reservation_id=TEXT),
        schema("cancel_reservation", reservation_id=TEXT),
        schema("update_reservation_flights", reservation_id=TEXT, cabin=TEXT, flights=legs, payment_id=TEXT),
        schema(
            "update_reservation_baggages",
            reservation_id=TEXT,
            total_baggages=whole,
            nonfree_baggages=whole,
            payment_id=TEXT,
        ),
        schema("send_certificate", user_id=TEXT, amount={"type": "number"}),
    ]
    return Airline(store, schemas)


FLY = [{"flight_number": "A2", "date": "2024-05-20"}]
GOOD_FLIGHTS = {
    "cancel": Asked("cancel_reservation", {"reservation_id": "R1"}),
    "another flight": Asked(
        "update_reservation_flights",
        {"reservation_id": "R1", "cabin": "economy", "flights": FLY, "payment_id": "gift_card_1"},
    ),
    "bags": Asked(
        "update_reservation_baggages",
        {"reservation_id": "R1", "total_baggages": 2, "nonfree_baggages": 1, "payment_id": "gift_card_1"},
    ),
    "a certificate": Asked("send_certificate", {"user_id": "ann", "amount": 50}),
}


@pytest.mark.parametrize("call", GOOD_FLIGHTS.values(), ids=lambda c: c.name)
def test_no_variant_of_a_good_airline_write_goes_through(airline: Airline, call: Asked) -> None:
    airline.cancel_delayed("ann")
    before = airline.store.snapshot()
    (outcome,), _ = run_once(airline.system, "ann", [call])
    assert (outcome.kind, outcome.tier, outcome.people) == ("done", 3, 1)
    airline.store.restore(before)
    assert list(survivors(airline, "ann", "bob", call)) == []


def test_a_certificate_for_a_delay_comes_after_the_change(airline: Airline) -> None:
    (outcome,), _ = run_once(airline.system, "ann", [GOOD_FLIGHTS["a certificate"]])
    assert outcome.kind == "refused"
    assert outcome.reason.endswith("[airline, refund 2]")


def test_a_trajectory_gives_its_calls_their_answers_and_the_users_yes() -> None:
    def turn(number: int, answer: str) -> list[dict[str, Any]]:
        function = {"name": "cancel_reservation", "arguments": '{"reservation_id": "R1"}'}
        call = {"role": "assistant", "content": None, "tool_calls": [{"id": "same", "function": function}]}
        return [call, {"role": "tool", "tool_call_id": "same", "content": answer}]

    said = [{"role": "user", "content": "Cancel R1"}, *turn(1, "Error: no"), {"role": "user", "content": "Yes, please"}]
    calls = list(calls_of_trajectory({"traj": [*said, *turn(2, "done")]}))
    assert [(c.confirmed, answer) for c, answer in calls] == [(False, "Error: no"), (True, "done")]


# --- calls without tools (tau2) ------------------------------------------------------------------------------------

ACTIONS = [
    {"requestor": "assistant", "name": "log_verification", "arguments": {"user_id": "u1"}},
    {
        "requestor": "assistant",
        "name": "unlock_discoverable_agent_tool",
        "arguments": {"agent_tool_name": "close_it_1"},
    },
    {
        "requestor": "assistant",
        "name": "call_discoverable_agent_tool",
        "arguments": {"agent_tool_name": "close_it_1", "arguments": '{"account_id": "a1"}'},
    },
    {"requestor": "user", "name": "toggle_roaming", "arguments": {}},
]


@pytest.fixture
def bank() -> Observed:
    store = stored(users={"u1": {"user_id": "u1"}}, accounts={"a1": {"user_id": "u1"}}, journal={})
    return Observed(store, schemas_of(a for a in ACTIONS if a["requestor"] == "assistant"), ["close_it_1"])


def test_a_dispatcher_is_seen_through_and_its_call_waits_for_a_person(bank: Observed) -> None:
    assert (unwrapped(ACTIONS[2]), verb_of("close_it_1")) == (("close_it_1", {"account_id": "a1"}), "close")
    outcomes, _ = play(bank, customer_of(ACTIONS), calls_of(ACTIONS, "assistant"))
    assert [(o.kind, o.tier, o.people) for o in outcomes] == [("done", 1, 0), ("done", 2, 0), ("done", 3, 1)]


@pytest.mark.parametrize(
    ("unlocked", "verified", "user", "reason"),
    [
        (set(), {"u1"}, "u1", "has not been unlocked"),
        ({"close_it_1"}, set(), "u1", "has not been logged"),
        ({"close_it_1"}, {"u2"}, "u2", "is of 'u1', not 'u2'"),
    ],
)
def test_a_banking_call_out_of_order_is_refused(
    bank: Observed, unlocked: set[str], verified: set[str], user: str, reason: str
) -> None:
    bank.unlocked, bank.verified = unlocked, verified
    (outcome,), _ = run_once(bank.system, user, calls_of(ACTIONS, "assistant")[2:], YES)
    assert (outcome.kind, reason in outcome.reason) == ("refused", True)


# --- small things --------------------------------------------------------------------------------------------------


def test_a_closed_schema_takes_nothing_extra_at_any_depth() -> None:
    row = {"type": "object", "properties": {"a": TEXT}}
    inner = closed({"type": "object", "properties": {"rows": {"type": "array", "items": row}}})
    assert inner["additionalProperties"] is inner["properties"]["rows"]["items"]["additionalProperties"] is False


def test_arithmetic_is_only_arithmetic() -> None:
    assert arithmetic("2 * ((350 - 122) + (499 - 127))") == "1200.0"
    with pytest.raises(Failed):
        arithmetic("__import__('os')")
    with pytest.raises(Failed):
        arithmetic("9 ** 9 ** 9")


def test_a_share_has_its_interval() -> None:
    assert share([True, False] * 10, list(range(20))) == "10 of 20, 50% (30% to 70%)"
    assert share([], []) == "0 of 0"
