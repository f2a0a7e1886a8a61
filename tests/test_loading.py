"""Loading: whatever was changed in the database or on disk is said, and nothing of a release has run by then."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from evidence import Store, agentkit, as_user
from tampering import (
    EVE,
    alias,
    append,
    artifacts,
    by_a_stranger,
    executed,
    fresh,
    history,
    loads,
    put,
    refused,
    registry_hash,
    store,  # noqa: F401
    tag,
    text_of,
    told,
)

from agentkit.errors import TrustError, UsageError
from agentkit_pipelines import promotion
from agentkit_tracking import keys, loading, registry
from agentkit_tracking.home import connect
from agentkit_tracking.keys import Trust

# ---- straight in the database


def reworded(text: str, **changes: Any) -> str:
    """An envelope with other contents and the signature it had."""
    outer = json.loads(text)
    body = json.loads(base64.b64decode(outer["payload"]))
    body["predicate"] |= changes
    body["subject"][0]["digest"]["sha256"] = body["predicate"]["release"]
    outer["payload"] = base64.b64encode(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).decode()
    return json.dumps(outer)


def promise_another(store: Store) -> None:
    """Entry 2, altered to promote version 3, and everything else to match."""
    changes = {"version": 3, "release": tag(store, "agentkit.release_id", 3)}
    changes["prompts"] = registry_hash(tag(store, "agentkit.prompts", 3))
    history(store, 2, reworded(told(store, 2), **changes))
    alias(store, "production", 3)


def rename(store: Store, new: str = "painted") -> None:
    for table in (
        "registered_models",
        "registered_model_tags",
        "registered_model_aliases",
        "model_versions",
        "model_version_tags",
    ):
        store.sql(f"UPDATE {table} SET name = ? WHERE name = 'colours'", new)


def make_anew(store: Store) -> None:
    """The model, deleted and made again with what was version 3 as its version 1, in production."""
    for table in ("registered_model_tags", "registered_model_aliases"):
        store.sql(f"DELETE FROM {table} WHERE name = 'colours'")
    for table in ("model_versions", "model_version_tags"):
        store.sql(f"DELETE FROM {table} WHERE name = 'colours' AND version < 3")
        store.sql(f"UPDATE {table} SET version = 1 WHERE name = 'colours'")
    put(store, "agentkit.system", "true", version=None)
    alias(store, "production", 1)


def both(*changes: Callable[[Store], None]) -> Callable[[Store], None]:
    return lambda store: [change(store) for change in changes] and None


@dataclass(frozen=True)
class Change:
    """What somebody does to the database, and what is said of it: here, and where nothing was ever seen."""

    make: Callable[[Store], Any]
    said: str
    said_fresh: str | None = None


SEEN2 = "entry 2 is missing, which this machine has seen"
CHANGES = {
    "alias to a version never promoted": Change(
        lambda s: alias(s, "production", 3), "the alias points to version 3, but the signed history says version 2 is in production"
    ),
    "alias to a version that does not exist": Change(lambda s: alias(s, "production", 9), "the alias points to version 9, but the signed history says version 2"),
    "alias deleted": Change(lambda s: alias(s, "production", None), "the alias is not set, but the signed history says version 2 is in production"),
    "alias Production": Change(lambda s: alias(s, "Production", 3), "the alias 'Production' was set without evidence"),
    "alias PRODUCTION": Change(lambda s: alias(s, "PRODUCTION", 2), "the alias 'PRODUCTION' was set without evidence"),
    "alias production_": Change(lambda s: alias(s, "production_", 3), "the alias 'production_' was set without evidence"),
    "stage of another": Change(
        lambda s: s.sql("UPDATE model_versions SET current_stage = 'Production' WHERE name = 'colours' AND version = 3"),
        "colours/3 was put into the stage 'Production', which proves nothing",
    ),
    "stage of the same": Change(
        lambda s: s.sql("UPDATE model_versions SET current_stage = 'production' WHERE name = 'colours' AND version = 2"),
        "colours/2 was put into the stage 'production'",
    ),
    "prompt reworded": Change(
        lambda s: put(s, "mlflow.prompt.text", "Say cold.", 2, "colours.program"), "the text of prompt colours.program version 2 was changed in MLflow"
    ),
    "prompt of another kind": Change(
        lambda s: put(s, "_mlflow_prompt_type", "chat", 2, "colours.program"), "the text of prompt colours.program version 2"
    ),
    "prompt with another model": Change(
        lambda s: put(s, "_mlflow_prompt_model_config", '{"model_name": "evil"}', 2, "colours.program"),
        "the text of prompt colours.program version 2 was given another model in MLflow",
    ),
    "prompt with a response format": Change(
        lambda s: put(s, "_mlflow_prompt_response_format", '{"type": "object"}', 2, "colours.program"),
        "the text of prompt colours.program version 2 was given a response format in MLflow",
    ),
    "prompt with a model that is none": Change(
        lambda s: put(s, "_mlflow_prompt_model_config", "x", 2, "colours.program"), "the text of prompt colours.program version 2"
    ),
    "prompt that is none": Change(
        lambda s: put(s, "mlflow.prompt.is_prompt", None, 2, "colours.program"), "the text of prompt colours.program version 2"
    ),
    "prompt version deleted": Change(
        lambda s: s.sql("DELETE FROM model_versions WHERE name = 'colours.program' AND version = 2"),
        "the text of prompt colours.program version 2",
    ),
    "prompt deleted": Change(
        lambda s: [s.sql(f"DELETE FROM {t} WHERE name = 'colours.program'") for t in ("model_versions", "registered_models")],
        "the text of prompt colours.program version 2",
    ),
    "verdict": Change(lambda s: put(s, "agentkit.last_verdict", "fail"), "colours/2 shows the verdict 'fail', signed was 'pass'"),
    "verdict deleted": Change(lambda s: put(s, "agentkit.last_verdict", None), "colours/2 shows the verdict None, signed was 'pass'"),
    "evaluation of another version": Change(
        lambda s: put(s, "agentkit.evaluation", tag(s, "agentkit.evaluation", 1)), "the verdict of colours/2: its evaluation was signed for another release"
    ),
    "evaluation reworded": Change(
        lambda s: put(s, "agentkit.evaluation", reworded(tag(s, "agentkit.evaluation"), description="0" * 64)),
        "the verdict of colours/2: the signature of key",
    ),
    "evaluation that is none": Change(lambda s: put(s, "agentkit.evaluation", "pass"), "the verdict of colours/2: a signed statement"),
    "evaluation deleted": Change(lambda s: put(s, "agentkit.evaluation", None), "colours/2 shows the verdict 'pass' without a signature"),
    "release id": Change(
        lambda s: put(s, "agentkit.release_id", tag(s, "agentkit.release_id", 3)), r"colours/2 says release [0-9a-f]{12}, signed was [0-9a-f]{12}"
    ),
    "release id deleted": Change(lambda s: put(s, "agentkit.release_id", None), r"colours/2 says release , signed was [0-9a-f]{12}"),
    "prompts of another version": Change(lambda s: put(s, "agentkit.prompts", tag(s, "agentkit.prompts", 3)), "colours/2 names other prompts than were signed"),
    "prompts that are none": Change(lambda s: put(s, "agentkit.prompts", "none"), "colours/2 names other prompts than were signed"),
    "prompts deleted": Change(lambda s: put(s, "agentkit.prompts", None), "colours/2 names other prompts than were signed"),
    "last entry reworded": Change(
        promise_another, "entry 2 is another than this machine has seen", r"the signature of key \w+ \(Ada\) does not fit: what was signed was altered"
    ),
    "first entry reworded": Change(lambda s: history(s, 1, reworded(told(s, 1), why="because")), "entry 2: it is not built on the entry before it"),
    "entry that is none": Change(lambda s: history(s, 2, "promoted"), r"entry 2: a signed statement \(Move\) cannot be read"),
    "last entry deleted": Change(lambda s: history(s, 2, None), SEEN2, "the alias points to version 2, but the signed history says version 1"),
    "first entry deleted": Change(lambda s: history(s, 1, None), "entry 1 of 1 is missing"),
    "history deleted": Change(
        lambda s: [history(s, n, None) for n in (1, 2)], "entry 1 is missing, which this machine has seen", "the alias points to version 2, but no signed history says so"
    ),
    "history numbered anew": Change(both(lambda s: history(s, 1, told(s, 2)), lambda s: history(s, 2, None)), "entry 1: it is entry 2 of colours"),
    "old entry again": Change(lambda s: history(s, 2, told(s, 1)), "entry 2: it is entry 1 of colours"),
    "old entry once more": Change(lambda s: history(s, 3, told(s, 1)), "entry 3: it is entry 1 of colours"),
    "entry by a stranger": Change(by_a_stranger, f"signed with key {EVE.public.id}, which is not trusted here"),
    "entry by a stranger in place of the last": Change(
        both(lambda s: history(s, 2, None), lambda s: by_a_stranger(s, take_evidence_of=1)),
        "entry 2 is another than this machine has seen",
        f"signed with key {EVE.public.id}, which is not trusted here",
    ),
    "rollback by a stranger": Change(lambda s: by_a_stranger(s, 1, "rolled_back", 1), f"signed with key {EVE.public.id}, which is not trusted here"),
    "renamed": Change(rename, "entry 1 is missing, which this machine has seen", "no system 'colours' is registered"),
    "renamed, and the name alone put back": Change(
        both(rename, lambda s: s.sql("UPDATE registered_models SET name = 'colours' WHERE name = 'painted'")), "entry 1 is missing", "has no version in production|no system"
    ),
    "version deleted": Change(
        lambda s: s.sql("DELETE FROM model_versions WHERE name = 'colours' AND version = 2"), "version 2 of colours is in production, but was deleted"
    ),
    "version deleted by MLflow": Change(
        lambda s: s.sql("UPDATE model_versions SET current_stage = 'Deleted_Internal' WHERE name = 'colours' AND version = 2"),
        "version 2 of colours is in production, but was deleted",
    ),
    "model made anew": Change(make_anew, "entry 1 is missing, which this machine has seen", "the alias points to version 1, but no signed history says so"),
    "run of the evidence deleted": Change(
        lambda s: s.sql("UPDATE runs SET lifecycle_stage = 'deleted'"), r"the run \w+ that holds its evidence was deleted; restore it"
    ),
    "run of the evidence gone": Change(lambda s: s.sql("DELETE FROM runs"), r"the run \w+ that holds its evidence does not exist any more"),
    "experiment deleted": Change(
        lambda s: s.sql("UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'colours'"), r"the run \w+ that holds its evidence was deleted; restore it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_in_the_database_is_said_before_anything_runs(store: Store, what: str) -> None:
    change = CHANGES[what]
    change.make(store)
    assert re.search(change.said, refused())
    verified = agentkit("verify", "colours@production")
    assert (verified.code, bool(re.search(change.said, text_of(verified.out)))) == (3, True), verified
    assert "not as signed" in verified.out
    fresh(store)
    message = change.said_fresh or change.said
    assert re.search(message, refused())
    if change.said_fresh:
        verified = agentkit("verify", "colours@production")
        assert re.search(message, text_of(verified.out + verified.err))
        assert verified.code == (3 if verified.out else 2)  # 2: nothing here says that there ever was such a system
    assert not executed()


def test_what_was_left_alone_is_loaded_and_executed(store: Store) -> None:
    assert loads() == registry.resolve("colours/2").release_id
    fresh(store)
    assert loads() == registry.resolve("colours/2").release_id
    said = agentkit("verify", "colours@production")
    assert (said.code, "signed and whole" in said.out) == (0, True)


def test_an_alias_put_back_to_the_version_before_changes_nothing_but_is_warned_of(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a move that was cut off between entry and alias."""
    alias(store, "production", 1)
    assert loads() == registry.resolve("colours/2").release_id
    assert "the alias points to version 1, the signed history says version 2, which holds" in caplog.text
    said = agentkit("verify", "colours@production")
    assert (said.code, "signed and whole; but the alias points to version 1" in said.out) == (0, True)
    assert loading.resolve("colours@production").number == 2
    assert agentkit("doctor", "--repair").code in (0, 1)
    assert registry.look_up("colours").aliases == {"production": 2}


def test_a_prompts_alias_is_for_others_to_see_and_is_told_apart(store: Store) -> None:
    alias(store, "production", 3, model="colours.program")
    assert loads() == registry.resolve("colours/2").release_id
    said = agentkit("verify", "colours@production")
    assert (said.code, "colours.program@production is version 3, should be 2" in text_of(said.out)) == (0, True)
    assert "1 prompt aliases differ from production" in agentkit("doctor").out
    agentkit("doctor", "--repair")
    assert connect().get_prompt_version_by_alias("colours.program", "production").version == 2


def test_a_look_alike_of_production_is_production(store: Store) -> None:
    """`colours@Production` is nobody's way round the signature."""
    alias(store, "Production", 3)
    assert "the alias 'Production' was set without evidence" in refused("colours@Production")
    assert "the alias 'Production' was set without evidence" in refused("colours@PRODUCTION")
    with pytest.raises(TrustError):
        loading.resolve("colours@Production")
    alias(store, "Production", None)
    assert loads("colours@Production") == registry.resolve("colours/2").release_id


def test_a_process_that_follows_stops_at_what_was_not_signed(store: Store) -> None:
    following = loading.follow("colours@production", reload_s=0)
    assert executed()
    assert following.run(text="lava").release == registry.resolve("colours/2").release_id
    alias(store, "production", 3)
    with pytest.raises(TrustError, match="the alias points to version 3"):
        following.run(text="lava")
    alias(store, "production", 2)
    assert following.run(text="lava").release == registry.resolve("colours/2").release_id
    assert not executed()


def test_the_command_line_refuses_with_one_line(store: Store) -> None:
    alias(store, "production", 3)
    for command in (("run", "colours@production", "lava"), ("run", "colours", "lava"), ("show", "colours@production")):
        said = agentkit(*command)
        assert (said.code, said.out, said.err.count("\n")) == (1, "", 1)
        assert "agentkit: colours@production is refused: the alias points to version 3" in said.err
    assert not executed()


@pytest.mark.parametrize("lost", [(2,), (1, 2)])
def test_lost_entries_at_the_end_are_restored_from_what_this_machine_has_seen(
    store: Store, lost: tuple[int, ...]
) -> None:
    for n in lost:
        history(store, n, None)
    assert "which this machine has seen" in refused()
    said = agentkit("doctor")
    assert (said.code, "colours@production: the history of colours was put back" in text_of(said.out)) == (1, True)
    assert f"colours: {len(lost)} lost entries of the history restored" in text_of(agentkit("doctor", "--repair").out)
    assert loads() == registry.resolve("colours/2").release_id


@pytest.mark.parametrize(
    "change", [lambda s: history(s, 1, None), lambda s: history(s, 2, told(s, 1))], ids=["taken out", "altered"]
)
def test_entries_that_cannot_be_written_again_are_said(store: Store, change: Any) -> None:
    change(store)
    said = text_of(agentkit("doctor", "--repair").out)
    assert "was altered, or taken out where later ones stand; put the store back from a backup" in said
    refused()


def test_what_a_fresh_machine_cannot_know(store: Store) -> None:
    """Who can write to the database can put back an older state that was signed; only who saw the newer notices."""
    history(store, 2, None)
    alias(store, "production", 1)
    assert SEEN2 in refused()
    fresh(store)
    assert loads() == registry.resolve("colours/1").release_id


# ---- on disk


def take_the_files_of_3(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(artifacts(3), folder)


def link_it(folder: Path) -> None:
    source = folder / "source" / "colours.py"
    source.rename(folder.parent / "elsewhere.py")
    source.symlink_to(folder.parent / "elsewhere.py")


def add_bytecode(folder: Path) -> None:
    (folder / "source" / "__pycache__").mkdir()
    (folder / "source" / "__pycache__" / "colours.cpython-311.pyc").write_bytes(b"")


def rehash(folder: Path) -> None:
    """Change the source and let the manifest say so."""
    source, manifest = folder / "source" / "colours.py", folder / "manifest.json"
    source.write_text(source.read_text() + "# altered\n")
    said = json.loads(manifest.read_text())
    said["files"]["colours.py"] = registry_hash(source.read_text())
    manifest.write_text(json.dumps(said))


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "source altered": (lambda f: append(f / "source" / "colours.py", "#"), r"is not intact: altered: source/colours\.py"),
    "source missing": (lambda f: (f / "source" / "colours.py").unlink(), r"is not intact: missing: source/colours\.py"),
    "a file more": (lambda f: (f / "source" / "dspy.py").write_text("1/0"), r"is not intact: not in the manifest: source/dspy\.py"),
    "bytecode": (add_bytecode, "is not intact: not in the manifest: source/__pycache__"),
    "a link": (link_it, "altered: source/colours.py|cannot be fetched"),
    "manifest altered": (rehash, r"the manifest in .* has hash \w+, expected \w+: it was altered"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), r"is no release: manifest\.json cannot be read"),
    "another release": (take_the_files_of_3, r"the manifest in .* has hash \w+, expected \w+: it was altered"),
    "nothing": (shutil.rmtree, r"the store's copy of colours/2 is no release|cannot be fetched"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_change_of_the_stored_files_is_said_before_anything_runs(store: Store, what: str) -> None:
    change, message = FILES[what]
    change(artifacts(2))
    assert loads() == registry.resolve("colours/2").release_id  # fetched before it was changed
    said = agentkit("verify", "colours@production")
    assert said.code == 3, said.err
    executed()
    fresh(store)
    text = refused()
    said = agentkit("verify", "colours@production")
    if what == "a link":  # may be followed when it is copied: the same bytes
        return
    assert re.search(message, text)
    assert (said.code, bool(re.search(message, text_of(said.out)))) == (3, True)


def test_a_version_that_points_to_the_files_of_another_is_refused(store: Store) -> None:
    [(source,)] = store.sql("SELECT source FROM model_versions WHERE name = 'colours' AND version = 3")
    [(place,)] = store.sql("SELECT storage_location FROM model_versions WHERE name = 'colours' AND version = 3")
    store.sql(
        "UPDATE model_versions SET source = ?, storage_location = ? WHERE name = 'colours' AND version = 2",
        source,
        place,
    )
    assert agentkit("verify", "colours@production").code == 3
    fresh(store)
    assert "it was altered" in refused()


def test_a_damaged_local_copy_is_put_aside_and_fetched_anew(store: Store) -> None:
    version = registry.resolve("colours/2")
    source = store.home / "releases" / version.release_id / "source" / "colours.py"
    source.write_text("raise SystemExit('taken over')")
    assert loads() == version.release_id
    assert "taken over" not in source.read_text()


# ---- other references


def test_the_projects_own_store_needs_no_signature_but_for_production(store: Store) -> None:
    put(store, "agentkit.registration", None, 3)
    assert loads("colours/3") == registry.resolve("colours/3").release_id
    alias(store, "candidate", 3)
    assert loads("colours@candidate") == registry.resolve("colours/3").release_id
    shutil.rmtree(store.home / "releases", ignore_errors=True)
    append(artifacts(3) / "source" / "colours.py", "#")
    assert "is not intact" in refused("colours/3")
    assert "is not intact" in refused("colours/3", trust=True)  # trust is no leave to alter


@pytest.fixture
def another(store: Store, tmp_path: Path) -> Iterator[Store]:
    """Somebody else's machine, on which that store is a foreign one."""
    marker = os.environ["MARKER"]
    with as_user(tmp_path / "another", "Bob", MLFLOW_TRACKING_URI=f"sqlite:///{store.database}", MARKER=marker):
        yield store


def trust_ada(store: Store) -> keys.TrustedKey:
    [ada] = Trust.model_validate_json((store.home / "trust.json").read_bytes()).keys
    return keys.trust_key(ada.pem.encode(), "Ada of sales")


def test_anothers_release_is_run_on_trust_or_if_somebody_trusted_registered_it(another: Store) -> None:
    text = refused("colours/3")
    assert re.search(
        r"colours/3 is not in production, and nobody trusted here vouches for it: its registration was signed with key \w+, which is not trusted here",
        text,
    )
    assert loads("colours/3", trust=True)
    trust_ada(another)
    assert loads("colours/3")
    put(another, "agentkit.registration", tag(another, "agentkit.registration", 2), 3)
    assert "its registration was signed for another release" in refused("colours/3")
    put(another, "agentkit.registration", "Ada", 3)
    assert "its registration was a signed statement (Registration) cannot be read" in refused("colours/3")
    put(another, "agentkit.registration", None, 3)
    assert "its registration is not signed" in refused("colours/3")
    for command in (("run", "colours/3", "lava"), ("evaluate", "colours/3", "--golden", str(another.golden))):
        said = agentkit(*command)
        assert (said.code, "pass trust=True (--trust)" in said.err) == (1, True)
    assert not executed()
    assert agentkit("run", "colours/3", "lava", "--trust").code == 0
    assert executed()


def test_a_revoked_registration_vouches_for_nothing(another: Store) -> None:
    keys.revoke(trust_ada(another).id, "left")
    assert re.search(
        r"its registration was signed with key \w+ \(Ada of sales\), revoked .*: left", refused("colours/3")
    )


def test_anothers_production_needs_the_signers_key_and_nothing_else(another: Store) -> None:
    assert "which is not trusted here" in refused(trust=True)
    trust_ada(another)
    assert loads() == registry.resolve("colours/2").release_id
    with pytest.raises(UsageError, match="you need a key"):
        promotion.rollback("colours", why="no key of mine")


def test_a_release_folder_is_run_where_agentkit_fetched_it_and_nowhere_else(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's proof unpacked in one's own project is still a stranger's."""
    folder = loading.fetch("colours/3")[0]
    assert loads(folder)
    project = tmp_path / "project"
    shutil.copytree(folder, project / "x")
    (project / "pyproject.toml").touch()
    monkeypatch.chdir(project)
    for reference in (project / "x", str(project / "x")):
        assert "nobody vouches for the release in" in refused(reference)
    (folder.parent / "link").symlink_to(project / "x")
    assert "nobody vouches for the release in" in refused(folder.parent / "link")
    assert loads(project / "x", trust=True)
    append(project / "x" / "source" / "colours.py", "#")
    assert "is not intact" in refused(project / "x", trust=True)


def test_a_release_id_that_is_a_path_leads_nowhere(store: Store, tmp_path: Path) -> None:
    """A version's tag is anybody's word; nothing is looked for, or moved, where it points."""
    (tmp_path / "mine").mkdir()
    for text in ("../seen", str(tmp_path / "mine"), "", ".", "f" * 63 + "/"):
        put(store, "agentkit.release_id", text, version=3)
        assert "carries no release id" in refused("colours/3")
    assert (store.home / "seen").is_dir()
    assert (tmp_path / "mine").is_dir()
    assert [p.name for p in store.home.rglob("damaged-*")] == []
