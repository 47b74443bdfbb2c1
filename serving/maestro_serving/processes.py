"""Engines as child processes: started, waited for, restarted when they die, ended with all they started.

Each stands under `maestro_agents.guard`, so that a kill -9 of us leaves nothing behind; that matters, since vLLM's
engine core and worker outlive their API server for ever when that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx

from maestro_agents import guard
from maestro_agents.core import EngineSpec
from maestro_agents.errors import EngineUnavailable
from maestro_agents.fleet import Launch
from maestro_serving.vllm import EngineCommand, vllm_command, vllm_program

START_LIMIT_S: Final = 180.0
"""How long an engine may take until it is healthy. vLLM on two loaded cores took 84 s."""

GRACE_S: Final = 10.0
_FIRST_BACKOFF_S: Final = 1.0
_LAST_BACKOFF_S: Final = 30.0
_STABLE_S: Final = 60.0
"""After so long in good health a death counts as the first again."""
_LOOK_EVERY_S: Final = 0.2
_TAIL_LINES: Final = 12
_PORT_LIMIT_S: Final = 5.0

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
        await asyncio.to_thread(self._port_is_free)  # else another server's good health would pass for ours
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
            await self._healthy()
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
        backoff_s = _FIRST_BACKOFF_S
        while True:
            since_s = time.monotonic()
            while self.alive():
                await asyncio.sleep(_LOOK_EVERY_S)
            if time.monotonic() - since_s > _STABLE_S:
                backoff_s = _FIRST_BACKOFF_S
            self._notice(f"engine {self.engine_id} ended; it is started again in {backoff_s:g} s (log: {self.log})")
            await self.stop()
            await asyncio.sleep(backoff_s)
            backoff_s = min(_LAST_BACKOFF_S, 2 * backoff_s)
            self.restarts += 1
            try:
                await self.start()
            except EngineUnavailable as e:
                self._notice(str(e))
            else:
                self._notice(f"engine {self.engine_id} is back at {self.url}")

    def _port_is_free(self) -> None:
        """Raise `EngineUnavailable` where somebody else listens. One that has just died may take a moment to let go."""
        address = urlsplit(self.url)
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
                            f"engine {self.engine_id}: port {address.port} is taken ({e.strerror}): "
                            "end what listens there, or give another launch.port"
                        ) from None
                else:
                    return
            time.sleep(_LOOK_EVERY_S)

    async def _healthy(self) -> None:
        deadline_s = time.monotonic() + self._start_limit_s
        health = f"{self.url.removesuffix('/v1')}/health"
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as http:
            while True:
                if not self.alive():
                    raise EngineUnavailable(f"engine {self.engine_id} ended while it started. {self._tail()}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(health)).status_code == 200:
                        return
                if time.monotonic() > deadline_s:
                    raise EngineUnavailable(
                        f"engine {self.engine_id} was not healthy after {self._start_limit_s:g} s. {self._tail()}"
                    )
                await asyncio.sleep(_LOOK_EVERY_S)

    def _tail(self) -> str:
        """The end of what this start wrote to its log."""
        with self.log.open("rb") as f:
            f.seek(max(self._log_from, self.log.stat().st_size - 8192))
            lines = f.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        said = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
        return f"The end of {self.log}:\n{said}"
