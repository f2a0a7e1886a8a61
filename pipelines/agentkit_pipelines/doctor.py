"""Looks at the machine and the stores, and says what to do."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from agentkit.errors import AgentkitError, ReleaseError, UsageError

_PACKAGES = ("dspy", "mlflow", "duckdb", "polars", "papermill", "marimo", "scikit-learn", "jupyterlab")
_KEYS = {"openai", "anthropic", "gemini", "groq"}  # whose variable is surely PROVIDER_API_KEY
_NO_KEY = {"embedded", "ollama", "ollama_chat"}
_MIN_FREE_GB = 1.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `advice` says what to do where the level is not ok."""

    level: Literal["ok", "warn", "bad"]
    what: str
    advice: str = ""


def examine(*, port: int = 5000, repair: bool = False) -> list[Finding]:
    """All findings, in the order in which a user would want to mend them."""
    return [*_python(), *_packages(), *_home(), *_models(), *_keys(), *_store(repair), *_port(port)]


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {'.'.join(map(str, sys.version_info[:3]))}, {os.cpu_count()} cores")
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        yield Finding(
            "warn", "PYTHONDONTWRITEBYTECODE is set", "unset it: without bytecode every start takes twice as long"
        )


def _packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield Finding("ok", f"{name} {version(name)}")
        except PackageNotFoundError:
            extra = "agentkit-hedgehog[lab]" if name == "jupyterlab" else "agentkit-hedgehog"
            yield Finding(
                "warn" if name == "jupyterlab" else "bad", f"{name} is not installed", f"pip install '{extra}'"
            )


def _home() -> Iterator[Finding]:
    from agentkit_tracking.home import home

    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        yield Finding("bad", f"{folder} cannot be written ({e.strerror})", "set AGENTKIT_HOME to a folder that can")
        return
    free = shutil.disk_usage(folder).free / 1e9
    level: Literal["ok", "warn"] = "ok" if free >= _MIN_FREE_GB else "warn"
    yield Finding(level, f"home {folder}, {free:.1f} GB free", "" if level == "ok" else "free some space")


def _models() -> Iterator[Finding]:
    from agentkit.models import EMBEDDED, load_settings, resolve_name

    try:
        settings = load_settings()
        tiers = {tier: resolve_name(tier, settings) for tier in sorted({"fast", "strong", *settings.models})}
    except AgentkitError as e:
        yield Finding("bad", str(e), "mend agentkit.toml, or unset AGENTKIT_LM")
        return
    for tier, model in tiers.items():
        provider = model.split("/")[0]
        key = f"{provider.upper()}_API_KEY"
        has_key = provider in _NO_KEY or os.environ.get(key) or "api_key" in settings.options.get(model, {})
        if not has_key and provider in _KEYS:
            yield Finding("bad", f"model tier {tier} is {model}, but {key} is not set", f"export {key}=…")
        elif not has_key:
            yield Finding(
                "warn", f"model tier {tier} is {model}; {key} is not set", "set the key your provider asks for"
            )
        else:
            note = " (in process, no LLM)" if model == EMBEDDED else ""
            yield Finding("ok", f"model tier {tier}: {model}{note}")


def _store(repair: bool) -> Iterator[Finding]:
    from mlflow.exceptions import MlflowException

    from agentkit_tracking import registry
    from agentkit_tracking.home import tracking_uri

    try:
        names = registry.systems()
    except AgentkitError as e:
        yield Finding("bad", str(e))
        return
    yield Finding("ok", f"MLflow store {tracking_uri()}: {len(names)} systems; {enforcement()}")
    for name in names:
        try:
            yield from _production(name, repair)
        except (AgentkitError, MlflowException) as e:
            advice = f"agentkit verify {name}@production; agentkit rollback {name}, or promote a version"
            is_trust = isinstance(e, UsageError) and not isinstance(e, ReleaseError)  # no system's fault
            yield Finding("bad", f"{name}@production: {str(e).splitlines()[0]}", "" if is_trust else advice)


def enforcement() -> str:
    """Where `production` is enforced by the store in use: by a server that refuses, or by those who load."""
    from mlflow.exceptions import MlflowException

    from agentkit_tracking.home import connect, tracking_uri

    store = connect()._get_registry_client().store  # MlflowClient itself would look for the model first
    try:  # no such model exists; a guarded store refuses before it looks
        store.set_registered_model_alias("agentkit.probe", "production", "1")
    except MlflowException as e:
        if "means signed evidence here" in str(
            e
        ):  # no other server's refusal: MLflow's own users may lack the permission
            is_file = tracking_uri().startswith("sqlite:")
            here = " (for agentkit and `agentkit ui`; others can open the file)" if is_file else ""
            return f"`production` is enforced by the store{here} and at load"
    return "`production` is enforced at load only"


def _production(name: str, repair: bool) -> Iterator[Finding]:
    """A system's history, the release in production and what mirrors them."""
    from agentkit_tracking import loading, mirrors, production, registry

    if repair and (restored := mirrors.restore(name)):
        yield Finding("ok", f"{name}: {restored} lost entries of the history restored from this machine's copy")
    history = production.history_of(name)
    if history.head is None and "production" not in registry.look_up(name).aliases:
        return
    mended = mirrors.mirror(history) if repair else 0
    version = production.find_production(name)
    if version is None:
        yield Finding("ok", f"{name}: nothing in production")
        return
    loading.fetch_production(name)
    by = f", signed by {history.head.who}" if history.head else ""
    yield Finding("ok", f"{name}@production is {version}, release {version.release_id[:12]}, intact{by}")
    wrong = mirrors.prompts_wrong(registry.look_up(name), history)
    if wrong:
        yield Finding("warn", f"{name}: {len(wrong)} prompt aliases differ from production", "agentkit doctor --repair")
    elif mended:
        yield Finding("ok", f"{name}: {mended} aliases or texts that did not mirror the history; mended")


def _keys() -> Iterator[Finding]:
    from agentkit_tracking.home import is_local_store
    from agentkit_tracking.keys import load_trust, signing_key, trust_path

    try:
        trust = load_trust()
        if not trust_path().exists() and is_local_store():
            yield Finding("ok", "no signing key yet; the first registration or promotion makes a local one")
            return
        found = ", ".join(f"{k.id} {k.owner} ({k.status})" for k in trust.keys) or "none"
        yield Finding("ok", f"trusted keys in {trust_path()}: {found}")
        key = signing_key().public
        note = ": local, vouches for this machine only" if key.local else ""
        yield Finding("ok", f"signing key {key.id} of {key.owner}{note}")
    except AgentkitError as e:
        yield Finding("warn", str(e), "agentkit keys --help; without a key you can load and verify, not promote")


def _port(port: int) -> Iterator[Finding]:
    with socket.socket() as s:
        s.settimeout(0.5)
        taken = s.connect_ex(("127.0.0.1", port)) == 0
    if taken:
        yield Finding(
            "warn", f"port {port} is taken", f"`agentkit ui --port {port + 1}`, or it is the UI already running"
        )
    else:
        yield Finding("ok", f"port {port} is free for `agentkit ui`")
