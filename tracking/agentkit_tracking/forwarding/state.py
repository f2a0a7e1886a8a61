"""How far a consumer is, kept beside the log: `consumers/<name>.json`, written whole once a target has taken what came before."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from agentkit.errors import UsageError
from agentkit_tracking.forwarding.reading import Mark
from agentkit_tracking.home import write_whole


@dataclass
class State:
    """What a consumer has behind it.

    `marks` says how far each segment is read; `again` the runs that the target did not take, with how often they were tried;
    `waiting` feedback on runs that have not ended, with the time it was first met (seconds since 1970); `everywhere`: runs that other
    machines folded into a database shared with them are forwarded, too.
    """

    target: str
    marks: dict[str, Mark] = field(default_factory=dict)
    again: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, float] = field(default_factory=dict)
    everywhere: bool = False


class StateFile:
    """Reads and writes the state of the consumer `name` of the log in `folder`."""

    def __init__(self, folder: Path, name: str, target: str) -> None:
        self.folder, self.name, self.target = folder / "consumers", name, target
        self.path = self.folder / f"{name}.json"
        self.refused_path = self.folder / f"{name}.refused.jsonl"
        self._written: bytes | None = None

    def load(self) -> State:
        """The state; at the very beginning where there is none, or none that makes sense: then all is forwarded again.

        Raises:
            UsageError: this process may not read or write it; all would be forwarded again and again.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as e:
            raise UsageError(
                f"{self.path}, which says how far forwarding is, cannot be read ({e.strerror}); make it a file that "
                "this user can read, or delete it: then the whole log is forwarded again"
            ) from e
        if self.folder.exists() and not os.access(self.folder, os.W_OK):
            raise UsageError(
                f"{self.folder}, where it is kept how far forwarding is, cannot be written; make it writable for this "
                "user, or forward where it is"
            )
        try:
            state = self._state(orjson.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError):
            self._written = None
            return State(self.target)
        self._written = content
        return state

    def _state(self, values: dict[str, Any]) -> State:
        marks = {name: Mark(*mark) for name, mark in values["segments"].items()}
        again, waiting = dict(values["again"]), dict(values["waiting"])
        if not all(type(n) is int for n in (*again.values(), *itertools.chain(*marks.values()))):
            raise TypeError("numbers were expected")
        return State(
            self.target, marks, again, {n: float(since) for n, since in waiting.items()}, bool(values["everywhere"])
        )

    def save(self, state: State) -> None:
        """Keep the state."""
        marks = {name: [*mark] for name, mark in state.marks.items()}
        values = {
            "target": state.target,
            "segments": marks,
            "again": state.again,
            "waiting": state.waiting,
            "everywhere": state.everywhere,
        }
        content = orjson.dumps(values)
        if content != self._written:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, content)
            self._written = content

    def is_mine(self) -> bool:
        """Whether the file is as it was last read or written here."""
        try:
            return self.path.read_bytes() == self._written
        except FileNotFoundError:
            return self._written is None
        except OSError:  # `load` says why
            return False

    def forget(self) -> None:
        """Begin anew: everything the log has is forwarded again, what other machines folded included."""
        self.save(State(self.target, everywhere=True))

    def refuse(self, what: dict[str, Any]) -> None:
        """Note what the target refused for good."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.refused_path, "ab") as file:
            file.write(orjson.dumps(what) + b"\n")
