"""For the tests of the approvals desk: hostile text, and what somebody changes straight in the database."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import select

from agentkit_tracking.control import database, tables

HOSTILE = (
    "# Heading\n<script>alert(1)</script> **bold** [a](javascript:alert(1)) [red]x[/red] \x1b[31m \u202e `x` $x$ "
    "| a | ![i](http://x/y.png) www.example.com https://example.com &lt; ::lucide:rocket:: '; DROP TABLE approvals; --"
)


def change(identity: str, **values: Any) -> None:
    """Write into the database, as somebody who can."""
    with database.database().writing() as connection:
        done = connection.execute(tables.APPROVALS.update().where(tables.APPROVALS.c.id == identity).values(**values))
        assert done.rowcount == 1


def row_of(identity: str) -> Any:
    with database.database().reading() as connection:
        return connection.execute(select(tables.APPROVALS).where(tables.APPROVALS.c.id == identity)).one()


def refused() -> list[str]:
    with database.database().reading() as connection:
        return [r.problem for r in connection.execute(select(tables.REFUSED))]


def altered(row: Any, **changes: Any) -> str:
    return json.dumps({**json.loads(row.request), **changes})
