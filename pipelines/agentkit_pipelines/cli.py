"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import AgentkitError, UsageError
from agentkit_pipelines import terminal, trust_cli

if TYPE_CHECKING:
    from agentkit_pipelines.evidence import Plan, Say

OK, CRASH, WRONG_USE, FAILED, INCONCLUSIVE = 0, 1, 2, 3, 4

app = typer.Typer(
    help="LLM agents from notebook to production.\n\nThe road: `register` a notebook, `evaluate` it, `promote` it through "
    "the gate, `run` or `batch` it, and `rollback` if need be.\n\nReferences: support_triage@production, "
    "support_triage/3, a release id, or FILE.py[:NAME] for a draft.\n\nExit codes: 0 done, 1 crash, 2 wrong use, "
    "3 the gate failed, 4 the gate is inconclusive.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Check and import files of examples.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(trust_cli.keys_app, name="keys")
for command in (trust_cli.verify, trust_cli.reproduce, trust_cli.history):
    app.command()(command)

Reference = Annotated[str, typer.Argument(help="name@alias, name/3, name (newest), or a release id")]
Golden = Annotated[Path | None, typer.Option(help="golden set, JSONL [default: data/<system>/golden.jsonl]")]
Repeats = Annotated[int | None, typer.Option(min=1, help="runs per case [default: 8 free model, 3 paid]")]
Seed = Annotated[int, typer.Option(help="of the input perturbations; alike for all versions you compare")]
Workers = Annotated[int | None, typer.Option(min=1, help="runs at the same time [default: by model]")]
Trusted = Annotated[bool, typer.Option("--trust", help="execute it although nobody trusted here vouches for it")]
MaxUsd = Annotated[float | None, typer.Option(min=0, help="stop hard before more than this is spent")]


def main() -> None:
    """Entry point: an error made on purpose is one line on stderr and an exit code."""
    try:
        app()
    except AgentkitError as e:
        _fail(str(e))
        sys.exit(_exit_code(e))
    except KeyboardInterrupt:
        _fail("stopped")
        sys.exit(130)
    except Exception as e:
        if getattr(e, "error_code", "") != "PERMISSION_DENIED":
            raise
        _fail(f"the server refused: {e}")  # mlflow's, which is not imported for this
        sys.exit(CRASH)


def _exit_code(error: AgentkitError) -> int:
    """Wrong use, also where only the notebook's kernel could find it, or a crash."""
    in_kernel = getattr(error, "error_name", "") in ("UsageError", "DataError", "ModelError")
    return WRONG_USE if in_kernel or isinstance(error, UsageError) else CRASH


def _fail(message: str) -> None:
    print(f"agentkit: {message}", file=sys.stderr)


# ---- register


@app.command()
def register(
    source: Annotated[str, typer.Argument(help="FILE.py or FILE.ipynb, with :NAME if not `system`")],
    prepare: Annotated[str | None, typer.Option(help="function of the file that tunes the system first")] = None,
    candidate: Annotated[
        bool, typer.Option("--candidate", help="also ask for promotion: set the alias `candidate`")
    ] = False,
) -> None:
    """Make a release of a notebook or module: one manifest, one content hash, one version in MLflow."""
    from agentkit_tracking import registry
    from agentkit_tracking.home import connect

    version = registry.register_file(source, prepare)
    if candidate:
        connect().set_registered_model_alias(version.name, registry.CANDIDATE, str(version.number))
    state = "registered" if version.created else "unchanged, already registered as"
    terminal.console().print(f"{state} [bold]{version}[/bold], release {version.release_id[:12]}")


# ---- evaluate and promote


def _plan(reference: str, golden: Path | None, thresholds: Path | None, **options: Any) -> Plan:
    from agentkit_pipelines.evidence import Plan, find_golden
    from agentkit_tracking.loading import resolve

    version = resolve(reference)
    return Plan(version, find_golden(version.name, golden), thresholds, **options)


@app.command()
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


def _exit_code_of(verdict: str) -> int:
    return {"pass": OK, "fail": FAILED, "inconclusive": INCONCLUSIVE}[verdict]


def _show_estimate(plan: Plan) -> None:
    from agentkit.examples import read_examples
    from agentkit_pipelines import evaluation
    from agentkit_tracking import loading, registry

    os.environ["AGENTKIT_TRACES"] = "off"
    loading.require_trusted(plan.version, plan.trust)
    system = loading.load_folder(*registry.fetch_version(plan.version))
    repeats = plan.repeats or evaluation.default_repeats(system)
    found = evaluation.estimate(system, read_examples(plan.golden), repeats, plan.workers)
    usd = "unknown: no price for this model" if found.usd is None else f"{found.usd:.2f}"
    terminal.console().print(
        f"{found.runs} runs ({repeats} repeats), about {found.calls} model calls, {found.tokens_in} tokens in, "
        f"{found.tokens_out} out, USD {usd}, {found.minutes:.1f} minutes with {system.lm.model}"
    )


@app.command()
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
        _keep_promoting(watch, golden, thresholds, repeats, seed, workers, max_usd, False)
        return
    chosen = [str(v) for v in promotion.candidates()] if candidates else [str(reference)]
    if not chosen:
        terminal.console().print("no version carries the alias `candidate`")
    codes = []
    for one in chosen:
        try:
            codes.append(
                _promote(one, candidates, golden, thresholds, repeats, seed, workers, max_usd, trust, say=_say)
            )
        except AgentkitError as e:
            if not candidates:
                raise
            _fail(f"{one}: {e}")  # the others still get their turn
            codes.append(_exit_code(e))
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

    seed, workers, max_usd, trust = rest
    plan = _plan(one, golden, None, repeats=repeats, seed=seed, workers=workers, max_usd=max_usd, trust=trust)
    plan = _with_thresholds(plan, thresholds, may_begin=not asked)
    if asked and (verdict := evidence.judged_alike(plan)):
        say(f"{one}: already judged ({verdict}) on this golden set, these thresholds and against this production")
        return OK
    with terminal.progress(f"evaluating {plan.version}") as progress:
        done = promotion.promote(plan, progress=progress, say=_say)
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


@app.command()
def rollback(
    system: Annotated[str, typer.Argument(help="name of the system")],
    why: Annotated[str, typer.Option(help="recorded with who and when")] = "no reason given",
) -> None:
    """Put the previous production release back, whole."""
    from agentkit_pipelines import promotion
    from agentkit_tracking.loading import RELOAD_S

    left, now = promotion.rollback(system, why=why)
    terminal.console().print(
        f"[bold]{now}[/bold] is in production again, {left or 'nothing'} was before. Processes that follow the alias change over within "
        f"{RELOAD_S:g} s; runs under way finish with the release they began with."
    )


@app.command()
def withdraw(
    system: Annotated[str, typer.Argument(help="name of the system")],
    why: Annotated[str, typer.Option(help="recorded with who and when")] = "no reason given",
) -> None:
    """Take production out and leave nothing there: loads of NAME@production are refused until a promotion or rollback."""
    from agentkit_pipelines import promotion

    left = promotion.withdraw(system, why=why)
    terminal.console().print(
        f"[bold]{left}[/bold] is out; nothing is {system}@production until you promote or roll back"
    )


# ---- run and batch


@app.command()
def run(
    reference: Annotated[str, typer.Argument(help="name@alias, name/3, a release id, or FILE.py[:NAME] for a draft")],
    text: Annotated[str, typer.Argument(help="the first input")],
    given: Annotated[list[str] | None, typer.Option("--input", "-i", help="further inputs as name=value")] = None,
    approve: Annotated[
        bool, typer.Option("--approve", help="ask here where a person has to decide (else: rejected)")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole record as JSON")] = False,
    trust: Trusted = False,
) -> None:
    """Run once and show route, steps, decision, cost, latency and the trace."""
    from contextlib import nullcontext

    from agentkit.systems import approve_with
    from agentkit_tracking import loading, source

    os.environ["AGENTKIT_TRACES"] = "off"  # written below, so that its link can be shown
    is_file = reference.split(":")[0].endswith((".py", ".ipynb"))
    draft = source.load_entry(source.parse_entry(reference)) if is_file else None
    system = draft or loading.load(_in_force(reference), trust=trust)
    names, required = system.input_names()
    inputs: dict[str, Any] = {names[0] if names else "text": text, **_pairs(given or [])}
    for name in sorted(required - inputs.keys()):
        inputs[name] = ""  # a quick try from the shell; an unknown customer, say
        _fail(f"no {name} given, running with an empty one; give it with -i {name}=…")
    with approve_with(_ask) if approve else nullcontext():
        record = system.run(**inputs)
    if as_json:
        print(record.to_json().decode())
    else:
        terminal.show_run(record)
    raise typer.Exit(OK if record.state == "DONE" else CRASH)


def _in_force(reference: str) -> str:
    """A bare name means the release in production, or the newest where there is none."""
    from agentkit_tracking.production import find_production

    if not reference.isidentifier() or find_production(reference) is None:
        return reference
    return f"{reference}@production"


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    if wrong := [a for a, sign, _ in pairs if not sign]:
        raise UsageError(f"--input takes name=value, got {wrong[0]!r}")
    return {a: b for a, _, b in pairs}


def _ask(request: Any) -> bool:
    return typer.confirm(
        f"{request.agent} wants {request.tool}({request.arguments}) because {request.reason}. Approve?", err=True
    )


@app.command()
def batch(
    reference: Reference,
    source: Annotated[Path, typer.Argument(help="CSV, Parquet or JSONL")],
    target: Annotated[Path, typer.Argument(help="results, Parquet")],
    id_column: Annotated[str, typer.Option(help="unique per row; a restart goes by it")] = "id",
    workers: Workers = None,
    max_usd: MaxUsd = None,
    trust: Trusted = False,
) -> None:
    """Run a file of inputs through a release in the batch notebook; can be stopped and started again."""
    from agentkit_pipelines.notebook_runner import run_notebook
    from agentkit_tracking import loading
    from agentkit_tracking.home import home

    reference = _in_force(reference)
    loading.fetch(reference, trust=trust)  # wrong use is said before a kernel starts
    if not source.is_file():
        raise UsageError(f"there is no file {source}")
    parameters: dict[str, Any] = {
        "version": reference,
        "source": str(source.resolve()),
        "target": str(target.resolve()),
        "id_column": id_column,
        "trust": trust,
    }
    parameters |= {k: v for k, v in {"workers": workers, "max_usd": max_usd}.items() if v is not None}
    with terminal.progress("batch") as progress:
        executed = run_notebook("batch", parameters, home() / "batches" / target.stem, progress)
    import polars as pl

    states = pl.read_parquet(target, columns=["state"])["state"].value_counts(sort=True)
    counts = ", ".join(f"{count} {state}" for state, count in states.iter_rows())
    terminal.console().print(f"{counts}; results: {target}; report: {terminal.short(executed)}", soft_wrap=True)


# ---- look


@app.command("list")
def list_(system: Annotated[str | None, typer.Argument(help="name; all systems without it")] = None) -> None:
    """List systems and their versions with aliases and last verdicts."""
    from datetime import datetime

    from rich.table import Table

    from agentkit_tracking import registry

    table = Table("version", "release", "aliases", "last verdict", "author", "commit", "registered")
    for name in [system] if system else registry.systems():
        for v in registry.versions(name):
            tags = v.tags or {}
            table.add_row(
                str(v),
                v.release_id[:12],
                ", ".join(v.aliases),
                tags.get("agentkit.last_verdict", ""),
                tags.get("agentkit.author", ""),
                tags.get("agentkit.git_commit", "")[:9],
                datetime.fromtimestamp(v.created_at).strftime("%Y-%m-%d %H:%M"),
            )
    if not table.row_count:
        raise UsageError(
            f"nothing is registered{f' as {system!r}' if system else ''}; begin with `agentkit register FILE.py`"
        )
    terminal.console().print(table)


@app.command()
def show(reference: Reference) -> None:
    """Show one release: prompts, tools and permissions, budget, model, files, verdict."""
    from rich.markup import escape
    from rich.table import Table

    from agentkit_tracking import loading, registry

    version = loading.resolve(reference)
    _, manifest = registry.fetch_version(version)
    console = terminal.console()
    console.print(
        f"[bold]{version}[/bold] · release {manifest.release_id} · {', '.join(version.aliases) or 'no alias'}"
    )
    console.print(f"source {manifest.entry} · model {manifest.model} · weights {(manifest.weights or 'none')[:12]}")
    matrix = Table("tool", "permission", "a person from", *manifest.spec["agents"])
    for name, tool in manifest.spec["tools"].items():
        limit = ", ".join(f"{k} ≥ {v:g}" for k, v in tool["human_at"].items())
        may = ["✓" if name in agent["tools"] else "" for agent in manifest.spec["agents"].values()]
        matrix.add_row(name, tool["permission"], limit, *may)
    if manifest.spec["tools"]:
        console.print(matrix)
    console.print(
        "budget per run: " + ", ".join(f"{k} {v:g}" for k, v in manifest.spec["budget"].items() if v is not None)
    )
    for name, state in manifest.prompts.items():
        console.print(f"\n[bold]{name}[/bold]")
        console.print(escape(registry.prompt_text(state)))


@app.command()
def diff(old: Reference, new: Reference) -> None:
    """Show what differs between two releases: prompts, tools, budget, model, files, source text."""
    from agentkit_pipelines.comparison import differences

    console = terminal.console()
    found = differences(old, new)
    for line in found:
        color = (
            "green"
            if line.startswith("+")
            else "red"
            if line.startswith("-")
            else "bold"
            if line.startswith("#")
            else None
        )
        console.print(line, style=color, markup=False)
    if not found:
        console.print("no difference: the same release")


@app.command()
def log(
    query: Annotated[str | None, typer.Argument(help="SQL on the views `runs` and `steps` (DuckDB)")] = None,
    limit: Annotated[int, typer.Option(min=1, help="rows without a query")] = 20,
) -> None:
    """Query the run log, e.g. `agentkit log "SELECT route, count(*), sum(usd) FROM runs GROUP BY route"`."""
    from rich.table import Table

    from agentkit_tracking.runlog import RunLog

    default = (
        "SELECT started_at, system, left(release, 12) AS release, kind, route, state, round(seconds, 3) AS seconds, usd, run_id "
        f"FROM runs ORDER BY started_at DESC LIMIT {limit}"
    )
    frame = RunLog().sql(query or default)
    table = Table(*frame.columns)
    for row in frame.iter_rows():
        table.add_row(*(terminal.clip(v) if not isinstance(v, int | float) or v is None else f"{v:g}" for v in row))
    terminal.console().print(table)


@data_app.command("check")
def data_check(
    file: Annotated[Path, typer.Argument(help="JSONL of examples")],
    against: Annotated[
        list[Path] | None, typer.Option(help="also look for near-duplicates of these files' cases")
    ] = None,
) -> None:
    """Check a file of examples against the schema; report class balance and near-duplicates. Exit code 2 if it is wrong."""
    from rich.table import Table

    from agentkit.example_checks import check_examples

    found = check_examples(file, against=against or [])
    console = terminal.console()
    console.print(f"{file}: {found.count} examples, sha256 {found.sha256[:12]}")
    table = Table("field", "values")
    table.add_row("task_type", _counts(found.by_task_type))
    table.add_row("tags", _counts(found.by_tag))
    for name, balance in found.balance.items():
        table.add_row(f"expected.{name}", _counts(balance))
    console.print(table)
    for pair in found.near_duplicates[:20]:
        console.print(f"[yellow]near-duplicates[/yellow] {pair[0]} and {pair[1]}: similarity {pair[2]:.2f}")
    raise typer.Exit(WRONG_USE if found.near_duplicates else OK)


def _counts(counts: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in counts.items()) or "–"


@data_app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="CSV, Parquet or JSONL table")],
    target: Annotated[Path, typer.Argument(help="JSONL of examples to write")],
    inputs: Annotated[str, typer.Option(help="input columns, comma-separated")],
    expected: Annotated[str, typer.Option(help="expected columns, comma-separated")] = "",
    task_type: Annotated[str, typer.Option(help="column, or =constant")] = "=default",
    id_column: Annotated[str | None, typer.Option(help="column of unique ids [default: numbered]")] = None,
    tags: Annotated[str | None, typer.Option(help="column of comma-separated tags")] = None,
) -> None:
    """Turn a table into a file of examples."""
    from agentkit.example_tables import import_examples
    from agentkit.examples import write_examples

    if target.exists():
        raise UsageError(f"{target} exists; delete it or choose another name")
    names = [n.strip() for n in inputs.split(",") if n.strip()]
    answers = [n.strip() for n in expected.split(",") if n.strip()]
    found = import_examples(source, id=id_column, inputs=names, expected=answers, task_type=task_type, tags=tags)
    write_examples(target, found)
    terminal.console().print(f"{len(found)} examples written to {target}")


# ---- services


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    host: Annotated[
        str, typer.Option(help="keep to loopback unless something in front of it checks who asks")
    ] = "127.0.0.1",
) -> None:
    """Serve the MLflow UI on the local store: compare versions, read verdicts, set `candidate`. Guards `production`."""
    from agentkit_tracking.home import connect, home, prepare_environment, registry_uri, tracking_uri

    prepare_environment()
    connect()
    uri = tracking_uri()
    if not uri.startswith("sqlite:"):
        raise UsageError(f"MLFLOW_TRACKING_URI is {uri}: that server has a UI of its own")
    terminal.console().print(f"MLflow UI on http://{host}:{port} (about 20 s to start; Ctrl-C to stop)")
    command = [
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--registry-store-uri",
        registry_uri(),
        "--app-name",
        "agentkit",
        "--default-artifact-root",
        (home() / "artifacts").as_uri(),
    ]
    arguments = [sys.executable, "-m", *command, "--host", host, "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, arguments)


@app.command()
def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="mend what can be mended: prompt aliases")] = False,
    port: Annotated[int, typer.Option(help="of the UI")] = 5000,
) -> None:
    """Check Python, packages, keys, stores and ports, and say what to do. Exit code 1 if something is wrong."""
    from agentkit_pipelines.doctor import examine

    console = terminal.console()
    findings = examine(port=port, repair=repair)
    for finding in findings:
        mark = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "bad": "[red]✗[/red]"}[finding.level]
        console.print(f"{mark} {finding.what}" + (f"\n    → {finding.advice}" if finding.advice else ""))
    raise typer.Exit(CRASH if any(f.level == "bad" for f in findings) else OK)


if __name__ == "__main__":
    main()
