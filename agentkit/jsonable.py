"""Any value as JSON-able data, for records and for what goes through the seam around calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
from pydantic import TypeAdapter

_JSONABLE = TypeAdapter(Any)


def jsonable(value: Any) -> Any:
    """`value` as JSON-able data; objects pydantic does not know become their `str`. It raises for no value.

    A value that is no data at all (circular, bytes that are no text) becomes its `repr`: no record is lost to it.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    try:
        return _JSONABLE.dump_python(value, mode="json", fallback=_text, warnings=False)
    except Exception:  # anything: properties, serializers and iterators of the value are other people's code
        return _text(value, repr)


def _text(value: Any, how: Callable[[Any], str] = str) -> str:
    try:
        return how(value)
    except Exception:
        return f"<unprintable {type(value).__name__}>"


def canonical(value: Any) -> bytes:
    """The JSON text of `jsonable(value)` with sorted keys: equal for equal data, and it raises for no value."""
    data = jsonable(value)
    try:
        return orjson.dumps(data, default=_text, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:  # a lone surrogate or an integer past 64 bits, which `json` writes as they are
        return json.dumps(data, sort_keys=True, default=_text).encode()
