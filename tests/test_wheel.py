"""The built wheel in an empty environment: a folder with one notebook and one golden set goes the whole road from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

PACKAGES = {"agentkit": "agentkit", "agentkit_tracking": "tracking", "agentkit_pipelines": "pipelines"}
NOT_SOURCE = shutil.ignore_patterns(".*_cache", ".venv", ".git", ".agentkit", ".hypothesis", "__pycache__", "*.pyc")

IMPORTS = """
from typing import Literal

import agentkit as ak
import dspy
"""
QUESTION = '''
class Question(dspy.Signature):
    """Say what a customer wants to know about a parcel.

    - whereabouts: where, late, tracking, arrive, lost
    - damage: broken, cracked, wet, torn, dented
    """

    text: str = dspy.InputField()
    topic: Literal["whereabouts", "damage"] = dspy.OutputField()
    confidence: float = dspy.OutputField()
'''
SYSTEM = """
def success(example, prediction, trace=None) -> bool:
    return prediction.topic == example.topic


def system() -> ak.System:
    return ak.adopt(dspy.Predict(Question), name="parcels", success=success)
"""
THRESHOLDS = """
system: parcels
confidence: 0.95
rules:
  - {metric: success, at_least: 0.75}
"""
EXPLORATION = """
%matplotlib inline
for text in ["my parcel is late", "a box of a customer named Ada Lovelace is torn"]:
    print(system().run(text=text).output)
raise SystemExit("exploration is no part of a release")
"""


def jupyter(folder: Path, *, explored: bool = False) -> Path:
    """`parcels.ipynb` with three cells tagged `agent` and one that is not; `explored`: saved after a look around."""
    shown = [{"name": "stdout", "output_type": "stream", "text": ["{'topic': 'damage', 'said': 'Ada Lovelace'}\n"]}]
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": ["# Parcels"]}]
    for text, tags in ((IMPORTS, ["agent"]), (QUESTION, ["agent"]), (EXPLORATION, []), (SYSTEM, ["agent", "wide"])):
        source = text.strip() + ("\n# once more" if explored and not tags else "")
        more = {"outputs": shown if explored else [], "execution_count": 7 if explored else None}
        cells.append(
            {"cell_type": "code", "metadata": {"tags": tags}, "source": source.splitlines(keepends=True), **more}
        )
    path = folder / "parcels.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}))
    return path


def marimo(folder: Path) -> Path:
    """The same as a marimo notebook, with an agent of its own instead of an adopted program."""
    blocks = [
        "import marimo\n\n__generated_with = '0.25.2'\napp = marimo.App()\n\nwith app.setup:",
        "\n".join(f"    {line}" for line in [*IMPORTS.strip().splitlines(), "from pydantic import BaseModel"]),
        f"\n\n@app.class_definition\n{QUESTION.strip()}\n",
        AGENT.strip(),
        "\n\n@app.cell\ndef _():\n    raise SystemExit('never run by a release')\n",
    ]
    path = folder / "parcels.py"
    path.write_text("\n".join(blocks))
    return path


AGENT = '''
@app.class_definition
class Topic(BaseModel):
    topic: str
    confidence: float


@app.class_definition
class Clerk(ak.Agent):
    """Reads what is asked and says the topic."""

    name, result = "clerk", Topic

    def __init__(self):
        super().__init__()
        self.read = dspy.Predict(Question)

    def plan(self, run, text: str):
        return self.read(text=text)

    def execute(self, run, plan, text: str):
        return None

    def reflect(self, run, plan, facts, text: str):
        return Topic(topic=plan.topic, confidence=plan.confidence)


@app.function
def success(example, prediction, trace=None) -> bool:
    return prediction.topic == example.topic


@app.function
def system() -> ak.System:
    return ak.System("parcels", [Clerk()], success=success)
'''


def golden(folder: Path) -> Path:
    """Forty cases, as a user writes them down."""
    phrases = {
        "whereabouts": ["where is", "late again:", "tracking says nothing about", "when will it arrive,", "lost:"],
        "damage": ["broken:", "a cracked", "wet inside,", "torn:", "dented:"],
    }
    texts = [
        (f"{phrase} {thing}", topic)
        for topic, some in phrases.items()
        for phrase in some
        for thing in ("my parcel", "the box", "order seven", "this package")
    ]
    lines = [
        {"id": f"p{i:02}", "inputs": {"text": text}, "expected": {"topic": topic}, "task_type": topic}
        for i, (text, topic) in enumerate(texts)
    ]
    path = folder / "golden.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- the wheel and its environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout and only what is in it counts."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = folder.glob("*.whl")
    return built


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds the wheel and what its metadata asks for, and nothing else."""

    folder: Path

    def run(self, cwd: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment as somebody who has nothing else: no settings, no home, no checkout."""
        env = {
            "PATH": os.pathsep.join([str(self.folder / "bin"), os.defpath]),
            "HOME": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # the dependencies are links to those of this environment
        }
        command = [self.folder / "bin" / program, *arguments]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Dependencies are linked from the running environment: installing them again takes a minute and an index."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-index"]
    done = subprocess.run([*pip, "--no-deps", wheel], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [site] = folder.glob("lib/python*/site-packages")
    [ours] = site.glob("agentkit_hedgehog-*.dist-info")
    todo, seen = needs(metadata.Distribution.at(ours)), set()
    while todo:
        if (one := todo.pop()) in seen:
            continue
        seen.add(one)
        distribution = metadata.distribution(one[0])
        todo |= needs(distribution, one[1])
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    return Environment(folder)


def needs(distribution: metadata.Distribution, extras: tuple[str, ...] = ()) -> set[tuple[str, tuple[str, ...]]]:
    """Name and extras of what a distribution requires here."""
    every = [Requirement(text) for text in distribution.requires or []]
    return {
        (one.name, tuple(sorted(one.extras)))
        for one in every
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    }


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = {Path(name).name: archive.read(name).decode() for name in set(archive.namelist()) - names}
    checkout = wheel.parent / "checkout"
    bases = {checkout / home if home != package else checkout for package, home in PACKAGES.items()}
    assert names == {
        file.relative_to(base).as_posix()
        for base in bases
        for package in PACKAGES
        for file in (base / package).rglob("*")
        if file.is_file()
    }
    assert {Path(name).suffix for name in names} <= {".py", ".typed", ".ipynb", ".yaml", ".json", ".md"}
    for name in ("notebooks/evaluate.ipynb", "notebooks/batch.ipynb", "thresholds/schema.json"):
        assert f"agentkit_pipelines/{name}" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert information["LICENSE"] == (ROOT / "LICENSE").read_text()
    assert set(information) == {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = ConfigParser(delimiters="=")
    found.optionxform = str  # as they are written
    found.read_string(information["entry_points.txt"])
    assert {name: dict(found[name]) for name in found.sections()} == {
        "console_scripts": project["scripts"],
        **project["entry-points"],
    }


def test_the_environment_holds_the_wheel_and_what_it_asks_for_and_no_checkout(environment, tmp_path):
    script = "\n".join(
        [
            "import importlib.util, sys",
            *(f"import {package}; print({package}.__file__)" for package in PACKAGES),
            "print(*(n for n in ('conftest', 'support_triage', 'pytest', 'hatchling') if importlib.util.find_spec(n)))",
            "print(*sys.path, sep=':')",
        ]
    )
    done = environment.run(tmp_path, "python", "-c", script)
    assert done.returncode == 0, done.stderr
    *files, others, path = done.stdout.splitlines()
    assert all(Path(file).is_relative_to(environment.folder) for file in files), files
    assert others == ""
    assert str(ROOT) not in path


# ---- the road


@dataclass(frozen=True)
class User:
    """Somebody who has installed the wheel, in a folder that holds a golden set and will hold a notebook."""

    environment: Environment
    folder: Path

    def agentkit(self, *arguments: str, code: int = 0) -> str:
        """What the command says, on both streams."""
        done = self.environment.run(self.folder, "agentkit", *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def user(environment: Environment, tmp_path: Path) -> User:
    folder = tmp_path / "mine"
    folder.mkdir()
    golden(folder)
    return User(environment, folder)


def test_a_jupyter_notebook_and_a_golden_set_in_an_empty_folder_go_the_whole_road(user):
    notebook = jupyter(user.folder)
    assert "registered parcels/1, release" in user.agentkit("register", notebook.name)
    assert {path.name for path in user.folder.iterdir()} == {".agentkit", "golden.jsonl", "parcels.ipynb"}

    evaluated = user.agentkit("evaluate", "parcels", "--repeats", "1")
    assert re.search(r"success +│ (0\.9\d*|1) ", evaluated), evaluated
    # A schedule does not set a bar of its own; the very first promotion by hand writes one to begin with, and says so.
    connected = user.agentkit("register", notebook.name, "--candidate")
    assert "unchanged" in connected
    assert "no thresholds for parcels: expected" in user.agentkit("promote", "--candidates", code=2)
    promoted = user.agentkit("promote", "parcels", "--repeats", "2")
    assert "no thresholds yet: thresholds/parcels.yaml was written to begin with" in promoted
    assert "parcels/1 is now parcels@production" in promoted
    assert "PASS · parcels/1 · attempt 2 on this golden set" in promoted
    (user.folder / "thresholds" / "parcels.yaml").rename(user.folder / "thresholds" / "parcles.yaml")
    assert "no thresholds for parcels: expected" in user.agentkit("promote", "parcels", code=2)  # never a lower bar
    assert "topic: whereabouts" in user.agentkit("run", "parcels@production", "my parcel is late")
    assert "there is nothing to go back to" in user.agentkit("rollback", "parcels", code=2)

    # To look around makes no other release, and what was looked at is in none: outputs may hold anybody's data.
    jupyter(user.folder, explored=True)
    assert "unchanged, already registered as parcels/1" in user.agentkit("register", notebook.name)
    [released] = (user.folder / ".agentkit" / "artifacts").glob("**/source/parcels.ipynb")
    text = released.read_text()
    assert ("class Question" in text, "exploration" in text, "Ada Lovelace" in text) == (True, False, False)


def test_a_marimo_notebook_and_a_golden_set_in_an_empty_folder_go_the_whole_road(user):
    assert "registered parcels/1, release" in user.agentkit("register", marimo(user.folder).name)
    (user.folder / "parcels.yaml").write_text(THRESHOLDS)
    promoted = user.agentkit("promote", "parcels", "--repeats", "2", "--thresholds", "parcels.yaml")
    assert "parcels/1 is now parcels@production" in promoted
    assert "topic: whereabouts" in user.agentkit("run", "parcels@production", "my parcel is late")
