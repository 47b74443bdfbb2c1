"""A graph that a node's own code invokes. The drawn graph does not show it; the node path does: ``review:check``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"text": "The harbour opens at nine. [[tokens=10]]"}
CALLS = {"review:check": 1, "publish": 1}


class State(TypedDict, total=False):
    text: str
    remarks: str
    post: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    check = ChatPromptTemplate.from_template("Check the facts: {text}") | llm
    publish = ChatPromptTemplate.from_template("Publish, minding {remarks} [[tokens=15]]") | llm

    inner = StateGraph(State)
    inner.add_node("check", check | (lambda message: {"remarks": message.text}))
    inner.add_edge(START, "check")
    checker = inner.compile()

    def review(state: State) -> State:
        return {"remarks": checker.invoke({"text": state["text"]})["remarks"]}

    async def areview(state: State) -> State:
        return {"remarks": (await checker.ainvoke({"text": state["text"]}))["remarks"]}

    graph = StateGraph(State)
    graph.add_node("review", areview if is_async else review)
    graph.add_node("publish", publish | (lambda message: {"post": message.text}))
    graph.add_edge(START, "review")
    graph.add_edge("review", "publish")
    return graph.compile()
