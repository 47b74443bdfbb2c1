"""Putting Maestro on a program: around a graph, on the function that builds it, or on the whole process.

Three ways, one effect: a handler that tells who calls (`identity`) and the gate around the SDK (`gate`). A graph stays the
same object, of the same type; only its list of callbacks grows by one.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar, Unpack, cast, overload
from weakref import WeakSet

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.tracers import context as tracer_context
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from maestro_agents.client import Client
from maestro_agents.errors import ConfigError
from maestro_langgraph import gate
from maestro_langgraph.graph import describe
from maestro_langgraph.identity import MaestroHandler
from maestro_langgraph.options import OptionArgs, Options, request_options, set_defaults
from maestro_langgraph.quiet import quietly

P = ParamSpec("P")
R = TypeVar("R")
G = TypeVar("G", bound="Pregel[Any, Any, Any, Any] | StateGraph[Any, Any, Any, Any]")

_HELP: Final = "give maestro a StateGraph, a compiled graph, or a function that returns one"


class Maestro:
    """Everything a LangGraph program needs to say. There is one: `maestro_langgraph.maestro`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._hook: contextvars.ContextVar[MaestroHandler | None] | None = None
        self._compile: Callable[..., Any] | None = None
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

        The function keeps its name and signature, and may be asynchronous. Raises `ConfigError` for a wrong option at
        once, and for a function that returns no graph when it is called.
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

    def _built(self, graph: Any, build: Callable[..., Any], options: OptionArgs) -> Any:
        if not isinstance(graph, Pregel | StateGraph):
            name = getattr(build, "__qualname__", repr(build))
            raise ConfigError(
                f"{name}() is decorated with @maestro and returned {_kind(graph)}: return the graph it built"
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
        handler = MaestroHandler(describe(graph), options)
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

    # -- the whole process -------------------------------------------------------------------------------------------
    def install(self, **options: Unpack[OptionArgs]) -> None:
        """Manage every LangGraph graph and every OpenAI call of this process. Again changes the options only."""
        checked = Options.check(options)
        with self._lock:
            set_defaults(checked)
            gate.install()
            if self._hook is None:
                self._hook = contextvars.ContextVar("maestro_handler", default=MaestroHandler())  # noqa: B039 - meant to be shared
                tracer_context.register_configure_hook(self._hook, inheritable=True)
            if self._compile is None:
                self._compile = StateGraph.compile
                StateGraph.compile = self._compiling(self._compile)

    def _compiling(self, original: Callable[..., Any]) -> Any:
        """Every graph gets its fingerprint where it is made: later, callbacks no longer show the graph."""

        @functools.wraps(original)
        def compile_seen(graph: Any, *args: Any, **kwargs: Any) -> Any:
            compiled = original(graph, *args, **kwargs)
            if self._hook is not None:
                with quietly("looking at a graph"), self._lock:
                    self._attach(compiled, Options())
            return compiled

        return compile_seen

    def uninstall(self) -> None:
        """Take everything back: the gate, the process-wide hook, and the handlers of all wrapped graphs."""
        with self._lock:
            gate.uninstall()
            set_defaults(Options())
            if self._hook is not None:
                hooks = tracer_context._configure_hooks
                hooks[:] = [h for h in hooks if h[0] is not self._hook]
                self._hook = None
            if self._compile is not None:
                if getattr(cast("Any", StateGraph).compile, "__wrapped__", None) is self._compile:
                    StateGraph.compile = self._compile
                self._compile = None
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

    def configure(self, **settings: Any) -> None:
        """Settings of this process that win over ``MAESTRO_*`` and ``maestro.toml``. Best before the first call."""
        Client.configure(**settings)


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
