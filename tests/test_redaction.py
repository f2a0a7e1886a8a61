"""What is taken out of text that people see, and what stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.redaction import redact

TAKEN = {
    "write to ann.o-hara+x@mail.example.org now": "write to [e-mail] now",
    "card 4111 1111 1111 1111, please": "card [card], please",
    "4012-8888-8888-1881": "[card]",
    "IBAN DE89 3704 0044 0532 0130 00.": "IBAN [account].",
    "call +49 170 123 4567 or (030) 1234-567": "call [telephone] or [telephone]",
    "sk-abcdefghijklmnopqrstu": "[key]",
    "Authorization: Bearer abc.def-ghi_jkl0123": "Authorization: Bearer [key]",
}
KEPT = [
    "order ORD-10003 of 2026-11-21",
    "$1,234.56 on 12 items",
    "1234567890123",  # 13 digits whose check digit is wrong
    "version 3.17.2, 10.0.0.1",
    "KB-103 and C-0001",
]


@pytest.mark.parametrize(("text", "left"), TAKEN.items())
def test_what_looks_personal_or_secret_is_taken_out(text: str, left: str) -> None:
    assert redact(text) == left


@pytest.mark.parametrize("text", KEPT)
def test_what_does_not_stays(text: str) -> None:
    assert redact(text) == text


def test_data_is_redacted_inside_and_keys_stay() -> None:
    assert redact({"to": ["a@b.de", 7, None]}) == {"to": ["[e-mail]", 7, None]}


@given(
    st.recursive(
        st.none() | st.text() | st.integers() | st.floats(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_data_goes_through_once_and_for_all(value: object) -> None:
    once = redact(value)
    assert repr(redact(once)) == repr(once)
