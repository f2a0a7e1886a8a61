"""MLflow's SQL registry store with one writer at a time, and the rows that are read and written under its lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import sqlalchemy
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelAlias,
    SqlRegisteredModelTag,
)
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore


def atomic(method: Callable[..., Any]) -> Callable[..., Any]:
    """Check and change in one transaction that no entry of the history can come between."""

    @wraps(method)
    def done(self: LockedStore, name: str, *args: Any, **kwargs: Any) -> Any:
        with self._locked(name):
            return method(self, name, *args, **kwargs)

    return done


class LockedStore(SqlAlchemyStore):  # type: ignore[misc]
    """What is done under a lock, MLflow's own changes included, is one transaction."""

    ManagedSessionMaker: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open_session = self.ManagedSessionMaker
        self.ManagedSessionMaker = self._session
        self._under_lock = threading.local()

    @contextmanager
    def _session(self, read_only: bool = True) -> Iterator[Any]:
        """A session as MLflow's, or the one that holds a lock in this thread."""
        if (held := getattr(self._under_lock, "session", None)) is not None:
            yield held
            return
        with self._open_session(read_only=read_only) as session:
            yield session

    @contextmanager
    def _locked(self, name: str) -> Iterator[Any]:
        """A transaction that holds the row of the model, or of the system whose prompt it is: one writer at a time."""
        if (held := getattr(self._under_lock, "session", None)) is not None:
            yield held
            return
        with self._open_session(read_only=False) as session:
            for one in dict.fromkeys((name.partition(".")[0], name)):
                update = sqlalchemy.update(SqlRegisteredModel).where(
                    SqlRegisteredModel.name == one, SqlRegisteredModel.workspace == self._get_active_workspace()
                )
                if session.execute(update.values(name=one)).rowcount:
                    break
            self._under_lock.session = session
            try:
                yield session
            finally:
                self._under_lock.session = None

    # ---- rows

    def _tags(self, session: Any, name: str) -> dict[str, str]:
        rows = self._get_query(session, SqlRegisteredModelTag).filter(SqlRegisteredModelTag.name == name)
        return {row.key: row.value for row in rows}

    def _version_tags(self, session: Any, name: str, version: int) -> dict[str, str]:
        self._get_sql_model_version(session, name, version)  # raises MLflow's own not-found, also for a deleted one
        rows = self._get_query(session, SqlModelVersionTag).filter(
            SqlModelVersionTag.name == name, SqlModelVersionTag.version == version
        )
        return {row.key: row.value for row in rows}

    def _tag_by_version(self, session: Any, name: str, key: str) -> dict[int, str]:
        """The value of a tag in each version that has it."""
        rows = self._get_query(session, SqlModelVersionTag).filter_by(name=name, key=key)
        return {row.version: row.value for row in rows}

    def _find_version_tag(self, name: str, key: str, version: int | None = None) -> str | None:
        """The value of a tag of a version (None: of any), None where there is none."""
        with self.ManagedSessionMaker() as session:
            rows = self._get_query(session, SqlModelVersionTag).filter_by(name=name, key=key)
            row = (rows if version is None else rows.filter_by(version=version)).first()
            return None if row is None else str(row.value)

    def _existing(self, session: Any, names: Iterable[str]) -> set[str]:
        """Which of these models there are."""
        rows = self._get_query(session, SqlRegisteredModel).filter(SqlRegisteredModel.name.in_(names))
        return {row.name for row in rows}

    def _write_tag(self, session: Any, name: str, key: str, value: str) -> None:
        workspace = self._get_active_workspace()
        session.merge(SqlRegisteredModelTag(workspace=workspace, name=name, key=key, value=value))

    def _write_version_tag(self, session: Any, name: str, version: int, key: str, value: str) -> None:
        workspace = self._get_active_workspace()
        session.merge(SqlModelVersionTag(workspace=workspace, name=name, version=version, key=key, value=value))

    def _point(self, session: Any, name: str, alias: str, version: int | None) -> None:
        """Set or remove an alias within a transaction."""
        if version is not None:
            session.merge(
                SqlRegisteredModelAlias(workspace=self._get_active_workspace(), name=name, alias=alias, version=version)
            )
        elif (present := self._get_registered_model_alias(session, name, alias)) is not None:
            session.delete(present)
