"""The guarded registry store: an entry of the history and what mirrors it are one transaction, or nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import evidence as prepared
import pytest
from attacks import (
    GRACE,
    OTHERS_PROMPTS,
    trusting,
)
from conftest import SOAK
from evidence import Store, as_user, promoted
from mlflow.exceptions import MlflowException
from releases import python

from agentkit.errors import TrustError
from agentkit_tracking import keys, mirrors, registry
from agentkit_tracking.guard.registry_store import GuardedStore
from agentkit_tracking.history import KEY, next_entry
from agentkit_tracking.home import connect
from agentkit_tracking.keys import SigningKey, _generate, signing_key
from agentkit_tracking.production import history_of
from agentkit_tracking.rules import PROMPTS

EVE = SigningKey(*_generate("Eve", local=False))


STATE = "SELECT 'tag', key, value FROM registered_model_tags UNION SELECT alias, name, version FROM registered_model_aliases"


@pytest.fixture
def store(own_home: Path) -> Store:
    return promoted(own_home)


def next_of(store: Store, event: Any, version: int, why: str = "w") -> tuple[str, str]:
    """The signed entry that comes next in the store."""
    found, taken = history_of("colours"), registry.resolve(f"colours/{version}")
    proof = store.evaluate(str(taken)).proof if event == "promoted" else found.promotion_of(version).move.evidence
    prompts = sha256(str((taken.tags or {})["agentkit.prompts"]).encode()).hexdigest()
    said: dict[str, Any] = {"version": version, "release": taken.release_id, "prompts": prompts, "evidence": proof}
    return next_entry(found, event, signing_key(), **said, why=why)


def put(tag: str, text: str) -> None:
    connect().set_registered_model_tag("colours", tag, text)


def aliases(store: Store) -> dict[str, int]:
    return dict(store.sql("SELECT name, version FROM registered_model_aliases WHERE alias = 'production'"))


def test_an_entry_moves_the_aliases_of_model_and_prompts(store: Store) -> None:
    put(*next_of(store, "promoted", 3))
    assert aliases(store) == {"colours": 3, "colours.program": 3}
    put(*next_of(store, "rolled_back", 1))
    assert aliases(store) == {"colours": 1, "colours.program": 1}
    found = history_of("colours")
    head = found.entries[0].move
    put(
        *next_entry(
            found, "withdrawn", signing_key(), version=None, release=head.release, prompts=None, evidence=None, why=""
        )
    )
    assert aliases(store) == {}


def test_an_entry_asked_for_again_after_a_lost_answer_is_the_same_entry(store: Store) -> None:
    entry = next_of(store, "rolled_back", 1)
    put(*entry)
    put(*entry)
    assert len(history_of("colours").entries) == 3
    other = next_of(store, "rolled_back", 2)
    with pytest.raises(MlflowException, match="entry 000003 is there already; somebody else was faster"):
        put(entry[0], other[1])
    put(*other)
    put(*entry)  # even later


@pytest.mark.parametrize("step", ["_check_version", "_prompt_aliases", "_point"])
def test_an_entry_that_fails_half_way_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    entry, before = next_of(store, "rolled_back", 1), store.sql(STATE)
    calls: list[str] = []

    def broken(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(step)
            if step != "_point" or len(calls) == 2:  # the alias of the prompt, after that of the model
                raise OSError("disk full")
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(GuardedStore, step, broken(getattr(GuardedStore, step)))
        with pytest.raises((OSError, MlflowException), match="disk full"):
            put(*entry)
    assert calls
    assert store.sql(STATE) == before
    put(*entry)
    assert aliases(store) == {"colours": 1, "colours.program": 1}


REFUSED: dict[str, tuple[Any, str]] = {
    "unsigned": (lambda s: (f"{KEY}000003", "promoted"), "cannot be read"),
    "by a stranger": (lambda s: moved_in(s, EVE), "which is not trusted here"),
    "of another number": (lambda s: (f"{KEY}000004", next_of(s, "rolled_back", 1)[1]), "entry 3 of 3 is missing"),
    "of another spelling": (lambda s: (f"{KEY}3", next_of(s, "rolled_back", 1)[1]), "entry 3 of 3 is missing"),
    "an old one": (lambda s: (f"{KEY}000003", s.sql(f"SELECT value FROM registered_model_tags WHERE key = '{KEY}000002'")[0][0]), "it is entry 2 of colours"),
    "in place of the last": (lambda s: (f"{KEY}000002", moved_in(s, EVE)[1]), "somebody else was faster"),
    "without an evaluation": (lambda s: moved_in(s, None), "carries another evaluation|cannot be read"),
    "of a version never promoted": (lambda s: moved_in(s, None, "rolled_back"), "version 3 was never promoted"),
}  # fmt: skip


def moved_in(store: Store, key: SigningKey | None, event: Any = "promoted") -> tuple[str, str]:
    """The next entry for version 3, which nobody evaluated, with the evidence of another."""
    found, taken = history_of("colours"), registry.resolve("colours/3")
    proof = found.entries[1].move.evidence.model_copy(update={"compared_with": found.entries[1].move.release})
    prompts = sha256(str((taken.tags or {})["agentkit.prompts"]).encode()).hexdigest()
    said: dict[str, Any] = {"version": 3, "release": taken.release_id, "prompts": prompts, "evidence": proof}
    return next_entry(found, event, key or signing_key(), **said, why="trust me")


@pytest.mark.parametrize("what", REFUSED)
def test_an_entry_that_does_not_count_is_refused_by_the_store(store: Store, what: str) -> None:
    make, message = REFUSED[what]
    entry = make(store)
    before = store.sql(STATE)
    with pytest.raises(MlflowException, match=message) as error:
        put(*entry)
    assert error.value.error_code == "PERMISSION_DENIED"
    assert store.sql(STATE) == before


def test_an_older_evaluation_does_not_take_the_place_of_a_newer(store: Store) -> None:
    def said() -> str:
        return str((registry.resolve("colours/3").tags or {})["agentkit.evaluation"])

    store.evaluate("colours/3")
    older = said()
    store.evaluate("colours/3")
    newer = said()
    with pytest.raises(MlflowException, match="the evaluation is older than the one that is there"):
        connect().set_model_version_tag("colours", "3", "agentkit.evaluation", older)
    connect().set_model_version_tag("colours", "3", "agentkit.evaluation", newer)


@pytest.mark.parametrize(
    "prompts",
    [
        "none",
        "[]",
        '{"program": 7}',
        '{"program": {"name": "colours.program"}}',
        '{"program": {"name": "flowers", "version": 1}}',
        '{"program": {"name": "flowers.program", "version": 1}}',
    ],
)
def test_a_version_that_names_no_prompts_of_its_own_neither_stops_nor_moves_anything(
    store: Store, prompts: str
) -> None:
    """What the store itself refuses at creation, a plain server lets anybody write."""
    for name in ("flowers", "flowers.program"):
        connect().create_registered_model(name)
        store.sql(
            "INSERT INTO registered_model_aliases (alias, version, name, workspace) VALUES ('production', 1, ?, 'default')",
            name,
        )
    model = registry.resolve("colours/3").model_id
    connect().create_model_version("colours", f"models:/{model}", model_id=model)
    store.sql(
        "INSERT INTO model_version_tags (key, value, name, version, workspace) VALUES (?, ?, 'colours', 4, 'default')",
        "agentkit.prompts",
        prompts,
    )
    put(*next_of(store, "rolled_back", 1))
    assert aliases(store) == {"colours": 1, "colours.program": 1, "flowers": 1, "flowers.program": 1}
    mirrors.mirror(history_of("colours"))
    assert aliases(store) == {"colours": 1, "colours.program": 1, "flowers": 1, "flowers.program": 1}


# Imports everything once; each child works on a copy of its own, or all on one.
WORK = """
import os, shutil, signal, sys, time
from pathlib import Path
import mlflow, mlflow.store.tracking.sqlalchemy_store
from sqlalchemy import event
from sqlalchemy.engine import Engine
import agentkit_tracking.guard.registry_store
from agentkit_tracking.history import next_entry
from agentkit_tracking.home import connect
from agentkit_tracking.keys import signing_key
from agentkit_tracking.production import history_of

def back(version, why):
    found = history_of("colours")
    move = found.promotion_of(version).move
    rest = {"release": move.release, "prompts": move.prompts, "evidence": move.evidence}
    return next_entry(found, "rolled_back", signing_key(), version=version, why=why, **rest)
"""
KILLER = """
def killed_at(n):
    entry, seen = back(1, "w"), []
    def deadly(connection, cursor=None, statement="COMMIT", *_):
        seen.extend([1] * statement.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE", "COMMIT")))
        if len(seen) == n:
            os.kill(os.getpid(), signal.SIGKILL)
    event.listen(Engine, "before_cursor_execute", deadly)
    event.listen(Engine, "commit", deadly)
    connect().set_registered_model_tag("colours", *entry)

home, out = Path(sys.argv[1]), Path(sys.argv[2])
for n in range(1, 100):
    copy = out / f"{n:03}"
    copy.mkdir(parents=True)
    for name in ("mlflow.db", "trust.json", "signing_key.pem"):
        shutil.copy(home / name, copy)
    os.environ["AGENTKIT_HOME"] = str(copy)
    if (child := os.fork()) == 0:
        killed_at(n)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
RACE = """
os.environ["AGENTKIT_HOME"] = sys.argv[1]
ready, count = Path(sys.argv[2]), int(sys.argv[4])
for n in range(int(sys.argv[3])):
    children = []
    for i in range(count):
        if (child := os.fork()) == 0:
            entry = back(1 + n % 2, f"{n}/{i}")
            Path(ready, f"{n}-{i}").touch()
            while not all(Path(ready, f"{n}-{j}").exists() for j in range(count)):
                time.sleep(0.001)
            try:
                connect().set_registered_model_tag("colours", *entry)
                said = "won"
                connect().set_registered_model_tag("colours", *entry)
            except mlflow.exceptions.MlflowException as e:
                said = f"{e.error_code} {e}"
            os.write(1, f"{n}/{i} {said}\\n".encode())
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_process_killed_before_any_write_leaves_the_move_undone_or_done(store: Store, tmp_path: Path) -> None:
    python(WORK + KILLER, store.home, tmp_path / "killed")
    homes = sorted((tmp_path / "killed").iterdir())
    found = []
    for home in homes:
        copy = Store(home)
        entries = copy.sql(f"SELECT count(*) FROM registered_model_tags WHERE key LIKE '{KEY}%'")[0][0]
        found.append((entries, aliases(copy)["colours"], aliases(copy)["colours.program"]))
    done = found.index((3, 1, 1))
    assert found == [(2, 2, 2)] * done + [(3, 1, 1)] * (len(found) - done)
    assert done >= 4  # entry, two aliases, and the commit itself


@pytest.mark.slow
def test_of_many_that_write_the_same_entry_at_once_one_wins(store: Store, tmp_path: Path) -> None:
    rounds, many = (20, 8) if SOAK else (2, 5)
    (tmp_path / "ready").mkdir()
    printed = python(WORK + RACE, store.home, tmp_path / "ready", str(rounds), str(many))
    said = [line.partition(" ") for line in printed.splitlines()]
    assert len(said) == many * rounds
    winners = [who for who, _, what in said if what == "won"]
    assert sorted(w.split("/")[0] for w in winners) == [str(n) for n in range(rounds)]
    for _, _, what in said:
        assert what == "won" or ("PERMISSION_DENIED" in what and "somebody else was faster" in what)
    assert [e.move.why for e in history_of("colours").entries[2:]] == sorted(winners)
    assert set(aliases(store).values()) == {2 if rounds % 2 == 0 else 1}


# ---- the store alone, as a server runs it


@contextmanager
def in_process(tmp_path: Path) -> Iterator[Store]:
    """Grace at a database that is not her own home's, through the guard."""
    store = prepared.promoted(tmp_path / "server")
    trusting(store.home)
    settings = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{store.database}", "AGENTKIT_TRUST": str(store.home / "trust.json"),
        "AGENTKIT_SIGNING_KEY": GRACE.pem,
    }  # fmt: skip
    with as_user(tmp_path / "home-of-Grace", "Grace", **settings):
        yield store


@pytest.mark.slow
def test_nothing_comes_between_a_check_and_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting the alias to what is in production is allowed; a withdrawal in that very moment has to wait."""
    from agentkit_pipelines import promotion
    from agentkit_tracking.guard.registry_store import GuardedStore

    with in_process(tmp_path) as prepared_store:
        store, checked = GuardedStore(f"sqlite:///{prepared_store.database}"), GuardedStore._mirrored
        withdrawing = threading.Thread(target=lambda: promotion.withdraw("colours", why="now"))

        def slowly(self: GuardedStore, name: str) -> int | None:
            found = checked(self, name)
            if self is store:
                withdrawing.start()
                withdrawing.join(1.0)
            return found

        monkeypatch.setattr(GuardedStore, "_mirrored", slowly)
        store.set_registered_model_alias("colours", "production", "2")
        withdrawing.join(60)
        monkeypatch.undo()
        assert [m.aliases for m in store.search_registered_models("name = 'colours'")] == [{}]


@pytest.mark.slow
def test_prompts_of_others_do_not_move_whatever_the_database_says(tmp_path: Path) -> None:
    """Tags that were written past the guard name somebody else's model, or are no list at all."""
    with in_process(tmp_path) as store:
        for number, text in ((1, OTHERS_PROMPTS.replace("greeting", "chat")), (3, "x")):
            store.sql("UPDATE model_version_tags SET value = ? WHERE key = ? AND version = ?", text, PROMPTS, number)
        store.sql("INSERT INTO registered_models (name, workspace) VALUES ('chat', 'default')")
        store.sql("INSERT INTO registered_model_aliases VALUES ('production', 1, 'chat', 'default')")
        from agentkit_pipelines import promotion

        promotion.withdraw("colours", why="now")
        assert store.sql("SELECT name, alias FROM registered_model_aliases") == [("chat", "production")]


@pytest.mark.slow
def test_an_entry_fits_into_its_column_whatever_the_reason(tmp_path: Path) -> None:
    """PostgreSQL would refuse it after the whole evaluation; SQLite would not mind."""
    from agentkit_pipelines import promotion

    with in_process(tmp_path) as store:
        promotion.rollback("colours", why="\U0001f600" * 500)
        promotion.withdraw("colours", why="\u0436" * 500)
        [longest] = store.sql(
            "SELECT max(length(value)) FROM registered_model_tags WHERE key LIKE 'agentkit.history.%'"
        )
        assert 4000 < longest[0] <= 5000


@pytest.mark.slow
def test_after_a_theft_somebody_else_registers_and_promotes_again(tmp_path: Path, project: Path) -> None:
    from agentkit_tracking import registry
    from agentkit_tracking.loading import load

    with in_process(tmp_path) as store:
        [stolen] = [k.id for k in keys.load_trust().keys if k.owner == "Ada"]
        keys.revoke(stolen, "stolen")
        for attempt in (lambda: load("colours@production"), lambda: store.promote("colours/2")):
            with pytest.raises(TrustError, match="stolen"):
                attempt()
        (project / "colours.py").write_text(prepared.source(2))
        assert registry.register_file("colours.py").number == 2
        store.promote("colours/2")
        assert load("colours@production").release == registry.resolve("colours/2").release_id
