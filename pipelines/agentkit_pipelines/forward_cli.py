"""`forward`: runs of the log go to MLflow or to an OpenTelemetry endpoint, now or for as long as this runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal
from agentkit_pipelines.gate_cli import CRASH, OK, fail

if TYPE_CHECKING:
    from agentkit_tracking.forwarding.consumer import Consumer

_POLL_S = 1.0
_LONGEST_PAUSE_S = 60.0


def forward(
    target: Annotated[
        Literal["mlflow", "otlp"], typer.Argument(help="MLflow, or where OTEL_EXPORTER_OTLP_ENDPOINT points")
    ],
    follow: Annotated[
        bool, typer.Option("--follow", help="go on until stopped; waits where the target is down")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="begin anew: all runs that the log has; what is there already stays one")
    ] = False,
) -> None:
    """Forward runs and feedback from the run log as traces, from where the last forwarding ended.

    Processes that run agents do this themselves (AGENTKIT_TRACES: on, off, or mlflow,otlp). Exit code 1: the target is down or
    refused some; the log has everything, and what was refused stands in consumers/NAME.refused.jsonl beside it.
    """
    from agentkit_tracking.forwarding.background import target_class
    from agentkit_tracking.forwarding.consumer import Consumer
    from agentkit_tracking.runlog import RunLog
    from agentkit_tracking.runlog.database import lease

    log, to = RunLog(), target_class(target)()
    with lease(log.folder / "consumers", to.name) as mine:
        if not mine:
            if rebuild:
                raise UsageError(
                    f"another process forwards to {to.address} just now; stop it, or try again in a moment"
                )
            terminal.console().print(f"another process forwards to {to.address} just now; it takes everything along")
            raise typer.Exit(OK)
        if rebuild:
            Consumer(log, to).file.forget()
        consumer = Consumer(log, to)
        try:
            code = _follow(consumer) if follow else _once(consumer)
        finally:
            to.close()
            _say(consumer)
    raise typer.Exit(code)


def _once(consumer: Consumer) -> int:
    from agentkit_tracking.forwarding.errors import Unavailable

    try:
        consumer.forward()
        while consumer.is_owing:  # what was not taken is tried again, and left out in the end
            time.sleep(_POLL_S)
            consumer.forward()
    except (Unavailable, OSError) as e:
        fail(f"{_why(consumer, e)}; nothing is lost, try again later")
        return CRASH
    return CRASH if consumer.done.refused else OK


def _follow(consumer: Consumer) -> int:
    from agentkit_tracking.forwarding.errors import Unavailable
    from agentkit_tracking.runlog.database import LogBusy

    pause = _POLL_S
    while True:
        try:
            if consumer.has_news():
                consumer.forward()
            pause = _POLL_S
        except (Unavailable, LogBusy, OSError) as e:
            if pause == _POLL_S:
                fail(f"{_why(consumer, e)}; trying on")
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            pause = max(pause, getattr(e, "retry_after", None) or 0.0)
        time.sleep(pause)


def _why(consumer: Consumer, error: Exception) -> str:
    """`OSError`: this machine is at fault, a full disk perhaps."""
    if isinstance(error, OSError):
        return f"forwarding from {consumer.log.folder} does not work now: {error}"
    return f"{consumer.target.address} does not take runs now: {error}"


def _say(consumer: Consumer) -> None:
    done = consumer.done
    refused = f", {done.refused} refused ({terminal.short(consumer.file.refused_path)})" if done.refused else ""
    terminal.console().print(
        f"forwarded to {consumer.target.address}: {done.runs} runs, {done.feedback} feedback{refused}", soft_wrap=True
    )
