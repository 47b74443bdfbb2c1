"""`maestro bench cost`: what Maestro costs an app that has no Redis: import, time per call, memory per run, and no leak.

Every part runs in processes of its own (``python -m maestro_agents.cli.bench.cost PART``), so that one part's memory and
modules are not another's. The server is a bare HTTP stub in a further process that answers at once: what is left is the app.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

from maestro_agents.cli.demo_pass import sample
from maestro_agents.cli.snapshot import percentile
from maestro_agents.errors import MaestroError

MODES: Final = ("own URL", "fleet")
"""Without Redis: the URL that the app uses anyway, or a fleet that this process schedules itself."""

BLOCK: Final = 10
MODEL: Final = "bench"
PROMPT: Final = "Answer the customer in one sentence. " * 20
ATTEMPTS: Final = 10
"""Fresh processes behind each figure of the import."""

_APP: Final = "langgraph.graph, langgraph.pregel, langchain_openai, openai"
"""What an app has imported before it comes to Maestro."""

_IMPORT: Final = f"""
import time, sys, {_APP}
began = time.perf_counter(); import maestro_langgraph; imported = time.perf_counter()
"""
_FIRST_CALL: Final = (
    _IMPORT
    + """
import asyncio
from maestro_agents.cli.demo_pass import sample
graph = sample("one_call").graph("bench", sys.argv[1], max_tokens=1)
plain, ours = graph.compile(), graph.compile()
again = time.perf_counter(); maestro_langgraph.maestro.wrap(ours); wrapped = time.perf_counter()
async def timed(app):
    began = time.perf_counter()
    await app.ainvoke({"question": "now"})
    return time.perf_counter() - began
async def main():
    maestro_langgraph.gate.uninstall()
    await timed(plain); usual = await timed(plain)
    maestro_langgraph.gate.install()
    return await timed(ours) - usual
print((imported - began) * 1e3, (wrapped - again) * 1e3, asyncio.run(main()) * 1e3)
"""
)

Say = Callable[[str, int, int], None]
"""Told of part, steps done and steps in all."""


def run(calls: int, in_flight: int, runs: int, say: Say) -> dict[str, Any]:
    """Measure all of it."""
    with served() as url:
        found: dict[str, Any] = {"import": import_times(url, say)}
        found["call"] = _part("calls", str(calls), url, say=say)
        found["memory"] = {way: _part("memory", str(in_flight), url, way, say=say) for way in ("plain", "maestro")}
        found["leak"] = _part("leak", str(runs), url, "maestro", say=say)
        found["leak_plain"] = _part("leak", str(runs), url, "plain", say=say)
    memory = found["memory"]
    memory["added_rss_bytes"] = memory["maestro"]["rss_bytes"] - memory["plain"]["rss_bytes"]
    memory["added_python_bytes"] = memory["maestro"]["python_bytes"] - memory["plain"]["python_bytes"]
    return found


def _part(part: str, *arguments: str, say: Say) -> dict[str, Any]:
    """Run one part in a process of its own: lines of JSON, the last is the result. Raises `MaestroError`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAESTRO_", "OPENAI_"))}
    env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path if os.path.isdir(p or "."))
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, part, *arguments]
    last = ""
    with (
        tempfile.TemporaryDirectory() as elsewhere,  # no maestro.toml of the user's
        subprocess.Popen(command, cwd=elsewhere, env=env, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            last = line
            step: Any = json.loads(line)
            if "steps" in step:
                say(f"{part} {' '.join(arguments[2:])}".strip(), step["done"], step["steps"])
    if process.returncode:
        raise MaestroError(f"the part {part!r} of the measurement failed with status {process.returncode}, see above")
    return dict(json.loads(last))


def _tell(done: int, steps: int) -> None:
    print(json.dumps({"done": done, "steps": steps}), flush=True)


# -- the server ----------------------------------------------------------------------------------------------------------
class Stub(asyncio.Protocol):
    """A chat completion for every request, at once. ``[[fail]]`` in it: status 500; ``[[hold]]``: no answer at all."""

    def __init__(self) -> None:
        self._seen = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        head, end, body = self._seen.partition(b"\r\n\r\n")
        length = int((head.lower().split(b"content-length:", 1) + [b"0"])[1].split(b"\r\n")[0])
        if end and len(body) >= length:
            self._seen = b""
            if b"[[hold]]" not in body and self._transport is not None:
                self._transport.write(_answer(body))


def _answer(body: bytes) -> bytes:
    if b"[[fail]]" in body:
        return _http(500, "application/json", b'{"error": {"message": "as asked"}}')
    base = {"id": "x", "created": 0, "model": MODEL, "usage": None}
    message = {"role": "assistant", "content": "yes"}
    if json.loads(body).get("stream"):
        chunk = {**base, "object": "chat.completion.chunk"}
        events: list[dict[str, Any]] = [
            {**chunk, "choices": [{"index": 0, "delta": message, "finish_reason": None}]}
        ] * 8
        events.append({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        return _http(
            200,
            "text/event-stream",
            b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in events) + b"data: [DONE]\n\n",
        )
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return _http(
        200,
        "application/json",
        json.dumps({**base, "object": "chat.completion", "choices": [choice], "usage": usage}).encode(),
    )


def _http(status: int, kind: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} .\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The stub in a process of its own; its URL."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if os.path.isdir(p or "."))}
    command = [sys.executable, "-m", "maestro_agents.cli.bench.cost", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


# -- import --------------------------------------------------------------------------------------------------------------
def import_times(url: str, say: Say) -> dict[str, Any]:
    """Milliseconds over a process that has langgraph, langchain-openai and openai already; median of fresh processes."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAESTRO_", "OPENAI_"))}
    env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path if os.path.isdir(p or "."))
    rows: list[list[float]] = []
    for i in range(ATTEMPTS + 1):
        out = subprocess.run(
            [sys.executable, "-c", _FIRST_CALL, url], env=env, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        if i:  # the first writes the byte code
            rows.append([float(word) for word in out.split()])
        say("import", i, ATTEMPTS)
    names = ("import_ms", "wrap_ms", "first_call_ms")
    columns = list(zip(*rows, strict=True))
    raw = {name: list(column) for name, column in zip(names, columns, strict=True)}
    return {**{name: statistics.median(column) for name, column in raw.items()}, "raw": raw}


# -- one call ------------------------------------------------------------------------------------------------------------
async def calls(n: int, url: str) -> dict[str, Any]:
    """Added milliseconds of one call on a one-node graph: plain and ours in turn, by short blocks."""
    from maestro_langgraph import gate, maestro

    made = sample("one_call")
    plain = made.graph(MODEL, url, max_tokens=1).compile()
    ours = maestro.wrap(made.graph(MODEL, url, max_tokens=1).compile())
    found: dict[str, Any] = {}
    for at, mode in enumerate(MODES):
        with _mode(mode, url):
            walls: tuple[list[float], list[float]] = ([], [])
            cpus: tuple[list[float], list[float]] = ([], [])
            blocks = max(2, n // BLOCK)
            for block in range(blocks + 4):
                for way, app in enumerate((plain, ours)):
                    gate.install() if way else gate.uninstall()
                    cpu_s, times = time.process_time(), list[float]()
                    for i in range(BLOCK):
                        began_s = time.perf_counter()
                        await app.ainvoke({"question": f"{PROMPT} {i}"})
                        times.append((time.perf_counter() - began_s) * 1e3)
                    if block > 3:
                        walls[way].extend(times)
                        cpus[way].append((time.process_time() - cpu_s) * 1e3 / BLOCK)
                if block % 10 == 0:
                    _tell(at * blocks + min(block, blocks), len(MODES) * blocks)
        found[mode] = {
            "calls": len(walls[0]),
            "plain_ms": percentile(walls[0], 0.5),
            "maestro_ms": percentile(walls[1], 0.5),
            "added_ms": percentile(walls[1], 0.5) - percentile(walls[0], 0.5),
            "added_cpu_ms": statistics.median(b - a for a, b in zip(*cpus, strict=True)),
        }
    return found


@contextlib.contextmanager
def _mode(mode: str, url: str, **settings: Any) -> Iterator[None]:
    from maestro_langgraph import maestro

    with tempfile.NamedTemporaryFile("w", suffix=".toml") as fleet:
        if mode == "fleet":
            fleet.write(f'[[engine]]\nid = "a"\nmodel = "{MODEL}"\nurl = "{url}"\nslots = 64\n')
            fleet.flush()
            settings["fleet"] = fleet.name
        maestro.configure(**settings)
        yield


# -- memory --------------------------------------------------------------------------------------------------------------
async def memory(n: int, url: str, way: str) -> dict[str, Any]:
    """Bytes per run while ``n`` asynchronous runs wait: at the gate, or plain, held at the same place of the SDK."""
    from maestro_langgraph import gate, maestro

    app = sample("one_call").graph(MODEL, url, max_tokens=1).compile()
    client: Any = gate.sdk.AsyncAPIClient
    if way == "maestro":
        maestro.configure(local_concurrency=1, max_wait_s=3600.0)
        maestro.wrap(app)
    await app.ainvoke({"question": "now"})
    freed, original = asyncio.Event(), client.request

    @functools.wraps(original)
    async def held(*args: Any, **kwargs: Any) -> Any:
        await freed.wait()
        return await original(*args, **kwargs)

    if way == "plain":
        client.request = held
    waiting = _waiting if way == "maestro" else (lambda: n)
    taken: dict[str, Any] = {}
    for what, measure in (("rss", rss_bytes), ("python", lambda: tracemalloc.get_traced_memory()[0])):
        if what == "python":
            tracemalloc.start()
        gc.collect()
        before = measure()
        question = "[[hold]]" if way == "maestro" else ""
        tasks = [asyncio.create_task(app.ainvoke({"question": f"{PROMPT} {question} {i}"})) for i in range(n)]
        async with asyncio.timeout(600):
            while waiting() < n - 1:
                await asyncio.sleep(0.05)
        for _ in range(20):  # plain: all have come to where they are held
            await asyncio.sleep(0.05)
        gc.collect()
        taken[f"{what}_bytes"] = (measure() - before) / n
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        del tasks
        _tell(1 + (what == "python"), 2)
    tracemalloc.stop()
    return {"runs": n, **taken}


def _waiting() -> int:
    from maestro_agents.client import Client

    return len(Client.current()._room.waiting)  # pyright: ignore[reportPrivateUsage]


def rss_bytes() -> int:
    """Resident memory of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # no Linux: what `ps` says, in KiB
        out = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
        return int(out.stdout) * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Open file descriptors of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return 0


# -- leak ----------------------------------------------------------------------------------------------------------------
KINDS: Final = ("answered", "streamed", "failed", "cancelled", "abandoned")


async def leak(n: int, url: str, way: str) -> dict[str, Any]:
    """Many runs of every kind, side by side, without Maestro ("plain") or with it; what the process holds meanwhile."""
    from maestro_langgraph import maestro

    app = sample("one_call").graph(MODEL, url, max_tokens=1).compile()
    if way == "maestro":
        maestro.wrap(app)
    rng = random.Random(0)
    looks: list[dict[str, Any]] = []
    ended = dict.fromkeys(KINDS, 0)
    for done in range(0, n, len(KINDS)):
        if done in {n // 10, n // 2}:
            looks.append({"runs": done, **await _look(way)})
        await asyncio.gather(*(_one(app, kind, rng) for kind in KINDS))
        for kind in KINDS:
            ended[kind] += 1
        if done % 100 == 0:
            _tell(done, n)
    looks.append({"runs": n, **await _look(way)})
    first, last = looks[0], looks[-1]
    grown = {
        name: [first["tables"].get(name, 0), size]
        for name, size in last["tables"].items()
        if size > first["tables"].get(name, 0)
    }
    return {
        "ended": ended,
        "looks": looks,
        "bytes_per_run": _slope(first, last),
        "late_bytes_per_run": _slope(looks[1], last),
        "grown": grown,
    }


def _slope(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    return (after["rss_bytes"] - before["rss_bytes"]) / (after["runs"] - before["runs"])


async def _one(app: Any, kind: str, rng: random.Random) -> None:
    words = {"failed": "[[fail]]", "cancelled": "[[hold]]"}.get(kind, "")
    question = {"question": f"{PROMPT} {words}"}
    if kind in {"streamed", "abandoned"}:
        stream = app.astream(question, stream_mode="messages")
        async for _ in stream:
            if kind == "abandoned":
                break
        await stream.aclose()
        return
    with contextlib.suppress(Exception):  # the server's 500, as asked; or the timeout
        async with asyncio.timeout(rng.uniform(0.0, 0.02) if kind == "cancelled" else None):
            await app.ainvoke(question)


async def _look(way: str) -> dict[str, Any]:
    for _ in range(3):
        await asyncio.sleep(0.2)  # the last reports are on their way
        gc.collect()
    return {
        "rss_bytes": rss_bytes(),
        "tables": tables() if way == "maestro" else {},
        "threads": threading.active_count(),
        "files": open_files(),
        "tasks": len(asyncio.all_tasks()),
    }


def tables() -> dict[str, int]:
    """The size of every container of ours: of our modules, and of the client with all that it holds, by name."""
    from maestro_agents.client import Client

    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        if name.startswith(("maestro_agents", "maestro_langgraph")) and ".cli" not in name:
            for key, value in vars(module).items():
                if not key.isupper() and not key.startswith("__") and not inspect.ismodule(value):
                    _count(f"{name}.{key}", value, found, seen)
    _count("client", Client.current(), found, seen)
    return found


def _count(path: str, value: Any, found: dict[str, int], seen: set[int]) -> None:
    """Add up the sizes below a value: containers, and objects of our own classes."""
    kind = cast("type[Any]", type(value))
    if id(value) in seen or isinstance(value, str | bytes | type) or inspect.isroutine(value):
        return
    seen.add(id(value))
    if hasattr(kind, "__len__") and hasattr(kind, "__iter__"):
        found[path] = found.get(path, 0) + len(value)
        items: Any = cast("Mapping[Any, Any]", value).values() if isinstance(value, Mapping) else value
        for item in list(cast("Iterable[Any]", items))[:2000]:
            _count(f"{path}[]", item, found, seen)
    elif kind.__module__.startswith("maestro_"):
        slots = [s for c in kind.__mro__ for s in getattr(c, "__slots__", ())]
        for key in {*getattr(value, "__dict__", {}), *slots}:
            _count(f"{path}.{key}", getattr(value, key, None), found, seen)


# -- a process of its own ------------------------------------------------------------------------------------------------
_PARTS: Final[Mapping[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]]] = {
    "calls": calls,
    "memory": memory,
    "leak": leak,
}


def _main(part: str, *arguments: str) -> None:
    if part == "serve":
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve())
        return
    n, *rest = arguments
    print(json.dumps(asyncio.run(_PARTS[part](int(n), *rest))), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
