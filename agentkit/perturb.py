"""Seeded small changes to a case's text, as the repeats of an evaluation use them."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from agentkit.errors import UsageError

T = TypeVar("T")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MIN_WORDS = 4  # ids, names and codes are shorter
TYPO_SHARE = 0.03  # of the letters of a text
_OPENINGS = ("Hello,", "Hi there,", "Hello team,", "Good day,", "Dear support team,", "Hi, a quick message:")
_CLOSINGS = ("Thanks.", "Thank you.", "Thanks in advance.", "Many thanks.", "Kind regards", "Best wishes")
_GREETINGS = _words("hi hello hey dear good greetings")
_NEGATIONS = _words("""
    no not nor non never none nobody nothing nowhere neither without cannot nt cant dont wont isnt wasnt arent werent
    didnt doesnt havent hasnt hadnt wouldnt couldnt shouldnt aint
""")
_NUMBERS = _words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fourty fifty sixty seventy eighty ninety hundred hundreds thousand thousands
    million millions billion half quarter dozen dozens single double triple once twice
""")
_CURRENCIES = _words("dollar dollars buck bucks cent cents euro euros pound pounds quid usd eur gbp franc francs yen")
_JOINERS = _words("a an and of point odd few couple or to")
_ABBREVIATIONS = _words("mr. mrs. ms. dr. st. vs. etc. e.g. i.e. approx. inc. ltd.")
_LETTERS = re.compile(r"[^\W\d_]+")
_CONTRACTED_NOT = re.compile(r"n['`\u2019\u02bc\u00b4]t\b")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'\u201d\u2019)\]]*$")


def perturb(inputs: Mapping[str, Any], *, case_id: str, repeat: int, seed: int = 0) -> dict[str, Any]:
    """The inputs of a case as its `repeat`-th run gets them; repeat 0 gets them as they are.

    Every other repeat changes each text of at least four words in one or two of these ways, and nothing else:

    - typos: a letter swapped, dropped or doubled inside words of four letters or more, about 3 % of the letters
      at most and at least one;
    - case: all lower, sentences begun in lower case, or one word in capitals;
    - order: sentences change places, where there are three or more; the first one stays first;
    - filler: a greeting before or thanks after the text.

    Words that decide the case are left as they are and keep their order, sentences that hold them included:
    everything with a digit, a currency sign, `@`, `/` or `http` (amounts, ids, dates, addresses), negations, and
    numbers and amounts written in words.

    The change depends on seed, case id, repeat and the name of the input alone: not on the process, the Python
    version or the other cases. Two versions of a system that run with the same seed get the same texts, so their
    results pair up case by case and repeat by repeat; how hard a perturbation happens to be cancels out in the
    difference.

    Raises:
        UsageError: `repeat` is negative.
    """
    if repeat < 0:
        raise UsageError(f"repeat must be 0 (unchanged) or above, got {repeat!r}")
    if repeat == 0:
        return dict(inputs)
    return {
        name: _changed(value, _Dice(seed, case_id, repeat, name))
        if isinstance(value, str) and len(value.split()) >= MIN_WORDS
        else value
        for name, value in inputs.items()
    }


class _Dice:
    """Draws built on `Random.random` alone: Python promises the same sequence for it in every version."""

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256(json.dumps(key).encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        keys = [self._random() for _ in items]
        return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


@dataclass(frozen=True)
class _Token:
    """A run of characters without white space, and the white space behind it."""

    text: str
    space: str
    fixed: bool

    def altered(self, text: str) -> _Token:
        """This token with another text, unless it is fixed or the new text would mean something (knot, not)."""
        return self if self.fixed or not text or _decides(text) else _Token(text, self.space, False)


def _changed(text: str, dice: _Dice) -> str:
    lead = text[: len(text) - len(text.lstrip())]
    tokens = _tokens(text)
    wanted, filled = 1 + dice.below(2), False
    for change in dice.shuffled((_typos, _case, _order, _filler)):
        if change is _filler:  # done last: a greeting must not be moved into the text
            wanted, filled = wanted - 1, True
        elif (changed := change(tokens, dice)) != tokens:
            wanted, tokens = wanted - 1, changed
        if not wanted:
            break
    tokens = _filler(tokens, dice) if filled else tokens
    return lead + "".join(t.text + t.space for t in tokens)


# What is never touched


def _tokens(text: str) -> list[_Token]:
    pairs: list[tuple[str, str]] = re.findall(r"(\S+)(\s*)", text)
    words = [word for word, _ in pairs]
    fixed = [_decides(word) for word in words]
    money = [not _parts(word).isdisjoint(_CURRENCIES) for word in words]
    for i in range(len(words)):
        # "fourty dollars", "two hundred and fifty dollars"
        before_money = i + 1 < len(words) and money[i + 1]
        joins = bool(_parts(words[i]) & _JOINERS) and any(_is_amount(w) for w in words[max(i - 1, 0) : i + 2])
        fixed[i] = fixed[i] or before_money or joins
    return [_Token(word, space, f) for (word, space), f in zip(pairs, fixed, strict=True)]


def _parts(word: str) -> set[str]:
    return set(_LETTERS.findall(word.lower()))


def _is_amount(word: str) -> bool:
    return not _parts(word).isdisjoint(_NUMBERS | _CURRENCIES)


def _decides(word: str) -> bool:
    """Whether the word is an id, an amount, an address or a negation."""
    low = word.lower()
    if any(c in "@/" or c.isnumeric() or unicodedata.category(c) == "Sc" for c in word) or "http" in low:
        return True
    return bool(_CONTRACTED_NOT.search(low)) or not _parts(word).isdisjoint(_NEGATIONS) or _is_amount(word)


# The four changes


def _typos(tokens: list[_Token], dice: _Dice) -> list[_Token]:
    letters = sum(c.isalpha() for t in tokens for c in t.text)
    count = 1 + dice.below(max(1, int(letters * TYPO_SHARE)))
    words = [i for i, t in enumerate(tokens) if not t.fixed and any(len(w) >= 4 for w in _LETTERS.findall(t.text))]
    changed = list(tokens)
    for i in dice.shuffled(words)[:count]:
        changed[i] = tokens[i].altered(_misspelt(tokens[i].text, dice))
    return changed


def _misspelt(token: str, dice: _Dice) -> str:
    word = dice.pick([m for m in _LETTERS.finditer(token) if len(m.group()) >= 4])
    at = word.start() + 1 + dice.below(len(word.group()) - 3)  # first and last letter stay
    slip = dice.pick(("swap", "drop", "double"))
    if slip == "swap" and token[at] != token[at + 1]:
        return token[:at] + token[at + 1] + token[at] + token[at + 2 :]
    return token[:at] + ("" if slip == "drop" else token[at] * 2) + token[at + 1 :]


def _case(tokens: list[_Token], dice: _Dice) -> list[_Token]:
    styles = dice.shuffled((_lower, _uncapitalised, _shouted))
    return next((changed for style in styles if (changed := style(tokens, dice)) != tokens), tokens)


def _lower(tokens: list[_Token], dice: _Dice) -> list[_Token]:
    return [t.altered(t.text.lower()) for t in tokens]


def _uncapitalised(tokens: list[_Token], dice: _Dice) -> list[_Token]:
    starts = [i == 0 or _ends(tokens[i - 1]) for i in range(len(tokens))]
    # Only words like "The": "uSB" is nobody's slip.
    return [
        t.altered(t.text.lower()) if first and t.text[1:] == t.text[1:].lower() else t
        for t, first in zip(tokens, starts, strict=True)
    ]


def _shouted(tokens: list[_Token], dice: _Dice) -> list[_Token]:
    words = [i for i, t in enumerate(tokens) if t.altered(t.text.upper()) != t and len(t.text) >= 3]
    chosen = dice.pick(words) if words else None
    return [t.altered(t.text.upper()) if i == chosen else t for i, t in enumerate(tokens)]


def _order(tokens: list[_Token], dice: _Dice) -> list[_Token]:
    sentences = _sentences(tokens)
    if len(sentences) < 3:
        return tokens
    # A last line that ends without a stop (a name, a sign-off) belongs where it is.
    last = len(sentences) if _ends(tokens[-1]) else len(sentences) - 1
    middle = sentences[1:last]
    order = dice.shuffled(range(len(middle)))
    held = {i for i, sentence in enumerate(middle) if any(t.fixed for t in sentence)}
    in_order = iter(sorted(held))
    moved = [middle[next(in_order) if i in held else i] for i in order]
    # The white space between sentences stays in place, so paragraphs do too.
    gaps = [sentence[-1].space for sentence in middle]
    moved = [[*s[:-1], _Token(s[-1].text, gap, s[-1].fixed)] for s, gap in zip(moved, gaps, strict=True)]
    return [t for sentence in (sentences[0], *moved, *sentences[last:]) for t in sentence]


def _ends(token: _Token) -> bool:
    return bool(_SENTENCE_END.search(token.text)) and token.text.lower() not in _ABBREVIATIONS


def _sentences(tokens: list[_Token]) -> list[list[_Token]]:
    sentences: list[list[_Token]] = [[]]
    for token in tokens:
        sentences[-1].append(token)
        if _ends(token):
            sentences.append([])
    return [s for s in sentences if s]


def _filler(tokens: list[_Token], dice: _Dice) -> list[_Token]:
    greeted = not _parts(tokens[0].text).isdisjoint(_GREETINGS)
    if greeted or dice.below(2):
        closed = [*tokens[:-1], _Token(tokens[-1].text, "\n", tokens[-1].fixed)]
        return [*closed, _Token(dice.pick(_CLOSINGS), tokens[-1].space, True)]
    return [_Token(dice.pick(_OPENINGS), " ", True), *tokens]
