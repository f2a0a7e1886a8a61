"""The middleware alone, in front of an application that says yes to everything: it refuses whatever names what is sealed."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from sealed import CODECS, JOBS, written

from agentkit_tracking.guard import app as guards

RUN, MODEL = "0123456789abcdef" * 2, "m-" + "fedcba9876543210" * 2
OPEN_RUN, STRANGER = "1" * 32, "2" * 32
MPU = "/api/2.0/mlflow-artifacts/mpu/create/1/x/artifacts"


class Stub:
    """A store with one sealed run, one sealed model and one evaluation that still runs."""

    def __init__(self) -> None:
        self.ended = {RUN, MODEL}
        self.broken = False

    def find_sealed(self, ids: set[str], *, still_open: bool = False) -> set[str]:
        if self.broken:
            raise OSError("disk")
        return ids & (self.ended | {OPEN_RUN} if still_open else self.ended)

    def sealed_locations(self) -> list[str]:
        return [f"mlflow-artifacts:/my%20place/1/{RUN}/artifacts", f"/srv/artifacts/2/models/{MODEL}/artifacts"]


class Served:
    """What the application behind the guard was asked, and the guard's answer."""

    def __init__(self, *, prefix: str = "") -> None:
        self.store, self.bodies = Stub(), list[bytes]()
        self.guard = guards.Guard(self._application, self.store, prefix)

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    def ask(self, method: str, path: str, body: bytes | list[bytes] = b"", query: str = "", **more: Any) -> int:
        """The status of the answer; `path` as the server hands it on, which is decoded once."""
        parts = iter(body if isinstance(body, list) else [body])
        sent: list[dict[str, Any]] = []
        left = len(body) if isinstance(body, list) else 1

        async def receive() -> dict[str, Any]:
            nonlocal left
            left -= 1
            return {"type": "http.request", "body": next(parts), "more_body": left > 0}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": [], **more}
        asyncio.run(self.guard(scope, receive, send))
        self.answer = b"".join(m.get("body", b"") for m in sent)
        return int(sent[0]["status"])


@pytest.fixture
def served() -> Served:
    return Served()


def spelled(text: str) -> list[str]:
    """Ways to write an id in a path that MLflow takes for the same."""
    once = "".join(f"%{ord(c):02x}" for c in text)
    return [text, text.upper(), once, quote(once), quote(quote(once)), text[:9] + "%09" + text[9:], text[:9] + "\n" + text[9:],
            f"%2F{text}", f".%2F{text}%00", f"{text};x", f"{text}%3Fa"]  # fmt: skip


@pytest.mark.parametrize("path", [
    path.format(name)
    for sealed in (RUN, MODEL)
    for name in spelled(sealed)
    for path in (
        "/api/2.0/mlflow-artifacts/artifacts/1/{}/artifacts/evidence/a",
        "/ajax-api/2.0/mlflow-artifacts/artifacts//1/./{}",
        "/api/2.0/mlflow-artifacts/mpu/complete/1/{}/artifacts",
        "/api/9.9/mlflow/a-route-yet-to-come/{}",
        "/api/2.0/mlflow/logged-models/{}/artifacts/upload",
    )
])  # fmt: skip
@pytest.mark.parametrize("method", ["PUT", "DELETE", "patch"])
def test_a_sealed_id_in_the_path_is_refused_however_it_is_written(served: Served, method: str, path: str) -> None:
    assert served.ask(method, path) == 403
    assert served.bodies == []
    said = json.loads(served.answer)
    assert said["error_code"] == "PERMISSION_DENIED"
    assert "agentkit promote" in said["message"]
    assert "agentkit rollback" in said["message"]


@pytest.mark.parametrize("name", spelled(RUN))
def test_a_sealed_id_in_the_query_is_refused(served: Served, name: str) -> None:
    query = f"path=x&run_uuid={name}".replace("\n", "%0a")
    assert served.ask("POST", "/ajax-api/2.0/mlflow/upload-artifact", b"x", query) == 403
    assert served.bodies == []


@pytest.mark.parametrize("path", [MPU, JOBS, "/api/2.0/mlflow/artifacts/presigned-upload-url", "/somewhere/else"])
@pytest.mark.parametrize("body", [
    json.dumps({"run_id": RUN}).encode(),
    json.dumps({RUN.upper(): 1}).encode(),
    json.dumps([[{"a": {"b": f"models:/{MODEL}/x"}}]]).encode(),
    f'{{"run_id": "{RUN}", "run_id": "{STRANGER}"}}'.encode(),
    json.dumps(json.dumps(json.dumps({"run_id": RUN}))).encode("utf-16"),
    json.dumps({"run_id": RUN}).encode("utf-32-be"),
    json.dumps({"a": json.dumps({"run_id": RUN}).replace("0", "\\u0030")}).encode("utf-8-sig"),
    ("{" + "".join(f'"\\u{ord(c):04x}": 0, ' for c in "ab") + '"x": "' + "".join(f"\\u{ord(c):04x}" for c in RUN) + '"}').encode(),
    json.dumps({"run_id": OPEN_RUN}).encode(),  # will be sealed when it ends; a job or a presigned URL may outlive that
    f'{{"run_id": {OPEN_RUN}}}'.encode("utf-16"),
    f"username=x&run_id={RUN}".encode(),
    f"run%5Fid={quote(RUN)}".replace("0", "%30").encode(),
    f'{{"run_id": "{RUN}"'.encode(),
])  # fmt: skip
def test_a_sealed_id_in_the_body_of_an_unknown_route_is_refused(served: Served, path: str, body: bytes) -> None:
    assert served.ask("POST", path, body) == 403
    assert served.ask("POST", path, [bytes([byte]) for byte in body]) == 403
    assert served.bodies == []


@pytest.mark.parametrize("body", [b"[" * 200_000, json.dumps("%" + "25" * 40).encode()])
def test_a_body_that_cannot_be_looked_through_is_refused(served: Served, body: bytes) -> None:
    assert served.ask("POST", JOBS, body) == 400
    assert served.bodies == []


texts = st.text(st.characters(codec="utf-8"), max_size=8)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(
    around=st.lists(st.tuples(st.sampled_from("ldk"), documents, texts), max_size=5),
    sealed=st.sampled_from([RUN, MODEL, OPEN_RUN]),
    before=st.sampled_from(["", "models:/", "runs:/", "%2f", "a=", " "]),
    nested=st.integers(0, 3),
    codec=st.sampled_from(CODECS),
    draw=st.randoms(use_true_random=False),
)
def test_no_json_hides_a_sealed_id(
    around: list[tuple[str, Any, str]], sealed: str, before: str, nested: int, codec: str, draw: random.Random
) -> None:
    name = "".join(c.upper() if draw.random() < 0.5 else c for c in sealed)
    value: Any = before + name
    for how, other, key in around:
        value = {"l": [other, value], "d": {key: value}, "k": {"x": value, name: other}}[how]
    text = written(value, draw)
    for _ in range(nested):
        text = written(text, draw)
    served = Served()
    assert served.ask("POST", JOBS, text.encode(codec)) == 403
    assert served.bodies == []


@pytest.mark.parametrize("body", [b"", b"{}", b'{"run_id": "' + STRANGER.encode() + b'"}', b"\xff\xfe\x00", b"1e999"])
def test_other_requests_arrive_as_they_were_sent(served: Served, body: bytes) -> None:
    assert served.ask("POST", JOBS, body) == 200
    assert served.bodies == [body]


@pytest.mark.parametrize(("method", "path"), [
    ("POST", "/api/2.0/mlflow/runs/log-batch"),  # metrics of a sealed model, on a run that is open
    ("POST", "/api/2.0/mlflow/model-versions/create"),
    ("DELETE", "/ajax-api/2.0/mlflow/registered-models/alias"),
    ("POST", "/api/3.0/mlflow/traces"),
    ("POST", "/v1/traces"),
    ("POST", "/graphql"),
    ("POST", "/gateway/mlflow/v1/chat/completions"),
    ("POST", "/api/3.0/mlflow/datasets/search"),
    ("POST", "/api/2.0/mlflow/artifacts/presigned-download-url"),
    ("GET", f"/api/2.0/mlflow-artifacts/artifacts/1/{RUN}/artifacts/a"),
    ("HEAD", f"/get-artifact/{RUN}"),
    ("OPTIONS", MPU),
])  # fmt: skip
def test_what_reads_or_is_judged_by_a_store_passes(served: Served, method: str, path: str) -> None:
    body = json.dumps({"run_id": RUN, "model_id": MODEL}).encode()
    assert served.ask(method, path, body, f"run_id={RUN}") == 200
    assert served.bodies == [body]


@pytest.mark.parametrize("path", [
    "/api/2.0/mlflow/runs\n/delete", "/api/2.0//mlflow/runs/delete", "/x/api/2.0/mlflow/runs/delete", "/gateway", "/graphql/",
    f"/api/2.0/mlflow-artifacts/mpu/create/1/{OPEN_RUN}/mlflow/datasets/search", "/api/2.0/mlflow/runs-of/somebody",
])  # fmt: skip
def test_what_only_looks_like_a_known_route_is_judged_strictly(served: Served, path: str) -> None:
    assert served.ask("POST", path, json.dumps({"run_id": RUN}).encode()) == 403


def test_only_the_search_itself_is_a_read(served: Served) -> None:
    assert served.ask("DELETE", "/api/3.0/mlflow/datasets/search", json.dumps([RUN]).encode()) == 403


def test_methods_are_read_without_their_case_as_flask_reads_them(served: Served) -> None:
    assert served.ask("delete", "/api/2.0/mlflow-artifacts/artifacts/2") == 403
    assert served.ask("get", f"/api/2.0/mlflow-artifacts/artifacts/1/{RUN}") == 200


@pytest.mark.parametrize("folder", ["", "/", ".", "my place", "my%20place", "MY PLACE/", "my%2520place/./1//", "my place/1",
                                    "srv", "2", "2/models", "x/../2", "artifacts/2", "my\t place"])  # fmt: skip
def test_a_folder_that_holds_something_sealed_is_not_deleted(served: Served, folder: str) -> None:
    assert served.ask("DELETE", f"/api/2.0/mlflow-artifacts/artifacts/{folder}") == 403
    assert b"which holds" in served.answer
    assert served.bodies == []


@pytest.mark.parametrize("folder", ["3", "my", f"1/{STRANGER}/artifacts/plots", "plac", "2/model"])
def test_other_artifacts_may_be_deleted(served: Served, folder: str) -> None:
    assert served.ask("DELETE", f"/api/2.0/mlflow-artifacts/artifacts/{folder}") == 200


def test_an_upload_is_passed_on_part_by_part_and_asked_for_again_at_its_end(served: Served) -> None:
    path = f"/api/2.0/mlflow-artifacts/artifacts/1/{OPEN_RUN}/artifacts/big"
    seen: list[bytes] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            seen.append(message["body"])
            served.store.ended.add(OPEN_RUN)  # the run ends while somebody still sends
            if not message["more_body"]:
                return

    served.guard.app = application
    with pytest.raises(MlflowException) as e:  # which MLflow makes the answer of
        served.ask("PUT", path, [b"a", b"b", b"c"])
    assert e.value.error_code == "PERMISSION_DENIED"
    assert seen == [b"a", b"b"]


def test_a_file_may_contain_anything(served: Served) -> None:
    content = json.dumps({"run_id": RUN}).encode()
    assert served.ask("PUT", f"/api/2.0/mlflow-artifacts/artifacts/1/{OPEN_RUN}/artifacts/e.json", content) == 200
    assert served.ask("POST", "/ajax-api/2.0/mlflow/upload-artifact", content, f"run_uuid={OPEN_RUN}&path=x") == 200
    assert served.bodies == [content, content]


def test_not_knowing_is_no_permission(served: Served) -> None:
    served.store.broken = True
    assert served.ask("PUT", f"/api/2.0/mlflow-artifacts/artifacts/1/{STRANGER}/artifacts/a") == 503
    assert served.bodies == []
    assert json.loads(served.answer)["error_code"] == "TEMPORARILY_UNAVAILABLE"


@pytest.mark.parametrize("root", ["", "/behind/a/proxy"])
def test_prefixes_do_not_change_what_is_known(root: str) -> None:
    served = Served(prefix="/ml")
    body = json.dumps({"run_id": RUN}).encode()
    assert served.ask("POST", f"{root}/ml/api/2.0/mlflow/runs/log-batch", body, root_path=root) == 200
    assert served.ask("POST", f"{root}/ml{MPU}", body, root_path=root) == 403
    assert served.ask("DELETE", f"{root}/api/2.0/mlflow-artifacts/artifacts/2", root_path=root) == 403
    assert served.ask("GET", f"{root}/ml/agentkit/guard", root_path=root) == 200


def test_the_assistant_which_runs_commands_on_the_server_is_off(served: Served) -> None:
    assert served.ask("POST", "/ajax-api/3.0/mlflow/assistant/message", b"{}") == 403
    assert served.ask("GET", "/ajax-api/3.0/mlflow/assistant/sessions/x/stream") == 403
    assert served.ask("GET", "/ajax-api/3.0/mlflow/assistant/config") == 200


def test_sockets_pass(served: Served) -> None:
    scopes: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope["type"])

    served.guard.app = application
    for kind in ("websocket", "lifespan"):
        asyncio.run(served.guard({"type": kind}, None, None))  # type: ignore[arg-type]
    assert scopes == ["websocket", "lifespan"]
