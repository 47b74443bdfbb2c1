"""Waiting for tokens, and for clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from maestro_agents.simulator.engine import RequestRecord
from maestro_serving.live import Flow
from maestro_serving.shapes import Job

_T = TypeVar("_T")


async def finished(job: Job) -> list[RequestRecord]:
    """Run a job to its end."""
    with job.engine.run(job.requests(), job.reasons) as flows:
        records = [await flow.end() for flow in flows]
    for i, record in enumerate(records):
        job.settle(i, record)
    return records


async def told(job: Job, flows: list[Flow]) -> AsyncGenerator[tuple[int, int, int, bool]]:
    """(index, tokens before, tokens now, last) of each flow of a job, whenever it has more. One that was aborted by the server
    before it had any is told too, without tokens.
    """
    told = [0] * len(flows)
    news = {asyncio.ensure_future(flow.more()): i for i, flow in enumerate(flows)}
    try:
        while news:
            done, _ = await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda t: news[t]):
                i = news.pop(task)
                before, told[i] = told[i], task.result()
                record = flows[i].record
                last = record is not None and told[i] == record.output_tokens
                job.settle(i, record if last else None)
                if told[i] > before or last:
                    yield i, before, told[i], last
                if not last:
                    news[asyncio.ensure_future(flows[i].more())] = i
    finally:
        for task in news:
            task.cancel()


async def unless_gone(receive: Receive, work: Awaitable[_T]) -> _T | None:
    """The result of ``work``; None, with the work cancelled, where the client left first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events that end, with the work behind them, when the client leaves, also while nothing is sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str | None]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._events = events

    @classmethod
    async def open(cls, events: AsyncGenerator[str | None]) -> EventStream:
        """Start the generator up to its first item, so that a refusal is still an ordinary answer."""
        await anext(events)
        return cls(events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pump() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": (event or "").encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, pump())
        finally:
            await self._events.aclose()
