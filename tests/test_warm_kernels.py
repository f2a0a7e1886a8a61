"""Kernels started ahead: as separate as any other, never stale, and gone with whoever started them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from agentkit_pipelines import notebook_runner, warm_kernels, warm_up
from agentkit_pipelines.notebook_runner import NotebookFailed, run_notebook
from agentkit_pipelines.warm_kernels import WarmKernels

LOOK = """
import json, os, sys
from pathlib import Path
found = {"pid": os.getpid(), "warm": "dspy" in sys.modules, "used": "left" in globals(), "cwd": os.getcwd()}
Path(output, "found.json").write_text(json.dumps(found | {"mark": os.environ.get("MARK")}))
left = "for the next"
exec(then)
"""


@pytest.fixture(autouse=True)
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook `look` that writes down where it runs, and then does what its parameter `then` says."""
    (tmp_path / "notebooks").mkdir()
    cells = [
        nbformat.v4.new_code_cell("then = ''\noutput = ''", metadata={"tags": ["parameters"]}, id="a"),
        nbformat.v4.new_code_cell(LOOK, id="b"),
    ]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "look.ipynb")
    monkeypatch.setattr(notebook_runner, "NOTEBOOKS", tmp_path / "notebooks")


def found(output: Path, then: str = "") -> dict[str, object]:
    """What the notebook says of the kernel that it ran in."""
    run_notebook("look", {"then": then}, output)
    return json.loads((output / "found.json").read_text())


def kernels_of(pid: int) -> list[psutil.Process]:
    """The kernels among a process's children, oldest first."""
    children = psutil.Process(pid).children()
    return [p for p in children if p.status() != psutil.STATUS_ZOMBIE and "ipykernel_launcher" in p.cmdline()]


def is_gone(process: psutil.Process, within_s: float = 10) -> bool:
    """Whether the process ends, in time."""
    deadline = time.monotonic() + within_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_each_notebook_has_a_warm_kernel_of_its_own_whatever_the_one_before_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTKIT_SIGNING_KEY", "a secret")  # is taken out of the environment, which fits all the same
    with WarmKernels():
        (first,) = kernels_of(os.getpid())
        assert "AGENTKIT_SIGNING_KEY" not in first.environ()
        assert found(tmp_path / "1")["pid"] == first.pid
        assert is_gone(first)
        (second,) = kernels_of(os.getpid())
        with pytest.raises(NotebookFailed, match="look: KeyError: 'gone'") as failed:
            run_notebook("look", {"then": "print('so far'); raise KeyError('gone')"}, tmp_path / "2")
        assert (failed.value.error_name, is_gone(second)) == ("KeyError", True)
        assert "so far" in failed.value.notebook.read_text()
        with pytest.raises(NotebookFailed, match="look: its kernel died"):
            run_notebook("look", {"then": "os.kill(os.getpid(), 9)"}, tmp_path / "3")
        (last,) = kernels_of(os.getpid())
    assert is_gone(last)
    seen = [json.loads((tmp_path / n / "found.json").read_text()) for n in "123"]
    assert [(s["warm"], s["used"]) for s in seen] == [(True, False)] * 3
    assert seen[1]["pid"] == second.pid
    assert len({s["pid"] for s in seen}) == 3


def test_a_kernel_started_elsewhere_or_in_another_environment_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WarmKernels():
        (stale,) = kernels_of(os.getpid())
        monkeypatch.setenv("MARK", "new")
        assert found(tmp_path / "1")["mark"] == "new"
        assert is_gone(stale)
        monkeypatch.chdir(tmp_path)
        assert found(tmp_path / "2")["cwd"] == str(tmp_path)


def test_a_kernel_that_died_while_it_waited_is_replaced(tmp_path: Path) -> None:
    with WarmKernels():
        (dead,) = kernels_of(os.getpid())
        dead.kill()
        assert is_gone(dead)
        assert found(tmp_path / "1")["pid"] != dead.pid


def test_a_kernel_that_dies_at_the_last_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_kernels._Kernel, "is_fit", lambda _: dead.kill() or is_gone(dead))
    with WarmKernels():
        (dead,) = kernels_of(os.getpid())
        assert found(tmp_path / "1")["pid"] != dead.pid


def test_where_no_kernel_can_be_started_ahead_notebooks_start_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(warm_kernels._Kernel, "__init__", fail)
    with WarmKernels():
        assert kernels_of(os.getpid()) == []
        assert found(tmp_path / "1")["warm"] is False
    assert found(tmp_path / "2")["warm"] is False


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_kernel_outlives_the_process_that_started_it(end: signal.Signals) -> None:
    script = (
        "import sys\nfrom agentkit_pipelines.warm_kernels import WarmKernels\n"
        "with WarmKernels():\n    print('ready', flush=True)\n    sys.stdin.readline()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        (kernel,) = kernels_of(process.pid)  # still at its imports, when ipykernel does not look after its parent yet
        process.send_signal(end)
    assert is_gone(kernel)


def test_everything_that_is_imported_ahead_is_there() -> None:
    assert [name for name in warm_up.MODULES if importlib.util.find_spec(name) is None] == []
