"""The evidence of one version: the evaluate notebook in a kernel, and the verdict on what it left. Moves nothing."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from agentkit.errors import BudgetExceeded, TrustError, UsageError
from agentkit.examples import Example, read_examples, sha256_of
from agentkit_pipelines.evaluation import RESULT_COLUMNS
from agentkit_pipelines.gate import Verdict, judge
from agentkit_pipelines.notebook_runner import NotebookFailed, Progress, run_notebook
from agentkit_pipelines.recording import (
    EVIDENCE,
    PRODUCTION_RESULTS,
    RESULTS,
    SETTINGS,
    THRESHOLDS,
    VERDICT_FILE,
    Evaluation,
    Say,
    download,
    record,
    record_failure,
)
from agentkit_pipelines.thresholds import COST_PER_SUCCESS, Thresholds, load_thresholds
from agentkit_tracking import registry
from agentkit_tracking.home import home, project_root
from agentkit_tracking.keys import SigningKey, load_trust, signing_key
from agentkit_tracking.loading import require_trusted
from agentkit_tracking.manifest import MANIFEST, Manifest
from agentkit_tracking.production import current, evaluation_of, history_of, prompt_checks
from agentkit_tracking.registry import Version
from agentkit_tracking.statements import check

_FIRST_THRESHOLDS = """\
system: {}
confidence: 0.95 # one-sided
rules:
  - {{metric: success, at_least: 0.5}} # of all runs
  - {{metric: success, margin: 0.1, versus: production}} # so much worse it may be, once there is a production
  - {{metric: task_failure, at_most: 0.1}}
"""


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
    trust: bool = False  # evaluate, that is execute, a version of another's store that nobody vouches for


def find_golden(system: str, given: Path | None = None) -> Path:
    """The golden set: the file given, else `data/<system>/golden.jsonl`, else the only `golden.jsonl` of the project.

    Raises:
        UsageError: there is none, or more than one.
    """
    if given is not None:
        return given
    root = project_root()
    if (own := root / "data" / system / "golden.jsonl").is_file():
        return own
    found = sorted([*root.glob("golden.jsonl"), *root.glob("data/*/golden.jsonl")])
    if len(found) != 1:
        raise UsageError(
            f"{len(found) or 'no'} golden sets: expected {own}, or one golden.jsonl in {root} or below its data; name "
            "one with --golden FILE.jsonl"
        )
    return found[0]


def find_thresholds(system: str, given: Path | None = None) -> Path:
    """The thresholds file: the one given, else `thresholds/<system>.yaml` in the project or beside this module.

    Raises:
        UsageError: there is none; holds a file to begin with.
    """
    places = (
        [given] if given else [f / "thresholds" / f"{system}.yaml" for f in (project_root(), Path(__file__).parent)]
    )
    for place in places:
        if place.is_file():
            return place
    raise UsageError(
        f"no thresholds for {system}: expected {places[0]}. What must a version prove before it is promoted? Set your own "
        f"limits before you look at the golden set's figures; a file to begin with:\n\n{_FIRST_THRESHOLDS.format(system)}"
    )


def first_thresholds(system: str) -> Path | None:
    """Write a file to begin with, for the very first promotion in a project that has no thresholds at all; else None.

    Never later: a file that is missing or misnamed must not be replaced by a lower bar.
    """
    place = project_root() / "thresholds" / f"{system}.yaml"
    if place.parent.exists() or history_of(system).entries:
        return None
    place.parent.mkdir()
    place.write_text(_FIRST_THRESHOLDS.format(system), encoding="utf-8")
    return place


# ---- evaluate


def evaluate(
    plan: Plan, *, progress: Progress | None = None, say: Say = lambda _: None, key: SigningKey | None = None
) -> Evaluation:
    """Run the evaluate notebook in a kernel, then log everything to MLflow in bulk, and sign it. Moves no alias.

    Args:
        key: signs what was found; default: `keys.signing_key()`, if there is one.

    Raises:
        UsageError, DataError, ReleaseError (TrustError: nobody vouches for it): wrong input; found before a kernel starts.
        BudgetExceeded: `max_usd` was reached.
        NotebookFailed: a cell raised; the executed notebook is kept.
    """
    examples = read_examples(plan.golden)
    if unlabelled := [e.id for e in examples if not e.expected]:
        raise UsageError(f"{plan.golden}: {len(unlabelled)} cases have no expected values, e.g. {unlabelled[0]!r}")
    thresholds = None if plan.thresholds is None else load_thresholds(plan.thresholds)
    if thresholds is not None and thresholds.system != plan.version.name:
        raise UsageError(f"{plan.thresholds} is for {thresholds.system!r}, not for {plan.version.name!r}")
    require_trusted(plan.version, plan.trust)
    folder, manifest = registry.fetch_version(plan.version)
    if manifest.spec["success"] is None:
        raise UsageError(f"{plan.version} names no success metric; register it with System(…, success=metric)")
    _check_metrics(thresholds, manifest)
    if problems := [c.problem for c in prompt_checks(plan.version, manifest) if c.problem]:
        raise TrustError(f"{plan.version} is not evaluated: {'; '.join(problems)}; register its source anew", problems)
    golden_sha256 = sha256_of(plan.golden)
    production = current(plan.version.name)
    compared = production if production is not None and production.release_id != plan.version.release_id else None
    if compared is not None:
        _check_genuine(compared)
    output = _output_folder(plan.version)
    shutil.copy(folder / MANIFEST, output)
    bar = shutil.copy(plan.thresholds, output / THRESHOLDS) if plan.thresholds else ""
    asked = Path(bar).read_bytes() if bar else b""
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
    digest = content_of(examples)
    try:
        notebook = run_notebook("evaluate", parameters, output, progress)
    except NotebookFailed as e:
        record_failure(plan.version, e, digest)
        if e.error_name == BudgetExceeded.__name__:
            raise BudgetExceeded("usd", plan.max_usd or 0.0, plan.max_usd or 0.0, 0.0) from e
        raise
    if sha256_of(plan.golden) != golden_sha256:
        raise UsageError(f"{plan.golden} changed while {plan.version} was evaluated on it; evaluate again")
    own = {"golden_sha256": golden_sha256, "thresholds_sha256": None, "golden_content": digest}
    verdict = None
    if thresholds is not None:
        (output / THRESHOLDS).write_bytes(asked)  # the kernel, which executes what the release holds, could write it
        own["thresholds_sha256"] = hashlib.sha256(asked).hexdigest()
        if load_thresholds(output / THRESHOLDS) != thresholds:  # what is judged by is what is kept
            raise UsageError(f"{plan.thresholds} changed while {plan.version} was evaluated; evaluate again")
        _check_rows(output, examples, plan.repeats, compared)
        verdict = _judge_again(output, parameters.get("production_results"))
    return record(plan.version, output, notebook, compared, verdict, own, key or _key(say) if thresholds else None, say)


def _check_rows(output: Path, examples: list[Example], repeats: int | None, compared: Version | None) -> None:
    """The kernel executes the release's own source: it must leave one row per case and repeat, and none out.

    Raises:
        TrustError: rows are missing, too many or of another task type, or so are the results of production as a whole;
            without these a rule `versus: production` would not apply.
    """
    did = json.loads((output / SETTINGS).read_text())["repeats"]
    if repeats and did != repeats:
        raise TrustError(f"the evaluation says {did!r} repeats, asked for were {repeats}; see {output}")
    asked = Counter((e.id, repeat, e.task_type) for e in examples for repeat in range(did))
    for name in (RESULTS, PRODUCTION_RESULTS):
        if name == PRODUCTION_RESULTS and (output / name).exists() is not (compared is not None):
            what = "left out" if compared else "made up"
            raise TrustError(f"the evaluation {what} the results of production, {name}; see {output}")
        if (output / name).exists():
            left = _rows(pl.read_parquet(output / name))
            if not asked or left != asked:
                missing, extra = (asked - left).total(), (left - asked).total()
                raise TrustError(
                    f"{name} has not one row per case of the golden set and repeat: {missing} missing, {extra} too many; "
                    f"see {output}"
                )


def _rows(results: pl.DataFrame) -> Counter[tuple[Any, ...]]:
    return Counter(results.select("case_id", "repeat", "task_type").rows())


def _judge_again(output: Path, kept: str | None) -> Verdict:
    """The verdict is given here: the kernel that also gave one executes the release's own source.

    Raises:
        TrustError: it gave another one, or compared with other results than it was given.
    """
    path, results = output / PRODUCTION_RESULTS, pl.read_parquet(output / RESULTS)
    before = pl.read_parquet(path) if path.is_file() else None
    given = pl.read_parquet(kept) if kept else None
    if given is not None and _rows(given) == _rows(results) and (before is None or not before.equals(given)):
        raise TrustError(f"the evaluation compared with other results of production than it was given; see {output}")
    exercised = frozenset(json.loads((output / SETTINGS).read_text())["exercised"])
    judged = judge(results, load_thresholds(output / THRESHOLDS), before, exercised)
    found = Verdict.model_validate_json(judged.model_dump_json())  # as the kernel's went
    path = output / VERDICT_FILE
    if not path.is_file() or Verdict.model_validate_json(path.read_bytes()) != found:
        raise TrustError(f"the verdict that the kernel left is not what its results give; see {output}")
    return found


def _key(say: Say) -> SigningKey | None:
    """The key to sign the evaluation with; without one it is kept all the same, but the version does not show it."""
    try:
        return signing_key()
    except UsageError as e:
        say(f"not signed, so the version will not show the verdict: {e}")
        return None


def content_of(examples: list[Example]) -> str:
    """SHA-256 of what cases say, whatever their order and the file's layout: what attempts are counted by."""
    lines = sorted(json.dumps([e.id, e.inputs, e.expected, e.task_type], sort_keys=True, default=str) for e in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_metrics(thresholds: Thresholds | None, manifest: Manifest) -> None:
    """A rule about a metric that the system does not have is found before anything is run."""
    known = {"success", COST_PER_SUCCESS, *manifest.spec["metrics"], *RESULT_COLUMNS}
    if thresholds is not None and (unknown := [r.metric for r in thresholds.rules if r.metric not in known]):
        near = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"the thresholds name a metric {unknown[0]!r} that {manifest.system} does not have{hint}")


def _check_genuine(production: Version) -> None:
    """Nothing is compared with what a forged entry or tag put into production: who writes the store would set the bar."""
    name, head = production.name, history_of(production.name).head
    if head is not None and head.problem:  # nothing of it is executed, either
        raise TrustError(
            f"the last entry of the history of {name} does not count: {head.problem}. Go back to what was signed with "
            f"`agentkit rollback {name}`, take it out with `agentkit withdraw {name}`, or promote the same version again"
        )
    if head is not None and head.move.release != production.release_id:
        raise TrustError(
            f"{production} says release {production.release_id[:12]}, signed was {head.move.release[:12]}; "
            f"see `agentkit verify {name}@production`"
        )


def _output_folder(version: Version) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    folder = home() / "evaluations" / f"{stamp}-{version.name}-{version.number}"
    folder.mkdir(parents=True)
    return folder


def _production_parameters(production: Version, plan: Plan) -> dict[str, str]:
    """Results of production on the same cases and seeds: those of its own promotion if they fit, else evaluated anew."""
    found = {"production": str(registry.fetch_version(production)[0])}
    kept = _promotion_results(production)
    if kept is not None:
        results, evidence = kept
        same_set = evidence["golden_sha256"] == sha256_of(plan.golden) and evidence["seed"] == plan.seed
        if same_set and evidence["repeats"] == (plan.repeats or evidence["repeats"]) and evidence["deterministic"]:
            found["production_results"] = str(results)
    return found


def _promotion_results(production: Version) -> tuple[Path, dict[str, Any]] | None:
    """Results and evidence by which production was promoted; None if they are not at hand as they were signed."""
    from mlflow.exceptions import MlflowException

    head = history_of(production.name).head
    if head is None or head.problem or head.move.evidence is None or head.move.release != production.release_id:
        return None
    signed = head.move.evidence
    try:
        folder = download(signed.run)
        if (sha256_of(folder / EVIDENCE), sha256_of(folder / RESULTS)) != (signed.sha256, signed.results):
            return None
        return folder / RESULTS, json.loads((folder / EVIDENCE).read_text())
    except (MlflowException, OSError):
        return None


def judged_alike(plan: Plan) -> str | None:
    """The verdict, other than pass, that this version already has under the very same conditions; else None.

    A schedule that asks again and again would be given another chance each night.
    """
    try:
        signed = evaluation_of(plan.version)
        if signed is not None:
            check(signed, load_trust())
    except TrustError:  # anybody could have written it
        return None
    if signed is None or plan.thresholds is None:
        return None
    found, production = signed.statement.evidence, current(plan.version.name)
    now = (sha256_of(plan.golden), sha256_of(plan.thresholds), production.release_id if production else None)
    alike = (found.golden, found.thresholds, found.compared_with) == now
    return found.verdict if alike and found.verdict != "pass" else None
