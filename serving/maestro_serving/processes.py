"""Engines as child processes: started, waited for, restarted when they die, ended with all they started.

Each stands under `maestro_agents.guard`, so that a kill -9 of us leaves nothing behind; that matters, since vLLM's
engine core and worker outlive their API server for ever when that is killed. A node agent's servers stand under
`maestro_serving.keeper` instead (`Kept`): they outlive it for `LEASE_S`, and are taken over by the agent that comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from maestro_agents import guard
from maestro_agents.core import EngineSpec
from maestro_agents.errors import EngineUnavailable
from maestro_agents.fleet import Launch
from maestro_serving import keeper
from maestro_serving.keeper import started_at
from maestro_serving.vllm import EngineCommand, vllm_command, vllm_program

START_LIMIT_S: Final = 180.0
"""How long an engine may take until it is healthy. vLLM on two loaded cores took 84 s."""

GRACE_S: Final = 10.0
_FIRST_BACKOFF_S: Final = 0.5
_LAST_BACKOFF_S: Final = 30.0
_STABLE_S: Final = 60.0
"""After so long in good health a death counts as the first again."""
_LOOK_EVERY_S: Final = 0.2
_KEEPER_EVERY_S: Final = 0.05
_TAIL_LINES: Final = 12
_PORT_LIMIT_S: Final = 5.0

LEASE_S: Final = 30.0
"""So long a server outlives an agent that was killed: enough for a supervisor to start it again, little for a GPU to be held by
nobody. Agents renew at every heartbeat.
"""

LOG_BYTES: Final = 16 << 20
"""A server's log is begun anew when it is larger; the one before is kept beside it (``.1``)."""

Notice = Callable[[str], None]
"""Told, in one line each, what happens to an engine."""


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def engine_command(spec: EngineSpec, launch: Launch, *, port: int) -> EngineCommand:
    """The command that starts an engine of the fleet file on a port of loopback. Raises `ConfigError`."""
    name = spec.served_model or spec.model
    if launch.kind == "vllm":
        return vllm_command(
            program=vllm_program(),
            model=launch.model_path or spec.model,
            served_model=name,
            port=port,
            max_num_seqs=spec.slots,
            max_model_len=spec.max_model_len,
            kv_cache_memory_bytes=launch.kv_cache_memory_bytes,
            cpu_core=launch.cpu_core,
            args=launch.args,
        )
    argv = [sys.executable, "-m", "maestro_agents.cli", "emulate", "--model", name, "--port", str(port)]
    argv += ["--profile", launch.profile, "--max-num-seqs", str(spec.slots)]
    if spec.max_model_len:
        argv += ["--max-model-len", str(spec.max_model_len)]
    # The child must find what we found, in an editable checkout as in an installed wheel.
    return EngineCommand(argv=(*argv, *launch.args), env={"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})


def kept_pid(folder: Path, name: str) -> int:
    """The process of a server that `Kept` runs under this name, 0 where none is known."""
    try:
        return int(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["pid"])
    except (OSError, ValueError, KeyError):
        return 0


class Kept:
    """A server that outlives its agent for ``lease_s``: run by a keeper, known by a file in ``folder``.

    One name is one server. Methods that wait block; they are for a thread.
    """

    def __init__(self, folder: Path, name: str, *, lease_s: float = LEASE_S, log_bytes: int = LOG_BYTES) -> None:
        self._file = folder / f"{name}.json"
        self._lease = folder / f"{name}.lease"
        self.log = folder / f"{name}.log"
        self._lease_s = lease_s
        self._log_bytes = log_bytes
        self._popen: subprocess.Popen[bytes] | None = None
        self._said: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """The server's own process, 0 while none is known."""
        return int(self._said.get("pid", 0))

    @property
    def port(self) -> int:
        """Where it listens, as it was started."""
        return int(self._said.get("port", 0))

    def alive(self) -> bool:
        """The server runs, and somebody keeps it. One that has lost its keeper counts as dead (`stop` clears it away)."""
        if self._popen is not None:
            return self._popen.poll() is None
        return bool(self._said) and started_at(int(self._said["keeper"])) == self._said["keeper_started"]

    def renew(self) -> None:
        """Say that the agent lives."""
        with contextlib.suppress(OSError):
            self._lease.touch()

    def spawn(self, command: EngineCommand, *, port: int, model: str, grace_s: float = GRACE_S) -> None:
        """Start a server. Raises FileNotFoundError where there is no such program."""
        if shutil.which(command.argv[0]) is None:
            raise FileNotFoundError(f"there is no program {command.argv[0]!r}")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self.renew()
        said = {
            "file": str(self._file.resolve()),
            "lease": str(self._lease.resolve()),
            "log": str(self.log.resolve()),
            "lease_s": self._lease_s,
            "grace_s": grace_s,
            "log_bytes": self._log_bytes,
            "port": port,
            "model": model,
            "command": _digest(command),
        }
        with self.log.open("ab") as out:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, json.dumps(said), *command.argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=out,
                env={**os.environ, **command.env},
                start_new_session=True,  # neither Ctrl-C nor the end of our terminal reaches it
            )
        assert self._popen.stdout is not None  # a pipe was asked for
        with self._popen.stdout as pipe:
            line = pipe.readline()
        if not line.strip():
            self._popen.wait(grace_s)
            raise FileNotFoundError(f"{command.argv[0]} could not be started: see {self.log}")
        self._said = json.loads(self._file.read_text(encoding="utf-8"))

    def adopt(self, command: Callable[[int], EngineCommand], *, model: str) -> bool:
        """Take over the server that an agent before us started.

        It must be the one that we would start: the same process (pid and start), on its port, of the same model, by the
        ``command`` that we would use at that port, and kept. One that is not is ended here, with all that it started.
        """
        try:
            said: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            self._said = said
            same = (
                self.alive()
                and started_at(int(said["pid"])) == said["pid_started"]
                and said["model"] == model
                and said["command"] == _digest(command(int(said["port"])))
            )
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if same:
            self.renew()
            return True
        self.stop()
        return False

    def stop(self) -> None:
        """End the server and all that it started. Idempotent."""
        said, self._said, popen, self._popen = self._said, {}, self._popen, None
        if not said:
            return
        try:
            keeper_pid, pid = int(said["keeper"]), int(said["pid"])
            limit_s = float(said["grace_s"]) + 5
            running = started_at(keeper_pid) == said["keeper_started"]
            if running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(keeper_pid, signal.SIGTERM)
                give_up_s = time.monotonic() + limit_s
                while started_at(keeper_pid) == said["keeper_started"] and time.monotonic() < give_up_s:
                    if popen is not None:
                        popen.poll()
                    time.sleep(_KEEPER_EVERY_S)
            # A keeper that was killed could not clear away its server, nor what that left behind.
            if started_at(pid) == said["pid_started"] or (not running and _same_group(pid)):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        except (KeyError, ValueError, TypeError):
            pass  # not a file of ours: there is nobody to end
        if popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(5)
        self._file.unlink(missing_ok=True)


def _same_group(pgid: int) -> bool:
    """Whether what is left of a group whose leader is gone is ours: its pid cannot have been given anew while it lives."""
    try:
        os.killpg(pgid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return not started_at(pgid)


def _digest(command: EngineCommand) -> str:
    """What tells one way to start a server from another; PYTHONPATH is about where we are installed."""
    env = sorted((k, v) for k, v in command.env.items() if k != "PYTHONPATH")
    return hashlib.sha256(json.dumps([command.argv, env]).encode()).hexdigest()[:16]


class EngineProcess:
    """One engine and its process. Everything is said through ``notice``; the engine's own output goes to ``log``."""

    def __init__(
        self,
        engine_id: str,
        command: EngineCommand,
        *,
        url: str,
        log: Path,
        start_limit_s: float = START_LIMIT_S,
        grace_s: float = GRACE_S,
        notice: Notice = lambda _line: None,
    ) -> None:
        self.engine_id = engine_id
        #: Ends in ``/v1``.
        self.url = url
        self.log = log
        self.restarts = 0
        self._command = command
        self._start_limit_s = start_limit_s
        self._grace_s = grace_s
        self._notice = notice
        self._process: guard.Guarded | None = None
        self._log_from = 0

    @property
    def pid(self) -> int:
        """The server's own process, 0 while there is none."""
        return self._process.pid if self._process else 0

    def alive(self) -> bool:
        return self._process is not None and self._process.alive()

    async def start(self) -> None:
        """Start it and wait until it is healthy. Raises `EngineUnavailable`, with the end of its log, where it is not."""
        # Else another server's good health would pass for ours.
        await asyncio.to_thread(wait_for_port, self.engine_id, self.url)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        env = {**os.environ, **self._command.env}
        try:
            self._process = await asyncio.to_thread(
                guard.spawn, self._command.argv, log=self.log, env=env, grace_s=self._grace_s
            )
        except FileNotFoundError as e:
            raise EngineUnavailable(f"engine {self.engine_id}: {e}") from None
        try:
            await until_healthy(
                self.engine_id,
                self.url,
                self.alive,
                limit_s=self._start_limit_s,
                log=self.log,
                log_from=self._log_from,
            )
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End it: SIGTERM, the grace period, then SIGKILL for all it started. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            await asyncio.shield(asyncio.to_thread(process.stop))

    async def keep(self) -> None:
        """Restart it whenever it dies, later each time, until cancelled. It must have been started."""

        def ended(backoff_s: float) -> None:
            self._notice(f"engine {self.engine_id} ended; it is started again in {backoff_s:g} s (log: {self.log})")

        async def again() -> None:
            self.restarts += 1
            try:
                await self.start()
            except EngineUnavailable as e:
                self._notice(str(e))
            else:
                self._notice(f"engine {self.engine_id} is back at {self.url}")

        await keep_alive(self.alive, ended, self.stop, again, every_s=_LOOK_EVERY_S)


async def keep_alive(
    alive: Callable[[], bool],
    ended: Callable[[float], None],
    stop: Callable[[], Awaitable[None]],
    again: Callable[[], Awaitable[None]],
    *,
    every_s: float,
) -> None:
    """Until cancelled, look every ``every_s`` whether a process is alive; stop and start one that is not, later each time.

    ``ended`` is told the seconds until then. ``again`` says itself what went wrong.
    """
    backoff_s = _FIRST_BACKOFF_S
    while True:
        since_s = time.monotonic()
        while alive():
            await asyncio.sleep(every_s)
        if time.monotonic() - since_s > _STABLE_S:
            backoff_s = _FIRST_BACKOFF_S
        ended(backoff_s)
        await stop()
        await asyncio.sleep(backoff_s)
        backoff_s = min(_LAST_BACKOFF_S, 2 * backoff_s)
        await again()


def wait_for_port(engine_id: str, url: str) -> None:
    """Raise `EngineUnavailable` where somebody else listens. One that has just died may take a moment to let go."""
    address = urlsplit(url)
    if address.port is None:
        return
    give_up_s = time.monotonic() + _PORT_LIMIT_S
    while True:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((address.hostname or "127.0.0.1", address.port))
            except OSError as e:
                if time.monotonic() > give_up_s:
                    raise EngineUnavailable(
                        f"engine {engine_id}: port {address.port} is taken ({e.strerror}): "
                        "end what listens there, or give another launch.port"
                    ) from None
            else:
                return
        time.sleep(_LOOK_EVERY_S)


async def until_healthy(
    engine_id: str, url: str, alive: Callable[[], bool], *, limit_s: float, log: Path, log_from: int
) -> None:
    """Wait until a server is healthy. Raises `EngineUnavailable`, with the end of its log, where it ends or takes too long."""
    deadline_s = time.monotonic() + limit_s
    health = f"{url.removesuffix('/v1')}/health"
    async with httpx.AsyncClient(timeout=2.0, trust_env=False) as http:
        while True:
            if not alive():
                raise EngineUnavailable(f"engine {engine_id} ended while it started. {_tail(log, log_from)}")
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get(health)).status_code == 200:
                    return
            if time.monotonic() > deadline_s:
                raise EngineUnavailable(
                    f"engine {engine_id} was not healthy after {limit_s:g} s. {_tail(log, log_from)}"
                )
            await asyncio.sleep(_LOOK_EVERY_S)


def _tail(log: Path, log_from: int) -> str:
    """The end of what this start wrote to its log."""
    lines: Sequence[str] = ()
    with contextlib.suppress(OSError), log.open("rb") as f:
        size = log.stat().st_size
        f.seek(max(log_from if log_from <= size else 0, size - 8192))
        lines = f.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    said = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
    return f"The end of {log}:\n{said}"
