"""Hierarchical teams: a lead hands the work to two teams, each a graph with a lead of its own.

Three levels deep, the path still says who calls: ``writing:editing:edit`` is the editor of the writing team. Teams that
have the same inner names stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

INPUT = {"task": "a leaflet on bees", "done": ""}
CALLS = {
    "lead": 3,
    "research:lead": 1,
    "research:worker": 1,
    "writing:lead": 1,
    "writing:worker": 1,
    "writing:editing:edit": 1,
}


class State(TypedDict, total=False):
    task: str
    #: Which teams have delivered.
    done: str
    next: str
    text: str


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()

    def team(name: str, *more: tuple[str, StateGraph[State]]) -> StateGraph[State]:
        lead = ChatPromptTemplate.from_template(f"{name}: split {{task}} [[tokens=6]]") | llm
        worker = ChatPromptTemplate.from_template(f"{name}: do {{task}} [[tokens=12]]") | llm
        graph = StateGraph(State)
        graph.add_node("lead", lead | (lambda message: {"text": message.text}))
        graph.add_node("worker", worker | (lambda message: {"text": message.text, "done": name}))
        graph.add_edge(START, "lead")
        graph.add_edge("lead", "worker")
        for inner_name, inner in more:
            graph.add_node(inner_name, inner.compile())
            graph.add_edge("worker", inner_name)
        return graph

    edit = ChatPromptTemplate.from_template("Edit {text} [[tokens=12]]") | llm
    editing = StateGraph(State)
    editing.add_node("edit", edit | (lambda message: {"text": message.text}))
    editing.add_edge(START, "edit")

    # The emulated lead says which team comes next after the one that has delivered.
    after = {"": "research", "research": "writing", "writing": "end"}
    lead = ChatPromptTemplate.from_template("Who is next for {task}? [[say={wish}]]") | llm
    graph = StateGraph(State)
    graph.add_node(
        "lead",
        (lambda state: {**state, "wish": after[state["done"]]}) | lead | (lambda message: {"next": message.text}),
    )
    graph.add_node("research", team("research").compile())
    graph.add_node("writing", team("writing", ("editing", editing)).compile())
    graph.add_edge(START, "lead")
    branches = {"research": "research", "writing": "writing", "end": END}
    graph.add_conditional_edges("lead", lambda state: state["next"], branches)
    graph.add_edge("research", "lead")
    graph.add_edge("writing", "lead")
    return graph.compile()
