"""MCP on the command line: what a server offers, and the declaration that is printed for a grant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mcp_servers import HOSTILE
from typer.testing import CliRunner

from agentkit.errors import UsageError
from agentkit_pipelines.mcp_cli import mcp_app


def test_list_shows_what_there_is_to_judge() -> None:
    done = CliRunner().invoke(mcp_app, ["list", " ".join(HOSTILE)])
    assert done.exit_code == 0, done.output
    for expected in ("echo", "Say it back.", "HIDDEN CHARACTERS", "destructive", "invalid-schema", "all denied until"):
        assert expected in done.output
    listed = json.loads(CliRunner().invoke(mcp_app, ["list", " ".join(HOSTILE), "--json"]).output)
    assert {t["name"] for t in listed} >= {"echo", "delete-all"}


def test_the_printed_declaration_works_in_another_process(tmp_path: Path) -> None:
    done = CliRunner().invoke(mcp_app, ["grant", " ".join(HOSTILE), "echo", "--permission", "read"])
    assert done.exit_code == 0, done.output
    script = tmp_path / "pasted.py"
    body = done.output.replace("ak.mcp.", "mcp.")
    script.write_text(f"from agentkit import mcp\n\n{body}\nprint(mcp_servers_echo(text='pasted')['content'])\n")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "pasted\n", ran.stderr


def test_a_declaration_keeps_the_names_of_secrets_and_not_the_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESK_TOKEN", "super-secret-value")
    given = [" ".join(HOSTILE), "echo", "--permission", "read", "--env", "TOKEN=${DESK_TOKEN}"]
    printed = CliRunner().invoke(mcp_app, ["grant", *given]).output
    assert "env={'TOKEN': '${DESK_TOKEN}'}" in printed
    assert "super-secret-value" not in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "http://127.0.0.1:9/mcp", "--env", "A=b"],
        ["list", "true", "--header", "A=b"],
        ["list", "true", "--env", "A"],
        ["list", ""],
        ["grant", " ".join(HOSTILE), "delete-all", "--permission", "read"],
        ["grant", " ".join(HOSTILE), "echo", "--permission", "everything"],
    ],
)
def test_wrong_use_is_said(arguments: list[str]) -> None:
    done = CliRunner().invoke(mcp_app, arguments)
    assert isinstance(done.exception, UsageError)
