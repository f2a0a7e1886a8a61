"""Cassettes: record real replies of models once, and run anything against them again, offline and at no cost.

A cassette is a file of JSON lines, one exchange each. Requests are matched by all that is asked (model, messages, every
parameter), never by likeness: what was not recorded is an error that says what differs from the nearest recording.

A replayed call counts as the recorded one did: calls and tokens, and USD by today's prices (by the recorded cost where no
price is known), so that budgets and cost metrics behave as they did; nothing is paid. Its latency is not the provider's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, get_args

import orjson

from agentkit import clock
from agentkit.calls import Call, intercept
from agentkit.errors import DataError, ModelError, UsageError
from agentkit.jsonable import canonical
from agentkit.redaction import redact, without_secrets

Mode = Literal["replay", "record", "record-missing"]
Exchange = dict[str, Any]
_FORMAT = 1
_COMPARED = 200  # recordings that are looked at for the nearest one
_SHOWN = 60  # characters of a difference


class RecordingMissing(ModelError):
    """A replay came to a request that was not recorded.

    `differences` has one line per difference from the nearest recording; empty when there is none of that model.
    """

    def __init__(self, path: Path, model: str, what: str, differences: list[str]) -> None:
        remedy = f'record it: `ak.cassette({str(path)!r}, mode="record-missing")` with the provider\'s key set'
        super().__init__("\n".join([f"{path}: {what}; {remedy}", *(f"  {d}" for d in differences)]))
        self.path, self.model, self.differences = path, model, differences


@contextmanager
def cassette(path: str | Path, mode: Mode = "replay", *, repeat: bool = False) -> Iterator[Cassette]:
    """Model calls inside are answered from, or recorded to, the file `path`.

    Secrets are taken out of what is recorded, and what looks like personal data out of the requests; see
    `agentkit.redaction` for how little that promises.

    Args:
        mode: `replay` never reaches the network; `record` makes the file anew, in place of the old one once all is
            done; `record-missing` replays what there is and records the rest.
        repeat: answer a request that comes more often than it was recorded with its last recording. Without, that is
            an error: an evaluation's repeats would be copies of one answer.

    Raises:
        DataError: the file is missing or damaged.
        RecordingMissing: from the calls inside, in mode `replay`.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    made = Cassette(Path(path), mode, repeat=repeat)
    try:
        with intercept(made):
            yield made
    except BaseException:
        made.close(finished=False)
        raise
    made.close(finished=True)


class Cassette:
    """An interceptor that answers attempts of models from a file, or writes them there. Safe to share by threads.

    `replayed` and `recorded` count the exchanges.
    """

    outside_runs = True  # a program that is tuned must not reach the network either

    def __init__(self, path: Path, mode: Mode, *, repeat: bool = False) -> None:
        self.path, self.mode, self.repeat = path, mode, repeat
        self.replayed = self.recorded = 0
        self._lock = threading.Lock()
        self._next: defaultdict[str, int] = defaultdict(int)
        self._by_key: defaultdict[str, list[Exchange]] = defaultdict(list)
        if mode == "replay" or (mode == "record-missing" and path.exists()):
            for exchange in read_cassette(path):
                self._by_key[exchange["key"]].append(exchange)
        self._written = path.with_name(path.name + ".part") if mode == "record" else path
        self._file: IO[bytes] | None = None
        if mode != "replay":
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._written.open("wb" if mode == "record" else "ab")
            if mode == "record-missing" and not _ends_a_line(path):
                self._file.write(b"\n")  # an editor may have taken the last one away

    @property
    def is_recording(self) -> bool:
        """Whether it has to see every exchange, also one that a cache could answer."""
        return self.mode == "record"

    def close(self, *, finished: bool) -> None:
        """End the recording; one that was broken off does not replace an older one, and stays beside it (`.part`)."""
        if self._file is not None:
            self._file.close()
            if finished and self._written != self.path:
                os.replace(self._written, self.path)

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """Whole calls are left alone: attempts are what costs."""
        return proceed()

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """One attempt of a model, replayed or recorded; tools are left alone."""
        if call.kind != "model":
            return proceed()
        key = hashlib.sha256(canonical(call.arguments)).hexdigest()
        if self.mode != "record" and (found := self._take(key)) is not None:
            return _given_back(found)
        if self.mode == "replay":
            raise self._missing(key, call)
        return self._record(key, call, proceed)

    def _take(self, key: str) -> Exchange | None:
        with self._lock:
            recorded, number = self._by_key.get(key, []), self._next[key]
            if number >= len(recorded) and not (self.repeat and recorded):
                return None
            self._next[key] += 1
            self.replayed += 1
            return recorded[min(number, len(recorded) - 1)]

    def _record(self, key: str, call: Call, proceed: Callable[[], Any]) -> Any:
        import dspy

        try:
            reply = proceed()
        except dspy.LMInvalidRequestError as e:
            # What the provider says of the request itself it will say again; an outage is not worth keeping.
            told = {"type": type(e).__name__, "message": without_secrets(e.message), "status": e.status}
            self._write(key, call, error=told)
            raise
        self._write(key, call, reply=without_secrets(reply))
        return reply

    def _write(self, key: str, call: Call, **outcome: Any) -> None:
        import dspy

        exchange = {
            "v": _FORMAT,
            "key": key,
            "model": call.name,
            "request": redact(call.arguments),
            **outcome,
            "recorded_at": clock.utc().isoformat(),
            "dspy": dspy.__version__,
            "adapter": type(dspy.settings.adapter or dspy.ChatAdapter()).__name__.removeprefix("Repairing"),
        }
        line = orjson.dumps(exchange, option=orjson.OPT_APPEND_NEWLINE)
        with self._lock:
            assert self._file is not None
            self._file.write(line)
            self._file.flush()
            self.recorded += 1

    def _missing(self, key: str, call: Call) -> RecordingMissing:
        if recorded := self._by_key.get(key):
            what = f"{call.name} was asked this {len(recorded) + 1} times, and it was recorded {len(recorded)} times"
            return RecordingMissing(self.path, call.name, f"{what} (`repeat=True` gives the last one again)", [])
        asked = redact(call.arguments)
        near = _nearest(asked, [e for found in self._by_key.values() for e in found])
        if near is None:
            return RecordingMissing(self.path, call.name, "the cassette is empty", [])
        what = (
            f"no recording of this request to {call.name}; the nearest is of {near['recorded_at'][:16]} and differs in"
        )
        return RecordingMissing(self.path, call.name, what, differences(near["request"], asked))


class _Nothing:
    """Stands for a key that is not there, which is not the same as null."""

    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def read_cassette(path: Path) -> list[Exchange]:
    """The exchanges of a cassette.

    Raises:
        DataError: it is not there, or a line of it is damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise DataError(f"cannot read the cassette {path}: {e.strerror}; record it with mode='record'") from e
    exchanges = []
    for number, line in enumerate(lines, 1):
        exchange = None
        with suppress(orjson.JSONDecodeError):
            exchange = orjson.loads(line)
        if not isinstance(exchange, dict) or not {"key", "model", "request", "recorded_at"} <= exchange.keys():
            raise DataError(f"{path}:{number}: no exchange of a cassette; remove the line or record the cassette anew")
        if exchange.get("v") != _FORMAT:
            raise DataError(f"{path}:{number}: format {exchange.get('v')!r}, expected {_FORMAT}; record it anew")
        exchanges.append(exchange)
    return exchanges


def _ends_a_line(path: Path) -> bool:
    """Whether what is appended to a file begins a line."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _given_back(exchange: Exchange) -> Any:
    import dspy

    if "error" not in exchange:
        return exchange["reply"]
    error = exchange["error"]
    kind = getattr(dspy, error["type"], dspy.LMInvalidRequestError)
    raise kind(message=error["message"], model=exchange["model"], status=error["status"])


def _nearest(asked: dict[str, Any], recorded: list[Exchange]) -> Exchange | None:
    """The recording most like what is asked; those of the same model first."""
    same = [e for e in recorded if e["model"] == asked.get("model")] or recorded
    text = json.dumps(asked, sort_keys=True)

    def likeness(exchange: Exchange) -> float:
        return difflib.SequenceMatcher(None, text, json.dumps(exchange["request"], sort_keys=True)).quick_ratio()

    return max(same[-_COMPARED:], key=likeness, default=None)


def differences(recorded: Any, asked: Any, where: str = "") -> list[str]:
    """One line per place in which two JSON-able values differ."""
    if json.dumps(recorded, default=repr) == json.dumps(asked, default=repr):
        return []
    if isinstance(recorded, dict) and isinstance(asked, dict):
        keys = sorted({*recorded, *asked})
        return [
            line
            for key in keys
            for line in differences(recorded.get(key, _NOTHING), asked.get(key, _NOTHING), f"{where}.{key}".lstrip("."))
        ]
    if isinstance(recorded, list) and isinstance(asked, list) and len(recorded) == len(asked):
        pairs = enumerate(zip(recorded, asked, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    if isinstance(recorded, list) and isinstance(asked, list):
        return [f"{where}: recorded {len(recorded)} of them, asked {len(asked)}"]
    if isinstance(recorded, str) and isinstance(asked, str):
        at = next((i for i, (a, b) in enumerate(zip(recorded, asked, strict=False)) if a != b), None)
        at = min(len(recorded), len(asked)) if at is None else at
        start = max(0, at - 10)
        return [f"{where}: recorded …{recorded[start : at + _SHOWN]!r}, asked …{asked[start : at + _SHOWN]!r}"]
    return [f"{where}: recorded {recorded!r}, asked {asked!r}"]
