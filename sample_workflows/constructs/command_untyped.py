"""A node that says by `Command` where to go, without saying in its signature which nodes these may be.

The drawn graph has no edge from ``ask`` to ``answer``: only runs tell Maestro that one follows the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langgraph.types import Command

INPUT = {"question": "Is it open on Sunday? [[tokens=6]]"}
CALLS = {"ask": 1, "answer": 1}


class State(TypedDict, total=False):
    question: str
    facts: str
    answer: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    def ask(state: State) -> Command:
        facts = llm.invoke(f"Which facts are needed? {state['question']}").text
        return Command(goto="answer", update={"facts": facts})

    async def aask(state: State) -> Command:
        facts = (await llm.ainvoke(f"Which facts are needed? {state['question']}")).text
        return Command(goto="answer", update={"facts": facts})

    def answer(state: State) -> State:
        return {"answer": llm.invoke(f"Answer with {state['facts']} [[tokens=15]]").text}

    async def aanswer(state: State) -> State:
        return {"answer": (await llm.ainvoke(f"Answer with {state['facts']} [[tokens=15]]")).text}

    graph = StateGraph(State)
    graph.add_node("ask", aask if is_async else ask)
    graph.add_node("answer", aanswer if is_async else answer)
    graph.add_edge(START, "ask")
    return graph.compile()
