"""An app under load, as a process of its own that can be killed: the sample workflow, driven over stdin and stdout.

Each line on stdin is a batch (JSON: ``runs``, ``rate_per_s``, ``seed``, ``scale``); each line on stdout an event: a run
that began, a run that ended and how, a batch that is done. Real LangGraph, the real decorator, the real gate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import uuid
from typing import Any, Final

from maestro_agents.cli.demo_input import MESSAGES
from maestro_agents.cli.demo_pass import length_of, sample
from maestro_agents.client import Client

DEADLINES_S: Final = {"interactive": 30.0, "batch": 120.0}
STREAMED_SHARE: Final = 0.3
"""Runs whose every call is a stream (``stream_mode="messages"``): what an engine's death can hit in the middle."""


def say(**event: Any) -> None:
    """One event, at once."""
    print(json.dumps({"at_s": time.time(), **event}), flush=True)


async def one_run(app: Any, number: int, service_class: str, message: str, *, streamed: bool) -> None:
    """Serve one run and say how it ended."""
    from maestro_langgraph import maestro

    run_id = uuid.uuid4()
    say(event="began", run=str(run_id), number=number, service_class=service_class, streamed=streamed)
    error = cause = ""
    chunks = 0
    try:
        with maestro.options(service_class=service_class, deadline_s=DEADLINES_S[service_class]):
            if streamed:
                async for _ in app.astream({"message": message}, {"run_id": run_id}, stream_mode="messages"):
                    chunks += 1
            else:
                await app.ainvoke({"message": message}, {"run_id": run_id})
    except Exception as e:  # how a run ends is what is measured
        error, cause = f"{type(e).__module__}.{type(e).__name__}", str(e)[:200]
    say(event="ended", run=str(run_id), number=number, error=error, cause=cause, chunks=chunks)


async def batch(app: Any, order: dict[str, Any]) -> None:
    """Runs that arrive by a seeded Poisson process; returns when the last has ended."""
    rng = random.Random(order["seed"])
    async with asyncio.TaskGroup() as group:
        for number in range(order["runs"]):
            await asyncio.sleep(rng.expovariate(order["rate_per_s"]))
            service_class = "interactive" if rng.random() < 0.5 else "batch"
            streamed = rng.random() < STREAMED_SHARE
            message = f"{rng.choice(MESSAGES)} (case {rng.randrange(10**6)})"
            group.create_task(one_run(app, number, service_class, message, streamed=streamed))


async def serve(model: str, scale: float) -> None:
    """Read batches until stdin ends."""

    def lengths(node: str, prompt: str) -> dict[str, Any]:
        wanted = max(1, round(length_of(node, prompt)["min_tokens"] * scale))
        return {"min_tokens": wanted, "max_tokens": wanted, "ignore_eos": True}

    # The address is never called: the fleet decides. A call that went there by mistake would fail and be counted.
    app = sample("support_triage").build(model, "http://127.0.0.1:9/v1", lengths)
    Client.current()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say(event="ready")
    while line := await reader.readline():
        order = json.loads(line)
        await batch(app, order)
        say(event="done", seed=order["seed"])


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="how much shorter or longer answers are than the demo's"
    )
    args = parser.parse_args()
    asyncio.run(serve(args.model, args.scale))
    Client.reset()


if __name__ == "__main__":
    main()
