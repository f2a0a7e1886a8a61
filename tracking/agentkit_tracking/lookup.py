"""Finding what is registered: systems, their versions, and the version that a reference means."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agentkit.errors import TrustError, UnknownReference
from agentkit_tracking.history import seen
from agentkit_tracking.home import connect
from agentkit_tracking.rules import PROMPTS, REGISTRATION, TAG


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
    stage: str = "None"  # MLflow's old stages; ours are aliases
    description: str = ""

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"


@dataclass(frozen=True)
class Registered:
    """A system as the registry holds it. Its history is among the tags."""

    name: str
    tags: dict[str, str]
    aliases: dict[str, int]
    versions: list[Version]  # oldest first
    known: list[str] | None = None  # entries of the history that this machine had seen before it looked

    @property
    def registrations(self) -> dict[int, str]:
        """The signed registration of each version that has one."""
        return {v.number: tags[REGISTRATION] for v in self.versions if REGISTRATION in (tags := v.tags or {})}


def versions(name: str) -> list[Version]:
    """All versions of a system, oldest first; empty if there is none."""
    return look_up(name).versions


def look_up(name: str) -> Registered:
    """A system's tags, aliases and versions; all empty if there is none of that name."""
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(r"\w+", name):
        raise UnknownReference(f"{name!r} is no system's name; give the name alone, without @alias or /number")
    client, known = connect(), None
    with suppress(TrustError):  # said where the history is read
        known = seen(name)
    try:
        model = client.get_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":  # a store that is down is not an empty one
            raise
        return Registered(name, {}, {}, [], known)
    aliases: dict[int, list[str]] = {}
    for alias, number in model.aliases.items():
        aliases.setdefault(int(number), []).append(alias)
    found = []
    page: Any = None
    while page is None or page.token:
        page = client.search_model_versions(f"name='{name}'", max_results=1000, page_token=page.token if page else None)
        found += [_version(v, aliases) for v in page]
    named = {alias: int(number) for alias, number in model.aliases.items()}
    return Registered(name, dict(model.tags), named, sorted(found, key=lambda v: v.number), known)


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
        v.current_stage or "None",
        v.description or "",
    )


def prompts_of(version: Version) -> dict[str, dict[str, Any]]:
    """A version's prompts: short name to name, version and sha256 in MLflow's prompt registry."""
    try:
        found = json.loads((version.tags or {}).get(PROMPTS, "{}"))
    except ValueError:  # anybody may make a version; what is in production names its hash
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


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
