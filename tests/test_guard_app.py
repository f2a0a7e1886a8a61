"""A guarded server lets nobody change or delete the evidence and the releases that production rests on."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, RunTag
from mlflow.exceptions import MlflowException
from releases import SHOUT, furnish
from sealed import JOBS, Sealed, attacks, handled_in, state_of
from servers import mlflow_server, start

from agentkit_tracking.guard import app as guards

ADMIN = ("admin", "correct-horse-battery")
PATIENCE = 60.0  # seconds; a busy machine is slow, not wrong


@pytest.fixture(scope="module")
def handled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sealed]:
    with handled_in(tmp_path_factory.mktemp("handled")) as sealed:
        yield sealed


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sealed]:
    """A guarded server with two workers: what one is told, the other has to know."""
    home = furnish(tmp_path_factory.mktemp("guarded"))
    arguments = (*registry(home), "--app-name", "agentkit")
    with mlflow_server(home, *arguments, workers=2, AGENTKIT_TRUST=str(home / "trust.json")) as url:
        yield Sealed(home, MlflowClient(url), url)


def registry(home: Path) -> tuple[str, str]:
    return ("--registry-store-uri", f"agentkit-sqlite:///{home / 'mlflow.db'}")


@pytest.fixture
def untouched(guarded: Sealed) -> Iterator[Sealed]:
    """The server; at the end of the test, what is sealed must be as it was."""
    before = guarded.state()
    yield guarded
    assert guarded.state() == before


def web(method: str, url: str, **more: Any) -> httpx.Response:
    return httpx.request(method, url, timeout=PATIENCE, **more)


def raw(url: str, method: str, path: str, body: bytes = b"") -> int:
    """The status of a request whose path goes out as it is; httpx would tidy it up."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()


slow = pytest.mark.slow
API = ("/api", "/ajax-api")


@slow
def test_the_guard_says_that_it_is_there(guarded: Sealed) -> None:
    assert web("GET", f"{guarded.url}/agentkit/guard").json() == {"guard": True, "registry": True}


@slow
@pytest.mark.parametrize("api", API)
def test_a_server_refuses_each_tracking_route(untouched: Sealed, api: str) -> None:
    for method, path, body in attacks(untouched.run, untouched.model, untouched.experiment):
        answer = web(method, f"{untouched.url}{api}/{path}", json=body)
        assert (answer.status_code, answer.json()["error_code"]) == (403, "PERMISSION_DENIED"), (path, answer.text)
        assert "`agentkit promote`" in answer.json()["message"]


@slow
@pytest.mark.parametrize("api", API)
def test_a_server_refuses_to_write_or_delete_sealed_artifacts(untouched: Sealed, api: str) -> None:
    run, model, experiment = untouched.run, untouched.model, untouched.experiment
    folders = [f"{experiment}/{run}/artifacts", f"{experiment}/models/{model}/artifacts"]
    here = f"{api}/2.0/mlflow-artifacts"
    for folder in folders:
        for path in (folder, f"{folder}/evidence/a.txt", f"{folder}/new", f"./{folder}/x", folder.upper() + "/x",
                     folder.replace(run, quote(quote("".join(f"%{ord(c):02x}" for c in run)))) + "/x",
                     folder.replace("/artifacts", "%2Fartifacts%252Fx"), folder[:9] + "%09" + folder[9:] + "/x"):  # fmt: skip
            for method in ("PUT", "DELETE"):
                assert web(method, f"{untouched.url}{here}/artifacts/{path}", content=b"forged").status_code in (
                    400,
                    403,
                )
        for step in ("create", "complete", "abort"):
            answer = web("POST", f"{untouched.url}{here}/mpu/{step}/{folder}", json={"path": "a.txt", "num_parts": 1})
            assert answer.status_code == 403
        assert (
            web("PUT", f"{untouched.url}{here}/artifacts/{folder}/new", content=b"x").json()["error_code"]
            == "PERMISSION_DENIED"
        )
    for above in (experiment, f"{experiment}/", f"./{experiment}", f"{experiment}/models", f"%2e/{experiment}", quote(f"%2e/{experiment}"),
                  f"{experiment}/{run}", ".", ""):  # fmt: skip
        assert raw(untouched.url, "DELETE", f"{here}/artifacts/{above}") == 403, above
    ours = f"{untouched.url}{api}/2.0/mlflow"
    for query in (
        f"run_uuid={run}&path=evidence/a.txt",
        f"path=x&run%5Fuuid={run}",
        f"run_uuid=%{ord(run[0]):02x}{run[1:]}&path=x",
    ):
        assert web("POST", f"{ours}/upload-artifact?{query}", content=b"forged").status_code == 403
    for named in ({"run_id": run}, {"model_id": model}, {"runId": untouched.open}, {"modelId": untouched.draft}):
        answer = web("POST", f"{ours}/artifacts/presigned-upload-url", json={**named, "path": "x"})
        assert answer.status_code == 403, answer.text


@slow
def test_a_server_refuses_whatever_the_request_looks_like(untouched: Sealed) -> None:
    run, there = untouched.run, f"{untouched.url}/api/2.0/mlflow/runs"
    plain = json.dumps({"run_id": run})

    def pieces() -> Iterator[bytes]:
        yield from (plain[:20].encode(), plain[20:].encode())

    bodies: list[Any] = [
        plain.encode(),
        json.dumps(plain).encode(),
        plain.encode("utf-16"),
        plain.encode("utf-32-le"),
        f'{{"run_id": "{"0" * 32}", "run_id": "{run}"}}'.encode(),
        f'{{"run_id": "{run}", "run_id": "{"0" * 32}"}}'.encode(),
        f'{{"runId": "{run}"}}'.encode(),
        json.dumps({"run_id": run.upper()}).encode(),
        pieces(),
    ]
    for body in bodies:
        answer = web("POST", f"{there}/delete", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 403, 404), answer.text
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json;charset=utf-7"):
        answer = web("POST", f"{there}/delete", content=plain, headers={"Content-Type": kind})
        assert answer.status_code in (400, 403)
    for path in ("//delete", "/./delete", "/%64elete", "/delete/", "/delete?run_id=x", "/delete%3Fx"):
        answer = web("POST", there + path, json={"run_id": run}, follow_redirects=True)
        assert answer.status_code in (400, 403, 404, 405), (path, answer.text)
        status = raw(untouched.url, "POST", f"/api/2.0/mlflow/runs{path}", json.dumps({"run_id": run}).encode())
        assert status in (308, 400, 403, 404, 405), path
    for method in ("GET", "HEAD", "PUT", "PATCH", "delete", "POST"):
        headers = {"X-HTTP-Method-Override": "POST"}
        assert web(method, f"{there}/delete", content=plain, headers=headers).status_code >= 400


@slow
def test_the_sdk_shows_why(untouched: Sealed) -> None:
    client, run, model = untouched.client, untouched.run, untouched.model
    refused: list[Callable[[], Any]] = [
        lambda: client.set_tag(run, "a", "forged"),
        lambda: client.delete_tag(run, "a"),
        lambda: client.log_metric(run, "m", 0.99),
        lambda: client.log_param(run, "q", "forged"),
        lambda: client.log_batch(run, metrics=[Metric("m", 0.99, 1, 0)], tags=[RunTag("a", "forged")]),
        lambda: client.log_outputs(run, [LoggedModelOutput(model, 1)]),
        lambda: client.update_run(run, status="RUNNING"),
        lambda: client.update_run(run, name="forged"),
        lambda: client.set_terminated(run, "FAILED"),
        lambda: client.delete_run(run),
        lambda: client.log_text(run, "forged", "evidence/a.txt"),
        lambda: client.link_traces_to_run(["tr-1"], run),
        lambda: client.delete_experiment(untouched.experiment),
        lambda: client.rename_experiment(untouched.experiment, "forged"),
        lambda: client.delete_logged_model(model),
        lambda: client.set_logged_model_tags(model, {"a": "forged"}),
        lambda: client.delete_logged_model_tag(model, "a"),
        lambda: client.finalize_logged_model(model, "FAILED"),
        lambda: client.log_model_artifact(model, str(untouched.home / "manifest.json")),
    ]
    for attempt in refused:
        with pytest.raises(Exception, match=r"agentkit protects .*agentkit promote"):
            attempt()


@slow
def test_what_names_no_sealed_thing_in_its_request_changes_none(untouched: Sealed) -> None:
    """OTLP names its run in a header; a job names it when it is submitted, not when it runs."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = ExportTraceServiceRequest()
    now = time.time_ns()
    spans.resource_spans.add().scope_spans.add().spans.add(
        trace_id=b"1" * 16, span_id=b"1" * 8, name="s", start_time_unix_nano=now, end_time_unix_nano=now + 1
    )
    headers = {
        "Content-Type": "application/x-protobuf",
        "x-mlflow-experiment-id": "0",
        "x-mlflow-run-id": untouched.run,
    }
    answer = web("POST", f"{untouched.url}/v1/traces", content=spans.SerializeToString(), headers=headers)
    assert answer.status_code == 200  # the trace is kept, the link to the run is not
    assert len(untouched.client.search_traces(locations=["0"])) == 1
    for run in (untouched.run, untouched.open):
        params = {"run_id": run, "trace_ids": [], "serialized_scorers": []}
        answer = web("POST", f"{untouched.url}{JOBS}", json={"job_name": "invoke_genai_evaluate", "params": params})
        assert (answer.status_code, "agentkit promote" in answer.text) == (403, True)


@slow
def test_an_upload_that_outlasts_its_run_is_refused(guarded: Sealed) -> None:
    run = guarded._run({"agentkit.kind": "evaluation"}, "RUNNING")
    ended = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b"x" * 100_000
        time.sleep(0.5)
        guarded.client.set_terminated(run)
        ended.set()
        yield b"forged"

    path = f"{guarded.experiment}/{run}/artifacts/evidence"
    answer = web("PUT", f"{guarded.url}/api/2.0/mlflow-artifacts/artifacts/{path}/a.txt", content=slowly())
    assert ended.is_set()
    assert answer.status_code == 403
    assert [(f.name, f.read_text()) for f in (guarded.home / "artifacts" / path).iterdir()] == [
        ("a.txt", "what happened")
    ]


@slow
def test_neighbours_stay_free(untouched: Sealed) -> None:
    client, other = untouched.client, untouched._run({}, "FINISHED")
    client.set_tag(other, "a", "b")
    client.log_text(other, "later", "evidence/b.txt")
    path = f"{untouched.experiment}/{other}/artifacts/evidence/b.txt"
    assert web("DELETE", f"{untouched.url}/api/2.0/mlflow-artifacts/artifacts/{path}").status_code == 200
    assert not (untouched.home / "artifacts" / path).exists()
    client.delete_run(other)
    client.restore_run(other)
    client.delete_logged_model(untouched._model("agent", "READY"))
    experiment = client.create_experiment("elsewhere")
    client.rename_experiment(experiment, "somewhere")
    client.delete_experiment(experiment)
    query = {"query": f'{{mlflowGetRun(input: {{runId: "{untouched.run}"}}) {{run {{info {{runId}}}}}}}}'}
    answer = web("POST", f"{untouched.url}/graphql", json=query)
    assert answer.json()["data"]["mlflowGetRun"]["run"]["info"]["runId"] == untouched.run
    assert client.search_logged_models([untouched.experiment], filter_string="name != ''")
    assert Path(client.download_artifacts(untouched.run, "evidence/a.txt")).read_text() == "what happened"


@slow
def test_normal_work_passes_and_is_sealed_by_its_end(
    guarded: Sealed, project: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Register, evaluate, promote and trace over the server; then nothing of it can be changed."""
    from agentkit.examples import Example, write_examples
    from agentkit_pipelines import promotion
    from agentkit_pipelines.evidence import Plan
    from agentkit_tracking import keys
    from agentkit_tracking.registry import register_file, resolve

    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.url)
    monkeypatch.setenv("AGENTKIT_TRUST", str(guarded.home / "trust.json"))
    keys.create("somebody")
    (project / "shout.py").write_text(SHOUT)
    (project / "bar.yaml").write_text("system: shout\nconfidence: 0.95\nrules:\n  - {metric: success, at_least: 0.9}\n")
    cases = [
        Example(id=f"c{i}", inputs={"text": f"word {i}"}, expected={"expected_text": f"WORD {i}"}, task_type="t")
        for i in range(40)
    ]
    write_examples(project / "golden.jsonl", cases)
    version = register_file("shout.py")
    done = promotion.promote(Plan(version, project / "golden.jsonl", project / "bar.yaml", repeats=1))
    assert resolve("shout@production").number == version.number
    model = guarded.client.get_logged_model(str(version.model_id))
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "shout", "version": version.number}]

    where = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": model.experiment_id}}
    about = {"mlflow.modelId": model.model_id, "mlflow.sourceRun": done.run_id}
    info = {"trace_id": "tr-1", "trace_location": where, "request_time": "2026-11-01T00:00:00Z", "state": "OK"}
    trace = {"trace": {"trace_info": {**info, "trace_metadata": about}}}
    assert web("POST", f"{guarded.url}/api/3.0/mlflow/traces", json=trace).status_code == 200

    before = state_of(guarded.home, done.run_id, model.model_id, "'shout'")
    for method, path, body in attacks(done.run_id, model.model_id, model.experiment_id):
        assert web(method, f"{guarded.url}/api/{path}", json=body).status_code == 403, path
    assert state_of(guarded.home, done.run_id, model.model_id, "'shout'") == before


# ---- with users, and under a prefix


@slow
def test_users_and_admins_are_refused_alike_and_strangers_before_them(tmp_path: Path) -> None:
    (tmp_path / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = MANAGE\ndatabase_uri = sqlite:///{tmp_path / 'auth.db'}\n"
        f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    settings = {"MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret"}
    arguments = [*registry(tmp_path), "--app-name", "agentkit-basic-auth"]
    with mlflow_server(tmp_path, *arguments, workers=2, prefix="/ml", **settings) as url:
        user = ("nobody", "a-long-enough-password")
        with httpx.Client(base_url=url, auth=ADMIN, timeout=PATIENCE) as admin:
            made = admin.post("/api/2.0/mlflow/users/create", json={"username": user[0], "password": user[1]})
            assert made.status_code == 200, made.text
            assert admin.get("/agentkit/guard").json() == {"guard": True, "registry": True}
            create = {"experiment_id": "0", "tags": [{"key": "agentkit.kind", "value": "evaluation"}]}
            run = admin.post("/api/2.0/mlflow/runs/create", json=create).json()["run"]["info"]["run_id"]
            artifact = f"{url.removesuffix('/ml')}/api/2.0/mlflow-artifacts/artifacts/0/{run}/artifacts/a.txt"
            assert admin.put(artifact, content=b"what happened").status_code == 200
            assert (
                admin.post("/api/2.0/mlflow/runs/update", json={"run_id": run, "status": "FINISHED"}).status_code == 200
            )
        for who, status in ((None, 401), (("nobody", "wrong"), 401), (user, 403), (ADMIN, 403)):
            with httpx.Client(base_url=url, auth=who, timeout=PATIENCE) as client:
                answers = [
                    client.post("/api/2.0/mlflow/runs/delete", json={"run_id": run}),
                    client.post(
                        "/ajax-api/2.0/mlflow/runs/set-tag", json={"run_id": run, "key": "a", "value": "forged"}
                    ),
                    client.put(artifact, content=b"forged"),
                    client.delete(artifact),
                    client.post(f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=a.txt", content=b"forged"),
                ]
            for answer in answers[:3]:
                assert answer.status_code == status, (who, answer.text)
            for answer in answers:
                assert answer.status_code in (401, 403)
                assert status == 401 or "agentkit promote" in answer.json()["message"]
        after = web("GET", f"{url}/api/2.0/mlflow/runs/get?run_id={run}", auth=ADMIN).json()["run"]
        assert after["info"]["lifecycle_stage"] == "active"
        assert {t["key"] for t in after["data"]["tags"]} == {"agentkit.kind", "mlflow.runName"}
        assert web("GET", artifact, auth=ADMIN).content == b"what happened"


# ---- starting


@slow
@pytest.mark.parametrize(("arguments", "said"), [
    (["--app-name", "agentkit"], "agentkit-sqlite:///"),
    (["--app-name", "agentkit-basic-auth", "--gunicorn-opts", "--log-level info"], "leave out --gunicorn-opts"),
])  # fmt: skip
def test_a_server_that_would_be_unguarded_does_not_start(tmp_path: Path, arguments: list[str], said: str) -> None:
    with start(tmp_path, *arguments, MLFLOW_FLASK_SERVER_SECRET_KEY="secret") as (process, _):
        assert process.wait(120) == 2
    assert said in (tmp_path / "server.log").read_text()


@pytest.mark.parametrize(("server", "artifacts_only", "setting", "said"), [
    ("gunicorn", False, "", "leave out --gunicorn-opts"),
    ("waitress", False, "", "leave out --waitress-opts"),
    ("uvicorn", True, "", "--artifacts-only"),
    ("uvicorn", False, "true", "--enable-workspaces"),
    ("uvicorn", False, "", "agentkit-sqlite:///"),
])  # fmt: skip
def test_what_would_leave_a_gap_is_named(
    handled: Sealed, monkeypatch: pytest.MonkeyPatch, server: str, artifacts_only: bool, setting: str, said: str
) -> None:
    from mlflow.server import handlers

    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", setting or "false")
    monkeypatch.setattr(handlers, "_model_registry_store", object())
    with pytest.raises(MlflowException, match="does not start: .*" + said):
        guards.refuse_unless_sound(server, artifacts_only)


def test_a_backend_store_that_is_no_database_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.server import handlers

    monkeypatch.setattr(handlers, "_tracking_store", object())
    with pytest.raises(MlflowException, match="--backend-store-uri must be a database"):
        guards.refuse_unless_sound("uvicorn", False)


def test_workers_refuse_what_the_launcher_could_not_see(handled: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when somebody starts uvicorn or gunicorn by hand."""
    monkeypatch.setenv("_MLFLOW_SGI_NAME", "gunicorn")
    for factory in (guards.create_app, guards.create_app_with_users):
        with pytest.raises(MlflowException, match="leave out --gunicorn-opts"):
            factory()


def test_the_launcher_prepares_users_as_for_basic_auth(handled: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    import click
    import mlflow.server

    done: list[str] = []
    monkeypatch.setattr(mlflow.server, "_bootstrap_basic_auth", lambda: done.append("bootstrapped"))
    monkeypatch.setattr(guards, "is_registry_guarded", lambda: True)
    for name in ("_MLFLOW_AUTH_ADMIN_BOOTSTRAPPED", "_MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "before")
    with click.Context(click.Command("server")) as context:
        context.params = {"app_name": "agentkit-basic-auth", "gunicorn_opts": None, "artifacts_only": False}
        guards._in_launcher()
        assert done == ["bootstrapped"]
        assert os.environ["_MLFLOW_AUTH_ADMIN_BOOTSTRAPPED"] == "true"
        assert len(os.environ["_MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN"]) == 64
        context.params = {"app_name": "agentkit", "gunicorn_opts": "", "artifacts_only": False}
        with pytest.raises(click.UsageError, match="--gunicorn-opts"):
            guards._in_launcher()


def test_mlflow_finds_the_factories() -> None:
    from mlflow.server import _find_app, _is_factory

    for name in ("agentkit", "agentkit-basic-auth"):
        assert _is_factory(_find_app(name))
