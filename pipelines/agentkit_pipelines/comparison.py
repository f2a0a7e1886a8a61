"""What differs between two releases, as lines for people."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from agentkit_tracking import loading, registry
from agentkit_tracking.manifest import SOURCE, Manifest, differing


def differences(old: str, new: str) -> list[str]:
    """Headings (`# …`), unified diffs of prompts and source files, and `- / +` pairs of settings; empty if none."""
    a, b = (_fetched(reference) for reference in (old, new))
    lines: list[str] = []
    for name in sorted(a[1].prompts.keys() | b[1].prompts.keys()):
        before, after = (registry.prompt_text(m.prompts[name]) if name in m.prompts else "" for _, m in (a, b))
        lines += _titled(f"prompt {name}", _unified(before, after))
    settings: tuple[tuple[str, Any, Any], ...] = (
        ("spec", a[1].spec, b[1].spec),
        ("model", {"model": a[1].model, "weights": a[1].weights}, {"model": b[1].model, "weights": b[1].weights}),
        ("parameters", a[1].parameters, b[1].parameters),
        ("environment", {"lock": a[1].lock, **a[1].packages}, {"lock": b[1].lock, **b[1].packages}),
    )
    for title, was, now in settings:
        lines += _titled(title, [x for path, o, n in differing(was, now) for x in (f"- {path}: {o}", f"+ {path}: {n}")])
    for path in sorted(a[1].files.keys() | b[1].files.keys()):
        if a[1].files.get(path) != b[1].files.get(path):
            lines += _titled(f"file {path}", _unified(_text(a[0], path), _text(b[0], path)))
    return lines


def _fetched(reference: str) -> tuple[Path, Manifest]:
    """A release to read, not to run: its hashes are checked, nobody needs to vouch for it."""
    if loading.is_folder(reference):
        return registry.fetch_folder(Path(reference))
    return registry.fetch_version(loading.resolve(reference))


def _titled(title: str, lines: list[str]) -> list[str]:
    return [f"# {title}", *lines] if lines else []


def _unified(before: str, after: str) -> list[str]:
    return list(difflib.unified_diff(before.splitlines(), after.splitlines(), "", "", lineterm="", n=2))[2:]


def _text(folder: Path, path: str) -> str:
    file = folder / SOURCE / path
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
