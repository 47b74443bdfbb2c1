"""What a run shows of its graph: how often each node began, how many LLM calls it made, and what led to what.

Fed from callbacks: a task is known by its checkpoint namespace (``team:<task>|writer:<task>``), which also names the task
it runs in. Tasks of one superstep have the tasks of the superstep before as sources, as far as the drawn graph allows;
a join names its sources; a nested graph begins where its own node was reached, and what follows it follows its last tasks.
Tasks of the functional API have no supersteps: one that begins when none beside it runs follows those that ran before.
Only dictionary work, bounded per run. A node that begins costs some microseconds.
"""

from __future__ import annotations

import copy
import functools
import heapq
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from uuid import UUID

from langgraph.errors import GraphInterrupt

from maestro_agents.core import RunEnd
from maestro_agents.workflow import MAX_WORKFLOWS, Seen
from maestro_langgraph.graph import END, START, Workflow

MAX_TASKS: Final = 2_000
"""Tasks of one run that are followed; later ones are not counted."""
MAX_ENTRIES: Final = 200
"""Nodes, and moves, that the end of a run carries; the rarest are left out."""

_K = TypeVar("_K")
_Nodes = Mapping[str, int]


@functools.lru_cache(maxsize=1024)
def node_path(namespace: str) -> str:
    """``team:<task>|1|writer:<task>`` -> ``team:writer``: the id that the drawn graph gives the node."""
    return ":".join(part.split(":")[0] for part in namespace.split("|") if part and not part.isdigit())


def _sum(parts: Iterable[_Nodes]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for node, n in part.items():
            total[node] = total.get(node, 0) + n
    return total


@dataclass(eq=False, slots=True)
class _Task:
    node: str
    frame: _Frame
    #: What led to it.
    sources: _Nodes
    container: bool
    #: Graphs that ran inside it.
    inner: list[_Frame] = field(default_factory=list["_Frame"])
    calls: int = 0

    def exits(self) -> _Nodes:
        """The nodes after which what follows this task begins."""
        if self.inner:
            return _sum(frame.exits() for frame in self.inner if frame.last)
        return self.sources if self.container else {self.node: 1}


@dataclass(eq=False, slots=True)
class _Frame:
    """One execution of one graph, or the tasks of one function."""

    #: What led to its first tasks.
    entry: _Nodes
    step: int = -1
    live: int = 0
    #: Whether what follows the task around it follows this one: not so where another began after it.
    last: bool = True
    batch: list[_Task] = field(default_factory=list[_Task])
    before: _Nodes = field(default_factory=dict[str, int])
    #: Ended tasks that nothing has followed yet.
    leaves: dict[str, int] = field(default_factory=dict[str, int])
    #: Name in this graph -> exits of its tasks: what a join calls its sources.
    named: dict[str, _Nodes] = field(default_factory=dict[str, _Nodes])
    begun: bool = False

    def turn(self) -> None:
        """A new superstep: the tasks so far become what leads to it."""
        if not self.batch:
            self.before = self.entry
            return
        self.before = _sum(task.exits() for task in self.batch)
        self.leaves.update(self.before)
        self.batch = []

    def exits(self) -> _Nodes:
        return _sum((self.leaves, *(task.exits() for task in self.batch)))


class Moves:
    """What one run has shown so far. Nodes of one superstep may begin in several threads."""

    __slots__ = ("_calls", "_counts", "_frames", "_live", "_lock", "_moves", "_tasks")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, _Task] = {}
        self._live: dict[UUID, _Task] = {}
        self._frames: dict[str, _Frame] = {}
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._moves: defaultdict[tuple[str, str], int] = defaultdict(int)

    def start(self, callback_id: UUID, metadata: Mapping[str, Any], workflow: Workflow | None) -> None:
        """Note that something begins inside a task. The first that does is the task itself."""
        namespace = metadata.get("langgraph_checkpoint_ns")
        if not namespace or namespace in self._tasks or len(self._tasks) >= MAX_TASKS:
            return
        with self._lock:
            if namespace not in self._tasks:
                self._start(str(namespace), callback_id, metadata, workflow)

    def _start(self, namespace: str, callback_id: UUID, metadata: Mapping[str, Any], workflow: Workflow | None) -> None:
        node = node_path(namespace)
        parent, _, own = namespace.rpartition("|")
        name = own.partition(":")[0]
        if name == START:
            return  # the router of a graph's entry: no node of it
        step = int(metadata.get("langgraph_step") or 0)
        path = metadata.get("langgraph_path") or ()
        frame = self._frames.get(parent)
        if frame is None:
            frame = self._frames[parent] = self._frame(parent, step)
        called = len(path) > 1 and isinstance(path[1], tuple)  # a @task, begun by code
        if not frame.begun or step != frame.step or (called and not frame.live):
            frame.turn()
            frame.begun, frame.step = True, step
        sources = _sources(frame, metadata.get("langgraph_triggers") or (), workflow, node)
        for source in sources:
            frame.leaves.pop(source, None)
        container = workflow is not None and node in workflow.containers
        task = _Task(node, frame, sources, container)
        self._tasks[namespace] = self._live[callback_id] = task
        frame.batch.append(task)
        frame.named[name] = {node: 1}
        frame.live += 1
        if not container:
            self._counts[node] += 1
            for source, times in sources.items():
                self._moves[source, node] += times

    def _frame(self, parent: str, step: int) -> _Frame:
        owner_ns = parent
        while owner_ns and owner_ns.rpartition("|")[2].isdigit():
            owner_ns = owner_ns.rpartition("|")[0]
        owner = self._tasks.get(owner_ns)
        if owner is None:  # a run that goes on after an interrupt begins in the middle
            return _Frame({START: 1} if not parent and step <= 1 else {})
        entry: _Nodes = owner.sources if owner.container else {owner.node: 1}
        if owner.inner:
            if owner.inner[-1].live:
                entry = owner.inner[-1].entry
            else:
                entry, owner.inner[-1].last = owner.inner[-1].exits(), False
        frame = _Frame(entry)
        owner.inner.append(frame)
        return frame

    def end(self, callback_id: UUID, error: BaseException | None) -> None:
        """Note that something ended. A task that was interrupted runs again from its start: that one counts."""
        if callback_id not in self._live:
            return
        with self._lock:
            task = self._live.pop(callback_id, None)
            if task is None:
                return
            task.frame.live -= 1
            if isinstance(error, GraphInterrupt) and not task.container:
                self._counts[task.node] -= 1
                self._calls[task.node] -= task.calls

    def call(self, node: str, namespace: str) -> None:
        """Note an LLM call of a node."""
        with self._lock:
            self._calls[node] += 1
            task = self._tasks.get(namespace)
            if task is not None and task.node == node:
                task.calls += 1

    def counts(self, *, done: bool) -> tuple[dict[str, int], dict[str, int], tuple[tuple[str, str, int], ...]]:
        """Return tasks, LLM calls and moves, as the end of a run carries them.

        Of a run that ended well, what nothing followed led to the end; of another, it is not known what it would have
        led to, and it is not counted.
        """
        with self._lock:
            tasks, moves = self._counts.copy(), self._moves.copy()
            root = self._frames.get("")
            last: _Nodes = root.exits() if root is not None else {}
            for node, times in last.items():
                if done:
                    moves[node, END] += times
                elif tasks[node] > 0:
                    tasks[node] = max(0, tasks[node] - times)
            calls = _most(self._calls)
        return _most(tasks), calls, tuple((a, b, n) for (a, b), n in _most(moves).items())


def _most(counts: Mapping[_K, int]) -> dict[_K, int]:
    """What was counted, without the rarest where there is too much."""
    some = {key: n for key, n in counts.items() if n > 0}
    if len(some) <= MAX_ENTRIES:
        return some
    return dict(heapq.nlargest(MAX_ENTRIES, some.items(), key=lambda counted: counted[1]))


def _sources(frame: _Frame, triggers: tuple[str, ...], workflow: Workflow | None, node: str) -> _Nodes:
    """What led to a task that begins now: a join names it; else whatever ended last and may lead there."""
    for trigger in triggers:
        if trigger.startswith("join:"):
            names = trigger[5:].rpartition(":")[0].split("+")
            found: dict[str, int] = {}
            for name in names:
                found.update(frame.named.get(name, {}))
            if found:
                return found
    before = frame.before
    if workflow is None or not before:
        return before
    known = workflow.into.get(node, frozenset())
    late: _Nodes = frame.leaves  # a deferred node waits longer than one superstep
    for nodes, among in ((before, known), (late, known), (before, workflow.open)):
        some = {source: n for source, n in nodes.items() if source in among}
        if some:
            return some
    return before


# -- what this process has seen ------------------------------------------------------------------------------------------
_observed: OrderedDict[str, Seen] = OrderedDict()
_observed_lock = threading.Lock()


def learn(run: RunEnd) -> None:
    """Remember what a run of this process showed of its graph."""
    if run.workflow:
        with _observed_lock:
            _observed.setdefault(run.workflow, Seen()).add(run)
            _observed.move_to_end(run.workflow)
            if len(_observed) > MAX_WORKFLOWS:
                _observed.popitem(last=False)


def observed(fingerprint: str) -> Seen:
    """Return what runs of this process showed of a graph so far; empty where there were none."""
    with _observed_lock:
        return copy.deepcopy(_observed.get(fingerprint)) or Seen()
