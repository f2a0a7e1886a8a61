"""Live objects against the disk: what is registered must be what the saved source builds.

Prompts, demonstrations, weights and the model are state, which a release stores; all else it takes from the source.
"""

from __future__ import annotations

import difflib
import dis
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path, PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any
from uuid import UUID

import dspy
from pydantic import BaseModel, PydanticUserError, TypeAdapter

from agentkit.systems import Adopted, System, short_name
from agentkit.tools import Tool
from agentkit_tracking.manifest import differing
from agentkit_tracking.source import OURS, Entry, is_installed, load_entry

_SHOWN = 20  # differences; a person mends them from the top
_NUMBERS = (int, float, complex, Decimal, Fraction)
_SCALARS = (*_NUMBERS, str, bytes, range, PurePath, date, time, timedelta, UUID, type(None), type(...))
# What dspy.Module itself keeps on an instance.
# DSPy's own, and what its optimisers leave on a program.
_NOT_ATTRIBUTES = frozenset(
    [
        "callbacks",
        "history",
        "candidate_programs",
        "mb_candidate_programs",
        "trial_logs",
        "total_calls",
        "prompt_model_total_calls",
        "detailed_results",
        "results_latest",
        "results_best",
        "score",
        "simba_idx",
        "flag_compilation_error_occurred",
    ]
)
_ATTRIBUTE = " (attribute)"
_Parts = dict[str, FunctionType | str]


def differences(live: System, entry: Entry) -> list[str]:
    """Where a live system differs from what its source on disk would build.

    Returns:
        Unified diffs and lines of the form `name: live …, on disk …`; empty when nothing differs.
    """
    fresh = load_entry(entry)
    disk, ours = ({"system": s.spec(), "predictor": _shapes(s)} for s in (fresh, live))
    found = [f"{path}: live {b!r}, on disk {a!r}" for path, a, b in differing(disk, ours)]
    found += _changed_parts(_parts(fresh), _parts(live))
    more = len(found) - _SHOWN
    return found[:_SHOWN] + ([f"… and {more} more"] if more > 0 else [])


def _changed_parts(disk: _Parts, live: _Parts) -> Iterator[str]:
    changed: list[str] = []
    for name in sorted(disk.keys() | live.keys()):
        if any(name.startswith(f"{function} → ") for function in changed):
            continue  # another body uses other names: its own diff says so
        a, b = disk.get(name), live.get(name)
        if a is None or b is None:
            yield f"{name}: only {'in the live system' if a is None else 'on disk'}"
        elif isinstance(a, str) or isinstance(b, str):
            if a != b:
                yield f"{name}: live {_clip(b)}, on disk {_clip(a)}"
        elif _code(a.__code__) != _code(b.__code__):
            changed.append(name)
            yield _diff_source(name, a, b)


def _clip(part: FunctionType | str) -> str:
    text = part if isinstance(part, str) else f"function {part.__qualname__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _shapes(system: System) -> dict[str, Any]:
    """Of each predictor what its state does not hold: the types of its fields and the model pinned to it."""
    return {
        short_name(path): {
            "model": getattr(p.lm, "model", None),
            "config": {name: repr(value) for name, value in p.config.items()},
            "inputs": {name: _type(f.annotation) for name, f in p.signature.input_fields.items()},
            "outputs": {name: _type(f.annotation) for name, f in p.signature.output_fields.items()},
        }
        for path, p in system.named_predictors()
    }


def _type(annotation: Any) -> Any:
    try:
        return TypeAdapter(annotation).json_schema()
    except PydanticUserError:
        return re.sub(r"(\w+\.)+", "", str(annotation))  # the module's name differs between live and disk


# ---- what a system's behaviour is made of


def _parts(system: System) -> _Parts:
    """Functions, and in plain text the values they use, by a readable name."""
    collector = _Collector()
    for path, module in system.named_sub_modules():
        label = re.sub(r"agents\[(\w+)\]", r"\1", path.removeprefix("self.")).removeprefix("program.")
        if not _is_library(type(module)):
            collector.add(label, type(module))
            if not isinstance(module, System | dspy.Predict):
                collector.attributes(label, module)
    if isinstance(system, Adopted) and not isinstance(system.program, dspy.Module):
        collector.add("program", system.program)
    for metric in (system.success, *system.metrics):
        collector.add(f"metric {getattr(metric, '__name__', metric)}", metric)
    return collector.found


class _Collector:
    """Walks from functions and classes to the helpers and values they name. A label is the way there."""

    def __init__(self) -> None:
        self.found: _Parts = {}
        self._functions: set[Any] = set()
        self._classes: list[type] = []  # on the way to here

    def add(self, label: str, value: Any) -> None:
        if isinstance(value, Tool):
            label = f"tool {value.name}"
        value = _bare(value)
        plain = _plain(value)
        if plain is not None:
            self.found.setdefault(label, plain)
        elif inspect.isfunction(value):
            self._function(label, value)
        elif inspect.isclass(value):
            self._class(label, value)
        elif isinstance(value, functools.partial):
            self.add(label, value.func)
            self.add(f"{label} → arguments", (value.args, value.keywords))
        elif isinstance(value, tuple | list):
            self._each(label, dict(enumerate(value)))
        elif isinstance(value, dict):
            self._each(label, value)
        else:
            self.found.setdefault(label, f"a {type(value).__qualname__}")
            self._class(label, type(value))
            if is_dataclass(value) and not isinstance(value, type):
                self._each(label, {f.name: getattr(value, f.name) for f in fields(value)})
            elif isinstance(value, BaseModel):
                self._each(label, dict(value))

    def attributes(self, label: str, module: Any) -> None:
        """Plain values on an instance."""
        for name, value in vars(module).items():
            if name.startswith("_") or name in _NOT_ATTRIBUTES:
                continue
            if (text := _plain(value)) is not None:
                self.found.setdefault(f"{label}.{name}{_ATTRIBUTE}", text)
            elif callable(value) and callable(getattr(type(module), name, None)):
                self.found.setdefault(f"{label}.{name}{_ATTRIBUTE}", "a function in place of the class's own")

    def _each(self, label: str, values: dict[Any, Any]) -> None:
        for key, value in values.items():
            self.add(f"{label}[{key!r}]", value)

    def _class(self, label: str, cls: type) -> None:
        if _is_library(cls) or cls in self._classes:
            return
        self._classes.append(cls)
        for owner in cls.__mro__:
            for name, member in {} if _is_library(owner) else vars(owner).items():
                member = _bare(member)
                if inspect.isfunction(member) or not name.startswith("_"):
                    self.add(f"{label}.{name}", member)
        self._classes.pop()

    def _function(self, label: str, function: FunctionType) -> None:
        if is_installed(function.__code__.co_filename):
            return
        cells = dict(zip(function.__code__.co_freevars, map(_content, function.__closure__ or ()), strict=True))
        cells.pop("__class__", None)  # of a method that says `super()`; its class is on the way already
        key = (function.__qualname__, repr(_code(function.__code__)), _plain(cells), id(function.__globals__))
        if key in self._functions and _plain(cells) is not None:
            return
        self._functions.add(key)
        self.found.setdefault(label, function)
        for name, value in {"defaults": function.__defaults__, "keywords": function.__kwdefaults__, **cells}.items():
            if value is not None and value is not function:
                self.add(f"{label} → {name}", value)
        if function.__module__.split(".")[0] in OURS:
            return
        for name in sorted(_globals(function.__code__) & function.__globals__.keys()):
            self._global(f"{label} → {name}", function, function.__globals__[name])

    def _global(self, label: str, function: FunctionType, value: Any) -> None:
        if not isinstance(value, ModuleType):
            self.add(label, value)
        elif (file := getattr(value, "__file__", None)) and not _is_library(value) and not is_installed(file):
            for name in sorted(_names(function.__code__) & vars(value).keys()):
                self.add(f"{label}.{name}", vars(value)[name])


def _bare(value: Any) -> Any:
    """The function inside tools, caches, properties and bound, static or class methods."""
    if isinstance(value, Tool):
        return value.function
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    if isinstance(value, staticmethod | classmethod) or inspect.ismethod(value):
        value = value.__func__
    return value if inspect.isclass(value) else inspect.unwrap(value)


def _is_library(thing: Any) -> bool:
    """Whether a class or module is installed, built in or agentkit's own, and so the same for live and disk."""
    name = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    if name.split(".")[0] in OURS or name == "__main__":
        return name != "__main__"
    file = getattr(inspect.getmodule(thing), "__file__", None)
    return name in sys.builtin_module_names if file is None else is_installed(file)


def _plain(value: Any) -> str | None:
    """A value of plain data as text that is equal for equal data; None for anything else."""
    if isinstance(value, Enum):
        return repr(value)
    if isinstance(value, re.Pattern):
        return f"{value.pattern!r} with flags {value.flags}"
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, tuple | list | set | frozenset):
        items = [_plain(item) for item in value]
        texts = [item for item in items if item is not None]
        if len(texts) < len(items):
            return None
        ordered = sorted(texts) if isinstance(value, set | frozenset) else texts
        return f"{type(value).__name__}({', '.join(ordered)})"
    if isinstance(value, dict):
        pairs = {repr(key): _plain(item) for key, item in value.items()}
        return None if None in pairs.values() else "{" + ", ".join(f"{k}: {v}" for k, v in pairs.items()) + "}"
    return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet bound
        return None


def _code(code: CodeType) -> Any:
    constants = [_code(c) if isinstance(c, CodeType) else _plain(c) for c in code.co_consts]
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, counts


def _inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _inner(constant)


def _names(code: CodeType) -> set[str]:
    return {name for c in _inner(code) for name in c.co_names}


def _globals(code: CodeType) -> set[str]:
    """Names looked up in the module; `co_names` would add attributes, which a notebook may have namesakes of."""
    looked_up = (i for c in _inner(code) for i in dis.get_instructions(c) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return {str(instruction.argval) for instruction in looked_up}


def _diff_source(name: str, disk: FunctionType, live: FunctionType) -> str:
    file = disk.__code__.co_filename
    if live.__code__.co_filename != file:
        a, b = _text(disk), _text(live)
        if lines := list(difflib.unified_diff(a, b, f"{name} (on disk)", f"{name} (live)", lineterm="", n=1)):
            return "\n".join(lines)
    # The text the live function was made from is gone: inspect would read the file as it is now.
    only_live, only_disk = (", ".join(sorted(x)) or "none" for x in _apart(_constants(live), _constants(disk)))
    return (
        f"{name}: the live code is not what {Path(file).name} now says, import it again; "
        f"constants only live: {only_live}, only on disk: {only_disk}"
    )


def _apart(a: set[str], b: set[str]) -> tuple[set[str], set[str]]:
    return a - b, b - a


def _text(function: FunctionType) -> list[str]:
    try:
        return inspect.getsource(function).splitlines()
    except (OSError, TypeError):
        return []


def _constants(function: FunctionType) -> set[str]:
    return {repr(c) for code in _inner(function.__code__) for c in code.co_consts if not isinstance(c, CodeType)}
