"""`deepagents`: an agent with a plan, files, and a sub-agent that it starts by the tool ``task``.

The sub-agent runs as a child of the tool's run: the drawn graph does not have it. Maestro sees its calls as
``researcher:tools:model``, of the same run. Needs deepagents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepagents import create_deep_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

INPUT = {
    "messages": [
        HumanMessage(
            'Why is the sea salty? [[tool=task {"description": "Find out. [[tool=look_up]]", "subagent_type": "researcher"}]]',
            id="ask",
        )
    ]
}
CALLS = {("model", "lead:model"): 2, ("tools:model", "lead:researcher:tools:model"): 2}


def look_up(question: str) -> str:
    """Look a fact up."""
    return "Rivers carry salt."


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False, middleware: Sequence[Any] = ()):
    researcher = {
        "name": "researcher",
        "description": "Looks facts up.",
        "system_prompt": "You look facts up.",
        "tools": [look_up],
        "middleware": middleware,
    }
    return create_deep_agent(
        model(), subagents=[researcher], system_prompt="You lead.", middleware=middleware, name="lead"
    )
