"""What shows the signed history to people and to plain MLflow clients: aliases of model and prompts, the description.

None of it decides anything. A guarded store moves the aliases together with the entry; elsewhere they follow one by one,
and what a crash left undone the next move or `agentkit doctor --repair` sets right.
"""

from __future__ import annotations

from agentkit.errors import TrustError
from agentkit_tracking.history import KEY, History, seen, with_history
from agentkit_tracking.home import connect, home
from agentkit_tracking.registry import Registered, Version, look_up, prompts_of
from agentkit_tracking.rules import PRODUCTION


def mirror(history: History) -> int:
    """Set right whatever does not mirror the history; returns how many things were wrong."""
    registered = look_up(history.system)
    return _mirror_alias(registered, history) + _mirror_prompts(registered, history) + _mirror_description(history)


def _mirror_alias(registered: Registered, history: History) -> int:
    wanted = history.production
    if registered.aliases.get(PRODUCTION) == wanted:
        return 0
    if wanted is None:
        connect().delete_registered_model_alias(history.system, PRODUCTION)
    else:
        connect().set_registered_model_alias(history.system, PRODUCTION, str(wanted))
    return 1


def prompts_wrong(registered: Registered, history: History) -> dict[str, int | None]:
    """Prompts whose alias `production` is wrong, and the version it belongs to (None: the release has no such prompt)."""
    wanted: dict[str, int | None] = {name: None for v in registered.versions for name, _ in own_prompts(v).values()}
    for v in registered.versions:
        if v.number == history.production:
            wanted |= dict(own_prompts(v).values())
    return {name: number for name, number in wanted.items() if prompt_in_production(name) != number}


def own_prompts(version: Version) -> dict[str, tuple[str, int]]:
    """Short name to name and version in MLflow; not those of another system, which whoever made the version could name."""
    try:
        found = {short: (str(p["name"]), int(p["version"])) for short, p in prompts_of(version).items()}
    except (ValueError, TypeError, KeyError):  # the tag was altered; its hash tells
        return {}
    return {short: prompt for short, prompt in found.items() if prompt[0] == f"{version.name}.{short}"}


def prompt_in_production(name: str) -> int | None:
    """The version that a prompt's alias `production` names, or None."""
    from mlflow.exceptions import MlflowException

    try:
        found = connect().get_prompt_version_by_alias(name, PRODUCTION)
        return None if found is None else int(found.version)
    except MlflowException as e:
        if e.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):  # no such alias
            return None
        raise


def _mirror_prompts(registered: Registered, history: History) -> int:
    wrong = prompts_wrong(registered, history)
    for name, number in wrong.items():
        if number is None:
            connect().delete_prompt_alias(name, PRODUCTION)
        else:
            connect().set_prompt_alias(name, PRODUCTION, number)
    return len(wrong)


def _mirror_description(history: History) -> int:
    """The history below whatever people wrote into the model's description."""
    client = connect()
    text = client.get_registered_model(history.system).description or ""
    wanted = with_history(text, history)
    if text == wanted:
        return 0
    client.update_registered_model(history.system, wanted)
    return 1


def restore(system: str) -> int:
    """Write back entries that this machine has verified before and the store has lost at its end; returns how many.

    Raises:
        TrustError: entries before the end are missing or altered, which no guarded store lets anybody write again.
    """
    tags, known = look_up(system).tags, {f"{KEY}{n:06}": text for n, text in enumerate(seen(system), 1)}
    lost = {key: text for key, text in known.items() if tags.get(key) != text}
    if lost and min(lost) <= max((key for key in tags if key.startswith(KEY)), default=""):
        raise TrustError(
            f"{min(lost)!r} of {system} was altered, or taken out where later ones stand; put the store back from a backup, "
            f"or its tags to the entries that this machine has seen, which are in {home() / 'seen'}"
        )
    for key, text in lost.items():
        connect().set_registered_model_tag(system, key, text)
    return len(lost)
