"""Fits the embedded model to examples: linear heads on TF-IDF features, calibrated on held-out folds."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import dspy
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from agentkit.embedded.engine import joined
from agentkit.embedded.features import Floats, prompt_evidence, vectorizers
from agentkit.embedded.prompt import Field, Task, parse_answer, parse_system, parse_turn
from agentkit.embedded.weights import Head, HeadKey, Vocabulary, Weights
from agentkit.errors import UsageError

Row = dict[str, Any]
_FOLDS = 5


def fit(program: dspy.Module, rows: Iterable[Row]) -> Weights:
    """Fit every classified output field of a program's predictors for which the rows have inputs and answers.

    Args:
        program: its predictors' signatures say which fields to fit; their instructions and demonstrations are
            the prompt whose worth is weighed against the fitted margins.
        rows: flat dictionaries with the predictors' input fields and expected output fields. A row whose answer
            is not among a field's labels teaches that field nothing.

    Returns:
        The weights. Method: one linear support vector machine per field (one-vs-rest, C=1); margins become
        probabilities by softmax with a temperature fitted on held-out folds (Guo et al. 2017, "On Calibration of
        Modern Neural Networks", section 4.2), with the prompt's evidence as a second stacked term.

    Raises:
        UsageError: no predictor has a field that the rows could teach (two labels, one of them twice).
    """
    rows = list(rows)
    vocabularies: dict[tuple[str, ...], Vocabulary] = {}
    heads: dict[HeadKey, Head] = {}
    for _, predictor in program.named_predictors():
        task, demos = _prompt_of(predictor)
        known = [r for r in rows if all(isinstance(r.get(name), str) for name in task.inputs)]
        for field in task.outputs:
            key = (task.inputs, field.name, field.names)
            taught = [r for r in known if str(r.get(field.name)) in field.names]
            counts = Counter(str(r[field.name]) for r in taught)
            if field.kind != "label" or key in heads or len(counts) < 2 or max(counts.values()) < 2:
                continue
            if task.inputs not in vocabularies:
                vocabularies[task.inputs] = _vocabulary([joined(task, r) for r in known])
            texts = [joined(task, r) for r in taught]
            labels = np.array([field.names.index(str(r[field.name])) for r in taught])
            pairs = tuple((joined(task, given), answers.get(field.name, "")) for given, answers in demos)
            evidence = prompt_evidence(field, pairs).scores(texts, leave_out=True)
            heads[key] = _head(key, field, vocabularies[task.inputs].transform(texts), labels, evidence)
    if not heads:
        raise UsageError("nothing to fit: no predictor has a Literal or bool output that the examples answer twice")
    return Weights(vocabularies, list(heads.values()))


def _prompt_of(predictor: Any) -> tuple[Task, list[tuple[dict[str, str], dict[str, str]]]]:
    signature = predictor.signature
    blank = dict.fromkeys(signature.input_fields, "")
    messages = dspy.ChatAdapter().format(signature, predictor.demos, blank)
    task = parse_system(messages[0]["content"])
    outputs = [f.name for f in task.outputs]
    turns = [m["content"] for m in messages[1:-1]]
    return task, [
        (parse_turn(user, task.inputs), parse_answer(answer, outputs))
        for user, answer in zip(turns[::2], turns[1::2], strict=False)
    ]


def _vocabulary(texts: Sequence[str]) -> Vocabulary:
    try:
        fitted = [v.fit(texts) for v in vectorizers()]
    except ValueError as e:
        raise UsageError(f"nothing to fit: the inputs of {len(texts)} examples hold no word") from e
    terms = [{t: k for k, t in enumerate(sorted(v.vocabulary_))} for v in fitted]
    idfs = [
        np.array([v.idf_[v.vocabulary_[t]] for t in words], dtype=np.float32)
        for v, words in zip(fitted, terms, strict=True)
    ]
    return Vocabulary(terms, idfs)


def _head(key: HeadKey, field: Field, features: csr_matrix, labels: NDArray[np.int64], evidence: Floats) -> Head:
    k = len(field.names)
    trust, prompt_trust = _calibrate(_held_out_margins(features, labels, k), evidence, labels)
    model = _svm(features, labels)
    coef, intercept = np.zeros((k, features.shape[1])), np.full(k, -2.0)  # a label never seen stays unlikely
    if len(model.classes_) == 2:
        coef[model.classes_] = np.vstack([-model.coef_, model.coef_])
        intercept[model.classes_] = [-model.intercept_[0], model.intercept_[0]]
    else:
        coef[model.classes_], intercept[model.classes_] = model.coef_, model.intercept_
    return Head(key, coef.astype(np.float32), intercept.astype(np.float32), trust, prompt_trust)


def _svm(features: csr_matrix, labels: NDArray[np.int64]) -> LinearSVC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged to the last digit is good enough here
        return LinearSVC(C=1.0, random_state=0).fit(features, labels)


def _held_out_margins(features: csr_matrix, labels: NDArray[np.int64], k: int) -> Floats:
    rarest = min(Counter(labels.tolist()).values())
    margins = np.full((len(labels), k), -2.0)
    folds = StratifiedKFold(max(2, min(_FOLDS, rarest)), shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class rarer than the folds is simply missing in some
        splits = list(folds.split(features, labels))
    for train, test in splits:
        if len(set(labels[train].tolist())) < 2:
            continue
        model = _svm(features[train], labels[train])
        out = model.decision_function(features[test])
        columns = np.column_stack([-out, out]) if out.ndim == 1 else out
        margins[np.ix_(test, model.classes_)] = columns
    return margins


def _calibrate(margins: Floats, evidence: Floats, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Trust in margins and in the prompt that give the smallest held-out log loss.

    One count is spread over the labels (as in Platt 1999): a few examples without an error do not make it certain.
    """
    n, k = margins.shape
    target = np.full((n, k), 1 / (n + 1) / k)
    target[np.arange(n), labels] += n / (n + 1)

    def loss(x: Floats) -> float:
        z = np.exp(x[0]) * margins + x[1] * evidence
        z -= z.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(axis=1)) - (target * z).sum(axis=1)))

    best = minimize(loss, x0=np.array([1.0, 0.0]), bounds=[(-3, 5), (0, 20)], method="L-BFGS-B")
    return float(np.exp(best.x[0])), float(best.x[1])
