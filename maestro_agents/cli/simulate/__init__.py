"""`maestro simulate`: policies compared on a virtual clock, with the very functions that decide live."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from maestro_agents.errors import ConfigError
from maestro_agents.policy import POLICIES
from maestro_agents.simulator.world import Outage

if TYPE_CHECKING:
    from maestro_agents.cli.simulate.plays import Given

DEFAULT_POLICIES: Final = ("fcfs", "edf", "maestro-paper", "ours")
MAX_LOADS: Final = 100
PICTURES: Final = (".png", ".svg", ".pdf")
LABEL: Final = "emulated"
_T = TypeVar("_T")


def run(
    workload: Annotated[
        Path | None,
        typer.Argument(
            help="A workload, or recorded calls (a CSV of sessions, or JSON lines) to compose one of. Default: the package's."
        ),
    ] = None,
    fleet: Annotated[
        Path | None,
        typer.Option("--fleet", help="Fleet file. Default: four A100 with an 8B model for each model of the workload."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help=f"Repeat for more: {', '.join(POLICIES)}, or your own function, my_file.py:order. "
            f"Default: {', '.join(DEFAULT_POLICIES)}.",
        ),
    ] = None,
    load: Annotated[
        str,
        typer.Option(
            "--load", help="FROM:TO:STEP, or values between commas; 1: saturates the fleet under FCFS by run."
        ),
    ] = "0.5:1.2:0.1",
    burst: Annotated[
        float | None, typer.Option("--burst", help="Also ten-minute bursts to this load, on a mean of 0.8.")
    ] = None,
    seeds: Annotated[
        int,
        typer.Option("--seeds", min=1, help="Workloads to average over. Of a workload file: other orders of its runs."),
    ] = 5,
    first_seed: Annotated[
        int, typer.Option("--first-seed", min=0, help="0 to 99: tasks to report; from 100: the other half, to tune on.")
    ] = 0,
    mix: Annotated[str, typer.Option("--mix", help="Of a trace: which apps, as in `maestro workload`.")] = "everything",
    arrivals: Annotated[
        Path | None, typer.Option("--arrivals", help="Of a trace: CSV file with a column t_s, whose rhythm runs have.")
    ] = None,
    window: Annotated[float, typer.Option("--window", help="Of a trace: seconds in which runs arrive.")] = 3600.0,
    calls: Annotated[
        Path | None, typer.Option("--calls", help="Of a trace: calls as JSON lines with what they said, to predict by.")
    ] = None,
    foreseen: Annotated[
        Path | None,
        typer.Option(
            "--foreseen",
            help="Of a trace: its predictions. Made (minutes) and kept where the file is not there. Without this and --calls "
            "policies learn while they play.",
        ),
    ] = None,
    tenants: Annotated[
        str, typer.Option("--tenants", help="Weights of the tenants' fair shares, say a=2,b=1. Default: all alike.")
    ] = "",
    flood: Annotated[
        str, typer.Option("--flood", help="TENANT:FACTOR: this one sends FACTOR times its runs, beyond the load.")
    ] = "",
    outage: Annotated[
        list[str] | None,
        typer.Option("--outage", help="CLUSTER:FROM:TO in seconds: it is gone for a while. Repeat for more."),
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes. Default: one per core.")] = None,
    events_out: Annotated[
        Path | None, typer.Option("--events-out", help="Every event of every play as JSON lines (.gz: gzipped).")
    ] = None,
    trace_out: Annotated[
        Path | None,
        typer.Option("--trace-out", help="One play as a Chrome trace (.gz: gzipped): open it in ui.perfetto.dev."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw SLO attainment against load (PNG, SVG, PDF).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything as JSON on stdout, each seed's own figures included.")
    ] = False,
) -> None:
    """Play runs under several policies. Example: maestro simulate w.jsonl.gz --fleet fleet.toml --policy edf --policy ours

    The scheduler's own code decides, on a virtual clock; engines are emulated. One table: SLO attainment per class with 95 %
    intervals, completion, delays, KV, fairness, speed, by policy and load. The same input gives the same events, byte for byte.
    """
    for path in (events_out, trace_out, plot, foreseen):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {plot}: a picture's name ends in {', '.join(PICTURES)}")
    if not 1 <= window <= 1e7:
        raise ConfigError(f"--window {window:g}: give seconds, from 1 on")
    from maestro_agents.cli.simulate import plays, tables

    policies = list(dict.fromkeys(policy or DEFAULT_POLICIES))
    for name in policies:
        plays.policy_of(name)
    loads = [(at, 0.0) for at in parsed_loads(load)]
    if burst is not None:
        if not plays.MEAN_LOAD < burst <= 5 * plays.MEAN_LOAD:
            raise ConfigError(
                f"--burst {burst:g}: bursts go from a mean load of {plays.MEAN_LOAD} to more, up to 4, say 2.0"
            )
        loads.append((plays.MEAN_LOAD, burst))
    if trace_out and len(policies) * len(loads) * seeds > 1:
        raise ConfigError("--trace-out shows one play: give one --policy, one --load, no --burst, and --seeds 1")
    errors = Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        given = plays.Given(
            workload=workload,
            fleet=fleet,
            mix=plays.known_mix(mix),
            arrivals=arrivals,
            window_s=window,
            foreseen=_foreseen(workload, calls, foreseen, stack, errors),
            tenants=_weights(tenants),
            flood=_flood(flood),
            outages=tuple(_outage(each) for each in outage or ()),
        )
        one = plays.check(given)
        progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=errors
            )
        )
        wanted = range(first_seed, first_seed + seeds)
        todo = len(wanted) * len(policies) * len(loads)
        many = _Processes(min(jobs or os.cpu_count() or 1, todo), stack)
        bar = progress.add_task("saturating the fleet", total=len(wanted))
        work = many.all([(plays.saturated_work_per_s, (given, s)) for s in wanted], lambda: progress.advance(bar))
        list_of = [
            plays.Play(policy=name, load=at, burst=to, seed=s, work_per_s=per_s)
            for at, to in loads
            for s, per_s in zip(wanted, work, strict=True)
            for name in policies
        ]
        bar = progress.add_task("playing", total=len(list_of))
        parts = _parts(events_out, len(list_of), stack)
        results = many.all(
            [(plays.played, (given, p, part, trace_out)) for p, part in zip(list_of, parts, strict=True)],
            lambda: progress.advance(bar),
        )
        if events_out:
            _joined(events_out, parts)
        first = plays.workload_of(given, list_of[0].seed, list_of[0].load, list_of[0].burst, list_of[0].work_per_s)
    done = dict(zip(list_of, results, strict=True))
    found = _found(given, policies, seeds, first if one is None else one, work, tables.rows(done))
    found["state"] = tables.state(found["rows"])
    if plot:
        tables.draw(plot, found)
    if as_json:
        print(json.dumps(found))
    else:
        tables.show(found)


def parsed_loads(text: str) -> list[float]:
    """``FROM:TO:STEP`` or values between commas. Raises `ConfigError`."""
    try:
        if ":" in text:
            low, high, step = (float(part) for part in text.split(":"))
            number = int((high - low) / step + 1e-9) + 1 if step > 0 else 0
            found = [round(low + n * step, 10) for n in range(min(number, MAX_LOADS + 1))]
        else:
            found = [float(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        found = []
    if not found or len(found) > MAX_LOADS or not all(0.01 <= each <= 10 for each in found):
        raise ConfigError(
            f"--load {text!r}: give FROM:TO:STEP, say 0.5:1.2:0.1, or values between commas, {MAX_LOADS} at most, from 0.01 to 10"
        )
    return list(dict.fromkeys(found))


def _weights(text: str) -> tuple[tuple[str, float], ...]:
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.partition("=")
        try:
            found[name.strip()] = float(weight)
        except ValueError:
            found[name.strip()] = 0.0
        if not name.strip() or not 0 < found[name.strip()] < 1e6:
            raise ConfigError(f"--tenants {text!r}: give NAME=WEIGHT between commas, say a=2,b=1")
    return tuple(found.items())


def _flood(text: str) -> tuple[str, int] | None:
    if not text:
        return None
    tenant, _, factor = text.rpartition(":")
    if not tenant or not factor.isdecimal() or not 1 <= int(factor) <= 1000:
        raise ConfigError(f"--flood {text!r}: give TENANT:FACTOR, a whole number, say tenant-1:10")
    return tenant, int(factor)


def _outage(text: str) -> Outage:
    cluster, *moments = text.rsplit(":", 2)
    try:
        from_s, to_s = map(float, moments)
    except ValueError:
        from_s = to_s = 0.0
    if not cluster or not 0 <= from_s < to_s < math.inf:
        raise ConfigError(f"--outage {text!r}: give CLUSTER:FROM:TO in seconds, say far:1200:1800")
    return Outage(cluster=cluster, from_s=from_s, to_s=to_s)


def _foreseen(
    workload: Path | None, calls: Path | None, foreseen: Path | None, stack: ExitStack, errors: Console
) -> Path | None:
    """The file with the predictions of a trace's calls, made where it is asked for and not there."""
    if calls is None and foreseen is None:
        return None
    from maestro_agents.simulator.foresight import foresee, write_foreseen
    from maestro_agents.simulator.workload import kind_of

    if workload is None or kind_of(workload) == "workload":
        raise ConfigError("--calls and --foreseen are for a trace: a workload brings its predictions with it")
    if foreseen is not None and foreseen.exists():
        return foreseen
    where = foreseen or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "foreseen.jsonl.gz"
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=errors) as progress:
        bar = progress.add_task("predicting", total=1.0)
        told = foresee(
            workload, calls, progress=lambda what, share: progress.update(bar, description=what, completed=share)
        )
    write_foreseen(told, where)
    return where


class _Processes:
    """Does things in several processes, or in this one where one is enough."""

    def __init__(self, number: int, stack: ExitStack) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if number > 1:
            # Not forked: a progress bar has a thread.
            self._pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=_quiet)
            stack.callback(self._pool.shutdown, wait=True, cancel_futures=True)

    def all(self, todo: Sequence[tuple[Callable[..., _T], tuple[Any, ...]]], tick: Callable[[], None]) -> list[_T]:
        """Each call's result, in this order, whichever ends first. Raises what a call raised."""
        if self._pool is None:
            return list(self._here(todo, tick))
        futures: list[Future[_T]] = [self._pool.submit(what, *with_) for what, with_ in todo]
        for future in as_completed(futures):
            future.result()
            tick()
        return [future.result() for future in futures]

    @staticmethod
    def _here(todo: Iterable[tuple[Callable[..., _T], tuple[Any, ...]]], tick: Callable[[], None]) -> Iterator[_T]:
        for what, with_ in todo:
            yield what(*with_)
            tick()


def _quiet() -> None:
    """Ctrl-C ends a worker without a word: the parent says it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _parts(events_out: Path | None, number: int, stack: ExitStack) -> list[Path | None]:
    """A file for each play's events, gone in the end."""
    if events_out is None:
        return [None] * number
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=events_out.resolve().parent)))
    return [folder / f"{n}{events_out.suffix}" for n in range(number)]


def _joined(path: Path, parts: Sequence[Path | None]) -> None:
    with path.open("wb") as whole:
        for part in filter(None, parts):
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)


def _found(
    given: Given, policies: Sequence[str], seeds: int, one: Any, work: Sequence[float], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    from maestro_agents.cli.simulate.plays import fleet_of

    fleet = fleet_of(given)
    return {
        "label": LABEL,
        "workload": {
            "file": given.workload.name if given.workload else None,
            "name": one.name,
            "source": one.source,
            "runs": len(one.runs),
            "stages": sum(len(each.stages) for each in one.runs),
        },
        "fleet": {
            "name": given.fleet.name if given.fleet else "four A100 a model",
            "engines": len(fleet.engines),
            "gpus": len(fleet.gpus or {gpu for e in fleet.engines for gpu in e.gpus}),
            "clusters": list(fleet.clusters),
            "models": dict.fromkeys(fleet.models, 0) | Counter(e.spec.model for e in fleet.engines),
        },
        "policies": list(policies),
        "seeds": seeds,
        "saturated_work_s_per_s": sum(work) / len(work),
        "saturated_by_seed": list(work),
        "rows": rows,
    }
