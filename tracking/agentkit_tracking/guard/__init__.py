"""What an MLflow server runs so that `production` means evidence, by every route.

mlflow server --backend-store-uri sqlite:///mlflow.db --registry-store-uri agentkit-sqlite:///mlflow.db --app-name agentkit

`postgresql+psycopg2://…` with `agentkit-postgresql+psycopg2://…` likewise.
"""

from __future__ import annotations

from typing import Any

SCHEME = "agentkit-"


def open_store(store_uri: str) -> Any:
    """Entry point of MLflow's registry-store plugins; light, since MLflow loads it on every import."""
    from agentkit_tracking.guard.registry_store import GuardedStore

    return GuardedStore(store_uri.removeprefix(SCHEME))
