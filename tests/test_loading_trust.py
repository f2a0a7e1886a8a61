"""Loading and moving production: whose keys count, and what somebody without one cannot bring about."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import base64
import json
import re

import pytest
from evidence import Store, agentkit, source
from tampering import (
    EVE,
    alias,
    by_a_stranger,
    executed,
    fresh,
    history,
    loads,
    put,
    refused,
    registry_hash,
    store,  # noqa: F401
    tag,
    text_of,
    trusting,
)

from agentkit.errors import ReleaseError, TrustError, UnknownReference, UsageError
from agentkit.examples import sha256_of
from agentkit_pipelines import promotion
from agentkit_tracking import history as histories
from agentkit_tracking import keys, loading, production, registry
from agentkit_tracking import manifest as manifests
from agentkit_tracking.home import connect
from agentkit_tracking.keys import SigningKey
from agentkit_tracking.source import load_entry, parse_entry
from agentkit_tracking.statements import Evidence, Registration, sign

# ---- keys


def test_production_is_refused_where_its_signer_is_not_trusted(store: Store) -> None:
    (store.home / "trust.json").unlink()
    assert "which is not trusted here" in refused()
    assert "which is not trusted here" in refused(trust=True)  # production is never taken on trust
    trust = store.home / "trust.json"
    trust.write_text("{")
    with pytest.raises(UsageError, match=re.escape(str(trust))):
        loading.load("colours@production")
    assert not executed()


def test_what_a_retired_key_promoted_stays_and_what_it_signs_later_is_refused(store: Store) -> None:
    old = keys.signing_key()
    keys.rotate()
    assert loads() == registry.resolve("colours/2").release_id
    done = store.promote("colours/3")
    assert loads() == done.version.release_id
    assert "Ada" in agentkit("history", "colours").out
    found = production.history_of("colours")
    made, text = histories.next_entry(
        found, "rolled_back", old, version=2, release=registry.resolve("colours/2").release_id,
        prompts=found.entries[1].move.prompts, evidence=found.entries[1].move.evidence, why="with the old key",
    )  # fmt: skip
    put(store, made, text, version=None)
    alias(store, "production", 2)
    assert re.search(r"signed with key \w+ \(Ada\) after it had retired", refused())


def test_what_a_revoked_key_promoted_is_refused_until_it_is_promoted_again(store: Store) -> None:
    old = keys.signing_key().public
    keys.revoke(old.id, "laptop stolen")
    assert re.search(rf"signed with key {old.id} \(Ada\), revoked .*: laptop stolen", refused())
    said = agentkit("verify", "colours@production")
    assert (said.code, "laptop stolen" in said.out) == (3, True)
    with pytest.raises(ReleaseError, match="revoked"):
        promotion.rollback("colours", why="x", say=print) if keys.rotate() else None
    store.promote("colours/2", why="signed anew")
    assert loads() == registry.resolve("colours/2").release_id
    found = production.history_of("colours")
    assert [(e.move.version, e.genuine) for e in found.entries] == [(1, True), (2, True), (2, True)]
    assert found.earlier() == [1]
    with pytest.raises(TrustError, match=r"the promotion it restores does not count: signed with key .*laptop stolen"):
        promotion.rollback("colours", why="what it promoted before")
    assert loading.resolve("colours@production").number == 2


def test_a_local_key_is_named_as_one_wherever_it_signed(store: Store) -> None:
    assert keys.signing_key().public.local
    for command in ("verify", "history"):
        assert "Ada (local key)" in text_of(
            agentkit(command, "colours" if command == "history" else "colours@production").out
        )
    assert "by Ada (local key)" in connect().get_registered_model("colours").description


# ---- what somebody without a key can make others sign


def test_a_forged_past_brings_nothing_into_production_by_a_rollback(store: Store) -> None:
    """Two forged entries later version 2 is in production as before, and 3 seems to have been; load refuses both."""
    by_a_stranger(store, 3)
    by_a_stranger(store, 2)
    assert "which is not trusted here" in refused()
    assert promotion.rollback("colours", why="refused, so back")[1].number == 2
    assert loads() == registry.resolve("colours/2").release_id
    assert promotion.rollback("colours", why="and back")[1].number == 1
    assert loads() == registry.resolve("colours/1").release_id


def test_nothing_is_compared_with_what_a_forged_entry_says_is_in_production(store: Store) -> None:
    """Else whoever writes to the database would choose how bad the version is that a new one has to beat."""
    by_a_stranger(store, 3)
    with pytest.raises(
        TrustError, match=r"the last entry of the history of colours does not count: signed with key .*rollback"
    ):
        store.evaluate("colours/1")
    promotion.rollback("colours", why="forged")
    assert store.evaluate("colours/1").production == registry.resolve("colours/2")


def test_nothing_is_compared_with_another_release_than_the_one_in_production(store: Store) -> None:
    put(store, "agentkit.release_id", tag(store, "agentkit.release_id", 3))
    with pytest.raises(TrustError, match=r"colours/2 says release \w+, signed was \w+"):
        store.evaluate("colours/1")
    assert not executed()


def test_prompts_that_somebody_foisted_on_a_release_are_not_promoted_with_it(store: Store) -> None:
    """A version in whose tag another text passes for the prompt that is registered next; anybody may make one."""
    source_of_4 = store.home / "given" / "colours.py"
    source_of_4.write_text(source(4))
    entry_of_4 = parse_entry(source_of_4)
    [state] = manifests.build(load_entry(entry_of_4), entry_of_4)[0].prompts.values()
    executed()
    digest = manifests.sha256(json.dumps(state, sort_keys=True).encode())
    foisted = connect().register_prompt("colours.program", template="Always say cold.")
    named = {"program": {"name": "colours.program", "version": int(foisted.version), "sha256": digest}}
    model = registry.resolve("colours/3").model_id
    connect().create_model_version(
        "colours", f"models:/{model}", model_id=model, tags={"agentkit.prompts": json.dumps(named)}
    )
    version = registry.register_file(source_of_4)
    executed()
    text_in_mlflow = (
        connect()
        .get_prompt_version("colours.program", str(registry.prompts_of(version)["program"]["version"]))
        .template
    )
    if text_in_mlflow == registry.prompt_text(state):
        return  # registering did not fall for it
    with pytest.raises(TrustError, match=r"colours/5 is not evaluated: the text of prompt .* was changed in MLflow"):
        store.evaluate(str(version))
    assert not executed()


def test_a_first_promotion_that_is_forged_can_be_withdrawn(store: Store) -> None:
    for n in (1, 2):
        history(store, n, None)
    fresh(store)
    forged = EVE.public.model_copy(update={"owner": "Ada"})  # whatever it calls itself
    tags_of_1 = (tag(store, "agentkit.release_id", 1), registry_hash(tag(store, "agentkit.prompts", 1)))
    made, text = histories.next_entry(
        histories.History("colours"), "promoted", SigningKey(EVE.private, forged), version=1, release=tags_of_1[0],
        prompts=tags_of_1[1], evidence=Evidence.model_validate({**json.loads(EVIDENCE_OF_NOTHING)}), why="x",
    )  # fmt: skip
    put(store, made, text, version=None)
    alias(store, "production", 1)
    assert "which is not trusted here" in refused()
    keys.create("Ada")
    promotion.withdraw("colours", why="forged")
    assert "withdrawn version 1 by Ada" in refused()
    store.promote("colours/2")
    assert loads() == registry.resolve("colours/2").release_id
    with pytest.raises(UnknownReference, match="nothing to go back to"):
        promotion.rollback("colours", why="x")


EVIDENCE_OF_NOTHING = json.dumps(
    {"verdict": "pass", "run": "0" * 32, "compared_with": None}
    | dict.fromkeys(("sha256", "verdict_file", "results", "notebook", "thresholds", "golden"), "0" * 64)
)


def test_a_list_says_which_verdicts_are_proven(store: Store) -> None:
    """On a plain server anybody may write the tag."""
    put(store, "agentkit.last_verdict", "pass", 3)
    put(store, "agentkit.last_verdict", "fail", 2)
    put(store, "agentkit.last_verdict", None, 1)
    rows = [line.split("│") for line in agentkit("list").out.splitlines() if "colours/" in line]
    assert [row[4].strip() for row in rows] == ["none (unproven)", "fail (unproven)", "pass (unproven)"]
    put(store, "agentkit.last_verdict", "pass", 2)
    assert agentkit("list").out.count("unproven") == 2
    trusting(store, keys=[])
    assert agentkit("list").out.count("unproven") == 3


# ---- what the trust file may ask for


def another_key(store: Store, monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    """From now on somebody else signs here."""
    monkeypatch.setenv("AGENTKIT_SIGNING_KEY_FILE", str(store.home / f"{owner}.pem"))
    keys.create(owner)


def test_who_promotes_must_not_have_registered_where_that_is_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting(store, separate_approver=True)
    assert "Ada registered and promoted it; separate_approver asks for two people" in refused()
    for owner in (None, "ADA"):  # neither alone nor with a second key of the same person
        if owner:
            another_key(store, monkeypatch, owner)
        with pytest.raises(TrustError, match="colours/3 cannot be promoted: Ada registered and promoted it"):
            store.promote("colours/3")
    another_key(store, monkeypatch, "Bob")
    store.promote("colours/3")
    assert loads() == registry.resolve("colours/3").release_id
    with pytest.raises(TrustError, match="Ada registered and promoted it"):  # nor does a rollback make it two
        promotion.rollback("colours", why="x")
    put(store, "agentkit.registration", None, 3)
    assert "nobody signed its registration, so author and approver cannot be told apart" in refused()
    eve = Registration.model_validate(
        json.loads(base64.b64decode(json.loads(tag(store, "agentkit.registration"))["payload"]))["predicate"]
    )
    put(
        store,
        "agentkit.registration",
        sign(eve.model_copy(update={"release": tag(store, "agentkit.release_id", 3)}), EVE),
        3,
    )
    assert "its registration: signed with key" in refused()
    put(store, "agentkit.registration", tag(store, "agentkit.registration", 2), 3)
    assert "its registration: signed for another release" in refused()


def test_a_version_that_nobody_signed_for_is_approved_by_nobody_under_that_rule(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting(store, separate_approver=True)
    put(store, "agentkit.registration", None, 3)
    another_key(store, monkeypatch, "Bob")
    with pytest.raises(TrustError, match="nobody signed its registration"):
        store.promote("colours/3")
    assert production.history_of("colours").production == 2


def test_only_accepted_thresholds_and_golden_sets_count(store: Store) -> None:
    right = {"thresholds": [sha256_of(store.thresholds)], "golden": ["0" * 64, sha256_of(store.golden)]}
    trusting(store, systems={"colours": right})
    assert loads()
    trusting(store, systems={"colours": {**right, "golden": ["0" * 64]}})
    assert re.search(r"its golden set \(SHA-256 \w{12}\) is none that trust\.json accepts for colours", refused())
    with pytest.raises(TrustError, match=r"colours/3 cannot be promoted: its golden set"):
        store.promote("colours/3")
    trusting(store, systems={"colours": right})
    store.thresholds.write_text(store.thresholds.read_text().replace("0.75", "0.01"))
    with pytest.raises(TrustError, match=r"colours/3 cannot be promoted: its thresholds file"):
        store.promote("colours/3")
    assert loads() == registry.resolve("colours/2").release_id
