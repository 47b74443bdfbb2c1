"""Map and reduce by `Send`: one node runs many times side by side, each time on its own part, then one joins them.

Maestro sees five calls of ``summarize`` at once, siblings of one step, and one of ``combine`` that waits for the slowest. The
graph itself shows one edge: how wide the fan is, the runs tell.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langgraph.types import Send

INPUT = {"chapters": ["one", "two", "three", "four", "five"]}
CALLS = {"summarize": 5, "combine": 1}


class State(TypedDict, total=False):
    chapters: list[str]
    summaries: Annotated[list[str], operator.add]
    book: str


class Part(TypedDict):
    chapter: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    summarize = ChatPromptTemplate.from_template("Summarize chapter {chapter} [[tokens=10]]") | llm
    combine = ChatPromptTemplate.from_template("Combine {summaries} [[tokens=15]]") | llm

    def each_chapter(state: State) -> list[Send]:
        return [Send("summarize", {"chapter": chapter}) for chapter in state["chapters"]]

    graph = StateGraph(State)
    graph.add_node("summarize", summarize | (lambda message: {"summaries": [message.text]}), input_schema=Part)
    graph.add_node("combine", combine | (lambda message: {"book": message.text}))
    graph.add_conditional_edges(START, each_chapter, ["summarize"])
    graph.add_edge("summarize", "combine")
    return graph.compile()
