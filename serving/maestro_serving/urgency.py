"""Does a server, or the router in its place, act upon what it is told of a call's urgency? For `maestro doctor --hints`.

Its slots are filled; then come as many calls that are due late, one that is due first, and as many late ones again. Which of
them it answered before the urgent one says what it made of the hints: where that stood among the first, they count; where it
stood in the middle, it was served as it came; at the end, somebody turned the order round.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from dataclasses import dataclass
from typing import Any, Final

import httpx

from maestro_agents.core import EngineSpec, ServiceClass
from maestro_agents.hints import Said, outward

TOKENS: Final = 128
"""Length of each answer."""

LATE_S: Final = 3600.0
GAP_S: Final = 0.1
"""Between the calls that came before, the urgent one, and those that came after."""

PATIENCE_S: Final = 120.0


class NotAnsweredError(Exception):
    """A call of the burst came to nothing."""


@dataclass
class _Call:
    """One call of the burst. Moments are `time.monotonic`'s; 0: not yet."""

    first_byte_at_s: float = 0.0
    ended_at_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Burst:
    """What a server made of one: calls that began before the urgent one, of so many that were due later."""

    before: int
    late: int
    #: All of them were there before a slot became free: else nothing was shown.
    waited: bool

    @property
    def verdict(self) -> str:
        """``nothing waited``, ``as meant``, ``not acted upon`` or ``turned round``."""
        if not self.waited:
            return "nothing waited"
        if self.before < self.late // 2:
            return "as meant"
        return "turned round" if self.before == self.late else "not acted upon"


async def burst(engine: EngineSpec) -> Burst:
    """Send one. Raises `NotAnsweredError`, with the server's own words."""
    key = os.environ.get(engine.api_key_env, "") if engine.api_key_env else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=PATIENCE_S, limits=limits, trust_env=False) as http:
        return await _burst(http, engine)


async def _burst(http: httpx.AsyncClient, engine: EngineSpec) -> Burst:
    tasks: list[asyncio.Task[None]] = []

    def send(n: int, service_class: ServiceClass, late_s: float) -> list[_Call]:
        calls = [_Call() for _ in range(n)]
        tasks.extend(asyncio.create_task(_ask(http, engine, c, service_class, late_s)) for c in calls)
        return calls

    try:
        filling = send(engine.slots, ServiceClass.INTERACTIVE, 0.0)
        while not all(c.first_byte_at_s for c in filling) and not any(t.done() for t in tasks):
            await asyncio.sleep(0.005)
        late = send(engine.slots, ServiceClass.BATCH, LATE_S)
        await asyncio.sleep(GAP_S)
        (urgent,) = send(1, ServiceClass.INTERACTIVE, 1.0)
        await asyncio.sleep(GAP_S)
        late += send(engine.slots, ServiceClass.BATCH, LATE_S)
        await asyncio.sleep(GAP_S)
        there_at_s = time.monotonic()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    free_at_s = min(c.ended_at_s for c in filling)
    return Burst(
        before=sum(c.first_byte_at_s < urgent.first_byte_at_s for c in late),
        late=len(late),
        waited=there_at_s < free_at_s < min(c.first_byte_at_s for c in (*late, urgent)),
    )


async def _ask(
    http: httpx.AsyncClient, engine: EngineSpec, call: _Call, service_class: ServiceClass, late_s: float
) -> None:
    stage = uuid.uuid4().hex
    now_s = time.time()
    sent = outward(
        engine.hints,
        Said(
            run_id=f"doctor-{stage}",
            stage_id=stage,
            role="doctor",
            tenant="default",
            step=0,
            service_class=service_class,
            priority=int((now_s + late_s) * 1000.0),
            output_tokens=TOKENS,
        ),
        now_s=now_s,
    )
    body: dict[str, Any] = {
        "model": engine.served_model or engine.model,
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        **sent.body,
    }
    try:
        url = f"{engine.url.rstrip('/')}/chat/completions"
        async with http.stream("POST", url, json=body, headers=dict(sent.headers)) as answer:
            if answer.status_code != 200:
                told = (await answer.aread()).decode(errors="replace")
                raise NotAnsweredError(f"{answer.status_code}: {' '.join(told.split())[:300]}")
            async for line in answer.aiter_lines():
                if line.startswith("data:") and not call.first_byte_at_s:
                    call.first_byte_at_s = time.monotonic()
    except httpx.HTTPError as e:
        raise NotAnsweredError(f"{type(e).__name__} {e}".strip()) from e
    call.ended_at_s = time.monotonic()
    if not call.first_byte_at_s:
        raise NotAnsweredError("the answer was empty")
