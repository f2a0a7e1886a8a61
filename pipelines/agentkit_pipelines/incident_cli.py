"""`explain` and `replay`: what a run did and why, and whether another release would have done the same."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import ReleaseError, UsageError
from agentkit_pipelines import terminal
from agentkit_pipelines.gate_cli import OK
from agentkit_pipelines.options import Trusted

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.records import RunRecord, Step

DIFFERS = 3
_ENDING = 1_000  # characters of what a run ended with
# DSPy's marks around the fields of an answer.
_FIELD = re.compile(r"\s*\[\[ ## (\w+) ## \]\]\s*")

RunId = Annotated[str, typer.Argument(help="run id, or how it begins; `agentkit log` lists runs")]


def explain(
    run_id: RunId,
    html: Annotated[Path | None, typer.Option(help="also write the page to this file")] = None,
) -> None:
    """Show what one run did and why: input (redacted), every step, decision and cost, effects, exact release.

    Names in free text are not recognised as personal data.
    """
    from rich.console import Console

    from agentkit_tracking.runlog import RunLog

    if html is not None:
        _check_writable(html)
    log = RunLog()
    record = log.find(run_id)
    children = log.sql("SELECT run_id FROM runs WHERE parent = ? ORDER BY started_at", [record.run_id])["run_id"]
    records = [record, *(log.find(child) for child in children)]
    out = terminal.console()
    pages = [out] if html is None else [out, Console(record=True, width=140, file=StringIO(), highlight=False)]
    for page in pages:
        for one in records:
            _page(page, one)
    if html is not None:
        try:
            html.write_text(pages[1].export_html(), encoding="utf-8")
        except OSError as e:
            raise UsageError(f"cannot write {html}: {e.strerror}") from e
        out.print(f"written to {terminal.short(html)}")


def _check_writable(file: Path) -> None:
    if not file.parent.is_dir():
        raise UsageError(f"cannot write {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise UsageError(f"cannot write {file}: it is a folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"cannot write {file}: no permission")


def _page(out: Console, record: RunRecord) -> None:
    from rich.markup import escape
    from rich.rule import Rule
    from rich.table import Table

    color = "green" if record.state == "DONE" and not record.degraded else "yellow" if record.state == "DONE" else "red"
    title = f"{record.system} · run {record.run_id}" + (f" · part of {record.parent[:12]}" if record.parent else "")
    out.print(Rule(escape(_lines(title))))
    out.print(f"[bold {color}]{record.state}[/] {escape(_ending(record))}")
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(record):
        facts.add_row(f"[dim]{escape(_lines(name))}[/dim]", escape(_lines(value)))
    out.print(facts)
    steps = Table("at, s", "took, s", "state", "agent", "what", "why or result", "USD", title="steps")
    for step in record.steps:
        what = f"→ {step.name}" if step.kind == "transition" else f"{step.kind} {step.name}"
        at = step.started + (step.seconds if step.kind == "transition" else 0)
        cost = f"{step.usd:.6f}" if step.kind == "model" else "from memory" if step.cached else ""
        color = "red" if step.error else "bold" if step.kind in ("decision", "approval") else ""
        words = [escape(_lines(text)) for text in (step.state, step.agent or "", what)]
        steps.add_row(f"{at:.3f}", f"{step.seconds:.3f}", *words, _cell(_shown(step)), cost, style=color or None)
    out.print(steps)
    if record.effects:
        effects = Table("effect", "arguments", "outcome", title="effects")
        for effect in record.effects:
            outcome = effect.get("outcome", "done")
            effects.add_row(_cell(effect["tool"]), _cell(_redacted(effect["arguments"])), _cell(outcome))
        out.print(effects)


def _redacted(value: Any) -> Any:
    from agentkit.redaction import redact

    return redact(value)


def _lines(text: str) -> str:
    """The text with its lines, and nothing in it that acts on a terminal or hides."""
    from agentkit_tracking.control.card import visible

    return "\n".join(visible(line) for line in text.split("\n"))


def _cell(value: Any) -> str:
    """One line for a table: as `_lines`, cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return terminal.clip(_lines(text))


def _ending(record: RunRecord) -> str:
    text = record.error or (f"with a lesser result, because of {record.degraded}" if record.degraded else "")
    return _cut(_lines(_redacted(text)), _ENDING)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    from agentkit.runs import REHEARSALS
    from agentkit_tracking.forwarding import trace_id

    phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in record.phases.items())
    rows = [(f"input {name}", str(value)) for name, value in _redacted(record.inputs).items()]
    rows += [(f"output {name}", str(value)) for name, value in _redacted(record.output or {}).items()]
    rows += [
        (f"found by then: {name}", _cut(str(value), 90)) for name, value in _redacted(record.partial or {}).items()
    ]
    rows += [
        ("release", _release(record)),
        ("route", record.route or "none"),
        ("when", f"{record.started_at}, {record.seconds:.3f} s ({phases}; {record.waited_s:.3f} s for a person)"),
        (
            "cost",
            f"USD {record.usd:.6f} · {record.model_calls} model calls, {record.tokens_in} + {record.tokens_out} tokens",
        ),
        ("acted for", " · ".join(x for x in (record.user_hash, record.session) if x) or "nobody in particular"),
        ("as", f"{record.kind}, stage {record.stage}"),
    ]
    if record.parent is None and record.kind not in REHEARSALS:
        rows.append(("trace", trace_id(record.run_id)))
    return rows


def _release(record: RunRecord) -> str:
    if record.release is None:
        return "draft, not registered"
    from mlflow.exceptions import MlflowException

    from agentkit_tracking import registry

    try:
        return f"{record.release} ({registry.resolve(record.release)}); see `agentkit show {record.release[:12]}`"
    except (ReleaseError, MlflowException):
        return f"{record.release}, which is not in this store"


def _shown(step: Step) -> Any:
    """What came of a step, redacted; of an approval first who answered, in full."""
    if step.kind != "approval" or step.error or not isinstance(step.outputs, dict):
        return _redacted(_result(step))
    said = step.outputs
    when = f"asked {_second(said.get('asked_at'))}, answered {_second(said.get('at'))}"
    rest = {name: said[name] for name in ("reason", "arguments") if said.get(name)}
    told = f"{said.get('verdict')} by {step.decided_by or 'nobody who is named'} ({when})"
    return f"{told}: {json.dumps(_redacted(rest), ensure_ascii=False)}" if rest else told


def _second(at: Any) -> str:
    """A time to the second, without its zone, which is UTC."""
    return str(at or "?")[:19]


def _result(step: Step) -> Any:
    if step.error:
        return step.error
    if step.kind == "model":
        return "; ".join(_FIELD.sub(r"\1: ", str(text)) for text in step.outputs or ())
    if step.kind == "decision":
        return f"{step.outputs}: {step.inputs}"
    return step.outputs if step.kind != "tool" else {"in": step.inputs, "out": step.outputs}


def replay(
    run_id: RunId,
    release: Annotated[
        str | None, typer.Option(help="what to run it with: name/3, name@alias, a release id, FILE.py")
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="on whose behalf it ran, where tools check that; the log has a hash")
    ] = None,
    trust: Trusted = False,
) -> None:
    """Run a recorded run again, its tools and people answering as recorded, and show the first step that differs.

    Nothing outside is changed: a call that would change something is answered from the record or fails. Without
    --release it runs the release that ran then. Exit code 3 when something differs.
    """
    from agentkit.callers import Caller, acting_for
    from agentkit.calls import intercept
    from agentkit.replays import Stubbed, first_difference
    from agentkit_tracking import loading, source
    from agentkit_tracking.runlog import RunLog

    before = RunLog().find(run_id)
    reference = release or before.release
    if reference is None:
        raise UsageError(f"run {before.run_id} was made by a draft; say what to run it with: --release")
    if reference.isdigit():
        reference = f"{before.system}/{reference}"
    is_file = reference.split(":")[0].endswith((".py", ".ipynb"))
    system = source.load_entry(source.parse_entry(reference)) if is_file else loading.load(reference, trust=trust)
    if user is not None and Caller(user).user_hash != before.user_hash:
        raise UsageError(f"run {before.run_id} did not act for {user!r}")
    with intercept(Stubbed(before)), acting_for(user) if user is not None else nullcontext():
        after = system.run(kind="replay", **before.inputs)
    difference = first_difference(before, after)
    out = terminal.console()
    out.print(
        f"run {before.run_id} by {_short(before.release)}: {before.state}, replayed by {_short(after.release)}: {after.state}"
    )
    if difference is None:
        out.print(f"[green]no difference[/green] in {len(before.steps)} steps")
        raise typer.Exit(OK)
    from rich.table import Table

    table = Table("", "then", "now", title=f"first difference: step {difference.number}")
    for name in ("kind", "name", "agent", "inputs", "outputs", "error"):
        cells = ["" if step is None else _cell(getattr(step, name)) for step in (difference.before, difference.after)]
        table.add_row(name, *cells, style=None if cells[0] == cells[1] else "bold yellow")
    out.print(table)
    if after.error and after.state != before.state:
        out.print(f"it ended: {_lines(after.error)}", markup=False)
    raise typer.Exit(DIFFERS)


def _short(release: str | None) -> str:
    return f"release {release[:12]}" if release else "a draft"
