"""What is taken out of text that people see, and what stays."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentkit.redaction import redact, without_secrets

TAKEN = {
    "write to ann.o-hara+x@mail.example.org now": "write to [e-mail] now",
    "card 4111 1111 1111 1111, please": "card [card], please",
    "4012-8888-8888-1881": "[card]",
    "IBAN DE89 3704 0044 0532 0130 00.": "IBAN [account].",
    "call +49 170 123 4567 or (030) 1234-567": "call [telephone] or [telephone]",
    "sk-abcdefghijklmnopqrstu": "[key]",
    "Authorization: Bearer abc.def-ghi_jkl0123": "Authorization: Bearer [key]",
    "DB_PASSWORD=hunter22xyz": "DB_PASSWORD=[key]",
    "PGPASSWORD=hunter22xyz psql": "PGPASSWORD=[key] psql",
    "client_secret=abcdef123": "client_secret=[key]",
    "clientSecret: 'abcdef123'": "clientSecret: '[key]'",
    "access_token: abcdef123": "access_token: [key]",
    "OPENAI_API_KEY=abcdef123456": "OPENAI_API_KEY=[key]",
    "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG": "AWS_SECRET_ACCESS_KEY=[key]",
    "postgres://user:pw@host.example.org/db": "postgres://user:[key]@host.example.org/db",
    "redis://:pw@host": "redis://:[key]@host",
    "github_pat_11ABCDEFG0abcdefghijkl_mnopqr": "[key]",
    '{"password": "correct horse, battery", "n": 1}': '{"password": "[key]", "n": 1}',
    r'{"arguments": "{\"api_key\": \"hunter22xyz\"}"}': r'{"arguments": "{\"api_key\": \"[key]\"}"}',
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkq": "[key]",  # cut off in the middle
    "ann@example.com+bob@example.com": "[e-mail]",
    "a" * 100 + "@example.com": "[e-mail]",
}
KEPT = [
    "order ORD-10003 of 2026-11-21",
    "$1,234.56 on 12 items",
    "1234567890123",  # 13 digits whose check digit is wrong
    "version 3.17.2, 10.0.0.1",
    "KB-103 and C-0001",
    "max_tokens=500000 and tokens_in: 123456, tokens: 1234567",
    "token 5, token: 5",
    "PWD=/home/user/project",
    "https://host.example.org:8080/a@b",
    "skateboarding-lessons",
]


@pytest.mark.parametrize(("text", "left"), TAKEN.items())
def test_what_looks_personal_or_secret_is_taken_out(text: str, left: str) -> None:
    assert redact(text) == left


@pytest.mark.parametrize("text", KEPT)
def test_what_does_not_stays(text: str) -> None:
    assert redact(text) == text


def test_data_is_redacted_inside_and_keys_stay() -> None:
    assert redact({"to": ["a@b.de", 7, None]}) == {"to": ["[e-mail]", 7, None]}


@pytest.mark.parametrize("clean", [redact, without_secrets])
@pytest.mark.parametrize("key", ["password", "db_password", "apiKey", "X-Api-Key", "client_secret", "Authorization"])
def test_text_under_a_key_that_names_a_secret_goes_whole(clean: Any, key: str) -> None:
    assert clean({"a": [{key: "hunter22xyz"}]}) == {"a": [{key: "[key]"}]}
    assert clean({key: ["x y", ""]}) == {key: ["[key]", ""]}


@pytest.mark.parametrize(
    "data",
    [
        {"max_tokens": "500000", "tokens_in": 7, "password": None},
        {"properties": {"password": {"type": "string", "title": "Password"}}},
        {"token": " hello", "logprob": -0.1},
    ],
)
def test_data_that_only_speaks_of_secrets_stays(data: dict[str, Any]) -> None:
    assert redact(data) == data


UNITS = ["a", "1", " ", ".", "@", "-", "a.", "a@", "@.", "1 ", "1-", "a@a.", "a@b.-", "a+@", "+1", "(0", "A", "DE89 "]
UNITS += ["eyJ-", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "-----BEGIN ", "sk-", "bearer ", "://a:", "\\"]
UNITS += ["password ", 'password="', "password=\"'", "token: ", "aA", "secret_"]
UNITS += [": ", "= ", "key:", 'key\\":', "sk-a ", "://", "://a@", "a@ ", "AB12", "2026-11-21 ", "ya2", "é", "\u2028"]


@pytest.mark.parametrize("before", ["", "x@x", 'password="', "://a:", "eyJ"])
@pytest.mark.parametrize("unit", UNITS)
def test_no_text_takes_long(before: str, unit: str) -> None:
    text = before + unit * (200_000 // len(unit))
    began = time.thread_time()
    redact(text)
    assert time.thread_time() - began < 1


PIECES = [*UNITS, "b@c.de", "hunter22", "\n", "[", "[key]", "[e-mail]", "]", "=", ":", '"', "'", ",", "}", "éB"]
PIECES += ["api_key", "4111111111111111", "+491701234567", "DE89370400440532013000"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example('password="a@b.c"')
def test_what_was_redacted_stays_as_it_is(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


@given(
    st.recursive(
        st.none() | st.text() | st.integers() | st.floats(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_data_goes_through_once_and_for_all(value: object) -> None:
    once = redact(value)
    assert repr(redact(once)) == repr(once)
