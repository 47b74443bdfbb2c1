"""Research report: a supervisor splits a question, as many researchers as it names work beside each other, a writer joins them.

    plan ---Send---> research (one for each part) ---> write ---> edit ---> end

What it shows. The drawn graph has one edge into ``research``: how wide the fan is, only runs tell. Maestro learns it, and gives a
researcher whose siblings are slower anyway time to spare.

In ``maestro top``: role ``research:research`` waits in bursts, ``research:write`` alone; the burst lets short interactive calls of
other apps pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from maestro_langgraph import maestro

INPUTS = [
    {"question": "What would it take to heat a town of 20,000 people without gas?"},
    {"question": "How do cities keep trams on time?"},
    {"question": "Why do some open source projects outlive their founders?"},
]
MOST_PARTS = 5


class State(TypedDict, total=False):
    question: str
    parts: list[str]
    findings: Annotated[list[str], operator.add]
    report: str


class Part(TypedDict):
    question: str
    part: str


@maestro(agent="research", tenant="research", service_class="batch", deadline_s=300)
def build(model: Callable[..., BaseChatModel] = ChatOpenAI) -> Any:
    """``model`` makes a chat model; its keyword arguments are those of `ChatOpenAI`."""
    planner, researcher, writer = model(max_tokens=120), model(max_tokens=400), model(max_tokens=900)

    async def plan(state: State) -> State:
        answer = await planner.ainvoke(f"Split this question into parts to look into, one a line: {state['question']}")
        lines = [line.strip(" -*0123456789.") for line in answer.text.splitlines()]
        return {"parts": [line for line in lines if line][:MOST_PARTS] or [state["question"]]}

    def each_part(state: State) -> list[Send]:
        return [Send("research", {"question": state["question"], "part": part}) for part in state["parts"]]

    async def research(state: Part) -> State:
        asked = f"For a report on {state['question']!r}: what is known about {state['part']!r}? Name what is uncertain."
        return {"findings": [(await researcher.ainvoke(asked)).text]}

    async def write(state: State) -> State:
        notes = "\n\n".join(state["findings"])
        return {"report": (await writer.ainvoke(f"Write the report on {state['question']!r} from:\n{notes}")).text}

    async def edit(state: State) -> State:
        return {"report": (await writer.ainvoke(f"Shorten by a third, lose no fact:\n{state['report']}")).text}

    graph = StateGraph(State)
    graph.add_node("plan", plan)
    graph.add_node("research", research, input_schema=Part)
    graph.add_node("write", write)
    graph.add_node("edit", edit)
    graph.add_edge(START, "plan")
    graph.add_conditional_edges("plan", each_part, ["research"])
    graph.add_edge("research", "write")
    graph.add_edge("write", "edit")
    graph.add_edge("edit", END)
    return graph.compile(name="research_report")
