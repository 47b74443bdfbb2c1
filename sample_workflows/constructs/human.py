"""A graph that stops for a human: `interrupt`, and later `Command(resume=...)`.

What stands before `interrupt` in its node runs again on resume, so ``propose`` is called twice. Maestro counts the pause as
nobody's waiting, and knows the second run for the same thread's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

INPUT = {"task": "a refund of 20 euros [[tokens=9]]"}
RESUME = Command(resume="yes")
CALLS = {"propose": 2, "carry_out": 1}


class State(TypedDict, total=False):
    task: str
    proposal: str
    answer: str
    done: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    carry_out = ChatPromptTemplate.from_template("Carry out {proposal} [[tokens=9]]") | llm

    def propose(state: State) -> State:
        proposal = llm.invoke(f"Propose {state['task']}").text
        return {"proposal": proposal, "answer": interrupt(proposal)}

    async def apropose(state: State) -> State:
        proposal = (await llm.ainvoke(f"Propose {state['task']}")).text
        return {"proposal": proposal, "answer": interrupt(proposal)}

    graph = StateGraph(State)
    graph.add_node("propose", apropose if is_async else propose)
    graph.add_node("carry_out", carry_out | (lambda message: {"done": message.text}))
    graph.add_edge(START, "propose")
    graph.add_edge("propose", "carry_out")
    return graph.compile(checkpointer=InMemorySaver())
