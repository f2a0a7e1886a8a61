"""Signed statements about releases: who registered, evaluated and moved what.

Each is an in-toto Statement (version 1, github.com/in-toto/attestation) in a DSSE envelope (github.com/secure-systems-lab/dsse)
signed with Ed25519 (RFC 8032), so that other tools can check it. The payload names system, release, previous release,
evidence, time and signer, and a `Move` also the entry before it: no old or foreign signature fits anywhere else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from agentkit.errors import TrustError
from agentkit_tracking.keys import SigningKey, Trust, TrustedKey, verify

_TYPE = "https://in-toto.io/Statement/v1"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
Digest = str  # hex SHA-256


class Signer(BaseModel):
    """Who signed, by the signer's own account; what counts is whose key it is among the trusted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    owner: str
    local: bool


class Statement(BaseModel):
    """What every statement says: of which release of which system, when, by whom."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    predicate_type: ClassVar[str]

    system: str
    release: Digest
    time: AwareDatetime
    signer: Signer


class Registration(Statement):
    """The signer registered this release."""

    predicate_type: ClassVar[str] = "urn:agentkit:registration:v1"

    commit: str


class Evidence(BaseModel):
    """Hashes of all that a verdict rests on; `sha256` is that of evidence.json, which holds the others and more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Digest
    verdict: Literal["pass", "fail", "inconclusive"]
    verdict_file: Digest
    results: Digest
    notebook: Digest
    thresholds: Digest
    golden: Digest
    run: str = Field(description="MLflow run that holds the files")
    compared_with: Digest | None = Field(description="release in production at that time")


class Evaluation(Statement):
    """The signer evaluated this version and found this."""

    predicate_type: ClassVar[str] = "urn:agentkit:evaluation:v1"

    version: int
    evidence: Evidence
    description: Digest = Field(description="of the version's description, which shows the verdict to people")


class Move(Statement):
    """An entry of a system's history: what is in production from now on.

    `release` is the one that `version` names; of a withdrawal, which leaves nothing in production, the one taken out.
    """

    predicate_type: ClassVar[str] = "urn:agentkit:production:v1"

    event: Literal["promoted", "rolled_back", "withdrawn"]
    sequence: int = Field(ge=1)
    before: Digest | None = Field(description="hash of the payload of the entry before; None for the first")
    version: int | None = Field(description="in production from now on; None: nothing")
    left_version: int | None
    left_release: Digest | None
    prompts: Digest | None = Field(description="of the version's tag that names its prompts in MLflow")
    evidence: Evidence | None = Field(description="of the promotion; a rollback repeats that of the one it restores")
    why: str = Field(max_length=500)


S = TypeVar("S", bound=Statement)


@dataclass(frozen=True)
class Signed(Generic[S]):
    """A statement as it was found, its signature not yet judged."""

    statement: S
    digest: Digest  # of the payload
    envelope: str
    key_id: str
    signature: bytes
    message: bytes


def sign(statement: Statement, key: SigningKey) -> str:
    """The statement in its envelope, as one line of JSON."""
    body = {
        "_type": _TYPE,
        "subject": [{"name": statement.system, "digest": {"sha256": statement.release}}],
        "predicateType": statement.predicate_type,
        "predicate": statement.model_dump(mode="json"),
    }
    payload = _canonical(body)
    signature = {"keyid": key.public.id, "sig": _text(key.private.sign(_pre_authentication(payload)))}
    return json.dumps({"payloadType": _PAYLOAD_TYPE, "payload": _text(payload), "signatures": [signature]})


def signer(key: SigningKey) -> Signer:
    """How a key's holder signs."""
    return Signer(key=key.public.id, owner=key.public.owner, local=key.public.local)


def read(envelope: str, kind: type[S]) -> Signed[S]:
    """Parse an envelope; the signature is judged by `check`.

    Raises:
        TrustError: it is no envelope with one statement of this kind.
    """
    try:
        outer = json.loads(envelope)
        payload = _bytes(outer["payload"])
        [signature] = outer["signatures"]
        body = json.loads(payload)
        if _canonical(body) != payload:  # else another reader could find something else in it, by a field named twice
            raise TrustError(f"a signed statement ({kind.__name__}) is not written as agentkit writes it")
        statement = kind.model_validate(body["predicate"])
        subject = [{"name": statement.system, "digest": {"sha256": statement.release}}]
        said = (outer["payloadType"], body["_type"], body["predicateType"], body["subject"])
        if said != (_PAYLOAD_TYPE, _TYPE, kind.predicate_type, subject):
            raise TrustError(f"a signed statement is not of the kind {kind.predicate_type}, or its subject is another")
        key_id, signed = str(signature["keyid"]), _bytes(signature["sig"])
    except (ValueError, KeyError, TypeError, binascii.Error, ValidationError, RecursionError) as e:
        raise TrustError(
            f"a signed statement ({kind.__name__}) cannot be read: it was altered or is no such statement"
        ) from e
    digest = hashlib.sha256(payload).hexdigest()
    return Signed(statement, digest, envelope, key_id, signed, _pre_authentication(payload))


def check(signed: Signed[Any], trust: Trust, *, is_past: bool = False) -> TrustedKey:
    """The trusted key that made the signature.

    Args:
        is_past: of an entry that a later one, itself checked, builds on: a key revoked since does not break the chain.

    Raises:
        TrustError: the key is unknown or revoked, had retired before, or did not make this signature.
    """
    key = trust.find(signed.key_id)
    if key is None:
        raise TrustError(f"signed with key {signed.key_id}, which is not trusted here")
    if key.id != signed.statement.signer.key or not verify(key, signed.signature, signed.message):
        raise TrustError(f"the signature of key {key.id} ({key.owner}) does not fit: what was signed was altered")
    if key.revoked and not is_past:
        raise TrustError(
            f"signed with key {key.id} ({key.owner}), revoked {day(key.revoked)}: {key.why or 'no reason'}"
        )
    if key.retired and signed.statement.time > key.retired:
        raise TrustError(f"signed with key {key.id} ({key.owner}) after it had retired on {day(key.retired)}")
    return key


def read_checked(
    envelope: str, kind: type[S], system: str, release: str | None, trust: Trust
) -> tuple[Signed[S], TrustedKey]:
    """A statement about this release of this system, and the trusted key that signed it.

    Raises:
        TrustError: as `read` and `check`, or it was signed for another release.
    """
    signed = read(envelope, kind)
    key = check(signed, trust)
    if (signed.statement.system, signed.statement.release) != (system, release):
        raise TrustError("signed for another release")
    return signed, key


def day(time: datetime) -> str:
    """A time to the minute, as people read it."""
    return time.strftime("%Y-%m-%d %H:%M")


def _pre_authentication(payload: bytes) -> bytes:
    """What DSSE signs: type and length stand before the payload, so that nothing can be read as something else."""
    kind = _PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    """Base64 in its one spelling: the decoder drops bits and padding that follow the last byte."""
    data = base64.b64decode(text, validate=True)
    if _text(data) != text:
        raise ValueError("not the base64 that encoding gives")
    return data
