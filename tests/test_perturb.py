from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentkit.errors import UsageError
from agentkit.perturb import perturb

TICKET = (
    "I was charged $49.99 twice for order ORD-10003! Please refund the second payment today. "
    "The newest invoice looks strange. My email is bob@example.com."
)
# What the module promises to keep, said again and independently of its code.
PROTECTED = re.compile(
    r"\d|[$€£¥]|@|/|http|n['\u2019]t\b|\b(?:no|not|never|none|without|cannot|dollars|fifty|hundred|twice)\b",
    re.IGNORECASE,
)
VOCABULARY = (
    "I my the app Settings crashes when opening Please refund payment invoice yesterday know. note? team! knot often "
    "not never No, can't don\u2019t $50.00 €7 50.01 ORD-10003 KB-101. C-0001 a@b.org https://x.io/y and/or fifty "
    "hundred dollars dollars. WITHOUT twice It's e.g. Thanks. straße ĳssel \u0130zmir ὈΔΥΣΣΕΎΣ 中文 👍"
)
WORDS = st.sampled_from(VOCABULARY.split())
TEXTS = st.one_of(
    st.lists(st.tuples(WORDS, st.sampled_from([" ", "\n", "  ", "\t"])), min_size=1, max_size=40).map(
        lambda pairs: "".join(word + space for word, space in pairs)
    ),
    st.text(max_size=200),
)
REPEATS = st.integers(1, 9)


def changed(text: str, repeat: int, case_id: str = "case") -> str:
    return str(perturb({"text": text}, case_id=case_id, repeat=repeat)["text"])


def protected(text: str) -> list[str]:
    return [token for token in text.split() if PROTECTED.search(token)]


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.none())), st.text(), st.integers())
def test_repeat_zero_is_the_input_itself(inputs: dict[str, object], case_id: str, seed: int) -> None:
    assert perturb(inputs, case_id=case_id, repeat=0, seed=seed) == inputs


@given(TEXTS, REPEATS, st.text(max_size=5))
@example("I never said yes. It was two hundred dollars. Fine by me. Not so! Go on then.", 3, "a")
@settings(max_examples=400, deadline=None)
def test_protected_words_survive_in_order(text: str, repeat: int, case_id: str) -> None:
    assert protected(changed(text, repeat, case_id)) == protected(text)


@given(TEXTS, REPEATS)
@settings(deadline=None)
def test_long_texts_change_short_ones_do_not_and_none_becomes_empty(text: str, repeat: int) -> None:
    after = changed(text, repeat)
    assert (after != text) == (len(text.split()) >= 4)
    assert bool(after.strip()) == bool(text.strip())


@given(TEXTS, REPEATS, st.text(max_size=5), st.integers())
@settings(deadline=None)
def test_same_seed_case_and_repeat_give_the_same_text(text: str, repeat: int, case_id: str, seed: int) -> None:
    first = perturb({"text": text, "other": "x"}, case_id=case_id, repeat=repeat, seed=seed)
    again = perturb({"other": "x", "text": text}, case_id=case_id, repeat=repeat, seed=seed)
    assert first == again


def test_the_texts_are_pinned_for_every_python_version_and_hash_seed() -> None:
    rest = "The newest invoice looks strange. My email is bob@example.com."
    expected = [
        "Hello team, I was CHARGED $49.99 twice for order ORD-10003! Please refund the second payment today. " + rest,
        "i was chagred $49.99 twice for order ORD-10003! please refund the second payment today. "
        "the newest invice looks strange. my email is bob@example.com.",
        "I was charged $49.99 twice for order ORD-10003! Pleease refund the second payment today. "
        "The newwest invoice looks strange. My email is bob@example.com.\nMany thanks.",
    ]
    assert [changed(TICKET, repeat) for repeat in range(1, 4)] == expected
    code = (
        "from agentkit.perturb import perturb\n"
        f"print([perturb({{'text': {TICKET!r}}}, case_id='case', repeat=r)['text'] for r in range(1, 4)])"
    )
    elsewhere = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=elsewhere)
    assert process.stdout.strip() == repr(expected)


def test_seed_case_and_repeat_each_change_the_draw() -> None:
    def drawn(case_id: str = "case", seed: int = 0) -> list[str]:
        return [perturb({"t": TICKET}, case_id=case_id, repeat=r, seed=seed)["t"] for r in range(1, 9)]

    assert len(set(drawn())) >= 5
    assert drawn() != drawn(seed=1)
    assert drawn() != drawn(case_id="other")


def test_ids_numbers_and_other_values_are_left_alone() -> None:
    inputs = {"order_id": "ORD-10003", "name": "Ann von Berg", "amount": 49.99, "items": ["a b c d e"], "none": None}
    for repeat in range(1, 20):
        assert perturb(inputs, case_id="x", repeat=repeat) == inputs


def test_the_callers_inputs_are_not_altered() -> None:
    inputs = {"text": TICKET}
    perturb(inputs, case_id="x", repeat=1)
    assert inputs == {"text": TICKET}


def test_every_kind_of_change_occurs_and_typos_stay_few() -> None:
    text = " ".join(["The printer keeps jamming whenever somebody starts another long document."] * 3 + [TICKET])
    letters = sum(c.isalpha() for c in text)
    seen = Counter[str]()
    for repeat in range(1, 200):
        after = changed(text, repeat)
        lost = Counter(text.lower().split()) - Counter(after.lower().split())
        assert lost.total() <= letters * 0.03
        seen["typo"] += bool(lost)
        seen["lower"] += " i was charged" in after and "The printer" not in after
        seen["capitals"] += any(w.isupper() and w.isalpha() and len(w) > 2 for w in after.split())
        seen["opening"] += after.split()[0].strip(",") in {"Hello", "Hi", "Good", "Dear"}
        seen["closing"] += "\n" in after
        seen["order"] += after.lower().find("strange.") < after.lower().find("second") and not lost
    assert all(seen[kind] > 3 for kind in ("typo", "lower", "capitals", "opening", "closing", "order")), seen


def test_sentences_move_only_behind_the_first_and_only_when_there_are_three() -> None:
    three = "Alpha goes first here. Bravo stands in second. Charlie stays behind. Delta closes this."
    orders = set()
    for repeat in range(1, 300):
        orders.add(tuple(re.findall(r"alpha|bravo|charlie|delta", changed(three, repeat).lower())))
    whole = {order for order in orders if len(order) == 4}
    assert all(order[0] == "alpha" for order in whole)
    assert len(whole) == 6

    two = "Alpha goes first here. Bravo stands in second."
    for repeat in range(1, 100):
        after = changed(two, repeat).lower()
        assert "bravo" not in after or "alpha" not in after or after.index("alpha") < after.index("bravo")


def test_a_sign_off_stays_last_and_paragraphs_stay_apart() -> None:
    text = "The screen is dark.\n\nThe fan is loud. The case is warm. The light is green.\n\nRegards, Anna Berg"
    for repeat in range(1, 100):
        lines = changed(text, repeat).split("\n")
        assert [bool(line) for line in lines[:5]] == [True, False, True, False, True]
        assert re.match(r"(?i)r\w+, a\w+ b\w+$", lines[4])


def test_amounts_in_words_are_kept_whole() -> None:
    text = "Somebody took two hundred and fifty dollars from account holders, perhaps fourty dollars more or less"
    for repeat in range(1, 200):
        after = changed(text, repeat)
        assert "two hundred and fifty dollars" in after
        assert "fourty dollars" in after


def test_a_negative_repeat_is_refused() -> None:
    with pytest.raises(UsageError, match=r"repeat must be 0 \(unchanged\) or above, got -1"):
        perturb({"text": TICKET}, case_id="x", repeat=-1)
