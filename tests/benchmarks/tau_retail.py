"""The retail desk: its sixteen tools, and its written policy as rules (tau_bench, retail_policy.md)."""

from __future__ import annotations

import ast
import json
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from tau_desk import Breaches, Desk, Record, Values

from agentkit.tools import ToolOptions

CENT = 0.005
# Consequential actions wait for a yes (policy, before "Domain basic"): "you have to list the action detail and obtain
# explicit user confirmation (yes) to proceed". The schemas ask the same for the user's default address.
WAITS: ToolOptions = {"permission": "write", "criticality": "high"}
ONE_USER = "retail, introduction: only one user per conversation"
ADDRESS = ("address1", "address2", "city", "state", "country", "zip")
_OPERATIONS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


class Failed(Exception):
    """The service behind a tool cannot do what it is asked; the agent reads why and may try otherwise."""


def arithmetic(expression: str) -> str:
    """The value of an expression of numbers, + - * / and parentheses, to the cent."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.operand))
        raise Failed(f"no arithmetic: {ast.unparse(node)!r}")

    try:
        return str(round(float(value(ast.parse(expression, mode="eval").body)), 2))
    except (SyntaxError, ZeroDivisionError) as e:
        raise Failed(f"cannot calculate {expression!r}: {e}") from e


class Common(Desk):
    """Tools that both desks have."""

    def calculate(self, expression: str) -> str:
        return arithmetic(expression)

    def think(self, thought: str) -> str:
        return ""

    def transfer_to_human_agents(self, summary: str) -> str:
        return "Transfer successful"

    def get_user_details(self, user_id: str) -> Record:
        return self.found("users", user_id, "user")

    def found(self, table: str, key: str, what: str) -> Record:
        """The live record; the tool's error where there is none."""
        record = self.store.get(table, key)
        if record is None:
            raise Failed(f"{what} not found")
        return record


class Retail(Common):
    """Cancel, modify, return and exchange orders."""

    name = "retail"
    options: ClassVar[dict[str, ToolOptions]] = {
        "cancel_pending_order": {**WAITS, "writes_to": "order_id"},
        "modify_pending_order_address": {**WAITS, "writes_to": "order_id", "idempotent": True},
        "modify_pending_order_payment": {**WAITS, "writes_to": "order_id"},
        "modify_pending_order_items": {**WAITS, "writes_to": "order_id"},
        "return_delivered_order_items": {**WAITS, "writes_to": "order_id"},
        "exchange_delivered_order_items": {**WAITS, "writes_to": "order_id"},
        "modify_user_address": {**WAITS, "writes_to": "user_id", "idempotent": True},
        # It changes no record and needs no yes; a person is to hear of it, which is what tier 2 does.
        "transfer_to_human_agents": {"permission": "write", "criticality": "medium"},
    }
    owner_of: ClassVar[dict[str, tuple[str, str]]] = {"order_id": ("orders", "user_id"), "user_id": ("users", "")}

    # ---- reads

    def find_user_id_by_email(self, email: str) -> str:
        for key in self.store.keys("users"):
            if self.found("users", key, "user")["email"].lower() == email.lower():
                return key
        raise Failed("user not found")

    def find_user_id_by_name_zip(self, first_name: str, last_name: str, zip: str) -> str:
        wanted = (first_name.lower(), last_name.lower(), zip)
        for key in self.store.keys("users"):
            user = self.found("users", key, "user")
            name = user["name"]
            if (name["first_name"].lower(), name["last_name"].lower(), user["address"]["zip"]) == wanted:
                return key
        raise Failed("user not found")

    def get_order_details(self, order_id: str) -> Record:
        return self.found("orders", order_id, "order")

    def get_product_details(self, product_id: str) -> Record:
        return self.found("products", product_id, "product")

    def list_all_product_types(self) -> str:
        products = (self.found("products", key, "product") for key in self.store.keys("products"))
        return json.dumps(dict(sorted((p["name"], p["product_id"]) for p in products)))

    def check_get_order_details(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)

    def check_get_user_details(self, values: Values, user: str | None) -> Breaches:
        yield from self._self(values, user)

    # ---- writes

    def cancel_pending_order(self, order_id: str, reason: str) -> Record:
        order = self.found("orders", order_id, "order")
        paid = [p for p in order["payment_history"] if p["transaction_type"] == "payment"]
        order["payment_history"] = order["payment_history"] + [{**p, "transaction_type": "refund"} for p in paid]
        for payment in paid:
            self._credit(order["user_id"], payment["payment_method_id"], payment["amount"])
        order["status"], order["cancel_reason"] = "cancelled", reason
        return order

    def modify_pending_order_address(self, order_id: str, **address: str) -> Record:
        order = self.found("orders", order_id, "order")
        order["address"] = address
        return order

    def modify_pending_order_payment(self, order_id: str, payment_method_id: str) -> Record:
        order = self.found("orders", order_id, "order")
        first = order["payment_history"][0]
        change = (("payment", payment_method_id), ("refund", first["payment_method_id"]))
        for kind, method in change:
            entry = {"transaction_type": kind, "amount": first["amount"], "payment_method_id": method}
            order["payment_history"].append(entry)
            self._credit(order["user_id"], method, first["amount"] if kind == "refund" else -first["amount"])
        return order

    def modify_pending_order_items(
        self, order_id: str, item_ids: list[str], new_item_ids: list[str], payment_method_id: str
    ) -> Record:
        order = self.found("orders", order_id, "order")
        owed = self._difference(order, item_ids, new_item_ids)
        kind = "payment" if owed > 0 else "refund"
        entry = {"transaction_type": kind, "amount": abs(owed), "payment_method_id": payment_method_id}
        order["payment_history"].append(entry)
        self._credit(order["user_id"], payment_method_id, -owed)
        for old, new in zip(item_ids, new_item_ids, strict=True):
            item = next(i for i in order["items"] if i["item_id"] == old)
            variant = self.variant(item["product_id"], new)
            item |= {"item_id": new, "price": variant["price"], "options": variant["options"]}
        order["status"] = "pending (items modified)"
        return order

    def return_delivered_order_items(self, order_id: str, item_ids: list[str], payment_method_id: str) -> Record:
        order = self.found("orders", order_id, "order")
        order |= {"return_items": sorted(item_ids), "return_payment_method_id": payment_method_id}
        order["status"] = "return requested"
        return order

    def exchange_delivered_order_items(
        self, order_id: str, item_ids: list[str], new_item_ids: list[str], payment_method_id: str
    ) -> Record:
        order = self.found("orders", order_id, "order")
        owed = self._difference(order, item_ids, new_item_ids)
        order |= {"exchange_items": sorted(item_ids), "exchange_new_items": sorted(new_item_ids)}
        order |= {"exchange_payment_method_id": payment_method_id, "exchange_price_difference": owed}
        order["status"] = "exchange requested"
        return order

    def modify_user_address(self, user_id: str, **address: str) -> Record:
        user = self.found("users", user_id, "user")
        user["address"] = address
        return user

    # ---- rules

    def check_cancel_pending_order(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        yield from self._status(values, "pending", "retail, cancel pending order 1")

    def check_modify_pending_order_address(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        yield from self._status(values, "pending", "retail, modify pending order 1")

    def check_modify_pending_order_payment(self, values: Values, user: str | None) -> Breaches:
        yield from self.check_modify_pending_order_address(values, user)
        yield from self._method(values, "retail, modify payment 1")
        if order := self.store.get("orders", values["order_id"]):
            first = order["payment_history"][0]
            if len(order["payment_history"]) > 1 or first["payment_method_id"] == values["payment_method_id"]:
                used = [p["payment_method_id"] for p in order["payment_history"]]
                yield "retail, modify payment 1", f"one method other than the original; used so far: {used}"
            yield from self._covers(values, first["amount"], "retail, modify payment 2")

    def check_modify_pending_order_items(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        yield from self._status(values, "pending", "retail, modify items 1")
        yield from self._swap(values, "retail, modify items")

    def check_exchange_delivered_order_items(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        yield from self._status(values, "delivered", "retail, exchange delivered order 1")
        yield from self._swap(values, "retail, exchange delivered order")

    def check_return_delivered_order_items(self, values: Values, user: str | None) -> Breaches:
        yield from self._own(values, user)
        yield from self._status(values, "delivered", "retail, return delivered order 1")
        if order := self.store.get("orders", values["order_id"]):
            yield from self._ordered(order, values["item_ids"], "retail, return delivered order 2")
            yield from self._method(values, "retail, return delivered order 2")
            method = values["payment_method_id"]
            original = {p["payment_method_id"] for p in order["payment_history"]}
            if method not in original and not method.startswith("gift_card"):
                yield "retail, return delivered order 3", f"{method} is neither the original method nor a gift card"

    def check_modify_user_address(self, values: Values, user: str | None) -> Breaches:
        yield from self._self(values, user)

    # ---- what the rules are made of

    def _self(self, values: Values, user: str | None) -> Breaches:
        if values["user_id"] != user:
            yield ONE_USER, f"the authenticated user is {user!r}"

    def _own(self, values: Values, user: str | None) -> Breaches:
        order = self.store.get("orders", values["order_id"])
        if user is None or (order is not None and order["user_id"] != user):
            yield ONE_USER, f"order {values['order_id']} is not of the authenticated user {user!r}"

    def _status(self, values: Values, status: str, paragraph: str) -> Breaches:
        order = self.store.get("orders", values["order_id"])
        if order is not None and order["status"] != status:
            yield paragraph, f"the order is {order['status']!r}, not {status!r}"

    def _method(self, values: Values, paragraph: str) -> Breaches:
        order = self.store.get("orders", values["order_id"])
        if order and values["payment_method_id"] not in self._methods(order["user_id"]):
            yield paragraph, f"{values['payment_method_id']} is not in the user's profile"

    def _covers(self, values: Values, amount: float, paragraph: str) -> Breaches:
        order = self.store.get("orders", values["order_id"])
        card = self._methods(order["user_id"] if order else "").get(values["payment_method_id"], {})
        if card.get("source") == "gift_card" and amount > 0 and not amount <= card["balance"] + CENT:
            yield paragraph, f"{card['id']} holds ${card['balance']:.2f}, and ${amount:.2f} are due"

    def _ordered(self, order: Record, item_ids: list[str], paragraph: str) -> Breaches:
        if missing := Counter(item_ids) - Counter(i["item_id"] for i in order["items"]):
            yield paragraph, f"not in the order: {sorted(missing)}"
        if not item_ids:
            yield paragraph, "no items are named"

    def _swap(self, values: Values, section: str) -> Breaches:
        order = self.store.get("orders", values["order_id"])
        if order is None:
            return
        old, new = values["item_ids"], values["new_item_ids"]
        yield from self._ordered(order, old, f"{section} 1")
        if len(old) != len(new):
            yield f"{section} 2", f"{len(old)} items for {len(new)}"
            return
        for a, b in zip(old, new, strict=True):
            product = next(i["product_id"] for i in order["items"] if i["item_id"] == a)
            variant = (self.store.get("products", product) or {"variants": {}})["variants"].get(b)
            if variant is None or not variant["available"] or a == b:
                why = "of another product" if variant is None else "not another one" if a == b else "not available"
                yield f"{section} 2", f"item {b} for {a} is {why}"
                return
        yield from self._method(values, f"{section} 3")
        yield from self._covers(values, self._difference(order, old, new), f"{section} 3")

    # ---- records

    def _methods(self, user_id: str) -> dict[str, Record]:
        user = self.store.get("users", user_id)
        return {} if user is None else user["payment_methods"]

    def _credit(self, user_id: str, method: str, amount: float) -> None:
        card = self._methods(user_id).get(method, {})
        if card.get("source") == "gift_card":  # other methods are paid outside, in 5 to 7 days
            card["balance"] = round(card["balance"] + amount, 2)

    def variant(self, product_id: str, item_id: str) -> Record:
        """One item of a product."""
        variants: dict[str, Record] = self.found("products", product_id, "product")["variants"]
        if item_id not in variants:
            raise Failed(f"item {item_id} not found")
        return variants[item_id]

    def _difference(self, order: Record, old: list[str], new: list[str]) -> float:
        """What the user still owes for other items; below 0 a refund."""
        items = {i["item_id"]: i for i in order["items"]}
        pairs = zip(old, new, strict=True)
        owed = (self.variant(items[a]["product_id"], b)["price"] - items[a]["price"] for a, b in pairs)
        return round(sum(owed), 2)


def prescribed_reads(desk: Retail, user: str, writes: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, Record]]:
    """The reads that the policy wants before the writes of a task: who it is, which orders, which products."""
    profile = desk.found("users", user, "user")
    reads: list[tuple[str, Record]] = [
        ("find_user_id_by_email", {"email": profile["email"]}),
        ("find_user_id_by_name_zip", {**profile["name"], "zip": profile["address"]["zip"]}),
        ("get_user_details", {"user_id": user}),
    ]
    for order_id in dict.fromkeys(values["order_id"] for _, values in writes if "order_id" in values):
        reads.append(("get_order_details", {"order_id": order_id}))
    for _, values in writes:
        order = desk.store.get("orders", values.get("order_id"))
        wanted = set(values.get("item_ids", ())) if "new_item_ids" in values else set()
        products = sorted({i["product_id"] for i in order["items"] if i["item_id"] in wanted} if order else ())
        reads += [("get_product_details", {"product_id": p}) for p in products]
    return list({json.dumps(r): r for r in reads}.values())
