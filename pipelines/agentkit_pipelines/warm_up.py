"""The kernel's side of `warm_kernels`: an IPython extension that imports, before any cell, what evaluations need."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import threading
import time

# What the pipeline notebooks import, and what is imported for them later on; nothing of the project's own, which every
# release brings along. Not duckdb: its binding complains at exit about what `gc.freeze` keeps.
MODULES = (
    "agentkit_pipelines.evaluation",
    "agentkit_pipelines.report",
    "agentkit_pipelines.gate",
    "agentkit_pipelines.thresholds",
    "agentkit_pipelines.notebook_runner",
    "agentkit_pipelines.batch",
    "agentkit_tracking.registry",
    "agentkit_tracking.runlog",
    "agentkit.embedded.engine",
    "agentkit.embedded.fit",
    "dspy.clients.execution",
    "dspy.clients.engines.streaming",
    "marimo",
    "matplotlib.pyplot",
    "mlflow",
    "pyarrow",
)


def load_ipython_extension(_shell: object) -> None:
    """Import everything; called by IPython before the kernel answers."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in MODULES:
        with contextlib.suppress(Exception):  # a notebook that needs it says so better
            importlib.import_module(name)
    # What is imported stays: collecting it again and again costs the cells time, and the exit of the kernel a second.
    gc.collect()
    gc.freeze()


def _end_with_parent() -> None:
    """ipykernel looks after its parent only once it serves, and then takes whoever has adopted it for the parent."""
    parent = int(os.environ.get("JPY_PARENT_PID", "0"))
    while os.name == "posix" and parent:
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(1)
