"""A gateway in front of engines, for tests: real Redis, a real scheduler, and the server as `maestro gateway` runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

import httpx
import openai

from maestro_agents.core import EngineSpec, Observation, RunEnd
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.settings import Settings
from maestro_agents.tenants import Tenant, with_residency
from maestro_serving.emulator import listen, url_of
from maestro_serving.gateway import keys
from maestro_serving.gateway.app import Gateway
from maestro_serving.gateway.server import server_of

LEASE_S = 3.0
_T = TypeVar("_T")


class Front:
    """The gateway and the scheduler of a pool, on a thread of their own. ``key``: of tenant `acme`."""

    def __init__(
        self,
        redis_url: str,
        pool: str,
        engines: Mapping[str, str],
        *,
        model: str = "stub",
        slots: int = 4,
        tenants: Sequence[Tenant] = (),
        settings: Mapping[str, Any] | None = None,
        **gateway: Any,
    ) -> None:
        self.redis_url, self.pool = redis_url, pool
        self.engines = [
            with_residency(EngineSpec(engine_id=i, url=url, model=model, slots=slots), tenants)
            for i, url in engines.items()
        ]
        self.settings = {"redis_url": redis_url, "pool": pool, "lease_s": LEASE_S, **(settings or {})}
        self._more = gateway
        self._listener = listen("127.0.0.1", 0)
        #: Ends in ``/v1``.
        self.url = url_of(self._listener)
        self.key = ""
        self._ready, self._failed = threading.Event(), ""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="front", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20), "the gateway did not start"
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue = RedisQueue(self.redis_url, pool=self.pool, lease_s=LEASE_S)
        clock = RedisClock()
        await clock.sync(self.queue)
        self.scheduler = Scheduler(self.queue, self.engines, clock=clock, holder=os.urandom(4).hex(), lease_s=LEASE_S)
        scheduling = asyncio.create_task(self.scheduler.run())
        self.key, _ = await keys.add(self.queue, "acme")
        while not self.scheduler.leading or not await self.queue.fleet():
            await asyncio.sleep(0.01)
        self.gateway = Gateway(Settings.load(**self.settings), **self._more)
        self._server = server_of(self.gateway, self._ready.set)
        try:
            with self._listener:
                await self._server.serve(sockets=[self._listener])
        finally:
            scheduling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await scheduling
            await self.queue.close()

    # -- for the test ------------------------------------------------------------------------------------------------
    def ask(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Something of the front's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def add_key(self, tenant: str) -> str:
        """A key that counts from now on."""

        async def added() -> str:
            key, _ = await keys.add(self.queue, tenant)
            ring = self.gateway.keys
            if ring is not None:
                await ring.read()
            return key

        return self.ask(added())

    def observations(self, n: int) -> list[Observation]:
        """The first ``n`` calls of the log, once they are there."""
        return [
            o
            for o in self.log(lambda log: sum(isinstance(o, Observation) for o in log) >= n)
            if isinstance(o, Observation)
        ]

    def ends(self, n: int) -> list[RunEnd]:
        """The first ``n`` ends of runs."""
        return [o for o in self.log(lambda log: sum(isinstance(o, RunEnd) for o in log) >= n) if isinstance(o, RunEnd)]

    def log(self, enough: Any) -> list[Observation | RunEnd]:
        async def read() -> list[Observation | RunEnd]:
            async with asyncio.timeout(10):
                while True:
                    _, entries = await self.queue.read_log("", 1000)
                    if enough(entries):
                        return list(entries)
                    await asyncio.sleep(0.01)

        return self.ask(read())

    def idle(self) -> bool:
        """Nothing of any call is left: no grant, no reservation, no open run or connection."""

        async def asked() -> bool:
            ledger = await self.queue.ledger()
            room = self.gateway.client._room
            return not (sum(ledger.slots.values()) or room.held or room.waiting or room.local)

        return self.ask(asked())

    def openai(self, key: str = "", **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key or self.key, max_retries=0, **more)

    def http(self, key: str | None = None, **headers: str) -> httpx.Client:
        """A bare client; ``key``: "" for none."""
        key = self.key if key is None else key
        said = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers={**said, **headers}, timeout=20, trust_env=False)


def chat(text: str = "hi", **more: Any) -> dict[str, Any]:
    """A request."""
    return {"model": "stub", "messages": [{"role": "user", "content": text}], **more}
