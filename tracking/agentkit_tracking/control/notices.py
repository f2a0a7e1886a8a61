"""Notices to people: written down first, then logged, then sent to a webhook by a thread of their own.

The webhook follows Standard Webhooks (github.com/standard-webhooks): the headers `webhook-id`, `webhook-timestamp` and
`webhook-signature` (`v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`). `AGENTKIT_WEBHOOK_URL` is https, or http on
loopback; `AGENTKIT_WEBHOOK_SECRET` is `whsec_` and base64 or plain text, of 24 bytes and more. A notice arrives at least
once: its id tells a receiver that it has it already.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import os
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import tenacity
from sqlalchemy import Connection, or_, select

from agentkit import clock
from agentkit.control import Notice
from agentkit.errors import AgentkitError, UsageError
from agentkit_tracking.control.card import visible
from agentkit_tracking.control.database import Database, stamp
from agentkit_tracking.control.tables import NOTICES

URL_ENV, SECRET_ENV = "AGENTKIT_WEBHOOK_URL", "AGENTKIT_WEBHOOK_SECRET"
ATTEMPTS = 8  # with waits that double from 0.5 s: about two minutes; then the next process that notifies tries again
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
_ANSWER_S = 10.0  # a receiver has to take a notice, not to work on it
_CLAIM = timedelta(seconds=60)  # longer than one attempt can take; a sender that died is then taken over from
_TOO_OLD = timedelta(days=3)  # nobody wants last week's news when a webhook is mended
_BATCH = 50
_EXIT_S = 2.0  # a process that ends lets its last notice go out, if somebody takes it
_SECRET_BYTES = 24  # the least that Standard Webhooks allows
_LEVELS = {"acted": logging.INFO}
_log = logging.getLogger("agentkit.notices")


@dataclass(frozen=True)
class Webhook:
    """Where notices are sent, and the secret that signs them."""

    url: str
    secret: bytes

    @classmethod
    def configured(cls) -> Webhook | None:
        """What the environment says, or None.

        Raises:
            UsageError: no https address, or no secret to sign with.
        """
        url = os.environ.get(URL_ENV)
        if not url:
            return None
        parts = urlsplit(url)
        if not (parts.scheme == "https" and parts.hostname) and not (
            parts.scheme == "http" and _is_loopback(parts.hostname or "")
        ):
            raise UsageError(f"{URL_ENV} must be https, or http on loopback; notices are kept and logged only")
        return cls(url, _secret(os.environ.get(SECRET_ENV, "")))

    def send(self, identity: str, body: bytes) -> None:
        """One attempt.

        Raises:
            OSError, http.client.HTTPException: the receiver did not take it (it answers 2xx when it does).
        """
        timestamp = str(int(clock.utc().timestamp()))
        headers = {
            "content-type": "application/json",
            "user-agent": "agentkit",
            "webhook-id": identity,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(self.secret, identity, timestamp, body),
        }
        # A redirect could lead the notice, or a request within our network, anywhere.
        opener = build_opener(_NoRedirects)
        with opener.open(Request(self.url, body, headers, method="POST"), timeout=_ANSWER_S):
            pass


def signature(secret: bytes, identity: str, timestamp: str, body: bytes) -> str:
    """The value of `webhook-signature`, as a receiver computes it, too."""
    mac = hmac.new(secret, b"%b.%b.%b" % (identity.encode(), timestamp.encode(), body), hashlib.sha256)
    return f"v1,{base64.b64encode(mac.digest()).decode()}"


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None makes of the redirect the error that it is here."""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _secret(text: str) -> bytes:
    secret = text.encode()
    if text.startswith("whsec_"):
        try:
            secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            secret = b""
    if len(secret) < _SECRET_BYTES:
        raise UsageError(
            f"{SECRET_ENV} must be {_SECRET_BYTES} bytes or more, as text or as whsec_BASE64; notices are kept and logged only"
        )
    return secret


class Outbox:
    """The notices of a control database, and the thread that sends them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._wake, self._rested = threading.Event(), threading.Event()
        self._rested.set()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def notify(self, notice: Notice) -> None:
        """Write it down, log it, and leave the sending to the thread. Raises nothing."""
        try:
            with self._database.writing() as connection:
                put(connection, notice)
        except Exception as e:  # whatever it is, the run goes on, and the log below has the notice
            _log.error("a notice could not be kept, so it is not sent: %s", e)
        self.announce(notice)

    def announce(self, notice: Notice) -> None:
        """Log a notice that is already written down, and wake the thread. Raises nothing."""
        level = _LEVELS.get(notice.kind, logging.WARNING)
        _log.log(level, "%s %s, run %s: %s", *map(visible, (notice.kind, notice.system, notice.run_id, notice.text)))
        try:
            if Webhook.configured() is not None:
                self._start()
        except UsageError as e:
            _log.error("%s", e)

    def flush(self, seconds: float) -> bool:
        """Wait until everything is sent, or until the receiver has failed once; False when the time runs out first."""
        return self._rested.wait(seconds)

    def undelivered(self) -> int:
        """How many are still to be sent."""
        with self._database.reading() as connection:
            return len(connection.execute(_due()).all())

    def deliver(self) -> int:
        """Try once to send everything undelivered, oldest first; returns how many are left."""
        webhook = Webhook.configured()
        if webhook is None:
            return 0
        left = 0
        with self._database.reading() as connection:
            due = [(row.id, row.body) for row in connection.execute(_due().limit(_BATCH))]
        for i, (identity, body) in enumerate(due):
            if not self._claim(identity):
                continue  # another process is at it
            problem = _attempt(webhook, identity, body.encode())
            self._record(identity, problem)
            left += bool(problem)
            if problem is not None and not problem.startswith("HTTP"):
                return left + len(due) - i - 1  # nobody is there: the others would fail as this one did
        return left if len(due) < _BATCH else max(left, 1)

    def _claim(self, identity: str) -> bool:
        now = clock.utc()
        is_free = or_(NOTICES.c.claimed_until.is_(None), NOTICES.c.claimed_until < stamp(now))
        with self._database.writing() as connection:
            claimed = connection.execute(
                NOTICES.update()
                .where(NOTICES.c.id == identity, NOTICES.c.delivered_at.is_(None), is_free)
                .values(claimed_until=stamp(now + _CLAIM), attempts=NOTICES.c.attempts + 1)
            )
        return bool(claimed.rowcount)

    def _record(self, identity: str, problem: str | None) -> None:
        delivered_at = None if problem else stamp(clock.utc())
        with self._database.writing() as connection:
            connection.execute(
                NOTICES.update()
                .where(NOTICES.c.id == identity)
                .values(claimed_until=None, delivered_at=delivered_at, problem=problem)
            )

    # ---- the thread

    def _start(self) -> None:
        with self._lock:
            self._rested.clear()
            self._wake.set()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="agentkit-notices", daemon=True)
                self._thread.start()
                atexit.register(self.flush, _EXIT_S)

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                self._retrying()(self.deliver)
            except Exception:
                _log.exception("notices are not sent for now")  # the thread lives on for the next
            if not self._wake.is_set():
                self._rested.set()

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            retry=tenacity.retry_if_result(bool) | tenacity.retry_if_exception_type(AgentkitError),
            wait=tenacity.wait_exponential(FIRST_WAIT_S, LONGEST_WAIT_S) + tenacity.wait_random(0, FIRST_WAIT_S),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            sleep=time.sleep,  # real seconds: a test's clock drives runs, not this thread
            before_sleep=lambda _: self._rested.set(),
            retry_error_callback=_give_up,
        )


def put(connection: Connection, notice: Notice) -> str:
    """Write a notice down within a transaction, so that it is kept exactly when what it tells of is; returns its id."""
    identity, now = f"msg_{uuid.uuid4().hex}", clock.utc()
    body = {"type": f"agentkit.{notice.kind}", "timestamp": stamp(now), "data": asdict(notice)}
    text = json.dumps(body, default=str)
    connection.execute(NOTICES.insert().values(id=identity, created_at=stamp(now), body=text, attempts=0))
    return identity


def _due() -> Any:
    is_due = NOTICES.c.delivered_at.is_(None) & (NOTICES.c.created_at > stamp(clock.utc() - _TOO_OLD))
    return select(NOTICES.c.id, NOTICES.c.body).where(is_due).order_by(NOTICES.c.created_at)


def _attempt(webhook: Webhook, identity: str, body: bytes) -> str | None:
    """Why it was not taken, or None."""
    try:
        webhook.send(identity, body)
    except HTTPError as e:
        e.close()
        return f"HTTP {e.code}"
    except (OSError, http.client.HTTPException) as e:
        return f"{type(e).__name__}: {e}"[:300]
    return None


def _give_up(state: tenacity.RetryCallState) -> None:
    _log.warning("notices could not be sent in %d attempts; the next notice tries again", state.attempt_number)
