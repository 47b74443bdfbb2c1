"""Code review: one agent writes, another reviews, until it approves or three rounds are over.

    write ---> review ---APPROVED---> end
      ^          |
      +--change--+

What it shows. Nobody can say beforehand how many calls a run will make. Maestro learns it by visit: what still follows a first review
is more than what follows a third, so runs near their end are let through.

In ``maestro top``: the predicted rest of ``review:write`` falls from visit to visit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from maestro_langgraph import maestro

INPUTS = [
    {"task": "A Python function that merges overlapping intervals."},
    {"task": "A shell script that keeps the last seven backups of a folder."},
    {"task": "A SQL query for customers whose last order is older than a year."},
]
MOST_ROUNDS = 3


class State(TypedDict, total=False):
    task: str
    code: str
    remarks: str
    rounds: int


@maestro(agent="review", tenant="engineering", deadline_s=60)
def build(model: Callable[..., BaseChatModel] = ChatOpenAI) -> Any:
    """``model`` makes a chat model; its keyword arguments are those of `ChatOpenAI`."""
    author, reviewer = model(max_tokens=500), model(max_tokens=120)

    async def write(state: State) -> State:
        asked = f"Write it, code only: {state['task']}"
        if state.get("remarks"):
            asked += f"\n\nYou had:\n{state['code']}\n\nThe reviewer says:\n{state['remarks']}"
        return {"code": (await author.ainvoke(asked)).text, "rounds": state.get("rounds", 0) + 1}

    async def review(state: State) -> State:
        asked = (
            f"Task: {state['task']}\n\n{state['code']}\n\nAnswer APPROVED, or what must change, in one sentence each."
        )
        return {"remarks": (await reviewer.ainvoke(asked)).text}

    def content(state: State) -> Literal["write", "__end__"]:
        approved = state["remarks"].lstrip().upper().startswith("APPROVED")
        return END if approved or state["rounds"] >= MOST_ROUNDS else "write"

    graph = StateGraph(State)
    graph.add_node("write", write)
    graph.add_node("review", review)
    graph.add_edge(START, "write")
    graph.add_edge("write", "review")
    graph.add_conditional_edges("review", content)
    return graph.compile(name="code_review")
