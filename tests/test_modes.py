"""Every way to run a LangGraph program gives the same result with Maestro as without, served by the fleet instead."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import openai
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Send
from pydantic import BaseModel

from maestro_agents import client as client_module
from maestro_langgraph import maestro
from tests.stub_openai import StubServer, managed, stub_servers

on_module_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[StubServer]]:
    """The caller's own provider, and two engines of the fleet."""
    with stub_servers(3) as servers:
        yield servers


@pytest.fixture(autouse=True)
def settings(servers: list[StubServer], tmp_path: Path) -> Iterator[None]:
    """A fleet of two engines, scheduled inside this process; nothing installed yet."""
    for server in servers:
        server.reset()
    with managed(tmp_path, {"a": servers[1].url, "b": servers[2].url}):
        yield


class Score(BaseModel):
    """A structured answer."""

    name: str
    score: int


class State(TypedDict, total=False):
    q: str
    parts: Annotated[list[str], operator.add]
    rounds: int
    out: Any


class Programs:
    """The programs under test, on the provider of the caller."""

    def __init__(self, url: str) -> None:
        self.llm = ChatOpenAI(model="stub", base_url=url, api_key="caller-secret", max_retries=0)
        self.sync_sdk = openai.OpenAI(base_url=url, api_key="caller-secret", max_retries=0)
        self.async_sdk = openai.AsyncOpenAI(base_url=url, api_key="caller-secret", max_retries=0)

    def chat(self, *, is_async: bool) -> StateGraph[Any]:
        graph = StateGraph(MessagesState)
        graph.add_node("chat", self._achat if is_async else self._chat)
        graph.add_edge(START, "chat")
        graph.add_edge("chat", END)
        return graph

    def _chat(self, state: MessagesState) -> dict[str, Any]:
        return {"messages": [self.llm.invoke(state["messages"])]}

    async def _achat(self, state: MessagesState) -> dict[str, Any]:
        return {"messages": [await self.llm.ainvoke(state["messages"])]}

    def tools(self) -> StateGraph[Any]:
        @tool
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        model = self.llm.bind_tools([add])

        def agent(state: MessagesState) -> dict[str, Any]:
            return {"messages": [model.invoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("agent", agent)
        graph.add_node("tools", ToolNode([add]))
        graph.add_edge(START, "agent")
        graph.add_conditional_edges("agent", tools_condition)
        graph.add_edge("tools", "agent")
        return graph

    def structured(self, method: str) -> StateGraph[Any]:
        model = self.llm.with_structured_output(Score, method=method)

        def judge(state: State) -> State:
            return {"out": model.invoke(state["q"])}

        graph = StateGraph(State)
        graph.add_node("judge", judge)
        graph.add_edge(START, "judge")
        return graph

    def fan_out(self) -> StateGraph[Any]:
        async def worker(state: State) -> State:
            return {"parts": [str((await self.llm.ainvoke(state["q"])).content)]}

        async def join(state: State) -> State:
            return {"out": (await self.llm.ainvoke(" ".join(sorted(state["parts"])))).content}

        graph = StateGraph(State)
        graph.add_node("plan", lambda _: {})
        graph.add_node("worker", worker)
        graph.add_node("join", join)
        graph.add_edge(START, "plan")
        graph.add_conditional_edges(
            "plan", lambda _: [Send("worker", {"q": f"part {n}"}) for n in range(5)], ["worker"]
        )
        graph.add_edge("worker", "join")
        return graph

    def loop(self) -> StateGraph[Any]:
        def write(state: State) -> State:
            text = str(self.llm.invoke(f"{state['q']} {state.get('rounds', 0)}").content)
            return {"parts": [text], "rounds": state.get("rounds", 0) + 1}

        graph = StateGraph(State)
        graph.add_node("write", write)
        graph.add_edge(START, "write")
        graph.add_conditional_edges("write", lambda s: "write" if s["rounds"] < 3 else END, ["write", END])
        return graph

    def agent_in_tool(self) -> StateGraph[Any]:
        inner = self.chat(is_async=False).compile()

        @tool
        def research(topic: str) -> str:
            """Ask the research agent."""
            return str(inner.invoke({"messages": [HumanMessage(topic)]})["messages"][-1].content)

        def call(state: State) -> State:
            return {"out": research.invoke({"topic": state["q"]})}

        graph = StateGraph(State)
        graph.add_node("call", call)
        graph.add_edge(START, "call")
        return graph

    def raw_sdk(self) -> StateGraph[Any]:
        async def ask(state: State) -> State:
            messages: Any = [{"role": "user", "content": state["q"]}]
            one = await asyncio.to_thread(self.sync_sdk.chat.completions.create, model="stub", messages=messages)
            two = await self.async_sdk.chat.completions.create(model="stub", messages=messages)
            stream = await self.async_sdk.chat.completions.create(model="stub", messages=messages, stream=True)
            three = "".join([c.choices[0].delta.content or "" async for c in stream])
            return {"parts": [one.choices[0].message.content or "", two.choices[0].message.content or "", three]}

        graph = StateGraph(State)
        graph.add_node("ask", ask)
        graph.add_edge(START, "ask")
        return graph


def plain(value: Any) -> Any:
    """A result without what differs from run to run (ids)."""
    if isinstance(value, BaseMessage):
        usage = value.usage_metadata if isinstance(value, AIMessage) else None
        calls = value.tool_calls if isinstance(value, AIMessage) else None
        return value.type, value.content, calls, usage
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


HELLO = {"messages": [HumanMessage("hello there")]}


def sync_modes(p: Programs, attach: Any) -> dict[str, Any]:
    chat = attach(p.chat(is_async=False).compile())
    return {
        "invoke": chat.invoke(HELLO),
        "stream": list(chat.stream(HELLO, stream_mode="updates")),
        "batch": chat.batch([{"messages": [HumanMessage(f"n {n}")]} for n in range(4)]),
        "messages": [m for m, _ in chat.stream(HELLO, stream_mode="messages")],
        "tools": attach(p.tools().compile()).invoke({"messages": [HumanMessage('[[tool:add {"a": 2, "b": 3}]]')]}),
        "json_schema": attach(p.structured("json_schema").compile()).invoke({"q": "judge"}),
        "function_calling": attach(p.structured("function_calling").compile()).invoke({"q": "judge"}),
        "loop": attach(p.loop().compile()).invoke({"q": "again"}),
        "agent_in_tool": attach(p.agent_in_tool().compile()).invoke({"q": "whales"}),
    }


async def async_modes(p: Programs, attach: Any) -> dict[str, Any]:
    chat = attach(p.chat(is_async=True).compile())
    blocking = attach(p.chat(is_async=False).compile())
    return {
        "ainvoke": await chat.ainvoke(HELLO),
        "ainvoke of a sync node": await blocking.ainvoke(HELLO),
        "astream": [u async for u in chat.astream(HELLO, stream_mode="updates")],
        "abatch": await chat.abatch([{"messages": [HumanMessage(f"n {n}")]} for n in range(4)]),
        "messages": [m async for m, _ in chat.astream(HELLO, stream_mode="messages")],
        "events": [
            e["event"] async for e in chat.astream_events(HELLO, version="v2") if e["event"] != "on_chat_model_stream"
        ],
        "fan_out": await attach(p.fan_out().compile()).ainvoke({"q": "", "parts": []}),
        "raw_sdk": await attach(p.raw_sdk().compile()).ainvoke({"q": "raw", "parts": []}),
    }


def served_by_fleet(servers: list[StubServer], calls: int) -> None:
    """The engines served everything, nothing of the caller's arrived there, and each call had a priority."""
    caller, a, b = servers
    assert not caller.requests
    assert len(a.requests) + len(b.requests) == calls
    for seen in a.requests + b.requests:
        assert "caller-secret" not in str(seen.headers)
        assert isinstance(seen.body["priority"], int)


@pytest.mark.parametrize("way", ["wrap", "install"])
def test_sync_programs_give_the_same_results(servers: list[StubServer], way: str) -> None:
    """invoke, stream, batch, tools, structured output, loop and a sub-agent in a tool: same results, other servers."""
    programs = Programs(servers[0].url)
    without = sync_modes(programs, lambda g: g)
    calls = len(servers[0].requests)
    servers[0].reset()
    if way == "install":
        maestro.install()
    with_maestro = sync_modes(programs, maestro.wrap if way == "wrap" else lambda g: g)
    for mode, expected in without.items():
        assert plain(with_maestro[mode]) == plain(expected), mode
    served_by_fleet(servers, calls)


@on_module_loop
@pytest.mark.parametrize("way", ["wrap", "install"])
async def test_async_programs_give_the_same_results(servers: list[StubServer], way: str) -> None:
    """ainvoke, astream, abatch, token streams, events, fan-out and raw SDK calls: same results, other servers."""
    programs = Programs(servers[0].url)
    without = await async_modes(programs, lambda g: g)
    calls = len(servers[0].requests)
    servers[0].reset()
    if way == "install":
        maestro.install()
    with_maestro = await async_modes(programs, maestro.wrap if way == "wrap" else lambda g: g)
    for mode, expected in without.items():
        assert plain(with_maestro[mode]) == plain(expected), mode
    served_by_fleet(servers, calls)


def test_own_url_mode_serves_the_caller_from_its_own_server(servers: list[StubServer]) -> None:
    """Without a fleet a call keeps its URL, its key and its body: only its turn is Maestro's."""
    client_module._overrides.clear()
    maestro.configure(local_concurrency=2)
    chat = maestro.wrap(Programs(servers[0].url).chat(is_async=False).compile())
    assert chat.invoke(HELLO)["messages"][-1].content == "echo 1 of hello there"
    (seen,) = servers[0].requests
    assert seen.headers["authorization"] == "Bearer caller-secret"
    assert "priority" not in seen.body
