"""Releases in MLflow: register, resolve, fetch. What is in production, and loading, is `production.py` and `loading.py`.

A release is a version of the registered model `<system>`; its artifacts are the release folder, and each of its
prompts is a version in the prompt registry, linked. Alias meanings: register sets none; `candidate` is what a person
or pipeline asks to be promoted; `production` mirrors the signed history, which only the gate writes.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agentkit.errors import SourceError, TrustError, UsageError
from agentkit.systems import System, adopt
from agentkit_tracking import manifest as manifests
from agentkit_tracking.fetching import check_stored, fetch_folder, fetch_version
from agentkit_tracking.history import DESCRIPTION_LIMIT
from agentkit_tracking.home import author, connect, experiment_id
from agentkit_tracking.keys import load_trust, signing_key
from agentkit_tracking.live import differences
from agentkit_tracking.lookup import (
    Registered,
    Version,
    find_release,
    look_up,
    prompts_of,
    resolve,
    systems,
    versions,
)
from agentkit_tracking.manifest import Manifest, read_release
from agentkit_tracking.rules import PROMPTS, REGISTRATION, TAG
from agentkit_tracking.source import Entry, adopt_from, load_entry, parse_entry, prepared
from agentkit_tracking.statements import Registration, read, sign, signer

__all__ = [
    "CANDIDATE",
    "Registered",
    "Version",
    "check_stored",
    "describe",
    "fetch_folder",
    "fetch_version",
    "find_release",
    "look_up",
    "prompt_text",
    "prompts_of",
    "register",
    "register_file",
    "resolve",
    "store",
    "systems",
    "versions",
]

CANDIDATE = "candidate"
_PROMPT_LIMIT = 100_000  # characters; mlflow takes no longer prompt
_log = logging.getLogger(__name__)
_HOW_TO_PROMOTE = (
    "Releases of the agent system `{0}`. To ask for a promotion, give a version the alias `candidate`; the next "
    "`agentkit promote --candidates` evaluates it and sets `production` if the thresholds are cleared."
)


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
        return _vouched_for(known, manifest)
    metadata = _metadata(entry.root)
    if (signed := _signed_registration(manifest, metadata)) is not None:
        metadata[REGISTRATION] = signed
    prompts = _store_prompts(manifest)
    _create_model(system.name)
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
        for prompt in prompts.values():
            client.link_prompt_version_to_model(prompt["name"], str(prompt["version"]), model.model_id)
        client.finalize_logged_model(model.model_id, "READY")  # sealed: a guarded server lets nothing be changed in it
    # The version comes last: what has a number is complete.
    made = client.create_model_version(
        system.name,
        source=f"models:/{model.model_id}",
        model_id=model.model_id,
        tags={f"{TAG}release_id": release_id, PROMPTS: json.dumps(prompts), **metadata},
        description=describe(manifest, prompts),
    )
    return Version(system.name, int(made.version), release_id, True, dict(made.tags), model_id=model.model_id)


def _vouched_for(known: Version, manifest: Manifest) -> Version:
    """A release that was registered before, by nobody or with a key revoked since, is registered anew by who can sign."""
    tags = known.tags or {}
    present = tags.get(REGISTRATION)
    if present is not None and not _is_revoked(present):
        return known
    if (signed := _signed_registration(manifest, tags)) is None:
        return known
    connect().set_model_version_tag(known.name, str(known.number), REGISTRATION, signed)
    return replace(known, tags={**tags, REGISTRATION: signed})


def _is_revoked(registration: str) -> bool:
    """Whether it was signed with a key that is revoked here."""
    try:
        key = load_trust().find(read(registration, Registration).key_id)
    except TrustError:
        return True
    return key is not None and key.revoked is not None


def _signed_registration(manifest: Manifest, metadata: dict[str, str]) -> str | None:
    """Who registers, signed, where there is a key; without one a release is registered all the same, as nobody's."""
    try:
        key = signing_key()
    except UsageError as e:
        _log.info("registered without a signature: %s", e)
        return None
    said = Registration(
        system=manifest.system,
        release=manifest.release_id,
        time=datetime.now(UTC),
        signer=signer(key),
        commit=metadata.get(f"{TAG}git_commit", "none"),
    )
    return sign(said, key)


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

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain"):
        commit += "+changes"
    return {
        f"{TAG}git_commit": commit or "none",
        f"{TAG}author": os.environ.get("AGENTKIT_AUTHOR") or git("config", "user.name") or author(),
    }


def _store_prompts(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Register each prompt, or find the version that has the same content; short name to name, version, hash."""
    client = connect()
    known = {(p.get("name"), p.get("sha256")): p for v in versions(manifest.system) for p in prompts_of(v).values()}
    stored = {}
    for short, state in manifest.prompts.items():
        name = f"{manifest.system}.{short}"
        digest = manifests.sha256(json.dumps(state, sort_keys=True).encode())
        text = prompt_text(state)
        if (name, digest) not in known or not _holds_text(known[name, digest], text):
            made = client.register_prompt(name, template=text, tags={f"{TAG}sha256": digest})
            known[name, digest] = {"name": name, "version": int(made.version), "sha256": digest}
        stored[short] = known[name, digest]
    return stored


def _holds_text(prompt: dict[str, Any], text: str) -> bool:
    """Whether a prompt version has the text that a version's tag says it has; the tag is anybody's word."""
    from mlflow.exceptions import MlflowException

    try:
        stored = connect().get_prompt_version(str(prompt["name"]), str(prompt["version"]))
    except (MlflowException, KeyError):
        return False
    return stored is not None and bool(stored.template == text)


def prompt_text(state: dict[str, Any]) -> str:
    """A predictor's prompt as people read and compare it: instructions, fields, demonstrations.

    The same text from a live state and from the manifest, whose JSON is sorted.
    """
    lines = [state["signature"]["instructions"].strip(), "", "Fields:"]
    lines += [f"- {f['prefix']} {f['description']}" for f in state["signature"]["fields"]]
    for i, demo in enumerate(state["demos"], 1):
        lines += ["", f"Demonstration {i}:", *(f"- {k}: {v}" for k, v in sorted(demo.items()) if k != "augmented")]
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
