"""A recorded workload played live, and counted by the simulator's own scorer: what benches that put both beside each other share.

Every stage in the order of its run's graph goes through the real client to the granted engine, as the gate does it; prompts and
answers have the recorded lengths. What is seen is written as the simulator's own events, so that a live row and a simulated row of
a table are counted alike.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from maestro_agents.cli.simulate.plays import Play, Played
from maestro_agents.cli.simulate.tables import rows as figures_of
from maestro_agents.client import Client, Pass
from maestro_agents.core import Grant, RunEnd, ServiceClass, Ticket
from maestro_agents.errors import ConfigError, MaestroError
from maestro_agents.policy import POLICIES
from maestro_agents.predict.prefix import prompt_blocks
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.simulator.hardware import SimFleet
from maestro_agents.simulator.score import Score
from maestro_agents.simulator.workload import Run, Stage, Workload
from maestro_agents.simulator.world import Event, Outage, World
from maestro_agents.usage import Usage, Watcher
from maestro_serving.load import Wire

WAIT_S: Final = 600.0
LOOK_S: Final = 0.1
"""How often reports and ledgers are read."""

_AGAIN: Final = frozenset({0, 429, 503})
"""Where an engine is gone, or busy, a stage waits again."""

TOKENS: Final = range(16, 256)
"""Prompts are made of these; every vocabulary has them."""


# -- what is played ------------------------------------------------------------------------------------------------------
def arriving(
    found: Sequence[Run],
    model_of: Callable[[Run, Stage], str],
    *,
    runs: int,
    window_s: float,
    seed: int,
    speed: float = 1.0,
    prompts: int = 1,
) -> tuple[Run, ...]:
    """So many of the recorded runs in a seeded order (each once, before one comes twice), arriving by a Poisson process.

    Predictions that they bring are left out: live nobody has them. ``speed``: their own seconds are divided by it; ``prompts``: so
    many times shorter are prompts.
    """
    rng = random.Random(f"{seed} place")
    order: list[Run] = []
    while len(order) < runs:
        order += rng.sample(found, len(found))
    at = sorted(rng.uniform(0.0, window_s) for _ in range(runs))
    return tuple(
        _made(r, f"r{n}", at_s, model_of, speed=speed, prompts=prompts)
        for n, (r, at_s) in enumerate(zip(order, at, strict=False))
    )


def _made(
    run: Run, run_id: str, at_s: float, model_of: Callable[[Run, Stage], str], *, speed: float, prompts: int
) -> Run:
    stages = (
        dataclasses.replace(
            s,
            model=model_of(run, s),
            prompt_tokens=max(1, s.prompt_tokens // prompts),
            shared_tokens=s.shared_tokens // prompts,
            gap_s=s.gap_s / speed,
            foreseen=None,
        )
        for s in run.stages
    )
    return dataclasses.replace(
        run,
        run_id=run_id,
        at_s=at_s,
        deadline_s=run.deadline_s / speed,
        end_gap_s=run.end_gap_s / speed,
        stages=tuple(stages),
    )


# -- playing live --------------------------------------------------------------------------------------------------------
class _Answer:
    """One stage on its way: what reads its stream tells this (`maestro_agents.usage.Watched`)."""

    def __init__(self, told: Pass, extended: Callable[[int], None]) -> None:
        self.told = told
        self.ok: bool | None = None
        #: How soon its first byte came, as the engine says: seconds from its arrival there; 0 where it does not say.
        self.engine_s = 0.0
        self._extended = extended

    def first_byte(self) -> None:
        self.told.first_byte()

    def grew(self, output_tokens: int) -> None:
        before = self.told.extensions
        self.told.grew(output_tokens)
        if self.told.extensions != before and self.told.grant is not None:
            self._extended(self.told.grant.kv_bytes)

    def finish(self, usage: Usage, *, ok: bool) -> None:
        self.ok = ok
        self.engine_s = usage.engine_queue_s + usage.engine_ttft_s
        self.told.finish(
            ok=ok,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens or usage.content_events,
            cached_tokens=usage.cached_tokens,
            engine_queue_s=usage.engine_queue_s,
            engine_ttft_s=usage.engine_ttft_s,
        )

    def cancel(self) -> None:
        self.told.cancel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A stage that was answered: where, why there, and what was seen of it. Moments as in `Live`."""

    stage_id: str
    ready_at_s: float
    granted_at_s: float
    first_byte_at_s: float
    ended_at_s: float
    grant: Grant
    #: Seconds from the grant to the first byte beyond those that the engine says it took: the network there and back, and
    #: what client and servers do.
    away_s: float


class Live:
    """One play of a workload through the client that this process has. Moments are seconds since it began, by the pool's clock.

    ``again``: how often an app makes a call anew that broke after its first byte (nothing is replayed then: the caller gets
    the error, and tries again as LangGraph's RetryPolicy does).
    """

    def __init__(self, workload: Workload, alone: Callable[[Run], float], *, again: int = 0) -> None:
        self._workload = workload
        self._alone = alone
        self._client = Client.current()
        self._wire = Wire(timeout_s=WAIT_S)
        self._caps = workload.caps()
        self._began_at_s = 0.0
        self.events: list[Event] = []
        self.calls: list[Call] = []
        #: Streams that broke after their first byte and were made anew.
        self.cut = 0
        self._again = again
        #: Runs that ended with an error, and which.
        self.failed: dict[str, str] = {}
        self.ended = 0
        self._waiting: set[str] = set()
        self._running: set[str] = set()

    @property
    def began_at_s(self) -> float:
        """By the pool's clock."""
        return self._began_at_s

    def now_s(self) -> float:
        return self._client.now_s() - self._began_at_s

    async def play(self, look: Callable[[], None] = lambda: None) -> None:
        """Play it: until every run has ended, or to its horizon. ``look`` is called after each run."""
        self._began_at_s = self._client.now_s()
        runs = {asyncio.create_task(self._run(run, look), name=run.run_id) for run in self._workload.runs}
        try:
            await asyncio.wait(runs, timeout=self._workload.horizon_s)
        finally:
            for task in runs:
                task.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
            await self._wire.aclose()
        grants = sum(e[0] == "grant" for e in self.events)
        self._tell("close", self.now_s(), len(self._waiting), len(self._running), 0, grants)

    async def warm(self, model: str) -> None:
        """Have a model serve one short call, of no run."""
        stage = Stage(role="", model=model, prompt_tokens=16, output_tokens=1)
        run = Run(
            run_id=f"warm-{model}", app="", session="", at_s=0.0, service_class=ServiceClass.INTERACTIVE,
            deadline_s=WAIT_S, stages=(stage,),
        )  # fmt: skip
        self._began_at_s = self._client.now_s()
        await self._serve(run, 0, 0, 0.0)
        self.events.clear()
        self.calls.clear()

    def _tell(self, *event: Any) -> None:
        self.events.append(event)

    async def _run(self, run: Run, look: Callable[[], None]) -> None:
        await asyncio.sleep(max(0.0, run.at_s - self.now_s()))
        at_s = self.now_s()
        deadline_at_s = at_s + run.deadline_s
        self._tell(
            *("run", at_s, run.run_id, run.app, run.service_class.value, run.tenant, deadline_at_s, len(run.stages)),
            *(run.at_s >= self._workload.warmup_s, self._alone(run)),
        )
        steps = run.steps()
        stages: list[asyncio.Task[None]] = []
        outcome = "abandoned"
        try:
            async with asyncio.TaskGroup() as group:
                for n, stage in enumerate(run.stages):
                    before = [stages[b] for b in stage.after]
                    stages.append(group.create_task(self._after(before, run, n, steps[n], at_s)))
            await asyncio.sleep(run.end_gap_s)
            outcome = "done"
            self._tell("done", self.now_s(), run.run_id)
        except* MaestroError as e:
            outcome, self.failed[run.run_id] = "failed", str(e.exceptions[0])
        finally:
            self._client.end_run(
                RunEnd(
                    run_id=run.run_id,
                    workflow=run.app,
                    outcome=outcome,
                    started_at_s=self._began_at_s + at_s,
                    ended_at_s=self._client.now_s(),
                    tenant=run.tenant,
                )
            )
            self.ended += 1
            look()

    async def _after(self, before: Sequence[asyncio.Task[None]], run: Run, n: int, step: int, at_s: float) -> None:
        """Wait for the stages that it comes after, and for tools; then it is ready."""
        await asyncio.gather(*before)
        await asyncio.sleep(run.stages[n].gap_s)
        await self._serve(run, n, step, at_s)

    async def _serve(self, run: Run, n: int, step: int, run_at_s: float) -> None:
        stage, stage_id = run.stages[n], f"{run.run_id}.{n}"
        body: dict[str, Any] = {
            "model": stage.model,
            "prompt": prompt_of(run, n),
            "max_tokens": stage.output_tokens,
            "min_tokens": stage.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        ready_s = self.now_s()
        self._tell("ready", ready_s, stage_id, run.run_id, stage.role, stage.model, stage.prompt_tokens)
        self._waiting.add(stage_id)
        try:
            for attempt in range(self._again + 1):
                try:
                    await self._attempt(run, n, step, run_at_s, body, attempt)
                    break
                except _Broken as e:
                    if attempt == self._again:
                        raise
                    self.cut += 1
                    self._wait_again(stage_id, e.engine_id, self.now_s())
        except MaestroError as e:
            self._tell("refuse", self.now_s(), stage_id, type(e).__name__)
            raise
        finally:
            self._waiting.discard(stage_id)
            self._running.discard(stage_id)

    async def _attempt(
        self, run: Run, n: int, step: int, run_at_s: float, body: Mapping[str, Any], attempt: int
    ) -> None:
        stage, stage_id = run.stages[n], f"{run.run_id}.{n}"
        now_s = self._client.now_s()
        told = self._client.open(
            Ticket(
                stage_id=f"{stage_id}.{attempt}" if attempt else stage_id,
                client_id=self._client.client_id,
                model=stage.model,
                run_id=run.run_id,
                workflow=run.app,
                node=stage.role,
                role=stage.role,
                service_class=run.service_class,
                tenant=run.tenant,
                site=self._client.settings.site,
                deadline_at_s=self._began_at_s + run_at_s + run.deadline_s,
                run_started_at_s=self._began_at_s + run_at_s,
                pushed_at_s=now_s,
                due_at_s=now_s,
                prompt_tokens=stage.prompt_tokens,
                max_tokens=self._caps.get(run.app, 0),
                prefix=prompt_blocks(body, self._client.salt),
                visit=stage.visit,
                step=step,
                node_attempt=attempt + 1,
                streams=True,
            ),
            original_url="http://127.0.0.1:9/v1",
        )
        if told is None:
            raise ConfigError(f"no engine of this fleet serves {stage.model}")
        ready_s = now_s - self._began_at_s
        try:
            while not await self._once(told, stage_id, body, ready_s):
                ready_s = self.now_s()
        finally:
            told.cancel()  # after its end it does nothing

    async def _once(self, told: Pass, stage_id: str, body: Mapping[str, Any], ready_s: float) -> bool:
        """Wait for a grant and call the engine, as the gate does. False: it is to wait again."""
        engine = await told.wait_async()
        grant = told.grant
        if engine.original or grant is None:
            raise ConfigError(f"stage {stage_id} was sent on without a grant: does Redis answer?")
        granted_s = max(ready_s, grant.granted_at_s - self._began_at_s)
        self._waiting.discard(stage_id)
        self._running.add(stage_id)
        self._tell("grant", granted_s, stage_id, engine.engine_id, grant.kv_bytes)
        answer = _Answer(told, lambda kv_bytes: self._tell("extend", self.now_s(), stage_id, kv_bytes))
        watcher = Watcher(answer, events=True, hide_usage=False, legible=True)
        told.sent()
        own = {"model": engine.served_model or body["model"], "priority": grant.priority}

        def feed(chunk: bytes) -> None:
            watcher.feed(chunk)
            watcher.handed()

        status = await self._wire.stream(f"{engine.url}/completions", {**body, **own}, feed, token=engine.token)
        if answer.ok:
            ended_s, usage = max(granted_s, self.now_s()), watcher.usage
            started_s = min(ended_s, granted_s + usage.engine_queue_s)
            first_s = min(ended_s, max(started_s, told.first_byte_at_s - self._began_at_s))
            self._tell(
                *("end", ended_s, stage_id, engine.engine_id, started_s, first_s, ended_s),
                *(usage.prompt_tokens, usage.output_tokens, usage.cached_tokens, 0, engine.kv_bytes_per_token),
            )
            call = Call(
                stage_id=stage_id,
                ready_at_s=ready_s,
                granted_at_s=granted_s,
                first_byte_at_s=first_s,
                ended_at_s=ended_s,
                grant=grant,
                away_s=max(0.0, first_s - granted_s - answer.engine_s),
            )
            self.calls.append(call)
            return True
        if status not in _AGAIN or not told.requeue(engine_down=not status, answered=bool(status)):
            told.finish(ok=False)
            raise _Broken(engine.engine_id, stage_id, status)
        self._wait_again(stage_id, engine.engine_id, max(granted_s, self.now_s()))
        return False

    def _wait_again(self, stage_id: str, engine_id: str, at_s: float) -> None:
        self._tell("requeue", at_s, stage_id, engine_id)
        self._running.discard(stage_id)
        self._waiting.add(stage_id)


class _Broken(MaestroError):
    """An engine did not answer as it should."""

    def __init__(self, engine_id: str, stage_id: str, status: int) -> None:
        super().__init__(f"engine {engine_id} " + (f"broke off {stage_id}" if status == 200 else f"answered {status}"))
        self.engine_id = engine_id


def prompt_of(run: Run, n: int) -> list[int]:
    """As token ids: a conversation is one text, which grows with every call of it."""
    talk = n
    while run.stages[talk].shares >= 0:
        talk = run.stages[talk].shares
    rng = random.Random(f"{run.run_id}.{talk}")
    return rng.choices(TOKENS, k=run.stages[n].prompt_tokens)


# -- both plays, counted -----------------------------------------------------------------------------------------------
def simulated(
    workload: Workload, fleet: SimFleet, policy: str, outages: Iterable[Outage] = ()
) -> tuple[Played, list[Event]]:
    """Play it on the simulator's clock."""
    events: list[Event] = []
    began_s = time.perf_counter()
    World(workload, fleet, POLICIES[policy], tell=events.append, outages=outages).play()
    return counted(workload, events, time.perf_counter() - began_s), events


def counted(workload: Workload, events: Iterable[Event], wall_s: float, **known: float) -> Played:
    """What a play came to, by its events. ``known``: figures that they do not tell."""
    score = Score(window_s=workload.window_s)
    away = 0
    for event in events:
        score.take(event)
        away += event[0] == "tier" and event[4] == "gpu"
    return Played(
        figures={**score.figures(), "sleeps": away, **known},
        tenants=score.tenants(),
        warmup_s=workload.warmup_s,
        window_s=workload.window_s,
        horizon_s=workload.horizon_s,
        wall_s=wall_s,
    )


async def settled(queue: RedisQueue, limit_s: float = 10.0) -> Mapping[str, Any]:
    """What is still reserved once nobody asks for anything, and how soon that was nothing."""
    began_s = time.monotonic()
    while True:
        ledger = await queue.ledger()
        left = {e: n for e, n in ledger.slots.items() if n}
        took_s = time.monotonic() - began_s
        if not left or took_s > limit_s:
            return {"reserved": left, "after_s": took_s}
        await asyncio.sleep(LOOK_S)


def rows(policy: str, plays: Mapping[str, Played], seed: int) -> list[dict[str, Any]]:
    """A row for each play (``live``, ``simulated``) in the words of `maestro simulate`: one seed, at the one load that there is."""
    found: list[dict[str, Any]] = []
    for played, result in plays.items():
        (row,) = figures_of({Play(policy=policy, load=1.0, seed=seed): result})
        found.append({"played": played, **row})
    return found


def difference(live: Played, sim: Played) -> dict[str, float | None]:
    """Live less simulated: the cost of the real scheduler, Redis and clocks, figure by figure."""
    own, other = live.figures, sim.figures
    off = {k: own[k] - other[k] for k in other if k not in {"plans", "runs"}}
    return {k: None if math.isnan(value) else value for k, value in off.items()}
