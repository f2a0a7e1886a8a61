"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import AgentkitError, UsageError
from agentkit_pipelines import (
    approvals_cli,
    budget_cli,
    control_cli,
    costs_cli,
    data_cli,
    durable_cli,
    forward_cli,
    gate_cli,
    incident_cli,
    log_cli,
    log_upkeep_cli,  # noqa: F401 # adds its commands to those of log_cli
    mcp_cli,
    monitor_cli,
    terminal,
    tools_cli,
    trust_cli,
)
from agentkit_pipelines.gate_cli import CRASH, OK, exit_code, fail
from agentkit_pipelines.options import MaxUsd, Reference, Trusted, Workers

if TYPE_CHECKING:
    from agentkit.approvals import ApprovalRequest, Decision

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
ROAD, RUN, LOOK, OPERATE, MACHINE = "The road of a version", "Run", "Look", "Operate", "This machine"
app.add_typer(approvals_cli.approvals_app, name="approvals", rich_help_panel=OPERATE)
app.add_typer(budget_cli.budget_app, name="budget", rich_help_panel=OPERATE)
app.add_typer(data_cli.data_app, name="data", rich_help_panel=ROAD)
app.add_typer(log_cli.log_app, name="log", rich_help_panel=LOOK)
app.add_typer(mcp_cli.mcp_app, name="mcp", rich_help_panel=RUN)
app.add_typer(trust_cli.keys_app, name="keys", rich_help_panel=MACHINE)


def main() -> None:
    """Entry point: an error made on purpose is one line on stderr and an exit code."""
    try:
        app()
    except AgentkitError as e:
        fail(str(e))
        sys.exit(exit_code(e))
    except KeyboardInterrupt:
        fail("stopped")
        sys.exit(130)
    except Exception as e:
        if getattr(e, "error_code", "") != "PERMISSION_DENIED":
            raise
        fail(f"the server refused: {e}")  # mlflow's, which is not imported for this
        sys.exit(CRASH)


# ---- register


@app.command(rich_help_panel=ROAD)
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
    tools_cli.show_findings(tools_cli.registration_findings(registry.fetch_version(version)[1].spec))


app.command("lint-tools", rich_help_panel=ROAD)(tools_cli.lint_tools)
app.command(rich_help_panel=ROAD)(gate_cli.evaluate)
app.command(rich_help_panel=ROAD)(gate_cli.chaos)
app.command(rich_help_panel=ROAD)(gate_cli.promote)
app.command(rich_help_panel=ROAD)(gate_cli.rollback)
app.command(rich_help_panel=ROAD)(gate_cli.withdraw)


# ---- run and batch


@app.command(rich_help_panel=RUN)
def run(
    reference: Annotated[str, typer.Argument(help="name@alias, name/3, a release id, or FILE.py[:NAME] for a draft")],
    text: Annotated[str, typer.Argument(help="the first input")],
    given: Annotated[list[str] | None, typer.Option("--input", "-i", help="further inputs as name=value")] = None,
    approve: Annotated[
        bool, typer.Option("--approve", help="ask here where a person has to decide (else: rejected)")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="wait for a decision by `agentkit approvals` or its page, up to a day")
    ] = False,
    durable: Annotated[
        bool, typer.Option("--durable", help="keep it through a kill of this process; waits for people")
    ] = False,
    user: Annotated[str | None, typer.Option(help="on whose behalf: for checks and budgets per user")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole record as JSON")] = False,
    trust: Trusted = False,
) -> None:
    """Run once and show route, steps, decision, cost, latency and the trace."""
    from contextlib import nullcontext

    from agentkit.callers import acting_for
    from agentkit.systems import approve_with
    from agentkit_pipelines.durable_cli import run_durably
    from agentkit_tracking import loading, source
    from agentkit_tracking.control.approvals import desk_approver

    if as_json:
        os.environ["AGENTKIT_TRACES"] = (
            "off"  # a script does not wait for mlflow; whoever forwards next takes the run along
        )
    is_file = reference.split(":")[0].endswith((".py", ".ipynb"))
    if durable and (approve or trust or user):
        raise UsageError("--durable goes with neither --approve, --trust nor --user: another process may go on with it")
    draft = source.load_entry(source.parse_entry(reference)) if is_file else None
    system = draft or loading.load(_in_force(reference), trust=trust)
    names, required = system.input_names()
    inputs: dict[str, Any] = {names[0] if names else "text": text, **_pairs(given or [])}
    for name in sorted(required - inputs.keys()):
        inputs[name] = ""  # a quick try from the shell; an unknown customer, say
        fail(f"no {name} given, running with an empty one; give it with -i {name}=…")
    if approve and wait:
        raise UsageError("--approve asks here, --wait waits for somebody else; choose one")
    approver = _ask if approve else desk_approver() if wait else None
    with acting_for(user) if user else nullcontext(), approve_with(approver) if approver else nullcontext():
        record = run_durably(_in_force(reference), inputs) if durable else system.run(**inputs)
    if as_json:
        print(record.to_json().decode())
    else:
        terminal.show_run(record)
    raise typer.Exit(OK if record.state == "DONE" else CRASH)


def _in_force(reference: str) -> str:
    """A bare name means the release in production, or the newest where there never was one."""
    from agentkit_tracking.production import history_of

    if not reference.isidentifier() or not history_of(reference).entries:
        return reference
    return f"{reference}@production"


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    if wrong := [a for a, sign, _ in pairs if not sign]:
        raise UsageError(f"--input takes name=value, got {wrong[0]!r}")
    return {a: b for a, _, b in pairs}


def _ask(request: ApprovalRequest) -> Decision:
    from agentkit.approvals import Decision
    from agentkit_tracking.home import author

    question = f"{request.agent} wants {request.tool}({request.arguments}) because {request.reason}. Approve?"
    return Decision("approve" if typer.confirm(question, err=True) else "reject", by=author())


@app.command(rich_help_panel=RUN)
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


@app.command("list", rich_help_panel=LOOK)
def list_(system: Annotated[str | None, typer.Argument(help="name; all systems without it")] = None) -> None:
    """List systems and their versions with aliases and last verdicts; what no trusted key signed is unproven."""
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
                _verdict(v),
                tags.get("agentkit.author", ""),
                tags.get("agentkit.git_commit", "")[:9],
                datetime.fromtimestamp(v.created_at).strftime("%Y-%m-%d %H:%M"),
            )
    if not table.row_count:
        raise UsageError(
            f"nothing is registered{f' as {system!r}' if system else ''}; begin with `agentkit register FILE.py`"
        )
    terminal.console().print(table)


def _verdict(version: Any) -> str:
    """The verdict in a signed evaluation; the tag that shows it, anybody may write on a plain server."""
    from agentkit_tracking.production import evaluation_check
    from agentkit_tracking.rules import VERDICT

    shown = str((version.tags or {}).get(VERDICT, ""))
    return f"{shown or 'none'} (unproven)" if evaluation_check(version).problem else shown


@app.command(rich_help_panel=LOOK)
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


@app.command(rich_help_panel=LOOK)
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


app.command(rich_help_panel=LOOK)(log_cli.feedback)
app.command(rich_help_panel=LOOK)(trust_cli.history)
app.command(rich_help_panel=LOOK)(trust_cli.verify)
app.command(rich_help_panel=LOOK)(trust_cli.reproduce)
app.command(rich_help_panel=LOOK)(incident_cli.explain)
app.command(rich_help_panel=LOOK)(incident_cli.replay)


# ---- operate


app.command(rich_help_panel=OPERATE)(costs_cli.costs)
app.command(rich_help_panel=OPERATE)(durable_cli.runs)
app.command(rich_help_panel=OPERATE)(durable_cli.work)
app.command(rich_help_panel=OPERATE)(forward_cli.forward)
app.command(rich_help_panel=OPERATE)(control_cli.stop)
app.command(rich_help_panel=OPERATE)(control_cli.resume)
app.command(rich_help_panel=OPERATE)(monitor_cli.monitor)


# ---- this machine


@app.command(rich_help_panel=MACHINE)
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


@app.command(rich_help_panel=MACHINE)
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
