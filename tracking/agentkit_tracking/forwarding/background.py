"""The thread that forwards while agents run: out of their way, in batches, given a few seconds at the end of the process."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 # mlflow's import needs it, and at the end of a process it can be imported no more
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from agentkit.errors import AgentkitError, UsageError
from agentkit_tracking.forwarding.consumer import Consumer, Target
from agentkit_tracking.forwarding.errors import Unavailable
from agentkit_tracking.runlog.database import lease

if TYPE_CHECKING:
    from agentkit_tracking.runlog import RunLog

TRACES_ENV = "AGENTKIT_TRACES"
EXIT_S = 20.0  # the end of the process waits for what is left; most of it may be the import of mlflow
_GATHER_S = 0.25  # after a run has ended, for others to end
_IDLE_S = 2.0  # between looks for runs of other processes
_BUSY_S = 0.25  # between tries while another process has the lease and somebody here waits
_BACKOFF_S = (1.0, 60.0)
_REST = 3.0  # times as long as a batch took, the agents are left alone after it
_FORK_S = 5.0  # a fork waits so long for a batch to end

_log = logging.getLogger("agentkit.forwarding")
_SETTINGS = (TRACES_ENV, "MLFLOW_TRACKING_URI", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_running: dict[tuple[str, str], Background] = {}  # by log and target
_by_place: dict[
    tuple[str | None, ...], list[Background]
] = {}  # by what decides which they are: looked at for every run
_starting = threading.Lock()


def wanted() -> tuple[str, ...]:
    """The targets that `AGENTKIT_TRACES` names: `on` (the default) is MLflow, `off` none, else `mlflow`, `otlp` or both.

    Raises:
        UsageError: it names something else.
    """
    given = os.environ.get(TRACES_ENV, "on").strip().lower()
    if given in ("off", "0", "false", "no", ""):
        return ()
    if given in ("on", "1", "true", "yes"):
        return ("mlflow",)
    names = tuple(name.strip() for name in given.split(","))
    for name in names:
        target_class(name)
    return names


def target_class(name: str) -> Callable[[], Target]:
    """What makes a target.

    Raises:
        UsageError: there is none of that name.
    """
    if name == "mlflow":
        from agentkit_tracking.forwarding.mlflow_target import MlflowTarget

        return MlflowTarget
    if name == "otlp":
        from agentkit_tracking.forwarding.otlp import OtlpTarget

        return OtlpTarget
    raise UsageError(f"there is no target {name!r} for traces; use mlflow, otlp, or {TRACES_ENV}=off for none")


def start(log: RunLog) -> list[Background]:
    """The threads that forward this log, started if need be, and told that there is something new.

    Raises:
        UsageError: `AGENTKIT_TRACES` names a target that there is not.
    """
    place = (str(log.folder), *(os.environ.get(name) for name in _SETTINGS))
    found = _by_place.get(place)
    if found is None:
        with _starting:
            found = []
            for target in [target_class(name)() for name in wanted()]:
                key = str(log.folder), target.name
                found.append(_running.get(key) or _running.setdefault(key, Background(log, target)))
            _by_place[place] = found
    for background in found:
        background.nudge()
    return found


def flush(log: RunLog, seconds: float) -> bool:
    """Wait until all that the log has by now is forwarded; whether it is."""
    end = time.monotonic() + seconds
    done = [background.flush(end - time.monotonic()) for background in start(log)]
    return all(done)


def stop(seconds: float = EXIT_S) -> None:
    """Forward what is left, as far as that goes in so many seconds, and end the threads."""
    ending = list(_running.values())
    _running.clear()
    _by_place.clear()
    for background in ending:
        background.close()
    end = time.monotonic() + seconds
    for background in ending:
        if not background.join(max(end - time.monotonic(), 0)):
            _log.warning(
                "not all runs have reached %s yet; the next process that runs agents goes on with it, or `agentkit forward`",
                background.target.address,
            )


class Background:
    """Forwards one log to one target from a daemon thread, whenever nobody else does."""

    def __init__(self, log: RunLog, target: Target) -> None:
        self.log, self.target = log, target
        self.busy = threading.Lock()  # held while a batch is under way
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._asked = self._answered = 0
        self._is_done, self._is_closing, self._is_down = True, False, False
        self._held = ExitStack()
        self._thread = threading.Thread(target=self._run, name=f"agentkit-forward-{target.name}", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Say that there is something new."""
        self._wake.set()

    def flush(self, seconds: float) -> bool:
        """Wait until what the log has by now is forwarded; whether it is."""
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._wake.set()
            self._changed.wait_for(lambda: self._answered >= mine, max(seconds, 0))
            return self._answered >= mine and self._is_done

    def close(self) -> None:
        """Have the thread end once all is forwarded, or cannot be."""
        with self._changed:
            self._is_closing = True
            self._asked += 1
        self._wake.set()

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end; whether it has, with everything forwarded."""
        self._thread.join(seconds)
        return not self._thread.is_alive() and self._is_done

    def abandon(self) -> None:
        """In a forked child: thread, lease and connections are the parent's."""
        self._held.close()
        self.target.close()

    @property
    def _is_urgent(self) -> bool:
        return self._is_closing or self._asked > self._answered

    # ---- in the thread

    def _run(self) -> None:
        consumer: Consumer | None = None
        backoff, pause = _BACKOFF_S[0], _IDLE_S
        while True:
            self._sleep(pause)
            asked = self._asked
            try:
                with self.busy:
                    consumer = consumer or Consumer(self.log, self.target, self._rest)
                    is_mine = self._pass(consumer)
                backoff, pause = _BACKOFF_S[0], _IDLE_S
                if is_mine:
                    self._say_it_works()
                    self._answer(asked, is_done=not consumer.is_owing)
                elif self._is_urgent:
                    pause = _BUSY_S
            except Exception as e:
                self._say_it_fails(e)
                self._answer(asked, is_done=False)
                pause = (e.retry_after if isinstance(e, Unavailable) else None) or backoff
                backoff = min(2 * backoff, _BACKOFF_S[1])
            if self._is_closing and self._answered >= self._asked:
                self.target.close()
                return

    def _pass(self, consumer: Consumer) -> bool:
        """Forward what is new; False if another process is at it."""
        if self._is_urgent:
            consumer.look_again()
        if not consumer.has_news():
            return True
        with self._held:
            if not self._held.enter_context(lease(self.log.folder / "consumers", self.target.name)):
                return False
            consumer.resume()
            consumer.forward()
        return True

    def _sleep(self, seconds: float) -> None:
        """Until there is something to do, at most so long; while the target is down, so long even if runs come."""
        end = time.monotonic() + seconds
        if self._is_down:
            while not self._is_urgent and (left := end - time.monotonic()) > 0:
                self._wake.clear()
                self._wake.wait(left)
        elif self._wake.wait(seconds) and not self._is_urgent:
            time.sleep(_GATHER_S)
        self._wake.clear()

    def _rest(self, seconds: float) -> None:
        """Leave the interpreter to the agents for a while, unless somebody waits for the forwarding."""
        self.busy.release()
        try:
            end = time.monotonic() + _REST * seconds
            while not self._is_urgent and (left := end - time.monotonic()) > 0:
                time.sleep(min(left, 0.05))
        finally:
            self.busy.acquire()

    def _answer(self, asked: int, *, is_done: bool) -> None:
        with self._changed:
            self._answered, self._is_done = asked, is_done
            self._changed.notify_all()

    def _say_it_fails(self, error: Exception) -> None:
        if not self._is_down:
            self._is_down = True
            why = str(error) if isinstance(error, AgentkitError) else repr(error)
            _log.warning(
                "runs do not reach %s now (%s); the run log keeps them, and they are forwarded once it works",
                self.target.address,
                why.partition("\n")[0],
            )

    def _say_it_works(self) -> None:
        if self._is_down:
            self._is_down = False
            _log.info("runs reach %s again", self.target.address)


# ---- forks and the end of the process

_paused: list[Background] = []


def _before_fork() -> None:
    """Let batches end: a child must not inherit a half-made import or transaction."""
    end = time.monotonic() + _FORK_S
    for background in _running.values():
        if background.busy.acquire(timeout=max(end - time.monotonic(), 0)):
            _paused.append(background)


def _after_fork_in_parent() -> None:
    while _paused:
        _paused.pop().busy.release()


def _after_fork_in_child() -> None:
    global _starting
    _starting = threading.Lock()
    _paused.clear()
    for background in _running.values():
        background.abandon()
    _running.clear()
    _by_place.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
atexit.register(stop)
