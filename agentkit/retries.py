"""Trying a model call again: exponential back-off with jitter, or as long as the server asks to wait."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from agentkit import clock
from agentkit.model_errors import is_transient

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from agentkit.runs import Run

T = TypeVar("T")
LONGEST_WAIT = 60.0  # seconds between two attempts; a server that asks for more is not waited for


def again(attempt: Callable[[], T], error: Exception, retries: int, run: Run | None) -> T:
    """The result of `attempt`, which has failed once with `error`, tried `retries` times more as long as it may help.

    Waits end early when the run is stopped, and are not begun when they would last past its time.

    Raises:
        dspy.LMError: the last attempt's error.
        Refusal: the run was stopped, or its budget is spent.
    """
    from tenacity import Retrying, retry_if_exception, wait_exponential_jitter

    first = [error]
    backoff = wait_exponential_jitter(initial=1, max=LONGEST_WAIT / 2, jitter=1)

    def work() -> T:
        if first:
            raise first.pop()  # the attempt that has been made already
        return attempt()

    def wait(state: RetryCallState) -> float:
        failed = state.outcome.exception() if state.outcome else None
        asked = getattr(failed, "retry_after", None)
        # Never sooner than asked, and not all workers in the same instant.
        return float(backoff(state) if asked is None else asked * random.uniform(1.0, 1.1))

    def stop(state: RetryCallState) -> bool:
        left = math.inf if run is None else run.ledger.seconds_left
        if run is not None and left <= 0:
            run.reserve()  # raises: the run's time is up, whatever the provider says
        return state.attempt_number > retries or state.upcoming_sleep > min(LONGEST_WAIT, left)

    pause = clock.sleep if run is None else run.sleep
    return Retrying(retry=retry_if_exception(is_transient), wait=wait, stop=stop, sleep=pause, reraise=True)(work)
