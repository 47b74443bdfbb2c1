"""`maestro bench place`: models that share GPUs, placed live by several policies, and the same played by the simulator.

A workload of recorded runs (the package's own), its roles spread over the fleet's models so that their work falls off as ranks do.
It is played live: every stage in the order of its run's graph through the real client to the granted engine, as the gate does it,
on a real Redis, scheduler, node agents and engines; prompts and answers have the recorded lengths. And it is played by the
simulator, with the same fleet, policy and lengths. What was seen live is written as the simulator's own events and counted by its
own scorer. Emulated engines are the simulator's engine model on a real clock: what differs between the two rows of a policy is the
cost of the real scheduler, Redis and clocks.

`static` begins with all models that the fleet file starts; the others with the first of each GPU, the rest where their files are.
Memory is looked at in every report of a node: weights, servers and KV of a GPU's engines against what it has, sleeping weights
against host memory; and emulated GPUs count by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from maestro_agents.cli.bench.live_play import (
    LOOK_S,
    WAIT_S,
    Live,
    arriving,
    counted,
    difference,
    rows,
    settled,
    simulated,
)
from maestro_agents.cli.simulate.plays import Played, longest_of
from maestro_agents.cli.simulate.tables import HEAD, WIDTH, cells
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.errors import ConfigError, MaestroError
from maestro_agents.fleet import load_fleet, load_tables
from maestro_agents.nodes import Move, NodeReport
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.simulator.compose import POPULARITY
from maestro_agents.simulator.hardware import Gpu, Served, SimFleet, SimModel, load_sim_fleet
from maestro_agents.simulator.workload import REFERENCE, Run, Workload, sample, write_lines
from maestro_agents.simulator.world import EVENTS, Event
from maestro_serving.emulated_driver import states


@dataclass(frozen=True, kw_only=True)
class Bed:
    """What is played, and where."""

    engine: str
    label: str
    #: Its `models` are the static partition.
    fleet: Path
    workload: Workload
    #: The same fleet for the simulator: as a policy begins with it (its file and name), moves taking what was measured so far.
    sim: Callable[[Path, str, Sequence[Move]], SimFleet]
    speed: float = 1.0
    arrivals_per_s: float = 0.0
    #: Models that have served a call before the play begins.
    warm: tuple[str, ...] = ()


DEFAULT_POLICIES: Final = ("ours", "no-colocation", "static")
FLEET: Final = "serving/deploy/fleet.node-8models-2gpus.toml"
RUNS_PER_S: Final = 1 / 3
"""Arrivals a second, at the speed of the hardware."""

LONGEST_DEADLINE_S: Final = 150.0
"""Runs with a longer one are left out: play goes on for so long after the last arrival."""


# -- what is played ------------------------------------------------------------------------------------------------------
def workload_of(fleet: SimFleet, *, runs: int, seed: int, speed: float = 1.0) -> Workload:
    """Recorded runs that fit the fleet's engines, in a seeded order, arriving by a Poisson process of a fixed rate.

    Every role gets a model, the one that lacks most of its share of the work, as `simulator.compose` does it. Predictions that the
    workload brings are left out: live nobody has them, both learn while they play. ``speed``: all seconds are divided by it.
    """
    longest = longest_of(fleet)
    names, most = list(longest), min(longest.values())
    found = [
        r
        for r in sample().runs
        if r.deadline_s <= LONGEST_DEADLINE_S and all(s.prompt_tokens + s.output_tokens <= most for s in r.stages)
    ]
    if not found:
        raise ConfigError(
            f"no recorded run is as short as this fleet's models take ({most} tokens): a larger max_model_len"
        )
    model_of = _spread(found, names)
    window_s = runs / RUNS_PER_S / speed
    return Workload(
        name=f"everything, {len(names)} models",
        runs=arriving(
            found, lambda _, stage: model_of[stage.role], runs=runs, window_s=window_s, seed=seed, speed=speed
        ),
        warmup_s=window_s / 6,
        window_s=window_s,
        horizon_s=window_s + LONGEST_DEADLINE_S / speed,
        source=f"{sample().source}; {len(found)} of {len(sample().runs)} runs with calls of at most {most} tokens and deadlines of "
        f"at most {LONGEST_DEADLINE_S:g} s, {runs} of them in order of seed {seed}",
    )


def _spread(runs: Sequence[Run], models: Sequence[str]) -> Mapping[str, str]:
    """Role -> model, so that the n-th model gets about 1 / n ** `POPULARITY` of the work of the first."""
    asked_s: defaultdict[str, float] = defaultdict(float)
    for run in runs:
        for stage in run.stages:
            asked_s[stage.role] += REFERENCE.call_s(stage)
    weights = [1 / n**POPULARITY for n in range(1, len(models) + 1)]
    lacking = [w / sum(weights) * sum(asked_s.values()) for w in weights]
    found: dict[str, str] = {}
    for role, seconds in sorted(asked_s.items(), key=lambda kv: (-kv[1], kv[0])):
        most = max(range(len(models)), key=lambda m: (lacking[m], -m))
        lacking[most] -= seconds
        found[role] = models[most]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Faster(SimModel):
    """So much faster than the hardware, moves included: as an emulated engine with ``--speed``."""

    speed: float

    def on(self, gpu: Gpu, kv_bytes: int | None = None) -> Served:
        served = SimModel.on(self, gpu, kv_bytes)
        seconds = {
            f.name: getattr(served.tiers, f.name) / self.speed
            for f in dataclasses.fields(served.tiers)
            if f.name.endswith("_s")
        }
        tiers = dataclasses.replace(served.tiers, **seconds)
        return dataclasses.replace(served, profile=served.profile.faster(self.speed), tiers=tiers)


def sim_fleet(path: Path, speed: float) -> SimFleet:
    """The fleet file for the simulator, at a speed."""
    fleet = load_sim_fleet(path)
    if speed == 1.0:
        return fleet
    models = {
        name: _Faster(**{f.name: getattr(m, f.name) for f in dataclasses.fields(m)}, speed=speed)
        for name, m in fleet.models.items()
    }
    engines = tuple(dataclasses.replace(e, profile=e.profile.faster(speed)) for e in fleet.engines)
    return dataclasses.replace(fleet, models=models, engines=engines)


def write_start(path: Path, into: Path, *, policy: str, speed: float) -> None:
    """Write a fleet file as a policy begins with it: `static` with all that it starts, the others with the first of each GPU."""
    tables = load_tables(path)
    lines = [f"pool = {json.dumps(tables.live.pool)}"]
    for cluster in tables.clusters:
        lines += ["", "[[cluster]]", *_keys(cluster.model_dump(exclude_defaults=True))]
    for gpu in tables.gpus:
        models = gpu.models if policy == "static" else gpu.models[:1]
        lines += ["", "[[gpu]]", *_keys({**gpu.model_dump(exclude_defaults=True), "models": models})]
    for n, model in enumerate(tables.models):
        lines += ["", "[[model]]", *_keys(model.model_dump(exclude_defaults=True, exclude={"launch"}))]
        said: dict[str, Any] = {"kind": "emulator"} | (
            model.launch.model_dump(exclude_defaults=True) if model.launch else {}
        )
        if policy == "static" and said.get("kv_cache_memory_bytes"):  # such a server has what it started with
            said["kv_cache_memory_bytes"] //= max(
                (len(g.models) for g in tables.gpus if model.name in g.models), default=1
            )
        if said.get("model_path"):
            said["model_path"] = tables.launched(n)[1].model_path
        if said["kind"] == "emulator" and speed != 1.0:
            said["args"] = [*said.get("args", []), "--speed", f"{speed:g}"]
        lines += ["[model.launch]", *_keys(said)]
    into.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _keys(said: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in said.items()]


def emulated(fleet: Path, *, runs: int, seed: int, speed: float = 1.0) -> Bed:
    """Emulated GPUs."""
    return Bed(
        engine="emulator",
        label="emulated",
        fleet=fleet,
        workload=workload_of(sim_fleet(fleet, speed), runs=runs, seed=seed, speed=speed),
        sim=lambda file, _policy, _moves: sim_fleet(file, speed),
        speed=speed,
        arrivals_per_s=RUNS_PER_S * speed,
    )


# -- memory and moves ----------------------------------------------------------------------------------------------------
@dataclass(kw_only=True)
class Watch:
    """What nodes and emulated GPUs say while a workload is played."""

    reports: int = 0
    #: Instants at which more memory was taken than there is, by the nodes' own ledgers, in words.
    over: list[str] = field(default_factory=list[str])
    #: The largest share of a GPU that was ever taken.
    peak: float = 0.0
    moves: dict[tuple[str, float], Move] = field(default_factory=dict[tuple[str, float], Move])
    gpu_of: dict[str, str] = field(default_factory=dict[str, str])
    levels: Counter[str] = field(default_factory=Counter[str])
    preempted: Counter[str] = field(default_factory=Counter[str])
    #: Emulated GPU's process -> what it counted last.
    gpus: dict[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])
    _last: dict[str, int] = field(default_factory=dict[str, int])
    _told_at_s: dict[str, float] = field(default_factory=dict[str, float])

    def hear(self, report: NodeReport) -> None:
        """Check a report, and take down its moves; the same report twice is one."""
        if self._told_at_s.get(report.node_id) == report.at_s:
            return
        self._told_at_s[report.node_id] = report.at_s
        self.reports += 1
        for gpu in report.gpus:
            self.peak = max(self.peak, gpu.held_bytes / gpu.usable_bytes)
            self.levels[gpu.level] += 1
            if gpu.held_bytes > gpu.usable_bytes:
                self.over.append(f"{gpu.gpu_id}: {gpu.held_bytes} of {gpu.usable_bytes} bytes at {report.at_s:.2f}")
            here = [e for e in report.engines if e.gpu_id == gpu.gpu_id and "gpu" in {e.tier, e.to}]
            fixed = sum(e.hbm_bytes + (e.kv_bytes if e.elastic == "accounted" else e.kv_floor_bytes) for e in here)
            if fixed > gpu.usable_bytes:
                self.over.append(f"{gpu.gpu_id}: {', '.join(e.spec.engine_id for e in here)} need {fixed} bytes")
        asleep = sum(e.weight_bytes for e in report.engines if "sleeping" in {e.tier, e.to})
        if asleep > report.ram_bytes:
            self.over.append(f"{report.node_id}: {asleep} of {report.ram_bytes} bytes of host memory")
        for e in report.engines:
            name = e.spec.engine_id
            self.gpu_of[name] = e.gpu_id
            if e.preemptions >= 0:
                before = self._last.get(name, 0)
                self.preempted[name] += e.preemptions - before if e.preemptions >= before else e.preemptions
                self._last[name] = e.preemptions
        for move in report.moves:
            self.moves[move.engine_id, move.began_at_s] = move

    @property
    def violations(self) -> int:
        """Instants at which an emulated GPU had more mapped than it has; moves that it had to refuse."""
        return sum(int(g["violations"]) + int(g["refused"]) for g in self.gpus.values())


async def _watch(queue: RedisQueue, watch: Watch, nodes: Sequence[Path]) -> None:
    """Look at reports and at emulated GPUs until cancelled."""
    looked_s = -math.inf
    while True:
        with contextlib.suppress(MaestroError):
            for report in await queue.reports(await queue.server_time_s()):
                watch.hear(report)
        if time.monotonic() - looked_s >= 1.0:
            looked_s = time.monotonic()
            await _count(watch, nodes)
        await asyncio.sleep(LOOK_S)


async def _count(watch: Watch, nodes: Sequence[Path]) -> None:
    """Ask emulated GPUs how often they were asked for more than they have."""
    for node in nodes:
        watch.gpus |= await states(node)


# -- both plays ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One policy, live and simulated."""

    policy: str
    live: Played
    simulated: Played
    #: Of each play.
    events: Mapping[str, Sequence[Event]]
    moves: Sequence[Mapping[str, Any]]
    checks: Mapping[str, Any]


async def _live(
    stack: Stack, bed: Bed, alone_s: Mapping[str, float], look: Callable[[], None]
) -> tuple[Played, list[Event], Live, Watch, Mapping[str, Any]]:
    queue = RedisQueue(stack.redis_url, pool=stack.fleet.pool)
    watch = Watch()
    nodes = [stack.logs / "nodes" / node_id for node_id in stack.fleet.nodes]
    looking = asyncio.create_task(_watch(queue, watch, nodes))
    live = Live(bed.workload, lambda run: alone_s[run.run_id])
    for model in bed.warm:
        await live.warm(model)
    began_s = time.perf_counter()
    try:
        await live.play(look)
        wall_s = time.perf_counter() - began_s
        ledger = await settled(queue)
        await _count(watch, nodes)
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await queue.close()
    events = sorted([*live.events, *_tiers(watch, live.began_at_s)], key=lambda e: e[1])
    events = [*(e for e in events if e[0] != "close"), *(e for e in events if e[0] == "close")]
    played = counted(bed.workload, events, wall_s, preemptions=sum(watch.preempted.values()))
    return played, events, live, watch, ledger


def _tiers(watch: Watch, began_at_s: float) -> list[Event]:
    """Moves as the simulator tells of them, those of the play that succeeded."""
    return [
        (
            "tier",
            m.began_at_s - began_at_s,
            watch.gpu_of[m.engine_id],
            _model(m.engine_id, watch),
            m.was,
            m.to,
            m.began_at_s - began_at_s + m.took_s,
        )
        for m in watch.moves.values()
        if m.began_at_s >= began_at_s and not m.error
    ]


def _model(engine_id: str, watch: Watch) -> str:
    return engine_id.removesuffix(f".{watch.gpu_of[engine_id]}")


def trial(bed: Bed, policy: str, folder: Path, look: Callable[[], None]) -> Trial:
    """Play a workload under one policy, live and in the simulator."""
    fleet_file = folder / "fleet.toml"
    write_start(bed.fleet, fleet_file, policy=policy, speed=bed.speed)
    _, events = simulated(bed.workload, bed.sim(fleet_file, policy, ()), policy)
    alone_s = {e[2]: e[9] for e in events if e[0] == "run"}
    notes: list[str] = []
    with Stack(load_fleet(fleet_file), policy=policy, logs=folder, keep=False, notice=notes.append) as stack:
        Client.configure(redis_url=stack.redis_url, pool=stack.fleet.pool, max_wait_s=WAIT_S)
        try:
            played, events, live, watch, ledger = asyncio.run(_live(stack, bed, alone_s, look))
        finally:
            Client.reset()
    moves = sorted(watch.moves.values(), key=lambda m: m.began_at_s)
    sim, sim_events = simulated(bed.workload, bed.sim(fleet_file, policy, moves), policy)
    return Trial(
        policy=policy,
        live=played,
        simulated=sim,
        events={"live": events, "simulated": sim_events},
        moves=[
            {**dataclasses.asdict(m), "gpu": watch.gpu_of[m.engine_id], "at_s": m.began_at_s - live.began_at_s}
            for m in moves
        ],
        checks={
            "reports": watch.reports,
            "over": watch.over,
            "violations": watch.violations,
            "peak": watch.peak,
            "levels": dict(watch.levels),
            "gpus": [
                {k: g[k] for k in ("gpu", "usable_bytes", "peak_bytes", "refused", "violations")}
                for g in watch.gpus.values()
            ],
            "failed": live.failed,
            "reserved_at_end": ledger["reserved"],
            "ledger_zero_after_s": ledger["after_s"],
            "notes": notes,
        },
    )


def run(
    bed: Bed,
    policies: Sequence[str],
    *,
    seed: int,
    events_out: Path | None = None,
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Play all policies in turn, each on a fresh stack. ``look`` is called whenever a run has ended live."""
    workload = bed.workload
    done: list[Trial] = []
    for policy in policies:
        with TemporaryDirectory(prefix="maestro-place-") as folder:
            done.append(trial(bed, policy, Path(folder), look))
    if events_out is not None:
        write_lines(events_out, (line for each in done for line in _lines(each, workload, seed)))
    tables = load_tables(bed.fleet)
    return {
        "label": bed.label,
        "engine": bed.engine,
        "workload": {
            "name": workload.name,
            "source": workload.source,
            "runs": len(workload.runs),
            "stages": sum(len(r.stages) for r in workload.runs),
            "by_model": dict(sorted(Counter(s.model for r in workload.runs for s in r.stages).items())),
            "arrivals_per_s": bed.arrivals_per_s,
        },
        "fleet": {
            "name": bed.fleet.name,
            "models": len(tables.models),
            "static": {gpu: tables.gpus[p.table].models for p in tables.places for gpu in p.gpus},
        },
        "seed": seed,
        "speed": bed.speed,
        "policies": list(policies),
        "rows": [
            row for each in done for row in rows(each.policy, {"live": each.live, "simulated": each.simulated}, seed)
        ],
        "difference": {each.policy: difference(each.live, each.simulated) for each in done},
        "moves": {each.policy: list(each.moves) for each in done},
        "checks": {each.policy: dict(each.checks) for each in done},
    }


def _lines(trial: Trial, workload: Workload, seed: int) -> Iterable[Any]:
    """As `maestro simulate --events-out` writes them."""
    for played, events in trial.events.items():
        head: dict[str, Any] = {"maestro_events": 1, "policy": trial.policy, "played": played, "seed": seed}
        head |= {"workload": workload.name, "warmup_s": workload.warmup_s, "window_s": workload.window_s}
        yield head | {"horizon_s": workload.horizon_s, "fields": EVENTS}
        yield from events


# -- told ------------------------------------------------------------------------------------------------------------------
def show(found: Mapping[str, Any]) -> None:
    """The simulator's table, a live and a simulated row for each policy; what differs; what was checked."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table = Table(box=SIMPLE_HEAD, title=f"{found['workload']['name']} on {found['fleet']['name']}: {found['label']}")
    heads = (HEAD[0], "played", *HEAD[2:-1], "sleep")
    for name in heads:
        table.add_column(name, justify="left" if name in {"policy", "played"} else "right", no_wrap=True)
    for row in found["rows"]:
        shown = cells(row)
        table.add_row(
            shown[0], row["played"], *shown[2:-1], f"{row['sleeps']:.0f}", end_section=row["played"] != "live"
        )
    console.print(table)
    console.print("Live less simulated: the cost of the real scheduler, Redis and clocks.")
    for policy, off in found["difference"].items():
        said = ", ".join(f"{name} {_signed(off[key], form)}" for name, key, form in _OFF)
        console.print(f"  {policy}: {said}", markup=False)
    for policy, checks in found["checks"].items():
        moved = [m for m in found["moves"][policy] if not m["error"]]
        console.print(
            f"  {policy}: {len(moved)} moves in {sum(m['took_s'] for m in moved):.0f} s, "
            f"{sum(m['moved_bytes'] for m in moved) / 1e9:.0f} GB; {checks['reports']} reports, over-commits {len(checks['over'])}, "
            f"violations of emulated GPUs {checks['violations']}, at most {checks['peak']:.1%} of a GPU taken; runs that broke "
            f"{len(checks['failed'])}",
            markup=False,
        )
    console.print(
        f"Workload: {found['workload']['source']}. Seconds are as played, at speed {found['speed']:g}.", markup=False
    )


_OFF: Final = (
    ("SLO points", "slo", ".1%"),
    ("run p50 s", "completion_p50_s", ".1f"),
    ("run p95 s", "completion_p95_s", ".1f"),
    ("delay mean s", "delay_interactive_mean_s", ".2f"),
    ("cold starts", "cold_starts", ".0f"),
    ("wakes", "wakes", ".0f"),
    ("sleeps", "sleeps", ".0f"),
)


def _signed(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:+{form}}"
