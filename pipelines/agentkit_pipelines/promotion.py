"""What moves `production`: promotion, rollback, withdrawal. Each is one signed entry in the system's history.

Writing the entry is the one commit point. A crash before it leaves the old production in force, one after it the new;
what mirrors it (aliases, description) the next move or `agentkit doctor --repair` sets right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from agentkit.errors import ReleaseError, TrustError, UnknownReference, UsageError
from agentkit_pipelines.evidence import Plan, evaluate
from agentkit_pipelines.notebook_runner import Progress
from agentkit_pipelines.recording import Evaluation, Say
from agentkit_tracking import history as histories
from agentkit_tracking import production, registry
from agentkit_tracking.home import connect, file_lock, home
from agentkit_tracking.keys import SigningKey, load_trust, signing_key
from agentkit_tracking.mirrors import mirror
from agentkit_tracking.registry import CANDIDATE, Version
from agentkit_tracking.rules import PRODUCTION, head_problems, prompts_digest
from agentkit_tracking.statements import Evidence

Event = Literal["promoted", "rolled_back", "withdrawn"]


def promote(
    plan: Plan, *, why: str = "the gate passed", progress: Progress | None = None, say: Say = lambda _: None
) -> Evaluation:
    """Evaluate, judge, and on the verdict `pass` make the version production. Otherwise nothing moves.

    Raises:
        As `evaluate`; UsageError when there is no key to sign with; TrustError when the rules of `trust.json` forbid
        it; ReleaseError when production changed while the evaluation ran.
    """
    if plan.thresholds is None:
        raise UsageError("a promotion needs thresholds")
    key = signing_key()
    done = evaluate(plan, progress=progress, say=say, key=key)
    if done.verdict is None:
        raise ReleaseError("the evaluation left no verdict; nothing was promoted")
    if done.verdict.verdict == "pass":
        commit(done, key, why=why, say=say)
    return done


def commit(done: Evaluation, key: SigningKey, *, why: str = "the gate passed", say: Say = lambda _: None) -> None:
    """Make an evaluated version production.

    Raises:
        As `promote`.
    """
    version = done.version
    _check_whole(version, done.proof)
    with _one_at_a_time(version.name):
        before = production.current(version.name)
        history = production.history_of(version.name)
        if before is not None and before.release_id == version.release_id and _holds(history):
            say(f"{version} is in production already")
            mirror_or_say(history, say)
            _clear_candidate(version)
            return
        same = done.production or (version if before and before.release_id == version.release_id else None)
        if (before and before.release_id) != (same and same.release_id):
            raise ReleaseError(f"production of {version.name} changed while {version} was evaluated; promote it again")
        _append(history, "promoted", key, version, done.proof, why, say)
        _clear_candidate(version)
    say(f"{version} is now {version.name}@{PRODUCTION}")


def _check_whole(version: Version, proof: Evidence | None) -> None:
    """What will be loaded must be there, unaltered, here and where others fetch it, before anything moves.

    Raises:
        ReleaseError: it would be refused by whoever loads it.
    """
    _, manifest = registry.fetch_version(version)
    registry.check_stored(version)
    checks = [*production.prompt_checks(version, manifest), production.evidence_check(proof)]
    if problems := [c.problem for c in checks if c.problem]:
        raise TrustError(f"{version} is not whole, nothing moved: {'; '.join(problems)}", problems)


def _holds(history: histories.History) -> bool:
    """Whether what is in production now may be loaded; if its key was revoked, say, it can be promoted once more."""
    return not head_problems(history, registry.look_up(history.system).registrations, load_trust())


def _append(
    history: histories.History,
    event: Event,
    key: SigningKey,
    version: Version,
    evidence: Evidence | None,
    why: str,
    say: Say,
) -> None:
    """Sign and write the next entry, then let everything mirror it. `version` is the one that comes, or is withdrawn."""
    from mlflow.exceptions import MlflowException

    name, comes = history.system, event != "withdrawn"
    tag, text = histories.next_entry(
        history,
        event,
        key,
        version=version.number if comes else None,
        release=version.release_id,
        prompts=prompts_digest(version.tags) if comes else None,
        evidence=evidence,
        why=why,
    )
    tags = {f"{histories.KEY}{n:06}": e.signed.envelope for n, e in enumerate(history.entries, 1)}
    trust, registrations = load_trust(), registry.look_up(name).registrations
    if problems := head_problems(histories.parse(name, {**tags, tag: text}, trust), registrations, trust):
        raise TrustError(f"{version} cannot be {event.replace('_', ' ')}: {'; '.join(problems)}", problems)
    try:
        connect().set_registered_model_tag(name, tag, text)  # the commit point
    except MlflowException as e:
        if e.error_code != "PERMISSION_DENIED":
            raise
        raise TrustError(f"the server {e}") from e
    now = production.history_of(name)
    if len(now.entries) < len(history.entries) + 1 or now.entries[len(history.entries)].signed.envelope != text:
        mirror_or_say(now, say)
        raise ReleaseError(
            f"production of {name} changed at the same time; look at `agentkit history {name}`, try again"
        )
    histories.remember(now)
    mirror_or_say(now, say)


@contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """Moves of one system from this home wait for each other; those of others the next entry's number settles."""
    with file_lock(home() / "locks" / f"{name}.lock"):
        yield


def mirror_or_say(history: histories.History, say: Say) -> None:
    """Mirror the history; a failure here undoes nothing, since the entry is written."""
    from mlflow.exceptions import MlflowException

    try:
        mirror(history)
    except MlflowException as e:
        say(f"the move is in force, but not everything shows it yet ({e}); run agentkit doctor --repair")


def _clear_candidate(version: Version) -> None:
    """The wish is granted; one that was meanwhile made for another version stays."""
    if any(CANDIDATE in v.aliases and v.number == version.number for v in registry.versions(version.name)):
        connect().delete_registered_model_alias(version.name, CANDIDATE)


def candidates() -> list[Version]:
    """Every version that carries the alias `candidate`."""
    return [v for name in registry.systems() for v in registry.versions(name) if CANDIDATE in v.aliases]


def rollback(name: str, *, why: str, say: Say = lambda _: None) -> tuple[Version | None, Version]:
    """Make the release that was production before the present one production again, whole.

    Returns:
        (the version left, None after a withdrawal; the version now in force).

    Raises:
        ReleaseError: there is no previous one, or it is not intact; TrustError: its promotion does not count any more;
        UsageError: no key to sign with. Nothing moved.
    """
    key = signing_key()
    with _one_at_a_time(name):
        history, left = production.history_of(name), production.current(name)
        if history.head is None:
            raise UnknownReference(f"{name} has no version in production; there is nothing to roll back")
        earlier = history.earlier()
        if not earlier:
            raise UnknownReference(
                f"{left or name} was the first in production; there is nothing to go back to. Promote another version, or "
                f"take it out with `agentkit withdraw {name}`"
            )
        target = registry.resolve(f"{name}/{earlier[-1]}")
        promotion = history.promotion_of(target.number)
        proof = promotion.move.evidence if promotion else None
        _check_whole(target, proof)
        _append(history, "rolled_back", key, target, proof, why, say)
    say(f"{name}@{PRODUCTION} is {target} again")
    return left, target


def withdraw(name: str, *, why: str, say: Say = lambda _: None) -> Version:
    """Take the version in production out and leave nothing there; loads of `name@production` are refused from then on.

    Raises:
        UnknownReference: nothing is in production. UsageError: no key to sign with.
    """
    key = signing_key()
    with _one_at_a_time(name):
        history = production.history_of(name)
        if history.head is None or history.head.move.version is None:
            raise UnknownReference(f"{name} has no version in production")
        left = Version(name, history.head.move.version, history.head.move.release)  # also one that was deleted
        _append(history, "withdrawn", key, left, None, why, say)
    return left
