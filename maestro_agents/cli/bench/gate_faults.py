"""`maestro bench gate-faults`: the gate's own faults, injected one by one; the user's graph gives its normal result each time.

Each fault has a process of its own. There a graph with a fan-out runs plain, sync and async, streamed and not; then the same
under Maestro with the fault, several times. Compared are results, time and what the log says. A fault of ours may cost time
(an outage is waited for, once) and a few lines of log, never a result and never a line per call.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from maestro_agents.cli.bench.stack import MODEL, emulated
from maestro_agents.cli.demo_pass import sample
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import Fleet
from maestro_agents.queue.embedded import _ask, _connect  # pyright: ignore[reportPrivateUsage]

ROUNDS: Final = 3
OUTAGE_AFTER_S: Final = 1.0
LEASE_S: Final = 1.0
LIMIT_S: Final = 60.0
"""Longer than this no fault may take: it hangs."""

LINES: Final = 6
"""More lines of log than this, over all calls, is noise: one says each place that failed."""

EXTRA_S: Final = 2 * OUTAGE_AFTER_S + 1.0
"""More time for one run than this beyond the plain one is a fault of its own."""


@dataclass
class World:
    """What a fault is done to."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    stack: Stack | None = None
    reached: bool = False
    """The faulty code was run."""

    @property
    def room(self) -> Any:
        return Client.current()._room  # pyright: ignore[reportPrivateUsage]

    def breaks(self, owner: Any, *names: str) -> None:
        """Let functions raise from now on."""
        for name in names:
            is_async = inspect.iscoroutinefunction(getattr(owner, name))
            setattr(owner, name, self.failing_async if is_async else self.failing)

    def failing(self, *_args: Any, **_kwargs: Any) -> Any:
        self.reached = True
        raise RuntimeError("injected")

    async def failing_async(self, *_args: Any, **_kwargs: Any) -> Any:
        self.failing()

    def redis(self, *words: str) -> None:
        """Say something to the Redis."""
        assert self.stack is not None
        url = self.stack.redis_url
        with _connect(url, 3.0) as s, s.makefile("rwb") as stream, contextlib.suppress(ValueError):
            _ask(stream, *words)  # a number as its answer is a ValueError

    def kill_redis(self) -> None:
        assert self.stack is not None
        os.kill(self.stack.pids()["redis"], signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """``strikes``: ``first`` before anything of ours has run, ``start`` before the first run, ``middle`` after one round."""

    inject: Callable[[World], None]
    strikes: str = "start"
    redis: bool = False


def _callbacks(world: World) -> None:
    from maestro_langgraph import identity

    for name in [n for n in vars(identity.MaestroHandler) if n.startswith("on_")]:
        hook = functools.partial(world.failing)
        functools.update_wrapper(hook, getattr(identity.MaestroHandler, name))
        setattr(identity.MaestroHandler, name, identity._guarded(hook))  # pyright: ignore[reportPrivateUsage]


def _in_module(name: str, *functions: str) -> Callable[[World], None]:
    """A fault: functions of a module of ours raise. ``module:Class`` means methods."""

    def inject(world: World) -> None:
        import importlib

        module, _, attribute = name.partition(":")
        owner = importlib.import_module(module)
        world.breaks(getattr(owner, attribute) if attribute else owner, *functions)

    return inject


def _in_queue(*functions: str) -> Callable[[World], None]:
    return lambda world: world.breaks(world.room.queue, *functions)


def _strange_sdk(world: World) -> None:
    from maestro_langgraph import gate

    world.reached = True
    for client in (gate.sdk.SyncAPIClient, gate.sdk.AsyncAPIClient):
        _rename_parameters(client)


def _rename_parameters(client: Any) -> None:
    inner = client.request

    def request(self: Any, into: Any, what: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, into, what, *args, **kwargs)

    client.request = request


def _thread_dies(world: World) -> None:
    world.reached = True
    world.room.loop.call_soon_threadsafe(world.room.loop.stop)
    world.room._thread.join(10)


def _setting(**settings: Any) -> Callable[[World], None]:
    def inject(world: World) -> None:
        world.reached = True
        world.settings.update(settings)

    return inject


def _clock_jumps(seconds: float) -> Callable[[World], None]:
    def inject(world: World) -> None:
        world.reached = True
        now = time.time
        time.time = lambda: now() + seconds
        world.room.clock._offset_s += seconds

    return inject


def _wrong_setting(world: World) -> None:
    world.reached = True
    os.environ["MAESTRO_LEASE_S"] = "soon"


def _answers(reply: bytes) -> Callable[[World], None]:
    """Something else answers at the Redis URL."""

    def inject(world: World) -> None:
        world.reached = True
        listener = socket.create_server(("127.0.0.1", 0))

        def serve(connection: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while connection.recv(65536):
                    if reply:
                        connection.sendall(reply)

        def accept() -> None:
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        world.settings["redis_url"] = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"

    return inject


def _with_redis(what: Callable[[World], None]) -> Callable[[World], None]:
    def inject(world: World) -> None:
        world.reached = True
        what(world)

    return inject


def _wrong_password(world: World) -> None:
    world.redis("CONFIG", "SET", "requirepass", "right")
    url = str(world.settings["redis_url"])
    world.settings["redis_url"] = url.replace("redis://", "redis://:wrong@")


def _foreign_message(world: World) -> None:
    inbox = world.room.queue._inbox(Client.current().client_id)
    world.redis("RPUSH", inbox, '{"version": 99}')


def _restart(world: World) -> None:
    assert world.stack is not None
    world.stack.restart_redis(kill=True)


FAULTS: Final[Mapping[str, Fault]] = {
    "every callback raises": Fault(inject=_callbacks),
    "the table of runs raises": Fault(inject=_in_module("maestro_langgraph.runs", "start", "end", "find")),
    "who calls raises": Fault(inject=_in_module("maestro_langgraph.call", "take_caller")),
    "fingerprint raises": Fault(inject=_in_module("maestro_langgraph.attach", "describe")),
    "features raise": Fault(inject=_in_module("maestro_langgraph.call", "stage_numbers")),
    "ticket raises": Fault(inject=_in_module("maestro_langgraph.call", "Ticket")),
    "client cannot start": Fault(inject=_in_module("maestro_agents.client", "Room"), strikes="first"),
    "a setting is wrong": Fault(inject=_wrong_setting, strikes="first"),
    "opening raises": Fault(inject=_in_module("maestro_agents.client:Client", "open")),
    "waiting raises": Fault(inject=_in_module("maestro_agents.client:Pass", "wait", "wait_async")),
    "push raises": Fault(inject=_in_queue("push", "push_at_once")),
    "listener and heartbeat raise": Fault(inject=_in_queue("verdicts", "renew")),
    "the scheduler raises": Fault(inject=_in_module("maestro_agents.scheduler:Scheduler", "step")),
    "the background thread dies": Fault(inject=_thread_dies, strikes="middle"),
    "preparing a request raises": Fault(inject=_in_module("maestro_langgraph.engines", "outgoing")),
    "the watcher raises": Fault(inject=_in_module("maestro_agents.usage:Watcher", "_look")),
    "watching cannot begin": Fault(inject=_in_module("maestro_langgraph.call", "tap", "unread_response")),
    "usage raises": Fault(inject=_in_module("maestro_agents.usage:Usage", "absorb")),
    "finish raises": Fault(inject=_in_module("maestro_agents.client:Pass", "finish")),
    "the report raises": Fault(inject=_in_queue("finish", "finish_at_once", "end_run", "end_run_at_once")),
    "the SDK is not as expected": Fault(inject=_strange_sdk, strikes="first"),
    "the queue is full": Fault(inject=_setting(max_queue=1), strikes="first"),
    "the events file cannot be written": Fault(inject=_setting(events="/dev/null/events"), strikes="first"),
    "the clock jumps forward": Fault(inject=_clock_jumps(3600.0), strikes="middle"),
    "the clock jumps back": Fault(inject=_clock_jumps(-3600.0), strikes="middle"),
    "Redis is gone from the start": Fault(inject=_with_redis(World.kill_redis), strikes="first", redis=True),
    "Redis goes in the middle": Fault(inject=_with_redis(World.kill_redis), strikes="middle", redis=True),
    "Redis restarts empty": Fault(inject=_with_redis(_restart), strikes="middle", redis=True),
    "Redis forgets its scripts": Fault(
        inject=_with_redis(lambda w: w.redis("SCRIPT", "FLUSH")), strikes="middle", redis=True
    ),
    "a message of another version": Fault(inject=_with_redis(_foreign_message), strikes="middle", redis=True),
    "the password is wrong": Fault(inject=_with_redis(_wrong_password), strikes="first", redis=True),
    "no Redis answers there": Fault(inject=_answers(b"HTTP/1.1 400 Bad Request\r\n\r\n"), strikes="first"),
    "Redis knows no command": Fault(inject=_answers(b"-ERR unknown command\r\n"), strikes="first"),
    "Redis is mute": Fault(inject=_answers(b""), strikes="first"),
}


# -- a process of its own ------------------------------------------------------------------------------------------------
class _Heard(logging.Handler):
    """What was logged, warnings and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


def _streamed(steps: Iterable[Any]) -> dict[str, Any]:
    """The text of each node, and the last state."""
    texts: dict[str, str] = {}
    last: Any = None
    for kind, step in steps:
        if kind == "values":
            last = step
        else:
            node = step[1]["langgraph_node"]
            texts[node] = texts.get(node, "") + step[0].text
    return {"texts": texts, "last": last}


async def _collected(steps: Any) -> list[Any]:
    return [step async for step in steps]


async def _once(way: str, app: Any, question: Any) -> tuple[Any, float]:
    """Run the graph one way: its result as JSON (or the error), and the seconds it took."""
    modes = ["messages", "values"]
    result: Any
    began_s = time.monotonic()
    try:
        if way == "invoke":
            result = await asyncio.to_thread(app.invoke, question)
        elif way == "stream":
            result = _streamed(await asyncio.to_thread(lambda: list(app.stream(question, stream_mode=modes))))
        elif way == "ainvoke":
            result = await app.ainvoke(question)
        else:
            result = _streamed(await _collected(app.astream(question, stream_mode=modes)))
    except Exception as e:
        return f"{type(e).__name__}: {e}", time.monotonic() - began_s
    state: dict[str, Any] = result.get("last") or result
    state["notes"] = sorted(state["notes"])  # two nodes side by side
    return json.loads(json.dumps(result)), time.monotonic() - began_s


WAYS: Final = ("invoke", "ainvoke", "stream", "astream")


async def _suffer(name: str, url: str) -> dict[str, Any]:
    """The graph with one fault."""
    fault, world = FAULTS[name], World()
    program = sample("constructs.fan_out")
    app = program.build(sample("support_triage").model_for)  # the server and model of the environment
    plain = {way: await _once(way, app, dict(program.INPUT)) for way in WAYS}
    heard = _Heard()
    logging.getLogger().addHandler(heard)
    from maestro_langgraph import maestro

    with contextlib.ExitStack() as stack:
        world.settings |= {"outage_after_s": OUTAGE_AFTER_S, "lease_s": LEASE_S}
        engine = EngineSpec(engine_id="a", url=url, model=MODEL, slots=1 if "full" in name else 16)
        if fault.redis:
            world.stack = stack.enter_context(Stack(Fleet(engines=(engine,)), keep=False))
            world.settings["redis_url"] = world.stack.redis_url
        else:
            file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fleet.toml"
            file.write_text(
                f'[[engine]]\nid = "a"\nmodel = "{MODEL}"\nurl = "{url}"\nslots = {engine.slots}\n', encoding="utf-8"
            )
            world.settings["fleet"] = str(file)
        if fault.strikes == "first":
            fault.inject(world)
        if world.settings.get("redis_url"):
            world.settings.pop("fleet", None)
        with contextlib.suppress(ConfigError):  # where that is the fault: the gate must live with it
            maestro.configure(**world.settings)
        if fault.strikes == "start":
            fault.inject(world)
        maestro.install()
        maestro.wrap(app)
        different: list[str] = []
        extra_s = 0.0
        for turn in range(ROUNDS):
            for way in WAYS:
                result, took_s = await _once(way, app, dict(program.INPUT))
                extra_s = max(extra_s, took_s - plain[way][1])
                if result != plain[way][0]:
                    different.append(f"{way}: {result if isinstance(result, str) else 'another result'}")
            if turn == 0 and fault.strikes == "middle":
                await asyncio.to_thread(fault.inject, world)
        lines = list(heard.lines)
        maestro.uninstall()
        Client.reset()
    failed_plain = [way for way, (result, _) in plain.items() if isinstance(result, str)]
    runs = ROUNDS * len(WAYS)
    return {
        "fault": name,
        "runs": runs,
        "same": runs - len(different),
        "different": different + [f"plain {way} failed" for way in failed_plain],
        "extra_s": extra_s,
        "lines": len(lines),
        "log": lines[: 2 * LINES],
        "reached": world.reached,
        "survived": not different and not failed_plain and world.reached and extra_s <= EXTRA_S and len(lines) <= LINES,
    }


# -- all of them ---------------------------------------------------------------------------------------------------------
def run(names: tuple[str, ...], say: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Inject the named faults, each in a process of its own."""
    rows: list[dict[str, Any]] = []
    stack = emulated(engines=1, profile="gpu", slots=16, args=("--speed", "20"))
    with contextlib.closing(_Stopping(stack.start(redis=False, scheduler=False))):
        url = stack.engines[0].url
        for name in names:
            rows.append(_in_child(name, url))
            say(rows[-1])
    return rows


@dataclass
class _Stopping:
    stack: Stack

    def close(self) -> None:
        self.stack.stop()


def _in_child(name: str, url: str) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAESTRO_", "OPENAI_"))}
    env |= {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if os.path.isdir(p or ".")),
        "OPENAI_BASE_URL": url,
        "OPENAI_API_KEY": "none",
        "MAESTRO_SAMPLE_MODEL": MODEL,
        "MAESTRO_LEASE_S": str(LEASE_S),  # the scheduler's too: so long it grants nothing after Redis came back empty
    }
    command = [sys.executable, "-m", "maestro_agents.cli.bench.gate_faults", name, url]
    with tempfile.TemporaryDirectory() as elsewhere:  # no maestro.toml of the user's
        try:
            done = subprocess.run(
                command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=True
            )
        except subprocess.TimeoutExpired:
            return _failed(name, f"it did not end within {LIMIT_S:g} s")
        except subprocess.CalledProcessError as e:
            return _failed(name, " ".join(e.stderr.strip().splitlines()[-1:]))
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _failed(name: str, why: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "runs": 0,
        "same": 0,
        "extra_s": 0.0,
        "lines": 0,
        "log": [],
        "reached": False,
        "survived": False,
    }
    return {"fault": name, "different": [why], **nothing}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_suffer(*sys.argv[1:]))))
