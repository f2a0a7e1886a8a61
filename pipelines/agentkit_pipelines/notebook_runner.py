"""Runs the papermill notebooks: parameters checked by name, progress shown, the executed notebook always kept."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from agentkit.errors import AgentkitError, UsageError
from agentkit_tracking.home import write_whole
from agentkit_tracking.keys import take_from_environment

NOTEBOOKS = Path(__file__).parent / "notebooks"
KERNEL = "python3"
PROGRESS_FILE = "progress.json"
Progress = Callable[[int, int], None]


class NotebookFailed(AgentkitError):
    """A cell of a pipeline notebook raised; the executed notebook holds everything up to it."""

    def __init__(self, message: str, notebook: Path, error_name: str) -> None:
        super().__init__(message)
        self.notebook, self.error_name = notebook, error_name


def parameters_of(notebook: Path) -> dict[str, Any]:
    """The parameters that a notebook's tagged cell declares."""
    import papermill

    return dict(papermill.inspect_notebook(str(notebook)))


def run_notebook(name: str, parameters: Mapping[str, Any], output: Path, progress: Progress | None = None) -> Path:
    """Execute `notebooks/<name>.ipynb` in a kernel of its own; returns the executed notebook.

    The kernel is started now, or within `with WarmKernels():` has been started ahead.

    Args:
        output: folder for the executed notebook and whatever the notebook writes (its parameter `output`).
        progress: called about twice a second with the (done, total) that the notebook reports.

    Raises:
        UsageError: the notebook has no such parameter (papermill itself would only warn and run with the default).
        NotebookFailed: a cell raised, or the kernel died.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source = NOTEBOOKS / f"{name}.ipynb"
    known = parameters_of(source)
    if unknown := sorted(set(parameters) - set(known)):
        raise UsageError(f"notebook {name} has no parameter {', '.join(unknown)}; it takes {', '.join(known)}")
    output.mkdir(parents=True, exist_ok=True)
    executed = output / f"{name}.ipynb"
    with _watching(output / PROGRESS_FILE, progress), kernel_source.get()() as options:
        try:
            papermill.execute_notebook(
                str(source),
                str(executed),
                parameters={**parameters, "output": str(output)},
                kernel_name=KERNEL,
                progress_bar=False,
                cwd=os.getcwd(),
                **options,
            )
        except PapermillExecutionError as e:
            raise NotebookFailed(f"{name}: {e.ename}: {e.evalue} (see {executed})", executed, e.ename) from e
        except DeadKernelError as e:  # killed, or out of memory
            raise NotebookFailed(f"{name}: its kernel died (see {executed})", executed, type(e).__name__) from e
    return executed


@contextmanager
def kernel_options() -> Iterator[dict[str, Any]]:
    """Talk to the kernel over Unix sockets in a folder of ours: TCP on loopback is open to every local user."""
    from traitlets.config import Config

    take_from_environment()
    options: dict[str, Any] = {"extra_arguments": ["--IPKernelApp.log_level=50"]}  # its shutdown logs an error
    if os.name != "posix":
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="ak-") as folder:
        socket = {"transport": "ipc", "ip": f"{folder}/k"}  # short: socket paths end at about 100 characters
        yield {**options, "config": Config({"KernelManager": socket, "AsyncKernelManager": socket})}


# Gives the options of `papermill.execute_notebook` that decide on the kernel, for the time of one notebook.
kernel_source: ContextVar[Callable[[], AbstractContextManager[dict[str, Any]]]] = ContextVar(
    "kernel_source", default=kernel_options
)


def report_progress(output: str | Path) -> Progress:
    """For use inside a notebook: writes progress where `run_notebook` looks for it, at most five times a second."""
    import time

    path, last = Path(output) / PROGRESS_FILE, [0.0]

    def report(done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last[0] > 0.2:
            last[0] = now
            write_whole(path, json.dumps([done, total]).encode())

    return report


@contextmanager
def _watching(path: Path, progress: Progress | None) -> Iterator[None]:
    path.unlink(missing_ok=True)
    if progress is None:
        yield
        return
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.4):
            _pass_on(path, progress)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        _pass_on(path, progress)
        path.unlink(missing_ok=True)


def _pass_on(path: Path, progress: Progress) -> None:
    try:
        done, total = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    progress(done, total)
