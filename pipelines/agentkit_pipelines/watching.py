"""The runner that lives: promotes what carries the alias `candidate`, with a warm kernel at hand, until it is stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException

from agentkit.errors import AgentkitError, UsageError
from agentkit_pipelines.promotion import candidates
from agentkit_pipelines.recording import Say
from agentkit_pipelines.warm_kernels import WarmKernels
from agentkit_tracking.production import current
from agentkit_tracking.registry import Version

Promote = Callable[[str, Say], object]


def keep_promoting(promote: Promote, every_s: float, say: Say) -> None:
    """Look for candidates every `every_s` seconds; returns on SIGINT or SIGTERM, and leaves no kernel behind.

    Then an evaluation under way is given up, while what is being written to the store is finished first.
    An evaluation that broke may have cost money: its version is tried again when its alias has been taken away and
    set anew, or production has changed, not before. What is said round after round is said once.

    Args:
        promote: evaluates, judges and promotes one reference, and says why if it need not.
    """
    news, broken = _News(say), dict[str, str]()  # version to the production it was to be compared with
    with WarmKernels() as kernels, _told_to_stop(kernels) as stop:
        say(f"looking for the alias `candidate` every {every_s:g} s; stop with Ctrl-C")
        while not stop.asked:
            try:
                asked = candidates()
            except (AgentkitError, MlflowException) as e:
                news(f"cannot look: {e}")
            else:
                for withdrawn in broken.keys() - {str(v) for v in asked}:
                    del broken[withdrawn]
                for version in asked:
                    with stop.attempt():
                        _try(version, promote, broken, news)
            news.end_round()
            time.sleep(every_s)
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


class _Stop:
    """The signal handler: interrupts at once, but for what follows on an evaluation; told twice, it interrupts that too."""

    def __init__(self, kernels: WarmKernels) -> None:
        self.asked = False
        self._kernels = kernels
        self._served: int | None = None  # notebooks, at the beginning of an attempt

    def __call__(self, *_: object) -> None:
        again, self.asked = self.asked, True
        is_writing = self._served is not None and self._kernels.served > self._served
        if again or not is_writing:
            raise KeyboardInterrupt

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """An evaluation, and the writing after it, which is let finish."""
        self._served = self._kernels.served
        yield
        self._served = None
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def _told_to_stop(kernels: WarmKernels) -> Iterator[_Stop]:
    """For the time of the block, SIGTERM, which supervisors send, and Ctrl-C tell to stop; neither is a failure."""
    stop = _Stop(kernels)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
