"""On whose behalf runs act: a user and a session, for budgets per user, checks of tools, and the record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Whoever a run acts for; None where nobody said."""

    user: str | None = None
    session: str | None = None

    @property
    def user_hash(self) -> str | None:
        """What records keep of the user: the first 16 hex digits of SHA-256."""
        return None if self.user is None else hashlib.sha256(self.user.encode("utf-8", "replace")).hexdigest()[:16]


_NOBODY = Caller()
_caller: ContextVar[Caller] = ContextVar("agentkit_caller", default=_NOBODY)


@contextmanager
def acting_for(user: str, session: str | None = None) -> Iterator[None]:
    """Runs inside act for `user`: their daily budget is charged, and tools' checks are told who it is."""
    token = _caller.set(Caller(user, session))
    try:
        yield
    finally:
        _caller.reset(token)


def caller() -> Caller:
    """The caller in force."""
    return _caller.get()
