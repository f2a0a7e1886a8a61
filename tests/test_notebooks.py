"""Every notebook in notebooks/ is checked and runs top to bottom, offline, with nothing but the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT

FOLDER = ROOT / "notebooks"
MARIMO = sorted(p.name for p in FOLDER.glob("*.py"))
JUPYTER = sorted(p.name for p in FOLDER.glob("*.ipynb"))


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, env=os.environ.copy())


@pytest.mark.parametrize("name", MARIMO)
def test_marimo_check_finds_nothing(name):
    done = run(sys.executable, "-m", "marimo", "check", "--strict", str(FOLDER / name))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_in_the_notebook_pass():
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(NOTEBOOK))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


@pytest.mark.slow
def test_a_release_answers_the_dev_set_in_another_process_as_it_did_here(tmp_path):
    """Prompts, demonstrations and weights come back whole: every field of every answer is the same."""
    import json

    import support_triage as st

    import agentkit as ak
    from agentkit_tracking.registry import register

    triage = st.tuned(st.system())
    inputs = [e.inputs for e in ak.read_examples(st.DATA / "dev.jsonl")]
    here = [triage.run(**i).output for i in inputs]
    version = register(triage, source=st.__file__)
    script = (
        "import json, sys\nimport agentkit_tracking as at\n"
        f"triage = at.load({str(version)!r})\n"
        "assert 'support_triage' not in sys.modules\n"
        "print(json.dumps([triage.run(**i).output for i in json.load(sys.stdin)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(inputs), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here


@pytest.mark.slow
@pytest.mark.parametrize("name", MARIMO)
def test_marimo_notebook_runs_top_to_bottom(name, tmp_path):
    page = tmp_path / "page.html"
    done = run(sys.executable, "-m", "marimo", "export", "html", str(FOLDER / name), "-o", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", JUPYTER)
def test_jupyter_notebook_runs_top_to_bottom(name, tmp_path):
    import papermill

    executed = tmp_path / name
    papermill.execute_notebook(str(FOLDER / name), str(executed), cwd=str(FOLDER), progress_bar=False)
    cells = nbformat.read(executed, as_version=4).cells
    assert all(c.execution_count for c in cells if c.cell_type == "code")
    shown = executed.read_text()
    assert "everybody gets a refund" in shown
    assert "is not what notebooks/support_triage.py on disk defines" in shown


@pytest.mark.parametrize("name", JUPYTER)
def test_committed_jupyter_notebooks_hold_no_outputs(name):
    cells = nbformat.read(FOLDER / name, as_version=4).cells
    assert all(not c.outputs and c.execution_count is None for c in cells if c.cell_type == "code")


def test_the_system_imports_as_a_module_and_refunds_only_below_the_limit():
    import support_triage as st

    import agentkit as ak

    assert Path(st.__file__) == NOTEBOOK
    triage = st.system()
    # ORD-10003 is refundable with $14.99, ORD-10013 with $129.00 (data/support/orders.jsonl).
    small = triage.run(ticket="Please refund ORD-10003, I was charged twice", customer_id="C-0001")
    large = triage.run(ticket="Please refund ORD-10013, I was charged twice", customer_id="C-0002")
    assert (small.output["action"], [e["tool"] for e in small.effects]) == ("refund", ["issue_refund"])
    assert (large.output["action"], large.effects) == ("escalate", [])
    with ak.approve_with(lambda request: request.arguments == {"order_id": "ORD-10013", "amount_usd": 129.0}):
        approved = triage.run(ticket="Please refund ORD-10013, I was charged twice", customer_id="C-0002")
    assert (approved.output["action"], len(approved.effects)) == ("refund", 1)


def test_an_order_of_somebody_else_is_neither_shown_nor_refunded():
    import support_triage as st

    record = st.system().run(ticket="Please refund ORD-10013, I was charged twice", customer_id="C-0001")
    assert record.output["action"] == "answer"
    assert record.effects == []
    assert st.lookup_order(customer_id="C-0001", order_id="ORD-10013") is None


def test_only_the_billing_agent_holds_the_refund_tool():
    import support_triage as st

    agents = st.system().spec()["agents"]
    assert [name for name, agent in agents.items() if "issue_refund" in agent["tools"]] == ["billing"]
