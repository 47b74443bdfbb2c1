"""How long LangGraph lets a node run: beyond that a call is thrown away, so the scheduler should know.

Read from the graph when a node begins, since ``step_timeout`` may be set at any time: ``TimeoutPolicy(run_timeout=)`` of the
node and ``step_timeout`` of the graph that it is in, also where that is a node of another. What is not seen: limits that
are given to one task alone (``Send(timeout=)``, ``@task(timeout=)``), those of graphs that LangGraph does not find in a node, and the
caller's own (``asyncio.timeout``). An ``idle_timeout`` is no limit: waiting at the gate is a sign of life.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, cast

from langgraph.pregel import Pregel

_Graph = Pregel[Any, Any, Any, Any]


class Timeouts:
    """The limits of one graph and of the graphs in it. Keeps none of them alive."""

    def __init__(self, graph: _Graph) -> None:
        self._graphs: dict[str, weakref.ref[_Graph] | None] = {"": weakref.ref(graph)}

    def of(self, path: str) -> tuple[float, float]:
        """Seconds that a node (``team:writer``) may run, and that its superstep may take; inf where there is no limit."""
        where, _, name = path.rpartition(":")
        graph = self._graph(where)
        if graph is None:
            return math.inf, math.inf
        policy = getattr(graph.nodes.get(name), "timeout", None)
        return getattr(policy, "run_timeout", None) or math.inf, graph.step_timeout or math.inf

    def _graph(self, path: str) -> _Graph | None:
        if path not in self._graphs:
            where, _, name = path.rpartition(":")
            outer = self._graph(where)
            node: Any = outer.nodes.get(name) if outer is not None else None
            inner: list[object] = list(node.subgraphs or ()) if node is not None else []
            found = [cast("_Graph", g) for g in inner if isinstance(g, Pregel)]
            self._graphs[path] = weakref.ref(found[0]) if found else None
        kept = self._graphs[path]
        return kept() if kept else None
