"""Putting Maestro on a program, and what it reads from a graph before it ran."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import openai._base_client as sdk
import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers import context as tracer_context
from langchain_openai import ChatOpenAI
from langgraph.func import entrypoint
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel.remote import RemoteGraph
from langgraph.types import Command

from maestro_agents.client import Client
from maestro_agents.errors import ConfigError
from maestro_langgraph import graph as graph_module
from maestro_langgraph import maestro
from maestro_langgraph.graph import describe
from maestro_langgraph.identity import MaestroHandler
from tests.stub_openai import StubServer, managed, stub_servers

MODEL = FakeListChatModel(responses=["x"])


class State(TypedDict, total=False):
    q: str
    n: int


def one_node(name: str = "node", body: Any = lambda _: {}) -> StateGraph[Any]:
    graph = StateGraph(State)
    graph.add_node(name, body)
    graph.add_edge(START, name)
    return graph


def handlers(graph: Any) -> list[MaestroHandler]:
    return [h for h in (graph.config or {}).get("callbacks") or [] if isinstance(h, MaestroHandler)]


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Whatever a test attached is taken off."""
    yield
    maestro.uninstall()


# -- what is read from a graph -----------------------------------------------------------------------------------------
def build(*, closed: bool = True, last: str = "judge") -> CompiledStateGraph[Any]:
    def plan(state: State) -> State:
        MODEL.invoke("plan")
        return {}

    def built_inside(state: State) -> State:
        ChatOpenAI(model="late", api_key="k").invoke("x")
        return {}

    graph = StateGraph(State)
    graph.add_node("plan", plan)
    graph.add_node("write", built_inside)
    graph.add_node(last, lambda _: {})
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "write")
    graph.add_edge("write", last)
    graph.add_conditional_edges(last, lambda _: END, ["plan", END] if closed else [END])
    return graph.compile()


def test_the_same_structure_has_the_same_fingerprint() -> None:
    """Two builds agree; another edge or another node name does not; the graph's name is no structure."""
    first = describe(build())
    assert first
    assert describe(build()) == first
    for other in (build(closed=False), build(last="critic")):
        workflow = describe(other)
        assert workflow
        assert workflow.fingerprint != first.fingerprint
    assert len(first.fingerprint) == 12


def test_the_spec_names_nodes_edges_and_who_calls_a_model() -> None:
    """A model in reach is yes, one built inside the node is maybe, neither is no."""
    workflow = describe(build())
    assert workflow
    spec = json.loads(workflow.spec)
    assert {n["id"]: n["llm"] for n in spec["nodes"]} == {
        "__start__": "no",
        "plan": "yes",
        "write": "maybe",
        "judge": "no",
        "__end__": "no",
    }
    assert ["plan", "write", False] in spec["edges"]
    assert ["judge", "plan", True] in spec["edges"]


def test_a_subgraph_is_drawn_through_its_borders() -> None:
    """Nodes of a subgraph are ``outer:inner``, and edges lead to them directly."""
    graph = StateGraph(State)
    graph.add_node("team", one_node("write", lambda _: {"q": MODEL.invoke("x").content}).compile())
    graph.add_node("after", lambda _: {})
    graph.add_edge(START, "team")
    graph.add_edge("team", "after")
    workflow = describe(graph.compile())
    assert workflow
    spec = json.loads(workflow.spec)
    assert {n["id"]: n["llm"] for n in spec["nodes"]}["team:write"] == "yes"
    assert ["__start__", "team:write", False] in spec["edges"]
    assert ["team:write", "after", False] in spec["edges"]
    assert not any(":__" in str(n["id"]) for n in spec["nodes"])


def test_nodes_that_no_edge_shows_are_still_there() -> None:
    """An untyped ``Command`` hides where it leads; the node it leads to is listed all the same."""

    def jump(state: State) -> Command[Any]:
        return Command(goto="hidden")

    def typed(state: State) -> Command[Literal["typed_target"]]:
        return Command(goto="typed_target")

    graph = one_node("jump", jump)
    graph.add_node("hidden", lambda _: {})
    graph.add_node("typed", typed)
    graph.add_node("typed_target", lambda _: {})
    graph.add_edge(START, "typed")
    workflow = describe(graph.compile())
    assert workflow
    spec = json.loads(workflow.spec)
    assert {"hidden", "typed_target"} <= {n["id"] for n in spec["nodes"]}
    assert ["typed", "typed_target", True] in spec["edges"]


def test_a_model_is_found_wherever_it_hangs() -> None:
    """In a sequence, a partial, a method's object, a global, a closure in a closure."""

    class Agent:
        def __init__(self) -> None:
            self.model = MODEL

        def run(self, state: State) -> State:
            return {"q": str(self.model.invoke("x").content)}

    def outer() -> Any:
        inner = MODEL.with_retry()

        def call(state: State) -> Any:
            return inner.invoke("x")

        return lambda state: {**state, "out": call(state)}

    def by_argument(model: Any, state: State) -> Any:
        return model.invoke("x")

    for runnable in (
        RunnableLambda(lambda _: "x") | MODEL,
        partial(by_argument, MODEL),
        Agent().run,
        outer(),
        MODEL.with_fallbacks([MODEL]),
    ):
        assert graph_module.calls_model(runnable) == "yes", runnable
    assert graph_module.calls_model(lambda s: s) == "no"


def test_a_graph_that_cannot_be_drawn_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while a graph is looked at stays with us."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError

    compiled = one_node().compile()
    monkeypatch.setattr(type(compiled), "get_graph", broken)
    assert describe(compiled) is None
    assert maestro.wrap(compiled).invoke({"q": "a"}) == {"q": "a"}


def test_a_remote_subgraph_is_not_asked_for_its_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at a graph reaches no network."""

    def over_the_network(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("asked over HTTP")

    monkeypatch.setattr(RemoteGraph, "get_graph", over_the_network)
    graph = StateGraph(State)
    graph.add_node("far", RemoteGraph("far", url="http://127.0.0.1:9"))
    graph.add_edge(START, "far")
    workflow = describe(graph.compile())
    assert workflow
    assert '"far"' in workflow.spec


def test_the_static_graph_is_handed_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first call of a workflow, under its fingerprint, never again."""
    said: list[tuple[str, str]] = []
    with stub_servers(1) as (server,), managed(tmp_path, {"a": server.url}):
        room = Client.current()._room

        async def spy(workflow: str, spec: str) -> None:
            said.append((workflow, spec))

        monkeypatch.setattr(room, "describe", spy)
        llm = ChatOpenAI(model="stub", base_url=server.url, api_key="k")
        compiled = maestro.wrap(one_node("node", lambda _: {"q": llm.invoke("x").content}).compile())
        compiled.invoke({"q": ""})
        compiled.invoke({"q": ""})
    workflow = describe(compiled)
    assert workflow
    assert said == [(workflow.fingerprint, workflow.spec)]


# -- attaching ---------------------------------------------------------------------------------------------------------
def test_wrap_returns_the_same_graph_with_one_more_callback() -> None:
    """Same object, same type, metadata untouched; again changes nothing but the options."""
    compiled = one_node().compile()
    compiled.config = {"metadata": {"mine": 1}, "callbacks": [MaestroHandler.__mro__[1]()], "tags": ["t"]}
    assert maestro.wrap(compiled, tenant="a") is compiled
    assert maestro.wrap(compiled, deadline_s=5) is compiled
    (handler,) = handlers(compiled)
    assert (handler.options.tenant, handler.options.deadline_s) == ("a", 5)
    assert compiled.config["metadata"] == {"mine": 1}
    assert compiled.config["tags"] == ["t"]
    assert len(compiled.config["callbacks"]) == 2


def test_the_decorator_takes_every_form_of_builder() -> None:
    """Bare or with options, sync or async, returning a compiled graph or a builder: the name and signature stay."""

    @maestro
    def bare(name: str = "n") -> CompiledStateGraph[Any]:
        """Doc."""
        return one_node(name).compile()

    @maestro(service_class="batch", deadline_s=60, tenant="t", agent="a")
    def with_options() -> CompiledStateGraph[Any]:
        return one_node().compile()

    @maestro()
    def uncompiled() -> StateGraph[Any]:
        return one_node()

    assert bare.__name__ == "bare"
    assert list(inspect.signature(bare).parameters) == ["name"]
    assert handlers(bare("other"))
    assert handlers(with_options())[0].options.tenant == "t"
    builder = uncompiled()
    assert isinstance(builder, StateGraph)
    assert handlers(builder.compile())


async def test_an_async_builder_stays_async() -> None:
    """Its graph is wrapped when it is awaited."""

    @maestro(tenant="t")
    async def build_async() -> CompiledStateGraph[Any]:
        return one_node().compile()

    @maestro
    async def uncompiled() -> StateGraph[Any]:
        return one_node()

    assert inspect.iscoroutinefunction(build_async)
    assert handlers(await build_async())[0].options.tenant == "t"
    assert handlers((await uncompiled()).compile())


def test_a_state_graph_is_wrapped_when_it_is_compiled() -> None:
    """``wrap`` on a builder returns the builder; each graph it compiles carries the options."""
    builder = one_node()
    assert maestro.wrap(builder, tenant="t") is builder
    assert maestro.wrap(builder, agent="a") is builder
    one, two = builder.compile(name="x"), builder.compile()
    assert one.get_name() == "x"
    for compiled in (one, two):
        (handler,) = handlers(compiled)
        assert (handler.options.tenant, handler.options.agent) == ("t", "a")


def test_the_functional_api_is_wrapped_too() -> None:
    """An ``@entrypoint`` is a graph like any other."""

    @maestro
    @entrypoint()
    def flow(x: int) -> int:
        return x + 1

    assert handlers(flow)
    assert flow.invoke(1) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"deadline_s": 0}, "deadline_s = 0: give the seconds"),
        ({"deadline_s": -1.5}, "deadline_s = -1.5"),
        ({"deadline_s": "10"}, "deadline_s = '10'"),
        ({"deadline_s": float("nan")}, "deadline_s = nan"),
        ({"deadline_s": True}, "deadline_s = True"),
        ({"service_class": "fast"}, 'say "interactive" or "batch"'),
        ({"service_clas": "batch"}, "did you mean service_class?"),
        ({"colour": 1}, "known are service_class"),
        ({"tenant": ""}, "give a name"),
        ({"agent": 3}, "agent = 3"),
        ({"refuse_late": "yes"}, "say True or False"),
    ],
)
def test_a_wrong_option_says_what_to_do(options: dict[str, Any], says: str) -> None:
    """At once, in one line, wherever it is said."""
    compiled = one_node().compile()
    for say in (
        lambda: maestro(**options),
        lambda: maestro.wrap(compiled, **options),
        lambda: maestro.install(**options),
        lambda: maestro.options(**options).__enter__(),
    ):
        with pytest.raises(ConfigError) as e:
            say()
        assert says in str(e.value)
        assert "\n" not in str(e.value)
    assert not handlers(compiled)


def test_what_is_no_graph_is_refused() -> None:
    """A thing that is no graph and a function that returns none get one clear line."""
    for thing in (3, "graph", None):
        with pytest.raises(ConfigError, match="give maestro a StateGraph"):
            maestro.wrap(thing)  # type: ignore[type-var]

    @maestro
    def forgot() -> None:
        one_node().compile()

    with pytest.raises(ConfigError, match=r"forgot\(\) is decorated with @maestro and returned nothing"):
        forgot()
    with pytest.raises(ConfigError, match="deadline_s"):
        maestro.configure(deadline_s=-1)


def test_install_sees_every_graph_and_uninstall_puts_everything_back() -> None:
    """Gate, hook, compile and callbacks are as before; twice is once."""
    wrapped_before = one_node().compile()
    found = (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request, StateGraph.compile, wrapped_before.config)
    hooks = list(tracer_context._configure_hooks)
    maestro.install(tenant="t")
    maestro.install()
    maestro.wrap(wrapped_before)
    assert len(tracer_context._configure_hooks) == len(hooks) + 1
    seen = one_node().compile()
    assert len(handlers(seen)) == 1
    builder = maestro.wrap(one_node())
    maestro.uninstall()
    maestro.uninstall()
    now = (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request, StateGraph.compile, wrapped_before.config)
    assert now == found
    assert tracer_context._configure_hooks == hooks
    assert not handlers(seen)
    assert not handlers(builder.compile())
    assert not handlers(one_node().compile())


def test_a_graph_keeps_its_own_callbacks_through_wrap_and_uninstall(tmp_path: Path) -> None:
    """A callback of the user is called as before, with Maestro and after it."""
    calls: list[str] = []

    class Mine(MaestroHandler.__mro__[1]):  # type: ignore[misc,name-defined]
        def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
            calls.append("start")

    compiled = one_node().compile().with_config(callbacks=[Mine()])
    compiled.invoke({"q": ""})
    without = len(calls)
    maestro.wrap(compiled)
    compiled.invoke({"q": ""})
    maestro.uninstall()
    compiled.invoke({"q": ""})
    assert len(calls) == 3 * without > 0


def test_the_model_is_named_in_the_engine_that_serves_it(tmp_path: Path) -> None:
    """End to end: a decorated builder's call is served by the fleet, not by the URL it names."""
    with stub_servers(1) as servers, managed(tmp_path, {"a": servers[0].url}):
        server: StubServer = servers[0]

        @maestro(service_class="batch")
        def program() -> CompiledStateGraph[Any]:
            llm = ChatOpenAI(model="stub", base_url="http://127.0.0.1:9/v1", api_key="k", max_retries=0)
            return one_node("ask", lambda s: {"q": llm.invoke(s["q"]).content}).compile()

        assert program().invoke({"q": "hello"}) == {"q": "echo 1 of hello"}
        assert len(server.requests) == 1
