"""For the tests of trust: a home in which releases were promoted, signed and all, made once and copied to each test."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import hashlib
import io
import json
import shutil
import sqlite3
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from releases import CASES, COLOURS, THRESHOLDS, furnish

if TYPE_CHECKING:
    from agentkit_pipelines.recording import Evaluation
    from agentkit_tracking.keys import SigningKey

# Says that it was executed, where a test asks for it.
MARKING = (
    COLOURS + "\n__import__('os').environ.get('MARKER') and open(__import__('os').environ['MARKER'], 'w').close()\n"
)
WARM = "warm: red, orange, sun, fire, desert, lava"


def source(version: int) -> str:
    """The source of a version: each has another prompt."""
    return MARKING.replace(WARM, f"{WARM}, {'ember ' * version}".strip())


@dataclass(frozen=True)
class Store:
    """A home with versions 1 and 2 of `colours` promoted in turn by Ada's local key, and 3 registered only."""

    home: Path

    @property
    def database(self) -> Path:
        """MLflow's SQLite file."""
        return self.home / "mlflow.db"

    @property
    def golden(self) -> Path:
        """The golden set that was used."""
        return self.home / "given" / "golden.jsonl"

    @property
    def thresholds(self) -> Path:
        """The thresholds that were used."""
        return self.home / "given" / "colours.yaml"

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Straight into the database, as somebody who has its password."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=30)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    def evaluate(self, reference: str, key: SigningKey | None = None) -> Evaluation:
        """`evidence.evaluate`, with the notebook's cells run in this process."""
        from agentkit_pipelines import evidence
        from agentkit_tracking import registry

        plan = evidence.Plan(registry.resolve(reference), self.golden, self.thresholds, repeats=1)
        with without_kernel():
            return evidence.evaluate(plan, key=key)

    def promote(self, reference: str, why: str = "the gate passed") -> Evaluation:
        """Evaluate and commit, signed with the key at hand."""
        from agentkit_pipelines import promotion
        from agentkit_tracking.keys import signing_key

        key = signing_key()
        done = self.evaluate(reference, key)
        assert done.verdict is not None
        assert done.verdict.verdict == "pass"
        promotion.commit(done, key, why=why)
        return done


def promoted(home: Path) -> Store:
    """Copy the prepared home to `home`, artifacts and all, so that a test may do to it whatever it likes."""
    prepared = _prepared()
    shutil.copytree(prepared, home, dirs_exist_ok=True)
    store = Store(home)
    places = {
        "experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location",
        "model_versions": "storage_location",
    }  # fmt: skip
    for table, column in places.items():  # MLflow keeps absolute addresses
        store.sql(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", str(prepared), str(home))
    for seen in (home / "seen").glob("*.json"):  # and what was seen belongs to a store's address
        seen.rename(seen.with_name(f"colours-{_address(home)}.json"))
    return store


def _address(home: Path) -> str:
    return hashlib.sha256(f"sqlite:///{home / 'mlflow.db'}".encode()).hexdigest()[:12]


@functools.cache
def _prepared() -> Path:
    from agentkit.examples import Example, write_examples
    from agentkit_tracking import registry

    folder = Path(tempfile.mkdtemp(prefix="agentkit-promoted-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = Store(furnish(folder / "home"))
    store.golden.parent.mkdir()
    store.thresholds.write_text(THRESHOLDS)
    (store.golden.parent / "pyproject.toml").write_text("")  # what is registered is a project of its own
    cases = [
        Example(id=f"{i:02}", inputs={"text": t}, expected={"label": a}, task_type="t")
        for i, (t, a) in enumerate(CASES)
    ]
    write_examples(store.golden, cases)
    with as_user(store.home, "Ada"):
        for version in (1, 2, 3):
            (store.golden.parent / "colours.py").write_text(source(version))
            registry.register_file(store.golden.parent / "colours.py")
        store.promote("colours/1")
        store.promote("colours/2")
    return store.home


@contextlib.contextmanager
def as_user(home: Path, author: str, **environment: str) -> Iterator[None]:
    """This process at another home, by another name."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "AGENTKIT_SIGNING_KEY",
            "AGENTKIT_SIGNING_KEY_FILE",
            "AGENTKIT_TRUST",
            "MLFLOW_TRACKING_URI",
            "MARKER",
        ):
            patch.delenv(name, raising=False)
        for name, value in {
            "AGENTKIT_HOME": str(home),
            "AGENTKIT_AUTHOR": author,
            "AGENTKIT_TRACES": "off",
            **environment,
        }.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def without_kernel() -> Iterator[None]:
    """Evaluations in this process: the same cells, without a kernel's start and without plots."""
    from agentkit_pipelines import evidence, verification

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "run_notebook", _run_cells)
        patch.setattr(verification, "run_notebook", _run_cells)
        yield


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


def agentkit(*arguments: str) -> Said:
    """The command line, as its entry point runs it."""
    from agentkit_pipelines import cli

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["agentkit", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


def _run_cells(name: str, parameters: Mapping[str, Any], output: Path, *_: Any) -> Path:
    from agentkit_pipelines.notebook_runner import NOTEBOOKS

    output.mkdir(parents=True, exist_ok=True)
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    given = {**parameters, "output": str(output)}
    notebook["metadata"]["papermill"] = {"parameters": given}
    display = types.SimpleNamespace(display=lambda *_: None)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setitem(sys.modules, "IPython.display", display)
        patch.setattr(gc, "freeze", lambda: None)  # which suits a process that is about to end
        scope: dict[str, Any] = {}
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and "report.plots" not in text:
                exec(compile(text, name, "exec"), scope)  # noqa: S102  (what a kernel would do)
            if "parameters" in cell["metadata"].get("tags", []):
                scope |= given
    executed = output / f"{name}.ipynb"
    executed.write_text(json.dumps(notebook))
    return executed
