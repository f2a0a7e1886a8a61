"""The guarded server: its start, and the middleware for what the guarded stores do not see.

Two parts keep what is sealed, each where the spelling of a request cannot fool it. `GuardedTrackingStore` gets what
MLflow's handlers have parsed. `Guard`, ASGI middleware, judges the requests whose effect does not pass through that
store: artifacts, jobs in other processes, routes yet to come.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import click
from fastapi import FastAPI
from mlflow.environment_variables import (
    _MLFLOW_AUTH_ADMIN_BOOTSTRAPPED,
    _MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN,
    _MLFLOW_SGI_NAME,
    MLFLOW_ENABLE_WORKSPACES,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE
from mlflow.server import handlers
from mlflow.server.constants import (
    ARTIFACT_ROOT_ENV_VAR,
    ARTIFACTS_ONLY_ENV_VAR,
    READ_REPLICA_BACKEND_STORE_URI_ENV_VAR,
)
from mlflow.server.mlflow_response import mlflow_exception_response
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking._tracking_service import utils as client_stores
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentkit_tracking.guard.registry_store import GuardedStore
from agentkit_tracking.guard.tracking_store import GuardedTrackingStore, find_ids, refuse, without_breaks

# ---- artifacts, jobs, and whatever else there is

_API = r"/(?:ajax-)?api/\d+\.\d+"
# Their handlers do all they do through a guarded store; a body may mention sealed runs and models, or be long.
_JUDGED_BY_STORE = re.compile(
    rf"{_API}/mlflow/(?:runs|experiments|logged-models|traces|registered-models|model-versions)(?:/.*)?"
    r"|/graphql|/v1/traces|/gateway/.*"
)
_ONLY_READS = re.compile(
    rf"{_API}/(?:mlflow/)?(?:datasets|issues|prompt-optimization/jobs|jobs)/search"
    rf"|{_API}/mlflow/artifacts/presigned-download-url"
)
_ARTIFACT = re.compile(rf"{_API}/mlflow-artifacts/artifacts/(.*)", re.DOTALL)
_UPLOAD = re.compile(rf"{_API}/mlflow/upload-artifact")
_ASSISTANT = re.compile(rf"{_API}/mlflow/assistant/.*", re.DOTALL)


class Guard:
    """ASGI middleware: refuses requests that name what is sealed, except where the tracking store decides.

    Default is to refuse: a request that is no read, and whose route is not known to be judged by a store, must name no
    sealed run or model in path and query, and in its body none that is or will be sealed.
    """

    def __init__(self, app: ASGIApp, store: Any, prefix: str = "", *, registry: bool = False) -> None:
        self.app, self.store, self.prefix, self.registry = app, store, prefix, registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")).removeprefix(self.prefix)
        if path == "/agentkit/guard":
            page = JSONResponse({"guard": True, "registry": self.registry})
            await page(scope, receive, send)
            return
        try:
            receive = await self._judge(scope["method"].upper(), path, scope, receive)
        except MlflowException as e:
            await mlflow_exception_response(e, handler_name="agentkit guard")(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _judge(self, method: str, path: str, scope: Scope, receive: Receive) -> Receive:
        """Raise a refusal, or return what the application shall read the body from."""
        if _ASSISTANT.fullmatch(path) and (method not in _READS or path.endswith("/stream")):
            raise MlflowException(
                "MLflow's assistant runs commands as the user that runs the server, whom no guard can stop; on a "
                "server that guards `production` it is off.",
                error_code=PERMISSION_DENIED,
            )
        if method in _READS or (method == "POST" and _ONLY_READS.fullmatch(path)):
            return receive
        if _JUDGED_BY_STORE.fullmatch(path) and "artifact" not in path:
            return receive
        named = find_ids(path, scope.get("query_string", b"").decode("latin-1"))
        artifact = _ARTIFACT.fullmatch(path)
        if (artifact and method == "PUT") or _UPLOAD.fullmatch(path):  # a file: any size, any content
            first = await receive()
            await self._refuse(named)
            return _replayed(first, self._watched(receive, named) if first.get("more_body") else receive)
        await self._refuse(named)
        if artifact and method == "DELETE":
            await self._refuse_above(artifact[1])
        body = await Request(scope, receive).body()
        await self._refuse(find_ids_in_json(body), still_open=True)
        return _replayed({"type": "http.request", "body": body, "more_body": False}, receive)

    async def _refuse(self, ids: set[str], *, still_open: bool = False) -> None:
        if ids:
            refuse(await self._ask(self.store.find_sealed, ids, still_open=still_open))

    async def _refuse_above(self, path: str) -> None:
        """A folder must not be deleted with what is sealed in it."""
        folder = _plain(path).lower()
        for location in await self._ask(self.store.sealed_locations):
            if not folder or f"/{folder}/" in f"/{_plain(location).lower()}/":
                refuse(find_ids(location), f"{path or 'the root'!r}, which holds artifacts of ")

    async def _ask(self, question: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return await run_in_threadpool(question, *args, **kwargs)
        except MlflowException:
            raise
        except Exception as e:  # whatever it is: not knowing is no permission
            raise MlflowException(
                f"the guard could not look up what is sealed ({type(e).__name__})", error_code=TEMPORARILY_UNAVAILABLE
            ) from e

    def _watched(self, receive: Receive, named: set[str]) -> Receive:
        """Ask again when the last part of an upload is there: the run may have ended meanwhile."""

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                await self._refuse(named)  # MLflow answers with it, and has published nothing yet
            return message

        return watched


_READS = ("GET", "HEAD", "OPTIONS")


def _replayed(first: Message, receive: Receive) -> Receive:
    messages = iter([first])

    async def replayed() -> Message:
        return next(messages, None) or await receive()

    return replayed


def find_ids_in_json(body: bytes) -> set[str]:
    """`find_ids` in every key and value of a JSON body, also in JSON within its strings.

    A body that is no JSON, or no valid one, is searched as text; MLflow takes it as empty, or as a form.

    Raises:
        MlflowException: nested too deeply to be looked through.
    """
    texts = [body.decode("latin-1")]
    try:
        values = [_parse(body)]
        while values:
            value = values.pop()
            if isinstance(value, list | tuple):
                values += value
            elif isinstance(value, str):
                texts.append(value)
                values.append(_parse(value))
            elif isinstance(value, int):
                texts.append(str(value))
    except RecursionError as e:
        raise MlflowException("nested too deeply", error_code=INVALID_PARAMETER_VALUE) from e
    return find_ids(*texts)


def _parse(text: bytes | str) -> Any:
    """As MLflow does: json.loads finds UTF-16 and UTF-32 by itself. Objects become pairs, so that no duplicate is lost."""
    try:
        return json.loads(text, object_pairs_hook=list)
    except ValueError:
        return None


def _plain(path: str) -> str:
    while (decoded := unquote(without_breaks(path))) != path:
        path = decoded
    return posixpath.normpath(f"/{path}").strip("/")


# ---- start


def create_app() -> FastAPI:
    """The application of `mlflow server --app-name agentkit`, for MLflow's own server, uvicorn."""
    _refuse_in_worker()
    from mlflow.server.fastapi_app import create_fastapi_app

    return _with_guard(create_fastapi_app())


def create_app_with_users() -> FastAPI:
    """As `create_app`, with MLflow's users and permissions (`--app-name agentkit-basic-auth`)."""
    _refuse_in_worker()
    from mlflow.server import auth

    return _with_guard(auth.create_app())


def _refuse_in_worker() -> None:
    refuse_unless_sound(_MLFLOW_SGI_NAME.get() or "uvicorn", bool(os.environ.get(ARTIFACTS_ONLY_ENV_VAR)))


def _with_guard(app: FastAPI) -> FastAPI:
    for registry in (handlers._tracking_store_registry, client_stores._tracking_store_registry):
        for scheme in DATABASE_ENGINES:
            registry.register(scheme, _open_tracking_store)
        registry._get_store_with_resolved_uri.cache_clear()
    handlers._tracking_store = None
    store = handlers._get_tracking_store()
    prefix = os.environ.get(handlers.STATIC_PREFIX_ENV_VAR, "").rstrip("/")
    # Innermost: MLflow's own checks of host, origin and user come first.
    app.user_middleware.append(Middleware(Guard, store=store, prefix=prefix, registry=is_registry_guarded()))
    return app


def _open_tracking_store(store_uri: str, artifact_uri: str | None = None) -> GuardedTrackingStore:
    root = artifact_uri or os.environ.get(ARTIFACT_ROOT_ENV_VAR) or DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    return GuardedTrackingStore(store_uri, root, read_db_uri=os.environ.get(READ_REPLICA_BACKEND_STORE_URI_ENV_VAR))


def is_registry_guarded() -> bool:
    """Whether the server's registry store is ours."""
    return isinstance(handlers._get_model_registry_store(), GuardedStore)


def refuse_unless_sound(server: str, artifacts_only: bool) -> None:
    """Refuse to start where something would be unguarded.

    Raises:
        MlflowException: says what to give instead.
    """
    if server != "uvicorn":
        problem = f"{server} serves only a part of MLflow's routes; leave out --{server}-opts"
    elif artifacts_only or MLFLOW_ENABLE_WORKSPACES.get():
        problem = "it does not work with --enable-workspaces or --artifacts-only"
    elif not isinstance(handlers._get_tracking_store(), SqlAlchemyStore):
        problem = "--backend-store-uri must be a database, sqlite:///… or postgresql://…"
    elif not is_registry_guarded():
        problem = "--registry-store-uri must be the backend store's URI with agentkit- before it, agentkit-sqlite:///…"
    else:
        return
    raise MlflowException(f"agentkit's server guard does not start: {problem}", error_code=INVALID_PARAMETER_VALUE)


def _in_launcher() -> None:
    """What `mlflow server` does once for its own `basic-auth`; it imports this module before it starts any worker.

    A worker that refuses to start is started again and again, so what can be refused is refused here.
    """
    context = click.get_current_context(silent=True)
    given = context.params if context else {}
    if given.get("app_name") not in ("agentkit", "agentkit-basic-auth"):
        return  # a worker, or a test
    server = next((name for name in ("gunicorn", "waitress") if given.get(f"{name}_opts") is not None), "uvicorn")
    try:
        refuse_unless_sound(server, bool(given.get("artifacts_only")))
    except MlflowException as e:
        raise click.UsageError(e.message) from e
    if given["app_name"] == "agentkit-basic-auth":
        from mlflow.server import _bootstrap_basic_auth

        _bootstrap_basic_auth()
        os.environ[_MLFLOW_AUTH_ADMIN_BOOTSTRAPPED.name] = "true"
        # By it workers recognise the jobs that they started.
        os.environ[_MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN.name] = secrets.token_hex(32)


_in_launcher()
