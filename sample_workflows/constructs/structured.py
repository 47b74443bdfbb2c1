"""Structured output both ways: by a forced tool call (``function_calling``) and by a JSON schema (``json_schema``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import BaseModel

INPUT = {"message": "Two tickets for Friday, please."}
CALLS = {"by_function": 1, "by_schema": 1}


class Order(BaseModel):
    """What the customer wants."""

    tickets: int
    day: str


class State(TypedDict, total=False):
    message: str
    first: dict[str, Any]
    second: dict[str, Any]


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    prompt = ChatPromptTemplate.from_template("Read the order: {message}")
    by_function = prompt | llm.with_structured_output(Order, method="function_calling")
    by_schema = prompt | llm.with_structured_output(Order, method="json_schema")

    graph = StateGraph(State)
    graph.add_node("by_function", by_function | (lambda order: {"first": order.model_dump()}))
    graph.add_node("by_schema", by_schema | (lambda order: {"second": order.model_dump()}))
    graph.add_edge(START, "by_function")
    graph.add_edge("by_function", "by_schema")
    return graph.compile()
