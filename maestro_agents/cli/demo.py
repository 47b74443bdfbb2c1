"""`maestro demo`: the same runs twice on the same two engines, first come first served and under Maestro.

Real: LangGraph and the sample app, the decorator and the gate, Redis, the scheduler, every HTTP call. Emulated: the two
engines, whose timing comes from a model and whose answers are filler. The workload (`demo_input`) and the deadlines are
fixed before anything runs; what is counted and drawn is in `demo_report`. Engines, Redis and schedulers are processes of
their own; the app is this one, on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import json
import math
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final, Self

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from maestro_agents.cli.demo_input import MESSAGES, Arrival, Messages, arrivals, read_messages
from maestro_agents.cli.demo_report import LABEL, TITLES, RunResult, comparison, picture, table
from maestro_agents.cli.monitor import Snapshot, Watch
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.core import EngineSpec, Observation, ServiceClass
from maestro_agents.errors import ConfigError, EngineError
from maestro_agents.fleet import Fleet, Launch
from maestro_agents.queue.redis import RedisClock, RedisQueue

MODEL: Final = "emulated"
DEADLINES_S: Final[Mapping[ServiceClass, float]] = {ServiceClass.INTERACTIVE: 6.0, ServiceClass.BATCH: 60.0}
"""Fixed beforehand: about three times what a run takes on idle engines; batch has ample time."""

LENGTHS: Final = {"classify": 6, "order": 120, "account": 90, "policy": 120, "history": 90, "draft": 260, "review": 12}
"""Median output tokens by node. An emulated engine cannot know how long an answer should be, so the demo says so."""

SPREAD: Final = 0.35
"""Standard deviation of the lengths' logarithm."""

SLOTS: Final = 4
FLEET: Final = Fleet(
    pool="demo",
    engines=tuple(
        EngineSpec(engine_id=name, url="", model=MODEL, slots=SLOTS, kv_bytes_per_token=131_072) for name in ("a", "b")
    ),
    launches={name: Launch(kind="emulator", profile="gpu", args=("--speed", "2")) for name in ("a", "b")},
)
"""Two engines of four places each: together some 2.1 runs a second, less than what arrives."""

LOOK_EVERY_S: Final = 0.5
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


def sample(name: str) -> ModuleType:
    """A sample workflow's module: from the wheel (``maestro_agents._samples``) or, in a checkout, from its folder."""
    installed = "maestro_agents._samples"
    try:
        return importlib.import_module(f"{installed}.{name}")
    except ModuleNotFoundError as e:
        if e.name != installed:
            raise
    return importlib.import_module(f"sample_workflows.{name}")


def length_of(node: str, prompt: str) -> dict[str, Any]:
    """How long the emulated answer is to be, as a request field: the same for the same prompt, in both passes."""
    rng = random.Random(hashlib.sha256(f"{node}\n{prompt}".encode()).digest())
    wanted = round(LENGTHS[node] * math.exp(rng.gauss(0.0, SPREAD)))
    return {"min_tokens": min(max(1, wanted), sample("support_triage").MAX_TOKENS[node])}


class Pass:
    """One policy serving the whole workload: the app's side, and what can be seen of it meanwhile."""

    def __init__(self, policy: str, plan: Sequence[Arrival], *, queue: RedisQueue, watch: Watch, app: Any) -> None:
        self.policy = policy
        self.plan = plan
        self.results: list[RunResult] = []
        self.snapshot: Snapshot | None = None
        self._queue = queue
        self._watch = watch
        self._app = app
        self._began_s = 0.0
        self._run_ids: dict[str, int] = {}

    async def run(self, look: Callable[[Pass], None]) -> list[RunResult]:
        """Serve every arrival at its moment; ``look`` is called twice a second. Results in order of arrival."""
        from maestro_langgraph import maestro

        # Both passes begin warm: connections open, imports done, one run served.
        try:
            with maestro.options(service_class="batch", deadline_s=DEADLINES_S[ServiceClass.BATCH]):
                await self._app.ainvoke({"message": MESSAGES[0]})
        except Exception as e:  # LangGraph and the SDK raise what they like; the demo cannot go on
            raise EngineError(f"the first run of the sample failed: {type(e).__name__}: {e}") from e
        self._began_s = time.monotonic()
        watcher = asyncio.create_task(self._look(look))
        try:
            async with asyncio.TaskGroup() as group:
                for arrival in self.plan:
                    group.create_task(self._one(arrival))
            await self._read_waits()
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        look(self)
        return self.results

    async def _one(self, arrival: Arrival) -> None:
        from maestro_langgraph import maestro

        await asyncio.sleep(self._began_s + arrival.at_s - time.monotonic())
        deadline_s = DEADLINES_S[arrival.service_class]
        run_id = uuid.uuid4()
        self._run_ids[str(run_id)] = arrival.index
        arrived_s = time.monotonic()
        error = ""
        try:
            with maestro.options(service_class=arrival.service_class, deadline_s=deadline_s):
                await self._app.ainvoke({"message": arrival.message}, {"run_id": run_id})
        except Exception as e:  # whatever a run ends with is a result, and is shown
            error = f"{type(e).__name__}: {e}"[:300]
        self.results.append(
            RunResult(
                policy=self.policy,
                index=arrival.index,
                service_class=arrival.service_class,
                arrived_s=arrived_s - self._began_s,
                took_s=time.monotonic() - arrived_s,
                deadline_s=deadline_s,
                error=error,
            )
        )

    async def _look(self, look: Callable[[Pass], None]) -> None:
        while True:
            self.snapshot = await self._watch.snapshot()
            look(self)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _read_waits(self) -> None:
        """Add to each result what its calls waited, from the queue's observation log. The last reports may be on their way."""
        waits: dict[int, list[float]] = {r.index: [] for r in self.results}
        expected = sum(r.done for r in self.results) * len(LENGTHS)
        at, give_up_s = "", time.monotonic() + 3.0
        while sum(map(len, waits.values())) < expected and time.monotonic() < give_up_s:
            at, entries = await self._queue.read_log(at, 1_000)
            for entry in entries:
                if isinstance(entry, Observation) and entry.run_id in self._run_ids:
                    waits[self._run_ids[entry.run_id]].append(entry.wait_s)
            if not entries:
                await asyncio.sleep(0.05)
        self.results = sorted((r.with_waits(waits[r.index]) for r in self.results), key=lambda r: r.index)


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
async def both_passes(stack: Stack, plan: Sequence[Arrival], view: View, *, app: Any) -> list[RunResult]:
    """Serve the plan once under each policy, on one fleet, each in a new pool: neither knows what another learned."""
    results: list[RunResult] = []
    for policy, title in TITLES.items():
        pool = f"demo-{uuid.uuid4().hex[:8]}-{policy}"
        view.say(f"{title}: starting its scheduler, and one run to warm up")
        await asyncio.to_thread(stack.start_scheduler, policy=policy, pool=pool)
        Client.configure(redis_url=stack.redis_url, pool=pool, mode="on")
        queue, clock = RedisQueue(stack.redis_url, pool=pool), RedisClock()
        try:
            await clock.sync(queue)
            watch = Watch(queue, source=pool, now_s=clock.now_s)
            results += await Pass(policy, plan, queue=queue, watch=watch, app=app).run(view.look)
        finally:
            await asyncio.to_thread(Client.reset)
            await queue.close()
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
            stack.start(scheduler=False)
            console.print(f"Queue: {stack.redis_says}.", markup=False)
            app = sample("support_triage").build(MODEL, stack.engines[0].url, length_of)
            results = asyncio.run(both_passes(stack, plan, view, app=app))
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
        "\nThe two engines were emulated. LangGraph, the gate, Redis and the scheduler were real, and the order of the "
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
