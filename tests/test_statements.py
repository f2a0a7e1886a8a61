"""Signed statements: a stranger can check them, and nothing that was signed can be changed or stand for anything else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given
from hypothesis import strategies as st

from agentkit.errors import TrustError
from agentkit_tracking.keys import SigningKey, Trust, TrustedKey, _generate
from agentkit_tracking.statements import Evaluation, Evidence, Move, Registration, Statement, check, read, sign, signer

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
ADA, BOB, EVE = (SigningKey(*_generate(name, local=False)) for name in ("Ada", "Bob", "Eve"))
TRUST = Trust(keys=(ADA.public, BOB.public))
EVIDENCE = Evidence(
    sha256="1" * 64,
    verdict="pass",
    verdict_file="2" * 64,
    results="3" * 64,
    notebook="4" * 64,
    thresholds="5" * 64,
    golden="6" * 64,
    run="run",
    compared_with=None,
)


def statements(key: SigningKey = ADA) -> dict[type[Statement], Statement]:
    said: dict[str, Any] = {"system": "colours", "release": "a" * 64, "time": NOW, "signer": signer(key)}
    rest: dict[str, Any] = {"left_version": 1, "left_release": "b" * 64, "prompts": "c" * 64, "evidence": EVIDENCE}
    move = Move(**said, event="promoted", sequence=2, before="d" * 64, version=2, why="the gate passed", **rest)
    evaluation = Evaluation(**said, version=2, evidence=EVIDENCE, description="e" * 64)
    return {Registration: Registration(**said, commit="none"), Evaluation: evaluation, Move: move}


KINDS = tuple(statements())
SIGNED = {kind: sign(statement, ADA) for kind, statement in statements().items()}


def accepted(envelope: str, kind: type[Statement] = Move, trust: Trust = TRUST) -> tuple[Statement, TrustedKey]:
    signed = read(envelope, kind)
    return signed.statement, check(signed, trust)


def opened(envelope: str) -> tuple[dict[str, Any], bytes]:
    outer = json.loads(envelope)
    return outer, base64.b64decode(outer["payload"])


def pae(kind: str, payload: bytes) -> bytes:
    """PAE(type, body) = "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body, as the specification of DSSE has it."""
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind.encode(), str(len(payload)).encode(), payload])


def signed_by(key: SigningKey, payload: bytes, kind: str = "application/vnd.in-toto+json") -> str:
    """An envelope around anything at all, with a signature that fits."""
    text = [base64.b64encode(data).decode() for data in (payload, key.private.sign(pae(kind, payload)))]
    return json.dumps(
        {"payloadType": kind, "payload": text[0], "signatures": [{"keyid": key.public.id, "sig": text[1]}]}
    )


# ---- what is signed


@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_checks_a_statement_with_the_public_key_and_the_specifications_alone(kind: type[Statement]) -> None:
    outer, payload = opened(SIGNED[kind])
    [signature] = outer["signatures"]
    public: Any = load_pem_public_key(ADA.public.pem.encode())
    public.verify(base64.b64decode(signature["sig"]), pae(outer["payloadType"], payload))  # raises if it does not fit
    body = json.loads(payload)
    assert signature["keyid"] == hashlib.sha256(base64.b64decode(ADA.public.public)).hexdigest()[:16]
    assert outer["payloadType"] == "application/vnd.in-toto+json"
    assert body["_type"] == "https://in-toto.io/Statement/v1"
    assert body["predicateType"] == f"urn:agentkit:{ {Move: 'production'}.get(kind, kind.__name__.lower()) }:v1"
    assert body["subject"] == [{"name": "colours", "digest": {"sha256": "a" * 64}}]


def test_a_move_covers_whatever_could_be_exchanged() -> None:
    said = json.loads(opened(SIGNED[Move])[1])["predicate"]
    covered = {"system", "version", "release", "left_version", "left_release", "time", "signer", "before", "sequence"}
    assert covered | {"evidence", "prompts", "event", "why"} == said.keys()
    evidence = {"sha256", "thresholds", "golden", "results", "notebook", "verdict", "verdict_file", "compared_with"}
    assert evidence | {"run"} == said["evidence"].keys()
    assert said["signer"] == {"key": ADA.public.id, "owner": "Ada", "local": False}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_signed_is_what_is_read(kind: type[Statement]) -> None:
    assert accepted(SIGNED[kind], kind) == (statements()[kind], ADA.public)


def test_a_local_key_says_so_in_all_that_it_signs() -> None:
    local = SigningKey(*_generate("Ada", local=True))
    for statement in statements(local).values():
        assert json.loads(opened(sign(statement, local))[1])["predicate"]["signer"]["local"] is True


# ---- what was changed


@given(kind=st.sampled_from(KINDS), part=st.sampled_from(["payload", "sig"]), data=st.data())
def test_any_other_byte_of_payload_or_signature_is_refused(kind: type[Statement], part: str, data: Any) -> None:
    outer, _ = opened(SIGNED[kind])
    place = outer if part == "payload" else outer["signatures"][0]
    content = bytearray(base64.b64decode(place[part]))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    place[part] = base64.b64encode(content).decode()
    with pytest.raises(TrustError):
        accepted(json.dumps(outer), kind)


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_another_text_is_refused_or_says_the_very_same(kind: type[Statement], data: Any) -> None:
    text = SIGNED[kind]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 6)))
    put = data.draw(
        st.one_of(st.text(max_size=6), st.sampled_from([" ", "\n", '"', "=", "==", "A", "{}", ",", "\\u0041"]))
    )
    changed = text[:start] + put + text[end:]
    try:
        found, key = accepted(changed, kind)
    except TrustError:
        return
    assert (found, key) == (statements()[kind], ADA.public)
    same = ("payload", "payloadType", "signatures")
    assert [json.loads(changed)[part] for part in same] == [json.loads(text)[part] for part in same]


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(tree, dict):
        return [leaf for k, v in tree.items() for leaf in leaves(v, (*path, k))]
    if isinstance(tree, list):
        return [leaf for i, v in enumerate(tree) for leaf in leaves(v, (*path, i))]
    return [path]


FIELDS = [(kind, path) for kind in KINDS for path in leaves(json.loads(opened(SIGNED[kind])[1]))]


@pytest.mark.parametrize(
    ("kind", "path"), FIELDS, ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else x.__name__
)
def test_any_other_value_of_any_field_is_refused(kind: type[Statement], path: tuple[Any, ...]) -> None:
    outer, payload = opened(SIGNED[kind])
    for new in (None, 7, "f" * 64, "fail", True, "", "2026-01-02T03:04:05.678902Z"):
        body = json.loads(payload)
        place = body
        for step in path[:-1]:
            place = place[step]
        if place[path[-1]] == new:
            continue
        place[path[-1]] = new
        changed = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        with pytest.raises(TrustError):
            accepted(json.dumps({**outer, "payload": base64.b64encode(changed).decode()}), kind)


def test_the_signature_of_another_statement_does_not_fit() -> None:
    outer, _ = opened(SIGNED[Move])
    other = sign(statements()[Move].model_copy(update={"system": "flowers"}), ADA)
    with pytest.raises(TrustError, match=r"the signature of key \w+ \(Ada\) does not fit: what was signed was altered"):
        accepted(json.dumps({**outer, "signatures": json.loads(other)["signatures"]}))


@pytest.mark.parametrize(("made", "taken"), list(permutations(KINDS, 2)))
def test_a_statement_of_one_kind_is_not_taken_for_another(made: type[Statement], taken: type[Statement]) -> None:
    with pytest.raises(TrustError):
        read(SIGNED[made], taken)
    body = json.loads(opened(SIGNED[taken])[1])
    body["predicateType"] = made.predicate_type  # by a holder of a key, who means both
    with pytest.raises(TrustError, match="is not of the kind"):
        read(signed_by(ADA, json.dumps(body, sort_keys=True, separators=(",", ":")).encode()), taken)


# ---- what is no such envelope


def with_body(**changes: Any) -> bytes:
    return compact({**json.loads(opened(SIGNED[Move])[1]), **changes})


def compact(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(SIGNED[Move]), **changes})


def predicate(**changes: Any) -> bytes:
    body = json.loads(opened(SIGNED[Move])[1])
    return compact({**body, "predicate": {**body["predicate"], **changes}})


PAYLOAD = opened(SIGNED[Move])[1]
OUTER = json.loads(SIGNED[Move])
[SIGNATURE] = OUTER["signatures"]
DUPLICATED = PAYLOAD.replace(b'"version":2', b'"version":3,"version":2')
ODD: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "no JSON": lambda: SIGNED[Move][:-1],
    "a list": lambda: "[]",
    "a number": lambda: "7",
    "null": lambda: "null",
    "no payload": lambda: json.dumps({k: v for k, v in OUTER.items() if k != "payload"}),
    "payload of no text": lambda: changed(payload=7),
    "payload of no base64": lambda: changed(payload="ü"),
    "line break in the base64": lambda: changed(payload=OUTER["payload"][:8] + "\n" + OUTER["payload"][8:]),
    "more after the base64": lambda: changed(payload=OUTER["payload"] + "AAAA"),
    "padding after the base64": lambda: changed(payload=OUTER["payload"] + "===="),
    "another type": lambda: changed(payloadType="application/json"),
    "another type, signed": lambda: signed_by(ADA, PAYLOAD, "application/json"),
    "no signature": lambda: changed(signatures=[]),
    "two signatures": lambda: changed(signatures=[SIGNATURE, SIGNATURE]),
    "two signers": lambda: changed(signatures=[SIGNATURE, json.loads(signed_by(BOB, PAYLOAD))["signatures"][0]]),
    "signatures of no list": lambda: changed(signatures={"keyid": SIGNATURE}),
    "signature of no object": lambda: changed(signatures=["x"]),
    "no key id": lambda: changed(signatures=[{"sig": SIGNATURE["sig"]}]),
    "short signature": lambda: changed(signatures=[{**SIGNATURE, "sig": "AAAA"}]),
    "empty signature": lambda: changed(signatures=[{**SIGNATURE, "sig": ""}]),
    "another's key id": lambda: changed(signatures=[{**SIGNATURE, "keyid": BOB.public.id}]),
    "key id in capitals": lambda: changed(signatures=[{**SIGNATURE, "keyid": ADA.public.id.upper()}]),
    "deep nesting": lambda: "[" * 200_000 + "]" * 200_000,
    "deep nesting, signed": lambda: signed_by(ADA, b"[" * 200_000 + b"]" * 200_000),
    "deep nesting in a field, signed": lambda: signed_by(ADA, with_body(predicate=None).replace(b"null", b"[" * 900 + b"]" * 900)),
    "a huge number, signed": lambda: signed_by(ADA, PAYLOAD.replace(b'"version":2', b'"version":' + b"9" * 5000)),
    "a field twice, signed": lambda: signed_by(ADA, DUPLICATED),
    "spaces, signed": lambda: signed_by(ADA, PAYLOAD.replace(b'"version":2', b'"version": 2')),
    "no UTF-8, signed": lambda: signed_by(ADA, PAYLOAD.replace(b"colours", b"col\xffurs")),
    "UTF-16, signed": lambda: signed_by(ADA, PAYLOAD.decode().encode("utf-16")),
    "text after it, signed": lambda: signed_by(ADA, PAYLOAD + b"{}"),
    "nothing, signed": lambda: signed_by(ADA, b""),
    "a list, signed": lambda: signed_by(ADA, b"[]"),
    "an unknown field, signed": lambda: signed_by(ADA, predicate(more=1)),
    "a field less, signed": lambda: signed_by(ADA, with_body(predicate={"system": "colours"})),
    "a time of no zone, signed": lambda: signed_by(ADA, predicate(time="2026-01-02T03:04:05")),
    "entry 0, signed": lambda: signed_by(ADA, predicate(sequence=0)),
    "a long reason, signed": lambda: signed_by(ADA, predicate(why="x" * 501)),
    "no subject, signed": lambda: signed_by(ADA, with_body(subject=[])),
    "two subjects, signed": lambda: signed_by(ADA, with_body(subject=json.loads(PAYLOAD)["subject"] * 2)),
    "another subject, signed": lambda: signed_by(ADA, with_body(subject=[{"name": "flowers", "digest": {"sha256": "a" * 64}}])),
    "another in-toto version, signed": lambda: signed_by(ADA, with_body(_type="https://in-toto.io/Statement/v2")),
    "signed for another key": lambda: signed_by(BOB, PAYLOAD),
    "signed by a stranger": lambda: signed_by(EVE, PAYLOAD),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_envelope_of_one_such_statement_is_refused(kind: str) -> None:
    with pytest.raises(TrustError):
        accepted(ODD[kind]())


def test_base64_has_one_spelling() -> None:
    """The last digit holds bits that decoding drops; nothing about an entry can be changed unseen."""
    text = OUTER["payload"] if OUTER["payload"].endswith("=") else ""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for name, value in (("payload", text), ("sig", SIGNATURE["sig"])):
        if not value:
            continue
        last = value.rstrip("=")[-1]
        others = [value.rstrip("=")[:-1] + d + "=" * value.count("=") for d in digits if d != last]
        same = [o for o in others if base64.b64decode(o, validate=True) == base64.b64decode(value)]
        assert same
        for other in same:
            with pytest.raises(TrustError):
                accepted(
                    changed(payload=other) if name == "payload" else changed(signatures=[{**SIGNATURE, "sig": other}])
                )


# ---- whose signature counts


def trusting(**changes: Any) -> Trust:
    return Trust(keys=(ADA.public.model_copy(update=changes),))


def test_an_unknown_key_counts_for_nothing() -> None:
    with pytest.raises(TrustError, match=f"signed with key {ADA.public.id}, which is not trusted here"):
        accepted(SIGNED[Move], trust=Trust(keys=(BOB.public,)))


def test_nothing_that_a_revoked_key_signed_counts_but_what_a_later_entry_builds_on() -> None:
    trust, signed = trusting(revoked=NOW, why="stolen"), read(SIGNED[Move], Move)
    with pytest.raises(TrustError, match=r"signed with key \w+ \(Ada\), revoked 2026-01-02 03:04: stolen"):
        check(signed, trust)
    assert check(signed, trust, is_past=True).owner == "Ada"
    with pytest.raises(TrustError, match="does not fit"):  # which does not make a forgery good
        check(
            read(changed(signatures=[{**SIGNATURE, "sig": base64.b64encode(bytes(64)).decode()}]), Move),
            trust,
            is_past=True,
        )


def test_a_retired_key_counts_for_what_it_signed_before() -> None:
    assert accepted(SIGNED[Move], trust=trusting(retired=NOW))[1].owner == "Ada"
    assert accepted(SIGNED[Move], trust=trusting(retired=NOW + timedelta(days=1)))[1].owner == "Ada"
    with pytest.raises(TrustError, match=r"signed with key \w+ \(Ada\) after it had retired on 2026-01-02 03:04"):
        accepted(SIGNED[Move], trust=trusting(retired=NOW - timedelta(microseconds=1)))


def test_a_name_in_the_statement_does_not_make_it_that_persons() -> None:
    said = statements(BOB)[Move].model_copy(update={"signer": signer(ADA)})
    with pytest.raises(TrustError, match=r"the signature of key \w+ \(Bob\) does not fit"):
        accepted(sign(said, BOB))
