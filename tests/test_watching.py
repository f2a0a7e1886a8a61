"""The runner that lives: what it tries, what it does not try again, what it says, and how it stops."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow.exceptions import MlflowException
from releases import CASES, COLOURS, store  # noqa: F401  (a fixture)

from agentkit.errors import BudgetExceeded, UsageError
from agentkit.examples import Example, write_examples
from agentkit_pipelines import cli, watching
from agentkit_tracking import registry
from agentkit_tracking.home import connect
from agentkit_tracking.production import current
from agentkit_tracking.registry import Version

ONE = Version("colours", 1, "a" * 64)
THRESHOLDS = "system: colours\nconfidence: 0.95\nrules:\n  - {metric: success, at_least: 0.75}\n"


class Rounds:
    """Plays rounds, each a change of the world before the runner looks; after the last it is told to stop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Version] = [ONE]
        self.production: Version | None = None
        self.error: Exception | None = None
        self.tried: list[int] = []  # rounds, from 0
        self.said: list[str] = []
        self.served = 0  # notebooks
        monkeypatch.setattr(watching, "WarmKernels", lambda: contextlib.nullcontext(self))
        monkeypatch.setattr(watching, "candidates", self._look)
        monkeypatch.setattr(watching, "current", lambda _: self.production)

    def __call__(self, *changes: Callable[[], object], promote: Callable[..., object] | None = None) -> None:
        self._changes, self._round = changes, -1
        watching.keep_promoting(promote or self._promote, 0.01, self.said.append)

    def _look(self) -> list[Version]:
        self._round += 1
        if self._round == len(self._changes):
            os.kill(os.getpid(), signal.SIGTERM)
        self._changes[self._round]()
        return self.asked

    def _promote(self, one: str, say: Callable[[str], None]) -> None:
        assert one == "colours/1"
        self.tried.append(self._round)
        if self.error is not None:
            raise self.error


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(monkeypatch)


def nothing() -> None:
    pass


def test_an_evaluation_that_broke_is_not_paid_for_again_until_something_changed(rounds: Rounds) -> None:
    rounds.error = BudgetExceeded("usd", 1.0, 1.0, 0.0)
    rounds(
        nothing, nothing,
        lambda: rounds.asked.clear(), lambda: rounds.asked.append(ONE), nothing,
        lambda: setattr(rounds, "production", Version("colours", 2, "b" * 64)), nothing,
    )  # fmt: skip
    assert rounds.tried == [0, 3, 5]
    assert any(s.endswith("tried again when its alias is set anew or production changes") for s in rounds.said)


def test_wrong_use_is_said_once_and_looked_at_every_round(rounds: Rounds) -> None:
    rounds.error = UsageError("no thresholds for colours")
    rounds(nothing, nothing, nothing)
    assert rounds.tried == [0, 1, 2]
    assert rounds.said.count("colours/1: no thresholds for colours") == 1


def test_a_store_that_is_away_for_a_while_is_said_and_no_end(rounds: Rounds) -> None:
    def away() -> None:
        raise MlflowException("the server is away")

    rounds(away, away, nothing)
    assert (rounds.tried, [s for s in rounds.said if "away" in s]) == ([2], ["cannot look: the server is away"])


def test_what_is_news_again_is_said_again(rounds: Rounds) -> None:
    texts = ["already judged", "already judged", "promoted", "already judged"]
    rounds(*[nothing] * 4, promote=lambda _, say: say(texts.pop(0)))
    assert rounds.said[1:-1] == ["already judged", "promoted", "already judged"]


def test_told_to_stop_it_gives_up_an_evaluation_but_finishes_what_it_writes(rounds: Rounds) -> None:
    done = []

    def promote(*_: object) -> None:
        rounds.served += len(done)  # in the second game the evaluation has ended
        os.kill(os.getpid(), signal.SIGINT)
        done.append("written")

    rounds(nothing, nothing, promote=promote)
    assert (done, rounds.said[-1]) == ([], "stopped")
    done.append("evaluated")
    rounds(nothing, nothing, promote=promote)
    assert (done, rounds.said[-1]) == (["evaluated", "written"], "stopped")


def test_watching_one_reference_is_wrong_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["agentkit", "promote", "colours", "--watch", "5"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "give --candidates, too" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_promotes_what_is_asked_for_and_ends_clean_on_sigterm(store: Path, project: Path) -> None:  # noqa: F811
    (project / "thresholds").mkdir()
    (project / "thresholds" / "colours.yaml").write_text(THRESHOLDS)
    (project / "data" / "colours").mkdir(parents=True)
    cases = [
        Example(id=f"{i:02}", inputs={"text": text}, expected={"label": label}, task_type="t")
        for i, (text, label) in enumerate(CASES)
    ]
    write_examples(project / "data" / "colours" / "golden.jsonl", cases)
    (project / "colours.py").write_text(COLOURS)
    registry.register_file("colours.py")
    command = [
        sys.executable,
        "-m",
        "agentkit_pipelines.cli",
        "promote",
        "--candidates",
        "--watch",
        "1",
        "--repeats",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as runner:
        assert runner.stdout.readline().startswith("looking for the alias `candidate` every 1 s")
        connect().set_registered_model_alias("colours", "candidate", "1")
        deadline = time.monotonic() + 200
        while current("colours") is None and time.monotonic() < deadline and runner.poll() is None:
            time.sleep(0.2)
        kernels = psutil.Process(runner.pid).children()
        runner.send_signal(signal.SIGTERM)
        out, err = runner.communicate(timeout=60)
    assert (runner.returncode, out.splitlines()[-1]) == (0, "stopped"), err
    assert "colours/1 is now colours@production" in out
    assert kernels
    assert not any(k.is_running() for k in kernels)
