"""Who was in production when, by what evidence, and why it left: a chain of signed entries per system.

Entry n is the tag `agentkit.history.<n>` of the registered model, an envelope around a `Move` that holds the hash of
entry n-1. The last entry is the truth; the alias `production`, the prompts' aliases and the text in the UI mirror it.
Writing an entry is the one commit point of a promotion, a rollback or a withdrawal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal

from agentkit.errors import TrustError
from agentkit_tracking.home import file_lock, home, tracking_uri, write_whole
from agentkit_tracking.keys import SigningKey, Trust, TrustedKey, load_trust
from agentkit_tracking.statements import Evidence, Move, Signed, check, day, read, sign, signer

KEY = "agentkit.history."
HEADING = "### History"
DESCRIPTION_LIMIT = 5000  # characters; mlflow's column, which SQLite alone does not enforce
_TAG_LIMIT = 5000  # characters; mlflow's column, which SQLite alone does not enforce
_LINES = 15  # of the history in a model's description, whose column takes 5,000 characters
WORDS = {"promoted": "promoted", "rolled_back": "rolled back to", "withdrawn": "withdrawn"}


@dataclass(frozen=True)
class Entry:
    """One move. `problem` says what is wrong with its signature, as of now; "" where nothing is.

    `genuine`: a key trusted here made the signature, when it still signed; it may have been revoked since.
    """

    signed: Signed[Move]
    key: TrustedKey | None
    problem: str
    genuine: bool

    @property
    def move(self) -> Move:
        """What was signed."""
        return self.signed.statement

    @property
    def who(self) -> str:
        """The signer as our trusted keys name him, and whether it was a key that vouches for its own machine only."""
        said = self.move.signer
        owner = self.key.owner if self.key else f"{said.owner}?"
        return f"{owner} (local key)" if said.local or (self.key and self.key.local) else owner


@dataclass(frozen=True)
class History:
    """A system's entries, oldest first, each built on the one before."""

    system: str
    entries: tuple[Entry, ...] = ()

    @property
    def head(self) -> Entry | None:
        """The last entry, which says what is in production."""
        return self.entries[-1] if self.entries else None

    @property
    def production(self) -> int | None:
        """The version in production."""
        return self.head.move.version if self.head else None

    def earlier(self) -> list[int]:
        """Versions to which rollbacks lead, in turn from the end; none that only a forged entry promoted."""
        stack: list[int] = []
        for entry in self.entries:
            move, left = entry.move, entry.move.left_version
            if move.event == "promoted" and left not in (None, move.version):
                stack += [left or 0] if self.promotion_of(left or 0) else []
            elif move.event == "rolled_back" and stack and entry.genuine:
                stack.pop()
        return stack

    def promotion_of(self, version: int) -> Entry | None:
        """The last genuine entry that promoted a version."""
        found = [e for e in self.entries if e.genuine and e.move.event == "promoted" and e.move.version == version]
        return found[-1] if found else None


def parse(system: str, tags: Mapping[str, str], trust: Trust) -> History:
    """The history that a registered model's tags hold.

    Raises:
        TrustError: an entry is missing, altered, foreign or not built on the one before. A signature that does not
            count is no error here but the entry's `problem`: past entries are vouched for by the last.
    """
    found = {key.removeprefix(KEY): value for key, value in tags.items() if key.startswith(KEY)}
    entries: list[Entry] = []
    for n in range(1, len(found) + 1):
        if (text := found.get(f"{n:06}")) is None:
            raise TrustError(f"the history of {system} was altered: entry {n} of {len(found)} is missing")
        try:
            signed = read(text, Move)
            _follows(system, n, signed.statement, entries[-1] if entries else None)
        except TrustError as e:
            raise TrustError(f"the history of {system} was altered: entry {n}: {e}") from e
        then = _problem(signed, trust, True)
        now = then if n < len(found) else _problem(signed, trust, False)
        entries.append(Entry(signed, trust.find(signed.key_id), now, genuine=not then))
    return History(system, tuple(entries))


def _problem(signed: Signed[Move], trust: Trust, is_past: bool) -> str:
    try:
        check(signed, trust, is_past=is_past)
    except TrustError as e:
        return str(e)
    return ""


def _follows(system: str, n: int, move: Move, last: Entry | None) -> None:
    """Check that a move is this system's n-th and starts from where the last one left off."""
    before = last.signed.digest if last else None
    at = (last.move.version, last.move.release if last.move.version else None) if last else (None, None)
    if (move.system, move.sequence) != (system, n):
        raise TrustError(f"it is entry {move.sequence} of {move.system}")
    if move.before != before:
        raise TrustError("it is not built on the entry before it; another one stood there")
    if (move.left_version, move.left_release) != at:
        raise TrustError(f"it leaves version {move.left_version}, but {at[0]} was in production")
    if (move.version is None) != (move.event == "withdrawn"):
        raise TrustError(f"a version {move.event} must {'not ' if move.event == 'withdrawn' else ''}be named")


def next_entry(
    history: History,
    event: Literal["promoted", "rolled_back", "withdrawn"],
    key: SigningKey,
    *,
    version: int | None,
    release: str,
    prompts: str | None,
    evidence: Evidence | None,
    why: str,
) -> tuple[str, str]:
    """Tag and signed text of the entry that would come next."""
    last, why = history.head, " ".join(why.split())[:500]
    move = Move(
        system=history.system,
        release=release,
        time=datetime.now(UTC),
        signer=signer(key),
        event=event,
        sequence=len(history.entries) + 1,
        before=last.signed.digest if last else None,
        version=version,
        left_version=last.move.version if last else None,
        left_release=last.move.release if last and last.move.version else None,
        prompts=prompts,
        evidence=evidence,
        why=why,
    )
    while len(text := sign(move, key)) > _TAG_LIMIT and move.why:  # letters beyond ASCII take eight to sixteen each
        move = move.model_copy(update={"why": move.why[: len(move.why) * 9 // 10]})
    return f"{KEY}{move.sequence:06}", text


# ---- for people


def describe(entry: Entry) -> str:
    """One line: what moved when, by whom, why."""
    move = entry.move
    what = f"version {move.version}" if move.version else f"version {move.left_version}"
    left = f" (before: version {move.left_version})" if move.left_version and move.version else ""
    proof = f" · evidence {move.evidence.sha256[:12]}" if move.evidence else ""
    line = f"{day(move.time)} {WORDS[move.event]} {what}{left} by {entry.who}{proof} · {move.why}"
    return " ".join(line.split())  # who signs by other means than ours could write headings into the description


def render(history: History) -> str:
    """The history as the MLflow UI shows it in the model's description: newest first."""
    if not history.entries:
        return ""
    shown = [f"- {describe(e)[:250]}" for e in reversed(history.entries[-_LINES:])]
    more = len(history.entries) - len(shown)
    return "\n".join([HEADING, "", *shown, *([f"- … {more} older: agentkit history {history.system}"] if more else [])])


def with_history(description: str, history: History) -> str:
    """A model's description with the history at its end, within MLflow's limit."""
    shown = render(history)
    said = description.partition(HEADING)[0].strip()[: DESCRIPTION_LIMIT - len(shown) - 2]
    return "\n\n".join(filter(None, [said, shown]))


# ---- what this machine has seen


def remember(history: History) -> None:
    """Keep a verified history here: a store that is put back to an older state is noticed, lost entries can be restored."""
    entries = [e.signed.envelope for e in history.entries]
    if not entries or entries == seen(history.system):
        return
    path = _seen_path(history.system)
    with file_lock(path.with_name(f".{path.name}.lock")):
        known = seen(history.system)
        if len(entries) <= len(known) or entries[: len(known)] != known:
            return  # a process that looked before the last move
        write_whole(path, json.dumps(entries).encode())


def seen(system: str) -> list[str]:
    """The entries of a system that this machine has verified before, oldest first.

    Raises:
        TrustError: the file that holds them cannot be read.
    """
    path = _seen_path(system)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise TrustError(f"what this machine has seen of {system} cannot be read: {path}: {e}") from e
    if not isinstance(found, list):
        raise TrustError(f"what this machine has seen of {system} cannot be read: {path} holds no list")
    return [str(text) for text in found]


def _went_back(history: History, known: list[str]) -> str:
    """What says that the store holds an older or another history than this machine has seen; "" if nothing does."""
    path = _seen_path(history.system)
    found = [e.signed.envelope for e in history.entries]
    if found[: len(known)] == known:
        return ""
    n = next((i for i, (a, b) in enumerate(zip(known, found, strict=False), 1) if a != b), len(found) + 1)
    what = "is missing, which this machine has seen" if n > len(found) else "is another than this machine has seen"
    return f"the history of {history.system} was put back or written anew: entry {n} {what} (if you meant that, delete {path})"


def _seen_path(system: str) -> Path:
    store = sha256(tracking_uri().encode()).hexdigest()[:12]
    return home() / "seen" / f"{system}-{store}.json"


def of(system: str, tags: Mapping[str, str], known: list[str] | None = None) -> History:
    """`parse` with the keys trusted here, compared with what this machine has seen.

    Args:
        known: what it had `seen` before the tags were read; None: has seen by now. Another process may promote in between.

    Raises:
        TrustError: as `parse`, or the history went back.
    """
    history = parse(system, tags, load_trust())
    if problem := _went_back(history, seen(system) if known is None else known):
        raise TrustError(problem)
    return history
