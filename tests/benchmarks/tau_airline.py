"""The airline desk: its fourteen tools, and its written policy as rules (tau_bench, airline_policy.md)."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime, timedelta
from itertools import count, pairwise
from typing import Any, ClassVar

from tau_desk import Breaches, Record, Values
from tau_retail import CENT, WAITS, Common, Failed

from agentkit.tools import ToolOptions

NOW = datetime(2024, 5, 15, 15)  # "The current time is 2024-05-15 15:00:00 EST."
BAG_USD, INSURANCE_USD = 50, 30
MOST_PASSENGERS = 5
MOST_OF_A_KIND = {"certificate": 1, "credit_card": 1, "gift_card": 3}
FREE_BAGS = {  # per passenger, by membership and cabin
    "regular": {"basic_economy": 0, "economy": 1, "business": 2},
    "silver": {"basic_economy": 1, "economy": 2, "business": 3},
    "gold": {"basic_economy": 2, "economy": 3, "business": 3},
}
LATE = timedelta(minutes=15)  # the policy does not say; from here on airlines count a flight as delayed
CITIES = {
    "SFO": "San Francisco", "JFK": "New York", "LAX": "Los Angeles", "ORD": "Chicago", "DFW": "Dallas",
    "DEN": "Denver", "SEA": "Seattle", "ATL": "Atlanta", "MIA": "Miami", "BOS": "Boston",
    "PHX": "Phoenix", "IAH": "Houston", "LAS": "Las Vegas", "MCO": "Orlando", "EWR": "Newark",
    "CLT": "Charlotte", "MSP": "Minneapolis", "DTW": "Detroit", "PHL": "Philadelphia", "LGA": "LaGuardia",
}  # fmt: skip
OWNER = "airline, book, modify and cancel 1: the user id and the reservation id come first"
BOOK, MODIFY = "airline, book flight", "airline, modify flight"
CANCEL, REFUND = "airline, cancel flight", "airline, refund"
UNWRITTEN = "not in the policy"
GIVEN = "certificate_322132"  # the numbers of certificates sent here begin like this


class Airline(Common):
    """Book, modify and cancel reservations."""

    name = "airline"
    options: ClassVar[dict[str, ToolOptions]] = {
        "book_reservation": {**WAITS, "writes_to": "user_id"},
        "update_reservation_flights": {**WAITS, "writes_to": "reservation_id"},
        "update_reservation_baggages": {**WAITS, "writes_to": "reservation_id"},
        "update_reservation_passengers": {**WAITS, "writes_to": "reservation_id", "idempotent": True},
        "cancel_reservation": {**WAITS, "writes_to": "reservation_id"},
        # Money given away, "after confirming the facts", which no argument shows: a person looks at every one.
        "send_certificate": {**WAITS, "human_at": {"amount": 0.0}, "writes_to": "user_id"},
        "transfer_to_human_agents": {"permission": "write", "criticality": "medium"},
    }
    owner_of: ClassVar[dict[str, tuple[str, str]]] = {
        "reservation_id": ("reservations", "user_id"),
        "user_id": ("users", ""),
    }

    # ---- reads

    def list_all_airports(self) -> str:
        return json.dumps(CITIES)

    def get_reservation_details(self, reservation_id: str) -> Record:
        return self.found("reservations", reservation_id, "reservation")

    def search_direct_flight(self, origin: str, destination: str, date: str) -> list[Record]:
        return [self._offer(f, date) for f in self._between(origin, destination) if self._bookable(f, date)]

    def search_onestop_flight(self, origin: str, destination: str, date: str) -> list[list[Record]]:
        found = []
        for first in self._between(origin, None):
            next_day = first["scheduled_arrival_time_est"].endswith("+1")
            then = f"{date[:8]}{int(date[8:]) + 1:02}" if next_day else date
            for second in self._between(first["destination"], destination):
                late = first["scheduled_arrival_time_est"] > second["scheduled_departure_time_est"]
                if not late and self._bookable(first, date) and self._bookable(second, then):
                    found.append([self._offer(first, date, dated=True), self._offer(second, then, dated=True)])
        return found

    def check_get_user_details(self, values: Values, user: str | None) -> Breaches:
        yield from self._self(values, user)

    def check_get_reservation_details(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)

    # ---- writes

    def book_reservation(self, **wanted: Any) -> Record:
        user = self.found("users", wanted["user_id"], "user")
        flights = [self._segment(f, wanted["cabin"]) for f in wanted["flights"]]
        for f in flights:
            self._seats(f, wanted["cabin"], len(wanted["passengers"]))
        people = len(wanted["passengers"])
        total = sum(f["price"] for f in flights) * people + BAG_USD * wanted["nonfree_baggages"]
        total += INSURANCE_USD * people if wanted["insurance"] == "yes" else 0
        self._payable(user, wanted["payment_methods"])
        paid = sum(p["amount"] for p in wanted["payment_methods"])
        if not abs(paid - total) < CENT:
            raise Failed(f"payment amount does not add up, total price is {total}, but paid {paid}")
        for payment in wanted["payment_methods"]:
            self._charge(user, payment["payment_id"], payment["amount"])
        number = f"HATHA{'TUV'[sum(k.startswith('HATHA') for k in self.store.keys('reservations'))]}"
        reservation = {"reservation_id": number, **{k: v for k, v in wanted.items() if k != "payment_methods"}}
        reservation |= {"flights": flights, "payment_history": wanted["payment_methods"], "created_at": NOW.isoformat()}
        self.store.put("reservations", number, reservation)
        user["reservations"] = [*user["reservations"], number]
        return reservation

    def update_reservation_flights(
        self, reservation_id: str, cabin: str, flights: list[Record], payment_id: str
    ) -> Record:
        reservation = self.found("reservations", reservation_id, "reservation")
        segments = self._rebooked(reservation, cabin, flights)
        for f in segments:
            if f not in reservation["flights"]:
                self._seats(f, cabin, len(reservation["passengers"]))
        self._settle(reservation, payment_id, self._owed(reservation, segments))
        reservation |= {"flights": segments, "cabin": cabin}
        return reservation

    def update_reservation_baggages(
        self, reservation_id: str, total_baggages: int, nonfree_baggages: int, payment_id: str
    ) -> Record:
        reservation = self.found("reservations", reservation_id, "reservation")
        self._settle(reservation, payment_id, BAG_USD * max(0, nonfree_baggages - reservation["nonfree_baggages"]))
        reservation |= {"total_baggages": total_baggages, "nonfree_baggages": nonfree_baggages}
        return reservation

    def update_reservation_passengers(self, reservation_id: str, passengers: list[Record]) -> Record:
        reservation = self.found("reservations", reservation_id, "reservation")
        reservation["passengers"] = passengers
        return reservation

    def cancel_reservation(self, reservation_id: str) -> Record:
        reservation = self.found("reservations", reservation_id, "reservation")
        back = [{**p, "amount": -p["amount"]} for p in reservation["payment_history"]]
        reservation |= {"payment_history": [*reservation["payment_history"], *back], "status": "cancelled"}
        return reservation

    def send_certificate(self, user_id: str, amount: float) -> str:
        methods = self.found("users", user_id, "user")["payment_methods"]
        number = next(n for n in (f"{GIVEN}{i}" for i in count(2)) if n not in methods)
        methods[number] = {"source": "certificate", "amount": amount, "id": number}
        return f"Certificate {number} added to user {user_id} with amount {amount}."

    def cancel_delayed(self, user_id: str) -> None:
        """Cancel what was late, as the policy wants it before a certificate."""
        for reservation in self._reservations(user_id):
            if any(self._was_late(f) for f in reservation["flights"]):
                reservation["status"] = "cancelled"

    # ---- rules

    def check_book_reservation(self, values: Values, user: str | None) -> Breaches:
        yield from self._self(values, user)
        if len(values["passengers"]) > MOST_PASSENGERS or not values["passengers"]:
            yield f"{BOOK} 2", f"{len(values['passengers'])} passengers; one to {MOST_PASSENGERS} may be booked"
        yield from self._payments(values)
        yield from self._bags(values, values["user_id"], values["cabin"], len(values["passengers"]), 0)
        yield from self._available(values["flights"])
        if any(self._same_journey(r, values) for r in self._reservations(values["user_id"])):
            yield UNWRITTEN, "these flights are booked already for these passengers: a repetition"

    def check_update_reservation_flights(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        reservation = self._active(values)
        if reservation is None:
            return
        new, kept = values["flights"], [_bare(f) for f in reservation["flights"]]
        changed = [_bare(f) for f in new] != kept
        if changed and reservation["cabin"] == "basic_economy":
            yield f"{MODIFY} 2", "basic economy flights cannot be modified"
        if changed and not self._same_route(reservation, new):
            yield f"{MODIFY} 2", "another origin, destination or trip type"
        if not changed and reservation["cabin"] == values["cabin"]:
            yield UNWRITTEN, "flights and cabin are like this already: a repetition"
        yield from self._one_method(values, reservation, self._owed_if_known(reservation, values))
        yield from self._available([f for f in new if _bare(f) not in kept])

    def check_update_reservation_baggages(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        if reservation := self._active(values):
            if values["total_baggages"] <= reservation["total_baggages"]:
                yield f"{MODIFY} 4", "bags can be added, not removed"
            people = len(reservation["passengers"])
            before = reservation["nonfree_baggages"]
            yield from self._bags(values, reservation["user_id"], reservation["cabin"], people, before)
            due = BAG_USD * max(0, values["nonfree_baggages"] - before)
            yield from self._one_method(values, reservation, due)

    def check_update_reservation_passengers(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        if reservation := self._active(values):
            before, now = len(reservation["passengers"]), len(values["passengers"])
            if before != now:
                yield f"{MODIFY} 5", f"the number of passengers cannot change ({before} to {now})"

    def check_cancel_reservation(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        reservation = self.store.get("reservations", values["reservation_id"])
        if reservation is None:
            return
        if reservation.get("status") == "cancelled":
            yield f"{CANCEL} 1", "the reservation is cancelled already"
        states = [self._day(f).get("status") for f in reservation["flights"]]
        if used := [s for s in states if s in ("landed", "flying")]:
            yield f"{CANCEL} 3", f"segments are used already: {used}"
        fresh = NOW - datetime.fromisoformat(reservation["created_at"]) <= timedelta(hours=24)
        # With insurance "the condition" (health, weather) must be met as well; no argument says: the person asked does.
        excused = fresh or "cancelled" in states or reservation["insurance"] == "yes"
        if not excused and reservation["cabin"] != "business":
            yield f"{CANCEL} 2", f"{reservation['cabin']}, no insurance, booked {reservation['created_at']}"

    def check_send_certificate(self, values: Values, user: str | None) -> Breaches:
        yield from self._self(values, user)
        given = sum(m["amount"] for m in self._methods(values["user_id"]).values() if m["id"].startswith(GIVEN))
        owed = [self._gesture(r, values["user_id"]) for r in self._reservations(values["user_id"])]
        most = max((amount for amount, _ in owed), default=0)
        amount = values["amount"]
        if not 0 < amount + given <= most:
            yield f"{REFUND} 1 and 2", f"${amount:.2f} offered, ${given:.2f} given, at most ${most:.2f} due"
        if not any(amount + given == a and settled for a, settled in owed):
            yield f"{REFUND} 2", "for a delay, only after the reservation has been changed or cancelled"

    # ---- what the rules are made of

    def _self(self, values: Values, user: str | None) -> Breaches:
        if values["user_id"] != user:
            yield OWNER, f"the user is {user!r}, not {values['user_id']!r}"

    def _own(self, values: Values, user: str | None) -> Breaches:
        reservation = self.store.get("reservations", values["reservation_id"])
        if user is None or (reservation is not None and reservation["user_id"] != user):
            yield OWNER, f"reservation {values['reservation_id']} is not of the user {user!r}"

    def _active(self, values: Values) -> Record | None:
        return self.store.get("reservations", values["reservation_id"])

    def _payments(self, values: Values) -> Breaches:
        methods = self._methods(values["user_id"])
        each: Counter[str] = Counter()
        for payment in values["payment_methods"]:
            if payment["payment_id"] not in methods:
                yield f"{BOOK} 3", f"{payment['payment_id']} is not in the user's profile"
                return
            if not payment["amount"] > 0:
                yield UNWRITTEN, f"a payment of ${payment['amount']:.2f}"
            each[payment["payment_id"]] += payment["amount"]
        for kind, most in MOST_OF_A_KIND.items():
            if (used := sum(methods[m]["source"] == kind for m in each)) > most:
                yield f"{BOOK} 3", f"{used} of {kind}; at most {most}"
        for method, amount in each.items():
            yield from self._worth(methods[method], amount)

    def _worth(self, method: Record, amount: float) -> Breaches:
        if "amount" in method and not amount <= method["amount"] + CENT:
            yield f"{BOOK} 3", f"{method['id']} is worth ${method['amount']:.2f}, and ${amount:.2f} are due"

    def _one_method(self, values: Values, reservation: Record, due: float) -> Breaches:
        method = self._methods(reservation["user_id"]).get(values["payment_id"])
        if method is None or method["source"] == "certificate":
            yield f"{MODIFY} 6", f"{values['payment_id']} is no gift card or credit card of the user's profile"
        else:
            yield from self._worth(method, due)

    def _bags(self, values: Values, user_id: str, cabin: str, people: int, before: int) -> Breaches:
        user = self.store.get("users", user_id)
        if user is None:
            return
        paid = max(before, values["total_baggages"] - people * FREE_BAGS[user["membership"]][cabin], 0)
        if values["nonfree_baggages"] != paid:
            total, said = values["total_baggages"], values["nonfree_baggages"]
            yield f"{BOOK} 4", f"{paid} of {total} bags are to be paid, not {said}"

    def _available(self, flights: list[Record]) -> Breaches:
        for f in flights:
            day = self._day(f)
            if day and day["status"] != "available":
                yield "airline, domain basic 3", f"{f['flight_number']} on {f['date']} is {day['status']!r}"

    def _same_route(self, reservation: Record, flights: list[Record]) -> bool:
        stops = [self.store.get("flights", f["flight_number"]) for f in flights]
        if not stops:
            return False
        if None in stops:
            return True  # an unknown flight is the tool's error
        legs = [(s["origin"], s["destination"]) for s in stops if s]
        if any(a[1] != b[0] for a, b in pairwise(legs)) or legs[0][0] != reservation["origin"]:
            return False
        there_and_back = reservation["flight_type"] == "round_trip"
        last = reservation["origin"] if there_and_back else reservation["destination"]
        return legs[-1][1] == last and reservation["destination"] in {to for _, to in legs}

    def _same_journey(self, reservation: Record, values: Values) -> bool:
        same_flights = [_bare(f) for f in reservation["flights"]] == [_bare(f) for f in values["flights"]]
        return (
            same_flights
            and reservation.get("status") != "cancelled"
            and reservation["passengers"] == values["passengers"]
        )

    def _gesture(self, reservation: Record, user_id: str) -> tuple[float, bool]:
        """The certificate a reservation may be worth, and whether what has to come first has been done."""
        member = (self.store.get("users", user_id) or {"membership": "regular"})["membership"] != "regular"
        people = len(reservation["passengers"])
        if not (member or reservation["insurance"] == "yes" or reservation["cabin"] == "business"):
            return 0, False
        if any(self._day(f).get("status") == "cancelled" for f in reservation["flights"]):
            return 100 * people, True
        if any(self._was_late(f) for f in reservation["flights"]):
            return 50 * people, reservation.get("status") == "cancelled" or len(reservation["payment_history"]) > 1
        return 0, False

    def _was_late(self, segment: Record) -> bool:
        day = self._day(segment)
        if day.get("status") == "delayed":
            return True
        flight = self.found("flights", segment["flight_number"], "flight")
        for what in ("departure", "arrival"):
            planned, actual = flight[f"scheduled_{what}_time_est"], day.get(f"actual_{what}_time_est")
            if actual:
                due = datetime.fromisoformat(f"{segment['date']}T{planned[:8]}") + timedelta(days="+1" in planned)
                if datetime.fromisoformat(actual) - due >= LATE:
                    return True
        return False

    # ---- records

    def _between(self, origin: str, destination: str | None) -> list[Record]:
        flights = (self.found("flights", key, "flight") for key in self.store.keys("flights"))
        return [f for f in flights if f["origin"] == origin and destination in (None, f["destination"])]

    def _bookable(self, flight: Record, date: str) -> bool:
        return bool(flight["dates"].get(date, {}).get("status") == "available")

    def _offer(self, flight: Record, date: str, *, dated: bool = False) -> Record:
        day = {key: flight["dates"][date][key] for key in ("status", "available_seats", "prices")}
        plain = {key: value for key, value in flight.items() if key != "dates"}
        return {**plain, **day, **({"date": date} if dated else {})}

    def _day(self, segment: Record) -> Record:
        flight = self.store.get("flights", segment["flight_number"])
        day: Record = {} if flight is None else flight["dates"].get(segment["date"], {})
        return day

    def _segment(self, wanted: Record, cabin: str) -> Record:
        flight = self.found("flights", wanted["flight_number"], f"flight {wanted['flight_number']}")
        day = self._day(wanted)
        if day.get("status") != "available":
            raise Failed(f"flight {wanted['flight_number']} not available on date {wanted['date']}")
        ends = {"origin": flight["origin"], "destination": flight["destination"]}
        return {**_bare(wanted), "price": day["prices"][cabin], **ends}

    def _seats(self, segment: Record, cabin: str, people: int) -> None:
        if self._day(segment)["available_seats"][cabin] < people:
            raise Failed(f"not enough seats on flight {segment['flight_number']}")

    def _rebooked(self, reservation: Record, cabin: str, flights: list[Record]) -> list[Record]:
        """Segments of a changed reservation; what is kept in its cabin keeps its price."""
        kept = {(f["flight_number"], f["date"]): f for f in reservation["flights"]}
        same = cabin == reservation["cabin"]
        return [
            kept[f["flight_number"], f["date"]]
            if same and (f["flight_number"], f["date"]) in kept
            else self._segment(f, cabin)
            for f in flights
        ]

    def _owed(self, reservation: Record, segments: list[Record]) -> float:
        difference = sum(f["price"] for f in segments) - sum(f["price"] for f in reservation["flights"])
        return float(difference * len(reservation["passengers"]))

    def _owed_if_known(self, reservation: Record, values: Values) -> float:
        try:
            return self._owed(reservation, self._rebooked(reservation, values["cabin"], values["flights"]))
        except Failed:  # the tool will say so
            return 0.0

    def _payable(self, user: Record, payments: list[Record]) -> None:
        for p in payments:
            method = user["payment_methods"].get(p["payment_id"])
            if method is None:
                raise Failed(f"payment method {p['payment_id']} not found")
            if "amount" in method and p["amount"] > method["amount"]:
                raise Failed(f"not enough balance in payment method {p['payment_id']}")

    def _settle(self, reservation: Record, payment_id: str, due: float) -> None:
        user = self.found("users", reservation["user_id"], "user")
        method = user["payment_methods"].get(payment_id)
        if method is None:
            raise Failed("payment method not found")
        if method["source"] == "certificate":
            raise Failed("certificate cannot be used to update reservation")
        self._payable(user, [{"payment_id": payment_id, "amount": due}])
        self._charge(user, payment_id, due)
        if due:
            entry = {"payment_id": payment_id, "amount": int(due) if due == int(due) else due}
            reservation["payment_history"] = [*reservation["payment_history"], entry]

    def _charge(self, user: Record, payment_id: str, amount: float) -> None:
        method = user["payment_methods"][payment_id]
        if method["source"] == "gift_card":
            method["amount"] -= amount
        elif method["source"] == "certificate":  # "The remaining amount of a travel certificate is not refundable."
            del user["payment_methods"][payment_id]

    def _methods(self, user_id: str) -> dict[str, Record]:
        user = self.store.get("users", user_id)
        return {} if user is None else user["payment_methods"]

    def _reservations(self, user_id: str) -> list[Record]:
        user = self.store.get("users", user_id) or {"reservations": []}
        found = (self.store.get("reservations", key) for key in user["reservations"])
        return [r for r in found if r is not None]


def _bare(segment: Record) -> Record:
    return {"flight_number": segment["flight_number"], "date": segment["date"]}
