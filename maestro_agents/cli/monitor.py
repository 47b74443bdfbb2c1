"""`maestro top` and `maestro queue`: what the queue holds now, and who gets what of the fleet.

Three layers, each usable alone: `Watch` reads a snapshot from a `ports.Queue` (reading only), `render` turns a snapshot
into something that rich prints (a pure function, tested as text), and the commands put the two together. Only
``queue cancel`` changes anything, and it asks first.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from maestro_agents.core import EngineSpec, Observation, Refusal, RunEnd, ServiceClass, Status, Ticket
from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.ports import Ledger, Queue, Reservation, Running
from maestro_agents.queue.embedded import without_password
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.settings import Settings

HEADS: Final = 1_000
"""Waiting stages read per model; beyond it the depth is still right, the split by class is of these."""

RECENT: Final = 500
"""Ended stages and runs that the percentiles and the deadlines are counted over."""

PAGE: Final = 1_000
SHOWN_ID: Final = 12
"""Characters of a stage's id on the screen; the beginning of an id names it everywhere."""


# -- the snapshot --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One model and service class: what waits, what runs, how long the last ones waited."""

    model: str
    service_class: ServiceClass
    waiting: int
    oldest_s: float
    running: int
    #: Over the last stages that ended; NaN where none has.
    wait_p50_s: float
    wait_p95_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLine:
    """One engine and what is promised of it."""

    engine_id: str
    model: str
    slots: int
    reserved_slots: int
    #: 0 while unknown: then slots alone admit.
    kv_bytes: int
    reserved_kv_bytes: int
    #: Reservations of ended stages that the engine may still be computing.
    draining: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLine:
    """The last runs of one service class that came to their end."""

    service_class: ServiceClass
    done: int
    failed: int
    #: Runs that had a deadline, and how many of them met it.
    promised: int
    met: int
    p50_s: float
    p95_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The queue at one moment. ``trouble``: why the rest is old (Redis does not answer)."""

    at_s: float
    source: str
    depth: Mapping[str, int]
    lines: tuple[Line, ...] = ()
    engines: tuple[EngineLine, ...] = ()
    runs: tuple[RunLine, ...] = ()
    trouble: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; a number that is not known is null."""
        return _plain(dataclasses.asdict(self))


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


class Watch:
    """Reads snapshots of one queue. Keeps its place in the observation log, so each entry is read once."""

    def __init__(self, queue: Queue, *, source: str, now_s: Callable[[], float] = time.time) -> None:
        self._queue = queue
        self._source = source
        self._now_s = now_s
        self._log_at = ""
        self._waits: dict[tuple[str, ServiceClass], deque[float]] = {}
        self._runs: dict[ServiceClass, deque[RunEnd]] = {c: deque(maxlen=RECENT) for c in ServiceClass}
        self._incarnation = ""
        self._last: Snapshot | None = None

    async def snapshot(self) -> Snapshot:
        """What the queue holds now; where it does not answer, the last known with the trouble named. Never raises that."""
        try:
            self._last = await self._read()
        except QueueUnavailable:
            empty = Snapshot(at_s=self._now_s(), source=self._source, depth={})
            return dataclasses.replace(self._last or empty, trouble="Redis does not answer, retrying")
        return self._last

    async def _read(self) -> Snapshot:
        queue = self._queue
        incarnation = await queue.incarnation()
        if incarnation != self._incarnation:  # a store that restarted counts its log from the beginning
            self._incarnation, self._log_at = incarnation, ""
            self._waits.clear()
            for ended in self._runs.values():
                ended.clear()
        await self._follow_log()
        specs = await queue.fleet()
        running = await queue.running()
        models = sorted({s.model for s in specs} | {r.ticket.model for r in running})
        heads = {model: await queue.heads(model, HEADS) for model in models}
        return Snapshot(
            at_s=self._now_s(),
            source=self._source,
            depth={model: await queue.depth(model) for model in models},
            lines=tuple(
                self._line(model, service_class, heads[model], running)
                for model in models
                for service_class in ServiceClass
            ),
            engines=engine_lines(specs, await queue.ledger(), await queue.draining()),
            runs=tuple(run_line(service_class, ended) for service_class, ended in self._runs.items() if ended),
        )

    async def _follow_log(self) -> None:
        moved = True
        while moved:
            at, entries = await self._queue.read_log(self._log_at, PAGE)
            moved, self._log_at = at != self._log_at, at
            for entry in entries:
                if isinstance(entry, Observation):
                    key = (entry.model, entry.service_class)
                    self._waits.setdefault(key, deque(maxlen=RECENT)).append(entry.wait_s)
                elif entry.outcome != "paused":
                    self._runs[entry.service_class].append(entry)

    def _line(
        self, model: str, service_class: ServiceClass, heads: Sequence[Ticket], running: Sequence[Running]
    ) -> Line:
        pushed = [t.pushed_at_s for t in heads if t.service_class is service_class]
        waits = self._waits.get((model, service_class), ())
        return Line(
            model=model,
            service_class=service_class,
            waiting=len(pushed),
            oldest_s=max(0.0, self._now_s() - min(pushed)) if pushed else 0.0,
            running=sum(r.ticket.model == model and r.ticket.service_class is service_class for r in running),
            wait_p50_s=percentile(tuple(waits), 0.5),
            wait_p95_s=percentile(tuple(waits), 0.95),
        )


def engine_lines(
    specs: Sequence[EngineSpec], ledger: Ledger, draining: Sequence[Reservation]
) -> tuple[EngineLine, ...]:
    """Each engine of the fleet with what the ledger says is reserved there."""
    drains = Counter(r.engine_id for r in draining)
    return tuple(
        EngineLine(
            engine_id=s.engine_id,
            model=s.model,
            slots=s.slots,
            reserved_slots=ledger.slots.get(s.engine_id, 0),
            kv_bytes=s.kv_bytes,
            reserved_kv_bytes=ledger.kv_bytes.get(s.engine_id, 0),
            draining=drains[s.engine_id],
        )
        for s in sorted(specs, key=lambda s: s.engine_id)
    )


def run_line(service_class: ServiceClass, ended: Sequence[RunEnd] | deque[RunEnd]) -> RunLine:
    """Count runs that ended: completion over those that are done, deadlines over those that had one."""
    took = [r.ended_at_s - r.started_at_s for r in ended if r.outcome == "done"]
    promised = [r for r in ended if math.isfinite(r.deadline_at_s)]
    return RunLine(
        service_class=service_class,
        done=len(took),
        failed=len(ended) - len(took),
        promised=len(promised),
        met=sum(r.met_deadline for r in promised),
        p50_s=percentile(took, 0.5),
        p95_s=percentile(took, 0.95),
    )


# -- the picture ---------------------------------------------------------------------------------------------------------
def render(snapshot: Snapshot, *, height: int = 1_000) -> RenderableType:
    """A snapshot as something that rich prints. Lines that do not fit ``height`` are counted, not shown."""
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot.at_s))
    title = Text("maestro ", style="bold", overflow="ellipsis", no_wrap=True)
    title.append(clock, style="not bold")
    if snapshot.trouble:
        title.append(f"  {snapshot.trouble}", style="red")
    title.append(f"  {snapshot.source}", style="not bold")
    if not snapshot.lines:
        return Group(title, Text("no engine is known yet: is a scheduler running?", style="dim"))
    runs = _runs_table(snapshot.runs)
    # The title, three headings, two blank lines, what waits in all, and "more" below each of the two long tables.
    room = max(4, height - 9 - max(1, len(snapshot.runs)))
    lines = snapshot.lines
    show_lines = min(len(lines), max(room // 2, room - len(snapshot.engines)))
    show_engines = min(len(snapshot.engines), room - show_lines)
    parts: list[RenderableType] = [title, _lines_table(lines[:show_lines])]
    if len(lines) > show_lines:
        parts.append(Text(f" … {len(lines) - show_lines} more lines", style="dim"))
    over = [f"{m}: {n}" for m, n in snapshot.depth.items() if n > HEADS]
    if over:
        parts.append(Text(f" waiting in all: {', '.join(over)} (by class: the first {HEADS})", style="dim"))
    parts += [Text(""), _engines_table(snapshot.engines[:show_engines])]
    if len(snapshot.engines) > show_engines:
        parts.append(Text(f" … {len(snapshot.engines) - show_engines} more engines", style="dim"))
    return Group(*parts, Text(""), runs)


def _table(*columns: str) -> Table:
    """A table without lines: words to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        left = name.startswith("<")
        table.add_column(
            name.lstrip("<"), justify="left" if left else "right", no_wrap=True, overflow="ellipsis", min_width=5
        )
    return table


def _lines_table(lines: Sequence[Line]) -> Table:
    table = _table("<model", "<class", "waiting", "oldest", "running", "wait p50", "wait p95")
    for n in lines:
        style = "" if n.waiting or n.running else "dim"
        counts = (str(n.waiting), _seconds(n.oldest_s) if n.waiting else "-", str(n.running))
        waits = (_seconds(n.wait_p50_s), _seconds(n.wait_p95_s))
        table.add_row(n.model, n.service_class.value, *counts, *waits, style=style)
    return table


def _engines_table(engines: Sequence[EngineLine]) -> Table:
    table = _table("<engine", "<model", "slots", "<", "KV reserved", "of", "draining")
    for e in engines:
        used = e.reserved_slots / e.slots
        kv = ("-", "unknown") if e.kv_bytes == 0 else (f"{e.reserved_kv_bytes / e.kv_bytes:.0%}", _size(e.kv_bytes))
        bar = "█" * round(8 * min(1.0, used))
        table.add_row(
            e.engine_id,
            e.model,
            f"{e.reserved_slots}/{e.slots}",
            Text(bar.ljust(8, "░"), style="green" if used < 1 else "yellow"),
            *kv,
            str(e.draining) if e.draining else "-",
        )
    return table


def _runs_table(runs: Sequence[RunLine]) -> Table:
    table = _table("<last runs", "done", "failed", "deadline met", "p50", "p95")
    for r in runs:
        met = f"{r.met}/{r.promised} ({r.met / r.promised:.0%})" if r.promised else "-"
        table.add_row(r.service_class.value, str(r.done), str(r.failed), met, _seconds(r.p50_s), _seconds(r.p95_s))
    if not runs:
        table.add_row("none yet", style="dim")
    return table


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if value < 10:
        return f"{value:.2f} s"
    return f"{value:.0f} s" if value < 6_000 else f"{value / 3600:.1f} h"


def _size(value: int) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value


# -- one stage -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A stage that the queue holds: its ticket and, where it runs, its lease."""

    ticket: Ticket
    lease: Running | None = None

    @property
    def status(self) -> Status:
        return Status.GRANTED if self.lease else Status.QUEUED

    def to_json(self) -> dict[str, Any]:
        lease = {} if self.lease is None else dataclasses.asdict(self.lease)
        lease.pop("ticket", None)
        return _plain({"status": self.status.value, **dataclasses.asdict(self.ticket), **lease})


async def entries(queue: Queue) -> tuple[Entry, ...]:
    """All stages that the queue holds: the running ones, then the waiting ones of each model by their moment."""
    running = [Entry(ticket=r.ticket, lease=r) for r in await queue.running()]
    models = sorted({s.model for s in await queue.fleet()})
    waiting = [Entry(ticket=t) for m in models for t in await queue.heads(m, await queue.depth(m))]
    return (*running, *waiting)


def named(held: Sequence[Entry], stage: str) -> Entry | None:
    """The stage of this id, or the one whose id begins so. Raises `ConfigError` where several do."""
    found = [e for e in held if e.ticket.stage_id.startswith(stage)]
    exact = [e for e in found if e.ticket.stage_id == stage]
    if len(found) > 1 and not exact:
        raise ConfigError(f"{len(found)} stages begin with {stage!r}: give more of the id")
    return (exact or found or [None])[0]


async def find(queue: Queue, stage: str) -> dict[str, Any]:
    """One stage, by the beginning of its id, as JSON values: held by the queue, or in the observation log.

    Raises `ConfigError` for neither.
    """
    if entry := named(await entries(queue), stage):
        return entry.to_json()
    after, at = "-", ""
    while at != after:
        after = at
        at, page = await queue.read_log(after, PAGE)
        for seen in page:
            if isinstance(seen, Observation) and seen.stage_id.startswith(stage):
                return _plain(dataclasses.asdict(seen))
    raise ConfigError(f"no stage {stage!r} in the queue or in what it remembers; `maestro queue ls` names them")


async def cancel(queue: Queue, stage: str, *, now_s: float) -> str:
    """Withdraw a waiting stage, by the beginning of its id: it is refused, and its caller told at once. Returns its id.

    Raises `ConfigError` for a stage that does not wait: a running call is its app's, and its engine's, to end.
    """
    entry = named(await entries(queue), stage)
    if entry is None:
        raise ConfigError(f"no stage {stage!r} waits; `maestro queue ls` names those that do")
    stage_id = entry.ticket.stage_id
    refusal = Refusal(stage_id=stage_id, reason="operator", retry_after_s=0.0)
    if entry.lease is None and await queue.refuse(refusal, entry.ticket, now_s=now_s):
        return stage_id
    where = f" on {entry.lease.engine_id}" if entry.lease else ""
    raise ConfigError(f"stage {stage_id!r} runs{where} already: only its app can end it now")


def entries_table(held: Sequence[Entry], *, now_s: float) -> Table:
    """Stages as a table: what `maestro queue ls` shows."""
    table = _table("<stage", "<status", "<class", "<role", "<model", "age", "due in")
    for e in held:
        t = e.ticket
        due_s = t.due_at_s - now_s
        table.add_row(
            t.stage_id[:SHOWN_ID],
            f"runs on {e.lease.engine_id}" if e.lease else "waits",
            t.service_class.value,
            t.role or "-",
            t.model,
            _seconds(max(0.0, now_s - t.pushed_at_s)),
            "-" if e.lease else f"-{_seconds(-due_s)}" if due_s < 0 else _seconds(due_s),
        )
    return table


# -- the commands --------------------------------------------------------------------------------------------------------
RedisUrl = Annotated[str | None, typer.Option("--redis-url", help="Default: MAESTRO_REDIS_URL or maestro.toml.")]
Pool = Annotated[str | None, typer.Option("--pool", help="Default: MAESTRO_POOL, else `default`.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


queue_app = typer.Typer(help="Look at the stages of the queue; withdraw one.", no_args_is_help=True)


def top(
    redis_url: RedisUrl = None,
    pool: Pool = None,
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot and end.")] = False,
    as_json: AsJson = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Watch the queue: what waits, what runs, what is reserved, which deadlines were met. Only looks."""
    console = Console()

    async def look(queue: Queue, now_s: Callable[[], float], source: str) -> None:
        watch = Watch(queue, source=source, now_s=now_s)
        if once:
            snapshot = await watch.snapshot()
            if snapshot.trouble:
                raise QueueUnavailable
            _print_snapshot(console, snapshot, as_json=as_json)
            return
        if as_json or not console.is_terminal:
            while True:
                _print_snapshot(console, await watch.snapshot(), as_json=as_json)
                await asyncio.sleep(interval)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(render(await watch.snapshot(), height=console.height), refresh=True)
                await asyncio.sleep(interval)

    _with_queue(redis_url, pool, look)


def _print_snapshot(console: Console, snapshot: Snapshot, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(snapshot.to_json()), flush=True)
    else:
        console.print(render(snapshot))


@queue_app.command("ls")
def list_stages(
    redis_url: RedisUrl = None,
    pool: Pool = None,
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 100,
) -> None:
    """List running and waiting stages, in the order in which they are due."""

    async def look(queue: Queue, now_s: Callable[[], float], _: str) -> None:
        held = await entries(queue)
        if as_json:
            print(json.dumps([e.to_json() for e in held[:limit]]))
            return
        if not held:
            print("The queue is empty.")
            return
        Console().print(entries_table(held[:limit], now_s=now_s()))
        if len(held) > limit:
            print(f"... {len(held) - limit} more: --limit {len(held)} shows all")

    _with_queue(redis_url, pool, look)


@queue_app.command("show")
def show_stage(
    stage: Annotated[str, typer.Argument(help="The beginning of a stage id, as `maestro queue ls` prints it.")],
    redis_url: RedisUrl = None,
    pool: Pool = None,
    as_json: AsJson = False,
) -> None:
    """Show all that the queue knows of one stage. It never knew the prompt."""

    async def look(queue: Queue, _: Callable[[], float], __: str) -> None:
        found = await find(queue, stage)
        if as_json:
            print(json.dumps(found))
            return
        table = _table("<", "<")
        for name, value in found.items():
            table.add_row(name, "-" if value is None or value == "" else str(value))
        Console().print(table)

    _with_queue(redis_url, pool, look)


@queue_app.command("cancel")
def cancel_stage(
    stage: Annotated[str, typer.Argument(help="The beginning of a stage id, as `maestro queue ls` prints it.")],
    redis_url: RedisUrl = None,
    pool: Pool = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Withdraw one waiting stage; the app that waits for it gets an error."""
    if not yes:
        typer.confirm(f"Withdraw stage {stage}? The app that waits for it gets an error.", abort=True, err=True)

    async def act(queue: Queue, now_s: Callable[[], float], _: str) -> None:
        stage_id = await cancel(queue, stage, now_s=now_s())
        done = {"stage_id": stage_id, "status": Status.REFUSED.value}
        print(json.dumps(done) if as_json else f"{stage_id} is withdrawn.")

    _with_queue(redis_url, pool, act)


def _with_queue(
    redis_url: str | None,
    pool: str | None,
    act: Callable[[Queue, Callable[[], float], str], Awaitable[None]],
) -> None:
    """Connect to the queue that the arguments and settings name, act on it, and leave it. Ctrl-C ends quietly."""
    settings = Settings.load(redis_url=redis_url, pool=pool)
    url = settings.redis_url
    if url is None:
        raise ConfigError(
            "which Redis? Set MAESTRO_REDIS_URL or --redis-url (`maestro up` prints it). "
            "Without Redis a queue lives inside one app and cannot be seen from here."
        )

    async def session() -> None:
        queue, clock = RedisQueue(url, pool=settings.pool), RedisClock()
        try:
            with contextlib.suppress(QueueUnavailable):  # `top` waits for it; the other commands say so themselves
                await clock.sync(queue)
            await act(queue, clock.now_s, f"{without_password(url)}  pool {settings.pool}")
        finally:
            await queue.close()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(session())
