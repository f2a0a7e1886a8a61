"""The package root: what is public, and that importing it costs nothing yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import agentkit

HEAVY = {
    "dspy",
    "litellm",
    "sklearn",
    "scipy",
    "numpy",
    "polars",
    "mlflow",
    "duckdb",
    "papermill",
    "pandas",
    "pydantic",
}


def test_public_names_are_sorted_and_can_all_be_imported() -> None:
    assert agentkit.__all__ == sorted(agentkit.__all__)
    assert len(set(agentkit.__all__)) == len(agentkit.__all__)
    for name in agentkit.__all__:
        assert getattr(agentkit, name) is not None
    assert set(agentkit.__all__) < set(dir(agentkit))
    assert agentkit.metrics.exact("queue").__name__ == "queue"


def test_public_things_are_documented() -> None:
    assert [n for n in agentkit.__all__ if not (getattr(agentkit, n).__doc__ or "").strip()] == []


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'agentkit' has no attribute 'Agnet'"):
        _ = agentkit.Agnet


def loaded(code: str) -> set[str]:
    """The heavy packages a fresh process has loaded after `code`."""
    script = f"import sys\n{code}\nprint('loaded:', *{{m.split('.')[0] for m in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return HEAVY & set(done.stderr.rpartition("loaded:")[2].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import agentkit as ak; ak.__version__; dir(ak)") == set()


def test_budgets_states_and_tools_do_not_need_dspy() -> None:
    assert "dspy" not in loaded(
        "import agentkit as ak; ak.Budget; ak.State; ak.diagram(); ak.read_examples\n"
        "def add(a: int) -> int:\n    'Add.'\n    return a + 1\n"
        "assert ak.tool(add)(1) == 2"
    )


def test_the_help_of_the_command_line_loads_nothing_heavy() -> None:
    heavy = loaded(
        "from agentkit_pipelines.cli import main\n"
        "sys.argv = ['agentkit', '--help']\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code"
    )
    assert heavy == set()


def test_the_installed_command_answers_for_help() -> None:
    command = Path(sys.executable).with_name("agentkit")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "LLM agents from notebook to production" in done.stdout
