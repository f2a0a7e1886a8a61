"""What trust costs: registry calls through the guarded store beside MLflow's own, and verification after imports."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 15


def measure(note: Callable[[str, str, str, str], None]) -> None:
    """Rows: calls that change something, checks before a load, `agentkit verify` of a signature-only promotion."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mlflow.entities.model_registry import ModelVersionTag
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
    from releases import COLOURS, put_in_production

    from agentkit_tracking import home, loading, registry
    from agentkit_tracking.guard.registry_store import GuardedStore

    before, folder = os.environ["AGENTKIT_HOME"], tempfile.mkdtemp(prefix="agentkit-bench-")
    os.environ["AGENTKIT_HOME"] = folder
    source = Path(folder) / "colours.py"
    source.write_text(COLOURS)
    version = registry.register_file(source)
    put_in_production(version)
    stores = [kind(home.tracking_uri()) for kind in (GuardedStore, SqlAlchemyStore)]
    calls: dict[str, Callable[[SqlAlchemyStore], object]] = {
        "setting a tag": lambda s: s.set_model_version_tag("colours", 1, ModelVersionTag("note", "x")),
        "setting `candidate`": lambda s: s.set_registered_model_alias("colours", "candidate", 1),
        "reading a version": lambda s: s.get_model_version("colours", 1),
    }
    for what, call in calls.items():
        pairs = [[_seconds(lambda: call(s)) for s in stores] for _ in range(ROUNDS)]  # noqa: B023
        ours, peer, ratio = (statistics.median(x) for x in zip(*((a, b, a / b) for a, b in pairs), strict=True))
        note(f"guarded store: {what}", f"{ours * 1e3:.1f} ms", f"MLflow's own {peer * 1e3:.1f} ms", f"{ratio:.2f}×")
    loading.fetch_production("colours")
    checked = statistics.median(_seconds(lambda: loading.fetch_production("colours")) for _ in range(ROUNDS))
    bare = statistics.median(_seconds(lambda: registry.fetch_version(version)) for _ in range(ROUNDS))
    note(
        "checks before load(…@production): signature, rules, registry, every file",
        f"{checked * 1e3:.0f} ms",
        f"hashes of the files alone {bare * 1e3:.0f} ms",
        "aim < 1 s",
    )
    os.environ["AGENTKIT_HOME"] = before


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
