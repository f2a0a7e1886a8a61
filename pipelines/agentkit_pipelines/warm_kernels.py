"""Kernels started ahead, with their imports done: an evaluation in one of them begins at once.

A kernel serves one notebook and is thrown away, like any other: releases execute their own source in it. While it
serves, the next one is warmed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.util import ensure_async, run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from agentkit_pipelines import warm_up
from agentkit_pipelines.notebook_runner import KERNEL, kernel_options

_ENGINE = "agentkit-warm"
_log = logging.getLogger(__name__)


class WarmKernels:
    """Keeps one kernel warm for `run_notebook(…, kernels=…)`; a context manager, no kernel outlives it.

    A kernel has the working directory and the environment variables of the moment it was started. When these are
    others now, or the kernel has died, the notebook gets a new one of its own, which only takes longer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: _Kernel | None = None

    def __enter__(self) -> WarmKernels:
        self._warm_next()
        return self

    def __exit__(self, *_: object) -> None:
        self._replace(None)

    @contextmanager
    def taken(self) -> Iterator[dict[str, Any]]:
        """The options of `papermill.execute_notebook` that make it use the warm kernel, which ends with the block."""
        with self._lock:
            kernel, self._next = self._next, None
        try:
            if kernel is not None and not kernel.is_fit():
                kernel.end()
                kernel = None
            self._warm_next()
            yield {} if kernel is None else {"engine_name": _ENGINE, "manager": kernel.manager}
        finally:
            if kernel is not None:
                kernel.end()

    def _warm_next(self) -> None:
        try:
            self._replace(_Kernel())
        except OSError as e:  # no memory, say: notebooks start kernels of their own
            _log.warning("no kernel could be started ahead: %s", e)

    def _replace(self, kernel: _Kernel | None) -> None:
        with self._lock:
            before, self._next = self._next, kernel
        if before is not None:
            before.end()


class _Kernel:
    """A kernel process that imports what is heavy, or has done so and waits, with its socket folder."""

    def __init__(self) -> None:
        self._place = _here()
        with ExitStack() as stack:
            options = stack.enter_context(kernel_options())
            options["extra_arguments"] += [f"--IPKernelApp.extra_extensions={warm_up.__name__}"]
            client = NotebookClient(nbformat.v4.new_notebook(), kernel_name=KERNEL, **options)
            self.manager: KernelManager = client.create_kernel_manager()
            client.start_new_kernel(cwd=self._place[0])
            self._folder = stack.pop_all()

    def is_fit(self) -> bool:
        """Whether it lives, and a kernel started now would be no other."""
        return self._place == _here() and bool(run_sync(_is_alive)(self.manager))

    def end(self) -> None:
        """Kill it, if it is still there."""
        with self._folder:
            if self.manager.has_kernel:
                run_sync(_kill)(self.manager)


async def _is_alive(manager: KernelManager) -> bool:
    return bool(await ensure_async(manager.is_alive()))


async def _kill(manager: KernelManager) -> None:
    await ensure_async(manager.shutdown_kernel(now=True))


def _here() -> tuple[str, dict[str, str]]:
    return os.getcwd(), dict(os.environ)


class _WarmEngine(NBClientEngine):  # type: ignore[misc]
    """Papermill's engine with a kernel that is there already; should that one not answer, it starts its own."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, manager: KernelManager, start_timeout: float = 60, **options: Any
    ) -> None:
        chosen = {k: options[k] for k in ("extra_arguments", "config") if k in options}
        client = PapermillNotebookClient(
            nb_man, manager, kernel_name=kernel_name, startup_timeout=start_timeout, **chosen
        )
        client.owns_km = True  # shut down in order and cleaned up after the last cell, as one of its own
        try:
            client.start_new_kernel_client()
        except RuntimeError:  # died at the last moment; no cell has run yet
            _log.info("the warm kernel died, starting another")
            client.km = client.kc = None
        client.execute()


papermill_engines.register(_ENGINE, _WarmEngine)
