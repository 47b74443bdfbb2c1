"""Calls side by side within one node: `RunnableParallel`, the pipeline's own fan-out. The graph shows one node.

Maestro sees two calls of ``weigh`` at once, and, as all of one node, one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableParallel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"plan": "a bridge to the island"}
CALLS = {"weigh": 2, "decide": 1}


class State(TypedDict, total=False):
    plan: str
    pro: str
    con: str
    decision: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    text = llm | (lambda message: message.text)
    pro = ChatPromptTemplate.from_template("For {plan}: [[tokens=8]]") | text
    con = ChatPromptTemplate.from_template("Against {plan}: [[tokens=8]]") | text
    decide = ChatPromptTemplate.from_template("Decide: {pro} or {con} [[tokens=6]]") | text

    graph = StateGraph(State)
    graph.add_node("weigh", RunnableParallel(pro=pro, con=con))
    graph.add_node("decide", decide | (lambda decision: {"decision": decision}))
    graph.add_edge(START, "weigh")
    graph.add_edge("weigh", "decide")
    return graph.compile()
