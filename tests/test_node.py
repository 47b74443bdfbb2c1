"""The node agent: what is wanted comes true, what is reported is true, and nothing that happens to an engine fools it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from maestro_agents.errors import QueueUnavailable
from maestro_agents.nodes import Move
from maestro_agents.queue.memory import MemoryQueue
from maestro_serving import node as node_module
from maestro_serving.drivers import Look
from tests.scripted_driver import GB, Bench, ScriptedDriver, bench, node_engine, quick

__all__ = ["quick"]

pytestmark = pytest.mark.usefixtures("quick")


async def test_what_is_wanted_comes_true_and_is_told(tmp_path: Path) -> None:
    """From disk to the GPU, to sleep and back: each move is reported with its tier, its seconds and its bytes."""
    async with bench(tmp_path, node_engine("a")) as it:
        await it.tells("a", tier="disk", to="disk")
        for tier in ("gpu", "sleeping", "gpu", "dropped", "gpu", "disk"):
            await it.want(a=tier)
            await it.tells("a", tier=tier, to=tier)
        report = it.node.report()
        assert [(m.was, m.to, m.error) for m in report.moves][:2] == [("disk", "gpu", ""), ("gpu", "sleeping", "")]
        assert [m.moved_bytes for m in report.moves] == [14 * GB, 14 * GB, 14 * GB, 0, 14 * GB, 0]
        assert "aborted" not in it.there("a").calls
        assert set(report.engines[0].wake_s) == {"sleeping", "dropped", "disk"}


async def test_an_engine_is_announced_before_it_sleeps_and_never_aborts_what_runs(tmp_path: Path) -> None:
    """It is told that it leaves, waits until its own metrics are quiet twice, and only then sleeps."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        it.there("a").running = 2
        await it.want(a="sleeping")
        await it.tells("a", tier="gpu", to="sleeping", running=2)
        assert "sleep 1" not in it.there("a").calls
        it.there("a").running, it.there("a").waiting = 0, 1  # one that waits counts as well
        await it.tells("a", tier="gpu", to="sleeping", waiting=1)
        it.there("a").waiting = 0
        await it.tells("a", tier="sleeping")
        assert it.there("a").aborted == 0


async def test_a_wish_to_sleep_that_is_taken_back_costs_nothing(tmp_path: Path) -> None:
    """While it drains it can be kept: it takes stages again, and no move was made."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        it.there("a").running = 1
        await it.want(a="sleeping")
        await it.tells("a", to="sleeping")
        await it.want(a="gpu")
        await it.tells("a", tier="gpu", to="gpu")
        assert it.there("a").calls == ["start"]


async def test_an_engine_whose_metrics_say_nothing_is_not_idle(tmp_path: Path) -> None:
    """Unknown is not zero."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        it.there("a").running = it.there("a").waiting = -1
        await it.want(a="sleeping")
        await it.tells("a", to="sleeping", running=-1)
        looks = it.node._engines["a.n.0"].look
        await it.until(lambda: it.node._engines["a.n.0"].look is not looks)
        assert it.there("a").calls == ["start"]


async def test_two_that_do_not_fit_take_turns(tmp_path: Path) -> None:
    """The second wake waits until the first one's sleep is over, byte for byte."""
    async with bench(tmp_path, node_engine("a"), node_engine("b"), usable_gb=25, at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        it.there("a").hold["sleep 1"] = asyncio.Event()
        await it.want(b="gpu", a="sleeping")
        await it.until(lambda: "sleep 1" in it.there("a").calls)
        assert (await it.tells("b", to="disk")).tier == "disk"
        assert it.there("b").calls == []
        it.there("a").hold["sleep 1"].set()
        await it.tells("b", tier="gpu")
        assert (await it.report("a")).tier == "sleeping"


async def test_a_wish_that_never_fits_waits_quietly(tmp_path: Path) -> None:
    """No move, no failure: it stays where it is until there is room."""
    async with bench(tmp_path, node_engine("a"), node_engine("b", kv_gb=10), usable_gb=25, at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        await it.want(a="gpu", b="gpu")
        await it.until(lambda: len(it.node._wanted.engines) == 2)
        e = await it.tells("b", tier="disk", to="disk")
        assert (e.failed, it.there("b").calls) == ("", [])


async def test_a_server_that_fell_asleep_counts_with_what_it_keeps_and_not_with_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was seen of it while it was awake takes no room from others once it sleeps."""
    looks = ScriptedDriver.look

    async def look(self: ScriptedDriver) -> Look:
        return dataclasses.replace(await looks(self), device_bytes=20 * GB if self.level is None else GB)

    monkeypatch.setattr(ScriptedDriver, "look", look)
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        await it.until(lambda: it.node._engines["a.n.0"].look.device_bytes == 20 * GB)
        usable: list[int] = []
        hold = it.node._hold

        async def held() -> None:
            await hold()
            usable.append(it.node.ledgers["n.0"].usable_bytes)

        monkeypatch.setattr(it.node, "_hold", held)
        await it.want(a="sleeping")
        await it.until(lambda: 39 * GB in usable)
        assert set(usable) <= {40 * GB, 39 * GB}


async def test_host_memory_bounds_who_sleeps(tmp_path: Path) -> None:
    """The report says what host memory is left; a second sleeper that does not fit stays awake."""
    async with bench(tmp_path, node_engine("a"), node_engine("b"), ram_gb=20, at_start=("a", "b")) as it:
        await it.tells("b", tier="gpu")
        await it.want(a="sleeping", b="sleeping")
        await it.tells("a", tier="sleeping")
        assert it.node.report().ram_free_bytes == 6 * GB
        assert (await it.tells("b", to="gpu")).tier == "gpu"
        await it.want(a="disk", b="sleeping")
        await it.tells("b", tier="sleeping")


async def test_a_wake_that_fails_leaves_the_model_asleep_and_says_why(tmp_path: Path) -> None:
    """It rests in its tier, its memory is free for others, and it is tried again later."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        await it.want(a="sleeping")
        await it.tells("a", tier="sleeping")
        it.there("a").fail("wake", "out of memory")
        it.there("a").hold["wake"] = asyncio.Event()
        await it.want(a="gpu")
        await it.tells("a", tier="sleeping", to="gpu")
        it.there("a").hold["wake"].set()
        e = await it.tells("a", tier="sleeping", failed="out of memory")
        assert e.failed_at_s > 0
        await it.tells("a", tier="gpu", failed="")
        assert it.there("a").calls.count("wake") == 2
        failed = [m for m in it.node.report().moves if m.error]
        assert [(m.was, m.to, m.error) for m in failed] == [("sleeping", "gpu", "out of memory")]


async def test_a_failed_wake_of_which_nobody_knows_what_it_left_ends_the_server(tmp_path: Path) -> None:
    """Half awake is neither: the server is ended, the model is on disk, and comes back by a start."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        await it.want(a="dropped")
        await it.tells("a", tier="dropped")
        driver = it.there("a")
        driver.hold["wake"] = asyncio.Event()
        driver.fail("wake", "reload_weights failed")
        await it.want(a="gpu")
        await it.until(lambda: "wake" in driver.calls)
        driver.level = None  # it says that it is awake, and does not serve
        driver.hold["wake"].set()
        await it.until(lambda: driver.calls.count("start") == 2)
        await it.tells("a", tier="gpu")
        assert "stop" in driver.calls


async def test_a_launch_that_fails_backs_off_and_comes_true_in_the_end(tmp_path: Path) -> None:
    """A model that should be on its GPU is tried again, later each time."""

    def prepare(it: Bench) -> None:
        for _ in range(3):
            it.there("a").fail("start", "no such model")

    async with bench(tmp_path, node_engine("a"), at_start=("a",), prepare=prepare) as it:
        await it.tells("a", tier="disk", failed="no such model")
        await it.tells("a", tier="gpu", failed="")
        assert it.there("a").calls.count("start") == 4


async def test_a_server_that_dies_is_told_of_and_started_again(tmp_path: Path) -> None:
    """Kill -9: its memory is free at once, the report says so, and it comes back by itself."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        it.there("a").hold["start"] = asyncio.Event()
        it.there("a").die()
        assert (await it.tells("a", tier="disk")).failed == "its server died"
        it.there("a").hold["start"].set()
        assert (await it.tells("a", tier="gpu")).restarts == 1


async def test_a_sleeping_server_that_dies_is_not_started(tmp_path: Path) -> None:
    """Nobody wanted it on the GPU: it is on disk now, and wakes from there when it is wanted."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        await it.want(a="sleeping")
        await it.tells("a", tier="sleeping")
        it.there("a").die()
        await it.tells("a", tier="disk", failed="its server died")
        assert it.there("a").calls.count("start") == 1


async def test_health_alone_does_not_fool_it(tmp_path: Path) -> None:
    """A server that somebody else put to sleep is healthy and asleep: it is told to be so, and woken, since it shall serve."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        it.there("a").hold["wake"] = asyncio.Event()
        it.there("a").level = 1
        it.cards["n.0"].free("a.n.0")
        await it.tells("a", tier="sleeping")
        it.there("a").hold["wake"].set()
        await it.tells("a", tier="gpu")


async def test_a_sleep_that_did_not_happen_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says yes and stays awake is not reported as asleep."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")

        async def pretends(level: int) -> None:
            it.there("a").calls.append(f"sleep {level}")

        monkeypatch.setattr(it.there("a"), "sleep", pretends)
        await it.want(a="sleeping")
        e = await it.tells("a", failed="engine a.n.0 was put to sleep and is awake")
        assert e.tier == "gpu"


async def test_a_server_woken_behind_its_back_has_no_room_it_does_not_own(tmp_path: Path) -> None:
    """Where its GPU is full it is stopped: no model may push another out of its memory."""
    async with bench(tmp_path, node_engine("a"), node_engine("b"), usable_gb=25, at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        await it.want(a="sleeping", b="gpu")
        await it.tells("b", tier="gpu")
        it.there("a").level = None
        await it.until(lambda: "stop" in it.there("a").calls)
        await it.tells("a", tier="disk")
        assert it.there("b").up


async def test_a_server_that_hangs_is_ended_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives and does not answer: after a while it is as good as dead."""
    monkeypatch.setattr(node_module, "HUNG_S", 0.05)
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        it.there("a").healthy = False
        await it.until(lambda: it.there("a").calls.count("start") == 2)
        await it.tells("a", tier="gpu", restarts=1)


async def test_an_older_epoch_changes_nothing(tmp_path: Path) -> None:
    """What a scheduler that leads no more still says is not done."""
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        await it.want(epoch=5, a="gpu")
        await it.until(lambda: it.node._wanted.epoch == 5)
        await it.want(epoch=4, a="disk")
        await it.want(epoch=6, a="gpu")
        await it.until(lambda: it.node._wanted.epoch == 6)
        assert "stop" not in it.there("a").calls


async def test_an_agent_that_was_away_reads_what_is_wanted_now(tmp_path: Path) -> None:
    """Wishes are a state: they stand in the queue, and rule over what the fleet file starts."""
    queue = MemoryQueue()
    async with bench(tmp_path, node_engine("a"), node_engine("b"), queue=queue) as it:
        await it.want(a="disk", b="gpu")
    async with bench(tmp_path, node_engine("a"), node_engine("b"), queue=queue, at_start=("a",)) as it:
        await it.tells("b", tier="gpu")
        assert it.there("a").calls == []


async def test_survivors_are_taken_over_as_they_are(tmp_path: Path) -> None:
    """One awake, one asleep: both are known again, nothing is started, and memory is counted."""

    def prepare(it: Bench) -> None:
        it.there("a").survivor = it.there("b").survivor = True
        it.there("b").level = 2

    async with bench(tmp_path, node_engine("a"), node_engine("b"), at_start=("a",), prepare=prepare) as it:
        await it.tells("a", tier="gpu")
        await it.tells("b", tier="dropped")
        assert (it.there("a").calls, it.there("b").calls) == ([], [])
        assert it.node.ledgers["n.0"].held_bytes == 20 * GB


async def test_what_moves_cost_is_remembered_over_a_restart_of_the_agent(tmp_path: Path) -> None:
    """Measured seconds take the place of estimates, and stay."""
    async with bench(tmp_path, node_engine("a")) as it:
        guess = (await it.tells("a", tier="disk")).wake_s["disk"]
        await it.want(a="gpu")
        measured = (await it.tells("a", tier="gpu")).wake_s["disk"]
        assert measured < 1 < guess
    async with bench(tmp_path, node_engine("a")) as it:
        assert (await it.tells("a", tier="disk")).wake_s["disk"] == pytest.approx(measured)


async def test_rejuvenation_restarts_once_drained_and_only_once(tmp_path: Path) -> None:
    """The engine drains, ends and comes back; the same wish said again, also to the next agent, changes nothing."""
    queue = MemoryQueue()
    async with bench(tmp_path, node_engine("a"), queue=queue, at_start=("a",)) as it:
        await it.tells("a", tier="gpu")
        await it.want(a="gpu")
        await it.until(lambda: it.node._wanted.epoch == 1)
        it.there("a").running = 1
        await it.want(epoch=2, a="gpu", restarts=1)
        await it.tells("a", tier="gpu", to="disk")
        it.there("a").running = 0
        await it.tells("a", tier="gpu", to="gpu", rejuvenation=1)
        assert it.there("a").calls == ["start", "stop", "start"]
    async with bench(tmp_path, node_engine("a"), queue=queue) as it:
        await it.until(lambda: it.there("a").up)
        await it.tells("a", tier="gpu", rejuvenation=1)
        assert it.there("a").calls == ["start"]


async def test_kv_memory_goes_to_who_is_wanted_to_have_it(tmp_path: Path) -> None:
    """An engine gives KV memory back before another gets it: at no instant do both have it."""
    a, b = (node_engine(n, weights_gb=8, kv_gb=20, enforced=True) for n in "ab")
    async with bench(tmp_path, a, b, elastic="enforced", at_start=("a", "b")) as it:
        await it.tells("a", tier="gpu")
        await it.tells("b", tier="gpu")
        it.there("a").used = it.there("b").used = 0
        it.there("a").running = it.there("b").running = 1
        await it.want(kv={"a": 15 * GB, "b": 5 * GB}, a="gpu", b="gpu")
        await it.tells("a", kv_bytes=15 * GB)
        await it.until(lambda: it.there("a").limit > 2 * it.there("b").limit)
        it.there("a").used = 12 * GB
        await it.want(kv={"a": 5 * GB, "b": 15 * GB}, a="gpu", b="gpu")
        await it.until(lambda: it.there("a").limit < 15 * GB)
        it.there("a").running = 0
        await it.until(lambda: it.there("b").limit > it.there("a").limit)


async def test_an_end_in_order_drains_and_leaves_no_server(tmp_path: Path) -> None:
    """SIGTERM: what runs is waited for, engines are announced to leave, all servers end, and the last report says so."""
    async with bench(tmp_path, node_engine("a"), node_engine("b"), at_start=("a", "b")) as it:
        await it.tells("b", tier="gpu")
        it.there("a").running = 1
        end = asyncio.create_task(it.node.drain())
        await it.tells("a", tier="gpu", to="disk")
        await it.tells("b", tier="disk")
        assert not end.done()
        it.there("a").running = 0
        await end
        await it.node.close()
        assert not it.there("a").up
        assert it.there("a").aborted == 0
        assert (await it.report("a")).tier == "disk"


async def test_a_bug_in_a_driver_costs_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent goes on, says what happened, and the other engine serves."""

    def prepare(it: Bench) -> None:
        async def breaks() -> str:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(it.there("a"), "start", breaks)

    async with bench(tmp_path, node_engine("a"), node_engine("b"), at_start=("a", "b"), prepare=prepare) as it:
        await it.tells("a", failed="ZeroDivisionError: a bug")
        await it.tells("b", tier="gpu")


async def test_a_report_that_does_not_arrive_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis away: engines stay as they are, and the next report tells."""
    queue = MemoryQueue()
    real, refusals = queue.report, [True] * 3

    async def sometimes(*args: Any, **kwargs: Any) -> None:
        if refusals:
            refusals.pop()
            raise QueueUnavailable
        await real(*args, **kwargs)

    monkeypatch.setattr(queue, "report", sometimes)
    async with bench(tmp_path, node_engine("a"), at_start=("a",), queue=queue) as it:
        await it.tells("a", tier="gpu")
        assert not refusals


async def test_a_model_in_the_page_cache_is_told_to_be_there(tmp_path: Path) -> None:
    """Prefetching reads the weights' files; letting go of them is a move as well. The tier is measured, not remembered."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as f:
        f.write(b"w" * 300_000)
        os.fsync(f.fileno())  # pages that must still be written cannot be let go of
    engine = node_engine("a", files=(file,))
    async with bench(tmp_path / "state", engine) as it:
        await it.want(a="disk")
        await it.tells("a", tier="disk")
        await it.want(a="host")
        await it.tells("a", tier="host")
        await it.want(a="gpu")
        await it.tells("a", tier="gpu")
        await it.want(a="host")
        await it.tells("a", tier="host")
        kinds = [(m.was, m.to) for m in it.node.report().moves if isinstance(m, Move)]
        assert kinds[-3:] == [("disk", "host"), ("host", "gpu"), ("gpu", "host")]
