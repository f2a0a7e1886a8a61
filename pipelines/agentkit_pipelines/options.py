"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Reference = Annotated[str, typer.Argument(help="name@alias, name/3, name (newest), or a release id")]
SystemName = Annotated[str, typer.Argument(help="name of the system")]
Golden = Annotated[Path | None, typer.Option(help="golden set, JSONL [default: data/<system>/golden.jsonl]")]
Repeats = Annotated[int | None, typer.Option(min=1, help="runs per case [default: 8 free model, 3 paid]")]
Seed = Annotated[int, typer.Option(help="of the input perturbations; alike for all versions you compare")]
Workers = Annotated[int | None, typer.Option(min=1, help="runs at the same time [default: by model]")]
Trusted = Annotated[bool, typer.Option("--trust", help="execute it although nobody trusted here vouches for it")]
MaxUsd = Annotated[float | None, typer.Option(min=0, help="stop hard before more than this is spent")]
Why = Annotated[str, typer.Option(help="recorded")]
SignedWhy = Annotated[str, typer.Option(help="recorded with who and when")]
