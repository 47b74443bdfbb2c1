"""The runs of this process: when each began, under which terms, and how it ended.

A callback id leads to the run that it belongs to. All tables are bounded and cleaned when a run ends. A run that ends takes
its waiting stages with it; work that outlives a run that ended *well* (a task left in the background) does not belong to
it any more. A thread of a synchronous node cannot be stopped when its run is cancelled: it is an orphan, and finds its run
gone when it comes to the gate.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID
from weakref import WeakSet

from langgraph.errors import GraphInterrupt

from maestro_agents.client import Client
from maestro_agents.core import DEFAULT_DEADLINE_S, RunEnd, ServiceClass
from maestro_agents.settings import Settings
from maestro_langgraph.graph import Workflow
from maestro_langgraph.options import Options, options_now

logger = logging.getLogger("maestro")

MAX_RUNS: Final = 100_000
"""Callback ids remembered at a time, over all live runs; the oldest is forgotten first."""
MAX_ORPHANS: Final = 4_096
WIDE_EXECUTOR_THREADS: Final = 64

_runs: dict[UUID, Run] = {}
_orphans: dict[UUID, Run] = {}
_widened: WeakSet[asyncio.AbstractEventLoop] = WeakSet()


@dataclass(eq=False, slots=True, kw_only=True)
class Run:
    """One execution of a workflow in this process, from its root's start to its end."""

    root: UUID
    options: Options
    workflow: Workflow | None = None
    name: str = ""
    began_monotonic_s: float = field(default_factory=time.monotonic)
    #: Fixed when the first stage needs them, counted from the run's start (queue's clock).
    started_at_s: float = 0.0
    deadline_at_s: float = 0.0
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    tenant: str = "default"
    stages: int = 0
    paused: bool = False
    #: Empty while it runs; then ``done``, ``error``, ``cancelled`` or ``paused``.
    outcome: str = ""
    members: set[UUID] = field(default_factory=set[UUID])
    visits: dict[str, Iterator[int]] = field(default_factory=dict[str, Iterator[int]])
    #: Answers that stream now, and the LangGraph task that reads each.
    open_streams: dict[object, str] = field(default_factory=dict[object, str])

    @property
    def run_id(self) -> str:
        return str(self.root)

    def settle(self, client: Client) -> None:
        """Fix start, deadline, class and tenant at the first stage. Later calls change nothing."""
        if not self.started_at_s:
            settings = client.settings
            self.service_class, deadline_s, self.tenant = terms(self.options, settings)
            self.started_at_s = client.now_s() - (time.monotonic() - self.began_monotonic_s)
            self.deadline_at_s = self.started_at_s + deadline_s
        self.stages += 1

    def visit(self, node: str) -> int:
        """Return how many stages this node had in this run before."""
        return next(self.visits.setdefault(node, itertools.count()))

    def holds_stream(self, task: str) -> bool:
        """Whether this LangGraph task, or one that it is nested in, is reading an answer that still streams."""
        return any(task == held or task.startswith(f"{held}|") for held in tuple(self.open_streams.values()) if held)


def clear() -> None:
    """Forget all runs. After a fork the parent's runs are the parent's."""
    _runs.clear()
    _orphans.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=clear)


def live() -> int:
    """Count the callback ids that are remembered now."""
    return len(_runs)


def find(callback_id: UUID | None) -> Run | None:
    """Return the run that a callback id belongs to, also where that run ended badly under it."""
    return None if callback_id is None else _runs.get(callback_id) or _orphans.get(callback_id)


def terms(options: Options, settings: Settings) -> tuple[ServiceClass, float, str]:
    """Return service class, seconds to the deadline, and tenant: what the code says over what the settings say."""
    service_class = options.service_class or settings.service_class
    deadline_s = options.deadline_s or settings.deadline_s or DEFAULT_DEADLINE_S[service_class]
    return service_class, deadline_s, options.tenant or settings.tenant


def start(
    callback_id: UUID,
    parent: UUID | None,
    *,
    options: Options,
    workflow: Workflow | None,
    name: str | None,
) -> None:
    """Note that something begins: a part of a run that is known, or a run of its own. Saying it twice is once."""
    run = _runs.get(callback_id)
    if run is None:
        run = find(parent)
        if run is not None and run.outcome and run.outcome != "done":
            return  # an orphan starts nothing
        if run is None:
            run = Run(root=callback_id, options=options_now(options))
            _widen_executor()
        run.members.add(callback_id)
        _runs[callback_id] = run
        _bound(_runs, MAX_RUNS)
    if run.root == callback_id and run.workflow is None and workflow is not None:
        run.workflow = workflow  # where the process-wide handler came first, the graph's own knows more
        run.name = name if name and name != "LangGraph" else ""
        run.options = options_now(options)


def end(callback_id: UUID, error: BaseException | None) -> None:
    """Note that something ended; where it was a run's root, the run has."""
    run = _runs.pop(callback_id, None)
    if run is None:
        return
    run.members.discard(callback_id)
    if run.root != callback_id:
        # A node that failed, handed over (ParentCommand) or was interrupted: its root will tell. One that was cancelled
        # may be a thread that goes on and calls later.
        if error is not None and not isinstance(error, Exception):
            _orphans[callback_id] = run
            _bound(_orphans, MAX_ORPHANS)
        return
    run.outcome = _outcome(run, error)
    for member in tuple(run.members):
        _runs.pop(member, None)
        if run.outcome != "done":
            _orphans[member] = run
    run.members.clear()
    _bound(_orphans, MAX_ORPHANS)
    if run.stages:
        client = Client.current()
        client.end_run(
            RunEnd(
                run_id=run.run_id,
                workflow=run.workflow.fingerprint if run.workflow else "",
                outcome=run.outcome,
                started_at_s=run.started_at_s,
                ended_at_s=client.now_s(),
                deadline_at_s=run.deadline_at_s,
                service_class=run.service_class,
                tenant=run.tenant,
            )
        )


def _outcome(run: Run, error: BaseException | None) -> str:
    if run.paused or isinstance(error, GraphInterrupt):
        return "paused"
    if error is None:
        return "done"
    return "cancelled" if not isinstance(error, Exception) else "error"


def _bound(table: dict[UUID, Run], limit: int) -> None:
    while len(table) > limit:
        table.pop(next(iter(table)), None)


# -- thread starvation ---------------------------------------------------------------------------------------------------
def _widen_executor() -> None:
    """Give the running loop more threads: synchronous nodes under ``ainvoke`` each hold one while they wait at the gate.

    Only where the loop still has asyncio's own small executor, or none yet; one that the user set is left alone.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    if loop in _widened:
        return
    _widened.add(loop)
    missing = object()
    current = getattr(loop, "_default_executor", missing)  # asyncio has no public way to ask
    own = current is None or getattr(current, "_thread_name_prefix", "") == "asyncio"
    if not own or not Client.configured().widen_executor:
        return
    loop.set_default_executor(ThreadPoolExecutor(WIDE_EXECUTOR_THREADS, thread_name_prefix="maestro-nodes"))
    if isinstance(current, ThreadPoolExecutor):
        current.shutdown(wait=False)  # what runs there ends there
    logger.debug("maestro: the event loop's executor now has %d threads", WIDE_EXECUTOR_THREADS)
