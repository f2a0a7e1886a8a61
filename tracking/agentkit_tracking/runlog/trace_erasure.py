"""The MLflow traces of runs that were erased from the run log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from agentkit.errors import AgentkitError
from agentkit_tracking.home import connect, home, is_local_store

_PAGE, _AT_ONCE = 500, 100


def delete_traces(runs: Iterable[tuple[str, str]]) -> tuple[int, str]:
    """Remove the traces of these runs (system and run id), where there is a store.

    Returns:
        How many were removed, and why others may be left: the store does not answer.
    """
    by_system: dict[str, set[str]] = defaultdict(set)
    for system, run_id in runs:
        by_system[system].add(run_id)
    if not by_system or (is_local_store() and not (home() / "mlflow.db").exists()):
        return 0, ""
    from mlflow.exceptions import MlflowException

    try:
        return sum(_delete(system, wanted) for system, wanted in by_system.items()), ""
    except (AgentkitError, MlflowException) as e:
        return 0, str(e).splitlines()[0]


def _delete(system: str, wanted: set[str]) -> int:
    client = connect()
    experiment = client.get_experiment_by_name(system)
    if experiment is None:
        return 0
    found: list[str] = []
    token: str | None = None
    while True:
        page = client.search_traces(
            locations=[experiment.experiment_id], max_results=_PAGE, page_token=token, include_spans=False
        )
        found += [trace.info.trace_id for trace in page if trace.info.tags.get("agentkit.run_id") in wanted]
        token = page.token
        if not token:
            break
    for first in range(0, len(found), _AT_ONCE):
        client.delete_traces(experiment.experiment_id, trace_ids=found[first : first + _AT_ONCE])
    return len(found)
