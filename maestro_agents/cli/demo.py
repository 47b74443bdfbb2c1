"""`maestro demo`: the same runs twice on the same two engines, first come first served and under Maestro.

Real: LangGraph and the sample app, the decorator and the gate, Redis, the scheduler, every HTTP call. Emulated: the two
engines, whose timing comes from a model and whose answers are filler. The workload (`demo_input`) and the deadlines are
fixed before anything runs; what is counted and drawn is in `demo_report`. Engines, Redis and schedulers are processes of
their own; the app is this one, on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import json
import math
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from maestro_agents.cli.demo_input import MESSAGES, Arrival, Messages, arrivals, read_messages
from maestro_agents.cli.demo_report import LABEL, TITLES, RunResult, comparison, picture, table
from maestro_agents.cli.monitor import Snapshot, Watch
from maestro_agents.client import Client
from maestro_agents.core import Observation, ServiceClass
from maestro_agents.queue.redis import RedisClock, RedisQueue

MODEL: Final = "emulated"
DEADLINES_S: Final[Mapping[ServiceClass, float]] = {ServiceClass.INTERACTIVE: 8.0, ServiceClass.BATCH: 90.0}
"""Fixed beforehand: about three times what a run takes on idle engines; batch has ample time."""

LENGTHS: Final = {"classify": 6, "order": 120, "account": 90, "policy": 120, "history": 90, "draft": 260, "review": 12}
"""Median output tokens by node. An emulated engine cannot know how long an answer should be, so the demo says so."""

SPREAD: Final = 0.35
"""Standard deviation of the lengths' logarithm."""

LOOK_EVERY_S: Final = 0.5
SAY_EVERY_S: Final = 5.0

HOW_TO_REAL: Final = """\
Use it on a real vLLM. fleet.toml:

    [[engine]]
    id = "a"
    model = "Qwen/Qwen3-8B"
    url = "http://127.0.0.1:8000/v1"      # vllm serve ... --scheduling-policy priority

then `maestro up fleet.toml`, and in your own LangGraph app:

    from maestro_langgraph import maestro

    @maestro(service_class="interactive", deadline_s=20)
    def build():
        ...
        return graph.compile()
"""


def sample(name: str) -> ModuleType:
    """A sample workflow's module: from the wheel (``maestro_agents._samples``) or, in a checkout, from its folder."""
    installed = "maestro_agents._samples"
    try:
        return importlib.import_module(f"{installed}.{name}")
    except ModuleNotFoundError as e:
        if e.name != installed:
            raise
    return importlib.import_module(f"sample_workflows.{name}")


def length_of(node: str, prompt: str) -> dict[str, Any]:
    """How long the emulated answer is to be, as a request field: the same for the same prompt, in both passes."""
    rng = random.Random(hashlib.sha256(f"{node}\n{prompt}".encode()).digest())
    return {"min_tokens": max(1, round(LENGTHS[node] * math.exp(rng.gauss(0.0, SPREAD))))}


class Pass:
    """One policy serving the whole workload: the app's side, and what can be seen of it meanwhile."""

    def __init__(self, policy: str, plan: Sequence[Arrival], *, queue: RedisQueue, watch: Watch, app: Any) -> None:
        self.policy = policy
        self.plan = plan
        self.results: list[RunResult] = []
        self.snapshot: Snapshot | None = None
        self._queue = queue
        self._watch = watch
        self._app = app
        self._began_s = 0.0
        self._run_ids: dict[str, int] = {}

    async def run(self, look: Callable[[Pass], None]) -> list[RunResult]:
        """Serve every arrival at its moment; ``look`` is called twice a second. Results in order of arrival."""
        from maestro_langgraph import maestro

        # Both passes begin warm: connections open, imports done, one run served.
        with maestro.options(service_class="batch", deadline_s=DEADLINES_S[ServiceClass.BATCH]):
            await self._app.ainvoke({"message": MESSAGES[0]})
        self._began_s = time.monotonic()
        watcher = asyncio.create_task(self._look(look))
        try:
            async with asyncio.TaskGroup() as group:
                for arrival in self.plan:
                    group.create_task(self._one(arrival))
            await self._read_waits()
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        look(self)
        return self.results

    async def _one(self, arrival: Arrival) -> None:
        from maestro_langgraph import maestro

        await asyncio.sleep(self._began_s + arrival.at_s - time.monotonic())
        deadline_s = DEADLINES_S[arrival.service_class]
        run_id = uuid.uuid4()
        self._run_ids[str(run_id)] = arrival.index
        arrived_s = time.monotonic()
        error = ""
        try:
            with maestro.options(service_class=arrival.service_class, deadline_s=deadline_s):
                await self._app.ainvoke({"message": arrival.message}, {"run_id": run_id})
        except Exception as e:  # whatever a run ends with is a result, and is shown
            error = f"{type(e).__name__}: {e}"[:300]
        self.results.append(
            RunResult(
                policy=self.policy,
                index=arrival.index,
                service_class=arrival.service_class,
                arrived_s=arrived_s - self._began_s,
                took_s=time.monotonic() - arrived_s,
                deadline_s=deadline_s,
                error=error,
            )
        )

    async def _look(self, look: Callable[[Pass], None]) -> None:
        while True:
            self.snapshot = await self._watch.snapshot()
            look(self)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _read_waits(self) -> None:
        """Add to each result what its calls waited, from the queue's observation log. The last reports may be on their way."""
        waits: dict[int, list[float]] = {r.index: [] for r in self.results}
        expected = sum(r.done for r in self.results) * len(LENGTHS)
        at, give_up_s = "", time.monotonic() + 3.0
        while sum(map(len, waits.values())) < expected and time.monotonic() < give_up_s:
            at, entries = await self._queue.read_log(at, 1_000)
            for entry in entries:
                if isinstance(entry, Observation) and entry.run_id in self._run_ids:
                    waits[self._run_ids[entry.run_id]].append(entry.wait_s)
            if not entries:
                await asyncio.sleep(0.05)
        self.results = sorted((r.with_waits(waits[r.index]) for r in self.results), key=lambda r: r.index)


# -- what is seen while it runs ------------------------------------------------------------------------------------------
class View:
    """Shows passes as they go: live on a terminal, else a line now and then."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console = console
        self._runs = runs
        self._said_s = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(),
            console=console,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, now: Pass) -> None:
        if now.policy not in self._tasks:
            title = f"{len(self._tasks) + 1} of {len(TITLES)}  {TITLES[now.policy]}"
            self._tasks[now.policy] = self._progress.add_task(title, total=self._runs)
        ended = len(now.results)
        self._progress.update(self._tasks[now.policy], completed=ended)
        if ended == self._runs:
            self._progress.stop_task(self._tasks[now.policy])
        if self._live:
            self._live.update(Group(self._progress, progress_table(now)), refresh=True)
        elif ended == self._runs or time.monotonic() - self._said_s > SAY_EVERY_S:
            self._said_s = time.monotonic()
            waiting = sum(n.waiting for n in now.snapshot.lines) if now.snapshot else 0
            self._console.print(f"{TITLES[now.policy]}: {ended} of {self._runs} runs ended, {waiting} calls wait")


def progress_table(now: Pass) -> Table:
    """What waits, what runs, and which deadlines were met so far, by class."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column(f"  {LABEL}, depth of the queue", style="dim")
    for name in ("calls waiting", "calls running", "in time so far"):
        shown.add_column(name, justify="right")
    for c in ServiceClass:
        lines = [n for n in (now.snapshot.lines if now.snapshot else ()) if n.service_class is c]
        mine = [r for r in now.results if r.service_class is c]
        waiting = sum(n.waiting for n in lines)
        bar = "▪" * min(waiting, 40)
        shown.add_row(
            f"  {c.value:<12}{bar:<40}",
            str(waiting),
            str(sum(n.running for n in lines)),
            f"{sum(r.met for r in mine)} of {len(mine)}",
        )
    return shown
