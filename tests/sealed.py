"""For the tests of the guard: a store with what is sealed and its neighbours, and every request that would change it."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient
from releases import furnish

from agentkit_tracking.guard import tracking_store

JOBS = "/ajax-api/3.0/jobs/"


# ---- spellings


def characters(text: str, draw: Any) -> str:
    """A JSON string with some of its characters escaped."""
    made = (f"\\u{ord(c):04x}" if draw.random() < 0.3 and ord(c) < 0x10000 else json.dumps(c)[1:-1] for c in text)
    return '"' + "".join(made) + '"'


def written(value: Any, draw: random.Random) -> str:
    """JSON text of a value with free choice of escapes and space, and with duplicate keys before and after."""
    space = " " * draw.randrange(3)
    match value:
        case dict():
            pairs = list(value.items()) + [(k, "decoy") for k in value if draw.random() < 0.5]
            draw.shuffle(pairs)
            return "{" + f",{space}".join(f"{characters(k, draw)}:{space}{written(v, draw)}" for k, v in pairs) + "}"
        case list():
            return "[" + f",{space}".join(written(v, draw) for v in value) + "]"
        case str():
            return characters(value, draw)
    return json.dumps(value)


CODECS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
# ---- what is sealed


class Sealed:
    """A store with a sealed evaluation, a sealed release, and their neighbours that are not."""

    def __init__(self, home: Path, client: MlflowClient, url: str = "") -> None:
        self.home, self.client, self.url = home, client, url
        self.experiment = client.create_experiment("desk")
        self.run = self._run({"agentkit.kind": "evaluation", "a": "b"}, "FINISHED")
        self.open = self._run({"agentkit.kind": "evaluation"}, "RUNNING")
        self.other = self._run({"agentkit.kind": "batch"}, "FINISHED")
        self.model = self._model("agentkit-release", "READY")
        self.draft = self._model("agentkit-release", None)
        self.foreign = self._model("agent", "READY")

    def _run(self, tags: dict[str, str], status: str) -> str:
        run_id = str(self.client.create_run(self.experiment, tags=tags).info.run_id)
        self.client.log_metric(run_id, "m", 1.0)
        self.client.log_param(run_id, "p", "1")
        if self.url:
            self.client.log_text(run_id, "what happened", "evidence/a.txt")
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        return run_id

    def _model(self, kind: str, status: str | None) -> str:
        model = self.client.create_logged_model(self.experiment, model_type=kind, tags={"a": "b"}, params={"p": "1"})
        if self.url:
            (self.home / "manifest.json").write_text("{}")
            self.client.log_model_artifact(model.model_id, str(self.home / "manifest.json"))
        if status is not None:
            self.client.finalize_logged_model(model.model_id, status)
        return str(model.model_id)

    def state(self) -> str:
        return state_of(self.home, self.run, self.model, "'desk'")


def state_of(home: Path, *names: str) -> str:
    """A hash of every row and file in which one of the names appears."""
    with sqlite3.connect(home / "mlflow.db") as db:
        tables = {t for (t,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        rows = [
            (table, row)
            for table in sorted(tables - {"logged_model_metrics", "model_versions"})  # which may be added to
            for row in sorted(map(repr, db.execute(f'SELECT * FROM "{table}"')))
            if any(name in row.lower() for name in names)
        ]
    files = [(str(f), f.read_bytes()) for f in sorted((home / "artifacts").rglob("*")) if f.is_file()]
    assert rows
    return hashlib.sha256(repr((rows, [f for f in files if any(n in f[0] for n in names)])).encode()).hexdigest()


@contextmanager
def handled_in(home: Path) -> Iterator[Sealed]:
    """MLflow's Flask application on a guarded store, in this process."""
    from mlflow.server import handlers

    store = tracking_store.GuardedTrackingStore(f"sqlite:///{furnish(home) / 'mlflow.db'}", str(home / "artifacts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handlers, "_tracking_store", store)
        yield Sealed(home, MlflowClient(f"sqlite:///{home / 'mlflow.db'}"))


def attacks(run: str, model: str, experiment: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Every tracking route that changes a run, a logged model or an experiment, with a body that would."""
    tag, when = {"key": "a", "value": "forged"}, 1_800_000_000_000
    metric = {"key": "m", "value": 0.99, "timestamp": when, "step": 0}
    data = {"dataset": {"name": "d", "digest": "1", "source_type": "local", "source": "s"}}
    flavor = json.dumps({"run_id": run, "artifact_path": "m", "utc_time_created": "2026-01-01 00:00:00", "flavors": {}})
    return [
        ("POST", "2.0/mlflow/runs/update", {"run_id": run, "status": "RUNNING"}),
        ("POST", "2.0/mlflow/runs/update", {"run_uuid": run, "run_id": run, "run_name": "forged"}),
        ("POST", "2.0/mlflow/runs/update", {"run_id": run, "end_time": 1}),
        ("POST", "2.0/mlflow/runs/delete", {"run_id": run}),
        ("POST", "2.0/mlflow/runs/set-tag", {"run_id": run, **tag}),
        ("POST", "2.0/mlflow/runs/set-tag", {"run_id": run, "key": "mlflow.runName", "value": "forged"}),
        ("POST", "2.0/mlflow/runs/delete-tag", {"run_id": run, "key": "a"}),
        ("POST", "2.0/mlflow/runs/delete-tag", {"run_id": run, "key": "agentkit.kind"}),
        ("POST", "2.0/mlflow/runs/log-metric", {"run_id": run, **metric}),
        ("POST", "2.0/mlflow/runs/log-parameter", {"run_id": run, "key": "q", "value": "forged"}),
        ("POST", "2.0/mlflow/runs/log-batch", {"run_id": run, "metrics": [metric], "tags": [tag]}),
        ("POST", "2.0/mlflow/runs/log-batch", {"run_id": run, "params": [{"key": "q", "value": "forged"}]}),
        ("POST", "2.0/mlflow/runs/log-inputs", {"run_id": run, "datasets": [data]}),
        ("POST", "2.0/mlflow/runs/log-inputs", {"run_id": run, "models": [{"model_id": model}]}),
        ("POST", "2.0/mlflow/runs/outputs", {"run_id": run, "models": [{"model_id": model, "step": 1}]}),
        ("POST", "2.0/mlflow/runs/log-model", {"run_id": run, "model_json": flavor}),
        ("POST", "2.0/mlflow/traces/link-to-run", {"run_id": run, "trace_ids": ["tr-1"]}),
        ("POST", "2.0/mlflow/experiments/delete", {"experiment_id": experiment}),
        ("POST", "2.0/mlflow/experiments/update", {"experiment_id": experiment, "new_name": "forged"}),
        ("POST", "2.0/mlflow/experiments/create", {"name": "in a run", "artifact_location": f"mlflow-artifacts:/1/{run}/artifacts"}),
        ("POST", "2.0/mlflow/experiments/create", {"name": "in a model", "artifact_location": f"/tmp/x/{quote(model.upper())}/y"}),
        ("DELETE", f"2.0/mlflow/logged-models/{model}", {}),
        ("PATCH", f"2.0/mlflow/logged-models/{model}", {"model_id": model, "status": "LOGGED_MODEL_UPLOAD_FAILED"}),
        ("PATCH", "2.0/mlflow/logged-models/m-another", {"model_id": model, "status": "LOGGED_MODEL_PENDING"}),
        ("PATCH", f"2.0/mlflow/logged-models/{model}/tags", {"tags": [tag]}),
        ("PATCH", f"2.0/mlflow/logged-models/{model}/tags", {"tags": [{"key": "mlflow.modelVersions", "value": "[]"}]}),
        ("DELETE", f"2.0/mlflow/logged-models/{model}/tags/a", {}),
        ("POST", f"2.0/mlflow/logged-models/{model}/params", {"model_id": model, "params": [{"key": "q", "value": "1"}]}),
    ]  # fmt: skip
