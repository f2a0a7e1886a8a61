"""The commands about keys, proof and history; part of `agentkit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal
from agentkit_pipelines.options import Golden, Reference, SystemName, Trusted, Why

NOT_PROVEN = 3
keys_app = typer.Typer(
    help="Signing keys. The private key belongs to whoever promotes; loaders and servers hold public ones in trust.json.",
    no_args_is_help=True,
)


@keys_app.command()
def init(
    owner: Annotated[str, typer.Option(help="a person or pipeline, as others will read it")],
) -> None:
    """Make a key pair: the private key for you alone (mode 0600), the public one into trust.json."""
    from agentkit_tracking import keys

    made = keys.create(owner)
    out = terminal.console()
    out.print(f"private key: {keys.key_path()} (for you alone; in CI put its text into {keys.KEY_ENV})", soft_wrap=True)
    out.print(f"public key {made.public.id} of {made.public.owner}, trusted in {keys.trust_path()}:", soft_wrap=True)
    out.print(made.public.pem, end="")
    out.print("give it to loaders and servers: agentkit keys trust FILE --owner NAME")


@keys_app.command("list")
def list_(
    pem: Annotated[bool, typer.Option("--pem", help="print the public keys for others")] = False,
) -> None:
    """List the trusted keys and which one you sign with."""
    from rich.table import Table

    from agentkit_tracking import keys
    from agentkit_tracking.statements import day

    trust, out = keys.load_trust(), terminal.console()
    if not trust.keys:
        out.print(
            f"no trusted keys in {keys.trust_path()}; `agentkit keys init --owner NAME` makes one", soft_wrap=True
        )
        return
    try:
        own = keys.signing_key().public.id
    except UsageError as e:
        own = ""
        out.print(f"you cannot sign: {e}", soft_wrap=True)
    table = Table("", "key", "owner", "status", "since", "why")
    for key in trust.keys:
        since = key.revoked or key.retired or key.created
        table.add_row("→" if key.id == own else "", key.id, key.owner, key.status, day(since), key.why)
    out.print(table)
    for key in trust.keys if pem else ():
        out.print(f"{key.id} {key.owner}\n{key.pem}")


@keys_app.command()
def trust(
    file: Annotated[Path, typer.Argument(help="public key, PEM")],
    owner: Annotated[str, typer.Option(help="whose it is, by your own knowledge")],
) -> None:
    """Trust somebody's public key on this machine or server."""
    from agentkit_tracking import keys

    key = keys.trust_key(_bytes_of(file), owner)
    terminal.console().print(f"{key.id} is now trusted as {key.owner}'s, in {keys.trust_path()}", soft_wrap=True)


@keys_app.command()
def rotate() -> None:
    """Make a new key for yourself. The old one retires: what it signed still counts, and it signs no more."""
    from agentkit_tracking import keys

    old, new = keys.rotate()
    out = terminal.console()
    out.print(f"{old.id} has retired, {new.public.id} signs from now on. Tell loaders and servers:")
    out.print(new.public.pem, end="")


@keys_app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="its id, or how it begins")],
    why: Why = "no reason given",
) -> None:
    """Take a key's word back, here: nothing it signed counts any more; what it put into production has to be promoted again."""
    from agentkit_tracking import keys

    gone = keys.revoke(key, why)
    terminal.console().print(
        f"{gone.id} ({gone.owner}) is revoked in {keys.trust_path()}; do so wherever it is trusted", soft_wrap=True
    )


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise UsageError(f"{file} cannot be read ({e.strerror})") from e


def verify(
    target: Annotated[str, typer.Argument(help="name@production, name/3, or a folder that --save wrote")],
    save: Annotated[
        Path | None, typer.Option(help="also write release, evidence and signatures into this new folder")
    ] = None,
    key: Annotated[
        list[Path] | None, typer.Option(help="public key, PEM, to trust instead of trust.json (for a folder)")
    ] = None,
) -> None:
    """Check signatures, history, hashes and the gate's verdict. A stranger needs only the folder and a public key.

    Exit code 3: something is not as it was signed.
    """
    from rich.markup import escape
    from rich.table import Table

    from agentkit_pipelines import verification
    from agentkit_tracking import keys

    if Path(target).is_dir():
        given = tuple(keys.public_key_from(_bytes_of(k), f"holder of {k.name}") for k in key or [])
        found = verification.verify_folder(Path(target), keys.Trust(keys=given) if given else keys.load_trust())
    elif key:
        raise UsageError("--key is for a folder; for a registered version the keys in trust.json count")
    else:
        found = verification.verify(target, save)
    table = Table("", f"verify {target}", show_header=True)
    for one in found:
        mark = "[green]✓[/green]" if not one.problem else "[red]✗[/red]" if one.blocks else "[yellow]![/yellow]"
        table.add_row(mark, escape(one.problem or one.what))
    terminal.console().print(table)
    wrong = [one for one in found if one.problem]
    word = (
        "not as signed"
        if any(c.blocks for c in wrong)
        else "signed and whole" + (f"; but {'; '.join(c.problem for c in wrong)}" if wrong else "")
    )
    terminal.console().print(
        f"[bold]{word}[/bold]" + (f" · saved as {terminal.short(save)}" if save and save.exists() else "")
    )
    raise typer.Exit(NOT_PROVEN if any(c.blocks for c in wrong) else 0)


def reproduce(
    reference: Reference,
    golden: Golden = None,
    recorded_only: Annotated[
        bool, typer.Option("--recorded-only", help="judge the recorded results; evaluate nothing")
    ] = False,
    trust: Trusted = False,
) -> None:
    """Judge a version's recorded results again, evaluate it again, and say how far that differs.

    Exit code 3: another verdict.
    """
    from agentkit_pipelines import verification

    with terminal.progress(f"evaluating {reference} again") as progress:
        found = verification.reproduce(reference, golden, run=not recorded_only, trust=trust, progress=progress)
    out = terminal.console()
    same = (
        "the same, rule by rule"
        if found.recorded == found.judged_again
        else f"NOT the same: {found.judged_again.verdict}"
    )
    out.print(
        f"{found.version}: recorded verdict {found.recorded.verdict}; from the recorded results: [bold]{same}[/bold]"
    )
    if found.run_again is not None:
        was, now = found.success
        out.print(
            f"evaluated again, {found.runs} runs: verdict [bold]{found.run_again.verdict}[/bold], success {now:.3f} (was "
            f"{was:.3f}); the same output in {found.same_output:.1%} of the runs, the same success in {found.same_success:.1%}"
        )
        if found.changed_cases:
            more = f" and {len(found.changed_cases) - 20} more" if len(found.changed_cases) > 20 else ""
            out.print(f"cases that changed: {', '.join(found.changed_cases[:20])}{more}")
        out.print(f"[dim]{terminal.short(found.folder)}[/dim]")
    raise typer.Exit(0 if found.holds else NOT_PROVEN)


def history(system: SystemName) -> None:
    """Who was in production when, by what evidence, signed by whom, and why it left."""
    from rich.markup import escape
    from rich.table import Table

    from agentkit_tracking.history import WORDS
    from agentkit_tracking.production import history_of
    from agentkit_tracking.statements import day

    found = history_of(system)
    if not found.entries:
        raise UsageError(f"nothing was ever in production of {system}; `agentkit promote {system}`")
    table = Table("#", "when", "what", "until", "signed by", "evidence", "why", title=f"production of {system}")
    for i, entry in enumerate(found.entries):
        move = entry.move
        after = found.entries[i + 1].move.time if i + 1 < len(found.entries) else None
        proof = f"{move.evidence.verdict} {move.evidence.sha256[:12]}" if move.evidence else ""
        what = f"{WORDS[move.event]} {system}/{move.version or move.left_version}"
        signed = escape(entry.who) + (f" [red]✗ {escape(entry.problem)}[/red]" if entry.problem else "")
        until = day(after) if after else "" if move.version is None else "now"
        table.add_row(str(move.sequence), day(move.time), what, until, signed, proof, escape(move.why))
    terminal.console().print(table)
    terminal.console().print("[dim]each entry holds the hash of the one before; see agentkit verify[/dim]")
