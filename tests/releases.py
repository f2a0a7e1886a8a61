"""For the tests of releases: a blank MLflow store that costs nothing to set up, and small systems to put into it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from agentkit_pipelines.recording import Evaluation
    from agentkit_tracking.registry import Version
    from agentkit_tracking.statements import Evidence

COLOURS = '''
from typing import Literal

import agentkit as ak
import dspy


class Colour(dspy.Signature):
    """Say whether a text is about something warm or something cold.

    - warm: red, orange, sun, fire, desert, lava
    - cold: blue, ice, sea, snow, winter, frost
    """

    text: str = dspy.InputField()
    label: Literal["warm", "cold"] = dspy.OutputField()
    confidence: float = dspy.OutputField()


def success(example, prediction, trace=None):
    return prediction.label == example["label"]


def system() -> ak.System:
    return ak.adopt(dspy.Predict(Colour), name="colours", success=success)
'''
SHOUT = '''
import agentkit as ak


def shout(text: str) -> dict:
    """Upper case."""
    return {"text": text.upper()}


def success(example, prediction, trace=None) -> bool:
    return prediction.text == example.expected_text


system = ak.adopt(shout, name="shout", success=success)
'''
WORDS = {"warm": ("red", "orange", "sun", "fire", "desert", "lava"), "cold": ("blue", "ice", "sea", "snow", "frost")}
CASES = [
    (f"look at the {word} {place}", label)
    for label, words in WORDS.items()
    for word in words
    for place in ["here", "there", "up", "down"]
]

THRESHOLDS = """
system: colours
confidence: 0.95
rules:
  - {metric: success, at_least: 0.75}
  - {metric: success, margin: 0.1, versus: production}
"""


@functools.cache
def _blank() -> Path:
    """An MLflow database with all its tables; creating them takes most of a second."""
    from agentkit_tracking.home import connect

    folder = Path(tempfile.mkdtemp(prefix="agentkit-blank-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    given, os.environ["AGENTKIT_HOME"] = os.environ.get("AGENTKIT_HOME"), str(folder)
    try:
        connect()
    finally:
        if given is None:
            del os.environ["AGENTKIT_HOME"]
        else:
            os.environ["AGENTKIT_HOME"] = given
    return folder / "mlflow.db"


def furnish(home: Path) -> Path:
    """Put a blank store into a home."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(_blank(), home / "mlflow.db")
    return home


@pytest.fixture
def store(own_home: Path) -> Path:
    """The test's home, with a blank MLflow store."""
    return furnish(own_home)


def python(script: str, *arguments: str | Path, timeout: float = 120, **environment: str) -> str:
    """Run a script in a process of its own, which can import the tests' modules; returns what it printed."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def judged(version: Version, proof: Evidence | None = None) -> Evaluation:
    """A version with a signed evaluation that passed against what is in production, as a holder of the key can make it.

    `proof` is real evidence to take over; else it is made of hashes of nothing, in a run of its own.
    """
    import polars as pl

    from agentkit_pipelines.recording import Evaluation, _signed
    from agentkit_tracking.home import connect, experiment_id
    from agentkit_tracking.keys import signing_key
    from agentkit_tracking.production import current
    from agentkit_tracking.rules import EVALUATION, VERDICT
    from agentkit_tracking.statements import Evidence

    client, production = connect(), current(version.name)
    compared = production.release_id if production and production.release_id != version.release_id else None
    if proof is None:
        run = client.create_run(experiment_id(version.name)).info.run_id
        names = ("sha256", "verdict_file", "results", "notebook", "thresholds", "golden")
        proof = Evidence(verdict="pass", run=run, compared_with=None, **dict.fromkeys(names, "0" * 64))
    proof = proof.model_copy(update={"compared_with": compared})
    signed = _signed(version, proof, version.description, signing_key())
    client.set_model_version_tag(version.name, str(version.number), EVALUATION, signed)
    client.set_model_version_tag(version.name, str(version.number), VERDICT, "pass")
    return Evaluation(version, Path(), pl.DataFrame(), None, production, proof.run, 1, {}, proof)


def put_in_production(version: Version) -> None:
    """Promote a version by a signature alone, where a test is not about the evidence."""
    from agentkit_pipelines import promotion
    from agentkit_tracking.keys import signing_key

    promotion.commit(judged(version), signing_key())


def finished(folder: Path, version: str) -> Evaluation:
    """An evaluation that has run, rebuilt from the files it left and what was signed; so that no kernel is needed."""
    import polars as pl

    from agentkit_pipelines.gate import Verdict
    from agentkit_pipelines.recording import Evaluation
    from agentkit_tracking import registry
    from agentkit_tracking.production import current, evaluation_of

    found = registry.resolve(version)
    signed = evaluation_of(found)
    assert signed is not None
    return Evaluation(
        version=found,
        folder=folder,
        results=pl.read_parquet(folder / "results.parquet"),
        verdict=Verdict.model_validate_json((folder / "verdict.json").read_bytes()),
        production=current(found.name),
        run_id=signed.statement.evidence.run,
        attempts=1,
        evidence=json.loads((folder / "evidence.json").read_text()),
        proof=signed.statement.evidence,
    )
