"""What a failed model call means: whether to try again, to ask another model, or to count the provider as down."""

from __future__ import annotations

import dspy

from agentkit.breaker import CircuitOpen
from agentkit.settings import SETTINGS_FILE

# What reading a reply of valid JSON but the wrong shape raises inside DSPy's engines.
_MISREAD = (TypeError, ValueError, KeyError, IndexError, AttributeError)


def is_outage(error: BaseException) -> bool:
    """Whether the provider itself is down or unreachable. A rate limit is an answer, not an outage."""
    return isinstance(error, dspy.LMServerError | dspy.LMTransportError | dspy.LMTimeoutError)


def may_be_charged(error: BaseException) -> bool:
    """Whether the model may have answered, and the provider charge for it, though no answer has arrived."""
    return isinstance(error, dspy.LMStreamAssemblyError) or _timed_out(error) or _unreadable(error)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may work when it is sent again.

    Never after part of a streamed answer has reached the user: he would see it twice.
    """
    if not isinstance(error, dspy.LMError) or getattr(error, "emitted", False):
        return False
    return dspy.is_retryable_lm_error(error) or isinstance(error, dspy.LMStreamAssemblyError) or _unreadable(error)


def falls_back(error: BaseException | None) -> bool:
    """Whether another model is to answer in this one's place.

    Yes for whatever this provider fails at just now: outages, rate limits, unreadable replies, a key that was revoked
    or has no credit left, a model that was retired, a prompt too long for this model. No for what is wrong on our side
    and would only be hidden: no key set at all, a request the provider calls invalid, an unexpected error. Refusals,
    budgets and content filters never get here.
    """
    if isinstance(error, dspy.LMAuthError | dspy.LMBillingError | dspy.LMUnsupportedModelError):
        return True
    return isinstance(error, CircuitOpen | dspy.ContextWindowExceededError) or (
        error is not None and is_transient(error)
    )


def _unreadable(error: BaseException) -> bool:
    """A reply that is no JSON, as of a gateway's error page, or JSON of the wrong shape."""
    if type(error) is dspy.LMUnexpectedError:
        return isinstance(error.__cause__, _MISREAD)
    return type(error) is dspy.LMProviderError and getattr(error, "status", None) in (None, 200)


def advice(error: BaseException) -> str:
    """One line: what happened and what to do."""
    said = (str(getattr(error, "message", "") or error).strip() or type(error).__name__).splitlines()[0]
    first = said if len(said) <= 200 else said[:199] + "…"
    match error:
        case CircuitOpen():
            return f"the provider is taken for down ({first})"
        case dspy.LMAuthError() | dspy.LMNotConfiguredError():
            names = " or ".join(getattr(error, "env_keys", ())) or "e.g. OPENAI_API_KEY"
            return f"no valid key ({first}); set the provider's key variable, {names}"
        case dspy.LMTransportError() | dspy.LMTimeoutError() if _timed_out(error):
            first = first.partition(";")[0]  # DSPy goes on with advice that does not fit here
            return f"the model did not answer in time ({first}); raise `timeout` in [options] of {SETTINGS_FILE}"
        case dspy.LMRateLimitError():
            asked = "" if error.retry_after is None else f", asks to wait {error.retry_after:g} s"
            return f"rate limited ({first}{asked}); run fewer workers or wait"
        case dspy.LMTransportError():
            return f"the server cannot be reached ({first}); check api_base and the network"
        case dspy.LMStreamAssemblyError():
            return f"the stream was cut off ({first})"
        case dspy.LMUnsupportedModelError():
            return f"unknown model ({first}); check the name after the slash"
        case dspy.LMProviderError():
            return f"the provider answered with an error ({first})"
        case _:
            return f"the call failed ({first})"


def _timed_out(error: BaseException | None) -> bool:
    """Whether a time-out is behind it; DSPy reports one while reading as a transport error."""
    while error is not None and not isinstance(error, TimeoutError | dspy.LMTimeoutError):
        error = error.__cause__ or error.__context__
    return error is not None
