"""A loop: write, have it judged, write again until it is approved. Here the second draft is.

    write -> judge -> write -> judge -> end

The nodes are LangChain pipelines, which run synchronously and asynchronously alike. Maestro sees the same two nodes come
again, counts the visits, and learns how many a run usually makes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

INPUT = {"topic": "dunes [[tokens=12]]", "drafts": 0, "wish": "REVISE"}
CALLS = {"write": 2, "judge": 2}


class State(TypedDict, total=False):
    topic: str
    drafts: Annotated[int, operator.add]
    draft: str
    #: What the emulated judge is to say.
    wish: str
    verdict: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    write = ChatPromptTemplate.from_template("Draft {drafts}: one paragraph on {topic}") | llm
    judge = ChatPromptTemplate.from_template("APPROVED or REVISE? {draft} [[say={wish}]]") | llm

    def until_approved(state: State) -> str:
        return END if state["verdict"] == "APPROVED" or state["drafts"] > 3 else "write"

    graph = StateGraph(State)
    graph.add_node("write", write | (lambda message: {"draft": message.text, "drafts": 1}))
    graph.add_node("judge", judge | (lambda message: {"verdict": message.text, "wish": "APPROVED"}))
    graph.add_edge(START, "write")
    graph.add_edge("write", "judge")
    graph.add_conditional_edges("judge", until_approved, ["write", END])
    return graph.compile()
