"""Where agentkit's records and releases live: run log (DuckDB), MLflow traces and registry, manifests, signatures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentkit_tracking.home import connect
    from agentkit_tracking.loading import fetch, follow, load
    from agentkit_tracking.manifest import Manifest
    from agentkit_tracking.registry import Version, register, versions
    from agentkit_tracking.runlog import RunLog

_HOME = {
    "Manifest": "manifest",
    "RunLog": "runlog",
    "Version": "registry",
    "connect": "home",
    "fetch": "loading",
    "follow": "loading",
    "load": "loading",
    "register": "registry",
    "versions": "registry",
}
__all__ = ["Manifest", "RunLog", "Version", "connect", "fetch", "follow", "load", "register", "versions"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: mlflow and duckdb are heavy (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'agentkit_tracking' has no attribute {name!r}")
    value = getattr(import_module(f"agentkit_tracking.{_HOME[name]}"), name)
    globals()[name] = value
    return value
