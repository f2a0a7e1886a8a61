"""Kernels started ahead, with their imports done: a notebook in one of them begins at once.

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
from agentkit_pipelines.notebook_runner import KERNEL, kernel_options, kernel_source
from agentkit_tracking.home import prepare_environment

_ENGINE = "agentkit-warm"
_log = logging.getLogger(__name__)


class WarmKernels:
    """Within `with WarmKernels():` every pipeline notebook gets a kernel that was warmed before; none outlives the block.

    A kernel has the working directory and the environment variables of the moment it was started. When these are
    others now, or the kernel has died, the notebook gets a new one, which only takes longer. So does one that runs in
    another thread. `served` counts the notebooks that ended.
    """

    def __init__(self) -> None:
        self.served = 0
        self._lock = threading.Lock()
        self._next: _Kernel | None = None

    def __enter__(self) -> WarmKernels:
        # What they and we set in the environment is set now; after the first kernel it would make that one unfit.
        import polars  # noqa: F401

        prepare_environment()
        self._warm_next()
        self._before = kernel_source.set(self._taken)
        return self

    def __exit__(self, *_: object) -> None:
        self._replace(None)
        kernel_source.reset(self._before)

    @contextmanager
    def _taken(self) -> Iterator[dict[str, Any]]:
        """`kernel_options`, and the warm kernel if there is a fit one. It ends with the block."""
        kernel = self._take()
        try:
            with kernel_options() as options:
                if kernel is not None:
                    options |= {"engine_name": _ENGINE, "manager": kernel.manager}
                self._warm_next()
                yield options
        finally:
            self.served += 1
            if kernel is not None:
                kernel.end()

    def _take(self) -> _Kernel | None:
        with self._lock:
            kernel, self._next = self._next, None
        if kernel is None or kernel.is_fit():
            return kernel
        kernel.end()
        return None

    def _warm_next(self) -> None:
        try:
            self._replace(_Kernel())
        except OSError as e:  # no memory, say; a notebook still tries for itself
            _log.warning("no kernel could be started ahead: %s", e)

    def _replace(self, kernel: _Kernel | None) -> None:
        with self._lock:
            before, self._next = self._next, kernel
        if before is not None:
            before.end()


class _Kernel:
    """A kernel process that imports what is heavy, or has done so and waits."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            options = stack.enter_context(kernel_options())
            self._place = _here()  # now that the signing key has been taken out of it
            options["extra_arguments"] += [f"--IPKernelApp.extra_extensions={warm_up.__name__}"]
            client = NotebookClient(nbformat.v4.new_notebook(), kernel_name=KERNEL, **options)
            self.manager: KernelManager = client.create_kernel_manager()
            client.start_new_kernel(cwd=os.getcwd())
            self._sockets = stack.pop_all()

    def is_fit(self) -> bool:
        """Whether it lives, and one started now would be no different."""
        return self._place == _here() and bool(run_sync(_is_alive)(self.manager))

    def end(self) -> None:
        """Kill it, if it is still there."""
        with self._sockets:
            if self.manager.has_kernel:
                run_sync(_kill)(self.manager)


def _here() -> tuple[str, dict[str, str]]:
    return os.getcwd(), dict(os.environ)


async def _is_alive(manager: KernelManager) -> bool:
    return bool(await ensure_async(manager.is_alive()))


async def _kill(manager: KernelManager) -> None:
    await ensure_async(manager.shutdown_kernel(now=True))


class _WarmEngine(NBClientEngine):  # type: ignore[misc]
    """Papermill's engine, with a kernel that is there already. Should it not answer, nbclient starts its own."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, manager: KernelManager, start_timeout: float = 60, **options: Any
    ) -> None:
        own = {name: options[name] for name in ("extra_arguments", "config") if name in options}
        client = PapermillNotebookClient(nb_man, manager, kernel_name=kernel_name, startup_timeout=start_timeout, **own)
        client.owns_km = True  # so it is shut down and cleaned up after the last cell as one of its own
        try:
            client.start_new_kernel_client()
        except RuntimeError:  # died at the last moment; no cell has run yet
            _log.info("the warm kernel died, another is started")
            client.km = client.kc = None
        client.execute()


papermill_engines.register(_ENGINE, _WarmEngine)
