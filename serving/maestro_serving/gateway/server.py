"""The gateway's sockets: time-outs of a caller who sends nothing, cutting off one who reads nothing, an orderly end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors import Multiprocess

from maestro_agents.settings import Settings
from maestro_serving.emulator import listen, url_of
from maestro_serving.gateway.app import ABORT, MAX_BODY_BYTES, Gateway

HEADER_S: Final = 15.0
"""The head of a request must have come within so many seconds of its connection, or of its first byte."""

KEEP_ALIVE_S: Final = 30
"""A connection without a request is closed after so long."""

DRAIN_S: Final = 120
"""At SIGTERM no new call is taken; those that were may take so long to end."""

PARENT_S: Final = 1.0
"""How often a worker process looks whether its parent lives."""

_OPTIONS_ENV: Final = "_MAESTRO_GATEWAY"
"""How a worker process learns its options."""


class Connection(H11Protocol):
    """A caller's connection. h11 bounds the head of a request at 64 kB."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, ABORT: transport.abort}
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._busy():
            self._forget()
        elif self._head is None and not self.transport.is_closing():
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _busy(self) -> bool:
        cycle: Any = self.cycle  # None before the first request
        return cycle is not None and not cycle.response_complete

    def _expect(self) -> None:
        self._head = self.loop.call_later(HEADER_S, self._late)

    def _forget(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _late(self) -> None:
        self._head = None
        if not self._busy():
            self.transport.abort()


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `maestro gateway` was told beside its settings."""

    redis_url: str | None = None
    pool: str | None = None
    #: Whose every call is, without keys; None: keys say it.
    tenant: str | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    cors: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def gateway(self) -> Gateway:
        settings = Settings.load(redis_url=self.redis_url, pool=self.pool)
        return Gateway(settings, tenant=self.tenant, max_body_bytes=self.max_body_bytes, cors=self.cors)


def worker() -> ASGIApp:
    """The application of one of several worker processes."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    said: Any = json.loads(os.environ[_OPTIONS_ENV])
    return Options(**said).gateway().app


def server_of(gateway: Gateway, on_ready: Callable[[], None] = lambda: None, **more: Any) -> uvicorn.Server:
    """What serves a gateway until SIGINT or SIGTERM, and says when it listens."""
    return _Server(_config(gateway.app, **more), on_ready)


def run(options: Options, *, host: str, port: int, workers: int, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, which let the calls that were taken end. Raises OSError where the port is taken."""
    tls = {"ssl_certfile": options.ssl_certfile, "ssl_keyfile": options.ssl_keyfile}
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again after its orderly end
        signal.signal(number, _nothing)
    with listen(host, port) as listener:
        url = url_of(listener)
        if options.ssl_certfile:
            url = url.replace("http://", "https://", 1)
        if workers == 1:
            server_of(options.gateway(), lambda: on_ready(url), **tls).run(sockets=[listener])
            return
        os.environ[_OPTIONS_ENV] = json.dumps(dataclasses.asdict(options))
        config = _config("maestro_serving.gateway.server:worker", factory=True, workers=workers, **tls)
        listener.listen(config.backlog)  # who comes before the first worker waits
        on_ready(url)
        Multiprocess(config, sockets=[listener]).run()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed serves nobody."""
    while os.getppid() == parent:
        time.sleep(PARENT_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _nothing(_number: int, _frame: object) -> None:
    """It was obeyed."""


def _config(app: Any, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
        **more,
    )
