"""What people say of a run afterwards: an event beside it, never a change of it."""

from __future__ import annotations

from typing import Literal, get_args

from agentkit.errors import UsageError
from agentkit_tracking.home import author
from agentkit_tracking.runlog import events
from agentkit_tracking.runlog.log import RunLog

Label = Literal["accepted", "corrected", "rejected", "reopened", "escalated"]


def give(
    log: RunLog,
    run_id: str,
    label: Label | None = None,
    *,
    rating: float | None = None,
    comment: str | None = None,
    source: Literal["user", "reviewer", "system"] = "user",
    by: str | None = None,
) -> str:
    """Keep what somebody says of a run: a label, a rating from 1 to 5, a comment.

    Args:
        run_id: how the id of the run begins.
        by: who; by default `AGENTKIT_AUTHOR` or the name of the login.

    Returns:
        The run's whole id.

    Raises:
        UsageError: there is no such run, nothing is said, or it is said wrongly.
        LogUnwritable: it could not be kept.
    """
    comment = (comment or "").strip() or None
    if label is None and rating is None and comment is None:
        raise UsageError("feedback says nothing: give a label, a rating or a comment")
    if label is not None and label not in get_args(Label):
        raise UsageError(f"{label!r} is no label of feedback; use {', '.join(get_args(Label))}")
    if rating is not None and (isinstance(rating, bool) or not isinstance(rating, int | float) or not 1 <= rating <= 5):
        raise UsageError(f"a rating goes from 1 to 5, not {rating!r}")
    run = log.find(run_id)
    event = {
        "type": "feedback",
        "run_id": run.run_id,
        "system": run.system,
        "release": run.release,
        "stage": run.stage,
        "name": source,
        "result": label,
        "rating": rating,
    }
    private = {"by": by or author(), "user_hash": run.user_hash, "session": run.session}
    told = {name: value for name, value in private.items() if value is not None}
    kept = events.payloads()({"comment": comment}) if comment else {}
    log.write([({name: value for name, value in event.items() if value is not None}, {**told, **kept})])
    return run.run_id
