"""An agent inside a tool: the tool's own code runs another graph.

Seen from outside it is a child of the *tool's* run, not of a node's. Maestro keeps it in the same run: ``tools:answer``.
"""

from __future__ import annotations

from collections.abc import Callable

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

INPUT = {"messages": [HumanMessage('Ask the expert. [[tool=expert {"question": "Why? [[tokens=9]]"}]]', id="ask")]}
CALLS = {"agent": 2, "tools:answer": 1}


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    expert_graph = StateGraph(MessagesState)
    expert_graph.add_node("answer", (lambda state: state["messages"]) | llm | (lambda message: {"messages": [message]}))
    expert_graph.add_edge(START, "answer")
    expert = expert_graph.compile()

    def ask(question: str) -> str:
        return expert.invoke({"messages": [HumanMessage(question)]})["messages"][-1].text

    async def aask(question: str) -> str:
        return (await expert.ainvoke({"messages": [HumanMessage(question)]}))["messages"][-1].text

    tool = StructuredTool.from_function(ask, aask, name="expert", description="Ask the expert.")
    agent = llm.bind_tools([tool])

    graph = StateGraph(MessagesState)
    graph.add_node("agent", (lambda state: state["messages"]) | agent | (lambda message: {"messages": [message]}))
    graph.add_node("tools", ToolNode([tool]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    return graph.compile()
