"""Keys: made for one person alone, used only while they count, and never shown."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from evidence import agentkit

from agentkit.errors import UsageError
from agentkit_tracking import keys


def private_pem(key: Any = None, password: bytes | None = None) -> str:
    hidden = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    return (key or Ed25519PrivateKey.generate()).private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, hidden).decode()


def public_pem(pem: str) -> str:
    public = s.load_pem_private_key(pem.encode(), None).public_key()
    return public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode()


def key_file(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "mine.pem"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def can_sign(key: keys.SigningKey) -> bool:
    return keys.verify(key.public, key.private.sign(b"this"), b"this")


def said(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code and output of `agentkit keys …`, which must never hold a private key."""
    done = agentkit("keys", *map(str, arguments))
    for file in Path(os.environ["AGENTKIT_HOME"]).glob("*.pem"):
        body = file.read_text().split("-----")[2].strip()
        assert body not in re.sub(r"\s", "", done.out + done.err)
    assert "PRIVATE" not in done.out + done.err
    return done.code, done.out, done.err


def refused(*arguments: str | Path, code: int = 2) -> str:
    got, out, err = said(*arguments)
    assert (got, out) == (code, "")
    assert err.startswith("agentkit: ")
    return err


# ---- the first key


def test_a_first_run_makes_a_local_key_that_only_its_owner_can_read(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTKIT_AUTHOR", "Ada\nLovelace")
    key = keys.signing_key()
    assert (key.public.local, key.public.owner, key.public.status) == (True, "Ada Lovelace", "local")
    assert stat.S_IMODE((own_home / "signing_key.pem").stat().st_mode) == 0o600
    assert (own_home / ".gitignore").read_text() == "*\n"
    assert "PRIVATE" not in (own_home / "trust.json").read_text()
    assert keys.load_trust().keys == (key.public,)
    assert can_sign(keys.signing_key())
    assert keys.signing_key().public == key.public


def test_no_key_is_made_for_anothers_store_or_where_keys_are_kept(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
        with pytest.raises(UsageError, match=r"to sign for http://mlflow\.example you need a key: make one with"):
            keys.signing_key()
    keys.trust_key(public_pem(private_pem()).encode(), "the pipeline")
    with pytest.raises(UsageError, match="you need a key"):
        keys.signing_key()
    assert not (own_home / "signing_key.pem").exists()


@pytest.mark.parametrize("n", [2, 8])
def test_processes_that_make_the_first_key_at_once_end_with_one(own_home: Path, tmp_path: Path, n: int) -> None:
    script = (
        "import sys, time; from pathlib import Path; from agentkit_tracking import keys\n"
        "Path(sys.argv[1], sys.argv[2]).touch()\n"
        "while not Path(sys.argv[1], 'go').exists(): pass\n"
        "key = keys.signing_key(); print(key.public.id, keys.verify(key.public, key.private.sign(b''), b''))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path, str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(n)
    ]
    while sum((tmp_path / str(i)).exists() for i in range(n)) < n:
        assert all(p.poll() is None for p in started)
    (tmp_path / "go").touch()
    printed = {p.communicate(timeout=60)[0] for p in started}
    [only] = keys.load_trust().keys
    assert printed == {f"{only.id} True\n"}
    assert [f.name for f in own_home.glob("*.pem*")] + [f.name for f in own_home.glob(".signing*")] == [
        "signing_key.pem"
    ]


def test_init_makes_a_key_for_others_to_trust_and_never_replaces_one(own_home: Path, tmp_path: Path) -> None:
    code, out, _ = said("init", "--owner", "Ada")
    assert code == 0
    [made] = keys.load_trust().keys
    assert (made.owner, made.local, made.status) == ("Ada", False, "good")
    assert f"public key {made.id} of Ada" in out
    assert made.pem in out
    before = (own_home / "signing_key.pem").read_bytes()
    assert "holds a key already; change it with `agentkit keys rotate`" in refused("init", "--owner", "Eve")
    assert (own_home / "signing_key.pem").read_bytes() == before
    assert keys.load_trust().keys == (made,)
    assert refused("init", "--owner", " \n") == "agentkit: " + (
        "a key needs an owner: the name or address of a person or a pipeline\n"
    )


# ---- where the private key comes from


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o444])
def test_a_private_key_that_others_can_read_is_not_used(own_home: Path, mode: int) -> None:
    keys.create("Ada")
    (own_home / "signing_key.pem").chmod(mode)
    with pytest.raises(UsageError, match=rf"can be read by others \(mode {mode:04o}\); it is not used"):
        keys.signing_key()
    assert "you cannot sign: " in said("list")[1]


def test_the_private_key_comes_from_the_environment_a_named_file_or_the_home_in_that_order(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home = keys.create("home").public.id
    ids = {}
    for owner in ("file", "environment"):
        pem = private_pem()
        ids[owner] = keys.trust_key(public_pem(pem).encode(), owner).id
        if owner == "file":
            monkeypatch.setenv("AGENTKIT_SIGNING_KEY_FILE", str(key_file(tmp_path, pem)))
        else:
            monkeypatch.setenv("AGENTKIT_SIGNING_KEY", pem)
        assert keys.signing_key().public.id == ids[owner]
    monkeypatch.setenv("AGENTKIT_SIGNING_KEY", "")
    assert keys.signing_key().public.id == ids["file"]
    monkeypatch.delenv("AGENTKIT_SIGNING_KEY_FILE")
    assert keys.signing_key().public.id == at_home


def test_a_key_taken_from_the_environment_signs_and_is_inherited_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels inherit the environment, and execute what a release holds."""
    pem = private_pem()
    identity = keys.trust_key(public_pem(pem).encode(), "ci").id
    monkeypatch.setenv("AGENTKIT_SIGNING_KEY", pem)
    keys.take_from_environment()
    assert "AGENTKIT_SIGNING_KEY" not in os.environ
    assert keys.signing_key().public.id == identity
    assert re.search(rf"→ +│ {identity}", said("list")[1])
    assert "unset it" in refused("rotate")


def test_a_named_file_that_is_not_there_is_no_reason_to_make_a_key(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTKIT_SIGNING_KEY_FILE", "nowhere.pem")
    with pytest.raises(UsageError, match=r"AGENTKIT_SIGNING_KEY_FILE names .*nowhere\.pem, which is no file"):
        keys.signing_key()
    assert not (own_home / "trust.json").exists()


UNUSABLE: dict[str, Callable[[], str | bytes]] = {
    "encrypted": lambda: private_pem(password=b"secret"),
    "rsa": lambda: private_pem(rsa.generate_private_key(65537, 2048)),
    "elliptic": lambda: private_pem(ec.generate_private_key(ec.SECP256R1())),
    "x25519": lambda: private_pem(x25519.X25519PrivateKey.generate()),
    "public": lambda: public_pem(private_pem()),
    "cut": lambda: private_pem()[:60],
    "text": lambda: "hunter2",
    "empty": lambda: "",
    "binary": lambda: b"\xff\xfe\x00garbage",
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("place", ["environment", "file"])
def test_what_is_no_plain_ed25519_key_is_said(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    content = UNUSABLE[kind]()
    if place == "file":
        monkeypatch.setenv("AGENTKIT_SIGNING_KEY_FILE", str(key_file(tmp_path, content)))
    elif isinstance(content, str) and content:
        monkeypatch.setenv("AGENTKIT_SIGNING_KEY", content)
    else:
        monkeypatch.setenv("AGENTKIT_SIGNING_KEY", "\udcff\udcfe")  # how bytes arrive that are no text
    with pytest.raises(UsageError, match="holds no Ed25519 private key in PEM") as error:
        keys.signing_key()
    assert "hunter2" not in str(error.value)
    assert not (own_home / "trust.json").exists()


# ---- what counts


def test_a_key_that_is_not_among_the_trusted_cannot_sign(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create("Ada")
    monkeypatch.setenv("AGENTKIT_SIGNING_KEY", private_pem())
    with pytest.raises(UsageError, match=r"the signing key [0-9a-f]{16} is not in .*trust\.json; add it"):
        keys.signing_key()


def test_a_rotated_key_retires_and_another_of_the_same_owner_signs(own_home: Path) -> None:
    old = keys.create("Ada")
    kept = (own_home / "signing_key.pem").read_text()
    code, out, _ = said("rotate")
    new = keys.signing_key()
    assert code == 0
    assert f"{old.public.id} has retired, {new.public.id} signs from now on" in out
    assert new.public.pem in out
    assert [(k.owner, k.status) for k in keys.load_trust().keys] == [("Ada", "retired"), ("Ada", "good")]
    assert (new.public.id, can_sign(new)) == (keys.load_trust().keys[1].id, True)
    assert stat.S_IMODE((own_home / "signing_key.pem").stat().st_mode) == 0o600
    (own_home / "signing_key.pem").write_text(kept)
    with pytest.raises(UsageError, match=f"the signing key {old.public.id} is retired"):
        keys.signing_key()


def test_a_key_in_the_environment_is_not_rotated_behind_its_holders_back(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = private_pem()
    keys.trust_key(public_pem(pem).encode(), "ci")
    monkeypatch.setenv("AGENTKIT_SIGNING_KEY", pem)
    assert "the key comes from AGENTKIT_SIGNING_KEY; unset it" in refused("rotate")
    assert [k.status for k in keys.load_trust().keys] == ["good"]


def test_who_revoked_the_own_key_gets_a_new_one_by_rotating(own_home: Path) -> None:
    old = keys.create("Ada").public
    code, out, _ = said("revoke", old.id[:6], "--why", "laptop stolen")
    assert code == 0
    assert f"{old.id} (Ada) is revoked" in out
    with pytest.raises(UsageError, match=rf"{old.id} is revoked; .*agentkit keys rotate"):
        keys.signing_key()
    assert said("rotate")[0] == 0
    assert [(k.id == old.id, k.status, k.why) for k in keys.load_trust().keys] == [
        (True, "revoked", "laptop stolen"),
        (False, "good", ""),
    ]
    assert can_sign(keys.signing_key())


def test_a_key_is_revoked_by_an_unambiguous_beginning_of_its_id(own_home: Path) -> None:
    keys.create("Ada")
    while len({k.id[0] for k in keys.load_trust().keys}) == len(keys.load_trust().keys):
        keys.trust_key(public_pem(private_pem()).encode(), "somebody")
    ids = [k.id for k in keys.load_trust().keys]
    shared = next(i[0] for i in ids if sum(j[0] == i[0] for j in ids) > 1)
    assert refused("revoke", shared) == f"agentkit: 2 keys begin with {shared!r}; see `agentkit keys list`\n"
    assert "0 keys begin with 'nothing'" in refused("revoke", "nothing")
    assert {k.status for k in keys.load_trust().keys} == {"good"}


def test_nothing_is_no_beginning_of_a_key() -> None:
    keys.create("Ada")
    assert "0 keys begin with ''" in refused("revoke", "")


def test_the_list_shows_whose_keys_they_are_and_which_one_signs(own_home: Path) -> None:
    code, out, _ = said("list")
    assert (code, "no trusted keys in" in " ".join(out.split())) == (0, True)
    assert not (own_home / "trust.json").exists()
    own = keys.create("Ada").public
    other = keys.trust_key(public_pem(private_pem()).encode(), "Bob").id
    keys.revoke(other, "left")
    code, out, _ = said("list", "--pem")
    assert code == 0
    rows = {i: line for line in out.splitlines() for i in (own.id, other) if i in line and "│" in line}
    assert "→" in rows[own.id]
    assert "→" not in rows[other]
    assert re.search(r"Bob +│ revoked +│ \d{4}-\d\d-\d\d \d\d:\d\d │ left", rows[other])
    assert own.pem in out


def test_a_public_key_is_trusted_once_under_a_name_of_ones_own_choice(own_home: Path, tmp_path: Path) -> None:
    pem = private_pem()
    file = tmp_path / "bob.pem"
    file.write_text(public_pem(pem))
    code, out, _ = said("trust", file, "--owner", "Bob")
    [bob] = keys.load_trust().keys
    assert (code, f"{bob.id} is now trusted as Bob's" in out) == (0, True)
    assert bob.pem == file.read_text()
    assert "is known already, as Bob's (good)" in refused("trust", file, "--owner", "Robert")
    keys.revoke(bob.id, "")
    assert "is known already, as Bob's (revoked)" in refused("trust", file, "--owner", "Bob")
    for content, message in (
        (pem, "that is a private key; give the public one"),
        ("garbage", "expected an Ed25519 public key in PEM"),
        (public_pem(private_pem(rsa.generate_private_key(65537, 2048))), "expected an Ed25519 public key in PEM"),
    ):
        file.write_text(content)
        assert message in refused("trust", file, "--owner", "Bob")
    assert "cannot be read" in refused("trust", tmp_path / "nowhere.pem", "--owner", "Bob")
    assert len(keys.load_trust().keys) == 1


# ---- a trust file that is wrong is never one that trusts nobody


def edited(text: str, **changes: Any) -> str:
    trust = json.loads(text)
    trust["keys"][0] |= changes
    return json.dumps(trust)


OTHER = base64.b64encode(bytes(32)).decode()
DAMAGED: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "no object": lambda _: "[]",
    "another format": lambda text: json.dumps({**json.loads(text), "format": 2}),
    "misspelt option": lambda text: json.dumps({**json.loads(text), "seperate_approver": True}),
    "another public key": lambda text: edited(text, public=OTHER),
    "no base64": lambda text: edited(text, public="no base64"),
    "no text": lambda text: edited(text, public="ü"),
    "a short public key": lambda text: edited(
        text, public=base64.b64encode(b"short").decode(), id=keys.key_id(b"short")
    ),
    "a time of no zone": lambda text: edited(text, retired="2026-01-01T00:00:00"),
    "a key twice": lambda text: json.dumps({**json.loads(text), "keys": json.loads(text)["keys"] * 2}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_trust_file_is_said_and_left_alone(own_home: Path, damage: str) -> None:
    keys.create("Ada")
    path = own_home / "trust.json"
    path.write_text(DAMAGED[damage](path.read_text()))
    before = path.read_bytes()
    for action in (
        keys.load_trust,
        keys.signing_key,
        keys.rotate,
        lambda: keys.trust_key(public_pem(private_pem()).encode(), "x"),
    ):
        with pytest.raises(UsageError, match=re.escape(str(path))):
            action()
    assert path.read_bytes() == before
    assert str(path) in refused("list")


def test_a_trust_file_that_cannot_be_read_is_said(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_home.mkdir()
    (own_home / "file").touch()
    for place in (own_home, own_home / "file" / "trust.json"):
        monkeypatch.setenv("AGENTKIT_TRUST", str(place))
        with pytest.raises(UsageError, match=r"the trusted keys in .* cannot be read"):
            keys.load_trust()


def test_a_trust_file_that_was_edited_counts_at_once(own_home: Path) -> None:
    keys.create("Ada")
    path = own_home / "trust.json"
    for owner in ("Bea", "Cy", "Dee"):
        path.write_text(edited(path.read_text(), owner=owner))
        assert keys.load_trust().keys[0].owner == owner


# ---- killed

KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from agentkit_tracking import keys

home, out, action = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
STEPS = ("replace", "link", "open", "unlink")
done = []

def deadly(original, n, where):
    def call(*arguments, **options):
        inside = any(str(out) in str(a) for a in arguments)
        done.append(1) if inside else None
        if inside and len(done) == n and where == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return original(*arguments, **options)
        finally:
            if inside and len(done) == n and where == "after":
                os.kill(os.getpid(), signal.SIGKILL)
    return call

def work(n, where):
    for name in STEPS:
        setattr(os, name, deadly(getattr(os, name), n, where))
    Path.write_text = deadly(Path.write_text, n, where)
    if action == "trust":
        keys.trust_key(os.environ["PEM"].encode(), "Bob")
    else:
        {"init": lambda: keys.create("Ada"), "first": keys.signing_key, "rotate": keys.rotate}[action]()

for where in ("before", "after"):
    for n in range(1, 50):
        copy = out / f"{n:02}-{where}"
        shutil.copytree(home, copy)
        os.environ["AGENTKIT_HOME"] = str(copy)
        if (child := os.fork()) == 0:
            work(n, where)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        print(copy, flush=True)
"""


@pytest.mark.parametrize("action", ["init", "first", "trust", "rotate"])
def test_a_process_killed_at_any_step_leaves_keys_that_one_command_sets_right(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    own_home.mkdir()
    if action in ("trust", "rotate"):
        keys.create("Ada")
    old = [k.id for k in keys.load_trust().keys]
    (tmp_path / "killed").mkdir()
    monkeypatch.setenv("PEM", public_pem(private_pem()))
    done = subprocess.run(
        [sys.executable, "-c", KILLER, own_home, tmp_path / "killed", action],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    homes = [Path(line) for line in done.stdout.splitlines()]
    assert len(homes) >= 4
    for home in homes:
        monkeypatch.setenv("AGENTKIT_HOME", str(home))
        assert [k.id for k in keys.load_trust().keys][: len(old)] == old  # whole, and nothing is lost
        for file in [*home.glob("*.pem"), *home.glob(".*pem*")]:
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        try:
            key = keys.signing_key()
        except UsageError as e:
            key = keys.rotate()[1] if "agentkit keys rotate" in str(e) else keys.create("Ada")
        assert can_sign(key)
        assert keys.load_trust().find(key.public.id) == key.public


def test_trust_killed_at_random_is_always_whole(own_home: Path) -> None:
    script = (
        "import os, uuid; from agentkit_tracking import keys\n"
        "while True: keys.create(f'{uuid.uuid4()}') if not keys.key_path().exists() else keys.rotate()"
    )
    found = 0
    for i in range(4):
        process = subprocess.Popen([sys.executable, "-c", script])
        while len(keys.load_trust().keys) <= found:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = len(keys.load_trust().keys)
        assert found > i
