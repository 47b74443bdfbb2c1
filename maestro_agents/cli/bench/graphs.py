"""`maestro bench graphs`: what is read from a graph before it runs, held to the truth, and how many runs mend the rest.

The truth is written by hand (``sample_workflows/constructs/truth.toml``). Each construct is looked at, compared, and then run
on an emulated engine until what was drawn and what was seen together are the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import os
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Final, cast

from maestro_agents.cli.demo_pass import sample
from maestro_agents.client import Client
from maestro_agents.simulator.engine import EngineProfile
from maestro_agents.workflow import Seen
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig

MODEL: Final = "graphs"
MAX_RUNS: Final = 6
_BORDERS: Final = {"__start__", "__end__"}
_SPEED: Final = 50.0

Edge = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """One construct as it really is: see the head of ``truth.toml``."""

    nodes: Mapping[str, str]
    edges: frozenset[Edge]
    tools: Mapping[str, list[str]]
    roles: Mapping[str, list[str]]
    vary: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A view of a graph, held to the truth."""

    nodes: int
    nodes_missed: list[str]
    nodes_spurious: list[str]
    llm_right: int
    llm_maybe: list[str]
    llm_wrong: list[str]
    roles: int
    roles_wrong: list[str]
    tools: int
    tools_wrong: list[str]
    edges: int
    edges_missed: list[str]
    edges_spurious: list[str]

    @property
    def complete(self) -> bool:
        """All nodes, all answers, all edges are there (what was declared and never happens may be there too)."""
        return not (self.nodes_missed or self.llm_maybe or self.llm_wrong or self.edges_missed)

    def words(self) -> str:
        """What is missing, in words."""
        said = [
            f"{what} {', '.join(names)}"
            for what, names in (
                ("does not see", self.nodes_missed),
                ("takes for a node", self.nodes_spurious),
                ("unsure of", self.llm_maybe),
                ("WRONG about", self.llm_wrong),
                ("other role:", self.roles_wrong),
                ("other tools:", self.tools_wrong),
                ("misses", self.edges_missed),
                ("never happens:", self.edges_spurious),
            )
            if names
        ]
        return "; ".join(said)


def truths() -> dict[str, Truth]:
    """The truth of each construct, by hand."""
    folder = resources.files(sample("constructs"))
    body = tomllib.loads(folder.joinpath("truth.toml").read_text(encoding="utf-8"))
    return {
        name: Truth(
            nodes=t["nodes"],
            edges=frozenset((a, b) for a, b in (e.split(" > ") for e in t["edges"])),
            tools=t.get("tools", {}),
            roles=t.get("roles", {}),
            vary=t.get("vary", ()),
        )
        for name, t in body.items()
    }


def held(view: Mapping[str, Any], truth: Truth) -> Row:
    """Compare a view (`maestro_langgraph.graph.view`) with the truth."""
    nodes = {str(n["id"]): n for n in view["nodes"] if n["id"] not in _BORDERS}
    edges = {(str(e["from"]), str(e["to"])) for e in view["edges"]}
    known = [n for n in truth.nodes if n in nodes]
    callers = [n for n in known if truth.nodes[n] == "yes"]
    maybe = [n for n in known if nodes[n]["llm"] == "maybe"]
    wrong = [n for n in known if nodes[n]["llm"] not in {"maybe", truth.nodes[n]}]
    roles_wrong = [n for n in callers if nodes[n].get("roles", [n]) != truth.roles.get(n, [n])]
    tools_wrong = [n for n in known if nodes[n].get("tools", []) != truth.tools.get(n, [])]
    return Row(
        nodes=len(known),
        nodes_missed=sorted(truth.nodes.keys() - nodes.keys()),
        nodes_spurious=sorted(nodes.keys() - truth.nodes.keys()),
        llm_right=len(known) - len(maybe) - len(wrong),
        llm_maybe=maybe,
        llm_wrong=wrong,
        roles=len(callers) - len(roles_wrong),
        roles_wrong=roles_wrong,
        tools=len(known) - len(tools_wrong),
        tools_wrong=tools_wrong,
        edges=len(edges & truth.edges),
        edges_missed=sorted(f"{a} > {b}" for a, b in truth.edges - edges),
        edges_spurious=sorted(f"{a} > {b}" for a, b in edges - truth.edges),
    )


def run(names: Sequence[str], max_runs: int, say: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Look at each construct, then run it up to ``max_runs`` times; a row each, also given to ``say`` as it comes."""
    known = truths()
    rows: list[dict[str, Any]] = []
    with _fleet(), asyncio.Runner() as loop:
        for name in names or sorted(known):
            try:
                module = sample(f"constructs.{name}")
            except ModuleNotFoundError as e:
                row: dict[str, Any] = {"construct": name, "skipped": f"needs {e.name}"}
            else:
                row = {"construct": name, **loop.run(_one(module, known[name], max_runs))}
            rows.append(row)
            say(row)
    return rows


async def _one(module: ModuleType, truth: Truth, max_runs: int) -> dict[str, Any]:
    from maestro_langgraph import maestro
    from maestro_langgraph.graph import describe
    from maestro_langgraph.graph.view import view

    chat_model = inspect.signature(module.build).parameters["model"].default
    graph = module.build(functools.partial(chat_model, model=MODEL), is_async=True)
    describe(graph)  # the first look at a construct compiles nothing and reads no file, but fills caches
    began_s = time.perf_counter()
    describe(graph)
    look_ms = (time.perf_counter() - began_s) * 1e3
    static = held(view(graph, Seen()), truth)
    maestro.wrap(graph)
    after: dict[str, int | None] = dict.fromkeys(("nodes", "llm", "edges"))
    now = static
    for runs in range(max_runs + 1):
        if runs:
            await _run(graph, module, truth.vary, runs)
            now = held(view(graph), truth)
        for what, missing in (
            ("nodes", now.nodes_missed),
            ("llm", now.llm_maybe + now.llm_wrong + now.nodes_missed),
            ("edges", now.edges_missed),
        ):
            if not missing and after[what] is None:
                after[what] = runs
            elif missing:
                after[what] = None
        if now.complete and runs:
            break
    taken = {(e["from"], e["to"]) for e in view(graph)["edges"] if e["seen"]}
    return {
        "true": {"nodes": len(truth.nodes), "llm": list(truth.nodes.values()).count("yes"), "edges": len(truth.edges)},
        "look_ms": look_ms,
        "static": dataclasses.asdict(static),
        "words": static.words(),
        "merged": dataclasses.asdict(now),
        "merged_words": now.words(),
        "seen": len(taken & truth.edges),
        "seen_wrong": sorted(f"{a} > {b}" for a, b in taken - truth.edges),
        "complete_after_runs": after,
    }


async def _run(graph: Any, module: ModuleType, vary: Sequence[str], n: int) -> None:
    given = _replaced(module.INPUT, vary[0], vary[(n - 1) % len(vary)]) if vary else module.INPUT
    config = {"configurable": {"thread_id": f"run-{n}"}}
    await graph.ainvoke(given, config)
    if (resume := getattr(module, "RESUME", None)) is not None:
        await graph.ainvoke(resume, config)


def _replaced(value: Any, old: str, new: str) -> Any:
    """An input with one text in the place of another."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {k: _replaced(v, old, new) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_replaced(v, old, new) for v in cast("list[Any]", value)]
    return value


@contextlib.contextmanager
def _fleet() -> Iterator[None]:
    """One emulated engine that stands for provider and fleet; Maestro on."""
    profile = dataclasses.replace(EngineProfile(), max_model_len=65_536)
    config = EmulatorConfig(models=(EmulatedModel(name=MODEL, profile=profile),), speed=_SPEED)
    before = dict(os.environ)
    with Emulator(config) as engine, tempfile.TemporaryDirectory(prefix="maestro-graphs-") as folder, warnings.catch_warnings():  # fmt: skip
        warnings.simplefilter("ignore")
        fleet = Path(folder) / "fleet.toml"
        fleet.write_text(f'[[engine]]\nid = "a"\nmodel = "{MODEL}"\nurl = "{engine.url}"\n', encoding="utf-8")
        for name in [n for n in before if n.startswith(("MAESTRO_", "OPENAI_", "LANGSMITH_"))]:
            del os.environ[name]
        os.environ |= {
            "OPENAI_BASE_URL": engine.url,
            "OPENAI_API_KEY": "none",
            "MAESTRO_SAMPLE_MODEL": MODEL,
            "MAESTRO_FLEET": str(fleet),
        }
        Client.reset()
        try:
            yield
        finally:
            from maestro_langgraph import maestro

            maestro.uninstall()
            Client.reset()
            os.environ.clear()
            os.environ.update(before)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals over the constructs that could be looked at."""
    found = [r for r in rows if "skipped" not in r]

    def share(what: str, of: str) -> str:
        return f"{sum(r['static'][what] for r in found)}/{sum(r['true'][of] for r in found)}"

    after = [n for r in found for n in r["complete_after_runs"].values()]
    return {
        "graphs": len(found),
        "nodes": share("nodes", "nodes"),
        "llm_right": sum(r["static"]["llm_right"] for r in found),
        "llm_maybe": sum(len(r["static"]["llm_maybe"]) for r in found),
        "llm_wrong": sum(len(r["static"]["llm_wrong"]) for r in found),
        "roles": share("roles", "llm"),
        "tools": share("tools", "nodes"),
        "edges": share("edges", "edges"),
        "edges_spurious": sum(len(r["static"]["edges_spurious"]) for r in found),
        "seen": f"{sum(r['seen'] for r in found)}/{sum(r['true']['edges'] for r in found)}",
        "seen_wrong": sum(len(r["seen_wrong"]) for r in found),
        "runs_at_most": max((n for n in after if n is not None), default=0),
        "incomplete": sorted(r["construct"] for r in found if None in r["complete_after_runs"].values()),
        "look_ms_largest": max((r["look_ms"] for r in found), default=0.0),
    }
