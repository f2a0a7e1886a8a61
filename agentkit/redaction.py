"""Takes secrets and personal data out of what people see or what is kept, as far as patterns can tell.

What does not look like a key stays, and of personal data only e-mail addresses, cards, accounts and telephone numbers are
known, no names: text that has gone through here is still to be handled as personal data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_KEY = re.compile(
    r"""
      (?P<pem>-----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?-----END\ [A-Z ]*PRIVATE\ KEY-----)
    | (?P<jwt>\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})
    | (?P<token>\b(?:sk|pk|rk|gsk|xai|hf|ghp|gho|ghs|glpat|xox[abprs]|AIza|AKIA|ASIA|ya29)[-_.]?[A-Za-z0-9_\-.]{12,})
    | (?P<scheme>(?i:\b(?:bearer|basic)\ +))(?P<credential>[A-Za-z0-9+/_\-.=]{12,})
    | (?P<name>(?i:\b(?:api[-_ ]?key|secret|password|passwd|token)\b["']?\ *[:=]\ *["']?))(?P<value>[^\s"',;}\[]{6,})
    """,
    re.VERBOSE | re.DOTALL,
)
_PERSONAL = (
    (re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w"), "[e-mail]"),
    (re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"), "[account]"),
    (re.compile(r"\+[0-9](?:[ -]?[0-9]){6,14}\b|\(0[0-9]{1,5}\) ?[0-9](?:[ -]?[0-9]){4,9}\b"), "[telephone]"),
)
_DIGITS = re.compile(r"\b[0-9](?:[ -]?[0-9]){12,18}\b")


def redact(value: Any) -> Any:
    """`value`, the data inside it included, without what looks like a secret or like personal data; keys stay."""
    return _map(value, _clean)


def without_secrets(value: Any) -> Any:
    """As `redact`, but only without keys, tokens and passwords."""
    return _map(value, _without_keys)


def _clean(text: str) -> str:
    text = _DIGITS.sub(_card, _without_keys(text))
    for pattern, label in _PERSONAL:
        text = pattern.sub(label, text)
    return text


def _without_keys(text: str) -> str:
    return _KEY.sub(lambda found: f"{found['scheme'] or found['name'] or ''}[key]", text)


def _card(found: re.Match[str]) -> str:
    return "[card]" if _passes_luhn(re.sub(r"[ -]", "", found[0])) else found[0]


def _passes_luhn(digits: str) -> bool:
    """The check digit that all payment cards carry."""
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map(item, change) for item in value]
    return value
