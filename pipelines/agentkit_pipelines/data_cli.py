"""The commands about files of examples: `agentkit data …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal
from agentkit_pipelines.gate_cli import OK, WRONG_USE

data_app = typer.Typer(help="Check and import files of examples.", no_args_is_help=True)


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
