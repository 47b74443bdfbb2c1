"""A tool round trip by hand: `bind_tools`, `ToolNode`, `tools_condition`. The tool itself calls no model.

Maestro sees two calls of ``agent``: before the tool's result and after it. Whether the first will call a tool is what its
predictor guesses first.
"""

from __future__ import annotations

from collections.abc import Callable

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

INPUT = {"messages": [HumanMessage('What is 2 + 3? [[tool=add {"a": 2, "b": 3}]]', id="ask")]}
CALLS = {"agent": 2}


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model().bind_tools([add])

    def agent(state: MessagesState):
        return {"messages": [llm.invoke(state["messages"])]}

    async def aagent(state: MessagesState):
        return {"messages": [await llm.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("agent", aagent if is_async else agent)
    graph.add_node("tools", ToolNode([add]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    return graph.compile()
