"""A node with a `RetryPolicy`: it fails after its call, and LangGraph runs the whole node again. Two calls of ``book``.

Maestro sees the second as the same step's second attempt: made again, not progress.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langgraph.runtime import get_runtime
from langgraph.types import RetryPolicy

INPUT = {"wish": "A table for two. [[tokens=8]]"}
CALLS = {"book": 2}


class State(TypedDict, total=False):
    wish: str
    booking: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    def confirm() -> None:
        execution = get_runtime().execution_info
        if execution is not None and execution.node_attempt == 1:
            raise ConnectionError("the restaurant did not pick up")

    def book(state: State) -> State:
        booking = llm.invoke(state["wish"]).text
        confirm()
        return {"booking": booking}

    async def abook(state: State) -> State:
        booking = (await llm.ainvoke(state["wish"])).text
        confirm()
        return {"booking": booking}

    policy = RetryPolicy(initial_interval=0.01, jitter=False, retry_on=ConnectionError)
    graph = StateGraph(State)
    graph.add_node("book", abook if is_async else book, retry_policy=policy)
    graph.add_edge(START, "book")
    return graph.compile()
