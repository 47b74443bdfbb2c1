"""Refund agent: langchain's `create_agent` with two tools, and a person who approves before money moves.

    model ---> look_up | refund (a person says yes) ---> model ---> end

What it shows. The agent's own loop, its tools between the calls, and an interrupt: while a person thinks, nothing is reserved, and the
time does not count against the run's deadline.

In ``maestro top``: nothing runs while it is paused; the resumed run is the same run, its deadline later by the pause.

Needs ``pip install langchain`` (it is in the extra ``matrix``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from maestro_langgraph import maestro

# What is in [[...]] leads an emulated engine, which cannot read; a real model reads past it.
INPUTS = [
    {
        "messages": [
            ("user", f'Please refund order {n}. [[tool=look_up {{"order": {n}}}]] [[tool=refund {{"order": {n}}}]]')
        ]
    }
    for n in (17, 42)
]
RESUME = Command(resume={"decisions": [{"type": "approve"}]})
"""What the person says."""


@tool
def look_up(order: int) -> str:
    """Look an order up."""
    return f"Order {order}: one lamp, 49 EUR, delivered broken."


@tool
def refund(order: int) -> str:
    """Give the money of an order back."""
    return f"49 EUR of order {order} are on their way."


@maestro(agent="refund", tenant="support", deadline_s=30)
def build(model: Callable[..., BaseChatModel] = ChatOpenAI) -> Any:
    """``model`` makes a chat model; its keyword arguments are those of `ChatOpenAI`."""
    from langchain.agents import create_agent
    from langchain.agents.middleware import HumanInTheLoopMiddleware

    return create_agent(
        model(max_tokens=200),
        tools=[look_up, refund],
        system_prompt="You work for a shop. Look an order up before you refund it.",
        middleware=[HumanInTheLoopMiddleware(interrupt_on={"refund": True})],
        checkpointer=InMemorySaver(),
        name="refund_agent",
    )
