"""The history: an append-only chain of signed moves, from which nothing can be taken, and into which nothing put."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import SOAK
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_statements import EVIDENCE

from agentkit.errors import TrustError
from agentkit_tracking import history as histories
from agentkit_tracking.history import DESCRIPTION_LIMIT, HEADING, KEY, History, describe, next_entry, parse, render
from agentkit_tracking.keys import SigningKey, Trust, _generate
from agentkit_tracking.mirrors import with_history
from agentkit_tracking.rules import head_problems
from agentkit_tracking.statements import sign

ADA, BOB, EVE = (SigningKey(*_generate(name, local=False)) for name in ("Ada", "Bob", "Eve"))
TRUST = Trust(keys=(ADA.public, BOB.public))
Tags = dict[str, str]


def release(version: int) -> str:
    return f"{version:064x}"


def moved(
    tags: Mapping[str, str],
    event: Any,
    version: int | None,
    key: SigningKey = ADA,
    *,
    system: str = "colours",
    trust: Trust = TRUST,
    **changes: Any,
) -> Tags:
    """The tags with another entry, as a client would write it."""
    history = parse(system, tags, trust)
    taken = release(version or history.production or 0)
    left = None if history.head is None or history.production is None else history.head.move.release
    if event == "rolled_back":
        promotion = history.promotion_of(version or 0)
        proof = promotion.move.evidence if promotion else EVIDENCE
    else:
        proof = EVIDENCE.model_copy(update={"compared_with": left}) if event == "promoted" else None
    said: dict[str, Any] = {"release": taken, "prompts": version and "0" * 64, "evidence": proof, "why": "w", **changes}
    tag, text = next_entry(history, event, key, version=version, **said)
    return {**tags, tag: text}


def made(*moves: tuple[Any, ...], system: str = "colours", key: SigningKey = ADA) -> Tags:
    tags: Tags = {"agentkit.system": "true"}
    for event, version in moves:
        tags = moved(tags, event, version, key, system=system)
    return tags


def problems(tags: Mapping[str, str], trust: Trust = TRUST, registrations: Mapping[int, str] | None = None) -> str:
    return "; ".join(head_problems(parse("colours", tags, trust), registrations or {}, trust))


P1, P2, P3 = ("promoted", 1), ("promoted", 2), ("promoted", 3)
BACK1, BACK2, OUT = ("rolled_back", 1), ("rolled_back", 2), ("withdrawn", None)


# ---- who is in production, and where a rollback leads


@pytest.mark.parametrize(
    ("moves", "production", "earlier"),
    [
        ((), None, []),
        ((P1,), 1, []),
        ((P1, P2), 2, [1]),
        ((P1, P2, P3), 3, [1, 2]),
        ((P1, P2, BACK1), 1, []),
        ((P1, P2, P3, BACK2), 2, [1]),
        ((P1, P2, P3, BACK2, BACK1), 1, []),
        ((P1, P2, BACK1, P3), 3, [1]),
        ((P1, P2, P1), 1, [1, 2]),
        ((P1, P1), 1, []),  # once more, with another key, say
        ((P1, OUT), None, []),
        ((P1, P2, OUT), None, [1]),  # a rollback leads past the one that was taken out
        ((P1, P2, OUT, P3), 3, [1]),
        ((P1, P2, OUT, BACK1), 1, []),
        ((P1, OUT, P1, P2), 2, [1]),
    ],
)
def test_rollbacks_lead_back_along_what_was_in_production(
    moves: tuple[Any, ...], production: int | None, earlier: list[int]
) -> None:
    history = parse("colours", made(*moves), TRUST)
    assert (history.production, history.earlier()) == (production, earlier)
    assert [(e.move.event, e.move.version) for e in history.entries] == list(moves)
    assert [e.move.sequence for e in history.entries] == list(range(1, len(moves) + 1))
    assert {e.problem for e in history.entries} <= {""}


class Road(RuleBasedStateMachine):
    """Promotions, rollbacks, withdrawals by two people, one of whom may leave; beside it a plain list of what was."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Tags = {}
        self.trust = TRUST
        self.production: int | None = None
        self.before: list[int] = []
        self.moves: list[tuple[str, int | None]] = []
        self.foreign = list(made(P1, P2, BACK1, P3, system="flowers").values())[1:]

    def _signer(self, who: str) -> SigningKey:
        known = self.trust.find(BOB.public.id)
        return BOB if who == "Bob" and known is not None and not known.revoked else ADA

    def _move(self, event: str, version: int | None, who: str) -> None:
        self.tags = moved(self.tags, event, version, self._signer(who), trust=self.trust)
        self.moves.append((event, version))
        self.production = version

    @rule(version=st.integers(1, 5), who=st.sampled_from(["Ada", "Bob"]))
    def promote(self, version: int, who: str) -> None:
        if self.production not in (None, version):
            self.before.append(self.production or 0)
        self._move("promoted", version, who)

    @precondition(lambda self: self.before)
    @rule(who=st.sampled_from(["Ada", "Bob"]))
    def rollback(self, who: str) -> None:
        self._move("rolled_back", self.before.pop(), who)

    @precondition(lambda self: self.production)
    @rule(who=st.sampled_from(["Ada", "Bob"]))
    def withdraw(self, who: str) -> None:
        self._move("withdrawn", None, who)

    @precondition(lambda self: len(self.moves) > 3)
    @rule()
    def revoke_bob(self) -> None:
        gone = BOB.public.model_copy(update={"revoked": datetime.now(UTC)})
        self.trust = Trust(keys=(ADA.public, gone))

    @invariant()
    def tells_what_happened(self) -> None:
        history = parse("colours", self.tags, self.trust)
        assert [(e.move.event, e.move.version) for e in history.entries] == self.moves
        assert (history.production, history.earlier()) == (self.production, self.before)
        for entry in history.entries[:-1]:
            assert entry.problem == ""
        if history.head is not None:
            revoked = self.trust.find(history.head.signed.key_id).revoked
            assert bool(history.head.problem) == bool(revoked)
        assert len(render(history)) < DESCRIPTION_LIMIT

    @precondition(lambda self: self.moves)
    @rule(data=st.data())
    def nothing_else_is_accepted(self, data: Any) -> None:
        """Whatever is put where entries stand is refused, or is the same story up to some entry."""
        n = len(self.moves)
        own = [self.tags[f"{KEY}{i:06}"] for i in range(1, n + 1)]
        last = parse("colours", self.tags, self.trust).entries[-1].move
        forged = [sign(last.model_copy(update={"signer": last.signer.model_copy(update={"key": EVE.public.id})}), EVE)]
        place = st.integers(1, n + 1).map(lambda i: f"{KEY}{i:06}")
        changes = st.lists(
            st.tuples(place, st.sampled_from([None, *own, *self.foreign, *forged])), min_size=1, max_size=4
        )
        tags = dict(self.tags)
        for key, text in data.draw(changes):
            tags.pop(key, None)
            if text is not None:
                tags[key] = text
        try:
            found = parse("colours", tags, self.trust)
        except TrustError:
            return
        if found.head is None or not found.head.problem:
            assert [(e.move.event, e.move.version) for e in found.entries] == self.moves[: len(found.entries)]


TestRoad = Road.TestCase
TestRoad.settings = settings(deadline=None, max_examples=500 if SOAK else 30, stateful_step_count=20)


# ---- what was altered

LONG = made(P1, P2, P3, BACK2, P3)
OTHER = made(P1, P2, P3, BACK2, P3, system="flowers")


def entry(n: int) -> str:
    return f"{KEY}{n:06}"


def without(n: int, tags: Tags = LONG) -> Tags:
    return {k: v for k, v in tags.items() if k != entry(n)}


def closed_up(n: int) -> Tags:
    """An entry taken out and the later ones moved up."""
    texts = [LONG[entry(i)] for i in range(1, 6) if i != n]
    return {entry(i): text for i, text in enumerate(texts, 1)}


def forked(n: int, key: SigningKey) -> Tags:
    """Another entry n than the one on which the later ones were built."""
    before = {k: v for k, v in LONG.items() if k < entry(n)}
    return {**LONG, **moved(before, "promoted", 9, key)}


ALTERED = {
    **{f"entry {n} is missing": (without(n), f"entry {n} of 4 is missing") for n in range(1, 5)},
    **{f"entry {n} was taken out": (closed_up(n), f"entry {n}: it is entry {n + 1} of colours") for n in range(1, 5)},
    "two exchanged": ({**LONG, entry(2): LONG[entry(3)], entry(3): LONG[entry(2)]}, "entry 2: it is entry 3 of colours"),
    "one twice": ({**LONG, entry(6): LONG[entry(5)]}, "entry 6: it is entry 5 of colours"),
    "an old one again": ({**LONG, entry(5): LONG[entry(3)]}, "entry 5: it is entry 3 of colours"),
    "another system's": ({**LONG, entry(3): OTHER[entry(3)]}, "entry 3: it is entry 3 of flowers"),
    "another system's first": ({entry(1): OTHER[entry(1)]}, "entry 1: it is entry 1 of flowers"),
    "all of another system's": (OTHER, "entry 1: it is entry 1 of flowers"),
    "another entry by the same key": (forked(3, ADA), "entry 4: it is not built on the entry before it"),
    "another entry by a stranger": (forked(3, EVE), "entry 4: it is not built on the entry before it"),
    "another first entry": (forked(1, ADA), "entry 2: it is not built on the entry before it"),
    "numbered otherwise": ({**without(2), f"{KEY}2": LONG[entry(2)]}, "entry 2 of 5 is missing"),
    "one that is none": ({**LONG, f"{KEY}x": "note"}, "entry 6 of 6 is missing"),
    "text": ({**LONG, entry(2): "promoted"}, r"entry 2: a signed statement \(Move\) cannot be read"),
    "empty": ({**LONG, entry(2): ""}, r"entry 2: a signed statement \(Move\) cannot be read"),
    "beginning lost": ({entry(n): LONG[entry(n + 2)] for n in (1, 2, 3)}, "entry 1: it is entry 3 of colours"),
}  # fmt: skip


@pytest.mark.parametrize("what", ALTERED)
def test_what_was_altered_is_said_with_its_place(what: str) -> None:
    tags, message = ALTERED[what]
    with pytest.raises(TrustError, match=f"^the history of colours was altered: {message}"):
        parse("colours", tags, TRUST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": None, "event": "promoted"}, "a version promoted must be named"),
        ({"version": 2, "event": "withdrawn"}, "a version withdrawn must not be named"),
        ({"left_version": 7}, "it leaves version 7, but 1 was in production"),
        ({"left_release": release(7)}, "it leaves version 1, but 1 was in production"),
        ({"left_version": None, "left_release": None}, "it leaves version None, but 1 was in production"),
        ({"before": None}, "it is not built on the entry before it"),
        ({"sequence": 3}, "it is entry 3 of colours"),
        ({"system": "flowers"}, "it is entry 2 of flowers"),
    ],
)
def test_not_even_a_holder_of_a_key_can_write_what_does_not_follow(changes: dict[str, Any], message: str) -> None:
    tags = made(P1, P2)
    last = parse("colours", tags, TRUST).entries[-1].move
    with pytest.raises(TrustError, match=f"entry 2: {message}"):
        parse("colours", {**tags, entry(2): sign(last.model_copy(update=changes), ADA)}, TRUST)


def test_the_signature_of_an_entry_can_be_exchanged_for_no_other() -> None:
    for n in (2, 5):
        outer = json.loads(LONG[entry(n)])
        outer["signatures"] = json.loads(LONG[entry(1)])["signatures"]
        found = parse("colours", {**LONG, entry(n): json.dumps(outer)}, TRUST)
        assert "does not fit: what was signed was altered" in found.entries[n - 1].problem
        assert [e.problem for e in found.entries if e.problem] == [found.entries[n - 1].problem]


# ---- what must hold of the last entry


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (made(P1), ""),
        (made(P1, P2, BACK1), ""),
        (made(P1, OUT), ""),
        # Without the key's id, which is another in every process that runs these tests.
        (moved(made(P1), "promoted", 2, EVE), ", which is not trusted here"),
        (moved(made(P1), "withdrawn", None, EVE), "which is not trusted here"),
        (moved({}, "promoted", 1, evidence=None), "it was promoted without evidence"),
        (
            moved({}, "promoted", 1, evidence=EVIDENCE.model_copy(update={"verdict": "inconclusive"})),
            "its evidence says inconclusive",
        ),
        (
            moved(made(P1), "promoted", 2, evidence=EVIDENCE),
            "its evidence compares it with another release than the one it took the place of",
        ),
        (moved(made(P1), "promoted", 1, evidence=EVIDENCE), ""),  # the same once more is compared with nothing
        (moved(made(P1, P2), "rolled_back", 3), "version 3 was never promoted, so nothing can be rolled back to it"),
        (
            moved(made(P1, P2), "rolled_back", 1, release=release(7)),
            "the rollback names another release or other evidence than the promotion it restores",
        ),
        (moved(made(P1, P2), "rolled_back", 1, evidence=None), "names another release or other evidence"),
    ],
)
def test_the_last_entry_must_be_signed_and_follow_the_rules(tags: Tags, message: str) -> None:
    found = problems(tags)
    assert message in found
    assert bool(message) == bool(found)


def test_a_promotion_that_never_counted_is_nothing_to_roll_back_to() -> None:
    """Somebody who can write to the store, and holds no key, lets an operator sign what he could not."""
    tags = moved(moved(made(P1, P2), "promoted", 3, EVE), "promoted", 2, EVE)
    history = parse("colours", tags, TRUST)
    assert history.earlier() == [1, 2]  # 3 never was
    forged = moved(tags, "rolled_back", 3)
    assert "version 3 was never promoted" in problems(forged)
    assert problems(moved(tags, "rolled_back", 2)) == ""  # what Ada promoted, whatever was put on top
    unfit = json.loads(tags[entry(3)])
    unfit["signatures"] = [{**unfit["signatures"][0], "keyid": ADA.public.id}]
    assert parse("colours", {**tags, entry(3): json.dumps(unfit)}, TRUST).earlier() == [1, 2]


def test_a_promotion_without_evidence_does_not_become_good_by_a_rollback() -> None:
    tags = moved({}, "promoted", 1, evidence=None)
    tags = moved(moved(tags, "promoted", 2), "rolled_back", 1)
    assert problems(tags) == "it was promoted without evidence"


def test_forged_rollbacks_take_nothing_from_where_rollbacks_lead() -> None:
    tags = moved(moved(made(P1, P2, P3), "rolled_back", 2, EVE), "rolled_back", 1, EVE)
    assert parse("colours", tags, TRUST).earlier() == [1, 2]
    assert problems(moved(tags, "rolled_back", 2)) == ""


@pytest.mark.parametrize(("head", "counts"), [(P3, True), (BACK1, False)])
def test_a_revoked_key_breaks_no_chain_but_what_it_promoted_cannot_come_back(head: Any, counts: bool) -> None:
    """Bob promoted version 1 and left."""
    tags = moved(moved({}, "promoted", 1, BOB), "promoted", 2)
    tags = moved(tags, *head)
    gone = Trust(keys=(ADA.public, BOB.public.model_copy(update={"revoked": datetime.now(UTC), "why": "left"})))
    assert problems(tags) == ""
    found = problems(tags, gone)
    assert found == "" if counts else "the promotion it restores does not count: signed with key" in found
    assert problems(moved({}, "promoted", 1, BOB), gone).endswith("left")
    with pytest.raises(TrustError, match="altered"):  # a broken chain stays broken
        parse("colours", without(1, tags), gone)


def test_only_accepted_thresholds_and_golden_sets_count_where_any_are_named() -> None:
    tags = made(P1)

    def accepting(**named: Any) -> Trust:
        return Trust.model_validate({"systems": {"colours": named}, "keys": TRUST.keys})

    assert problems(tags, accepting(thresholds=["5" * 64], golden=["6" * 64, "7" * 64])) == ""
    assert problems(tags, accepting()) == ""
    assert problems(tags, accepting(thresholds=["7" * 64])) == (
        "its thresholds file (SHA-256 555555555555) is none that trust.json accepts for colours"
    )
    assert "its golden set (SHA-256 666666666666) is none" in problems(tags, accepting(golden=["7" * 64]))
    tags = moved(moved(tags, "promoted", 2), "rolled_back", 1)
    assert "its golden set" in problems(tags, accepting(golden=["7" * 64]))


# ---- what this machine has seen


@pytest.mark.usefixtures("own_home")
class TestSeen:
    def seen(self, *moves: Any) -> Tags:
        tags = made(*moves)
        histories.remember(self.of(tags))
        return tags

    def of(self, tags: Tags) -> History:
        return parse("colours", tags, TRUST)

    @pytest.fixture(autouse=True)
    def trust(self, own_home: Path) -> None:
        own_home.mkdir()
        (own_home / "trust.json").write_text(TRUST.model_dump_json())

    def test_what_was_cut_off_at_the_end_is_noticed_where_it_was_seen(self, own_home: Path) -> None:
        tags = self.seen(P1, P2, P3)
        assert histories.of("colours", tags).production == 3
        with pytest.raises(TrustError, match=r"put back .*: entry 3 is missing, which this machine has seen .*delete"):
            histories.of("colours", without(3, tags))
        with pytest.raises(TrustError, match="entry 1 is missing, which this machine has seen"):
            histories.of("colours", {})

    def test_what_another_process_adds_while_this_one_reads_is_no_going_back(self, own_home: Path) -> None:
        known = histories.seen("colours")  # before the tags are read …
        self.seen(P1)  # … and before the history is read, somebody promotes
        assert histories.of("colours", {}, known).entries == ()
        with pytest.raises(TrustError, match="entry 1 is missing"):
            histories.of("colours", {})

    def test_a_machine_that_has_seen_nothing_cannot_know_of_later_entries(self) -> None:
        """What no signature can say: that there is nothing newer. See TRUST.md."""
        assert histories.of("colours", without(3, made(P1, P2, P3))).production == 2

    def test_another_history_signed_by_a_trusted_key_is_noticed(self) -> None:
        tags = self.seen(P1, P2)
        with pytest.raises(TrustError, match="written anew: entry 2 is another than this machine has seen"):
            histories.of("colours", moved(without(2, tags), "promoted", 3, BOB))

    def test_longer_histories_are_remembered_and_nothing_makes_them_shorter(self) -> None:
        tags = self.seen(P1, P2)
        assert len(histories.seen("colours")) == 2
        histories.remember(self.of(without(2, tags)))  # a process that had looked before the last move
        assert len(histories.seen("colours")) == 2
        histories.remember(self.of(moved(tags, "promoted", 3)))
        assert len(histories.seen("colours")) == 3
        histories.remember(self.of({}))
        assert len(histories.seen("colours")) == 3

    def test_each_store_and_system_is_remembered_for_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen(P1)
        assert histories.of("flowers", {}).production is None
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another.example")
        assert histories.of("colours", {}).production is None

    @pytest.mark.parametrize("text", ["", "[", "7", "null", '{"a": 1}', "\udcff"])
    def test_a_record_that_cannot_be_read_is_no_empty_one(self, own_home: Path, text: str) -> None:
        self.seen(P1)
        [path] = (own_home / "seen").glob("*.json")
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(TrustError, match=r"what this machine has seen of colours cannot be read: .*colours"):
            histories.of("colours", made(P1))

    def test_a_process_killed_while_it_remembers_leaves_the_record_whole(
        self, own_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tags = self.seen(P1)
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            histories.remember(self.of(moved(tags, "promoted", 2)))
        assert len(histories.seen("colours")) == 1


# ---- for people


def test_a_line_says_what_moved_by_whom_on_what_evidence_and_why() -> None:
    tags = moved(moved(made(P1), "promoted", 2, why="faster\n### on tickets"), "withdrawn", None, BOB, why="rude")
    first, second, third = (
        describe(e).partition(" ")[2].partition(" ")[2] for e in parse("colours", tags, TRUST).entries
    )
    assert first == "promoted version 1 by Ada · evidence 111111111111 · w"
    assert second == "promoted version 2 (before: version 1) by Ada · evidence 111111111111 · faster ### on tickets"
    assert third == "withdrawn version 2 by Bob · rude"


def test_a_signer_is_named_as_we_know_him_and_local_keys_are_marked() -> None:
    local = SigningKey(*_generate("Cy", local=True))
    tags = moved({}, "promoted", 1, local, trust=TRUST)
    known = local.public.model_copy(update={"owner": "Cyril", "local": False})
    for trust, who in (
        (Trust(keys=(local.public,)), "Cy (local key)"),
        (Trust(keys=(known,)), "Cyril (local key)"),  # what it says of itself stays said
        (TRUST, "Cy? (local key)"),
    ):
        assert parse("colours", tags, trust).entries[0].who == who


@given(n=st.integers(0, 40), why=st.text(max_size=500), said=st.text(max_size=6000))
def test_the_description_holds_the_latest_moves_within_mlflows_limit(n: int, why: str, said: str) -> None:
    assume(HEADING not in said)
    one = parse("colours", moved({}, "promoted", 1, why=why), TRUST).entries[0]
    history = History("colours", tuple(replace(one) for _ in range(n)))
    shown = with_history(said, history)
    assert len(shown) <= DESCRIPTION_LIMIT
    assert render(history) in shown
    assert with_history(shown, history) == shown
    assert (
        with_history(shown, History("colours")) == said.strip()[: DESCRIPTION_LIMIT - len(render(history)) - 2].strip()
    )
    if n > 15:
        assert shown.endswith(f"- … {n - 15} older: agentkit history colours")


def test_a_reason_stays_on_its_line_whoever_signed_it() -> None:
    move = parse("colours", made(P1), TRUST).entries[0].move.model_copy(update={"why": "x\n\n### History\n- promoted"})
    history = parse("colours", {entry(1): sign(move, ADA)}, TRUST)
    assert len(render(history).splitlines()) == 3
