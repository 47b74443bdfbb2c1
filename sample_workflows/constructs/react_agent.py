"""`langgraph.prebuilt.create_react_agent`, the older prebuilt agent: the same loop of model and tools.

Maestro sees three calls of ``agent``; this agent's name is its graph's, so the role has it: ``weather:agent``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent

INPUT = {"messages": [HumanMessage('Coat today? [[tool=locate]] [[tool=forecast {"city": "Bremen"}]]', id="ask")]}
CALLS = {("agent", "weather:agent"): 3}


def locate() -> str:
    """Say in which city the user is."""
    return "Bremen"


def forecast(city: str) -> str:
    """Give the weather of a city."""
    return f"{city}: rain, 8 degrees"


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it points to langchain's create_agent
        return create_react_agent(model(), [locate, forecast], prompt="Help with clothes.", name="weather")
