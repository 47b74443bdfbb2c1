"""A call made while the answer of another still streams, in the same node.

With one slot the second would wait for the first and the first for the second. Maestro knows that the caller reads a stream,
and lets the nested call in from headroom that is kept for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

INPUT = {"text": "The tide turns at six. [[tokens=40]]"}
CALLS = {"translate": 2}


class State(TypedDict, total=False):
    text: str
    translated: str
    note: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    def translate(state: State) -> State:
        text, note = "", ""
        for chunk in llm.stream(f"Translate: {state['text']}"):
            text += chunk.text
            if text and not note:
                note = llm.invoke(f"Explain the first word of {state['text']}").text
        return {"translated": text, "note": note}

    async def atranslate(state: State) -> State:
        text, note = "", ""
        async for chunk in llm.astream(f"Translate: {state['text']}"):
            text += chunk.text
            if text and not note:
                note = (await llm.ainvoke(f"Explain the first word of {state['text']}")).text
        return {"translated": text, "note": note}

    graph = StateGraph(State)
    graph.add_node("translate", atranslate if is_async else translate)
    graph.add_edge(START, "translate")
    return graph.compile()
