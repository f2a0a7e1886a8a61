"""What is in production: the last entry of the signed history, checked against everything that mirrors it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agentkit.errors import TrustError, UnknownReference
from agentkit_tracking import history as histories
from agentkit_tracking.history import History
from agentkit_tracking.home import connect
from agentkit_tracking.keys import load_trust
from agentkit_tracking.manifest import Manifest
from agentkit_tracking.mirrors import own_prompts, prompt_in_production
from agentkit_tracking.registry import Registered, Version, look_up, prompt_text
from agentkit_tracking.rules import EVALUATION, PRODUCTION, VERDICT, head_problems, is_production, prompts_digest
from agentkit_tracking.statements import Evaluation, Evidence, Signed, check, read

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One thing looked at. A problem that `blocks` keeps the release from being loaded."""

    what: str
    problem: str = ""
    blocks: bool = True


def history_of(name: str) -> History:
    """A system's signed history, entry by entry built on the one before.

    Raises:
        UnknownReference: no such system.
        TrustError: it was altered, or goes back behind what this machine has seen.
    """
    registered = look_up(name)
    if not registered.versions and not registered.tags:
        raise UnknownReference(f"no system {name!r} is registered; see `agentkit list`")
    return histories.of(name, registered.tags, registered.known)


def find_production(name: str) -> Version | None:
    """The version in production, or None. Its release and evidence are checked when it is loaded.

    Raises:
        TrustError: the alias, or what the registry says of the version, is not what was signed; says what differs.
    """
    registered = look_up(name)
    found = histories.of(name, registered.tags, registered.known)
    refuse(name, registry_checks(registered, found))
    histories.remember(found)
    return _numbered(registered, found.production)


def current(name: str) -> Version | None:
    """The version that the signed history says is in production, whatever mirrors it; what a promotion starts from.

    Raises:
        TrustError: the history itself was altered.
    """
    registered = look_up(name)
    return _numbered(registered, histories.of(name, registered.tags, registered.known).production)


def refuse(name: str, checks: Iterator[Check]) -> None:
    """Raise TrustError if a check found what blocks; warn of the rest."""
    found = [c for c in checks if c.problem]
    for c in found:
        if not c.blocks:
            _log.warning("%s@%s: %s", name, PRODUCTION, c.problem)
    if problems := [c.problem for c in found if c.blocks]:
        raise TrustError(
            f"{name}@{PRODUCTION} is refused: {'; '.join(problems)}. Promote a version with `agentkit promote`, go back "
            f"with `agentkit rollback {name}`, or see what is stored with `agentkit verify {name}@{PRODUCTION}`",
            problems,
        )


def registry_checks(registered: Registered, history: History) -> Iterator[Check]:
    """The last entry's signature and rules, the alias, and what the registry says of the version in production."""
    name, head = registered.name, history.head
    aliases = {a: n for a, n in registered.aliases.items() if is_production(a)}
    staged = [v for v in registered.versions if is_production(v.stage)]
    if staged:
        yield Check("stages", f"{staged[0]} was put into the stage {staged[0].stage!r}, which proves nothing")
    if other := sorted(aliases.keys() - {PRODUCTION}):
        yield Check("look-alike aliases", f"the alias {other[0]!r} was set without evidence")
    if head is None:
        if PRODUCTION in aliases:
            yield Check("alias", f"the alias points to version {aliases[PRODUCTION]}, but no signed history says so")
        return
    problems = head_problems(history, registered.registrations, load_trust())
    yield Check(f"signature and rules: entry {head.move.sequence} by {head.who}", "; ".join(problems))
    yield _alias_check(aliases.get(PRODUCTION), history)
    if head.move.version is None:
        return
    version = _numbered(registered, head.move.version)
    if version is None:
        yield Check("version", f"version {head.move.version} of {name} is in production, but was deleted")
        return
    stored = version.release_id == head.move.release
    yield Check(
        "release id of the version",
        "" if stored else f"{version} says release {version.release_id[:12]}, signed was {head.move.release[:12]}",
    )
    same = prompts_digest(version.tags) == head.move.prompts
    yield Check("prompts of the version", "" if same else f"{version} names other prompts than were signed")
    yield evaluation_check(version)


def _alias_check(alias: int | None, history: History) -> Check:
    """The alias mirrors the history; one move behind is a move that was cut off between entry and alias."""
    assert history.head is not None
    move = history.head.move
    says = f"version {move.version}" if move.version else "nothing"
    if alias == move.version:
        return Check(f"alias `production`: {says}")
    points = f"points to version {alias}" if alias else "is not set"
    if alias == move.left_version:
        text = f"the alias {points}, the signed history says {says}, which holds; `agentkit doctor --repair` moves it"
        return Check("alias", text, blocks=False)
    return Check("alias", f"the alias {points}, but the signed history says {says} is in production")


def evaluation_check(version: Version) -> Check:
    """Whether the verdict that a version shows is the one that was signed."""
    tags = version.tags or {}
    shown, text = tags.get(VERDICT), tags.get(EVALUATION)
    if text is None:
        return Check(
            "verdict", f"{version} shows the verdict {shown!r} without a signature" if shown else "", blocks=bool(shown)
        )
    try:
        signed = evaluation_of(version)
        assert signed is not None
        check(signed, load_trust())
    except TrustError as e:
        return Check("verdict", f"the verdict of {version}: {e}")
    said = signed.statement.evidence.verdict
    return Check(
        f"verdict shown: {said}", "" if shown == said else f"{version} shows the verdict {shown!r}, signed was {said!r}"
    )


def evaluation_of(version: Version) -> Signed[Evaluation] | None:
    """The signed evaluation that a version carries, if any, of this version and release.

    Raises:
        TrustError: it is another version's, or no such statement.
    """
    text = (version.tags or {}).get(EVALUATION)
    if text is None:
        return None
    signed = read(text, Evaluation)
    said = signed.statement
    if (said.system, said.version, said.release) != (version.name, version.number, version.release_id):
        raise TrustError("its evaluation was signed for another release")
    return signed


def evidence_check(evidence: Evidence | None) -> Check:
    """Whether the MLflow run that holds the evidence is still there; one call."""
    from mlflow.exceptions import MlflowException

    if evidence is None:
        return Check("MLflow run of the evidence")
    try:
        run = connect().get_run(evidence.run)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return Check(
            "MLflow run of the evidence", f"the run {evidence.run} that holds its evidence does not exist any more"
        )
    experiment = connect().get_experiment(run.info.experiment_id)
    gone = "deleted" in (run.info.lifecycle_stage, experiment.lifecycle_stage)
    return Check(
        "MLflow run of the evidence",
        f"the run {evidence.run} that holds its evidence was deleted; restore it" if gone else "",
    )


def prompt_checks(version: Version, manifest: Manifest) -> Iterator[Check]:
    """Whether the prompts that MLflow shows, and gives to others, are those of the release. One call per prompt."""
    from mlflow.exceptions import MlflowException

    named = own_prompts(version)
    if named.keys() != manifest.prompts.keys():
        yield Check("prompts", f"{version} names other prompts than its release has")
    for short, (name, number) in named.items():
        try:
            stored = connect().get_prompt_version(name, str(number))
            problem = _prompt_problem(stored, prompt_text(manifest.prompts[short]))
        except (MlflowException, KeyError, ValueError) as e:
            problem = f"cannot be read ({str(e).splitlines()[0]})"
        yield Check(
            f"text of prompt {name} version {number}",
            f"the text of prompt {name} version {number} {problem}" if problem else "",
        )


def _prompt_problem(stored: Any, text: str) -> str:
    if stored is None:
        return "was deleted"
    if stored.template != text:
        return "was changed in MLflow"
    if stored.model_config:
        return "was given another model in MLflow"
    return "was given a response format in MLflow" if stored.response_format else ""


def mirror_checks(version: Version) -> Iterator[Check]:
    """Whether the prompts' aliases follow; a mirror that lags behind keeps nothing from being loaded."""
    for name, number in own_prompts(version).values():
        found = prompt_in_production(name)
        problem = f"prompt {name}@{PRODUCTION} is version {found}, should be {number}; `agentkit doctor --repair`"
        yield Check(f"alias of prompt {name}", "" if found == number else problem, blocks=False)


def _numbered(registered: Registered, number: int | None) -> Version | None:
    return next((v for v in registered.versions if v.number == number), None)
