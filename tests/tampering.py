"""For the tests of loading: a store in which releases say that they were executed, and changes straight in its database and files."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from evidence import Store, promoted

from agentkit.errors import ReleaseError
from agentkit_tracking import history as histories
from agentkit_tracking import loading, registry
from agentkit_tracking.history import KEY
from agentkit_tracking.home import connect
from agentkit_tracking.keys import SigningKey, Trust, _generate
from agentkit_tracking.statements import Evidence

EVE = SigningKey(*_generate("Eve", local=False))


@pytest.fixture
def store(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Versions 1 and 2 promoted in turn, 3 registered; whatever of it is executed leaves a file behind."""
    monkeypatch.setenv("MARKER", str(own_home.with_name("executed")))
    monkeypatch.setenv("AGENTKIT_AUTHOR", "Ada")
    return promoted(own_home)


def executed() -> bool:
    """Whether a release's source ran since it was last asked."""
    path = Path(os.environ["MARKER"])
    found = path.exists()
    path.unlink(missing_ok=True)
    return found


def refused(reference: str | Path = "colours@production", **options: Any) -> str:
    with pytest.raises(ReleaseError) as error:
        loading.load(reference, **options)
    assert not executed()
    return str(error.value)


def loads(reference: str | Path = "colours@production", **options: Any) -> str | None:
    system = loading.load(reference, **options)
    assert executed()
    assert system.run(text="lava").output["label"] == "warm"
    return system.release


def fresh(store: Store) -> None:
    """As a machine that has the same trusted keys, and has neither seen nor fetched anything."""
    shutil.rmtree(store.home / "seen")
    shutil.rmtree(store.home / "releases")
    (store.home / "signing_key.pem").unlink(missing_ok=True)


def trusting(store: Store, **changes: Any) -> None:
    path = store.home / "trust.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- straight in the database


def tag(store: Store, key: str, version: int | None = 2, name: str = "colours") -> str:
    if version is None:
        rows = store.sql("SELECT value FROM registered_model_tags WHERE name = ? AND key = ?", name, key)
    else:
        rows = store.sql(
            "SELECT value FROM model_version_tags WHERE name = ? AND version = ? AND key = ?", name, version, key
        )
    return str(rows[0][0])


def put(store: Store, key: str, value: str | None, version: int | None = 2, name: str = "colours") -> None:
    """Set a tag of a version, or of the model; None deletes it."""
    table, columns, place = ("model_version_tags", "key, name, version", (key, name, version))
    if version is None:
        table, columns, place = ("registered_model_tags", "key, name", (key, name))
    where = " AND ".join(f"{c.strip()} = ?" for c in columns.split(","))
    store.sql(f"DELETE FROM {table} WHERE {where}", *place)
    if value is not None:
        marks = ", ".join("?" * (len(place) + 2))
        store.sql(f"INSERT INTO {table} ({columns}, value, workspace) VALUES ({marks})", *place, value, "default")


def alias(store: Store, name: str, version: int | None, model: str = "colours") -> None:
    store.sql("DELETE FROM registered_model_aliases WHERE name = ? AND alias = ?", model, name)
    if version is not None:
        store.sql(
            "INSERT INTO registered_model_aliases (alias, version, name, workspace) VALUES (?, ?, ?, 'default')",
            name,
            version,
            model,
        )


def entry(n: int) -> str:
    return f"{KEY}{n:06}"


def history(store: Store, n: int, text: str | None) -> None:
    put(store, entry(n), text, version=None)


def told(store: Store, n: int) -> str:
    return tag(store, entry(n), version=None)


def by_a_stranger(store: Store, version: int = 3, event: Any = "promoted", take_evidence_of: int = 2) -> None:
    """The entry that somebody could write who has the database's password and no trusted key."""
    tags = {entry(n): told(store, n) for n in range(1, next_free(store))}
    found = histories.parse("colours", tags, Trust())
    evidence = Evidence.model_validate(json.loads(evidence_of(store, take_evidence_of)))
    assert found.head is not None
    made, text = histories.next_entry(
        found, event, EVE, version=version, release=tag(store, "agentkit.release_id", version),
        prompts=registry_hash(tag(store, "agentkit.prompts", version)),
        evidence=evidence.model_copy(update={"compared_with": found.head.move.release}), why="trust me",
    )  # fmt: skip
    put(store, made, text, version=None)
    alias(store, "production", version)


def registry_hash(text: str) -> str:
    from hashlib import sha256

    return sha256(text.encode()).hexdigest()


def next_free(store: Store) -> int:
    return len(store.sql("SELECT 1 FROM registered_model_tags WHERE key LIKE ?", KEY + "%")) + 1


def evidence_of(store: Store, n: int) -> str:
    body = json.loads(base64.b64decode(json.loads(told(store, n))["payload"]))
    return json.dumps(body["predicate"]["evidence"])


def text_of(table: str) -> str:
    """What a table says, cells that were broken into lines put together again."""
    return re.sub(r"\s+", " ", re.sub(r"[│┃]", " ", table))


# ---- on disk


def artifacts(version: int) -> Path:
    location = connect().get_logged_model(str(registry.resolve(f"colours/{version}").model_id)).artifact_location
    return Path(location.removeprefix("file://"))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)
