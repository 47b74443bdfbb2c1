"""What a compiled LangGraph graph looks like before it ran: a fingerprint, and a first guess at what may follow what.

Read from the builder that a graph carries: nodes, edges, the declared ends of routers and ``Command``. What a node's code
reaches (`scan`) adds who calls a model, graphs that functions and tools invoke, and the tasks of the functional API. It is
a prior, no more: an untyped ``Command`` hides its edges, ``Send`` its width, a router without a map its targets. Observed
runs (`moves`) correct it. Nothing here runs the graph, reaches a network or raises.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from langgraph.pregel import Pregel

from maestro_langgraph.graph.scan import Answer, Found, scan

START: Final = "__start__"
END: Final = "__end__"
MAX_NODES: Final = 1_000
_DEEPEST: Final = 6
_Graph = Pregel[Any, Any, Any, Any]
_Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workflow:
    """A workflow as drawn."""

    #: Short hash of its structure (nodes, edges, names of agents and tools): the same in every process that builds the
    #: same graph, whatever its prompts and models are.
    fingerprint: str
    #: JSON: ``{"nodes": [{"id", "llm": yes/maybe/no}], "edges": [[from, to, conditional]]}``.
    spec: str
    #: Node -> the nodes that are known to lead to it.
    into: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]], compare=False)
    #: Nodes whose code says where they lead, and nothing else does.
    open: frozenset[str] = field(default=frozenset(), compare=False)
    #: Graphs used as nodes: their own nodes stand for them.
    containers: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(slots=True)
class Drawing:
    """A graph, drawn. Node ids are ``outer:inner``, as `moves.node_path` makes them of a running node."""

    nodes: dict[str, Found] = field(default_factory=dict[str, Found])
    #: (from, to) -> (conditional, label).
    edges: dict[_Pair, tuple[bool, str]] = field(default_factory=dict[_Pair, tuple[bool, str]])
    #: What the graph itself declares; the rest was found in code.
    declared: set[str | _Pair] = field(default_factory=set[str | _Pair])
    containers: set[str] = field(default_factory=set[str])
    open: set[str] = field(default_factory=set[str])
    #: Nodes that may begin several tasks of one node -> names that are among their targets, as far as they are known.
    sends: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    #: Node -> names that agents built by a library gave themselves.
    agents: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    tasks: set[str] = field(default_factory=set[str])

    def link(self, source: str, target: str, *, conditional: bool, label: str = "", declared: bool = True) -> None:
        was = self.edges.get((source, target))
        self.edges[source, target] = (conditional and (was is None or was[0]), label or (was[1] if was else ""))
        if declared:
            self.declared.add((source, target))


def describe(graph: _Graph) -> Workflow | None:
    """Draw a compiled graph. None where it cannot be drawn; the graph then runs without a fingerprint."""
    try:
        return summary(graph, draw(graph))
    except Exception:  # foreign nodes may fail in any way when they are drawn
        return None


def summary(graph: _Graph, drawn: Drawing) -> Workflow:
    """What of a drawing leaves the process: no prompts, no model names."""
    nodes = [n for n in sorted(drawn.nodes) if n in drawn.declared]
    edges = sorted((a, b, drawn.edges[a, b][0]) for a, b in drawn.edges if (a, b) in drawn.declared)
    tools = {n: sorted(drawn.nodes[n].tools) for n in nodes if drawn.nodes[n].runs_tools}
    shape = json.dumps([nodes, edges, tools, name_of(graph)], separators=(",", ":"))
    into: defaultdict[str, set[str]] = defaultdict(set)
    for a, b in drawn.edges:
        into[b].add(a)
    spec = {
        "nodes": [{"id": n, "llm": drawn.nodes[n].llm} for n in sorted(drawn.nodes)],
        "edges": sorted([a, b, c] for (a, b), (c, _) in drawn.edges.items()),
    }
    return Workflow(
        fingerprint=hashlib.sha256(shape.encode()).hexdigest()[:12],
        spec=json.dumps(spec, separators=(",", ":")),
        into={b: frozenset(a) for b, a in into.items()},
        open=frozenset(drawn.open),
        containers=frozenset(drawn.containers),
    )


def name_of(graph: _Graph) -> str:
    """The name that a graph was given, "" where it has only LangGraph's own."""
    name = str(graph.name or "")
    return "" if name == "LangGraph" else name


def calls_model(runnable: object) -> Answer:
    """Guess whether a node calls a model: ``yes`` where one is in reach and called, ``maybe`` where it may be."""
    return scan(runnable).llm


def draw(graph: _Graph) -> Drawing:
    """Draw a graph with all that is nested in it, its borders spliced out."""
    drawn = Drawing()
    drawn.nodes[START] = Found()
    drawn.nodes[END] = Found()
    drawn.declared |= {START, END}
    _walk(drawn, graph, "", declared=True, around=frozenset())
    _splice(drawn)
    return drawn


def _walk(drawn: Drawing, graph: _Graph, prefix: str, *, declared: bool, around: frozenset[int]) -> None:
    """Draw one graph below a prefix. Its own start and end are ``prefix + __start__`` and ``prefix + __end__``."""
    around |= {id(graph)}
    if len(around) > _DEEPEST or len(drawn.nodes) > MAX_NODES:
        return
    specs: Mapping[str, Any] = getattr(getattr(graph, "builder", None), "nodes", {})
    branches: Mapping[str, Mapping[str, Any]] = getattr(getattr(graph, "builder", None), "branches", {})
    inside = _subgraphs(graph)
    agent = str((graph.config or {}).get("metadata", {}).get("lc_agent_name") or "")
    for name, node in graph.nodes.items():
        path = prefix + name
        routers = [branch.path for branch in branches.get(name, {}).values()]
        if name == START:
            if routers and not prefix:
                drawn.nodes[START] = scan(*routers)
                drawn.sends |= {START: drawn.nodes[START].sent_to} if drawn.nodes[START].sends else {}
            continue
        if agent:
            drawn.agents[path].add(agent)
        inner = inside.get(name)
        found = Found() if isinstance(node.bound, Pregel) else scan(node.bound, *routers)
        if isinstance(inner, Pregel) and id(cast("object", inner)) not in around and found.llm != "yes":
            drawn.containers.add(path)  # also a function that only invokes it: LangGraph draws both alike
            _walk(drawn, cast("_Graph", inner), f"{path}:", declared=declared, around=around)
            continue
        drawn.nodes[path] = found
        if declared:
            drawn.declared.add(path)
        if found.sends:
            drawn.sends[path] = {prefix + to for to in found.sent_to}
        if found.commands and not getattr(specs.get(name), "ends", None):
            drawn.open.add(path)
    _edges(drawn, graph, prefix, declared=declared)
    own = [drawn.nodes[prefix + name] for name in graph.nodes if prefix + name in drawn.nodes]
    tools_run_graphs = any(found.runs_tools and found.graphs for found in own)
    for found in own:
        if tools_run_graphs and found.tools and not found.runs_tools:
            found.graphs = []  # what offers the tools to a model reaches their graphs too, and does not run them
        elif found.graphs and found.llm == "yes":
            found.llm = "maybe"  # the model may be the graph's
    for name in graph.nodes:
        if prefix + name in drawn.nodes and name != START:
            _found_inside(drawn, graph, prefix + name, around)


def _edges(drawn: Drawing, graph: _Graph, prefix: str, *, declared: bool) -> None:
    builder: Any = getattr(graph, "builder", None)
    listed = _declared_edges(builder) if builder is not None else _drawn_edges(graph)
    handed = _handoffs(drawn, prefix, graph)
    leads: set[str] = set()
    for source, target, conditional, label in listed:
        if target in handed.get(source, ()) and conditional:
            continue  # by a tool inside: that is where the edge begins
        leads.add(source)
        drawn.link(prefix + source, prefix + target, conditional=conditional, label=label, declared=declared)
    for targets in handed.values():
        for target, tool_node in targets.items():
            if prefix + target in drawn.nodes or prefix + target in drawn.containers:
                drawn.link(tool_node, prefix + target, conditional=True, label="handoff", declared=declared)
    if builder is None:
        return
    for name, branches in builder.branches.items():
        if any(branch.ends is None for branch in branches.values()):
            drawn.open.add(prefix + name)
    for name in graph.nodes:
        if name not in leads and prefix + name not in drawn.open and name != START:
            drawn.link(prefix + name, prefix + END, conditional=False, declared=declared)


def _declared_edges(builder: Any) -> Iterator[tuple[str, str, bool, str]]:
    for source, target in builder.edges:
        yield source, target, False, ""
    for sources, target in builder.waiting_edges:
        yield from ((source, target, False, "join") for source in sources)
    for source, branches in builder.branches.items():
        for branch in branches.values():
            ends: Mapping[object, str] = branch.ends or {}
            for label, target in ends.items():
                yield source, target, True, "" if label == target else str(label)
    for source, node in builder.nodes.items():
        leads = cast("Mapping[str, str] | tuple[str, ...]", node.ends or ())
        labels = leads if isinstance(leads, Mapping) else dict.fromkeys(leads, "")
        yield from ((source, target, True, str(label or "")) for target, label in labels.items())


def _drawn_edges(graph: _Graph) -> Iterator[tuple[str, str, bool, str]]:
    """Of a graph that has no builder (functional API)."""
    for edge in graph.get_graph().edges:
        final = edge.target == END and len(graph.nodes) == 1
        yield edge.source, edge.target, bool(edge.conditional) and not final, ""


def _handoffs(drawn: Drawing, prefix: str, graph: _Graph) -> dict[str, dict[str, str]]:
    """Container -> agent -> the node in the container whose tool hands over to that agent (``Command.PARENT``)."""
    handed: dict[str, dict[str, str]] = {}
    for name in graph.nodes:
        inner = f"{prefix}{name}:"
        if prefix + name in drawn.containers:
            for path, found in drawn.nodes.items():
                if path.startswith(inner) and path.count(":") == inner.count(":") and found.runs_tools:
                    handed.setdefault(name, {}).update(dict.fromkeys(found.handoffs.values(), path))
    return handed


def _found_inside(drawn: Drawing, graph: _Graph, path: str, around: frozenset[int]) -> None:
    """Draw what runs inside a node without being declared: graphs that its code invokes, ``@task`` functions."""
    found = drawn.nodes[path]
    after = [(b, label) for (a, b), (_, label) in drawn.edges.items() if a == path]
    ends: list[str] = []
    graphs = [g for g in found.graphs if id(g) not in around and g is not graph]
    for inner in graphs:
        _walk(drawn, inner, f"{path}:", declared=False, around=around)
    if graphs:
        drawn.link(path, f"{path}:{START}", conditional=True, declared=False)
        ends.append(f"{path}:{END}")
    before = path
    for name, function in found.tasks.items():
        task = f"{path}:{name}"
        drawn.nodes[task] = scan(function)
        drawn.tasks.add(task)
        drawn.link(before, task, conditional=True, declared=False)
        before = task
    if found.tasks:
        ends.append(before)
    for end in ends:
        for target, label in after:
            drawn.link(end, target, conditional=True, label=label, declared=False)


def _subgraphs(graph: _Graph) -> dict[str, object]:
    found: Iterable[tuple[str, object]] = cast("Any", graph).get_subgraphs()
    return dict(found)


def _splice(drawn: Drawing) -> None:
    """Remove the borders of nested graphs, joining what led to each with what it led to."""
    for container in drawn.containers:
        for (a, b), (conditional, label) in list(drawn.edges.items()):
            source = f"{a}:{END}" if a == container else a
            target = f"{b}:{START}" if b == container else b
            if (source, target) != (a, b):
                del drawn.edges[a, b]
                drawn.link(source, target, conditional=conditional, label=label, declared=(a, b) in drawn.declared)
                drawn.declared.discard((a, b))
        drawn.nodes.pop(container, None)
    borders = {n for edge in drawn.edges for n in edge if n.endswith((f":{START}", f":{END}"))}
    for border in sorted(borders):
        into = [(a, at) for (a, b), at in drawn.edges.items() if b == border]
        out = [(b, at) for (a, b), at in drawn.edges.items() if a == border]
        ours = {e for e in drawn.edges if border in e}
        for a, (conditional, label) in into:
            for b, (also, other) in out:
                declared = (a, border) in drawn.declared and (border, b) in drawn.declared
                drawn.link(a, b, conditional=conditional or also, label=label or other, declared=declared)
        for edge in ours:
            drawn.edges.pop(edge, None)
            drawn.declared.discard(edge)
