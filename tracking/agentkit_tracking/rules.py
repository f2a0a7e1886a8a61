"""What an entry of the history must satisfy beside its signature; the guarded store and the loaders apply the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from hashlib import sha256

from agentkit.errors import TrustError
from agentkit_tracking.history import Entry, History
from agentkit_tracking.keys import Trust
from agentkit_tracking.statements import Move, Registration, check, read_checked

PRODUCTION = "production"
TAG = "agentkit."
# Tags of a version: two signed statements, the verdict in a word, names and versions of its prompts in MLflow.
REGISTRATION, EVALUATION = f"{TAG}registration", f"{TAG}evaluation"
VERDICT, PROMPTS = f"{TAG}last_verdict", f"{TAG}prompts"


def is_production(name: str) -> bool:
    """Whether an alias or stage reads as `production` in any spelling, with whatever separators or line breaks in it."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name)).casefold() == PRODUCTION


def prompts_digest(tags: Mapping[str, str] | None) -> str:
    """What an entry signs of a version's prompts: SHA-256 of the tag that names them."""
    return sha256((tags or {}).get(PROMPTS, "").encode()).hexdigest()


def head_problems(history: History, registrations: Mapping[int, str], trust: Trust) -> list[str]:
    """What is wrong with the last entry, one line each.

    Args:
        registrations: signed registration of each version that has one.
    """
    if (head := history.head) is None:
        return []
    move = head.move
    found = [head.problem] if head.problem else []
    if move.event == "withdrawn":
        return found
    if move.event == "promoted":
        found += _promotion_problems(move)
        promotion: Entry | None = head
    else:
        promotion = history.promotion_of(move.version or 0)
        found += _rollback_problems(move, promotion, trust)
    found += _accepted_problems(move, trust)
    if trust.separate_approver and promotion is not None:
        found += _one_person_problems(promotion.move, registrations.get(move.version or 0), trust)
    return found


def _promotion_problems(move: Move) -> list[str]:
    if move.evidence is None:
        return ["it was promoted without evidence"]
    found = [] if move.evidence.verdict == "pass" else [f"its evidence says {move.evidence.verdict}"]
    if move.evidence.compared_with != move.left_release and move.left_release != move.release:
        found.append("its evidence compares it with another release than the one it took the place of")
    return found


def _rollback_problems(move: Move, promotion: Entry | None, trust: Trust) -> list[str]:
    if promotion is None:
        return [f"version {move.version} was never promoted, so nothing can be rolled back to it"]
    found = []
    if (promotion.move.release, promotion.move.evidence) != (move.release, move.evidence):
        found.append("the rollback names another release or other evidence than the promotion it restores")
    try:
        check(promotion.signed, trust)
    except TrustError as e:
        found.append(f"the promotion it restores does not count: {e}")
    return found + _promotion_problems(promotion.move)


def _accepted_problems(move: Move, trust: Trust) -> list[str]:
    """Thresholds and golden set must be those that the trust file accepts, where it names any."""
    accepted = trust.systems.get(move.system)
    if accepted is None or move.evidence is None:
        return []
    pairs = (
        ("thresholds file", move.evidence.thresholds, accepted.thresholds),
        ("golden set", move.evidence.golden, accepted.golden),
    )
    return [
        f"its {what} (SHA-256 {digest[:12]}) is none that trust.json accepts for {move.system}"
        for what, digest, allowed in pairs
        if allowed and digest not in allowed
    ]


def _one_person_problems(move: Move, registration: str | None, trust: Trust) -> list[str]:
    if registration is None:
        return ["nobody signed its registration, so author and approver cannot be told apart (separate_approver)"]
    try:
        _, author = read_checked(registration, Registration, move.system, move.release, trust)
    except TrustError as e:
        return [f"its registration: {e}"]
    approver = trust.find(move.signer.key)
    if approver is None or approver.owner.casefold() == author.owner.casefold():
        return [f"{author.owner} registered and promoted it; separate_approver asks for two people"]
    return []
