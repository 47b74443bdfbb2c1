"""What a scheduler and a node agent say of themselves over HTTP, for probes and Prometheus."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from maestro_agents.core import EngineSpec, Ticket
from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.scheduler import Scheduler
from maestro_serving.health import HEARD_S, NodeMetrics, SchedulerMetrics, telling
from tests.scripted_driver import bench, node_engine
from tests.stub_openai import until

NOW_S = 1_790_000_000.0
ENGINE = EngineSpec(engine_id="e", url="http://127.0.0.1:1/v1", model="m", slots=2, cluster="near")


class Clock:
    """Turned by hand."""

    at_s = NOW_S

    def now_s(self) -> float:
        return self.at_s


async def got(url: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(f"{url}{path}")


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, values of its labels in their alphabetical order...) -> value."""
    return {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples}


async def test_a_leader_tells_who_waits_and_what_is_reserved() -> None:
    """With the names of model, engine and cluster, as its last round saw them."""
    clock, queue = Clock(), MemoryQueue(lease_s=10.0)
    leader = Scheduler(queue, [ENGINE], clock=clock, holder="a")
    said = SchedulerMetrics(leader)
    async with telling("127.0.0.1:0", said.unready, said) as url:
        assert await leader.lead()
        for n in range(3):
            ticket = Ticket(stage_id=f"s{n}", client_id="c", model="m", prompt_tokens=10, deadline_at_s=NOW_S + 60)
            await queue.push(ticket, engines=(), now_s=NOW_S)
        await leader.step()
        await leader.step()
        found = samples((await got(url, "/metrics")).text)
        await leader.queue.close()
    assert found["maestro_scheduler_leader",] == 1
    assert found["maestro_scheduler_grants_total",] == 2
    assert found["maestro_queue_waiting_stages", "m"] == 1
    assert found["maestro_engine_slots", "near", "e", "m"] == 2
    assert found["maestro_engine_reserved_slots", "near", "e", "m"] == 2
    assert found["maestro_engine_takes_stages", "near", "e", "m"] == 1


async def test_a_standby_is_ready_and_says_that_it_stands_by() -> None:
    """Kubernetes keeps it in service: it takes over when the leader dies."""
    clock, queue = Clock(), MemoryQueue(lease_s=10.0)
    assert await Scheduler(queue, [ENGINE], clock=clock, holder="a").lead()
    standby = Scheduler(queue, [ENGINE], clock=clock, holder="b")
    said = SchedulerMetrics(standby)
    running = asyncio.create_task(standby.run())
    async with telling("127.0.0.1:0", said.unready, said) as url:
        await until(lambda: standby.heard_at_s == NOW_S)
        assert (await got(url, "/readyz")).status_code == 200
        found = samples((await got(url, "/metrics")).text)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert found["maestro_scheduler_leader",] == 0
    assert not [name for name, *_ in found if name.startswith("maestro_queue")]


async def test_a_scheduler_that_cannot_hear_its_queue_is_not_ready_but_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """/readyz says why with 503; /healthz is about the process alone, which a restart would not mend."""
    clock, queue = Clock(), MemoryQueue(lease_s=10.0)
    leader = Scheduler(queue, [ENGINE], clock=clock, holder="a")
    said = SchedulerMetrics(leader)
    async with telling("127.0.0.1:0", said.unready, said) as url:
        early = await got(url, "/readyz")
        running = asyncio.create_task(leader.run())
        await until(lambda: leader.heard_at_s == NOW_S)
        ready = await got(url, "/readyz")

        async def away(*_: object, **__: Any) -> None:
            raise QueueUnavailable("Redis is away.")

        monkeypatch.setattr(queue, "incarnation", away)
        clock.at_s += HEARD_S + 1
        late = await got(url, "/readyz")
        alive = await got(url, "/healthz")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert (early.status_code, early.text) == (503, "the queue was not heard yet\n")
    assert ready.status_code == 200
    assert (late.status_code, late.text) == (503, "the queue was not heard for 11 s\n")
    assert alive.status_code == 200


async def test_a_node_tells_its_memory_and_the_tiers_of_its_models(tmp_path: Path) -> None:
    """What it reports to the scheduler, and it is ready while reports arrive."""
    async with bench(tmp_path, node_engine("a"), node_engine("b")) as it:
        said = NodeMetrics(it.node)
        async with telling("127.0.0.1:0", said.unready, said) as url:
            await until(lambda: it.node.told_at_s > 0)
            ready = await got(url, "/readyz")
            found = samples((await got(url, "/metrics")).text)
    assert ready.status_code == 200
    node = it.node.host.node_id
    tiers = {(e, tier) for name, *labels in found if name == "maestro_engine_tier" for e, _, _, tier in [labels]}
    assert {e for e, _ in tiers} == {"a.n.0", "b.n.0"}
    (gpu,) = it.node.host.gpus
    assert found["maestro_gpu_memory_bytes", gpu.gpu_id, node] == gpu.memory_bytes


@pytest.mark.parametrize("where", ["9109", "host:port", "127.0.0.1", ":9109"])
async def test_an_address_that_is_none_is_one_clear_line(where: str) -> None:
    """It says what one looks like."""
    said = SchedulerMetrics(Scheduler(MemoryQueue(), [ENGINE], clock=Clock(), holder="a"))
    with pytest.raises(ConfigError, match=r"--metrics .*: it looks like 0\.0\.0\.0:9109"):
        async with telling(where, said.unready, said):
            pass


async def test_a_port_that_is_taken_is_one_clear_line() -> None:
    """It says to name another."""
    said = SchedulerMetrics(Scheduler(MemoryQueue(), [ENGINE], clock=Clock(), holder="a"))
    async with telling("127.0.0.1:0", said.unready, said) as url:
        with pytest.raises(ConfigError, match="name another port"):
            async with telling(url.removeprefix("http://"), said.unready, said):
                pass
