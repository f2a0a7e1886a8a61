"""The MLflow traces of runs that were erased from the run log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import orjson

from agentkit.errors import AgentkitError
from agentkit_tracking.home import connect, home, is_local_store, tracking_uri

_AT_ONCE = 100


def delete_traces(runs: Sequence[str]) -> tuple[int, str]:
    """Remove the traces of these runs, where there is a store; in whatever experiment they lie and whatever tags they have lost.

    Returns:
        How many were removed, and why others may be left: the store does not answer.
    """
    if not runs or (is_local_store() and not (home() / "mlflow.db").exists()):
        return 0, ""
    from mlflow.exceptions import MlflowException

    from agentkit_tracking.forwarding.ids import trace_id

    try:
        return _delete([trace_id(run_id) for run_id in runs]), ""
    except (AgentkitError, MlflowException) as e:
        return 0, str(e).splitlines()[0]


def _delete(trace_ids: list[str]) -> int:
    from mlflow.tracing.client import TracingClient

    client = connect()
    store = TracingClient(tracking_uri()).store
    count = 0
    for first in range(0, len(trace_ids), _AT_ONCE):
        experiments: dict[str, list[str]] = defaultdict(list)
        for info in store.batch_get_trace_infos(trace_ids[first : first + _AT_ONCE]):
            experiments[info.experiment_id].append(info.trace_id)
        for experiment_id, found in experiments.items():
            count += client.delete_traces(experiment_id, trace_ids=found)
    return count


def elsewhere(folder: Path) -> tuple[str, ...]:
    """Where else runs of the log in `folder` were forwarded to, and are not removed from."""
    from agentkit_tracking.forwarding.mlflow_target import MlflowTarget

    targets = {}
    for path in sorted((folder / "consumers").glob("*.json")):
        try:
            targets[path.stem] = str(orjson.loads(path.read_bytes())["target"])
        except (OSError, ValueError, KeyError, TypeError):
            targets[path.stem] = path.stem
    targets.pop(MlflowTarget().name, None)
    return tuple(targets.values())
