"""Segments: the files of the run log, one per process, each a chain of hashes.

A segment is JSON lines. Every line is one event, framed with its length and a CRC-32:

    {"len":      361,"crc":"…","hash":"…","salt":"…","event":{…},"private":{…}}

`len` counts the bytes behind `crc`, padded so that every part up to `event` stands at a fixed place.

`event` holds what happened, without any text of people's; its last field is the SHA-256 of salt and `private`, which holds the
rest. `hash` is the SHA-256 of the line before's `hash` and of `event`: an event that was changed, left out or moved breaks
the chain, while `private` can be taken out (a person's data, on request) and the chain still holds.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from agentkit.errors import AgentkitError

SUFFIX = ".jsonl"
FORMAT = 1
START = "0" * 64  # the hash before the first event
ERASED_SALT = b"0" * 32
_DEEPEST = 200  # levels of nesting; orjson takes 254
# Where the parts of a line stand.
_HEAD = 34
HASH, SALT, EVENT = slice(42, 106), slice(116, 148), 158
_BRACE = ord("}")
ID = EVENT + len('{"id":"')
PRIVATE = b',"private":'
_SHORTEST = len(PRIVATE + b"{}}")  # from there to the line's end
ID_SIZE = 20
_NAME = re.compile(rf"[0-9a-f]{{{ID_SIZE}}}\.jsonl")
_SALTS = 16 * 256  # random bytes fetched at once; asking the system for each event costs as much as the hash

Event = tuple[dict[str, Any], dict[str, Any]]  # what happened, and what of it is private


class LogUnwritable(AgentkitError):
    """The run log cannot be written; what was written before is intact."""


class Segment:
    """One process's file, open for appending. Threads may share it; other processes never write to it.

    Args:
        folder: where segments lie; made if missing.
        roll_bytes: from this size on, the next `append` goes to another file.

    Raises:
        LogUnwritable: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, roll_bytes: int = 64 << 20, name: str | None = None) -> None:
        self.folder, self.roll_bytes = folder, roll_bytes
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._begin(name)

    def _begin(self, name: str | None = None) -> None:
        self.id = name or f"{time.time_ns() // 1_000:014x}{os.urandom(3).hex()}"
        self.path = self.folder / f"{self.id}{SUFFIX}"
        self._n, self._hash, self._salts = 0, START, b""
        self._size = self._synced = 0
        self._is_sure = True  # that the file ends where it is thought to
        # Under its name it can be seen only once it is locked and begun: others take what nobody holds for ended.
        scratch = self.folder / f".{self.id}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fd: int | None = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        except OSError as e:
            raise _unwritable(self.folder, e) from e
        try:
            _hold(self._fd)
            self._write([({"type": "segment", "name": "opened", "format": FORMAT, **_host()}, {})])
            os.rename(scratch, self.path)
        except BaseException as e:
            self._abandon()
            with suppress(OSError):
                scratch.unlink()
            if isinstance(e, OSError):
                raise _unwritable(self.folder, e) from e
            raise
        _sync_folder(self.folder)

    def append(self, events: Sequence[Event]) -> list[str]:
        """Write events with one `write`; each is acknowledged once this returns.

        Returns:
            Their ids: segment and number.

        Raises:
            LogUnwritable: none of them was written.
        """
        with self._lock:
            if not self._is_sure:  # an interrupt came while it was written to
                self._abandon()
            if self._fd is None:
                self._begin()
            elif self._size >= self.roll_bytes:
                self._end()
                self._begin()
            return self._write(events)

    def sync(self) -> None:
        """Return when all that was appended so far is on the disk; threads that wait at once share one `fdatasync`.

        Raises:
            LogUnwritable: the disk did not take it; the next `append` goes to another file.
        """
        own, size = self.id, self._size
        with self._syncing:
            with self._lock:  # else another thread could close the file, whose number the next may have
                if self._fd is None or self.id != own or self._synced >= size:
                    return  # a file that was closed was synced before
                fd, size = os.dup(self._fd), self._size
            try:
                os.fdatasync(fd)
            except OSError as e:
                with self._lock:
                    if self.id == own:
                        self._abandon()
                raise _unwritable(self.folder, e) from e
            finally:
                os.close(fd)
            with self._lock:
                if self.id == own:
                    self._synced = max(self._synced, size)

    def close(self) -> None:
        """Write that it is closed, and close it; the next `append` opens another."""
        with self._lock:
            if self._fd is not None:
                self._end()

    def forget(self) -> None:
        """After a fork: the file is the parent's."""
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._abandon()

    # ---- under the lock

    def _write(self, events: Sequence[Event]) -> list[str]:
        assert self._fd is not None
        at = datetime.now(UTC).isoformat(timespec="microseconds")
        lines, ids, before, n = [], [], self._hash, self._n
        for what, private in events:
            identity = f"{self.id}-{n}"
            line, before = frame({"id": identity, "logged_at": at, **what}, private, before, self._salt())
            lines.append(line)
            ids.append(identity)
            n += 1
        content = b"".join(lines)
        self._is_sure = False
        try:
            written = os.write(self._fd, content)
            if written != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            try:
                os.ftruncate(self._fd, self._size)  # else what comes next would be torn with this
                self._is_sure = True
            except OSError:
                self._abandon()
            raise _unwritable(self.folder, e) from e
        self._size += len(content)
        self._n, self._hash, self._is_sure = n, before, True
        return ids

    def _salt(self) -> bytes:
        if not self._salts:
            self._salts = os.urandom(_SALTS)
        salt, self._salts = self._salts[:16], self._salts[16:]
        return salt.hex().encode()

    def _end(self) -> None:
        with suppress(LogUnwritable):
            self._write([({"type": "segment", "name": "closed"}, {})])
        if self._fd is not None:
            with suppress(OSError):
                os.fdatasync(self._fd)
        self._abandon()

    def _abandon(self) -> None:
        fd, self._fd = self._fd, None  # first, since an interrupt may come: its number may soon be another file's
        if fd is not None:
            with suppress(OSError):
                os.close(fd)


def frame(event: dict[str, Any], private: dict[str, Any], before: str, salt: bytes) -> tuple[bytes, str]:
    """An event as a line, and its hash."""
    hidden = _dumps(private)
    sealed = hashlib.sha256(salt + hidden).hexdigest()
    what = b'%b,"private_sha256":"%b"}' % (_dumps(event)[:-1], sealed.encode())
    digest = hashlib.sha256(before.encode() + what).hexdigest()
    return _line(digest.encode(), salt, what, hidden), digest


def _line(digest: bytes, salt: bytes, what: bytes, hidden: bytes) -> bytes:
    rest = b'"hash":"%b","salt":"%b","event":%b,"private":%b}' % (digest, salt, what, hidden)
    return b'{"len":%9d,"crc":"%08x",' % (len(rest), zlib.crc32(rest)) + rest + b"\n"


def _dumps(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value, default=str)
    except (orjson.JSONEncodeError, TypeError):
        # A lone surrogate or an integer past 64 bits must not lose the audit record.
        return orjson.dumps(encodable(value), default=str)


def encodable(value: Any, depth: int = 0) -> Any:
    """The value as JSON can hold it; text that is no valid Unicode is repaired, what is nested too deep becomes text."""
    if depth > _DEEPEST:
        return "…" if isinstance(value, dict | list | tuple) else str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 63:
        return str(value)
    if isinstance(value, dict):
        return {encodable(str(k)): encodable(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encodable(v, depth + 1) for v in value]
    return value


# ---- reading


@dataclass(slots=True)
class Line:
    """One line that is whole: where it lies in its file, and its parts as written."""

    offset: int
    size: int  # with the line's end
    n: int
    digest: bytes  # hex
    salt: bytes  # hex
    event: bytes
    private: bytes

    @property
    def is_erased(self) -> bool:
        """Whether its private part was taken out."""
        return self.private.rstrip() == b"null"


Fault = Literal["damaged", "changed", "private part changed", "out of order"]


@dataclass(slots=True, frozen=True)
class Finding:
    """What is wrong at one place of a segment."""

    offset: int
    n: int | None  # the event's number, where it can be told
    fault: Fault
    why: str


def lines(content: bytes, offset: int = 0) -> Iterator[Line | Finding]:
    """The lines in the bytes that a segment has from `offset` on; for what cannot be read, a finding.

    An unfinished line at the end is left out: its writer is still at it, or has died.
    """
    start = 0
    while (end := content.find(b"\n", start)) >= 0:
        raw = content[start:end]
        try:
            yield parse(raw, offset + start)
        except ValueError as e:
            yield Finding(offset + start, None, "damaged", str(e))
        start = end + 1


def parse(raw: bytes, offset: int = 0) -> Line:
    """One line, without its end.

    Raises:
        ValueError: it is not as it was written.
    """
    if (why := _broken(raw, 0, len(raw))) is not None:
        raise ValueError(why)
    split = raw.find(PRIVATE, EVENT)
    event = raw[EVENT:split]
    return Line(offset, len(raw) + 1, number(event), raw[HASH], raw[SALT], event, raw[split + len(PRIVATE) : -1])


def _broken(content: bytes, start: int, end: int) -> str | None:
    """Why the bytes from `start` to `end` are no line as it was written; None if they are."""
    body = start + _HEAD
    size = content[start + 7 : start + 16].lstrip(b" ")
    if content[start : start + 7] != b'{"len":' or not size.isdigit() or size[:1] == b"0":
        return "no length"
    if int(size) != end - body:
        return f"{end - body} bytes where {int(size)} were written"
    if content[start + 16 : body] != b',"crc":"%08x",' % zlib.crc32(memoryview(content)[body:end]):
        return "the checksum does not fit"
    split = content.find(PRIVATE, start + EVENT, end)
    if split < 0 or content[start + EVENT : start + EVENT + 7] != b'{"id":"':
        return "no event"
    if end - split < _SHORTEST or content[end - 1 : end] != b"}":
        return "no private part"
    return None


def number(event: bytes) -> int:
    """The number of an event, from its text.

    Raises:
        ValueError: it has none.
    """
    dash = event.index(b"-", 7, 64)
    return int(event[dash + 1 : event.index(b'"', dash)])


Places = tuple[list[int], list[int], list[int]]  # where lines begin, where their `PRIVATE` begins, where they end


def scan(
    content: bytes, offset: int, chain: Chain, *, check: bool, segment: str | None = None, most: int = sys.maxsize
) -> tuple[Places, list[Finding], int]:
    """Where the good lines in `content` are, and what is wrong; as `lines` and `Chain`, for many at once.

    Private parts are not compared with their hashes: that is for whoever verifies. An unfinished line at the end is left out.

    Args:
        content: lines, which stand at `offset` in their file.
        check: whether hashes are to follow from each other.
        segment: whose id every event must have.
        most: good lines to take.

    Returns:
        Places in `content`, findings, and where in `content` the next line begins.
    """
    starts: list[int] = []
    splits: list[int] = []
    ends: list[int] = []
    findings: list[Finding] = []
    find, crc32, sha256, view = content.find, zlib.crc32, hashlib.sha256, memoryview(content)
    identity = b'{"id":"' + (b"" if segment is None else segment.encode() + b"-")
    digest, n, start, follows = chain.digest, chain.n, 0, not chain.has_gap
    while (end := find(b"\n", start)) >= 0 and len(starts) < most:
        split = find(PRIVATE, start + EVENT, end)
        body = start + _HEAD
        if split > 0 and not _is_id(content, start + EVENT, identity):
            findings.append(Finding(offset + start, None, "damaged", "its id is not one of this segment"))
            follows = False
        elif (
            end - split >= _SHORTEST
            and content[end - 1] == _BRACE
            and split > 0
            and content[start:body] == b'{"len":%9d,"crc":"%08x",' % (end - body, crc32(view[body:end]))
        ):
            before, digest = digest, content[start + 42 : start + 106]
            if check and follows and sha256(before + view[start + EVENT : split]).hexdigest().encode() != digest:
                findings.append(_unlike(content[start + EVENT : split], offset + start, n))
                n = findings[-1].n or n + 1
            elif follows:
                n += 1
            else:
                n = _numbered(content[start + EVENT : split], n)
            follows = True
            starts.append(start)
            splits.append(split)
            ends.append(end)
        else:
            why = _broken(content, start, end) or "no event"
            findings.append(Finding(offset + start, None, "damaged", why))
            follows = False
        start = end + 1
    chain.n, chain.digest, chain.has_gap = n, digest, not follows
    return (starts, splits, ends), findings, start


def _is_id(content: bytes, place: int, identity: bytes) -> bool:
    """Whether an event begins with its id: segment, dash, a number of at most 18 digits."""
    if not content.startswith(identity, place):
        return False
    if identity[-1:] != b"-":
        return True
    begin = place + len(identity)
    digits = content[begin : content.find(b'"', begin, begin + 20)]
    return digits.isdigit() and len(digits) <= 18


def _numbered(event: bytes, before: int) -> int:
    try:
        return number(event)
    except ValueError:
        return before + 1


def _unlike(event: bytes, offset: int, before: int) -> Finding:
    """An event whose hash does not follow from the one before."""
    n = _numbered(event, before)
    if n != before + 1:
        return Finding(offset, n, "out of order", f"event {n} follows event {before}")
    return Finding(offset, n, "changed", "its hash does not follow from it and the one before")


class Chain:
    """Checks that lines continue each other; `n` and `digest` are those of the last event."""

    __slots__ = ("digest", "has_gap", "n")

    def __init__(self, n: int = -1, digest: bytes = START.encode()) -> None:
        self.n, self.digest = n, digest
        self.has_gap = False

    def add(self, line: Line) -> Finding | None:
        """Take the next line; what is wrong with it, if anything is."""
        event, private = line.event, line.private
        found: Finding | None = None
        is_next = line.n == self.n + 1 and _sha256(self.digest + event) == line.digest
        if not is_next and not (self.has_gap and line.n > self.n):  # what stands in a gap cannot be compared
            found = _unlike(event, line.offset, self.n)
        if found is None and not line.is_erased and _sha256(line.salt + private) != event[-66:-2]:
            found = Finding(line.offset, line.n, "private part changed", "its hash is not the one that the event names")
        self.n, self.digest, self.has_gap = line.n, line.digest, False
        return found

    def skip(self) -> None:
        """Something that cannot be read stands here."""
        self.has_gap = True


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def segment_files(folder: Path) -> list[Path]:
    """The segments in a folder, oldest first: regular files of such names only, whatever else lies there."""
    try:
        with os.scandir(folder) as entries:
            found = [e.path for e in entries if _NAME.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted(map(Path, found))


def is_live(path: Path) -> bool:
    """Whether a process still has this segment open for appending."""
    try:
        import fcntl

        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return True  # held; or it cannot be told, and then nothing is taken for ended
    return False


def erase(path: Path, offset: int, size: int, *, sync: bool = True) -> None:
    """Take the private part out of one line of a segment, which may still be appended to: one write, the same length.

    Args:
        sync: return when it is on the disk.
    """
    with open(path, "r+b") as file:
        file.seek(offset)
        line = parse(file.read(size).rstrip(b"\n"), offset)
        blank = b"null".ljust(len(line.private))
        if len(blank) == len(line.private):
            file.seek(offset)
            os.pwrite(file.fileno(), _line(line.digest, ERASED_SALT, line.event, blank), offset)
            if sync:
                os.fdatasync(file.fileno())


def _hold(fd: int) -> None:
    """A shared lock that the system lets go of when the process ends, however it ends: so others can tell."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_SH)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _host() -> dict[str, Any]:
    import socket

    return {"host": socket.gethostname(), "pid": os.getpid()}


def _unwritable(folder: Path, error: OSError) -> LogUnwritable:
    return LogUnwritable(
        f"the run log in {folder} cannot be written: {error.strerror}; free space or set AGENTKIT_HOME to a folder that "
        "can be written. What was written before is intact"
    )
