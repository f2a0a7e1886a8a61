"""The commands that judge and move: evaluate, chaos, promote, rollback, withdraw; and the exit codes of all."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import AgentkitError, UsageError
from agentkit_pipelines import terminal
from agentkit_pipelines.options import (
    Golden,
    MaxUsd,
    Reference,
    Repeats,
    Seed,
    SignedWhy,
    SystemName,
    Trusted,
    Workers,
)

if TYPE_CHECKING:
    from agentkit_pipelines.evidence import Plan
    from agentkit_pipelines.recording import Say

OK, CRASH, WRONG_USE, FAILED, INCONCLUSIVE = 0, 1, 2, 3, 4


def exit_code(error: AgentkitError) -> int:
    """Wrong use, also where only the notebook's kernel could find it, or a crash."""
    in_kernel = getattr(error, "error_name", "") in ("UsageError", "DataError", "ModelError")
    return WRONG_USE if in_kernel or isinstance(error, UsageError) else CRASH


def fail(message: str) -> None:
    """One line on stderr."""
    print(f"agentkit: {message}", file=sys.stderr)


def _plan(reference: str, golden: Path | None, thresholds: Path | None, **options: Any) -> Plan:
    from agentkit_pipelines.evidence import Plan, find_golden
    from agentkit_tracking.loading import resolve

    version = resolve(reference)
    return Plan(version, find_golden(version.name, golden), thresholds, **options)


def evaluate(
    reference: Reference,
    golden: Golden = None,
    thresholds: Annotated[Path | None, typer.Option(help="also judge against this file; no alias moves")] = None,
    repeats: Repeats = None,
    seed: Seed = 0,
    workers: Workers = None,
    max_usd: MaxUsd = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="only say what it would take")] = False,
    trust: Trusted = False,
    report: Annotated[
        Path | None, typer.Option(help="with --thresholds: Markdown to write, as a comment on a pull request")
    ] = None,
) -> None:
    """Run the golden set in a papermill kernel and report figures with 95 % intervals. Moves no alias.

    With --thresholds the exit codes are those of `promote`: 3 failed, 4 inconclusive.
    """
    from agentkit_pipelines import evidence, pull_request

    if report is not None and thresholds is None:
        raise UsageError("--report shows a verdict; give --thresholds FILE.yaml, too")
    if report is not None and not report.parent.is_dir():
        raise UsageError(f"there is no folder {report.parent} to write {report.name} to")
    options = {"repeats": repeats, "seed": seed, "workers": workers, "max_usd": max_usd, "trust": trust}
    plan = _plan(reference, golden, thresholds, **options)
    if estimate:
        return _show_estimate(plan)
    with terminal.progress("evaluating") as progress:
        done = evidence.evaluate(plan, progress=progress, say=_say)
    terminal.show_summary(done)
    if done.verdict is None:
        return None
    terminal.show_verdict(done)
    if report is not None:
        pull_request.write(done, report)
    raise typer.Exit(_exit_code_of(done.verdict.verdict))


def chaos(
    reference: Reference,
    golden: Golden = None,
    cases: Annotated[int, typer.Option(min=0, help="of the golden set, evenly spread; 0: all")] = 40,
    fault: Annotated[list[str] | None, typer.Option(help="only this one; can be given again [default: all]")] = None,
    kills: Annotated[
        int | None, typer.Option(min=0, help="of workers that run the first 20 cases durably; 3, with --max-usd none")
    ] = None,
    failure_at_most: Annotated[float, typer.Option(min=0, max=1, help="of the runs that a fault hit")] = 0.08,
    seed: Seed = 0,
    max_usd: MaxUsd = None,
    trust: Trusted = False,
) -> None:
    """Run golden cases while tools and models go wrong: who recovers, who hands over, who fails.

    Exit code 3 when a fault makes too many runs fail, or when any run writes without being allowed to, spends past its
    budget or is lost. A rule on `chaos_failure` in the thresholds file makes this part of the gate.
    """
    import polars as pl

    from agentkit_pipelines import chaos as runs
    from agentkit_pipelines.notebook_runner import run_notebook
    from agentkit_tracking import loading
    from agentkit_tracking.home import home

    if unknown := [name for name in fault or () if name not in runs.SURVIVABLE]:
        raise UsageError(f"there is no fault {unknown[0]!r} here; there are {', '.join(runs.SURVIVABLE)}")
    plan = _plan(reference, golden, None)
    folder, manifest = loading.fetch(reference, trust=trust)
    parameters: dict[str, Any] = {
        "version": str(folder),
        "golden": str(plan.golden.resolve()),
        "cases": cases,
        "seed": seed,
    }
    if kills and max_usd is not None:
        raise UsageError("--max-usd does not reach runs in workers; leave out --kills, or --max-usd")
    kills = (3 if max_usd is None else 0) if kills is None else kills
    parameters |= {"faults": ",".join(fault or ()), "failure_at_most": failure_at_most, "trust": trust, "kills": kills}
    if max_usd is not None:
        parameters["max_usd"] = max_usd
    output = home() / "chaos" / f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{manifest.system}"
    with terminal.progress("chaos") as progress:
        executed = run_notebook("chaos", parameters, output, progress)
    terminal.show_chaos(runs.summarise(pl.read_parquet(output / "chaos.parquet")), str(plan.version))
    out = terminal.console()
    missed = json.loads((output / "missed.json").read_text())
    for line in missed:
        out.print(f"✗ {line}", style="red", markup=False)
    out.print(
        f"{'[red]targets missed[/red]' if missed else '[green]all targets met[/green]'} · {terminal.short(executed)}"
    )
    raise typer.Exit(FAILED if missed else OK)


def _exit_code_of(verdict: str) -> int:
    return {"pass": OK, "fail": FAILED, "inconclusive": INCONCLUSIVE}[verdict]


def _show_estimate(plan: Plan) -> None:
    from agentkit.examples import read_examples
    from agentkit_pipelines import evaluation
    from agentkit_pipelines.thresholds import load_thresholds
    from agentkit_tracking import loading, registry

    os.environ["AGENTKIT_TRACES"] = "off"
    loading.require_trusted(plan.version, plan.trust)
    system = loading.load_folder(*registry.fetch_version(plan.version))
    repeats = plan.repeats or evaluation.default_repeats(system)
    examples = read_examples(plan.golden)
    found = evaluation.estimate(system, examples, repeats, plan.workers)
    extra = len(examples) if plan.thresholds and load_thresholds(plan.thresholds).wants_chaos else 0
    usd = "unknown: no price for this model" if found.usd is None else f"{found.usd:.2f}"
    terminal.console().print(
        f"{found.runs} runs ({repeats} repeats{f', {extra} more under faults not counted in' if extra else ''}), about {found.calls} model calls, {found.tokens_in} tokens in, "
        f"{found.tokens_out} out, USD {usd}, {found.minutes:.1f} minutes with {system.lm.model}"
    )


def promote(
    reference: Annotated[str | None, typer.Argument(help="name@candidate, name/3, … (or --candidates)")] = None,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="promote whatever carries the alias `candidate`")
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="with --candidates: look for them so often, with a warm kernel at hand, until Ctrl-C or SIGTERM",
        ),
    ] = None,
    golden: Golden = None,
    thresholds: Annotated[Path | None, typer.Option(help="YAML [default: thresholds/<system>.yaml]")] = None,
    repeats: Repeats = None,
    seed: Seed = 0,
    workers: Workers = None,
    max_usd: MaxUsd = None,
    trust: Trusted = False,
    why: SignedWhy = "the gate passed",
) -> None:
    """Evaluate, judge, and on the verdict `pass` set `production`. Exit code 3: failed, 4: inconclusive."""
    from agentkit_pipelines import promotion

    if (reference is None) == (not candidates):
        raise UsageError("give a reference or --candidates, one of them")
    if trust and candidates:
        raise UsageError("--trust is for a version that you name; anybody may set the alias `candidate`")
    if watch is not None:
        if not candidates:
            raise UsageError("--watch looks for candidates; give --candidates, too")
        _keep_promoting(watch, golden, thresholds, repeats, seed, workers, max_usd, False, why)
        return
    chosen = [str(v) for v in promotion.candidates()] if candidates else [str(reference)]
    if not chosen:
        terminal.console().print("no version carries the alias `candidate`")
    codes = []
    for one in chosen:
        try:
            codes.append(
                _promote(one, candidates, golden, thresholds, repeats, seed, workers, max_usd, trust, why, say=_say)
            )
        except AgentkitError as e:
            if not candidates:
                raise
            fail(f"{one}: {e}")  # the others still get their turn
            codes.append(exit_code(e))
    worst = [code for code in (CRASH, WRONG_USE, FAILED, INCONCLUSIVE) if code in codes]
    raise typer.Exit(worst[0] if worst else OK)


def _keep_promoting(every_s: float, *options: Any) -> None:
    from agentkit_pipelines.watching import keep_promoting

    keep_promoting(lambda one, say: _promote(one, True, *options, say=say), every_s, _say)


def _promote(
    one: str,
    asked: bool,
    golden: Path | None,
    thresholds: Path | None,
    repeats: int | None,
    *rest: Any,
    say: Say,
) -> int:
    from agentkit_pipelines import evidence, promotion

    seed, workers, max_usd, trust, why = rest
    plan = _plan(one, golden, None, repeats=repeats, seed=seed, workers=workers, max_usd=max_usd, trust=trust)
    plan = _with_thresholds(plan, thresholds, may_begin=not asked)
    if asked and (verdict := evidence.judged_alike(plan)):
        say(f"{one}: already judged ({verdict}) on this golden set, these thresholds and against this production")
        return OK
    with terminal.progress(f"evaluating {plan.version}") as progress:
        done = promotion.promote(plan, why=why, progress=progress, say=_say)
    terminal.show_verdict(done)
    assert done.verdict is not None
    return _exit_code_of(done.verdict.verdict)


def _with_thresholds(plan: Plan, given: Path | None, may_begin: bool) -> Plan:
    from dataclasses import replace

    from agentkit_pipelines.evidence import find_thresholds, first_thresholds

    try:
        return replace(plan, thresholds=find_thresholds(plan.version.name, given))
    except UsageError:
        place = first_thresholds(plan.version.name) if may_begin and given is None else None
        if place is None:
            raise
    _say(f"[yellow]no thresholds yet: {terminal.short(place)} was written to begin with; make it your own bar[/yellow]")
    return replace(plan, thresholds=place)


def _say(message: str) -> None:
    terminal.console().print(message)


def rollback(
    system: SystemName,
    why: SignedWhy = "no reason given",
) -> None:
    """Put the previous production release back, whole."""
    from agentkit_pipelines import promotion
    from agentkit_tracking.loading import RELOAD_S

    left, now = promotion.rollback(system, why=why)
    terminal.console().print(
        f"[bold]{now}[/bold] is in production again, {left or 'nothing'} was before. Processes that follow the alias change over within "
        f"{RELOAD_S:g} s; runs under way finish with the release they began with."
    )


def withdraw(
    system: SystemName,
    why: SignedWhy = "no reason given",
) -> None:
    """Take production out and leave nothing there: loads of NAME@production are refused until a promotion or rollback."""
    from agentkit_pipelines import promotion

    left = promotion.withdraw(system, why=why)
    terminal.console().print(
        f"[bold]{left}[/bold] is out; nothing is {system}@production until you promote or roll back"
    )
