"""A play to look at: a trace in Chrome's JSON format, which https://ui.perfetto.dev opens.

Each engine is a process: its stages are slices on as many lanes as it serves at once (grant to end; inside: in the engine's queue,
prefill, decode), and two counters say how many bytes of KV are reserved and used there. A GPU on which models come and go is one
more, with a lane for each model's moves. The process `runs` holds each run from its arrival to its end, and how many stages wait. Written as it happens: memory is what is in flight.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from maestro_agents.simulator.world import Event

_RUNS: Final = 1
"""The process of runs and queue; engines follow."""

_GROWTH: Final = (0.125, 0.375, 0.625, 0.875)
"""Where between first token and last the KV in use goes up by a quarter of the answer."""

_dump: Final = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(slots=True, eq=False)
class _Engine:
    pid: int
    lanes: int = 0
    free: list[int] = field(default_factory=list[int])
    reserved: int = 0
    used: int = 0
    #: Stage -> when it was granted, in this order.
    granted: dict[str, float] = field(default_factory=dict[str, float])
    #: (when, bytes) by which the KV in use changes, until nothing earlier can come.
    changes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])


@dataclass(slots=True, eq=False)
class _Stage:
    run: str
    role: str
    ready_s: float
    granted_s: float = 0.0
    engine: str = ""
    lane: int = 0
    kv_bytes: int = 0


class Perfetto:
    """Give every event of a play to `take`, then `close`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._first = True
        self._engines: dict[str, _Engine] = {}
        self._stages: dict[str, _Stage] = {}
        self._runs: dict[str, str] = {}
        #: (GPU, model) -> process, lane.
        self._moves: dict[tuple[str, str], tuple[int, int]] = {}
        self._processes = _RUNS
        self._waiting = 0
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        self._write("M", _RUNS, 0.0, "process_name", args={"name": "runs"})

    def take(self, e: Event) -> None:
        """Write what an event adds."""
        match e[0]:
            case "run":
                _, at_s, run, app, service_class, tenant, deadline_at_s, stages, *_ = e
                self._runs[run] = app
                args = {"run": run, "class": service_class, "tenant": tenant, "stages": stages}
                self._run("b", at_s, run, args | {"deadline_s": deadline_at_s - at_s})
            case "done":
                self._run("e", e[1], e[2], {})
                del self._runs[e[2]]
            case "ready":
                self._stages[e[2]] = _Stage(e[3], e[4], e[1])
                self._queue(e[1], 1)
            case "grant":
                self._grant(e)
            case "extend":
                stage = self._stages[e[2]]
                self._reserve(e[1], self._engines[stage.engine], e[3] - stage.kv_bytes)
                stage.kv_bytes = e[3]
            case "end":
                self._end(e)
            case "requeue":
                self._leave(e[1], e[2], "lost with its engine", {})
                self._queue(e[1], 1)
            case "refuse":
                del self._stages[e[2]]
                self._queue(e[1], -1)
            case "tier":
                self._move(e)
            case "close":
                for stage_id in [s for s, stage in self._stages.items() if stage.engine]:
                    self._leave(e[1], stage_id, "still running", {})
                for run in self._runs:
                    self._run("e", e[1], run, {})
                for engine in self._engines.values():
                    self._used_until(engine, e[1])
            case _:
                pass

    def close(self) -> None:
        """Write the end."""
        self._file.write("\n]}\n")

    # -- parts -----------------------------------------------------------------------------------------------------------
    def _write(self, ph: str, pid: int, at_s: float, name: str, **more: Any) -> None:
        self._file.write(
            ("" if self._first else ",\n")
            + _dump({"ph": ph, "pid": pid, "ts": round(at_s * 1e6, 3), "name": name, **more})
        )
        self._first = False

    def _process(self, name: str) -> int:
        self._processes += 1
        self._write("M", self._processes, 0.0, "process_name", args={"name": name})
        return self._processes

    def _run(self, ph: str, at_s: float, run: str, args: dict[str, Any]) -> None:
        self._write(ph, _RUNS, at_s, self._runs[run], cat="run", id=run, tid=0, args=args)

    def _queue(self, at_s: float, more: int) -> None:
        self._waiting += more
        self._write("C", _RUNS, at_s, "stages that wait", args={"stages": self._waiting})

    def _reserve(self, at_s: float, engine: _Engine, more: int) -> None:
        engine.reserved += more
        self._write("C", engine.pid, at_s, "KV reserved", args={"bytes": engine.reserved})

    def _move(self, e: Event) -> None:
        _, at_s, gpu, model, from_, to, ready_at_s = e
        if (gpu, model) not in self._moves:
            beside = [place for (other, _), place in self._moves.items() if other == gpu]
            pid = beside[0][0] if beside else self._process(f"GPU {gpu}")
            self._moves[gpu, model] = pid, len(beside)
            self._write("M", pid, 0.0, "thread_name", tid=len(beside), args={"name": model})
        pid, lane = self._moves[gpu, model]
        self._write("X", pid, at_s, f"{from_} to {to}", tid=lane, dur=round((ready_at_s - at_s) * 1e6, 3))

    def _grant(self, e: Event) -> None:
        _, at_s, stage_id, name, kv_bytes = e
        stage = self._stages[stage_id]
        engine = self._engines.get(name)
        if engine is None:
            engine = self._engines[name] = _Engine(self._process(name))
        if not engine.free:
            engine.free.append(engine.lanes)
            engine.lanes += 1
        stage.granted_s, stage.engine, stage.lane, stage.kv_bytes = at_s, name, heapq.heappop(engine.free), kv_bytes
        engine.granted[stage_id] = at_s
        self._queue(at_s, -1)
        self._reserve(at_s, engine, kv_bytes)

    def _leave(self, at_s: float, stage_id: str, how: str, args: dict[str, Any]) -> _Engine:
        """Write a stage's slice, and free its lane."""
        stage = self._stages[stage_id]
        engine = self._engines[stage.engine]
        told = {"stage": stage_id, "run": stage.run, "waited_s": round(stage.granted_s - stage.ready_s, 6), "end": how}
        self._slice(engine, stage.lane, stage.role, stage.granted_s, at_s, told | args)
        heapq.heappush(engine.free, stage.lane)
        del engine.granted[stage_id]
        self._reserve(at_s, engine, -stage.kv_bytes)
        stage.engine, stage.kv_bytes, stage.ready_s = "", 0, at_s
        return engine

    def _slice(
        self, engine: _Engine, lane: int, name: str, from_s: float, to_s: float, args: dict[str, Any] | None = None
    ) -> None:
        if to_s > from_s or args:
            more = {"args": args} if args else {}
            self._write("X", engine.pid, from_s, name, tid=lane, dur=round((to_s - from_s) * 1e6, 3), **more)

    def _end(self, e: Event) -> None:
        _, at_s, stage_id, _, started_s, first_s, ended_s, prompt, output, cached, preemptions, token_bytes = e
        stage = self._stages[stage_id]
        told = {"prompt_tokens": prompt, "output_tokens": output, "cached_tokens": cached, "preemptions": preemptions}
        granted_s, lane = stage.granted_s, stage.lane
        engine = self._leave(at_s, stage_id, "done", told)
        del self._stages[stage_id]
        self._slice(engine, lane, "engine's queue", granted_s, started_s)
        self._slice(engine, lane, "prefill", started_s, first_s)
        self._slice(engine, lane, "decode", first_s, ended_s)
        quarter = output * token_bytes // len(_GROWTH)
        heapq.heappush(engine.changes, (started_s, prompt * token_bytes))
        for share in _GROWTH:
            heapq.heappush(engine.changes, (first_s + share * (ended_s - first_s), quarter))
        heapq.heappush(engine.changes, (ended_s, -prompt * token_bytes - len(_GROWTH) * quarter))
        self._used_until(engine, next(iter(engine.granted.values()), at_s))

    def _used_until(self, engine: _Engine, at_s: float) -> None:
        while engine.changes and engine.changes[0][0] <= at_s:
            moment, more = heapq.heappop(engine.changes)
            engine.used += more
            self._write("C", engine.pid, moment, "KV used", args={"bytes": engine.used})
