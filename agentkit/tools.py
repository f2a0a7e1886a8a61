"""Tools: typed functions an agent may call, with the permission and the limit that guard them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec, TypeVar, get_args, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from agentkit.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
Permission = Literal["read", "write", "execute"]


@dataclass(frozen=True)
class ApprovalRequest:
    """What a person is asked: may `agent` call `tool` with `arguments`? `reason` says which limit it meets."""

    run_id: str
    agent: str
    tool: str
    arguments: dict[str, Any]
    reason: str


Approver = Callable[[ApprovalRequest], bool]


class Tool(Generic[P, R]):
    """A function with a schema and a permission; calling it inside a run goes through the run's checks."""

    def __init__(self, function: Callable[P, R], permission: Permission, human_at: Mapping[str, float]) -> None:
        self.function = function
        if permission not in get_args(Permission):
            raise UsageError(f"tool {function.__name__!r}: permission {permission!r} is none of {get_args(Permission)}")
        self.name = function.__name__
        self.description = inspect.cleandoc(function.__doc__ or "")
        self.permission: Permission = permission
        self.human_at = dict(human_at)
        self._arguments = _arguments_model(function)
        functools.update_wrapper(self, function)  # so that inspect, marimo and help() see the function
        if not self.description:
            raise UsageError(f"tool {self.name!r} has no docstring; the model and the reviewer read it")
        if unknown := self.human_at.keys() - self._arguments.model_fields.keys():
            raise UsageError(f"tool {self.name!r}: human_at names {sorted(unknown)!r}, which are no parameters of it")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tool[P, R]:
        return self  # an inventory knows its tools by identity, also after an optimiser has copied the agent

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        from agentkit.runs import current_run

        run = current_run()
        bound = inspect.signature(self.function).bind(*args, **kwargs).arguments
        return self.invoke(self.validate(bound)) if run is None else run.call(self, **bound)

    def invoke(self, arguments: dict[str, Any]) -> R:
        """Run the function itself, unguarded, with arguments from `validate`."""
        return self.function(**arguments)  # type: ignore[call-arg]

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments in their declared types.

        Raises:
            UsageError: they do not fit the tool's schema; names each field.
        """
        try:
            model = self._arguments(**arguments)
        except ValidationError as e:
            what = "; ".join(f"{'.'.join(map(str, x['loc'])) or 'arguments'}: {x['msg']}" for x in e.errors())
            raise UsageError(f"tool {self.name!r} was called with arguments that do not fit: {what}") from e
        return {name: getattr(model, name) for name in self._arguments.model_fields}

    def human_needed(self, arguments: Mapping[str, Any]) -> str | None:
        """Why a person must decide about this call, or None."""
        for name, limit in self.human_at.items():
            value = arguments[name]
            # `not <` rather than `>=`: NaN must reach a person, not slip past the limit; so must no amount at all.
            if value is None or not value < limit:
                found = value if value is None else f"{value:.2f}"
                return f"{name} is {found}, and from {limit:.2f} on a person decides"
        return None

    def spec(self) -> dict[str, Any]:
        """Everything about the tool that belongs to a release."""
        return {
            "name": self.name,
            "description": self.description,
            "permission": self.permission,
            "human_at": self.human_at,
            "arguments": self._arguments.model_json_schema(),
        }


def _arguments_model(function: Callable[..., Any]) -> Any:
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"tool {function.__name__!r} is asynchronous; make it a plain function")
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
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
def tool(
    *, permission: Permission = ..., human_at: Mapping[str, float] | None = ...
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    permission: Permission = "read",
    human_at: Mapping[str, float] | None = None,
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a typed function a tool.

    Args:
        permission: `read` changes nothing outside; `write` and `execute` do, and are recorded as effects.
        human_at: for numeric parameters, the value from which on (inclusive) a person must approve the call.

    Raises:
        UsageError: no docstring, a parameter without type or one that cannot be given by name, an unknown permission,
            an asynchronous function, or `human_at` naming no parameter.
    """

    def wrap(f: Callable[P, R]) -> Tool[P, R]:
        return Tool(f, permission, human_at or {})

    return wrap if function is None else wrap(function)


@dataclass(frozen=True)
class Inventory:
    """The tools one agent may use; everything else is denied."""

    agent: str
    tools: tuple[Tool[..., Any], ...] = field(default=())

    def permits(self, tool: Tool[..., Any]) -> bool:
        """Whether exactly this tool object is in the inventory (a namesake is not)."""
        return any(t is tool for t in self.tools)
