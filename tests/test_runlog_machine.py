"""Writes, crashes, folds, reads and migrations in any order: the log holds what was acknowledged, in order, once."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentkit_tracking.runlog import RunLog, database, folding, migrations, unfolded
from agentkit_tracking.runlog.segments import START, frame


class Killed(BaseException):
    """Stands for the end of a process."""


class Machine(RuleBasedStateMachine):
    """One folder, several writers one after the other, and a model of what was acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "log"
        self.logs = [RunLog(self.folder) for _ in range(2)]
        self.written: list[list[str]] = [[], []]
        self.torn = 0
        self.number = 0

    def teardown(self) -> None:
        for log in self.logs:
            log.close()
        self.place.cleanup()

    @initialize(version=st.integers(0, migrations.NEWEST))
    def begin_with_an_older_schema(self, version: int) -> None:
        if version:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(database, "MIGRATIONS", {n: migrations.MIGRATIONS[n] for n in range(1, version + 1)})
                patch.setattr(database, "NEWEST", version)
                with self.logs[0].database.writing():
                    pass

    @rule(who=st.integers(0, 1), size=st.integers(1, 4), text=st.text(max_size=20))
    def write(self, who: int, size: int, text: str) -> None:
        names = [str(self.number + i) for i in range(size)]
        self.number += size
        self.logs[who].write([({"type": "x", "name": name}, {"inputs": text}) for name in names], sync=False)
        self.written[who] += names

    @rule(who=st.integers(0, 1))
    def close(self, who: int) -> None:
        self.logs[who].close()

    @rule(who=st.integers(0, 1), share=st.floats(0, 0.99))
    def writer_is_killed_in_the_middle_of_a_write(self, who: int, share: float) -> None:
        log = self.logs[who]
        segment = log._own()
        line, _ = frame({"id": f"{segment.id}-{segment._n}", "type": "x", "name": "torn"}, {}, START, b"0" * 32)
        os.write(segment._fd, line[: int(share * len(line))])  # type: ignore[arg-type]
        segment._abandon()
        self.logs[who] = RunLog(self.folder)

    @rule(who=st.integers(0, 1))
    def fold(self, who: int) -> None:
        folded = self.logs[who].fold()
        assert folded is not None
        assert (folded.findings, folded.busy) == ([], None)

    @rule(who=st.integers(0, 1), moment=st.sampled_from(["before", "within", "after"]))
    def folder_is_killed(self, who: int, moment: str) -> None:
        store = folding._store

        def killed(*_: Any, **__: Any) -> None:
            raise Killed

        def stored(*given: Any) -> None:
            if moment == "before":
                raise Killed
            store(*given)
            if moment == "within":
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folding, "_store", stored)
            patch.setattr(Path, "unlink", killed)
            with suppress(Killed):
                self.logs[who].fold()

    @precondition(lambda self: self.number > 0)
    @rule(limit=st.integers(1, 3))
    def fold_in_small_steps(self, limit: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folding, "BATCH", limit)
            patch.setattr(unfolded, "_CHUNK", 700)
            self.logs[0].fold()

    @invariant()
    def everything_acknowledged_is_there_once_and_in_order(self) -> None:
        rows = self.logs[0].sql("SELECT segment, n, name FROM events WHERE type = 'x' ORDER BY segment, n").rows()
        for names in self.written:
            mine = set(names)
            assert [name for _, _, name in rows if name in mine] == names
        assert len(rows) == sum(map(len, self.written))


Machine.TestCase.settings = settings(
    max_examples=1_000 if os.environ.get("AGENTKIT_SOAK") else 15,
    stateful_step_count=25,
    deadline=None,
)
TestRunLog = Machine.TestCase
