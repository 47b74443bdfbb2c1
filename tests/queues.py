"""Queues for tests: the real Redis that the test session started, emptied; and Redis emulated in the process."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import fakeredis

from maestro_agents import ports
from maestro_agents.queue import acl
from maestro_agents.queue.redis import RedisQueue
from tests.redis_servers import Server


async def fresh_redis_queue(url: str, *, lease_s: float = 10.0, max_queue: int = 100) -> RedisQueue:
    """A pool of its own on the session's Redis: tests run beside each other."""
    return RedisQueue(url, pool=f"t{uuid.uuid4().hex[:12]}", lease_s=lease_s, max_queue=max_queue)


def fake_redis_queue(*, lease_s: float = 10.0, max_queue: int = 100) -> RedisQueue:
    """The same code on fakeredis: no server at all."""
    client = fakeredis.FakeAsyncRedis(decode_responses=True)
    return RedisQueue("redis://fake", lease_s=lease_s, max_queue=max_queue, client=client)


def grant_users(server: Server, pool: str) -> Mapping[str, str]:
    """Make the users that `maestro redis acl` prints; their URLs, by role."""
    for role in acl.ROLES:
        server.say(*acl.line(role, pool, f"pw-{role}", aclfile=False).split())
    return {role: f"redis://{acl.user(role, pool)}:pw-{role}@127.0.0.1:{server.port}/0" for role in acl.ROLES}


ELSEWHERE: Final = {"add_api_key": "operator", "remove_api_key": "operator", "api_keys": "gateway", "want": "scheduler"}
ELSEWHERE |= {"reports": "scheduler"}
"""Methods that another role calls than the one on whose side they stand."""

LOOKS: Final = (
    "switch fleet tenants distances heads waiting running ledger depth draining read_log model models usage reports"
)
"""Methods that a monitor calls too."""


def _sides() -> Mapping[str, str]:
    """Method -> the role on whose side `ports.Queue` lists it."""
    found: dict[str, str] = {}
    side = ""
    for text in Path(ports.__file__).read_text().partition("class Queue(Protocol)")[2].splitlines():
        if head := re.search(r"# -- the (client|scheduler|node)s?\W?s? side", text):
            side = head[1]
        elif method := re.match(r"    async def (\w+)", text):
            found[method[1]] = side
    return found | ELSEWHERE


class Roles:
    """A queue on which each method is called by the Redis user of the role whose it is, and by none else."""

    def __init__(self, server: Server, *, lease_s: float, max_queue: int) -> None:
        pool = f"t{uuid.uuid4().hex[:12]}"
        self.urls = grant_users(server, pool)
        self._pool, self._sizes = pool, {"lease_s": lease_s, "max_queue": max_queue}
        self._sides = _sides()
        self._queues: dict[str, RedisQueue] = {}
        self._all: dict[str, Any] = {}

    def of(self, role: str) -> RedisQueue:
        """The queue as this role has it."""
        if role not in self._queues:
            made = self._queues[role] = RedisQueue(self.urls[role], pool=self._pool, **self._sizes)
            for name, value in self._all.items():
                setattr(made, name, value)
        return self._queues[role]

    async def close(self) -> None:
        for queue in self._queues.values():
            await queue.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.of(self._sides.get(name, "scheduler")), name)
        if name not in LOOKS.split():
            return method

        async def both(*args: Any, **kwargs: Any) -> Any:
            seen = await getattr(self.of("monitor"), name)(*args, **kwargs)
            found = await method(*args, **kwargs)
            assert seen == found
            return found

        return both

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "urls":
            object.__setattr__(self, name, value)
        else:
            self._all[name] = value
            for queue in self._queues.values():
                setattr(queue, name, value)
