"""One question to a model, as DSPy's adapters or a program put it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import dspy

from agentkit.jsonable import canonical, jsonable

_BYTES_PER_TOKEN = 3  # of UTF-8; English has more, so an estimate is rather too large than too small
# Where and as whom to ask: neither part of a question's identity, nor anything to tell another provider.
_CLIENT = (
    *("api_key", "api_base", "base_url", "api_version", "headers", "extra_headers", "extra_query", "timeout"),
    *("organization", "project", "custom_llm_provider", "azure_ad_token_provider", "cache"),
)

_PLACE = tuple(name for name in _CLIENT if name not in ("api_key", "azure_ad_token_provider", "timeout", "cache"))


@dataclass(slots=True)
class Asked:
    """Prompt (a text or a `dspy.lm15.Request`) or messages, and the options of this one call."""

    prompt: Any
    messages: Any
    options: dict[str, Any]

    @property
    def is_typed(self) -> bool:
        """Whether it is a `dspy.lm15.Request`, which carries its options itself and is answered by a `Response`."""
        prompt = self.prompt
        return prompt is not None and not isinstance(prompt, str) and isinstance(prompt, dspy.lm15.Request)

    def data(self, model: str, kind: str, defaults: dict[str, Any]) -> dict[str, Any]:
        """As JSON-able data: model, messages and every parameter, without key and address."""
        if self.is_typed:
            from dspy._vendor.lm15.serde import request_to_dict  # public under no other name in 3.4

            return {"model": model, "request": request_to_dict(self.prompt)}
        merged = {**defaults, **self.options}
        parameters = {k: _schema(v) for k, v in merged.items() if v is not None and k not in _CLIENT}
        messages = self.messages or [{"role": "user", "content": self.prompt}]
        data = {"model": model, "type": kind, "messages": messages, "parameters": parameters}
        return cast("dict[str, Any]", jsonable(data))

    def place(self, defaults: dict[str, Any]) -> str:
        """Where and as whom it is asked, without key and time-out: another server or tenant may answer something else."""
        merged = {**defaults, **self.options}
        return canonical({k: merged[k] for k in _PLACE if merged.get(k) is not None}).decode()

    def to_another(self, model: str) -> Asked:
        """The same question to another model, without what is meant for this one's server."""
        prompt = replace(self.prompt, model=model) if self.is_typed else self.prompt
        own = {name: value for name, value in self.options.items() if name not in _CLIENT}
        return Asked(prompt, self.messages, {**own, "cache": False})

    def limited(self, limits: dict[str, Any]) -> Asked:
        """The same question with limits put on its answer; a typed one has its time-out from the LM."""
        if not self.is_typed:
            return Asked(self.prompt, self.messages, {**self.options, **limits})
        most = limits.get("max_tokens") or limits.get("max_completion_tokens")
        config = replace(self.prompt.config, max_tokens=most) if most else self.prompt.config
        return Asked(replace(self.prompt, config=config), None, self.options)

    def max_tokens(self, options: dict[str, Any]) -> int | None:
        """The longest answer it asks for, tokens; `options` are the call's over the LM's own."""
        if self.messages is None and self.is_typed:
            return cast("int | None", self.prompt.config.max_tokens)
        return options.get("max_tokens") or options.get("max_completion_tokens")

    def tokens_in(self, options: dict[str, Any]) -> float:
        """An estimate of what there is to read, rather too large: messages, tools and the form of the answer."""
        text = "".join([str(m.get("content", "")) for m in self.messages]) if self.messages else str(self.prompt)
        for name in ("tools", "response_format"):
            if options.get(name):
                text += str(_schema(options[name]))
        return len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN


def _schema(value: Any) -> Any:
    """A class that stands for the form of the answer, as its JSON schema."""
    described = getattr(value, "model_json_schema", None)
    return described() if isinstance(value, type) and described is not None else value
