"""The runner that lives: promotes what carries the alias `candidate`, with a warm kernel at hand, until it is stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException

from agentkit.errors import AgentkitError, UsageError
from agentkit_pipelines.evidence import Say
from agentkit_pipelines.promotion import candidates
from agentkit_pipelines.warm_kernels import WarmKernels
from agentkit_tracking.production import current
from agentkit_tracking.registry import Version

Promote = Callable[[str, Say], object]


def keep_promoting(promote: Promote, every_s: float, say: Say) -> None:
    """Look for candidates every `every_s` seconds; returns on SIGINT or SIGTERM, which leave no kernel behind.

    An evaluation that broke may have cost money: its version is tried again when its alias has been taken away and
    set anew, or production has changed, not before. What is said round after round is said once.

    Args:
        promote: evaluates, judges and promotes one reference, and says why if it need not.
    """
    news, broken = _News(say), dict[str, str]()  # version to the production it was to be compared with
    with _until_stopped() as stopped, WarmKernels():
        say(f"looking for the alias `candidate` every {every_s:g} s; stop with Ctrl-C")
        while not stopped.is_set():
            try:
                asked = candidates()
            except (AgentkitError, MlflowException) as e:
                news(f"cannot look: {e}")
            else:
                for withdrawn in broken.keys() - {str(v) for v in asked}:
                    del broken[withdrawn]
                for version in asked:
                    _try(version, promote, broken, news)
            news.end_round()
            stopped.wait(every_s)
    say("stopped")


def _try(version: Version, promote: Promote, broken: dict[str, str], news: Say) -> None:
    production = ""
    try:
        production = str(current(version.name))
        if broken.get(str(version)) != production:
            promote(str(version), news)
    except UsageError as e:  # may be put right at any time, and looking again is free
        news(f"{version}: {e}")
    except (AgentkitError, MlflowException) as e:
        broken[str(version)] = production
        news(f"{version}: {e}; tried again when its alias is set anew or production changes")


class _News:
    """Says what was not said in the round before."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._before, self._now = set[str](), set[str]()

    def __call__(self, message: str) -> None:
        if message not in self._before | self._now:
            self._say(message)
        self._now.add(message)

    def end_round(self) -> None:
        self._before, self._now = self._now, set()


@contextmanager
def _until_stopped() -> Iterator[threading.Event]:
    """SIGTERM, which supervisors send, and Ctrl-C end the block at once; neither is a failure."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()  # lest the exception is lost in a callback of a library
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
