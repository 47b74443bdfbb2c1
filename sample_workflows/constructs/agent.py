"""`langchain.agents.create_agent` with two tools: think, call a tool, think, call the other, answer.

Maestro sees three calls of ``model``, and the agent's name in the role: ``weather:model``. Needs langchain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

INPUT = {"messages": [HumanMessage('Coat today? [[tool=locate]] [[tool=forecast {"city": "Bremen"}]]', id="ask")]}
CALLS = {("model", "weather:model"): 3}


def locate() -> str:
    """Say in which city the user is."""
    return "Bremen"


def forecast(city: str) -> str:
    """Give the weather of a city."""
    return f"{city}: rain, 8 degrees"


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False, middleware: Sequence[Any] = ()):
    tools = [locate, forecast]
    return create_agent(model(), tools, system_prompt="Help with clothes.", middleware=middleware, name="weather")
