"""Pipeline notebooks in real kernels: wrong parameters are refused, and what was executed is kept, whatever happens."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from agentkit.errors import UsageError
from agentkit_pipelines import notebook_runner
from agentkit_pipelines.notebook_runner import NOTEBOOKS, NotebookFailed, parameters_of, report_progress, run_notebook


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook of two cells, with the parameters `x` and `output`, in place of ours."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(notebook_runner, "NOTEBOOKS", folder)
    return folder / "tiny.ipynb"


def write(path: Path, work: str) -> None:
    parameters = nbformat.v4.new_code_cell("x = 1\noutput = ''", metadata={"tags": ["parameters"]}, id="a")
    cells = [
        parameters,
        nbformat.v4.new_code_cell("print('before', x)", id="b"),
        nbformat.v4.new_code_cell(work, id="c"),
    ]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def printed(notebook: Path) -> str:
    return "".join(o.get("text", "") for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", ()))


def test_a_parameter_that_the_notebook_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="notebook evaluate has no parameter threshholds; it takes version, golden, thres"
    ):
        run_notebook("evaluate", {"threshholds": "x.yaml"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["evaluate", "batch"])
def test_our_notebooks_declare_their_parameters_in_one_tagged_cell_and_hold_no_output(name: str) -> None:
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    assert sum("parameters" in c.metadata.get("tags", ()) for c in cells) == 1
    assert {"version", "output", "workers", "max_usd"} <= parameters_of(NOTEBOOKS / f"{name}.ipynb").keys()
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells)


def test_parameters_reach_the_kernel_and_its_progress_reaches_the_caller(tiny: Path, tmp_path: Path) -> None:
    write(
        tiny, "import json, pathlib\npathlib.Path(output, 'progress.json').write_text(json.dumps([3, 4]))\nprint(x * 2)"
    )
    seen: list[tuple[int, int]] = []
    executed = run_notebook("tiny", {"x": 21}, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert (executed, printed(executed)) == (tmp_path / "out" / "tiny.ipynb", "before 21\n42\n")
    assert (3, 4) in seen
    assert not (tmp_path / "out" / "progress.json").exists()


def test_a_cell_that_raises_is_named_and_everything_up_to_it_is_kept(tiny: Path, tmp_path: Path) -> None:
    write(tiny, "raise KeyError('gone')")
    with pytest.raises(NotebookFailed, match="tiny: KeyError: 'gone'") as failed:
        run_notebook("tiny", {}, tmp_path / "out")
    assert failed.value.error_name == "KeyError"
    assert printed(failed.value.notebook) == "before 1\n"


def test_a_kernel_that_is_killed_is_said_and_everything_up_to_it_is_kept(tiny: Path, tmp_path: Path) -> None:
    write(tiny, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(NotebookFailed, match="tiny: its kernel died") as failed:
        run_notebook("tiny", {}, tmp_path / "out")
    assert printed(failed.value.notebook) == "before 1\n"


def test_progress_is_written_whole_and_not_too_often(tmp_path: Path) -> None:
    report, path = report_progress(tmp_path), tmp_path / "progress.json"
    seen = []
    for done in range(1, 101):
        report(done, 100)
        seen.append(json.loads(path.read_text()))
    assert seen[-1] == [100, 100]  # the end is always said
    assert len({tuple(s) for s in seen}) < 10
