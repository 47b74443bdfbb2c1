"""A graph as a node of another. Maestro sees the calls inside by their path: ``research:search`` and ``research:read``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"topic": "salt marshes"}
CALLS = {"research:search": 1, "research:read": 1, "write": 1}


class State(TypedDict, total=False):
    topic: str
    sources: str
    notes: str
    text: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    search = ChatPromptTemplate.from_template("Sources on {topic} [[tokens=10]]") | llm
    read = ChatPromptTemplate.from_template("Notes from {sources} [[tokens=14]]") | llm
    write = ChatPromptTemplate.from_template("Write from {notes} [[tokens=20]]") | llm

    research = StateGraph(State)
    research.add_node("search", search | (lambda message: {"sources": message.text}))
    research.add_node("read", read | (lambda message: {"notes": message.text}))
    research.add_edge(START, "search")
    research.add_edge("search", "read")

    graph = StateGraph(State)
    graph.add_node("research", research.compile())
    graph.add_node("write", write | (lambda message: {"text": message.text}))
    graph.add_edge(START, "research")
    graph.add_edge("research", "write")
    return graph.compile()
