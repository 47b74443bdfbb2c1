"""Putting Maestro on a program: around a graph, on the function that builds it, on the whole process, or on one model.

The first three have one effect: a handler that tells who calls (`identity`) and the gate around the SDK (`gate`). A graph
stays the same object, of the same type; only its list of callbacks grows by one. A model is served without the gate
(`models`). Whatever is combined, a call is served once.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, Final, ParamSpec, TypeVar, Unpack, cast, overload
from uuid import UUID
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.tracers import context as tracer_context
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from maestro_agents.client import Client
from maestro_agents.errors import ConfigError
from maestro_langgraph import gate, runs
from maestro_langgraph.graph import describe
from maestro_langgraph.identity import MaestroHandler
from maestro_langgraph.models import wrap_model
from maestro_langgraph.options import OptionArgs, Options, request_options, set_defaults
from maestro_langgraph.quiet import quietly
from maestro_langgraph.timeouts import Timeouts

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M")
G = TypeVar("G", bound="Pregel[Any, Any, Any, Any] | StateGraph[Any, Any, Any, Any]")

_START_FRAMES: Final = 10
"""Within so many frames of the callback lies `Pregel.stream`, where it is a graph's run that begins."""

_HELP: Final = "give maestro a StateGraph, a compiled graph, or a function that returns one"


class Maestro:
    """Everything a LangGraph program needs to say. There is one: `maestro_langgraph.maestro`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._hook: contextvars.ContextVar[MaestroHandler | None] | None = None
        self._graphs: WeakSet[Pregel[Any, Any, Any, Any]] = WeakSet()
        self._builders: WeakSet[StateGraph[Any, Any, Any, Any]] = WeakSet()

    # -- @maestro ----------------------------------------------------------------------------------------------------
    @overload
    def __call__(self, target: G, /, **options: Unpack[OptionArgs]) -> G: ...
    @overload
    def __call__(self, target: Callable[P, R], /, **options: Unpack[OptionArgs]) -> Callable[P, R]: ...
    @overload
    def __call__(self, /, **options: Unpack[OptionArgs]) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def __call__(self, target: Any = None, /, **options: Unpack[OptionArgs]) -> Any:
        """Decorate a function that builds a graph (``@maestro`` or ``@maestro(service_class=...)``), or wrap a graph.

        The function keeps its name and signature. It may be asynchronous, and may be a context manager (or what becomes
        one, on either side of the decorator) that gives the graph. Raises `ConfigError` for a wrong option at once, and
        for a function that returns no graph when it is called.
        """
        Options.check(options)
        if target is None:
            return functools.partial(self.__call__, **options)
        if isinstance(target, Pregel | StateGraph):
            return self.wrap(cast("Any", target), **options)
        if not callable(target):
            raise ConfigError(f"maestro cannot wrap {_kind(target)}: {_HELP}")
        return self._builder(cast("Callable[..., Any]", target), options)

    def _builder(self, build: Callable[..., Any], options: OptionArgs) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(build):

            @functools.wraps(build)
            async def build_streaming(*args: Any, **kwargs: Any) -> Any:
                async with asynccontextmanager(build)(*args, **kwargs) as graph:
                    yield self._built(graph, build, options)

            return build_streaming

        if inspect.isgeneratorfunction(build):

            @functools.wraps(build)
            def build_yielding(*args: Any, **kwargs: Any) -> Any:
                with contextmanager(build)(*args, **kwargs) as graph:
                    yield self._built(graph, build, options)

            return build_yielding

        if inspect.iscoroutinefunction(build):

            @functools.wraps(build)
            async def build_async(*args: Any, **kwargs: Any) -> Any:
                return self._built(await build(*args, **kwargs), build, options)

            return build_async

        @functools.wraps(build)
        def build_sync(*args: Any, **kwargs: Any) -> Any:
            graph = build(*args, **kwargs)
            if inspect.isawaitable(graph):
                return self._built_later(graph, build, options)
            return self._built(graph, build, options)

        return build_sync

    async def _built_later(self, graph: Awaitable[Any], build: Callable[..., Any], options: OptionArgs) -> Any:
        return self._built(await graph, build, options)

    @asynccontextmanager
    async def _entered_async(self, context: Any, build: Callable[..., Any], options: OptionArgs) -> AsyncGenerator[Any]:
        async with context as graph:
            yield self._built(graph, build, options)

    @contextmanager
    def _entered(self, context: Any, build: Callable[..., Any], options: OptionArgs) -> Generator[Any]:
        with context as graph:
            yield self._built(graph, build, options)

    def _built(self, graph: Any, build: Callable[..., Any], options: OptionArgs) -> Any:
        if isinstance(graph, AbstractAsyncContextManager):  # graphs that live as long as a connection
            return self._entered_async(graph, build, options)
        if isinstance(graph, AbstractContextManager):
            return self._entered(graph, build, options)
        if not isinstance(graph, Pregel | StateGraph):
            name = getattr(build, "__qualname__", repr(build))
            raise ConfigError(
                f"{name}() is decorated with @maestro and returned {_kind(graph)}: return the graph it built "
                "(on an @entrypoint function, put @maestro above it)"
            )
        return self.wrap(cast("Any", graph), **options)

    # -- wrap --------------------------------------------------------------------------------------------------------
    def wrap(self, graph: G, /, **options: Unpack[OptionArgs]) -> G:
        """Manage a graph's calls, and return the very same object. Twice is once, with the options of both."""
        checked = Options.check(options)
        target = cast("object", graph)
        if not isinstance(target, Pregel | StateGraph):
            raise ConfigError(f"maestro cannot wrap {_kind(target)}: {_HELP}")
        gate.install()
        with self._lock:
            if isinstance(target, StateGraph):
                self._watch_compile(cast("Any", target), options)
            else:
                self._attach(cast("Any", target), checked)
        return graph

    def _attach(self, graph: Pregel[Any, Any, Any, Any], options: Options) -> None:
        config = graph.config or {}
        callbacks = config.get("callbacks")
        handlers = callbacks.handlers if isinstance(callbacks, BaseCallbackManager) else list(callbacks or ())
        ours = next((h for h in handlers if isinstance(h, MaestroHandler)), None)
        if ours is not None:
            ours.options = options.over(ours.options)
            return
        handler = _handler_of(graph, options)
        if isinstance(callbacks, BaseCallbackManager):
            grown: Any = callbacks.copy()
            grown.add_handler(handler, inherit=True)
        else:
            grown = [*handlers, handler]
        graph.config = {**config, "callbacks": grown}
        self._graphs.add(graph)

    def _watch_compile(self, graph: StateGraph[Any, Any, Any, Any], options: OptionArgs) -> None:
        """The builder is not what runs: whatever it compiles is wrapped."""
        if graph in self._builders:
            cast("Any", graph.compile).options.update(options)
            return
        inner: Callable[..., Any] = cast("Any", graph).compile
        kept = dict(options)

        @functools.wraps(inner)
        def compile_wrapped(*args: Any, **kwargs: Any) -> Any:
            return self.wrap(inner(*args, **kwargs), **cast("OptionArgs", kept))

        cast("Any", compile_wrapped).options = kept
        graph.compile = compile_wrapped
        self._builders.add(graph)

    # -- one model ---------------------------------------------------------------------------------------------------
    def wrap_model(self, llm: M, /, **options: Unpack[OptionArgs]) -> M:
        """Manage one chat model's calls, wherever they are made: a copy of the same class, with no patch of the SDK.

        A model on the OpenAI SDK is ordered and routed; any other waits for its turn at its own URL, where there is no
        fleet. The options hold where neither the request nor the graph says more. Raises `ConfigError`.
        """
        return wrap_model(llm, Options.check(options))

    # -- the whole process -------------------------------------------------------------------------------------------
    def install(self, **options: Unpack[OptionArgs]) -> None:
        """Manage every LangGraph graph and every OpenAI call of this process. Again changes the options only."""
        checked = Options.check(options)
        with self._lock:
            set_defaults(checked)
            gate.install()
            if self._hook is None:
                self._hook = contextvars.ContextVar("maestro_handler", default=_ProcessHandler())  # noqa: B039 - meant to be shared
                tracer_context.register_configure_hook(self._hook, inheritable=True)

    def uninstall(self) -> None:
        """Take everything back: the gate, the process-wide hook, and the handlers of all wrapped graphs."""
        with self._lock:
            gate.uninstall()
            set_defaults(Options())
            if self._hook is not None:
                hooks = tracer_context._configure_hooks
                hooks[:] = [h for h in hooks if h[0] is not self._hook]
                self._hook = None
            for graph in list(self._graphs):
                _detach(graph)
            for builder in list(self._builders):
                vars(builder).pop("compile", None)
            self._graphs.clear()
            self._builders.clear()

    # -- one request, and the settings -------------------------------------------------------------------------------
    @contextmanager
    def options(self, **options: Unpack[OptionArgs]) -> Generator[None]:
        """Say who waits for the runs that begin inside: ``with maestro.options(service_class="batch"): ...``.

        A server needs it per request. It wins over what the graph or `install` says; a run that has begun keeps its terms.
        """
        with request_options(Options.check(options)):
            yield

    def graph(self, graph: Pregel[Any, Any, Any, Any] | StateGraph[Any, Any, Any, Any], /) -> dict[str, Any]:
        """Return what is known of a graph as a plain dictionary: as drawn, merged with what runs of this process showed.

        `maestro graph` shows the same; its parts are named in `maestro_langgraph.graph.view`. Nothing is run.
        """
        from maestro_langgraph.graph.view import compiled, view

        target = compiled(graph)
        if target is None:
            raise ConfigError(f"maestro cannot draw {_kind(graph)}: {_HELP}")
        return view(target)

    def configure(self, **settings: Any) -> None:
        """Settings of this process that win over ``MAESTRO_*`` and ``maestro.toml``. Best before the first call."""
        Client.configure(**settings)


class _ProcessHandler(MaestroHandler):
    """The handler of the whole process.

    It knows a graph by the frame that starts its run. Nothing is added to a graph's config: LangGraph shows that in
    snapshots, which apps compare and store.
    """

    def __init__(self) -> None:
        super().__init__()
        self._by_graph: WeakKeyDictionary[Pregel[Any, Any, Any, Any], MaestroHandler] = WeakKeyDictionary()
        self._by_workflow: WeakValueDictionary[int, MaestroHandler] = WeakValueDictionary()

    def on_chain_start(
        self, serialized: Any, inputs: object, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        handler: MaestroHandler = self
        with quietly("looking at a graph"):
            handler = self._handler(parent_run_id)
        MaestroHandler.on_chain_start(handler, serialized, inputs, run_id=run_id, parent_run_id=parent_run_id, **kwargs)

    def _handler(self, parent: UUID | None) -> MaestroHandler:
        """The one that stands for the graph whose run this belongs to."""
        if parent is not None:
            run = runs.find(parent)
            return self._by_workflow.get(id(run.workflow), self) if run is not None else self
        graph = _starting_graph()
        if graph is None:
            return self
        found = self._by_graph.get(graph)
        if found is None:
            found = self._by_graph[graph] = _handler_of(graph, Options())
            if found.workflow is not None:
                self._by_workflow[id(found.workflow)] = found
        return found


def _handler_of(graph: Pregel[Any, Any, Any, Any], options: Options) -> MaestroHandler:
    """A handler that knows a graph, as far as it can be looked at."""
    with quietly("looking at a graph"):
        return MaestroHandler(describe(graph), options, Timeouts(graph))
    return MaestroHandler(None, options)


def _starting_graph() -> Pregel[Any, Any, Any, Any] | None:
    """The graph whose `stream` tells its callbacks now that a run begins."""
    starts = {inspect.unwrap(getattr(Pregel, name)).__code__ for name in ("stream", "astream")}
    frame = inspect.currentframe()
    for _ in range(_START_FRAMES):
        frame = frame.f_back if frame is not None else None
        if frame is not None and frame.f_code in starts:
            return cast("Pregel[Any, Any, Any, Any]", frame.f_locals["self"])
    return None


def _detach(graph: Pregel[Any, Any, Any, Any]) -> None:
    config = graph.config or {}
    callbacks = config.get("callbacks")
    if isinstance(callbacks, BaseCallbackManager):
        for handler in [h for h in callbacks.handlers if isinstance(h, MaestroHandler)]:
            callbacks.remove_handler(handler)
        return
    left = [h for h in callbacks or () if not isinstance(h, MaestroHandler)]
    rest = {k: v for k, v in config.items() if k != "callbacks"}
    graph.config = cast("Any", {**rest, "callbacks": left} if left else rest or None)


def _kind(value: object) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
