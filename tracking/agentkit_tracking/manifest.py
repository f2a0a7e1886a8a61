"""The release manifest: everything that decides what a system does, in one file with one hash.

Git commit, author and time are metadata beside it, so unchanged content is the same release. Thresholds and golden
data are no part of it: authors do not choose their own bar; their hashes stand in the evidence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentkit.errors import ReleaseError
from agentkit.models import load_settings, resolve_name
from agentkit.systems import System
from agentkit_tracking.source import Entry, collect_files, released_content

MANIFEST, WEIGHTS, SOURCE = "manifest.json", "weights.safetensors", "source"
LOCK = "requirements.lock"
# Versions that change what the embedded model or DSPy's prompts come out as.
_PACKAGES = ("agentkit-hedgehog", "dspy", "numpy", "pydantic", "scikit-learn", "scipy")
_SECRET = re.compile(r"key|secret|password|credential|auth|headers|token$", re.I)  # `max_tokens` is none


def sha256(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def differing(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path and both values of whatever differs between two trees of dictionaries."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from differing(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
    elif before != after:
        yield path, before, after


class Manifest(BaseModel):
    """What a release is. All hashes are hex SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    system: str
    entry: str = Field(description="file:name of the factory, below `source`")
    model: str = Field(description="model string the calls go to")
    parameters: dict[str, Any] = Field(description="arguments of the model, keys and other secrets excluded")
    spec: dict[str, Any] = Field(description="agents, tool schemas and permissions, budget, metrics")
    prompts: dict[str, dict[str, Any]] = Field(description="DSPy state of every predictor")
    weights: str | None = Field(description="hash of the embedded model's weights file")
    files: dict[str, str] = Field(description="source and data files, path to hash")
    lock: str | None = Field(description="hash of the dependency lock file")
    packages: dict[str, str]

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8."""
        data = self.model_dump(mode="json")
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def release_id(self) -> str:
        """The content hash."""
        return sha256(self.to_bytes())


def build(system: System, entry: Entry) -> tuple[Manifest, dict[str, Path], bytes | None]:
    """The manifest of a system, its files by path, and its weights file."""
    files = collect_files(entry, system.files)
    weights = system.weights.to_bytes() if system.weights is not None else None
    settings = load_settings()
    model = resolve_name(system.model, settings)
    lock = entry.root / LOCK
    manifest = Manifest(
        system=system.name,
        entry=str(entry),
        model=model,
        parameters={k: v for k, v in settings.options.get(model, {}).items() if not is_secret(k)},
        spec=system.spec(),
        prompts={name: _state(state) for name, state in system.prompts().items()},
        weights=None if weights is None else sha256(weights),
        files={path: sha256(_content(path, file, str(entry))) for path, file in files.items()},
        lock=sha256(lock.read_bytes()) if lock.is_file() else None,
        packages=installed_packages(),
    )
    return manifest, files, weights


def _content(path: str, file: Path, entry: str) -> bytes:
    """What a release keeps of a file: all of it; of the notebook that defines the system what defines it."""
    return released_content(file) if path == entry.rpartition(":")[0] else file.read_bytes()


def is_secret(option: str) -> bool:
    """Whether a model option is this machine's secret and no part of a release."""
    return _SECRET.search(option) is not None


def installed_packages() -> dict[str, str]:
    """Versions of the packages that decide what a release answers."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(package)
    except PackageNotFoundError:  # agentkit run from a checkout that is not installed
        return "unknown"


def _state(state: dict[str, Any]) -> dict[str, Any]:
    """A predictor's state without traces of its making; through JSON, so that nothing else can hide in it."""
    kept = {key: state[key] for key in ("signature", "demos", "fields") if key in state}
    return dict(json.loads(json.dumps(kept, default=str)))


def _is(file: Path, digest: str) -> bool:
    return not file.is_symlink() and file.is_file() and sha256(file.read_bytes()) == digest


def write_release(folder: Path, manifest: Manifest, files: dict[str, Path], weights: bytes | None) -> None:
    """Lay a release out as files: manifest.json, weights.safetensors, source/…"""
    folder.mkdir(parents=True)
    for path, file in files.items():
        target = folder / SOURCE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_content(path, file, manifest.entry))
    if weights is not None:
        (folder / WEIGHTS).write_bytes(weights)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())


def read_release(folder: Path, release_id: str | None = None, *, called: str | None = None) -> Manifest:
    """Check every file of a release folder against its manifest, before anything in it is executed.

    Args:
        release_id: the content hash it must have; None takes any.
        called: what messages call the folder, instead of its path.

    Raises:
        ReleaseError: a file is missing, altered or unknown to the manifest (cached bytecode and links included), or
            the hash is not `release_id`.
    """
    path, place = folder / MANIFEST, called or str(folder)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as e:
        raise ReleaseError(f"{place} is no release: {MANIFEST} cannot be read ({e.strerror})") from e
    except ValidationError as e:
        raise ReleaseError(f"{MANIFEST} in {place} is not a release manifest: {e.errors()[0]['msg']}") from e
    if release_id is not None and manifest.release_id != release_id:
        raise ReleaseError(
            f"the manifest in {place} has hash {manifest.release_id[:12]}, expected {release_id[:12]}: it was altered"
        )
    if manifest.entry.rpartition(":")[0] not in manifest.files:
        raise ReleaseError(f"the manifest in {place} names an entry {manifest.entry!r} that is none of its files")
    expected = {f"{SOURCE}/{p}": h for p, h in manifest.files.items()}
    if manifest.weights is not None:
        expected[WEIGHTS] = manifest.weights
    things = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p != path}
    found = {name: p for name, p in things.items() if p.is_symlink() or not p.is_dir()}
    wrong = [f"missing: {n}" for n in sorted(expected.keys() - found.keys())]
    wrong += [f"not in the manifest: {n}" for n in sorted(found.keys() - expected.keys())]
    wrong += [f"altered: {n}" for n in sorted(expected.keys() & found.keys()) if not _is(found[n], expected[n])]
    if wrong:
        raise ReleaseError(
            f"release {manifest.release_id[:12]} of {manifest.system} in {place} is not intact: {'; '.join(wrong)}"
        )
    return manifest
