"""Language models by name: tiers, prices, and what guards the calls.

Names: `embedded/default` is the in-process engine (no key, no network, no LLM); `fast` and `strong` are tiers of
the settings file; anything else is a DSPy model string (`openai/gpt-4.1-mini`, `ollama_chat/llama3`, …).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import dspy

from agentkit.errors import ModelError
from agentkit.metering import MeteredLM, reset_circuits
from agentkit.settings import EMBEDDED, SETTINGS_FILE, Price, Settings, load_settings, resolve_name

if TYPE_CHECKING:
    from agentkit.embedded import Weights

__all__ = [
    "EMBEDDED",
    "SETTINGS_FILE",
    "MeteredLM",
    "Price",
    "Settings",
    "build_lm",
    "load_settings",
    "metered",
    "reset_circuits",
    "resolve_name",
]


def build_lm(name: str, *, settings: Settings | None = None, weights: Weights | None = None) -> MeteredLM:
    """The metered LM behind a tier or model string.

    Args:
        name: tier, `embedded/…` or DSPy model string.
        weights: what the embedded engine has been fitted to; only valid with an `embedded/` name.

    Raises:
        ModelError: the name is unknown or the combination makes no sense.
    """
    settings = settings or load_settings()
    model = resolve_name(name, settings)
    options = {"timeout": 60, "num_retries": 2, **settings.options.get(model, {})}
    if model.startswith("embedded/"):
        if model != EMBEDDED:
            raise ModelError(f"unknown embedded model {model!r}; there is one: {EMBEDDED!r}")
        from agentkit.embedded import EmbeddedEngine  # scikit-learn: a second or two, for who uses it

        lm = MeteredLM(model, engine=EmbeddedEngine(weights), cache=False, num_retries=0)
        lm.price, lm.retries = Price(input=0, output=0), 2  # it never fails by itself, but faults can be injected
        return lm
    if weights is not None:
        raise ModelError(f"fitted weights belong to the embedded engine, not to {model!r}")
    try:
        lm = MeteredLM(model, **options)
    except (TypeError, ValueError, dspy.LMError) as e:
        raise ModelError(f"{model}: {str(e).splitlines()[0]}") from e
    return _guarded(lm, settings)


def metered(lm: Any) -> Any:
    """A metered copy of a `dspy.LM` that a program pinned to one of its predictors; other objects come back as is."""
    if type(lm) is not dspy.LM:
        return lm
    copy = lm.copy()
    copy.__class__ = MeteredLM
    return _guarded(copy, load_settings())


def _guarded(lm: MeteredLM, settings: Settings) -> MeteredLM:
    lm.retries, lm.num_retries = lm.num_retries, 0
    lm.price = settings.prices.get(lm.model) or _listed_price(lm.model)
    lm.caching = settings.cache if settings.cache.enabled and lm.is_remote else None
    lm.others = partial(_fallbacks, settings)
    settings.fallbacks_of(lm.model)  # a misspelt name is refused now, not when it is needed
    if lm.is_remote:
        provider = lm.model.partition("/")[0]
        lm.circuit = (provider, lm.address, settings.circuit.failures, settings.circuit.seconds)
    return lm


def _fallbacks(settings: Settings, model: str) -> tuple[MeteredLM, ...]:
    """The models that answer in the place of `model`; they have none themselves."""
    alone = settings.model_copy(update={"fallbacks": {}})
    return tuple(build_lm(name, settings=alone) for name in settings.fallbacks_of(model))


@lru_cache(maxsize=64)
def _listed_price(model: str) -> Price | None:
    """The price in the table that litellm ships, or None. Imports litellm: seconds, the first time."""
    import litellm

    entry = litellm.model_cost.get(model) or litellm.model_cost.get(model.split("/", 1)[-1])
    if not entry or entry.get("input_cost_per_token") is None or entry.get("output_cost_per_token") is None:
        return None
    return Price(input=entry["input_cost_per_token"] * 1e6, output=entry["output_cost_per_token"] * 1e6)
