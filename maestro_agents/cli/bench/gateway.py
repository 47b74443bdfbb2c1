"""`maestro bench gateway`: the same app by both ways, what the gateway costs a call, and a thousand streams at once.

Real Redis, scheduler, gateway process and emulated engines, whose answers are decided by the request alone: the same LangGraph sample
must give the same results through the decorator, through the gateway, and straight to an engine. Latency: the same call to the engine
and to the gateway in turn, the first of each pair now one, now the other. Streams: waves through one gateway process; its memory
and its file descriptors before, at their most, and once the wave is over (`/proc`, so on Linux only).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from maestro_agents import guard
from maestro_agents.cli.bench.stack import MODEL, emulated
from maestro_agents.cli.demo_input import MESSAGES
from maestro_agents.cli.demo_pass import length_of, sample
from maestro_agents.cli.simulate.tables import WIDTH
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.errors import ConfigError, EngineUnavailable
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.simulator.score import quantile
from maestro_serving.gateway import keys
from maestro_serving.load import Wire

PAIRS: Final = 400
WARM: Final = 20
"""Pairs before those that count: connections open, code is warm."""

RESAMPLES: Final = 2_000
TENANT: Final = "bench"
STREAM_TOKENS: Final = 16
OUTPUT_TOKENS: Final = 12
"""Of each stream of a wave."""

SLOW: Final = 0.1
"""Speed of the waves' engines: so slow that all streams of a wave are open at once."""

SLOTS: Final = 1024
SETTLE_S: Final = 8.0
"""Engines close what is idle for 5 s."""

SPARE_FILES: Final = 512
READY_LIMIT_S: Final = 30.0
LOOK_S: Final = 0.2
_URL: Final = re.compile(r"^gateway of pool .* at (http://[^\s/]+)", re.MULTILINE)
PROMPT: Final = "Answer the customer in one sentence. " * 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Gateway:
    """A gateway process that answers."""

    url: str
    key: str
    pid: int


@contextlib.contextmanager
def gateway_of(stack: Stack) -> Iterator[Gateway]:
    """`maestro gateway` in front of a stack, with a key. Raises `EngineUnavailable` where it does not come up."""
    command = [sys.executable, "-m", "maestro_agents.cli", "gateway", "--port", "0"]
    command += ["--redis-url", stack.redis_url, "--pool", stack.fleet.pool]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    log = stack.logs / "gateway.log"
    key = asyncio.run(_key(stack))
    process = guard.spawn(command, log=log, env=env)
    try:
        give_up_at_s = time.monotonic() + READY_LIMIT_S
        while not (said := _URL.search(log.read_text(encoding="utf-8", errors="replace"))):
            if not process.alive() or time.monotonic() > give_up_at_s:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                raise EngineUnavailable(f"the gateway does not listen: {lines[-1] if lines else 'it said nothing'}")
            time.sleep(LOOK_S)
        yield Gateway(url=f"{said[1]}/v1", key=key, pid=process.pid)
    finally:
        process.stop()


async def _key(stack: Stack) -> str:
    queue = RedisQueue(stack.redis_url, pool=stack.fleet.pool)
    try:
        return (await keys.add(queue, TENANT))[0]
    finally:
        await queue.close()


# -- the same results ------------------------------------------------------------------------------------------------------
async def same(stack: Stack, through: Gateway, runs: int) -> dict[str, Any]:
    """The sample by three ways: plain to an engine, plain to the gateway, and through the decorator."""
    from maestro_langgraph import gate, maestro

    made = sample("support_triage")
    direct = made.graph(MODEL, stack.engines[0].url, extra_body=length_of)
    decorated = maestro.wrap(made.graph(MODEL, stack.engines[0].url, extra_body=length_of).compile())
    states: dict[str, list[Any]] = {}
    before = os.environ.get("OPENAI_API_KEY")
    os.environ["OPENAI_API_KEY"] = through.key
    gated = made.graph(MODEL, through.url, extra_body=length_of)
    try:
        for way, app in {"direct": direct.compile(), "gateway": gated.compile(), "decorator": decorated}.items():
            gate.install() if way == "decorator" else gate.uninstall()
            states[way] = [await app.ainvoke({"message": message}) for message in _messages(runs)]
    finally:
        gate.install()
        os.environ.pop("OPENAI_API_KEY")
        if before is not None:
            os.environ["OPENAI_API_KEY"] = before
    alike = {
        way: sum(a == b for a, b in zip(states["direct"], states[way], strict=True)) for way in ("gateway", "decorator")
    }
    both = sum(a == b for a, b in zip(states["gateway"], states["decorator"], strict=True))
    return {"runs": runs, "as_direct": alike, "decorator_as_gateway": both, "calls_of_a_run": 7}


def _messages(runs: int) -> list[str]:
    return [f"{MESSAGES[n % len(MESSAGES)]} (case {n})" for n in range(runs)]


# -- latency ---------------------------------------------------------------------------------------------------------------
async def latency(stack: Stack, through: Gateway, pairs: int, look: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of the same call, straight and through the gateway, pair by pair; whole, and to the first token of a stream."""
    engine = f"{stack.engines[0].url}/chat/completions"
    own = f"{through.url}/chat/completions"
    found: dict[str, Any] = {}
    wire = Wire(timeout_s=60.0)
    try:
        for kind, streamed in (("whole", False), ("first token", True)):
            ms: dict[str, list[float]] = {"direct": [], "gateway": []}
            for n in range(pairs + WARM):
                ways = [("direct", engine, ""), ("gateway", own, through.key)]
                for way, url, key in ways if n % 2 else reversed(ways):
                    took_ms = await _asked(wire, url, key, n, streamed=streamed)
                    if n >= WARM:
                        ms[way].append(took_ms)
                look()
            found[kind] = compared(ms["direct"], ms["gateway"])
    finally:
        await wire.aclose()
    return {"pairs": pairs, **found}


async def _asked(wire: Wire, url: str, key: str, n: int, *, streamed: bool) -> float:
    """Milliseconds to the end of the answer, or to its first token. Raises `EngineUnavailable` where there is none."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"{PROMPT} {n}"}],
        "max_tokens": STREAM_TOKENS if streamed else 1,
        "stream": streamed,
    }
    first_s: list[float] = []
    lines = b""

    def feed(chunk: bytes) -> None:
        nonlocal lines
        lines += chunk
        if streamed and not first_s and any(map(has_text, lines.decode(errors="replace").split("\n\n"))):
            first_s.append(time.perf_counter())

    began_s = time.perf_counter()
    status = await wire.stream(url, body, feed, token=key)
    ended_s = time.perf_counter()
    if status != 200 or (streamed and not first_s):
        raise EngineUnavailable(f"{url} answered {status or 'nothing'} in the middle of the bench")
    return 1e3 * ((first_s[0] if streamed else ended_s) - began_s)


def has_text(line: str) -> bool:
    """A chunk with a token of the answer; the first one of a chat only names the role."""
    if not line.startswith("data: {"):
        return False
    try:
        choices: list[Any] = json.loads(line[6:]).get("choices") or []
    except ValueError:  # the rest of it is on its way
        return False
    return any(c["delta"].get("content") for c in choices)


def compared(direct: Sequence[float], gateway: Sequence[float]) -> dict[str, Any]:
    """Quantiles of both, and what the gateway adds to each; with where that lies in 95 of 100 samples of the pairs (bootstrap)."""
    rng = random.Random(0)
    n = len(direct)
    drawn: dict[str, list[float]] = {"p50": [], "p99": []}
    for _ in range(RESAMPLES):
        at = rng.choices(range(n), k=n)
        a, b = sorted(direct[i] for i in at), sorted(gateway[i] for i in at)
        for name, q in (("p50", 0.5), ("p99", 0.99)):
            drawn[name].append(quantile(b, q) - quantile(a, q))
    first, second = sorted(direct), sorted(gateway)
    added: dict[str, Any] = {}
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        ordered = sorted(drawn[name])
        interval = [quantile(ordered, 0.025), quantile(ordered, 0.975)]
        added[name] = {"ms": quantile(second, q) - quantile(first, q), "interval_ms": interval}
    return {
        "direct_ms": {"p50": quantile(first, 0.5), "p99": quantile(first, 0.99)},
        "gateway_ms": {"p50": quantile(second, 0.5), "p99": quantile(second, 0.99)},
        "added_ms": added,
        "raw_ms": {"direct": [round(x, 3) for x in direct], "gateway": [round(x, 3) for x in gateway]},
    }


# -- many streams ----------------------------------------------------------------------------------------------------------
async def waves(through: Gateway, streams: int, count: int, look: Callable[[], None]) -> dict[str, Any]:
    """So many streams at once, wave after wave, through one gateway process."""
    idle = _taken(through.pid)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        before = _taken(through.pid)
        wave = _Wave(through, streams)
        running = asyncio.create_task(wave.play(look))
        peak = dict(before)
        most_open = 0
        while not running.done():
            now = _taken(through.pid)
            peak = {what: max(peak[what], now[what]) for what in now}
            most_open = max(most_open, wave.open)
            await asyncio.sleep(LOOK_S)
        await running
        after = await _settled(through)
        found.append(
            {
                "streams": streams, "completed": wave.completed, "failed": wave.failed, "open_at_most": most_open,
                "took_s": wave.took_s, "first_token_p50_s": _median(wave.first_s), "before": before, "peak": peak,
                "after": after,
            }
        )  # fmt: skip
    grown = [b["after"]["rss_bytes"] - a["after"]["rss_bytes"] for a, b in itertools.pairwise(found)]
    return {"streams": streams, "idle": idle, "waves": found, "grown_bytes_by_wave": grown}


class _Wave:
    """Streams that begin together, each over a connection of its own, read to their ends."""

    def __init__(self, through: Gateway, streams: int) -> None:
        at = urlsplit(through.url)
        self._host, self._port = str(at.hostname), int(at.port or 80)
        self._streams = streams
        body = json.dumps(
            {"model": MODEL, "prompt": [17], "max_tokens": OUTPUT_TOKENS, "min_tokens": OUTPUT_TOKENS, "stream": True}
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {at.netloc}\r\nauthorization: Bearer {through.key}\r\n"
            f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._request = head.encode() + body
        self.open = 0
        self.completed = 0
        self.failed: dict[str, int] = {}
        self.first_s: list[float] = []
        self.took_s = 0.0

    async def play(self, look: Callable[[], None]) -> None:
        began_s = time.perf_counter()
        await asyncio.gather(*(self._stream(look) for _ in range(self._streams)))
        self.took_s = time.perf_counter() - began_s

    async def _stream(self, look: Callable[[], None]) -> None:
        why = ""
        began_s = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                writer.write(self._request)
                why = await self._read(reader, began_s)
            finally:
                writer.close()
        except OSError as e:
            why = type(e).__name__
        if why:
            self.failed[why] = self.failed.get(why, 0) + 1
        else:
            self.completed += 1
        look()

    async def _read(self, reader: asyncio.StreamReader, began_s: float) -> str:
        """What was wrong with it; "" for nothing."""
        status = (await reader.readline()).split(b" ")
        if len(status) < 2 or status[1] != b"200":
            return f"status {status[1].decode() if len(status) > 1 else 'none'}"
        end, counted = b"", False
        try:
            while chunk := await reader.read(65536):
                if not counted and b"data: {" in end + chunk:
                    counted = True
                    self.open += 1
                    self.first_s.append(time.perf_counter() - began_s)
                end = (end + chunk)[-64:]
        finally:
            self.open -= counted
        return "" if b"data: [DONE]" in end else "cut"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _taken(pid: int) -> dict[str, int]:
    """What a process has now: resident bytes, and open files. Raises `ConfigError` where nobody says."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        return {"rss_bytes": pages * resource.getpagesize(), "files": len(os.listdir(f"/proc/{pid}/fd"))}
    except OSError as e:
        raise ConfigError(
            f"/proc does not tell what process {pid} has ({e}): this part needs Linux, and a gateway that lives"
        ) from None


async def _settled(through: Gateway) -> dict[str, int]:
    """What it has `SETTLE_S` after the last stream, and one call later: its pool of connections lets those that engines closed go then."""
    await asyncio.sleep(SETTLE_S)
    one = _Wave(through, 1)
    await one.play(lambda: None)
    await asyncio.sleep(LOOK_S)
    return _taken(through.pid)


def allow_files(needed: int) -> int:
    """Let this process, and those it starts, open so many files; how many it is then. Raises `ConfigError` where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"{needed} open files are needed and this shell allows {hard}: raise `ulimit -Hn`, or take fewer --streams"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return needed
    return soft


# -- all of it -------------------------------------------------------------------------------------------------------------
def run(
    *, streams: int, count: int = 4, pairs: int = PAIRS, runs: int = 6, look: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Bring two stacks up, one after the other, each with a gateway: fast engines, then slow ones with room for all streams.

    ``look`` is called ``2 x (pairs + WARM) + streams x count`` times.
    """
    files = allow_files(2 * streams + SPARE_FILES)
    with emulated(engines=1, profile="gpu", slots=64, args=("--speed", "50")) as stack, gateway_of(stack) as through:
        Client.configure(redis_url=stack.redis_url)
        try:
            alike = asyncio.run(same(stack, through, runs))
        finally:
            Client.reset()
        pairwise = asyncio.run(latency(stack, through, pairs, look))
    engines = max(1, -(-streams // (SLOTS // 2)))
    slots = -(-streams // engines)
    with (
        emulated(engines=engines, profile="gpu", slots=slots, args=("--speed", f"{SLOW:g}")) as stack,
        gateway_of(stack) as through,
    ):
        many = asyncio.run(waves(through, streams, count, look))
    return {"label": "emulated", "same": alike, "latency": pairwise, "streams": many, "files_allowed": files}


def lost(found: Mapping[str, Any]) -> bool:
    """Some result differed, or some stream did not end."""
    alike = found["same"]
    whole = {alike["runs"]} == {*alike["as_direct"].values(), alike["decorator_as_gateway"]}
    return not whole or any(w["completed"] < w["streams"] for w in found["streams"]["waves"])


def show(found: Mapping[str, Any]) -> None:
    """Three tables: what was alike, what a call costs more, what streams leave behind."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    alike = found["same"]
    console.print(
        f"The same results: of {alike['runs']} runs of support_triage, through the gateway {alike['as_direct']['gateway']} as straight to "
        f"the engine, through the decorator {alike['as_direct']['decorator']}; gateway and decorator alike: {alike['decorator_as_gateway']}."
    )
    table = Table(box=SIMPLE_HEAD, title=f"one call, {found['latency']['pairs']} pairs in turn; engine emulated")
    for name in ("", "direct p50 ms", "p99", "gateway p50 ms", "p99", "added p50 ms", "added p99 ms"):
        table.add_column(name, justify="left" if not name else "right")
    for kind in ("whole", "first token"):
        r = found["latency"][kind]
        added = [
            f"{x['ms']:.2f} ({x['interval_ms'][0]:.2f} to {x['interval_ms'][1]:.2f})" for x in r["added_ms"].values()
        ]
        both = [f"{r[way][p]:.2f}" for way in ("direct_ms", "gateway_ms") for p in ("p50", "p99")]
        table.add_row(kind, *both, *added)
    console.print(table)
    many = found["streams"]
    table = Table(box=SIMPLE_HEAD, title=f"{many['streams']} streams at once through one gateway process")
    for name in (
        "wave",
        "completed",
        "open at most",
        "took s",
        "RSS MiB before",
        "most",
        "after",
        "files before",
        "most",
        "after",
    ):
        table.add_column(name, justify="right")
    for n, w in enumerate(many["waves"], 1):
        sizes = [f"{w[at]['rss_bytes'] / 2**20:.1f}" for at in ("before", "peak", "after")]
        files = [str(w[at]["files"]) for at in ("before", "peak", "after")]
        table.add_row(
            str(n), f"{w['completed']}/{w['streams']}", str(w["open_at_most"]), f"{w['took_s']:.1f}", *sizes, *files
        )
    console.print(table)
    grown = ", ".join(f"{b / 2**20:+.1f}" for b in many["grown_bytes_by_wave"])
    console.print(
        f"Memory after each wave, less that after the one before: {grown or '-'} MiB. In brackets: 95 % by bootstrap of the pairs."
    )
