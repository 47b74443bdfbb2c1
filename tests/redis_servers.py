"""Redis in every way that an operator runs it, for tests: over TLS, behind Sentinels, as a Cluster. Real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Protocol, Self, TypeVar

import pytest
import redis
import trustme

from maestro_agents import guard
from maestro_agents.queue.embedded import free_port

PATIENCE_S = 30.0


def until(condition: Callable[[], object], what: str, *, within_s: float = PATIENCE_S) -> None:
    """Wait for a condition; an error of Redis counts as not yet."""
    give_up_at = time.monotonic() + within_s
    while time.monotonic() < give_up_at:
        with contextlib.suppress(redis.RedisError, OSError):
            if condition():
                return
        time.sleep(0.02)
    raise TimeoutError(f"not within {within_s:g} s: {what}")


@cache
def server_program() -> str:
    """A redis-server of at least version 7, which ACL key permissions need; the test is skipped where there is none."""
    for folder in (*os.get_exec_path(), "/usr/bin", "/usr/local/bin"):
        if program := shutil.which("redis-server", path=folder):
            said = subprocess.run([program, "--version"], check=False, capture_output=True, text=True).stdout
            if " v=" in said and int(said.split(" v=")[1].split(".")[0]) >= 7:
                return program
    pytest.skip("no redis-server 7 on PATH: install one (apt install redis-server)")


class Certificates:
    """A CA, a server's certificate for loopback, and a client's, as files."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.server = self.ca.issue_cert("127.0.0.1", "localhost")
        self.client = self.ca.issue_cert("app@maestro.test")
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        for name, issued in (("server", self.server), ("client", self.client)):
            issued.private_key_pem.write_to_path(folder / f"{name}.key")
            issued.cert_chain_pems[0].write_to_path(folder / f"{name}.crt")
        self.folder = folder

    @property
    def query(self) -> str:
        """What a URL says to be let in by a server that asks for a client's certificate."""
        return f"ssl_ca_certs={self.ca_file}&ssl_certfile={self.folder}/client.crt&ssl_keyfile={self.folder}/client.key"


class Server:
    """One redis-server (or sentinel) on loopback."""

    def __init__(self, folder: Path, *options: str, port: int = 0, program: str = "") -> None:
        self.folder = folder
        self.port = port or free_port()
        self._program = program or server_program()
        self._options = options
        self._process: guard.Guarded | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *, wait: bool = True) -> Self:
        listen = () if "--tls-port" in self._options else ("--port", str(self.port))
        first = (str(self.folder / "sentinel.conf"), "--sentinel") if (self.folder / "sentinel.conf").exists() else ()
        self._process = guard.spawn(
            [
                *(self._program, *first, *listen, "--bind", "127.0.0.1", "--dir", str(self.folder)),
                *(() if first else ("--save", "")),
                *self._options,
            ],
            log=self.folder / "redis.log",
        )
        if wait and listen:
            until(
                lambda: self.say("PING"), f"a server on {self.port}: {(self.folder / 'redis.log').read_text()[-300:]}"
            )
        return self

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def kill(self) -> None:
        """kill -9."""
        assert self._process
        self._process.kill()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self._process.stop()

    def say(self, *words: str | int, **who: str) -> object:
        """One command to this very server, in a connection of its own."""
        with redis.Redis(port=self.port, decode_responses=True, socket_timeout=5, protocol=2, **who) as r:  # type: ignore[arg-type]
            return r.execute_command(*words)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def role(self) -> str:
        said = self.say("ROLE")
        assert isinstance(said, list)
        return str(said[0])


class Sentinels:
    """A master, a replica and Sentinels that fail over within about a second."""

    def __init__(self, folder: Path, *, sentinels: int = 3, password: str = "") -> None:
        auth = ("--requirepass", password, "--masterauth", password) if password else ()
        self.who = {"password": password} if password else {}
        self.servers = [Server(folder / f"r{i}", *auth, "--repl-diskless-sync-delay", "0") for i in range(2)]
        self.sentinels = [Server(folder / f"s{i}") for i in range(sentinels)]
        self.password = password
        for sentinel in self.sentinels:
            lines = [
                f"sentinel monitor mymaster 127.0.0.1 {self.servers[0].port} {sentinels // 2 + 1}",
                "sentinel down-after-milliseconds mymaster 500",
                "sentinel failover-timeout mymaster 2000",
                *([f"sentinel auth-pass mymaster {password}"] if password else []),
            ]
            (sentinel.folder / "sentinel.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> Self:
        for server in self.servers:
            server.start(wait=False)
        for server in self.servers:
            until(lambda server=server: server.say("PING", **self.who), "a server")
        self.servers[1].say("REPLICAOF", "127.0.0.1", self.servers[0].port, **self.who)
        for sentinel in self.sentinels:
            sentinel.start(wait=False)
        for sentinel in self.sentinels:
            until(lambda sentinel=sentinel: self._seen(sentinel) == (1, len(self.sentinels) - 1), "Sentinels that know each other")  # fmt: skip
        return self

    @staticmethod
    def _seen(sentinel: Server) -> tuple[int, int]:
        said = sentinel.say("SENTINEL", "MASTER", "mymaster")
        fields = said if isinstance(said, dict) else dict(zip(said[::2], said[1::2], strict=True))  # type: ignore[index]
        return int(fields["num-slaves"]), int(fields["num-other-sentinels"])

    @property
    def master(self) -> Server:
        """The one that Sentinels name now."""
        said = self.sentinels[0].say("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
        assert isinstance(said, list | tuple)
        return next(s for s in self.servers if s.port == int(said[1]))

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{s.port}" for s in self.sentinels)
        return f"redis+sentinel://{f':{self.password}@' if self.password else ''}{hosts}/mymaster"

    def stop(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.stop()


class Cluster:
    """Three masters with a third of the slots each."""

    def __init__(self, folder: Path) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        self.servers = [Server(folder / f"c{i}", *options, "--cluster-port", str(free_port())) for i in range(3)]

    def start(self) -> Self:
        for server in self.servers:
            server.start(wait=False)
        for i, server in enumerate(self.servers):
            until(lambda server=server: server.say("PING"), "a server")
            server.say("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            server.say("CLUSTER", "ADDSLOTSRANGE", i * 16384 // 3, (i + 1) * 16384 // 3 - 1)
            if i:
                first = self.servers[0]
                bus = first._options[first._options.index("--cluster-port") + 1]
                server.say("CLUSTER", "MEET", "127.0.0.1", first.port, bus)
        for server in self.servers:
            until(lambda server=server: self._whole(server), "a cluster of three")
        return self

    @staticmethod
    def _whole(server: Server) -> bool:
        info = server.say("CLUSTER", "INFO")
        said = info if isinstance(info, dict) else dict(x.split(":") for x in str(info).split())
        return said["cluster_state"] == "ok" and said["cluster_known_nodes"] == "3"

    def move_slot(self, slot: int, *, to: Server) -> None:
        """Move a slot with its keys, as ``redis-cli --cluster reshard`` does."""
        names = {s.port: str(s.say("CLUSTER", "MYID")) for s in self.servers}
        of = next(s for s in self.servers if s is not to and s.say("CLUSTER", "COUNTKEYSINSLOT", slot))
        to.say("CLUSTER", "SETSLOT", slot, "IMPORTING", names[of.port])
        of.say("CLUSTER", "SETSLOT", slot, "MIGRATING", names[to.port])
        while keys := of.say("CLUSTER", "GETKEYSINSLOT", slot, 100):
            assert isinstance(keys, list)
            of.say("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
        for server in (to, of, *self.servers):
            server.say("CLUSTER", "SETSLOT", slot, "NODE", names[to.port])

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{s.port}" for s in self.servers[:2])

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


class Terminator:
    """TLS in front of a Redis that has none: what a cloud's load balancer or stunnel does. Asks for a client certificate."""

    def __init__(self, certificates: Certificates, behind_port: int) -> None:
        self.port = 0
        self._behind = behind_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificates.server.configure_cert(self._context)
        certificates.ca.configure_trust(self._context)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> Self:
        self._thread.start()
        made = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context), self._loop
        )
        self.port = made.result(5).sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._behind)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            with contextlib.suppress(Exception):
                sink.close()

        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    def stop(self) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


class _Runs(Protocol):
    def start(self) -> Self: ...
    def stop(self) -> None: ...


R = TypeVar("R", bound=_Runs)


@contextlib.contextmanager
def running(it: R) -> Iterator[R]:
    """Start it, and stop it whatever happened."""
    try:
        yield it.start()
    finally:
        it.stop()


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder with a short name."""
    with tempfile.TemporaryDirectory(prefix="mr-") as name:
        yield Path(name)


def tls_server(home: Path, certificates: Certificates) -> Server:
    """A redis-server that speaks TLS itself and asks for a client certificate; skipped where it was built without."""
    program = server_program()
    port = free_port()
    f = certificates.folder
    options = (
        *("--port", "0", "--tls-port", str(port), "--tls-auth-clients", "yes", "--tls-ca-cert-file", str(certificates.ca_file)),
        *("--tls-cert-file", f"{f}/server.crt", "--tls-key-file", f"{f}/server.key"),
    )  # fmt: skip
    server = Server(home, *options, port=port, program=program).start()
    url = f"rediss://127.0.0.1:{port}/0?{certificates.query}"
    with redis.Redis.from_url(url) as r:

        def answers() -> bool:
            if "Bad directive" in (home / "redis.log").read_text():
                pytest.skip("this redis-server was built without TLS")
            return bool(r.ping())

        until(answers, "a server that speaks TLS")
    return server
