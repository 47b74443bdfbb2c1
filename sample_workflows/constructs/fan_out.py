"""Fan-out and join: two look-ups run side by side, and the answer waits for both.

Maestro sees ``orders`` and ``policy`` in the same step, and that both have one call behind them. The one that has slack,
since the other takes longer, may wait.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"question": "May I return order 1234?"}
CALLS = {"orders": 1, "policy": 1, "answer": 1}


class State(TypedDict, total=False):
    question: str
    notes: Annotated[list[str], operator.add]
    answer: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    graph = StateGraph(State)
    for desk in ("orders", "policy"):
        prompt = ChatPromptTemplate.from_template(f"Look {desk} up: {{question}} [[tokens=12]]")
        graph.add_node(desk, prompt | llm | (lambda message: {"notes": [message.text]}))
        graph.add_edge(START, desk)
    answer = ChatPromptTemplate.from_template("{question} Notes: {notes} [[tokens=20]]") | llm
    graph.add_node("answer", answer | (lambda message: {"answer": message.text}))
    graph.add_edge(["orders", "policy"], "answer")
    return graph.compile()
