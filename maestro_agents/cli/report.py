"""`maestro report`: what was measured, how managed runs fare beside observed ones, and what Maestro would have gained.

The figures are counted in `report_figures`; here they are asked for, drawn and put into words.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from maestro_agents.cli.report_figures import Material, checked, gained, in_order, measured, read_files, too_few
from maestro_agents.core import EngineSpec, Observation
from maestro_agents.errors import ConfigError, WireError
from maestro_agents.fleet import load_fleet
from maestro_agents.settings import Settings

SHOWN_ROLES: Final = 15
WIDTH: Final = 120
"""Columns of a page that is no terminal."""

BARS: Final = " ▁▂▃▄▅▆▇█"
UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
WAYS: Final = {"observed": "observed", "fcfs": "first come first served", "maestro": "Maestro"}


def run(
    events: Annotated[
        list[Path] | None, typer.Argument(help="Files that MAESTRO_EVENTS wrote. Default: that variable's own.")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="Read a pool's observation log (the last 20,000 entries).")
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", help="Whose log. Default: MAESTRO_POOL, else `default`.")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Only the last 90s, 30m, 12h or 7d of what was recorded.")
    ] = None,
    fleet: Annotated[
        Path | None, typer.Option("--fleet", help="A fleet file: how many slots each engine has. Default: the pool's.")
    ] = None,
    slots: Annotated[
        int, typer.Option("--slots", min=0, help="Slots of every engine. 0: estimated from the record.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON on stdout.")] = False,
    png: Annotated[Path | None, typer.Option("-o", "--png", help="Draw the runs' completion times.")] = None,
) -> None:
    """What was measured (MAESTRO_MODE=observe), and what Maestro would have made of it: the same runs played again.

    Each run of the record arrives again at its moment on a virtual clock, on the same engines: once first come first
    served, which has to give what was observed, and once under Maestro's own scheduler. How far the first is off is
    printed, and where it is too far the estimate is not to be trusted.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    specs = _engines(fleet, slots)
    since_s = _seconds(since) if since else 0.0
    if png is not None and not png.resolve().parent.is_dir():
        raise ConfigError(f"{png}: there is no folder {png.parent}")
    material, published = _read(events or [], redis_url, pool)
    if since_s:
        material = material.last(since_s)
    if not material.entries:
        raise ConfigError(
            f"nothing was recorded{f' in the last {since}' if since else ''}"
            + (f" ({material.bad} lines are no records, the first {material.first_bad})" if material.bad else "")
            + ": run the app with MAESTRO_MODE=observe and MAESTRO_EVENTS=FILE, or with MAESTRO_REDIS_URL"
        )
    found = figures(material, slots=slots, fleet=specs or (() if slots else published), console=Console(stderr=True))
    if png is not None and found["gain"]:
        picture(found["gain"], png)
    if as_json:
        print(json.dumps(found))
        return
    show(console, found)
    if png is not None:
        console.print(f"\nDrawn: {png}" if found["gain"] else "\nNothing to draw.", markup=False, soft_wrap=True)


def figures(
    material: Material, *, slots: int = 0, fleet: Sequence[EngineSpec] = (), console: Console | None = None
) -> dict[str, Any]:
    """All that the report says, JSON-ready."""
    entries = in_order(material.entries)
    why_not = too_few(entries)
    gain = None
    if not why_not:
        with _bar(console, sum(isinstance(e, Observation) for e in entries)) as tick:
            gain = asyncio.run(gained(entries, slots=slots, fleet=fleet, tick=tick))
    return {
        "read": {"bad_lines": material.bad, "first_bad": material.first_bad, "doubled": material.doubled},
        "measured": measured(entries),
        "gain": gain,
        "no_gain_because": why_not,
    }


@contextmanager
def _bar(console: Console | None, calls: int) -> Iterator[Any]:
    """A bar for work that ticks twice per call."""
    columns = (TextColumn("playing the record again"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=console is None or not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=2 * calls)
        yield lambda: progress.advance(task)


# -- reading -------------------------------------------------------------------------------------------------------------
def _read(events: Sequence[Path], redis_url: str | None, pool: str | None) -> tuple[Material, Sequence[EngineSpec]]:
    settings = Settings.load(**({"redis_url": redis_url} if redis_url else {}), **({"pool": pool} if pool else {}))
    if not events and redis_url is None and settings.events is not None:
        events = [settings.events]
    url = redis_url or (None if events else settings.redis_url)
    if not events and not url:
        raise ConfigError("nothing to report on: name the file that MAESTRO_EVENTS wrote, or give --redis-url")
    material = read_files(events)
    if url:
        return material, asyncio.run(_read_log(url, settings.pool, material))
    return material, ()


async def _read_log(redis_url: str, pool: str, into: Material) -> Sequence[EngineSpec]:
    """Add a pool's observation log; return the fleet that its scheduler last published."""
    from maestro_agents.queue.redis import RedisQueue

    queue = RedisQueue(redis_url, pool=pool)
    at = ""
    try:
        while True:
            at, entries = await queue.read_log(at, 1_000)
            for entry in entries:
                try:
                    into.add(checked(entry))
                except WireError as e:
                    into.bad += 1
                    into.first_bad = into.first_bad or f"log of pool {pool}: {e}"
            if not entries:
                return await queue.fleet()
    finally:
        await queue.close()


def _engines(fleet: Path | None, slots: int) -> Sequence[EngineSpec]:
    if fleet is not None and slots:
        raise ConfigError("--fleet and --slots both say how many slots there are: give one of them")
    return load_fleet(fleet).engines if fleet is not None else ()


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or float(found[1]) == 0:
        raise ConfigError(f"--since {text!r}: a number and a unit, e.g. 30m, 12h, 7d")
    return float(found[1]) * UNITS_S[found[2]]


# -- showing -------------------------------------------------------------------------------------------------------------
def show(console: Console, found: Mapping[str, Any]) -> None:
    """Print the report."""
    read, seen, gain = found["read"], found["measured"], found["gain"]
    began, ended = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen[k])) for k in ("from_s", "to_s"))
    console.print(
        f"{seen['runs']} runs, {seen['calls']} calls, {began} to {ended} "
        f"({seen['managed_share']:.0%} of the calls were managed, the others only observed).",
        soft_wrap=True,
    )
    for count, what in (
        (read["bad_lines"], f"lines are no records and were left out, the first {read['first_bad']}"),
        (read["doubled"], "records were there twice"),
        (seen["runs_without_end"], "runs have no end (still going, or their app died): their calls are load, no more"),
        (seen["calls_outside_runs"], "calls belong to no run"),
    ):
        if count:
            console.print(f"  {count} {what}.", markup=False, soft_wrap=True)
    console.print()
    console.print(_classes_table(seen["classes"]))
    console.print(_roles_table(seen["roles"]))
    if len(seen["roles"]) > SHOWN_ROLES:
        console.print(f"  … {len(seen['roles']) - SHOWN_ROLES} more (--json has them)")
    flight = seen["in_flight"]
    most = max(flight["mean"], default=0.0) or 1.0
    line = "".join(BARS[round(n / most * (len(BARS) - 1))] for n in flight["mean"])
    console.print(f"\nCalls in flight, {_time(flight['bucket_s'])} a column, at most {flight['peak']}:\n  {line}")
    for name, c in seen["classes"].items():
        if c["difference"]:
            console.print(_said_difference(name, c["difference"]), markup=False, soft_wrap=True)
    console.print()
    if gain is None:
        console.print(found["no_gain_because"] + ".", markup=False, soft_wrap=True)
        return
    console.print(_gain_table(gain))
    for line in said(gain):
        console.print(line, markup=False, soft_wrap=True)
    console.print("\nAssumed:", style="dim")
    for line in _assumptions(gain):
        console.print(f"  {line}", markup=False, style="dim", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name.lstrip("<"), justify="left" if name.startswith("<") else "right", no_wrap=True)
    return table


def _classes_table(classes: Mapping[str, Any]) -> Table:
    table = _table("Runs", "<class", "<calls were", "runs", "in time", "errors", "p50", "p95", "p99", "tokens out")
    for name, c in classes.items():
        for side in ("observed", "managed"):
            s = c[side]
            if s["runs"] or s["calls"]:
                failed = s["runs"] - s["outcomes"].get("done", 0)
                share = f"{s['in_time']} ({s['in_time'] / s['runs']:.0%})" if s["runs"] else "-"
                cells = (str(s["runs"]), share, str(failed), *_times(s["completion_s"]), str(s["output_tokens"]))
                table.add_row(name, side, *cells)
    return table


def _roles_table(roles: Sequence[Mapping[str, Any]]) -> Table:
    several = len({r["model"] for r in roles}) > 1
    table = _table(
        "Calls",
        "<role",
        *(["<model"] if several else []),
        "<class",
        "calls",
        "errors",
        "p50",
        "p95",
        "p99",
        "tokens in",
        "out",
    )
    for r in roles[:SHOWN_ROLES]:
        done = max(1, r["calls"] - r["errors"])
        tokens = (f"{r['prompt_tokens'] / done:.0f}", f"{r['output_tokens'] / done:.0f}")
        cells = (str(r["calls"]), str(r["errors"]), *_times(r["latency_s"]), *tokens)
        table.add_row(r["role"], *([r["model"]] if several else []), r["class"], *cells)
    return table


def _gain_table(gain: Mapping[str, Any]) -> Table:
    table = _table("The same runs, played again", "<class", "<order", "runs", "in time", "p50", "p95")
    for name, c in gain["classes"].items():
        if c["observed"]["runs"]:
            table.add_section()
            for way, title in WAYS.items():
                s = c[way]
                replayed = "" if way == "observed" else " (replay)"
                cells = (str(s["runs"]), str(s["in_time"]), *_times(s["completion_s"])[:2])
                table.add_row(name, f"{title}{replayed}", *cells)
    return table


def said(gain: Mapping[str, Any]) -> Iterator[str]:
    """The estimate in words, class by class, and how far it can be believed."""
    other = "maestro" if gain["was"] == "fcfs" else "fcfs"
    seen = "observed" if gain["was"] == "fcfs" else "observed under Maestro"
    would = "under Maestro" if other == "maestro" else "first come first served"
    for name, c in gain["classes"].items():
        runs = c["observed"]["runs"]
        if not runs:
            continue
        p95 = [_time(c[way]["completion_s"]["p95"]) for way in ("observed", other)]
        yield (
            f"{name} runs in time: {c['observed']['in_time']}/{runs} {seen}, about {c[other]['in_time']}/{runs} {would}; "
            f"p95 {p95[0]}, about {p95[1]} (the replay's own error on what was observed: {c['error']:.0%}, "
            f"{c[gain['was']]['in_time']}/{runs} in time)."
        )
    if not gain["trusted"]:
        yield (
            f"NOT TO BE TRUSTED: the replay of what happened is off by more than {gain['trusted_error']:.0%}. Give --fleet or "
            "--slots; let vLLM say how long a request queued (--enable-per-request-metrics); other load on these engines, "
            "which is not in the record, has the same effect."
        )
    if gain["waited_share"] < 0.02:
        yield "Hardly a call waited: another order has nothing to gain on these engines at this load."


def _assumptions(gain: Mapping[str, Any]) -> Iterator[str]:
    work = {
        "engine": "the engine's own account of its queue",
        "stream": "the streams' first bytes",
        "tokens": "its tokens, at the speed of the quarter of calls with least company",
    }
    alike: dict[str, list[str]] = {}
    for e in gain["engines"]:
        says = (
            f"{e['slots']} slots ({e['slots_from']}); each further call in the batch makes it {e['slowdown']:.0%} slower; "
            f"a call's work is from {work[e['work_from']]}"
        )
        alike.setdefault(says, []).append(f"{e['engine']} ({e['calls']} calls)")
    for says, names in alike.items():
        yield f"{', '.join(names)}: {says}"
    if 0 < gain["managed_share"] < 1 and not gain["fleet_known"]:
        yield "managed and observed calls name their engines differently: without --fleet they are taken for different ones"
    yield "no other load on these engines; KV memory is not modelled; a slot that is freed is taken at once"
    yield "what a call spends between app and engine counts as its work"
    yield "Maestro begins knowing nothing of these roles"
    yield "a stage follows what had ended in its run when it was seen to begin, after the same gap"
    for reason, n in gain["left_out"].items():
        yield f"left out: {n} {reason}"


def _said_difference(name: str, d: Mapping[str, Any]) -> str:
    share, p95 = d["in_time_share"], d["completion_p95_s"]
    text = (
        f"{name}, managed less observed: in time {share['value'] * 100:+.1f} points "
        f"(95 % interval {share['low'] * 100:+.1f} to {share['high'] * 100:+.1f})"
    )
    if p95:
        text += f", p95 {p95['value']:+.2f} s ({p95['low']:+.2f} to {p95['high']:+.2f})"
    return f"{text}. {d['method']}; both share the engines, so what one gains the other may pay."


def _times(quantiles: Mapping[str, float | None]) -> tuple[str, str, str]:
    return _time(quantiles["p50"]), _time(quantiles["p95"]), _time(quantiles["p99"])


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.3f} s"


def picture(gain: Mapping[str, Any], path: Path) -> None:
    """Draw the share of runs that had ended after so many seconds, by class: observed and both replays."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [name for name, c in gain["classes"].items() if gain["completion_s"]["observed"][name] and c]
    figure: Any
    axes: Any
    figure, axes = plt.subplots(
        1, max(1, len(drawn)), figsize=(12, 5), sharey=True, layout="constrained", squeeze=False
    )
    looks = {"observed": ("#222222", "-"), "fcfs": ("#b8860b", "--"), "maestro": ("#0b6e99", "-")}
    for axis, name in zip(axes[0], drawn, strict=False):
        for way, (colour, style) in looks.items():
            took = gain["completion_s"][way][name]
            s = gain["classes"][name][way]
            title = WAYS[way] + ("" if way == "observed" else " (replay)")
            axis.step(
                took, [(i + 1) / len(took) for i in range(len(took))], color=colour, linestyle=style, where="post",
                label=f"{title}: {s['in_time']}/{s['runs']} in time, p95 {_time(s['completion_s']['p95'])}",
            )  # fmt: skip
        axis.set_title(
            f"{name}: replay's own error {gain['classes'][name]['error']:.0%}", loc="left", fontweight="bold"
        )
        axis.set_xlabel("run completion (s)")
        axis.set_xlim(left=0)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("share of runs that have ended")
    figure.savefig(path, dpi=130)
    plt.close(figure)
