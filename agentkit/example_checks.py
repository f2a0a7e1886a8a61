"""Reports on an example file: class balance and near-duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from agentkit.errors import UsageError
from agentkit.examples import AnyPath, Example, read_examples, sha256_of


class NearDuplicate(NamedTuple):
    """Two cases that say nearly the same; `other` is `FILE:ID` where it stands in another file."""

    id: str
    other: str
    similarity: float


@dataclass(frozen=True)
class Report:
    """What stands in a valid example file.

    `balance` has the count of each value, most frequent first, for every expected field whose values are all
    strings, bools or null and at most 20 different ones. `unlabelled` counts the cases whose `expected` is empty.
    """

    path: Path
    count: int
    sha256: str
    by_task_type: dict[str, int]
    by_tag: dict[str, int]
    balance: dict[str, dict[str | bool | None, int]]
    unlabelled: int
    near_duplicates: list[NearDuplicate]


def check_examples(path: AnyPath, *, against: Sequence[AnyPath] = (), threshold: float = 0.8) -> Report:
    """Read a file and report its size, hash, class balance and near-duplicates.

    Near-duplicates have a cosine similarity of at least `threshold` between the TF-IDF vectors (character 3- to
    5-grams inside words, so word order does not hide a copy) of their joined text inputs. Each example is listed
    with its nearest earlier one in the file and its nearest in each file of `against`: the list stays short where
    hundreds say the same, and with all listed examples gone no near-duplicate is left.

    Raises:
        DataError: this file or one of `against` is not valid, see `read_examples`.
        UsageError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold must be above 0 and at most 1, got {threshold!r}")
    path = Path(path)
    examples = read_examples(path)
    others = {p: read_examples(p) for p in map(Path, against) if p.resolve() != path.resolve()}
    return Report(
        path=path,
        count=len(examples),
        sha256=sha256_of(path),
        by_task_type=_counts(e.task_type for e in examples),
        by_tag=_counts(tag for e in examples for tag in set(e.tags)),
        balance=_balance(examples),
        unlabelled=sum(not e.expected for e in examples),
        near_duplicates=_near_duplicates(examples, others, threshold),
    )


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], str(pair[0]))))


def _balance(examples: list[Example]) -> dict[str, dict[str | bool | None, int]]:
    values: dict[str, list[Any]] = {}
    for example in examples:
        for name, value in example.expected.items():
            values.setdefault(name, []).append(value)
    plain = {n: _counts(v) for n, v in values.items() if all(isinstance(x, str | bool | None) for x in v)}
    return {name: counts for name, counts in plain.items() if len(counts) <= 20}


def _text_of(example: Example) -> str:
    return "\n".join(value for value in example.inputs.values() if isinstance(value, str))


def _near_duplicates(
    examples: list[Example], others: Mapping[Path, list[Example]], threshold: float
) -> list[NearDuplicate]:
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    own = len(examples)
    names = [e.id for e in examples] + [f"{p.name}:{e.id}" for p, es in others.items() for e in es]
    texts = [_text_of(e) for es in (examples, *others.values()) for e in es]
    group = np.repeat(np.arange(1 + len(others)), [own, *map(len, others.values())])
    if not any(text.strip() for text in texts):
        return []
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32).fit_transform(texts)
    found: list[NearDuplicate] = []
    for i, j, similarity in _similar_pairs(vectors, own, threshold):
        pair = i * (1 + len(others)) + group[j]  # one example and one file
        order = np.lexsort((j, -similarity, pair))
        best = order[np.unique(pair[order], return_index=True)[1]]
        listed = zip(i[best], j[best], similarity[best], strict=True)
        found += [NearDuplicate(names[a], names[b], round(float(s), 4)) for a, b, s in listed]
    return found


def _similar_pairs(vectors: Any, own: int, threshold: float) -> Iterator[tuple[Any, Any, Any]]:
    """(i, j, similarity) arrays of all pairs at or above the threshold: i among the first `own`, j < i or not own.

    Exact, and far cheaper than the full product: with every vector's features ordered from rare to common, cut
    where what follows is shorter than the threshold. A pair that shares nothing before the cuts stays below it.
    """
    import numpy as np

    heads = _heads(vectors, threshold)
    for start in range(0, own, 256):
        product = (heads[start : min(start + 256, own)] @ heads.T).tocoo()
        i, j = product.row.astype(np.int64) + start, product.col.astype(np.int64)
        wanted = (j < i) | (j >= own)
        i, j = i[wanted], j[wanted]
        cuts = range(0, len(i), 10_000)
        parts = [vectors[i[c : c + 10_000]].multiply(vectors[j[c : c + 10_000]]).sum(axis=1) for c in cuts]
        similarity = np.concatenate([np.asarray(p).ravel() for p in parts]) if parts else np.zeros(0)
        close = similarity >= threshold - 1e-6  # 32-bit sums of equal texts end a little below 1
        yield i[close], j[close], similarity[close]


def _heads(vectors: Any, threshold: float) -> Any:
    import numpy as np

    heads = vectors[:, np.argsort(vectors.getnnz(axis=0), kind="stable")].tocsr()
    heads.sort_indices()
    squares = heads.data.astype(np.float64) ** 2
    sums = np.concatenate([[0.0], np.cumsum(squares)])
    rest = np.repeat(sums[heads.indptr[1:]], np.diff(heads.indptr)) - sums[:-1]
    heads.data[rest < threshold**2 - 1e-6] = 0
    heads.eliminate_zeros()
    return heads
