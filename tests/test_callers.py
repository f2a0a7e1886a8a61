"""On whose behalf a run acts is said as text, or it is refused at once."""

from __future__ import annotations

from typing import Any

import pytest

import agentkit as ak
from agentkit.callers import caller
from agentkit.errors import UsageError


@pytest.mark.parametrize("user", [42, None, b"ann", "", "  ", ["ann"]])
def test_a_user_that_is_no_text_is_refused_at_once(user: Any) -> None:
    with pytest.raises(UsageError, match="takes the user as text that is not empty, not "):
        ak.acting_for(user)


def test_a_session_that_is_no_text_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="takes the session as text or None, not 7"):
        ak.acting_for("ann", 7)  # type: ignore[arg-type]


def test_inside_it_is_them_and_afterwards_whoever_it_was() -> None:
    with ak.acting_for("ann", session="s"):
        with ak.acting_for("bob"):
            assert (caller().user, caller().session) == ("bob", None)
        assert (caller().user, caller().session) == ("ann", "s")
    assert caller().user is None
