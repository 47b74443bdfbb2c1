"""A run's life as LangGraph has it: paused and resumed, retried, timed out, cancelled, left; threads, forks and nested calls.

Whatever happens: the queue ends empty, no grant stays held, and no request reaches a server that nobody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import math
import operator
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict

import httpx
import openai
import pytest
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.errors import NodeTimeoutError
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.types import Command, RetryPolicy, Send, TimeoutPolicy, interrupt
from typer.testing import CliRunner

from maestro_agents import workflow
from maestro_agents.cli.bench import bench_app
from maestro_agents.cli.bench.stack import emulated
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.core import Observation, Prediction, RunEnd, ServiceClass, Status, Ticket
from maestro_agents.policy import priority
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.workflow import Workflows
from maestro_langgraph import maestro, quiet, runs
from tests.stub_openai import StubServer, dead_url, held, managed, stub_servers, until, waiting

on_module_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    """One engine, which is also the caller's own provider."""
    with stub_servers(1) as (server,):
        yield server


@pytest.fixture(autouse=True)
def fleet(server: StubServer, tmp_path: Path) -> Iterator[None]:
    """A fleet of one engine with one slot; at the end of each test nothing waits, nothing is held, nothing was warned of."""
    server.reset()
    quiet._warned.clear()
    runs.clear()
    with managed(tmp_path, {"a": server.url}, slots=1, max_wait_s=8):
        yield
        server.release()
        asyncio.run(until(lambda: waiting() == held() == 0))
    assert not quiet._warned, "something of ours failed"


def reserved() -> int:
    """Slots that are reserved at engines now, as the queue's own ledger says."""
    queue: Any = Client.current()._room.queue
    return sum(queue._slots.values())


@pytest.fixture
def llm(server: StubServer) -> ChatOpenAI:
    return ChatOpenAI(model="stub", base_url=server.url, api_key="k", max_retries=0)


class State(TypedDict, total=False):
    q: str
    out: Any
    parts: Annotated[list[str], operator.add]


def one_node(body: Any, name: str = "node", **how: Any) -> StateGraph[Any]:
    graph = StateGraph(State)
    graph.add_node(name, body, **how)
    graph.add_edge(START, name)
    return graph


def fan_out(worker: Any, width: int) -> StateGraph[Any]:
    graph = StateGraph(State)
    graph.add_node("plan", lambda _: {})
    graph.add_node("worker", worker)
    graph.add_edge(START, "plan")
    graph.add_conditional_edges("plan", lambda _: [Send("worker", {"q": str(n)}) for n in range(width)], ["worker"])
    return graph


def thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


class Clock:
    """A monotonic clock for `runs` that a person can stay away by."""

    def __init__(self) -> None:
        self.away_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.away_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time passes for runs, and for the queue, when a test says so."""
    clock = Clock()
    monkeypatch.setattr(runs, "time", clock)
    inner = Client.now_s
    monkeypatch.setattr(Client, "now_s", lambda self: inner(self) + clock.away_s)
    return clock


# -- interrupt and resume ----------------------------------------------------------------------------------------------
def asks(llm: ChatOpenAI, checkpointer: InMemorySaver, **options: Any) -> Any:
    """A graph of two nodes; the second asks a person, with a call before and one after."""

    def draft(state: State) -> State:
        return {"q": str(llm.invoke("draft").content)}

    def review(state: State) -> State:
        llm.invoke("before")
        said = interrupt("publish?")
        return {"out": f"{said}: {llm.invoke('after').content}"}

    graph = StateGraph(State)
    graph.add_node("draft", draft)
    graph.add_node("review", review)
    graph.add_edge(START, "draft")
    graph.add_edge("draft", "review")
    return maestro.wrap(graph.compile(checkpointer=checkpointer), **options)


def test_a_resumed_run_is_the_run_that_was_paused(
    tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI, clock: Clock
) -> None:
    """Same id, class and tenant; start and deadline are later by the hour that the person took; repeated calls are marked."""
    graph = asks(llm, InMemorySaver(), service_class="batch", tenant="acme", deadline_s=100)
    graph.invoke({"q": ""}, thread("t"))
    assert runs.paused() == 1
    clock.away_s += 3600
    with maestro.options(tenant="somebody else"):  # the run has its terms already
        assert graph.invoke(Command(resume="yes"), thread("t"))["out"] == "yes: echo 1 of after"
    told = [(t.node, t.visit, t.replayed) for t in tickets]
    assert told == [("draft", 0, False), ("review", 0, False), ("review", 0, True), ("review", 1, False)]
    assert len({t.run_id for t in tickets}) == 1
    assert {(t.service_class, t.tenant) for t in tickets} == {(ServiceClass.BATCH, "acme")}
    before, after = tickets[1], tickets[2]
    assert after.deadline_at_s - before.deadline_at_s == pytest.approx(3600, abs=1)
    assert after.run_started_at_s - before.run_started_at_s == pytest.approx(3600, abs=1)
    assert after.deadline_at_s - after.run_started_at_s == pytest.approx(100)
    assert [(e.outcome, e.run_id) for e in ends] == [("paused", before.run_id), ("done", before.run_id)]
    assert runs.paused() == 0
    assert runs.live() == 0


def test_the_pause_is_none_of_the_time_that_a_run_takes(
    tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI, clock: Clock
) -> None:
    """What is learned of the run that a person kept for an hour is its own seconds: not one of the pause."""
    graph = asks(llm, InMemorySaver())
    graph.invoke({"q": ""}, thread("t"))
    clock.away_s += 3600
    graph.invoke(Command(resume="yes"), thread("t"))
    learned = Workflows()
    for t, n in zip(tickets, (0, 0, 1, 1), strict=True):
        if n and not learned._open[t.run_id].paused:
            learned.end_run(ends[0])
        learned.observe(
            Observation(
                stage_id=t.stage_id, run_id=t.run_id, workflow=t.workflow, role=t.role, node=t.node, model=t.model, engine_id="e",
                service_class=t.service_class, tenant=t.tenant, status=Status.DONE, visit=t.visit, step=t.step,
                replayed=t.replayed, run_started_at_s=t.run_started_at_s, pushed_at_s=t.pushed_at_s,
                granted_at_s=t.pushed_at_s, finished_at_s=t.pushed_at_s,
            )
        )  # fmt: skip
    learned.end_run(ends[1])
    assert list(learned._levels[tickets[0].workflow, "draft"].tools_s) == [pytest.approx(0, abs=60)]


def test_a_run_may_be_paused_again_and_again(tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI) -> None:
    """With several interrupts in a node each resume repeats what was called so far, and only that."""

    def ask(state: State) -> State:
        for n in range(3):
            llm.invoke(f"call {n}")
            interrupt(n)
        return {}

    graph = maestro.wrap(one_node(ask).compile(checkpointer=InMemorySaver()))
    graph.invoke({"q": ""}, thread("t"))
    for _ in range(3):
        graph.invoke(Command(resume="go on"), thread("t"))
    assert [(t.visit, t.replayed) for t in tickets] == [
        (0, False),
        *[(0, True), (1, False)],
        *[(0, True), (1, True), (2, False)],
        *[(0, True), (1, True), (2, True)],
    ]
    assert [e.outcome for e in ends] == ["paused"] * 3 + ["done"]
    assert len({e.run_id for e in ends}) == 1


@pytest.mark.parametrize("where", ["node", "function"])
def test_a_run_paused_inside_a_subgraph_goes_on_too(
    tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI, where: str
) -> None:
    """What the outer node and the inner one call again is repeated; what was finished inside is not called again."""

    def first(state: State) -> State:
        llm.invoke("first")
        return {}

    def second(state: State) -> State:
        llm.invoke("second")
        return {"out": interrupt("?")}

    team = StateGraph(State)
    team.add_node("first", first)
    team.add_node("second", second)
    team.add_edge(START, "first")
    team.add_edge("first", "second")
    inner = team.compile()

    def calling(state: State) -> Any:
        llm.invoke("outer")
        return inner.invoke(state)

    body = inner if where == "node" else calling
    graph = maestro.wrap(one_node(body, "team").compile(checkpointer=InMemorySaver()))
    graph.invoke({"q": ""}, thread("t"))
    graph.invoke(Command(resume="yes"), thread("t"))
    outer = [("team", 0)] if where == "function" else []
    assert [(t.node, t.visit) for t in tickets if not t.replayed] == [*outer, ("team:first", 0), ("team:second", 0)]
    assert [(t.node, t.visit) for t in tickets if t.replayed] == [*outer, ("team:second", 0)]
    assert len({t.run_id for t in tickets}) == 1
    assert [e.outcome for e in ends] == ["paused", "done"]


@pytest.mark.parametrize("static", ["interrupt_before", "interrupt_after"])
def test_a_static_interrupt_and_a_changed_state_repeat_nothing(
    tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI, static: Any
) -> None:
    """Between two nodes nothing is called twice; ``update_state`` meanwhile changes nothing about whose run it is."""
    graph = StateGraph(State)
    graph.add_node("a", lambda _: {"q": llm.invoke("a").content})
    graph.add_node("b", lambda s: {"out": llm.invoke(s["q"]).content})
    graph.add_edge(START, "a")
    graph.add_edge("a", "b")
    stops = {static: ["b" if static == "interrupt_before" else "a"]}
    compiled = maestro.wrap(graph.compile(checkpointer=InMemorySaver(), **stops))
    compiled.invoke({"q": ""}, thread("t"))
    compiled.update_state(thread("t"), {"q": "changed"})
    assert compiled.invoke(None, thread("t"))["out"] == "echo 1 of changed"
    assert [(t.node, t.visit, t.replayed) for t in tickets] == [("a", 0, False), ("b", 0, False)]
    assert [e.outcome for e in ends] == ["paused", "done"]
    assert len({t.run_id for t in tickets}) == 1


@on_module_loop
async def test_a_stream_that_is_left_at_the_interrupt_is_a_paused_run(
    tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI
) -> None:
    """Callers commonly stop reading there; resumed, also asynchronously and streamed, it is the same run."""
    graph = asks(llm, InMemorySaver())
    async with contextlib.aclosing(graph.astream({"q": ""}, thread("t"), stream_mode="updates")) as chunks:
        async for chunk in chunks:
            if "__interrupt__" in chunk:
                break
    assert [e.outcome for e in ends] == ["paused"]
    async for _ in graph.astream(Command(resume="yes"), thread("t")):
        pass
    assert [e.outcome for e in ends] == ["paused", "done"]
    assert len({t.run_id for t in tickets}) == 1


def test_with_install_alone_functional_programs_are_resumed_too(
    tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI
) -> None:
    """Their graph is never seen by Maestro; finished tasks are not called again, the entry point's own calls are."""
    maestro.install()

    @task
    def research(topic: str) -> str:
        return str(llm.invoke(topic).content)

    @entrypoint(checkpointer=InMemorySaver())
    def program(topic: str) -> str:
        found = research(topic).result()
        llm.invoke("summary")
        return f"{interrupt('?')} {found}"

    config = thread("functional")
    program.invoke("maps", config)
    assert program.invoke(Command(resume="yes"), config) == "yes echo 1 of maps"
    assert [(t.node, t.visit, t.replayed) for t in tickets] == [
        ("program:research", 0, False),
        ("program", 0, False),
        ("program", 0, True),
    ]
    assert [e.outcome for e in ends] == ["paused", "done"]
    assert len({t.run_id for t in tickets}) == 1


def test_new_input_on_a_paused_thread_is_a_run_of_its_own(tickets: list[Ticket], llm: ChatOpenAI) -> None:
    """LangGraph drops the interrupt then, and so is the paused run forgotten; other threads are others."""

    def node(state: State) -> State:
        llm.invoke("x")
        return {"out": interrupt("?") if state["q"] == "ask" else "did not ask"}

    graph = maestro.wrap(one_node(node).compile(checkpointer=InMemorySaver()))
    graph.invoke({"q": "ask"}, thread("one"))
    graph.invoke({"q": "ask"}, thread("two"))
    assert runs.paused() == 2
    graph.invoke({"q": "do not"}, thread("one"))
    assert runs.paused() == 1
    graph.invoke(Command(resume="yes"), thread("two"))
    one, two, new, resumed = tickets
    assert len({one.run_id, two.run_id, new.run_id}) == 3
    assert resumed.run_id == two.run_id
    assert [t.replayed for t in tickets] == [False, False, False, True]


def test_elsewhere_or_too_late_a_resumed_run_is_a_new_one(
    tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI, clock: Clock
) -> None:
    """Another process has no memory of it, and this one has for a day: then deadline and id are fresh, nothing fails."""
    graph = asks(llm, InMemorySaver(), deadline_s=100)
    graph.invoke({"q": ""}, thread("t"))
    clock.away_s += runs.PAUSED_S + 1
    assert "yes" in graph.invoke(Command(resume="yes"), thread("t"))["out"]
    graph.invoke({"q": ""}, thread("t"))
    runs.clear()  # what a new process knows
    assert "yes" in graph.invoke(Command(resume="yes"), thread("t"))["out"]
    assert [e.outcome for e in ends] == ["paused", "done", "paused", "done"]
    assert len({e.run_id for e in ends}) == 4
    assert not any(t.replayed for t in tickets)
    assert all(e.deadline_at_s - e.started_at_s == pytest.approx(100) for e in ends)


def test_paused_runs_are_bounded_and_freed(llm: ChatOpenAI, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes first when there are too many, and what is older than a day goes with the next that is paused."""
    monkeypatch.setattr(runs, "MAX_PAUSED", 5)
    graph = asks(llm, InMemorySaver())
    for n in range(8):
        graph.invoke({"q": ""}, thread(str(n)))
    assert [key[1] for key in runs._paused] == ["3", "4", "5", "6", "7"]
    clock.away_s += runs.PAUSED_S + 1
    graph.invoke({"q": ""}, thread("late"))
    assert [key[1] for key in runs._paused] == ["late"]


def test_work_left_behind_by_a_paused_run_is_served(tickets: list[Ticket], server: StubServer, llm: ChatOpenAI) -> None:
    """A thread that a node started, and whose call waits when the run stops for a person, is nobody's orphan."""
    maestro.install()
    holder = threading.Thread(target=llm.invoke, args=("[[hold]] somebody else",))
    holder.start()
    server.wait(lambda s: len(s.requests) == 1)
    answers: list[Any] = []
    threads: list[threading.Thread] = []

    def node(state: State) -> State:
        def call() -> None:
            answers.append(llm.invoke("memory").content)

        threads.append(threading.Thread(target=contextvars.copy_context().run, args=(call,)))
        threads[0].start()
        asyncio.run(until(lambda: waiting() == 1))
        return {"out": interrupt("?")}

    maestro.wrap(one_node(node).compile(checkpointer=InMemorySaver())).invoke({"q": ""}, thread("t"))
    server.release()
    threads[0].join(5)
    holder.join(5)
    assert answers == ["echo 1 of memory"]
    assert [bool(t.run_id) for t in tickets] == [False, True, False]


def test_what_is_repeated_teaches_nothing() -> None:
    """The statistics of remaining work take a paused and resumed run for one, without its replays and its pause."""

    def stage(node: str, at_s: float, **more: Any) -> Observation:
        return Observation(
            stage_id=f"{node}{at_s}", run_id="r", workflow="w", role=node, node=node, model="m", engine_id="e",
            service_class=ServiceClass.BATCH, tenant="t", status=Status.DONE,
            pushed_at_s=at_s, granted_at_s=at_s, finished_at_s=at_s + 1, **more,
        )  # fmt: skip

    def end(outcome: str, at_s: float) -> RunEnd:
        return RunEnd(run_id="r", workflow="w", outcome=outcome, started_at_s=0, ended_at_s=at_s)

    learned = Workflows()
    learned.observe(stage("a", 0))
    learned.observe(stage("b", 1))
    learned.end_run(end("paused", 2))
    learned.observe(stage("b", 100, replayed=True))
    learned.observe(stage("b", 101, visit=1))
    learned.end_run(end("done", 103))
    after_a, after_b = (learned._levels["w", node, 0] for node in "ab")
    assert after_a.means[workflow._MEANS.index("llm_s")] == pytest.approx(2)
    assert (after_b.means[workflow._MEANS.index("llm_s")], after_b.n) == (pytest.approx(1), 1)


# -- retries -----------------------------------------------------------------------------------------------------------
@on_module_loop
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_retried_node_makes_new_stages_that_are_marked(
    tickets: list[Ticket], ends: list[RunEnd], llm: ChatOpenAI, *, is_async: bool
) -> None:
    """RetryPolicy: each try is a stage of its own, with its number; what was called before is no progress."""
    tries = []

    def fail() -> State:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("again")
        return {"out": "well"}

    async def flaky(state: State) -> State:
        await llm.ainvoke("a")
        if len(tries) > 1:
            await llm.ainvoke("b")
        return fail()

    def flaky_sync(state: State) -> State:
        llm.invoke("a")
        if len(tries) > 1:
            llm.invoke("b")
        return fail()

    policy = RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=3)
    graph = maestro.wrap(one_node(flaky if is_async else flaky_sync, retry_policy=policy).compile())
    assert (await graph.ainvoke({"q": ""}))["out"] == "well"
    assert [(t.node_attempt, t.visit, t.replayed) for t in tickets] == [
        (1, 0, False),
        (2, 0, True),
        (3, 0, True),
        (3, 1, False),
    ]
    assert len({t.stage_id for t in tickets}) == 4
    assert [t.attempt for t in tickets] == [1, 1, 1, 1]  # tries at an engine are something else
    assert [e.outcome for e in ends] == ["done"]


# -- fan-outs ----------------------------------------------------------------------------------------------------------
@on_module_loop
async def test_the_width_of_a_fan_out_is_known(tickets: list[Ticket], llm: ChatOpenAI) -> None:
    """Under ``ainvoke`` all siblings have begun before the first call; alone, a node has none."""

    async def worker(state: State) -> State:
        return {"parts": [str((await llm.ainvoke(state["q"])).content)]}

    graph = fan_out(worker, 4)
    graph.add_node("join", lambda s: {"out": llm.invoke("join").content})
    graph.add_edge("worker", "join")
    await maestro.wrap(graph.compile()).ainvoke({"q": "", "parts": []})
    assert [(t.node, t.siblings) for t in tickets] == [*[("worker", 3)] * 4, ("join", 0)]


def test_the_width_of_a_synchronous_fan_out_is_known_as_far_as_it_has_begun(
    tickets: list[Ticket], llm: ChatOpenAI
) -> None:
    """Under ``invoke`` tasks may begin one after the other: at the last one all are known."""
    graph = fan_out(lambda s: {"parts": [str(llm.invoke(s["q"]).content)]}, 12)
    maestro.wrap(graph.compile()).invoke({"q": "", "parts": []}, {"max_concurrency": 1})
    assert [t.siblings for t in tickets] == list(range(12))


# -- timeouts ----------------------------------------------------------------------------------------------------------
@on_module_loop
async def test_the_limits_of_a_node_and_of_a_superstep_reach_the_scheduler(
    tickets: list[Ticket], llm: ChatOpenAI
) -> None:
    """The earliest counts: of the node, of the node that its graph is in, of the superstep; the run's deadline stays."""

    async def call(state: State) -> State:
        await llm.ainvoke("x")
        return {}

    inner = one_node(call, "slow", timeout=20)
    inner.add_node("free", call)
    inner.add_edge("slow", "free")
    graph = StateGraph(State)
    graph.add_node("team", inner.compile(), timeout=TimeoutPolicy(run_timeout=30))
    graph.add_node("patient", call, timeout=TimeoutPolicy(idle_timeout=5))
    graph.add_node("alone", call)
    graph.add_edge(START, "team")
    graph.add_edge("team", "patient")
    graph.add_edge("patient", "alone")
    compiled = maestro.wrap(graph.compile(), deadline_s=100)

    def limits() -> list[tuple[str, float]]:
        found = [(t.node, t.limit_at_s - t.run_started_at_s) for t in tickets]
        return [(node, round(s, -1) if math.isfinite(s) else s) for node, s in found]

    await compiled.ainvoke({"q": ""})
    assert limits() == [("team:slow", 20), ("team:free", 30), ("patient", math.inf), ("alone", math.inf)]
    assert {round(t.deadline_at_s - t.run_started_at_s) for t in tickets} == {100}
    tickets.clear()
    compiled.step_timeout = 10  # it may be set at any time
    await compiled.ainvoke({"q": ""})
    assert limits() == [("team:slow", 10), ("team:free", 10), ("patient", 10), ("alone", 10)]


def test_a_stage_with_a_limit_of_its_own_is_late_only_where_it_cannot_meet_that() -> None:
    """The limit is of this stage, not of all that its run has to do after it; the nearer it is, the sooner its turn."""
    prediction = Prediction(
        output_tokens_mean=1, output_tokens_p50=1, output_tokens_p90=1, output_tokens_p99=1, service_s=2, remaining_s=50
    )
    free = Ticket(stage_id="s", client_id="c", model="m", deadline_at_s=600, pushed_at_s=0)
    near, far = free.evolve(limit_at_s=5), free.evolve(limit_at_s=60)
    assert [priority.is_late(t, prediction, 0) for t in (free, near, far)] == [False] * 3
    assert priority.is_late(near, prediction, 4)
    moments = [priority.ours(t, prediction, 0) for t in (near, far, free)]
    assert moments == sorted(set(moments))
    assert Ticket.decode(near.encode()).limit_at_s == 5


@on_module_loop
async def test_waiting_is_no_idling_but_it_does_count_for_a_hard_limit(
    tickets: list[Ticket], server: StubServer, llm: ChatOpenAI
) -> None:
    """Queued for longer than its ``idle_timeout`` a node lives; after its ``run_timeout`` its call is withdrawn, unsent."""
    holder = asyncio.create_task(llm.ainvoke("[[hold]]"))
    maestro.install()
    await server.wait_async(lambda s: len(s.requests) == 1)

    async def call(state: State) -> State:
        return {"out": (await llm.ainvoke("x")).content}

    hard = maestro.wrap(one_node(call, timeout=TimeoutPolicy(run_timeout=0.4)).compile())
    with pytest.raises(NodeTimeoutError):
        await hard.ainvoke({"q": ""})
    await until(lambda: waiting() == 0)
    idle = maestro.wrap(one_node(call, timeout=TimeoutPolicy(idle_timeout=0.3)).compile())
    began_s = time.monotonic()
    running = asyncio.create_task(idle.ainvoke({"q": ""}))
    await until(lambda: time.monotonic() - began_s > 0.8)
    assert not running.done()
    server.release()
    assert (await running)["out"] == "echo 1 of x"
    await holder
    assert len(server.requests) == 2


# -- cancellation ------------------------------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def busy(server: StubServer, llm: ChatOpenAI) -> AsyncIterator[None]:
    """The only slot is taken by somebody else's call; at the end nothing waits, and only that call was ever sent."""
    maestro.install()
    holder = asyncio.create_task(llm.ainvoke("[[hold]] somebody else"))
    await server.wait_async(lambda s: len(s.requests) == 1)
    yield
    await until(lambda: waiting() == 0)
    assert len(server.requests) == 1
    server.release()
    await holder
    await until(lambda: held() == reserved() == 0)
    assert len(server.requests) == 1


@on_module_loop
@pytest.mark.parametrize("way", ["cancel", "aclose", "timeout", "step_timeout", "sibling"])
async def test_a_run_that_ends_while_its_calls_wait_withdraws_them(
    server: StubServer, llm: ChatOpenAI, ends: list[RunEnd], way: str
) -> None:
    """Task cancelled, stream closed, the caller's timeout, the superstep's, a sibling that fails: nothing waits, nothing is sent."""

    async def worker(state: State) -> State:
        if way == "sibling" and state["q"] == "0":
            await until(lambda: waiting() == 2)
            raise ValueError("sibling")
        await llm.ainvoke("x")
        return {}

    graph = maestro.wrap(fan_out(worker, 3).compile())
    async with busy(server, llm):
        run = asyncio.create_task(graph.ainvoke({"q": "", "parts": []})) if way in {"cancel", "sibling"} else None
        if way == "cancel" and run:
            await until(lambda: waiting() == 3)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        elif way == "sibling" and run:
            with pytest.raises(ValueError, match="sibling"):
                await run
        elif way == "aclose":
            chunks = graph.astream({"q": "", "parts": []}, stream_mode="updates")
            assert await anext(chunks) == {"plan": None}
            reading = asyncio.create_task(anext(chunks))
            await until(lambda: waiting() == 3)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            await chunks.aclose()
        elif way == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await graph.ainvoke({"q": "", "parts": []})
        else:
            graph.step_timeout = 0.3
            with pytest.raises(TimeoutError):
                await graph.ainvoke({"q": "", "parts": []})
    assert runs.live() == 0
    assert [e.outcome for e in ends] == ["error" if way in {"sibling", "step_timeout"} else "cancelled"]


@on_module_loop
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_run_cancelled_while_it_is_answered_frees_its_engine(
    server: StubServer, llm: ChatOpenAI, ends: list[RunEnd], *, streamed: bool
) -> None:
    """The connection is closed, which tells the engine, and the grant is given back."""
    # Python 3.11's wait_for, which langchain-openai reads streams with, loses a cancellation that comes with a chunk
    chunks = 0

    async def node(state: State) -> State:
        nonlocal chunks
        if streamed:
            async for _ in llm.astream("[[hold]] long"):
                chunks += 1
        else:
            await llm.ainvoke("[[hold]] long")
        return {}

    run = asyncio.create_task(maestro.wrap(one_node(node).compile()).ainvoke({"q": ""}))
    await server.wait_async(lambda s: len(s.requests) == 1)
    await until(lambda: held() == 1 and chunks == 2 * streamed)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await server.wait_async(lambda s: s.requests[0].gone)
    await until(lambda: held() == 0)
    assert [e.outcome for e in ends] == ["cancelled"]


@on_module_loop
async def test_a_cancelled_synchronous_node_sends_nothing_any_more(server: StubServer, llm: ChatOpenAI) -> None:
    """Its thread cannot be stopped, but what waits in it is withdrawn and what it calls later is refused."""
    late: list[BaseException] = []

    def node(state: State) -> State:
        for text in ("waits", "comes later"):
            try:
                llm.invoke(text)
            except Exception as e:
                late.append(e)
        return {}

    async with busy(server, llm):
        run = asyncio.create_task(maestro.wrap(one_node(node).compile()).ainvoke({"q": ""}))
        await until(lambda: waiting() == 1)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await until(lambda: len(late) == 2)


def test_a_synchronous_stream_that_is_left_is_bounded_by_the_longest_wait(
    server: StubServer, llm: ChatOpenAI, ends: list[RunEnd], tmp_path: Path
) -> None:
    """LangGraph ends it only when its waiting siblings are through: at most ``max_wait_s`` later, and they send nothing."""

    def work(_: Any) -> State:
        get_stream_writer()("here")
        return {"parts": [str(llm.invoke("x").content)]}

    with managed(tmp_path, {"a": server.url}, slots=1, max_wait_s=3):
        maestro.install()
        holder = threading.Thread(target=llm.invoke, args=("[[hold]] somebody else",))
        holder.start()
        server.wait(lambda s: len(s.requests) == 1)
        graph = maestro.wrap(fan_out(work, 3).compile())
        chunks = graph.stream({"q": "", "parts": []}, stream_mode="custom")
        assert [next(chunks) for _ in range(3)] == ["here"] * 3
        asyncio.run(until(lambda: waiting() == 3))
        began_s = time.monotonic()
        with contextlib.suppress(openai.APITimeoutError):  # the siblings' own error
            chunks.close()
        assert time.monotonic() - began_s < 10
        asyncio.run(until(lambda: waiting() == 0))
        server.release()
        holder.join(5)
        assert len(server.requests) == 1
        assert runs.live() == 0


@on_module_loop
@pytest.mark.parametrize("way", ["break", "drop", "graph"])
async def test_a_consumer_that_leaves_an_answer_frees_its_engine(server: StubServer, llm: ChatOpenAI, way: str) -> None:
    """Whether it closes the stream, loses it without a word, or stops reading a graph that streams it."""
    if way == "graph":

        async def node(state: State) -> State:
            return {"out": (await llm.ainvoke("[[hold]] a b c")).content}

        graph = maestro.wrap(one_node(node).compile())
        async with contextlib.aclosing(graph.astream({"q": ""}, stream_mode="messages")) as messages:
            async for _ in messages:
                break
    else:
        maestro.install()
        sdk = openai.AsyncOpenAI(base_url=server.url, api_key="k")
        stream: Any = await sdk.chat.completions.create(
            model="stub", stream=True, messages=[{"role": "user", "content": "[[hold]] a b c"}]
        )
        async for _ in stream:
            break
        assert held() == 1
        if way == "break":
            await stream.close()
        del stream
    await until(lambda: gc.collect() >= 0 and held() == 0)  # nobody can tell before Python does
    await server.wait_async(lambda s: s.requests[0].gone)


# -- nested calls ------------------------------------------------------------------------------------------------------
@on_module_loop
async def test_calls_nested_in_tools_and_agents_never_wait_for_themselves(
    tickets: list[Ticket], server: StubServer, llm: ChatOpenAI
) -> None:
    """With one slot, held by an open stream: a tool, an agent in that tool and a call in that agent are all served."""
    inner = one_node(lambda s: {"out": llm.invoke("deep").content}, "deep").compile()

    @tool
    async def ask(q: str) -> str:
        """Ask an agent, while another answer still streams."""
        async for _ in llm.astream("in the tool"):
            return str((await inner.ainvoke({"q": q}))["out"])
        return ""

    async def node(state: State) -> State:
        async for _ in llm.astream("outer"):
            return {"out": await ask.ainvoke({"q": "x"})}
        return {}

    graph = maestro.wrap(one_node(node).compile())
    assert (await asyncio.wait_for(graph.ainvoke({"q": ""}), 5))["out"] == "echo 1 of deep"
    assert [(t.node, t.nested) for t in tickets] == [("node", False), ("node", True), ("node:deep", True)]
    assert len({t.run_id for t in tickets}) == 1


def test_many_runs_with_nested_calls_share_one_slot(llm: ChatOpenAI) -> None:
    """Eight threads, each with an open stream and a call inside it: all are answered."""

    def node(state: State) -> State:
        inside: list[Any] = []
        for _ in llm.stream("outer"):
            if not inside:
                inside.append(llm.invoke("nested").content)
        return {"out": inside[0]}

    graph = maestro.wrap(one_node(node).compile())
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: graph.invoke({"q": ""})["out"], range(16)))
    assert answers == ["echo 1 of nested"] * 16


# -- threads -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("widen", "known"), [(False, min(32, (os.cpu_count() or 1) + 4)), (True, 40)])
def test_synchronous_nodes_that_wait_keep_others_from_being_known(
    server: StubServer, llm: ChatOpenAI, *, widen: bool, known: int
) -> None:
    """Of 40 runs only as many calls are queued as the event loop has threads; with more threads all of them are."""
    maestro.configure(widen_executor=widen)
    graph = maestro.wrap(one_node(lambda s: {"out": llm.invoke(f"[[hold]] {s['q']}").content}).compile())

    async def burst() -> int:
        all_runs = asyncio.gather(*(graph.ainvoke({"q": str(n)}) for n in range(40)))
        most = 0

        def look(condition: Callable[[], bool]) -> bool:
            nonlocal most
            most = max(most, waiting() + held())
            return condition()

        await until(lambda: look(lambda: most == known))
        server.release()
        await until(lambda: look(all_runs.done))
        await all_runs
        return most

    assert asyncio.run(burst()) == known
    assert len(server.requests) == 40


@pytest.mark.slow
def test_the_cost_of_starvation_is_measured() -> None:
    """`maestro bench starvation`: the loop's own threads make a burst wait, the wider pool and asynchronous nodes do not."""
    found = json.loads(CliRunner().invoke(bench_app, ["starvation", "--json"]).stdout)
    own, wide, free = (case["all_s"] for case in found["cases"][1:])
    assert max(wide, free) < own
    assert [case["known_at_once"] for case in found["cases"]][2:] == [found["runs"]] * 2


# -- threads that lose their context -------------------------------------------------------------------------------------
def call_in_thread(call: Callable[[], Any]) -> None:
    worker = threading.Thread(target=call)
    worker.start()
    worker.join(5)


def call_in_pool(call: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result(5)


def call_with_context(call: Callable[[], Any]) -> None:
    context = contextvars.copy_context()
    call_in_thread(lambda: context.run(call))


def call_in_context_pool(call: Callable[[], Any]) -> None:
    with ContextThreadPoolExecutor(1) as pool:
        pool.submit(call).result(5)


@pytest.mark.parametrize(
    ("how", "known"),
    [(call_in_thread, False), (call_in_pool, False), (call_with_context, True), (call_in_context_pool, True)],
)
def test_a_call_from_a_thread_without_context_is_served_all_the_same(
    tickets: list[Ticket], llm: ChatOpenAI, how: Callable[[Callable[[], Any]], None], *, known: bool
) -> None:
    """It is anonymous, unless the thread is given the context, by Python's own means or LangChain's pool."""
    answers = []

    def node(state: State) -> State:
        how(lambda: answers.append(llm.invoke("x").content))
        return {}

    maestro.wrap(one_node(node).compile(), tenant="acme").invoke({"q": ""})
    assert answers == ["echo 1 of x"]
    assert [(t.node, t.tenant, bool(t.run_id)) for t in tickets] == [
        ("node", "acme", True) if known else ("", "default", False)
    ]


@on_module_loop
@pytest.mark.parametrize("given", [True, False])
async def test_an_executors_call_that_is_given_the_config_is_known(
    tickets: list[Ticket], llm: ChatOpenAI, *, given: bool
) -> None:
    """``run_in_executor`` loses the context; passing the node's ``config`` on, as LangChain asks, says who calls."""

    async def node(state: State, config: RunnableConfig) -> State:
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(None, lambda: llm.invoke("x", config if given else None))
        return {"out": answer.content}

    graph = maestro.wrap(one_node(node).compile())
    assert (await graph.ainvoke({"q": ""}))["out"] == "echo 1 of x"
    assert [(t.node, bool(t.run_id)) for t in tickets] == [("node", True) if given else ("", False)]


# -- forks -------------------------------------------------------------------------------------------------------------
PREFORK = """
import multiprocessing, os, sys
from typing import TypedDict
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from maestro_agents.client import Client
from maestro_langgraph import maestro

class State(TypedDict, total=False):
    q: str
    out: str

llm = ChatOpenAI(model="bench", base_url=sys.argv[1], api_key="k", max_retries=0, max_tokens=4)
builder = StateGraph(State)
builder.add_node("node", lambda s: {"out": llm.invoke(s["q"]).content})
builder.add_edge(START, "node")
app = maestro.wrap(builder.compile())

def work(name):
    for n in range(3):
        assert app.invoke({"q": f"{name} {n}"})["out"]
    os.write(1, f"{name} {Client.current().client_id}\\n".encode())
    Client.reset()

if __name__ == "__main__":
    app.invoke({"q": "master"})  # the master has used its client before it forks
    if sys.argv[2] == "os.fork":
        workers = []
        for name in ("one", "two"):
            pid = os.fork()
            if not pid:
                work(name)
                os._exit(0)
            workers.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    else:
        context = multiprocessing.get_context(sys.argv[2])
        processes = [context.Process(target=work, args=(name,)) for name in ("one", "two")]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
    assert codes == [0, 0], codes
    work("master")
"""


@pytest.mark.parametrize(
    "way", ["os.fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("fork", "spawn", "forkserver"))]
)
def test_every_worker_of_a_prefork_server_has_a_client_of_its_own(stack: Stack, tmp_path: Path, way: str) -> None:
    """The master called before it forked; on a real Redis its workers and it are served as three apps, and none hangs."""
    program = tmp_path / "prefork.py"
    program.write_text(PREFORK)
    env = {
        **os.environ,
        "MAESTRO_REDIS_URL": str(stack.redis_url),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    before = asyncio.run(observed(stack))
    done = subprocess.run(
        [sys.executable, str(program), dead_url(), way],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    clients = dict(line.split() for line in done.stdout.splitlines())
    assert set(clients) == {"one", "two", "master"}
    assert len(set(clients.values())) == 3
    seen = asyncio.run(observed(stack))[len(before) :]
    assert [o.status for o in seen] == [Status.DONE] * 10
    assert len({o.run_id for o in seen}) == 10


WEB_APP = """
import os, sys
from typing import TypedDict
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

class State(TypedDict, total=False):
    q: str
    out: str

llm = ChatOpenAI(model="bench", base_url=os.environ["OWN_URL"], api_key="k", max_retries=0, max_tokens=4)

async def node(state):
    return {"out": (await llm.ainvoke(state["q"])).content}

builder = StateGraph(State)
builder.add_node("node", node)
builder.add_edge(START, "node")
graph = builder.compile()

async def ask(request):
    found = await graph.ainvoke({"q": request.query_params["q"]})
    return JSONResponse({"pid": os.getpid(), "out": found["out"]})

app = Starlette(routes=[Route("/ask", ask)])
"""


@pytest.mark.slow
def test_every_worker_of_a_web_server_is_an_app_of_its_own(stack: Stack, tmp_path: Path) -> None:
    """`maestro run -- uvicorn --workers 2` and an app that knows nothing of it: each worker's calls are served by the fleet, and
    none is left behind when the server ends.
    """
    (tmp_path / "webapp.py").write_text(WEB_APP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "MAESTRO_REDIS_URL": str(stack.redis_url),
        "OWN_URL": dead_url(),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)]),
    }
    serve = ["-m", "uvicorn", "webapp:app", "--workers", "2", "--port", str(port), "--log-level", "warning"]
    before = asyncio.run(observed(stack))
    command = [sys.executable, "-m", "maestro_agents.cli", "run", "--", sys.executable, *serve]
    with subprocess.Popen(command, env=env, start_new_session=True) as server:
        try:
            answers = asyncio.run(_ask_until_both_answer(f"http://127.0.0.1:{port}/ask"))
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)
    assert all(a["out"] for a in answers)
    seen = asyncio.run(observed(stack))[len(before) :]
    assert len(seen) == len(answers)
    assert {o.status for o in seen} == {Status.DONE}
    assert asyncio.run(_reserved(stack)) == 0


async def _ask_until_both_answer(url: str) -> list[dict[str, Any]]:
    """Ask until two processes have answered; a new connection each time, since the kernel gives those to either."""
    answers: list[dict[str, Any]] = []
    async with asyncio.timeout(60):
        while len({a["pid"] for a in answers}) < 2:
            with contextlib.suppress(httpx.ConnectError):
                async with httpx.AsyncClient(timeout=30) as client:
                    asked = [client.get(url, params={"q": f"{n}"}) for n in range(4)]
                    answers += [a.raise_for_status().json() for a in await asyncio.gather(*asked)]
    return answers


async def _reserved(stack: Stack) -> int:
    queue = RedisQueue(str(stack.redis_url))
    try:
        return sum((await queue.ledger()).slots.values())
    finally:
        await queue.close()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A real Redis, a scheduler and an emulated engine, each a process."""
    with emulated(engines=1, profile="gpu", args=("--speed", "50")) as stack:
        yield stack


async def observed(stack: Stack) -> list[Observation]:
    """What was reported of the stages of this stack so far."""
    queue = RedisQueue(str(stack.redis_url))
    try:
        return [o for o in (await queue.read_log("", 1_000))[1] if isinstance(o, Observation)]
    finally:
        await queue.close()
