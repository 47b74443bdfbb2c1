"""Servers that outlive their agent for a while: taken over by the one that comes back, ended where none does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maestro_serving.keeper import started_at
from maestro_serving.processes import Kept
from maestro_serving.vllm import EngineCommand

# A server that starts a helper of its own, as vLLM starts its engine core, and ignores nobody.
SERVER = """
import subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(helper.pid))
print("serving", flush=True)
while True:
    time.sleep(0.05)
"""

# An agent: starts a server, says who it is, and renews its lease until it is killed.
AGENT = """
import sys, time
from pathlib import Path
from maestro_serving.processes import Kept
from maestro_serving.vllm import EngineCommand
kept = Kept(Path(sys.argv[1]), "e", lease_s=float(sys.argv[2]))
kept.spawn(EngineCommand(argv=(sys.executable, "-c", sys.argv[4], sys.argv[3])), port=8101, model="m")
print(kept.pid, flush=True)
while True:
    kept.renew()
    time.sleep(0.05)
"""


def eventually(true: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Processes are other people's clocks: ask again until the answer is yes or the time is up."""
    give_up_at = time.monotonic() + within_s
    while time.monotonic() < give_up_at:
        if true():
            return True
        time.sleep(0.02)
    return False


def command(tmp_path: Path, *more: str) -> EngineCommand:
    return EngineCommand(argv=(sys.executable, "-c", SERVER, str(tmp_path / "helper"), *more))


@pytest.fixture
def kept(tmp_path: Path):
    """A server's place; what is left there is ended."""
    found = Kept(tmp_path, "e", lease_s=60)
    yield found
    found.stop()


def helper(tmp_path: Path) -> int:
    file = tmp_path / "helper"
    assert eventually(lambda: file.exists() and file.read_text() != "")
    return int(file.read_text())


def agent(tmp_path: Path, lease_s: float) -> tuple[subprocess.Popen[str], int, int]:
    """An agent in a process of its own, its server, and what that started."""
    argv = [sys.executable, "-c", AGENT, str(tmp_path), str(lease_s), str(tmp_path / "helper"), SERVER]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, int(process.stdout.readline()), helper(tmp_path)


def test_a_server_and_all_it_started_end_together(kept: Kept, tmp_path: Path) -> None:
    """`stop` leaves neither the server, nor what it started, nor a file that says otherwise."""
    kept.spawn(command(tmp_path), port=8101, model="m")
    pid, child = kept.pid, helper(tmp_path)
    assert kept.alive()
    assert started_at(pid)
    kept.stop()
    assert eventually(lambda: not started_at(pid) and not started_at(child))
    assert not kept.alive()
    assert not (tmp_path / "e.json").exists()
    kept.stop()


def test_an_agent_that_comes_back_finds_its_server_running(tmp_path: Path) -> None:
    """Kill -9 of the agent, then a new one: the same server, the same pid, no restart."""
    process, pid, child = agent(tmp_path, lease_s=60)
    process.kill()
    process.wait()
    back = Kept(tmp_path, "e", lease_s=60)
    try:
        assert back.adopt(lambda _port: command(tmp_path), model="m")
        assert (back.pid, back.port) == (pid, 8101)
        assert back.alive()
        assert started_at(child)
    finally:
        back.stop()
    assert eventually(lambda: not started_at(pid) and not started_at(child))


def test_nothing_is_left_of_an_agent_that_does_not_come_back(tmp_path: Path) -> None:
    """After the lease the server ends, with all that it started."""
    process, pid, child = agent(tmp_path, lease_s=1.0)
    process.kill()
    process.wait()
    assert started_at(pid), "it outlives its agent at first"
    assert eventually(lambda: not started_at(pid) and not started_at(child) and not (tmp_path / "e.json").exists())


@pytest.mark.parametrize("other", ["model", "command", "port"])
def test_a_server_that_is_not_the_one_we_would_start_is_ended(kept: Kept, tmp_path: Path, other: str) -> None:
    """The fleet file has changed since: what runs is not what is wanted."""
    kept.spawn(command(tmp_path), port=8101, model="m")
    pid = kept.pid
    back = Kept(tmp_path, "e", lease_s=60)
    by = {
        "model": (lambda _port: command(tmp_path), "another"),
        "command": (lambda _port: command(tmp_path, "--more"), "m"),
        "port": (lambda port: command(tmp_path, str(port)), "m"),
    }[other]
    assert not back.adopt(by[0], model=by[1])
    assert eventually(lambda: not started_at(pid))


def test_a_pid_that_was_given_anew_is_nobody_of_ours(kept: Kept, tmp_path: Path) -> None:
    """A file from before, whose pids belong to others now, is not believed, and nobody else is ended."""
    kept.spawn(command(tmp_path), port=8101, model="m")
    file = tmp_path / "e.json"
    said = json.loads(file.read_text())
    kept.stop()
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        file.write_text(json.dumps({**said, "pid": stranger.pid, "keeper": stranger.pid}))
        back = Kept(tmp_path, "e", lease_s=60)
        assert not back.adopt(lambda _port: command(tmp_path), model="m")
        assert stranger.poll() is None
        assert not file.exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_damaged_file_is_not_believed(tmp_path: Path) -> None:
    """Half a file, or none, is no server."""
    back = Kept(tmp_path, "e")
    assert not back.adopt(lambda _port: command(tmp_path), model="m")
    (tmp_path / "e.json").write_text('{"pid": 1')
    assert not back.adopt(lambda _port: command(tmp_path), model="m")
    (tmp_path / "e.json").write_text('{"pid": 1}')
    assert not back.adopt(lambda _port: command(tmp_path), model="m")


def test_a_server_whose_keeper_was_killed_does_not_stay(kept: Kept, tmp_path: Path) -> None:
    """Nobody would end it: it counts as dead, and is cleared away with what it started."""
    kept.spawn(command(tmp_path), port=8101, model="m")
    said = json.loads((tmp_path / "e.json").read_text())
    child = helper(tmp_path)
    os.kill(said["keeper"], signal.SIGKILL)
    assert eventually(lambda: not kept.alive())
    kept.stop()
    assert eventually(lambda: not started_at(said["pid"]) and not started_at(child))


def test_a_server_that_dies_is_seen_to_be_dead(kept: Kept, tmp_path: Path) -> None:
    """Kill -9 of the server alone: its helper goes too."""
    kept.spawn(command(tmp_path), port=8101, model="m")
    child = helper(tmp_path)
    os.kill(kept.pid, signal.SIGKILL)
    assert eventually(lambda: not kept.alive())
    assert eventually(lambda: not started_at(child))


def test_a_log_stays_bounded(tmp_path: Path) -> None:
    """A server that talks without end fills no disk: its log is begun anew, the one before is kept."""
    talks = "import time\nwhile True:\n print('x' * 1000, flush=True); time.sleep(0.001)"
    kept = Kept(tmp_path, "e", lease_s=60, log_bytes=20_000)
    kept.spawn(EngineCommand(argv=(sys.executable, "-c", talks)), port=8101, model="m")
    try:
        before = tmp_path / "e.log.1"
        assert eventually(before.exists)
        first = before.stat().st_mtime_ns
        assert eventually(lambda: before.stat().st_mtime_ns != first)
        assert kept.log.stat().st_size < 2_000_000
    finally:
        kept.stop()


def test_a_program_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    """No keeper is left behind for it."""
    with pytest.raises(FileNotFoundError, match="there is no program 'no-such-vllm'"):
        Kept(tmp_path, "e").spawn(EngineCommand(argv=("no-such-vllm",)), port=1, model="m")
