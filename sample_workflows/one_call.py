"""The smallest program: one node, one call. What a call costs more under Maestro is measured on it (`maestro bench overhead`).

export OPENAI_BASE_URL=http://localhost:8000/v1
python -m sample_workflows.one_call "Is the shop open on Sunday?"
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from maestro_langgraph import maestro


class State(TypedDict, total=False):
    """Question and answer."""

    question: str
    answer: str


def graph(
    model: str | None = None, base_url: str | None = None, max_tokens: int = 200, *, synchronous: bool = False
) -> StateGraph[State]:
    """The plain LangGraph app, without Maestro. ``synchronous``: its node holds a thread while it waits."""
    llm = ChatOpenAI(
        model=model or os.environ.get("MAESTRO_SAMPLE_MODEL", "gpt-4o-mini"),
        base_url=base_url or os.environ.get("OPENAI_BASE_URL"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),  # type: ignore[arg-type]
        max_retries=0,
        max_completion_tokens=max_tokens,
    )

    async def ask(state: State) -> State:
        return {"answer": (await llm.ainvoke(state["question"])).text}

    def ask_sync(state: State) -> State:
        return {"answer": llm.invoke(state["question"]).text}

    builder = StateGraph(State)
    builder.add_node("ask", ask_sync if synchronous else ask)
    builder.add_edge(START, "ask")
    builder.add_edge("ask", END)
    return builder


@maestro(agent="one")
def build(model: str | None = None, base_url: str | None = None) -> Any:
    """Build the app as its users run it."""
    return graph(model, base_url).compile(name="one_call")


if __name__ == "__main__":
    print(asyncio.run(build().ainvoke({"question": " ".join(sys.argv[1:]) or "Is the shop open on Sunday?"}))["answer"])
