"""Tool schemas as a model sees them: read from each format that describes tools, and walked value by value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from agentkit.errors import DataError

if TYPE_CHECKING:
    from agentkit.tools import Tool

MAX_DEPTH = 12  # of nested schemas; nothing a model is asked to fill in goes deeper


@dataclass(frozen=True)
class ToolSchema:
    """A tool as a model sees it: `parameters` is a JSON schema of an object; `permission` is None where unknown."""

    name: str
    description: str
    parameters: Any
    permission: str | None = None

    @classmethod
    def from_tool(cls, tool: Tool[..., Any]) -> ToolSchema:
        """Of a tool made with `ak.tool`."""
        return cls.from_spec(tool.spec())

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> ToolSchema:
        """Of a tool as `Tool.spec` and a release's manifest describe it."""
        return cls(*_name_and_text(spec), spec.get("arguments", {}), spec.get("permission"))

    @classmethod
    def from_openai(cls, raw: Mapping[str, Any]) -> ToolSchema:
        """Of `{"type": "function", "function": {…}}`, or of the function alone."""
        function = raw.get("function", raw)
        if not isinstance(function, Mapping):
            raise DataError(f"a tool's `function` is an object with a name and parameters, got {function!r:.80}")
        return cls(*_name_and_text(function), function.get("parameters", {}))

    @classmethod
    def from_bfcl(cls, raw: Mapping[str, Any]) -> ToolSchema:
        """Of a function document of BFCL, whose types are those of Python, Java or JavaScript."""
        return cls(*_name_and_text(raw), _from_dialect(raw.get("parameters", {})))

    @classmethod
    def from_mcp(cls, raw: Mapping[str, Any]) -> ToolSchema:
        """Of a tool that an MCP server lists; its hint says whether it only reads."""
        hints = raw.get("annotations")
        reads = hints.get("readOnlyHint") if isinstance(hints, Mapping) else None
        permission = {True: "read", False: "write"}.get(reads) if isinstance(reads, bool) else None
        return cls(*_name_and_text(raw), raw.get("inputSchema", {}), permission)

    @classmethod
    def from_json(cls, raw: Any) -> ToolSchema:
        """Of any of these, told apart by their keys.

        Raises:
            DataError: it is none of them, or has no name.
        """
        if not isinstance(raw, Mapping):
            raise DataError(f"a tool's schema is an object with a name and parameters, got {raw!r:.80}")
        if isinstance(raw.get("function"), Mapping):
            return cls.from_openai(raw)
        if "inputSchema" in raw:
            return cls.from_mcp(raw)
        if "arguments" in raw:
            return cls.from_spec(raw)
        parameters = raw.get("parameters")
        bfcl = isinstance(parameters, Mapping) and parameters.get("type") == "dict"
        return cls.from_bfcl(raw) if bfcl else cls.from_openai(raw)


def _name_and_text(raw: Mapping[str, Any]) -> tuple[str, str]:
    name, text = raw.get("name"), raw.get("description")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"a tool needs a name, got {name!r} in {dict(raw)!r:.120}")
    return name, text if isinstance(text, str) else ""


_DIALECT = {
    **dict.fromkeys(("dict", "hashmap", "map"), "object"),
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("long", "short", "byte", "bigint"), "integer"),
    **dict.fromkeys(("tuple", "list", "arraylist", "set", "queue"), "array"),
    **dict.fromkeys(("char", "str"), "string"),
    "bool": "boolean",
}
_TYPES = ["array", "boolean", "integer", "null", "number", "object", "string"]


def _from_dialect(schema: Any) -> Any:
    """The same schema in JSON schema's own types; `any` becomes all of them, an unknown type stays what it is."""
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    if isinstance(name := made.get("type"), str):
        lower = name.lower()
        made["type"] = _TYPES if lower == "any" else _DIALECT.get(lower, lower if lower in _TYPES else name)
    if isinstance(properties := made.get("properties"), Mapping):
        made["properties"] = {k: _from_dialect(v) for k, v in properties.items()}
    if "items" in made:
        made["items"] = _from_dialect(made["items"])
    return made


@cache
def _meta_schema() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(Draft202012Validator.META_SCHEMA)


def schema_problems(schema: Any) -> Iterator[tuple[str, str]]:
    """(where, message) of what makes it no JSON schema of an object."""
    from jsonschema.exceptions import best_match

    if not isinstance(schema, Mapping):
        yield "arguments", f"the parameters are {schema!r:.60}; give a JSON schema of an object"
        return
    try:
        error = best_match(_meta_schema().iter_errors(schema))
        refs = sorted(_refs(schema))
    except RecursionError:
        yield "arguments", "the schema is nested too deep to be read; flatten it"
        return
    if error:
        yield _dotted(error.absolute_path), f"no valid JSON schema: {error.message:.120}"
    elif lost := [ref for ref in refs if not isinstance(_target(ref, schema), Mapping | bool)]:
        yield "arguments", f"$ref {lost[0]!r} leads to no schema; define it here and point to it with #/$defs/NAME"
    elif (kind := resolve(schema, schema).get("type", "object")) != "object":
        yield "arguments", f"a tool's parameters are the properties of an object, but the type is {kind!r:.60}"


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(["arguments", *(str(p) for p in path if p != "properties")])


_DATA = ("default", "const", "enum", "examples")  # these hold values, not schemas


def _refs(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return {ref for one in schema for ref in _refs(one)}
    if not isinstance(schema, Mapping):
        return set()
    own = schema.get("$ref")
    inner = {ref for key, one in schema.items() if key not in _DATA for ref in _refs(one)}
    return inner | ({own} if isinstance(own, str) else set())


def _target(ref: str, root: Mapping[str, Any]) -> Any:
    """What a JSON pointer inside the document leads to, or None."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    found: Any = root
    for part in unquote(ref).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(key)] if key.isdecimal() and int(key) < len(found) else None
        else:
            found = found.get(key) if isinstance(found, Mapping) else None
    return found


def resolve(schema: Any, root: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The schema with `$ref`, `allOf` and "or null" folded in; what stands beside them wins.

    `seen` holds the references on the way here: one that leads back to itself adds nothing.
    """
    if not isinstance(schema, Mapping):
        return {}
    made = {k: v for k, v in schema.items() if k not in ("$ref", "allOf")}
    parts = list(schema.get("allOf", ()))
    if (ref := schema.get("$ref")) is not None and ref not in seen:
        seen |= {ref}
        parts.append(_target(ref, root))
    for part in parts:
        made = {**resolve(part, root, seen), **made}
    for key in ("anyOf", "oneOf"):
        options = [o for o in made.get(key, ()) if not (isinstance(o, Mapping) and o.get("type") == "null")]
        if len(options) == 1:
            made = {**resolve(options[0], root, seen), **{k: v for k, v in made.items() if k != key}}
    types = made.get("type")
    if isinstance(types, list) and len(rest := [t for t in types if t != "null"]) == 1:
        made["type"] = rest[0]
    return made


def _nullable(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    options = [schema, *alternatives(schema)]
    types = [o.get("type") for o in options if isinstance(o, Mapping)]
    return any(t == "null" or (isinstance(t, list) and "null" in t) for t in types)


@dataclass(frozen=True)
class Place:
    """One value a model has to fill in. `name` is empty for the items of an array and for the whole."""

    tool: ToolSchema
    path: str
    name: str
    schema: dict[str, Any]
    required: bool = False
    nullable: bool = False
    siblings: tuple[str, ...] = ()

    @cached_property
    def text(self) -> str:
        text = self.schema.get("description")
        return text.strip() if isinstance(text, str) else ""

    @cached_property
    def words(self) -> list[str]:
        return words_of(self.name)

    @property
    def type(self) -> Any:
        return self.schema.get("type")

    @property
    def numeric(self) -> bool:
        return self.type in ("number", "integer")


def places_of(tool: ToolSchema) -> Iterator[Place]:
    """Every value a model has to fill in, the whole first; the schema must have no problems."""
    root = tool.parameters
    yield from _below(Place(tool, "arguments", "", resolve(root, root)), root, set())


def _below(place: Place, root: Mapping[str, Any], seen: set[tuple[int, str]]) -> Iterator[Place]:
    """The place and those inside it. `seen`: what a definition holds is shown where it is first used."""
    yield place
    if place.path.count(".") > MAX_DEPTH:
        return
    inside: list[Place] = []
    schema, properties = place.schema, place.schema.get("properties", {})
    for name, raw in properties.items():
        if (id(raw), name) not in seen:
            seen.add((id(raw), name))
            needed, others = name in schema.get("required", ()), tuple(n for n in properties if n != name)
            path = f"{place.path}.{name}"
            inside.append(Place(place.tool, path, name, resolve(raw, root), needed, _nullable(raw), others))
    for suffix, raw in (("[]", schema.get("items")), *(("", o) for o in alternatives(schema))):
        if isinstance(raw, Mapping) and (id(raw), "") not in seen:
            seen.add((id(raw), ""))
            inside.append(Place(place.tool, place.path + suffix, "", resolve(raw, root)))
    for inner in inside:
        yield from _below(inner, root, seen)


def alternatives(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of which a value fits one."""
    return [*schema.get("anyOf", ()), *schema.get("oneOf", ())]


def words_of(text: str) -> list[str]:
    """Lower-case words of a name or a text, camelCase and snake_case taken apart."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+|\d+", text)]
