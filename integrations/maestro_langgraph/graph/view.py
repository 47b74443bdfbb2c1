"""A graph as its author would want to see it: who calls a model, as whom, with which model, tools and prompts.

The view is a plain dictionary for this process's own screen. It holds the prompts that were found; what leaves the process
(`Workflow.spec`) does not.
"""

from __future__ import annotations

from typing import Any, cast

from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from maestro_agents.workflow import Seen, merged
from maestro_langgraph.graph import END, START, Drawing, draw, name_of, summary
from maestro_langgraph.graph.moves import observed
from maestro_langgraph.graph.scan import Found
from maestro_langgraph.identity import role_of

_Graph = Pregel[Any, Any, Any, Any]


def view(graph: _Graph, seen: Seen | None = None) -> dict[str, Any]:
    """Return a compiled graph as drawn, merged with what runs showed (by default the runs of this process).

    ``{"name", "fingerprint", "runs", "longest", "nodes": [{"id", "kind", "llm", "role", "roles", "models", "tools",
    "prompts", "seen", "in_loop", "height", "on_longest", "drawn"}], "edges": [{"from", "to", "conditional", "label",
    "seen", "drawn"}], "loops", "fan_out", "warnings"}``; see `maestro_agents.workflow.merged`. Raises whatever a foreign
    node raises when it is drawn.
    """
    drawn = draw(graph)
    fingerprint = summary(graph, drawn).fingerprint
    name = name_of(graph)
    body = {
        "name": name,
        "fingerprint": fingerprint,
        "nodes": [_node(n, found, drawn, name) for n, found in drawn.nodes.items()],
        "edges": [
            {"from": a, "to": b, "conditional": conditional, "label": label}
            for (a, b), (conditional, label) in drawn.edges.items()
        ],
        "fan_out": sorted(_fan_out(drawn)),
    }
    whole = merged(body, observed(fingerprint) if seen is None else seen)
    return {**whole, "warnings": list(_warnings(whole, drawn))}


def _fan_out(drawn: Drawing) -> list[list[str]]:
    """Edges that may be taken many times at once: of a router that names ``Send``, to the nodes that it names."""
    found: list[list[str]] = []
    for source, named in drawn.sends.items():
        targets = [b for (a, b), (conditional, _) in drawn.edges.items() if a == source and conditional and b != END]
        found += [[source, b] for b in targets if b in named] or [[source, b] for b in targets]
    return found


def _node(path: str, found: Found, drawn: Drawing, name: str) -> dict[str, Any]:
    roles = [role_of(path, name, agent) for agent in sorted(drawn.agents.get(path, {""}))]
    return {
        "id": path,
        "kind": _kind(path, found, drawn),
        "llm": found.llm,
        "role": "" if path in {START, END} else roles[0],
        "roles": [] if path in {START, END} else roles,
        "models": sorted(found.models) if found.llm != "no" else [],
        "tools": sorted(found.tools),
        "prompts": found.prompts if found.llm != "no" else [],
    }


def _kind(path: str, found: Found, drawn: Drawing) -> str:
    if path in {START, END}:
        return path.strip("_")
    if found.runs_tools:
        return "tool"
    if found.llm == "yes":
        return "llm"
    if any(other.startswith(f"{path}:") for other in drawn.nodes):
        return "subgraph"
    return "plain"


def _warnings(whole: dict[str, Any], drawn: Drawing) -> list[str]:
    said: list[str] = []
    leads = {e["from"] for e in whole["edges"] if e["drawn"]}
    for path in sorted(drawn.open):
        found = drawn.nodes.get(path, Found())
        how = (
            "annotate its return type Command[Literal[...]], or add_node(..., destinations=...)"
            if found.commands
            else "give add_conditional_edges a path map, or annotate the router's return type Literal[...]"
        )
        what = "edges of" if path not in leads else "some edges of"
        said.append(f"{what} `{path}` are not declared: {how}")
    into = {e["to"] for e in whole["edges"]}
    alone = [n["id"] for n in whole["nodes"] if n["id"] not in into and n["kind"] not in {"start", "end"}]
    said += [f"nothing is known to lead to `{path}`: its way shows when it runs (--observed)" for path in sorted(alone)]
    maybe = [n["id"] for n in whole["nodes"] if n["llm"] == "maybe"]
    if maybe:
        names = ", ".join(f"`{n}`" for n in maybe)
        said.append(f"whether {names} call{'s' * (len(maybe) == 1)} an LLM shows when it runs (--observed)")
    return said


def compiled(value: object) -> _Graph | None:
    """Return the graph that a value is, compiling a StateGraph; None for anything else."""
    if isinstance(value, StateGraph):
        return cast("_Graph", cast("StateGraph[Any]", value).compile())
    return cast("_Graph", value) if isinstance(value, Pregel) else None
