"""Keeps what an evaluation left: all of it in one MLflow run, its hashes signed, the verdict on the version.

What `promotion.py` does on the verdict `pass` rests on the hashes signed here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from agentkit.examples import sha256_of
from agentkit_pipelines import report
from agentkit_pipelines.gate import Verdict
from agentkit_pipelines.notebook_runner import NotebookFailed
from agentkit_tracking.history import DESCRIPTION_LIMIT
from agentkit_tracking.home import connect, experiment_id
from agentkit_tracking.keys import SigningKey
from agentkit_tracking.registry import Version
from agentkit_tracking.rules import EVALUATION, TAG, VERDICT
from agentkit_tracking.statements import Evaluation as SignedEvaluation
from agentkit_tracking.statements import Evidence, sign, signer

Say = Callable[[str], None]
_RELEASE = "### Release "
_TOLD = ("cases", "repeats", "seed", "model", "exercised", "deterministic")
RESULTS, PRODUCTION_RESULTS, VERDICT_FILE, SETTINGS = (
    "results.parquet",
    "production.parquet",
    "verdict.json",
    "settings.json",
)
EVIDENCE, THRESHOLDS, NOTEBOOK, SIGNED = "evidence.json", "thresholds.yaml", "evaluate.ipynb", "evaluation.dsse.json"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation. `verdict` is None where there were no thresholds; `production` is what it was compared to."""

    version: Version
    folder: Path
    results: pl.DataFrame
    verdict: Verdict | None
    production: Version | None
    run_id: str
    attempts: int
    evidence: dict[str, Any]
    proof: Evidence | None = None  # what is signed of it


def download(run_id: str) -> Path:
    """The evidence folder of an evaluation, fetched from its MLflow run."""
    connect()
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="evidence"))


def record(
    version: Version,
    output: Path,
    notebook: Path,
    compared: Version | None,
    verdict: Verdict | None,
    own: dict[str, str | None],
    key: SigningKey | None,
    say: Say,
) -> Evaluation:
    """Everything into one MLflow run: metrics in one batch, plots, per-case table, executed notebook, evidence.

    The run is sealed when it ends: a guarded server lets nothing of it be changed after.
    """
    from mlflow.entities import Metric, Param, RunTag

    client = connect()
    results = pl.read_parquet(output / RESULTS)
    told = json.loads((output / SETTINGS).read_text())
    settings = {name: told[name] for name in _TOLD} | own  # what the kernel says, of what only it knows
    experiment, content = experiment_id(version.name), str(own["golden_content"])
    attempts = _count_attempts(experiment, content) + 1
    files = {
        "results": RESULTS,
        "production_results": PRODUCTION_RESULTS,
        "verdict": VERDICT_FILE,
        "notebook": notebook.name,
    }
    evidence = {
        "system": version.name,
        "version": version.number,
        "release": version.release_id,
        "compared_with": compared.release_id if compared else None,
        "verdict": verdict.verdict if verdict else None,
        "attempt": attempts,
        **{f"{name}_sha256": sha256_of(output / f) if (output / f).is_file() else None for name, f in files.items()},
        **settings,
    }
    (output / EVIDENCE).write_text(json.dumps(evidence, indent=2, sort_keys=True))
    tags = {
        f"{TAG}kind": "evaluation",
        f"{TAG}release": version.release_id,
        f"{TAG}version": str(version.number),
        f"{TAG}golden": content,
        f"{TAG}verdict": verdict.verdict if verdict else "none",
        f"{TAG}attempt": str(attempts),
    }
    text = report.verdict_text(verdict, attempts) if verdict else None
    if text is not None:
        tags["mlflow.note.content"] = text
    run_id = client.create_run(experiment, run_name=f"evaluate v{version.number}", tags=tags).info.run_id
    now = int(datetime.now(UTC).timestamp() * 1000)
    figures = report.as_metrics(report.summarise(results))
    metrics = [Metric(k, v, now, 0, model_id=version.model_id, run_id=run_id) for k, v in figures.items()]
    params = [Param(k, str(v)) for k, v in settings.items() if k != "exercised"]
    client.log_batch(run_id, metrics=metrics, params=params, tags=[RunTag(k, v) for k, v in tags.items()])
    description = _described(text, version)
    proof = None if verdict is None else _proof(output, evidence, run_id)
    signed = None if key is None or proof is None else _signed(version, proof, description, key)
    if signed is not None:
        (output / SIGNED).write_text(signed)
    client.log_artifacts(run_id, str(output), "evidence")
    _log_cases(run_id, results)
    client.set_terminated(run_id, "FINISHED")
    if signed is not None and verdict is not None:  # a look at another set, or an unsigned one, is no evidence
        _show(version, signed, verdict, description, say)
    return Evaluation(version, output, results, verdict, compared, run_id, attempts, evidence, proof)


def _proof(output: Path, evidence: dict[str, Any], run_id: str) -> Evidence:
    """What is signed of the evidence: its hashes."""
    return Evidence(
        sha256=sha256_of(output / EVIDENCE),
        verdict=evidence["verdict"],
        verdict_file=evidence["verdict_sha256"],
        results=evidence["results_sha256"],
        notebook=evidence["notebook_sha256"],
        thresholds=evidence["thresholds_sha256"],
        golden=evidence["golden_sha256"],
        run=run_id,
        compared_with=evidence["compared_with"],
    )


def _signed(version: Version, proof: Evidence, description: str, key: SigningKey) -> str:
    said = SignedEvaluation(
        system=version.name,
        release=version.release_id,
        time=datetime.now(UTC),
        signer=signer(key),
        version=version.number,
        evidence=proof,
        description=hashlib.sha256(description.encode()).hexdigest(),
    )
    return sign(said, key)


def _show(version: Version, signed: str, verdict: Verdict, description: str, say: Say) -> None:
    """Put the signed verdict where people look: tags and description of the version."""
    from mlflow.exceptions import MlflowException

    client, number = connect(), str(version.number)
    try:
        client.set_model_version_tag(version.name, number, EVALUATION, signed)
        client.set_model_version_tag(version.name, number, VERDICT, verdict.verdict)
        client.update_model_version(version.name, number, description)
    except MlflowException as e:
        if e.error_code != "PERMISSION_DENIED":
            raise
        say(f"the server does not show the verdict on {version}: {e}")


def _described(gate: str | None, version: Version) -> str:
    """The version's description: the last verdict above what the release is."""
    release = version.description[version.description.find(_RELEASE) :] if _RELEASE in version.description else ""
    room = DESCRIPTION_LIMIT - len(release) - 2
    return "\n\n".join(filter(None, [(gate or "").strip()[:room], release.strip()]))


def _log_cases(run_id: str, results: pl.DataFrame) -> None:
    """Per-case outcomes where the UI's run comparison shows them; ids and outcomes, never the case's text."""
    shown = [
        "case_id",
        "repeat",
        "task_type",
        "state",
        "route",
        *report.metric_names(results),
        "confidence",
        "latency_s",
    ]
    client, rows = connect(), results.select(shown)
    # What `log_table` writes, which would go through pandas: a split table, and the tag by which the UI finds it.
    client.log_dict(run_id, {"columns": shown, "data": [list(r) for r in rows.iter_rows()]}, "cases.json")
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": "cases.json", "type": "table"}]))


def record_failure(version: Version, error: NotebookFailed, content: str) -> None:
    """An evaluation that broke is kept, too, and was an attempt."""
    client = connect()
    tags = {
        f"{TAG}kind": "evaluation",
        f"{TAG}version": str(version.number),
        f"{TAG}golden": content,
        f"{TAG}verdict": "crash",
    }
    run = client.create_run(experiment_id(version.name), run_name=f"evaluate v{version.number}", tags=tags)
    client.log_artifacts(run.info.run_id, str(error.notebook.parent), "evidence")
    client.set_terminated(run.info.run_id, "FAILED")


def _count_attempts(experiment: str, content: str) -> int:
    query = f"tags.`{TAG}kind` = 'evaluation' and tags.`{TAG}golden` = '{content}'"
    return len(connect().search_runs([experiment], query, max_results=10_000))
