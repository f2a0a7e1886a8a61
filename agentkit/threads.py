"""Work on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


def begin(work: Callable[[], T], name: str) -> Future[T]:
    """Begin `work()` on a thread called `name`, with a copy of this one's context variables.

    A daemon: work that hangs must not keep the process from ending.
    """
    done: Future[T] = Future()
    context = copy_context()

    def target() -> None:
        try:
            done.set_result(context.run(work))
        except BaseException as e:
            done.set_exception(e)

    threading.Thread(target=target, name=name, daemon=True).start()
    return done
