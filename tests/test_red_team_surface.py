"""What there is to attack: every route and method of MLflow that changes the registry is attacked, or said to be free."""

from __future__ import annotations

import pytest
from attacks import ATTACKS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*registry stages:FutureWarning")]


def test_names_of_attacks_are_unique() -> None:
    assert len({a.what for a in ATTACKS}) == len(ATTACKS)


FREE_ROUTES = {
    "registered-models/get-latest-versions": "reads",
    "webhooks": "tells others of changes; changes none",
    "webhooks/<webhook_id>": "as above",
    "webhooks/<webhook_id>/test": "as above",
    "traces/link-prompts": "writes into a trace, not into the prompt",
    "prompt-optimization/jobs": "a job adds a prompt version, as anybody may; it sets no alias and no tag of another",
    "prompt-optimization/jobs/search": "reads",
    "prompt-optimization/jobs/<job_id>": "as above",
    "prompt-optimization/jobs/<job_id>/cancel": "as above",
    "demo/generate": "makes prompts of its own through the same store, which refuses their alias production, too",
    "demo/delete": "deletes them through the same store",
    "runs/create-promptlab-run": "makes a run",
}
FREE_METHODS = {
    "copy_model_version": "calls what is guarded",
    "create_prompt": "as above",
    "create_prompt_version": "as above",
    "delete_prompt": "as above",
    "delete_prompt_alias": "as above",
    "delete_prompt_tag": "as above",
    "delete_prompt_version": "as above",
    "delete_prompt_version_tag": "as above",
    "set_prompt_alias": "as above",
    "set_prompt_tag": "as above",
    "set_prompt_version_tag": "as above",
    "create_webhook": "tells others of changes",
    "delete_webhook": "as above",
    "test_webhook": "as above",
    "update_webhook": "as above",
    "link_prompt_version_to_model": "a note on a logged model, which the tracking store guards",
    "link_prompt_version_to_run": "a note on a run, which the tracking store guards",
    "link_prompts_to_trace": "a note on a trace",
    "supports_workspaces": "reads",
}


def test_every_route_that_changes_the_registry_is_attacked_or_said_to_be_free() -> None:
    """A route that a later MLflow adds fails here, until somebody has looked at it."""
    from mlflow.server import app

    found = set()
    for rule in app.url_map.iter_rules():
        _, _, path = rule.rule.partition("/mlflow/")
        family = path.partition("/")[0]
        ours = family in ("registered-models", "model-versions", "webhooks", "demo") or "prompt" in path
        if ours and set(rule.methods or ()) - {"GET", "HEAD", "OPTIONS"}:
            found.add(path)
    assert found - {a.path for a in ATTACKS} == set(FREE_ROUTES)


def test_every_method_that_changes_the_registry_is_guarded_or_said_to_be_free() -> None:
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

    from agentkit_tracking.guard.registry_store import GuardedStore

    public = {n for n in dir(SqlAlchemyStore) if not n.startswith(("_", "get_", "search_", "list_"))}
    public -= {"CREATE_MODEL_VERSION_RETRIES"}
    assert public - set(vars(GuardedStore)) == set(FREE_METHODS)
