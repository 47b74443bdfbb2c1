"""`maestro sample`: run a sample workflow with one command, on an embedded emulated fleet or on a server of your own."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from maestro_agents.cli.demo_pass import sample
from maestro_agents.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

NAMES: Final = ("research_report", "code_review", "trading_debate", "consultation", "refund_agent")
"""Those with ``INPUTS``; `support_triage` is what `maestro demo` runs."""

MIX: Final = "mix"


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One run of a sample."""

    name: str
    took_s: float
    result: str
    error: str = ""


def run(
    name: Annotated[
        str, typer.Argument(help=f"{', '.join(NAMES)}; {MIX}: all of them at once. Left out: lists them.")
    ] = "",
    runs: Annotated[int, typer.Option(min=1, help="Runs in all.")] = 6,
    rate: Annotated[
        float, typer.Option(min=0, help="Runs that arrive in a second, at random moments. 0: all at once.")
    ] = 0.5,
    base_url: Annotated[
        str,
        typer.Option(
            "--base-url", help="Your own server, e.g. http://127.0.0.1:8000/v1. Default: an emulated engine here."
        ),
    ] = "",
    model: Annotated[str, typer.Option(help="The model to ask for, with --base-url.")] = "bench",
    seed: Annotated[int, typer.Option(help="Of the moments of arrival.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One line for each run, for machines.")] = False,
) -> None:
    """Run a sample workflow: several users at once, each run a real LangGraph program under Maestro.

    With MAESTRO_REDIS_URL set it joins that pool; look at it with `maestro top` meanwhile.
    """
    from rich.console import Console

    console = Console(stderr=as_json)
    if not name:
        for known in NAMES:
            console.print(f"[bold]{known}[/]  {_about(known)[0]}", highlight=False)
        return
    if name != MIX and name not in NAMES:
        raise ConfigError(f"there is no sample {name!r}: use {', '.join(NAMES)} or {MIX}")
    asyncio.run(_play(name, runs, rate, base_url, model, seed, console, as_json=as_json))


def _about(name: str) -> tuple[str, str]:
    """The first sentence of a sample, and what to look at meanwhile."""
    text = sample(name).__doc__ or ""
    look = text.split("In ``maestro top``: ", 1)
    return text.split("\n", 1)[0], " ".join(look[1].split("\n\n")[0].split()) if len(look) > 1 else ""


async def _play(
    name: str, runs: int, rate: float, base_url: str, model: str, seed: int, console: Console, *, as_json: bool
) -> None:
    from maestro_agents.cli.bench.stack import MODEL, emulated
    from maestro_agents.client import Client
    from maestro_agents.settings import Settings

    names = NAMES if name == MIX else (name,)
    for each in names:
        first, look = _about(each)
        console.print(
            f"[bold]{each}[/]: {first.split(': ', 1)[-1]}\n  in [bold]maestro top[/]: {look}", highlight=False
        )
    joined = bool(Settings.load().redis_url)
    own = nullcontext(None) if base_url or joined else emulated(engines=2)
    with own as stack:
        if stack is not None:
            Client.configure(redis_url=stack.redis_url)
            model = MODEL
            console.print(
                f"an emulated fleet is up: [bold]maestro top --redis-url {stack.redis_url}[/]", highlight=False
            )
        try:
            ran = await _runs(
                names, runs, rate, base_url or "http://127.0.0.1:9/v1", model, seed, console, as_json=as_json
            )
        finally:
            if stack is not None:
                Client.reset()
    if any(r.error for r in ran):
        raise typer.Exit(1)


async def _runs(
    names: Sequence[str], runs: int, rate: float, url: str, model: str, seed: int, console: Console, *, as_json: bool
) -> list[Ran]:
    from langchain_openai import ChatOpenAI

    make = functools.partial(ChatOpenAI, model=model, base_url=url, api_key="none")  # type: ignore[arg-type]
    apps = {name: sample(name).build(make) for name in names}
    rng = random.Random(seed)
    at_s = 0.0
    tasks: list[asyncio.Task[Ran]] = []
    for n in range(runs):
        name = names[n % len(names)]
        inputs = sample(name).INPUTS
        tasks.append(asyncio.create_task(_one(name, apps[name], inputs[n // len(names) % len(inputs)], at_s)))
        at_s += rng.expovariate(rate) if rate else 0.0
    ran: list[Ran] = []
    for done in asyncio.as_completed(tasks):
        r = await done
        ran.append(r)
        if as_json:
            print(json.dumps({"sample": r.name, "took_s": round(r.took_s, 3), "error": r.error}), flush=True)
        else:
            console.print(
                f"{len(ran)}/{runs} {r.name} {r.took_s:.1f} s  {r.error or r.result[:90]}",
                highlight=False,
                markup=False,
            )
    return ran


async def _one(name: str, app: Any, given: dict[str, Any], at_s: float) -> Ran:
    await asyncio.sleep(at_s)
    began_s = time.monotonic()
    config = {"configurable": {"thread_id": uuid.uuid4().hex}}
    try:
        state = await app.ainvoke(given, config)
        while "__interrupt__" in state:
            state = await app.ainvoke(sample(name).RESUME, config)
    except Exception as e:
        return Ran(name=name, took_s=time.monotonic() - began_s, result="", error=f"{type(e).__name__}: {e}")
    said = [v for v in state.values() if isinstance(v, str)]
    text = said[-1] if said else state["messages"][-1].text
    return Ran(name=name, took_s=time.monotonic() - began_s, result=" ".join(text.split()))
