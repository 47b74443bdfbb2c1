"""Every way in: whatever puts Maestro on a program, a call is served once, by the fleet, and the result is the same."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import openai._base_client as sdk
import pytest
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import AzureChatOpenAI, ChatOpenAI
from langgraph.func import entrypoint
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.pregel import Pregel
from pydantic import BaseModel

import maestro_langgraph
from maestro_agents.cli.run import _deaf, environment
from maestro_agents.client import Client
from maestro_agents.core import Observation, ServiceClass
from maestro_agents.errors import ConfigError
from maestro_langgraph import adopted, maestro, quiet
from maestro_langgraph.bootstrap import sitecustomize
from maestro_langgraph.limiter import MaestroLimiter
from maestro_langgraph.middleware import MaestroMiddleware
from maestro_langgraph.refusals import httpx_of
from tests.stub_openai import StubServer, dead_url, held, managed, stub_servers, until, waiting, watched_observations

on_module_loop = pytest.mark.asyncio(loop_scope="module")
QUESTION = {"messages": [HumanMessage('one two three [[tool:add {"a": 1, "b": 2}]]')]}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[StubServer]]:
    """The caller's own provider, and two engines of the fleet."""
    with stub_servers(3) as servers:
        yield servers


@pytest.fixture(autouse=True)
def fresh(servers: list[StubServer]) -> None:
    for server in servers:
        server.reset()
    quiet._warned.clear()


@pytest.fixture
def fleet(servers: list[StubServer], tmp_path: Path) -> Iterator[list[Observation]]:
    """A fleet of two engines, scheduled inside this process; what is observed of its stages."""
    with managed(tmp_path, {"a": servers[1].url, "b": servers[2].url}), watched_observations() as seen:
        yield seen


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Score(BaseModel):
    """A structured answer."""

    name: str
    score: int


def chat_model(server: StubServer, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": "stub", "base_url": server.url, "api_key": "caller-secret", "max_retries": 0, **more})


def unpatched() -> bool:
    return not hasattr(sdk.SyncAPIClient.request, "__wrapped__")


def agent(llm: Any, *middleware: Any) -> Any:
    """A program of two model calls: one that asks for a tool, one that answers."""
    return create_agent(llm, [add], middleware=middleware, name="adder")


def plain(messages: list[BaseMessage]) -> list[tuple[str, Any, Any]]:
    return [(m.type, m.content, getattr(m, "tool_calls", None)) for m in messages]


def moved(servers: list[StubServer]) -> list[dict[str, Any]]:
    """The bodies that the engines saw; none went to the provider."""
    assert servers[0].requests == []
    return [seen.body for server in servers[1:] for seen in server.requests]


def by_wrap(llm: Any) -> Any:
    return maestro.wrap(agent(llm))


def by_decorator(llm: Any) -> Any:
    return maestro(lambda: agent(llm))()


def by_install(llm: Any) -> Any:
    maestro.install()
    return agent(llm)


def by_model(llm: Any) -> Any:
    return agent(maestro.wrap_model(llm))


def by_middleware(llm: Any) -> Any:
    return agent(llm, MaestroMiddleware())


def by_middleware_and_model(llm: Any) -> Any:
    return agent(maestro.wrap_model(llm), MaestroMiddleware())


def by_model_twice(llm: Any) -> Any:
    return agent(maestro.wrap_model(maestro.wrap_model(llm)))


def by_all(llm: Any) -> Any:
    maestro.install()
    return maestro.wrap(maestro(lambda: agent(maestro.wrap_model(llm), MaestroMiddleware()))())


def by_model_then_uninstall(llm: Any) -> Any:
    maestro.install()
    program = agent(maestro.wrap_model(llm))
    maestro.uninstall()
    assert unpatched()
    return program


WAYS = [
    by_wrap,
    by_decorator,
    by_install,
    by_model,
    by_middleware,
    by_middleware_and_model,
    by_model_twice,
    by_all,
    by_model_then_uninstall,
]


# -- each way, and what is combined ------------------------------------------------------------------------------------
@on_module_loop
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("way", WAYS)
async def test_each_way_serves_each_call_once_by_the_fleet_and_the_result_is_the_same(
    way: Callable[[Any], Any], is_async: bool, servers: list[StubServer], fleet: list[Observation]
) -> None:
    """Two calls, two stages, two requests with a priority, of one run and of a known node; the answer as without."""
    llm = chat_model(servers[0])
    expected = plain(agent(llm).invoke(QUESTION)["messages"])
    assert len(servers[0].requests) == 2
    servers[0].reset()

    program = way(llm)
    result = await program.ainvoke(QUESTION) if is_async else await asyncio.to_thread(program.invoke, QUESTION)

    assert plain(result["messages"]) == expected
    assert [("priority" in body, body["model"]) for body in moved(servers)] == [(True, "stub")] * 2
    await until(lambda: len(fleet) == 2)
    assert [seen.node for seen in fleet] == ["model", "model"]
    assert len({seen.run_id for seen in fleet}) == 1
    assert fleet[0].run_id
    await until(lambda: not held() and not waiting())
    assert len(fleet) == 2


@on_module_loop
@pytest.mark.parametrize("way", [by_model, by_middleware, by_all])
async def test_a_streamed_agent_gives_the_same_pieces(
    way: Callable[[Any], Any], servers: list[StubServer], fleet: list[Observation]
) -> None:
    """``stream_mode="messages"``: the same chunks from the same nodes, in the same order."""

    async def pieces(program: Any) -> list[tuple[Any, Any]]:
        stream = program.astream(QUESTION, stream_mode="messages")
        return [(message.content, metadata["langgraph_node"]) async for message, metadata in stream]

    expected = await pieces(agent(chat_model(servers[0], streaming=True)))
    servers[0].reset()
    assert await pieces(way(chat_model(servers[0], streaming=True))) == expected
    assert [body["stream"] for body in moved(servers)] == [True, True]
    await until(lambda: len(fleet) == 2)
    assert all(seen.output_tokens for seen in fleet)


@pytest.mark.parametrize("way", [by_install, by_model, by_middleware_and_model, by_model_twice, by_all])
def test_without_a_fleet_no_call_waits_for_itself(
    way: Callable[[Any], Any], servers: list[StubServer], tmp_path: Path
) -> None:
    """One place at the provider: whatever is combined, a call takes it once, and every call is one stage."""
    with managed(tmp_path, {}, local_concurrency=1, max_wait_s=5), watched_observations() as seen:
        assert way(chat_model(servers[0])).invoke(QUESTION)["messages"][-1].content.startswith("echo")
        asyncio.run(until(lambda: len(seen) == 2 and not held()))
    assert len(servers[0].requests) == 2


# -- one model, without a patch ----------------------------------------------------------------------------------------
def _uses(llm: Any) -> dict[str, Callable[[], Any]]:
    return {
        "invoke": lambda: llm.invoke("hi").content,
        "stream": lambda: [c.content for c in llm.stream("one two three")],
        "batch": lambda: [m.content for m in llm.batch(["a", "b", "c"])],
        "bind": lambda: llm.bind(stop=["x"]).invoke("hi").content,
        "bind_tools": lambda: llm.bind_tools([add]).invoke('[[tool:add {"a": 1, "b": 2}]]').tool_calls,
        "json_schema": lambda: llm.with_structured_output(Score).invoke("hi"),
        "function_calling": lambda: llm.with_structured_output(Score, method="function_calling").invoke("hi"),
        "with_retry": lambda: llm.with_retry(stop_after_attempt=2).invoke("hi").content,
        "with_fallbacks": lambda: llm.with_fallbacks([llm]).invoke("hi").content,
        "with_config": lambda: llm.with_config(tags=["t"]).invoke("hi").content,
    }


@pytest.mark.parametrize("use", list(_uses(None)))
def test_a_wrapped_model_is_used_like_any_other(use: str, servers: list[StubServer], fleet: list[Observation]) -> None:
    """Whatever LangChain makes of the model goes through the gate, with no patch, and gives what it gave."""
    llm = chat_model(servers[0], output_version="v0")
    expected = _uses(llm)[use]()
    requests = len(servers[0].requests)
    servers[0].reset()
    wrapped = maestro.wrap_model(llm)
    assert type(wrapped) is ChatOpenAI
    assert unpatched()
    assert _uses(wrapped)[use]() == expected
    assert len(moved(servers)) == requests
    assert all("priority" in body for body in moved(servers))


def test_a_conversation_of_the_responses_api_stays_with_its_engine(
    servers: list[StubServer], fleet: list[Observation]
) -> None:
    """What follows an answer goes where that answer is remembered."""
    llm = maestro.wrap_model(chat_model(servers[0], use_responses_api=True, use_previous_response_id=True))
    first = llm.invoke("hi")
    for _ in range(4):
        llm.invoke([HumanMessage("hi"), first, HumanMessage("again")])
    assert len(moved(servers)) == 5
    assert sorted(len(server.requests) for server in servers) == [0, 0, 5]


@on_module_loop
async def test_a_wrapped_model_is_used_like_any_other_on_a_loop(
    servers: list[StubServer], fleet: list[Observation]
) -> None:
    """ainvoke, astream and abatch go through the gate too."""
    llm = chat_model(servers[0])

    async def used(llm: Any) -> Any:
        return (
            (await llm.ainvoke("hi")).content,
            [c.content async for c in llm.astream("one two three")],
            [m.content for m in await llm.abatch(["a", "b"])],
        )

    expected = await used(llm)
    servers[0].reset()
    assert await used(maestro.wrap_model(llm)) == expected
    assert len(moved(servers)) == 4


def test_nothing_of_the_callers_client_reaches_an_engine(servers: list[StubServer], fleet: list[Observation]) -> None:
    """Key, organisation, default headers, queries and cookies stay; the engine gets the body and its own key."""
    http = httpx_of(openai.OpenAI(api_key="x")).Client(
        headers={"x-corp": "caller-secret"}, cookies={"c": "caller-secret"}
    )
    llm = chat_model(
        servers[0],
        http_client=http,
        organization="caller-secret",
        default_headers={"x-team": "caller-secret"},
        default_query={"q": "caller-secret"},
    )
    maestro.wrap_model(llm).invoke("hi")
    seen = [request for server in servers[1:] for request in server.requests]
    assert [request.headers["authorization"] for request in seen] == ["Bearer EMPTY"]
    assert "caller-secret" not in repr(seen)


def test_a_model_that_no_engine_serves_goes_through_the_callers_own_client(
    servers: list[StubServer], fleet: list[Observation]
) -> None:
    """Its headers, cookies, queries, hooks and transport are used as before, and its SDK's retries too."""
    seen: list[str] = []
    http = httpx_of(openai.OpenAI(api_key="x")).Client(
        headers={"x-corp": "corp"}, cookies={"c": "1"}, event_hooks={"request": [lambda r: seen.append(str(r.url))]}
    )
    llm = chat_model(servers[0], model="other", http_client=http, default_query={"q": "1"}, max_retries=1)
    servers[0].fail(500)
    assert maestro.wrap_model(llm).invoke("hi").content == "echo 1 of hi"
    first, second = servers[0].requests
    assert first.headers["x-corp"] == "corp"
    assert first.headers["cookie"] == "c=1"
    assert first.headers["authorization"] == "Bearer caller-secret"
    assert first.query == second.query == "q=1"
    assert "priority" not in first.body
    assert len(seen) == 2
    assert fleet == []


def test_without_a_fleet_a_wrapped_model_is_ordered_at_its_own_url(servers: list[StubServer], tmp_path: Path) -> None:
    """The request is as without Maestro, and a stage of it is observed."""
    with managed(tmp_path, {}), watched_observations() as seen:
        assert maestro.wrap_model(chat_model(servers[0])).invoke("hi").content == "echo 1 of hi"
        asyncio.run(until(lambda: len(seen) == 1))
    assert "priority" not in servers[0].requests[0].body
    assert seen[0].output_tokens == 4


def test_a_call_leaves_a_dead_engine_before_its_first_byte(servers: list[StubServer], tmp_path: Path) -> None:
    """Connection refused, a busy answer, a stream that breaks at once: the call is answered by the other engine."""
    llm = maestro.wrap_model(chat_model(servers[0]))
    with managed(tmp_path, {"a": dead_url(), "b": servers[1].url}):
        assert [llm.invoke("hi").content for _ in range(3)] == ["echo 1 of hi"] * 3
        servers[1].fail(503)
        assert llm.invoke("hi").content == "echo 1 of hi"
        servers[1].deaths = 1
        assert "".join(c.text for c in llm.stream("hi")) == "echo 1 of hi"
    assert servers[0].requests == []


def test_an_engines_refusal_reaches_the_caller_as_the_sdks_error_and_is_not_retried(
    servers: list[StubServer], fleet: list[Observation]
) -> None:
    """A 400 is final: one request, though the client would retry; a 500 is tried again as often as the client would."""
    llm = maestro.wrap_model(chat_model(servers[0], max_retries=2))
    servers[1].fail(400)
    servers[2].fail(400)
    with pytest.raises(openai.BadRequestError, match="stub says 400"):
        llm.invoke("hi")
    assert len(moved(servers)) == 1
    for server in servers:
        server.reset()
        server.fail(*[500] * 9)
    with pytest.raises(openai.InternalServerError, match="stub says 500"):
        llm.invoke("hi")
    assert len(moved(servers)) == 3


def test_a_dead_fleet_gives_the_sdks_connection_error(servers: list[StubServer], tmp_path: Path) -> None:
    """With every engine gone the caller sees what it would see of a dead provider, once."""
    with managed(tmp_path, {"a": dead_url()}, max_attempts=2):
        with pytest.raises(openai.APIConnectionError):
            maestro.wrap_model(chat_model(servers[0], max_retries=5)).invoke("hi")
    assert servers[0].requests == []


@on_module_loop
async def test_waiting_costs_nothing_of_the_callers_timeout(servers: list[StubServer], tmp_path: Path) -> None:
    """A call that waits longer for its turn than its client's timeout is served; an engine that is slower is not."""
    with managed(tmp_path, {"a": servers[1].url}, slots=1):
        slow = maestro.wrap_model(chat_model(servers[0], timeout=5))
        quick = maestro.wrap_model(chat_model(servers[0], timeout=0.2))
        first = asyncio.create_task(slow.ainvoke("[[hold]]"))
        await servers[1].wait_async(lambda s: len(s.requests) == 1)
        second = asyncio.create_task(quick.ainvoke("second"))
        await until(lambda: waiting() == 1)
        began_s = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() - began_s > 0.3)
        servers[1].release()
        assert (await first).content
        assert (await second).content
        servers[1].hold()
        with pytest.raises(openai.APITimeoutError):
            await quick.ainvoke("[[hold]]")


def test_a_cancelled_wrapped_call_gives_its_engine_back(servers: list[StubServer], fleet: list[Observation]) -> None:
    """Before and in the middle of its answer."""

    async def main() -> None:
        llm = maestro.wrap_model(chat_model(servers[0]))
        asked = asyncio.create_task(llm.ainvoke("[[hold]]"))
        await until(lambda: held() == 1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        stream = llm.astream("[[hold]] one two three")
        await anext(stream)
        assert held() == 1
        await stream.aclose()
        await until(lambda: not held())

    asyncio.run(main())


def test_what_was_said_of_a_model_holds_where_nobody_says_more(
    servers: list[StubServer], fleet: list[Observation]
) -> None:
    """Outside a graph, and in a graph that nobody watches; the request's own word wins. Again adds to it."""
    llm = maestro.wrap_model(chat_model(servers[0]), service_class="batch", tenant="t1")
    llm.invoke("hi")
    maestro.wrap_model(llm, tenant="t2").invoke("hi")
    with maestro.options(tenant="request"):
        llm.invoke("hi")
    maestro.install()
    llm.invoke("hi")
    asyncio.run(until(lambda: len(fleet) == 4))
    said = [(seen.service_class, seen.tenant) for seen in fleet]
    assert said == [(ServiceClass.BATCH, tenant) for tenant in ("t1", "t2", "request", "t1")]


def test_a_wrapped_model_leaves_the_first_one_alone(servers: list[StubServer], fleet: list[Observation]) -> None:
    """wrap_model returns a copy; the model it was given goes on to its provider."""
    llm = chat_model(servers[0])
    maestro.wrap_model(llm)
    llm.invoke("hi")
    assert len(servers[0].requests) == 1


def test_a_bound_model_is_wrapped_where_it_is_bound(servers: list[StubServer], fleet: list[Observation]) -> None:
    """``bind_tools`` first, ``wrap_model`` after."""
    bound = maestro.wrap_model(chat_model(servers[0]).bind_tools([add]))
    assert bound.invoke('[[tool:add {"a": 1, "b": 2}]]').tool_calls
    assert [len(body["tools"]) for body in moved(servers)] == [1]


@pytest.mark.parametrize("wrong", ["a string", None, object()])
def test_what_is_no_model_is_refused_in_one_line(wrong: Any) -> None:
    """The error names what was given and what to give."""
    with pytest.raises(ConfigError, match="give wrap_model the chat model itself"):
        maestro.wrap_model(wrong)
    with pytest.raises(ConfigError, match="did you mean service_class"):
        maestro.wrap_model(FakeListChatModel(responses=["x"]), service_clas="batch")  # type: ignore[call-arg]


def test_an_azure_model_is_served_by_the_fleet(servers: list[StubServer], fleet: list[Observation]) -> None:
    """The deployment's path and key stay behind; the engine gets its own."""
    llm = AzureChatOpenAI(
        azure_endpoint=servers[0].url.removesuffix("/v1"),
        azure_deployment="deployed",
        api_version="2024-10-21",
        api_key="caller-secret",  # type: ignore[arg-type]
        model="stub",
        max_retries=0,
    )
    wrapped = maestro.wrap_model(llm)
    assert type(wrapped) is AzureChatOpenAI
    assert wrapped.invoke("hi").content == "echo 1 of hi"
    assert [seen.path for server in servers[1:] for seen in server.requests] == ["/v1/chat/completions"]


# -- runs that nobody watches ------------------------------------------------------------------------------------------
def _two_nodes(llm: Any) -> Any:
    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_sequence([("one", ask), ("two", ask)])
    graph.add_edge(START, "one")
    return graph.compile()


def test_calls_of_one_graph_run_share_a_run_though_nobody_watches_the_graph(
    servers: list[StubServer], fleet: list[Observation]
) -> None:
    """Sub-graphs included; the next run is another, and one that is idle ends at its last call's end."""
    adopted._end_all()
    inner = _two_nodes(maestro.wrap_model(chat_model(servers[0]), agent="pair"))
    outer = StateGraph(MessagesState)
    outer.add_node("inner", inner)
    outer.add_edge(START, "inner")
    program = outer.compile()
    program.invoke({"messages": ["hi"]})
    program.invoke({"messages": ["hi"]})
    asyncio.run(until(lambda: len(fleet) == 4))
    assert [seen.role for seen in fleet[:2]] == ["pair:inner:one", "pair:inner:two"]
    assert len({seen.run_id for seen in fleet[:2]}) == 1
    assert len({seen.run_id for seen in fleet}) == 2
    assert len(adopted._adopted) == 2
    adopted._end_all()
    assert not adopted._adopted


def test_an_adopted_run_with_an_open_call_is_not_ended(servers: list[StubServer], fleet: list[Observation]) -> None:
    """Idle means: no call that is still answered."""
    adopted._end_all()
    llm = maestro.wrap_model(chat_model(servers[0]))

    def ask(state: MessagesState) -> Any:
        stream = llm.stream("[[hold]] one two")
        next(stream)
        adopted._end_all()
        assert len(adopted._adopted) == 1
        stream.close()
        return {}

    graph = StateGraph(MessagesState)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    graph.compile().invoke({"messages": ["hi"]})
    adopted._end_all()
    assert not adopted._adopted


# -- models of others --------------------------------------------------------------------------------------------------
class Slow(FakeListChatModel):
    """A model of somebody else's, which answers when it is let."""

    gate: Any = None
    failing: bool = False
    asked: Any = None

    async def _acall(self, *args: Any, **kwargs: Any) -> str:
        self.asked.append(1)
        await self.gate.wait()
        if self.failing:
            raise ValueError("theirs")
        return super()._call(*args, **kwargs)

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        from langchain_core.outputs import ChatGeneration, ChatResult

        text = await self._acall(messages)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])


@on_module_loop
async def test_another_providers_calls_wait_for_their_turn(tmp_path: Path) -> None:
    """One at a time with one place: an answer, an error and a cancelled call each let the next one go."""
    with managed(tmp_path, {}, local_concurrency=1), watched_observations() as seen:
        asked: list[int] = []
        good = maestro.wrap_model(Slow(responses=["ok"], gate=asyncio.Event(), asked=asked), tenant="other")
        bad = maestro.wrap_model(Slow(responses=["ok"], gate=good.gate, asked=asked, failing=True))
        assert type(good) is Slow
        calls = [asyncio.create_task(llm.ainvoke("hi")) for llm in (good, bad, good, good)]
        await until(lambda: len(asked) == 1 and waiting() == 3)
        calls[0].cancel()
        await until(lambda: len(asked) == 2 and waiting() == 2)
        good.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(r).__name__ for r in results] == ["CancelledError", "ValueError", "AIMessage", "AIMessage"]
        await until(lambda: len(seen) == 3 and not held())
        assert [observation.tenant for observation in seen[1:]] == ["other", "other"]
        assert all(observation.prompt_tokens for observation in seen)


def test_another_providers_model_in_a_graph_is_known_and_streams(tmp_path: Path) -> None:
    """Node known, sync and streamed, each released at its end; an answer from LangChain's cache takes no turn."""
    from langchain_core.caches import InMemoryCache

    with managed(tmp_path, {}, local_concurrency=1), watched_observations() as seen:
        llm = maestro.wrap_model(FakeListChatModel(responses=["one", "two"], cache=InMemoryCache()))
        _two_nodes(llm).invoke({"messages": ["hi"]})
        assert "".join(c.text for c in llm.stream("hello")) in {"one", "two"}
        abandoned = llm.stream("hello again")
        next(abandoned)
        abandoned.close()
        asyncio.run(until(lambda: len(seen) == 3 and not held()))
        assert llm.invoke("hello again and again").content == llm.invoke("hello again and again").content
        asyncio.run(until(lambda: len(seen) == 4 and not held()))
    assert [observation.node for observation in seen] == ["one", "two", "", ""]


def test_a_fleet_is_not_promised_what_cannot_be_moved(tmp_path: Path, servers: list[StubServer]) -> None:
    """Where there is a fleet, another provider's model passes by, though an engine has the same model name."""
    with managed(tmp_path, {"a": servers[1].url}), watched_observations() as seen:
        maestro.wrap_model(FakeListChatModel(responses=["one"])).invoke("hi")
        assert waiting() == held() == 0
    assert seen == []


def test_a_limiter_that_the_model_had_is_still_asked(tmp_path: Path) -> None:
    """After ours, and once; wrapping again does not stack them."""
    asked: list[bool] = []

    class Theirs(MaestroLimiter):
        def __init__(self) -> None: ...

        def acquire(self, *, blocking: bool = True) -> bool:
            asked.append(blocking)
            return True

    from langchain_core.rate_limiters import BaseRateLimiter

    theirs = type("Theirs", (BaseRateLimiter,), {"acquire": Theirs.acquire, "aacquire": None})
    theirs.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    with managed(tmp_path, {}):
        llm = maestro.wrap_model(maestro.wrap_model(FakeListChatModel(responses=["x"], rate_limiter=theirs())))
        llm.invoke("hi")
        asyncio.run(until(lambda: not held()))
    assert asked == [True]


def test_an_anthropic_model_is_ordered_by_its_url() -> None:
    """A real other provider's class takes the limiter, and keeps its class."""
    llm = ChatAnthropic(model_name="claude", api_key="x", timeout=1, stop=None)  # type: ignore[arg-type]
    wrapped = maestro.wrap_model(llm)
    assert type(wrapped) is ChatAnthropic
    assert isinstance(wrapped.rate_limiter, MaestroLimiter)
    assert wrapped.rate_limiter._url == "https://api.anthropic.com"


class OnTheSdk(FakeListChatModel):
    """A model that LangChain knows under no such name, and that asks through the OpenAI SDK all the same."""

    url: str = ""

    def _call(self, *args: Any, **kwargs: Any) -> str:
        client = openai.OpenAI(base_url=self.url, api_key="x", max_retries=0)
        answer = client.chat.completions.create(model="stub", messages=[{"role": "user", "content": "hi"}])
        return str(answer.choices[0].message.content)


def test_a_limited_model_whose_request_comes_by_the_gate_is_served_once(
    servers: list[StubServer], tmp_path: Path
) -> None:
    """The limiter let it go: the gate, with one place in all, does not make it wait for itself."""
    with managed(tmp_path, {}, local_concurrency=1, max_wait_s=5), watched_observations() as seen:
        maestro.install()
        llm = maestro.wrap_model(OnTheSdk(responses=["x"], url=servers[0].url))
        _two_nodes(llm).invoke({"messages": ["hi"]})
        asyncio.run(until(lambda: len(seen) == 2 and not held()))
    assert [observation.node for observation in seen] == ["one", "two"]
    assert len(servers[0].requests) == 2


# -- the middleware ----------------------------------------------------------------------------------------------------
def test_the_middleware_adds_no_node_and_wraps_a_model_once(servers: list[StubServer]) -> None:
    """The drawn graph is the same, and so is the wrapped model from call to call."""
    llm = chat_model(servers[0])
    ours = MaestroMiddleware(tenant="t")
    assert list(agent(llm, ours).nodes) == list(agent(llm).nodes)
    assert ours._model(llm) is ours._model(llm)
    assert maestro_langgraph.MaestroMiddleware is MaestroMiddleware
    with pytest.raises(ConfigError, match="no option"):
        MaestroMiddleware(colour="red")  # type: ignore[call-arg]


def test_importing_maestro_langgraph_does_not_import_langchain() -> None:
    """Nor langchain_openai, nor the middleware: an app may have neither."""
    code = "import sys, maestro_langgraph; print([m for m in ('langchain', 'langchain_openai') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], env=_env(), capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -- builders ----------------------------------------------------------------------------------------------------------
def _handled(graph: Any) -> bool:
    return bool((graph.config or {}).get("callbacks"))


def test_builders_of_every_kind_give_a_managed_graph() -> None:
    """Sync, async, context managers of both kinds on either side of the decorator, a StateGraph, an @entrypoint."""
    llm = FakeListChatModel(responses=["x"])
    closed: list[str] = []

    @maestro
    def plain_builder() -> Any:
        return _two_nodes(llm)

    @maestro(tenant="t")
    async def async_builder() -> Any:
        return _two_nodes(llm)

    @maestro
    @contextlib.asynccontextmanager
    async def outside() -> AsyncIterator[Any]:
        try:
            yield _two_nodes(llm)
        finally:
            closed.append("outside")

    @contextlib.asynccontextmanager
    @maestro
    async def inside() -> AsyncIterator[Any]:
        try:
            yield _two_nodes(llm)
        except KeyError:
            closed.append("inside heard of the error")
            raise

    @maestro
    @contextlib.contextmanager
    def sync_outside() -> Iterator[Any]:
        yield _two_nodes(llm)

    @contextlib.contextmanager
    @maestro(service_class="batch")
    def sync_inside() -> Iterator[Any]:
        yield _two_nodes(llm)

    @maestro
    @entrypoint()
    def workflow(text: str) -> str:
        return text

    async def main() -> None:
        assert _handled(await async_builder())
        async with outside() as graph:
            assert _handled(graph)
        with pytest.raises(KeyError):
            async with inside() as graph:
                assert _handled(graph)
                raise KeyError

    assert _handled(plain_builder())
    asyncio.run(main())
    assert closed == ["outside", "inside heard of the error"]
    with sync_outside() as graph:
        assert _handled(graph)
    with sync_inside() as graph:
        assert _handled(graph)
    assert isinstance(workflow, Pregel)
    assert _handled(workflow)
    assert workflow.invoke("hi") == "hi"
    assert inspect.isasyncgenfunction(maestro(inside.__wrapped__))
    maestro.uninstall()


def test_what_gives_no_graph_is_told_so_when_it_is_called() -> None:
    """A decorated function below @entrypoint, and a context manager of something else: one clear line."""

    @entrypoint()
    @maestro
    def workflow(text: str) -> str:
        return text

    with pytest.raises(ConfigError, match="put @maestro above it"):
        workflow.invoke("hi")

    @maestro
    @contextlib.contextmanager
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(ConfigError, match=r"numbers\(\) is decorated with @maestro and returned a int"), numbers():
        pass
    maestro.uninstall()


# -- in and out again --------------------------------------------------------------------------------------------------
def test_install_and_uninstall_in_any_order(servers: list[StubServer], fleet: list[Observation]) -> None:
    """Twice is once; what was wrapped before install is served once; after uninstall nothing is, until it is put back."""
    llm = chat_model(servers[0])
    before = (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request, StateGraph.compile)
    maestro.uninstall()
    program = maestro.wrap(_two_nodes(llm))
    maestro.install()
    maestro.install(tenant="t")
    program.invoke({"messages": ["hi"]})
    _two_nodes(llm).invoke({"messages": ["hi"]})
    asyncio.run(until(lambda: len(fleet) == 4))
    assert len(moved(servers)) == 4
    assert fleet[3].tenant == "t"
    maestro.uninstall()
    maestro.uninstall()
    assert (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request, StateGraph.compile) == before
    assert not _handled(program)
    program.invoke({"messages": ["hi"]})
    assert len(servers[0].requests) == 2
    maestro.wrap(program)
    servers[0].reset()
    program.invoke({"messages": ["hi"]})
    assert len(moved(servers)) == 6


# -- maestro run -------------------------------------------------------------------------------------------------------
APP = """
import json, os, sys
assert "maestro_langgraph" not in sys.modules
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

llm = ChatOpenAI(model="stub", api_key="caller-secret", max_retries=0)
graph = StateGraph(MessagesState)
graph.add_node("node", lambda s: {"messages": [llm.invoke(s["messages"])]})
graph.add_edge(START, "node")

def ask(text):
    return graph.compile().invoke({"messages": [text]})["messages"][-1].content

if __name__ == "__main__":
    print(json.dumps({"answer": ask("hi"), "pid": os.getpid(), "arguments": sys.argv[1:]}))
"""


def _env(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    return {**env, **more}


@dataclasses.dataclass
class Runner:
    """Starts `maestro run` in a folder, with the stub provider as the app's own and two engines as the fleet."""

    folder: Path
    servers: list[StubServer]

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        fleet = self.folder / "fleet.toml"
        fleet.write_text(
            "".join(
                f'[[engine]]\nid = "{n}"\nmodel = "stub"\nurl = "{s.url}"\nslots = 4\n'
                for n, s in enumerate(self.servers[1:])
            )
        )
        return subprocess.Popen(
            [sys.executable, "-m", "maestro_agents.cli", "run", "--fleet", "fleet.toml", *words],
            cwd=self.folder,
            env=_env(OPENAI_BASE_URL=self.servers[0].url, **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*words, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@pytest.fixture
def runner(tmp_path: Path, servers: list[StubServer]) -> Runner:
    (tmp_path / "app.py").write_text(APP)
    return Runner(tmp_path, servers)


@pytest.mark.parametrize(
    "words", [["app.py"], ["-m", "app"], ["-c", "import runpy; runpy.run_path('app.py', run_name='__main__')"]]
)
def test_a_program_runs_under_maestro_without_a_change(words: list[str], runner: Runner) -> None:
    """Same process, same arguments, the fleet answers; Maestro is imported when LangGraph or the SDK is."""
    process = runner.start("--service-class", "batch", "--", sys.executable, *words, "--flag", "x")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["answer"] == "echo 1 of hi"
    assert json.loads(out)["pid"] == process.pid
    if words[0] != "-c":
        assert json.loads(out)["arguments"] == ["--flag", "x"]
    assert [("priority" in body) for body in moved(runner.servers)] == [True]


def test_settings_given_to_run_reach_the_program(runner: Runner) -> None:
    """As MAESTRO_*, over what the environment says; options behind the command are the command's."""
    code = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('MAESTRO_')}))"
    given = ["--service-class", "batch", "--deadline", "5", "--tenant", "t", "--mode", "on", "--pool", "p"]
    rc, out, err = runner.run(*given, sys.executable, "-c", code, "--tenant", "theirs", MAESTRO_TENANT="env")
    assert rc == 0, err
    assert json.loads(out) == {
        "MAESTRO_SERVICE_CLASS": "batch",
        "MAESTRO_DEADLINE_S": "5.0",
        "MAESTRO_TENANT": "t",
        "MAESTRO_MODE": "on",
        "MAESTRO_POOL": "p",
        "MAESTRO_FLEET": str(runner.folder / "fleet.toml"),
    }


def test_child_processes_are_under_maestro_too(runner: Runner) -> None:
    """A worker of multiprocessing (spawn) and a program that the program starts."""
    (runner.folder / "parent.py").write_text(
        textwrap.dedent("""
        import multiprocessing, subprocess, sys
        import app
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(app.ask, ["one"]))
            subprocess.run([sys.executable, "app.py"], check=True)
        """)
    )
    rc, out, err = runner.run(sys.executable, "parent.py")
    assert rc == 0, err
    assert "echo 1 of one" in out
    assert len(moved(runner.servers)) == 2


def test_the_commands_exit_status_and_signals_are_its_own(runner: Runner) -> None:
    """A failing script's status, its traceback, and Ctrl-C, which meets the program and nobody else."""
    assert runner.run(sys.executable, "-c", "raise SystemExit(7)")[0] == 7
    rc, _, err = runner.run(sys.executable, "-c", "import nothing_of_the_kind")
    assert rc == 1
    assert "nothing_of_the_kind" in err
    assert "maestro" not in err
    code = (
        "import signal, sys\ntry:\n print('ready', flush=True)\n signal.pause()\nexcept KeyboardInterrupt: sys.exit(42)"
    )
    process = runner.start(sys.executable, "-c", code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 42
    process.communicate()
    if os.path.exists("/proc/self/status"):
        rc, out, _ = runner.run("grep", "SigIgn", "/proc/self/status")
        assert int(out.split()[1], 16) & 1 << signal.SIGPIPE - 1 == 0


def test_a_process_that_needs_none_of_it_imports_none_of_it(runner: Runner) -> None:
    """No package of ours or of LangChain's, and no trace on the search path."""
    code = """
import sys, json
ours = ("maestro_langgraph", "maestro_agents", "langgraph", "openai", "pydantic", "typing")
print([m for m in ours if m in sys.modules], [p for p in sys.path if "bootstrap" in p])
"""
    rc, out, err = runner.run(sys.executable, "-c", code)
    assert rc == 0, err
    found = out.strip()
    assert found.endswith("[]")
    assert "langgraph" not in found
    assert "openai" not in found


def test_the_sitecustomize_that_is_hidden_still_runs(runner: Runner) -> None:
    """Once, under its own name, and what goes wrong in it is told as Python tells it."""
    theirs = runner.folder / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("import sys; sys.theirs = __name__, __file__\n")
    path = os.pathsep.join([str(theirs), os.environ.get("PYTHONPATH", "")])
    rc, out, err = runner.run(sys.executable, "-c", "import sys; print(sys.theirs)", PYTHONPATH=path)
    assert rc == 0, err
    assert out.strip() == str(("sitecustomize", str(theirs / "sitecustomize.py")))
    (theirs / "sitecustomize.py").write_text("1 / 0\n")
    rc, out, err = runner.run(sys.executable, "app.py", PYTHONPATH=path)
    assert rc == 0, err
    assert "ZeroDivisionError" in err
    assert len(moved(runner.servers)) == 1


def test_a_python_without_maestro_runs_the_app_as_it_is(runner: Runner) -> None:
    """One line, on stderr, and the app's own provider answers. The same where a setting is wrong."""
    elsewhere = runner.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "app.py").write_text(APP)
    (elsewhere / "maestro_langgraph.py").write_text("raise ImportError('No module named maestro_langgraph')\n")
    rc, out, err = runner.run(sys.executable, "elsewhere/app.py")
    assert rc == 0
    assert json.loads(out)["answer"] == "echo 1 of hi"
    assert len(runner.servers[0].requests) == 1
    (said,) = [line for line in err.splitlines() if line.startswith("maestro")]
    assert f"{sys.executable} cannot import Maestro (No module named maestro_langgraph); install it there" in said
    assert "runs as without Maestro" in said


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["no-such-program"], 127, "there is no program 'no-such-program'"),
        (["no-such.py"], 127, "say: maestro run -- python no-such.py"),
        (["./app.py"], 126, "say: maestro run -- python ./app.py"),
        (["--mode", "maybe", "true"], 2, "mode = 'maybe'"),
        (["--fleet", "missing.toml", "true"], 2, "missing.toml"),
        (["--deadline", "-1", "true"], 2, "deadline_s"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(words: list[str], status: int, said: str, runner: Runner) -> None:
    """With the exit status that a shell would give, and what to do."""
    rc, out, err = runner.run(*words)
    assert (rc, out) == (status, "")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -I app.py", "python -I ignores PYTHONPATH"),
        ("python3.12 -uE app.py", "python3.12 -E ignores PYTHONPATH"),
        ("/usr/bin/python -W error -S -m app", "python -S runs no sitecustomize"),
        ("python app.py -I", ""),
        ("python -m app -I", ""),
        ("python -Wignore -c pass -E", ""),
        ("python -X importtime app.py", ""),
        ("ls -I", ""),
    ],
)
def test_a_python_that_will_not_hear_of_us_is_seen_on_the_command_line(command: str, said: str) -> None:
    """Flags of the interpreter count, those of the program do not."""
    assert _deaf(command.split()) == said


def test_a_script_whose_first_line_shuts_us_out_is_seen_too(runner: Runner) -> None:
    """As installers write them; the app runs, and one line says that it is unmanaged."""
    script = runner.folder / "tool"
    script.write_text(f"#!{sys.executable} -E\nprint('ran')\n")
    script.chmod(0o755)
    rc, out, err = runner.run("./tool")
    assert (rc, out) == (0, "ran\n")
    assert "-E ignores PYTHONPATH: the app runs as without Maestro" in err


def test_all_ways_at_once_below_run_inside_run_serve_a_call_once(runner: Runner) -> None:
    """The app says everything that can be said, under two times `maestro run`: two calls, two stages."""
    (runner.folder / "everything.py").write_text(
        textwrap.dedent("""
        from langchain.agents import create_agent
        from langchain_openai import ChatOpenAI
        from maestro_agents.client import Client
        from maestro_langgraph import MaestroMiddleware, maestro

        opened, original = [], Client.open

        def counting(self, *args, **kwargs):
            opened.append(original(self, *args, **kwargs))
            return opened[-1]

        Client.open = counting
        maestro.install()

        @maestro
        def build():
            llm = maestro.wrap_model(ChatOpenAI(model="stub", api_key="x", max_retries=0))
            return maestro.wrap(create_agent(llm, middleware=[MaestroMiddleware()]))

        build().invoke({"messages": ["hi"]})
        ChatOpenAI(model="stub", api_key="x", max_retries=0).invoke("hi")
        print(len(opened))
        """)
    )
    rc, out, err = runner.run(sys.executable, "-m", "maestro_agents.cli", "run", sys.executable, "everything.py")
    assert (rc, out) == (0, "2\n"), err
    assert len(moved(runner.servers)) == 2


def test_run_inside_run_is_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our folder stands in front, once."""
    monkeypatch.setenv("PYTHONPATH", environment({})["PYTHONPATH"])
    path = environment({})["PYTHONPATH"].split(os.pathsep)
    assert path[0] == os.path.dirname(sitecustomize.__file__)
    assert path.count(path[0]) == 1


def test_the_client_is_not_started_by_looking(fleet: list[Observation]) -> None:
    """Wrapping a model reads no setting and starts nothing."""
    Client.reset()
    maestro.wrap_model(FakeListChatModel(responses=["x"]))
    assert Client._current is None
