"""Takes secrets and personal data out of what people see or what is kept, as far as patterns can tell.

What does not look like a key stays, and of personal data only e-mail addresses, cards, accounts and telephone numbers are
known, no names: text that has gone through here is still to be handled as personal data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

# What a name ends in that stands before a secret: DB_PASSWORD, client_secret, accessToken, X-Api-Key; not max_tokens.
_NAME = r"""(?:
      (?:(?<![A-Za-z0-9])|(?<=[a-z0-9])(?=[A-Z]))
      (?i:(?:api|access|private|signing|encryption)[-_ ]?key | secret(?:[-_ ]?(?:access[-_ ]?)?key)? | token)
    | (?i:password|passwd|passphrase|(?<=[-_])pwd)
    )"""
_LABEL = r"\[(?:key|e-mail|card|account|telephone)\]"
# Every part takes time in proportion to the text's length, whatever the text: a run of characters is read from its start
# only, or ends where the next one could start. A group is a secret at the end of a match, what stands before it is kept.
# To `(?i:)`, ſ is an s (and the Kelvin sign a k).
_KEY = re.compile(
    rf"""
      -----BEGIN\ [A-Z ]{{0,40}}PRIVATE\ KEY-----(?:[^-]|-(?!----))*+(?:-----END\ [A-Z ]{{0,40}}PRIVATE\ KEY-----)?
    | eyJ(?<=\beyJ)(?:\w|-(?!eyJ)){{8,}}+\.[\w-]{{8,}}+\.[\w-]{{8,}}
    | \b(?:(?:sk|pk|rk|gsk|xai|hf|gh[oprsu]|github_pat|glpat|whsec|xox[abprs])[-_.]|AIza|AKIA|ASIA|ya29)
      [A-Za-z0-9_\-.]{{12,}}
    | [bB](?<=\b.)(?i:earer|asic)\ +([A-Za-z0-9+/_\-.=]{{12,}})
    | ://[^\s/:@]{{0,256}}+:([^\s/]{{1,256}})(?=@)
    | (?=[aepstAEPSTſ]){_NAME}(?![A-Za-z0-9_])(?:\\?["'])?[ \t]*+[:=]{{1,2}}+>?[ \t]*+(?:\\?["'])?(?!{_LABEL})
      ((?<=")(?:[^"\\\n]|\\(?!")){{6,}}+(?=\\?") | (?<=')(?:[^'\\\n]|\\(?!')){{6,}}+(?=\\?')
        | (?:[^\s"',;}}\\]|\\(?!["'])){{6,}}+)
    """,
    re.VERBOSE,
)
# What is in each match of _KEY, told by a character that is rare in text: a pattern that begins with a set of characters,
# not with a lookbehind, \b or alternatives, `re` looks for many times faster. Of a name it is the "=" or ":" after it, with
# the end of the name (its last letter first: that tells soonest) and quote or space between them.
_NAMED = "|".join(
    rf"(?<=(?i:[denty]){gap}.)(?<=(?i:.key|.pwd|oken|cret|word|sswd|rase){gap}.)"
    for gap in ("", r"""["'\ \t]""", r"""\\["']""")
)
_SIGN = re.compile(
    rf"""[-_.:=bBJA2](?:
      (?<=[:=])(?:{_NAMED}|(?<=["'\ \t][\ \t].))
    | //(?<=://)[^\s/@]*+@
    | (?<=-)BEGIN
    | (?:(?<=\b(?:[prs]k|hf)[-_.])|(?<=(?:gsk|xai|gh[oprsu]|pat|sec|ox[abprs])[-_.]))[A-Za-z0-9_\-.]{{12}}
    | (?<=[bB])(?i:earer|asic)\ +[A-Za-z0-9+/_\-.=]{{12}}
    | (?<=eyJ)
    | (?:Iza|KIA|SIA)(?<=A...)
    | 9(?<=ya29)
    )""",
    re.VERBOSE,
)
_SECRET_KEY = re.compile(rf"(?:{_NAME}|(?i:^(?:pwd|(?:proxy-)?authorization|(?:set-)?cookie)))\Z", re.VERBOSE)
# `(?<!\w.)` is the \b before the character just read.
_CARD = re.compile(r"[0-9](?<!\w.)(?:[ -]?[0-9]){12,18}\b")
_E_MAIL = re.compile(r"(?<![\w.+-])(?:[\w.+-]++@[\w-]++\.[\w.-]*\w)+")
_ACCOUNT = re.compile(r"[A-Z](?<!\w.)[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_TELEPHONE = re.compile(r"\+[0-9](?:[ -]?[0-9]){6,14}\b|\(0[0-9]{1,5}\) ?[0-9](?:[ -]?[0-9]){4,9}\b")
# What each card, account and telephone number has in it.
_NUMBER = re.compile(r"[0-9](?:(?<=[A-Z]{2}.)[0-9]|(?<!\w.)(?:[ -]?[0-9]){12}|(?<=\+.)|(?<=\(0))")
_PLAIN = frozenset({int, float, bool, type(None)})


def redact(value: Any) -> Any:
    """`value`, the data inside it included, without what looks like a secret or like personal data; keys stay.

    Text under a key that names a secret (`password`, `api_key`) goes whole, whatever it looks like.
    """
    return _map(value, _clean)


def without_secrets(value: Any) -> Any:
    """As `redact`, but only without keys, tokens and passwords."""
    return _map(value, _without_keys)


def _clean(text: str) -> str:
    text = _without_keys(text)
    numbers = _NUMBER.search(text)
    if numbers:
        text = _CARD.sub(_card, text)
    if "@" in text:  # word for word: no address has a space
        text = " ".join([_E_MAIL.sub("[e-mail]", word) if "@" in word else word for word in text.split(" ")])
    return _TELEPHONE.sub("[telephone]", _ACCOUNT.sub("[account]", text)) if numbers else text


def _without_keys(text: str) -> str:
    return _KEY.sub(_key, text) if _SIGN.search(text) else text


def _key(found: re.Match[str]) -> str:
    return found.string[found.start() : found.start(found.lastindex or 0)] + "[key]"


def _card(found: re.Match[str]) -> str:
    return "[card]" if _passes_luhn(re.sub(r"[ -]", "", found[0])) else found[0]


def _passes_luhn(digits: str) -> bool:
    """The check digit that all payment cards carry."""
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, str):
        text = value[:]  # of a subclass: plain text, whether anything is replaced in it or not
        return change(text) if len(text) > 7 or "@" in text else text  # what is found without an "@" is longer
    if isinstance(value, dict):
        # Of a model's answer, the tokens with their probabilities are no secrets.
        return {
            k: _hidden(v, change)
            if isinstance(k, str) and _names_secret(k[-20:]) and "logprob" not in value
            else _map(v, change)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map(item, change) for item in value]
    return value


@lru_cache(maxsize=4096)
def _names_secret(end: str) -> bool:
    """Whether the key with this end names a secret: longer than 19 characters no name is."""
    return _SECRET_KEY.search(end) is not None


def _hidden(value: Any, change: Callable[[str], str]) -> Any:
    """Text, also in a list, hidden whole; data inside (a schema's) is looked through as any other."""
    if isinstance(value, str):
        return value and "[key]"
    if isinstance(value, list | tuple):
        return [_hidden(item, change) for item in value]
    return _map(value, change)
