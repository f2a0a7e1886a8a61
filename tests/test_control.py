"""The control database and the notices: light until used, closed when unreadable, delivered at least once."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from servers import free_port

from agentkit.approvals import ApprovalRequest
from agentkit.control import Control, Notice
from agentkit.errors import AgentkitError
from agentkit.testing import FakeClock
from agentkit_tracking.control import ControlError, ControlPlane, database, notices, tables

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def steered() -> Iterator[FakeClock]:
    with FakeClock() as now:
        yield now


@pytest.fixture(autouse=True)
def own_control(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The control database is the file in this test's home; no webhook."""
    for name in (database.URL_ENV, notices.URL_ENV, notices.SECRET_ENV, "AGENTKIT_APPROVAL_HOURS"):
        monkeypatch.delenv(name, raising=False)
    yield own_home / "control.db"
    database.close()


@pytest.fixture
def plane() -> ControlPlane:
    return ControlPlane()


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each test on a SQLite file and on PostgreSQL, empty."""
    if request.param == "postgresql":
        from sqlalchemy import create_engine, text

        url = request.getfixturevalue("cluster")
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        engine.dispose()
        monkeypatch.setenv(database.URL_ENV, url)
    yield request.param
    database.close()


def request_for(key: str = "call-1", **changes: object) -> ApprovalRequest:
    """A refund that needs a person."""
    given: dict[str, object] = {
        "run_id": "f" * 32,
        "agent": "billing",
        "tool": "issue_refund",
        "arguments": {"order_id": "ORD-1", "usd": 80.0},
        "reason": "usd is 80.00, and from 50.00 on a person decides",
        "system": "support_triage",
        "doing": "The customer was charged twice",
        "confidence": 0.93,
        "user": "C-0001",
        "key": key,
    }
    return ApprovalRequest(**{**given, **changes})  # type: ignore[arg-type]


def in_python(code: str, **environment: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the database


def test_is_a_control_plane(plane: ControlPlane) -> None:
    as_the_run_sees_it: Control = plane
    assert as_the_run_sees_it.stopped("s", None, None, None) is None
    assert as_the_run_sees_it.ledgers("s", None, None, None) == ()


def test_an_unused_plane_imports_no_sqlalchemy_and_writes_nothing(own_control: Path) -> None:
    code = (
        "import sys; from agentkit_tracking.control import ControlPlane\n"
        "assert ControlPlane().stopped('s', None, None, None) is None\n"
        "print('sqlalchemy' in sys.modules, 'mlflow' in sys.modules)"
    )
    assert in_python(code).strip() == "False False"
    assert not own_control.exists()


def test_blank_and_old_stores_get_the_steps_they_lack(
    either: str, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy import text

    identity = plane.desk.ask(request_for())
    ran = []

    def second(connection: object) -> None:
        ran.append(2)
        connection.execute(text("ALTER TABLE notices ADD COLUMN colour TEXT"))  # type: ignore[attr-defined]

    monkeypatch.setattr(tables, "MIGRATIONS", (*tables.MIGRATIONS, second))
    for _ in range(2):
        database.close()
        assert ControlPlane().desk.get(identity).request == request_for()
    assert ran == [2]
    monkeypatch.setattr(tables, "MIGRATIONS", tables.MIGRATIONS[:1])
    database.close()
    with pytest.raises(AgentkitError, match="upgrade agentkit"):
        ControlPlane().desk.get(identity)


def test_many_processes_create_one_database(either: str) -> None:
    code = (
        "import sys, agentkit_tracking.control as c; from agentkit.approvals import ApprovalRequest\n"
        "print(c.ControlPlane().desk.ask(ApprovalRequest('r', 'a', 't', {}, 'why', key='k')))"
    )
    run = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [p.communicate(timeout=120) for p in run]
    assert all(p.returncode == 0 for p in run), said
    assert len({out for out, _ in said}) == 1  # all asked about one call, so it is one question


@pytest.mark.parametrize("wreck", ["garbage", "folder", "removed"])
def test_an_unreadable_database_closes_everything(own_control: Path, wreck: str) -> None:
    from agentkit.budget import Budget

    plane = ControlPlane()
    plane.desk.ask(request_for())
    if wreck == "removed":
        for file in own_control.parent.glob("control.db*"):
            file.unlink()
    else:
        database.close()
        for file in own_control.parent.glob("control.db*"):
            file.unlink()
        own_control.mkdir() if wreck == "folder" else own_control.write_bytes(b"no database at all" * 1000)
    plane.forget()
    for _ in range(2):  # also from what is kept for a second
        with pytest.raises(ControlError, match=r"control\.db"):
            plane.stopped("support_triage", None, None, None)
    with pytest.raises(ControlError):
        plane.desk.wait(request_for())
    [ledger] = plane.ledgers("s", None, Budget(usd=1.0), None)
    with pytest.raises(ControlError):
        ledger.reserve(usd=0.1)
    plane.notify(Notice("acted", "r", "s", "a note"))  # a notice fails no run


def test_a_server_that_is_not_there_is_said_within_seconds_without_its_password(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(database.URL_ENV, f"postgresql+psycopg2://u:hidden@127.0.0.1:{free_port()}/x")
    start = time.monotonic()
    with pytest.raises(ControlError) as refused:
        plane.stopped("s", None, None, None)
    assert time.monotonic() - start < 10
    assert "hidden" not in str(refused.value)
    assert "AGENTKIT_CONTROL" in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///"])
def test_a_database_that_no_other_process_sees_is_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv(database.URL_ENV, url)
    with pytest.raises(AgentkitError, match="name a file"):
        ControlPlane().stopped("s", None, None, None)


def test_a_database_put_in_its_place_is_read_instead(own_control: Path, plane: ControlPlane) -> None:
    plane.desk.ask(request_for())
    other = own_control.with_name("other.db")
    with sqlite3.connect(own_control) as old, sqlite3.connect(other) as new:
        old.backup(new)
        new.execute("DELETE FROM approvals")
    old.close()
    new.close()
    os.replace(other, own_control)
    for rest in ("-wal", "-shm"):  # of the old file
        own_control.with_name(f"control.db{rest}").unlink(missing_ok=True)
    assert plane.desk.waiting() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_its_own_connections(either: str) -> None:
    code = """
import os
from agentkit_tracking.control import ControlPlane
from agentkit_tracking.control.stops import Target
plane = ControlPlane()
plane.stops.stop(Target("a"))
child = os.fork()
if child == 0:
    plane.stops.stop(Target("b"))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
plane.stops.stop(Target("c"))
print(sorted(str(s.target) for s in plane.stops.in_force()))
"""
    assert in_python(code).strip() == "['a', 'b', 'c']"


# ---- notices


class Receiver:
    """A webhook's receiving end, which checks what arrives; `faults` are answered first, one each."""

    def __init__(self, faults: list[int]) -> None:
        self.faults, self.seen, self.bad = faults, [], []
        self.tried: list[str] = []


@contextmanager
def receiving(*faults: int, port: int = 0) -> Iterator[tuple[str, Receiver]]:
    receiver = Receiver(list(faults))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            identity, at = self.headers["webhook-id"], self.headers["webhook-timestamp"]
            mac = hmac.new(SECRET, f"{identity}.{at}.".encode() + body, hashlib.sha256).digest()
            if self.headers["webhook-signature"] != f"v1,{base64.b64encode(mac).decode()}":
                receiver.bad.append(identity)
            receiver.tried.append(identity)
            fault = receiver.faults.pop(0) if receiver.faults else 0
            if not fault:
                receiver.seen.append(json.loads(body))
            self.send_response(fault or 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "FIRST_WAIT_S", 0.02)


def until(check: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def to_webhook(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv(notices.URL_ENV, url)
    monkeypatch.setenv(notices.SECRET_ENV, "whsec_" + base64.b64encode(SECRET).decode())


def test_a_notice_arrives_signed_after_failures(
    either: str, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with receiving(500, 302, 429) as (url, receiver):
        to_webhook(monkeypatch, url)
        plane.notify(Notice("acted", "run-1", "support_triage", "refunded\nUSD 20", {"usd": 20}))
        until(lambda: receiver.seen and not plane.outbox.undelivered())
    assert receiver.bad == []
    assert len(set(receiver.tried)) == 1  # the same id each time, so that receivers know it again
    [body] = receiver.seen
    assert body["type"] == "agentkit.acted"
    assert body["data"] == {
        "kind": "acted",
        "run_id": "run-1",
        "system": "support_triage",
        "text": "refunded\nUSD 20",
        "details": {"usd": 20},
    }
    assert "refunded USD 20" in caplog.text  # on one line


def test_a_waiting_approval_tells_people_with_its_card(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as (url, receiver):
        to_webhook(monkeypatch, url)
        identity = plane.desk.ask(request_for())
        plane.desk.ask(request_for())
        until(lambda: receiver.seen)
        assert plane.outbox.flush(10)
    [body] = receiver.seen
    assert body["type"] == "agentkit.approval"
    assert body["data"]["details"]["approval"] == identity
    assert "May billing call issue_refund?" in body["data"]["details"]["card"]


def test_notify_returns_at_once_while_nobody_listens_and_the_next_process_sends_it(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    to_webhook(monkeypatch, f"http://127.0.0.1:{port}/hook")
    monkeypatch.setattr(notices, "ATTEMPTS", 4)  # 3.5 s and more
    plane.notify(Notice("unknown", "run-1", "s", "first"))  # makes the database
    start = time.monotonic()
    plane.notify(Notice("unknown", "run-2", "s", "second"))
    assert time.monotonic() - start < 3
    assert plane.outbox.flush(30)
    assert plane.outbox.undelivered() == 2
    with receiving(port=port) as (_, receiver):
        in_python(
            "from agentkit_tracking.control import ControlPlane; from agentkit.control import Notice\n"
            "p = ControlPlane(); p.notify(Notice('unknown', 'run-3', 's', 'third')); p.outbox.flush(10)"
        )
        until(lambda: len(receiver.seen) == 3)
    assert [body["data"]["text"] for body in receiver.seen] == ["first", "second", "third"]
    assert receiver.bad == []


def test_one_notice_that_is_not_taken_holds_up_no_other(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.notify(Notice("acted", "r", "s", "poison"))
    plane.notify(Notice("acted", "r", "s", "good"))
    with receiving(400) as (url, receiver):
        to_webhook(monkeypatch, url)
        assert plane.outbox.deliver() == 1
        assert [body["data"]["text"] for body in receiver.seen] == ["good"]


def test_what_another_process_is_sending_is_left_to_it(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, steered: FakeClock
) -> None:
    plane.notify(Notice("acted", "r", "s", "once"))
    with database.database().reading() as connection:
        [(identity, _)] = connection.execute(notices._due()).all()
    assert plane.outbox._claim(identity)  # and dies
    with receiving() as (url, receiver):
        to_webhook(monkeypatch, url)
        plane.outbox.deliver()
        assert receiver.seen == []
        steered.tick(61)
        plane.outbox.deliver()
        assert len(receiver.seen) == 1


def test_without_a_webhook_a_notice_is_kept_and_logged(plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    plane.notify(Notice("unknown", "run-1", "s", "an effect in doubt \x1b[31m"))
    assert plane.outbox.undelivered() == 1
    [record] = [r for r in caplog.records if r.name == "agentkit.notices"]
    assert record.levelno == logging.WARNING
    assert "\x1b" not in record.getMessage()


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("http://example.com/hook", "s" * 32),
        ("http://127.0.0.1.example.com/", "s" * 32),
        ("file:///etc/passwd", "s" * 32),
        ("https://example.com/hook", ""),
        ("https://example.com/hook", "short"),
        ("https://example.com/hook", "whsec_%%%"),
    ],
)
def test_an_unsafe_webhook_is_not_used(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str, secret: str
) -> None:
    monkeypatch.setenv(notices.URL_ENV, url)
    monkeypatch.setenv(notices.SECRET_ENV, secret)
    plane.notify(Notice("acted", "r", "s", "a note"))
    assert "kept and logged only" in caplog.text
    assert plane.outbox._thread is None
    assert plane.outbox.undelivered() == 1
