"""Language models by name: tiers, prices, and the metered `dspy.LM` that every call inside a run goes through.

Names: `embedded/default` is the in-process engine (no key, no network, no LLM); `fast` and `strong` are tiers of
the settings file; anything else is a DSPy model string (`openai/gpt-4.1-mini`, `ollama_chat/llama3`, …).
"""

from __future__ import annotations

import difflib
import os
import tomllib
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentkit.errors import DataError, ModelError
from agentkit.records import Step
from agentkit.runs import current_run

if TYPE_CHECKING:
    from agentkit.embedded import Weights

EMBEDDED = "embedded/default"
SETTINGS_FILE = "agentkit.toml"
# Set aside for the answer of a call that names no max_tokens; settled to the true number afterwards.
_ASSUMED_TOKENS_OUT = 1000
_step: ContextVar[Step | None] = ContextVar("agentkit_model_step", default=None)


class Price(BaseModel):
    """USD per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0)
    output: float = Field(ge=0)

    def usd(self, tokens_in: float, tokens_out: float) -> float:
        """What that many tokens cost, USD."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


class Settings(BaseModel):
    """The settings file: tiers, prices and options passed to `dspy.LM` per model string."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, str] = Field(default_factory=dict, description="tier name (fast, strong, …) to model string")
    prices: dict[str, Price] = Field(default_factory=dict, description="model string to USD per million tokens")
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="model string to dspy.LM arguments")


def load_settings(path: Path | None = None) -> Settings:
    """The settings of `path`, or of the nearest `agentkit.toml` at or above the working directory (none: empty).

    `AGENTKIT_LM` overrides every tier by one model string.

    Raises:
        DataError: the file is no TOML or has a key that is not documented.
    """
    here = Path.cwd()
    found = path or next((f for d in (here, *here.parents) if (f := d / SETTINGS_FILE).is_file()), None)
    settings = Settings()
    if found is not None:
        try:
            settings = Settings.model_validate(tomllib.loads(found.read_text()))
        except OSError as e:
            raise DataError(f"cannot read the settings file {found}: {e.strerror}") from e
        except tomllib.TOMLDecodeError as e:
            raise DataError(f"{found} is not valid TOML: {e}") from e
        except ValidationError as e:
            problems = [f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors()]
            raise DataError(f"{found} does not follow the settings schema:", problems) from e
    if everything := os.environ.get("AGENTKIT_LM"):
        tiers = {tier: everything for tier in {"fast", "strong", *settings.models}}
        settings = settings.model_copy(update={"models": tiers})
    return settings


def resolve_name(name: str, settings: Settings) -> str:
    """The model string behind a tier name; a model string stands for itself.

    Raises:
        ModelError: a bare word that is no tier.
    """
    if name in settings.models:
        return settings.models[name]
    if name in ("fast", "strong"):
        return EMBEDDED
    if "/" not in name:
        close = difflib.get_close_matches(name, ["fast", "strong", *settings.models], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ModelError(f"model {name!r} is neither a tier of {SETTINGS_FILE} nor of the form provider/model{hint}")
    return name


class MeteredLM(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` whose calls inside a run are reserved in the run's budget, timed, priced and recorded."""

    price: Price | None = None

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        run = current_run()
        if run is None:
            return self._translated(super().__call__, prompt, messages, kwargs)
        with run.model_call(self.model, self._reservation(run.ledger.budget.usd, prompt, messages, kwargs)) as step:
            token = _step.set(step)
            try:
                return self._translated(super().__call__, prompt, messages, kwargs)
            finally:
                _step.reset(token)

    def update_history(self, entry: dict[str, Any]) -> None:
        """DSPy hands over usage and cost here, on the calling thread, once per answered call."""
        if (step := _step.get()) is not None:
            usage = entry.get("usage") or {}
            step.tokens_in += usage.get("prompt_tokens") or 0
            step.tokens_out += usage.get("completion_tokens") or 0
            # An unknown price is not zero: NaN shows as null in the log and stops cost rules.
            cost = entry.get("cost") if self.price is None else self.price.usd(step.tokens_in, step.tokens_out)
            step.usd = float("nan") if cost is None else cost
            if current_run() is not None:
                step.outputs = entry.get("outputs")
        super().update_history(entry)

    def _reservation(self, usd_limit: float | None, prompt: Any, messages: Any, kwargs: Any) -> dict[str, float]:
        text = prompt or "".join(str(m.get("content", "")) for m in messages or ())
        tokens_in = len(text) / 4
        tokens_out = kwargs.get("max_tokens") or self.kwargs.get("max_tokens") or _ASSUMED_TOKENS_OUT
        usd = 0.0
        if self.price is not None:
            usd = self.price.usd(tokens_in, tokens_out)
        elif usd_limit is not None:
            raise ModelError(f"a USD limit is set but no price is known for {self.model}; add it to [prices]")
        return {"model_calls": 1, "tokens_in": tokens_in, "tokens_out": tokens_out, "usd": usd}

    def _translated(self, call: Any, prompt: Any, messages: Any, kwargs: Any) -> Any:
        try:
            return call(prompt, messages=messages, **kwargs)
        except dspy.LMError as e:
            raise ModelError(f"{self.model}: {_advice(e)}") from e


def _advice(error: dspy.LMError) -> str:
    """One line: what happened and what to do."""
    first = (str(error.message or error).strip() or type(error).__name__).splitlines()[0][:200]
    match error:
        case dspy.LMAuthError() | dspy.LMConfigurationError():
            return f"no valid key ({first}); set the provider's key variable, e.g. OPENAI_API_KEY"
        case dspy.LMTimeoutError():
            return f"the model did not answer in time ({first}); raise `timeout` in [options] of {SETTINGS_FILE}"
        case dspy.LMRateLimitError():
            return f"rate limited, also after retries ({first}); run fewer workers or wait"
        case dspy.LMTransportError():
            return f"the server cannot be reached ({first}); check api_base and the network"
        case dspy.LMUnsupportedModelError():
            return f"unknown model ({first}); check the name after the slash"
        case _:
            return f"the provider answered with an error ({first})"


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
    options = {"cache": False, "num_retries": 2, **settings.options.get(model, {})}
    if model.startswith("embedded/"):
        if model != EMBEDDED:
            raise ModelError(f"unknown embedded model {model!r}; there is one: {EMBEDDED!r}")
        from agentkit.embedded import EmbeddedEngine  # scikit-learn: a second or two, for who uses it

        lm = MeteredLM(model, engine=EmbeddedEngine(weights), cache=False, num_retries=0)
        lm.price = Price(input=0, output=0)
        return lm
    if weights is not None:
        raise ModelError(f"fitted weights belong to the embedded engine, not to {model!r}")
    try:
        lm = MeteredLM(model, timeout=options.pop("timeout", 60), **options)
    except (TypeError, ValueError, dspy.LMError) as e:
        raise ModelError(f"{model}: {str(e).splitlines()[0]}") from e
    lm.price = settings.prices.get(model) or _listed_price(model)
    return lm


def metered(lm: Any) -> Any:
    """A metered copy of a `dspy.LM` that a program pinned to one of its predictors; other objects come back as is."""
    if type(lm) is not dspy.LM:
        return lm
    copy = lm.copy()
    copy.__class__ = MeteredLM
    copy.price = load_settings().prices.get(lm.model) or _listed_price(lm.model)
    return copy


@lru_cache(maxsize=64)
def _listed_price(model: str) -> Price | None:
    """The price in the table that litellm ships, or None. Imports litellm: seconds, the first time."""
    import litellm

    entry = litellm.model_cost.get(model) or litellm.model_cost.get(model.split("/", 1)[-1])
    if not entry or entry.get("input_cost_per_token") is None or entry.get("output_cost_per_token") is None:
        return None
    return Price(input=entry["input_cost_per_token"] * 1e6, output=entry["output_cost_per_token"] * 1e6)
