"""What a compiled LangGraph graph looks like before it ran: a fingerprint, and a first guess at what may follow what.

The drawn graph is a prior, no more: an untyped ``Command`` hides its edges, ``Send`` its width, a router without a map
its targets. Observed runs correct it. Nothing here runs the graph, reaches a network or raises.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from langchain_core.language_models import BaseLanguageModel
from langchain_core.runnables import Runnable
from langgraph.pregel import Pregel

START: Final = "__start__"
END: Final = "__end__"
Answer = Literal["yes", "maybe", "no"]
_Graph = Pregel[Any, Any, Any, Any]

_MODEL_WORDS: Final = frozenset({
    "ChatOpenAI", "AzureChatOpenAI", "init_chat_model", "OpenAI", "AsyncOpenAI", "ChatLiteLLM", "ChatVLLM",
    "get_llm", "get_model", "load_chat_model", "with_structured_output", "bind_tools", "completions", "responses",
})  # fmt: skip
_CALL_WORDS: Final = frozenset({"invoke", "ainvoke", "stream", "astream", "batch", "abatch"})
_LIBRARIES: Final = frozenset({
    "langchain", "langgraph", "langsmith", "openai", "pydantic", "asyncio", "logging", "json", "typing",
})  # fmt: skip
_PARTS: Final = (
    "first",
    "middle",
    "last",
    "steps",
    "steps__",
    "bound",
    "func",
    "afunc",
    "runnable",
    "default",
    "branches",
    "fallbacks",
    "mapper",
)
_DEEPEST: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Workflow:
    """A workflow as drawn."""

    #: Short hash of the nodes and edges; the same for every process that builds the same graph.
    fingerprint: str
    #: JSON: ``{"nodes": [{"id", "llm": yes/maybe/no}], "edges": [[from, to, conditional]]}``.
    spec: str


def describe(graph: _Graph) -> Workflow | None:
    """Draw a compiled graph. None where it cannot be drawn; the graph then runs without a fingerprint."""
    try:
        nodes, edges = _draw(graph)
        answers = _answers(graph)
        shape = json.dumps([sorted(nodes), sorted(edges)], separators=(",", ":"))
        spec = {
            "nodes": [{"id": n, "llm": _answer(answers, n)} for n in sorted(nodes)],
            "edges": [list(e) for e in sorted(edges)],
        }
        return Workflow(
            fingerprint=hashlib.sha256(shape.encode()).hexdigest()[:12],
            spec=json.dumps(spec, separators=(",", ":")),
        )
    except Exception:  # foreign nodes may fail in any way when they are drawn
        return None


def _draw(graph: _Graph) -> tuple[set[str], set[tuple[str, str, bool]]]:
    drawn = graph.get_graph(xray=_local(graph))
    edges = {(e.source, e.target, bool(e.conditional)) for e in drawn.edges}
    inner = [n for n in drawn.nodes if n.endswith((f":{START}", f":{END}"))]
    for pseudo in inner:
        edges = _splice(edges, pseudo)
    nodes = set(drawn.nodes) - set(inner)
    expanded = {n.split(":")[0] for n in nodes if ":" in n}
    return nodes | {n for n in graph.nodes if n not in expanded}, edges


def _local(graph: _Graph) -> bool:
    """Whether every subgraph lives in this process: one that does not would be asked for its drawing over HTTP."""
    return all(isinstance(inner, Pregel) and _local(cast("_Graph", inner)) for inner in _subgraphs(graph).values())


def _subgraphs(graph: _Graph) -> dict[str, object]:
    found: Iterable[tuple[str, object]] = cast("Any", graph).get_subgraphs()
    return dict(found)


def _splice(edges: set[tuple[str, str, bool]], pseudo: str) -> set[tuple[str, str, bool]]:
    """Remove a subgraph's start or end, joining what led to it with what it led to."""
    into = [(a, c) for a, b, c in edges if b == pseudo]
    out = [(b, c) for a, b, c in edges if a == pseudo]
    kept = {e for e in edges if pseudo not in e[:2]}
    return kept | {(a, b, c or d) for a, c in into for b, d in out}


def _answers(graph: _Graph, prefix: str = "") -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    subgraphs = _subgraphs(graph)
    for name, node in graph.nodes.items():
        inner = subgraphs.get(name)
        if isinstance(inner, Pregel):
            found |= _answers(cast("_Graph", inner), f"{prefix}{name}:")
        found[prefix + name] = "no" if name == START else calls_model(node.bound)
    return found


def _answer(answers: Mapping[str, Answer], node: str) -> Answer:
    return answers.get(node, "no" if node in {START, END} else "maybe")


def calls_model(runnable: object) -> Answer:
    """Guess whether a node calls a model: a model in reach is ``yes``, words that sound like one are ``maybe``."""
    hints: set[str] = set()
    if _reaches_model(runnable, hints, set(), 0):
        return "yes"
    return "maybe" if hints else "no"


def _reaches_model(obj: object, hints: set[str], seen: set[int], depth: int) -> bool:
    # `type(obj)`, not `isinstance`: a lazy proxy must not be woken up by being looked at
    kind: type[Any] = type(obj)
    if depth > _DEEPEST or id(obj) in seen or obj is None or issubclass(kind, str | bytes | int | float | type):
        return False
    seen.add(id(obj))
    if issubclass(kind, BaseLanguageModel):
        return True
    return any(_reaches_model(part, hints, seen, depth + 1) for part in _parts(obj, kind, hints))


def _parts(obj: object, kind: type[Any], hints: set[str]) -> Iterable[object]:
    if issubclass(kind, types.FunctionType):
        return _function_parts(cast("types.FunctionType", obj), hints)
    if issubclass(kind, types.MethodType):
        method = cast("types.MethodType", obj)
        return (
            [method.__func__, *list(vars(method.__self__).values())[:60]]
            if hasattr(method.__self__, "__dict__")
            else []
        )
    if issubclass(kind, functools.partial):
        bound = cast("functools.partial[Any]", obj)
        return [bound.func, *bound.args, *bound.keywords.values()]
    if issubclass(kind, Pregel):
        hints.add("graph")  # run inside a function: whether it calls a model shows when it runs
        return []
    if issubclass(kind, Runnable):
        own: Mapping[str, object] = getattr(cast("Any", obj), "__dict__", {})
        return [own[name] for name in _PARTS if name in own]
    if issubclass(kind, dict):
        return list(cast("dict[Any, object]", obj).values())[:60]
    if issubclass(kind, list | tuple | set | frozenset):
        return list(cast("Iterable[object]", obj))[:60]
    if getattr(kind, "__module__", "").split(".")[0] == "openai":
        hints.add("openai")
        return []
    call = inspect.getattr_static(kind, "__call__", None)
    return [types.MethodType(call, obj)] if isinstance(call, types.FunctionType) else []


def _function_parts(function: types.FunctionType, hints: set[str]) -> Iterable[object]:
    codes = [function.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    names = {name for code in codes for name in code.co_names}
    hints |= names & _MODEL_WORDS
    if names & _CALL_WORDS:
        hints.add("call")
    parts = [_cell(cell) for cell in function.__closure__ or ()]
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        library = str(getattr(cast("object", type(value)), "__module__", "")).startswith("builtins")
        if isinstance(value, types.FunctionType):
            top = (value.__module__ or "").split(".")[0]
            library = top in _LIBRARIES or top.startswith(("langchain_", "langgraph_"))
        if not library and not isinstance(value, types.ModuleType | type):
            parts.append(value)
        elif isinstance(value, list | tuple | dict):
            parts.append(cast("object", value))
    return parts


def _cell(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
