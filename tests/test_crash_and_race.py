"""Two moves at once, and a disk that is full: one clean outcome, nothing half-moved."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import SOAK
from evidence import Store, promoted
from releases import python

from agentkit_pipelines import promotion
from agentkit_tracking import home as homes
from agentkit_tracking import loading, mirrors, registry
from agentkit_tracking.keys import signing_key
from agentkit_tracking.production import current, find_production, history_of
from agentkit_tracking.rules import PRODUCTION

pytestmark = pytest.mark.slow

# Two processes act on one store at the same moment, round after round; each says what became of it.
RACERS = """
import json, os, shutil, sys, time
from pathlib import Path
import mlflow, mlflow.artifacts, mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
import agentkit_tracking.guard.registry_store, agentkit_tracking.home
from agentkit.errors import AgentkitError
from agentkit_pipelines import promotion
from agentkit_tracking.keys import signing_key
from releases import finished

home, out, evaluated, rounds = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
PAIRS = ("promote", "promote"), ("promote", "rollback"), ("rollback", "withdraw")
if sys.argv[5] == "unlocked":  # as two machines are that share nothing but the store
    import contextlib
    promotion._one_at_a_time = lambda name: contextlib.nullcontext()

def act(action):
    if action == "promote":
        promotion.commit(done, signing_key())
    else:
        getattr(promotion, action)("colours", why="race")

for n, actions in enumerate(PAIRS * rounds):
    copy = out / f"{n}"
    copy.mkdir(parents=True)
    for name in ("mlflow.db", "trust.json", "signing_key.pem"):
        shutil.copy(home / name, copy)
    os.environ["AGENTKIT_HOME"] = str(copy)
    start = time.time() + 0.7
    children = []
    for action in actions:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            done = finished(evaluated, "colours/3")
            time.sleep(max(0, start - time.time()))
            try:
                act(action)
                said = "done"
            except AgentkitError as e:
                said = f"{type(e).__name__}: {e}"
            except BaseException as e:
                said = f"UNEXPECTED {type(e).__name__}: {e}"
            os.write(write, said.encode()[:4000])
            os._exit(0)
        os.close(write)
        children.append((child, read))
    said = []
    for child, read in children:
        os.waitpid(child, 0)
        said.append(os.read(read, 5000).decode())
    print(json.dumps([actions, said]), flush=True)
"""


@pytest.fixture
def store(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Version 2 in production, 1 before it, 3 evaluated: passed, and not promoted yet."""
    monkeypatch.setenv("AGENTKIT_AUTHOR", "Ada")
    return promoted(own_home)


@pytest.mark.parametrize("locks", ["locked", "unlocked"])
def test_of_two_moves_at_once_each_is_whole_or_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    """With the lock of one home, and without it, as on two machines."""
    done = store.evaluate("colours/3")
    rounds = python(RACERS, store.home, tmp_path / "out", done.folder, "8" if SOAK else "2", locks).splitlines()
    for n, line in enumerate(rounds):
        actions, said = json.loads(line)
        assert "done" in said
        assert not [text for text in said if text.startswith("UNEXPECTED")]
        monkeypatch.setenv("AGENTKIT_HOME", str(tmp_path / "out" / str(n)))
        history = history_of("colours")
        moved = len(history.entries) - 2
        already = (
            actions == ["promote", "promote"] and said == ["done", "done"] and moved == 1
        )  # "is in production already"
        assert moved == said.count("done") or already
        for text in said:
            assert (
                text == "done" or "changed" in text or "faster" in text or "cannot be" in text or "no version" in text
            )
        found = find_production("colours")  # every mirror agrees, or this would refuse
        assert (found and found.number) == history.production
        assert registry.look_up("colours").aliases.get(PRODUCTION) == history.production
        assert mirrors.prompts_wrong(registry.look_up("colours"), history) == {}


@contextlib.contextmanager
def only(pages: int) -> Iterator[None]:
    """The database may grow by so many pages; then SQLite says that the disk is full."""

    def limit(connection: Any, *_: Any) -> None:
        size = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {size + pages}")

    engines = _engines()
    for engine in engines:
        sqlalchemy.event.listen(engine, "connect", limit)
        engine.dispose()
    try:
        yield
    finally:
        for engine in engines:
            sqlalchemy.event.remove(engine, "connect", limit)
            engine.dispose()


def _fill(store: Store) -> None:
    """Leave no room for an entry in the pages that are there."""
    store.sql("VACUUM")
    insert = "INSERT INTO registered_model_tags (workspace, name, key, value) SELECT workspace, name, ?, ? FROM registered_models WHERE name = 'colours'"
    [[size]] = store.sql("PRAGMA page_count")
    for n in range(1000):
        store.sql(insert, f"pad.{n:04}", "x" * 300)
        if store.sql("PRAGMA page_count") != [(size,)]:
            store.sql("DELETE FROM registered_model_tags WHERE key = ?", f"pad.{n:04}")
            store.sql("VACUUM")
            return


def _engines() -> list[Any]:
    client = homes.connect()
    registry.look_up("colours")  # so that the registry's is there
    return [client._tracking_client.store.engine, client._get_registry_client().store.engine]


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_full_disk_leaves_one_release_in_force_whole(store: Store, action: str) -> None:
    done = store.evaluate("colours/3")
    _fill(store)
    new = 3 if action == "promote" else 1
    for pages in range(40):
        before = history_of("colours").production
        with only(pages):
            try:
                if action == "promote":
                    promotion.commit(done, signing_key())
                else:
                    promotion.rollback("colours", why="full")
                failed = ""
            except Exception as e:
                failed = f"{type(e).__name__}: {e}"
        found = current("colours")
        assert found is not None
        assert found.number in (before, new)
        if failed and found.number == before:
            assert "full" in failed
            assert loading.load("colours@production").release == found.release_id
        if found.number == new:
            break
    assert found.number == new
    assert pages > 0, "the first try already had room; the test showed nothing"
    mirrors.mirror(history_of("colours"))
    assert find_production("colours") == current("colours")
    assert loading.load("colours@production").release == found.release_id


def test_a_home_that_cannot_be_written_promotes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    done = store.evaluate("colours/3")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    key = signing_key()
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "file_lock", full)
        with pytest.raises(OSError, match="No space left"):
            promotion.commit(done, key)
    assert history_of("colours").production == 2
    assert loading.load("colours@production").release == registry.resolve("colours/2").release_id
