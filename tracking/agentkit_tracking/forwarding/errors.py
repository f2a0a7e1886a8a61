"""Why a target did not take a batch.

AgentkitError
├── Unavailable   the target cannot be reached or is busy: everything is tried again later
└── Rejected      the target is there, and does not take this
"""

from __future__ import annotations

from agentkit.errors import AgentkitError


class Unavailable(AgentkitError):
    """The target is down, busy, or lets nobody in; `retry_after` is how many seconds it asked for."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Rejected(AgentkitError):
    """The target answers, and does not take what it was given; `is_certain` where it says that this is the content's fault."""

    def __init__(self, reason: str, *, is_certain: bool = False) -> None:
        super().__init__(reason)
        self.is_certain = is_certain
