"""The tracking store that refuses to change what a signature vouches for: runs, experiments, logged models.

A run that is tagged as an evaluation and has ended, and the logged model of a release that is ready, are sealed: nobody
changes or deletes them. What passes by this store `app.py` judges.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import islice
from typing import Any
from urllib.parse import unquote

from mlflow.entities import LoggedModelStatus, LoggedModelTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED
from mlflow.store.tracking.dbmodels.models import SqlLoggedModel, SqlRun, SqlTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from agentkit_tracking.rules import TAG

KIND, EVALUATION = f"{TAG}kind", "evaluation"
RELEASE = "agentkit-release"  # the model_type of a release's logged model
ENDED = ("FINISHED", "FAILED", "KILLED")
_HOW = "What production means rests on it. To change production: `agentkit promote` or `agentkit rollback`."
_HEX = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", re.IGNORECASE)


class GuardedTrackingStore(SqlAlchemyStore):  # type: ignore[misc]
    """MLflow's SQL store; refuses, with PERMISSION_DENIED (HTTP 403), to change what is sealed.

    Checked (see below the class) is every public method that takes a `run_id` or `model_id` and does not only read, so
    one that a later MLflow adds is, too. What counts is the run or model that a method changes, not others that it
    mentions: an evaluation that still runs logs metrics for a sealed model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sealed: set[str] = set()  # those found so far; sealed is for ever

    def find_sealed(self, ids: Iterable[str], *, still_open: bool = False) -> set[str]:
        """Which of these runs and models are sealed; `still_open`: or will be when they end."""
        wanted = set(ids)
        if found := wanted & self._sealed:
            return found
        remaining = iter(wanted)
        with self.ManagedSessionMaker(read_only=False) as session:  # the primary: a replica may lag behind
            while some := list(islice(remaining, 500)):
                runs = _evaluations(session, still_open).filter(SqlRun.run_uuid.in_(some))
                models = _releases(session, still_open).filter(SqlLoggedModel.model_id.in_(some))
                found |= {found_id for found_id, _ in runs.union_all(models)}
        if not still_open:
            self._sealed |= found
        return found

    def sealed_locations(self) -> list[str]:
        """Where the artifacts of all sealed runs and models are."""
        with self.ManagedSessionMaker(read_only=False) as session:
            return [location for query in (_evaluations, _releases) for _, location in query(session)]

    def delete_experiment(self, experiment_id: str) -> None:
        """Refused where the experiment holds anything sealed; MLflow would delete its runs with it."""
        self._refuse_if_holds(experiment_id)
        super().delete_experiment(experiment_id)

    def rename_experiment(self, experiment_id: str, new_name: str) -> None:
        """Refused where the experiment holds anything sealed: its name is how evidence is found."""
        self._refuse_if_holds(experiment_id)
        super().rename_experiment(experiment_id, new_name)

    def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> str:
        """Refused where its artifacts would be written into those of a sealed run or model."""
        refuse(self.find_sealed(find_ids(artifact_location or "")))
        return str(super().create_experiment(name, artifact_location, tags))

    def set_model_versions_tags(self, name: str, version: str, model_id: str) -> None:
        """The server's own note on a model of the versions that it became, made when they are, after the seal."""
        noted = json.loads(self.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        if (entry := {"name": name, "version": version}) not in noted:
            tag = LoggedModelTag(MLFLOW_MODEL_VERSIONS, json.dumps([*noted, entry]))
            super().set_logged_model_tags(model_id, [tag])  # unguarded

    def _refuse_if_holds(self, experiment_id: str) -> None:
        number = int(self.get_experiment(experiment_id).experiment_id)  # or MLflow's own not-found
        with self.ManagedSessionMaker(read_only=False) as session:
            run = _evaluations(session).filter(SqlRun.experiment_id == number).first()
            model = _releases(session).filter(SqlLoggedModel.experiment_id == number).first()
        if found := run or model:
            refuse({found[0]}, f"experiment {experiment_id}, which holds ")


def _evaluations(session: Any, still_open: bool = False) -> Any:
    query = session.query(SqlRun.run_uuid, SqlRun.artifact_uri).join(SqlTag, SqlTag.run_uuid == SqlRun.run_uuid)
    query = query.filter(SqlTag.key == KIND, SqlTag.value == EVALUATION)
    return query if still_open else query.filter(SqlRun.status.in_(ENDED))


def _releases(session: Any, still_open: bool = False) -> Any:
    query = session.query(SqlLoggedModel.model_id, SqlLoggedModel.artifact_location)
    query = query.filter(SqlLoggedModel.model_type == RELEASE)
    return query if still_open else query.filter(SqlLoggedModel.status == LoggedModelStatus.READY.to_int())


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @wraps(method)
    def checked(self: GuardedTrackingStore, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        ids = {given[name] for name in ("run_id", "model_id") if given.get(name)}
        refuse(self.find_sealed(ids, still_open=_takes_the_mark_away(given)))
        return method(self, *args, **kwargs)

    return checked


def _takes_the_mark_away(given: dict[str, Any]) -> bool:
    """Whether a run would lose the tag by which it is sealed when it ends."""
    tags = [*([given["tag"]] if "tag" in given else []), *(given.get("tags") or [])]
    return given.get("key") == KIND or any(tag.key == KIND and tag.value != EVALUATION for tag in tags)


def _changes(name: str, method: Callable[..., Any]) -> bool:
    reads = name.startswith(("_", "get_", "search_")) or name == "restore_run"  # which gives evidence back
    return not reads and bool({"run_id", "model_id"} & set(inspect.signature(method).parameters))


GUARDED = tuple(
    name
    for name, method in inspect.getmembers(SqlAlchemyStore, inspect.isfunction)
    if _changes(name, method) and name not in vars(GuardedTrackingStore)
)
for _name in GUARDED:
    setattr(GuardedTrackingStore, _name, _guarded(getattr(SqlAlchemyStore, _name)))


def refuse(sealed: Iterable[str], where: str = "") -> None:
    """Raise the refusal that SDK and UI show, if anything sealed was found."""
    if found := min(sealed, default=None):
        kind = "the logged model of a release" if found.startswith("m-") else "the run of an evaluation"
        raise MlflowException(f"agentkit protects {where}{found}, {kind}. {_HOW}", error_code=PERMISSION_DENIED)


# ---- which runs and models a text names


def find_ids(*texts: str) -> set[str]:
    """Each run id in the texts, and the model id that it would be, whatever their case and percent-encoding.

    Raises:
        MlflowException: encoded more often than MLflow itself would decode.
    """
    found: set[str] = set()
    for text in texts:
        for _ in range(12):  # MLflow gives up after ten
            text = without_breaks(text)
            found.update(_HEX.findall(text))
            if (decoded := unquote(text)) == text:
                break
            text = decoded
        else:
            raise MlflowException("percent-encoded too often", error_code=INVALID_PARAMETER_VALUE)
    return {f"{mark}{digits.lower()}" for digits in found for mark in ("", "m-")}


def without_breaks(text: str) -> str:
    """Without what MLflow's `validate_path_is_safe` (urllib.parse) drops from within a path."""
    return re.sub(r"[\t\r\n]", "", text)
