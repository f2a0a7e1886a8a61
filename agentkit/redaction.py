"""Takes secrets, and the plainest personal data, out of texts that are kept.

Patterns, no more: what does not look like a key stays, and of personal data only e-mail addresses and card numbers are
known. A recording of real people's data is still personal data.
"""

from __future__ import annotations

import re
from typing import Any

_SECRETS = re.compile(
    r"""
      (?P<pem>-----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?-----END\ [A-Z ]*PRIVATE\ KEY-----)
    | (?P<jwt>\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})
    | (?P<token>\b(?:sk|pk|rk|gsk|xai|hf|ghp|gho|ghs|glpat|xox[abprs]|AIza|AKIA|ASIA|ya29)[-_.]?[A-Za-z0-9_\-.]{12,})
    | (?P<scheme>(?i:\b(?:bearer|basic)\s+))(?P<credential>[A-Za-z0-9+/_\-.=]{12,})
    | (?P<name>(?i:\b(?:api[-_ ]?key|secret|password|passwd|token|authorization)\b["']?\s*[:=]\s*["']?))
      (?P<value>[^\s"',;}]{6,})
    """,
    re.VERBOSE | re.DOTALL,
)
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w")
_DIGITS = re.compile(r"\b\d(?:[ -]?\d){12,18}\b")


def without_secrets(value: Any) -> Any:
    """JSON-able `value` with everything that looks like a key, token or password replaced."""
    return _map(value, lambda text: _SECRETS.sub(_keep_the_name, text))


def without_personal_data(value: Any) -> Any:
    """As `without_secrets`, and without e-mail addresses and card numbers."""
    return _map(without_secrets(value), lambda text: _DIGITS.sub(_card, _EMAIL.sub("[EMAIL]", text)))


def _keep_the_name(found: re.Match[str]) -> str:
    return f"{found['scheme'] or found['name'] or ''}[SECRET]"


def _card(found: re.Match[str]) -> str:
    return "[CARD]" if _passes_luhn(re.sub(r"\D", "", found[0])) else found[0]


def _passes_luhn(digits: str) -> bool:
    """The check digit that all payment cards carry."""
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    return value
