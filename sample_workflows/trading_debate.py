"""Trading desk: twelve roles. Four analysts beside each other, a debate, a trader, three voices on risk, one decision.

    market --+
    news ----+          +--> bull --+ (two rounds)
    mood ----+--> debate             +--> manager --> trader --> daring ---+
    books ---+          +--> bear --+                           careful --+--> decide --> end
                                                                neutral --+

What it shows. Roles of one workflow have lengths of their own: an analyst writes pages, a voice on risk a paragraph. They are predicted
role by role, and the branch that everybody waits for is served first.

In ``maestro top``: twelve roles of one run; sort by role and compare predicted and actual tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from maestro_langgraph import maestro

INPUTS = [{"asset": "a maker of heat pumps"}, {"asset": "a regional bank"}, {"asset": "a shipping line"}]
ANALYSTS = {
    "market": "Describe the price and volume of the last months, and what they suggest.",
    "news": "List the events that matter, with their likely effect.",
    "mood": "Say how private investors feel, and how reliable that is.",
    "books": "Judge balance sheet, cash flow and valuation.",
}
RISK = {
    "daring": "Argue for more risk, in three sentences.",
    "careful": "Argue for less risk, in three sentences.",
    "neutral": "Weigh both, in three sentences.",
}
ROUNDS = 2


class State(TypedDict, total=False):
    asset: str
    notes: Annotated[list[str], operator.add]
    debate: Annotated[list[str], operator.add]
    plan: str
    risks: Annotated[list[str], operator.add]
    decision: str


@maestro(agent="desk", tenant="trading", service_class="batch", deadline_s=240)
def build(model: Callable[..., BaseChatModel] = ChatOpenAI) -> Any:
    """``model`` makes a chat model; its keyword arguments are those of `ChatOpenAI`."""
    long, short = model(max_tokens=350), model(max_tokens=120)

    def analyst(name: str) -> Any:
        async def node(state: State) -> State:
            return {"notes": [(await long.ainvoke(f"You cover {state['asset']}. {ANALYSTS[name]}")).text]}

        return node

    def side(name: str) -> Any:
        async def node(state: State) -> State:
            said = "\n".join([*state["notes"], *state.get("debate", [])])
            asked = f"You are the {name}. Make your case for {state['asset']}, answer the last argument.\n{said}"
            return {"debate": [f"{name}: {(await long.ainvoke(asked)).text}"]}

        return node

    async def manager(state: State) -> State:
        said = "\n".join(state["debate"])
        return {"plan": (await long.ainvoke(f"Who is right about {state['asset']}? Draw up a plan.\n{said}")).text}

    async def trader(state: State) -> State:
        return {"plan": (await short.ainvoke(f"Turn it into an order, with size and limit:\n{state['plan']}")).text}

    def voice(name: str) -> Any:
        async def node(state: State) -> State:
            return {"risks": [(await short.ainvoke(f"{RISK[name]}\n{state['plan']}")).text]}

        return node

    async def decide(state: State) -> State:
        said = "\n".join(state["risks"])
        return {"decision": (await short.ainvoke(f"BUY, HOLD or SELL? One line.\n{state['plan']}\n{said}")).text}

    def another_round(state: State) -> Literal["bull", "manager"]:
        return "bull" if len(state["debate"]) < 2 * ROUNDS else "manager"

    graph = StateGraph(State)
    for name in ANALYSTS:
        graph.add_node(name, analyst(name))
        graph.add_edge(START, name)
    graph.add_node("bull", side("bull"))
    graph.add_node("bear", side("bear"))
    graph.add_edge(list(ANALYSTS), "bull")
    graph.add_edge("bull", "bear")
    graph.add_conditional_edges("bear", another_round)
    graph.add_node("manager", manager)
    graph.add_node("trader", trader)
    graph.add_edge("manager", "trader")
    for name in RISK:
        graph.add_node(name, voice(name))
        graph.add_edge("trader", name)
    graph.add_node("decide", decide)
    graph.add_edge(list(RISK), "decide")
    graph.add_edge("decide", END)
    return graph.compile(name="trading_debate")
