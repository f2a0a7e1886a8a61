"""The guarded tracking store behind MLflow's own handlers, in this process: what is sealed cannot be changed."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from sealed import CODECS, Sealed, attacks, handled_in, written

from agentkit_tracking.guard import tracking_store


@pytest.fixture(scope="module")
def handled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sealed]:
    with handled_in(tmp_path_factory.mktemp("handled")) as sealed:
        yield sealed


def post(method: str, path: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    from mlflow.server import app

    answer = app.test_client().open(path, method=method, data=body, content_type=kind)
    return answer.status_code, answer.get_data(as_text=True)


ATTACKS = range(len(attacks("", "", "")))


@pytest.mark.parametrize("api", ["api", "ajax-api"])
@pytest.mark.parametrize("number", ATTACKS)
def test_each_tracking_route_refuses(handled: Sealed, number: int, api: str) -> None:
    method, path, body = attacks(handled.run, handled.model, handled.experiment)[number]
    before = handled.state()
    status, said = post(method, f"/{api}/{path}", json.dumps(body).encode())
    assert status == 403, said
    assert json.loads(said)["error_code"] == "PERMISSION_DENIED"
    assert "agentkit promote" in json.loads(said)["message"]
    assert handled.state() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.sampled_from(ATTACKS),
    nested=st.integers(0, 2),
    codec=st.sampled_from(CODECS),
    kind=st.sampled_from(
        ["application/json", "application/json; charset=utf-16", "text/plain", "", "multipart/form-data"]
    ),
    method=st.sampled_from(["POST", "PATCH", "DELETE", "PUT", "post", "delete"]),
    camel=st.booleans(),
    draw=st.randoms(use_true_random=False),
)
def test_no_spelling_of_a_request_changes_what_is_sealed(
    handled: Sealed, number: int, nested: int, codec: str, kind: str, method: str, camel: bool, draw: random.Random
) -> None:
    _, path, body = attacks(handled.run, handled.model, handled.experiment)[number]
    before = handled.state()
    if camel:  # which protobuf takes, too
        body = {k[0] + k.title().replace("_", "")[1:]: v for k, v in body.items()}
    text = written(body, draw).replace(handled.run, draw.choice([handled.run, handled.run.upper(), handled.run + " "]))
    for _ in range(nested):
        text = written(text, draw)
    post(method, f"/api/{path}", text.encode(codec), kind)
    assert handled.state() == before


@pytest.mark.parametrize("which", ["open", "other"])
def test_runs_that_are_no_ended_evaluation_are_free(handled: Sealed, which: str) -> None:
    run = getattr(handled, which)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("set-tag", {"key": "x", "value": handled.run}),
        ("log-parameter", {"key": "x", "value": "1"}),
        ("log-metric", {"key": "x", "value": 1, "timestamp": 1, "model_id": handled.model}),
        ("log-batch", {"metrics": [{"key": "x", "value": 1, "timestamp": 1, "model_id": handled.model}]}),
        ("log-batch", {"tags": [{"key": "agentkit.kind", "value": "evaluation"}] if which == "open" else []}),
        ("log-inputs", {"models": [{"model_id": handled.model}]}),
        ("outputs", {"models": [{"model_id": handled.foreign, "step": 1}]}),
        ("delete-tag", {"key": "x"}),
        ("delete", {}),
        ("restore", {}),
    ]
    for path, body in changes:
        status, said = post("POST", f"/api/2.0/mlflow/runs/{path}", json.dumps({"run_id": run, **body}).encode())
        assert status == 200, (path, said)


def test_an_evaluation_cannot_lose_the_mark_by_which_it_will_be_sealed(handled: Sealed) -> None:
    mark = {"key": "agentkit.kind", "value": "other"}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("delete-tag", {"key": mark["key"]}),
        ("set-tag", mark),
        ("log-batch", {"tags": [mark]}),
    ]
    for path, body in changes:
        status, said = post(
            "POST", f"/api/2.0/mlflow/runs/{path}", json.dumps({"run_id": handled.open, **body}).encode()
        )
        assert status == 403, said
    assert handled.client.get_run(handled.open).data.tags["agentkit.kind"] == "evaluation"
    body = {"run_id": handled.open, "key": "x", "value": "free still"}
    assert post("POST", "/api/2.0/mlflow/runs/set-tag", json.dumps(body).encode())[0] == 200


@pytest.mark.parametrize("which", ["draft", "foreign"])
def test_models_that_are_no_ready_release_are_free(handled: Sealed, which: str) -> None:
    model = getattr(handled, which)
    body = {"tags": [{"key": "x", "value": handled.model}]}
    assert post("PATCH", f"/api/2.0/mlflow/logged-models/{model}/tags", json.dumps(body).encode())[0] == 200
    assert post("DELETE", f"/api/2.0/mlflow/logged-models/{model}/tags/x", b"")[0] == 200


def test_experiments_without_anything_sealed_are_free(handled: Sealed) -> None:
    name = f"free {time.time_ns()}"
    _, said = post("POST", "/api/2.0/mlflow/experiments/create", json.dumps({"name": name}).encode())
    number = json.loads(said)["experiment_id"]
    for path, body in [("update", {"new_name": f"{name}er"}), ("delete", {}), ("restore", {})]:
        body = {"experiment_id": number, **body}
        assert post("POST", f"/api/2.0/mlflow/experiments/{path}", json.dumps(body).encode())[0] == 200


def test_a_store_that_cannot_be_asked_refuses(handled: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("no connection", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(tracking_store, "_evaluations", fail)
    before = handled.state()
    body = {"run_id": handled.other, "key": "x", "value": "y"}
    assert post("POST", "/api/2.0/mlflow/runs/set-tag", json.dumps(body).encode())[0] == 503
    assert handled.state() == before
    assert "x" not in handled.client.get_run(handled.other).data.tags


def test_a_job_that_was_queued_in_time_cannot_delete_the_run_later(handled: Sealed) -> None:
    """MLflow deletes a run with the optimisation job that names it, in a request that does not name the run."""
    from mlflow.server import handlers

    with pytest.raises(MlflowException, match="agentkit protects"):
        handlers._get_tracking_store().delete_run(handled.run)


def test_the_server_notes_on_a_sealed_model_which_versions_it_became(handled: Sealed) -> None:
    from mlflow.server import handlers

    store = handlers._get_tracking_store()
    for version in (1, 2, 2):
        store.set_model_versions_tags("desk", version, handled.model)
    noted = json.loads(store.get_logged_model(handled.model).tags["mlflow.modelVersions"])
    assert noted == [{"name": "desk", "version": 1}, {"name": "desk", "version": 2}]


def test_which_methods_are_guarded_is_known() -> None:
    """A later MLflow that has more of them shows here; they are guarded already."""
    assert set(tracking_store.GUARDED) == {
        "delete_logged_model", "delete_logged_model_tag", "delete_run", "delete_tag", "finalize_logged_model",
        "link_traces_to_run", "log_batch", "log_batch_async", "log_inputs", "log_logged_model_params", "log_metric",
        "log_metric_async", "log_outputs", "log_param", "log_param_async", "record_logged_model",
        "set_logged_model_tags", "set_tag", "set_tag_async", "unlink_traces_from_run", "update_run_info",
    }  # fmt: skip


def test_graphql_changes_nothing() -> None:
    from mlflow.server.graphql.graphql_schema_extensions import schema

    searches = {"mlflowSearchDatasets", "mlflowSearchRuns"}
    assert set(schema.graphql_schema.mutation_type.fields) == {*searches, "testMutation"}


KNOWN_FAMILIES = {
    "artifacts", "datasets", "demo", "experiments", "gateway", "gateway-proxy", "genai", "issues", "jobs",
    "label-schemas", "logged-models", "mlflow-artifacts", "model-versions", "prompt-optimization",
    "registered-models", "review-queues", "runs", "scorer", "scorers", "traces", "ui-telemetry", "upload-artifact",
    "webhooks", "workspaces", "graphql",
}  # fmt: skip


def test_which_families_of_routes_change_something_is_known() -> None:
    """One that a later MLflow adds is judged strictly; whether that is right is for a person to see."""
    from mlflow.server import app

    families = set()
    for rule in app.url_map.iter_rules():
        if set(rule.methods or ()) - {"GET", "HEAD", "OPTIONS"}:
            parts = rule.rule.strip("/").split("/")
            family = parts[3] if len(parts) > 3 and parts[2] == "mlflow" else parts[2] if len(parts) > 2 else parts[0]
            families.add(family)
    assert families - {"mlflow", "users", "experiments"} <= KNOWN_FAMILIES, families - KNOWN_FAMILIES
