"""An app of whichever release comes first on PYTHONPATH, told on stdin what its stages do, telling on stdout what became of them.

A line is a JSON object: ``do`` is ``open`` (push a stage and wait for its grant), ``finish``, ``requeue`` (busy; then it waits again),
``cancel`` or ``end_run``. It uses nothing that only one of the two releases has.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import maestro_agents
from maestro_agents.client import Client, Pass
from maestro_agents.core import RunEnd, Ticket


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def wait(p: Pass) -> None:
    try:
        engine = p.wait()
    except Exception as e:  # it is told, whatever it is
        say(event="failed", stage=p.ticket.stage_id, error=f"{type(e).__name__}: {e}")
        return
    g = p.grant
    assert g is not None
    say(event="granted", stage=p.ticket.stage_id, engine=engine.engine_id, token=g.token, epoch=g.epoch, fast=g.fast)


def main() -> None:
    client = Client.current()
    passes: dict[str, Pass] = {}
    say(event="ready", version=maestro_agents.__version__)
    for line in sys.stdin:
        told = json.loads(line)
        do, name, run = told["do"], told.get("stage", ""), told.get("run", "run")
        now_s = time.time()
        if do == "open":
            ticket = Ticket(
                stage_id=name, client_id=client.client_id, model="m", run_id=run, role="r", prompt_tokens=10, max_tokens=20
            )  # fmt: skip
            p = client.open(ticket, original_url="http://127.0.0.1:9/v1")
            assert p is not None
            passes[name] = p
            threading.Thread(target=wait, args=(p,), daemon=True).start()
        elif do == "finish":
            passes[name].sent()
            passes[name].first_byte()
            passes[name].finish(output_tokens=5)
        elif do == "requeue":
            assert passes[name].requeue(engine_down=False, answered=True)
            threading.Thread(target=wait, args=(passes[name],), daemon=True).start()
        elif do == "cancel":
            passes[name].cancel()
        elif do == "end_run":
            client.end_run(RunEnd(run_id=run, workflow="w", outcome="done", started_at_s=now_s - 1, ended_at_s=now_s))
    Client.reset()


if __name__ == "__main__":
    main()
