"""A conditional edge without a map: the router is a function that returns names, and the graph does not say which.

LangGraph draws an edge to everything from such a router, or to nothing. What really follows Maestro learns from the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"question": "Where is my refund? [[say=billing]]"}
CALLS = {"classify": 1, "billing": 1}


class State(TypedDict, total=False):
    question: str
    kind: str
    answer: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    classify = ChatPromptTemplate.from_template("billing, delivery or other? {question}") | llm

    graph = StateGraph(State)
    graph.add_node("classify", classify | (lambda message: {"kind": message.text}))
    graph.add_edge(START, "classify")
    for desk in ("billing", "delivery", "other"):
        prompt = ChatPromptTemplate.from_template(f"You are the {desk} desk. {{question}} [[tokens=15]]")
        graph.add_node(desk, prompt | llm | (lambda message: {"answer": message.text}))
    graph.add_conditional_edges("classify", lambda s: s["kind"] if s["kind"] in {"billing", "delivery"} else "other")
    return graph.compile()
