"""Loading releases: nothing that a release holds is executed before its signature and every hash are checked."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from agentkit import clock
from agentkit.errors import ReleaseError, TrustError, UnknownReference, UsageError
from agentkit.models import EMBEDDED, Settings, build_lm, load_settings
from agentkit.records import RunRecord
from agentkit.systems import System, short_name
from agentkit_tracking import history as histories
from agentkit_tracking import manifest as manifests
from agentkit_tracking import production, registry
from agentkit_tracking.home import home, is_local_store
from agentkit_tracking.keys import load_trust
from agentkit_tracking.manifest import Manifest
from agentkit_tracking.registry import Version
from agentkit_tracking.rules import REGISTRATION, is_production
from agentkit_tracking.source import Entry, load_entry
from agentkit_tracking.statements import Registration, check, read_checked

RELOAD_S = 10.0  # how soon a following process notices a promotion or rollback
_log = logging.getLogger(__name__)


def load(reference: str | Path, *, trust: bool = False) -> System:
    """Rebuild exactly the release that `reference` names (see `registry.resolve`), ready to run.

    `name@production` must be signed, and everything stored must be as it was signed; whatever else is named must be
    intact and come from this project's own store, be registered by somebody trusted, or be taken on `trust`. All this
    is checked before any source is executed.

    Args:
        trust: execute its source although nobody vouches for it.

    Raises:
        TrustError: it is not trusted; says what differs or what is missing.
        ReleaseError: not found, not intact, or its source builds something else than its manifest says.
    """
    system = load_folder(*fetch(reference, trust=trust))
    if is_production(str(reference).partition("@")[2]):
        system.stage = "production"  # its effects are real: the policy may ask for more
    return system


def fetch(reference: str | Path, *, trust: bool = False) -> tuple[Path, Manifest]:
    """The release that `load` would load, as a checked local folder. A path to a release folder works, too."""
    if is_folder(reference):
        folder, manifest = registry.fetch_folder(Path(reference))
        if not (trust or folder.resolve().parent == home() / "releases"):  # fetched, by whoever was allowed to
            raise TrustError(
                f"nobody vouches for the release in {folder}, a folder that is no store's. Pass trust=True (--trust) to "
                "run it"
            )
        return folder, manifest
    name, _, alias = str(reference).partition("@")
    if is_production(alias):  # in any spelling: no look-alike leads round the signature
        return fetch_production(name)
    version = registry.resolve(str(reference))
    require_trusted(version, trust)
    return registry.fetch_version(version)


def resolve(reference: str) -> Version:
    """The version that a reference names; `name@production` by the signed history, not by the alias.

    Raises:
        UnknownReference: nothing is registered under it, or nothing is in production.
        TrustError: production is not what was signed.
    """
    name, _, alias = reference.partition("@")
    if not is_production(alias):
        return registry.resolve(reference)
    if (version := production.find_production(name)) is None:
        raise UnknownReference(_nothing_in_production(name))
    return version


def is_folder(reference: str | Path) -> bool:
    """Whether a reference is the path of a release folder."""
    return isinstance(reference, Path) or (os.sep in reference and (Path(reference) / manifests.MANIFEST).is_file())


def require_trusted(version: Version, trust: bool) -> None:
    """Refuse a version that nobody vouches for: not of this project's own store, not registered by a trusted key.

    Raises:
        TrustError: says what would make it trusted.
    """
    if trust or is_local_store():
        return
    why = "its registration is not signed"
    if (text := (version.tags or {}).get(REGISTRATION)) is not None:
        try:
            read_checked(text, Registration, version.name, version.release_id, load_trust())
            return
        except TrustError as e:
            why = f"its registration was {e}"
    raise TrustError(
        f"{version} is not in production, and nobody trusted here vouches for it: {why}. To run its source all the same "
        "pass trust=True (--trust)"
    )


def fetch_production(name: str) -> tuple[Path, Manifest]:
    """The release in production, whole: signature, rules, alias, tags, files, evidence and prompts as signed."""
    registered = registry.look_up(name)
    history = histories.of(name, registered.tags, registered.known)
    production.refuse(name, production.registry_checks(registered, history))
    version = next((v for v in registered.versions if v.number == history.production), None)
    if version is None:
        raise UnknownReference(_nothing_in_production(name))
    production.refuse(name, iter([production.evidence_check(history.head.move.evidence if history.head else None)]))
    folder, manifest = registry.fetch_version(version)
    production.refuse(name, production.prompt_checks(version, manifest))
    histories.remember(history)
    return folder, manifest


def fetch_promoted(version: Version, *, trust: bool = False) -> tuple[Path, Manifest]:
    """The release of a version that is or was in production by a promotion that still counts, else as `fetch`."""
    promotion = production.history_of(version.name).promotion_of(version.number)
    try:
        if promotion is None or promotion.move.release != version.release_id:
            raise TrustError(f"{version} was never in production")
        check(promotion.signed, load_trust())
    except TrustError:
        require_trusted(version, trust)
    return registry.fetch_version(version)


def _nothing_in_production(name: str) -> str:
    history = production.history_of(name)
    if history.head is None:
        return f"{name} has no version in production; promote one with `agentkit promote {name}`"
    return f"{name} has no version in production: {histories.describe(history.head)}"


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
        self._system = load(reference)
        self._looked, self._lock = clock.monotonic(), threading.Lock()

    @property
    def system(self) -> System:
        """The release in force, at most `reload_s` seconds old. A run under way keeps the one it started with.

        Raises:
            TrustError: production is not what was signed. ReleaseError: nothing is in production, or it is not intact. A store that does not answer is no reason
                to stop: the release at hand goes on, with a warning, until the next look.
        """
        from mlflow.exceptions import MlflowException

        with self._lock:
            if clock.monotonic() - self._looked >= self._reload_s:
                try:
                    if resolve(self._reference).release_id != self._system.release:
                        self._system = load(self._reference)
                except MlflowException as e:
                    _log.warning(
                        "%s cannot be looked up, release %s goes on: %s", self._reference, self._system.release, e
                    )
                self._looked = clock.monotonic()
            return self._system

    def run(self, **inputs: Any) -> RunRecord:
        """`System.run` of the release in force."""
        return self.system.run(**inputs)


def follow(reference: str, reload_s: float = RELOAD_S) -> Following:
    """A long-running process's handle on `name@production`: promotions and rollbacks reach it within `reload_s`."""
    if "@" not in reference:
        raise UsageError(f"follow an alias, e.g. name@production; {reference!r} never moves")
    return Following(reference, reload_s)
