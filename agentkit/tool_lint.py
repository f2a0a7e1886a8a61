"""Lint tool schemas for what makes a model call a tool wrongly.

| rule | severity | what it finds |
|---|---|---|
| invalid-schema | error | no JSON schema (draft 2020-12), not one of an object, or a `$ref` that leads nowhere |
| required-unknown | error | `required` names a property that does not exist |
| duplicate-name | error | two tools of one name |
| required-mismatch | warning | required, yet it has a default or calls itself optional; or the other way round |
| default-mismatch | warning | the default does not fit the property's own type, enum or bounds |
| untyped | warning | a property without type, an object without properties, an array without items |
| missing-description | warning | no text says what a tool or a parameter is |
| vague-description | warning | the text is a placeholder or says no more than the name |
| missing-enum | warning | the text lists the only values allowed, the schema allows any string |
| unbounded-number | warning | the text states a range, or the name implies one (money, share, limit), that the schema lacks |
| unbounded-count | note | a number of things that may be negative |
| unbounded-string | warning | a date, code or the like of which neither schema nor text says how it is written |
| missing-unit | warning | a duration, distance, rate … in no unit |
| overlap | warning | two tools that name, text and parameters hardly tell apart |
| type-conflict | warning | one parameter name, two types, in two tools |
| permission-mismatch | warning | a tool of permission `read` whose name says that it changes something |

A rule speaks only where a model has been given too little to call the tool rightly, so a short list is worth reading.
On 2,259 public schemas (BFCL, tau-bench) 94 of 100 findings in a last sample were right by hand, 57 of 59 errors and
warnings; counts, samples and what was wrong are in `tests/benchmarks/tool_lint.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from agentkit.tool_schemas import Place, ToolSchema, alternatives, places_of, resolve, schema_problems, words_of

if TYPE_CHECKING:
    from agentkit.systems import System
    from agentkit.tools import Tool

__all__ = ["Finding", "Rule", "Severity", "ToolSchema", "lint", "lint_tools"]

Severity = Literal["error", "warning", "note"]
Rule = Literal[
    "invalid-schema",
    "required-unknown",
    "duplicate-name",
    "required-mismatch",
    "default-mismatch",
    "untyped",
    "missing-description",
    "vague-description",
    "missing-enum",
    "unbounded-number",
    "unbounded-count",
    "unbounded-string",
    "missing-unit",
    "overlap",
    "type-conflict",
    "permission-mismatch",
]
ERRORS: frozenset[Rule] = frozenset({"invalid-schema", "required-unknown", "duplicate-name"})
NOTES: frozenset[Rule] = frozenset({"unbounded-count"})
OVERLAP = 0.8  # cosine similarity; the two pairs it finds in BFCL and tau-bench share their whole text


@dataclass(frozen=True)
class Finding:
    """One thing to mend: `where` is a path such as `arguments.amount_usd`; `message` says what, and what to do."""

    rule: Rule
    tool: str
    where: str
    message: str

    @property
    def severity(self) -> Severity:
        """error: calls cannot be right or providers refuse the schema; warning: a model may well call it wrongly; note: seldom."""
        return "error" if self.rule in ERRORS else "note" if self.rule in NOTES else "warning"


def lint_tools(tools: System | Iterable[Tool[..., Any] | ToolSchema]) -> list[Finding]:
    """`lint` for the tools of a system, or for a list of tools."""
    if isinstance(tools, Iterable):
        return lint([t if isinstance(t, ToolSchema) else ToolSchema.from_tool(t) for t in tools])
    return lint([ToolSchema.from_spec(spec) for spec in tools.spec()["tools"].values()])


def lint(schemas: Sequence[ToolSchema]) -> list[Finding]:
    """What is wrong with tools that one model is offered together; empty where nothing is.

    Never raises for what a schema holds.
    """
    found: list[Finding] = []
    readable: list[ToolSchema] = []
    for tool in schemas:
        found += [Finding(rule, tool.name, where, message) for rule, where, message in _tool_rules(tool)]
        problems = [
            Finding("invalid-schema", tool.name, where, what) for where, what in schema_problems(tool.parameters)
        ]
        found += problems
        if not problems:  # what the other rules said of a broken schema would be guesswork
            readable.append(tool)
            places = list(places_of(tool))
            found += [Finding(rule, tool.name, p.path, what) for p in places for rule, what in _place_rules(p)]
            found += [Finding("missing-description", tool.name, at, what) for at, what in _undescribed(places)]
    return [*found, *_duplicate_names(schemas), *_overlaps(schemas), *_type_conflicts(readable)]


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ---- rules about a tool


_PLACEHOLDER = re.compile(r"(todo|tbd|fixme|n/?a|none|null|description|lorem ipsum.*|\.+|-+|\?+|x+)[.:!]?", re.I)
_FILLER = _set("a an the this that of for to in on by and or it its is be use used given function tool")
_WRITING = _set(
    "add approve archive assign book buy cancel charge close create delete deploy disable drop enable execute insert "
    "issue modify overwrite patch pay post publish purchase refund register remove rename replace reset revoke save "
    "send set submit terminate transfer truncate update upload upsert withdraw write"
)


# Where the name alone does not say what happens: it changes something, or what it handles could be anything.
_VAGUE = _WRITING | _set("data do handle info manage process run")


def _tool_rules(tool: ToolSchema) -> Iterator[tuple[Rule, str, str]]:
    text, words = tool.description.strip(), words_of(tool.name)
    if not text:
        said = "no description; say what the tool does, when to use it and what it returns"
        yield "missing-description", "description", said
    elif _PLACEHOLDER.fullmatch(text) or (_repeats(text, tool.name) and not _VAGUE.isdisjoint(words)):
        said = f"{text!r:.80} says no more than the name; say when to use it, what it changes and what it returns"
        yield "vague-description", "description", said
    verb = next(iter(words_of(tool.name.rpartition(".")[2])), "")
    if tool.permission == "read" and verb in _WRITING:
        said = f"its name begins with {verb!r}, its permission says that it only reads; make it `write` or rename it"
        yield "permission-mismatch", "permission", said


def _repeats(text: str, name: str) -> bool:
    """Whether every word of the text stands in the name already, up to its ending."""
    told = {_stem(w) for w in words_of(text) if w not in _FILLER}
    return told <= {_stem(w) for w in words_of(name)}


def _stem(word: str) -> str:
    return re.sub(r"(ies|es|s|ed|ing|e|y)$", "", word) or word


# ---- rules about one value


def _place_rules(place: Place) -> Iterator[tuple[Rule, str]]:
    yield from _required_unknown(place)
    yield from _untyped(place)
    if not place.name:
        return
    yield from _required_mismatch(place)
    yield from _default_mismatch(place)
    yield from _vague(place)
    yield from _unbounded_number(place)
    yield from (listed := list(_missing_enum(place)))
    if place.text and not listed:  # without a text, the finding is that there is none
        yield from _unbounded_string(place)
        yield from _missing_unit(place)


def _required_unknown(place: Place) -> Iterator[tuple[Rule, str]]:
    schema = place.schema
    if schema.get("type") not in ("object", None) or schema.get("patternProperties"):
        return
    if unknown := [n for n in schema.get("required", ()) if n not in schema.get("properties", {})]:
        yield "required-unknown", f"`required` names {unknown!r}, which are no properties; define or remove them"


# Data that a tool only passes on or looks into has whatever shape it has.
_ANY_SHAPE = re.compile(r"\b(?:payload|json|arbitrary|free-?form|any (?:object|value|keys?)|objects? to|state)\b", re.I)
_TYPING = ("type", "enum", "const", "anyOf", "oneOf", "not", "if", "format", "pattern")


def _untyped(place: Place) -> Iterator[tuple[Rule, str]]:
    schema, shape = place.schema, ("properties", "patternProperties", "propertyNames", "anyOf", "oneOf")
    if place.path == "arguments":
        return
    if place.type == "object" and not any(schema.get(k) for k in (*shape, "required")):
        values = schema.get("additionalProperties")
        if values is not False and not (isinstance(values, Mapping) and values) and not _ANY_SHAPE.search(place.text):
            yield "untyped", "an object without properties; list them, or describe the values in additionalProperties"
    elif place.type == "array" and not schema.get("items") and not schema.get("prefixItems"):
        yield "untyped", "an array without items; say of what type they are"
    elif place.name and not any(key in schema for key in (*_TYPING, "properties", "items")):
        yield "untyped", "no type; a model may send anything"


_OPTIONAL = re.compile(
    r"\boptional\b(?! (?:services|extras|features|items|add))|\bdefaults? (?:value )?(?:is|to|=)(?! be\b)"
    r"|\bdefaults?:|\b(?:if|when) (?:it is )?(?:not|none|un)[ -]?(?:specified|provided|given|set)\b",
    re.I,
)
_DEMANDED = re.compile(
    r"^\W*(?:required|mandatory)\b\W|\((?:required|mandatory)\)|\bth(?:is|e) (?:field|parameter|argument) is (?:required|mandatory)\b",
    re.I,
)


def _required_mismatch(place: Place) -> Iterator[tuple[Rule, str]]:
    if not place.required:
        if (said := _DEMANDED.search(place.text)) and "default" not in place.schema:
            yield "required-mismatch", f"its text says {said[0].strip()!r}, but `required` does not name it; add it"
        return
    if "default" in place.schema:
        default = place.schema["default"]
        yield "required-mismatch", f"required, though it has a default ({default!r:.40}); take it out of `required`"
    elif (said := _OPTIONAL.search(place.text)) and not place.nullable:
        yield "required-mismatch", f"required, though its text says {said[0]!r}; take it out of `required`"


_CHECKED = ("type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def _default_mismatch(place: Place) -> Iterator[tuple[Rule, str]]:
    from jsonschema import Draft202012Validator

    default = place.schema.get("default")
    if default is None:
        return  # null as a default means: none
    asked = {k: v for k, v in place.schema.items() if k in _CHECKED}
    if error := next(Draft202012Validator(asked).iter_errors(default), None):
        yield "default-mismatch", f"the default does not fit: {error.message:.100}; mend the default or the type"


_CRYPTIC = _set("arg args config data info input misc obj options opts param params payload val value x y z")


def _vague(place: Place) -> Iterator[tuple[Rule, str]]:
    told = place.text
    if told and (_PLACEHOLDER.fullmatch(told) or (_CRYPTIC.issuperset(place.words) and _repeats(told, place.name))):
        yield "vague-description", f"{told!r:.60} says no more than the name; say what it is and give an example"


def _undescribed(places: Iterable[Place]) -> Iterator[tuple[str, str]]:
    """(where, message), one for all the bare properties of an object: a function's arguments are often all bare."""
    bare: dict[str, list[str]] = {}
    for place in places:
        told = (
            place.text or _explained(place.schema) or re.search(rf"\b{re.escape(place.name)}\b", place.tool.description)
        )
        if place.name and not told:
            bare.setdefault(place.path[: -len(place.name) - 1], []).append(place.name)
    for where, names in bare.items():
        yield where, f"no description of {', '.join(names)}; say what each is, with an example or its unit"


def _explained(schema: Any) -> bool:
    """Whether the values allowed, or the parts, say what is meant where the whole has no text."""
    if not isinstance(schema, Mapping):
        return False
    if any(schema.get(k) for k in ("description", "enum", "const")):
        return True
    return any(
        _explained(p) for p in (schema.get("items"), *alternatives(schema), *schema.get("properties", {}).values())
    )


_OPEN = re.compile(
    r"\betc\b|\be\.?g\b|\beg:|such as|for (?:example|instance)|\bexamples?\b|\blike\b|\binclud|\.\.\.|…|\bor other|\bor any"
    r"|\band (?:more|others)|\bsimilar\b|\bpreferably\b|\busually\b",
    re.I,
)
_PARTS = re.compile(r"\b(?:start|begin|end|contain|separated)\w*\b", re.I)  # what is listed is no whole value
_QUOTED = r"(?:'[^']{1,40}'|\"[^\"]{1,40}\"|`[^`]{1,40}`|“[^”]{1,40}”)"
_GLOSS = r"(?:\s*\([^)]{1,60}\))?"
_QUOTED_LIST = re.compile(rf"{_QUOTED}{_GLOSS}(?:\s*(?:,|/|\||,?\s*(?:or|and))\s*(?:or |and )?{_QUOTED}{_GLOSS})+")
_BARE_LIST = re.compile(
    r"\b(?:one of|either|options(?: are)?|choices(?: are)?|(?:possible|allowed|valid|supported|accepted) values(?: are)?|\[?enum\]?)"
    r"\s*:?\s*\(?((?:[\w-]+(?:,| or|, or|/|\|)\s*)+[\w-]+)",
    re.I,
)


def _missing_enum(place: Place) -> Iterator[tuple[Rule, str]]:
    schema, text = place.schema, place.text
    if place.type == "array" and isinstance(items := schema.get("items"), Mapping):
        schema = dict(items)
    if schema.get("type") != "string" or any(k in schema for k in ("enum", "const", "pattern", "format")):
        return
    for sentence in re.split(r"(?<=[.;])\s+(?=[A-Z])", text):
        listed = _QUOTED_LIST.search(sentence) or _BARE_LIST.search(sentence)
        if listed and not _OPEN.search(text) and not _PARTS.search(sentence):
            yield "missing-enum", f"its text lists the values ({listed[0]:.80}); put them into `enum`"
            return


_RANGE = re.compile(
    r"\b(?:between|from|range(?:s|d|ing)?(?: from| of| is|:)?|scale(?: of| from)?)\s*\[?-?\d+(?:[,.]\d+)*\s*(?:to|and|-|–|,)\s*-?\d+(?:[,.]\d+)*"
    r"|\(-?\d+(?:\.\d+)?\s*(?:to|-|–)\s*-?\d+(?:\.\d+)?\)|\bmust be (?:a )?(?:positive|non-?negative|greater|at least|less|at most)",
    re.I,
)
_SHARE = _set("percent percentage probability latitude longitude lat lon lng")
_LIMIT = re.compile(r"(?:result |page )?limit|(?:max|num|number of) results|top (?:k|n)|(?:per page|page size)")
_MONEY = _set("amount price cost fee salary budget deposit payment principal fare")
_FILTER = _set("min max minimum maximum")  # a search that finds nothing does no harm
_COUNT = re.compile(r"(?:the )?(?:total )?number of \w+", re.I)
_OBSERVED = re.compile(
    r"\b(?:in (?:a|an|the|each|sample)|has|have|had|been|were|successful)\b", re.I
)  # what is, not what is asked for
_CHANGE = re.compile(r"\b(?:increase|decrease|change|growth|return)\b", re.I)  # of either sign, and of any size


def _unbounded_number(place: Place) -> Iterator[tuple[Rule, str]]:
    schema, words = place.schema, set(place.words)
    if not place.numeric or any(k in schema for k in ("enum", "const")):
        return
    low = any(k in schema for k in ("minimum", "exclusiveMinimum"))
    high = any(k in schema for k in ("maximum", "exclusiveMaximum"))
    if not low and not high and (said := _RANGE.search(place.text)):
        yield "unbounded-number", f"its text says {said[0]!r}; say so with `minimum` and `maximum`"
    elif words & _SHARE and not (low and high) and not _CHANGE.search(f"{' '.join(place.words)} {place.text}"):
        yield "unbounded-number", "a share or an angle has a natural range; give `minimum` and `maximum`"
    elif _LIMIT.fullmatch(" ".join(place.words)) and not (low and high):
        yield "unbounded-number", "it decides how much comes back; give `minimum` and `maximum`"
    elif words & _MONEY and not low and not words & _FILTER:
        yield "unbounded-number", "an amount that may be negative; give a `minimum`"
    elif _COUNT.match(place.text) and not low and not _OBSERVED.search(place.text) and not words & _FILTER:
        yield "unbounded-count", "a count that may be negative; give a `minimum`"


_FORMS = {
    "date": "dates are written in many ways",
    "deadline": "dates are written in many ways",
    "timestamp": "times are written in many ways",
    "time": "times are written in many ways",
    "currency": "a currency is `USD`, `$` or `dollar`",
    "phone": "telephone numbers are written in many ways",
    "timezone": "a time zone is `Europe/Paris`, `CET` or `UTC+1`",
    "coordinates": "coordinates are written in many ways",
    "id": "nothing tells an id from a name",
    "code": "nothing says what the code looks like",
}
_FORM_TOLD = re.compile(
    rf"{_OPEN.pattern}|{_QUOTED}|\d|\bformat|YYYY|\b(?:ISO|IATA|ICAO|UTC|letters?|digits?|code|hex\w*|UUID|GUID|element|unix|epoch)\b",
    re.I,
)


def _unbounded_string(place: Place) -> Iterator[tuple[Rule, str]]:
    told = ("enum", "const", "format", "pattern", "maxLength", "examples", "default", "contentEncoding")
    if place.type != "string" or any(place.schema.get(k) for k in told) or _FORM_TOLD.search(place.text):
        return
    if why := _FORMS.get(place.words[-1] if place.words else ""):
        yield "unbounded-string", f"{why}; give `format`, `pattern` or an example"


_QUANTITY = _set(
    "duration timeout interval delay distance weight mass temperature temp speed velocity altitude pressure"
)
_UNIT = re.compile(
    r"\b(?:milli|micro|nano|kilo|centi|mega)?(?:seconds?|minutes?|hours?|days?|weeks?|months?|years?|met(?:er|re)s?|miles?|feet"
    r"|foot|inch(?:es)?|yards?|grams?|pounds?|tons?|tonnes?|celsius|fahrenheit|kelvin|knots?|pascals?|atmospheres?|bars?|units?)\b"
    r"|\b(?:ms|s|m|km|cm|mm|kg|g|lbs?|oz|mph|km/h|kmh|kph|m/s|psi|kpa|pa|hpa|atm|mi|hz|light years?)\b|°|%|\bpercent|\bnights?\b|\bnumber of\b|\bperiods?\b|\bin \w+s\b",
    re.I,
)
_RATE = _set("interest tax discount growth inflation coupon return mutation birth death annual vat")
_SHARE_TOLD = re.compile(r"percent|%|decimal|fraction|probability|\bper\b|\d", re.I)


def _missing_unit(place: Place) -> Iterator[tuple[Rule, str]]:
    if not place.numeric or any(k in place.schema for k in ("enum", "default", "minimum", "maximum")):
        return
    around = f"{' '.join(place.words)} {place.text} {place.tool.description}"
    if place.words and place.words[-1] in _QUANTITY:
        if not _UNIT.search(around) and not any("unit" in " ".join(words_of(s)) for s in place.siblings):
            yield "missing-unit", "a quantity in no unit; name the unit in the text or the name"
    elif place.words and place.words[-1] == "rate" and _RATE & {*words_of(around)} and not _SHARE_TOLD.search(around):
        yield "missing-unit", "5 % may be sent as 5 or as 0.05; say which"


# ---- rules about several tools


def _duplicate_names(schemas: Sequence[ToolSchema]) -> Iterator[Finding]:
    names = [s.name for s in schemas]
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        yield Finding("duplicate-name", name, "name", f"{names.count(name)} tools have this name; rename all but one")


def _overlaps(schemas: Sequence[ToolSchema]) -> Iterator[Finding]:
    """Pairs whose texts are close (cosine of TF-IDF vectors) and of which one says nothing that the other does not."""
    unique = [s for s in {s.name: s for s in schemas}.values() if s.description.strip()]
    words = [_terms(text) for text in _without_boilerplate([s.description for s in unique])]
    sets = [set(w) for w in words]
    nested = [(i, j) for i in range(len(unique)) for j in range(i) if sets[i] <= sets[j] or sets[j] <= sets[i]]
    if not nested or not any(words):
        return
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Pairs of neighbours count as well: `litres to gallons` is not `gallons to litres`.
    terms = [[*w, *(f"{a} {b}" for a, b in pairwise(w)), *_parameters(s)] for w, s in zip(words, unique, strict=True)]
    vectors = TfidfVectorizer(analyzer=list, sublinear_tf=True).fit_transform(terms)
    for i, j in nested:
        if (similarity := vectors[i].multiply(vectors[j]).sum()) >= OVERLAP:
            what = f"its text does not set it apart from {unique[j].name!r} (similarity {similarity:.2f}); say in each when to"
            yield Finding("overlap", unique[i].name, "description", f"{what} use the other, or merge them")


_SYNONYMS = {
    **dict.fromkeys(
        ("find", "search", "get", "fetch", "retrieve", "list", "query", "look", "lookup", "return"), "find"
    ),
    **dict.fromkeys(("create", "add", "insert", "make", "register"), "create"),
    **dict.fromkeys(("delete", "remove", "erase"), "delete"),
    **dict.fromkeys(("update", "modify", "change", "edit", "alter"), "update"),
    **dict.fromkeys(("calculate", "compute", "determine", "evaluate"), "calculate"),
}


def _terms(text: str) -> list[str]:
    return [_SYNONYMS.get(w.removesuffix("s"), _stem(w)) for w in words_of(text) if w not in _FILLER]


def _parameters(schema: ToolSchema) -> list[str]:
    names = schema.parameters.get("properties") if isinstance(schema.parameters, Mapping) else None
    return [f"({name})" for name in names] if isinstance(names, Mapping) else []


def _without_boilerplate(texts: list[str]) -> list[str]:
    """Texts without the sentences that a whole suite of tools begins with."""
    sentences = [re.split(r"(?<=[.:])\s+", text) for text in texts]
    count = Counter(s for every in sentences for s in set(every))
    return [" ".join(s for s in every if count[s] < 3) or text for every, text in zip(sentences, texts, strict=True)]


def _type_conflicts(schemas: Sequence[ToolSchema]) -> Iterator[Finding]:
    first: dict[str, tuple[str, str]] = {}
    for tool in schemas:
        for name, raw in tool.parameters.get("properties", {}).items():
            kind = resolve(raw, tool.parameters).get("type")
            if not isinstance(kind, str):
                continue
            kind = "number" if kind == "integer" else kind
            other, before = first.setdefault(name, (tool.name, kind))
            if before != kind:
                what = f"a {kind} here, a {before} in {other!r}; give both one type, or the parameters two names"
                yield Finding("type-conflict", tool.name, f"arguments.{name}", what)
