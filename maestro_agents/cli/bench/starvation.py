"""`maestro bench starvation`: what synchronous nodes under ``ainvoke`` cost when each waits in a thread, and what helps.

Python gives an event loop a small thread pool (CPU cores + 4), which all synchronous nodes of all runs share. A node that
waits for its answer holds one of its threads, so the other runs' calls are not made, nor even queued: nobody can put them
first. The same burst of runs is timed with that pool, with the wider one that Maestro gives the loop
(``MAESTRO_WIDEN_EXECUTOR``), and with asynchronous nodes, which hold no thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any, Final

from maestro_agents.cli.bench.stack import MODEL, emulated
from maestro_agents.cli.demo_pass import sample
from maestro_agents.client import Client

RUNS: Final = 18
TOKENS: Final = 60
"""Output tokens of each answer: about half a second on the emulated engine."""

CASES: Final = (
    # name, through Maestro, synchronous nodes, widen_executor
    ("without Maestro, synchronous nodes", False, True, False),
    ("synchronous nodes, the loop's own threads", True, True, False),
    ("synchronous nodes, wider pool (the default)", True, True, True),
    ("asynchronous nodes", True, False, True),
)


async def burst(app: Any, runs: int) -> dict[str, float]:
    """Time one run alone, then ``runs`` at once; count the most calls that were known at a time."""
    began_s = time.perf_counter()
    await app.ainvoke({"question": "alone"})
    alone_s = time.perf_counter() - began_s
    most, room = 0, Client.current()._room  # pyright: ignore[reportPrivateUsage]
    began_s = time.perf_counter()
    all_runs = asyncio.gather(*(app.ainvoke({"question": f"run {n}"}) for n in range(runs)))
    while not all_runs.done():
        most = max(most, len(room.waiting) + len(room.held))
        await asyncio.wait([all_runs], timeout=0.01)
    await all_runs
    return {"alone_s": alone_s, "all_s": time.perf_counter() - began_s, "known_at_once": most}


def run(runs: int = RUNS) -> dict[str, Any]:
    """Each case on an event loop of its own, one after the other, on one emulated engine with room for all runs."""
    from maestro_langgraph import gate, maestro

    cases: list[dict[str, Any]] = []
    with emulated(engines=1, profile="gpu", slots=runs) as stack:
        url = stack.engines[0].url
        try:
            for name, managed, synchronous, widen in CASES:
                Client.configure(redis_url=stack.redis_url, widen_executor=widen)
                app = sample("one_call").graph(MODEL, url, max_tokens=TOKENS, synchronous=synchronous).compile()
                if managed:
                    maestro.wrap(app)
                else:
                    gate.uninstall()
                found = asyncio.run(burst(app, runs))
                cases.append({"case": name, **found, "known_at_once": found["known_at_once"] if managed else None})
        finally:
            maestro.uninstall()
            Client.reset()
    return {
        "runs": runs,
        "cpu_cores": os.cpu_count(),
        "threads_of_the_loop": min(32, (os.cpu_count() or 1) + 4),
        "ideal_s": min(c["alone_s"] for c in cases),
        "cases": cases,
        "label": "emulated engine",
    }
