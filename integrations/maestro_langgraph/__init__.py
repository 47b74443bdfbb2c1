"""Maestro for LangGraph: one line on a program, and its LLM calls are ordered and routed with everybody else's.

    from maestro_langgraph import maestro

    @maestro(service_class="interactive", deadline_s=20)
    def build():
        ...
        return graph.compile()

How it works, module by module:

- `attach`: `maestro` itself, on a graph, a builder, the process or a model; `options`: what the code can say, checked.
- `models`: one chat model, without a patch; `middleware`: the same for an agent; `bootstrap`: `maestro run`.
- `graph`: fingerprint and first guess of a graph, what runs showed of it;
  `runs`: the runs of this process; `identity`: who makes a call.
- `adopted`: runs of graphs that nobody watches.
- `gate`: the seam in the OpenAI SDK; `transport`, `limiter`: the same for one model; `call`: one call's way through them.
- `refusals`: our errors in the SDK's classes.
- `engines`: our own clients, so that nothing of the caller's reaches an engine; `stream`: answers, watched as they pass.
- `quiet`: a bug of ours never breaks the user's graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maestro_langgraph.attach import Maestro

if TYPE_CHECKING:
    from maestro_langgraph.middleware import MaestroMiddleware

__all__ = ["Maestro", "MaestroMiddleware", "maestro"]

maestro = Maestro()


def __getattr__(name: str) -> object:
    """The middleware on first use: it needs ``langchain``, which not every app has."""
    if name == "MaestroMiddleware":
        from maestro_langgraph.middleware import MaestroMiddleware

        return MaestroMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
