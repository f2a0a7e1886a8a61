"""The folder that holds everything local, and the connection to MLflow."""

from __future__ import annotations

import getpass
import logging
import os
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit.errors import UsageError
from agentkit_tracking.guard import SCHEME

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

_MARKS = (".agentkit", "pyproject.toml", ".git")
# Read by mlflow at import or at the first request; a server that is not there must be said within seconds.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: working directory) that looks like a project, else `start`."""
    start = (start or Path.cwd()).resolve()
    return next((d for d in (start, *start.parents) if any((d / mark).exists() for mark in _MARKS)), start)


def home() -> Path:
    """`AGENTKIT_HOME`, or `.agentkit` in the project root: run log, MLflow database, artifacts, fetched releases."""
    given = os.environ.get("AGENTKIT_HOME")
    return Path(given).resolve() if given else project_root() / ".agentkit"


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the home."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def is_local_store() -> bool:
    """Whether the store is the SQLite file in the home, which only this project's own people write."""
    return not os.environ.get("MLFLOW_TRACKING_URI")


def registry_uri() -> str:
    """Where releases are registered: SQLite through the guard, so that our own client cannot go round it either."""
    uri = tracking_uri()
    return f"{SCHEME}{uri}" if uri.startswith("sqlite:") else uri


def author() -> str:
    """Who is at work: `AGENTKIT_AUTHOR`, or the name of the login."""
    try:
        return os.environ.get("AGENTKIT_AUTHOR") or getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file of its own; a process that dies lets go of it.

    Where there is no `fcntl` (Windows), one writer at a time is up to the caller.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file whole or not at all, whoever reads or writes it meanwhile. `mode`: its permissions, less the umask."""
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    with open(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
        file.write(content)
    os.replace(scratch, path)


def prepare_environment() -> None:
    """Set what mlflow and litellm read from the environment, where the user has not."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def connect() -> MlflowClient:
    """A client of the tracking and registry store, creating the local one if need be.

    Raises:
        UsageError: the server named by MLFLOW_TRACKING_URI does not answer.
    """
    uri = tracking_uri()
    client = open_stores(uri, registry_uri(), home())
    _use(uri)
    return client


def open_stores(uri: str, registry: str, folder: Path) -> MlflowClient:
    """As `connect`, of stores that are named, and without pointing mlflow's module-level functions there: for a thread
    beside other people's code.

    Raises:
        UsageError: the server does not answer.
    """
    with _connecting:
        return _connect(uri, registry, str(folder))


_connecting = threading.RLock()


@cache
def _connect(uri: str, registry: str, folder: str) -> MlflowClient:
    prepare_environment()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{folder} cannot be made ({e.strerror}); set AGENTKIT_HOME to a folder that can") from e
    # Creating the local database logs a hundred lines of migrations that mean nothing to a user.
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking._model_registry"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._model_registry.utils import _get_store_registry
    from sqlalchemy.exc import SADeprecationWarning, SQLAlchemyError

    _get_store_registry()  # mlflow shows it to other threads before our stores are in it
    for name in (
        "mlflow.store.db.utils",
        "mlflow.store.model_registry.abstract_store",
        "alembic.runtime.migration",
        "mlflow.tracing.export.async_export_queue",  # "may take a while", at every exit
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SADeprecationWarning)  # mlflow 3.17 with sqlalchemy 2.1
            client = mlflow.MlflowClient(uri, registry)
            client.search_experiments(max_results=1)
    except MlflowException as e:
        reason = str(e).splitlines()[0].rpartition("Caused by ")[2][:200]
        raise UsageError(
            f"MLflow at {uri} does not answer ({reason}); start it (`agentkit ui`), or unset MLFLOW_TRACKING_URI "
            "to use the local store"
        ) from e
    except (ImportError, OSError, SQLAlchemyError) as e:
        raise UsageError(f"MLflow's store {uri} cannot be opened ({str(e).splitlines()[0]}); check its address") from e
    return client


def _use(uri: str) -> None:
    """Point mlflow's module-level functions at `uri`, too."""
    import mlflow

    if mlflow.get_tracking_uri() == uri and mlflow.get_registry_uri() == registry_uri():
        return
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    given = {name: os.environ.get(name) for name in names}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(registry_uri())
    for name, value in given.items():
        # mlflow sets them for child processes; left there, they would outlive a change of AGENTKIT_HOME.
        if value is None:
            os.environ.pop(name, None)


def experiment_id(system: str) -> str:
    """The experiment of a system, created when missing (a race between two creators is settled by the store)."""
    return str(experiment(connect(), system, tracking_uri(), home()).experiment_id)


def experiment(client: MlflowClient, system: str, uri: str, folder: Path) -> Experiment:
    """The experiment of a system in the store at `uri`, created when missing.

    Raises:
        UsageError: it is deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(system)
    if found is None:
        options: dict[str, Any] = {}
        if uri.startswith("sqlite:"):  # else mlflow would write ./mlruns into the working directory
            options["artifact_location"] = (folder / "artifacts" / system).as_uri()
        try:
            return client.get_experiment(client.create_experiment(system, **options))
        except MlflowException:
            found = client.get_experiment_by_name(system)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UsageError(f"the MLflow experiment {system!r} is deleted; restore it or choose another system name")
    return found
