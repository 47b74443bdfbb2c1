"""`langgraph-supervisor`: one agent hands the conversation to others by handoff tools, and gets it back.

A handoff shows as an error of three nested runs (ParentCommand) and is none. Maestro sees ``supervisor:agent`` three times, and
each expert below its own name. Needs langgraph-supervisor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from langgraph_supervisor import create_supervisor

INPUT = {
    "messages": [
        HumanMessage(
            "How many people live in Bremen, times two? [[tool=transfer_to_research]] [[tool=look_up]] "
            '[[tool=transfer_to_math]] [[tool=multiply {"a": 577000, "b": 2}]]',
            id="ask",
        )
    ]
}
CALLS = {"supervisor:agent": 3, "research:agent": 2, "math:agent": 2}


def look_up(question: str) -> str:
    """Look a fact up."""
    return "577,000"


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it points to langchain's create_agent
        research = create_react_agent(llm, [look_up], name="research", prompt="Find facts.")
        math = create_react_agent(llm, [multiply], name="math", prompt="Do sums.")
        return create_supervisor([research, math], model=llm, prompt="Lead the experts.").compile()
