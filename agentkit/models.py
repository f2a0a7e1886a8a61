"""Language models by name: tiers, prices, and the metered `dspy.LM` that every call inside a run goes through.

Names: `embedded/default` is the in-process engine (no key, no network, no LLM); `fast` and `strong` are tiers of
the settings file; anything else is a DSPy model string (`openai/gpt-4.1-mini`, `ollama_chat/llama3`, …).
"""

from __future__ import annotations

import asyncio
import difflib
import os
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from agentkit.errors import DataError, ModelError
from agentkit.records import Step
from agentkit.runs import current_run

if TYPE_CHECKING:
    from agentkit.budget import Ledger
    from agentkit.embedded import Weights

EMBEDDED = "embedded/default"
SETTINGS_FILE = "agentkit.toml"
# Set aside for the answer of a call that names no max_tokens; settled to the true number afterwards.
_ASSUMED_TOKENS_OUT = 1000
_BYTES_PER_TOKEN = 3  # of UTF-8; English has more, so a reservation is rather too large than too small
_LONGEST_WAIT = 60.0  # seconds between two attempts; a server that asks for more is not waited for
# The step of the call in progress, and whether the caller wants it in DSPy's history.
_step: ContextVar[tuple[Step, bool] | None] = ContextVar("agentkit_model_step", default=None)


class Price(BaseModel):
    """USD per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: FiniteFloat = Field(ge=0)
    output: FiniteFloat = Field(ge=0)

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
            settings = Settings.model_validate(tomllib.loads(found.read_text(encoding="utf-8")))
        except OSError as e:
            raise DataError(f"cannot read the settings file {found}: {e.strerror}") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise DataError(f"{found} is not valid TOML: {e}") from e
        except ValidationError as e:
            problems = [
                f"{'.'.join(map(str, x['loc']))}: {'unknown key' if x['type'] == 'extra_forbidden' else x['msg']}"
                for x in e.errors()
            ]
            raise DataError(f"{found} does not follow the settings schema:", problems) from e
    if everything := os.environ.get("AGENTKIT_LM"):
        tiers = dict.fromkeys({"fast", "strong", *settings.models}, everything)
        settings = settings.model_copy(update={"models": tiers})
    return settings


def resolve_name(name: str, settings: Settings) -> str:
    """The model string behind a tier name; a model string stands for itself.

    Raises:
        ModelError: a bare word that is no tier, or a tier that stands for one.
    """
    model = settings.models.get(name, EMBEDDED if name in ("fast", "strong") else name)
    if "/" in model:
        return model
    if model != name:
        raise ModelError(f"tier {name!r} stands for {model!r}, which is not of the form provider/model")
    close = difflib.get_close_matches(name, ["fast", "strong", *settings.models], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ModelError(f"model {name!r} is neither a tier of {SETTINGS_FILE} nor of the form provider/model{hint}")


class MeteredLM(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` whose calls inside a run are reserved in the run's budget, timed, priced and recorded.

    It repeats failed attempts itself, since each is a request the provider may charge: each is reserved and recorded.
    DSPy's cache is never used: a cached answer would look fast and free.
    """

    price: Price | None = None
    retries: int = 0

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        kwargs["cache"] = False
        attempt = 0
        while True:
            try:
                with self._metering(prompt, messages, kwargs):
                    return super().__call__(prompt, messages=messages, **kwargs)
            except dspy.LMError as e:
                wait = self._wait(e, attempt)
            time.sleep(wait)
            attempt += 1

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """`__call__` beside a running event loop."""
        kwargs["cache"] = False
        attempt = 0
        while True:
            try:
                with self._metering(prompt, messages, kwargs):
                    return await super().acall(prompt, messages=messages, **kwargs)
            except dspy.LMError as e:
                wait = self._wait(e, attempt)
            await asyncio.sleep(wait)
            attempt += 1

    def update_history(self, entry: dict[str, Any]) -> None:
        """DSPy hands over usage and cost here, on the calling thread, once per answered call."""
        step, keep = _step.get() or (None, True)
        if step is not None:
            usage = entry.get("usage") or {}
            step.tokens_in += usage.get("prompt_tokens") or 0
            step.tokens_out += usage.get("completion_tokens") or 0
            cost = entry.get("cost")
            if self.price is not None:
                counted = step.tokens_in or self.price == Price(input=0, output=0)  # no prompt has no tokens
                cost = self.price.usd(step.tokens_in, step.tokens_out) if counted else None
            # An unknown cost is not zero: NaN shows as null in the log and stops cost rules.
            step.usd = float("nan") if cost is None else cost
            step.outputs = entry.get("outputs")
        if keep:
            super().update_history(entry)

    @contextmanager
    def _metering(self, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        run = current_run()
        if run is None:
            yield
            return
        keep = not dspy.settings.disable_history
        with run.model_call(self.model, self._reservation(run.ledger, prompt, messages, kwargs)) as step:
            token = _step.set((step, keep))
            try:
                with dspy.context(disable_history=False):  # else the call would look free
                    yield
            finally:
                _step.reset(token)

    def _reservation(self, ledger: Ledger, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> dict[str, float]:
        text = "".join(str(m.get("content", "")) for m in messages) if messages else str(prompt)
        tokens_in = len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN
        options = {**self.kwargs, **kwargs}
        answers = options.get("n") or 1
        most = options.get("max_tokens") or options.get("max_completion_tokens") or _ASSUMED_TOKENS_OUT
        tokens_in, tokens_out, usd = tokens_in * answers, most * answers, 0.0
        if self.price is not None:
            usd = self.price.usd(tokens_in, tokens_out)
        elif ledger.limits("usd"):
            raise ModelError(f"a USD limit is set but no price is known for {self.model}; add it to [prices]")
        return {"model_calls": 1, "tokens_in": tokens_in, "tokens_out": tokens_out, "usd": usd}

    def _wait(self, error: dspy.LMError, attempt: int) -> float:
        """Seconds until the next attempt; raises ModelError when there is to be none."""
        wait = 2.0**attempt if error.retry_after is None else error.retry_after
        run = current_run()
        longest = _LONGEST_WAIT if run is None else min(_LONGEST_WAIT, run.ledger.seconds_left)
        if attempt >= self.retries or wait > longest or not dspy.is_retryable_lm_error(error):
            raise ModelError(f"{self.model}: {_advice(error)}") from error
        return float(wait)


def _advice(error: dspy.LMError) -> str:
    """One line: what happened and what to do."""
    said = (str(error.message or error).strip() or type(error).__name__).splitlines()[0]
    first = said if len(said) <= 200 else said[:199] + "…"
    match error:
        case dspy.LMAuthError() | dspy.LMNotConfiguredError():
            names = " or ".join(getattr(error, "env_keys", ())) or "e.g. OPENAI_API_KEY"
            return f"no valid key ({first}); set the provider's key variable, {names}"
        case dspy.LMTransportError() | dspy.LMTimeoutError() if _timed_out(error):
            first = first.partition(";")[0]  # DSPy goes on with advice that does not fit here
            return f"the model did not answer in time ({first}); raise `timeout` in [options] of {SETTINGS_FILE}"
        case dspy.LMRateLimitError():
            asked = "" if error.retry_after is None else f", asks to wait {error.retry_after:g} s"
            return f"rate limited ({first}{asked}); run fewer workers or wait"
        case dspy.LMTransportError():
            return f"the server cannot be reached ({first}); check api_base and the network"
        case dspy.LMUnsupportedModelError():
            return f"unknown model ({first}); check the name after the slash"
        case dspy.LMProviderError():
            return f"the provider answered with an error ({first})"
        case _:
            return f"the call failed ({first})"


def _timed_out(error: BaseException | None) -> bool:
    """Whether a time-out is behind it; DSPy reports one while reading as a transport error."""
    while error is not None and not isinstance(error, TimeoutError | dspy.LMTimeoutError):
        error = error.__cause__ or error.__context__
    return error is not None


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
        lm.price = Price(input=0, output=0)
        return lm
    if weights is not None:
        raise ModelError(f"fitted weights belong to the embedded engine, not to {model!r}")
    try:
        lm = MeteredLM(model, **options)
        lm.retries, lm.num_retries = lm.num_retries, 0
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
    copy.retries, copy.num_retries = lm.num_retries, 0
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
