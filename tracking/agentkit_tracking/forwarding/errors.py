"""Why a target did not take a batch.

AgentkitError
├── Unavailable   the target cannot be reached or is busy: everything is tried again later
└── Rejected      the target is there, and does not take this
"""

from __future__ import annotations

import math

from agentkit.errors import AgentkitError

LONGEST_PAUSE_S = 3600.0  # whatever a target asks for


class Unavailable(AgentkitError):
    """The target is down, busy, or lets nobody in; `retry_after` is how many seconds it asked for, an hour at most."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        if retry_after is not None:
            retry_after = min(retry_after, LONGEST_PAUSE_S) if math.isfinite(retry_after) and retry_after >= 0 else None
        self.retry_after = retry_after


class Rejected(AgentkitError):
    """The target answers, and does not take what it was given.

    `is_certain` where nothing but the content can be at fault: it is not tried again. A status alone does not say that; a proxy
    or the wrong port answers 400 as well.
    """

    def __init__(self, reason: str, *, is_certain: bool = False) -> None:
        super().__init__(reason)
        self.is_certain = is_certain
