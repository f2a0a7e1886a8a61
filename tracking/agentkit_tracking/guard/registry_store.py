"""The registry store that refuses `production`, and changes to what it rests on, without a valid signature.

A subclass of MLflow's SQL store, so every route ends here: SDK, REST, GraphQL, the UI, whoever asks. An entry of the
history and the aliases that mirror it are written in one transaction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.store.tracking.dbmodels.models import SqlRun
from mlflow.utils.validation import _validate_model_version

from agentkit.errors import AgentkitError, TrustError
from agentkit_tracking import history as histories
from agentkit_tracking.guard.locked_store import LockedStore, atomic
from agentkit_tracking.history import KEY, History, with_history
from agentkit_tracking.keys import Trust, load_trust
from agentkit_tracking.rules import (
    EVALUATION,
    PRODUCTION,
    PROMPTS,
    REGISTRATION,
    TAG,
    VERDICT,
    head_problems,
    is_production,
    prompts_digest,
)
from agentkit_tracking.statements import Evaluation, Registration, check, read, read_checked

_HOW = (
    "`production` means signed evidence here. To change it: `agentkit promote {0}`, `agentkit rollback {0}` or "
    "`agentkit withdraw {0}`; to ask for a promotion, set the alias `candidate`"
)
_IS_PROMPT = "mlflow.prompt.is_prompt"
_SHA = f"{TAG}sha256"  # what marks a prompt version as one of a release's
# What MLflow itself adds to a prompt version and its name after it was made; it decides nothing.
_HARMLESS_PROMPT_TAGS = ("mlflow.prompt.associatedRunIds", "_mlflow_experiment_ids", "mlflow.linkedTraces")
_AT_CREATION = {f"{TAG}release_id", PROMPTS, REGISTRATION, f"{TAG}git_commit", f"{TAG}author", _SHA}
# Headings under which people read, in descriptions, who is in production and by what verdict.
_HISTORY_HEADING, _VERDICT_HEADING = (re.compile(rf"(?im)^\s*#+\s*{word}\b") for word in ("History", "Gate"))


class GuardedStore(LockedStore):
    """See the module. Refusals are MlflowExceptions with PERMISSION_DENIED (HTTP 403), for admins, too."""

    # ---- aliases and stages

    @atomic
    def set_registered_model_alias(self, name: str, alias: str, version: Any) -> None:
        """Refused for `production` in any spelling, unless it mirrors the signed history."""
        if is_production(alias):
            self._require(
                alias == PRODUCTION and str(self._mirrored(name)) == str(version), name, f"the alias {alias!r}"
            )
        super().set_registered_model_alias(name, alias, version)

    @atomic
    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        """Refused for `production` while something is in production."""
        if alias == PRODUCTION:
            self._require(self._mirrored(name) is None, name, f"deleting the alias {alias!r}")
        super().delete_registered_model_alias(name, alias)

    def transition_model_version_stage(
        self, name: str, version: Any, stage: str, archive_existing_versions: bool
    ) -> Any:
        """Refused for MLflow's old stage `Production`."""
        self._require(not is_production(stage), name, f"the stage {stage!r}")
        return super().transition_model_version_stage(name, version, stage, archive_existing_versions)

    # ---- tags

    def set_registered_model_tag(self, name: str, tag: Any) -> Any:
        """An entry of the history is checked and written with its aliases; other tags of ours are refused."""
        if tag.key.startswith(KEY):
            return self._append(name, tag)
        # MLflow copies the tags of a prompt's newest version to its name; of those of ours there they decide nothing.
        ours = self._is_ours(tag.key) and not (tag.key == _SHA and not self._is_system(name))
        self._require(not ours and not self._is_prompt_mark(name, tag.key), name, f"the tag {tag.key!r}")
        return super().set_registered_model_tag(name, tag)

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        """Refused for tags of ours and for what makes a model a prompt."""
        self._require(not self._is_ours(key) and key != _IS_PROMPT, name, f"deleting the tag {key!r}")
        super().delete_registered_model_tag(name, key)

    @atomic
    def set_model_version_tag(self, name: str, version: Any, tag: Any) -> Any:
        """A signed evaluation is checked and written with its verdict; other tags of ours, and a prompt's text, are refused."""
        number = _validate_model_version(version)
        if tag.key == EVALUATION:
            return self._set_evaluation(name, number, tag)
        if tag.key == REGISTRATION:
            return self._set_registration(name, number, tag)
        if tag.key == VERDICT:
            ok = self._signed_verdict(name, number) == tag.value
        else:
            ok = not self._is_ours(tag.key) and not self._is_prompt_content(name, number, tag.key)
        self._require(ok, name, f"the tag {tag.key!r} of version {version}")
        return super().set_model_version_tag(name, version, tag)

    def delete_model_version_tag(self, name: str, version: Any, key: str) -> None:
        """Refused for tags of ours and for a prompt's content."""
        number = _validate_model_version(version)
        ok = not self._is_ours(key) and not self._is_prompt_content(name, number, key)
        self._require(ok, name, f"deleting the tag {key!r} of version {version}")
        super().delete_model_version_tag(name, version, key)

    # ---- creation, renaming, deletion, text

    def create_registered_model(
        self, name: str, tags: Any = None, description: Any = None, deployment_job_id: Any = None
    ) -> Any:
        """Without tags of ours but the mark of a system, which no prompt can be."""
        keys = {t.key for t in tags or []}
        may_be_system = "." not in name and _IS_PROMPT not in keys
        allowed = {_SHA, f"{TAG}system"} if may_be_system else {_SHA}
        forged = sorted(key for key in keys if self._is_ours(key) and key not in allowed)
        self._require(not forged, name, f"the tags {forged} at creation")
        if f"{TAG}system" in keys:
            self._require(not _HISTORY_HEADING.search(description or ""), name, "a history in the description")
        return super().create_registered_model(name, tags, description, deployment_job_id)

    def create_model_version(
        self, name: str, source: str, run_id: Any = None, tags: Any = None, *rest: Any, **named: Any
    ) -> Any:
        """With no tags of ours but those that say where a release comes from; a registration must be signed."""
        given = {t.key: t.value for t in tags or []}  # of a tag that is named twice MLflow takes the last, too
        is_system = self._is_system(name)
        forged = [k for k in given if (self._is_ours(k) and k not in _AT_CREATION) or (is_system and _is_of_prompts(k))]
        self._require(not forged, name, f"the tags {forged} at creation")
        release = given.get(f"{TAG}release_id", "0" * 64)
        self._require(bool(re.fullmatch(r"[0-9a-f]{64}", release)), name, f"the release id {release[:80]!r}")
        if PROMPTS in given:
            with _refusing(name):
                _read_prompts(given[PROMPTS], name)
        if REGISTRATION in given:
            self._check_registration(name, given.get(f"{TAG}release_id"), given[REGISTRATION])
        text = named.get("description", rest[1] if len(rest) > 1 else None) or ""
        self._require(not (is_system and _VERDICT_HEADING.search(text)), name, "a verdict in the description")
        return super().create_model_version(name, source, run_id, tags, *rest, **named)

    @atomic
    def rename_registered_model(self, name: str, new_name: str) -> Any:
        """Refused for systems and their prompts: what was signed names them."""
        self._require(self._system_of(name) is None, name, "renaming")
        return super().rename_registered_model(name, new_name)

    @atomic
    def delete_registered_model(self, name: str) -> None:
        """Refused where there is a history, and for prompts of releases that were in production."""
        self._require(not self._has_been_in_production(name, None), name, "deleting")
        super().delete_registered_model(name)

    @atomic
    def delete_model_version(self, name: str, version: Any) -> None:
        """Refused for versions that are or were in production."""
        was = self._has_been_in_production(name, _validate_model_version(version))
        self._require(not was, name, f"deleting version {version}")
        super().delete_model_version(name, version)

    @atomic
    def update_registered_model(self, name: str, description: Any, deployment_job_id: Any = None) -> Any:
        """The history at the end of a system's description stays as it is."""
        if self._is_system(name):
            history, text = self._history(name), description or ""
            present = self.get_registered_model(name).description or ""
            allowed = max(bool(history.entries), len(_HISTORY_HEADING.findall(present)))
            ok = with_history(text, history) == text.strip() and len(_HISTORY_HEADING.findall(text)) <= allowed
            self._require(ok, name, "changing the history in the description")
        return super().update_registered_model(name, description, deployment_job_id)

    @atomic
    def update_model_version(self, name: str, version: Any, description: Any = None) -> Any:
        """An evaluated version's description shows the verdict and is signed; tags are free for notes."""
        text = description or ""
        if (signed := self._evaluation(name, _validate_model_version(version))) is not None:
            ok = sha256(text.encode()).hexdigest() == signed.description
        else:
            ok = not (self._is_system(name) and _VERDICT_HEADING.search(text))
        self._require(ok, name, f"changing the description of version {version}, which shows its verdict,")
        return super().update_model_version(name, version, description)

    # ---- writing what is signed

    def _append(self, name: str, tag: Any) -> None:
        """Check an entry against the history so far, and write it with the aliases of model and prompts."""
        with self._locked(name) as session:
            self._get_registered_model(session, name)  # raises MLflow's own not-found
            before = self._tags(session, name)
            if before.get(tag.key) == tag.value:
                return  # asked again after a lost answer
            trust = _trust()
            with _refusing(name):
                if _IS_PROMPT in before:
                    raise TrustError(f"{name} is a prompt, no system; perhaps somebody took the name in time")
                if tag.key in before:
                    raise TrustError(f"entry {tag.key.removeprefix(KEY)} is there already; somebody else was faster")
                history = histories.parse(name, {**before, tag.key: tag.value}, trust)
                if len(tag.key) != len(KEY) + 6 or history.head is None or history.head.signed.envelope != tag.value:
                    raise TrustError(f"{tag.key!r} is not the next entry")
                if problems := head_problems(history, self._tag_by_version(session, name, REGISTRATION), trust):
                    raise TrustError("; ".join(problems))
                self._check_version(session, name, history)
            self._write_tag(session, name, tag.key, tag.value)
            self._point(session, name, PRODUCTION, history.production)
            for prompt, number in self._prompt_aliases(session, name, history.production).items():
                self._point(session, prompt, PRODUCTION, number)

    def _check_version(self, session: Any, name: str, history: History) -> None:
        """The version that an entry names must exist, with that release, those prompts and that evaluation."""
        assert history.head is not None
        move = history.head.move
        if move.version is None:
            return
        tags = self._version_tags(session, name, move.version)
        if tags.get(f"{TAG}release_id") != move.release:
            raise TrustError(f"version {move.version} is not release {move.release[:12]}")
        if prompts_digest(tags) != move.prompts:
            raise TrustError(f"version {move.version} has other prompts than were signed")
        if move.event == "promoted":
            signed = read(tags.get(EVALUATION, ""), Evaluation)
            if signed.statement.evidence != move.evidence:
                raise TrustError(f"version {move.version} carries another evaluation than the one it is promoted by")
            if session.get(SqlRun, signed.statement.evidence.run) is None:
                raise TrustError("the run that holds its evidence is not on this server; it was signed for another one")

    def _set_evaluation(self, name: str, version: int, tag: Any) -> None:
        """A signed evaluation of this very version, and the verdict that it gives."""
        with self._locked(name) as session:
            before = self._version_tags(session, name, version)
            with _refusing(name):
                signed, _ = read_checked(tag.value, Evaluation, name, before.get(f"{TAG}release_id"), _trust())
                said = signed.statement
                if said.version != version:
                    raise TrustError("signed for another version")
                if _is_older(said, before.get(EVALUATION)):
                    raise TrustError("the evaluation is older than the one that is there")
            for key, value in ((EVALUATION, tag.value), (VERDICT, said.evidence.verdict)):
                self._write_version_tag(session, name, version, key, value)

    def _set_registration(self, name: str, version: int, tag: Any) -> None:
        """A signed registration of a version that nobody signed for when it was made."""
        with self._locked(name) as session:
            tags = self._version_tags(session, name, version)
            present = tags.get(REGISTRATION)
            replaceable = present in (None, tag.value) or not _counts(str(present), Registration)
            self._require(replaceable, name, f"another registration of version {version}")
            self._check_registration(name, tags.get(f"{TAG}release_id"), tag.value)
            self._write_version_tag(session, name, version, REGISTRATION, tag.value)

    @staticmethod
    def _check_registration(name: str, release: str | None, text: str) -> None:
        with _refusing(name):
            try:
                read_checked(text, Registration, name, release, _trust())
            except TrustError as e:
                raise TrustError(f"the registration: {e}") from e

    def _prompt_aliases(self, session: Any, name: str, production: int | None) -> dict[str, int | None]:
        """Each prompt that any version has, and its version in production."""
        tags = self._tag_by_version(session, name, PROMPTS)
        named: dict[int | None, dict[str, int]] = {version: _prompts(text, name) for version, text in tags.items()}
        wanted: dict[str, int | None] = {prompt: None for prompts in named.values() for prompt in prompts}
        wanted |= named.get(production, {})
        exist = self._existing(session, wanted)
        return {prompt: number for prompt, number in wanted.items() if prompt in exist}

    # ---- looking

    def _history(self, name: str) -> History:
        with self.ManagedSessionMaker() as session:
            tags = self._tags(session, name)
        with _refusing(name):
            return histories.parse(name, tags, _trust())

    def _mirrored(self, name: str) -> int | None:
        """The version that the alias `production` of a model or prompt must name."""
        system = self._system_of(name)
        if system is None:
            return None
        production = self._history(system).production
        if name == system:
            return production
        with self.ManagedSessionMaker() as session:
            return self._prompt_aliases(session, system, production).get(name)

    def _system_of(self, name: str) -> str | None:
        """The system that a model is, or whose prompt it is."""
        system = name.partition(".")[0]
        if not self._is_system(system):
            return None
        return system if name == system or self._is_release_prompt(name) else None

    def _is_system(self, name: str) -> bool:
        if "." in name:  # which no system's name has; a mark that somebody gave to a prompt in time is none
            return False
        with self.ManagedSessionMaker() as session:
            tags = self._tags(session, name)
        # A name that somebody took before its first release was registered lacks the mark, not the history.
        return f"{TAG}system" in tags or any(key.startswith(KEY) for key in tags)

    def _is_release_prompt(self, name: str) -> bool:
        """Whether any version of a prompt was made by registering a release."""
        return self._find_version_tag(name, _SHA) is not None

    def _is_prompt_content(self, name: str, version: int, key: str) -> bool:
        """Whether a tag is part of what a release's prompt says or is run with; MLflow keeps all of it in tags.

        One version of a system that is marked as a prompt hides all its versions from searches.
        """
        if not _is_of_prompts(key):
            return False
        if self._is_system(name):
            return True
        return self._find_version_tag(name, _SHA, version) is not None

    def _is_prompt_mark(self, name: str, key: str) -> bool:
        """Whether a tag would turn a system into a prompt, or change what kind of prompt a release's is."""
        return _is_of_prompts(key) and self._system_of(name) is not None

    def _has_been_in_production(self, name: str, version: int | None) -> bool:
        """Whether a version (None: any) of a system, or of a prompt of its releases, is or was in production."""
        system = self._system_of(name)
        if system is None:
            return False
        was = {entry.move.version for entry in self._history(system).entries} - {None}
        if name == system:
            return version in was if version is not None else bool(was)
        with self.ManagedSessionMaker() as session:
            numbers = {self._prompt_aliases(session, system, v).get(name) for v in was} - {None}
        return version in numbers if version is not None else bool(numbers)

    def _evaluation(self, name: str, version: int) -> Evaluation | None:
        text = self._find_version_tag(name, EVALUATION, version)
        if text is None:
            return None
        with _refusing(name):
            return read(text, Evaluation).statement

    def _signed_verdict(self, name: str, version: int) -> str | None:
        found = self._evaluation(name, version)
        return None if found is None else found.evidence.verdict

    @staticmethod
    def _is_ours(key: str) -> bool:
        return key.startswith(TAG)

    @staticmethod
    def _require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise _refusal(name, f"{what} of {name!r} was refused")


def _trust() -> Trust:
    """The trusted keys of the server; a file that cannot be read trusts nobody."""
    try:
        return load_trust()
    except AgentkitError as e:
        raise TrustError(str(e)) from e


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Hand a TrustError to the client as MLflow hands its own errors."""
    try:
        yield
    except TrustError as e:
        raise _refusal(name, f"refused: {e}") from e


def _refusal(name: str, text: str) -> MlflowException:
    return MlflowException(f"{text}. {_HOW.format(name.partition('.')[0])}.", error_code=PERMISSION_DENIED)


def _is_of_prompts(key: str) -> bool:
    return key not in _HARMLESS_PROMPT_TAGS and key.startswith(("mlflow.prompt.", "_mlflow_prompt"))


def _counts(text: str, kind: type[Any]) -> bool:
    """Whether a statement was signed with a key that is trusted now."""
    try:
        check(read(text, kind), _trust())
    except TrustError:
        return False
    return True


def _is_older(said: Evaluation, present: str | None) -> bool:
    """Whether an evaluation that counts, and was signed later, is there."""
    if present is None or not _counts(present, Evaluation):
        return False
    return said.time < read(present, Evaluation).statement.time


def _read_prompts(text: str, system: str) -> dict[str, int]:
    """Prompts that a version's tag names; anybody may make a version, so none that are another system's."""
    try:
        found = {str(p["name"]): int(p["version"]) for p in json.loads(text).values() if p["sha256"]}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise TrustError(f"the tag {PROMPTS!r} lists no prompts") from e
    if others := [name for name in found if not name.startswith(f"{system}.")]:
        raise TrustError(f"the tag {PROMPTS!r} names {others[0]!r}, which is no prompt of {system}")
    return found


def _prompts(text: str, system: str) -> dict[str, int]:
    """As `_read_prompts`; what was written past the guard, and cannot be read, names none."""
    try:
        return _read_prompts(text, system)
    except TrustError:
        return {}
