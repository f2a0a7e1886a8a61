"""TF-IDF features, and what a prompt's descriptions and demonstrations say about a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.pipeline import make_union

from agentkit.embedded.prompt import Field

MAX_FEATURES = 20_000  # per analyser; on banking77 more gain nothing
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
Floats = NDArray[np.float64]


def vectorizers() -> tuple[TfidfVectorizer, TfidfVectorizer]:
    """Word 1-2-grams and character 2-5-grams, sublinear TF-IDF: strong for short texts, tolerant of typos."""
    words = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", max_features=MAX_FEATURES
    )
    return words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=MAX_FEATURES)


def _context_vectorizer() -> Any:
    # No stop words: with a handful of short documents `the` would otherwise decide.
    words = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    return make_union(words, TfidfVectorizer(analyzer=_stem_grams, sublinear_tf=True))


def _stem_grams(text: str) -> list[str]:
    """Character 4-grams of content words: `refunded` meets `refund`."""
    words = [w for w in re.findall(r"\w{3,}", text.lower()) if w not in ENGLISH_STOP_WORDS]
    return [w[i : i + 4] for w in words for i in range(max(1, len(w) - 3))]


class PromptEvidence:
    """How near a text is to each label, judged only by what stands in the prompt.

    Per label: cosine to its description, plus half the cosine to its nearest demonstration (a single demonstration is
    a narrower hint than a description; on the support tickets half was best from 4 to 64 of them).
    """

    def __init__(self, field: Field, demos: Sequence[tuple[str, str]]) -> None:
        self._names = field.names
        self._demos = [(text, self._names.index(label)) for text, label in demos if label in self._names]
        documents = [text for _, text in field.labels] + [text for text, _ in self._demos]
        self._vectorizer = _context_vectorizer()
        try:
            self._rows = self._vectorizer.fit_transform(documents)
        except ValueError:  # no usable word in any label: no evidence
            self._rows = None

    def scores(self, texts: Sequence[str], *, leave_out: bool = False) -> Floats:
        """Shape (texts, labels), each in [0, 1.5]. `leave_out` ignores a demonstration equal to the text."""
        k = len(self._names)
        scores = np.zeros((len(texts), k))
        if self._rows is None:
            return scores
        near = np.asarray((self._vectorizer.transform(texts) @ self._rows.T).toarray()) / 2
        scores += near[:, :k]
        best = np.zeros_like(scores)
        for j, (demo, label) in enumerate(self._demos):
            column = near[:, k + j].copy()
            if leave_out:
                column[[i for i, text in enumerate(texts) if text == demo]] = 0
            best[:, label] = np.maximum(best[:, label], column)
        return scores + best / 2


@lru_cache(maxsize=128)
def prompt_evidence(field: Field, demos: tuple[tuple[str, str], ...]) -> PromptEvidence:
    """`PromptEvidence`, kept for the prompts in use."""
    return PromptEvidence(field, demos)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order."""
    return [s.strip() for s in _SENTENCE.split(text) if len(s.strip()) > 1]


def relevant_sentences(query: str, sources: Sequence[str], most: int) -> list[str]:
    """Up to `most` sentences of `sources` nearest to `query`, in their order; the first ones if none is near."""
    candidates = list(dict.fromkeys(s for source in sources for s in sentences(source)))
    if len(candidates) <= most:
        return candidates
    try:
        rows = TfidfVectorizer(analyzer=_stem_grams, sublinear_tf=True).fit_transform([query, *candidates])
        near = np.asarray((rows[1:] @ rows[0].T).toarray()).ravel()
    except ValueError:
        near = np.zeros(len(candidates))
    chosen = sorted(np.argsort(-near, kind="stable")[:most])
    return [candidates[i] for i in chosen]
