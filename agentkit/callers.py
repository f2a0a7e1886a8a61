"""On whose behalf runs act: a user and a session, for budgets per user, checks of tools, and the record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from agentkit.errors import UsageError


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


def acting_for(user: str, session: str | None = None) -> AbstractContextManager[None]:
    """Runs inside act for `user`: their daily budget is charged, and tools' checks are told who it is.

    Raises:
        UsageError: the user or the session is no text, or the user is empty.
    """
    if not isinstance(user, str) or not user.strip():
        raise UsageError(f"acting_for() takes the user as text that is not empty, not {_said(user)}")
    if session is not None and not isinstance(session, str):
        raise UsageError(f"acting_for() takes the session as text or None, not {_said(session)}")
    return _acting(Caller(user, session))


def _said(value: object) -> str:
    """Text or a number as it is; of other data only the type."""
    return repr(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


@contextmanager
def _acting(caller: Caller) -> Iterator[None]:
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def caller() -> Caller:
    """The caller in force."""
    return _caller.get()
