"""`llm.batch` inside a node: four calls of one node at once, in LangChain's own threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"words": ["ebb", "flow", "spring", "neap"]}
CALLS = {"define": 4}


class State(TypedDict, total=False):
    words: list[str]
    definitions: list[str]


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    def define(state: State) -> State:
        answers = llm.batch([f"Define {word} [[tokens=8]]" for word in state["words"]])
        return {"definitions": [answer.text for answer in answers]}

    async def adefine(state: State) -> State:
        answers = await llm.abatch([f"Define {word} [[tokens=8]]" for word in state["words"]])
        return {"definitions": [answer.text for answer in answers]}

    graph = StateGraph(State)
    graph.add_node("define", adefine if is_async else define)
    graph.add_edge(START, "define")
    return graph.compile()
