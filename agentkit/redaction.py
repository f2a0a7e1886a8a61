"""Takes secrets and personal data out of what people see or what is kept, as far as patterns can tell.

What does not look like a key stays, and of personal data only e-mail addresses, cards, accounts and telephone numbers are
known, no names: text that has gone through here is still to be handled as personal data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# What a name ends in that stands before a secret: DB_PASSWORD, client_secret, accessToken, X-Api-Key; not max_tokens.
_NAME = r"""(?:
      (?:(?<![A-Za-z0-9])|(?<=[a-z0-9])(?=[A-Z]))
      (?i:(?:api|access|private|signing|encryption)[-_ ]?key | secret(?:[-_ ]?(?:access[-_ ]?)?key)? | token)
    | (?i:password|passwd|passphrase|(?<=[-_])pwd)
    )"""
_LABEL = r"\[(?:key|e-mail|card|account|telephone)\]"
# Every part takes time in proportion to the text's length, whatever the text: a run of characters is read from its start
# only, or ends where the next one could start.
_KEY = re.compile(
    rf"""
      (?P<pem>-----BEGIN\ [A-Z ]{{0,40}}PRIVATE\ KEY-----(?:[^-]|-(?!----))*+(?:-----END\ [A-Z ]{{0,40}}PRIVATE\ KEY-----)?)
    | (?P<jwt>\beyJ(?:\w|-(?!eyJ)){{8,}}+\.[\w-]{{8,}}+\.[\w-]{{8,}})
    | (?P<token>\b(?:(?:sk|pk|rk|gsk|xai|hf|gh[oprsu]|github_pat|glpat|whsec|xox[abprs])[-_.]|AIza|AKIA|ASIA|ya29)
        [A-Za-z0-9_\-.]{{12,}})
    | (?P<scheme>(?i:\b(?:bearer|basic)\ +))(?P<credential>[A-Za-z0-9+/_\-.=]{{12,}})
    | (?P<userinfo>://[^\s/:@]{{0,256}}+:)(?P<password>[^\s/]{{1,256}})(?=@)
    | (?P<name>{_NAME}(?![A-Za-z0-9_])(?:\\?["'])?[ \t]*+[:=]{{1,2}}+>?[ \t]*+(?:\\?["'])?)(?!{_LABEL})
      (?P<value>(?<=")(?:[^"\\\n]|\\(?!")){{6,}}+(?=\\?") | (?<=')(?:[^'\\\n]|\\(?!')){{6,}}+(?=\\?')
        | (?:[^\s"',;}}\\]|\\(?!["'])){{6,}})
    """,
    re.VERBOSE,
)
_SECRET_KEY = re.compile(rf"(?:{_NAME}|(?i:^(?:pwd|(?:proxy-)?authorization|(?:set-)?cookie)))\Z", re.VERBOSE)
_PERSONAL = (
    (re.compile(r"(?<![\w.+-])(?:[\w.+-]++@[\w-]++\.[\w.-]*\w)+"), "[e-mail]"),
    (re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"), "[account]"),
    (re.compile(r"\+[0-9](?:[ -]?[0-9]){6,14}\b|\(0[0-9]{1,5}\) ?[0-9](?:[ -]?[0-9]){4,9}\b"), "[telephone]"),
)
_DIGITS = re.compile(r"\b[0-9](?:[ -]?[0-9]){12,18}\b")


def redact(value: Any) -> Any:
    """`value`, the data inside it included, without what looks like a secret or like personal data; keys stay.

    Text under a key that names a secret (`password`, `api_key`) goes whole, whatever it looks like.
    """
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
    return _KEY.sub(lambda found: f"{found['scheme'] or found['userinfo'] or found['name'] or ''}[key]", text)


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
        return {k: _hidden(v, change) if _names_secret(k, value) else _map(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map(item, change) for item in value]
    return value


def _names_secret(key: Any, among: dict[Any, Any]) -> bool:
    """Whether the text under the key is a secret; the tokens of a model's answer, with their probabilities, are none."""
    return isinstance(key, str) and _SECRET_KEY.search(key) is not None and "logprob" not in among


def _hidden(value: Any, change: Callable[[str], str]) -> Any:
    """Text, also in a list, hidden whole; data inside (a schema's) is looked through as any other."""
    if isinstance(value, str):
        return value and "[key]"
    if isinstance(value, list | tuple):
        return [_hidden(item, change) for item in value]
    return _map(value, change)
