"""The road of one version: evaluate, judge, and on `pass` move the alias; and the road back.

Order of writing on `pass`: evidence, then the previous production, then the model's alias (the one commit point), then
the prompt aliases, which only mirror it. A crash before the alias leaves the old production in force; a crash after
it leaves mirrors that the next promotion or `agentkit doctor --repair` sets right.
"""

from __future__ import annotations

import difflib
import getpass
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from agentkit.errors import BudgetExceeded, ReleaseError, UnknownReference, UsageError
from agentkit.examples import read_examples, sha256_of
from agentkit_pipelines import report
from agentkit_pipelines.evaluation import RESULT_COLUMNS
from agentkit_pipelines.gate import Verdict
from agentkit_pipelines.notebook_runner import NotebookFailed, Progress, run_notebook
from agentkit_pipelines.thresholds import COST_PER_SUCCESS, Thresholds, load_thresholds
from agentkit_tracking import registry
from agentkit_tracking.home import connect, experiment_id, home, project_root
from agentkit_tracking.manifest import MANIFEST, Manifest
from agentkit_tracking.registry import CANDIDATE, PRODUCTION, TAG, Version

Say = Callable[[str], None]
_STACK = f"{TAG}production_before"
_RELEASE, _HISTORY = "### Release ", "### History\n"
_RESULTS, _VERDICT, _SETTINGS, _EVIDENCE = "results.parquet", "verdict.json", "settings.json", "evidence.json"
_THRESHOLDS = "thresholds.yaml"


@dataclass(frozen=True)
class Plan:
    """What to evaluate, on what, against which bar."""

    version: Version
    golden: Path
    thresholds: Path | None
    repeats: int | None = None
    seed: int = 0
    workers: int | None = None
    max_usd: float | None = None


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


def find_golden(system: str, given: Path | None = None) -> Path:
    """The golden set: the file given, else `data/<system>/golden.jsonl`, else the only `data/*/golden.jsonl`.

    Raises:
        UsageError: there is none, or more than one.
    """
    if given is not None:
        return given
    data = project_root() / "data"
    if (own := data / system / "golden.jsonl").is_file():
        return own
    found = sorted(data.glob("*/golden.jsonl"))
    if len(found) != 1:
        raise UsageError(f"{len(found)} golden sets below {data}; name one with --golden FILE.jsonl")
    return found[0]


def find_thresholds(system: str, given: Path | None = None) -> Path:
    """The thresholds file: the one given, else `thresholds/<system>.yaml` in the project or beside this module.

    Raises:
        UsageError: there is none.
    """
    places = (
        [given] if given else [f / "thresholds" / f"{system}.yaml" for f in (project_root(), Path(__file__).parent)]
    )
    for place in places:
        if place.is_file():
            return place
    raise UsageError(f"no thresholds for {system}: expected {' or '.join(map(str, places))}; see pipelines/README.md")


# ---- evaluate


def evaluate(plan: Plan, *, progress: Progress | None = None, say: Say = lambda _: None) -> Evaluation:
    """Run the evaluate notebook in a kernel, then log everything to MLflow in bulk. Moves no alias.

    Raises:
        UsageError, DataError, ReleaseError: wrong input; found before a kernel starts.
        BudgetExceeded: `max_usd` was reached.
        NotebookFailed: a cell raised; the executed notebook is kept.
    """
    examples = read_examples(plan.golden)
    if unlabelled := [e.id for e in examples if not e.expected]:
        raise UsageError(f"{plan.golden}: {len(unlabelled)} cases have no expected values, e.g. {unlabelled[0]!r}")
    thresholds = None if plan.thresholds is None else load_thresholds(plan.thresholds)
    if thresholds is not None and thresholds.system != plan.version.name:
        raise UsageError(f"{plan.thresholds} is for {thresholds.system!r}, not for {plan.version.name!r}")
    folder, manifest = registry.fetch_version(plan.version)
    if manifest.spec["success"] is None:
        raise UsageError(f"{plan.version} names no success metric; register it with System(…, success=metric)")
    _check_metrics(thresholds, manifest)
    golden_sha256 = sha256_of(plan.golden)
    production = find_production(plan.version.name)
    compared = production if production is not None and production.release_id != plan.version.release_id else None
    output = _output_folder(plan.version)
    shutil.copy(folder / MANIFEST, output)
    bar = shutil.copy(plan.thresholds, output / _THRESHOLDS) if plan.thresholds else ""
    parameters: dict[str, Any] = {
        "version": str(folder),
        "golden": str(plan.golden.resolve()),
        "thresholds": str(bar),  # the copy, so that what was asked for is what the evidence holds
        "seed": plan.seed,
    }
    optional = {"repeats": plan.repeats, "workers": plan.workers, "max_usd": plan.max_usd}
    parameters |= {name: value for name, value in optional.items() if value is not None}
    if compared is not None and thresholds is not None:
        parameters |= _production_parameters(compared, plan)
    say(f"evaluating {plan.version} on {len(examples)} cases of {plan.golden.name}")
    try:
        notebook = run_notebook("evaluate", parameters, output, progress)
    except NotebookFailed as e:
        _log_failure(plan, e)
        if e.error_name == BudgetExceeded.__name__:
            raise BudgetExceeded("usd", plan.max_usd or 0.0, plan.max_usd or 0.0, 0.0) from e
        raise
    if sha256_of(plan.golden) != golden_sha256:
        raise UsageError(f"{plan.golden} changed while {plan.version} was evaluated on it; evaluate again")
    return _log(plan, output, notebook, compared)


def _check_metrics(thresholds: Thresholds | None, manifest: Manifest) -> None:
    """A rule about a metric that the system does not have is found before anything is run."""
    known = {"success", COST_PER_SUCCESS, *manifest.spec["metrics"], *RESULT_COLUMNS}
    if thresholds is not None and (unknown := [r.metric for r in thresholds.rules if r.metric not in known]):
        near = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"the thresholds name a metric {unknown[0]!r} that {manifest.system} does not have{hint}")


def _output_folder(version: Version) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    folder = home() / "evaluations" / f"{stamp}-{version.name}-{version.number}"
    folder.mkdir(parents=True)
    return folder


def _production_parameters(production: Version, plan: Plan) -> dict[str, str]:
    """Results of production on the same cases and seeds: those of its own promotion if they fit, else evaluated anew."""
    found = {"production": str(registry.fetch_version(production)[0])}
    kept = _download_evidence(production)
    if kept is not None:
        folder, evidence = kept
        same_set = evidence["golden_sha256"] == sha256_of(plan.golden) and evidence["seed"] == plan.seed
        if same_set and evidence["repeats"] == (plan.repeats or evidence["repeats"]) and evidence["deterministic"]:
            found["production_results"] = str(folder / _RESULTS)
    return found


def _download_evidence(version: Version) -> tuple[Path, dict[str, Any]] | None:
    """Folder and evidence of the version's last evaluation; None if there is none, or it is not whole."""
    import mlflow
    from mlflow.exceptions import MlflowException

    run_id = (version.tags or {}).get(f"{TAG}evaluation_run")
    if run_id is None:
        return None
    try:
        folder = Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="evidence"))
        evidence: dict[str, Any] = json.loads((folder / _EVIDENCE).read_text())
        is_whole = evidence["results_sha256"] == sha256_of(folder / _RESULTS)
    except (MlflowException, OSError, ValueError, KeyError):
        return None
    return (folder, evidence) if is_whole and evidence["release"] == version.release_id else None


def _log(plan: Plan, output: Path, notebook: Path, compared: Version | None) -> Evaluation:
    """Everything into one MLflow run: metrics in one batch, plots, per-case table, executed notebook, evidence."""
    from mlflow.entities import Metric, Param, RunTag

    client, version = connect(), plan.version
    results = pl.read_parquet(output / _RESULTS)
    verdict = _read_verdict(output)
    settings = json.loads((output / _SETTINGS).read_text())
    evidence = {
        "system": version.name,
        "version": version.number,
        "release": version.release_id,
        "compared_with": compared.release_id if compared else None,
        "verdict": verdict.verdict if verdict else None,
        "results_sha256": sha256_of(output / _RESULTS),
        "verdict_sha256": sha256_of(output / _VERDICT) if verdict else None,
        "notebook_sha256": sha256_of(notebook),
        **settings,
    }
    (output / _EVIDENCE).write_text(json.dumps(evidence, indent=2, sort_keys=True))
    experiment = experiment_id(version.name)
    attempts = _count_attempts(experiment, settings["golden_sha256"]) + 1
    tags = {
        f"{TAG}kind": "evaluation",
        f"{TAG}release": version.release_id,
        f"{TAG}version": str(version.number),
        f"{TAG}golden": settings["golden_sha256"],
        f"{TAG}verdict": verdict.verdict if verdict else "none",
        f"{TAG}attempt": str(attempts),
    }
    if verdict is not None:
        tags["mlflow.note.content"] = report.verdict_text(verdict, attempts)
    run = client.create_run(experiment, run_name=f"evaluate v{version.number}", tags=tags)
    now = int(datetime.now(UTC).timestamp() * 1000)
    figures = report.as_metrics(report.summarise(results))
    metrics = [Metric(k, v, now, 0, model_id=version.model_id, run_id=run.info.run_id) for k, v in figures.items()]
    params = [Param(k, str(v)) for k, v in settings.items() if k != "exercised"]
    client.log_batch(run.info.run_id, metrics=metrics, params=params, tags=[RunTag(k, v) for k, v in tags.items()])
    client.log_artifacts(run.info.run_id, str(output), "evidence")
    _log_cases(run.info.run_id, results)
    client.set_terminated(run.info.run_id, "FINISHED")
    if verdict is not None:  # a look at another set is no evidence
        number = str(version.number)
        client.set_model_version_tag(version.name, number, f"{TAG}last_verdict", verdict.verdict)
        client.set_model_version_tag(version.name, number, f"{TAG}evaluation_run", run.info.run_id)
        client.set_model_version_tag(version.name, number, f"{TAG}judged", _judged_by(plan, compared))
        _redescribe(version, gate=report.verdict_text(verdict, attempts))
    return Evaluation(version, output, results, verdict, compared, run.info.run_id, attempts, evidence)


def _read_verdict(output: Path) -> Verdict | None:
    path = output / _VERDICT
    return Verdict.model_validate_json(path.read_bytes()) if path.is_file() else None


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


def _log_failure(plan: Plan, error: NotebookFailed) -> None:
    """An evaluation that broke is kept, too."""
    client = connect()
    tags = {f"{TAG}kind": "evaluation", f"{TAG}version": str(plan.version.number), f"{TAG}verdict": "crash"}
    run = client.create_run(experiment_id(plan.version.name), run_name=f"evaluate v{plan.version.number}", tags=tags)
    client.log_artifacts(run.info.run_id, str(error.notebook.parent), "evidence")
    client.set_terminated(run.info.run_id, "FAILED")


def _count_attempts(experiment: str, golden_sha256: str) -> int:
    query = f"tags.`{TAG}kind` = 'evaluation' and tags.`{TAG}golden` = '{golden_sha256}'"
    return len(connect().search_runs([experiment], query, max_results=10_000))


# ---- promote


def promote(plan: Plan, *, progress: Progress | None = None, say: Say = lambda _: None) -> Evaluation:
    """Evaluate, judge, and on the verdict `pass` make the version production. Otherwise nothing moves.

    Raises:
        As `evaluate`, and ReleaseError when production changed while the evaluation ran.
    """
    if plan.thresholds is None:
        raise UsageError("a promotion needs thresholds")
    done = evaluate(plan, progress=progress, say=say)
    if done.verdict is None:
        raise ReleaseError("the evaluation left no verdict; nothing was promoted")
    if done.verdict.verdict == "pass":
        _commit(done, say)
    return done


def _commit(done: Evaluation, say: Say) -> None:
    registry.check_stored(done.version)
    with _one_at_a_time(done.version.name):
        _move(done, say)


def _move(done: Evaluation, say: Say) -> None:
    client, version = connect(), done.version
    before = find_production(version.name)
    if before is not None and before.release_id == version.release_id:
        say(f"{version} is in production already")
        _mirror_or_say(version, say)
        _clear_candidate(version)
        return
    if (before and before.release_id) != (done.production and done.production.release_id):
        raise ReleaseError(f"production of {version.name} changed while {version} was evaluated; promote it again")
    number = str(version.number)
    evidence = sha256_of(done.folder / _EVIDENCE)
    client.set_model_version_tag(version.name, number, f"{TAG}evidence", evidence)
    client.set_model_version_tag(version.name, number, f"{TAG}previous", str(before.number) if before else "none")
    _remember(version.name, [*_earlier(version.name, before), *([before.number] if before else [])])
    client.set_registered_model_alias(version.name, PRODUCTION, number)  # the commit point
    _note(version, "promoted", _who(), f"evidence {evidence[:12]}")
    _mirror_or_say(version, say)
    _clear_candidate(version)
    say(f"{version} is now {version.name}@{PRODUCTION}")


@contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """Promotions and rollbacks of one system from this home wait for each other."""
    path = home() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: one promotion at a time is up to the caller
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a kill
        yield


def _earlier(name: str, production: Version | None) -> list[int]:
    """The versions that were in production before the present one, oldest first.

    Written before the alias moves; the present one at the end is what a move that was cut off left there.
    """
    found = json.loads(connect().get_registered_model(name).tags.get(_STACK, "[]"))
    while found and production is not None and found[-1] == production.number:
        found.pop()
    return [int(number) for number in found]


def _remember(name: str, earlier: list[int]) -> None:
    connect().set_registered_model_tag(name, _STACK, json.dumps(earlier[-50:]))


def _clear_candidate(version: Version) -> None:
    """The wish is granted; one that was meanwhile made for another version stays."""
    if any(CANDIDATE in v.aliases and v.number == version.number for v in registry.versions(version.name)):
        connect().delete_registered_model_alias(version.name, CANDIDATE)


def mirrors_wrong(production: Version) -> dict[str, int | None]:
    """Prompts whose alias `production` is wrong, and the version it belongs to (None: the release has no such prompt)."""
    named = {name: None for v in registry.versions(production.name) for name in _prompts(v)}
    wanted: dict[str, int | None] = {**named, **_prompts(production)}
    return {name: number for name, number in wanted.items() if _prompt_in_production(name) != number}


def _prompts(version: Version) -> dict[str, int]:
    found = json.loads((version.tags or {}).get(f"{TAG}prompts", "{}")).values()
    return {p["name"]: int(p["version"]) for p in found}


def _prompt_in_production(name: str) -> int | None:
    from mlflow.exceptions import MlflowException

    try:
        return int(connect().get_prompt_version_by_alias(name, PRODUCTION).version)
    except MlflowException as e:
        if e.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):  # no such alias
            return None
        raise


def mirror_prompts(version: Version) -> int:
    """Point the prompts' production aliases at the version's prompts; returns how many were wrong.

    Also mends what a promotion or rollback that was cut off left behind.
    """
    wrong = mirrors_wrong(version)
    for name, number in wrong.items():
        if number is None:
            connect().delete_prompt_alias(name, PRODUCTION)
        else:
            connect().set_prompt_alias(name, PRODUCTION, number)
    return len(wrong)


def _mirror_or_say(version: Version, say: Say) -> None:
    """Mirror the prompts; a failure here undoes nothing, since the model's alias has moved already."""
    from mlflow.exceptions import MlflowException

    try:
        mirror_prompts(version)
    except MlflowException as e:
        say(f"{version} is in force, but its prompts' aliases are not mirrored ({e}); run agentkit doctor --repair")


def _judged_by(plan: Plan, production: Version | None) -> str:
    bar = sha256_of(plan.thresholds) if plan.thresholds else "none"
    return f"{sha256_of(plan.golden)} {bar} {production.release_id if production else 'none'}"


def judged_alike(plan: Plan) -> str | None:
    """The verdict, other than pass, that this version already has under the very same conditions; else None.

    A schedule that asks again and again would be given another chance each night.
    """
    tags = plan.version.tags or {}
    verdict = tags.get(f"{TAG}last_verdict")
    production = find_production(plan.version.name)
    alike = tags.get(f"{TAG}judged") == _judged_by(plan, production)
    return verdict if alike and verdict in ("fail", "inconclusive") else None


def candidates() -> list[Version]:
    """Every version that carries the alias `candidate`."""
    return [v for name in registry.systems() for v in registry.versions(name) if CANDIDATE in v.aliases]


def find_production(name: str) -> Version | None:
    """The version in production, or None."""
    return next((v for v in registry.versions(name) if PRODUCTION in v.aliases), None)


# ---- back


def rollback(name: str, *, why: str, who: str | None = None, say: Say = lambda _: None) -> tuple[Version, Version]:
    """Make the release that was production before the present one production again, whole.

    Returns:
        (the version left, the version now in force).

    Raises:
        ReleaseError: nothing is in production, there is no previous one, or it is not intact; nothing moved.
    """
    with _one_at_a_time(name):
        return _roll_back(name, why, who or _who(), say)


def _roll_back(name: str, why: str, who: str, say: Say) -> tuple[Version, Version]:
    current = find_production(name)
    if current is None:
        raise UnknownReference(f"{name} has no version in production; there is nothing to roll back")
    earlier = _earlier(name, current)
    if not earlier:
        raise UnknownReference(
            f"{current} was the first in production; there is nothing to go back to. Promote another version, or take "
            f"the alias away in the MLflow UI to stop it"
        )
    target = registry.resolve(f"{name}/{earlier[-1]}")
    registry.fetch_version(target)  # whole and unaltered, here and where others fetch it, before anything moves
    registry.check_stored(target)
    connect().set_registered_model_alias(name, PRODUCTION, str(target.number))
    _remember(name, earlier[:-1])
    _note(current, "rolled_back", who, why)
    _mirror_or_say(target, say)
    say(f"{name}@{PRODUCTION} is {target} again")
    return current, target


def _who() -> str:
    try:
        return os.environ.get("AGENTKIT_AUTHOR") or getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _note(version: Version, event: str, who: str, why: str) -> None:
    """Who, when and why, as a tag of the version and in its description."""
    client, number = connect(), str(version.number)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    said = json.dumps({"who": who, "when": when, "why": why})
    client.set_model_version_tag(version.name, number, f"{TAG}{event}", said)
    _redescribe(version, line=f"- {event.replace('_', ' ')} {when} by {who}: {' '.join(why.split())[:500]}")


def _redescribe(version: Version, gate: str | None = None, line: str | None = None) -> None:
    """Put the last verdict first and the history last in the version's description, which people read in the UI."""
    client, number = connect(), str(version.number)
    text = client.get_model_version(version.name, number).description or ""
    head, _, history = text.partition(_HISTORY)
    old_gate, mark, release = head.partition(_RELEASE)
    if not mark:  # nobody's but ours begins so; keep what a person wrote
        old_gate, release = "", head
    said = "\n\n".join(filter(None, [gate or old_gate.strip(), mark + release.strip()]))
    lines = [*history.strip().splitlines(), *([line] if line else [])]
    room = registry.DESCRIPTION_LIMIT - len(said) - len(f"\n\n{_HISTORY}\n")
    while lines and len("\n".join(lines)) > room:  # the oldest goes first
        lines.pop(0)
    text = "\n\n".join([said, f"{_HISTORY}\n" + "\n".join(lines)] if lines else [said])
    client.update_model_version(version.name, number, text[: registry.DESCRIPTION_LIMIT])
