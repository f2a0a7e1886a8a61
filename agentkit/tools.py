"""Tools: typed functions an agent may call, with the permission and the limits that guard them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, get_args, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError, create_model

from agentkit.approvals import ApprovalRequest, Approver
from agentkit.autonomy import Criticality, Permission
from agentkit.current import OPEN, current_run
from agentkit.errors import ToolFailed, UsageError
from agentkit.tool_calls import Line

__all__ = ["ApprovalRequest", "Approver", "Check", "Inventory", "Permission", "Tool", "ToolOptions", "tool"]

P = ParamSpec("P")
R = TypeVar("R")
# Arguments and the user on whose behalf the run acts; a returned reason refuses the call.
Check = Callable[[Mapping[str, Any], "str | None"], "str | None"]
KEY = "idempotency_key"  # a parameter of this name is filled in by the run and hidden from the model


class ToolOptions(TypedDict, total=False):
    """What `tool` takes; see there."""

    permission: Permission
    human_at: Mapping[str, float] | None
    criticality: Criticality
    cost_usd: float
    idempotent: bool | None
    timeout_s: float | None
    tries: int
    fallback: Tool[..., Any] | None
    per_second: float | None
    cache_s: float | None
    check: Check | None
    writes_to: str | None


class Tool(Generic[P, R]):
    """A function with a schema and a permission; calling it inside a run goes through the run's checks."""

    def __init__(self, function: Callable[P, R], **options: Unpack[ToolOptions]) -> None:
        self.function = function
        self.name = function.__name__
        self.description = inspect.cleandoc(function.__doc__ or "")
        self.takes_key = KEY in inspect.signature(function).parameters
        self._arguments: Arguments = TypedArguments(function)
        self._result = _result_adapter(function)
        functools.update_wrapper(self, function)  # so that inspect, marimo and help() see the function
        if not self.description:
            raise UsageError(f"tool {self.name!r} has no docstring; the model and the reviewer read it")
        self._set(**options)

    @classmethod
    def from_schema(
        cls,
        name: str,
        description: str,
        parameters: dict[str, Any],
        function: Callable[..., Any],
        **options: Unpack[ToolOptions],
    ) -> Tool[..., Any]:
        """A tool whose parameters are given as a JSON schema (draft 2020-12), as an MCP server does.

        `function` is called with the arguments by name; what it returns is taken as it is.
        """
        tool = cls.__new__(cls)
        tool.function, tool.name, tool.description = function, name, description
        tool.takes_key, tool._result = False, None
        tool._arguments = SchemaArguments(parameters)
        tool._set(**options)
        return tool

    def _set(
        self,
        permission: Permission = "read",
        human_at: Mapping[str, float] | None = None,
        criticality: Criticality | None = None,
        cost_usd: float = 0.0,
        idempotent: bool | None = None,
        timeout_s: float | None = 30.0,
        tries: int = 3,
        fallback: Tool[..., Any] | None = None,
        per_second: float | None = None,
        cache_s: float | None = None,
        check: Check | None = None,
        writes_to: str | None = None,
    ) -> None:
        if permission not in get_args(Permission):
            raise UsageError(f"tool {self.name!r}: permission {permission!r} is none of {get_args(Permission)}")
        criticality = criticality or ("low" if permission == "read" else "medium")
        if criticality not in get_args(Criticality):
            raise UsageError(f"tool {self.name!r}: criticality {criticality!r} is none of {get_args(Criticality)}")
        if not 0 <= cost_usd < float("inf"):
            raise UsageError(f"tool {self.name!r}: cost_usd must be a number from 0, got {cost_usd!r}")
        if tries not in (1, 2, 3):
            raise UsageError(f"tool {self.name!r}: tries must be 1, 2 or 3, got {tries!r}")
        if idempotent not in (None, True, False):
            raise UsageError(f"tool {self.name!r}: idempotent must be True, False or None, got {idempotent!r}")
        for what, limit in (("timeout_s", timeout_s), ("per_second", per_second), ("cache_s", cache_s)):
            if limit is not None and not 0 < limit < float("inf"):
                raise UsageError(f"tool {self.name!r}: {what} must be None or a number above 0, got {limit!r}")
        if cache_s is not None and permission != "read":
            raise UsageError(f"tool {self.name!r}: only what a read returns can be cached, and it is a {permission}")
        if fallback is not None and fallback.permission != permission:
            raise UsageError(f"tool {self.name!r}: its fallback {fallback.name!r} must be a {permission}, too")
        self.permission: Permission = permission
        self.criticality: Criticality = criticality
        self.human_at = dict(human_at or {})
        self.cost_usd, self.timeout_s, self.tries = float(cost_usd), timeout_s, tries
        self.idempotent = permission == "read" if idempotent is None else idempotent
        self.fallback, self.per_second, self.cache_s = fallback, per_second, cache_s
        self.check, self.writes_to = check, writes_to
        self.line = Line(per_second, cache_s)
        known = self._arguments.names
        if fallback is not None and (other := known ^ fallback._arguments.names):
            raise UsageError(
                f"tool {self.name!r}: its fallback {fallback.name!r} must take the same arguments; {sorted(other)!r} differ"
            )
        if unknown := self.human_at.keys() - known:
            raise UsageError(f"tool {self.name!r}: human_at names {sorted(unknown)!r}, which are no parameters of it")
        if writes_to is not None and writes_to not in known:
            raise UsageError(f"tool {self.name!r}: writes_to names {writes_to!r}, which is no parameter of it")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tool[P, R]:
        return self  # an inventory knows its tools by identity, also after an optimiser has copied the agent

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        run = current_run()
        bound = self._bind(*args, **kwargs)
        if run is None and OPEN:
            # In a thread that was given no context, say: the call would escape its run's rules.
            raise UsageError(
                f"tool {self.name!r} was called outside any run while runs are under way; start threads with "
                "contextvars.copy_context().run, or call the plain function, tool.function"
            )
        if run is None:
            return self.invoke(self.validate(bound), key="")
        result: R = run.call(self, **bound)
        return result

    def _bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if isinstance(self._arguments, TypedArguments):
            return inspect.signature(self.function).bind(*args, **kwargs).arguments
        if args:
            raise UsageError(f"tool {self.name!r} takes its arguments by name")
        return kwargs

    def invoke(self, arguments: dict[str, Any], *, key: str) -> R:
        """Run the function itself, unguarded, with arguments from `validate`; `key` is its idempotency key."""
        if self.takes_key:
            return self.function(**arguments, **{KEY: key})  # type: ignore[call-arg, arg-type]
        return self.function(**arguments)  # type: ignore[call-arg]

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments in their declared types.

        Raises:
            UsageError: they do not fit the tool's schema; names each field.
        """
        try:
            return self._arguments.validate(arguments)
        except ValueError as e:
            raise UsageError(f"tool {self.name!r} was called with arguments that do not fit: {e}") from e

    def validate_result(self, result: Any) -> Any:
        """What the function returned, in its declared type.

        Raises:
            ToolFailed: it does not fit (`malformed`).
        """
        if self._result is None:
            return result
        try:
            return self._result.validate_python(result)
        except ValidationError as e:
            unknown = self.permission != "read"  # it ran, whatever it said
            raise ToolFailed(self.name, "malformed", _problems(e, "result"), unknown=unknown) from e

    def human_needed(self, arguments: Mapping[str, Any]) -> str | None:
        """Why a person must decide about this call, or None."""
        for name, limit in self.human_at.items():
            value = arguments.get(name)
            # `not <` rather than `>=`: NaN must reach a person, not slip past the limit; so must no amount at all.
            if value is None or not abs(value) < limit:
                found = value if value is None else f"{value:.2f}"
                return f"{name} is {found}, and from {limit:.2f} on a person decides"
        return None

    def spec(self) -> dict[str, Any]:
        """Everything about the tool that belongs to a release."""
        return {
            "name": self.name,
            "description": self.description,
            "permission": self.permission,
            "criticality": self.criticality,
            "human_at": self.human_at,
            "cost_usd": self.cost_usd,
            "idempotent": self.idempotent,
            "timeout_s": self.timeout_s,
            "tries": self.tries,
            "fallback": self.fallback and self.fallback.name,
            "per_second": self.per_second,
            "cache_s": self.cache_s,
            "check": self.check and getattr(self.check, "__name__", str(self.check)),
            "writes_to": self.writes_to,
            "arguments": self._arguments.schema(),
        }


class Arguments(Protocol):
    """How a tool's arguments are described and checked."""

    names: frozenset[str]

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments in their declared types; raises ValueError with one phrase per field."""
        ...

    def schema(self) -> dict[str, Any]:
        """The JSON schema."""
        ...


class TypedArguments:
    """From the type hints of a function, by pydantic."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._model = _arguments_model(function)
        self.names = frozenset(self._model.model_fields)

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            model = self._model(**arguments)
        except ValidationError as e:
            raise ValueError(_problems(e, "arguments")) from e
        return {name: getattr(model, name) for name in self._model.model_fields}

    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = self._model.model_json_schema()
        return schema


class SchemaArguments:
    """From a JSON schema."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        from jsonschema import Draft202012Validator, SchemaError
        from referencing import Registry

        try:
            Draft202012Validator.check_schema(parameters)
        except SchemaError as e:
            raise UsageError(f"the tool's parameters are no valid JSON schema: {e.message}") from e
        self._schema, self._validator = (
            parameters,
            Draft202012Validator(
                _closed(parameters),
                registry=Registry(),  # jsonschema's own would fetch what a $ref points to
            ),
        )
        self.names = frozenset(parameters.get("properties", {}))

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(arguments)
        if problems := [f"{e.json_path}: {e.message}" for e in self._validator.iter_errors(given)]:
            raise ValueError("; ".join(problems))
        if extra := sorted(given.keys() - self.names):
            raise ValueError(f"{extra[0]}: no such parameter")
        if not all(map(math.isfinite, _numbers(given))):
            raise ValueError("a number that is NaN or infinite")  # no limit holds for it
        return given

    def schema(self) -> dict[str, Any]:
        return self._schema


def _closed(schema: Any) -> Any:
    """The schema with no further properties in any object that names some: a misspelt limit must not pass."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # What is combined by allOf is no whole object; it stays as open as it was written.
    closed = {
        key: value if key in ("allOf", "const", "enum", "default") else _closed(value) for key, value in schema.items()
    }
    open_by_intent = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf"} & schema.keys()
    if isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object" and not open_by_intent:
        closed["additionalProperties"] = False
    return closed


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _problems(error: ValidationError, whole: str) -> str:
    return "; ".join(f"{'.'.join(map(str, x['loc'])) or whole}: {x['msg']}" for x in error.errors())


def _result_adapter(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    hint = get_type_hints(function, include_extras=True).get("return", Any)
    if hint is Any:
        return None
    try:
        return TypeAdapter(hint)
    except PydanticSchemaGenerationError:  # an object that is no data
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def _arguments_model(function: Callable[..., Any]) -> Any:
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"tool {function.__name__!r} is asynchronous; make it a plain function")
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == KEY:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(f"tool {function.__name__!r}: {parameter} cannot be given by name; name its parameters")
        if name.startswith("_") or hasattr(BaseModel, name):
            raise UsageError(f"tool {function.__name__!r}: rename the parameter {name!r}; pydantic keeps it for itself")
        if name not in hints:
            raise UsageError(f"tool {function.__name__!r}: parameter {name!r} has no type")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints[name], default)
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(**options: Unpack[ToolOptions]) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
def tool(
    function: Callable[P, R] | None = None, /, **options: Unpack[ToolOptions]
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a typed function a tool. Its docstring and types are what the model reads and what calls are checked by.

    Args:
        permission: `read` (default) changes nothing outside; `write` and `execute` do, and are recorded as effects.
        criticality: low, medium or high; with the permission it decides the tier (`agentkit.Autonomy`). Default: low
            for reads, medium else.
        human_at: for numeric parameters, the magnitude from which on (inclusive) a person must approve the call.
        cost_usd: price of one try, USD; reserved in the budget.
        idempotent: a repetition with the same arguments changes nothing more; default: True for reads. A parameter
            called `idempotency_key` is filled in by the run, the same for every try of one call.
        timeout_s: seconds one try may take (default 30); None: for ever, on the run's own thread.
        tries: at most so many (default 3), 1 s and 2 s apart, after time-outs and connection errors. Only idempotent tools
            are tried again: whether the first try took effect cannot be known.
        fallback: the tool to call with the same arguments where this one fails, in the inventory as well.
        per_second: at most so many tries a second in this process; more wait.
        cache_s: seconds for which a read is answered from memory.
        check: called with the arguments and the user on whose behalf the run acts; a reason it returns refuses the call.
        writes_to: the parameter that names the thing written to; two agents of one run may not write to the same.

    Raises:
        UsageError: no docstring, a parameter without type or one that cannot be given by name, an asynchronous function,
            an option out of its range, or one that names no parameter.
    """

    def wrap(f: Callable[P, R]) -> Tool[P, R]:
        return Tool(f, **options)

    return wrap if function is None else wrap(function)


@dataclass(frozen=True)
class Inventory:
    """The tools one agent may use; everything else is denied, and so is what is forbidden to it by name."""

    agent: str
    tools: tuple[Tool[..., Any], ...] = field(default=())
    forbidden: frozenset[str] = frozenset()

    def permits(self, tool: Tool[..., Any]) -> bool:
        """Whether exactly this tool object is in the inventory (a namesake is not)."""
        return tool.name not in self.forbidden and any(t is tool for t in self.tools)
