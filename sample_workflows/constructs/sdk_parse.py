"""The SDK's own structured output: `client.chat.completions.parse` with a pydantic model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypedDict

import openai
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import BaseModel

INPUT = {"message": "Two tickets for Friday, please."}
CALLS = {"read": 1}


class Order(BaseModel):
    """What the customer wants."""

    tickets: int
    day: str


class State(TypedDict, total=False):
    message: str
    order: dict[str, Any]


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    name = os.environ.get("MAESTRO_SAMPLE_MODEL", "gpt-4o-mini")

    def messages(state: State) -> Any:
        return [{"role": "user", "content": state["message"]}]

    def read(state: State) -> State:
        with openai.OpenAI() as client:
            done = client.chat.completions.parse(model=name, messages=messages(state), response_format=Order)
        order = done.choices[0].message.parsed
        assert order is not None
        return {"order": order.model_dump()}

    async def aread(state: State) -> State:
        async with openai.AsyncOpenAI() as client:
            done = await client.chat.completions.parse(model=name, messages=messages(state), response_format=Order)
        order = done.choices[0].message.parsed
        assert order is not None
        return {"order": order.model_dump()}

    graph = StateGraph(State)
    graph.add_node("read", aread if is_async else read)
    graph.add_edge(START, "read")
    return graph.compile()
