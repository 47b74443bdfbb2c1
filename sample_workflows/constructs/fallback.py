"""`with_fallbacks`: the engine refuses the first model's request, and the second one's is made instead.

The refusal is real: the first asks for more tokens than any context has. Maestro sees two calls of ``ask``, one of them
failed, and does not take the caller's mistake for a sick engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"question": "Which boat leaves first? [[tokens=10]]"}
CALLS = {"ask": 2}


class State(TypedDict, total=False):
    question: str
    answer: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model(max_completion_tokens=10**9).with_fallbacks([model()])
    ask = ChatPromptTemplate.from_template("{question}") | llm

    graph = StateGraph(State)
    graph.add_node("ask", ask | (lambda message: {"answer": message.text}))
    graph.add_edge(START, "ask")
    return graph.compile()
