"""A model that is made inside the node, per call, where nobody outside can get hold of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"question": "Which harbour is oldest? [[tokens=10]]", "creativity": 0.5}
CALLS = {"ask": 1}


class State(TypedDict, total=False):
    question: str
    creativity: float
    answer: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    def ask(state: State) -> State:
        return {"answer": model(temperature=state["creativity"]).invoke(state["question"]).text}

    async def aask(state: State) -> State:
        return {"answer": (await model(temperature=state["creativity"]).ainvoke(state["question"])).text}

    graph = StateGraph(State)
    graph.add_node("ask", aask if is_async else ask)
    graph.add_edge(START, "ask")
    return graph.compile()
