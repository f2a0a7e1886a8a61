"""How far a consumer is, kept beside the log: `consumers/<name>.json`, written whole once a target has taken what came before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

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
        """The state; at the very beginning where there is none, or none that can be read: then all is forwarded again."""
        try:
            content = self.path.read_bytes()
            values: dict[str, Any] = orjson.loads(content)
            marks = {name: Mark(*mark) for name, mark in values["segments"].items()}
            state = State(
                self.target, marks, dict(values["again"]), dict(values["waiting"]), bool(values["everywhere"])
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            self._written = None
            return State(self.target)
        self._written = content
        return state

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

    def forget(self) -> None:
        """Begin anew: everything the log has is forwarded again, what other machines folded included."""
        self.save(State(self.target, everywhere=True))

    def refuse(self, what: dict[str, Any]) -> None:
        """Note what the target refused for good."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.refused_path, "ab") as file:
            file.write(orjson.dumps(what) + b"\n")
