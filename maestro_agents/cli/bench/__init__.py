"""`maestro bench`: the measurements behind the README's figures. Each prints a table, or everything with ``--json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from maestro_agents.cli.bench import stack as fleets
from maestro_agents.errors import ConfigError

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Measure: overhead per call, what faults do, whether engines keep our order, which constructs work.",
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
    """Kill -9 of app, scheduler, engine, Redis, and the node agent of real vLLM, under load. Example: maestro bench faults --engine vllm --times 20"""
    from maestro_agents.cli.bench import faults as bench

    known = bench.NODE_KINDS if engine == "vllm" else bench.KINDS
    kinds = tuple(kind or known)
    if wrong := set(kinds) - set(known):
        raise ConfigError(f"--kind {min(wrong)!r}: one of {', '.join(known)} (node: with --engine vllm)")
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


@bench_app.command("failover")
def measure_failover(
    engine: Engine = "emulator",
    kind: Annotated[list[str] | None, typer.Option("--kind", help="kill, stop, term; default all.")] = None,
    times: Annotated[int, typer.Option(min=1, help="Trials of each kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Workload and moments at which the leader goes.")] = 0,
    scale: Annotated[float, typer.Option(help="Length of answers, relative to the demo's.")] = 0.4,
    logs: Annotated[Path | None, typer.Option(help="Folder for the processes' logs.")] = None,
    as_json: Json = False,
) -> None:
    """Kill, stop or end the leader of three schedulers under load: how long nobody grants, what is lost or done twice. Example: maestro bench failover --times 20"""
    from maestro_agents.cli.bench import failover as bench

    kinds = tuple(kind or bench.KINDS)
    if wrong := set(kinds) - set(bench.KINDS):
        raise ConfigError(f"--kind {min(wrong)!r}: one of {', '.join(bench.KINDS)}")
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task(f"leaders go; {engine} engines", total=len(kinds) * times)

        def say(row: dict[str, Any]) -> None:
            progress.advance(task)
            progress.console.print(
                f"{row['kind']} seed {row['seed']}: {row['ok']}/{row['runs']} ok, gap {_seconds(row['gap_s'])}, "
                f"{row['fast_in_gap']} fast meanwhile, {row['lost']} of {row['stages']} stages lost, "
                f"asked twice {row['asked_twice']}" + (f"  {row['failed'][0]}" if row["failed"] else "")
            )

        rows = bench.run(engine, kinds, times, seed, scale, logs, say)
    found = bench.summary(rows)
    if as_json:
        about = {"label": fleets.label(engine), "lease_s": bench.faults.LEASE_S, "period_s": bench.PERIOD_S}
        print(json.dumps({**about, "schedulers": bench.SCHEDULERS, "summary": found, "trials": rows}))
    else:
        table = Table(
            title=f"{bench.SCHEDULERS} schedulers, the leader goes; engines: {engine} ({fleets.label(engine)}), "
            f"leadership period {bench.PERIOD_S:g} s"
        )
        names = "leader,trials,runs ok,stages,gap p50,longest,fast in gaps,lost,asked twice,deposed grants,kept"
        for name in names.split(","):
            table.add_column(name, no_wrap=True)
        for r in found:
            table.add_row(
                *(r["fault"], str(r["trials"]), f"{r['ok']}/{r['runs']}", str(r["stages"])),
                *(_seconds(r["gap_median_s"]), _seconds(r["gap_longest_s"])),
                *(str(r[name]) for name in ("fast_in_gap", "lost", "asked_twice", "deposed_grants")),
                "yes" if r["kept"] else "NO",
            )
        Console().print(table)
        Console().print(
            "gap: last grant of the old leader's planner to the first of the new one's. asked twice: calls that engines got "
            f"more than once, by their own account. kept: all runs ended well, nothing lost or twice, gaps under "
            f"{bench.PERIODS:g} periods."
        )
    if not all(r["kept"] for r in found):
        raise typer.Exit(1)


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"


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


@bench_app.command("matrix")
def check_matrix(
    construct: Annotated[
        list[str] | None, typer.Option("--construct", help="A file of sample_workflows/constructs; default all.")
    ] = None,
    mode: Annotated[list[str] | None, typer.Option("--mode", help="invoke, astream, ...; default all.")] = None,
    way: Annotated[
        list[str] | None,
        typer.Option("--way", help="install, decorator, wrap, run, wrap_model or middleware; default install."),
    ] = None,
    openai: Annotated[
        list[str] | None,
        typer.Option("--openai", help="Versions of the SDK, each in a virtual environment of its own; default ours."),
    ] = None,
    venvs: Annotated[Path | None, typer.Option("--venvs", help="Folder that keeps these environments.")] = None,
    as_json: Json = False,
) -> None:
    """Every LangGraph construct in every mode, with Maestro and without: same results, every call gated once, served by
    the fleet, with its node known. Example: maestro bench matrix --construct loop --openai 1.109.1 --openai 3
    """
    from maestro_agents.cli.bench import matrix as bench

    console = Console(stderr=True)
    names, modes, ways = construct or bench.constructs(), mode or list(bench.MODES), way or ["install"]
    for kind, given, known in (
        ("construct", names, bench.constructs()),
        ("mode", modes, bench.MODES),
        ("way", ways, bench.WAYS),
    ):
        bench.check_names(kind, given, known)
    if openai:
        found = _matrix_elsewhere(openai, venvs, names, modes, ways, console)
    else:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress:
            task = progress.add_task("constructs x modes", total=len(names) * len(modes) * len(ways))
            found = [bench.run(names, modes, w, lambda _cell: progress.advance(task)) for w in ways]
    if as_json:
        print(json.dumps(found))
    else:
        _show_matrix(found, bench.CHECKS)
    if any(table["totals"]["passed"] < table["totals"]["cells"] for table in found):
        raise typer.Exit(1)


def _matrix_elsewhere(
    versions: list[str], folder: Path | None, names: list[str], modes: list[str], ways: list[str], console: Console
) -> list[dict[str, Any]]:
    """The tables of other versions of the SDK."""
    from tempfile import TemporaryDirectory

    from maestro_agents.cli.bench import venvs

    options = [
        *chain.from_iterable(("--construct", n) for n in names),
        *chain.from_iterable(("--mode", m) for m in modes),
    ]
    with TemporaryDirectory(prefix="maestro-venvs-") as temporary:
        home = (folder or Path(temporary)).absolute()
        pythons = [venvs.make(version, home, lambda line: console.print(line, highlight=False)) for version in versions]
        return [venvs.matrix_in(python, [*options, "--way", w]) for python in pythons for w in ways]


def _show_matrix(found: list[dict[str, Any]], checks: Mapping[str, str]) -> None:
    console = Console()
    tables: list[Table] = []
    for table in found:
        title = f"openai {table['versions']['openai']}, {table['way']} ({table['label']})"
        tables.append(shown := Table(title=title, padding=0))
        shown.add_column("construct", no_wrap=True)
        for mode in table["modes"]:
            shown.add_column(mode, justify="center", overflow="fold")
        rows: dict[str, list[str]] = {}
        for cell in table["cells"]:
            mark = "-" if cell["skipped"] else f"[red]{cell['failed'][0]}[/]" if cell["failed"] else "[green]\u2713[/]"
            rows.setdefault(cell["construct"], []).append(mark)
        for name, marks in rows.items():
            shown.add_row(name, *marks)
    console.print(Columns(tables))
    for table in found:
        for cell in table["cells"]:
            if cell["failed"]:
                console.print(
                    f"{cell['construct']}, {cell['mode']}: {''.join(cell['failed'])}: {cell['detail']}", markup=False
                )
        left_out: dict[str, dict[str, None]] = {}
        for cell in table["cells"]:
            if cell["skipped"]:
                left_out.setdefault(cell["skipped"], {})[cell["construct"]] = None
        for why, names in left_out.items():
            console.print(f"{table['way']}: left out ({why}): {', '.join(names)}", markup=False)
    console.print("\n".join(f"{key} {told}" for key, told in checks.items()), markup=False, highlight=False)
    totals = Table("openai", "langchain-openai", "way", "cells", "passed", "failed", "left out", "requests")
    for table in found:
        versions, sums = table["versions"], table["totals"]
        failed = ", ".join(f"{key} {n}" for key, n in sums["failed"].items() if n) or "0"
        totals.add_row(
            versions["openai"], versions["langchain-openai"], table["way"], str(sums["cells"]), str(sums["passed"]), failed,
            str(sums["skipped"]), str(sums["requests"]),
        )  # fmt: skip
    console.print(totals)


@bench_app.command("observe")
def measure_observe(
    engine: Engine = "emulator",
    runs: Annotated[int, typer.Option(min=20, help="Runs of the sample per pass.")] = 40,
    seed: Annotated[int, typer.Option(help="Another seed, other arrivals.")] = 0,
    calls: Annotated[int, typer.Option(min=50, help="Pairs of calls for what observing costs.")] = 300,
    events: Annotated[
        Path | None, typer.Option("--events", help="Keep the record there; `maestro report` reads it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Does Maestro keep what `maestro report` promises, and what does observing cost? Example: maestro bench observe"""
    from maestro_agents.cli.bench import observe as bench

    console = Console(stderr=True)

    def look(now: Any) -> None:
        ended = len(now.results)
        progress.update(tasks[now.policy], completed=ended, visible=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        titles = {"observe": "observed", "on": "under Maestro"}
        tasks = {p: progress.add_task(f"runs {t}", total=runs, visible=False) for p, t in titles.items()}
        result = bench.run(engine, runs, seed, calls, look, progress.console.print, events)
    if as_json:
        print(json.dumps({"label": fleets.label(engine), "seed": seed, **result}))
        return
    table = Table(title=f"{runs} runs, twice; engines: {engine} ({fleets.label(engine)})")
    ways = {
        "observed": result["observed"],
        "replayed first come first served": result["told"]["replayed"],
        "promised": result["told"]["promised"],
        "promised, engines mute": result["untold"]["promised"],
        "kept": result["kept"],
    }
    for name in ("", *ways["observed"]):
        table.add_column(name, no_wrap=True)
    for way, classes in ways.items():
        cells = (f"{c['in_time']}/{c['runs']} {c['p50_s']:.1f} {c['p95_s']:.1f} s" for c in classes.values())
        table.add_row(way, *cells)
    Console().print(table)
    Console().print("per class: runs in time, p50 and p95 of run completion")
    for name, what in (("told", "with the engines' account of their queues"), ("untold", "without it")):
        Console().print(f"the replay's own error on what was observed, {what}: {result[name]['gain']['error']:.1%}")
    cost = result["cost"]
    Console().print(
        f"observing adds {cost['added_ms']['p50']:.2f} ms to a call (median of {cost['calls']} pairs, plain "
        f"{cost['plain_ms']['p50']:.2f} ms)"
    )


@bench_app.command("starvation")
def measure_starvation(
    runs: Annotated[int, typer.Option(min=2, help="Runs that begin at once.")] = 18, as_json: Json = False
) -> None:
    """What synchronous nodes under `ainvoke` cost when each waits in a thread, and what helps. Example: maestro bench starvation"""
    from maestro_agents.cli.bench import starvation as bench

    result = bench.run(runs)
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    table = Table("", "all answered after", "calls known at once", title=f"{runs} runs of one call at once")
    for case in result["cases"]:
        known = case["known_at_once"]
        table.add_row(case["case"], f"{case['all_s']:.2f} s", "-" if known is None else str(known))
    console.print(table)
    console.print(
        f"One run alone: {result['ideal_s']:.2f} s. The loop's own pool: {result['threads_of_the_loop']} threads "
        f"({result['cpu_cores']} CPU cores). Label: {result['label']}."
    )


@bench_app.command("scale")
def measure_scale(
    largest: Annotated[
        int, typer.Option(min=4, help="Engines of the largest fleet, and runs of the longest queue.")
    ] = 10_000,
    as_json: Json = False,
) -> None:
    """What a decision costs as fleet and queue grow, on emulated engines. Example: maestro bench scale --largest 1000"""
    from maestro_agents.cli.bench import scale as bench

    result = bench.run([n for n in bench.FLEETS if n <= largest], [n for n in bench.QUEUES if n <= largest])
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    for what, title in (("fleet", "the fleet grows"), ("queue", "the queue grows")):
        table = Table("engines", "runs", "decisions", "us a decision", "us a stage in all", title=title)
        for row in result[what]:
            table.add_row(
                str(row["engines"]), f"{row['runs']:,}", f"{row['decisions']:,}", f"{row['us_per_decision']:.0f}",
                f"{row['us_per_stage_in_all']:.0f}",
            )  # fmt: skip
        console.print(table)
    console.print(f"Label: {result['label']}.")


@bench_app.command("graphs")
def measure_graphs(
    construct: Annotated[list[str] | None, typer.Option("--construct", help="Only these; default all.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each at most.")] = 6,
    as_json: Json = False,
) -> None:
    """What is read from a graph before it runs, held to a truth written by hand, and how many runs mend the rest.

    Example: maestro bench graphs --construct swarm
    """
    from maestro_agents.cli.bench import graphs as bench

    names = construct or sorted(bench.truths())
    if wrong := set(names) - bench.truths().keys():
        raise ConfigError(f"--construct {min(wrong)!r}: one of {', '.join(sorted(bench.truths()))}")
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("graphs", total=len(names))
        rows = bench.run(names, runs, lambda row: progress.update(task, advance=1, description=row["construct"]))
    if as_json:
        print(json.dumps({"summary": bench.summary(rows), "constructs": rows}))
        return
    console = Console(width=None if Console().is_terminal else 170)
    table = Table(title="read from the graph before it runs, against the truth; then runs until all of it was there")
    for name in ("graph", "nodes", "LLM right", "maybe", "wrong", "roles", "tools", "edges", "spurious", "look ms"):
        table.add_column(name, no_wrap=True)
    for name in ("nodes after", "LLM after", "edges after", "edges taken", "wrongly"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        if "skipped" in r:
            table.add_row(r["construct"], r["skipped"])
            continue
        s, true = r["static"], r["true"]
        after = ["never" if n is None else str(n) for n in r["complete_after_runs"].values()]
        table.add_row(
            r["construct"], f"{s['nodes']}/{true['nodes']}", str(s["llm_right"]), str(len(s["llm_maybe"])), str(len(s["llm_wrong"])),
            f"{s['roles']}/{true['llm']}", f"{s['tools']}/{true['nodes']}", f"{s['edges']}/{true['edges']}",
            str(len(s["edges_spurious"])), f"{r['look_ms']:.1f}", *after, str(r["seen"]), str(len(r["seen_wrong"])),
        )  # fmt: skip
    console.print(table)
    for r in rows:
        if r.get("words"):
            console.print(f"{r['construct']}: {r['words']}", markup=False, highlight=False, soft_wrap=True)
    total = bench.summary(rows)
    console.print(
        f"{total['graphs']} graphs: nodes {total['nodes']}, LLM right {total['llm_right']}, maybe {total['llm_maybe']}, "
        f"wrong {total['llm_wrong']}, roles {total['roles']}, tools {total['tools']}, edges {total['edges']}, spurious "
        f"{total['edges_spurious']}; complete after at most {total['runs_at_most']} runs, which took {total['seen']} edges and "
        f"showed {total['seen_wrong']} that are none",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        "after: runs until nothing was missing. taken: edges that those runs went along. wrongly: seen, and not there."
    )
    if total["llm_wrong"] or total["seen_wrong"] or total["incomplete"]:
        raise typer.Exit(1)


@bench_app.command("cost")
def measure_cost(
    calls: Annotated[int, typer.Option(min=100, help="Calls each way and mode.")] = 1000,
    in_flight: Annotated[int, typer.Option(min=100, help="Runs that wait at the gate at once.")] = 2000,
    runs: Annotated[int, typer.Option(min=500, help="Runs of every kind, to look for a leak.")] = 10_000,
    as_json: Json = False,
) -> None:
    """What Maestro costs an app without Redis: import, time per call, memory per run, leaks. Example: maestro bench cost"""
    from maestro_agents.cli.bench import cost as bench

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def say(part: str, done: int, steps: int) -> None:
            if part not in tasks:
                tasks[part] = progress.add_task(part, total=steps)
            progress.update(tasks[part], completed=done)

        result = bench.run(calls, in_flight, runs, say)
    if as_json:
        print(json.dumps(result))
        return
    console, loaded = Console(), result["import"]
    table = Table("what Maestro adds", "", title="no Redis; the server answers at once")
    table.add_row("import, langgraph and openai loaded", f"{loaded['import_ms']:.0f} ms")
    table.add_row("the first wrap, then the first call", f"{loaded['wrap_ms']:.1f} + {loaded['first_call_ms']:.0f} ms")
    for mode, figures in result["call"].items():
        added = (
            f"{figures['added_ms']:.2f} ms (CPU {figures['added_cpu_ms']:.2f} ms, plain {figures['plain_ms']:.2f} ms)"
        )
        table.add_row(f"a call, {mode}", added)
    memory, leak = result["memory"], result["leak"]
    table.add_row(
        f"a run in flight, of {in_flight}",
        f"{memory['added_rss_bytes'] / 1024:.1f} KiB resident, {memory['added_python_bytes'] / 1024:.1f} KiB of Python's",
    )
    console.print(table)
    looks = Table("runs", "resident", "threads", "open files", "tasks", title="runs of every kind, one process")
    for look in leak["looks"]:
        resident = f"{look['rss_bytes'] / 2**20:.1f} MiB"
        looks.add_row(str(look["runs"]), resident, str(look["threads"]), str(look["files"]), str(look["tasks"]))
    console.print(looks)
    plain = result["leak_plain"]["late_bytes_per_run"]
    console.print(
        f"{leak['bytes_per_run']:.0f} bytes a run, {leak['late_bytes_per_run']:.0f} in the second half "
        f"(without Maestro {plain:.0f})"
    )
    for name, (before, after) in leak["grown"].items():
        console.print(f"  grew: {name} from {before} to {after}", markup=False, highlight=False)


@bench_app.command("upstream")
def check_upstream(
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="langgraph, supervisor, swarm; default all.")
    ] = None,
    venv: Annotated[
        Path | None, typer.Option("--venv", help="Folder that keeps environment, sources and logs.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that run a suite.")] = 2,
    as_json: Json = False,
) -> None:
    """LangGraph's own test suites, without Maestro and under it: does any test differ? Example: maestro bench upstream --suite swarm"""
    from tempfile import TemporaryDirectory

    from maestro_agents.cli.bench import upstream as bench

    names = tuple(suite or bench.SUITES)
    if wrong := set(names) - set(bench.SUITES):
        raise ConfigError(f"--suite {min(wrong)!r}: one of {', '.join(bench.SUITES)}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with (
        TemporaryDirectory(prefix="maestro-upstream-") as temporary,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        tasks: dict[tuple[str, str], Any] = {}

        def say(name: str, way: str, percent: int) -> None:
            if (name, way) not in tasks:
                tasks[name, way] = progress.add_task(f"{name}, {way}", total=100)
            progress.update(tasks[name, way], completed=percent)

        found = bench.run(names, venv or Path(temporary), workers, say)
    if as_json:
        print(json.dumps(found))
    else:
        table = Table(
            "suite",
            "version",
            "tests",
            "pass",
            "skip",
            "fail by themselves",
            "vary by themselves",
            "same",
            "differed once",
            "differ",
        )
        for r in found:
            sizes = (
                r["tests"],
                r["passed"],
                r["skipped"],
                len(r["failed"]),
                len(r["flaky"]),
                r["same"],
                len(r["once"]),
                len(r["different"]),
            )
            table.add_row(r["suite"], r["version"], *map(str, sizes))
        Console().print(table)
        for r in found:
            for test, (plain, ours) in r["different"].items():
                Console().print(f"{test}: {plain}, under Maestro {ours}", markup=False, highlight=False)
            for test, (plain, ours) in r["once"].items():
                told = f"{plain}, under Maestro {ours}; alone the same, {bench.ALONE} times each way"
                Console().print(f"{test}: {told}", markup=False, highlight=False)
    if any(r["different"] for r in found):
        raise typer.Exit(1)


@bench_app.command("gate-faults")
def measure_gate_faults(
    fault: Annotated[
        list[str] | None, typer.Option("--fault", help="Only those whose name holds this; default all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The gate's own faults, one by one: does the graph give its normal result? Example: maestro bench gate-faults --fault Redis"""
    from maestro_agents.cli.bench import gate_faults as bench

    names = tuple(n for n in bench.FAULTS if any(word in n for word in fault or ("",)))
    if not names:
        raise ConfigError(f"no fault is named like that. There are: {', '.join(bench.FAULTS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("faults of the gate", total=len(names))
        rows = bench.run(names, lambda _row: progress.advance(task))
    if as_json:
        print(json.dumps({"label": fleets.label("emulator"), "faults": rows}))
    else:
        table = Table("fault", "normal results", "added s", "log lines", "survived", title="engine emulated")
        for r in rows:
            kept = "yes" if r["survived"] else "NO"
            table.add_row(r["fault"], f"{r['same']}/{r['runs']}", f"{r['extra_s']:.2f}", str(r["lines"]), kept)
        Console().print(table)
        for r in rows:
            if not r["survived"]:
                Console().print(f"{r['fault']}: {'; '.join((*r['different'][:3], *r['log']))}", markup=False)
    if not all(r["survived"] for r in rows):
        raise typer.Exit(1)


@bench_app.command("remaining")
def measure_remaining(
    sessions: Annotated[
        Path,
        typer.Argument(
            help="CSV of recorded sessions, gzipped or not: app, session_id, task_id, call_index, role, ..."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Splits by task, half and half: seeds 0, 1, ...")] = 5,
    model: Annotated[
        bool,
        typer.Option(
            "--model", help="Hold the scheduler's second model to it instead, cross-fitted by task (minutes)."
        ),
    ] = False,
    calls: Annotated[
        Path | None,
        typer.Option("--calls", help="With --model: calls as JSON lines that tell what was said in the trace."),
    ] = None,
    as_json: Json = False,
) -> None:
    """How well is the rest of a run known, where its task was never seen? Example: maestro bench remaining sessions.csv.gz

    Statistics of nodes and visits beside plain means; with --model what the model adds that a scheduler trains on its own traffic.
    """
    from maestro_agents.cli.bench import remaining as bench

    if model:
        _measure_second(sessions, calls, as_json=as_json)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("what is left of runs", total=seeds)
        found = bench.run(sessions, seeds, lambda: progress.advance(task))
    if as_json:
        print(json.dumps(found))
        return
    table = Table(title="what a run still does: mean error of what was said beforehand", box=box.SIMPLE_HEAD)
    for name in ("app", "left", *(p.removesuffix("_mean") for p in bench.PREDICTORS)):
        table.add_column(name, no_wrap=True, justify="left" if name in {"app", "left"} else "right")
    rows: list[Any] = [{"app": "all", **found["overall"]}, *found["apps"]]
    for row in rows:
        for n, measure in enumerate(row["errors"]):
            errors = [row["errors"][measure][p] for p in bench.PREDICTORS]
            cells = (f"{x:.{0 if x >= 100 else 1 if x >= 10 else 3}f}" for x in errors)
            table.add_row("" if n else row["app"], found["measures"][measure], *cells, end_section=measure == "ends_p")
    Console().print(table)
    Console().print(
        "Absolute error (ends: Brier score, of the chance that no call follows) on calls of tasks that were not learned from. "
        f"Split by task, half and half, seeds {found['seeds'][0]} to {found['seeds'][-1]}; seconds only where all calls of an "
        "app are timed. global, app, role: the mean of those sessions that were learned from."
    )


def _measure_second(sessions: Path, calls: Path | None, *, as_json: bool) -> None:
    from maestro_agents.cli.bench import remaining as bench

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=1.0)
        found = bench.second(
            sessions, calls, lambda what, share: progress.update(task, description=what, completed=share)
        )
    if as_json:
        print(json.dumps(found))
        return
    table = Table(title="output tokens that a run still writes after a call", box=box.SIMPLE_HEAD)
    for name in ("said by", "error", "by app", "tau", "tau by app"):
        table.add_column(name, no_wrap=True, justify="left" if name == "said by" else "right")
    for row in found["rows"]:
        errors = (f"{row[name]:.0f}" for name in ("mae", "mae_mean_of_apps"))
        table.add_row(bench.SECOND[row["predictor"]], *errors, f"{row['tau']:.3f}", f"{row['tau_mean_of_apps']:.3f}")
    Console().print(table)
    Console().print(
        f"{found['calls']} calls, each asked about by what was learned from the tasks of the other {found['folds'] - 1} of "
        f"{found['folds']} parts, then frozen. Error: absolute, in tokens. tau: rank agreement (Kendall). By app: the apps' mean."
    )


@bench_app.command("kv")
def measure_kv(
    factor: Annotated[
        list[float] | None,
        typer.Option(
            "--factor", min=1.0, max=3.05, help="KV budgets over KV memory; may be repeated. Default 1, 1.5, 2, 3.05."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="The same ones under each factor.")] = 90,
    seed: Annotated[int, typer.Option(help="Sizes and moments of the requests.")] = 0,
    as_json: Json = False,
) -> None:
    """Two models on one emulated GPU whose KV budgets come to more than its memory. Example: maestro bench kv --factor 1 --factor 3.05

    The real node agent, its ledger and its guard; the GPU is emulated, so what memory costs in time is not measured.
    """
    from maestro_agents.cli.bench import kv as bench

    factors = factor or list(bench.FACTORS)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=len(factors) * requests)
        rows = bench.run(factors, requests, seed, lambda: progress.advance(task))
    found = {"label": "emulated", "seed": seed, "kv_gb": bench.KV_GB, "speed": bench.SPEED, "factors": rows}
    if as_json:
        print(json.dumps(found))
    else:
        table = Table(title="KV budgets over KV memory, two models on one emulated GPU", box=box.SIMPLE_HEAD)
        for name in "factor,ended,preempted,paused,p50,p95,p95 inter.,over".split(","):
            table.add_column(name, justify="right")
        for r in rows:
            seconds = (f"{r[k]:.1f} s" for k in ("p50_s", "p95_s", "interactive_p95_s"))
            counts = (f"{r['completed']}/{r['requests']}", str(r["preemptions"]), f"{r['paused_s']:.1f} s")
            table.add_row(f"{r['factor']:g}", *counts, *seconds, str(r["violations"]))
        Console().print(table)
        Console().print(
            f"factor: what budgets may come to, over {bench.KV_GB:g} GB of KV memory. paused: seconds in which nothing new was "
            "admitted. p50, p95: from a request's arrival to its last token; inter.: interactive ones. over: instants at which more was mapped than "
            f"there is, and moves refused for want of memory. Label: emulated, {bench.SPEED:g} times as fast as the hardware; seed {seed}."
        )
    if any(r["violations"] or r["completed"] < r["requests"] for r in rows):
        raise typer.Exit(1)


@bench_app.command("place")
def measure_place(
    engine: Engine = "emulator",
    fleet: Annotated[
        Path,
        typer.Option("--fleet", help="Of emulated GPUs: a file with [[gpu]]; its `models` are the static partition."),
    ] = Path("serving/deploy/fleet.node-8models-2gpus.toml"),
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Repeat for more. Default: ours, no-colocation (one model per GPU), static."),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs that arrive, one in about three seconds. Default: 100; with vLLM 20."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Runs, and moments of their arrival.")] = 0,
    speed: Annotated[
        float, typer.Option(min=0.1, help="Emulated: so much faster than the hardware, arrivals and deadlines along.")
    ] = 1.0,
    profile: Annotated[
        str,
        typer.Option("--profile", help="With vLLM: of its engines, for the simulator; a file of `maestro calibrate`."),
    ] = "cpu-tiny",
    events_out: Annotated[
        Path | None, typer.Option("--events-out", help="Every event of every play as JSON lines (.gz: gzipped).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Models that share GPUs, placed live under load; the simulator's figure beside it. Example: maestro bench place --policy ours --policy static

    Real Redis, scheduler and node agents on emulated GPUs, or on two real vLLM engines that share a CPU core. That memory is never
    over-committed is part of what is measured: exit code 1 where it was.
    """
    from maestro_agents.cli.bench import place as bench
    from maestro_agents.cli.bench import place_cpu
    from maestro_agents.cli.serve import check_policy

    policies = list(dict.fromkeys(policy or bench.DEFAULT_POLICIES))
    for name in policies:
        check_policy(name)
    if events_out is not None and not events_out.resolve().parent.is_dir():
        raise ConfigError(f"{events_out}: there is no folder {events_out.parent}")
    if engine not in {"emulator", "vllm"}:
        raise ConfigError(f"--engine {engine!r}: emulator or vllm")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        TemporaryDirectory(prefix="maestro-place-") as folder,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        if engine == "vllm":
            bed = place_cpu.real(Path(folder), runs=runs or 20, seed=seed, profile=profile)
        else:
            bed = bench.emulated(fleet, runs=runs or 100, seed=seed, speed=speed)
        task = progress.add_task("runs ended", total=len(bed.workload.runs) * len(policies))
        found = bench.run(bed, policies, seed=seed, events_out=events_out, look=lambda: progress.advance(task))
    if as_json:
        print(json.dumps(found))
    else:
        bench.show(found)
    if any(c["over"] or c["violations"] for c in found["checks"].values()):
        raise typer.Exit(1)


@bench_app.command("clusters")
def measure_clusters(
    fleet: Annotated[
        Path,
        typer.Option("--fleet", help="Emulated engines of one model, in clusters with the rtt_s that is injected."),
    ] = Path("serving/deploy/fleet.emulated-3clusters.toml"),
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Repeat for more. Default: ours, and ours with three other routings."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs that arrive, four in about three seconds.")] = 60,
    seed: Annotated[int, typer.Option(help="Runs, and moments of their arrival.")] = 0,
    outage: Annotated[
        bool, typer.Option("--outage", help="`ours` once more, and the largest cluster is lost for 15 s in the middle.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Clusters 1, 20 and 80 ms away: where calls went and why, live beside the simulator. Example: maestro bench clusters --runs 60 --outage

    Emulated engines, each behind a proxy that delays every byte; real Redis, scheduler and client. Exit code 1 where a run was lost.
    """
    from maestro_agents.cli.bench import clusters as bench
    from maestro_agents.cli.serve import check_policy

    policies = list(dict.fromkeys(policy or bench.POLICIES))
    for name in policies:
        check_policy(name)
    on = bench.bed(fleet, runs=runs, seed=seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("runs ended", total=runs * (len(policies) + outage))
        found = bench.run(on, policies, seed=seed, outage=outage, look=lambda: progress.advance(task))
    if as_json:
        print(json.dumps(found))
    else:
        bench.show(found)
    if any(told["checks"]["failed"] for told in (*found["policies"].values(), *filter(None, [found["outage"]]))):
        raise typer.Exit(1)


@bench_app.command("gateway")
def measure_gateway(
    streams: Annotated[int, typer.Option(min=1, help="At once, through one gateway process.")] = 1000,
    waves: Annotated[int, typer.Option(min=2, help="So often: what leaks grows with each.")] = 4,
    pairs: Annotated[int, typer.Option(min=50, help="Calls each way, in turn.")] = 400,
    as_json: Json = False,
) -> None:
    """The gateway: the same results as through the decorator, what it adds to a call, many streams at once. Example: maestro bench gateway --streams 1000

    Real Redis, scheduler and gateway process; engines are emulated. Exit code 1 where a result differed or a stream did not end.
    """
    from maestro_agents.cli.bench import gateway as bench

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("pairs and streams", total=2 * (pairs + bench.WARM) + streams * waves)
        found = bench.run(streams=streams, count=waves, pairs=pairs, look=lambda: progress.advance(task))
    if as_json:
        print(json.dumps(found))
    else:
        bench.show(found)
    if bench.lost(found):
        raise typer.Exit(1)


@bench_app.command("ray")
def measure_ray(
    kind: Annotated[list[str] | None, typer.Option("--kind", help="raylet, machine; default both.")] = None,
    times: Annotated[int, typer.Option(min=1, help="Trials of each kind.")] = 3,
    seed: Annotated[int, typer.Option(help="Workload, which machine, and the moments of the kills.")] = 0,
    logs: Annotated[Path | None, typer.Option(help="Folder for the processes' logs.")] = None,
    as_json: Json = False,
) -> None:
    """Nodes on a Ray cluster of three machines, one dies under load: when do its engines serve again? Example: maestro bench ray --times 3

    A real Ray cluster on loopback whose GPUs are only counted; engines are emulated. Exit code 1 where a run or stage was lost.
    """
    from maestro_agents.cli.bench import ray as bench

    kinds = tuple(kind or bench.KINDS)
    if wrong := set(kinds) - set(bench.KINDS):
        raise ConfigError(f"--kind {min(wrong)!r}: one of {', '.join(bench.KINDS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("the cluster starts", total=len(kinds) * times)

        def say(row: dict[str, Any]) -> None:
            progress.update(task, advance=1, description="machines die")
            progress.console.print(
                f"{row['kind']} seed {row['seed']}: {row['ok']}/{row['runs']} ok, {row['cut_streams']} cut streams, "
                f"{len(row['failed'])} failed, processes gone {_seconds(row['processes_gone_s'])}, "
                f"placed anew {_seconds(row['moved_s'])}, serves {_seconds(row['serves_s'])}"
                + (f"  {row['failed'][0]}" if row["failed"] else ""),
                markup=False,
            )

        found = bench.run(kinds, times, seed, logs, lambda line: progress.update(task, description=line), say)
    if as_json:
        print(json.dumps(found))
    else:
        table = Table(title=f"a machine of a Ray cluster of {found['machines']} dies; engines {found['label']}")
        names = "kill -9 of,trials,runs ok,cut,failed,lost,processes gone,away,placed anew,serves,kept"
        for name in names.split(","):
            table.add_column(name, no_wrap=True)
        for r in found["summary"]:
            table.add_row(
                *(r["kind"], str(r["trials"]), f"{r['ok']}/{r['runs']}"),
                *(str(r[name]) for name in ("cut_streams", "failed", "lost")),
                *(_seconds(r[name]) for name in ("processes_gone_s", "away_s", "moved_s", "serves_s")),
                "yes" if r["kept"] else "NO",
            )
        Console().print(table)
        Console().print(
            "Seconds from the kill, worst trial. processes gone: all that the machine ran has ended. away: its engine is out of the "
            "fleet. placed anew: Ray has another machine for the node. serves: its engine does, from there. lost: runs that did "
            "not end, and stages left in the queue."
        )
    if not all(r["kept"] for r in found["summary"]):
        raise typer.Exit(1)


@bench_app.command("features")
def measure_features(
    trace: Annotated[
        Path | None, typer.Argument(help="Recorded calls, for the error of the estimate; only the cost without.")
    ] = None,
    calls: Annotated[int, typer.Option(min=50, help="Calls of each kind that are timed.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the prose that is timed.")] = 0,
    as_json: Json = False,
) -> None:
    """The numbers made of a prompt in the app: how wrong is the token estimate, what do they cost? Example: maestro bench features calls.jsonl.gz"""
    from maestro_agents.cli.bench import features as bench

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("calls timed", total=2 * len(bench.SIZES) * calls)
        found = bench.run(trace, calls, seed, lambda: progress.advance(task))
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    for of, error in found.get("estimate", {}).items():
        table = Table("app", "n", "median", "p10", "p90", "MAPE", "bytes / 4", title=f"estimate / counted tokens: {of}")
        for row in ({"app": "all", **error["all"]}, *error["apps"]):
            ratios = (f"{row[name]:.2f}" for name in ("median", "p10", "p90"))
            off = (f"{row[name]:.1%}" for name in ("mape", "four_bytes_mape"))
            table.add_row(row["app"], str(row["n"]), *ratios, *off, end_section=row["app"] == "all")
        console.print(table)
    if "estimate" in found:
        console.print(
            "message: what a call's input has more than the last one's input and output. conversation: all such of a session. "
            "first call: of input that holds tools, and often a longer prompt, which the trace does not have. bytes / 4: MAPE of four "
            "bytes a token."
        )
    head = ("tokens", "messages", "instruction", "p50 ms", "p99 ms", "goal p50", "bytes in the ticket")
    table = Table(*head, title="estimate, features and sketch of one call")
    for row in found["cost"]:
        table.add_row(
            f"{row['tokens']:,}", str(row["messages"]), "seen before" if row["warm"] else "new", f"{row['p50_ms']:.3f}",
            f"{row['p99_ms']:.3f}", f"{row['goal_ms']:g} ms", f"{row['wire_bytes']:.0f}",
        )  # fmt: skip
    console.print(table)
    one = found["predicting"]
    console.print(
        f"Predicting {one['stages']} waiting stages in the scheduler: p50 {one['p50_ms']:.2f} ms, p99 {one['p99_ms']:.2f} ms (goal of p50: "
        f"{one['goal_ms']:g} ms), of which the model {one['model_p50_ms']:.2f} ms."
    )
