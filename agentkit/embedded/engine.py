"""The engine `dspy.LM` calls: one request in, one response out, no state but the fitted weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from dspy.lm15 import Message, Request, Response, TextPart, UnsupportedFeatureError, Usage

from agentkit.embedded.features import Floats, prompt_evidence, relevant_sentences
from agentkit.embedded.prompt import (
    Field,
    PromptError,
    Task,
    parse_answer,
    parse_system,
    parse_turn,
    write_answer,
)
from agentkit.embedded.weights import Weights

_TOKEN = re.compile(r"\w{1,6}|[^\w\s]")  # close to what subword tokenizers count for English
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_UNFITTED_TRUST = 8.0  # sharpness of an answer from the prompt alone; not calibrated
_SENTENCES = 3
Demo = tuple[dict[str, str], dict[str, str]]


class EmbeddedEngine:
    """Implements the engine protocol of `dspy.LM(engine=…)`.

    `Literal` and `bool` fields are classified, from the prompt and, where it has been fitted to the same fields
    and labels, from weights; a float field with `confidence` in its name is the probability of the first
    classified field (calibrated on held-out folds when fitted); text and list fields are sentences taken from
    the inputs; other numbers are the first number of the inputs (an int without its decimals), 0 if there is none.
    """

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights

    def complete(self, request: Request) -> Response:
        """Answer one prompt.

        Raises:
            UnsupportedFeatureError: the prompt is not of DSPy's ChatAdapter, or has a field of another type.
        """
        system = request.system
        text = system if isinstance(system, str) else "".join(p.text for p in system or ())
        turns = [m.text or "" for m in request.messages]
        try:
            task = parse_system(text)
        except PromptError as e:
            raise UnsupportedFeatureError(str(e)) from e
        outputs = [f.name for f in task.outputs]
        demos = [
            (parse_turn(user, task.inputs), parse_answer(answer, outputs))
            for user, answer in zip(turns[:-1:2], turns[1:-1:2], strict=False)
        ]
        answer = write_answer(self._answer(task, demos, parse_turn(turns[-1], task.inputs)))
        used = sum(len(_TOKEN.findall(t)) for t in (text, *turns)), len(_TOKEN.findall(answer))
        return Response(
            id=None,
            model="embedded/default",
            message=Message.assistant([TextPart(answer)]),
            finish_reason="stop",
            usage=Usage(input_tokens=used[0], output_tokens=used[1], total_tokens=sum(used)),
        )

    def close(self) -> None:
        """Nothing to close; part of the engine protocol."""

    def _answer(self, task: Task, demos: Sequence[Demo], values: dict[str, str]) -> dict[str, str]:
        text = joined(task, values)
        examples = [(joined(task, given), answered) for given, answered in demos]
        answers: dict[str, str] = {}
        confidence = None
        for field in task.outputs:
            if field.kind == "label":
                p = self.probabilities(task, field, [(t, a.get(field.name, "")) for t, a in examples], [text])[0]
                answers[field.name] = field.names[int(p.argmax())]
                confidence = float(p.max()) if confidence is None else confidence
            elif field.kind in ("number", "integer"):
                found = _NUMBER.search(text)
                number = found[0] if found else "0"
                answers[field.name] = number if field.kind == "number" else number.partition(".")[0]
            elif field.kind in ("text", "list"):
                answers[field.name] = self._extract(task, field, values)
        for field in task.outputs:
            if field.kind == "confidence":
                answers[field.name] = f"{0.0 if confidence is None else confidence:.4f}"
        return {field.name: answers[field.name] for field in task.outputs}

    def probabilities(self, task: Task, field: Field, demos: Sequence[tuple[str, str]], texts: Sequence[str]) -> Floats:
        """Shape (texts, labels), for a classified field; `demos` are (joined inputs, label) pairs."""
        evidence = prompt_evidence(field, tuple(demos)).scores(texts)
        head = self.weights.heads.get((task.inputs, field.name, field.names)) if self.weights else None
        if self.weights is None or head is None:
            z = np.exp(_UNFITTED_TRUST * evidence)
            return np.asarray(z / z.sum(axis=1, keepdims=True))
        features = self.weights.vocabularies[task.inputs].transform(texts)
        margins = np.asarray(features @ head.coef.T.astype(np.float64)) + head.intercept.astype(np.float64)
        return head.probabilities(margins, evidence)

    def _extract(self, task: Task, field: Field, values: dict[str, str]) -> str:
        first, *others = [values.get(name, "") for name in task.inputs] or [""]
        found = relevant_sentences(first, others if any(others) else [first], _SENTENCES)
        return json.dumps(found) if field.kind == "list" else " ".join(found)

    def dump_state(self) -> dict[str, Any]:
        """For `dspy.LM.dump_state`: the engine itself has no state; weights are stored with the release."""
        return {}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> EmbeddedEngine:
        """The counterpart of `dump_state`."""
        return cls()


def joined(task: Task, values: dict[str, str]) -> str:
    """The inputs of a task as one text."""
    return "\n".join(values.get(name, "") for name in task.inputs)
