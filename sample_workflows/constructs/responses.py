"""The Responses API: a chat model that talks to ``/v1/responses`` instead of ``/v1/chat/completions``.

The answer has another shape and another stream; Maestro reads its cost there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"question": "When is slack water? [[tokens=10]]"}
CALLS = {"ask": 1, "shorten": 1}


class State(TypedDict, total=False):
    question: str
    answer: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model(use_responses_api=True)
    ask = ChatPromptTemplate.from_template("{question}") | llm
    shorten = ChatPromptTemplate.from_template("Shorten {answer} [[tokens=5]]") | llm

    graph = StateGraph(State)
    graph.add_node("ask", ask | (lambda message: {"answer": message.text}))
    graph.add_node("shorten", shorten | (lambda message: {"answer": message.text}))
    graph.add_edge(START, "ask")
    graph.add_edge("ask", "shorten")
    return graph.compile()
