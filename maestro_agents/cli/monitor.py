"""`maestro top` and `maestro queue`: what the queue holds now, and who gets what of the fleet.

`snapshot` reads the queue; `render` turns what it found into something that rich prints (a pure function, tested as
text); the commands put the two together. Only ``queue cancel`` changes anything, and it asks first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from maestro_agents.cli.snapshot import (
    HEADS,
    AgeingLine,
    ClusterLine,
    EngineLine,
    Entry,
    Line,
    RunLine,
    Snapshot,
    Watch,
    cancel,
    entries,
    find,
)
from maestro_agents.core import Status
from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.ports import Queue
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.redis_url import without_password
from maestro_agents.settings import Settings

SHOWN_ID: Final = 12
"""Characters of a stage's id on the screen; the beginning of an id names it everywhere."""


SHOWN_AGEING: Final = 3
"""Engines whose memory grows, two lines each; the others are counted."""


# -- the picture ---------------------------------------------------------------------------------------------------------
def render(snapshot: Snapshot, *, height: int = 1_000) -> RenderableType:
    """A snapshot as something that rich prints. Lines that do not fit ``height`` are counted, not shown."""
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot.at_s))
    title = Text("maestro ", style="bold", overflow="ellipsis", no_wrap=True)
    title.append(clock, style="not bold")
    if snapshot.trouble:
        title.append(f"  {snapshot.trouble}", style="red")
    if snapshot.switch:
        title.append(f"  {snapshot.switch}", style="yellow")
    title.append(f"  {snapshot.source}", style="not bold")
    if not snapshot.lines:
        return Group(title, Text("no engine is known yet: is a scheduler running?", style="dim"))
    runs = _runs_table(snapshot.runs)
    # The title, three headings, two blank lines, what waits in all, and "more" below each of the two long tables.
    ageing = _ageing_lines(snapshot.ageing)
    clusters = _clusters_table(snapshot.clusters)
    room = max(
        4, height - 9 - max(1, len(snapshot.runs)) - len(ageing) - (len(clusters) and len(snapshot.clusters) + 2)
    )
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
    parts += clusters
    parts += ageing
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


def _clusters_table(clusters: Sequence[ClusterLine]) -> list[RenderableType]:
    """What of each cluster lives, and how far it is."""
    if not clusters:
        return []
    table = _table("<cluster", "engines", "slots", "<there and back, from each site")
    for c in clusters:
        known = [f"{site} {rtt(rtt_s)}" for site, rtt_s in sorted(c.rtts.items())]
        told = ", ".join(known) or f"{rtt(c.file_rtt_s)} (fleet file)"
        style = "" if c.engines and all(map(math.isfinite, c.rtts.values())) else "yellow"
        table.add_row(c.cluster, str(c.engines), f"{c.reserved_slots}/{c.slots}", told, style=style)
    return [Text(""), table]


def rtt(seconds: float) -> str:
    """A round trip for people."""
    return f"{1e3 * seconds:.1f} ms" if math.isfinite(seconds) else "unreachable"


def _ageing_lines(ageing: Sequence[AgeingLine]) -> list[RenderableType]:
    """Who is to be restarted by when, and below it the evidence."""
    rows: list[RenderableType] = []
    for line in ageing[:SHOWN_AGEING]:
        grows, _, full = line.words.partition(": ")
        again = f", restarted {line.restarts} times" if line.restarts else ""
        rows.append(Text(f" {line.engine_id} ages, {full}{again}", style="yellow", overflow="ellipsis", no_wrap=True))
        rows.append(Text(f"   {grows}", style="dim", overflow="ellipsis", no_wrap=True))
    if len(ageing) > SHOWN_AGEING:
        rows.append(Text(f" … {len(ageing) - SHOWN_AGEING} more engines age", style="dim"))
    return rows


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

    with_queue(redis_url, pool, look)


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

    with_queue(redis_url, pool, look)


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
        because: dict[str, float] = found.pop("because", None) or {}
        for name, value in found.items():
            table.add_row(name, "-" if value is None or value == "" else str(value))
        if because:
            sum_s = " + ".join(f"{part} {seconds:.3f}" for part, seconds in because.items())
            table.add_row("because", f"{sum_s} = {sum(because.values()):.3f} s")
        Console().print(table)

    with_queue(redis_url, pool, look)


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

    with_queue(redis_url, pool, act)


def with_queue(
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
