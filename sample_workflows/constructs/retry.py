"""`with_retry`: the reader refuses the first answer, and the model is asked again. Two calls of ``count``.

To Maestro an attempt is a stage like any other, and the node's second visit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"question": "How many bridges? [[say=seven]]"}
CALLS = {"count": 2}


class State(TypedDict, total=False):
    question: str
    answer: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    def careful() -> Runnable[str, str]:
        attempts = itertools.count(1)

        def read(message: BaseMessage) -> str:
            if next(attempts) == 1:
                raise ValueError("not sure that I read this right")
            return message.text

        return (llm | read).with_retry(
            retry_if_exception_type=(ValueError,), wait_exponential_jitter=False, stop_after_attempt=3
        )

    def count(state: State) -> State:
        return {"answer": careful().invoke(state["question"])}

    async def acount(state: State) -> State:
        return {"answer": await careful().ainvoke(state["question"])}

    graph = StateGraph(State)
    graph.add_node("count", acount if is_async else count)
    graph.add_edge(START, "count")
    return graph.compile()
