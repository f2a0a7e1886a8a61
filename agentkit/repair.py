"""One repair of a malformed answer: the model is asked once more and told what was wrong.

DSPy 3.4's own `ChatAdapter` repeats the question in its JSON format and says nothing of the error; other adapters do not
ask again. Here every adapter asks once more in its own format, with the answer and the error in the conversation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, cast

import dspy

from agentkit.current import current_run
from agentkit.errors import MalformedOutput
from agentkit.model_cache import Used, used_answers

_SHOWN = 4000  # characters of a malformed answer that the model is shown again

# What the model is told in addition, within the second call of an adapter.
_correction: ContextVar[list[dict[str, str]] | None] = ContextVar("agentkit_correction", default=None)


def repairing(adapter: dspy.Adapter | None) -> dspy.Adapter:
    """`adapter` (None: DSPy's default) with exactly one repair; one that has it already comes back as is."""
    if isinstance(adapter, _Repairing):
        return adapter
    made = copy.copy(adapter) if adapter is not None else dspy.ChatAdapter()
    if isinstance(made, dspy.ChatAdapter):
        made.use_json_adapter_fallback = False  # it would be a second repair
    made.__class__ = _repairing_class(made.__class__)
    return made


class _Repairing:
    """Put in front of an adapter's class."""

    def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        with used_answers() as used:
            try:
                return super().__call__(lm, dict(lm_kwargs), signature, demos, inputs)  # type: ignore[misc]
            except (dspy.AdapterParseError, MalformedOutput) as e:
                first = e
        with _once_more(lm, first, used):
            return super().__call__(lm, dict(lm_kwargs), signature, demos, inputs)  # type: ignore[misc]

    async def acall(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        with used_answers() as used:
            try:
                return await super().acall(lm, dict(lm_kwargs), signature, demos, inputs)  # type: ignore[misc]
            except (dspy.AdapterParseError, MalformedOutput) as e:
                first = e
        with _once_more(lm, first, used):
            return await super().acall(lm, dict(lm_kwargs), signature, demos, inputs)  # type: ignore[misc]

    def format(self, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = super().format(signature, demos, inputs)  # type: ignore[misc]
        if correction := _correction.get():
            messages += correction
            _correction.set(None)  # an adapter that calls a second model does not ask that one, too
        return messages


@lru_cache(maxsize=64)
def _repairing_class(adapter: type[Any]) -> type[Any]:
    made: Any = type(f"Repairing{adapter.__name__}", (_Repairing, adapter), {})
    # DSPy wraps these in every subclass to report them to callbacks; the parent's have been wrapped already.
    del made.format, made.parse
    return cast("type[Any]", made)


@contextmanager
def _once_more(lm: Any, error: Exception, used: Used) -> Iterator[None]:
    """Within: the model is told what was wrong; what it says then is final."""
    _forget(used)
    model = str(getattr(lm, "model", type(lm).__name__))
    if (run := current_run()) is not None:
        run.decide("repair", model, _found(error))
    token = _correction.set(_told(error))
    try:
        with used_answers() as used:
            yield
    except (dspy.AdapterParseError, MalformedOutput) as e:
        _forget(used)
        raise MalformedOutput(model, _found(e), _said(e), repaired=True) from e
    finally:
        _correction.reset(token)


def _forget(used: Used) -> None:
    """A kept answer that cannot be read must not be given again."""
    for cache, key in used:
        cache.forget(key)


def _said(error: Exception) -> str:
    return str(getattr(error, "lm_response", "") or getattr(error, "said", ""))


def _found(error: Exception) -> str:
    """What is wrong with the answer, in one line."""
    if isinstance(error, MalformedOutput):
        return error.found
    fields = ", ".join(error.signature.output_fields)  # type: ignore[attr-defined]
    parsed = getattr(error, "parsed_result", None)
    found = f"; found {', '.join(parsed) or 'none of them'}" if parsed is not None else ""
    why = str(error.args[0] if error.args else "").partition("\n")[0]
    if why.startswith("Adapter "):
        why = "it does not have the form asked for"
    return f"the answer cannot be read: {why} (expected the fields {fields}{found})"


def _told(error: Exception) -> list[dict[str, str]]:
    said = _said(error)[:_SHOWN]
    cut_off = isinstance(error, MalformedOutput)
    wrong = "it was cut off because it was too long: answer more briefly" if cut_off else _found(error)
    told = {"role": "user", "content": f"Your answer could not be used: {wrong}. Answer again, in the form asked for."}
    return [{"role": "assistant", "content": said}, told] if said else [told]
