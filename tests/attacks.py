"""For the red-team tests: a server and what stands behind it, what can be forged, and every attack as one request."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import evidence as prepared
import httpx
from evidence import Store, as_user
from mlflow import MlflowClient
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from servers import start, wait_until_healthy

from agentkit_tracking import history as histories
from agentkit_tracking import keys
from agentkit_tracking.history import KEY, History
from agentkit_tracking.keys import SigningKey, Trust
from agentkit_tracking.rules import EVALUATION, PROMPTS, REGISTRATION, VERDICT
from agentkit_tracking.statements import Evaluation, Evidence, Move, Registration, read, sign, signer

ANYBODY = httpx.Client(verify=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
TABLES = (
    "registered_models", "model_versions", "registered_model_tags", "model_version_tags", "registered_model_aliases",
    "experiments", "runs", "logged_models",
)  # fmt: skip


class Person(NamedTuple):
    """Somebody with a key."""

    name: str
    key: SigningKey
    pem: str


def person(name: str) -> Person:
    from cryptography.hazmat.primitives import serialization as s

    private, public = keys._generate(name, local=False)
    pem = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()).decode()
    return Person(name, SigningKey(private, public), pem)


GRACE, ROB, MALLORY = person("Grace"), person("Rob"), person("Mallory")  # trusted, revoked, unknown


@dataclass
class Site:
    """A server, what stands behind it, and the folders of those who use it."""

    url: str
    home: Path
    database: str
    auth: tuple[str, str] | None = None
    process: subprocess.Popen[bytes] | None = None
    known: dict[str, str] = field(default_factory=dict)

    # ---- who uses it

    @contextmanager
    def used_by(self, who: Person = GRACE, **environment: str) -> Iterator[MlflowClient]:
        """This process as somebody's machine: a home, a key and the same trusted keys."""
        from agentkit_tracking.home import connect

        login = (
            {"MLFLOW_TRACKING_USERNAME": self.auth[0], "MLFLOW_TRACKING_PASSWORD": self.auth[1]} if self.auth else {}
        )
        here = {
            "MLFLOW_TRACKING_URI": self.url, "AGENTKIT_TRUST": str(self.home / "trust.json"),
            "AGENTKIT_SIGNING_KEY": who.pem, **login,
        }  # fmt: skip
        with as_user(self.home.parent / f"home-of-{who.name}", who.name, **{**here, **environment}):
            yield connect()

    def load(self, reference: str = "colours@production") -> str:
        """The release that somebody gets who loads this."""
        from agentkit_tracking.loading import load

        with self.used_by():
            return str(load(reference).release)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return ANYBODY.request(method, f"{self.url}{path}", auth=self.auth, **options)

    def newest(self) -> int:
        """The number of a fourth version, which is registered if need be."""
        from agentkit_tracking.registry import register_file

        file = self.home.parent / "project" / "colours.py"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "pyproject.toml").write_text("")
        file.write_text(prepared.source(4))
        with self.used_by():
            return register_file(file).number

    # ---- what it holds

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        """The rows of all statements, by one look at the database."""
        if self.database.startswith("sqlite"):
            with closing(sqlite3.connect(self.database.removeprefix("sqlite:///"), timeout=30)) as db:
                return [row for statement in statements for row in db.execute(statement)]
        import psycopg2

        with closing(psycopg2.connect(self.database.replace("+psycopg2", ""))) as db, db.cursor() as cursor:
            rows = []
            for statement in statements:
                cursor.execute(statement)
                rows += cursor.fetchall()
            return rows

    def state(self) -> str:
        """A hash of the whole registry, of runs, experiments and models, and of every artifact."""
        rows = self.sql(*(f"SELECT '{table}', t.* FROM {table} t" for table in TABLES))
        digest = hashlib.sha256(repr(sorted(map(repr, rows))).encode())
        for file in sorted(p for p in (self.home / "artifacts").rglob("*") if p.is_file()):
            digest.update(str(file).encode() + file.read_bytes())
        return digest.hexdigest()

    def version_tags(self, version: int, name: str = "colours") -> dict[str, str]:
        return dict(
            self.sql(f"SELECT key, value FROM model_version_tags WHERE name = '{name}' AND version = {version}")
        )

    def release(self, version: int) -> str:
        return self.version_tags(version)["agentkit.release_id"]

    @property
    def history(self) -> History:
        tags = dict(self.sql("SELECT key, value FROM registered_model_tags WHERE name = 'colours'"))
        return histories.parse("colours", tags, Trust.model_validate_json((self.home / "trust.json").read_bytes()))

    @property
    def aliases(self) -> dict[tuple[str, str], int]:
        return {(n, a): v for n, a, v in self.sql("SELECT name, alias, version FROM registered_model_aliases")}

    def consistent(self) -> int | None:
        """The version in production, by the history, the alias and the prompts, which must agree."""
        number, aliases = self.history.production, self.aliases
        assert aliases.get(("colours", "production")) == number
        prompts = json.loads(self.version_tags(number or 0).get(PROMPTS, "{}")).values()
        assert aliases.get(("colours.program", "production")) == next((p["version"] for p in prompts), None)
        return number

    @property
    def model_id(self) -> str:
        """The logged model of version 2."""
        [(source,)] = self.sql("SELECT source FROM model_versions WHERE name = 'colours' AND version = 2")
        return str(source).removeprefix("models:/")

    @property
    def run(self) -> str:
        """The run that holds the evidence of version 2."""
        return read(self.version_tags(2)[EVALUATION], Evaluation).statement.evidence.run

    @property
    def experiment(self) -> str:
        [(number,)] = self.sql("SELECT experiment_id FROM experiments WHERE name = 'colours'")
        return str(number)


def trusting(home: Path) -> dict[str, str]:
    """Grace and Rob into the server's trusted keys, Rob as revoked; what its environment has to say."""
    path = home / "trust.json"
    known = Trust.model_validate_json(path.read_bytes()) if path.exists() else Trust()
    gone = ROB.key.public.model_copy(update={"revoked": datetime.now(UTC), "why": "stolen"})
    path.write_text(known.model_copy(update={"keys": (*known.keys, GRACE.key.public, gone)}).model_dump_json())
    return {"AGENTKIT_TRUST": str(path), "AGENTKIT_HOME": str(home)}


def guarded_by(database: str, app: str = "agentkit") -> tuple[str, ...]:
    return ("--backend-store-uri", database, "--registry-store-uri", f"agentkit-{database}", "--app-name", app)


@contextmanager
def served(home: Path, *arguments: str, workers: int | None = None, wait: bool = True) -> Iterator[Site]:
    """A server on the prepared home, which also serves its artifacts."""
    with start(home, *arguments, workers=workers, AGENTKIT_TRUST=str(home / "trust.json")) as (process, url):
        if wait:
            wait_until_healthy(process, url, home / "server.log")
        yield Site(url, home, f"sqlite:///{home / 'mlflow.db'}", process=process)


def with_served_artifacts(store: Store) -> Store:
    """Let clients write and read artifacts through the server, as they do where it is another machine."""
    root = (store.home / "artifacts").as_uri()
    places = {
        "experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location",
        "model_versions": "storage_location",
    }  # fmt: skip
    for table, column in places.items():
        store.sql(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", root, "mlflow-artifacts:")
    _artifact_repos_cache.clear()  # MLflow remembers by their ids where the prepared home's runs had theirs
    return store


def add_neighbours(site: Site) -> None:
    """Somebody else's model and prompt; and version 1, which had passed, is found wanting later."""
    with site.used_by() as client:
        client.create_registered_model("chat")
        client.create_model_version("chat", source="models:/colours/3")
        client.register_prompt("greeting", "Say hello.")
        proof = read(site.version_tags(1)[EVALUATION], Evaluation).statement
        site.known["old evaluation"] = site.version_tags(1)[EVALUATION]
        client.set_model_version_tag("colours", "1", EVALUATION, evaluation(site, GRACE, 1, "fail", proof))


# ---- what can be forged


def evaluation(site: Site, who: Person, version: int, verdict: str = "pass", like: Evaluation | None = None) -> str:
    """A signed evaluation of a version, made of that of version 2."""
    like = like or read(site.version_tags(2)[EVALUATION], Evaluation).statement
    proof = like.evidence.model_copy(update={"verdict": verdict})
    said = {
        "release": site.release(version), "version": version, "evidence": proof, "time": datetime.now(UTC),
        "signer": signer(who.key),
    }  # fmt: skip
    return sign(like.model_copy(update=said), who.key)


def entry(site: Site, who: Person = GRACE, /, **changes: Any) -> str:
    """The next entry of the history, which would promote version 3, but for the changes."""
    head = site.history.head
    assert head is not None
    facts = {
        "system": "colours", "release": site.release(3), "time": datetime.now(UTC), "signer": signer(who.key),
        "event": "promoted", "sequence": head.move.sequence + 1, "before": head.signed.digest, "version": 3,
        "left_version": head.move.version, "left_release": head.move.release if head.move.version else None, "why": "",
        "prompts": hashlib.sha256(site.version_tags(3)[PROMPTS].encode()).hexdigest(),
        "evidence": proof_of(site),
    }  # fmt: skip
    return sign(Move(**{**facts, **changes}), who.key)


def proof_of(site: Site, **changes: Any) -> Evidence:
    """That of version 2, as if version 3 had been compared with it."""
    proof = read(site.version_tags(2)[EVALUATION], Evaluation).statement.evidence
    return proof.model_copy(update={"compared_with": site.release(2), **changes})


def past_entry(site: Site, number: int) -> str:
    return site.history.entries[number - 1].signed.envelope


def with_another_signature(envelope: str, other: str) -> str:
    return json.dumps({**json.loads(envelope), "signatures": json.loads(other)["signatures"]})


def registration(site: Site, who: Person, version: int) -> str:
    said = Registration(
        system="colours", release=site.release(version), time=datetime.now(UTC), signer=signer(who.key), commit="none"
    )
    return sign(said, who.key)


def described(site: Site) -> str:
    """What people read of the system, its history at the end."""
    [(text,)] = site.sql("SELECT description FROM registered_models WHERE name = 'colours'")
    return str(text)


# ---- attacks

Value = str | int | bool | None | Callable[[Site], str]


@dataclass(frozen=True)
class Attack:
    """One request. Values of the body may be functions of the site; `says` is part of the refusal."""

    what: str
    method: str
    path: str
    body: dict[str, Any]
    says: str = ""
    status: int = 403

    def __str__(self) -> str:
        return self.what

    def filled(self, site: Site) -> dict[str, Any]:
        """The body, with what the site has put into it."""
        return {k: _fill(v, site) for k, v in self.body.items()}


def _fill(value: Any, site: Site) -> Any:
    if isinstance(value, list):
        return [_fill(v, site) for v in value]
    if isinstance(value, dict):
        return {k: _fill(v, site) for k, v in value.items()}
    return value(site) if callable(value) else value


def on_model(what: str, path: str, says: str = "", status: int = 403, *, name: str = "colours", **body: Any) -> Attack:
    method = {"delete": "DELETE", "delete-tag": "DELETE", "update": "PATCH"}.get(path, "POST")
    return Attack(what, method, f"registered-models/{path}", {"name": name, **body}, says, status)


def on_version(
    what: str, path: str, says: str = "", status: int = 403, *, name: str = "colours", version: str = "3", **body: Any
) -> Attack:
    method = {"delete": "DELETE", "delete-tag": "DELETE", "update": "PATCH"}.get(path, "POST")
    return Attack(what, method, f"model-versions/{path}", {"name": name, "version": version, **body}, says, status)


def alias(what: str, name: str = "production", *, of: str = "colours", version: str = "3") -> Attack:
    return on_model(what, "alias", "the alias", name=of, alias=name, version=version)


def tag(what: str, key: str, value: Value, says: str = "the tag", *, of: str = "colours") -> Attack:
    return on_model(what, "set-tag", says, name=of, key=key, value=value)


def version_tag(
    what: str, key: str, value: Value, says: str = "the tag", *, of: str = "colours", version: str = "3"
) -> Attack:
    return on_version(what, "set-tag", says, name=of, version=version, key=key, value=value)


def next_is(what: str, make: Value, says: str, number: int | str = 3, status: int = 403) -> Attack:
    key = f"{KEY}{number:06}" if isinstance(number, int) else f"{KEY}{number}"
    return on_model(f"entry {what}", "set-tag", says, status, key=key, value=make)


def new_model(what: str, name: str, *pairs: tuple[str, Value], description: str = "") -> Attack:
    tags = [{"key": k, "value": v} for k, v in pairs]
    return on_model(f"a model {what}", "create", name=name, tags=tags, description=description)


def new_version(
    what: str, says: str, *pairs: tuple[str, Value], source: str = "models:/colours/3", **body: Any
) -> Attack:
    tags = [{"key": k, "value": v} for k, v in pairs]
    path, body = "model-versions/create", {"name": "colours", "source": source, "tags": tags, **body}
    return Attack(f"a version {what}", "POST", path, body, says)


PROMPT = "colours.program"
IS_PROMPT, SYSTEM, RELEASE = "mlflow.prompt.is_prompt", "agentkit.system", "agentkit.release_id"
ZERO = "0" * 64
SPELLINGS = [
    "production", "Production", "PRODUCTION", "pRoDuCtIoN", " production ", "production\n", "_production_",
    "pro-duction", "\uff30\uff32\uff2f\uff24\uff35\uff23\uff34\uff29\uff2f\uff2e", "\U0001d429roduction",
]  # fmt: skip
ALIASES = [
    *(alias(f"alias {s!a}", s) for s in SPELLINGS),
    *(alias(f"alias {s!a} of a prompt", s, of=PROMPT) for s in SPELLINGS[:3]),
    alias("alias on what was in production before", version="1"),
    alias("alias by another spelling of a number", version="\uff13"),
    alias("alias on somebody's model", of="chat", version="1"),
    alias("alias on somebody's prompt", of="greeting", version="1"),
    alias("alias of a system yet to come", of="future", version="1"),
    *(
        Attack(f"deleting the alias of {n}", "DELETE", "registered-models/alias", {"name": n, "alias": "production"})
        for n in ("colours", PROMPT)
    ),
    *(
        on_version(f"stage {s!a}, archive {a}", "transition-stage", "the stage", stage=s, archive_existing_versions=a)
        for s in ("Production", "production", "PRODUCTION ")
        for a in (False, True)
    ),
    on_version("stage of a prompt", "transition-stage", "the stage", name=PROMPT, stage="Production"),
    on_version("a stage that deletes", "transition-stage", "", 400, version="2", stage="Deleted_Internal"),
]
TAGS = [
    tag("mark as another system", SYSTEM, "true", of=PROMPT),
    tag("system that is none", SYSTEM, "false"),
    tag("a tag of ours that nobody knows", "agentkit.x", "1"),
    tag("a system that becomes a prompt", IS_PROMPT, "true"),
    tag("a prompt that becomes a model", IS_PROMPT, "false", of=PROMPT),
    *(
        on_model(f"deleting {key}", "delete-tag", "deleting the tag", key=key)
        for key in (SYSTEM, f"{KEY}000001", f"{KEY}000002", "agentkit.x")
    ),
    on_model("deleting what makes a prompt", "delete-tag", "deleting the tag", name=PROMPT, key=IS_PROMPT),
    version_tag("a verdict without evaluation", VERDICT, "pass"),
    version_tag("another verdict", VERDICT, "fail", version="2"),
    version_tag("another version's evaluation", EVALUATION, lambda s: s.version_tags(2)[EVALUATION], "another release"),
    version_tag("an evaluation by nobody known", EVALUATION, lambda s: evaluation(s, MALLORY, 3), "not trusted here"),
    version_tag("an evaluation by a revoked key", EVALUATION, lambda s: evaluation(s, ROB, 3), "revoked"),
    version_tag("an evaluation overtaken", EVALUATION, lambda s: s.known["old evaluation"], "older", version="1"),
    version_tag("an evaluation that is none", EVALUATION, "{}", "cannot be read"),
    version_tag("an entry as evaluation", EVALUATION, lambda s: past_entry(s, 2), "cannot be read", version="2"),
    *(
        version_tag(f"another {key}", key, ZERO, version="2")
        for key in (RELEASE, PROMPTS, "agentkit.author", "agentkit.git_commit")
    ),
    version_tag("another's registration", REGISTRATION, lambda s: registration(s, GRACE, 2), "registration"),
    version_tag("a later author", REGISTRATION, lambda s: registration(s, GRACE, 2), "registration", version="2"),
    version_tag("versions hidden by a prompt's mark", IS_PROMPT, "true"),
    version_tag("a prompt's text", "mlflow.prompt.text", "Say warm.", of=PROMPT, version="2"),
    version_tag("a prompt's model", "_mlflow_prompt_model_config", '{"model_name": "evil"}', of=PROMPT, version="2"),
    version_tag("a prompt's answers", "_mlflow_prompt_response_format", "{}", of=PROMPT, version="2"),
    version_tag("a prompt's kind", "_mlflow_prompt_type", "chat", of=PROMPT, version="2"),
    version_tag("a prompt that is none", IS_PROMPT, "false", of=PROMPT, version="2"),
    version_tag("a prompt's hash", "agentkit.sha256", ZERO, of=PROMPT, version="2"),
    *(
        on_version(f"deleting {key} of version 2", "delete-tag", "deleting the tag", version="2", key=key)
        for key in (EVALUATION, VERDICT, REGISTRATION, PROMPTS, RELEASE)
    ),
    *(
        on_version(f"deleting a prompt's {key}", "delete-tag", "deleting the tag", name=PROMPT, version="2", key=key)
        for key in ("mlflow.prompt.text", IS_PROMPT, "agentkit.sha256")
    ),
    on_version("a version that is no number", "set-tag", "", 400, version="two", key=VERDICT, value="pass"),
]
ENTRIES = [
    next_is("overwritten", "{}", "there already", 1),
    next_is("overwritten with another", lambda s: past_entry(s, 1), "there already", 2),
    next_is("that is none", "{}", "cannot be read"),
    next_is("1 once more", lambda s: past_entry(s, 1), "it is entry 1"),
    next_is("2 once more", lambda s: past_entry(s, 2), "it is entry 2"),
    next_is("of another kind", lambda s: s.version_tags(2)[EVALUATION], "cannot be read"),
    next_is("by a key nobody knows", lambda s: entry(s, MALLORY), "not trusted here"),
    next_is("by a revoked key", lambda s: entry(s, ROB), "revoked"),
    next_is("with another's signature", lambda s: with_another_signature(entry(s), past_entry(s, 2)), "does not fit"),
    next_is("without an evaluation", entry, "cannot be read"),
    next_is("without evidence", lambda s: entry(s, evidence=None), "without evidence"),
    next_is("although the gate failed", lambda s: entry(s, evidence=proof_of(s, verdict="fail")), "evidence says fail"),
    next_is("on an old comparison", lambda s: entry(s, evidence=proof_of(s, compared_with=s.release(1))), "compares"),
    next_is("of another release", lambda s: entry(s, release=ZERO), "is not release"),
    next_is("with other prompts", lambda s: entry(s, prompts=ZERO), "other prompts"),
    next_is("of a version that is not there", lambda s: entry(s, version=99), "", status=404),
    next_is("out of turn", lambda s: entry(s, sequence=4), "entry 3 of 3 is missing", 4),
    next_is("that skips one", lambda s: entry(s, sequence=4), "it is entry 4"),
    next_is("that leaves another version", lambda s: entry(s, left_version=1), "leaves version 1"),
    next_is("built on another", lambda s: entry(s, before=ZERO), "not built on"),
    next_is("of another system", lambda s: entry(s, system="future"), "entry 3 of future"),
    next_is("back to what never was", lambda s: entry(s, event="rolled_back"), "never promoted"),
    next_is("that withdraws and names", lambda s: entry(s, event="withdrawn"), "must not be named"),
    next_is("that promotes nothing", lambda s: entry(s, version=None), "must be named"),
    next_is("under another number", entry, "is missing", "3"),
    next_is("beside the numbers", entry, "is missing", "last"),
    tag("history of another system", f"{KEY}000001", lambda s: past_entry(s, 1), "entry 1 of colours", of="chat"),
    tag("history of a prompt", f"{KEY}000001", lambda s: past_entry(s, 1), "is a prompt", of=PROMPT),
    on_model(
        "history of nothing", "set-tag", "", 404, name="future", key=f"{KEY}000001", value=lambda s: past_entry(s, 1)
    ),
]
OTHERS_PROMPTS = json.dumps({"a": {"name": "greeting", "version": 1, "sha256": "0"}})
CREATED = [
    new_model("with a history", "x", (f"{KEY}000001", lambda s: past_entry(s, 1))),
    new_model("with a verdict", "x", (VERDICT, "pass")),
    new_model("that is a prompt and says it is a system", "future.program", (SYSTEM, "true")),
    new_model("that is a system and says it is a prompt", "future", (SYSTEM, "true"), (IS_PROMPT, "true")),
    new_model("with a history in words", "future", (SYSTEM, "true"), description="### History\n\n- promoted version 1"),
    on_model("the same system again", "create", "", 400),
    new_version("with an evaluation", "the tags", (EVALUATION, lambda s: s.version_tags(2)[EVALUATION])),
    new_version("with a verdict", "the tags", (VERDICT, "pass")),
    new_version("with a verdict in words", "a verdict in the description", description="### Gate: pass\n"),
    new_version("that hides the others", "the tags", (IS_PROMPT, "true"), source="dummy-source"),
    new_version("with others' prompts", "no prompt of colours", (PROMPTS, OTHERS_PROMPTS)),
    *(
        new_version(f"with prompts {text}", "lists no prompts", (PROMPTS, text))
        for text in ("x", "[]", '{"a": 1}', "1", '{"a": {"name": "colours.a", "version": "x", "sha256": "0"}}')
    ),
    new_version("whose release id is a path", "the release id", (RELEASE, "../../home")),
    new_version(
        "registered as another release", "signed for another release",
        (RELEASE, ZERO), (REGISTRATION, lambda s: registration(s, GRACE, 2)),
    ),
    new_version(
        "that names two releases", "signed for another release",
        (RELEASE, lambda s: s.release(2)), (RELEASE, ZERO), (REGISTRATION, lambda s: registration(s, GRACE, 2)),
    ),
    new_version(
        "registered by nobody known", "not trusted here",
        (RELEASE, lambda s: s.release(2)), (REGISTRATION, lambda s: registration(s, MALLORY, 2)),
    ),
]  # fmt: skip
REMOVED = [
    on_model("renaming a system", "rename", "renaming", new_name="colours2"),
    on_model("renaming a prompt", "rename", "renaming", name=PROMPT, new_name="mine"),
    on_model("renaming over a system", "rename", "", 400, name="chat", new_name="colours"),
    on_model("deleting a system", "delete", "deleting"),
    on_model("deleting a prompt", "delete", "deleting", name=PROMPT),
    *(
        on_version(f"deleting version {v} of {n}", "delete", "deleting version", name=n, version=v)
        for n in ("colours", PROMPT)
        for v in ("1", "2", " 2")
    ),
    on_model("no history", "update", "changing the history", description=""),
    on_model("another history", "update", "changing the history", description="### History\n\n- promoted version 3"),
    on_model(
        "a second history", "update", "changing the history", description=lambda s: f"# History\n\n{described(s)}"
    ),
    on_model(
        "a longer history", "update", "changing the history", description=lambda s: f"{described(s)}\n- version 3"
    ),
    on_version("another text of an evaluation", "update", "its verdict", version="2", description="### Gate: fail"),
    on_version("no text of an evaluation", "update", "its verdict", version="2"),
    on_version("a verdict in the text of another", "update", "its verdict", description="x\n\n## gate: PASS"),
]
SOURCES = [
    Attack("deleting the run", "POST", "runs/delete", {"run_id": lambda s: s.run}),
    Attack("another name of the run", "POST", "runs/update", {"run_id": lambda s: s.run, "run_name": "x"}),
    Attack(
        "another metric", "POST", "runs/log-metric", {"run_id": lambda s: s.run, "key": "x", "value": 1, "timestamp": 1}
    ),
    Attack("another tag of the run", "POST", "runs/set-tag", {"run_id": lambda s: s.run, "key": "x", "value": "y"}),
    Attack("a run that is none", "POST", "runs/delete-tag", {"run_id": lambda s: s.run, "key": "agentkit.kind"}),
    Attack("deleting the experiment", "POST", "experiments/delete", {"experiment_id": lambda s: s.experiment}),
    Attack("renaming it", "POST", "experiments/update", {"experiment_id": lambda s: s.experiment, "new_name": "x"}),
    Attack("deleting the model", "DELETE", "logged-models/{model}", {"model_id": lambda s: s.model_id}),
    Attack(
        "a model that failed",
        "PATCH",
        "logged-models/{model}",
        {"model_id": lambda s: s.model_id, "status": "LOGGED_MODEL_UPLOAD_FAILED"},
    ),
    Attack("tags of the model", "PATCH", "logged-models/{model}/tags", {"tags": [{"key": RELEASE, "value": "x"}]}),
]
ATTACKS = [*ALIASES, *TAGS, *ENTRIES, *CREATED, *REMOVED, *SOURCES]
