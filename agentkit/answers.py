"""What a model answered, as DSPy has it and as the JSON-able data that journals and cassettes keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentkit.jsonable import jsonable

if TYPE_CHECKING:
    from agentkit.records import Step

Reply = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """One model's answer to one request.

    `outputs` is what `dspy.LM` returns: texts, or mappings with `text`, `tool_calls` and more; `typed` is the
    `dspy.lm15.Response` when the request was a typed one; `usage` has the provider's token counts; `cost` is DSPy's
    estimate in USD; `finish` says why the model stopped (stop, length, content_filter, tool_call).
    """

    outputs: list[Any]
    model: str
    usage: dict[str, Any] = field(default_factory=dict)
    cost: float | None = None
    finish: str | None = None
    response_model: str | None = None
    typed: Any = None
    cached: bool = False

    @classmethod
    def of_entry(cls, entry: dict[str, Any], model: str, value: Any) -> Answer:
        """From the entry that DSPy writes to its history, and what its LM returned."""
        outputs = entry["outputs"]
        return cls(
            outputs,
            model,
            entry.get("usage") or {},
            entry.get("cost"),
            _finish(entry.get("response")),
            entry.get("response_model"),
            None if value is outputs else value,
        )

    def write_to(self, step: Step) -> None:
        """Put tokens, cost and outputs into a run's step."""
        step.tokens_in = self.usage.get("prompt_tokens") or 0
        step.tokens_out = self.usage.get("completion_tokens") or 0
        # An unknown cost is not zero: NaN shows as null in the log and stops cost rules.
        step.usd = math.nan if self.cost is None else self.cost
        step.outputs = self.outputs

    def reply(self) -> Reply:
        """As JSON-able data."""
        names = ("outputs", "model", "usage", "cost", "finish", "response_model", "cached")
        data: Reply = {name: jsonable(getattr(self, name)) for name in names}
        if self.typed is not None:
            from dspy._vendor.lm15.serde import response_to_dict  # public under no other name in 3.4

            data["response"] = response_to_dict(self.typed)
        return data

    @classmethod
    def of_reply(cls, reply: Reply) -> Answer:
        """From what `reply` made, perhaps in another process."""
        values = {name: value for name, value in reply.items() if name not in ("response", "outputs")}
        return cls(outputs=_live(reply["outputs"]), typed=_typed(reply), **values)


def _live(outputs: list[Any]) -> list[Any]:
    if all(isinstance(output, str | None) for output in outputs):
        return list(outputs)
    from dspy.clients.call_result import attributes  # tool calls are read by attribute as well as by key

    return list(attributes(outputs))


def _typed(reply: Reply) -> Any:
    if "response" not in reply:
        return None
    from dspy._vendor.lm15.serde import response_from_dict

    return response_from_dict(reply["response"])


def _finish(response: Any) -> str | None:
    """Why generation stopped, the worst of several answers; LiteLLM's replies have it in their choices."""
    if (reason := getattr(response, "finish_reason", None)) is not None:
        return str(reason)
    responses = response if isinstance(response, tuple) else (response,)
    reasons = [getattr(r, "finish_reason", None) for r in responses]
    if reasons == [None]:
        reasons = [getattr(choice, "finish_reason", None) for choice in getattr(response, "choices", None) or ()]
    for bad in ("length", "content_filter"):
        if bad in reasons:
            return bad
    return next((reason for reason in reasons if reason), None)
