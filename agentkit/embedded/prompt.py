"""Reads the prompt that DSPy's ChatAdapter writes back into fields, labels, descriptions and demonstrations."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["label", "confidence", "number", "integer", "list", "text"]
_FIELD = re.compile(r"^\d+\. `(\w+)` \((.*)\): ?(.*)$")
_ONE_OF = re.compile(r"^\{(\w+)\}\s+# note: .*? one of: (.*)$", re.M)
_TAIL = "\n\nRespond with the corresponding output fields"
_HEADER = re.compile(r"\[\[ ## (\w+) ## \]\]")
_OBJECTIVE = "In adhering to this structure, your objective is:"


class PromptError(ValueError):
    """The prompt is not one the embedded engine can read."""


@dataclass(frozen=True)
class Field:
    """An output field; `labels` maps each allowed answer to the words that describe it."""

    name: str
    kind: Kind
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The allowed answers, in prompt order."""
        return tuple(name for name, _ in self.labels)


@dataclass(frozen=True)
class Task:
    """What one prompt asks for."""

    inputs: tuple[str, ...]
    outputs: tuple[Field, ...]


@lru_cache(maxsize=256)
def parse_system(text: str) -> Task:
    """The task a system message describes.

    Raises:
        PromptError: no ChatAdapter prompt, or a field of a type the engine cannot answer.
    """
    head, found, rest = text.partition("All interactions will be structured in the following way")
    structure, _, instructions = rest.partition(_OBJECTIVE)
    if not found or "Your output fields are:" not in head or "[[ ## completed ## ]]" not in structure:
        raise PromptError("the embedded model reads only prompts written by dspy.ChatAdapter (DSPy's default)")
    above, _, below = head.partition("Your output fields are:")
    noted = {name: tuple(labels.split("; ")) for name, labels in _ONE_OF.findall(rest)}
    inputs = tuple(m[1] for line in above.splitlines() if (m := _FIELD.match(line)))
    outputs = tuple(
        _field(m[1], m[2], m[3], noted.get(m[1]), instructions)
        for line in below.splitlines()
        if (m := _FIELD.match(line))
    )
    return Task(inputs, outputs)


def _field(name: str, type_name: str, description: str, noted: tuple[str, ...] | None, instructions: str) -> Field:
    if type_name == "bool":
        names: tuple[str, ...] = ("True", "False")
    elif type_name.startswith("Literal["):
        names = tuple(str(v) for v in ast.literal_eval(type_name.removeprefix("Literal")))
    else:
        names = noted or ()
    if names:
        return Field(name, "label", tuple((n, _describe(n, description, instructions)) for n in names))
    if type_name == "float":
        return Field(name, "confidence" if "confidence" in name or "probability" in name else "number")
    if type_name == "int":
        return Field(name, "integer")
    if type_name == "list[str]":
        return Field(name, "list")
    if type_name in ("str", "Reasoning"):
        return Field(name, "text")
    raise PromptError(
        f"the embedded model cannot answer field {name!r} of type {type_name}; it answers Literal, bool, str, float, "
        "int and list[str]. Split the field, or use a language model (AGENTKIT_LM)"
    )


def _describe(label: str, *texts: str) -> str:
    """The label's own words plus every line or clause of the form `label: description`."""
    words = [label.replace("_", " ")]
    pattern = re.compile(rf"(?:^|[\n;])[\s*\-]*[`'\"]?{re.escape(label)}[`'\"]?\s*[:=]\s*([^\n;]+)", re.I)
    for text in texts:
        words += pattern.findall(text)
    return " ".join(words)


def parse_turn(text: str, names: Sequence[str]) -> dict[str, str]:
    """The field values of one message.

    Headers are looked for from the end, so that a value cannot pass itself off as a field that comes after it.
    """
    text = text[: text.rfind(_TAIL)] if _TAIL in text else text
    values, end = {}, len(text)
    for name in reversed(names):
        header = f"[[ ## {name} ## ]]"
        start = text.find(header) if name == names[0] else text.rfind(header, 0, end)
        if start >= 0:
            values[name] = text[start + len(header) : end].strip()
            end = start
    return values


def parse_answer(text: str, names: Sequence[str]) -> dict[str, str]:
    """The output values of an assistant message (a demonstration)."""
    return parse_turn(text.split("[[ ## completed ## ]]")[0], names)


def write_answer(values: dict[str, str]) -> str:
    """An assistant message as ChatAdapter reads it; no value can pass itself off as another field."""
    quoted = {name: _HEADER.sub(r"[\1]", value) for name, value in values.items()}
    body = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in quoted.items())
    return f"{body}\n\n[[ ## completed ## ]]"
