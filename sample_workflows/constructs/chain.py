"""A chain: plan, then write, then polish. Three calls, one after the other.

The plainest program. Maestro sees ``plan``, ``write`` and ``polish``, and from the first run on knows that a call of
``plan`` still has two behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"topic": "tides [[tokens=8]]"}
CALLS = {"plan": 1, "write": 1, "polish": 1}


class State(TypedDict, total=False):
    topic: str
    plan: str
    text: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    def plan(state: State) -> State:
        return {"plan": llm.invoke(f"Plan three paragraphs on {state['topic']}").text}

    def write(state: State) -> State:
        return {"text": llm.invoke(f"Write it. Plan: {state['plan']} [[tokens=20]]").text}

    def polish(state: State) -> State:
        return {"text": llm.invoke(f"Polish: {state['text']} [[tokens=20]]").text}

    async def aplan(state: State) -> State:
        return {"plan": (await llm.ainvoke(f"Plan three paragraphs on {state['topic']}")).text}

    async def awrite(state: State) -> State:
        return {"text": (await llm.ainvoke(f"Write it. Plan: {state['plan']} [[tokens=20]]")).text}

    async def apolish(state: State) -> State:
        return {"text": (await llm.ainvoke(f"Polish: {state['text']} [[tokens=20]]")).text}

    graph = StateGraph(State)
    graph.add_node("plan", aplan if is_async else plan)
    graph.add_node("write", awrite if is_async else write)
    graph.add_node("polish", apolish if is_async else polish)
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "write")
    graph.add_edge("write", "polish")
    return graph.compile()
