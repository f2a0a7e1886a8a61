"""Ed25519 keys: the private one of whoever promotes, and the file of public ones that loaders and servers trust.

The private key comes from `AGENTKIT_SIGNING_KEY` (PEM text), the file named by `AGENTKIT_SIGNING_KEY_FILE`, or
`signing_key.pem` in the home; a file must be readable by its owner alone. Trusted public keys stand in `trust.json` in
the home, or where `AGENTKIT_TRUST` says; who controls that file decides what counts.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from agentkit.errors import UsageError
from agentkit_tracking.home import author, file_lock, home, is_local_store, tracking_uri, write_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_ENV, KEY_FILE_ENV, TRUST_ENV = "AGENTKIT_SIGNING_KEY", "AGENTKIT_SIGNING_KEY_FILE", "AGENTKIT_TRUST"
_HOW_TO_GET = f"make one with `agentkit keys init`, or set {KEY_ENV} (PEM) or {KEY_FILE_ENV}"


class TrustedKey(BaseModel):
    """A public key and whose it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(description="first 16 hex digits of the SHA-256 of the public key")
    owner: str
    public: str = Field(description="the 32 bytes of the public key, base64")
    local: bool = Field(default=False, description="made by itself on a first run; vouches for this machine only")
    created: AwareDatetime
    retired: AwareDatetime | None = Field(
        default=None, description="what it signed until then counts, later signatures not"
    )
    revoked: AwareDatetime | None = Field(default=None, description="nothing that it signed counts any more")
    why: str = ""

    @property
    def status(self) -> str:
        """In words."""
        return "revoked" if self.revoked else "retired" if self.retired else "local" if self.local else "good"

    @property
    def pem(self) -> str:
        """The public key as other tools read it (SubjectPublicKeyInfo)."""
        from cryptography.hazmat.primitives import serialization as s

        return _public(self).public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode()


class Accepted(BaseModel):
    """The only thresholds and golden sets that count for a system: SHA-256 of the files, as `sha256sum` prints them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    thresholds: tuple[str, ...] = ()
    golden: tuple[str, ...] = ()


class Trust(BaseModel):
    """What a loader or server accepts: `trust.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    separate_approver: bool = Field(default=False, description="who promotes a release must not have registered it")
    systems: dict[str, Accepted] = Field(default={}, description="system name to what counts; one not named is free")
    keys: tuple[TrustedKey, ...] = ()

    def find(self, key_id: str) -> TrustedKey | None:
        """The key with this id, whatever its state."""
        return next((k for k in self.keys if k.id == key_id), None)


@dataclass(frozen=True)
class SigningKey:
    """A private key and its public description."""

    private: Ed25519PrivateKey
    public: TrustedKey


def trust_path() -> Path:
    """`AGENTKIT_TRUST`, or `trust.json` in the home."""
    given = os.environ.get(TRUST_ENV)
    return Path(given).resolve() if given else home() / "trust.json"


def load_trust() -> Trust:
    """The trusted keys; none where there is no file.

    Raises:
        UsageError: the file cannot be read or is not as documented.
    """
    path = trust_path()
    try:
        state = path.stat()
    except FileNotFoundError:
        if os.environ.get(TRUST_ENV):  # a slip in its name must not take its rules away
            raise UsageError(
                f"{TRUST_ENV} names {path}, which is no file; `agentkit keys init` or `trust` makes it"
            ) from None
        return Trust()
    except OSError as e:
        raise UsageError(f"the trusted keys in {path} cannot be read ({e.strerror})") from e
    return _read_trust(path, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=8)
def _read_trust(path: Path, *_: int) -> Trust:
    try:
        trust = Trust.model_validate_json(path.read_bytes())
    except OSError as e:
        raise UsageError(f"the trusted keys in {path} cannot be read ({e.strerror})") from e
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path} is damaged: {place and place + ': '}{first['msg']}; mend it or restore it") from e
    for key in trust.keys:
        if not _is_named_for_itself(key):
            raise UsageError(
                f"{path}: key {key.id} is not the id of its public key; add keys with `agentkit keys trust`"
            )
        if sum(k.id == key.id for k in trust.keys) > 1:  # perhaps revoked in one place and good in the other
            raise UsageError(f"{path}: key {key.id} stands there twice; keep the entry that says least of it")
    return trust


def _is_named_for_itself(key: TrustedKey) -> bool:
    try:
        raw = base64.b64decode(key.public, validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(raw) == 32 and key_id(raw) == key.id


@contextmanager
def _locked_trust() -> Iterator[Trust]:
    """The trusted keys, which nobody else changes meanwhile."""
    path = trust_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_name(f".{path.name}.lock")):
        yield load_trust() if path.exists() else Trust()


def _save_trust(trust: Trust, keys: Iterable[TrustedKey]) -> None:
    """Write the file with other keys."""
    text = trust.model_copy(update={"keys": tuple(keys)}).model_dump_json(indent=2, exclude_defaults=True)
    write_whole(trust_path(), f"{text}\n".encode())


# ---- private keys


def signing_key() -> SigningKey:
    """The key to sign with. On a first run on a local store, where no key was ever made, makes one marked `local`.

    Raises:
        UsageError: there is none, it is not trusted here, or others can read its file.
    """
    if (key := _own_key()) is None:
        if is_local_store() and (not trust_path().exists() or all(k.local for k in load_trust().keys)):
            return create(author(), local=True)
        raise UsageError(_needs_key())
    if key.public.revoked or key.public.retired:
        how = _HOW_TO_GET if _pem() else "make a new one with `agentkit keys rotate`"
        raise UsageError(f"the signing key {key.public.id} is {key.public.status}; {how}")
    return key


def _own_key() -> SigningKey | None:
    """The key at hand, whatever its state."""
    path = key_path()
    if pem := _pem():
        private = _parse(os.fsencode(pem), KEY_ENV)
    elif path.is_file():
        private = _read_private(path)
    elif os.environ.get(KEY_FILE_ENV):
        raise UsageError(f"{KEY_FILE_ENV} names {path}, which is no file")
    else:
        return None
    identity = key_id(_raw(private.public_key()))
    if (known := load_trust().find(identity)) is None:
        raise UsageError(
            f"the signing key {identity} is not in {trust_path()}; add it: `agentkit keys trust PUBLIC.pem --owner NAME` "
            "(`openssl pkey -pubout` prints the public key of a private one)"
        )
    return SigningKey(private, known)


def key_at_hand() -> SigningKey | None:
    """The key to sign with, if there is one and it counts; none is made."""
    key = _own_key()
    return None if key is None or key.public.revoked or key.public.retired else key


def take_from_environment() -> None:
    """Keep the key of `AGENTKIT_SIGNING_KEY` in this process alone: kernels, which inherit the environment, execute what
    a release holds."""
    if pem := os.environ.pop(KEY_ENV, None):
        _taken.append(pem)


_taken: list[str] = []


def _pem() -> str | None:
    return os.environ.get(KEY_ENV) or (_taken[-1] if _taken else None)


def _needs_key() -> str:
    return f"to sign for {tracking_uri()} you need a key: {_HOW_TO_GET}"


def key_path() -> Path:
    """Where a private key in a file is looked for."""
    given = os.environ.get(KEY_FILE_ENV)
    return Path(given).resolve() if given else home() / "signing_key.pem"


def create(owner: str, *, local: bool = False) -> SigningKey:
    """Make a key pair: the private key into `key_path()`, mode 0600, the public one among the trusted.

    Raises:
        UsageError: there is a private key already.
    """
    private, public = _generate(owner, local)
    path = key_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent == home():
        _keep_out_of_git(home())
    with _locked_trust() as trust:
        if os.path.lexists(path):
            if local:  # another process was faster
                return signing_key()
            raise UsageError(f"{path} holds a key already; change it with `agentkit keys rotate`")
        if local and trust_path().exists():  # cut off below, or the private key was taken away
            raise UsageError(_needs_key())
        _save_trust(trust, [*trust.keys, public])
        _put_private(path, private)  # last: who finds it finds it trusted
    return SigningKey(private, public)


def rotate() -> tuple[TrustedKey, SigningKey]:
    """A new key for the old one's owner. The old one retires: what it signed counts, and it signs no more.

    One that was revoked, or retired when a rotation was cut off, stays what it is.

    Raises:
        UsageError: the key comes from the environment, or there is none.
    """
    if _pem():
        raise UsageError(f"the key comes from {KEY_ENV}; unset it, `agentkit keys init`, then put the new one there")
    with _locked_trust() as trust:
        if (own := _own_key()) is None:
            raise UsageError(_needs_key())
        old = own.public
        if not (old.retired or old.revoked):
            old = old.model_copy(update={"retired": datetime.now(UTC)})
        private, public = _generate(old.owner, local=False)
        _save_trust(trust, [*(old if k.id == old.id else k for k in trust.keys), public])
        _put_private(key_path(), private)
    return old, SigningKey(private, public)


def revoke(identity: str, why: str) -> TrustedKey:
    """Take a key's word back: nothing that it signed counts any more, here.

    Raises:
        UsageError: no such key.
    """
    with _locked_trust() as trust:
        found = [k for k in trust.keys if identity and k.id.startswith(identity)]
        if len(found) != 1:
            raise UsageError(f"{len(found)} keys begin with {identity!r}; see `agentkit keys list`")
        gone = found[0].model_copy(update={"revoked": datetime.now(UTC), "why": why[:500]})
        _save_trust(trust, [gone if k.id == gone.id else k for k in trust.keys])
    return gone


def trust_key(pem: bytes, owner: str) -> TrustedKey:
    """Trust somebody else's public key.

    Raises:
        UsageError: it is no Ed25519 public key, or it is known already.
    """
    public = public_key_from(pem, owner)
    with _locked_trust() as trust:
        if (known := trust.find(public.id)) is not None:
            raise UsageError(f"key {public.id} is known already, as {known.owner}'s ({known.status})")
        _save_trust(trust, [*trust.keys, public])
    return public


def public_key_from(pem: bytes, owner: str) -> TrustedKey:
    """The description of a public key in PEM."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE" in pem:
        raise UsageError("that is a private key; give the public one (`agentkit keys list --pem`)")
    key: object = None
    with suppress(ValueError, UnsupportedAlgorithm):
        key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError("expected an Ed25519 public key in PEM (-----BEGIN PUBLIC KEY-----)")
    return _describe(key, owner, False)


def verify(key: TrustedKey, signature: bytes, message: bytes) -> bool:
    """Whether the key made this signature (RFC 8032) of the message."""
    from cryptography.exceptions import InvalidSignature

    try:
        _public(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def key_id(raw_public: bytes) -> str:
    """Short name of a public key: 16 hex digits of its SHA-256."""
    return hashlib.sha256(raw_public).hexdigest()[:16]


def _generate(owner: str, local: bool) -> tuple[Ed25519PrivateKey, TrustedKey]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    return private, _describe(private.public_key(), owner, local)


def _describe(public: Ed25519PublicKey, owner: str, local: bool) -> TrustedKey:
    raw = _raw(public)
    owner = " ".join(owner.split())[:100]
    if not owner:
        raise UsageError("a key needs an owner: the name or address of a person or a pipeline")
    return TrustedKey(
        id=key_id(raw), owner=owner, public=base64.b64encode(raw).decode(), local=local, created=datetime.now(UTC)
    )


def _raw(public: Ed25519PublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    return public.public_bytes(s.Encoding.Raw, s.PublicFormat.Raw)


def _public(key: TrustedKey) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(base64.b64decode(key.public))


def _put_private(path: Path, private: Ed25519PrivateKey) -> None:
    """Write a private key for its owner alone."""
    from cryptography.hazmat.primitives import serialization as s

    pem = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    write_whole(path, pem, 0o600)


def _read_private(path: Path) -> Ed25519PrivateKey:
    try:
        with path.open("rb") as file:
            mode, pem = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read()
    except OSError as e:
        raise UsageError(f"the signing key in {path} cannot be read ({e.strerror})") from e
    if os.name == "posix" and mode & 0o077:
        raise UsageError(
            f"{path} can be read by others (mode {mode:04o}); it is not used. chmod 600 it, then `agentkit keys rotate`, since others may have read it"
        )
    return _parse(pem, str(path))


def _parse(pem: bytes, where: str) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key: object = None
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        key = load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{where} holds no Ed25519 private key in PEM (PKCS 8, not encrypted)")
    return key


def _keep_out_of_git(folder: Path) -> None:
    """A home lies in the project: nothing of it, least of all a private key, belongs into version control."""
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
