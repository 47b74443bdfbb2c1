"""`maestro demo`: the same runs twice on the same two engines, first come first served and under Maestro.

Real: LangGraph and the sample app, the decorator and the gate, Redis, the scheduler, every HTTP call. Emulated: the two
engines, whose timing comes from a model and whose answers are filler. The workload (`demo_input`) and the deadlines (`demo_pass`)
are fixed before anything runs; what is counted and drawn is in `demo_report`. Engines, Redis and schedulers are processes of
their own; the app is this one, on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from maestro_agents.cli.demo_input import MESSAGES, Arrival, Messages, arrivals, read_messages
from maestro_agents.cli.demo_pass import DEADLINES_S, Pass, length_of, sample
from maestro_agents.cli.demo_report import LABEL, TITLES, RunResult, comparison, picture, table
from maestro_agents.cli.snapshot import Snapshot, Watch
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.core import EngineSpec, Observation, RunEnd, ServiceClass
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import Fleet, Launch, write_fleet
from maestro_agents.policy import LIVE
from maestro_agents.queue.embedded import find_server

T = TypeVar("T")

MODEL: Final = "emulated"
SLOTS: Final = 4
FLEET: Final = Fleet(
    pool="demo",
    engines=tuple(
        EngineSpec(engine_id=name, url="", model=MODEL, slots=SLOTS, kv_bytes_per_token=131_072) for name in ("a", "b")
    ),
    launches={name: Launch(kind="emulator", profile="gpu", args=("--speed", "2")) for name in ("a", "b")},
)
"""Two engines of four places each: together some 2.1 runs a second, less than what arrives."""

SAY_EVERY_S: Final = 5.0
BAR: Final = 30
"""Longest bar of waiting calls, in characters."""

HOW_TO_REAL: Final = """\
Use it on a real vLLM. fleet.toml:

    [[engine]]
    id = "a"
    model = "Qwen/Qwen3-8B"
    url = "http://127.0.0.1:8000/v1"      # vllm serve ... --scheduling-policy priority

then `maestro up fleet.toml`, and in your own LangGraph app:

    from maestro_langgraph import maestro

    @maestro(service_class="interactive", deadline_s=20)
    def build():
        ...
        return graph.compile()
"""


# -- what is seen while it runs ------------------------------------------------------------------------------------------
class View:
    """Shows passes as they go: live on a terminal, else a line now and then."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console = console
        self._runs = runs
        self._said_s = time.monotonic()
        bar, count = BarColumn(bar_width=30), MofNCompleteColumn()
        self._progress = Progress(
            TextColumn("{task.description}"), bar, count, TextColumn("runs"), TimeElapsedColumn(), console=console
        )
        titles = enumerate(TITLES.items(), 1)
        self._tasks = {p: self._progress.add_task(f"{n}. {t}", total=runs, start=False) for n, (p, t) in titles}
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, what: str) -> None:
        """Something that takes a moment begins."""
        if self._live:
            self._live.update(Group(self._progress, Text(f"  {what} ...", style="dim")), refresh=True)

    def look(self, now: Pass) -> None:
        """A pass goes on."""
        task, ended = self._tasks[now.policy], len(now.results)
        self._progress.start_task(task)
        self._progress.update(task, completed=ended)
        if ended == self._runs:
            self._progress.stop_task(task)
        if self._live:
            self._live.update(Group(self._progress, progress_table(now)), refresh=True)
        elif ended == self._runs or time.monotonic() - self._said_s > SAY_EVERY_S:
            self._said_s = time.monotonic()
            waiting = sum(n.waiting for n in now.snapshot.lines) if now.snapshot else 0
            self._console.print(f"{TITLES[now.policy]}: {ended} of {self._runs} runs ended, calls waiting: {waiting}")


def progress_table(now: Pass) -> Table:
    """What waits, what runs, and which deadlines were met so far, by class."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column(f"  {LABEL}: calls", style="dim")
    for name in ("waiting", "running", "runs in time"):
        shown.add_column(name, justify="right")
    for c in ServiceClass:
        lines = [n for n in (now.snapshot.lines if now.snapshot else ()) if n.service_class is c]
        mine = [r for r in now.results if r.service_class is c]
        waiting = sum(n.waiting for n in lines)
        shown.add_row(
            f"  {c.value:<12}{'▪' * min(waiting, BAR):<{BAR}}",
            str(waiting),
            str(sum(n.running for n in lines)),
            f"{sum(r.met for r in mine)} of {len(mine)}",
        )
    return shown


# -- both passes ---------------------------------------------------------------------------------------------------------
class Elsewhere:
    """The queue as this process's client holds it: it lives on the client's own event loop, so it is asked over there."""

    def __init__(self, client: Client, *, source: str) -> None:
        self._room = client._room
        self._source = source
        self._now_s = client.now_s
        self._watch: Watch | None = None

    async def read_log(self, after: str, n: int) -> tuple[str, Sequence[Observation | RunEnd]]:
        return await self._ask(self._room.queue.read_log(after, n))

    async def snapshot(self) -> Snapshot:
        self._watch = self._watch or Watch(self._room.queue, source=self._source, now_s=self._now_s)
        return await self._ask(self._watch.snapshot())

    async def joined(self, policy: str) -> None:
        """Wait until the client has joined its pool; where it schedules itself (no Redis), by this policy."""
        await self._ask(self._room.ready.wait())
        if self._room.scheduler is not None:
            self._room.scheduler.policy = LIVE[policy]

    async def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(question, self._room.loop))


async def both_passes(stack: Stack, plan: Sequence[Arrival], view: View, *, app: Any, redis: bool) -> list[RunResult]:
    """Serve the plan once under each policy, on one fleet, each in a new pool: neither knows what another learned.

    ``redis``: the scheduler is a process; else it runs in this one, as the queue does.
    """
    results: list[RunResult] = []
    for policy, title in TITLES.items():
        pool = f"demo-{uuid.uuid4().hex[:8]}-{policy}"
        view.say(f"{title}: starting its scheduler, and one run to warm up")
        if redis:
            await asyncio.to_thread(stack.start_scheduler, policy=policy, pool=pool)
            Client.configure(redis_url=stack.redis_url, pool=pool, mode="on")
        else:
            write_fleet(stack.fleet, stack.logs / "fleet.toml")
            Client.configure(redis_url="", fleet=stack.logs / "fleet.toml", pool=pool, mode="on")
        try:
            queue = Elsewhere(Client.current(), source=pool)
            await queue.joined(policy)
            results += await Pass(policy, plan, queue=queue, watch=queue, app=app).run(view.look)
        finally:
            await asyncio.to_thread(Client.reset)
    return results


def run(
    input_file: Annotated[
        Path | None, typer.Option("--input", help="Your own messages, one a line: JSON or plain text, .gz too.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of the sample per pass, seven LLM calls each.")] = 40,
    seed: Annotated[int, typer.Option(help="Another seed, other arrivals.")] = 0,
    png: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    events: Annotated[Path | None, typer.Option(help="Write one JSON line per run, to count again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, the rest on stderr.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave Redis and engines running until Ctrl-C.")] = False,
    redis_url: Annotated[str | None, typer.Option("--redis-url", help="Use this Redis, not an embedded one.")] = None,
) -> None:
    """See it work: the same runs first come first served and under Maestro, on two emulated engines.

    Needs no GPU and no configuration; takes about a minute.
    """
    began_s = time.monotonic()
    console = Console(stderr=as_json, highlight=False)
    messages = read_messages(input_file, limit=runs) if input_file else Messages(texts=MESSAGES, bad=0, first_bad="")
    if messages.bad:
        console.print(f"{input_file}: {messages.bad} lines left out, the first: {messages.first_bad}", markup=False)
    for path in (png, events):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
    redis = redis_url is not None or find_server() is not None
    if keep and not redis:
        raise ConfigError("--keep needs a Redis that others can reach: install redis-server, or give --redis-url")
    plan = arrivals(messages.texts, runs=runs, seed=seed)
    try:
        with contextlib.ExitStack() as ends:
            stack = Stack(FLEET, redis_url=redis_url)
            ends.callback(stack.stop)
            view = ends.enter_context(View(console, runs))
            console.print(
                f"{runs} runs of seven LLM calls, twice, on [bold]two emulated engines[/] (no GPU: their timing is a "
                "model, their answers are filler)."
            )
            view.say("starting Redis and two engines")
            stack.start(redis=redis, scheduler=False)
            console.print(f"Queue: {stack.redis_says}.", markup=False)
            app = sample("support_triage").build(MODEL, stack.engines[0].url, length_of)
            results = asyncio.run(both_passes(stack, plan, view, app=app, redis=redis))
            view.say("drawing")
            picture(results, DEADLINES_S, png)
            view.__exit__()
            _report(console, results, png=png, events=events)
            if as_json:
                print(json.dumps(_as_json(results, stack, messages, seed=seed, runs=runs, png=png, began_s=began_s)))
            if keep:
                _wait_for_ctrl_c(console, stack)
    except KeyboardInterrupt:
        console.print("Stopped.")
        raise typer.Exit(130) from None
    failed = [r for r in results if not r.done]
    if failed:
        console.print(f"{len(failed)} runs failed, the first with {failed[0].error}", markup=False, style="red")
        raise typer.Exit(1)


def _report(console: Console, results: Sequence[RunResult], *, png: Path, events: Path | None) -> None:
    console.print()
    console.print(table(results, DEADLINES_S))
    console.print(f"The same as a picture: {png}", markup=False)
    if events is not None:
        events.write_text("".join(r.encode() + "\n" for r in results), encoding="utf-8")
        console.print(f"Every run as a line: {events}", markup=False)
    console.print(
        "\nThe two engines were emulated. LangGraph, the gate, the queue and the scheduler were real, and the order of the "
        "calls is all that differed between the passes.\n"
    )
    console.print(HOW_TO_REAL, markup=False, soft_wrap=True)


def _as_json(
    results: Sequence[RunResult],
    stack: Stack,
    messages: Messages,
    *,
    seed: int,
    runs: int,
    png: Path,
    began_s: float,
) -> dict[str, Any]:
    found = {p: {c: s.to_json() for c, s in classes.items()} for p, classes in comparison(results).items()}
    return {
        "label": LABEL,
        "seed": seed,
        "runs": runs,
        "messages": len(messages.texts),
        "bad_lines": messages.bad,
        "redis": stack.redis_says,
        "deadlines_s": {c.value: DEADLINES_S[c] for c in ServiceClass},
        "policies": found,
        "png": str(png),
        "took_s": round(time.monotonic() - began_s, 1),
    }


def _wait_for_ctrl_c(console: Console, stack: Stack) -> None:
    pool = stack.fleet.pool
    console.print(
        f"Still running, until Ctrl-C. Look with:\n  maestro top --redis-url {stack.redis_url} --pool {pool}\n"
        f"An app joins with:\n  MAESTRO_REDIS_URL={stack.redis_url} MAESTRO_POOL={pool} "
        f"OPENAI_BASE_URL={stack.engines[0].url} MAESTRO_SAMPLE_MODEL={MODEL} python -m {sample('support_triage').__name__} "
        '"My parcel is late"',
        markup=False,
        soft_wrap=True,
    )
    while True:
        time.sleep(3600)
