"""The functional API: an `@entrypoint` that starts `@task`s, two of them side by side.

There is no graph to draw. Maestro sees ``essay:outline``, ``essay:section`` and ``essay:title``, since LangGraph gives tasks the same
kind of path as nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langgraph.func import entrypoint, task

INPUT = "lighthouses [[tokens=8]]"
CALLS = {"essay:outline": 1, "essay:section": 2, "essay:title": 1}


def build(model: Callable[..., BaseChatModel] = ChatOpenAI, *, is_async: bool = False):
    llm = model()
    return _coroutines(llm) if is_async else _functions(llm)


def _functions(llm: BaseChatModel):
    @task
    def outline(topic: str) -> str:
        return llm.invoke(f"Outline {topic}").text

    @task
    def section(outline: str, n: int) -> str:
        return llm.invoke(f"Section {n} of {outline} [[tokens=12]]").text

    @task
    def title(text: str) -> str:
        return llm.invoke(f"Title for {text} [[tokens=5]]").text

    @entrypoint()
    def essay(topic: str) -> str:
        plan = outline(topic).result()
        sections = [section(plan, n) for n in (1, 2)]
        text = "\n".join(s.result() for s in sections)
        return f"{title(text).result()}\n{text}"

    return essay


def _coroutines(llm: BaseChatModel):
    @task
    async def outline(topic: str) -> str:
        return (await llm.ainvoke(f"Outline {topic}")).text

    @task
    async def section(outline: str, n: int) -> str:
        return (await llm.ainvoke(f"Section {n} of {outline} [[tokens=12]]")).text

    @task
    async def title(text: str) -> str:
        return (await llm.ainvoke(f"Title for {text} [[tokens=5]]")).text

    @entrypoint()
    async def essay(topic: str) -> str:
        plan = await outline(topic)
        text = "\n".join(await asyncio.gather(*(section(plan, n) for n in (1, 2))))
        return f"{await title(text)}\n{text}"

    return essay
