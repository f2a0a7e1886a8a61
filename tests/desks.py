"""A small desk that routes, and programs of before agentkit, for the tests of systems."""

from __future__ import annotations

from typing import Literal

import dspy
from hedgehogs import Hedgehog

import agentkit as ak


class Route(dspy.Signature):
    """Who answers?

    - billing: money, invoice, refund, charged
    - technical: wifi, offline, device, app
    """

    text: str = dspy.InputField()
    queue: Literal["billing", "technical"] = dspy.OutputField()
    confidence: float = dspy.OutputField()


class Billing(Hedgehog):
    name = "billing"


class Technical(Hedgehog):
    name = "technical"


MONEY, WIFI = "I was charged twice, I want a refund", "my device is offline, no wifi"


def desk() -> ak.System:
    return ak.System("desk", [Billing(), Technical()], router=dspy.Predict(Route))


class Triage(dspy.Module):
    """What somebody had before."""

    def __init__(self) -> None:
        super().__init__()
        self.route = dspy.Predict(Route)

    def forward(self, text: str) -> dspy.Prediction:
        return dspy.Prediction(queue=self.route(text=text).queue)


def count_words(text: str, least: int = 1) -> int:
    return max(least, len(text.split()))
