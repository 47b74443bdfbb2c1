"""Node agents as processes: an emulated GPU host under `maestro node` and `maestro up`, killed, taken over, ended in order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from maestro_agents.cli import main
from maestro_agents.cli.up import Stack
from maestro_agents.core import Ticket
from maestro_agents.errors import EngineUnavailable
from maestro_agents.fleet import load_fleet
from maestro_agents.nodes import NodeReport, Want, Wanted
from maestro_agents.queue.embedded import find_server
from maestro_agents.queue.redis import RedisQueue
from maestro_serving.keeper import started_at

pytestmark = [pytest.mark.skipif(find_server() is None, reason="no Redis server here"), pytest.mark.timeout(120)]

# Three models of which two fit at a time, a hundred times faster than the hardware.
FLEET = """
[[gpu]]
kind = "a100-40g"
node = "n1"
host_ram_gb = 40
models = ["a"]
""" + "".join(
    f"""
[[model]]
name = "{name}"
profile = "qwen2.5-7b"
slots = 8
max_model_len = 8192
[model.launch]
kind = "emulator"
args = ["--speed", "100"]
"""
    for name in "abc"
)


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


class Agent:
    """`maestro node` in a process of its own."""

    def __init__(self, fleet: Path, url: str, pool: str, state: Path) -> None:
        self.state = state / "n1"
        self.log = (state.parent / "agent.log").open("ab")
        argv = ["-m", "maestro_agents.cli", "node", "--fleet", str(fleet), "--redis-url", url, "--pool", pool]
        self.process = subprocess.Popen(
            [sys.executable, *argv, "--state", str(state)], stdout=self.log, stderr=self.log
        )

    def kept(self) -> dict[str, int]:
        """Pids of the servers that it keeps, by name."""
        return {p.stem: json.loads(p.read_text())["pid"] for p in (self.state / "engines").glob("*.json")}

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(60)


@pytest.fixture
def ended() -> Iterator[list[Agent]]:
    """Agents that are ended, with all their servers, whatever becomes of the test."""
    agents: list[Agent] = []
    yield agents
    for agent in agents:
        agent.process.kill()
        agent.process.wait()
        for file in (agent.state / "engines").glob("*.json"):
            os.kill(json.loads(file.read_text())["keeper"], signal.SIGTERM)
        agent.log.close()


async def told(queue: RedisQueue, engine_id: str, within_s: float = 60.0, **what: object) -> NodeReport:
    """Wait until a report says so of an engine."""
    async with asyncio.timeout(within_s):
        while True:
            for report in await queue.reports(await queue.server_time_s()):
                for e in report.engines:
                    if e.spec.engine_id == engine_id and all(getattr(e, k) == v for k, v in what.items()):
                        return report
            await asyncio.sleep(0.05)


def gone(pid: int, within_s: float = 20.0) -> bool:
    give_up_at = time.monotonic() + within_s
    while started_at(pid) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    return not started_at(pid)


@pytest.mark.slow
async def test_an_agent_that_was_killed_finds_its_engines_and_ends_them_in_order(
    fleet: Path, tmp_path: Path, redis_url: str, pool: str, ended: list[Agent], capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill -9: engines serve on; the next agent takes the same processes over, one awake and one asleep; SIGTERM ends all."""
    queue = RedisQueue(redis_url, pool=pool)
    ended.append(Agent(fleet, redis_url, pool, tmp_path / "state"))
    await told(queue, "a.n1.0", tier="gpu")
    await queue.want("n1", Wanted(epoch=1, engines={"a.n1.0": Want(tier="sleeping"), "b.n1.0": Want(tier="gpu")}))
    await told(queue, "b.n1.0", tier="gpu")
    report = await told(queue, "a.n1.0", tier="sleeping")
    pids = ended[0].kept()
    url = next(e.spec.url for e in report.engines if e.spec.engine_id == "b.n1.0")
    ended[0].end(signal.SIGKILL)
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{url.removesuffix('/v1')}/health")).status_code == 200
        async with asyncio.timeout(10):
            while await queue.reports(await queue.server_time_s()):
                await asyncio.sleep(0.05)
        ended.append(Agent(fleet, redis_url, pool, tmp_path / "state"))
        report = await told(queue, "b.n1.0", tier="gpu")
        assert next(e.tier for e in report.engines if e.spec.engine_id == "a.n1.0") == "sleeping"
        assert ended[1].kept() == pids
        assert not report.moves
        answer = await http.post(f"{url}/completions", json={"model": "b", "prompt": "x", "max_tokens": 1})
        assert answer.status_code == 200
    await asyncio.to_thread(_status, redis_url, pool)
    out = capsys.readouterr().out
    assert "GPU n1.0" in out
    assert "sleeping" in out
    ended[1].end(signal.SIGTERM)
    assert ended[1].process.returncode == 0
    assert all(gone(pid) for pid in pids.values())
    assert ended[1].kept() == {}
    await queue.close()


def _status(url: str, pool: str) -> None:
    with pytest.raises(SystemExit):
        main(["node", "--status", "--redis-url", url, "--pool", pool])


async def test_two_agents_of_one_node_do_not_fight(
    fleet: Path, tmp_path: Path, redis_url: str, pool: str, ended: list[Agent]
) -> None:
    """The second one says that the first runs, and ends."""
    queue = RedisQueue(redis_url, pool=pool)
    ended.append(Agent(fleet, redis_url, pool, tmp_path / "state"))
    await told(queue, "a.n1.0")
    second = Agent(fleet, redis_url, pool, tmp_path / "state")
    assert second.process.wait(30) == 2
    assert "another agent runs this node" in (tmp_path / "agent.log").read_text()
    second.log.close()
    await queue.close()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["node"], "which Redis? Give --redis-url"),
        (["node", "--redis-url", "URL"], "which fleet? Name it: maestro node --fleet fleet.toml"),
        (["node", "--redis-url", "URL", "--fleet", "none.toml"], "none.toml: there is no such file"),
        (["node", "--redis-url", "URL", "--fleet", "engines.toml"], "which node of engines.toml? Name it by --node: it has no [[gpu]]"),
        (["node", "--redis-url", "URL", "--fleet", "two.toml"], "Name it by --node: it has local.0, local.1"),
        (["node", "--redis-url", "URL", "--fleet", "two.toml", "--node", "x"], "two.toml has no node 'x': its nodes are local.0, local.1"),
    ],
)  # fmt: skip
def test_a_wrong_start_is_one_clear_line(
    words: list[str], says: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong, and what to do."""
    Path("engines.toml").write_text('[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1/v1"\n')
    Path("two.toml").write_text('[[gpu]]\nkind = "l4-24g"\nnodes = 2\nmodels = ["qwen2.5-7b"]\n')
    with pytest.raises(SystemExit) as end:
        main([redis_url if w == "URL" else w for w in words])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.slow
async def test_a_fleet_of_gpus_comes_up_wakes_models_on_demand_and_leaves_nothing(fleet: Path, tmp_path: Path) -> None:
    """`maestro up`: what starts serves; a stage for a model that is nowhere has it brought, and is granted there."""
    stack = Stack(load_fleet(fleet), logs=tmp_path / "logs")
    queue: RedisQueue | None = None
    try:
        await asyncio.to_thread(stack.start)
        assert set(stack.pids()) == {"redis", "node n1", "scheduler"}
        queue = RedisQueue(stack.redis_url)
        async with asyncio.timeout(20):
            while [e.engine_id for e in await queue.fleet()] != ["a.n1.0"]:
                await asyncio.sleep(0.05)
        now_s = await queue.server_time_s()
        ticket = Ticket(
            stage_id="s", client_id="c", model="b", prompt_tokens=10, max_tokens=5, pushed_at_s=now_s, due_at_s=now_s
        )
        await queue.renew("c", {}, now_s=now_s)
        assert await queue.push(ticket, engines=[], now_s=now_s) is None
        async with asyncio.timeout(40):
            verdicts = ()
            while not verdicts:
                await queue.renew("c", {"s": 0}, now_s=await queue.server_time_s())
                verdicts = await queue.verdicts("c", 0.5)
        assert verdicts[0].engine_id == "b.n1.0"  # pyright: ignore[reportAttributeAccessIssue]
        pids = [json.loads(p.read_text())["pid"] for p in (tmp_path / "logs").rglob("engines/*.json")]
        assert pids
    finally:
        if queue is not None:
            await queue.close()
        await asyncio.to_thread(stack.stop)
    assert all(gone(pid) for pid in pids)


async def test_a_node_that_cannot_run_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    """A GPU that nobody knows: one error with what the agent said last, no endless starting again, nothing left."""
    file = tmp_path / "fleet.toml"
    file.write_text(
        '[[gpu]]\nkind = "h1000"\nnode = "n1"\nmodels = ["m"]\n[[model]]\nname = "m"\nprofile = "llama-3.1-8b"\n'
    )
    stack = Stack(load_fleet(file), logs=tmp_path / "logs")
    with pytest.raises(EngineUnavailable, match=r"node n1 ended: .*h1000"):
        await asyncio.to_thread(stack.start)
    assert stack.pids() == {}


@pytest.mark.slow
async def test_nodes_go_to_another_pool_with_their_engines(fleet: Path, tmp_path: Path) -> None:
    """`Stack.start_scheduler` with another pool: agents let go of servers, which the next ones take over as they are."""
    stack = Stack(load_fleet(fleet), logs=tmp_path / "logs")
    try:
        await asyncio.to_thread(stack.start)
        before = {p.name: json.loads(p.read_text())["pid"] for p in stack.logs.rglob("engines/*.json")}
        agent = stack.pids()["node n1"]
        await asyncio.to_thread(stack.start_scheduler, pool="other")
        assert [e.engine_id for e in await asyncio.to_thread(lambda: stack.engines)] == ["a.n1.0"]
        assert {p.name: json.loads(p.read_text())["pid"] for p in stack.logs.rglob("engines/*.json")} == before
        assert stack.pids()["node n1"] != agent
        queue = RedisQueue(stack.redis_url, pool="other")
        assert [e.engine_id for e in await queue.fleet()] == ["a.n1.0"]
        await queue.close()
    finally:
        await asyncio.to_thread(stack.stop)
    assert all(gone(pid) for pid in before.values())
