"""`langgraph-swarm`: agents hand over to each other, and the last one answers the user.

Maestro sees ``sales:model`` and ``repair:model``, not who may hand over to whom: that is in the tools, and the runs show it.
Needs langgraph-swarm and langchain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langgraph_swarm import create_handoff_tool, create_swarm

INPUT = {"messages": [HumanMessage("My bike squeaks. [[tool=transfer_to_repair]] [[tool=advise]]", id="ask")]}
CALLS = {"sales:model": 1, "repair:model": 2}


def advise(fault: str) -> str:
    """Look a repair up."""
    return "Oil the chain."


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False, middleware: Sequence[Any] = ()):
    llm = model()
    to_sales, to_repair = create_handoff_tool(agent_name="sales"), create_handoff_tool(agent_name="repair")
    sales = create_agent(llm, [to_repair], system_prompt="You sell bikes.", middleware=middleware, name="sales")
    repair = create_agent(llm, [to_sales, advise], system_prompt="You fix bikes.", middleware=middleware, name="repair")
    return create_swarm([sales, repair], default_active_agent="sales").compile()
