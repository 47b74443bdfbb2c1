"""Queues for tests: the real Redis that the test session started, emptied; and Redis emulated in the process."""

from __future__ import annotations

import uuid

import fakeredis

from maestro_agents.queue.redis import RedisQueue


async def fresh_redis_queue(url: str, *, lease_s: float = 10.0, max_queue: int = 100) -> RedisQueue:
    """A pool of its own on the session's Redis: tests run beside each other."""
    return RedisQueue(url, pool=f"t{uuid.uuid4().hex[:12]}", lease_s=lease_s, max_queue=max_queue)


def fake_redis_queue(*, lease_s: float = 10.0, max_queue: int = 100) -> RedisQueue:
    """The same code on fakeredis: no server at all."""
    client = fakeredis.FakeAsyncRedis(decode_responses=True)
    return RedisQueue("redis://fake", lease_s=lease_s, max_queue=max_queue, client=client)
