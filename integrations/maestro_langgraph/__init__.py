"""Maestro for LangGraph: one line on a program, and its LLM calls are ordered and routed with everybody else's.

    from maestro_langgraph import maestro

    @maestro(service_class="interactive", deadline_s=20)
    def build():
        ...
        return graph.compile()

How it works, module by module:

- `attach`: `maestro` itself, on a graph, a builder or the process; `options`: what the code can say, checked.
- `graph`: fingerprint and first guess of a graph; `runs`: the runs of this process; `identity`: who makes a call.
- `gate`: the seam in the OpenAI SDK; `call`: one call's way through it; `refusals`: our errors in the SDK's classes.
- `engines`: our own clients, so that nothing of the caller's reaches an engine; `stream`: answers, watched as they pass.
- `quiet`: a bug of ours never breaks the user's graph.
"""

from __future__ import annotations

from maestro_langgraph.attach import Maestro

__all__ = ["Maestro", "maestro"]

maestro = Maestro()
