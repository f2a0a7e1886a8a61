"""Releases in MLflow: register, resolve, fetch, load.

A release is a version of the registered model `<system>`; its artifacts are the release folder, and each of its
prompts is a version in the prompt registry, linked. Alias meanings: register sets none; `candidate` is what a person
or pipeline asks to be promoted; `production` only the gate sets.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentkit.errors import ReleaseError, SourceError, UnknownReference, UsageError
from agentkit.models import EMBEDDED, Settings, build_lm, load_settings
from agentkit.records import RunRecord
from agentkit.systems import System, adopt, short_name
from agentkit_tracking import manifest as manifests
from agentkit_tracking.home import connect, experiment_id, home
from agentkit_tracking.live import differences
from agentkit_tracking.manifest import Manifest, read_release
from agentkit_tracking.source import Entry, adopt_from, load_entry, parse_entry, prepared

PRODUCTION, CANDIDATE = "production", "candidate"
TAG = "agentkit."
RELOAD_S = 10.0  # how soon a following process notices that the alias has moved
_PROMPT_LIMIT = 100_000  # characters; mlflow takes no longer prompt
DESCRIPTION_LIMIT = 5000  # characters; mlflow's column, which SQLite alone does not enforce
_log = logging.getLogger(__name__)
_HOW_TO_PROMOTE = (
    "Releases of the agent system `{0}`. To ask for a promotion, give a version the alias `candidate`; the next "
    "`agentkit promote --candidates` evaluates it and sets `production` if the thresholds are cleared."
)


@dataclass(frozen=True)
class Version:
    """A registered release. `created` is False when its content had been registered before."""

    name: str
    number: int
    release_id: str
    created: bool = False
    tags: dict[str, str] | None = None
    aliases: tuple[str, ...] = ()
    model_id: str | None = None
    created_at: float = 0.0  # seconds since the epoch

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"


# ---- register


def register(system: System | Any, source: str | Path | None = None) -> Version:
    """Register a live system together with the source that defines it.

    Args:
        system: a `System`, or anything `agentkit.adopt` takes; its prompts, demonstrations and weights are stored.
        source: FILE[:NAME] that builds the system; default: the file that defines its first agent's class.

    Raises:
        SourceError: the live objects differ from the source on disk; the message shows how.
    """
    entry = parse_entry(source if source is not None else _source_file(adopt(system)))
    system = adopt_from(system, entry)
    if found := differences(system, entry):
        raise SourceError(
            f"the live {system.name} is not what {entry.relative} on disk defines; save the notebook or run its cells "
            "again, then register:\n" + "\n".join(found)
        )
    return store(system, entry)


def register_file(target: str | Path, prepare: str | None = None) -> Version:
    """Register the system that `FILE[:NAME]` defines.

    Args:
        prepare: a function of the file that takes the system and returns it tuned (prompts, demonstrations, weights);
            it runs once, now. The release keeps what it made, so loading does not run it again.
    """
    entry = parse_entry(target)
    system = load_entry(entry)
    if prepare is not None:
        system = prepared(system, entry, prepare)
        if found := differences(system, entry):
            raise SourceError(
                f"{prepare} changed what a release does not hold (it holds prompts, demonstrations and weights); put it "
                "into the source:\n" + "\n".join(found)
            )
    return store(system, entry)


def _source_file(system: System) -> str:
    import inspect

    for agent in system.agents.values():
        try:
            file = inspect.getsourcefile(type(agent))
        except (OSError, TypeError):
            continue
        if file and Path(file).is_file():
            return file
    raise SourceError(
        "these objects come from no file; pass source='notebooks/….py' (what is not saved is not registered)"
    )


def store(system: System, entry: Entry) -> Version:
    """Write a release to MLflow, or return the version that already has its content."""
    manifest, files, weights = manifests.build(system, entry)
    release_id = manifest.release_id
    client = connect()
    if (known := find_release(system.name, release_id)) is not None:
        return known
    prompts = _store_prompts(manifest)
    _create_model(system.name)
    metadata = _metadata(entry.root)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "release"
        manifests.write_release(folder, manifest, files, weights)
        read_release(folder, release_id)  # a file may have been saved anew meanwhile
        model = client.create_logged_model(
            experiment_id(system.name),
            name=system.name,
            model_type="agentkit-release",
            tags={f"{TAG}release_id": release_id},
            params={"model": manifest.model, "release": release_id[:12], "weights": (manifest.weights or "none")[:12]},
        )
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
    # The version comes last: what has a number is complete.
    made = client.create_model_version(
        system.name,
        source=f"models:/{model.model_id}",
        model_id=model.model_id,
        tags={f"{TAG}release_id": release_id, f"{TAG}prompts": json.dumps(prompts), **metadata},
        description=describe(manifest, prompts),
    )
    for prompt in prompts.values():
        client.link_prompt_version_to_model(prompt["name"], str(prompt["version"]), model.model_id)
    return Version(system.name, int(made.version), release_id, True, dict(made.tags), model_id=model.model_id)


def _create_model(name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        connect().create_registered_model(name, tags={f"{TAG}system": "true"}, description=_HOW_TO_PROMOTE.format(name))
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _metadata(root: Path) -> dict[str, str]:
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "unknown"
    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain"):
        commit += "+changes"
    return {
        f"{TAG}git_commit": commit or "none",
        f"{TAG}author": os.environ.get("AGENTKIT_AUTHOR") or git("config", "user.name") or user,
    }


def _store_prompts(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Register each prompt, or find the version that has the same content; short name to name, version, hash."""
    client = connect()
    known = {
        (p["name"], p["sha256"]): p
        for v in versions(manifest.system)
        for p in json.loads((v.tags or {}).get(f"{TAG}prompts", "{}")).values()
    }
    stored = {}
    for short, state in manifest.prompts.items():
        name = f"{manifest.system}.{short}"
        digest = manifests.sha256(json.dumps(state, sort_keys=True).encode())
        if (name, digest) not in known:
            made = client.register_prompt(name, template=prompt_text(state), tags={f"{TAG}sha256": digest})
            known[name, digest] = {"name": name, "version": int(made.version), "sha256": digest}
        stored[short] = known[name, digest]
    return stored


def prompt_text(state: dict[str, Any]) -> str:
    """A predictor's prompt as people read and compare it: instructions, fields, demonstrations."""
    lines = [state["signature"]["instructions"].strip(), "", "Fields:"]
    lines += [f"- {f['prefix']} {f['description']}" for f in state["signature"]["fields"]]
    for i, demo in enumerate(state["demos"], 1):
        lines += ["", f"Demonstration {i}:", *(f"- {k}: {v}" for k, v in demo.items() if k != "augmented")]
    text = "\n".join(lines).replace("{{", "{ {")  # double braces would be a template variable
    cut = "\n… (cut; the release's manifest has it whole)"
    return text if len(text) <= _PROMPT_LIMIT else text[: _PROMPT_LIMIT - len(cut)] + cut


def describe(manifest: Manifest, prompts: dict[str, dict[str, Any]]) -> str:
    """The version's description in the MLflow UI (which renders headings and lists, no tables)."""
    agents = "\n".join(f"- {n}: {', '.join(a['tools']) or 'no tools'}" for n, a in manifest.spec["agents"].items())
    listed = "\n".join(f"- {p['name']} version {p['version']}" for p in prompts.values())
    text = (
        f"### Release {manifest.release_id[:12]}\n\n- source: {manifest.entry}\n- model: {manifest.model}\n"
        f"- weights: {(manifest.weights or 'none')[:12]}\n\n#### Agents and their tools\n\n"
        f"{agents or '- adopted program'}\n\n#### Prompts\n\n{listed or '- none'}\n"
    )
    return text[:DESCRIPTION_LIMIT]


# ---- find


def versions(name: str) -> list[Version]:
    """All versions of a system, oldest first; empty if there is none."""
    from mlflow.exceptions import MlflowException

    client = connect()
    try:
        model = client.get_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":  # a store that is down is not an empty one
            raise
        return []
    aliases: dict[int, list[str]] = {}
    for alias, number in model.aliases.items():
        aliases.setdefault(int(number), []).append(alias)
    found = []
    page: Any = None
    while page is None or page.token:
        page = client.search_model_versions(f"name='{name}'", max_results=1000, page_token=page.token if page else None)
        found += [_version(v, aliases) for v in page]
    return sorted(found, key=lambda v: v.number)


def _version(v: Any, aliases: dict[int, list[str]]) -> Version:
    number, source = int(v.version), str(v.source or "")
    return Version(
        v.name,
        number,
        v.tags.get(f"{TAG}release_id", ""),
        False,
        dict(v.tags),
        tuple(sorted(aliases.get(number, ()))),
        source.removeprefix("models:/") if source.startswith("models:/m-") else None,
        v.creation_timestamp / 1000,
    )


def systems() -> list[str]:
    """Names of all registered systems."""
    found, page = [], None
    client = connect()
    while page is None or page.token:
        page = client.search_registered_models(max_results=500, page_token=page.token if page else None)
        found += [m.name for m in page if f"{TAG}system" in m.tags]
    return sorted(found)


def find_release(name: str, release_id: str) -> Version | None:
    """The version of `name` with this content hash, or None."""
    return next((v for v in versions(name) if v.release_id == release_id), None)


def resolve(reference: str) -> Version:
    """`name@alias`, `name/3`, `name` (its newest version) or the first 8 or more characters of a release id.

    Raises:
        UnknownReference: nothing is registered under it; says what there is.
    """
    if re.fullmatch(r"[0-9a-f]{8,64}", reference):
        every = (v for name in systems() for v in versions(name) if v.release_id.startswith(reference))
        found = {v.release_id: v for v in every}  # two processes at once may have made two versions of one release
        if len(found) != 1:
            raise UnknownReference(f"{len(found)} registered releases begin with {reference!r}; see `agentkit list`")
        return next(iter(found.values()))
    shape = re.fullmatch(r"(\w+)(?:@([\w.-]+)|/(\d+))?", reference)
    if shape is None:
        raise UnknownReference(f"{reference!r} is no reference; use name@production, name/3, or a release id")
    name, alias, number = shape.groups()
    known = versions(name)
    if not known:
        have = ", ".join(systems()) or "none yet"
        raise UnknownReference(
            f"no system {name!r} is registered (there are: {have}); register one with `agentkit register`"
        )
    if number is None and alias is None:
        return known[-1]
    for v in known:
        if v.number == int(number or -1) or alias in v.aliases:
            return v
    what = f"version {number}" if number else f"alias {alias!r}"
    raise UnknownReference(f"{name} has no {what}; its versions are {', '.join(str(v.number) for v in known)}")


# ---- load


def fetch(reference: str | Path) -> tuple[Path, Manifest]:
    """The release as a local folder, every file checked against its hash. A path to a release folder works, too.

    Raises:
        ReleaseError: not found, or not intact.
    """
    if isinstance(reference, Path) or (os.sep in reference and (Path(reference) / manifests.MANIFEST).is_file()):
        folder = Path(reference)
        return folder, read_release(folder, folder.name if _is_release_id(folder.name) else None)
    return fetch_version(resolve(reference))


def fetch_version(version: Version) -> tuple[Path, Manifest]:
    """`fetch` for a version that is already resolved."""
    folder = home() / "releases" / version.release_id
    if folder.exists():
        try:
            return folder, _checked(version, folder)
        except ReleaseError as e:
            aside = folder.with_name(f"damaged-{uuid.uuid4().hex[:8]}-{folder.name[:12]}")
            _log.warning("the local copy of %s is damaged (%s); it is kept as %s and fetched anew", version, e, aside)
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(folder, aside)
    if not folder.exists():
        with _downloaded(version) as got:
            try:
                os.replace(got, folder)  # whole or not at all
            except OSError:
                if not folder.exists():  # unless another process was faster
                    raise
    return folder, _checked(version, folder)


def check_stored(version: Version) -> None:
    """Check the release as the store holds it, which others will fetch; one fetched earlier proves nothing of it.

    Raises:
        ReleaseError: it cannot be fetched, or is not intact.
    """
    with _downloaded(version):
        pass


def _is_release_id(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _checked(version: Version, folder: Path, called: str | None = None) -> Manifest:
    if not _is_release_id(version.release_id):
        raise ReleaseError(f"{version} carries no release id; it was not registered by agentkit")
    manifest = read_release(folder, version.release_id, called=called)
    if manifest.system != version.name:
        raise ReleaseError(f"{version} holds a release of {manifest.system!r}")
    return manifest


@contextmanager
def _downloaded(version: Version) -> Iterator[Path]:
    """The store's copy of a release, checked, in a scratch folder beside the fetched ones."""
    connect()
    import mlflow

    releases = home() / "releases"
    releases.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=releases, ignore_cleanup_errors=True) as scratch:
        try:
            got = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.number}", dst_path=scratch)
        except Exception as e:
            raise ReleaseError(f"the artifacts of {version} cannot be fetched: {e}") from e
        _checked(version, Path(got), f"the store's copy of {version}")
        yield Path(got)


def load(reference: str | Path) -> System:
    """Rebuild exactly the release that `reference` names (see `resolve`), ready to run.

    All hashes are checked before any source is executed.

    Raises:
        ReleaseError: not found, not intact, or its source builds something else than its manifest says.
    """
    return load_folder(*fetch(reference))


def _say_other_packages(manifest: Manifest) -> None:
    """The same release may answer otherwise under other versions of what it computes with."""
    here = manifests.installed_packages()
    other = [f"{n} {v} (here {here.get(n)})" for n, v in manifest.packages.items() if here.get(n) != v]
    if other:
        _log.warning("release %s was made with %s", manifest.release_id[:12], ", ".join(other))


def load_folder(folder: Path, manifest: Manifest) -> System:
    """Build the system of a checked release folder."""
    root = (folder / manifests.SOURCE).resolve()
    file, _, name = manifest.entry.rpartition(":")
    system = load_entry(Entry(root / file, name, root))
    _check_promises(system, manifest)
    for path, predictor in system.named_predictors():
        pinned = predictor.lm  # by the source; no part of the state
        predictor.load_state({**manifest.prompts[short_name(path)], "traces": [], "train": [], "lm": None})
        predictor.lm = pinned
    if manifest.weights is not None:
        from agentkit.embedded import Weights

        system.use(Weights.from_file(str(folder / manifests.WEIGHTS)))
    _say_other_packages(manifest)
    system.name, system.model, system.release = manifest.system, manifest.model, manifest.release_id
    if manifest.model != EMBEDDED:
        system._lm = ((system.model, id(system.weights)), build_lm(manifest.model, settings=_settings(manifest)))
    return system


def _check_promises(system: System, manifest: Manifest) -> None:
    """What was judged is what runs, also where the source looks at the environment: a limit, a permission, a budget."""
    built = {"prompts": sorted(short_name(path) for path, _ in system.named_predictors()), **_binding(system.spec())}
    said = {"prompts": sorted(manifest.prompts), **_binding(manifest.spec)}
    found = [f"{path} is {b!r}, should be {a!r}" for path, a, b in manifests.differing(said, built) if path != "name"]
    if found:
        raise ReleaseError(
            f"release {manifest.release_id[:12]} of {manifest.system}: its source builds something else than its "
            f"manifest says: {'; '.join(found)}"
        )


def _binding(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec without JSON Schemas, whose wording may change with pydantic; the source that makes them is hashed."""
    plain: dict[str, Any] = json.loads(json.dumps(spec))
    for part, schema in (("agents", "result"), ("tools", "arguments")):
        plain[part] = {n: {k: v for k, v in x.items() if k != schema} for n, x in plain[part].items()}
    return plain


def _settings(manifest: Manifest) -> Settings:
    """This machine's settings, with the model's parameters as released; only secrets are the machine's own."""
    settings = load_settings()
    own = {k: v for k, v in settings.options.get(manifest.model, {}).items() if manifests.is_secret(k)}
    return settings.model_copy(update={"options": {**settings.options, manifest.model: {**own, **manifest.parameters}}})


class Following:
    """Runs whatever release an alias points to, looking again every `reload_s` seconds; see `follow`."""

    def __init__(self, reference: str, reload_s: float) -> None:
        self._reference, self._reload_s = reference, reload_s
        self._version = resolve(reference)
        self._system = load_folder(*fetch_version(self._version))
        self._looked, self._lock = time.monotonic(), threading.Lock()

    @property
    def system(self) -> System:
        """The release in force, at most `reload_s` seconds old. A run under way keeps the one it started with.

        Raises:
            ReleaseError: the alias is gone, or what it names is not intact. A store that does not answer is no reason
                to stop: the release at hand goes on, with a warning, until the next look.
        """
        from mlflow.exceptions import MlflowException

        with self._lock:
            if time.monotonic() - self._looked >= self._reload_s:
                try:
                    version = resolve(self._reference)
                    if version.release_id != self._version.release_id:
                        self._system, self._version = load_folder(*fetch_version(version)), version
                except MlflowException as e:
                    _log.warning("%s cannot be looked up, %s goes on: %s", self._reference, self._version, e)
                self._looked = time.monotonic()
            return self._system

    def run(self, **inputs: Any) -> RunRecord:
        """`System.run` of the release in force."""
        return self.system.run(**inputs)


def follow(reference: str, reload_s: float = RELOAD_S) -> Following:
    """A long-running process's handle on `name@production`: promotions and rollbacks reach it within `reload_s`."""
    if "@" not in reference:
        raise UsageError(f"follow an alias, e.g. name@production; {reference!r} never moves")
    return Following(reference, reload_s)
