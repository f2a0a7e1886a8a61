"""The support data holds what its card says."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from conftest import DATA, ROOT

from agentkit.example_checks import check_examples
from agentkit.examples import Example, read_examples

SETS = ("train", "dev", "golden")
SIZES = {"train": 1628, "dev": 100, "golden": 300}


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Example]]:
    return {name: read_examples(DATA / f"{name}.jsonl") for name in SETS}


@pytest.fixture(scope="module")
def world() -> dict[str, list[dict]]:
    import json

    names = ("articles", "customers", "orders")
    return {n: [json.loads(line) for line in (DATA / f"{n}.jsonl").read_text().splitlines()] for n in names}


def test_sizes_are_those_of_the_card(cases, world):
    assert {name: len(cases[name]) for name in SETS} == SIZES
    assert len(world["articles"]) >= 40
    assert len(world["customers"]) == len(world["orders"]) == 200
    card = (DATA / "README.md").read_text()
    for name, size in SIZES.items():
        assert re.search(rf"`{name}\.jsonl` \| {size:,} \|", card)


def test_golden_has_at_most_six_task_types_of_at_least_45(cases):
    counts = Counter(e.task_type for e in cases["golden"])
    assert len(counts) <= 6
    assert min(counts.values()) >= 45


def test_no_golden_ticket_is_nearly_one_of_train_dev_or_golden():
    found = check_examples(DATA / "golden.jsonl", against=[DATA / "train.jsonl", DATA / "dev.jsonl"], threshold=0.6)
    assert found.near_duplicates == []


def test_no_ticket_stands_twice_anywhere(cases):
    texts = Counter(e.inputs["ticket"].strip().lower() for name in SETS for e in cases[name])
    assert [t for t, n in texts.items() if n > 1] == []


def test_hard_cases_are_in_the_golden_set(cases):
    tags = Counter(tag for e in cases["golden"] for tag in e.tags)
    for tag in ("two_problems", "angry", "polite", "typos", "very_short", "very_long", "out_of_scope", "injection"):
        assert tags[tag] >= 3, tag


def test_boundary_amounts_are_in_the_golden_set_and_decided_by_the_limit(cases, world):
    amounts = Counter()
    for example in cases["golden"]:
        if "boundary" in example.tags:
            amount = order_of(example, world)["refundable_usd"]
            amounts[amount] += 1
            assert example.expected["action"] == ("refund" if amount < 50 else "escalate")
    assert all(amounts[a] >= 3 for a in (49.99, 50.0, 50.01))


@pytest.mark.parametrize("name", SETS)
def test_expected_action_follows_from_proposal_and_order(cases, world, name):
    for example in cases[name]:
        expected = example.expected
        action = expected["proposed_action"]
        if action == "refund":
            order = order_of(example, world)
            amount = order["refundable_usd"] if order else 0.0
            action = "answer" if amount == 0 else "escalate" if amount >= 50 else "refund"
        assert expected["action"] == action, example.id
        assert expected["forbidden"] == ([] if action == "refund" else ["issue_refund"]), example.id


@pytest.mark.parametrize("name", SETS)
def test_references_exist_and_orders_belong_to_their_customer(cases, world, name):
    articles = {a["id"] for a in world["articles"]}
    customers = {c["customer_id"] for c in world["customers"]}
    owner = {o["order_id"]: o["customer_id"] for o in world["orders"]}
    for example in cases[name]:
        assert example.expected["article"] in articles | {None}, example.id
        assert example.inputs["customer_id"] in customers, example.id
        for order in re.findall(r"ORD-\d{5}", example.inputs["ticket"]):
            assert owner[order] == example.inputs["customer_id"], example.id


@pytest.mark.parametrize("name", SETS)
def test_length_tags_match_the_text(cases, name):
    for example in cases[name]:
        words = len(example.inputs["ticket"].split())
        assert ("very_short" in example.tags) == (words < 8), example.id
        assert ("very_long" in example.tags) == (words > 150), example.id


def test_every_data_folder_has_a_card():
    assert all((f / "README.md").is_file() for f in (ROOT / "data").iterdir() if f.is_dir())


def order_of(example: Example, world: dict[str, list[dict]]) -> dict | None:
    """The order named in the ticket, else the customer's latest: as the agent looks it up."""
    mine = [o for o in world["orders"] if o["customer_id"] == example.inputs["customer_id"]]
    if named := re.search(r"ORD-\d{5}", example.inputs["ticket"]):
        mine = [o for o in mine if o["order_id"] == named[0]]
    return max(mine, key=lambda o: o["ordered_on"], default=None)
