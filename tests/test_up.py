"""The command line, and `maestro up`: a fleet that starts, comes back from faults, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maestro_agents import __version__
from maestro_agents.cli import COMMANDS, main
from maestro_agents.cli.up import Stack
from maestro_agents.errors import MaestroError
from maestro_agents.fleet import load_fleet
from maestro_agents.queue.embedded import find_server, ping

needs_server = pytest.mark.skipif(find_server() is None, reason="no Redis server here")

FLEET = """
[[engine]]
id = "a"
model = "tiny"
[engine.launch]
kind = "emulator"
"""


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


def eventually(true: Callable[[], bool], within_s: float = 15.0) -> bool:
    """Processes are other people's clocks: ask again until the answer is yes or the time is up."""
    give_up_at = time.monotonic() + within_s
    while time.monotonic() < give_up_at:
        with contextlib.suppress(OSError, MaestroError):
            if true():
                return True
        time.sleep(0.05)
    return False


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def listens(url: str) -> bool:
    host, port = url.removeprefix("http://").partition("/")[0].split(":")
    with socket.create_connection((host, int(port)), 1):
        return True


# -- the command -------------------------------------------------------------------------------------------------------
def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


def test_help_names_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """`maestro --help` teaches: what there is, and how each is called."""
    status, out, _ = said(capsys, "--help")
    text = " ".join(out.split())
    assert status == 0
    assert all(f"Example: {entry.example}" in text for entry in COMMANDS)


@pytest.mark.parametrize("name", [entry.name for entry in COMMANDS])
def test_every_command_has_help_of_its_own(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Each command loads, and shows its options and its example."""
    status, out, _ = said(capsys, name, "--help")
    assert status == 0
    assert "Example: maestro" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`maestro --version` is one line."""
    assert said(capsys, "--version") == (0, f"maestro {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["up", "none.toml"], "none.toml: there is no such file"),
        (["scheduler"], "which fleet? Name it: maestro scheduler --fleet fleet.toml"),
        (["scheduler", "--fleet", "fleet.toml"], "which Redis? Give --redis-url"),
        (["scheduler", "--fleet", "fleet.toml", "--redis-url", "redis://127.0.0.1:1/0"], "does not answer"),
        (["scheduler", "--fleet", "fleet.toml", "--redis-url", "127.0.0.1:1"], "a Redis URL starts with redis://"),
        (["scheduler", "--fleet", "open.toml", "--redis-url", "redis://127.0.0.1:1"], "has no address yet"),
        (["scheduler", "--fleet", "bad.toml"], "bad.toml:2: not valid TOML"),
        (["emulate", "--profile", "h100"], "there is no profile 'h100': known are cpu-tiny, gpu"),
        (["emulate", "--scheduling-policy", "lifo"], "there is no scheduling policy 'lifo'"),
    ],
)
def test_wrong_input_is_one_clear_line(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    """No traceback: one line on stderr, status 2."""
    Path("fleet.toml").write_text('[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1/v1"\n')
    Path("open.toml").write_text(FLEET)
    Path("bad.toml").write_text('pool = "p"\n[[engine]\n')
    status, out, err = said(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("maestro: ")
    assert says in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """MAESTRO_DEBUG=1 lets the error through as it is."""
    monkeypatch.setenv("MAESTRO_DEBUG", "1")
    with pytest.raises(MaestroError):
        main(["up", "none.toml"])


# -- the stack ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def stack(fleet_file: Path, tmp_path: Path) -> Iterator[Stack]:
    if find_server() is None:
        pytest.skip("no Redis server here")
    with Stack(load_fleet(fleet_file), logs=tmp_path / "logs", appendonly=True) as running_stack:
        yield running_stack


def test_a_stack_comes_back_from_three_kills_and_leaves_nothing(stack: Stack) -> None:
    """Scheduler, engine and Redis are killed -9 and started again where they were; stop ends them all."""
    before = stack.pids()
    assert set(before) == {"redis", "scheduler", "engine a"}
    (engine,) = stack.engines
    stack.kill_scheduler()
    stack.kill_engine("a")
    stack.restart_redis(kill=True)
    assert eventually(lambda: set(stack.pids().values()).isdisjoint(before.values()) and len(stack.pids()) == 3)
    assert eventually(lambda: listens(engine.url))
    assert ping(stack.redis_url).process_id == stack.pids()["redis"]
    after = [*before.values(), *stack.pids().values()]
    stack.stop()
    assert eventually(lambda: not any(running(pid) for pid in after), within_s=10)


def test_a_redis_that_dies_by_itself_is_started_again(stack: Stack) -> None:
    """Nobody asked for the restart: the keeper saw the death."""
    pid = stack.pids()["redis"]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: ping(stack.redis_url).process_id not in (0, pid))


def test_a_second_policy_takes_the_place_of_the_first(stack: Stack) -> None:
    """The same engines under another order and in another pool, as the demo compares them."""
    first = stack.pids()["scheduler"]
    stack.start_scheduler(policy="fcfs", pool="second")
    assert not running(first)
    assert stack.fleet.pool == "second"
    assert set(stack.pids()) == {"redis", "scheduler", "engine a"}


@needs_server
def test_an_engine_that_cannot_start_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    """The reason is in the error, and what was started before is ended."""
    (tmp_path / "fleet.toml").write_text(FLEET + 'profile = "no-such"\n')
    stack = Stack(load_fleet(tmp_path / "fleet.toml"), logs=tmp_path / "logs")
    with pytest.raises(MaestroError, match="there is no profile 'no-such'"):
        stack.start()
    assert stack.pids() == {}


@needs_server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_up_ends_with_all_it_started(fleet_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    """`maestro up` prints how to join; however it ends, no process of it is left within 10 s."""
    up = subprocess.Popen(
        [sys.executable, "-m", "maestro_agents.cli", "up", str(fleet_file), "--logs", str(tmp_path / "logs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert up.stdout
    out: list[str] = []
    for line in up.stdout:
        out.append(line)
        if "export MAESTRO_REDIS_URL=" in line:
            break
    url = out[-1].strip().partition("=")[2]
    pids = [ping(url).process_id, *children_of(up.pid)]
    assert len(pids) >= 7  # Redis, an engine and a scheduler, each with its guard, and Redis once more
    up.send_signal(number)
    rest = up.communicate(timeout=30)[0]
    if number is not signal.SIGKILL:
        assert "everything has ended" in rest
        assert up.returncode == 0
    assert eventually(lambda: not any(running(pid) for pid in pids), within_s=10)


def children_of(pid: int) -> list[int]:
    """All processes below one."""
    stats = [stat.read_text().rpartition(")") for stat in Path("/proc").glob("[0-9]*/stat") if stat.exists()]
    table = [(int(head.split(" ", 1)[0]), int(tail.split()[1])) for head, _, tail in stats]
    if not table:  # macOS
        out = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        table = [(int(line.split()[0]), int(line.split()[1])) for line in out.splitlines()]
    found, below = {pid}, {pid}
    while below:
        below = {child for child, parent in table if parent in found} - found
        found |= below
    return sorted(found - {pid})
