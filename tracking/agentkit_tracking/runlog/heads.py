"""Signatures under the heads of chains: from then on, nothing before can be changed without it being found.

Heads are a chain, too: each names the signature of the one before, so that none can be left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from agentkit.errors import UsageError
from agentkit_tracking import keys
from agentkit_tracking.runlog.database import insert

if TYPE_CHECKING:
    import duckdb


def sign(connection: duckdb.DuckDBPyConnection, ends: Iterable[tuple[str, int, str]]) -> None:
    """Keep signed heads of chains that now end so (segment, number, hash); nothing where no good key is at hand."""
    try:
        key = keys.key_at_hand()
    except UsageError:
        return
    if key is None:
        return
    last = connection.execute(
        "SELECT number, signature FROM log.heads WHERE number IS NOT NULL ORDER BY number DESC LIMIT 1"
    ).fetchall()
    number, before = last[0] if last else (0, "")
    rows = []
    for segment, n, digest in ends:
        number += 1
        values = {"segment": segment, "n": n, "hash": digest, "number": number, "previous": before}
        rows.append(signed(values, key))
        before = rows[-1][-1]
    insert(connection, "log.heads", "segment, n, hash, number, previous, signed_at, key_id, signature", rows)


def signed(values: dict[str, Any], key: keys.SigningKey) -> list[Any]:
    """The values, with when they were signed, by which key, and the signature."""
    at = datetime.now(UTC).isoformat()
    return [*values.values(), at, key.public.id, key.private.sign(message({**values, "signed_at": at})).hex()]


def message(values: dict[str, Any]) -> bytes:
    """What is signed: the values as canonical JSON, and what they are."""
    return b"agentkit run log\n" + orjson.dumps(values, option=orjson.OPT_SORT_KEYS)


def doubt(values: dict[str, Any], key_id: str, signature: str, trust: keys.Trust) -> str:
    """Why this signature does not count; empty if it does."""
    key = trust.find(key_id)
    if key is None:
        return f"signed by the key {key_id}, which is not trusted here"
    if key.revoked:
        return f"signed by the key {key_id}, which was revoked"
    try:
        if not keys.verify(key, bytes.fromhex(signature), message(values)):
            return f"not what the key {key_id} signed"
        if key.retired and datetime.fromisoformat(values["signed_at"]) > key.retired:
            return f"signed by the key {key_id} after it had retired"
    except (ValueError, TypeError):
        return "no signature"
    return ""
