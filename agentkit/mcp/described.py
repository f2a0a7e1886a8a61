"""What a system says of itself: its text, and the JSON schemas of its inputs and its output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Union, get_type_hints

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from agentkit.systems import System


def description(system: System) -> str:
    """What it does, from the router's instructions or the docstrings of its agents or program."""
    program = getattr(system, "program", None)
    owners = system.agents.values() if program is None else [program]
    texts = [getattr(_signature(system), "instructions", None), *map(_own_doc, owners)]
    return inspect.cleandoc(next((t for t in texts if t), f"Run the agent system {system.name}."))


def _signature(system: System) -> Any:
    """The router's, or that of a program that is one predictor; None without either."""
    program = getattr(system, "program", None)
    return getattr(system.router or getattr(program, "predict", program), "signature", None)


def _own_doc(thing: Any) -> str | None:
    """The docstring of a function, or of the object's own class: that of `Agent` says nothing about an agent."""
    own = thing if inspect.isroutine(thing) else vars(type(thing))
    return own.get("__doc__") if isinstance(own, Mapping) else own.__doc__


def _annotations(system: System) -> dict[str, list[Any]]:
    """The types each input is declared with, by the router and the agents, or by the adopted program."""
    found: dict[str, list[Any]] = {}

    def add(hints: Mapping[str, Any]) -> None:
        for name, hint in hints.items():
            if hint not in found.setdefault(name, []):
                found[name].append(hint)

    if (signature := _signature(system)) is not None:
        add({name: field.annotation for name, field in signature.input_fields.items()})
    for agent in system.agents.values():
        add(_hints(type(agent).plan))
    program = getattr(system, "program", None)
    if program is not None and signature is None:
        add(_hints(getattr(type(program), "forward", None) or program))
    return found


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # a type that only a type checker imports, or an object that is no function
        return {}


def input_schema(system: System) -> tuple[dict[str, TypeAdapter[Any]], dict[str, Any]]:
    """How inputs are read, and the JSON schema of them all; an input without a type is a string."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter
    from pydantic.errors import PydanticInvalidForJsonSchema

    names, required = system.input_names()
    declared = _annotations(system)
    adapters: dict[str, TypeAdapter[Any]] = {}
    for name in names:
        hints = declared.get(name) or [str]
        with suppress(PydanticSchemaGenerationError):  # an object that is no data
            either: Any = Union[tuple(hints)]  # noqa: UP007
            adapters[name] = TypeAdapter(either)
    try:
        by_name, shared = TypeAdapter.json_schemas([(name, "validation", a) for name, a in adapters.items()])
    except PydanticInvalidForJsonSchema:
        by_name, shared = {}, {}
    texts = _texts(system)
    properties: dict[str, Any] = {}
    for name in names:
        told = {"description": texts[name]} if name in texts else {}
        properties[name] = {**by_name.get((name, "validation"), {}), **told}
    schema = {"type": "object", "properties": properties, "required": sorted(required)}
    return adapters, {**schema, "additionalProperties": not names, **shared}


def _texts(system: System) -> dict[str, str]:
    """What the router's or the lone program's signature says of its fields."""
    signature = _signature(system)
    fields = signature.input_fields.items() if signature is not None else ()
    texts = {name: str((field.json_schema_extra or {}).get("desc", "")) for name, field in fields}
    return {name: text for name, text in texts.items() if text and text != f"${{{name}}}"}  # DSPy's placeholder


def output_schema(system: System) -> dict[str, Any] | None:
    """The schema of `RunRecord.output`: the agents' results, or None where a program declares none."""
    from pydantic import RootModel
    from pydantic.json_schema import models_json_schema

    results = list(dict.fromkeys(agent.result for agent in system.agents.values()))
    if not results:
        return None
    by_model, shared = models_json_schema([(r, "serialization") for r in results], by_alias=False)
    wrapped = [
        {"type": "object", "properties": {"value": s}, "required": ["value"]} if issubclass(r, RootModel) else s
        for r, s in ((r, by_model[(r, "serialization")]) for r in results)
    ]
    return {"type": "object", "anyOf": wrapped, **shared}
