"""Proof for anyone: a release, its evidence and its history as files, checked with public keys alone; and done again."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from agentkit.errors import AgentkitError, ReleaseError, TrustError, UnknownReference, UsageError
from agentkit.examples import sha256_of
from agentkit_pipelines import recording as files
from agentkit_pipelines.evidence import find_golden
from agentkit_pipelines.gate import Verdict, judge
from agentkit_pipelines.notebook_runner import Progress, run_notebook
from agentkit_pipelines.thresholds import load_thresholds
from agentkit_tracking import history as histories
from agentkit_tracking import production, registry
from agentkit_tracking.history import KEY, History
from agentkit_tracking.home import home
from agentkit_tracking.keys import Trust, load_trust
from agentkit_tracking.loading import require_trusted, resolve
from agentkit_tracking.manifest import read_release
from agentkit_tracking.production import Check
from agentkit_tracking.registry import Version
from agentkit_tracking.rules import EVALUATION, REGISTRATION, head_problems, is_production
from agentkit_tracking.statements import Evaluation, Evidence, Registration, check, day, read, read_checked

# What a folder that stands for itself holds.
RELEASE, EVIDENCE, HISTORY, STATEMENTS = "release", "evidence", "history.json", "statements.json"
_SIGNED_FILES = (
    *(files.EVIDENCE, files.RESULTS, files.PRODUCTION_RESULTS),
    *(files.VERDICT_FILE, files.NOTEBOOK, files.THRESHOLDS),
)


# ---- verify


def verify(reference: str, save: Path | None = None) -> list[Check]:
    """Check all that stands behind a version: signatures, history, registry, files, evidence, and the gate once more.

    Args:
        save: also write release, evidence and statements into this new folder, for `verify_folder` anywhere else.

    Raises:
        UsageError: nothing is registered under the reference, or the folder exists.
    """
    if save is not None and save.exists():
        raise UsageError(f"{save} exists; name a folder that does not")
    name, _, alias = reference.partition("@")
    in_production = is_production(alias)
    registered = registry.look_up(name if in_production else registry.resolve(reference).name)
    try:
        if not registered.versions and not histories.seen(registered.name):
            raise UnknownReference(f"no system {name!r} is registered; see `agentkit list`")
        history = histories.of(registered.name, registered.tags)
    except TrustError as e:
        return [Check("history", str(e))]
    version, found = None, []
    if in_production:
        found += list(production.registry_checks(registered, history))
        version = next((v for v in registered.versions if v.number == history.production), None)
        if version is None:
            return found or [Check("production", f"nothing is in production of {name}")]
        found.append(production.evidence_check(history.head.move.evidence if history.head else None))
    else:
        version = registry.resolve(reference)
        found.append(production.evaluation_check(version))
    found.append(_description_check(version))
    with tempfile.TemporaryDirectory() as scratch:
        folder = save or Path(scratch) / "bundle"
        found += _write(version, history, registered.tags, folder)
        found += verify_folder(folder, load_trust(), in_production=in_production)
        if (folder / RELEASE).is_dir():
            manifest = read_release(folder / RELEASE)
            found += production.prompt_checks(version, manifest)
        if in_production:
            found += production.mirror_checks(version)
    return found


def _description_check(version: Version) -> Check:
    from hashlib import sha256

    try:
        signed = production.evaluation_of(version)
    except TrustError:
        signed = None  # said by the verdict's own check
    shown = sha256(version.description.encode()).hexdigest()
    same = signed is None or signed.statement.description == shown
    return Check(
        "text shown in MLflow", "" if same else f"the text that {version} shows in MLflow is not the one signed", False
    )


def _write(version: Version, history: History, tags: dict[str, str], folder: Path) -> Iterator[Check]:
    """Lay everything out as files; what cannot be fetched is a problem, not an end."""
    from mlflow.exceptions import MlflowException

    folder.mkdir(parents=True)
    (folder / HISTORY).write_text(json.dumps([e.signed.envelope for e in history.entries], indent=1))
    own = {k: v for k in (REGISTRATION, EVALUATION) if (v := (version.tags or {}).get(k)) is not None}
    (folder / STATEMENTS).write_text(json.dumps(own, indent=1))
    try:
        registry.check_stored(version)
        shutil.copytree(registry.fetch_version(version)[0], folder / RELEASE)
    except ReleaseError as e:
        yield Check("release as stored", str(e))
    try:
        proof = _proof(history, own.get(EVALUATION), version.release_id)
    except TrustError:
        return  # said by what looks at the statements
    if proof is None:
        return
    try:
        kept = files.download(proof.run)
        (folder / EVIDENCE).mkdir()
        for file in filter(Path.is_file, (kept / name for name in _SIGNED_FILES)):  # plots prove nothing
            shutil.copy(file, folder / EVIDENCE)
    except (MlflowException, OSError) as e:
        yield Check("evidence as stored", f"the evidence of {version} cannot be fetched: {str(e).splitlines()[0]}")


def _proof(history: History, evaluation: str | None, release: str) -> Evidence | None:
    """The signed evidence of a release: that of its last promotion, else of the evaluation it carries."""
    moves = [e.move for e in history.entries if e.move.release == release and e.move.evidence is not None]
    if moves:
        return moves[-1].evidence
    return None if evaluation is None else read(evaluation, Evaluation).statement.evidence


def verify_folder(folder: Path, trust: Trust, *, in_production: bool = True) -> list[Check]:
    """Check what `verify(save=…)` wrote, with these public keys and nothing else.

    Args:
        in_production: what was never in production, or is so no more, is a problem, not a remark.

    Raises:
        UsageError: the folder holds no history and no statements.
    """
    try:
        envelopes = json.loads((folder / HISTORY).read_text())
        own = json.loads((folder / STATEMENTS).read_text())
    except (OSError, ValueError) as e:
        raise UsageError(
            f"{folder} is no folder that `agentkit verify NAME@production --save DIR` wrote: {HISTORY} or {STATEMENTS} "
            f"cannot be read"
        ) from e
    if not isinstance(envelopes, list) or not isinstance(own, dict):
        raise UsageError(f"{folder / HISTORY} must hold a list, {STATEMENTS} an object")
    found: list[Check] = []
    manifest = None

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (AgentkitError, OSError, ValueError, pl.exceptions.PolarsError) as e:
            found.append(Check(what, str(e)))
            return None

    manifest = attempt("release", lambda: read_release(folder / RELEASE, called="the release"))
    if manifest is None:
        return found
    found.append(Check(f"release {manifest.release_id[:12]} of {manifest.system}: {len(manifest.files)} source files"))
    history = attempt(
        "history",
        lambda: histories.parse(manifest.system, {f"{KEY}{n:06}": t for n, t in enumerate(envelopes, 1)}, trust),
    )
    if history is None:
        return found
    found += _who_checks(history, own, manifest.release_id, manifest.system, trust, in_production)
    proof = attempt("evaluation", lambda: _proof(history, own.get(EVALUATION), manifest.release_id))
    if proof is None:
        found.append(Check("evidence", "there is no signed evidence: it was not evaluated, or nobody signed"))
        return found
    if proof.verdict != "pass":
        found.append(Check("verdict", f"the gate's verdict is {proof.verdict}", blocks=False))
    found += _file_checks(folder / EVIDENCE, proof, manifest.release_id)
    found += _unsigned_files(folder)
    if not any(c.problem and c.blocks for c in found):
        gate = attempt("the gate, judged again", lambda: _gate_check(folder / EVIDENCE))
        found += [] if gate is None else [gate]
    return found


def _who_checks(
    history: History, own: dict[str, str], release: str, system: str, trust: Trust, in_production: bool
) -> Iterator[Check]:
    head = history.head
    if head is not None:
        yield Check(f"history: {len(history.entries)} entries, each built on the one before")
        for entry in history.entries[:-1]:
            try:
                check(entry.signed, trust)
            except TrustError as e:  # vouched for by the last; what it put into production does not count any more
                what = f"entry {entry.move.sequence} of the history: {e}"
                yield Check("history", what, blocks=entry.move.release == release and entry.move.event == "promoted")
        registrations = {head.move.version or 0: own[REGISTRATION]} if REGISTRATION in own else {}
        in_force = head.move.version is not None and head.move.release == release
        if in_force:
            yield Check(
                f"in production since {day(head.move.time)} by {head.who}",
                "; ".join(head_problems(history, registrations, trust)),
            )
        else:
            yield Check("the last entry of the history", head.problem)
            yield Check("in production", f"it is not in production: {histories.describe(head)}", in_production)
    else:
        yield Check("in production", "it is not in production: there is no history of it", in_production)
    for kind, key, word in ((Registration, REGISTRATION, "registered"), (Evaluation, EVALUATION, "evaluated")):
        if key not in own:
            yield Check(f"{word} by nobody who signed")
            continue
        try:
            signed, by = read_checked(own[key], kind, system, release, trust)
            local = " (local key)" if by.local or signed.statement.signer.local else ""
            yield Check(f"{word} {day(signed.statement.time)} by {by.owner}{local}")
        except TrustError as e:
            yield Check(word, f"{word}: {e}")


def _file_checks(folder: Path, proof: Evidence, release: str) -> Iterator[Check]:
    """Every file of the evidence against the hash that was signed."""
    signed = {
        files.EVIDENCE: proof.sha256,
        files.RESULTS: proof.results,
        files.VERDICT_FILE: proof.verdict_file,
        files.NOTEBOOK: proof.notebook,
        files.THRESHOLDS: proof.thresholds,
    }
    for name, digest in signed.items():
        path = folder / name
        problem = "is missing" if not path.is_file() else "" if sha256_of(path) == digest else "is not the one signed"
        yield Check(f"evidence: {name}", problem and f"the evidence's {name} {problem}")
    try:
        said = json.loads((folder / files.EVIDENCE).read_text())
        fits = (said["release"], said["verdict"], said["golden_sha256"]) == (release, proof.verdict, proof.golden)
    except (OSError, ValueError, TypeError, KeyError):
        return  # not the one signed, as said above
    yield Check(
        "evidence: of this release, verdict and golden set",
        "" if fits else "the evidence is of another release, verdict or golden set",
    )
    path = folder / files.PRODUCTION_RESULTS  # without it, rules `versus: production` would not apply
    if path.exists() or said.get("production_results_sha256") is not None or proof.compared_with is not None:
        same = path.is_file() and sha256_of(path) == said.get("production_results_sha256")
        yield Check(
            f"evidence: {path.name}", "" if same else f"the evidence's {path.name} is missing or not the one signed"
        )


def _unsigned_files(folder: Path) -> Iterator[Check]:
    """Nothing may lie beside the proof that looks like a part of it. (What belongs to the release, its manifest says.)"""
    known = {RELEASE, HISTORY, STATEMENTS, EVIDENCE, *(f"{EVIDENCE}/{name}" for name in _SIGNED_FILES)}
    there = {p.relative_to(folder).as_posix() for place in (folder, folder / EVIDENCE) for p in place.glob("*")}
    for name in sorted(there - known):
        yield Check("files", f"{name} is no part of what was signed")


def _gate_check(folder: Path) -> Check:
    recorded, again = judged_again(folder)
    same = recorded == again
    text = f"the gate, judged again from the recorded results: {again.verdict}"
    return Check(text, "" if same else f"the recorded results give {again.verdict}, recorded was {recorded.verdict}")


def judged_again(folder: Path) -> tuple[Verdict, Verdict]:
    """The verdict that an evidence folder holds, and the one that its per-case results and thresholds give now."""
    recorded = Verdict.model_validate_json((folder / files.VERDICT_FILE).read_bytes())
    said = json.loads((folder / files.EVIDENCE).read_text())
    path = folder / files.PRODUCTION_RESULTS
    before = pl.read_parquet(path) if path.is_file() else None
    results, bar = pl.read_parquet(folder / files.RESULTS), load_thresholds(folder / files.THRESHOLDS)
    # Through JSON, as the recorded one went.
    again = Verdict.model_validate_json(judge(results, bar, before, frozenset(said["exercised"])).model_dump_json())
    return recorded, again


# ---- reproduce


@dataclass(frozen=True)
class Reproduction:
    """A verdict judged again, and an evaluation done again. Shares are of all runs; `success` of recorded and new."""

    version: Version
    recorded: Verdict
    judged_again: Verdict
    run_again: Verdict | None
    runs: int
    same_output: float
    same_success: float
    success: tuple[float, float]
    changed_cases: tuple[str, ...]
    folder: Path

    @property
    def holds(self) -> bool:
        """The recorded results give the recorded verdict rule by rule, and a new evaluation gives the same word."""
        word = None if self.run_again is None else self.run_again.verdict
        return self.recorded == self.judged_again and word in (None, self.recorded.verdict)


def reproduce(
    reference: str,
    golden: Path | None = None,
    *,
    run: bool = True,
    trust: bool = False,
    progress: Progress | None = None,
) -> Reproduction:
    """Judge a version's recorded results again, then evaluate it again as it was and compare. Moves and logs nothing.

    Raises:
        UsageError: it was never evaluated against thresholds, or the golden set at hand is another.
        TrustError: its evidence is not as it was signed.
    """
    from mlflow.exceptions import MlflowException

    version = resolve(reference)
    history, text = production.history_of(version.name), (version.tags or {}).get(EVALUATION)
    proof = _proof(history, text, version.release_id)
    _require_counts(version, history, text)
    if run and history.production != version.number:  # `resolve` has checked what is in production
        require_trusted(version, trust)
    if proof is None:
        raise UsageError(f"{version} has no signed evidence; evaluate it with --thresholds, or promote it")
    try:
        folder = files.download(proof.run)
    except (MlflowException, OSError) as e:
        raise TrustError(f"the evidence of {version} cannot be fetched: {str(e).splitlines()[0]}") from e
    if problems := [c.problem for c in _file_checks(folder, proof, version.release_id) if c.problem]:
        raise TrustError(f"the evidence of {version} is not as it was signed: {'; '.join(problems)}", problems)
    recorded, again = judged_again(folder)
    before = pl.read_parquet(folder / files.RESULTS)
    blank = Reproduction(version, recorded, again, None, 0, 1.0, 1.0, (0.0, 0.0), (), folder)
    if not run:
        return blank
    output = _run_again(version, folder, find_golden(version.name, golden), proof, progress)
    return _compared(blank, before, pl.read_parquet(output / files.RESULTS), output)


def _require_counts(version: Version, history: History, evaluation: str | None) -> None:
    """The signature behind a version's evidence must count now."""
    promotion = history.promotion_of(version.number)
    if promotion is not None:
        check(promotion.signed, load_trust())
    elif evaluation is not None:
        check(read(evaluation, Evaluation), load_trust())


def _run_again(version: Version, folder: Path, golden: Path, proof: Evidence, progress: Progress | None) -> Path:
    if sha256_of(golden) != proof.golden:
        raise UsageError(
            f"{golden} is not the golden set that {version} was evaluated on (SHA-256 {proof.golden[:12]}…); name that one "
            "with --golden, or judge the recorded results alone with --recorded-only"
        )
    said = json.loads((folder / files.EVIDENCE).read_text())
    release, _ = registry.fetch_version(version)
    output = home() / "reproductions" / f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{version.name}-{version.number}"
    parameters: dict[str, Any] = {
        "version": str(release),
        "golden": str(golden.resolve()),
        "thresholds": str(folder / files.THRESHOLDS),
        "repeats": said["repeats"],
        "seed": said["seed"],
    }
    if (kept := folder / files.PRODUCTION_RESULTS).is_file():
        parameters |= {"production": said["compared_with"], "production_results": str(kept)}
    run_notebook("evaluate", parameters, output, progress)
    return output


def _compared(blank: Reproduction, before: pl.DataFrame, after: pl.DataFrame, output: Path) -> Reproduction:
    both = before.join(after, on=["case_id", "repeat"], suffix="_again", how="inner")
    same = both["success"].eq_missing(both["success_again"])
    return replace(
        blank,
        run_again=Verdict.model_validate_json((output / files.VERDICT_FILE).read_bytes()),
        runs=len(both),
        same_output=_share(both["output"].eq_missing(both["output_again"])),
        same_success=_share(same),
        success=(_share(before["success"]), _share(after["success"])),
        changed_cases=tuple(both.filter(~same)["case_id"].unique(maintain_order=True)),
        folder=output,
    )


def _share(column: pl.Series) -> float:
    return int(column.sum()) / max(1, len(column) - column.null_count())
