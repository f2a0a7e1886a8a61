"""Any value as JSON-able data, for records and for what goes through the seam around calls."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import TypeAdapter

_JSONABLE = TypeAdapter(Any)


def jsonable(value: Any) -> Any:
    """`value` as JSON-able data; objects pydantic does not know become their `str`.

    A value that is no data at all (circular, bytes that are no text) becomes its `repr`: no record is lost to it.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    try:
        return _JSONABLE.dump_python(value, mode="json", fallback=str, warnings=False)
    except ValueError:
        return repr(value)


def canonical(value: Any) -> bytes:
    """The JSON text of `jsonable(value)` with sorted keys: equal for equal data."""
    return orjson.dumps(jsonable(value), default=str, option=orjson.OPT_SORT_KEYS)
