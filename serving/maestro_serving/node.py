"""The node agent: one per GPU host. It carries out what is wanted of its engines and reports what is true.

It decides nothing: what is wanted comes from the scheduler's placement (`maestro_agents.nodes.Wanted`), what comes next is
found by `maestro_serving.reconcile`, and what a GPU holds is kept by `maestro_serving.elastic_kv`. Here is the loop: look at each
engine, believe what is seen, begin the moves, apply KV limits, report at each heartbeat and after each change.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from maestro_agents.errors import EngineError, EngineUnavailable, MaestroError
from maestro_agents.nodes import MOVES, EngineReport, GpuReport, Move, NodeReport, Tier, Want, Wanted
from maestro_agents.policy.ageing import Ageing, Watch
from maestro_agents.ports import Clock, Queue
from maestro_serving import weights
from maestro_serving.drivers import Driver, DriverOf, Host, Look, NodeEngine
from maestro_serving.elastic_kv import KvLedger, Seen
from maestro_serving.proxy import Proxy, on_loopback
from maestro_serving.reconcile import Announce, Standing, plan
from maestro_serving.weights import DOES, HAS_SERVER, Costs

BEAT_S: Final = 0.5
"""A node looks and reports at least so often."""

TTL_S: Final = 3.0
"""A report counts for so long: a node that says nothing for this time is taken for gone."""

HUNG_S: Final = 60.0
"""A server that lives and is not healthy for so long, while it should serve, is ended and started again."""

ADOPT_LIMIT_S: Final = 10.0
"""How long a server that outlived an agent may take to answer the next one."""

DRAIN_S: Final = 30.0
"""How long an agent that was told to end waits for what runs on its engines."""

FIRST_BACKOFF_S: Final = 1.0
LAST_BACKOFF_S: Final = 60.0
"""Between attempts at a move that failed; doubled each time, until an engine has served for a while."""

STABLE_S: Final = 60.0
MOVES_TOLD: Final = 20
"""Moves that a report names, the last ones."""

_LISTEN_S: Final = 5.0
_RESIDENT_EVERY_S: Final = 10.0
_SURE: Final = 2
"""Looks that must agree: on an engine being idle, and on one being in another tier than was thought."""

log = logging.getLogger("maestro.node")


@dataclass(slots=True, eq=False)
class _Engine:
    """An engine and what the agent knows of it. ``_mono_s`` moments are this machine's own clock's."""

    about: NodeEngine
    driver: Driver
    tier: Tier
    to: Tier
    changed_at_s: float
    url: str = ""
    look: Look = field(default_factory=lambda: Look(alive=False))
    #: When that look began.
    looked_mono_s: float = -math.inf
    #: Looks in a row that saw it idle since it was announced to leave, or in another tier than it is thought to be in.
    idle: int = 0
    elsewhere: int = 0
    work: asyncio.Task[None] | None = None
    failed: str = ""
    failed_at_s: float = 0.0
    failures: int = 0
    ready_mono_s: float = 0.0
    unwell_since_mono_s: float | None = None
    restarts: int = 0
    #: Its server died, or had to be ended: the next start is a restart.
    died: bool = False
    #: Restarts on request that were made; None until the first word about it.
    rejuvenation: int | None = None
    #: When the page cache was looked at; when its tokens were counted, and how many.
    cached_mono_s: float = -_RESIDENT_EVERY_S
    counted: tuple[float, int] = (0.0, -1)
    tokens_per_s: float = -1.0
    #: Its memory over the life of its server, and why a restart of it is advised.
    memory: Watch = field(default_factory=Watch)
    ageing: Ageing | None = None

    @property
    def id(self) -> str:
        return self.about.engine_id

    @property
    def can(self) -> frozenset[Tier]:
        tiers: set[Tier] = {"gpu", "disk"}
        tiers |= {"sleeping", "dropped"} if self.about.sleeps else set()
        tiers |= {"host"} if self.about.weight_files else set()
        return frozenset(tiers)


class Node:
    """The agent of one host. `run` until cancelled; then `drain` and `close` for an end in order. ``proxy``: started, where
    clients are on other machines.

    Killed, it leaves its servers to their keepers (`processes.Kept`), and the next agent with the same ``state`` takes them over.
    """

    def __init__(
        self, host: Host, queue: Queue, *, clock: Clock, driver_of: DriverOf, state: Path, proxy: Proxy | None = None
    ) -> None:
        self.host = host
        self._proxy = proxy
        self._queue = queue
        self.clock = clock
        #: When the queue last took a report.
        self.told_at_s = -math.inf
        self._state = state
        self._gpus = {gpu.gpu_id: gpu for gpu in host.gpus}
        self.ledgers = {gpu.gpu_id: KvLedger(usable_bytes=gpu.usable_bytes, factor=gpu.kv_factor) for gpu in host.gpus}
        self.costs = Costs(state / "costs.json")
        self._moves: deque[Move] = deque(maxlen=MOVES_TOLD)
        self._wanted = Wanted(epoch=-1)
        #: What the fleet file starts, as long as no scheduler has said anything of it.
        self._unless_told: dict[str, Want] = {}
        self._draining = False
        self._changed = asyncio.Event()
        self._tell = asyncio.Event()
        self._engines: dict[str, _Engine] = {}
        for about in host.engines:
            tier = self._rest(about)
            self._engines[about.engine_id] = _Engine(
                about=about,
                driver=driver_of(about, self._gpus[about.gpus[0]]),
                tier=tier,
                to=tier,
                changed_at_s=clock.now_s(),
            )
        self._restore()

    # -- what it tells -----------------------------------------------------------------------------------------------
    def report(self) -> NodeReport:
        """What is true now."""
        engines = [self._tell_of(e) for e in self._engines.values()]
        asleep = sum(e.about.weight_bytes for e in self._engines.values() if "sleeping" in {e.tier, e.to})
        gpus = [
            GpuReport(
                gpu_id=gpu.gpu_id,
                memory_bytes=gpu.memory_bytes,
                usable_bytes=self.ledgers[gpu.gpu_id].usable_bytes,
                level=self.ledgers[gpu.gpu_id].level,
                held_bytes=self.ledgers[gpu.gpu_id].held_bytes,
            )
            for gpu in self.host.gpus
        ]
        return NodeReport(
            node_id=self.host.node_id,
            cluster=self.host.cluster,
            at_s=self.clock.now_s(),
            ram_bytes=self.host.ram_bytes,
            ram_free_bytes=max(0, self.host.ram_bytes - asleep),
            gpus=gpus,
            engines=engines,
            moves=tuple(self._moves),
        )

    def _tell_of(self, e: _Engine) -> EngineReport:
        about, look = e.about, e.look
        ledger = self.ledgers[about.gpus[0]]
        promised = ledger.budgets().get(e.id, 0)
        can = e.can
        wake_s = {tier: self._seconds(e, tier, "gpu") for tier in can if "gpu" in MOVES[tier]}
        leave_s = {tier: self._seconds(e, "gpu", tier) for tier in can if tier in MOVES["gpu"] and about.sleeps}
        return EngineReport(
            spec=dataclasses.replace(about.spec, url=self._url(e), kv_bytes=promised or about.spec.kv_bytes),
            gpu_id=about.gpus[0],
            tier=e.tier,
            to=e.to,
            hbm_bytes=about.hbm_bytes,
            weight_bytes=about.weight_bytes,
            kv_floor_bytes=about.kv_floor_bytes,
            kv_bytes=ledger.share_bytes(e.id),
            kv_used_bytes=look.kv_used_bytes,
            elastic=e.driver.elastic,
            changed_at_s=e.changed_at_s,
            wake_s=wake_s,
            leave_s=leave_s,
            running=look.running,
            waiting=look.waiting,
            failed_at_s=e.failed_at_s,
            failed=e.failed,
            restarts=e.restarts,
            rejuvenation=e.rejuvenation or 0,
            ageing=e.ageing.words if e.ageing else "",
            exhausted_at_s=e.ageing.exhausted_at_s if e.ageing else 0.0,
            prefix_hit_rate=look.prefix_hit_rate,
            preemptions=look.preemptions,
            tokens_per_s=e.tokens_per_s,
        )

    def _url(self, e: _Engine) -> str:
        """Where clients find it: behind the proxy, where there is one and the engine is on loopback."""
        if self._proxy is None or (e.url and not on_loopback(e.url)):
            return e.url
        return e.url and self._proxy.url(e.id)

    def _seconds(self, e: _Engine, was: Tier, to: Tier) -> float:
        guess = weights.estimate(was, to, e.about.weight_bytes, e.about.served)
        return self.costs.cost(e.id, was, to, guess).took_s

    # -- the loop ----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Take over what runs already, then look, move and report until cancelled. Raises only on a bug."""
        await self._begin()
        async with asyncio.TaskGroup() as group:
            for e in self._engines.values():
                group.create_task(self._watch(e))
            group.create_task(self._listen())
            group.create_task(self._report())
            group.create_task(self._reconcile())
            if self._proxy is not None:
                group.create_task(self._proxy.keep())

    async def drain(self, timeout_s: float = DRAIN_S) -> None:
        """Take nothing new, wait for what runs (so long), end all servers. `run` must still run."""
        self._draining = True
        self._touch()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(e.tier in HAS_SERVER or e.work for e in self._engines.values()):
                    await asyncio.sleep(BEAT_S / 5)

    async def close(self) -> None:
        """End what `drain` has left, tell it, and let go of connections."""
        for e in self._engines.values():
            if e.work is not None:
                e.work.cancel()
                await asyncio.gather(e.work, return_exceptions=True)
            await e.driver.stop()
            self._rests(e)
            await e.driver.close()
        if self._proxy is not None:
            await self._proxy.stop()
        with contextlib.suppress(MaestroError, TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await self._queue.report(self.report(), now_s=self.clock.now_s(), ttl_s=TTL_S)

    async def leave(self) -> None:
        """Let go of connections and of moves under way; servers run on, for the next agent."""
        for e in self._engines.values():
            if e.work is not None:
                e.work.cancel()
                await asyncio.gather(e.work, return_exceptions=True)
            await e.driver.close()

    async def _begin(self) -> None:
        """Take over servers that outlived an agent, as they are; learn what is wanted, or begin with what the fleet file says."""
        await asyncio.gather(*(self._adopt(e) for e in self._engines.values()))
        heard = None
        with contextlib.suppress(MaestroError):
            heard = await self._queue.wanted(self.host.node_id, known="", timeout_s=0.05)
        if heard is not None:
            self._hear(heard[1])
        else:
            self._unless_told = self._at_start()

    def _at_start(self) -> dict[str, Want]:
        """The engines that the fleet file starts, what is left of their GPU as KV memory in equal parts."""
        found: dict[str, Want] = {}
        for gpu in self.host.gpus:
            here = [
                e.about for e in self._engines.values() if e.about.gpus[0] == gpu.gpu_id and e.id in self.host.at_start
            ]
            left = gpu.usable_bytes - sum(a.hbm_bytes for a in here)
            for about in here:
                found[about.engine_id] = Want(tier="gpu", kv_bytes=max(about.kv_floor_bytes, left // len(here)))
        return found

    async def _adopt(self, e: _Engine) -> None:
        url = await e.driver.adopt()
        if url is None:
            return
        e.url = url
        e.looked_mono_s = time.monotonic()
        give_up_s = e.looked_mono_s + ADOPT_LIMIT_S
        while True:
            e.look = await e.driver.look()
            if not e.look.alive or e.look.healthy or time.monotonic() > give_up_s:
                break
            await asyncio.sleep(BEAT_S / 2)
        if not e.look.alive:
            return
        tier = _tier_of(e.look)
        # One that had not come up yet, or hangs, is begun anew; so is one for which there is no room any more.
        if not e.look.healthy or (tier == "gpu" and not await self._enters(e)):
            await e.driver.stop()
            return
        self._comes(e, tier)
        log.info("%s runs already, at %s (%s)", e.id, url, tier)

    async def _enters(self, e: _Engine) -> bool:
        """Count an engine that is awake already."""
        about = e.about
        enforced = e.driver.elastic == "enforced"
        for n, gpu in enumerate(about.gpus):
            if not self.ledgers[gpu].enter(
                e.id,
                fixed_bytes=about.hbm_bytes,
                floor_bytes=about.kv_floor_bytes,
                kv_bytes=0 if enforced else about.spec.kv_bytes,
                elastic=e.driver.elastic,
            ):
                for had in about.gpus[:n]:
                    self.ledgers[had].leave(e.id)
                return False
        if enforced:  # nobody knows what it was limited to: what it holds it may keep
            limit_bytes = max(about.kv_floor_bytes, e.look.kv_used_bytes)
            await self._limit(e, {about.gpus[0]: limit_bytes})
        return True

    async def _listen(self) -> None:
        known = ""
        while True:
            try:
                heard = await self._queue.wanted(self.host.node_id, known=known, timeout_s=_LISTEN_S)
            except MaestroError as e:
                log.warning("what is wanted cannot be heard: %s", e)
                await asyncio.sleep(BEAT_S)
                continue
            if heard is not None:
                known = heard[0]
                self._hear(heard[1])

    def _hear(self, wanted: Wanted) -> None:
        if wanted.epoch < self._wanted.epoch:
            return
        for engine_id, want in wanted.engines.items():
            e = self._engines.get(engine_id)
            if e is None:
                continue
            if e.rejuvenation is None:
                e.rejuvenation = want.rejuvenation
            before = self._wanted.engines.get(engine_id)
            if before is not None and before.tier != want.tier:
                e.ready_mono_s = 0.0  # somebody thought about it anew
            self._unless_told.pop(engine_id, None)
        self._wanted = wanted
        self._touch()

    async def _report(self) -> None:
        while True:
            self._tell.clear()
            self._let_in()
            try:
                async with asyncio.timeout(TTL_S):
                    await self._queue.report(self.report(), now_s=self.clock.now_s(), ttl_s=TTL_S)
                self.told_at_s = self.clock.now_s()
            except (MaestroError, TimeoutError) as e:
                log.warning("the report did not arrive: %s", e or "too slow")
                await asyncio.sleep(BEAT_S)
            await _wait(self._tell, BEAT_S)

    def _let_in(self) -> None:
        """Let clients reach the engines as they are, before these are told of."""
        if self._proxy is None:
            return
        try:
            self._proxy.serve({e.id: e.url for e in self._engines.values() if not e.url or on_loopback(e.url)})
        except OSError as x:
            log.warning("the proxy was not told what to let through: %s", x)

    async def _reconcile(self) -> None:
        while True:
            self._changed.clear()
            await self._step()
            await _wait(self._changed, BEAT_S)

    def _touch(self) -> None:
        self._changed.set()
        self._tell.set()

    # -- looking -----------------------------------------------------------------------------------------------------
    async def _watch(self, e: _Engine) -> None:
        while True:
            await asyncio.sleep(BEAT_S / 2)
            work, began_mono_s = e.work, time.monotonic()
            look = await e.driver.look()
            if began_mono_s < e.looked_mono_s:
                continue  # a move has looked meanwhile, at its end
            e.looked_mono_s = began_mono_s
            if e.work is None and work is None:  # what is seen during a move is neither here nor there
                self._believe(e, look)
                await self._remember(e)
            else:
                e.look = dataclasses.replace(look, alive=e.look.alive)

    def _believe(self, e: _Engine, look: Look) -> None:
        """What an engine is seen to be is true, whatever we thought: it may have died, or somebody else may have moved it."""
        e.look = look
        now_s, mono_s = self.clock.now_s(), time.monotonic()
        e.idle = e.idle + 1 if look.running == 0 == look.waiting else 0
        if e.tier in HAS_SERVER and not look.alive:
            self._fails(e, "its server died")
            e.died = True
            e.work = asyncio.create_task(self._clear(e))
            return
        if look.alive:
            self._count(e, mono_s)
        elif e.about.weight_files and mono_s - e.cached_mono_s > _RESIDENT_EVERY_S:
            e.cached_mono_s = mono_s
            if self._rest(e.about) != e.tier and e.tier in {"host", "disk"}:
                self._rests(e)  # others have taken the page cache, or brought the files there
        tier = _tier_of(look) if look.alive else e.tier
        e.elsewhere = e.elsewhere + 1 if tier != e.tier else 0
        if e.elsewhere >= _SURE and (look.healthy or tier != "gpu"):
            self._finds(e, tier)
        if e.tier == "gpu" and not look.healthy:
            e.unwell_since_mono_s = e.unwell_since_mono_s or mono_s
            if mono_s - e.unwell_since_mono_s > HUNG_S:
                self._fails(e, f"its server does not answer for {HUNG_S:g} s")
                e.died = True
                e.work = asyncio.create_task(self._clear(e))
        else:
            e.unwell_since_mono_s = None
            if e.tier == "gpu" and now_s - e.changed_at_s > STABLE_S:
                e.failures = 0
        if e.to != e.tier and e.idle >= _SURE:
            self._changed.set()

    async def _remember(self, e: _Engine) -> None:
        """Watch its memory while it serves; asleep it has its weights in host memory. KV memory that follows load is no leak."""
        if e.tier != "gpu" or e.look.asleep is not None or not e.look.alive:
            return
        memory = e.memory
        gpu = e.about.gpus[0]
        ages = sum(o.ageing is not None for o in self._engines.values())  # what is left is theirs together
        here = (o.look.device_bytes for o in self._engines.values() if gpu in o.about.gpus)
        found = await asyncio.to_thread(  # statistics take milliseconds, and seconds to import
            memory.look,
            self.clock.now_s(),
            host_bytes=e.look.host_bytes,
            host_left_bytes=_available_bytes() // max(1, ages),
            device_bytes=e.look.device_bytes - (max(0, e.look.kv_used_bytes) if e.driver.elastic == "enforced" else 0),
            device_left_bytes=self._gpus[gpu].memory_bytes - sum(max(0, b) for b in here),
        )
        if memory is e.memory and e.tier == "gpu":
            e.ageing = found

    @staticmethod
    def _count(e: _Engine, mono_s: float) -> None:
        """Tokens a second, over a second at least: how fast it is with what it runs now."""
        since_s, before = e.counted
        if mono_s - since_s >= 1.0:
            tokens = e.look.generated_tokens
            e.tokens_per_s = (tokens - before) / (mono_s - since_s) if 0 <= before <= tokens else -1.0
            e.counted = (mono_s, tokens)

    def _finds(self, e: _Engine, tier: Tier) -> None:
        """It is in another tier than we brought it to."""
        log.warning("%s is found in tier %s, it was in %s", e.id, tier, e.tier)
        e.elsewhere = 0
        if tier != "gpu":
            self._leaves(e)
        self._comes(e, tier)
        if tier == "gpu":
            e.work = asyncio.create_task(self._found_awake(e))

    async def _found_awake(self, e: _Engine) -> None:
        """Somebody else has woken it: its memory is taken, whether there was room or not."""
        e.url = e.url or await e.driver.adopt() or ""
        if not await self._enters(e):
            log.error("%s was woken by somebody else, beside what its GPU holds already: it is stopped", e.id)
            await e.driver.stop()
            self._fails(e, "it was woken by somebody else, where it has no room")
            self._rests(e)
        e.work = None
        self._touch()

    async def _clear(self, e: _Engine) -> None:
        """Clear away what a dead server left behind."""
        await e.driver.stop()
        self._rests(e)
        e.work = None
        self._touch()

    # -- moving ------------------------------------------------------------------------------------------------------
    async def _step(self) -> None:
        """Begin what is to be done next."""
        await self._hold()
        mono_s = time.monotonic()
        wants = self._wishes()
        standings = [self._stands(e, wants.get(e.id)) for e in self._engines.values()]
        for step in plan(standings, wants, self.ledgers, ram_bytes=self.host.ram_bytes, now_s=mono_s):
            e = self._engines[step.engine_id]
            if e.to != step.to:
                e.to, e.idle = step.to, 0
                self._tell.set()
            if not isinstance(step, Announce):
                e.work = asyncio.create_task(self._move(e, step.to))
                self._tell.set()

    def _wishes(self) -> Mapping[str, Want]:
        if not self._draining:
            return {**self._unless_told, **self._wanted.engines}
        return {e.id: Want(tier="host" if "host" in e.can else "disk") for e in self._engines.values()}

    def _stands(self, e: _Engine, want: Want | None) -> Standing:
        about = e.about
        enforced = e.driver.elastic == "enforced"
        restart = want is not None and e.rejuvenation is not None and want.rejuvenation > e.rejuvenation
        if restart and e.tier not in HAS_SERVER and e.work is None:
            e.rejuvenation, restart = want.rejuvenation if want else 0, False
            self._keep()
        return Standing(
            engine_id=e.id,
            gpus=about.gpus,
            tier=e.tier,
            to=e.to,
            moving=e.work is not None,
            idle=e.idle >= _SURE,
            fixed_bytes=about.hbm_bytes,
            floor_bytes=about.kv_floor_bytes,
            kv_bytes=0 if enforced else about.spec.kv_bytes,
            enforced=enforced,
            weight_bytes=about.weight_bytes,
            ready_at_s=e.ready_mono_s,
            restart=restart and not self._draining,
            can=e.can,
            seconds={(was, to): self._seconds(e, was, to) for was, to in DOES},
        )

    async def _move(self, e: _Engine, to: Tier) -> None:
        """Carry out one move, whatever becomes of it."""
        was, began_at_s, began_s = e.tier, self.clock.now_s(), time.monotonic()
        error = ""
        try:
            await self._carry(e, was, to)
        except asyncio.CancelledError:
            e.work = None
            raise
        except (EngineError, OSError, TimeoutError) as x:
            error = str(x).partition("\n")[0] or type(x).__name__
            log.warning("%s could not go from %s to %s: %s", e.id, was, to, x)
        except Exception as x:  # a bug in a driver costs one engine, not the node
            error = f"{type(x).__name__}: {x}"
            log.exception("%s could not go from %s to %s", e.id, was, to)
        took_s = time.monotonic() - began_s
        moved = 0 if error else weights.carried(was, to, e.about.weight_bytes)
        if error:
            self._fails(e, error)
            await self._recover(e, was)
        else:
            self.costs.learn(e.id, was, to, took_s=took_s, moved_bytes=moved)
            self._comes(e, to)
            log.info("%s: %s to %s in %.2f s, %.1f MB", e.id, was, to, took_s, moved / 1e6)
        self._moves.append(
            Move(
                engine_id=e.id,
                was=was,
                to=to,
                began_at_s=began_at_s,
                took_s=took_s,
                moved_bytes=moved,
                error=error,
            )
        )
        e.work = None
        self._touch()

    async def _carry(self, e: _Engine, was: Tier, to: Tier) -> None:
        about, driver = e.about, e.driver
        does = DOES[was, to]
        if to == "gpu" and driver.elastic == "enforced":
            await self._limit(e, {gpu: self.ledgers[gpu].limit_bytes(e.id) for gpu in about.gpus[:1]})
        match does:
            case "start":
                e.url = await driver.start()
                e.restarts, e.died = e.restarts + e.died, False
                e.memory = Watch()
            case "wake":
                await driver.wake()
            case "sleep 1" | "sleep 2":
                await driver.sleep(1 if does == "sleep 1" else 2)
                e.looked_mono_s = time.monotonic()
                look = e.look = await driver.look()  # what it keeps of its GPU is counted from now on
                if look.asleep is None:  # it said yes, and did not
                    raise EngineUnavailable(f"engine {e.id} was put to sleep and is awake")
            case "stop" | "stop, forget":
                await driver.stop()
                await (weights.read if does == "stop" else weights.forget)(about.weight_files)
            case "read":
                await weights.read(about.weight_files)
            case "forget":
                await weights.forget(about.weight_files)
            case "fetch":
                raise EngineUnavailable(f"engine {e.id}: its weights are not on this node: bring them here")

    async def _recover(self, e: _Engine, was: Tier) -> None:
        """After a move that failed: where is it now? One whose state nobody knows is ended."""
        look = await e.driver.look()
        if was in HAS_SERVER and look.alive and (look.asleep is not None) == (was != "gpu"):
            if was != "gpu":
                self._leaves(e)
            e.to = e.tier
            return
        await e.driver.stop()
        self._rests(e)

    def _fails(self, e: _Engine, why: str) -> None:
        e.failed, e.failed_at_s = why, self.clock.now_s()
        e.ready_mono_s = time.monotonic() + min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2**e.failures)
        e.failures += 1

    def _comes(self, e: _Engine, tier: Tier) -> None:
        e.tier = e.to = tier
        e.changed_at_s = self.clock.now_s()
        e.idle = e.elsewhere = 0
        if tier == "gpu":
            e.failed, e.failed_at_s = "", 0.0
        else:
            self._leaves(e)
        if tier not in HAS_SERVER:
            e.url, e.ageing = "", None
        self._touch()

    def _leaves(self, e: _Engine) -> None:
        for gpu in e.about.gpus:
            self.ledgers[gpu].leave(e.id)

    def _rests(self, e: _Engine) -> None:
        """It has no server (any more)."""
        self._comes(e, self._rest(e.about))

    @staticmethod
    def _rest(about: NodeEngine) -> Tier:
        return "host" if weights.in_cache(about.weight_files) else "disk"

    # -- KV memory ---------------------------------------------------------------------------------------------------
    async def _hold(self) -> None:
        """Let each GPU's engines have the KV memory that its ledger gives them (`maestro_serving.elastic_kv`)."""
        wishes = self._wishes()
        for gpu_id, ledger in self.ledgers.items():
            # What sleeping servers keep of a real GPU (CUDA's own) nobody else can have.
            asleep = [e for e in self._engines.values() if e.tier in HAS_SERVER - {"gpu"} and e.about.gpus[0] == gpu_id]
            kept_bytes = sum(max(0, e.look.device_bytes) for e in asleep if e.work is None)
            ledger.usable_bytes = self._gpus[gpu_id].usable_bytes - kept_bytes
            here = [e for e in self._engines.values() if e.about.gpus[0] == gpu_id and e.id in ledger]
            wanted = {e.id: wishes[e.id].kv_bytes for e in here if e.id in wishes}
            level, before = ledger.level, ledger.budgets()
            after = ledger.budgets(wanted)
            seen = {e.id: _seen(e) for e in here if e.work is None and e.driver.elastic == "enforced"}
            verdict = ledger.guard(seen)
            if verdict.level != level or after != before:
                self._tell.set()
            limits = {e: verdict.limits[e.id] for e in here if e.id in verdict.limits and e.work is None}
            await asyncio.gather(*(self._limit(e, {gpu_id: limit}) for e, limit in limits.items()))

    async def _limit(self, e: _Engine, limits: Mapping[str, int]) -> None:
        """Tell an engine its limit. Until it has agreed, the ledger counts with the larger one."""
        for gpu_id, limit_bytes in limits.items():
            try:
                async with asyncio.timeout(TTL_S):
                    await e.driver.limit_kv(limit_bytes)
            except (EngineError, OSError, TimeoutError) as x:
                log.warning("%s did not take its KV limit: %s", e.id, x)
            else:
                self.ledgers[gpu_id].confirm(e.id, limit_bytes, at_s=time.monotonic())

    # -- what a restart must know ------------------------------------------------------------------------------------
    def _keep(self) -> None:
        said = {e.id: e.rejuvenation for e in self._engines.values() if e.rejuvenation is not None}
        weights.write_whole(self._state / "restarts.json", json.dumps(said))

    def _restore(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            said: dict[str, int] = json.loads((self._state / "restarts.json").read_text(encoding="utf-8"))
            for engine_id, count in said.items():
                if engine_id in self._engines:
                    self._engines[engine_id].rejuvenation = int(count)


def _tier_of(look: Look) -> Tier:
    return "gpu" if look.asleep is None else "dropped" if look.asleep == 2 else "sleeping"


def _seen(e: _Engine) -> Seen:
    served = e.about.served
    recompute_s = served.profile.prefill_s_per_token / max(1, e.about.spec.kv_bytes_per_token) if served else 1e-9
    return Seen(
        used_bytes=e.look.kv_used_bytes,
        running=e.look.running,
        recompute_s_per_byte=recompute_s,
        at_s=e.looked_mono_s,
    )


def _available_bytes() -> int:
    """Host memory that a process could still get."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines: Sequence[str] = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
