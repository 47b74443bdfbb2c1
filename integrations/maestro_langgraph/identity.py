"""Who makes this call: which run of which workflow, which node, the how-manieth time.

One callback handler watches runs begin and end and, at the start of a model call, leaves a note (`Caller`) in a context
variable; the gate takes it a moment later. The handler only keeps dictionaries: it never waits, and nothing that goes
wrong in it reaches the app. Where the note is missing (a raw SDK call in a node, a model call that made two requests),
LangChain's own context says the node; where that is missing too, the call is anonymous and still served.

All tables are bounded and cleaned when a run ends. A run that ends takes its waiting stages with it; work that outlives
a run that ended *well* (a task left in the background) is served as anonymous work.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, ParamSpec, cast
from uuid import UUID
from weakref import WeakSet

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.errors import GraphInterrupt

from maestro_agents.client import Client
from maestro_agents.core import DEFAULT_DEADLINE_S, RunEnd, ServiceClass
from maestro_agents.settings import Settings
from maestro_langgraph.graph import Workflow
from maestro_langgraph.options import Options

logger = logging.getLogger("maestro")

MAX_RUNS: Final = 100_000
"""Callback runs remembered at a time, over all live runs; the oldest is forgotten first."""
MAX_ORPHANS: Final = 4_096
WIDE_EXECUTOR_THREADS: Final = 64

_P = ParamSpec("_P")

_warned: set[str] = set()
_widened: WeakSet[asyncio.AbstractEventLoop] = WeakSet()


def warn_once(where: str, error: BaseException) -> None:
    """Say once per place that something of ours failed; the user's call goes on."""
    if where not in _warned and len(_warned) < 100:
        _warned.add(where)
        logger.warning("maestro: %s failed (%s: %s); your calls go on", where, type(error).__name__, error)
        logger.debug("maestro: %s failed", where, exc_info=error)


@contextmanager
def quietly(where: str) -> Iterator[None]:
    """Keep an error of ours from the user's call."""
    try:
        yield
    except Exception as e:  # a bug of ours never breaks the user's graph
        warn_once(where, e)


@dataclass(eq=False, slots=True, kw_only=True)
class Run:
    """One execution of a workflow in this process, from its root's start to its end."""

    root: UUID
    options: Options
    workflow: Workflow | None = None
    name: str = ""
    thread_id: str = ""
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
        if self.stages == 0:
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


@dataclass(slots=True, kw_only=True)
class Caller:
    """The note that the handler leaves for the gate. Taken once, so that a later raw call is not mistaken for it."""

    run: Run | None = None
    #: The model call's callback id; None where the caller was found in LangChain's context.
    llm_run: UUID | None = None
    node: str = ""
    role: str = ""
    step: int = 0
    #: The checkpoint namespace: which LangGraph task this is.
    task: str = ""
    taken: bool = False


def terms(options: Options, settings: Settings) -> tuple[ServiceClass, float, str]:
    """Return service class, seconds to the deadline, and tenant: what the code says over what the settings say."""
    service_class = options.service_class or settings.service_class
    deadline_s = options.deadline_s or settings.deadline_s or DEFAULT_DEADLINE_S[service_class]
    return service_class, deadline_s, options.tenant or settings.tenant


def node_path(namespace: str) -> str:
    """``team:<task>|1|writer:<task>`` -> ``team:writer``: the id that the drawn graph gives the node."""
    return ":".join(part.split(":")[0] for part in namespace.split("|") if part and not part.isdigit())


def role_of(node: str, *agents: str) -> str:
    """Agent names + node path; a name that the path already holds is not said twice."""
    parts = node.split(":") if node else []
    front = [a for a in dict.fromkeys(agents) if a and a not in parts]
    return ":".join([*front, *parts])


# -- the tables of this process (never carried over a fork: the parent's runs are the parent's) -------------------------
_runs: dict[UUID, Run] = {}
_orphans: dict[UUID, Run] = {}
_note: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("maestro_caller", default=None)
defaults: Options = Options()
"""Options of `maestro.install`: they hold where neither the graph nor the request says otherwise."""


def _clear_tables() -> None:
    _runs.clear()
    _orphans.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_clear_tables)


def set_defaults(options: Options) -> None:
    global defaults
    defaults = options


def live_runs() -> int:
    """Count the callback runs that are remembered now."""
    return len(_runs)


def take_caller() -> Caller:
    """Who makes the call that is at the gate now. Never raises, never waits."""
    note = _note.get()
    if note is not None and not note.taken:
        note.taken = True
        return note
    config = cast("Mapping[str, Any]", var_child_runnable_config.get() or {})
    parent = getattr(config.get("callbacks"), "parent_run_id", None)
    return _caller(cast("Mapping[str, Any]", config.get("metadata") or {}), _find(parent), None)


def _find(run_id: UUID | None) -> Run | None:
    return None if run_id is None else _runs.get(run_id) or _orphans.get(run_id)


def _caller(metadata: Mapping[str, Any], run: Run | None, llm_run: UUID | None) -> Caller:
    task = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("checkpoint_ns") or "")
    node = node_path(task) or str(metadata.get("langgraph_node") or "")
    named = str(metadata.get("lc_agent_name") or "")
    agent = (run.options.agent or run.name) if run else ""
    return Caller(
        run=run,
        llm_run=llm_run,
        node=node,
        role=role_of(node, agent, named),
        step=int(metadata.get("langgraph_step") or 0),
        task=task,
    )


def _guarded(hook: Callable[_P, None]) -> Callable[_P, None]:
    """A hook that fails is told once and forgotten."""

    @functools.wraps(hook)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            hook(*args, **kwargs)
        except Exception as e:  # the app must not notice
            warn_once(f"callback {hook.__name__}", e)

    return guarded


class MaestroHandler(GraphCallbackHandler):
    """Watches runs. Several may watch the same run (graph, subgraph, process-wide): each event counts once.

    It carries its graph's workflow and options, and is held by the graph alone: when the graph goes, so do they.
    """

    run_inline = True  # the note must be left in the caller's own context
    raise_error = False

    def __init__(self, workflow: Workflow | None = None, options: Options | None = None) -> None:
        self.workflow = workflow
        self.options = options or Options()

    # -- starts ------------------------------------------------------------------------------------------------------
    @_guarded
    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,  # noqa: ARG002 - LangChain passes it by position
        inputs: object,  # noqa: ARG002
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._start(run_id, parent_run_id, metadata, kwargs.get("name"))

    @_guarded
    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,  # noqa: ARG002
        input_str: object,  # noqa: ARG002
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A sub-agent that runs inside a tool has the tool's run as its parent."""
        self._start(run_id, parent_run_id, metadata, kwargs.get("name"))

    @_guarded
    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,  # noqa: ARG002
        query: str,  # noqa: ARG002
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._start(run_id, parent_run_id, metadata, kwargs.get("name"))

    @_guarded
    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,  # noqa: ARG002
        messages: object,  # noqa: ARG002 - never looked at
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        note = _note.get()
        if note is None or note.llm_run != run_id:
            _note.set(_caller(metadata or {}, _find(parent_run_id), run_id))

    @_guarded
    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,  # noqa: ARG002
        prompts: object,  # noqa: ARG002
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        note = _note.get()
        if note is None or note.llm_run != run_id:
            _note.set(_caller(metadata or {}, _find(parent_run_id), run_id))

    # -- ends --------------------------------------------------------------------------------------------------------
    @_guarded
    def on_llm_end(self, response: object, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        _spend_note(run_id)  # answered from a cache, or by a model that has no gate

    @_guarded
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        _spend_note(run_id)

    @_guarded
    def on_chain_end(self, outputs: object, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        _end(run_id, None)

    @_guarded
    def on_tool_end(self, output: object, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        _end(run_id, None)

    @_guarded
    def on_retriever_end(self, documents: object, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        _end(run_id, None)

    @_guarded
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        _end(run_id, error)

    @_guarded
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        _end(run_id, error)

    @_guarded
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        _end(run_id, error)

    @_guarded
    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        run = _find(event.run_id)
        if run is not None and run.root == event.run_id:
            run.paused = True

    def _start(self, run_id: UUID, parent: UUID | None, metadata: dict[str, Any] | None, name: str | None) -> None:
        run = _runs.get(run_id)
        if run is None:
            run = _find(parent)
            if run is not None and run.outcome and run.outcome != "done":
                return  # an orphan: it may look its run up, but starts nothing
            if run is None:
                run = Run(
                    root=run_id,
                    options=current_options().over(self.options).over(defaults),
                    thread_id=str((metadata or {}).get("thread_id") or ""),
                )
                _widen_executor()
            run.members.add(run_id)
            _runs[run_id] = run
            _bound(_runs, MAX_RUNS)
        if run.root == run_id and run.workflow is None and self.workflow is not None:
            run.workflow = self.workflow  # the process-wide handler came first
            run.name = name if name and name != "LangGraph" else ""
            run.options = current_options().over(self.options).over(defaults)


def _end(run_id: UUID, error: BaseException | None) -> None:
    run = _runs.pop(run_id, None)
    if run is None:
        return
    run.members.discard(run_id)
    if run.root != run_id:
        return  # a node that failed, handed over (ParentCommand) or was interrupted: its root will tell
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


def _spend_note(run_id: UUID) -> None:
    note = _note.get()
    if note is not None and note.llm_run == run_id:
        note.taken = True


def _bound(table: dict[UUID, Run], limit: int) -> None:
    while len(table) > limit:
        table.pop(next(iter(table)), None)


# -- options of one request ----------------------------------------------------------------------------------------------
_request_options: contextvars.ContextVar[Options] = contextvars.ContextVar("maestro_options", default=Options())


def current_options() -> Options:
    """Return what `maestro.options` says for the code that runs now."""
    return _request_options.get()


@contextmanager
def request_options(options: Options) -> Iterator[None]:
    """Hold options for every run that begins inside."""
    token = _request_options.set(options.over(_request_options.get()))
    try:
        yield
    finally:
        _request_options.reset(token)


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
    if not own or not Settings.load().widen_executor:
        return
    loop.set_default_executor(ThreadPoolExecutor(WIDE_EXECUTOR_THREADS, thread_name_prefix="maestro-nodes"))
    if isinstance(current, ThreadPoolExecutor):
        current.shutdown(wait=False)  # what runs there ends there
    logger.debug("maestro: the event loop's executor now has %d threads", WIDE_EXECUTOR_THREADS)
