"""One pass of the demo: a policy serves the whole workload. The app's side, and what can be seen of it meanwhile.

Benches serve the same workload by the same `Pass`, on other engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import math
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Final, Protocol

from maestro_agents.cli.demo_input import MESSAGES, Arrival
from maestro_agents.cli.demo_report import RunResult
from maestro_agents.cli.snapshot import Snapshot
from maestro_agents.core import Observation, RunEnd, ServiceClass
from maestro_agents.errors import EngineError

DEADLINES_S: Final[Mapping[ServiceClass, float]] = {ServiceClass.INTERACTIVE: 6.0, ServiceClass.BATCH: 60.0}
"""Fixed beforehand: about three times what a run takes on idle engines; batch has ample time."""

LENGTHS: Final = {"classify": 6, "order": 120, "account": 90, "policy": 120, "history": 90, "draft": 260, "review": 12}
"""Median output tokens by node. An emulated engine cannot know how long an answer should be, so the demo says so."""

SPREAD: Final = 0.35
"""Standard deviation of the lengths' logarithm."""

LOOK_EVERY_S: Final = 0.5


class Log(Protocol):
    """Where the waits are read from: a `ports.Queue`."""

    async def read_log(self, after: str, n: int) -> tuple[str, Sequence[Observation | RunEnd]]: ...


class Looks(Protocol):
    """Where the view's snapshots come from: a `snapshot.Watch`."""

    async def snapshot(self) -> Snapshot: ...


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
    wanted = round(LENGTHS[node] * math.exp(rng.gauss(0.0, SPREAD)))
    return {"min_tokens": min(max(1, wanted), sample("support_triage").MAX_TOKENS[node])}


class Pass:
    """One policy serving the whole workload: the app's side, and what can be seen of it meanwhile."""

    def __init__(
        self,
        policy: str,
        plan: Sequence[Arrival],
        *,
        queue: Log,
        watch: Looks,
        app: Any,
        deadlines_s: Mapping[ServiceClass, float] = DEADLINES_S,
    ) -> None:
        self.policy = policy
        self.plan = plan
        self.deadlines_s = deadlines_s
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
        try:
            with maestro.options(service_class="batch", deadline_s=self.deadlines_s[ServiceClass.BATCH]):
                await self._app.ainvoke({"message": MESSAGES[0]})
        except Exception as e:  # LangGraph and the SDK raise what they like; the demo cannot go on
            raise EngineError(f"the first run of the sample failed: {type(e).__name__}: {e}") from e
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
        deadline_s = self.deadlines_s[arrival.service_class]
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
