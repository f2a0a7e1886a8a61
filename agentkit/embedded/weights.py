"""What the embedded model has been fitted to, as one safetensors file: arrays and JSON, never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from scipy.sparse import csr_matrix, hstack

from agentkit.embedded.features import Floats, vectorizers
from agentkit.errors import ReleaseError

_FORMAT = 1
HeadKey = tuple[tuple[str, ...], str, tuple[str, ...]]  # input fields, output field, labels


@dataclass(frozen=True)
class Head:
    """A linear classifier for one output field, and how far to trust it and the prompt.

    p(label) = softmax(trust * margin + prompt_trust * prompt evidence), both factors set on held-out folds.
    """

    key: HeadKey
    coef: NDArray[np.float32]  # (labels, features)
    intercept: NDArray[np.float32]  # (labels,)
    trust: float
    prompt_trust: float

    def probabilities(self, margins: Floats, evidence: Floats) -> Floats:
        """Shape (texts, labels)."""
        z = self.trust * margins + self.prompt_trust * evidence
        z = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(z / z.sum(axis=1, keepdims=True))


class Vocabulary:
    """The two fitted vectorizers of one set of input fields."""

    def __init__(self, vocabularies: Sequence[dict[str, int]], idfs: Sequence[NDArray[np.float32]]) -> None:
        self.vocabularies, self.idfs = list(vocabularies), list(idfs)
        self._vectorizers = []
        for vectorizer, vocabulary, idf in zip(vectorizers(), vocabularies, idfs, strict=True):
            vectorizer.set_params(vocabulary=vocabulary, max_features=None)
            vectorizer.idf_ = idf.astype(np.float64)
            self._vectorizers.append(vectorizer)

    def transform(self, texts: Sequence[str]) -> csr_matrix:
        """Shape (texts, features)."""
        return hstack([v.transform(texts) for v in self._vectorizers], format="csr")


class Weights:
    """All heads and vocabularies of one fit."""

    def __init__(self, vocabularies: dict[tuple[str, ...], Vocabulary], heads: Sequence[Head]) -> None:
        self.vocabularies = vocabularies
        self.heads = {head.key: head for head in heads}

    def to_bytes(self) -> bytes:
        """The weights file; equal weights give equal bytes."""
        tensors: dict[str, Any] = {}
        meta: dict[str, Any] = {"format": _FORMAT, "vocabularies": [], "heads": []}
        for i, (inputs, vocabulary) in enumerate(self.vocabularies.items()):
            meta["vocabularies"].append({"inputs": inputs, "terms": [list(v) for v in vocabulary.vocabularies]})
            for j, idf in enumerate(vocabulary.idfs):
                tensors[f"vocabulary.{i}.idf.{j}"] = idf
        for i, head in enumerate(self.heads.values()):
            meta["heads"].append({"key": head.key, "trust": head.trust, "prompt_trust": head.prompt_trust})
            tensors[f"head.{i}.coef"], tensors[f"head.{i}.intercept"] = head.coef, head.intercept
        return bytes(safetensors.numpy.save(tensors, metadata={"agentkit": json.dumps(meta)}))

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_file(cls, path: str) -> Weights:
        """Read a weights file.

        Raises:
            ReleaseError: the file is missing, cut, or not of this format.
        """
        try:
            with safe_open(path, framework="numpy") as f:
                meta = json.loads((f.metadata() or {})["agentkit"])
                if meta["format"] != _FORMAT:
                    raise ValueError(f"format {meta['format']!r}, this version reads {_FORMAT}")
                vocabularies = {}
                for i, v in enumerate(meta["vocabularies"]):
                    terms = [{t: k for k, t in enumerate(words)} for words in v["terms"]]
                    idfs = [f.get_tensor(f"vocabulary.{i}.idf.{j}") for j in range(len(terms))]
                    vocabularies[tuple(v["inputs"])] = Vocabulary(terms, idfs)
                heads = [
                    Head(
                        (tuple(h["key"][0]), h["key"][1], tuple(h["key"][2])),
                        f.get_tensor(f"head.{i}.coef"),
                        f.get_tensor(f"head.{i}.intercept"),
                        h["trust"],
                        h["prompt_trust"],
                    )
                    for i, h in enumerate(meta["heads"])
                ]
        except (OSError, SafetensorError, LookupError, ValueError, TypeError) as e:
            raise ReleaseError(f"{path} is no readable weights file of the embedded model: {e}") from e
        return cls(vocabularies, heads)
