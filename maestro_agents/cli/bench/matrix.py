"""`maestro bench matrix`: every construct of LangGraph in every mode, with Maestro and without.

The constructs are `sample_workflows.constructs`. Each cell runs one of them in one mode twice: plain, against a "provider" (the
app's own URL), and under Maestro, whose fleet has two other engines; all three are emulated and answer the same request with
the same words. `CHECKS` says what a cell must show.

Before results are compared, what differs between any two runs is taken out (`plain`, `joined`, `events_of`): ids and times by
their patterns; where a stream is cut into chunks; in which order tasks that run side by side report.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import inspect
import json
import operator
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol, Self, cast

from langchain_core.messages import BaseMessage, BaseMessageChunk
from langchain_openai import ChatOpenAI

from maestro_agents.cli.demo_pass import sample
from maestro_agents.client import Client
from maestro_agents.errors import ConfigError
from maestro_agents.simulator.engine import EngineProfile
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig

MODEL: Final = "matrix"
SYNC_MODES: Final = ("invoke", "stream", "batch", "messages")
ASYNC_MODES: Final = ("ainvoke", "astream", "abatch", "amessages", "events")
MODES: Final = ("invoke", "ainvoke", "stream", "astream", "batch", "abatch", "messages", "amessages", "events")
"""``messages``: ``stream_mode="messages"``, ``events``: ``astream_events`` version 2; a leading *a* is asynchronous."""

WAYS: Final = ("install", "decorator", "wrap", "run", "wrap_model", "middleware")
"""How Maestro is put on the program."""

MODEL_WAYS: Final = frozenset({"wrap_model", "middleware"})
"""These see calls, not graphs: the node path is known, the graph's own name in front of it is not, and is not asked for."""

CHECKS: Final[Mapping[str, str]] = {
    "X": "it ran: no exception",
    "G": "gated: one observation per request, none missing, none double",
    "R": "rerouted: all requests at the fleet, none at the provider",
    "P": "prioritised: each body had an integer priority",
    "N": "node known: node and role of each call are those counted by hand",
    "E": "equal: the same results as without Maestro",
}
BATCH: Final = 2
_PATIENCE_S: Final = 20.0
"""After this a call that waits at the gate fails, and its cell with it."""
_SPEED: Final = 50.0
_NOISE: Final = "Pydantic serializer warnings"
"""LangChain's, of what was parsed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One construct in one mode."""

    construct: str
    mode: str
    #: Requests that the run without Maestro made.
    requests: int = 0
    #: Keys of `CHECKS` that do not hold, in their order.
    failed: tuple[str, ...] = ()
    #: What the first of them saw.
    detail: str = ""
    #: Why there is nothing to check.
    skipped: str = ""


def constructs() -> list[str]:
    """Their names."""
    return [m.name for m in pkgutil.iter_modules(cast("Any", sample("constructs")).__path__)]


def check_names(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that is none."""
    if wrong := sorted(set(given) - set(known)):
        raise ConfigError(f"--{kind} {wrong[0]!r}: one of {', '.join(known)}")


# -- running one cell ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one way of running gave."""

    value: Any = None
    error: str = ""
    #: Why it cannot be run this way.
    skipped: str = ""


class Runner(Protocol):
    """Runs a construct in a mode, under one way."""

    def __call__(self, construct: str, mode: str, way: str) -> Result: ...


class InProcess:
    """Runs constructs here. One event loop for all, since langchain-openai shares its clients within a process."""

    def __init__(self) -> None:
        self._loop = asyncio.Runner()

    def close(self) -> None:
        self._loop.close()

    def __call__(self, construct: str, mode: str, way: str) -> Result:
        """Way "": without Maestro; "run": with what is there already."""
        from maestro_langgraph import maestro

        try:
            module = sample(f"constructs.{construct}")
        except ModuleNotFoundError as e:
            return Result(skipped=f"needs {e.name}: pip install 'maestro-agents[matrix]'")
        except Exception as e:
            return Result(error=f"{type(e).__name__}: {e}"[:300])
        made = 0

        def model(**options: Any) -> Any:
            nonlocal made
            made += 1
            # By URL: clients that langchain-openai shares for want of one would belong to an earlier bench's loop.
            url = os.environ["OPENAI_BASE_URL"]
            llm = ChatOpenAI(model=MODEL, base_url=url, max_retries=0, **options)
            return maestro.wrap_model(llm) if way == "wrap_model" else llm

        try:
            with _attached(way, module, model) as build:
                if build is None:
                    return Result(skipped=f"{way} has no place here")
                graph = build(is_async=mode in ASYNC_MODES)
                value = self._drive(graph, mode, module)
        except Exception as e:
            return Result(error=f"{type(e).__name__}: {e}"[:300])
        if way == "wrap_model" and not made:
            return Result(skipped="makes no chat model: there is nothing to wrap")
        return Result(value=value)

    def _drive(self, graph: Any, mode: str, module: ModuleType) -> Any:
        configs: list[Any] = [{"configurable": {"thread_id": str(uuid.uuid4())}} for _ in range(BATCH)]
        found: list[Any] = []
        for given in (module.INPUT, *([module.RESUME] if hasattr(module, "RESUME") else [])):
            inputs = [copy.deepcopy(given) for _ in range(BATCH)]
            if mode in ASYNC_MODES:
                found.append(self._loop.run(_drive_async(graph, mode, inputs, configs)))
            else:
                found.append(_drive(graph, mode, inputs, configs))
        return json.loads(json.dumps(found))


def _drive(graph: Any, mode: str, inputs: list[Any], configs: list[Any]) -> Any:
    match mode:
        case "invoke":
            return plain(graph.invoke(inputs[0], configs[0]))
        case "stream":
            return unordered(plain(list(graph.stream(inputs[0], configs[0], stream_mode="updates"))))
        case "batch":
            return plain(graph.batch(inputs, configs))
        case _:
            return joined(graph.stream(inputs[0], configs[0], stream_mode="messages"))


async def _drive_async(graph: Any, mode: str, inputs: list[Any], configs: list[Any]) -> Any:
    match mode:
        case "ainvoke":
            return plain(await graph.ainvoke(inputs[0], configs[0]))
        case "astream":
            return unordered(plain([u async for u in graph.astream(inputs[0], configs[0], stream_mode="updates")]))
        case "abatch":
            return plain(await graph.abatch(inputs, configs))
        case "amessages":
            return joined([m async for m in graph.astream(inputs[0], configs[0], stream_mode="messages")])
        case _:
            return events_of([e async for e in graph.astream_events(inputs[0], configs[0], version="v2")])


@contextlib.contextmanager
def _attached(way: str, module: ModuleType, model: Callable[..., Any]) -> Generator[Callable[..., Any] | None]:
    """The construct's builder with Maestro on it in this way; None where the way has nothing to be put on."""
    from maestro_langgraph import maestro

    build = functools.partial(module.build, model)
    try:
        match way:
            case "install":
                maestro.install()
                yield build
            case "decorator":
                yield functools.partial(maestro(module.build), model)
            case "wrap":
                yield lambda **options: cast("Any", maestro).wrap(build(**options))  # pyright: ignore[reportUnknownLambdaType]
            case "middleware" if "middleware" in inspect.signature(module.build).parameters:
                from maestro_langgraph.middleware import MaestroMiddleware

                yield functools.partial(build, middleware=[MaestroMiddleware()])
            case "middleware":
                yield None
            case _:
                yield build
    finally:
        if way not in {"", "run"}:
            maestro.uninstall()


class Child:
    """Runs constructs in another process, which says nothing of Maestro; ``managed``: started by ``maestro run``.

    The seed of hashes is fixed: third parties put sets into prompts, whose order would differ between two processes.
    """

    def __init__(self, *, managed: bool) -> None:
        program = [sys.executable, "-m", "maestro_agents.cli.bench.matrix"]
        command = [sys.executable, "-m", "maestro_agents.cli", "run", "--", *program] if managed else program
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def __call__(self, construct: str, mode: str, way: str) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(construct, mode, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return Result(**json.loads(answer)) if answer else Result(error="its process ended")


def serve_cells() -> None:
    """The other process: a line "construct mode" in, a `Result` as JSON out."""
    warnings.filterwarnings("ignore", _NOISE)
    here = InProcess()
    for line in sys.stdin:
        construct, mode = line.split()
        print(json.dumps(dataclasses.asdict(here(construct, mode, "run"))), flush=True)
    here.close()


# -- checking one cell ---------------------------------------------------------------------------------------------------
class Bench:
    """Provider and fleet, and the cells that run on them: ``with Bench() as bench: bench.cell("loop", "invoke")``."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._provider: list[Any] = []
        self._fleet: list[Any] = []
        self._plain: dict[tuple[str, str, Runner], tuple[Result, int]] = {}
        self._offset = 0

    def __enter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="maestro-matrix-")))
        profile = dataclasses.replace(EngineProfile(), max_model_len=65_536)
        config = EmulatorConfig(models=(EmulatedModel(name=MODEL, profile=profile),), speed=_SPEED)

        def emulator(seen: list[Any]) -> str:
            def on_request(body: bytes) -> None:
                with self._lock:
                    seen.append(json.loads(body).get("priority"))

            return self._stack.enter_context(Emulator(config, on_request=on_request)).url

        url = emulator(self._provider)
        engines = [f'[[engine]]\nid = "{i}"\nmodel = "{MODEL}"\nurl = "{emulator(self._fleet)}"\n' for i in "ab"]
        (folder / "fleet.toml").write_text("\n".join(engines), encoding="utf-8")
        self._events = folder / "events.jsonl"
        self._events.touch()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAESTRO_", "OPENAI_", "LANGSMITH_"))}
        environment |= {
            "OPENAI_BASE_URL": url,
            "OPENAI_API_KEY": "the-callers-own",
            "MAESTRO_SAMPLE_MODEL": MODEL,
            "MAESTRO_FLEET": str(folder / "fleet.toml"),
            "MAESTRO_EVENTS": str(self._events),
            "MAESTRO_MAX_WAIT_S": str(_PATIENCE_S),
        }
        self._environment = environment
        Client.reset()
        self._stack.callback(Client.reset)
        self._here = InProcess()
        self._stack.callback(self._here.close)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @functools.cached_property
    def _children(self) -> tuple[Child, Child]:
        """Without Maestro, and with."""
        children = Child(managed=False), Child(managed=True)
        for child in children:
            self._stack.callback(child.close)
        return children

    def cell(self, construct: str, mode: str, way: str = "install") -> Cell:
        """Run a construct plain and under Maestro, and compare."""
        with _environment(self._environment), warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NOISE)
            return self._cell(construct, mode, way)

    def _cell(self, construct: str, mode: str, way: str) -> Cell:
        empty = Cell(construct=construct, mode=mode)
        alone, managed = self._children if way == "run" else (self._here, self._here)
        without, requests = self._without(construct, mode, alone)
        if without.skipped or without.error:
            failed = ("X",) if without.error else ()
            detail = f"without Maestro: {without.error}"
            return dataclasses.replace(empty, failed=failed, detail=detail, skipped=without.skipped)
        self._clear()
        found = managed(construct, mode, way)
        if found.skipped:
            return dataclasses.replace(empty, skipped=found.skipped)
        module = sample(f"constructs.{construct}")
        expected = _expected(module, mode, way)
        runs = (BATCH if "batch" in mode else 1) * (1 + hasattr(module, "RESUME"))
        stages = self._observed(requests, runs, patience_s=3.0 if way == "run" else 0.0)
        with self._lock:
            at_provider, at_fleet = len(self._provider), list(self._fleet)
        known = Counter((str(s.get("node", "")), "" if way in MODEL_WAYS else str(s.get("role", ""))) for s in stages)
        seen: dict[str, str] = {
            "X": found.error,
            "G": "" if len(stages) == requests else f"{len(stages)} observations of {requests} requests",
            "R": ""
            if not at_provider and len(at_fleet) == requests
            else f"{at_provider} requests at the provider, {len(at_fleet)} of {requests} at the fleet",
            "P": ""
            if all(isinstance(p, int) and not isinstance(p, bool) for p in at_fleet)
            else f"priorities {at_fleet[:8]}",
            "N": "" if known == expected else f"seen {_told(known - expected)}, expected {_told(expected - known)}",
            "E": "" if found.value == without.value else _difference(found.value, without.value),
        }
        failed = tuple(key for key, trouble in seen.items() if trouble)
        return dataclasses.replace(
            empty, requests=requests, failed=failed, detail=next((seen[key] for key in failed), "")
        )

    def _without(self, construct: str, mode: str, run: Runner) -> tuple[Result, int]:
        """The plain result, run once, and how many requests it took."""
        if (construct, mode, run) not in self._plain:
            self._clear()
            result = run(construct, mode, "")
            with self._lock:
                self._plain[construct, mode, run] = (result, len(self._provider))
        return self._plain[construct, mode, run]

    def _clear(self) -> None:
        with self._lock:
            self._provider.clear()
            self._fleet.clear()
        self._offset = self._events.stat().st_size

    def _observed(self, requests: int, runs: int, *, patience_s: float) -> list[dict[str, Any]]:
        """What Maestro recorded since `_clear`. Of another process all of it is there when the ends of the runs are."""
        Client.reset()  # ours writes now what it has yet to write
        give_up_s = time.monotonic() + patience_s
        while True:
            with self._events.open("rb") as file:
                file.seek(self._offset)
                lines: list[dict[str, Any]] = [json.loads(line) for line in file if line.endswith(b"\n")]
            stages = [line for line in lines if line["kind"] == "stage"]
            ended = sum(line["kind"] == "run" for line in lines)
            if (len(stages) >= requests and ended >= runs) or time.monotonic() > give_up_s:
                return stages
            time.sleep(0.01)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    before = dict(os.environ)
    for name in before.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _expected(module: ModuleType, mode: str, way: str) -> Counter[tuple[str, str]]:
    """(node path, role) of each call, as counted by hand in the construct's CALLS."""
    runs = BATCH if "batch" in mode else 1
    calls = cast("Mapping[str | tuple[str, str], int]", module.CALLS)
    found = Counter[tuple[str, str]]()
    for key, n in calls.items():
        node, role = (key, key) if isinstance(key, str) else key
        found[node, "" if way in MODEL_WAYS else role] += runs * n
    return found


def _told(calls: Counter[tuple[str, str]]) -> str:
    return (
        ", ".join(f"{n} of {node}" + (f" ({role})" if role else "") for (node, role), n in sorted(calls.items()))
        or "no more"
    )


# -- results that can be compared ----------------------------------------------------------------------------------------
_ID: Final = re.compile(r"\b[0-9a-f]{8}(?:-?[0-9a-f]{4}){3}-?[0-9a-f]{12}\b|(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:[\d.]+(?:Z|[+-]\d\d:\d\d)?")
_TIMES: Final = frozenset({"created", "created_at"})


def plain(value: Any) -> Any:
    """A result as JSON, without ids and times."""
    if isinstance(value, str):
        return _TIME.sub("<time>", _ID.sub("<id>", value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if hasattr(value, "model_dump"):
        value = value.model_dump(warnings=False)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {plain(str(k)): "<time>" if k in _TIMES and v is not None else plain(v) for k, v in items}
    if isinstance(value, list | tuple):
        return [plain(v) for v in cast("Iterable[Any]", value)]
    if isinstance(value, set | frozenset):
        return unordered([plain(v) for v in cast("Iterable[Any]", value)])
    return f"a {type(value).__name__}"


def unordered(values: list[Any]) -> list[Any]:
    """In an order that does not depend on who came first."""
    return sorted(values, key=lambda v: json.dumps(v, sort_keys=True))


def joined(stream: Iterable[tuple[BaseMessage, Mapping[str, Any]]]) -> list[Any]:
    """A stream of messages and chunks: each message whole, with its metadata, in no order."""
    messages: dict[tuple[Any, Any], tuple[BaseMessage, Mapping[str, Any]]] = {}
    for message, metadata in stream:
        key = (metadata.get("langgraph_checkpoint_ns"), message.id)
        before = messages.get(key)
        messages[key] = (_add(before[0], message) if before else message, before[1] if before else metadata)
    return unordered([plain(pair) for pair in messages.values()])


def _add(first: BaseMessage, second: BaseMessage) -> Any:
    if isinstance(first, BaseMessageChunk) and isinstance(second, BaseMessageChunk):
        return first + second
    return second


def events_of(events: Iterable[Mapping[str, Any]]) -> list[Any]:
    """``astream_events``: of each run of anything its events in their order, a stream's chunks joined; runs in no order."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        told = runs.setdefault(str(event["run_id"]), [])
        if told and event["event"].endswith("_stream") and told[-1]["event"] == event["event"]:
            told[-1]["data"]["chunk"].append(event["data"].get("chunk"))
            continue
        data = dict(event["data"])
        if event["event"].endswith("_stream"):
            data["chunk"] = [data.get("chunk")]
        told.append({**event, "data": data, "parent_ids": len(event["parent_ids"]), "run_id": ""})
    for told in runs.values():
        for event in told:
            chunks: list[Any] | None = event["data"].get("chunk")
            if chunks and all(isinstance(c, BaseMessageChunk) for c in chunks):
                event["data"]["chunk"] = functools.reduce(operator.add, chunks)
            elif chunks:
                event["data"]["chunk"] = unordered(plain(chunks))
    return unordered([plain(told) for told in runs.values()])


def _difference(found: object, expected: object, place: str = "") -> str:
    """Where two results first differ."""
    one, other = str(found)[:80], str(expected)[:80]
    if isinstance(found, dict) and isinstance(expected, dict):
        a, b = cast("dict[str, Any]", found), cast("dict[str, Any]", expected)
        if a.keys() != b.keys():
            return f"{place or 'result'} has other keys: {', '.join(sorted(a.keys() ^ b.keys()))}"
        return next(_difference(a[k], b[k], f"{place}.{k}") for k in a if a[k] != b[k])
    if isinstance(found, list) and isinstance(expected, list):
        c, d = cast("list[Any]", found), cast("list[Any]", expected)
        if len(c) != len(d):
            return f"{place or 'result'} has {len(c)} items, without Maestro {len(d)}"
        return next(_difference(x, y, f"{place}[{i}]") for i, (x, y) in enumerate(zip(c, d, strict=True)) if x != y)
    return f"{place or 'result'}: {one!r}, without Maestro {other!r}"


# -- the whole table -----------------------------------------------------------------------------------------------------
def run(
    names: Iterable[str], modes: Iterable[str], way: str, say: Callable[[Cell], None] = lambda _cell: None
) -> dict[str, Any]:
    """Every named construct in every named mode; ``say`` is told each cell."""
    names, modes = list(names), list(modes)
    check_names("construct", names, constructs())
    check_names("mode", modes, MODES)
    check_names("way", [way], WAYS)
    cells: list[Cell] = []
    with Bench() as bench:
        for name in names:
            for mode in modes:
                cells.append(bench.cell(name, mode, way))
                say(cells[-1])
    checked = [c for c in cells if not c.skipped]
    packages = ("openai", "langchain-openai", "langchain-core", "langgraph")
    return {
        "label": "emulated",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "way": way,
        "modes": modes,
        "totals": {
            "cells": len(checked),
            "passed": sum(not c.failed for c in checked),
            "skipped": len(cells) - len(checked),
            "requests": sum(c.requests for c in checked),
            "failed": {key: sum(key in c.failed for c in checked) for key in CHECKS},
        },
        "cells": [dataclasses.asdict(c) for c in cells],
    }


if __name__ == "__main__":
    serve_cells()
