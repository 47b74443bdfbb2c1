"""Who makes this call: which run of which workflow, which node.

One callback handler watches runs begin and end (`runs`) and, at the start of a model call, leaves a note (`Caller`) in a
context variable; the gate takes it a moment later. The handler only keeps dictionaries: it never waits, and nothing that
goes wrong in it reaches the app. Where the note is missing (a raw SDK call in a node, a model call that makes two
requests), LangChain's own context says the node; where that is missing too, the call is anonymous and still served.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, cast
from uuid import UUID

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.types import Command

from maestro_langgraph import runs
from maestro_langgraph.graph import Workflow
from maestro_langgraph.graph.moves import node_path
from maestro_langgraph.options import Options
from maestro_langgraph.quiet import warn_once
from maestro_langgraph.runs import Run
from maestro_langgraph.timeouts import Timeouts

_P = ParamSpec("_P")


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


_note: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("maestro_caller", default=None)


def role_of(node: str, *agents: str) -> str:
    """Agent names + node path; a name that the path already holds is not said twice."""
    parts = node.split(":") if node else []
    front = [a for a in dict.fromkeys(agents) if a and a not in parts]
    return ":".join([*front, *parts])


def take_caller() -> Caller:
    """Who makes the call that is at the gate now. Never raises, never waits."""
    note = _note.get()
    if note is not None and not note.taken:
        note.taken = True
        return note
    config = cast("Mapping[str, Any]", var_child_runnable_config.get() or {})
    parent = getattr(config.get("callbacks"), "parent_run_id", None)
    return _caller(cast("Mapping[str, Any]", config.get("metadata") or {}), runs.find(parent), None)


def _caller(metadata: Mapping[str, Any], run: Run | None, llm_run: UUID | None) -> Caller:
    task = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("checkpoint_ns") or "")
    node = node_path(task) or str(metadata.get("langgraph_node") or "")
    named = str(metadata.get("lc_agent_name") or "")
    agent = (run.options.agent or run.name) if run else ""
    if run is not None:
        run.moves.call(node, task)
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

    It carries its graph's workflow, options and timeouts, and is held by the graph alone: when the graph goes, so do they.
    """

    run_inline = True  # the note must be left in the caller's own context
    raise_error = False

    def __init__(
        self, workflow: Workflow | None = None, options: Options | None = None, timeouts: Timeouts | None = None
    ) -> None:
        self.workflow = workflow
        self.options = options or Options()
        self.timeouts = timeouts

    # -- starts ------------------------------------------------------------------------------------------------------
    @_guarded
    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: object,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        name, said = kwargs.get("name"), metadata or {}
        resumes = parent_run_id is None and (inputs is None or isinstance(inputs, Command))
        news = self._start(run_id, parent_run_id, name, thread=str(said.get("thread_id") or ""), resumes=resumes)
        if news is not None:
            news.moves.start(run_id, said, news.workflow)
        if name and name == said.get("langgraph_node") and not any(t.startswith("seq:step:") for t in tags or ()):
            self._begin_task(run_id, said, news=news is not None)

    def _begin_task(self, callback_id: UUID, said: Mapping[str, Any], *, news: bool) -> None:
        """A node begins: one task of a superstep (or a ``@task`` of the functional API)."""
        run = runs.find(callback_id)
        task = str(said.get("langgraph_checkpoint_ns") or "")
        if run is None or not task:
            return
        if news:
            run.begin_task(task, str(said["langgraph_node"]), int(said.get("langgraph_step") or 0))
        if self.timeouts is not None and self.workflow is run.workflow:
            run.limit_task(task, *self.timeouts.of(node_path(task)))

    @_guarded
    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: object,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """A sub-agent that runs inside a tool has the tool's run as its parent."""
        self._start(run_id, parent_run_id, kwargs.get("name"))

    @_guarded
    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        self._start(run_id, parent_run_id, kwargs.get("name"))

    @_guarded
    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: object,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        note = _note.get()
        if note is None or note.llm_run != run_id:
            _note.set(_caller(metadata or {}, runs.find(parent_run_id), run_id))

    @_guarded
    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,
        prompts: object,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        note = _note.get()
        if note is None or note.llm_run != run_id:
            _note.set(_caller(metadata or {}, runs.find(parent_run_id), run_id))

    # -- ends --------------------------------------------------------------------------------------------------------
    @_guarded
    def on_llm_end(self, response: object, *, run_id: UUID, **kwargs: Any) -> None:
        _spend_note(run_id)  # answered from a cache, or by a model that has no gate

    @_guarded
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        _spend_note(run_id)

    @_guarded
    def on_chain_end(self, outputs: object, *, run_id: UUID, **kwargs: Any) -> None:
        runs.end(run_id, None)

    @_guarded
    def on_tool_end(self, output: object, *, run_id: UUID, **kwargs: Any) -> None:
        runs.end(run_id, None)

    @_guarded
    def on_retriever_end(self, documents: object, *, run_id: UUID, **kwargs: Any) -> None:
        runs.end(run_id, None)

    @_guarded
    def on_chain_error(
        self, error: BaseException, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        runs.end(run_id, error, parent_run_id)

    @_guarded
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        runs.end(run_id, error)

    @_guarded
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        runs.end(run_id, error)

    @_guarded
    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        run = runs.find(event.run_id)
        if run is not None and run.root == event.run_id:
            run.paused = True

    def _start(
        self, run_id: UUID, parent: UUID | None, name: str | None, *, thread: str = "", resumes: bool = False
    ) -> Run | None:
        return runs.start(
            run_id,
            parent,
            options=self.options,
            workflow=self.workflow,
            name=name,
            thread=thread,
            resumes=resumes,
        )


def _spend_note(run_id: UUID) -> None:
    note = _note.get()
    if note is not None and note.llm_run == run_id:
        note.taken = True
