"""`maestro bench`: the measurements behind the README's figures. Each prints a table, or everything with ``--json``."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from maestro_agents.cli.bench import stack as fleets
from maestro_agents.errors import ConfigError

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure: overhead per call, what faults do, whether engines keep our order."
)

Json = Annotated[bool, typer.Option("--json", help="Everything as JSON on stdout, raw values included.")]
Engine = Annotated[str, typer.Option("--engine", help="`emulator`, or `vllm`: real vLLM on this machine's CPU cores.")]
Events = Annotated[Path | None, typer.Option("--events", help="Write the raw events, one JSON line each.")]


@bench_app.command("overhead")
def measure_overhead(
    calls: Annotated[int, typer.Option(min=50, help="Calls each way.")] = 1000, as_json: Json = False
) -> None:
    """Added latency of one decorated LangGraph call at idle, real Redis, over the plain call. Example: maestro bench overhead"""
    from maestro_agents.cli.bench import overhead as bench

    result = bench.run(calls)
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    table = Table(
        "", "p50 ms", "p99 ms", title=f"one LangGraph call, {result['calls']} each way, in turn; engine emulated"
    )
    for name, key in (("plain", "plain_ms"), ("through Maestro", "maestro_ms"), ("added", "added_ms")):
        table.add_row(name, f"{result[key]['p50']:.2f}", f"{result[key]['p99']:.2f}")
    console.print(table)
    parts = Table("part (timers on)", "ms per call")
    for part, ms in result["parts_ms"].items():
        parts.add_row(part, f"{ms:.3f}")
    parts.add_row("CPU added per call, all threads", f"{result['added_cpu_ms']:.2f}")
    console.print(parts)
    fast = result["fast_path"]
    console.print(
        f"fast path: {fast['hits']} of {fast['grants']} grants in the push's own round trip ({fast['rate']:.1%})"
    )


@bench_app.command("faults")
def measure_faults(
    engine: Engine = "emulator",
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="app, scheduler, engine, redis; default all.")
    ] = None,
    times: Annotated[int, typer.Option(min=1, help="Trials of each kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Workload and moments of the faults.")] = 0,
    scale: Annotated[float, typer.Option(help="Length of answers, relative to the demo's.")] = 0.4,
    logs: Annotated[Path | None, typer.Option(help="Folder for the processes' logs.")] = None,
    events: Events = None,
    as_json: Json = False,
) -> None:
    """Kill -9 of app, scheduler, engine and Redis under load. Example: maestro bench faults --engine vllm --times 20"""
    from maestro_agents.cli.bench import faults as bench

    kinds = tuple(kind or bench.KINDS)
    if wrong := set(kinds) - set(bench.KINDS):
        raise ConfigError(f"--kind {min(wrong)!r}: one of {', '.join(bench.KINDS)}")
    console = Console(stderr=True)
    out = events.open("w", encoding="utf-8") if events else None
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task(f"faults on {engine} engines", total=len(kinds) * times)

        def say(row: dict[str, Any]) -> None:
            progress.advance(task)
            zero = row["ledger_zero_after_s"]
            progress.console.print(
                f"{row['what']:<10} seed {row['seed']}: {row['ok']}/{row['runs']} ok, {row['cut_streams']} cut streams, "
                f"{len(row['failed'])} failed, last end {row['slowest_end_after_fault_s']:.1f} s after, "
                f"ledger zero {'never' if zero is None else f'{zero:.1f} s'}"
                + (f"  {row['failed'][0]}" if row["failed"] else "")
            )
            if out:
                out.write(json.dumps(row) + "\n")
                out.flush()

        rows = bench.run(engine, kinds, times, seed, scale, logs, say)
    if out:
        out.close()
    found = bench.summary(rows)
    if as_json:
        print(json.dumps({"label": fleets.label(engine), "lease_s": bench.LEASE_S, "summary": found, "trials": rows}))
    else:
        table = Table(title=f"faults under load; engines: {engine} ({fleets.label(engine)}), lease {bench.LEASE_S:g} s")
        names = "fault,trials,runs,in flight,ended,ok,cut,failed,last end,ledger 0,survived"
        for name in names.split(","):
            table.add_column(name, no_wrap=True)
        for r in found:
            zero = "never" if r["ledger_zero_s"] is None else f"{r['ledger_zero_s']:.1f} s"
            cells = [r[k] for k in ("fault", "trials", "runs", "in_flight", "ended", "ok", "cut_streams", "failed")]
            table.add_row(*map(str, cells), f"{r['slowest_end_s']:.1f} s", zero, "yes" if r["survived"] else "NO")
        Console().print(table)
        Console().print(
            "in flight: at the fault, in the app that lives. cut: streams broken after their first byte (the SDK's error, "
            "nothing replayed). last end: seconds after the fault, worst trial. ledger 0: no reservation left, worst trial."
        )
    if not all(r["survived"] for r in found):
        raise typer.Exit(1)


@bench_app.command("order")
def measure_order(
    engine: Engine = "emulator",
    runs: Annotated[int, typer.Option(min=2, help="Runs of the sample per policy.")] = 60,
    seed: Annotated[int, typer.Option(help="Arrivals, messages and lengths.")] = 0,
    scale: Annotated[float, typer.Option(help="Length of answers, relative to the demo's.")] = 0.5,
    rate: Annotated[float, typer.Option(min=0.01, help="Arrivals, relative to the demo's.")] = 0.4,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each policy.")] = 2,
    overcommit: Annotated[int, typer.Option(min=0, help="Grants an engine gets beyond what it runs at once.")] = 1,
    events: Events = None,
    as_json: Json = False,
) -> None:
    """The same runs first come first served and under Maestro; does the engine keep our order? Example: maestro bench order --engine vllm"""
    from maestro_agents.cli.bench import order as bench

    console = Console(stderr=True)
    said: dict[int, int] = {}

    def look(now: Any) -> None:
        ended = len(now.results)
        if ended > said.get(id(now), 0) and (ended % 10 == 0 or ended == runs):
            said[id(now)] = ended
            console.print(f"{now.policy}: {ended} of {runs} runs ended")

    found = bench.run(engine, runs, seed, scale, rate, rounds, overcommit, look)
    if events:
        lines = [json.dumps({"policy": p["policy"], **e}) for p in found for e in (*chain(*p["events"]), *p["runs"])]
        events.write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, ours = found
    ratio = ours["classes"]["interactive"]["p95_s"] / first["classes"]["interactive"]["p95_s"]
    if as_json:
        print(json.dumps({"label": fleets.label(engine), "interactive_p95_ratio": ratio, "policies": found}))
        return
    table = Table(title=f"{rounds} x {runs} runs each way; engines: {engine} ({fleets.label(engine)})")
    for name in ("policy", "class", "completed", "in time", "p50 s", "p95 s", "tau (pairs)", "in engine"):
        table.add_column(name, no_wrap=True)
    for p in found:
        for name, c in p["classes"].items():
            table.add_row(
                p["policy"], name, f"{c['completed']}/{c['runs']}", str(c["in_time"]), f"{c['p50_s']:.1f}",
                f"{c['p95_s']:.1f}", f"{p['tau']:.3f} ({p['tau_pairs']})", f"{p['tau_in_engine']:.3f} ({p['tau_in_engine_pairs']})",
            )  # fmt: skip
    Console().print(table)
    Console().print(f"interactive p95, Maestro over first come first served: {ratio:.2f}")
