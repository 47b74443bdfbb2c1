"""Maestro for LangGraph: one line on a program, and its LLM calls are ordered and routed with everybody else's.

    from maestro_langgraph import maestro

    @maestro(service_class="interactive", deadline_s=20)
    def build():
        ...
        return graph.compile()

How it works, module by module: `options` (what the code can say) - `graph` (fingerprint and first guess of the graph) -
`identity` (who calls: run, node, visit) - `gate` (where calls of the OpenAI SDK wait, and where they go then) -
`engines` (our own clients, so that nothing of the caller's reaches an engine) - `stream` (answers, watched as they
pass) - `attach` (`maestro` itself).
"""

from __future__ import annotations

from maestro_langgraph.attach import Maestro

__all__ = ["Maestro", "maestro"]

maestro = Maestro()
