"""Maestro makes a fleet of vLLM servers understand LangGraph programs. This is the map: one stage's journey, by module.

A *stage* is one LLM call that a run of a workflow is ready to make.

====================================== =============================================================================
what happens                            where
====================================== =============================================================================
Who calls? Which node of which graph?   ``maestro_langgraph`` (identity, graph)
What does the prompt look like?         `maestro_agents.predict` (features, prompt, prefix: numbers, never the text)
The call waits at the gate              ``maestro_langgraph`` (gate), `maestro_agents.client` (`Client.open`, `Pass.wait`), `maestro_agents.room` behind it
The ticket is pushed                    `maestro_agents.queue` (``memory`` is the specification, ``redis`` keeps its promises)
What will it cost, what may follow?     `maestro_agents.predict` (length, learn, roles, memory), `maestro_agents.workflow`
Who goes first, where to, does it fit?  `maestro_agents.policy` (priority, fairness, routing, admission: pure functions)
It is granted an engine                 `maestro_agents.scheduler` (collect, predict, plan, grant, act, learn)
Tokens stream                           straight from the engine to the app: no Python of ours stands between
The completion is learned from          `maestro_agents.client` writes it, `maestro_agents.scheduler` reads it, `maestro_agents.predict` learns
                                        (learn at once; rest: what its run wrote after it; live, trainer: new models, published
                                        or taken back)
What would it have gained?              `maestro_agents.simulator` (recording, replay), by `maestro report`
====================================== =============================================================================

Around the journey:

* `maestro_agents.core`: the nouns and the lifecycle of a stage; `maestro_agents.errors`: every error, one tree;
  `maestro_agents.ports`: all that is needed from outside, with its promises.
* `maestro_agents.settings`: ``MAESTRO_*`` and ``maestro.toml``; `maestro_agents.fleet`: ``fleet.toml``;
  `maestro_agents.events`: the file with a line for every call and run that ended.
* `maestro_agents.tenants`: shares, quotas, residency (`policy.quota` holds to them, `maestro_agents.chargeback` counts what they used);
  `maestro_agents.distance`: how far clusters are from an app; `maestro_agents.hints`: what engines and routers are told, and callers tell us;
  `maestro_agents.nodes`: what node agents report, and `maestro_agents.placer` wants of them; `maestro_agents.usage`: what an answer says of its cost.
* `maestro_agents.guard`: child processes that end when their owner does, kill -9 included.
* `maestro_agents.simulator`: the engine model that the emulator runs on; a record played again (`recording`, `replay`); and
  workloads made of recorded sessions (`sessions`, `compose`, `workload`) played under any policy (`world`, `gpus`) on `hardware`
  with published speeds, predicted by models that never saw them (`foresight`), counted (`score`), to look at (`perfetto`).
* ``maestro_serving``: launch, adopt, observe and emulate engines; the node agent, Ray, the proxy, and the gateway for everybody else.
* `maestro_agents.cli`: the ``maestro`` command.

Imports point one way, downwards in this list never; ``tests/test_architecture.py`` holds the table.
"""

from __future__ import annotations

__version__ = "0.2.0"
