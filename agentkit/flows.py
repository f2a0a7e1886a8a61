"""The shape of an orchestration: which agent comes after which, on what condition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, Literal, get_args

from agentkit.blackboard import Blackboard
from agentkit.errors import SourceError

Condition = Callable[[Blackboard], bool]
Join = Literal["any", "all"]


@dataclass(frozen=True)
class Edge:
    """`target` comes after `source`, if `when` holds of what `source` knew and wrote by its end (always, by default)."""

    source: str
    target: str
    when: Condition | None = None


def sequence(*agents: str) -> tuple[Edge, ...]:
    """The edges of agents that work one after the other."""
    return tuple(Edge(a, b) for a, b in pairwise(agents))


class Flow:
    """Agents and the edges between them; what cannot run to its end is refused when it is made.

    An agent with incoming edges waits until all of them are decided. With the join `any` (default) it runs if at least
    one of them is taken, with `all` if all are. No circles: nothing can wait for itself.
    """

    def __init__(self, nodes: Sequence[str], edges: Iterable[Edge], joins: Mapping[str, Join]) -> None:
        self.edges, self.joins = tuple(edges), {node: joins.get(node, "any") for node in nodes}
        for name in [*(n for e in self.edges for n in (e.source, e.target)), *joins]:
            if name not in nodes:
                raise SourceError(f"the flow names {name!r}, which is none of the agents {list(nodes)!r}")
        if wrong := sorted(set(joins.values()) - {*get_args(Join)}):
            raise SourceError(f"a join is 'any' or 'all', not {wrong[0]!r}")
        if len({(e.source, e.target) for e in self.edges}) < len(self.edges):
            raise SourceError("two edges of the flow have the same source and target; join their conditions")
        self.incoming = {node: tuple(e for e in self.edges if e.target == node) for node in nodes}
        self.order = self._sorted(list(nodes))
        self.above: dict[str, frozenset[str]] = {}  # all that an agent directly or indirectly waits for
        for node in self.order:
            direct = {e.source for e in self.incoming[node]}
            self.above[node] = frozenset(direct.union(*(self.above[source] for source in direct)))

    def _sorted(self, nodes: list[str]) -> tuple[str, ...]:
        sorter = TopologicalSorter({node: [e.source for e in self.incoming[node]] for node in nodes})
        try:
            sorter.prepare()
        except CycleError as e:
            raise SourceError(f"the flow goes in a circle: {' → '.join(e.args[1])}") from None
        order: list[str] = []
        while sorter.is_active():
            ready = sorted(sorter.get_ready(), key=nodes.index)  # the same order in every process
            order += ready
            sorter.done(*ready)
        return tuple(order)

    def spec(self) -> dict[str, Any]:
        """The flow as JSON-able data, for the release."""
        edges = [(e.source, e.target, e.when and getattr(e.when, "__name__", str(e.when))) for e in self.edges]
        return {"edges": [dict(zip(("source", "target", "when"), e, strict=True)) for e in edges], "joins": self.joins}
