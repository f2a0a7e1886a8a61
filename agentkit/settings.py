"""The settings file `agentkit.toml`: tiers, prices, options, fallbacks, cache and circuit breaker of the models."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from agentkit.errors import DataError, ModelError

EMBEDDED = "embedded/default"
SETTINGS_FILE = "agentkit.toml"


class Price(BaseModel):
    """USD per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: FiniteFloat = Field(ge=0)
    output: FiniteFloat = Field(ge=0)

    def usd(self, tokens_in: float, tokens_out: float) -> float:
        """What that many tokens cost, USD."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


class CacheSettings(BaseModel):
    """Answers kept in this process. Off unless enabled: a kept answer is not what the model would say now."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = False
    seconds: FiniteFloat = Field(default=3600, gt=0, description="how long an answer is kept")
    entries: int = Field(default=10_000, ge=1, description="answers kept at most; the least recently used go first")
    evaluations: bool = Field(default=False, description="whether evaluations use it; their repeats would be copies")


class CircuitSettings(BaseModel):
    """When a provider counts as down: `failures` in a row; one trial call every `seconds` from then on.

    The default is far above a breaker's usual 5, because one hiccup fails every call in flight, and an evaluation
    has dozens of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    failures: int = Field(default=20, ge=1)
    seconds: FiniteFloat = Field(default=30, gt=0)


class Settings(BaseModel):
    """The settings file: tiers, prices and options passed to `dspy.LM` per model string, and what guards the calls."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, str] = Field(default_factory=dict, description="tier name (fast, strong, …) to model string")
    prices: dict[str, Price] = Field(default_factory=dict, description="model string to USD per million tokens")
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="model string to dspy.LM arguments")
    fallbacks: dict[str, list[str]] = Field(
        default_factory=dict, description="tier or model string to those that answer in its place, first one first"
    )
    cache: CacheSettings = Field(default_factory=CacheSettings)
    circuit: CircuitSettings = Field(default_factory=CircuitSettings)

    def fallbacks_of(self, model: str) -> tuple[str, ...]:
        """Those of a model string, whether it is listed itself or by one of its tiers.

        Raises:
            ModelError: a name in the table stands for no model.
        """
        names = [name for name in self.fallbacks if resolve_name(name, self) == model]
        listed = (other for name in names for other in self.fallbacks[name])
        return tuple(dict.fromkeys(other for other in listed if resolve_name(other, self) != model))


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
