"""Putting Maestro on a program, and what it reads from a graph before it ran."""

from __future__ import annotations

import inspect
import json
import operator
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypedDict

import openai._base_client as sdk
import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers import context as tracer_context
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel.remote import RemoteGraph
from langgraph.types import Command, Send, interrupt

from maestro_agents.cli.bench import graphs
from maestro_agents.cli.demo_pass import sample
from maestro_agents.client import Client
from maestro_agents.core import RunEnd
from maestro_agents.errors import ConfigError
from maestro_agents.workflow import Seen
from maestro_langgraph import graph as graph_module
from maestro_langgraph import maestro, runs
from maestro_langgraph.graph import describe, moves
from maestro_langgraph.graph.moves import MAX_ENTRIES, Moves, observed
from maestro_langgraph.graph.scan import scan
from maestro_langgraph.graph.view import view
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
    monkeypatch.setattr(type(compiled), "get_subgraphs", broken)
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


# -- the truth, by hand ------------------------------------------------------------------------------------------------
UNDECLARED = {"command_untyped": 1, "router_without_map": 3}
"""Constructs whose programs do not declare all edges, and how many they hide."""


@pytest.mark.parametrize("name", graphs.truths())
def test_what_is_read_from_a_graph_is_never_wrong(name: str) -> None:
    """Every node and role of every construct is found; yes and no are right, else the answer is maybe."""
    try:
        module = sample(f"constructs.{name}")
    except ModuleNotFoundError as e:
        pytest.skip(f"needs {e.name}")
    for is_async in (False, True):
        chat_model = partial(ChatOpenAI, model="m", api_key="k")
        row = graphs.held(view(module.build(chat_model, is_async=is_async), Seen()), graphs.truths()[name])
        assert [row.nodes_missed, row.nodes_spurious, row.llm_wrong, row.roles_wrong] == [[]] * 4, row.words()
        assert len(row.edges_missed) == UNDECLARED.get(name, 0), row.words()


class Agent:
    """Two methods, of which one calls a model."""

    def __init__(self) -> None:
        self.model = MODEL

    def ask(self, state: State) -> Any:
        return self.model.invoke("x")

    def count(self, state: State) -> Any:
        return {"n": len(state)}

    def by_name(self, state: State) -> Any:
        return getattr(self, state["q"])(state)


@dataclass(slots=True)
class Context:
    llm: Any


class Lazy:
    """Stands for something that must not be touched before it is needed."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"woken up by {name}")


AGENT, CONTEXT, LAZY, BOX = Agent(), Context(MODEL), Lazy(), SimpleNamespace(llm=MODEL)
ROUTES = {"a": lambda _: MODEL.invoke("x")}


@cache
def cached(text: str) -> Any:
    return MODEL.invoke(text)


def imports_when_it_runs(state: State) -> Any:
    from some_helpers_of_the_user import ask  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    return ask(state)  # pyright: ignore[reportUnknownVariableType]


@pytest.mark.parametrize(
    ("node", "answer"),
    [
        (AGENT.ask, "yes"),
        (AGENT.count, "no"),
        (AGENT.by_name, "maybe"),
        (lambda s: [AGENT.ask(s)], "yes"),
        (lambda _: cached("x"), "yes"),
        (lambda _: CONTEXT.llm.invoke("x"), "yes"),
        (lambda _: BOX.llm.invoke("x"), "yes"),
        (lambda s: ROUTES[s["q"]](s), "yes"),
        (lambda _: LAZY.ask("x"), "maybe"),
        (lambda s, config: config["configurable"]["llm"].invoke(s["q"]), "maybe"),
        (imports_when_it_runs, "maybe"),
        (lambda _: MODEL.responses, "maybe"),
        (lambda s: {"q": json.dumps(s)}, "no"),
    ],
)
def test_a_node_is_judged_by_what_its_own_code_names(node: Any, answer: str) -> None:
    """An attribute that it does not name is not its; what cannot be followed is maybe; nothing is woken up."""
    assert scan(node).llm == answer


def test_names_of_tools_and_agents_are_structure_and_prompts_and_models_are_not() -> None:
    """Two agents of one shape are two workflows; editing a prompt or changing the model keeps the workflow."""

    def agent(name: str, tool: str, prompt: str = "p", model: str = "m") -> str:
        def look(q: str) -> str:
            """Look."""
            return q

        look.__name__ = tool
        workflow = describe(
            create_agent(ChatOpenAI(model=model, api_key="k"), [look], name=name, system_prompt=prompt)  # type: ignore[arg-type]
        )
        assert workflow
        assert prompt not in workflow.spec
        return workflow.fingerprint

    one = agent("one", "look")
    assert agent("one", "look", "another prompt", "another-model") == one
    assert agent("two", "look") != one
    assert agent("one", "find") != one


def test_every_process_finds_the_same_fingerprint() -> None:
    """Whatever the order of its sets is."""
    names = ("send", "functional", "teams")
    code = (
        "from functools import partial; import sys; from langchain_openai import ChatOpenAI\n"
        "from maestro_agents.cli.demo_pass import sample; from maestro_langgraph.graph import describe\n"
        "model = partial(ChatOpenAI, model='m', api_key='k')\n"
        "print(*(describe(sample('constructs.' + n).build(model)).fingerprint for n in sys.argv[1:]))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", "-c", code, *names]
    there = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    model = partial(ChatOpenAI, model="m", api_key="k")
    here = [describe(sample(f"constructs.{n}").build(model)) for n in names]
    assert there == [w.fingerprint for w in here if w]
    assert len(set(there)) == len(names)


# -- what runs show ----------------------------------------------------------------------------------------------------
def shown(graph: Any, *inputs: Any, config: Any = None) -> Seen:
    """Run a graph under Maestro and return what it showed."""
    maestro.wrap(graph)
    workflow = describe(graph)
    assert workflow
    moves._observed.pop(workflow.fingerprint, None)  # another test may have run a graph of the same shape
    for given in inputs:
        graph.invoke(given, config)
    seen = observed(workflow.fingerprint)
    assert seen.runs == len(inputs)
    return seen


def pairs(seen: Seen) -> dict[tuple[str, str], float]:
    return {(a, b): n for a, row in seen.moves.items() for b, n in row.items()}


class Notes(TypedDict, total=False):
    notes: Annotated[list[str], operator.add]


def noting(name: str, called: bool = False) -> Any:
    def node(state: Notes) -> Notes:
        return {"notes": [str(MODEL.invoke("x").content) if called else name]}

    return node


def test_a_loop_shows_how_often_it_turns() -> None:
    """Tasks, LLM calls and both ways out of the judge are counted."""
    graph = StateGraph(Notes)
    graph.add_node("write", noting("write", called=True))
    graph.add_node("judge", noting("judge"))
    graph.add_edge(START, "write")
    graph.add_edge("write", "judge")
    graph.add_conditional_edges("judge", lambda s: END if len(s["notes"]) > 5 else "write", ["write", END])
    seen = shown(graph.compile(), {"notes": []})
    assert seen.tasks == {"write": 3, "judge": 3}
    assert seen.calls == {"write": 3}
    assert pairs(seen) == {
        ("__start__", "write"): 1,
        ("write", "judge"): 3,
        ("judge", "write"): 2,
        ("judge", "__end__"): 1,
    }


def test_send_a_join_and_branches_beside_each_other_show_what_led_to_what() -> None:
    """Five tasks from one; a join follows all that it names; two branches of one superstep are not mixed up."""
    graph = StateGraph(Notes)
    for name in ("left", "right", "left2", "right2", "worker", "both", "last"):
        graph.add_node(name, noting(name))
    graph.add_edge(START, "left")
    graph.add_edge(START, "right")
    graph.add_edge("left", "left2")
    graph.add_edge("right", "right2")
    graph.add_edge(["left", "right2"], "both")
    graph.add_conditional_edges("both", lambda s: [Send("worker", s)] * 5, ["worker"])
    graph.add_edge("worker", "last")
    seen = shown(graph.compile(), {"notes": []})
    found = pairs(seen)
    assert found.pop(("left2", "__end__")) == 1
    assert found == {
        ("__start__", "left"): 1,
        ("__start__", "right"): 1,
        ("left", "left2"): 1,
        ("right", "right2"): 1,
        ("left", "both"): 1,
        ("right2", "both"): 1,
        ("both", "worker"): 5,
        ("worker", "last"): 5,
        ("last", "__end__"): 1,
    }
    assert seen.tasks["worker"] == 5


def test_a_subgraph_is_entered_and_left_through_its_own_nodes() -> None:
    """As it is drawn; also one that a function invokes twice: the second follows the first."""
    inner = StateGraph(Notes)
    inner.add_node("a", noting("a"))
    inner.add_node("b", noting("b"))
    inner.add_edge(START, "a")
    inner.add_edge("a", "b")
    part = inner.compile()

    def twice(state: Notes) -> Notes:
        part.invoke({"notes": []})
        part.invoke({"notes": []})
        return {}

    graph = StateGraph(Notes)
    graph.add_node("team", inner.compile())
    graph.add_node("twice", twice)
    graph.add_node("after", noting("after"))
    graph.add_edge(START, "team")
    graph.add_edge("team", "twice")
    graph.add_edge("twice", "after")
    seen = shown(graph.compile(), {"notes": []})
    assert pairs(seen) == {
        ("__start__", "team:a"): 1,
        ("team:a", "team:b"): 1,
        ("team:b", "twice:a"): 1,
        ("twice:a", "twice:b"): 2,
        ("twice:b", "twice:a"): 1,
        ("twice:b", "after"): 1,
        ("after", "__end__"): 1,
    }


def test_an_untyped_command_shows_its_edges_when_it_runs() -> None:
    """The merged view has what the drawing lacks, and says which is which; a maybe is settled."""

    def jump(state: Notes) -> Command[Any]:
        return Command(goto="hidden")

    def built_inside(state: Notes) -> Notes:
        return {"notes": [str(FakeListChatModel(responses=["x"]).invoke("x").content)]}

    graph = StateGraph(Notes)
    graph.add_node("jump", jump)
    graph.add_node("hidden", built_inside)
    graph.add_edge(START, "jump")
    compiled = graph.compile()
    before = maestro.graph(compiled)
    assert any("edges of `jump` are not declared" in w for w in before["warnings"])
    shown(compiled, {"notes": []})
    after = maestro.graph(compiled)
    llm = [{n["id"]: n["llm"] for n in found["nodes"]}["hidden"] for found in (before, after)]
    assert llm == ["maybe", "yes"]
    (new,) = [e for e in after["edges"] if not e["drawn"]]
    assert (new["from"], new["to"], new["seen"]) == ("jump", "hidden", 1)
    assert after["runs"] == 1


def test_a_run_that_stops_early_counts_no_task_whose_followers_are_unknown() -> None:
    """One that failed, and one that waits for a human: what went before still teaches, the last task does not."""

    def fails(state: Notes) -> Notes:
        raise ValueError("no good")

    def asks(state: Notes) -> Notes:
        MODEL.invoke("x")
        return {"notes": [str(interrupt("?"))]}

    def graph_with(last: Any) -> Any:
        graph = StateGraph(Notes)
        graph.add_node("first", noting("first"))
        graph.add_node("last", last)
        graph.add_edge(START, "first")
        graph.add_edge("first", "last")
        return graph.compile(checkpointer=InMemorySaver())

    broken = graph_with(fails)
    with pytest.raises(ValueError, match="no good"):
        shown(broken, {"notes": []}, config={"configurable": {"thread_id": "1"}})
    workflow = describe(broken)
    assert workflow
    seen = observed(workflow.fingerprint)
    assert seen.tasks == {"first": 1}
    assert pairs(seen) == {("__start__", "first"): 1, ("first", "last"): 1}

    paused = graph_with(asks)
    config = {"configurable": {"thread_id": "1"}}
    tasks, calls = dict(seen.tasks), dict(seen.calls)
    maestro.wrap(paused).invoke({"notes": []}, config)
    paused.invoke(Command(resume="yes"), config)
    seen = observed(workflow.fingerprint)
    assert {n: seen.tasks[n] - tasks.get(n, 0) for n in seen.tasks} == {"first": 1, "last": 1}
    assert {n: seen.calls[n] - calls.get(n, 0) for n in seen.calls} == {"last": 1}
    assert pairs(seen)["last", "__end__"] == 1


def test_what_a_run_carries_is_bounded() -> None:
    """However many nodes it had; and a node costs microseconds."""
    moves = Moves()
    for i in range(3 * MAX_ENTRIES):
        said = {"langgraph_checkpoint_ns": f"n{i}:{i}", "langgraph_step": i, "langgraph_triggers": ("branch:to:n",)}
        moves.start(uuid.uuid4(), said, None)
        moves.call(f"n{i}", f"n{i}:{i}")
    assert [len(counts) for counts in moves.counts(done=True)] == [MAX_ENTRIES] * 3


def test_the_end_of_a_run_tells_what_it_showed(tmp_path: Path) -> None:
    """In the events file, as JSON that reads back: tasks, LLM calls and moves."""
    events = tmp_path / "events.jsonl"
    with stub_servers(1) as (server,), managed(tmp_path, {"a": server.url}, events=events):
        llm = ChatOpenAI(model="stub", base_url=server.url, api_key="k")
        compiled = maestro.wrap(one_node("ask", lambda _: {"q": llm.invoke("x").content}).compile())
        compiled.invoke({"q": ""})
        Client.reset()
    (run,) = [RunEnd.decode(line) for line in events.read_text().splitlines() if '"kind":"run"' in line]
    workflow = describe(compiled)
    assert workflow
    assert run.workflow == workflow.fingerprint
    assert (run.tasks, run.calls) == ({"ask": 1}, {"ask": 1})
    assert set(run.moves) == {("__start__", "ask", 1), ("ask", "__end__", 1)}
    assert RunEnd.decode(run.encode()) == run


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
    """Gate, hook and callbacks are as before; twice is once."""
    wrapped_before = one_node().compile()
    found = (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request, StateGraph.compile, wrapped_before.config)
    hooks = list(tracer_context._configure_hooks)
    maestro.install(tenant="t")
    maestro.install()
    maestro.wrap(wrapped_before)
    assert len(tracer_context._configure_hooks) == len(hooks) + 1
    builder = maestro.wrap(one_node())
    maestro.uninstall()
    maestro.uninstall()
    now = (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request, StateGraph.compile, wrapped_before.config)
    assert now == found
    assert tracer_context._configure_hooks == hooks
    assert not handlers(builder.compile())
    assert not handlers(one_node().compile())


async def test_an_installed_process_knows_every_graph_and_adds_nothing_to_it() -> None:
    """Workflow and name are known where a run begins, sync and async; the config that snapshots show is the app's own."""
    began: list[runs.Run] = []

    def ask(state: State) -> State:
        began.extend(runs._runs.values())
        return {}

    maestro.install()
    compiled = one_node("ask", ask).compile(checkpointer=InMemorySaver(), name="mine")
    config: Any = {"configurable": {"thread_id": "1"}}
    compiled.invoke({"q": ""}, config)
    await compiled.ainvoke({"q": ""}, config)
    drawn = describe(compiled)
    assert drawn is not None
    known = [(r.workflow and r.workflow.fingerprint, r.name) for r in dict.fromkeys(began)]
    assert known == [(drawn.fingerprint, "mine")] * 2
    assert compiled.config is None
    last = compiled.get_state(config).config
    assert compiled.get_state(last).config == last


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
