"""No LangChain model at all: the nodes call the OpenAI SDK themselves, once plain and once streaming.

No callback tells of such a call; LangChain's context in the node does, and Maestro knows the node as ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypedDict

import openai
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"question": "How deep is the Weser? [[tokens=10]]"}
CALLS = {"ask": 1, "explain": 1}


class State(TypedDict, total=False):
    question: str
    answer: str
    explanation: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    name = os.environ.get("MAESTRO_SAMPLE_MODEL", "gpt-4o-mini")

    def messages(text: str) -> Any:
        return [{"role": "user", "content": text}]

    def ask(state: State) -> State:
        with openai.OpenAI() as client:
            done = client.chat.completions.create(model=name, messages=messages(state["question"]))
        return {"answer": done.choices[0].message.content or ""}

    async def aask(state: State) -> State:
        async with openai.AsyncOpenAI() as client:
            done = await client.chat.completions.create(model=name, messages=messages(state["question"]))
        return {"answer": done.choices[0].message.content or ""}

    def explain(state: State) -> State:
        text = messages(f"Explain {state['answer']} [[tokens=15]]")
        with openai.OpenAI() as client:
            chunks = client.chat.completions.create(model=name, messages=text, stream=True)
            return {"explanation": "".join(c.choices[0].delta.content or "" for c in chunks)}

    async def aexplain(state: State) -> State:
        text = messages(f"Explain {state['answer']} [[tokens=15]]")
        async with openai.AsyncOpenAI() as client:
            chunks = await client.chat.completions.create(model=name, messages=text, stream=True)
            return {"explanation": "".join([c.choices[0].delta.content or "" async for c in chunks])}

    graph = StateGraph(State)
    graph.add_node("ask", aask if is_async else ask)
    graph.add_node("explain", aexplain if is_async else explain)
    graph.add_edge(START, "ask")
    graph.add_edge("ask", "explain")
    return graph.compile()
