"""What a checkpoint keeps: JSON-able data that a database takes, errors among it."""

from __future__ import annotations

import builtins
import json
import math
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from agentkit import errors
from agentkit.errors import Refusal
from agentkit.jsonable import jsonable
from agentkit.records import Step

if TYPE_CHECKING:
    from agentkit.runs import Run

Entry = dict[str, Any]


def storable(entry: Entry) -> Entry:
    """The entry, with text that is no valid Unicode repaired: a database takes none."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        repaired: Entry = _repaired(entry)
        return repaired
    return entry


def _repaired(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_repaired(name): _repaired(item) for name, item in value.items()}
    return [_repaired(item) for item in value] if isinstance(value, list) else value


def step_of(data: Entry) -> Step:
    """A step from what is stored of it: JSON has no NaN, so a cost that is unknown is null there."""
    return Step(**{**data, "usd": math.nan if data["usd"] is None else data["usd"]})


def used_in(entry: Entry) -> dict[str, float]:
    """What a call has used of the run's budget."""
    return {name: math.nan if amount is None else amount for name, amount in entry["used"].items()}


def packed(error: BaseException) -> Entry:
    """An error as data, with the classes it is of."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {"module": type(error).__module__, "kinds": kinds, "message": str(error), "fields": jsonable(vars(error))}


def raise_again(run: Run, packed: Entry) -> NoReturn:
    """Raise an error again: of its own class where that is loaded here, else of the nearest of agentkit's or Python's."""
    own = _loaded(packed.get("module", ""), packed["kinds"][0])
    kind = own or next(k for name in packed["kinds"] for k in (_error_class(name),) if k is not None)
    error = kind.__new__(kind, packed["message"])
    vars(error).update(packed["fields"])
    if isinstance(error, Refusal):
        run.refuse(error)
    raise error


def _loaded(module: str, name: str) -> type[BaseException] | None:
    """A class of the module, if that has been imported: nothing is imported because a database says so."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _error_class(name: str) -> type[BaseException] | None:
    found = getattr(errors, name, None) or getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None
