"""Attacks on `production`, on real servers: every route and spelling, admins too; each is refused, nothing changes."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import evidence as prepared
import httpx
import pytest
from attacks import (
    ATTACKS,
    GRACE,
    MALLORY,
    PROMPT,
    Attack,
    Site,
    add_neighbours,
    described,
    entry,
    guarded_by,
    past_entry,
    served,
    trusting,
    with_served_artifacts,
)
from evidence import Store, agentkit, as_user, without_kernel
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from red_team import one_of_many_wins, promote_at_once, refused
from releases import furnish

from agentkit.errors import ReleaseError
from agentkit_tracking.history import KEY
from agentkit_tracking.rules import EVALUATION, PROMPTS, REGISTRATION, VERDICT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*registry stages:FutureWarning")]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A guarded server with MLflow's default number of workers, versions 1 and 2 of `colours` promoted in turn."""
    home = tmp_path_factory.mktemp("guarded") / "server"
    with_served_artifacts(prepared.promoted(home))
    trusting(home)
    with served(home, *guarded_by(f"sqlite:///{home / 'mlflow.db'}")) as site:
        add_neighbours(site)
        assert site.load() == site.release(2)
        yield site


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_is_refused_by_every_route(guarded: Site, attack: Attack) -> None:
    refused(guarded, attack)


def test_after_all_that_production_is_what_it_was(guarded: Site) -> None:
    assert guarded.consistent() == 2
    assert guarded.load() == guarded.release(2)


# ---- by the SDK


Try = Callable[[MlflowClient, Site], Any]


def genai(name: str, *arguments: Any) -> Try:
    def attempt(client: MlflowClient, site: Site) -> Any:
        from mlflow.genai import prompts

        return getattr(prompts, name)(*arguments)

    return attempt


BY_SDK: dict[str, Try] = {
    "alias": lambda c, s: c.set_registered_model_alias("colours", "production", "3"),
    "alias in capitals": lambda c, s: c.set_registered_model_alias("colours", "PRODUCTION", "3"),
    "delete alias": lambda c, s: c.delete_registered_model_alias("colours", "production"),
    "stage": lambda c, s: c.transition_model_version_stage("colours", "3", "Production", True),
    "history": lambda c, s: c.set_registered_model_tag("colours", f"{KEY}000003", entry(s)),
    "delete history": lambda c, s: c.delete_registered_model_tag("colours", f"{KEY}000002"),
    "verdict": lambda c, s: c.set_model_version_tag("colours", "3", VERDICT, "pass"),
    "verdict by stage": lambda c, s: c.set_model_version_tag("colours", key=VERDICT, value="fail", stage="None"),
    "evaluation": lambda c, s: c.set_model_version_tag("colours", "3", EVALUATION, s.version_tags(2)[EVALUATION]),
    "delete evaluation": lambda c, s: c.delete_model_version_tag("colours", "2", EVALUATION),
    "rename": lambda c, s: c.rename_registered_model("colours", "mine"),
    "delete model": lambda c, s: c.delete_registered_model("colours"),
    "delete version": lambda c, s: c.delete_model_version("colours", "2"),
    "description": lambda c, s: c.update_registered_model("colours", "nothing to see"),
    "version's description": lambda c, s: c.update_model_version("colours", "2", "### Gate: fail"),
    "copy to another": lambda c, s: c.copy_model_version("models:/colours/2", "chat"),
    "copy of a registration": lambda c, s: c.copy_model_version("models:/colours/3", "chat"),
    "copy within": lambda c, s: c.copy_model_version("models:/colours/2", "colours"),
    "prompt alias": lambda c, s: c.set_prompt_alias(PROMPT, "production", 3),
    "delete prompt alias": lambda c, s: c.delete_prompt_alias(PROMPT, "production"),
    "prompt text": lambda c, s: c.set_prompt_version_tag(PROMPT, "2", "mlflow.prompt.text", "Say warm."),
    "delete prompt text": lambda c, s: c.delete_prompt_version_tag(PROMPT, "2", "mlflow.prompt.text"),
    "prompt mark": lambda c, s: c.set_prompt_tag(PROMPT, "mlflow.prompt.is_prompt", "false"),
    "delete prompt mark": lambda c, s: c.delete_prompt_tag(PROMPT, "mlflow.prompt.is_prompt"),
    "delete prompt": lambda c, s: c.delete_prompt(PROMPT),
    "delete prompt version": lambda c, s: c.delete_prompt_version(PROMPT, "2"),
    "genai alias": genai("set_prompt_alias", PROMPT, "Production", 3),
    "genai delete alias": genai("delete_prompt_alias", PROMPT, "production"),
    "genai text": genai("set_prompt_version_tag", PROMPT, 2, "mlflow.prompt.text", "Say warm."),
    "genai delete text": genai("delete_prompt_version_tag", PROMPT, 2, "mlflow.prompt.text"),
    "genai tag": genai("set_prompt_tag", PROMPT, "agentkit.system", "true"),
    "genai delete tag": genai("delete_prompt_tag", PROMPT, "mlflow.prompt.is_prompt"),
    "genai model": genai("set_prompt_model_config", PROMPT, 2, {"model_name": "evil"}),
    "genai delete model": genai("delete_prompt_model_config", PROMPT, 2),
    "run": lambda c, s: c.delete_run(s.run),
    "experiment": lambda c, s: c.delete_experiment(s.experiment),
    "logged model": lambda c, s: c.delete_logged_model(s.model_id),
    "manifest": lambda c, s: c.log_model_artifact(s.model_id, str(forged(s, "manifest.json"))),
    "weights": lambda c, s: c.log_model_artifact(s.model_id, str(forged(s, "weights.safetensors"))),
    "results": lambda c, s: c.log_artifact(s.run, str(forged(s, "results.parquet")), "evidence"),
}  # fmt: skip


def forged(site: Site, name: str) -> Path:
    path = site.home.parent / name
    path.write_text("{}")
    return path


@pytest.mark.parametrize("attempt", BY_SDK.values(), ids=BY_SDK)
def test_the_sdk_says_how_to_promote_instead(guarded: Site, attempt: Try) -> None:
    before = guarded.state()
    with guarded.used_by(MALLORY) as client, pytest.raises(Exception, match="agentkit promote"):
        attempt(client, guarded)
    assert guarded.state() == before


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "source/colours.py"])
def test_uploads_over_a_release_are_refused(guarded: Site, name: str) -> None:
    before, folder = guarded.state(), f"colours/models/{guarded.model_id}/artifacts"
    for prefix in ("/api", "/ajax-api"):
        for method in ("PUT", "DELETE"):
            answer = guarded.ask(method, f"{prefix}/2.0/mlflow-artifacts/artifacts/{folder}/{name}", content=b"{}")
            assert answer.status_code == 403
            assert "agentkit promote" in answer.json()["message"]
    upload = f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={guarded.run}&path=evidence/{name}"
    assert guarded.ask("POST", upload, content=b"{}").status_code == 403
    assert guarded.state() == before


# ---- by requests that look like something else


def raw(site: Site, method: str, path: str, body: bytes, **headers: str) -> int:
    """The status of a request that goes out as it is written here."""
    connection = http.client.HTTPConnection(site.url.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        return connection.getresponse().status
    finally:
        connection.close()


def test_no_disguise_of_a_request_helps(guarded: Site) -> None:
    before, alias = guarded.state(), "/api/2.0/mlflow/registered-models/alias"
    plain = json.dumps({"name": "colours", "alias": "production", "version": "3"})
    wrongly = plain.replace('"alias"', '"alias": "candidate", "alias"')
    bodies = [
        plain.encode("utf-8-sig"), plain.encode("utf-16"), plain.encode("utf-32-be"), wrongly.encode(),
        plain.replace("production", "\\u0070roduction").encode(), plain.replace('"3"', '"3", "unknown": 1').encode(),
        json.dumps(json.dumps(plain)).encode(), plain.replace("alias", "ALIAS").encode(), b"[" + plain.encode() + b"]",
        plain.replace("colours", "colours\\u0000").encode(), plain.replace('"3"', "3").encode(),
    ]  # fmt: skip
    for body in bodies:
        assert raw(guarded, "POST", alias, body) >= 400, body
        assert guarded.state() == before
    paths = [
        f"{alias}?alias=candidate&version=3", f"{alias}/", f"{alias}%3Fx", alias.replace("alias", "%61lias"),
        alias.replace("/alias", "/./alias"), alias.replace("/alias", "//alias"), f"{alias};x", f"{alias}#x",
        alias.replace("/api", "/x/../api"), alias.replace("/2.0", "/2.1"), alias.upper(), f"/{alias}",
    ]  # fmt: skip
    for path in paths:
        assert raw(guarded, "POST", path, plain.encode()) >= 300, path
        assert guarded.state() == before
    for method in ("GET", "HEAD", "PUT", "PATCH", "OPTIONS", "post"):
        raw(guarded, method, alias, plain.encode(), **{"X-HTTP-Method-Override": "POST"})
        assert guarded.state() == before
    for name in ("colours/../chat", "models:/colours", "colours%00", "colours.", ".colours", "COLOURS", " colours"):
        body = {"name": name, "alias": "production", "version": "3"}
        assert guarded.ask("POST", alias, json=body).status_code in (400, 403, 404)
        assert guarded.state() == before


def test_graphql_has_nothing_that_could_move_production(guarded: Site) -> None:
    before = guarded.state()
    schema = guarded.ask("POST", "/graphql", json={"query": "{__schema {mutationType {fields {name}}}}"}).json()
    names = {f["name"] for f in schema["data"]["__schema"]["mutationType"]["fields"]}
    assert names == {"mlflowSearchDatasets", "mlflowSearchRuns", "testMutation"}  # two searches and an echo
    for name in ("mlflowSetRegisteredModelAlias", "setRegisteredModelAlias", "testMutation"):
        query = f'mutation {{{name}(input: {{name: "colours", alias: "production", version: "3"}}) {{output}}}}'
        assert "errors" in guarded.ask("POST", "/graphql", json={"query": query}).json()
    assert guarded.state() == before


# ---- what is stored, but does not count


def test_a_version_with_a_stolen_release_id_is_not_loaded(guarded: Site, tmp_path: Path) -> None:
    """Anybody may make a version; by what it says of itself it gets nowhere."""
    marker, evil = tmp_path / "executed", tmp_path / "evil"
    with guarded.used_by(MALLORY) as client:
        got = Path(client.download_artifacts(guarded.run, "evidence", str(tmp_path)))  # reading is free
        assert (got / "evidence.json").is_file()
        evil.mkdir()
        (evil / "manifest.json").write_text("{}")
        (evil / "colours.py").write_text(f"open({str(marker)!r}, 'w').close()")
        model = client.create_logged_model(guarded.experiment, name="colours", model_type="agentkit-release")
        client.log_model_artifacts(model.model_id, str(evil))
        client.finalize_logged_model(model.model_id, "READY")
        stolen = guarded.version_tags(2)
        told = {k: stolen[k] for k in ("agentkit.release_id", PROMPTS, "agentkit.author")}
        for vouched in ({}, {REGISTRATION: stolen[REGISTRATION]}):
            made = client.create_model_version(
                "colours", f"models:/{model.model_id}", tags={**told, **vouched}, model_id=model.model_id
            )
            with pytest.raises(MlflowException, match="agentkit promote"):
                client.set_registered_model_alias("colours", "production", made.version)
            with as_user(
                tmp_path / f"fresh{made.version}",
                "Eve",
                MLFLOW_TRACKING_URI=guarded.url,
                AGENTKIT_TRUST=str(guarded.home / "trust.json"),
            ):
                from agentkit_tracking.loading import load

                with pytest.raises(ReleaseError, match="manifest" if vouched else "nobody trusted here vouches"):
                    load(f"colours/{made.version}")
                assert load("colours@production").release == guarded.release(2)
            client.delete_model_version("colours", made.version)
    assert not marker.exists()


def test_a_candidate_that_nobody_vouches_for_is_not_evaluated(guarded: Site, project: Path) -> None:
    with guarded.used_by(MALLORY) as client:
        made = client.create_model_version(
            "colours", "models:/colours/3", tags={"agentkit.release_id": guarded.release(3)}
        )
        client.set_registered_model_alias("colours", "candidate", made.version)
    with guarded.used_by():
        said = agentkit("promote", "--candidates", "--golden", str(guarded.home / "given" / "golden.jsonl"),
                        "--thresholds", str(guarded.home / "given" / "colours.yaml"))  # fmt: skip
    assert said.code != 0
    assert "nobody trusted here vouches" in said.err
    with guarded.used_by(MALLORY) as client:
        client.delete_model_version("colours", made.version)


def test_an_entry_signed_for_another_server_does_not_count_here(guarded: Site, tmp_path: Path) -> None:
    """Everything that it rests on can be copied, but for the run that holds the evidence."""
    from mlflow.entities.model_registry import ModelVersionTag, RegisteredModelTag

    from agentkit_tracking.guard.registry_store import GuardedStore

    home = furnish(tmp_path / "elsewhere")
    (home / "trust.json").write_bytes((guarded.home / "trust.json").read_bytes())
    with as_user(home, "Mallory"):
        store = GuardedStore(f"sqlite:///{home / 'mlflow.db'}")
        store.create_registered_model("colours", [RegisteredModelTag("agentkit.system", "true")])
        known = guarded.version_tags(1) | {EVALUATION: guarded.known["old evaluation"]}
        first = [ModelVersionTag(k, v) for k, v in known.items() if k not in (EVALUATION, VERDICT)]
        store.create_model_version("colours", "dummy-source", tags=first)
        store.set_model_version_tag("colours", "1", ModelVersionTag(EVALUATION, known[EVALUATION]))
        with pytest.raises(MlflowException, match="not on this server"):
            store.set_registered_model_tag("colours", RegisteredModelTag(f"{KEY}000001", past_entry(guarded, 1)))
        assert store.get_registered_model("colours").aliases == {}


# ---- what must still work


def test_others_work_as_on_any_server(guarded: Site) -> None:
    before = guarded.state()
    with guarded.used_by(MALLORY) as client:
        client.create_registered_model("theirs", tags={"team": "b"}, description="### History\n\nof ours")
        for _ in range(3):
            client.create_model_version("theirs", "models:/colours/3", description="### Gate: left")
        client.set_registered_model_alias("theirs", "champion", "1")
        client.set_registered_model_alias("theirs", "champion", "2")
        client.delete_registered_model_alias("theirs", "champion")
        client.set_registered_model_tag("theirs", "mlflow.note", "x")
        client.delete_registered_model_tag("theirs", "team")
        client.set_model_version_tag("theirs", "1", "stage", "production")
        client.delete_model_version_tag("theirs", "1", "stage")
        client.update_model_version("theirs", "1", "another text")
        client.transition_model_version_stage("theirs", "1", "Staging")
        client.transition_model_version_stage("theirs", "2", "Staging", archive_existing_versions=True)
        assert client.get_model_version("theirs", "1").current_stage == "Archived"
        client.update_registered_model("theirs", "")
        client.delete_model_version("theirs", "3")
        client.rename_registered_model("theirs", "ours")
        client.delete_registered_model("ours")
        client.register_prompt("hello", "Say {{what}}.", tags={"a": "b"}, model_config={"temperature": 0})
        client.register_prompt("hello", "Say it.")
        client.set_prompt_alias("hello", "beta", 2)
        client.set_prompt_version_tag("hello", "1", "mlflow.prompt.text", "Rewritten.")
        client.set_prompt_tag("hello", "team", "b")
        client.delete_prompt_tag("hello", "team")
        client.delete_prompt_version_tag("hello", "1", "a")
        assert client.load_prompt("prompts:/hello@beta").template == "Say it."
        client.delete_prompt_alias("hello", "beta")
        client.delete_prompt_version("hello", "1")
        client.delete_prompt_version("hello", "2")
        client.delete_prompt("hello")
    assert guarded.state() == before


def test_of_a_system_everything_else_may_be_changed_and_read(guarded: Site) -> None:
    text = described(guarded)
    with guarded.used_by(MALLORY) as client:
        client.set_registered_model_alias("colours", "candidate", "3")
        client.set_registered_model_alias("colours", "champion", "1")
        client.set_registered_model_alias("colours", "\u0440roduction", "3")  # a Cyrillic r; it moves nothing
        client.set_prompt_alias(PROMPT, "beta", 3)
        client.set_registered_model_tag("colours", "note", "looks good")
        client.set_model_version_tag("colours", "2", "note", "looks good")
        client.set_prompt_version_tag(PROMPT, "2", "note", "looks good")
        client.update_registered_model("colours", "Sorts words.\n\n" + text[text.index("### History") :])
        client.update_registered_model("colours", text)
        client.update_model_version("colours", "3", "my note")
        client.transition_model_version_stage("colours", "3", "Staging")
        client.transition_model_version_stage("colours", "3", "None")
        client.register_prompt(PROMPT, "Say lukewarm.")
        client.delete_prompt_version(PROMPT, "4")
        assert [m.name for m in client.search_registered_models("name LIKE 'col%'")] == ["colours"]
        assert {p.name for p in client.search_prompts()} == {PROMPT, "greeting"}
        found = client.search_model_versions(f"name = 'colours' and tags.`{VERDICT}` = 'pass'")
        assert [str(v.version) for v in found] == ["2"]
        assert client.get_model_version_by_alias("colours", "production").version == "2"
        assert client.load_prompt(f"prompts:/{PROMPT}@production").version == 2
        client.delete_registered_model_alias("colours", "candidate")
        client.delete_registered_model_alias("colours", "champion")
        assert guarded.load() == guarded.release(2)
        client.delete_registered_model_alias("colours", "\u0440roduction")
        client.delete_prompt_alias(PROMPT, "beta")
    assert guarded.load() == guarded.release(2)


def test_a_release_goes_its_whole_way(guarded: Site, project: Path) -> None:
    """Register, evaluate, promote in a real kernel, roll back, withdraw: by commands, with a key in the environment."""
    given = guarded.home / "given"
    judged = ("--golden", str(given / "golden.jsonl"), "--thresholds", str(given / "colours.yaml"), "--repeats", "1")
    newest = guarded.newest()
    with guarded.used_by():
        (project / "colours.py").write_text(prepared.source(4))
        assert agentkit("register", "colours.py", "--candidate").code == 0
        with without_kernel():
            assert agentkit("evaluate", "colours/3", *judged).code == 0
        assert guarded.consistent() == 2
        said = agentkit("promote", "--candidates", *judged)
        assert said.code == 0, said.err
        assert guarded.consistent() == newest
        assert guarded.load() == guarded.release(newest)
        head = guarded.history.head
        assert head is not None
        assert (head.who, head.move.event, head.move.evidence is not None) == ("Grace", "promoted", True)
        assert agentkit("verify", "colours@production").code == 0
        assert agentkit("rollback", "colours", "--why", "slow").code == 0
        assert guarded.consistent() == 2
        assert agentkit("withdraw", "colours", "--why", "wrong").code == 0
        assert guarded.consistent() is None
        with pytest.raises(ReleaseError, match="no version in production"):
            guarded.load()
        assert agentkit("rollback", "colours").code == 0
        assert guarded.consistent() == 1  # the one before the one that was withdrawn
        assert "slow" in described(guarded)
        assert "enforced by the store and at load" in " ".join(agentkit("doctor").out.split())


def test_what_was_never_in_production_may_be_deleted(guarded: Site) -> None:
    with guarded.used_by(MALLORY) as client:
        made = client.create_model_version("colours", "models:/colours/3")
        client.delete_model_version("colours", made.version)
        with pytest.raises(MlflowException, match="agentkit promote"):
            client.delete_model_version("colours", "1")  # was, once


# ---- two at once


def test_of_two_promotions_at_once_one_wins(guarded: Site, tmp_path: Path) -> None:
    promote_at_once(guarded, 3, guarded.newest(), tmp_path)


def test_of_many_entries_at_once_one_is_written(guarded: Site) -> None:
    one_of_many_wins(guarded, 4)


def test_no_stale_check_lets_an_alias_back(guarded: Site) -> None:
    """Setting the alias to what is in production is allowed; while production moves, nobody gets in between."""
    done, alias = threading.Event(), "/api/2.0/mlflow/registered-models/alias"

    def insist(version: int) -> None:
        with httpx.Client(base_url=guarded.url, timeout=60) as client:
            while not done.is_set():
                client.post(alias, json={"name": "colours", "alias": "production", "version": str(version)})
                client.request("DELETE", alias, json={"name": "colours", "alias": "production"})

    with ThreadPoolExecutor(4) as pool:
        for version in (2, 2, guarded.history.production or 3, 3):
            pool.submit(insist, version)
        try:
            for _ in range(3):
                one_of_many_wins(guarded, 1)
        finally:
            done.set()
    guarded.consistent()


# ---- a server that is killed


def kill(site: Site) -> None:
    assert site.process is not None
    os.killpg(site.process.pid, signal.SIGKILL)
    site.process.wait()


def test_a_server_killed_while_it_writes_leaves_one_clean_outcome(guarded: Site, tmp_path: Path) -> None:
    """Killed between write and commit, which a reader holds up; then once more, just after the commit."""
    from agentkit_pipelines import promotion
    from agentkit_tracking.mirrors import mirror

    if guarded.history.production is None:
        one_of_many_wins(guarded, 1)
    candidate = 3 if guarded.history.production != 3 else guarded.newest()
    outcome: list[BaseException] = []
    with guarded.used_by():
        before, entries = guarded.consistent(), len(guarded.history.entries)
        done = Store(guarded.home).evaluate(f"colours/{candidate}")

        def promote() -> None:
            try:
                promotion.commit(done, GRACE.key)
            except BaseException as e:
                outcome.append(e)

        with closing(sqlite3.connect(guarded.home / "mlflow.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM registered_models").fetchall()
            promoting = threading.Thread(target=promote)
            promoting.start()
            wait_for(lambda: outcome or is_committing(guarded), 30)
            assert outcome == []
            kill(guarded)
            promoting.join(120)
        assert [type(e) for e in outcome] == [MlflowException]  # the connection broke
        with served(guarded.home, *guarded_by(guarded.database), workers=1) as again:
            assert again.consistent() == before
            assert len(again.history.entries) == entries
            with again.used_by():
                assert again.load() == again.release(before or 0)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(promotion, "mirror_or_say", lambda *_: kill(again))
                    with pytest.raises(Exception, match="Connection refused"):  # by what is done after the move
                        promotion.commit(done, GRACE.key)
        assert guarded.consistent() == candidate  # model and prompts moved with the entry
        assert len(guarded.history.entries) == entries + 1
    with as_user(guarded.home, "Ada"):  # on the same store; only the description, which proves nothing, lags behind
        assert mirror(guarded.history) == 1
        assert mirror(guarded.history) == 0


def is_committing(site: Site) -> bool:
    """Whether somebody has written and waits for readers to leave: no new reader of another process gets in."""
    if not (site.home / "mlflow.db-journal").exists():
        return False
    look = (
        "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('SELECT count(*) FROM registered_models')"
    )
    done = subprocess.run([sys.executable, "-c", look, str(site.home / "mlflow.db")], capture_output=True, text=True)
    return "database is locked" in done.stderr


def wait_for(check: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
