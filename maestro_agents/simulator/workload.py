"""A workload: which runs arrive when, what each of their stages costs, and by when they must have ended. All of it fixed.

A file of JSON lines (gzip by its name): a header, then a run a line (`write`, `read`). What a policy may know beforehand is in
it too: what a predictor that never saw the task said of each stage (`Stage.foreseen`).
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final, Literal, cast

from maestro_agents.core import ServiceClass
from maestro_agents.errors import ConfigError
from maestro_agents.predict.roles import Estimate

FORMAT: Final = 1
"""Of the files; a newer one is refused."""

Kind = Literal["workload", "sessions", "calls"]

_MAGIC: Final = "maestro_workload"
_TENANT: Final = "default"
_CLASSES: Final = {c.value: c for c in ServiceClass}


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreseen:
    """What was predicted of a stage before it ran, in tokens; of the run after it, in the words of `workflow.Remaining`."""

    output_tokens_mean: float
    output_tokens_p50: float
    output_tokens_p90: float
    output_tokens_p99: float
    basis: str = "prior"
    stages: float = 0.0
    output_tokens: float = 0.0
    prompt_tokens: float = 0.0
    tool_s: float = 0.0
    ends_p: float = 0.0

    @property
    def estimate(self) -> Estimate:
        """Of the stage alone."""
        return Estimate(
            mean=self.output_tokens_mean, p50=self.output_tokens_p50, p90=self.output_tokens_p90, p99=self.output_tokens_p99,
            basis=self.basis,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One LLM call of a run."""

    #: Agent and node, e.g. ``moatless_v2:agent``.
    role: str
    model: str
    prompt_tokens: int
    output_tokens: int
    #: Stages of the same run, by number, that must have ended; none: it waits for the run's start alone.
    after: tuple[int, ...] = ()
    #: Seconds of tools and code between the last of those (or the run's start) and this one.
    gap_s: float = 0.0
    #: Its prompt begins with the first ``shared_tokens`` of prompt and answer of that stage of the run; -1: of none.
    shares: int = -1
    shared_tokens: int = 0
    #: Times that this role called before in its run.
    visit: int = 0
    foreseen: Foreseen | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One execution of a workflow."""

    run_id: str
    app: str
    #: The recorded session that it was made of.
    session: str
    #: Seconds after the workload's start.
    at_s: float
    service_class: ServiceClass
    #: Seconds from its arrival until it must have ended.
    deadline_s: float
    stages: tuple[Stage, ...]
    tenant: str = "default"
    #: Seconds of tools and code after its last stage.
    end_gap_s: float = 0.0

    def steps(self) -> list[int]:
        """Of each stage, the LangGraph superstep that it belongs to: one more than the latest of those it comes after."""
        steps: list[int] = []
        for stage in self.stages:
            steps.append(1 + max((steps[b] for b in stage.after), default=-1))
        return steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Runs in the order of their arrival, and how they are to be counted."""

    name: str
    runs: tuple[Run, ...]
    #: Runs that arrived before are played and not counted; every later arrival is.
    warmup_s: float
    #: No run arrives from here on.
    window_s: float
    #: Where play stops; what has not ended by then has missed its deadline.
    horizon_s: float
    #: Tenant -> weight of its fair share; one that is not named weighs 1.
    tenants: Mapping[str, float] = field(default_factory=dict[str, float])
    #: Where it came from: traces, arrivals, seed, how deadlines were set.
    source: str = ""

    def caps(self) -> dict[str, int]:
        """App -> the ``max_tokens`` that its owner would set: the power of two above its longest answer."""
        longest: defaultdict[str, int] = defaultdict(int)
        for run in self.runs:
            longest[run.app] = max(longest[run.app], *(s.output_tokens for s in run.stages))
        return {app: 1 << (tokens - 1).bit_length() for app, tokens in longest.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """An engine to measure by: one call at a time, nothing waiting, nothing batched."""

    name: str = "reference"
    prefill_s: float = 0.0001  #: a prompt token that is not cached
    decode_s: float = 0.02  #: an output token

    def call_s(self, stage: Stage) -> float:
        """Seconds of one call whose shared tokens are in the prefix cache."""
        return self.prefill_s * (stage.prompt_tokens - stage.shared_tokens) + self.decode_s * stage.output_tokens


_FORESEEN: Final = tuple(f.name for f in fields(Foreseen) if f.name != "basis")
REFERENCE: Final = Reference()


def work_s(stages: Iterable[Stage], reference: Reference = REFERENCE) -> float:
    """Seconds of calls in sum, tools left out: what these stages ask of engines."""
    return sum(map(reference.call_s, stages))


def unloaded_s(stages: Sequence[Stage], reference: Reference = REFERENCE) -> float:
    """Seconds from start to end where nothing ever waits: the critical path, gaps and calls together."""
    ends: list[float] = []
    for stage in stages:
        began = max((ends[i] for i in stage.after), default=0.0)
        ends.append(began + stage.gap_s + reference.call_s(stage))
    return max(ends, default=0.0)


def stretched(workload: Workload, factor: float) -> Workload:
    """The same runs with ``factor`` times the time between arrivals: the load divided by it. Bursts last longer, too.

    Warm-up and window grow along, deadlines and what is played after the window stay.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ConfigError(f"arrivals cannot be stretched by {factor}: the factor is a number above 0")
    return replace(
        workload,
        runs=tuple(replace(run, at_s=run.at_s * factor) for run in workload.runs),
        warmup_s=workload.warmup_s * factor,
        window_s=workload.window_s * factor,
        horizon_s=workload.horizon_s + workload.window_s * (factor - 1),
        source=f"{workload.source}; arrivals stretched by {factor:g}",
    )


def sample() -> Workload:
    """The workload that comes with the package: `maestro simulate` without a file plays it. `make sample` wrote it."""
    with as_file(files("maestro_agents.simulator") / "sample.jsonl.gz") as path:
        return read(path)


def kind_of(path: Path) -> Kind:
    """What a file holds, by its first line: a workload, or recorded calls (CSV or JSON lines). Raises `ConfigError`."""
    for _, line in lines_of(path):
        if not line.startswith("{"):
            columns = line.strip().split(",")
            if "session_id" in columns and "input_tokens" in columns:
                return "sessions"
            break
        if f'"{_MAGIC}"' in line:
            return "workload"
        if '"session_id"' in line:
            return "calls"
        break
    raise ConfigError(
        f"{path}, line 1 begins no workload and no trace: give what `maestro workload` wrote, a CSV of sessions "
        "(app,session_id,task_id,call_index,role,…) or calls as JSON lines"
    )


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Each line of a text file that is not blank, with its number. Gzip is told by the first bytes. Raises `ConfigError`."""
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8") if zipped else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: broken after line {number} ({e}): copy or write the file again") from e
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}. Name a workload or a trace") from e


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """Write a JSON line for each, whole or not at all; gzipped where the name ends in ``.gz``. The same lines, the same bytes.

    Raises `ConfigError` where the file cannot be written, or a number is not finite.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        data = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines).encode()
        part.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        os.replace(part, path)
    except ValueError as e:
        raise ConfigError(f"{path} is not written: a number in it is not finite ({e})") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror or e}") from e


def write(workload: Workload, path: Path) -> None:
    """Write a workload, whole or not at all; gzipped where the name ends in ``.gz``. The same workload, the same bytes.

    Runs that do the same stages (a session that was drawn again) hold them once. Raises `ConfigError` where the file cannot
    be written, or the workload could not be read again.
    """
    roles, models, bases = _Table(), _Table(), _Table()
    first: dict[tuple[Stage, ...], str] = {}
    body: list[dict[str, Any]] = []
    for run in workload.runs:
        entry: dict[str, Any] = {"id": run.run_id, "app": run.app, "session": run.session, "at": run.at_s}
        entry |= {"class": run.service_class.value, "deadline": run.deadline_s}
        if run.tenant != _TENANT:
            entry["tenant"] = run.tenant
        if run.end_gap_s:
            entry["end_gap"] = run.end_gap_s
        if (same := first.setdefault(run.stages, run.run_id)) != run.run_id:
            entry["as"] = same
        else:
            entry["stages"] = [_packed(s, roles, models, bases) for s in run.stages]
        body.append(entry)
    head = {
        _MAGIC: FORMAT,
        "name": workload.name,
        "warmup_s": workload.warmup_s,
        "window_s": workload.window_s,
        "horizon_s": workload.horizon_s,
        "tenants": dict(workload.tenants),
        "source": workload.source,
        "runs": len(workload.runs),
        "roles": list(roles),
        "models": list(models),
        "bases": list(bases),
    }
    write_lines(path, (head, *body))


def read(path: Path) -> Workload:
    """Read what `write` wrote. Raises `ConfigError` that names the line, what is wrong with it and what to do."""
    lines = lines_of(path)
    where = f"{path}, line 1"
    try:
        number, line = next(lines, (0, ""))
        if f'"{_MAGIC}"' not in line:
            raise ConfigError(f"{path} is no workload: make one of a trace with `maestro workload`")
        head = _Fields(line)
        version = head.count(_MAGIC)
        if version > FORMAT:
            raise ConfigError(
                f"{path} has format {version}, this version reads up to {FORMAT}: update maestro-agents, or compose it again"
            )
        found = Workload(
            name=head.text("name"),
            runs=(),
            warmup_s=head.number("warmup_s"),
            window_s=head.number("window_s"),
            horizon_s=head.number("horizon_s"),
            tenants=head.weights("tenants"),
            source=head.text("source"),
        )
        if not found.warmup_s <= found.window_s <= found.horizon_s:
            raise _Wrong("warmup_s <= window_s <= horizon_s does not hold")
        tables = _Tables(*(head.texts(name) for name in ("roles", "models", "bases")))
        promised = head.count("runs")
        runs: dict[str, Run] = {}
        at_s = 0.0
        for number, line in lines:
            where = f"{path}, line {number}"
            run = _run(_Fields(line), runs, tables)
            if run.run_id in runs:
                raise _Wrong(f"run {run.run_id!r} stands twice")
            if not at_s <= run.at_s < found.window_s:
                raise _Wrong(f"it arrives at {run.at_s}: runs stand in the order of their arrival, before window_s")
            runs[run.run_id], at_s = run, run.at_s
        if len(runs) != promised:
            raise ConfigError(
                f"{path} ends after line {number} with {len(runs)} of {promised} runs: it was cut off, write it again"
            )
    except _Wrong as e:
        raise ConfigError(f"{where}: {e}. Correct the line, or compose the workload again") from e
    return replace(found, runs=tuple(runs.values()))


class _Wrong(Exception):
    """What is wrong with a line."""


class _Table(dict[str, int]):
    """Names by their number, in the order of their first use."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]


@dataclass(frozen=True, slots=True)
class _Tables:
    roles: Sequence[str]
    models: Sequence[str]
    bases: Sequence[str]


def _named(table: Sequence[str], value: Any, what: str) -> str:
    if type(value) is not int or not 0 <= value < len(table):
        raise _Wrong(f"unknown {what} {value!r}: line 1 names {len(table)} of them")
    return table[value]


class _Fields(dict[str, Any]):
    """One line's object, asked for by type."""

    def __init__(self, line: str) -> None:
        def refuse(constant: str) -> None:
            raise _Wrong(f"{constant} is no number to compute with")

        try:
            found: Any = json.loads(line, parse_constant=refuse)
        except (ValueError, RecursionError) as e:
            raise _Wrong(f"no JSON ({e})") from e
        if not isinstance(found, dict):
            raise _Wrong("no JSON object")
        super().__init__(cast("dict[str, Any]", found))

    def text(self, name: str) -> str:
        if not isinstance(value := self.get(name), str):
            raise _Wrong(f"{name} is {value!r}, but it is a text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in cast("list[Any]", value)):
            raise _Wrong(f"{name} is no list of texts")
        return cast("list[str]", value)

    def number(self, name: str, default: float | None = None) -> float:
        return _number(self.get(name, default), name)

    def weights(self, name: str) -> dict[str, float]:
        value = self.get(name, {})
        if not isinstance(value, dict) or not all(_number(v, name) for v in cast("dict[str, Any]", value).values()):
            raise _Wrong(f"{name} is no object of weights above 0")
        return cast("dict[str, float]", value)

    def count(self, name: str) -> int:
        return _count(self.get(name), name)


def _number(value: Any, name: str) -> float:
    if type(value) not in {int, float} or not 0 <= value < math.inf:
        raise _Wrong(f"{name} is {value!r}, but it is a number from 0")
    return value


def _count(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise _Wrong(f"{name} is {value!r}, but it is a whole number from 0")
    return value


def _packed(stage: Stage, roles: _Table, models: _Table, bases: _Table) -> list[Any]:
    """A stage as a short array; one stage that it waits for stands without brackets, and what is usual at the end is left out."""
    after = stage.after[0] if len(stage.after) == 1 else list(stage.after)
    packed: list[Any] = [roles[stage.role], models[stage.model], stage.prompt_tokens, stage.output_tokens]
    packed += [stage.visit, after, stage.gap_s, stage.shares, stage.shared_tokens]
    if (f := stage.foreseen) is not None:
        packed += [bases[f.basis], *(getattr(f, name) for name in _FORESEEN)]
    elif (stage.shares, stage.shared_tokens) == (-1, 0):
        del packed[7:]
    return packed


def _run(line: _Fields, runs: Mapping[str, Run], tables: _Tables) -> Run:
    if (same := line.get("as")) is not None:
        if not isinstance(same, str) or same not in runs:
            raise _Wrong(f"it does the same as run {same!r}, which stands in no line before")
        stages = runs[same].stages
    else:
        packed = line.get("stages")
        if not isinstance(packed, list) or not packed:
            raise _Wrong("a run has a list of stages, one at least")
        stages = tuple(_stage(p, i, tables) for i, p in enumerate(cast("list[Any]", packed)))
    name = line.text("class")
    if name not in _CLASSES:
        raise _Wrong(f"class is {name!r}, but it is one of {', '.join(_CLASSES)}")
    if not (deadline_s := line.number("deadline")) > 0:
        raise _Wrong("deadline is 0: a run has some seconds to end in")
    return Run(
        run_id=line.text("id"),
        app=line.text("app"),
        session=line.text("session"),
        at_s=line.number("at"),
        service_class=_CLASSES[name],
        deadline_s=deadline_s,
        stages=stages,
        tenant=line.text("tenant") if "tenant" in line else _TENANT,
        end_gap_s=line.number("end_gap", 0.0),
    )


def _stage(packed: Any, at: int, tables: _Tables) -> Stage:
    whole = 10 + len(_FORESEEN)
    if not isinstance(packed, list) or len(cast("list[Any]", packed)) not in {7, 9, whole}:
        raise _Wrong(f"stage {at} is no array of 7, 9 or {whole} entries")
    role, model, prompt, output, visit, after, gap, *more = cast("list[Any]", packed)
    parents = cast("list[Any]", after) if isinstance(after, list) else [after]
    for i in parents:
        if type(i) is not int or not 0 <= i < at:
            raise _Wrong(f"stage {at} comes after stage {i!r}, which is none before it")
    prompt_tokens = _count(prompt, f"prompt tokens of stage {at}")
    shares, shared = more[:2] or (-1, 0)
    if type(shares) is not int or not -1 <= shares < at:
        raise _Wrong(f"stage {at} shares its beginning with stage {shares!r}, which is none before it")
    if _count(shared, f"shared tokens of stage {at}") > (prompt_tokens if shares >= 0 else 0):
        raise _Wrong(f"stage {at} shares {shared} tokens, more than there are to share")
    foreseen = None
    if len(more) > 2:
        values = {n: _number(v, f"{n} of stage {at}") for n, v in zip(_FORESEEN, more[3:], strict=True)}
        foreseen = Foreseen(basis=_named(tables.bases, more[2], "basis"), **values)
    return Stage(
        role=_named(tables.roles, role, "role"),
        model=_named(tables.models, model, "model"),
        prompt_tokens=prompt_tokens,
        output_tokens=_count(output, f"output tokens of stage {at}"),
        after=tuple(parents),
        gap_s=_number(gap, f"gap of stage {at}"),
        shares=shares,
        shared_tokens=shared,
        visit=_count(visit, f"visit of stage {at}"),
        foreseen=foreseen,
    )
