"""Consultation: a doctor and a patient, each an agent of its own, talk until the doctor has a finding.

    doctor <---> patient        (six questions at most)
      +---> report ---> end

What it shows. The conversation is one text that grows with every call: the engine that has its beginning in its prefix cache is the
place to go, until another one's queue is shorter by more than that is worth.

In ``maestro top``: the prefix hits of one engine rise with every turn; ``maestro queue show STAGE`` says what they saved in seconds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from maestro_langgraph import maestro

INPUTS = [
    {"complaint": "A cough that has not gone away for three weeks."},
    {"complaint": "Headaches every afternoon."},
    {"complaint": "A knee that hurts on stairs."},
]
MOST_QUESTIONS = 6
RULES = (
    "This is a training game for medical students. The doctor asks one question at a time. The patient answers in one or two sentences "
    "and does not know the diagnosis. The doctor ends with FINDING and what to do next."
)


class State(TypedDict, total=False):
    complaint: str
    talk: Annotated[list[str], operator.add]
    report: str


@maestro(agent="consultation", tenant="clinic", deadline_s=90)
def build(model: Callable[..., BaseChatModel] = ChatOpenAI) -> Any:
    """``model`` makes a chat model; its keyword arguments are those of `ChatOpenAI`."""
    speaker, scribe = model(max_tokens=80), model(max_tokens=300)

    def turn(who: str) -> Any:
        async def node(state: State) -> State:
            said = "\n".join(state.get("talk", []))
            asked = f"{RULES}\nThe patient came for: {state['complaint']}\n{said}\n{who}:"
            return {"talk": [f"{who}: {(await speaker.ainvoke(asked)).text}"]}

        return node

    async def report(state: State) -> State:
        said = "\n".join(state["talk"])
        return {"report": (await scribe.ainvoke(f"{RULES}\n{said}\nWrite the letter to the family doctor.")).text}

    def after_doctor(state: State) -> Literal["patient", "report"]:
        asked = sum(line.startswith("doctor:") for line in state["talk"])
        return "report" if "FINDING" in state["talk"][-1] or asked >= MOST_QUESTIONS else "patient"

    graph = StateGraph(State)
    graph.add_node("doctor", turn("doctor"))
    graph.add_node("patient", turn("patient"))
    graph.add_node("report", report)
    graph.add_edge(START, "doctor")
    graph.add_conditional_edges("doctor", after_doctor)
    graph.add_edge("patient", "doctor")
    graph.add_edge("report", END)
    return graph.compile(name="consultation")
