"""What people see of a question: the card, the commands, the notebook as a script."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import html
import subprocess
import sys
from pathlib import Path

import pytest
from approvals_desk import HOSTILE
from test_control import own_control, plane, request_for  # noqa: F401
from typer.testing import CliRunner

from agentkit.errors import UsageError
from agentkit_pipelines.approvals_cli import approvals_app
from agentkit_tracking.control import ControlPlane
from agentkit_tracking.control.card import card, visible

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "approvals.py"


# ---- the card


def words(text_: str) -> int:
    return len(html.unescape(text_).split())


def test_a_card_says_what_why_and_what_is_decided_within_30_seconds(plane: ControlPlane) -> None:
    asked = request_for(doing="The customer was charged twice. " * 40, reason="Because of a long rule. " * 40)
    shown = card(plane.desk.get(plane.desk.ask(asked)))
    assert "May billing call issue" in shown
    for part in ("What it was doing", "Why it stops", "The call", "Decide:", "usd = 80.0", "Confidence 0.93", "24 h"):
        assert part in shown
    assert "characters more)" in shown
    call = shown[shown.index("```") : shown.rindex("```")]
    assert words(shown) - words(call) <= 115  # 30 s at 238 words a minute, which is usual
    usual = card(plane.desk.get(plane.desk.ask(request_for("usual"))))
    assert words(usual) <= 75


def test_a_card_renders_no_markup_of_an_agent(plane: ControlPlane) -> None:
    from markdown_it import MarkdownIt

    hostile = request_for(
        agent=HOSTILE, tool=HOSTILE, arguments={HOSTILE: f"```\n{HOSTILE}", "b": "````"}, doing=HOSTILE, reason=HOSTILE
    )
    shown = card(plane.desk.get(plane.desk.ask(hostile)))
    assert all(c == "\n" or c.isprintable() for c in shown)
    rendered = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(shown)
    for tag in ("<script", "<a ", "<img", "<table", "<em>", "<h1", 'javascript:alert(1)"'):
        assert tag not in rendered
    assert rendered.count("<h3>") == 1
    assert rendered.count("<pre>") == 1  # no argument closes the block
    outside = rendered[: rendered.index("<pre>")] + rendered[rendered.index("</pre>") :]
    assert "<strong>bold" not in outside
    assert visible("a\u202eb\x1b\nc\u00a0d") == "a\\u{202e}b\\u{1b} c d"


def test_many_and_long_arguments_are_counted_not_shown(plane: ControlPlane) -> None:
    asked = request_for(arguments={f"a{i}": "x" * 1000 for i in range(30)})
    shown = card(plane.desk.get(plane.desk.ask(asked)))
    assert "18 more arguments are not shown here" in shown
    assert "(842 characters more)" in shown
    assert len(shown) < 4000


# ---- the commands


def cli(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(approvals_app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_the_commands_list_show_and_decide(plane: ControlPlane) -> None:
    assert "nothing waits" in cli("list")
    one, other = plane.desk.ask(request_for("1")), plane.desk.ask(request_for("2"))
    third = plane.desk.ask(request_for("3"))
    assert one in cli("list")
    assert "May billing call issue_refund?" in cli("show", one[:6])
    assert '"run_id": "ffff' in cli("show", one, "--full")
    with pytest.raises(UsageError, match="say why"):
        cli("approve", one, "--set", "usd=40")
    with pytest.raises(UsageError, match="there is no argument 'eur'"):
        cli("approve", one, "--set", "eur=40", "--why", "x")
    with pytest.raises(UsageError, match="is no JSON"):
        cli("approve", one, "--set", "usd=forty", "--why", "x")
    said = cli("approve", one, "--set", "usd=40", "--set", "order_id=12", "--why", "only [half]")
    assert "modified by" in said
    assert "only [half]" in said
    assert plane.desk.decision(one).arguments == {"order_id": "12", "usd": 40}  # type: ignore[union-attr]
    assert "approved by" in cli("approve", other)
    assert cli("reject", third, code=2)  # --why is required
    assert "rejected by" in cli("reject", third, "--why", "fraud")
    with pytest.raises(UsageError, match="is decided: rejected by"):
        cli("approve", third)
    assert "fraud" in cli("list", "--all")
    with pytest.raises(UsageError, match="no approval begins"):
        cli("show", "zzz0")


def test_the_commands_print_no_terminal_codes_of_an_agent(plane: ControlPlane) -> None:
    identity = plane.desk.ask(request_for(arguments={"to": HOSTILE}, doing=HOSTILE, reason=HOSTILE, agent=HOSTILE))
    for said in (cli("list"), cli("show", identity), cli("show", identity, "--full"), cli("list", "--all")):
        assert "\x1b[31m" not in said
        assert "\u202e" not in said


# ---- the notebook (what people see of it: test_approvals_ui.py)


def test_it_passes_marimo_check_and_runs_as_a_script_with_and_without_approvals(plane: ControlPlane) -> None:
    marimo = [sys.executable, "-m", "marimo", "check", "--strict", str(NOTEBOOK)]
    for command in (marimo, [sys.executable, str(NOTEBOOK)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    plane.desk.decide(plane.desk.ask(request_for("1")), "approve")
    plane.desk.ask(request_for("2"))
    done = subprocess.run([sys.executable, str(NOTEBOOK)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_picture_is_small() -> None:
    picture = NOTEBOOK.with_suffix(".png")
    assert picture.stat().st_size < 150_000
