"""Engines: launch them, watch them, and stand in for them.

* `maestro_serving.vllm`: the command line of a vLLM server, and the probe that reads its own account.
* `maestro_serving.processes`: engines as child processes that are started, restarted, ended, and never orphaned.
* `maestro_serving.node`: the agent of a GPU host. Its hosts and engines come from a fleet file (``hosts``), what it does next from
  ``reconcile``, tiers and their costs are in ``weights``, shared KV memory in ``elastic_kv``; ``vllm_driver`` and
  ``emulated_driver`` move the engines, whose servers outlive it for a while (``keeper``).
* `maestro_serving.emulator`: a server that speaks vLLM's protocol over `maestro_agents.simulator.engine`. A request is
  read by ``protocol``, answered by ``answers`` (``jsonvalues`` where a schema is to be met), timed by ``live``, and told
  by ``shapes`` and ``streams``.
"""
