"""The patterns of `agentkit.redaction` are written for speed: here are the plain ones they have to agree with."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit.redaction import redact, without_secrets

NAME = r"""(?:
      (?:(?<![A-Za-z0-9])|(?<=[a-z0-9])(?=[A-Z]))
      (?i:(?:api|access|private|signing|encryption)[-_ ]?key | secret(?:[-_ ]?(?:access[-_ ]?)?key)? | token)
    | (?i:password|passwd|passphrase|(?<=[-_])pwd)
    )"""
KEY = re.compile(
    rf"""
      (?P<pem>-----BEGIN\ [A-Z ]{{0,40}}PRIVATE\ KEY-----(?:[^-]|-(?!----))*+(?:-----END\ [A-Z ]{{0,40}}PRIVATE\ KEY-----)?)
    | (?P<jwt>\beyJ(?:\w|-(?!eyJ)){{8,}}+\.[\w-]{{8,}}+\.[\w-]{{8,}})
    | (?P<token>\b(?:(?:sk|pk|rk|gsk|xai|hf|gh[oprsu]|github_pat|glpat|whsec|xox[abprs])[-_.]|AIza|AKIA|ASIA|ya29)
        [A-Za-z0-9_\-.]{{12,}})
    | (?P<scheme>(?i:\b(?:bearer|basic)\ +))(?P<credential>[A-Za-z0-9+/_\-.=]{{12,}})
    | (?P<userinfo>://[^\s/:@]{{0,256}}+:)(?P<password>[^\s/]{{1,256}})(?=@)
    | (?P<name>{NAME}(?![A-Za-z0-9_])(?:\\?["'])?[ \t]*+[:=]{{1,2}}+>?[ \t]*+(?:\\?["'])?)
      (?!\[(?:key|e-mail|card|account|telephone)\])
      (?P<value>(?<=")(?:[^"\\\n]|\\(?!")){{6,}}+(?=\\?") | (?<=')(?:[^'\\\n]|\\(?!')){{6,}}+(?=\\?')
        | (?:[^\s"',;}}\\]|\\(?!["'])){{6,}})
    """,
    re.VERBOSE,
)
SECRET_KEY = re.compile(rf"(?:{NAME}|(?i:^(?:pwd|(?:proxy-)?authorization|(?:set-)?cookie)))\Z", re.VERBOSE)
CARD = re.compile(r"\b[0-9](?:[ -]?[0-9]){12,18}\b")
PERSONAL = (
    (re.compile(r"(?<![\w.+-])(?:[\w.+-]++@[\w-]++\.[\w.-]*\w)+"), "[e-mail]"),
    (re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"), "[account]"),
    (re.compile(r"\+[0-9](?:[ -]?[0-9]){6,14}\b|\(0[0-9]{1,5}\) ?[0-9](?:[ -]?[0-9]){4,9}\b"), "[telephone]"),
)


def plain(value: Any, personal: bool, hide: bool = False) -> Any:
    """What `redact` (`without_secrets` if not `personal`) has to return."""
    if isinstance(value, str):
        return (value and "[key]") if hide else plain_text(value, personal)
    if isinstance(value, dict):
        secret = {k for k in value if isinstance(k, str) and SECRET_KEY.search(k) and "logprob" not in value}
        return {k: plain(v, personal, k in secret) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, personal, hide) for item in value]
    return value


def plain_text(text: str, personal: bool) -> str:
    text = KEY.sub(lambda m: f"{m['scheme'] or m['userinfo'] or m['name'] or ''}[key]", text)
    if personal:
        text = CARD.sub(lambda m: "[card]" if luhn(re.sub("[ -]", "", m[0])) else m[0], text)
        for pattern, label in PERSONAL:
            text = pattern.sub(label, text)
    return text


def luhn(digits: str) -> bool:
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


NAMES = (
    "api key,access_key,private-key,signingKey,encryption_key,secret_access_key,client_secret,secret,authToken,token"
)
NAMES += ",password,passwd,PGPASSWORD,passphrase,x_pwd,X-Api-Key,pwd,proxy-authorization,Set-Cookie,logprob,max_tokens"
TOKENS = "sk- pk_ rk. gsk- xai- hf_ gho_ ghp. ghr- ghs_ ghu_ github_pat_ glpat- whsec_"
TOKENS += " xoxa- xoxb. xoxp_ xoxr- xoxs- AIza AKIA ASIA ya29"
WHOLE = [
    *NAMES.split(","),
    *(f"{start}Abcdefgh-jkl" for start in TOKENS.split()),
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    *("abcdefghijkl", "hunter22xyz", "Bearer abc.def-ghi_jkl0123", "basic  dXNlcjpwYXNz"),
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEvQ-IBAD\n-----END RSA PRIVATE KEY-----",
    *("postgres://user:pw@host/db", "redis://:p@w@h", "https://h.example.org:8080/a@b", "://a:"),
    *("ann.o-hara+x@mail.example.org", "b@c.de", "a@b.c-d@e.f", "x@y", "é@ü.de"),
    *("DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "DE89370400440532013000", "AB12CD"),
    *("+49 170 123 4567", "(030) 1234-567", "(030)12345", "+1234567", "2026-11-21 10:00:00"),
    *("4111 1111 1111 1111", "4012-8888-8888-1881", "4111111111111111", "1234567890123"),
    *("[key]", "[e-mail]", "550e8400-e29b-41d4-a716-446655440000", "task_execution_mode", "order ORD-10003"),
]
BETWEEN = [*" \t\n\r@:=/\\\"'.,;-_+([])}>#aA0zé٣²ßſKİı", "", "", "\u00a0", "\u2028"]
GIVEN = [
    "=",
    ":",
    ": ",
    '": "',
    '\\": \\"',
    "'='",
    " = ",
    "  :",
    "==>",
    "\t\t=",
    '" \t: ',
    '""=',
    "\\=",
    "\n=",
    "é=",
    "\\' :",
    "\\'=",
    "\t=",
    ":= ",
]
ODD = {"s": "sSſ", "k": "kKK", "i": "iIİı", "0": "0٠０", "1": "1١", "-": "-_–", "_": "_- ", " ": " \u00a0\t"}


@st.composite
def fragments(draw: st.DrawFn) -> str:
    """Something to be found, whole or with its start or end cut off, perhaps with letters of the other case or kind."""
    whole = draw(st.sampled_from(WHOLE))
    start, end = draw(
        st.sampled_from([(0, None), (0, None), (0, -1), (1, None), (0, 5), (0, 12), (-5, None), (-12, None)])
    )
    kind = draw(st.sampled_from(["", "", "", "upper", "lower", "title", "odd"]))
    if kind == "odd":
        pick = draw(st.integers(0, 3))
        return "".join((ODD.get(c.lower(), c) * 4)[pick] for c in whole[start:end])
    return str(getattr(whole[start:end], kind)()) if kind else whole[start:end]


PAIRS = st.tuples(fragments(), st.sampled_from(GIVEN), fragments()).map("".join)
TEXTS = st.lists(fragments() | PAIRS | st.sampled_from(BETWEEN) | st.text(max_size=3), max_size=14).map("".join)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=2) | TEXTS,
    lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(TEXTS | fragments() | st.none() | st.integers(), x),
    max_leaves=6,
)


def same(value: Any) -> None:
    assert repr(redact(value)) == repr(plain(value, personal=True))
    assert repr(without_secrets(value)) == repr(plain(value, personal=False))


def variants(text: str) -> list[str]:
    return [text, text.upper(), text.title(), *("".join((ODD.get(c, c) * 4)[i] for c in text) for i in range(4))]


@pytest.mark.parametrize("whole", WHOLE)
def test_what_nearly_is_to_go_is_redacted_as_the_plain_patterns_say(whole: str) -> None:
    for text in variants(whole):
        for i in range(len(text) + 1):
            same(
                [
                    text[i:],
                    text[:i],
                    text[:i] + text[i + 1 :],
                    f"{text[:i]} {text[i:]}",
                    f"{text[:i]}é{text[i:]}\n{text}",
                ]
            )
            same({text[i:]: text, f"a{text[i:]}": text})


@pytest.mark.parametrize("given", GIVEN)
def test_what_is_given_a_name_is_redacted_as_the_plain_patterns_say(given: str) -> None:
    for name in NAMES.split(","):
        same([f"{before}{text}{given}hunter" for text in variants(name) for before in ("", " ", "_", "a")])


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_text_is_redacted_as_the_plain_patterns_say(text: str) -> None:
    same(text)


@settings(max_examples=100, deadline=None)
@given(DATA)
def test_data_is_redacted_as_the_plain_patterns_say(value: object) -> None:
    same(value)


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.sampled_from([KEY, KEY, KEY, CARD, *(p for p, _ in PERSONAL)]).flatmap(st.from_regex), TEXTS)
def test_whatever_a_plain_pattern_matches_is_found(before: str, found: str, after: str) -> None:
    same(before + found + after)


class Kind(StrEnum):
    TOKEN = "token"
    LONG = "a kind with a longer name"


def test_text_of_a_subclass_comes_back_as_plain_text() -> None:
    same([Kind.TOKEN, Kind.LONG, {Kind.TOKEN: Kind.LONG}, True])
