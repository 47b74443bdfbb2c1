"""What `maestro simulate` plays: workloads by seed and load on a fleet, and the loads measured against what the fleet can do.

**Load** is offered work over the throughput of the same fleet when it is saturated under FCFS (`saturated_work_per_s`). A workload
file keeps its runs, and its arrivals are stretched to the load (warm-up and window along with them). Of a trace a workload is
composed for every load, so that the window stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import gzip
import io
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from maestro_agents.cli.simulate.own import own_policy
from maestro_agents.errors import ConfigError
from maestro_agents.policy import POLICIES, Knows, Policy
from maestro_agents.simulator.compose import (
    MAX_MODEL_TOKENS,
    MIXES,
    Arrivals,
    Burst,
    bent,
    compose,
    flooded,
    read_arrivals,
)
from maestro_agents.simulator.foresight import read_foreseen
from maestro_agents.simulator.hardware import SimCluster, SimEngine, SimFleet, gpus, load_sim_fleet, models, serve
from maestro_agents.simulator.perfetto import Perfetto
from maestro_agents.simulator.score import Score
from maestro_agents.simulator.sessions import Foresight, Session, sessions
from maestro_agents.simulator.workload import Stage, Workload, kind_of, read, sample, stretched, work_s
from maestro_agents.simulator.world import EVENTS, Event, Outage, World

MEAN_LOAD: Final = 0.8
"""Of a workload with bursts."""

BURST_S: Final = 600.0
BURST_EVERY_S: Final = 3600.0
"""Bursts of ten minutes, one an hour, or one in a shorter window, of which it takes a sixth."""

MAX_PILOT_RUNS: Final = 200_000
_PILOT_RUNS: Final = 256
_PILOT_RUNS_PER_SLOT: Final = 6
_SATURATED_SHARE: Final = 0.8
"""Of a model's work, what has to be done while its stages wait: beginning and end are then of little weight."""

_STAGGER_S: Final = 0.001


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the command line names. Every process reads it for itself."""

    #: None: the one that comes with the package.
    workload: Path | None
    #: None: four A100 with an 8B model for each model of the workload.
    fleet: Path | None = None
    mix: str = "everything"
    arrivals: Path | None = None
    window_s: float = 3600.0
    #: What `foresight.write_foreseen` wrote.
    foreseen: Path | None = None
    #: Weights of the tenants' fair shares.
    tenants: tuple[tuple[str, float], ...] = ()
    #: A tenant that sends so many times its runs, beyond the load.
    flood: tuple[str, int] | None = None
    outages: tuple[Outage, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Play:
    """One play: a policy, a load and a seed."""

    policy: str
    load: float
    seed: int
    #: To which load bursts go; 0: there is none.
    burst: float = 0.0
    #: What the fleet does when saturated (`saturated_work_per_s`).
    work_per_s: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Played:
    """What came of it."""

    figures: Mapping[str, float]
    tenants: Mapping[str, Mapping[str, float]]
    warmup_s: float
    window_s: float
    horizon_s: float
    #: How long the play took here.
    wall_s: float


# -- what is played ------------------------------------------------------------------------------------------------------
def policy_of(name: str) -> Policy:
    """By its name, with ``-oracle`` behind it where it knows the truth, or a user's own (``FILE.py:order``).

    Raises `ConfigError` where there is none.
    """
    if name in POLICIES:
        return POLICIES[name]
    if (known := POLICIES.get(name.removesuffix("-oracle"))) is not None:
        return dataclasses.replace(known, knows=Knows.ALL)
    if ":" in name or name.endswith(".py"):
        return own_policy(name)
    raise ConfigError(
        f"there is no policy {name!r}: name one of {', '.join(POLICIES)}, or your own as my_file.py:order"
    )


def known_mix(name: str) -> str:
    """The name itself. Raises `ConfigError` where there is no such mix."""
    if name not in MIXES:
        raise ConfigError(f"--mix {name!r}: take one of {', '.join(MIXES)}")
    return name


@functools.lru_cache(maxsize=4)
def fleet_of(given: Given) -> SimFleet:
    """The fleet. Raises `ConfigError`, also where no engine runs at the start."""
    if given.fleet is None:
        alone = serve(models()["llama-3.1-8b"], gpus()["a100-80g"], slots=24)
        return SimFleet(
            clusters={"local": SimCluster(name="local")},
            engines=tuple(
                SimEngine(spec=alone.spec(f"{name}.{n}", model=name), profile=alone.profile, gpus=(f"{name}.{n}",))
                for name in sorted(_models_of(_source(given)))
                for n in range(4)
            ),
        )
    fleet = load_sim_fleet(given.fleet)
    if not fleet.engines:
        raise ConfigError(f"{given.fleet}: no model runs at the start: name some under [[gpu]] models")
    return fleet


def longest_of(fleet: SimFleet) -> dict[str, int]:
    """Each model that the fleet runs or may bring, and the longest prompt and answer that all of its engines take."""
    found: dict[str, int] = {}
    for name, model in fleet.models.items():
        for kind in sorted({gpu.kind for gpu in fleet.gpus.values()}):
            with contextlib.suppress(ConfigError):  # it does not fit this kind
                most = model.on(gpus()[kind]).profile.max_model_len
                found[name] = min(found.get(name, most), most)
    for e in fleet.engines:
        found[e.spec.model] = min(found.get(e.spec.model, e.profile.max_model_len), e.profile.max_model_len)
    return found


@dataclass(frozen=True)
class _Trace:
    recorded: tuple[Session, ...]
    arrivals: Arrivals | None
    foreseen: Foresight | None


@functools.lru_cache(maxsize=2)
def _source(given: Given) -> Workload | _Trace:
    if given.workload is None:
        return sample()
    if kind_of(given.workload) == "workload":
        return read(given.workload)
    recorded = tuple(sessions(given.workload))
    foreseen = read_foreseen(given.foreseen, recorded) if given.foreseen else None
    return _Trace(recorded, read_arrivals(given.arrivals) if given.arrivals else None, foreseen)


def _models_of(source: Workload | _Trace) -> set[str]:
    """Those that a workload names; a composed one takes those of the fleet."""
    return {s.model for run in source.runs for s in run.stages} if isinstance(source, Workload) else {"small"}


def check(given: Given) -> Workload | None:
    """Read all that is named, and see that it goes together; return the workload where it is one. Raises `ConfigError`."""
    source, fleet = _source(given), fleet_of(given)
    for outage in given.outages:
        if outage.cluster not in fleet.clusters:
            raise ConfigError(
                f"--outage: there is no cluster {outage.cluster!r}, only {', '.join(sorted(fleet.clusters))}"
            )
    if not isinstance(source, Workload):
        return None
    longest = longest_of(fleet)
    if missing := sorted(_models_of(source) - set(longest)):
        raise ConfigError(
            f"{given.fleet}: the workload's model{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} run nowhere in this "
            f"fleet, which has {', '.join(sorted(longest))}: add [[model]] with that name, and name it in a [[gpu]]"
        )
    for run in source.runs:
        for stage in run.stages:
            if stage.prompt_tokens + stage.output_tokens > longest[stage.model]:
                raise ConfigError(
                    f"run {run.run_id} has a call of {stage.prompt_tokens + stage.output_tokens} tokens, {stage.model} takes "
                    f"{longest[stage.model]} on this fleet: compose it with --max-model-tokens, or give the model more GPUs"
                )
            if min(stage.prompt_tokens, stage.output_tokens) < 1:
                raise ConfigError(f"run {run.run_id} has a call without a prompt or answer: both have a token at least")
    return source


def _composed(given: Given, trace: _Trace, seed: int, count: int) -> Workload:
    longest = longest_of(fleet_of(given))
    return compose(
        trace.recorded,
        mix=MIXES[given.mix],
        rate_per_s=count / given.window_s,
        seed=seed,
        name=given.mix,
        trace=given.workload.name if given.workload else "",
        arrivals=trace.arrivals,
        window_s=given.window_s,
        models=list(longest),
        max_model_tokens=min(MAX_MODEL_TOKENS, *longest.values()),
        foreseen=trace.foreseen,
    )


def shuffled(workload: Workload, seed: int) -> Workload:
    """The same runs in another order at the same moments; seed 0: as they are."""
    if not seed:
        return workload
    order = random.Random(f"{seed} order").sample(workload.runs, len(workload.runs))
    return dataclasses.replace(
        workload,
        runs=tuple(dataclasses.replace(run, at_s=at.at_s) for run, at in zip(order, workload.runs, strict=True)),
        source=f"{workload.source}; order of seed {seed}",
    )


@functools.lru_cache(maxsize=2)
def workload_of(given: Given, seed: int, load: float, burst: float, work_per_s: float) -> Workload:
    """A workload of exactly that load. Raises `ConfigError`."""
    source = _source(given)
    if isinstance(source, Workload):
        found = shuffled(source, seed)
    else:
        pilot = _composed(given, source, seed, _PILOT_RUNS)
        each = _work(pilot) / len(pilot.runs)
        found = _composed(given, source, seed, max(1, round(load * work_per_s * given.window_s / each)))
    found = stretched(found, _work(found) / found.window_s / (load * work_per_s))
    found = _with_bursts(found, burst / load) if burst else found
    return flooded(found, *given.flood, seed) if given.flood else found


def _with_bursts(workload: Workload, factor: float) -> Workload:
    """The same runs, in bursts of ``factor`` times the window's mean."""
    window_s = workload.window_s
    for_s = min(BURST_S, window_s / 6)
    number = max(1, int(window_s / BURST_EVERY_S))
    every_s = window_s / number
    bend = bent(window_s, [Burst(at_s=every_s * (n + 0.5), for_s=for_s, factor=factor) for n in range(number)])
    return dataclasses.replace(
        workload,
        runs=tuple(
            dataclasses.replace(run, at_s=min(bend(run.at_s / window_s), math.nextafter(window_s, 0.0)))
            for run in workload.runs
        ),
        source=f"{workload.source}; {number} x {for_s:g} s at {factor:g} times the mean",
    )


def _work(workload: Workload) -> float:
    return sum(work_s(run.stages) for run in workload.runs)


# -- what the fleet can do -----------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=64)
def saturated_work_per_s(given: Given, seed: int) -> float:
    """Work (`workload.work_s`) that the fleet does in a second under FCFS while stages wait: every run is there from the start.

    First come is by run: by stage, all runs would go on in turn and find their prefixes gone, the more of them the longer the
    queue, so that the figure were one of the queue and not of the fleet. With several models,
    the work in all at which the first of them is saturated. As many runs are played as keep stages waiting for most of the work
    (`_SATURATED_SHARE`). Raises `ConfigError` where `MAX_PILOT_RUNS` do not.
    """
    source = _source(given)
    base = shuffled(source, seed).runs if isinstance(source, Workload) else ()
    if isinstance(source, Workload) and not base:
        raise ConfigError(f"{given.workload} has no run")
    count = max(_PILOT_RUNS, _PILOT_RUNS_PER_SLOT * sum(e.spec.slots for e in fleet_of(given).engines))
    while count <= MAX_PILOT_RUNS:
        if isinstance(source, Workload):
            runs = [dataclasses.replace(base[n % len(base)], run_id=str(n)) for n in range(count)]
        else:
            runs = _composed(given, source, seed, count).runs
        at_once = Workload(
            name="saturated",
            runs=tuple(dataclasses.replace(r, at_s=_STAGGER_S * (n + 1)) for n, r in enumerate(runs)),
            warmup_s=0.0,
            window_s=_STAGGER_S * (len(runs) + 2),
            horizon_s=1e12,
        )
        seen = _Saturation(at_once)
        World(at_once, fleet_of(given), POLICIES["fcfs-run"], tell=seen.take).play()
        if (found := seen.work_per_s()) is not None:
            return found
        count *= 2
    raise ConfigError(
        f"{MAX_PILOT_RUNS:,} runs at once do not saturate this fleet, so there is no load to measure by: take a smaller fleet"
    )


class _Saturation:
    """How much work is done while stages wait, by model."""

    def __init__(self, workload: Workload) -> None:
        self._runs = {run.run_id: run.stages for run in workload.runs}
        self._asked: defaultdict[str, float] = defaultdict(float)
        for run in workload.runs:
            for stage in run.stages:
                self._asked[stage.model] += work_s((stage,))
        self._waiting: defaultdict[str, int] = defaultdict(int)
        self._since_s: dict[str, float] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._done: defaultdict[str, float] = defaultdict(float)

    def take(self, e: Event) -> None:
        if e[0] == "ready":
            model = e[5]
            if not self._waiting[model]:
                self._since_s[model] = e[1]
            self._waiting[model] += 1
        elif e[0] in {"grant", "refuse"}:
            model = self._stage(e[2]).model
            self._waiting[model] -= 1
            if not self._waiting[model]:
                self._seconds[model] += e[1] - self._since_s[model]
        elif e[0] == "end":
            stage = self._stage(e[2])
            if self._waiting[stage.model]:
                self._done[stage.model] += work_s((stage,))

    def _stage(self, stage_id: str) -> Stage:
        run_id, _, number = stage_id.rpartition(".")
        return self._runs[run_id][int(number)]

    def work_per_s(self) -> float | None:
        """None where no model was saturated for `_SATURATED_SHARE` of its work."""
        total = sum(self._asked.values())
        return min(
            (
                self._done[model] / self._seconds[model] * total / asked
                for model, asked in self._asked.items()
                if self._done[model] >= _SATURATED_SHARE * asked > 0
            ),
            default=None,
        )


# -- playing -------------------------------------------------------------------------------------------------------------
def played(given: Given, play: Play, events_out: Path | None = None, trace_out: Path | None = None) -> Played:
    """Play it and count. ``events_out``: its events as JSON lines, behind a line that says what they are."""
    workload = workload_of(given, play.seed, play.load, play.burst, play.work_per_s)
    score = Score(window_s=workload.window_s)
    with contextlib.ExitStack() as stack:
        takes: list[Callable[[Event], None]] = [score.take]
        if events_out:
            takes.append(stack.enter_context(_events_to(events_out, workload, play)))
        if trace_out:
            perfetto = Perfetto(stack.enter_context(_opened(trace_out)))
            stack.callback(perfetto.close)
            takes.append(perfetto.take)
        tell = takes[0] if len(takes) == 1 else functools.partial(_to_all, takes)
        if given.tenants:
            workload = dataclasses.replace(workload, tenants=dict(given.tenants))
        world = World(
            workload,
            fleet_of(given),
            policy_of(play.policy),
            tell=tell,
            outages=given.outages,
        )
        gc.collect()
        gc.freeze()  # what stays is not looked through again and again
        began_s = time.perf_counter()
        try:
            world.play()
        finally:
            gc.unfreeze()
        wall_s = time.perf_counter() - began_s
    return Played(
        figures=score.figures(),
        tenants=score.tenants(),
        warmup_s=workload.warmup_s,
        window_s=workload.window_s,
        horizon_s=workload.horizon_s,
        wall_s=wall_s,
    )


def _to_all(takes: Sequence[Callable[[Event], None]], event: Event) -> None:
    for take in takes:
        take(event)


@contextlib.contextmanager
def _events_to(path: Path, workload: Workload, play: Play) -> Iterator[Callable[[Event], None]]:
    head: dict[str, Any] = {"maestro_events": 1, "policy": play.policy, "load": play.load, "burst": play.burst}
    head |= {"seed": play.seed, "workload": workload.name, "warmup_s": workload.warmup_s}
    head |= {"window_s": workload.window_s, "horizon_s": workload.horizon_s, "fields": EVENTS}
    dump = json.JSONEncoder(separators=(",", ":")).encode
    with _opened(path) as file:
        file.write(dump(head) + "\n")

        def take(event: Event) -> None:
            file.write(dump(event) + "\n")

        yield take


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Write text; gzipped, without a date, where the name says so."""
    if ".gz" not in path.suffixes:
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=3) as zipped,
        io.TextIOWrapper(zipped, encoding="utf-8") as file,
    ):
        yield file
