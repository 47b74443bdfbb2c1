"""The app's side of the queue: a pass from its push to its end, and all that can come between."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from maestro_agents import client as client_module
from maestro_agents import room as room_module
from maestro_agents.client import Client, Pass
from maestro_agents.core import EngineSpec, Grant, Observation, Refusal, RunEnd, Status, Ticket
from maestro_agents.errors import (
    ConfigError,
    MaestroError,
    NoEngineFits,
    QueueFull,
    QueueUnavailable,
    RunGone,
    StageRefused,
    WaitTooLong,
)
from maestro_agents.nodes import EngineReport, NodeReport
from maestro_agents.policy import wire_priority
from maestro_agents.queue.embedded import EmbeddedRedis
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.settings import Settings

URL = "http://own/v1"
LEASE_S = 3.0


class Faults:
    """A queue with faults on demand, by command: it raises, or holds the command up before or after it is done."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.said: list[str] = []
        self.done: list[str] = []
        self.raises: dict[str, Exception] = {}
        self.before: dict[str, asyncio.Event] = {}
        self.after: dict[str, asyncio.Event] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.inner, name)
        if not asyncio.iscoroutinefunction(real):
            return real

        async def command(*args: Any, **kwargs: Any) -> Any:
            self.said.append(name)
            if name in self.before:
                await self.before[name].wait()
            fault = self.raises.get(name) or self.raises.get("all")
            if fault is not None:
                raise fault
            result = await real(*args, **kwargs)
            self.done.append(name)
            if name in self.after:
                await self.after[name].wait()
            return result

        return command


class App:
    """A client of its own, and questions to its room, which lives on another loop."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.room = client._room
        self._n = 0

    def ask_now(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.room.loop).result(20)

    async def ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.room.loop))

    async def do(self, f: Callable[..., Any], *args: Any) -> Any:
        """Call something on the room's loop, after all that was said before."""

        async def call() -> Any:
            return f(*args)

        return await self.ask(call())

    async def faults(self) -> Faults:
        """Put a faulty queue between the room and its queue."""
        await self.ask(self.room.ready.wait())
        inner: Any = self.room.queue
        faults = self.room.queue = Faults(inner)  # type: ignore[assignment]
        if hasattr(inner, "_tell"):  # the listener waits at the old one still
            await self.move_listener(faults)
        return faults

    async def move_listener(self, faults: Faults) -> None:
        """Make the listener ask again, by a word to nobody."""
        seen = faults.said.count("verdicts")
        nobody = Refusal(stage_id="-", reason="", retry_after_s=0)
        await self.do(faults.inner._tell, self.room.client_id, nobody)
        await until(lambda: faults.said.count("verdicts") > seen)

    async def event(self) -> asyncio.Event:
        return asyncio.Event()

    async def set(self, event: asyncio.Event) -> None:
        await self.do(event.set)

    def open(self, stage_id: str = "", *, url: str = URL, **more: Any) -> Pass:
        self._n += 1
        ticket = Ticket(
            stage_id=stage_id or f"s{self._n}", client_id="?", model="m", role="r", prompt_tokens=10
        ).evolve(**more)
        p = self.client.open(ticket, original_url=url)
        assert p is not None
        return p

    async def granted(self, stage_id: str = "", **more: Any) -> Pass:
        p = self.open(stage_id, **more)
        async with asyncio.timeout(10):
            await p.wait_async()
        return p

    def waiter(self, stage_id: str = "", **more: Any) -> tuple[Pass, asyncio.Task[EngineSpec]]:
        p = self.open(stage_id, **more)
        return p, asyncio.create_task(p.wait_async())

    async def ledger(self) -> dict[str, int]:
        """Reserved slots, those that drain included."""
        return dict((await self.ask(self.room.queue.ledger())).slots)

    async def draining(self) -> int:
        return len(await self.ask(self.room.queue.draining()))

    async def depth(self) -> int:
        return await self.ask(self.room.queue.depth("m"))

    async def observations(self) -> list[Observation | RunEnd]:
        return list((await self.ask(self.room.queue.read_log("", 20_000)))[1])

    async def quiet(self) -> None:
        """Wait until nothing is left of any stage: in the room, and in the queue."""
        room = self.room
        await until(lambda: not (room.waiting or room.held or room.local or room.local_queue or room.unsent))
        await until(self._empty)

    async def _empty(self) -> bool:
        return not await self.ledger() and not await self.depth()


async def until(holds: Callable[[], Awaitable[object] | object], limit_s: float = 20.0) -> None:
    """Wait for something of another thread that gives no event."""
    async with asyncio.timeout(limit_s):
        while True:
            found = holds()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def app(**settings: Any) -> Iterator[App]:
    client = Client(Settings.load(**{"lease_s": LEASE_S, **settings}))
    try:
        yield App(client)
    finally:
        client.close()


@contextlib.contextmanager
def fleet_app(folder: Path, *engines: str, slots: int = 1, more: str = "", **settings: Any) -> Iterator[App]:
    """A client that schedules a fleet inside its process."""
    text = "".join(
        f'[[engine]]\nid = "{e}"\nmodel = "m"\nurl = "http://{e}/v1"\nslots = {slots}\n{more}\n' for e in engines
    )
    path = folder / "fleet.toml"
    path.write_text(text)
    with app(fleet=path, **settings) as made:
        yield made


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What Maestro logged, warnings and worse."""
    caplog.set_level(logging.WARNING, logger="maestro")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "maestro"]


@pytest.fixture(autouse=True)
def clean_overrides() -> Iterator[None]:
    """What a test configures is undone."""
    yield
    client_module._overrides.clear()
    Client.reset()


# -- in one process ------------------------------------------------------------------------------------------------------
async def test_a_pass_from_push_to_finish() -> None:
    """Without Redis and fleet the caller's own URL is the engine; nothing is reserved at the end, all is recorded."""
    with app() as a:
        p = await a.granted("s", run_id="run")
        assert p.engine is not None
        assert p.engine.original
        assert p.engine.url == URL
        assert p.grant is not None
        assert p.grant.priority == wire_priority(p.ticket.due_at_s)
        p.sent()
        p.first_byte()
        assert await a.ledger() == {f"m@{URL}": 1}
        p.finish(output_tokens=7)
        p.finish(output_tokens=8)
        p.cancel()
        await a.quiet()
        (o,) = await a.observations()
        assert isinstance(o, Observation)
        assert (o.stage_id, o.status, o.output_tokens, o.prompt_tokens) == ("s", Status.DONE, 7, 10)
        assert o.granted_at_s <= o.first_byte_at_s <= o.finished_at_s


def test_the_sync_edge_beats_while_it_waits() -> None:
    """From a plain thread: the beat is called about every 0.1 s, and a grant that comes is taken."""
    with app(local_concurrency=1) as a:
        first, second = a.open(), a.open()
        assert first.wait().original
        beats: list[float] = []

        def beat() -> None:
            beats.append(time.monotonic())
            if len(beats) == 4:
                first.finish()

        assert second.wait(beat).original
        assert len(beats) >= 4
        assert 0.25 < beats[3] - beats[0] < 2
        assert second._patience_s < a.client.settings.max_wait_s - 0.25, "what was waited is spent"
        second.finish()


async def test_the_async_edge_beats_while_it_waits() -> None:
    """The same on a loop, which stays free."""
    with app(local_concurrency=1) as a:
        first, second = await a.granted(), a.open()
        beats: list[int] = []

        def beat() -> None:
            beats.append(1)
            if len(beats) == 3:
                first.finish()

        await second.wait_async(beat)
        assert len(beats) >= 3
        assert second._patience_s < a.client.settings.max_wait_s - 0.15, "what was waited is spent"


async def test_own_urls_share_nothing_and_each_is_bounded() -> None:
    """Two providers of one model: each serves ``local_concurrency`` at a time, and only its own callers."""
    with app(local_concurrency=1) as a:
        p = await a.granted(url="http://one/v1")
        q = await a.granted(url="http://two/v1")
        assert p.engine
        assert q.engine
        assert (p.engine.url, q.engine.url) == ("http://one/v1", "http://two/v1")
        third, task = a.waiter(url="http://two/v1")
        await until(a.depth)
        q.finish()
        assert (await task).url == "http://two/v1"
        third.finish()
        p.finish()
        await a.quiet()


async def test_a_model_outside_the_fleet_is_none_of_ours(tmp_path: Path) -> None:
    """It passes untouched; a model of the fleet does not."""
    with fleet_app(tmp_path, "e1") as a:
        other = Ticket(stage_id="s", client_id="c", model="gpt-x")
        assert a.client.open(other, original_url=URL) is None
        assert a.client.open(other.evolve(model="m"), original_url=URL) is not None


async def test_maximum_wait() -> None:
    """The stage is withdrawn, and the error says which setting it was."""
    with app(local_concurrency=1, max_wait_s=0.05) as a:
        p = await a.granted()
        with pytest.raises(WaitTooLong, match=r"within 0\.05 s \(MAESTRO_MAX_WAIT_S\)"):
            await a.granted()
        with pytest.raises(WaitTooLong):
            await asyncio.to_thread(a.open().wait)
        await until(lambda: not a.room.waiting)
        assert await a.depth() == 0
        p.finish()
        await a.quiet()


async def test_time_at_the_engine_is_no_wait(tmp_path: Path) -> None:
    """A call that came back after longer than the maximum wait may still be tried again."""
    with fleet_app(tmp_path, "e1", "e2", max_wait_s=0.6) as a:
        p = await a.granted()
        await asyncio.sleep(0.7)
        assert p.requeue(engine_down=True)
        assert await p.wait_async()
        p.finish()
        await a.quiet()


async def test_refusals_are_errors_that_say_why(tmp_path: Path) -> None:
    """A full queue, a deadline that is lost, an operator, a stage that fits nowhere: each its own class."""
    with fleet_app(tmp_path, "e1", max_queue=1, more="kv_tokens = 1000\nmax_model_len = 100000") as a:
        p = await a.granted(max_tokens=5)
        waits, task = a.waiter("waits", max_tokens=5)
        await until(a.depth)
        with pytest.raises(QueueFull, match="Retry after"):
            await a.granted(refuse_late=True)
        await a.ask(
            a.room.queue.refuse(Refusal(stage_id="waits", reason="operator", retry_after_s=0), waits.ticket, now_s=0)
        )
        with pytest.raises(StageRefused, match="operator"):
            await task
        for more, error in (
            ({"prompt_tokens": 5000}, NoEngineFits),
            ({"deadline_at_s": 1.0, "refuse_late": True}, StageRefused),
        ):
            with pytest.raises(error):
                await a.granted(**more)
        p.finish()
        await a.quiet()


async def test_off_is_off(tmp_path: Path) -> None:
    """Nothing is started and nothing is ours; words to it go nowhere."""
    before = threading.active_count()
    with app(mode="off", redis_url="redis://127.0.0.1:1/0") as a:
        assert threading.active_count() == before
        assert a.client.open(Ticket(stage_id="s", client_id="c", model="m"), original_url=URL) is None
        a.client.end_run(run_end("run"))
        a.client.describe("w", "{}")


def run_end(run_id: str) -> RunEnd:
    return RunEnd(run_id=run_id, workflow="w", outcome="cancelled", started_at_s=0, ended_at_s=1)


# -- withdrawn in every place --------------------------------------------------------------------------------------------
async def test_cancelled_before_it_was_ever_pushed() -> None:
    """Its `wait` ends at once and the queue never hears of it."""
    with app() as a:
        faults = await a.faults()
        p = a.open()
        p.cancel()
        with pytest.raises(RunGone):
            await p.wait_async()
        await a.quiet()
        assert "push" not in faults.said


@pytest.mark.parametrize("granted", [True, False])
@pytest.mark.parametrize("reached", [True, False])
async def test_cancelled_while_its_push_is_on_its_way(*, granted: bool, reached: bool) -> None:
    """Whether the queue granted or queued it, and whether it saw the push before the word of the end or after."""
    with app(local_concurrency=1) as a:
        holder = None if granted else await a.granted()
        faults = await a.faults()
        gate = (faults.after if reached else faults.before)["push"] = await a.event()
        p, task = a.waiter()
        await until(lambda: "push" in faults.said)
        task.cancel()
        await until(lambda: p.ended and not a.room.waiting)
        await a.set(gate)
        if holder:
            await until(lambda: faults.said.count("cancel") >= 1 + (not reached))
            assert await a.depth() == 0
            holder.finish()
        await a.quiet()


async def test_cancelled_while_its_grant_is_on_its_way() -> None:
    """The grant lies in the inbox when its caller goes away: it is given back, to the next in line."""
    with app(local_concurrency=1) as a:
        faults = await a.faults()
        first = await a.granted()
        p, task = a.waiter()
        await until(a.depth)
        faults.after["verdicts"] = gate = await a.event()
        first.finish()
        await until(lambda: a.room.queue.inner._stages and not a.room.queue.inner._ready["m"])  # type: ignore[attr-defined]
        task.cancel()
        await until(lambda: p.ended and not a.room.waiting)
        last, task = a.waiter()
        await a.set(gate)
        assert await task
        last.finish()
        await a.quiet()


async def test_cancelled_while_it_holds_a_grant(tmp_path: Path) -> None:
    """Before the request left the reservation is free; after that it drains, since the engine may compute.

    At the caller's own URL nothing drains: the bound there is on what this app keeps open.
    """
    for sent in (False, True):
        with app() as a:
            p = await a.granted()
            if sent:
                p.sent()
            p.cancel()
            await a.quiet()
    with fleet_app(tmp_path, "e1", slots=9) as a:
        (await a.granted()).cancel()
        await a.quiet()
        p = await a.granted()
        p.sent()
        p.cancel()
        await until(a.draining)
        assert await a.ledger() == {"e1": 1}


async def test_finish_after_cancel_and_cancel_after_finish() -> None:
    """The first word counts, from whatever thread."""
    with app() as a:
        p, q = await a.granted("p"), await a.granted("q")
        p.cancel()
        p.finish()
        q.finish()
        q.cancel()
        await a.quiet()
        assert [o.stage_id for o in await a.observations() if isinstance(o, Observation)] == ["q"]


async def test_two_ends_at_the_same_moment() -> None:
    """Two threads that both believe to be first: one end is told."""
    with app() as a:
        p = await a.granted()
        assert p.grant
        p.finish()
        p.ended = False
        p.cancel()
        p.ended = False
        p.finish(output_tokens=9)
        await a.quiet()
        assert len(await a.observations()) == 1
        faults = await a.faults()
        await a.quiet()
        assert "finish" not in faults.said


def test_a_wait_that_is_interrupted_leaves_nothing() -> None:
    """Ctrl-C in a thread that waits: KeyboardInterrupt goes up, the stage goes away, the slot is usable."""
    with app(local_concurrency=1) as a:
        holder = a.open()
        holder.wait()
        p = a.open()
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])

        def beat() -> None:
            if not timer.is_alive() and not timer.finished.is_set():
                timer.start()

        with pytest.raises(KeyboardInterrupt):
            p.wait(beat)
        timer.cancel()
        holder.finish()
        asyncio.run(a.quiet())
        q = a.open()
        q.wait()
        q.finish()


def test_a_loop_that_closes_on_a_waiting_call_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The caller's loop ends while its call is withdrawn: no exception in any callback, nothing left."""
    with app(local_concurrency=1) as a:
        holder = a.open()
        holder.wait()

        async def main() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(a.open().wait_async(), 0.05)

        for _ in range(5):
            asyncio.run(main())
        holder.finish()
        asyncio.run(a.quiet())
        gc.collect()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


async def test_the_end_of_a_run_wakes_all_who_wait_for_it() -> None:
    """At once and together, however slow the queue; other runs and what was granted are not touched."""
    with app(local_concurrency=1) as a:
        faults = await a.faults()
        holder = await a.granted(run_id="run")
        mine = [a.waiter(run_id="run")[1] for _ in range(3)]
        other, other_task = a.waiter(run_id="other")
        await until(lambda: len(a.room.waiting) == 4)
        gate = faults.before["cancel"] = await a.event()
        a.client.end_run(run_end("run"))
        for task in mine:
            with pytest.raises(RunGone):
                await task
        await a.set(gate)
        assert not other_task.done()
        holder.finish()
        assert await other_task
        other.finish()
        await a.quiet()
        assert [o.run_id for o in await a.observations() if isinstance(o, RunEnd)] == ["run"]


# -- again ---------------------------------------------------------------------------------------------------------------
async def test_a_dead_engine_is_excluded_and_attempts_are_counted(tmp_path: Path) -> None:
    """Elsewhere, under the same name and moment, until the attempts are used up."""
    with fleet_app(tmp_path, "e1", "e2", "e3", max_attempts=3) as a:
        p = await a.granted("s")
        seen: list[str] = []
        while True:
            assert p.engine
            seen.append(p.engine.engine_id)
            if not p.requeue(engine_down=True):
                break
            await p.wait_async()
        assert sorted(seen) == ["e1", "e2", "e3"]
        assert (p.ticket.stage_id, p.ticket.attempt) == ("s", 3)
        p.finish(ok=False)
        await a.quiet()
        (o,) = await a.observations()
        assert isinstance(o, Observation)
        assert (o.status, o.attempt) == (Status.FAILED, 3)


async def test_a_busy_engine_is_asked_again_after_a_pause_and_costs_no_attempt(tmp_path: Path) -> None:
    """Each time: also for a stage that had excluded another engine before."""
    with fleet_app(tmp_path, "e1", "e2", max_attempts=2) as a:
        p = await a.granted()
        assert p.requeue(engine_down=True)
        engine = await p.wait_async()
        began_s = time.monotonic()
        for _ in range(3):
            p.sent()
            assert p.requeue(engine_down=False, answered=True)
            assert (await p.wait_async()).engine_id == engine.engine_id
        assert time.monotonic() - began_s >= 3 * room_module.RETRY_S
        assert p.ticket.attempt == 2
        p.finish()
        await a.quiet()


@pytest.mark.parametrize(
    ("sent", "engine_down", "answered", "drains"),
    [
        (False, True, False, False),
        (False, False, False, False),
        (True, True, False, True),
        (True, False, False, True),  # it timed out: the engine may still compute
        (True, False, True, False),  # it said 503
        (True, True, True, False),
    ],
)
async def test_what_may_still_be_computed_drains(
    tmp_path: Path, *, sent: bool, engine_down: bool, answered: bool, drains: bool
) -> None:
    """A request that left and was not answered keeps its reservation when its stage moves on."""
    with fleet_app(tmp_path, "e1", "e2") as a:
        p = await a.granted()
        if sent:
            p.sent()
        p.requeue(engine_down=engine_down, answered=answered)
        await p.wait_async()
        assert await a.draining() == drains
        p.finish()


async def test_what_drains_is_remembered_by_a_withdrawal_in_the_pause(tmp_path: Path) -> None:
    """The caller goes away between a timeout and the word of it."""
    with fleet_app(tmp_path, "e1") as a:
        p = await a.granted()
        p.sent()
        assert p.requeue(engine_down=False)
        p.cancel()
        await until(a.draining)
        await until(lambda: not a.room.waiting and not a.room._tasks)
        assert await a.ledger() == {"e1": 1}
        assert await a.depth() == 0


async def test_nothing_is_replayed_after_the_first_byte_or_the_end(tmp_path: Path) -> None:
    """The caller's error stands."""
    with fleet_app(tmp_path, "e1") as a:
        p = await a.granted()
        p.first_byte()
        assert not p.requeue(engine_down=False)
        p.finish(ok=False)
        assert not p.requeue(engine_down=True)
        assert not a.open().requeue(engine_down=True)
        await a.quiet()


async def test_a_verdict_that_is_told_twice_is_taken_once(tmp_path: Path) -> None:
    """While it is held, after it was given back, and after its end: the old word changes nothing."""
    with fleet_app(tmp_path, "e1", "e2", slots=2) as a:
        p = await a.granted("s")
        old = p.grant
        assert old
        await a.do(a.room.deliver, old)
        assert p.grant is old
        faults = await a.faults()
        gate = faults.before["requeue"] = await a.event()
        assert p.requeue(engine_down=True)
        await until(lambda: "requeue" in faults.said)
        await a.do(a.room.deliver, old)
        assert p.grant is None
        await a.set(gate)
        await p.wait_async()
        assert p.grant
        assert p.grant.token > old.token
        await a.do(a.room.deliver, old)
        assert (await a.ledger()) == {p.grant.engine_id: 1}
        p.finish()
        await a.do(a.room.deliver, old)
        await a.quiet()
        assert len(await a.observations()) == 1


async def test_a_requeue_that_the_queue_does_not_know_goes_in_anew(tmp_path: Path) -> None:
    """Its lease was lost meanwhile: a new name, the same stage."""
    with fleet_app(tmp_path, "e1", "e2") as a:
        p = await a.granted("s")
        await a.ask(a.room.queue.cancel("s", "m", client_id=None, now_s=0, draining=False))
        assert p.requeue(engine_down=True)
        await p.wait_async()
        assert p.ticket.stage_id == "s~1"
        p.finish()
        await a.quiet()


@pytest.mark.parametrize("fault", [QueueUnavailable(), RuntimeError("a bug")])
async def test_a_requeue_that_fails_gives_the_old_grant_back_later(tmp_path: Path, fault: Exception) -> None:
    """The caller is served under a new name; the queue hears of the old one when it listens again."""
    with fleet_app(tmp_path, "e1", "e2") as a:
        faults = await a.faults()
        p = await a.granted("s")
        faults.raises["requeue"] = fault
        assert p.requeue(engine_down=True)
        await p.wait_async()
        faults.raises.clear()
        await a.ask(a.room.beat())
        assert p.grant
        assert await a.ledger() == {p.grant.engine_id: 1}
        p.finish()
        await a.quiet()


async def test_a_grant_on_an_engine_that_just_died_is_asked_again(tmp_path: Path) -> None:
    """The fleet that is known here does not hold the engine: the stage waits for another, and its caller with it."""
    with fleet_app(tmp_path, "e1", "e2") as a:
        await a.ask(a.room.ready.wait())
        await a.do(a.room.fleet.pop, "e1")
        holder, task = a.waiter()
        q, other = a.waiter()
        p_engine = await task
        assert p_engine.engine_id == "e2"
        await asyncio.sleep(2 * room_module.RETRY_S)
        assert not other.done()
        await a.do(a.room.fleet.__setitem__, "e1", a.room.scheduler.engines["e1"])
        assert (await other).engine_id == "e1"
        q.finish()
        # one that stays dead
        await a.do(a.room.fleet.pop, "e1")
        q, other = a.waiter()
        await until(lambda: q.spent_token)
        await a.do(a.room.scheduler.engines.pop, "e1")
        await a.ask(a.room.scheduler.publish())
        holder.finish()
        assert (await asyncio.wait_for(other, 10)).engine_id == "e2"
        q.finish()
        await a.quiet()


# -- bugs ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["push", "verdicts", "renew", "finish", "cancel", "requeue", "end_run", "describe"])
async def test_a_bug_of_the_queue_breaks_no_call(tmp_path: Path, command: str, told: Callable[[], list[str]]) -> None:
    """Calls are answered while it lasts, the services live on, and it is told once, not once per call."""
    with fleet_app(tmp_path, "e1", slots=9, outage_after_s=0.05, local_concurrency=9) as a:
        faults = await a.faults()
        faults.raises[command] = RuntimeError("a bug")

        async def call(n: int) -> None:
            p = await a.granted(f"{command}-{n}")
            if n % 3 == 0:
                p.requeue(engine_down=False)
                await p.wait_async()
            if n % 2:
                p.finish()
            else:
                p.cancel()
            a.client.describe(f"w{n}", "{}")
            a.client.end_run(run_end(f"r{n}"))

        for n in range(4):
            await asyncio.wait_for(call(n), 15)
            await a.ask(a.room.beat())
        faults.raises.clear()
        seen = faults.said.count("renew")
        await until(lambda: faults.said.count("renew") > seen)
        await a.move_listener(faults)
        assert len([line for line in told() if "a bug in Maestro" in line]) <= 2, told()
        p, task = a.waiter()
        assert await task
        p.finish()


async def test_a_listener_with_a_bug_is_replaced_by_the_heartbeat(tmp_path: Path) -> None:
    """Verdicts cannot be read at all: who waits gets the grant all the same."""
    with fleet_app(tmp_path, "e1") as a:
        faults = await a.faults()
        faults.raises["verdicts"] = RuntimeError("a bug")
        holder = await a.granted()
        q, task = a.waiter()
        await until(a.depth)
        holder.finish()
        assert await asyncio.wait_for(task, 10)
        q.finish()
        await a.quiet()


async def test_a_push_with_a_bug_keeps_within_local_concurrency(tmp_path: Path) -> None:
    """No storm on the engines, and what comes after the bug goes to the queue again."""
    with fleet_app(tmp_path, "e1", slots=8, local_concurrency=2) as a:
        faults = await a.faults()
        faults.raises["push"] = RuntimeError("a bug")
        passes = [a.waiter() for _ in range(6)]
        await until(lambda: sum(t.done() for _, t in passes) == 2 and len(a.room.local_queue) == 4)
        faults.raises.clear()
        p = await a.granted()
        assert p.grant
        assert p.grant.token
        p.finish()
        while passes:
            for p, t in [x for x in passes if x[1].done()]:
                p.finish()
                passes.remove((p, t))
            await asyncio.sleep(0)
            assert len(a.room.local) <= 2
        await a.quiet()


# -- Maestro is out ------------------------------------------------------------------------------------------------------
async def out(a: App, fault: Exception | None = None) -> Faults:
    """The queue does not answer, and that has been noticed."""
    faults = await a.faults()
    faults.raises["all"] = fault or QueueUnavailable("Redis does not answer.")
    await a.ask(a.room.beat())
    await until(a.room._out)
    return faults


async def back(a: App, faults: Faults) -> None:
    faults.raises.clear()
    await a.ask(a.room.beat())


async def test_an_outage_admits_locally_and_never_more_than_allowed(
    tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    """To the known engines in turn, two at a time, nested ones beside; said once, and once when it is over."""
    with fleet_app(tmp_path, "e1", "e2", outage_after_s=0.05, local_concurrency=2) as a:
        faults = await out(a)
        most = 0
        running: set[Pass] = set()

        async def call(n: int) -> str:
            nonlocal most
            p = a.open(f"s{n}")
            engine = await p.wait_async()
            running.add(p)
            most = max(most, len(running))
            await asyncio.sleep(random.random() * 0.01)
            running.discard(p)
            if n % 5 == 0:
                p.sent()
                assert p.requeue(engine_down=True)
                await p.wait_async()
            p.cancel() if n % 3 == 0 else p.finish()
            return engine.engine_id

        tasks = [asyncio.create_task(call(n)) for n in range(60)]
        await asyncio.sleep(0.01)
        for task in tasks[10:20]:
            task.cancel()
        found = [e for e in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(e, str)]
        assert set(found) == {"e1", "e2"}
        assert most == 2
        await until(lambda: not a.room.local and not a.room.local_queue and not a.room.waiting)
        parents = [await a.granted(), await a.granted()]
        child = await a.granted(nested=True)
        for p in (*parents, child):
            p.finish()
        await back(a, faults)
        await a.quiet()
    assert [line.split(":")[0].split(".")[0] for line in told()] == ["Maestro is out", "Maestro is back"]


async def test_those_who_wait_in_the_queue_are_rescued(tmp_path: Path) -> None:
    """They were pushed before the outage; when the queue is back it hears that they wait no more."""
    with fleet_app(tmp_path, "e1", outage_after_s=0.05) as a:
        holder = await a.granted("holder")
        p, task = a.waiter("s")
        await until(a.depth)
        faults = await out(a)
        assert (await task).engine_id == "e1"
        assert p.grant
        assert p.grant.token == 0
        p.finish()
        await back(a, faults)
        assert await a.depth() == 0
        faults = await out(a)
        holder.finish()
        await until(lambda: a.room.unsent)
        await back(a, faults)
        await a.quiet()
        assert [o.stage_id for o in await a.observations() if isinstance(o, Observation)] == ["holder"]


async def test_those_who_wait_for_room_in_the_process_return_to_the_queue(tmp_path: Path) -> None:
    """The local slot is taken for long: with Maestro back they need not wait for it."""
    with fleet_app(tmp_path, "e1", outage_after_s=0.05, local_concurrency=1) as a:
        faults = await out(a)
        long = await a.granted()
        p, task = a.waiter("s")
        gone, gone_task = a.waiter("gone")
        ended, ended_task = a.waiter("ended", run_id="run")
        await until(lambda: len(a.room.local_queue) == 3)
        gone_task.cancel()
        a.client.end_run(run_end("run"))
        with pytest.raises(RunGone):
            await ended_task
        await until(lambda: len(a.room.local_queue) == 1)
        assert len(a.room.waiting) == 1
        await back(a, faults)
        assert await task
        assert p.grant
        assert p.grant.token > 0
        p.finish()
        long.finish()
        assert gone.ended
        assert ended.ended
        await a.quiet()


@pytest.mark.parametrize("fault", [QueueUnavailable("Redis does not answer."), RuntimeError("a bug in renew")])
async def test_closed_fails_and_original_url_goes_there(tmp_path: Path, fault: Exception) -> None:
    """By the setting; within a grace period nobody fails."""
    with fleet_app(tmp_path, "e1", outage_after_s=0.3, on_outage="closed") as a:
        faults = await a.faults()
        faults.raises["all"] = QueueUnavailable("Redis does not answer.")
        _, task = a.waiter()
        await until(lambda: "push" in faults.said)
        await asyncio.sleep(0.1)
        assert not task.done()
        faults.raises["all"] = fault
        with pytest.raises(QueueUnavailable, match="closed: the call was not made"):
            await task
        await back(a, faults)
        (await a.granted()).finish()
        await a.quiet()
    with fleet_app(tmp_path, "e1", outage_after_s=0.05, on_outage="original_url") as a:
        await out(a, fault)
        p = await a.granted()
        assert p.engine
        assert p.engine.original
        assert p.engine.url == URL
        p.finish()
        await until(lambda: not a.room.local)


async def test_an_outage_within_the_grace_period_is_waited_out(tmp_path: Path) -> None:
    """A restart of Redis of a second changes nothing but a pause."""
    with fleet_app(tmp_path, "e1", outage_after_s=30) as a:
        faults = await a.faults()
        faults.raises["all"] = QueueUnavailable("Redis does not answer.")
        p, task = a.waiter()
        await until(lambda: "push" in faults.said)
        faults.raises.clear()
        assert (await task).engine_id == "e1"
        assert p.grant
        assert p.grant.token > 0
        p.finish()
        await a.quiet()


async def test_reports_are_kept_and_told_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, up to a bound; one that has a bug does not hold up the others."""
    monkeypatch.setattr(room_module, "UNSENT_LIMIT", 5)
    with fleet_app(tmp_path, "e1", slots=9, outage_after_s=30) as a:
        passes = [await a.granted(f"s{n}") for n in range(8)]
        faults = await a.faults()
        faults.raises["finish"] = QueueUnavailable()
        for p in passes:
            p.finish()
            await a.do(lambda: None)
        await until(lambda: len(a.room.unsent) == 5 and not a.room.held)
        faults.raises["finish"] = RuntimeError("a bug")
        faults.raises["end_run"] = QueueUnavailable()
        a.client.end_run(run_end("run"))
        await a.ask(a.room.beat())
        assert not a.room.unsent or len(a.room.unsent) == 1
        faults.raises.clear()
        await a.ask(a.room.beat())
        assert not a.room.unsent


async def test_shut_down_answers_those_who_wait(tmp_path: Path) -> None:
    """Their calls go to their own URL; under ``closed`` they fail; what was held is given back."""
    for on_outage in ("open", "closed"):
        with fleet_app(tmp_path, "e1", on_outage=on_outage) as a:
            held = await a.granted()
            held.sent()
            p, task = a.waiter()
            early = a.open()
            await until(a.depth)
            queue = a.room.queue
            await asyncio.to_thread(a.client.close)
            late = asyncio.create_task(early.wait_async())
            for waiting in (task, late):
                if on_outage == "open":
                    assert (await asyncio.wait_for(waiting, 5)).original
                else:
                    with pytest.raises(QueueUnavailable, match="shut down"):
                        await asyncio.wait_for(waiting, 5)
            for q in (held, p, early):
                q.finish()
            assert await queue.depth("m") == 0
            assert len(await queue.draining()) == 1, "its request is still on the engine"
            assert not a.room._thread.is_alive()


# -- many ----------------------------------------------------------------------------------------------------------------
async def test_ten_thousand_stages_leave_nothing(tmp_path: Path) -> None:
    """Every book of the room is empty after them, and its size is bounded where it remembers."""
    with fleet_app(tmp_path, "e1", "e2", slots=50) as a:

        async def caller(n: int) -> None:
            for i in range(100):
                p = a.open(f"{n}-{i}", run_id=f"{n}-{i}")
                await p.wait_async()
                if i % 10 == 0:
                    p.cancel()
                else:
                    p.finish()
                a.client.describe(f"w{n}-{i}", "{}")
                if i % 5 == 0:
                    a.client.end_run(run_end(f"{n}-{i}"))

        await asyncio.gather(*(caller(n) for n in range(100)))
        await a.quiet()
        room = a.room
        await until(lambda: not room._tasks)
        assert len(room.described) == client_module.DESCRIBED_LIMIT
        a.client.describe("one more", "{}")
        assert len(room.described) == client_module.DESCRIBED_LIMIT
        assert not room.unsent
        gc.collect()
        assert sum(isinstance(o, Pass) for o in gc.get_objects()) < 100


def test_any_mix_of_threads_and_ends_leaks_nothing(tmp_path: Path) -> None:
    """Finish, cancel, requeue and timeouts at random moments, from many threads and loops, with outages in between."""
    with fleet_app(tmp_path, "e1", "e2", slots=3, outage_after_s=0.05, local_concurrency=2) as a:
        asyncio.run(a.faults())
        stop = threading.Event()
        most: list[int] = []

        def caller(seed: int) -> None:
            rng = random.Random(seed)
            for i in range(40):
                p = a.open(f"{seed}-{i}", run_id=f"run-{rng.randrange(9)}")
                p._patience_s = rng.choice((0.001, 0.01, 20))
                killer = threading.Timer(rng.random() * 0.01, p.cancel)
                with contextlib.suppress(WaitTooLong, RunGone, StageRefused):
                    if rng.random() < 0.2:
                        killer.start()
                    wait = p.wait if rng.random() < 0.5 else functools.partial(asyncio.run, p.wait_async())
                    wait()
                    if rng.random() < 0.3:
                        p.sent()
                        if p.requeue(engine_down=rng.random() < 0.5, answered=True):
                            p.wait()
                    p.cancel() if rng.random() < 0.3 else p.finish()
                p.cancel()
                if rng.random() < 0.1:
                    a.client.end_run(run_end(f"run-{rng.randrange(9)}"))

        def faulty() -> None:
            queue: Any = a.room.queue
            while not stop.wait(0.05):
                queue.raises["all"] = QueueUnavailable()
                a.ask_now(a.room.beat())
                stop.wait(0.1)
                queue.raises.clear()
                a.ask_now(a.room.beat())
                most.append(len(a.room.local))

        threads = [threading.Thread(target=caller, args=(n,)) for n in range(12)]
        trouble = threading.Thread(target=faulty)
        for t in (*threads, trouble):
            t.start()
        for t in threads:
            t.join()
        stop.set()
        trouble.join()
        assert max(most) <= 2

        async def end() -> None:
            await a.ask(a.room.beat())
            for r in await a.ask(a.room.queue.draining()):
                await a.ask(a.room.queue.settle(r))
            await a.quiet()

        asyncio.run(end())


# -- settings, processes -------------------------------------------------------------------------------------------------
def test_configure_refuses_at_once_and_keeps_what_was(tmp_path: Path) -> None:
    """A wrong value or fleet file is an error where it is said; the running client is not touched."""
    Client.configure(local_concurrency=3)
    client = Client.current()
    with pytest.raises(ConfigError, match="local_concurrency"):
        Client.configure(local_concurrency=0)
    with pytest.raises(ConfigError, match="no such file"):
        Client.configure(fleet=tmp_path / "none.toml")
    assert Client.current() is client
    assert Client.current().settings.local_concurrency == 3
    Client.configure(local_concurrency=4)
    assert Client.current() is not client
    assert Client.current().settings.local_concurrency == 4


def script(text: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own."""
    prelude = """
        import os, sys, threading
        from maestro_agents.client import Client
        from maestro_agents.core import Ticket, RunEnd
        def call(name, finish=True):
            p = Client.current().open(Ticket(stage_id=name, client_id="c", model="m"), original_url="http://own/v1")
            engine = p.wait()
            if finish:
                p.finish(output_tokens=5)
            return engine
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(text)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_fork_starts_anew() -> None:
    """Parent and child each make calls, also with a pass of the parent's in the child's hands; neither hangs nor warns."""
    done = script("""
        assert call("before").original
        held = Client.current().open(Ticket(stage_id="h", client_id="c", model="m"), original_url="http://own/v1")
        held.wait()
        unborn = Client.current().open(Ticket(stage_id="u", client_id="c", model="m"), original_url="http://own/v1")
        parent = Client.current()
        pid = os.fork()
        if not pid:
            import gc; gc.collect()
            assert unborn.wait().original
            held.finish(); unborn.finish()
            assert Client.current() is not parent
            assert Client.current().client_id != parent.client_id
            assert call("child").original
            Client.reset()
            sys.stdout.write("child ok\\n"); sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert Client.current() is parent
        assert call("after").original
        held.finish()
        print("parent ok")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "child ok\nparent ok\n", "")


def test_a_short_scripts_last_words_reach_redis(redis_url: str, pool: str) -> None:
    """It ends right after its call: finish and end of run are in the log, and what it held is given back."""
    queue_of = functools.partial(RedisQueue, redis_url, pool=pool, lease_s=LEASE_S)

    async def fleet() -> None:
        queue = queue_of()
        clock = RedisClock()
        await clock.sync(queue)
        s = Scheduler(queue, [engine("e1", slots=4)], clock=clock, holder="h", lease_s=60)
        assert await s.lead()
        await queue.close()

    asyncio.run(fleet())
    done = script(
        """
        assert call("last").engine_id == "e1"
        call("held", finish=False)
        Client.current().end_run(RunEnd(run_id="r", workflow="w", outcome="done", started_at_s=0, ended_at_s=1))
        """,
        MAESTRO_REDIS_URL=redis_url,
        MAESTRO_POOL=pool,
    )
    assert (done.returncode, done.stderr) == (0, "")

    async def look() -> None:
        queue = queue_of()
        _, entries = await queue.read_log("", 10)
        assert {type(e).__name__ for e in entries} == {"Observation", "RunEnd"}
        assert await queue.running() == []
        await queue.close()

    asyncio.run(look())


# -- with a real Redis ---------------------------------------------------------------------------------------------------
def engine(engine_id: str, **more: Any) -> EngineSpec:
    return EngineSpec(**{"engine_id": engine_id, "url": f"http://{engine_id}/v1", "model": "m", "slots": 1, **more})


@contextlib.asynccontextmanager
async def scheduler(url: str, pool: str, *engines: EngineSpec) -> AsyncIterator[Scheduler]:
    """A scheduler on this loop, until the end of the block."""
    queue = RedisQueue(url, pool=pool, lease_s=LEASE_S)
    clock = RedisClock()
    await clock.sync(queue)
    made = Scheduler(queue, engines, clock=clock, holder=os.urandom(4).hex(), lease_s=LEASE_S)
    task = asyncio.create_task(made.run())
    try:
        await until(lambda: made.leading)
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await queue.close()


@contextlib.asynccontextmanager
async def joined(url: str, pool: str, **settings: Any) -> AsyncIterator[App]:
    """A client of a pool, closed without stopping this loop, which may carry the scheduler."""
    client = Client(Settings.load(**{"redis_url": url, "pool": pool, "lease_s": LEASE_S, **settings}))
    try:
        yield App(client)
    finally:
        await asyncio.to_thread(client.close)


async def test_through_redis(redis_url: str, pool: str) -> None:
    """Fast path, queue, requeue, withdrawal and end of run: nothing is left."""
    async with scheduler(redis_url, pool, engine("e1"), engine("e2")), joined(redis_url, pool) as a:
        p, q = await a.granted("p"), await a.granted("q")
        assert p.grant
        assert p.grant.fast
        third, task = a.waiter("third", run_id="run")
        fourth, fourth_task = a.waiter("fourth", run_id="other")
        await until(lambda: a.room.waiting.get("fourth") is fourth and fourth.queued)
        a.client.end_run(run_end("run"))
        with pytest.raises(RunGone):
            await task
        assert p.requeue(engine_down=True)
        q.finish()
        assert await fourth_task
        fourth.finish()
        await p.wait_async()
        p.finish()
        assert third.ended
        await a.quiet()


async def test_a_push_on_its_way_is_not_mistaken_for_one_that_was_lost(redis_url: str, pool: str) -> None:
    """Heartbeats while pushes and requeues are in flight rename nothing and push nothing twice."""
    async with scheduler(redis_url, pool, engine("e1"), engine("e2")), joined(redis_url, pool) as a:
        p = await a.granted("p")
        faults = await a.faults()
        gates = [await a.event(), await a.event()]
        faults.before["push"], faults.after["requeue"] = gates
        _, task = a.waiter("q")
        assert p.requeue(engine_down=True)
        await until(lambda: {"push", "requeue"} <= set(faults.said))
        for _ in range(3):
            await a.ask(a.room.beat())
        for gate in gates:
            await a.set(gate)
        await task
        await p.wait_async()
        assert (p.ticket.stage_id, sorted(a.room.held)) == ("p", ["p", "q"])
        assert faults.said.count("push") == 1
        # the heartbeat's answer is older than the push's
        faults.before["push"], faults.after["renew"] = gates = [await a.event(), await a.event()]
        late, task = a.waiter("late")
        await until(lambda: faults.said.count("push") == 2)
        heartbeat = asyncio.create_task(a.ask(a.room.beat()))
        seen = faults.done.count("renew")
        await until(lambda: faults.done.count("renew") > seen)
        await a.set(gates[0])
        await until(lambda: late.queued)
        await a.set(gates[1])
        await heartbeat
        await until(lambda: not a.room._tasks)
        assert list(a.room.waiting) == ["late"]
        task.cancel()


async def test_a_grant_whose_message_was_lost_is_found(redis_url: str, pool: str) -> None:
    """The connection broke with the verdict on it: the next heartbeat asks for it."""
    async with scheduler(redis_url, pool, engine("e1")), joined(redis_url, pool) as a:
        holder = await a.granted()
        faults = await a.faults()
        q, task = a.waiter("q")
        await until(lambda: q.queued)
        await until(lambda: "verdicts" in faults.said, 5)

        def lose(_verdict: object) -> None:
            lost.set()

        lost = threading.Event()
        real, a.room.deliver = a.room.deliver, lose  # type: ignore[method-assign]
        holder.finish()
        await until(lost.is_set)
        a.room.deliver = real  # type: ignore[method-assign]
        assert (await asyncio.wait_for(task, 10)).engine_id == "e1"
        q.finish()
        await a.quiet()


async def test_a_refusal_whose_message_was_lost_is_found(redis_url: str, pool: str) -> None:
    """An operator refused the stage while nobody listened: its caller does not wait for ever, nor is it pushed again."""
    async with scheduler(redis_url, pool, engine("e1")), joined(redis_url, pool) as a:
        holder = await a.granted()
        faults = await a.faults()
        q, task = a.waiter("q")
        await until(lambda: q.queued)
        real, a.room.deliver = a.room.deliver, lambda _verdict: None  # type: ignore[method-assign]
        refusal = Refusal(stage_id="q", reason="operator", retry_after_s=0)
        assert await a.ask(faults.refuse(refusal, q.ticket, now_s=a.client.now_s()))
        with pytest.raises(StageRefused):
            await asyncio.wait_for(task, 10)
        a.room.deliver = real  # type: ignore[method-assign]
        assert faults.said.count("push") == 1
        holder.finish()
        await a.quiet()


async def test_an_operators_refusal(redis_url: str, pool: str) -> None:
    """`maestro queue cancel` reaches the caller at once."""
    async with scheduler(redis_url, pool, engine("e1")), joined(redis_url, pool) as a:
        holder = await a.granted()
        q, task = a.waiter("q")
        await until(lambda: q.queued)
        refusal = Refusal(stage_id="q", reason="operator", retry_after_s=0)
        assert await a.ask(a.room.queue.refuse(refusal, q.ticket, now_s=a.client.now_s()))
        with pytest.raises(StageRefused, match="An operator withdrew this call"):
            await task
        holder.finish()
        await a.quiet()


async def test_a_stage_that_was_reaped_goes_in_anew(redis_url: str, pool: str) -> None:
    """This process stood still for too long and was believed dead: who waits is served all the same."""
    async with scheduler(redis_url, pool, engine("e1")) as s, joined(redis_url, pool) as a:
        holder = await a.granted("holder")
        q, task = a.waiter("q")
        await until(lambda: q.queued)
        assert set(await s.queue.reap(now_s=a.client.now_s() + 10 * LEASE_S)) == {"holder", "q"}
        for reservation in await s.queue.draining():
            assert await s.queue.settle(reservation)
        await a.ask(a.room.beat())
        assert q.ticket.stage_id == "q~1"
        holder.finish()
        assert (await asyncio.wait_for(task, 15)).engine_id == "e1"
        q.finish()
        await a.quiet()


async def test_the_models_of_a_dead_engine_stay_ours(redis_url: str, pool: str) -> None:
    """While no engine of a model lives its calls wait; they do not leave for a URL that the fleet replaced."""
    async with scheduler(redis_url, pool, engine("e1"), engine("o1", model="other")) as s:
        async with joined(redis_url, pool) as a:
            (await a.granted()).finish()
            spec = s.engines.pop("e1")
            await s.publish()
            await a.ask(a.room.beat())
            assert list(a.room.fleet) == ["o1"]
            p, task = a.waiter()
            await until(lambda: p.queued)
            await s.add_engine(spec)
            assert (await task).engine_id == "e1"
            p.finish()
            await a.quiet()


async def test_no_scheduler_is_an_outage_and_its_return_is_noticed(
    redis_url: str, pool: str, told: Callable[[], list[str]]
) -> None:
    """Redis lives, nobody leads: after the grace period calls go on locally, until somebody does."""
    async with joined(redis_url, pool, outage_after_s=0.2) as a:
        async with scheduler(redis_url, pool, engine("e1")):
            holder = await a.granted()
            p, task = a.waiter("s")
            await until(lambda: p.queued)
        assert (await asyncio.wait_for(task, 15)).engine_id == "e1"
        assert p.grant
        assert p.grant.token == 0
        q = await a.granted()
        assert q.grant
        assert q.grant.token == 0
        for x in (holder, p, q):
            x.finish()
        assert "no scheduler leads this pool. Start `maestro scheduler`" in told()[0]
        async with scheduler(redis_url, pool, engine("e1")):
            await until(lambda: a.room.down_since_s is None)
            p = await a.granted()
            assert p.grant
            assert p.grant.token > 0
            p.finish()
            await a.quiet()
    assert len(told()) == 2


async def test_a_pool_without_any_scheduler_passes_by(redis_url: str, pool: str, told: Callable[[], list[str]]) -> None:
    """Nobody ever published a fleet: calls go to their own URL, told once; under ``closed`` they fail."""
    async with joined(redis_url, pool) as a:
        for _ in range(2):
            p = await a.granted()
            assert p.engine
            assert p.engine.original
            p.finish()
    assert [line.split(":")[0] for line in told()] == [f"no scheduler has published a fleet in pool {pool!r}"]
    async with joined(redis_url, pool, on_outage="closed") as a:
        with pytest.raises(QueueUnavailable, match="published"):
            await a.granted()


async def test_a_model_that_sleeps_on_a_node_is_waited_for_beside_a_fleet_that_serves_others(
    redis_url: str, pool: str
) -> None:
    """No engine of the published fleet has it: its calls are ours all the same, as soon as we know that fleet."""
    asleep = EngineReport(spec=EngineSpec(engine_id="n", url="", model="m"), gpu_id="g", tier="sleeping", to="sleeping")
    queue = RedisQueue(redis_url, pool=pool)
    await queue.report(NodeReport(node_id="n", engines=[asleep]), now_s=await queue.server_time_s(), ttl_s=60.0)
    async with (
        scheduler(redis_url, pool, dataclasses.replace(engine("e1"), model="other")),
        joined(redis_url, pool) as a,
    ):
        await until(lambda: "other" in a.room.models)
        waiting, task = a.waiter()
        await until(a.depth)
        waiting.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await a.quiet()
    await queue.close()


async def test_a_redis_that_is_not_there_yet(pool: str, told: Callable[[], list[str]]) -> None:
    """A program that starts before its Redis is answered, and joins when it comes."""
    with EmbeddedRedis() as server:
        if server.url is None:
            pytest.skip("no Redis server here")
        url = server.url
        server._process.stop()  # type: ignore[union-attr]
        async with joined(url, pool, outage_after_s=0.2) as a:
            p = await a.granted()
            assert p.engine
            assert p.engine.original
            p.finish()
            await asyncio.to_thread(server.restart)
            async with scheduler(url, pool, engine("e1")):
                await until(lambda: a.room.models and a.room.down_since_s is None)
                assert a.room._sync_clock is None
                q = await a.granted()
                assert q.engine
                assert q.engine.engine_id == "e1"
                q.finish()
                await a.quiet()
    assert told()[0].startswith("Maestro is out: Redis does not answer")
    assert told()[-1] == "Maestro is back."


async def test_a_redis_that_was_killed_learns_what_it_forgot(pool: str) -> None:
    """Kill -9 and an empty start: held grants are announced, who waits goes in anew, ends are told, no slot is lost."""
    with EmbeddedRedis() as server:
        if server.url is None:
            pytest.skip("no Redis server here")
        url = server.url
        async with scheduler(url, pool, engine("e1", slots=2)), joined(url, pool, outage_after_s=30) as a:
            held, ended = await a.granted("held"), await a.granted("ended")
            waits, task = a.waiter("waits")
            await until(lambda: waits.queued)
            await asyncio.to_thread(functools.partial(server.restart, kill=True))
            ended.finish()
            late, late_task = a.waiter("late")
            await until(lambda: a.room.down_since_s is None and "waits" not in a.room.waiting)

            async def announced() -> bool:
                with contextlib.suppress(QueueUnavailable):
                    return "held" in [r.ticket.stage_id for r in await a.ask(a.room.queue.running())]
                return False

            await until(announced)
            first, _ = await asyncio.wait((task, late_task), return_when=asyncio.FIRST_COMPLETED, timeout=30)
            assert len(first) == 1, "one slot is free once the hold is over"
            assert await a.ledger() == {"e1": 2}
            held.finish()
            await asyncio.wait_for(asyncio.gather(task, late_task), 20)
            waits.finish()
            late.finish()
            await a.quiet()


async def test_a_redis_that_hangs_is_an_outage_too(pool: str) -> None:
    """Stopped, not dead: nothing is refused, nothing is answered. Calls go on after the grace period all the same."""
    with EmbeddedRedis() as server:
        if server.pid is None or server.url is None:
            pytest.skip("no Redis server here")
        async with scheduler(server.url, pool, engine("e1")), joined(server.url, pool, outage_after_s=0.5) as a:
            holder = await a.granted()
            q, task = a.waiter("q")
            await until(lambda: q.queued)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                assert (await asyncio.wait_for(task, 10)).engine_id == "e1"
                p = await asyncio.wait_for(a.granted(), 10)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            for x in (holder, q, p):
                x.finish()
            await until(lambda: a.room.down_since_s is None)
            await a.quiet()


def test_the_names_of_stages_that_begin_anew() -> None:
    """They count up, whatever a caller put into a name."""
    renamed = room_module._renamed
    assert [renamed("s"), renamed("s~1"), renamed("s~9"), renamed("a~b"), renamed("~3"), renamed("x~²")] == [
        "s~1", "s~2", "s~10", "a~b~1", "~3~1", "x~²~1",
    ]  # fmt: skip


def test_every_error_of_a_wait_is_ours() -> None:
    """What `Pass.wait` may raise has one root, so that an integration can tell a refusal from a bug."""
    for error in (QueueFull, StageRefused, NoEngineFits, WaitTooLong, RunGone, QueueUnavailable):
        assert issubclass(error, MaestroError)
    assert not issubclass(Grant, MaestroError)
